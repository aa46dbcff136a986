"""What a conversation in a row may hold: its messages, and the columns beside them that the chat template reads."""

from __future__ import annotations

import inspect
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from transformers import PreTrainedTokenizerBase

from renyi_engine.data.columns import unexpected

Message = dict[str, Any]

CONTEXT_COLUMNS = ("tools", "documents", "chat_template_kwargs")
"""Columns beside the messages that the chat template reads. The names are TRL's."""


@dataclass(frozen=True)
class Context:
    """What the chat template is given beside the messages: `tools`, `documents`, and values of its own `variables`."""

    tools: list[Any] | None = None
    documents: list[Any] | None = None
    variables: Mapping[str, Any] = field(default_factory=dict)


def is_conversation(value: Any) -> bool:
    """Whether a value of a row is meant as messages. `read_messages` then checks each message."""
    return isinstance(value, list) and all(isinstance(message, Mapping) for message in value)


def read_messages(number: int, column: str, value: Any) -> list[Message]:
    """The messages in `column` of row `number`.

    The content of a message is a string or a list of text parts. A message with tool calls may have no content. Fields
    that are null are left out, as if the row did not have them.

    Raises:
        ValueError: the value is something else. The message names the row, the column and the turn.
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
    """The `CONTEXT_COLUMNS` of row `number`.

    Raises:
        ValueError: one of them is not what the chat template can be given.
    """
    lists = {}
    for column in ("tools", "documents"):
        value = _from_json(number, column, row.get(column))
        if value is not None and not isinstance(value, list):
            raise unexpected(f"row {number}: {column}", "a list", value)
        lists[column] = value
    variables = _from_json(number, "chat_template_kwargs", row.get("chat_template_kwargs")) or {}
    if not isinstance(variables, Mapping):
        raise unexpected(f"row {number}: chat_template_kwargs", "an object of names and values", variables)
    reserved = set(inspect.signature(PreTrainedTokenizerBase.apply_chat_template).parameters) | {"messages"}
    for name in variables:
        if name in reserved:
            raise ValueError(f"row {number}: chat_template_kwargs: a row cannot set {name!r}; leave it out")
    return Context(lists["tools"], lists["documents"], dict(variables))


def _from_json(number: int, column: str, value: Any) -> Any:
    """The value itself; a string is read as JSON, because some data sets keep these columns as text."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except ValueError as error:
        raise ValueError(f"row {number}: {column}: expected JSON in a string; got {value[:60]!r} ({error})") from None
