"""The A and B of an ensemble are ordinary parameters, though they are views of one matrix.

Whatever a training loop does to parameters is done here, and the next forward must read the new values, also from the
copy that a base in low precision reads. The same loop on tensors of their own is the truth. K particles.
"""

from __future__ import annotations

import copy
import threading

import pytest
import torch
from torch.func import functional_call
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from renyi_engine import EnsembleConfig, LoraEnsemble
from renyi_engine.ensemble.adapted_maps import AdapterGroup
from renyi_engine.ensemble.particle_matrix import ALIGNMENT, ParticleMatrix

from ..apart import attach_apart

K = 3
each_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])


class Special(torch.nn.Linear):
    """A linear map of which nobody knows what its forward does, as of a quantised one."""


def attached(tiny_model, dtype=torch.float32, seed=4, special=False) -> LoraEnsemble:
    model = tiny_model("llama", dtype=dtype)
    for layer in model.model.layers if special else ():
        layer.self_attn.q_proj.__class__ = layer.mlp.down_proj.__class__ = Special
    maps = ["q_proj", "down_proj"] if special else "all-linear"
    return attach_apart(model, num_particles=K, rank=2, seed=seed, target_modules=maps)


def fresh(tiny_model, dtype, values) -> LoraEnsemble:
    """An ensemble that was made with these values: [A, B, A, B, ...], in the order of its parameters."""
    ensemble = attached(tiny_model, dtype)
    pairs = iter([v.detach().clone() for v in values])
    adapters = {path: (next(pairs), next(pairs)) for path in ensemble.paths}
    model = ensemble.detach()
    made = LoraEnsemble(model, ensemble.config, adapters, ensemble._found)
    made._install()
    return made


def loss_of(ensemble, make_batch, seed=0):
    return -ensemble.sequence_logprob(make_batch([6, 8, 5], seed=seed)).mean()


@pytest.fixture
def reads_its_parameters(tiny_model, make_batch):
    """Whether a forward gives what an ensemble gives that was made with the values of the parameters now."""

    def check(ensemble, dtype):
        batch = make_batch([7, 4], seed=9)
        with torch.no_grad():
            found = ensemble.sequence_logprob(batch)
            expected = fresh(tiny_model, dtype, ensemble.parameters()).sequence_logprob(batch)
        assert torch.equal(found, expected)

    return check


def is_whole(ensemble) -> bool:
    """Whether every parameter is a view of the matrix again, in its place."""
    particles = ensemble.particles
    views = [view for pair in particles.named(particles.values.detach()).values() for view in pair]
    return all(
        p.data_ptr() == v.data_ptr() and p.stride() == v.stride() and torch.equal(p, v)
        for p, v in zip(ensemble.parameters(), views, strict=True)
    )


# ---------------------------------------------------------------------- how it is laid out


def test_maps_that_read_one_input_lie_side_by_side_and_blocks_begin_at_multiples(tiny_model):
    ensemble = attached(tiny_model)
    for group, places in zip(ensemble.particles.groups, ensemble.particles._places, strict=True):
        assert all(place.start % ALIGNMENT == 0 for place in (places.block, *places.B))
        with torch.no_grad():
            ensemble.particles.refresh(torch.bfloat16)
        block, copies = group.copies_in(torch.bfloat16)
        assert torch.equal(block, torch.cat([stack.A for stack in group.stacks], dim=1).bfloat16())
        assert all(torch.equal(b, stack.B.bfloat16()) for b, stack in zip(copies, group.stacks, strict=True))
    sizes = sum(p[0].numel() for p in ensemble.parameters())
    assert sizes <= ensemble.particles.values.shape[1]
    assert is_whole(ensemble)


@pytest.mark.parametrize("size", [1e-12, 1.0, 1e12])
def test_the_norms_of_large_particles_lose_no_digits_in_fp32(size):
    """A particle of SmolLM2-135M with adapters of rank 8 on all maps has 2.4 million numbers. Gradients are of very
    different sizes. A plain sum of so many squares in fp32 is off by 2e-4 on a CPU."""
    generator = torch.Generator().manual_seed(3)
    A, B = torch.zeros(K, 8, 200_000), torch.zeros(K, 105_280, 8)
    particles = ParticleMatrix([["map"]], {"map": (A, B)}, torch.device("cpu"))
    particles.zero_gradients()
    particles.gradients.copy_(size * torch.randn(particles.values.shape, generator=generator))
    particles.gradients.mul_(torch.randn(particles.values.shape, generator=generator).mul_(2).exp_())
    assert particles.gradients.shape[1] > 2.4e6
    truth = torch.linalg.vector_norm(particles.gradients.double(), dim=1)
    torch.testing.assert_close(particles.gradient_norms().double(), truth, rtol=1e-6, atol=0)


def test_the_norm_of_a_gradient_that_is_not_finite_is_not_finite(tiny_model):
    particles = attached(tiny_model).particles
    for bad in (torch.nan, torch.inf):
        particles.zero_gradients()
        particles.gradients[1, 77] = bad
        assert particles.gradient_norms().isfinite().tolist() == [True, False, True]


# ---------------------------------------------------------------------- custom loops


def of_their_own(ensemble):
    return [torch.nn.Parameter(p.detach().clone().contiguous()) for p in ensemble.parameters()]


@each_dtype
@pytest.mark.parametrize("set_to_none", [True, False])
@pytest.mark.parametrize("accumulate", [1, 3])
def test_a_plain_training_loop_trains_it(tiny_model, make_batch, reads_its_parameters, dtype, set_to_none, accumulate):
    """AdamW over the parameters, clipping over all of them, and gradients that are summed over micro-batches."""
    ensemble = attached(tiny_model, dtype)
    parameters, own = list(ensemble.parameters()), of_their_own(ensemble)
    settings = {"lr": 0.05, "weight_decay": 0.1}
    ours, theirs = torch.optim.AdamW(parameters, **settings), torch.optim.AdamW(own, **settings)
    for step in range(3):
        ours.zero_grad(set_to_none=set_to_none)
        theirs.zero_grad(set_to_none=set_to_none)
        for part in range(accumulate):
            seed = step * accumulate + part
            loss_of(ensemble, make_batch, seed).backward()
            alone = fresh(tiny_model, dtype, own)
            gradients = torch.autograd.grad(loss_of(alone, make_batch, seed), list(alone.parameters()))
            for p, g in zip(own, gradients, strict=True):
                p.grad = g if p.grad is None else p.grad + g
        norms = [torch.nn.utils.clip_grad_norm_(each, 0.05) for each in (parameters, own)]
        torch.testing.assert_close(*norms, rtol=1e-6, atol=0)
        for p, q in zip(parameters, own, strict=True):
            torch.testing.assert_close(p.grad, q.grad, rtol=1e-6, atol=1e-9)
            q.grad.copy_(p.grad)  # so that rounding does not decide about AdamW's first steps
        ours.step()
        theirs.step()
        assert all(map(torch.equal, parameters, own))
        reads_its_parameters(ensemble, dtype)
    assert is_whole(ensemble)


@each_dtype
def test_gradients_of_our_loop_and_of_a_custom_one_may_follow_each_other(tiny_model, make_batch, dtype):
    ensemble = attached(tiny_model, dtype)
    expected = torch.autograd.grad(loss_of(ensemble, make_batch), list(ensemble.parameters()))
    for _ in range(2):
        ensemble.particles.zero_gradients()
        ensemble.particles.accumulate(loss_of(ensemble, make_batch))
        assert all(map(torch.equal, held_by(ensemble.particles), expected))
        ensemble.zero_grad(set_to_none=True)
        loss_of(ensemble, make_batch).backward()
        assert all(torch.equal(p.grad, g) for p, g in zip(ensemble.parameters(), expected, strict=True))


def held_by(particles):
    return [view for pair in particles.named(particles.gradients).values() for view in pair]


@pytest.fixture
def adds(monkeypatch):
    """Of every group that the ops asked, in order: whether they add to its gradients themselves."""
    asked, ask = [], AdapterGroup.gradients_in_place

    def noting(group):
        places = ask(group)
        asked.append(places is not None)
        return places

    monkeypatch.setattr(AdapterGroup, "gradients_in_place", noting)
    return asked


@each_dtype
def test_our_loop_adds_gradients_without_autograd_to_the_same_sums(tiny_model, make_batch, adds, dtype):
    ensemble = attached(tiny_model, dtype)
    particles, parameters = ensemble.particles, list(ensemble.parameters())
    expected = [torch.autograd.grad(loss_of(ensemble, make_batch, seed), parameters) for seed in (1, 2)]
    assert not any(adds)
    particles.zero_gradients()
    for seed in (1, 2):
        adds.clear()
        particles.accumulate(loss_of(ensemble, make_batch, seed))
        assert adds == [True] * len(particles.groups)
    for found, first, second in zip(held_by(particles), *expected, strict=True):
        torch.testing.assert_close(found, first + second, rtol=1e-5, atol=1e-7)
    assert all(
        p.grad is not None and torch.equal(p.grad, g) for p, g in zip(parameters, held_by(particles), strict=True)
    )


@each_dtype
def test_hooks_of_parameters_are_called_in_our_loop(tiny_model, make_batch, adds, dtype):
    """And once: no gradient is counted twice, be it that of another map of the same group."""
    ensemble = attached(tiny_model, dtype)
    particles, parameters = ensemble.particles, list(ensemble.parameters())
    expected = list(torch.autograd.grad(loss_of(ensemble, make_batch), parameters))
    seen = []
    handles = [
        parameters[0].register_hook(lambda g: seen.append(("before", g.clone())) or 2 * g),
        parameters[-1].register_post_accumulate_grad_hook(lambda p: seen.append(("after", p.grad.clone()))),
    ]
    particles.zero_gradients()
    adds.clear()
    particles.accumulate(loss_of(ensemble, make_batch))
    assert adds.count(False) == 2
    assert sorted(name for name, _ in seen) == ["after", "before"]
    assert torch.equal(dict(seen)["before"], expected[0])
    assert torch.equal(dict(seen)["after"], expected[-1])
    expected[0] = 2 * expected[0]
    assert all(map(torch.equal, held_by(particles), expected))
    for handle in handles:
        handle.remove()
    adds.clear()
    particles.zero_gradients()
    particles.accumulate(loss_of(ensemble, make_batch))
    assert all(adds)


def test_other_backwards_while_ours_runs_give_their_gradients_to_those_who_asked(tiny_model, make_batch):
    """In the middle of our backward: one in the same thread, and one in another."""
    ensemble = attached(tiny_model)
    particles, parameters = ensemble.particles, list(ensemble.parameters())
    expected, others = (torch.autograd.grad(loss_of(ensemble, make_batch, seed), parameters) for seed in (1, 2))
    found = []

    def ask():
        with torch.enable_grad():
            found.append(torch.autograd.grad(loss_of(ensemble, make_batch, 2), parameters))

    def in_the_middle(gradient):
        ask()
        thread = threading.Thread(target=ask)
        thread.start()
        thread.join()

    def listen(layer, args, hidden):
        hidden.register_hook(in_the_middle)

    handle = ensemble.layers[1].register_forward_hook(listen)
    loss = loss_of(ensemble, make_batch, 1)
    handle.remove()
    particles.zero_gradients()
    particles.accumulate(loss)
    assert len(found) == 2
    for each in found:
        assert all(map(torch.equal, each, others))
    assert all(map(torch.equal, held_by(particles), expected))


def test_gradients_that_somebody_put_elsewhere_go_there(tiny_model, make_batch, adds):
    ensemble = attached(tiny_model)
    particles, parameters = ensemble.particles, list(ensemble.parameters())
    expected = torch.autograd.grad(loss_of(ensemble, make_batch), parameters)
    particles.zero_gradients()
    ensemble.zero_grad(set_to_none=True)
    particles.accumulate(loss_of(ensemble, make_batch))
    assert not any(adds)
    assert all(torch.equal(p.grad, e) for p, e in zip(parameters, expected, strict=True))
    assert not particles.gradients.any()


@each_dtype
def test_autograd_grad_gives_what_backward_gives(tiny_model, make_batch, dtype):
    ensemble = attached(tiny_model, dtype)
    found = torch.autograd.grad(loss_of(ensemble, make_batch), list(ensemble.parameters()))
    loss_of(ensemble, make_batch).backward()
    assert all(torch.equal(p.grad, g) and g.any() for p, g in zip(ensemble.parameters(), found, strict=True))


@each_dtype
def test_the_base_reads_what_is_changed_in_place(tiny_model, reads_its_parameters, dtype):
    ensemble = attached(tiny_model, dtype)
    with torch.no_grad():
        for number, p in enumerate(ensemble.parameters()):
            p.mul_(1.5) if number % 2 else p.add_(0.1)
    reads_its_parameters(ensemble, dtype)
    with torch.no_grad():
        ensemble.particles.values.mul_(0.7)
    reads_its_parameters(ensemble, dtype)
    assert is_whole(ensemble)


@each_dtype
def test_a_moving_average_of_the_parameters_is_taken_and_run(tiny_model, make_batch, reads_its_parameters, dtype):
    ensemble = attached(tiny_model, dtype)
    start = [p.detach().clone() for p in ensemble.parameters()]
    averaged = AveragedModel(ensemble, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    averaged.update_parameters(ensemble)
    with torch.no_grad():
        for p in ensemble.parameters():
            p.add_(1.0)
    averaged.update_parameters(ensemble)
    for p, before in zip(averaged.module.parameters(), start, strict=True):
        torch.testing.assert_close(p, before + 0.1)
    reads_its_parameters(averaged.module, dtype)
    reads_its_parameters(ensemble, dtype)


@each_dtype
def test_a_deep_copy_is_trained_apart(tiny_model, make_batch, reads_its_parameters, dtype):
    ensemble = attached(tiny_model, dtype)
    loss_of(ensemble, make_batch).backward()
    other = copy.deepcopy(ensemble)
    start = [p.detach().clone() for p in ensemble.parameters()]
    ours, theirs = (torch.optim.AdamW(each.parameters(), lr=0.05) for each in (ensemble, other))
    for trained, optimizer, still in ((ensemble, ours, other), (other, theirs, ensemble)):
        before = [p.detach().clone() for p in still.parameters()]
        optimizer.zero_grad()
        loss_of(trained, make_batch, seed=3).backward()
        optimizer.step()
        assert all(map(torch.equal, still.parameters(), before))
        assert not any(map(torch.equal, trained.parameters(), start))
        for each in (ensemble, other):
            reads_its_parameters(each, dtype)
            assert is_whole(each)
    assert all(map(torch.equal, ensemble.parameters(), other.parameters()))


@each_dtype
@pytest.mark.parametrize("assign", [False, True])
def test_a_state_that_is_loaded_is_read(tiny_model, make_batch, reads_its_parameters, dtype, assign):
    ensemble, other = attached(tiny_model, dtype), attached(tiny_model, dtype, seed=8)
    loss_of(ensemble, make_batch)  # so that copies are there
    state = {name: tensor.clone() for name, tensor in other.state_dict().items()}
    ensemble.load_state_dict(state, assign=assign)
    assert all(map(torch.equal, ensemble.parameters(), other.parameters()))
    reads_its_parameters(ensemble, dtype)
    assert is_whole(ensemble)
    optimizer = torch.optim.AdamW(ensemble.parameters(), lr=0.05)
    loss_of(ensemble, make_batch).backward()
    optimizer.step()
    assert not any(map(torch.equal, ensemble.parameters(), other.parameters()))
    reads_its_parameters(ensemble, dtype)


@each_dtype
def test_data_that_is_put_in_a_parameters_place_is_read(tiny_model, make_batch, reads_its_parameters, dtype):
    ensemble = attached(tiny_model, dtype)
    loss_of(ensemble, make_batch)
    for p in ensemble.parameters():
        p.data = torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel()))
    reads_its_parameters(ensemble, dtype)
    assert is_whole(ensemble)
    # and our own loop sees it too
    expected = [p.detach().clone() for p in ensemble.parameters()]
    for p, value in zip(ensemble.parameters(), expected, strict=True):
        p.data = value + 1
    ensemble.particles.zero_gradients()
    views = [view for pair in ensemble.particles.named(ensemble.particles.values.detach()).values() for view in pair]
    assert all(torch.equal(v, e + 1) for v, e in zip(views, expected, strict=True))


def test_an_ensemble_in_fp64_is_trained_in_fp64(tiny_model, make_batch):
    ensemble = attached(tiny_model)
    before = loss_of(ensemble, make_batch).item()
    ensemble.double()
    ensemble.model.double()
    assert {p.dtype for p in ensemble.parameters()} == {ensemble.particles.values.dtype} == {torch.float64}
    loss = loss_of(ensemble, make_batch)
    assert loss.item() == pytest.approx(before, rel=1e-5)
    loss.backward()
    assert all(p.grad.dtype == torch.float64 and p.grad.any() for p in ensemble.parameters())
    torch.optim.AdamW(ensemble.parameters(), lr=0.01).step()
    assert loss_of(ensemble, make_batch) < loss
    assert is_whole(ensemble)


@each_dtype
def test_a_functional_call_reads_the_tensors_that_it_is_given(tiny_model, make_batch, dtype):
    ensemble, other = attached(tiny_model, dtype), attached(tiny_model, dtype, seed=8)
    batch = make_batch([6, 8, 5])
    inputs = (batch["input_ids"], batch["attention_mask"])
    own, theirs = ensemble(*inputs), other(*inputs)
    given = {name: tensor.detach().clone().requires_grad_() for name, tensor in other.named_parameters()}
    found = functional_call(ensemble, given, inputs)
    assert torch.equal(found, theirs)
    gradients = torch.autograd.grad(found.float().square().sum(), list(given.values()))
    expected = torch.autograd.grad(theirs.float().square().sum(), list(other.parameters()))
    assert all(map(torch.equal, gradients, expected))
    assert torch.equal(ensemble(*inputs), own)
    assert is_whole(ensemble)


@each_dtype
@pytest.mark.parametrize("special", [False, True])
@pytest.mark.parametrize("through", ["the parameters", "the matrix"])
def test_parameters_that_change_between_forward_and_backward_are_an_error(
    tiny_model, make_batch, dtype, through, special
):
    """As everywhere in torch: a gradient of other values than those of the forward would be wrong."""
    ensemble = attached(tiny_model, dtype, special=special)
    loss = loss_of(ensemble, make_batch)
    with torch.no_grad():
        if through == "the matrix":
            ensemble.particles.values.add_(1.0)
        else:
            for p in ensemble.parameters():
                p.add_(1.0)
        loss_of(ensemble, make_batch)  # brings the copies up to date
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@each_dtype
@pytest.mark.parametrize("special", [False, True])
def test_two_forwards_before_two_backwards(tiny_model, make_batch, dtype, special):
    """The second forward refreshes the copies, though no value has changed."""
    ensemble = attached(tiny_model, dtype, special=special)
    alone = [torch.autograd.grad(loss_of(ensemble, make_batch, seed), list(ensemble.parameters())) for seed in (1, 2)]
    first, second = loss_of(ensemble, make_batch, 1), loss_of(ensemble, make_batch, 2)
    for loss, expected in ((first, alone[0]), (second, alone[1])):
        assert all(map(torch.equal, torch.autograd.grad(loss, list(ensemble.parameters())), expected))


@each_dtype
def test_an_evaluation_between_forward_and_backward_is_no_change(tiny_model, make_batch, dtype):
    ensemble = attached(tiny_model, dtype)
    expected = torch.autograd.grad(loss_of(ensemble, make_batch), list(ensemble.parameters()))
    loss = loss_of(ensemble, make_batch)
    with torch.no_grad():
        loss_of(ensemble, make_batch, seed=5)
    with torch.inference_mode():
        loss_of(ensemble, make_batch, seed=5)
    assert all(map(torch.equal, torch.autograd.grad(loss, list(ensemble.parameters())), expected))


def test_config_is_what_it_was(tiny_model):
    assert attached(tiny_model).config == EnsembleConfig(num_particles=K, rank=2, seed=4, init="spread")
