"""Axes for the ``plot`` methods of results."""

from __future__ import annotations

from typing import Any

__all__ = ["axes_or_new"]


def axes_or_new(ax: Any) -> Any:
    """Return `ax`. If `ax` is None, create a figure and return its axes."""
    if ax is not None:
        return ax
    try:
        import matplotlib.pyplot as plt
    except ImportError as error:
        raise ImportError('plots need matplotlib: pip install "curvop[plot]"') from error
    return plt.subplots(figsize=(7, 4), layout="constrained")[1]
