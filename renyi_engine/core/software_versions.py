"""Which versions of the software a result was made with."""

from __future__ import annotations

import importlib.metadata
import platform


def versions() -> dict[str, str]:
    """The version of Python and of each package that a result depends on."""
    found = {"python": platform.python_version()}
    for package in ("renyi-engine", "torch", "triton", "transformers", "datasets", "safetensors", "peft"):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found
