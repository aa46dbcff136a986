"""What the launchers have to know of a device."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, wraps

import torch
from torch import Tensor

# without a device to ask, as in the interpreter: few, so that sums are split there too
_PROGRAMS_WITHOUT_DEVICE = 8


def on_its_device(launcher: Callable) -> Callable:
    """Launch where the first argument lies: Triton takes the current device, whatever it is handed."""

    @wraps(launcher)
    def launch(first: Tensor, *others: object) -> object:
        with torch.cuda.device_of(first):
            return launcher(first, *others)

    return launch


@cache
def architecture(device: torch.device) -> str:
    """ "sm_90", "gfx942", ...; "none" off the GPU."""
    if device.type != "cuda":
        return "none"
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip:
        return str(properties.gcnArchName).split(":")[0]
    return f"sm_{properties.major}{properties.minor}"


@cache
def programs_wanted(device: torch.device) -> int:
    """Programs that fill the device twice over."""
    if device.type != "cuda":
        return _PROGRAMS_WITHOUT_DEVICE
    return 2 * int(torch.cuda.get_device_properties(device).multi_processor_count)
