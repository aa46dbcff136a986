"""What an evaluation of refusals shows: rates, as text and on a page, and the prompts that particles disagree about.

Layout: K particles, G splits.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from textwrap import shorten
from typing import Any

import numpy as np

from renyi_engine.core import one_line
from renyi_engine.evaluation.refusal.results import Results
from renyi_engine.reports import Picture, Section, Table, as_text, charts, glossary, page_title, write_page

NUM_SHOWN = 20
"""Prompts in the table of most disagreement."""
MAX_PROMPT_CHARACTERS = 300
DASH = "–"
ESTIMATES = {
    "refusal rate": ("refusal_rate", 3),
    "variance over particles": ("variance_over_particles", 5),
    "variance within prompts": ("variance_within_prompts", 5),
    "disagreement": ("disagreement", 5),
}
COUNTS = {
    "answers": "num_direct_answer",
    "direct refusals": "num_direct_refusal",
    "indirect refusals": "num_indirect_refusal",
    "unparsed": "num_unparsed",
    "failed": "num_failed",
}
WORDS = (
    ("Refusal", "A response that does not do what was asked. It is direct if it says so, and indirect if it evades."),
    (
        "Refusal rate",
        "Which fraction of the judged responses to a prompt are refusals, averaged over prompts. 0: never; 1: always. "
        "That of the ensemble is the mean over its particles, each counted by its weight.",
    ),
    ("±", "Standard error over prompts (jackknife): how far the number may move with other prompts of the same kind."),
)
ENSEMBLE_WORDS = (
    (
        "Variance over particles",
        "Sample variance of the particles' refusal rates on a split: half the squared difference of two particles, on "
        "average. With equal weights it has the divisor K - 1. 0: all alike.",
    ),
    (
        "Variance within prompts",
        "Sample variance of the particles' refusal rates on one prompt, averaged over prompts, as drawn. It is above 0 "
        "also where particles refuse equally many prompts, but not the same ones.",
    ),
    (
        "Disagreement",
        "Variance within prompts, less what chance alone is expected to add when only a few responses are drawn. 0: "
        "the particles are alike; below 0 only by chance. With one response to a prompt the two cannot be told apart, "
        "and nothing is taken off.",
    ),
)
VERDICT_WORDS = (
    (
        "Unparsed, failed",
        "The judge gave no label that could be read, or no answer at all. A response that was cut off inside a thought "
        "is unparsed too; a larger max_new_tokens helps. Both are counted, and are part of no rate.",
    ),
)


def write_refusal_report(output: Path, results: Results, facts: Mapping[str, Any]) -> str:
    """Write the page; returns the tables of rates as plain text.

    Args:
        facts: judge, settings and versions, to be shown with it.
    """
    summary = results.summary
    tables = [_rates(summary), _verdicts(summary), *([_areas(summary)] if summary["auroc"] else [])]
    text = (
        "Each bar and each row says how often somebody refuses the prompts of a split. Prompts that are harmless "
        "should be answered (near 0), prompts that ask for harm should be refused (near 1). If the particles' bars "
        "differ by more than their error bars, the particles learnt different habits."
    )
    sections = [Section("How often it refuses", text, tables[:1], _bars(summary))]
    if not sections[0].pictures:
        sections[0] = replace(sections[0], text=f"{text} There is no picture: on no split has everybody a rate.")
    if summary["num_particles"] > 1:
        text = (
            "Prompts that some particles refuse and others answer. There the ensemble does not know what it should do, "
            f"and a person should look. The number is the {summary['disagreement_measure']}."
        )
        sections.append(Section("Where the particles disagree", text, [_prompts(results)], _scatter(results)))
    if summary["auroc"]:
        sections.append(Section("What it can tell apart", _areas_text(summary), tables[2:]))
    sections.append(
        Section("What the judge said", f"The responses by their verdict; the judge is {facts['judge']}.", tables[1:2])
    )
    K, settings = summary["num_particles"], facts["settings"]
    lead = (
        f"{len(results.prompts):,} prompts, and {summary['num_samples']} responses to each by the frozen base"
        f"{f' and by each of {K} particles' if K else ''}. The judge ({facts['judge']}) said of each response whether "
        f"it is a refusal. What it could not label is part of no rate. {glossary.unequal(summary['particle_weights'])}"
    ).strip()
    write_page(
        output,
        title=page_title(output.parent, "eval refusal", str(settings.get("model_name_or_path", "an unknown model"))),
        lead=lead,
        found=_found(summary),
        sections=sections,
        words=[
            *((glossary.PARTICLE, glossary.BASE) if K else (glossary.BASE,)),
            *WORDS,
            *(ENSEMBLE_WORDS if K else ()),
            *VERDICT_WORDS,
        ],
        details={"settings": settings, "versions": facts["versions"]},
    )
    return "\n".join(map(as_text, tables))


def _found(summary: Mapping[str, Any]) -> str:
    """The answer in words."""
    said = []
    for name, split in summary["splits"].items():
        who = {"the base": split["base"], "the ensemble": split["ensemble"]}
        rates = [f"{w} refuses {_percent(row['refusal_rate'])}" for w, row in who.items() if row]
        said.append(f"in the split {name}, {' and '.join(rates)} of the prompts")
    return f"Found: {'; '.join(said)}."


def _percent(rate: float | None) -> str:
    return "an unknown part" if rate is None else f"{100 * rate:.1f} %"


def _rates(summary: Mapping[str, Any]) -> Table:
    rows = [
        [split, who, *(_estimate(row, key, digits) for key, digits in ESTIMATES.values())]
        for split, who, row in _speakers(summary)
    ]
    return Table("", ["split", "who", *ESTIMATES], rows)


def _verdicts(summary: Mapping[str, Any]) -> Table:
    rows = [
        [split, who, f"{summary['splits'][split]['num_prompts']:,}", *(f"{row[key]:,}" for key in COUNTS.values())]
        for split, who, row in _speakers(summary)
    ]
    return Table("", ["split", "who", "prompts", *COUNTS], rows)


def _speakers(summary: Mapping[str, Any]) -> list[tuple[str, str, Mapping[str, Any]]]:
    """(split, who, row): of each split the base, the ensemble if there is one, and each particle."""
    found = []
    for name, split in summary["splits"].items():
        found.append((name, "base", split["base"]))
        if split["ensemble"]:
            found.append((name, "ensemble", split["ensemble"]))
        found += [(name, f"particle {k}", row) for k, row in enumerate(split["particles"])]
    return found


def _areas(summary: Mapping[str, Any]) -> Table:
    found = summary["auroc"]
    rows = [[name, _fixed(area, 3)] for name, area in found["scores"].items()]
    return Table("", ["score of a prompt", f"AUROC of {found['label_column']} = {found['positive']}"], rows)


def _areas_text(summary: Mapping[str, Any]) -> str:
    found = summary["auroc"]
    return (
        f"How probable it is that a prompt whose {found['label_column']} is {found['positive']} has a higher score "
        "than a prompt whose label is the other one. 1: the score tells the two apart. 0.5: it is chance. Below "
        f"0.5: the score is lower where {found['label_column']} is {found['positive']}."
    )


def _prompts(results: Results) -> Table:
    found = [row for row in results.prompts if row["disagreement"] is not None and row["disagreement"] > 0]
    found = sorted(found, key=lambda row: (-row["disagreement"], row["prompt_id"]))
    # particles of weight 0 take no part in the disagreement, and may have no rate
    counted = [k for k, weight in enumerate(results.summary["particle_weights"]) if weight > 0]
    rows = []
    for row in found[:NUM_SHOWN]:
        particles = row["particle_refusal_rates"]
        least, most = min(counted, key=particles.__getitem__), max(counted, key=particles.__getitem__)
        texts = [row["split"], row["category"] or DASH, shorten(row["prompt"], MAX_PROMPT_CHARACTERS, placeholder=" …")]
        numbers = [_fixed(row[f"{who}_refusal_rate"], 2) for who in ("base", "ensemble")]
        extremes = [f"{particles[k]:.2f} ({k})" for k in (least, most)]
        rows.append([*texts, *numbers, *extremes, _fixed(row["disagreement"], 3)])
    header = ["split", "category", "prompt", "base", "ensemble", "least (particle)", "most (particle)", "disagreement"]
    note = f"{len(rows)} of {len(results.prompts):,} prompts, with their refusal rates; all are in prompts.jsonl."
    empty = "There is none: on no prompt do the particles differ by more than chance alone would make them."
    if all(row["disagreement"] is None for row in results.prompts):
        empty = "There is none: on no prompt has the judge labelled a response of every particle."
    return Table("", header, rows, note if rows else "", empty)


def _bars(summary: Mapping[str, Any]) -> list[Picture]:
    """None of a split where somebody has no rate."""
    columns = {}
    for name, split in summary["splits"].items():
        rows = [split["base"], *([split["ensemble"]] if split["ensemble"] else []), *split["particles"]]
        if all(row["refusal_rate"] is not None for row in rows):
            columns[name] = [(row["refusal_rate"], row["refusal_rate_se"] or 0.0) for row in rows]
    if not columns:
        return []
    values, errors = np.array(list(columns.values())).transpose(2, 1, 0)
    return [
        charts.bars(
            "refusal-rates",
            [one_line(name) for name in columns],
            values,
            errors,
            rows=["base", "ensemble"][: 2 if summary["num_particles"] else 1],
            ylabel="refusal rate",
            caption="Refusal rate of each split, with one standard error over prompts to either side.",
        )
    ]


def _scatter(results: Results) -> list[Picture]:
    known = [row for row in results.prompts if row["disagreement"] is not None]
    if not known:
        return []
    kind = "split" if len(results.summary["splits"]) > 1 or not results.summary["auroc"] else "label"
    return [
        charts.scatter(
            "disagreement",
            [row["ensemble_refusal_rate"] for row in known],
            [row["disagreement"] for row in known],
            [row[kind] for row in known],
            xlabel="refusal rate of the ensemble",
            ylabel="disagreement of the particles",
            caption="How much the particles disagree about each prompt, over how often the ensemble refuses it. A low "
            "mark in the middle: every particle refuses sometimes, as if it tossed a coin. A high mark in the middle: "
            "some particles refuse and the others answer.",
        )
    ]


def _estimate(row: Mapping[str, Any], key: str, digits: int) -> str:
    if row.get(key) is None:
        return DASH
    error = row[f"{key}_se"]
    return _fixed(row[key], digits) + ("" if error is None else f" ± {_fixed(error, digits)}")


def _fixed(value: float | None, digits: int) -> str:
    return DASH if value is None else f"{value:.{digits}f}"
