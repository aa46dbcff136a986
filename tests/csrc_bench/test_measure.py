"""What may be timed, and how: wrong variants and other paths never are."""

from __future__ import annotations

import time
from types import SimpleNamespace

import pytest
import torch

from csrc_bench import measure
from csrc_bench.measure import OpSuite, Point, Skipped, Variant, Wrong

SHAPE = {"name": "bar_square", "N": 64, "dtype": "float32"}


def square(shape):
    return lambda x: x * x


def values_only(shape):
    """Right values, no gradient of one factor."""
    return lambda x: x * x.detach()


class Timer:
    """Stands in for pytest-benchmark's fixture, and counts."""

    def __init__(self):
        self.asked, self.stats = 0, None

    def __call__(self):
        self.asked += 1
        return self

    def pedantic(self, call, rounds, iterations):
        data = []
        for _ in range(rounds):
            start = measure.clock()
            for _ in range(iterations):
                call()
            data.append((measure.clock() - start) / iterations)
        self.stats = SimpleNamespace(stats=SimpleNamespace(data=data))


def suite_of(variant, op="renyi_reduce"):
    def inputs(shape, device, generator):
        return [torch.randn(shape["N"], generator=generator, device=device).requires_grad_()]

    return OpSuite(op, lambda *_: [SHAPE], inputs, square, lambda device: {"it": variant})


def run(variant, direction="both"):
    timer = Timer()
    try:
        return measure.measure(Point(suite_of(variant), SHAPE, direction, "it"), timer, seconds=0.01), timer
    except measure.NotTimed as error:
        return error, timer


@pytest.mark.parametrize("direction", ["forward", "backward", "both"])
def test_a_right_variant_has_median_p20_p80_and_peak_memory(direction):
    row, timer = run(Variant("peer", square), direction)
    assert timer.asked == 1
    assert row["status"] == "ok"
    assert 0 < row["p20_ms"] <= row["median_ms"] <= row["p80_ms"]
    assert row["peak_mib"] > 0


@pytest.mark.parametrize("direction", ["forward", "backward", "both"])
@pytest.mark.parametrize(
    ("build", "reason"),
    [
        (lambda shape: lambda x: x * x * 1.01, "output 0 is off"),
        (values_only, "gradient 0 is off"),
        (lambda shape: lambda x: (x * x)[:-1], "instead of"),
        (lambda shape: lambda x: x * x * torch.nan, "output 0 is off"),
    ],
    ids=["value", "gradient", "shape", "nan"],
)
def test_a_wrong_variant_is_never_timed(build, reason, direction):
    error, timer = run(Variant("peer", build), direction)
    assert isinstance(error, Wrong)
    assert str(error).startswith("wrong: ")
    assert reason in str(error)
    assert timer.asked == 0


def test_a_path_that_cannot_run_here_is_refused_and_never_timed(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(measure, "device_type", lambda: "cpu")
    error, timer = run(Variant("ours", square, backend="triton"))
    assert isinstance(error, Skipped)
    assert "triton" in str(error)
    assert timer.asked == 0


def test_a_path_other_than_the_one_asked_for_is_refused(monkeypatch):
    monkeypatch.setattr(measure, "resolve", lambda op, tensor, backend: "torch")
    with pytest.raises(Skipped, match="'triton' was asked for and 'torch' would run"):
        measure.require_path("renyi_reduce", torch.zeros(1), "triton")
    assert measure.require_path("renyi_reduce", torch.zeros(1), "torch") == "torch"


def test_the_interpreter_is_no_path_to_time(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(Skipped):
        measure.require_path("renyi_reduce", torch.zeros(1), "triton")


def test_a_peer_that_breaks_or_is_missing_is_skipped_and_ours_is_not_excused():
    def breaks(shape):
        raise RuntimeError("no such thing\nas this")

    assert str(run(Variant("peer", breaks))[0]) == "skipped: RuntimeError: no such thing"
    assert str(run(Variant("peer", square, needs="no_such_module"))[0]) == "skipped: no_such_module is not installed"
    with pytest.raises(RuntimeError):
        run(Variant("ours", breaks, backend="torch"))


def test_out_of_memory_is_a_reason_for_any_variant():
    def hungry(shape):
        raise torch.OutOfMemoryError("a lot")

    for kind in ("ours", "peer", "floor"):
        assert str(run(Variant(kind, lambda *_: hungry(SHAPE)))[0]) == "skipped: out of memory"


def test_the_times_are_of_one_call_and_the_input_sets_take_turns():
    seen = []

    def nap(shape):
        def function(x):
            seen.append(x.data_ptr())
            time.sleep(0.002)
            return x * x

        return function

    row, _ = run(Variant("peer", nap), "forward")
    assert 2 <= row["median_ms"] < 20
    assert len(set(seen)) >= 2
    assert all(a != b for a, b in zip(seen[-9:-2], seen[-8:-1], strict=True))


def test_a_given_number_of_rounds_is_timed_after_the_check_and_nothing_else_runs():
    calls = []
    timer = Timer()
    variant = Variant("peer", lambda shape: lambda x: calls.append(x) or x * x)
    row = measure.measure(Point(suite_of(variant), SHAPE, "forward", "it"), timer, rounds=3)
    assert len(timer.stats.stats.data) == 3
    assert len(calls) == 1 + 3
    assert row["peak_mib"] is None


def test_percentiles_are_linear_between_ranks():
    data = [5.0, 1.0, 3.0, 2.0, 4.0, 6.0]
    assert measure.percentile(data, 20) == 2.0
    assert measure.percentile(data, 50) == 3.5
    assert measure.percentile([7.0], 80) == 7.0


def test_peak_memory_on_the_cpu_counts_what_was_alive_together():
    def call():
        first = torch.zeros(2**18)  # 1 MiB
        del first
        return torch.zeros(2**18), torch.zeros(2**18)

    assert measure.cpu_peak_mib(call) == pytest.approx(2.0, abs=0.1)
