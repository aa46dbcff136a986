"""The records of a training run: the names of its files, and how they are read.

Layout: K particles, N examples.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from renyi_engine.core import CONFIG_FILE, read_json, read_yaml, reason
from renyi_engine.objectives import alpha_rule, parse_controller

Record = Mapping[str, Any]

METRICS_FILE, SKIPS_FILE = "metrics.jsonl", "skipped.jsonl"
FACTS_FILE, EVALUATION_FILE, REPORT_FILE = "run.json", "evaluation.json", "report.html"


class Run(NamedTuple):
    name: str
    config: Record
    facts: Record  # run.json
    train: Sequence[Record]
    held_out: Sequence[Record]
    evaluation: Record | None
    K: int
    alpha: float
    rule: str  # what set alpha, of which `alpha` is then the start or the end
    target_ess: float | None  # in particles

    @property
    def alpha_varied(self) -> bool:
        return self.rule != f"{self.alpha:g}"

    @property
    def unit(self) -> str:
        """What one negative log-likelihood is of: "token", or "pair" of a preference."""
        return "pair" if any("mixture_nll_nats_per_pair" in record for record in self.train) else "token"


def read_run(folder: Path) -> Run:
    for name in (CONFIG_FILE, METRICS_FILE):
        if not (folder / name).is_file():
            raise ValueError(f"{folder}: no {name}; pass the output_dir of a run that has logged a step")
    path = folder / CONFIG_FILE
    config = read_yaml(path)
    try:
        K, alpha = int(config["num_particles"]), float(config["alpha"])
        schedule, start = config.get("alpha_schedule", "constant"), float(config.get("alpha_0", 0.0))
        controller = config.get("alpha_controller")
        name, value = parse_controller(str(controller)) if controller else ("", 0.0)
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise ValueError(f"{path}: no num_particles and alpha to be read ({reason(error)}); restore it") from None
    facts = read_json(folder / FACTS_FILE) if (folder / FACTS_FILE).is_file() else {}
    if not isinstance(facts, dict):
        raise ValueError(f"{folder / 'run.json'}: expected a JSON object; remove the file to do without it")
    train, held_out = _read_metrics(folder / METRICS_FILE)
    evaluation = _read_evaluation(folder / EVALUATION_FILE, K)
    rule, target = alpha_rule(alpha, schedule, start, controller), value * K if name == "ess" else None
    return Run(folder.resolve().name, config, facts, train, held_out, evaluation, K, alpha, rule, target)


def _read_metrics(path: Path) -> tuple[list[Record], list[Record]]:
    """Training and held-out lines by step; of a step that a resumed run wrote again, the later one."""
    train: dict[int, Record] = {}
    held_out: dict[int, Record] = {}
    for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").split("\n"), start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
            step = int(record["step"])
        except (KeyError, TypeError, ValueError, OverflowError, RecursionError):
            raise ValueError(f"{path}: line {number} is not a JSON object with a step; mend or remove it") from None
        (held_out if any(key.startswith("eval_") for key in record) else train)[step] = record
    if not train:
        raise ValueError(f"{path}: empty, or without a training step; pass a run that has logged one")
    return [train[step] for step in sorted(train)], [held_out[step] for step in sorted(held_out)]


def _read_evaluation(path: Path, K: int) -> Record | None:
    """evaluation.json: logp as an array [K, N], a name and a text for each example; None if there is no such file."""
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
        facts = {"step": int(found["step"]), "split": str(found["split"]), "alpha": float(found["alpha"])}
        return {"logp": logp, "names": names, "texts": texts, **facts}
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise ValueError(f"{path}: not an evaluation ({error}); evaluate again or remove the file") from None


def number(value: Any) -> float:
    """NaN for whatever is no finite number that a float can hold, null above all."""
    return float(value) if isinstance(value, int | float) and abs(value) <= sys.float_info.max else math.nan
