"""Alpha from step to step: each step is trained, logged and saved with its own."""

from __future__ import annotations

import json
import re

import pytest
import torch

import renyi_engine.training.loop as loop
from renyi_engine import train
from renyi_engine.training.export import export_particles
from renyi_kernels import renyi_reduce

from .runs import (
    alphas,
    fingerprint,
    metrics,
)

pytestmark = pytest.mark.usefixtures("without_report")


@pytest.fixture
def fake_alpha_star(monkeypatch):
    """Stands for the estimate of the critical alpha; the list of what it was asked."""
    asked = []

    def estimate_alpha_star(ensemble, task, items, *, prior_curvature, seed):
        assert prior_curvature == pytest.approx(2.0 / (22 * 0.5**2))
        asked.append((len(items), seed))
        return seed % 97 / 97

    monkeypatch.setattr(loop, "estimate_alpha_star", estimate_alpha_star)
    return asked


@pytest.mark.parametrize("logging_steps", [1, 4])
def test_a_schedule_sets_the_alpha_of_every_step_and_all_of_them_are_logged(sft_config, logging_steps):
    config = sft_config(
        alpha=0.9, alpha_schedule="linear", alpha_warmup_steps=0.5, max_steps=10, logging_steps=logging_steps
    )
    result = train(config)
    expected = [0.0, 0.18, 0.36, 0.54, 0.72, *[0.9] * 5]
    assert alphas(result.output_dir) == pytest.approx(expected)
    lines = [line for line in metrics(result.output_dir) if "loss_nats" in line]
    assert all(line["alpha"] == line["alpha_of_steps"][-1] for line in lines)
    assert all("alpha_star" not in line for line in lines)


def test_the_alpha_of_a_step_is_the_one_it_is_trained_with(sft_config, tmp_path):
    run = lambda name, **settings: train(
        sft_config(output_dir=str(tmp_path / name), init="spread", max_steps=3, **settings)
    )
    run("constant", alpha=0.4)
    run("flat", alpha=0.4, alpha_schedule="cosine", alpha_0=0.4, alpha_warmup_steps=2)
    run("rising", alpha=0.4, alpha_schedule="linear", alpha_warmup_steps=2)
    weights = {name: fingerprint(tmp_path / name, 3)["adapters.safetensors"] for name in ("constant", "flat", "rising")}
    assert weights["flat"] == weights["constant"] != weights["rising"]
    sizes = {name: [line["ess_particles"] for line in metrics(tmp_path / name)] for name in weights}
    assert sizes["rising"][0] == 3  # alpha is 0: all share alike
    assert sizes["constant"][0] < 2.99


def test_what_is_written_after_a_step_has_the_alpha_of_that_step(sft_config, data_file, tmp_path):
    config = sft_config(
        alpha=0.9, alpha_schedule="linear", alpha_warmup_steps=12, max_steps=8, save_steps=4, init="spread",
        eval_dataset_name=str(data_file), dataset_test_split="train",
    )  # fmt: skip
    result = train(config)
    evaluation = json.loads((result.output_dir / "evaluation.json").read_text())
    assert evaluation["alpha"] == pytest.approx(0.9 * 7 / 12)
    weighed = renyi_reduce(torch.tensor(evaluation["logp_nats"]), 0.9 * 7 / 12)
    assert metrics(result.output_dir)[-1]["eval_ess_particles"] == pytest.approx(weighed.ess.mean().item(), rel=1e-5)
    assert metrics(result.output_dir)[-1]["eval_loss_nats"] == pytest.approx(weighed.loss.mean().item(), rel=1e-5)
    for folder in (result.output_dir / "particles", export_particles(result.output_dir, tmp_path / "newest")):
        assert json.loads((folder / "ensemble.json").read_text())["alpha"] == pytest.approx(0.9 * 7 / 12)
    earlier = export_particles(result.output_dir / "checkpoint-4", tmp_path / "earlier")
    assert json.loads((earlier / "ensemble.json").read_text())["alpha"] == pytest.approx(0.9 * 3 / 12)


def test_the_effective_sample_size_is_steered_to_its_target(sft_config):
    config = sft_config(
        num_particles=4, init="spread", alpha=0.3, alpha_controller="ess:0.7", alpha_max=20.0, max_steps=60
    )
    result = train(config)
    sizes = [line["ess_particles"] for line in metrics(result.output_dir) if "loss_nats" in line]
    assert sum(sizes[30:]) / 30 == pytest.approx(0.7 * 4, abs=0.05 * 4)
    assert alphas(result.output_dir)[0] == 0.3


def test_alpha_keeps_its_margin_above_the_estimates_of_the_critical_alpha(sft_config, fake_alpha_star):
    config = sft_config(
        alpha_controller="alpha-star:0.25", alpha_star_steps=3, max_steps=7, logging_steps=2,
        prior_lambda=2.0, prior_std=0.5,
    )  # fmt: skip
    result = train(config)
    assert [items for items, _ in fake_alpha_star] == [22] * 3
    seeds = [seed for _, seed in fake_alpha_star]
    assert len(set(seeds)) == 3
    estimates = [seed % 97 / 97 for seed in seeds]
    assert alphas(result.output_dir) == pytest.approx([estimates[i // 3] + 0.25 for i in range(7)])
    # before steps 0, 3 and 6, in lines of two steps each
    lines = [line for line in metrics(result.output_dir) if "loss_nats" in line]
    assert [line.get("alpha_star") for line in lines] == pytest.approx([estimates[0], estimates[1], None, estimates[2]])


def test_the_plain_line_of_a_run_shows_alpha_where_it_varies(sft_config, tmp_path, capsys):
    train(sft_config(max_steps=1))
    train(sft_config(max_steps=1, alpha_controller="ess:0.5", output_dir=str(tmp_path / "steered")))
    constant, steered = re.findall(r"^step 1/1 .*", capsys.readouterr().err, re.M)
    assert "alpha" not in constant
    assert "alpha 0.7 " in steered
