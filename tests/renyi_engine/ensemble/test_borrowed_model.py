"""A model is lent to one ensemble at a time, and given back untouched; copies are models of their own."""

from __future__ import annotations

import copy

import peft
import pytest
import torch
import torch.nn.functional as F
from transformers import LlamaConfig, LlamaForCausalLM

from renyi_engine import EnsembleConfig, LoraEnsemble
from renyi_engine.objectives.loss import data_term

from .attaching import assert_no_hooks, attach

# ---------------------------------------------------------------------- copies


def test_a_deep_copy_of_the_base_is_a_model_of_its_own(llama, naive_logprob, batch):
    twin = copy.deepcopy(llama)
    truth = naive_logprob(twin, batch)
    first, second = attach(llama), attach(copy.deepcopy(twin), seed=5)
    assert not torch.equal(first.sequence_logprob(batch), second.sequence_logprob(batch))
    assert torch.equal(naive_logprob(twin, batch), truth)
    assert_no_hooks(twin)


def test_a_deep_copy_of_the_ensemble_is_an_ensemble_of_its_own(llama, batch):
    ensemble = attach(llama)
    before = ensemble.sequence_logprob(batch)
    twin = copy.deepcopy(ensemble)
    assert torch.equal(twin.sequence_logprob(batch), before)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.add_(0.2)
    assert torch.equal(ensemble.sequence_logprob(batch), before)
    assert not torch.equal(twin.sequence_logprob(batch), before)
    twin.detach()
    assert_no_hooks(twin.model)
    assert torch.equal(ensemble.sequence_logprob(batch), before)


# ---------------------------------------------------------------------- attach and detach


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gemma2"])
def test_detach_gives_the_model_back_untouched(tiny_model, batch, architecture):
    model = tiny_model(architecture)
    model.train()
    model.get_input_embeddings().requires_grad_(False)
    list(model.modules())[3].eval()
    with torch.no_grad():
        logits = model(input_ids=batch["input_ids"]).logits
    state = {name: value.clone() for name, value in model.state_dict().items()}
    trainable = {name: p.requires_grad for name, p in model.named_parameters()}
    training = {name: module.training for name, module in model.named_modules()}
    attributes = {name: set(vars(module)) for name, module in model.named_modules()}

    ensemble = attach(model, layers_to_transform=[1, 2])
    optimizer = torch.optim.AdamW(ensemble.parameters(), lr=0.1)
    data_term(ensemble.sequence_logprob(batch), 0.7, 3)[0].backward()
    optimizer.step()
    ensemble.eval()
    assert ensemble.detach() is model

    assert_no_hooks(model)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert {name: p.requires_grad for name, p in model.named_parameters()} == trainable
    assert {name: module.training for name, module in model.named_modules()} == training
    assert {name: set(vars(module)) for name, module in model.named_modules()} == attributes
    with torch.no_grad():
        assert torch.equal(model(input_ids=batch["input_ids"]).logits, logits)


def test_a_detached_ensemble_says_so(llama, batch):
    ensemble = attach(llama)
    ensemble.detach()
    with pytest.raises(RuntimeError, match="detached"):
        ensemble.sequence_logprob(batch)
    ensemble.train()
    assert not llama.training, "it has no say in the model any more"


def test_detaching_twice_is_harmless(llama):
    ensemble = attach(llama)
    ensemble.detach()
    llama.train()
    llama.requires_grad_(False)
    assert ensemble.detach() is llama
    assert all(module.training for module in llama.modules()), "the flags are the owner's again"
    assert not any(p.requires_grad for p in llama.parameters())


def test_a_detached_ensemble_does_not_undress_the_next_one(llama, batch):
    first = attach(llama)
    first.detach()
    second = attach(llama, seed=1)
    logp = second.sequence_logprob(batch)
    first.detach()
    assert torch.equal(second.sequence_logprob(batch), logp)
    with pytest.raises(ValueError, match="already carries an ensemble"):
        attach(llama)


def test_attaching_twice_is_refused_and_leaves_the_first(llama, batch):
    ensemble = attach(llama)
    logp = ensemble.sequence_logprob(batch)
    with pytest.raises(ValueError, match=r"already carries an ensemble.*detach\(\)"):
        attach(llama)
    assert torch.equal(ensemble.sequence_logprob(batch), logp)
    ensemble.detach()
    attach(llama)


def test_peft_models_are_refused(tiny_model):
    config = peft.LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM")
    wrapped = peft.get_peft_model(tiny_model("llama"), config)
    with pytest.raises(TypeError, match=r"PreTrainedModel.*PeftModel.*unload"):
        LoraEnsemble.attach(wrapped)
    with pytest.raises(ValueError, match="already carries PEFT adapters"):
        LoraEnsemble.attach(wrapped.get_base_model())
    integrated = tiny_model("llama")
    integrated.add_adapter(config)
    with pytest.raises(ValueError, match="already carries PEFT adapters"):
        LoraEnsemble.attach(integrated)
    LoraEnsemble.attach(wrapped.unload())


def test_something_other_than_a_model_is_refused():
    with pytest.raises(TypeError, match="PreTrainedModel"):
        LoraEnsemble.attach(torch.nn.Linear(2, 2))


class CubedLogits(LlamaForCausalLM):
    """A head that no multiplication and no soft cap makes."""

    def forward(self, *args, **kwargs):
        out = super().forward(*args, **kwargs)
        out.logits = out.logits + 1e-4 * out.logits**3
        return out


class SilentLinear(torch.nn.Module):
    """An MLP that reads the weights of its maps without calling them."""

    def __init__(self, mlp):
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj, self.act_fn = (
            mlp.gate_proj,
            mlp.up_proj,
            mlp.down_proj,
            mlp.act_fn,
        )

    def forward(self, x):
        return self.down_proj(self.act_fn(F.linear(x, self.gate_proj.weight)) * self.up_proj(x))


def assert_clean(model):
    assert_no_hooks(model)
    assert "_renyi_ensemble" not in vars(model)
    assert all(p.requires_grad for p in model.parameters())
    assert all(module.training for module in model.modules())


def test_a_head_that_is_not_understood_is_refused_and_the_model_left_clean(llama):
    model = CubedLogits(LlamaConfig(**llama.config.to_dict()))
    model.load_state_dict(llama.state_dict())
    model.train()
    with pytest.raises(ValueError, match="CubedLogits transforms its logits"):
        LoraEnsemble.attach(model)
    assert_clean(model)


def test_a_map_that_is_read_but_never_called_is_refused_by_name(llama):
    llama.model.layers[1].mlp = SilentLinear(llama.model.layers[1].mlp)
    llama.train()
    with pytest.raises(ValueError, match=r"model\.layers\.1\.mlp\.gate_proj"):
        LoraEnsemble.attach(llama)
    assert_clean(llama)
    LoraEnsemble.attach(
        llama, EnsembleConfig(2, 2, target_modules=["up_proj", "gate_proj"], layers_to_transform=[0, 2])
    )
