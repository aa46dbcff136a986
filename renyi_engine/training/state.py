"""Where a training run stands: what a checkpoint keeps beside its tensors.

Layout: K particles.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from renyi_engine.objectives import ESS, LOSS, Task, mean_particle, means, sums
from renyi_engine.training.train_step import StepResult


@dataclass
class Window:
    """The steps since the last line of metrics."""

    examples: int = 0
    labels: int = 0
    totals: dict[str, Any] = field(default_factory=dict)
    """Sums over the examples, each one number, or a list with one of each particle."""
    alphas: list[float] = field(default_factory=list)
    """The alpha of every step."""
    alpha_star: float | None = None
    """The last estimate of the critical alpha, where one was made."""

    def add(self, result: StepResult, num_labels: int, alpha: float) -> None:
        """Add a step, whose examples have `num_labels` labels together."""
        self.examples += result.loss.numel()
        self.labels += num_labels
        self.alphas.append(alpha)
        shown = {"loss": result.loss, "ess": result.ess, "mixture": result.mixture_nll, "particles": -result.logp}
        for name, total in sums(shown | result.details).items():
            before = self.totals.get(name)
            if isinstance(total, list):
                total = [a + b for a, b in zip(before or [0.0] * len(total), total, strict=True)]
            elif before is not None:
                total += before
            self.totals[name] = total

    def means(self, task: Task, weights: Sequence[float]) -> dict[str, Any]:
        """What `metrics_of(task)` lists: means over the examples, and of negative log-likelihoods over the labels.
        Means over the particles are by these `weights`."""
        particles = [nll / self.labels for nll in self.totals["particles"]]
        return {
            LOSS.name: self.totals["loss"] / self.examples,
            task.nll.mixture.name: self.totals["mixture"] / self.labels,
            task.nll.mean_particle.name: mean_particle(particles, weights),
            task.nll.particles.name: particles,
            ESS.name: self.totals["ess"] / self.examples,
            **means({metric.name: self.totals[metric.name] for metric in task.details}, self.examples, weights),
        }


@dataclass
class State:
    """What a checkpoint keeps beside the tensors."""

    micro_batch_size: int
    """How many examples fit into the device's memory at once, as far as is known."""
    skipped: list[int]
    """How often each particle was not updated."""
    skipped_in_a_row: list[int]
    """How often each particle was not updated since its last update."""
    step: int = 0
    tokens: int = 0
    alpha: float = 0.0
    """The alpha of the last step."""
    recent_nlls: list[float] = field(default_factory=list)
    """The losses by which a spike is recognised: see `loss_spikes`."""
    window: Window = field(default_factory=Window)
    left_out: int = 0
    """Steps that were not made because a callback ended their epoch early."""

    @property
    def position(self) -> int:
        """The place in the order of the data: the steps that were made, and those that were left out."""
        return self.step + self.left_out

    def saved(self) -> dict[str, Any]:
        """What a checkpoint keeps; `State.load` reads it."""
        values = asdict(self)
        if not self.left_out:  # as earlier versions wrote it
            del values["left_out"]
        return values

    @classmethod
    def load(cls, values: dict[str, Any]) -> State:
        """Raises TypeError if the names are not those of `saved`."""
        return cls(**values | {"window": Window(**values["window"])})
