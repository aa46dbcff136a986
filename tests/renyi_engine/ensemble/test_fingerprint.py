"""The fingerprint of a base: the same wherever its numbers are, another as soon as one of them is."""

from __future__ import annotations

import copy
import json
import re

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from renyi_engine import EnsembleConfig, LoraEnsemble
from renyi_engine.ensemble.fingerprint import Difference, difference, fingerprint, is_fingerprint

NOTHING = Difference([], [], [], [])
UP = "model.layers.*.mlp.up_proj.weight"


def as_dtype(model, *dtypes):
    copied = copy.deepcopy(model)
    for dtype in dtypes:
        copied = copied.to(dtype)
    return copied


def test_it_has_every_weight_and_is_the_same_twice_and_under_an_ensemble(llama):
    found = fingerprint(llama)
    assert {name.replace("*", "1") for name in found["weights"]} < set(llama.state_dict())
    assert len(found["weights"]) == 12
    LoraEnsemble.attach(llama, EnsembleConfig(num_particles=2, rank=2))
    assert fingerprint(llama) == found == json.loads(json.dumps(found))
    assert is_fingerprint(found)


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gptj", "gemma2"])
def test_one_number_anywhere_is_seen_and_named(tiny_model, architecture):
    """Also the last of a large tensor, a sign, two that change places, and a difference that bfloat16 cannot hold."""
    model = tiny_model(architecture)
    before = fingerprint(model)
    for name, tensor in list(model.state_dict().items()):
        flat = tensor.view(-1)
        for change in ("last", "sign", "places", "last bit"):
            kept = flat.clone()
            if change == "last":
                flat[-1] += 1
            elif change == "sign":
                flat.neg_()
            elif change == "places":
                flat[[-1, -2]] = flat[[-2, -1]]
            else:
                flat[-1] = torch.nextafter(flat[-1], torch.tensor(torch.inf))
            found = difference(before, fingerprint(model)).weights
            assert re.sub(r"\d+", "*", name) in found, change
            flat.copy_(kept)
    assert fingerprint(model) == before


def test_a_large_tensor_is_read_to_its_end():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.config = LlamaConfig()
            self.weight = nn.Parameter(torch.zeros(700, 800).bfloat16())

    model = Model()
    seen = {fingerprint(model)["digest"]}
    for place in (0, 2**18 - 1, 2**18, 2**18 + 1, 2**19, 700 * 800 - 1):
        with torch.no_grad():
            model.weight.zero_().view(-1)[place] = 1.0
        seen.add(fingerprint(model)["digest"])
    assert len(seen) == 7


def test_numbers_that_a_type_holds_exactly_are_the_same_base_in_it(llama):
    half = as_dtype(llama, torch.bfloat16)
    assert fingerprint(half) == fingerprint(as_dtype(half, torch.float32)) == fingerprint(as_dtype(half, torch.float64))
    on_fp16 = as_dtype(llama, torch.float16)
    for same in (as_dtype(on_fp16, torch.float32), as_dtype(on_fp16, torch.bfloat16)):
        assert not difference(fingerprint(on_fp16), fingerprint(same)).weights
        assert not difference(fingerprint(on_fp16), fingerprint(same)).unknown


def test_weights_that_were_rounded_to_bfloat16_are_the_same_base_and_others_are_not(llama, tiny_model):
    exact, rounded = fingerprint(llama), fingerprint(as_dtype(llama, torch.bfloat16))
    for found in (difference(exact, rounded), difference(rounded, exact)):
        assert (found.values, found.weights, found.unknown) == ([], [], [])
        assert UP in found.rounded
    other = fingerprint(as_dtype(tiny_model("llama", seed=1), torch.bfloat16))
    assert set(difference(exact, other).weights) == set(exact["weights"])


def test_weights_that_were_rounded_to_float16_are_no_other_base(llama):
    """Rounded twice, a few fall to the other side in bfloat16: it cannot be told."""
    exact, rounded = fingerprint(llama), fingerprint(as_dtype(llama, torch.float16))
    assert not difference(exact, rounded).weights
    assert not difference(exact, fingerprint(as_dtype(llama, torch.float16, torch.float16))).weights
    assert difference(rounded, fingerprint(as_dtype(llama, torch.float16))) == NOTHING
    half = as_dtype(llama, torch.float16)
    with torch.no_grad():
        half.model.norm.weight.mul_(2)
    assert difference(rounded, fingerprint(half)).weights == ["model.norm.weight"]


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.float8_e4m3fn])
def test_quantised_weights_cannot_be_told_from_the_plain_ones_but_their_codes_from_other_codes(llama, dtype):
    def quantised(scale):
        model = copy.deepcopy(llama)
        for layer in model.model.layers:
            codes = (layer.mlp.up_proj.weight.detach() * scale).clamp(0, 100).to(dtype)
            layer.mlp.up_proj.weight = nn.Parameter(codes, requires_grad=False)
        return fingerprint(model)

    plain, codes = fingerprint(llama), quantised(50)
    assert difference(plain, codes) == Difference([], [], [], [UP])
    assert difference(codes, quantised(50)) == NOTHING
    assert difference(codes, quantised(40)) == Difference([], [], [], [UP])


def test_weights_that_are_elsewhere_cannot_be_told(llama):
    plain = fingerprint(llama)
    llama.model.norm.to("meta")
    assert difference(plain, fingerprint(llama)) == Difference([], [], [], ["model.norm.weight"])


def test_a_tied_head_that_was_stored_twice_is_the_same(tiny_model):
    tied, untied = tiny_model("qwen2", tie_word_embeddings=True), tiny_model("qwen2", tie_word_embeddings=False)
    untied.load_state_dict(tied.state_dict())
    assert fingerprint(tied) == fingerprint(untied)


@pytest.mark.parametrize(
    ("key", "value", "named"),
    [
        ("rms_norm_eps", 1e-3, "rms_norm_eps was 1e-06, is 0.001"),
        ("hidden_act", "gelu", "hidden_act was silu, is gelu"),
        ("num_key_value_heads", 4, "num_key_value_heads was 2, is 4"),
        (
            "rope_parameters",
            {"rope_type": "default", "rope_theta": 77.0},
            "rope_parameters.rope_theta was 10000.0, is 77.0",
        ),
    ],
)
def test_a_value_of_the_config_that_changes_results_is_named(llama, key, value, named):
    before = fingerprint(llama)
    setattr(llama.config, key, value)
    assert difference(before, fingerprint(llama)) == Difference([named], [], [], [])


@pytest.mark.parametrize(
    ("key", "value"),
    [("use_cache", False), ("eos_token_id", 5), ("attention_dropout", 0.3), ("_name_or_path", "elsewhere"),
     ("transformers_version", "9"), ("initializer_range", 1.0), ("architectures", ["X"]), ("dtype", "float16")],
)  # fmt: skip
def test_a_value_that_changes_nothing_does_not_count(llama, key, value):
    before = fingerprint(llama)
    setattr(llama.config, key, value)
    assert difference(before, fingerprint(llama)) == NOTHING


def test_a_value_that_another_version_of_transformers_writes_does_not_count(llama):
    before = fingerprint(llama)
    llama.config.a_new_setting = 3
    assert difference(before, fingerprint(llama)) == NOTHING
    assert difference(fingerprint(llama), before) == NOTHING


def test_what_is_damaged_or_of_another_form_is_no_fingerprint(llama):
    found = fingerprint(llama)
    text = json.dumps(found)
    for position in range(0, len(text), 3):
        damaged = text[:position] + chr(ord(text[position]) ^ 1) + text[position + 1 :]
        try:
            value = json.loads(damaged)
        except ValueError:
            continue
        assert not is_fingerprint(value)
    for value in (None, "", [], {}, 3, {"digest": "", "config": [], "weights": {}}, found | {"more": 1}):
        assert not is_fingerprint(value)


def test_a_saved_model_has_its_fingerprint_again(llama, tmp_path):
    llama.save_pretrained(tmp_path)
    assert fingerprint(LlamaForCausalLM.from_pretrained(tmp_path)) == fingerprint(llama)
    loaded = LlamaForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert not difference(fingerprint(llama), fingerprint(loaded)).weights
