"""Results side by side, with ratios to naive, to the best peer and to the floor.

python -m csrc_bench.compare FILE...            every row
python -m csrc_bench.compare --readme FILE...   the main shapes only, as a Markdown table
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

Row = dict[str, Any]


def load(paths: Iterable[Path]) -> list[Row]:
    """The rows of result files, timed or not. If a row was measured twice, the last one counts."""
    rows = {}
    for path in paths:
        results = json.loads(Path(path).read_text())
        machine = results.get("machine_info", {})
        common = {"device": machine.get("device", "unknown device"), "threads": machine.get("threads")}
        timed = [benchmark["extra_info"] for benchmark in results["benchmarks"]]
        for row in timed + results.get("not_timed", []):
            key = (*common.values(), row["op"], row["shape_name"], row["direction"], row["variant"])
            rows[key] = common | row
    return list(rows.values())


def groups(rows: Iterable[Row]) -> dict[tuple, list[Row]]:
    """The rows that did the same work, by device, threads, op, shape, dtype and direction."""
    found: dict[tuple, list[Row]] = {}
    for row in rows:
        key = (row["device"], row["threads"], row["op"], row["shape_name"], row["dtype"], row["direction"])
        found.setdefault(key, []).append(row)
    return found


def best(rows: Iterable[Row], kind: str) -> Row | None:
    """The fastest row of a kind. Of floors the slowest, because no variant can get below any floor."""
    rows = [row for row in rows if row["status"] == "ok" and row["kind"] == kind]
    choose = max if kind == "floor" else min
    return choose(rows, key=lambda row: row["median_ms"], default=None)


def ratios(rows: list[Row]) -> list[Row]:
    """The rows, the fastest first, each with its ratios: speed-up over naive and best peer, time over the floor."""
    ends = {kind: best(rows, kind) for kind in ("naive", "peer", "floor")}
    ranked = []
    for row in rows:
        ratio = dict.fromkeys(ends)
        if row["status"] == "ok":
            for kind, end in ends.items():
                if end is not None:
                    mine, other = row["median_ms"], end["median_ms"]
                    ratio[kind] = mine / other if kind == "floor" else other / mine
        ranked.append(row | {"ratio": ratio})
    return sorted(ranked, key=lambda row: (row["status"] != "ok", row.get("median_ms", 0.0)))


# text


def number(value: float | None, unit: str = "") -> str:
    if value is None:
        return "-"
    digits = 3 if abs(value) < 1 else 2 if abs(value) < 100 else 0
    return f"{value:.{digits}f}{unit}"


def table(lines: list[list[str]]) -> str:
    """Aligned columns: the first one to the left, the others to the right."""
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    aligned = [[line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])] for line in lines]
    return "\n".join("  ".join(cells).rstrip() for cells in aligned)


def text(rows: list[Row]) -> str:
    """Every group: timed rows from fast to slow, then the rows that were not timed, with the reason. Missing rows are
    left out."""
    head = ["variant", "kind", "path", "median ms", "p20", "p80", "peak MiB", "x naive", "x best peer", "floor x"]
    parts = []
    for (device, threads, op, shape_name, dtype, direction), group in groups(rows).items():
        sizes = " ".join(f"{name}={value}" for name, value in group[0]["shape"].items())
        lines, reasons = [[*head, *(["tokens/s"] if direction == "tokens" else [])]], []
        for row in ratios(group):
            if row["status"].startswith("missing: "):
                continue
            if row["status"] != "ok":
                reasons.append(f"{row['variant']} ({row['kind']})  {row['status']}")
                continue
            ratio = row["ratio"]
            cells = [row["variant"], row["kind"], row["path"] or "-"]
            cells += [number(row[name]) for name in ("median_ms", "p20_ms", "p80_ms", "peak_mib")]
            cells += [number(ratio[kind]) for kind in ("naive", "peer", "floor")]
            rate = [number(1e3 * row["shape"]["tokens"] / row["median_ms"])] if direction == "tokens" else []
            lines.append(cells + rate)
        if not reasons and len(lines) == 1:
            continue
        title = f"{op} {shape_name} {direction}: {sizes} {dtype}, {device}, {threads} threads"
        parts.append("\n".join([title, *([table(lines)] if len(lines) > 1 else []), *reasons]))
    legend = "x naive, x best peer: how many times faster than those; floor x: how many times the floor's time"
    return "\n\n".join([*parts, legend]) + "\n"


def missing(rows: list[Row]) -> list[str]:
    """A paragraph that names the rows that were not measured, if there are any."""
    names: dict[str, list[str]] = {}
    for row in rows:
        if row["status"].startswith("missing: "):
            reason = row["status"].removeprefix("missing: ")
            names.setdefault(f"{row['op']} {row['shape_name']} {row['direction']}, {reason}", []).append(row["variant"])
    if not names:
        return []
    head = f"{sum(map(len, names.values()))} rows are missing; the same command again measures them:"
    return ["\n".join([head, *(f"{name}: {', '.join(variants)}" for name, variants in names.items())])]


def readme(rows: list[Row]) -> str:
    """The main shapes, forward and backward together: our fastest path beside naive, the best peer and the floor."""
    head = "| device | what | ours, ms | naive | best peer | floor | peak MiB, ours / naive |"
    lines = [head, "|---" * (head.count("|") - 1) + "|"]
    for (device, threads, op, shape_name, dtype, direction), group in groups(rows).items():
        ours = best(group, "ours")
        if not shape_name.startswith("bar") or direction not in ("both", "step", "tokens") or ours is None:
            continue
        cells = [f"{device}, {threads} threads", f"{op} {shape_name.removeprefix('bar_')}, {dtype}"]
        way = [] if ours["variant"] == "ours" else [ours["variant"]]
        cells.append(f"**{number(ours['median_ms'])}** ({', '.join([*way, ours['path']])})")
        ratio = next(row["ratio"] for row in ratios(group) if row["variant"] == ours["variant"])
        for kind in ("naive", "peer", "floor"):
            end = best(group, kind)
            factor = f"ours takes {number(ratio[kind], 'x')}" if kind == "floor" else f"{number(ratio[kind], 'x')} ours"
            name = "" if kind == "naive" else f" {end['variant']}" if end else ""
            cells.append(f"{number(end['median_ms'])}{name}, {factor}" if end else "-")
        naive = best(group, "naive")
        cells.append(f"{number(ours['peak_mib'])} / {number(naive['peak_mib']) if naive else '-'}")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m csrc_bench.compare", description="Benchmark results side by side.")
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE", help="JSON of pytest-benchmark or of --results")
    parser.add_argument("--readme", action="store_true", help="the main shapes only, as a Markdown table")
    options = parser.parse_args(arguments)
    rows = load(options.files)
    print(readme(rows) if options.readme else "\n\n".join([*missing(rows), text(rows)]), end="")


if __name__ == "__main__":
    main()
