"""From a training checkpoint to adapter folders that PEFT and vLLM load. The weights of the base are not read.

The folder of a run may come from somebody else. So what its config.yaml says is compared with the checkpoint, and it
cannot allow code to run.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from renyi_engine import base_model
from renyi_engine.core import CONFIG_FILE, changes, output_folder, parse, read_yaml
from renyi_engine.ensemble import adapter_folder, is_distribution, is_fingerprint, is_number, targets
from renyi_engine.training import checkpoint
from renyi_engine.training.config import CONFIGS, TrainConfig
from renyi_engine.training.records import kind_of


def export_particles(source: Path, output: Path, *, trust_remote_code: bool = False) -> Path:
    """Write the adapters of `source` to `output`/p000, p001, ...

    Args:
        source: RUN/checkpoint-N, or RUN for its newest checkpoint.
        trust_remote_code: run code that comes with the base. The run's own setting for this is ignored.

    Raises:
        ValueError: there is no such checkpoint, or it is damaged; the run's settings cannot be read, or are not those
            of the checkpoint; the base's configuration cannot be loaded; or `output` is not free, see
            `output_folder.claimed`.
    """
    run = source if (source / CONFIG_FILE).is_file() else source.parent
    if not (run / CONFIG_FILE).is_file():
        raise ValueError(
            f"checkpoint: expected the folder of a run, or a checkpoint in one; {source} has no {CONFIG_FILE}"
        )
    path = checkpoint.newest(run) if source == run else source
    if path is None:
        raise ValueError(f"checkpoint: {run} holds no checkpoint yet")
    config = _settings(run / CONFIG_FILE, trust_remote_code)
    adapters, state = checkpoint.adapters(path), checkpoint.read_state(path)
    alpha: Any = state.get("alpha")
    base, trained = state.get("base"), state.get("ensemble", {})
    K = len(next(iter(adapters.values()))[0])
    weights = state.get("particle_weights", [1 / K] * K)  # checkpoints of earlier versions have none
    is_valid = is_number(alpha) and alpha >= 0 and (base is None or is_fingerprint(base)) and isinstance(trained, dict)
    if not (is_valid and is_distribution(weights, K)):
        raise ValueError(
            f"{path / checkpoint.STATE_FILE}: expected alpha, a number of at least 0, base, the fingerprint of a base, "
            "ensemble, the settings of an ensemble, and particle_weights, numbers of at least 0 with the sum 1, one "
            "for each particle; restore the file"
        )
    try:
        skeleton = base_model.skeleton(config)
        _check(config, skeleton, adapters, path)
        _check_unseen(config, trained, path)
    except ValueError as error:
        raise ValueError(f"{run / CONFIG_FILE}: {error}") from None
    with output_folder.claimed(output) as folder:
        adapter_folder.write(
            folder,
            skeleton,
            config.ensemble_config(),
            adapters,
            base_model=config.model_name_or_path,
            base=base,
            alpha=alpha,
            weights=weights,
        )
    return output


def _settings(path: Path, trust_remote_code: bool) -> TrainConfig:
    """The settings of a run. Every name has to be known, and every value of the right type and in its range."""
    values = read_yaml(path)
    for name in ("model_name_or_path", "dataset_name", "output_dir"):
        if name not in values:
            raise ValueError(f"{path}: not the settings of a run: {name} is missing; restore the file")
    kind = kind_of(values, path)
    flags = ["--config", str(path), f"--trust_remote_code={trust_remote_code}"]
    try:
        # a run whose rows were given to a Trainer names no data set
        return parse(CONFIGS[kind], flags, f"renyi-engine {kind}", excused=("dataset_name",))[0]
    except ValueError as error:
        raise ValueError(f"{path}: {str(error).removeprefix(f'{path}: ')}") from None


def _check_unseen(config: TrainConfig, trained: Mapping[str, Any], path: Path) -> None:
    """Compare what no tensor shows, such as lora_alpha, with what the checkpoint at `path` was trained with.

    Raises:
        ValueError: they differ.
    """
    if not trained:  # a checkpoint of an earlier version does not say
        return
    now = json.loads(json.dumps(dataclasses.asdict(config.ensemble_config())))
    # earlier versions called r "rank"
    trained = {"r" if name == "rank" else name: value for name, value in trained.items()}
    if now != trained:
        different = "; ".join(changes(now, trained, ()).strip().splitlines())
        raise ValueError(f"other settings than those of {path}: {different}; restore the file")


def _check(
    config: TrainConfig, model: PreTrainedModel, adapters: Mapping[str, tuple[Tensor, Tensor]], path: Path
) -> None:
    """Compare the settings with the adapters, and the adapters with the maps of the model.

    Raises:
        ValueError: they do not fit.
    """
    A, _ = next(iter(adapters.values()))
    for name, held in (("num_particles", A.shape[0]), ("lora_r", A.shape[1])):
        if getattr(config, name) != held:
            raise ValueError(f"{name}: {getattr(config, name)} here, but {path} holds {held}; restore the file")
    target_modules = config.ensemble_config().target_modules
    maps = targets.match_targets(model, target_modules, config.layers_to_transform)
    different = adapters.keys() - maps.keys()
    if not targets.is_all_linear(target_modules):  # "all-linear" leaves out maps that do not run on text alone
        different |= maps.keys() - adapters.keys()
    if different:
        one = min(different)
        place = f"are only in {path}" if one in adapters else f"are not in {path}"
        raise ValueError(
            f"lora_target_modules, layers_to_transform: adapters of {one} {place}; restore the file, or give "
            f"{config.model_name_or_path} as it was"
        )
    for name, (A, B) in adapters.items():
        if (A.shape[-1], B.shape[1]) != targets.features(maps[name]):
            raise ValueError(
                f"model_name_or_path: {name} has {targets.features(maps[name])} in and out features in "
                f"{config.model_name_or_path}, and {(A.shape[-1], B.shape[1])} in {path}; restore the file"
            )
