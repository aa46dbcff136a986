"""The critical alpha of a small network, from its derivatives; above it, two particles gain by moving apart.

    python examples/theory/critical_alpha.py [--output CRITICAL_ALPHA.png]

A network of two layers fits data. Where x > 0, each example is y = sin(x) or y = -sin(x), at random. The left picture
shows how the loss changes when two particles make a small step to either side, along the direction of alpha*. The right
one shows alpha* in subspaces of more and more dimensions, as `renyi-engine alpha-star` shows it for an adapter.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from matplotlib.figure import Figure
from torch import Tensor

from renyi_engine.critical_alpha import Batch, Projection, project
from renyi_engine.objectives import data_term
from renyi_engine.reports import ACCENT, COLOURS, INK, MUTED, SMALL, pictures

HIDDEN = 6
NUM_PARAMETERS = 3 * HIDDEN + 1
NUM_EXAMPLES = 400
NOISE_STD = 0.5
PRIOR_CURVATURE = 1e-3  # lambda / (N sigma_0^2): without it, flat directions would count
STEP = 0.05  # along a direction of the parameters that has length 1
HIGHEST_ALPHA = 1.5

TITLE = "Above α*, a step apart lowers the loss"
EXPLANATION = (
    "A network fits data that have two answers where x > 0. Two particles step off the fit, to either\n"
    "side along one direction of its parameters: they gain if α is above α*, and lose below it."
)


class Fit(NamedTuple):
    """The data x and y [N], and the parameters theta [P] that fit them best."""

    x: Tensor
    y: Tensor
    theta: Tensor


def log_likelihood(theta: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """[N] nats: log N(y; f_theta(x), NOISE_STD^2) without its constant. theta is [P], or [N, P], one per example."""
    first, bias, second, last = theta.split([HIDDEN, HIDDEN, HIDDEN, 1], dim=-1)
    mean = (torch.tanh(x[:, None] * first + bias) * second).sum(dim=-1) + last[..., 0]
    return -(y - mean).square() / (2 * NOISE_STD**2)


def prior(theta: Tensor) -> Tensor:
    return PRIOR_CURVATURE / 2 * theta.square().sum()


@cache
def fit(seed: int = 0) -> Fit:
    generator = torch.Generator().manual_seed(seed)
    x = 6 * torch.rand(NUM_EXAMPLES, generator=generator, dtype=torch.float64) - 3
    sign = torch.where((x > 0) & (torch.rand(NUM_EXAMPLES, generator=generator) < 0.5), -1.0, 1.0)
    y = sign * torch.sin(x) + NOISE_STD * torch.randn(NUM_EXAMPLES, generator=generator, dtype=torch.float64)
    theta = torch.randn(NUM_PARAMETERS, generator=generator, dtype=torch.float64).requires_grad_()
    optimizer = torch.optim.LBFGS([theta], max_iter=2000, tolerance_grad=1e-9, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        (loss := prior(theta) - log_likelihood(theta, x, y).mean()).backward()
        return loss

    optimizer.step(closure)
    return Fit(x, y, theta.detach())


@cache
def projection() -> Projection:
    """H, with the prior's curvature, and G at the fit, in all dimensions."""
    x, y, theta = fit()

    def batches(point: Sequence[Tensor], what: str) -> Iterator[Batch]:
        copies = point[0].expand(len(x), NUM_PARAMETERS).clone().requires_grad_()
        yield Batch([copies], log_likelihood(copies, x, y))

    return project([theta], batches, NUM_PARAMETERS, prior_curvature=PRIOR_CURVATURE)


def gain(alpha: float) -> float:
    """The loss of two particles at theta +- STEP v, minus their loss when both are at theta: nats per example."""
    x, y, theta = fit()
    found = projection()
    v = found.basis @ found.critical_alpha().direction

    def loss(particles: Sequence[Tensor]) -> Tensor:
        s = torch.stack([log_likelihood(particle, x, y) for particle in particles])
        return data_term(s, alpha, NUM_EXAMPLES)[0] + torch.stack([prior(p) for p in particles]).mean()

    return (loss([theta + STEP * v, theta - STEP * v]) - loss([theta])).item()


def draw() -> Figure:
    """The change of the loss over alpha, and alpha* over the dimensions of the subspace."""
    found = projection()
    critical = found.critical_alpha().alpha
    alphas = torch.linspace(0, HIGHEST_ALPHA, 61).tolist()
    gains = [1e3 * gain(alpha) for alpha in alphas]
    growth = [found.critical_alpha(num_dims=m).alpha for m in range(1, NUM_PARAMETERS + 1)]
    with pictures.style():
        figure = Figure(figsize=(6.0, 3.9), facecolor="white")
        figure.text(0.02, 0.935, TITLE, fontsize=12, color=INK, weight="bold")
        figure.text(0.02, 0.91, EXPLANATION, va="top", linespacing=1.45, color=MUTED, fontsize=SMALL)
        left, right = figure.add_axes((0.13, 0.13, 0.36, 0.64)), figure.add_axes((0.6, 0.13, 0.37, 0.64))
        _draw_gain(left, alphas, gains, critical)
        _draw_growth(right, growth, found.num_leading)
        return figure


def _draw_gain(ax: Any, alphas: Sequence[float], gains: Sequence[float], critical: float) -> None:
    ax.axhline(0, color=MUTED, linewidth=0.8)
    ax.plot(alphas, gains, color=ACCENT, linewidth=2)
    ax.fill_between(alphas, gains, 0, [g < 0 for g in gains], color=ACCENT, alpha=0.12, linewidth=0)
    ax.plot(critical, 0, "o", color=COLOURS[5], zorder=3)
    note = {"textcoords": "offset points", "fontsize": SMALL}
    ax.annotate(f"α* = {critical:.2f}", (critical, 0), (6, 7), color=COLOURS[5], weight="bold", **note)
    ax.set(xlim=(0, HIGHEST_ALPHA), xlabel="α", ylabel="change of the loss, 0.001 nats", xticks=(0, 0.5, 1, 1.5))


def _draw_growth(ax: Any, growth: Sequence[float], num_leading: int) -> None:
    dims = range(1, len(growth) + 1)
    ax.plot(dims, growth, color=ACCENT, linewidth=2, marker=".")
    ax.axvline(num_leading + 0.5, color=MUTED, linewidth=0.8, linestyle=(0, (4, 3)))
    text = {"color": MUTED, "fontsize": SMALL, "va": "top", "transform": ax.get_xaxis_transform()}
    ax.text(num_leading + 0.1, 0.99, "leading\ndirections\nof G", ha="right", **text)
    ax.text(num_leading + 0.9, 0.99, "what lowers\nthe ratio", ha="left", **text)
    ax.set(ylim=(0, None), xlabel="dimensions of the subspace", ylabel="α*")
    ax.margins(x=0.04)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("critical_alpha.png"))
    options = parser.parse_args()
    draw().savefig(options.output, dpi=150)
    found = projection()
    critical = found.critical_alpha().alpha
    in_one = found.critical_alpha(num_dims=1).alpha
    print(f"alpha* = {critical:.4f} in {NUM_PARAMETERS} dimensions, {in_one:.4f} in one")
    print("alpha / alpha*  change of the loss, nats")
    for factor in (0.5, 0.9, 1.1, 2.0):
        print(f"{factor:14.1f}  {gain(factor * critical):+.3e}")
    print(f"picture: {options.output}")


if __name__ == "__main__":
    main()
