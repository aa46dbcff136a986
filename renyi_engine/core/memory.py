"""What happens where the device's memory ends."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

# what PyTorch's allocators on a GPU and on a CPU, Triton, and cuBLAS say, each in a RuntimeError
_SIGNS = (
    "out of memory", "can't allocate memory", "Storage size calculation overflowed", "CUBLAS_STATUS_ALLOC_FAILED",
)  # fmt: skip


class DoesNotFit(RuntimeError):
    """Memory ended during work that changes nothing until it is done: parameters and moments are as they were."""


@contextmanager
def must_fit(what: str, remedy: str | None = None) -> Iterator[None]:
    """Raise DoesNotFit, which names `what` and the remedy, if memory ends inside."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        problem = f"{what} does not fit into memory ({first_line(error)})"
        raise DoesNotFit(f"{problem}; {remedy}" if remedy else problem) from None


def size_of_memory(device: torch.device) -> int:
    """Bytes of a device, used or not; of this machine where the device is no GPU."""
    if device.type == "cuda":
        import torch

        return int(torch.cuda.get_device_properties(device).total_memory)
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether it says that memory ended: the device's, or this machine's."""
    # torch.OutOfMemoryError by its name: a command line is read without an import of torch
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in _SIGNS)


def first_line(error: BaseException) -> str:
    """The first line of its message; a MemoryError of Python has none."""
    return next(iter(str(error).splitlines()), "out of memory")
