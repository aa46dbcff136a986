"""Which implementation of an op runs: chosen at the call, never at import."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar

import torch

BACKENDS = ("auto", "triton", "torch", "reference")

_current: ContextVar[str] = ContextVar("renyi_kernels_backend", default="auto")


def _check(backend: str) -> str:
    if backend not in BACKENDS:
        raise ValueError(f"backend: expected one of {', '.join(BACKENDS)}; got {backend!r}")
    return backend


@contextmanager
def use_backend(backend: str) -> Iterator[None]:
    """Run every op inside the block on `backend`: "auto", "triton", "torch" or "reference".

    - ``reference``: naive and obvious; the truth that the others are tested against
    - ``torch``: memory-bounded, any device
    - ``triton``: the kernels; needs a GPU
    - ``auto``: triton on a GPU for an op that has a kernel, else torch

    An op's own ``backend=`` argument wins over the block. Thread- and task-local.
    """
    token = _current.set(_check(backend))
    try:
        yield
    finally:
        _current.reset(token)


def resolve(op: str, paths: Mapping[str, Callable], device: torch.device, backend: str | None) -> str:
    """The name of the path in `paths` that `op` takes on `device`; `backend` None means the current block's."""
    wanted = _check(backend) if backend is not None else _current.get()
    if wanted == "auto":
        return "triton" if device.type == "cuda" and "triton" in paths else "torch"
    if wanted not in paths:
        raise ValueError(
            f"backend={wanted!r}: {op} has no such path in this version; use 'auto' or one of {sorted(paths)}"
        )
    return wanted
