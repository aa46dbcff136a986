"""How figures look: colours, axes, heat maps of responsibilities, and inline SVG in the page's colours and fonts.

Figures are drawn inside `style()`. The same data always give the same bytes.

Layout: K particles, N examples.
"""

from __future__ import annotations

import html
import io
import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import matplotlib
import matplotlib.style
import numpy as np
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

Array = NDArray[np.float64]

MAX_SHOWN = 600  # examples in a heat map
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
    "text.parse_math": False,  # a dollar sign in data is one
    "font.size": 9.5,
    **dict.fromkeys(("axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"), MUTED),
    **dict.fromkeys(("axes.spines.right", "axes.spines.top"), False),
    **dict.fromkeys(("axes.linewidth", "grid.linewidth"), 0.7),
    **dict.fromkeys(("axes.facecolor", "figure.facecolor"), "none"),
    "grid.color": GRID,
}
IMAGE = {"cmap": HEAT, "aspect": "auto", "interpolation": "nearest"}
WIDTH, LEFT, BOTTOM = 430, 50, 36  # points; equal margins align the axes down the page
SMALL = 8.5  # points, text inside a plot


@contextmanager
def style() -> Iterator[None]:
    """The look of every figure, whatever the reader's own matplotlib settings; also a decorator."""
    with matplotlib.style.context(["default", STYLE]):
        yield


def particle_colours(num_particles: int) -> list[str]:
    """A hex colour for each particle: told apart by hue up to 8, a ramp over the index beyond."""
    if num_particles <= len(COLOURS):
        return list(COLOURS[:num_particles])
    ramp = matplotlib.colormaps["plasma"](np.linspace(0.1, 0.8, num_particles), bytes=True)
    return [f"#{red:02x}{green:02x}{blue:02x}" for red, green, blue, _ in ramp]


def themed(text: str) -> str:
    """`text` with the colours of figures turned into the page's variables."""
    for colour, variable in THEME.items():
        text = text.replace(colour, f"var({variable})")
    return text


def order_examples(responsibilities: Array) -> NDArray[np.intp]:
    """Indices of the N examples of responsibilities [K, N], grouped by the particle that leads them.

    A particle leads an example if it has the largest responsibility. Each group begins with the examples that its
    particle has nearly to itself, and ends with those that it shares.
    """
    return np.lexsort((-responsibilities.max(axis=0), responsibilities.argmax(axis=0)))


def shown_examples(num_examples: int) -> NDArray[np.intp]:
    """Places of the examples that a heat map of `num_examples` has room for: MAX_SHOWN at most, evenly spaced."""
    return np.linspace(0, num_examples - 1, min(num_examples, MAX_SHOWN)).round().astype(int)


def axes(
    height: float, *, top: float = 8, right: float = 8, bottom: float = BOTTOM, left: float = LEFT
) -> tuple[Figure, Any]:
    """A figure as wide as its column with one plot in it; `height` of it all and margins in points."""
    figure = Figure(figsize=(WIDTH / 72, height / 72))
    inside = ((WIDTH - left - right) / WIDTH, (height - bottom - top) / height)
    ax = figure.add_axes((left / WIDTH, bottom / height, *inside))
    ax.margins(x=0.025)
    return figure, ax


def responsibility_map(responsibilities: Array, *, xlabel: str, bottom: float = BOTTOM) -> tuple[Figure, Any]:
    """The heat map of responsibilities [K, N] in the order given: particles down, the `shown_examples` across."""
    K, N = responsibilities.shape
    height, top = min(260, max(80, 21 * K)), 18
    figure, ax = axes(height + top + bottom, top=top, right=46, bottom=bottom)
    image = ax.imshow(responsibilities[:, shown_examples(N)], extent=(0, N, K - 0.5, -0.5), vmin=0, vmax=1, **IMAGE)
    ax.spines[:].set_visible(False)
    ax.set(xlabel=xlabel, ylabel="particle")
    ax.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    ax.set_yticks(particle_ticks(K))
    ax.tick_params(axis="y", length=0, pad=13)
    # the colour that the particle has in the other plots
    strip = {"s": min(8.0, 0.8 * height / K) ** 2, "transform": ax.get_yaxis_transform(), "clip_on": False}
    ax.scatter([-0.017] * K, range(K), c=particle_colours(K), marker="s", linewidth=0, **strip)
    colour_bar(figure, image, height).set_ticks([0, 0.5, 1], labels=["0", "0.5", "1"])
    return figure, ax


def mark_leads(ax: Any, led: Sequence[int]) -> None:
    """Above a heat map ordered by leader: how many examples each particle leads, where there is room to say so."""
    for count, end in zip(led, np.cumsum(led), strict=True):
        if len(led) <= 12 and count >= 0.08 * sum(led):
            ax.text(end - count / 2, -0.62, f"{count:,}", ha="center", va="bottom", color=MUTED, fontsize=SMALL)


def sampling_note(num_examples: int) -> str:
    """What a caption says of a heat map that shows some of the examples only."""
    if num_examples <= MAX_SHOWN:
        return ""
    return f" The picture shows {MAX_SHOWN} of them, evenly spaced in this order."


def colour_bar(figure: Figure, image: Any, height: float) -> Any:
    """The scale of `image`, of `height` points, at the right of its plot."""
    plot, whole = image.axes.get_position(), figure.get_figheight() * 72
    bar = figure.add_axes((plot.x1 + 10 / WIDTH, plot.y1 - height / whole, 9 / WIDTH, height / whole))
    scale = figure.colorbar(image, cax=bar)
    scale.outline.set_visible(False)
    return scale


def particle_ticks(num_particles: int) -> range:
    """The particles that an axis names: all up to 16, every fourth or eighth beyond."""
    return range(0, num_particles, 1 if num_particles <= 16 else 4 if num_particles <= 32 else 8)


def svg(figure: Figure, name: str, description: str, columns: Sequence[str] = ()) -> str:
    """An inline SVG that fits its column, takes the page's colours and fonts, and shares no id with another.

    Args:
        name: the start of its ids: letters, digits and hyphens, its own on the page.
        columns: what a browser shows when the pointer rests on a column of the figure's first plot, from left to right.

    Raises:
        ValueError: name holds anything else.
    """
    if not re.fullmatch(r"[A-Za-z][\w-]*", name):
        raise ValueError(f"name: expected letters, digits and hyphens, for the ids of a picture; got {name!r}")
    file = io.StringIO()
    with warnings.catch_warnings():
        # matplotlib's font only measures the text; the browser writes it in a font that has the characters
        warnings.filterwarnings("ignore", "Glyph .* missing from font")
        figure.savefig(file, format="svg", dpi=216, metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    _, head, body = re.split(r"(<svg[^>]*>)", file.getvalue(), maxsplit=1)
    head = re.sub(r' (xmlns(:\w+)?|width|height|version)="[^"]*"', "", head)
    body = re.sub(r"<style.*?</style>", "", body, count=1, flags=re.DOTALL)
    body = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{name}-", body)
    body = themed(body).replace("</svg>", f"{_hover(figure, columns)}</svg>")
    return f'{head[:-1]} role="img" aria-label="{html.escape(description)}">{body}'


def _hover(figure: Figure, columns: Sequence[str]) -> str:
    """Invisible rectangles that name the columns of the figure's first plot, which are of equal width."""
    if not columns:
        return ""
    plot, whole = figure.axes[0].get_position(), 72 * figure.get_figheight()
    width, top, height = WIDTH * plot.width / len(columns), whole * (1 - plot.y1), whole * plot.height
    rectangles = [
        f'<rect x="{WIDTH * plot.x0 + i * width:.2f}" y="{top:.2f}" width="{width:.3f}" height="{height:.2f}">'
        f"<title>{html.escape(column)}</title></rect>\n"
        for i, column in enumerate(columns)
    ]
    return f'<g fill="none" pointer-events="all">\n{"".join(rectangles)}</g>\n'
