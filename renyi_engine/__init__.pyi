from .core import DoesNotFit as DoesNotFit
from .ensemble import EnsembleConfig as EnsembleConfig
from .ensemble import LoraEnsemble as LoraEnsemble
from .evaluation import (
    Policy as Policy,
)
from .evaluation import (
    Predictive as Predictive,
)
from .evaluation import (
    calibrate as calibrate,
)
from .evaluation import (
    decide as decide,
)
from .evaluation import (
    predictive as predictive,
)
from .objectives import DpoTask as DpoTask
from .objectives import SftTask as SftTask
from .training import (
    DpoConfig as DpoConfig,
)
from .training import (
    SftConfig as SftConfig,
)
from .training import (
    Trainer as Trainer,
)
from .training import (
    TrainingDiverged as TrainingDiverged,
)
from .training import (
    TrainingInterrupted as TrainingInterrupted,
)
from .training import (
    TrainResult as TrainResult,
)
from .training import (
    train as train,
)

__version__: str
