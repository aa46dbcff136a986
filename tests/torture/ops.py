"""Every op on random, strided, mixed and extreme inputs, forward and backward, against fp64.

How large an error may be follows from what rounding can do: for a sum of products, the limit is a multiple of the same
sum of absolute values. The memory between the entries of a strided input is NaN, and so is new memory that was not yet
written. So an op that reads a wrong cell gives NaN.

Layout: K particles, B sequences, T tokens, N labels, M rows, I/O in/out features, R rank, D hidden size, V vocabulary.
"""

from __future__ import annotations

import math
import os
import random
import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..unwritten_memory import unwritten_memory_is_nan
from .tally import Tally

# off a GPU the kernels run in Triton's interpreter; it has to be chosen before anything imports triton
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

from renyi_kernels import IGNORE_INDEX, grouped_lora, linear_logprob, lora_linears, reference, renyi_loss, renyi_reduce
from renyi_kernels.reference import at_least_fp32

ON_GPU = torch.cuda.is_available()
SHARE_OF_TRITON = 0.05
"""Of all calls: the interpreter takes 100 times as long as the torch path."""
ALPHAS = [0, 0.0, 5e-324, 1e-310, 1e-300, 1e-30, 1e-8, 1e-3, 0.3, 0.8, 1, 3.0, 50.0, 1e4, 1e300, 1.7e308]
LARGE_LOGIT = 20.0
SOFTCAPS = [1e-40, 1e-3, 0.5, 3.0, 30.0, 1e3, 1e6, 1e30]
CLEAR = re.compile(r"(\w+(\[\d+\])?|backend='\w+')(, \w+)*: \S[^\n]*")
"""A refusal is one line that begins with the argument it is about."""

Tensors = list[Tensor]


class Wrong(Exception):
    """A result that is not what fp64 says."""


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


# ---------------------------------------------------------------------- comparing


def exact(x: Tensor) -> Tensor:
    """The same numbers in fp64, on the CPU, one after the other."""
    return x.detach().to("cpu", torch.float64, copy=True).contiguous()


def eps(*dtypes: torch.dtype) -> float:
    return max(torch.finfo(dtype).eps for dtype in dtypes)


def require_close(
    name: str,
    ours: Tensor,
    truth: Tensor,
    allowed: Tensor,
    dtype: torch.dtype,
    largest: Tensor | None = None,
    computed_in: torch.dtype | None = None,
) -> None:
    """Raise Wrong unless each entry is within `allowed` of the truth. An entry may overflow, and is not compared, where
    `largest`, the sum of absolute values, is more than the dtypes hold."""
    if ours.shape != truth.shape:
        raise Wrong(f"{name}: wrong shape: {list(ours.shape)} instead of {list(truth.shape)}")
    if ours.dtype != dtype:
        raise Wrong(f"{name}: wrong dtype: {ours.dtype} instead of {dtype}")
    ours = exact(ours)
    most = min(torch.finfo(dtype).max, torch.finfo(computed_in or dtype).max) / 4
    overflows = (truth.abs() if largest is None else largest) > most
    allowed = allowed + 4 * torch.finfo(dtype).smallest_normal * eps(dtype)
    wrong = ~((ours == truth) | overflows | ((ours - truth).abs() <= allowed))
    if wrong.any():
        at = tuple(wrong.nonzero()[0].tolist())
        kind = "NaN" if ours[at].isnan() else "infinite" if ours[at].isinf() else "wrong"
        raise Wrong(
            f"{name}: {kind}: {ours[at]:.9g} instead of {truth[at]:.9g} at {list(at)} (allowed {allowed[at]:.1e}; "
            f"{int(wrong.sum())} of {wrong.numel()} entries)"
        )


def value_and_gradients(f: Callable[[Tensors], Sequence[Tensor]], leaves: Tensors, upstream: Tensors) -> Tensors:
    """Outputs, then gradients, of a function of fp64."""
    leaves = [x.clone().requires_grad_() for x in leaves]
    outputs = f(leaves)
    found = torch.autograd.grad(outputs, leaves, upstream, allow_unused=True)
    grads = [torch.zeros_like(x) if g is None else g for g, x in zip(found, leaves, strict=True)]
    return [*(x.detach() for x in outputs), *grads]


# ---------------------------------------------------------------------- grouped_lora and lora_linears


def check_sums_of_products(
    formula: Callable[[Tensors, bool, float], Sequence[Tensor]],
    leaves: Tensors,
    dtype: torch.dtype,
    terms: int,
    scaling: float,
) -> Callable[[Sequence[Tensor], Tensors, Sequence[Tensor | None]], None]:
    """The check of an op that is linear in each input: on absolute values (True) it bounds its own rounding errors.

    `formula` takes leaves in fp64, whether it is on absolute values, and a scaling. `dtype` is what the op computes in,
    `terms` as many as are added up for one number, or more.
    """

    def check(outputs: Sequence[Tensor], upstream: Tensors, grads: Sequence[Tensor | None]) -> None:
        gold, up = [exact(x.to(dtype)) for x in leaves], [exact(u) for u in upstream]
        floor = torch.finfo(dtype).smallest_normal
        truth = value_and_gradients(lambda x: formula(x, False, scaling), gold, up)
        absolute = [x.abs().clamp(min=floor) for x in gold], [u.abs().clamp(min=floor) for u in up]
        sizes = value_and_gradients(lambda x: formula(x, True, abs(scaling)), *absolute)
        # what is multiplied by a small scaling at the end must not overflow before
        unscaled = value_and_gradients(lambda x: formula(x, True, max(1.0, abs(scaling))), *absolute)
        dtypes = [dtype] * len(outputs) + [x.dtype for x in leaves]
        underflow = terms * floor * max([1.0, *(x.abs().max().item() for x in (*gold, *up) if x.numel())]) ** 2
        for number, (ours, right, size, largest, kind) in enumerate(
            zip([*outputs, *grads], truth, sizes, unscaled, dtypes, strict=True), start=-len(outputs)
        ):
            if ours is None:
                continue
            name = f"gradient {number}" if number >= 0 else f"output {number + len(outputs)}"
            relative = 8 * eps(dtype, kind) + terms * eps(at_least_fp32(dtype))
            # the scaling may come after the rounding to a narrow type
            rounding = max(1.0, abs(scaling)) * torch.finfo(kind).smallest_normal * eps(kind)
            require_close(name, ours, right, relative * size + underflow + rounding, kind, largest, dtype)

    return check


def _low_rank_sizes(draw: Draw) -> tuple[int, int, int, bool, float]:
    """K, M, I, whether all share x, scaling"""
    most = 150 if draw.chance(0.02) else 33
    scaling = draw.one_of(0.0, 1.0, 2.0, 1.75, -0.5, 1e-3, 16)
    return draw.size(4), draw.count(most), draw.size(most), draw.chance(0.4), scaling


def draw_grouped_lora(draw: Draw) -> Call:
    K, M, I, shared_x, scaling = _low_rank_sizes(draw)
    O, R, dtype, of_A = draw.size(33), draw.size(17), draw.dtype(), None
    if empty := draw.chance(0.03):
        I, O, R = draw.one_of((0, O, R), (I, 0, R), (I, O, 0))
    elif draw.chance(0.03):
        of_A = draw.one_of(torch.float32, torch.float16, torch.int64)
    x = draw.normal(*(() if shared_x else (K,)), M, I, dtype=dtype, size=draw.one_of(1.0, 1.0, 1e-3, 30.0))
    A, B = draw.normal(K, R, I, dtype=of_A or dtype), draw.normal(K, O, R, dtype=dtype)
    base = draw.one_of(None, (K, M, O), (M, O))
    leaves = [x, A, B] if base is None else [x, A, B, draw.normal(*base, dtype=dtype)]

    def formula(leaves: Tensors, absolute: bool, scaling: float) -> Sequence[Tensor]:
        x, A, B, *base = leaves
        return [reference.grouped_lora(x, A, B, scaling, base[0] if base else None)]

    return Call(
        text=look(x=x, A=A, B=B, scaling=scaling, base_out=leaves[3] if base else None),
        leaves=leaves,
        constants=[],
        run=lambda leaves: [grouped_lora(*leaves[:3], scaling, *leaves[3:], backend=draw.backend)],
        check=check_sums_of_products(formula, leaves, dtype, K * (R + M) + I + O + 8, scaling),
        plain=lambda leaves: formula(leaves, False, scaling),
        must_refuse=of_A is not None and of_A != dtype,
        may_refuse=empty,
    )


def draw_lora_linears(draw: Draw) -> Call:
    K, M, I, shared_x, scaling = _low_rank_sizes(draw)
    n, dtype = draw.size(3), draw.dtype()
    O, R = [draw.size(33) for _ in range(n)], [draw.size(9) for _ in range(n)]
    if empty := draw.chance(0.03):
        I, O[-1], R[-1] = draw.one_of((0, O[-1], R[-1]), (I, 0, R[-1]), (I, O[-1], 0))
    x = draw.normal(*(() if shared_x else (K,)), M, I, dtype=dtype, size=draw.one_of(1.0, 1.0, 1e-3, 30.0))
    of_weights = draw.floating() if draw.chance(0.02) else dtype
    weights = [draw.normal(o, I, dtype=of_weights) for o in O]
    biases = [draw.normal(o, dtype=dtype) if draw.chance(0.5) else None for o in O]
    mixed = draw.chance(0.4)
    of = lambda: draw.floating() if mixed else dtype
    A = [draw.normal(K, r, I, dtype=of()) for r in R]
    B = [draw.normal(K, o, r, dtype=of()) for o, r in zip(O, R, strict=True)]
    leaves = [x, *A, *B]

    def run(leaves: Tensors) -> Sequence[Tensor]:
        x, *adapters = leaves
        return lora_linears(x, weights, biases, adapters[:n], adapters[n:], scaling, backend=draw.backend)

    def formula(leaves: Tensors, absolute: bool, scaling: float) -> Sequence[Tensor]:
        x, *adapters = leaves
        fixed = [[None if t is None else exact(t) for t in tensors] for tensors in (weights, biases)]
        if absolute:
            fixed = [[None if t is None else t.abs() for t in tensors] for tensors in fixed]
        outs = reference.lora_linears(x, *fixed, adapters[:n], adapters[n:], scaling)
        return [out.expand(K, *out.shape[-2:]) for out in outs]

    return Call(
        text=look(x=x, weights=weights, biases=biases, A=A, B=B, scaling=scaling),
        leaves=leaves,
        constants=[t for t in (*weights, *biases) if t is not None],
        run=run,
        check=check_sums_of_products(formula, leaves, dtype, K * (sum(R) + M) + I + sum(O) + 8, scaling),
        plain=lambda leaves: formula(leaves, False, scaling),
        num_differentiable=n,
        must_refuse=of_weights != dtype,
        may_refuse=empty,
    )


# ---------------------------------------------------------------------- linear_logprob


@dataclass
class Head:
    """A frozen head, and what rounding in `dtype` can do to the log-probabilities it gives."""

    weight: Tensor
    bias: Tensor | None
    softcap: float | None
    scale: float
    chunk_mib: float
    dtype: torch.dtype
    promised: float | None
    """Largest error of a log-probability, in nats, that is promised where no logit is large."""

    @classmethod
    def draw(cls, draw: Draw, V: int, D: int, dtype: torch.dtype) -> Head:
        tame = draw.chance(0.5)
        size = 1.0 if tame else draw.one_of(0.0, 1e-2, 30.0, 1e3 if dtype == torch.float16 else 1e5)
        return cls(
            draw.normal(V, D, dtype=dtype, size=3 * size / math.sqrt(max(D, 1))),
            draw.normal(V, dtype=dtype) if draw.chance(0.4) else None,
            draw.one_of(None, 3.0, 30.0) if tame else draw.one_of(None, *SOFTCAPS),
            draw.one_of(1.0, 1, 0.4, -0.6) if tame else draw.one_of(1.0, 0.0, 1e-3, -0.6, 30.0),
            draw.one_of(256.0, 256.0, 1e-4),
            dtype,
            1e-5 if tame and dtype != torch.float64 else None,
        )

    @property
    def may_be_refused(self) -> bool:
        """Whether fp32 cannot hold its cap."""
        return self.softcap is not None and self.softcap < torch.finfo(torch.float32).tiny

    @property
    def options(self) -> dict[str, Any]:
        return {"bias": self.bias, "logit_softcap": self.softcap, "logit_scale": self.scale}

    @property
    def constants(self) -> Tensors:
        return [self.weight] if self.bias is None else [self.weight, self.bias]

    @property
    def text(self) -> str:
        return look(weight=self.weight, **self.options, chunk_mib=self.chunk_mib)

    def plain(self, hidden: Tensor, labels: Tensor) -> Tensor:
        bias = None if self.bias is None else exact(self.bias)
        return reference.linear_logprob(hidden, exact(self.weight), labels.cpu(), bias, self.softcap, self.scale)

    def bounds(self, hidden: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """(logp, error allowed of it [...]; d logp / d hidden, error allowed, its sum of absolute values [..., D])"""
        e, W = eps(at_least_fp32(self.dtype)), exact(self.weight)
        (V, D), labels = W.shape, labels.cpu()
        labelled = labels != IGNORE_INDEX
        h = exact(hidden).where(labelled[..., None], 0.0)
        z, size = h @ W.mT, h.abs() @ W.abs().mT
        if self.bias is not None:
            z, size = z + exact(self.bias), size + exact(self.bias).abs()
        z, size, slope = self.scale * z, abs(self.scale) * size, torch.full_like(z, self.scale)
        error, error_of_slope = (D + 8) * e * size, 4 * e * slope.abs()
        if self.softcap is not None:
            tanh = torch.tanh(z / self.softcap)
            z, slope = self.softcap * tanh, slope * (1 - tanh.square())
            error_of_slope = abs(self.scale) * ((2 * error / self.softcap).clamp(max=1) + 16 * e)
            error = error.clamp(max=2 * self.softcap)
        error = (error + 8 * e * z.abs()).amax(dim=-1)
        target = torch.nn.functional.one_hot(labels.where(labelled, 0), V).double()
        log_p = torch.log_softmax(z, dim=-1)
        logp = (log_p * target).sum(dim=-1)
        allowed = 2 * error + 8 * e * (logp.abs() + math.log(V) + 1)
        p, up = log_p.exp(), labelled[..., None]
        error_of_p = (p * torch.expm1((2 * allowed[..., None]).clamp(max=50)) + 8 * e * p).clamp(max=1) + 4 * e * target
        g = slope * (target - p)
        error_of_g = slope.abs() * error_of_p + error_of_slope * (target - p).abs()
        error_of_g += 8 * eps(self.dtype) * g.abs() + torch.finfo(self.dtype).smallest_normal * eps(self.dtype)
        size = (g.abs() @ W.abs()).where(up, 0.0)
        of_gradient = (error_of_g @ W.abs()).where(up, 0.0) + ((V + 8) * e + 8 * eps(self.dtype)) * size
        if self.promised is not None:
            allowed = allowed.where(z.abs().amax(dim=-1) > LARGE_LOGIT, allowed.clamp(max=self.promised))
        return (
            logp.where(labelled, 0.0), allowed.where(labelled, 0.0), (g @ W).where(up, 0.0), of_gradient, size,
        )  # fmt: skip


def check_gradient_of_hidden(ours: Tensor, G: Tensor, error: Tensor, size: Tensor, upstream: Tensor) -> None:
    """Of `Head.bounds`, times what comes from above at each label."""
    u = upstream.abs()[..., None]
    # what the op keeps of G has the dtype of hidden too
    kept = torch.finfo(ours.dtype).smallest_normal * eps(ours.dtype)
    allowed = u * (error + kept) + 8 * eps(ours.dtype) * u * G.abs()
    require_close("gradient of hidden", ours, upstream[..., None] * G, allowed, ours.dtype, size * u.clamp(min=1))


def _vocabulary(draw: Draw) -> int:
    return draw.one_of(2047, 2049, 4097, 8193) if draw.chance(0.02) else draw.size(40)


def draw_linear_logprob(draw: Draw) -> Call:
    lead = [draw.count(4) for _ in range(draw.one_of(0, 1, 1, 2, 3))]
    D, V, dtype = draw.size(33), _vocabulary(draw), draw.dtype()
    if empty := draw.chance(0.03):
        D, V = draw.one_of((0, V), (D, 0))
    head = Head.draw(draw, V, D, dtype)
    hidden = draw.normal(*lead, D, dtype=dtype)
    labels = draw.labels(*lead, num_vocabulary=V)
    stray = False
    if labels.numel() and not empty and draw.chance(0.03):
        labels = labels.clone()
        labels[(0,) * labels.dim()] = draw.one_of(V, -1, -101, 2**40)
        stray = True
    of_weight = draw.floating() if draw.chance(0.02) else dtype
    head.weight = head.weight.to(of_weight)
    unlabelled = (labels == IGNORE_INDEX).cpu()
    blind = not stray and draw.chance(0.2)
    if blind:
        # an op must not look at hidden states that have no label
        hidden = draw.laid_out(hidden.cpu().where(~unlabelled[..., None], draw.one_of(math.nan, math.inf)))

    def run(leaves: Tensors) -> Sequence[Tensor]:
        options = {"chunk_mib": head.chunk_mib, "backend": draw.backend, **head.options}
        return [linear_logprob(leaves[0], head.weight, labels, **options)]

    def check(outputs: Sequence[Tensor], upstream: Tensors, grads: Sequence[Tensor | None]) -> None:
        logp, allowed, *of_gradient = head.bounds(hidden, labels)
        require_close("logp", outputs[0], logp, allowed, at_least_fp32(dtype))
        if grads[0] is not None:
            check_gradient_of_hidden(grads[0], *of_gradient, exact(upstream[0]).where(~unlabelled, 0.0))

    return Call(
        text=look(hidden=hidden, labels=labels) + (" (not finite where no label)" if blind else "") + f", {head.text}",
        leaves=[hidden],
        constants=[*head.constants, labels],
        run=run,
        check=check,
        plain=lambda leaves: [head.plain(leaves[0], labels)],
        must_refuse=of_weight != dtype or stray,
        may_refuse=empty or head.may_be_refused,
        tame=head.promised is not None and not blind and not empty,
    )


# ---------------------------------------------------------------------- renyi_reduce and renyi_loss


def check_reduction(alpha: float, outputs: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    """Hold loss, responsibilities and ess against the definitions, of the logp [K, B] that came with them.

    In extended precision, whose exponents reach beyond those of any alpha. Returns the true responsibilities, 0 where
    no particle gives the example any mass: the loss has no gradient there.
    """
    loss, responsibilities, ess, logp = outputs
    K, B = logp.shape
    s = exact(logp).numpy().astype(np.longdouble)
    if not B:
        require_close("loss", loss, torch.zeros(0).double(), torch.zeros(0), dtype)
        return torch.zeros(K, 0).double()
    impossible = np.isneginf(s).all(axis=0)
    peak = np.where(impossible, 0, s.max(axis=0))
    below = np.where(impossible, 0, s - peak)
    if alpha == 0:
        r, right = np.full_like(s, 1 / np.longdouble(K)), -s.mean(axis=0)
    else:
        scores = np.longdouble(alpha) * below
        right = -peak - np.log1p(np.expm1(scores).mean(axis=0)) / np.longdouble(alpha)
        r = np.exp(scores) / np.exp(scores).sum(axis=0)
    # alpha is brought between 1e-200 and 1e200: a loss above 1e100 nats, where some particles give no mass, counts as
    # infinite, and 1e-199 nats count as none
    right = np.where(impossible | (right > 1e100), np.inf, right)
    loss = loss.where(loss < 1e100, torch.inf)
    in_fp64 = lambda x: torch.from_numpy(np.asarray(x, dtype=np.float64))
    e, truth = eps(dtype), in_fp64(right)
    finite = torch.from_numpy(np.where(np.isfinite(s), abs(s), 0).max(axis=0).astype(np.float64))
    allowed = 8 * e * torch.maximum(truth.abs().where(truth.isfinite(), 0.0), finite) + 1e-199
    require_close("loss", loss, truth, allowed, dtype)
    require_close("responsibilities", responsibilities, in_fp64(r), torch.full((K, B), 8 * e).double(), dtype)
    inverse = in_fp64(1 / np.square(r).sum(axis=0))
    require_close("ess", ess, inverse, 16 * e * inverse, dtype)
    return in_fp64(np.where(impossible, 0, r))


def draw_renyi_reduce(draw: Draw) -> Call:
    K, B = draw.size(9), draw.count(6)
    with_tokens, dtype = draw.chance(0.6), draw.dtype()
    T = draw.count(9) if with_tokens else 1
    alpha = draw.one_of(*ALPHAS)
    refused = draw.chance(0.02)
    given = draw.one_of(-1.0, -1e-300, math.nan, math.inf, True, "1", None) if refused else alpha
    spread = draw.one_of(0.0, 1e-3, 1.0, 1.0, 30.0, 1e4, 1e30)
    if dtype == torch.float16:
        spread = min(spread, 1e4)
    level = draw.one_of(0.0, 3.7, 1e4)
    logp = -(level + spread * draw.uniform(K, B, T).round(decimals=draw.one_of(1, 16)))
    # where the rounding of a sum, times alpha, is much less than what `_roughly` allows of the responsibilities
    tame = spread <= 30 and alpha * T * (level + spread) * eps(at_least_fp32(dtype)) < 1e-3
    if draw.chance(0.15):
        logp[draw.uniform(K, B, T) < draw.one_of(0.1, 0.5)] = -math.inf
        tame = False
    if draw.chance(0.1):
        logp[:, draw.uniform(B) < 0.5] = -math.inf
        tame = False
    mask = draw.mask(B, T) if with_tokens and draw.chance(0.8) else None
    logp = logp.to(dtype)
    counted = torch.ones(B, T, dtype=torch.bool) if mask is None else mask.cpu().bool()
    if mask is not None and draw.chance(0.3):
        logp = logp.where(counted, draw.one_of(math.nan, -math.inf, math.inf))
        tame = False
    logp = draw.laid_out(logp if with_tokens else logp.squeeze(-1))

    def summed(x: Tensor) -> Tensor:
        return x.where(counted, 0.0).sum(dim=-1) if with_tokens else x

    def check(outputs: Sequence[Tensor], upstream: Tensors, grads: Sequence[Tensor | None]) -> None:
        wide, tokens = at_least_fp32(dtype), exact(logp)
        size = summed(tokens.abs().where(tokens.isfinite(), 0.0))
        require_close("logp", outputs[3], summed(tokens), (T if with_tokens else 0) * eps(wide) * size, wide)
        r = check_reduction(alpha, outputs, wide)
        if grads[0] is not None:
            right = -exact(upstream[0]) * r
            if with_tokens:
                right = right[..., None].expand(K, B, T).where(counted, 0.0)
            # responsibilities are kept in fp32: what is below their smallest number is zero
            kept = 8 * eps(wide, dtype) * right.abs() + eps(wide) * exact(upstream[0]).abs().view(
                (1, B, 1) if with_tokens else (1, B)
            )
            require_close("gradient of logp", grads[0], right, kept, dtype)

    return Call(
        text=look(logp=logp, alpha=given, mask=mask) + f", spread {spread:g} nats",
        leaves=[logp],
        constants=[] if mask is None else [mask],
        run=lambda leaves: renyi_reduce(leaves[0], given, mask=mask, backend=draw.backend),
        check=check,
        plain=lambda leaves: [reference.renyi_reduce(summed(leaves[0]), alpha)[0]],
        must_refuse=refused,
        tame=tame and (alpha == 0 or 1e-8 <= alpha <= 3),
    )


def draw_renyi_loss(draw: Draw) -> Call:
    K, B, T = draw.size(4), draw.count(4), draw.count(5)
    D, V, dtype = draw.size(17), _vocabulary(draw), draw.dtype()
    if empty := draw.chance(0.03):
        D, V = draw.one_of((0, V), (D, 0))
    alpha = draw.one_of(*ALPHAS)
    head = Head.draw(draw, V, D, dtype)
    hidden, labels = draw.normal(K, B, T, D, dtype=dtype), draw.labels(B, T, num_vocabulary=V)
    wide = at_least_fp32(dtype)

    def run(leaves: Tensors) -> Sequence[Tensor]:
        options = {"chunk_mib": head.chunk_mib, "backend": draw.backend, **head.options}
        return renyi_loss(leaves[0], head.weight, labels, alpha, **options)

    def check(outputs: Sequence[Tensor], upstream: Tensors, grads: Sequence[Tensor | None]) -> None:
        by_particle = labels.cpu().expand(K, B, T)
        logp, allowed, *of_gradient = head.bounds(hidden, by_particle)
        allowed = allowed.sum(dim=-1) + (T + 8) * eps(wide) * logp.abs().sum(dim=-1)
        require_close("logp", outputs[3], logp.sum(dim=-1), allowed, wide)
        r = check_reduction(alpha, outputs, wide)
        if grads[0] is not None:
            # the kernels keep responsibilities in fp32: see check_reduction
            of_token = (-exact(upstream[0]) * r)[..., None].expand(K, B, T)
            G, error, size = of_gradient
            floor = 8 * eps(wide) * exact(upstream[0]).abs()[None, :, None, None] * size
            u = of_token.abs()[..., None]
            kept = torch.finfo(dtype).smallest_normal * eps(dtype)
            limit = u * (error + kept) + 8 * eps(dtype) * u * G.abs() + floor
            require_close("gradient of hidden", grads[0], of_token[..., None] * G, limit, dtype, size * u.clamp(min=1))

    def plain(leaves: Tensors) -> Sequence[Tensor]:
        token_logp = head.plain(leaves[0], labels.cpu().expand(K, B, T))
        return [reference.renyi_reduce(token_logp.sum(dim=-1), alpha)[0]]

    return Call(
        text=f"{look(hidden=hidden, labels=labels, alpha=alpha)}, {head.text}",
        leaves=[hidden],
        constants=[*head.constants, labels],
        run=run,
        check=check,
        plain=plain,
        may_refuse=empty or head.may_be_refused,
        tame=head.promised is not None and not empty and (alpha == 0 or 1e-8 <= alpha <= 3),
    )


# ---------------------------------------------------------------------- attacking

OPS: dict[str, Callable[[Draw], Call]] = {
    "grouped_lora": draw_grouped_lora,
    "lora_linears": draw_lora_linears,
    "linear_logprob": draw_linear_logprob,
    "renyi_reduce": draw_renyi_reduce,
    "renyi_loss": draw_renyi_loss,
}


@contextmanager
def prepare(seed: int, tally: Tally, _: Path) -> Iterator[Callable[[int], None]]:
    torch.set_num_threads(1)
    with unwritten_memory_is_nan():
        yield lambda number: one_call(Draw(seed, number), tally)


def one_call(draw: Draw, tally: Tally) -> None:
    op = draw.one_of(*OPS)
    call = OPS[op](draw)
    way = "gradient"
    if draw.chance(0.15):
        wide = all(x.dtype in (torch.float32, torch.float64) for x in call.leaves)  # fp16 overflows at a square
        derivable = call.tame and wide and not call.must_refuse
        way = draw.one_of("value", "direction", "second") if derivable else "value"
    tally.counts[f"by {draw.backend}"] += 1
    before, state = [x.clone() for x in (*call.leaves, *call.constants)], _global_state()
    problem = ""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            refused = _WAYS[way](draw, call)
    except Wrong as wrong:
        problem = str(wrong)
    except Exception as error:
        one_line = " ".join(str(error).split())[:300]
        problem = f"{type(error).__name__}: {one_line}"
    else:
        if call.must_refuse and not refused:
            problem = "accepted: it has to be refused"
        elif refused and not (call.must_refuse or call.may_refuse or way in ("direction", "second")):
            problem = f"refused: {refused}"
        elif refused:
            tally.refused += 1
        else:
            tally.equal += 1
    if not problem and _global_state() != state:
        problem = f"global settings changed: {state} before, {_global_state()} after"
    if not problem and not all(
        torch.equal(x.nan_to_num(), y.nan_to_num())
        for x, y in zip(before, (*call.leaves, *call.constants), strict=True)
    ):
        problem = "changed: an input"
    if problem:
        what, kind, *_ = [re.sub(r" \d+$", "", part) for part in problem.split(": ")] + [""]
        what += f" {kind}" * (kind in ("NaN", "infinite", "wrong"))
        tally.fail(
            f"{op}, {draw.backend}: {what}",
            f"{problem}\n{op}({call.text})",
        )


def _leaves(draw: Draw, call: Call) -> Tensors:
    leaves = [x.detach() for x in call.leaves]
    asked = [x for x in leaves if x.is_floating_point()]
    for x in draw.random.sample(asked, draw.random.randint(1, len(asked))) if draw.chance(0.4) else asked:
        x.requires_grad_()
    return leaves


def _gradient(draw: Draw, call: Call) -> str:
    leaves = _leaves(draw, call)
    try:
        outputs = call.run(leaves)
    except (ValueError, TypeError) as error:
        return _clear(error)
    size = draw.one_of(1.0, 1.0, 1.0, 0.0, 1e-4, 100.0)
    upstream = [draw.normal(*out.shape, dtype=out.dtype, size=size) for out in outputs[: call.num_differentiable]]
    asked = [x for x in leaves if x.requires_grad]
    found = iter(torch.autograd.grad(outputs[: call.num_differentiable], asked, upstream))
    grads = [next(found) if x.requires_grad else None for x in leaves]
    if not call.must_refuse:
        call.check([out.detach() for out in outputs], upstream, grads)
    return ""


def _value(draw: Draw, call: Call) -> str:
    try:
        with torch.no_grad():
            outputs = call.run(call.leaves)
    except (ValueError, TypeError) as error:
        return _clear(error)
    if not call.must_refuse:
        upstream = [torch.zeros_like(out) for out in outputs[: call.num_differentiable]]
        call.check(outputs, upstream, [None] * len(call.leaves))
    return ""


def _direction(draw: Draw, call: Call) -> str:
    """The derivative along a direction: right, or refused."""
    tangents = [draw.normal(*x.shape, dtype=x.dtype) if x.is_floating_point() else x for x in call.leaves]
    run = lambda *leaves: tuple(call.run(list(leaves))[: call.num_differentiable])
    try:
        _, ours = torch.func.jvp(run, tuple(call.leaves), tuple(tangents))
    except (ValueError, TypeError, RuntimeError) as error:
        return str(error) or "refused"
    plain = lambda *leaves: tuple(call.plain(list(leaves)))
    _, truth = torch.func.jvp(plain, tuple(map(exact, call.leaves)), tuple(map(exact, tangents)))
    _roughly("derivative along a direction", ours, truth, call)
    return ""


def _second(draw: Draw, call: Call) -> str:
    """A second derivative: right, or refused by that name."""

    def twice(f: Callable[[Tensors], Sequence[Tensor]], leaves: Tensors) -> Sequence[Tensor]:
        outputs = f(leaves)[: call.num_differentiable]
        first = torch.autograd.grad([out.square().sum() for out in outputs], leaves, create_graph=True)
        return torch.autograd.grad([g.square().sum() for g in first], leaves, allow_unused=True)

    try:
        ours = twice(call.run, [x.detach().requires_grad_() for x in call.leaves])
    except (ValueError, TypeError) as error:
        return _clear(error)
    except RuntimeError as error:
        if "second derivative" in str(error):
            return str(error)
        raise
    truth = twice(call.plain, [exact(x).requires_grad_() for x in call.leaves])
    _roughly("second derivative", ours, truth, call)
    return ""


def _roughly(name: str, ours: Sequence[Tensor], truth: Sequence[Tensor], call: Call) -> None:
    """Compare up to a part of the largest entry: this finds wrong formulas, not rounding errors."""
    relative = 30 * math.sqrt(eps(*(x.dtype for x in call.leaves)))
    for x, right in zip(ours, truth, strict=True):
        if x is not None and right.numel() and right.isfinite().all():
            size = right.abs().max()
            if size < torch.finfo(x.dtype).max / 1e3:
                require_close(name, x, right, torch.full_like(right, relative * max(size.item(), 1.0)), x.dtype)


_WAYS = {"gradient": _gradient, "value": _value, "direction": _direction, "second": _second}


def _clear(error: Exception) -> str:
    """The message of a refusal. Raises Wrong if it is not one line that begins with an argument."""
    if not CLEAR.fullmatch(str(error)):
        raise Wrong(f"unclear refusal ({type(error).__name__}): {' '.join(str(error).split())[:300]}") from None
    return str(error)


def _global_state() -> tuple[Any, ...]:
    """Settings of the process, which no op may change."""
    matmul = getattr(torch.backends.mkldnn, "matmul", None)
    return (
        getattr(matmul, "fp32_precision", None),
        torch.get_float32_matmul_precision(),
        torch.get_default_dtype(),
        torch.get_num_threads(),
        torch.is_grad_enabled(),
    )
