"""The HTML report of training runs: one self-contained page, of one run or of several side by side.

What is drawn is in report_pictures.py; the words are in reports/templates/report.html.j2. The page loads nothing, and
the same folders always give the same bytes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from renyi_engine.objectives import ACCURACY, ESS, EVAL, MARGIN
from renyi_engine.reports import Table, page
from renyi_engine.training import report_pictures
from renyi_engine.training.records import PARTICLE_WEIGHTS, Run, number, read_run


def write_report(runs: Sequence[Path], output: Path, *, title: str | None = None, tables: Sequence[Table] = ()) -> Path:
    """Write one HTML page that shows `runs` side by side below `tables`; returns `output`.

    Args:
        title: None: made of the names of the runs, how they were trained, and their model.

    Raises:
        ValueError, in one line: no run; a folder whose files are missing or broken; or `output` is something else than
            an earlier page. It is then left as it was.
    """
    if not runs:
        raise ValueError("runs: expected at least one run folder; got none")
    read = [read_run(Path(run)) for run in runs]
    if output.exists() and not _is_page(output):
        raise ValueError(f"output: {output} is no HTML page, and would be lost; choose another name, or remove it")
    sections = report_pictures.draw(read)
    return page.fill(
        output,
        "report.html.j2",
        title=title or _title(read),
        found=[_found(run) for run in read],
        runs=read,
        tables=tables,
        sections=sections,
        tasks=dict.fromkeys(run.task for run in read),
        eval=EVAL,
        accuracy=ACCURACY,
        margin=MARGIN,
        ess=ESS,
    )


def _title(runs: Sequence[Run]) -> str:
    names, kinds, models = (
        " and ".join(dict.fromkeys(values))
        for values in (
            (run.name for run in runs),
            (run.kind for run in runs),
            (Path(str(run.config.get("model_name_or_path", "an unknown model"))).name for run in runs),
        )
    )
    return f"{names}: {kinds} of {models}"


def _found(run: Run) -> str:
    """How the run ended, in words."""
    last, prefix, on = run.train[-1], "", "on its last training examples"
    if run.held_out:
        last, prefix, on = run.held_out[-1], EVAL, "on examples that training never saw"
    mixture, mean, ess = (
        number(last.get(prefix + metric.name)) for metric in (run.task.nll.mixture, run.task.nll.mean_particle, ESS)
    )
    begin = f"Found for {run.name}, after {last['step']:,} steps: {on}, "
    if math.isnan(mixture + mean + ess):
        return f"{begin}nothing was recorded."
    if run.K == 1:
        return f"{begin}its one particle has an NLL of {mean:.3g} nats a {run.unit}."
    weights = run.train[-1].get(PARTICLE_WEIGHTS.name)
    of_weights = ""
    if run.learns_weights and isinstance(weights, list):
        listed = ", ".join(f"{number(weight):.3f}" for weight in weights)
        of_weights = f" In the end the particles count in the mixture with the weights {listed}."
    return (
        f"{begin}the particles together (the mixture) have an NLL of {mixture:.3g} nats a {run.unit}, a particle by "
        f"itself {mean:.3g}. An example is divided among {ess:.1f} of the {run.K} particles."
        f"{of_weights}"
    )


def _is_page(path: Path) -> bool:
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return file.read(15).lower() == b"<!doctype html>"
