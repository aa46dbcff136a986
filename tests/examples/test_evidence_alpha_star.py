"""alpha* among the experiments of examples/evidence: which trainings it shares, and when particles have parted."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from examples.evidence.alpha_star import experiment as alpha_star
from examples.evidence.cells import Work
from examples.evidence.contested.experiment import EXPERIMENT as CONTESTED
from examples.evidence.experiment import Answers
from examples.evidence.people.experiment import EXPERIMENT as PEOPLE
from renyi_engine import EnsembleConfig, LoraEnsemble
from renyi_engine.base_model import load_model, load_tokenizer
from renyi_engine.critical_alpha import AlphaStarConfig
from renyi_engine.data import decode_answer, encode_prompts
from renyi_engine.ensemble import ModelConfig


def test_trainings_are_those_of_the_other_experiments(tmp_path):
    ours = Work(alpha_star.EXPERIMENT, "cpu", tmp_path, None)
    for theirs in (Work(CONTESTED, "cpu", tmp_path, None), Work(PEOPLE, "cpu", tmp_path, None)):
        all_variants = alpha_star.EXPERIMENT.variants("cpu")
        variants = [one for one in all_variants if ours.experiment.home(one.data) == theirs.experiment.name]
        assert variants
        known = {theirs._path(cell): theirs._made_with(cell) for cell in theirs.cells()}
        shared = 0
        for variant in variants:
            for method in variant.methods:
                for cell in ours._trainings(variant, method, 0):
                    path = ours._path(cell)
                    if path in known:
                        shared += 1
                        assert ours._made_with(cell) == known[path]
                    else:
                        assert cell.method.startswith("alpha_")
        # of each variant at least the single adapter and the run at alpha = 0.8
        assert shared >= 2 * len(variants)


def test_the_estimate_is_of_the_single_adapter_that_was_trained_alone(tmp_path):
    work = Work(alpha_star.EXPERIMENT, "cpu", tmp_path, None)
    variant = alpha_star.EXPERIMENT.variants("cpu")[0]
    folder = work.run_folder(variant, "lora", 2)
    assert folder.name == "lora-2-member-0"
    assert folder.relative_to(tmp_path).parts[:2] == ("contested", "cpu")


def test_particles_part_at_the_alpha_from_which_on_they_are_apart():
    spreads = {0.1: 0.02, 0.3: 0.04, 0.5: 0.2, 0.8: 0.4, 1.0: 0.45}
    assert alpha_star.parted(spreads, 0.03) == 0.5
    assert alpha_star.parted(spreads, 0.2) == 0.8
    assert alpha_star.parted(spreads, 0.4) is None
    # a spread that is large at a small alpha alone does not count
    assert alpha_star.parted(spreads | {0.1: 0.3}, 0.03) == 0.5
    assert alpha_star.parted(dict.fromkeys(spreads, 0.5), 0.0) == 0.1


def test_spread_is_that_of_contested_questions_and_of_yes():
    weights = torch.tensor([0.5, 0.5], dtype=torch.float64)
    p = np.array([[0.9, 0.5, 0.5], [0.1, 0.5, 0.3]])
    logp = torch.from_numpy(np.log(np.stack([p, 1 - p], axis=-1)))
    contested = Answers(logp, weights, {"contested": np.array([True, False, True])})
    assert alpha_star.spread(contested) == pytest.approx((0.4 + 0.1) / 2)
    people = Answers(logp, weights, {"yes": np.array([[False, True]] * 3)})
    assert alpha_star.spread(people) == pytest.approx((0.4 + 0.0 + 0.1) / 3)


def test_the_table_and_the_picture_show_every_seed():
    found = {
        "camps": {
            "predicted": [{"alpha_star": 0.5, "interval": [0.4, 0.8]}, {"alpha_star": -9.0, "interval": [-20.0, 0.1]}],
            "own_answers": [
                {"alpha_star": 0.00161, "interval": [0.001, 1.0]},
                {"alpha_star": 1.0, "interval": [0.5, 1.5]},
            ],
            "observed": [0.5, None],
            "alphas": [0.3, 0.5, 0.8],
        }
    }
    lines = alpha_star.EXPERIMENT.further_lines({"further": found})
    predicted, own = "0.5 (0.4 to 0.8), -9 (-20 to 0.1)", "0.0016 (0.001 to 1), 1 (0.5 to 1.5)"
    assert f"| camps | {predicted} | 0.5, not at 0.8 | {own} |" in lines
    axes = alpha_star.EXPERIMENT.picture({"further": found}).axes[0]
    dots = next(line for line in axes.get_lines() if line.get_label() == "camps")
    assert dots.get_xydata().tolist() == [[0.5, 0.5], [0.0, 1.15]]


def test_an_estimate_is_made_once(tmp_path, monkeypatch):
    made = []

    def find(config):
        made.append(config)
        Path(config.output_dir).mkdir()
        results = '{"alpha_star": 0.5, "alpha_star_interval": [0.4, 0.6], "alpha_star_by_dims": [0.9, 0.5]}'
        (Path(config.output_dir) / "results.json").write_text(results)

    monkeypatch.setattr(alpha_star, "find_alpha_star", find)
    work = Work(alpha_star.EXPERIMENT, "cpu", tmp_path, None, {"model": "a-model"})
    variant = alpha_star.EXPERIMENT.variants("cpu")[0]
    first, second = (alpha_star.estimate(work, variant, 0) for _ in range(2))
    assert first == second == {"alpha_star": 0.5, "interval": [0.4, 0.6], "by_dims": [0.9, 0.5]}
    assert len(made) == 1
    assert len(Path(made[0].dataset_name).read_text().splitlines()) == 60
    assert made[0].max_length == work.setting.max_length  # so its rows are cut as those of the training were
    assert made[0].ensemble == str(work.run_folder(variant, "lora", 0) / "particles")
    with pytest.raises(SystemExit, match="remove it"):
        alpha_star.estimate(replace(work, changes={"model": "a-model", "dtype": "float32"}), variant, 0)
    rows = work.data(variant, 0).rows
    monkeypatch.setattr(alpha_star, "answered_by", lambda adapter, rows, config: [{"answered": row} for row in rows])
    alpha_star.estimate(work, variant, 0, own_answers=True)
    kept = [json.loads(line) for config in made for line in Path(config.dataset_name).read_text().splitlines()]
    assert kept == [*rows, *({"answered": row} for row in rows)]


def test_own_answers_are_what_the_adapter_says_to_the_same_prompts(model_folder, tmp_path):
    config = ModelConfig(model_name_or_path=str(model_folder), dtype="float32")
    tokenizer = load_tokenizer(config)
    ensemble = LoraEnsemble.attach(load_model(config), EnsembleConfig(num_particles=1))
    with torch.no_grad():
        for parameter in ensemble.parameters():
            parameter.normal_(std=0.3, generator=torch.Generator().manual_seed(0))
    ensemble.save_pretrained(tmp_path)
    asked = ["Who sings?", "Who dances in the park?", "Who reads?"]
    answer = [{"role": "assistant", "content": "Nobody does."}]
    rows = [{"prompt": [{"role": "user", "content": text}], "completion": answer} for text in asked]
    settings = AlphaStarConfig(
        model_name_or_path=str(model_folder), ensemble=str(tmp_path), dataset_name="-", output_dir="-", seed=3
    )
    too_long = {"prompt": "long " * 3000, "completion": "yes"}
    answered = alpha_star.answered_by(tmp_path, [rows[0], too_long, *rows[1:]], settings)
    assert [row["prompt"] for row in answered] == [row["prompt"] for row in rows]
    for number, ids in enumerate(encode_prompts(tokenizer, asked)):
        said = ensemble.generate(torch.tensor([ids]), max_new_tokens=50, seed=3, prompt_ids=[number])[0, 0, 0].tolist()
        beginnings = [decode_answer(tokenizer, ids, said[:length]) for length in range(2, 50)]
        assert answered[number]["completion"][0]["content"] in beginnings
    ensemble.detach()
