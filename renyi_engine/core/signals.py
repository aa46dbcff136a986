"""What Ctrl-C and SIGTERM do: a run ends without losing a step, and an import ends at once."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any


class StopSignals:
    """Inside the block, the first SIGINT or SIGTERM only sets `received`. A second one ends the process at once.

    Python allows signal handlers only in the main thread. In another thread, the block changes nothing.
    """

    received = 0

    def __enter__(self) -> StopSignals:
        self._before: dict[int, Any] = {}
        if threading.current_thread() is threading.main_thread():
            for signum in (signal.SIGINT, signal.SIGTERM):
                self._before[signum] = signal.signal(signum, self._receive)
        return self

    def __exit__(self, *_: object) -> None:
        for signum, handler in self._before.items():
            signal.signal(signum, handler)

    def _receive(self, signum: int, frame: FrameType | None) -> None:
        if self.received:
            os._exit(128 + signum)
        self.received = signum


@contextmanager
def exit_at_once(exit_code: int, message: str) -> Iterator[None]:
    """Inside the block, SIGINT ends the process with `message`. It is meant for imports, as these call C code, which
    may lose a KeyboardInterrupt or change it into another error."""

    def stop(signum: int, frame: FrameType | None) -> None:
        os.write(sys.stderr.fileno(), f"{message}\n".encode())
        os._exit(exit_code)

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
