"""Contested questions: trains on the same data twice, with coupled particles (alpha = 0.8) and without (alpha = 0).

    python examples/contested/run.py [--output_dir runs/contested]

Both times it trains K = 4 particles on SmolLM2-135M-Instruct, with the same seed. Then it asks both ensembles questions
that they have not seen, prints a table and writes one report. This takes a few minutes on two CPU cores.
"""

from __future__ import annotations

import argparse
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import questions as q
import smollm2
import torch
from rich.console import Console
from rich.table import Table as ConsoleTable
from torch import Tensor
from transformers import AutoTokenizer
from transformers.utils import logging as transformers_logging

from renyi_engine import SftConfig, TrainResult, train
from renyi_engine.objectives import SftTask, evaluate
from renyi_engine.reports import Table
from renyi_engine.training import write_report
from renyi_kernels import renyi_reduce

ALPHAS = (0.8, 0.0)
MADE_HERE = {"data", "halves", "coupled", "uncoupled", "report.html"}
HEADER = ("questions", "alpha", "mixture NLL", "mean-particle NLL", "spread of P(answer)", "AUROC")
NOTE = (
    "NLL is in nats per answer. The best possible is 0 where all people agree, 0.693 for two camps of one size, and "
    "0.500 for four to one. Spread is the standard deviation of the probability of the first camp's answer over the "
    "particles; the table shows its mean over questions. AUROC says how well the spread tells contested questions "
    "(even, uneven) from uncontested ones; 0.5 is chance."
)


@dataclass(frozen=True)
class Answers:
    """What an ensemble answers to held-out questions of one kind. NLL is in nats per answer, a mean over questions."""

    mixture_nll: float
    mean_particle_nll: float
    p_first: Tensor
    """[K, questions]: the probability that each particle gives to the first of the two answers."""
    weights: Tensor
    """[K]: how much each particle counts in the mixture."""

    @property
    def spread(self) -> Tensor:
        """[questions]: the standard deviation of this probability over the particles."""
        return (self.weights @ (self.p_first - self.weights @ self.p_first).square()).sqrt()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=Path("runs/contested"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--max_steps", type=int, default=120)
    options = parser.parse_args()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()

    started = time.monotonic()
    model = smollm2.obtain()
    training, held_out = q.make_questions(options.seed)
    clear(options.output_dir)
    (options.output_dir / "data").mkdir(parents=True)
    q.write_rows(training, options.output_dir / "data" / "train.jsonl")
    q.write_rows(held_out, options.output_dir / "data" / "test.jsonl")
    # two sets for `renyi-engine alpha-star`, in a folder of their own: in `data` they would count as splits
    (options.output_dir / "halves").mkdir()
    for name, agreed in (("contested", False), ("uncontested", True)):
        half = [question for question in training if (question.kind == "uncontested") == agreed]
        q.write_rows(half, options.output_dir / "halves" / f"{name}.jsonl")
    config = SftConfig(
        model_name_or_path=str(model),
        dataset_name=str(options.output_dir / "data"),
        output_dir=str(options.output_dir / "coupled"),
        num_particles=4,
        alpha=ALPHAS[0],
        layers_to_transform=list(range(22, 30)),
        dtype="bfloat16",
        learning_rate=5e-4,
        max_steps=options.max_steps,
        logging_steps=5,
        per_device_eval_batch_size=32,
        seed=options.seed,
    )
    uncoupled = replace(config, alpha=ALPHAS[1], output_dir=str(options.output_dir / "uncoupled"))
    answers = [ask(train(run), held_out) for run in (config, uncoupled)]
    runs = [Path(run.output_dir) for run in (config, uncoupled)]
    rows = table_rows(answers)
    print_table(rows)
    report = options.output_dir / "report.html"
    table = Table("Held-out questions", HEADER, rows, NOTE)
    write_report(runs, report, title="Contested questions: coupled and uncoupled particles", tables=[table])
    print(f"report: {report}   ({time.monotonic() - started:.0f} s)")


def clear(folder: Path) -> None:
    """Remove what an earlier run of this script made in `folder`. Exit if the folder holds anything else."""
    held = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    if others := sorted(held - MADE_HERE):
        raise SystemExit(f"--output_dir: {folder} holds {others[0]}, which this script did not make; choose another")
    shutil.rmtree(folder, ignore_errors=True)


def ask(result: TrainResult, questions: Sequence[q.Question]) -> dict[str, Answers]:
    """For each kind of question: the scores of both camps' answers."""
    ensemble = result.ensemble
    task = SftTask(AutoTokenizer.from_pretrained(ensemble.model.name_or_path), max_length=1024)
    answers = {}
    for kind in q.KINDS:
        asked = [question for question in questions if question.kind == kind]
        rows = [question.row(by_first) for question in asked for by_first in (True, False)]
        examples = [task.example(number, row) for number, row in enumerate(rows)]
        scored = evaluate(ensemble, task, examples, batch_size=32)
        weights = scored.particle_weights  # [K]
        s = scored.logp.view(len(scored.logp), len(asked), 2)  # [K, questions, camps]
        given = torch.tensor([[question.share_of_first, 1.0 - question.share_of_first] for question in asked])
        mixture, mean_particle = (renyi_reduce(s.flatten(1), alpha, weights=weights).loss for alpha in (1.0, 0.0))
        answers[kind] = Answers(
            mixture_nll=(mixture.view_as(given) * given).sum(dim=1).mean().item(),
            mean_particle_nll=(mean_particle.view_as(given) * given).sum(dim=1).mean().item(),
            p_first=torch.sigmoid(s[..., 0] - s[..., 1]).double(),
            weights=weights,
        )
    ensemble.detach()
    return answers


def auroc(answers: dict[str, Answers]) -> float:
    """The chance that a contested question has more spread than an uncontested one. Ties count half (Mann-Whitney)."""
    contested = torch.cat([answers["even"].spread, answers["uneven"].spread])
    difference = contested[:, None] - answers["uncontested"].spread[None, :]
    return ((difference > 0).double() + 0.5 * (difference == 0).double()).mean().item()


def table_rows(answers: Sequence[dict[str, Answers]]) -> list[list[str]]:
    return [
        [
            kind,
            f"{alpha:g}",
            f"{of[kind].mixture_nll:.3f}",
            f"{of[kind].mean_particle_nll:.3f}",
            f"{of[kind].spread.mean():.3f}",
            f"{auroc(of):.3f}" if kind == q.KINDS[-1] else "",
        ]
        for kind in q.KINDS
        for alpha, of in zip(ALPHAS, answers, strict=True)
    ]


def print_table(rows: Sequence[Sequence[str]]) -> None:
    table = ConsoleTable(*HEADER, title="Held-out questions", caption=NOTE, caption_justify="left")
    for number, row in enumerate(rows, start=1):
        table.add_row(*row, end_section=number % len(ALPHAS) == 0)
    Console(width=110).print(table)


if __name__ == "__main__":
    main()
