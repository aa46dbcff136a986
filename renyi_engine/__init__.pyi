from .core import DoesNotFit as DoesNotFit
from .ensemble import EnsembleConfig as EnsembleConfig, LoraEnsemble as LoraEnsemble
from .evaluation import (
    Policy as Policy,
    Predictive as Predictive,
    calibrate as calibrate,
    decide as decide,
    predictive as predictive,
)
from .objectives import DpoTask as DpoTask, SftTask as SftTask, fit_particle_weights as fit_particle_weights
from .training import (
    DpoConfig as DpoConfig,
    SftConfig as SftConfig,
    Trainer as Trainer,
    TrainingDiverged as TrainingDiverged,
    TrainingInterrupted as TrainingInterrupted,
    TrainResult as TrainResult,
    train as train,
)

__version__: str
