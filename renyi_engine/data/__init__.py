"""From the rows of a data set to batches of tokens: reading files, rendering chats, encoding text, padding."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
