"""Symmetric test matrices with prescribed eigenvalues."""

from __future__ import annotations

import numpy as np
from scipy.sparse.linalg import LinearOperator


def matrix(eigenvalues, seed: int = 0) -> np.ndarray:
    """Return a symmetric matrix with these eigenvalues."""
    n = len(eigenvalues)
    Q = np.linalg.qr(np.random.default_rng(seed).normal(size=(n, n)))[0]
    A = (Q * np.asarray(eigenvalues)) @ Q.T
    return (A + A.T) / 2


def right_side(n: int) -> np.ndarray:
    """Return a random right-hand side of a linear system."""
    return np.random.default_rng(1).normal(size=n)


class CountingMatrix(LinearOperator):
    """A symmetric matrix that counts the columns that are multiplied."""

    def __init__(self, A: np.ndarray) -> None:
        super().__init__(A.dtype, A.shape)
        self.A, self.columns = A, 0

    def _matmat(self, X):
        self.columns += X.shape[1]
        return self.A @ X

    def _matvec(self, x):
        return self._matmat(x.reshape(-1, 1)).reshape(x.shape)

    def _adjoint(self):
        return self
