"""What is found about one adapter: its critical alpha, the examples that contribute most, and sentences about both.

Layout: N examples, m dimensions of the subspace.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from renyi_engine.critical_alpha.projection import CriticalAlpha, Projection
from renyi_engine.data import Example
from renyi_engine.reports import Table

INTERVAL = (0.025, 0.975)
WHAT_H_IS = {"hessian": "the whole Hessian", "gauss_newton": "the Gauss-Newton part of the Hessian"}

OF_ONE = (
    "one example makes up half or more of what pulls the copies apart, so this says more about that example than about "
    "the data: ask again with more examples, or without it"
)


@dataclass(frozen=True)
class Driver:
    """What an example contributes to the direction v of the critical alpha (paper 3.3).

    Attributes:
        row: its number in the data set.
        share: its part of v'Gv, the mean squared slope, from 0 to 1.
        slope: d s / d v, nats for a unit of v. Examples whose slopes have opposite signs pull particles apart.
        curvature: the curvature of -s along v, nats for a squared unit of v.
    """

    row: int
    share: float
    slope: float
    curvature: float
    text: str


def make_drivers(
    projection: Projection, found: CriticalAlpha, examples: Sequence[Example], texts: Sequence[str]
) -> list[Driver]:
    """One for each example, the largest share first."""
    v = found.direction
    slopes = projection.scores @ v
    curvatures = torch.einsum("a,nab,b->n", v, projection.curvatures, v)
    shares = slopes.square() / slopes.square().sum()
    columns = zip(examples, shares.tolist(), slopes.tolist(), curvatures.tolist(), texts, strict=True)
    drivers = [Driver(e.row, share, slope, curvature, text) for e, share, slope, curvature, text in columns]
    return sorted(drivers, key=lambda driver: -driver.share)


def make_results(projection: Projection, found: CriticalAlpha, resampled: Tensor, alpha: float) -> dict[str, Any]:
    H, G = projection.pencil()
    of_H, of_S = torch.linalg.eigvalsh(H), torch.linalg.eigvalsh(H - alpha * G)
    low, high = resampled.quantile(torch.tensor(INTERVAL, dtype=resampled.dtype), interpolation="nearest").tolist()
    m = len(H)
    return {
        "alpha_star": found.alpha,
        "alpha_star_interval": [low, high],
        "alpha_star_by_dims": [projection.critical_alpha(num_dims=dims).alpha for dims in range(1, m + 1)],
        "num_dims": m,
        "num_leading_dims": projection.num_leading,
        "curvature_along_direction": (found.direction @ H @ found.direction).item(),
        "squared_slope_along_direction": (found.direction @ G @ found.direction).item(),
        "alpha": alpha,
        "spectrum_of_H": of_H.tolist(),
        "spectrum_of_S_alpha": of_S.tolist(),
        "num_unstable_dims": int((of_S < -projection.resolution * of_H.abs().max()).sum()),
    }


def say(results: Mapping[str, Any]) -> list[str]:
    """The answer in lines for an expert. `plainly` gives it for everybody."""
    low, high = results["alpha_star_interval"]
    said = [
        f"alpha* = {results['alpha_star']:.4g} (95 % of resamples: {low:.4g} to {high:.4g}), from "
        f"{results['num_examples']} examples in {results['num_dims']} of {results['num_parameters']:,} dimensions",
        f"H is {WHAT_H_IS[results['curvature']]}",
        f"at alpha = {results['alpha']:g}, a spread pays along {results['num_unstable_dims']} of them",
    ]
    if results["alpha_star"] <= 0:
        said.append(
            "alpha* is not above 0: along its direction the negative log-likelihood itself curves downwards, so this "
            "adapter is at no minimum and a spread pays at every alpha; train on, add a prior, or leave the network's "
            "own curvature out with --curvature gauss_newton"
        )
    return said


def growth(results: Mapping[str, Any]) -> Table:
    by_dims = results["alpha_star_by_dims"]
    shown = sorted({d for d in (1, 2, 4, 8, 16, 32, 64, 128, results["num_leading_dims"]) if d < len(by_dims)})
    shown.append(len(by_dims))
    return Table("", ["dimensions", *map(str, shown)], [["alpha*", *(f"{by_dims[dims - 1]:.4g}" for dims in shown)]])


def plainly(results: Mapping[str, Any], num_drivers: int) -> str:
    """The answer in words, without a symbol, for a reader who has not read the paper."""
    alpha, critical, (low, high) = results["alpha"], results["alpha_star"], results["alpha_star_interval"]
    if critical <= 0:
        return (
            "Found: the copies would move apart, however weakly they are coupled. The adapter is at no minimum of its "
            "own loss: even a single copy would find a better place nearby. Train it further before you ask again."
        )
    ratio = critical / alpha if alpha else 0.0
    times = f"{f'{ratio:.2g}' if ratio < 10 else f'{ratio:,.0f}'} times as strongly as here"
    if alpha > critical:
        found = f"the copies would move apart. They would stay together only if they were coupled less than {times}."
    elif alpha > 0:
        found = f"the copies would stay together. They would move apart only if they were coupled more than {times}."
    else:
        found = "the copies would stay together, as they are not coupled at all."
    if num_drivers == 1:
        return f"Found: {found} But {OF_ONE}."
    other = "might well give the opposite" if low <= alpha <= high else "would very probably give the same"
    some = f"{num_drivers} of {results['num_examples']:,} examples make"
    return (
        f"Found: {found} Other examples of the same kind {other} answer. {some} up half of what pulls the copies apart."
    )


def num_drivers(drivers: Sequence[Driver]) -> int:
    """How many examples, the largest first, make up half of v'Gv."""
    total = 0.0
    for count, driver in enumerate(drivers, start=1):
        total += driver.share
        if total >= 0.5:
            return count
    return len(drivers)
