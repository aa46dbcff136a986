"""Supervised fine-tuning: rows of text, chat or prompt + completion, and s[k, i] = the completion's log-likelihood.

Layout: K particles, B sequences, T tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from renyi_engine.config import TrainConfig
from renyi_engine.data import Dropped, Example, collate, pad_token_id
from renyi_engine.encoding import Encoder, is_messages, require_field
from renyi_engine.ensemble import LoraEnsemble
from renyi_engine.rows import missing_column
from renyi_engine.task import Scores
from renyi_kernels import IGNORE_INDEX

FORMS = ("messages", "prompt + completion", "text")


@dataclass
class SftConfig(TrainConfig):
    """Settings of supervised fine-tuning; the data set has the columns messages, or prompt + completion, or text."""


class SftTask:
    """A `Task`: one sequence an example, and the log-likelihood of its labelled tokens (4.1)."""

    unit = "token"

    def __init__(self, tokenizer: PreTrainedTokenizerBase, max_length: int) -> None:
        self.tokenizer = tokenizer
        self.max_length = max_length
        self.pad_token_id = pad_token_id(tokenizer)
        self._encoder = Encoder(tokenizer)

    def check_columns(self, columns: Sequence[str], argument: str) -> None:
        """ValueError unless the columns are one of `FORMS`; chat needs a chat template."""
        if not any(set(form.split(" + ")) <= set(columns) for form in FORMS):
            raise missing_column(argument, columns, FORMS)

    def example(self, number: int, row: Mapping[str, Any]) -> Example:
        """Tokens and labels of row `number`.

        Raises:
            Dropped: no token is left to learn. ValueError: a field is missing or not what its column says.
        """
        if row.get("messages") is not None:
            input_ids, labels = self._chat(number, row["messages"])
        elif "completion" in row:
            if row["completion"] == "":
                raise Dropped("no token to learn: the completion is empty")
            input_ids, start = self._encoder.completed(number, row["prompt"], row["completion"])
            labels = [IGNORE_INDEX] * start + input_ids[start:]
        else:
            input_ids, labels = self._text(number, row["text"])
        if len(input_ids) > self.max_length and not any(label != IGNORE_INDEX for label in labels[1 : self.max_length]):
            raise Dropped(f"the prompt alone fills max_length ({self.max_length} tokens)")
        example = Example(number, input_ids[: self.max_length], labels[: self.max_length])
        if example.num_labels == 0:
            raise Dropped("no token to learn: the completion is empty")
        return example

    def prepare(
        self, ensemble: LoraEnsemble, items: Sequence[Example], folder: Path, batch_size: int, fingerprint: str
    ) -> list[Example]:
        return list(items)

    def collate(self, items: Sequence[Example]) -> dict[str, Tensor]:
        return collate(items, self.pad_token_id)

    def score(self, ensemble: LoraEnsemble, batch: Mapping[str, Tensor]) -> Scores:
        return Scores(ensemble.sequence_logprob(batch))

    def headline(self, metrics: Mapping[str, Any]) -> str:
        return f"mixture NLL {metrics['mixture_nll_nats_per_token']:.3f} nats/token"

    def _text(self, number: int, text: Any) -> tuple[list[int], list[int]]:
        require_field(isinstance(text, str), number, "text", "a string", text)
        if not text:
            raise Dropped("no token to learn: the text is empty")
        input_ids = self._encoder.text(self._encoder.with_eos(text))
        return input_ids, list(input_ids)

    def _chat(self, number: int, messages: Any) -> tuple[list[int], list[int]]:
        """Every assistant turn is learnt, from the end of its generation prompt to the end of the turn."""
        require_field(is_messages(messages), number, "messages", "a list of {role, content}", messages)
        whole = self._encoder.chat(number, messages)
        labels = [IGNORE_INDEX] * len(whole)
        for turn, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            start = self._encoder.chat(number, messages[:turn], add_generation_prompt=True)
            end = self._encoder.chat(number, messages[: turn + 1])
            if whole[: len(start)] != start or whole[: len(end)] != end:
                raise ValueError(
                    f"row {number}: the chat template rewrites earlier turns, so assistant turn {turn} cannot be told "
                    "apart; give prompt + completion columns instead"
                )
            labels[len(start) : len(end)] = whole[len(start) : len(end)]
        return whole, labels
