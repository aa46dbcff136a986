"""What an ensemble says of each example of a data set: who explains it, and whether anybody does (paper 3.4).

    contested or poisoned    one particle takes it: ESS at most `contested_ess` of K
    out of support           nobody explains it, and all alike: even the best particle's NLL is high, and ESS above that

Layout: K particles, N examples.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from renyi_engine import data, files, output_folder
from renyi_engine.config import CONFIG_FILE
from renyi_engine.eval_config import NllConfig
from renyi_engine.eval_pictures import scatter
from renyi_engine.evaluation import evaluate
from renyi_engine.page import Section, Table, write_page
from renyi_engine.predict import Subject, load_subject
from renyi_engine.rows import load_splits
from renyi_engine.settings import to_yaml
from renyi_engine.sft import SftTask
from renyi_engine.task import check_fits, describe_rows, read_items
from renyi_kernels import renyi_reduce

CONTESTED, OUT_OF_SUPPORT, PLAIN = "contested or poisoned", "out of support", ""
SHOWN = 25
"""Examples of each kind in the report; the table on disk has all."""
NLLS = ("best_particle_nll_nats_per_token", "mixture_nll_nats_per_token", "base_nll_nats_per_token")


@dataclass(frozen=True)
class Diagnosis:
    """One example, and its line of examples.csv."""

    row: int
    flag: str
    ess_particles: float
    responsibility_entropy_nats: float
    best_particle: int
    best_particle_nll_nats_per_token: float
    mixture_nll_nats_per_token: float
    base_nll_nats_per_token: float
    num_tokens: int
    text: str


def evaluate_nll(config: NllConfig) -> str:
    """Diagnose every example; examples.csv, results.json and report.html go to `config.output_dir`. What was found, in
    a few lines.

    Raises:
        ValueError: the data, the model or the ensemble cannot be used; or output_dir holds something.
    """
    splits = load_splits(config.dataset_name, config.dataset_config, "dataset_name")
    rows = splits.rows(config.dataset_split, "dataset_split", NllConfig.dataset_split)
    folder = output_folder.claim(Path(config.output_dir))
    subject = load_subject(config)
    alpha = subject.require_alpha()
    if alpha == 0:
        raise ValueError(f"alpha: {config.ensemble} was trained at 0, where every share is 1/K; pass --alpha 1")
    if subject.num_particles < 2:
        raise ValueError(f"ensemble: expected at least 2 particles; {config.ensemble} holds {subject.num_particles}")
    task = SftTask(subject.tokenizer, config.max_length)
    examples, dropped = read_items(task, rows, "dataset_name")
    check_fits(subject.ensemble.model, examples)
    scored = evaluate(subject.ensemble, task, examples, config.per_device_eval_batch_size)
    with subject.ensemble.disable_adapters():
        base = evaluate(subject.ensemble, task, examples, config.per_device_eval_batch_size)
    high = config.high_nll
    if high is None:
        high = torch.quantile((-scored.logp.amax(dim=0) / scored.num_labels).double(), config.high_quantile).item()
    texts = [data.excerpt(subject.tokenizer, example) for example in examples]
    found = diagnose(scored.logp, base.logp[0], scored.num_labels, alpha, config.contested_ess, high)
    table = [Diagnosis(e.row, *values, text=text) for e, values, text in zip(examples, found, texts, strict=True)]
    return _write(config, folder, subject, table, high, describe_rows(examples, dropped))


def diagnose(
    logp: Tensor, base_logp: Tensor, num_tokens: Tensor, alpha: float, contested_ess: float, high_nll: float
) -> list[tuple[str, float, float, int, float, float, float, int]]:
    """The fields of `Diagnosis` from flag to num_tokens, of each example.

    Args:
        logp: [K, N] nats, summed over tokens. base_logp: [N]. num_tokens: [N].
        contested_ess: share of K. high_nll: nats a token.
    """
    K = len(logp)
    out = renyi_reduce(logp, alpha)
    entropy = torch.special.entr(out.responsibilities).sum(dim=0)
    best, best_particle = logp.max(dim=0)
    best_nll = -best / num_tokens
    contested = out.ess <= contested_ess * K
    unsupported = (best_nll > high_nll) & ~contested
    flags = [CONTESTED if c else OUT_OF_SUPPORT if u else PLAIN for c, u in zip(contested, unsupported, strict=True)]
    mixture = renyi_reduce(logp, 1.0).loss / num_tokens
    columns = (out.ess, entropy, best_particle, best_nll, mixture, -base_logp / num_tokens, num_tokens)
    return list(zip(flags, *(column.tolist() for column in columns), strict=True))


def _write(
    config: NllConfig, folder: Path, subject: Subject, table: Sequence[Diagnosis], high: float, dropped: list[str]
) -> str:
    K = subject.num_particles
    files.write_text(folder / CONFIG_FILE, to_yaml(config))
    files.write_csv(folder / "examples.csv", table)
    kinds = {kind: [d for d in table if d.flag == kind] for kind in (CONTESTED, OUT_OF_SUPPORT)}
    mean = lambda name: sum(getattr(d, name) for d in table) / len(table)
    results: dict[str, Any] = {
        "num_examples": len(table),
        "alpha": subject.alpha,
        "contested_ess_particles": config.contested_ess * K,
        "high_nll_nats_per_token": high,
        **{kind.replace(" ", "_"): len(found) for kind, found in kinds.items()},
        **{f"mean_{name}": mean(name) for name in ("ess_particles", *NLLS)},
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
    limit, high = results["contested_ess_particles"], results["high_nll_nats_per_token"]
    picture = scatter(
        "examples",
        [d.ess_particles for d in table],
        [d.best_particle_nll_nats_per_token for d in table],
        [d.flag or "neither" for d in table],
        xlabel="effective sample size (particles)",
        ylabel="NLL of the best particle (nats a token)",
        vertical={f"contested up to {limit:g}": limit},
        horizontal={f"high above {high:.3g}": high},
        caption=f"{len(table):,} examples of {config.dataset_name}, weighed at alpha = {results['alpha']:g}.",
    )
    by_flag = {
        CONTESTED: (lambda d: d.ess_particles, "lowest effective sample size first"),
        OUT_OF_SUPPORT: (lambda d: -d.best_particle_nll_nats_per_token, "highest NLL first"),
    }
    tables = [
        Table(
            f"{kind[0].upper()}{kind[1:]}: {len(kinds[kind])} examples",
            ["row", "ESS", "entropy", "best particle", "its NLL", "mixture's", "base's", "example"],
            [
                [
                    str(d.row),
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
            "To the left, few particles hold an example: the data contradict each other there, or one row was put in "
            "to mislead. At the top right, all particles share an example that none of them explains: nothing like it "
            "was learnt. At the bottom right is what everybody knows.",
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
        "each of them, and whether anybody does.",
        sections=sections,
        words=[
            (
                "Responsibility",
                "A particle's share of an example: softmax over particles of alpha times log-likelihood.",
            ),
            ("Effective sample size (ESS)", f"How many particles share an example: from 1, one takes it all, to {K}."),
            ("Entropy", f"Of the responsibilities, in nats: from 0, one takes all, to {math.log(K):.2f}."),
            ("NLL", "Negative log-likelihood of a token, in nats; lower is better."),
        ],
        details={"settings": asdict(config), "results": results},
    )
