"""What alpha is at each step: a schedule of the step alone, or a controller that follows the particles.

The alpha of a step is known before its first micro-batch is run, so that all of them are reduced alike: a controller
learns from the steps before. Settings are checked here before torch is imported: only what computes imports it.

Layout: K particles, N examples.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from torch import Tensor

ScheduleName = Literal["constant", "linear", "cosine"]

FINITE_ALPHA = "a finite number >= 0 (0 trains the particles independently)"

POOL_STEPS = 8
"""Steps whose examples `EssController` pools: those of a single one may be all alike, or all contested; over many, the
particles have moved."""
MAX_RISE, MAX_FALL = 1.05, 1.2
"""Factors by which `EssController` changes alpha in one step, at most. It rises slowly, because particles that start
alike say nothing of what alpha they will need, and one that is too large hands all examples to a single particle."""
MIN_ALPHA = 1e-4
"""Where `EssController` stops to lower alpha: particles 10^4 nats apart still share an example."""


class Coupling(ABC):
    """What sets alpha. `at` is asked for every step in turn, and `observe` is told what came of it."""

    @abstractmethod
    def at(self, step: int) -> float:
        """alpha of `step`, counted from 0."""

    def observe(self, logp: Tensor) -> None:  # noqa: B027 (only one of them looks)
        """Take note of the log-likelihoods [K, N] of a step's examples, in nats."""

    @abstractmethod
    def state(self) -> dict[str, Any]:
        """What a resumed run has to know, in what JSON keeps to the last bit."""

    @abstractmethod
    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state` gave."""


class Schedule(Coupling):
    """From `start` to `end` in `num_steps`, along a line or half a cosine, and `end` from there on."""

    def __init__(self, name: ScheduleName, start: float, end: float, num_steps: int) -> None:
        self.name, self.start, self.end, self.num_steps = name, start, end, num_steps

    def at(self, step: int) -> float:
        if self.name == "constant" or step >= self.num_steps:
            return self.end
        done = step / self.num_steps
        if self.name == "cosine":
            done = (1.0 - math.cos(math.pi * done)) / 2.0
        return self.start + (self.end - self.start) * done

    def state(self) -> dict[str, Any]:
        return {"num_steps": self.num_steps}  # a longer run goes on as it began

    def restore(self, state: Mapping[str, Any]) -> None:
        self.num_steps = state["num_steps"]


class EssController(Coupling):
    """Keeps the mean effective sample size of the training examples at `target` * K.

    After each step alpha moves to where the examples of the last `POOL_STEPS` steps have that mean, up by a factor of
    at most `MAX_RISE`, down by at most `MAX_FALL`. A target too low for any alpha up to `alpha_max` leaves it there.

    Raises:
        ValueError: `target` is out of reach for so many particles; alpha is not from `MIN_ALPHA` to `alpha_max`.
    """

    def __init__(self, target: float, num_particles: int, alpha: float, alpha_max: float) -> None:
        if not 1.0 / num_particles < target < 1.0:
            raise ValueError(
                f"alpha_controller: expected ess:TARGET with TARGET above 1/{num_particles} and below 1, as a share of "
                f"the {num_particles} particles: an effective sample size is from 1 to num_particles; got {target:g}"
            )
        if not MIN_ALPHA <= alpha <= alpha_max:
            raise ValueError(
                f"alpha: with alpha_controller ess:{target:g} it is where alpha starts; expected a number from "
                f"{MIN_ALPHA:g} to alpha_max ({alpha_max:g}); got {alpha:g}"
            )
        self.ess, self.alpha, self.alpha_max = target * num_particles, alpha, alpha_max
        self._pool: deque[Tensor] = deque(maxlen=POOL_STEPS)

    def at(self, step: int) -> float:
        return self.alpha

    def observe(self, logp: Tensor) -> None:
        import torch

        self._pool.append(logp.detach().cpu().double())
        low, high = max(self.alpha / MAX_FALL, MIN_ALPHA), min(self.alpha * MAX_RISE, self.alpha_max)
        self.alpha = alpha_of_ess(torch.cat(list(self._pool), dim=1), self.ess, low, high)

    def state(self) -> dict[str, Any]:
        return {"alpha": self.alpha, "logp_nats_of_steps": [logp.tolist() for logp in self._pool]}

    def restore(self, state: Mapping[str, Any]) -> None:
        import torch

        self.alpha = state["alpha"]
        self._pool.extend(torch.tensor(logp, dtype=torch.float64) for logp in state["logp_nats_of_steps"])


class AlphaStarController(Coupling):
    """Stays `margin` above the critical alpha* of (13), where specialists begin to pay off: (12).

    Every `num_steps` steps, from step 0 on, alpha becomes max(`estimate(step)`, 0) + margin, at most `alpha_max`.

    Raises:
        ValueError: `margin` is not from 0 to `alpha_max`, excluded.
    """

    def __init__(self, margin: float, alpha_max: float, num_steps: int, estimate: Callable[[int], float]) -> None:
        if not 0.0 <= margin < alpha_max:
            raise ValueError(
                f"alpha_controller: expected alpha-star:MARGIN with MARGIN of at least 0 and below alpha_max "
                f"({alpha_max:g}); got {margin:g}"
            )
        self.margin, self.alpha_max, self.num_steps, self.estimate = margin, alpha_max, num_steps, estimate
        self.alpha = 0.0

    def at(self, step: int) -> float:
        if step % self.num_steps == 0:
            self.alpha = min(max(self.estimate(step), 0.0) + self.margin, self.alpha_max)
        return self.alpha

    def state(self) -> dict[str, Any]:
        return {"alpha": self.alpha}

    def restore(self, state: Mapping[str, Any]) -> None:
        self.alpha = state["alpha"]


def parse_controller(text: str) -> tuple[str, float]:
    """("ess", TARGET) or ("alpha-star", MARGIN) of the flag. Raises ValueError for anything else."""
    name, _, value = text.partition(":")
    try:
        number = float(value)
    except ValueError:
        number = math.nan
    if name in ("ess", "alpha-star") and math.isfinite(number):
        return name, number
    raise ValueError(f"alpha_controller: expected ess:TARGET or alpha-star:MARGIN, as in ess:0.6; got {text!r}")


def alpha_rule(alpha: float, schedule: str, alpha_0: float, controller: str | None) -> str:
    """What sets alpha, in a few words: "0.8", "linear schedule from 0 to 0.8", "ess:0.6"."""
    return controller or (
        f"{alpha:g}" if schedule == "constant" else f"{schedule} schedule from {alpha_0:g} to {alpha:g}"
    )


def mean_ess(logp: Tensor, alpha: float) -> float:
    """Mean effective sample size over the examples of logp [K, N], in particles, as training counts it."""
    from renyi_engine.objectives.loss import data_term
    from renyi_kernels import use_backend

    with use_backend("torch"):  # in fp64 on the CPU, whatever path the training takes
        return data_term(logp.double(), alpha, logp.shape[1])[1].ess.mean().item()


def alpha_of_ess(logp: Tensor, ess: float, low: float, high: float) -> float:
    """The alpha from `low` to `high` at which `mean_ess` of logp [K, N] is `ess`, or the end that is nearest to it.

    There is one: of each example, d log(ESS) / d alpha = 2 (E_alpha[s] - E_{2 alpha}[s]) <= 0, with E_a the mean of the
    log-likelihood s under softmax_k(a s), which rises with a. Identical particles have K at every alpha: `high`.
    """
    from scipy.optimize import brentq  # machines that only run benchmarks lack it

    def excess(alpha: float) -> float:
        return mean_ess(logp, alpha) - ess

    if excess(high) >= 0.0:
        return high
    if excess(low) <= 0.0:
        return low
    return float(brentq(excess, low, high))
