"""The forwards of one model: which rows each of them has, and that only one runs at a time.

Every thread and every asyncio task says for itself which rows its forwards have. While a forward runs, hooks and
adapted maps keep what they need on the model, which all threads share. So only one forward runs at a time, and other
threads wait. If gradient checkpointing runs a layer again, this counts as a forward too. It has the rows of the first
run, although autograd may run it in another thread.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from renyi_engine.ensemble.adapted_maps import Rows

_asked: ContextVar[tuple[tuple[object, Rows], ...]] = ContextVar("renyi_engine_rows", default=())
"""What this thread or asyncio task asks for: (the key of a model's `Forwards`, rows) for each block that it is inside
of. The block that it entered last stands at the end."""


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
        """What the rows are in the forwards that this thread or task starts."""
        return next((rows for key, rows in reversed(_asked.get()) if key is self._key), Rows.SHARED)

    @contextmanager
    def asking(self, rows: Rows) -> Iterator[None]:
        """Inside the block, forwards that this thread or task starts have these rows. Others' do not change."""
        mine = (self._key, rows)
        _asked.set((*_asked.get(), mine))
        try:
            yield
        finally:
            # a generator may leave its block later than a block that was entered after it, or in another thread
            _asked.set(tuple(block for block in _asked.get() if block is not mine))

    def rows(self) -> Rows:
        """What the rows are in the forward that is running."""
        return self._rows or self.asked

    @contextmanager
    def run(self, rows: Rows) -> Iterator[bool]:
        """A block for one forward, or for a part of one that runs again. Other threads wait. Gives True if this thread
        is not inside another forward already."""
        with self._one_at_a_time:
            before, self._rows = self._rows, rows
            try:
                yield before is None
            finally:
                self._rows = before
