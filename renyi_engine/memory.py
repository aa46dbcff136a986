"""What happens where the device's memory ends."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

# PyTorch's allocators on a GPU and on a CPU, Triton, and cuBLAS: only the first has an exception of its own
_SIGNS = ("out of memory", "can't allocate memory", "CUBLAS_STATUS_ALLOC_FAILED")


class DoesNotFit(RuntimeError):
    """Memory ended during work that changes nothing until it is done: parameters and moments are as they were."""


@contextmanager
def must_fit(what: str, remedy: str | None = None) -> Iterator[None]:
    """Raise DoesNotFit, which names `what` and the remedy, if memory ends inside."""
    try:
        yield
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        problem = f"{what} does not fit into memory ({first_line(error)})"
        raise DoesNotFit(f"{problem}; {remedy}" if remedy else problem) from None


def is_out_of_memory(error: BaseException) -> bool:
    found = isinstance(error, RuntimeError) and any(sign in str(error) for sign in _SIGNS)
    return found or isinstance(error, torch.OutOfMemoryError)


def first_line(error: RuntimeError) -> str:
    return str(error).splitlines()[0]
