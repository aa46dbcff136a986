"""What the software finds on this machine: versions, devices, and the path that each op takes, with the reason."""

from __future__ import annotations

import torch

from renyi_engine.core import versions
from renyi_kernels.backend import choose

_OPS = ("grouped_lora", "lora_linears", "linear_logprob", "renyi_reduce")


def describe() -> str:
    lines = [f"{name:14} {version}" for name, version in versions().items()]
    devices = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    lines.append(f"{'GPUs':14} {', '.join(devices) or 'none'}")
    lines.append(f"{'CPU threads':14} {torch.get_num_threads()}")
    path, reason = choose(torch.device("cuda" if devices else "cpu"), torch.float32)
    lines += [f"{op:14} {path} ({reason})" for op in _OPS]
    return "\n".join(lines) + "\n"
