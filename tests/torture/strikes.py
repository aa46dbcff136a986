"""A signal that ends a process at a system call which changes a file.

The process ends right before the call. So every state that a folder passes through may be the one that is found.
"""

from __future__ import annotations

import os
import signal
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch

WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC
CHANGES = {"open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.link", "os.symlink", "os.truncate"}


@dataclass(frozen=True)
class Strike:
    """The signal that a process gets, and when: at which call, or after which time."""

    signum: int
    call: int | None = None
    after_s: float = 0.0

    def __str__(self) -> str:
        when = f"at call {self.call}" if self.call is not None else f"after {self.after_s:.3f} s"
        return f"{signal.Signals(self.signum).name} {when}"


class Calls:
    """Inside a process: counts the calls that change a file in `folder`, and strikes at one of them.

    Without a strike it writes them down, a line each, in the file `written`.
    """

    def __init__(self, folder: Path, strike: Strike | None, written: Path) -> None:
        self.folder, self.strike, self.written, self.number = os.path.abspath(folder), strike, written, 0
        self.cutting = False

    def watch(self) -> None:
        """Count from now on, until the process ends: an audit hook cannot be removed."""
        sys.addaudithook(self._audit)
        fsync, write = os.fsync, safetensors.torch.serialize_file

        def fsync_watched(file: Any) -> None:
            self._arrive("fsync", self._name(file if isinstance(file, int) else file.fileno()))
            fsync(file)

        def write_watched(tensors: Any, filename: Any, *args: Any, **options: Any) -> None:
            self._arrive("write", self._path(filename))
            write(tensors, filename, *args, **options)
            if self.strike and self.strike == Strike(signal.SIGKILL, self.number + 1):
                self.cutting = True
                os.truncate(filename, os.path.getsize(filename) // 2)
                self.cutting = False
            self._arrive("half of what was to be written:", self._path(filename))

        os.fsync = fsync_watched
        safetensors.torch.serialize_file = write_watched

    def _audit(self, event: str, args: tuple[Any, ...]) -> None:
        if event not in CHANGES or (event == "open" and not (isinstance(args[2], int) and args[2] & WRITING)):
            return
        # the last argument of those that remove or make something is the folder that a name is in
        self._arrive(event, self._path(args[0], args[-1] if event in ("os.remove", "os.rmdir", "os.mkdir") else -1))

    def _arrive(self, what: str, path: str) -> None:
        inside = path == self.folder or path.startswith(self.folder + os.sep)
        if not inside or self.cutting:
            return
        self.number += 1
        if self.strike is None:
            with self.written.open("a") as file:
                file.write(f"{what} {path.removeprefix(self.folder)}\n")
        elif self.strike.call == self.number:
            os.write(2, f"\n[torture] {self.strike}: {what} {path}\n".encode())
            os.kill(os.getpid(), self.strike.signum)

    def _path(self, path: Any, folder: Any = -1) -> str:
        if isinstance(path, int):
            return self._name(path)
        if not isinstance(path, (str, bytes, os.PathLike)):
            return ""
        place = os.fsdecode(path)
        if isinstance(folder, int) and folder >= 0:
            place = os.path.join(self._name(folder), place)
        return os.path.abspath(place)

    @staticmethod
    def _name(descriptor: int) -> str:
        return os.readlink(f"/proc/self/fd/{descriptor}")
