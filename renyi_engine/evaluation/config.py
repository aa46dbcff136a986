"""Settings of evaluations, and of whatever else looks at an ensemble: one class for each command. Names are
transformers' wherever they have one."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from renyi_engine.core import flag, require, require_given
from renyi_engine.ensemble import ModelConfig
from renyi_engine.objectives import FINITE_ALPHA

JUDGES = "keyword, model:FOLDER_OR_HUB_ID or endpoint:BASE_URL"


@dataclass
class SamplingConfig(ModelConfig):
    """How continuations are drawn."""

    num_samples: int = flag(1, "Responses of each particle to each prompt.")
    max_new_tokens: int = flag(128, "Longest response in tokens, with what the model thinks first.")
    temperature: float = flag(1.0, "Of the sampling; 0 takes the most likely token, so that samples are all the same.")
    top_p: float = flag(1.0, "Sample from the most likely tokens that make up this much.")

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

    ensemble: str = flag("", "Folder of particles, as a run writes it (RUN/particles); the bare base if not given.")
    output_dir: str = flag("", "Where results, samples and the report go.")
    alpha: float | None = flag(None, "Coupling of responsibilities; the one of the ensemble's training if not given.")
    per_device_eval_batch_size: int = flag(8, "Prompts of a batch; every particle sees each of them.")
    seed: int = flag(42, "Of whatever is drawn.")

    def __post_init__(self) -> None:
        require_given(self, ("model_name_or_path", "output_dir"))
        require(self, ("alpha",), f"{FINITE_ALPHA}, or nothing", lambda v: v is None or (math.isfinite(v) and v >= 0))
        require(self, ("per_device_eval_batch_size",), "a whole number of at least 1", lambda v: v >= 1)
        require(self, ("seed",), "a whole number from 0 to 2^32 - 1", lambda v: 0 <= v < 2**32)


@dataclass
class GenerateConfig(SamplingConfig):
    """Settings of `renyi-engine generate`."""

    kind: ClassVar[str] = "generate"

    ensemble: str = flag("", "Folder of particles, as a run writes it (RUN/particles).")
    prompts: list[str] = flag(
        [],
        "What is asked: a user's turn where the model has a chat template, else plain text. What a model thinks before "
        "it answers is shown too.",
    )
    seed: int = flag(42, "Of the sampling.")

    def __post_init__(self) -> None:
        require_given(self, ("model_name_or_path", "ensemble", "prompts"))
        self.check_sampling()
        require(self, ("seed",), "a whole number from 0 to 2^32 - 1", lambda v: 0 <= v < 2**32)
        for number, prompt in enumerate(self.prompts):
            if not prompt.strip():
                raise ValueError(f"prompts: number {number} is empty")


@dataclass
class NllConfig(EvalConfig):
    """Settings of `renyi-engine eval nll`; the data set has a form that supervised fine-tuning takes."""

    kind: ClassVar[str] = "nll"

    dataset_name: str = flag("", "Examples: a .json, .jsonl, .csv or .parquet file, a folder, or a hub id.")
    dataset_config: str | None = flag(None, "Configuration of a hub data set.")
    dataset_split: str = flag("test", "Its split.")
    calibration_dataset_name: str | None = flag(
        None, "Rows like those of training: an example is out of support if nearly all of these gain more than it does."
    )
    calibration_dataset_split: str = flag("train", "Its split.")
    calibration_share: float = flag(0.01, "Share of rows like these that may be called out of support.")
    max_length: int = flag(1024, "Longest sequence in tokens; the end is cut off.")
    min_disagreement: float = flag(
        0.15, "An example is contested if two particles' probabilities of one of its tokens differ by this or more."
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        require_given(self, ("dataset_name", "ensemble"))
        require(self, ("max_length",), "a whole number of at least 2", lambda v: v >= 2)
        require(self, ("min_disagreement",), "a difference above 0, at most 1", lambda v: 0 < v <= 1)
        require(self, ("calibration_share",), "a share above 0, below 1", lambda v: 0 < v < 1)
        if self.alpha == 0:
            raise ValueError("alpha: at 0 all responsibilities are the same; expected a number above 0")


@dataclass
class MmluConfig(EvalConfig):
    """Settings of an evaluation on MMLU; prompts, order and weights are lm-eval's."""

    kind: ClassVar[str] = "mmlu"

    dataset_name: str = flag("cais/mmlu", "A hub id, or a folder of dev, validation and test files.")
    split: Literal["test", "validation", "dev"] = flag("test", "Split to answer.")
    num_fewshot: int = flag(0, "Solved examples in front of a question: the first of its subject in dev, which has 5.")
    subjects: list[str] | None = flag(None, "Subjects to ask about; all 57 if not given.")
    limit: int | None = flag(None, "Questions of each subject, the first; all if not given.")

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, ("num_fewshot",), "a whole number of at least 0", lambda v: v >= 0)
        require(self, ("limit",), "a whole number of at least 1, or nothing", lambda v: v is None or v >= 1)
        if self.split not in ("test", "validation", "dev"):
            raise ValueError(f"split: expected one of test, validation, dev; got {self.split!r}")
        if self.split == "dev" and self.num_fewshot:
            raise ValueError("split: the questions of dev are the few-shot examples; pass --num_fewshot 0")


@dataclass
class RefusalConfig(EvalConfig, SamplingConfig):
    """Settings of `evaluate_refusal`; the defaults are the paper's where it says, and OR-Bench's columns."""

    kind: ClassVar[str] = "refusal"

    dataset_name: list[str] = flag([], "Prompts: files (.csv, .jsonl, ...) or hub ids; each is a split of the table.")
    dataset_config: list[str] | None = flag(
        None, "Configurations of a hub data set, such as or-bench-hard-1k or-bench-toxic; each is a split."
    )
    prompt_column: str = flag("prompt", "Column of the prompts.")
    split_column: str | None = flag(None, "Column whose values make splits of the table.")
    label_column: str | None = flag(None, "Column with two values: can the disagreement of particles tell them apart?")
    limit: int | None = flag(None, "Prompts of each split, the first ones; all if not given.")
    num_samples: int = flag(12, "Responses of each particle to each prompt.")
    max_new_tokens: int = flag(256, "Longest response in tokens, with what the model thinks first.")
    judge: str = flag(
        "keyword",
        f"Who tells refusals: {JUDGES}. No judge sees what a model thinks before it answers; a judge may think itself.",
    )
    judge_model: str | None = flag(None, "Name of the judge at its endpoint.")
    judge_api_key_env: str | None = flag(None, "Environment variable that holds the endpoint's key.")
    judge_timeout_s: float = flag(60.0, "Seconds that an endpoint may take for a whole reply.")
    judge_max_retries: int = flag(4, "Tries after the first, at growing distance, before a verdict counts as failed.")

    def __post_init__(self) -> None:
        super().__post_init__()
        require_given(self, ("dataset_name", "prompt_column", "judge"))
        self.check_sampling()
        require(self, ("limit",), "a whole number of at least 1, or nothing", lambda v: v is None or v >= 1)
        require(self, ("judge_timeout_s",), "a number above 0", lambda v: math.isfinite(v) and v > 0)
        require(self, ("judge_max_retries",), "a whole number of at least 0", lambda v: v >= 0)
        if self.dataset_config and len(self.dataset_name) > 1:
            raise ValueError("dataset_config: expected only with one data set; got several in dataset_name")
