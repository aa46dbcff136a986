"""Saving replaces the particles of an earlier ensemble and nothing else, also after a kill."""

from __future__ import annotations

import errno
import shutil
from pathlib import Path

import pytest

from renyi_engine import LoraEnsemble
from renyi_engine.core import files
from renyi_engine.ensemble import replaceable_particles
from renyi_engine.ensemble.adapter_folder import CONFIG_FILE, ENSEMBLE_FILE, TENSORS_FILE

from .attaching import attach
from .folders import edit_json, tree, write_peft

# ---------------------------------------------------------------------- what is replaced


def test_saving_fewer_particles_leaves_no_stale_one(saved, tiny_model):
    attach(tiny_model("llama"), 2).save_pretrained(saved)
    assert sorted(path.name for path in saved.iterdir()) == [ENSEMBLE_FILE, "p000", "p001"]
    assert LoraEnsemble.from_pretrained(tiny_model("llama"), saved).config.num_particles == 2


def test_saving_over_an_ensemble_keeps_what_is_not_its_own(saved, tiny_model):
    (saved / "notes.txt").write_text("mine")
    (saved / "p007").mkdir()
    attach(tiny_model("llama"), 1).save_pretrained(saved)
    assert sorted(path.name for path in saved.iterdir()) == [ENSEMBLE_FILE, "notes.txt", "p000", "p007"]


def test_saving_over_a_folder_whose_list_leads_out_of_it_removes_nothing_there(saved, tiny_model):
    outside = saved.parent / "outside"
    outside.mkdir()
    (outside / "precious").write_text("x")
    edit_json(saved / ENSEMBLE_FILE, particles=["../outside"])
    with pytest.raises(ValueError, match="outside"):
        attach(tiny_model("llama"), 1).save_pretrained(saved)
    assert (outside / "precious").is_file()


# ---------------------------------------------------------------------- what is not, and what a kill leaves


@pytest.mark.parametrize(
    "kind", ["another name", "more in it", "a folder in it", "no particle", "adapter of peft", "a link", "a file"]
)
@pytest.mark.parametrize("listed", [True, False])
def test_saving_never_removes_what_is_no_particle_written_here(saved, tiny_model, kind, listed):
    """Whether ensemble.json lists it, or it stands under the name of a particle to be written."""
    precious = saved / ("precious" if kind == "another name" else "p001")
    if kind == "another name":
        (saved / "p001").rename(precious)
    elif kind == "more in it":
        (precious / "thesis.txt").write_text("years of work")
    elif kind == "a folder in it":
        (precious / "thesis").mkdir()
    elif kind == "a link":
        precious.rename(saved / "real")
        precious.symlink_to(saved / "real")
    else:
        shutil.rmtree(precious)
        if kind == "a file":
            precious.write_text("years of work")
        elif kind == "adapter of peft":
            write_peft(tiny_model("llama"), precious, names=("default",))
            (precious / "README.md").unlink()
        else:
            precious.mkdir()
            (precious / CONFIG_FILE).write_text("{}")
    if listed:
        edit_json(saved / ENSEMBLE_FILE, particles=["p000", precious.name, "p002"])
    else:
        (saved / ENSEMBLE_FILE).unlink()
        if kind == "another name":
            precious = precious.rename(saved / "p003")
    before = tree(saved)
    with pytest.raises(ValueError, match=precious.name) as refusal:
        attach(tiny_model("llama")).save_pretrained(saved)
    assert "save to another folder" in str(refusal.value)
    assert tree(saved) == before


def test_a_save_that_fails_leaves_the_ensemble_that_was_there(saved, tiny_model, monkeypatch):
    before = tree(saved)
    ensemble = attach(tiny_model("llama"), 2)
    monkeypatch.setattr(files, "sha256_of", fails_the_third_time(files.sha256_of))
    with pytest.raises(OSError, match="No space left"):
        ensemble.save_pretrained(saved)
    assert tree(saved) == before


def fails_the_third_time(function):
    calls = []

    def call(*args):
        calls.append(1)
        if len(calls) == 3:
            raise OSError(errno.ENOSPC, "No space left on device")
        return function(*args)

    return call


@pytest.mark.parametrize("renamed", [0, 1, 2])
def test_a_save_that_was_killed_can_be_done_again(saved, tiny_model, monkeypatch, renamed):
    """Between the removal of the old particles and the new list."""
    ensemble = attach(tiny_model("llama"), 3)

    class Killed(BaseException):
        pass

    def kill(self, target, rename=Path.rename, calls=[]):  # noqa: B006
        if len(calls) == renamed:
            raise Killed
        calls.append(1)
        return rename(self, target)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(Path, "rename", kill)
        patch.setattr(replaceable_particles, "_remove_unfinished", lambda path: None)
        ensemble.save_pretrained(saved)
    assert list(saved.glob(".tmp-particles-*"))
    ensemble.save_pretrained(saved, alpha=0.7)
    assert sorted(path.name for path in saved.iterdir()) == [ENSEMBLE_FILE, "p000", "p001", "p002"]
    assert LoraEnsemble.from_pretrained(tiny_model("llama"), saved).alpha == 0.7


@pytest.mark.parametrize("file", [TENSORS_FILE, CONFIG_FILE])
def test_a_particle_that_a_killed_save_half_wrote_goes_with_the_next_save(saved, tiny_model, file):
    half = files.temporary_name(saved / ".tmp-particles-x" / "p000" / file)
    half.parent.mkdir(parents=True)
    half.write_bytes(b"half")
    attach(tiny_model("llama")).save_pretrained(saved)
    assert sorted(path.name for path in saved.iterdir()) == [ENSEMBLE_FILE, "p000", "p001", "p002"]


def test_a_folder_that_only_looks_like_a_leftover_stays(saved, tiny_model):
    for name in ("p000", "notes"):
        (saved / ".tmp-particles-x" / name).mkdir(parents=True)
        (saved / ".tmp-particles-x" / name / "thesis.txt").write_text("years of work")
    before = tree(saved / ".tmp-particles-x")
    attach(tiny_model("llama")).save_pretrained(saved)
    assert tree(saved / ".tmp-particles-x") == before
