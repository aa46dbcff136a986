"""Who else uses the GPU: a time that is taken beside other work is worth nothing. Nothing but Python is needed here."""

from __future__ import annotations

import os
import subprocess
import time
from pathlib import Path

TRIES, SECONDS = 4, 5.0


def others(mine: int) -> list[str]:
    """The processes that use the GPU beside `mine` ones of ours, as "pid, name". Without nvidia-smi nobody is found.

    In a container, nvidia-smi may call processes by other numbers than they know. Then ours are only counted.
    """
    gpu = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")[0] or "0"
    command = ["nvidia-smi", f"--id={gpu}", "--query-compute-apps=pid,process_name", "--format=csv,noheader"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=30).stdout
    except (OSError, subprocess.TimeoutExpired):
        return []
    found = [line.strip() for line in answer.splitlines() if line[:1].isdigit()]
    strangers = [line for line in found if not _is_ours(line.split(",")[0])]
    return strangers if len(strangers) < len(found) or len(found) > mine else []


def _is_ours(pid: str) -> bool:
    """Whether it is this process, or one that this process started."""
    while pid not in ("0", str(os.getpid())):
        try:
            pid = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1]  # the one that started it
        except OSError:
            return False
    return pid != "0"


def others_after_waiting(mine: int) -> list[str]:
    """The same, after waiting for a while that they end."""
    for _ in range(TRIES):
        if not others(mine):
            return []
        time.sleep(SECONDS)
    return others(mine)
