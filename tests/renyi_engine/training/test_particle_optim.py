"""Particles share an optimizer and nothing else. K particles, P numbers of one particle."""

from __future__ import annotations

import copy

import pytest
import torch

from renyi_engine.training.particle_optim import clip_grad_norms_, step_healthy

K, P = 4, 29


def matrix(seed: int = 0) -> torch.nn.Parameter:
    generator = torch.Generator().manual_seed(seed)
    return torch.nn.Parameter(torch.randn(K, P, generator=generator))


def give_gradient(values, seed: int, scale: float = 1.0) -> None:
    generator = torch.Generator().manual_seed(100 + seed)
    values.grad = scale * torch.randn(values.shape, generator=generator)


def norms_of(values):
    return torch.linalg.vector_norm(values.grad, dim=1)


def state_of(optimizer, values, particle):
    return [tensor[particle].detach().clone() for tensor in (values, *moments(optimizer, values))]


def moments(optimizer, values):
    state = optimizer.state[values]
    return state["exp_avg"], state["exp_avg_sq"]


def adamw(values):
    return torch.optim.AdamW([values], lr=0.1, weight_decay=0.3, fused=True)


@pytest.mark.parametrize("max_norm", [0.5, 3.0, 100.0])
def test_clipping_is_torchs_for_each_particle_by_itself(max_norm):
    values = matrix()
    give_gradient(values, 0)
    values.grad[2] *= 1000  # one loud particle
    alone = [torch.nn.Parameter(values[k].detach().clone()) for k in range(K)]
    norms = []
    for k, mine in enumerate(alone):
        mine.grad = values.grad[k].clone()
        norms.append(torch.nn.utils.clip_grad_norm_([mine], max_norm))
    ours = norms_of(values)
    torch.testing.assert_close(ours, torch.stack(norms))
    clip_grad_norms_(values.grad, ours, max_norm)
    for k, mine in enumerate(alone):
        torch.testing.assert_close(values.grad[k], mine.grad)


def test_a_maximum_of_zero_clips_nothing():
    values = matrix()
    give_gradient(values, 0)
    before = values.grad.clone()
    clip_grad_norms_(values.grad, norms_of(values), 0.0)
    assert torch.equal(values.grad, before)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("healthy_steps_before", [0, 2])
def test_a_sick_particle_keeps_all_it_had_and_the_others_do_not_notice(bad, healthy_steps_before):
    values = matrix()
    optimizer = adamw(values)
    for step in range(healthy_steps_before):
        give_gradient(values, step)
        step_healthy(optimizer, torch.ones(K, dtype=torch.bool))
    undisturbed = copy.deepcopy(values)
    other = adamw(undisturbed)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))

    give_gradient(values, 50)
    give_gradient(undisturbed, 50)
    values.grad[1, 11] = bad
    norms = norms_of(values)
    before = state_of(optimizer, values, 1) if healthy_steps_before else [values[1].detach().clone()]
    clip_grad_norms_(values.grad, norms, 1.0)
    clip_grad_norms_(undisturbed.grad, norms_of(undisturbed), 1.0)
    assert norms.isfinite().tolist() == [True, False, True, True]
    step_healthy(optimizer, norms.isfinite())
    other.step()

    for k in (0, 2, 3):
        assert all(map(torch.equal, state_of(optimizer, values, k), state_of(other, undisturbed, k)))
    expected = before if healthy_steps_before else [*before, torch.zeros(P), torch.zeros(P)]
    assert all(map(torch.equal, expected, state_of(optimizer, values, 1)))
    assert optimizer.state[values]["step"] == other.state[undisturbed]["step"] == healthy_steps_before + 1


@pytest.mark.parametrize("healthy_steps_before", [0, 2])
def test_a_step_at_which_all_are_sick_is_none(healthy_steps_before):
    values = matrix()
    optimizer = adamw(values)
    for step in range(healthy_steps_before):
        give_gradient(values, step)
        step_healthy(optimizer, torch.ones(K, dtype=torch.bool))
    before = copy.deepcopy((values, optimizer.state_dict()["state"]))
    give_gradient(values, 50)
    step_healthy(optimizer, torch.zeros(K, dtype=torch.bool))
    assert torch.equal(values, before[0])
    if healthy_steps_before:
        assert str(before[1]) == str(optimizer.state_dict()["state"])
    else:  # as if there had been no step
        assert all(torch.equal(moment, torch.zeros(K, P)) for moment in moments(optimizer, values))
        assert optimizer.state[values]["step"] == 0
    # and so the next step is the one that it would have been
    fresh = copy.deepcopy(before[0])
    other = adamw(fresh)
    if healthy_steps_before:
        other.load_state_dict({"state": before[1], "param_groups": other.state_dict()["param_groups"]})
    for stepped, each in ((values, optimizer), (fresh, other)):
        give_gradient(stepped, 51)
        each.step()
    assert torch.equal(values, fresh)


def test_the_learning_rate_may_be_a_tensor_and_gives_the_same_bits():
    """A CPU reads it in fp64, a GPU in fp32."""
    first, second = matrix(), matrix()
    plain, of_tensor = adamw(first), adamw(second)
    rate = torch.zeros((), dtype=torch.float64)
    of_tensor.param_groups[0]["lr"] = rate
    for step in range(30):
        plain.param_groups[0]["lr"] = 1e-2 * (1 - step / 31.7)
        rate.fill_(1e-2 * (1 - step / 31.7))
        for values, optimizer in ((first, plain), (second, of_tensor)):
            give_gradient(values, step)
            step_healthy(optimizer, torch.tensor([True, True, step % 3 > 0, True]))
        assert torch.equal(first, second)
