"""The peak of a process's memory."""

from __future__ import annotations

import contextlib
import ctypes
import resource
from pathlib import Path

__all__ = ["Peak"]


class Peak:
    """The peak of this process's memory above what it is now."""

    def __init__(self) -> None:
        with contextlib.suppress(OSError, AttributeError):  # Linux with glibc
            ctypes.CDLL(None).malloc_trim(0)  # what the C library holds for later would hide the rise
        with contextlib.suppress(OSError):  # Linux: the peak begins anew
            Path("/proc/self/clear_refs").write_text("5")
        self.before = self.now("VmRSS")

    def now(self, what: str) -> int:
        """Return kilobytes of what the system calls `what`, or the peak where it does not tell."""
        try:
            lines = Path("/proc/self/status").read_text().splitlines()
            return next(int(line.split()[1]) for line in lines if line.startswith(what))
        except (OSError, StopIteration):
            return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

    def rise(self) -> float:
        """Return megabytes."""
        return (self.now("VmHWM") - self.before) * 1024 / 1e6
