"""Contested questions: when do particles become the camps, and what does it cost or bring?

The questions are made by `examples/contested/questions.py`. 60 are trained on. About some of them, two camps give
different answers; each row holds the answer of one person, and does not say of which camp.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure

from examples.contested.questions import Question as Asked, make_questions
from examples.evidence.experiment import Answers, Data, Experiment, Metric, Question, Setting, Variant, on_cpu, on_gpu
from examples.evidence.measures import auroc, variance
from examples.evidence.methods import ALL, FEW
from examples.evidence.pictures import draw_intervals

NUM_ROWS = 60
NUM_TESTED = {"uncontested": 12, "even": 16, "uneven": 16}
NUM_HELD_OUT = 20
"""Contested rows for fitting the particle weights, and as many uncontested ones; where half of the training rows are
contested."""
ONE_WORD = ("Yes", "No")
UNFITTED = ("lora", "deep_ensemble", "alpha_0.8")
"""Where no rows are held out."""
WEIGHTED = (*FEW, "learned")
BASE = {"contested": 30, "minority": 0.5, "topics": 1, "answers": "phrases"}


class Contested(Experiment):
    name = "contested"
    title = "Contested questions"
    claim = (
        "Where two camps answer differently, coupled particles become the camps: their spread marks the contested "
        "questions, and the mixture predicts people no worse than a deep ensemble."
    )
    settings: Mapping[str, Setting] = {
        "cpu": on_cpu(max_steps=60),
        "gpu": on_gpu(learning_rate=5e-4, max_steps=120, seeds=5),
    }

    def variants(self, setting: str) -> Sequence[Variant]:
        changed: list[tuple[str, int, tuple[str, ...], dict[str, Any]]] = [
            ("4 particles, half of the rows contested, camps of one size", 4, ALL, {}),
            ("2 particles", 2, WEIGHTED, {}),
            ("8 particles", 8, FEW, {}),
            ("camps of 4 to 1", 4, WEIGHTED, {"minority": 0.2}),
            ("camps of 9 to 1", 4, WEIGHTED, {"minority": 0.1}),
            ("a tenth of the rows contested", 4, UNFITTED, {"contested": 6}),
            ("nine tenths of the rows contested", 4, UNFITTED, {"contested": 54}),
            ("two topics", 4, UNFITTED, {"topics": 2}),
            ("answers of one word", 4, (*UNFITTED, "alpha_1"), {"answers": "one word"}),
        ]
        return [Variant(name, K, methods, BASE | data) for name, K, methods, data in changed]

    def data(self, options: Mapping[str, Any], seed: int, source: Path | None) -> Data:
        kinds = ("even", "uneven")[: options["topics"]]
        num_train = {"uncontested": NUM_ROWS - options["contested"]}
        num_train |= {kind: options["contested"] // len(kinds) for kind in kinds}
        shares = {"uncontested": 1.0} | dict.fromkeys(kinds, 1.0 - options["minority"])
        num_held_out = NUM_HELD_OUT if num_train["even"] == num_train["uncontested"] else 0
        num_others = {kind: NUM_TESTED[kind] for kind in ("uncontested", *kinds)}
        num_others["even"] += num_held_out
        train, others = make_questions(seed, num_train, num_others, {"uneven": 0.5} | shares)
        even = [asked for asked in others if asked.kind == "even"]
        tested = [asked for asked in others if asked not in even[NUM_TESTED["even"] :]]
        one_word = options["answers"] == "one word"
        held_out = even[NUM_TESTED["even"] :]
        known = {asked.text for asked in (*train, *tested)}
        uncontested, _ = make_questions(seed, {"uncontested": 66}, 0)  # all that there are
        held_out += [asked for asked in uncontested if asked.text not in known][:num_held_out]
        return Data(
            rows=[_row(asked, one_word) for asked in train],
            held_out=[_row(asked, one_word) for asked in held_out],
            questions=[Question(asked.row(True)["prompt"], _answers(asked, one_word)) for asked in tested],
            facts={
                "contested": np.array([asked.kind != "uncontested" for asked in tested]),
                "share": np.array([[asked.share_of_first, 1 - asked.share_of_first] for asked in tested]),
            },
        )

    def derived(self, answers: Answers) -> Mapping[str, np.ndarray]:
        """Of each question [N], nats: the NLL of the mixture against the shares of the camps, and the epistemic
        uncertainty."""
        return {
            "nll": -(answers.mixture.double().numpy() * answers.facts["share"]).sum(axis=1),
            "epistemic": answers.among.epistemic.numpy(),
        }

    metrics: Mapping[str, Metric] = {
        "nll": Metric("NLL of the mixture, contested", "lower", lambda answers: _nll(answers, True)),
        "uncontested_nll": Metric("uncontested", "lower", lambda answers: _nll(answers, False)),
        "spread": Metric("spread", "", lambda answers: float(_spread(_contested(answers)).mean())),
        "by_camp": Metric(
            "by camp", "", lambda answers: by_particle(_contested(answers)), digits=2, centred=True, of_members=True
        ),
        "auroc": Metric(
            "AUROC", "higher", lambda answers: auroc(answers.facts["epistemic"], answers.facts["contested"])
        ),
    }
    caption = "the spread of the particles over alpha, and what it costs the mixture."
    note = (
        "60 training rows, 28 questions (44 with two topics). NLL is in nats per answer, against the shares of the "
        "camps; the best possible is 0 where people agree, and 0.693, 0.500 and 0.325 for camps of 1:1, 4:1 and 9:1. "
        "Spread is the standard deviation, over the particles, of the probability of the first camp's answer, on "
        "contested questions. By camp is the share of this variance that belongs to the particle alone: 1 if every "
        "particle always sides with one camp, near 1/N if each takes sides question by question. Weights are fitted to "
        "20 contested and 20 uncontested rows that were held out. AUROC says how well the epistemic uncertainty finds "
        "the contested questions."
    )

    def picture(self, results: Mapping[str, Any]) -> Figure:
        figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
        methods = results["variants"][0]["methods"]
        names = ["deep_ensemble", "alpha_0.3", "alpha_0.5", "alpha_0.8", "alpha_1"]
        shown = ((left, "spread", "spread on contested questions"), (right, "nll", "NLL of the mixture, nats"))
        for axes, metric, label in shown:
            found = [methods[name]["metrics"][metric] for name in names]
            draw_intervals(axes, [0.0, 0.3, 0.5, 0.8, 1.0], found, fmt="o-")
            axes.set(xlabel="alpha", ylabel=label)
            axes.grid(alpha=0.3)
        right.axhline(math.log(2), linestyle="--", color="0.4", label="best possible")
        right.legend()
        return figure


def _row(asked: Asked, one_word: bool) -> dict[str, Any]:
    answer = _answers(asked, one_word)[0 if asked.answered_by_first else 1]
    return {"prompt": asked.row(True)["prompt"], "completion": [{"role": "assistant", "content": answer}]}


def _answers(asked: Asked, one_word: bool) -> tuple[str, str]:
    return ONE_WORD if one_word and asked.kind != "uncontested" else asked.answers


def _contested(answers: Answers) -> Answers:
    return answers.of(answers.facts["contested"])


def _nll(answers: Answers, contested: bool) -> float:
    return float(answers.facts["nll"][answers.facts["contested"] == contested].mean())


def _spread(answers: Answers) -> np.ndarray:
    """[N]: the standard deviation over the particles of the probability of the first answer."""
    return np.sqrt(variance(answers.particles[..., 0].numpy(), answers.weights.numpy()))


def by_particle(answers: Answers) -> float:
    """Var_k(mean_n p_kn) / mean_n Var_k(p_kn) of the probability p of the first answer, a particle drawn by weight."""
    p, weights = answers.particles[..., 0].numpy(), answers.weights.numpy()
    within = variance(p, weights).mean()
    return float(variance(p.mean(axis=1, keepdims=True), weights)[0] / within) if within > 0 else float("nan")


EXPERIMENT = Contested()
