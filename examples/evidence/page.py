"""docs/evidence.md, made of the results of all experiments, of their pictures and of their findings.

An experiment's folder holds `results/SETTING.json` (made by `run`), `findings.md` (a verdict in its first sentence,
written by a person who looked at the results) and `picture.png` (made here).
"""

from __future__ import annotations

import importlib
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl

from examples.evidence.experiment import Experiment, Metric
from renyi_engine.core import write_text

HERE = Path(__file__).parent
PAGE = HERE.parents[1] / "docs" / "evidence.md"
EXPERIMENTS = ("contested", "people", "poison", "refusal", "mmlu", "out_of_distribution", "alpha_star")
BETTER = {"lower": " ↓", "higher": " ↑", "": ""}
"""In the head of a column: which numbers are better."""


def load(name: str) -> Experiment:
    """The experiment of a folder."""
    return importlib.import_module(f"examples.evidence.{name}.experiment").EXPERIMENT


def shown() -> dict[str, list[dict[str, Any]]]:
    """The results of every experiment that has some, one for each setting."""
    paths = {name: sorted((HERE / name / "results").glob("*.json")) for name in EXPERIMENTS}
    return {name: [json.loads(path.read_text()) for path in of] for name, of in paths.items() if of}


def page_text() -> str:
    """The page in Markdown."""
    introduction = (HERE / "introduction.md").read_text(encoding="utf-8")
    return "\n".join([introduction, *(_section(load(name), results) for name, results in shown().items())])


def write_page() -> Path:
    """Make the page and the pictures. Experiments without results are left out."""
    mpl.use("Agg")
    for name, results in shown().items():
        experiment = load(name)
        picture = experiment.picture(pictured(experiment, results))
        picture.savefig(HERE / name / "picture.png", dpi=120, metadata={"Software": None})
    write_text(PAGE, page_text())
    return PAGE


def pictured(experiment: Experiment, results: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The results that the picture is made of: the last ones that have the experiment's first part, so those of the
    large setting if there are some."""
    with_first = [
        of
        for of in results
        if experiment.variants(of["setting"])[0].name in [variant["name"] for variant in of["variants"]]
    ]
    if not with_first:
        raise SystemExit(f"{experiment.name}: the results lack the first part, which the picture shows; run it first")
    return with_first[-1]


def _section(experiment: Experiment, results: list[dict[str, Any]]) -> str:
    name = experiment.name
    lines = [f"## {experiment.title}", "", f"**Claim.** {experiment.claim}", ""]
    lines += [(HERE / name / "findings.md").read_text(encoding="utf-8").strip(), ""]
    lines += [f"![{experiment.title}: {experiment.caption}](../examples/evidence/{name}/picture.png)", ""]
    lines += [f"The picture ({pictured(experiment, results)['machine']}) shows {experiment.caption}", ""]
    for of in results:
        training = of["training"]
        layers = "all layers" if training["last_layers"] is None else f"the last {training['last_layers']} layers"
        needs = " --data FOLDER" * (experiment.data_file is not None)
        if of["model"] != experiment.settings[of["setting"]].model:
            needs += f" --model {of['model']}"
        if training["dtype"] != experiment.settings[of["setting"]].dtype:
            needs += f" --dtype {training['dtype']}"
        lines += [
            f"**Setting.** {of['model']}, {layers}, rank {training['lora_r']}, learning rate "
            f"{training['learning_rate']:g}, {training['seeds']} seeds, {of['machine']}. "
            f"`python -m examples.evidence run {name} --setting {of['setting']}{needs}`",
            "",
            experiment.note,
            "",
        ]
        for variant in of["variants"]:
            lines += _tables(experiment.metrics, variant, training["seeds"])
        lines += experiment.further_lines(of)
    return "\n".join(lines)


def _tables(metrics: Mapping[str, Metric], variant: Mapping[str, Any], num_seeds: int) -> list[str]:
    """A table for each name in `Metric.table`. The first one has the costs, too. The setting has `num_seeds`."""
    lines = []
    for name in dict.fromkeys(metric.table for metric in metrics.values()):
        shown = {key: metric for key, metric in metrics.items() if metric.table == name}
        size = f"K = {variant['num_particles']}, {variant['max_steps']} steps of {variant['batch_size']} rows"
        if "seeds" in variant and len(variant["seeds"]) != num_seeds:
            size += f", {len(variant['seeds'])} seeds"
        about = f"{variant['name'][0].upper()}{variant['name'][1:]} ({size}, {variant['dtype']})"
        lines += [f"{about}, {name}:" if name else f"{about}:", "", *_table(shown, variant, not lines), ""]
    return lines


def _table(metrics: Mapping[str, Metric], variant: Mapping[str, Any], with_costs: bool) -> list[str]:
    header = ["method", *(metric.label + BETTER[metric.better] for metric in metrics.values())]
    header += ["seconds", "tokens", "parameters"] * with_costs
    lines = [_row(header), _row(["---"] * len(header))]
    for method in variant["methods"].values():
        cells = [_cell(metric, method["metrics"].get(name)) for name, metric in metrics.items()]
        costs = method["costs"]
        paid = [f"{costs['seconds']:.0f}", f"{costs['tokens'] / 1000:.0f}k", f"{costs['parameters'] / 1e6:.2f}M"]
        lines.append(_row([method["label"], *cells, *paid * with_costs]))
    return lines


def _row(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _cell(metric: Metric, found: Mapping[str, Any] | None) -> str:
    """The mean, its interval, and a star where the paired difference to the baseline is more than chance: its interval
    excludes 0, and so does a t test over the seeds."""
    if found is None or math.isnan(found["mean"]):
        return "-"
    text = f"{round(found['mean'], metric.digits) + 0.0:.{metric.digits}f}"  # no -0.0
    known = [value for value in found["seeds"] if not math.isnan(value)]
    if len(known) < len(found["seeds"]):
        text += f" [{len(known)} of {len(found['seeds'])} seeds]"
    if not metric.resampled:
        return text
    low, high = found["interval"]
    text += f" ({low:.{metric.digits}f} to {high:.{metric.digits}f})"
    difference = found.get("difference")
    excludes_0 = difference and (difference["interval"][0] > 0 or difference["interval"][1] < 0)
    if excludes_0 and difference["p"] < 0.05:
        text += " \\*"
    return text
