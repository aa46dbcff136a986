"""lora_linears: frozen maps of one input with all their updates, as the engine runs q/k/v and gate/up.

K particles, M rows a particle, I/O in/out features (O of each map), R rank. The adapters are in fp32.
"""

from __future__ import annotations

from functools import partial

import torch
from torch.nn.functional import linear

from csrc_bench.measure import OpSuite, Variant, variants_of_op
from renyi_kernels import lora_linears, reference

SCALING = 2.0


def shapes(device, tiny):
    def make(name, K, M, I, O, R):
        return {"name": name, "K": K, "M": M, "I": I, "O": O, "R": R, "dtype": "bfloat16"}

    if tiny:
        return [make("bar_tiny", 2, 5, 8, (12, 4), 2)]
    if device == "cpu":
        return [
            make("bar_smollm2_gate_up", 8, 256, 576, (1536, 1536), 8),
            make("smollm2_qkv", 8, 256, 576, (576, 192, 192), 8),
            make("smollm2_down", 8, 256, 1536, (576,), 8),
        ]
    return [
        make("bar_qwen2_gate_up", 16, 1024, 1536, (8960, 8960), 8),
        make("bar_qwen2_qkv", 16, 1024, 1536, (1536, 256, 256), 8),
        make("bar_qwen2_down", 16, 1024, 8960, (1536,), 8),
        *(make(f"qwen2_gate_up_k{K}", K, 1024, 1536, (8960, 8960), 16) for K in (1, 2, 4, 8, 16, 32)),
        make("llama3_gate_up", 8, 1024, 4096, (14336, 14336), 8),
    ]


def inputs(shape, device, generator):
    K, M, I, O, R = (shape[k] for k in "KMIOR")
    draw = partial(torch.randn, generator=generator, device=device)
    dtype = getattr(torch, shape["dtype"])
    x = draw(K, M, I).to(dtype).requires_grad_()
    weights = [(draw(o, I) * I**-0.5).to(dtype) for o in O]
    A = [(draw(K, R, I) * I**-0.5).requires_grad_() for _ in O]
    B = [(draw(K, o, R) * R**-0.5).requires_grad_() for o in O]
    return [x, *weights, *A, *B]


def on_lists(shape, function):
    """Turns function(x, weights, A, B) into a function of all tensors one after the other."""
    n = len(shape["O"])
    return lambda x, *rest: tuple(function(x, rest[:n], rest[n : 2 * n], rest[2 * n :]))


def naive(shape):
    none = [None] * len(shape["O"])
    return on_lists(shape, lambda x, W, A, B: reference.lora_linears(x, W, none, A, B, SCALING))


def ours(shape, backend):
    none = [None] * len(shape["O"])
    return on_lists(
        shape, lambda x, W, A, B: lora_linears(x, list(W), none, list(A), list(B), SCALING, backend=backend)
    )


def baddbmm_(shape):
    def run(x, W, A, B):
        for w, a, b in zip(W, A, B, strict=True):
            shrunk = torch.bmm(x, a.to(x.dtype).mT)
            yield linear(x, w).baddbmm_(shrunk, b.to(x.dtype).mT, alpha=SCALING)

    return on_lists(shape, run)


def vmap(shape):
    def one(x, w, a, b):
        return linear(x, w) + SCALING * (x @ a.to(x.dtype).mT) @ b.to(x.dtype).mT

    each = torch.vmap(one, in_dims=(0, None, 0, 0))
    return on_lists(shape, lambda x, W, A, B: [each(x, *maps) for maps in zip(W, A, B, strict=True)])


def loop(shape):
    """One particle after the other, as PEFT's layer computes after set_adapter, with adapters in fp32."""

    def one(x, w, a, b):
        return (linear(x, w) + linear(linear(x.to(a.dtype), a), b) * SCALING).to(x.dtype)

    def run(x, W, A, B):
        for w, a, b in zip(W, A, B, strict=True):
            yield torch.stack([one(x[k], w, a[k], b[k]) for k in range(len(x))])

    return on_lists(shape, run)


def gemms(shape, direction):
    """The frozen maps alone: x W^T forward, dY W backward, on the rows of all particles."""
    gradients = {}

    def run(x, *rest):
        rows, weights = x.detach().flatten(0, 1), rest[: len(shape["O"])]
        if direction != "backward":
            for w in weights:
                rows @ w.mT
        if direction != "forward":
            for w in weights:
                if w.shape not in gradients:
                    gradients[w.shape] = torch.ones(len(rows), len(w), dtype=w.dtype, device=w.device)
                gradients[w.shape] @ w

    return run


def variants(device):
    return variants_of_op(device, ours, naive, gemms) | {
        "baddbmm_": Variant("peer", baddbmm_),
        "vmap": Variant("peer", vmap),
        "loop": Variant("peer", loop),
    }


SUITE = OpSuite("lora_linears", shapes, inputs, naive, variants, directions=("both", "graph", "forward", "backward"))


def test_speed(point, measured):
    measured(point)
