"""How a person sees that a command works: a live display on a terminal, and plain lines elsewhere."""

from __future__ import annotations

import datetime
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from types import TracebackType
from typing import Any, TypeVar

import rich.progress
from rich.console import Console, Group
from rich.live import Live
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.text import Text

from renyi_engine.core.terminal import visible

T = TypeVar("T")

LONGEST_ETA_S = 10**10
"""The longest remaining time that is shown, 300 years: --max_steps may be a number that no run reaches."""

QUIET_S = 30.0
"""How many seconds pass from one line to the next where there is no terminal."""


def track(items: Sequence[T], what: str) -> Iterator[T]:
    """The items one by one. A terminal shows a bar; elsewhere a line is printed at the start and every half minute."""
    console = _console()
    what = visible(what)
    if console.is_terminal:
        yield from rich.progress.track(items, escape(what), console=console, transient=True)
        return
    started = spoken = time.monotonic()
    console.print(f"{what}: {len(items)} batches", markup=False, highlight=False, soft_wrap=True)
    for done, item in enumerate(items):
        if done and (now := time.monotonic()) - spoken > QUIET_S:
            left = datetime.timedelta(seconds=round((now - started) / done * (len(items) - done)))
            console.print(f"{what}: {done}/{len(items)}  ETA {left}", markup=False, highlight=False, soft_wrap=True)
            spoken = now
        yield item


def _console() -> Console:
    """A console on standard error itself, not on the stream of `only_text`: a display has to control the terminal."""
    return Console(file=getattr(sys.stderr, "rich_proxied_file", sys.stderr))


class TrainingProgress:
    """The display of a training: steps, loss, the task's headline, ESS, tokens/s and remaining time.

    Messages are printed above it, one line each.
    """

    def __init__(self, total_steps: int, done_steps: int, num_particles: int, console: Console | None = None) -> None:
        self.console = console or _console()
        self._num_particles = num_particles
        self._total = total_steps
        self._first = self._done = done_steps
        self._started = time.monotonic()
        self._live: Live | None = None
        if self.console.is_terminal:
            # in two rows, because a terminal of 80 columns has no room for both side by side
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
        """Show that `step` steps are done."""
        self._done = step
        if self._live:
            self._bar.update(self._task, completed=step)

    def show(self, metrics: Mapping[str, Any], headline: str) -> None:
        """Show the metrics of training. `headline` is what matters most to the task, in words."""
        numbers = (
            f"loss {metrics['loss_nats']:.3f} nats  {headline}  "
            f"ESS {metrics['ess_particles']:.2f}/{self._num_particles}  "
            f"{metrics['tokens_per_s']:.0f} tokens/s"
        )
        if self._live:
            self._numbers.plain = numbers
        else:
            self._print(f"step {self._done}/{self._total}  {numbers}  ETA {self._eta()}")

    def say(self, message: str) -> None:
        """Print a message above the display."""
        self._print(message)

    def _print(self, message: str) -> None:
        self.console.print(visible(message), markup=False, highlight=False, soft_wrap=True)

    def _eta(self) -> str:
        rate = (time.monotonic() - self._started) / max(self._done - self._first, 1)
        return str(datetime.timedelta(seconds=min(round(rate * (self._total - self._done)), LONGEST_ETA_S)))
