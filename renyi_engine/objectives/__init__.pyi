from .alpha import (
    FINITE_ALPHA as FINITE_ALPHA,
    AlphaStarController as AlphaStarController,
    Coupling as Coupling,
    EssController as EssController,
    Schedule as Schedule,
    ScheduleName as ScheduleName,
    alpha_rule as alpha_rule,
    parse_controller as parse_controller,
)
from .dpo import ACCURACY as ACCURACY, MARGIN as MARGIN, DpoTask as DpoTask
from .loss import data_term as data_term
from .metrics import ESS as ESS, EVAL as EVAL, LOSS as LOSS, Metric as Metric, Nll as Nll, nll_per as nll_per
from .particle_weights import (
    AVERAGING_RATE as AVERAGING_RATE,
    averaged as averaged,
    fit_particle_weights as fit_particle_weights,
)
from .prior import PriorName as PriorName, potential_curvature as potential_curvature, prior_term as prior_term
from .scoring import (
    Evaluation as Evaluation,
    Scorer as Scorer,
    evaluate as evaluate,
    mean_particle as mean_particle,
    means as means,
    sums as sums,
)
from .sft import SftTask as SftTask
from .task import (
    Item as Item,
    Scores as Scores,
    Task as Task,
    batch_of as batch_of,
    check_fits as check_fits,
    cut_rows as cut_rows,
    describe_rows as describe_rows,
    length as length,
    metrics_of as metrics_of,
    read_items as read_items,
)
