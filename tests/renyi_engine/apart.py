"""An ensemble whose particles predict differently, so that a test on it notices a particle in the place of another."""

from __future__ import annotations

import torch
from transformers import PreTrainedModel

from renyi_engine import EnsembleConfig, LoraEnsemble


def attach_apart(model: PreTrainedModel, *, factor: float = 20.0, **config) -> LoraEnsemble:
    """A new ensemble on `model`. Its "spread" start is made larger by `factor`. `config`: of `EnsembleConfig`."""
    ensemble = LoraEnsemble.attach(model, EnsembleConfig(**config, init="spread"))
    with torch.no_grad():
        for _, B in ensemble.stacked().values():
            B.mul_(factor)
    return ensemble
