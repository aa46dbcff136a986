"""What training minimises: tasks (SFT, DPO), the alpha-Renyi loss, priors, alpha itself, and the scores of examples."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
