"""The records of a run: every name is declared once, and config.yaml says what kind of run it is."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from renyi_engine import DpoConfig, DpoTask, SftTask, train
from renyi_engine.core import parse, to_yaml
from renyi_engine.critical_alpha import AlphaStarConfig
from renyi_engine.evaluation import GenerateConfig, MmluConfig, NllConfig, RefusalConfig
from renyi_engine.objectives import EVAL, metrics_of
from renyi_engine.training import loop, records
from renyi_engine.training.config import CONFIGS, SftConfig
from renyi_engine.training.export import export_particles
from renyi_engine.training.records import read_run

OF_A_RUN = [value.name for value in vars(records).values() if isinstance(value, records.Metric)]


def make(kind, sft_config, dpo_config, data_file):
    if kind == "dpo":
        return dpo_config()
    return sft_config(eval_dataset_name=str(data_file), dataset_test_split="train")


@pytest.mark.parametrize(("kind", "task"), [("sft", SftTask), ("dpo", DpoTask)])
def test_every_number_of_a_line_is_declared(sft_config, dpo_config, data_file, monkeypatch, kind, task):
    monkeypatch.setattr(loop, "estimate_alpha_star", lambda *_, **__: 0.5)
    config = replace(make(kind, sft_config, dpo_config, data_file), max_steps=2)
    run = train(replace(config, alpha_controller="alpha-star:0.1")).output_dir
    declared = {metric.name: metric for metric in metrics_of(task)}
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for line in lines:
        of_eval = any(name.startswith(EVAL) for name in line)
        known = {EVAL + name for name in (*declared, "num_examples")} if of_eval else {*declared, *OF_A_RUN}
        assert line.keys() - {"step", "epoch"} <= known
        for name, value in line.items():
            metric = declared.get(name.removeprefix(EVAL))
            assert metric is None or metric.per_particle == isinstance(value, list), name
    assert [metric.name for metric in task.details] == [
        name for name in lines[0] if name in {metric.name for metric in task.details}
    ]


@pytest.mark.parametrize("kind", ["sft", "dpo"])
def test_config_yaml_begins_with_the_kind_of_the_run(sft_config, dpo_config, data_file, tmp_path, kind):
    config = replace(make(kind, sft_config, dpo_config, data_file), max_steps=1)
    run = train(config).output_dir
    path = run / "config.yaml"
    assert path.read_text().startswith(f"kind: {kind}\n")
    # it is taken as a --config file by its own command alone
    again, _ = parse(CONFIGS[kind], ["--config", str(path)], f"renyi-engine {kind}")
    assert again == config
    other = {"sft": "dpo", "dpo": "sft"}[kind]
    with pytest.raises(ValueError, match=f"^{path}: kind: expected the settings of {other}; got those of '{kind}'"):
        parse(CONFIGS[other], ["--config", str(path)], f"renyi-engine {other}")
    assert read_run(run).unit == {"sft": "token", "dpo": "pair"}[kind]


@pytest.mark.parametrize("kind", ["sft", "dpo"])
def test_a_folder_of_an_earlier_version_is_read(sft_config, dpo_config, data_file, tmp_path, kind):
    config = replace(make(kind, sft_config, dpo_config, data_file), max_steps=1)
    run = train(config).output_dir
    path = run / "config.yaml"
    settings = path.read_text().removeprefix(f"kind: {kind}\n")
    settings = settings.replace("train_sampling_strategy: random", "group_by_length: false")
    for newer in ("padding_free: true\n", "packed_row_tokens: null\n", "cuda_graphs: auto\n", "torch_compile: auto\n"):
        assert newer in settings
        settings = settings.replace(newer, "")
    path.write_text(settings)
    assert "group_by_length: false" in path.read_text()
    assert read_run(run).unit == {"sft": "token", "dpo": "pair"}[kind]
    assert export_particles(run, tmp_path / "exported").is_dir()
    assert train(replace(config, resume_from_checkpoint="true", max_steps=2)).global_step == 2
    assert path.read_text().startswith(f"kind: {kind}\n")


def test_a_run_of_one_kind_is_not_resumed_as_another(sft_config, dpo_config):
    run = Path(train(sft_config(max_steps=1)).output_dir)
    with pytest.raises(ValueError, match=r"started with other settings:(?s:.*)\n  kind: 'sft' then, 'dpo' now"):
        train(replace(dpo_config(), output_dir=str(run), resume_from_checkpoint="true"))


def test_settings_of_another_command_are_no_training_run(sft_config, tmp_path):
    run = train(sft_config(max_steps=1)).output_dir
    settings = yaml.safe_load((run / "config.yaml").read_text())
    (run / "config.yaml").write_text(yaml.safe_dump(settings | {"kind": "nll"}))
    for read in (read_run, lambda run: export_particles(run, tmp_path / "exported")):
        with pytest.raises(ValueError, match=r"config.yaml: kind: expected a training run \(sft or dpo\); got 'nll'"):
            read(run)


def test_every_command_that_saves_settings_says_its_own_kind():
    classes = [SftConfig, DpoConfig, NllConfig, MmluConfig, RefusalConfig, AlphaStarConfig, GenerateConfig]
    assert len({cls.kind for cls in classes}) == len(classes)
    assert yaml.safe_load(to_yaml(SftConfig(output_dir="o")))["kind"] == "sft"


@pytest.mark.parametrize("step", ['"2"', "2.5", "null", "[2]"])
def test_a_line_whose_step_is_no_whole_number_is_damaged(tmp_path, step):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n' + f'{{"step": {step}}}\n' + '{"step": 2}\n{"step": 3}\n')
    found = records.Records(tmp_path)
    assert [record["step"] for record in found.metrics()] == [1, 2, 3]
    with pytest.warns(UserWarning, match=r"metrics\.jsonl: line 2 is damaged and is left out"):
        found.go_back_to(2)
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n'
