"""K PEFT adapter folders on disk, both ways.

    DIR/p000/adapter_config.json, adapter_model.safetensors     what PEFT and vLLM load
    DIR/p001/...
    DIR/ensemble.json                                           folders, sha256 of files, the base's fingerprint

Lost and damaged files are found when a folder is read. ensemble.json, which is written last, lists every particle, the
checksums of its files, and a checksum of its own content. Without it, folders named p000, p001 and so on have to be all
particles of one ensemble: the tensors file of each holds its number and how many there were. Adapter folders of other
names are a plain set; whether it is complete cannot be checked.

Layout: K particles, I/O in/out features, R rank.
"""

from __future__ import annotations

import os
import re
import sys
import tempfile
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from renyi_engine.core import files, some
from renyi_engine.ensemble import origin
from renyi_engine.ensemble.config import EnsembleConfig
from renyi_engine.ensemble.fingerprint import Fingerprint
from renyi_engine.ensemble.origin import Origin
from renyi_kernels.renyi_reduce import check_alpha

ENSEMBLE_FILE = "ensemble.json"
CONFIG_FILE = "adapter_config.json"
TENSORS_FILE = "adapter_model.safetensors"
PLACE = "particle"
"""Key in the metadata of a particle's safetensors file: its number and how many there are, as "2/8" for p002 of 8."""
_FORMAT = 2
"""The format of ensemble.json that is written; format 1 had no digest."""
_PARTICLE = re.compile(r"p\d{3,}")
_TEMPORARY = ".particles-"
_PREFIX = "base_model.model."
_KEY = re.compile(re.escape(_PREFIX) + r"(?P<path>.+)\.lora_(?P<side>[AB])\.weight")
# what PEFT can do to an adapter that a stacked plain LoRA cannot represent
_UNSUPPORTED = (
    "alora_invocation_tokens", "alpha_pattern", "exclude_modules", "layer_replication", "layers_pattern", "lora_bias",
    "megatron_config", "modules_to_save", "rank_pattern", "trainable_token_indices", "use_dora",
    "use_qalora",
)  # fmt: skip

_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_PLAIN_INITS = (None, True, False, "gaussian", "orthogonal", "eva")


@dataclass(frozen=True)
class SavedAdapters:
    """What a folder holds: keyword arguments of EnsembleConfig, (A [K, R, I], B [K, O, R]) by path, the alpha it was
    trained with, None where that is not recorded, and the base it was trained on."""

    directory: Path
    config: dict[str, Any]
    adapters: dict[str, tuple[Tensor, Tensor]]
    alpha: float | None
    origins: list[Origin]


def write(
    directory: Path,
    *,
    config: EnsembleConfig,
    adapters: Mapping[str, tuple[Tensor, Tensor]],
    target_modules: Sequence[str],
    layers_to_transform: Sequence[int] | None,
    target_parameters: Sequence[str],
    base_model: str | None,
    base: Fingerprint | None,
    fan_in_fan_out: bool,
    alpha: float | None,
) -> None:
    """Write one PEFT folder for each particle, then ensemble.json. Particles of an ensemble that was saved here before
    are replaced, once the new ones are on the disk.

    Raises:
        ValueError: `directory` holds a particle folder that this program did not write. Nothing was changed then.
    """
    if alpha is not None:
        check_alpha(alpha)
    names = [_name(k) for k in range(config.num_particles)]
    directory.mkdir(parents=True, exist_ok=True)
    previous = _previous(directory, names)
    for leftover in directory.glob(f"{_TEMPORARY}*"):  # of a process that was killed here
        _remove_temporary(leftover)
    adapter_config: dict[str, Any] = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "revision": None,
        "r": config.rank,
        "lora_alpha": config.lora_alpha,
        "use_rslora": config.use_rslora,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": list(target_modules),
        "layers_to_transform": None if layers_to_transform is None else list(layers_to_transform),
        "fan_in_fan_out": fan_in_fan_out,
        "inference_mode": True,
        "modules_to_save": None,
        "use_dora": False,
        "rank_pattern": {},
        "alpha_pattern": {},
        "peft_version": _peft_version(),
    }
    if target_parameters:
        adapter_config["target_parameters"] = list(target_parameters)
    temporary = Path(tempfile.mkdtemp(prefix=_TEMPORARY, dir=directory))
    try:
        checksums = {}
        for k, name in enumerate(names):
            folder = temporary / name
            folder.mkdir()
            tensors = {}
            for path, (A, B) in adapters.items():
                tensors[f"{_PREFIX}{path}.lora_A.weight"] = A[k]
                tensors[f"{_PREFIX}{path}.lora_B.weight"] = B[k]
            place = {PLACE: f"{k}/{len(names)}"}
            files.write_tensors(folder / TENSORS_FILE, tensors, place | origin.metadata(base))
            files.write_json(folder / CONFIG_FILE, adapter_config)
            for file in (TENSORS_FILE, CONFIG_FILE):
                checksums[f"{name}/{file}"] = files.sha256_of(folder / file)
        ensemble = {
            "format": _FORMAT,
            "particles": names,
            "alpha": alpha,
            "seed": config.seed,
            "init": config.init,
            "base_model_name_or_path": base_model,
            origin.KEY: base,
            "sha256": checksums,
        }
        (directory / ENSEMBLE_FILE).unlink(missing_ok=True)
        _remove(previous)
        for name in names:
            (temporary / name).rename(directory / name)
        files.write_json(directory / ENSEMBLE_FILE, ensemble | {"digest": files.sha256_of_json(ensemble)})
    finally:
        _remove_temporary(temporary)


def read(directory: Path) -> SavedAdapters:
    """Read and stack the adapters of `directory`; `LoraEnsemble.from_pretrained` says what it may be."""
    folders, ensemble = _list(directory)
    if ensemble is None and folders == [directory]:
        others = _adapters_in(directory)
        if others:
            warnings.warn(
                f"{directory}: the adapter of this folder itself is loaded, alone; those in {some(others)} are not",
                stacklevel=3,
            )
    seeds, alpha = {}, None
    if ensemble is not None:
        origins = [origin.of_ensemble(directory / ENSEMBLE_FILE, ensemble)]
        _verify(directory, ensemble["sha256"])
        seeds, alpha = {"seed": ensemble["seed"], "init": ensemble["init"]}, ensemble.get("alpha")
    configs = [_read_config(folder) for folder in folders]
    for folder, config in zip(folders, configs, strict=True):
        different = [key for key in configs[0] if config[key] != configs[0][key]]
        if different:
            raise ValueError(
                f"{folder}: particles must agree, but "
                + "; ".join(
                    f"{key} is {config[key]!r} beside {configs[0][key]!r} in {folders[0].name}" for key in different
                )
            )
    particles = [_read_particle(folder, configs[0]["rank"]) for folder in folders]
    for folder, particle in zip(folders, particles, strict=True):
        _same_keys(folder, set(particle), set(particles[0]), f"{folders[0].name} has them")
    stacked = {}
    for path in particles[0]:
        sides = []
        for side in (0, 1):
            parts = [particle[path][side] for particle in particles]
            if len({part.shape for part in parts}) > 1:
                raise ValueError(f"{directory}: {path}.lora_{'AB'[side]} has shapes {[list(p.shape) for p in parts]}")
            sides.append(torch.stack(parts))
        stacked[path] = (sides[0], sides[1])
    if ensemble is None:
        _check_places(directory, folders)
        origins = [origin.of_particle(folder / CONFIG_FILE, folder / TENSORS_FILE) for folder in folders]
    config = {"num_particles": len(folders), **configs[0], **seeds}
    return SavedAdapters(directory, config, stacked, alpha, origins)


def num_particles(directory: Path) -> int:
    """How many `read` would find in `directory`; no adapter is read."""
    return len(_list(directory)[0])


def check_against(saved: SavedAdapters, features: Mapping[str, tuple[int, int]]) -> None:
    """Compare the adapters that were read with the maps that their config targets, {path: (in, out) features}.

    Raises:
        ValueError: adapters are missing, extra or misshapen; the message lists them.
    """
    _same_keys(saved.directory, set(saved.adapters), set(features), "its target_modules name them in this model")
    wrong = []
    rank = saved.config["rank"]
    for path, (num_in, num_out) in features.items():
        for tensor, side, shape in zip(saved.adapters[path], "AB", ((rank, num_in), (num_out, rank)), strict=True):
            if tuple(tensor.shape[1:]) != shape:
                wrong.append(f"{path}.lora_{side}: {list(tensor.shape[1:])} instead of {list(shape)}")
    if wrong:
        raise ValueError(f"{saved.directory}: adapters made for another base model; misshapen: {some(wrong)}")


def _list(directory: Path) -> tuple[list[Path], dict[str, Any] | None]:
    """The folder of each particle, and ensemble.json where there is one."""
    if not directory.is_dir():
        raise ValueError(f"{directory}: no such folder")
    if os.path.lexists(directory / ENSEMBLE_FILE):
        ensemble = _read_ensemble(files.inside(directory, ENSEMBLE_FILE))
        unlisted = [n for n in _adapters_in(directory) if _PARTICLE.fullmatch(n) and n not in ensemble["particles"]]
        if unlisted:
            raise ValueError(
                f"{directory}: {some(unlisted)} is a particle that {ENSEMBLE_FILE} does not list; move it out of this "
                "folder, if it belongs to another ensemble"
            )
        return [files.inside(directory, name) for name in ensemble["particles"]], ensemble
    if (directory / CONFIG_FILE).is_file():
        return [directory], None
    names = _adapters_in(directory)
    if not names:
        raise ValueError(f"{directory}: neither {ENSEMBLE_FILE} nor {CONFIG_FILE} here or one folder below")
    particles = sorted(child.name for child in directory.iterdir() if _PARTICLE.fullmatch(child.name))
    expected = [_name(k) for k in range(len(particles))]
    if particles and not names == particles == expected:
        missing, others = sorted(set(expected) - set(names)), sorted(set(names) - set(particles))
        raise ValueError(
            f"{directory}: not the particles of one ensemble:"
            + f" {some(missing)} missing;" * bool(missing)
            + f" {some(others)} beside them;" * bool(others)
            + " to load these adapters as they are, give their folders other names than p000, p001, ..."
        )
    return [files.inside(directory, name) for name in names], None


def _name(k: int) -> str:
    return f"p{k:03d}"


def _adapters_in(directory: Path) -> list[str]:
    """Folders one below that hold an adapter, or a part of one."""
    return sorted(
        child.name
        for child in directory.iterdir()
        if child.is_dir()
        and any(os.path.lexists(child / file) for file in (CONFIG_FILE, TENSORS_FILE, "adapter_model.bin"))
    )


def _check_places(directory: Path, folders: Sequence[Path]) -> None:
    """Without ensemble.json, check by the particles' own files that none is missing.

    A particle that is loaded alone, by its own folder, is not checked; nor are adapters whose folders have other names.
    """
    if folders == [directory] or not _PARTICLE.fullmatch(folders[0].name):
        return
    for k, folder in enumerate(folders):
        place, expected = files.read_metadata(folder / TENSORS_FILE).get(PLACE), f"{k}/{len(folders)}"
        if place is not None and place != expected:
            raise ValueError(
                f"{folder}: its file says that it is particle {place}, but here it is {expected}: particles, or "
                f"{ENSEMBLE_FILE}, were lost; to load these adapters as they are, give their folders other names than "
                "p000, p001, ..."
            )
    warnings.warn(
        f"{directory}: there is no {ENSEMBLE_FILE}, so damage to the particles' files cannot be seen, and the alpha of "
        "their training is not known",
        stacklevel=4,
    )


def _read_ensemble(path: Path) -> dict[str, Any]:
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


def _read_config(folder: Path) -> dict[str, Any]:
    path = files.inside(folder, CONFIG_FILE)
    config = files.read_json(path)
    if not isinstance(config, dict):
        raise ValueError(f"{path}: expected a mapping; got {type(config).__name__}")
    if config.get("peft_type") != "LORA":
        raise ValueError(f"{folder}: peft_type is {config.get('peft_type')!r}; only LORA adapters can be stacked")
    if "r" not in config or not (config.get("target_modules") or config.get("target_parameters")):
        raise ValueError(f"{folder / CONFIG_FILE}: r and target_modules must be given")
    unsupported = [key for key in _UNSUPPORTED if config.get(key)]
    parameters = config.get("target_parameters") or []
    if parameters and not _are_weights_of_maps(parameters, config.get("target_modules")):
        unsupported.append("target_parameters")
    if config.get("bias", "none") != "none":
        unsupported.append("bias")
    if config.get("init_lora_weights") not in _PLAIN_INITS:
        # PEFT changes the base's weights again whenever it loads such an adapter
        unsupported.append(f"init_lora_weights {config['init_lora_weights']!r}")
    if unsupported:
        raise ValueError(
            f"{folder / CONFIG_FILE}: {', '.join(unsupported)} cannot be represented by a plain stacked LoRA"
        )
    layers, targets = config.get("layers_to_transform"), config.get("target_modules") or []
    lora_alpha, use_rslora = config.get("lora_alpha", 8), config.get("use_rslora", False)
    if type(config["r"]) is not int or config["r"] < 1:
        raise ValueError(f"{path}: r: expected a whole number of at least 1; got {config['r']!r}")
    if not (is_number(lora_alpha) and lora_alpha > 0):
        raise ValueError(f"{path}: lora_alpha: expected a number above 0; got {lora_alpha!r}")
    if not isinstance(use_rslora, bool):
        raise ValueError(f"{path}: use_rslora: expected true or false; got {use_rslora!r}")
    if not isinstance(targets, (str, list)) or not all(isinstance(name, str) for name in targets):
        raise ValueError(f"{path}: target_modules: expected names or one regular expression; got {targets!r}")
    layers = [layers] if type(layers) is int else layers
    if layers is not None and not (isinstance(layers, list) and all(type(number) is int for number in layers)):
        raise ValueError(f"{path}: layers_to_transform: expected numbers of layers, or null; got {layers!r}")
    if parameters:
        targets = [*targets, *(name.removesuffix(".weight") for name in parameters)]
    return {
        "rank": config["r"],
        "lora_alpha": lora_alpha,
        "use_rslora": use_rslora,
        "target_modules": targets if isinstance(targets, str) else sorted(targets),
        "layers_to_transform": layers,
    }


def _are_weights_of_maps(parameters: Any, target_modules: Any) -> bool:
    """Whether target_parameters name linear maps by their weights, as `targets.describe` does; not fused experts."""
    return (
        isinstance(parameters, list)
        and isinstance(target_modules, list)
        and all(isinstance(name, str) and name.endswith(".weight") for name in parameters)
    )


def _read_particle(folder: Path, rank: int) -> dict[str, tuple[Tensor, Tensor]]:
    pickled = [file.name for file in folder.iterdir() if file.suffix in files.PICKLE_SUFFIXES]
    if not (folder / TENSORS_FILE).is_file() and pickled:
        raise ValueError(
            f"{folder / pickled[0]}: pickled weights are refused unread; save them as {TENSORS_FILE} first"
        )
    sides: dict[str, dict[str, Tensor]] = {}
    for key, tensor in files.read_tensors(files.inside(folder, TENSORS_FILE)).items():
        match = _KEY.fullmatch(key)
        if not match or tensor.dim() != 2:
            raise ValueError(
                f"{folder / TENSORS_FILE}: {key} {list(tensor.shape)} is not a LoRA matrix of a linear map"
            )
        if tensor.dtype not in _DTYPES:
            raise ValueError(
                f"{folder / TENSORS_FILE}: {key} is of type {_word(tensor.dtype)}; expected one of "
                f"{', '.join(map(_word, _DTYPES))}: save it in one of these first"
            )
        sides.setdefault(match["path"], {})[match["side"]] = tensor
    halves = [f"{path}.lora_{side}" for path, pair in sides.items() for side in "AB" if side not in pair]
    if halves:
        raise ValueError(f"{folder / TENSORS_FILE}: missing {some(halves)}")
    return {path: (pair["A"], pair["B"]) for path, pair in sides.items()}


def _same_keys(folder: Path, found: set[str], expected: set[str], because: str) -> None:
    missing, extra = sorted(expected - found), sorted(found - expected)
    if missing or extra:
        raise ValueError(
            f"{folder}: adapter tensors do not fit:"
            + (f" missing {some(missing)} ({because});" if missing else "")
            + (f" extra {some(extra)};" if extra else "")
        )


def _verify(directory: Path, checksums: Mapping[str, str]) -> None:
    for name, expected in checksums.items():
        folder, _, file = name.partition("/")
        path = files.inside(files.inside(directory, folder), file)
        if not path.is_file():
            raise ValueError(f"{path}: listed in {ENSEMBLE_FILE}, but missing")
        if files.sha256_of(path) != expected:
            raise ValueError(
                f"{path}: sha256 differs from {ENSEMBLE_FILE}: damaged, or changed on purpose "
                f"(then remove {ENSEMBLE_FILE})"
            )


# ---------------------------------------------------------------------- what may be replaced


def _previous(directory: Path, names: Sequence[str]) -> list[Path]:
    """The particles in `directory` that a new ensemble of these `names` replaces: those of the ensemble that was saved
    there before, and those that an interrupted save left.

    Raises:
        ValueError: one of them was not written by this program, or particles are there that belong to no ensemble.
    """
    way_out = "save to another folder, or move it away first"
    listed: list[str] = []
    if os.path.lexists(directory / ENSEMBLE_FILE):
        try:
            listed = [str(name) for name in files.read_json(directory / ENSEMBLE_FILE)["particles"]]
        except (ValueError, KeyError, TypeError):
            raise ValueError(f"{directory / ENSEMBLE_FILE}: damaged, so it is not replaced; {way_out}") from None
        for name in listed:
            files.inside(directory, name)
    stray = [n for n in _adapters_in(directory) if _PARTICLE.fullmatch(n) and n not in (*listed, *names)]
    if stray:
        raise ValueError(f"{directory / stray[0]}: a particle that {ENSEMBLE_FILE} does not list; {way_out}")
    found = [directory / name for name in dict.fromkeys((*listed, *names)) if os.path.lexists(directory / name)]
    for folder in found:
        if not _is_own(folder):
            raise ValueError(f"{folder}: not a particle that this program wrote, so it is not replaced; {way_out}")
    return found


def _is_own(folder: Path) -> bool:
    """Whether this folder is a particle that `write` left, whole or killed on the way, and holds nothing else."""
    if folder.is_symlink() or not folder.is_dir() or not _PARTICLE.fullmatch(folder.name):
        return False
    paths = list(folder.iterdir())
    if not all(path.is_file() and path.name.lstrip(".").startswith((CONFIG_FILE, TENSORS_FILE)) for path in paths):
        return False
    names = {path.name for path in paths if not path.name.startswith(".")}  # the hidden ones are unfinished
    if not names:
        return True
    if not {TENSORS_FILE} <= names <= {CONFIG_FILE, TENSORS_FILE}:
        return False
    try:
        metadata = files.read_metadata(folder / TENSORS_FILE)
    except Exception:  # safetensors raises errors of its own
        return False
    return PLACE in metadata or origin.KEY in metadata


def _remove(folders: Iterable[Path]) -> None:
    """Remove those of the folders that are particles written by this program. The tensors file goes last: it is what
    shows that this program wrote the folder."""
    for folder in filter(_is_own, folders):
        for path in sorted(folder.iterdir(), key=lambda path: path.name == TENSORS_FILE):
            path.unlink()
        folder.rmdir()


def _remove_temporary(temporary: Path) -> None:
    """Remove a folder in which `write` prepared particles, unless it holds something else."""
    if not temporary.is_symlink() and temporary.is_dir():
        _remove(list(temporary.iterdir()))
        if not any(temporary.iterdir()):
            temporary.rmdir()


def _peft_version() -> str | None:
    try:
        return version("peft")
    except PackageNotFoundError:
        return None


def is_number(value: Any) -> bool:
    """Whether a value of a JSON file is a finite number that a float can hold."""
    return type(value) in (int, float) and abs(value) <= sys.float_info.max


def _word(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
