"""Alpha-Renyi ensembles of LoRA adapters: K coupled particles on one frozen language model.

A name is imported from its module when it is first used, so that `import renyi_engine` alone does not import torch.
"""

from __future__ import annotations

import importlib
import importlib.metadata
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from renyi_engine.config import DpoConfig, SftConfig
    from renyi_engine.dpo import DpoTask
    from renyi_engine.ensemble import LoraEnsemble
    from renyi_engine.ensemble_config import EnsembleConfig
    from renyi_engine.memory import DoesNotFit
    from renyi_engine.sft import SftTask
    from renyi_engine.trainer import TrainingDiverged, TrainingInterrupted, TrainResult, train
    from renyi_engine.uncertainty import Policy, Predictive, calibrate, decide, predictive

    __version__: str

__all__ = [
    "DoesNotFit",
    "DpoConfig",
    "DpoTask",
    "EnsembleConfig",
    "LoraEnsemble",
    "Policy",
    "Predictive",
    "SftConfig",
    "SftTask",
    "TrainResult",
    "TrainingDiverged",
    "TrainingInterrupted",
    "calibrate",
    "decide",
    "predictive",
    "train",
]

_MODULE_OF = {
    "DoesNotFit": "memory",
    "DpoConfig": "config",
    "DpoTask": "dpo",
    "EnsembleConfig": "ensemble_config",
    "LoraEnsemble": "ensemble",
    "Policy": "uncertainty",
    "Predictive": "uncertainty",
    "SftConfig": "config",
    "SftTask": "sft",
    "TrainResult": "trainer",
    "TrainingDiverged": "trainer",
    "TrainingInterrupted": "trainer",
    "calibrate": "uncertainty",
    "decide": "uncertainty",
    "predictive": "uncertainty",
    "train": "trainer",
}


def __getattr__(name: str) -> Any:
    if name == "__version__":
        try:
            return importlib.metadata.version("renyi-engine")
        except importlib.metadata.PackageNotFoundError:
            raise AttributeError("renyi-engine is not installed, so its version is not known; pip install it") from None
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(importlib.import_module(f"{__name__}.{_MODULE_OF[name]}"), name)
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__, "__version__"])
