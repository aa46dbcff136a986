"""Makes one call after the other, compares it, and counts how it ended."""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...unwritten_memory import unwritten_memory_is_nan
from ..tally import Tally
from .comparing import Wrong, eps, exact, require_close
from .drawing import Call, Draw, Tensors
from .grouped_lora import draw_grouped_lora
from .linear_logprob import draw_linear_logprob
from .lora_linears import draw_lora_linears
from .renyi_loss import draw_renyi_loss
from .renyi_reduce import draw_renyi_reduce

CLEAR = re.compile(r"(\w+(\[\d+\])?|backend='\w+')(, \w+)*: \S[^\n]*")
"""A refusal is one line that begins with the argument it is about."""

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
