"""Results go into a folder that is free, and what another command wrote stays as it is."""

from __future__ import annotations

import json

import pytest

from renyi_engine.cli import EXIT_BAD_INPUT, main
from renyi_engine.core.output_folder import LOCK_FILE, claimed


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_folder_is_free_if_it_is_new_or_empty(tmp_path):
    for name in ("new", "new/deeper", "new/deeper"):
        with claimed(tmp_path / name / "er") as folder:
            assert folder.is_dir()
    (tmp_path / "hidden").mkdir()
    (tmp_path / "hidden" / ".DS_Store").write_text("")
    with claimed(tmp_path / "hidden") as folder:
        assert folder == tmp_path / "hidden"


def test_one_that_holds_something_is_refused_by_name_with_the_ways_out(tmp_path):
    for name in "gfedcba":
        (tmp_path / name).write_text("kept")
    with pytest.raises(ValueError) as error, claimed(tmp_path, "output"):
        pass
    assert str(error.value) == (
        f"output: {tmp_path} already holds a, b, c and 4 more, which would be lost or mixed up; "
        "choose another --output, or remove them"
    )
    with pytest.raises(ValueError, match=r"output_dir: .* cannot be written"), claimed(tmp_path / "a"):
        pass


@pytest.mark.parametrize("command", ["nll", "alpha-star", "mmlu", "refusal"])
def test_two_of_them_do_not_write_into_one_folder(flags, tmp_path, capsys, command):
    with claimed(tmp_path / "run"):
        assert main([*flags[command], f"--output_dir={tmp_path / 'run'}"]) == EXIT_BAD_INPUT
    assert f"output_dir: another process is writing into {tmp_path / 'run'}" in capsys.readouterr().err


@pytest.fixture
def flags(jsonl, tmp_path):
    """Of each command that writes results, on data that it can read and a model that is not there."""
    data = jsonl(tmp_path / "data.jsonl", [{"prompt": "a", "completion": "b"}])
    (tmp_path / "mmlu").mkdir()
    question = {"subject": "anatomy", "question": "a", "choices": ["1", "2", "3", "4"], "answer": 1}
    jsonl(tmp_path / "mmlu" / "test.jsonl", [question])
    (tmp_path / "particles").mkdir()
    (tmp_path / "particles" / "ensemble.json").write_text("{}")
    rest = [f"--ensemble={tmp_path / 'particles'}", "--model_name_or_path=/nowhere", "--use_cpu=true"]
    return {
        "nll": ["eval", "nll", f"--dataset_name={data}", *rest],
        "alpha-star": ["alpha-star", f"--dataset_name={data}", *rest],
        "mmlu": ["eval", "mmlu", f"--dataset_name={tmp_path / 'mmlu'}", *rest],
        "refusal": ["eval", "refusal", f"--dataset_name={data}", *rest],
    }


@pytest.mark.parametrize("command", ["nll", "alpha-star", "mmlu", "refusal"])
@pytest.mark.parametrize(
    "held",
    [["config.yaml", "run.json", "metrics.jsonl", "checkpoint-8/state.json"], ["results.json"], ["notes.txt"]],
    ids=["a training run", "results", "notes"],
)
def test_every_command_refuses_a_folder_of_something_else_and_leaves_it_as_it_is(
    flags, tmp_path, capsys, command, held
):
    folder = tmp_path / "run"
    for name in held:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(json.dumps({"status": "done"}))
    before = contents(folder)
    assert main([*flags[command], f"--output_dir={folder}"]) == EXIT_BAD_INPUT
    said = capsys.readouterr().err
    assert f"output_dir: {folder} already holds {min(held)[:5]}" in said
    assert said.count("\n") == 1
    assert contents(folder) == before


def test_a_lock_that_cannot_be_had_names_the_argument_and_the_way_out(tmp_path):
    (tmp_path / LOCK_FILE).mkdir()
    with (
        pytest.raises(ValueError, match=rf"output_dir: {tmp_path} cannot be locked \({LOCK_FILE}: .*\); remove"),
        claimed(tmp_path),
    ):
        pass
