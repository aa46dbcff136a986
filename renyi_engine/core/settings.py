"""Settings: flat dataclasses whose fields are flags, how their values are checked, and how they are saved as YAML."""

from __future__ import annotations

import dataclasses
import os
import reprlib
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import field
from pathlib import Path
from types import NoneType
from typing import Any, Literal, get_args, get_origin, get_type_hints

import yaml

REQUIRED = "required"
"""The group of the settings that have to be given."""
SQUARABLE = "a number above 0, from 1e-150 to 1e150"
"""What is expected of a number whose square has to be a number above 0, too."""


def short(value: Any) -> str:
    """The repr of a value, shortened: a YAML file of a few lines can stand for a value of gigabytes."""
    shortened = reprlib.Repr()
    shortened.maxstring = shortened.maxother = 200
    shortened.maxlist = shortened.maxdict = 12
    shortened.maxlevel = 3
    return shortened.repr(value)[:300]


def flag(default: Any, help: str, *, group: str, typed_only: bool = False) -> Any:
    """A setting, and the group of the help that shows it.

    `typed_only`: only the command line can switch it on, because a file may come from somebody else.
    """
    metadata = {"help": help, "group": group, "typed_only": typed_only}
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata=metadata)
    return field(default=default, metadata=metadata)


def required(help: str, *, default: Any = "") -> Any:
    """A setting that has to be given. `default`, which is empty, stands for "not given"."""
    return flag(default, help, group=REQUIRED)


def require(settings: Any, names: Sequence[str], expected: str, holds: Callable[[Any], bool]) -> None:
    """Raise a ValueError that names the first of these settings whose value is no number or is out of range."""
    for name in names:
        value = getattr(settings, name)
        if isinstance(value, (bool, str)) or not holds(value):
            raise ValueError(f"{name}: expected {expected}; got {value!r}")


def require_kinds(settings: Any) -> None:
    """ValueError that names the first setting whose value is not of its kind. A command line cannot give such a value,
    but Python can, and "false" would count as yes, or an unknown choice as another one. A `Path` becomes its text."""
    hints = get_type_hints(type(settings))
    for setting in dataclasses.fields(settings):
        value, hint = getattr(settings, setting.name), hints[setting.name]
        if value is None and NoneType in get_args(hint):
            continue
        kind = without_none(hint)
        if get_origin(kind) is Literal:
            expected, holds = f"one of {', '.join(get_args(kind))}", value in get_args(kind)
        elif get_origin(kind) is list:
            expected, holds = "a list", isinstance(value, (list, tuple))
        elif kind is bool:
            expected, holds = "True or False", isinstance(value, bool)
        elif kind is int:
            expected, holds = "a whole number", isinstance(value, int) and not isinstance(value, bool)
        else:
            if isinstance(value, os.PathLike):
                setattr(settings, setting.name, os.fspath(value))
            continue
        if not holds:
            raise ValueError(f"{setting.name}: expected {expected}; got {short(value)}")


def without_none(hint: Any) -> Any:
    """The type of a setting that may have no value: int of int | None."""
    kinds = [kind for kind in get_args(hint) if kind is not NoneType]
    return kinds[0] if NoneType in get_args(hint) else hint


def require_given(settings: Any, *more: str, excused: Collection[str] = ()) -> None:
    """Raise a ValueError that names the first empty setting of those required or in `more`, but not `excused`."""
    of_all = [setting.name for setting in dataclasses.fields(settings) if setting.metadata.get("group") == REQUIRED]
    for name in (*of_all, *more):
        if name not in excused and not getattr(settings, name):
            raise ValueError(f"{name}: needed, but not given; pass --{name} or put it into the --config file")


def to_dict(settings: Any) -> dict[str, Any]:
    """Every setting by its name; before them the `kind` of the command, where the class of settings says it."""
    kind = {"kind": settings.kind} if hasattr(settings, "kind") else {}
    return kind | dataclasses.asdict(settings)


def to_yaml(settings: Any) -> str:
    return yaml.safe_dump(to_dict(settings), sort_keys=False)


class _AsSaved(yaml.SafeLoader):
    """What `to_yaml` writes. It never repeats a value by an alias, with which a few lines stand for gigabytes."""

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            raise yaml.composer.ComposerError(None, None, "an alias", self.peek_event().start_mark)
        return super().compose_node(parent, index)


def read_yaml(path: Path, loader: type[yaml.SafeLoader] = _AsSaved) -> dict[str, Any]:
    try:
        values = yaml.load(path.read_text(encoding="utf-8"), loader)
    except Exception as error:  # yaml raises errors of any kind where a value does not have the form of its tag
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark:
            reason = f"line {error.problem_mark.line + 1}: {error.problem}"
        raise ValueError(f"{path}: not a readable YAML file ({reason})") from None
    if not isinstance(values, dict):
        raise ValueError(f"{path}: expected 'name: value' lines; got {type(values).__name__}")
    return values


def changes(now: Mapping[str, Any], before: Mapping[str, Any], may_change: Collection[str]) -> str:
    """The settings that differ from those that were saved, one line each, except those in `may_change`."""
    # through YAML and back, so that both sides have the same types
    values = yaml.safe_load(yaml.safe_dump(dict(now)))
    names = sorted((values.keys() | before.keys()) - set(may_change))
    return "".join(
        f"\n  {name}: {short(before.get(name))} then, {short(values.get(name))} now"
        for name in names
        if before.get(name) != values.get(name)
    )


def is_squarable(value: float) -> bool:
    return 1e-150 <= value <= 1e150
