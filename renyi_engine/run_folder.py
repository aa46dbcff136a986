"""The folder of a training run: what it was asked, what it measured, and whether it may be continued."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import math
import platform
import shlex
import sys
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from renyi_engine import checkpoint, files
from renyi_engine.config import CONFIG_FILE, TrainConfig
from renyi_engine.settings import changes, read_yaml, to_yaml

# what may differ between a run and its continuation: none of it changes how a step is computed, but that a run may be
# let off the watchdog that stopped it
_MAY_CHANGE = {
    "output_dir", "resume_from_checkpoint", "logging_steps", "eval_steps", "save_steps", "save_total_limit",
    "per_device_eval_batch_size", "max_steps", "num_train_epochs", "max_consecutive_skips", "use_cpu",
    "gradient_checkpointing", "spike_threshold",
}  # fmt: skip


class RunFolder:
    """RUN/config.yaml, run.json, metrics.jsonl, evaluation.json, checkpoint-N/, particles/, report.html."""

    def __init__(self, path: Path, resume_from: Path | None) -> None:
        self.path = path
        self.resume_from = resume_from
        """The checkpoint to continue from; None starts at step 0."""

    @classmethod
    def open(cls, config: TrainConfig) -> RunFolder:
        """Make or take up the folder `config` names.

        Raises:
            ValueError: it cannot be written; holds another run; or is to be resumed with settings that differ.
        """
        path = files.make_folder(Path(config.output_dir), "output_dir")
        wanted = config.resume_from_checkpoint
        has_run = (path / CONFIG_FILE).exists()
        if wanted is None:
            if has_run:
                raise ValueError(
                    f"output_dir: {path} already holds a run; choose another, remove it, or continue it with "
                    "--resume_from_checkpoint true"
                )
            return cls(path, None)
        if not has_run:
            raise ValueError(
                f"resume_from_checkpoint: {path} (output_dir) holds no run to continue: it has no {CONFIG_FILE}"
            )
        if diff := changes(dataclasses.asdict(config), read_yaml(path / CONFIG_FILE), _MAY_CHANGE):
            raise ValueError(f"resume_from_checkpoint: {path} was started with other settings:{diff}")
        if wanted == "true":
            found = checkpoint.newest(path)
            if found is None:
                warnings.warn(f"{path} holds no checkpoint yet; starting from step 0", stacklevel=2)
            return cls(path, found)
        explicit = Path(wanted)
        if not explicit.is_dir():
            raise ValueError(
                f"resume_from_checkpoint: {explicit}: no such folder; 'true' takes the newest of output_dir"
            )
        if explicit.resolve().parent != path.resolve():
            raise ValueError(f"resume_from_checkpoint: {explicit} belongs to another run than output_dir {path}")
        checkpoint.verify(explicit)
        return cls(path, explicit)

    def check_data(self, config: TrainConfig, sha256: Mapping[str, str]) -> None:
        """ValueError if the run is to be continued with other data than it was begun with: see `Dataset.sha256`."""
        if self.resume_from is None:
            return
        before = files.read_json(self.resume_from / "state.json").get("data_sha256")
        if before is None:
            raise another_version(self.resume_from)
        settings = {
            "training rows": "dataset_name",
            "held-out rows": "eval_dataset_name" if config.eval_dataset_name else "dataset_test_split",
            "tokens": "model_name_or_path",  # the rows are the same: the tokenizer or its chat template is another
        }
        for what, setting in settings.items():
            then, now = before[what], sha256[what]
            if then != now:
                raise ValueError(
                    f"{setting}: the {what} are not those of {self.resume_from}: sha256 {then[:8]} then, {now[:8]} "
                    "now; give what the run was begun with, or begin another run in a new output_dir"
                )

    def begin(self, config: TrainConfig, step: int) -> None:
        """Save the settings; forget what was measured after `step`, which will be measured again."""
        saved = dataclasses.replace(config, resume_from_checkpoint=None)
        files.write_text(self.path / CONFIG_FILE, to_yaml(saved))
        for path in (self._metrics, self.skips):
            if path.exists():
                lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
                files.write_text(path, "".join(line for line in lines if _step_of(line) <= step))

    def log(self, values: dict[str, Any]) -> None:
        """Append one line to metrics.jsonl; what is not a finite number becomes null."""
        with self._metrics.open("a", encoding="utf-8") as file:
            file.write(json.dumps(files.finite(values)) + "\n")

    def write_json(self, name: str, value: Any) -> None:
        files.write_json(self.path / name, files.finite(value))

    def log_skip(self, values: dict[str, Any]) -> None:
        """Append one line to skipped.jsonl: a step at which particles were not updated, and its rows."""
        with self.skips.open("a", encoding="utf-8") as file:
            file.write(json.dumps(values) + "\n")

    @property
    def command(self) -> str:
        return shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])

    @property
    def skips(self) -> Path:
        return self.path / "skipped.jsonl"

    @property
    def particles(self) -> Path:
        return self.path / "particles"

    @property
    def _metrics(self) -> Path:
        return self.path / "metrics.jsonl"


def another_version(path: Path) -> ValueError:
    return ValueError(f"resume_from_checkpoint: {path} was written by another version of renyi-engine")


def versions() -> dict[str, str]:
    """Versions of what a result depends on."""
    found = {"python": platform.python_version()}
    for package in ("renyi-engine", "torch", "triton", "transformers", "datasets", "safetensors", "peft"):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found


def _step_of(line: str) -> float:
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError, TypeError):
        return math.inf  # a line that a kill cut short
