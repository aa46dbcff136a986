"""Settings of a training run. Their names are those of TRL, transformers and PEFT wherever these have one.

Every run saves its settings with all defaults filled in. They are read before torch is imported, so nothing here needs
torch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from renyi_engine.core import SQUARABLE, flag, is_squarable, require, require_given, require_kinds, required
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

WORTH_COMPILING = 500
"""A run of so many micro-batches gains by compiled layers. On an H200, compiling took 9 to 12 s and saved between 7 ms
(SmolLM2-135M) and 80 ms (Qwen2-1.5B) a micro-batch."""


@dataclass
class TrainConfig(AdapterConfig):
    """What every kind of training shares."""

    kind: ClassVar[str]
    """What config.yaml says that the run is."""

    dataset_name: str = required(
        "Training data: a .json, .jsonl, .csv or .parquet file, a folder of these, or a hub id."
    )
    output_dir: str = required("Folder of the run: its settings, metrics, checkpoints, particles and report.")

    num_particles: int = flag(8, "K, the number of adapters that are trained together.", group="ensemble")
    alpha: float = flag(
        0.8,
        "How strongly the particles are coupled. 0 trains them independently; 1 maximises the likelihood of their "
        "mixture.",
        group="ensemble",
    )
    init: Literal["standard", "spread"] = flag(
        "standard",
        "How the adapters start. 'standard': B is zero, so every particle starts as the base. 'spread': B is small and "
        "random, so the particles start apart.",
        group="ensemble",
    )
    prior: Literal["none", "potential", "smoothed_kl"] = flag(
        "potential",
        "Prior on the particles. 'potential' is Gaussian and keeps them near zero; 'smoothed_kl' also drives them "
        "apart.",
        group="ensemble",
    )
    prior_lambda: float = flag(1e-4, "lambda, the weight of the prior.", group="ensemble")
    prior_std: float = flag(1.0, "sigma_0, the standard deviation of the prior.", group="advanced")
    kernel_bandwidth: float | None = flag(
        None,
        "h, the bandwidth of 'smoothed_kl'. Without it, the median heuristic is used: the bandwidth then grows as "
        "groups of particles move apart, and each group may collapse to a point.",
        group="advanced",
    )

    particle_weights: Literal["uniform", "learned"] = flag(
        "uniform",
        "How much each particle counts in the mixture. 'uniform': 1 / num_particles each. 'learned': its mean "
        "responsibility for the examples, averaged over the last steps.",
        group="ensemble",
    )
    particle_weight_floor: float = flag(
        0.1,
        "The smallest weight that a particle may learn, times num_particles. At 0, a particle may lose all its weight.",
        group="advanced",
    )

    alpha_schedule: ScheduleName = flag(
        "constant",
        "'linear' and 'cosine' raise alpha from alpha_0 to alpha in its warm-up.",
        group="alpha over time",
    )
    alpha_0: float = flag(0.0, "The alpha that the schedule starts from.", group="alpha over time")
    alpha_warmup_steps: float = flag(
        0.5, "Length of this warm-up: a number of steps, or a share of all steps if below 1.", group="alpha over time"
    )
    alpha_controller: str | None = flag(
        None,
        "Chooses alpha anew at every step. 'ess:TARGET' keeps the mean effective sample size at TARGET times "
        "num_particles, and starts from alpha. 'alpha-star:MARGIN' keeps alpha MARGIN above the estimated critical "
        "alpha.",
        group="alpha over time",
    )
    alpha_max: float = flag(
        2.0,
        "The largest alpha that a controller may choose. Above 1, lower 'ess' targets can be reached, but the mixture "
        "gets worse.",
        group="alpha over time",
    )
    alpha_star_steps: int = flag(
        50, "Steps after which 'alpha-star' estimates the critical alpha anew.", group="alpha over time"
    )

    dataset_config: str | None = flag(None, "Configuration of a hub data set.", group="data")
    dataset_train_split: str = flag("train", "The split that is trained on.", group="data")
    dataset_test_split: str = flag("test", "The split that is evaluated on, if the data set has it.", group="data")
    eval_dataset_name: str | None = flag(
        None, "Held-out data from another place, given like dataset_name.", group="data"
    )
    max_length: int = flag(1024, "Longest sequence in tokens. A longer one loses its end.", group="data")

    learning_rate: float = flag(1e-4, "Highest learning rate of AdamW.", group="optimisation")
    lr_scheduler_type: Literal["constant", "linear", "cosine"] = flag(
        "linear", "How the learning rate falls after its warm-up.", group="optimisation"
    )
    warmup_steps: float = flag(
        0.0,
        "Warm-up of the learning rate: a number of steps, or a share of all steps if below 1.",
        group="optimisation",
    )
    num_train_epochs: float = flag(
        3.0, "How many times training goes through the data, unless max_steps is given.", group="optimisation"
    )
    max_steps: int = flag(-1, "Optimizer steps. Above 0, it replaces num_train_epochs.", group="optimisation")
    per_device_train_batch_size: int = flag(
        8,
        "Examples in a micro-batch. Every particle sees each of them. If they do not fit into the device's memory, the "
        "micro-batch is halved, and the step stays the same.",
        group="optimisation",
    )
    gradient_accumulation_steps: int = flag(1, "Micro-batches in an optimizer step.", group="optimisation")
    gradient_checkpointing: bool = flag(
        False, "Compute activations again in the backward pass: less memory, more time.", group="optimisation"
    )
    padding_free: bool = flag(
        True,
        "Put the sequences of a micro-batch into one row, one after the other, instead of padding them to the longest. "
        "What the completions of a pair begin with is computed once. Models that cannot read such rows are padded.",
        group="optimisation",
    )
    packed_row_tokens: int | None = flag(
        None,
        "Most tokens of such a row. The examples of a micro-batch that do not fit into one go into further rows of the "
        "same step. Without it, a micro-batch is one row.",
        group="advanced",
    )
    cuda_graphs: Literal["auto", "true", "false"] = flag(
        "auto",
        "Record the forward and backward of micro-batches as CUDA graphs, and replay them, so that the GPU does not "
        "wait for Python. For that, rows are filled up to a few sizes. 'auto': on a GPU, if the model can read packed "
        "rows.",
        group="optimisation",
    )
    torch_compile: Literal["auto", "true", "false"] = flag(
        "auto",
        "Compile the decoder layers with torch.compile. 'auto' does it on a GPU, in runs of at least "
        f"{WORTH_COMPILING} micro-batches: it takes some ten seconds, and makes each of them faster. Models whose "
        "layers cannot be compiled run uncompiled.",
        group="optimisation",
    )
    train_sampling_strategy: Literal["random", "group_by_length"] = flag(
        "random",
        "Order of the examples. 'group_by_length' draws batches of similar length, which need less padding where they "
        "are padded.",
        group="optimisation",
    )
    seed: int = flag(42, "Seed of the adapters' start and of the order of the examples.", group="optimisation")
    max_grad_norm: float = flag(
        1.0,
        "Largest gradient norm of each particle, measured as if the particle were trained alone. 0 switches clipping "
        "off.",
        group="optimisation",
    )
    weight_decay: float = flag(0.0, "Weight decay of AdamW. The prior already pulls towards zero.", group="advanced")
    adam_beta1: float = flag(0.9, "beta1 of AdamW.", group="advanced")
    adam_beta2: float = flag(0.999, "beta2 of AdamW.", group="advanced")
    adam_epsilon: float = flag(1e-8, "epsilon of AdamW.", group="advanced")
    spike_threshold: float | None = flag(
        None,
        "Skip the update of a step whose mixture NLL, per token or per pair, is more than this many times the median "
        "of the last 20 steps. Without it, no step is skipped for its loss.",
        group="advanced",
    )
    max_consecutive_skips: int = flag(
        10,
        "Stop training when the update of a particle was skipped this many times in a row, because its gradient was "
        "not finite or the loss was a spike.",
        group="advanced",
    )

    logging_steps: int = flag(10, "Steps from one line of metrics to the next.", group="saving and logging")
    eval_steps: int | None = flag(
        None,
        "Steps from one evaluation of the held-out data to the next; without it, only one at the end.",
        group="saving and logging",
    )
    per_device_eval_batch_size: int = flag(8, "Examples in a batch of an evaluation.", group="saving and logging")
    save_steps: int = flag(
        500, "Steps from one checkpoint to the next. One is always saved at the end.", group="saving and logging"
    )
    save_total_limit: int = flag(
        2,
        "How many checkpoints are kept: the newest ones. At least 2, so that one is whole while another is written.",
        group="saving and logging",
    )
    resume_from_checkpoint: str | None = flag(
        None,
        "Go on from this checkpoint folder, or with 'true' from the newest one in output_dir. 'false' starts a new "
        "run.",
        group="saving and logging",
    )
    report_to: list[str] = flag(
        ["none"],
        "Also send the metrics to these programs, which have to be installed: tensorboard, trackio, wandb, mlflow, or "
        "another that transformers knows. 'all' stands for all that are installed.",
        group="saving and logging",
    )
    run_name: str | None = flag(None, "The run's name in these programs.", group="saving and logging")
    metric_for_best_model: str | None = flag(
        None,
        "The evaluation metric by which callbacks such as EarlyStoppingCallback find the best step. Without it, it is "
        "the NLL of the mixture.",
        group="advanced",
    )

    def __post_init__(self) -> None:
        # a Trainer may be given the model and the data themselves; a command line has to name them
        require_given(self, excused=("model_name_or_path", "dataset_name"))
        if isinstance(self.report_to, str):  # as transformers takes it
            self.report_to = [self.report_to]
        # true and false in Python, and as they are typed
        said = str(self.resume_from_checkpoint).lower()
        if said in ("none", "false", "no", "off", "true", "yes", "on"):
            self.resume_from_checkpoint = "true" if said in ("true", "yes", "on") else None
        for name in ("cuda_graphs", "torch_compile"):
            if isinstance(getattr(self, name), bool):
                setattr(self, name, "true" if getattr(self, name) else "false")
        require(self, ("alpha",), FINITE_ALPHA, lambda v: math.isfinite(v) and v >= 0)
        require_kinds(self)
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
        at_least_one_or_none = ("eval_steps", "packed_row_tokens")
        require(self, at_least_one_or_none, "a whole number of at least 1, or nothing", lambda v: v is None or v >= 1)
        require(self, ("max_length", "save_total_limit"), "a whole number of at least 2", lambda v: v >= 2)
        require(self, ("max_steps",), "-1, or a whole number of at least 1", lambda v: v == -1 or v >= 1)
        not_negative = (
            "alpha_0", "alpha_warmup_steps", "prior_lambda", "weight_decay", "warmup_steps", "max_grad_norm",
        )  # fmt: skip
        require(self, not_negative, "a number of at least 0", lambda v: math.isfinite(v) and v >= 0)
        require(self, ("adam_beta1", "adam_beta2"), "a number from 0 to 1, 1 excluded", lambda v: 0 <= v < 1)
        require(self, ("particle_weight_floor",), "a number from 0 to 1, 1 excluded", lambda v: 0 <= v < 1)
        self._check_learned_weights()
        self.coupling(total_steps=1, estimate=float)  # alpha_controller, and what goes with it

    def coupling(self, total_steps: int, estimate: Callable[[int], float]) -> Coupling:
        """What sets alpha in a run of so many steps; `estimate` gives the critical alpha before a step.

        Raises:
            ValueError: alpha_controller cannot be read, or contradicts the other settings.
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
                f"alpha_controller: {self.alpha_controller!r} has no effect on a single particle, which learns all "
                f"of every example; expected num_particles of at least 2; got {self.num_particles}"
            )
        name, value = parse_controller(self.alpha_controller)
        if name == "ess":
            return EssController(value, self.num_particles, self.alpha, self.alpha_max)
        return AlphaStarController(value, self.alpha_max, self.alpha_star_steps, estimate)

    def _check_learned_weights(self) -> None:
        """Raise ValueError if weights are to be learned, but the coupling does not allow it."""
        if self.particle_weights == "uniform":
            return
        from_0 = self.alpha_schedule == "constant" or self.alpha_0 == 0
        if self.alpha == 0 and from_0 and self.alpha_controller is None:
            raise ValueError(
                "particle_weights: at alpha 0 the responsibilities are the weights, so nothing can be learned; give an "
                "alpha above 0, or leave particle_weights at uniform"
            )
        if self.alpha_controller is not None and parse_controller(self.alpha_controller)[0] == "ess":
            raise ValueError(
                f"particle_weights: learned weights change the effective sample size by themselves, so "
                f"alpha_controller {self.alpha_controller!r} cannot steer it; leave out one of the two"
            )

    @classmethod
    def in_todays_words(cls, saved: Mapping[str, Any]) -> dict[str, Any]:
        """Settings of this kind as a file holds them, of an earlier version too: it saved no kind, and said
        group_by_length true or false."""
        values = {"kind": cls.kind} | dict(saved)
        if "group_by_length" in values:
            grouped = str(values.pop("group_by_length")).lower() in ("true", "yes", "on")
            values.setdefault("train_sampling_strategy", "group_by_length" if grouped else "random")
        return values

    def compiles(self, device_type: str, num_steps: int) -> bool:
        """Whether a run of so many steps on such a device compiles the decoder layers."""
        worth_it = device_type == "cuda" and num_steps * self.gradient_accumulation_steps >= WORTH_COMPILING
        return self.torch_compile == "true" or (self.torch_compile == "auto" and worth_it)

    @property
    def alpha_varies(self) -> bool:
        return self.alpha_controller is not None or self.alpha_schedule != "constant"

    def ensemble_config(self) -> EnsembleConfig:
        return self.adapters(self.num_particles, self.seed, self.init)


@dataclass
class SftConfig(TrainConfig):
    """Supervised fine-tuning. The data set has the column messages, or prompt and completion, or text."""

    kind: ClassVar[str] = "sft"


@dataclass
class DpoConfig(TrainConfig):
    """Direct preference optimisation. The data set has the columns chosen and rejected, and also prompt, unless both
    begin with the prompt."""

    kind: ClassVar[str] = "dpo"

    beta: float = flag(
        0.1, "Strength of the reference: a larger beta keeps the particles closer to the base.", group="preferences"
    )
    min_score_gap: float | None = flag(
        None, "Keep only the pairs whose scores differ by more than this.", group="preferences"
    )
    score_columns: list[str] = flag(
        ["score_chosen", "score_rejected"], "The two columns that min_score_gap compares.", group="preferences"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, ("beta",), "a number above 0", lambda v: 0 < v < float("inf"))
        require(self, ("min_score_gap",), "a number of at least 0, or nothing", lambda v: v is None or v >= 0)
        if len(self.score_columns) != 2:
            raise ValueError(f"score_columns: expected two names, chosen and rejected; got {self.score_columns}")


CONFIGS: dict[str, type[TrainConfig]] = {cls.kind: cls for cls in (SftConfig, DpoConfig)}


def steps_of(given: float, total_steps: int) -> int:
    """A number of steps that was given as such, or as a share of all steps if below 1."""
    return int(given if given >= 1 else given * total_steps)
