"""Runs that are killed at a system call, or stopped by SIGTERM, and then continued: they must leave what an undisturbed
run leaves, bit by bit.
"""

from __future__ import annotations

import random
import re
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .runs import CRASHED, INTERRUPTED, OBJECTIVES, STEPS, Bench, Ended, bench_in, command, differences
from .strikes import Calls, Strike
from .tally import Tally

MOST_ATTEMPTS = 8


class Attack:
    def __init__(self, bench: Bench, seed: int, tally: Tally) -> None:
        self.bench, self.seed, self.tally = bench, seed, tally
        points = [(objective, call + 1) for objective in OBJECTIVES for call in range(bench.num_calls[objective])]
        self.points = random.Random(seed).sample(points, len(points))
        """Where each try strikes first: every call of both objectives once, before one comes again."""
        tally.counts["calls to be killed at"] = len(points)

    def one_try(self, number: int) -> None:
        """One run that is struck once or more, continued to its end, and compared with the undisturbed one."""
        rng = random.Random(f"{self.seed}/{number}")
        objective, first_call = self.points[number % len(self.points)]
        run, truth = self.bench.new("run"), self.bench.undisturbed[objective]
        going_back = rng.random() < 0.15
        others: dict[str, Any] = {}
        if going_back:
            # to an older checkpoint of a finished run, from where more is saved and less is kept
            shutil.copytree(truth, run)
            (run / "config.yaml").write_text((truth / "config.yaml").read_text().replace(str(truth), str(run)))
            others = {"save_steps": 1, "save_total_limit": 2}
            resume = str(run / f"checkpoint-{STEPS - 4}")
        else:
            resume = ""
        story: list[str] = []
        strikes = rng.choice((1, 1, 2, 2, 3))
        for attempt in range(MOST_ATTEMPTS):
            call = first_call if attempt == 0 else rng.randint(1, self.bench.num_calls[objective])
            strike = self._strike(rng, call, self.bench.seconds[objective]) if attempt < strikes else None
            resumed = {"resume_from_checkpoint": resume} if resume else {}
            argv = self.bench.argv(objective, run, **others, **resumed)
            ended = self._run(argv, run, strike)
            story.append(f"{f'{strike}: ' if strike else ''}{command(argv)}\n  -> {_outcome(ended)}")
            problem = self._judge(ended, strike, run, resume)
            if problem:
                self._fail(objective, going_back, problem, story)
                break
            if ended.code == 0:
                stopped = any(f"exit {INTERRUPTED}" in line for line in story)
                problems = list(differences(run, truth, other_checkpoints=stopped or going_back, set_aside=going_back))
                for problem in problems:
                    self._fail(objective, going_back, problem, story)
                self.tally.equal += not problems
                break
            resume = "true" if (run / "config.yaml").exists() else ""
        else:
            self._fail(objective, going_back, "never ends: no attempt came through", story)
        shutil.rmtree(run, ignore_errors=True)

    def _strike(self, rng: random.Random, call: int, seconds: float) -> Strike:
        signum = signal.SIGTERM if rng.random() < 0.2 else signal.SIGKILL
        return Strike(signum, after_s=rng.uniform(0, seconds)) if rng.random() < 0.2 else Strike(signum, call)

    def _run(self, argv: list[str], run: Path, strike: Strike | None) -> Ended:
        if strike is None:
            return self.bench.run(argv)
        if strike.call is not None:
            child = self.bench.start(argv, Calls(run, strike, run).watch)
        else:
            child = self.bench.start(argv)
            while time.monotonic() - child.started < strike.after_s and child.poll() is None:
                time.sleep(0.001)
            child.send(strike.signum)
        return child.wait()

    def _judge(self, ended: Ended, strike: Strike | None, run: Path, resume: str) -> str:
        """What is wrong with how a command ended; empty if nothing is."""
        if ended.code == 0:
            return ""
        if strike and ended.code == -strike.signum:
            self.tally.counts["kills" if strike.signum == signal.SIGKILL else "SIGTERM before the first step"] += 1
            return ""
        if ended.code == INTERRUPTED and strike and strike.signum == signal.SIGTERM:
            self.tally.counts["SIGTERM"] += 1
            saved = re.search(r"saved as ([^;\n]+);", ended.said)
            if not saved or not Path(saved[1]).is_dir():
                return f"exit {INTERRUPTED} names a checkpoint that is not there: {ended.last_line}"
            return ""
        if ended.code == CRASHED:
            return f"traceback: {ended.last_line}"
        return f"exit {ended.code} {'when resumed' if resume else 'when started anew'}: {ended.last_line}"

    def _fail(self, objective: str, going_back: bool, problem: str, story: list[str]) -> None:
        what, _, _ = problem.partition(": ")
        back = ", after going back to an older checkpoint" * going_back
        self.tally.fail(f"{objective}{back}: {what}", "\n".join([problem, *story]))


def _outcome(ended: Ended) -> str:
    struck = re.search(r"\[torture\] (.*)", ended.said)
    at = f" ({struck[1]})" if struck else ""
    if ended.code < 0:
        return f"{signal.Signals(-ended.code).name}{at}"
    return f"exit {ended.code}{at}" + (f": {ended.last_line}" if ended.code else "")


@contextmanager
def prepare(seed: int, tally: Tally, folder: Path) -> Iterator[Callable[[int], None]]:
    yield Attack(bench_in(folder), seed, tally).one_try
