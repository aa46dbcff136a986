"""Settings of a training run: one flat dataclass, read from YAML and flags alike, saved as resolved with every run.

Flags are parsed by transformers' HfArgumentParser, so that they look and behave as TRL's do. A YAML file is turned into
the same flags in front of the command line's own: one way in, one kind of error, and what is typed last wins.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

import yaml
from transformers import HfArgumentParser

from renyi_engine.ensemble import EnsembleConfig
from renyi_engine.prior import PriorName
from renyi_kernels.renyi_reduce import check_alpha

CONFIG_FILE = "config.yaml"
Config = TypeVar("Config", bound="TrainConfig")


def flag(default: Any, help: str) -> Any:
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata={"help": help})
    return field(default=default, metadata={"help": help})


@dataclass
class TrainConfig:
    """What every kind of training shares. Names are TRL's and transformers' wherever they have one."""

    model_name_or_path: str = flag("", "The frozen base: a local folder or a hub id.")
    dataset_name: str = flag("", "Training data: a .json, .jsonl, .csv or .parquet file, a folder, or a hub id.")
    output_dir: str = flag("", "The run's folder: config, metrics, checkpoints, particles and report.")
    # the ensemble
    num_particles: int = flag(8, "K, the adapters that are trained together.")
    alpha: float = flag(0.8, "Coupling: 0 trains the particles independently, 1 the likelihood of their mixture.")
    lora_r: int = flag(8, "Rank of every adapter.")
    lora_alpha: float = flag(16.0, "LoRA scaling is lora_alpha / lora_r.")
    lora_target_modules: list[str] = flag(
        ["all-linear"], "'all-linear', names of linear maps, or one regular expression."
    )
    layers_to_transform: list[int] | None = flag(
        None, "Decoder layers to adapt; layers below the first run once for all."
    )
    use_rslora: bool = flag(False, "Scale by lora_alpha / sqrt(lora_r).")
    init: Literal["standard", "spread"] = flag("standard", "'standard': B zero. 'spread': B small and random too.")
    prior: PriorName = flag("potential", "Prior on particles: Gaussian potential, smoothed KL (repels), or none.")
    prior_lambda: float = flag(1e-4, "lambda, weight of the prior.")
    prior_std: float = flag(1.0, "sigma_0, standard deviation of the prior.")
    kernel_bandwidth: float | None = flag(None, "h of the smoothed KL; the median heuristic if not given.")
    # the model and its data
    model_revision: str | None = flag(None, "Branch, tag or commit of a hub model.")
    trust_remote_code: bool = flag(False, "Run code that comes with a hub model.")
    dtype: Literal["auto", "float32", "bfloat16"] = flag(
        "auto", "Compute dtype; 'auto' is the checkpoint's. Adapters are fp32."
    )
    attn_implementation: str = flag("sdpa", "Attention of the base: sdpa, eager, flash_attention_2, ...")
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
    max_grad_norm: float = flag(1.0, "Gradient-norm limit of each particle by itself; 0 switches it off.")
    num_train_epochs: float = flag(3.0, "Passes over the data, unless max_steps is given.")
    max_steps: int = flag(-1, "Optimizer steps; above 0 it overrides num_train_epochs.")
    per_device_train_batch_size: int = flag(8, "Examples of a micro-batch; every particle sees each of them.")
    per_device_eval_batch_size: int = flag(8, "Examples of an evaluation batch.")
    gradient_accumulation_steps: int = flag(1, "Micro-batches of an optimizer step.")
    gradient_checkpointing: bool = flag(False, "Recompute activations in the backward: less memory, more time.")
    group_by_length: bool = flag(False, "Draw batches of similar length: less padding.")
    max_consecutive_skips: int = flag(10, "Stop after a particle's gradient was not finite this many steps in a row.")
    seed: int = flag(42, "Of the adapters' init and of the order of the data.")
    use_cpu: bool = flag(False, "Train on the CPU although there is a GPU.")
    # the run
    logging_steps: int = flag(10, "Steps from one line of metrics.jsonl to the next.")
    eval_steps: int | None = flag(None, "Steps from one evaluation to the next; only at the end if not given.")
    save_steps: int = flag(500, "Steps from one checkpoint to the next; one is always written at the end.")
    save_total_limit: int = flag(
        2, "Checkpoints kept, the newest; at least 2, so that one is whole while one is written."
    )
    resume_from_checkpoint: str | None = flag(None, "A checkpoint folder, or 'true' for the newest of output_dir.")

    def __post_init__(self) -> None:
        for name in ("model_name_or_path", "dataset_name", "output_dir"):
            if not getattr(self, name):
                raise ValueError(f"{name}: needed, but not given; pass --{name} or put it into the --config file")
        check_alpha(self.alpha)
        self.ensemble_config()  # K, rank, lora_alpha, init and seed
        positive = ("learning_rate", "prior_std", "adam_epsilon", "num_train_epochs")
        at_least_one = (
            "per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps", "logging_steps",
            "save_steps", "max_consecutive_skips",
        )  # fmt: skip
        self._require(positive, "a number above 0", lambda v: math.isfinite(v) and v > 0)
        self._require(("kernel_bandwidth",), "a number above 0, or nothing", lambda v: v is None or v > 0)
        self._require(at_least_one, "a whole number of at least 1", lambda v: v >= 1)
        self._require(("eval_steps",), "a whole number of at least 1, or nothing", lambda v: v is None or v >= 1)
        self._require(("max_length", "save_total_limit"), "a whole number of at least 2", lambda v: v >= 2)
        self._require(("max_steps",), "-1, or a whole number of at least 1", lambda v: v == -1 or v >= 1)
        not_negative = ("prior_lambda", "weight_decay", "warmup_steps", "max_grad_norm")
        self._require(not_negative, "a number of at least 0", lambda v: math.isfinite(v) and v >= 0)
        self._require(("adam_beta1", "adam_beta2"), "a number from 0 to 1, 1 excluded", lambda v: 0 <= v < 1)

    def _require(self, names: Sequence[str], expected: str, holds: Any) -> None:
        for name in names:
            value = getattr(self, name)
            if isinstance(value, (bool, str)) or not holds(value):
                raise ValueError(f"{name}: expected {expected}; got {value!r}")

    def ensemble_config(self) -> EnsembleConfig:
        names = self.lora_target_modules
        # one name that is no plain name is a regular expression, as in PEFT
        single = (
            names[0]
            if len(names) == 1 and (names[0] == "all-linear" or not re.fullmatch(r"[\w.-]+", names[0]))
            else None
        )
        return EnsembleConfig(
            num_particles=self.num_particles,
            rank=self.lora_r,
            lora_alpha=self.lora_alpha,
            target_modules=single or names,
            layers_to_transform=self.layers_to_transform,
            init=self.init,
            seed=self.seed,
            use_rslora=self.use_rslora,
        )


def to_yaml(config: TrainConfig) -> str:
    return yaml.safe_dump(dataclasses.asdict(config), sort_keys=False)


def read_yaml(path: Path) -> dict[str, Any]:
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ValueError(f"{path}: not a readable YAML file ({str(error).splitlines()[0]})") from None
    if not isinstance(values, dict):
        raise ValueError(f"{path}: expected 'name: value' lines; got {type(values).__name__}")
    return values


def parse(cls: type[Config], argv: Sequence[str], prog: str) -> tuple[Config, argparse.Namespace]:
    """(config, options) of a command line; `options` holds print_config and dry_run.

    Raises:
        ValueError: an unknown key or flag (with the nearest known one), a value of the wrong type or out of range.
    """
    parser = _Parser(cls, prog=prog, allow_abbrev=False)
    parser.add_argument("--config", type=Path, help="A YAML file of these same names; flags override it.")
    parser.add_argument("--print_config", action="store_true", help="Print the resolved settings as YAML and stop.")
    parser.add_argument(
        "--dry_run",
        action="store_true",
        help="Print the settings, one example with its loss mask and a memory estimate.",
    )
    file_parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    file_parser.add_argument("--config", type=Path)
    config_file = file_parser.parse_known_args(argv)[0].config
    known = [f.name for f in dataclasses.fields(cls)]
    from_file = _as_flags(read_yaml(config_file), known, config_file) if config_file else []
    options, rest = parser.parse_known_args([*from_file, *argv])
    if rest:
        raise ValueError(_unknown("flag", rest[0], [f"--{name}" for name in known], "command line"))
    return cls(**{name: getattr(options, name) for name in known}), options


class _Parser(HfArgumentParser):
    def error(self, message: str) -> Any:
        raise ValueError(f"{message}; see {self.prog} --help")


def _as_flags(values: dict[str, Any], known: list[str], source: Path) -> list[str]:
    flags = []
    for name, value in values.items():
        if name not in known:
            raise ValueError(_unknown("key", str(name), known, str(source)))
        if isinstance(value, list):
            flags += [f"--{name}", *map(str, value)]
        elif isinstance(value, dict):
            raise ValueError(f"{source}: {name}: expected one value or a list; got a mapping")
        elif value is not None:
            flags.append(f"--{name}={value}")
    return flags


def _unknown(kind: str, name: str, known: Sequence[str], source: str) -> str:
    name = name.split("=")[0]
    near = difflib.get_close_matches(name, known, n=1)
    return f"{source}: unknown {kind} {name!r}" + (f"; did you mean {near[0]!r}?" if near else "; see --help")
