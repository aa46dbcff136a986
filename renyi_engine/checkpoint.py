"""Checkpoints: whole or not there, checked before they are believed, and never unpickled.

    RUN/checkpoint-120/adapters.safetensors     stacked fp32 adapters
                       optimizer.safetensors    AdamW moments
                       state.json               step, schedule, counters
                       manifest.json            size and sha256 of each file; written last

A checkpoint is built in a temporary folder, forced to the disk and renamed; older ones go only after that. Nothing in
training draws from a global random generator, so there is none to save.
"""

from __future__ import annotations

import re
import shutil
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from renyi_engine import files
from renyi_engine.ensemble import LoraEnsemble

MANIFEST_FILE = "manifest.json"
_NAME = re.compile(r"checkpoint-(\d+)")
_TEMPORARY = ".tmp-checkpoint-"


class Incomplete(ValueError):
    """A checkpoint that was cut short: files missing or shorter than its manifest says."""


def save(
    run: Path, step: int, ensemble: LoraEnsemble, optimizer: torch.optim.Optimizer, state: dict[str, Any], keep: int
) -> Path:
    """Write RUN/checkpoint-`step`, then remove all but the newest `keep`. OSError leaves the earlier ones untouched."""
    temporary = run / f"{_TEMPORARY}{step}"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        parameters = dict(_named(ensemble))
        files.write_tensors(temporary / "adapters.safetensors", parameters)
        moments = {
            f"{name}.{entry}": value
            for name, parameter in parameters.items()
            for entry, value in optimizer.state.get(parameter, {}).items()
        }
        files.write_tensors(temporary / "optimizer.safetensors", moments)
        files.write_json(temporary / "state.json", {"step": step, **state})
        written = sorted(temporary.iterdir())
        manifest = {file.name: {"bytes": file.stat().st_size, "sha256": files.sha256_of(file)} for file in written}
        for file in written:
            files.fsync(file)
        files.write_json(temporary / MANIFEST_FILE, manifest)
        files.fsync(temporary / MANIFEST_FILE)
        files.fsync(temporary)
        final = run / f"checkpoint-{step}"
        shutil.rmtree(final, ignore_errors=True)  # one that was found damaged, and trained past again
        temporary.rename(final)
        files.fsync(run)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    for _, old in sorted(_all(run))[:-keep]:
        shutil.rmtree(old)
    return final


def newest(run: Path) -> Path | None:
    """The newest whole checkpoint, verified; None if there is none.

    One that was cut short is passed over with a warning that names it and its successor.

    Raises:
        ValueError: a checksum does not match.
    """
    for leftover in run.glob(f"{_TEMPORARY}*"):
        warnings.warn(f"{leftover}: removed; it was being written when the run was killed", stacklevel=2)
        shutil.rmtree(leftover)
    problems = []
    for _, path in sorted(_all(run), reverse=True):
        try:
            verify(path)
        except Incomplete as problem:
            problems.append(str(problem))
            continue
        if problems:
            warnings.warn(f"{'; '.join(problems)}; falling back to {path}", stacklevel=2)
        return path
    if problems:
        raise ValueError(f"{'; '.join(problems)}; and {run} has no other checkpoint")
    return None


def verify(path: Path) -> None:
    """Hold every file of a checkpoint against its manifest. Raises Incomplete, or ValueError for a wrong checksum."""
    if not (path / MANIFEST_FILE).is_file():
        raise Incomplete(f"{path}: no {MANIFEST_FILE}, so it is not a whole checkpoint")
    for name, expected in files.read_json(path / MANIFEST_FILE).items():
        file = files.inside(path, name)
        size = file.stat().st_size if file.is_file() else 0
        if size != expected["bytes"]:
            raise Incomplete(f"{file}: {size} bytes instead of {expected['bytes']}")
        if files.sha256_of(file) != expected["sha256"]:
            raise ValueError(
                f"{file}: sha256 differs from {MANIFEST_FILE}; it is damaged: resume from another checkpoint"
            )


def load(path: Path, ensemble: LoraEnsemble, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Verify `path`, put its adapters and moments in place, and return its state.

    Raises:
        ValueError: damaged, not finite, or of another shape than `ensemble`.
    """
    verify(path)
    parameters = dict(_named(ensemble))
    saved = files.read_tensors(path / "adapters.safetensors", stacked=True)
    moments = files.read_tensors(path / "optimizer.safetensors", stacked=True)
    wrong = sorted(parameters.keys() ^ saved.keys())
    wrong += [name for name in parameters.keys() & saved.keys() if parameters[name].shape != saved[name].shape]
    if wrong:
        raise ValueError(f"{path}: does not fit this ensemble: {', '.join(wrong[:6])}")
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(saved[name])
    for key, value in moments.items():
        name, _, entry = key.rpartition(".")
        parameter = parameters[name]
        # the fused AdamW keeps its step counter beside its moments
        optimizer.state[parameter][entry] = value.to(parameter.device)
    return files.read_json(path / "state.json")


def adapters(path: Path) -> dict[str, tuple[Tensor, Tensor]]:
    """(A [K, R, I], B [K, O, R]) by path of a verified checkpoint, with no model needed."""
    verify(path)
    tensors = files.read_tensors(path / "adapters.safetensors", stacked=True)
    maps = [name.removesuffix(".lora_A") for name in tensors if name.endswith(".lora_A")]
    return {name: (tensors[f"{name}.lora_A"], tensors[f"{name}.lora_B"]) for name in maps}


def _named(ensemble: LoraEnsemble) -> Iterator[tuple[str, Tensor]]:
    for path, (A, B) in ensemble.stacked().items():
        yield f"{path}.lora_A", A
        yield f"{path}.lora_B", B


def _all(run: Path) -> list[tuple[int, Path]]:
    matches = ((_NAME.fullmatch(path.name), path) for path in run.iterdir() if path.is_dir())
    return [(int(match[1]), path) for match, path in matches if match]
