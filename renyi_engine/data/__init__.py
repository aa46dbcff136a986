"""From the rows of a data set to batches of tokens: reads files, writes chats as text, makes tokens, and pads."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
