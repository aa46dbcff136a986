"""Adapter folders: PEFT's are read as PEFT reads them, ours come back bit for bit, and what is broken is named.

Layout: K particles.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import pickle
import re
import shutil
import struct
import warnings
from pathlib import Path

import peft
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from renyi_engine import EnsembleConfig, LoraEnsemble
from renyi_engine.core import files
from renyi_engine.core.files import inside, sha256_of
from renyi_engine.ensemble import adapter_folder
from renyi_engine.ensemble.adapter_folder import (
    CONFIG_FILE,
    ENSEMBLE_FILE,
    TENSORS_FILE,
    _read_ensemble,
    num_particles,
    read,
)
from renyi_engine.ensemble.fingerprint import fingerprint

K = 3
Q0_A = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"


@pytest.fixture
def llama(tiny_model):
    return tiny_model("llama")


@pytest.fixture
def batch(make_batch):
    return make_batch([5, 8, 6])


def attach(model, num_particles=K, **config):
    """An ensemble whose particles differ by more than rounding."""
    config = {"num_particles": num_particles, "rank": 3, "lora_alpha": 6, "init": "spread"} | config
    ensemble = LoraEnsemble.attach(model, EnsembleConfig(**config))
    generator = torch.Generator().manual_seed(11)
    with torch.no_grad():
        for parameter in ensemble.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return ensemble


@pytest.fixture
def saved(tiny_model, tmp_path):
    """A sound folder of three particles, to be broken."""
    attach(tiny_model("llama")).save_pretrained(tmp_path / "saved", alpha=0.7)
    return tmp_path / "saved"


def write_peft(model, folder, names=("a", "b", "c"), *, seed=0, **config):
    """PEFT's own adapters, random and different, in folder/a, folder/b, ..."""
    config = {
        "r": 4,
        "lora_alpha": 6,
        "target_modules": ["q_proj", "v_proj", "up_proj"],
        "task_type": "CAUSAL_LM",
    } | config
    with torch.random.fork_rng(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about GPT-2's fan_in_fan_out
        torch.manual_seed(seed)
        adapted = peft.get_peft_model(model, peft.LoraConfig(**config), adapter_name=names[0])
        for name in names[1:]:
            adapted.add_adapter(name, peft.LoraConfig(**config))
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                parameter.data.normal_(0.0, 0.1)
        adapted.save_pretrained(folder)
    return folder


def edit_json(path, **changes):
    """Set entries; ensemble.json gets a new digest, so that it is not refused for its digest."""
    content = json.loads(path.read_text())
    content.update(changes)
    if path.name == ENSEMBLE_FILE:
        content.pop("digest", None)
        content["digest"] = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    path.write_text(json.dumps(content))


def edit_tensors(folder, **changes):
    """Set tensors (None: take away), and let ensemble.json agree, so that the checksum is not what refuses."""
    tensors = load_file(folder / TENSORS_FILE)
    tensors.update(changes)
    save_file({k: v for k, v in tensors.items() if v is not None}, folder / TENSORS_FILE, metadata={"format": "pt"})
    renew_checksums(folder.parent)


def renew_checksums(directory):
    ensemble = directory / ENSEMBLE_FILE
    if ensemble.is_file():
        names = json.loads(ensemble.read_text())["sha256"]
        edit_json(ensemble, sha256={name: sha256_of(directory / name) for name in names})


def refused(model, folder, *named):
    """Loading raises a one-line ValueError that names all of `named`, and leaves the model without a trace."""
    with pytest.raises(ValueError) as refusal:
        LoraEnsemble.from_pretrained(model, folder)
    message = str(refusal.value)
    assert "\n" not in message
    for name in named:
        assert str(name) in message
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert all(parameter.requires_grad for parameter in model.parameters())


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
    assert [num_particles(folder) for folder in (saved, tmp_path / "two", tmp_path / "two" / "a")] == [K, 2, 1]


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
    refused(llama, tmp_path, tmp_path / "c", "rank is 2 beside 4")


def test_particles_whose_tensors_disagree_in_rank_are_refused(llama, tiny_model, tmp_path):
    write_peft(tiny_model("llama"), tmp_path, names=("a", "b"))
    write_peft(tiny_model("llama"), tmp_path, names=("c", "d"), r=2)
    for name in "cd":
        shutil.copy(tmp_path / "a" / CONFIG_FILE, tmp_path / name / CONFIG_FILE)
    refused(llama, tmp_path, "model.layers.0.", "lora_A has shapes [[4, 32], [4, 32], [2, 32], [2, 32]]")
    for name in "ab":
        shutil.rmtree(tmp_path / name)
    refused(llama, tmp_path, "model.layers.0.self_attn.q_proj.lora_A", "[2, 32] instead of [4, 32]")


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


def contents(directory):
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


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


def test_saving_fewer_particles_leaves_no_stale_one(saved, tiny_model):
    attach(tiny_model("llama"), 2).save_pretrained(saved)
    assert sorted(path.name for path in saved.iterdir()) == [ENSEMBLE_FILE, "p000", "p001"]
    assert LoraEnsemble.from_pretrained(tiny_model("llama"), saved).config.num_particles == 2


def test_saving_over_an_ensemble_keeps_what_is_not_its_own(saved, tiny_model):
    (saved / "notes.txt").write_text("mine")
    (saved / "p007").mkdir()
    attach(tiny_model("llama"), 1).save_pretrained(saved)
    assert sorted(path.name for path in saved.iterdir()) == [ENSEMBLE_FILE, "notes.txt", "p000", "p007"]


def test_saving_over_a_folder_whose_list_leads_out_of_it_removes_nothing_there(saved, tiny_model):
    outside = saved.parent / "outside"
    outside.mkdir()
    (outside / "precious").write_text("x")
    edit_json(saved / ENSEMBLE_FILE, particles=["../outside"])
    with pytest.raises(ValueError, match="outside"):
        attach(tiny_model("llama"), 1).save_pretrained(saved)
    assert (outside / "precious").is_file()


# ---------------------------------------------------------------------- damage


def test_a_missing_tensor_is_named(saved, llama):
    edit_tensors(saved / "p001", **{Q0_A: None})
    refused(llama, saved, saved / "p001", "missing", "model.layers.0.self_attn.q_proj.lora_A")


@pytest.mark.parametrize("which", [["p001"], ["p000", "p001", "p002"]], ids=["one particle", "all particles"])
def test_a_missing_pair_is_named(saved, llama, which):
    for name in which:
        edit_tensors(saved / name, **{Q0_A: None, Q0_A.replace("lora_A", "lora_B"): None})
    refused(llama, saved, "missing", "model.layers.0.self_attn.q_proj")


@pytest.mark.parametrize("which", [["p002"], ["p000", "p001", "p002"]], ids=["one particle", "all particles"])
def test_an_extra_pair_is_named(saved, llama, which):
    extra = "base_model.model.model.layers.3.self_attn.q_proj.lora_{}.weight"
    for name in which:
        edit_tensors(saved / name, **{extra.format("A"): torch.zeros(3, 32), extra.format("B"): torch.zeros(32, 3)})
    refused(llama, saved, "extra", "model.layers.3.self_attn.q_proj")


@pytest.mark.parametrize(
    "key",
    [
        "base_model.model.lm_head.weight",
        "base_model.model.model.embed_tokens.lora_embedding_A",
        "base_model.model.model.layers.0.self_attn.q_proj.lora_magnitude_vector",
        "model.layers.0.self_attn.q_proj.lora_A.weight",
        Q0_A + "2",
    ],
)
def test_a_tensor_that_is_no_lora_matrix_is_named(saved, llama, key):
    edit_tensors(saved / "p000", **{key: torch.zeros(3, 32)})
    refused(llama, saved, saved / "p000", key)


@pytest.mark.parametrize("shape", [(32,), (3, 32, 1), (1, 3, 32), ()], ids=str)
def test_a_tensor_that_is_no_matrix_is_named(saved, llama, shape):
    edit_tensors(saved / "p000", **{Q0_A: torch.zeros(shape)})
    refused(llama, saved, saved / "p000", Q0_A)


@pytest.mark.parametrize("which", [["p001"], ["p000", "p001", "p002"]], ids=["one particle", "all particles"])
@pytest.mark.parametrize("shape", [(3, 31), (4, 32), (32, 3)], ids=str)
def test_a_misshapen_tensor_is_named(saved, llama, which, shape):
    for name in which:
        edit_tensors(saved / name, **{Q0_A: torch.zeros(shape)})
    refused(llama, saved, "model.layers.0.self_attn.q_proj.lora_A", list(shape))


def test_adapters_of_a_model_of_another_size_are_refused(saved, tiny_model):
    wider = tiny_model("llama", hidden_size=64)
    refused(wider, saved, "another base model", "model.layers.0.self_attn.q_proj.lora_A: [3, 32] instead of [3, 64]")


def test_adapters_of_another_architecture_are_refused(saved, tiny_model):
    refused(tiny_model("gpt2"), saved, "target_modules")
    # a deeper model is matched by more maps than there are tensors for
    refused(tiny_model("llama", num_hidden_layers=4), saved, "missing", "model.layers.3.")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_tensor_that_is_not_finite_is_named(saved, llama, value):
    tensor = load_file(saved / "p002" / TENSORS_FILE)[Q0_A]
    tensor[1, 7] = value
    edit_tensors(saved / "p002", **{Q0_A: tensor})
    refused(llama, saved, saved / "p002", Q0_A)


@pytest.mark.parametrize("file", [TENSORS_FILE, CONFIG_FILE])
@pytest.mark.parametrize("where", [0.05, 0.5, 0.999])
def test_one_flipped_bit_is_seen_and_its_file_named(saved, llama, file, where):
    path = saved / "p001" / file
    content = bytearray(path.read_bytes())
    content[int(where * len(content))] ^= 1
    path.write_bytes(content)
    refused(llama, saved, path, "sha256")


@pytest.mark.parametrize("keep", [0, 5, 100, -1])
def test_a_truncated_file_is_named(saved, llama, keep):
    path = saved / "p000" / TENSORS_FILE
    path.write_bytes(path.read_bytes()[:keep])
    refused(llama, saved, path, "sha256")
    renew_checksums(saved)
    refused(llama, saved, path, "not a whole safetensors file")


def garbage_headers():
    def file(header: bytes, data: bytes = b"") -> bytes:
        return struct.pack("<Q", len(header)) + header + data

    entry = lambda start, end: {"dtype": "F32", "shape": [2], "data_offsets": [start, end]}
    return {
        "noise": bytes(range(256)),
        "bomb": struct.pack("<Q", 2**60) + b"{}",
        "not json": file(b"{not json"),
        "overlap": file(json.dumps({"a": entry(0, 8), "b": entry(4, 12)}).encode(), bytes(12)),
        "beyond": file(json.dumps({"a": entry(0, 8)}).encode(), bytes(4)),
    }


@pytest.mark.parametrize("kind", garbage_headers())
def test_a_garbage_header_is_one_line_that_names_the_file(saved, llama, kind):
    path = saved / "p000" / TENSORS_FILE
    path.write_bytes(garbage_headers()[kind])
    renew_checksums(saved)
    refused(llama, saved, path, "not a whole safetensors file")


def test_an_empty_tensors_file_is_refused(saved, llama):
    for k in range(K):
        save_file({}, saved / f"p{k:03d}" / TENSORS_FILE)
    renew_checksums(saved)
    refused(llama, saved, "missing")


@pytest.mark.parametrize("file", [TENSORS_FILE, CONFIG_FILE])
def test_a_missing_file_is_named(saved, llama, file):
    (saved / "p002" / file).unlink()
    refused(llama, saved, saved / "p002" / file)


def test_a_missing_particle_is_named(saved, llama):
    shutil.rmtree(saved / "p001")
    refused(llama, saved, saved / "p001")


@pytest.mark.parametrize("content", ["", "{", "\x00\x01", "nonsense"])
@pytest.mark.parametrize("file", [ENSEMBLE_FILE, f"p001/{CONFIG_FILE}"])
def test_broken_json_is_named(saved, llama, file, content):
    (saved / file).write_text(content)
    renew_checksums(saved) if file != ENSEMBLE_FILE else None
    refused(llama, saved, saved / file)


@pytest.mark.parametrize(
    "content", [{}, [], "text", 3, None, {"particles": ["p000"]}, {"particles": 3, "sha256": {}}], ids=str
)
def test_an_ensemble_file_of_another_form_is_named(saved, llama, content):
    (saved / ENSEMBLE_FILE).write_text(json.dumps(content))
    refused(llama, saved, saved / ENSEMBLE_FILE)


@pytest.mark.parametrize("content", [[], "text", 3, None], ids=str)
def test_an_adapter_config_of_another_form_is_named(saved, llama, content):
    path = saved / "p000" / CONFIG_FILE
    path.write_text(json.dumps(content))
    renew_checksums(saved)
    refused(llama, saved, path.parent)


@pytest.mark.parametrize(
    ("key", "value"),
    [("r", "8"), ("r", 0), ("r", 2.5), ("r", None), ("r", True), ("lora_alpha", "x"), ("lora_alpha", None),
     ("lora_alpha", -1), ("lora_alpha", 10**400), ("lora_alpha", float("nan")), ("use_rslora", "yes"),
     ("target_modules", 3), ("target_modules", [3]), ("layers_to_transform", "x"), ("layers_to_transform", [9]),
     ("layers_to_transform", [[0]]), ("layers_to_transform", True)],
)  # fmt: skip
def test_an_adapter_config_with_wrong_values_is_refused(saved, llama, key, value):
    for k in range(K):
        edit_json(saved / f"p{k:03d}" / CONFIG_FILE, **{key: value})
    renew_checksums(saved)
    refused(llama, saved, saved, f"{key}: ")


@pytest.mark.parametrize("pattern", ["(", r"(\w|\w\w|[\w.])+[!?]", "x" * 20_000], ids=["broken", "endless", "long"])
def test_a_regular_expression_of_a_folder_neither_hangs_nor_breaks_the_process(saved, llama, pattern):
    for k in range(K):
        edit_json(saved / f"p{k:03d}" / CONFIG_FILE, target_modules=pattern)
    renew_checksums(saved)
    refused(llama, saved, saved, "target_modules: ")


def test_names_of_a_peft_folder_that_match_nothing_are_passed_over_as_peft_does(tiny_model, batch, tmp_path):
    """The tensors say what is adapted: none of them may be missing, none too many."""
    write_peft(tiny_model("llama"), tmp_path, target_modules=["q_proj", "v_proj", "query"])
    assert len(LoraEnsemble.from_pretrained(tiny_model("llama"), tmp_path).paths) == 6


@pytest.mark.parametrize("alpha", [-1, float("nan"), float("inf"), "0.8", True, [0.8], 10**400])
def test_an_alpha_that_is_none_is_refused(saved, llama, tiny_model, alpha):
    edit_json(saved / ENSEMBLE_FILE, alpha=alpha)
    refused(llama, saved, saved / ENSEMBLE_FILE, "alpha")


@pytest.mark.parametrize("alpha", [-1.0, float("nan")])
def test_an_alpha_that_is_none_is_not_saved(saved, tiny_model, alpha):
    before = contents(saved)
    with pytest.raises(ValueError, match="alpha"):
        attach(tiny_model("llama")).save_pretrained(saved, alpha=alpha)
    assert contents(saved) == before


def test_an_edited_list_is_refused_with_the_way_out(saved, llama):
    path = saved / ENSEMBLE_FILE
    path.write_text(path.read_text().replace('"alpha": 0.7', '"alpha": 0.8'))
    refused(llama, saved, path, "digest", "--alpha")


def test_an_ensemble_of_the_earlier_format_loads(saved, tiny_model):
    content = json.loads((saved / ENSEMBLE_FILE).read_text())
    del content["digest"]
    (saved / ENSEMBLE_FILE).write_text(json.dumps(content | {"format": 1}))
    assert LoraEnsemble.from_pretrained(tiny_model("llama"), saved).alpha == 0.7
    (saved / ENSEMBLE_FILE).write_text(json.dumps(content | {"format": 3}))
    refused(tiny_model("llama"), saved, "format 3")


@pytest.mark.parametrize("file", [TENSORS_FILE, CONFIG_FILE])
def test_a_particle_that_is_not_listed_is_not_left_out_unnoticed(saved, llama, file):
    (saved / "p003").mkdir()
    shutil.copy(saved / "p000" / file, saved / "p003" / file)
    refused(llama, saved, "p003", ENSEMBLE_FILE)


# ---------------------------------------------------------------------- particles whose ensemble.json is lost


@pytest.fixture
def bare(saved):
    (saved / ENSEMBLE_FILE).unlink()
    return saved


def test_particles_without_their_list_load_whole_with_a_warning(bare, tiny_model):
    with pytest.warns(UserWarning, match=f"there is no {ENSEMBLE_FILE}"):
        ensemble = LoraEnsemble.from_pretrained(tiny_model("llama"), bare)
    assert (ensemble.config.num_particles, ensemble.alpha) == (K, None)


@pytest.mark.parametrize("lost", ["p000", "p001", "p002"])
@pytest.mark.parametrize("how", ["folder", "config", "both files"])
def test_a_lost_particle_is_seen_without_the_list_too(bare, llama, lost, how):
    if how == "folder":
        shutil.rmtree(bare / lost)
    else:
        (bare / lost / CONFIG_FILE).unlink()
        if how == "both files":
            (bare / lost / TENSORS_FILE).unlink()
    refused(llama, bare, bare)


def test_particles_in_another_order_are_seen(bare, llama):
    (bare / "p000").rename(bare / "p009")
    (bare / "p001").rename(bare / "p000")
    (bare / "p009").rename(bare / "p001")
    refused(llama, bare, bare / "p000", "particle 1/3")


def test_an_adapter_of_another_name_beside_particles_is_refused(bare, llama):
    shutil.copytree(bare / "p001", bare / "mine")
    refused(llama, bare, "mine beside them")


def test_particles_under_other_names_are_a_plain_set(bare, tiny_model):
    (bare / "p001").rename(bare / "b")
    (bare / "p000").rename(bare / "a")
    shutil.rmtree(bare / "p002")
    assert LoraEnsemble.from_pretrained(tiny_model("llama"), bare).config.num_particles == 2


def test_a_list_that_is_a_dangling_link_is_not_taken_for_no_list(bare, llama):
    (bare / ENSEMBLE_FILE).symlink_to(bare / "gone")
    refused(llama, bare, ENSEMBLE_FILE)


def test_adapters_below_one_that_is_loaded_are_mentioned(tiny_model, tmp_path):
    """PEFT saves its adapter "default" into the folder itself, and others into folders below."""
    write_peft(tiny_model("llama"), tmp_path, names=("default", "b"))
    with pytest.warns(UserWarning, match="those in b are not"):
        assert LoraEnsemble.from_pretrained(tiny_model("llama"), tmp_path).config.num_particles == 1


@pytest.mark.parametrize("text", ["[" * 100_000, "{", "3", '{"digest": ""}'], ids=["deep", "cut", "number", "other"])
def test_a_particle_that_says_nonsense_of_its_base_is_refused(bare, llama, text):
    for k in range(K):
        path = bare / f"p{k:03d}" / TENSORS_FILE
        save_file(load_file(path), path, metadata={"format": "pt", "base": text})
    refused(llama, bare, bare / "p000" / TENSORS_FILE, "base")


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


# ---------------------------------------------------------------------- what is replaced


def tree(directory):
    return {path: path.read_bytes() if path.is_file() else None for path in directory.rglob("*")}


@pytest.mark.parametrize(
    "kind", ["another name", "more in it", "a folder in it", "no particle", "adapter of peft", "a link", "a file"]
)
@pytest.mark.parametrize("listed", [True, False])
def test_saving_never_removes_what_is_no_particle_written_here(saved, tiny_model, kind, listed):
    """Whether ensemble.json lists it, or it stands under the name of a particle to be written."""
    precious = saved / ("precious" if kind == "another name" else "p001")
    if kind == "another name":
        (saved / "p001").rename(precious)
    elif kind == "more in it":
        (precious / "thesis.txt").write_text("years of work")
    elif kind == "a folder in it":
        (precious / "thesis").mkdir()
    elif kind == "a link":
        precious.rename(saved / "real")
        precious.symlink_to(saved / "real")
    else:
        shutil.rmtree(precious)
        if kind == "a file":
            precious.write_text("years of work")
        elif kind == "adapter of peft":
            write_peft(tiny_model("llama"), precious, names=("default",))
            (precious / "README.md").unlink()
        else:
            precious.mkdir()
            (precious / CONFIG_FILE).write_text("{}")
    if listed:
        edit_json(saved / ENSEMBLE_FILE, particles=["p000", precious.name, "p002"])
    else:
        (saved / ENSEMBLE_FILE).unlink()
        if kind == "another name":
            precious = precious.rename(saved / "p003")
    before = tree(saved)
    with pytest.raises(ValueError, match=precious.name) as refusal:
        attach(tiny_model("llama")).save_pretrained(saved)
    assert "save to another folder" in str(refusal.value)
    assert tree(saved) == before


def test_a_save_that_fails_leaves_the_ensemble_that_was_there(saved, tiny_model, monkeypatch):
    before = tree(saved)
    ensemble = attach(tiny_model("llama"), 2)
    monkeypatch.setattr(files, "sha256_of", fails_the_third_time(files.sha256_of))
    with pytest.raises(OSError, match="No space left"):
        ensemble.save_pretrained(saved)
    assert tree(saved) == before


def fails_the_third_time(function):
    calls = []

    def call(*args):
        calls.append(1)
        if len(calls) == 3:
            raise OSError(errno.ENOSPC, "No space left on device")
        return function(*args)

    return call


@pytest.mark.parametrize("renamed", [0, 1, 2])
def test_a_save_that_was_killed_can_be_done_again(saved, tiny_model, monkeypatch, renamed):
    """Between the removal of the old particles and the new list."""
    ensemble = attach(tiny_model("llama"), 3)

    class Killed(BaseException):
        pass

    def kill(self, target, rename=Path.rename, calls=[]):  # noqa: B006
        if len(calls) == renamed:
            raise Killed
        calls.append(1)
        return rename(self, target)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(Path, "rename", kill)
        patch.setattr(adapter_folder, "_remove_temporary", lambda path: None)
        ensemble.save_pretrained(saved)
    assert list(saved.glob(".particles-*"))
    ensemble.save_pretrained(saved, alpha=0.7)
    assert sorted(path.name for path in saved.iterdir()) == [ENSEMBLE_FILE, "p000", "p001", "p002"]
    assert LoraEnsemble.from_pretrained(tiny_model("llama"), saved).alpha == 0.7


def test_a_folder_that_only_looks_like_a_leftover_stays(saved, tiny_model):
    for name in ("p000", "notes"):
        (saved / ".particles-x" / name).mkdir(parents=True)
        (saved / ".particles-x" / name / "thesis.txt").write_text("years of work")
    before = tree(saved / ".particles-x")
    attach(tiny_model("llama")).save_pretrained(saved)
    assert tree(saved / ".particles-x") == before


def test_a_particle_listed_twice_is_refused(saved, llama):
    """One flipped bit makes p000 of p001."""
    edit_json(saved / ENSEMBLE_FILE, particles=["p000", "p000", "p002"])
    refused(llama, saved, "p000")


def test_a_flipped_bit_in_the_list_of_files_is_refused_or_changes_nothing(saved):
    """Nothing: where white space becomes other white space."""
    path = saved / ENSEMBLE_FILE
    content = path.read_bytes()
    sound = json.loads(content)
    for position in range(0, len(content), 3):
        damaged = bytearray(content)
        damaged[position] ^= 1 << position % 8
        path.write_bytes(damaged)
        try:
            _read_ensemble(path)
        except ValueError:
            continue
        assert json.loads(damaged) == sound, f"byte {position}: {bytes(damaged[max(0, position - 9) :][:20])}"


def test_a_particle_without_a_checksum_is_refused(saved, llama):
    """A list that leaves a file out would let a damaged one through."""
    checksums = json.loads((saved / ENSEMBLE_FILE).read_text())["sha256"]
    del checksums[f"p001/{TENSORS_FILE}"]
    edit_json(saved / ENSEMBLE_FILE, sha256=checksums)
    refused(llama, saved, f"p001/{TENSORS_FILE}")


# ---------------------------------------------------------------------- pickles


class Marker:
    """Unpickled, it creates a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize(
    "name", ["adapter_model.bin", "adapter_model.pt", "weights.pth", "weights.pkl", "weights.ckpt"]
)
def test_pickled_weights_are_refused_unread(saved, llama, tmp_path, name):
    marker = tmp_path / "marker"
    (saved / ENSEMBLE_FILE).unlink()
    (saved / "p001" / TENSORS_FILE).unlink()
    path = saved / "p001" / name
    torch.save(Marker(marker), path)
    refused(llama, saved, path, "pickled", TENSORS_FILE)
    assert not marker.exists()
    torch.load(path, weights_only=False)
    assert marker.exists(), "the pickle is a dud: nothing was tested"


def test_a_pickle_under_the_name_of_safetensors_is_refused_unread(saved, llama, tmp_path):
    marker = tmp_path / "marker"
    path = saved / "p001" / TENSORS_FILE
    path.write_bytes(pickle.dumps(Marker(marker)))
    renew_checksums(saved)
    refused(llama, saved, path, "not a whole safetensors file")
    assert not marker.exists()


# ---------------------------------------------------------------------- names and links


@pytest.mark.parametrize("name", ["../x", "..", ".", "", "/abs", "a/b", "p000/../p001", "a\\b", "p000/"])
def test_a_particle_name_that_is_no_plain_name_is_refused(saved, llama, name):
    shutil.copytree(saved / "p000", saved.parent / "x")  # there to be found, were it looked for
    edit_json(saved / ENSEMBLE_FILE, particles=[name])
    refused(llama, saved, repr(name))


@pytest.mark.parametrize("name", ["../x/adapter_config.json", "/etc/passwd", "p000/../../x", "p000/a/b", "p000"])
def test_a_checksum_of_a_file_elsewhere_is_refused(saved, llama, name):
    checksums = json.loads((saved / ENSEMBLE_FILE).read_text())["sha256"]
    edit_json(saved / ENSEMBLE_FILE, sha256=checksums | {name: "0" * 64})
    refused(llama, saved, name)


@pytest.mark.parametrize("listed", [True, False])
def test_a_particle_that_is_a_link_out_of_the_folder_is_refused(saved, llama, listed):
    shutil.move(saved / "p001", saved.parent / "elsewhere")
    (saved / "p001").symlink_to(saved.parent / "elsewhere")
    if not listed:
        (saved / ENSEMBLE_FILE).unlink()
    refused(llama, saved, saved / "p001", "link")


@pytest.mark.parametrize("file", [TENSORS_FILE, CONFIG_FILE])
@pytest.mark.parametrize("listed", [True, False])
def test_a_file_that_is_a_link_out_of_the_folder_is_refused(saved, llama, file, listed):
    shutil.move(saved / "p001" / file, saved.parent / "elsewhere")
    (saved / "p001" / file).symlink_to(saved.parent / "elsewhere")
    if not listed:
        (saved / ENSEMBLE_FILE).unlink()
    refused(llama, saved, saved / "p001" / file, "link")


def test_the_folder_itself_may_be_a_link(saved, tiny_model):
    link = saved.parent / "link"
    link.symlink_to(saved)
    assert LoraEnsemble.from_pretrained(tiny_model("llama"), link).config.num_particles == K


def test_inside_takes_plain_names(tmp_path):
    assert inside(tmp_path, "p000") == tmp_path / "p000"
    (tmp_path / "p001").mkdir()
    (tmp_path / "alias").symlink_to(tmp_path / "p001")
    assert inside(tmp_path, "alias") == tmp_path / "alias"


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


# ---------------------------------------------------------------------- the hub's cache


@pytest.fixture
def cached(saved, tmp_path):
    """`saved` as the hub's client keeps it: every file in blobs, and links to them under the commit."""
    repository = tmp_path / "hub" / "models--someone--adapters"
    (repository / "blobs").mkdir(parents=True)
    snapshot = repository / "snapshots" / "0a1b2c"
    for path in [path for path in saved.rglob("*") if path.is_file()]:
        blob = repository / "blobs" / sha256_of(path)
        shutil.copy(path, blob)
        link = snapshot / path.relative_to(saved)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(os.path.relpath(blob, link.parent))
    return snapshot


@pytest.mark.parametrize("form", ["ensemble", "particles", "one particle", "behind a link"])
def test_adapters_in_the_hubs_cache_load(cached, saved, tiny_model, form):
    folder = cached
    if form == "particles":
        (cached / ENSEMBLE_FILE).unlink()
    elif form == "one particle":
        folder = cached / "p000"
    elif form == "behind a link":
        folder = cached.parents[2].parent / "link"
        folder.symlink_to(cached.parents[2])
        folder = folder / cached.relative_to(cached.parents[2])
    ours = LoraEnsemble.from_pretrained(tiny_model("llama"), folder).stacked()
    for path, pair in read(saved).adapters.items():
        assert all(torch.equal(a[: len(b)], b) for a, b in zip(pair, ours[path], strict=True))


@pytest.mark.parametrize(
    "target", ["outside", "another repository", "above the blobs", "below the blobs", "a folder", "nothing"]
)
@pytest.mark.parametrize("listed", [True, False])
def test_a_link_in_the_hubs_cache_to_anything_but_a_blob_of_its_repository_is_refused(cached, llama, target, listed):
    repository = cached.parents[1]
    link = cached / "p001" / TENSORS_FILE
    content = link.read_bytes()
    places = {
        "outside": repository.parents[1] / "elsewhere",
        "another repository": repository.parent / "models--someone--else" / "blobs" / "0123",
        "above the blobs": repository / "0123",
        "below the blobs": repository / "blobs" / "more" / "0123",
        "a folder": repository / "blobs" / "folder" / "x",
        "nothing": repository / "blobs" / "none" / "x",
    }
    place = places[target]
    place.parent.mkdir(parents=True, exist_ok=True)
    place.write_bytes(content)
    link.unlink()
    link.symlink_to(place.parent if target == "a folder" else place)
    if target == "nothing":
        place.unlink()
    if not listed:
        (cached / ENSEMBLE_FILE).unlink()
    refused(llama, cached, link, "link")


def test_blobs_beside_a_folder_that_is_no_cache_are_elsewhere(cached, llama):
    repository = cached.parents[1]
    moved = repository.rename(repository.with_name("adapters"))
    refused(llama, moved / "snapshots" / "0a1b2c", "link")


def test_saving_into_the_hubs_cache_never_writes_through_a_link(cached, tiny_model):
    blobs = contents(cached.parents[1] / "blobs")
    attach(tiny_model("llama"), 1).save_pretrained(cached)
    assert contents(cached.parents[1] / "blobs") == blobs
