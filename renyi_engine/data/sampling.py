"""The order in which training sees its examples."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers.trainer_pt_utils import get_length_grouped_indices

from renyi_engine.core import seeding


class StepSampler:
    """Says which examples each optimizer step sees. This depends on the seed and the step alone, so a resumed run needs
    no stored state. The last step of an epoch may be smaller. `steps_per_epoch` counts optimizer steps."""

    def __init__(self, lengths: Sequence[int], step_size: int, seed: int, group_by_length: bool) -> None:
        self._lengths = list(lengths)
        self._step_size = step_size
        self._seed = seed
        self._group_by_length = group_by_length
        self._order: tuple[int, list[int]] | None = None  # (epoch, its order) of the epoch asked for last
        self.steps_per_epoch = -(-len(self._lengths) // self._step_size)

    def examples(self, step: int) -> list[int]:
        """The indices of the examples of `step`. Steps are counted from 0."""
        epoch, position = divmod(step, self.steps_per_epoch)
        return self._epoch_order(epoch)[position * self._step_size :][: self._step_size]

    def _epoch_order(self, epoch: int) -> list[int]:
        if self._order is None or self._order[0] != epoch:
            generator = seeding.generator(self._seed, epoch)
            if self._group_by_length:
                order = get_length_grouped_indices(self._lengths, self._step_size, generator=generator)
            else:
                order = torch.randperm(len(self._lengths), generator=generator).tolist()
            self._order = (epoch, order)
        return self._order[1]
