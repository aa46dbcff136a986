from .config import DpoConfig as DpoConfig, SftConfig as SftConfig, TrainConfig as TrainConfig
from .dry_run import describe_run as describe_run
from .export import export_particles as export_particles
from .loop import TrainingInterrupted as TrainingInterrupted
from .outcomes import TrainingDiverged as TrainingDiverged
from .report import write_report as write_report
from .trainer import Trainer as Trainer, TrainResult as TrainResult, train as train
