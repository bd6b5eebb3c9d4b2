"""Warnings of what a report says anyway."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["quiet"]


@contextmanager
def quiet() -> Iterator[None]:
    """Ignore the verdicts that `eigsh` and `solve` warn of, and nothing else: an operator's own warnings are news."""
    with warnings.catch_warnings():
        told = "not converged|not certified|converged: relative residual"
        warnings.filterwarnings("ignore", told, RuntimeWarning)
        yield
