"""What an experiment consists of. Each folder here defines one, in its `experiment.py`.

An experiment trains every method on the same data, with several seeds, and asks all of them the same questions. What
the members of an ensemble answer is kept (`cells`); everything in the tables is computed from that (`summary`).

Layout: K members of an ensemble, N questions, C answers to choose from.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor

from renyi_engine import LoraEnsemble
from renyi_engine.evaluation import Predictive, predictive
from renyi_engine.objectives import SftTask
from renyi_kernels import renyi_reduce

if TYPE_CHECKING:
    from examples.evidence.cells import Work

Messages = list[dict[str, str]]


@dataclass(frozen=True)
class Setting:
    """How large an experiment is. Every method is trained with these.

    Attributes:
        last_layers: how many of the model's last layers are adapted; None: all.
        max_steps, batch_size: so many optimizer steps on so many rows. lora_r: the rank.
        seeds: how often everything is repeated.
    """

    model: str
    last_layers: int | None
    dtype: str
    learning_rate: float
    max_steps: int
    batch_size: int = 8
    lora_r: int = 8
    max_length: int = 512
    seeds: int = 3


def on_cpu(max_steps: int) -> Setting:
    """The small setting of every experiment."""
    return Setting("SmolLM2-135M-Instruct", 4, "bfloat16", learning_rate=1e-3, max_steps=max_steps)


def on_gpu(learning_rate: float, max_steps: int, seeds: int) -> Setting:
    """The large setting, in which all layers are adapted."""
    return Setting("HuggingFaceTB/SmolLM2-1.7B-Instruct", None, "bfloat16", learning_rate, max_steps, seeds=seeds)


@dataclass(frozen=True)
class Variant:
    """A part of an experiment: the number of members, the methods, and what the data depend on."""

    name: str
    num_particles: int
    methods: tuple[str, ...]
    data: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Question:
    """A prompt, and the C answers whose probability is asked for.

    The prompt is messages, and then an answer is a whole reply; or it is a text, and then an answer is how it goes on.
    With `openings`, the prompt is what a user says, and an answer is how the reply begins.
    """

    prompt: Messages | str
    answers: tuple[str, ...]
    openings: bool = False


@dataclass(frozen=True)
class Data:
    """What one training learns, and what it is asked afterwards.

    Attributes:
        rows: to train on, each with prompt and completion. held_out: rows for fitting the particle weights.
        questions: all with the same number C of answers.
        facts: what is known of the questions, each an array that begins with N. "asked" names each question, the same
            in every seed; where an experiment does not give it, it is the prompt.
    """

    rows: Sequence[dict[str, Any]]
    questions: Sequence[Question]
    facts: Mapping[str, np.ndarray]
    held_out: Sequence[dict[str, Any]] = ()


@dataclass(frozen=True)
class Answers:
    """What the K members of an ensemble answer to N questions.

    Attributes:
        logp: [K, N, C] nats, the log-likelihood of each answer. weights: [K], how much each member counts.
        facts: what is known of these questions. more: what `Experiment.ask_more` found, each [K, N, ...].
    """

    logp: Tensor
    weights: Tensor
    facts: Mapping[str, np.ndarray]
    more: Mapping[str, np.ndarray] = field(default_factory=dict)

    def of(self, chosen: np.ndarray) -> Answers:
        """The answers to some of the questions; `chosen` are their numbers, or a mask."""
        facts = {name: values[chosen] for name, values in self.facts.items()}
        more = {name: values[:, chosen] for name, values in self.more.items()}
        return Answers(self.logp[:, torch.as_tensor(chosen)], self.weights, facts, more)

    @property
    def mixture(self) -> Tensor:
        """[N, C] nats: the log-likelihood of each answer under the mixture. Other answers have the rest of 1."""
        nll = renyi_reduce(self.logp.flatten(1), 1.0, weights=self.weights).loss
        return -nll.view(self.logp.shape[1:])

    @cached_property
    def among(self) -> Predictive:
        """The predictions and uncertainties if one of the C answers is given."""
        return predictive(self.logp, self.weights)

    @property
    def particles(self) -> Tensor:
        """[K, N, C]: the probability that each member gives to each answer, if one of them is given."""
        return self.logp.double().softmax(dim=-1)


@dataclass(frozen=True)
class Metric:
    """A number that is computed from answers.

    Attributes:
        better: "lower", "higher" or "" where neither is better.
        resampled: whether it has an interval. Some take too long for that, and some have no sound one.
        centred: whether its interval is moved so that the bootstrap's mean lies at the number itself: for numbers that
            grow if questions are drawn again, such as variances.
        of_members: whether it compares members from question to question. It is not computed for passes with dropout,
            because a pass is no member: its masks are others for every question.
        table: metrics with the same name here share a table.
    """

    label: str
    better: str
    of: Callable[[Answers], float]
    digits: int = 3
    resampled: bool = True
    centred: bool = False
    of_members: bool = False
    table: str = ""


class Experiment(ABC):
    """One experiment.

    Attributes:
        name: of its folder. claim: what is tested. note: what the columns of the tables mean. caption: of the picture.
        settings: by name, "cpu" and "gpu". metrics: the columns. data_file: what the folder of --data has to hold.
        curves: for the picture, lists of numbers that are computed from the answers of one seed.
    """

    name: str
    title: str
    claim: str
    note: str
    caption: str
    settings: Mapping[str, Setting]
    metrics: Mapping[str, Metric]
    data_file: str | None = None
    curves: Mapping[str, Callable[[Answers], Sequence[float]]] = {}

    @abstractmethod
    def variants(self, setting: str) -> Sequence[Variant]:
        """What is trained."""

    @abstractmethod
    def data(self, options: Mapping[str, Any], seed: int, source: Path | None) -> Data:
        """The data of one training, by `Variant.data`. `source` is the folder given by --data."""

    def setting_of(self, setting: str, options: Mapping[str, Any]) -> Setting:
        """The setting in which data of these options are trained on."""
        return self.settings[setting]

    def derived(self, answers: Answers) -> Mapping[str, np.ndarray]:
        """More facts, which follow for each question from its answers. They are computed once, before the bootstrap
        draws questions."""
        return {}

    def ask_more(self, ensemble: LoraEnsemble, task: SftTask, data: Data) -> Mapping[str, np.ndarray]:
        """What else is found out about the questions after a training, each [members, N, ...]: see `Answers.more`."""
        return {}

    def home(self, options: Mapping[str, Any]) -> str:
        """The experiment in whose folder a training on data of these options is kept: another one may share it."""
        return self.name

    def further(self, work: Work) -> dict[str, Any]:
        """Results beside the tables, as JSON."""
        return {}

    def further_lines(self, results: Mapping[str, Any]) -> list[str]:
        """The lines of the page that show them, in Markdown."""
        return []

    @abstractmethod
    def picture(self, results: Mapping[str, Any]) -> Figure:
        """A picture of what `summary` made."""
