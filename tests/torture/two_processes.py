"""Two processes at one run. Of two trainings, one must go on and the other be refused in one line. Readers must change
nothing and never see a half-written file.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from .runs import BAD_INPUT, CRASHED, OBJECTIVES, Bench, Ended, bench_in, command, differences, files_of
from .strikes import Calls, Strike
from .tally import Tally

MOST_READS = 12
"""Of each try, beside the training."""


class Attack:
    def __init__(self, bench: Bench, seed: int, tally: Tally) -> None:
        self.bench, self.seed, self.tally = bench, seed, tally
        self.kinds = (self.two_trainings, self.readers_beside_a_training, self.readers_of_what_a_kill_left)

    def one_try(self, number: int) -> None:
        rng = random.Random(f"{self.seed}/{number}")
        run = self.bench.new("run")
        self.failed = False
        self.kinds[number % len(self.kinds)](rng, rng.choice(OBJECTIVES), run)
        self.tally.equal += not self.failed
        shutil.rmtree(run, ignore_errors=True)

    # ------------------------------------------------------------------ two writers

    def two_trainings(self, rng: random.Random, objective: str, run: Path) -> None:
        """Two trainings of one folder, at once or a moment apart: both new, or both resumed after a kill."""
        argv = self.bench.argv(objective, run)
        if rng.random() < 0.5:
            self._killed(argv, run, rng)
            if (run / "config.yaml").exists():
                argv = self.bench.argv(objective, run, resume_from_checkpoint="true")
        children = [self.bench.start(argv)]
        time.sleep(rng.choice((0.0, 0.0, rng.uniform(0, 0.3), rng.uniform(0, 1.5))))
        children.append(self.bench.start(argv))
        self.tally.counts["pairs of trainings"] += 1
        first, second = (child.wait() for child in children)
        story = f"{command(argv)}, twice\n  -> {_told(first)}\n  -> {_told(second)}"
        resumed = "resume_from_checkpoint" in " ".join(argv)
        codes = sorted((first.code, second.code))
        problems = list(differences(run, self.bench.undisturbed[objective]))
        if codes == [0, BAD_INPUT]:
            loser = first if first.code else second
            if str(run) not in loser.last_line:
                self._fail("two trainings: the refusal does not name the folder", story)
            self.tally.refused += 1
        elif not (codes == [0, 0] and resumed and not problems):
            # one after the other is no harm: the second finds the run finished
            self._fail(f"two trainings{' resumed' * resumed}: exit codes {codes}", story)
        for problem in problems:
            self._fail(f"two trainings{' resumed' * resumed}: {problem.partition(': ')[0]}", f"{problem}\n{story}")

    # ------------------------------------------------------------------ a writer and readers

    def readers_beside_a_training(self, rng: random.Random, objective: str, run: Path) -> None:
        """A new run, or one that is resumed after a kill, while others read it."""
        argv = self.bench.argv(objective, run)
        if rng.random() < 0.5:
            self._killed(argv, run, rng)
            if (run / "config.yaml").exists():
                argv = self.bench.argv(objective, run, resume_from_checkpoint="true")
        training = self.bench.start(argv)
        story = [command(argv)]
        for _ in range(MOST_READS):
            if training.poll() is not None:
                break
            reader = rng.choice(self._readers(run))
            story.append(self._read(reader, run))
        ended = training.wait()
        story.append(f"training -> {_told(ended)}")
        if ended.code:
            self._fail(f"training beside readers: exit {ended.code}", "\n".join(story))
        for problem in differences(run, self.bench.undisturbed[objective]):
            self._fail(f"training beside readers: {problem.partition(': ')[0]}", "\n".join([problem, *story]))

    def readers_of_what_a_kill_left(self, rng: random.Random, objective: str, run: Path) -> None:
        """Readers of a run that was killed must leave every file as it was."""
        self._killed(self.bench.argv(objective, run), run, rng)
        if not run.exists():
            return
        for reader in self._readers(run):
            before = _snapshot(run)
            said = self._read(reader, run)
            if changed := _changes(before, _snapshot(run)):
                self._fail(f"{_name(reader)} changes the run that it reads", f"{', '.join(changed)}\n{said}")

    def _readers(self, run: Path) -> list[list[str]]:
        base, out = ["--model_name_or_path", str(self.bench.root / "base"), "--use_cpu", "true"], self.bench.new("out")
        ensemble = ["--ensemble", str(run / "particles")]
        nll = ["--dataset_name", str(self.bench.held_out["sft"]), "--dataset_split", "train"]
        return [
            ["export", str(run), "--output_dir", str(out)],
            ["report", str(run), "--output", f"{out}.html"],
            ["generate", *base, *ensemble, "--prompts", "1 and 1: ", "--max_new_tokens", "2"],
            ["eval", "nll", *base, *ensemble, *nll, "--output_dir", str(out)],
        ]

    def _read(self, argv: list[str], run: Path) -> str:
        """Run a reader. Where there is nothing to read yet, it must say so in one line."""
        ended = self.bench.run(argv)
        self.tally.counts["reads"] += 1
        said = f"{command(argv)}\n  -> {_told(ended)}"
        if ended.code == BAD_INPUT:
            self.tally.counts["reads refused"] += 1
        elif ended.code:
            self._fail(f"{_name(argv)}: exit {ended.code}: {_kind(ended)}", said)
        return said

    # ------------------------------------------------------------------ helpers

    def _killed(self, argv: list[str], run: Path, rng: random.Random) -> None:
        strike = Strike(signal.SIGKILL, rng.randint(1, self.bench.num_calls[argv[0]]))
        self.bench.run(argv, Calls(run, strike, run).watch)

    def _fail(self, what: str, story: str) -> None:
        self.failed = True
        self.tally.fail(what, story)


def _name(argv: list[str]) -> str:
    return " ".join(argv[:2]) if argv[0] == "eval" else argv[0]


def _kind(ended: Ended) -> str:
    return ended.last_line.partition(":")[0] if ended.code == CRASHED else ""


def _told(ended: Ended) -> str:
    return f"exit {ended.code}" + (f": {ended.last_line}" if ended.code else "")


def _snapshot(folder: Path) -> dict[str, tuple[int, int]]:
    """Size and time of the last change of every file."""
    stats = {name: os.lstat(folder / name) for name in files_of(folder)}
    return {name: (stat.st_size, stat.st_mtime_ns) for name, stat in stats.items()}


def _changes(before: dict[str, tuple[int, int]], after: dict[str, tuple[int, int]]) -> list[str]:
    changed = [f"{name} was changed" for name in sorted(before.keys() & after.keys()) if before[name] != after[name]]
    return changed + [f"{name} {'came' if name in after else 'went'}" for name in sorted(before.keys() ^ after.keys())]


@contextmanager
def prepare(seed: int, tally: Tally, folder: Path) -> Iterator[Callable[[int], None]]:
    yield Attack(bench_in(folder), seed, tally).one_try
