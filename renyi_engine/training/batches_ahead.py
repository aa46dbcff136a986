"""The batches of the next step are made while this step runs."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from torch import Tensor

from renyi_engine.data import packed_length

Batch = Mapping[str, Tensor]


class BatchesAhead:
    """Makes batches in a thread of its own, which lives as long as the `with` block.

    `make` makes one micro-batch of some examples. `most_tokens`: how many tokens these may take in a packed row; None:
    any number. With `pinned`, the batches lie in memory from which a GPU can copy while Python goes on.
    """

    def __init__(
        self,
        examples: Sequence[Any],
        make: Callable[[Sequence[Any]], Batch],
        *,
        most_tokens: int | None = None,
        pinned: bool = False,
    ) -> None:
        self._examples, self._make, self._most_tokens, self._pinned = examples, make, most_tokens, pinned
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
        batches = [self._make(part) for part in self.parts(examples, size)]
        if self._pinned:
            return [{name: tensor.pin_memory() for name, tensor in batch.items()} for batch in batches]
        return batches

    def parts(self, examples: list[Any], size: int) -> list[list[Any]]:
        """The examples of each micro-batch. One that alone has more than the most tokens is alone."""
        parts: list[list[Any]] = []
        left = 0.0
        for number, example in enumerate(examples):
            tokens = 0 if self._most_tokens is None else packed_length(example.sequences)
            if number % size == 0 or tokens > left:
                parts.append([])
                left = math.inf if self._most_tokens is None else self._most_tokens
            parts[-1].append(example)
            left -= tokens
        return parts
