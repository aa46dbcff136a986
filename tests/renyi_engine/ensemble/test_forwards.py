"""One process, several users: threads, tasks and copies get the values that each would get alone.

Layout: K particles, B sequences.
"""

from __future__ import annotations

import asyncio
import copy
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext

import pytest
import torch

from renyi_engine import LoraEnsemble
from renyi_engine.ensemble import architecture
from renyi_engine.ensemble.adapted_maps import Rows

from .attaching import attach

K = 3


def gradients(ensemble, batch, **kwargs):
    """Of a forward here; the backward runs in `kwargs["backward"]`, if that is given."""
    ensemble.zero_grad()
    loss = ensemble.sequence_logprob(batch).square().sum()
    kwargs.get("backward", torch.Tensor.backward)(loss)
    return [p.grad.clone() for p in ensemble.parameters()]


def elsewhere(function, *args):
    """The result of a call in another thread, which starts with a context of its own."""
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(function, *args).result()


def beside(ensemble, first, second, layer=1):
    """(first(), second()): the second starts, in another thread, while the forward of the first is inside a layer, and
    has a fifth of a second to do harm there."""
    found, started = [], threading.Event()

    def other():
        started.set()
        found.append(second())

    thread = threading.Thread(target=other)

    def pause(*_):
        if not started.is_set():
            thread.start()
            started.wait()
            thread.join(0.2)

    # between the first and the last of the maps that read one input
    handle = ensemble.layers[layer].self_attn.k_proj.register_forward_pre_hook(pause)
    try:
        mine = first()
    finally:
        handle.remove()
    thread.join()
    return mine, found[0]


# ---------------------------------------------------------------------- threads and tasks


def test_adapters_are_off_for_the_thread_alone_that_is_inside(llama, batch):
    ensemble = attach(llama)
    enabled = ensemble.sequence_logprob(batch)
    with ensemble.disable_adapters():
        assert torch.equal(elsewhere(ensemble.sequence_logprob, batch), enabled)
        assert elsewhere(lambda: ensemble.num_running) == K
        assert ensemble.sequence_logprob(batch).shape == (1, 3)


def test_adapters_are_off_for_the_task_alone_that_is_inside(llama, batch):
    ensemble = attach(llama)
    enabled = ensemble.sequence_logprob(batch)

    async def base():
        with ensemble.disable_adapters():
            await asyncio.sleep(0)
            return ensemble.sequence_logprob(batch)

    async def particles():
        return ensemble.sequence_logprob(batch)

    async def both():
        return await asyncio.gather(base(), particles())

    of_base, of_particles = asyncio.run(both())
    assert of_base.shape == (1, 3)
    assert torch.equal(of_particles, enabled)


def test_blocks_that_generators_leave_out_of_order_end_each_for_itself(llama, batch):
    ensemble = attach(llama)

    def suspended():
        with ensemble.disable_adapters():
            yield

    def closed_inside(generator):
        with ensemble.disable_adapters():
            generator.close()
            return ensemble.num_running

    generator = suspended()
    next(generator)
    assert closed_inside(generator) == 1
    assert ensemble.num_running == K
    generator = suspended()
    next(generator)
    assert elsewhere(closed_inside, generator) == 1


@pytest.mark.parametrize("layers", [None, [1, 2]])
@pytest.mark.parametrize("other", ["generate", "base", "base by the model itself", "score"])
def test_a_gradient_is_that_of_a_run_alone_whatever_another_thread_runs_meanwhile(
    llama, batch, make_batch, layers, other
):
    ensemble = attach(llama, layers_to_transform=layers)
    others = make_batch([8, 8], prompt=3, seed=5)

    def second():
        with torch.no_grad(), ensemble.disable_adapters() if other.startswith("base") else nullcontext():
            if other == "generate":
                return ensemble.generate(others["input_ids"], max_new_tokens=5, temperature=0.8, eos_token_id=[])
            if other == "base by the model itself":
                return llama(input_ids=others["input_ids"]).logits
            return ensemble.sequence_logprob(others)

    alone = gradients(ensemble, batch), second()
    mine, theirs = beside(ensemble, lambda: gradients(ensemble, batch), second)
    assert torch.equal(theirs, alone[1])
    assert all(map(torch.equal, mine, alone[0]))


def test_what_a_thread_generates_is_what_it_generates_alone_beside_training(llama, batch):
    ensemble = attach(llama)
    ensemble.train()
    llama.gradient_checkpointing_enable()
    generate = lambda: ensemble.generate(batch["input_ids"], max_new_tokens=12, temperature=0.8, eos_token_id=[])
    expected, truth = generate(), gradients(ensemble, batch)
    done = threading.Event()

    def train():
        found = []
        while not (done.is_set() and found):
            found.append(gradients(ensemble, batch))
        return found

    with ThreadPoolExecutor(1) as pool:
        training = pool.submit(train)
        generated = [generate() for _ in range(3)]
        done.set()
    assert all(torch.equal(each, expected) for each in generated)
    assert all(all(map(torch.equal, each, truth)) for each in training.result())


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("rows", [Rows.SHARED, Rows.OWN], ids=lambda rows: rows.name)
def test_a_checkpointed_layer_runs_again_with_the_rows_of_its_first_run(llama, make_batch, rows, reentrant):
    """The backward is called by another thread, and in this one the adapters are off meanwhile."""
    ensemble = attach(llama)
    batch = make_batch([6] * K)

    def backward(loss):
        with ensemble.disable_adapters():
            elsewhere(loss.backward)

    def run(backward):
        ensemble.zero_grad()
        with ensemble.running(rows):
            loss = ensemble.sequence_logprob(batch).square().sum()
        backward(loss)
        return [p.grad.clone() for p in ensemble.parameters()]

    expected = run(torch.Tensor.backward)
    ensemble.train()
    llama.gradient_checkpointing_enable({"use_reentrant": reentrant})
    for found, truth in zip(run(backward), expected, strict=True):
        torch.testing.assert_close(found, truth, rtol=1e-5, atol=1e-7)


def test_a_backward_that_runs_layers_again_leaves_another_thread_its_values(llama, batch):
    ensemble = attach(llama)
    ensemble.train()
    llama.gradient_checkpointing_enable()
    score = lambda: ensemble.sequence_logprob(batch).detach()
    expected, truth = score(), gradients(ensemble, batch)
    logp, mine = beside(ensemble, score, lambda: gradients(ensemble, batch))
    assert torch.equal(logp, expected)
    assert all(map(torch.equal, mine, truth))


def test_of_two_attachments_at_a_time_one_is_refused(llama, batch, monkeypatch):
    observe = architecture.observe

    def slowly(model):
        with pytest.raises(ValueError, match="already carries an ensemble"):
            elsewhere(LoraEnsemble.attach, llama)
        return observe(model)

    monkeypatch.setattr(architecture, "observe", slowly)
    assert attach(llama).sequence_logprob(batch).shape == (K, 3)


def test_an_error_in_one_thread_leaves_the_model_free_for_the_next(llama, batch):
    ensemble = attach(llama)
    expected = ensemble.sequence_logprob(batch)
    handle = ensemble.layers[1].register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        elsewhere(ensemble.sequence_logprob, batch)
    handle.remove()
    assert torch.equal(ensemble.sequence_logprob(batch), expected)


@pytest.mark.parametrize("moment", ["before", "within"])
def test_an_ensemble_that_was_detached_does_not_go_on_with_the_bare_base(llama, batch, moment, monkeypatch):
    ensemble = attach(llama)
    generate = lambda: ensemble.generate(batch["input_ids"], max_new_tokens=4, temperature=0, eos_token_id=[])
    generate()
    if moment == "before":
        ensemble.detach()
    else:  # after the first new token
        logits = ensemble.logits
        monkeypatch.setattr(ensemble, "logits", lambda hidden: (logits(hidden), elsewhere(ensemble.detach))[0])
    with pytest.raises(RuntimeError, match="was detached"):
        generate()


# ---------------------------------------------------------------------- copies


@pytest.mark.parametrize("learning", [False, True])
def test_a_deep_copy_is_right_even_if_it_is_made_while_a_forward_runs(tiny_model, make_batch, learning):
    """Python gives a new tensor the id of one that is gone: nothing in the copy may know tensors by their ids."""
    ensemble = attach(tiny_model("llama", attn_implementation="eager"), layers_to_transform=[1, 2])
    for seed in range(5):
        twins = []

        def copy_once(*_, twins=twins):
            if not twins:
                twins.append(copy.deepcopy(ensemble))

        handle = ensemble.layers[2].self_attn.k_proj.register_forward_pre_hook(copy_once)
        with torch.set_grad_enabled(learning):
            ensemble.sequence_logprob(make_batch([6, 8, 5], seed=seed))
        handle.remove()
        other = make_batch([8, 3, 4], seed=seed + 10)
        (twin,) = twins
        assert torch.equal(twin.sequence_logprob(other), ensemble.sequence_logprob(other))


@pytest.mark.parametrize("layers", [None, [1, 2]])
def test_a_deep_copy_is_an_ensemble_of_its_own(llama, batch, layers):
    ensemble = attach(llama, layers_to_transform=layers)
    ensemble.train()
    llama.gradient_checkpointing_enable()
    expected, truth = ensemble.sequence_logprob(batch), gradients(ensemble, batch)
    with ensemble.disable_adapters():
        base = ensemble.sequence_logprob(batch)
        twin = copy.deepcopy(ensemble)
        assert torch.equal(twin.sequence_logprob(batch), expected)
    with twin.disable_adapters():
        assert torch.equal(twin.sequence_logprob(batch), base)
        assert torch.equal(ensemble.sequence_logprob(batch), expected)
    assert all(map(torch.equal, gradients(twin, batch), truth))
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.zero_()
    assert torch.equal(ensemble.sequence_logprob(batch), expected)
    torch.testing.assert_close(twin.sequence_logprob(batch), base.expand(K, -1), rtol=0, atol=2e-5)
    twin.detach()
    assert torch.equal(ensemble.sequence_logprob(batch), expected)


def test_the_original_of_a_deep_copy_can_be_detached(llama, tiny_model, batch):
    ensemble = attach(llama)
    expected = ensemble.sequence_logprob(batch)
    twin = copy.deepcopy(ensemble)
    ensemble.detach()
    assert torch.equal(twin.sequence_logprob(batch), expected)
    bare = tiny_model("llama")
    assert torch.equal(llama(batch["input_ids"]).logits, bare(batch["input_ids"]).logits)
    assert "forward" not in vars(llama.model)
