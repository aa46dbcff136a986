"""Stopping a run from outside without losing a step."""

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
    """Inside the block SIGINT and SIGTERM only set `received`; a second one exits at once. Handlers are put back after.

    Outside the main thread, where Python does not allow signal handlers, nothing changes.
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
    """Inside the block SIGINT ends the process with `message`. For imports: code in C that Python code is called from
    may turn a KeyboardInterrupt into another error, or lose it."""

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
