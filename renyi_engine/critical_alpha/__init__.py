"""The critical alpha of a trained adapter (paper 3.3): above it, particles that start there move apart."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
