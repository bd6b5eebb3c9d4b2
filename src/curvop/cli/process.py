"""What the ``curvop`` command changes in its process while it runs: the signal SIGTERM, and the form of warnings."""

from __future__ import annotations

import shlex
import signal
import sys
import threading
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from tqdm import tqdm

__all__ = ["TerminatedError", "one_line_warnings", "resume_line", "terminable"]


class TerminatedError(KeyboardInterrupt):
    """Raised by the signal SIGTERM. Code that cleans up after Ctrl-C cleans up after this exception, too."""


@contextmanager
def terminable() -> Iterator[None]:
    """Let SIGTERM raise a `TerminatedError`, so that results are saved before the process ends.

    Batch systems send this signal before they kill a job. A handler of the calling program is not replaced.
    """
    in_main = threading.current_thread() is threading.main_thread()  # other threads cannot set handlers
    if not in_main or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
        yield
        return

    def stop(*_: Any) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # a second signal must not interrupt the writing of files
        raise TerminatedError

    signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


@contextmanager
def one_line_warnings() -> Iterator[None]:
    """Show each warning on stderr as one line without a file name. At the end, restore the settings of warnings."""

    def show(message: Warning | str, *_: Any, **__: Any) -> None:
        line = f"warning: {' '.join(str(message).split())}"
        if sys.stderr.isatty():
            tqdm.write(line, file=sys.stderr)  # above the progress bar
        else:
            print(line, file=sys.stderr, flush=True)

    with warnings.catch_warnings():
        warnings.showwarning = show
        yield


def resume_line(prog: str, arguments: Sequence[str]) -> str:
    """Return the command line that continues a study, quoted for the shell.

    Parameters
    ----------
    prog : str
        How the command was called, for example ``'curvop'``.
    arguments : sequence of str
        The arguments of the study that is to be continued.
    """
    words = list(arguments)
    if "--resume" not in words:
        words.insert(words.index("--") if "--" in words else len(words), "--resume")  # words after -- are no options
    return f"{prog} {shlex.join(words)}"
