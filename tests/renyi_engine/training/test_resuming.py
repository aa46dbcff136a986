"""Stopping and going on: a stopped run goes on bit for bit, and only as what it was."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from renyi_engine import train
from renyi_engine.core import files
from renyi_engine.core.files import read_json, sha256_of
from renyi_engine.data.rows import content_hash
from renyi_engine.training import checkpoint

from .runs import (
    Killed,
    act_in,
    alphas,
    checkpoints,
    fingerprint,
    forbid_the_model,
    kill,
    loaded,
    metrics,
    no_space,
)

pytestmark = pytest.mark.usefixtures("without_report")


@pytest.mark.parametrize(
    "changed",
    [
        {},
        {"prior": "smoothed_kl"},
        {"alpha_schedule": "linear", "alpha_0": 0.1, "alpha_warmup_steps": 12},
        {"alpha_schedule": "cosine", "alpha_warmup_steps": 0.8},
        {"alpha_controller": "ess:0.7", "alpha_max": 20.0, "init": "spread"},
        # estimates before steps 0 and 7: the last step of the checkpoint, in the middle of a window
        {"alpha_controller": "alpha-star:0.2", "alpha_star_steps": 7},
        {"particle_weights": "learned", "init": "spread"},
    ],
    ids=["potential", "smoothed_kl", "linear", "cosine", "ess", "alpha-star", "learned"],
)
def test_killed_in_the_middle_of_an_accumulation_it_resumes_bitwise_equal(sft_config, tmp_path, monkeypatch, changed):
    settings = {
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "max_steps": 14,  # 6 steps an epoch: the third epoch is begun
        "save_steps": 4,
        "logging_steps": 3,  # the window of metrics spans a checkpoint
        "lr_scheduler_type": "cosine",
        "train_sampling_strategy": "group_by_length",
        "prior_lambda": 1.0,
    }
    whole = sft_config(output_dir=str(tmp_path / "whole"), **settings | changed)
    train(whole)
    broken = sft_config(output_dir=str(tmp_path / "broken"), **settings | changed)
    with monkeypatch.context() as patch, pytest.raises(Killed):
        act_in(patch, 20, kill)  # in step 11, after its first micro-batch; the last checkpoint is of step 8
        train(broken)
    assert checkpoints(tmp_path / "broken") == [4, 8]
    torch.manual_seed(123)
    train(replace(broken, resume_from_checkpoint="true"))
    assert fingerprint(tmp_path / "broken", 14) == fingerprint(tmp_path / "whole", 14)
    assert metrics(tmp_path / "broken") == metrics(tmp_path / "whole")
    read = lambda run: (tmp_path / run / "evaluation.json").read_text()
    assert read("broken") == read("whole")
    assert (len(set(alphas(tmp_path / "whole"))) > 1) == whole.alpha_varies


def test_resuming_with_other_settings_is_refused_with_a_diff(sft_config):
    config = sft_config(max_steps=2)
    train(config)
    for name, value in {
        "num_particles": 2,
        "lora_r": 3,
        "alpha": 0.1,
        "alpha_schedule": "linear",
        "alpha_0": 0.1,
        "alpha_warmup_steps": 3.0,
        "alpha_controller": "ess:0.5",
        "alpha_max": 1.5,
        "alpha_star_steps": 5,
        "lora_target_modules": ["q_proj"],
        "model_name_or_path": config.model_name_or_path + "/.",
    }.items():
        with pytest.raises(ValueError, match=f"started with other settings:\n  {name}: .* then, .* now"):
            train(replace(config, resume_from_checkpoint="true", **{name: value}))
    train(replace(config, resume_from_checkpoint="true", max_steps=3, logging_steps=2))


def test_resuming_on_other_weights_under_the_same_name_is_refused(sft_config, model_folder, tmp_path):
    import shutil

    model = tmp_path / "model"
    shutil.copytree(model_folder, model)
    config = sft_config(max_steps=1, model_name_or_path=str(model))
    train(config)
    weights = load_file(model / "model.safetensors")
    weights["model.norm.weight"] += 1
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="the base model's weights changed"):
        train(replace(config, resume_from_checkpoint="true", max_steps=2))


def test_resuming_on_other_rows_under_the_same_name_is_refused(sft_config, jsonl, tmp_path, monkeypatch):
    rows = [{"prompt": f"{i}: ", "completion": "yes" * (1 + i % 2)} for i in range(6)]
    train_file, held_file = tmp_path / "train.jsonl", tmp_path / "held.jsonl"
    jsonl(train_file, rows)
    jsonl(held_file, rows[:3])
    config = sft_config(dataset_name=str(train_file), eval_dataset_name=str(held_file), max_steps=1)
    saved = read_json(train(config).output_dir / "run.json")["data_sha256"]
    assert saved["training rows"] == content_hash(rows)
    assert saved["held-out rows"] == content_hash(rows[:3])
    again = replace(config, resume_from_checkpoint="true", max_steps=2)
    edited = [rows[0] | {"completion": "no"}, *rows[1:]]
    with monkeypatch.context() as patch:
        forbid_the_model(patch)
        for changed in (edited, rows[::-1], rows[:-1], [*rows, rows[0]]):
            jsonl(train_file, changed)
            hashes = f"sha256 {content_hash(rows)[:8]} then, {content_hash(changed)[:8]} now"
            with pytest.raises(
                ValueError, match=f"^dataset_name: the training rows are not those of .*: {hashes}; "
            ) as e:
                train(again)
            assert "\n" not in str(e.value)
        jsonl(train_file, rows)
        jsonl(held_file, rows[:2] + rows[3:4])
        with pytest.raises(ValueError, match=r"^eval_dataset_name: the held-out rows are not those of "):
            train(again)
    # the same content, written otherwise
    jsonl(held_file, [dict(reversed(row.items())) for row in rows[:3]])
    assert train(again).global_step == 2


def test_resuming_with_another_test_split_names_it(sft_config, jsonl, tmp_path):
    rows = [{"prompt": f"{i}: ", "completion": "yes"} for i in range(6)]
    (tmp_path / "rows").mkdir()
    jsonl(tmp_path / "rows" / "train.jsonl", rows)
    jsonl(tmp_path / "rows" / "test.jsonl", rows[:2])
    config = sft_config(dataset_name=str(tmp_path / "rows"), max_steps=1)
    train(config)
    jsonl(tmp_path / "rows" / "test.jsonl", rows[2:4])
    with pytest.raises(ValueError, match=r"^dataset_test_split: the held-out rows are not those of "):
        train(replace(config, resume_from_checkpoint="true", max_steps=2))


def test_a_run_can_be_resumed_on_the_day_after_though_the_chat_template_writes_the_date(
    sft_config, model_folder, tokenizer, jsonl, tmp_path, monkeypatch
):
    import copy
    import datetime
    import shutil

    from transformers.utils import chat_template_utils

    class Clock(datetime.datetime):
        today = datetime.datetime(2026, 1, 31)

        @classmethod
        def now(cls, tz=None):
            return cls.today

    monkeypatch.setattr(chat_template_utils, "datetime", Clock)
    model = tmp_path / "model"
    shutil.copytree(model_folder, model)
    dated = copy.deepcopy(tokenizer)
    dated.chat_template = "{{ strftime_now('%d.%m.') }}" + tokenizer.chat_template
    dated.save_pretrained(model)
    messages = [{"role": "user", "content": "red?"}, {"role": "assistant", "content": "rouge"}]
    rows = jsonl(tmp_path / "chats.jsonl", [{"messages": messages}] * 4)
    config = sft_config(max_steps=1, model_name_or_path=str(model), dataset_name=str(rows))
    train(config)
    Clock.today = datetime.datetime(2026, 2, 1)
    train(replace(config, resume_from_checkpoint="true", max_steps=2))
    dated.eos_token = "<unk>"
    dated.save_pretrained(model)
    with pytest.raises(ValueError, match=r"^model_name_or_path: the tokens are not those of "):
        train(replace(config, resume_from_checkpoint="true", max_steps=3))


def test_resuming_with_another_tokenizer_under_the_same_name_is_refused(sft_config, model_folder, tokenizer, tmp_path):
    import copy
    import shutil

    model = tmp_path / "model"
    shutil.copytree(model_folder, model)
    config = sft_config(max_steps=1, model_name_or_path=str(model))
    train(config)
    other = copy.deepcopy(tokenizer)
    other.eos_token = "<unk>"
    other.save_pretrained(model)
    with pytest.raises(ValueError, match=r"^model_name_or_path: the tokens are not those of "):
        train(replace(config, resume_from_checkpoint="true", max_steps=2))


def test_a_checkpoint_that_does_not_say_what_data_it_is_of_is_refused(sft_config):
    config = sft_config(max_steps=1)
    checkpoint = train(config).output_dir / "checkpoint-1"
    state = read_json(checkpoint / "state.json")
    del state["data_sha256"]
    files.write_json(checkpoint / "state.json", state)
    manifest = read_json(checkpoint / "manifest.json")
    path = checkpoint / "state.json"
    manifest["state.json"] = {"bytes": path.stat().st_size, "sha256": sha256_of(path)}
    files.write_json(checkpoint / "manifest.json", manifest)
    with pytest.raises(ValueError, match=r"resume_from_checkpoint: .* was written by another version of renyi-engine"):
        train(replace(config, resume_from_checkpoint="true", max_steps=2))


def test_a_split_that_is_asked_for_by_name_has_to_be_there(sft_config, tmp_path, jsonl):
    for name in ("dataset_train_split", "dataset_test_split"):
        with pytest.raises(
            ValueError, match=f"^{name}: .* has no split 'dev'; it has no splits at all: leave --{name} out"
        ):
            train(sft_config(**{name: "dev"}))
    (tmp_path / "rows").mkdir()
    for split in ("train", "validation"):
        jsonl(tmp_path / "rows" / f"{split}.jsonl", [{"prompt": "a", "completion": split}] * 4)
    folder = str(tmp_path / "rows")
    with pytest.raises(
        ValueError, match=r"^dataset_test_split: .* has no split 'dev'; it has \['train', 'validation'\]"
    ):
        train(sft_config(dataset_name=folder, dataset_test_split="dev"))
    run = train(sft_config(dataset_name=folder, dataset_test_split="validation", max_steps=1)).output_dir
    assert json.loads((run / "run.json").read_text())["num_eval_examples"] == 4


def test_a_folder_that_holds_a_run_is_not_overwritten(sft_config):
    config = sft_config(max_steps=1)
    train(config)
    with pytest.raises(ValueError, match=r"already holds a run; .* --resume_from_checkpoint true"):
        train(config)


def test_there_must_be_a_run_to_resume_but_it_need_not_have_saved_yet(sft_config, monkeypatch, tmp_path):
    config = sft_config(max_steps=2, resume_from_checkpoint="true")
    with pytest.raises(ValueError, match="holds no run to continue"):
        train(config)
    with monkeypatch.context() as patch, pytest.raises(Killed):
        act_in(patch, 1, kill)
        train(replace(config, resume_from_checkpoint=None))
    with pytest.warns(UserWarning, match="holds no checkpoint yet; starting from step 0"):
        assert train(config).global_step == 2


@pytest.fixture
def saved_run(sft_config):
    """A finished run with the checkpoints of steps 2 and 4, and the settings to resume it."""
    config = sft_config(max_steps=4, save_steps=2)
    train(config)
    return Path(config.output_dir), replace(config, resume_from_checkpoint="true", max_steps=6)


@pytest.mark.parametrize("damage", ["truncated", "no manifest"])
def test_a_newest_checkpoint_that_was_cut_short_is_passed_over_naming_both(saved_run, damage):
    run, config = saved_run
    newest = run / "checkpoint-4"
    if damage == "truncated":
        whole = (newest / "adapters.safetensors").read_bytes()
        (newest / "adapters.safetensors").write_bytes(whole[: len(whole) // 2])
    else:
        (newest / "manifest.json").unlink()
    with pytest.warns(UserWarning, match=r"checkpoint-4.*falling back to .*checkpoint-2"):
        assert train(config).global_step == 6


def test_one_flipped_bit_is_an_error_that_names_the_file(saved_run):
    run, config = saved_run
    path = run / "checkpoint-4" / "optimizer.safetensors"
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"optimizer\.safetensors: sha256 differs"):
        train(config)


def test_a_nan_in_a_checkpoint_is_refused_naming_tensor_and_particle(saved_run):
    run, config = saved_run
    folder = run / "checkpoint-4"
    tensors = load_file(folder / "adapters.safetensors")
    name = "model.layers.1.mlp.up_proj.lora_A"
    tensors[name][2, 0, 0] = float("nan")
    save_file(tensors, folder / "adapters.safetensors")
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["adapters.safetensors"] = {
        "bytes": (folder / "adapters.safetensors").stat().st_size,
        "sha256": sha256_of(folder / "adapters.safetensors"),
    }
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match=rf"particle 2: tensor {re.escape(name)} holds NaN"):
        train(config)


def test_what_a_kill_left_half_written_is_removed_with_a_warning(saved_run):
    run, config = saved_run
    leftover = run / ".tmp-checkpoint-6"
    leftover.mkdir()
    (leftover / "adapters.safetensors").write_bytes(b"half")
    with pytest.warns(UserWarning, match=r"\.tmp-checkpoint-6: removed"):
        train(config)
    assert not leftover.exists()


def test_a_full_disk_leaves_the_earlier_checkpoint_whole(saved_run, monkeypatch):
    run, config = saved_run
    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space left"):
        patch.setattr(files, "write_json", no_space)
        checkpoint.save(run, 6, *loaded(config), {}, keep=2)
    assert not list(run.glob(".tmp-*"))
    assert checkpoint.newest(run) == run / "checkpoint-4"


@pytest.mark.parametrize("wholly", [False, True])
def test_a_run_that_an_error_ends_says_so(sft_config, monkeypatch, wholly):
    """Where not even run.json can be written, the error that ended the run is still the one that is raised."""
    config = sft_config(max_steps=3, save_steps=2)
    run_file = Path(config.output_dir) / "run.json"

    def save(*_):
        if wholly:
            monkeypatch.setattr(files, "write_json", no_space)
        raise RuntimeError("of the save")

    monkeypatch.setattr(checkpoint, "save", save)
    with pytest.raises(RuntimeError, match="of the save"):
        train(config)
    assert json.loads(run_file.read_text())["status"] == ("running" if wholly else "failed")
