"""`renyi-engine generate`: what every particle and the base answer to a few prompts, with what they think before."""

from __future__ import annotations

from functools import partial

from renyi_engine import base_model
from renyi_engine.data import decode_answer, encode_prompts, left_padded, pad_token_id, stop_tokens
from renyi_engine.ensemble import LoraEnsemble, model_limits
from renyi_engine.evaluation.config import GenerateConfig
from renyi_engine.reports import glossary


def answer(config: GenerateConfig) -> str:
    """The answers as text: each prompt, and under it the answers of each particle and of the base. If the particles
    have unequal weights, the last line says so.

    Raises:
        ValueError: the model or the ensemble cannot be used, or a prompt with its answer exceeds the model's context.
    """
    tokenizer = base_model.load_tokenizer(config)
    ensemble = LoraEnsemble.from_pretrained(base_model.load_model(config), config.ensemble)
    pad = pad_token_id(tokenizer)
    encoded = encode_prompts(tokenizer, config.prompts)
    called = ((f"prompt {number}", ids) for number, ids in enumerate(encoded))
    model_limits.check_fits(ensemble.model, called, "max_new_tokens", config.max_new_tokens)
    input_ids, attention_mask = left_padded(encoded, pad)
    draws = {**config.sampling(), "seed": config.seed}
    stops = stop_tokens(ensemble.model, tokenizer)
    generate = partial(ensemble.generate, input_ids, attention_mask, **draws, eos_token_id=stops, pad_token_id=pad)
    of_particles = generate()
    with ensemble.disable_adapters():
        of_base = generate()
    lines = []
    for number, prompt in enumerate(config.prompts):
        lines.append(_beside("# ", prompt))
        speakers = [*((f"p{k:03d}", tokens) for k, tokens in enumerate(of_particles)), ("base", of_base[0])]
        for name, tokens in speakers:
            texts = (decode_answer(tokenizer, encoded[number], said) for said in tokens[number].tolist())
            lines += [_beside(f"{name}: ", text.strip()) for text in texts]
    if unequal := glossary.unequal(ensemble.particle_weights.tolist()):
        lines.append(unequal)
    return "\n".join(lines)


def _beside(mark: str, text: str) -> str:
    """`mark`, with all lines of `text` to its right, so that no line of the text looks like another mark."""
    return mark + text.replace("\n", "\n" + " " * len(mark))
