"""How results are shown: HTML pages in one file, their tables and their pictures."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
