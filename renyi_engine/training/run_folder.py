"""The folder of a training run: who may write into it, and whether the run in it may be continued."""

from __future__ import annotations

import dataclasses
import shlex
import shutil
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from renyi_engine.core import CONFIG_FILE, changes, files, output_folder, read_yaml, to_dict, to_yaml
from renyi_engine.ensemble import Fingerprint, difference, is_fingerprint
from renyi_engine.training import checkpoint
from renyi_engine.training.config import TrainConfig
from renyi_engine.training.dataset import Dataset
from renyi_engine.training.records import (
    EVALUATION_FILE,
    FACTS_FILE,
    FINISHED,
    METRICS_FILE,
    PARTICLES,
    REPORT_FILE,
    SKIPS_FILE,
    Records,
)

# Settings that may differ when a run is resumed. Some of them change later steps. max_steps and num_train_epochs are
# the length of the schedules of the learning rate and of alpha, so a run that is made longer has other steps. With a
# larger spike_threshold, a run that was stopped after too many spikes can go on.
_MAY_CHANGE = {
    "output_dir", "resume_from_checkpoint", "logging_steps", "eval_steps", "save_steps", "save_total_limit",
    "per_device_eval_batch_size", "max_steps", "num_train_epochs", "max_consecutive_skips", "use_cpu",
    "gradient_checkpointing", "padding_free", "packed_row_tokens", "cuda_graphs", "torch_compile", "spike_threshold",
    "report_to", "run_name", "metric_for_best_model",
}  # fmt: skip

# what runs of earlier versions had, whose config.yaml does not say it
_ALWAYS_BEFORE = {"particle_weights": "uniform", "particle_weight_floor": TrainConfig.particle_weight_floor}


class RunFolder:
    """The folder of one run: its records (see `records`), and its checkpoints, RUN/checkpoint-N.

    If the run went on from an older checkpoint, RUN/set-aside-1 holds the same files of the steps after it.
    """

    def __init__(self, path: Path, resume_from: Path | None) -> None:
        self.path = path
        self.records = Records(path)
        self.resume_from = resume_from
        """The checkpoint to continue from; None starts at step 0."""

    @classmethod
    @contextmanager
    def open(cls, config: TrainConfig) -> Iterator[RunFolder]:
        """Make the folder that `config` names, or continue in it. Within the block, no other process writes into it.

        Raises:
            ValueError: it cannot be written; another process writes into it; it holds another run; or its run is to be
                resumed with other settings.
        """
        with output_folder.locked(Path(config.output_dir)) as path:
            resume_from = _checkpoint_to_resume(config, path)
            output_folder.clear_away_leftovers(path)
            yield cls(path, resume_from)

    def check_data(self, dataset: Dataset) -> None:
        """Raise ValueError if the run is to be resumed with other data than it was begun with: see `Dataset.sha256`."""
        if self.resume_from is None:
            return
        before = checkpoint.read_state(self.resume_from).get("data_sha256")
        if before is None:
            raise another_version(self.resume_from)
        for what, argument in dataset.given_as.items():
            then, now = before[what], dataset.sha256[what]
            if then != now:
                raise ValueError(
                    f"{argument}: the {what} are not those of {self.resume_from}: sha256 {then[:8]} then, {now[:8]} "
                    "now; give what the run was begun with, or begin another run in a new output_dir"
                )

    def claim(self, config: TrainConfig) -> None:
        """Save the settings, if none are there. What is written before `begin` then belongs to a run that can be
        resumed."""
        if not (self.path / CONFIG_FILE).exists():
            self._save(config)

    def is_finished(self) -> bool:
        """Whether a run came to its end here, and its particles are still there."""
        try:
            facts = files.read_json(self.path / FACTS_FILE)
        except ValueError:  # no such file, or a broken one: it is written anew
            return False
        return isinstance(facts, dict) and facts.get("status") == FINISHED and self.particles.is_dir()

    def begin(self, config: TrainConfig, step: int) -> None:
        """Save the settings. Where the run goes back to `step`, set aside the later checkpoints, and remove the later
        lines of metrics, which will be measured again."""
        self._set_aside(step)
        checkpoint.keep_newest(self.path, step, config.save_total_limit)  # a kill may have come before it
        self._save(config)
        self.records.go_back_to(step)

    def _save(self, config: TrainConfig) -> None:
        saved = dataclasses.replace(config, resume_from_checkpoint=None)
        files.write_text(self.path / CONFIG_FILE, to_yaml(saved))

    def _set_aside(self, step: int) -> None:
        """Move the checkpoints that are newer than `step`, and what else was made after it, into a run folder of their
        own. The same is done where a finished run has no checkpoint left and begins again. The newest checkpoints are
        moved first, so that after a kill what is left still ends at one step."""
        later = [path for number, path in checkpoint.all_of(self.path) if number > step]
        if not later and (step > 0 or not self.particles.exists()):
            return
        number = 1
        while (aside := self.path / f"set-aside-{number}").exists():
            number += 1
        aside.mkdir()
        for path in (self.path / name for name in (CONFIG_FILE, FACTS_FILE, METRICS_FILE, SKIPS_FILE)):
            if path.exists():
                shutil.copy2(path, aside)
        made_at_the_end = [self.path / name for name in (PARTICLES, EVALUATION_FILE, REPORT_FILE)]
        moved = [*filter(Path.exists, made_at_the_end), *reversed(later)]
        for path in moved:
            if path.is_symlink():  # a relative link would lead elsewhere from there
                (aside / path.name).symlink_to(path.resolve())
                path.unlink()
            else:
                path.rename(aside / path.name)
        names = ", ".join(path.name for path in later or moved)
        warnings.warn(f"{self.path} goes on from step {step}; what came after it ({names}) is in {aside}", stacklevel=3)

    @property
    def command(self) -> str:
        return shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])

    @property
    def particles(self) -> Path:
        return self.path / PARTICLES


def _checkpoint_to_resume(config: TrainConfig, path: Path) -> Path | None:
    """The checkpoint of the run in `path` that `config` asks to continue from; None to start at step 0."""
    wanted = config.resume_from_checkpoint
    has_run = (path / CONFIG_FILE).exists()
    if wanted is None:
        if has_run:
            raise ValueError(
                f"output_dir: {path} already holds a run; choose another, remove it, or continue it with "
                "--resume_from_checkpoint true"
            )
        output_folder.require_free(path)
        return None
    if not has_run:
        raise ValueError(
            f"resume_from_checkpoint: {path} (output_dir) holds no run to continue: it has no {CONFIG_FILE}"
        )
    before = _ALWAYS_BEFORE | config.in_todays_words(read_yaml(path / CONFIG_FILE))
    if diff := changes(to_dict(config), before, _MAY_CHANGE):
        raise ValueError(f"resume_from_checkpoint: {path} was started with other settings:{diff}")
    if wanted == "true":
        with _resuming():
            found = checkpoint.newest(path)
        if found is None:
            warnings.warn(f"{path} holds no checkpoint yet; starting from step 0", stacklevel=3)
        return found
    explicit = Path(wanted)
    if not explicit.is_dir():
        raise ValueError(f"resume_from_checkpoint: {explicit}: no such folder; 'true' takes the newest of output_dir")
    if explicit.resolve() == path.resolve():
        raise ValueError(
            f"resume_from_checkpoint: {wanted!r} is output_dir itself; expected one of its folders checkpoint-N, or "
            "true for the newest"
        )
    if explicit.absolute().parent.resolve() != path.resolve():
        raise ValueError(f"resume_from_checkpoint: {explicit} belongs to another run than output_dir {path}")
    with _resuming():
        checkpoint.verify(explicit)
    return explicit


@contextmanager
def _resuming() -> Iterator[None]:
    """Inside the block, a ValueError about a checkpoint names the setting that asked for it."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"resume_from_checkpoint: {error}") from None


def require_same_base(path: Path, then: Any, now: Fingerprint) -> None:
    """ValueError unless this is the base that the checkpoint at `path` was trained on, to the bit."""
    if not is_fingerprint(then):
        raise another_version(path)
    found = difference(then, now)
    weights = found.weights + found.rounded + found.unknown
    for what, names in (("weights", weights), ("config", found.values)):
        if names:
            raise ValueError(
                f"resume_from_checkpoint: {path}: the base model's {what} changed: {', '.join(names[:3])}"
                + f" and {len(names) - 3} more" * (len(names) > 3)
            )


def another_version(path: Path) -> ValueError:
    return ValueError(f"resume_from_checkpoint: {path} was written by another version of renyi-engine")
