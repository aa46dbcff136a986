"""Words that several pages use, each as (word, meaning): a reader of one page knows them on the others."""

from __future__ import annotations

import math
from collections.abc import Sequence

PARTICLE = (
    "Particle",
    "One small trainable adapter on the frozen language model. An ensemble has several of them, K in formulas. Each "
    "keeps its colour on the whole page.",
)
BASE = ("Base", "The frozen language model itself, without an adapter. Training never changes it.")
MIXTURE = (
    "Mixture",
    "The particles as one model: it gives the average of their probabilities. Each particle counts by its weight; the "
    "weights are equal, unless the page says that they are not.",
)
NLL = (
    "NLL, in nats",
    "Negative log-likelihood: minus the natural logarithm of the probability that was given to what the data really "
    "say. 0 means certain and right; 0.69 is a coin toss; lower is better.",
)
ALPHA = (
    "alpha",
    "How strongly training couples the particles. At 0 each one trains on its own. The larger alpha is, the more of an "
    "example goes to the particle that explains it best. At 1 the loss is the NLL of the mixture.",
)
RESPONSIBILITY = (
    "Responsibility",
    "The part of an example that goes to a particle, from 0 to 1: the better the particle explains the example, the "
    "more. For each example, the responsibilities of all particles add up to 1.",
)
ESS = (
    "Effective sample size",
    "ESS: among how many particles an example is divided. It is 1 when one particle takes it all, and K when all take "
    "the same.",
)


def unequal(particle_weights: Sequence[float]) -> str:
    """A sentence that says from where to where the particles' weights reach; "" if they are equal, or if there are no
    particles."""
    least, most = min(particle_weights, default=0.0), max(particle_weights, default=0.0)
    if math.isclose(least, most):
        return ""
    smallest, largest = (f"{weight:.3g} (particle {particle_weights.index(weight)})" for weight in (least, most))
    return f"In the mixture the particles have unequal weights, from {smallest} to {largest}."
