"""How a variant is measured: checked against the reference, then timed on several input sets, then its peak memory.

A variant is never timed if it is wrong, cannot run here, or would take another path than its name says. Its row then
holds the reason.
"""

from __future__ import annotations

import contextlib
import gc
import importlib.util
import itertools
import json
import math
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch._functorch.config
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from renyi_kernels.backend import resolve

Shape = dict[str, Any]
"""The sizes by letter, the `name` of the shape ("bar..." for a main shape), and `dtype`, a name in torch."""

TOLERANCE = {torch.bfloat16: 3e-2, torch.float32: 1e-3}
"""The largest error of a value or gradient, relative to the largest entry of the reference."""

_CACHE_MIB = {"cpu": 256, "cuda": 128}  # more than a cache holds
_SECONDS = {"cpu": 1.0, "cuda": 0.4}  # of timed calls for one row, but at least 5 rounds (3 if they are slow)


class NotTimed(Exception):
    """Says why a variant was not timed."""

    def __str__(self) -> str:
        return f"{type(self).__name__.lower()}: {self.args[0]}"


class Skipped(NotTimed):
    """It cannot run here."""


class Wrong(NotTimed):
    """It ran, but its result is not that of the reference."""


class Missing(NotTimed):
    """It was not measured yet, or not well. The next run makes up for it."""


def is_missing(status: str) -> bool:
    return status.startswith("missing: ")


@dataclass(frozen=True)
class Variant:
    """One way to do the work.

    Attributes:
        kind: "ours", "naive", "peer", "floor" (no variant can be faster; it computes no result) or "other" (it does
            other work, or is ours made in another way; it is shown, but not ranked).
        build: shape -> f(*inputs); for a floor (shape, direction) -> f(*inputs).
        backend: for our variants, the path that must run.
        needs: the module that must be installed.
        slow: it takes long to prepare, so it is measured at the main shapes only.
    """

    kind: str
    build: Callable[..., Callable]
    backend: str | None = None
    needs: str | None = None
    slow: bool = False


@dataclass(frozen=True)
class Point:
    """A row to be measured: a variant of a suite, at a shape, in a direction."""

    suite: Any
    shape: Shape = field(hash=False)
    direction: str
    variant: str

    def __str__(self) -> str:
        return f"{self.shape['name']}-{self.direction}-{self.variant}"


# clock and memory


def device_type() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def clock() -> float:
    """Seconds, read after the device has finished all its work."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def peak_mib(call: Callable[[], Any]) -> float:
    """The most MiB that tensors allocated by `call`, its result included, take at one moment. What CUDA graphs keep for
    their replays counts too, because a replay allocates nothing."""
    if not torch.cuda.is_available():
        return cpu_peak_mib(call)
    torch.cuda.synchronize()
    segments = torch.cuda.memory_snapshot()
    of_graphs = sum(s["total_size"] - s["allocated_size"] for s in segments if s["segment_pool_id"] != (0, 0))
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before + of_graphs) / 2**20


def graphed(works: Sequence[Callable[[], Any]]) -> list[Callable[[], Any]]:
    """Each of these as a CUDA graph, all in the same memory; on a CPU they are called as they are. They must not ask
    the device for a value."""
    if device_type() == "cpu":
        return list(works)
    stream, pool, replays = torch.cuda.Stream(), torch.cuda.graph_pool_handle(), []
    for work in works:
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                work()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=pool):
            work()
        replays.append(graph.replay)
    return replays


def cpu_peak_mib(call: Callable[[], Any]) -> float:
    """The same for tensors on the CPU, whether or not there is a GPU."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        kept = call()
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(trace))
        events = [e for e in json.loads(trace.read_text())["traceEvents"] if e.get("name") == "[memory]"]
    del kept
    events.sort(key=lambda e: e["ts"])
    return max(itertools.accumulate((e["args"]["Bytes"] for e in events), initial=0)) / 2**20


def percentile(data: Sequence[float], percent: float) -> float:
    """Interpolated linearly between the two nearest ranks."""
    data = sorted(data)
    position = (len(data) - 1) * percent / 100
    low = math.floor(position)
    high = min(low + 1, len(data) - 1)
    return data[low] + (data[high] - data[low]) * (position - low)


# the refusals


def require_path(op: str, tensor: Tensor, wanted: str) -> str:
    """`wanted`, if `op` takes that path for this tensor. Raises Skipped if it does not."""
    try:
        path = resolve(op, tensor, wanted)
    except ValueError as error:
        raise Skipped(str(error)) from None
    if path != wanted:
        raise Skipped(f"{wanted!r} was asked for and {path!r} would run")
    if path == "triton" and (tensor.device.type == "cpu" or os.environ.get("TRITON_INTERPRET") == "1"):
        raise Skipped("the speed of Triton's interpreter says nothing about a GPU")
    return path


def require_close(name: str, got: Tensor, want: Tensor, tolerance: float) -> None:
    """Raises Wrong unless every entry is within `tolerance` times the largest entry of `want`."""
    if got.shape != want.shape:
        raise Wrong(f"{name} is {list(got.shape)} instead of {list(want.shape)}")
    scale = want.abs().max().item() if want.numel() else 0.0
    error = (got.to(want.dtype) - want).abs().max().item() / max(scale, 1e-30) if want.numel() else 0.0
    if not error <= tolerance:  # in this form, NaN is wrong
        raise Wrong(f"{name} is off by {error:.1e} of its largest entry ({tolerance:.0e} allowed)")


# ops


@dataclass
class OpSuite:
    """Variants of one op: functions of the same inputs. The inputs that require a gradient get one.

    Attributes:
        shapes: device type, tiny -> shapes.
        inputs: shape, device, generator -> tensors.
        reference: shape -> f(*inputs). Computed in fp32 (for bf16) or fp64, it is what is right.
        variants: device type -> variants by name.
        directions: "graph" is "both" as one CUDA graph. It is left out where there is no GPU, but not if tiny.
    """

    op: str
    shapes: Callable[[str, bool], list[Shape]]
    inputs: Callable[[Shape, str, torch.Generator], list[Tensor]]
    reference: Callable[[Shape], Callable]
    variants: Callable[[str], dict[str, Variant]]
    directions: tuple[str, ...] = ("both", "forward", "backward")
    _kept: tuple = (None, None)

    def points(self, device: str, tiny: bool) -> list[Point]:
        """Every direction at the main shapes; forward and backward together at all others."""
        return [
            Point(self, shape, direction, name)
            for shape in self.shapes(device, tiny)
            for direction in (self.directions if shape["name"].startswith("bar") else self.directions[:1])
            if direction != "graph" or device == "cuda" or tiny
            for name, variant in self.variants(device).items()
            if not variant.slow or (shape["name"].startswith("bar") and not tiny)
        ]

    @contextlib.contextmanager
    def prepared(self, point: Point) -> Iterator[tuple[list[Callable[[], Any]], str | None]]:
        """(calls, each the same work on another input set; the path, if the variant is ours). Raises NotTimed."""
        variant, device = self.variants(device_type())[point.variant], device_type()
        sets, upstream, gold = self._sets(point.shape, device)
        path = require_path(self.op, sets[0][0], variant.backend) if variant.backend else None
        # torch.compile must let the backward be timed alone, many times on what one forward has kept
        with torch._functorch.config.patch(donated_buffer=False):
            if variant.kind == "floor":
                function = variant.build(point.shape, "both" if point.direction == "graph" else point.direction)
                calls = [partial(function, *inputs) for inputs in sets]
            else:
                function = variant.build(point.shape)
                self._check(function, sets[0], upstream, gold)
                calls = [self._call(function, inputs, upstream, point.direction) for inputs in sets]
            yield graphed(calls) if point.direction == "graph" else calls, path

    def _sets(self, shape: Shape, device: str) -> tuple[list[list[Tensor]], list[Tensor], list[Tensor]]:
        """Input sets that together exceed the cache, upstream gradients, and gold: outputs and gradients of set 0."""
        if self._kept[0] != (shape, device):
            self._kept = (None, None)
            draw = lambda seed: self.inputs(shape, device, torch.Generator(device).manual_seed(seed))
            sets = [draw(0)]
            num_bytes = sum(x.numel() * x.element_size() for x in sets[0])
            sets += [draw(seed) for seed in range(1, num_input_sets(num_bytes, device))]
            wide = torch.float32 if getattr(torch, shape["dtype"]) is torch.bfloat16 else torch.float64
            widened = [x.detach().to(wide) if x.is_floating_point() else x for x in sets[0]]
            leaves = [w.requires_grad_(x.requires_grad) for w, x in zip(widened, sets[0], strict=True)]
            outputs = _tuple(self.reference(shape)(*leaves))
            generator = torch.Generator(device).manual_seed(99)
            upstream = [torch.randn(o.shape, generator=generator, device=device, dtype=o.dtype) for o in outputs]
            gold = [*(o.detach() for o in outputs), *_gradients(outputs, leaves, upstream)]
            self._kept = ((shape, device), (sets, upstream, gold))
        return self._kept[1]

    @staticmethod
    def _check(function: Callable, inputs: list[Tensor], upstream: list[Tensor], gold: list[Tensor]) -> None:
        tolerance = TOLERANCE[next(x for x in inputs if x.is_floating_point()).dtype]
        outputs = _tuple(function(*inputs))
        for i, (got, want) in enumerate(zip(outputs, gold, strict=False)):
            require_close(f"output {i}", got.detach(), want, tolerance)
        gradients = _gradients(outputs, inputs, upstream)
        for i, (got, want) in enumerate(zip(gradients, gold[len(outputs) :], strict=True)):
            require_close(f"gradient {i}", got, want, tolerance)

    @staticmethod
    def _call(function: Callable, inputs: list[Tensor], upstream: list[Tensor], direction: str) -> Callable[[], Any]:
        if direction == "forward":
            return torch.no_grad()(lambda: function(*inputs))
        if direction == "backward":
            outputs = _tuple(function(*inputs))
            return lambda: _gradients(outputs, inputs, upstream, retain_graph=True)

        def both():
            outputs = _tuple(function(*inputs))
            return outputs, _gradients(outputs, inputs, upstream)

        return both


def _tuple(outputs: Any) -> tuple[Tensor, ...]:
    return (outputs,) if isinstance(outputs, Tensor) else tuple(outputs)


def _gradients(outputs, inputs, upstream, **options) -> tuple[Tensor, ...]:
    leaves = [x for x in inputs if x.requires_grad]
    return torch.autograd.grad(
        outputs, leaves, [u.to(o.dtype) for u, o in zip(upstream, outputs, strict=True)], **options
    )


def variants_of_op(device: str, ours: Callable[..., Callable], naive: Callable, floor: Callable) -> dict[str, Variant]:
    """The variants of every op suite: ours (on a GPU on the torch path too), a floor, naive, and naive compiled.

    Args:
        ours: shape, backend -> f(*inputs).
        naive: shape -> f(*inputs).
        floor: shape, direction -> f(*inputs). The variant takes the name of this function.
    """
    on = lambda backend: Variant("ours", partial(ours, backend=backend), backend)
    return {
        "ours": on("triton" if device == "cuda" else "torch"),
        floor.__name__: Variant("floor", floor),
        **({"ours_torch": on("torch")} if device == "cuda" else {}),
        "naive": Variant("naive", naive),
        "compile": Variant("peer", lambda shape: compiled(naive(shape)), slow=True),
    }


def compiled(function: Callable) -> Callable:
    """torch.compile, for this shape only."""
    torch._dynamo.reset()
    return torch.compile(function, dynamic=False)


def num_input_sets(num_bytes: int, device: str) -> int:
    """How many input sets of `num_bytes` bytes exceed the cache together: 2 to 16."""
    return min(max(math.ceil(_CACHE_MIB[device] * 2**20 / num_bytes), 2), 16)


def copies(num_bytes: int, device: str) -> Callable[..., None]:
    """A function that reads and writes `num_bytes` bytes in all, and never the same bytes twice in a row."""
    half = max(num_bytes // 2, 1)
    count = num_input_sets(num_bytes, device)
    pairs = itertools.cycle([torch.zeros(2, half, dtype=torch.uint8, device=device) for _ in range(count)])

    def copy(*_):
        source, target = next(pairs)
        target.copy_(source)

    return copy


# one row


def measure(
    point: Point, timer: Callable[[], Any], seconds: float | None = None, rounds: int | None = None
) -> dict[str, Any]:
    """Check and time one point. Returns what goes into the row's `extra_info`.

    Args:
        timer: gives pytest-benchmark's fixture. It is called only after the variant has passed its check.
        seconds: of timed calls; None for the device's default.
        rounds: time so many calls, and do nothing else: no warm-up, because the check has run the variant, and no
            memory. It is for calls of many seconds.

    Raises:
        NotTimed: the variant is wrong or cannot run here.
    """
    variant = point.suite.variants(device_type())[point.variant]
    try:
        if variant.needs and importlib.util.find_spec(variant.needs) is None:
            raise Skipped(f"{variant.needs} is not installed")
        with point.suite.prepared(point) as (calls, path):
            if rounds is not None:
                return {"path": path, "status": "ok", "peak_mib": None, **_time(timer(), calls, rounds, 1)}
            calls[0]()  # warm-up: compiles and tunes
            times = _time(timer(), calls, *_rounds(calls, _SECONDS[device_type()] if seconds is None else seconds))
            return {"path": path, "status": "ok", "peak_mib": peak_mib(calls[0]), **times}
    except (torch.OutOfMemoryError, MemoryError):
        reason: NotTimed = Skipped("out of memory")
    except NotTimed as error:
        reason = error
    except Exception as error:
        if variant.kind not in ("peer", "other"):
            raise
        reason = Skipped(f"{type(error).__name__}: {(str(error).strip() or 'no message').splitlines()[0][:200]}")
    finally:
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    raise reason


def _rounds(calls: list[Callable[[], Any]], seconds: float) -> tuple[int, int]:
    """(rounds, calls in a round) that take so many seconds together."""
    start = clock()
    calls[-1]()
    once = max(clock() - start, 1e-7)
    # a round groups many short calls, so that their throughput is measured and not the wait for the device
    iterations = max(1, math.ceil(0.005 / once / len(calls))) * len(calls) if once < 0.005 else 1
    return min(max(int(seconds / (once * iterations)), 3 if once > 1 else 5), 100), iterations


def _time(benchmark: Any, calls: list[Callable[[], Any]], rounds: int, iterations: int) -> dict[str, float]:
    """Median, p20 and p80 of one call in ms, timed by pytest-benchmark. The calls take turns."""
    turns = itertools.cycle(calls)

    def call():
        next(turns)()

    benchmark.pedantic(call, rounds=rounds, iterations=iterations)
    data = [1e3 * t for t in benchmark.stats.stats.data]
    return {"median_ms": statistics.median(data), "p20_ms": percentile(data, 20), "p80_ms": percentile(data, 80)}
