"""What came out of the steps, and what can go wrong in them: updates that are skipped, and losses that are not finite.

Layout: K particles.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from pathlib import Path

from renyi_engine.objectives import Coupling
from renyi_engine.training.figures import MadeStep
from renyi_engine.training.records import Records
from renyi_engine.training.state import State
from renyi_engine.training.train_step import StepResult


class TrainingDiverged(RuntimeError):
    """A particle's update was skipped too many times in a row, or the last loss is not finite."""


class Outcomes:
    """Reads the measurements of the steps, one step after the other, and keeps the books in `state`.

    Attributes:
        last: the measurements of the last step that was read.
        loss_is_finite: whether its loss of the healthy particles is finite. While it is not, no checkpoint is made.
    """

    def __init__(
        self, state: State, coupling: Coupling, max_consecutive_skips: int, records: Records, say: Callable[[str], None]
    ) -> None:
        self.state, self.coupling, self.records, self.say = state, coupling, records, say
        self.limit = max_consecutive_skips
        self.last: StepResult | None = None
        self.loss_is_finite = True
        self._unread: deque[MadeStep] = deque()

    def expect(self, step: MadeStep) -> None:
        """Take a step that will be read later."""
        self._unread.append(step)

    def read(self, but_newest: bool = False) -> None:
        """Read every step that was not read yet; with `but_newest`, all but the newest one, which may still run.

        Raises:
            TrainingDiverged: a particle was not updated for too many steps in a row.
        """
        while len(self._unread) > but_newest:
            self._take(self._unread.popleft())

    def _take(self, step: MadeStep) -> None:
        result = self.last = step.figures.read()
        self.loss_is_finite = bool(result.mixture_nll.isfinite().all())
        self._count_skips(step, result)
        if result.updated.any():
            self.coupling.observe(result.logp)
        self.state.window.add(result, step.num_labels, step.alpha)

    def _count_skips(self, step: MadeStep, result: StepResult) -> None:
        """Count the particles whose update was skipped; record the rows; stop when one cannot recover."""
        state = self.state
        skipped = [k for k, updated in enumerate(result.updated.tolist()) if not updated]
        state.skipped_in_a_row = [n + 1 if k in skipped else 0 for k, n in enumerate(state.skipped_in_a_row)]
        if not skipped:
            return
        for k in skipped:
            state.skipped[k] += 1
        why = "the loss is a spike (spike_threshold)" if result.spike else "the gradient is not finite"
        self.records.log_skip({"step": step.number, "particles": skipped, "rows": step.rows, "why": why})
        self.say(f"step {step.number}: no update of particles {skipped}: {why} (rows {step.rows})")
        lost = [k for k in skipped if state.skipped_in_a_row[k] >= self.limit]
        if lost:
            raise TrainingDiverged(
                f"no update of particles {lost} {self.limit} steps in a row (max_consecutive_skips): {why}; the rows "
                f"are in {self.records.skips}; start with a lower learning rate, or resume with a larger "
                "max_consecutive_skips" + (" or spike_threshold" if result.spike else "")
            )

    def require_finite_loss(self, last_checkpoint: Path | None) -> None:
        """TrainingDiverged if the last loss is NaN or infinite: such particles are of no use."""
        if not self.loss_is_finite:
            raise TrainingDiverged(
                f"the loss of the last step, {self.state.step}, is not finite, so the particles are not written; "
                f"{describe_checkpoint(last_checkpoint)}; start with a lower learning rate"
            )


def describe_checkpoint(last: Path | None) -> str:
    if last is None:
        return "there is no checkpoint from before"
    return f"the last checkpoint whose loss was finite is {last}"
