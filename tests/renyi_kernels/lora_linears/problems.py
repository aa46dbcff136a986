"""Maps and adapters that lora_linears is tested with.

Layout: K particles, M rows, I/O in/out features, R rank, j a map.
"""

from __future__ import annotations

import torch

from renyi_kernels import lora_linears

SCALING = 1.75
# what lora_linears gives is held together for comparison: all maps' outputs beside each other
O, R, BIASED = (7, 3, 6), (2, 5, 1), (True, False, True)


class Problem:
    """x, weights, biases, A, B: of one dtype, on one device, and the op on them."""

    def __init__(self, x, weights, biases, A, B):
        self.x, self.weights, self.biases, self.A, self.B = x, weights, biases, A, B

    def map(self, f):
        each = lambda tensors: [None if t is None else f(t) for t in tensors]
        return Problem(f(self.x), each(self.weights), each(self.biases), each(self.A), each(self.B))

    @property
    def trained(self):
        return [self.x, *self.A, *self.B]

    def with_trained(self, x, *adapters):
        n = len(self.A)
        return Problem(x, self.weights, self.biases, list(adapters[:n]), list(adapters[n:]))

    def maps(self, backend):
        return lora_linears(self.x, self.weights, self.biases, self.A, self.B, SCALING, backend=backend)

    def all_maps(self, backend):
        return lambda *trained: torch.cat(self.with_trained(*trained).maps(backend), dim=-1)
