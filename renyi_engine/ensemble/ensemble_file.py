"""ensemble.json: the particles of an ensemble, checksums of their files, and what the ensemble was trained with."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from renyi_engine.core import files
from renyi_engine.ensemble.peft_adapter import CONFIG_FILE, TENSORS_FILE, is_number
from renyi_kernels.reference import SUM_TOLERANCE

ENSEMBLE_FILE = "ensemble.json"
_FORMAT = 2
"""The format that is written. Format 1 had no digest."""


def checksums(directory: Path, names: Sequence[str]) -> dict[str, str]:
    """The sha256 of both files of every particle, by "p000/adapter_config.json" and the like."""
    places = [f"{name}/{file}" for name in names for file in (TENSORS_FILE, CONFIG_FILE)]
    return {place: files.sha256_of(directory / place) for place in places}


def write(directory: Path, content: Mapping[str, Any]) -> None:
    """Write `content` to ensemble.json, with a digest of it."""
    content = {"format": _FORMAT, **content}
    files.write_json(directory / ENSEMBLE_FILE, {**content, "digest": files.sha256_of_json(content)})


def read(path: Path) -> dict[str, Any]:
    """The content of ensemble.json.

    Raises:
        ValueError: it has another form or digest, its particle_weights are no distribution, or it does not have one
            checksum for each file of each particle.
    """
    ensemble = files.read_json(path)
    kinds = {"format": int, "particles": list, "sha256": dict, "seed": int, "init": str}
    if not isinstance(ensemble, dict) or any(not isinstance(ensemble.get(key), kind) for key, kind in kinds.items()):
        raise ValueError(
            f"{path}: expected {', '.join(f'{k} ({t.__name__})' for k, t in kinds.items())}; at least one of them is "
            "missing or of another type; restore the file"
        )
    if ensemble["format"] not in (1, _FORMAT):
        raise ValueError(
            f"{path}: format {ensemble['format']}: this version reads formats 1 and {_FORMAT}; use a newer one"
        )
    digest = ensemble.pop("digest", None)
    if ensemble["format"] == _FORMAT and digest != files.sha256_of_json(ensemble):
        raise ValueError(
            f"{path}: its digest does not fit its content, so the file is damaged or was edited; restore it, or remove "
            f"{path.name} and pass its alpha with --alpha; without it, every particle has the weight 1/K"
        )
    alpha, names = ensemble.get("alpha"), ensemble["particles"]
    if alpha is not None and not (is_number(alpha) and alpha >= 0):
        raise ValueError(f"{path}: alpha: expected a finite number of at least 0, or null; got {alpha!r}")
    if not names or not all(isinstance(name, str) for name in names) or len(set(names)) != len(names):
        raise ValueError(f"{path}: particles: expected distinct folder names; got {names}")
    for name in names:
        files.inside(path.parent, name)
    weights = ensemble.get("particle_weights")
    if weights is not None and not is_distribution(weights, len(names)):
        raise ValueError(
            f"{path}: particle_weights: expected {len(names)} finite numbers of at least 0 with the sum 1, or null; "
            f"got {weights!r}"
        )
    listed = {f"{name}/{file}" for name in names for file in (TENSORS_FILE, CONFIG_FILE)}
    different = sorted(listed ^ set(ensemble["sha256"]))
    if different:
        raise ValueError(
            f"{path}: sha256: expected one checksum for each file of each particle; missing or unexpected: {different}"
        )
    return ensemble


def is_distribution(weights: Any, num_particles: int) -> bool:
    """Whether these are the weights of so many particles: a list of finite numbers of at least 0, whose sum is 1."""
    return (
        isinstance(weights, list)
        and len(weights) == num_particles
        and all(is_number(weight) and weight >= 0 for weight in weights)
        and abs(math.fsum(weights) - 1) <= SUM_TOLERANCE
    )


def verify(directory: Path, sha256: Mapping[str, str]) -> None:
    """Compare the files with the checksums that ensemble.json gives.

    Raises:
        ValueError: a file is missing, or has another checksum.
    """
    for place, expected in sha256.items():
        folder, _, file = place.partition("/")
        path = files.inside(files.inside(directory, folder), file)
        if not path.is_file():
            raise ValueError(f"{path}: this file is missing, but {ENSEMBLE_FILE} lists it; restore it")
        if files.sha256_of(path) != expected:
            raise ValueError(
                f"{path}: its sha256 is not the one in {ENSEMBLE_FILE}, so the file is damaged or was edited; restore "
                f"it, or remove {ENSEMBLE_FILE} to load it as it is, with the weight 1/K for every particle"
            )
