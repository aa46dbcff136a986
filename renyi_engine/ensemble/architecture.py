"""What a model does with its linear maps, its rows and its head. A few tokens are run to find out.

A model that does something unknown is refused here, before anything is trained.

Layout: B sequences, T tokens, D hidden size.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from renyi_engine.core import is_out_of_memory, reason
from renyi_engine.ensemble import targets
from renyi_engine.ensemble.adapted_maps import is_plain
from renyi_engine.ensemble.head import Head
from renyi_engine.ensemble.trunk import LayerArguments, RowDimensions, row_dimensions

LONG, SHORT = 12, 10
"""The numbers of tokens of the two texts that are run. The short text is the beginning of the long one."""


@dataclass(frozen=True)
class Architecture:
    """What the runs have shown.

    Attributes:
        decoder: the part that turns text into final hidden states. head: it turns these into logits.
        inputs: what each linear map was given, by path, in the order of the calls. Maps with the very same tensor read
            the same input.
        torn: paths of maps that are given something else than the rows of whole sequences.
        once: paths of the maps of `inputs` that run once in a forward.
        passed_over: numbers of the layers that do not run on text alone.
        row_dimensions: by layer, see `trunk.row_dimensions`.
        pads_left: whether a text that is padded on the left gets the hidden states that it has without padding.
    """

    decoder: nn.Module
    head: Head
    inputs: dict[str, Tensor]
    torn: set[str]
    once: set[str]
    passed_over: set[int]
    row_dimensions: list[RowDimensions] | None
    pads_left: bool


def observe(model: PreTrainedModel) -> Architecture:
    """Run the bare model on a few tokens.

    Raises:
        ValueError: the model does not run on text alone or is not causal; a weight is not in memory or not finite; a
            map gives no gradient; or the head does something unknown.
    """
    decoder, maps = targets.decoder(model), targets.linear_maps(model)
    _refuse_offloaded(model)
    _refuse_not_finite(model)
    two_texts, three_texts = batches(model)
    two, three = _Recording(model, maps), _Recording(model, maps)
    with _in_eval_mode(model), torch.no_grad():
        with understood(model, "run on text alone"):
            text = decoder(input_ids=three_texts[0][2:], use_cache=False).last_hidden_state[0]
            with three:
                alike = run(decoder, *three_texts)
            with two:
                run(decoder, *two_texts)
        head = Head.of(model, decoder, two_texts[0])
    if not (close(alike[1, :SHORT], text[:SHORT]) and close(alike[2], text)):
        raise ValueError(
            f"model: {type(model).__name__} is not causal: what it says of a token depends on tokens after it; give a "
            "decoder-only language model"
        )
    inputs = {path: x for path, x in two.inputs.items() if _whole_sequences(x, three.inputs.get(path))}
    with _in_eval_mode(model):
        _check_gradients({path: maps[path] for path in inputs}, inputs)
    return Architecture(
        decoder,
        head,
        inputs,
        two.inputs.keys() - inputs.keys(),
        {path for path in inputs if two.counts[path] == 1},
        {number for number, calls in enumerate(two.arguments.calls) if not calls},
        row_dimensions(two.arguments, three.arguments),
        close(alike[0, -SHORT:], text[:SHORT]),
    )


def batches(model: PreTrainedModel) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """(two texts, three texts), each as (input_ids, attention_mask). The three texts are the short text padded on the
    left, the short text padded on the right, and the long text. The two texts are the first and the last of these."""
    ids = ordinary_tokens(model, LONG)
    mask = torch.ones(3, LONG, dtype=torch.int64, device=ids.device)
    mask[0, : LONG - SHORT], mask[1, SHORT:] = 0, 0
    pad = getattr(model.config.get_text_config(), "pad_token_id", None)
    # some models know padding by its token
    input_ids = torch.stack([ids.roll(LONG - SHORT), ids, ids]).masked_fill(mask == 0, 0 if pad is None else pad)
    return (input_ids[::2], mask[::2]), (input_ids, mask)


def run(decoder: nn.Module, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
    """Final hidden states ``[B, T, D]``."""
    hidden: Tensor = decoder(
        input_ids=input_ids, attention_mask=attention_mask, position_ids=positions(attention_mask), use_cache=False
    ).last_hidden_state
    return hidden


def positions(attention_mask: Tensor) -> Tensor:
    """Positions of the tokens. The first real token is at position 0, whether the padding is left or right."""
    return (attention_mask.long().cumsum(-1) - 1).clamp(min=0)


def cache_argument(decoder: nn.Module) -> str:
    """The name of the decoder's argument for a cache."""
    names = inspect.signature(decoder.forward).parameters
    return "cache_params" if "cache_params" in names else "past_key_values"


def close(first: Tensor, second: Tensor) -> bool:
    """Whether hidden states ``[..., D]`` are the same up to rounding. In low precision, rounding can send a token to
    another expert of a mixture; so there the median over the tokens decides."""
    distance = (first - second).float().norm(dim=-1) / (second.float().norm(dim=-1) + 1e-6)
    if second.dtype in (torch.float32, torch.float64):
        return bool((distance < 1e-3).all())
    return bool(distance.median() < 0.1)


def adaptable(
    found: Architecture, maps: Mapping[str, nn.Module], target_modules: str | Sequence[str]
) -> dict[str, nn.Module]:
    """The maps that can be adapted. "all-linear" leaves out layers that do not run on text alone, and maps that no
    layer calls as linear maps.

    Raises:
        ValueError: another map is not called as a linear map, or is not given the rows of whole sequences.
    """
    called = {_place_in_layer(path) for path in found.inputs.keys() | found.torn}
    everything = targets.is_all_linear(target_modules)
    chosen = {}
    for path, linear in maps.items():
        if path in found.inputs:
            chosen[path] = linear
        elif not everything or (_place_in_layer(path) in called and _layer(path) not in found.passed_over):
            reason = (
                "does not give it the rows of whole sequences, as in a mixture of experts"
                if path in found.torn
                else "does not call it as a linear map, so an adapter there would have no effect"
            )
            raise ValueError(f"target_modules: {path} cannot be adapted: the model {reason}; leave it out")
    if not chosen:
        raise ValueError(f"target_modules: {target_modules!r} matches no linear map that the model calls; name others")
    return chosen


def _place_in_layer(path: str) -> str:
    """ "mlp.experts.*.up_proj" of "model.layers.7.mlp.experts.3.up_proj"."""
    return re.sub(r"\d+", "*", re.split(r"\.\d+\.", path, maxsplit=1)[1])


def _layer(path: str) -> int:
    return int(re.split(r"\.(\d+)\.", path, maxsplit=1)[1])


class _Recording:
    """Inside the block, it records the inputs of every linear map and every decoder layer."""

    def __init__(self, model: PreTrainedModel, maps: Mapping[str, nn.Module]) -> None:
        self.inputs: dict[str, Tensor] = {}
        self.counts: dict[str, int] = {}
        self.arguments = LayerArguments(list(targets.decoder_layers(model)[1]))
        self._maps = maps

    def __enter__(self) -> None:
        self.arguments.install()
        self._handles = [m.register_forward_hook(partial(self._record, path)) for path, m in self._maps.items()]

    def __exit__(self, *_: object) -> None:
        self.arguments.remove()
        for handle in self._handles:
            handle.remove()

    def _record(self, path: str, linear: nn.Module, args: tuple, output: Any) -> None:
        num_in, num_out = targets.features(linear)
        # a router may look like a linear map, but it does more than multiply
        if len(args) == 1 and args[0].shape[-1] == num_in and isinstance(output, Tensor):
            if output.shape != (*args[0].shape[:-1], num_out):
                return
            self.inputs[path] = args[0]
            self.counts[path] = self.counts.get(path, 0) + 1


def _whole_sequences(two: Tensor, three: Tensor | None) -> bool:
    """Whether the last text has the same rows in a batch of two texts and in a batch of three."""
    if three is None or two.shape[0] % 2 or three.shape[0] % 3 or two.shape[0] * 3 != three.shape[0] * 2:
        return False
    return close(three.chunk(3)[-1], two.chunk(2)[-1])


def ordinary_tokens(model: PreTrainedModel, number: int) -> Tensor:
    """Token ids that have no special meaning for the model."""
    special = {
        value
        for config in (model.config, model.config.get_text_config())
        for name, value in config.to_dict().items()
        if name.endswith(("_token_id", "_token_index")) and isinstance(value, int)
    }
    embeddings = model.get_input_embeddings()
    ordinary = [i for i in range(3, min(embeddings.weight.shape[0], 200)) if i not in special] or [0]
    return torch.tensor((ordinary * number)[:number], device=embeddings.weight.device)


def _refuse_offloaded(model: PreTrainedModel) -> None:
    missing = [name for name, parameter in model.named_parameters() if parameter.is_meta]
    if missing:
        raise ValueError(
            f"model: {len(missing)} of its weights are not in memory, for example {missing[0]}; perhaps device_map has "
            "left them on the CPU or the disk; load the model where all of it fits"
        )


@torch.no_grad()
def _refuse_not_finite(model: PreTrainedModel) -> None:
    """ValueError if a weight is NaN or infinite. The few tokens that `observe` runs do not reach every weight. Weights
    that are quantised or have one byte are codes; they are not checked."""
    finite = {}
    for name, parameter in model.named_parameters():
        if type(parameter) is nn.Parameter and parameter.is_floating_point() and parameter.itemsize > 1:
            least, most = parameter.flatten().aminmax() if parameter.numel() else (torch.zeros(()), torch.zeros(()))
            finite[name] = least.isfinite() & most.isfinite()
    # this waits for the device once, and not for each weight
    device = next(model.parameters()).device
    known = torch.stack([each.to(device, non_blocking=True) for each in finite.values()]).tolist()
    wrong = [name for name, is_finite in zip(finite, known, strict=True) if not is_finite]
    if wrong:
        dtype = str(model.get_parameter(wrong[0]).dtype).removeprefix("torch.")
        raise ValueError(
            f"model: {len(wrong)} of its weights hold NaN or infinite values, for example {wrong[0]}; its files are "
            f"damaged, or hold numbers that are too large for {dtype}: download it again, or load it in another dtype"
        )


def _check_gradients(maps: Mapping[str, nn.Module], inputs: Mapping[str, Tensor]) -> None:
    """ValueError if a kind of map that is no plain matrix, such as a quantised one, gives a wrong gradient of its
    input. One map of each kind is tried."""
    kinds = {(type(m), type(getattr(m, "weight", None))): path for path, m in maps.items() if not is_plain(m)}
    for path in kinds.values():
        linear, like = maps[path], inputs[path]
        error = _gradient_error(linear, like.dtype, like.device)
        if not error < 0.1:
            raise ValueError(
                f"model: {path} is a {type(linear).__name__}, which gives no gradient of its input, or a wrong one, on "
                f"{like.device.type}; load the model with another quantisation, or with none"
            )


@torch.enable_grad()
def _gradient_error(linear: nn.Module, dtype: torch.dtype, device: torch.device) -> float:
    """The relative error of the gradient g = d <v, W x> / d x. For any e, <g, e> has to be <v, W e>, which the forward
    gives."""
    generator = torch.Generator().manual_seed(0)
    num_in, num_out = targets.features(linear)
    x, e = (torch.randn(8, num_in, generator=generator).to(device, dtype) for _ in range(2))
    v = torch.randn(8, num_out, generator=generator).to(device, dtype)
    y = linear(x.requires_grad_(True))
    if not y.requires_grad:
        return 1.0
    gradient = torch.autograd.grad(y, x, v)[0].double()
    with torch.no_grad():
        product = linear(e).double() - linear(torch.zeros_like(e)).double()
    gap = (v.double() * product).sum(-1) - (gradient * e.double()).sum(-1)
    return float(gap.square().sum().sqrt() / gradient.norm())


@contextmanager
def _in_eval_mode(model: PreTrainedModel) -> Iterator[None]:
    """Inside the block, the model is in evaluation mode. With an ensemble on it, it always is, in training too."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


@contextmanager
def understood(model: PreTrainedModel, what: str) -> Iterator[None]:
    """Inside the block, any error but a lack of memory becomes a ValueError: this model cannot do `what`."""
    try:
        yield
    except Exception as error:
        if is_out_of_memory(error):
            raise
        raise ValueError(
            f"model: {type(model).__name__} cannot {what} ({type(error).__name__}: {reason(error)})"
        ) from error
