from .finite import (
    Posterior as Posterior,
    mixture_loss as mixture_loss,
    objective as objective,
    reweighted as reweighted,
    self_consistent_posterior as self_consistent_posterior,
    threshold as threshold,
)
from .two_regimes import (
    GaussianPosterior as GaussianPosterior,
    Prediction as Prediction,
    TwoRegimes as TwoRegimes,
    fit as fit,
)
