"""The page of alpha-star: first what was found, in words; then the words, the numbers, and the examples."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from renyi_engine.critical_alpha.config import AlphaStarConfig
from renyi_engine.critical_alpha.findings import WHAT_H_IS, Driver, num_drivers, plainly, say
from renyi_engine.reports import Picture, Section, Table, glossary, lines, page_title, write_page

SHOWN = 25
"""Examples on the page; examples.csv has all."""


def write_alpha_star_report(
    output: Path, config: AlphaStarConfig, drivers: Sequence[Driver], results: Mapping[str, Any]
) -> Path:
    """Write the page; returns `output`."""
    who = f"particle {config.particle} of {config.ensemble}" if config.ensemble else "a fresh adapter"
    lead = (
        f"This page is about one adapter: {who}. It asks: if the adapter were copied several times, and the copies "
        f"were trained together on {results['num_examples']:,} examples of {config.dataset_name}, would the copies "
        f"stay alike, or would they move apart and become specialists?"
    )
    sections = [
        Section(
            "Would particles move apart?",
            "Particles that start at this adapter stay together while alpha is below the critical alpha, alpha*. Above "
            "it they move apart, along one direction. In numbers: "
            + ". ".join(said[0].upper() + said[1:] for said in say(results))
            + ".",
            pictures=_pictures(results),
        ),
        Section(
            "Which examples pull the particles apart",
            "Along the direction in which particles move apart, some examples gain what others lose. A positive slope "
            "means that the example gains when a particle moves forward; a negative one, that it gains when the "
            "particle moves backward. Examples whose slopes have opposite signs contradict each other. The scored text "
            "stands in [[ ]].",
            tables=[_table(drivers)],
        ),
    ]
    return write_page(
        output,
        title=page_title(output.parent, "alpha-star", config.model_name_or_path),
        lead=lead,
        found=plainly(results, num_drivers(drivers)),
        sections=sections,
        words=_words(config, results),
        details={"settings": asdict(config), "results": results},
    )


def _pictures(results: Mapping[str, Any]) -> list[Picture]:
    alpha, dims = results["alpha"], list(range(1, results["num_dims"] + 1))
    growth = lines(
        "growth",
        {"alpha*": (dims, results["alpha_star_by_dims"])},
        xlabel="dimensions of the subspace",
        ylabel="critical alpha",
        vertical={"leading directions of G end": results["num_leading_dims"] + 0.5},
        caption="How the critical alpha sinks as more directions are looked at. Good: the line is flat at its end; "
        "then more directions would hardly change the answer. Bad: it still falls; then ask again with a larger "
        "--subspace_dims, or, if one example makes up most of the pull, with more examples.",
    )
    spectrum = lines(
        "spectrum",
        {
            "H, alpha = 0": (dims, results["spectrum_of_H"]),
            f"S_alpha = H - {alpha:g} G": (dims, results["spectrum_of_S_alpha"]),
        },
        xlabel="eigenvalue, the smallest first",
        ylabel="curvature of the loss (nats)",
        horizontal={"a spread pays below": 0.0},
        caption="How the loss curves when particles spread around the adapter, in each direction of the subspace. "
        "Above the dashed line a spread costs; below it a spread pays. Where H is below it, the adapter is at no "
        "minimum of its own loss. Where only S_alpha is below it, the coupling moves particles apart.",
    )
    return [growth, spectrum]


def _table(drivers: Sequence[Driver]) -> Table:
    return Table(
        f"The first {min(SHOWN, len(drivers)):,} of {len(drivers):,} examples",
        ["row", "example", "part of the pull", "slope", "curvature"],
        [[str(d.row), d.text, f"{d.share:.1%}", f"{d.slope:+.4g}", f"{d.curvature:.4g}"] for d in drivers[:SHOWN]],
        "Slopes are in nats a unit of the direction, curvatures in nats a squared unit. All examples are in "
        "examples.csv, where the part of the pull is called share; the direction is in direction.safetensors.",
    )


def _words(config: AlphaStarConfig, results: Mapping[str, Any]) -> list[tuple[str, str]]:
    moved = "B alone, as B is zero and A moves nothing" if results["only_B"] else "A and B of every adapted map"
    return [
        glossary.PARTICLE,
        glossary.ALPHA,
        ("Critical alpha", "alpha*: above this alpha, particles that start alike move apart."),
        ("To part", "To move in opposite directions, so that each particle serves some of the examples better."),
        ("A spread pays", "Particles spread around the adapter have a lower loss than particles that all stay at it."),
        ("Direction", f"A way to move the adapter's parameters; written v. Here: {moved}."),
        (
            "H",
            "How the negative log-likelihood of an example curves, on average: "
            f"{WHAT_H_IS[config.curvature]}. Large: moving away costs.",
        ),
        (
            "G",
            "The mean outer product of an example's gradient. Large along a direction: the examples disagree on which "
            "way to go. alpha* is the least ratio of v'Hv to v'Gv over all directions v (paper, equation 13).",
        ),
        ("Part of the pull", "Of an example: its part of v'Gv, the mean squared slope along the direction."),
        ("Resamples", "The examples drawn anew, with replacement: how far alpha* may move with other examples."),
    ]
