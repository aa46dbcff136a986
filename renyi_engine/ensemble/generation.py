"""Generating text: every continuation is drawn token by token, from random numbers of its own.

Layout: K particles, B prompts, T tokens, n samples, S = K*B*n rows, V vocabulary, L new tokens.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from renyi_engine.core import seeding
from renyi_engine.ensemble import cache, captured
from renyi_engine.ensemble.cache import Readable
from renyi_engine.ensemble.model_limits import num_positions

ASK_EVERY = 16
"""A GPU is asked after so many tokens whether all continuations have ended. While it answers, it has nothing to do."""


@torch.no_grad()
def generate(
    ensemble: Readable,
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    *,
    num_samples: int = 1,
    max_new_tokens: int = 128,
    temperature: float = 1.0,
    top_p: float = 1.0,
    seed: int = 0,
    prompt_ids: Sequence[int] | None = None,
    eos_token_id: int | Sequence[int] | None = None,
    pad_token_id: int | None = None,
) -> Tensor:
    """Every particle continues every prompt `num_samples` times, in one batch. Returns the new tokens,
    ``[K, B, num_samples, L]``, int64.

    Each particle reads a prompt once, and all its samples start from what the model then holds in its cache. Layers
    below the first adapted one read it once for all particles. If the cache of a model gives wrong values, every
    sequence is read again for every token. This is slow, and a warning says so once.

    On a GPU the cache has a fixed size, and the work for one token is recorded as a CUDA graph. Both are kept for later
    calls with as many rows and about as many tokens, until `detach`. Where a model cannot be recorded, a warning says
    so once.

    Args:
        input_ids, attention_mask: ``[B, T]``, padded on the left.
        max_new_tokens: L is at most this number. It is smaller if every continuation stops earlier.
        temperature: divides the logits; 0 takes the most likely token.
        top_p: draw from the smallest set of most likely tokens whose probability reaches this value.
        seed, prompt_ids: sample s of particle k for prompt b depends on (seed, k, prompt_ids[b], s) and, up to
            rounding, on nothing else in the batch. prompt_ids: ``[B]`` whole numbers from 0 on; None means 0 to B - 1.
        eos_token_id: the tokens that end a continuation; the model's own if None. The token that ends it is kept.
        pad_token_id: fills the rest of a continuation that has ended; the first of `eos_token_id` if None.

    Raises:
        ValueError: an argument is out of range; a prompt is padded on the right; no token is known that ends a
            continuation; or a sequence may become so long that its positions depend on the rest of the batch.
    """
    stops = _stop_tokens(ensemble, eos_token_id)
    prompt_ids = range(len(input_ids)) if prompt_ids is None else prompt_ids
    if attention_mask is None:
        attention_mask = torch.ones_like(input_ids)
    _check(input_ids, attention_mask, num_samples, max_new_tokens, temperature, top_p, prompt_ids)
    K, B, n = ensemble.num_running, len(input_ids), num_samples
    device = ensemble.model.get_input_embeddings().weight.device
    names = [(seed, k, p, s) for k in range(K) for p in prompt_ids for s in range(n)]
    uniform = uniforms(names, max_new_tokens).to(device).view(K, B, n, -1)
    # if no token ends a continuation, there is no padding
    padding = next(iter(stops), 0) if pad_token_id is None else pad_token_id
    tokens = torch.full((K, B, n, max_new_tokens), padding, dtype=torch.int64, device=device)
    lengths = attention_mask.sum(-1).tolist()
    # a table of positions may end a few tokens after the last continuation has stopped
    most = num_positions(ensemble.model)
    has_room = most is None or max(lengths) + max_new_tokens - 1 <= most
    ask_every = ASK_EVERY if captured.records(device) and has_room else 1
    longest = 0
    for prompts, read in cache.readers(ensemble, lengths, max_new_tokens):
        mask = attention_mask[prompts]
        start = int(mask.any(0).nonzero()[0])
        draw_step = _drawer(uniform[:, prompts].flatten(0, 2), temperature, top_p)
        ids, mask = input_ids[prompts, start:].to(device), mask[:, start:].to(device)
        with read(ensemble, ids, mask, n) as (logits, next_logits):
            drawn = decode(logits, next_logits, draw_step, max_new_tokens, stops, padding, ask_every)
        length = drawn.shape[-1]
        tokens[:, prompts, :, :length] = drawn.view(K, len(prompts), n, length)
        longest = max(longest, length)
    return tokens[..., :longest]


def uniforms(names: Sequence[Sequence[int]], max_new_tokens: int) -> Tensor:
    """Numbers in [0, 1), ``[S, L]``, fp64. A row depends on its name alone, which is a tuple of whole numbers."""
    rows = [torch.rand(max_new_tokens, generator=seeding.generator(*n), dtype=torch.float64) for n in names]
    return torch.stack(rows)


def draw(logits: Tensor, uniform: Tensor, temperature: float, top_p: float) -> Tensor:
    """One token of each row, ``[S]``, drawn from ``softmax(logits / temperature)`` by inverting the distribution.

    `logits` are [S, V], and `uniform` are [S] in fp64. temperature 0 takes the most likely token. top_p < 1 draws from
    the smallest set of most likely tokens whose probability reaches it (Holtzman et al. 2020, arXiv 1904.09751).
    """
    if temperature == 0:
        return logits.argmax(dim=-1)
    # in fp32 the sum over the vocabulary would not reach 1, and rounding would decide which tokens are in top_p's set
    probability = torch.softmax(logits.double() / temperature, dim=-1)
    order = None
    if top_p < 1:
        probability, order = probability.sort(dim=-1, descending=True, stable=True)
        before = probability.cumsum(dim=-1) - probability
        probability = probability.where(before < top_p, 0.0)
    cumulative = probability.cumsum(dim=-1)
    # the first entry above u times the total; it never has probability zero, because u < 1
    index = torch.searchsorted(cumulative, uniform[:, None] * cumulative[:, -1:], right=True)
    return (index if order is None else order.gather(-1, index)).squeeze(-1)


def _drawer(uniform: Tensor, temperature: float, top_p: float) -> Callable[[Tensor, int], Tensor]:
    """The `draw_step` of `decode` that uses the random numbers [S, L]."""
    return lambda logits, step: draw(logits, uniform[:, step], temperature, top_p)


def decode(
    logits: Tensor,
    next_logits: Callable[[Tensor], Tensor],
    draw_step: Callable[[Tensor, int], Tensor],
    max_new_tokens: int,
    stop_tokens: Sequence[int],
    pad_token_id: int,
    ask_every: int = 1,
) -> Tensor:
    """New tokens ``[S, L]``, L at most `max_new_tokens`. After its stop token, which is kept, a row is padding.

    Args:
        logits: [S, V] of the first new token.
        next_logits: takes tokens [S] and gives the logits [S, V] of the tokens after them.
        draw_step: takes (logits [S, V], step) and gives tokens [S].
        ask_every: after how many tokens the device is asked whether all rows have stopped.
    """
    stops = torch.tensor(list(stop_tokens), dtype=torch.int64, device=logits.device)
    finished = torch.zeros(len(logits), dtype=torch.bool, device=logits.device)
    num_steps = torch.zeros((), dtype=torch.int64, device=logits.device)
    tokens: list[Tensor] = []
    for step in range(max_new_tokens):
        if step:
            logits = next_logits(tokens[-1])
        num_steps += ~finished.all()
        tokens.append(draw_step(logits, step).masked_fill(finished, pad_token_id))
        finished = finished | (tokens[-1][:, None] == stops).any(-1)
        if (step + 1) % ask_every == 0 and finished.all():
            break
    return torch.stack(tokens, dim=1)[:, : int(num_steps)]


def _stop_tokens(ensemble: Readable, eos_token_id: int | Sequence[int] | None) -> list[int]:
    for given in (eos_token_id, getattr(ensemble.model.generation_config, "eos_token_id", None)):
        if given is not None:
            return [given] if isinstance(given, int) else list(given)
    raise ValueError("eos_token_id: the model's generation_config has none; pass the tokens that end a continuation")


def _check(
    input_ids: Tensor,
    attention_mask: Tensor,
    num_samples: int,
    max_new_tokens: int,
    temperature: float,
    top_p: float,
    prompt_ids: Sequence[int],
) -> None:
    if input_ids.dim() != 2 or input_ids.numel() == 0 or attention_mask.shape != input_ids.shape:
        raise ValueError(
            f"input_ids, attention_mask: expected [B, T] each, B and T at least 1; got {list(input_ids.shape)} and "
            f"{list(attention_mask.shape)}"
        )
    if not attention_mask[:, -1].all():
        row = int((attention_mask[:, -1] == 0).nonzero()[0])
        raise ValueError(f"attention_mask: prompt {row} is empty or padded on the right; pad on the left")
    for name, value in (("num_samples", num_samples), ("max_new_tokens", max_new_tokens)):
        if value < 1:
            raise ValueError(f"{name}: expected a whole number of at least 1; got {value!r}")
    if not (math.isfinite(temperature) and temperature >= 0):
        raise ValueError(f"temperature: expected a finite number of at least 0; got {temperature!r}")
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p: expected a number above 0, at most 1; got {top_p!r}")
    if len(prompt_ids) != len(input_ids) or any(p < 0 for p in prompt_ids):
        raise ValueError(f"prompt_ids: expected {len(input_ids)} whole numbers of at least 0; got {list(prompt_ids)}")
