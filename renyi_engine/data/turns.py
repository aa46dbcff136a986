"""Which part of a written conversation is the assistant's, and so is learnt.

A chat template is a program. It may trim a message, leave the thoughts out of earlier answers, or write the whole
conversation differently once one more message follows. So this module assumes nothing about it. To find where an answer
begins and ends, it renders the conversation again, with fewer messages or with another answer in its place, and
compares the texts.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from renyi_engine.data.chat_template import STAND_INS, ChatTemplate, Span
from renyi_engine.data.conversation import Context, Message
from renyi_engine.data.examples import Dropped

_USE_MARKS = "use a chat template that marks answers with {% generation %}"


def assistant_turns(template: ChatTemplate, messages: Sequence[Message], context: Context) -> tuple[str, list[Span]]:
    """The conversation as one string, and every assistant turn in it.

    A turn begins after the generation prompt, which is what the template opens a turn with, and ends with what closes
    it. If the template marks with `{% generation %}` what the assistant says, the marked spans are the turns.

    Raises:
        Dropped: the beginning or the end of a turn cannot be found. The message says why.
    """
    _check_tool_calls(template, messages, context)
    if template.marks_answers(context):
        text, spans = template.render_marked(messages, context)
        if not spans:
            raise Dropped("the chat template has {% generation %} marks, but nothing in this conversation is marked")
        return text, spans
    text = template.render(messages, context)
    turns = [turn for turn, message in enumerate(messages) if message["role"] == "assistant"]
    return text, [_turn(template, text, messages, turn, context, is_last=turn == turns[-1]) for turn in turns]


def completion_turns(
    template: ChatTemplate, prompt: Sequence[Message], completion: Sequence[Message], context: Context
) -> tuple[str, list[Span]]:
    """Prompt and completion as one string, and the completion in it: all that follows the generation prompt.

    Raises:
        Dropped: the completion does not begin with a message of the assistant, or the template writes the prompt
            differently once a completion follows.
    """
    if completion[0]["role"] != "assistant":
        raise Dropped("the completion does not begin with a message of the assistant")
    messages = [*prompt, *completion]
    _check_tool_calls(template, messages, context)
    text = template.render(messages, context)
    if not prompt:
        return text, [(_answer(template, text, messages, 0, context)[0], len(text))]
    asked = template.render(prompt, context, add_generation_prompt=True)
    if text.startswith(asked):
        return text, [(len(asked), len(text))]
    without_header = template.render(prompt, context)
    if template.marks_answers(context) and text.startswith(without_header):
        _, spans = template.render_marked(messages, context)
        return text, [span for span in spans if span[0] >= len(without_header)]
    raise Dropped(_why_not(text, asked, without_header))


def _turn(
    template: ChatTemplate, text: str, messages: Sequence[Message], turn: int, context: Context, is_last: bool
) -> Span:
    """Where the assistant's turn stands in `text`, which is the rendering of all `messages`."""
    before, until = messages[:turn], messages[: turn + 1]
    start = None
    if any(message["role"] != "system" for message in before):
        asked = template.render(before, context, add_generation_prompt=True)
        if text.startswith(asked):
            start = len(asked)
        elif is_last:
            raise Dropped(_why_not(text, asked, template.render(before, context)))
    whole = template.render(until, context)
    if start is not None and text.startswith(whole):
        return start, len(whole)
    # the template writes this turn, or those before it, differently than if nothing followed
    first, last = _answer(template, text, messages, turn, context)
    if text.startswith(whole):
        return first, len(whole)
    closing = whole[_answer(template, whole, until, turn, context)[1] :]
    return first if start is None else start, last + _length_of_closing(template, text[last:], closing)


def _answer(template: ChatTemplate, text: str, messages: Sequence[Message], turn: int, context: Context) -> Span:
    """The part of `text`, the rendering of `messages`, that changes when another answer stands at `turn`."""
    starts, ends = [], []
    for answer in STAND_INS:
        stand_in = {"role": messages[turn]["role"], "content": answer}
        other = template.render([*messages[:turn], stand_in, *messages[turn + 1 :]], context)
        if other != text:  # one of the stand-ins may be the answer itself
            starts.append(common_prefix(text, other))
            ends.append(len(text) - common_prefix(text[::-1], other[::-1]))
    if not starts:
        raise Dropped("the chat template leaves out an assistant turn")
    return min(starts), max(*ends, *starts)


def _length_of_closing(template: ChatTemplate, rest: str, closing: str) -> int:
    """How many characters of `rest`, which follows an answer, still belong to its turn.

    `closing` is what the template ends the turn with if nothing follows. Some templates write one more token at the end
    of a conversation than in the middle, or another token.
    """
    if rest.startswith(closing):
        return len(closing)
    control_token = template.control_token
    at_tokens = re.compile(f"({control_token.pattern})")
    ours, theirs = (list(filter(None, at_tokens.split(part))) for part in (closing, rest))
    shared = ours[: common_prefix(ours, theirs)]
    if not any(map(control_token.fullmatch, shared)):
        token = control_token.match(rest.lstrip())
        if token is None:
            raise Dropped("the chat template does not show where an assistant turn ends")
        return len(rest) - len(rest.lstrip()) + token.end()
    return len("".join(shared))


def _why_not(text: str, asked: str, without_header: str) -> str:
    """Why `text` does not begin with `asked`, the prompt with its generation prompt. `without_header`: the prompt."""
    common = common_prefix(text, asked)
    if common < common_prefix(asked, without_header):
        return f"the chat template writes the messages before an answer differently once it follows; {_USE_MARKS}"
    rest = asked[common:]
    if not rest.strip():
        what = "ends in white space that it does not write before an answer"
    elif "think" in rest.lower():
        what = f"opens a thinking block ({rest.strip()!r}) that it does not write before an answer"
    else:
        what = f"ends in {rest!r}, which it does not write before an answer"
    return f"the generation prompt of the chat template {what}; {_USE_MARKS}"


def _check_tool_calls(template: ChatTemplate, messages: Sequence[Message], context: Context) -> None:
    """Raise Dropped unless the template writes every tool call: each gets a new name, and the text has to hold it."""
    renamed: list[Message] = []
    names: list[str] = []
    for message in messages:
        calls = []
        for call in message.get("tool_calls") or ():
            function = call.get("function", call)
            if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
                raise Dropped("a tool call of the assistant has no name")
            names.append(f"{function['name']}{STAND_INS[0]}{len(names)}_")
            function = {**function, "name": names[-1]}
            calls.append({**call, "function": function} if "function" in call else function)
        renamed.append({**message, "tool_calls": calls} if calls else message)
    text = template.render(renamed, context) if names else ""
    if not all(name in text for name in names):
        raise Dropped("the chat template does not write the assistant's tool calls")


def common_prefix(a: Sequence[Any], b: Sequence[Any]) -> int:
    """How many leading items of the two sequences are the same."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
