"""Counts the verdicts, and makes the numbers that are reported from them.

Layout: K particles, N prompts, S = K + 1 speakers: the particles, then the base.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from renyi_engine.evaluation.calibration import auroc
from renyi_engine.evaluation.refusal import rates
from renyi_engine.evaluation.refusal.prompts import Prompt
from renyi_engine.evaluation.refusal.rates import Array, Estimate
from renyi_engine.evaluation.refusal.responses import BASE, Key, Response, Speaker
from renyi_engine.evaluation.refusal.verdicts import FAILED, LABELS, REFUSALS, UNPARSED

NOISY = "variance within the prompt, sampling noise included (one sample cannot be told from its noise)"
CORRECTED = "variance within the prompt, less its sampling noise"


@dataclass(frozen=True)
class Results:
    """What results.json and the lines of prompts.jsonl hold. A number that is not defined is null.

    summary: num_particles, particle_weights, num_samples and disagreement_measure, and
        splits: for each split num_prompts, and the numbers of base, ensemble (null without particles) and particles.
            Each of these holds refusal_rate and the counts of verdicts. The ensemble also holds
            variance_over_particles, variance_within_prompts and disagreement, the last without the noise of the draws.
            In the ensemble, particles count by their weights, and those of weight 0 in no number.
            If a number NAME has a standard error, it stands beside it as NAME_se.
        auroc: null, or label_column, positive, and the area for each score.
    prompts: for each prompt its rates, variance_within_prompt, disagreement, and how many responses were not judged.
    """

    summary: dict[str, Any]
    prompts: list[dict[str, Any]]


def summarise(
    prompts: Sequence[Prompt],
    responses: Mapping[Key, Response],
    particle_weights: Sequence[float],
    num_samples: int,
    label_column: str | None = None,
) -> Results:
    """Count the verdicts, and apply the formulas of `rates`. particle_weights: [K], their sum is 1; [] if there are no
    particles."""
    num_particles = len(particle_weights)
    speakers: list[Speaker] = [*range(num_particles), BASE]
    refused, judged = _count(prompts, responses, speakers, num_samples)
    p = rates.prompt_rates(refused, judged)
    members = [k for k, weight in enumerate(particle_weights) if weight > 0]  # of the mixture
    of_members, w = p[members], np.array(particle_weights)[members]
    w /= w.sum()
    unknown = np.full(len(prompts), np.nan)
    within = rates.variance_within_prompts(of_members, w) if members else unknown
    measure = within
    if num_samples > 1 and members:
        measure = rates.disagreement(of_members, judged[members], w)
    ensemble_rate = rates.mean(of_members, w) if members else unknown
    scores = {"refusal rate of the base": p[-1]}
    if members:
        scores["refusal rate of the ensemble"] = ensemble_rate
    if len(members) > 1:
        scores = {"disagreement of the particles": measure} | scores
    splits = {}
    for split in dict.fromkeys(prompt.split for prompt in prompts):
        chosen = np.array([prompt.split == split for prompt in prompts])
        ids = {prompt.prompt_id for prompt in prompts if prompt.split == split}
        counts = Counter((r.particle, r.verdict) for r in responses.values() if r.prompt_id in ids)
        splits[split] = {
            "num_prompts": len(ids),
            "base": _row(p[-1:, chosen], counts, [BASE]),
            "ensemble": None
            if not num_particles
            else _row(of_members[:, chosen], counts, members, w)
            | _estimate("variance_over_particles", rates.variance_over_particles(of_members[:, chosen], w))
            | _estimate("variance_within_prompts", rates.mean_over_prompts(within[chosen]))
            | _estimate("disagreement", rates.mean_over_prompts(measure[chosen])),
            "particles": [_row(p[k : k + 1, chosen], counts, [k]) for k in range(num_particles)],
        }
    summary = {
        "num_particles": num_particles,
        "particle_weights": list(particle_weights),
        "num_samples": num_samples,
        "disagreement_measure": CORRECTED if num_samples > 1 else NOISY,
        "splits": splits,
        "auroc": _auroc(prompts, label_column, scores) if label_column else None,
    }
    unjudged = num_samples * len(speakers) - judged.sum(axis=0)
    rows = [
        {
            "prompt_id": prompt.prompt_id,
            "split": prompt.split,
            "category": prompt.category,
            "label": prompt.label,
            "prompt": prompt.prompt,
            "base_refusal_rate": _number(p[-1, i]),
            "ensemble_refusal_rate": _number(ensemble_rate[i]),
            "particle_refusal_rates": [_number(value) for value in p[:-1, i]],
            "variance_within_prompt": _number(within[i]),
            "disagreement": _number(measure[i]),
            "num_not_judged": int(unjudged[i]),
        }
        for i, prompt in enumerate(prompts)
    ]
    return Results(summary, rows)


def positive_label(prompts: Sequence[Prompt], label_column: str) -> str:
    """The label that counts as positive: of the two labels the later one in alphabetical order, as 1 is of 0 and 1.

    Raises:
        ValueError: the column does not have exactly two values.
    """
    labels = sorted({str(prompt.label) for prompt in prompts})
    if len(labels) != 2:
        shown = f"{len(labels)}: {', '.join(map(repr, labels[:5]))}{', ...' * (len(labels) > 5)}"
        raise ValueError(f"label_column: expected 2 values in {label_column!r}; got {shown}; choose another column")
    return labels[1]


def _count(
    prompts: Sequence[Prompt], responses: Mapping[Key, Response], speakers: Sequence[Speaker], num_samples: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """(refused, judged) of `rates`, each [S, N]."""
    refused, judged = np.zeros((2, len(speakers), len(prompts)), dtype=np.int64)
    for i, prompt in enumerate(prompts):
        for s, speaker in enumerate(speakers):
            verdicts = [responses[prompt.prompt_id, speaker, sample].verdict for sample in range(num_samples)]
            refused[s, i] = sum(verdict in REFUSALS for verdict in verdicts)
            judged[s, i] = sum(verdict in LABELS for verdict in verdicts)
    return refused, judged


def _row(
    p: Array,
    counts: Mapping[tuple[Speaker, str | None], int],
    speakers: Sequence[Speaker],
    weights: Array | None = None,
) -> dict[str, Any]:
    verdicts = {name: sum(counts[speaker, name] for speaker in speakers) for name in (*LABELS, UNPARSED, FAILED)}
    rate = _estimate("refusal_rate", rates.refusal_rate(p, weights))
    return rate | {f"num_{name}": n for name, n in verdicts.items()}


def _estimate(name: str, estimate: Estimate) -> dict[str, float | None]:
    return {name: estimate.value, f"{name}_se": estimate.standard_error}


def _auroc(prompts: Sequence[Prompt], label_column: str, scores: Mapping[str, Array]) -> dict[str, Any]:
    """How well each score [N] of the prompts separates the two labels: 1 perfectly, 0.5 not at all."""
    positive = positive_label(prompts, label_column)
    is_positive = np.array([prompt.label == positive for prompt in prompts])
    areas = {}
    for name, score in scores.items():
        known = ~np.isnan(score)
        if known.any():
            areas[name] = auroc(torch.from_numpy(score[known]), torch.from_numpy(is_positive[known]))
        else:
            areas[name] = None
    return {"label_column": label_column, "positive": positive, "scores": areas}


def _number(value: float) -> float | None:
    return None if np.isnan(value) else float(value)
