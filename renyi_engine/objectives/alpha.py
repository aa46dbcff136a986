"""What alpha is at each step. A schedule depends on the step alone; a controller follows the particles.

All micro-batches of a step have the same alpha, so a controller can only learn from the steps before. Settings are
checked before torch is imported: only functions that compute import it.

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
"""How many steps' examples `EssController` looks at. With too few, all examples may be alike; with too many, the
particles have moved meanwhile."""
MAX_RISE, MAX_FALL = 1.05, 1.2
"""The largest factors by which `EssController` raises and lowers alpha in one step. Alpha rises slowly: particles that
start alike do not show yet which alpha they will need, and a too large one gives all examples to a single particle."""
MIN_ALPHA = 1e-4
"""`EssController` never sets a lower alpha. At this one, particles 10^4 nats apart still share an example."""


class Coupling(ABC):
    """What sets alpha. The trainer calls `at` before each step, and `observe` after it."""

    @abstractmethod
    def at(self, step: int) -> float:
        """The alpha of `step`. Steps are counted from 0."""

    def observe(self, logp: Tensor) -> None:  # noqa: B027 (only EssController needs it)
        """Take note of the log-likelihoods [K, N] of a step's examples, in nats."""

    @abstractmethod
    def state(self) -> dict[str, Any]:
        """What a resumed run has to know, in values that JSON keeps exactly."""

    @abstractmethod
    def restore(self, state: Mapping[str, Any]) -> None:
        """Continue from what `state` returned."""


class Schedule(Coupling):
    """Goes from `start` to `end` in `num_steps` steps, along a line or half a cosine. After that, alpha is `end`."""

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
        return {"num_steps": self.num_steps}  # a run that is resumed with more steps keeps its schedule

    def restore(self, state: Mapping[str, Any]) -> None:
        self.num_steps = state["num_steps"]


class EssController(Coupling):
    """Keeps the mean effective sample size of the training examples at `target` * K.

    After each step alpha moves to the value at which the examples of the last `POOL_STEPS` steps have this mean. It
    rises by a factor of at most `MAX_RISE`, falls by at most `MAX_FALL`, and stays from `MIN_ALPHA` to `alpha_max`.
    The particles have equal weights: with others the ESS is below K even at alpha = 0, and may rise with alpha.

    Raises:
        ValueError: K particles cannot have this `target`, or `alpha` is not from `MIN_ALPHA` to `alpha_max`.
    """

    def __init__(self, target: float, num_particles: int, alpha: float, alpha_max: float) -> None:
        if not 1.0 / num_particles < target < 1.0:
            raise ValueError(
                f"alpha_controller: expected ess:TARGET with TARGET above 1/{num_particles} and below 1, because it is "
                f"the effective sample size, from 1 to {num_particles}, divided by num_particles; got {target:g}"
            )
        if not MIN_ALPHA <= alpha <= alpha_max:
            raise ValueError(
                f"alpha: expected a number from {MIN_ALPHA:g} to alpha_max ({alpha_max:g}), because alpha_controller "
                f"ess:{target:g} starts with it; got {alpha:g}"
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
    """Stays `margin` above the critical alpha* of (13), where particles that differ begin to have the lower loss (12).

    At step 0 and then every `num_steps` steps, alpha becomes max(`estimate(step)`, 0) + margin, at most `alpha_max`.

    Raises:
        ValueError: `margin` is below 0, or not below `alpha_max`.
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
    """("ess", TARGET) or ("alpha-star", MARGIN) from the text of the flag. Raises ValueError for any other text."""
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
    """The mean effective sample size over the examples of logp [K, N], in particles, as training computes it."""
    from renyi_engine.objectives.loss import data_term
    from renyi_kernels import use_backend

    with use_backend("torch"):  # in fp64 on the CPU, whatever backend the training uses
        return data_term(logp.double(), alpha, logp.shape[1])[1].ess.mean().item()


def alpha_of_ess(logp: Tensor, ess: float, low: float, high: float) -> float:
    """The alpha from `low` to `high` at which `mean_ess` of logp [K, N] is `ess`; if there is none, the nearer end.

    There is at most one, because the ESS of an example falls as alpha rises: d log(ESS) / d alpha = 2 (E_alpha[s] -
    E_{2 alpha}[s]) <= 0. Here E_a is the mean of the log-likelihood s under softmax_k(a s), which rises with a.
    Identical particles have the ESS K at every alpha: the result is then `high`.
    """
    from scipy.optimize import brentq  # machines that only run benchmarks lack it

    def excess(alpha: float) -> float:
        return mean_ess(logp, alpha) - ess

    if excess(high) >= 0.0:
        return high
    if excess(low) <= 0.0:
        return low
    return float(brentq(excess, low, high))
