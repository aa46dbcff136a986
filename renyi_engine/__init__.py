"""Alpha-Renyi ensembles of LoRA adapters: K coupled particles on one frozen language model."""

from renyi_engine.dpo import DpoConfig
from renyi_engine.ensemble import EnsembleConfig, LoraEnsemble
from renyi_engine.sft import SftConfig
from renyi_engine.trainer import TrainingDiverged, TrainingInterrupted, TrainResult, train

__all__ = [
    "DpoConfig",
    "EnsembleConfig",
    "LoraEnsemble",
    "SftConfig",
    "TrainResult",
    "TrainingDiverged",
    "TrainingInterrupted",
    "train",
]
