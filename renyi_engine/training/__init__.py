"""Training: its settings, the loop, one step, checkpoints, a run's folder with its records and report, the export."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
