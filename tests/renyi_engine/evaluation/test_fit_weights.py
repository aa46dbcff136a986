"""`fit-weights` finds the shares of two camps, changes nothing but the weights, and refuses what has none."""

from __future__ import annotations

import json
import re

import pytest
import torch
from transformers import AutoModelForCausalLM

from renyi_engine import EnsembleConfig, LoraEnsemble, SftTask
from renyi_engine.cli import main
from renyi_engine.ensemble.adapter_folder import ENSEMBLE_FILE, write_weights

CAMPS = [{"prompt": "Dogs? ", "completion": "yes"}, {"prompt": "Dogs? ", "completion": "no"}]


@pytest.fixture(scope="module")
def camps(model_folder, tokenizer, tmp_path_factory):
    """The folder of two particles, each of which learnt the answer of one camp."""
    ensemble = LoraEnsemble.attach(AutoModelForCausalLM.from_pretrained(model_folder), EnsembleConfig(2, rank=4))
    task = SftTask(tokenizer, 64)
    batch = task.collate([task.example(number, row) for number, row in enumerate(CAMPS)])
    optimizer = torch.optim.Adam(ensemble.parameters(), lr=2e-2)
    for _ in range(60):
        optimizer.zero_grad()
        (-ensemble.sequence_logprob(batch) * torch.eye(2)).sum().backward()
        optimizer.step()
    folder = tmp_path_factory.mktemp("camps")
    ensemble.save_pretrained(folder, alpha=0.8)
    return folder


@pytest.fixture
def fit(model_folder, jsonl, tmp_path):
    def run(folder, rows, *flags):
        path = jsonl(tmp_path / "held_out.jsonl", rows)
        return main([
            "fit-weights", f"--model_name_or_path={model_folder}", f"--ensemble={folder}", f"--dataset_name={path}",
            "--dataset_split=train", *flags,
        ])  # fmt: skip

    return run


def contents(folder):
    files = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    return json.loads(files.pop(ENSEMBLE_FILE)), files


def test_the_shares_of_two_camps_are_found_and_nothing_else_changes(camps, fit, model_folder, capsys):
    write_weights(camps, [0.5, 0.5])
    before, particles = contents(camps)
    assert fit(camps, CAMPS[:1] * 4 + CAMPS[1:]) == 0, capsys.readouterr().err
    printed = capsys.readouterr().out
    after, particles_now = contents(camps)
    assert particles_now == particles
    assert {k: v for k, v in before.items() if k != "digest"} | {"particle_weights": after["particle_weights"]} == {
        k: v for k, v in after.items() if k != "digest"
    }
    assert after["particle_weights"] == pytest.approx([0.8, 0.2], abs=0.02)
    assert re.search(r"p000: weight 0\.5000 before, 0\.(79|80)\d\d now\n", printed)
    old, new = map(float, re.search(r"on these 5 examples: (\S+) nats/token before, (\S+) now", printed).groups())
    assert new < old
    loaded = LoraEnsemble.from_pretrained(AutoModelForCausalLM.from_pretrained(model_folder), camps)
    assert loaded.particle_weights.tolist() == after["particle_weights"]


def test_pairs_are_scored_as_preferences(camps, fit, capsys):
    pairs = [
        {"prompt": "Dogs? ", "chosen": "yes", "rejected": "no"},
        {"prompt": "Dogs? ", "chosen": "no", "rejected": "yes"},
    ]
    assert fit(camps, pairs[:1] * 3 + pairs[1:], "--beta=1") == 0, capsys.readouterr().err
    assert "on these 4 examples" in (printed := capsys.readouterr().out)
    assert "nats/pair" in printed
    assert contents(camps)[0]["particle_weights"] == pytest.approx([0.75, 0.25], abs=0.02)


@pytest.mark.parametrize("flag", ["--alpha=0", "--alpha=nan", "--beta=0", "--max_length=1"])
def test_settings_that_mean_nothing_are_refused(camps, fit, flag, capsys):
    assert fit(camps, CAMPS, flag) == 2
    assert capsys.readouterr().err.startswith(f"renyi-engine fit-weights: {flag[2:].partition('=')[0]}: expected")


def test_folders_that_keep_no_weights_are_refused_before_the_model_is_loaded(
    camps, fit, save_particles, tmp_path, capsys
):
    save_particles(tmp_path / "one", num_particles=1)
    (tmp_path / "run" / "checkpoint-2").mkdir(parents=True)
    for folder, why in (
        (camps / "p000", f"has no {ENSEMBLE_FILE}"),
        (tmp_path / "one", "one particle"),
        (tmp_path / "run", "found neither"),  # the folder of a run: its particles are one folder below
    ):
        assert fit(folder, CAMPS, "--model_name_or_path=nowhere/to/be/found") == 2
        error = capsys.readouterr().err
        assert re.match(rf"renyi-engine fit-weights: (ensemble: )?{folder}\b", error)
        assert why in error
        assert error.count("\n") == 1
