"""The base that adapters were trained on: what their folder says of it, compared with the model that they are put on.

ensemble.json keeps the fingerprint of the base. The metadata of every adapter_model.safetensors keeps it too, so a
particle takes it along wherever it is copied. A folder that PEFT wrote has only the name of the base.
"""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from renyi_engine.core import files, some
from renyi_engine.ensemble.fingerprint import Fingerprint, difference, fingerprint, is_fingerprint

KEY = "base"
"""Where the fingerprint stands in ensemble.json and in the metadata."""


@dataclass(frozen=True)
class Origin:
    """The base of the adapters in `folder`: its name and its fingerprint, each None if the folder does not say it."""

    folder: Path
    name: str | None
    base: Fingerprint | None


def metadata(base: Fingerprint | None) -> dict[str, str]:
    """What a particle's safetensors file says of its base."""
    return {} if base is None else {KEY: json.dumps(base)}


def of_ensemble(path: Path, ensemble: Mapping[str, Any]) -> Origin:
    """What ensemble.json, read from `path`, says."""
    return _origin(path.parent, ensemble.get("base_model_name_or_path"), ensemble.get(KEY), path)


def of_particle(config_file: Path, tensors_file: Path) -> Origin:
    """What the two files of one PEFT folder say. Both were read before and are valid."""
    text = files.read_metadata(tensors_file).get(KEY)
    try:
        base = None if text is None else json.loads(text)
    except (ValueError, RecursionError):
        base = text  # it is no fingerprint, and is refused below
    name = files.read_json(config_file).get("base_model_name_or_path")
    return _origin(config_file.parent, name, base, tensors_file)


def _origin(folder: Path, name: Any, base: Any, source: Path) -> Origin:
    if base is not None and not is_fingerprint(base):
        raise ValueError(f"{source}: {KEY}: expected the fingerprint of a base; this one is damaged; restore the file")
    return Origin(folder, name if isinstance(name, str) and name else None, base)


def check(origins: Sequence[Origin], model: PreTrainedModel) -> None:
    """Compare `model` with the base that the adapters were trained on. A warning says if nobody can tell whether they
    are the same, or if they have the same weights but different configs.

    Raises:
        ValueError: the model has other weights.
    """
    now = fingerprint(model) if any(origin.base for origin in origins) else {}
    own_name = model.config._name_or_path
    for origin in origins:
        there = f"{origin.folder}: the adapters were trained on "
        remedy = f"pass {repr(origin.name) if origin.name else 'that base'} as --model_name_or_path (in Python: model)"
        if origin.base is None:
            if origin.name and own_name and _last_name(origin.name) != _last_name(own_name):
                _warn(f"{there}{origin.name!r}, and this model is {own_name!r}; if that is another base, {remedy}")
            continue
        found = difference(origin.base, now)
        if found.weights:
            raise ValueError(
                f"{there}another base than this model{f' ({own_name})' * bool(own_name)}: the weights of "
                f"{some(found.weights)} differ; {remedy}, or pass adapters of this model as --ensemble (in Python: "
                "directory); LoraEnsemble.from_pretrained(..., check_base=False) loads them without this check"
            )
        if found.values:
            _warn(f"{there}this base with another config: {', '.join(found.values)}")
        if found.unknown:
            _warn(
                f"{there}{origin.name or 'a base'!r}; nobody can tell whether this model is the same: in one of "
                f"the two, the weights of {some(found.unknown)} are quantised or missing"
            )


def _last_name(name: str) -> str:
    """ "qwen2.5-0.5b" for Qwen/Qwen2.5-0.5B, for a folder with that name, and for the hub's cache of it."""
    cached = re.search(r"models--(?:[^/\\]+--)?([^/\\]+)[/\\]snapshots[/\\]", name)
    return (cached[1] if cached else Path(name).name).casefold()


def _warn(message: str) -> None:
    warnings.warn(message, stacklevel=4)
