"""Particles in a folder, for the evaluations to look at."""

from __future__ import annotations

import pytest
from transformers import AutoModelForCausalLM

from renyi_engine import EnsembleConfig, LoraEnsemble


@pytest.fixture(scope="session")
def save_particles(model_folder):
    """Saves particles whose B are drawn at random, so that they differ; the more, the larger lora_alpha is."""

    def save(folder, num_particles=3, lora_alpha=960, alpha=0.8, weights=None) -> LoraEnsemble:
        model = AutoModelForCausalLM.from_pretrained(model_folder)
        config = EnsembleConfig(num_particles, rank=2, lora_alpha=lora_alpha, init="spread")
        ensemble = LoraEnsemble.attach(model, config)
        if weights is not None:
            ensemble.particle_weights = weights
        ensemble.save_pretrained(folder, alpha=alpha)
        return ensemble

    return save
