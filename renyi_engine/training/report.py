"""The HTML report of training runs: one self-contained page, one run or several side by side.

A run folder holds config.yaml and metrics.jsonl, and may hold run.json and evaluation.json. The page loads nothing: its
pictures are inline SVG, and the same folders always give the same bytes. Its words are in templates/report.html.j2.

Layout: K particles, N examples, S logged steps.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator

from renyi_engine.core import read_json, read_yaml, reason
from renyi_engine.objectives import alpha_rule, data_term, parse_controller
from renyi_engine.reports import (
    ACCENT,
    INK,
    MUTED,
    PAPER,
    Array,
    Table,
    order_examples,
    page,
    particle_colours,
    pictures,
)

Record = Mapping[str, Any]
Cell = tuple[str, str]  # one run's part of a section: a picture, or none, and a note

MAX_POINTS = 400  # of a line
CONFIDENT = 0.9  # weight from which one particle is said to hold an example


class _Run(NamedTuple):
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


def write_report(
    runs: Sequence[Path], output: Path, *, title: str = "alpha-Renyi ensemble", tables: Sequence[Table] = ()
) -> Path:
    """Write one HTML page that shows `runs` side by side below `tables`; returns `output`.

    Raises:
        ValueError, in one line: no run; a folder whose files are missing or broken; or `output` is something else than
            an earlier page. It is then left as it was.
    """
    if not runs:
        raise ValueError("runs: expected at least one run folder; got none")
    read = [_read_run(Path(run)) for run in runs]
    if output.exists() and not _is_page(output):
        raise ValueError(f"output: {output} is no HTML page, and would be lost; choose another name, or remove it")
    with pictures.style():
        sections = _sections(read)
    lead = "One training run" if len(read) == 1 else f"{len(read)} training runs, side by side"
    lead += ": K small adapters (particles) on one frozen language model, trained together so that each example goes "
    lead += "mostly to the particles that already explain it."
    return page.fill(output, "report.html.j2", title=title, lead=lead, runs=read, tables=tables, sections=sections)


def responsibilities(logp_nats: Array, alpha: float) -> Array:
    """Responsibilities [K, N], exactly as training takes them: softmax over particles of alpha * logp (8)."""
    return data_term(torch.from_numpy(logp_nats), alpha, logp_nats.shape[1])[1].responsibilities.numpy()


def _is_page(path: Path) -> bool:
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return file.read(15).lower() == b"<!doctype html>"


def _read_run(folder: Path) -> _Run:
    for name in ("config.yaml", "metrics.jsonl"):
        if not (folder / name).is_file():
            raise ValueError(f"{folder}: no {name}; pass the output_dir of a run that has logged a step")
    path = folder / "config.yaml"
    config = read_yaml(path)
    try:
        K, alpha = int(config["num_particles"]), float(config["alpha"])
        schedule, start = config.get("alpha_schedule", "constant"), float(config.get("alpha_0", 0.0))
        controller = config.get("alpha_controller")
        name, value = parse_controller(str(controller)) if controller else ("", 0.0)
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise ValueError(f"{path}: no num_particles and alpha to be read ({reason(error)}); restore it") from None
    facts = read_json(folder / "run.json") if (folder / "run.json").is_file() else {}
    if not isinstance(facts, dict):
        raise ValueError(f"{folder / 'run.json'}: expected a JSON object; remove the file to do without it")
    train, held_out = _read_metrics(folder / "metrics.jsonl")
    evaluation = _read_evaluation(folder / "evaluation.json", K)
    rule, target = alpha_rule(alpha, schedule, start, controller), value * K if name == "ess" else None
    return _Run(folder.resolve().name, config, facts, train, held_out, evaluation, K, alpha, rule, target)


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
    """evaluation.json with logp_nats as an array [K, N]; None where there is no such file."""
    if not path.is_file():
        return None
    found = read_json(path)
    try:
        logp = np.array([[_number(value) for value in row] for row in found["logp_nats"]], dtype=np.float64)
        if logp.ndim != 2 or logp.shape[0] != K or logp.shape[1] < 1:
            raise ValueError(f"logp_nats has shape {list(logp.shape)}, not one row for each of {K} particles")
        return {"logp": logp, "step": int(found["step"]), "split": str(found["split"]), "alpha": float(found["alpha"])}
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise ValueError(f"{path}: not an evaluation ({error}); evaluate again or remove the file") from None


def _number(value: Any) -> float:
    """NaN for whatever is no finite number that a float can hold, null above all."""
    return float(value) if isinstance(value, int | float) and abs(value) <= sys.float_info.max else math.nan


def _values(records: Sequence[Record], key: str, width: int = 1) -> Array:
    """[S, width]; NaN where a record lacks the key or holds another number of values."""
    rows = [value if isinstance(value := record.get(key), list) else [value] for record in records]
    rows = [[_number(v) for v in row] if len(row) == width else [math.nan] * width for row in rows]
    return np.array(rows).reshape(-1, width)


def _sections(runs: Sequence[_Run]) -> list[tuple[str, list[Cell]]]:
    sections = {
        "loss": _line_cells(runs, "loss", "nats an example", lambda run, ax: _trace(run, ax, "loss_nats", [ACCENT])),
        "nll": _line_cells(runs, "nll", "nats a {unit}", _draw_nll),
        "accuracy": _line_cells(runs, "accuracy", "share of the pairs", _draw_accuracy),
        "margin": _line_cells(runs, "margin", "nats", _draw_margin),
        "ess": _line_cells(runs, "ess", "particles", _draw_ess),
        "alpha": _line_cells(runs, "alpha", "alpha", _draw_alpha),
        "heat": [_heat_cell(run, f"heat{i}", at_one=False) for i, run in enumerate(runs)],
        "weights": [_heat_cell(run, f"weights{i}", at_one=True) for i, run in enumerate(runs)],
        "grad": _line_cells(runs, "grad", "norm", _draw_grad),
    }
    if all(run.unit == "token" for run in runs):
        del sections["accuracy"], sections["margin"]
    if not any(run.alpha_varied for run in runs):
        del sections["alpha"]
    # at alpha 0 the first heat map is one flat colour, at 1 it is the second one
    if all(run.evaluation is None or run.evaluation["alpha"] in (0.0, 1.0) for run in runs):
        del sections["heat"]
    return list(sections.items())


def _line_cells(runs: Sequence[_Run], key: str, label: str, draw: Callable[[_Run, Any], str]) -> list[Cell]:
    """One plot over steps for each run; runs on the same kind of data have the same y axis, to be compared."""
    figures = [pictures.axes(height=215) for _ in runs]
    notes = [draw(run, ax) for run, (_, ax) in zip(runs, figures, strict=True)]
    labels = [label.format(unit=run.unit) for run in runs]
    drawn = [np.isfinite(ax.dataLim.get_points()).all() for _, ax in figures]
    limits: dict[str, list[float]] = {run.unit: [] for run in runs}
    for run, (_, ax), seen in zip(runs, figures, drawn, strict=True):
        limits[run.unit] += ax.get_ylim() if seen else ()
    cells = []
    for i, (run, (figure, ax), note) in enumerate(zip(runs, figures, notes, strict=True)):
        if not drawn[i]:
            cells.append(("", note or "No picture: this run did not record it."))
            continue
        shared = limits[run.unit]
        low, high = ax.get_ylim() if key == "ess" else (min(shared), max(shared))  # ess: 1 to K, always
        ax.set(ylim=(low, high), xlabel="training step", ylabel=labels[i])
        ax.grid(True, axis="y")
        ax.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        if ax.get_yscale() == "log":
            ax.yaxis.set_major_locator(LogLocator(subs=(1,) if high > 100 * low else (1, 2, 5)))
            ax.yaxis.set_major_formatter("{x:g}")
            ax.yaxis.set_minor_locator(NullLocator())
        if (group := len(run.train) / MAX_POINTS) > 1:
            note += f" Each point averages about {group:.0f} logged steps."
        svg = pictures.svg(figure, f"{key}{i}", f"{run.name}: {labels[i]} over training steps")
        cells.append((svg, note.strip()))
    return cells


def _draw_nll(run: _Run, ax: Any) -> str:
    if run.K > 1:
        key, dashes = f"mean_particle_nll_nats_per_{run.unit}", (0, (3, 1.5))
        _trace(run, ax, f"particle_nll_nats_per_{run.unit}", particle_colours(run.K), bare=True, linewidth=1)
        _trace(run, ax, key, [INK], bare=True, linewidth=1.2, linestyle=dashes)
    return _trace(run, ax, f"mixture_nll_nats_per_{run.unit}", [INK])


def _draw_accuracy(run: _Run, ax: Any) -> str:
    return _draw_rewards(run, ax, "rewards/accuracies", 0.5, "0.5: a coin toss")


def _draw_margin(run: _Run, ax: Any) -> str:
    return _draw_rewards(run, ax, "rewards/margins", 0, "0: no preference")


def _draw_rewards(run: _Run, ax: Any, key: str, limit: float, text: str) -> str:
    """The particles thin, their mean bold, and at `limit` what knowing nothing gives."""
    if run.unit == "token":
        return "No picture: this run did not train on preferences."
    if run.K > 1:
        _trace(run, ax, f"particle_{key}", particle_colours(run.K), bare=True, linewidth=1)
    _trace(run, ax, key, [INK])
    if np.isfinite(ax.dataLim.get_points()).all():
        _mark_limit(ax, limit, text, 3, "bottom")
    return ""


def _mark_limit(ax: Any, limit: float, text: str, offset: float, side: str) -> None:
    """A dashed line across with a text at its right end, `offset` points away."""
    ax.axhline(limit, color=MUTED, linewidth=0.8, linestyle=(0, (4, 3)), zorder=1.5)
    where = {"xycoords": ("axes fraction", "data"), "xytext": (0, offset), "textcoords": "offset points"}
    ax.annotate(text, (1, limit), **where, ha="right", va=side, color=MUTED, fontsize=pictures.SMALL)


def _draw_ess(run: _Run, ax: Any) -> str:
    if run.K == 1:
        return "No picture: with one particle it is always 1."
    _trace(run, ax, "ess_particles", [ACCENT])
    if not np.isfinite(ax.dataLim.get_points()).all():
        return ""
    _mark_limit(ax, run.K, f"{run.K}: all share alike", 5, "bottom")
    _mark_limit(ax, 1, "1: one takes all", -5, "top")
    room = 0.16 * (run.K - 1)
    ax.set_ylim(1 - room, run.K + room)
    ax.set_yticks(range(1, run.K + 1) if run.K <= 8 else [1, *(round(run.K * part / 4) for part in (1, 2, 3, 4))])
    if run.target_ess is not None:
        _mark_limit(ax, run.target_ess, "", 0, "bottom")
        return f"Alpha was set so that it stays at {run.target_ess:g}, the dashed line between the limits ({run.rule})."
    return "At alpha = 0 it is K by definition." if run.rule == "0" else ""


def _draw_alpha(run: _Run, ax: Any) -> str:
    of_steps: dict[int, float] = {}
    for record in run.train:
        given = record.get("alpha_of_steps")
        alphas = [_number(alpha) for alpha in given] if isinstance(given, list) else []
        of_steps |= {int(record["step"]) - i: alpha for i, alpha in enumerate(reversed(alphas))}
    if not of_steps:
        return ""
    steps, values = np.array(sorted(of_steps.items())).T
    shown = np.linspace(0, len(steps) - 1, min(len(steps), MAX_POINTS)).astype(int)
    ax.plot(steps[shown], values[shown], color=ACCENT, linewidth=2, marker="." if len(shown) < 30 else None)
    estimates = _values(run.train, "alpha_star")
    if not np.isfinite(estimates).any():
        return f"Set by {run.rule}." if run.alpha_varied else f"Constant at {run.rule}."
    ax.plot(_values(run.train, "step"), estimates, "o", color=INK, markerfacecolor=PAPER, markersize=5.5)
    return f"Set by {run.rule}; circles are the estimates of the critical alpha, at the next logged step."


def _draw_grad(run: _Run, ax: Any) -> str:
    if not (_values(run.train, "grad_norm", run.K) > 0).any():
        return ""
    ax.set_yscale("log", nonpositive="mask")
    _trace(run, ax, "grad_norm", particle_colours(run.K), bare=run.K > 8, linewidth=0.8 if run.K > 8 else 1.4)
    skipped = np.nan_to_num(_values(run.train[-1:], "skipped_updates", run.K))[0].astype(int)
    who = ", ".join(f"{count:,} of particle {k}" for k, count in enumerate(skipped) if count)
    return f"Updates skipped: {who}." if who else "No update was skipped."


def _trace(run: _Run, ax: Any, key: str, colours: Sequence[str], *, bare: bool = False, **style: Any) -> str:
    """A running mean in each colour; unless `bare`, each logged step faintly behind it, and held-out circles."""
    steps, values = _values(run.train, "step")[:, 0], _values(run.train, key, len(colours))
    if len(steps) > MAX_POINTS:
        first = np.linspace(0, len(steps), MAX_POINTS + 1).astype(int)[:-1]
        steps, values = steps[first], _mean(values, lambda x: np.add.reduceat(x, first, axis=0))
    window = np.ones(2 * (len(steps) // 30) + 1)
    style = {"linewidth": 2, "marker": "." if len(steps) < 30 else None, **style}
    for colour, line in zip(colours, values.T, strict=True):
        if not bare and len(steps) >= 30:
            ax.plot(steps, line, color=colour, linewidth=0.7, alpha=0.4)
        ax.plot(steps, _mean(line, lambda x: np.convolve(x, window, mode="same")), color=colour, **style)
    if not bare:
        circles = {"markerfacecolor": PAPER, "markersize": 5.5, "markeredgewidth": 1.4, "zorder": 5}
        ax.plot(_values(run.held_out, "step"), _values(run.held_out, f"eval_{key}"), "o", color=INK, **circles)
    return ""


def _mean(values: Array, total: Callable[[Array], Array]) -> Array:
    """The mean of the finite values that `total` adds up; NaN where there is none."""
    with np.errstate(invalid="ignore"):
        return total(np.nan_to_num(values)) / total(np.isfinite(values).astype(np.float64))


def _heat_cell(run: _Run, name: str, *, at_one: bool) -> Cell:
    """Particles down, examples across: in the same order at either alpha, grouped by the leader at alpha = 1."""
    K, found = run.K, run.evaluation
    if found is None or K == 1:
        why = "with one particle every weight is 1" if K == 1 else "the run's folder has no evaluation.json"
        return "", f"No heat map: {why}."
    alpha, posterior = 1.0 if at_one else found["alpha"], responsibilities(found["logp"], 1.0)
    weights, N = responsibilities(found["logp"], alpha), posterior.shape[1]
    figure, ax = pictures.weight_map(
        weights[:, order_examples(posterior)], xlabel="examples, grouped by leading particle"
    )
    led = np.bincount(posterior.argmax(axis=0), minlength=K)
    if alpha > 0:
        pictures.mark_leads(ax, led.tolist())
    ess, sharp = (1 / (weights**2).sum(axis=0)).mean(), (weights.max(axis=0) > CONFIDENT).mean()
    note = f"{N:,} {found['split']} examples after step {found['step']:,}, weighed at alpha = {alpha:.4g}. "
    if alpha == 0:
        note += "Here every particle has 1/K of every example by definition."
    else:
        note += (
            f"Effective sample size {ess:.2f} of {K} on average; on {sharp:.0%} of the examples one particle has over "
        )
        note += f"{CONFIDENT:g} of the weight. Each particle leads {led.min():,} to {led.max():,} examples."
    note += pictures.sampling_note(N)
    return pictures.svg(figure, name, f"{run.name}: weight of each particle on each example, alpha {alpha:.4g}"), note
