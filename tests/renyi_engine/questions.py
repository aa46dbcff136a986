"""What Python asks of a device: the operators that give it an answer are noted. No GPU is needed to see them."""

from __future__ import annotations

import torch
from torch.utils._python_dispatch import TorchDispatchMode

ASKING = {
    "_local_scalar_dense", "equal", "is_nonzero", "item", "masked_select", "nonzero", "nonzero_numpy", "unique_dim",
    "_unique", "_unique2", "unique_consecutive", "argwhere", "allclose", "_assert_async", "nanmedian",
}  # fmt: skip
"""The operators whose result, or its shape, Python can only have when the device is done; and nanmedian, because some
versions of torch ask a GPU for the number of NaN."""


class Reads(TorchDispatchMode):
    """Notes the operators that make Python wait for a device, and copies between devices that wait."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = func.overloadpacket.__name__
        if name in ASKING or (name.startswith("index") and _has_mask(args)) or _waits(name, args, kwargs):
            self.found.append(name)
        return func(*args, **kwargs)


def _has_mask(args) -> bool:
    """Whether a tensor is indexed by a mask: its places have to be found first."""
    indices = [t for arg in args if isinstance(arg, list | tuple) for t in arg if isinstance(t, torch.Tensor)]
    return any(t.dtype in (torch.bool, torch.uint8) for t in indices)


def _waits(name, args, kwargs) -> bool:
    """Whether this is a copy from one device to another that Python waits for."""
    if name == "_to_copy":
        devices = {args[0].device, torch.device(kwargs.get("device") or args[0].device)}
        return len({device.type for device in devices}) > 1 and not kwargs.get("non_blocking")
    if name == "copy_":
        return args[0].device.type != args[1].device.type and not (args[2:] and args[2]) and args[1].dim() > 0
    return False
