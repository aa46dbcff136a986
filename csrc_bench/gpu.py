"""Who else uses the GPU: a time that is taken beside other work is worth nothing. Nothing but Python is needed here."""

from __future__ import annotations

import os
import subprocess
import time

TRIES, SECONDS = 4, 5.0


def others(mine: int) -> list[str]:
    """The processes that use the GPU beside `mine` ones of ours, as "pid, name". Without nvidia-smi nobody is found.

    Our own are counted, and not recognised: in a container, a process may not know by which number nvidia-smi calls it.
    """
    gpu = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")[0] or "0"
    command = ["nvidia-smi", f"--id={gpu}", "--query-compute-apps=pid,process_name", "--format=csv,noheader"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=30).stdout
    except (OSError, subprocess.TimeoutExpired):
        return []
    found = [line.strip() for line in answer.splitlines() if line[:1].isdigit()]
    return [line for line in found if line.split(",")[0] != str(os.getpid())] if len(found) > mine else []


def others_after_waiting(mine: int) -> list[str]:
    """The same, after waiting for a while that they end."""
    for _ in range(TRIES):
        if not others(mine):
            return []
        time.sleep(SECONDS)
    return others(mine)
