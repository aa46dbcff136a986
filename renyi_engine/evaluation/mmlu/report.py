"""What the report of an MMLU evaluation says: how good the answers are, what the uncertainty knows, who answers what.

Layout: K particles, N questions, C choices.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from renyi_engine.evaluation import calibration
from renyi_engine.evaluation.mmlu.questions import GROUPS, Question
from renyi_engine.evaluation.uncertainty import Predictive, predictive
from renyi_engine.reports import Section, Table, charts
from renyi_kernels import renyi_reduce

WORDS = (
    ("NLL", "Mean of -log of the probability of the right one of the four choices, in nats; log 4 = 1.386 at chance."),
    ("ECE", "How far confidence is from accuracy, over 15 bins of confidence; 0 is perfect."),
    ("Brier", "Squared distance of the four probabilities from the truth, from 0 to 2; 0.75 where all are 1/4."),
    ("AUROC", "Chance that a wrong answer is more uncertain than a right one; 0.5 knows nothing."),
    ("AURC", "Area under the risk-coverage curve; lower is better, the error rate is no knowledge."),
)
ENSEMBLE_WORDS = (
    ("particle", "One adapter on the frozen base; an ensemble has K of them."),
    ("mixture", "The ensemble's answer: the mean over particles of their probabilities of the four choices."),
    ("total", "Entropy of the mixture over the choices, in nats: the sum of the next two."),
    ("aleatoric", "How unsure the particles are by themselves, on average."),
    ("epistemic", "How much they disagree: the mutual information of answer and particle."),
    ("variation ratio", "Share of the particles that do not vote for the most frequent answer."),
    ("responsibility", "Share of a question that a particle takes, given its right answer (paper, D.1)."),
)
Named = Mapping[str, Tensor]
"""Log-probabilities [N, C] of the choices, by who gives them."""


def answer_responsibilities(logp: Tensor, labels: Tensor, alpha: float) -> Tensor:
    """``r[k, i] = softmax_k(alpha s[k, i])`` with s the log-likelihood of the right answer (paper, D.1): ``[K, N]``.

    Args:
        logp: ``[K, N, C]`` nats. labels: ``[N]`` the right choice.
    """
    right = logp.gather(2, labels.expand(logp.shape[0], -1).unsqueeze(-1)).squeeze(-1)
    return renyi_reduce(right, alpha).responsibilities


def sections(questions: Sequence[Question], base: Tensor, particles: Tensor | None, alpha: float) -> list[Section]:
    """The report's sections; those on particles are left out where there are none.

    Args:
        base: ``[N, C]`` log-likelihoods of the choices, nats. particles: ``[K, N, C]``, or None.
    """
    labels = torch.tensor([question.answer for question in questions])
    answers = {"base": base.double().log_softmax(dim=-1)}
    if particles is None:
        return [
            _quality(questions, labels, answers, {}),
            _knowing(labels, answers["base"], None),
            _by_subject(questions, labels, answers, {}),
        ]
    found = predictive(particles)
    answers["mixture"] = found.mixture
    members = {f"particle {k}": logp for k, logp in enumerate(found.particles)}
    parts = [_quality(questions, labels, answers, members), _knowing(labels, answers["base"], found)]
    if len(particles) > 1:
        wrong_base = answers["base"].argmax(dim=-1) != labels
        parts.append(_shares(questions, answer_responsibilities(particles, labels, alpha), wrong_base, alpha))
    return [*parts, _by_subject(questions, labels, answers, members)]


def _quality(questions: Sequence[Question], labels: Tensor, answers: Named, members: Named) -> Section:
    rows = {name: _qualities(logp, labels) for name, logp in answers.items()}
    each = {name: _qualities(logp, labels) for name, logp in members.items()}
    if each:
        rows["mean of particles"] = [sum(column) / len(each) for column in zip(*each.values(), strict=True)]
    cells = [
        [name, f"{100 * accuracy:.1f}", *(f"{value:.3f}" for value in others)]
        for name, (accuracy, *others) in (rows | each).items()
    ]
    # of one half: no accuracy has a larger one
    error = 0.5 / math.sqrt(len(questions))
    note = f"The standard error of an accuracy is at most {100 * error:.1f} points."
    text = (
        "Each of the four letters is scored as the continuation of the question; the most likely one is the answer. "
        "Chance is 25 %."
    )
    group_of = {subject: group.replace("_", " ") for group, subjects in GROUPS.items() for subject in subjects}
    groups = [group_of[question.subject] for question in questions]
    tables = [
        Table("", ("", "accuracy (%)", "NLL (nats)", "ECE", "Brier"), cells, note),
        _accuracy_table("By group of subjects", groups, labels, answers, members),
    ]
    return Section("How good are the answers?", text, tables)


def _qualities(logp: Tensor, labels: Tensor) -> list[float]:
    """Accuracy, NLL, ECE and Brier score of log-probabilities [N, C]."""
    p = logp.exp()
    return [
        calibration.accuracy(p, labels),
        calibration.nll(logp, labels),
        calibration.ece(p, labels),
        calibration.brier(p, labels),
    ]


def _by_subject(questions: Sequence[Question], labels: Tensor, answers: Named, members: Named) -> Section:
    text = "Accuracy in each subject. With 100 questions its standard error is up to 5 points."
    subjects = [_spoken(question) for question in questions]
    return Section("Subject by subject", text, [_accuracy_table("", subjects, labels, answers, members)])


def _accuracy_table(title: str, groups: Sequence[str], labels: Tensor, answers: Named, members: Named) -> Table:
    """Accuracy of each of `answers`, and of the mean particle, on each group; groups [N]: that of each question."""
    right = {name: (logp.argmax(dim=-1) == labels).double() for name, logp in answers.items()}
    if members:
        each = torch.stack([logp.argmax(dim=-1) == labels for logp in members.values()])
        right["mean of particles"] = each.double().mean(dim=0)
    rows = []
    for group, chosen in _by_group(groups).items():
        cells = [f"{100 * values[chosen].mean().item():.1f}" for values in right.values()]
        rows.append([group, f"{len(chosen):,}", *cells])
    return Table(title, ("", "questions", *(f"{name} (%)" for name in right)), rows)


def _knowing(labels: Tensor, base: Tensor, found: Predictive | None) -> Section:
    # uncertainties, and whether the answers that they are about are wrong
    measures = {"base: entropy": (predictive(base[None]).total, base.argmax(dim=-1) != labels)}
    answers = {"base": base}
    if found is not None:
        answers["mixture"], wrong = found.mixture, found.answer != labels
        measures["mixture: total"] = (found.total, wrong)
        measures["mixture: epistemic"] = (found.epistemic, wrong)
    drawn = list(measures)
    if found is not None:
        measures["mixture: aleatoric"] = (found.aleatoric, wrong)
        measures["mixture: variation ratio"] = (found.variation_ratio, wrong)
    rows = []
    for name, (score, wrong) in measures.items():
        auroc = calibration.auroc(score, wrong)
        rows.append([name, "–" if auroc is None else f"{auroc:.3f}", f"{calibration.aurc(score, wrong):.3f}"])
    note = "The base's uncertainty is judged by the base's errors, the others by the mixture's."
    curves = {name: calibration.risk_coverage(*measures[name]) for name in drawn}
    bins = {name: calibration.reliability(logp.exp(), labels) for name, logp in answers.items()}
    pictures = [
        charts.risk_coverage("risk", curves, caption="Risk over coverage."),
        charts.reliability("reliability", bins, caption="Reliability, over 15 bins of confidence."),
    ]
    text = "If uncertainty is high where answers are wrong, the wrong ones can be withheld."
    table = Table("", ("uncertainty", "AUROC", "AURC"), rows, "" if found is None else note)
    return Section("Does it know when it is wrong?", text, [table], pictures)


def _shares(questions: Sequence[Question], weights: Tensor, wrong_base: Tensor, alpha: float) -> Section:
    """Responsibilities [K, N] on all questions, and on those that the base gets wrong."""
    everything = torch.ones_like(wrong_base)
    maps, subject_maps, sizes = [], [], []
    for name, where, chosen in [
        ("all", "all questions", everything),
        ("hard", "the questions that the base gets wrong", wrong_base),
    ]:
        part = weights[:, chosen].double()
        if not part.numel():
            continue
        sizes.append(f"{(1 / part.square().sum(dim=0)).mean().item():.2f} on {where}")
        subjects = _by_group([_spoken(questions[i]) for i in chosen.nonzero().flatten().tolist()])
        means = torch.stack([part[:, inside].mean(dim=1) for inside in subjects.values()], dim=1)
        caption = f"Responsibilities on {where}"
        maps.append(charts.heat_map(f"responsibilities-{name}", part, caption=f"{caption}."))
        subject_maps.append(
            charts.group_heat_map(f"subjects-{name}", means, list(subjects), caption=f"{caption}, by subject.")
        )
    text = (
        f"Responsibilities at alpha = {alpha:g}: softmax over particles of alpha times the log-likelihood of the right "
        f"answer. Effective number of particles, of {len(weights)}: {', '.join(sizes)}."
    )
    if alpha == 0:
        text += " At alpha = 0 all of them are 1/K by definition."
    return Section("Which particle answers what?", text, (), [*maps, *subject_maps])


def _by_group(groups: Sequence[str]) -> dict[str, list[int]]:
    """The indices of each group's members; groups [N] names that of each."""
    members: dict[str, list[int]] = {}
    for index, group in enumerate(groups):
        members.setdefault(group, []).append(index)
    return members


def _spoken(question: Question) -> str:
    return question.subject.replace("_", " ")
