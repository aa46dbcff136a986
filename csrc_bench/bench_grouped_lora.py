"""grouped_lora: base + scaling * (x A_k^T) B_k^T. K particles, M rows a particle, I/O in/out features, R rank."""

from __future__ import annotations

from functools import partial

import torch

from csrc_bench.measure import OpSuite, Variant, copies, device_type, variants_of_op
from renyi_kernels import grouped_lora, reference

SCALING = 2.0


def shapes(device, tiny):
    def make(name, K, M, I, O, R):
        return {"name": name, "K": K, "M": M, "I": I, "O": O, "R": R, "dtype": "bfloat16"}

    if tiny:
        return [make("bar_tiny", 2, 5, 8, 12, 2)]
    if device == "cpu":
        return [make("bar_smollm2_up", 8, 256, 576, 1536, 8), make("smollm2_down", 8, 256, 1536, 576, 8)]
    return [
        make("bar_qwen2_up", 16, 1024, 1536, 8960, 8),
        make("bar_qwen2_down", 16, 1024, 8960, 1536, 16),
        *(make(f"qwen2_o_r{R}_k{K}", K, 1024, 1536, 1536, R) for R in (8, 16) for K in (1, 2, 4, 8, 16, 32, 64)),
        *(make(f"qwen2_o_m{M}", 16, M, 1536, 1536, 8) for M in (512, 2048, 4096, 8192)),
        make("smollm2_up", 16, 1024, 576, 1536, 8),
        make("llama3_up", 8, 1024, 4096, 14336, 8),
    ]


def inputs(shape, device, generator):
    K, M, I, O, R = (shape[k] for k in "KMIOR")
    draw = partial(torch.randn, generator=generator, device=device)
    x, A, B, base = draw(K, M, I), draw(K, R, I) * I**-0.5, draw(K, O, R) * R**-0.5, draw(K, M, O)
    dtype = getattr(torch, shape["dtype"])
    return [*(t.to(dtype).requires_grad_() for t in (x, A, B)), base.to(dtype)]


def naive(shape):
    return lambda x, A, B, base: reference.grouped_lora(x, A, B, SCALING, base)


def ours(shape, backend):
    return lambda x, A, B, base: grouped_lora(x, A, B, SCALING, base, backend=backend)


def baddbmm(shape):
    def run(x, A, B, base):
        return torch.baddbmm(base, torch.bmm(x, A.mT), B.mT, alpha=SCALING)

    return run


def baddbmm_(shape):
    """In place, into the same buffer at every call. The check sees the first result, which is base + update."""
    buffers = {}

    def run(x, A, B, base):
        buffer = buffers.setdefault(base.data_ptr(), base.clone())
        return buffer.detach().baddbmm_(torch.bmm(x, A.mT), B.mT, alpha=SCALING)

    return run


def vmap(shape):
    return torch.vmap(lambda x, A, B, base: base + SCALING * (x @ A.mT) @ B.mT)


def loop(shape):
    """One particle after the other, as PEFT's layer computes after set_adapter."""

    def run(x, A, B, base):
        linear = torch.nn.functional.linear
        return torch.stack([base[k] + linear(linear(x[k], A[k]), B[k]) * SCALING for k in range(len(A))])

    return run


def copy(shape, direction):
    """Moves every large tensor once: x, base and the result; in the backward the two gradients, and x again."""
    K, M, I, O = (shape[k] for k in "KMIO")
    elements = {"forward": I + 2 * O, "backward": O + 2 * I, "both": 3 * I + 3 * O}[direction] * K * M
    return copies(elements * getattr(torch, shape["dtype"]).itemsize, device_type())


def variants(device):
    return variants_of_op(device, ours, naive, copy) | {
        "baddbmm": Variant("peer", baddbmm),
        "baddbmm_": Variant("peer", baddbmm_),
        "vmap": Variant("peer", vmap),
        "loop": Variant("peer", loop),
    }


SUITE = OpSuite("grouped_lora", shapes, inputs, naive, variants, directions=("both", "graph", "forward", "backward"))


def test_speed(point, measured):
    measured(point)
