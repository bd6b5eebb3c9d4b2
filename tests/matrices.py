"""Symmetric test matrices with prescribed eigenvalues."""

from __future__ import annotations

import numpy as np


def matrix(eigenvalues, seed: int = 0) -> np.ndarray:
    """Return a symmetric matrix with these eigenvalues."""
    n = len(eigenvalues)
    Q = np.linalg.qr(np.random.default_rng(seed).normal(size=(n, n)))[0]
    A = (Q * np.asarray(eigenvalues)) @ Q.T
    return (A + A.T) / 2


def right_side(n: int) -> np.ndarray:
    """Return a random right-hand side of a linear system."""
    return np.random.default_rng(1).normal(size=n)
