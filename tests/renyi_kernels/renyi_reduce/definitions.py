"""What the tests of renyi_reduce run over, and the definitions that they hold it to.

Layout: K particles, B sequences.
"""

from __future__ import annotations

import mpmath
import pytest
import torch
from hypothesis import settings, strategies as st

from ..marks import ALPHAS

POSITIVE_ALPHAS = ALPHAS[1:]
SPREADS = [0.0, 1e-3, 1.0, 30.0, 1e4]
DTYPES = [torch.float64, torch.float32]
RELATIVE = {torch.float64: 1e-12, torch.float32: 1e-6}
TINY = 1e-37  # below it fp32 is subnormal

property_test = settings(max_examples=25, deadline=None, derandomize=True)
every_positive_alpha = pytest.mark.parametrize("alpha", POSITIVE_ALPHAS)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
# the kernels take no fp64, and work in it inside
every_path = pytest.mark.parametrize(
    ("backend", "dtype"), [*(("torch", dtype) for dtype in DTYPES), ("triton", torch.float32)], ids=str
)


@st.composite
def log_likelihoods(draw, min_particles=1, spreads=SPREADS):
    """[K, B] fp64, none above 0, so that a loss is a sum of terms of one sign and a relative error means something."""
    K, B = draw(st.integers(min_particles, 9)), draw(st.integers(0, 5))
    unit = st.floats(0.0, 1.0, allow_subnormal=False) | st.sampled_from([0.0, 0.5, 1.0])
    units = draw(st.lists(unit, min_size=K * B, max_size=K * B))
    offset = draw(st.sampled_from([0.0, 3.7, 1e4]))
    return -(offset + draw(st.sampled_from(spreads)) * torch.tensor(units, dtype=torch.float64).view(K, B))


@st.composite
def mixtures(draw, min_particles=1, spreads=SPREADS):
    """(s [K, B] as `log_likelihoods`, weights [K]) in fp64. The best particle of an example may have almost none."""
    s = draw(log_likelihoods(min_particles, spreads))
    K, B = s.shape
    part = st.floats(0.01, 1.0) | st.sampled_from([0.0, 1e-30, 1.0])
    parts = torch.tensor(draw(st.lists(part, min_size=K, max_size=K)), dtype=torch.float64)
    if B and draw(st.booleans()):
        parts[s[:, 0].argmax()] = 1e-30
    if not parts.any():
        parts[-1] = 1.0
    return s, parts / parts.sum()


def oracle(s, alpha, weights=None):
    """(loss [B], responsibilities [K, B]) straight from the definitions, in 60 digits."""
    losses, columns = [], []
    with mpmath.workdps(60):
        w = [mpmath.mpf(x) for x in ([1.0] * len(s) if weights is None else weights.double().tolist())]
        whole = mpmath.fsum(w)
        for column in s.double().T.tolist():
            x = [mpmath.mpf(value) for value in column]
            masses = [w * mpmath.exp(mpmath.mpf(alpha) * x) for w, x in zip(w, x, strict=True)]
            total = mpmath.fsum(masses)
            if alpha == 0.0:
                losses.append(float(-mpmath.fdot(w, x) / whole))
            else:
                losses.append(float(-mpmath.log(total / whole) / mpmath.mpf(alpha)))
            columns.append([float(mass / total) for mass in masses])
    K, B = s.shape
    return torch.tensor(losses, dtype=torch.float64), torch.tensor(columns, dtype=torch.float64).view(B, K).T


def scale(s):
    """[B]: the magnitude that rounding errors of a column go with."""
    return s.abs().amax(dim=0).clamp(min=1.0)


def variance(x, weights=None):
    if weights is None:
        weights = x.new_full((len(x),), 1 / len(x))
    return weights @ (x - weights @ x).square()
