"""An export trusts nothing that a run's folder says: neither about code, nor about what the checkpoint holds."""

from __future__ import annotations

import hashlib
import json
import re
import resource
import shutil

import pytest
import yaml

from renyi_engine import train
from renyi_engine.cli import EXIT_BAD_INPUT, main
from renyi_engine.core.output_folder import locked
from renyi_engine.core.settings import to_yaml
from renyi_engine.training.config import DpoConfig, SftConfig


@pytest.fixture(scope="module")
def trained(tmp_path_factory, model_folder, data_file):
    folder = tmp_path_factory.mktemp("trained") / "run"
    train(
        SftConfig(
            model_name_or_path=str(model_folder),
            dataset_name=str(data_file),
            output_dir=str(folder),
            num_particles=2,
            lora_r=2,
            lora_target_modules=["q_proj"],
            layers_to_transform=[1, 2],
            max_steps=1,
            use_cpu=True,
        )
    )
    return folder


@pytest.fixture
def edited(trained, tmp_path):
    """edited(**values): a copy of the run with other settings in its config.yaml."""

    def make(**values):
        run = shutil.copytree(trained, tmp_path / "run")
        settings = yaml.safe_load((run / "config.yaml").read_text())
        (run / "config.yaml").write_text(yaml.safe_dump(settings | values))
        return run

    return make


@pytest.fixture
def with_state(trained, tmp_path):
    """with_state(change): a copy of the run whose state.json is change(state), with the checksum that belongs to it."""

    def make(change):
        run = shutil.copytree(trained, tmp_path / "run")
        state, manifest = (run / "checkpoint-1" / name for name in ("state.json", "manifest.json"))
        state.write_text(json.dumps(change(json.loads(state.read_text()))))
        entry = {"bytes": state.stat().st_size, "sha256": hashlib.sha256(state.read_bytes()).hexdigest()}
        manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"state.json": entry}))
        return run

    return make


@pytest.fixture
def exported(tmp_path, capsys):
    """exported(run, *flags): (exit code, what is printed as an error) of `renyi-engine export`."""

    def run(run, *flags):
        code = main(["export", str(run), "--output_dir", str(tmp_path / "out"), *flags])
        return code, capsys.readouterr().err

    return run


@pytest.fixture
def base_with_code(model_folder, tmp_path):
    """A base that transformers loads only with code of its own; the code leaves a mark where it runs."""
    folder, mark = shutil.copytree(model_folder, tmp_path / "base"), tmp_path / "mark"
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "own", "auto_map": {"AutoConfig": "own.Own"}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "own.py").write_text(
        f"from transformers import LlamaConfig\nopen({str(mark)!r}, 'w').close()\nclass Own(LlamaConfig):\n    pass\n"
    )
    return folder, mark


def test_a_run_cannot_say_that_code_is_trusted(edited, exported, base_with_code):
    folder, mark = base_with_code
    run = edited(trust_remote_code=True, model_name_or_path=str(folder))
    code, error = exported(run)
    assert code == EXIT_BAD_INPUT
    assert "trust_remote_code" in error
    assert not mark.exists()
    exported(run, "--trust_remote_code")
    assert mark.exists()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"num_particles": 3}, "num_particles: 3 here, but .*checkpoint-1 holds 2"),
        ({"lora_r": 1}, "lora_r: 1 here, but .*checkpoint-1 holds 2"),
        (
            {"lora_target_modules": ["v_proj"]},
            r"lora_target_modules.*: adapters of model.layers.1.self_attn.q_proj are",
        ),
        ({"lora_target_modules": ["q_proj", "v_proj"]}, "lora_target_modules.*v_proj are not in .*checkpoint-1"),
        ({"layers_to_transform": [1]}, "layers_to_transform: adapters of model.layers.2.self_attn.q_proj are only in"),
        ({"layers_to_transform": [7]}, "layers_to_transform: expected layers from 0 to 2; got"),
        ({"lora_target_modules": ["nothing"]}, "target_modules: .* matches no linear map"),
        ({"lora_r": "two"}, "argument --lora_r.*: invalid int value: 'two'"),
        ({"lora_r": [2]}, r"lora_r: expected one value; got \['2'\]"),
        ({"lora_alpha": -1}, "lora_alpha: expected a number above 0"),
        ({"alpha": "much"}, "argument --alpha: invalid float value"),
        ({"num_partcles": 2}, "unknown key 'num_partcles'; did you mean 'num_particles'"),
        ({"model_name_or_path": "/no/such"}, "model_name_or_path: '/no/such' cannot be loaded"),
        ({"use_rslora": {"a": 1}}, "use_rslora: expected one value"),
    ],
)
def test_settings_that_are_not_those_of_the_checkpoint_are_one_line(edited, exported, tmp_path, values, message):
    run = edited(**values)
    code, error = exported(run)
    assert code == EXIT_BAD_INPUT
    assert len(error.splitlines()) == 1
    assert error.startswith(f"renyi-engine export: {run / 'config.yaml'}: ")
    assert re.search(message, error), error
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "text",
    ["", "[]", "a: [", "a: &a [*a, *a]", "\x00", "[" * 1500, "1: 2", "? [a]\n: b"],
    ids=lambda text: repr(text[:8]),
)
def test_a_broken_config_is_one_line(edited, exported, text):
    run = edited()
    (run / "config.yaml").write_text(text)
    code, error = exported(run)
    assert code == EXIT_BAD_INPUT
    assert len(error.splitlines()) == 1
    assert error.startswith(f"renyi-engine export: {run / 'config.yaml'}: ")


@pytest.mark.parametrize(
    "values", [{"lora_alpha": 17}, {"use_rslora": True}, {"seed": 43}, {"init": "spread"}], ids=str
)
def test_settings_that_no_tensor_shows_are_held_against_the_checkpoint(edited, exported, values):
    run = edited(**values)
    code, error = exported(run)
    assert code == EXIT_BAD_INPUT
    assert error.startswith(f"renyi-engine export: {run / 'config.yaml'}: other settings than those of ")
    assert next(iter(values)) in error


@pytest.mark.parametrize(("rank", "code"), [(2, 0), (3, EXIT_BAD_INPUT)])
def test_a_checkpoint_that_calls_r_rank_is_read(with_state, exported, rank, code):
    """As checkpoints of earlier versions do."""

    def renamed(state):
        del state["ensemble"]["r"]
        return state | {"ensemble": state["ensemble"] | {"rank": rank}}

    assert exported(with_state(renamed))[0] == code


@pytest.mark.parametrize("text", ["{}", "dataset_name: a", "model_name_or_path: a\ndataset_name: b"])
def test_a_config_that_was_cut_short_is_told_as_that(edited, exported, text):
    run = edited()
    (run / "config.yaml").write_text(text)
    code, error = exported(run)
    assert code == EXIT_BAD_INPUT
    assert error.startswith(f"renyi-engine export: {run / 'config.yaml'}: not the settings of a run: ")
    assert "--" not in error  # export has no flag for what is missing


@pytest.mark.parametrize(
    "values",
    [[], {}, {"alpha": "x"}, {"alpha": 10**400}, {"alpha": -1}, {"base": {}}, {"base": "x"}, {"ensemble": "x"}],
    ids=str,
)
def test_a_checkpoint_whose_state_was_forged_is_one_line(with_state, exported, tmp_path, values):
    run = with_state(lambda state: {**state, **values} if values else values)
    code, printed = exported(run)
    assert code == EXIT_BAD_INPUT
    assert printed.count("\n") == 1
    assert f"{run / 'checkpoint-1' / 'state.json'}: " in printed
    assert not list((tmp_path / "out").glob("*"))


@pytest.mark.parametrize("most_bytes", [1, 300, 800])
def test_a_disk_that_is_full_is_one_line(trained, exported, most_bytes):
    """Files of this process may grow to so many bytes. To write more is an error like that of a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (most_bytes, before[1]))
    try:
        code, error = exported(trained)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert code == EXIT_BAD_INPUT
    assert len(error.splitlines()) == 1
    assert "File too large" in error


def test_a_base_of_other_sizes_is_named(edited, exported, model_folder, tmp_path):
    folder = shutil.copytree(model_folder, tmp_path / "other")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"hidden_size": 32, "head_dim": 8}))
    code, error = exported(edited(model_name_or_path=str(folder)))
    assert code == EXIT_BAD_INPUT
    assert "model_name_or_path: model.layers.1.self_attn.q_proj has (32, 16) in and out features in" in error


def test_a_run_of_preferences_is_read_with_its_own_settings(edited, exported):
    run = edited()
    settings = yaml.safe_load((run / "config.yaml").read_text())
    del settings["kind"]
    (run / "config.yaml").write_text(to_yaml(DpoConfig(**settings, beta=0.2)))
    assert exported(run)[0] == 0


def test_what_the_folder_holds_already_is_not_replaced(trained, exported, tmp_path):
    """Particles of another run, say; nor does a second export write beside a first."""
    assert exported(trained)[0] == 0
    before = {path: path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()}
    code, error = exported(trained)
    assert code == EXIT_BAD_INPUT
    assert f"output_dir: {tmp_path / 'out'} already holds ensemble.json, p000" in error
    assert {path: path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()} == before
    with locked(tmp_path / "out"):
        assert "output_dir: another process is writing into" in exported(trained)[1]
