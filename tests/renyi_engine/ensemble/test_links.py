"""Names and links may not lead out of an adapter folder; those of the hub's cache do not."""

from __future__ import annotations

import json
import os
import shutil

import pytest
import torch

from renyi_engine import LoraEnsemble
from renyi_engine.core.files import inside, sha256_of
from renyi_engine.ensemble.adapter_folder import CONFIG_FILE, ENSEMBLE_FILE, TENSORS_FILE, read

from .attaching import attach
from .folders import K, contents, edit_json, refused

# ---------------------------------------------------------------------- names and links


@pytest.mark.parametrize("name", ["../x", "..", ".", "", "/abs", "a/b", "p000/../p001", "a\\b", "p000/"])
def test_a_particle_name_that_is_no_plain_name_is_refused(saved, llama, name):
    shutil.copytree(saved / "p000", saved.parent / "x")  # there to be found, were it looked for
    edit_json(saved / ENSEMBLE_FILE, particles=[name])
    refused(llama, saved, repr(name))


@pytest.mark.parametrize("name", ["../x/adapter_config.json", "/etc/passwd", "p000/../../x", "p000/a/b", "p000"])
def test_a_checksum_of_a_file_elsewhere_is_refused(saved, llama, name):
    checksums = json.loads((saved / ENSEMBLE_FILE).read_text())["sha256"]
    edit_json(saved / ENSEMBLE_FILE, sha256=checksums | {name: "0" * 64})
    refused(llama, saved, name)


@pytest.mark.parametrize("listed", [True, False])
def test_a_particle_that_is_a_link_out_of_the_folder_is_refused(saved, llama, listed):
    shutil.move(saved / "p001", saved.parent / "elsewhere")
    (saved / "p001").symlink_to(saved.parent / "elsewhere")
    if not listed:
        (saved / ENSEMBLE_FILE).unlink()
    refused(llama, saved, saved / "p001", "link")


@pytest.mark.parametrize("file", [TENSORS_FILE, CONFIG_FILE])
@pytest.mark.parametrize("listed", [True, False])
def test_a_file_that_is_a_link_out_of_the_folder_is_refused(saved, llama, file, listed):
    shutil.move(saved / "p001" / file, saved.parent / "elsewhere")
    (saved / "p001" / file).symlink_to(saved.parent / "elsewhere")
    if not listed:
        (saved / ENSEMBLE_FILE).unlink()
    refused(llama, saved, saved / "p001" / file, "link")


def test_the_folder_itself_may_be_a_link(saved, tiny_model):
    link = saved.parent / "link"
    link.symlink_to(saved)
    assert LoraEnsemble.from_pretrained(tiny_model("llama"), link).config.num_particles == K


def test_inside_takes_plain_names(tmp_path):
    assert inside(tmp_path, "p000") == tmp_path / "p000"
    (tmp_path / "p001").mkdir()
    (tmp_path / "alias").symlink_to(tmp_path / "p001")
    assert inside(tmp_path, "alias") == tmp_path / "alias"


# ---------------------------------------------------------------------- the hub's cache


@pytest.fixture
def cached(saved, tmp_path):
    """`saved` as the hub's client keeps it: every file in blobs, and links to them under the commit."""
    repository = tmp_path / "hub" / "models--someone--adapters"
    (repository / "blobs").mkdir(parents=True)
    snapshot = repository / "snapshots" / "0a1b2c"
    for path in [path for path in saved.rglob("*") if path.is_file()]:
        blob = repository / "blobs" / sha256_of(path)
        shutil.copy(path, blob)
        link = snapshot / path.relative_to(saved)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(os.path.relpath(blob, link.parent))
    return snapshot


@pytest.mark.parametrize("form", ["ensemble", "particles", "one particle", "behind a link"])
def test_adapters_in_the_hubs_cache_load(cached, saved, tiny_model, form):
    folder = cached
    if form == "particles":
        (cached / ENSEMBLE_FILE).unlink()
    elif form == "one particle":
        folder = cached / "p000"
    elif form == "behind a link":
        folder = cached.parents[2].parent / "link"
        folder.symlink_to(cached.parents[2])
        folder = folder / cached.relative_to(cached.parents[2])
    ours = LoraEnsemble.from_pretrained(tiny_model("llama"), folder).stacked()
    for path, pair in read(saved).adapters.items():
        assert all(torch.equal(a[: len(b)], b) for a, b in zip(pair, ours[path], strict=True))


@pytest.mark.parametrize(
    "target", ["outside", "another repository", "above the blobs", "below the blobs", "a folder", "nothing"]
)
@pytest.mark.parametrize("listed", [True, False])
def test_a_link_in_the_hubs_cache_to_anything_but_a_blob_of_its_repository_is_refused(cached, llama, target, listed):
    repository = cached.parents[1]
    link = cached / "p001" / TENSORS_FILE
    content = link.read_bytes()
    places = {
        "outside": repository.parents[1] / "elsewhere",
        "another repository": repository.parent / "models--someone--else" / "blobs" / "0123",
        "above the blobs": repository / "0123",
        "below the blobs": repository / "blobs" / "more" / "0123",
        "a folder": repository / "blobs" / "folder" / "x",
        "nothing": repository / "blobs" / "none" / "x",
    }
    place = places[target]
    place.parent.mkdir(parents=True, exist_ok=True)
    place.write_bytes(content)
    link.unlink()
    link.symlink_to(place.parent if target == "a folder" else place)
    if target == "nothing":
        place.unlink()
    if not listed:
        (cached / ENSEMBLE_FILE).unlink()
    refused(llama, cached, link, "link")


def test_blobs_beside_a_folder_that_is_no_cache_are_elsewhere(cached, llama):
    repository = cached.parents[1]
    moved = repository.rename(repository.with_name("adapters"))
    refused(llama, moved / "snapshots" / "0a1b2c", "link")


def test_saving_into_the_hubs_cache_never_writes_through_a_link(cached, tiny_model):
    blobs = contents(cached.parents[1] / "blobs")
    attach(tiny_model("llama"), 1).save_pretrained(cached)
    assert contents(cached.parents[1] / "blobs") == blobs
