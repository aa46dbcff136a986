"""A tiny model, a batch for it, and a folder of three saved particles."""

from __future__ import annotations

import pytest

from renyi_engine.ensemble.adapter_folder import ENSEMBLE_FILE

from .attaching import attach


@pytest.fixture
def llama(tiny_model):
    return tiny_model("llama")


@pytest.fixture
def batch(make_batch):
    return make_batch([6, 8, 5])


@pytest.fixture
def saved(tiny_model, tmp_path):
    """A sound folder of three particles, to be broken."""
    attach(tiny_model("llama"), lora_alpha=6).save_pretrained(tmp_path / "saved", alpha=0.7)
    return tmp_path / "saved"


@pytest.fixture
def bare(saved):
    """The same folder without its ensemble.json."""
    (saved / ENSEMBLE_FILE).unlink()
    return saved
