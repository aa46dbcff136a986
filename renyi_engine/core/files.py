"""Reads and writes files safely: tensors as safetensors, the rest as text, JSON or CSV. Nothing is ever unpickled.

A file is written under a temporary name, `.tmp-NAME-RANDOM`, and renamed when it is whole. So a reader finds the old
file or the new one, even if the writer is killed. The next writer removes what a killed one left: see `output_folder`.
"""

from __future__ import annotations

import csv
import dataclasses
import hashlib
import io
import json
import math
import os
import secrets
import struct
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

_CHECKSUM = "sha256"
PICKLE_SUFFIXES = {".bin", ".pt", ".pth", ".pkl", ".ckpt"}
TEMPORARY = ".tmp-"
"""Names of unfinished files and folders begin with this."""


# ---------------------------------------------------------------------- tensors


def read_tensors(path: Path, *, stacked: bool = False) -> dict[str, Tensor]:
    """Every tensor of a safetensors file, on the CPU.

    Args:
        stacked: whether the first axis of every tensor counts the particles. Errors then name the particle.

    Raises:
        ValueError: the file is missing, is pickled (it is refused without being read), is not a whole safetensors file,
            differs from the `checksum` in its header, or holds a value that is not finite. The message is one line.
    """
    if path.suffix in PICKLE_SUFFIXES:
        raise ValueError(f"{path}: pickled weights can run code and are not read; convert them to .safetensors first")
    if not path.is_file():
        raise ValueError(f"{path}: no such file")
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
            expected = (file.metadata() or {}).get(_CHECKSUM)
    except (SafetensorError, OSError, ValueError) as error:
        raise ValueError(f"{path}: not a whole safetensors file ({error})") from None
    if expected is not None and expected != checksum(tensors)[_CHECKSUM]:
        raise ValueError(f"{path}: sha256 differs from the one in its header; the file is damaged")
    for name, tensor in tensors.items():
        if not tensor.is_floating_point() or tensor.dtype == torch.float4_e2m1fn_x2:  # float4 has neither NaN nor inf
            continue
        finite = tensor.float().isfinite()  # as float32, because that is what everything is computed in
        if not finite.all():
            first = (~finite).nonzero()[0].tolist()
            particle = f"particle {first[0]}: " if stacked and first else ""
            raise ValueError(
                f"{path}: {particle}tensor {name} holds NaN, infinite values, or values too large for float32"
            )
    return tensors


def read_metadata(path: Path) -> dict[str, str]:
    """The texts that a safetensors file holds beside its tensors. The file has to be whole."""
    with safe_open(path, framework="pt") as file:
        return file.metadata() or {}


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write a safetensors file, or replace it in one step. `metadata`: texts for its header."""
    on_cpu = {name: t.detach().cpu().contiguous() for name, t in tensors.items()}
    with _replacing(path) as temporary:
        mode = temporary.stat().st_mode
        try:
            save_file(on_cpu, temporary, metadata={"format": "pt", **(metadata or {})})
        except SafetensorError as error:  # safetensors wraps errors of the system, such as a full disk
            raise OSError(f"{path}: cannot be written ({error})") from None
        temporary.chmod(mode)  # safetensors lets only the owner read what it writes
        _sort_metadata(temporary)


def _sort_metadata(path: Path) -> None:
    """Sort the metadata. safetensors writes them in any order, and equal content has to make equal files."""
    with path.open("r+b") as file:
        (size,) = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(size))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode().ljust(size)
        assert len(text) == size
        file.seek(8)
        file.write(text)


def checksum(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """The sha256 of names, types, shapes and values, as `metadata` for `write_tensors`. `read_tensors` checks it."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return {_CHECKSUM: digest.hexdigest()}


# ---------------------------------------------------------------------- JSON, tables and text


def read_json(path: Path) -> Any:
    """The value in a JSON file. Raises ValueError, with a message of one line, if the file is missing or broken."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file") from None
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not a JSON file ({error})") from None


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file, or replace it in one step."""
    write_text(path, json.dumps(value, indent=2) + "\n")


def finite(value: Any) -> Any:
    """`value` with null in the place of NaN and of infinite numbers, which JSON cannot express."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


# A spreadsheet takes a cell that begins with one of these for a formula. The last one, the apostrophe, is here so that
# a reader can tell the apostrophe that `write_csv` adds from one that was there before.
_FORMULA = ("=", "+", "-", "@", "\t", "\r", "\n", "＝", "＋", "－", "＠", "'")


def write_csv(path: Path, rows: Sequence[DataclassInstance]) -> None:
    """Write a table: a line for each of the `rows`, all of one dataclass, under the names of its fields.

    An apostrophe is put before a text that a spreadsheet would take for a formula, and before a text that begins with
    an apostrophe. So a reader gets every text back by removing one apostrophe from the start of those that have one.
    Numbers are written as they are.
    """
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, [field.name for field in dataclasses.fields(rows[0])])
    writer.writeheader()
    for row in rows:
        cells = dataclasses.asdict(row).items()
        writer.writerow({k: f"'{v}" if isinstance(v, str) and v.startswith(_FORMULA) else v for k, v in cells})
    write_text(path, text.getvalue())


def write_text(path: Path, text: str) -> None:
    """Write a text file, or replace it in one step."""
    with _replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def append_text(path: Path, text: str) -> None:
    """Add text at the end of a file."""
    with naming(path), path.open("a", encoding="utf-8") as file:
        file.write(text)


# ---------------------------------------------------------------------- replacing a file in one step


@contextmanager
def _replacing(path: Path) -> Iterator[Path]:
    """Gives a new empty file, whose mode follows the umask. After the block, that file becomes `path`."""
    temporary = temporary_name(path)
    try:
        temporary.touch(exist_ok=False)
        with naming(path):
            yield temporary
        fsync(temporary)
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def temporary_name(path: Path) -> Path:
    """A name beside `path` for its new content. Nobody can guess the name, so nobody can put a link there first."""
    return path.with_name(f"{TEMPORARY}{path.name}-{secrets.token_hex(8)}")


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Inside the block, an OSError names `path`. Python itself names no file if writing to an open file fails."""
    try:
        yield
    except OSError as error:
        if error.errno is None or error.filename is not None:
            raise
        raise OSError(error.errno, os.strerror(error.errno), str(path)) from None


def fsync(path: Path) -> None:
    """Force a file, or a folder's list of names, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


# ---------------------------------------------------------------------- folders, and checksums of files


def make_folder(path: Path, argument: str) -> Path:
    """`path`, made if it is missing. Raises ValueError, which names `argument`, if no file can be written there."""
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
    except FileExistsError:
        raise ValueError(f"{argument}: {path} cannot be written (it is no folder)") from None
    except OSError as error:
        raise ValueError(f"{argument}: {path} cannot be written ({os.strerror(error.errno or 0)})") from None
    return path


def inside(directory: Path, name: str) -> Path:
    """`directory`/`name`, where `name` is one plain file or folder name that does not lead out of `directory`.

    A link into the folder "blobs" of a repository in the hub's cache is accepted: the cache keeps files there and links
    to them from its folder "snapshots".

    Raises:
        ValueError: `name` is absolute, has a slash or "..", or is a link to another place or to itself.
    """
    path = directory / name
    if not name or name in (".", "..") or Path(name).name != name or "\\" in name:
        raise ValueError(f"{directory}: {name!r} is not the plain name of a file or folder in it")
    try:
        leads_out = path.resolve().parent != directory.resolve() and not _is_blob_of_its_repository(path)
    except RuntimeError:  # older Pythons raise this for a link to itself
        leads_out = True
    if leads_out:
        raise ValueError(f"{path}: this is a link that leads out of {directory}; put the file itself there")
    return path


def _is_blob_of_its_repository(link: Path) -> bool:
    """Whether `link` stands in the hub's cache, as models--OWNER--NAME/snapshots/COMMIT/.../FILE, and leads to a file
    in the folder "blobs" of the same repository."""
    target, folder = link.resolve(), link.parent.resolve()
    return target.is_file() and any(
        snapshots.name == "snapshots"
        and snapshots.parent.name.startswith("models--")
        and target.parent == snapshots.parent / "blobs"
        for snapshots in folder.parents
    )


def sha256_of(path: Path) -> str:
    """The sha256 of a file's content."""
    with path.open("rb") as file:
        digest = hashlib.sha256()
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()


def sha256_of_json(value: Any) -> str:
    """The sha256 of a value that JSON can hold. The order of keys does not matter."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
