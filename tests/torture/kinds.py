"""The kinds of attacks.

Each is a module with `prepare(seed, tally, folder)`, a context manager. It gives a function that makes the try of a
given number, and counts in the tally how the try ended.
"""

from __future__ import annotations

import importlib
import os
import time
from pathlib import Path

from .tally import Tally

SHARES = {"ops": 0.97, "kills": 0.57, "two_processes": 0.16, "flips": 0.24}
"""Of the time, in the order in which the kinds start: one process has `ops` alone, the other one the rest.
`flips` comes last: it reads data sets, which starts threads, and no process may fork after that."""
FEWEST_TRIES = 3
LINE_EVERY_S = 30.0


def attack(kind: str, seed: int, seconds: float, most_tries: int | None, first: int, folder: Path) -> Tally:
    """Make one try after the other, from number `first` on, until the time is up. The time includes imports and
    preparations. Files are written into `folder`.
    """
    start = shown = time.monotonic()
    os.environ["OMP_NUM_THREADS"] = "1"  # before anything imports torch
    tally = Tally(kind, seed, first)
    with importlib.import_module(f".{kind}", __package__).prepare(seed, tally, folder) as one_try:
        while tally.tries != most_tries and (time.monotonic() - start < seconds or tally.tries < FEWEST_TRIES):
            tally.number = first + tally.tries
            tally.tries += 1
            one_try(tally.number)
            if time.monotonic() - shown > LINE_EVERY_S:
                shown = time.monotonic()
                print(tally.line, flush=True)
    print(f"{tally.line}; done in {time.monotonic() - start:.0f} s", flush=True)
    return tally
