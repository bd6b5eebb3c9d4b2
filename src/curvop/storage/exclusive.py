"""Files that one user at a time has open."""

from __future__ import annotations

import os
from pathlib import Path

__all__ = ["close_exclusive", "open_exclusive"]

_open_files: set[tuple[int, int]] = set()


def open_exclusive(path: Path) -> tuple[int, tuple[int, int]]:
    """Open a file for reading and writing and lock it; make it where it does not exist.

    The lock is the process's own: it ends with the process, however that ends, and no fork has it. So it keeps other
    processes out, and what this one has open is listed besides.

    Returns
    -------
    descriptor : int
    identity : tuple of int
        Of the file; both are for `close_exclusive`.

    Raises
    ------
    BlockingIOError
        Where it is open already, here or in another process.
    """
    import fcntl  # not on every system, and the package can be imported there

    # To close any descriptor of a file gives up the process's lock on it: what is open already is not opened again.
    if path.exists() and _identity(path.stat()) in _open_files:
        raise BlockingIOError
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    try:
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except PermissionError:  # as some systems say it
        os.close(descriptor)
        raise BlockingIOError from None
    except BaseException:
        os.close(descriptor)
        raise
    identity = _identity(os.fstat(descriptor))
    _open_files.add(identity)
    return descriptor, identity


def close_exclusive(descriptor: int, identity: tuple[int, int]) -> None:
    """Close a file that `open_exclusive` has opened."""
    _open_files.discard(identity)
    os.close(descriptor)


def _identity(status: os.stat_result) -> tuple[int, int]:
    return status.st_dev, status.st_ino
