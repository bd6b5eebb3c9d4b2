"""Descriptions of exceptions and warnings, with the location in the user's code."""

from __future__ import annotations

import os
import sysconfig
import traceback
from pathlib import Path

from curvop.kernels.user_warnings import warn_user

__all__ = ["describe_error", "one_line", "warn_user"]


def describe_error(error: BaseException) -> str:
    """Describe an exception in one line: its type, message, location and notes.

    The location is the last line of the traceback that is in the user's code. Files of this package, of installed
    packages and of Python itself do not count as the user's code. If the traceback has no line of the user's code, the
    location is omitted.

    Parameters
    ----------
    error : BaseException
        A caught exception.

    Returns
    -------
    str
        For example ``"KeyError: 'x' (problem.py:12)"``.
    """
    name, message = type(error).__name__, one_line(error)
    text = f"{name}: {message}" if message else name
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if _is_user_code(frame.filename)]
    if frames and not isinstance(error, SyntaxError):  # the message of a SyntaxError contains the location
        text = f"{text} ({frames[-1].filename}:{frames[-1].lineno})"
    return ". ".join([text, *(" ".join(note.split()).rstrip(".") for note in getattr(error, "__notes__", ()))])


def _is_user_code(filename: str) -> bool:
    """Return False for generated files, and for files of this package, of installed packages and of Python itself."""
    folders = [sysconfig.get_path(kind) for kind in ("stdlib", "platstdlib")] + [str(Path(__file__).parents[1])]
    installed = not {"site-packages", "dist-packages"}.isdisjoint(Path(filename).parts)
    return not (installed or filename.startswith(("<", *(folder + os.sep for folder in folders))))


def one_line(error: BaseException) -> str:
    """Return the message of an exception without line breaks."""
    return " ".join(str(error).split())
