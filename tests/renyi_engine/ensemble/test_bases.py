"""Bases whose weights are not plain matrices in memory, and models that have pictures too: right, or refused at attach.

No library of quantisation is needed: each case is what one of them does, in a few lines.
"""

from __future__ import annotations

import pytest
import torch
from torch import nn

from renyi_engine import EnsembleConfig, LoraEnsemble
from renyi_engine.base_model import load_model, skeleton
from renyi_engine.ensemble.adapted_maps import is_plain
from renyi_engine.ensemble.config import ModelConfig
from renyi_engine.ensemble.targets import describe

from .. import tiny_models


class PackedLinear(nn.Linear):
    """As bitsandbytes does it on a CPU: once in eval mode, a packed product that autograd does not see through."""

    def forward(self, x):
        if self.training:
            return super().forward(x)
        return super().forward(x.detach()) + 0.07 * (x - x.detach())[..., :1]


class SilentLinear(nn.Linear):
    def forward(self, x):
        with torch.no_grad():
            return super().forward(x)


class DequantisingLinear(nn.Linear):
    """A quantised map that is right."""

    def forward(self, x):
        return nn.functional.linear(x, self.weight * 1.0, self.bias)


class Scaled(torch.Tensor):
    """As torchao has it: a weight of another class in a plain nn.Linear, whose numbers are not the matrix."""

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        if function is nn.functional.linear:
            x, weight, *rest = args
            return nn.functional.linear(x, 2.0 * weight.as_subclass(torch.Tensor), *rest)
        return super().__torch_function__(function, types, args, kwargs or {})


def with_maps(model, kind):
    for linear in list(model.model.layers.modules()):
        if type(linear) is nn.Linear:
            linear.__class__ = kind
    return model.eval()


@pytest.mark.parametrize("kind", [PackedLinear, SilentLinear])
def test_maps_whose_gradient_is_wrong_are_refused(tiny_model, kind):
    with pytest.raises(ValueError, match=f"is a {kind.__name__}, which gives no gradient of its input, or a wrong one"):
        LoraEnsemble.attach(with_maps(tiny_model("llama"), kind), EnsembleConfig(2, 2))


def test_quantised_maps_whose_gradient_is_right_are_adapted(tiny_model, make_batch):
    config, batch = EnsembleConfig(2, 2, init="spread"), make_batch([5, 7])
    plain = LoraEnsemble.attach(tiny_model("llama"), config).sequence_logprob(batch)
    ours = LoraEnsemble.attach(with_maps(tiny_model("llama"), DequantisingLinear), config).sequence_logprob(batch)
    torch.testing.assert_close(ours, plain)


def test_a_weight_of_another_class_is_never_multiplied_as_if_it_were_the_matrix(tiny_model, make_batch):
    config, batch = EnsembleConfig(2, 2, init="spread"), make_batch([5, 7])
    doubled, quantised = tiny_model("llama"), tiny_model("llama")
    for path, linear in quantised.model.layers.named_modules():
        if type(linear) is nn.Linear:
            doubled.model.layers.get_submodule(path).weight.data *= 2.0
            linear.weight = nn.Parameter(linear.weight.detach().as_subclass(Scaled), requires_grad=False)
            assert not is_plain(linear)
    truth = LoraEnsemble.attach(doubled, config).sequence_logprob(batch)
    torch.testing.assert_close(LoraEnsemble.attach(quantised, config).sequence_logprob(batch), truth)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("name", ["model.embed_tokens.weight", "model.layers.2.mlp.down_proj.weight", "lm_head.weight"])
def test_weights_that_are_not_finite_are_refused_by_name(tiny_model, name, value):
    """Of an embedding, the row of one token, which few texts hold."""
    model = tiny_model("llama")
    with torch.no_grad():
        model.get_parameter(name)[-1, 3] = value
    with pytest.raises(ValueError, match=f"NaN or infinite values, for example {name};"):
        LoraEnsemble.attach(model)


def test_weights_too_large_for_the_type_they_are_loaded_in_are_refused(tiny_model):
    model = tiny_model("llama", dtype=torch.float64)
    with torch.no_grad():
        model.lm_head.weight[90, 0] = 1e300
    LoraEnsemble.attach(model).detach()
    with pytest.raises(ValueError, match=r"lm_head\.weight; .* too large for float32"):
        LoraEnsemble.attach(model.float())


def test_weights_that_are_not_in_memory_are_refused(tiny_model):
    model = tiny_model("llama")
    model.model.layers[2].to("meta")
    with pytest.raises(ValueError, match="weights are not in memory"):
        LoraEnsemble.attach(model)


@pytest.mark.parametrize("name", ["mistral3", "qwen2_5_vl", "qwen3_vl", "llava", "smolvlm", "llama"])
def test_a_folder_is_loaded_as_what_it_is(tmp_path, name):
    model = tiny_models.tiny_model(name)
    model.save_pretrained(tmp_path)
    config = ModelConfig(model_name_or_path=str(tmp_path), use_cpu=True)
    loaded = load_model(config)
    assert type(loaded) is type(model) is type(skeleton(config))
    ids = torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        torch.testing.assert_close(loaded(input_ids=ids).logits, model(input_ids=ids).logits)


@pytest.mark.parametrize("name", ["gemma3", "gemma4", "mistral3", "llava"])
def test_saved_names_match_no_map_of_a_vision_tower(name):
    model = tiny_models.tiny_model(name)
    ensemble = LoraEnsemble.attach(model, EnsembleConfig(2, 2))
    names, layers, _ = describe(model, ensemble.paths)
    matched = {path for path, _ in model.named_modules() if any(path == n or path.endswith(f".{n}") for n in names)}
    assert layers is None
    assert matched == set(ensemble.paths)
