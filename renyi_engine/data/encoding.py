"""From the text or the chat of a row to tokens, and which of these are learnt.

Every text becomes tokens here: in training, in evaluation, in generation. So one rule holds everywhere. A text begins
with one BOS if the tokenizer adds one. A text that is learnt ends with one EOS; a text to be continued has none.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from renyi_engine.data.chat_template import ChatTemplate, Span
from renyi_engine.data.columns import require_field
from renyi_engine.data.conversation import Context, is_conversation, read_context, read_messages
from renyi_engine.data.examples import Dropped
from renyi_engine.data.turns import assistant_turns, common_prefix, completion_turns
from renyi_kernels import IGNORE_INDEX

Labelled = tuple[list[int], list[int]]
"""Tokens, and one label for each: the token itself if it is learnt, else -100."""


class Encoder:
    """Makes tokens, with a tokenizer and its chat template. Errors name the row."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self._template = ChatTemplate(tokenizer)

    # ------------------------------------------------------------------ text

    def prompt(self, text: str) -> list[int]:
        """The tokens of a text that is to be continued."""
        return self._opened(self._tokens(text))

    def text(self, text: str) -> Labelled:
        """The tokens of a text that is learnt as a whole, with the EOS at its end."""
        ids = self._ended(self.prompt(text))
        return ids, list(ids)

    def completed_text(self, prompt: str, completion: str) -> Labelled:
        """The tokens of prompt and completion as one text. The completion is learnt, and so is the EOS after it."""
        text = prompt + completion
        alone = _Tokenized(self._tokenizer, text)
        whole = self._opened(alone.ids)
        start = len(whole) - len(alone.ids) + alone.place(len(prompt))
        ids = self._ended(whole)
        return ids, [IGNORE_INDEX] * start + ids[start:]

    # ------------------------------------------------------------------ chat

    def question(self, text: str, context: Context | None = None) -> list[int]:
        """The tokens that ask for an answer: the text as a turn of the user, or alone if there is no chat template."""
        if not self._tokenizer.chat_template:
            return self.prompt(text)
        asked = [{"role": "user", "content": text}]
        return self._tokens(self._template.render(asked, context, add_generation_prompt=True))

    def conversation(self, number: int, row: Mapping[str, Any], column: str) -> Labelled:
        """The tokens of the messages in `column`. Every turn of the assistant is learnt.

        Raises:
            ValueError: a message, or a column beside the messages, is not what it should be.
            Dropped: the assistant has no turn, or the beginning or the end of a turn cannot be found.
        """
        messages = read_messages(number, column, row[column])
        if not any(message["role"] == "assistant" for message in messages):
            raise Dropped("no token to learn: the assistant has no turn")
        text, spans = assistant_turns(self._template, messages, read_context(number, row))
        return self._with_spans(text, spans)

    def completed(self, number: int, prompt: Any, completion: Any, column: str, row: Mapping[str, Any]) -> Labelled:
        """The tokens of a prompt and a completion: both are strings, or both are lists of messages.

        They become tokens together. The completion is learnt. Where its beginning and the end of the prompt become one
        token, that token is learnt too. `column` names the completion; `row` may hold `CONTEXT_COLUMNS`.

        Raises:
            ValueError: a field is missing, or prompt and completion are of different kinds.
            Dropped: the beginning of the completion cannot be found.
        """
        if isinstance(completion, str):
            require_field(isinstance(prompt, str), number, "prompt", f"a string, as the {column} is", prompt)
            return self.completed_text(prompt, completion)
        good = is_conversation(completion) and len(completion) > 0
        require_field(good, number, column, "a string or a list of messages", completion)
        require_field(is_conversation(prompt), number, "prompt", f"a list of messages, as the {column} is", prompt)
        asked, said = read_messages(number, "prompt", prompt), read_messages(number, column, completion)
        text, spans = completion_turns(self._template, asked, said, read_context(number, row))
        return self._with_spans(text, spans)

    # ------------------------------------------------------------------ tokens

    def _tokens(self, text: str) -> list[int]:
        """The tokens of the text, to which the tokenizer adds nothing."""
        return _Tokenized(self._tokenizer, text).ids

    @cached_property
    def _added(self) -> tuple[list[int], list[int]]:
        """The tokens that the tokenizer puts before a text, and those that it puts after it."""
        text = "a"
        if not self._tokens(text):  # some vocabularies have no such letter
            words = self._tokenizer.get_vocab().keys() - self._tokenizer.get_added_vocab().keys()
            text = next(filter(self._tokens, sorted(words)), text)
        alone, whole = self._tokens(text), list(self._tokenizer(text)["input_ids"])
        for start in range(len(whole) - len(alone) + 1):
            if whole[start : start + len(alone)] == alone:
                return whole[:start], whole[start + len(alone) :]
        raise ValueError(
            f"tokenizer: {self._tokenizer.name_or_path} makes {whole} of {text!r} with special tokens, and {alone} "
            "without; expected the second inside the first; use a tokenizer that only adds tokens around a text"
        )

    def _opened(self, ids: list[int]) -> list[int]:
        """The tokens, with what the tokenizer puts before a text in front of them, but not twice."""
        opening = self._added[0]
        return ids if ids[: len(opening)] == opening else [*opening, *ids]

    def _ended(self, ids: list[int]) -> list[int]:
        """The tokens, with the end-of-sequence token after them, or else what the tokenizer puts there; not twice."""
        eos = self._tokenizer.eos_token_id
        end = self._added[1] if eos is None else [eos]
        return ids if not end or ids[-len(end) :] == end else [*ids, *end]

    def _with_spans(self, text: str, spans: Sequence[Span]) -> Labelled:
        """The tokens of a conversation as one string. The text in the spans is learnt."""
        tokenized = _Tokenized(self._tokenizer, text)
        labels = [IGNORE_INDEX] * len(tokenized.ids)
        for start, end in spans:
            first, last = tokenized.place(start), tokenized.place(end)
            labels[first:last] = tokenized.ids[first:last]
        return tokenized.ids, labels


class _Tokenized:
    """The tokens of a text, without special tokens, and the place of each character among them."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, text: str) -> None:
        self._tokenizer, self._text = tokenizer, text
        if not text.isascii() and any("\ud800" <= character <= "\udfff" for character in text):
            raise Dropped("a text holds half a character, which has no tokens")
        encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=tokenizer.is_fast)
        self.ids: list[int] = list(encoded["input_ids"])
        self._ends = [end for _, end in encoded["offset_mapping"]] if tokenizer.is_fast else None

    def place(self, character: int) -> int:
        """The place of the first token that holds `character` or a later one, even if it holds earlier ones too."""
        if character == len(self._text):
            return len(self.ids)
        if self._ends is None:
            # without offsets: how many tokens the whole text shares with its part before the character
            before = self._tokenizer(self._text[:character], add_special_tokens=False)["input_ids"]
            return common_prefix(self.ids, before)
        return next((place for place, end in enumerate(self._ends) if end > character), len(self.ids))


def encode_prompts(
    tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str], context: Context | None = None
) -> list[list[int]]:
    """The tokens of each prompt, to be answered: see `Encoder.question`. The chat template is given the `context`."""
    encoder = Encoder(tokenizer)
    return [encoder.question(prompt, context) for prompt in prompts]


def stop_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokens that end an answer: those of the model's configuration, the tokenizer's end-of-sequence token, and the
    token with which the chat template ends an assistant turn, because training teaches it.

    Raises:
        ValueError: there is no such token.
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
