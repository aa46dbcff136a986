"""The HTML report of training runs: one self-contained page, one run or several side by side.

A run folder holds config.yaml and metrics.jsonl, and may hold run.json and evaluation.json. The page loads nothing: its
pictures are inline SVG, and the same folders always give the same bytes. Its words are in templates/report.html.j2.

Layout: K particles, N examples, S logged steps.
"""

from __future__ import annotations

import html
import io
import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
import matplotlib.style
import numpy as np
import torch
import yaml
from jinja2 import Environment, PackageLoader, StrictUndefined
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator
from numpy.typing import NDArray

from renyi_engine.files import read_json, write_text
from renyi_engine.objective import data_term

Record = Mapping[str, Any]
Array = NDArray[np.float64]
Cell = tuple[str, str]  # one run's part of a section: a picture, or none, and a note

MAX_POINTS = 400  # of a line
MAX_SHOWN = 600  # examples in a heat map
CONFIDENT = 0.9  # weight from which one particle is said to hold an example
# Light to dark in steps of near equal distance in Oklab, as even as viridis.
HEAT = LinearSegmentedColormap.from_list("heat", ["#f0f4f5", "#8dcfec", "#44a1d9", "#286fb4", "#284279", "#1b1f32"])
# Figures are drawn in these colours, and the page swaps them for its own so that they follow a dark theme.
INK, MUTED, GRID, PAPER, ACCENT = "#1b2a3b", "#5a6774", "#dde3e8", "#fdfdfc", "#0a6fb1"
THEME = {INK: "--ink", MUTED: "--muted", GRID: "--grid", PAPER: "--paper", ACCENT: "--accent"}
# Okabe and Ito's colour-blind safe set, less yellow and black, which vanish on a light or a dark page.
COLOURS = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00", "#8878c3", "#8a9099")
STYLE = {
    "svg.hashsalt": "renyi-engine",
    "svg.fonttype": "none",
    "font.size": 9.5,
    **dict.fromkeys(("axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"), MUTED),
    **dict.fromkeys(("axes.spines.right", "axes.spines.top"), False),
    **dict.fromkeys(("axes.linewidth", "grid.linewidth"), 0.7),
    **dict.fromkeys(("axes.facecolor", "figure.facecolor"), "none"),
    "grid.color": GRID,
}
WIDTH, LEFT, BOTTOM = 430, 50, 36  # points; equal margins align the axes down the page


@dataclass(frozen=True)
class Table:
    """A table of ready-made text for the top of the report."""

    title: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    note: str = ""


class _Run(NamedTuple):
    name: str
    config: Record
    facts: Record  # run.json
    train: Sequence[Record]
    held_out: Sequence[Record]
    evaluation: Record | None
    K: int
    alpha: float


def write_report(
    runs: Sequence[Path], output: Path, *, title: str = "alpha-Renyi ensemble", tables: Sequence[Table] = ()
) -> Path:
    """Write one HTML page that shows `runs` side by side below `tables`; returns `output`.

    Raises:
        ValueError, in one line: no run, or a folder whose files are missing or broken; `output` is then left as it was.
    """
    if not runs:
        raise ValueError("runs: expected at least one run folder; got none")
    read = [_read_run(Path(run)) for run in runs]
    with matplotlib.style.context(["default", STYLE]):
        sections = _sections(read)
    loader = PackageLoader("renyi_engine")
    environment = Environment(loader=loader, autoescape=True, trim_blocks=True, undefined=StrictUndefined)
    template = environment.get_template("report.html.j2")
    page = template.render(title=title, runs=read, tables=tables, sections=sections, colours=particle_colours)
    output.parent.mkdir(parents=True, exist_ok=True)
    write_text(output, page)
    return output


def particle_colours(num_particles: int) -> list[str]:
    """A hex colour for each particle: told apart by hue up to 8, a ramp over the index beyond."""
    if num_particles <= len(COLOURS):
        return list(COLOURS[:num_particles])
    ramp = matplotlib.colormaps["plasma"](np.linspace(0.1, 0.8, num_particles), bytes=True)
    return [f"#{red:02x}{green:02x}{blue:02x}" for red, green, blue, _ in ramp]


def responsibilities(logp_nats: Array, alpha: float) -> Array:
    """Shares [K, N] of each example, exactly as training takes them: softmax over particles of alpha * logp (8)."""
    return data_term(torch.from_numpy(logp_nats), alpha, logp_nats.shape[1])[1].responsibilities.numpy()


def order_examples(weights: Array) -> NDArray[np.intp]:
    """Indices of the N examples of weights [K, N]: grouped by leading particle, each group from sharp to shared."""
    return np.lexsort((-weights.max(axis=0), weights.argmax(axis=0)))


def _read_run(folder: Path) -> _Run:
    for name in ("config.yaml", "metrics.jsonl"):
        if not (folder / name).is_file():
            raise ValueError(f"{folder}: no {name}; pass the output_dir of a run that has logged a step")
    path = folder / "config.yaml"
    try:
        config = yaml.safe_load(path.read_text(encoding="utf-8"))
        K, alpha = int(config["num_particles"]), float(config["alpha"])
    except (yaml.YAMLError, KeyError, TypeError, ValueError) as error:
        problem = " ".join(str(error).split())
        raise ValueError(f"{path}: no num_particles and alpha to be read ({problem}); restore it") from None
    facts = read_json(folder / "run.json") if (folder / "run.json").is_file() else {}
    if not isinstance(facts, dict):
        raise ValueError(f"{folder / 'run.json'}: expected a JSON object; remove the file to do without it")
    train, held_out = _read_metrics(folder / "metrics.jsonl")
    evaluation = _read_evaluation(folder / "evaluation.json", K)
    return _Run(folder.resolve().name, config, facts, train, held_out, evaluation, K, alpha)


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
        except (KeyError, TypeError, ValueError, OverflowError):
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
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: not an evaluation ({error}); evaluate again or remove the file") from None


def _number(value: Any) -> float:
    """NaN for whatever is no finite number, null above all."""
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else math.nan


def _values(records: Sequence[Record], key: str, width: int = 1) -> Array:
    """[S, width]; NaN where a record lacks the key or holds another number of values."""
    rows = [value if isinstance(value := record.get(key), list) else [value] for record in records]
    rows = [[_number(v) for v in row] if len(row) == width else [math.nan] * width for row in rows]
    return np.array(rows).reshape(-1, width)


def _sections(runs: Sequence[_Run]) -> list[tuple[str, list[Cell]]]:
    sections = {
        "loss": _line_cells(runs, "loss", "nats an example", lambda run, ax: _trace(run, ax, "loss_nats", [ACCENT])),
        "nll": _line_cells(runs, "nll", "nats a token", _draw_nll),
        "ess": _line_cells(runs, "ess", "particles", _draw_ess),
        "heat": [_heat_cell(run, f"heat{i}", at_one=False) for i, run in enumerate(runs)],
        "weights": [_heat_cell(run, f"weights{i}", at_one=True) for i, run in enumerate(runs)],
        "grad": _line_cells(runs, "grad", "norm", _draw_grad),
    }
    # at alpha 0 the first heat map is one flat colour, at 1 it is the second one
    if all(run.evaluation is None or run.evaluation["alpha"] in (0.0, 1.0) for run in runs):
        del sections["heat"]
    return list(sections.items())


def _line_cells(runs: Sequence[_Run], key: str, label: str, draw: Callable[[_Run, Any], str]) -> list[Cell]:
    """One plot over steps for each run, with the same y axis so that they can be compared."""
    figures = [_axes(height=215) for _ in runs]
    notes = [draw(run, ax) for run, (_, ax) in zip(runs, figures, strict=True)]
    drawn = [ax for _, ax in figures if np.isfinite(ax.dataLim.get_points()).all()]
    limits = [limit for ax in drawn for limit in ax.get_ylim()]
    cells = []
    for i, (run, (figure, ax), note) in enumerate(zip(runs, figures, notes, strict=True)):
        if ax not in drawn:
            cells.append(("", note or "No picture: this run did not record it."))
            continue
        low, high = ax.get_ylim() if key == "ess" else (min(limits), max(limits))  # ess: 1 to K, always
        ax.set(ylim=(low, high), xlabel="training step", ylabel=label)
        ax.grid(True, axis="y")
        ax.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        if ax.get_yscale() == "log":
            ax.yaxis.set_major_locator(LogLocator(subs=(1,) if high > 100 * low else (1, 2, 5)))
            ax.yaxis.set_major_formatter("{x:g}")
            ax.yaxis.set_minor_locator(NullLocator())
        if (group := len(run.train) / MAX_POINTS) > 1:
            note += f" Each point averages about {group:.0f} logged steps."
        cells.append((_svg(figure, f"{key}{i}", f"{run.name}: {label} over training steps"), note.strip()))
    return cells


def _draw_nll(run: _Run, ax: Any) -> str:
    if run.K > 1:
        _trace(run, ax, "particle_nll_nats_per_token", particle_colours(run.K), bare=True, linewidth=1)
        _trace(run, ax, "mean_particle_nll_nats_per_token", [INK], bare=True, linewidth=1.2, linestyle=(0, (3, 1.5)))
    return _trace(run, ax, "mixture_nll_nats_per_token", [INK])


def _draw_ess(run: _Run, ax: Any) -> str:
    if run.K == 1:
        return "No picture: with one particle it is always 1."
    _trace(run, ax, "ess_particles", [ACCENT])
    if not np.isfinite(ax.dataLim.get_points()).all():
        return ""
    for limit, text, offset, side in ((run.K, "all share alike", 5, "bottom"), (1, "one takes all", -5, "top")):
        ax.axhline(limit, color=MUTED, linewidth=0.8, linestyle=(0, (4, 3)), zorder=1.5)
        where = {"xycoords": ("axes fraction", "data"), "xytext": (0, offset), "textcoords": "offset points"}
        ax.annotate(f"{limit}: {text}", (1, limit), **where, ha="right", va=side, color=MUTED, fontsize=8.5)
    room = 0.16 * (run.K - 1)
    ax.set_ylim(1 - room, run.K + room)
    ax.set_yticks(range(1, run.K + 1) if run.K <= 8 else [1, *(round(run.K * part / 4) for part in (1, 2, 3, 4))])
    return "At alpha = 0 it is K by definition." if run.alpha == 0 else ""


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
    shown = order_examples(posterior)[np.linspace(0, N - 1, min(N, MAX_SHOWN)).round().astype(int)]
    height, top, right = min(260, max(80, 21 * K)), 18, 46
    total = height + top + BOTTOM
    figure, ax = _axes(total, top, right)
    style = {"vmin": 0, "vmax": 1, "cmap": HEAT, "aspect": "auto", "interpolation": "nearest"}
    image = ax.imshow(weights[:, shown], extent=(0, N, K - 0.5, -0.5), **style)
    ax.spines[:].set_visible(False)
    ax.set(xlabel="examples, grouped by leading particle", ylabel="particle")
    ax.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    ax.set_yticks(range(0, K, 1 if K <= 16 else 4 if K <= 32 else 8))
    ax.tick_params(axis="y", length=0, pad=13)
    # the colour that the particle has in the plots over steps
    strip = {"s": min(8.0, 0.8 * height / K) ** 2, "transform": ax.get_yaxis_transform(), "clip_on": False}
    ax.scatter([-0.017] * K, range(K), c=particle_colours(K), marker="s", linewidth=0, **strip)
    led = np.bincount(posterior.argmax(axis=0), minlength=K)
    for count, end in zip(led, np.cumsum(led), strict=True):
        if alpha > 0 and K <= 12 and count >= 0.08 * N:
            ax.text(end - count / 2, -0.62, f"{count:,}", ha="center", va="bottom", color=MUTED, fontsize=8.5)
    bar_ax = figure.add_axes(((WIDTH - right + 10) / WIDTH, BOTTOM / total, 9 / WIDTH, height / total))
    figure.colorbar(image, cax=bar_ax, ticks=[0, 0.5, 1], format="{x:g}").outline.set_visible(False)
    ess, sharp = (1 / (weights**2).sum(axis=0)).mean(), (weights.max(axis=0) > CONFIDENT).mean()
    note = f"{N:,} {found['split']} examples after step {found['step']:,}, weighed at alpha = {alpha:g}. "
    if alpha == 0:
        note += "Here every particle has 1/K of every example by definition."
    else:
        note += (
            f"Effective sample size {ess:.2f} of {K} on average; on {sharp:.0%} of the examples one particle has over "
        )
        note += f"{CONFIDENT:g} of the weight. Each particle leads {led.min():,} to {led.max():,} examples."
    if N > MAX_SHOWN:
        note += f" The picture shows {MAX_SHOWN} of them, evenly spaced in this order."
    return _svg(figure, name, f"{run.name}: weight of each particle on each example, alpha {alpha:g}"), note


def _axes(height: float, top: float = 8, right: float = 8) -> tuple[Figure, Any]:
    figure = Figure(figsize=(WIDTH / 72, height / 72))
    inside = ((WIDTH - LEFT - right) / WIDTH, (height - BOTTOM - top) / height)
    ax = figure.add_axes((LEFT / WIDTH, BOTTOM / height, *inside))
    ax.margins(x=0.025)
    return figure, ax


def _svg(figure: Figure, name: str, description: str) -> str:
    """An inline SVG that fits its column, takes the page's colours and fonts, and shares no id with another."""
    file = io.StringIO()
    figure.savefig(file, format="svg", dpi=216, metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    _, head, body = re.split(r"(<svg[^>]*>)", file.getvalue(), maxsplit=1)
    head = re.sub(r' (xmlns(:\w+)?|width|height|version)="[^"]*"', "", head)
    body = re.sub(r"<style.*?</style>", "", body, count=1, flags=re.DOTALL)
    body = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{name}-", body)
    for colour, variable in THEME.items():
        body = body.replace(colour, f"var({variable})")
    return f'{head[:-1]} role="img" aria-label="{html.escape(description)}">{body}'
