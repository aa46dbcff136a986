"""The records of a training run: the names of its files and metrics, and how they are written and read.

    RUN/config.yaml       the settings, and the kind of the run
        run.json          what else is known of it: command, versions, device, data, how it ended
        metrics.jsonl     a line for every `logging_steps` steps, and one for every evaluation on held-out data
        skipped.jsonl     a line for every step that some particle did not learn from
        evaluation.json   the newest evaluation: log-likelihoods of every example under every particle
        particles/        the particles, as PEFT adapters
        report.html       all of it, as a page to read

Layout: K particles, N examples.
"""

from __future__ import annotations

import json
import math
import sys
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from renyi_engine.core import CONFIG_FILE, files, read_json, read_yaml, reason
from renyi_engine.ensemble import is_distribution
from renyi_engine.objectives import (
    EVAL,
    DpoTask,
    Evaluation,
    Metric,
    SftTask,
    Task,
    alpha_rule,
    metrics_of,
    parse_controller,
)
from renyi_engine.training.config import DpoConfig, SftConfig

Record = Mapping[str, Any]

METRICS_FILE, SKIPS_FILE = "metrics.jsonl", "skipped.jsonl"
FACTS_FILE, EVALUATION_FILE, REPORT_FILE, PARTICLES = "run.json", "evaluation.json", "report.html", "particles"

FINISHED = "finished"
"""What run.json says of a run that came to its end."""

TASKS: dict[str, type[Task]] = {SftConfig.kind: SftTask, DpoConfig.kind: DpoTask}

STEP, EPOCH = Metric("step", "steps"), Metric("epoch", "passes over the data")
ALPHA, ALPHA_OF_STEPS, ALPHA_STAR = Metric("alpha", ""), Metric("alpha_of_steps", ""), Metric("alpha_star", "")
PRIOR, LEARNING_RATE = Metric("prior_nats", "nats"), Metric("learning_rate", "")
GRAD_NORM = Metric("grad_norm", "nats", per_particle=True)
PARTICLE_WEIGHTS = Metric("particle_weights", "", per_particle=True)
SKIPPED_UPDATES = Metric("skipped_updates", "updates", per_particle=True)
TOKENS, TOKENS_PER_S = Metric("tokens", "tokens"), Metric("tokens_per_s", "tokens a second")
ELAPSED = Metric("elapsed_s", "seconds")
"""These, and what the task declares, are the metrics of a line."""


class Records:
    """What a run writes while it goes on. Every line of metrics.jsonl and skipped.jsonl has its step."""

    def __init__(self, run: Path) -> None:
        self.run = run
        self.skips = run / SKIPS_FILE

    def log(self, record: Record) -> None:
        """Append one line to metrics.jsonl; what is not a finite number becomes null."""
        files.append_text(self.run / METRICS_FILE, json.dumps(files.finite(record)) + "\n")

    def log_skip(self, record: Record) -> None:
        files.append_text(self.skips, json.dumps(record) + "\n")

    def write_facts(self, facts: Record) -> None:
        files.write_json(self.run / FACTS_FILE, files.finite(facts))

    def write_evaluation(
        self, step: int, split: str, alpha: float, evaluation: Evaluation, texts: Sequence[str]
    ) -> None:
        """`texts`: how each example begins, for a person."""
        found = {
            "step": step,
            "split": split,
            "alpha": alpha,
            "example_ids": evaluation.rows,
            "texts": texts,
            "num_labels": evaluation.num_labels.tolist(),
            "particle_weights": evaluation.particle_weights.tolist(),
            "logp_nats": evaluation.logp.tolist(),
        }
        files.write_json(self.run / EVALUATION_FILE, files.finite(found))

    def metrics(self) -> list[Record]:
        """The lines of metrics.jsonl in the order in which they were written, without those that are damaged."""
        path = self.run / METRICS_FILE
        found = map(_record, _lines(path)) if path.exists() else []
        return [record for record in found if record is not None]

    def has_training(self, step: int | None = None) -> bool:
        """Whether metrics.jsonl has the line of training at `step`, or any line of training."""
        lines = [record for record in self.metrics() if not is_evaluation(record)]
        return any(step in (None, record[STEP.name]) for record in lines)

    def has_evaluation(self, step: int) -> bool:
        """Whether metrics.jsonl has the line of the evaluation at `step`."""
        return any(record[STEP.name] == step and is_evaluation(record) for record in self.metrics())

    def go_back_to(self, step: int) -> None:
        """Remove the lines of later steps, which will be written again."""
        for path in (self.run / METRICS_FILE, self.skips):
            if path.exists():
                lines = _lines(path)
                records = [_record(line) for line in lines]
                for number, record in enumerate(records[:-1], start=1):  # a kill may have cut the last one short
                    if record is None:
                        warnings.warn(f"{path}: line {number} is damaged and is left out", stacklevel=3)
                read = zip(lines, records, strict=True)
                files.write_text(path, "".join(line for line, record in read if record and record[STEP.name] <= step))


class Run(NamedTuple):
    """What was read of a run's folder.

    Attributes:
        kind: the kind of the training. It names the task, which declares the metrics.
        facts: run.json. train, held_out: the lines of metrics.jsonl, by step.
        rule: what set alpha, in words. With a schedule or a controller, `alpha` is only the end or the start of it.
        target_ess: in particles.
    """

    name: str
    kind: str
    config: Record
    facts: Record
    train: Sequence[Record]
    held_out: Sequence[Record]
    evaluation: Record | None
    K: int
    alpha: float
    rule: str
    target_ess: float | None

    @property
    def alpha_varied(self) -> bool:
        return self.rule != f"{self.alpha:g}"

    @property
    def learns_weights(self) -> bool:
        """Whether the particles' weights were learned, and not 1/K all the time."""
        return self.config.get("particle_weights") == "learned"

    @property
    def task(self) -> type[Task]:
        return TASKS[self.kind]

    @property
    def unit(self) -> str:
        """What a negative log-likelihood is counted per: "token", or "pair" of a preference."""
        return self.task.unit


def kind_of(config: Record, path: Path) -> str:
    """The kind of training run that saved these settings at `path`.

    Earlier versions did not save it; of theirs, only the settings of "dpo" have a beta.

    Raises:
        ValueError: they are the settings of another command.
    """
    kind = config.get("kind", DpoConfig.kind if "beta" in config else SftConfig.kind)
    if kind not in TASKS:
        raise ValueError(f"{path}: kind: expected a training run ({' or '.join(TASKS)}); got {kind!r}")
    return kind


def is_evaluation(record: Record) -> bool:
    """Whether this line of metrics.jsonl is of an evaluation, and not of training."""
    return any(name.startswith(EVAL) for name in record)


def numbers(record: Record, task: type[Task]) -> dict[str, float]:
    """The finite numbers of a line of metrics.jsonl; those of particles as NAME/p000, NAME/p001, ..."""
    declared = [*metrics_of(task), GRAD_NORM, SKIPPED_UPDATES, PARTICLE_WEIGHTS]
    per_particle = {prefix + metric.name for metric in declared if metric.per_particle for prefix in ("", EVAL)}
    found: dict[str, float] = {}
    for name, value in record.items():
        if not isinstance(value, list):
            found[name] = value
        elif name in per_particle:
            found |= {f"{name}/p{k:03d}": of_one for k, of_one in enumerate(value)}
    return {name: value for name, value in found.items() if not math.isnan(number(value))}


def read_run(folder: Path) -> Run:
    """What the folder of a run holds.

    Raises:
        ValueError, in one line: a file is missing or broken.
    """
    for name in (CONFIG_FILE, METRICS_FILE):
        if not (folder / name).is_file():
            raise ValueError(f"{folder}: no {name}; pass the output_dir of a run that has logged a step")
    path = folder / CONFIG_FILE
    config = read_yaml(path)
    kind = kind_of(config, path)
    try:
        K, alpha = int(config["num_particles"]), float(config["alpha"])
        schedule, start = config.get("alpha_schedule", "constant"), float(config.get("alpha_0", 0.0))
        controller = config.get("alpha_controller")
        name, value = parse_controller(str(controller)) if controller else ("", 0.0)
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise ValueError(f"{path}: num_particles and alpha cannot be read ({reason(error)}); restore it") from None
    facts = read_json(folder / FACTS_FILE) if (folder / FACTS_FILE).is_file() else {}
    if not isinstance(facts, dict):
        raise ValueError(f"{folder / FACTS_FILE}: expected a JSON object; remove the file to do without it")
    train, held_out = _read_metrics(folder / METRICS_FILE)
    evaluation = _read_evaluation(folder / EVALUATION_FILE, K)
    rule, target = alpha_rule(alpha, schedule, start, controller), value * K if name == "ess" else None
    name = folder.resolve().name
    return Run(name, kind, config, facts, train, held_out, evaluation, K, alpha, rule, target)


def _read_metrics(path: Path) -> tuple[list[Record], list[Record]]:
    """Training and held-out lines by step; of a step that a resumed run wrote again, the later one."""
    train: dict[int, Record] = {}
    held_out: dict[int, Record] = {}
    for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").split("\n"), start=1):
        if not line.strip():
            continue
        if (record := _record(line)) is None:
            raise ValueError(f"{path}: line {number} is not a JSON object with a step; mend or remove it")
        (held_out if is_evaluation(record) else train)[record[STEP.name]] = record
    if not train:
        raise ValueError(f"{path}: empty, or without a training step; pass a run that has logged one")
    return [train[step] for step in sorted(train)], [held_out[step] for step in sorted(held_out)]


def _read_evaluation(path: Path, K: int) -> Record | None:
    """evaluation.json: logp as an array [K, N], the particles' weights [K], a name and a text for each example; None if
    there is no such file."""
    if not path.is_file():
        return None
    found = read_json(path)
    try:
        logp = np.array([[number(value) for value in row] for row in found["logp_nats"]], dtype=np.float64)
        if logp.ndim != 2 or logp.shape[0] != K or logp.shape[1] < 1:
            raise ValueError(f"logp_nats has shape {list(logp.shape)}, not one row for each of {K} particles")
        names = [f"row {row}" for row in found["example_ids"]]
        texts = [str(text) for text in found.get("texts", [""] * len(names))]
        if not len(names) == len(texts) == logp.shape[1]:
            raise ValueError(f"{len(names)} example_ids and {len(texts)} texts for {logp.shape[1]} examples")
        weights = found.get("particle_weights", [1 / K] * K)  # files of earlier versions have none
        if not is_distribution(weights, K):
            raise ValueError(f"particle_weights are not {K} numbers of at least 0 with the sum 1")
        facts = {"step": int(found["step"]), "split": str(found["split"]), "alpha": float(found["alpha"])}
        return {"logp": logp, "weights": np.array(weights), "names": names, "texts": texts, **facts}
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise ValueError(f"{path}: not an evaluation ({error}); evaluate again or remove the file") from None


def number(value: Any) -> float:
    """NaN for whatever is no finite number that a float can hold, null above all."""
    return float(value) if isinstance(value, int | float) and abs(value) <= sys.float_info.max else math.nan


def _lines(path: Path) -> list[str]:
    """Each with its end, that of the last one too, which a kill may have cut off."""
    return [f"{line}\n" for line in path.read_text(encoding="utf-8", errors="replace").splitlines()]


def _record(line: str) -> Record | None:
    """A line of metrics.jsonl or skipped.jsonl; None if it is damaged or was cut short."""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return record if isinstance(record, dict) and isinstance(record.get(STEP.name), int) else None
