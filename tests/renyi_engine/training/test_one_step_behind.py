"""The loop reads the measurements of a step when the next one was asked for. No file shows that."""

from __future__ import annotations

import threading
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import TrainerCallback

from renyi_engine import Trainer, TrainingDiverged, train
from renyi_engine.objectives.sft import SftTask
from renyi_engine.training import loop
from renyi_engine.training.batches_ahead import BatchesAhead
from renyi_engine.training.loss_spikes import HISTORY
from renyi_engine.training.outcomes import Outcomes

from .runs import Killed, act_in, change_scores, checkpoints, fingerprint, kill, metrics, poison, skips, spike

pytestmark = pytest.mark.usefixtures("without_report")


def read_every_step_at_once(monkeypatch):
    read = Outcomes.read
    monkeypatch.setattr(Outcomes, "read", lambda self, but_newest=False: read(self))


def note_reads(monkeypatch) -> list[tuple[int, int]]:
    """(step, how many steps were made by then) of every step that is read from now on."""
    take, noted = Outcomes._take, []

    def noting(self, step):
        noted.append((step.number, self.state.step))
        take(self, step)

    monkeypatch.setattr(Outcomes, "_take", noting)
    return noted


def what_it_wrote(run: Path) -> dict:
    files = [path for path in run.rglob("*") if path.is_file() and path.suffix in (".safetensors", ".jsonl", ".json")]
    found = {str(path.relative_to(run)): path.read_bytes() for path in files if path.name != "run.json"}
    return found | {"metrics.jsonl": metrics(run)}


@pytest.mark.parametrize(
    "changed",
    [
        {},
        {"alpha_schedule": "linear", "eval_steps": 5},
        {"alpha_controller": "ess:0.7", "alpha_max": 20.0, "init": "spread"},
        {"alpha_controller": "alpha-star:0.2", "alpha_star_steps": 7},
    ],
    ids=["constant", "linear", "ess", "alpha-star"],
)
def test_every_file_is_the_same_as_if_each_step_were_read_at_once(
    sft_config, data_file, tmp_path, monkeypatch, changed
):
    """With a sick particle, spikes, checkpoints and lines that fall on them and beside them."""
    settings = {
        "max_steps": HISTORY + 9, "logging_steps": 3, "save_steps": 4, "save_total_limit": 9, "spike_threshold": 5.0,
        "eval_dataset_name": str(data_file), "dataset_test_split": "train", "gradient_accumulation_steps": 2,
        "per_device_train_batch_size": 2,
    }  # fmt: skip
    runs = []
    for name in ("behind", "at_once"):
        with monkeypatch.context() as patch:
            patch.setattr(loop, "estimate_alpha_star", lambda *_, seed, **__: seed % 97 / 97)
            if name == "at_once":
                read_every_step_at_once(patch)
            poison(patch, 1, {5, 14})
            spike(patch, range(2 * (HISTORY + 4), 2 * (HISTORY + 5)))
            runs.append(train(sft_config(output_dir=str(tmp_path / name), **settings | changed)).output_dir)
    assert skips(runs[0]) == skips(runs[1]) != []
    behind, at_once = map(what_it_wrote, runs)
    assert behind.keys() == at_once.keys()
    assert [name for name in behind if behind[name] != at_once[name]] == []


def test_a_step_is_read_after_the_next_one_was_made_and_before_anything_is_written(sft_config, monkeypatch):
    noted = note_reads(monkeypatch)
    train(sft_config(max_steps=7, logging_steps=4, save_steps=6))
    assert noted == [(1, 2), (2, 3), (3, 4), (4, 4), (5, 6), (6, 6), (7, 7)]


@pytest.mark.parametrize("looked_at", ["by a callback", "by a controller"])
def test_where_something_looks_at_every_step_each_is_read_at_once(sft_config, monkeypatch, looked_at):
    noted = note_reads(monkeypatch)
    if looked_at == "by a callback":
        Trainer(sft_config(max_steps=5, logging_steps=9), callbacks=[TrainerCallback]).train()
    else:
        train(sft_config(max_steps=5, logging_steps=9, alpha_controller="ess:0.7"))
    assert noted == [(step, step) for step in range(1, 6)]


def test_a_run_that_ends_because_of_skips_may_make_one_more_step_but_names_the_right_one(sft_config, monkeypatch):
    poison(monkeypatch, 0, range(3, 99))
    config = sft_config(max_steps=20, logging_steps=50, save_steps=2, max_consecutive_skips=3)
    with pytest.raises(TrainingDiverged, match=r"no update of particles \[0\] 3 steps in a row"):
        train(config)
    run = Path(config.output_dir)
    assert [step for step, *_ in skips(run)] == [3, 4, 5]
    assert checkpoints(run) == [2, 4]


@pytest.mark.parametrize("due", ["logging_steps", "eval_steps", "save_steps"])
def test_nothing_is_written_of_the_step_that_ends_a_run(sft_config, data_file, monkeypatch, due):
    """It is read first, and so the run ends at once."""
    poison(monkeypatch, 0, range(3, 99))
    every = {"logging_steps": 50, "eval_steps": 50, "save_steps": 50} | {due: 4}
    held_out = {"eval_dataset_name": str(data_file), "dataset_test_split": "train"}
    config = sft_config(max_steps=20, max_consecutive_skips=2, **every, **held_out)
    noted = note_reads(monkeypatch)
    with pytest.raises(TrainingDiverged):
        train(config)
    assert noted[-1] == (4, 4)
    assert {path.name for path in Path(config.output_dir).iterdir()} == {"config.yaml", "run.json", "skipped.jsonl"}


def test_a_resumed_run_reads_what_it_would_have_read(sft_config, tmp_path, monkeypatch):
    """Killed while the skip of the step before has not been read."""
    settings = {"max_steps": 8, "save_steps": 3, "logging_steps": 4}
    whole, broken = (sft_config(output_dir=str(tmp_path / name), **settings) for name in ("whole", "broken"))
    with monkeypatch.context() as patch:
        poison(patch, 1, {5})
        train(whole)
    with monkeypatch.context() as patch, pytest.raises(Killed):
        poison(patch, 1, {5})
        act_in(patch, 6, kill)
        train(broken)
    with monkeypatch.context() as patch:
        poison(patch, 1, {2})
        train(replace(broken, resume_from_checkpoint="true"))
    assert skips(tmp_path / "broken") == skips(tmp_path / "whole") != []
    assert fingerprint(tmp_path / "broken", 8) == fingerprint(tmp_path / "whole", 8)
    assert metrics(tmp_path / "broken") == metrics(tmp_path / "whole")


# ---------------------------------------------------------------------- batches that are made ahead


def made(log):
    def collate(examples):
        log.append((list(examples), threading.current_thread() is threading.main_thread()))
        return {"input_ids": torch.tensor(examples)}

    return collate


def ids(batches):
    return [batch["input_ids"].tolist() for batch in batches]


def test_the_batches_that_were_begun_are_taken():
    log: list = []
    with BatchesAhead(range(10), made(log)) as batches:
        batches.begin([3, 1, 4], 2)
        assert ids(batches.take([3, 1, 4], 2)) == [[3, 1], [4]]
    assert log == [([3, 1], False), ([4], False)]


@pytest.mark.parametrize(("chosen", "size"), [([5, 6], 2), ([3, 1, 4], 1)])
def test_other_batches_are_made_anew(chosen, size):
    """Where a callback ended an epoch early, or micro-batches were halved."""
    with BatchesAhead(range(10), made([])) as batches:
        batches.begin([3, 1, 4], 2)
        found = ids(batches.take(chosen, size))
        assert found == [chosen[at : at + size] for at in range(0, len(chosen), size)]
        batches.begin([8], 2)
        assert ids(batches.take([8], 2)) == [[8]]


def test_an_error_in_making_a_batch_is_raised_when_it_is_taken():
    def broken(examples):
        raise ValueError(f"bad {list(examples)}")

    with BatchesAhead(range(10), broken) as batches:
        batches.begin([1], 2)
        batches.begin([2], 2)
        with pytest.raises(ValueError, match=r"bad \[2\]"):
            batches.take([2], 2)


@pytest.mark.parametrize("ends", ["well", "with an error", "killed"])
def test_no_thread_outlives_a_run(sft_config, monkeypatch, ends):
    before = set(threading.enumerate())
    if ends == "well":
        train(sft_config(max_steps=2))
    elif ends == "killed":
        act_in(monkeypatch, 2, kill)
        with pytest.raises(Killed):
            train(sft_config(max_steps=3))
    else:
        change_scores(monkeypatch, lambda now, scores: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            train(sft_config(max_steps=3))
    assert set(threading.enumerate()) == before


def test_a_run_makes_its_batches_ahead_and_each_once(sft_config, monkeypatch):
    pack, log = SftTask.pack, []

    def noting(self, items):
        if threading.current_thread() is not threading.main_thread():
            log.append([item.row for item in items])
        return pack(self, items)

    monkeypatch.setattr(SftTask, "pack", noting)
    train(sft_config(max_steps=8))
    assert [len(rows) for rows in log] == [4, 4, 4, 4, 4, 2, 4, 4]
    assert sorted(row for rows in log[:6] for row in rows) == list(range(22))
