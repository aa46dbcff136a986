"""Particles on a regression with two answers: shows what alpha and the two priors of section 4.1 do to them.

    python examples/theory/flows.py [--output FLOWS.png]

Half of the examples say y = x, the other half y = -x. A particle is one slope, so it can explain only one half.
The particles follow the gradient flow of the engine's own objective, eq. (19) of arXiv 2605.27747, with lambda = 1:

    J = (1/N) sum_i loss_alpha(i) + (lambda/N) prior,     d phi_k / dt = -K dJ / d phi_k

If all particles are at slope 0, they do not move. If they are at small distances d_k from it that sum to 0,

    J = J(0) + (1/2) (H - alpha G + C) (1/K) sum_k d_k^2 + ...

where H is the curvature of the mean NLL, G the mean square of its derivative, and C the curvature of the prior. C is
lambda/N (1/sigma_0^2) for the potential, and lambda/N (1/sigma_0^2 - 2/h^2) for the smoothed KL, whose kernel repels.
The particles come apart above alpha* = (H + C) / G. With a narrow kernel alpha* is negative: then the particles never
all fall onto one point.

The bandwidth h is a number here, about the distance of neighbours. With a wider one the particles spread as far, but
some pair up after a while. The median heuristic gives the distance of the two modes once there are two, and then the
particles of one mode fall onto one point.

Layout: K particles, P = 1 parameter of each, N examples.
"""

from __future__ import annotations

import argparse
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from matplotlib.figure import Figure
from torch import Tensor

from renyi_engine.objectives import PriorName, data_term, prior_term
from renyi_engine.reports import pictures

NUM_PARTICLES = 16
NUM_EXAMPLES = 64
NOISE_STD = 0.8
PRIOR_WEIGHT, PRIOR_STD = 1.0, 1.0  # lambda, sigma_0
BANDWIDTH = 0.05  # h; the posterior of one slope has a standard deviation of 0.10
STEP, NUM_STEPS = 0.025, 800  # STEP is a time, in 1/nats
FACTORS = (0.8, 3.0)  # alpha, in multiples of the potential's critical alpha
PRIORS: dict[PriorName, str] = {"potential": "potential", "smoothed_kl": "smoothed KL"}

TITLE = "One slope between two answers, or specialists for each"
EXPLANATION = (
    f"Half of the data say y = x, the other half y = −x. Each line is one of {NUM_PARTICLES} particles,\n"
    "a slope that can fit one half only. α* is the critical alpha of the potential."
)
HAPPENS = (  # in the order of `four_flows`
    "one point between the modes",
    "one point in each mode",
    "kept apart between the modes",
    "kept apart within each mode",
)


class Data(NamedTuple):
    """The inputs and the answers, each [N]."""

    x: Tensor
    y: Tensor


def make_data(seed: int = 0) -> Data:
    """The data. Every x occurs twice, with an answer and with its opposite, so the two halves are exactly alike."""
    generator = torch.Generator().manual_seed(seed)
    x, noise = torch.randn(2, NUM_EXAMPLES // 2, generator=generator, dtype=torch.float64)
    y = x + NOISE_STD * noise
    return Data(torch.cat([x, x]), torch.cat([y, -y]))


def log_likelihood(slopes: Tensor, data: Data) -> Tensor:
    """[K, N] nats: log N(y; slope x, NOISE_STD^2) without its constant, for slopes [K, 1]."""
    return -(data.y - slopes * data.x).square() / (2.0 * NOISE_STD**2)


def critical_alpha(data: Data, prior: PriorName, bandwidth: float = BANDWIDTH) -> float:
    """alpha* = (H + C) / G if every slope is 0: (13), with the curvature of the prior."""
    curvature = (data.x.square() / NOISE_STD**2).mean()
    squared_score = (data.x * data.y / NOISE_STD**2).square().mean()
    of_prior = 1.0 / PRIOR_STD**2 - (2.0 / bandwidth**2 if prior == "smoothed_kl" else 0.0)
    return ((curvature + PRIOR_WEIGHT / NUM_EXAMPLES * of_prior) / squared_score).item()


def objective(slopes: Tensor, data: Data, alpha: float, prior: PriorName, bandwidth: float | None) -> Tensor:
    """J of slopes [K, 1]: a scalar, in nats per example."""
    loss, _ = data_term(log_likelihood(slopes, data), alpha, NUM_EXAMPLES)
    return loss + prior_term(
        prior, slopes, weight=PRIOR_WEIGHT, num_examples=NUM_EXAMPLES, std=PRIOR_STD, bandwidth=bandwidth
    )


def flow(
    start: Tensor,
    data: Data,
    alpha: float,
    prior: PriorName,
    *,
    bandwidth: float | None = BANDWIDTH,
    num_steps: int = NUM_STEPS,
) -> Tensor:
    """The trajectory [num_steps + 1, K, P] of particles that start at `start` [K, P], by Euler's method.

    Args:
        bandwidth: h of the smoothed KL, or None for the median heuristic.
    """
    trajectory = [start]
    for _ in range(num_steps):
        slopes = trajectory[-1].clone().requires_grad_()
        (gradient,) = torch.autograd.grad(objective(slopes, data, alpha, prior, bandwidth), slopes)
        trajectory.append(trajectory[-1] - STEP * len(slopes) * gradient)
    return torch.stack(trajectory)


def spread_start() -> Tensor:
    """Slopes [K, 1] that are spread as the prior N(0, sigma_0^2) is: the middles of its K equal parts."""
    parts = (torch.arange(NUM_PARTICLES, dtype=torch.float64) + 0.5) / NUM_PARTICLES
    return PRIOR_STD * torch.special.ndtri(parts).unsqueeze(1)


def spread(slopes: Tensor) -> float:
    """The standard deviation of slopes [K, 1] over the particles."""
    return slopes.std(correction=0).item()


@cache
def four_flows() -> dict[tuple[PriorName, float], Tensor]:
    """The trajectories for both priors and both alphas, all from the same start."""
    data = make_data()
    alphas = [factor * critical_alpha(data, "potential") for factor in FACTORS]
    return {(prior, alpha): flow(spread_start(), data, alpha, prior) for prior in PRIORS for alpha in alphas}


def draw() -> Figure:
    """Slopes over time, in 2 x 2 pictures: a row for each prior, with alpha below and above the critical one."""
    bold: dict[str, Any] = {"color": pictures.INK, "weight": "bold"}
    muted: dict[str, Any] = {"color": pictures.MUTED, "fontsize": pictures.SMALL}
    alpha_star = critical_alpha(make_data(), "potential")
    with pictures.style():
        figure = Figure(figsize=(6.0, 4.7), facecolor="white")
        grid = figure.subplots(2, 2, sharex=True, sharey=True)
        figure.subplots_adjust(left=0.13, right=0.965, top=0.725, bottom=0.095, hspace=0.26, wspace=0.1)
        figure.text(0.02, 0.945, TITLE, fontsize=12, **bold)
        figure.text(0.02, 0.925, EXPLANATION, va="top", linespacing=1.45, **muted)
        for ax, ((_, alpha), trajectory), happens in zip(grid.flat, four_flows().items(), HAPPENS, strict=True):
            _draw_flow(ax, trajectory[..., 0])
            ax.set_title(happens, loc="left", **muted)
            if ax in grid[0]:
                side = "below" if alpha < alpha_star else "above"
                ax.text(0, 1.2, f"α = {alpha:.2f}, {side} α* = {alpha_star:.2f}", transform=ax.transAxes, **bold)
            else:
                ax.set_xlabel("time")
        for ax, prior in zip(grid[:, 0], PRIORS.values(), strict=True):
            ax.set_ylabel("slope", labelpad=2)
            ax.text(-0.29, 0.5, prior, transform=ax.transAxes, rotation=90, va="center", **bold)
            for mode, says in ((1, "y = x"), (-1, "y = −x")):
                ax.text(
                    0.985, mode, says, transform=ax.get_yaxis_transform(), ha="right", va="center_baseline", **muted
                )
        return figure


def _draw_flow(ax: Any, slopes: Tensor) -> None:
    """A line for each of the slopes [steps, K], with a dot at its end, and a bar for each half of the data."""
    time = STEP * torch.arange(len(slopes))
    for mode in (-1.0, 1.0):
        ax.axhline(mode, color=pictures.GRID, linewidth=10, zorder=0)
    for path, colour in zip(slopes.T, pictures.particle_colours(slopes.shape[1]), strict=True):
        ax.plot(time, path, color=colour, linewidth=1.1)
        ax.plot(time[-1:], path[-1:], color=colour, marker="o", markersize=3.5, clip_on=False, zorder=3)
    ax.set(xlim=(0, time[-1]), yticks=(-1, 0, 1))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("flows.png"))
    options = parser.parse_args()
    draw().savefig(options.output, dpi=150)
    data = make_data()
    print(f"critical alpha: {', '.join(f'{critical_alpha(data, prior):.3f} with the {prior}' for prior in PRIORS)}")
    print(f"{'prior':12}  alpha  spread of all  of the upper half")
    for (prior, alpha), trajectory in four_flows().items():
        end = trajectory[-1]
        print(f"{prior:12}  {alpha:5.3f}  {spread(end):13.4f}  {spread(end[NUM_PARTICLES // 2 :]):17.4f}")
    print(f"picture: {options.output}")


if __name__ == "__main__":
    main()
