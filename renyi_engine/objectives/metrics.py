"""The names of what a run measures. A name is made here and nowhere else; every `Task` declares those that it records.

A name is a key in a line of metrics.jsonl; a line of an evaluation has it behind `EVAL`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

EVAL = "eval_"


@dataclass(frozen=True)
class Metric:
    """One measured quantity.

    Attributes:
        name: its key in a line of metrics.jsonl.
        unit: what it is counted in.
        per_particle: whether the line holds a list with one number for each particle.
        better: which way an ensemble improves; None where neither way is better.
    """

    name: str
    unit: str
    per_particle: bool = False
    better: Literal["lower", "higher"] | None = None

    @property
    def of_particles(self) -> Metric:
        """The same quantity for each particle. The metric itself is the mean over the particles."""
        return Metric(of_particles(self.name), self.unit, per_particle=True)


def of_particles(name: str) -> str:
    """The name of the numbers of each particle, in a line that holds their mean under `name`."""
    return f"particle_{name}"


class Nll(NamedTuple):
    """Negative log-likelihoods: of the mixture (alpha = 1, Lemma 1), the particles' mean, and each particle's."""

    mixture: Metric
    mean_particle: Metric
    particles: Metric


def nll_per(label: str) -> Nll:
    """The metrics of a task whose log-likelihoods are counted a `label`: a token, or a pair."""
    unit = f"nats a {label}"
    return Nll(
        Metric(f"mixture_nll_nats_per_{label}", unit, better="lower"),
        Metric(f"mean_particle_nll_nats_per_{label}", unit, better="lower"),
        Metric(f"particle_nll_nats_per_{label}", unit, per_particle=True),
    )


LOSS = Metric("loss_nats", "nats an example", better="lower")
ESS = Metric("ess_particles", "particles")
