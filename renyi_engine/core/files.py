"""Reading and writing safely: safetensors and JSON only, nothing is ever unpickled, what is broken is named.

A file is written under a temporary name, `.tmp-NAME-RANDOM`, and renamed when it is whole. So a reader finds the old
file or the new one, also after a kill. What a kill leaves behind is removed by the next writer: see `output_folder`.
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
"""The names of unfinished files and folders begin with this."""


def read_tensors(path: Path, *, stacked: bool = False) -> dict[str, Tensor]:
    """Every tensor of a safetensors file, on CPU. `stacked`: the first axis counts particles, and errors name them.

    Raises:
        ValueError, in one line: missing, pickled (unread), not a whole safetensors file, another `checksum` than the
            one in its header, a tensor not finite.
    """
    if path.suffix in PICKLE_SUFFIXES:
        raise ValueError(f"{path}: pickled weights are refused unread; convert them to .safetensors first")
    if not path.is_file():
        raise ValueError(f"{path}: no such file")
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
            expected = (file.metadata() or {}).get(_CHECKSUM)
    except (SafetensorError, OSError, ValueError) as error:
        raise ValueError(f"{path}: not a whole safetensors file ({error})") from None
    if expected is not None and expected != checksum(tensors)[_CHECKSUM]:
        raise ValueError(f"{path}: sha256 differs from the one in its header; it is damaged")
    for name, tensor in tensors.items():
        if not tensor.is_floating_point() or tensor.dtype == torch.float4_e2m1fn_x2:  # which has no such values
            continue
        finite = tensor.float().isfinite()  # as fp32, which everything here is computed in
        if not finite.all():
            first = (~finite).nonzero()[0].tolist()
            particle = f"particle {first[0]}: " if stacked and first else ""
            raise ValueError(
                f"{path}: {particle}tensor {name} holds NaN, infinite values, or values too large for float32"
            )
    return tensors


def checksum(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """The sha256 of names, types, shapes and values, as `metadata` for `write_tensors`; `read_tensors` checks it."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return {_CHECKSUM: digest.hexdigest()}


def read_metadata(path: Path) -> dict[str, str]:
    """The texts that a whole safetensors file carries beside its tensors."""
    with safe_open(path, framework="pt") as file:
        return file.metadata() or {}


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Replace a safetensors file in one go. `metadata`: texts for its header."""
    on_cpu = {name: t.detach().cpu().contiguous() for name, t in tensors.items()}
    with _replacing(path) as temporary:
        mode = temporary.stat().st_mode
        try:
            save_file(on_cpu, temporary, metadata={"format": "pt", **(metadata or {})})
        except SafetensorError as error:  # an error of the system, such as a full disk
            raise OSError(f"{path}: cannot be written ({error})") from None
        temporary.chmod(mode)  # the library lets only the owner read what it writes
        _sort_metadata(temporary)


def _sort_metadata(path: Path) -> None:
    """Sort the metadata, which safetensors writes in any order, so that equal content makes equal files."""
    with path.open("r+b") as file:
        (size,) = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(size))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode().ljust(size)
        assert len(text) == size
        file.seek(8)
        file.write(text)


def read_json(path: Path) -> Any:
    """The value in a JSON file. Raises ValueError, in one line, if the file is missing or broken."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file") from None
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not a JSON file ({error})") from None


def write_json(path: Path, value: Any) -> None:
    write_text(path, json.dumps(value, indent=2) + "\n")


# a spreadsheet takes a cell that begins with one of these for a formula; the last begins one that `write_csv` changed
_FORMULA = ("=", "+", "-", "@", "\t", "\r", "\n", "＝", "＋", "－", "＠", "'")


def write_csv(path: Path, rows: Sequence[DataclassInstance]) -> None:
    """A line for each of the rows, all of one class, under the names of its fields.

    An apostrophe stands in front of a text that a spreadsheet would take for a formula, or that begins with one itself.
    To read the file, remove the first character of every text that begins with an apostrophe, as `read_csv` does. A
    number is written as it is.
    """
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, [field.name for field in dataclasses.fields(rows[0])])
    writer.writeheader()
    for row in rows:
        cells = dataclasses.asdict(row).items()
        writer.writerow({k: f"'{v}" if isinstance(v, str) and v.startswith(_FORMULA) else v for k, v in cells})
    write_text(path, text.getvalue())


def read_csv(path: Path) -> list[dict[str, str]]:
    """The cells of a file of `write_csv`, every one as the text that it was before it was written."""
    with path.open(newline="", encoding="utf-8") as file:
        return [{name: cell.removeprefix("'") for name, cell in row.items()} for row in csv.DictReader(file)]


def finite(value: Any) -> Any:
    """`value` as JSON can say it: what is not a finite number becomes null."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_text(path: Path, text: str) -> None:
    """Replace a text file in one go."""
    with _replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def temporary_name(path: Path) -> Path:
    """A name beside `path` for its new content. Nobody can guess it, so nobody can put a link there beforehand."""
    return path.with_name(f"{TEMPORARY}{path.name}-{secrets.token_hex(8)}")


def append_text(path: Path, text: str) -> None:
    with naming(path), path.open("a", encoding="utf-8") as file:
        file.write(text)


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Inside, an OSError says that it is about `path`; writing to an open file, Python does not say it."""
    try:
        yield
    except OSError as error:
        if error.errno is None or error.filename is not None:
            raise
        raise OSError(error.errno, os.strerror(error.errno), str(path)) from None


@contextmanager
def _replacing(path: Path) -> Iterator[Path]:
    """Gives a new empty file, whose mode follows the umask. After the block, what was written there becomes `path`."""
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


def make_folder(path: Path, argument: str) -> Path:
    """`path`, made if need be. Raises ValueError, naming `argument`, unless files can be written there."""
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
    except FileExistsError:
        raise ValueError(f"{argument}: {path} cannot be written (it is no folder)") from None
    except OSError as error:
        raise ValueError(f"{argument}: {path} cannot be written ({os.strerror(error.errno or 0)})") from None
    return path


def sha256_of(path: Path) -> str:
    """The checksum of a file."""
    with path.open("rb") as file:
        digest = hashlib.sha256()
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()


def sha256_of_json(value: Any) -> str:
    """The checksum of a value that JSON can hold; the order of keys does not matter."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def fsync(path: Path) -> None:
    """Force a file, or a folder's list of names, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def inside(directory: Path, name: str) -> Path:
    """`directory`/`name`, where name is one plain folder or file name that does not lead out of `directory`.

    The hub's cache keeps a repository's files in its folder "blobs" and links to them in "snapshots"; they are inside.

    Raises:
        ValueError: name is absolute, has a slash or "..", or is a link to elsewhere, or to itself.
    """
    path = directory / name
    if not name or name in (".", "..") or Path(name).name != name or "\\" in name:
        raise ValueError(f"{directory}: {name!r} is not a plain name inside it")
    try:
        leads_out = path.resolve().parent != directory.resolve() and not _is_blob_of_its_repository(path)
    except RuntimeError:  # what older Pythons say of a link that leads back to itself
        leads_out = True
    if leads_out:
        raise ValueError(f"{path}: a link that leads out of {directory}")
    return path


def _is_blob_of_its_repository(link: Path) -> bool:
    """Whether `link` is HUB_CACHE/models--OWNER--NAME/snapshots/COMMIT/.../FILE, and leads to a file in that
    repository's blobs."""
    target, folder = link.resolve(), link.parent.resolve()
    return target.is_file() and any(
        snapshots.name == "snapshots"
        and snapshots.parent.name.startswith("models--")
        and target.parent == snapshots.parent / "blobs"
        for snapshots in folder.parents
    )
