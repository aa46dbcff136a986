"""Particles share an optimizer and nothing else. K particles."""

from __future__ import annotations

import copy

import pytest
import torch

from renyi_engine.training.particle_optim import clip_grad_norms_, grad_norms, step_healthy

K = 4


def parameters(seed: int = 0) -> list[torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.nn.Parameter(torch.randn(K, *shape, generator=generator)) for shape in ((3, 5), (7, 2))]


def give_gradients(params, seed: int, scale: float = 1.0) -> None:
    generator = torch.Generator().manual_seed(100 + seed)
    for p in params:
        p.grad = scale * torch.randn(p.shape, generator=generator)


def state_of(optimizer, params, particle):
    moments = [[v[particle].clone() for v in optimizer.state[p].values() if v.shape == p.shape] for p in params]
    return [p[particle].detach().clone() for p in params], moments


def adamw(params):
    return torch.optim.AdamW(params, lr=0.1, weight_decay=0.3, fused=True)


@pytest.mark.parametrize("max_norm", [0.5, 3.0, 100.0])
def test_clipping_is_torchs_for_each_particle_by_itself(max_norm):
    params = parameters()
    give_gradients(params, 0)
    for p in params:  # one loud particle
        p.grad[2] *= 1000
    alone = [[torch.nn.Parameter(p[k].detach().clone()) for p in params] for k in range(K)]
    norms = []
    for k, mine in enumerate(alone):
        for p, q in zip(params, mine, strict=True):
            q.grad = p.grad[k].clone()
        norms.append(torch.nn.utils.clip_grad_norm_(mine, max_norm))
    ours = grad_norms(params)
    torch.testing.assert_close(ours, torch.stack(norms))
    clip_grad_norms_(params, ours, max_norm)
    for k, mine in enumerate(alone):
        for p, q in zip(params, mine, strict=True):
            torch.testing.assert_close(p.grad[k], q.grad)


def test_a_maximum_of_zero_clips_nothing():
    params = parameters()
    give_gradients(params, 0)
    before = [p.grad.clone() for p in params]
    clip_grad_norms_(params, grad_norms(params), 0.0)
    assert all(torch.equal(p.grad, g) for p, g in zip(params, before, strict=True))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("healthy_steps_before", [0, 2])
def test_a_sick_particle_keeps_all_it_had_and_the_others_do_not_notice(bad, healthy_steps_before):
    params = parameters()
    optimizer = adamw(params)
    for step in range(healthy_steps_before):
        give_gradients(params, step)
        step_healthy(optimizer, torch.ones(K, dtype=torch.bool))
    undisturbed = copy.deepcopy(params)
    other = adamw(undisturbed)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))

    give_gradients(params, 50)
    give_gradients(undisturbed, 50)
    params[0].grad[1, 2, 3] = bad
    norms = grad_norms(params)
    values, moments = state_of(optimizer, params, 1)
    clip_grad_norms_(params, norms, 1.0)
    clip_grad_norms_(undisturbed, grad_norms(undisturbed), 1.0)
    assert norms.isfinite().tolist() == [True, False, True, True]
    step_healthy(optimizer, norms.isfinite())
    other.step()

    for k in (0, 2, 3):
        (ours, our_moments), (theirs, their_moments) = state_of(optimizer, params, k), state_of(other, undisturbed, k)
        assert all(map(torch.equal, ours, theirs))
        assert all(
            torch.equal(a, b)
            for x, y in zip(our_moments, their_moments, strict=True)
            for a, b in zip(x, y, strict=True)
        )
    after_values, after_moments = state_of(optimizer, params, 1)
    assert all(map(torch.equal, values, after_values))
    expected = moments if healthy_steps_before else [[torch.zeros_like(p[1])] * 2 for p in params]
    assert all(
        torch.equal(a, b) for x, y in zip(expected, after_moments, strict=True) for a, b in zip(x, y, strict=True)
    )


@pytest.mark.parametrize("healthy_steps_before", [0, 2])
def test_a_step_at_which_all_are_sick_is_none(healthy_steps_before):
    params = parameters()
    optimizer = adamw(params)
    for step in range(healthy_steps_before):
        give_gradients(params, step)
        step_healthy(optimizer, torch.ones(K, dtype=torch.bool))
    before = copy.deepcopy((params, optimizer.state_dict()["state"]))
    give_gradients(params, 50)
    step_healthy(optimizer, torch.zeros(K, dtype=torch.bool))
    assert str(before) == str((params, optimizer.state_dict()["state"]))
