"""The promises of SECURITY.md that no other test holds; SECURITY.md is where each of them is named."""

from __future__ import annotations

import json
import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import httpx2
import huggingface_hub.constants
import pytest

from renyi_engine.cli import EXIT_BAD_INPUT, main

ROOT = Path(__file__).parents[2]
SENDING = ("socket.connect", "socket.getaddrinfo", "socket.gethostbyname", "socket.sendto", "socket.sendmsg")


def test_security_md_names_tests_that_exist():
    named = re.findall(r"`(tests/\S+\.py)::(\w+)`", (ROOT / "SECURITY.md").read_text())
    assert len(named) > 10
    for file, test in named:
        assert re.search(rf"^def {test}\(", (ROOT / file).read_text(), re.M), f"{file}::{test}"


def test_an_import_reaches_for_no_network():
    program = (
        f"import sys; asked = []; sys.addaudithook(lambda event, _: event in {SENDING} and asked.append(event))\n"
        "import importlib, pkgutil, renyi_engine, renyi_kernels\n"
        "for package in (renyi_engine, renyi_kernels):\n"
        "    for module in pkgutil.walk_packages(package.__path__, package.__name__ + '.'):\n"
        "        importlib.import_module(module.name)\n"
        "print(asked)"
    )
    done = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "[]"


def test_with_a_model_and_data_on_the_disk_nothing_is_sent(model_folder, jsonl, tmp_path, monkeypatch, capsys):
    asked = []

    def refuse(*arguments):
        asked.append(arguments)
        raise OSError("no network in this test")

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    for name in ("connect", "connect_ex", "sendto"):
        monkeypatch.setattr(socket.socket, name, refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    rows = [{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}], "prompt": "a"}]
    data, model = jsonl(tmp_path / "data.jsonl", rows * 2), f"--model_name_or_path={model_folder}"
    particles = f"--ensemble={tmp_path / 'run' / 'particles'}"

    def run(*flags, out):
        assert main([*flags, model, "--use_cpu=true", *([f"--output_dir={tmp_path / out}"] if out else [])]) == 0

    sizes = ["--num_particles=2", "--lora_r=2", "--max_steps=1", "--per_device_train_batch_size=1"]
    messages = jsonl(tmp_path / "messages.jsonl", [{"messages": row["messages"]} for row in rows * 2])
    run("sft", f"--dataset_name={messages}", *sizes, out="run")
    run("generate", particles, "--prompts", "a", "--max_new_tokens=2", out=None)
    run("eval", "nll", particles, f"--dataset_name={messages}", out="nll")
    run("eval", "refusal", particles, f"--dataset_name={data}", "--num_samples=1", "--max_new_tokens=2", out="refusal")
    assert asked == []
    with pytest.raises(httpx2.ConnectError, match="no network in this test"):  # who asked would have been seen
        httpx2.get("https://huggingface.co")
    assert asked


# ---------------------------------------------------------------------- no code of others


@pytest.fixture
def marker(tmp_path):
    """A file that is there once somebody else's code ran; and that code."""
    path = tmp_path / "code_ran"
    return path, f"open({str(path)!r}, 'w').write('')"


@pytest.mark.parametrize("trusted", [False, True])
def test_code_beside_a_model_runs_only_if_the_user_says_so(
    model_folder, jsonl, tmp_path, marker, monkeypatch, capsys, trusted
):
    path, code = marker
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    folder = shutil.copytree(model_folder, tmp_path / "model")
    (folder / "theirs.py").write_text(
        f"from transformers import LlamaConfig\n{code}\nclass Config(LlamaConfig):\n    pass\n"
    )
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "theirs", "auto_map": {"AutoConfig": "theirs.Config"}}
    (folder / "config.json").write_text(json.dumps(config))
    data = jsonl(tmp_path / "data.jsonl", [{"text": "a"}])
    flags = [f"--model_name_or_path={folder}", f"--dataset_name={data}", f"--output_dir={tmp_path / 'run'}"]
    assert main(["sft", *flags, "--use_cpu=true", "--max_steps=1", f"--trust_remote_code={trusted}"]) == EXIT_BAD_INPUT
    assert "model_name_or_path" in capsys.readouterr().err
    assert path.exists() == trusted


@pytest.mark.parametrize("command", ["sft --config", "report", "export"])
def test_a_yaml_file_runs_no_code(tmp_path, marker, capsys, command):
    path, code = marker
    run = tmp_path / "run"
    run.mkdir()
    (run / "metrics.jsonl").write_text('{"step": 1}\n')
    (run / "config.yaml").write_text(f"alpha: !!python/object/apply:builtins.exec [{json.dumps(code)}]\n")
    argv = {
        "sft --config": ["sft", "--config", str(run / "config.yaml")],
        "report": ["report", str(run)],
        "export": ["export", str(run), "--output_dir", str(tmp_path / "exported")],
    }[command]
    assert main(argv) == EXIT_BAD_INPUT
    assert not path.exists()


def test_what_a_row_says_is_text_and_no_template(model_folder, jsonl, tmp_path, capsys):
    said = "{{ 6 * 7 }} {% for i in range(3) %}x{% endfor %}"
    row = {"messages": [{"role": "user", "content": said}, {"role": "assistant", "content": "b"}]}
    flags = [f"--dataset_name={jsonl(tmp_path / 'data.jsonl', [row])}", f"--output_dir={tmp_path / 'run'}"]
    assert main(["sft", "--dry_run", f"--model_name_or_path={model_folder}", "--use_cpu=true", *flags]) == 0
    assert said in capsys.readouterr().out
