"""An evaluation on MMLU writes what the base, each particle and their mixture make of every question.

Layout: K particles, N questions, C choices.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from renyi_engine.evaluation import MmluConfig, evaluate_mmlu
from renyi_engine.evaluation.mmlu import report
from renyi_engine.evaluation.mmlu.questions import Question

K, ALPHA, WEIGHTS = 3, 0.7, (0.2, 0.5, 0.3)
SUBJECTS = ("virology", "anatomy", "marketing")
NUM_TEST, LIMIT = 5, 4


@pytest.fixture(scope="module")
def particles(save_particles, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("ensemble")
    save_particles(folder, num_particles=K, lora_alpha=64, alpha=ALPHA, weights=WEIGHTS)
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """Short questions, and in each subject one that, with anatomy's name, just fits the tiny model's 128 tokens."""
    folder = tmp_path_factory.mktemp("mmlu")

    def rows(num_questions: int) -> list[dict[str, Any]]:
        texts = [f"{i}+1?" if i != 2 else "L" * 25 for i in range(num_questions)]
        return [
            {"subject": s, "question": q, "choices": ["1", "2", "3", str(i)], "answer": (i + len(s)) % 4}
            for s in SUBJECTS
            for i, q in enumerate(texts)
        ]

    for name, num_questions in (("test", NUM_TEST), ("dev", 2)):
        text = "".join(json.dumps(row) + "\n" for row in rows(num_questions))
        (folder / f"{name}.jsonl").write_text(text, encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def configure(model_folder, data) -> Callable[..., MmluConfig]:
    def make(output: Path, **overrides: Any) -> MmluConfig:
        settings = {
            "model_name_or_path": str(model_folder),
            "dataset_name": str(data),
            "output_dir": str(output),
            "limit": LIMIT,
            "per_device_eval_batch_size": 5,
            "use_cpu": True,
        }
        return MmluConfig(**settings | overrides)

    return make


@pytest.fixture(scope="module")
def evaluated(configure, particles, tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("evaluated") / "run"
    with pytest.warns(UserWarning, match="2 prompts are longer than the model's context of 128 tokens"):
        table = evaluate_mmlu(configure(output, ensemble=str(particles)))
    first, *rows, last = table.splitlines()
    assert first.split() == ["who", "accuracy", "(%)", "NLL", "(nats)", "ECE", "Brier"]
    assert [row.split("  ")[0] for row in rows[:3]] == ["base", "mixture", "mean of particles"]
    assert last == f"report: {output / 'report.html'}"
    return output


def samples_of(output: Path) -> list[dict[str, Any]]:
    paths = [output / "samples" / f"mmlu_{subject}.jsonl" for subject in SUBJECTS]
    return [json.loads(line) for path in paths for line in path.read_text(encoding="utf-8").splitlines()]


def test_the_first_questions_of_each_subject_are_asked(evaluated):
    samples = samples_of(evaluated)
    assert [(one["doc"]["subject"], one["doc_id"]) for one in samples] == [
        (s, i) for s in SUBJECTS for i in range(LIMIT)
    ]
    found = json.loads((evaluated / "results.json").read_text())
    assert found["n-samples"]["mmlu_anatomy"] == {"original": NUM_TEST, "effective": LIMIT}
    assert found["num_prompts_cut"] == 2


def test_the_bases_scores_are_transformers_own(evaluated, model_folder, tokenizer):
    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32).eval()
    for one in samples_of(evaluated):
        for request, found in zip(one["arguments"].values(), one["base_logp_nats"], strict=True):
            prompt, whole = (tokenizer(t)["input_ids"] for t in (request["arg_0"], request["arg_0"] + request["arg_1"]))
            # what is read ends before the last token, and is at most the context
            read, labels = whole[:-1][-128:], whole[len(prompt) :]
            with torch.no_grad():
                logp = torch.log_softmax(model(torch.tensor([read])).logits[0, -len(labels) :], -1)
            expected = logp[range(len(labels)), labels].sum().item()
            assert found == pytest.approx(expected, abs=1e-4)


def test_particles_answer_by_themselves_and_the_mixture_by_their_weighted_mean_probability(evaluated):
    samples = samples_of(evaluated)
    logp = np.array([one["particle_logp_nats"] for one in samples]).transpose(1, 0, 2)  # [K, N, C]
    assert logp.shape == (K, len(samples), 4)
    assert np.abs(logp - np.roll(logp, 1, axis=0)).max(axis=(1, 2)).min() > 1e-3
    p = np.exp(logp) / np.exp(logp).sum(axis=-1, keepdims=True)
    mixture = np.array([[float(value) for value, _ in one["filtered_resps"]] for one in samples])
    np.testing.assert_allclose(np.exp(mixture), np.average(p, axis=0, weights=WEIGHTS), rtol=1e-5)
    own = np.average(-(p * np.log(p)).sum(axis=-1), axis=0, weights=WEIGHTS)
    np.testing.assert_allclose([one["aleatoric_nats"] for one in samples], own, rtol=1e-5)

    answers = np.array([one["doc"]["answer"] for one in samples])
    files = {"results.json": mixture, "models/base.json": np.array([one["base_logp_nats"] for one in samples])}
    files |= {f"models/p{k:03d}.json": logp[k] for k in range(K)}
    assert {str(p.relative_to(evaluated)) for p in evaluated.rglob("*.json")} == set(files)
    for name, scores in files.items():
        found = json.loads((evaluated / name).read_text())
        right = scores.argmax(axis=-1) == answers
        assert found["results"]["mmlu"]["acc,none"] == pytest.approx(right.mean()), name
        of_anatomy = right[[one["doc"]["subject"] == "anatomy" for one in samples]]
        assert found["results"]["mmlu_anatomy"]["acc,none"] == pytest.approx(of_anatomy.mean()), name
        assert found["particle_weights"] == list(WEIGHTS)
        member = "mixture" if name == "results.json" else Path(name).stem
        assert found["config"]["model_args"].get("member", "base") == member
    entropy = -(np.exp(mixture) * mixture).sum(axis=-1)
    np.testing.assert_allclose([one["total_nats"] for one in samples], entropy, rtol=1e-5)
    parts = [one["aleatoric_nats"] + one["epistemic_nats"] for one in samples]
    np.testing.assert_allclose(parts, entropy, rtol=1e-5)


def test_responsibilities_weigh_the_right_answer_at_the_ensembles_own_alpha(evaluated):
    for one in samples_of(evaluated):
        right = ALPHA * np.array(one["particle_logp_nats"])[:, one["doc"]["answer"]]
        expected = WEIGHTS * np.exp(right - right.max())
        np.testing.assert_allclose(one["responsibilities"], expected / expected.sum(), rtol=1e-4)


def test_the_report_shows_every_member_and_its_own_numbers(evaluated):
    page = (evaluated / "report.html").read_text(encoding="utf-8")
    for heading in ("How good are the answers?", "Does it know when it is wrong?", "Which particle answers what?"):
        assert f"<h2>{heading}</h2>" in page
    rows = re.findall(r'<tr><td class="">(.*?)</td><td class="num">([\d.]+)</td>', page)
    shown = dict(rows[: K + 3])
    assert list(shown) == ["base", "mixture", "mean of particles", "particle 0", "particle 1", "particle 2"]
    stored = {"mixture": "results.json", "base": "models/base.json", "particle 1": "models/p001.json"}
    for name, file in stored.items():
        accuracy = json.loads((evaluated / file).read_text())["results"]["mmlu"]["acc,none"]
        assert shown[name] == f"{100 * accuracy:.1f}"
    each = [float(shown[f"particle {k}"]) for k in range(K)]
    assert float(shown["mean of particles"]) == pytest.approx(np.average(each, weights=WEIGHTS), abs=0.1)
    assert "In the mixture the particles have unequal weights, from 0.2 (particle 0) to 0.5 (particle 1)." in page
    assert "2 prompts lost their beginning" in page
    assert f"<title>{evaluated.name}: eval mmlu of tiny</title>" in page
    assert (
        f"(the mixture) answer {shown['mixture']} % of the questions right, the base without them {shown['base']} %"
        in page
    )


def test_the_heat_maps_name_their_questions(evaluated):
    page = (evaluated / "report.html").read_text(encoding="utf-8")
    [everything, *_] = [re.findall("<title>(.*?)</title>", svg) for svg in re.findall("<svg.*?</svg>", page, re.S)[2:]]
    samples = {f"{one['doc']['subject']} {one['doc_id']}": one for one in samples_of(evaluated)}
    assert len(everything) == len(samples)
    for title in everything:
        name, leader, part, text = re.fullmatch(r"(.*): particle (\d) leads, (\S+)\. (.*) \[\[.*\]\]", title).groups()
        one = samples[name]
        assert text == one["doc"]["question"]
        assert int(leader) == np.argmax(one["responsibilities"])
        assert float(part) == pytest.approx(max(one["responsibilities"]), abs=0.005)


def test_a_particle_of_weight_0_changes_nothing_that_the_report_says_of_the_mixture(evaluated):
    samples = samples_of(evaluated)
    asked = [(one["doc_id"], *map(one["doc"].get, ("subject", "question", "choices", "answer"))) for one in samples]
    questions = [Question(*of_one) for of_one in asked]
    base = torch.tensor([one["base_logp_nats"] for one in samples])
    logp = torch.tensor([one["particle_logp_nats"] for one in samples]).transpose(0, 1)
    tables = []
    for particles, weights in ((logp, [0.7, 0.0, 0.3]), (logp[[0, 2]], [0.7, 0.3])):
        weights = torch.tensor(weights, dtype=torch.float64)
        found = report.sections(questions, base, particles, ALPHA, weights)
        rows = [row for section in found for table in section.tables for row in table.rows]
        tables.append([row for row in rows if not row[0].startswith("particle ")])
        tables[-1].append(report.found(questions, base, particles, weights))
    assert tables[0] == tables[1]


def test_without_an_ensemble_the_base_stands_alone(configure, tmp_path):
    output = tmp_path / "run"
    with pytest.warns(UserWarning, match="6 prompts are longer"):
        table = evaluate_mmlu(configure(output, num_fewshot=2, limit=2))
    assert len(table.splitlines()) == 3
    page = (output / "report.html").read_text(encoding="utf-8")
    assert "Which particle answers what?" not in page
    assert "mixture" not in page
    assert sorted(str(path.relative_to(output)) for path in output.rglob("*.json")) == ["results.json"]
    found = json.loads((output / "results.json").read_text())
    assert found["n-shot"] == {f"mmlu_{subject}": 2 for subject in SUBJECTS}
    samples = samples_of(output)
    assert "particle_logp_nats" not in samples[0]
    assert found["particle_weights"] == []
    assert [float(value) for value, _ in samples[0]["filtered_resps"]] == samples[0]["base_logp_nats"]
    # two solved examples, then the question
    assert samples[0]["arguments"]["gen_args_0"]["arg_0"].count("Answer: ") == 2


def test_of_the_subjects_only_those_named_are_asked(configure, tmp_path):
    evaluate_mmlu(configure(tmp_path, subjects=["marketing"], limit=1))
    assert [path.name for path in (tmp_path / "samples").iterdir()] == ["mmlu_marketing.jsonl"]


def test_an_evaluation_is_not_written_over(configure, evaluated):
    with pytest.raises(ValueError, match=r"output_dir: .* already holds .*results.json.*; choose another"):
        evaluate_mmlu(configure(evaluated))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"split": "val"}, "split: expected one of test, validation, dev; got 'val'"),
        ({"split": "dev", "num_fewshot": 1}, "split: the questions of dev are the few-shot examples"),
        ({"num_fewshot": -1}, "num_fewshot: expected a whole number of at least 0; got -1"),
        ({"limit": 0}, "limit: expected a whole number of at least 1, or nothing; got 0"),
        ({"subjects": ["anatomi"]}, "subjects: 'anatomi' is none of MMLU's 57 subjects; did you mean 'anatomy'"),
        ({"subjects": ["sociology"]}, "subjects: .* has no test question of sociology"),
        (
            {"num_fewshot": 3},
            "num_fewshot: expected at most 2, which is how many anatomy questions .*; got 3; lower it",
        ),
        ({"split": "validation"}, "dataset_name: .* has no validation split"),
    ],
)
def test_what_cannot_be_asked_is_refused_before_anything_is_loaded(configure, tmp_path, settings, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        evaluate_mmlu(configure(tmp_path / "run", model_name_or_path="/nowhere", **settings))
    assert not (tmp_path / "run").exists()
