"""Running out of memory: how it is recognised, and the error that says what to do."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from renyi_engine.core.messages import reason

if TYPE_CHECKING:
    import torch

# messages of a RuntimeError when memory runs out: PyTorch's allocators on GPU and CPU, Triton, and cuBLAS
_SIGNS = (
    "out of memory", "can't allocate memory", "Storage size calculation overflowed", "CUBLAS_STATUS_ALLOC_FAILED",
)  # fmt: skip


class DoesNotFit(RuntimeError):
    """Memory ran out before the work had changed anything: parameters and moments are as they were."""


@contextmanager
def must_fit(what: str, remedy: str | None = None) -> Iterator[None]:
    """Raise DoesNotFit, which names `what` and the `remedy`, if memory runs out inside the block."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        problem = f"{what} does not fit into memory ({reason(error)})"
        raise DoesNotFit(f"{problem}; {remedy}" if remedy else problem) from None


def size_of_memory(device: torch.device) -> int:
    """How many bytes of memory the device has, used or not. If it is not a GPU: how many this machine has."""
    if device.type == "cuda":
        import torch

        return int(torch.cuda.get_device_properties(device).total_memory)
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether the error says that memory ran out: the device's, or this machine's."""
    # torch.OutOfMemoryError is recognised by its name, because a command line is read without importing torch
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in _SIGNS)
