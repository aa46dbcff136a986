"""The table: ratios are right, and what was not timed is shown and never ranked."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from csrc_bench import compare

ROOT = Path(__file__).parents[2]


def row(variant, kind, median_ms=None, status="ok", **changes):
    made = {
        "op": "renyi_loss",
        "shape": {"K": 8, "V": 49152},
        "shape_name": "bar_smollm2",
        "dtype": "bfloat16",
        "direction": "both",
        "variant": variant,
        "kind": kind,
        "path": "torch" if kind == "ours" else None,
        "status": status,
    }
    if median_ms is not None:
        made |= {"median_ms": median_ms, "p20_ms": median_ms - 1, "p80_ms": median_ms + 1, "peak_mib": 7.0}
    return made | changes


ROWS = [
    row("naive", "naive", 90.0),
    row("ours", "ours", 30.0),
    row("compile", "peer", 60.0),
    row("baddbmm_", "peer", 45.0),
    row("copy", "floor", 10.0),
    row("gemms", "floor", 20.0),
    row("everywhere", "other", 1.0),
]
UNTIMED = [row("liger", "peer", status="skipped: not installed"), row("vmap", "peer", status="wrong: output 0 is off")]


@pytest.fixture
def results(tmp_path):
    def write(timed=ROWS, untimed=UNTIMED, name="results.json", device="a device"):
        path = tmp_path / name
        content = {
            "machine_info": {"device": device, "threads": 2},
            "benchmarks": [{"extra_info": r} for r in timed],
            "not_timed": untimed,
        }
        path.write_text(json.dumps(content))
        return path

    return write


def ratios_of(path):
    (group,) = compare.groups(compare.load([path])).values()
    return {r["variant"]: r["ratio"] for r in compare.ratios(group)}


def test_ratios_are_to_naive_to_the_best_peer_and_to_the_highest_floor(results):
    ratios = ratios_of(results())
    assert ratios["ours"] == {"naive": 3.0, "peer": 1.5, "floor": 1.5}
    assert ratios["naive"] == {"naive": 1.0, "peer": 0.5, "floor": 4.5}
    assert ratios["baddbmm_"]["peer"] == 1.0
    assert ratios["gemms"]["floor"] == 1.0


def test_wrong_and_skipped_rows_are_shown_with_the_reason_and_never_ranked(results):
    # a time that a wrong row should not have must not make it the best
    wrong = row("vmap", "peer", 0.5, status="wrong: output 0 is off")
    path = results(untimed=[UNTIMED[0], wrong])
    ratios = ratios_of(path)
    assert ratios["ours"]["peer"] == 1.5
    assert ratios["vmap"] == ratios["liger"] == {"naive": None, "peer": None, "floor": None}
    lines = compare.text(compare.load([path])).splitlines()
    assert "vmap (peer)  wrong: output 0 is off" in lines
    assert "liger (peer)  skipped: not installed" in lines


def test_other_work_is_shown_and_is_nobodys_peer(results):
    path = results()
    assert ratios_of(path)["ours"]["peer"] == 1.5
    assert any(line.startswith("everywhere") for line in compare.text(compare.load([path])).splitlines())


def test_the_table_goes_from_fast_to_slow_under_a_title_with_sizes_and_device(results):
    title, head, *lines = compare.text(compare.load([results()])).split("\n\n")[0].splitlines()
    assert title == "renyi_loss bar_smollm2 both: K=8 V=49152 bfloat16, a device, 2 threads"
    assert head.split()[:3] == ["variant", "kind", "path"]
    assert [line.split()[0] for line in lines[:3]] == ["everywhere", "copy", "gemms"]
    assert lines[3].split() == ["ours", "ours", "torch", "30.00", "29.00", "31.00", "7.00", "3.00", "1.50", "1.50"]


def test_a_group_of_nothing_but_reasons_has_no_table(results):
    text = compare.text(compare.load([results(timed=[])]))
    assert "median" not in text
    assert "skipped: not installed" in text


def test_missing_rows_are_named_apart_from_the_tables(results, capsys):
    late = row("liger", "peer", status="missing: out of time")
    never = row("ours", "ours", status="missing: not measured yet", shape_name="k4")
    compare.main([str(results(untimed=[late, late | {"variant": "vmap"}, never]))])
    text = capsys.readouterr().out
    assert text.splitlines()[:3] == [
        "3 rows are missing; the same command again measures them:",
        "renyi_loss bar_smollm2 both, out of time: liger, vmap",
        "renyi_loss k4 both, not measured yet: ours",
    ]
    assert text.count("liger") == text.count("k4") == 1


def test_tokens_a_second_are_those_of_all_continuations(results):
    drawn = {"op": "generate", "direction": "tokens", "shape": {"K": 8, "tokens": 600}}
    text = compare.text(compare.load([results([row("ours", "ours", 30.0, **drawn)], [])]))
    head, line = text.splitlines()[1:3]
    assert head.endswith("tokens/s")
    assert line.split()[-1] == "20000"


def test_rows_of_several_files_meet_by_device_and_the_last_one_counts(results):
    first = results()
    again = results([row("ours", "ours", 15.0)], [], name="again.json")
    elsewhere = results([row("ours", "ours", 1.0)], [], name="elsewhere.json", device="another")
    rows = compare.load([first, again, elsewhere])
    assert len(compare.groups(rows)) == 2
    assert [r["median_ms"] for r in rows if r["variant"] == "ours"] == [15.0, 1.0]


def test_the_readmes_table_holds_the_bars_forward_and_backward_together(results, capsys):
    sweep = row("ours", "ours", 5.0, shape_name="k4")
    forward = row("ours", "ours", 5.0, direction="forward")
    compare.main(["--readme", str(results([*ROWS, sweep, forward]))])
    head, rule, *lines = capsys.readouterr().out.splitlines()
    assert head.count("|") == rule.count("|")
    assert lines == [
        "| a device, 2 threads | renyi_loss smollm2, bfloat16 | **30.00** (torch) | 90.00, 3.00x ours "
        "| 45.00 baddbmm_, 1.50x ours | 20.00 gemms, ours takes 1.50x | 7.00 / 7.00 |"
    ]


def test_the_readmes_table_names_the_fastest_of_our_ways(results, capsys):
    step = [row(name, "ours", ms, direction="step") for name, ms in (("ours", 9.0), ("ours_captured", 2.0))]
    compare.main(["--readme", str(results(step, []))])
    assert "**2.00** (ours_captured, torch)" in capsys.readouterr().out


def test_the_table_in_the_docs_is_made_of_the_results_that_lie_in_the_project():
    files = sorted((ROOT / "csrc_bench" / "results").glob("*.json"))
    assert files
    assert compare.readme(compare.load(files)) in (ROOT / "docs" / "speed.md").read_text()
