"""The ensemble: its settings, how it is put on a frozen model, how it runs and generates text, its folders on disk."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
