"""What an ensemble says of each example of a data set: do its particles agree, and does any of them explain it?

With p[k,t] the probability that particle k gives to token t of an example, s[k] = sum_t log p[k,t] and T tokens:

    disagreement    max_t ( max_k p[k,t] - min_k p[k,t] ), from 0 (all alike) to 1
    gain            ( max_k s[k] - s[base] ) / T, nats a token

    out of support           the gain is below 0, or below nearly all gains of a calibration set: see `support_limit`
    contested or poisoned    not that, and the disagreement is at least `min_disagreement`

The flag of an example does not depend on the other examples. Particles that are equal to the base flag none.
The disagreement is at most the distance in total variation between two particles' predictions of that token. It looks
at one token because small differences add up over a long answer that nobody disputes, and at probabilities because
both camps' answers then count the same: 0.99 against 0.66 is the dispute that 0.01 against 0.34 is.

Layout: K particles, N examples, B sequences, T tokens.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from renyi_engine.core import CONFIG_FILE, files, output_folder, to_yaml
from renyi_engine.data import Example, excerpt, load_splits
from renyi_engine.ensemble import LoraEnsemble, sum_tokens
from renyi_engine.evaluation.config import NllConfig
from renyi_engine.evaluation.subject import Subject, load_subject
from renyi_engine.objectives import Evaluation, Scores, SftTask, check_fits, describe_rows, evaluate, read_items
from renyi_engine.reports import Section, Table, scatter, write_page
from renyi_kernels import renyi_reduce

CONTESTED, OUT_OF_SUPPORT, PLAIN = "contested or poisoned", "out of support", ""
SHOWN = 25
"""Examples of each kind in the report; the table on disk has all."""
FLAGGED_BY = ("disagreement", "gain_over_base_nats_per_token")
NLLS = ("best_particle_nll_nats_per_token", "mixture_nll_nats_per_token", "base_nll_nats_per_token")
TABLE_HEADER = ("row", "disagreement", "gain", "ESS", "entropy", "best", "its NLL", "mixture's", "base's", "example")


@dataclass(frozen=True)
class Diagnosis:
    """One example, and its line of examples.csv."""

    row: int
    flag: str
    disagreement: float
    gain_over_base_nats_per_token: float
    ess_particles: float
    responsibility_entropy_nats: float
    best_particle: int
    best_particle_nll_nats_per_token: float
    mixture_nll_nats_per_token: float
    base_nll_nats_per_token: float
    num_tokens: int
    text: str


def evaluate_nll(config: NllConfig) -> str:
    """Diagnose every example; examples.csv, results.json and report.html go to `config.output_dir`. Returns what was
    found, in a few lines.

    Raises:
        ValueError: the data, the model or the ensemble cannot be used; or output_dir holds something.
    """
    splits = load_splits(config.dataset_name, config.dataset_config, "dataset_name")
    rows = splits.rows(config.dataset_split, "dataset_split", NllConfig.dataset_split)
    calibration_rows = []
    if config.calibration_dataset_name:
        splits = load_splits(config.calibration_dataset_name, None, "calibration_dataset_name")
        default = NllConfig.calibration_dataset_split
        calibration_rows = splits.rows(config.calibration_dataset_split, "calibration_dataset_split", default)
    with output_folder.claimed(Path(config.output_dir)) as folder:
        subject = load_subject(config)
        ensemble, alpha = subject.ensemble, subject.require_alpha()
        if alpha == 0:
            raise ValueError(
                f"alpha: {config.ensemble} was trained at 0, where all responsibilities are 1/K; pass --alpha 1"
            )
        if subject.num_particles < 2:
            raise ValueError(
                f"ensemble: expected at least 2 particles; {config.ensemble} holds {subject.num_particles}"
            )
        task = _WithDisagreement(subject.tokenizer, config.max_length)
        examples, dropped = read_items(task, rows, "dataset_name")
        check_fits(ensemble.model, examples)
        lines, min_gain = describe_rows(examples, dropped), 0.0
        if calibration_rows:
            calibration, of_calibration = read_items(task, calibration_rows, "calibration_dataset_name")
            check_fits(ensemble.model, calibration)
            check_calibration(len(calibration), config.calibration_share)
            lines += [f"calibration: {line}" for line in describe_rows(calibration, of_calibration)]
            scored, base_logp = _score(ensemble, task, calibration, config.per_device_eval_batch_size)
            min_gain = support_limit(
                gain_over_base(scored.logp, base_logp, scored.num_labels), config.calibration_share
            )
        scored, base_logp = _score(ensemble, task, examples, config.per_device_eval_batch_size)
        disagreement = scored.details["disagreement"]
        found = diagnose(
            scored.logp, base_logp, disagreement, scored.num_labels, alpha, config.min_disagreement, min_gain
        )
        texts = [excerpt(subject.tokenizer, example) for example in examples]
        table = [Diagnosis(e.row, *values, text=text) for e, values, text in zip(examples, found, texts, strict=True)]
        return _write(config, folder, subject, table, min_gain, lines)


def _score(
    ensemble: LoraEnsemble, task: SftTask, examples: Sequence[Example], batch_size: int
) -> tuple[Evaluation, Tensor]:
    """The examples under the particles, and their log-likelihoods under the base, [N] nats.

    The base is scored as K particles whose B is zero. So both take the same path and round alike, and particles that
    learnt nothing gain nothing. In bfloat16, a base that runs by itself is up to 0.1 nats a token off.
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
    """The task, with scores that also say how far the particles disagree about each sequence, [B]."""

    def score(self, ensemble: LoraEnsemble, batch: Mapping[str, Tensor]) -> Scores:
        logp = ensemble.token_logprob(batch)
        return Scores(sum_tokens(logp), {"disagreement": token_disagreement(logp)})


def token_disagreement(logp: Tensor) -> Tensor:
    """max_t ( max_k p[k,t] - min_k p[k,t] ), a difference of probabilities, [K, B, T] -> [B].

    logp: nats of each labelled token; 0.0 where there is no label, so the disagreement there is 0.
    """
    p = logp.exp()
    return (p.amax(dim=0) - p.amin(dim=0)).amax(dim=-1)


def gain_over_base(logp: Tensor, base_logp: Tensor, num_tokens: Tensor) -> Tensor:
    """( max_k s[k,i] - s[base,i] ) / T[i], nats a token, [N]: what the best particle learnt of each example."""
    return (logp.amax(dim=0) - base_logp) / num_tokens


def support_limit(gains: Tensor, share: float) -> float:
    """The gain below which an example is out of support, from the gains [N] of a calibration set.

    Guarantee: an example that is drawn as the calibration set was is called out of support with a probability of at
    most `share`, whatever the distribution (split conformal prediction, Vovk et al. 2005): the limit is the gain of
    rank floor(share (N + 1)), smallest first, and what is below it ranks no higher among all N + 1.

    Raises:
        ValueError: too few examples for that share.
    """
    check_calibration(len(gains), share)
    return gains.sort().values[math.floor(share * (len(gains) + 1)) - 1].item()


def check_calibration(num_examples: int, share: float) -> None:
    """ValueError if a calibration set is too small for `share`."""
    if math.floor(share * (num_examples + 1)) < 1:
        raise ValueError(
            f"calibration_dataset_name: a calibration_share of {share:g} needs at least {math.ceil(1 / share) - 1} "
            f"examples; got {num_examples}; give more rows or a larger --calibration_share"
        )


def diagnose(
    logp: Tensor,
    base_logp: Tensor,
    disagreement: Tensor,
    num_tokens: Tensor,
    alpha: float,
    min_disagreement: float,
    min_gain: float,
) -> list[tuple[str, float, float, float, float, int, float, float, float, int]]:
    """The fields of `Diagnosis` from flag to num_tokens, of each example.

    Args:
        logp: [K, N] nats, summed over tokens. base_logp, disagreement, num_tokens: [N].
        alpha: of the responsibilities, from which come ESS and entropy; the flag does not depend on it.
        min_gain: nats a token; what gains less is out of support.
    """
    out = renyi_reduce(logp, alpha)
    entropy = torch.special.entr(out.responsibilities).sum(dim=0)
    best, best_particle = logp.max(dim=0)
    gain = gain_over_base(logp, base_logp, num_tokens)
    unsupported = gain < min_gain
    contested = (disagreement >= min_disagreement) & ~unsupported
    flags = [CONTESTED if c else OUT_OF_SUPPORT if u else PLAIN for c, u in zip(contested, unsupported, strict=True)]
    nlls = (-best / num_tokens, renyi_reduce(logp, 1.0).loss / num_tokens, -base_logp / num_tokens)
    columns = (disagreement, gain, out.ess, entropy, best_particle, *nlls, num_tokens)
    return list(zip(flags, *(column.tolist() for column in columns), strict=True))


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
