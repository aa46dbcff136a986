"""Ensembles whose particles differ, and whether a model is free of hooks again."""

from __future__ import annotations

import torch

from renyi_engine import EnsembleConfig, LoraEnsemble

HOOK_TABLES = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_backward_hooks",
    "_backward_pre_hooks",
)


def attach(model, K=3, *, apart=True, **config):
    """An ensemble whose particles, if `apart`, differ by more than rounding: A and B are O(0.1) each."""
    ensemble = LoraEnsemble.attach(model, EnsembleConfig(**{"num_particles": K, "rank": 3, "init": "spread"} | config))
    if apart:
        generator = torch.Generator().manual_seed(11)
        with torch.no_grad():
            for parameter in ensemble.parameters():
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator).to(parameter))
    return ensemble


def gradients(ensemble):
    return {name: parameter.grad.clone() for name, parameter in ensemble.named_parameters()}


def assert_no_hooks(model):
    for name, module in model.named_modules():
        for table in HOOK_TABLES:
            assert not getattr(module, table), f"{table} of {name or 'the model'}"
