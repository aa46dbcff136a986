"""Makes the optimizer steps of a run, and waits for none of them.

What a step needs of the steps before it, the limit of its loss, stays on the device. Alpha, the learning rate, the
number of examples and this limit are tensors there, so a step is the same work whatever their values are.

Layout: K particles.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor
from transformers import get_scheduler

from renyi_engine.data import Filler, RowSizes, StepSampler
from renyi_engine.ensemble import LoraEnsemble, records
from renyi_engine.objectives import Task, batch_of, length
from renyi_engine.training.batches_ahead import BatchesAhead
from renyi_engine.training.config import TrainConfig, steps_of
from renyi_engine.training.figures import Figures, MadeStep
from renyi_engine.training.loss_spikes import RecentNlls
from renyi_engine.training.state import State
from renyi_engine.training.train_step import micro_step, train_step

_LOOKED_AHEAD = 500
"""The sizes of rows are chosen by so many steps."""


class Steps:
    """The order of the examples, the optimizer with its learning rate, and the steps that are made with them.

    `tell` is called at transformers' events within a step. The thread that makes batches lives as long as the `with`
    block of `batches`.
    """

    def __init__(
        self,
        config: TrainConfig,
        task: Task,
        examples: list[Any],
        ensemble: LoraEnsemble,
        tell: Callable[[str], object],
    ) -> None:
        self.config, self.task, self.examples, self.ensemble, self.tell = config, task, examples, ensemble, tell
        self.device = ensemble.particles.values.device
        self.sampler = StepSampler(
            [length(item) for item in examples],
            config.per_device_train_batch_size * config.gradient_accumulation_steps,
            config.seed,
            config.train_sampling_strategy == "group_by_length",
        )
        epochs = round(config.num_train_epochs * self.sampler.steps_per_epoch)
        self.total = config.max_steps if config.max_steps > 0 else max(1, epochs)
        self.optimizer = torch.optim.AdamW(
            [ensemble.particles.values],
            lr=config.learning_rate,
            betas=(config.adam_beta1, config.adam_beta2),
            eps=config.adam_epsilon,
            weight_decay=config.weight_decay,
            fused=True,  # needs no memory beside the moments
        )
        self._factor = _schedule(config, self.optimizer, self.total)
        # the kernels of the fused AdamW read it in these types
        self._learning_rate = self._number(0.0, torch.float32 if self.device.type == "cuda" else torch.float64)
        # asked here, because the first one to ask tries the model, and the thread that makes batches must not
        most_tokens, pinned = config.packed_row_tokens if ensemble.packs else None, self.device.type == "cuda"
        self.batches = BatchesAhead(examples, self._batch, most_tokens=most_tokens, pinned=pinned)
        self._run: Callable[[Mapping[str, Tensor]], dict[str, Tensor]] | None = None
        self._filler: Filler | None = None
        self._planned_for: int | None = None
        if config.cuda_graphs != "false" and ensemble.packs and records(self.device):
            self._run = ensemble.captured(partial(micro_step, ensemble, task))
        self.recent_nlls = RecentNlls([], self.device)

    def go_on(self, recent_nlls: list[float]) -> None:
        """Go on from a checkpoint that keeps these."""
        self.recent_nlls = RecentNlls(recent_nlls, self.device)

    def set_learning_rate(self, step: int) -> None:
        """Give the optimizer the learning rate of `step`, which is counted from 0. Callbacks may change it."""
        self.optimizer.param_groups[0]["lr"] = self.config.learning_rate * self._factor(step)

    def make(self, state: State, alpha: float) -> MadeStep:
        """Make the next step. Its measurements may not have arrived when this returns.

        Raises:
            DoesNotFit: see `train_step`. Nothing was changed.
        """
        size, chosen = state.micro_batch_size, self.sampler.examples(state.position)
        if self._run is not None and size != self._planned_for:
            self._plan(size)
        batches = self.batches.take(chosen, size)
        if state.position + 1 < self.total:
            self.batches.begin(self.sampler.examples(state.position + 1), size)
        examples = [self.examples[i] for i in chosen]
        labels = sum(example.num_labels for example in examples)
        tokens = sum(len(sequence.input_ids) for example in examples for sequence in example.sequences)
        with self._learning_rate_on_device():
            result = train_step(
                self.ensemble,
                self.task,
                self.optimizer,
                batches,
                self._number(alpha),
                self.config,
                len(self.examples),
                self._number(len(examples), torch.float32),
                self.recent_nlls.limit(self.config.spike_threshold) * labels / len(examples),
                self.tell,
                self._run,
            )
        self.recent_nlls.remember(result.mixture_nll.sum().double() / labels, result.updated.any())
        rows = [example.row for example in examples]
        return MadeStep(state.step + 1, alpha, rows, labels, tokens, Figures(result))

    def _plan(self, size: int) -> None:
        """Choose the sizes to which packed rows are filled up, by the first micro-batches of the run, each of `size`
        examples. A run that goes on chooses the same ones."""
        alone = cache(lambda i: RowSizes.of(self.task.pack([self.examples[i]])))
        rows = []
        for step in range(min(_LOOKED_AHEAD, self.total)):
            chosen = self.sampler.examples(step)
            numbers = iter(chosen)
            for part in self.batches.parts([self.examples[i] for i in chosen], size):
                rows.append(RowSizes.together([alone(next(numbers)) for _ in part]))
        self._filler, self._planned_for = Filler(rows), size

    def _batch(self, items: Sequence[Any]) -> Mapping[str, Tensor]:
        batch = batch_of(self.task, self.ensemble, items)
        return batch if self._filler is None else self._filler(batch)

    @contextmanager
    def _learning_rate_on_device(self) -> Iterator[None]:
        """Within the block, the optimizer reads its learning rate from the device. Outside it is a plain number, which
        callbacks may read and change."""
        group = self.optimizer.param_groups[0]
        number, group["lr"] = group["lr"], self._learning_rate.fill_(group["lr"])
        try:
            yield
        finally:
            if group["lr"] is self._learning_rate:  # no callback has changed it within the step
                group["lr"] = number

    def _number(self, value: float, dtype: torch.dtype = torch.float64) -> Tensor:
        return torch.full((), value, dtype=dtype, device=self.device)


def _schedule(config: TrainConfig, optimizer: torch.optim.Optimizer, total_steps: int) -> Any:
    """The learning rate's factor as a function of the step: no state to save."""
    warmup = steps_of(config.warmup_steps, total_steps)
    name = "constant_with_warmup" if config.lr_scheduler_type == "constant" else config.lr_scheduler_type
    return get_scheduler(name, optimizer, num_warmup_steps=warmup, num_training_steps=total_steps).lr_lambdas[0]
