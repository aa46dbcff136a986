"""One command for a GPU machine: runs the kernel tests there, then the benchmarks. A checkout is enough.

    python -m csrc_bench.on_gpu --out DIR --minutes 8

The rows that tell most come first, and each row is written as soon as it is measured, so that nothing is lost when the
time is up. The same command with the same DIR measures the rows that are missing. DIR then holds summary.txt (read this
first: it also says which rows are missing), results.json, tests.txt, tests.xml, losses.txt, profile.txt and
benchmarks.txt. Nothing is timed while another process uses the GPU.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from csrc_bench import compare, gpu

ROOT = Path(__file__).parents[1]
TESTS_SECONDS, TESTS_SHARE = 120, 0.25  # at most, of the time
AFTERWARDS_SECONDS = 60  # kept for the losses and the profile
ROW_SECONDS = 100  # a row that takes longer is given up


def run(command: list[str], log: Path, seconds: float) -> str:
    """Run a command for at most `seconds`, and add its output to `log`. Returns how it ended, in words."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}", "HF_HUB_OFFLINE": "1"}
    environment |= {"CUDA_DEVICE_ORDER": "PCI_BUS_ID"}  # the numbers by which nvidia-smi calls GPUs
    start = time.monotonic()
    with log.open("a") as output:
        process = subprocess.Popen(
            [sys.executable, *command],
            cwd=ROOT,
            env=environment,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            code = process.wait(max(seconds, 1))
            ended = {0: "done", 5: "nothing new"}.get(code, f"exit code {code}")  # 5: pytest had nothing to run
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGINT)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(10)
            ended = "out of time"
        finally:
            # its workers too: else they would go on and disturb the next measurement
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    return f"{ended}, {time.monotonic() - start:.0f} s"


def last_line(path: Path) -> str:
    lines = path.read_text(errors="replace").strip().splitlines() if path.exists() else []
    return lines[-1].strip("= ") if lines else ""


class Session:
    """What is run on the GPU, one thing after the other, until the time is up. summary.txt is written after each."""

    def __init__(self, out: Path, seconds: float, tiny: bool) -> None:
        self.out, self.end, self.results = out, time.monotonic() + seconds, out / "results.json"
        self.tiny = ["--tiny"] if tiny else []
        self.stages: list[str] = []

    @property
    def left(self) -> float:
        return self.end - time.monotonic()

    def tests(self, seconds: float) -> bool:
        """Run the kernel tests. Returns whether all passed."""
        # test_aot compiles without a GPU, and says nothing about this one
        command = ["-m", "pytest", "tests/renyi_kernels", "--ignore=tests/renyi_kernels/test_aot.py"]
        command += ["-p", "no:cacheprovider", "--continue-on-collection-errors"]
        if importlib.util.find_spec("xdist"):  # most of the time is compiling
            command += ["-n", str(min(8, os.cpu_count() or 1))]
        ended = run([*command, f"--junit-xml={self.out / 'tests.xml'}"], self.out / "tests.txt", seconds)
        self.note(f"kernel tests: {ended}: {last_line(self.out / 'tests.txt')}")
        return ended.startswith("done")

    def rows(self, name: str, selection: list[str], kept: float = 0.0) -> None:
        """Measure the rows that are missing, in one process. If a row breaks it, another process goes on after that
        row. The last `kept` seconds are not used."""

        def measure() -> str:
            log, broken = self.out / "benchmarks.txt", self.broken()
            command = ["-m", "pytest", "csrc_bench", *selection, *self.tiny, "-p", "no:cacheprovider", "-rsx"]
            command += ["--tb=short", "--results", str(self.results), f"--row-seconds={ROW_SECONDS}"]
            # no row starts in the last seconds, so that the last one can finish
            left = self.left - kept
            ended = run([*command, f"--seconds={left - 8:.0f}"], log, left)
            if self.broken() > broken and self.left - kept > 10:
                return measure()
            return f"{ended}: {last_line(log)}"

        self.timed(name, measure, kept)

    def script(self, name: str, module: str, file: str) -> None:
        """Run a module of csrc_bench, whose output goes to a file of its own."""
        (self.out / file).unlink(missing_ok=True)
        self.timed(name, lambda: f"{run(['-m', module, *self.tiny], self.out / file, self.left)}: see {file}")

    def timed(self, name: str, work: Callable[[], str], kept: float = 0.0) -> None:
        """Do it, if there is time and nobody else uses the GPU."""
        if self.left - kept < 10:
            self.note(f"{name}: no time left")
        elif others := gpu.others_after_waiting(mine=0):
            self.note(f"{name}: refused, because another process uses the GPU ({'; '.join(others)}). Please end it.")
        else:
            self.note(f"{name}: {work()}")

    def broken(self) -> int:
        """How many rows ended their process."""
        rows = compare.load([self.results]) if self.results.exists() else []
        return sum("its process ended" in row["status"] or "CUDA error" in row["status"] for row in rows)

    def note(self, stage: str) -> None:
        self.stages.append(stage)
        print(stage, flush=True)
        rows = compare.load([self.results]) if self.results.exists() else []
        parts = ["\n".join(self.stages), *compare.missing(rows), compare.text(rows)]
        (self.out / "summary.txt").write_text("\n\n".join(parts) + "\n")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m csrc_bench.on_gpu", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for the results")
    parser.add_argument("--minutes", type=float, default=8.0, help="time for everything (default: 8)")
    parser.add_argument("--skip-tests", action="store_true", help="run the benchmarks only")
    parser.add_argument("--tiny", action="store_true", help="very small shapes, to see whether everything runs")
    options = parser.parse_args(arguments)
    out, seconds = options.out.resolve(), 60 * options.minutes
    out.mkdir(parents=True, exist_ok=True)
    if options.tiny:
        os.environ["OMP_NUM_THREADS"] = "1"  # where there is little to do, threads only wait for each other
    session = Session(out, seconds, options.tiny)
    passed = options.skip_tests or session.tests(min(TESTS_SECONDS, TESTS_SHARE * seconds))
    session.rows("rows that tell most", ["--first"], kept=AFTERWARDS_SECONDS)
    session.script("losses of 50 captured steps", "csrc_bench.captured_losses", "losses.txt")
    session.script("profile of the training step", "csrc_bench.bench_training_step", "profile.txt")
    session.rows("all other rows", [])
    return int(not passed)


if __name__ == "__main__":
    sys.exit(main())
