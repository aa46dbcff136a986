"""Training runs of a tiny model in processes of their own, and what differs between two runs.

The process that attacks imports everything once and forks for each command, so that a command takes a second or less.
It starts no thread, which a fork does not survive.
"""

from __future__ import annotations

import gc
import json
import os
import shlex
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import torch
import tqdm
import transformers
import yaml
from matplotlib.figure import Figure

from renyi_engine import SftConfig, base_model, cli

from ..conftest import make_tokenizer, write_jsonl
from ..renyi_engine.tiny_models import tiny_model
from .strikes import Calls

OBJECTIVES = ("sft", "dpo")
BAD_INPUT, INTERRUPTED = 2, 75
STEPS, KEPT = 8, 3
CHECKPOINT = ("adapters.safetensors", "optimizer.safetensors", "state.json", "manifest.json")
TIMINGS = {"elapsed_s", "tokens_per_s"}
CRASHED = 70
"""The exit code of a command that ended in a traceback."""
LONGEST_S = 120.0
"""A command that takes longer is killed, and said to hang."""


@dataclass(frozen=True)
class Ended:
    """How a command ended."""

    code: int
    """Its exit code, or minus the signal that ended it."""
    said: str
    took_s: float

    @property
    def last_line(self) -> str:
        return (self.said.strip().splitlines() or [""])[-1]


class Child:
    """A command in a process of its own."""

    def __init__(self, argv: list[str], log: Path, before: Callable[[], None] = lambda: None) -> None:
        """`before` is called first, in that process."""
        self.log, self.started = log, time.monotonic()
        sys.stdout.flush()
        sys.stderr.flush()
        self.pid = os.fork()
        if self.pid == 0:
            os._exit(_command(argv, log, before))
        self._ended: Ended | None = None

    def poll(self) -> Ended | None:
        if self._ended is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                code, took = os.waitstatus_to_exitcode(status), time.monotonic() - self.started
                self._ended = Ended(code, self._said(), took)
        return self._ended

    def wait(self) -> Ended:
        while (ended := self.poll()) is None:
            if time.monotonic() - self.started > LONGEST_S:
                self.send(signal.SIGKILL)
                os.waitpid(self.pid, 0)
                said = f"{self._said()}\nhangs: killed after {LONGEST_S:.0f} s"
                self._ended = Ended(CRASHED, said, LONGEST_S)
            time.sleep(0.002)
        return ended

    def _said(self) -> str:
        # a signal may end it before it says anything
        return self.log.read_text(errors="replace") if self.log.exists() else ""

    def send(self, signum: int) -> None:
        if self._ended is None:
            os.kill(self.pid, signum)


def _command(argv: list[str], log: Path, before: Callable[[], None]) -> int:
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for stream in (1, 2):
        os.dup2(descriptor, stream)
    sys.argv = ["renyi-engine", *argv]
    code = CRASHED
    try:
        Figure.savefig = _no_picture  # type: ignore[method-assign]
        before()
        code = cli.main(argv)
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else CRASHED
    except BaseException:
        traceback.print_exc()
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    return code


def _no_picture(figure: Figure, file: Any, **_: Any) -> None:
    """In place of a drawing of a report, which would take longer than the training."""
    file.write('<svg width="1"></svg>')


def _in_a_process(work: Callable[[], None]) -> None:
    if (pid := os.fork()) == 0:
        code = 1
        try:
            work()
            code = 0
        finally:
            os._exit(code)
    if os.waitpid(pid, 0)[1]:
        raise RuntimeError(f"{work.__name__} failed")


class Bench:
    """A tiny base, data, and what undisturbed runs make of them: all in one folder."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._numbers = 0
        torch.set_num_threads(1)
        tqdm.tqdm.monitor_interval = 0  # its monitor is a thread
        transformers.logging.disable_progress_bar()
        _in_a_process(self._make_base)
        words = ["yes", "no", "it is so", "maybe"]
        rows = [{"prompt": f"{i} and {i * i}: ", "completion": words[i % 4] * (1 + i % 3)} for i in range(12)]
        pairs = [
            {"prompt": f"{i}? ", "chosen": words[i % 4], "rejected": words[(i + 1) % 4] + "." * (i % 3)}
            for i in range(10)
        ]
        self.data = {"sft": write_jsonl(root / "sft.jsonl", rows), "dpo": write_jsonl(root / "dpo.jsonl", pairs)}
        self.held_out = {
            "sft": write_jsonl(root / "sft_held_out.jsonl", rows[:3]),
            "dpo": write_jsonl(root / "dpo_held_out.jsonl", pairs[:3]),
        }

        # done once here, so that a forked command does not do it again: transformers makes its tables of models
        base_model.load_model(SftConfig(**self.settings("sft", self.new("nothing"))))
        gc.collect()
        gc.freeze()
        self.undisturbed: dict[str, Path] = {}
        """The folder of a run of each objective that nobody disturbed."""
        self.num_calls: dict[str, int] = {}
        """System calls that change a file in it."""
        self.seconds: dict[str, float] = {}
        for objective in OBJECTIVES:
            run, calls = root / f"undisturbed-{objective}", self.new("calls")
            ended = self.run(self.argv(objective, run), Calls(run, None, calls).watch)
            if ended.code:
                raise RuntimeError(f"an undisturbed {objective} run fails:\n{ended.said}")
            self.undisturbed[objective], self.seconds[objective] = run, ended.took_s
            self.num_calls[objective] = len(calls.read_text().splitlines())

    def _make_base(self) -> None:
        tiny_model("llama").save_pretrained(self.root / "base")
        make_tokenizer().save_pretrained(self.root / "base")

    def new(self, name: str) -> Path:
        """A path where nothing is yet."""
        self._numbers += 1
        return self.root / f"{name}-{self._numbers}"

    def settings(self, objective: str, output_dir: Path, **others: Any) -> dict[str, Any]:
        """A short run that logs, evaluates, saves and forgets."""
        return {
            "model_name_or_path": str(self.root / "base"),
            "dataset_name": str(self.data[objective]),
            "eval_dataset_name": str(self.held_out[objective]),
            "output_dir": str(output_dir),
            "num_particles": 2,
            "alpha": 0.7,
            "lora_r": 1,
            "lora_target_modules": ["q_proj"],
            "learning_rate": 0.01,
            "per_device_train_batch_size": 2,
            "max_steps": STEPS,
            "logging_steps": 1,
            "eval_steps": 3,
            "save_steps": 2,
            "save_total_limit": KEPT,
            "use_cpu": True,
            **others,
        }

    def argv(self, objective: str, output_dir: Path, **others: Any) -> list[str]:
        argv = [objective]
        for name, value in self.settings(objective, output_dir, **others).items():
            values = value if isinstance(value, list) else [value]
            argv += [f"--{name}", *(str(v).lower() if isinstance(v, bool) else str(v) for v in values)]
        return argv

    def start(self, argv: list[str], before: Callable[[], None] = lambda: None) -> Child:
        return Child(argv, self.new("log"), before)

    def run(self, argv: list[str], before: Callable[[], None] = lambda: None) -> Ended:
        return self.start(argv, before).wait()


@cache
def bench_in(folder: Path) -> Bench:
    """The bench of this process: another kind of attack uses it again."""
    root = folder / f"bench-{os.getpid()}"
    root.mkdir()
    return Bench(root)


def command(argv: list[str]) -> str:
    """As a user types it."""
    return shlex.join(["renyi-engine", *argv])


def metrics(run: Path) -> list[dict[str, Any]]:
    lines = (run / "metrics.jsonl").read_text().splitlines()
    return [{name: value for name, value in json.loads(line).items() if name not in TIMINGS} for line in lines]


def files_of(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if not path.is_dir()}


def differences(run: Path, truth: Path, *, other_checkpoints: bool = False, set_aside: bool = False) -> Iterator[str]:
    """What differs, bit by bit, between a run and the undisturbed one, `truth`; times are left out. Each text begins
    with the kind of difference.

    `other_checkpoints`: the run may have saved at other steps before the last. `set_aside`: the folder in which it set
    something aside is allowed.
    """
    ours, right = files_of(run), files_of(truth)
    temporary = {name for name in ours if any(part.endswith(".tmp") or "tmp-" in part for part in name.split("/"))}
    if temporary:
        yield f"temporary files left: {', '.join(sorted(temporary))}"
    if other_checkpoints:
        others = {f"checkpoint-{step}" for step in range(STEPS)}
        right = {name for name in right if name.split("/")[0] not in others}
        kept = {name.split("/")[0] for name in ours} & others
        cut = [name for name in sorted(kept) if not {f"{name}/{file}" for file in CHECKPOINT} <= ours]
        if cut:
            yield f"checkpoints not whole: {', '.join(cut)}"
        if len(kept) + 1 > KEPT:
            yield f"more checkpoints than save_total_limit: {', '.join(sorted(kept))} and checkpoint-{STEPS}"
        ours = {name for name in ours if name.split("/")[0] not in others}
    if (extra := sorted(ours - right - temporary)) and not set_aside:
        yield f"more files than undisturbed: {', '.join(extra)}"
    if missing := sorted(right - ours):
        yield f"files missing: {', '.join(missing)}"
    if "metrics.jsonl" in ours:
        yield from _different_metrics(metrics(run), metrics(truth))
    for name in sorted(ours & right):
        if name in ("metrics.jsonl", "report.html") or "lock" in name:
            continue
        first, second = (run / name).read_bytes(), (truth / name).read_bytes()
        if name == "run.json":
            first, second = _lasting(first), _lasting(second)
        elif name == "config.yaml":
            first, second = _config(first), _config(second)
        if first != second:
            yield f"other content: {name}"


def _different_metrics(ours: list[dict[str, Any]], right: list[dict[str, Any]]) -> Iterator[str]:
    label = lambda line: (line["step"], any(name.startswith("eval_") for name in line))
    steps = lambda lines: " ".join(f"{step}{'e' * held_out}" for step, held_out in map(label, lines))
    if [label(line) for line in ours] != [label(line) for line in right]:
        yield f"metrics of other steps: {steps(ours)} instead of {steps(right)} (e: held out)"
    elif ours != right:
        yield f"metrics of other values: at step {next(a['step'] for a, b in zip(ours, right, strict=True) if a != b)}"


def _lasting(run_json: bytes) -> bytes:
    facts = {name: value for name, value in json.loads(run_json).items() if name not in (*TIMINGS, "command")}
    return json.dumps(facts).encode()


def _config(text: bytes) -> dict[str, Any]:
    """Without the run's folder, and the settings that may change when it goes on."""
    anew = ("output_dir", "save_steps", "save_total_limit")
    return {name: value for name, value in yaml.safe_load(text).items() if name not in anew}
