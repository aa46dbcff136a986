"""From what was answered to numbers with intervals.

The bootstrap draws seeds with replacement, and for each of them questions with replacement: the same for all methods,
so the differences between methods are paired. The interval holds 95 % of what it finds (percentiles). With three seeds
an interval says little about the seeds that nobody ran, so the table shows each seed, too.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from examples.evidence.cells import COSTS, Work
from examples.evidence.experiment import Answers, Metric, Variant
from examples.evidence.methods import BASELINE, METHODS
from renyi_engine.core import files, versions

NUM_RESAMPLES = 1000


def summarise(work: Work, machine: str) -> dict[str, Any]:
    """The results of an experiment, as the page needs them, of every variant that is done."""
    experiment = work.experiment
    return {
        "experiment": experiment.name,
        "setting": work.setting_name,
        "model": work.model or work.setting.model,
        "training": {name: value for name, value in vars(work.setting).items() if name != "model"},
        "machine": machine,
        "versions": versions(),
        "num_resamples": NUM_RESAMPLES,
        "variants": [
            {"name": variant.name, "num_particles": variant.num_particles} | _variant(work, variant)
            for variant in experiment.variants(work.setting_name)
            if work.is_done(variant)
        ],
        "further": experiment.further(work),
    }


def write(results: Mapping[str, Any], folder: Path) -> Path:
    """Write the results beside their experiment."""
    path = folder / "results" / f"{results['setting']}.json"
    path.parent.mkdir(exist_ok=True)
    files.write_text(path, json.dumps(results, indent=1) + "\n")
    return path


def _variant(work: Work, variant: Variant) -> dict[str, Any]:
    seeds = range(work.setting.seeds)
    found = {method: [work.answers(variant, method, seed) for seed in seeds] for method in variant.methods}
    answers = {method: [one for one, _ in of] for method, of in found.items()}
    metrics = work.experiment.metrics
    with_interval = {name: metric for name, metric in metrics.items() if metric.resampled}
    values = {
        method: {name: [metric.of(one) for one in of] for name, metric in metrics.items()}
        for method, of in answers.items()
    }
    resampled = {method: _resampled(of, with_interval) for method, of in answers.items()}
    methods = {}
    for method, of in found.items():
        measured: dict[str, dict[str, Any]] = {
            name: {"mean": _mean(of_seeds), "seeds": of_seeds} for name, of_seeds in values[method].items()
        }
        for name in with_interval:
            measured[name]["interval"] = _interval(resampled[method][name])
            if method != BASELINE and BASELINE in answers:
                measured[name]["difference"] = {
                    "mean": _mean(np.subtract(values[method][name], values[BASELINE][name])),
                    "interval": _interval(resampled[method][name] - resampled[BASELINE][name]),
                }
        costs = {cost: float(np.mean([paid[cost] for _, paid in of])) for cost in COSTS}
        weights = [one.weights.tolist() for one in answers[method]]
        methods[method] = {"label": METHODS[method].label, "metrics": measured, "costs": costs, "weights": weights}
        if curves := work.experiment.curves:
            lines = {name: [list(curve(one)) for one in answers[method]] for name, curve in curves.items()}
            methods[method]["curves"] = lines
    return {"methods": methods}


def _resampled(answers: list[Answers], metrics: Mapping[str, Metric]) -> dict[str, np.ndarray]:
    """[NUM_RESAMPLES] values of every metric. The same draws for every method, because the generator is the same."""
    rng = np.random.default_rng(0)
    values = {name: np.empty(NUM_RESAMPLES) for name in metrics}
    for number in range(NUM_RESAMPLES):
        drawn = []
        for seed in rng.integers(len(answers), size=len(answers)):
            num_questions = answers[seed].logp.shape[1]
            drawn.append(answers[seed].of(rng.integers(num_questions, size=num_questions)))
        for name, metric in metrics.items():
            values[name][number] = _mean([metric.of(one) for one in drawn])
    return values


def _mean(values: Any) -> float:
    values = np.asarray(values, dtype=np.float64)
    known = values[~np.isnan(values)]
    return float(known.mean()) if known.size else float("nan")


def _interval(values: np.ndarray) -> list[float]:
    known = values[~np.isnan(values)]
    return np.percentile(known, [2.5, 97.5]).tolist() if known.size else [float("nan")] * 2
