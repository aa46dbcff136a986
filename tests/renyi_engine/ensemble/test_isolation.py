"""Particles do not touch each other: neither their bits, nor by NaN, nor through examples without mass.

Layout: K particles, B sequences.
"""

from __future__ import annotations

import pytest
import torch

from renyi_engine.objectives.loss import data_term
from renyi_kernels import renyi_reduce

from .attaching import attach, gradients


@pytest.mark.parametrize("layers", [None, [1, 2]])
def test_equal_particles_share_responsibility_equally(llama, batch, layers):
    ensemble = attach(llama, 4, layers_to_transform=layers)
    with torch.no_grad():
        for parameter in ensemble.parameters():
            parameter.copy_(parameter[:1].expand_as(parameter))
    out = renyi_reduce(ensemble.sequence_logprob(batch), 0.8)
    torch.testing.assert_close(out.responsibilities, torch.full((4, 3), 0.25), rtol=0, atol=1e-5)
    torch.testing.assert_close(out.ess, torch.full((3,), 4.0), rtol=0, atol=1e-4)


@pytest.mark.parametrize("layers", [None, [1, 2]])
def test_permuting_the_particles_permutes_the_results(llama, batch, layers):
    ensemble = attach(llama, 4, layers_to_transform=layers)
    before = ensemble.sequence_logprob(batch)
    assert before.std(0).min() > 1e-3
    order = torch.tensor([2, 0, 3, 1])
    with torch.no_grad():
        for parameter in ensemble.parameters():
            parameter.copy_(parameter[order].clone())
    torch.testing.assert_close(ensemble.sequence_logprob(batch), before[order], rtol=0, atol=1e-5)


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "phi3", "cohere"])
@pytest.mark.parametrize("layers", [None, [1, 2]])
@pytest.mark.parametrize("changed", [0, 1, 3])
def test_changing_a_particle_leaves_the_bits_of_the_others(tiny_model, batch, architecture, layers, changed):
    ensemble = attach(tiny_model(architecture), 4, layers_to_transform=layers)
    others = [k for k in range(4) if k != changed]
    hidden, logp = ensemble(batch["input_ids"], batch["attention_mask"]), ensemble.sequence_logprob(batch)
    with torch.no_grad():
        for parameter in ensemble.parameters():
            parameter[changed] += 0.3
    assert not torch.equal(ensemble.sequence_logprob(batch)[changed], logp[changed])
    assert torch.equal(ensemble.sequence_logprob(batch)[others], logp[others])
    assert torch.equal(ensemble(batch["input_ids"], batch["attention_mask"])[others], hidden[others])


@pytest.mark.parametrize("side", ["A", "B"])
@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
@pytest.mark.parametrize("layers", [None, [1, 2]])
def test_a_nan_particle_leaves_logprobs_and_gradients_of_the_others(tiny_model, batch, architecture, layers, side):
    """Bit for bit those of a run in which the particle is sound, but has given the examples no mass (-inf)."""
    broken, alpha = 1, 0.7
    ensemble = attach(tiny_model(architecture), 4, layers_to_transform=layers)
    logp = ensemble.sequence_logprob(batch)
    sound = torch.arange(4) != broken
    loss, out = data_term(logp.where(sound[:, None], -torch.inf), alpha, 3)
    loss.backward()
    expected = gradients(ensemble)

    ensemble.zero_grad()
    with torch.no_grad():
        getattr(next(iter(ensemble.adapters.values())), side)[broken, 0, 0] = torch.nan
    broken_logp = ensemble.sequence_logprob(batch)
    assert broken_logp[broken].isnan().all()
    assert torch.equal(broken_logp[sound], logp[sound])
    broken_loss, broken_out = data_term(broken_logp, alpha, 3)
    broken_loss.backward()
    assert torch.equal(broken_loss, loss)
    assert torch.equal(broken_out.responsibilities, out.responsibilities)
    assert torch.equal(broken_out.responsibilities[broken], torch.zeros(3))
    for name, gradient in gradients(ensemble).items():
        assert gradient[sound].isfinite().all(), name
        assert torch.equal(gradient[sound], expected[name][sound]), name
        assert gradient[broken].isnan().any(), f"{name}: the broken particle must be seen, to be skipped"


def test_all_particles_nan_is_an_infinite_loss_and_every_particle_is_seen_as_broken(llama, batch):
    ensemble = attach(llama)
    with torch.no_grad():
        for parameter in ensemble.parameters():
            parameter[:, 0, 0] = torch.nan
    loss, out = data_term(ensemble.sequence_logprob(batch), 0.7, 3)
    loss.backward()
    assert torch.isposinf(loss)
    torch.testing.assert_close(out.responsibilities, torch.full((3, 3), 1 / 3))
    assert all(p.grad.isnan().flatten(1).any(1).all() for p in ensemble.parameters())


@pytest.mark.parametrize("alpha", [0.0, 0.7, 1.0])
def test_examples_that_no_particle_gives_mass_do_not_touch_the_others(llama, batch, alpha):
    ensemble = attach(llama)
    impossible = torch.tensor([False, True, False])
    data_term(ensemble.sequence_logprob(batch)[:, ~impossible], alpha, 3)[0].backward()
    expected = gradients(ensemble)
    ensemble.zero_grad()
    loss, out = data_term(ensemble.sequence_logprob(batch).where(~impossible, -torch.inf), alpha, 3)
    loss.backward()
    assert torch.equal(torch.isposinf(out.loss), impossible)
    for name, gradient in gradients(ensemble).items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-5, atol=1e-7)
