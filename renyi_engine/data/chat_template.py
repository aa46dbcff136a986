"""A tokenizer's chat template: how it writes a conversation as one string."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cached_property

from transformers import PreTrainedTokenizerBase

from renyi_engine.data.conversation import Context, Message
from renyi_engine.data.examples import Dropped
from renyi_engine.data.sandboxed_rendering import LimitReached, TemplateRefuses, render

Span = tuple[int, int]
"""A part of a text: the number of its first character, and of the character after its last."""

STAND_INS = ("Q7z", "Jx3")
"""Answers that are put in the place of another one, to see what changes. Their first and last characters differ."""

_GENERATION = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")
# the same words in each form that content can have: a string, one text part, several text parts
_TEXT: str = " ".join(STAND_INS)
_PART = [{"type": "text", "text": _TEXT}]
_PARTS = [{"type": "text", "text": word} for word in STAND_INS]


class ChatTemplate:
    """The chat template of a tokenizer."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self._written: dict[tuple[str, str], bool] = {}  # what `_writes` found out

    def render(
        self, messages: Sequence[Message], context: Context | None = None, add_generation_prompt: bool = False
    ) -> str:
        """The conversation as one string.

        Raises:
            Dropped: the template refuses the messages.
            ValueError: the tokenizer has no template, or the template needs too much time or memory.
        """
        return self._render(messages, context or Context(), add_generation_prompt=add_generation_prompt)[0]

    def render_marked(self, messages: Sequence[Message], context: Context) -> tuple[str, list[Span]]:
        """The conversation as one string, and the spans that the template marks with `{% generation %}`."""
        return self._render(messages, context, marks=True)

    def marks_answers(self, context: Context) -> bool:
        """Whether the template marks what the assistant says, with `{% generation %}`."""
        return _GENERATION.search(self._template(context)) is not None

    @cached_property
    def control_token(self) -> re.Pattern[str]:
        """A pattern that finds the tokens that the tokenizer has beside its ordinary vocabulary."""
        tokens = sorted(self._tokenizer.get_added_vocab(), key=len, reverse=True)
        return re.compile("|".join(re.escape(token) for token in tokens if token.strip()) or r"(?!)")

    def end_of_turn(self) -> int | None:
        """The token with which the template ends an assistant turn, such as "<|im_end|>". None if there is no such."""
        if not self._tokenizer.chat_template:
            return None
        question = {"role": "user", "content": "?"}
        ends = []
        for answer in STAND_INS:
            try:
                text = self.render([question, {"role": "assistant", "content": answer}])
            except Dropped:
                return None
            ends.append(text.rpartition(answer)[2])
        token = self.control_token.search(ends[0]) if ends[0] == ends[1] else None
        return None if token is None else self._tokenizer.convert_tokens_to_ids(token.group())

    def _render(
        self,
        messages: Sequence[Message],
        context: Context,
        *,
        add_generation_prompt: bool = False,
        marks: bool = False,
        fit: bool = True,
    ) -> tuple[str, list[Span]]:
        """(text, marked spans). Without `marks` there are no spans. `fit`: call `_fit` first."""
        template = self._template(context)
        variables = {**self._tokenizer.special_tokens_map, **context.variables}
        try:
            return render(
                conversations=[self._fit(messages) if fit else list(messages)],
                tools=context.tools,
                documents=context.documents,
                chat_template=template,
                return_assistant_tokens_mask=marks,
                add_generation_prompt=add_generation_prompt,
                **variables,
            )
        except TemplateRefuses as error:
            raise Dropped(f"the chat template refuses the messages ({error})") from None
        except LimitReached as limit:
            raise ValueError(
                f"the chat template of {self._tokenizer.name_or_path} cannot write a conversation: it {limit}; use "
                "another model or template, or leave out conversations that are very long"
            ) from None

    def _template(self, context: Context) -> str:
        if not self._tokenizer.chat_template:
            raise ValueError(
                f"the data are conversations, but the tokenizer of {self._tokenizer.name_or_path} has no chat "
                "template; use an instruct model, set tokenizer.chat_template, or give text columns"
            )
        return self._tokenizer.get_chat_template(None, context.tools)

    def _fit(self, messages: Sequence[Message]) -> list[Message]:
        """The messages, with their content in a form that this template can write: a string, or a list of parts."""
        return [m | {"content": self._fit_content(m["role"], m["content"])} if "content" in m else m for m in messages]

    def _fit_content(self, role: str, content: str | list[dict[str, str]]) -> str | list[dict[str, str]]:
        if isinstance(content, list) and self._writes(role, _PARTS):
            return content
        text = content if isinstance(content, str) else "".join(part["text"] for part in content)
        if not self._writes(role, _TEXT) and self._writes(role, _PART):
            return [{"type": "text", "text": text}]
        return text

    def _writes(self, role: str, content: str | list[dict[str, str]]) -> bool:
        """Whether the template writes the words of such content, and not the list around them as Python or JSON."""
        key = role, str(content)
        if key not in self._written:
            question = {"role": "user", "content": content}
            conversations = {
                "system": [{"role": "system", "content": content}, question],
                "assistant": [question, {"role": "assistant", "content": content}],
            }
            conversation = conversations.get(role, [question])
            try:
                text, _ = self._render(conversation, Context(), fit=False)
            except Dropped:
                text = ""
            whole = all(text.count(word) >= len(conversation) for word in STAND_INS)
            self._written[key] = whole and not re.search(r"""["']text["']""", text)
        return self._written[key]
