"""The settings of an ensemble and of its base. They are read before torch is imported, so nothing here needs torch."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import ClassVar, Literal

from renyi_engine.core import flag, require, required
from renyi_engine.ensemble import path_patterns

ALL_LINEAR = "all-linear"
SMALLEST_SCALING, LARGEST_SCALING = 2.0**-126, 2.0**127
"""The scalings that float32 holds with all its digits."""


@dataclass(frozen=True, init=False)
class EnsembleConfig:
    """What defines an ensemble, with PEFT's names.

    Attributes:
        num_particles: K, at least 1.
        r: R, the rank of every adapter, at least 1. It may also be given and read as `rank`.
        lora_alpha: the scaling is lora_alpha / r. With use_rslora it is lora_alpha / sqrt(r).
        target_modules: "all-linear", a regular expression for whole paths, or a list of names (see `targets`).
        layers_to_transform: the decoder layers to adapt, or None for all. Layers below the first of them run once for
            all particles.
        init: A is Kaiming-uniform. With "standard", B is zero, so every particle starts as the base. With "spread", B
            is Gaussian with standard deviation 0.01, so particles start apart.
        seed: the init of particle k depends on (seed, k) alone.
    """

    num_particles: int
    r: int
    lora_alpha: float
    target_modules: str | Sequence[str]
    layers_to_transform: Sequence[int] | None
    init: Literal["standard", "spread"]
    seed: int
    use_rslora: bool

    def __init__(
        self,
        num_particles: int = 8,
        r: int | None = None,
        lora_alpha: float = 16,
        target_modules: str | Sequence[str] = ALL_LINEAR,
        layers_to_transform: Sequence[int] | None = None,
        init: Literal["standard", "spread"] = "standard",
        seed: int = 0,
        use_rslora: bool = False,
        *,
        rank: int | None = None,
    ) -> None:
        if r is not None and rank is not None and r != rank:
            raise ValueError(f"r, rank: two names of one setting, but r is {r!r} and rank is {rank!r}; give r alone")
        if r is None:
            r = 8 if rank is None else rank
        values = (num_particles, r, lora_alpha, target_modules, layers_to_transform, init, seed, use_rslora)
        for field, value in zip(fields(self), values, strict=True):
            object.__setattr__(self, field.name, value)
        self._check("r" if rank is None else "rank")

    def _check(self, name_of_rank: str) -> None:
        for name, value in (("num_particles", self.num_particles), (name_of_rank, self.r)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name}: expected a whole number of at least 1; got {value!r}")
        if not isinstance(self.use_rslora, bool):
            raise ValueError(f"use_rslora: expected True or False; got {self.use_rslora!r}")
        number = isinstance(self.lora_alpha, (int, float)) and not isinstance(self.lora_alpha, bool)
        if not (number and math.isfinite(self.lora_alpha) and self.lora_alpha > 0):
            raise ValueError(f"lora_alpha: expected a number above 0; got {self.lora_alpha!r}")
        if not SMALLEST_SCALING <= self.scaling <= LARGEST_SCALING:
            raise ValueError(
                f"lora_alpha: expected a scaling (lora_alpha / r) that float32 can hold; got {self.lora_alpha!r}, "
                f"which makes {self.scaling:g}"
            )
        if isinstance(self.target_modules, str):
            path_patterns.check(self.target_modules)
        elif not all(isinstance(name, str) for name in self.target_modules):
            raise ValueError(f"target_modules: expected names of linear maps; got {list(self.target_modules)}")
        if self.init not in ("standard", "spread"):
            raise ValueError(f"init: expected 'standard' or 'spread'; got {self.init!r}")
        if not isinstance(self.seed, int) or not 0 <= self.seed < 2**32:
            raise ValueError(f"seed: expected a whole number from 0 to 2^32 - 1; got {self.seed!r}")

    @property
    def rank(self) -> int:
        return self.r

    @property
    def scaling(self) -> float:
        return self.lora_alpha / (math.sqrt(self.r) if self.use_rslora else self.r)


@dataclass
class ModelConfig:
    """The frozen base."""

    setting_of: ClassVar[Mapping[str, str]] = {
        "model": "model_name_or_path",
        "tokenizer": "model_name_or_path",
        "r": "lora_r",
        "target_modules": "lora_target_modules",
    }
    """Arguments that errors of the Python API name, and the setting that each comes from."""

    model_name_or_path: str = required("The frozen base model: a local folder or a hub id.")
    model_revision: str | None = flag(None, "Branch, tag or commit of a hub model.", group="model")
    trust_remote_code: bool = flag(
        False,
        "Run program code that comes with a model. Only the command line can switch this on, not a --config file.",
        group="model",
        typed_only=True,
    )
    dtype: Literal["auto", "float32", "bfloat16"] = flag(
        "auto",
        "Number type in which the base computes. 'auto' takes the type of the model's files. Adapters are float32.",
        group="model",
    )
    use_cpu: bool = flag(False, "Compute on the CPU even if there is a GPU.", group="model")
    attn_implementation: str = flag(
        "sdpa",
        "Attention code of the base: sdpa, eager, flash_attention_2 or another of transformers'.",
        group="advanced",
    )


@dataclass
class AdapterConfig(ModelConfig):
    """What is adapted, and by how much."""

    lora_r: int = flag(8, "Rank of every adapter.", group="adapters")
    lora_alpha: float = flag(
        16.0, "LoRA's own alpha: an adapter's output is scaled by lora_alpha / lora_r.", group="adapters"
    )
    lora_target_modules: list[str] = flag(
        ["all-linear"],
        "Which linear maps get adapters: 'all-linear', or names, or one regular expression for whole paths.",
        group="adapters",
    )
    layers_to_transform: list[int] | None = flag(
        None,
        "Numbers of the decoder layers that get adapters; without it, all. Layers below the first of them run once "
        "for all particles.",
        group="adapters",
    )
    use_rslora: bool = flag(
        False, "Scale by lora_alpha / sqrt(lora_r) instead of lora_alpha / lora_r.", group="advanced"
    )

    def adapters(
        self, num_particles: int, seed: int, init: Literal["standard", "spread"] = "standard"
    ) -> EnsembleConfig:
        """The ensemble of `num_particles` such adapters."""
        require(self, ("lora_r",), "a whole number of at least 1", lambda v: v >= 1)
        require(self, ("lora_r",), "a whole number below 2^31", lambda v: v < 2**31)
        names = self.lora_target_modules
        # one name that is no plain name is a regular expression, as in PEFT
        single = (
            names[0] if len(names) == 1 and (names[0] == ALL_LINEAR or not re.fullmatch(r"[\w.-]+", names[0])) else None
        )
        return EnsembleConfig(
            num_particles=num_particles,
            r=self.lora_r,
            lora_alpha=self.lora_alpha,
            target_modules=single or names,
            layers_to_transform=self.layers_to_transform,
            init=init,
            seed=seed,
            use_rslora=self.use_rslora,
        )
