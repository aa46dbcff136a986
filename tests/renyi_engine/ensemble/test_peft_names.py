"""What PEFT makes of an adapter's names, on every architecture: its own conversions are the oracle."""

from __future__ import annotations

import json

import pytest
import torch
from peft import LoraConfig
from peft.tuners.tuners_utils import _check_lora_target_modules_mamba
from peft.utils.transformers_weight_conversion import (
    convert_peft_adapter_state_dict_for_transformers,
    convert_peft_config_for_transformers,
)
from torch import nn

from renyi_engine import EnsembleConfig, LoraEnsemble
from renyi_engine.ensemble import peft_names
from renyi_engine.ensemble.targets import describe, linear_maps, match_targets

from ..in_use import assert_peft_loads
from ..tiny_models import names, tiny_model


@pytest.mark.parametrize("name", names())
def test_renamings_of_names_and_of_tensors_are_those_of_peft(name):
    model = tiny_model(name)
    paths = [path for path, module in model.named_modules() if isinstance(module, nn.Linear)]
    assert {path for path in paths if peft_names.named_as_experts(model, path)} == {
        path for path in paths if taken_for_experts(model, path)
    }
    keys = {f"base_model.model.{path}.lora_A.weight": path for path in paths}
    state = {key: torch.zeros(2, 2) for key in keys}
    kept = convert_peft_adapter_state_dict_for_transformers(model, LoraConfig(), state)
    refused = set(peft_names.refused(model, paths))
    assert {path for key, path in keys.items() if key not in kept} == {p for p in refused if not mamba(model, p)}
    assert all(mamba(model, path) == peft_refuses(model, path) for path in paths if path.endswith("out_proj"))


def taken_for_experts(model, path):
    # not gate_proj without up_proj: that is an error of its own
    config = LoraConfig(target_modules=[path, "gate_proj", "up_proj", "w1", "w3"])
    convert_peft_config_for_transformers(config, model, None)
    return path not in config.target_modules


def mamba(model, path):
    return path.endswith(".out_proj") and model.config.model_type in peft_names._MAMBA


def peft_refuses(model, path):
    try:
        _check_lora_target_modules_mamba(LoraConfig(), model, path.rsplit(".", 1)[-1])
    except ValueError:
        return True
    return False


MIXTURES = ["qwen3_next", "deepseek_v3", "glm4_moe", "ernie4_5_moe", "dots1", "solar_open", "afmoe", "hunyuan_v1_moe"]


@pytest.mark.parametrize("name", MIXTURES)
def test_maps_that_peft_takes_for_experts_are_named_by_their_weight(name, tmp_path):
    """Alone, all of them, and in one layer only; several particles on one base."""
    base = tiny_model(name)
    every = [path for path in match_targets(base, "all-linear", None) if peft_names.named_as_experts(base, path)]
    assert every
    first = [path for path in every if path.split(".")[2] == every[0].split(".")[2]]
    for targets in (every, every[:1], first, "all-linear"):
        ensemble = LoraEnsemble.attach(tiny_model(name), EnsembleConfig(2, 2, target_modules=targets, init="spread"))
        assert_peft_loads(ensemble, base, tmp_path)
        config = json.loads((tmp_path / "p000" / "adapter_config.json").read_text())
        assert {f"{path}.weight" for path in every if path in ensemble.paths} == set(config["target_parameters"])


@pytest.mark.parametrize("name", ["mamba2", "nemotron_h"])
def test_what_peft_refuses_is_left_out_of_all_linear_and_refused_by_name(name):
    model = tiny_model(name)
    matched = match_targets(model, "all-linear", None)
    assert not any(path.endswith("out_proj") for path in matched)
    assert any(path.endswith("out_proj") for path in linear_maps(model))
    for targets in (["in_proj", "out_proj"], r".*\.(in|out)_proj"):
        with pytest.raises(ValueError, match=r"target_modules: PEFT cannot load an adapter of .*out_proj"):
            LoraEnsemble.attach(model, EnsembleConfig(1, 1, target_modules=targets))
    assert set(match_targets(model, ["in_proj"], None)) <= set(matched)


@pytest.mark.parametrize("name", ["hunyuan_vl", "lfm3_vl", "zamba2", "ctrl"])
def test_names_that_peft_would_find_elsewhere_too_become_paths(name):
    model = tiny_model(name)
    paths = list(match_targets(model, "all-linear", None))
    words = describe(model, paths)
    assert peft_names.matches(model, words.target_modules, words.layers_to_transform) == set(paths)
    assert peft_names.matches(model, {path.rsplit(".", 1)[-1] for path in paths}, None) > set(paths)
