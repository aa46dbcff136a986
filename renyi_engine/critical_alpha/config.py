"""Settings of `renyi-engine alpha-star`."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import ClassVar, Literal

from renyi_engine.core import SQUARABLE, flag, is_squarable, require, required
from renyi_engine.ensemble import AdapterConfig, ModelConfig
from renyi_engine.evaluation import EvalConfig


@dataclass
class AlphaStarConfig(AdapterConfig, EvalConfig):
    """Estimate the critical alpha of an adapter: above it, particles that start there move apart. The data set has the
    same columns as for supervised fine-tuning."""

    kind: ClassVar[str] = "alpha-star"

    dtype: Literal["auto", "float32", "bfloat16"] = flag("float32", "Second derivatives need float32.", group="model")
    ensemble: str = flag(
        "",
        "Folder of particles, or of one PEFT adapter. Without it, the command examines a fresh adapter (B = 0).",
        group="ensemble",
    )
    particle: int = flag(0, "Which particle of the ensemble, counted from 0.", group="ensemble")
    alpha: float | None = flag(
        None,
        "The alpha of the spectrum that is shown; without it, the alpha of the ensemble's training, or 1 if that was "
        "0.",
        group="ensemble",
    )
    per_device_eval_batch_size: int = flag(
        8, "Examples in a batch. Each has a copy of the adapter.", group="evaluation"
    )
    dataset_name: str = required("Examples: a .json, .jsonl, .csv or .parquet file, a folder of these, or a hub id.")
    dataset_config: str | None = flag(None, "Configuration of a hub data set.", group="data")
    dataset_split: str = flag("train", "The split that is used.", group="data")
    max_length: int = flag(1024, "Longest sequence in tokens. A longer one loses its end.", group="data")
    max_examples: int = flag(
        128, "How many examples are used. If there are more, they are drawn at random.", group="data"
    )
    curvature: Literal["hessian", "gauss_newton"] = flag(
        "gauss_newton",
        "How the matrix H is computed. 'hessian' is all of it, as in the paper; 'gauss_newton' leaves out the "
        "curvature of the network itself.",
        group="estimate",
    )
    subspace_dims: int = flag(
        16,
        "m, the number of directions in which particles may move apart: half are the leading directions of G, half "
        "are those that lower the ratio most.",
        group="estimate",
    )
    num_resamples: int = flag(200, "Resamples of the examples for the interval.", group="estimate")
    prior_lambda: float = flag(
        0.0,
        "lambda of a Gaussian prior, whose curvature lambda / (N sigma_0^2) is added to H.",
        group="advanced",
    )
    prior_std: float = flag(1.0, "sigma_0, the standard deviation of that prior.", group="advanced")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.dtype != "float32":
            raise ValueError(f"dtype: expected float32, as second derivatives need it; got {self.dtype}")
        require(self, ("max_length", "subspace_dims"), "a whole number of at least 2", lambda v: v >= 2)
        require(self, ("max_examples", "num_resamples"), "a whole number of at least 2", lambda v: v >= 2)
        require(self, ("particle",), "a whole number of at least 0", lambda v: v >= 0)
        require(self, ("prior_std",), SQUARABLE, is_squarable)
        require(self, ("prior_lambda",), "a number of at least 0", lambda v: math.isfinite(v) and v >= 0)
        self.adapters(num_particles=1, seed=self.seed)  # raises ValueError if they cannot be made
        if self.particle and not self.ensemble:
            raise ValueError(f"particle: expected --ensemble, the folder that it is in; got {self.particle} alone")
        fresh, shared = asdict(AdapterConfig()), asdict(ModelConfig())
        given = [name for name in fresh if name not in shared and getattr(self, name) != fresh[name]]
        if self.ensemble and given:
            raise ValueError(f"{given[0]}: the adapters in {self.ensemble} have their own; leave it out")
