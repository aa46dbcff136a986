"""What a trained ensemble knows: log-likelihoods, uncertainty, answers, MMLU and refusals, in a file or package each."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
