"""What the launchers have to know about a device."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache, wraps

import torch
from torch import Tensor

# for the interpreter, which has no device to ask. It is small, so that sums are split there too
_MULTIPROCESSORS_WITHOUT_DEVICE = 4


def on_its_device(launcher: Callable) -> Callable:
    """Launch on the device of the first argument, a tensor or several. Triton alone would take the current device."""

    @wraps(launcher)
    def launch(first: Tensor | Sequence[Tensor], *others: object) -> object:
        tensor = first if isinstance(first, Tensor) else first[0]
        if not tensor.is_cuda or tensor.get_device() == torch.cuda.current_device():
            return launcher(first, *others)
        with torch.cuda.device_of(tensor):
            return launcher(first, *others)

    return launch


@cache
def architecture(device: torch.device) -> str:
    """ "sm_90", "gfx942" and the like. "none" if the device is no GPU."""
    if device.type != "cuda":
        return "none"
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip:
        return str(properties.gcnArchName).split(":")[0]
    return f"sm_{properties.major}{properties.minor}"


def programs_wanted(device: torch.device) -> int:
    """How many programs fill the device twice."""
    return 2 * multiprocessors(device)


@cache
def multiprocessors(device: torch.device) -> int:
    if device.type != "cuda":
        return _MULTIPROCESSORS_WITHOUT_DEVICE
    return int(torch.cuda.get_device_properties(device).multi_processor_count)
