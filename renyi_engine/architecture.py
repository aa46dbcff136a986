"""What a model does with its linear maps, its rows and its head: found out by running two tokens when adapters come on.

What is not understood is refused here, before anything is trained. Layout: B sequences, T tokens, D hidden size.
"""

from __future__ import annotations

import inspect
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

if TYPE_CHECKING:
    from renyi_engine.ensemble import LoraEnsemble


def probe(ensemble: LoraEnsemble) -> tuple[dict[str, Tensor], Tensor]:
    """(inputs of the adapted maps by path, the one among them that no particle has touched).

    Maps that are handed the very same tensor read the same input. In the first adapted layer, the one called first
    reads an input that is still the same for every particle. These are facts of the architecture.

    Raises:
        ValueError: an adapted map is never called, or the head does something to its logits that is not understood.
    """
    model = ensemble.model
    inputs: dict[str, Tensor] = {}
    first_maps = set(ensemble.layers[ensemble.first_layer].modules())
    called_first_layer: list[str] = []

    def record(path: str, linear: nn.Module, args: tuple) -> None:
        inputs[path] = args[0]
        if linear in first_maps:
            called_first_layer.append(path)

    handles = [model.get_submodule(p).register_forward_pre_hook(partial(record, p)) for p in ensemble.paths]
    try:
        with torch.no_grad(), ensemble.disable_adapters():
            ids = _two_tokens(ensemble)
            hidden = ensemble(ids)[0]
            logits = model(input_ids=ids, use_cache=False).logits
    finally:
        for handle in handles:
            handle.remove()
    missed = [path for path in ensemble.paths if path not in inputs]
    if missed:
        raise ValueError(
            f"target_modules: {type(model).__name__} computes {missed[0]} (and {len(missed) - 1} more) without "
            "calling the module, so an adapter there would be silently ignored; leave it out"
        )
    _check_head(ensemble, hidden, logits)
    return inputs, inputs[called_first_layer[0]]


def check_rows(ensemble: LoraEnsemble) -> None:
    """ValueError unless the adapted model runs on particles as rows of one batch, padding included."""
    ids = _two_tokens(ensemble).repeat(2, 1)
    padding = torch.tensor([[1, 1], [1, 0]], device=ids.device)
    try:
        with torch.no_grad():
            ensemble(ids, padding)
    except (RuntimeError, ValueError, TypeError) as error:
        raise ValueError(
            f"model: {type(ensemble.model).__name__} cannot run particles as rows of one batch "
            f"({str(error).splitlines()[0]})"
        ) from error


def cache_argument(model: PreTrainedModel) -> str:
    """What the backbone calls the cache that it is given."""
    names = inspect.signature(model.base_model.forward).parameters
    return "cache_params" if "cache_params" in names else "past_key_values"


def _two_tokens(ensemble: LoraEnsemble) -> Tensor:
    return torch.tensor([[0, 1]], device=ensemble.model.get_input_embeddings().weight.device)


def _check_head(ensemble: LoraEnsemble, hidden: Tensor, logits: Tensor) -> None:
    """hidden [B, T, D] and the logits [B, T, V] that the model itself makes of them."""
    labels = torch.zeros(hidden.shape[:-1], dtype=torch.int64, device=hidden.device)
    with torch.no_grad():
        ours = ensemble.label_logprob(hidden, labels)
    theirs = torch.log_softmax(logits.float(), -1)[..., 0]
    tolerance = 1e-3 if hidden.dtype in (torch.float32, torch.float64) else 0.5
    if not torch.allclose(ours.float(), theirs, atol=tolerance, rtol=tolerance):
        raise ValueError(
            f"model: {type(ensemble.model).__name__} transforms its logits in a way that is not understood "
            f"(log-probabilities {ours.flatten().tolist()} instead of {theirs.flatten().tolist()})"
        )
