"""The self-consistent posterior of contested data, eq. (10): how one compromise becomes two camps as alpha grows.

    python examples/theory/posterior.py [--output POSTERIOR.png]

Half of the data lie around -1, half around +1. The model is a normal distribution of known standard deviation and
unknown mean, so it can fit only one half. The means are a grid under a flat prior; lambda = 1. For each alpha, the
script prints how well the posterior satisfies (10), and by how much its objective can at most exceed the minimum.

At the mean 0, the curvature of the mean NLL is H = 1 / MODEL_STD^2, and the mean squared score is
G = mean(y^2) / MODEL_STD^4. A point mass there comes apart above alpha* = H / G, (13).

Layout: M parameters, N examples.
"""

from __future__ import annotations

import argparse
from functools import cache
from pathlib import Path

import torch
from matplotlib.figure import Figure
from torch import Tensor

from renyi_engine.reports import ACCENT, COLOURS, HEAT, INK, MUTED, SMALL, pictures
from renyi_engine.theory import Posterior, self_consistent_posterior

NUM_EXAMPLES = 24
NOISE_STD, MODEL_STD = 0.3, 0.7
GRID = torch.linspace(-2, 2, 201, dtype=torch.float64)
ALPHAS = [step / 10 for step in range(11)]
SPACING = 0.62  # between the curves of two alphas, in units of density

TITLE = "From one compromise to two camps"
EXPLANATION = (
    "Half of the data lie around −1, half around +1; the model, one mean, can fit one half only.\n"
    "Each curve is the posterior over that mean at one α."
)


def make_data() -> Tensor:
    """[N]: two bumps, each of evenly spaced quantiles. They are the same every time."""
    half = NUM_EXAMPLES // 2
    bump = NOISE_STD * torch.special.ndtri((torch.arange(half, dtype=torch.float64) + 0.5) / half)
    return torch.cat([bump - 1, bump + 1])


def critical_alpha(data: Tensor) -> float:
    """alpha* = H / G of a point mass on the mean 0."""
    return MODEL_STD**2 / data.square().mean().item()


@cache
def posteriors() -> dict[float, Posterior]:
    """The posterior of each alpha."""
    logp = torch.distributions.Normal(GRID[:, None], MODEL_STD).log_prob(make_data())
    prior = torch.full_like(GRID, 1 / len(GRID))
    return {alpha: self_consistent_posterior(logp, prior, alpha, weight=1.0) for alpha in ALPHAS}


def draw() -> Figure:
    """The posteriors as ridges above the data, with alpha upwards."""
    data, critical = make_data(), critical_alpha(make_data())
    with pictures.style():
        figure = Figure(figsize=(6.0, 5.4), facecolor="white")
        ax = figure.add_axes((0.1, 0.1, 0.665, 0.745))
        figure.text(0.02, 0.952, TITLE, fontsize=12, color=INK, weight="bold")
        figure.text(0.02, 0.935, EXPLANATION, va="top", linespacing=1.45, color=MUTED, fontsize=SMALL)
        height = 10 * SPACING  # of alpha = 1
        for alpha, posterior in reversed(posteriors().items()):
            density = posterior.probabilities / (GRID[1] - GRID[0])
            base = alpha * height
            colour, layer = HEAT(0.3 + 0.5 * alpha), 3 - alpha
            ax.fill_between(GRID, base, base + density, color=colour, alpha=0.9, linewidth=0, zorder=layer)
            ax.plot(GRID, base + density, color="white", linewidth=1.1, zorder=layer)
        ax.hlines(critical * height, -2, 2, color=COLOURS[5], linewidth=1.1, linestyle=(0, (4, 2.5)), zorder=4)
        ax.plot(data, torch.full_like(data, -0.28), "|", color=INK, markersize=7, markeredgewidth=0.9)
        ax.set(xlim=(-2, 2), ylim=(-0.55, height + 1.35), xlabel="mean", ylabel="α")
        ax.set_yticks([alpha * height for alpha in ALPHAS], [f"{alpha:g}" for alpha in ALPHAS])
        ax.tick_params(axis="y", length=0)
        ax.spines.left.set_visible(False)
        notes = (
            (height, "two camps,\neach fits its half", ACCENT),
            (critical * height, f"α* = {critical:.2f}: above it\na point in the middle\ncomes apart", COLOURS[5]),
            (0.1, "one compromise\nthat fits neither", ACCENT),
            (-0.28, "the data", INK),
        )
        for y, text, colour in notes:
            va = "bottom" if y == 0.1 else "center"
            ax.text(2.08, y, text, va=va, linespacing=1.4, color=colour, fontsize=SMALL)
        return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("posterior.png"))
    options = parser.parse_args()
    draw().savefig(options.output, dpi=150)
    print(f"critical alpha of a point mass in the middle: {critical_alpha(make_data()):.4f}")
    print("alpha  steps  residual of (10)  gap, nats")
    for alpha, posterior in posteriors().items():
        print(f"{alpha:5.1f}  {posterior.num_iterations:5}  {posterior.residual:16.1e}  {posterior.gap_nats:9.1e}")
    print(f"picture: {options.output}")


if __name__ == "__main__":
    main()
