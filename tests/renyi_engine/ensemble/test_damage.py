"""What is damaged or missing in an adapter folder is named, in one line; pickles are refused unread."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import struct

import pytest
import torch
from safetensors.torch import load_file, save_file

from renyi_engine import LoraEnsemble
from renyi_engine.ensemble.adapter_folder import CONFIG_FILE, ENSEMBLE_FILE, TENSORS_FILE

from .folders import Q0_A, K, edit_json, edit_tensors, refused, renew_checksums, write_peft

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
    refused(llama, saved, "unexpected", "model.layers.3.self_attn.q_proj")


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
