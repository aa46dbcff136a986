"""Too little memory: micro-batches are halved, the steps stay the same, and what was trained is saved."""

from __future__ import annotations

import json
import re
import weakref
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import renyi_engine.training.journal as journal
import renyi_engine.training.train_step as train_step
from renyi_engine import DoesNotFit, train
from renyi_engine.objectives.sft import SftTask

from .runs import (
    Killed,
    act_in,
    fingerprint,
    kill,
    metrics,
)

NO_ROOM = {
    "forward": (torch.OutOfMemoryError, "CUDA out of memory. Tried to allocate 7 GiB\nand more lines"),
    "backward": (RuntimeError, "Triton Error [CUDA]: out of memory"),
    "recomputation": (RuntimeError, "[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory"),
}


def run_out_of_memory(where="forward"):
    kind, message = NO_ROOM[where]
    raise kind(message)


def room_for(monkeypatch, num_examples, where="forward", from_step=1):
    """Let the device's memory end when a training micro-batch holds more examples, from a step on."""
    original, seen, held = SftTask.score, [], []

    def score(self, ensemble, batch):
        if not torch.is_grad_enabled():
            return original(self, ensemble, batch)
        assert [one() for one in held] == [None] * len(held), "the memory of an attempt that failed is not free"
        assert not any(adapted._waiting for adapted in ensemble._installation.maps)
        seen.append(None)
        too_many = len(batch["label_places"]) > num_examples and len(seen) >= from_step
        activations = torch.zeros(1)
        if too_many:
            held.append(weakref.ref(activations))
        if too_many and where == "forward":
            run_out_of_memory()
        scores = original(self, ensemble, batch)

        def backward(*_):
            assert activations.numel()
            run_out_of_memory(where)

        if too_many and where == "backward":
            scores.logp.register_hook(backward)
        if too_many and where == "recomputation":
            # between the two maps of one input
            activation = ensemble.model.get_submodule("model.layers.0.mlp.act_fn")
            hook = activation.register_forward_hook(lambda *_: (hook.remove(), backward()))
        return scores

    monkeypatch.setattr(SftTask, "score", score)


@pytest.mark.parametrize("where", NO_ROOM)
def test_micro_batches_that_do_not_fit_are_halved_and_the_steps_stay_the_same(
    sft_config, tmp_path, monkeypatch, capsys, where
):
    checkpointing = where == "recomputation"
    as_given = sft_config(
        per_device_train_batch_size=6,
        max_steps=5,
        gradient_checkpointing=checkpointing,
        output_dir=str(tmp_path / "given"),
    )
    as_found = replace(
        as_given, per_device_train_batch_size=2, gradient_accumulation_steps=3, output_dir=str(tmp_path / "found")
    )
    with monkeypatch.context() as patch:
        room_for(patch, 2, where)
        ours = train(as_given)
    said = capsys.readouterr().err
    theirs = train(as_found)
    for (_, p), (_, q) in zip(ours.ensemble.named_parameters(), theirs.ensemble.named_parameters(), strict=True):
        assert p.equal(q)
    assert metrics(ours.output_dir) == metrics(theirs.output_dir)
    for tried, next_size in ((6, 3), (3, 2)):
        sizes = f"micro-batches of {next_size} in place of {tried},"
        assert re.search(rf"step 1: a micro-batch of \d+ tokens does not fit .*{sizes}", said)
    assert said.count("does not fit") == 2
    assert json.loads((ours.output_dir / "run.json").read_text())["micro_batch_size"] == 2


def test_the_last_step_of_an_epoch_is_halved_from_its_own_size(sft_config, monkeypatch, capsys):
    room_for(monkeypatch, 1, from_step=2)
    train(sft_config(per_device_train_batch_size=20, max_steps=2))  # of 22 examples
    said = capsys.readouterr().err
    assert said.count("does not fit") == 1
    assert re.search(r"step 2: a micro-batch of \d+ tokens does not fit .*micro-batches of 1 in place of 2,", said)


def test_the_micro_batch_size_that_was_found_outlives_a_kill(sft_config, tmp_path, monkeypatch, capsys):
    settings = {"per_device_train_batch_size": 4, "max_steps": 6, "save_steps": 4}
    whole, broken = (sft_config(output_dir=str(tmp_path / name), **settings) for name in ("whole", "broken"))
    with monkeypatch.context() as patch:
        room_for(patch, 2, from_step=3)
        train(whole)
    with monkeypatch.context() as patch, pytest.raises(Killed):
        room_for(patch, 2, from_step=3)
        act_in(patch, 2 + 2 * 2 + 1, kill)  # in step 5, after two steps of one micro-batch and two of two
        train(broken)
    capsys.readouterr()
    train(replace(broken, resume_from_checkpoint="true"))
    assert "checkpoint-4, in micro-batches of 2: larger ones did not fit" in capsys.readouterr().err
    assert fingerprint(tmp_path / "broken", 6) == fingerprint(tmp_path / "whole", 6)


def test_when_not_even_one_example_fits_what_was_trained_is_saved_and_can_go_on(
    sft_config, tmp_path, monkeypatch, capsys
):
    settings = {"per_device_train_batch_size": 2, "max_steps": 4, "alpha_schedule": "linear"}
    whole, short = (sft_config(output_dir=str(tmp_path / name), **settings) for name in ("whole", "short"))
    with (
        monkeypatch.context() as patch,
        pytest.raises(DoesNotFit, match=r"step 3: .*checkpointing true.*checkpoint-2$"),
    ):
        room_for(patch, 0, from_step=3)
        train(short)
    assert json.loads((tmp_path / "short" / "run.json").read_text())["status"] == "failed"
    train(whole)
    saved = json.loads((tmp_path / "short" / "checkpoint-2" / "state.json").read_text())
    assert saved["alpha"] == metrics(tmp_path / "whole")[1]["alpha"]
    capsys.readouterr()
    train(replace(short, resume_from_checkpoint="true", gradient_checkpointing=True))
    assert re.search(r"from .*checkpoint-2$", capsys.readouterr().err, re.M)
    assert fingerprint(tmp_path / "short", 4) == fingerprint(tmp_path / "whole", 4)


def test_memory_that_ends_in_an_evaluation_loses_no_step(sft_config, monkeypatch):
    with (
        monkeypatch.context() as patch,
        pytest.raises(DoesNotFit, match=r"evaluation .*eval_batch_size.*checkpoint-3$"),
    ):
        patch.setattr(journal, "Scorer", lambda *_, **options: run_out_of_memory())
        train(sft_config(max_steps=6, eval_steps=3))
    assert train(sft_config(max_steps=6, eval_steps=3, resume_from_checkpoint="true")).global_step == 6


def test_memory_that_ends_in_the_first_step_leaves_nothing_to_save(sft_config, monkeypatch):
    room_for(monkeypatch, 0)
    config = sft_config(max_steps=2)
    with pytest.raises(DoesNotFit, match=r"step 1: .*\(max_length\)$"):
        train(config)
    assert not list(Path(config.output_dir).glob("checkpoint-*"))


def test_memory_that_ends_outside_the_micro_batches_is_not_tried_again(sft_config, monkeypatch):
    """In the optimizer, parameters may have been changed already."""
    monkeypatch.setattr(train_step, "step_healthy", lambda *_: run_out_of_memory())
    with pytest.raises(torch.OutOfMemoryError):
        train(sft_config(max_steps=2))
