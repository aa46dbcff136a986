"""The forwards of one model: what the rows of each are, and that only one runs at a time.

Each thread or asyncio task says for itself what the rows of its forwards are. Hooks and adapted maps keep what they
need in the model, which all threads share, so only one forward runs at a time; other threads wait. A layer that
gradient checkpointing runs again counts as a forward too, with the rows of the first; autograd may run it in a thread
of its own.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from renyi_engine.ensemble.adapted_maps import Rows

_asked: ContextVar[tuple[tuple[object, Rows], ...]] = ContextVar("renyi_engine_rows", default=())
"""What this thread, or asyncio task, asks for: (the key of a model's `Forwards`, rows) of each block that it is in, the
last one entered at the end."""


class Forwards:
    """The forwards of one model. A deep copy belongs to a copy of the model, where nothing runs yet."""

    def __init__(self) -> None:
        self._one_at_a_time = threading.RLock()
        self._rows: Rows | None = None
        self._key = object()

    def __deepcopy__(self, memo: dict[int, Any]) -> Forwards:
        return Forwards()

    @property
    def asked(self) -> Rows:
        """The rows of the forwards that this thread or task starts."""
        return next((rows for key, rows in reversed(_asked.get()) if key is self._key), Rows.SHARED)

    @contextmanager
    def asking(self, rows: Rows) -> Iterator[None]:
        """Inside, the forwards that this thread or task starts have these rows; those of others are as they were."""
        mine = (self._key, rows)
        _asked.set((*_asked.get(), mine))
        try:
            yield
        finally:
            # a generator may leave its block after one that was entered later, and even in another thread
            _asked.set(tuple(block for block in _asked.get() if block is not mine))

    def rows(self) -> Rows:
        """The rows of the forward that is running."""
        return self._rows or self.asked

    @contextmanager
    def run(self, rows: Rows) -> Iterator[bool]:
        """Around one forward, or a part of one that runs again; other threads wait. Gives True for the outermost of
        the runs that this thread is in."""
        with self._one_at_a_time:
            before, self._rows = self._rows, rows
            try:
                yield before is None
            finally:
                self._rows = before
