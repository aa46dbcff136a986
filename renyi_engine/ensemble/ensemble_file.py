"""ensemble.json: the particles of an ensemble, checksums of their files, and what the ensemble was trained with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from renyi_engine.core import files
from renyi_engine.ensemble import origin
from renyi_engine.ensemble.config import EnsembleConfig
from renyi_engine.ensemble.fingerprint import Fingerprint
from renyi_engine.ensemble.peft_adapter import CONFIG_FILE, TENSORS_FILE, is_number

ENSEMBLE_FILE = "ensemble.json"
_FORMAT = 2
"""The format that is written. Format 1 had no digest."""


def checksums(directory: Path, names: Sequence[str]) -> dict[str, str]:
    """The sha256 of both files of every particle, by "p000/adapter_config.json" and the like."""
    places = [f"{name}/{file}" for name in names for file in (TENSORS_FILE, CONFIG_FILE)]
    return {place: files.sha256_of(directory / place) for place in places}


def write(
    directory: Path,
    *,
    config: EnsembleConfig,
    alpha: float | None,
    base_model: str | None,
    base: Fingerprint | None,
    sha256: Mapping[str, str],
    names: Sequence[str],
) -> None:
    """Write ensemble.json, with a digest of its own content."""
    ensemble = {
        "format": _FORMAT,
        "particles": names,
        "alpha": alpha,
        "seed": config.seed,
        "init": config.init,
        "base_model_name_or_path": base_model,
        origin.KEY: base,
        "sha256": sha256,
    }
    files.write_json(directory / ENSEMBLE_FILE, ensemble | {"digest": files.sha256_of_json(ensemble)})


def read(path: Path) -> dict[str, Any]:
    """Read ensemble.json, and check its form, its digest, and that it has a checksum for each file of each particle."""
    ensemble = files.read_json(path)
    kinds = {"format": int, "particles": list, "sha256": dict, "seed": int, "init": str}
    if not isinstance(ensemble, dict) or any(not isinstance(ensemble.get(key), kind) for key, kind in kinds.items()):
        raise ValueError(
            f"{path}: expected {', '.join(f'{k} ({t.__name__})' for k, t in kinds.items())}; it has another form"
        )
    if ensemble["format"] not in (1, _FORMAT):
        raise ValueError(f"{path}: format {ensemble['format']}; this version reads formats 1 and {_FORMAT}")
    digest = ensemble.pop("digest", None)
    if ensemble["format"] == _FORMAT and digest != files.sha256_of_json(ensemble):
        raise ValueError(
            f"{path}: its digest differs from its content: damaged, or changed on purpose (then remove {path.name}, "
            "and pass its alpha with --alpha)"
        )
    alpha, names = ensemble.get("alpha"), ensemble["particles"]
    if alpha is not None and not (is_number(alpha) and alpha >= 0):
        raise ValueError(f"{path}: alpha: expected a finite number of at least 0, or null; got {alpha!r}")
    if not names or not all(isinstance(name, str) for name in names) or len(set(names)) != len(names):
        raise ValueError(f"{path}: particles: expected distinct folder names; got {names}")
    for name in names:
        files.inside(path.parent, name)
    listed = {f"{name}/{file}" for name in names for file in (TENSORS_FILE, CONFIG_FILE)}
    different = sorted(listed ^ set(ensemble["sha256"]))
    if different:
        raise ValueError(f"{path}: sha256: expected one for each file of each particle; missing or extra: {different}")
    return ensemble


def verify(directory: Path, sha256: Mapping[str, str]) -> None:
    """ValueError unless every file that ensemble.json lists is there, and has the checksum that stands there."""
    for place, expected in sha256.items():
        folder, _, file = place.partition("/")
        path = files.inside(files.inside(directory, folder), file)
        if not path.is_file():
            raise ValueError(f"{path}: listed in {ENSEMBLE_FILE}, but missing")
        if files.sha256_of(path) != expected:
            raise ValueError(
                f"{path}: sha256 differs from {ENSEMBLE_FILE}: damaged, or changed on purpose "
                f"(then remove {ENSEMBLE_FILE})"
            )
