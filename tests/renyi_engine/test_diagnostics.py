"""Which examples are contested, and which nobody explains.

Layout: K particles, N examples.
"""

from __future__ import annotations

import csv
import json
import re

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from renyi_engine import EnsembleConfig, LoraEnsemble
from renyi_engine.cli import main
from renyi_engine.diagnostics import CONTESTED, OUT_OF_SUPPORT, diagnose


def test_every_number_is_its_formula():
    generator = np.random.default_rng(0)
    logp, base = -generator.gamma(2.0, 4.0, (4, 30)), -generator.gamma(2.0, 4.0, 30)
    tokens, alpha = generator.integers(1, 9, 30), 0.6
    found = diagnose(torch.tensor(logp), torch.tensor(base), torch.tensor(tokens), alpha, 0.55, 1.3)
    r = np.exp(alpha * logp) / np.exp(alpha * logp).sum(0)
    ess, entropy = 1 / (r**2).sum(0), -(r * np.log(r)).sum(0)
    best = -logp.max(0) / tokens
    mixture = -np.log(np.exp(logp).mean(0)) / tokens
    for i, (flag, *numbers) in enumerate(found):
        expected = [ess[i], entropy[i], logp[:, i].argmax(), best[i], mixture[i], -base[i] / tokens[i], tokens[i]]
        assert numbers == pytest.approx(expected, rel=1e-6)
        assert flag == (CONTESTED if ess[i] <= 0.55 * 4 else OUT_OF_SUPPORT if best[i] > 1.3 else "")
    assert {flag for flag, *_ in found} == {CONTESTED, OUT_OF_SUPPORT, ""}


def test_what_one_particle_knows_is_contested_and_what_none_knows_is_out_of_support():
    # columns: all know it, one knows it, nobody knows it
    logp = torch.tensor([[-0.1, -0.1, -40.0], [-0.1, -30.0, -40.0], [-0.1, -30.0, -40.0]])
    flags = [flag for flag, *_ in diagnose(logp, torch.zeros(3), torch.full((3,), 4), 0.8, 0.5, 2.0)]
    assert flags == ["", CONTESTED, OUT_OF_SUPPORT]


@pytest.fixture
def particles(model_folder, tmp_path):
    def save(num_particles=3, alpha=0.8):
        model = AutoModelForCausalLM.from_pretrained(model_folder)
        config = EnsembleConfig(num_particles=num_particles, rank=2, init="spread")
        ensemble = LoraEnsemble.attach(model, config)
        with torch.no_grad():
            for _, B in ensemble.stacked().values():
                B.mul_(60)
        ensemble.save_pretrained(tmp_path / "particles", alpha=alpha)
        return ensemble

    return save


@pytest.fixture
def flags(model_folder, jsonl, tmp_path):
    rows = [{"prompt": f"{i}? ", "completion": "ab<script>alert(1)</script>"[: 2 + 5 * i]} for i in range(7)]
    rows.insert(3, {"prompt": "x", "completion": ""})
    path = jsonl(tmp_path / "rows.jsonl", rows)
    return [
        "eval",
        "nll",
        f"--model_name_or_path={model_folder}",
        f"--ensemble={tmp_path / 'particles'}",
        f"--dataset_name={path}",
        f"--output_dir={tmp_path / 'out'}",
    ]


def test_the_command_writes_a_table_to_sort_a_summary_and_a_report(particles, flags, tokenizer, tmp_path, capsys):
    ensemble = particles()
    assert main([*flags, "--alpha=0.4", "--contested_ess=0.6", "--high_quantile=0.5"]) == 0
    printed = capsys.readouterr().out
    assert "1 rows dropped (3): no token to learn: the completion is empty" in printed
    with (tmp_path / "out" / "examples.csv").open(newline="") as file:
        table = list(csv.DictReader(file))
    assert [int(row["row"]) for row in table] == [0, 1, 2, 4, 5, 6, 7]
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    mean_ess = np.mean([float(row["ess_particles"]) for row in table])
    assert results["mean_ess_particles"] == pytest.approx(mean_ess, rel=1e-6)
    best = [float(row["best_particle_nll_nats_per_token"]) for row in table]
    assert results["high_nll_nats_per_token"] == pytest.approx(float(np.quantile(best, 0.5)), rel=1e-6)
    for kind in (CONTESTED, OUT_OF_SUPPORT):
        count = sum(row["flag"] == kind for row in table)
        assert results[kind.replace(" ", "_")] == count
        assert f"{kind}: {count} of 7 examples" in printed
    # the base's column is the bare base's
    ids = torch.tensor([tokenizer("0? ab</s>")["input_ids"]])
    labels = ids.clone()
    labels[:, :3] = -100
    with torch.no_grad(), ensemble.disable_adapters():
        logp = ensemble.sequence_logprob({"input_ids": ids, "labels": labels})
    assert float(table[0]["base_nll_nats_per_token"]) == pytest.approx(-logp.item() / 3, rel=1e-5)
    page = (tmp_path / "out" / "report.html").read_text()
    assert "<script>alert" not in page


@pytest.mark.parametrize(
    ("ensemble", "change", "message"),
    [
        ({"alpha": 0.0}, [], "was trained at 0, where every share is 1/K; pass --alpha 1"),
        ({}, ["--alpha=0"], "alpha: at 0 every particle has the same share"),
        ({"alpha": None}, [], "alpha: .* does not record"),
        ({"num_particles": 1}, [], "ensemble: expected at least 2 particles"),
        ({}, ["--ensemble="], "ensemble: needed"),
        ({}, ["--contested_ess=0"], "contested_ess"),
        ({}, ["--high_quantile=2"], "high_quantile"),
    ],
)
def test_what_cannot_be_diagnosed_is_said_in_one_line(particles, flags, capsys, ensemble, change, message):
    particles(**ensemble)
    assert main([*flags, *change]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert re.search(message, error)


def test_a_file_is_read_whatever_the_default_split_is_called_and_has_no_other(particles, flags, capsys):
    particles()
    assert main([*flags, "--dataset_split=validation"]) == 2
    said = capsys.readouterr().err
    assert "dataset_split: " in said
    assert "has no split 'validation'; it has no splits at all: leave --dataset_split out" in said
