"""People who disagree: hate speech and offence, judged by several annotators, each of whom is a training row.

Data: LeWiDi, SemEval-2023 task 11 (Leonardelli et al. 2023), as one JSON line a tweet: `hs_brexit.jsonl.gz` (Akhtar et
al. 2021: three annotators of the group that is insulted, three others) and `md_agreement.jsonl.gz` (Leonardelli et al.
2021: five annotators). README.md says where they come from and which columns are read.
"""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import combinations, product
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure

from examples.evidence.experiment import Answers, Data, Experiment, Metric, Question, Setting, Variant, on_cpu, on_gpu
from examples.evidence.measures import auroc, information as mutual_information
from examples.evidence.methods import ALL, FEW
from examples.evidence.pictures import draw_intervals
from renyi_engine.data import read_file

NUM_TWEETS = {"train": 784, "dev": 168, "test": 168}
"""hs_brexit has so many; of md_agreement as many are drawn."""
TWEETS_TOGETHER = 4
NUM_HELD_OUT = 256
WORDS = ("no", "yes")


class People(Experiment):
    name = "people"
    title = "People who disagree"
    claim = (
        "Trained on the labels of single annotators, coupled particles predict the distribution of labels no worse "
        "than a deep ensemble, find better which items people disagree about, and side with groups of annotators."
    )
    caption = "the cross-entropy of each method, hate speech, three labels in an answer."
    data_file = "hs_brexit.jsonl.gz"
    settings: Mapping[str, Setting] = {
        "cpu": on_cpu(max_steps=160),
        "gpu": on_gpu(learning_rate=5e-4, max_steps=300, seeds=5),
    }

    def variants(self, setting: str) -> Sequence[Variant]:
        return [
            Variant("hate speech, three labels in an answer", 4, ALL, {"source": "hs_brexit", "form": "three labels"}),
            Variant("hate speech, four tweets together", 4, FEW, {"source": "hs_brexit", "form": "four tweets"}),
            Variant("hate speech, one label", 4, FEW, {"source": "hs_brexit", "form": "one label"}),
            Variant("offence, four tweets together", 4, FEW, {"source": "md_agreement", "form": "four tweets"}),
        ]

    def setting_of(self, setting: str, options: Mapping[str, Any]) -> Setting:
        found = self.settings[setting]
        if options["form"] == "four tweets":  # as many labels and tweets, in steps of fewer rows
            return replace(found, batch_size=found.batch_size // TWEETS_TOGETHER)
        return found

    def data(self, options: Mapping[str, Any], seed: int, source: Path | None) -> Data:
        rng, form = random.Random(seed), options["form"]
        assert source is not None
        tweets = read(source / f"{options['source']}.jsonl.gz", rng)
        ask, judged = FORMS[form], "hate" if options["source"] == "hs_brexit" else "offensive"
        rows = {part: ask.rows(tweets[part], judged, rng) for part in ("train", "dev")}
        tested = tweets["test"]
        people = max(len(tweet["labels"]) for tweet in tested)
        return Data(
            rows=rows["train"],
            held_out=rng.sample(rows["dev"], min(NUM_HELD_OUT, len(rows["dev"]))),
            questions=[Question(*ask.question(tested, number, judged)) for number in range(len(tested))],
            facts={
                "asked": np.array([tweet["text"] for tweet in tested]),
                "labels": np.array([tweet["labels"] for tweet in tested]),  # [N, people]
                "groups": np.array([tweet.get("groups", ["?"] * people) for tweet in tested]),  # [N, people]
                "given": np.array([ask.given(tweet) for tweet in tested]),  # [N, people]: which answer
                "yes": np.array([ask.yes] * len(tested)),  # [N, C]: whether the answer says yes
            },
        )

    metrics: Mapping[str, Metric] = {
        "cross_entropy": Metric("cross-entropy", "lower", lambda answers: cross_entropy(answers)),
        "f1": Metric("F1", "higher", lambda answers: f1(answers)),
        "total": Metric("AUROC total", "higher", lambda answers: _tells(answers, "total")),
        "aleatoric": Metric("aleatoric", "higher", lambda answers: _tells(answers, "aleatoric")),
        "epistemic": Metric("epistemic", "higher", lambda answers: _tells(answers, "epistemic")),
        "information": Metric(
            "information", "", lambda answers: 1000 * information(answers), digits=2, resampled=False, of_members=True
        ),
        "rank": Metric("rank", "", lambda answers: rank(answers), digits=1, resampled=False, of_members=True),
    }
    note = (
        "784 training tweets, 168 test tweets. Cross-entropy is between the annotators' labels and the mixture's "
        "probability of yes, in nats a tweet; F1 is the micro F1 on the majority's label, of tweets that have a "
        "majority. AUROC says how well each uncertainty of the yes or no finds the tweets on which people disagree. "
        "Information is the mutual information between the group of an annotator and the particle that explains the "
        "annotator's label, in thousandths of a nat. Rank is its permutation test: the place of the real groups among "
        "all 10 ways to part the six annotators three to three, 1 being the most information (means over the seeds; "
        "with six people no p-value can be below 0.1). Weights are fitted to 256 rows of the validation split."
    )

    def picture(self, results: Mapping[str, Any]) -> Figure:
        methods = results["variants"][0]["methods"]
        figure, axes = plt.subplots(figsize=(8, 3.6), layout="constrained")
        found = [of["metrics"]["cross_entropy"] for of in methods.values()]
        places = np.arange(len(found))
        draw_intervals(axes, places, found, horizontal=True)
        axes.set(yticks=places, yticklabels=[of["label"] for of in methods.values()], xlabel="cross-entropy, nats")
        axes.invert_yaxis()
        axes.grid(alpha=0.3)
        return figure


class OneLabel:
    """A row is a tweet and what one annotator says of it."""

    yes = (False, True)

    def prompt(self, text: str) -> str:
        return f"Tweet: {text}\nLabels:"

    def rows(self, tweets: Sequence[Mapping[str, Any]], judged: str, rng: random.Random) -> list[dict[str, str]]:
        return [
            {"prompt": self.prompt(tweet["text"]), "completion": f" {judged} {WORDS[label]}"}
            for tweet in tweets
            for label in tweet["labels"]
        ]

    def question(self, tweets: Sequence[Mapping[str, Any]], number: int, judged: str) -> tuple[str, tuple[str, ...]]:
        return self.prompt(tweets[number]["text"]), tuple(f" {judged} {word}" for word in WORDS)

    def given(self, tweet: Mapping[str, Any]) -> list[int]:
        return list(tweet["labels"])


class ThreeLabels(OneLabel):
    """A row is a tweet and three labels of one annotator, of which the last one is asked for."""

    combinations = tuple(product((0, 1), repeat=3))
    yes = tuple(bool(combination[-1]) for combination in combinations)

    def answer(self, labels: Sequence[int]) -> str:
        names = ("aggressive", "offensive", "hate")
        return " " + ", ".join(f"{name} {WORDS[label]}" for name, label in zip(names, labels, strict=True))

    def rows(self, tweets: Sequence[Mapping[str, Any]], judged: str, rng: random.Random) -> list[dict[str, str]]:
        return [
            {"prompt": self.prompt(tweet["text"]), "completion": self.answer(labels)}
            for tweet in tweets
            for labels in self._labels(tweet)
        ]

    def question(self, tweets: Sequence[Mapping[str, Any]], number: int, judged: str) -> tuple[str, tuple[str, ...]]:
        return self.prompt(tweets[number]["text"]), tuple(map(self.answer, self.combinations))

    def given(self, tweet: Mapping[str, Any]) -> list[int]:
        return [self.combinations.index(labels) for labels in self._labels(tweet)]

    @staticmethod
    def _labels(tweet: Mapping[str, Any]) -> list[tuple[int, ...]]:
        """The three labels of every annotator; one that is missing counts as no."""
        columns = (tweet["aggressive"], tweet["offensive"], tweet["labels"])
        return [tuple(label or 0 for label in labels) for labels in zip(*columns, strict=True)]


class FourTweets(OneLabel):
    """A row is four tweets and what one annotator says of each. What is said of the first is asked for."""

    def prompt(self, text: str) -> str:
        return f"{text}\nLabels:"

    def rows(self, tweets: Sequence[Mapping[str, Any]], judged: str, rng: random.Random) -> list[dict[str, str]]:
        of_annotator = defaultdict(list)
        for tweet in tweets:
            for annotator, label in zip(tweet["annotators"], tweet["labels"], strict=True):
                of_annotator[annotator].append((tweet["text"], label))
        rows = []
        for judgements in of_annotator.values():
            rng.shuffle(judgements)
            for start in range(0, len(judgements) - TWEETS_TOGETHER + 1, TWEETS_TOGETHER):
                four = judgements[start : start + TWEETS_TOGETHER]
                answer = ",".join(f" {judged} {WORDS[label]}" for _, label in four)
                rows.append({"prompt": self._listed([text for text, _ in four]), "completion": answer})
        return rows

    def question(self, tweets: Sequence[Mapping[str, Any]], number: int, judged: str) -> tuple[str, tuple[str, ...]]:
        texts = [tweets[(number + step) % len(tweets)]["text"] for step in range(TWEETS_TOGETHER)]
        return self._listed(texts), tuple(f" {judged} {word}" for word in WORDS)

    def _listed(self, texts: Sequence[str]) -> str:
        return self.prompt("\n".join(f"Tweet {number}: {text}" for number, text in enumerate(texts, 1)))


FORMS = {"one label": OneLabel(), "three labels": ThreeLabels(), "four tweets": FourTweets()}


def read(path: Path, rng: random.Random) -> dict[str, list[dict[str, Any]]]:
    """The tweets by split; of a data set with more tweets, a sample."""
    tweets = read_file(path, "json")
    parts = {part: [tweet for tweet in tweets if tweet["split"] == part] for part in NUM_TWEETS}
    return {part: rng.sample(of, min(NUM_TWEETS[part], len(of))) for part, of in parts.items()}


def particles_yes(answers: Answers) -> np.ndarray:
    """[K, N]: the probability of yes under every particle."""
    return (answers.particles.numpy() * answers.facts["yes"]).sum(axis=-1)


def yes(answers: Answers) -> np.ndarray:
    """[N]: the probability of yes under the mixture."""
    return answers.weights.numpy() @ particles_yes(answers)


def f1(answers: Answers) -> float:
    """The micro F1, which is the accuracy, on the label of most people. Tweets on which they halve do not count."""
    said = answers.facts["labels"].mean(axis=1)
    return float(((yes(answers) > 0.5) == (said > 0.5))[said != 0.5].mean())


def cross_entropy(answers: Answers) -> float:
    """Between the annotators' labels and the mixture's probability of yes, nats a tweet; as LeWiDi measures it."""
    said, p = answers.facts["labels"].mean(axis=1), np.clip(yes(answers), 1e-12, 1 - 1e-12)
    return float(-(said * np.log(p) + (1 - said) * np.log1p(-p)).mean())


def _tells(answers: Answers, kind: str) -> float:
    """The AUROC of an uncertainty about yes and no, for the tweets on which people disagree."""
    said = answers.facts["labels"].mean(axis=1)
    p = particles_yes(answers)
    total, aleatoric = _entropy(yes(answers)), answers.weights.numpy() @ _entropy(p)
    score = {"total": total, "aleatoric": aleatoric, "epistemic": total - aleatoric}[kind]
    return auroc(score, (said > 0) & (said < 1))


def _entropy(p: np.ndarray) -> np.ndarray:
    p = np.clip(p, 1e-12, 1 - 1e-12)
    return -p * np.log(p) - (1 - p) * np.log1p(-p)


def information(answers: Answers) -> float:
    """The mutual information, in nats, of an annotator's group and the particle that explains the annotator's answer.

    The particle is drawn by its posterior probability, w_k p_k(answer) / sum_j w_j p_j(answer). NaN if there is one
    group, or one particle, which explains every answer.
    """
    group = _group(answers)
    return float("nan") if group is None else _information(_explained(answers), group)


def rank(answers: Answers) -> float:
    """The place of the real groups among all ways to halve the annotators, by `information`; 1 is the most.

    Ways that tie share the mean of their places. NaN where `information` is.
    """
    group = _group(answers)
    if group is None:
        return float("nan")
    explained, people = _explained(answers), range(len(group))
    # the half of the first annotator says which way it is
    ways = [np.isin(people, (0, *others)) for others in combinations(people[1:], len(group) // 2 - 1)]
    found, real = np.array([_information(explained, way) for way in ways]), _information(explained, group)
    tied = np.isclose(found, real, rtol=1e-9)
    return float((found[~tied] > real).sum() + (1 + tied.sum()) / 2)


def _group(answers: Answers) -> np.ndarray | None:
    """[people]: who is in the group of the first annotator. None if there is one group or one particle."""
    groups = answers.facts["groups"]
    if len(answers.logp) == 1 or len(np.unique(groups)) == 1:
        return None
    group: np.ndarray = groups[0] == groups[0, 0]
    if (groups != groups[0]).any() or 2 * group.sum() != len(group):
        raise ValueError("groups: expected two of the same size, and the same annotators in one order for all tweets")
    return group


def _explained(answers: Answers) -> np.ndarray:
    """[K, people]: the posterior probability of each particle, given an annotator's answer; summed over the tweets."""
    given = np.broadcast_to(answers.facts["given"], (len(answers.logp), *answers.facts["given"].shape))
    shares = np.take_along_axis(answers.particles.numpy(), given, axis=-1) * answers.weights.numpy()[:, None, None]
    return (shares / shares.sum(axis=0)).sum(axis=1)


def _information(explained: np.ndarray, group: np.ndarray) -> float:
    return mutual_information(np.stack([explained[:, group].sum(axis=1), explained[:, ~group].sum(axis=1)]))


EXPERIMENT = People()
