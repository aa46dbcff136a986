"""The objective of a step through the ensemble: PEFT gives each particle's s and its gradient, plain formulas the rest.

Layout: K particles, B sequences.
"""

from __future__ import annotations

import json
import math

import pytest
import torch
from transformers import AutoModelForCausalLM

from renyi_engine import LoraEnsemble
from renyi_engine.data.batches import collate
from renyi_engine.ensemble.lora_ensemble import sum_tokens
from renyi_engine.objectives.loss import data_term
from renyi_engine.objectives.sft import SftTask
from renyi_engine.training import train
from renyi_engine.training.train_step import train_step

from ..apart import attach_apart

K = 3


@pytest.fixture
def ensemble(model_folder):
    """Particles apart from each other and from the base, on a model in fp64."""
    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float64)
    return attach_apart(model, num_particles=K, rank=2, lora_alpha=3, seed=7)


@pytest.fixture
def particles(ensemble, model_folder, load_peft, tmp_path):
    """The same particles, each a PEFT model of its own."""
    ensemble.save_pretrained(tmp_path / "particles")
    base = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float64)
    return [load_peft(base, tmp_path / "particles" / f"p{k:03d}", is_trainable=True) for k in range(K)]


@pytest.fixture
def batches(tokenizer):
    """Micro-batches of 2 and 3 sequences, of uneven lengths."""
    task = SftTask(tokenizer, 64)
    rows = [{"prompt": f"q{i}? ", "completion": "yes" * (1 + i % 3)} for i in range(5)]
    examples = [task.example(number, row) for number, row in enumerate(rows)]
    return [collate(part, task.pad_token_id) for part in (examples[:2], examples[2:])]


def adapters(ensemble, particles):
    """(stacked parameter [K, ...], PEFT's K parameters) of every A and B."""
    for path, pair in ensemble.stacked().items():
        loras = [particle.base_model.model.get_submodule(path) for particle in particles]
        yield pair[0], [lora.lora_A["default"].weight for lora in loras]
        yield pair[1], [lora.lora_B["default"].weight for lora in loras]


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.7])
def test_a_particles_gradient_is_its_own_of_each_example_times_its_responsibility(
    alpha, ensemble, particles, batches, naive_logprob
):
    batch = batches[1]
    s = torch.stack([naive_logprob(particle, batch) for particle in particles])
    r = torch.softmax(alpha * s.detach(), dim=0)
    assert alpha == 0 or (r.amax(dim=0) - r.amin(dim=0) > 0.05).all(), "the routing is too even to test anything"
    (-(r * s).sum() / 7).backward()  # (21) of a batch of 7
    loss, out = data_term(ensemble.sequence_logprob(batch), alpha, 7)
    loss.backward()
    torch.testing.assert_close(out.logp.double(), s.detach(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(out.responsibilities.double(), r, rtol=1e-4, atol=1e-5)
    for ours, theirs in adapters(ensemble, particles):
        expected = torch.stack([p.grad for p in theirs])
        torch.testing.assert_close(ours.grad.double(), expected.double(), rtol=1e-4, atol=1e-6)


def flat(ensemble, particles):
    """phi [K, P]: all parameters of each particle."""
    stacked = [torch.stack(theirs).flatten(1) for _, theirs in adapters(ensemble, particles)]
    return torch.cat(stacked, dim=1).double()


@pytest.mark.parametrize(
    ("prior", "bandwidth"), [("none", None), ("potential", None), ("smoothed_kl", 4.0), ("smoothed_kl", None)]
)
def test_a_step_descends_the_objective_of_all_its_micro_batches(
    prior, bandwidth, sft_config, tokenizer, ensemble, particles, batches, naive_logprob
):
    alpha, weight, std, N = 0.6, 40.0, 0.7, 31
    config = sft_config(prior=prior, prior_lambda=weight, prior_std=std, kernel_bandwidth=bandwidth, max_grad_norm=0.0)
    optimizer = torch.optim.AdamW([ensemble.particles.values], lr=0.0)
    step = train_step(ensemble, SftTask(tokenizer, 64), optimizer, batches, alpha, config, N, 5)

    s = torch.stack([torch.cat([naive_logprob(particle, batch) for batch in batches]) for particle in particles])
    loss = -torch.log(torch.exp(alpha * s).mean(dim=0)) / alpha
    phi = flat(ensemble, particles)
    squares = (phi[:, None] - phi[None]).square().sum(dim=-1)
    h2 = bandwidth**2 if bandwidth else torch.pdist(phi.detach()).square().median() / (2 * math.log(K + 1))
    log_pi = -phi.square().sum(dim=1) / (2 * std**2)
    terms = {
        "none": 0 * log_pi,
        "potential": -log_pi,
        "smoothed_kl": torch.exp(-squares / (2 * h2)).mean(dim=1).log() - log_pi,
    }
    term = weight / N * terms[prior].mean()
    (K * (loss.mean() + term)).backward()  # what each particle would have alone: see `train_step`
    torch.testing.assert_close(step.loss.double(), loss.detach(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(step.prior.double(), term.detach(), rtol=1e-5, atol=1e-8)
    for ours, theirs in adapters(ensemble, particles):
        expected = torch.stack([p.grad for p in theirs])
        torch.testing.assert_close(ours.grad.double(), expected.double(), rtol=1e-4, atol=1e-5)


def test_a_run_divides_its_prior_by_the_number_of_its_training_examples(sft_config, model_folder):
    config = sft_config(prior="potential", prior_lambda=3.0, prior_std=0.5, max_steps=1)
    run = train(config).output_dir
    fresh = LoraEnsemble.attach(AutoModelForCausalLM.from_pretrained(model_folder), config.ensemble_config())
    squares = sum(p.detach().square().sum() for p in fresh.parameters()).item()
    first = json.loads((run / "metrics.jsonl").read_text().splitlines()[0])
    # 22 rows in steps of 4
    assert first["prior_nats"] == pytest.approx(3.0 / 22 * squares / K / (2 * 0.5**2), rel=1e-5)


def test_micro_batches_of_any_size_add_up_to_the_mean_over_the_batch():
    s = -torch.arange(1.0, 15.0, dtype=torch.float64).view(2, 7)
    whole, _ = data_term(s, 0.4, 7)
    parts = [data_term(part, 0.4, 7)[0] for part in s.split([1, 4, 2], dim=1)]
    torch.testing.assert_close(sum(parts), whole)
    torch.testing.assert_close(whole, (-torch.log(torch.exp(0.4 * s).mean(dim=0)) / 0.4).mean())


def test_tokens_are_summed_not_averaged():
    token_logp = torch.tensor([[[-1.0, -2.0, 0.0]], [[-0.5, 0.0, 0.0]]])
    assert sum_tokens(token_logp).tolist() == [[-3.0], [-0.5]]
