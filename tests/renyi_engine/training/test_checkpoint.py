"""A checkpoint is used as a whole or refused, whatever was done to one of its files."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from renyi_engine import LoraEnsemble, train
from renyi_engine.core.files import sha256_of
from renyi_engine.training import checkpoint

from .runs import fingerprint


@pytest.fixture(scope="module")
def finished(model_folder, data_file, tmp_path_factory):
    """A finished run with the checkpoints of steps 2 and 4, and the settings to resume it; not to be written to."""
    from renyi_engine import SftConfig

    config = SftConfig(
        model_name_or_path=str(model_folder),
        dataset_name=str(data_file),
        output_dir=str(tmp_path_factory.mktemp("finished") / "run"),
        num_particles=2,
        lora_r=2,
        max_steps=4,
        save_steps=2,
        use_cpu=True,
    )
    train(config)
    return config


@pytest.fixture
def run(finished, tmp_path) -> Path:
    return shutil.copytree(finished.output_dir, tmp_path / "run")


def resume(finished, run: Path, max_steps: int = 5) -> None:
    train(replace(finished, output_dir=str(run), resume_from_checkpoint="true", max_steps=max_steps))


def bless(folder: Path) -> None:
    """Write the manifest that fits the files, whatever they are."""
    names = ("adapters.safetensors", "optimizer.safetensors", "state.json")
    manifest = {n: {"bytes": (folder / n).stat().st_size, "sha256": sha256_of(folder / n)} for n in names}
    (folder / "manifest.json").write_text(json.dumps(manifest))


def test_a_finished_run_that_is_resumed_keeps_the_weights_that_were_fitted_since(finished, run):
    def saved():
        model = AutoModelForCausalLM.from_pretrained(finished.model_name_or_path)
        return LoraEnsemble.from_pretrained(model, run / "particles")

    ensemble = saved()
    ensemble.particle_weights = [0.75, 0.25]
    ensemble.save_pretrained(run / "particles", alpha=ensemble.alpha)
    resume(finished, run, max_steps=4)  # no step is left
    assert saved().particle_weights.tolist() == [0.75, 0.25]
    shutil.rmtree(run / "particles")
    resume(finished, run, max_steps=4)
    assert saved().particle_weights.tolist() == [0.5, 0.5]
    ensemble.save_pretrained(run / "particles", alpha=ensemble.alpha)
    resume(finished, run, max_steps=5)  # these are other particles
    assert saved().particle_weights.tolist() == [0.5, 0.5]


def test_every_flipped_bit_of_a_manifest_is_noticed(run):
    path = run / "checkpoint-4" / "manifest.json"
    whole = path.read_bytes()
    for bit in range(8 * len(whole)):
        flipped = bytearray(whole)
        flipped[bit // 8] ^= 1 << bit % 8
        path.write_bytes(flipped)
        with pytest.raises(ValueError, match="checkpoint-4"):
            checkpoint.verify(run / "checkpoint-4")


@pytest.mark.parametrize("text", ["", "{}", "[]", "null", '{"state.json": {"bytes": 3}}', '{"a": 1', "\xff"])
def test_a_manifest_that_does_not_vouch_for_every_file_is_passed_over_naming_both(finished, run, text):
    (run / "checkpoint-4" / "manifest.json").write_text(text, encoding="latin-1")
    with pytest.warns(UserWarning, match=r"checkpoint-4.*falling back to .*checkpoint-2"):
        assert checkpoint.newest(run) == run / "checkpoint-2"


@pytest.mark.parametrize("entry", ["exp_avg", "exp_avg_sq", "step"])
@pytest.mark.parametrize("damage", ["another shape", "another type", "gone", "of nobody"])
def test_moments_that_do_not_fit_are_refused(finished, run, entry, damage):
    folder = run / "checkpoint-4"
    moments = load_file(folder / "optimizer.safetensors")
    name = next(key for key in moments if key.endswith(entry))
    if damage == "another shape":
        moments[name] = torch.zeros(3, 5)
    elif damage == "another type":
        moments[name] = moments[name].double()
    elif damage == "gone":
        del moments[name]
    else:
        moments[f"other.lora_A.{entry}"] = moments[name].clone()
    save_file(moments, folder / "optimizer.safetensors")
    bless(folder)
    with pytest.raises(ValueError, match=r"optimizer\.safetensors: does not fit this ensemble"):
        resume(finished, run)


def in_the_old_format(folder: Path) -> dict[str, torch.Tensor]:
    """The moments of a checkpoint as earlier versions wrote them: every parameter has a counter of its own."""
    moments = load_file(folder / "optimizer.safetensors")
    step = moments.pop("step")
    names = [name.removesuffix(".exp_avg") for name in moments if name.endswith(".exp_avg")]
    return moments | {f"{name}.step": step.clone() for name in names}


def test_a_checkpoint_that_counts_the_steps_of_every_parameter_goes_on_bit_for_bit(finished, run, tmp_path):
    older = shutil.copytree(run, tmp_path / "older")
    save_file(in_the_old_format(older / "checkpoint-4"), older / "checkpoint-4" / "optimizer.safetensors")
    bless(older / "checkpoint-4")
    for folder in (run, older):
        resume(finished, folder, max_steps=6)
    assert fingerprint(older, 6) == fingerprint(run, 6)


@pytest.mark.parametrize("damage", ["another number", "gone", "of nobody", "both kinds"])
def test_counters_of_steps_that_disagree_are_refused(finished, run, damage):
    folder = run / "checkpoint-4"
    moments = in_the_old_format(folder)
    name = next(key for key in moments if key.endswith(".step"))
    if damage == "another number":
        moments[name] += 1
    elif damage == "gone":
        del moments[name]
    else:
        moments["other.lora_A.step" if damage == "of nobody" else "step"] = moments[name].clone()
    save_file(moments, folder / "optimizer.safetensors")
    bless(folder)
    problem = "have made different numbers of steps" if damage == "another number" else "does not fit this ensemble"
    with pytest.raises(ValueError, match=rf"optimizer\.safetensors: .*{problem}"):
        resume(finished, run)


def test_the_state_of_another_step_is_refused(finished, run):
    shutil.rmtree(run / "checkpoint-2")
    (run / "checkpoint-4").rename(run / "checkpoint-3")
    with pytest.raises(ValueError, match=r"state\.json: not the state of checkpoint-3"):
        resume(finished, run)


def test_adapters_without_their_other_half_are_not_exported(run):
    folder = run / "checkpoint-4"
    tensors = load_file(folder / "adapters.safetensors")
    del tensors[next(name for name in tensors if name.endswith(".lora_B"))]
    save_file(tensors, folder / "adapters.safetensors")
    bless(folder)
    with pytest.raises(ValueError, match="not stacked adapters"):
        checkpoint.adapters(folder)


def test_a_checkpoint_that_is_a_link_is_resumed_from_and_retention_removes_only_the_link(finished, run, tmp_path):
    elsewhere = tmp_path / "another_disk" / "checkpoint-4"
    elsewhere.parent.mkdir()
    (run / "checkpoint-4").rename(elsewhere)
    (run / "checkpoint-4").symlink_to(elsewhere)
    train(
        replace(
            finished,
            output_dir=str(run),
            resume_from_checkpoint=str(run / "checkpoint-4"),
            max_steps=8,
            save_steps=1,
            save_total_limit=2,
        )
    )
    assert [step for step, _ in checkpoint.all_of(run)] == [7, 8]
    checkpoint.verify(elsewhere)


def test_a_checkpoint_that_is_saved_again_is_never_away(finished, run):
    """The whole one stays: a kill between its removal and its replacement would lose it."""
    ensemble = LoraEnsemble.attach(
        AutoModelForCausalLM.from_pretrained(finished.model_name_or_path), finished.ensemble_config()
    )
    optimizer = torch.optim.AdamW([ensemble.particles.values])
    before = (run / "checkpoint-4").stat().st_ino
    assert checkpoint.save(run, 4, ensemble, optimizer, {}, keep=2) == run / "checkpoint-4"
    assert (run / "checkpoint-4").stat().st_ino == before


@pytest.mark.parametrize("keep", [2, 3, 9])
def test_retention_counts_back_from_what_was_just_written(finished, run, keep):
    ensemble = LoraEnsemble.attach(
        AutoModelForCausalLM.from_pretrained(finished.model_name_or_path), finished.ensemble_config()
    )
    optimizer = torch.optim.AdamW([ensemble.particles.values])
    assert checkpoint.save(run, 3, ensemble, optimizer, {}, keep=keep).is_dir()
    assert [step for step, _ in checkpoint.all_of(run)] == [2, 3, 4]
