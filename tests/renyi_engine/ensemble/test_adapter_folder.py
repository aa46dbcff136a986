"""Adapter folders come back bit for bit, in the form that PEFT and vLLM expect.

Layout: K particles.
"""

from __future__ import annotations

import json
import re
import warnings

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from renyi_engine import LoraEnsemble
from renyi_engine.core.files import sha256_of
from renyi_engine.ensemble.adapter_folder import CONFIG_FILE, ENSEMBLE_FILE, TENSORS_FILE, read
from renyi_engine.ensemble.fingerprint import fingerprint

from .attaching import attach
from .folders import Q0_A, K, contents, refused, write_peft

# ---------------------------------------------------------------------- round trip


@pytest.mark.parametrize(
    ("architecture", "config"),
    [
        ("llama", {}),
        ("llama", {"target_modules": ["q_proj"], "layers_to_transform": [2], "use_rslora": True, "init": "standard"}),
        ("llama", {"target_modules": r".*(1\.self_attn\.q|2\.mlp\.up)_proj", "num_particles": 1, "rank": 1}),
        ("phi3", {"lora_alpha": 2.5, "seed": 12}),
        ("gpt2", {"target_modules": r".*attn\.c_proj"}),
        ("gpt2", {"layers_to_transform": [0, 2]}),
    ],
    ids=str,
)
def test_save_and_load_is_bitwise(tiny_model, batch, tmp_path, architecture, config):
    first = attach(tiny_model(architecture), **config)
    first.save_pretrained(tmp_path / "first")
    second = LoraEnsemble.from_pretrained(tiny_model(architecture), tmp_path / "first")
    assert second.paths == first.paths
    state = second.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in first.state_dict().items())
    assert torch.equal(second.sequence_logprob(batch), first.sequence_logprob(batch))
    for name in ("num_particles", "rank", "lora_alpha", "use_rslora", "init", "seed"):
        assert getattr(second.config, name) == getattr(first.config, name)
    second.save_pretrained(tmp_path / "second")
    assert contents(tmp_path / "second") == contents(tmp_path / "first")


def test_the_folder_is_the_one_that_peft_and_vllm_expect(saved, tiny_model):
    assert sorted(contents(saved)) == [
        ENSEMBLE_FILE,
        *(f"p{k:03d}/{name}" for k in range(K) for name in (CONFIG_FILE, TENSORS_FILE)),
    ]
    config = json.loads((saved / "p001" / CONFIG_FILE).read_text())
    assert (config["peft_type"], config["task_type"], config["bias"]) == ("LORA", "CAUSAL_LM", "none")
    assert (config["r"], config["lora_alpha"], config["modules_to_save"]) == (3, 6, None)
    with safe_open(saved / "p001" / TENSORS_FILE, framework="pt") as file:
        base = json.dumps(fingerprint(tiny_model("llama")))
        assert file.metadata() == {"format": "pt", "particle": "1/3", "base": base}
        assert file.get_slice(Q0_A).get_shape() == [3, 32]
        assert len(file.keys()) == 2 * 21
    ensemble = json.loads((saved / ENSEMBLE_FILE).read_text())
    assert ensemble["particles"] == ["p000", "p001", "p002"]
    assert ensemble["alpha"] == 0.7
    assert ensemble["base"] == fingerprint(tiny_model("llama"))
    assert {name: sha256_of(saved / name) for name in ensemble["sha256"]} == ensemble["sha256"]
    assert len(ensemble["sha256"]) == 2 * K


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_peft_reads_our_folder_without_a_warning(tiny_model, load_peft, tmp_path, architecture):
    """Of missing keys, or of a fan_in_fan_out that does not fit GPT-2's transposed maps."""
    attach(tiny_model(architecture)).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "p000" / CONFIG_FILE).read_text())
    assert config["fan_in_fan_out"] == (architecture == "gpt2")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        load_peft(tiny_model(architecture), tmp_path / "p000")
    assert not [str(warning.message) for warning in caught if warning.category is not FutureWarning]


def test_one_of_our_particles_loads_alone(saved, tiny_model, batch):
    alone = LoraEnsemble.from_pretrained(tiny_model("llama"), saved / "p001")
    together = LoraEnsemble.from_pretrained(tiny_model("llama"), saved)
    assert alone.config.num_particles == 1
    torch.testing.assert_close(alone.sequence_logprob(batch), together.sequence_logprob(batch)[1:2], rtol=0, atol=2e-5)


# ---------------------------------------------------------------------- not a folder of adapters


def test_a_folder_that_is_not_there_is_refused(llama, tmp_path):
    refused(llama, tmp_path / "nowhere", tmp_path / "nowhere", "no such folder")


def test_a_file_in_place_of_a_folder_is_refused(llama, saved):
    refused(llama, saved / ENSEMBLE_FILE, ENSEMBLE_FILE, "no such folder")


def test_a_folder_without_adapters_is_refused(llama, tmp_path):
    (tmp_path / "notes").mkdir()
    refused(llama, tmp_path, tmp_path, ENSEMBLE_FILE, CONFIG_FILE)


def test_a_model_that_carries_an_ensemble_is_refused_before_anything_is_read(saved, llama):
    attach(llama)
    with pytest.raises(ValueError, match="already carries an ensemble"):
        LoraEnsemble.from_pretrained(llama, saved.parent / "nowhere")


def test_read_stacks_in_the_order_of_the_names(tiny_model, tmp_path):
    write_peft(tiny_model("llama"), tmp_path, names=("b", "a", "c"))
    adapters = read(tmp_path).adapters
    for k, name in enumerate("abc"):
        tensors = load_file(tmp_path / name / TENSORS_FILE)
        assert torch.equal(adapters["model.layers.0.self_attn.q_proj"][0][k], tensors[Q0_A])
        assert re.match(r"base_model\.model\.", next(iter(tensors)))
