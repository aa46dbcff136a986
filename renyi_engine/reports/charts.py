"""Pictures of evaluations, each with a caption that says how to read it.

Every function takes the picture's name first (of letters, digits and hyphens, its own on the page) and a caption of
what is shown, to which it adds how to read that; it returns a `page.Picture`. Its lines and points carry ids
"<name>-<what>-<number>".

Layout: K particles, N examples, G groups of examples, R rows of bars.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.ticker import MaxNLocator
from numpy.typing import ArrayLike

from renyi_engine.reports import pictures
from renyi_engine.reports.page import Key, Picture, Table
from renyi_engine.reports.pictures import ACCENT, BOTTOM, COLOURS, INK, LEFT, MUTED, SMALL, WIDTH, Array

MAX_MARKERS = 2000  # drawn one by one; more are drawn as an image
MAX_LABEL = 40  # characters
MAX_HOVER = 80  # characters of an example's text that hovering over its column shows
LINES = {"wide": "-", "dash": (0, (4, 2)), "dots": (0, (1, 1.2))}
MARKERS = {"circle": "o", "triangle": "^", "square": "s", "diamond": "D"}
NAMED = (MUTED, INK, ACCENT, *COLOURS[1:])  # bars that are no particle's
# cells keep their colours in a dark theme, and so does what is drawn on them
DIVIDER, ON_LIGHT, ON_DARK = "#d55e00", "#1b1f32", "#f0f4f5"
FRAME = {"color": MUTED, "linewidth": 0.8, "linestyle": (0, (4, 3)), "zorder": 1.5}  # thresholds, diagonals


def name_columns(
    responsibilities: Array, names: Sequence[str], texts: Sequence[str], title: str
) -> tuple[list[str], Table]:
    """What hovering over each column of a heat map shows, and the list of its examples.

    Args:
        responsibilities: [K, N] in the order of the heat map. names, texts: of each of the N examples, in that order.
    """
    hover, rows = [], []
    for i in pictures.shown_examples(len(names)):
        of_example = responsibilities[:, i]
        leader, part = of_example.argmax(), f"{of_example.max():.2f}"
        alike = len(of_example) > 1 and of_example.min() == of_example.max()
        told = "all particles alike" if alike else f"particle {leader} leads"
        hover.append(f"{names[i]}: {told}, {part}. {_short(texts[i], MAX_HOVER)}".rstrip())
        rows.append([str(i + 1), names[i], texts[i], "–" if alike else str(leader), part])
    return hover, Table(title, ["place", "name", "example", "leading particle", "its responsibility"], rows)


@pictures.style()
def heat_map(
    name: str,
    responsibilities: ArrayLike,
    *,
    caption: str,
    names: Sequence[str],
    texts: Sequence[str],
    xlabel: str = "examples, grouped by leading particle",
    groups: Sequence[tuple[str, int]] | None = None,
) -> Picture:
    """The responsibilities [K, N] of the particles: particles down, examples across.

    Args:
        responsibilities: over the particles, those of an example add up to 1.
        names, texts: [N] of each example what it is called and what it says. The picture shows them when the pointer
            rests on a column, and lists them below.
        groups: (label, number of examples) of consecutive examples, set side by side; None: all are one group. In a
            group, examples are sorted by the particle that leads them, each particle's from sharp to shared.

    Raises:
        ValueError: responsibilities are not [K, N] with an example, there is not one name and one text for each
            example, or groups do not add up to N.
    """
    responsibilities = _matrix("responsibilities", responsibilities)
    K, N = responsibilities.shape
    if not len(names) == len(texts) == N:
        raise ValueError(f"names: expected a name and a text for each of {N} examples; got {len(names)}, {len(texts)}")
    counts = np.array([N] if groups is None else [count for _, count in groups])
    if counts.sum() != N:
        raise ValueError(f"groups: expected counts that add up to {N} examples; got {counts.sum()}")
    ends = np.cumsum(counts)
    order = np.concatenate(
        [pictures.order_examples(responsibilities[:, a:b]) + a for a, b in zip(ends - counts, ends, strict=True)]
    )
    caption += f" Each column is one of {N:,} examples, each row is a particle. The darker a cell, the larger is the "
    caption += "particle's responsibility for the example; every column adds up to 1. One dark cell in a column: that "
    caption += "particle has the example to itself. An even tint: the particles share it alike."
    if groups is None:
        figure, ax = pictures.responsibility_map(responsibilities[:, order], xlabel=xlabel)
        pictures.mark_leads(ax, np.bincount(responsibilities.argmax(axis=0), minlength=K).tolist())
        if K <= 12:
            caption += " The numbers on top count the examples that each particle leads."
    else:
        labels, room = [_short(label) for label, _ in groups], (WIDTH - LEFT - 46) * counts / N
        bottom = BOTTOM + _slant(labels, room)
        figure, ax = pictures.responsibility_map(responsibilities[:, order], xlabel=xlabel, bottom=bottom)
        _name_ticks(ax, ends - counts / 2, labels, room)
        ax.vlines(ends[:-1], -0.5, K - 0.5, color=DIVIDER, linewidth=1.2)
        caption += " Lines divide the groups; in each, examples are sorted by the particle that leads them."
    caption += pictures.sampling_note(N)
    title = "The examples of this picture, from left to right"
    columns, listed = name_columns(
        responsibilities[:, order], [names[i] for i in order], [texts[i] for i in order], title
    )
    drawn = pictures.svg(figure, name, f"responsibility of each particle for each example, {xlabel}", columns)
    return Picture(drawn, caption, examples=listed)


@pictures.style()
def group_heat_map(name: str, responsibilities: ArrayLike, labels: Sequence[str], *, caption: str) -> Picture:
    """The mean responsibility [K, G] of each particle on each group of examples: groups down, particles across.

    Raises:
        ValueError: responsibilities are not [K, G], or there is not one label for each group.
    """
    responsibilities = _matrix("responsibilities", responsibilities)
    K, G = responsibilities.shape
    if len(labels) != G:
        raise ValueError(f"labels: expected one for each of {G} groups; got {len(labels)}")
    labels = [_short(label) for label in labels]
    left, top, right, height = 14 + 4.9 * max(map(len, labels)), 46, 50, max(80, 14 * G)
    figure, ax = pictures.axes(height + top + 6, top=top, bottom=6, left=left, right=right)
    darkest = min(1.0, max(responsibilities.max(), 2 / K))  # even responsibilities are half dark at most
    image = ax.imshow(responsibilities.T, vmin=0, vmax=darkest, **pictures.IMAGE)
    ax.spines[:].set_visible(False)
    ax.xaxis.tick_top()
    ax.xaxis.set_label_position("top")
    ax.set_xlabel("particle")
    ax.set_xticks(pictures.particle_ticks(K))
    ax.tick_params(length=0, labelsize=SMALL)
    ax.tick_params(axis="x", pad=12)
    ax.set_yticks(range(G), labels)
    column = (WIDTH - left - right) / K
    strip = {"s": min(8.0, 0.8 * column) ** 2, "transform": ax.get_xaxis_transform(), "clip_on": False}
    ax.scatter(range(K), [1 + 7 / height] * K, c=pictures.particle_colours(K), marker="s", linewidth=0, **strip)
    if column >= 15:
        for (particle, group), mean in np.ndenumerate(responsibilities):
            colour = ON_LIGHT if mean < 0.45 * darkest else ON_DARK
            style = {"ha": "center", "va": "center_baseline", "color": colour, "fontsize": 7.5}
            ax.text(particle, group, f"{100 * mean:.0f}", gid=f"cell-{particle}-{group}", **style)
        caption += " The numbers are percentages."
    scale = pictures.colour_bar(figure, image, min(height, 160))
    scale.ax.yaxis.set_major_locator(MaxNLocator(4))
    scale.ax.yaxis.set_major_formatter(_as_percentage)
    caption += " Each row is a group of examples and adds up to 100% over particles; the darker, the larger the "
    caption += f"particle's mean responsibility. Even responsibilities are {1 / K:.1%}."
    return Picture(
        pictures.svg(figure, name, "mean responsibility of each particle for each group of examples"), caption
    )


@pictures.style()
def risk_coverage(name: str, curves: Mapping[str, tuple[ArrayLike, ArrayLike]], *, caption: str) -> Picture:
    """How often the answers are wrong when only the surest ones are given.

    Args:
        curves: (coverage, risk) by the name of a measure of uncertainty, fractions in [0, 1].
    """
    figure, ax = pictures.axes(height=250)
    for number, (coverage, risk) in enumerate(curves.values()):
        ax.plot(coverage, risk, gid=f"curve-{number}", **_line(number))
    ax.set(xlim=(0, 1), xlabel="answered, the surest first (% of examples)", ylabel="wrong among the answered (%)")
    ax.set_ylim(0, max(1.05 * max(np.max(np.asarray(risk)) for _, risk in curves.values()), 0.01))
    _percent(ax.xaxis, ax.yaxis)
    caption += " From right to left ever more of the unsure examples are left unanswered. Good: a curve that falls "
    caption += "towards the left. Bad: a flat one, whose measure of uncertainty cannot tell which answers are wrong."
    return Picture(
        pictures.svg(figure, name, "fraction of wrong answers over fraction answered"), caption, _line_keys(curves)
    )


@pictures.style()
def reliability(name: str, curves: Mapping[str, tuple[ArrayLike, ArrayLike, ArrayLike]], *, caption: str) -> Picture:
    """How often answers given with some confidence are right.

    Args:
        curves: (mean confidence, accuracy, fraction of the examples) of bins of confidence, by the name of who
            answers; fractions in [0, 1]. Bins without an example are left out.
    """
    figure, ax = pictures.axes(height=300)
    ax.plot([0, 1], [0, 1], **FRAME)
    for number, bins in enumerate(curves.values()):
        confidence, accuracy, size = (np.asarray(values, dtype=np.float64) for values in bins)
        held = size > 0
        ax.plot(confidence[held], accuracy[held], gid=f"curve-{number}", **_line(number))
        dots = {"color": COLOURS[number % len(COLOURS)], "alpha": 0.55, "linewidth": 0, "clip_on": False, "zorder": 3}
        ax.scatter(confidence[held], accuracy[held], s=600 * size[held], **dots)
    ax.set(xlim=(0, 1), ylim=(0, 1), xlabel="confidence in the answer (%)", ylabel="right among these answers (%)")
    _percent(ax.xaxis, ax.yaxis)
    caption += " On the dashed diagonal confidence equals accuracy. Below it answers are too sure of "
    caption += "themselves, above it not sure enough. The area of a dot tells how many examples it stands for."
    return Picture(pictures.svg(figure, name, "accuracy over confidence"), caption, _line_keys(curves))


@pictures.style()
def lines(
    name: str,
    curves: Mapping[str, tuple[ArrayLike, ArrayLike]],
    *,
    xlabel: str,
    ylabel: str,
    caption: str,
    vertical: Mapping[str, float] | None = None,
    horizontal: Mapping[str, float] | None = None,
) -> Picture:
    """One marked line for each of a few curves; values of very different size are set on a symmetric log scale.

    Args:
        curves: (x, y), each [N], by name; what is not finite is left out.
        vertical, horizontal: lines at x and at y by their label.
    """
    figure, ax = pictures.axes(height=250, top=18)
    for number, (x, y) in enumerate(curves.values()):
        ax.plot(x, np.where(np.isfinite(y), y, np.nan), gid=f"curve-{number}", marker=".", **_line(number))
    values = np.concatenate([np.asarray(y, dtype=np.float64) for _, y in curves.values()])
    sizes = np.abs(values[np.isfinite(values) & (values != 0)])
    if sizes.size and sizes.max() > 50 * np.median(sizes):
        ax.set_yscale("symlog", linthresh=10.0 ** np.floor(np.log10(np.median(sizes))))
        ax.yaxis.set_major_formatter("{x:g}")
        caption += " The scale is logarithmic, but near zero."
    ax.margins(0.04)
    ax.set(xlabel=xlabel, ylabel=ylabel)
    ax.grid(True, axis="y")
    ax.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    _thresholds(ax, vertical or {}, horizontal or {})
    return Picture(pictures.svg(figure, name, f"{ylabel} over {xlabel}"), caption, _line_keys(curves))


@pictures.style()
def scatter(
    name: str,
    x: ArrayLike,
    y: ArrayLike,
    kinds: Sequence[str],
    *,
    xlabel: str,
    ylabel: str,
    caption: str,
    vertical: Mapping[str, float] | None = None,
    horizontal: Mapping[str, float] | None = None,
) -> Picture:
    """One point for each example, told apart by kind.

    Args:
        x, y: [N].
        kinds: the kind of each point; the legend counts them, in the order in which they come up.
        vertical, horizontal: thresholds, lines at x and at y by their label.

    Raises:
        ValueError: x, y and kinds differ in length.
    """
    x, y, kind_of = np.asarray(x, dtype=np.float64), np.asarray(y, dtype=np.float64), np.asarray(kinds, dtype=str)
    if not x.shape == y.shape == kind_of.shape:
        raise ValueError(f"kinds: expected x, y and kinds of one length; got {x.shape}, {y.shape} and {kind_of.shape}")
    figure, ax = pictures.axes(height=300, top=18)
    keys = []
    for number, kind in enumerate(dict.fromkeys(kinds)):
        colour, shape = COLOURS[number % len(COLOURS)], list(MARKERS)[number % len(MARKERS)]
        chosen = kind_of == kind
        look = {"color": colour, "marker": MARKERS[shape], "markersize": 4, "markeredgewidth": 0, "alpha": 0.65}
        image = {"rasterized": x.size > MAX_MARKERS, "clip_on": False}
        ax.plot(x[chosen], y[chosen], gid=f"kind-{number}", linestyle="", **look, **image)
        keys.append(Key(shape, colour, f"{kind} ({chosen.sum():,})"))
    ax.margins(0.04)
    ax.set(xlabel=xlabel, ylabel=ylabel)
    ax.grid(True)
    _thresholds(ax, vertical or {}, horizontal or {})
    caption += " Each mark is one example." + (" Dashed lines are thresholds." if vertical or horizontal else "")
    return Picture(pictures.svg(figure, name, f"{ylabel} over {xlabel}, one point an example"), caption, keys)


@pictures.style()
def bars(
    name: str,
    labels: Sequence[str],
    values: ArrayLike,
    errors: ArrayLike,
    *,
    rows: Sequence[str],
    ylabel: str,
    caption: str,
) -> Picture:
    """A group of bars for each label: the rows that are named, then one for each particle.

    Args:
        labels: of the G groups, such as the splits of a data set.
        values: [R, G], a row for each name in `rows`, and beyond these a row for each particle.
        errors: half the length of the error bars [R, G], or their parts below and above [2, R, G].
        rows: such as ("base model", "ensemble").

    Raises:
        ValueError: values are not [R, G] with a row for each name, or errors have another shape.
    """
    values = _matrix("values", values)
    R, G = values.shape
    if len(labels) != G or len(rows) > R:
        raise ValueError(f"values: expected {len(labels)} columns and at least {len(rows)} rows; got {[R, G]}")
    if np.shape(errors) not in ((R, G), (2, R, G)):
        raise ValueError(f"errors: expected shape {[R, G]} or {[2, R, G]}; got {list(np.shape(errors))}")
    below, above = np.broadcast_to(np.asarray(errors, dtype=np.float64), (2, R, G))
    K, labels = R - len(rows), [_short(label) for label in labels]
    room = np.full(G, (WIDTH - LEFT - 8) / G)
    slant = _slant(labels, room)
    figure, ax = pictures.axes(height=220 + slant, bottom=22 + slant)
    width = min(0.84 / R, 0.25)
    colours = [*NAMED[: len(rows)], *pictures.particle_colours(K)]
    whiskers = {"fmt": "none", "elinewidth": 0.9, "capsize": min(2.5, 100 * width / G), "capthick": 0.9, "zorder": 4}
    for number, colour in enumerate(colours):
        at = np.arange(G) + (number - (R - 1) / 2) * width
        for group, patch in enumerate(ax.bar(at, values[number], 0.9 * width, color=colour, zorder=3)):
            patch.set_gid(f"bar-{number}-{group}")
        over = MUTED if colour == INK else INK
        drawn = ax.errorbar(at, values[number], (below[number], above[number]), ecolor=over, **whiskers)
        drawn.lines[2][0].set_gid(f"error-{number}")
    ax.set(ylabel=ylabel, xlim=(-0.5, G - 0.5))
    ax.spines["bottom"].set_visible(False)
    ax.axhline(0, color=MUTED, linewidth=0.7, zorder=5)
    ax.set_ylim(min(0.0, (values - below).min()), None)
    ax.grid(True, axis="y")
    ax.tick_params(axis="x", length=0)
    _name_ticks(ax, np.arange(G, dtype=np.float64), labels, room)
    keys = [Key("square", pictures.themed(colour), row) for colour, row in zip(colours, rows, strict=False)]
    return Picture(pictures.svg(figure, name, f"{ylabel} by group"), caption, keys, K)


def _thresholds(ax: Any, vertical: Mapping[str, float], horizontal: Mapping[str, float]) -> None:
    """Dashed lines at x and at y, with their labels."""
    text = {"textcoords": "offset points", "color": MUTED, "fontsize": SMALL}
    for label, at in vertical.items():
        ax.axvline(at, **FRAME)
        ax.annotate(label, (at, 1), (0, 3), xycoords=("data", "axes fraction"), ha="center", va="bottom", **text)
    for label, at in horizontal.items():
        ax.axhline(at, **FRAME)
        ax.annotate(label, (1, at), (0, 3), xycoords=("axes fraction", "data"), ha="right", va="bottom", **text)


def _matrix(argument: str, values: ArrayLike) -> Array:
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != 2 or 0 in array.shape:
        raise ValueError(
            f"{argument}: expected a matrix with at least one row and column; got shape {list(array.shape)}"
        )
    return array


def _short(text: str, most: int = MAX_LABEL) -> str:
    return text if len(text) <= most else f"{text[: most - 1].rstrip()}…"


def _line(number: int) -> dict[str, Any]:
    colour, line = COLOURS[number % len(COLOURS)], list(LINES.values())[number % len(LINES)]
    return {"color": colour, "linestyle": line, "linewidth": 2}


def _line_keys(names: Mapping[str, Any]) -> list[Key]:
    return [Key(list(LINES)[i % len(LINES)], COLOURS[i % len(COLOURS)], name) for i, name in enumerate(names)]


def _percent(*axes: Any) -> None:
    for axis in axes:
        axis.grid(True)
        axis.set_major_formatter(_as_percentage)


def _as_percentage(fraction: float, _position: int) -> str:
    return f"{100 * fraction:.3g}%"


def _slant(labels: Sequence[str], room: Array) -> float:
    """Points that labels below the axis need more when they are set at a slant; 0 if each fits into its room."""
    if all(5.2 * len(label) <= width for label, width in zip(labels, room, strict=True)):
        return 0.0
    return 2.4 * max(map(len, labels))


def _name_ticks(ax: Any, positions: Array, labels: Sequence[str], room: Array) -> None:
    """Labels below the axis, at a slant if need be; where they would run into each other some are left out."""
    named = [i for i, width in enumerate(room) if width >= 9]
    slanted = {"rotation": 30, "ha": "right", "rotation_mode": "anchor"} if _slant(labels, room) else {}
    ax.set_xticks(positions[named], [labels[i] for i in named], fontsize=SMALL, **slanted)
