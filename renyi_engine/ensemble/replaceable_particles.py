"""Which particle folders this program wrote. When an ensemble is saved, these may be replaced, and no others."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from renyi_engine.core import files
from renyi_engine.ensemble import base_check
from renyi_engine.ensemble.ensemble_file import ENSEMBLE_FILE
from renyi_engine.ensemble.peft_adapter import CONFIG_FILE, TENSORS_FILE, holds_adapter

PLACE = "particle"
"""Key in the metadata of a particle's safetensors file: its number and how many there are, as "2/8" for p002 of 8."""
_UNFINISHED = f"{files.TEMPORARY}particles-"


def particle_name(k: int) -> str:
    """The name of a particle's folder: "p002" of particle 2."""
    return f"p{k:03d}"


def is_particle_name(name: str) -> bool:
    return re.fullmatch(r"p\d{3,}", name) is not None


def adapters_in(directory: Path) -> list[str]:
    """The names of the folders in `directory` that hold an adapter, or a part of one."""
    return sorted(child.name for child in directory.iterdir() if holds_adapter(child))


def to_be_replaced(directory: Path, names: Sequence[str]) -> list[Path]:
    """The particles in `directory` that a new ensemble with these `names` replaces. They are those of the ensemble that
    was saved there before, and those that a killed save left.

    Raises:
        ValueError: this program did not write one of them, or there are particles that belong to no ensemble.
    """
    remedy = "save to another folder, or move this one away"
    listed: list[str] = []
    if os.path.lexists(directory / ENSEMBLE_FILE):
        try:
            listed = [str(name) for name in files.read_json(directory / ENSEMBLE_FILE)["particles"]]
        except (ValueError, KeyError, TypeError):
            raise ValueError(
                f"{directory / ENSEMBLE_FILE}: the file is damaged, so nothing is replaced; {remedy}"
            ) from None
        for name in listed:
            files.inside(directory, name)
    stray = [n for n in adapters_in(directory) if is_particle_name(n) and n not in (*listed, *names)]
    if stray:
        raise ValueError(f"{directory / stray[0]}: {ENSEMBLE_FILE} does not list this particle; {remedy}")
    found = [directory / name for name in dict.fromkeys((*listed, *names)) if os.path.lexists(directory / name)]
    for folder in found:
        if not _is_own(folder):
            raise ValueError(f"{folder}: this program did not write it as a particle, so it stays; {remedy}")
    return found


def _is_own(folder: Path) -> bool:
    """Whether this program wrote this particle, in whole or in part, and nothing else is in its folder."""
    if folder.is_symlink() or not folder.is_dir() or not is_particle_name(folder.name):
        return False
    unfinished = tuple(f"{files.TEMPORARY}{name}-" for name in (CONFIG_FILE, TENSORS_FILE))
    paths = list(folder.iterdir())
    names = {path.name for path in paths if not path.name.startswith(unfinished)}
    if not all(path.is_file() for path in paths):
        return False
    if not names:
        return True
    if not {TENSORS_FILE} <= names <= {CONFIG_FILE, TENSORS_FILE}:
        return False
    try:
        metadata = files.read_metadata(folder / TENSORS_FILE)
    except Exception:  # safetensors raises errors of its own
        return False
    return PLACE in metadata or base_check.KEY in metadata


def remove(folders: Iterable[Path]) -> None:
    """Remove those of the folders that are particles of this program. Their tensors file goes last, because it shows
    that this program wrote them."""
    for folder in filter(_is_own, folders):
        for path in sorted(folder.iterdir(), key=lambda path: path.name == TENSORS_FILE):
            path.unlink()
        folder.rmdir()


@contextmanager
def preparing(directory: Path) -> Iterator[Path]:
    """Gives an empty folder in `directory`. The block prepares new particles there, and moves them to their places.
    Such folders that killed processes left are removed first."""
    for leftover in directory.glob(f"{_UNFINISHED}*"):
        _remove_unfinished(leftover)
    unfinished = files.temporary_name(directory / "particles")
    unfinished.mkdir()
    try:
        yield unfinished
    finally:
        _remove_unfinished(unfinished)


def _remove_unfinished(folder: Path) -> None:
    """Remove a folder where particles were prepared, unless it holds something else."""
    if not folder.is_symlink() and folder.is_dir():
        remove(list(folder.iterdir()))
        if not any(folder.iterdir()):
            folder.rmdir()
