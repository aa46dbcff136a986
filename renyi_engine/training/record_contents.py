"""What a training run measures of itself: the lines of metrics.jsonl, and run.json."""

from __future__ import annotations

import time
from typing import Any

import torch

from renyi_engine.core import versions
from renyi_engine.ensemble import LoraEnsemble
from renyi_engine.objectives import EVAL, Task, cut_rows
from renyi_engine.training.dataset import Dataset
from renyi_engine.training.records import (
    ALPHA,
    ALPHA_OF_STEPS,
    ALPHA_STAR,
    ELAPSED,
    EPOCH,
    GRAD_NORM,
    LEARNING_RATE,
    PARTICLE_WEIGHTS,
    PRIOR,
    SKIPPED_UPDATES,
    STEP,
    TOKENS,
    TOKENS_PER_S,
)
from renyi_engine.training.state import State
from renyi_engine.training.train_step import StepResult


class Clock:
    """The time and the tokens since the run was started or resumed, and since the last line of metrics."""

    def __init__(self) -> None:
        self.started = self.window_started = time.monotonic()
        self.window_tokens = 0

    @property
    def elapsed_s(self) -> float:
        return time.monotonic() - self.started

    def next_window(self) -> dict[str, float]:
        """What a line of metrics says of the time. The next line counts from here."""
        now = time.monotonic()
        tokens_per_s = self.window_tokens / (now - self.window_started)
        self.window_started, self.window_tokens = now, 0
        return {TOKENS_PER_S.name: tokens_per_s, ELAPSED.name: now - self.started}


def step_record(
    state: State,
    task: Task,
    result: StepResult,
    learning_rate: float,
    learns_weights: bool,
    epoch: float,
    clock: Clock,
) -> dict[str, Any]:
    """A line of metrics: means over the window, and beside them `result` and `learning_rate` of its last step."""
    window = state.window
    return {
        STEP.name: state.step,
        EPOCH.name: epoch,
        **window.means(task, result.particle_weights.tolist()),
        ALPHA.name: state.alpha,
        ALPHA_OF_STEPS.name: window.alphas,
        **({} if window.alpha_star is None else {ALPHA_STAR.name: window.alpha_star}),
        PRIOR.name: result.prior.item(),
        LEARNING_RATE.name: learning_rate,
        GRAD_NORM.name: result.norms.tolist(),
        SKIPPED_UPDATES.name: state.skipped,
        **({PARTICLE_WEIGHTS.name: result.particle_weights.tolist()} if learns_weights else {}),
        TOKENS.name: state.tokens,
        **clock.next_window(),
    }


def evaluation_record(state: State, summary: dict[str, Any], epoch: float) -> dict[str, Any]:
    """The line of metrics of an evaluation on held-out data."""
    return {STEP.name: state.step, EPOCH.name: epoch} | {EVAL + name: value for name, value in summary.items()}


def facts(
    status: str, command: str, ensemble: LoraEnsemble, dataset: Dataset, micro_batch_size: int, clock: Clock
) -> dict[str, Any]:
    """run.json: what the report says of the run beside its settings."""
    model = ensemble.model
    return {
        "command": command,
        "status": status,
        "versions": versions(),
        "device": torch.cuda.get_device_name() if model.device.type == "cuda" else "CPU",
        "dtype": str(model.dtype).removeprefix("torch."),
        "data_sha256": dataset.sha256,
        "num_train_examples": len(dataset.train),
        "num_eval_examples": len(dataset.held_out),
        "num_parameters_per_particle": sum(p[0].numel() for p in ensemble.parameters()),
        "adapted_maps": len(ensemble.paths),
        "micro_batch_size": micro_batch_size,
        "dropped_rows": {reason: len(rows) for reason, rows in dataset.dropped.items()},
        "cut_rows": len(cut_rows(dataset.train)) + len(cut_rows(dataset.held_out)),
        "elapsed_s": clock.elapsed_s,
    }
