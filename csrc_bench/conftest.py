"""Each row is a test and goes into pytest-benchmark's JSON. Rows that were not timed stand there under `not_timed`."""

from __future__ import annotations

import json
import platform
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest
import torch

from csrc_bench import measure

PACKAGES = ("torch", "triton", "transformers", "peft", "liger-kernel", "cut-cross-entropy")


OUT_OF_TIME = measure.Skipped("out of time")


def pytest_addoption(parser):
    group = parser.getgroup("csrc_bench")
    group.addoption("--tiny", action="store_true", help="very small shapes, to see whether everything runs")
    group.addoption("--results", type=Path, help="JSON file: each row is added when measured; rows in it are skipped")
    group.addoption("--rounds", type=int, help="time so many calls of each row, and measure no memory")
    group.addoption("--seconds", type=float, help="start no row after this many seconds")


def pytest_configure(config):
    config.not_timed = []
    config.started = time.monotonic()


def pytest_generate_tests(metafunc):
    if "point" in metafunc.fixturenames:
        points = metafunc.module.SUITE.points(measure.device_type(), metafunc.config.getoption("tiny"))
        metafunc.parametrize("point", points, ids=str)


def pytest_collection_modifyitems(config, items):
    there = [key(row) for row in _rows(_load(config.getoption("results"))) if row["status"] != str(OUT_OF_TIME)]
    missing = []
    for item in items:
        point = item.callspec.params["point"]
        group = f"{point.suite.op} {point.shape['name']} {point.direction}"
        item.add_marker(pytest.mark.benchmark(timer=measure.clock, disable_gc=True, group=group))
        if (point.suite.op, point.shape["name"], point.direction, point.variant) not in there:
            missing.append(item)
    items[:] = missing


@pytest.fixture
def measured(request):
    """measured(point) makes the row of that point: timed, or with the reason why it was not."""

    def run(point):
        config = request.config
        variant = point.suite.variants(measure.device_type())[point.variant]
        row = {
            "op": point.suite.op,
            "shape": {k: v for k, v in point.shape.items() if k not in ("name", "dtype")},
            "shape_name": point.shape["name"],
            "dtype": point.shape["dtype"],
            "direction": point.direction,
            "variant": point.variant,
            "kind": variant.kind,
        }
        timers = []

        def timer():
            timers.append(request.getfixturevalue("benchmark"))
            timers[0].params = None  # extra_info holds them as plain numbers
            timers[0].extra_info.update(row)
            return timers[0]

        limit = config.getoption("seconds")
        try:
            if limit is not None and time.monotonic() - config.started > limit:
                raise OUT_OF_TIME
            seconds = 0.01 if config.getoption("tiny") else None
            found = measure.measure(point, timer, seconds, config.getoption("rounds"))
        except Exception as error:
            status = str(error) if isinstance(error, measure.NotTimed) else f"wrong: {type(error).__name__}: {error}"
            config.not_timed.append(row | {"path": None, "status": status})
            _add(config, not_timed=config.not_timed[-1])
            if "CUDA error" in status:
                pytest.exit(f"a CUDA error makes all later rows of this process wrong: {status}", returncode=3)
            if isinstance(error, measure.Skipped):
                pytest.skip(status)
            if isinstance(error, measure.Wrong) and variant.kind == "peer":
                pytest.xfail(status)
            raise
        timers[0].extra_info.update(found)
        _add(config, benchmarks=timers[0].stats.as_dict(include_data=True))

    return run


def key(row):
    return row["op"], row["shape_name"], row["direction"], row["variant"]


def _rows(results):
    return [
        entry.get("extra_info", entry) for entries in (results["benchmarks"], results["not_timed"]) for entry in entries
    ]


def _load(path):
    if path is None or not path.exists():
        return {"machine_info": machine_info(), "benchmarks": [], "not_timed": []}
    return json.loads(path.read_text())


def _add(config, **row):
    """Put a row into the file of --results, in place of an older one. The file is complete at any moment."""
    path = config.getoption("results")
    if path is None:
        return
    results = _load(path)
    ((under, new),) = row.items()
    for entries in (results["benchmarks"], results["not_timed"]):
        entries[:] = [
            entry for entry in entries if key(entry.get("extra_info", entry)) != key(new.get("extra_info", new))
        ]
    results[under].append(new)
    beside = path.with_suffix(".part")
    beside.write_text(json.dumps(results, indent=1))
    beside.replace(path)


def machine_info() -> dict:
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = "not installed"
    on_gpu = torch.cuda.is_available()
    cpu = _cpu_model()
    return {
        "device": torch.cuda.get_device_name() if on_gpu else cpu,
        "device_memory_mib": torch.cuda.get_device_properties(0).total_memory >> 20 if on_gpu else None,
        "cuda": torch.version.cuda,
        "cpu": cpu,
        "threads": torch.get_num_threads(),
        "system": platform.system(),
        "versions": versions,
    }


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def pytest_benchmark_update_machine_info(config, machine_info):
    machine_info.clear()
    machine_info.update(globals()["machine_info"]())


def pytest_benchmark_update_json(config, benchmarks, output_json):
    output_json["not_timed"] = config.not_timed
