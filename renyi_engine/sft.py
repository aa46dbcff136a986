"""Supervised fine-tuning: rows of text, chat or prompt + completion, and s[k, i] = the completion's log-likelihood.

Layout: K particles, B sequences, T tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from renyi_engine.config import TrainConfig
from renyi_engine.data import Dropped, Example, collate, missing_column, pad_token_id
from renyi_engine.ensemble import LoraEnsemble
from renyi_kernels import IGNORE_INDEX

FORMS = ("messages", "prompt + completion", "text")


@dataclass
class SftConfig(TrainConfig):
    """Settings of supervised fine-tuning; the data set has the columns messages, or prompt + completion, or text."""


class SftTask:
    """What the trainer asks of a kind of training: examples from rows, batches from examples, s [K, B] from batches."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, max_length: int) -> None:
        self.tokenizer = tokenizer
        self.max_length = max_length
        self.pad_token_id = pad_token_id(tokenizer)

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
            input_ids, labels = self._completion(number, row["prompt"], row["completion"])
        else:
            input_ids, labels = self._text(number, row["text"])
        if len(input_ids) > self.max_length and not any(label != IGNORE_INDEX for label in labels[1 : self.max_length]):
            raise Dropped(f"the prompt alone fills max_length ({self.max_length} tokens)")
        example = Example(number, input_ids[: self.max_length], labels[: self.max_length])
        if example.num_labels == 0:
            raise Dropped("no token to learn: the completion is empty")
        return example

    def collate(self, examples: Sequence[Example]) -> dict[str, Tensor]:
        return collate(examples, self.pad_token_id)

    def logp(self, ensemble: LoraEnsemble, batch: Mapping[str, Tensor]) -> Tensor:
        """s [K, B] in nats (4.1)."""
        return ensemble.sequence_logprob(batch)

    def _text(self, number: int, text: Any) -> tuple[list[int], list[int]]:
        _require(isinstance(text, str), number, "text", "a string", text)
        if not text:
            raise Dropped("no token to learn: the text is empty")
        input_ids = self._encode(self._with_eos(text))
        return input_ids, list(input_ids)

    def _completion(self, number: int, prompt: Any, completion: Any) -> tuple[list[int], list[int]]:
        if isinstance(completion, str):
            _require(isinstance(prompt, str), number, "prompt", "a string, as the completion is", prompt)
            if not completion:
                raise Dropped("no token to learn: the completion is empty")
            return _labels_after_prefix(self._encode(self._with_eos(prompt + completion)), self._encode(prompt))
        _require(_is_messages(completion), number, "completion", "a string or a list of messages", completion)
        _require(_is_messages(prompt), number, "prompt", "a list of messages, as the completion is", prompt)
        whole = self._render(number, [*prompt, *completion])
        return _labels_after_prefix(whole, self._render(number, prompt, add_generation_prompt=True))

    def _chat(self, number: int, messages: Any) -> tuple[list[int], list[int]]:
        """Every assistant turn is learnt, from the end of its generation prompt to the end of the turn."""
        _require(_is_messages(messages), number, "messages", "a list of {role, content}", messages)
        whole = self._render(number, messages)
        labels = [IGNORE_INDEX] * len(whole)
        for turn, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            start = self._render(number, messages[:turn], add_generation_prompt=True)
            end = self._render(number, messages[: turn + 1])
            if whole[: len(start)] != start or whole[: len(end)] != end:
                raise ValueError(
                    f"row {number}: the chat template rewrites earlier turns, so assistant turn {turn} cannot be told "
                    "apart; give prompt + completion columns instead"
                )
            labels[len(start) : len(end)] = whole[len(start) : len(end)]
        return whole, labels

    def _render(
        self, number: int, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool = False
    ) -> list[int]:
        if not messages:
            return []
        if not self.tokenizer.chat_template:
            raise ValueError(
                f"row {number}: the data is conversational, but the tokenizer of {self.tokenizer.name_or_path} has no "
                "chat template; use an instruct model, set tokenizer.chat_template, or give text columns"
            )
        try:
            rendered = self.tokenizer.apply_chat_template(
                messages, add_generation_prompt=add_generation_prompt, tokenize=True, return_dict=True
            )
        except Exception as error:  # a template is a program: whatever it raises is about this row
            raise ValueError(f"row {number}: the chat template refuses the messages ({error})") from None
        return list(rendered["input_ids"])

    def _encode(self, text: str) -> list[int]:
        return list(self.tokenizer(text)["input_ids"])

    def _with_eos(self, text: str) -> str:
        eos = self.tokenizer.eos_token
        return text if not isinstance(eos, str) or text.endswith(eos) else text + eos


def _labels_after_prefix(whole: list[int], prefix: list[int]) -> tuple[list[int], list[int]]:
    """`whole` with its labels: all but the tokens it shares with `prefix`.

    Where tokenisation merges the seam, the merged token belongs to the completion.
    """
    shared = next(
        (i for i, (a, b) in enumerate(zip(whole, prefix, strict=False)) if a != b), min(len(whole), len(prefix))
    )
    return whole, [IGNORE_INDEX] * shared + whole[shared:]


def _is_messages(value: Any) -> bool:
    return (
        isinstance(value, list)
        and len(value) > 0
        and all(
            isinstance(m, Mapping) and isinstance(m.get("role"), str) and m.get("content") is not None for m in value
        )
    )


def _require(holds: bool, number: int, column: str, expected: str, got: Any) -> None:
    if not holds:
        raise ValueError(f"row {number}: {column}: expected {expected}; got {type(got).__name__} {str(got)[:60]!r}")
