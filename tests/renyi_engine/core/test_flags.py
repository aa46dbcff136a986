"""Flags and files are read by one way; errors name the setting, the value and the remedy; help is short."""

from __future__ import annotations

import dataclasses
import re
import time
from pathlib import Path

import pytest
import yaml

from renyi_engine.core.flags import Source, _AsTyped, parse
from renyi_engine.core.settings import to_yaml
from renyi_engine.evaluation.config import GenerateConfig
from renyi_engine.training.config import SftConfig

NEEDED = ["--model_name_or_path", "m", "--dataset_name", "d", "--output_dir", "o"]


def parsed(*argv):
    return parse(SftConfig, [*NEEDED, *argv], "renyi-engine sft")[0]


def config_file(tmp_path, **values):
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(values))
    return str(path)


def test_flags_have_the_form_that_trl_users_type():
    config = parsed(
        "--lora_target_modules", "q_proj", "v_proj", "--layers_to_transform", "1", "2", "--use_rslora",
        "--learning-rate", "3e-4", "--gradient_checkpointing", "false",
    )  # fmt: skip
    assert config.lora_target_modules == ["q_proj", "v_proj"]
    assert config.layers_to_transform == [1, 2]
    assert config.use_rslora is True
    assert config.gradient_checkpointing is False
    assert config.learning_rate == 3e-4


def test_a_file_is_read_with_the_same_types_and_flags_override_it(tmp_path):
    path = tmp_path / "config.yaml"
    # YAML reads 1e-4 as a string
    path.write_text(
        "learning_rate: 1e-4\nalpha: 0.3\nlora_target_modules: [q_proj]\nuse_rslora: true\neval_steps: null\n"
    )
    config = parsed("--config", str(path), "--alpha", "0.5")
    assert config.learning_rate == 1e-4
    assert config.alpha == 0.5
    assert config.lora_target_modules == ["q_proj"]
    assert config.use_rslora is True
    assert config.eval_steps is None


@pytest.fixture
def from_file(tmp_path):
    """from_file(text, *argv, cls=SftConfig): the settings of a YAML file that holds, beside what is needed, `text`."""

    def read(text, *argv, cls=SftConfig):
        path = tmp_path / "config.yaml"
        path.write_text("model_name_or_path: m\n" + text)
        needed = NEEDED[2:] if cls is SftConfig else []
        return parse(cls, [*needed, "--config", str(path), *argv], "x")[0]

    return read


@pytest.mark.parametrize(
    ("typed", "expected"),
    [
        ("false", None), ("no", None), ("False", None), ("null", None), ("~", None), ("", None), ("true", "true"),
        ("yes", "true"), ("True", "true"), ("runs/mine/checkpoint-2", "runs/mine/checkpoint-2"),
    ],
)  # fmt: skip
def test_resuming_is_a_path_or_yes_or_no(from_file, typed, expected):
    assert from_file(f"resume_from_checkpoint: {typed}\n").resume_from_checkpoint == expected
    if typed not in ("", "~", "null"):
        assert parsed("--resume_from_checkpoint", typed).resume_from_checkpoint == expected


@pytest.mark.parametrize(("given", "expected"), [(True, "true"), (False, None), (None, None)])
def test_resuming_takes_a_truth_value_from_python(given, expected):
    config = SftConfig(model_name_or_path="m", dataset_name="d", output_dir="o", resume_from_checkpoint=given)
    assert config.resume_from_checkpoint == expected


def test_a_value_of_a_file_is_the_text_that_stands_there(from_file):
    odd = ["Yes", "no", "007", "2024-01-31", "12:30:00", "0x10", "1_0", "1.0", "on", "~x", "null"]
    config = from_file(
        "ensemble: e\nprompts: [" + ", ".join(odd[:-1]) + ", 'null']\nmodel_revision: 010\n", cls=GenerateConfig
    )
    assert config.prompts == odd
    assert config.model_revision == "010"
    config = from_file("dataset_config: 1\ndataset_train_split: on\ndataset_test_split: 'no'\nmax_steps: 1_000\n")
    assert (config.dataset_config, config.dataset_train_split, config.dataset_test_split) == ("1", "on", "no")
    assert config.max_steps == 1000


@pytest.mark.parametrize("nothing", ["null", "~", "", "false", "no", "off", "None"])
def test_a_file_can_say_that_a_setting_has_no_value(from_file, nothing):
    names = (
        "dataset_config",
        "eval_dataset_name",
        "model_revision",
        "alpha_controller",
        "eval_steps",
        "spike_threshold",
    )
    config = from_file("".join(f"{name}: {nothing}\n" for name in (*names, "layers_to_transform")))
    assert all(getattr(config, name) is None for name in (*names, "layers_to_transform"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("alpha: x", "argument --alpha: invalid float value: 'x'"),
        ("alpha: -1", "alpha: expected a finite number >= 0"),
        ("alpha: [0.5, 0.8]", r"alpha: expected one value; got \['0.5', '0.8'\]"),
        ("alpha: {from: 0}", "alpha: expected one value; got {'from': '0'}"),
        (
            "layers_to_transform: [1, null]",
            r"layers_to_transform: expected one value or a plain list of them; got \['1', N",
        ),
        (
            "lora_target_modules: [[q_proj]]",
            r"lora_target_modules: expected one value or a plain list of them; got \[\[",
        ),
        ("lora_target_modules: []", "argument --lora_target_modules.*: expected at least one argument"),
        ("alpha: 0.5\nlora_r: 4\nalpha: 0.8", r"not a readable YAML file \(line 4: alpha is given twice\)"),
        ("lora_r: 4\nalpha: : 1", r"not a readable YAML file \(line 3: "),
    ],
)
def test_an_error_about_a_value_of_a_file_names_the_file(from_file, tmp_path, text, message):
    with pytest.raises(ValueError, match=f"^{tmp_path}/config.yaml: {message}") as error:
        from_file(text + "\n")
    assert "\n" not in str(error.value)


def test_only_what_is_typed_can_say_that_code_is_trusted(from_file, tmp_path):
    assert from_file("trust_remote_code: false\n").trust_remote_code is False
    with pytest.raises(
        ValueError, match=f"^{tmp_path}/config.yaml: trust_remote_code: a file cannot switch this on, as it may"
    ):
        from_file("trust_remote_code: true\n")
    assert from_file("trust_remote_code: true\n", "--trust_remote_code").trust_remote_code is True
    assert from_file("trust_remote_code: true\n", "--trust-remote-code=no").trust_remote_code is False


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        ("r: expected a whole number", "lora_r: expected a whole number"),
        ("target_modules: ['x'] matches no linear map", "F: lora_target_modules: ['x'] matches no linear map"),
        ("model: it has no decoder", "model_name_or_path: it has no decoder"),
        ("tokenizer: it has no pad token", "model_name_or_path: it has no pad token"),
        ("r and more", "r and more"),
        ("a r: 3", "a r: 3"),
    ],
)
def test_an_error_of_what_takes_no_settings_names_the_setting(message, expected):
    source = Source(Path("F"), ["lora_target_modules"], SftConfig.setting_of)
    with pytest.raises(ValueError) as error, source.named_in_errors():
        raise ValueError(message)
    assert str(error.value) == expected


def test_a_value_of_a_file_is_shown_in_bounded_length(from_file):
    """Eight lines that stand for 10^8 numbers."""
    bomb = "lora_r:\n  a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n"
    bomb += "".join(f"  a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]\n" for i in range(1, 9))
    with pytest.raises(ValueError, match=r"lora_r: expected one value; got \{") as error:
        from_file(bomb)
    assert len(str(error.value)) < 500


@pytest.mark.parametrize(
    "text",
    ["a: " + "[" * 1500, "a: 2024-99-99x: b: c", "? [a]\n: b", "<<: 3", 'a: !!int ""', "b: !!bool c",
     "c: !!timestamp x", "d: !!map [a]", 'e: !!float "1' + ":0" * 3000 + '"'],
    ids=lambda t: t[:6],
)  # fmt: skip
def test_a_broken_file_is_one_line(from_file, tmp_path, text):
    with pytest.raises(ValueError, match=f"^{tmp_path}/config.yaml: ") as error:
        from_file(text)
    assert "\n" not in str(error.value)


def test_a_mapping_of_very_many_names_is_read_in_one_pass():
    text = yaml.ScalarNode("tag:yaml.org,2002:str", "1")
    names = [yaml.ScalarNode("tag:yaml.org,2002:str", f"k{number}") for number in range(30_000)]
    node = yaml.MappingNode("tag:yaml.org,2002:map", [(name, text) for name in names])
    started = time.process_time()
    assert len(_AsTyped("").construct_mapping(node)) == len(names)
    assert time.process_time() - started < 2


def test_an_error_about_what_was_typed_does_not_name_the_file(from_file):
    for typed in (["--alpha", "-2"], ["--alpha=-2"]):
        with pytest.raises(ValueError, match=r"^alpha: expected a finite number >= 0"):
            from_file("alpha: -1\n", *typed)


def test_what_is_saved_reads_back_as_the_same_settings(tmp_path):
    config = parsed("--alpha", "0.35", "--layers_to_transform", "0", "2", "--kernel_bandwidth", "1.5", "--use_rslora")
    path = tmp_path / "saved.yaml"
    path.write_text(to_yaml(config))
    assert parse(SftConfig, ["--config", str(path)], "x")[0] == config


@pytest.mark.parametrize(("given", "now"), [(True, "group_by_length"), (False, "random")])
def test_a_file_may_call_the_order_of_the_examples_as_earlier_versions_did(tmp_path, given, now):
    assert parsed("--config", config_file(tmp_path, group_by_length=given)).train_sampling_strategy == now


def test_an_unknown_key_or_flag_suggests_the_nearest(tmp_path):
    with pytest.raises(ValueError, match="unknown key 'num_partcles'; did you mean 'num_particles'"):
        parsed("--config", config_file(tmp_path, num_partcles=3))
    with pytest.raises(ValueError, match="unknown flag '--leraning_rate'; did you mean '--learning_rate'"):
        parse(SftConfig, ["--leraning_rate=1"], "renyi-engine sft")


def test_a_file_that_is_no_mapping_or_not_there_is_told_in_one_line(tmp_path):
    path = tmp_path / "list.yaml"
    path.write_text("- a\n- b\n")
    with pytest.raises(ValueError, match="expected 'name: value' lines; got list"):
        parsed("--config", str(path))
    with pytest.raises(ValueError, match="not a readable YAML file"):
        parsed("--config", str(tmp_path / "gone.yaml"))


def test_an_entry_of_a_list_is_never_taken_for_a_flag(tmp_path):
    path = tmp_path / "prompts.yaml"
    given = "model_name_or_path: m\nensemble: e\nprompts: "
    path.write_text(given + "['- red = 3?', '-5', '--what is this', a]")
    config, _ = parse(GenerateConfig, ["--config", str(path)], "renyi-engine generate")
    assert config.prompts == ["- red = 3?", "-5", "--what is this", "a"]
    for entry in ("--seed=9", "--seed", "-x", "--", "--seed=9 and more"):
        path.write_text(given + f"[a, '{entry}']")
        with pytest.raises(ValueError, match=f"prompts: '{entry}' would be taken for a flag"):
            parse(GenerateConfig, ["--config", str(path)], "renyi-engine generate")


def test_a_list_of_a_file_takes_no_word_of_the_command_line(tmp_path):
    file = config_file(tmp_path, layers_to_transform=["3"])
    with pytest.raises(ValueError, match=r"^command line: unknown flag '5'"):
        parse(SftConfig, ["5", *NEEDED, "--config", file], "renyi-engine sft")


def test_a_text_of_a_list_that_begins_like_help_is_refused_by_its_name(from_file):
    text = 'ensemble: e\nprompts: [first, "-hello world"]\n'
    with pytest.raises(ValueError, match="prompts: '-hello world' would be taken for a flag"):
        from_file(text, cls=GenerateConfig)


def test_no_value_of_a_file_is_evaluated(tmp_path):
    marker = tmp_path / "marker"
    path = tmp_path / "evil.yaml"
    path.write_text(f"alpha: !!python/object/apply:os.system ['touch {marker}']\n")
    with pytest.raises(ValueError, match="not a readable YAML file"):
        parsed("--config", str(path))
    assert not marker.exists()


def test_help_shows_required_flags_first_and_rare_ones_last(capsys):
    with pytest.raises(SystemExit):
        parse(SftConfig, ["--help"], "renyi-engine sft")
    shown = capsys.readouterr().out
    groups = re.findall(r"^(\w[\w ]*):$", shown, re.M)
    assert groups[0] == "required"
    assert groups[-1] == "advanced"
    assert len(set(groups)) == len(groups)
    required = shown.split("required:")[1].split("\n\n")[0]
    assert re.findall(r"^  --(\w+)", required, re.M) == ["model_name_or_path", "dataset_name", "output_dir"]
    assert all(f"--{name} " in shown.splitlines()[0] for name in ("model_name_or_path", "dataset_name", "output_dir"))


def test_help_names_every_setting_once_and_its_default_if_it_has_one(capsys):
    with pytest.raises(SystemExit):
        parse(SftConfig, ["--help"], "renyi-engine sft")
    shown = capsys.readouterr().out
    listed = re.findall(r"^  --(\S+)", shown, re.M)
    assert sorted(listed) == sorted(
        [*(field.name for field in dataclasses.fields(SftConfig)), "config", "print_config"]
    )
    text = " ".join(shown.split())
    assert "--alpha_0 X The alpha that the schedule starts from. Default: 0.0." in text
    assert "Default: None" not in text
    assert "Default: false" not in text.lower()
