"""Settings of `renyi-engine alpha-star`."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import ClassVar, Literal

from renyi_engine.core import SQUARABLE, flag, is_squarable, require, require_given
from renyi_engine.ensemble import AdapterConfig, ModelConfig
from renyi_engine.evaluation import EvalConfig


@dataclass
class AlphaStarConfig(AdapterConfig, EvalConfig):
    """Settings of `renyi-engine alpha-star`; the data set has a form that supervised fine-tuning takes."""

    kind: ClassVar[str] = "alpha-star"

    dtype: Literal["auto", "float32", "bfloat16"] = flag("float32", "Second derivatives need float32.")
    ensemble: str = flag("", "Folder of particles, or one PEFT adapter; a fresh adapter (B = 0) if not given.")
    particle: int = flag(0, "Which particle of the ensemble, counted from 0.")
    alpha: float | None = flag(
        None, "alpha of the spectrum shown; that of the ensemble's training, or 1 if that was 0."
    )
    per_device_eval_batch_size: int = flag(8, "Examples of a batch, each with a copy of the adapter.")
    dataset_name: str = flag("", "Examples: a .json, .jsonl, .csv or .parquet file, a folder, or a hub id.")
    dataset_config: str | None = flag(None, "Configuration of a hub data set.")
    dataset_split: str = flag("train", "Its split.")
    max_length: int = flag(1024, "Longest sequence in tokens; the end is cut off.")
    max_examples: int = flag(128, "Examples looked at, drawn at random if there are more.")
    subspace_dims: int = flag(16, "m: one half leading directions of G, one half what lowers the ratio most.")
    curvature: Literal["hessian", "gauss_newton"] = flag(
        "gauss_newton", "H without the network's own curvature, or all of it: 'hessian', as in the paper."
    )
    num_resamples: int = flag(200, "Resamples of the examples for the interval.")
    prior_lambda: float = flag(0.0, "lambda of a Gaussian prior, whose curvature lambda / (N sigma_0^2) is added to H.")
    prior_std: float = flag(1.0, "sigma_0, standard deviation of that prior.")

    def __post_init__(self) -> None:
        super().__post_init__()
        require_given(self, ("dataset_name",))
        if self.dtype != "float32":
            raise ValueError(f"dtype: expected float32, as second derivatives need it; got {self.dtype}")
        require(self, ("max_length", "subspace_dims"), "a whole number of at least 2", lambda v: v >= 2)
        require(self, ("max_examples", "num_resamples"), "a whole number of at least 2", lambda v: v >= 2)
        require(self, ("particle",), "a whole number of at least 0", lambda v: v >= 0)
        require(self, ("prior_std",), SQUARABLE, is_squarable)
        require(self, ("prior_lambda",), "a number of at least 0", lambda v: math.isfinite(v) and v >= 0)
        self.adapters(num_particles=1, seed=self.seed)  # raises ValueError if they cannot be made
        if self.particle and not self.ensemble:
            raise ValueError(f"particle: expected an ensemble to take it from; got {self.particle} and no --ensemble")
        fresh, shared = asdict(AdapterConfig()), asdict(ModelConfig())
        given = [name for name in fresh if name not in shared and getattr(self, name) != fresh[name]]
        if self.ensemble and given:
            raise ValueError(f"{given[0]}: the adapters in {self.ensemble} say it themselves; leave it out")
