"""Away from the training data: does the uncertainty find wrong answers, and tweets of other domains?

Tweets of two domains of `md_agreement.jsonl.gz` are trained on, each with the label that most of its five annotators
gave. Three kinds of tweets are tested:

    in      other tweets of the two domains
    near    tweets of the third domain; each seed leaves another one out
    far     tweets of `hs_brexit.jsonl.gz`: another topic, other annotators, the same question (is it offensive?)

The files are those of `examples/evidence/people`.

Layout: K members of an ensemble, N questions, C answers.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor

from examples.evidence.experiment import Answers, Data, Experiment, Metric, Question, Setting, Variant, on_cpu, on_gpu
from examples.evidence.measures import auroc
from examples.evidence.pictures import draw_intervals
from renyi_engine.data import read_file
from renyi_engine.evaluation import calibration

DOMAINS = ("BLM", "Covid-19", "Elections2020")
NUM_TRAIN, NUM_HELD_OUT = 800, 100
NUM_TESTED = {"in": 120, "near": 80, "far": 80}
ANSWERS = (" offensive no", " offensive yes")
UNCERTAINTIES = ("total", "aleatoric", "epistemic")
PLACES = {"in": ("in",), "out": ("near", "far")}
TABLES = {"in": "tweets of the training domains", "out": "tweets from elsewhere"}
COVERAGES = np.linspace(0.05, 1.0, 20)
TRAINED = ("lora", "mc_dropout", "deep_ensemble", "deep_fitted", "alpha_0.8", "fitted")
SHOWN = ("lora", "deep_ensemble", "alpha_0.8", "fitted")


def tells_wrong(answers: Answers, kind: str) -> float:
    """The AUROC of an uncertainty for wrong answers."""
    return auroc(answers.facts[kind], answers.facts["wrong"])


def tells_place(answers: Answers, kind: str, place: str) -> float:
    """The AUROC of an uncertainty for tweets of a place beside those of the training domains."""
    both = answers.of(np.isin(answers.facts["place"], ("in", place))).facts
    return auroc(both[kind], both["place"] == place)


def aurc(answers: Answers, kind: str) -> float:
    """The area under the risk-coverage curve."""
    return calibration.aurc(*_scored(answers, kind))


def risks(answers: Answers, kind: str) -> list[float]:
    """The share of wrong answers among the most certain ones, at `COVERAGES`."""
    coverage, risk = calibration.risk_coverage(*_scored(answers, kind))
    return np.interp(COVERAGES, coverage.numpy(), risk.numpy()).tolist()


def _scored(answers: Answers, kind: str) -> tuple[Tensor, Tensor]:
    return torch.from_numpy(answers.facts[kind]), torch.from_numpy(answers.facts["wrong"])


def _at(where: str, of: Callable[..., Any], *kind: str) -> Callable[[Answers], Any]:
    """A function of the answers to the tweets of some places."""
    return lambda answers: of(answers.of(np.isin(answers.facts["place"], PLACES[where])), *kind)


def _metrics() -> dict[str, Metric]:
    metrics = {}
    for where, table in TABLES.items():
        right = _at(where, lambda answers: 1 - float(answers.facts["wrong"].mean()))
        metrics[f"accuracy_{where}"] = Metric("accuracy", "higher", right, table=table)
        metrics[f"nll_{where}"] = Metric(
            "NLL", "lower", _at(where, lambda answers: float(answers.facts["nll"].mean())), table=table
        )
        for kind in UNCERTAINTIES:
            metrics[f"aurc_{kind}_{where}"] = Metric(f"AURC {kind}", "lower", _at(where, aurc, kind), table=table)
        for kind in UNCERTAINTIES:
            of = _at(where, tells_wrong, kind)
            metrics[f"auroc_{kind}_{where}"] = Metric(f"AUROC {kind}", "higher", of, table=table)
    for place in PLACES["out"]:
        for kind in UNCERTAINTIES:
            metrics[f"{place}_{kind}"] = Metric(
                f"{place}, {kind}",
                "higher",
                lambda answers, kind=kind, place=place: tells_place(answers, kind, place),
                table="AUROC of tweets from elsewhere beside tweets of the training domains",
            )
    return metrics


class OutOfDistribution(Experiment):
    name = "out_of_distribution"
    title = "Out of distribution, and abstention"
    claim = (
        "The uncertainty of coupled particles finds wrong answers, in the training distribution and away from it, and "
        "finds tweets of other domains, no worse than that of a deep ensemble."
    )
    caption = (
        "the risk if only the most certain tweets are answered (total uncertainty), and how well the epistemic "
        "uncertainty finds tweets of other domains."
    )
    note = (
        "800 training tweets, 280 test tweets. The mixture's answer is wrong if it is not the label of most "
        "annotators. NLL is of that label, in nats. AURC is the area under the risk-coverage curve, if tweets are "
        "answered by rising uncertainty; the error rate is what an uncertainty that knows nothing gets. AUROC says how "
        "well the uncertainty finds wrong answers; in the last table, tweets of a domain that was left out (near) and "
        "of another data set (far). 0.5 is chance."
    )
    data_file = "md_agreement.jsonl.gz"
    settings: Mapping[str, Setting] = {
        "cpu": on_cpu(max_steps=80),
        "gpu": on_gpu(learning_rate=2e-4, max_steps=400, seeds=6),
    }
    metrics: Mapping[str, Metric] = _metrics()
    curves: Mapping[str, Callable[[Answers], Sequence[float]]] = {
        f"risks_{where}": _at(where, risks, "total") for where in PLACES
    }

    def variants(self, setting: str) -> Sequence[Variant]:
        return [Variant("offence, trained on two of three domains", 4, TRAINED)]

    def data(self, options: Mapping[str, Any], seed: int, source: Path | None) -> Data:
        assert source is not None
        rng, left_out = random.Random(seed), DOMAINS[seed % len(DOMAINS)]
        trained_on = [domain for domain in DOMAINS if domain != left_out]
        tweets = read(source / "md_agreement.jsonl.gz")

        def some(number: int, split: str, *domains: str) -> list[dict[str, Any]]:
            """So many tweets, as many of each domain."""
            return [
                tweet
                for domain in domains
                for tweet in rng.sample(
                    [one for one in tweets if one["split"] == split and one["domain"] == domain],
                    number // len(domains),
                )
            ]

        train, held_out = some(NUM_TRAIN, "train", *trained_on), some(NUM_HELD_OUT, "dev", *trained_on)
        tested = {
            "in": some(NUM_TESTED["in"], "test", *trained_on),
            "near": some(NUM_TESTED["near"], "test", left_out),
            "far": rng.sample(read(source / "hs_brexit.jsonl.gz", "offensive"), NUM_TESTED["far"]),
        }
        return Data(
            rows=[_row(tweet) for tweet in train],
            held_out=[_row(tweet) for tweet in held_out],
            questions=[Question(_prompt(tweet), ANSWERS) for of in tested.values() for tweet in of],
            facts={
                "place": np.array([place for place, of in tested.items() for _ in of]),
                "domain": np.array([tweet.get("domain", "Brexit") for of in tested.values() for tweet in of]),
                "offensive": np.array([int(tweet["majority"]) for of in tested.values() for tweet in of]),
            },
        )

    def derived(self, answers: Answers) -> Mapping[str, np.ndarray]:
        """Of each tweet [N]: the NLL of the majority's label if it is yes or no, whether the mixture's answer is
        wrong, and the uncertainties, nats. The epistemic one of a single member is 0, without its rounding errors."""
        among, label = answers.among, torch.from_numpy(answers.facts["offensive"])
        alone = len(answers.logp) == 1
        return {
            "nll": -among.mixture.gather(1, label[:, None])[:, 0].numpy(),
            "wrong": (among.answer != label).numpy(),
            "total": among.total.numpy(),
            "aleatoric": among.aleatoric.numpy(),
            "epistemic": np.zeros(len(label)) if alone else among.epistemic.numpy(),
        }

    def picture(self, results: Mapping[str, Any]) -> Figure:
        figure, (left, right) = plt.subplots(1, 2, figsize=(9.5, 3.8), layout="constrained")
        methods = results["variants"][0]["methods"]
        for number, name in enumerate(SHOWN):
            for where, line in (("in", "-"), ("out", "--")):
                risk = np.mean(methods[name]["curves"][f"risks_{where}"], axis=0)
                label = methods[name]["label"] if where == "in" else None
                left.plot(COVERAGES, risk, line, color=f"C{number}", label=label)
        left.plot([], [], "--", color="0.4", label="tweets from elsewhere")
        left.set(xlabel="share of tweets answered", ylabel="share of wrong answers")
        left.legend(fontsize=8)
        places = np.arange(len(methods))
        for shift, place in ((-0.12, "near"), (0.12, "far")):
            found = [of["metrics"][f"{place}_epistemic"] for of in methods.values()]
            draw_intervals(right, places + shift, found, horizontal=True, label=place)
        right.axvline(0.5, linestyle=":", color="0.4")
        right.set(yticks=places, yticklabels=[of["label"] for of in methods.values()], xlabel="AUROC, epistemic")
        right.invert_yaxis()
        right.legend(fontsize=8)
        for axes in (left, right):
            axes.grid(alpha=0.3)
        return figure


def read(path: Path, labels: str = "labels") -> list[dict[str, Any]]:
    """The tweets, each with what most of its annotators say; those without a majority are left out."""
    found = []
    for tweet in read_file(path, "json"):
        given = [label for label in tweet[labels] if label is not None]
        if 2 * sum(given) != len(given):
            found.append(tweet | {"majority": 2 * sum(given) > len(given)})
    return found


def _prompt(tweet: Mapping[str, Any]) -> str:
    return f"Tweet: {tweet['text']}\nLabels:"


def _row(tweet: Mapping[str, Any]) -> dict[str, str]:
    return {"prompt": _prompt(tweet), "completion": ANSWERS[tweet["majority"]]}


EXPERIMENT = OutOfDistribution()
