"""An ensemble on disk: how its folder is written and read.

    DIR/p000/adapter_config.json, adapter_model.safetensors     what PEFT and vLLM load (`peft_adapter`)
    DIR/p001/...
    DIR/ensemble.json                                           what keeps them together (`ensemble_file`)

A reader of such a folder notices lost and damaged files. ensemble.json is written last. It lists every particle, the
checksums of its files, and a digest of its own content. Without it, folders named p000, p001 and so on have to be all
particles of one ensemble: the tensors file of each says which particle it is, and of how many. Adapter folders with
other names are loaded as they are: nobody can tell whether one of them is missing.

Layout: K particles, I/O in/out features, R rank.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from renyi_engine.core import files, some
from renyi_engine.ensemble import base_check, ensemble_file, peft_adapter, replaceable_particles
from renyi_engine.ensemble.base_check import Origin
from renyi_engine.ensemble.config import EnsembleConfig
from renyi_engine.ensemble.ensemble_file import ENSEMBLE_FILE
from renyi_engine.ensemble.fingerprint import Fingerprint
from renyi_engine.ensemble.peft_adapter import CONFIG_FILE, TENSORS_FILE
from renyi_engine.ensemble.replaceable_particles import PLACE, adapters_in, is_particle_name, particle_name
from renyi_kernels.renyi_reduce import check_alpha


@dataclass(frozen=True)
class SavedAdapters:
    """What a folder holds.

    Attributes:
        config: keyword arguments of EnsembleConfig. adapters: (A [K, R, I], B [K, O, R]) by path.
        alpha: the alpha of the training; None if the folder does not say it. origins: the bases of the training.
        weights: one for each particle; None if the folder does not say them.
    """

    directory: Path
    config: dict[str, Any]
    adapters: dict[str, tuple[Tensor, Tensor]]
    alpha: float | None
    origins: list[Origin]
    weights: list[float] | None


def write(
    directory: Path,
    model: PreTrainedModel,
    config: EnsembleConfig,
    adapters: Mapping[str, tuple[Tensor, Tensor]],
    *,
    base_model: str | None,
    base: Fingerprint | None,
    alpha: float | None,
    weights: Sequence[float],
) -> None:
    """Write one PEFT folder for each particle, then ensemble.json. Once the new particles are on the disk, they replace
    those of an ensemble that was saved here before.

    Args:
        model: the base; its weights may be on the meta device.
        adapters: (A [K, R, I], B [K, O, R]) by path.
        base_model: the name of the base, as others load it. base: its fingerprint.
        alpha: the alpha that the adapters were trained with. weights: one for each particle.

    Raises:
        ValueError: `directory` holds a particle folder that this program did not write. Then nothing was changed.
    """
    if alpha is not None:
        check_alpha(alpha)
    names = [particle_name(k) for k in range(config.num_particles)]
    directory.mkdir(parents=True, exist_ok=True)
    replaced = replaceable_particles.to_be_replaced(directory, names)
    settings = peft_adapter.settings(model, list(adapters), config, base_model)
    with replaceable_particles.preparing(directory) as unfinished:
        for k, name in enumerate(names):
            (unfinished / name).mkdir()
            metadata = {PLACE: f"{k}/{len(names)}"} | base_check.metadata(base)
            matrices = {path: (A[k], B[k]) for path, (A, B) in adapters.items()}
            peft_adapter.write(unfinished / name, settings, matrices, metadata)
        content = {
            "particles": names,
            "alpha": alpha,
            "particle_weights": list(weights),
            "seed": config.seed,
            "init": config.init,
            "base_model_name_or_path": base_model,
            base_check.KEY: base,
            "sha256": ensemble_file.checksums(unfinished, names),
        }
        (directory / ENSEMBLE_FILE).unlink(missing_ok=True)
        replaceable_particles.remove(replaced)
        for name in names:
            (unfinished / name).rename(directory / name)
        ensemble_file.write(directory, content)


def require_ensemble_file(directory: Path, argument: str) -> None:
    """Raise ValueError, which names `argument`, if the folder has no ensemble.json."""
    if not (directory / ENSEMBLE_FILE).is_file():
        raise ValueError(
            f"{argument}: {directory} has no {ENSEMBLE_FILE}, which keeps the weights; load these adapters with "
            "LoraEnsemble.from_pretrained, and save them with save_pretrained"
        )


def write_weights(directory: Path, weights: Sequence[float]) -> Path:
    """Replace the particles' weights in ensemble.json, in one step, and nothing else. Returns its path.

    Raises:
        ValueError: there is no sound ensemble.json, or these are no weights of its particles.
    """
    path = files.inside(directory, ENSEMBLE_FILE)
    ensemble, weights = ensemble_file.read(path), list(weights)
    if not ensemble_file.is_distribution(weights, K := len(ensemble["particles"])):
        raise ValueError(f"weights: expected {K} finite numbers of at least 0 with the sum 1; got {weights}")
    del ensemble["format"]  # the file gets today's, with a digest
    ensemble_file.write(directory, ensemble | {"particle_weights": weights})
    return path


def read(directory: Path) -> SavedAdapters:
    """Read the adapters of `directory` and stack them. `LoraEnsemble.from_pretrained` says what `directory` may be."""
    folders, ensemble = _list(directory)
    if ensemble is None and folders == [directory]:
        others = adapters_in(directory)
        if others:
            warnings.warn(
                f"{directory}: the adapter of this folder itself is loaded, alone; those in {some(others)} are not",
                stacklevel=3,
            )
    seeds, alpha, weights = {}, None, None
    if ensemble is not None:
        origins = [base_check.of_ensemble(directory / ENSEMBLE_FILE, ensemble)]
        ensemble_file.verify(directory, ensemble["sha256"])
        seeds, alpha = {"seed": ensemble["seed"], "init": ensemble["init"]}, ensemble.get("alpha")
        weights = ensemble.get("particle_weights")
    configs = [peft_adapter.read_settings(folder) for folder in folders]
    for folder, config in zip(folders, configs, strict=True):
        different = [key for key in configs[0] if config[key] != configs[0][key]]
        if different:
            raise ValueError(
                f"{folder}: all particles must agree, but "
                + "; ".join(
                    f"{key} is {config[key]!r} beside {configs[0][key]!r} in {folders[0].name}" for key in different
                )
            )
    particles = [peft_adapter.read_matrices(folder) for folder in folders]
    for folder, particle in zip(folders, particles, strict=True):
        _same_keys(folder, set(particle), set(particles[0]), f"{folders[0].name} has them")
    stacked = {}
    for path in particles[0]:
        sides = []
        for side in (0, 1):
            parts = [particle[path][side] for particle in particles]
            if len({part.shape for part in parts}) > 1:
                shapes = [list(part.shape) for part in parts]
                raise ValueError(
                    f"{directory}: {path}.lora_{'AB'[side]} has shapes {shapes}; expected the same for all particles"
                )
            sides.append(torch.stack(parts))
        stacked[path] = (sides[0], sides[1])
    if ensemble is None:
        _check_places(directory, folders)
        origins = [base_check.of_particle(folder / CONFIG_FILE, folder / TENSORS_FILE) for folder in folders]
    config = {"num_particles": len(folders), **configs[0], **seeds}
    return SavedAdapters(directory, config, stacked, alpha, origins, weights)


def particle_weights(directory: Path) -> list[float]:
    """The weights of the particles that `read` would find in `directory`, one for each. This reads no adapter.

    Raises:
        ValueError: `directory` holds no particles, or its ensemble.json is damaged.
    """
    folders, ensemble = _list(directory)
    written = ensemble.get("particle_weights") if ensemble else None
    return written or [1 / len(folders)] * len(folders)


def check_against(saved: SavedAdapters, features: Mapping[str, tuple[int, int]]) -> None:
    """Compare the adapters that were read with the maps that they are for, {path: (in, out) features}.

    Raises:
        ValueError: the message lists the adapters that are missing, unexpected or misshapen.
    """
    _same_keys(saved.directory, set(saved.adapters), set(features), "its target_modules name them in this model")
    wrong = []
    rank = saved.config["r"]
    for path, (num_in, num_out) in features.items():
        for tensor, side, shape in zip(saved.adapters[path], "AB", ((rank, num_in), (num_out, rank)), strict=True):
            if tuple(tensor.shape[1:]) != shape:
                wrong.append(f"{path}.lora_{side}: {list(tensor.shape[1:])} instead of {list(shape)}")
    if wrong:
        raise ValueError(f"{saved.directory}: these adapters were made for another base model: {some(wrong)}")


def _list(directory: Path) -> tuple[list[Path], dict[str, Any] | None]:
    """The folder of each particle, and ensemble.json where there is one."""
    if not directory.is_dir():
        raise ValueError(f"{directory}: no such folder")
    if os.path.lexists(directory / ENSEMBLE_FILE):
        ensemble = ensemble_file.read(files.inside(directory, ENSEMBLE_FILE))
        unlisted = [n for n in adapters_in(directory) if is_particle_name(n) and n not in ensemble["particles"]]
        if unlisted:
            raise ValueError(
                f"{directory}: {ENSEMBLE_FILE} does not list the particle {some(unlisted)}; if it belongs to another "
                "ensemble, move it out of this folder"
            )
        return [files.inside(directory, name) for name in ensemble["particles"]], ensemble
    if (directory / CONFIG_FILE).is_file():
        return [directory], None
    names = adapters_in(directory)
    if not names:
        raise ValueError(
            f"{directory}: expected {ENSEMBLE_FILE} or {CONFIG_FILE}, here or one folder below; found neither"
        )
    particles = sorted(child.name for child in directory.iterdir() if is_particle_name(child.name))
    expected = [particle_name(k) for k in range(len(particles))]
    if particles and not names == particles == expected:
        missing, others = sorted(set(expected) - set(names)), sorted(set(names) - set(particles))
        raise ValueError(
            f"{directory}: expected all particles of one ensemble and nothing else;"
            + f" {some(missing)} missing;" * bool(missing)
            + f" {some(others)} beside them;" * bool(others)
            + " to load these adapters as they are, give their folders other names than p000, p001, ..."
        )
    return [files.inside(directory, name) for name in names], None


def _check_places(directory: Path, folders: Sequence[Path]) -> None:
    """Where there is no ensemble.json, check by the particles' own files that none is missing. A particle that is
    loaded alone is not checked, and neither are adapters whose folders have other names."""
    if folders == [directory] or not is_particle_name(folders[0].name):
        return
    for k, folder in enumerate(folders):
        place, expected = files.read_metadata(folder / TENSORS_FILE).get(PLACE), f"{k}/{len(folders)}"
        if place is not None and place != expected:
            raise ValueError(
                f"{folder}: its file says that it is particle {place}, but here it is particle {expected}: "
                f"particles or {ENSEMBLE_FILE} were lost; to load these adapters as they are, give their folders other "
                "names than p000, p001, ..."
            )
    warnings.warn(
        f"{directory}: there is no {ENSEMBLE_FILE}, so nobody can see whether the particles' files are damaged, and "
        "the alpha of their training is unknown",
        stacklevel=4,
    )


def _same_keys(folder: Path, found: set[str], expected: set[str], because: str) -> None:
    missing, extra = sorted(expected - found), sorted(found - expected)
    if missing or extra:
        raise ValueError(
            f"{folder}: the adapter tensors do not fit:"
            + (f" missing: {some(missing)} ({because});" if missing else "")
            + (f" unexpected: {some(extra)};" if extra else "")
        )
