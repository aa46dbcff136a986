"""Alpha-Renyi ensembles of LoRA adapters: K coupled particles on one frozen language model.

Here and in every package below, `__init__.pyi` lists what others may use. A name is imported when it is first used, so
that `import renyi_engine`, and every command line that is wrong or only asks for help, does without torch.
"""

import importlib.metadata
from typing import Any

import lazy_loader

_exported, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)


def __getattr__(name: str) -> Any:
    if name != "__version__":
        return _exported(name)
    try:
        return importlib.metadata.version("renyi-engine")
    except importlib.metadata.PackageNotFoundError:
        raise AttributeError("renyi-engine is not installed, so its version is not known; pip install it") from None
