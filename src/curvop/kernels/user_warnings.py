"""Warnings that point at the line of the user's program, not at a line of this package."""

from __future__ import annotations

import sys
import warnings

__all__ = ["warn_user"]

_LIBRARIES = {"contextlib", "curvop", "functools", "scipy", "torch"}  # whose lines the user did not write


def warn_user(message: str, category: type[Warning] = RuntimeWarning) -> None:
    """Issue a warning that points at the line that called this package, also if SciPy's solver is in between.

    Parameters
    ----------
    message : str
        The text of the warning.
    category : type, optional
        The class of the warning.
    """
    frame, level = sys._getframe(1), 2
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] in _LIBRARIES:
        frame, level = frame.f_back, level + 1
    warnings.warn(message, category, stacklevel=level)
