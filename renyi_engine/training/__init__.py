"""Training: its settings, the loop, one step, callbacks, checkpoints, a run's folder and records, report and export."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
