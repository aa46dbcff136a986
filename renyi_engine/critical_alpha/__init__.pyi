from .alpha_star import find_alpha_star as find_alpha_star
from .config import AlphaStarConfig as AlphaStarConfig
from .curvature import estimate_alpha_star as estimate_alpha_star, project_adapter as project_adapter
from .derivatives import Batch as Batch
from .projection import CriticalAlpha as CriticalAlpha, Projection as Projection, critical_alpha as critical_alpha
from .subspace import project as project
