"""A base is loaded whole or not at all, and whatever is wrong with its files is one line."""

from __future__ import annotations

import json
import shutil
import warnings

import pytest
import torch
from safetensors.torch import load_file, save_file

from renyi_engine import base_model
from renyi_engine.ensemble.config import ModelConfig
from renyi_engine.evaluation.refusal.judges import make_judge
from renyi_engine.evaluation.refusal.verdicts import Exchange

Q = "model.layers.1.self_attn.q_proj.weight"


@pytest.fixture
def base(model_folder, tmp_path):
    """base(change): the settings of a copy of the tiny model whose tensors went through `change`."""

    def make(change=dict):
        folder = shutil.copytree(model_folder, tmp_path / "base")
        tensors = change(load_file(folder / "model.safetensors"))
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return ModelConfig(str(folder), use_cpu=True)

    return make


def without(*names):
    return lambda tensors: {name: tensor for name, tensor in tensors.items() if name not in names}


def test_a_base_that_lacks_tensors_is_refused_by_name(base):
    config = base(without(Q, "model.norm.weight"))
    with pytest.raises(ValueError, match=rf"^model_name_or_path: .*base lacks {Q}, model.norm.weight, which would be"):
        base_model.load_model(config)


def test_so_is_a_judge(base, monkeypatch):
    config = base(without(Q))
    judge = make_judge(f"model:{config.model_name_or_path}", compute=config)
    with pytest.raises(ValueError, match=f"^judge: .*base lacks {Q}, "):
        judge([Exchange("a", "b")])


def test_a_tensor_of_another_shape_is_refused(base):
    config = base(lambda tensors: tensors | {Q: torch.cat([tensors[Q]] * 2)})
    with pytest.raises(ValueError, match=r"^model_name_or_path: .* cannot be loaded"):
        base_model.load_model(config)


def test_tensors_that_the_model_does_not_use_are_named_once(base):
    with pytest.warns(match=r"has tensors that a LlamaForCausalLM does not use: extra.weight$") as found:
        base_model.load_model(base(lambda tensors: tensors | {"extra.weight": torch.zeros(2)}))
    assert len(found) == 1


def test_tied_weights_and_buffers_need_not_be_in_the_files(tmp_path):
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=11, tie_word_embeddings=True, **sizes))
    model.save_pretrained(tmp_path)
    assert "lm_head.weight" not in load_file(tmp_path / "model.safetensors")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loaded = base_model.load_model(ModelConfig(str(tmp_path), use_cpu=True))
    assert loaded.lm_head.weight.equal(model.lm_head.weight)


@pytest.mark.parametrize(
    ("name", "contents"),
    [
        ("config.json", [b"", b"[]", b"null", b"[" * 100_000, b"\x00\xff", b'{"a": ']),
        ("tokenizer.json", [b"", b"{}", b"null", b'{"a": ']),
        ("tokenizer_config.json", [b"[]", b"null", b'"x"', b'{"model_max_length": {}}']),
        ("model.safetensors", [b"", b"\xff" * 64, b"\x08" + b"\x00" * 7 + b"{}      "]),
    ],
)
def test_a_broken_file_is_one_line(base, tmp_path, name, contents):
    config = base()
    for content in contents:
        (tmp_path / "base" / name).write_bytes(content)
        problems = refusals(config)
        assert problems, content


WRONG = [
    ("model_type", 0), ("model_type", {}), ("vocab_size", "x"), ("hidden_size", None), ("hidden_size", 1.5),
    ("num_hidden_layers", -1), ("num_hidden_layers", 10**30), ("num_hidden_layers", None),
    ("num_attention_heads", 0), ("num_attention_heads", []), ("dtype", -1), ("dtype", "float7"), ("hidden_act", "x"),
    ("rope_parameters", []), ("rope_parameters", {"rope_type": "x"}),
]  # fmt: skip


@pytest.mark.parametrize(("key", "value"), WRONG)
def test_a_wrong_value_in_the_config_is_one_line(base, tmp_path, key, value):
    config = base()
    path = tmp_path / "base" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))
    assert refusals(config)


def refusals(config):
    """The errors of each way to load the base: all have to be a ValueError of one line that names the setting."""
    problems = []
    for load in (base_model.load_config, base_model.load_tokenizer, base_model.load_model, base_model.skeleton):
        try:
            load(config)
        except ValueError as error:
            problems.append(str(error))
    assert all(problem.startswith("model_name_or_path: ") and "\n" not in problem for problem in problems)
    return problems


def test_memory_that_ends_is_not_taken_for_a_broken_file(model_folder, monkeypatch):
    def no_room(*_, **__):
        raise MemoryError

    monkeypatch.setattr(base_model.AutoModelForCausalLM, "from_pretrained", no_room)
    with pytest.raises(MemoryError):
        base_model.load_model(ModelConfig(str(model_folder)))
