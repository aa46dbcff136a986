"""One step: it is PEFT's for one particle, and the same however its batch is split."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

import renyi_engine.training.train_step as train_step
from renyi_engine import LoraEnsemble, train
from renyi_engine.data.batches import collate
from renyi_engine.objectives.sft import SftTask

from .runs import (
    loaded,
    metrics,
)

pytestmark = pytest.mark.usefixtures("without_report")


@pytest.mark.parametrize("alpha", [0.0, 0.8, 3.0])
def test_a_step_of_one_particle_is_a_plain_peft_step(sft_config, tokenizer, alpha):
    config = sft_config(num_particles=1, alpha=alpha, max_grad_norm=0.5, weight_decay=0.1, prior="none")
    task = SftTask(tokenizer, 64)
    rows = [{"prompt": f"q{i}", "completion": "a" * (i + 1)} for i in range(5)]
    examples = [task.example(i, row) for i, row in enumerate(rows)]
    batches = [collate(part, 0) for part in (examples[:2], examples[2:])]

    model = AutoModelForCausalLM.from_pretrained(config.model_name_or_path)
    ensemble = LoraEnsemble.attach(model, config.ensemble_config())
    with torch.no_grad():
        for _, B in ensemble.stacked().values():
            B.normal_(0, 0.3, generator=torch.Generator().manual_seed(B.numel()))
    base = AutoModelForCausalLM.from_pretrained(config.model_name_or_path)
    names = {path.rsplit(".", 1)[-1] for path in ensemble.paths}
    peft = get_peft_model(base, LoraConfig(r=config.lora_r, lora_alpha=config.lora_alpha, target_modules=names)).eval()
    weights = {}
    for path, (A, B) in ensemble.stacked().items():
        lora = peft.base_model.model.get_submodule(path)
        lora.lora_A["default"].weight.data.copy_(A[0])
        lora.lora_B["default"].weight.data.copy_(B[0])
        weights[path] = (lora.lora_A["default"].weight, lora.lora_B["default"].weight)

    def adamw(parameters):
        return torch.optim.AdamW(parameters, lr=0.01, weight_decay=0.1)

    optimizer = adamw([ensemble.particles.values])
    result = train_step.train_step(ensemble, task, optimizer, batches, alpha, config, 5, 5)

    trainable = [p for p in peft.parameters() if p.requires_grad]
    losses = []
    for batch in batches:
        logits = peft(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
        labels = batch["labels"][:, 1:]
        token = torch.nn.functional.cross_entropy(logits.mT, labels, reduction="none")
        losses.append(token.sum(dim=1))
    torch.cat(losses).mean().backward()
    norm = torch.nn.utils.clip_grad_norm_(trainable, 0.5)
    torch.testing.assert_close(result.loss, torch.cat(losses), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(result.norms[0], norm, rtol=1e-5, atol=1e-5)
    for path, (A, B) in ensemble.stacked().items():
        for ours, theirs in zip((A, B), weights[path], strict=True):
            torch.testing.assert_close(ours.grad[0], theirs.grad, rtol=1e-5, atol=1e-5)
    # Adam divides by the gradient's size: where that is near 0, rounding decides, so compare where it is not
    adamw(trainable).step()
    for path, (A, B) in ensemble.stacked().items():
        for ours, theirs in zip((A, B), weights[path], strict=True):
            clear = theirs.grad.abs() > 1e-4
            torch.testing.assert_close(ours[0][clear], theirs[clear], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("prior", ["none", "potential"])
@pytest.mark.parametrize(("limit", "epsilon"), [(1.0, 1e-8), (55.0, 1e-8), (55.0, 1.0), (1000.0, 1.0)])
def test_at_alpha_0_three_particles_are_three_trainings_of_one(sft_config, tokenizer, prior, limit, epsilon):
    """Clipped always, at some steps, and never; with an epsilon that asks for the size of a gradient."""
    config = sft_config(
        alpha=0.0, init="spread", prior=prior, prior_lambda=5.0, weight_decay=0.1, max_grad_norm=limit,
        adam_epsilon=epsilon,
    )  # fmt: skip
    task = SftTask(tokenizer, 64)
    examples = [task.example(i, {"prompt": f"{i}: ", "completion": "yes" * (1 + i % 4)}) for i in range(20)]
    parts = [collate(examples[start : start + 2], 0) for start in range(0, 20, 2)]

    def trained(ensemble):
        optimizer = torch.optim.AdamW([ensemble.particles.values], lr=1e-3, eps=epsilon, weight_decay=0.1)
        steps = [
            train_step.train_step(ensemble, task, optimizer, parts[at : at + 2], 0.0, config, 20, 4)
            for at in range(0, 10, 2)
        ]
        return torch.stack([step.norms for step in steps])

    together, _ = loaded(config)
    start = [p.detach().clone() for p in together.parameters()]
    norms = trained(together)
    assert (norms > limit).any() == (limit < 1000)
    assert (norms > limit).all() == (limit < 55)
    for k in range(3):
        alone, _ = loaded(replace(config, num_particles=1))
        with torch.no_grad():
            for p, q in zip(alone.parameters(), start, strict=True):
                p.copy_(q[k : k + 1])
        norms_alone = trained(alone)[:, 0]
        for p, q in zip(together.parameters(), alone.parameters(), strict=True):
            torch.testing.assert_close(p[k], q[0], rtol=0, atol=1e-6)
        torch.testing.assert_close(norms[:, k], norms_alone, rtol=2e-6, atol=0)


def test_the_first_of_several_uncoupled_particles_is_the_one_of_a_run_of_one(sft_config, tmp_path):
    several = sft_config(alpha=0.0, learning_rate=1e-3, weight_decay=0.1, max_grad_norm=40.0, adam_epsilon=1.0)
    ours = train(several).ensemble.stacked()
    theirs = train(replace(several, num_particles=1, output_dir=str(tmp_path / "one"))).ensemble.stacked()
    for path, pair in theirs.items():
        for p, q in zip(ours[path], pair, strict=True):
            torch.testing.assert_close(p[0], q[0], rtol=0, atol=1e-6)
    norms = [[line["grad_norm"][0] for line in metrics(tmp_path / run)[:6]] for run in ("run", "one")]
    assert norms[0] == pytest.approx(norms[1], rel=2e-6)


def test_splitting_a_batch_into_micro_batches_changes_nothing(sft_config, tmp_path):
    whole = sft_config(per_device_train_batch_size=8, max_steps=3)
    parts = sft_config(
        per_device_train_batch_size=2, gradient_accumulation_steps=4, max_steps=3, output_dir=str(tmp_path / "parts")
    )
    ours, theirs = train(whole).ensemble, train(parts).ensemble
    for (_, p), (_, q) in zip(ours.named_parameters(), theirs.named_parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-5)


def test_the_prior_enters_once_a_step_whatever_the_accumulation(sft_config, tokenizer):
    config = sft_config(prior="potential", prior_lambda=50.0, prior_std=0.5, max_grad_norm=0.0)
    task = SftTask(tokenizer, 64)
    examples = [task.example(i, {"prompt": "q", "completion": "a" * (i + 1)}) for i in range(4)]
    gradients = {}
    for prior in ("none", "potential"):
        model = AutoModelForCausalLM.from_pretrained(config.model_name_or_path)
        ensemble = LoraEnsemble.attach(model, replace(config.ensemble_config(), init="spread"))
        before = {name: p.detach().clone() for name, p in ensemble.named_parameters()}
        optimizer = torch.optim.AdamW([ensemble.particles.values], lr=0.0)
        batches = [collate(examples[:2], 0), collate(examples[2:], 0)]
        train_step.train_step(ensemble, task, optimizer, batches, 0.7, replace(config, prior=prior), 40, 4)
        gradients[prior] = {name: p.grad for name, p in ensemble.named_parameters()}
    for name, value in before.items():
        # the gradient of the prior on one particle alone: without the 1/K of the mean over three
        expected = 50.0 / 40 * value / 0.5**2
        torch.testing.assert_close(
            gradients["potential"][name] - gradients["none"][name], expected, rtol=1e-3, atol=1e-5
        )
