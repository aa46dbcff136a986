"""The command for a GPU machine: what comes first, what is refused, and how it goes on after a row that breaks."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from csrc_bench import (
    bench_generate,
    bench_grouped_lora,
    bench_linear_logprob,
    bench_lora_linears,
    bench_ragged_step,
    bench_training_step,
    gpu,
    on_gpu,
    order,
    step_suite,
)

FILES = [bench_training_step, bench_ragged_step, bench_linear_logprob, bench_lora_linears, bench_grouped_lora]
FILES += [bench_generate]


@pytest.fixture
def session(tmp_path):
    return on_gpu.Session(tmp_path, seconds=100, tiny=True)


@pytest.fixture
def nvidia_smi(tmp_path, monkeypatch):
    """nvidia_smi(lines) lets nvidia-smi print these."""

    def say(*lines):
        script = tmp_path / "nvidia-smi"
        script.write_text("#!/bin/sh\n" + "".join(f"echo '{line}'\n" for line in lines))
        script.chmod(0o755)
        monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")

    return say


def test_processes_beside_our_own_are_found_in_what_nvidia_smi_says(nvidia_smi):
    nvidia_smi()
    assert gpu.others(mine=0) == gpu.others(mine=1) == []
    stranger, ours = "999999999, python", f"{os.getpid()}, python"
    nvidia_smi(stranger)
    assert gpu.others(mine=0) == [stranger]
    assert gpu.others(mine=1) == []  # it may be ours: who knows what our number is there
    nvidia_smi(stranger, ours)
    assert gpu.others(mine=1) == [stranger]
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    nvidia_smi(ours, f"{child.pid}, python")
    assert gpu.others(mine=1) == []
    child.communicate()


def test_a_machine_without_nvidia_smi_has_nobody_else(monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert gpu.others(mine=0) == []


def test_others_may_end_while_it_waits(monkeypatch):
    answers = [["1, a"], ["1, a"], []]
    monkeypatch.setattr(gpu, "others", lambda mine: answers.pop(0))
    monkeypatch.setattr(gpu, "SECONDS", 0)
    assert gpu.others_after_waiting(mine=0) == []


def test_nothing_is_timed_beside_another_process_and_the_summary_says_so(session, monkeypatch):
    monkeypatch.setattr(gpu, "others_after_waiting", lambda mine: ["4217, python"])
    monkeypatch.setattr(on_gpu, "run", lambda *_: pytest.fail("something was timed"))
    session.rows("rows", [])
    session.script("profile", "module", "profile.txt")
    summary = (session.out / "summary.txt").read_text()
    assert summary.count("refused, because another process uses the GPU (4217, python)") == 2


def test_it_goes_on_in_a_new_process_after_a_row_that_broke_one(session, monkeypatch):
    row = {"op": "a", "shape": {}, "shape_name": "b", "direction": "c", "dtype": "d", "kind": "ours"}
    left = [
        [row | {"variant": "hangs", "status": "wrong: its process ended, or was ended"}],
        [row | {"variant": "faults", "status": "wrong: AcceleratorError: CUDA error: an illegal memory access"}],
        [row | {"variant": "late", "status": "missing: out of time"}],
    ]
    written = []

    def run(command, log, seconds):
        written.extend(left.pop(0))
        session.results.write_text(json.dumps({"benchmarks": [], "not_timed": written}))
        return "exit code 3"

    monkeypatch.setattr(gpu, "others_after_waiting", lambda mine: [])
    monkeypatch.setattr(on_gpu, "run", run)
    session.rows("rows", [])
    assert not left
    summary = (session.out / "summary.txt").read_text()
    assert "1 rows are missing" in summary.split("\n\n")[1]
    assert "late" in summary.split("\n\n")[1]


def test_each_pattern_of_what_comes_first_names_rows_of_a_gpu_and_tiny_ones(monkeypatch):
    monkeypatch.setattr(step_suite, "device_type", lambda: "cuda")
    names = {
        tiny: [f"{p.suite.op} {p}" for file in FILES for p in file.SUITE.points("cuda", tiny)] for tiny in (True, False)
    }
    assert {order.place(name) for name in names[False]} == set(range(len(order.FIRST) + 1))
    assert len({order.place(name) for name in names[True]}) >= 5


def test_the_whole_step_comes_before_its_parts_and_what_is_compared_stands_together():
    step, op = "training_step bar_qwen2_all-step-{}", "lora_linears bar_qwen2_qkv-{}-ours"
    ways = ("ours", "ours_captured", "gemms", "frozen_base", "peft_bf16")
    assert {order.place(step.format(way)) for way in ways} == {0}
    compiled = {order.place(step.format(f"ours_{way}")) for way in ("compiled", "captured_compiled")}
    assert len(compiled) == 1
    assert 0 < compiled.pop() < order.place(op.format("both"))  # compiling takes long
    assert order.place(step.format("vmap")) == len(order.FIRST)
    assert 0 < order.place(op.format("graph")) == order.place(op.format("both")) < order.place(op.format("backward"))
