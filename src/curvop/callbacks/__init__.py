"""Track the sharpness, or other extreme eigenvalues, of a model that a trainer of Hugging Face or Lightning trains.

Both callbacks compute eigenvalues every n optimizer steps with `curvop.spectrum.track`, and log them to the loggers of
the trainer. This module imports a framework only if you use its callback.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from curvop.callbacks.lightning_tracking import LightningTracking
    from curvop.callbacks.transformers_tracking import TransformersTracking

__all__ = ["LightningTracking", "TransformersTracking"]

#: For each class, its module and the names of the packages that `pip` installs for it.
_MODULES = {
    "LightningTracking": ("curvop.callbacks.lightning_tracking", "lightning"),
    "TransformersTracking": ("curvop.callbacks.transformers_tracking", "transformers accelerate"),
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, packages = _MODULES[name]
    try:
        return getattr(importlib.import_module(module), name)
    except ModuleNotFoundError as error:
        raise ImportError(f"{name} needs {packages.split()[0]}: pip install {packages}") from error


def __dir__() -> list[str]:
    """Return the list of public names for tab completion."""
    return __all__
