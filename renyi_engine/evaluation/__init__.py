"""What a trained ensemble knows: log-likelihoods, uncertainty, answers, MMLU, refusals; each in a file or package."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
