"""Updates that are skipped: of a particle whose gradient is not finite, and of all where the loss is a spike."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import renyi_engine.training.train_step as train_step
from renyi_engine import TrainingDiverged, train
from renyi_engine.data.batches import collate
from renyi_engine.objectives.alpha import EssController
from renyi_engine.objectives.sft import SftTask
from renyi_engine.training.loss_spikes import HISTORY

from .runs import (
    Killed,
    act_in,
    fingerprint,
    kill,
    loaded,
    metrics,
    poison,
    skips,
    spike,
)

pytestmark = pytest.mark.usefixtures("without_report")


def test_a_sick_particle_is_skipped_counted_and_its_rows_recorded(sft_config, monkeypatch):
    poison(monkeypatch, 1, {2, 3})
    result = train(sft_config(max_steps=4))
    lines = metrics(result.output_dir)
    assert [line["skipped_updates"] for line in lines] == [[0, 0, 0], [0, 1, 0], [0, 2, 0], [0, 2, 0]]
    assert lines[1]["grad_norm"][1] is None
    why = "the gradient is not finite"
    assert skips(result.output_dir) == [(2, [1], 4, why), (3, [1], 4, why)]
    assert all(p.isfinite().all() for p in result.ensemble.parameters())


@pytest.mark.parametrize("particle", [0, None])
def test_too_many_skips_in_a_row_stop_the_run(sft_config, monkeypatch, particle):
    poison(monkeypatch, particle, set(range(2, 9)))
    with pytest.raises(TrainingDiverged, match=r"3 steps in a row .*: the gradient is not finite"):
        train(sft_config(max_steps=8, max_consecutive_skips=3))


def test_skips_that_are_not_in_a_row_do_not_stop_the_run(sft_config, monkeypatch):
    poison(monkeypatch, 0, {2, 4, 6})
    run = train(sft_config(max_steps=7, max_consecutive_skips=2)).output_dir
    assert metrics(run)[-1]["skipped_updates"] == [3, 0, 0]


# ---------------------------------------------------------------------- spikes


def test_a_spike_is_not_learnt_from(sft_config, monkeypatch):
    spike(monkeypatch, {HISTORY + 3})
    result = train(sft_config(max_steps=HISTORY + 4, spike_threshold=5.0, save_steps=1, save_total_limit=4))
    states = [fingerprint(result.output_dir, HISTORY + n) for n in (2, 3, 4)]
    for file in ("adapters.safetensors", "optimizer.safetensors"):
        assert states[0][file] == states[1][file] != states[2][file]
    assert skips(result.output_dir) == [(HISTORY + 3, [0, 1, 2], 4, "the loss is a spike (spike_threshold)")]


def test_a_step_is_judged_by_the_nll_that_its_metrics_show(sft_config):
    run = train(sft_config(max_steps=HISTORY + 3, spike_threshold=99.0)).output_dir
    shown = [line["mixture_nll_nats_per_token"] for line in metrics(run)]
    state = json.loads((run / f"checkpoint-{HISTORY + 3}" / "state.json").read_text())
    assert state["recent_nlls"] == pytest.approx(shown[-HISTORY:], rel=1e-6)


@pytest.mark.parametrize(("factor", "is_spike"), [(0.99, True), (1.01, False)])
@pytest.mark.parametrize("alpha", [0.0, 0.8])
def test_a_step_above_the_largest_nll_changes_nothing(sft_config, tokenizer, alpha, factor, is_spike):
    config = sft_config(init="spread")
    task = SftTask(tokenizer, 64)
    examples = [task.example(i, {"prompt": "q", "completion": "a" * (3 * i + 1)}) for i in range(5)]
    batches = [collate(part, 0) for part in (examples[:2], examples[2:])]
    ensemble, optimizer = loaded(config)
    with torch.no_grad():
        s = torch.cat([ensemble.sequence_logprob(batch) for batch in batches], dim=1)
    largest = factor * -s.double().exp().mean(dim=0).log().mean().item()
    before = [p.detach().clone() for p in ensemble.parameters()]
    result = train_step.train_step(ensemble, task, optimizer, batches, alpha, config, 5, 5, largest)
    unchanged = [p.equal(q) for p, q in zip(ensemble.parameters(), before, strict=True)]
    assert result.spike.item() == is_spike
    assert result.updated.tolist() == [not is_spike] * 3
    assert set(unchanged) == {is_spike}


@pytest.mark.parametrize("sick", [[], [1], [0, 2], [0, 1, 2]])
def test_the_nll_of_a_step_is_that_of_the_healthy_particles(sft_config, tokenizer, sick):
    config = sft_config(init="spread")
    task = SftTask(tokenizer, 64)
    batch = collate([task.example(i, {"prompt": "q", "completion": "a" * (i + 1)}) for i in range(4)], 0)
    ensemble, optimizer = loaded(config)
    healthy = [k for k in range(3) if k not in sick]
    with torch.no_grad():
        s = ensemble.sequence_logprob(batch).double()
    factor = torch.ones(3, 1, 1)
    factor[sick] = float("nan")
    next(iter(ensemble.parameters())).register_hook(lambda gradient: gradient * factor)
    result = train_step.train_step(ensemble, task, optimizer, [batch], 0.8, config, 4, 4, largest_nll=0.0)
    expected = -s[healthy].exp().mean(dim=0).log() if healthy else torch.full((4,), torch.inf).double()
    torch.testing.assert_close(result.mixture_nll.double(), expected, rtol=1e-5, atol=1e-5)
    assert result.spike.item() == bool(healthy)


@pytest.mark.parametrize("alpha", [0.0, 0.01, 0.8])
def test_a_sick_particle_is_no_spike_of_the_others(sft_config, monkeypatch, alpha):
    poison(monkeypatch, 1, range(3, HISTORY + 4))
    config = sft_config(max_steps=HISTORY + 3, spike_threshold=3.0, alpha=alpha, max_consecutive_skips=99)
    result = train(config)
    assert {why for *_, why in skips(result.output_dir)} == {"the gradient is not finite"}
    assert metrics(result.output_dir)[-1]["skipped_updates"] == [0, HISTORY + 1, 0]


def test_alpha_does_not_learn_from_a_spike_either(sft_config, monkeypatch):
    seen = []
    monkeypatch.setattr(EssController, "observe", lambda self, logp: seen.append(logp.shape))
    spike(monkeypatch, {HISTORY + 1, HISTORY + 2})
    train(sft_config(max_steps=HISTORY + 4, spike_threshold=5.0, alpha_controller="ess:0.7"))
    assert len(seen) == HISTORY + 2


def test_without_a_threshold_a_spike_is_trained_on(sft_config, monkeypatch):
    spike(monkeypatch, {HISTORY + 1})
    assert metrics(train(sft_config(max_steps=HISTORY + 2)).output_dir)[-1]["skipped_updates"] == [0, 0, 0]


def test_a_loss_that_stays_high_stops_the_run_which_may_go_on_without_the_threshold(sft_config, monkeypatch):
    config = sft_config(max_steps=HISTORY + 5, save_steps=HISTORY, spike_threshold=5.0, max_consecutive_skips=2)
    with monkeypatch.context() as patch:
        spike(patch, range(HISTORY + 1, 99))
        with pytest.raises(
            TrainingDiverged, match=r"2 steps in a row .*: the loss is a spike .*larger .*spike_threshold"
        ):
            train(config)
    assert json.loads((Path(config.output_dir) / "run.json").read_text())["status"] == "failed"
    spike(monkeypatch, range(1, 99))
    resumed = train(replace(config, spike_threshold=None, resume_from_checkpoint="true"))
    assert metrics(resumed.output_dir)[-1]["skipped_updates"] == [0, 0, 0]


def test_what_a_spike_is_told_by_outlives_a_kill(sft_config, tmp_path, monkeypatch):
    settings = {"max_steps": HISTORY + 4, "save_steps": HISTORY, "spike_threshold": 5.0}
    whole, broken = (sft_config(output_dir=str(tmp_path / name), **settings) for name in ("whole", "broken"))
    with monkeypatch.context() as patch:
        spike(patch, {HISTORY + 3})
        train(whole)
    with monkeypatch.context() as patch, pytest.raises(Killed):
        act_in(patch, HISTORY + 2, kill)
        train(broken)
    with monkeypatch.context() as patch:
        spike(patch, {3})
        train(replace(broken, resume_from_checkpoint="true"))
    assert fingerprint(tmp_path / "broken", HISTORY + 4) == fingerprint(tmp_path / "whole", HISTORY + 4)
    assert skips(tmp_path / "broken") == skips(tmp_path / "whole") != []
