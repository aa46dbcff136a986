"""One rule for every command that writes results: a folder that holds something else is refused, and left as it is."""

from __future__ import annotations

from pathlib import Path

from renyi_engine import files

NUM_NAMED = 5


def claim(path: Path, argument: str = "output_dir") -> Path:
    """`path`, made if need be, for results to come: free is what is not there yet, or is empty.

    A command that can go on with its own earlier work asks for itself whether that is what the folder holds. Hidden
    files do not count: no command writes one to stay.

    Raises:
        ValueError, naming `argument`: it holds something, or cannot be written.
    """
    held = sorted(entry.name for entry in path.iterdir() if not entry.name.startswith(".")) if path.is_dir() else []
    if held:
        more = f" and {len(held) - NUM_NAMED} more" if len(held) > NUM_NAMED else ""
        raise ValueError(
            f"{argument}: {path} already holds {', '.join(held[:NUM_NAMED])}{more}, which would be lost or mixed up; "
            f"choose another --{argument}, or remove them"
        )
    return files.make_folder(path, argument)
