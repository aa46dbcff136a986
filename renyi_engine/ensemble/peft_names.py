"""How PEFT reads the names in an adapter folder. PEFT need not be installed for this.

PEFT finds the maps of an adapter by their names, among all modules of the base. Before that it rewrites names. In
mixtures of experts that transformers 5 has fused, it thinks that every `gate_proj`, wherever it stands, is a part of
the fused parameter. And it renames the keys of the tensors as transformers does when it reads old checkpoints.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable

from torch import nn
from transformers import PreTrainedModel, conversion_mapping
from transformers.core_model_loading import WeightRenaming, rename_source_key

_OF_EXPERTS = {
    "mixtral": {"gate", "w1", "w2", "w3"},
    "qwen2_moe": {"gate", "gate_proj", "up_proj", "down_proj"},
}
"""The names that PEFT (0.21, `_MOE_TARGET_MODULE_MAPPING`) takes for fused experts, by the kind of checkpoint."""

_MAMBA = {"falcon_h1", "falcon_mamba", "mamba", "mamba2", "nemotron_h"}
"""Model types in which PEFT (0.21) adapts no map with the name `out_proj`: their fast kernels do not call it."""


def matches(model: nn.Module, names: Collection[str], layers: Collection[int] | None) -> set[str]:
    """The paths of the modules that PEFT adapts for these target_modules and layers_to_transform."""
    endings = tuple(f".{name}" for name in names)
    matched = set()
    for path, _ in model.named_modules():
        number = re.match(r".*?\.[^.]*\.(\d+)\.", path)
        in_layers = layers is None or (number is not None and int(number[1]) in layers)
        if path in names or (path.endswith(endings) and in_layers):
            matched.add(path)
    return matched


def named_as_experts(model: PreTrainedModel, path: str) -> bool:
    """Whether PEFT takes the last name of this path for that of fused experts. Such a map can be named by its weight,
    in target_parameters: PEFT does not rewrite these."""
    model_type = model.config.model_type
    kind = "mixtral" if model_type == "mixtral" else conversion_mapping._MODEL_TO_CONVERSION_PATTERN.get(model_type)
    return path.rsplit(".", 1)[-1] in _OF_EXPERTS.get(kind, ())


def refused(model: PreTrainedModel, paths: Iterable[str]) -> list[str]:
    """The paths of maps that PEFT refuses to adapt, or whose tensors it does not find when it loads the adapter."""
    model_type = model.config.model_type
    renamings = []
    if conversion_mapping.get_checkpoint_conversion_mapping(model_type) is not None:
        transforms = conversion_mapping.get_model_conversion_mapping(model)
        renamings = [transform for transform in transforms if isinstance(transform, WeightRenaming)]

    def is_refused(path: str) -> bool:
        key = f"{path}.lora_A.weight"
        # if a renaming changes only the beginning of a name, PEFT undoes it
        found = f"base_model.model.{key}".endswith(rename_source_key(key, renamings, [])[0])
        return not found or (model_type in _MAMBA and path.endswith(".out_proj"))

    return [path for path in paths if is_refused(path)]
