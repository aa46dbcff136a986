"""K PEFT adapter folders on disk, both ways.

    DIR/p000/adapter_config.json, adapter_model.safetensors     what PEFT and vLLM load
    DIR/p001/...
    DIR/ensemble.json                                           folders, sha256 of files, the base's fingerprint; last

Layout: K particles, I/O in/out features, R rank.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from renyi_engine import files, origin
from renyi_engine.ensemble_config import EnsembleConfig
from renyi_engine.fingerprint import Fingerprint
from renyi_engine.origin import Origin

ENSEMBLE_FILE = "ensemble.json"
CONFIG_FILE = "adapter_config.json"
TENSORS_FILE = "adapter_model.safetensors"
_PREFIX = "base_model.model."
_KEY = re.compile(re.escape(_PREFIX) + r"(?P<path>.+)\.lora_(?P<side>[AB])\.weight")
# what PEFT can do to an adapter that a stacked plain LoRA cannot represent
_UNSUPPORTED = (
    "alora_invocation_tokens", "alpha_pattern", "exclude_modules", "layer_replication", "layers_pattern", "lora_bias",
    "megatron_config", "modules_to_save", "rank_pattern", "trainable_token_indices", "use_dora",
    "use_qalora",
)  # fmt: skip

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
    """Write one PEFT folder a particle, then ensemble.json. Particles of an ensemble saved here before are replaced."""
    directory.mkdir(parents=True, exist_ok=True)
    _remove_previous(directory)
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
    names = [f"p{k:03d}" for k in range(config.num_particles)]
    checksums = {}
    for k, name in enumerate(names):
        folder = directory / name
        folder.mkdir(exist_ok=True)
        tensors = {}
        for path, (A, B) in adapters.items():
            tensors[f"{_PREFIX}{path}.lora_A.weight"] = A[k]
            tensors[f"{_PREFIX}{path}.lora_B.weight"] = B[k]
        files.write_tensors(folder / TENSORS_FILE, tensors, origin.metadata(base))
        files.write_json(folder / CONFIG_FILE, adapter_config)
        for file in (TENSORS_FILE, CONFIG_FILE):
            checksums[f"{name}/{file}"] = files.sha256_of(folder / file)
    ensemble = {
        "format": 1,
        "particles": names,
        "alpha": alpha,
        "seed": config.seed,
        "init": config.init,
        "base_model_name_or_path": base_model,
        origin.KEY: base,
        "sha256": checksums,
    }
    files.write_json(directory / ENSEMBLE_FILE, ensemble)


def read(directory: Path) -> SavedAdapters:
    """Read and stack the adapters of `directory`; `LoraEnsemble.from_pretrained` says what it may be."""
    folders, ensemble = _list(directory)
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
        origins = [origin.of_particle(folder / CONFIG_FILE, folder / TENSORS_FILE) for folder in folders]
    config = {"num_particles": len(folders), **configs[0], **seeds}
    return SavedAdapters(directory, config, stacked, alpha, origins)


def num_particles(directory: Path) -> int:
    """How many `read` would find in `directory`; no adapter is read."""
    return len(_list(directory)[0])


def check_against(saved: SavedAdapters, features: Mapping[str, tuple[int, int]]) -> None:
    """Hold what was read against the maps that its own config targets, {path: (in, out) features}.

    Raises:
        ValueError: lists what is missing, extra or misshapen.
    """
    _same_keys(saved.directory, set(saved.adapters), set(features), "its target_modules name them in this model")
    wrong = []
    rank = saved.config["rank"]
    for path, (num_in, num_out) in features.items():
        for tensor, side, shape in zip(saved.adapters[path], "AB", ((rank, num_in), (num_out, rank)), strict=True):
            if tuple(tensor.shape[1:]) != shape:
                wrong.append(f"{path}.lora_{side}: {list(tensor.shape[1:])} instead of {list(shape)}")
    if wrong:
        raise ValueError(f"{saved.directory}: adapters made for another base model; misshapen: {_some(wrong)}")


def _list(directory: Path) -> tuple[list[Path], dict[str, Any] | None]:
    """The folder of each particle, and ensemble.json where there is one."""
    if not directory.is_dir():
        raise ValueError(f"{directory}: no such folder")
    if (directory / ENSEMBLE_FILE).is_file():
        ensemble = _read_ensemble(directory / ENSEMBLE_FILE)
        return [files.inside(directory, name) for name in ensemble["particles"]], ensemble
    if (directory / CONFIG_FILE).is_file():
        return [directory], None
    names = sorted(child.name for child in directory.iterdir() if (child / CONFIG_FILE).is_file())
    if not names:
        raise ValueError(f"{directory}: neither {ENSEMBLE_FILE} nor {CONFIG_FILE} here or one folder below")
    return [files.inside(directory, name) for name in names], None


def _read_ensemble(path: Path) -> dict[str, Any]:
    """ensemble.json, held to its form: distinct particles, and a checksum for exactly their files."""
    ensemble = files.read_json(path)
    kinds = {"particles": list, "sha256": dict, "seed": int, "init": str}
    if not isinstance(ensemble, dict) or any(not isinstance(ensemble.get(key), kind) for key, kind in kinds.items()):
        raise ValueError(
            f"{path}: expected {', '.join(f'{k} ({t.__name__})' for k, t in kinds.items())}; it has another form"
        )
    names = ensemble["particles"]
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
    layers, targets, lora_alpha = (
        config.get("layers_to_transform"),
        config.get("target_modules") or [],
        config.get("lora_alpha", 8),
    )
    if isinstance(lora_alpha, bool) or not isinstance(lora_alpha, (int, float)):
        raise ValueError(f"{path}: lora_alpha: expected a number; got {lora_alpha!r}")
    if not isinstance(targets, (str, list)) or not all(isinstance(name, str) for name in targets):
        raise ValueError(f"{path}: target_modules: expected names or one regular expression; got {targets!r}")
    if parameters:
        targets = [*targets, *(name.removesuffix(".weight") for name in parameters)]
    return {
        "rank": config["r"],
        "lora_alpha": lora_alpha,
        "use_rslora": config.get("use_rslora", False),
        "target_modules": targets if isinstance(targets, str) else sorted(targets),
        "layers_to_transform": [layers] if isinstance(layers, int) else layers,
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
        sides.setdefault(match["path"], {})[match["side"]] = tensor
    halves = [f"{path}.lora_{side}" for path, pair in sides.items() for side in "AB" if side not in pair]
    if halves:
        raise ValueError(f"{folder / TENSORS_FILE}: missing {_some(halves)}")
    return {path: (pair["A"], pair["B"]) for path, pair in sides.items()}


def _same_keys(folder: Path, found: set[str], expected: set[str], because: str) -> None:
    missing, extra = sorted(expected - found), sorted(found - expected)
    if missing or extra:
        raise ValueError(
            f"{folder}: adapter tensors do not fit:"
            + (f" missing {_some(missing)} ({because});" if missing else "")
            + (f" extra {_some(extra)};" if extra else "")
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


def _remove_previous(directory: Path) -> None:
    if (directory / ENSEMBLE_FILE).is_file():
        names = files.read_json(directory / ENSEMBLE_FILE)["particles"]
        (directory / ENSEMBLE_FILE).unlink()
        for name in names:
            shutil.rmtree(files.inside(directory, name), ignore_errors=True)


def _peft_version() -> str | None:
    try:
        return version("peft")
    except PackageNotFoundError:
        return None


def _some(names: Sequence[str], most: int = 6) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
