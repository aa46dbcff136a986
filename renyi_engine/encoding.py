"""From the text or chat of a row to tokens: which stand for the prompt, which are learnt."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase


class Encoder:
    """A tokenizer with its chat template. Errors name the row they are about."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer

    def text(self, text: str) -> list[int]:
        return list(self._tokenizer(text)["input_ids"])

    def with_eos(self, text: str) -> str:
        """`text`, ending in the end-of-sequence token as a completion does, if there is such a token."""
        eos = self._tokenizer.eos_token
        return text if not isinstance(eos, str) or text.endswith(eos) else text + eos

    def chat(
        self, number: int, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool = False
    ) -> list[int]:
        """Messages through the chat template.

        Raises:
            ValueError: there is no template, or it refuses the messages.
        """
        if not messages:
            return []
        if not self._tokenizer.chat_template:
            raise ValueError(
                f"row {number}: the data is conversational, but the tokenizer of {self._tokenizer.name_or_path} has no "
                "chat template; use an instruct model, set tokenizer.chat_template, or give text columns"
            )
        try:
            rendered = self._tokenizer.apply_chat_template(
                messages, add_generation_prompt=add_generation_prompt, tokenize=True, return_dict=True
            )
        except Exception as error:  # a template is a program: whatever it raises is about this row
            raise ValueError(f"row {number}: the chat template refuses the messages ({error})") from None
        return list(rendered["input_ids"])

    def completed(self, number: int, prompt: Any, completion: Any, column: str = "completion") -> tuple[list[int], int]:
        """(tokens of prompt and completion, how many of them the prompt alone begins with).

        Both are strings, or both lists of messages. They are tokenised together: where that merges the seam, the merged
        token belongs to the completion.

        Raises:
            ValueError: a field is missing or of another kind than the other; the column of the completion is `column`.
        """
        if isinstance(completion, str):
            require_field(isinstance(prompt, str), number, "prompt", f"a string, as the {column} is", prompt)
            whole, alone = self.text(self.with_eos(prompt + completion)), self.text(prompt)
        else:
            require_field(is_messages(completion), number, column, "a string or a list of messages", completion)
            is_chat = is_messages(prompt) or prompt == []
            require_field(is_chat, number, "prompt", f"a list of messages, as the {column} is", prompt)
            whole = self.chat(number, [*prompt, *completion])
            alone = self.chat(number, prompt, add_generation_prompt=True)
        return whole, common_prefix(whole, alone)


def common_prefix(a: Sequence[Any], b: Sequence[Any]) -> int:
    """How many leading items are the same."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def is_messages(value: Any) -> bool:
    return (
        isinstance(value, list)
        and len(value) > 0
        and all(
            isinstance(m, Mapping) and isinstance(m.get("role"), str) and m.get("content") is not None for m in value
        )
    )


def require_field(holds: bool, number: int, column: str, expected: str, got: Any) -> None:
    if not holds:
        raise ValueError(f"row {number}: {column}: expected {expected}; got {type(got).__name__} {str(got)[:60]!r}")


def encode_prompts(tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str]) -> list[list[int]]:
    """Tokens of each prompt: as the user's turn where the tokenizer has a chat template, else as plain text."""
    encoder = Encoder(tokenizer)
    if not tokenizer.chat_template:
        return [encoder.text(prompt) for prompt in prompts]
    turns = [[{"role": "user", "content": prompt}] for prompt in prompts]
    return [encoder.chat(number, turn, add_generation_prompt=True) for number, turn in enumerate(turns)]
