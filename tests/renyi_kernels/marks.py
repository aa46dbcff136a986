"""What tests of several ops run over: paths of an op and the precision they are tested in, inputs, alphas."""

from __future__ import annotations

import pytest
import torch

ALPHAS = [0.0, 1e-8, 0.3, 0.8, 1.0, 3.0]

every_alpha = pytest.mark.parametrize("alpha", ALPHAS)
every_x = pytest.mark.parametrize("shared_x", [False, True], ids=["own_x", "shared_x"])
every_backend = pytest.mark.parametrize("backend", ["torch", "reference", "triton"])
fast_paths = pytest.mark.parametrize("backend", ["torch", "triton"])
# the kernels have no fp64
fp64_paths = pytest.mark.parametrize("backend", ["torch", "reference"])
every_path = pytest.mark.parametrize(
    ("backend", "dtype", "relative"),
    [
        ("torch", torch.float64, 1e-12),
        ("reference", torch.float64, 1e-12),
        ("torch", torch.float32, 1e-5),
        ("triton", torch.float32, 1e-5),
    ],
    ids=str,
)
no_bf16_in_the_interpreter = pytest.mark.skipif(
    not torch.cuda.is_available(), reason="Triton's interpreter gets bf16 wrong, its rounding and its matrix products"
)
low_precision_paths = pytest.mark.parametrize(
    ("backend", "dtype"),
    [
        ("torch", torch.bfloat16),
        ("torch", torch.float16),
        ("triton", torch.float16),
        pytest.param("triton", torch.bfloat16, marks=no_bf16_in_the_interpreter),
    ],
    ids=str,
)
