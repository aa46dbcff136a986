"""MMLU: do particles share the subjects among themselves?

Data: MMLU (Hendrycks et al. 2021), read as `renyi-engine eval mmlu` reads it. Trained on are the questions of
val, held out those of dev; asked is a sample of those of test. No question stands in two of these, or twice in one.

Layout: K particles, N questions, S subjects.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.figure import Figure

from examples.evidence.experiment import Answers, Data, Experiment, Metric, Question, Setting, Variant, on_cpu, on_gpu
from examples.evidence.measures import information
from examples.evidence.methods import FEW, ask
from renyi_engine import LoraEnsemble
from renyi_engine.evaluation import COMPLETIONS, Question as Asked, calibration, load_questions, prompt
from renyi_engine.objectives import SftTask
from renyi_kernels import renyi_reduce

LONGEST = 400
"""Characters of a prompt. About half of the questions are shorter."""
NUM_OF_SUBJECT = {"cpu": 6, "gpu": 40}
"""Questions that are asked of each subject, where there are so many."""
NUM_PERMUTATIONS = 999
ALPHA = 0.8
LEAST_WEIGHT = 1e-3
"""If all particles but one have together no more than this, there is one particle."""
SHOWN = ("deep_ensemble", "alpha_0.8")


def _shared(label: str, of: Callable[[Answers], float], digits: int = 3) -> Metric:
    """A metric of the table about particles and subjects, which has no intervals."""
    return Metric(label, "", of, digits, resampled=False, table="particle and subject")


class Mmlu(Experiment):
    name = "mmlu"
    title = "MMLU: specialists for subjects"
    claim = (
        "Trained on questions of many subjects, coupled particles specialise: which particle explains the right answer "
        "depends on the subject, among all questions and among those that the base gets wrong."
    )
    caption = "the mean responsibilities of the particles for each subject, at alpha = 0.8, of the first seed."
    data_file = "test.jsonl.gz"
    settings: Mapping[str, Setting] = {
        "cpu": on_cpu(max_steps=60),
        "gpu": on_gpu(learning_rate=5e-4, max_steps=180, seeds=5),
    }

    def variants(self, setting: str) -> Sequence[Variant]:
        asked = {"asked": NUM_OF_SUBJECT[setting]}
        return [
            Variant("the answer is a letter", 4, FEW, {"answer": "letter"} | asked),
            Variant("the answer is a letter and its text", 4, FEW, {"answer": "text"} | asked),
        ]

    def data(self, options: Mapping[str, Any], seed: int, source: Path | None) -> Data:
        assert source is not None
        train, held_out, test = read(str(source))
        answers = ANSWERS[options["answer"]]
        rng = random.Random(seed)
        of_subject: dict[str, list[Asked]] = {}
        for question in test:
            of_subject.setdefault(question.subject, []).append(question)
        asked = [
            question for few in of_subject.values() for question in rng.sample(few, min(options["asked"], len(few)))
        ]
        return Data(
            rows=[_row(one, answers) for one in train],
            held_out=[_row(one, answers) for one in held_out],
            questions=[Question(prompt(one, []), answers(one)) for one in asked],
            facts={
                "subject": np.array([one.subject for one in asked]),
                "right": np.array([one.answer for one in asked]),
            },
        )

    def ask_more(self, ensemble: LoraEnsemble, task: SftTask, data: Data) -> Mapping[str, np.ndarray]:
        """base, [1, N, C]: what the base answers, in nats."""
        with ensemble.disable_adapters():
            return {"base": ask(ensemble, task, data.questions).numpy()}

    def derived(self, answers: Answers) -> Mapping[str, np.ndarray]:
        """mixture, [N, C]: the log-probabilities of the answers under the mixture, if one of them is given."""
        return {"mixture": answers.among.mixture.numpy()}

    curves: Mapping[str, Callable[[Answers], Sequence[float]]] = {
        "by_subject": lambda answers: by_subject(answers).ravel().tolist()
    }
    metrics: Mapping[str, Metric] = {
        "accuracy": Metric(
            "accuracy", "higher", lambda answers: calibration.accuracy(_mixture(answers).exp(), _right(answers))
        ),
        "nll": Metric("NLL", "lower", lambda answers: calibration.nll(_mixture(answers), _right(answers))),
        "ece": Metric(
            "ECE", "lower", lambda answers: calibration.ece(_mixture(answers).exp(), _right(answers)), centred=True
        ),
        "information": _shared("information", lambda answers: 1000 * specialisation(answers)[0], 1),
        "z": _shared("z", lambda answers: specialisation(answers)[1], 1),
        "p": _shared("p", lambda answers: specialisation(answers)[2]),
        "p_subjects": _shared("p, subjects exchanged", lambda answers: specialisation(answers, null="subjects")[2]),
        "led": _shared("share of the leader", lambda answers: led(answers)),
        "z_wrong": _shared("z, base wrong", lambda answers: specialisation(_hard(answers))[1], 1),
        "p_wrong": _shared("p, base wrong", lambda answers: specialisation(_hard(answers))[2]),
        "z_one": _shared("z at 1", lambda answers: specialisation(answers, 1.0)[1], 1),
        "p_one": _shared("p at 1", lambda answers: specialisation(answers, 1.0)[2]),
    }
    note = (
        "723 training questions; 312 test questions, and 2004 in the large setting. Accuracy, NLL (nats a question) "
        "and ECE are those of the mixture, among the four answers. Information is the mutual information of a "
        "question's subject and the particle that is responsible for its right answer, in thousandths of a nat, "
        "with responsibilities at alpha = 0.8 for every method. The null: within each question the particles exchange "
        f"their answers at random, {NUM_PERMUTATIONS} times. z says by how many standard deviations the information "
        "lies above the mean of these, and p how often one of them is as large. Both are also given for the "
        "questions that the base gets wrong, and with responsibilities at alpha = 1. A particle that leads "
        "everywhere is not exchangeable, and no specialist either. So p is also given with the subjects exchanged "
        "among the questions instead; but it is low, too, if one particle leads everywhere and by more in some "
        "subjects. The share of the leader tells this apart: of all subjects, the part in which the same particle "
        "has the largest mean responsibility, at least 1/K. z, p and this share are means over the seeds."
    )

    def picture(self, results: Mapping[str, Any]) -> Figure:
        methods, K = results["variants"][0]["methods"], results["variants"][0]["num_particles"]
        figure, axes = plt.subplots(len(SHOWN), figsize=(10, 4.6), layout="constrained", sharex=True, sharey=True)
        means = {method: np.reshape(methods[method]["curves"]["by_subject"][0], (-1, K)) for method in SHOWN}
        highest = max(of.max() for of in means.values())
        for axis, method in zip(axes, SHOWN, strict=True):
            leader = means[method].argmax(axis=1)
            order = np.lexsort((-means[method].max(axis=1), leader))
            drawn = axis.imshow(means[method][order].T, aspect="auto", vmin=0, vmax=highest)
            z = methods[method]["metrics"]["z"]["seeds"][0]
            axis.set(ylabel="particle", yticks=range(K), title=f"{methods[method]['label']}: z = {z:.1f}")
        axes[-1].set(xlabel="subjects, by the particle that is most responsible")
        figure.colorbar(drawn, ax=axes, label="mean responsibility")
        return figure


@cache
def read(source: str) -> tuple[list[Asked], ...]:
    """(val, dev, test) questions that are short. None has the text of another one, in whichever split."""
    seen: set[str] = set()
    parts = []
    for name in ("test", "validation", "dev"):
        kept = []
        for question in (one for of_subject in load_questions(source, name).values() for one in of_subject):
            text = question.text.strip()
            if text not in seen and len(prompt(question, [])) <= LONGEST:
                kept.append(question)
            seen.add(text)
        parts.append(kept)
    test, validation, dev = parts
    return validation, dev, test


def _row(question: Asked, answers: Callable[[Asked], tuple[str, ...]]) -> dict[str, str]:
    return {"prompt": prompt(question, []), "completion": answers(question)[question.answer]}


def letters(question: Asked) -> tuple[str, ...]:
    return COMPLETIONS


def letters_and_texts(question: Asked) -> tuple[str, ...]:
    return tuple(f"{letter}. {text}" for letter, text in zip(COMPLETIONS, question.choices, strict=True))


ANSWERS: Mapping[str, Callable[[Asked], tuple[str, ...]]] = {"letter": letters, "text": letters_and_texts}


def scores(answers: Answers) -> np.ndarray:
    """[K, N] nats: the log-likelihood of the right answer."""
    return answers.logp[:, torch.arange(answers.logp.shape[1]), _right(answers)].double().numpy()


def responsibilities(s: np.ndarray, weights: torch.Tensor, alpha: float) -> np.ndarray:
    """[K, N]: w_k exp(alpha s_k) over its sum (paper, D.1)."""
    return renyi_reduce(torch.from_numpy(s), alpha, weights=weights).responsibilities.double().numpy()


def by_subject(answers: Answers) -> np.ndarray:
    """[S, K]: the mean responsibilities of each subject, at ALPHA."""
    r, subjects = responsibilities(scores(answers), answers.weights, ALPHA), answers.facts["subject"]
    return np.array([r[:, subjects == subject].mean(axis=1) for subject in np.unique(subjects)])


def led(answers: Answers) -> float:
    """The share of the subjects in which the particle that leads most of them has the largest responsibility."""
    leaders = by_subject(answers).argmax(axis=1)
    return float(np.bincount(leaders).max() / len(leaders))


def specialisation(answers: Answers, alpha: float = ALPHA, null: str = "particles") -> tuple[float, float, float]:
    """(information in nats, z, p) of particle and subject: see `Mmlu.note`. z and p are NaN if one particle has all of
    the weight."""
    s, weights, rng = scores(answers), answers.weights, np.random.default_rng(0)
    r = responsibilities(s, weights, alpha)
    _, number = np.unique(answers.facts["subject"], return_inverse=True)
    subjects = np.eye(number.max() + 1)[number]  # [N, S]
    observed = information(r @ subjects)
    if weights.max() > 1 - LEAST_WEIGHT:
        return observed, float("nan"), float("nan")
    if null == "particles":  # they exchange what they know, and each place keeps its weight
        many = np.concatenate([rng.permuted(s, axis=0) for _ in range(NUM_PERMUTATIONS)], axis=1)
        each = np.split(responsibilities(many, weights, alpha), NUM_PERMUTATIONS, axis=1)
        exchanged = [information(of @ subjects) for of in each]
    else:
        exchanged = [information(r @ rng.permutation(subjects)) for _ in range(NUM_PERMUTATIONS)]
    spread = np.std(exchanged)
    z = float((observed - np.mean(exchanged)) / spread) if spread > 0 else float("nan")
    return observed, z, float((1 + np.sum(np.array(exchanged) >= observed)) / (1 + NUM_PERMUTATIONS))


def _hard(answers: Answers) -> Answers:
    """The questions that the base gets wrong."""
    return answers.of(answers.more["base"][0].argmax(axis=-1) != answers.facts["right"])


def _mixture(answers: Answers) -> torch.Tensor:
    return torch.from_numpy(answers.facts["mixture"])


def _right(answers: Answers) -> torch.Tensor:
    return torch.from_numpy(answers.facts["right"])


EXPERIMENT = Mmlu()
