"""Adapters know their base: another one is refused by name, and a doubt is one line."""

from __future__ import annotations

import copy
import json
import shutil
import warnings

import peft
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from renyi_engine import EnsembleConfig, LoraEnsemble
from renyi_engine.cli import main
from renyi_engine.ensemble.adapter_folder import CONFIG_FILE, ENSEMBLE_FILE, TENSORS_FILE

K = 2


@pytest.fixture
def base(tiny_model):
    model = tiny_model("llama")
    model.config._name_or_path = "models/first"
    return model


@pytest.fixture
def saved(base, tmp_path):
    ensemble = LoraEnsemble.attach(base, EnsembleConfig(num_particles=K, rank=2, init="spread"))
    ensemble.save_pretrained(tmp_path / "saved")
    ensemble.detach()
    return tmp_path / "saved"


def as_a_plain_set(saved):
    """The particles without their list, under names that do not say that they are one ensemble."""
    (saved / ENSEMBLE_FILE).unlink()
    for k in range(K):
        (saved / f"p{k:03d}").rename(saved / f"adapter{k}")


@pytest.fixture
def other(tiny_model):
    """Of the same shape and config; one number of one weight is another."""
    model = tiny_model("llama")
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 4] += 0.5
    return model


@pytest.fixture
def load():
    """Load, and give the warnings."""

    def load(model, folder, **options):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            LoraEnsemble.from_pretrained(model, folder, **options).detach()
        messages = [str(warning.message) for warning in caught if warning.category is UserWarning]
        assert all("\n" not in message for message in messages)
        return messages

    return load


@pytest.mark.parametrize("form", ["ensemble", "particles", "one particle", "copied files"])
def test_another_base_of_the_same_shape_is_refused_by_name(saved, other, base, load, tmp_path, form):
    if form == "particles":
        as_a_plain_set(saved)
    folder = saved / "p001" if form == "one particle" else saved
    if form == "copied files":
        folder = tmp_path / "copy"
        folder.mkdir()
        for name in (CONFIG_FILE, TENSORS_FILE):
            shutil.copy(saved / "p000" / name, folder)
    assert load(base, folder) == []
    with pytest.raises(ValueError) as refusal:
        LoraEnsemble.from_pretrained(other, folder)
    message = str(refusal.value)
    for named in (folder, "'models/first'", "--model_name_or_path", "--ensemble", "model.layers.*.mlp.up_proj.weight"):
        assert str(named) in message
    assert "\n" not in message
    assert "q_proj" not in message
    assert not hasattr(other, "_renyi_ensemble")
    assert load(other, folder, check_base=False) == []


def test_a_particle_of_another_base_among_the_others_is_named(saved, other, base):
    as_a_plain_set(saved)
    ensemble = LoraEnsemble.attach(other, EnsembleConfig(num_particles=1, rank=2))
    ensemble.save_pretrained(saved / "of another")
    shutil.rmtree(saved / "adapter1")
    shutil.move(saved / "of another" / "p000", saved / "adapter1")
    shutil.rmtree(saved / "of another")
    with pytest.raises(ValueError, match="adapter1: the adapters were trained on another base"):
        LoraEnsemble.from_pretrained(base, saved)


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("trained", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("loaded", [torch.bfloat16, torch.float32])
def test_the_same_weights_in_another_type_are_the_same_base(base, load, tmp_path, stored, trained, loaded):
    checkpoint = base.to(stored)
    ensemble = LoraEnsemble.attach(copy.deepcopy(checkpoint).to(trained), EnsembleConfig(num_particles=1, rank=2))
    ensemble.save_pretrained(tmp_path)
    assert load(copy.deepcopy(checkpoint).to(loaded), tmp_path) == []


def test_the_same_weights_under_another_config_are_one_line(saved, base, load):
    base.config.rms_norm_eps = 1e-2
    (message,) = load(base, saved)
    assert "rms_norm_eps was 1e-06, is 0.01" in message


def test_a_quantised_base_is_one_line_unless_what_can_be_told_is_another(saved, base, other, load):
    def quantise(model):
        for layer in model.model.layers:
            layer.self_attn.q_proj.weight = nn.Parameter(
                layer.self_attn.q_proj.weight.detach().to(torch.float8_e4m3fn), requires_grad=False
            )
        return model

    # taken after the adapters are read: the tiny model cannot compute with such weights
    from renyi_engine.ensemble import base_check
    from renyi_engine.ensemble.adapter_folder import read

    with pytest.warns(UserWarning, match=r"models/first.*nobody can tell .*self_attn\.q_proj\.weight are quantised"):
        base_check.check(read(saved).origins, quantise(base))
    with pytest.raises(ValueError, match="another base"):
        base_check.check(read(saved).origins, quantise(other))


@pytest.mark.parametrize(
    ("recorded", "name", "doubt"),
    [
        ("Qwen/Qwen2.5-0.5B", "/models/qwen2.5-0.5b/", False),
        ("Qwen/Qwen2.5-0.5B", "/cache/models--Qwen--Qwen2.5-0.5B/snapshots/0a1b2c", False),
        ("/cache/models--gpt2/snapshots/0a1b2c", "openai-community/gpt2", False),
        ("Qwen/Qwen2.5-0.5B", "Qwen/Qwen2.5-0.5B-Instruct", True),
        ("Qwen/Qwen2.5-0.5B", "", False),
        (None, "Qwen/Qwen2.5-0.5B", False),
    ],
)
def test_of_pefts_own_folders_only_the_names_are_compared(tiny_model, load, tmp_path, recorded, name, doubt):
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    peft.get_peft_model(tiny_model("llama"), config).save_pretrained(tmp_path)
    content = json.loads((tmp_path / CONFIG_FILE).read_text())
    (tmp_path / CONFIG_FILE).write_text(json.dumps(content | {"base_model_name_or_path": recorded}))
    model = tiny_model("llama", seed=1)
    model.config._name_or_path = name
    messages = load(model, tmp_path)
    assert len(messages) == doubt
    for message in messages:
        assert f"pass {recorded!r} as --model_name_or_path" in message
    assert load(model, tmp_path, check_base=False) == []


def test_peft_reads_a_particle_that_carries_its_origin_and_drops_nothing(saved, base, load_peft):
    with safe_open(saved / "p000" / TENSORS_FILE, framework="pt") as file:
        assert file.metadata().keys() == {"format", "particle", "base"}
    loaded = load_peft(base, saved / "p000")
    theirs = peft.get_peft_model_state_dict(loaded)
    ours = load_file(saved / "p000" / TENSORS_FILE)
    assert theirs.keys() == ours.keys()
    assert all(torch.equal(theirs[name], value) for name, value in ours.items())


@pytest.mark.parametrize("text", ["", "{", "[]", '{"digest": "", "config": {}, "weights": {}}'])
def test_an_origin_of_another_form_is_named(saved, base, text):
    path = saved / "p000" / TENSORS_FILE
    save_file(load_file(path), path, metadata={"format": "pt", "base": text})
    with pytest.raises(ValueError, match=r"p000/adapter_model\.safetensors: base: expected the fingerprint"):
        LoraEnsemble.from_pretrained(base, saved / "p000")


def test_a_folder_that_says_nothing_of_its_base_still_loads(saved, base, other, load):
    content = json.loads((saved / ENSEMBLE_FILE).read_text())
    del content["base"], content["base_model_name_or_path"], content["digest"]
    (saved / ENSEMBLE_FILE).write_text(json.dumps(content | {"format": 1}))
    assert load(base, saved) == load(other, saved) == []


@pytest.mark.parametrize(
    "command",
    [
        ["generate", "--prompts", "a"],
        ["eval", "nll", "--dataset_name", "DATA", "--output_dir", "OUT"],
        ["alpha-star", "--dataset_name", "DATA", "--output_dir", "OUT"],
    ],
    ids=lambda command: " ".join(command[:2]),
)
def test_every_command_that_takes_an_ensemble_names_the_flag(
    sft_config, model_folder, data_file, tmp_path, capsys, command
):
    from transformers import AutoModelForCausalLM

    from renyi_engine import train

    run = train(sft_config(max_steps=1)).output_dir
    model = AutoModelForCausalLM.from_pretrained(model_folder)
    shutil.copytree(model_folder, tmp_path / "second")
    with torch.no_grad():
        model.lm_head.weight.view(-1)[-1] += 1
    model.save_pretrained(tmp_path / "second")
    places = {"DATA": str(data_file), "OUT": str(tmp_path / "out")}
    flags = ["--model_name_or_path", str(tmp_path / "second"), "--use_cpu", "true"]
    flags += ["--ensemble", str(run / "particles")]
    assert main([*(places.get(word, word) for word in command), *flags]) == 2
    error = capsys.readouterr().err
    assert f"pass {str(model_folder)!r} as --model_name_or_path" in error
    assert "lm_head.weight" in error
