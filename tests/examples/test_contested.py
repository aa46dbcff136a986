"""The demo: its data, its model cache, and a run of it from end to end on a tiny model."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

CONTESTED = Path(__file__).parents[2] / "examples" / "contested"


@pytest.fixture
def contested(monkeypatch):
    """Imports a module of the example, which is a folder of scripts and no package."""
    monkeypatch.syspath_prepend(str(CONTESTED))

    def load(name):
        for module in ("questions", "smollm2", "run"):
            monkeypatch.delitem(sys.modules, module, raising=False)
        return __import__(name)

    return load


def test_no_held_out_question_occurs_in_training_and_camps_have_their_exact_size(contested):
    questions = contested("questions")
    train, held_out = questions.make_questions(seed=3)
    assert not {q.text for q in train} & {q.text for q in held_out}
    for part in (train, held_out):
        assert len({q.text for q in part}) == len(part)
        for kind, share in {"uncontested": 1.0, "even": 0.5, "uneven": 0.8}.items():
            people = [q.answered_by_first for q in part if q.kind == kind]
            assert sum(people) == share * len(people)
            assert {q.share_of_first for q in part if q.kind == kind} == {share}
    uncontested = [q.answers[0] for q in train if q.kind == "uncontested"]
    assert {"Always.", "Never."} == set(uncontested)


def test_the_questions_depend_on_the_seed_alone(contested):
    questions = contested("questions")
    assert questions.make_questions(seed=1) == questions.make_questions(seed=1)
    assert questions.make_questions(seed=1) != questions.make_questions(seed=2)


def test_a_damaged_model_in_the_cache_is_not_used(contested, tmp_path):
    smollm2 = contested("smollm2")
    folder = tmp_path / "SmolLM2-135M-Instruct"
    folder.mkdir()
    (folder / smollm2.WEIGHTS).write_bytes(b"weights")
    (folder / smollm2.CHECKSUM).write_text(smollm2.files.sha256_of(folder / smollm2.WEIGHTS) + "\n")
    assert smollm2.obtain(tmp_path) == folder
    (folder / smollm2.WEIGHTS).write_bytes(b"weighty")
    with pytest.raises(ValueError, match="damaged"):
        smollm2.obtain(tmp_path)


def test_auroc_is_the_chance_that_a_contested_question_has_more_spread(contested):
    run = contested("run")

    def answers(spreads):
        return run.Answers(
            0.0, 0.0, torch.tensor([[0.5 + s for s in spreads], [0.5 - s for s in spreads]]), torch.tensor([0.5, 0.5])
        )

    of = {"even": answers([0.3]), "uneven": answers([0.1, 0.2]), "uncontested": answers([0.1, 0.15])}
    # 0.3 and 0.2 beat both, 0.1 ties with one and loses to the other
    assert run.auroc(of) == pytest.approx((2 + 2 + 0.5) / 6)


def test_the_demo_prints_its_table_and_writes_one_report_of_both_runs(
    contested, tokenizer, tmp_path, monkeypatch, capsys
):
    model = tmp_path / "model"
    sizes = {
        "hidden_size": 8,
        "intermediate_size": 8,
        "num_hidden_layers": 30,
        "max_position_embeddings": 128,
        "num_attention_heads": 1,
    }
    LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **sizes)).save_pretrained(model)
    tokenizer.save_pretrained(model)
    run = contested("run")
    monkeypatch.setattr(run.smollm2, "obtain", lambda: model)
    output = tmp_path / "out"
    monkeypatch.setattr(sys, "argv", ["run.py", "--output_dir", str(output), "--max_steps", "2"])
    run.main()
    printed = capsys.readouterr().out
    for kind in ("uncontested", "even", "uneven"):
        assert printed.count(f"│ {kind} ") == 2
    page = (output / "report.html").read_text()
    assert "coupled" in page
    assert "uncoupled" in page
    assert (output / "coupled" / "particles" / "p003").is_dir()
    halves = [(output / "halves" / f"{half}.jsonl").read_text().splitlines() for half in ("contested", "uncontested")]
    assert sorted(halves[0] + halves[1]) == sorted((output / "data" / "train.jsonl").read_text().splitlines())
    assert [len(half) for half in halves] == [80, 40]
    assert all('"uncontested"' in line for line in halves[1])
    assert {path.name for path in output.iterdir()} == run.MADE_HERE


def test_the_demo_removes_nothing_but_what_it_made(contested, tmp_path):
    run = contested("run")
    for name in (*run.MADE_HERE, "thesis.tex"):
        (tmp_path / name).touch()
    with pytest.raises(SystemExit, match=r"holds thesis\.tex, which this script did not make"):
        run.clear(tmp_path)
    assert len(list(tmp_path.iterdir())) == len(run.MADE_HERE) + 1
    (tmp_path / "thesis.tex").unlink()
    run.clear(tmp_path)
    assert not tmp_path.exists()
