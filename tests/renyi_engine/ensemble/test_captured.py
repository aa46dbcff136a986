"""A captured loss gives the gradients and figures of the loss itself, and asks the device for nothing.

Without a GPU, a graph is a plain call on the memory of the graph (see `core.cuda_graphs`), and attention in one call a
row has a stand-in for its kernel.

Layout: K particles, B sequences, T tokens, H heads, D size of a head.
"""

from __future__ import annotations

import warnings
from contextlib import nullcontext

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.functional import scaled_dot_product_attention
from transformers import masking_utils

from renyi_engine.data import Filler, RowSizes, fill, pack
from renyi_engine.ensemble import captured, varlen
from renyi_kernels import renyi_reduce

from ..apart import attach_apart
from .test_packed_attention import SHORT_SIGHTED, build, families, gradient

K = 3


def static_stand_in(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, scale, window_size):
    """What `varlen_attn` computes, without looking at a value: a mask over the whole row. [tokens, H, D] each."""
    assert isinstance(max_q, int)
    assert isinstance(max_k, int)
    assert window_size == (-1, 0)

    def part_and_place_from_the_end(ends, num):
        place = torch.ones(num, dtype=torch.int64, device=ends.device).cumsum(0) - 1
        part = (place[:, None] >= ends[None, 1:]).sum(dim=1)
        return part, place - ends.index_select(0, (part + 1).clamp(max=len(ends) - 1))

    q_part, q_place = part_and_place_from_the_end(cu_seq_q, len(query))
    k_part, k_place = part_and_place_from_the_end(cu_seq_k, len(key))
    sees = (q_part[:, None] == k_part) & (k_place <= q_place[:, None])
    q, k, v = (states.transpose(0, 1) for states in (query, key, value))
    return scaled_dot_product_attention(q, k, v, attn_mask=sees, scale=scale).transpose(0, 1)


@pytest.fixture
def graphs(monkeypatch):
    """Work on a CPU is recorded too."""
    monkeypatch.setattr(captured, "records", lambda device: True)


@pytest.fixture
def one_call(monkeypatch):
    """Attention as on a GPU, with a stand-in for its kernel."""
    monkeypatch.setattr(varlen, "varlen_attn", static_stand_in)
    monkeypatch.setattr(varlen, "is_for_the_kernel", lambda states: True)


def loss_of(ensemble):
    def loss(inputs):
        reduction = renyi_reduce(ensemble.sequence_logprob(inputs), inputs["alpha"])
        return {"loss": reduction.loss.mean(), "ess": reduction.ess, "logp": reduction.logp}

    return loss


def rows():
    """Packed rows of six sequences, filled up to the same sizes and not filled up."""
    *texts, pair = families()
    packed = [pack([*texts, pair]), pack([*texts[::-1], pair[::-1]]), pack([pair, *texts])]
    packed.append(pack([*texts, [pair[0]], [pair[1]]]))
    sizes = Filler(map(RowSizes.of, packed)).sizes[-1]
    return [fill(row, sizes) for row in packed], packed


@pytest.mark.parametrize("attention", ["one call", "a call for each sequence"])
@pytest.mark.parametrize("layers", [None, [1]], ids=["all layers", "a shared trunk"])
def test_filled_rows_are_one_recording_with_the_values_of_the_rows_themselves(graphs, layers, attention, request):
    if attention == "one call":
        request.getfixturevalue("one_call")
    ensemble = attach_apart(build(), num_particles=K, r=2, layers_to_transform=layers)
    loss = loss_of(ensemble)
    step = ensemble.captured(loss)
    for number, (filled, row) in enumerate(zip(*rows(), strict=True)):
        alpha = torch.tensor(0.3 + 0.2 * number)
        ensemble.zero_grad()
        plain = loss({**row, "alpha": alpha})
        plain["loss"].backward()
        expected = gradient(ensemble)
        ensemble.zero_grad()
        outputs = step({**filled, "alpha": alpha})
        assert not any(tensor.requires_grad for tensor in outputs.values())
        for name, value in plain.items():
            torch.testing.assert_close(outputs[name], value.detach(), rtol=1e-5, atol=1e-5, msg=name)
        assert (gradient(ensemble) - expected).norm() <= 1e-5 * expected.norm()
        assert expected.norm() > 1e-3
    (recordings,) = [cell.cell_contents for cell in step.__closure__ if hasattr(cell.cell_contents, "num_made")]
    assert recordings.num_made == 1


def test_gradients_add_up_and_those_of_others_are_kept(graphs):
    ensemble = attach_apart(build(), num_particles=K, r=2)
    loss = loss_of(ensemble)
    step = ensemble.captured(loss)
    (filled, *_), _ = rows()
    inputs = {**filled, "alpha": torch.tensor(0.8)}
    ensemble.zero_grad()
    loss(inputs)["loss"].backward()
    once = gradient(ensemble)
    for _ in range(2):
        step(inputs)  # to those that a plain backward left
    assert (gradient(ensemble) - 3 * once).norm() <= 1e-5 * once.norm()
    ensemble.zero_grad(set_to_none=False)
    step(inputs)
    assert (gradient(ensemble) - once).norm() <= 1e-5 * once.norm()


def test_an_optimizer_of_a_loop_of_ones_own_moves_what_the_graph_reads(graphs):
    found = []
    for is_captured in (False, True):
        ensemble = attach_apart(build(), num_particles=K, r=2)
        loss = loss_of(ensemble)
        step = ensemble.captured(loss)
        optimizer = torch.optim.AdamW(ensemble.parameters(), lr=1e-2)
        for filled in rows()[0]:
            optimizer.zero_grad()
            inputs = {**filled, "alpha": torch.tensor(0.8)}
            if is_captured:
                step(inputs)
            else:
                loss(inputs)["loss"].backward()
            optimizer.step()
        found.append(torch.cat([parameter.detach().flatten() for parameter in ensemble.parameters()]))
    torch.testing.assert_close(*found, rtol=1e-5, atol=1e-6)


def test_a_parameter_that_is_frozen_later_has_another_graph(graphs):
    """The one that was made before would go on to give it a gradient."""
    ensemble = attach_apart(build(), num_particles=K, r=2)
    step = ensemble.captured(loss_of(ensemble))
    inputs = {**rows()[0][0], "alpha": torch.tensor(0.8)}
    step(inputs)
    (recordings,) = [cell.cell_contents for cell in step.__closure__ if hasattr(cell.cell_contents, "num_made")]
    (first, *_) = ensemble.parameters()
    first.requires_grad_(False)
    step(inputs)
    assert recordings.num_made == 2
    first.requires_grad_(True)
    step(inputs)
    assert recordings.num_made == 2


def test_without_gradients_all_outputs_are_compared_and_no_gradient_is_touched(graphs):
    ensemble = attach_apart(build(), num_particles=K, r=2)
    score = ensemble.captured(lambda inputs: {"logp": ensemble.sequence_logprob(inputs)})
    for filled, row in zip(*rows(), strict=True):
        with torch.no_grad():
            torch.testing.assert_close(score(filled)["logp"], ensemble.sequence_logprob(row), rtol=1e-5, atol=1e-5)
            with ensemble.disable_adapters():
                assert score(filled)["logp"].shape == (1, 6)
    assert all(parameter.grad is None for parameter in ensemble.parameters())


def test_a_row_that_was_not_filled_up_runs_as_it_is(graphs):
    ensemble = attach_apart(build(), num_particles=K, r=2)
    called = []

    def score(inputs):
        called.append(None)
        return {"logp": ensemble.sequence_logprob(inputs)}

    run = ensemble.captured(score)
    with torch.no_grad():
        for row in rows()[1]:
            run(row)
    assert len(called) == len(rows()[1])


def test_on_a_cpu_nothing_is_recorded():
    ensemble = attach_apart(build(), num_particles=K, r=2)
    inputs = {**rows()[1][0], "alpha": torch.tensor(0.8)}
    step = ensemble.captured(loss_of(ensemble))
    ensemble.zero_grad()
    step(inputs)
    step(inputs)
    twice = gradient(ensemble)
    ensemble.zero_grad()
    loss_of(ensemble)(inputs)["loss"].backward()
    torch.testing.assert_close(twice, 2 * gradient(ensemble))


@pytest.mark.parametrize("learning", [True, False])
@pytest.mark.parametrize("checkpointing", [True, False])
def test_nothing_asks_for_a_value_but_for_the_longest_parts(one_call, learning, checkpointing, monkeypatch):
    """All inputs are tensors without values, as they are while a graph is recorded; `longest` alone is not. And
    transformers makes every mask, as its version 5.17 does then."""
    monkeypatch.setattr(masking_utils, "_ignore_causal_mask_sdpa", lambda *_, **__: False)
    model = build()
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False, "preserve_rng_state": False})
    ensemble = attach_apart(model, num_particles=K, r=2, layers_to_transform=[1]).train()
    assert ensemble.packs
    run = captured.with_gradients(ensemble, loss_of(ensemble))
    (filled, *_), _ = rows()
    ensemble.particles.attach_gradients()
    with warnings.catch_warnings(), FakeTensorMode(allow_non_fake_inputs=True) as fake:
        warnings.filterwarnings("ignore", message="Accessing the data pointer of FakeTensor")
        longest = filled.pop("longest")
        inputs = {name: fake.from_tensor(tensor) for name, tensor in filled.items()}
        with nullcontext() if learning else torch.no_grad():
            outputs = run({**inputs, "longest": longest, "alpha": fake.from_tensor(torch.tensor(0.8))})
    assert outputs["logp"].shape == (K, 6)


def test_attention_that_one_call_cannot_do_asks_for_values_and_so_is_not_recorded():
    """A graph would repeat the sequences of the row that it was recorded with."""
    model_type, attention, settings = SHORT_SIGHTED["mistral"]
    ensemble = attach_apart(build(model_type, attention, **settings), num_particles=K, r=2)
    assert ensemble.packs
    (filled, *_), _ = rows()
    with warnings.catch_warnings(), FakeTensorMode(allow_non_fake_inputs=True) as fake:
        warnings.filterwarnings("ignore", message="Accessing the data pointer of FakeTensor")
        longest = filled.pop("longest")
        inputs = {name: fake.from_tensor(tensor) for name, tensor in filled.items()}
        with pytest.raises(RuntimeError), torch.no_grad():
            ensemble.sequence_logprob({**inputs, "longest": longest})


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("layers", [None, [1]], ids=["all layers", "a shared trunk"])
def test_on_a_gpu_graphs_give_the_gradients_of_the_rows_themselves(layers):
    model = build(dtype=torch.bfloat16).to("cuda")
    ensemble = attach_apart(model, num_particles=K, r=2, layers_to_transform=layers)
    assert ensemble.packs
    loss = loss_of(ensemble)
    step = ensemble.captured(loss)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a graph that cannot be made is a warning
        for filled, row in [*zip(*rows(), strict=True)] * 2:
            alpha = torch.tensor(0.8, device="cuda")
            ensemble.zero_grad()
            outputs = step({**filled, "alpha": alpha})
            ours = gradient(ensemble)
            ensemble.zero_grad()
            plain = loss({**row, "alpha": alpha})
            plain["loss"].backward()
            assert (ours - gradient(ensemble)).norm() <= 0.05 * gradient(ensemble).norm()
            torch.testing.assert_close(outputs["loss"], plain["loss"].detach(), rtol=0.02, atol=0.02)
