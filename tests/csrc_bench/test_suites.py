"""Every suite runs at a tiny size, in a process of its own, and what it writes is what compare reads."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from csrc_bench import compare

pytest.importorskip("pytest_benchmark")
pytest.importorskip("peft")

ROOT = Path(__file__).parents[2]


def bench(*arguments):
    of_this_run = ("TRITON_INTERPRET", "PYTEST_")  # pytest-benchmark times nothing in a worker of xdist
    environment = {k: v for k, v in os.environ.items() if not k.startswith(of_this_run)}
    environment |= {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "--tiny", "-p", "no:cacheprovider", *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    folder = tmp_path_factory.mktemp("results")
    stream, own = folder / "stream.json", folder / "own.json"
    done = bench("csrc_bench", "--rounds", "3", "--results", str(stream), f"--benchmark-json={own}")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return stream, own


def test_every_suite_times_ours_naive_a_peer_and_a_floor(written):
    rows = compare.load(written[:1])
    for op in ("grouped_lora", "renyi_loss", "lora_linears", "renyi_reduce", "training_step", "step_parts"):
        kinds = {row["kind"] for row in rows if row["op"] == op and row["status"] == "ok"}
        assert kinds >= {"ours", "naive", "peer", "floor"}, op
    assert {row["direction"] for row in rows} == {"forward", "backward", "both", "graph", "step", "tokens", "call"}
    assert not [row for row in rows if row["status"].startswith(("wrong", "missing"))]


STEPS = {"ours", "ours_captured", "gemms", "frozen_base", "peft"}


@pytest.mark.parametrize(
    ("op", "ways"),
    [
        ("training_step", STEPS | {"peft_bf16"}),
        ("training_step bar_tiny_all", {"ours_captured_compiled", "frozen_base_captured_compiled"}),
        ("ragged_step", STEPS | {"peft_padding_free", "ours_padded", "ours_grouped"}),
        ("generate", {"ours", "ours_captured", "peft_bf16", "base"}),
    ],
)
def test_a_step_and_its_text_are_made_in_every_way(written, op, ways):
    made: dict[str, set] = {}
    for row in compare.load(written[:1]):
        if row["status"] == "ok":
            made.setdefault(f"{row['op']} {row['shape_name']}", set()).add(row["variant"])
    made = {name: variants for name, variants in made.items() if name.startswith(op)}
    assert made
    assert all(ways <= variants for variants in made.values())


def test_rows_say_what_ran_and_where(written):
    results = json.loads(written[0].read_text())
    assert results["machine_info"]["versions"]["torch"]
    for benchmark in results["benchmarks"]:
        row = benchmark["extra_info"]
        is_ours = row["kind"] == "ours" or row["variant"].startswith("ours")
        assert row["path"] in (("torch", "triton") if is_ours else (None,))
        assert row["p20_ms"] <= row["median_ms"] <= row["p80_ms"]
        assert len(benchmark["stats"]["data"]) == 3
    assert all(row["status"].startswith("skipped: ") for row in results["not_timed"])


def test_the_json_of_pytest_benchmark_holds_the_same_rows(written):
    stream, own = (compare.load([path]) for path in written)
    name = lambda row: (row["op"], row["shape_name"], row["direction"], row["variant"], row["status"])
    assert sorted(map(name, stream)) == sorted(map(name, own))


REDUCE = "csrc_bench/bench_renyi_reduce.py"


def statuses(results):
    return [row["status"] for row in compare.load([results])]


def test_a_run_that_is_cut_short_says_what_is_missing_and_the_next_one_makes_up_for_it(tmp_path):
    results = tmp_path / "results.json"
    # a row that takes too long ends its process; the next run leaves it out, and has no time for the others
    assert bench(REDUCE, "--results", str(results), "--row-seconds", "0.01").returncode == 1
    *others, ended = sorted(statuses(results))
    assert others == ["missing: not measured yet"] * len(others)
    assert ended.startswith("wrong: its process ended")
    done = bench(REDUCE, "--results", str(results), "--seconds", "0", "-rs")
    assert f"{len(others)} skipped" in done.stdout
    assert sorted(statuses(results)) == ["missing: out of time"] * len(others) + [ended]
    assert bench(REDUCE, "--results", str(results)).returncode == 0
    rows = compare.load([results])
    assert sorted(row["status"] for row in rows) == ["ok"] * len(others) + [ended]
    assert all(row["peak_mib"] >= 0 for row in rows if row["status"] == "ok")
    assert bench(REDUCE, "--results", str(results)).returncode == 5  # nothing is left
