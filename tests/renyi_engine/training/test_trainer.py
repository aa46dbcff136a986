"""Trainer: every part that is given is used instead of loaded, and its setting may be left out."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import datasets
import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

from renyi_engine import LoraEnsemble, SftConfig, Trainer, TrainingDiverged, base_model, train
from renyi_engine.core.files import sha256_of
from renyi_engine.training import write_report
from renyi_engine.training.export import export_particles

from .runs import forbid_the_model, metrics, poison


@pytest.fixture
def rows(data_file):
    return [json.loads(line) for line in data_file.read_text().splitlines()]


@pytest.fixture
def parts(model_folder, rows):
    """What a `Trainer` can be given: the same that `sft_config` names."""
    return {
        "model": AutoModelForCausalLM.from_pretrained(model_folder),
        "processing_class": AutoTokenizer.from_pretrained(model_folder),
        "train_dataset": rows,
    }


def adapters(run: Path, step: int) -> str:
    return sha256_of(run / f"checkpoint-{step}" / "adapters.safetensors")


def bits(model) -> dict:
    return {name: value.clone() for name, value in model.state_dict().items()}


@pytest.mark.parametrize("kind", ["rows", "Dataset"])
def test_given_parts_train_as_the_loaded_ones_bit_for_bit(sft_config, data_file, parts, tmp_path, monkeypatch, kind):
    named = sft_config(eval_dataset_name=str(data_file), dataset_test_split="train", eval_steps=2)
    train(named)
    if kind == "Dataset":
        parts["train_dataset"] = datasets.Dataset.from_list(parts["train_dataset"])
    forbid_the_model(monkeypatch)
    monkeypatch.setattr(base_model, "load_tokenizer", lambda *_: pytest.fail("the tokenizer was loaded"))
    given = replace(
        named, model_name_or_path="", dataset_name="", eval_dataset_name=None, output_dir=str(tmp_path / "given")
    )
    result = Trainer(given, eval_dataset=parts["train_dataset"], **parts).train()
    assert adapters(result.output_dir, 6) == adapters(Path(named.output_dir), 6)
    assert metrics(result.output_dir) == metrics(Path(named.output_dir))
    assert result.ensemble.model is parts["model"]


def test_a_dataset_is_read_as_its_owner_sees_it(sft_config, rows, tmp_path):
    """with_transform changes the rows, and with_format chooses columns."""
    upper = [{"text": row["prompt"].upper()} for row in rows]
    shout = lambda batch: {"text": [text.upper() for text in batch["text"]]}
    transformed = datasets.Dataset.from_list([{"text": row["prompt"]} for row in rows]).with_transform(shout)
    chosen = datasets.Dataset.from_list([row | {"messages": []} for row in rows]).with_format(columns=[*rows[0]])
    for name, given, plain in (("transformed", transformed, upper), ("chosen", chosen, rows)):
        runs = [sft_config(max_steps=2, output_dir=str(tmp_path / f"{name}-{number}")) for number in range(2)]
        for config, dataset in zip(runs, (given, plain), strict=True):
            Trainer(config, train_dataset=dataset).train()
        assert metrics(Path(runs[0].output_dir)) == metrics(Path(runs[1].output_dir)), name


def test_a_given_model_is_given_back_as_it_was(sft_config, parts):
    model, before = parts["model"], bits(parts["model"])
    trainable = [parameter.requires_grad for parameter in model.parameters()]
    result = Trainer(sft_config(max_steps=2), model=model).train()
    assert result.ensemble.detach() is model
    assert all(value.equal(before[name]) for name, value in model.state_dict().items())
    assert [parameter.requires_grad for parameter in model.parameters()] == trainable
    LoraEnsemble.from_pretrained(model, result.output_dir / "particles").detach()


def test_a_given_model_is_free_again_when_training_fails(sft_config, parts, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(TrainingDiverged):
        poison(patch, None, {2, 3, 4})
        Trainer(sft_config(max_consecutive_skips=2), model=parts["model"]).train()
    config = sft_config(resume_from_checkpoint="true", max_consecutive_skips=20)
    with pytest.warns(UserWarning, match="holds no checkpoint yet"):
        assert Trainer(config, model=parts["model"]).train().global_step == 6


def test_a_model_alone_brings_its_tokenizer(sft_config, parts):
    config = replace(sft_config(max_steps=1), model_name_or_path="")
    run = Trainer(config, model=parts["model"]).train().output_dir
    saved = yaml.safe_load((run / "config.yaml").read_text())
    assert saved["model_name_or_path"] == parts["model"].name_or_path
    parts["model"].name_or_path = parts["model"].config._name_or_path = ""
    with pytest.raises(ValueError, match=r"^processing_class: needed, but not given, because the model does not say"):
        Trainer(config, model=parts["model"])


def test_what_is_made_of_given_parts_can_be_exported_and_reported(sft_config, parts, tmp_path):
    config = replace(sft_config(max_steps=2), model_name_or_path="", dataset_name="")
    run = Trainer(config, **parts).train().output_dir
    assert (export_particles(run, tmp_path / "exported") / "p002").is_dir()
    assert write_report([run], tmp_path / "report.html").is_file()
    saved = yaml.safe_load((run / "config.yaml").read_text())
    assert (saved["kind"], saved["dataset_name"]) == ("sft", "")


def test_preferences_are_trained_on_given_pairs(dpo_config):
    pairs = [{"prompt": f"{i}: ", "chosen": "yes", "rejected": "no"} for i in range(6)]
    config = dpo_config(dataset_name="", eval_dataset_name=None, max_steps=2)
    result = Trainer(config, train_dataset=pairs, eval_dataset=pairs[:2]).train()
    last = metrics(result.output_dir)[-1]
    assert last["eval_num_examples"] == 2
    assert len(last["eval_particle_rewards/margins"]) == 3


def test_a_run_on_given_rows_is_resumed_on_the_same_rows_only(sft_config, rows):
    config = replace(sft_config(max_steps=2), dataset_name="")
    Trainer(config, train_dataset=rows, eval_dataset=rows[:3]).train()
    again = replace(config, resume_from_checkpoint="true", max_steps=3)
    with pytest.raises(ValueError, match=r"^train_dataset: the training rows are not those of .*checkpoint-2: sha256"):
        Trainer(again, train_dataset=rows[::-1], eval_dataset=rows[:3]).train()
    with pytest.raises(ValueError, match=r"^eval_dataset: the held-out rows are not those of "):
        Trainer(again, train_dataset=rows, eval_dataset=rows[:2]).train()
    with pytest.raises(ValueError, match=r"^eval_dataset: the held-out rows are not those of "):
        Trainer(again, train_dataset=rows).train()
    other = AutoTokenizer.from_pretrained(config.model_name_or_path)
    other.eos_token = "<unk>"
    with pytest.raises(ValueError, match=r"^processing_class: the tokens are not those of "):
        Trainer(again, train_dataset=rows, eval_dataset=rows[:3], processing_class=other).train()
    same = datasets.Dataset.from_list(rows)
    assert Trainer(again, train_dataset=same, eval_dataset=rows[:3]).train().global_step == 3


def test_a_run_on_a_given_model_is_resumed_on_the_same_weights_only(sft_config, parts):
    config = sft_config(max_steps=1)
    Trainer(config, model=parts["model"]).train().ensemble.detach()
    with torch.no_grad():
        parts["model"].model.norm.weight += 1
    again = replace(config, resume_from_checkpoint="true", max_steps=2)
    with pytest.raises(ValueError, match=r"the base model's weights changed: model\.norm\.weight"):
        Trainer(again, model=parts["model"]).train()


@pytest.mark.parametrize(
    ("missing", "given"), [("model_name_or_path", ["train_dataset"]), ("dataset_name", ["model", "processing_class"])]
)
def test_what_is_neither_given_nor_named_is_asked_for(sft_config, parts, missing, given):
    config = replace(sft_config(), **{missing: ""})
    with pytest.raises(ValueError, match=f"^{missing}: needed, but not given; pass --{missing} or put it into"):
        Trainer(config, **{name: parts[name] for name in given})
    with pytest.raises(ValueError, match=f"^{missing}: needed"):
        train(config)


@pytest.mark.parametrize(
    ("argument", "value", "message"),
    [
        ("model", "gpt2", "model: expected a model of transformers; got str"),
        ("processing_class", "gpt2", "processing_class: expected a tokenizer of transformers; got str"),
        ("train_dataset", "rows.jsonl", "train_dataset: expected a datasets.Dataset, or a sequence of rows.*; got str"),
        ("train_dataset", datasets.DatasetDict(), "train_dataset: expected a datasets.Dataset.*; got DatasetDict"),
        ("eval_dataset", [["a", "b"]], "eval_dataset: expected a datasets.Dataset.*; got list"),
        ("eval_dataset", iter([]), "eval_dataset: expected a datasets.Dataset"),
        ("config", SftConfig, "config: expected an SftConfig or a DpoConfig; got type"),
    ],
)
def test_a_part_of_another_type_is_refused_by_name(sft_config, monkeypatch, argument, value, message):
    forbid_the_model(monkeypatch)
    with pytest.raises(TypeError, match=f"^{message}"):
        Trainer(**{"config": sft_config()} | {argument: value}).train()


@pytest.mark.parametrize(
    ("argument", "value", "message"),
    [
        ("train_dataset", [], "it is empty"),
        ("train_dataset", [{"promt": "a", "completion": "b"}], "is 'promt' meant to be 'prompt'"),
        ("eval_dataset", [{"text": 7}], "row 0: text: expected a string"),
    ],
)
def test_rows_that_cannot_be_used_are_refused_by_name(sft_config, monkeypatch, argument, value, message):
    forbid_the_model(monkeypatch)
    with pytest.raises(ValueError, match=f"^{argument}: .*{message}|^{message}"):
        Trainer(sft_config(), **{argument: value}).train()


def test_a_given_model_that_carries_an_ensemble_is_refused_before_the_data_are_read(sft_config, model_folder):
    model = AutoModelForCausalLM.from_pretrained(model_folder)
    LoraEnsemble.attach(model)
    with pytest.raises(ValueError, match="model: it already carries an ensemble"):
        Trainer(sft_config(dataset_name="gone.jsonl"), model=model).train()


def test_a_given_model_in_float16_is_refused(sft_config, parts):
    with pytest.raises(ValueError, match="is stored in float16, whose range is too small"):
        Trainer(sft_config(), model=parts["model"].half()).train()


def test_given_rows_leave_the_test_split_of_the_named_data_alone(sft_config, rows):
    config = sft_config(max_steps=1, dataset_name="/no/such/file.jsonl")
    run = Trainer(config, train_dataset=rows).train().output_dir
    assert json.loads((run / "run.json").read_text())["num_eval_examples"] == 0
