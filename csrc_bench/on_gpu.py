"""One command for a GPU machine: runs the kernel tests there, then the benchmarks. A checkout is enough.

    python -m csrc_bench.on_gpu --out DIR --minutes 8

The most important rows come first, and each row is written as soon as it is measured, so that nothing is lost when the
time is up. The same command with the same DIR measures the rows that are missing. DIR then holds summary.txt (read this
first), results.json, tests.txt, tests.xml, profile.txt and benchmarks.txt.
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
from pathlib import Path

from csrc_bench import compare

ROOT = Path(__file__).parents[1]
TESTS_SHARE = 0.35  # of the time, at most
OPS = [f"csrc_bench/bench_{name}.py" for name in ("linear_logprob", "grouped_lora", "lora_linears", "renyi_reduce")]
STEP, RAGGED, PARTS = (f"csrc_bench/bench_{name}.py" for name in ("training_step", "ragged_step", "step_parts"))
BENCHMARKS = [
    ("fused loss, the bar", [OPS[0], "-k", "bar_qwen2 and both"]),
    ("low-rank updates, the bars", [OPS[1], OPS[2], "-k", "bar_qwen2 and both and not compile"]),
    ("training step, the bar", [STEP, "-k", "bar_qwen2_all and not compile"]),
    ("profile of the training step", None),
    ("training step on real lengths, the bars, without PEFT", [RAGGED, "-k", "bar and not peft"]),
    ("parts of the training step", [PARTS]),
    ("training step, the other bars", [STEP, "-k", "bar and not compile"]),
    ("training step on real lengths, the bars", [RAGGED, "-k", "bar"]),
    ("ops, the bars", [*OPS, "-k", "bar"]),
    ("training step, the bar, layers compiled", [STEP, "-k", "bar_qwen2_all and ours_compile"]),
    ("training step, sweeps", [STEP, "-k", "not compile"]),
    ("training step on real lengths, sweeps", [RAGGED]),
    ("ops, sweeps", OPS),
    ("training step, compiled", [STEP]),
]


def run(command: list[str], log: Path, seconds: float) -> str:
    """Run a command for at most `seconds`, and add its output to `log`. Returns how it ended, in words."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}", "HF_HUB_OFFLINE": "1"}
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


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m csrc_bench.on_gpu", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for the results")
    parser.add_argument("--minutes", type=float, default=8.0, help="time for everything (default: 8)")
    parser.add_argument("--skip-tests", action="store_true", help="run the benchmarks only")
    parser.add_argument("--tiny", action="store_true", help="very small shapes, to see whether everything runs")
    options = parser.parse_args(arguments)
    total = 60 * options.minutes
    end = time.monotonic() + total
    out = options.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    results, log = out / "results.json", out / "benchmarks.txt"
    tiny = ["--tiny"] if options.tiny else []
    stages: list[str] = []

    def note(stage: str) -> None:
        stages.append(stage)
        print(stage, flush=True)
        tables = compare.text(compare.load([results])) if results.exists() else ""
        (out / "summary.txt").write_text("\n".join(stages) + "\n\n" + tables)

    failed = False
    if not options.skip_tests:
        # test_aot compiles without a GPU, and says nothing about this one
        tests = ["-m", "pytest", "tests/renyi_kernels", "--ignore=tests/renyi_kernels/test_aot.py"]
        tests += ["-p", "no:cacheprovider", "--continue-on-collection-errors"]
        if importlib.util.find_spec("xdist"):  # most of the time is compiling
            tests += ["-n", str(min(8, os.cpu_count() or 1))]
        ended = run([*tests, f"--junit-xml={out / 'tests.xml'}"], out / "tests.txt", TESTS_SHARE * total)
        failed = not ended.startswith("done")
        note(f"kernel tests: {ended}: {last_line(out / 'tests.txt')}")
    for name, selection in BENCHMARKS:
        left = end - time.monotonic()
        if left < 10:
            note(f"{name}: no time left")
            continue
        if selection is None:
            (out / "profile.txt").unlink(missing_ok=True)
            note(f"{name}: {run(['-m', 'csrc_bench.bench_training_step', *tiny], out / 'profile.txt', left)}")
            continue
        command = ["-m", "pytest", *selection, *tiny, "-p", "no:cacheprovider", "-rsx", "--tb=short"]
        # no row starts in the last seconds, so that the last one can finish
        command += ["--results", str(results), "--seconds", f"{left - 8:.0f}"]
        note(f"{name}: {run(command, log, left)}: {last_line(log)}")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
