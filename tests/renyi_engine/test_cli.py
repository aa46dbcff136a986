"""The command line as a person meets it: exit codes, one-line errors, signals. Each test starts real processes."""

from __future__ import annotations

import errno
import importlib.metadata
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import renyi_engine
from renyi_engine.cli import EXIT_BAD_INPUT, EXIT_FAILED, EXIT_INTERRUPTED, EXIT_NOTHING_SAVED, main
from renyi_engine.core.files import read_json, sha256_of
from renyi_engine.ensemble.adapter_folder import read
from renyi_engine.training import journal, loop, trainer


@pytest.fixture
def sft_flags(model_folder, data_file, tmp_path):
    def make(**overrides):
        settings = {
            "model_name_or_path": model_folder,
            "dataset_name": data_file,
            "output_dir": tmp_path / "run",
            "num_particles": 2,
            "lora_r": 2,
            "per_device_train_batch_size": 4,
            "max_steps": 4,
            "use_cpu": True,
        }
        return ["sft", *(f"--{name}={value}" for name, value in (settings | overrides).items())]

    return make


def start(argv, **kwargs) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-m", "renyi_engine.cli", *argv],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        **kwargs,
    )


def wait_for_step(run: Path, step: int, process: subprocess.Popen) -> None:
    metrics = run / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        if metrics.exists() and len(metrics.read_text().splitlines()) >= step:
            return
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.01)
    raise AssertionError(f"no step {step} within the time-out")


def test_training_exporting_and_reporting_from_the_command_line(sft_flags, tmp_path, capsys):
    run = tmp_path / "run"
    assert main(sft_flags(save_steps=2)) == 0
    assert main(["export", str(run), "--output_dir", str(tmp_path / "newest")]) == 0
    assert main(["export", str(run / "checkpoint-2"), "--output_dir", str(tmp_path / "earlier")]) == 0
    assert main(["report", str(run), "--output", str(tmp_path / "again.html")]) == 0
    assert (tmp_path / "again.html").exists()
    particles, newest, earlier = (read(tmp_path / name) for name in ("run/particles", "newest", "earlier"))
    assert newest.config == particles.config == earlier.config
    for path, (A, B) in particles.adapters.items():
        assert A.equal(newest.adapters[path][0])
        assert B.equal(newest.adapters[path][1])
    assert any(not B.equal(earlier.adapters[path][1]) for path, (_, B) in particles.adapters.items())
    assert "0.8" in (tmp_path / "newest" / "ensemble.json").read_text()


def test_print_config_prints_what_would_be_saved(sft_flags, capsys, tmp_path):
    assert main([*sft_flags(), "--print_config"]) == 0
    printed = capsys.readouterr().out
    assert "num_particles: 2\n" in printed
    assert not (tmp_path / "run").exists()


def test_a_dry_run_shows_the_loss_mask_and_memory_and_loads_no_weights(sft_flags, capsys, tmp_path, monkeypatch):
    monkeypatch.setattr("renyi_engine.base_model.load_model", None)
    assert main([*sft_flags(), "--dry_run"]) == 0
    printed = capsys.readouterr().out
    assert "0 and 0: [[yes</s>]]" in printed
    assert "base weights" in printed
    assert not (tmp_path / "run").exists()


def test_env_says_which_path_each_op_takes_and_why(capsys):
    assert main(["env"]) == 0
    printed = capsys.readouterr().out
    for op in ("grouped_lora", "linear_logprob", "renyi_reduce"):
        assert f"{op:14} torch (" in printed


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"alpha": -1}, "alpha: expected a finite number >= 0"),
        ({"num_particels": 3}, "unknown flag '--num_particels'; did you mean '--num_particles'?"),
        ({"model_name_or_path": "/no/such/folder"}, "model_name_or_path: '/no/such/folder' cannot be loaded"),
        ({"dataset_name": "/no/such.jsonl"}, "dataset_name: /no/such.jsonl: no such file"),
        ({"lora_target_modules": "no_such_proj"}, "sft: lora_target_modules: 'no_such_proj' matches no linear map"),
    ],
)
def test_bad_input_is_one_line_on_stderr_and_exit_code_2(sft_flags, capsys, flags, message):
    capsys.readouterr()
    assert main(sft_flags(**flags)) == EXIT_BAD_INPUT
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert last.startswith("renyi-engine sft: ")
    assert message in last


@pytest.mark.parametrize(("module", "place"), [(journal, "Scorer"), (trainer, "LoraEnsemble")])
def test_memory_that_ends_is_one_line_with_a_remedy(sft_flags, capsys, monkeypatch, module, place):
    remedies = {"Scorer": "lower --per_device_eval_batch_size", "LoraEnsemble": "fewer particles need less memory"}

    def no_room(*_, **options):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 7 GiB.\nand more lines")

    no_room.attach = no_room
    monkeypatch.setattr(module, place, no_room)
    assert main(sft_flags()) == 1
    last = capsys.readouterr().err.splitlines()[-1]
    assert "Tried to allocate 7 GiB." in last
    assert [r for r in remedies.values() if r in last] == [remedies[place]]


@pytest.mark.parametrize("number", [0, 2, 5])
def test_a_disk_that_fills_up_in_training_is_one_line(sft_flags, tmp_path, capsys, monkeypatch, number):
    calls, replace = [], os.replace

    def full(source, target):
        calls.append(source)
        if len(calls) > number:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(source))
        replace(source, target)

    monkeypatch.setattr(os, "replace", full)
    assert main(sft_flags(save_steps=1)) == EXIT_FAILED
    assert capsys.readouterr().err.splitlines()[-1].endswith(": No space left on device")


def test_a_data_set_that_memory_ends_in_is_one_line(sft_flags, capsys, monkeypatch):
    def no_room(*_, **options):
        raise MemoryError

    monkeypatch.setattr("renyi_engine.data.rows.read_file", no_room)
    assert main(sft_flags()) == EXIT_BAD_INPUT
    assert "does not fit into memory" in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"dataset_name": "x" * 300 + ".jsonl"}, f"dataset_name: {'x' * 200}: File name too long"),
        ({"output_dir": "x" * 300}, "File name too long"),
        ({"output_dir": "/dev/null/run"}, "output_dir: /dev/null/run cannot be written"),
        ({"config": "/no/such.yaml"}, "/no/such.yaml: not a readable YAML file"),
        ({"config": "/"}, "/: not a readable YAML file"),
        ({"prior_std": 1e300}, "prior_std: expected a number above 0, from 1e-150 to 1e150; got 1e+300"),
        ({"prior_std": 1e-300}, "prior_std: expected a number above 0, from 1e-150 to 1e150; got 1e-300"),
        ({"lora_r": 2**63}, "lora_r: expected a whole number below 2^31"),
        ({"lora_r": 2**31 - 1}, "lora_r: 2 adapters of rank 2147483647 do not fit into memory"),
        ({"num_particles": 10**9}, "num_particles: 1000000000 adapters of rank 2 do not fit into memory"),
        ({"lora_alpha": 1e300}, "lora_alpha: expected a scaling (lora_alpha / r) that float32 can hold; got 1e+300"),
        ({"lora_alpha": 1e-300}, "lora_alpha: expected a scaling (lora_alpha / r) that float32 can hold"),
        ({"output_dir": __file__}, "output_dir: " + __file__ + " cannot be written (it is no folder)"),
        ({"num_particels": 3}, "unknown flag '--num_particels'; did you mean '--num_particles'?"),
        ({"push_to_hub": "true"}, "unknown flag '--push_to_hub'; see --help"),
        ({"dry_rum": "none"}, "unknown flag '--dry_rum'; did you mean '--dry_run'?"),
        ({"use_cpu": "perhaps"}, "expected true or false; got 'perhaps'"),
    ],
)
def test_what_no_machine_can_do_is_one_line(sft_flags, capsys, flags, message):
    capsys.readouterr()
    assert main(sft_flags(**flags)) in (EXIT_BAD_INPUT, EXIT_FAILED)
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("renyi-engine sft: ")
    assert message in error


def test_steps_that_will_never_end_are_begun(sft_flags, capsys, monkeypatch):
    flags = sft_flags(max_steps=10**30, logging_steps=1)
    monkeypatch.setattr(loop.StopSignals, "received", signal.SIGTERM)  # after the first step
    assert main(flags) == EXIT_INTERRUPTED
    assert "ETA 115740 days" in capsys.readouterr().err


def test_off_a_terminal_progress_is_plain_lines(sft_flags):
    output, _ = (process := start(sft_flags(logging_steps=2))).communicate(timeout=120)
    assert process.returncode == 0, output
    steps = [line for line in output.splitlines() if line.startswith("step ")]
    assert [line.split()[1] for line in steps] == ["2/4", "4/4"]
    assert all(word in steps[0] for word in ("loss", "mixture NLL", "ESS", "tokens/s", "ETA"))
    assert "\x1b" not in output


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_finishes_the_step_saves_and_says_how_to_resume(sft_flags, tmp_path, signum):
    run = tmp_path / "run"
    process = start(sft_flags(max_steps=100_000, logging_steps=1))
    wait_for_step(run, 3, process)
    process.send_signal(signum)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == EXIT_INTERRUPTED, output
    assert "--resume_from_checkpoint true" in output.splitlines()[-1]
    assert read_json(run / "run.json")["status"] == "interrupted"
    (checkpoint,) = run.glob("checkpoint-*")
    step = int(checkpoint.name.split("-")[1])
    assert main([*sft_flags(max_steps=step + 1, logging_steps=1), "--resume_from_checkpoint=true"]) == 0


def test_a_second_signal_exits_at_once(sft_flags, tmp_path, monkeypatch):
    """The step is made to last an hour, so that only the second signal can end it."""
    program = (
        "import sys, time; from renyi_engine.objectives import SftTask; from renyi_engine.cli import main\n"
        "SftTask.score = lambda *_: (print('in the step', flush=True), [time.sleep(0.05) for _ in range(72000)])\n"
        "sys.exit(main(sys.argv[1:]))"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", program, *sft_flags()], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    assert process.stdout is not None
    while "in the step" not in process.stdout.readline():
        assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(timeout=1)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=30) == 128 + signal.SIGTERM


def test_killed_at_random_moments_it_always_resumes_to_the_same_end(sft_flags, tmp_path):
    """kill -9, again and again; what comes out in the end is bit for bit what an undisturbed run gives."""
    flags = {"max_steps": 120, "save_steps": 3, "logging_steps": 1, "learning_rate": 1e-3}
    assert main(sft_flags(output_dir=tmp_path / "whole", **flags)) == 0
    run = tmp_path / "run"
    argv = sft_flags(**flags)
    rng = random.Random(0)
    kills = 0
    while True:
        process = start(argv)
        try:
            # the delay counts from the first step, so that kills fall into training and saving, not into imports
            done = len((run / "metrics.jsonl").read_text().splitlines()) if (run / "metrics.jsonl").exists() else 0
            wait_for_step(run, min(done, 3) + 1, process)
            process.wait(timeout=rng.uniform(0.05, 1.0) if kills < 4 else 120)
        except subprocess.TimeoutExpired:
            process.kill()
            kills += 1
        process.communicate()
        if (run / "config.yaml").exists():
            argv = [*sft_flags(**flags), "--resume_from_checkpoint=true"]
        if process.returncode != -signal.SIGKILL:
            assert process.returncode == 0
            break
    assert kills >= 2
    for name in ("adapters.safetensors", "optimizer.safetensors"):
        assert sha256_of(run / "checkpoint-120" / name) == sha256_of(tmp_path / "whole" / "checkpoint-120" / name)


BEFORE_TORCH = """
import contextlib, sys
import renyi_engine
from renyi_engine.cli import main
kinds = [["sft"], ["dpo"], ["eval"], ["eval", "nll"], ["eval", "mmlu"], ["eval", "refusal"], ["generate"],
         ["fit-weights"], ["alpha-star"], ["export"], ["report"], ["env"]]
for argv in [["--help"], *([*kind, "--help"] for kind in kinds)]:
    with contextlib.suppress(SystemExit):
        main(argv)
assert main(["--version"]) == 0
for argv in (["sfft"], ["--leraning_rate"], *([*kind, "--leraning_rate=1"] for kind in kinds)):
    assert main(argv) == 2, argv
print(renyi_engine.SftConfig, renyi_engine.DpoConfig, renyi_engine.EnsembleConfig, renyi_engine.DoesNotFit)
heavy = {"torch", "transformers", "datasets", "numpy", "scipy", "matplotlib", "rich", "pyarrow", "huggingface_hub"}
assert not heavy & sys.modules.keys(), heavy & sys.modules.keys()
"""


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--vers"], "unrecognized arguments: --vers"),
        (["report", "run", "--out", "page.html"], "unrecognized arguments: --out"),
        (["export", "run", "--output", "x"], "required: --output_dir"),
    ],
)
def test_a_flag_is_written_in_full(capsys, argv, message):
    assert main(argv) == EXIT_BAD_INPUT
    assert message in capsys.readouterr().err


def test_help_typos_and_settings_do_not_wait_for_torch():
    done = subprocess.run([sys.executable, "-c", BEFORE_TORCH], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    errors = done.stderr.splitlines()
    assert len(errors) == 14
    assert all(line.startswith("renyi-engine") for line in errors)


def test_a_name_that_does_not_exist_is_an_attribute_error():
    with pytest.raises(AttributeError, match="trian"):
        _ = renyi_engine.trian


def test_the_version_is_that_of_the_installed_package(capsys):
    assert renyi_engine.__version__ == importlib.metadata.version("renyi-engine")
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"renyi-engine {renyi_engine.__version__}\n"


def test_ctrl_c_during_the_imports_is_one_line(sft_flags):
    """The import of torch is made to last a minute, inside code that turns every error into another one."""
    program = (
        "import sys, time\n"
        "class Slow:\n"
        "    def find_spec(name, path=None, target=None):\n"
        "        if name == 'torch':\n"
        "            print('importing', flush=True)\n"
        "            try:\n"
        "                time.sleep(60)\n"
        "            except BaseException as error:\n"
        "                raise ImportError('numpy.core.multiarray failed to import') from error\n"
        "sys.meta_path.insert(0, Slow)\n"
        "from renyi_engine.cli import main; sys.exit(main(sys.argv[1:]))"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", program, *sft_flags()], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "importing\n"
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == EXIT_NOTHING_SAVED
    assert errors == "renyi-engine sft: stopped by Ctrl-C before there was anything to save\n"


def test_an_error_that_comes_up_later_names_the_file_that_the_value_is_from(sft_flags, tmp_path, capsys):
    gone = tmp_path / "gone.jsonl"
    config = tmp_path / "config.yaml"
    config.write_text(f"dataset_name: {gone}\nalpha: 0.5\n")
    flags = [flag for flag in sft_flags() if not flag.startswith("--dataset_name")]
    assert main([*flags, "--config", str(config)]) == EXIT_BAD_INPUT
    assert capsys.readouterr().err == f"renyi-engine sft: {config}: dataset_name: {gone}: no such file\n"
    assert main([*flags, "--config", str(config), f"--dataset-name={gone}"]) == EXIT_BAD_INPUT
    assert capsys.readouterr().err == f"renyi-engine sft: dataset_name: {gone}: no such file\n"


def test_ctrl_c_in_an_evaluation_that_keeps_what_it_has_says_how_to_go_on(capsys, monkeypatch):
    def stopped(_):
        raise KeyboardInterrupt

    monkeypatch.setattr("renyi_engine.evaluation.refusal.evaluate.evaluate_refusal", stopped)
    flags = ["--model_name_or_path=a", "--output_dir=b", "--dataset_name=c"]
    assert main(["eval", "refusal", *flags]) == EXIT_INTERRUPTED
    expected = "stopped by Ctrl-C; the same command goes on from the responses that are saved"
    assert capsys.readouterr().err == f"renyi-engine eval refusal: {expected}\n"
