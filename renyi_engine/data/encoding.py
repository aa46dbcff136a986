"""From the text or chat of a row to tokens: which stand for the prompt, which are learnt.

Every text becomes tokens here: in training, in evaluation, in generation. So a text has one BOS where the tokenizer
adds one, one EOS at the end if it is learnt, and no EOS if it is to be continued.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from renyi_engine.data.chat import (
    ChatTemplate,
    Context,
    Span,
    common_prefix,
    is_conversation,
    read_context,
    read_messages,
)
from renyi_engine.data.examples import Dropped, unexpected
from renyi_kernels import IGNORE_INDEX

Labelled = tuple[list[int], list[int]]
"""Tokens, and the labels beside them: the token where it is learnt, -100 where it is not."""


class Encoder:
    """A tokenizer with its chat template. Errors name the row they are about."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self._template = ChatTemplate(tokenizer)

    # ------------------------------------------------------------------ text

    def prompt(self, text: str) -> list[int]:
        """Tokens of a text that is to be continued."""
        return self._opened(self._tokens(text))

    def text(self, text: str) -> Labelled:
        """A text, all of which is learnt, and so is the EOS at its end."""
        ids = self._ended(self.prompt(text))
        return ids, list(ids)

    def completed_text(self, prompt: str, completion: str) -> Labelled:
        """Prompt and completion as one text, of which the completion and its end are learnt."""
        text = prompt + completion
        alone = _Tokenized(self._tokenizer, text)
        whole = self._opened(alone.ids)
        start = len(whole) - len(alone.ids) + alone.place(len(prompt))
        ids = self._ended(whole)
        return ids, [IGNORE_INDEX] * start + ids[start:]

    # ------------------------------------------------------------------ chat

    def question(self, text: str, context: Context | None = None) -> list[int]:
        """Tokens that ask for an answer: the text as the user's turn if there is a chat template, or as it is."""
        if not self._tokenizer.chat_template:
            return self.prompt(text)
        asked = [{"role": "user", "content": text}]
        return self._tokens(self._template.render(asked, context, add_generation_prompt=True))

    def conversation(self, number: int, row: Mapping[str, Any], column: str) -> Labelled:
        """The messages in `column`, of which every turn of the assistant is learnt.

        Raises:
            ValueError: a message or a column beside it has another form. Dropped: where a turn begins or
                ends cannot be found.
        """
        messages = read_messages(number, column, row[column])
        if not any(message["role"] == "assistant" for message in messages):
            raise Dropped("no token to learn: the assistant has no turn")
        text, spans = self._template.answers(messages, read_context(number, row))
        return self._with_spans(text, spans)

    def completed(self, number: int, prompt: Any, completion: Any, column: str, row: Mapping[str, Any]) -> Labelled:
        """Prompt and completion, both strings or both lists of messages, of which the completion is learnt.

        They become tokens together: where that merges the last token of the prompt with the first of the completion,
        the merged token is learnt. `column` holds the completion; `row` may hold `CONTEXT_COLUMNS`.

        Raises:
            ValueError: a field is missing or of another kind than the other. Dropped: where the completion begins
                cannot be found.
        """
        if isinstance(completion, str):
            require_field(isinstance(prompt, str), number, "prompt", f"a string, as the {column} is", prompt)
            return self.completed_text(prompt, completion)
        good = is_conversation(completion) and len(completion) > 0
        require_field(good, number, column, "a string or a list of messages", completion)
        require_field(is_conversation(prompt), number, "prompt", f"a list of messages, as the {column} is", prompt)
        asked, said = read_messages(number, "prompt", prompt), read_messages(number, column, completion)
        text, spans = self._template.completion(asked, said, read_context(number, row))
        return self._with_spans(text, spans)

    # ------------------------------------------------------------------ tokens

    def _tokens(self, text: str) -> list[int]:
        """Tokens of the text alone: nothing is added."""
        return _Tokenized(self._tokenizer, text).ids

    @cached_property
    def _added(self) -> tuple[list[int], list[int]]:
        """What the tokenizer puts before and after a text."""
        text = "a"
        if not self._tokens(text):  # not every vocabulary has letters
            words = self._tokenizer.get_vocab().keys() - self._tokenizer.get_added_vocab().keys()
            text = next(filter(self._tokens, sorted(words)), text)
        alone, whole = self._tokens(text), list(self._tokenizer(text)["input_ids"])
        for start in range(len(whole) - len(alone) + 1):
            if whole[start : start + len(alone)] == alone:
                return whole[:start], whole[start + len(alone) :]
        raise ValueError(
            f"tokenizer: {self._tokenizer.name_or_path} makes {whole} of {text!r} with special tokens and {alone} "
            "without; expected the same tokens in the middle"
        )

    def _opened(self, ids: list[int]) -> list[int]:
        """The tokens, beginning with what the tokenizer puts before a text, once."""
        opening = self._added[0]
        return ids if ids[: len(opening)] == opening else [*opening, *ids]

    def _ended(self, ids: list[int]) -> list[int]:
        """The tokens, ending in the end-of-sequence token, or where there is none in what the tokenizer adds."""
        eos = self._tokenizer.eos_token_id
        end = self._added[1] if eos is None else [eos]
        return ids if not end or ids[-len(end) :] == end else [*ids, *end]

    def _with_spans(self, text: str, spans: Sequence[Span]) -> Labelled:
        """Tokens of a rendered conversation, of which the spans are learnt."""
        tokenized = _Tokenized(self._tokenizer, text)
        labels = [IGNORE_INDEX] * len(tokenized.ids)
        for start, end in spans:
            first, last = tokenized.place(start), tokenized.place(end)
            labels[first:last] = tokenized.ids[first:last]
        return tokenized.ids, labels


class _Tokenized:
    """The tokens of a text, without special tokens added, and which of them holds a character."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, text: str) -> None:
        self._tokenizer, self._text = tokenizer, text
        if not text.isascii() and any("\ud800" <= character <= "\udfff" for character in text):
            raise Dropped("a text holds half a character, which has no tokens")
        encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=tokenizer.is_fast)
        self.ids: list[int] = list(encoded["input_ids"])
        self._ends = [end for _, end in encoded["offset_mapping"]] if tokenizer.is_fast else None

    def place(self, character: int) -> int:
        """The first token that ends after so many characters: a token that lies on both sides counts as after."""
        if character == len(self._text):
            return len(self.ids)
        if self._ends is None:
            # without offsets: as many tokens as the text has in common with its beginning alone
            return common_prefix(
                self.ids, self._tokenizer(self._text[:character], add_special_tokens=False)["input_ids"]
            )
        return next((place for place, end in enumerate(self._ends) if end > character), len(self.ids))


def require_field(holds: bool, number: int, column: str, expected: str, got: Any) -> None:
    if not holds:
        raise unexpected(f"row {number}: {column}", expected, got)


def encode_prompts(
    tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str], context: Context | None = None
) -> list[list[int]]:
    """Tokens of each prompt, to be answered: as the user's turn where the tokenizer has a chat template, which is given
    the `context`; else as plain text."""
    encoder = Encoder(tokenizer)
    return [encoder.question(prompt, context) for prompt in prompts]


def stop_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokens that end an answer: those of the model's configuration, the tokenizer's end-of-sequence token, and the
    token with which the chat template closes an assistant turn, which is what training teaches.

    Raises:
        ValueError: there is none.
    """
    configs = (model.generation_config, model.config.get_text_config())
    found: list[Any] = [getattr(config, "eos_token_id", None) for config in configs]
    found += [tokenizer.eos_token_id, ChatTemplate(tokenizer).end_of_turn()]
    stops = {int(token) for one in found if one is not None for token in (one if isinstance(one, list) else [one])}
    if not stops:
        raise ValueError(
            f"tokenizer: {tokenizer.name_or_path} has no end-of-sequence token, and neither has the model, so nothing "
            "would end an answer; set tokenizer.eos_token and save it again"
        )
    return sorted(stops)
