"""RMS norms are found by what they compute, and PyTorch's operator gives the same."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from renyi_engine.ensemble import installation, rms_norms

from .attaching import attach, gradients

NORMS = {
    "llama": 7,
    "qwen2": 7,
    "qwen3": 13,
    "mistral": 7,
    "phi3": 7,
    "granite": 7,
    "gemma2": 13,
    "gpt2": 0,
    "cohere": 0,
}
"""How many a tiny model of 3 layers has. gpt2 and cohere have other norms."""


@pytest.mark.parametrize("architecture", NORMS)
def test_rms_norms_are_found_and_no_other_norms(tiny_model, architecture):
    found = list(rms_norms.found(tiny_model(architecture)))
    assert len(found) == NORMS[architecture]
    assert all("RMSNorm" in type(norm.module).__name__ for norm in found)


@pytest.mark.parametrize("architecture", ["llama", "gemma2"])
def test_in_fp32_nothing_changes(tiny_model, architecture):
    model = tiny_model(architecture)
    for norm in rms_norms.found(model):
        x = torch.randn(5, norm.module.weight.shape[0]) * 3
        assert norm.forward(x).equal(norm.module(x))


def test_in_half_precision_the_operator_is_nearer_to_the_truth(tiny_model):
    for norm in rms_norms.found(tiny_model("llama", dtype=torch.bfloat16)):
        module = norm.module
        x = torch.randn(512, module.weight.shape[0], dtype=torch.bfloat16) * 3
        truth = nn.functional.rms_norm(x.double(), module.weight.shape, module.weight.double(), norm._eps)
        error = [(found.double() - truth).norm() for found in (norm.forward(x), module(x))]
        assert error[0] <= error[1] <= 0.01 * truth.norm()


def test_a_weight_that_half_precision_cannot_hold_is_left_alone(tiny_model):
    """Gemma multiplies by 1 + weight, in fp32."""
    assert not list(rms_norms.found(tiny_model("gemma2", dtype=torch.bfloat16)))


def test_norms_of_another_formula_are_left_alone():
    class Other(nn.Module):
        def __init__(self, power):
            super().__init__()
            self.weight, self.eps, self.power = nn.Parameter(torch.rand(8) + 0.5), 1e-5, power

        def forward(self, x):
            return self.weight * x / (x.pow(2).mean(-1, keepdim=True) + self.eps).pow(self.power)

    assert len(list(rms_norms.found(Other(0.5)))) == 1
    assert not list(rms_norms.found(Other(0.49)))
    assert not list(rms_norms.found(nn.LayerNorm(8, bias=False)))


def test_on_a_gpu_an_ensemble_uses_them_until_it_is_detached(tiny_model, batch, monkeypatch):
    plain = attach(tiny_model("llama"))
    plain.sequence_logprob(batch).sum().backward()
    monkeypatch.setattr(installation, "norms_in_one_kernel", lambda device: True)
    model = tiny_model("llama")
    ensemble = attach(model)
    assert isinstance(model.model.norm.forward.__self__, rms_norms.RmsNorm)
    ensemble.sequence_logprob(batch).sum().backward()
    for name, gradient in gradients(plain).items():
        torch.testing.assert_close(gradients(ensemble)[name], gradient, rtol=1e-5, atol=1e-6)
    ensemble.detach()
    assert not any("forward" in vars(module) for module in model.modules())
