"""Memory that a study needs, counted before it runs."""

from __future__ import annotations

import torch

from curvop.kernels.memory import free_bytes
from curvop.operators.validation import real_number

__all__ = ["available_bytes", "check_fits"]


def available_bytes(device: torch.device | None = None, memory: float | None = None) -> int:
    """Return `memory`, or half of what is free on `device`, the host by default: what a study may take unasked."""
    if memory is not None:
        return int(real_number("memory", memory))
    return free_bytes(device or torch.device("cpu")) // 2


def check_fits(needed: int, available: int, what: str, remedy: str, adjustable: bool = True) -> None:
    """Raise a `MemoryError` with both numbers where `what` does not fit; `adjustable`: by an argument ``memory=``."""
    if needed > available:
        more = ", or pass memory= in bytes if there is more" if adjustable else ""
        raise MemoryError(
            f"{what} takes {needed / 1e9:.3g} GB, but {available / 1e9:.3g} GB may be used: {remedy}{more}"
        )
