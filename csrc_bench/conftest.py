"""Each row is a test and goes into pytest-benchmark's JSON. Rows that were not timed stand there under `not_timed`."""

from __future__ import annotations

import contextlib
import faulthandler
import gc
import json
import platform
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest
import torch

from csrc_bench import gpu, measure, order

PACKAGES = ("torch", "triton", "transformers", "peft", "liger-kernel", "cut-cross-entropy", "quack-kernels")


NOT_YET = measure.Missing("not measured yet")
OUT_OF_TIME = measure.Missing("out of time")
DISTURBED = measure.Missing("another process used the GPU")
ENDED = measure.Wrong("its process ended, or was ended because it took too long")


def pytest_addoption(parser):
    group = parser.getgroup("csrc_bench")
    group.addoption("--tiny", action="store_true", help="very small shapes, to see whether everything runs")
    group.addoption("--results", type=Path, help="JSON file: each row is added when measured; rows in it are skipped")
    group.addoption("--rounds", type=int, help="time so many calls of each row, and measure no memory")
    group.addoption("--seconds", type=float, help="start no row after this many seconds")
    group.addoption("--first", action="store_true", help="only the rows that tell most: see order.py")
    group.addoption("--row-seconds", type=float, help="end the process if a row takes longer")


def pytest_configure(config):
    config.not_timed = []
    config.started = time.monotonic()


def pytest_generate_tests(metafunc):
    if "point" in metafunc.fixturenames:
        points = metafunc.module.SUITE.points(measure.device_type(), metafunc.config.getoption("tiny"))
        metafunc.parametrize("point", points, ids=str)


@pytest.hookimpl(trylast=True)  # after -k
def pytest_collection_modifyitems(config, items):
    """Leave the rows that the file of --results lacks, those that tell most first. The file notes what is missing."""
    config.results = _load(config.getoption("results"))
    there = {key(row): row["status"] for row in _rows(config.results)}
    wanted = {}
    for item in items:
        point = item.callspec.params["point"]
        group = f"{point.suite.op} {point.shape['name']} {point.direction}"
        item.add_marker(pytest.mark.benchmark(timer=measure.clock, disable_gc=True, group=group))
        row = row_of(point)
        if measure.is_missing(there.get(key(row), str(NOT_YET))):
            wanted[item] = row
            if key(row) not in there:
                config.results["not_timed"].append(row | {"path": None, "status": str(NOT_YET)})
    _write(config)
    place = {item: order.place(f"{row['op']} {item.callspec.params['point']}") for item, row in wanted.items()}
    limit = len(order.FIRST) if config.getoption("first") else len(order.FIRST) + 1
    gc.freeze()  # what was imported needs not be looked through after each row
    items[:] = sorted((item for item in wanted if place[item] < limit), key=place.get)


def row_of(point):
    return {
        "op": point.suite.op,
        "shape": {k: v for k, v in point.shape.items() if k not in ("name", "dtype")},
        "shape_name": point.shape["name"],
        "dtype": point.shape["dtype"],
        "direction": point.direction,
        "variant": point.variant,
        "kind": point.suite.variants(measure.device_type())[point.variant].kind,
    }


@pytest.fixture
def measured(request):
    """measured(point) makes the row of that point: timed, or with the reason why it was not."""

    def run(point):
        config, row = request.config, row_of(point)
        timers = []

        def timer():
            timers.append(request.getfixturevalue("benchmark"))
            timers[0].params = None  # extra_info holds them as plain numbers
            timers[0].extra_info.update(row)
            return timers[0]

        def put_off(reason):
            status = f"wrong: {type(reason).__name__}: {reason}"
            if isinstance(reason, measure.NotTimed):
                status = str(reason)
            config.not_timed.append(row | {"path": None, "status": status})
            _add(config, not_timed=config.not_timed[-1])
            return status

        try:
            limit = config.getoption("seconds")
            if limit is not None and time.monotonic() - config.started > limit:
                raise OUT_OF_TIME
            _add(config, not_timed=row | {"path": None, "status": str(ENDED)})
            with _at_most(config.getoption("row_seconds")):
                seconds = 0.01 if config.getoption("tiny") else None
                found = measure.measure(point, timer, seconds, config.getoption("rounds"))
            if _on_gpu() and gpu.others(mine=1):
                raise DISTURBED
        except KeyboardInterrupt:
            put_off(OUT_OF_TIME)
            raise
        except Exception as error:
            status = put_off(error)
            if timers:
                timers[0].extra_info.update(path=None, status=status)
            if error is DISTURBED and (others := gpu.others_after_waiting(mine=1)):
                pytest.exit(f"another process uses the GPU: {'; '.join(others)}", returncode=4)
            if "CUDA error" in status:
                pytest.exit(f"a CUDA error makes all later rows of this process wrong: {status}", returncode=3)
            if isinstance(error, (measure.Skipped, measure.Missing)):
                pytest.skip(status)
            if isinstance(error, measure.Wrong) and row["kind"] == "peer":
                pytest.xfail(status)
            raise
        timers[0].extra_info.update(found)
        _add(config, benchmarks=timers[0].stats.as_dict(include_data=True))

    return run


@contextlib.contextmanager
def _at_most(seconds):
    """Ends this process if the block takes longer, also where Python waits for the device or for a compiler."""
    if seconds is not None:
        faulthandler.dump_traceback_later(seconds, exit=True)
    try:
        yield
    finally:
        faulthandler.cancel_dump_traceback_later()


def _on_gpu():
    return measure.device_type() == "cuda"


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
    """Put a row into the results, in place of an older one."""
    ((under, new),) = row.items()
    for entries in (config.results["benchmarks"], config.results["not_timed"]):
        entries[:] = [
            entry for entry in entries if key(entry.get("extra_info", entry)) != key(new.get("extra_info", new))
        ]
    config.results[under].append(new)
    _write(config)


def _write(config):
    """Write the file of --results, a row on each line. It is complete at any moment."""
    path = config.getoption("results")
    if path is None:
        return
    lists = {name: ",\n".join(map(json.dumps, config.results[name])) for name in ("benchmarks", "not_timed")}
    machine = json.dumps(config.results["machine_info"])
    text = ",\n".join([f'"machine_info": {machine}', *(f'"{name}": [\n{rows}\n]' for name, rows in lists.items())])
    beside = path.with_suffix(".part")
    beside.write_text(f"{{\n{text}\n}}\n")
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
