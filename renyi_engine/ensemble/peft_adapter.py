"""One adapter on disk, as PEFT and vLLM read it: how its two files are written and read.

    adapter_config.json           its settings
    adapter_model.safetensors     its matrices, lora_A [R, I] and lora_B [O, R] of every adapted map

Layout: I/O in/out features, R rank.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from renyi_engine.core import files, some
from renyi_engine.ensemble import targets
from renyi_engine.ensemble.config import EnsembleConfig

CONFIG_FILE = "adapter_config.json"
TENSORS_FILE = "adapter_model.safetensors"
_PREFIX = "base_model.model."
_KEY = re.compile(re.escape(_PREFIX) + r"(?P<path>.+)\.lora_(?P<side>[AB])\.weight")
# what a PEFT adapter may have and a plain LoRA has not
_UNSUPPORTED = (
    "alora_invocation_tokens", "alpha_pattern", "exclude_modules", "layer_replication", "layers_pattern", "lora_bias",
    "megatron_config", "modules_to_save", "rank_pattern", "trainable_token_indices", "use_dora",
    "use_qalora",
)  # fmt: skip
_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_PLAIN_INITS = (None, True, False, "gaussian", "orthogonal", "eva")


def holds_adapter(folder: Path) -> bool:
    """Whether this is a folder with an adapter, or with a part of one."""
    names = (CONFIG_FILE, TENSORS_FILE, "adapter_model.bin")
    return folder.is_dir() and any(os.path.lexists(folder / name) for name in names)


# ---------------------------------------------------------------------- the settings


def settings(
    model: PreTrainedModel, paths: Sequence[str], config: EnsembleConfig, base_model: str | None
) -> dict[str, Any]:
    """What adapter_config.json says of each particle. `paths` are those of the adapted maps of `model`."""
    found = targets.describe(model, paths)
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "revision": None,
        "r": config.r,
        "lora_alpha": config.lora_alpha,
        "use_rslora": config.use_rslora,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": found.target_modules,
        "layers_to_transform": found.layers_to_transform,
        "fan_in_fan_out": isinstance(model.get_submodule(paths[0]), targets.Conv1D),
        "inference_mode": True,
        "modules_to_save": None,
        "use_dora": False,
        "rank_pattern": {},
        "alpha_pattern": {},
        "peft_version": _peft_version(),
        **({"target_parameters": found.target_parameters} if found.target_parameters else {}),
    }


def _peft_version() -> str | None:
    try:
        return version("peft")
    except PackageNotFoundError:
        return None


def read_settings(folder: Path) -> dict[str, Any]:
    """The arguments of EnsembleConfig that a folder's adapter_config.json gives.

    Raises:
        ValueError: the file is missing or damaged, or the adapter is more than a plain LoRA of linear maps.
    """
    path = files.inside(folder, CONFIG_FILE)
    config = files.read_json(path)
    if not isinstance(config, dict):
        raise ValueError(f"{path}: expected a JSON object; got {type(config).__name__}")
    if config.get("peft_type") != "LORA":
        raise ValueError(f"{path}: peft_type: expected 'LORA'; got {config.get('peft_type')!r}; give LoRA adapters")
    if "r" not in config or not (config.get("target_modules") or config.get("target_parameters")):
        raise ValueError(f"{path}: r and target_modules: both are needed, but one is missing; restore the file")
    unsupported = [key for key in _UNSUPPORTED if config.get(key)]
    parameters = config.get("target_parameters") or []
    if parameters and not _are_weights_of_maps(parameters, config.get("target_modules")):
        unsupported.append("target_parameters")
    if config.get("bias", "none") != "none":
        unsupported.append("bias")
    if config.get("init_lora_weights") not in _PLAIN_INITS:
        # PEFT changes the weights of the base whenever it loads such an adapter
        unsupported.append(f"init_lora_weights {config['init_lora_weights']!r}")
    if unsupported:
        raise ValueError(
            f"{path}: {', '.join(unsupported)}: an ensemble holds plain LoRA adapters, which have no such part; give "
            "adapters that were trained without it"
        )
    layers, names = config.get("layers_to_transform"), config.get("target_modules") or []
    lora_alpha, use_rslora = config.get("lora_alpha", 8), config.get("use_rslora", False)
    if type(config["r"]) is not int or config["r"] < 1:
        raise ValueError(f"{path}: r: expected a whole number of at least 1; got {config['r']!r}")
    if not (is_number(lora_alpha) and lora_alpha > 0):
        raise ValueError(f"{path}: lora_alpha: expected a number above 0; got {lora_alpha!r}")
    if not isinstance(use_rslora, bool):
        raise ValueError(f"{path}: use_rslora: expected true or false; got {use_rslora!r}")
    if not isinstance(names, (str, list)) or not all(isinstance(name, str) for name in names):
        raise ValueError(f"{path}: target_modules: expected names or one regular expression; got {names!r}")
    layers = [layers] if type(layers) is int else layers
    if layers is not None and not (isinstance(layers, list) and all(type(number) is int for number in layers)):
        raise ValueError(f"{path}: layers_to_transform: expected numbers of layers, or null; got {layers!r}")
    if parameters:
        names = [*names, *(name.removesuffix(".weight") for name in parameters)]
    return {
        "r": config["r"],
        "lora_alpha": lora_alpha,
        "use_rslora": use_rslora,
        "target_modules": names if isinstance(names, str) else sorted(names),
        "layers_to_transform": layers,
    }


def _are_weights_of_maps(parameters: Any, target_modules: Any) -> bool:
    """Whether target_parameters name the weights of linear maps, as `targets.describe` does, and no fused experts."""
    return (
        isinstance(parameters, list)
        and isinstance(target_modules, list)
        and all(isinstance(name, str) and name.endswith(".weight") for name in parameters)
    )


def is_number(value: Any) -> bool:
    """Whether a value from a JSON file is a finite number that a float can hold."""
    return type(value) in (int, float) and abs(value) <= sys.float_info.max


# ---------------------------------------------------------------------- the matrices


def write(
    folder: Path,
    adapter_config: Mapping[str, Any],
    adapters: Mapping[str, tuple[Tensor, Tensor]],
    metadata: Mapping[str, str],
) -> None:
    """Write both files into an empty folder. adapters: (A [R, I], B [O, R]) by path."""
    tensors = {}
    for path, (A, B) in adapters.items():
        tensors[f"{_PREFIX}{path}.lora_A.weight"] = A
        tensors[f"{_PREFIX}{path}.lora_B.weight"] = B
    files.write_tensors(folder / TENSORS_FILE, tensors, metadata)
    files.write_json(folder / CONFIG_FILE, adapter_config)


def read_matrices(folder: Path) -> dict[str, tuple[Tensor, Tensor]]:
    """(A [R, I], B [O, R]) by path.

    Raises:
        ValueError: the file is missing or damaged, or does not hold pairs of LoRA matrices and nothing else.
    """
    path = folder / TENSORS_FILE
    pickled = [file for file in folder.iterdir() if file.suffix in files.PICKLE_SUFFIXES]
    if not path.is_file() and pickled:
        raise ValueError(
            f"{pickled[0]}: pickled weights are never opened, because they can run code; save them as {TENSORS_FILE}"
        )
    sides: dict[str, dict[str, Tensor]] = {}
    for key, tensor in files.read_tensors(files.inside(folder, TENSORS_FILE)).items():
        match = _KEY.fullmatch(key)
        if not match or tensor.dim() != 2:
            raise ValueError(f"{path}: {key} {list(tensor.shape)}: expected a LoRA matrix of a linear map")
        if tensor.dtype not in _DTYPES:
            raise ValueError(
                f"{path}: {key}: expected one of {', '.join(map(_word, _DTYPES))}; got {_word(tensor.dtype)}; save it "
                "in one of these types"
            )
        sides.setdefault(match["path"], {})[match["side"]] = tensor
    halves = [f"{name}.lora_{side}" for name, pair in sides.items() for side in "AB" if side not in pair]
    if halves:
        raise ValueError(f"{path}: {some(halves)}: missing, although the other matrix of the pair is there")
    return {name: (pair["A"], pair["B"]) for name, pair in sides.items()}


def _word(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
