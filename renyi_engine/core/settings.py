"""Settings: flat dataclasses, read from YAML and flags alike.

Each field of a dataclass becomes a flag of the standard library's argparse, which looks and behaves as TRL's do. (The
parser that TRL uses comes with transformers, whose import takes seconds.) A YAML file is turned into the same flags,
with its values as they are written, and these are put in front of the flags of the command line. So errors are of one
kind, and the command line wins.
"""

from __future__ import annotations

import argparse
import dataclasses
import re
import reprlib
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import NoneType
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NoReturn, TypeVar, get_args, get_origin, get_type_hints

import yaml

from renyi_engine.core import typos

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

Settings = TypeVar("Settings", bound="DataclassInstance")

_NOTHING = {"false", "no", "off", "none"}
"""What a file may say, beside null, for a setting that is to have no value."""
_LIKE_A_FLAG = re.compile(r"-(?!\d+$|\d*\.\d+$)\S*(=|$)")
"""An entry of a list that argparse would take for a flag, and not for a value."""


def _short(value: Any) -> str:
    """The repr of a value, of bounded length: a YAML file of a few lines can stand for a value of gigabytes."""
    shortened = reprlib.Repr()
    shortened.maxstring = shortened.maxother = 200
    shortened.maxlist = shortened.maxdict = 12
    shortened.maxlevel = 3
    return shortened.repr(value)[:300]


def flag(default: Any, help: str, *, typed_only: bool = False) -> Any:
    """A setting. `typed_only`: only the command line can switch it on, as a file may come from somebody else."""
    metadata = {"help": help, "typed_only": typed_only}
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata=metadata)
    return field(default=default, metadata=metadata)


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
    """The settings that differ from those that were saved, a line each, but for those that `may_change`."""
    # through YAML and back, so that both sides have the same types
    values = yaml.safe_load(yaml.safe_dump(dict(now)))
    names = sorted((values.keys() | before.keys()) - set(may_change))
    return "".join(
        f"\n  {name}: {_short(before.get(name))} then, {_short(values.get(name))} now"
        for name in names
        if before.get(name) != values.get(name)
    )


@dataclass(frozen=True)
class Source:
    """Where the values of settings come from.

    Attributes:
        path: the --config file, or None.
        names: the settings that have their value from that file.
        setting_of: of an argument of the Python API, the setting that its value comes from, as "lora_r" of "rank".
    """

    path: Path | None
    names: Collection[str]
    setting_of: Mapping[str, str]

    @contextmanager
    def named_in_errors(self) -> Iterator[None]:
        """Inside, a ValueError about a setting calls it as the user did, and names the file if the value is from it."""
        try:
            yield
        except ValueError as error:
            message = re.sub(r"^\w+(?=:)", lambda name: self.setting_of.get(name[0], name[0]), str(error))
            about = re.match(r"(?:argument --)?(\w+)\b", message)
            if about is not None and about[1] in self.names:
                message = f"{self.path}: {message}"
            if message == str(error):
                raise
            raise ValueError(message) from error.__cause__


def parse(
    cls: type[Settings], argv: Sequence[str], prog: str, *, dry_run: bool = False, complete: bool = True
) -> tuple[Settings, argparse.Namespace]:
    """(settings, options) of a command line; `options` holds print_config, dry_run where that is offered, and `source`,
    a `Source`. `complete`: whatever the class calls `needed` has to be given.

    Raises:
        ValueError: an unknown key or flag (with the nearest known one), a value of the wrong type or out of range.
    """
    parser = Parser(prog=prog, allow_abbrev=False, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    _add_flags(parser, cls)
    parser.add_argument("--config", type=Path, help="A YAML file of these same names; flags override it.")
    options_alone = {"print_config": "Print the resolved settings as YAML and stop."}
    if dry_run:
        options_alone["dry_run"] = "Print the settings, one example with its loss mask and a memory estimate."
    for name, what in options_alone.items():
        parser.add_argument(*_spellings(name), action="store_true", help=what)
    file_parser = Parser(prog=prog, add_help=False, allow_abbrev=False)
    file_parser.add_argument("--config", type=Path)
    config_file = file_parser.parse_known_args(argv)[0].config
    known = [f.name for f in dataclasses.fields(cls)]
    from_file = _as_flags(read_yaml(config_file, _AsTyped), cls, config_file) if config_file else {}
    typed = {_flag_name(argument) for argument in argv if argument.startswith("--")}
    source = Source(config_file, from_file.keys() - typed, getattr(cls, "setting_of", {}))
    with source.named_in_errors():
        options, rest = parser.parse_known_args([*(flag for flags in from_file.values() for flag in flags), *argv])
        if rest:
            flags = [f"--{name}" for name in (*known, "config", "help", *options_alone)]
            raise ValueError(_unknown("flag", rest[0], flags, "command line"))
        for setting in dataclasses.fields(cls):
            if setting.metadata.get("typed_only") and setting.name in source.names and getattr(options, setting.name):
                raise ValueError(
                    f"{setting.name}: a file cannot switch this on, as it may come from somebody else; pass "
                    f"--{setting.name} on the command line if you want it"
                )
        options.source = source
        settings = cls(**{name: getattr(options, name) for name in known})
        if complete:
            require_given(settings, getattr(cls, "needed", ()))
        return settings, options


class Parser(argparse.ArgumentParser):
    """argparse, whose errors are a ValueError of one line."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message}; see {self.prog} --help")


def _add_flags(parser: argparse.ArgumentParser, cls: type[DataclassInstance]) -> None:
    """A flag for every setting: --lora_r, and --lora-r as well."""
    hints = get_type_hints(cls)
    for setting in dataclasses.fields(cls):
        made = setting.default_factory
        default = setting.default if made is dataclasses.MISSING else made()
        how: dict[str, Any] = {"default": default, "help": setting.metadata.get("help")}
        hint = _without_none(hints[setting.name])
        if get_origin(hint) is Literal:
            how["choices"] = get_args(hint)
        elif hint is bool:  # --group_by_length alone says yes
            how |= {"type": _truth, "nargs": "?", "const": True}
        elif get_origin(hint) is list:
            how |= {"type": get_args(hint)[0], "nargs": "+"}
        else:
            how["type"] = hint
        parser.add_argument(*_spellings(setting.name), **how)


def _spellings(name: str) -> list[str]:
    """--lora_r and --lora-r."""
    return list(dict.fromkeys((f"--{name}", f"--{name.replace('_', '-')}")))


def _without_none(hint: Any) -> Any:
    """The type of a setting that may have no value: int of int | None."""
    kinds = [kind for kind in get_args(hint) if kind is not NoneType]
    return kinds[0] if NoneType in get_args(hint) else hint


def _truth(text: str) -> bool:
    for value, words in ((True, ("true", "yes", "on", "y", "t", "1")), (False, ("false", "no", "off", "n", "f", "0"))):
        if text.lower() in words:
            return value
    raise argparse.ArgumentTypeError(f"expected true or false; got {text!r}")


class _AsTyped(yaml.SafeLoader):
    """A value of the file is the text that is written there, as on a command line; YAML alone would read no as False,
    007 as 7 and 12:30 as 750. Only null means that there is no value."""

    yaml_implicit_resolvers: ClassVar[dict[str, list[Any]]] = {  # type: ignore[misc]
        first: [(tag, pattern) for tag, pattern in resolvers if tag.endswith((":null", ":merge"))]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        found = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value in found:
                raise yaml.constructor.ConstructorError(None, None, f"{key.value} is given twice", key.start_mark)
            found.add(key.value if isinstance(key, yaml.ScalarNode) else None)
        return super().construct_mapping(node, deep)


def _as_flags(values: dict[str, Any], cls: type[DataclassInstance], source: Path) -> dict[str, list[str]]:
    """For every setting that has a value in the file, its flag and what follows the flag."""
    defaults = {f.name: f.default for f in dataclasses.fields(cls)}
    hints = get_type_hints(cls)
    flags = {}
    kind = getattr(cls, "kind", None)
    if kind is not None and values.get("kind", kind) != kind:
        raise ValueError(
            f"{source}: kind: expected settings of {kind}; got those of {_short(values['kind'])}: give the file to the "
            "command that it was made for"
        )
    for name, value in values.items():
        if name == "kind" and kind is not None:
            continue
        if name not in defaults:
            raise ValueError(_unknown("key", str(name), list(defaults), str(source)))
        if value is None or (defaults[name] is None and isinstance(value, str) and value.lower() in _NOTHING):
            continue
        takes_list = any(get_origin(hint) is list for hint in (hints[name], *get_args(hints[name])))
        if isinstance(value, list) and takes_list and all(isinstance(item, str) for item in value):
            for item in filter(_LIKE_A_FLAG.match, value):
                raise ValueError(
                    f"{source}: {name}: {item!r} would be taken for a flag; begin it with another character"
                )
            flags[name] = [f"--{name}", *value]
        elif isinstance(value, str):
            flags[name] = [f"--{name}={value}"]
        else:
            expected = "one value or a plain list of them" if takes_list else "one value"
            raise ValueError(f"{source}: {name}: expected {expected}; got {_short(value)}")
    return flags


def _flag_name(argument: str) -> str:
    return argument.split("=")[0].removeprefix("--").replace("-", "_")


def _unknown(kind: str, name: str, known: Sequence[str], source: str) -> str:
    name = name.split("=")[0]
    return f"{source}: unknown {kind} {name!r}" + (typos.hint(name, known) or "; see --help")


SQUARABLE = "a number above 0, from 1e-150 to 1e150"
"""Expected where the square has to be a number above 0 too."""


def is_squarable(value: float) -> bool:
    return 1e-150 <= value <= 1e150
