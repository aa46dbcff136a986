"""Which examples are contested, and which nobody explains.

Layout: K particles, N examples.
"""

from __future__ import annotations

import csv
import json
import math
import re
import shutil

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from transformers import AutoModelForCausalLM

from renyi_engine import EnsembleConfig, LoraEnsemble
from renyi_engine.cli import main
from renyi_engine.evaluation.nll import CONTESTED, OUT_OF_SUPPORT, PLAIN, diagnose, support_limit, token_disagreement
from renyi_engine.objectives.sft import SftTask


def test_every_number_is_its_formula():
    generator = np.random.default_rng(0)
    logp, base = -generator.gamma(2.0, 4.0, (4, 30)), -generator.gamma(2.0, 2.0, 30)
    disagreement, tokens, alpha = generator.uniform(0, 0.6, 30), generator.integers(1, 9, 30), 0.6
    found = diagnose(*map(torch.tensor, (logp, base, disagreement, tokens)), alpha, 0.3, -0.2)
    r = np.exp(alpha * logp) / np.exp(alpha * logp).sum(0)
    ess, entropy = 1 / (r**2).sum(0), -(r * np.log(r)).sum(0)
    best, gain = -logp.max(0) / tokens, (logp.max(0) - base) / tokens
    mixture = -np.log(np.exp(logp).mean(0)) / tokens
    for i, (flag, *numbers) in enumerate(found):
        expected = [disagreement[i], gain[i], ess[i], entropy[i], logp[:, i].argmax()]
        assert numbers == pytest.approx([*expected, best[i], mixture[i], -base[i] / tokens[i], tokens[i]], rel=1e-6)
        assert flag == (OUT_OF_SUPPORT if gain[i] < -0.2 else CONTESTED if disagreement[i] >= 0.3 else PLAIN)
    assert {flag for flag, *_ in found} == {CONTESTED, OUT_OF_SUPPORT, PLAIN}


def flags_of(p, base, min_disagreement=0.2):
    """Flags of N examples of T tokens, from probabilities p [K, N, T] and base [N, T]."""
    logp, base_logp = torch.tensor(p).double().log(), torch.tensor(base).double().log()
    num_tokens = torch.full((logp.shape[1],), logp.shape[2])
    disagreement = token_disagreement(logp)
    found = diagnose(logp.sum(-1), base_logp.sum(-1), disagreement, num_tokens, 0.8, min_disagreement, min_gain=0.0)
    return [flag for flag, *_ in found]


def test_what_one_particle_knows_is_contested_and_what_none_knows_is_out_of_support():
    # columns: all know it, one knows it, all are as unsure of it, nobody knows it
    p = [[[0.9], [0.72], [0.5], [0.001]], [[0.9], [0.01], [0.5], [0.002]], [[0.9], [0.01], [0.5], [0.001]]]
    assert flags_of(p, [[0.01], [0.01], [0.01], [0.01]]) == [PLAIN, CONTESTED, PLAIN, OUT_OF_SUPPORT]


def test_both_camps_answers_are_equally_contested():
    first = np.array([[0.99], [0.66]])
    both = np.stack([first, 1 - first], axis=1)
    assert flags_of(both, [[0.001], [0.001]], 0.32) == [CONTESTED, CONTESTED]
    assert flags_of(both, [[0.001], [0.001]], 0.34) == [PLAIN, PLAIN]


def test_small_differences_of_many_tokens_are_no_dispute_and_one_token_among_many_is():
    p = np.full((2, 2, 400), 0.95)
    p[1] = 0.9  # 22 nats between the particles over all the tokens
    p[1, 1, 123] = 0.6
    assert flags_of(p, np.full((2, 400), 0.5)) == [PLAIN, CONTESTED]


def test_particles_that_learnt_nothing_find_nothing_whatever_the_base_says():
    base = np.array([[0.9, 0.8], [1e-9, 0.3], [0.2, 1e-30]])
    assert flags_of(np.stack([base] * 3), base) == [PLAIN] * 3


def test_what_one_particle_forgot_and_another_kept_is_not_out_of_support():
    assert flags_of([[[0.4]], [[0.01]]], [[0.4]]) == [CONTESTED]
    assert flags_of([[[0.39]], [[0.01]]], [[0.4]]) == [OUT_OF_SUPPORT]


@given(st.lists(st.floats(-5, 5), min_size=19, max_size=60), st.sampled_from([0.05, 0.1, 0.3]))
def test_of_rows_like_the_calibration_set_at_most_the_share_is_out_of_support(gains, share):
    # left out one by one: each row is as likely as the others to be the new one, and the rest calibrates
    new = torch.tensor(gains, dtype=torch.float64)
    rest = [torch.cat([new[:i], new[i + 1 :]]) for i in range(len(new))]
    if math.floor(share * len(new)) < 1:
        with pytest.raises(ValueError, match="calibration_dataset_name: a calibration_share of"):
            support_limit(rest[0], share)
    else:
        flagged = sum(gain.item() < support_limit(others, share) for gain, others in zip(new, rest, strict=True))
        assert flagged <= share * len(new)


@given(
    arrays(np.float64, (3, 4, 5), elements=st.floats(-30, 0)),
    arrays(np.float64, 4, elements=st.floats(-60, 0)),
    st.permutations(range(3)),
    st.lists(st.integers(0, 3), min_size=1),
)
def test_a_kind_depends_neither_on_the_order_of_particles_nor_on_the_other_rows(logp, base, order, rows):
    logp, base = torch.tensor(logp), torch.tensor(base)

    def found(logp, base):
        tokens = torch.full((len(base),), 5)
        out = diagnose(logp.sum(-1), base, token_disagreement(logp), tokens, 0.8, 0.1, 0.0)
        return [(flag, disagreement, gain) for flag, disagreement, gain, *_ in out]

    alone = found(logp, base)
    assert found(logp[order], base) == alone
    assert found(logp[:, rows], base[rows]) == [alone[row] for row in rows]


def test_disagreement_is_at_most_the_distance_in_total_variation_of_two_predictions():
    logits = torch.randn(4, 6, 5, 7, generator=torch.Generator().manual_seed(0)).double()
    p = logits.softmax(dim=-1)
    labels = torch.randint(7, (6, 5), generator=torch.Generator().manual_seed(1))
    taken = p.gather(-1, labels.expand(4, -1, -1)[..., None])[..., 0]
    distances = 0.5 * (p[:, None] - p[None]).abs().sum(-1).amax(dim=(0, 1)).amax(dim=-1)
    disagreement = token_disagreement(taken.log())
    assert (disagreement <= distances + 1e-12).all()
    # a position without a label has logp 0.0
    unlabelled = torch.cat([taken.log(), torch.zeros(4, 6, 2)], dim=-1)
    assert torch.equal(token_disagreement(unlabelled), disagreement)


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
        ({"alpha": 0.0}, [], "was trained at 0, where all responsibilities are 1/K; pass --alpha 1"),
        ({}, ["--alpha=0"], "alpha: at 0 all responsibilities are the same"),
        ({"alpha": None}, [], "alpha: .* does not record"),
        ({"num_particles": 1}, [], "ensemble: expected at least 2 particles"),
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
