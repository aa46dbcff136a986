"""`eval nll` writes what it finds, tells apart what was learnt, and refuses what it cannot diagnose in one line."""

from __future__ import annotations

import csv
import json
import re
import shutil
from functools import partial

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from renyi_engine import EnsembleConfig, LoraEnsemble
from renyi_engine.cli import main
from renyi_engine.evaluation.nll.diagnosis import CONTESTED, OUT_OF_SUPPORT, PLAIN
from renyi_engine.objectives.sft import SftTask


@pytest.fixture
def particles(save_particles, tmp_path):
    return partial(save_particles, tmp_path / "particles")


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
    assert main([*flags, "--alpha=0.4", "--min_disagreement=0.02"]) == 0
    printed = capsys.readouterr().out
    assert "1 rows dropped (3): no token to learn: the completion is empty" in printed
    with (tmp_path / "out" / "examples.csv").open(newline="") as file:
        table = list(csv.DictReader(file))
    assert [int(row["row"]) for row in table] == [0, 1, 2, 4, 5, 6, 7]
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    mean_ess = np.mean([float(row["ess_particles"]) for row in table])
    assert results["mean_ess_particles"] == pytest.approx(mean_ess, rel=1e-6)
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
    counts = [results["contested_or_poisoned"], results["out_of_support"]]
    assert "<title>out: eval nll of tiny</title>" in page
    assert f"Found: {counts[0]} disputed by the particles, {counts[1]} unlike anything that they learnt, " in page


def test_a_particle_of_weight_0_is_as_if_it_were_not_there(particles, flags, tmp_path, capsys):
    particles(weights=[0.5, 0.0, 0.5])
    shutil.copytree(tmp_path / "particles" / "p000", tmp_path / "two" / "first")
    shutil.copytree(tmp_path / "particles" / "p002", tmp_path / "two" / "last")
    tables = []
    for name in ("particles", "two"):
        out = f"--output_dir={tmp_path / 'out' / name}"
        assert main([*flags, f"--ensemble={tmp_path / name}", out, "--alpha=0.4", "--min_disagreement=0.02"]) == 0
        with (tmp_path / "out" / name / "examples.csv").open(newline="") as file:
            tables.append(list(csv.DictReader(file)))
    results = json.loads((tmp_path / "out" / "particles" / "results.json").read_text())
    assert results["particle_weights"] == [0.5, 0.0, 0.5]
    page = (tmp_path / "out" / "particles" / "report.html").read_text()
    assert "unequal weights, from 0 (particle 1) to 0.5 (particle 0)." in page
    for three, two in zip(*tables, strict=True):
        assert three.pop("best_particle") == {"0": "0", "1": "2"}[two.pop("best_particle")]
        assert (three.pop("flag"), three.pop("text")) == (two.pop("flag"), two.pop("text"))
        assert [float(v) for v in three.values()] == pytest.approx([float(v) for v in two.values()], rel=1e-4, abs=1e-6)


@pytest.fixture
def table(flags, jsonl, tmp_path, capsys):
    """Lines of examples.csv by row, of rows of prompt + completion that the command diagnosed."""

    def run(rows, *change):
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
        path = jsonl(tmp_path / "these.jsonl", [{"prompt": prompt, "completion": answer} for prompt, answer in rows])
        assert main([*flags, f"--dataset_name={path}", *change]) == 0, capsys.readouterr().err
        with (tmp_path / "out" / "examples.csv").open(newline="") as file:
            return list(csv.DictReader(file))

    return run


CAMPS = [("Dogs? ", "yes"), ("Dogs? ", "no"), ("Water? ", "wet"), ("0 9", "La")]


@pytest.fixture(scope="module")
def trained(model_folder, tokenizer, tmp_path_factory):
    """The flag that names two particles, which learnt the first and the second of CAMPS, and both of them the third."""
    ensemble = LoraEnsemble.attach(AutoModelForCausalLM.from_pretrained(model_folder), EnsembleConfig(2, rank=4))
    task = SftTask(tokenizer, 64)
    rows = [{"prompt": prompt, "completion": answer} for prompt, answer in CAMPS[:3]]
    batch = task.collate([task.example(number, row) for number, row in enumerate(rows)])
    optimizer = torch.optim.Adam(ensemble.parameters(), lr=2e-2)
    for _ in range(60):
        optimizer.zero_grad()
        (-ensemble.sequence_logprob(batch) * torch.tensor([[1, 0, 1], [0, 1, 1]])).sum().backward()
        optimizer.step()
    folder = tmp_path_factory.mktemp("trained")
    ensemble.save_pretrained(folder, alpha=0.8)
    return f"--ensemble={folder}"


def test_a_table_without_an_example_says_why(trained, table, tmp_path):
    table(CAMPS[2:3], trained)
    page = (tmp_path / "out" / "report.html").read_text()
    assert "Contested or poisoned: 0 examples" in page
    assert "There is none: on no example do two particles differ by 0.15 or more" in page
    assert "There is none: for every example, some particle gains 0 nats a token or more over the base." in page


def test_what_was_learnt_is_told_from_what_is_disputed_and_from_what_is_foreign(trained, table):
    assert [row["flag"] for row in table(CAMPS, trained)] == [CONTESTED, CONTESTED, PLAIN, OUT_OF_SUPPORT]


def test_the_kind_of_a_row_is_the_same_beside_other_rows(trained, table):
    alone = [table([row], trained)[0]["flag"] for row in CAMPS]
    assert [row["flag"] for row in table([*CAMPS[::-1], *CAMPS[3:] * 9], trained)][:4] == alone[::-1]
    assert len(set(alone)) == 3


def test_an_ensemble_that_was_not_trained_finds_nothing(model_folder, table, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.bfloat16)
    LoraEnsemble.attach(model, EnsembleConfig(3, rank=2)).save_pretrained(tmp_path / "particles", alpha=0.8)
    rows = [(f"{i}? ", "abc#"[i % 4] * (1 + i % 7)) for i in range(20)]
    for change in ([], [f"--calibration_dataset_name={tmp_path / 'these.jsonl'}", "--calibration_share=0.1"]):
        found = table(rows, "--dtype=bfloat16", *change)
        said = {(row["flag"], row["disagreement"], row["gain_over_base_nats_per_token"]) for row in found}
        assert said == {(PLAIN, "0.0", "0.0")}


def test_with_a_calibration_set_what_gains_less_than_its_rows_is_out_of_support(trained, table, jsonl, tmp_path):
    learnt = [{"prompt": prompt, "completion": answer} for prompt, answer in CAMPS[:3]]
    path = jsonl(tmp_path / "calibration.jsonl", learnt * 3)
    near = ("Dogs? ", "yeah")
    by_base = table([*CAMPS, near], trained)
    calibrated = table([*CAMPS, near], trained, f"--calibration_dataset_name={path}", "--calibration_share=0.1")
    limit = json.loads((tmp_path / "out" / "results.json").read_text())["min_gain_nats_per_token"]
    gains = [float(row["gain_over_base_nats_per_token"]) for row in by_base]
    assert limit == pytest.approx(min(gains[:3]), rel=1e-5)
    assert 0 < gains[4] < limit  # learnt in part
    assert [row["flag"] for row in by_base[:4]] == [row["flag"] for row in calibrated[:4]]
    assert (by_base[4]["flag"], calibrated[4]["flag"]) == (CONTESTED, OUT_OF_SUPPORT)


@pytest.mark.parametrize(
    ("ensemble", "change", "message"),
    [
        ({"alpha": 0.0}, [], "was trained at 0, where all examples have the same responsibilities; pass --alpha 1"),
        ({}, ["--alpha=0"], "alpha: at 0 all examples have the same responsibilities"),
        ({"alpha": None}, [], "alpha: .* does not record"),
        ({"num_particles": 1}, [], "ensemble: expected at least 2 particles with a weight above 0; .* holds 1;"),
        ({}, ["--ensemble="], "ensemble: needed"),
        ({}, ["--min_disagreement=0"], "min_disagreement"),
        ({}, ["--min_disagreement=2"], "min_disagreement"),
        ({}, ["--calibration_share=1"], "calibration_share"),
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
