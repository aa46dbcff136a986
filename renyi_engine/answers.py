"""What every particle, and the bare base, answers to a few prompts."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial

from renyi_engine import base_model
from renyi_engine.config import ModelConfig
from renyi_engine.data import left_padded, pad_token_id
from renyi_engine.encoding import encode_prompts
from renyi_engine.ensemble import LoraEnsemble
from renyi_engine.settings import flag, require, require_given


@dataclass
class GenerateConfig(ModelConfig):
    """Settings of `renyi-engine generate`."""

    ensemble: str = flag("", "Folder of particles, as a run writes it (RUN/particles).")
    prompts: list[str] = flag([], "What is asked: a user's turn where the model has a chat template, else plain text.")
    num_samples: int = flag(1, "Answers of each particle to each prompt.")
    max_new_tokens: int = flag(128, "Longest answer in tokens.")
    temperature: float = flag(1.0, "Of the sampling; 0 takes the most likely token.")
    top_p: float = flag(1.0, "Sample from the most likely tokens that make up this much.")
    seed: int = flag(42, "Of the sampling.")

    def __post_init__(self) -> None:
        require_given(self, ("model_name_or_path", "ensemble", "prompts"))
        require(self, ("num_samples", "max_new_tokens"), "a whole number of at least 1", lambda v: v >= 1)
        require(self, ("temperature",), "a finite number of at least 0", lambda v: math.isfinite(v) and v >= 0)
        require(self, ("top_p",), "a number above 0, at most 1", lambda v: 0 < v <= 1)
        require(self, ("seed",), "a whole number from 0 to 2^32 - 1", lambda v: 0 <= v < 2**32)
        for number, prompt in enumerate(self.prompts):
            if not prompt.strip():
                raise ValueError(f"prompts: number {number} is empty")


def answer(config: GenerateConfig) -> str:
    """Every answer under its prompt and its particle, as text."""
    tokenizer = base_model.load_tokenizer(config)
    ensemble = LoraEnsemble.from_pretrained(base_model.load_model(config), config.ensemble)
    pad = pad_token_id(tokenizer)
    input_ids, attention_mask = left_padded(encode_prompts(tokenizer, config.prompts), pad)
    generate = partial(
        ensemble.generate,
        input_ids,
        attention_mask,
        num_samples=config.num_samples,
        max_new_tokens=config.max_new_tokens,
        temperature=config.temperature,
        top_p=config.top_p,
        seed=config.seed,
        pad_token_id=pad,
    )
    of_particles = generate()
    with ensemble.disable_adapters():
        of_base = generate()
    lines = []
    for number, prompt in enumerate(config.prompts):
        lines.append(f"# {prompt}")
        speakers = [*((f"p{k:03d}", tokens) for k, tokens in enumerate(of_particles)), ("base", of_base[0])]
        for name, tokens in speakers:
            texts = tokenizer.batch_decode(tokens[number], skip_special_tokens=True)
            lines += [f"{name}: {text.strip()}" for text in texts]
    return "\n".join(lines)
