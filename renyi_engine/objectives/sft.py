"""Supervised fine-tuning (SFT): s[k, i] is particle k's log-likelihood of the completion of example i.

Layout: K particles, B sequences, T tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from renyi_engine.data import (
    CONTEXT_COLUMNS,
    Dropped,
    Encoder,
    Example,
    collate,
    missing_column,
    pack,
    pad_token_id,
    require_field,
    warn_unread,
)
from renyi_engine.ensemble import LoraEnsemble
from renyi_engine.objectives.metrics import Metric, nll_per
from renyi_engine.objectives.task import Scores
from renyi_kernels import IGNORE_INDEX

FORMS = ("messages", "prompt + completion", "text")


class SftTask:
    """A `Task` whose examples are single sequences. s is the log-likelihood of the labelled tokens (4.1)."""

    unit = "token"
    nll = nll_per(unit)
    details: tuple[Metric, ...] = ()

    def __init__(self, tokenizer: PreTrainedTokenizerBase, max_length: int) -> None:
        self.tokenizer = tokenizer
        self.max_length = max_length
        self.pad_token_id = pad_token_id(tokenizer)
        self._encoder = Encoder(tokenizer)

    def check_columns(self, columns: Sequence[str], argument: str) -> None:
        """Raise ValueError unless the columns are one of `FORMS`. Warn of columns that are not read."""
        form = next((form.split(" + ") for form in FORMS if set(form.split(" + ")) <= set(columns)), None)
        if form is None:
            raise missing_column(argument, columns, FORMS)
        warn_unread(argument, columns, form if form == ["text"] else [*form, *CONTEXT_COLUMNS])

    def example(self, number: int, row: Mapping[str, Any]) -> Example:
        """The tokens and labels of row `number`.

        Raises:
            Dropped: no token is left to learn, or the beginning or the end of an answer cannot be found.
            ValueError: a field is missing, or is not what its column should hold.
        """
        learnt = _learnt_column(row)
        if learnt == "messages":
            input_ids, labels = self._encoder.conversation(number, row, learnt)
        elif learnt == "completion":
            if row[learnt] in ("", []):
                raise Dropped("no token to learn: the completion is empty")
            input_ids, labels = self._encoder.completed(number, row.get("prompt"), row[learnt], learnt, row)
        elif learnt == "text":
            require_field(isinstance(row[learnt], str), number, learnt, "a string", row[learnt])
            if not row[learnt]:
                raise Dropped("no token to learn: the text is empty")
            input_ids, labels = self._encoder.text(row[learnt])
        else:
            raise ValueError(f"row {number}: expected a value in messages, in prompt and completion, or in text")
        example = Example.cut(number, input_ids, labels, self.max_length)
        if example.num_labels == 0:
            has_labels = any(label != IGNORE_INDEX for label in labels)
            if has_labels and example.num_cut:
                raise Dropped(f"the prompt alone fills max_length ({self.max_length} tokens)")
            if has_labels:
                raise Dropped("no token to learn but the first of all, which nothing predicts")
            raise Dropped("no token to learn: the completion is empty")
        return example

    def prepare(
        self, ensemble: LoraEnsemble, items: Sequence[Example], folder: Path, batch_size: int, fingerprint: str
    ) -> list[Example]:
        return list(items)

    def collate(self, items: Sequence[Example]) -> dict[str, Tensor]:
        """input_ids, attention_mask and labels ``[B, T]``, padded on the right."""
        return collate(items, self.pad_token_id)

    def pack(self, items: Sequence[Example]) -> dict[str, Tensor]:
        """All examples in one packed row, without padding: see `LoraEnsemble.packs`."""
        return pack([item] for item in items)

    def score(self, ensemble: LoraEnsemble, batch: Mapping[str, Tensor]) -> Scores:
        return Scores(ensemble.sequence_logprob(batch))

    def headline(self, metrics: Mapping[str, Any]) -> str:
        return f"mixture NLL {metrics[self.nll.mixture.name]:.3f} nats/token"


def _learnt_column(row: Mapping[str, Any]) -> str | None:
    """The column of the row that is learnt: the first that is not null, else the first that is there."""
    there = [column for column in ("messages", "completion", "text") if column in row]
    return next((column for column in there if row[column] is not None), there[0] if there else None)
