"""Settings of training: what each may be, and what an error says of one that it may not be."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from renyi_engine.core.flags import parse
from renyi_engine.core.settings import to_yaml
from renyi_engine.training.config import SftConfig

NEEDED = ["--model_name_or_path", "m", "--dataset_name", "d", "--output_dir", "o"]


def parsed(*argv):
    return parse(SftConfig, [*NEEDED, *argv], "renyi-engine sft")[0]


@pytest.mark.parametrize(
    ("flag", "value", "message"),
    [
        ("alpha", "-0.1", "alpha: expected a finite number >= 0"),
        ("alpha", "nan", "alpha: expected a finite number >= 0"),
        ("num_particles", "0", "num_particles: expected a whole number of at least 1; got 0"),
        ("lora_r", "0", "lora_r: expected a whole number of at least 1; got 0"),
        ("learning_rate", "abc", "learning_rate.*invalid float value: 'abc'"),
        ("learning_rate", "0", "learning_rate: expected a number above 0; got 0"),
        ("max_steps", "0", "max_steps: expected -1, or a whole number of at least 1; got 0"),
        ("save_total_limit", "1", "save_total_limit: expected a whole number of at least 2; got 1"),
        ("max_length", "1", "max_length: expected a whole number of at least 2"),
        ("kernel_bandwidth", "-1", "kernel_bandwidth: expected a number above 0, from 1e-150 to 1e150, or nothing"),
        ("init", "zeros", "init.*invalid choice: 'zeros'"),
        ("adam_beta2", "1", "adam_beta2: expected a number from 0 to 1, 1 excluded"),
        ("warmup_steps", "-3", "warmup_steps: expected a number of at least 0"),
        ("alpha_schedule", "step", "alpha_schedule.*invalid choice: 'step'"),
        ("alpha_0", "-1", "alpha_0: expected a number of at least 0; got -1"),
        ("alpha_warmup_steps", "inf", "alpha_warmup_steps: expected a number of at least 0"),
        ("alpha_max", "0", "alpha_max: expected a number above 0; got 0"),
        ("alpha_star_steps", "0", "alpha_star_steps: expected a whole number of at least 1; got 0"),
        (
            "alpha_controller",
            "ess",
            "alpha_controller: expected ess:TARGET or alpha-star:MARGIN, as in ess:0.6; got 'ess'",
        ),
        (
            "alpha_controller",
            "alpha-star:-1",
            "alpha_controller: .*MARGIN of at least 0 and below alpha_max .2.; got -1",
        ),
        ("alpha_controller", "ess:0.125", "alpha_controller: .*TARGET above 1/8 and below 1, .*; got 0.125"),
        ("alpha_controller", "ess:1", "alpha_controller: .*TARGET above 1/8 and below 1, .*; got 1"),
    ],
)
def test_a_bad_value_is_named_with_what_was_expected(flag, value, message):
    with pytest.raises(ValueError, match=message) as error:
        parsed(f"--{flag}", value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--alpha_schedule", "cosine"], "alpha_controller: 'ess:0.5' .* excludes alpha_schedule 'cosine'"),
        (
            ["--num_particles", "1"],
            "alpha_controller: 'ess:0.5' has no effect on a single .*; expected num_particles of at least 2; got 1",
        ),
        (["--alpha", "0"], r"alpha: expected a number from 0.0001 to alpha_max \(\S+\), .*; got 0$"),
        (["--alpha", "0.9", "--alpha_max", "0.85"], r"alpha: .* to alpha_max \(0.85\), .*; got 0.9$"),
    ],
)
def test_a_controller_is_refused_beside_what_it_cannot_work_with(argv, message):
    with pytest.raises(ValueError, match=message) as error:
        parsed("--alpha_controller", "ess:0.5", *argv)
    assert "\n" not in str(error.value)


def test_the_coupling_is_what_the_flags_say():
    assert parsed("--alpha", "0.3").coupling(100, float).at(0) == 0.3
    rising = parsed("--alpha", "0.3", "--alpha_schedule", "linear", "--alpha_0", "0.1")
    assert [rising.coupling(100, float).at(step) for step in (0, 25, 50)] == pytest.approx([0.1, 0.2, 0.3])
    in_steps = parsed("--alpha", "0.3", "--alpha_schedule", "linear", "--alpha_warmup_steps", "4")
    assert in_steps.coupling(100, float).at(1) == pytest.approx(0.075)
    above = parsed("--alpha_controller", "alpha-star:0.25", "--alpha_max", "0.9", "--alpha_star_steps", "2")
    coupling = above.coupling(100, lambda step: 0.1 * step)
    assert [coupling.at(step) for step in range(9)] == pytest.approx(
        [0.25, 0.25, 0.45, 0.45, 0.65, 0.65, 0.85, 0.85, 0.9]
    )
    assert parsed("--alpha_controller", "ess:0.5", "--alpha", "0.4").coupling(100, float).at(7) == 0.4


@pytest.mark.parametrize("missing", ["model_name_or_path", "dataset_name", "output_dir"])
def test_what_is_needed_is_asked_for_by_name(missing):
    given = [f"--{n}=x" for n in ("model_name_or_path", "dataset_name", "output_dir") if n != missing]
    with pytest.raises(ValueError, match=f"{missing}: needed, but not given; pass --{missing}"):
        parse(SftConfig, given, "x")


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (["all-linear"], "all-linear"),
        (["q_proj"], ["q_proj"]),
        (["q_proj", "v_proj"], ["q_proj", "v_proj"]),
        ([r".*\.(q|v)_proj"], r".*\.(q|v)_proj"),
    ],
)
def test_one_target_that_is_no_name_is_a_regular_expression(given, expected):
    config = parsed("--lora_target_modules", *given)
    assert config.ensemble_config().target_modules == expected


@pytest.mark.parametrize(
    ("setting", "value", "expected"),
    [
        ("prior", "nope", "one of none, potential, smoothed_kl; got 'nope'"),
        ("alpha_schedule", "step", "one of constant, linear, cosine; got 'step'"),
        ("use_rslora", "no", "True or False; got 'no'"),
        ("max_steps", 2.5, "a whole number; got 2.5"),
        ("report_to", 1, "a list; got 1"),
        ("layers_to_transform", 1, "a list; got 1"),
    ],
)
def test_a_value_that_only_python_can_give_is_of_its_kind(setting, value, expected):
    with pytest.raises(ValueError, match=re.escape(f"{setting}: expected {expected}")):
        SftConfig(model_name_or_path="m", dataset_name="d", output_dir="o", **{setting: value})


def test_a_path_is_taken_as_its_text():
    config = SftConfig(model_name_or_path=Path("m"), dataset_name=Path("d") / "rows.jsonl", output_dir=Path("o"))
    assert (config.model_name_or_path, config.dataset_name, config.output_dir) == ("m", "d/rows.jsonl", "o")
    assert "dataset_name: d/rows.jsonl" in to_yaml(config)
