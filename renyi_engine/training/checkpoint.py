"""Checkpoints. There is never half a one; its files are checked before they are used; nothing is unpickled.

    RUN/checkpoint-120/adapters.safetensors     stacked fp32 adapters
                       optimizer.safetensors    AdamW moments
                       state.json               step, schedule, counters
                       manifest.json            size and sha256 of each file; written last

A checkpoint is written into a temporary folder, forced to the disk and renamed. Older ones are removed only after that.
Training draws nothing from a global random generator, so no state of such a generator is saved.
"""

from __future__ import annotations

import re
import shutil
import warnings
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from renyi_engine.core import files, some
from renyi_engine.ensemble import LoraEnsemble, ParticleMatrix

MANIFEST_FILE = "manifest.json"
ADAPTERS_FILE, OPTIMIZER_FILE, STATE_FILE = "adapters.safetensors", "optimizer.safetensors", "state.json"
_NAME = re.compile(r"checkpoint-(\d+)")
_MOMENTS = ("exp_avg", "exp_avg_sq")
"""What AdamW keeps of every parameter, beside the number of its steps."""


class Incomplete(ValueError):
    """A checkpoint is not whole: a file is missing or too short, or the manifest cannot be read."""


def save(
    run: Path, step: int, ensemble: LoraEnsemble, optimizer: torch.optim.Optimizer, state: dict[str, Any], keep: int
) -> Path:
    """Write RUN/checkpoint-`step`. Then, of the earlier checkpoints, keep the newest `keep` - 1 and remove the others.

    A whole checkpoint of this step stays as it is, because a run always reaches a step in the same state.

    Raises:
        OSError: the earlier checkpoints are untouched.
    """
    final = run / f"checkpoint-{step}"
    if final.exists():
        try:
            verify(final)
            return final
        except ValueError:
            remove(final)
    temporary = files.temporary_name(final)
    temporary.mkdir()
    try:
        particles = ensemble.particles
        files.write_tensors(temporary / ADAPTERS_FILE, _named(particles, particles.values.detach()))
        state_of_optimizer = optimizer.state[particles.values]
        moments = {"step": state_of_optimizer["step"]} if state_of_optimizer else {}
        for entry in _MOMENTS if moments else ():
            named = _named(particles, state_of_optimizer[entry])
            moments |= {f"{name}.{entry}": tensor for name, tensor in named.items()}
        files.write_tensors(temporary / OPTIMIZER_FILE, moments)
        files.write_json(temporary / STATE_FILE, {"step": step, **state})
        written = sorted(temporary.iterdir())
        manifest = {file.name: {"bytes": file.stat().st_size, "sha256": files.sha256_of(file)} for file in written}
        files.write_json(temporary / MANIFEST_FILE, manifest)
        files.fsync(temporary)
        temporary.rename(final)
        files.fsync(run)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    keep_newest(run, step, keep)
    return final


def keep_newest(run: Path, step: int, keep: int) -> None:
    """Remove all checkpoints up to `step` but the newest `keep` of them."""
    from_newest = [path for number, path in reversed(all_of(run)) if number <= step]
    for old in from_newest[keep:]:
        remove(old)


def newest(run: Path) -> Path | None:
    """The newest whole checkpoint, verified; None if there is none.

    A checkpoint that is not whole is passed over. A warning names it, and the one that is used instead.

    Raises:
        ValueError: a checksum does not match.
    """
    problems = []
    for _, path in reversed(all_of(run)):
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


def all_of(run: Path) -> list[tuple[int, Path]]:
    """(step, path) of every checkpoint of a run, whole or not, from the oldest to the newest."""
    matches = ((_NAME.fullmatch(path.name), path) for path in run.iterdir() if path.is_dir())
    return sorted((int(match[1]), path) for match, path in matches if match)


def remove(path: Path) -> None:
    """Remove a checkpoint at once, so that no reader finds half of it. If it is a link, only the link is removed."""
    if path.is_symlink():
        path.unlink()
    else:
        shutil.rmtree(path.rename(files.temporary_name(path)))


def verify(path: Path) -> None:
    """Check every file of a checkpoint against its manifest.

    Raises:
        Incomplete: the manifest cannot be used; a file is missing or has another size.
        ValueError: a file has another checksum.
    """
    manifest = _manifest(path)
    for name, expected in manifest.items():
        file = files.inside(path, name)
        size = file.stat().st_size if file.is_file() else 0
        if size != expected["bytes"]:
            raise Incomplete(f"{file}: {size} bytes instead of {expected['bytes']}")
    for name, expected in manifest.items():
        if files.sha256_of(path / name) != expected["sha256"]:
            raise ValueError(
                f"{path / name}: sha256 differs from {MANIFEST_FILE}; one of the two is damaged: resume from another "
                "checkpoint"
            )


def _manifest(path: Path) -> dict[str, dict[str, Any]]:
    """{file: {"bytes": size, "sha256": digest}}, for exactly the files that `save` writes. Raises Incomplete."""
    file = path / MANIFEST_FILE
    if not file.is_file():
        raise Incomplete(f"{path}: no {MANIFEST_FILE}, so it is not a whole checkpoint")
    try:
        manifest = files.read_json(file)
    except ValueError as error:
        raise Incomplete(str(error)) from None
    expected = {ADAPTERS_FILE, OPTIMIZER_FILE, STATE_FILE}
    if not isinstance(manifest, dict) or manifest.keys() != expected:
        raise Incomplete(f"{file}: damaged; it does not list exactly {', '.join(sorted(expected))}")
    for name, entry in manifest.items():
        if not isinstance(entry, dict) or entry.keys() != {"bytes", "sha256"}:
            raise Incomplete(f"{file}: damaged; it does not give the bytes and the sha256 of {name}")
    return manifest


def load(path: Path, ensemble: LoraEnsemble, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Verify `path`, put its adapters and moments in place, and return its state.

    Raises:
        ValueError: damaged, not finite, or of another shape than `ensemble`; nothing was put in place.
    """
    verify(path)
    state = read_state(path)
    particles = ensemble.particles
    parameters = _named(particles, particles.values.detach())
    saved = files.read_tensors(path / ADAPTERS_FILE, stacked=True)
    moments = files.read_tensors(path / OPTIMIZER_FILE, stacked=True)
    _require_fitting(path / ADAPTERS_FILE, saved, {name: tensor.shape for name, tensor in parameters.items()})
    if moments:  # none before the first update
        _count_steps_once(path / OPTIMIZER_FILE, moments, parameters)
        of_moments = {f"{name}.{entry}": tensor.shape for name, tensor in parameters.items() for entry in _MOMENTS}
        _require_fitting(path / OPTIMIZER_FILE, moments, {"step": torch.Size(), **of_moments})
    for name, parameter in parameters.items():
        parameter.copy_(saved[name])
    if moments:
        values, of_optimizer = particles.values, optimizer.state[particles.values]
        of_optimizer["step"] = moments["step"].to(values.device)  # the fused AdamW keeps it beside its moments
        for entry in _MOMENTS:
            of_optimizer[entry] = torch.zeros_like(values)
            for name, moment in _named(particles, of_optimizer[entry]).items():
                moment.copy_(moments[f"{name}.{entry}"])
    return state


def read_state(path: Path) -> dict[str, Any]:
    """The state that `save` was given, and the step, of a checkpoint that was verified before.

    Raises:
        ValueError: it is the state of another checkpoint.
    """
    state = files.read_json(path / STATE_FILE)
    name = path.absolute().name
    if not isinstance(state, dict) or name != f"checkpoint-{state.get('step')}":
        raise ValueError(f"{path / STATE_FILE}: not the state of {name}; the folder was renamed, or the file replaced")
    return state


def _require_fitting(file: Path, tensors: Mapping[str, Tensor], shapes: Mapping[str, torch.Size]) -> None:
    """ValueError unless the file holds exactly the tensors of these `shapes`, in fp32."""
    wrong = [f"{name} is missing" for name in shapes.keys() - tensors.keys()]
    wrong += [f"{name} is not of this ensemble" for name in tensors.keys() - shapes.keys()]
    wrong += [
        f"{name} is {tensors[name].dtype} {list(tensors[name].shape)} instead of fp32 {list(shape)}"
        for name, shape in shapes.items()
        if name in tensors and (tensors[name].shape != shape or tensors[name].dtype != torch.float32)
    ]
    if wrong:
        raise ValueError(f"{file}: does not fit this ensemble: {some(sorted(wrong))}")


def adapters(path: Path) -> dict[str, tuple[Tensor, Tensor]]:
    """(A [K, R, I], B [K, O, R]) of a checkpoint, by path. No model is needed. Raises ValueError if it is damaged."""
    verify(path)
    tensors = files.read_tensors(path / ADAPTERS_FILE, stacked=True)
    maps = [name.removesuffix(".lora_A") for name in tensors if name.endswith(".lora_A")]
    pairs = {name: (tensors[f"{name}.lora_A"], tensors.get(f"{name}.lora_B", torch.empty(0))) for name in maps}
    sizes = {(*A.shape[:-1], *B.shape[::2]) for A, B in pairs.values()}  # K, R, K, R
    if len(tensors) != 2 * len(pairs) or len(sizes) != 1 or (size := sizes.pop()) != size[:2] * 2:
        raise ValueError(f"{path / ADAPTERS_FILE}: not stacked adapters A [K, R, I] and B [K, O, R] of one K and one R")
    return pairs


def _count_steps_once(file: Path, moments: dict[str, Tensor], parameters: Collection[str]) -> None:
    """In older checkpoints, every parameter has a counter of its steps. They are all the same."""
    counters = [f"{name}.step" for name in parameters]
    if "step" in moments or not moments.keys() >= set(counters):
        return
    steps = [moments.pop(name) for name in counters]
    if not all(step.equal(steps[0]) for step in steps):
        raise ValueError(f"{file}: damaged; its parameters have made different numbers of steps")
    moments["step"] = steps[0]


def _named(particles: ParticleMatrix, matrix: Tensor) -> dict[str, Tensor]:
    """The A and B of every map, as views of a matrix [K, P], by the names that they have in a checkpoint."""
    sides = particles.named(matrix).items()
    return {f"{path}.lora_{side}": tensor for path, pair in sides for side, tensor in zip("AB", pair, strict=True)}
