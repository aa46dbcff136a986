"""From a training checkpoint to the adapter folders that PEFT and vLLM load; the base's weights are not read."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from renyi_engine import adapter_folder, base_model, checkpoint, files, targets
from renyi_engine.config import CONFIG_FILE, TrainConfig
from renyi_engine.settings import read_yaml


def export(source: Path, output: Path) -> Path:
    """Write the adapters of `source`, RUN/checkpoint-N or RUN for its newest, to `output`/p000, p001, ...

    Raises:
        ValueError: no such checkpoint, or damaged; the base's configuration cannot be had.
    """
    run = source if (source / CONFIG_FILE).is_file() else source.parent
    if not (run / CONFIG_FILE).is_file():
        raise ValueError(
            f"checkpoint: {source} is neither a run folder nor a checkpoint in one ({CONFIG_FILE} is missing)"
        )
    path = checkpoint.newest(run) if source == run else source
    if path is None:
        raise ValueError(f"checkpoint: {run} holds no checkpoint yet")
    known = {f.name for f in dataclasses.fields(TrainConfig)}  # an objective adds its own
    config = TrainConfig(**{name: value for name, value in read_yaml(run / CONFIG_FILE).items() if name in known})
    skeleton = base_model.skeleton(config)
    adapters, state = checkpoint.adapters(path), files.read_json(path / "state.json")
    adapter_folder.write(
        output,
        config=config.ensemble_config(),
        adapters=adapters,
        **targets.describe(skeleton, list(adapters))._asdict(),
        base_model=config.model_name_or_path,
        base=state.get("base"),
        fan_in_fan_out=isinstance(skeleton.get_submodule(next(iter(adapters))), targets.Conv1D),
        alpha=state["alpha"],
    )
    return output
