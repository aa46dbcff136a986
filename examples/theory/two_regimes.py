"""Example 2 of the paper: predictive bands with and without spread, for clean and for contaminated data (its Figure 2).

    python examples/theory/two_regimes.py [--output TWO_REGIMES.png]

The model is a line with a kink at 0 and noise of known size. In the contaminated data, 30 of 100 examples right of 0
follow a steeper line. The script prints the critical alpha of both, and the Gaussian posterior that is fitted to each.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from matplotlib.figure import Figure
from torch import Tensor

from renyi_engine.reports import ACCENT, COLOURS, INK, MUTED, SMALL, pictures
from renyi_engine.theory import GaussianPosterior, TwoRegimes, fit

ALPHA = 0.5
CONTAMINATED = TwoRegimes(theta=(0.7, -0.4), sigma=0.35, eps=0.3, delta=1.6)
WORLDS = {"clean data": replace(CONTAMINATED, eps=0.0), "contaminated data": CONTAMINATED}
NUM_EXAMPLES = 500
PRIOR_WEIGHT, PRIOR_STD = 1.0, 1.0  # lambda, sigma_0
SPREAD = COLOURS[5]

TITLE = "Spread opens where the data disagree, and only there"
EXPLANATION = (
    f"A line with a kink, fitted at α = {ALPHA:g}; the bands are two standard deviations wide, either way.\n"
    "Above α*, a spread over lines lowers the loss."
)


class Fitted(NamedTuple):
    """One kind of data, x and y [N], and the posterior with the least loss."""

    world: TwoRegimes
    x: Tensor
    y: Tensor
    posterior: GaussianPosterior


@cache
def fits() -> dict[str, Fitted]:
    """The fit to each kind of data. Both kinds share inputs and noise."""
    fitted = {}
    for name, world in WORLDS.items():
        x, y = world.sample(NUM_EXAMPLES, torch.Generator().manual_seed(0))
        posterior = fit(x, y, sigma=world.sigma, alpha=ALPHA, weight=PRIOR_WEIGHT, prior_std=PRIOR_STD)
        fitted[name] = Fitted(world, x, y, posterior)
    return fitted


def draw() -> Figure:
    """Data, predictive mean and both bands. Clean data are left, contaminated data right."""
    with pictures.style():
        figure = Figure(figsize=(6.0, 4.3), facecolor="white")
        grid = figure.subplots(1, 2, sharex=True, sharey=True)
        figure.subplots_adjust(left=0.09, right=0.98, top=0.755, bottom=0.115, wspace=0.09)
        figure.text(0.02, 0.94, TITLE, fontsize=12, color=INK, weight="bold")
        figure.text(0.02, 0.918, EXPLANATION, va="top", linespacing=1.45, color=MUTED, fontsize=SMALL)
        for ax, (name, fitted) in zip(grid, fits().items(), strict=True):
            _draw_bands(ax, fitted)
            ax.text(0, 1.045, name, transform=ax.transAxes, color=INK, weight="bold")
            critical = fitted.world.critical_alpha
            side = {"transform": ax.transAxes, "ha": "right", "color": MUTED, "fontsize": SMALL}
            ax.text(1, 1.045, f"α* = {critical:.2f} {'<' if critical < ALPHA else '>'} α", **side)
            ax.set_xlabel("x")
        grid[0].set(xlim=(-3, 3), ylim=(-3.5, 7), ylabel="y")
        _label(grid[0], (-0.6, -2.4), "noise: the band\nwithout spread", ACCENT)
        _label(grid[1], (-2.7, 3.6), "noise and spread:\ntwo slopes in the\ndata right of 0", SPREAD)
        return figure


def _label(ax: Any, xy: tuple[float, float], text: str, colour: str) -> None:
    ax.text(*xy, text, linespacing=1.4, color=colour, fontsize=SMALL)


def _draw_bands(ax: Any, fitted: Fitted) -> None:
    x = torch.linspace(-3, 3, 301)
    mean, noise, epistemic = fitted.posterior.predict(x, fitted.world.sigma)
    narrow, wide = 2 * noise.sqrt(), 2 * (noise + epistemic).sqrt()
    for side in (-1, 1):
        ax.fill_between(x, mean + side * narrow, mean + side * wide, color=SPREAD, alpha=0.25, linewidth=0)
    ax.fill_between(x, mean - narrow, mean + narrow, color=ACCENT, alpha=0.25, linewidth=0)
    ax.scatter(fitted.x, fitted.y, s=5, color=INK, alpha=0.5, linewidth=0)
    ax.plot(x, mean, color=ACCENT, linewidth=2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("two_regimes.png"))
    options = parser.parse_args()
    draw().savefig(options.output, dpi=150)
    for name, (world, _, _, posterior) in fits().items():
        print(f"{name}: critical alpha {world.critical_alpha:.4f}; at alpha = {ALPHA:g}")
        print(f"  mean  {_numbers(posterior.mean)}   of least NLL {_numbers(world.minimiser)}")
        print(f"  Sigma {_numbers(posterior.covariance[0])} {_numbers(posterior.covariance[1])}")
    print(f"picture: {options.output}")


def _numbers(row: Tensor) -> str:
    return "[" + ", ".join(f"{value:.3g}" for value in row.tolist()) + "]"


if __name__ == "__main__":
    main()
