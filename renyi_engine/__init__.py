"""Alpha-Renyi ensembles of LoRA adapters: K coupled particles on one frozen language model."""

from renyi_engine.dpo import DpoConfig, DpoTask
from renyi_engine.ensemble import EnsembleConfig, LoraEnsemble
from renyi_engine.memory import DoesNotFit
from renyi_engine.sft import SftConfig, SftTask
from renyi_engine.trainer import TrainingDiverged, TrainingInterrupted, TrainResult, train
from renyi_engine.uncertainty import Policy, Predictive, calibrate, decide, predictive

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
