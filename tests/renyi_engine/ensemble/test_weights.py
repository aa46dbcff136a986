"""The weights of the particles: what they may be, and that folders keep them."""

from __future__ import annotations

import copy
import json

import numpy as np
import pytest
import torch

from renyi_engine import LoraEnsemble
from renyi_engine.ensemble.adapter_folder import ENSEMBLE_FILE

from .attaching import attach
from .folders import K, edit_json, refused, write_peft

UNIFORM = [1 / K] * K
WEIGHTS = [0.7, 0.1 + 0.2, 0.0]  # 0.1 + 0.2 has all its digits


@pytest.mark.parametrize(
    "weights", [WEIGHTS, torch.tensor(WEIGHTS, dtype=torch.float64), np.array(WEIGHTS)], ids=["list", "tensor", "array"]
)
def test_weights_come_back_from_a_folder_bit_for_bit(tiny_model, tmp_path, weights):
    ensemble = attach(tiny_model("llama"))
    assert ensemble.particle_weights.tolist() == UNIFORM
    ensemble.particle_weights = weights
    ensemble.save_pretrained(tmp_path)
    assert json.loads((tmp_path / ENSEMBLE_FILE).read_text())["particle_weights"] == WEIGHTS
    loaded = LoraEnsemble.from_pretrained(tiny_model("llama"), tmp_path).particle_weights
    assert (loaded.dtype, loaded.tolist()) == (torch.float64, WEIGHTS)


def test_folders_that_do_not_say_them_have_equal_weights(saved, llama, tiny_model, tmp_path):
    content = json.loads((saved / ENSEMBLE_FILE).read_text())
    del content["particle_weights"]
    (saved / ENSEMBLE_FILE).write_text(json.dumps(content))
    edit_json(saved / ENSEMBLE_FILE)
    assert LoraEnsemble.from_pretrained(llama, saved).particle_weights.tolist() == UNIFORM
    edit_json(saved / ENSEMBLE_FILE, particle_weights=None)
    assert LoraEnsemble.from_pretrained(tiny_model("llama"), saved).particle_weights.tolist() == UNIFORM
    of_peft = write_peft(tiny_model("llama"), tmp_path / "peft")
    loaded = LoraEnsemble.from_pretrained(tiny_model("llama"), of_peft, check_base=False)
    assert loaded.particle_weights.tolist() == UNIFORM


NO_DISTRIBUTION = [
    [0.5, 0.5], [0.5, 0.5, 0.1], [1.5, -0.5, 0.0], [float("nan"), 0.5, 0.5], [float("inf"), 0.0, 0.0], ["a", 0.5, 0.5],
    [True, 0.0, 0.0], [[0.5], 0.5, 0.0],
]  # fmt: skip


@pytest.mark.parametrize("weights", [*NO_DISTRIBUTION, "uniform", {"p000": 1.0}, 1.0], ids=str)
def test_a_file_with_other_weights_is_refused(saved, llama, weights):
    edit_json(saved / ENSEMBLE_FILE, particle_weights=weights)
    refused(llama, saved, saved / ENSEMBLE_FILE, "particle_weights: expected 3 finite numbers")


@pytest.mark.parametrize("weights", NO_DISTRIBUTION, ids=str)
def test_other_weights_cannot_be_set(llama, weights):
    ensemble = attach(llama)
    ensemble.particle_weights = WEIGHTS
    with pytest.raises(ValueError, match=r"particle_weights: expected 3 finite numbers .*; divide them by their sum"):
        ensemble.particle_weights = weights
    assert ensemble.particle_weights.tolist() == WEIGHTS


@pytest.mark.parametrize("kind", [list, tuple, np.array, torch.tensor], ids=lambda kind: kind.__name__)
def test_weights_of_any_kind_of_sequence_can_be_set(llama, kind):
    ensemble = attach(llama)
    ensemble.particle_weights = kind(np.array(WEIGHTS))
    assert ensemble.particle_weights.tolist() == WEIGHTS


def test_weights_stay_in_fp64_and_are_no_parameters(llama):
    ensemble = attach(llama)
    ensemble.particle_weights = WEIGHTS
    assert not any("weights" in name for name in (*dict(ensemble.named_parameters()), *ensemble.state_dict()))
    assert copy.deepcopy(ensemble).particle_weights.tolist() == WEIGHTS
    ensemble.to(torch.bfloat16)
    assert ensemble.particle_weights.dtype == torch.float64
    assert ensemble.particle_weights.tolist() == WEIGHTS


def test_the_base_alone_has_all_the_weight(llama):
    ensemble = attach(llama)
    ensemble.particle_weights = WEIGHTS
    with ensemble.disable_adapters():
        assert ensemble.particle_weights.tolist() == [1.0]
