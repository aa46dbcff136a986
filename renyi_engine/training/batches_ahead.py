"""The batches of the next step are made while this step runs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from torch import Tensor

Batch = Mapping[str, Tensor]


class BatchesAhead:
    """Makes batches in a thread of its own, which lives as long as the `with` block.

    `make` makes one micro-batch of some examples. With `pinned`, the batches lie in memory from which a GPU can copy
    while Python goes on.
    """

    def __init__(self, examples: Sequence[Any], make: Callable[[Sequence[Any]], Batch], pinned: bool) -> None:
        self._examples, self._make, self._pinned = examples, make, pinned
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="batches")
        self._begun: tuple[tuple[list[int], int], Future[list[Batch]]] | None = None

    def __enter__(self) -> BatchesAhead:
        return self

    def __exit__(self, *_: object) -> None:
        self._begun = None
        self._thread.shutdown(cancel_futures=True)

    def begin(self, chosen: list[int], size: int) -> None:
        """Begin to make the micro-batches of the `chosen` examples, each of `size` examples at most."""
        self._begun = (chosen, size), self._thread.submit(self._make_all, chosen, size)

    def take(self, chosen: list[int], size: int) -> list[Batch]:
        """These micro-batches. If others were begun, they are dropped. Raises what `make` raises."""
        if self._begun is None or self._begun[0] != (chosen, size):
            self.begin(chosen, size)
        assert self._begun is not None
        batches, self._begun = self._begun[1], None
        return batches.result()

    def _make_all(self, chosen: list[int], size: int) -> list[Batch]:
        examples = [self._examples[i] for i in chosen]
        batches = [self._make(examples[start : start + size]) for start in range(0, len(examples), size)]
        if self._pinned:
            return [{name: tensor.pin_memory() for name, tensor in batch.items()} for batch in batches]
        return batches
