"""Which linear maps of a Hugging Face decoder are adapted, and where its layers are.

`target_modules` and `layers_to_transform` mean what they mean in PEFT, with one difference: with "all-linear", PEFT
ignores `layers_to_transform`, but here it is obeyed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from renyi_engine.ensemble import path_patterns, peft_names
from renyi_engine.ensemble.config import ALL_LINEAR


def decoder(model: PreTrainedModel) -> PreTrainedModel:
    """The part that turns text into final hidden states: the innermost model that holds the input embeddings."""
    try:
        embeddings = model.get_input_embeddings()
    except NotImplementedError:  # transformers does not know where this class has its embeddings
        embeddings = None
    holding = [
        module
        for module in model.modules()
        if isinstance(module, PreTrainedModel) and any(part is embeddings for part in module.modules())
    ]
    if len(holding) < 2:
        raise ValueError(
            f"model: {type(model).__name__} has no decoder below its head; give a decoder-only language model"
        )
    return holding[-1]


def decoder_layers(model: PreTrainedModel) -> tuple[str, nn.ModuleList]:
    """(path, layers) of the decoder's list of layers, such as ("model.layers", ...)."""
    part = decoder(model)
    prefix = next(f"{path}." for path, module in model.named_modules() if module is part)
    lists = {prefix + path: module for path, module in part.named_modules() if isinstance(module, nn.ModuleList)}
    outermost = [path for path in lists if not any(path.startswith(f"{other}.") for other in lists)]
    num_layers = part.config.get_text_config().num_hidden_layers
    for path in outermost:
        # some models count a layer with two attentions twice
        if len(lists[path]) == num_layers or (len(outermost) == 1 and num_layers % len(lists[path]) == 0):
            return path, lists[path]
    raise ValueError(
        f"model: {type(model).__name__} has no list of {num_layers} decoder layers; give a decoder-only language model"
    )


def features(linear: nn.Module) -> tuple[int, int]:
    """(in, out) features of a linear map: `nn.Linear`, a quantised map with its attributes, or GPT-2's `Conv1D`."""
    if isinstance(linear, Conv1D):
        return linear.weight.shape[0], linear.weight.shape[1]
    return int(linear.in_features), int(linear.out_features)  # type: ignore[arg-type]


def linear_maps(model: PreTrainedModel) -> dict[str, nn.Module]:
    """Every linear map in the decoder's layers, by path."""
    layers_path, layers = decoder_layers(model)
    return {
        f"{layers_path}.{path}": module
        for path, module in layers.named_modules()
        if isinstance(module, Conv1D) or (hasattr(module, "in_features") and hasattr(module, "out_features"))
    }


def match_targets(
    model: PreTrainedModel,
    target_modules: str | Sequence[str],
    layers_to_transform: Sequence[int] | None,
    *,
    each: bool = True,
) -> dict[str, nn.Module]:
    """The linear maps to adapt, by path, in the model's order.

    Args:
        target_modules: "all-linear" (all that PEFT can load), a regular expression that matches whole paths, or a list
            of names, each a path or its ending.
        layers_to_transform: numbers of decoder layers, from 0 on, or None for all.
        each: every name and every layer has to match something. If False, it is enough that some match, as in PEFT.

    Raises:
        ValueError: nothing matches (the message lists what would), or a name or layer matches nothing; there is no such
            layer; a regular expression takes too long; or PEFT could not load an adapter of a map that is named.
    """
    layers_path, layers = decoder_layers(model)
    if layers_to_transform is not None:
        stray = sorted(set(layers_to_transform) - set(range(len(layers))))
        if stray or not layers_to_transform:
            raise ValueError(f"layers_to_transform: expected layers from 0 to {len(layers) - 1}; got {stray or 'none'}")
    candidates = linear_maps(model)
    matches = _matcher(target_modules)
    matched = {}
    for path, module in candidates.items():
        # as in PEFT, a map that is named by its whole path is taken even if its layer is not among layers_to_transform
        by_path = not isinstance(target_modules, str) and path in target_modules
        in_layers = layers_to_transform is None or layer_index(path, layers_path) in layers_to_transform
        if by_path or (in_layers and matches(path)):
            matched[path] = module
    names = [] if isinstance(target_modules, str) else list(target_modules)
    useless = [name for name in names if not any(path == name or path.endswith(f".{name}") for path in candidates)]
    if not matched or (each and useless):
        wrong = " and ".join(map(repr, useless)) or repr(target_modules)
        endings = sorted({ending(path) for path in candidates})
        where = "" if useless or layers_to_transform is None else f" in layers {sorted(set(layers_to_transform))}"
        raise ValueError(
            f"target_modules: {wrong} matches no linear map of {type(model).__name__}{where}; give {ALL_LINEAR!r} "
            "alone, one regular expression alone for whole paths such as "
            f"{next(iter(candidates), layers_path)!r}, or names from {endings}"
        )
    empty = set(layers_to_transform or ()) - {layer_index(path, layers_path) for path in matched}
    if each and empty:
        raise ValueError(
            f"layers_to_transform: target_modules match no linear map in layers {sorted(empty)}; leave these out, or "
            "name maps that they have"
        )
    unloadable = peft_names.refused(model, matched)
    if unloadable and not is_all_linear(target_modules):
        raise ValueError(
            f"target_modules: PEFT cannot load an adapter of {unloadable[0]} (and {len(unloadable) - 1} more) in "
            f"{type(model).__name__}; leave it out"
        )
    return {path: module for path, module in matched.items() if path not in unloadable}


class AdapterTargets(NamedTuple):
    """The entries of an adapter_config.json by which PEFT adapts certain maps and no others."""

    target_modules: list[str]
    layers_to_transform: list[int] | None
    target_parameters: list[str]


def describe(model: PreTrainedModel, paths: Sequence[str]) -> AdapterTargets:
    """The entries that match `paths` and nothing else: names and layers if they suffice, and else whole paths. A map
    whose name PEFT takes for that of fused experts is named by the path of its weight."""
    layers_path, layers = decoder_layers(model)
    parameters = sorted(f"{path}.weight" for path in paths if peft_names.named_as_experts(model, path))
    modules = {path for path in paths if f"{path}.weight" not in parameters}
    names = sorted({ending(path) for path in modules})
    numbers = sorted({layer_index(path, layers_path) for path in modules})
    where = None if len(numbers) == len(layers) else numbers
    if modules and peft_names.matches(model, names, where) == modules:
        return AdapterTargets(names, where, parameters)
    return AdapterTargets(sorted(modules), None, parameters)


def is_all_linear(target_modules: str | Sequence[str]) -> bool:
    return isinstance(target_modules, str) and target_modules.lower() == ALL_LINEAR


def layer_index(path: str, layers_path: str) -> int:
    """The number of the decoder layer that the map at `path` belongs to."""
    return int(path[len(layers_path) + 1 :].split(".", 1)[0])


def ending(path: str) -> str:
    """The last name of a path: "q_proj" of "model.layers.0.self_attn.q_proj"."""
    return path.rsplit(".", 1)[-1]


def _matcher(target_modules: str | Sequence[str]) -> Callable[[str], bool]:
    """A function that says whether target_modules match a path."""
    if is_all_linear(target_modules):
        return lambda path: True
    if not isinstance(target_modules, str):
        return lambda path: any(path.endswith(f".{name}") for name in target_modules)
    return path_patterns.matcher(target_modules)
