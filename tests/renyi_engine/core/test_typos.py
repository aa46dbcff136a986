"""A suggestion is right, or there is none."""

from __future__ import annotations

import dataclasses
import string

import pytest
from hypothesis import given, strategies as st

from renyi_engine.core import typos
from renyi_engine.evaluation import config as eval_config
from renyi_engine.evaluation.mmlu import questions
from renyi_engine.training import config

SETTINGS = {
    name: sorted(field.name for field in dataclasses.fields(kind))
    for module in (config, eval_config)
    for name, kind in vars(module).items()
    if dataclasses.is_dataclass(kind) and hasattr(kind, "model_name_or_path")
}


def test_no_flag_of_trl_that_is_not_ours_gets_a_hint():
    from trl import DPOConfig, ModelConfig, ScriptArguments, SFTConfig

    theirs = {
        field.name
        for kind in (DPOConfig, ModelConfig, ScriptArguments, SFTConfig)
        for field in dataclasses.fields(kind)
    }
    older = {"max_seq_length", "warmup_ratio", "torch_dtype", "evaluation_strategy", "max_prompt_length", "no_cuda"}
    for known in SETTINGS.values():
        foreign = (theirs | older) - set(known)
        assert len(foreign) > 100
        assert {name: found for name in foreign if (found := typos.near_misses(name, known))} == {}


@st.composite
def mistyped(draw):
    """(known names, the one that was meant, what was typed): one slip, the first character excepted as rarely wrong."""
    known = draw(st.sampled_from(list(SETTINGS.values())))
    name = draw(st.sampled_from([name for name in known if len(name) > 3]))
    at = draw(st.integers(1, len(name) - 1))
    typed = draw(
        st.sampled_from(
            [
                name[:at] + name[at + 1 :],
                name[:at] + name[at] + name[at:],
                name[:at] + draw(st.sampled_from(string.ascii_lowercase)) + name[at + 1 :],
                name[: at - 1] + name[at] + name[at - 1] + name[at + 1 :],
                name.replace("_", "-"),
                name.upper(),
            ]
        )
    )
    return known, name, typed


@given(mistyped())
def test_a_slip_gets_the_name_that_was_meant(case):
    known, name, typed = case
    if typed not in known:
        assert name in typos.near_misses(typed, known)


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("num_particels", ["num_particles"]),
        ("leraning_rate", ["learning_rate"]),
        ("learnig_rat", ["learning_rate"]),
        ("alhpa", ["alpha"]),
        ("sed", ["seed"]),
        ("adam_beta", ["adam_beta1", "adam_beta2"]),
        ("gradient_acumulation_step", ["gradient_accumulation_steps"]),
        ("lora_target_module", ["lora_target_modules"]),
        ("per_device_train_batchsize", ["per_device_train_batch_size"]),
        ("use_rlsora", ["use_rslora"]),
        ("model_name_or_pth", ["model_name_or_path"]),
        ("push_to_hub", []),
        ("", []),
        ("x", []),
    ],
)
def test_typical_typos(typed, meant):
    assert typos.near_misses(typed, SETTINGS["SftConfig"]) == meant


def test_a_hint_is_words_or_nothing():
    assert typos.hint("alhpa", ["alpha", "beta"]) == "; did you mean 'alpha'?"
    assert typos.hint("adam_beta", ["adam_beta1", "adam_beta2"]) == "; did you mean 'adam_beta1' or 'adam_beta2'?"
    assert typos.hint("push_to_hub", ["prior_std"]) == ""
    assert typos.hint("anything", []) == ""
    assert questions.SUBJECTS  # their names get hints by the same rule
    assert typos.near_misses("college biology", ["college_biology"]) == ["college_biology"]
