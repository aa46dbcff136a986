"""The reference of every command and flag, as Markdown, made of the parsers that the command line itself uses.

`python docs/commands.py` prints it; `conf.py` appends it to commands.md.
"""

from __future__ import annotations

import argparse
import contextlib
import re
from collections.abc import Iterator
from unittest import mock

from renyi_engine.cli import main

KINDS = {"int": "INTEGER", "float": "NUMBER", "_truth": "true|false", "Path": "PATH"}
"""What a flag takes, by the function that reads it."""


def reference() -> str:
    """A heading for each command and each group of its flags, and a line or two about each flag."""
    return "".join(_section(words, parser) for words, parser in _leaves())


def _parser_of(words: list[str]) -> argparse.ArgumentParser:
    """The parser that answers `renyi-engine WORDS --help`."""
    asked: list[argparse.ArgumentParser] = []
    with (
        mock.patch.object(argparse.ArgumentParser, "print_help", lambda parser, file=None: asked.append(parser)),
        contextlib.suppress(SystemExit),
    ):
        main([*words, "--help"])
    return asked[-1]


def _leaves(words: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], argparse.ArgumentParser]]:
    """Every command that has no commands of its own, with its parser."""
    parser = _parser_of(list(words))
    names = [name for action in parser._actions if not action.option_strings for name in action.choices or ()]
    if not names:
        yield words, parser
    for name in names:
        yield from _leaves((*words, name))


def _section(words: tuple[str, ...], parser: argparse.ArgumentParser) -> str:
    text = f"\n## {' '.join(words)}\n\n```{{program}} renyi-engine {' '.join(words)}\n```\n"
    if parser.description:
        text += f"\n{parser.description}\n"
    for group in parser._action_groups:
        actions = [action for action in group._group_actions if not isinstance(action, argparse._HelpAction)]
        if actions:
            text += f"\n### {' '.join(words)}: {group.title}\n"
            text += f"\n{group.description}\n" * bool(group.description)
            text += "".join(_option(action) for action in actions)
    return text


def _option(action: argparse.Action) -> str:
    # --lora-r is --lora_r: one spelling is enough
    names = dict.fromkeys("--" + name[2:].replace("-", "_") for name in action.option_strings)
    kind = KINDS.get(getattr(action.type, "__name__", ""), "TEXT")
    takes = "" if action.nargs == 0 else f" {kind}" + " ..." * (action.nargs == "+")
    signature = ", ".join(name + takes for name in names) or action.dest + " ..." * (action.nargs == "+")
    facts = []
    if action.choices:
        facts.append("one of " + ", ".join(f"`{choice}`" for choice in action.choices))
    if action.required:
        facts.append("required")
    elif action.nargs != 0 and action.default not in (None, "", []):
        default = " ".join(map(str, action.default)) if isinstance(action.default, list) else action.default
        facts.append(f"default `{default}`")
    text = re.sub(r"([*$<\[])", r"\\\1", (action.help or "").replace("%%", "%"))
    return f"\n```{{option}} {signature}\n{text} " + f"({'; '.join(facts)})" * bool(facts) + "\n```\n"


if __name__ == "__main__":
    print(reference())
