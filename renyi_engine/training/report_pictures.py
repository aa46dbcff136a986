"""The pictures of a training report: how losses, coupling and gradients went, and which particle holds which example.

Layout: K particles, N examples, S logged steps.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator

from renyi_engine.objectives import ACCURACY, ESS, EVAL, LOSS, MARGIN, Metric, data_term
from renyi_engine.reports import (
    ACCENT,
    INK,
    MUTED,
    PAPER,
    Array,
    Picture,
    charts,
    order_examples,
    particle_colours,
    pictures,
)
from renyi_engine.training.records import (
    ALPHA_OF_STEPS,
    ALPHA_STAR,
    GRAD_NORM,
    PARTICLE_WEIGHTS,
    SKIPPED_UPDATES,
    STEP,
    Record,
    Run,
    number,
)

MAX_POINTS = 400  # of a line
CONFIDENT = 0.9  # responsibility from which one particle is said to hold an example


def responsibilities(logp_nats: Array, alpha: float, weights: Array | None = None) -> Array:
    """Responsibilities [K, N], exactly as training takes them: w_k exp(alpha logp) in proportion (8).
    weights: [K]; None: 1/K each."""
    s, w = torch.from_numpy(logp_nats), None if weights is None else torch.from_numpy(weights)
    return data_term(s, alpha, logp_nats.shape[1], w)[1].responsibilities.numpy()


@pictures.style()
def draw(runs: Sequence[Run]) -> dict[str, list[Picture]]:
    """For each section of the page, the picture of each run. If it has no SVG, its caption says why."""
    sections = {
        "loss": _line_plots(runs, "loss", LOSS.unit, lambda run, ax: _trace(run, ax, LOSS, [ACCENT])),
        "nll": _line_plots(runs, "nll", "nats a {unit}", _draw_nll),
        "accuracy": _line_plots(runs, "accuracy", ACCURACY.unit, _draw_accuracy),
        "margin": _line_plots(runs, "margin", MARGIN.unit, _draw_margin),
        "ess": _line_plots(runs, "ess", ESS.unit, _draw_ess),
        "alpha": _line_plots(runs, "alpha", "alpha", _draw_alpha),
        "weights": _line_plots(runs, "weights", "weight", _draw_weights),
        "trained": [_heat_map(run, f"trained{i}", at_one=False) for i, run in enumerate(runs)],
        "at-one": [_heat_map(run, f"at-one{i}", at_one=True) for i, run in enumerate(runs)],
        "grad": _line_plots(runs, "grad", "norm", _draw_grad),
    }
    if all(run.unit == "token" for run in runs):
        del sections["accuracy"], sections["margin"]
    if not any(run.alpha_varied for run in runs):
        del sections["alpha"]
    if not any(run.learns_weights for run in runs):
        del sections["weights"]
    # at alpha 0 the first heat map is one flat colour, at 1 it is the second one
    if all(run.evaluation is None or run.evaluation["alpha"] in (0.0, 1.0) for run in runs):
        del sections["trained"]
    return sections


def _values(records: Sequence[Record], metric: Metric, width: int = 1, prefix: str = "") -> Array:
    """[S, width]; NaN where a record lacks the metric or holds another number of values."""
    rows = [value if isinstance(value := record.get(prefix + metric.name), list) else [value] for record in records]
    rows = [[number(v) for v in row] if len(row) == width else [math.nan] * width for row in rows]
    return np.array(rows).reshape(-1, width)


def _line_plots(runs: Sequence[Run], key: str, label: str, draw: Callable[[Run, Any], str]) -> list[Picture]:
    """One plot over steps for each run; runs on the same kind of data have the same y axis, to be compared."""
    figures = [pictures.axes(height=215) for _ in runs]
    notes = [draw(run, ax) for run, (_, ax) in zip(runs, figures, strict=True)]
    labels = [label.format(unit=run.unit) for run in runs]
    drawn = [np.isfinite(ax.dataLim.get_points()).all() for _, ax in figures]
    limits: dict[str, list[float]] = {run.unit: [] for run in runs}
    for run, (_, ax), seen in zip(runs, figures, drawn, strict=True):
        limits[run.unit] += ax.get_ylim() if seen else ()
    drawings = []
    for i, (run, (figure, ax), note) in enumerate(zip(runs, figures, notes, strict=True)):
        if not drawn[i]:
            drawings.append(Picture("", note or "No picture: this run did not record it."))
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
        drawings.append(Picture(svg, note.strip()))
    return drawings


def _draw_nll(run: Run, ax: Any) -> str:
    nll = run.task.nll
    if run.K > 1:
        _trace(run, ax, nll.particles, particle_colours(run.K), bare=True, linewidth=1)
        _trace(run, ax, nll.mean_particle, [INK], bare=True, linewidth=1.2, linestyle=(0, (3, 1.5)))
    return _trace(run, ax, nll.mixture, [INK])


def _draw_accuracy(run: Run, ax: Any) -> str:
    return _draw_rewards(run, ax, ACCURACY, 0.5, "0.5: a coin toss")


def _draw_margin(run: Run, ax: Any) -> str:
    return _draw_rewards(run, ax, MARGIN, 0, "0: no preference")


def _draw_rewards(run: Run, ax: Any, metric: Metric, limit: float, text: str) -> str:
    """The particles as thin lines, their mean as a bold one, and a line at `limit`, the value of a guess."""
    if run.unit == "token":
        return "No picture: this run did not train on preferences."
    if run.K > 1:
        _trace(run, ax, metric.of_particles, particle_colours(run.K), bare=True, linewidth=1)
    _trace(run, ax, metric, [INK])
    if np.isfinite(ax.dataLim.get_points()).all():
        _mark_limit(ax, limit, text, 3, "bottom")
    return ""


def _mark_limit(ax: Any, limit: float, text: str, offset: float, side: str) -> None:
    """A dashed line across with a text at its right end, `offset` points away."""
    ax.axhline(limit, color=MUTED, linewidth=0.8, linestyle=(0, (4, 3)), zorder=1.5)
    where = {"xycoords": ("axes fraction", "data"), "xytext": (0, offset), "textcoords": "offset points"}
    ax.annotate(text, (1, limit), **where, ha="right", va=side, color=MUTED, fontsize=pictures.SMALL)


def _draw_ess(run: Run, ax: Any) -> str:
    if run.K == 1:
        return "No picture: with one particle it is always 1."
    _trace(run, ax, ESS, [ACCENT])
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


def _draw_alpha(run: Run, ax: Any) -> str:
    of_steps: dict[int, float] = {}
    for record in run.train:
        given = record.get(ALPHA_OF_STEPS.name)
        alphas = [number(alpha) for alpha in given] if isinstance(given, list) else []
        of_steps |= {int(record[STEP.name]) - i: alpha for i, alpha in enumerate(reversed(alphas))}
    if not of_steps:
        return ""
    steps, values = np.array(sorted(of_steps.items())).T
    shown = np.linspace(0, len(steps) - 1, min(len(steps), MAX_POINTS)).astype(int)
    ax.plot(steps[shown], values[shown], color=ACCENT, linewidth=2, marker="." if len(shown) < 30 else None)
    estimates = _values(run.train, ALPHA_STAR)
    if not np.isfinite(estimates).any():
        return f"Set by {run.rule}." if run.alpha_varied else f"Constant at {run.rule}."
    ax.plot(_values(run.train, STEP), estimates, "o", color=INK, markerfacecolor=PAPER, markersize=5.5)
    return f"Set by {run.rule}; circles are the estimates of the critical alpha, at the next logged step."


def _draw_weights(run: Run, ax: Any) -> str:
    if not run.learns_weights:
        return f"No picture: the weights of this run were not learned, but 1/{run.K} all the time."
    _trace(run, ax, PARTICLE_WEIGHTS, particle_colours(run.K), bare=True, linewidth=1.4)
    if np.isfinite(ax.dataLim.get_points()).all():
        _mark_limit(ax, 1 / run.K, "1/K", 3, "bottom")
        ax.set_ylim(bottom=0)
    return ""


def _draw_grad(run: Run, ax: Any) -> str:
    if not (_values(run.train, GRAD_NORM, run.K) > 0).any():
        return ""
    ax.set_yscale("log", nonpositive="mask")
    _trace(run, ax, GRAD_NORM, particle_colours(run.K), bare=run.K > 8, linewidth=0.8 if run.K > 8 else 1.4)
    skipped = np.nan_to_num(_values(run.train[-1:], SKIPPED_UPDATES, run.K))[0].astype(int)
    who = ", ".join(f"{count:,} of particle {k}" for k, count in enumerate(skipped) if count)
    return f"Updates skipped: {who}." if who else "No update was skipped."


def _trace(run: Run, ax: Any, metric: Metric, colours: Sequence[str], *, bare: bool = False, **style: Any) -> str:
    """A running mean in each colour; unless `bare`, each logged step faintly behind it, and held-out circles."""
    steps, values = _values(run.train, STEP)[:, 0], _values(run.train, metric, len(colours))
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
        ax.plot(_values(run.held_out, STEP), _values(run.held_out, metric, prefix=EVAL), "o", color=INK, **circles)
    return ""


def _mean(values: Array, total: Callable[[Array], Array]) -> Array:
    """The mean of the finite values that `total` adds up; NaN where there is none."""
    with np.errstate(invalid="ignore"):
        return total(np.nan_to_num(values)) / total(np.isfinite(values).astype(np.float64))


def _heat_map(run: Run, name: str, *, at_one: bool) -> Picture:
    """Particles down, examples across: in the same order at either alpha, grouped by the leader at alpha = 1."""
    K, found = run.K, run.evaluation
    if found is None or K == 1:
        why = "with one particle every responsibility is 1" if K == 1 else "the run's folder has no evaluation.json"
        return Picture("", f"No heat map: {why}.")
    measured = np.isfinite(found["logp"]).any(axis=0)
    if not measured.any():
        return Picture("", "No heat map: the evaluation has no finite log-likelihood.")
    logp, weights = found["logp"][:, measured], found["weights"]
    alpha, posterior = 1.0 if at_one else found["alpha"], responsibilities(logp, 1.0, weights)
    order, N = order_examples(posterior), posterior.shape[1]
    shown = responsibilities(logp, alpha, weights)[:, order]
    figure, ax = pictures.responsibility_map(shown, xlabel="examples, grouped by leading particle")
    led = np.bincount(posterior.argmax(axis=0), minlength=K)
    if alpha > 0:
        pictures.mark_leads(ax, led.tolist())
    note = f"{N:,} {found['split']} examples after step {found['step']:,}, at alpha = {alpha:.4g}. "
    if alpha == 0:
        note += "At alpha = 0 every particle has its weight as its responsibility for every example, by definition."
    else:
        ess, held = (1 / (shown**2).sum(axis=0)).mean(), (shown.max(axis=0) > CONFIDENT).mean()
        note += (
            f"The effective sample size is {ess:.2f} of {K} on average. On {held:.0%} of the examples one particle has "
            f"a responsibility above {CONFIDENT:g}. Each particle leads {led.min():,} to {led.max():,} examples."
        )
    note += pictures.sampling_note(N)
    if not measured.all():
        note += f" {len(measured) - N:,} examples are left out: no particle gave them a finite log-likelihood."
    shown_examples = np.flatnonzero(measured)[order]
    names, texts = ([found[key][i] for i in shown_examples] for key in ("names", "texts"))
    columns, listed = charts.name_columns(shown, names, texts, "The examples of the heat maps, from left to right")
    description = f"{run.name}: responsibility of each particle for each example, alpha {alpha:.4g}"
    return Picture(pictures.svg(figure, name, description, columns), note, examples=listed if at_one else None)
