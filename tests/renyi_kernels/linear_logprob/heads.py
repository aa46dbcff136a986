"""Heads that linear_logprob is tested with, and on which paths."""

from __future__ import annotations

import pytest
import torch

IGNORE = -100
HEADS = {
    "plain": {},
    "bias": {"bias": True},
    "softcap": {"logit_softcap": 4.0},
    "scale": {"logit_scale": 0.4},
    "all": {"bias": True, "logit_softcap": 3.0, "logit_scale": 1.7},
    "negative_scale": {"bias": True, "logit_softcap": 7.5, "logit_scale": -0.6},
}
every_head = pytest.mark.parametrize("head", HEADS.values(), ids=HEADS)


LOW_PRECISION = [torch.bfloat16, torch.float16]
# the kernels have no fp64; the tolerance is absolute, in nats, as are fp32's 1e-5
precise_paths = pytest.mark.parametrize(
    ("backend", "dtype", "tolerance"), [("torch", torch.float64, 1e-12), ("triton", torch.float32, 1e-5)], ids=str
)


def cast(head, dtype):
    return {name: x.to(dtype) if isinstance(x, torch.Tensor) else x for name, x in head.items()}


def mib_of_rows(rows, V, itemsize):
    return rows * V * itemsize / 2**20
