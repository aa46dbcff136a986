"""`renyi-engine eval nll`: score the rows of a data set, diagnose each example, and write what was found.

Layout: K particles, N examples, B sequences, T tokens.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from renyi_engine.core import CONFIG_FILE, files, output_folder, to_yaml
from renyi_engine.data import Example, Row, excerpt, load_splits
from renyi_engine.ensemble import LoraEnsemble, sum_tokens
from renyi_engine.evaluation.config import NllConfig
from renyi_engine.evaluation.diagnosis import (
    CONTESTED,
    OUT_OF_SUPPORT,
    Diagnosis,
    check_calibration,
    diagnose,
    gain_over_base,
    support_limit,
    token_disagreement,
)
from renyi_engine.evaluation.subject import Subject, load_subject
from renyi_engine.objectives import Evaluation, Scores, SftTask, check_fits, describe_rows, evaluate, read_items
from renyi_engine.reports import Section, Table, scatter, write_page

SHOWN = 25
"""Examples of each kind in the report; the table on disk has all."""
FLAGGED_BY = ("disagreement", "gain_over_base_nats_per_token")
NLLS = ("best_particle_nll_nats_per_token", "mixture_nll_nats_per_token", "base_nll_nats_per_token")
TABLE_HEADER = ("row", "disagreement", "gain", "ESS", "entropy", "best", "its NLL", "mixture's", "base's", "example")


def evaluate_nll(config: NllConfig) -> str:
    """Diagnose every example. examples.csv, results.json and report.html are written into `config.output_dir`.

    Returns:
        What was found, in a few lines of text.

    Raises:
        ValueError: the data, the model or the ensemble cannot be used, or output_dir is not empty.
    """
    rows, calibration_rows = _read_rows(config)
    with output_folder.claimed(Path(config.output_dir)) as folder:
        subject = load_subject(config)
        ensemble, alpha = subject.ensemble, subject.require_alpha()
        if alpha == 0:
            raise ValueError(
                f"alpha: {config.ensemble} was trained at 0, where all responsibilities are 1/K; pass --alpha 1"
            )
        if subject.num_particles < 2:
            raise ValueError(
                f"ensemble: expected at least 2 particles; {config.ensemble} holds {subject.num_particles}; "
                "choose an ensemble with more"
            )
        task = _WithDisagreement(subject.tokenizer, config.max_length)
        examples, lines = _examples(ensemble, task, rows, "dataset_name")
        min_gain = 0.0
        if calibration_rows:
            calibration, of_calibration = _examples(ensemble, task, calibration_rows, "calibration_dataset_name")
            check_calibration(len(calibration), config.calibration_share)
            lines += [f"calibration: {line}" for line in of_calibration]
            scored, base_logp = _score(ensemble, task, calibration, config.per_device_eval_batch_size)
            gains = gain_over_base(scored.logp, base_logp, scored.num_labels)
            min_gain = support_limit(gains, config.calibration_share)
        scored, base_logp = _score(ensemble, task, examples, config.per_device_eval_batch_size)
        disagreement, limits = scored.details["disagreement"], (config.min_disagreement, min_gain)
        found = diagnose(scored.logp, base_logp, disagreement, scored.num_labels, alpha, *limits)
        texts = [excerpt(subject.tokenizer, example) for example in examples]
        table = [Diagnosis(e.row, *values, text=text) for e, values, text in zip(examples, found, texts, strict=True)]
        return _write(config, folder, subject, table, min_gain, lines)


def _read_rows(config: NllConfig) -> tuple[Sequence[Row], Sequence[Row]]:
    """The rows to diagnose, and those of the calibration set, if there is one."""
    splits = load_splits(config.dataset_name, config.dataset_config, "dataset_name")
    rows = splits.rows(config.dataset_split, "dataset_split", NllConfig.dataset_split)
    if not config.calibration_dataset_name:
        return rows, []
    splits = load_splits(config.calibration_dataset_name, None, "calibration_dataset_name")
    default = NllConfig.calibration_dataset_split
    return rows, splits.rows(config.calibration_dataset_split, "calibration_dataset_split", default)


def _examples(
    ensemble: LoraEnsemble, task: SftTask, rows: Sequence[Row], setting: str
) -> tuple[list[Example], list[str]]:
    """The examples that the task makes of the rows, and which rows it dropped, in words."""
    examples, dropped = read_items(task, rows, setting)
    check_fits(ensemble.model, examples)
    return examples, describe_rows(examples, dropped)


def _score(
    ensemble: LoraEnsemble, task: SftTask, examples: Sequence[Example], batch_size: int
) -> tuple[Evaluation, Tensor]:
    """The scores of the examples under the particles, and their logp under the base, [N] nats.

    The base is scored as K particles whose B is zero. So it takes the path of the particles and rounds as they do, and
    particles that learnt nothing gain exactly nothing. In bfloat16, the logp of a base that runs by itself differs from
    this by up to 0.1 nats a token.
    """
    scored = evaluate(ensemble, task, examples, batch_size)
    stacked = [B for _, B in ensemble.stacked().values()]
    kept = [B.detach().clone() for B in stacked]
    with torch.no_grad():
        try:
            for B in stacked:
                B.zero_()
            base = evaluate(ensemble, task, examples, batch_size)
        finally:
            for B, values in zip(stacked, kept, strict=True):
                B.copy_(values)
    return scored, base.logp.amax(dim=0)


class _WithDisagreement(SftTask):
    """Supervised fine-tuning, whose scores also say how far the particles disagree about each sequence, [B]."""

    def score(self, ensemble: LoraEnsemble, batch: Mapping[str, Tensor]) -> Scores:
        logp = ensemble.token_logprob(batch)
        return Scores(sum_tokens(logp), {"disagreement": token_disagreement(logp)})


def _write(
    config: NllConfig, folder: Path, subject: Subject, table: Sequence[Diagnosis], min_gain: float, dropped: list[str]
) -> str:
    K = subject.num_particles
    files.write_text(folder / CONFIG_FILE, to_yaml(config))
    files.write_csv(folder / "examples.csv", table)
    kinds = {kind: [d for d in table if d.flag == kind] for kind in (CONTESTED, OUT_OF_SUPPORT)}
    mean = lambda name: sum(getattr(d, name) for d in table) / len(table)
    results: dict[str, Any] = {
        "num_examples": len(table),
        "alpha": subject.alpha,
        "min_disagreement": config.min_disagreement,
        "min_gain_nats_per_token": min_gain,
        **{kind.replace(" ", "_"): len(found) for kind, found in kinds.items()},
        **{f"mean_{name}": mean(name) for name in (*FLAGGED_BY, "ess_particles", *NLLS)},
        "dropped_rows": dropped,
    }
    files.write_json(folder / "results.json", results)
    report = _report(config, folder, K, table, kinds, results)
    counts = "\n".join(f"{kind}: {len(found)} of {len(table)} examples" for kind, found in kinds.items())
    means = f"mean ESS {results['mean_ess_particles']:.2f} of {K}, alpha {subject.alpha:g}"
    return "\n".join([*dropped, counts, means, f"table: {folder / 'examples.csv'}", f"report: {report}"])


def _report(
    config: NllConfig,
    folder: Path,
    K: int,
    table: Sequence[Diagnosis],
    kinds: dict[str, list[Diagnosis]],
    results: dict[str, Any],
) -> Path:
    min_gain = results["min_gain_nats_per_token"]
    picture = scatter(
        "examples",
        [d.gain_over_base_nats_per_token for d in table],
        [d.disagreement for d in table],
        [d.flag or "neither" for d in table],
        xlabel="gain of the best particle over the base (nats a token)",
        ylabel="disagreement of particles (probability)",
        vertical={f"out of support below {min_gain:.3g}": min_gain},
        horizontal={f"contested from {config.min_disagreement:g}": config.min_disagreement},
        caption=f"{len(table):,} examples of {config.dataset_name}.",
    )
    by_flag = {
        CONTESTED: (lambda d: -d.disagreement, "largest disagreement first"),
        OUT_OF_SUPPORT: (lambda d: d.gain_over_base_nats_per_token, "smallest gain first"),
    }
    tables = [
        Table(
            f"{kind[0].upper()}{kind[1:]}: {len(kinds[kind])} examples",
            TABLE_HEADER,
            [
                [
                    str(d.row),
                    *(f"{getattr(d, name):.3f}" for name in FLAGGED_BY),
                    f"{d.ess_particles:.3f}",
                    f"{d.responsibility_entropy_nats:.3f}",
                    str(d.best_particle),
                    *(f"{getattr(d, name):.3f}" for name in NLLS),
                    d.text,
                ]
                for d in sorted(kinds[kind], key=key)[:SHOWN]
            ],
            f"{order}; all of them are in examples.csv",
        )
        for kind, (key, order) in by_flag.items()
        if kinds[kind]
    ]
    sections = [
        Section(
            "Who explains which example",
            "At the top, particles learnt different things about an example: the data contradict each other there, or "
            "one row was put in to mislead. To the left of the line, no particle explains an example: nothing like it "
            "was learnt. At the bottom right is what all of them learnt.",
            pictures=[picture],
        ),
        Section(
            "Examples to look at",
            "NLLs are in nats a token. What was scored stands in [[ ]]. A flag is a reason to look, not a verdict.",
            tables=tables,
        ),
    ]
    return write_page(
        folder / "report.html",
        title="Diagnostics of examples",
        lead=f"{K} particles ({config.ensemble}) on {len(table):,} examples of {config.dataset_name}: who explains "
        "each of them, and whether any particle does.",
        sections=sections,
        words=[
            (
                "Responsibility",
                "A particle's share of an example: softmax over particles of alpha times log-likelihood.",
            ),
            (
                "Disagreement",
                "The largest difference between two particles' probabilities of one token of the example: from 0, all "
                "give it the same, to 1. Small differences are no dispute, however long the example is.",
            ),
            (
                "Gain over the base",
                "Log-likelihood of an example under the particle that explains it best, minus that under the base, in "
                "nats a token. Below 0, training made the example less likely for every particle.",
            ),
            ("Effective sample size (ESS)", f"How many particles share an example: from 1, one takes it all, to {K}."),
            ("Entropy", f"Of the responsibilities, in nats: from 0, one takes all, to {math.log(K):.2f}."),
            ("NLL", "Negative log-likelihood of a token, in nats; lower is better."),
        ],
        details={"settings": asdict(config), "results": results},
    )
