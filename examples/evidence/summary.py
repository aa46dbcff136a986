"""From what was answered to numbers with intervals.

The bootstrap draws seeds with replacement and questions with replacement: the same for all methods, so the differences
between methods are paired. A question that several seeds were asked is drawn equally often for all of them, because
what they answer to it is alike. The interval holds 95 % of what the bootstrap finds (percentiles).

With three seeds such an interval is too narrow: all drawn seeds are the same one in a ninth of the draws. So a
difference also has the p-value of a paired t test over the seeds.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import ttest_rel

from examples.evidence.cells import COSTS, Work
from examples.evidence.experiment import Answers, Metric, Variant
from examples.evidence.methods import BASELINE, DROPOUT, METHODS
from renyi_engine.core import files, versions

NUM_RESAMPLES = 1000
LEAST_SEEDS = 3
"""Of how many seeds a variant is summed up, at least."""


def summarise(work: Work, machine: str) -> dict[str, Any]:
    """The results of an experiment, as the page needs them, of every variant of which enough seeds are done."""
    experiment, enough = work.experiment, min(LEAST_SEEDS, work.setting.seeds)
    return {
        "experiment": experiment.name,
        "setting": work.setting_name,
        "model": work.setting.model,
        "training": {name: value for name, value in vars(work.setting).items() if name != "model"},
        "machine": machine,
        "versions": versions(),
        "num_resamples": NUM_RESAMPLES,
        "variants": [
            {"name": variant.name, "num_particles": variant.num_particles} | _variant(work, variant)
            for variant in experiment.variants(work.setting_name)
            if len(work.seeds_done(variant)) >= enough
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
    seeds = work.seeds_done(variant)
    found = {method: [work.answers(variant, method, seed) for seed in seeds] for method in variant.methods}
    answers = {method: [one for one, _ in of] for method, of in found.items()}
    metrics = {method: _meant_for(method, work.experiment.metrics) for method in variant.methods}
    values = {
        method: {name: [metric.of(one) for one in answers[method]] for name, metric in of.items()}
        for method, of in metrics.items()
    }
    resampled = {method: _resampled(answers[method], of) for method, of in metrics.items()}
    methods = {}
    for method, of in found.items():
        measured: dict[str, dict[str, Any]] = {
            name: {"mean": _mean(of_seeds), "seeds": of_seeds} for name, of_seeds in values[method].items()
        }
        for name, draws in resampled[method].items():
            centred = metrics[method][name].centred
            measured[name]["interval"] = _interval(draws, measured[name]["mean"] if centred else None)
            if method != BASELINE and BASELINE in answers:
                ours, theirs = values[method][name], values[BASELINE][name]
                mean = _mean(np.subtract(ours, theirs))
                measured[name]["difference"] = {
                    "mean": mean,
                    "interval": _interval(draws - resampled[BASELINE][name], mean if centred else None),
                    "p": p_value(ours, theirs),
                }
        costs = {cost: float(np.mean([paid[cost] for _, paid in of])) for cost in COSTS}
        weights = [one.weights.tolist() for one in answers[method]]
        methods[method] = {"label": METHODS[method].label, "metrics": measured, "costs": costs, "weights": weights}
        if curves := work.experiment.curves:
            lines = {name: [list(curve(one)) for one in answers[method]] for name, curve in curves.items()}
            methods[method]["curves"] = lines
    training = work.setting_of(variant)
    trained = {name: getattr(training, name) for name in ("max_steps", "batch_size", "dtype")}
    return trained | {"seeds": seeds, "methods": methods}


def _meant_for(method: str, metrics: Mapping[str, Metric]) -> Mapping[str, Metric]:
    """The metrics, without those that mean nothing for this method."""
    is_dropout = METHODS[method].kind == DROPOUT
    return {name: metric for name, metric in metrics.items() if not (is_dropout and metric.of_members)}


def _resampled(answers: list[Answers], metrics: Mapping[str, Metric]) -> dict[str, np.ndarray]:
    """[NUM_RESAMPLES] values of every metric that has an interval. The draws are the same for every method, because
    the generator is the same."""
    rng = np.random.default_rng(0)
    asked, numbers = np.unique(np.concatenate([one.facts["asked"] for one in answers]), return_inverse=True)
    of_seed = np.split(numbers, np.cumsum([len(one.facts["asked"]) for one in answers])[:-1])
    values = {name: np.empty(NUM_RESAMPLES) for name, metric in metrics.items() if metric.resampled}
    for number in range(NUM_RESAMPLES):
        times = rng.multinomial(len(asked), np.full(len(asked), 1 / len(asked)))  # each question is drawn so often
        drawn = []
        for seed in rng.integers(len(answers), size=len(answers)):
            drawn.append(answers[seed].of(np.repeat(np.arange(len(of_seed[seed])), times[of_seed[seed]])))
        for name, found in values.items():
            found[number] = _mean([metrics[name].of(one) for one in drawn])
    return values


def p_value(ours: Sequence[float], theirs: Sequence[float]) -> float:
    """Of a paired t test over the seeds. NaN if there is one seed, if a value is missing, or if no seed differs."""
    difference = np.subtract(ours, theirs)
    if len(difference) < 2 or np.isnan(difference).any() or not difference.any():
        return float("nan")
    if not difference.std():
        return 0.0  # every seed differs by the same number
    return float(ttest_rel(ours, theirs).pvalue)


def _mean(values: Any) -> float:
    values = np.asarray(values, dtype=np.float64)
    known = values[~np.isnan(values)]
    return float(known.mean()) if known.size else float("nan")


def _interval(values: np.ndarray, mean: float | None) -> list[float]:
    """95 % of the values. With `mean`, they are moved so that this is their mean."""
    known = values[~np.isnan(values)]
    if not known.size:
        return [float("nan")] * 2
    moved = 0.0 if mean is None else mean - known.mean()
    return (np.percentile(known, [2.5, 97.5]) + moved).tolist()
