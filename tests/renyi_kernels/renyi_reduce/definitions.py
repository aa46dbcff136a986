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


def oracle(s, alpha):
    """(loss [B], responsibilities [K, B]) straight from the definitions, in 60 digits."""
    losses, columns = [], []
    with mpmath.workdps(60):
        for column in s.double().T.tolist():
            masses = [mpmath.exp(mpmath.mpf(alpha) * mpmath.mpf(x)) for x in column]
            total = mpmath.fsum(masses)
            if alpha == 0.0:
                losses.append(float(-mpmath.fsum(map(mpmath.mpf, column)) / len(column)))
            else:
                losses.append(float(-mpmath.log(total / len(column)) / mpmath.mpf(alpha)))
            columns.append([float(mass / total) for mass in masses])
    K, B = s.shape
    return torch.tensor(losses, dtype=torch.float64), torch.tensor(columns, dtype=torch.float64).view(B, K).T


def scale(s):
    """[B]: the magnitude that rounding errors of a column go with."""
    return s.abs().amax(dim=0).clamp(min=1.0)


def variance(x):
    return (x - x.mean(dim=0)).square().mean(dim=0)
