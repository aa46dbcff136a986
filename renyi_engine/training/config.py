"""Settings of a training run: its base model, its adapters, its training. Names are TRL's and transformers' wherever
they have one. Every run saves its settings as resolved. They are read before torch is imported, so nothing here needs
it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Literal

from renyi_engine.core import SQUARABLE, flag, is_squarable, require, require_given
from renyi_engine.ensemble import AdapterConfig, EnsembleConfig
from renyi_engine.objectives import (
    FINITE_ALPHA,
    AlphaStarController,
    Coupling,
    EssController,
    Schedule,
    ScheduleName,
    parse_controller,
)


@dataclass
class TrainConfig(AdapterConfig):
    """What every kind of training shares."""

    kind: ClassVar[str]
    """What config.yaml says that the run is."""
    needed: ClassVar[tuple[str, ...]] = ("model_name_or_path", "dataset_name")
    """What a command line has to give. In Python a `Trainer` may be given the model and the data set themselves."""

    dataset_name: str = flag("", "Training data: a .json, .jsonl, .csv or .parquet file, a folder, or a hub id.")
    output_dir: str = flag("", "The run's folder: config, metrics, checkpoints, particles and report.")
    # the ensemble
    num_particles: int = flag(8, "K, the adapters that are trained together.")
    alpha: float = flag(0.8, "Coupling: 0 trains the particles independently, 1 the likelihood of their mixture.")
    alpha_schedule: ScheduleName = flag("constant", "'linear' and 'cosine' warm alpha up, from alpha_0 to alpha.")
    alpha_0: float = flag(0.0, "Where the warm-up of alpha starts.")
    alpha_warmup_steps: float = flag(0.5, "Warm-up of alpha in steps, or below 1 as a share of all steps.")
    alpha_controller: str | None = flag(
        None,
        "Sets alpha from step to step: 'ess:TARGET' keeps the mean effective sample size at TARGET * num_particles, "
        "starting from alpha; 'alpha-star:MARGIN' stays MARGIN above the estimated critical alpha.",
    )
    alpha_max: float = flag(
        2.0,
        "Largest alpha of a controller. 1 is the likelihood of the mixture; a larger one reaches lower 'ess' targets "
        "at the price of a worse mixture.",
    )
    alpha_star_steps: int = flag(50, "Steps from one estimate of the critical alpha to the next, for 'alpha-star'.")
    init: Literal["standard", "spread"] = flag("standard", "'standard': B zero. 'spread': B small and random too.")
    prior: Literal["none", "potential", "smoothed_kl"] = flag(
        "potential", "Prior on particles: Gaussian potential, smoothed KL (repels), or none."
    )
    prior_lambda: float = flag(1e-4, "lambda, weight of the prior.")
    prior_std: float = flag(1.0, "sigma_0, standard deviation of the prior.")
    kernel_bandwidth: float | None = flag(
        None,
        "h of the smoothed KL. If not given, the median heuristic: it grows as modes part, and each may then collapse.",
    )
    # the data
    dataset_config: str | None = flag(None, "Configuration of a hub data set.")
    dataset_train_split: str = flag("train", "Split to train on.")
    dataset_test_split: str = flag("test", "Split to evaluate on, if the data set has it.")
    eval_dataset_name: str | None = flag(None, "Held-out data of its own, in the forms of dataset_name.")
    max_length: int = flag(1024, "Longest sequence in tokens; the end is cut off.")
    # the optimisation
    learning_rate: float = flag(1e-4, "Peak learning rate of AdamW.")
    weight_decay: float = flag(0.0, "Decoupled weight decay; the prior already pulls towards zero.")
    adam_beta1: float = flag(0.9, "AdamW beta1.")
    adam_beta2: float = flag(0.999, "AdamW beta2.")
    adam_epsilon: float = flag(1e-8, "AdamW epsilon.")
    lr_scheduler_type: Literal["constant", "linear", "cosine"] = flag("linear", "Schedule after the warm-up.")
    warmup_steps: float = flag(0.0, "Warm-up in steps, or below 1 as a share of all steps.")
    max_grad_norm: float = flag(
        1.0,
        "Limit of each particle's own gradient norm, as if it were trained alone: of K times its gradient of the loss, "
        "as the loss is a mean over K particles. 0 switches clipping off.",
    )
    num_train_epochs: float = flag(3.0, "Passes over the data, unless max_steps is given.")
    max_steps: int = flag(-1, "Optimizer steps; above 0 it overrides num_train_epochs.")
    per_device_train_batch_size: int = flag(
        8, "Examples of a micro-batch; every particle sees each of them. Halved where the device's memory ends."
    )
    per_device_eval_batch_size: int = flag(8, "Examples of an evaluation batch.")
    gradient_accumulation_steps: int = flag(1, "Micro-batches of an optimizer step.")
    gradient_checkpointing: bool = flag(False, "Recompute activations in the backward: less memory, more time.")
    group_by_length: bool = flag(False, "Draw batches of similar length: less padding.")
    spike_threshold: float | None = flag(
        None,
        "Skip the update of a step whose mixture NLL is more than this many times the median of the last 20 steps, "
        "counted a token, or a pair; no step is skipped if not given.",
    )
    max_consecutive_skips: int = flag(
        10, "Stop after a particle's update was skipped, for a gradient not finite or a spike, this often in a row."
    )
    seed: int = flag(42, "Of the adapters' init and of the order of the data.")
    # the run
    logging_steps: int = flag(10, "Steps from one line of metrics.jsonl to the next.")
    eval_steps: int | None = flag(None, "Steps from one evaluation to the next; only at the end if not given.")
    save_steps: int = flag(500, "Steps from one checkpoint to the next; one is always written at the end.")
    save_total_limit: int = flag(
        2, "Checkpoints kept, the newest; at least 2, so that one is whole while one is written."
    )
    resume_from_checkpoint: str | None = flag(
        None, "A checkpoint folder, or 'true' for the newest of output_dir; 'false' starts a new run."
    )
    # reporting
    report_to: list[str] = flag(
        ["none"],
        "Also report the metrics to these, each of which has to be installed: tensorboard, trackio, wandb, mlflow and "
        "whatever else transformers knows; 'all' that are installed, or 'none'.",
    )
    run_name: str | None = flag(None, "The run's name there.")
    metric_for_best_model: str | None = flag(
        None,
        "The metric of an evaluation that tells callbacks which step was the best, for instance where "
        "EarlyStoppingCallback stops; the NLL of the mixture if not given.",
    )

    def __post_init__(self) -> None:
        require_given(self, ("output_dir",))
        # true and false in Python, and as they are typed
        said = str(self.resume_from_checkpoint).lower()
        if said in ("none", "false", "no", "off", "true", "yes", "on"):
            self.resume_from_checkpoint = "true" if said in ("true", "yes", "on") else None
        require(self, ("alpha",), FINITE_ALPHA, lambda v: math.isfinite(v) and v >= 0)
        self.ensemble_config()  # K, rank, lora_alpha, init and seed
        positive = ("alpha_max", "learning_rate", "adam_epsilon", "num_train_epochs")
        at_least_one = (
            "per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps", "logging_steps",
            "save_steps", "max_consecutive_skips", "alpha_star_steps",
        )  # fmt: skip
        require(self, positive, "a number above 0", lambda v: math.isfinite(v) and v > 0)
        require(self, ("prior_std",), SQUARABLE, is_squarable)
        require(self, ("kernel_bandwidth",), f"{SQUARABLE}, or nothing", lambda v: v is None or is_squarable(v))
        require(self, ("spike_threshold",), "a number above 1, or nothing", lambda v: v is None or v > 1)
        require(self, at_least_one, "a whole number of at least 1", lambda v: v >= 1)
        require(self, ("eval_steps",), "a whole number of at least 1, or nothing", lambda v: v is None or v >= 1)
        require(self, ("max_length", "save_total_limit"), "a whole number of at least 2", lambda v: v >= 2)
        require(self, ("max_steps",), "-1, or a whole number of at least 1", lambda v: v == -1 or v >= 1)
        not_negative = (
            "alpha_0", "alpha_warmup_steps", "prior_lambda", "weight_decay", "warmup_steps", "max_grad_norm",
        )  # fmt: skip
        require(self, not_negative, "a number of at least 0", lambda v: math.isfinite(v) and v >= 0)
        require(self, ("adam_beta1", "adam_beta2"), "a number from 0 to 1, 1 excluded", lambda v: 0 <= v < 1)
        self.coupling(total_steps=1, estimate=float)  # alpha_controller, and what goes with it

    def coupling(self, total_steps: int, estimate: Callable[[int], float]) -> Coupling:
        """What sets alpha in a run of so many steps; `estimate` gives the critical alpha before a step.

        Raises:
            ValueError: alpha_controller cannot be read, or does not go with the other settings.
        """
        if self.alpha_controller is None:
            num_steps = steps_of(self.alpha_warmup_steps, total_steps)
            return Schedule(self.alpha_schedule, self.alpha_0, self.alpha, num_steps)
        if self.alpha_schedule != "constant":
            raise ValueError(
                f"alpha_controller: {self.alpha_controller!r} sets alpha by itself and excludes alpha_schedule "
                f"{self.alpha_schedule!r}; give one of the two"
            )
        if self.num_particles < 2:
            raise ValueError(
                f"alpha_controller: {self.alpha_controller!r} has nothing to steer where one particle takes every "
                f"example whole; expected num_particles of at least 2; got {self.num_particles}"
            )
        name, value = parse_controller(self.alpha_controller)
        if name == "ess":
            return EssController(value, self.num_particles, self.alpha, self.alpha_max)
        return AlphaStarController(value, self.alpha_max, self.alpha_star_steps, estimate)

    @property
    def alpha_varies(self) -> bool:
        return self.alpha_controller is not None or self.alpha_schedule != "constant"

    def ensemble_config(self) -> EnsembleConfig:
        return self.adapters(self.num_particles, self.seed, self.init)


@dataclass
class SftConfig(TrainConfig):
    """Settings of supervised fine-tuning; the data set has the columns messages, or prompt + completion, or text."""

    kind: ClassVar[str] = "sft"


@dataclass
class DpoConfig(TrainConfig):
    """Settings of preference optimisation; the data set has the columns chosen and rejected, and prompt unless that is
    what both begin with."""

    kind: ClassVar[str] = "dpo"

    beta: float = flag(0.1, "Strength of the preference: larger keeps particles closer to the base.")
    min_score_gap: float | None = flag(None, "Keep only pairs whose scores differ by more than this.")
    score_columns: list[str] = flag(["score_chosen", "score_rejected"], "Columns that min_score_gap compares.")

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, ("beta",), "a number above 0", lambda v: 0 < v < float("inf"))
        require(self, ("min_score_gap",), "a number of at least 0, or nothing", lambda v: v is None or v >= 0)
        if len(self.score_columns) != 2:
            raise ValueError(f"score_columns: expected two names, chosen and rejected; got {self.score_columns}")


CONFIGS: dict[str, type[TrainConfig]] = {cls.kind: cls for cls in (SftConfig, DpoConfig)}


def steps_of(given: float, total_steps: int) -> int:
    """A number of steps that was given as such, or below 1 as a share of all steps."""
    return int(given if given >= 1 else given * total_steps)
