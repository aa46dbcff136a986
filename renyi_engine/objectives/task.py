"""What a kind of training has to define. SFT and DPO differ in this, and in nothing else.

Layout: K particles, B examples, N examples of a data set, T tokens.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from renyi_engine.data import Example, Row, columns_of, describe_dropped, name_rows, packed_length, tokenize
from renyi_engine.ensemble import LoraEnsemble, model_limits
from renyi_engine.objectives.metrics import ESS, LOSS, Metric, Nll


@dataclass(frozen=True)
class Scores:
    """The scores of a batch.

    Attributes:
        logp: s [K, B] in nats, from which the loss is made.
        details: what else the task measures, by name (see `Task.details`), detached: [K, B], or [B] where it is the
            mixture's.
    """

    logp: Tensor
    details: Mapping[str, Tensor] = field(default_factory=dict)


class Item(Protocol):
    """An example: one token sequence, or several that are scored together."""

    @property
    def row(self) -> int:
        """The number of its row in the data set."""

    @property
    def sequences(self) -> tuple[Example, ...]: ...

    @property
    def num_labels(self) -> int:
        """How many `Task.unit`s it holds. Its negative log-likelihood is divided by this number."""


def metrics_of(task: Task | type[Task]) -> list[Metric]:
    """What is recorded of this kind of training: the same for its steps and its evaluations."""
    of_particles = [metric.of_particles for metric in task.details]
    return [LOSS, *task.nll, ESS, *task.details, *of_particles]


def length(item: Item) -> int:
    """How many tokens its longest sequence has."""
    return max(len(sequence.input_ids) for sequence in item.sequences)


class Task(Protocol):
    tokenizer: PreTrainedTokenizerBase
    unit: str
    """What one label is: "token" or "pair"."""
    nll: Nll
    details: tuple[Metric, ...]
    """What `Scores.details` holds, in the order in which a line of metrics.jsonl has it."""

    def check_columns(self, columns: Sequence[str], argument: str) -> None:
        """Raise ValueError unless rows with these columns can be used."""

    def example(self, number: int, row: Mapping[str, Any]) -> Any:
        """The `Item` of row `number`. Raises Dropped if the row cannot be used, and ValueError if it is broken."""

    def prepare(
        self, ensemble: LoraEnsemble, items: Sequence[Any], folder: Path, batch_size: int, fingerprint: str
    ) -> list[Any]:
        """The items, with what has to be computed before training. The run's `folder` may keep it."""

    def collate(self, items: Sequence[Any]) -> dict[str, Tensor]:
        """A padded batch of the items. Its "labels" have one entry for each item."""

    def pack(self, items: Sequence[Any]) -> dict[str, Tensor]:
        """The items in one packed row, see `data.pack`. `score` takes both."""

    def score(self, ensemble: LoraEnsemble, batch: Mapping[str, Tensor]) -> Scores: ...

    def headline(self, metrics: Mapping[str, Any]) -> str:
        """The few words of a line of metrics that a person wants to see while training."""


def batch_of(task: Task, ensemble: LoraEnsemble, items: Sequence[Any]) -> dict[str, Tensor]:
    """A batch of the items for `task.score`: a packed row if the model can read one, else padded."""
    return task.pack(items) if ensemble.packs else task.collate(items)


def read_items(task: Task, rows: Sequence[Row], argument: str) -> tuple[list[Any], dict[str, list[int]]]:
    """(items, dropped) of the rows of a data set: see `tokenize`.

    Raises:
        ValueError: a column is missing, a row is broken, or no row is left.
    """
    task.check_columns(columns_of(rows), argument)
    return tokenize(rows, task.example, argument)


def cut_rows(items: Sequence[Item]) -> list[int]:
    """The numbers of the rows whose end was cut off at max_length."""
    return [item.row for item in items if any(sequence.num_cut for sequence in item.sequences)]


def describe_rows(items: Sequence[Item], dropped: Mapping[str, Sequence[int]]) -> list[str]:
    """Lines that say which rows of a data set were dropped and why, and which were cut off."""
    cut = cut_rows(items)
    of_cut = [f"{len(cut)} rows cut off at max_length ({name_rows(cut)})"] if cut else []
    return describe_dropped(dropped) + of_cut


def check_fits(model: PreTrainedModel, items: Iterable[Item]) -> None:
    """Raise ValueError unless `model` can read every sequence of these examples, in any batch: see `model_limits`."""
    sequences = [sequence for item in items for sequence in item.sequences]
    model_limits.check_fits(model, [(f"row {each.row}", each.input_ids) for each in sequences], "max_length")
    lengths = [(packed_length([each]), len(each.input_ids)) for each in sequences]
    model_limits.check_batches(model, lengths, "max_length")
