"""What must hold of an attached ensemble in use, on any architecture: PEFT loads it as it is, and what it generates
has the values of decoding without a cache.

Layout: K particles, B prompts, T tokens, n samples, L new tokens, V vocabulary.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Sequence
from pathlib import Path

import torch
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedModel

from renyi_engine import EnsembleConfig, LoraEnsemble
from renyi_engine.ensemble.generation import draw, uniforms


def attach(
    model: PreTrainedModel, target_modules: str | Sequence[str] = "all-linear", layers: Sequence[int] | None = None
) -> LoraEnsemble:
    """Two particles, far enough apart to say different things."""
    config = EnsembleConfig(2, 2, target_modules=target_modules, layers_to_transform=layers, init="spread", seed=5)
    ensemble = LoraEnsemble.attach(model, config)
    with torch.no_grad():
        for parameter in ensemble.parameters():
            parameter.mul_(3)
    return ensemble


def left_padded(lengths: Sequence[int], seed: int = 4) -> tuple[Tensor, Tensor]:
    """(input_ids, attention_mask) of random prompts."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.zeros(len(lengths), max(lengths), dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for row, length in enumerate(lengths):
        ids[row, -length:] = torch.randint(3, 96, (length,), generator=generator)
        mask[row, -length:] = 1
    return ids, mask


# ---------------------------------------------------------------------- PEFT


@torch.no_grad()
def assert_peft_loads(ensemble: LoraEnsemble, base: PreTrainedModel, folder: Path) -> None:
    """PEFT has our logits, adapts as many maps, misses no tensor and says nothing; and we load again what we saved.

    base: a copy of the bare model.
    """
    ids, _ = left_padded([7, 7])
    ours = ensemble.logits(ensemble(ids))
    ensemble.save_pretrained(folder)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.simplefilter("ignore", FutureWarning)  # of transformers, about its own words
        peft = PeftModel.from_pretrained(copy.deepcopy(base), folder / "p000")
        result = peft.load_adapter(folder / "p001", "p001")
    assert not result.missing_keys
    assert not result.unexpected_keys
    assert sum(path.endswith(".lora_A") for path, _ in peft.named_modules()) == len(ensemble.paths)
    for k, adapter in enumerate(("default", "p001")):
        peft.set_adapter(adapter)
        theirs = peft.eval()(input_ids=ids, use_cache=False).logits
        torch.testing.assert_close(ours[k], theirs, atol=1e-5 * float(theirs.abs().max()), rtol=0)
    assert (ours[0] - ours[1]).abs().max() > 1e-3 * ours.abs().max(), "the particles are too alike to test anything"
    again = LoraEnsemble.from_pretrained(copy.deepcopy(base), folder)
    assert again.paths == ensemble.paths
    torch.testing.assert_close(again.logits(again(ids)), ours, atol=0, rtol=0)


# ---------------------------------------------------------------------- generation


@torch.no_grad()
def one_by_one(
    ensemble: LoraEnsemble, ids: Tensor, mask: Tensor, num_samples: int, max_new_tokens: int, seed: int
) -> Tensor:
    """Every continuation alone, unpadded, its whole sequence read again for each token: [K, B, n, L]."""
    tokens = torch.zeros(ensemble.num_running, len(ids), num_samples, max_new_tokens, dtype=torch.int64)
    for k, b, s in torch.cartesian_prod(*(torch.arange(size) for size in tokens.shape[:3])).tolist():
        sequence = ids[b, mask[b].bool()]
        uniform = uniforms([(seed, k, b, s)], max_new_tokens)
        for step in range(max_new_tokens):
            logits = ensemble.logits(ensemble(sequence[None])[k, 0, -1:])
            tokens[k, b, s, step] = draw(logits, uniform[:, step], 1.0, 1.0)
            sequence = torch.cat([sequence, tokens[k, b, s, step, None]])
    return tokens


def assert_says_what_it_says_one_by_one(
    ensemble: LoraEnsemble, ids: Tensor, mask: Tensor, max_new_tokens: int = 6
) -> None:
    expected = one_by_one(ensemble, ids, mask, 2, max_new_tokens, seed=9)
    options = {"num_samples": 2, "max_new_tokens": max_new_tokens, "eos_token_id": [], "seed": 9}
    assert torch.equal(ensemble.generate(ids, mask, **options), expected)
    rows = expected.flatten(0, 2)
    assert len({tuple(row.tolist()) for row in rows}) > len(rows) / 2, "all say the same: nothing is tested"
