"""Settings of evaluations, and of other commands that use an ensemble: one class for each command. Names are
transformers' wherever they have one."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from renyi_engine.core import flag, require, require_given, require_kinds, required
from renyi_engine.ensemble import ModelConfig
from renyi_engine.objectives import FINITE_ALPHA

JUDGES = "keyword, model:FOLDER_OR_HUB_ID or endpoint:BASE_URL"


@dataclass
class SamplingConfig(ModelConfig):
    """How continuations are drawn."""

    num_samples: int = flag(1, "Responses of each particle to each prompt.", group="sampling")
    max_new_tokens: int = flag(
        128, "Longest response in tokens; what the model thinks before it answers counts too.", group="sampling"
    )
    temperature: float = flag(
        1.0,
        "Temperature of the sampling. 0 always takes the most likely token, so that all samples are the same.",
        group="sampling",
    )
    top_p: float = flag(
        1.0, "Sample only from the most likely tokens that together have this probability.", group="sampling"
    )

    def check_sampling(self) -> None:
        require(self, ("num_samples", "max_new_tokens"), "a whole number of at least 1", lambda v: v >= 1)
        require(self, ("temperature",), "a finite number of at least 0", lambda v: math.isfinite(v) and v >= 0)
        require(self, ("top_p",), "a number above 0, at most 1", lambda v: 0 < v <= 1)

    def sampling(self) -> dict[str, Any]:
        """Arguments of `LoraEnsemble.generate`."""
        return {name: getattr(self, name) for name in ("num_samples", "max_new_tokens", "temperature", "top_p")}


@dataclass
class EvalConfig(ModelConfig):
    """What every evaluation shares."""

    ensemble: str = flag(
        "",
        "Folder of particles, as training writes it (RUN/particles). Without it, the bare base is evaluated.",
        group="ensemble",
    )
    output_dir: str = required("Folder for the results, the samples and the report.")
    alpha: float | None = flag(
        None,
        "The alpha of the responsibilities; without it, the alpha that the ensemble was trained with.",
        group="ensemble",
    )
    per_device_eval_batch_size: int = flag(
        8, "Prompts in a batch. Every particle sees each of them.", group="evaluation"
    )
    seed: int = flag(42, "Seed of everything that is drawn at random.", group="evaluation")

    def __post_init__(self) -> None:
        require_given(self)
        require_kinds(self)
        require(self, ("alpha",), f"{FINITE_ALPHA}, or nothing", lambda v: v is None or (math.isfinite(v) and v >= 0))
        require(self, ("per_device_eval_batch_size",), "a whole number of at least 1", lambda v: v >= 1)
        require(self, ("seed",), "a whole number from 0 to 2^32 - 1", lambda v: 0 <= v < 2**32)


@dataclass
class GenerateConfig(SamplingConfig):
    """Show what every particle, and the bare base, answers to a few prompts."""

    kind: ClassVar[str] = "generate"

    ensemble: str = required("Folder of particles, as training writes it (RUN/particles).")
    prompts: list[str] = required(
        "The questions. If the model has a chat template, each is sent as a user's turn, else as plain text. What a "
        "model thinks before it answers is shown too.",
        default=[],
    )
    seed: int = flag(42, "Seed of the sampling.", group="sampling")

    def __post_init__(self) -> None:
        require_given(self)
        require_kinds(self)
        self.check_sampling()
        require(self, ("seed",), "a whole number from 0 to 2^32 - 1", lambda v: 0 <= v < 2**32)
        for number, prompt in enumerate(self.prompts):
            if not prompt.strip():
                raise ValueError(f"prompts: number {number} is empty")


@dataclass
class NllConfig(EvalConfig):
    """Find the examples on which particles disagree, and those that no particle explains. The data set has the same
    columns as for supervised fine-tuning."""

    kind: ClassVar[str] = "nll"

    ensemble: str = required("Folder of particles, as training writes it (RUN/particles).")
    dataset_name: str = required("Examples: a .json, .jsonl, .csv or .parquet file, a folder of these, or a hub id.")
    dataset_config: str | None = flag(None, "Configuration of a hub data set.", group="data")
    dataset_split: str = flag("test", "The split that is evaluated.", group="data")
    max_length: int = flag(1024, "Longest sequence in tokens. A longer one loses its end.", group="data")
    min_disagreement: float = flag(
        0.15,
        "An example is called contested if the probabilities that two particles give to one of its tokens differ by "
        "this much or more.",
        group="evaluation",
    )
    calibration_dataset_name: str | None = flag(
        None,
        "Rows like those of training. An example is then called out of support if nearly all of these rows gain more "
        "over the base than it does.",
        group="evaluation",
    )
    calibration_dataset_split: str = flag("train", "The split of the calibration rows.", group="evaluation")
    calibration_share: float = flag(
        0.01, "The share of rows like those of training that may wrongly be called out of support.", group="evaluation"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, ("max_length",), "a whole number of at least 2", lambda v: v >= 2)
        require(self, ("min_disagreement",), "a difference above 0, at most 1", lambda v: 0 < v <= 1)
        require(self, ("calibration_share",), "a share above 0, below 1", lambda v: 0 < v < 1)
        if self.alpha == 0:
            raise ValueError("alpha: at 0 all examples have the same responsibilities; expected a number above 0")


@dataclass
class FitWeightsConfig(ModelConfig):
    """Fit the weights of an ensemble's particles to held-out rows, and write them into its ensemble.json. The rows have
    the columns that supervised fine-tuning reads, or chosen and rejected."""

    kind: ClassVar[str] = "fit-weights"

    ensemble: str = required("Folder of particles, as training writes it (RUN/particles). Its weights are replaced.")
    dataset_name: str = required(
        "Rows that training did not see: a .json, .jsonl, .csv or .parquet file, a folder of these, or a hub id."
    )
    dataset_config: str | None = flag(None, "Configuration of a hub data set.", group="data")
    dataset_split: str = flag("test", "The split that the weights are fitted to.", group="data")
    max_length: int = flag(1024, "Longest sequence in tokens. A longer one loses its end.", group="data")
    beta: float = flag(0.1, "For rows with chosen and rejected: the beta of the training.", group="data")
    alpha: float = flag(
        1.0,
        "The alpha of the loss that the weights make small. At 1, the likelihood of the mixture is maximised.",
        group="fitting",
    )
    per_device_eval_batch_size: int = flag(8, "Examples in a batch. Every particle sees each of them.", group="fitting")

    def __post_init__(self) -> None:
        require_given(self)
        require_kinds(self)
        positive = ("alpha", "beta")
        require(self, positive, "a finite number above 0", lambda v: math.isfinite(v) and v > 0)
        require(self, ("max_length",), "a whole number of at least 2", lambda v: v >= 2)
        require(self, ("per_device_eval_batch_size",), "a whole number of at least 1", lambda v: v >= 1)


@dataclass
class MmluConfig(EvalConfig):
    """Evaluate an ensemble, or a base model alone, on MMLU. Prompts, order and weights are those of lm-eval."""

    kind: ClassVar[str] = "mmlu"

    dataset_name: str = flag(
        "cais/mmlu", "A hub id, or a folder with the files of dev, validation and test.", group="data"
    )
    split: Literal["test", "validation", "dev"] = flag("test", "The split whose questions are asked.", group="data")
    subjects: list[str] | None = flag(None, "Subjects that are asked about; without it, all 57.", group="data")
    limit: int | None = flag(
        None, "How many questions of each subject are asked, from the first on; without it, all.", group="data"
    )
    num_fewshot: int = flag(
        0,
        "Solved examples in front of each question. They are the first ones of its subject in dev, which has 5.",
        group="evaluation",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, ("num_fewshot",), "a whole number of at least 0", lambda v: v >= 0)
        require(self, ("limit",), "a whole number of at least 1, or nothing", lambda v: v is None or v >= 1)
        if self.split == "dev" and self.num_fewshot:
            raise ValueError("split: the questions of dev are the few-shot examples; pass --num_fewshot 0")


@dataclass
class RefusalConfig(EvalConfig, SamplingConfig):
    """Measure how often particles refuse prompts, and whether they agree. The defaults are those of the paper where it
    names one, and the columns are those of OR-Bench."""

    kind: ClassVar[str] = "refusal"

    dataset_name: list[str] = required(
        "Prompts: files (.csv, .jsonl, ...) or hub ids. Each becomes a split of the table.", default=[]
    )
    dataset_config: list[str] | None = flag(
        None,
        "Configurations of a hub data set, such as or-bench-hard-1k or or-bench-toxic. Each becomes a split.",
        group="data",
    )
    prompt_column: str = flag("prompt", "The column that holds the prompts.", group="data")
    split_column: str | None = flag(None, "A column whose values become the splits of the table.", group="data")
    label_column: str | None = flag(
        None,
        "A column with two values. The report then says how well the particles' disagreement tells the two apart.",
        group="data",
    )
    limit: int | None = flag(
        None, "How many prompts of each split are used, from the first on; without it, all.", group="data"
    )
    num_samples: int = flag(12, "Responses of each particle to each prompt.", group="sampling")
    max_new_tokens: int = flag(
        256, "Longest response in tokens; what the model thinks before it answers counts too.", group="sampling"
    )
    judge: str = flag(
        "keyword",
        f"Who decides whether a response is a refusal: {JUDGES}. No judge sees what a model thinks before it answers. "
        "A judge may itself think.",
        group="judge",
    )
    judge_model: str | None = flag(None, "Name of the judge's model at its endpoint.", group="judge")
    judge_api_key_env: str | None = flag(
        None, "Name of the environment variable that holds the endpoint's key.", group="judge"
    )
    judge_timeout_s: float = flag(60.0, "Seconds that the endpoint may take for one whole reply.", group="judge")
    judge_max_retries: int = flag(
        4,
        "How often a failed request is repeated, with growing pauses, before the verdict counts as failed.",
        group="judge",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        require_given(self, "prompt_column", "judge")
        self.check_sampling()
        require(self, ("limit",), "a whole number of at least 1, or nothing", lambda v: v is None or v >= 1)
        require(self, ("judge_timeout_s",), "a number above 0", lambda v: math.isfinite(v) and v > 0)
        require(self, ("judge_max_retries",), "a whole number of at least 0", lambda v: v >= 0)
        if self.dataset_config and len(self.dataset_name) > 1:
            raise ValueError("dataset_config: expected only with one data set; got several in dataset_name")
