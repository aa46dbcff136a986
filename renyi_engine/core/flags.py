"""The command line: every field of a settings dataclass becomes a flag, and a YAML file holds the same flags.

The flags are the standard library's argparse and look as TRL's do. (TRL's own parser comes with transformers, whose
import takes seconds.) The values of a YAML file are put in front of the flags of the command line, as if they were
typed. So all errors are of one kind, and the command line wins.
"""

from __future__ import annotations

import argparse
import dataclasses
import inspect
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NoReturn, TypeVar, get_args, get_origin, get_type_hints

import yaml

from renyi_engine.core import typos
from renyi_engine.core.settings import REQUIRED, read_yaml, require_given, short, without_none

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

Settings = TypeVar("Settings", bound="DataclassInstance")

ADVANCED = "advanced"
"""The group of the settings that few people change; it comes last."""
METAVARS = {int: "N", float: "X", str: "TEXT"}
_NOTHING = {"false", "no", "off", "none"}
"""What a file may say, beside null, for a setting that is to have no value."""
_LIKE_A_FLAG = re.compile(r"-(?!\d+$|\d*\.\d+$)(h|\S*(=|$))")
"""An entry of a list that argparse would take for a flag, and not for a value."""


@dataclass(frozen=True)
class Source:
    """Where the values of settings come from.

    Attributes:
        path: the --config file, or None.
        names: the settings that have their value from that file.
        setting_of: the setting that gives an argument of the Python API its value, such as "lora_r" for "r".
    """

    path: Path | None
    names: Collection[str]
    setting_of: Mapping[str, str]

    @contextmanager
    def named_in_errors(self) -> Iterator[None]:
        """Inside the block, a ValueError names a setting as the user did, and the file if the value is from it."""
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
    cls: type[Settings], argv: Sequence[str], prog: str, *, dry_run: bool = False, excused: Collection[str] = ()
) -> tuple[Settings, argparse.Namespace]:
    """(settings, options) of a command line; `options` holds print_config, dry_run where that is offered, and `source`,
    a `Source`. Every required setting has to be given, except those in `excused`.

    Raises:
        ValueError: an unknown key or flag (with the nearest known one), a value of the wrong type or out of range.
    """
    parser = make_parser(cls, prog, dry_run=dry_run)
    file_parser = Parser(prog=prog, add_help=False)
    file_parser.add_argument("--config", type=Path)
    config_file = file_parser.parse_known_args(argv)[0].config
    known = [setting.name for setting in dataclasses.fields(cls)]
    from_file = _as_flags(read_yaml(config_file, _AsTyped), cls, config_file) if config_file else {}
    typed = {_flag_name(argument) for argument in argv if argument.startswith("--")}
    source = Source(config_file, from_file.keys() - typed, getattr(cls, "setting_of", {}))
    with source.named_in_errors():
        flags = [word for words in from_file.values() for word in words]
        if flags:  # ends a list of the file, so that it takes no word of the command line
            flags.append(f"--config={config_file}")
        options, rest = parser.parse_known_args([*flags, *argv])
        if rest:
            raise ValueError(
                _unknown("flag", rest[0], [f"--{name}" for name in vars(options) | {"help": None}], "command line")
            )
        for setting in dataclasses.fields(cls):
            if setting.metadata.get("typed_only") and setting.name in source.names and getattr(options, setting.name):
                raise ValueError(
                    f"{setting.name}: a file cannot switch this on, as it may come from somebody else; pass "
                    f"--{setting.name} on the command line if you want it"
                )
        options.source = source
        settings = cls(**{name: getattr(options, name) for name in known})
        require_given(settings, excused=excused)
        return settings, options


class Parser(argparse.ArgumentParser):
    """argparse, with errors that are a ValueError of one line, and with help that is short enough to be read."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        ours: dict[str, Any] = {"formatter_class": _Help, "allow_abbrev": False}
        super().__init__(*args, **ours | kwargs)

    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message}; see {self.prog} --help")


class _Help(argparse.HelpFormatter):
    """Help that shows one spelling of each flag, and a default only where it tells the reader something."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=30)

    def add_argument(self, action: argparse.Action) -> None:
        super().add_argument(action)
        if isinstance(action, argparse._SubParsersAction):  # argparse does not count that commands are indented
            self._action_max_length += self._indent_increment

    def _format_action_invocation(self, action: argparse.Action) -> str:
        if not action.option_strings or "-h" in action.option_strings:
            return super()._format_action_invocation(action)
        if action.nargs == 0:
            return action.option_strings[0]
        return f"{action.option_strings[0]} {self._format_args(action, action.metavar or '')}"  # type: ignore[arg-type]

    def _format_args(self, action: argparse.Action, default_metavar: str) -> str:
        text = super()._format_args(action, default_metavar)
        return f"{action.metavar} ..." if action.nargs == "+" and action.metavar else text

    def _get_help_string(self, action: argparse.Action) -> str:
        default, text = action.default, (action.help or "").replace("%", "%%")
        if default is False or default in (None, "", [], argparse.SUPPRESS):
            return text
        return f"{text} Default: {' '.join(default) if isinstance(default, list) else default}."


def make_parser(cls: type[DataclassInstance], prog: str, *, dry_run: bool = False) -> Parser:
    """The parser of a command line for these settings. It shows the flags in the groups of the settings."""
    settings = dataclasses.fields(cls)
    needed = [setting.name for setting in settings if setting.metadata["group"] == REQUIRED]
    parser = Parser(
        prog=prog,
        usage=f"{prog} {' '.join(f'--{name} {name.upper()}' for name in needed)} [other flags]",
        description=inspect.cleandoc(cls.__doc__ or ""),
        add_help=False,
    )
    names = [name for name in dict.fromkeys(setting.metadata["group"] for setting in settings) if name != ADVANCED]
    groups = {name: parser.add_argument_group(name) for name in sorted(names, key=lambda name: name != REQUIRED)}
    general = parser.add_argument_group("general")
    groups[ADVANCED] = parser.add_argument_group(ADVANCED)
    hints = get_type_hints(cls)
    for setting in settings:
        _add_flag(groups[setting.metadata["group"]], setting, without_none(hints[setting.name]))
    general.add_argument(
        "--config", type=Path, metavar="FILE", help="A YAML file with the same names. Flags override what it says."
    )
    general.add_argument(
        *_spellings("print_config"), action="store_true", help="Print all settings as YAML, and do nothing else."
    )
    if dry_run:
        general.add_argument(
            *_spellings("dry_run"),
            action="store_true",
            help="Print all settings, one example with the tokens that are learnt, and how much memory training will "
            "take. Do nothing else.",
        )
    general.add_argument("-h", "--help", action="help", help="Show this help.")
    return parser


def _add_flag(group: argparse._ArgumentGroup, setting: dataclasses.Field[Any], hint: Any) -> None:
    """A flag for a setting: --lora_r, and --lora-r as well."""
    made = setting.default_factory
    how: dict[str, Any] = {
        "default": setting.default if made is dataclasses.MISSING else made(),
        "help": setting.metadata["help"],
    }
    if get_origin(hint) is Literal:
        how |= {"choices": get_args(hint), "metavar": "{" + ",".join(get_args(hint)) + "}"}
    elif hint is bool:  # the flag alone, without a value, says yes
        how |= {"type": _truth, "nargs": "?", "const": True, "metavar": "true|false"}
    elif get_origin(hint) is list:
        how |= {"type": get_args(hint)[0], "nargs": "+", "metavar": METAVARS[get_args(hint)[0]]}
    else:
        how |= {"type": hint, "metavar": METAVARS[hint]}
    group.add_argument(*_spellings(setting.name), **how)


def _spellings(name: str) -> list[str]:
    """--lora_r and --lora-r."""
    return list(dict.fromkeys((f"--{name}", f"--{name.replace('_', '-')}")))


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
            f"{source}: kind: expected the settings of {kind}; got those of {short(values['kind'])}; give the file to "
            "the command that it was made for"
        )
    if hasattr(cls, "in_todays_words"):
        values = cls.in_todays_words(values)
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
            raise ValueError(f"{source}: {name}: expected {expected}; got {short(value)}")
    return flags


def _flag_name(argument: str) -> str:
    return argument.split("=")[0].removeprefix("--").replace("-", "_")


def _unknown(kind: str, name: str, known: Sequence[str], source: str) -> str:
    name = name.split("=")[0]
    return f"{source}: unknown {kind} {name!r}" + (typos.hint(name, known) or "; see --help")
