"""Files are replaced in one go, under names that nobody can guess, and what is damaged is noticed."""

from __future__ import annotations

import os
import resource
import stat

import pytest
import torch

from renyi_engine.core import files


@pytest.fixture
def umask():
    before = os.umask(0o027)
    yield 0o027
    os.umask(before)


def write(path, kind):
    if kind == "text":
        files.write_text(path, "new")
    else:
        files.write_tensors(path, {"a": torch.ones(2)})


@pytest.mark.parametrize("kind", ["text", "tensors"])
def test_what_is_written_follows_the_umask(tmp_path, umask, kind):
    write(tmp_path / "file", kind)
    assert stat.S_IMODE((tmp_path / "file").stat().st_mode) == 0o666 & ~umask


@pytest.mark.parametrize("kind", ["text", "tensors"])
def test_a_link_is_replaced_and_not_written_through(tmp_path, kind):
    victim = tmp_path / "victim"
    victim.write_text("untouched")
    names = ["file", ".file.tmp", ".tmp-file"]  # the last two: names that a temporary file might be guessed to have
    for name in names:
        (tmp_path / name).symlink_to(victim)
    write(tmp_path / "file", kind)
    assert victim.read_text() == "untouched"
    assert not (tmp_path / "file").is_symlink()


def test_no_two_temporary_names_are_alike(tmp_path):
    names = {files.temporary_name(tmp_path / "file") for _ in range(100)}
    assert len(names) == 100
    assert all(path.name.startswith(files.TEMPORARY) for path in names)


@pytest.mark.parametrize("kind", ["text", "tensors"])
def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch, kind):
    path = tmp_path / "file"
    path.write_text("old")

    def no_space(path):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files, "fsync", no_space)
    with pytest.raises(OSError, match="No space left"):
        write(path, kind)
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]
    assert path.read_text() == "old"


def test_every_flipped_bit_of_checksummed_tensors_is_noticed(tmp_path):
    tensors = {"a": torch.tensor([[1.5, -2.0]]), "b": torch.tensor(3, dtype=torch.int64), "c": torch.ones(1).bfloat16()}
    path = tmp_path / "file.safetensors"
    files.write_tensors(path, tensors, files.checksum(tensors))
    whole = path.read_bytes()
    header = 8 + int.from_bytes(whole[:8], "little")
    for bit in range(8 * header, 8 * len(whole)):
        flipped = bytearray(whole)
        flipped[bit // 8] ^= 1 << bit % 8
        path.write_bytes(flipped)
        with pytest.raises(ValueError, match=r"file\.safetensors"):
            files.read_tensors(path)


@pytest.mark.parametrize("write", [files.write_text, files.append_text])
def test_a_full_disk_names_the_file_that_was_to_be_written(tmp_path, write):
    """Files of this process may grow to one byte. Python names no file where writing to an open one fails."""
    path = tmp_path / "file"
    path.write_text("before\n")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1, before[1]))
    try:
        with pytest.raises(OSError, match="File too large") as error:
            write(path, "0123456789\n")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert error.value.filename == str(path)
    assert path.read_text() == "before\n"


def test_a_link_to_itself_is_an_error_of_one_kind(tmp_path):
    (tmp_path / "p000").symlink_to("p000")
    # newer Pythons give such a path back, at which there is no file
    with pytest.raises(ValueError, match=r"leads out of|no such file"):
        files.read_tensors(files.inside(tmp_path, "p000"))
