"""Fingerprints tell one base from another. They hold checksums of its weights, and the values of its config that
change its results.

    {"digest": "0c1f38d092ac51e6",
     "config": {"rms_norm_eps": 1e-05, ...},
     "weights": {"model.layers.*.self_attn.q_proj.weight": "92ac51e60c1f38d0", ...}}

A base has the same fingerprint on every device, and in every floating-point type that holds its weights exactly. All
weights are read, on the device where they are. The checksums show accidents. They cannot show forgeries.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from transformers import PreTrainedModel

from renyi_engine.core import files

Fingerprint = Mapping[str, Any]

# values of a config that do not change the log-probabilities of a frozen base
_HARMLESS = (
    "_name_or_path", "_attn_implementation*", "_experts_implementation*", "*_token_id", "*dropout*", "*pdrop*",
    "architectures", "auto_map", "chunk_size_feed_forward", "*dtype", "id2label", "initializer_range", "label2id",
    "num_logits_to_keep", "output_*", "pretraining_tp", "problem_type", "quantization_config", "return_dict",
    "router_aux_loss_coef", "summary_*", "tie_word_embeddings", "transformers_version", "use_cache",
)  # fmt: skip
_BLOCK = 2**18
"""The number of elements that are read at once. The checksums depend on it."""
_QUANTISED, _HALF, _UNKNOWN = "quantised", "float16", "unknown"


def fingerprint(model: PreTrainedModel) -> Fingerprint:
    """The fingerprint of the base `model`, which may carry an ensemble.

    Weights whose names differ only in the number of their layer have one checksum together. It has one of these forms:

        92ac51e60c1f38d0                     of weights that bfloat16 holds exactly
        92ac51e60c1f38d0+07bb30d1a4e2c655    of the weights rounded to bfloat16, and of what the rounding takes away
        float16:92ac51e60c1f38d0+...         the same, of weights that are in float16
        quantised:4f1d2a90b3c871ee           of the codes of quantised weights
        unknown                              the weights cannot be read, as on the device "meta"
    """
    return _with_digest(_config_values(model), _checksums(model))


def is_fingerprint(value: Any) -> bool:
    """Whether a value that was read from a file is a fingerprint, and is not damaged."""
    return (
        isinstance(value, dict)
        and value.keys() == {"digest", "config", "weights"}
        and isinstance(value["config"], dict)
        and isinstance(value["weights"], dict)
        and all(isinstance(checksum, str) for checksum in value["weights"].values())
        and value == _with_digest(value["config"], value["weights"])
    )


@dataclass(frozen=True)
class Difference:
    """What differs between two fingerprints.

    Attributes:
        values: values of the config, as "rms_norm_eps was 1e-06, is 1e-05". A value that only one side has does not
            count, because it may come from another version of transformers.
        weights: names of weights that differ.
        rounded: names of weights that are the same, but which one side holds with fewer digits.
        unknown: names of weights that cannot be compared: one side lacks them or has them quantised.
    """

    values: list[str]
    weights: list[str]
    rounded: list[str]
    unknown: list[str]


def difference(then: Fingerprint, now: Fingerprint) -> Difference:
    """What differs between the fingerprints `then` and `now`, by name."""
    found = Difference([], [], [], [])
    for name, value in then["config"].items():
        if None not in (value, now["config"].get(name)) and value != now["config"][name]:
            found.values.append(f"{name} was {value}, is {now['config'][name]}")
    for name in {**then["weights"], **now["weights"]}:
        a, b = then["weights"].get(name), now["weights"].get(name)
        if a != b:
            _kind_of_difference(found, a, b).append(name)
    return found


def _kind_of_difference(found: Difference, a: str | None, b: str | None) -> list[str]:
    """The list in `found` for weights whose checksums are `a` and `b`."""
    if a is None or b is None or _UNKNOWN in (a, b):
        return found.unknown
    (kind_a, _, a), (kind_b, _, b) = a.rpartition(":"), b.rpartition(":")
    if _QUANTISED in (kind_a, kind_b):
        return found.unknown
    (rounded_a, _, rest_a), (rounded_b, _, rest_b) = a.partition("+"), b.partition("+")
    if rounded_a == rounded_b and (rest_a == rest_b or not rest_a or not rest_b):
        return found.rounded
    # weights that were rounded to float16 first may round to other values in bfloat16
    return found.weights if kind_a == kind_b else found.unknown


def _with_digest(config: Mapping[str, Any], weights: Mapping[str, str]) -> dict[str, Any]:
    return {"digest": _short([config, weights]), "config": config, "weights": weights}


# ---------------------------------------------------------------------- the config


def _config_values(model: PreTrainedModel) -> dict[str, Any]:
    values = json.loads(json.dumps(model.config.get_text_config().to_dict(), default=str))
    relevant = {k: v for k, v in values.items() if not any(fnmatchcase(k, pattern) for pattern in _HARMLESS)}
    return _flat(relevant)


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in values.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return flat


# ---------------------------------------------------------------------- the weights


@torch.no_grad()
def _checksums(model: PreTrainedModel) -> dict[str, str]:
    groups: dict[str, dict[str, Any]] = {}
    for name, tensor in model.state_dict().items():
        groups.setdefault(re.sub(r"\d+", "*", name), {})[name] = tensor
    return {name: _of_group(tensors) for name, tensors in groups.items()}


def _of_group(group: Mapping[str, Any]) -> str:
    if not all(isinstance(tensor, Tensor) and tensor.device.type != "meta" for tensor in group.values()):
        return _UNKNOWN
    names = [f"{name}{list(tensor.shape)}" for name, tensor in group.items()]
    if not all(map(_is_plain, group.values())):
        return f"{_QUANTISED}:{_short([names, [_sum_of_codes(tensor) for tensor in group.values()]])}"
    kind = f"{_HALF}:" * any(tensor.dtype == torch.float16 for tensor in group.values())
    rounded, rests = zip(*map(_sums_of_values, group.values()), strict=True)
    return f"{kind}{_short([names, rounded])}" + f"+{_short(rests)}" * any(rests)


def _is_plain(tensor: Tensor) -> bool:
    """Whether the numbers in `tensor` are the weights. Numbers of one byte are codes, of whatever type they are."""
    return tensor.is_floating_point() and tensor.itemsize > 1 and not is_traceable_wrapper_subclass(tensor)


def _sums_of_values(tensor: Tensor) -> tuple[int, int]:
    """(checksum of the values rounded to bfloat16, checksum of what the rounding takes away; 0 if it takes nothing)"""
    rounded, rests = [], []
    for block in tensor.detach().flatten().split(_BLOCK):
        near = block.to(torch.bfloat16)
        rounded.append(_sum(near))
        if block.dtype != torch.bfloat16:
            rests.append(_sum((block.float() - near.float()).nan_to_num_()))
    return _as_one(rounded), _as_one(rests)


def _sum_of_codes(tensor: Tensor) -> Any:
    if is_traceable_wrapper_subclass(tensor):  # a tensor of torchao is made of other tensors
        return [_sum_of_codes(getattr(tensor, name)) for name in tensor.__tensor_flatten__()[0]]
    return _as_one([_sum(block) for block in tensor.detach().flatten().split(_BLOCK)])


def _sum(block: Tensor) -> Tensor:
    """The sum of the elements' bits, read as whole numbers, each times an odd number that belongs to its place. It is
    taken modulo 2^64, so the order of the additions does not matter."""
    integers = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    return (block.view(integers[block.itemsize]) * _multipliers(block.device)[: len(block)]).sum()


def _as_one(sums: Sequence[Tensor]) -> int:
    total = 0
    if sums:
        for part in torch.stack(list(sums)).tolist():
            total = (total * 0x9E3779B97F4A7C15 + part) % 2**64
    return total


@cache
def _multipliers(device: torch.device) -> Tensor:
    numbers = torch.arange(1, _BLOCK + 1, dtype=torch.int64)
    for factor, shift in ((-7046029254386353131, 29), (-4658895280553007687, 32)):
        numbers = numbers * factor
        numbers ^= numbers >> shift
    return (numbers | 1).to(device)


def _short(value: Any) -> str:
    return files.sha256_of_json(value)[:16]
