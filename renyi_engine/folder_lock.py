"""One process at a time writes into a folder, and clears away what a killed one left there."""

from __future__ import annotations

import os
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from renyi_engine.files import TEMPORARY

LOCK_FILE = ".lock"
"""An empty file. The lock on it ends with the process that holds it, however that ends; a kill leaves the file."""


@contextmanager
def locked(folder: Path, argument: str) -> Iterator[None]:
    """Inside the block, `folder` is this process's to write into, and no half-written file is in it.

    Raises:
        ValueError, naming `argument`: another process, or another thread of this one, is writing into `folder`.
    """
    lock = FileLock(folder / LOCK_FILE, timeout=0)
    try:
        lock.acquire()
    except Timeout:
        raise ValueError(
            f"{argument}: another process is writing into {folder}; wait until it has ended, or give another folder"
        ) from None
    try:
        _clear_away_leftovers(folder)
        yield
    finally:
        Path(lock.lock_file).unlink(missing_ok=True)  # before the release: nobody else's lock is on it yet
        lock.release()


def _clear_away_leftovers(folder: Path) -> None:
    """Remove what was half written when its writer was killed. Links to other folders are not followed."""
    for directory, names_of_folders, names_of_files in os.walk(folder):
        for name in [name for name in names_of_folders + names_of_files if name.startswith(TEMPORARY)]:
            leftover = Path(directory, name)
            if name in names_of_folders and not leftover.is_symlink():
                names_of_folders.remove(name)
                shutil.rmtree(leftover)
            else:
                leftover.unlink()
            warnings.warn(f"{leftover}: removed; its writer was killed before it was whole", stacklevel=3)
