"""A folder of results: one process at a time writes into it, and nothing in it is overwritten."""

from __future__ import annotations

import os
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from renyi_engine.core import files
from renyi_engine.core.messages import some

CONFIG_FILE = "config.yaml"
"""The file with the settings of the command that wrote the folder, defaults included."""
LOCK_FILE = ".lock"
"""An empty file that a writing process locks. The lock ends with the process; a killed process leaves the file."""


@contextmanager
def claimed(path: Path, argument: str = "output_dir") -> Iterator[Path]:
    """Make the folder if it is not there. Inside the block, no other process writes results into it.

    Raises:
        ValueError: the folder holds something (see `require_free`), cannot be written, or another process is writing
            into it. The message names `argument`.
    """
    with locked(path, argument):
        require_free(path, argument)
        clear_away_leftovers(path)
        yield path


@contextmanager
def locked(path: Path, argument: str = "output_dir") -> Iterator[Path]:
    """Like `claimed`, but the folder may hold something: for a command that continues its own earlier work. It checks
    the folder itself, and calls `clear_away_leftovers` once it knows that the folder is its own."""
    lock = FileLock(files.make_folder(path, argument) / LOCK_FILE, timeout=0)
    try:
        lock.acquire()
    except Timeout:
        raise ValueError(
            f"{argument}: another process is writing into {path}; wait until it has ended, or give another folder"
        ) from None
    except OSError as error:
        raise ValueError(
            f"{argument}: {path} cannot be locked ({LOCK_FILE}: {os.strerror(error.errno or 0)}); remove that file, "
            "unless a process of its owner is writing there"
        ) from None
    try:
        yield path
    finally:
        Path(lock.lock_file).unlink(missing_ok=True)  # before the release, while no other process can hold it
        lock.release()


def require_free(path: Path, argument: str = "output_dir") -> None:
    """Raise ValueError, which names `argument`, if the folder holds anything. Hidden files do not count."""
    held = sorted(entry.name for entry in path.iterdir() if not entry.name.startswith("."))
    if held:
        raise ValueError(
            f"{argument}: {path} already holds {some(held)}, which would be lost or mixed up; "
            f"choose another --{argument}, or remove them"
        )


def clear_away_leftovers(folder: Path) -> None:
    """Remove the unfinished files and folders of a writer that was killed, and warn of each. Links are not followed. A
    folder inside that has its own lock file belongs to another command, and is left to the next writer there."""
    for directory, names_of_folders, names_of_files in os.walk(folder):
        names_of_folders[:] = [name for name in names_of_folders if not Path(directory, name, LOCK_FILE).exists()]
        for name in [name for name in names_of_folders + names_of_files if name.startswith(files.TEMPORARY)]:
            leftover = Path(directory, name)
            if name in names_of_folders and not leftover.is_symlink():
                names_of_folders.remove(name)
                shutil.rmtree(leftover)
            else:
                leftover.unlink()
            warnings.warn(f"{leftover}: removed; its writer was killed before this was finished", stacklevel=2)
