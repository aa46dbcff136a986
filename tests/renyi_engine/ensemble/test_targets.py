"""target_modules and layers_to_transform choose the linear maps that PEFT chooses."""

from __future__ import annotations

import re
import time
import warnings

import peft
import pytest
import torch
from hypothesis import given, settings, strategies as st
from transformers.pytorch_utils import Conv1D

from renyi_engine import EnsembleConfig, LoraEnsemble
from renyi_engine.ensemble.targets import decoder_layers, describe, features, linear_maps, match_targets

ALL = ["llama", "qwen2", "phi3", "nemotron", "mistral", "qwen3", "gemma2", "gpt2", "gptj", "granite", "cohere"]
LLAMA_MAPS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
# the same ending twice in a layer (c_proj), and layers that are named by "h" in place of "layers"
GPT2_MAPS = ["attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"]


def peft_matches(model, target_modules, layers_to_transform=None):
    """Paths that PEFT adapts, given the same words."""
    config = peft.LoraConfig(
        target_modules=target_modules, layers_to_transform=layers_to_transform, task_type="CAUSAL_LM"
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about GPT-2's fan_in_fan_out
        adapted = peft.get_peft_model(model, config)
    keys = [name for name, _ in adapted.named_modules() if name.endswith(".lora_A")]
    return {key.removeprefix("base_model.model.").removesuffix(".lora_A") for key in keys}


@pytest.mark.parametrize("architecture", ALL)
def test_all_linear_is_what_peft_takes_it_to_be(tiny_model, architecture):
    matched = match_targets(tiny_model(architecture), "all-linear", None)
    assert set(matched) == peft_matches(tiny_model(architecture), "all-linear")
    assert len(matched) == 3 * {"phi3": 4, "nemotron": 6, "gpt2": 4, "gptj": 6}.get(architecture, 7)


@pytest.mark.parametrize("layers", [None, [1], [0, 2]])
@pytest.mark.parametrize(
    ("architecture", "target_modules"),
    [
        ("llama", ["q_proj", "v_proj"]),
        ("llama", ["self_attn.q_proj", "mlp.down_proj"]),
        ("llama", ["proj", "q_proj"]),
        ("llama", ["model.layers.0.self_attn.q_proj", "model.layers.2.mlp.up_proj", "k_proj"]),
        ("phi3", ["qkv_proj", "gate_up_proj"]),
        ("gpt2", ["c_attn"]),
        ("gpt2", ["c_proj"]),
        ("gpt2", ["mlp.c_proj", "transformer.h.1.attn.c_proj"]),
    ],
)
def test_a_list_of_names_matches_what_peft_matches(tiny_model, architecture, target_modules, layers):
    matched = match_targets(tiny_model(architecture), target_modules, layers, each=False)
    assert set(matched) == peft_matches(tiny_model(architecture), target_modules, layers)


@pytest.mark.parametrize(
    "pattern", [r".*\.(q|v)_proj", r"model\.layers\.[12]\.mlp\..*_proj", r"model\.layers\.0\.self_attn\.o_proj"]
)
def test_a_regular_expression_matches_what_peft_matches(tiny_model, pattern):
    matched = match_targets(tiny_model("llama"), pattern, None)
    assert set(matched) == peft_matches(tiny_model("llama"), pattern)


def test_a_regular_expression_must_match_the_whole_path(tiny_model):
    with pytest.raises(ValueError, match="target_modules"):
        match_targets(tiny_model("llama"), "q_proj", None)


def test_layers_to_transform_holds_beside_all_linear(tiny_model):
    matched = match_targets(tiny_model("llama"), "all-linear", [1])
    assert len(matched) == 7
    assert all(path.startswith("model.layers.1.") for path in matched)
    assert set(match_targets(tiny_model("llama"), "ALL-LINEAR", [1])) == set(matched)


def test_matches_come_in_the_order_of_the_model(tiny_model):
    model = tiny_model("llama")
    matched = match_targets(model, ["down_proj", "q_proj"], [2, 0])
    assert list(matched) == [path for path in linear_maps(model) if path in matched]
    assert [path.split(".")[2] for path in matched] == ["0", "0", "2", "2"]
    assert all(model.get_submodule(path) is linear for path, linear in matched.items())


@pytest.mark.parametrize("architecture", ALL)
def test_the_output_head_is_never_a_target(tiny_model, architecture):
    model = tiny_model(architecture)
    assert "lm_head" not in linear_maps(model)
    with pytest.raises(ValueError, match="lm_head"):
        match_targets(model, ["lm_head"], None)


@pytest.mark.parametrize("target_modules", [["query"], r".*query.*", [], ["proj"]])
def test_what_matches_nothing_is_refused_with_the_names_that_could_match(tiny_model, target_modules):
    with pytest.raises(ValueError, match="target_modules") as refusal:
        match_targets(tiny_model("llama"), target_modules, None)
    assert all(name in str(refusal.value) for name in LLAMA_MAPS)
    assert "all-linear" in str(refusal.value)


@pytest.mark.parametrize(
    "misspelt", ["proj", "q_porj", "all-linear", r".*v_proj", "model.layers.3.self_attn.q_proj", ""]
)
@pytest.mark.parametrize("layers", [None, [1]])
def test_one_of_several_names_that_matches_nothing_is_refused_by_name(tiny_model, misspelt, layers):
    with pytest.raises(ValueError, match="target_modules") as refusal:
        LoraEnsemble.attach(
            tiny_model("llama"),
            EnsembleConfig(2, 2, target_modules=["q_proj", misspelt, "v_proj"], layers_to_transform=layers),
        )
    assert f"target_modules: {misspelt!r} matches no linear map" in str(refusal.value)


@pytest.mark.parametrize("names", [["model.layers.0.self_attn.q_proj"], r"model\.layers\.0\..*proj"])
def test_a_layer_in_which_nothing_matches_is_refused_by_number(tiny_model, names):
    with pytest.raises(ValueError, match=r"layers_to_transform: .* no linear map in layers \[2\]"):
        match_targets(tiny_model("llama"), names, [0, 2])


@pytest.mark.parametrize("pattern", ["(", "*q_proj", "[", "(" * 2000 + ")" * 2000, "a" * 20_000])
def test_what_is_no_regular_expression_is_refused_before_there_is_a_model(pattern):
    with pytest.raises(ValueError, match="target_modules: ") as refusal:
        EnsembleConfig(target_modules=pattern)
    assert len(str(refusal.value)) < 500
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    "pattern",
    [
        "(" * 40 + "a" + "){1,9}" * 40,
        "((a){1000}){1000}",
        "(?x)" + "(a # )\n" * 40 + ")+" * 40,
        r"(\)[)]" * 40 + ")+" * 40,
    ],
)
def test_a_regular_expression_that_would_fill_the_memory_is_not_compiled(pattern):
    re.compile(pattern)  # it is one
    with pytest.raises(ValueError, match=r"target_modules: .* takes too much memory"):
        EnsembleConfig(target_modules=pattern)


def test_a_regular_expression_of_many_groups_beside_each_other_is_compiled():
    EnsembleConfig(
        target_modules=r"(?:.*(?:text|model)\.layers\.\d{1,2}\.(?:self_attn|mlp)\.(?:(?:q|k|v|o)_proj))|" * 20 + "x"
    )


def test_a_regular_expression_that_would_take_years_is_refused(tiny_model):
    """Python's own takes twice as long for every two letters more, and cannot be stopped."""
    began = time.monotonic()
    with pytest.raises(ValueError, match="takes more than"):
        match_targets(tiny_model("llama"), r"(\w|\w\w|[\w.])+[!?]", None)
    assert time.monotonic() - began < 30


@pytest.mark.parametrize(("layers", "named"), [([3], "3"), ([0, 7, 5], "[5, 7]"), ([-1], "-1"), ([], "none")])
def test_layers_out_of_range_are_named(tiny_model, layers, named):
    with pytest.raises(ValueError, match="layers_to_transform") as refusal:
        match_targets(tiny_model("llama"), "all-linear", layers)
    assert re.search(rf"got .*{re.escape(named)}", str(refusal.value))
    assert "0 to 2" in str(refusal.value)


def paths_of(prefix, names):
    return [f"{prefix}.{layer}.{name}" for layer in range(3) for name in names]


LLAMA_PATHS = paths_of(
    "model.layers", [f"self_attn.{n}" for n in LLAMA_MAPS[:4]] + [f"mlp.{n}" for n in LLAMA_MAPS[4:]]
)
GPT2_PATHS = paths_of("transformer.h", GPT2_MAPS)


@pytest.fixture(scope="module")
def described(tiny_model):
    return {"llama": (tiny_model("llama"), LLAMA_PATHS), "gpt2": (tiny_model("gpt2"), GPT2_PATHS)}


@settings(deadline=None)
@given(architecture=st.sampled_from(["llama", "gpt2"]), data=st.data())
def test_describe_gives_words_that_match_exactly_these_paths(described, architecture, data):
    model, everything = described[architecture]
    paths = data.draw(st.lists(st.sampled_from(everything), min_size=1, unique=True))
    assert set(match_targets(model, *describe(model, paths)[:2])) == set(paths)


@settings(deadline=None)
@given(
    architecture=st.sampled_from(["llama", "gpt2"]),
    layers=st.sets(st.integers(0, 2), min_size=1),
    data=st.data(),
)
def test_describe_is_short_where_whole_names_and_layers_are_adapted(described, architecture, layers, data):
    model, _ = described[architecture]
    endings = LLAMA_MAPS if architecture == "llama" else ["c_attn", "c_proj", "c_fc"]
    names = data.draw(st.sets(st.sampled_from(endings), min_size=1))
    paths = list(match_targets(model, sorted(names), sorted(layers)))
    assert describe(model, paths) == (sorted(names), None if len(layers) == 3 else sorted(layers), [])


@settings(max_examples=20, deadline=None)  # PEFT rebuilds the model each time
@given(data=st.data())
def test_peft_understands_what_describe_says(described, tiny_model, data):
    architecture = data.draw(st.sampled_from(["llama", "gpt2"]))
    model, everything = described[architecture]
    paths = data.draw(st.lists(st.sampled_from(everything), min_size=1, unique=True))
    assert peft_matches(tiny_model(architecture), *describe(model, paths)[:2]) == set(paths)


@pytest.mark.parametrize("architecture", ALL)
def test_decoder_layers_are_the_three_of_the_stack(tiny_model, architecture):
    model = tiny_model(architecture)
    path, layers = decoder_layers(model)
    assert path == ("transformer.h" if architecture in ("gpt2", "gptj") else "model.layers")
    assert model.get_submodule(path) is layers
    assert len(layers) == 3


def test_a_model_without_decoder_layers_is_refused(tiny_model):
    model = tiny_model("llama")
    model.config.num_hidden_layers = 17
    with pytest.raises(ValueError, match="17 decoder layers"):
        decoder_layers(model)


def test_features_are_in_and_out_for_linear_and_conv1d():
    assert features(torch.nn.Linear(5, 7)) == (5, 7)
    assert features(Conv1D(7, 5)) == (5, 7)


@pytest.mark.parametrize("target_modules", [["q_proj", "mlp.up_proj"], r".*\.0\..*_proj", "all-linear"])
def test_attach_adapts_the_matched_maps(tiny_model, target_modules):
    model = tiny_model("llama")
    expected = list(match_targets(model, target_modules, None))
    assert LoraEnsemble.attach(model, EnsembleConfig(2, 2, target_modules=target_modules)).paths == expected
