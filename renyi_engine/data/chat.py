"""Conversations: what a message may hold, how a tokenizer's chat template writes it, and which part is the answer.

A chat template is a program. It may trim a message, leave the thoughts out of earlier answers, or write the whole
conversation in another way once one more message follows. So nothing is assumed about it. To find where an answer
begins and ends, the conversation is rendered again, with fewer messages or with another answer in its place, and the
texts are compared.
"""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from transformers import PreTrainedTokenizerBase

from renyi_engine.data.examples import Dropped, unexpected
from renyi_engine.data.rendering import LimitReached, TemplateRefuses, render

Message = dict[str, Any]
Span = tuple[int, int]
"""The number of the first character, and of the one after the last."""

CONTEXT_COLUMNS = ("tools", "documents", "chat_template_kwargs")
"""Columns beside the messages that the template may use, as TRL has them."""
_GENERATION = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")
# answers that are put in the place of another one; they differ in the first and in the last character
_STAND_INS = ("Q7z", "Jx3")
# the same words in each form that content can have: a string, one text part, several text parts
_TEXT: str = " ".join(_STAND_INS)
_PART = [{"type": "text", "text": _TEXT}]
_PARTS = [{"type": "text", "text": word} for word in _STAND_INS]


@dataclass(frozen=True)
class Context:
    """What the template is given beside the messages: `tools`, `documents`, and values of variables of its own."""

    tools: list[Any] | None = None
    documents: list[Any] | None = None
    variables: Mapping[str, Any] = field(default_factory=dict)


# ---------------------------------------------------------------------- reading


def is_conversation(value: Any) -> bool:
    """Whether a field of a row is meant as messages; `read_messages` checks each of them."""
    return isinstance(value, list) and all(isinstance(message, Mapping) for message in value)


def read_messages(number: int, column: str, value: Any) -> list[Message]:
    """The messages in `column` of row `number`.

    The content of a message is a string, or a list of text parts, or nothing beside tool calls. Fields that are null
    are left out, as if the row did not have them.

    Raises:
        ValueError: it is something else; the message names row, column and turn.
    """
    if not is_conversation(value):
        raise unexpected(f"row {number}: {column}", "a list of {role, content}", value)
    return [_read_message(f"row {number}: {column}: turn {turn}", message) for turn, message in enumerate(value)]


def _read_message(place: str, value: Mapping[str, Any]) -> Message:
    message = {key: item for key, item in value.items() if item is not None}
    if not isinstance(message.get("role"), str):
        raise unexpected(f"{place}: role", "a string", message.get("role"))
    calls = message.get("tool_calls") or []
    if not isinstance(calls, list) or not all(isinstance(call, Mapping) for call in calls):
        raise unexpected(f"{place}: tool_calls", "a list of {function: {name, arguments}}", calls)
    content = message.get("content")
    if content is None:
        if not message.get("tool_calls"):
            raise unexpected(f"{place}: content", "a string, or a list of text parts", content)
    elif not isinstance(content, str):
        if not isinstance(content, list) or not all(map(_is_text_part, content)):
            raise unexpected(f"{place}: content", "a string, or a list of {'type': 'text', 'text': ...}", content)
        message["content"] = [{"type": "text", "text": part["text"]} for part in content]
    return message


def _is_text_part(part: Any) -> bool:
    return isinstance(part, Mapping) and part.get("type") == "text" and isinstance(part.get("text"), str)


def read_context(number: int, row: Mapping[str, Any]) -> Context:
    """The columns of row `number` that change what the template writes: `CONTEXT_COLUMNS`.

    Raises:
        ValueError: one of them has another form.
    """
    lists = {}
    for column in ("tools", "documents"):
        value = _from_json(number, column, row.get(column))
        if value is not None and not isinstance(value, list):
            raise unexpected(f"row {number}: {column}", "a list", value)
        lists[column] = value
    variables = _from_json(number, "chat_template_kwargs", row.get("chat_template_kwargs")) or {}
    if not isinstance(variables, Mapping):
        raise unexpected(f"row {number}: chat_template_kwargs", "names and values", variables)
    reserved = set(inspect.signature(PreTrainedTokenizerBase.apply_chat_template).parameters) | {"messages"}
    for name in variables:
        if name in reserved:
            raise ValueError(f"row {number}: chat_template_kwargs: {name!r} cannot be set from a row; leave it out")
    return Context(lists["tools"], lists["documents"], dict(variables))


def _from_json(number: int, column: str, value: Any) -> Any:
    """The value; parsed, where the data set holds it as JSON text."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except ValueError as error:
        raise ValueError(f"row {number}: {column}: a string that is not JSON ({error})") from None


# ---------------------------------------------------------------------- writing


class ChatTemplate:
    """The chat template of a tokenizer."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer

    def render(
        self, messages: Sequence[Message], context: Context | None = None, add_generation_prompt: bool = False
    ) -> str:
        """The conversation as one string.

        Raises:
            Dropped: the template refuses the messages. ValueError: the tokenizer has no template.
        """
        return self._render(messages, context or Context(), add_generation_prompt=add_generation_prompt)[0]

    def answers(self, messages: Sequence[Message], context: Context) -> tuple[str, list[Span]]:
        """The conversation as one string, and every assistant turn in it.

        A turn reaches from the end of its generation prompt to the end of what the template closes it with. Where the
        template marks with `{% generation %}` what an assistant says, those marks are taken instead.

        Raises:
            Dropped: where a turn begins or ends cannot be found; the message says why.
        """
        self._check_tool_calls(messages, context)
        if self._marks_generation(context):
            text, spans = self._render(messages, context, marks=True)
            if not spans:
                raise Dropped("the chat template marks nothing in it with {% generation %}")
            return text, spans
        text = self.render(messages, context)
        turns = [turn for turn, message in enumerate(messages) if message["role"] == "assistant"]
        return text, [self._turn(text, messages, turn, context, is_last=turn == turns[-1]) for turn in turns]

    def completion(
        self, prompt: Sequence[Message], completion: Sequence[Message], context: Context
    ) -> tuple[str, list[Span]]:
        """Prompt and completion as one string, and the completion in it: all that follows the generation prompt.

        Raises:
            Dropped: the completion does not begin with the assistant's turn, or the template writes the prompt in
                another way once a completion follows.
        """
        if completion[0]["role"] != "assistant":
            raise Dropped("the completion does not begin with the assistant's turn")
        messages = [*prompt, *completion]
        self._check_tool_calls(messages, context)
        text = self.render(messages, context)
        if not prompt:
            return text, [(self._answer(text, messages, 0, context)[0], len(text))]
        asked = self.render(prompt, context, add_generation_prompt=True)
        if text.startswith(asked):
            return text, [(len(asked), len(text))]
        without_header = self.render(prompt, context)
        if self._marks_generation(context) and text.startswith(without_header):
            _, spans = self._render(messages, context, marks=True)
            return text, [span for span in spans if span[0] >= len(without_header)]
        raise Dropped(self._why_not(text, asked, without_header))

    def end_of_turn(self) -> int | None:
        """The token with which the template closes an assistant turn, such as "<|im_end|>"; None without one."""
        if not self._tokenizer.chat_template:
            return None
        question = {"role": "user", "content": "?"}
        ends = []
        for answer in _STAND_INS:
            try:
                text = self.render([question, {"role": "assistant", "content": answer}])
            except Dropped:
                return None
            ends.append(text.rpartition(answer)[2])
        token = self._control_token.search(ends[0]) if ends[0] == ends[1] else None
        return None if token is None else self._tokenizer.convert_tokens_to_ids(token.group())

    # ------------------------------------------------------------------ rendering

    def _render(
        self,
        messages: Sequence[Message],
        context: Context,
        *,
        add_generation_prompt: bool = False,
        marks: bool = False,
        fit: bool = True,
    ) -> tuple[str, list[Span]]:
        """(text, the spans between the template's generation marks; none without `marks`). `fit`: first bring content
        into the form that the template takes."""
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

    def _marks_generation(self, context: Context) -> bool:
        return _GENERATION.search(self._template(context)) is not None

    def _fit(self, messages: Sequence[Message]) -> list[Message]:
        """The messages with their content in a form that the template writes out: a text, or a list of parts."""
        return [m | {"content": self._fit_content(m["role"], m["content"])} if "content" in m else m for m in messages]

    def _fit_content(self, role: str, content: str | list[dict[str, str]]) -> str | list[dict[str, str]]:
        if isinstance(content, list) and self._writes(role, _PARTS):
            return content
        text = content if isinstance(content, str) else "".join(part["text"] for part in content)
        if not self._writes(role, _TEXT) and self._writes(role, _PART):
            return [{"type": "text", "text": text}]
        return text

    def _writes(self, role: str, content: str | list[dict[str, str]]) -> bool:
        """Whether the template writes all words of such a content, and writes no list as Python or JSON would."""
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
            whole = all(text.count(word) >= len(conversation) for word in _STAND_INS)
            self._written[key] = whole and not re.search(r"""["']text["']""", text)
        return self._written[key]

    @cached_property
    def _written(self) -> dict[tuple[str, str], bool]:
        return {}

    # ------------------------------------------------------------------ finding turns

    def _turn(self, text: str, messages: Sequence[Message], turn: int, context: Context, is_last: bool) -> Span:
        """Where the assistant's turn stands in `text`, which is the rendering of all `messages`."""
        before, until = messages[:turn], messages[: turn + 1]
        start = None
        if any(message["role"] != "system" for message in before):
            asked = self.render(before, context, add_generation_prompt=True)
            if text.startswith(asked):
                start = len(asked)
            elif is_last:
                raise Dropped(self._why_not(text, asked, self.render(before, context)))
        whole = self.render(until, context)
        if start is not None and text.startswith(whole):
            return start, len(whole)
        # the template writes this turn, or those before it, in another way than if nothing followed
        first, last = self._answer(text, messages, turn, context)
        if text.startswith(whole):
            return first, len(whole)
        closing = whole[self._answer(whole, until, turn, context)[1] :]
        return first if start is None else start, last + self._closing(text[last:], closing)

    def _answer(self, text: str, messages: Sequence[Message], turn: int, context: Context) -> Span:
        """The part of `text`, the rendering of `messages`, that changes when another answer stands at `turn`."""
        starts, ends = [], []
        for answer in _STAND_INS:
            stand_in = {"role": messages[turn]["role"], "content": answer}
            other = self.render([*messages[:turn], stand_in, *messages[turn + 1 :]], context)
            if other != text:  # one of them may be the answer itself
                starts.append(common_prefix(text, other))
                ends.append(len(text) - common_prefix(text[::-1], other[::-1]))
        if not starts:
            raise Dropped("the chat template leaves out an assistant turn")
        return min(starts), max(*ends, *starts)

    def _closing(self, rest: str, closing: str) -> int:
        """How many characters of `rest`, which follows an answer, still belong to its turn.

        `closing`: what the template ends the turn with if nothing follows. Some templates write one token more at the
        end of a conversation, or another token, than in the middle.
        """
        if rest.startswith(closing):
            return len(closing)
        ours, theirs = (self._pieces(part) for part in (closing, rest))
        shared = ours[: common_prefix(ours, theirs)]
        if not any(map(self._control_token.fullmatch, shared)):
            token = self._control_token.match(rest.lstrip())
            if token is None:
                raise Dropped("the chat template does not show where an assistant turn ends")
            return len(rest) - len(rest.lstrip()) + token.end()
        return len("".join(shared))

    def _pieces(self, text: str) -> list[str]:
        """The text, split into control tokens and what stands between them."""
        return [piece for piece in re.split(f"({self._control_token.pattern})", text) if piece]

    @cached_property
    def _control_token(self) -> re.Pattern[str]:
        tokens = sorted(self._tokenizer.get_added_vocab(), key=len, reverse=True)
        return re.compile("|".join(re.escape(token) for token in tokens if token.strip()) or r"(?!)")

    def _why_not(self, text: str, asked: str, without_header: str) -> str:
        """Why `asked`, the prompt with its generation prompt, is not what `text` begins with."""
        common = common_prefix(text, asked)
        if common < common_prefix(asked, without_header):
            return (
                "the chat template writes the conversation before the answer in another way once the answer follows; "
                "a template that marks answers with {% generation %} is needed"
            )
        rest = asked[common:]
        if not rest.strip():
            what = "ends in white space that it does not write before an answer"
        elif "think" in rest.lower():
            what = f"opens a thinking block ({rest.strip()!r}) that it does not write before an answer"
        else:
            what = f"ends in {rest!r}, which it does not write before an answer"
        return (
            f"the generation prompt of the chat template {what}; "
            "a template that marks answers with {% generation %} is needed"
        )

    def _check_tool_calls(self, messages: Sequence[Message], context: Context) -> None:
        """Dropped unless the template writes each call: under a name that stands nowhere else, that name comes out."""
        renamed: list[Message] = []
        names: list[str] = []
        for message in messages:
            calls = []
            for call in message.get("tool_calls") or ():
                function = call.get("function", call)
                if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
                    raise Dropped("a tool call of the assistant has no name")
                names.append(f"{function['name']}{_STAND_INS[0]}{len(names)}_")
                function = {**function, "name": names[-1]}
                calls.append({**call, "function": function} if "function" in call else function)
            renamed.append({**message, "tool_calls": calls} if calls else message)
        text = self.render(renamed, context) if names else ""
        if not all(name in text for name in names):
            raise Dropped("the chat template does not write the assistant's tool calls")


def common_prefix(a: Sequence[Any], b: Sequence[Any]) -> int:
    """How many leading items are the same."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
