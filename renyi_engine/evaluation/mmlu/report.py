"""What the report of an MMLU evaluation says: how good answers and uncertainty are, which particle answers what.

Layout: K particles, N questions, C choices.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from textwrap import shorten

import torch
from torch import Tensor

from renyi_engine.evaluation import calibration
from renyi_engine.evaluation.mmlu.questions import GROUPS, Question
from renyi_engine.evaluation.uncertainty import Predictive, predictive
from renyi_engine.objectives import mean_particle
from renyi_engine.reports import Section, Table, charts, glossary
from renyi_kernels import renyi_reduce

QUALITIES = (
    ("Accuracy", "How many of 100 answers are right. Somebody who guesses gets 25."),
    (
        "NLL, in nats",
        "Negative log-likelihood: minus the natural logarithm of the probability that was given to the right choice, "
        "on average. 0 means certain and right; 1.386 (log 4) is a guess; lower is better.",
    ),
    ("Confidence", "The probability that is given to the answer, which is the most probable choice."),
    (
        "ECE",
        "Expected calibration error: how far confidence is from accuracy, over 15 bins of confidence. 0 is perfect.",
    ),
    (
        "Brier",
        "Squared distance of the four probabilities from the truth, from 0 to 2; 0.75 is a guess; lower is better.",
    ),
    (
        "AUROC",
        "How probable it is that a wrong answer is more uncertain than a right one. 1 is perfect; 0.5 is chance.",
    ),
    (
        "AURC",
        "Area under the risk-coverage curve: how many answers are wrong, over all ways to answer only the surest. "
        "Lower is better; an uncertainty that is pure chance has the error rate itself.",
    ),
)
UNCERTAINTIES = (
    ("Total uncertainty", "Entropy of the mixture over the four choices, in nats: the sum of the next two."),
    ("Aleatoric uncertainty", "How unsure the particles are by themselves, on average."),
    ("Epistemic uncertainty", "How much the particles disagree: the mutual information of answer and particle."),
    (
        "Variation ratio",
        "Which fraction of the particles, each counted by its weight, does not vote for the most frequent answer.",
    ),
)
MAX_CHARACTERS = 120
"""How many characters of a question, and of its right answer, the list below a picture shows."""
Named = Mapping[str, Tensor]
"""Log-probabilities [N, C] of the choices, under the name of the member that gives them."""


def words_for(num_particles: int) -> list[tuple[str, str]]:
    """The words that the page explains."""
    if not num_particles:
        return [glossary.BASE, *QUALITIES]
    return [
        glossary.PARTICLE,
        glossary.BASE,
        glossary.MIXTURE,
        *QUALITIES,
        *UNCERTAINTIES,
        glossary.ALPHA,
        glossary.RESPONSIBILITY,
    ]


def found(questions: Sequence[Question], base: Tensor, particles: Tensor | None, weights: Tensor) -> str:
    """The answer in words; the arguments are those of `sections`."""
    labels = torch.tensor([question.answer for question in questions])
    percent = lambda answer: f"{100 * (answer == labels).double().mean().item():.1f} %"
    of_base = percent(base.argmax(dim=-1))
    if particles is None:
        return f"Found: the base answers {of_base} of the questions right."
    told = predictive(particles, weights)
    auroc = calibration.auroc(told.total, told.answer != labels)
    knows = (
        ""
        if auroc is None
        else (
            " Of a wrong and a right answer of the mixture, the wrong one is the more uncertain in "
            f"{100 * auroc:.0f} % of the cases; 50 % would be chance."
        )
    )
    return (
        f"Found: the particles together (the mixture) answer {percent(told.answer)} of the questions right, the base "
        f"without them {of_base}.{knows}"
    )


def answer_responsibilities(logp: Tensor, labels: Tensor, alpha: float, weights: Tensor) -> Tensor:
    """r[k, i], proportional to ``w_k exp(alpha s[k, i])``, with s the log-likelihood of the right answer (paper, D.1):
    ``[K, N]``.

    Args:
        logp: ``[K, N, C]`` nats. labels: ``[N]`` the right choice. weights: ``[K]``.
    """
    right = logp.gather(2, labels.expand(logp.shape[0], -1).unsqueeze(-1)).squeeze(-1)
    return renyi_reduce(right, alpha, weights=weights).responsibilities


def sections(
    questions: Sequence[Question], base: Tensor, particles: Tensor | None, alpha: float, weights: Tensor
) -> list[Section]:
    """The report's sections; those on particles are left out where there are none.

    Args:
        base: ``[N, C]`` log-likelihoods of the choices, nats. particles: ``[K, N, C]``, or None. weights: ``[K]``.
    """
    labels = torch.tensor([question.answer for question in questions])
    answers = {"base": base.double().log_softmax(dim=-1)}
    if particles is None:
        return [
            _quality(questions, labels, answers, {}, weights),
            _knowing(labels, answers["base"], None),
            _by_subject(questions, labels, answers, {}, weights),
        ]
    found = predictive(particles, weights)
    answers["mixture"] = found.mixture
    members = {f"particle {k}": logp for k, logp in enumerate(found.particles)}
    parts = [_quality(questions, labels, answers, members, weights), _knowing(labels, answers["base"], found)]
    if len(particles) > 1:
        wrong_base = answers["base"].argmax(dim=-1) != labels
        responsibilities = answer_responsibilities(particles, labels, alpha, weights)
        parts.append(_responsibilities(questions, responsibilities, wrong_base, alpha))
    return [*parts, _by_subject(questions, labels, answers, members, weights)]


def _quality(questions: Sequence[Question], labels: Tensor, answers: Named, members: Named, weights: Tensor) -> Section:
    rows = {name: _qualities(logp, labels) for name, logp in answers.items()}
    each = {name: _qualities(logp, labels) for name, logp in members.items()}
    if each:
        rows["mean of particles"] = [
            mean_particle(column, weights.tolist()) for column in zip(*each.values(), strict=True)
        ]
    cells = [
        [name, f"{100 * accuracy:.1f}", *(f"{value:.3f}" for value in others)]
        for name, (accuracy, *others) in (rows | each).items()
    ]
    # of one half: no accuracy has a larger one
    error = 0.5 / math.sqrt(len(questions))
    note = f"The standard error of an accuracy is at most {100 * error:.1f} points."
    text = (
        "Each of the four letters is scored as the continuation of the question; the most likely one is the answer. "
        "An accuracy near 25 % is bad: guessing gives that."
    )
    if members:
        text += (
            " Good: the mixture is more often right than the base and the mean of the particles, and has a lower NLL."
        )
    group_of = {subject: group.replace("_", " ") for group, subjects in GROUPS.items() for subject in subjects}
    groups = [group_of[question.subject] for question in questions]
    tables = [
        Table("", ("who", "accuracy (%)", "NLL (nats)", "ECE", "Brier"), cells, note),
        _accuracy_table("By group of subjects", "group", groups, labels, answers, members, weights),
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


def _by_subject(
    questions: Sequence[Question], labels: Tensor, answers: Named, members: Named, weights: Tensor
) -> Section:
    text = "Accuracy in each subject. With 100 questions its standard error is up to 5 points."
    subjects = [_spoken(question) for question in questions]
    table = _accuracy_table("", "subject", subjects, labels, answers, members, weights)
    return Section("Subject by subject", text, [table])


def _accuracy_table(
    title: str,
    kind: str,
    groups: Sequence[str],
    labels: Tensor,
    answers: Named,
    members: Named,
    weights: Tensor,
) -> Table:
    """Accuracy of each of `answers`, and of the mean particle, on each group; groups [N]: that of each question."""
    right = {name: (logp.argmax(dim=-1) == labels).double() for name, logp in answers.items()}
    if members:
        each = torch.stack([logp.argmax(dim=-1) == labels for logp in members.values()])
        right["mean of particles"] = weights.double() @ each.double()
    rows = []
    for group, chosen in _by_group(groups).items():
        cells = [f"{100 * values[chosen].mean().item():.1f}" for values in right.values()]
        rows.append([group, f"{len(chosen):,}", *cells])
    return Table(title, (kind, "questions", *(f"{name} (%)" for name in right)), rows)


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
        charts.risk_coverage("risk", curves, caption="How often answers are wrong, if only the surest are given."),
        charts.reliability("reliability", bins, caption="How often answers are right, by their confidence."),
    ]
    text = (
        "If answers are uncertain where they are wrong, the wrong ones can be withheld. Good: an AUROC well above 0.5. "
        "Bad: about 0.5, as if the uncertainty were drawn by lot."
    )
    table = Table("", ("uncertainty", "AUROC", "AURC"), rows, "" if found is None else note)
    return Section("Does it know when it is wrong?", text, [table], pictures)


def _responsibilities(
    questions: Sequence[Question], responsibilities: Tensor, wrong_base: Tensor, alpha: float
) -> Section:
    """Responsibilities [K, N] on all questions, and on those that the base gets wrong."""
    everything = torch.ones_like(wrong_base)
    maps, subject_maps, sizes = [], [], []
    for name, where, chosen in [
        ("all", "all questions", everything),
        ("hard", "the questions that the base gets wrong", wrong_base),
    ]:
        part, asked = responsibilities[:, chosen].double(), [questions[i] for i in chosen.nonzero().flatten().tolist()]
        if not asked:
            sizes.append("the base gets no question wrong, so there is no picture of those")
            continue
        sizes.append(f"{(1 / part.square().sum(dim=0)).mean().item():.2f} on {where}")
        subjects = _by_group([_spoken(question) for question in asked])
        means = torch.stack([part[:, inside].mean(dim=1) for inside in subjects.values()], dim=1)
        caption = f"Responsibilities on {where}"
        names, texts = [f"{_spoken(q)} {q.number}" for q in asked], [_shown(q) for q in asked]
        drawn = charts.heat_map(f"responsibilities-{name}", part, names=names, texts=texts, caption=f"{caption}.")
        maps.append(drawn)
        subject_maps.append(
            charts.group_heat_map(f"subjects-{name}", means, list(subjects), caption=f"{caption}, by subject.")
        )
    text = (
        "Which particle gives the right answer the highest probability. Good, if the particles are to be specialists: "
        "different subjects have different leaders. If all questions have the same tints, the particles know the same. "
        f"These are responsibilities at alpha = {alpha:g}: a particle's weight times exp(alpha times its "
        "log-likelihood of the right answer), divided by the sum of that over the particles (paper, D.1). Effective "
        f"sample size, of {len(responsibilities)} particles: {'; '.join(sizes)}."
    )
    if alpha == 0:
        text += " At alpha = 0 a particle's responsibility is its weight, by definition."
    return Section("Which particle answers what?", text, (), [*maps, *subject_maps])


def _shown(question: Question) -> str:
    text = shorten(question.text, MAX_CHARACTERS, placeholder=" …")
    return f"{text} [[{shorten(question.choices[question.answer], MAX_CHARACTERS, placeholder=' …')}]]"


def _by_group(groups: Sequence[str]) -> dict[str, list[int]]:
    """The indices of each group's members; groups [N] names that of each."""
    members: dict[str, list[int]] = {}
    for index, group in enumerate(groups):
        members.setdefault(group, []).append(index)
    return members


def _spoken(question: Question) -> str:
    return question.subject.replace("_", " ")
