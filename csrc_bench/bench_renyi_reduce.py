"""renyi_reduce: from token log-probabilities to the coupled loss. K particles, B sequences, T tokens."""

from __future__ import annotations

import math

import torch

from csrc_bench.measure import OpSuite, Variant, copies, device_type, variants_of_op
from renyi_kernels import reference, renyi_reduce

ALPHA = 0.8


def shapes(device, tiny):
    def make(name, K, B, T):
        return {"name": name, "K": K, "B": B, "T": T, "dtype": "float32"}

    if tiny:
        return [make("bar_tiny", 2, 3, 4)]
    if device == "cpu":
        return [make("bar_step", 8, 2, 128), make("large", 16, 16, 512)]
    return [make("bar_step", 16, 4, 256), *(make(f"k{K}", K, 16, 512) for K in (1, 2, 4, 8, 16, 32, 64))]


def inputs(shape, device, generator):
    logp = torch.randn(shape["K"], shape["B"], shape["T"], generator=generator, device=device)
    # the sums differ by a few nats, so that the responsibilities are neither uniform nor one-hot
    return [(-10 + logp * shape["T"] ** -0.5).requires_grad_()]


def naive(shape):
    return lambda logp: reference.renyi_reduce(logp.sum(-1), ALPHA)[0]


def ours(shape, backend):
    return lambda logp: renyi_reduce(logp, ALPHA, backend=backend).loss


def logsumexp(shape):
    """The obvious formula, in fp32. It loses every digit at a small alpha."""
    return lambda logp: -(torch.logsumexp(ALPHA * logp.sum(-1), dim=0) - math.log(shape["K"])) / ALPHA


def copy(shape, direction):
    """Reads every log-probability in the forward, and writes every gradient in the backward."""
    entries = shape["K"] * shape["B"] * shape["T"] * (2 if direction == "both" else 1)
    return copies(4 * entries, device_type())


def variants(device):
    return variants_of_op(device, ours, naive, copy) | {"logsumexp": Variant("peer", logsumexp)}


SUITE = OpSuite("renyi_reduce", shapes, inputs, naive, variants)


def test_speed(point, measured):
    measured(point)
