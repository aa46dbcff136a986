"""Learned weights: they find the camps of the data, move only with steps that are made, and are kept everywhere."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM

from renyi_engine import LoraEnsemble, SftTask, train
from renyi_engine.core.files import read_json
from renyi_engine.data.batches import collate
from renyi_engine.objectives import AVERAGING_RATE
from renyi_engine.training import checkpoint, train_step
from renyi_engine.training.export import export_particles
from renyi_engine.training.records import numbers, read_run
from renyi_kernels import renyi_reduce

from .runs import fingerprint, loaded, metrics, poison, skips

pytestmark = pytest.mark.usefixtures("without_report")

WEIGHTS = [0.6, 0.3, 0.1]
UNIFORM = [1 / 3] * 3


@pytest.fixture
def learned(sft_config):
    return lambda **settings: sft_config(**{"particle_weights": "learned", "init": "spread"} | settings)


@pytest.fixture
def step(learned, tokenizer):
    """step(alpha, sick=(), weights=WEIGHTS, **settings): one step of four examples. Gives (ensemble, result, the
    gradients [K, P] of the weighted loss divided by the weights, the logp [K, 4] before the step)."""

    def make(alpha, sick=(), weights=WEIGHTS, largest_nll=math.inf, **settings):
        config = learned(**{"prior": "none", "max_grad_norm": 0.0} | settings)
        task = SftTask(tokenizer, 64)
        examples = [task.example(i, {"prompt": f"{i}? ", "completion": "ab" * (i + 1)}) for i in range(4)]
        batches = [collate(part, 0) for part in (examples[:1], examples[1:])]
        ensemble, optimizer = loaded(config)
        with torch.no_grad():
            for _, B in ensemble.stacked().values():
                B.mul_(20)  # so that the particles differ
        ensemble.particle_weights = weights
        ensemble.particles.zero_gradients()
        logp = torch.cat([ensemble.sequence_logprob(batch) for batch in batches], dim=1)
        w = torch.tensor(weights, dtype=torch.float64)
        shares = renyi_reduce(logp.detach().double(), alpha, weights=w).responsibilities / w.clamp(min=1e-99)[:, None]
        (-(shares * logp).sum() / 4).backward()
        expected, logp = ensemble.particles.gradients.clone(), logp.detach().double()
        factor = torch.ones(3, 1, 1)
        factor[list(sick)] = math.nan
        next(iter(ensemble.parameters())).register_hook(lambda gradient: gradient * factor)
        result = train_step.train_step(ensemble, task, optimizer, batches, alpha, config, 4, 4, largest_nll)
        return ensemble, result, expected, logp

    return make


# ---------------------------------------------------------------------- the gradient


@pytest.mark.parametrize("weights", [WEIGHTS, [0.998, 0.001, 0.001]], ids=str)
def test_at_alpha_0_a_step_is_that_of_single_adapters_whatever_the_weights(step, weights):
    _, equal, *_ = step(0.0, weights=UNIFORM)
    ensemble, unequal, *_ = step(0.0, weights=weights, particle_weight_floor=0.0)
    torch.testing.assert_close(unequal.norms, equal.norms, rtol=2e-6, atol=0)
    assert ensemble.particle_weights.tolist() == pytest.approx(weights, abs=1e-12)  # nothing to learn


@pytest.mark.parametrize("alpha", [0.3, 2.0])
def test_a_particles_gradient_is_that_of_the_loss_divided_by_its_weight(step, alpha):
    ensemble, _, expected, _ = step(alpha)
    torch.testing.assert_close(ensemble.particles.gradients, expected, rtol=1e-4, atol=1e-5)
    _, _, of_equal, _ = step(alpha, weights=UNIFORM)
    assert not torch.allclose(expected, of_equal, rtol=1e-2)


def test_a_particle_without_weight_gets_no_gradient_of_the_data_and_the_prior_as_ever(step):
    ensemble, result, *_ = step(0.8, weights=[0.5, 0.5, 0.0], particle_weight_floor=0.0)
    assert result.norms[2] == 0.0
    assert result.updated.all()
    assert ensemble.particle_weights[2] == 0.0
    with_prior, result, *_ = step(0.8, weights=[0.5, 0.5, 0.0], prior="potential", prior_lambda=8.0, prior_std=2.0)
    start = with_prior.particles.values.detach()
    assert result.norms[2].item() == pytest.approx(start[2].norm().item() * 8.0 / 4 / 2.0**2, rel=1e-2)


@pytest.mark.parametrize("settings", [{"prior": "smoothed_kl"}, {"alpha": 0.0, "num_particles": 7}], ids=str)
def test_with_equal_weights_a_run_is_bit_for_bit_the_one_without_weights(sft_config, tmp_path, monkeypatch, settings):
    runs = [sft_config(output_dir=str(tmp_path / name), init="spread", **settings) for name in ("equal", "none")]
    train(runs[0])
    data_term, reduce = train_step.data_term, train_step.renyi_reduce
    monkeypatch.setattr(train_step, "data_term", lambda logp, alpha, n, weights: data_term(logp, alpha, n))
    monkeypatch.setattr(train_step, "renyi_reduce", lambda logp, alpha, weights: reduce(logp, alpha))
    monkeypatch.setattr(train_step, "_divided_by_weights", lambda weights, gradient: gradient)
    train(runs[1])
    assert fingerprint(tmp_path / "equal", 6) == fingerprint(tmp_path / "none", 6)
    assert metrics(tmp_path / "equal") == metrics(tmp_path / "none")


# ---------------------------------------------------------------------- the update


@pytest.mark.parametrize("alpha", [0.3, 2.0])
def test_a_step_moves_the_weights_towards_the_mean_responsibilities(step, alpha):
    ensemble, result, _, logp = step(alpha)
    w = torch.tensor(WEIGHTS, dtype=torch.float64)
    mean = renyi_reduce(logp, alpha, weights=w).responsibilities.mean(dim=1)
    expected = w + AVERAGING_RATE * (mean - w)
    torch.testing.assert_close(ensemble.particle_weights, expected, rtol=1e-4, atol=0)
    assert (ensemble.particle_weights - w).abs().max() > 1e-3
    assert result.particle_weights.tolist() == ensemble.particle_weights.tolist()


@pytest.mark.parametrize("sick", [[1], [0, 2]])
def test_a_sick_particle_keeps_its_weight(step, sick):
    ensemble, *_ = step(0.8, sick=sick)
    after = ensemble.particle_weights
    assert after[sick].tolist() == pytest.approx([WEIGHTS[k] for k in sick], abs=1e-12)
    assert after.sum().item() == pytest.approx(1.0, abs=1e-14)


@pytest.mark.parametrize("settings", [{"sick": [0, 1, 2]}, {"largest_nll": 0.0}], ids=["sick", "spike"])
def test_a_step_that_is_skipped_moves_no_weight(step, settings):
    ensemble, result, *_ = step(0.8, **settings)
    assert not result.updated.any()
    assert ensemble.particle_weights.tolist() == WEIGHTS


@pytest.mark.parametrize("share", [0.0, 0.5])
def test_no_weight_falls_below_the_floor(step, share):
    ensemble, *_ = step(0.8, weights=[0.8, 0.1999, 0.0001], particle_weight_floor=share)
    after = ensemble.particle_weights
    assert after.min() >= share / 3
    assert (after[2] == share / 3) == (share > 0)


# ---------------------------------------------------------------------- a run


def test_a_run_finds_two_camps_of_four_to_one(learned, jsonl, tmp_path):
    rows = [{"prompt": "Dogs? ", "completion": answer} for answer in ["yes"] * 4 + ["no"]] * 8
    data = jsonl(tmp_path / "camps.jsonl", rows)
    config = learned(
        dataset_name=str(data), num_particles=2, alpha=1.0, learning_rate=2e-2, lr_scheduler_type="constant",
        per_device_train_batch_size=10, max_steps=160, logging_steps=10, seed=1,
    )  # fmt: skip
    result = train(config)
    assert sorted(result.ensemble.particle_weights.tolist()) == pytest.approx([0.2, 0.8], abs=0.06)
    logged = metrics(result.output_dir)[-1]
    lines = [line["particle_weights"] for line in metrics(result.output_dir) if "loss_nats" in line]
    assert lines[-1] == logged["particle_weights"] == result.ensemble.particle_weights.tolist()
    assert numbers(logged, SftTask)["particle_weights/p001"] == lines[-1][1]
    assert len(lines) == 16


def test_all_files_of_a_run_have_its_weights(learned, data_file, tmp_path, monkeypatch):
    poison(monkeypatch, 1, {2})
    config = learned(max_steps=4, save_steps=2, eval_dataset_name=str(data_file), dataset_test_split="train")
    result = train(config)
    assert skips(result.output_dir)[0][:2] == (2, [1])
    weights = result.ensemble.particle_weights.tolist()
    assert weights != UNIFORM
    assert math.fsum(weights) == pytest.approx(1.0, abs=1e-14)
    run = result.output_dir
    assert read_json(run / "particles" / "ensemble.json")["particle_weights"] == weights
    assert read_json(run / "checkpoint-4" / "state.json")["particle_weights"] == weights
    assert read_json(export_particles(run, tmp_path / "out") / "ensemble.json")["particle_weights"] == weights
    assert read_run(run).evaluation["weights"].tolist() == weights
    model = AutoModelForCausalLM.from_pretrained(config.model_name_or_path)
    assert LoraEnsemble.from_pretrained(model, run / "particles").particle_weights.tolist() == weights
    # the evaluation is the weighted mixture's
    evaluation, line = result.evaluation, metrics(run)[-1]
    expected = renyi_reduce(evaluation.logp, 1.0, weights=torch.tensor(weights).double()).loss.sum()
    labels = evaluation.num_labels.sum()
    assert line["eval_mixture_nll_nats_per_token"] == pytest.approx((expected / labels).item(), rel=1e-6)
    of_particles = line["eval_particle_nll_nats_per_token"]
    mean = sum(weight * nll for weight, nll in zip(weights, of_particles, strict=True))
    assert line["eval_mean_particle_nll_nats_per_token"] == pytest.approx(mean, rel=1e-9)


def test_uniform_weights_are_logged_nowhere_and_stay_equal(sft_config):
    result = train(sft_config(max_steps=3, init="spread"))
    assert result.ensemble.particle_weights.tolist() == UNIFORM
    assert not any("particle_weights" in line for line in metrics(result.output_dir))


def test_a_run_of_an_earlier_version_goes_on_with_equal_weights(sft_config, tmp_path):
    config = sft_config(max_steps=2)
    run = train(config).output_dir
    settings = (run / "config.yaml").read_text().splitlines(keepends=True)
    (run / "config.yaml").write_text("".join(line for line in settings if not line.startswith("particle_weight")))
    path = run / "checkpoint-2" / "state.json"
    state = json.loads(path.read_text())
    del state["particle_weights"]
    path.write_text(json.dumps(state))
    manifest = run / "checkpoint-2" / checkpoint.MANIFEST_FILE
    entries = read_json(manifest)
    entries["state.json"] = {"bytes": path.stat().st_size, "sha256": checkpoint.files.sha256_of(path)}
    manifest.write_text(json.dumps(entries))
    assert read_json(export_particles(run, tmp_path / "out") / "ensemble.json")["particle_weights"] == UNIFORM
    with pytest.raises(ValueError, match="particle_weights: 'uniform' then, 'learned' now"):
        train(replace(config, particle_weights="learned", resume_from_checkpoint="true"))
    resumed = train(replace(config, max_steps=3, resume_from_checkpoint="true"))
    assert resumed.ensemble.particle_weights.tolist() == UNIFORM


# ---------------------------------------------------------------------- settings


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"alpha": 0.0}, "particle_weights: at alpha 0 the responsibilities are the weights"),
        ({"alpha_controller": "ess:0.7"}, "particle_weights: learned weights change the effective sample size"),
        ({"particle_weight_floor": 1.0}, "particle_weight_floor: expected a number from 0 to 1, 1 excluded; got 1.0"),
        ({"particle_weights": "learnt"}, "particle_weights: expected one of uniform, learned; got 'learnt'"),
    ],
    ids=str,
)
def test_settings_that_contradict_learned_weights_are_named(learned, settings, named):
    with pytest.raises(ValueError, match=named):
        learned(**settings)


def test_a_schedule_may_begin_at_alpha_0(learned):
    assert learned(alpha=0.0, alpha_schedule="linear", alpha_0=0.5).particle_weights == "learned"
    assert learned(alpha=0.5, alpha_schedule="linear", alpha_0=0.0).particle_weights == "learned"


def test_a_run_is_not_resumed_with_other_weights(learned):
    train(learned(max_steps=1))
    with pytest.raises(ValueError, match=r"was started with other settings:\s+particle_weights"):
        train(learned(max_steps=2, particle_weights="uniform", resume_from_checkpoint="true"))
