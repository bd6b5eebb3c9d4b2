"""Text of exceptions, for reports that name where a user can act."""

from __future__ import annotations

import os
import sysconfig
import traceback
from pathlib import Path

__all__ = ["describe_error", "one_line"]


def describe_error(error: BaseException) -> str:
    """Describe an exception in one line: its type, its message, where it was raised, and its notes.

    The place is the last line of code that belongs to neither this package nor an installed one, as that is where
    a user can act; where there is none, no place is named.

    Parameters
    ----------
    error : BaseException
        A caught exception.

    Returns
    -------
    str
        Such as ``"KeyError: 'x' (problem.py:12)"``.
    """
    name, message = type(error).__name__, one_line(error)
    text = f"{name}: {message}" if message else name
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if _is_the_users(frame.filename)]
    if frames and not isinstance(error, SyntaxError):  # raised by the compiler: the place is in the message already
        text = f"{text} ({frames[-1].filename}:{frames[-1].lineno})"
    return ". ".join([text, *(" ".join(note.split()).rstrip(".") for note in getattr(error, "__notes__", ()))])


def _is_the_users(filename: str) -> bool:
    """Return whether a file is neither of this package, nor installed, nor code that was made while running."""
    folders = [sysconfig.get_path(kind) for kind in ("stdlib", "platstdlib")] + [str(Path(__file__).parents[1])]
    installed = not {"site-packages", "dist-packages"}.isdisjoint(Path(filename).parts)
    return not (installed or filename.startswith(("<", *(folder + os.sep for folder in folders))))


def one_line(error: BaseException) -> str:
    """Return the message of an exception without its line breaks."""
    return " ".join(str(error).split())
