"""A run's folder: one writer at a time, readers that change nothing, and no branch that is lost or mixed up."""

from __future__ import annotations

import json
import os
import shutil
import signal
import time
from dataclasses import replace
from pathlib import Path

import pytest

from renyi_engine import LoraEnsemble, TrainingDiverged, TrainingInterrupted, train
from renyi_engine.core.files import read_json, sha256_of
from renyi_engine.core.output_folder import claimed, locked
from renyi_engine.objectives.dpo import DpoTask
from renyi_engine.training import checkpoint
from renyi_engine.training.export import export_particles
from renyi_engine.training.report import write_report
from renyi_engine.training.run_folder import RunFolder

from .runs import Killed, act_in, checkpoints, contents, kill, metrics, no_space, poison, send_sigterm, steps_of

# ---------------------------------------------------------------------- going back to an older checkpoint


@pytest.fixture
def long_run(sft_config):
    """A finished run with the checkpoints of steps 2, 4, 6 and 8, and the settings to go on from the first of them."""
    config = sft_config(max_steps=8, save_steps=2, save_total_limit=4)
    train(config)
    run = Path(config.output_dir)
    # another length of the run gives another learning rate, and so another branch
    return run, replace(config, resume_from_checkpoint=str(run / "checkpoint-2"), max_steps=6, save_total_limit=2)


def test_a_run_that_goes_on_from_an_older_checkpoint_keeps_both_branches(long_run, tmp_path):
    run, config = long_run
    old = {step: sha256_of(run / f"checkpoint-{step}" / "adapters.safetensors") for step in (4, 6, 8)}
    old_particles, old_metrics = contents(run / "particles"), (run / "metrics.jsonl").read_text()
    with pytest.warns(UserWarning, match=r"from step 2; .*checkpoint-4, checkpoint-6, checkpoint-8.*set-aside-1"):
        train(config)
    assert (checkpoints(run), steps_of(run)) == ([4, 6], [1, 2, 3, 4, 5, 6])
    aside = run / "set-aside-1"
    assert {step: sha256_of(aside / f"checkpoint-{step}" / "adapters.safetensors") for step in (4, 6, 8)} == old
    assert (aside / "metrics.jsonl").read_text() == old_metrics
    assert sorted(contents(aside / "particles").values()) == sorted(old_particles.values())
    assert sha256_of(run / "checkpoint-6" / "adapters.safetensors") != old[6]


def test_what_was_set_aside_is_a_run_that_can_be_exported_and_continued(long_run, tmp_path):
    run, config = long_run
    with pytest.warns(UserWarning, match="set-aside-1"):
        train(config)
    aside = run / "set-aside-1"
    exported = read_json(export_particles(aside, tmp_path / "exported") / "ensemble.json")
    assert exported.keys() == read_json(aside / "particles" / "ensemble.json").keys()
    train(replace(config, output_dir=str(aside), resume_from_checkpoint="true", max_steps=9))
    assert steps_of(aside) == list(range(1, 10))


def test_the_branch_that_was_gone_back_to_is_the_one_that_true_continues(long_run, monkeypatch):
    run, config = long_run
    with monkeypatch.context() as patch:
        act_in(patch, 3, kill)  # in step 5 of the run, after the checkpoint of step 4
        with pytest.raises(Killed), pytest.warns(UserWarning, match="set-aside-1"):
            train(config)
    assert checkpoints(run) == [2, 4]
    train(replace(config, resume_from_checkpoint="true"))
    assert steps_of(run) == [1, 2, 3, 4, 5, 6]
    assert not (run / "set-aside-2").exists()


def test_a_signal_on_the_new_branch_names_a_checkpoint_that_is_there(long_run, monkeypatch):
    run, config = long_run
    act_in(monkeypatch, 1, send_sigterm)
    with pytest.raises(TrainingInterrupted) as stop, pytest.warns(UserWarning, match="set-aside-1"):
        train(config)
    assert stop.value.checkpoint == run / "checkpoint-3"
    checkpoint.verify(run / "checkpoint-3")


def test_a_damaged_checkpoint_that_was_passed_over_is_set_aside_too(long_run):
    run, config = long_run
    (run / "checkpoint-8" / "manifest.json").unlink()
    with pytest.warns(UserWarning, match="set-aside-1"), pytest.warns(UserWarning, match=r"falling back to .*-6"):
        train(replace(config, resume_from_checkpoint="true", max_steps=9))
    assert [path.name for path in (run / "set-aside-1").glob("checkpoint-*")] == ["checkpoint-8"]


def test_a_finished_run_without_checkpoints_is_set_aside_before_it_begins_again(sft_config):
    config = sft_config(max_steps=2)
    train(config)
    run = Path(config.output_dir)
    shutil.rmtree(run / "checkpoint-2")
    metrics, particles = (run / "metrics.jsonl").read_text(), sorted(contents(run / "particles").values())
    with pytest.warns(UserWarning, match=r"from step 0; what came after it \(particles, .*\) is in .*set-aside-1"):
        train(replace(config, resume_from_checkpoint="true", max_steps=1))
    assert (run / "set-aside-1" / "metrics.jsonl").read_text() == metrics
    assert sorted(contents(run / "set-aside-1" / "particles").values()) == particles
    assert steps_of(run) == [1]


def test_fewer_steps_than_are_done_are_refused_and_change_nothing(long_run):
    run, config = long_run
    before = contents(run)
    with pytest.raises(ValueError, match=r"max_steps: 3 steps are asked for, but .*checkpoint-8 is already at step 8"):
        train(replace(config, resume_from_checkpoint="true", max_steps=3))
    assert contents(run) == before


def test_a_line_of_metrics_whose_end_is_cut_off_does_not_run_into_the_next(sft_config):
    config = sft_config(max_steps=2)
    train(config)
    metrics = Path(config.output_dir) / "metrics.jsonl"
    metrics.write_text(metrics.read_text().removesuffix("\n"))
    train(replace(config, resume_from_checkpoint="true", max_steps=3))
    assert steps_of(Path(config.output_dir)) == [1, 2, 3]


def test_a_run_killed_before_its_first_step_can_be_taken_up(dpo_config, monkeypatch):
    """A pass over all pairs may take hours: it is neither lost nor in the way."""
    config = dpo_config(max_steps=1)
    prepare, passes = DpoTask.prepare, []

    def killed_in_the_second(self, *args):
        passes.append(None)
        return prepare(self, *args) if len(passes) == 1 else kill()

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(DpoTask, "prepare", killed_in_the_second)
        train(config)
    (kept,) = Path(config.output_dir).glob("reference-*")
    before = kept.stat().st_mtime_ns
    with pytest.raises(ValueError, match=r"already holds a run; .* --resume_from_checkpoint true"):
        train(config)
    with pytest.warns(UserWarning, match="starting from step 0"):
        assert train(replace(config, resume_from_checkpoint="true")).global_step == 1
    assert kept.stat().st_mtime_ns == before


def test_a_kill_before_retention_leaves_no_checkpoint_too_many(long_run, tmp_path):
    run, config = long_run
    train(replace(config, resume_from_checkpoint="true", max_steps=8, save_total_limit=3))
    assert checkpoints(run) == [4, 6, 8]


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        ("", r"resume_from_checkpoint: '.*' is output_dir itself; expected one of"),
        ("particles", r"resume_from_checkpoint: .*particles: no manifest.json"),
        ("../elsewhere", "resume_from_checkpoint: .*elsewhere belongs to another run"),
    ],
)
def test_what_is_no_checkpoint_is_refused_under_the_name_of_its_setting(long_run, wanted, message):
    run, config = long_run
    (run / "../elsewhere").mkdir()
    with pytest.raises(ValueError, match=message):
        train(replace(config, resume_from_checkpoint=str(run / wanted)))


# ---------------------------------------------------------------------- one writer, readers that change nothing


def test_a_second_training_in_the_same_folder_is_refused_by_name(sft_config):
    config = sft_config(max_steps=1)
    with (
        RunFolder.open(config) as run,
        pytest.raises(ValueError, match=f"output_dir: another process is writing into {run.path}"),
    ):
        train(config)
    train(config)


def test_a_lock_ends_with_the_process_that_holds_it(tmp_path):
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        with locked(tmp_path):
            os.write(writer, b"x")
            time.sleep(600)
    try:
        os.read(reader, 1)
        with pytest.raises(ValueError, match="another process is writing"), locked(tmp_path):
            pass
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    with locked(tmp_path):
        pass
    assert list(tmp_path.iterdir()) == []


def test_readers_of_a_run_change_nothing_that_is_being_written(long_run, tmp_path):
    run, _ = long_run
    with locked(run):
        being_written = run / ".tmp-checkpoint-10-0"
        being_written.mkdir()
        (being_written / "adapters.safetensors").write_bytes(b"half")
        before = contents(run)
        export_particles(run, tmp_path / "exported")
        write_report([run], tmp_path / "report.html")
        assert contents(run) == before


def test_leftovers_of_a_killed_run_are_removed_wherever_they_are_but_not_through_links(sft_config, tmp_path):
    config = sft_config(max_steps=2)
    train(config)
    run, elsewhere = Path(config.output_dir), tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / ".tmp-mine").touch()
    (run / "link").symlink_to(elsewhere)
    (run / ".tmp-link").symlink_to(elsewhere)
    for leftover in (run / ".tmp-reference-1", run / "particles" / "p001" / ".tmp-adapter_config.json-1"):
        leftover.touch()
    with pytest.warns(UserWarning, match=r"\.tmp-reference-1: removed; its writer was killed"):
        train(replace(config, resume_from_checkpoint="true"))
    assert not list(run.rglob(".tmp-*"))
    assert (elsewhere / ".tmp-mine").exists()


def test_what_another_command_writes_in_a_folder_below_is_not_taken_for_a_leftover(sft_config):
    config = sft_config(max_steps=1)
    train(config)
    with claimed(Path(config.output_dir) / "evaluated") as folder:
        being_written = folder / ".tmp-results.json-1"
        being_written.touch()
        train(replace(config, resume_from_checkpoint="true"))
        assert being_written.exists()


# ---------------------------------------------------------------------- stopped at an evaluation, ended by NaN


def test_a_signal_at_a_step_that_evaluates_loses_no_line(sft_config, data_file, tmp_path, monkeypatch):
    settings = {"max_steps": 6, "eval_steps": 2, "eval_dataset_name": str(data_file), "dataset_test_split": "train"}
    whole = sft_config(output_dir=str(tmp_path / "whole"), **settings)
    train(whole)
    broken = sft_config(output_dir=str(tmp_path / "broken"), **settings)
    with monkeypatch.context() as patch, pytest.raises(TrainingInterrupted):
        act_in(patch, 4, send_sigterm)
        train(broken)
    for _ in range(2):  # however often it is taken up
        with monkeypatch.context() as patch, pytest.raises(Killed):
            act_in(patch, 1, kill)
            train(replace(broken, resume_from_checkpoint="true"))
    train(replace(broken, resume_from_checkpoint="true"))

    assert metrics(Path(broken.output_dir)) == metrics(Path(whole.output_dir))


def test_a_run_that_is_taken_up_at_its_end_has_its_last_evaluation_once(sft_config, data_file, monkeypatch):
    settings = {"max_steps": 2, "eval_dataset_name": str(data_file), "dataset_test_split": "train"}
    config = sft_config(**settings)
    run = Path(config.output_dir)
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(LoraEnsemble, "save_pretrained", lambda *_, **__: kill())
        train(config)
    for _ in range(2):
        train(replace(config, resume_from_checkpoint="true"))
        lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
        assert [(line["step"], "loss_nats" in line) for line in lines] == [(1, True), (2, True), (2, False)]


def test_a_run_that_ends_in_nan_has_failed_and_keeps_the_last_good_checkpoint(sft_config, monkeypatch):
    config = sft_config(max_steps=6, save_steps=2)
    poison(monkeypatch, None, {3, 4, 5, 6})
    run = Path(config.output_dir)
    with pytest.raises(TrainingDiverged, match=rf"last step, 6, is not finite.*{run / 'checkpoint-2'}"):
        train(config)
    assert (checkpoints(run), (run / "particles").exists()) == ([2], False)
    assert read_json(run / "run.json")["status"] == "failed"


def test_a_checkpoint_is_put_off_to_the_next_step_whose_loss_is_finite(sft_config, monkeypatch):
    config = sft_config(max_steps=7, save_steps=2, save_total_limit=9)
    poison(monkeypatch, None, {2, 3})
    train(config)
    assert checkpoints(Path(config.output_dir)) == [4, 6, 7]


def test_a_signal_while_the_loss_is_nan_names_the_last_good_checkpoint(sft_config, monkeypatch):
    config = sft_config(max_steps=6, save_steps=2)
    poison(monkeypatch, None, {3})
    act_in(monkeypatch, 3, send_sigterm)
    with pytest.raises(TrainingInterrupted, match=r"step 3, not saved: the loss .*checkpoint-2") as stop:
        train(config)
    assert stop.value.checkpoint == Path(config.output_dir) / "checkpoint-2"


def test_a_full_disk_is_not_taken_for_a_training_that_can_go_on(sft_config, monkeypatch):
    config = sft_config(max_steps=4, save_steps=2)

    act_in(monkeypatch, 3, lambda: monkeypatch.setattr(checkpoint.files, "write_tensors", no_space))
    with pytest.raises(OSError, match="No space left"):
        train(config)
    assert checkpoints(Path(config.output_dir)) == [2]
    assert not list(Path(config.output_dir).rglob(".tmp-*"))
