"""ensemble.json: what is wrong in it is refused, and without it lost particles are still noticed."""

from __future__ import annotations

import json
import shutil

import pytest
from safetensors.torch import load_file, save_file

from renyi_engine import LoraEnsemble
from renyi_engine.ensemble import ensemble_file
from renyi_engine.ensemble.adapter_folder import CONFIG_FILE, ENSEMBLE_FILE, TENSORS_FILE

from .attaching import attach
from .folders import K, contents, edit_json, refused, write_peft

# ---------------------------------------------------------------------- what it says


@pytest.mark.parametrize(
    "content", [{}, [], "text", 3, None, {"particles": ["p000"]}, {"particles": 3, "sha256": {}}], ids=str
)
def test_an_ensemble_file_of_another_form_is_named(saved, llama, content):
    (saved / ENSEMBLE_FILE).write_text(json.dumps(content))
    refused(llama, saved, saved / ENSEMBLE_FILE)


@pytest.mark.parametrize("alpha", [-1, float("nan"), float("inf"), "0.8", True, [0.8], 10**400])
def test_an_alpha_that_is_none_is_refused(saved, llama, tiny_model, alpha):
    edit_json(saved / ENSEMBLE_FILE, alpha=alpha)
    refused(llama, saved, saved / ENSEMBLE_FILE, "alpha")


@pytest.mark.parametrize("alpha", [-1.0, float("nan")])
def test_an_alpha_that_is_none_is_not_saved(saved, tiny_model, alpha):
    before = contents(saved)
    with pytest.raises(ValueError, match="alpha"):
        attach(tiny_model("llama")).save_pretrained(saved, alpha=alpha)
    assert contents(saved) == before


def test_an_edited_list_is_refused_with_the_way_out(saved, llama):
    path = saved / ENSEMBLE_FILE
    path.write_text(path.read_text().replace('"alpha": 0.7', '"alpha": 0.8'))
    refused(llama, saved, path, "digest", "--alpha")


def test_an_ensemble_of_the_earlier_format_loads(saved, tiny_model):
    content = json.loads((saved / ENSEMBLE_FILE).read_text())
    del content["digest"]
    (saved / ENSEMBLE_FILE).write_text(json.dumps(content | {"format": 1}))
    assert LoraEnsemble.from_pretrained(tiny_model("llama"), saved).alpha == 0.7
    (saved / ENSEMBLE_FILE).write_text(json.dumps(content | {"format": 3}))
    refused(tiny_model("llama"), saved, "format 3")


@pytest.mark.parametrize("file", [TENSORS_FILE, CONFIG_FILE])
def test_a_particle_that_is_not_listed_is_not_left_out_unnoticed(saved, llama, file):
    (saved / "p003").mkdir()
    shutil.copy(saved / "p000" / file, saved / "p003" / file)
    refused(llama, saved, "p003", ENSEMBLE_FILE)


# ---------------------------------------------------------------------- when it is lost


def test_particles_without_their_list_load_whole_with_a_warning(bare, tiny_model):
    with pytest.warns(UserWarning, match=f"there is no {ENSEMBLE_FILE}"):
        ensemble = LoraEnsemble.from_pretrained(tiny_model("llama"), bare)
    assert (ensemble.config.num_particles, ensemble.alpha) == (K, None)


@pytest.mark.parametrize("lost", ["p000", "p001", "p002"])
@pytest.mark.parametrize("how", ["folder", "config", "both files"])
def test_a_lost_particle_is_seen_without_the_list_too(bare, llama, lost, how):
    if how == "folder":
        shutil.rmtree(bare / lost)
    else:
        (bare / lost / CONFIG_FILE).unlink()
        if how == "both files":
            (bare / lost / TENSORS_FILE).unlink()
    refused(llama, bare, bare)


def test_particles_in_another_order_are_seen(bare, llama):
    (bare / "p000").rename(bare / "p009")
    (bare / "p001").rename(bare / "p000")
    (bare / "p009").rename(bare / "p001")
    refused(llama, bare, bare / "p000", "particle 1/3")


def test_an_adapter_of_another_name_beside_particles_is_refused(bare, llama):
    shutil.copytree(bare / "p001", bare / "mine")
    refused(llama, bare, "mine beside them")


def test_particles_under_other_names_are_a_plain_set(bare, tiny_model):
    (bare / "p001").rename(bare / "b")
    (bare / "p000").rename(bare / "a")
    shutil.rmtree(bare / "p002")
    assert LoraEnsemble.from_pretrained(tiny_model("llama"), bare).config.num_particles == 2


def test_a_list_that_is_a_dangling_link_is_not_taken_for_no_list(bare, llama):
    (bare / ENSEMBLE_FILE).symlink_to(bare / "gone")
    refused(llama, bare, ENSEMBLE_FILE)


def test_adapters_below_one_that_is_loaded_are_mentioned(tiny_model, tmp_path):
    """PEFT saves its adapter "default" into the folder itself, and others into folders below."""
    write_peft(tiny_model("llama"), tmp_path, names=("default", "b"))
    with pytest.warns(UserWarning, match="those in b are not"):
        assert LoraEnsemble.from_pretrained(tiny_model("llama"), tmp_path).config.num_particles == 1


@pytest.mark.parametrize("text", ["[" * 100_000, "{", "3", '{"digest": ""}'], ids=["deep", "cut", "number", "other"])
def test_a_particle_that_says_nonsense_of_its_base_is_refused(bare, llama, text):
    for k in range(K):
        path = bare / f"p{k:03d}" / TENSORS_FILE
        save_file(load_file(path), path, metadata={"format": "pt", "base": text})
    refused(llama, bare, bare / "p000" / TENSORS_FILE, "base")


# ---------------------------------------------------------------------- what it lists


def test_a_particle_listed_twice_is_refused(saved, llama):
    """One flipped bit makes p000 of p001."""
    edit_json(saved / ENSEMBLE_FILE, particles=["p000", "p000", "p002"])
    refused(llama, saved, "p000")


def test_a_flipped_bit_in_the_list_of_files_is_refused_or_changes_nothing(saved):
    """Nothing: where white space becomes other white space."""
    path = saved / ENSEMBLE_FILE
    content = path.read_bytes()
    sound = json.loads(content)
    for position in range(0, len(content), 3):
        damaged = bytearray(content)
        damaged[position] ^= 1 << position % 8
        path.write_bytes(damaged)
        try:
            ensemble_file.read(path)
        except ValueError:
            continue
        assert json.loads(damaged) == sound, f"byte {position}: {bytes(damaged[max(0, position - 9) :][:20])}"


def test_a_particle_without_a_checksum_is_refused(saved, llama):
    """A list that leaves a file out would let a damaged one through."""
    checksums = json.loads((saved / ENSEMBLE_FILE).read_text())["sha256"]
    del checksums[f"p001/{TENSORS_FILE}"]
    edit_json(saved / ENSEMBLE_FILE, sha256=checksums)
    refused(llama, saved, f"p001/{TENSORS_FILE}")
