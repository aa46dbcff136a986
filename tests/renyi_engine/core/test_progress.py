"""What a person sees while training."""

from __future__ import annotations

import io
import re

import pytest
from rich.console import Console

from renyi_engine.core import progress as progress_module
from renyi_engine.core.progress import TrainingProgress, track

METRICS = {"loss_nats": 12.345, "ess_particles": 3.21, "tokens_per_s": 12345.0}
NUMBERS = "loss 12.345 nats  mixture NLL 1.234 nats/token  ESS 3.21/4  12345 tokens/s"


def shown(terminal: bool, width: int = 80) -> str:
    file = io.StringIO()
    console = Console(file=file, force_terminal=terminal, width=width, color_system=None)
    with TrainingProgress(1200, 20, num_particles=4, console=console) as progress:
        progress.say("hello")
        progress.advance(30)
        progress.show(METRICS, "mixture NLL 1.234 nats/token")
    return file.getvalue()


@pytest.mark.parametrize("width", [80, 200])
def test_on_a_terminal_steps_numbers_and_eta_are_all_in_view(width):
    final = shown(True, width).split("hello")[1]
    assert re.search(r"training .*30/1200 [\d-]:[\d-]{2}:[\d-]{2}", final)
    assert NUMBERS in final


def test_elsewhere_each_report_is_one_plain_line():
    lines = shown(False).splitlines()
    assert lines[0] == "hello"
    assert re.fullmatch(rf"step 30/1200  {re.escape(NUMBERS)}  ETA \d+:\d\d:\d\d", lines[1])
    assert len(lines) == 2


def test_batches_are_all_passed_on_with_a_line_at_the_start_and_at_long_intervals(capsys, monkeypatch):
    clock = iter(range(0, 1000, 20))
    monkeypatch.setattr(progress_module.time, "monotonic", lambda: next(clock))
    assert list(track("abcde", "scoring")) == list("abcde")
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "scoring: 5 batches"
    assert [re.fullmatch(r"scoring: (\d)/5  ETA \d:\d\d:\d\d", line)[1] for line in lines[1:]] == ["2", "4"]
