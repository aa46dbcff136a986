"""Bits flipped and ends cut off in files that a run wrote. A reader must refuse such a file in one line that names it,
or fall back on the checkpoint before and name both, or get exactly what was written.
"""

from __future__ import annotations

import contextlib
import io
import random
import shutil
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from renyi_engine import DpoConfig, LoraEnsemble, SftConfig, base_model
from renyi_engine.training import checkpoint
from renyi_engine.training.dataset import load_dataset, make_task
from renyi_engine.training.export import export_particles
from renyi_engine.training.run_folder import RunFolder

from .runs import STEPS, Bench, bench_in
from .tally import Tally

ONE_IN = 20
"""One try of so many damages any file in any way; the others flip each bit of a checkpoint's JSON once."""


class Wrong(Exception):
    """A reader did none of what it may do."""


@dataclass(frozen=True)
class Reader:
    """Something that reads the run, and gives what it found for comparison."""

    name: str
    read: Callable[[], Any]
    truths: list[Any]
    """What it finds in the undamaged files, and, where it may fall back on another checkpoint, what it finds there."""


class Subject:
    """A run of each objective, and everything that reads them, in this process."""

    def __init__(self, bench: Bench) -> None:
        self.bench = bench
        self.run, self.dpo = (bench.undisturbed[objective] for objective in ("sft", "dpo"))
        self.newest, self.before = (self.run / f"checkpoint-{step}" for step in (STEPS, STEPS - 2))
        self.config = SftConfig(**bench.settings("sft", self.run, resume_from_checkpoint="true"))
        self.model = base_model.load_model(self.config)
        self.ensemble = LoraEnsemble.attach(self.model, self.config.ensemble_config())
        self.other_model = base_model.load_model(self.config)
        self.exported = bench.new("exported")
        resumed = [self._resume()]
        with _moved_away(self.newest):
            resumed.append(self._resume())
            exports = [self._export()]
        exports.insert(0, self._export())
        self.resume = Reader("resume", self._resume, resumed)
        self.newest_checkpoint = Reader("newest checkpoint", self._newest, resumed)
        self.export = Reader("export", self._export, exports)
        self.load = Reader("from_pretrained", self._load, [self._load()])
        self.prepare = self._reader_of_reference()

    def _resume(self) -> Any:
        """State, adapters and moments that a resumed run would go on with."""
        with RunFolder.open(self.config) as run:
            return self._of_checkpoint(run.resume_from)

    def _newest(self) -> Any:
        """The same without a look at the run's settings, which takes most of the time."""
        return self._of_checkpoint(checkpoint.newest(self.run))

    def _of_checkpoint(self, path: Path | None) -> Any:
        if path is None:
            raise Wrong("starts from step 0")
        values = self.ensemble.particles.values
        optimizer = torch.optim.AdamW([values], fused=True)
        state = checkpoint.load(path, self.ensemble, optimizer)
        return state, values.detach().clone(), dict(optimizer.state[values])

    def _export(self) -> Any:
        """Every byte of the exported folders."""
        try:
            export_particles(self.run, self.exported)
            files = (path for path in sorted(self.exported.rglob("*")) if path.is_file())
            return {str(path.relative_to(self.exported)): path.read_bytes() for path in files}
        finally:
            shutil.rmtree(self.exported, ignore_errors=True)

    def _load(self) -> Any:
        ensemble = LoraEnsemble.from_pretrained(self.other_model, self.run / "particles")
        try:
            tensors = {path: torch.cat([x.detach().flatten() for x in sides])
                       for path, sides in ensemble.stacked().items()}  # fmt: skip
            return ensemble.config, ensemble.alpha, tensors
        finally:
            ensemble.detach()

    def _reader_of_reference(self) -> Reader:
        config = DpoConfig(**self.bench.settings("dpo", self.dpo))
        task = make_task(config)
        dataset = load_dataset(config, task)
        base = self.ensemble.base_fingerprint["digest"]
        [self.reference, *_] = sorted(self.dpo.glob("reference-*.safetensors"))
        kept = {path: path.read_bytes() for path in self.dpo.glob("reference-*.safetensors")}

        def read() -> Any:
            items, batch_size = (dataset.train, dataset.held_out), config.per_device_eval_batch_size
            try:
                return [
                    [pair.reference for pair in task.prepare(self.ensemble, part, self.dpo, batch_size, base)]
                    for part in items
                ]
            finally:
                for path, content in kept.items():
                    _put(path, content)

        return Reader("the reference of DPO", read, [read()])


@contextmanager
def _moved_away(folder: Path) -> Iterator[None]:
    elsewhere = folder.parent.parent / f"{folder.name}-moved-away"
    folder.rename(elsewhere)
    try:
        yield
    finally:
        elsewhere.rename(folder)


@dataclass(frozen=True)
class Damage:
    """What was done to a file."""

    what: str
    content: bytes

    @classmethod
    def bit(cls, content: bytes, number: int) -> Damage:
        flipped = bytearray(content)
        flipped[number // 8] ^= 1 << number % 8
        around = content[max(0, number // 8 - 25) : number // 8 + 5]
        return cls(f"bit {number % 8} of byte {number // 8} (after {bytes(around)!r})", bytes(flipped))

    @classmethod
    def draw(cls, content: bytes, rng: random.Random) -> Damage:
        kind = rng.choice(("bit", "bit", "bit", "cut", "cut", "other"))
        if kind == "bit" and content:
            return cls.bit(content, rng.randrange(8 * len(content)))
        if kind == "cut":
            length = rng.choice((0, 1, len(content) - 1, rng.randrange(len(content))))
            return cls(f"cut to {length} of {len(content)} bytes", content[:length])
        other = rng.choice((b"{}", b"[]", b"null", b"0", b'"text"', b"\0" * len(content), content + b"\0"))
        return cls(f"replaced by {other[:10]!r}", other)


class Attack:
    def __init__(self, subject: Subject, seed: int, tally: Tally) -> None:
        self.subject, self.seed, self.tally = subject, seed, tally
        s = subject
        json = [s.newest / name for name in ("manifest.json", "state.json")]
        self.bits = [(path, number) for path in json for number in range(8 * path.stat().st_size)]
        random.Random(seed).shuffle(self.bits)
        self.tally.counts["bits of the checkpoint's JSON there are"] = len(self.bits)
        particle = s.run / "particles" / "p000"
        tensors = [s.newest / name for name in ("adapters.safetensors", "optimizer.safetensors")]
        self.others: list[tuple[Path, Reader]] = [
            *((path, s.resume) for path in (*json, *tensors, s.run / "config.yaml")),
            *((path, s.export) for path in (*json, *tensors, s.run / "config.yaml")),
            (s.run / "particles" / "ensemble.json", s.load),
            (s.run / "particles" / "ensemble.json", s.load),
            *((particle / name, s.load) for name in ("adapter_config.json", "adapter_model.safetensors")),
            (s.reference, s.prepare),
        ]

    def one_try(self, number: int) -> None:
        nth, left = divmod(number, ONE_IN)
        bit = nth * (ONE_IN - 1) + left - 1
        if left and bit < len(self.bits):
            path, place = self.bits[bit]
            self.tally.counts["bits of the checkpoint's JSON flipped"] += 1
            self.one(path, self.subject.newest_checkpoint, Damage.bit(path.read_bytes(), place))
        else:
            rng = random.Random(f"{self.seed}/{number}")
            path, reader = rng.choice(self.others)
            self.one(path, reader, Damage.draw(path.read_bytes(), rng))

    def one(self, path: Path, reader: Reader, damage: Damage) -> None:
        """Damage a file, let it be read, and put it right again."""
        whole = path.read_bytes()
        _put(path, damage.content)
        problem = ""
        try:
            with warnings.catch_warnings(record=True) as caught, contextlib.redirect_stderr(io.StringIO()):
                warnings.simplefilter("always")
                found = reader.read()
            self._judge(found, reader, path, [str(warning.message) for warning in caught])
        except ValueError as error:
            problem = self._unclear(str(error), path)
            self.tally.refused += not problem
        except Wrong as wrong:
            problem = str(wrong)
        except Exception as error:
            problem = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        else:
            self.tally.equal += 1
        finally:
            _put(path, whole)
        if problem:
            what, _, _ = problem.partition(": ")
            self.tally.fail(
                f"{reader.name}, {path.name}: {what}",
                f"{problem}\n{path.relative_to(self.subject.bench.root)}: {damage.what}",
            )

    def _judge(self, found: Any, reader: Reader, path: Path, said: list[str]) -> None:
        if _equal(found, reader.truths[0]):
            return
        if len(reader.truths) > 1 and _equal(found, reader.truths[1]):
            self.tally.counts["fell back"] += 1
            names = str(path.parent), str(self.subject.before)
            if not any(all(name in line for name in names) for line in said):
                raise Wrong(f"falls back without naming both checkpoints: {said}")
            return
        raise Wrong(f"another result, silently: {said}")

    def _unclear(self, message: str, path: Path) -> str:
        """What is wrong with a refusal; empty if nothing is."""
        if "\n" in message and path.name != "config.yaml":  # a list of settings that differ has a line for each
            return f"refused in several lines: {message}"
        if path.name not in message and str(path.parent) not in message:
            return f"refused without naming the file: {message}"
        return ""


def _put(path: Path, content: bytes) -> None:
    """Write in place. `write_bytes` would empty the file first, which takes longer than to read a checkpoint."""
    if not path.exists():
        path.write_bytes(content)
        return
    with path.open("r+b") as file:
        file.write(content)
        if file.seek(0, 2) > len(content):
            file.truncate(len(content))


def _equal(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor):
        return isinstance(b, Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(_equal(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return type(a) is type(b) and len(a) == len(b) and all(map(_equal, a, b))
    return type(a) is type(b) and bool(a == b)


@contextmanager
def prepare(seed: int, tally: Tally, folder: Path) -> Iterator[Callable[[int], None]]:
    yield Attack(Subject(bench_in(folder)), seed, tally).one_try
