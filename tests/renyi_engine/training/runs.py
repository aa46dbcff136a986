"""What tests of training share: reading what a run wrote, and interfering with its steps."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable, Collection
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import renyi_engine.training.train_step as train_step
from renyi_engine import LoraEnsemble, base_model
from renyi_engine.core.files import sha256_of
from renyi_engine.objectives.sft import SftTask
from renyi_engine.objectives.task import Scores
from renyi_engine.training import checkpoint

TIMINGS = {"tokens_per_s", "elapsed_s"}


def metrics(run: Path) -> list[dict]:
    """The lines of metrics.jsonl, without what every run measures anew."""
    lines = (run / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k not in TIMINGS} for line in lines]


def steps_of(run: Path) -> list[int]:
    """Steps of the lines of metrics of training, in their order."""
    return [line["step"] for line in metrics(run) if "loss_nats" in line]


def alphas(run: Path) -> list[float]:
    """Of every step, as metrics.jsonl has them."""
    return [alpha for line in metrics(run) for alpha in line.get("alpha_of_steps", [])]


def checkpoints(run: Path) -> list[int]:
    return [step for step, _ in checkpoint.all_of(run)]


def fingerprint(run: Path, step: int) -> dict[str, str]:
    folder = run / f"checkpoint-{step}"
    return {name: sha256_of(folder / name) for name in ("adapters.safetensors", "optimizer.safetensors", "state.json")}


def contents(folder: Path) -> dict[str, tuple[int, str]]:
    """When every file below `folder` was written, and its checksum."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {str(path): (path.stat().st_mtime_ns, sha256_of(path)) for path in files}


def skips(run: Path) -> list[tuple]:
    """Step, particles, number of rows and reason of every update that was not made."""
    lines = [json.loads(line) for line in (run / "skipped.jsonl").read_text().splitlines()]
    return [(line["step"], line["particles"], len(line["rows"]), line["why"]) for line in lines]


def loaded(config):
    model = AutoModelForCausalLM.from_pretrained(config.model_name_or_path)
    ensemble = LoraEnsemble.attach(model, config.ensemble_config())
    return ensemble, torch.optim.AdamW([ensemble.particles.values])


# ---------------------------------------------------------------------- interference


class Killed(BaseException):
    """Stands for SIGKILL: nothing in the software catches it."""


def kill() -> None:
    raise Killed


def send_sigterm() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def no_space(*_):
    raise OSError(28, "No space left on device")


def forbid_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(config):
        raise AssertionError("the model was loaded before the input was checked")

    monkeypatch.setattr(base_model, "load_model", load)


def change_scores(monkeypatch: pytest.MonkeyPatch, change: Callable[[int, Scores], Scores]) -> None:
    """Let `change` have the number of each micro-batch that is trained on from now on, counted from 1, and its scores.

    What it returns is trained on. An evaluation is given what the micro-batch before it is given.
    """
    original, seen = SftTask.score, []

    def score(self, ensemble, batch):
        scores = original(self, ensemble, batch)
        if torch.is_grad_enabled():
            seen.append(None)
        return change(len(seen), scores)

    monkeypatch.setattr(SftTask, "score", score)


def act_in(monkeypatch: pytest.MonkeyPatch, number: int, act: Callable[[], None]) -> None:
    """Call `act` in the given micro-batch, counted from 1 over what is trained on from now on."""
    original, seen = train_step.data_term, []

    def data_term(*args):
        seen.append(None)
        if len(seen) == number:
            act()
        return original(*args)

    monkeypatch.setattr(train_step, "data_term", data_term)


def multiply(
    monkeypatch: pytest.MonkeyPatch, steps: Collection[int], factor: float, particle: int | None = None
) -> None:
    """Multiply the log-likelihoods of one particle, or of all, in the given micro-batches."""

    def change(now, scores):
        if now not in steps:
            return scores
        factors = torch.ones(len(scores.logp), 1)
        factors[slice(None) if particle is None else particle] = factor
        return replace(scores, logp=scores.logp * factors)

    change_scores(monkeypatch, change)


def poison(monkeypatch: pytest.MonkeyPatch, particle: int | None, steps: Collection[int]) -> None:
    """Make the log-likelihoods of one particle, or of all, NaN in the given micro-batches."""
    multiply(monkeypatch, steps, float("nan"), particle)


def spike(monkeypatch: pytest.MonkeyPatch, steps: Collection[int]) -> None:
    multiply(monkeypatch, steps, 100.0)
