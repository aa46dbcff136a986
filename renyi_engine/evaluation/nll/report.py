"""The page of eval nll: which examples are disputed, which of them no particle explains, and where all stand."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from renyi_engine.evaluation.config import NllConfig
from renyi_engine.evaluation.nll.diagnosis import CONTESTED, FLAGGED_BY, NLLS, OUT_OF_SUPPORT, Diagnosis
from renyi_engine.reports import Picture, Section, Table, glossary, page_title, scatter, write_page

SHOWN = 25
"""Examples of each kind on the page; examples.csv has all."""
HEADER = (
    "row", "example", "disagreement", "gain", "ESS", "entropy", "best particle", "its NLL", "mixture's NLL",
    "base's NLL",
)  # fmt: skip


def write_nll_report(
    output: Path,
    config: NllConfig,
    table: Sequence[Diagnosis],
    kinds: Mapping[str, Sequence[Diagnosis]],
    results: Mapping[str, Any],
) -> Path:
    """Write the page; returns `output`.

    Args:
        table: one diagnosis for every example. kinds: those with each flag. results: what results.json holds.
    """
    weights: list[float] = results["particle_weights"]
    N, contested, foreign = len(table), len(kinds[CONTESTED]), len(kinds[OUT_OF_SUPPORT])
    lead = (
        f"{len(weights)} particles ({config.ensemble}) and the base have read {N:,} examples of "
        f"{config.dataset_name}. This page asks of each example whether the particles agree about it, and whether any "
        f"of them has learnt it. {glossary.unequal(weights)}"
    ).strip()
    found = (
        f"Found: {contested:,} disputed by the particles, {foreign:,} unlike anything that they learnt, "
        f"{N - contested - foreign:,} neither."
    )
    sections = [
        Section(
            "Where the examples stand",
            "Each mark is an example. High up, the particles learnt different things: the data contradict each other "
            "there. To the left of the upright line, every particle gains too "
            "little over the base: the particles learnt nothing like that example. At the bottom right is what all of "
            "them learnt; in a clean data set most examples are there.",
            pictures=[_picture(config, table, results["min_gain_nats_per_token"])],
        ),
        Section(
            "Examples to look at",
            "A flag is a reason to look at an example, not a verdict on it. What the particles were scored on stands "
            "in [[ ]]; the text before it is the prompt. Gains and NLLs are in nats a token.",
            tables=_tables(config, kinds, results["min_gain_nats_per_token"]),
        ),
    ]
    return write_page(
        output,
        title=page_title(output.parent, "eval nll", config.model_name_or_path),
        lead=lead,
        found=found,
        sections=sections,
        words=_words(len(weights)),
        details={"settings": asdict(config), "results": results},
    )


def _picture(config: NllConfig, table: Sequence[Diagnosis], min_gain: float) -> Picture:
    return scatter(
        "examples",
        [d.gain_over_base_nats_per_token for d in table],
        [d.disagreement for d in table],
        [d.flag or "neither" for d in table],
        xlabel="gain of the best particle over the base (nats a token)",
        ylabel="disagreement of particles (probability)",
        vertical={f"out of support below {min_gain:.3g}": min_gain},
        horizontal={f"contested from {config.min_disagreement:g}": config.min_disagreement},
        caption=f"{len(table):,} examples of {config.dataset_name}.",
    )


def _tables(config: NllConfig, kinds: Mapping[str, Sequence[Diagnosis]], min_gain: float) -> list[Table]:
    """For each flag, the table of its first examples."""
    first = {
        CONTESTED: sorted(kinds[CONTESTED], key=lambda d: -d.disagreement),
        OUT_OF_SUPPORT: sorted(kinds[OUT_OF_SUPPORT], key=lambda d: d.gain_over_base_nats_per_token),
    }
    order = {CONTESTED: "The largest disagreement stands first", OUT_OF_SUPPORT: "The smallest gain stands first"}
    empty = {
        CONTESTED: "There is none: on no example do two particles differ by "
        f"{config.min_disagreement:g} or more in the probability of a token.",
        OUT_OF_SUPPORT: f"There is none: for every example, some particle gains {min_gain:.3g} nats a token or more "
        "over the base.",
    }
    return [
        Table(
            f"{kind[0].upper()}{kind[1:]}: {len(found):,} examples",
            HEADER,
            [_row(diagnosis) for diagnosis in found[:SHOWN]],
            f"{order[kind]}; all examples are in examples.csv." if found else "",
            empty[kind],
        )
        for kind, found in first.items()
    ]


def _row(d: Diagnosis) -> list[str]:
    numbers = [getattr(d, name) for name in (*FLAGGED_BY, "ess_particles", "responsibility_entropy_nats")]
    nlls = [getattr(d, name) for name in NLLS]
    return [
        str(d.row),
        d.text,
        *(f"{value:.3f}" for value in numbers),
        str(d.best_particle),
        *(f"{value:.3f}" for value in nlls),
    ]


def _words(K: int) -> list[tuple[str, str]]:
    disagreement = (
        "The largest difference between the probabilities that two particles give to one token of the example. It is 0 "
        "if all particles say the same, and at most 1. Many small differences are no dispute, however long the example "
        "is."
    )
    gain = (
        "How much more log-likelihood an example gets from the particle that explains it best than from the base, in "
        "nats a token. Below 0, training has made the example less likely for every particle."
    )
    entropy = (
        f"Of the responsibilities, in nats: from 0 (one particle takes all) to {math.log(K):.2f} (all take alike)."
    )
    own = [("Disagreement", disagreement), ("Gain", gain), ("Entropy", entropy)]
    return [
        glossary.PARTICLE,
        glossary.BASE,
        glossary.MIXTURE,
        glossary.NLL,
        glossary.RESPONSIBILITY,
        glossary.ESS,
        *own,
    ]
