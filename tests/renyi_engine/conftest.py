"""Tiny random decoders of every architecture, and PEFT as the truth that an ensemble is held to.

Layout: K particles, B sequences, T tokens, V vocabulary.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

VOCAB = 97
LLAMA_LIKE = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    # far from uniform predictions: a test on nearly equal logits would notice nothing
    "initializer_range": 0.3,
    "attention_dropout": 0.0,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "llama": LLAMA_LIKE,
    "qwen2": LLAMA_LIKE | {"tie_word_embeddings": True},
    "phi3": LLAMA_LIKE | {"resid_pdrop": 0.0, "embd_pdrop": 0.0},
    "nemotron": LLAMA_LIKE,
    "mistral": LLAMA_LIKE,
    "qwen3": LLAMA_LIKE | {"head_dim": 16},
    "gemma2": LLAMA_LIKE
    | {
        "head_dim": 16,
        "query_pre_attn_scalar": 16,
        "sliding_window": 3,
        "attn_logit_softcapping": 2.0,
        "final_logit_softcapping": 5.0,
        "attn_implementation": "eager",
        # large enough logits for both soft caps to bend them
        "initializer_range": 0.5,
    },
    "gpt2": {
        "vocab_size": VOCAB,
        "n_embd": 32,
        "n_layer": 3,
        "n_head": 4,
        "n_positions": 64,
        "initializer_range": 0.3,
        "resid_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "attn_pdrop": 0.0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    },
    # positions go to each layer, and the head has a bias
    "gptj": {
        "vocab_size": VOCAB,
        "n_embd": 32,
        "n_layer": 3,
        "n_head": 4,
        "n_positions": 64,
        "rotary_dim": 4,
        "initializer_range": 0.3,
        "resid_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "attn_pdrop": 0.0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    },
    "granite": LLAMA_LIKE
    | {
        "logits_scaling": 0.7,
        "residual_multiplier": 0.7,
        "embedding_multiplier": 3.0,
        "attention_multiplier": 0.4,
    },
    "cohere": LLAMA_LIKE | {"logit_scale": 1.5},
    # clamps its projections in place
    "olmo": LLAMA_LIKE | {"clip_qkv": 0.1},
}


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tiny_model() -> Callable[..., PreTrainedModel]:
    """tiny_model(architecture, seed=0, dtype=torch.float32, **config): a new random 3-layer model, in eval mode."""

    def build(
        architecture: str, *, seed: int = 0, dtype: torch.dtype = torch.float32, **overrides: Any
    ) -> PreTrainedModel:
        options = ARCHITECTURES[architecture] | overrides
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            model = AutoModelForCausalLM.from_config(AutoConfig.for_model(architecture, **options))
            # norms and biases start as ones and zeros, which would hide an error in their use
            with torch.no_grad():
                for parameter in model.parameters():
                    if parameter.dim() == 1:
                        parameter.add_(0.2 * torch.randn_like(parameter))
        return model.to(dtype).eval()

    return build


@pytest.fixture(scope="session")
def make_batch() -> Callable[..., dict[str, Tensor]]:
    """make_batch(lengths, padding="right", prompt=2, seed=0): random tokens; prompt and padding carry no label."""

    def build(lengths: Sequence[int], *, padding: str = "right", prompt: int = 2, seed: int = 0) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(seed)
        width = max(lengths)
        batch = {
            "input_ids": torch.zeros(len(lengths), width, dtype=torch.int64),
            "attention_mask": torch.zeros(len(lengths), width, dtype=torch.int64),
            "labels": torch.full((len(lengths), width), -100),
        }
        for row, length in enumerate(lengths):
            tokens = torch.randint(3, VOCAB, (length,), generator=generator)
            start = width - length if padding == "left" else 0
            batch["input_ids"][row, start : start + length] = tokens
            batch["attention_mask"][row, start : start + length] = 1
            batch["labels"][row, start + prompt : start + length] = tokens[prompt:]
        return batch

    return build


@pytest.fixture(scope="session")
def naive_logprob() -> Callable[[Any, Mapping[str, Tensor]], Tensor]:
    """naive_logprob(model, batch) -> [B]: each sequence alone and unpadded, plain log-softmax of the model's logits."""

    def compute(model: Any, batch: Mapping[str, Tensor]) -> Tensor:
        sums = []
        for ids, mask, labels in zip(batch["input_ids"], batch["attention_mask"], batch["labels"], strict=True):
            ids, labels = ids[mask.bool()], labels[mask.bool()]
            logp = torch.log_softmax(model(input_ids=ids[None]).logits[0], -1)
            counted = labels[1:] != -100
            sums.append(logp[:-1][counted, labels[1:][counted]].sum())
        return torch.stack(sums)

    return compute


@pytest.fixture(scope="session")
def load_peft() -> Callable[..., PeftModel]:
    """load_peft(base, folder, is_trainable=False): PEFT's own adapter on a copy of the bare base."""

    def load(base: PreTrainedModel, folder: Path, *, is_trainable: bool = False) -> PeftModel:
        return PeftModel.from_pretrained(copy.deepcopy(base), folder, is_trainable=is_trainable).eval()

    return load
