"""What this machine is to the software: versions, devices, and the path each op takes, with the reason."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch

from renyi_engine.run_folder import versions
from renyi_kernels.backend import BACKENDS, resolve
from renyi_kernels.grouped_lora import PATHS as GROUPED_LORA_PATHS
from renyi_kernels.linear_logprob import PATHS as LINEAR_LOGPROB_PATHS
from renyi_kernels.renyi_reduce import PATHS as RENYI_REDUCE_PATHS

_OPS: dict[str, Mapping[str, Callable]] = {
    "grouped_lora": GROUPED_LORA_PATHS,
    "linear_logprob": LINEAR_LOGPROB_PATHS,
    "renyi_reduce": RENYI_REDUCE_PATHS,
}


def describe() -> str:
    lines = [f"{name:14} {version}" for name, version in versions().items()]
    devices = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    lines.append(f"{'GPUs':14} {', '.join(devices) or 'none'}")
    lines.append(f"{'CPU threads':14} {torch.get_num_threads()}")
    device = torch.device("cuda" if devices else "cpu")
    for op, paths in _OPS.items():
        path = resolve(op, paths, device, "auto")
        missing = [name for name in BACKENDS if name not in ("auto", *paths)]
        if path == "torch":
            reason = "no GPU" if not devices else f"this version has no {missing[0]} path for it"
        else:
            reason = "a GPU and a kernel for it"
        lines.append(f"{op:14} {path} ({reason})")
    return "\n".join(lines) + "\n"
