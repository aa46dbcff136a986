"""How a model reads the text that it continues: from a cache, or all of it again for every token.

A reader gives the logits of the first new token, and a function that takes the tokens that were drawn and gives the
logits of the tokens after them. A cache is used only if a trial has shown that it gives the same values as reading all
again. A model may ignore the cache that it is given, need a cache of its own class, or take padding into it.

Where work is recorded as CUDA graphs, the cache is one whose memory stays where it is: see `decode_steps`.

Layout: K particles, B prompts, T tokens, n samples, S = K*B*n rows, particle-major, V vocabulary.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Protocol

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from renyi_engine.core import is_out_of_memory, reason
from renyi_engine.ensemble import captured
from renyi_engine.ensemble.adapted_maps import Rows
from renyi_engine.ensemble.decode_steps import Decoder, DecodeSteps, Prompts
from renyi_engine.ensemble.model_limits import changing_positions


class Readable(Decoder, Protocol):
    """What a reader needs of an ensemble. `LoraEnsemble` is the only such class, and it says what these mean."""

    reads_from_cache: bool | None
    decode_steps: DecodeSteps

    def __call__(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor: ...
    @property
    def num_running(self) -> int: ...
    @property
    def num_shared_layers(self) -> int: ...
    def running(self, rows: Rows) -> AbstractContextManager[None]: ...
    def logits(self, hidden: Tensor) -> Tensor: ...


Reading = tuple[Tensor, Callable[[Tensor], Tensor]]
Reader = Callable[[Readable, Tensor, Tensor, int], AbstractContextManager[Reading]]
"""It takes (ensemble, input_ids [B, T], attention_mask [B, T], n), and gives logits [S, V] and a function that takes
tokens [S] and gives logits [S, V], for use inside the block."""

AGREE = {torch.float32: 1e-3, torch.float64: 1e-3}
AGREE_LOW = 0.2
"""How far the log-probabilities of two readings may be apart, by the dtype of the base: in nats, the mean over the
vocabulary by probability. Right caches differ by 1e-5 in fp32 and by less than 0.1 in bf16, wrong ones by 0.3 or more.
"""
_STEPS = 3
"""How many tokens the trial reads after a prompt."""


def readers(ensemble: Readable, lengths: Sequence[int], max_new_tokens: int) -> list[tuple[list[int], Reader]]:
    """Which prompts are read together, and how. `lengths` are the numbers of tokens of the B prompts.

    Raises:
        ValueError: a sequence may become so long that its positions depend on the rest of the batch.
    """
    # the last token is drawn, but nobody reads it
    ends = [length + max_new_tokens - 1 for length in lengths]
    kind, limit = changing_positions(ensemble.model) or ("", max(ends))
    if "dynamic" in kind and max(ends) > limit:
        raise ValueError(
            f"max_new_tokens: a prompt of {max(lengths)} tokens may grow to {max(ends)}, but beyond {limit} tokens the "
            f"rotary positions of {type(ensemble.model).__name__} (rope_type {kind!r}) depend on the whole batch; "
            "ask for fewer tokens, or shorten the prompts"
        )
    cached: Reader = from_cache if _cache_agrees(ensemble) else again
    if cached is from_cache and captured.records(ensemble.particles.values.device) and _fixed_cache_agrees(ensemble):
        cached = partial(from_fixed_cache, max_new_tokens=max_new_tokens)
    # Phi-3 has one kind of positions up to the limit and another beyond it, always for all tokens of a batch
    short = [i for i, end in enumerate(ends) if end <= limit]
    long = [i for i, length in enumerate(lengths) if length > limit]
    crossing = [i for i in range(len(lengths)) if i not in short and i not in long]
    return [(group, read) for group, read in ((short, cached), (long, cached), (crossing, again)) if group]


@contextmanager
def from_cache(ensemble: Readable, input_ids: Tensor, attention_mask: Tensor, num_samples: int) -> Iterator[Reading]:
    """Each particle reads the prompts once, and all of its samples start from what the cache holds then. Layers below
    the first adapted one read the prompts once for all particles."""
    logits, mask, cache, rows = _read_prompts(ensemble, input_ids, attention_mask, num_samples)
    for layer, of_layer in zip(cache.layers, rows, strict=True):
        layer.reorder_cache(of_layer)

    def next_logits(tokens: Tensor) -> Tensor:
        nonlocal mask
        mask = nn.functional.pad(mask, (0, 1), value=1)
        with _own_rows(ensemble):
            return ensemble.next_logits(tokens[:, None], mask, cache)

    yield logits, next_logits


@contextmanager
def from_fixed_cache(
    ensemble: Readable, input_ids: Tensor, attention_mask: Tensor, num_samples: int, max_new_tokens: int
) -> Iterator[Reading]:
    """As `from_cache`, with a cache whose memory stays where it is."""
    with ensemble.decode_steps.alone() as steps:
        prompts = _read_prompts(ensemble, input_ids, attention_mask, num_samples)
        with _own_rows(ensemble):
            yield prompts.logits, steps.after(ensemble, prompts, max_new_tokens)


def _read_prompts(ensemble: Readable, input_ids: Tensor, attention_mask: Tensor, num_samples: int) -> Prompts:
    (B, _), n, device = input_ids.shape, num_samples, input_ids.device
    cache = DynamicCache(config=ensemble.model.config)
    logits = ensemble.next_logits(input_ids, attention_mask, cache)
    of_prompt = torch.arange(B, device=device).repeat_interleave(n).repeat(ensemble.num_running)
    of_particle = torch.arange(ensemble.num_running * B, device=device).repeat_interleave(n)
    shared = ensemble.num_shared_layers
    rows = [of_prompt if index < shared else of_particle for index in range(len(cache.layers))]
    return Prompts(logits[of_particle], attention_mask[of_prompt], cache, rows)


@contextmanager
def again(ensemble: Readable, input_ids: Tensor, attention_mask: Tensor, num_samples: int) -> Iterator[Reading]:
    """Every sequence is read from its first token, without padding and without a cache, one prompt after the other. So
    the model's way with padding and caches does not matter. The work grows by the number of tokens in a sequence."""
    K, n = ensemble.num_running, num_samples
    prompts = [ids[keep] for ids, keep in zip(input_ids, attention_mask.bool(), strict=True)]
    logits = [ensemble.logits(ensemble(prompt[None])[:, :, -1]) for prompt in prompts]
    sequences = [prompt.expand(K * n, -1) for prompt in prompts]

    def next_logits(tokens: Tensor) -> Tensor:
        with _own_rows(ensemble):
            for b, drawn in enumerate(tokens.view(K, -1, n).unbind(1)):
                sequences[b] = torch.cat([sequences[b], drawn.reshape(K * n, 1)], dim=1)
            return torch.stack([ensemble.logits(ensemble(rows)[:, :, -1]) for rows in sequences], 1).flatten(0, 2)

    yield torch.stack([one.expand(K, n, -1) for one in logits], 1).flatten(0, 2), next_logits


def _own_rows(ensemble: Readable) -> AbstractContextManager[None]:
    """Inside the block, every row has tokens of its own."""
    return ensemble.running(Rows.OWN if ensemble.rows is Rows.SHARED else ensemble.rows)


def _cache_agrees(ensemble: Readable) -> bool:
    """Whether the cache gives right values. It is tried once."""
    if ensemble.reads_from_cache is None:
        problem = _problem(ensemble, from_cache)
        ensemble.reads_from_cache = problem is None
        if problem is not None:
            warnings.warn(
                f"{type(ensemble.model).__name__} cannot continue from a cache ({problem}): it reads the whole "
                "sequence again for every new token, which is slow",
                stacklevel=2,
            )
    return ensemble.reads_from_cache


def _fixed_cache_agrees(ensemble: Readable) -> bool:
    """Whether a cache whose memory stays where it is gives right values. It is tried once."""
    with ensemble.decode_steps.alone() as steps:  # what is dropped after the trial is no other thread's
        if steps.usable is None:
            problem = _problem(ensemble, partial(from_fixed_cache, max_new_tokens=_STEPS + 1))
            steps.usable = problem is None
            steps.drop()  # no batch has the shape of the trial
            if problem is not None:
                warnings.warn(
                    f"the decoding of {type(ensemble.model).__name__} is not recorded as CUDA graphs ({problem}): its "
                    "work is ordered one operation after the other, which takes more time",
                    stacklevel=2,
                )
        return steps.usable


def _problem(ensemble: Readable, read: Reader) -> str | None:
    """What is wrong with this reader; None if it gives right values for two short prompts of all particles, one of them
    padded."""
    with ensemble.running(Rows.SHARED):
        whole = _try(ensemble, again)
        try:
            apart = (whole.exp() * (_try(ensemble, read) - whole).abs()).sum(-1).max().item()
        except (RuntimeError, ValueError, TypeError, AttributeError, LookupError) as error:
            if is_out_of_memory(error):
                raise
            # some models take no cache, or only a cache of their own class; what they raise then differs
            return reason(error)
    agrees = apart <= AGREE.get(ensemble.model.dtype, AGREE_LOW)
    return None if agrees else f"log-probabilities would be wrong by {apart:.2g} nats"


def _try(ensemble: Readable, read: Reader) -> Tensor:
    """Log-probabilities ``[steps, S, V]`` of several tokens after a prompt. Some caches go wrong at the second one."""
    embeddings = ensemble.model.get_input_embeddings().weight
    # the first tokens of many vocabularies occur in no text: after these, SmolLM2 in bf16 is nats away from itself in
    # fp32, with a cache or without. A third of the way up stand ordinary ones
    first, device = len(embeddings) // 3, embeddings.device
    ids = first + torch.tensor([[0, 1, 2, 3, 4, 5, 6], [0, 0, 0, 7, 8, 9, 10]], device=device)
    mask = torch.tensor([[1, 1, 1, 1, 1, 1, 1], [0, 0, 0, 1, 1, 1, 1]], device=device)
    with read(ensemble, ids, mask, 2) as (logits, next_logits):
        tokens = torch.arange(len(logits), device=device) % 7 + first
        found = [logits, *(next_logits(tokens + step) for step in range(_STEPS))]
    return torch.stack(found).double().log_softmax(-1)
