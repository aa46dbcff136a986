"""What a picture shows, read off its axes, is what it was given."""

from __future__ import annotations

import base64
import io
import re

import numpy as np
import pytest
from PIL import Image

from renyi_engine.reports.charts import bars, group_heat_map, heat_map, lines, reliability, risk_coverage, scatter
from renyi_engine.reports.pictures import HEAT, particle_colours

from ..html_page import group, read_values

RNG = np.random.default_rng(0)


def cells_of(svg: str, name: str, rows: int, columns: int) -> np.ndarray:
    """Colours [rows, columns, 3] at the middle of each cell of a heat map."""
    encoded = re.findall(rf'base64,([^"]+)" id="{name}-[^"]*" transform="scale\(1 -1\)', svg)
    pixels = np.asarray(Image.open(io.BytesIO(base64.b64decode(encoded[0]))).convert("RGB"), dtype=float)[::-1]
    height, width, _ = pixels.shape
    return pixels[(2 * np.arange(rows) + 1) * height // (2 * rows)][
        :, (2 * np.arange(columns) + 1) * width // (2 * columns)
    ]


def colours_of(responsibilities: np.ndarray) -> np.ndarray:
    return 255 * HEAT(responsibilities)[..., :3]


def drawn(responsibilities: np.ndarray, **content):
    """A heat map whose examples are called "row 0", "row 1", ..."""
    rows = range(responsibilities.shape[1])
    names, texts = [f"row {i}" for i in rows], [f"text of {i}" for i in rows]
    return heat_map("heat", responsibilities, names=names, texts=texts, **{"caption": "", **content})


def line_of(svg: str, identifier: str) -> tuple[np.ndarray, np.ndarray]:
    """The corners of a line, as the axes have them."""
    x, y = corners_of(svg, identifier).T
    return read_values(svg, "x", x), read_values(svg, "y", y)


def corners_of(svg: str, identifier: str) -> np.ndarray:
    """Every (x, y) of what is drawn by lines, in points."""
    return np.array(re.findall(r"[ML] (\S+) (\S+)", group(svg, identifier)), dtype=float)


def points_of(svg: str, identifier: str) -> tuple[np.ndarray, np.ndarray]:
    x, y = np.array(re.findall(r'<use [^>]*\bx="([^"]+)" y="([^"]+)"', group(svg, identifier)), dtype=float).T
    return read_values(svg, "x", x), read_values(svg, "y", y)


def test_a_heat_map_shows_the_responsibilities_sorted_by_leader() -> None:
    responsibilities = np.array([[0.1, 0.7, 0.2, 0.9], [0.6, 0.2, 0.5, 0.1], [0.3, 0.1, 0.3, 0.0]])
    picture = drawn(responsibilities, xlabel="questions", caption="Responsibilities.")
    shown = cells_of(picture.svg, "heat", 3, 4)
    np.testing.assert_allclose(shown, colours_of(responsibilities[:, [3, 1, 0, 2]]), atol=3)
    assert ">questions</text>" in picture.svg
    assert picture.caption.startswith("Responsibilities. ")
    assert "one of 4 examples" in picture.caption


def test_groups_stand_side_by_side_each_sorted_by_leader() -> None:
    responsibilities = np.array([[0.4, 0.9, 0.7, 0.2, 0.8], [0.6, 0.1, 0.3, 0.8, 0.2]])
    picture = drawn(responsibilities, groups=[("biology", 3), ("law", 2)])
    np.testing.assert_allclose(
        cells_of(picture.svg, "heat", 2, 5), colours_of(responsibilities[:, [1, 2, 0, 4, 3]]), atol=3
    )
    labels = re.findall(r'<text[^>]* x="([\d.]+)"[^>]*>(biology|law)</text>', picture.svg)
    edges = re.findall(r'<image [^>]*width="([\d.]+)"', picture.svg)
    assert [label for _, label in labels] == ["biology", "law"]
    # in the middle of 3/5 and of 2/5 of the width
    (left, right), width = (float(x) for x, _ in labels), float(edges[0])
    assert (right - left) / width == pytest.approx(0.5, abs=0.01)


def test_a_heat_map_of_many_examples_shows_some_and_says_so() -> None:
    picture = drawn(RNG.dirichlet(np.ones(4), 2000).T)
    assert "one of 2,000 examples" in picture.caption
    assert "shows 600 of them" in picture.caption


def test_each_column_of_a_heat_map_is_named_where_the_pointer_rests_and_in_a_list() -> None:
    responsibilities = np.array([[0.1, 0.7, 0.2, 0.9], [0.6, 0.2, 0.5, 0.1], [0.3, 0.1, 0.3, 0.0]])
    picture = drawn(responsibilities)
    order, leaders, largest = [3, 1, 0, 2], [0, 0, 1, 1], ["0.90", "0.70", "0.60", "0.50"]
    columns = re.findall(r'<rect x="([\d.]+)"[^>]* width="([\d.]+)"[^>]*><title>(.*?)</title>', picture.svg)
    told = list(zip(order, map(str, leaders), largest, strict=True))
    expected = [f"row {i}: particle {k} leads, {part}. text of {i}" for i, k, part in told]
    assert [title for *_, title in columns] == expected
    # they cover the image, one after the other
    left, width = (float(re.findall(rf'<image [^>]* {name}="([\d.]+)"', picture.svg)[0]) for name in ("x", "width"))
    np.testing.assert_allclose([float(x) for x, *_ in columns], left + width / 4 * np.arange(4), atol=0.5)
    np.testing.assert_allclose([float(w) for _, w, _ in columns], width / 4, rtol=0.01)
    assert picture.examples is not None
    listed = [[str(at), f"row {i}", f"text of {i}", k, part] for at, (i, k, part) in enumerate(told, start=1)]
    assert picture.examples.rows == listed


def test_an_example_that_all_particles_take_alike_has_no_leader() -> None:
    picture = drawn(np.full((4, 2), 0.25))
    assert "<title>row 1: all particles alike, 0.25. text of 1</title>" in picture.svg
    assert picture.examples is not None
    assert picture.examples.rows[1] == ["2", "row 1", "text of 1", "–", "0.25"]


def test_a_particle_without_an_example_and_an_empty_group_do_no_harm() -> None:
    responsibilities = np.tile([[1.0], [0.0], [0.0]], 5)
    assert ">5</text>" in drawn(responsibilities).svg
    assert ">empty</text>" not in drawn(responsibilities, groups=[("empty", 0), ("rest", 5)]).svg


@pytest.mark.parametrize("K", [2, 8])
def test_a_group_heat_map_shows_and_prints_the_responsibilities_of_57_subjects(K: int) -> None:
    responsibilities, subjects = RNG.dirichlet(np.full(K, 2.0), 57).T, [f"subject number {i}" for i in range(57)]
    picture = group_heat_map("subjects", responsibilities, subjects, caption="")
    darkest = min(1.0, max(responsibilities.max(), 2 / K))
    np.testing.assert_allclose(
        cells_of(picture.svg, "subjects", 57, K), colours_of(responsibilities.T / darkest), atol=4
    )
    for subject in subjects:
        assert f">{subject}</text>" in picture.svg
    for (k, subject), mean in np.ndenumerate(responsibilities):
        assert f">{100 * mean:.0f}</text>" in group(picture.svg, f"subjects-cell-{k}-{subject}")
    assert f"Even responsibilities are {1 / K:.1%}." in picture.caption


def test_even_shares_do_not_look_like_specialists() -> None:
    picture = group_heat_map("even", np.full((8, 3), 1 / 8), ["a", "b", "c"], caption="")
    np.testing.assert_allclose(cells_of(picture.svg, "even", 3, 8), colours_of(np.full((3, 8), 0.5)), atol=4)


def test_risk_coverage_draws_the_points_given() -> None:
    curves = {
        "total": (np.array([0.2, 0.5, 0.8, 1.0]), np.array([0.0, 0.1, 0.05, 0.3])),
        "epistemic": (np.array([0.25, 0.5, 1.0]), np.array([0.2, 0.15, 0.3])),
    }
    picture = risk_coverage("risk", curves, caption="")
    for number, (coverage, risk) in enumerate(curves.values()):
        x, y = line_of(picture.svg, f"risk-curve-{number}")
        np.testing.assert_allclose(x, coverage, atol=1e-5)
        np.testing.assert_allclose(y, risk, atol=1e-5)
    assert [key.label for key in picture.keys] == ["total", "epistemic"]


def test_small_risks_have_ticks_that_differ() -> None:
    svg = risk_coverage("risk", {"sure": ([0.5, 1.0], [0.001, 0.012])}, caption="").svg
    ticks = re.findall(r">([\d.]+%)</text>", svg)
    assert len(ticks) > 8
    assert ticks.count("0%") == 2  # of x and y
    assert {"0.2%", "1%", "100%"} <= set(ticks)


def test_reliability_draws_the_bins_that_hold_examples() -> None:
    confidence, accuracy = np.array([0.3, 0.5, 0.7, 0.95]), np.array([0.2, 0.0, 0.75, 0.9])
    picture = reliability("bins", {"base": (confidence, accuracy, np.array([0.2, 0.0, 0.5, 0.3]))}, caption="")
    x, y = line_of(picture.svg, "bins-curve-0")
    np.testing.assert_allclose(x, [0.3, 0.7, 0.95], atol=1e-5)
    np.testing.assert_allclose(y, [0.2, 0.75, 0.9], atol=1e-5)


def test_lines_are_told_apart_by_more_than_their_colour() -> None:
    picture = risk_coverage("risk", {name: ([0.5, 1.0], [0.1, 0.2]) for name in "abc"}, caption="")
    assert [key.kind for key in picture.keys] == ["wide", "dash", "dots"]
    drawn = [re.search(r"stroke-dasharray: [\d.,]+", group(picture.svg, f"risk-curve-{i}")) for i in range(3)]
    assert len({match and match[0] for match in drawn}) == 3
    assert all(key.colour in group(picture.svg, f"risk-curve-{i}") for i, key in enumerate(picture.keys))


def test_a_scatter_shows_each_point_by_its_kind() -> None:
    x, y, kinds = RNG.random(30), RNG.random(30), np.array(["sure", "unsure", "split"] * 10)
    thresholds = {"vertical": {"too much": 0.25}, "horizontal": {"too far": 0.75}}
    picture = scatter("points", x, y, kinds.tolist(), xlabel="total (nats)", ylabel="spread", caption="", **thresholds)
    for number, kind in enumerate(["sure", "unsure", "split"]):
        shown_x, shown_y = points_of(picture.svg, f"points-kind-{number}")
        np.testing.assert_allclose(shown_x, x[kinds == kind], atol=1e-5)
        np.testing.assert_allclose(shown_y, y[kinds == kind], atol=1e-5)
    assert [(key.kind, key.label) for key in picture.keys] == [
        ("circle", "sure (10)"),
        ("triangle", "unsure (10)"),
        ("square", "split (10)"),
    ]
    assert all(f">{text}</text>" in picture.svg for text in ("total (nats)", "spread", "too much", "too far"))


def test_many_points_are_an_image_and_stay_small() -> None:
    picture = scatter("many", RNG.random(20_000), RNG.random(20_000), ["a"] * 20_000, xlabel="", ylabel="", caption="")
    assert "data:image/png;base64," in picture.svg
    assert len(picture.svg) < 1_000_000
    assert picture.svg.count("<use") < 20


@pytest.mark.parametrize("K", [0, 3])
def test_bars_have_the_height_and_the_error_given(K: int) -> None:
    values, errors = RNG.random((2 + K, 4)), 0.1 * RNG.random((2, 2 + K, 4))
    splits = ["harmless", "hard", "toxic", "other"]
    picture = bars("rates", splits, values, errors, rows=["base", "ensemble"], ylabel="refused", caption="")
    for (row, split), value in np.ndenumerate(values):
        y = read_values(picture.svg, "y", corners_of(picture.svg, f"rates-bar-{row}-{split}")[:, 1])
        assert (y.min(), y.max()) == pytest.approx((0, value), abs=1e-5)
    for row in range(2 + K):
        whiskers = corners_of(picture.svg, f"rates-error-{row}")[:, 1].reshape(4, 2)
        ends = read_values(picture.svg, "y", whiskers)
        np.testing.assert_allclose(ends.min(axis=1), values[row] - errors[0, row], atol=1e-5)
        np.testing.assert_allclose(ends.max(axis=1), values[row] + errors[1, row], atol=1e-5)
    assert [key.label for key in picture.keys] == ["base", "ensemble"]
    assert picture.num_particles == K
    for k, colour in enumerate(particle_colours(K)):
        assert colour in group(picture.svg, f"rates-bar-{2 + k}-0")


def test_one_half_length_serves_both_ends_of_an_error_bar() -> None:
    one, two = np.full((1, 2), 0.1), np.full((2, 1, 2), 0.1)
    drawn = [bars("rates", ["a", "b"], [[0.3, 0.4]], e, rows=["base"], ylabel="", caption="").svg for e in (one, two)]
    assert drawn[0] == drawn[1]


def test_what_does_not_fit_together_is_refused_by_name() -> None:
    even = np.full((2, 3), 0.5)
    with pytest.raises(ValueError, match=r"responsibilities: expected a matrix .* got shape \[2, 0\]"):
        drawn(np.empty((2, 0)))
    with pytest.raises(ValueError, match="names: expected a name and a text for each of 3 examples; got 3, 2"):
        heat_map("a", even, names="abc", texts="ab", caption="")
    with pytest.raises(ValueError, match="groups: expected counts that add up to 3 examples; got 4"):
        drawn(even, groups=[("x", 4)])
    with pytest.raises(ValueError, match="labels: expected one for each of 3 groups; got 1"):
        group_heat_map("a", even, ["x"], caption="")
    with pytest.raises(ValueError, match="kinds: expected x, y and kinds of one length"):
        scatter("a", [1, 2], [1, 2], ["x"], xlabel="", ylabel="", caption="")
    with pytest.raises(ValueError, match=r"values: expected 2 columns and at least 1 rows; got \[2, 3\]"):
        bars("a", ["x", "y"], even, even, rows=["base"], ylabel="", caption="")
    with pytest.raises(ValueError, match=r"errors: expected shape \[2, 3\] or \[2, 2, 3\]; got \[3\]"):
        bars("a", ["x", "y", "z"], even, [0, 0, 0], rows=["base"], ylabel="", caption="")


def test_lines_go_through_their_values_and_leave_out_what_is_not_finite() -> None:
    curves = {"one": ([1, 2, 3, 4], [0.9, 0.4, -np.inf, 0.1]), "other": ([1, 4], [-0.2, 0.3])}
    picture = lines("growth", curves, xlabel="dimensions", ylabel="alpha", caption="", vertical={"half": 2.5})
    x, y = points_of(picture.svg, "growth-curve-0")
    np.testing.assert_allclose(x, [1, 2, 4], atol=0.01)
    np.testing.assert_allclose(y, [0.9, 0.4, 0.1], atol=0.01)
    _, y = points_of(picture.svg, "growth-curve-1")
    np.testing.assert_allclose(y, [-0.2, 0.3], atol=0.01)
    assert [key.label for key in picture.keys] == ["one", "other"]
    assert ">half</text>" in picture.svg


def test_lines_of_very_different_size_are_set_on_a_logarithmic_scale_with_plain_numbers() -> None:
    picture = lines("s", {"a": ([1, 2, 3], [0.01, 1.0, 7000.0])}, xlabel="", ylabel="", caption="Curvature.")
    assert picture.caption == "Curvature. The scale is logarithmic, but near zero."
    assert ">1000</text>" in picture.svg
    assert "mathdefault" not in picture.svg
