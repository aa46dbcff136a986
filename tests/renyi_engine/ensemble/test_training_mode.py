"""Gradient checkpointing, dropout and the training flag of a model that carries an ensemble."""

from __future__ import annotations

import pytest
import torch

from renyi_engine.objectives.loss import data_term

from .. import tiny_models
from .attaching import attach, gradients


def checkpointing_run(model, ensemble, batch, mlp_layer):
    """(gradients, how often the MLP of a layer ran forward) of one step."""
    calls = []
    handle = model.get_submodule(mlp_layer).register_forward_pre_hook(lambda *_: calls.append(1))
    data_term(ensemble.sequence_logprob(batch), 0.7, 3)[0].backward()
    handle.remove()
    return gradients(ensemble), len(calls)


@pytest.mark.parametrize("when", ["before attach", "after attach"])
@pytest.mark.parametrize("layers", [None, [1, 2]])
@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gemma2", "phi3"])
def test_gradient_checkpointing_recomputes_and_keeps_the_gradients(tiny_model, batch, architecture, layers, when):
    mlp = "transformer.h.1.mlp" if architecture == "gpt2" else "model.layers.1.mlp"
    plain = tiny_model(architecture)
    expected, calls = checkpointing_run(plain, attach(plain, layers_to_transform=layers), batch, mlp)
    assert calls == 1
    model = tiny_model(architecture)
    if when == "before attach":
        model.gradient_checkpointing_enable()
    ensemble = attach(model, layers_to_transform=layers)
    if when == "after attach":
        model.gradient_checkpointing_enable()
        ensemble.train()
    found, calls = checkpointing_run(model, ensemble, batch, mlp)
    assert calls == 2, "checkpointing is not active"
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-5, atol=1e-7, msg=name)
    ensemble.eval()
    ensemble.zero_grad()
    assert checkpointing_run(model, ensemble, batch, mlp)[1] == 1, "eval() switches it off"


def test_reentrant_checkpointing_loses_no_gradient(tiny_model, batch):
    """Its blocks are only differentiated when an input requires a gradient, and the trunk's output requires none."""
    plain = attach(tiny_model("llama"))
    data_term(plain.sequence_logprob(batch), 0.7, 3)[0].backward()
    model = tiny_model("llama")
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
    ensemble = attach(model)
    data_term(ensemble.sequence_logprob(batch), 0.7, 3)[0].backward()
    for name, parameter in ensemble.named_parameters():
        assert parameter.grad is not None, name
        torch.testing.assert_close(parameter.grad, plain.get_parameter(name).grad, rtol=1e-5, atol=1e-7)


def test_checkpointing_does_not_run_the_trunk_again(tiny_model, batch):
    """Its layers have no parameter to train below them: they run once, forward."""
    model = tiny_model("llama")
    model.gradient_checkpointing_enable()
    ensemble = attach(model, layers_to_transform=[2])
    assert checkpointing_run(model, ensemble, batch, "model.layers.2.mlp")[1] == 2
    assert checkpointing_run(model, ensemble, batch, "model.layers.0.mlp")[1] == 1


@pytest.mark.parametrize("checkpointing", [False, True])
def test_dropout_of_the_base_stays_off(tiny_model, batch, checkpointing):
    dropout = {"resid_pdrop": 0.5, "embd_pdrop": 0.5, "attn_pdrop": 0.5}
    model = tiny_model("gpt2", **dropout)
    truth = attach(tiny_model("gpt2")).sequence_logprob(batch)
    model.train()
    if checkpointing:
        model.gradient_checkpointing_enable()
    ensemble = attach(model)
    for mode in (ensemble.train, model.train, ensemble.eval, model.train):
        mode()
        torch.testing.assert_close(ensemble.sequence_logprob(batch), truth, rtol=0, atol=1e-5)
    dropouts = [module for module in model.modules() if isinstance(module, torch.nn.Dropout)]
    assert dropouts
    assert not any(module.training for module in dropouts)


def test_layers_that_drop_out_by_their_own_flag_are_checkpointed_without(batch):
    model = tiny_models.tiny_model("opt")
    assert model.config.dropout > 0
    ensemble = attach(model)
    truth = ensemble.sequence_logprob(batch)
    model.gradient_checkpointing_enable()
    calls = []
    model.model.decoder.layers[1].fc1.register_forward_pre_hook(lambda *_: calls.append(1))
    logp = ensemble.sequence_logprob(batch)
    logp.sum().backward()
    assert len(calls) == 2, "checkpointing is not active"
    torch.testing.assert_close(logp, truth, rtol=0, atol=1e-5)


def test_two_steps_of_training_are_bitwise_equal_in_two_runs(tiny_model, make_batch):
    def run():
        ensemble = attach(tiny_model("llama"), apart=False, init="standard")
        optimizer = torch.optim.AdamW(ensemble.parameters(), lr=0.01)
        for seed in (1, 2):
            optimizer.zero_grad()
            data_term(ensemble.sequence_logprob(make_batch([6, 8, 5], seed=seed)), 0.7, 3)[0].backward()
            optimizer.step()
        return ensemble.state_dict()

    first, second = run(), run()
    assert all(torch.equal(first[name], second[name]) for name in first)
