"""What a person sees while training: a live display on a terminal, plain lines elsewhere."""

from __future__ import annotations

import datetime
import time
import warnings
from collections.abc import Mapping
from types import TracebackType
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.text import Text


class TrainingProgress:
    """Steps, loss, mixture NLL, ESS, tokens/s and ETA. Warnings are printed above the display, one line each."""

    def __init__(self, total_steps: int, done_steps: int, num_particles: int, console: Console | None = None) -> None:
        self.console = console or Console(stderr=True)
        self._num_particles = num_particles
        self._total = total_steps
        self._first = self._done = done_steps
        self._started = time.monotonic()
        self._live: Live | None = None
        if self.console.is_terminal:
            # two rows: side by side they do not fit a terminal of 80 columns
            self._bar = Progress(TextColumn("training"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
            self._task = self._bar.add_task("training", total=total_steps, completed=done_steps)
            self._numbers = Text()
            self._live = Live(Group(self._bar, self._numbers), console=self.console)

    def __enter__(self) -> TrainingProgress:
        if self._live:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live:
            self._live.stop()

    def advance(self, step: int) -> None:
        self._done = step
        if self._live:
            self._bar.update(self._task, completed=step)

    def show(self, metrics: Mapping[str, Any]) -> None:
        """Show a line of training metrics."""
        numbers = (
            f"loss {metrics['loss_nats']:.3f} nats  "
            f"mixture NLL {metrics['mixture_nll_nats_per_token']:.3f} nats/token  "
            f"ESS {metrics['ess_particles']:.2f}/{self._num_particles}  "
            f"{metrics['tokens_per_s']:.0f} tokens/s"
        )
        if self._live:
            self._numbers.plain = numbers
        else:
            self._print(f"step {self._done}/{self._total}  {numbers}  ETA {self._eta()}")

    def say(self, message: str) -> None:
        self._print(message)

    def _print(self, message: str) -> None:
        self.console.print(message, markup=False, highlight=False, soft_wrap=True)

    def _eta(self) -> str:
        rate = (time.monotonic() - self._started) / max(self._done - self._first, 1)
        return str(datetime.timedelta(seconds=round(rate * (self._total - self._done))))


def plain_warning(
    message: Warning | str, category: type[Warning], filename: str, lineno: int, line: str | None = None
) -> str:
    return f"warning: {message}\n"


def use_plain_warnings() -> None:
    """Print warnings as one line, without the source line that raised them."""
    warnings.formatwarning = plain_warning
