"""A share of the attacks, and that they find what they look for."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from renyi_kernels import grouped_lora

from .kinds import SHARES
from .ops import attack, drawing, grouped_lora as lora
from .runs import differences
from .tally import Tally

ROOT = Path(__file__).parents[2]


def test_half_a_minute_of_attacks_finds_nothing():
    # in a process of its own: the attacks fork, which a process with threads must not do
    command = [sys.executable, "-m", "tests.torture", "--minutes", "0.5", "--seed", "0"]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stdout[-8000:] + ended.stderr[-2000:]
    for kind in SHARES:
        tries = re.search(rf"^{kind} +(\d+) ", ended.stdout, re.MULTILINE)
        assert tries
        assert int(tries[1]) > 0


def calls(number: int) -> Tally:
    tally = Tally("ops", seed=0)
    with attack.prepare(0, tally, ROOT) as call:
        for tally.number in range(number):
            call(tally.number)
    return tally


def as_if_contiguous(x):
    return x.as_strided(x.shape, x.contiguous().stride())


@pytest.mark.parametrize(
    "wrong",
    [
        lambda x, A, B, scaling, base=None, *, backend: grouped_lora(x, A, B, scaling * 1.01, base, backend=backend),
        lambda x, A, B, *others, backend: grouped_lora(x.detach(), A, B, *others, backend=backend),
        lambda x, *others, backend: grouped_lora(
            x.as_strided(x.shape, x.contiguous().stride()), *others, backend="torch"
        ),
    ],
    ids=["another scaling", "no gradient of x", "strides not looked at"],
)
def test_a_wrong_op_is_found(monkeypatch, wrong):
    monkeypatch.setattr(attack, "OPS", {"grouped_lora": lora.draw_grouped_lora})
    monkeypatch.setattr(drawing, "SHARE_OF_TRITON", 0.0)
    monkeypatch.setattr(lora, "grouped_lora", wrong)
    assert any("gradient" in what or "output" in what or "Error" in what for what in calls(40).failures)


@pytest.fixture
def two_runs(tmp_path):
    """A small run folder, and its copy."""
    run, truth = tmp_path / "run", tmp_path / "truth"
    (truth / "checkpoint-8").mkdir(parents=True)
    (truth / "checkpoint-8" / "state.json").write_text("{}")
    lines = [{"step": step, "loss_nats": 1.0 / step, "elapsed_s": 0.1 * step} for step in (1, 2, 3)]
    (truth / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    shutil.copytree(truth, run)
    return run, truth


def test_a_run_that_took_another_time_is_equal(two_runs):
    run, truth = two_runs
    (run / "metrics.jsonl").write_text(
        (run / "metrics.jsonl").read_text().replace('"elapsed_s": 0.1', '"elapsed_s": 7')
    )
    assert not list(differences(run, truth))


@pytest.mark.parametrize(
    ("change", "found"),
    [
        (lambda run: (run / "checkpoint-8" / "state.json").write_text("{ }"), "other content"),
        (lambda run: (run / "checkpoint-8" / "state.json").unlink(), "files missing"),
        (lambda run: (run / "checkpoint-7").write_text(""), "more files than undisturbed"),
        (lambda run: (run / ".tmp-x").write_text(""), "temporary files left"),
        (lambda run: (run / "metrics.jsonl").write_text('{"step": 1, "loss_nats": 1.0}\n'), "metrics of other steps"),
    ],
)
def test_what_is_not_as_undisturbed_is_named(two_runs, change, found):
    run, truth = two_runs
    change(run)
    assert [problem.partition(": ")[0] for problem in differences(run, truth)] == [found]
