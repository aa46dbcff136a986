"""Block sizes of the kernels, in a table by device and class of shape. Nothing is tried out at run time.

A device that is not in the table takes the row "any". Its tiles fit into 64 KiB, the smallest shared memory of all.
"""

from __future__ import annotations

import sys

import torch
from torch import Tensor

from renyi_kernels.triton_ops.device import architecture

# (kernel, bytes of an element, device, class of the rank or 0 for all) -> block sizes, num_warps, num_stages
_ROWS: dict[tuple[str, int, str, int], tuple[dict[str, int], int, int]] = {
    ("shrink", 2, "any", 0): ({"BLOCK_M": 64, "BLOCK_I": 64}, 4, 2),
    ("shrink", 2, "sm_80", 0): ({"BLOCK_M": 64, "BLOCK_I": 128}, 4, 3),
    ("shrink", 2, "sm_90", 0): ({"BLOCK_M": 64, "BLOCK_I": 128}, 4, 4),
    ("shrink", 2, "sm_100", 0): ({"BLOCK_M": 128, "BLOCK_I": 64}, 4, 4),
    ("shrink", 4, "any", 0): ({"BLOCK_M": 32, "BLOCK_I": 32}, 4, 2),
    ("expand", 2, "any", 0): ({"BLOCK_M": 64, "BLOCK_O": 128}, 4, 1),
    ("expand", 4, "any", 0): ({"BLOCK_M": 32, "BLOCK_O": 64}, 4, 1),
    ("expand", 4, "sm_100", 64): ({"BLOCK_M": 32, "BLOCK_O": 32}, 4, 1),
    ("up_backward", 2, "any", 0): ({"BLOCK_M": 64, "BLOCK_O": 64}, 4, 2),
    # with 4 warps, the registers of sm_80 hold no more than 16 ranks
    ("up_backward", 2, "sm_80", 16): ({"BLOCK_M": 128, "BLOCK_O": 64}, 4, 3),
    ("up_backward", 2, "sm_80", 32): ({"BLOCK_M": 128, "BLOCK_O": 64}, 8, 3),
    ("up_backward", 2, "sm_80", 64): ({"BLOCK_M": 64, "BLOCK_O": 64}, 8, 3),
    # taller tiles make fewer partial sums of dB, which have to be written and read again
    ("up_backward", 2, "sm_90", 16): ({"BLOCK_M": 256, "BLOCK_O": 64}, 8, 3),
    ("up_backward", 2, "sm_90", 0): ({"BLOCK_M": 128, "BLOCK_O": 64}, 4, 3),
    ("up_backward", 2, "sm_100", 0): ({"BLOCK_M": 128, "BLOCK_O": 64}, 4, 3),
    # a mask over 32 ranks would take more scalar registers than there are
    ("up_backward", 2, "gfx942", 32): ({"BLOCK_M": 64, "BLOCK_O": 64, "BLOCK_R": 16}, 4, 2),
    ("up_backward", 4, "gfx942", 32): ({"BLOCK_M": 32, "BLOCK_O": 32, "BLOCK_R": 16}, 4, 1),
    # for the same reason
    ("up_backward", 4, "sm_90", 0): ({"BLOCK_M": 32, "BLOCK_O": 32}, 8, 1),
    ("up_backward", 4, "sm_100", 0): ({"BLOCK_M": 32, "BLOCK_O": 16}, 4, 1),
    ("up_backward", 4, "any", 0): ({"BLOCK_M": 32, "BLOCK_O": 32}, 4, 1),
    ("down_backward", 2, "any", 0): ({"BLOCK_M": 64, "BLOCK_I": 64}, 4, 2),
    ("down_backward", 2, "sm_80", 0): ({"BLOCK_M": 64, "BLOCK_I": 128}, 4, 3),
    ("down_backward", 2, "sm_90", 0): ({"BLOCK_M": 64, "BLOCK_I": 128}, 4, 3),
    ("down_backward", 2, "sm_100", 0): ({"BLOCK_M": 64, "BLOCK_I": 128}, 4, 3),
    ("down_backward", 4, "any", 0): ({"BLOCK_M": 32, "BLOCK_I": 32}, 4, 1),
}
# (kernel, bytes of an element, device, class of the rank) -> rows of a particle, and outputs of a map, for which the
# products of the vendor's library are faster. Measured on an H200 with 16 particles of 1024 rows, without launch cost:
_VENDOR: dict[tuple[str, int, str, int], tuple[range, range]] = {
    ("expand", 2, "sm_90", 16): (range(1024, sys.maxsize), range(1537)),  # 24 us, not 35: 1536 outputs, rank 8
    ("up_backward", 2, "sm_90", 64): (range(1024, sys.maxsize), range(8960, sys.maxsize)),  # 205 us, not 270: 8960
}
# the head's product with an epilogue: (bytes of an element, device, whether tiles may be large) -> as above. Between
# two products a tile's sums stay in registers, with what the epilogue makes of them. So a soft cap takes small tiles,
# and so do rows that are not aligned. On an sm_90 the tiles of 3 steps (144 KiB) and the tile of E (64 KiB) fill the
# shared memory
_HEAD_ROWS: dict[tuple[int, str, bool], tuple[dict[str, int], int, int]] = {
    (2, "any", False): ({"BLOCK_N": 64, "BLOCK_V": 64, "BLOCK_D": 32}, 8, 2),
    (2, "sm_80", True): ({"BLOCK_N": 128, "BLOCK_V": 128, "BLOCK_D": 64}, 8, 4),
    (2, "sm_90", True): ({"BLOCK_N": 128, "BLOCK_V": 256, "BLOCK_D": 64}, 8, 3),
    (2, "sm_100", True): ({"BLOCK_N": 128, "BLOCK_V": 128, "BLOCK_D": 64}, 8, 4),
    (2, "gfx942", True): ({"BLOCK_N": 64, "BLOCK_V": 64, "BLOCK_D": 32}, 4, 2),
    (2, "gfx942", False): ({"BLOCK_N": 32, "BLOCK_V": 32, "BLOCK_D": 32}, 4, 2),
    (4, "any", False): ({"BLOCK_N": 32, "BLOCK_V": 32, "BLOCK_D": 32}, 4, 2),
}
LARGEST_BLOCK_R = 64
SMALLEST_BLOCK_R = 16  # matrix units take no narrower side


def blocks(kernel: str, like: Tensor, rank: int) -> tuple[dict[str, int], dict[str, int]]:
    """(block sizes, launch options) for a pass of grouped_lora on inputs like this tensor."""
    return row(kernel, like.dtype.itemsize, architecture(like.device), block_r(rank))


def row(kernel: str, itemsize: int, arch: str, block_r: int) -> tuple[dict[str, int], dict[str, int]]:
    """What `blocks` gives, for a device by its name: "sm_90", "gfx942" and the like."""
    keys = [(kernel, itemsize, arch, block_r), (kernel, itemsize, arch, 0), (kernel, itemsize, "any", 0)]
    sizes, num_warps, num_stages = next(_ROWS[key] for key in keys if key in _ROWS)
    return {"BLOCK_R": block_r, **sizes}, {"num_warps": num_warps, "num_stages": num_stages}


def vendor_is_faster(kernel: str, like: Tensor, rank: int, rows: int, outputs: int) -> bool:
    """Whether the same pass of `torch_ops` is known to be faster on inputs like this tensor."""
    found = _VENDOR.get((kernel, like.dtype.itemsize, architecture(like.device), block_r(rank)))
    return found is not None and rows in found[0] and outputs in found[1]


def is_amd(device: torch.device) -> bool:
    """Whether the device is a GPU of AMD."""
    return architecture(device).startswith("gfx")


def head_blocks(itemsize: int, arch: str, large: bool) -> tuple[dict[str, int], dict[str, int]]:
    """(block sizes, launch options) for the head's product with an epilogue."""
    keys = [(itemsize, arch, large), (itemsize, arch, False), (itemsize, "any", False)]
    sizes, num_warps, num_stages = next(_HEAD_ROWS[key] for key in keys if key in _HEAD_ROWS)
    return sizes, {"num_warps": num_warps, "num_stages": num_stages}


def block_r(rank: int) -> int:
    """The class of a rank: the block that covers it, up to a limit."""
    return min(LARGEST_BLOCK_R, max(SMALLEST_BLOCK_R, 1 << (rank - 1).bit_length()))
