"""Which implementation of an op runs. It is chosen when the op is called, and never at import."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch.autograd.forward_ad import unpack_dual

BACKENDS = ("auto", "triton", "torch", "reference")

_current: ContextVar[str] = ContextVar("renyi_kernels_backend", default="auto")


def _check(backend: str) -> str:
    if backend not in BACKENDS:
        raise ValueError(f"backend: expected one of {', '.join(BACKENDS)}; got {backend!r}")
    return backend


@contextmanager
def use_backend(backend: str) -> Iterator[None]:
    """Run every op inside the block on `backend`: "auto", "triton", "torch" or "reference".

    - ``reference``: naive and obvious. Tests compare the other paths with it.
    - ``torch``: takes bounded memory, on any device
    - ``triton``: the kernels. They need a GPU, or Triton's interpreter (``TRITON_INTERPRET=1``).
    - ``auto``: triton on a GPU, and torch elsewhere

    The ``backend=`` argument of an op wins over the block. The block holds for its own thread or asyncio task.
    `torch.compile` keeps the path that it finds while it traces.
    """
    token = _current.set(_check(backend))
    try:
        yield
    finally:
        _current.reset(token)


def resolve(op: str, tensor: torch.Tensor, backend: str | None) -> str:
    """The path that `op` takes for a `tensor` like this one. If `backend` is None, the current block decides.

    Raises:
        ValueError: "triton" is asked for and cannot run for such a tensor.
    """
    wanted = _check(backend) if backend is not None else _of_block()
    if wanted == "auto":
        return choose(tensor.device, tensor.dtype)[0]
    if wanted == "triton":
        obstacle = _obstacle(tensor.device.type, tensor.dtype)
        if obstacle and not (_interpreted() and tensor.device.type == "cpu" and tensor.dtype != torch.float64):
            raise ValueError(f"backend='triton': {op} cannot run on it ({obstacle}); use 'auto' or 'torch'")
    return wanted


def refuse_tangents(op: str, *tensors: torch.Tensor | None) -> None:
    """RuntimeError if a tensor carries a forward-mode derivative. PyTorch's operators would drop it without a word."""
    if any(tensor is not None and unpack_dual(tensor).tangent is not None for tensor in tensors):
        raise RuntimeError(no_forward_mode(op))


def no_forward_mode(op: str) -> str:
    return f"{op}: this path has no forward-mode derivative (torch.func.jvp); use backend='reference'"


def choose(device: torch.device, dtype: torch.dtype) -> tuple[str, str]:
    """The path that "auto" takes for tensors of this kind, and why."""
    obstacle = _obstacle(device.type, dtype)
    return ("torch", obstacle) if obstacle else ("triton", "a GPU, and triton is installed")


def _obstacle(device_type: str, dtype: torch.dtype) -> str:
    """Why the kernels cannot run. Empty if they can."""
    if device_type != "cuda":
        return "no GPU" if device_type == "cpu" else f"no kernels for {device_type}"
    if dtype == torch.float64:
        return "the kernels have no fp64"
    return "" if _triton_installed() else "triton is not installed"


def _constant_of_a_trace(function: Callable) -> Callable:
    """Does the same as `torch.compiler.assume_constant_result`, but without importing all of Dynamo.

    torch.compile cannot look into these functions. Their answers while it traces hold for the compiled code.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


@_constant_of_a_trace
def _of_block() -> str:
    return _current.get()


@_constant_of_a_trace
def _triton_installed() -> bool:
    return importlib.util.find_spec("triton") is not None


@_constant_of_a_trace
def _interpreted() -> bool:
    return _triton_installed() and os.environ.get("TRITON_INTERPRET") == "1"
