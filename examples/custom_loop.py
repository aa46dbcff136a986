"""Trains an ensemble in a loop of your own, in plain PyTorch, without the trainer.

    python examples/custom_loop.py MODEL_FOLDER

Two people answer every question: one says Yes, the other says No. With alpha = 0.8 the particles can take sides.
"""

from __future__ import annotations

import sys

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from renyi_engine import EnsembleConfig, LoraEnsemble
from renyi_kernels import renyi_reduce

ALPHA = 0.8
QUESTIONS = [f"Should the {place} open on {day}?" for place in ("bank", "zoo") for day in ("Sunday", "Monday")]


def make_batch(tokenizer) -> dict[str, torch.Tensor]:
    """input_ids, attention_mask and labels, padded on the right. Labels are -100 on the prompt and on the padding."""
    rows = []
    for question in QUESTIONS:
        prompt = tokenizer(question)["input_ids"]
        rows += [(prompt, tokenizer(f" {answer}")["input_ids"]) for answer in ("Yes", "No")]
    length = max(len(prompt) + len(answer) for prompt, answer in rows)
    batch = {"input_ids": [], "attention_mask": [], "labels": []}
    for prompt, answer in rows:
        padding = length - len(prompt) - len(answer)
        batch["input_ids"].append(prompt + answer + [0] * padding)
        batch["attention_mask"].append([1] * (length - padding) + [0] * padding)
        batch["labels"].append([-100] * len(prompt) + answer + [-100] * padding)
    return {name: torch.tensor(values) for name, values in batch.items()}


def main(model_folder: str, num_steps: int = 10) -> None:
    model = AutoModelForCausalLM.from_pretrained(model_folder)
    ensemble = LoraEnsemble.attach(model, EnsembleConfig(num_particles=4, target_modules=["q_proj", "v_proj"]))
    optimizer = torch.optim.AdamW(ensemble.parameters(), lr=1e-3)
    batch = make_batch(AutoTokenizer.from_pretrained(model_folder))
    for step in range(num_steps):
        out = renyi_reduce(ensemble.sequence_logprob(batch), ALPHA)  # [K, B] -> loss [B], responsibilities [K, B]
        optimizer.zero_grad()
        out.loss.mean().backward()
        optimizer.step()
        print(f"step {step}  loss {out.loss.mean():.3f} nats  ESS {out.ess.mean():.2f}")
    ensemble.save_pretrained("runs/custom_loop", alpha=ALPHA)


if __name__ == "__main__":
    main(sys.argv[1])
