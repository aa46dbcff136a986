"""Calls of ops, drawn at random from a seed and a number: dtypes, sizes, values, and how they lie in memory."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from renyi_kernels import IGNORE_INDEX

ON_GPU = torch.cuda.is_available()
SHARE_OF_TRITON = 0.05
"""Of all calls: the interpreter takes 100 times as long as the torch path."""
Tensors = list[Tensor]


@dataclass
class Call:
    """One call of an op on inputs of its own."""

    text: str
    """The inputs in one line: dtypes, shapes, strides."""
    leaves: Tensors
    """The inputs that may require gradients."""
    constants: Tensors
    """The other inputs."""
    run: Callable[[Tensors], Sequence[Tensor]]
    check: Callable[[Sequence[Tensor], Tensors, Sequence[Tensor | None]], None]
    """Of outputs, upstream gradients of the differentiable ones, and gradients of the leaves: raises Wrong, or not."""
    plain: Callable[[Tensors], Sequence[Tensor]]
    """The differentiable outputs, by the reference, of leaves in fp64."""
    num_differentiable: int = 1
    must_refuse: bool = False
    may_refuse: bool = False
    tame: bool = True
    """Whether forward-mode and second derivatives are compared too."""


class Draw:
    """Everything random about a call, from a seed and its number."""

    def __init__(self, seed: int, number: int) -> None:
        self.random = random.Random(f"{seed}/{number}")
        self.generator = torch.Generator().manual_seed(self.random.getrandbits(62))
        self.backend = "triton" if self.chance(SHARE_OF_TRITON) else "torch"
        self.device = "cuda" if self.backend == "triton" and ON_GPU else "cpu"

    def chance(self, probability: float) -> bool:
        return self.random.random() < probability

    def one_of(self, *choices: Any) -> Any:
        return self.random.choice(choices)

    def size(self, most: int) -> int:
        """From 1; often 1 itself, or beside a power of two."""
        if self.chance(0.3):
            return min(most, self.one_of(1, 1, 2, 3, 7, 8, 9, 15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 128, 129))
        return self.random.randint(1, most)

    def count(self, most: int) -> int:
        """A size that may be 0."""
        return 0 if self.chance(0.05) else self.size(most)

    def dtype(self) -> torch.dtype:
        if self.backend == "triton":
            # the interpreter rounds bf16 wrongly
            return self.one_of(torch.float32, torch.float16, torch.bfloat16 if ON_GPU else torch.float32)
        return self.one_of(torch.float32, torch.float64, torch.bfloat16, torch.float16)

    def floating(self) -> torch.dtype:
        """Any dtype that may stand beside that of the other inputs."""
        wide = [torch.float32, torch.float16, torch.float64]
        return self.one_of(*wide, torch.float32 if self.backend == "triton" and not ON_GPU else torch.bfloat16)

    def uniform(self, *shape: int) -> Tensor:
        return torch.rand(shape, generator=self.generator, dtype=torch.float64)

    def normal(self, *shape: int, dtype: torch.dtype, size: float = 1.0) -> Tensor:
        """Normals of standard deviation `size`, at times with zeros among them, or the same along an axis."""
        x = size * torch.randn(shape, generator=self.generator, dtype=torch.float64)
        if self.chance(0.1):
            x = x * (self.uniform(*shape) < 0.5)
        x = x.to(dtype)
        if x.dim() and x.numel() and self.chance(0.1):
            return x.narrow(self.random.randrange(x.dim()), 0, 1).to(self.device).expand(shape)
        return self.laid_out(x)

    def laid_out(self, x: Tensor) -> Tensor:
        """The same values, perhaps sliced out of more, transposed in memory or behind an offset."""
        if x.dim() == 0 or self.chance(0.4):
            return x.to(self.device)
        axes = list(range(x.dim()))
        if self.chance(0.5):
            self.random.shuffle(axes)
        slices = [slice(self.one_of(0, 0, 1, 5), None, self.one_of(1, 1, 2, 3)) for _ in axes]
        sizes = [part.start + x.shape[axis] * part.step for axis, part in zip(axes, slices, strict=True)]
        # not NaN beside bf16: PyTorch's own product on AMX reads a row beyond its end, times zero
        gap = 1.0 if not x.is_floating_point() else 3e4 if x.dtype == torch.bfloat16 else math.nan
        memory = torch.full(sizes, gap, dtype=x.dtype, device=self.device)
        view = memory[tuple(slices)].permute([axes.index(axis) for axis in range(x.dim())])
        return view[tuple(slice(0, length) for length in x.shape)].copy_(x)

    def labels(self, *shape: int, num_vocabulary: int) -> Tensor:
        labels = torch.randint(0, max(num_vocabulary, 1), shape, generator=self.generator)
        labels[self.uniform(*shape) >= self.one_of(0.0, 0.3, 0.8, 0.8, 1.0)] = IGNORE_INDEX
        return self.laid_out(labels)

    def mask(self, *shape: int) -> Tensor:
        dtype = self.one_of(torch.bool, torch.bool, torch.int64, torch.uint8, torch.float32, torch.int32)
        counted = self.uniform(*shape) < self.one_of(0.0, 0.5, 0.5, 0.9, 1.0)
        return self.laid_out(counted.to(dtype) * (1 if dtype == torch.bool else self.one_of(1, 1, 2)))


def look(**values: Any) -> str:
    """How the arguments look, in one line."""
    return ", ".join(f"{name}={_look(value)}" for name, value in values.items())


def _look(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(map(_look, value)) + "]"
    if not isinstance(value, Tensor):
        return repr(value)
    offset = f" offset {value.storage_offset()}" if value.storage_offset() else ""
    strides = "" if value.is_contiguous() else f" strides {list(value.stride())}"
    return f"{str(value.dtype).removeprefix('torch.')}{list(value.shape)}{strides}{offset}"
