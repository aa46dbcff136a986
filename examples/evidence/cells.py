"""Trains what an experiment needs, one cell after the other, and keeps what was answered.

A cell is one training: a variant, a method and a seed. It is a file, written when it is whole, so an experiment may be
stopped and started again. Several processes may work on one folder: each takes a cell that no other works on.

    OUTPUT/contested/cpu/camps=1,share=0.67/K=4/alpha_0.8-0.npz     what was answered
    OUTPUT/contested/cpu/camps=1,share=0.67/K=4/alpha_0.8-0/        the run: its report, its particles
    OUTPUT/contested/cpu/camps=1,share=0.67/lora-0-member-3.npz     a single adapter, for ensembles of every K
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import FileLock, Timeout

from examples.evidence import mc_dropout, methods
from examples.evidence.experiment import Answers, Data, Experiment, Setting, Variant
from examples.evidence.methods import DROPOUT, ENSEMBLE, FITTED, METHODS, SINGLE
from renyi_engine.base_model import load_model, load_tokenizer
from renyi_engine.ensemble import ModelConfig
from renyi_engine.objectives import fit_particle_weights

COSTS = ("seconds", "tokens", "parameters")


@dataclass(frozen=True)
class Cell:
    """A training that has to be done. num_particles is 1, and `member` says which one it is, for a single adapter."""

    data: tuple[tuple[str, Any], ...]
    method: str
    num_particles: int
    seed: int
    member: int = 0

    @property
    def name(self) -> str:
        data = ",".join(f"{name}={value}" for name, value in self.data) or "data"
        if METHODS[self.method].kind == SINGLE:
            return f"{data}/{self.method}-{self.seed}-member-{self.member}"
        if METHODS[self.method].kind == DROPOUT:
            return f"{data}/{self.method}-{self.seed}"
        return f"{data}/K={self.num_particles}/{self.method}-{self.seed}"


def refuse_other(path: Path, made_with: list, expected: list) -> None:
    """End the program if what is kept at `path` was made with other settings than are expected now."""
    if made_with != expected:
        raise SystemExit(f"{path}: made with {made_with}, but the experiment now says {expected}; remove it")


@dataclass
class Work:
    """The cells of an experiment in one setting, under `folder`. `changes` are to that setting: another model, say."""

    experiment: Experiment
    setting_name: str
    folder: Path
    source: Path | None
    changes: Mapping[str, Any] = field(default_factory=dict)

    @property
    def setting(self) -> Setting:
        return replace(self.experiment.settings[self.setting_name], **self.changes)

    def setting_of(self, of: Variant | Cell) -> Setting:
        """The setting in which a variant or a cell is trained."""
        return replace(self.experiment.setting_of(self.setting_name, dict(of.data)), **self.changes)

    def cells(self) -> Iterator[Cell]:
        """Every training, one variant after the other. Some come more than once."""
        for variant in self.experiment.variants(self.setting_name):
            yield from self.cells_of(variant)

    def cells_of(self, variant: Variant) -> Iterator[Cell]:
        """The trainings that a variant needs."""
        for seed in range(self.setting.seeds):
            yield from self._of_seed(variant, seed)

    def is_done(self, variant: Variant) -> bool:
        """Whether everything that a variant needs was trained."""
        return len(self.seeds_done(variant)) == self.setting.seeds

    def seeds_done(self, variant: Variant) -> list[int]:
        """The seeds with which every method of a variant was trained."""
        return [
            seed
            for seed in range(self.setting.seeds)
            if all(self._path(cell).exists() for cell in self._of_seed(variant, seed))
        ]

    def run(self) -> int:
        """Do every training that is neither done nor being done elsewhere. Returns how many others are doing."""
        for cell in self.cells():
            if self._path(cell).exists():
                self._read(cell)  # answers of another setting are refused before anything is trained
        left, loaded = 0, None
        for cell in self.cells():
            path = self._path(cell)
            if path.exists():
                continue
            path.parent.mkdir(parents=True, exist_ok=True)
            try:
                with FileLock(path.with_suffix(".lock"), timeout=0):
                    if not path.exists():
                        loaded = loaded or self._load()
                        self._train(cell, path, *loaded)
            except Timeout:
                left += 1
        return left

    def answers(self, variant: Variant, method: str, seed: int) -> tuple[Answers, dict[str, float]]:
        """What a method answered, and its costs."""
        how = METHODS[method]
        kept = [self._read(cell) for cell in self._trainings(variant, method, seed)]
        logp = torch.from_numpy(np.concatenate([one["logp"] for one in kept]))
        weights = torch.full((len(logp),), 1 / len(logp), dtype=torch.float64)
        if how.kind == FITTED:
            weights = fit_particle_weights(torch.from_numpy(np.concatenate([one["held_out_logp"] for one in kept])))
        elif how.kind == methods.TOGETHER:
            weights = torch.from_numpy(kept[0]["weights"])
        names = [name.removeprefix(methods.MORE) for name in kept[0] if name.startswith(methods.MORE)]
        more = {name: np.concatenate([one[methods.MORE + name] for one in kept]) for name in names}
        data = self.data(variant, seed)
        asked = {"asked": np.array([repr(question.prompt) for question in data.questions])}
        answers = Answers(logp, weights, {**asked, **data.facts}, more)
        answers = replace(answers, facts={**answers.facts, **self.experiment.derived(answers)})
        return answers, {cost: float(sum(one[cost] for one in kept)) for cost in COSTS}

    def run_folder(self, variant: Variant, method: str, seed: int) -> Path:
        """The run of a method, or of the first of its single adapters."""
        return self._path(self._trainings(variant, method, seed)[0]).with_suffix("")

    def made_with(self, variant: Variant, method: str, seed: int) -> list:
        """What the answers of a method depend on, as JSON keeps it."""
        return self._made_with(self._trainings(variant, method, seed)[0])

    @property
    def model_path(self) -> str:
        """The folder or the hub id of the model. SmolLM2 is fetched if it is not there."""
        name = self.setting.model
        if name != "SmolLM2-135M-Instruct":
            return name
        from examples.contested import smollm2

        return str(smollm2.obtain())

    def data(self, of: Variant | Cell, seed: int) -> Data:
        return self.experiment.data(dict(of.data), seed, self.source)

    def _of_seed(self, variant: Variant, seed: int) -> Iterator[Cell]:
        for method in variant.methods:
            yield from self._trainings(variant, method, seed)

    def _trainings(self, variant: Variant, method: str, seed: int) -> list[Cell]:
        """The trainings that a method needs: a deep ensemble is K single adapters, and the first of them is the
        "one LoRA" of the tables."""
        how, data, K = METHODS[method], tuple(sorted(variant.data.items())), variant.num_particles
        if how.kind == FITTED:
            return self._trainings(variant, how.fits, seed)
        if how.kind in (SINGLE, ENSEMBLE):
            return [Cell(data, "lora", 1, seed, member) for member in range(K if how.kind == ENSEMBLE else 1)]
        if how.kind == DROPOUT:
            return [Cell(data, method, 1, seed)]
        return [Cell(data, method, K, seed)]

    def _path(self, cell: Cell) -> Path:
        return self.folder / self.experiment.home(dict(cell.data)) / self.setting_name / f"{cell.name}.npz"

    def _read(self, cell: Cell) -> dict[str, np.ndarray]:
        with np.load(self._path(cell), allow_pickle=False) as kept:
            refuse_other(self._path(cell), json.loads(str(kept["setting"])), self._made_with(cell))
            return {name: kept[name] for name in kept.files}

    def _made_with(self, cell: Cell) -> list:
        """What a cell's answers depend on, as JSON keeps it."""
        settings = asdict(self.setting_of(cell)) | {"seeds": None}
        return json.loads(json.dumps([settings, cell.num_particles, METHODS[cell.method].settings]))

    def _load(self) -> tuple:
        config = ModelConfig(model_name_or_path=self.model_path, dtype=self.setting.dtype)
        return load_model(config), load_tokenizer(config)

    def _train(self, cell: Cell, path: Path, model, tokenizer) -> None:
        data, how, run = self.data(cell, cell.seed), METHODS[cell.method], path.with_suffix("")
        setting = self.setting_of(cell)
        print(f"--- {self.experiment.name} {cell.name}", flush=True)
        if how.kind == DROPOUT:
            found = mc_dropout.train(model, tokenizer, setting, data, cell.seed)
        else:
            seed = 1000 * cell.seed + cell.member
            ask_more = self.experiment.ask_more
            found = methods.train(
                model, tokenizer, setting, data, cell.num_particles, how.settings, seed, run, ask_more
            )
        unfinished = path.with_suffix(".unfinished")
        with unfinished.open("wb") as file:
            np.savez(file, setting=np.array(json.dumps(self._made_with(cell))), **found)
        unfinished.rename(path)
