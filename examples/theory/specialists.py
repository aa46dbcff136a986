"""Example 1 of the paper: two specialists, of whom one knows the answer, against a generalist who half knows it.

    python examples/theory/specialists.py [--output SPECIALISTS.png]

For three generalists, the script prints the alpha above which the specialists have the lower loss, and draws it.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor

from renyi_engine.reports import ACCENT, COLOURS, INK, MUTED, SMALL, pictures
from renyi_engine.theory import threshold
from renyi_kernels import renyi_reduce

SPECIALISTS = (0.9, 0.1)  # the likelihood that each gives to the one example
GENERALISTS = (0.25, 0.4, 0.95)
HIGHEST_ALPHA = 1.5

TITLE = "When are two specialists worth more than one generalist?"
EXPLANATION = (
    "One specialist gives an example probability 0.9, the other 0.1. Together they lose less\n"
    "the larger α is; what a generalist loses does not depend on α."
)


def log_likelihoods(*likelihoods: float) -> Tensor:
    """[len(likelihoods), N = 1] nats."""
    return torch.tensor(likelihoods, dtype=torch.float64).log()[:, None]


def thresholds() -> list[float]:
    """The alpha above which the specialists win, for each generalist."""
    return [threshold(log_likelihoods(*SPECIALISTS), log_likelihoods(rival)[0]) for rival in GENERALISTS]


def draw() -> Figure:
    """Loss over alpha: a curve for the specialists, and a line for each generalist."""
    alphas = torch.linspace(0, HIGHEST_ALPHA, 301).tolist()
    losses = [renyi_reduce(log_likelihoods(*SPECIALISTS), alpha).loss.item() for alpha in alphas]
    with pictures.style():
        figure = Figure(figsize=(6.0, 4.3), facecolor="white")
        ax = figure.add_axes((0.1, 0.115, 0.65, 0.67))
        figure.text(0.02, 0.94, TITLE, fontsize=12, color=INK, weight="bold")
        figure.text(0.02, 0.918, EXPLANATION, va="top", linespacing=1.45, color=MUTED, fontsize=SMALL)
        ax.set(xlim=(0, HIGHEST_ALPHA), ylim=(0, 1.5), xlabel="α", ylabel="loss, nats")
        for likelihood, alpha in zip(GENERALISTS, thresholds(), strict=True):
            _draw_generalist(ax, likelihood, alpha)
            if 0.0 < alpha < math.inf:
                wins = [a >= alpha for a in alphas]
                ax.fill_between(alphas, losses, -math.log(likelihood), wins, color=ACCENT, alpha=0.12, linewidth=0)
                note = {"ha": "right", "va": "top", "color": ACCENT, "fontsize": SMALL}
                ax.text(HIGHEST_ALPHA - 0.03, -math.log(likelihood) - 0.03, "specialists win", **note)
        ax.plot(alphas, losses, color=ACCENT, linewidth=2.4, zorder=3)
        ax.text(0.17, 1.15, "two specialists, p = {:g} and {:g}".format(*SPECIALISTS), color=ACCENT, weight="bold")
        return figure


def _draw_generalist(ax: Any, likelihood: float, alpha: float) -> None:
    """The generalist's line, a verdict, and the crossing at `alpha` if there is one."""
    nll, crossed = -math.log(likelihood), 0.0 < alpha < math.inf
    verdict = f"beaten above α = {alpha:.4g}" if crossed else "never beaten" if alpha else "beaten at every α"
    colour = INK if crossed else MUTED
    ax.axhline(nll, color=colour, linewidth=1.2, linestyle=(0, (5, 2.5)), zorder=2)
    label = {"va": "center", "linespacing": 1.4, "color": colour, "fontsize": SMALL}
    ax.text(HIGHEST_ALPHA + 0.04, nll, f"generalist, p = {likelihood:g}\n{verdict}", **label)
    if crossed:
        ax.vlines(alpha, 0, nll, color=COLOURS[5], linewidth=1, linestyle=(0, (1, 2)), zorder=1)
        ax.plot(alpha, nll, "o", color=COLOURS[5], markersize=8, markeredgecolor="white", zorder=4)
        ax.text(alpha + 0.04, nll + 0.05, f"α = {alpha:.4g}", color=COLOURS[5], weight="bold")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("specialists.png"))
    options = parser.parse_args()
    draw().savefig(options.output, dpi=150)
    for likelihood, alpha in zip(GENERALISTS, thresholds(), strict=True):
        print(f"against a generalist of likelihood {likelihood:4.2f} the specialists win above alpha = {alpha:.12g}")
    print(f"picture: {options.output}")


if __name__ == "__main__":
    main()
