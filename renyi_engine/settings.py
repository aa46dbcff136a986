"""Settings: flat dataclasses, read from YAML and flags alike.

Flags are parsed by transformers' HfArgumentParser, so that they look and behave as TRL's do. A YAML file is turned into
the same flags in front of the command line's own: one way in, one kind of error, and what is typed last wins.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import yaml
from transformers import HfArgumentParser

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

Settings = TypeVar("Settings", bound="DataclassInstance")


def flag(default: Any, help: str) -> Any:
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata={"help": help})
    return field(default=default, metadata={"help": help})


def require(settings: Any, names: Sequence[str], expected: str, holds: Callable[[Any], bool]) -> None:
    """ValueError that names the first of these settings whose value is no number or does not hold."""
    for name in names:
        value = getattr(settings, name)
        if isinstance(value, (bool, str)) or not holds(value):
            raise ValueError(f"{name}: expected {expected}; got {value!r}")


def require_given(settings: Any, names: Sequence[str]) -> None:
    for name in names:
        if not getattr(settings, name):
            raise ValueError(f"{name}: needed, but not given; pass --{name} or put it into the --config file")


def to_yaml(settings: Any) -> str:
    return yaml.safe_dump(dataclasses.asdict(settings), sort_keys=False)


def read_yaml(path: Path) -> dict[str, Any]:
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ValueError(f"{path}: not a readable YAML file ({str(error).splitlines()[0]})") from None
    if not isinstance(values, dict):
        raise ValueError(f"{path}: expected 'name: value' lines; got {type(values).__name__}")
    return values


def changes(now: Mapping[str, Any], before: Mapping[str, Any], may_change: Collection[str]) -> str:
    """What differs between settings and those that were saved, a line each; empty if that is only what may."""
    # through YAML and back, so that both sides have the same types
    values = yaml.safe_load(yaml.safe_dump(dict(now)))
    names = sorted((values.keys() | before.keys()) - set(may_change))
    return "".join(
        f"\n  {name}: {before.get(name)!r} then, {values.get(name)!r} now"
        for name in names
        if before.get(name) != values.get(name)
    )


def parse(
    cls: type[Settings], argv: Sequence[str], prog: str, *, dry_run: bool = False
) -> tuple[Settings, argparse.Namespace]:
    """(settings, options) of a command line; `options` holds print_config, and dry_run where that is offered.

    Raises:
        ValueError: an unknown key or flag (with the nearest known one), a value of the wrong type or out of range.
    """
    parser = _Parser(cls, prog=prog, allow_abbrev=False)
    parser.add_argument("--config", type=Path, help="A YAML file of these same names; flags override it.")
    parser.add_argument("--print_config", action="store_true", help="Print the resolved settings as YAML and stop.")
    if dry_run:
        parser.add_argument(
            "--dry_run",
            action="store_true",
            help="Print the settings, one example with its loss mask and a memory estimate.",
        )
    file_parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    file_parser.add_argument("--config", type=Path)
    config_file = file_parser.parse_known_args(argv)[0].config
    known = [f.name for f in dataclasses.fields(cls)]
    from_file = _as_flags(read_yaml(config_file), known, config_file) if config_file else []
    options, rest = parser.parse_known_args([*from_file, *argv])
    if rest:
        raise ValueError(_unknown("flag", rest[0], [f"--{name}" for name in known], "command line"))
    return cls(**{name: getattr(options, name) for name in known}), options


class _Parser(HfArgumentParser):
    def error(self, message: str) -> Any:
        raise ValueError(f"{message}; see {self.prog} --help")


def _as_flags(values: dict[str, Any], known: list[str], source: Path) -> list[str]:
    flags = []
    for name, value in values.items():
        if name not in known:
            raise ValueError(_unknown("key", str(name), known, str(source)))
        if isinstance(value, list):
            flags += [f"--{name}", *map(str, value)]
        elif isinstance(value, dict):
            raise ValueError(f"{source}: {name}: expected one value or a list; got a mapping")
        elif value is not None:
            flags.append(f"--{name}={value}")
    return flags


def _unknown(kind: str, name: str, known: Sequence[str], source: str) -> str:
    name = name.split("=")[0]
    near = difflib.get_close_matches(name, known, n=1)
    return f"{source}: unknown {kind} {name!r}" + (f"; did you mean {near[0]!r}?" if near else "; see --help")
