"""Adapters that PEFT wrote are read as PEFT reads them; what is no plain LoRA is refused.

Layout: K particles.
"""

from __future__ import annotations

import json
import shutil

import peft
import pytest
import torch
from safetensors.torch import load_file

from renyi_engine import LoraEnsemble
from renyi_engine.ensemble.adapter_folder import CONFIG_FILE, TENSORS_FILE, particle_weights

from .folders import Q0_A, K, edit_json, edit_tensors, refused, write_peft

# ---------------------------------------------------------------------- folders that PEFT wrote


@pytest.mark.parametrize(
    ("architecture", "config"),
    [
        ("llama", {}),
        ("llama", {"use_rslora": True}),
        ("llama", {"target_modules": "all-linear", "r": 1}),
        ("llama", {"target_modules": r".*\.[12]\.mlp\.(up|down)_proj"}),
        ("llama", {"layers_to_transform": [1, 2]}),
        ("llama", {"layers_to_transform": 2}),
        ("llama", {"target_modules": ["model.layers.0.self_attn.q_proj", "model.layers.2.mlp.up_proj"]}),
        ("phi3", {"target_modules": ["qkv_proj", "down_proj"], "lora_alpha": 5}),
        ("gpt2", {"target_modules": ["c_attn", "c_proj", "c_fc"], "fan_in_fan_out": True}),
        ("gpt2", {"target_modules": ["c_attn"], "use_rslora": True, "fan_in_fan_out": True}),
    ],
    ids=str,
)
def test_three_adapters_that_peft_wrote_are_an_ensemble(
    tiny_model, load_peft, naive_logprob, batch, tmp_path, architecture, config
):
    base = tiny_model(architecture)
    write_peft(tiny_model(architecture), tmp_path, **config)
    ensemble = LoraEnsemble.from_pretrained(tiny_model(architecture), tmp_path)
    truth = torch.stack([naive_logprob(load_peft(base, tmp_path / name), batch) for name in "abc"])
    assert (truth.max(0).values - truth.min(0).values).min() > 0.01, "the particles are too alike to test anything"
    torch.testing.assert_close(ensemble.sequence_logprob(batch), truth, rtol=0, atol=2e-5)
    assert ensemble.config.num_particles == 3
    assert ensemble.config.rank == config.get("r", 4)
    assert ensemble.config.use_rslora == config.get("use_rslora", False)


def test_one_adapter_folder_is_an_ensemble_of_one(tiny_model, load_peft, naive_logprob, batch, tmp_path):
    write_peft(tiny_model("llama"), tmp_path, names=("default",))
    assert (tmp_path / CONFIG_FILE).is_file()
    ensemble = LoraEnsemble.from_pretrained(tiny_model("llama"), str(tmp_path))
    truth = naive_logprob(load_peft(tiny_model("llama"), tmp_path), batch)
    torch.testing.assert_close(ensemble.sequence_logprob(batch), truth[None], rtol=0, atol=2e-5)


def test_particles_are_counted_without_reading_them(tiny_model, saved, tmp_path):
    """In an ensemble, in folders that PEFT wrote, and in a single one of those."""
    write_peft(tiny_model("llama"), tmp_path / "two", names=("a", "b"))
    for tensors in tmp_path.rglob(TENSORS_FILE):
        tensors.unlink()
    folders = (saved, tmp_path / "two", tmp_path / "two" / "a")
    assert [len(particle_weights(folder)) for folder in folders] == [K, 2, 1]


def test_bf16_adapters_are_read_into_fp32(tiny_model, load_peft, naive_logprob, batch, tmp_path):
    write_peft(tiny_model("llama"), tmp_path)
    for name in "abc":
        tensors = {key: value.bfloat16() for key, value in load_file(tmp_path / name / TENSORS_FILE).items()}
        edit_tensors(tmp_path / name, **tensors)
    ensemble = LoraEnsemble.from_pretrained(tiny_model("llama"), tmp_path)
    assert {p.dtype for p in ensemble.parameters()} == {torch.float32}
    truth = torch.stack([naive_logprob(load_peft(tiny_model("llama"), tmp_path / name), batch) for name in "abc"])
    torch.testing.assert_close(ensemble.sequence_logprob(batch), truth, rtol=0, atol=2e-5)


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_an_adapter_that_changes_its_base_is_refused_or_run_as_peft_runs_it(
    tiny_model, load_peft, naive_logprob, batch, tmp_path, init
):
    """PiSSA and OLoRA subtract their start from the base weights, and PEFT does so again on loading."""
    write_peft(tiny_model("llama"), tmp_path, names=("default",), init_lora_weights=init)
    truth = naive_logprob(load_peft(tiny_model("llama"), tmp_path), batch)
    try:
        ensemble = LoraEnsemble.from_pretrained(tiny_model("llama"), tmp_path)
    except ValueError:
        refused(tiny_model("llama"), tmp_path, "init_lora_weights")
        return
    torch.testing.assert_close(ensemble.sequence_logprob(batch), truth[None], rtol=0, atol=2e-5)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("rank_pattern", {"q_proj": 2}), ("alpha_pattern", {"q_proj": 2}), ("use_dora", True),
        ("modules_to_save", ["lm_head"]), ("bias", "all"), ("bias", "lora_only"), ("lora_bias", True),
        ("trainable_token_indices", [3]), ("target_parameters", ["weight"]), ("layer_replication", [[0, 2], [1, 3]]),
        ("exclude_modules", ["v_proj"]), ("layers_pattern", ["layers"]),
    ],
)  # fmt: skip
def test_what_a_plain_stacked_lora_cannot_be_is_refused_by_name(llama, tiny_model, tmp_path, key, value):
    write_peft(tiny_model("llama"), tmp_path)
    edit_json(tmp_path / "b" / CONFIG_FILE, **{key: value})
    refused(llama, tmp_path, tmp_path / "b" / CONFIG_FILE, key)


@pytest.mark.parametrize("config", [{"use_dora": True}, {"bias": "all"}, {"modules_to_save": ["norm"]}], ids=str)
def test_what_peft_itself_wrote_with_more_than_lora_is_refused(llama, tiny_model, tmp_path, config):
    write_peft(tiny_model("llama"), tmp_path, names=("default",), **config)
    refused(llama, tmp_path, *config)


def test_another_kind_of_adapter_is_refused(llama, tiny_model, tmp_path):
    peft.get_peft_model(tiny_model("llama"), peft.IA3Config(task_type="CAUSAL_LM")).save_pretrained(tmp_path)
    refused(llama, tmp_path, "IA3", "LORA")


@pytest.mark.parametrize("missing", ["r", "target_modules"])
def test_a_config_without_the_essentials_is_refused(llama, tiny_model, tmp_path, missing):
    """Without r, PEFT would take 8."""
    write_peft(tiny_model("llama"), tmp_path)
    content = json.loads((tmp_path / "a" / CONFIG_FILE).read_text())
    del content[missing]
    (tmp_path / "a" / CONFIG_FILE).write_text(json.dumps(content))
    refused(llama, tmp_path, tmp_path / "a" / CONFIG_FILE, missing)


@pytest.mark.parametrize(
    ("key", "value", "named"),
    [
        ("lora_alpha", 7, "lora_alpha"),
        ("use_rslora", True, "use_rslora"),
        ("target_modules", ["q_proj"], "target_modules"),
    ],
)
def test_particles_that_disagree_in_config_are_refused(llama, tiny_model, tmp_path, key, value, named):
    write_peft(tiny_model("llama"), tmp_path)
    edit_json(tmp_path / "c" / CONFIG_FILE, **{key: value})
    refused(llama, tmp_path, tmp_path / "c", named, "must agree")


def test_particles_that_disagree_in_rank_are_refused(llama, tiny_model, tmp_path):
    write_peft(tiny_model("llama"), tmp_path, names=("a", "b"))
    write_peft(tiny_model("llama"), tmp_path, names=("c", "d"), r=2)
    refused(llama, tmp_path, tmp_path / "c", "r is 2 beside 4")


def test_particles_whose_tensors_disagree_in_rank_are_refused(llama, tiny_model, tmp_path):
    write_peft(tiny_model("llama"), tmp_path, names=("a", "b"))
    write_peft(tiny_model("llama"), tmp_path, names=("c", "d"), r=2)
    for name in "cd":
        shutil.copy(tmp_path / "a" / CONFIG_FILE, tmp_path / name / CONFIG_FILE)
    refused(llama, tmp_path, "model.layers.0.", "lora_A has shapes [[4, 32], [4, 32], [2, 32], [2, 32]]")
    for name in "ab":
        shutil.rmtree(tmp_path / name)
    refused(llama, tmp_path, "model.layers.0.self_attn.q_proj.lora_A", "[2, 32] instead of [4, 32]")


# ---------------------------------------------------------------------- types of numbers


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.int8, torch.complex64], ids=str)
def test_numbers_of_another_kind_are_refused_by_their_type(saved, llama, dtype):
    tensor = load_file(saved / "p001" / TENSORS_FILE)[Q0_A]
    edit_tensors(saved / "p001", **{Q0_A: tensor.to(dtype)})
    refused(llama, saved, saved / "p001", Q0_A, str(dtype).removeprefix("torch."), "bfloat16")


@pytest.mark.parametrize("value", [1e39, -1e300])
def test_numbers_that_float32_does_not_have_are_refused(saved, llama, value):
    tensor = load_file(saved / "p001" / TENSORS_FILE)[Q0_A].double()
    tensor[0, 0] = value
    edit_tensors(saved / "p001", **{Q0_A: tensor})
    refused(llama, saved, saved / "p001", Q0_A, "float32")
