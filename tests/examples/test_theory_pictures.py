"""The pictures of the page on theory: all are made, and what the page says of them holds."""

from __future__ import annotations

import sys
from pathlib import Path

import matplotlib.image
import pytest

FOLDER = Path(__file__).parents[2] / "examples" / "theory"
NAMES = ("specialists", "posterior", "two_regimes", "critical_alpha", "flows")


@pytest.fixture(scope="module")
def example():
    """Imports a module of the example, which is a folder of scripts and no package. What they compute is kept."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(FOLDER))
        for name in (*NAMES, "make_pictures"):
            patch.delitem(sys.modules, name, raising=False)
        yield __import__


def test_one_command_makes_every_picture_of_the_page(example, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(sys, "argv", ["make_pictures.py", "--output_dir", str(tmp_path)])
    example("make_pictures").main()
    page = (FOLDER.parents[1] / "docs" / "theory.md").read_text()
    for name in NAMES:
        assert f"](../examples/theory/{name}.png)" in page
        assert f"python examples/theory/{name}.py" in page
        image = matplotlib.image.imread(tmp_path / f"{name}.png")
        assert image.shape[1] == 900
        assert 0.02 < (image[..., :3].min(axis=-1) < 0.9).mean() < 0.9
    assert len(capsys.readouterr().out.splitlines()) == len(NAMES)


def test_an_unknown_picture_is_named(example, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["make_pictures.py", "spezialists"])
    with pytest.raises(SystemExit):
        example("make_pictures").main()
    assert "got spezialists" in capsys.readouterr().err


def test_two_particles_gain_from_parting_above_the_critical_alpha_and_lose_below_it(example):
    module = example("critical_alpha")
    critical = module.projection().critical_alpha().alpha
    assert module.gain(0.95 * critical) > 0 > module.gain(1.05 * critical)
    # the right of the picture: it sinks, and is found well before the last dimension
    assert module.projection().critical_alpha(num_dims=1).alpha > 1.3 * critical
    assert module.projection().critical_alpha(num_dims=14).alpha == pytest.approx(critical, rel=0.01)


@pytest.mark.parametrize("name", NAMES)
def test_every_script_prints_its_numbers(name, example, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(sys, "argv", [f"{name}.py", "--output", str(tmp_path / "one.png")])
    example(name).main()
    out = capsys.readouterr().out
    said = {
        "specialists": "0.40 the specialists win above alpha = 0.5\n",
        "posterior": "0.4533",
        "two_regimes": "critical alpha 0.0706; at alpha = 0.5",
        "critical_alpha": "alpha* = 0.1991 in 19 dimensions",
        "flows": "critical alpha: 0.172 with the potential",
    }
    assert said[name] in out
    assert (tmp_path / "one.png").stat().st_size > 10_000
