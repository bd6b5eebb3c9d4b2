r"""The Lanczos recurrence from several starting vectors at once, re-orthogonalised in full.

For each starting vector, after m steps, :math:`A Q_m = Q_m T_m + \beta_m q_{m+1} e_m^\top` with orthonormal
:math:`Q_m` and tridiagonal :math:`T_m` (Lanczos, 1950). The runs share nothing but the block products. All arrays are
torch tensors, on the device where the operator computes: a NumPy array on the host is a tensor of the same memory.

References
----------
Golub, Van Loan (2013), "Matrix Computations", section 10.1; Daniel, Gragg, Kaufman, Stewart (1976) for the second
orthogonalisation.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from scipy.linalg import eigh_tridiagonal
from torch import Tensor

from curvop.memory import available_bytes, check_fits
from curvop.operator import BridgeLinearOperator

__all__ = ["Lanczos", "device_of", "multiply", "runs_at_once"]

_EPS = float(np.finfo(np.float64).eps)


def device_of(A: Any) -> torch.device:
    """Return where an operator computes; SciPy's own compute on the host."""
    return A.device if isinstance(A, BridgeLinearOperator) else torch.device("cpu")


def multiply(A: Any, rows: Tensor) -> Tensor:
    """Return the products ``(K, M)`` of `A` with the rows ``(K, N)`` of a tensor, from one block product; float64."""
    if isinstance(A, BridgeLinearOperator) and A.takes_tensors:
        product: Tensor = A @ rows.T
        return product.T.to(torch.float64)
    array = np.asarray(A @ rows.numpy().T, dtype=np.float64)
    return torch.from_numpy(np.ascontiguousarray(array.T)).to(torch.float64)


def runs_at_once(A: Any, num_probes: int, num_steps: int, memory: int | None) -> int:
    """Return how many runs fit into `memory` bytes, half of what is free by default.

    Raises
    ------
    MemoryError
        Where not even one does, with the number and the remedy.
    """
    available = available_bytes(device_of(A)) if memory is None else memory
    one: int = 8 * A.shape[0] * (num_steps + 4)  # the basis, and what a step takes
    what = f"the Lanczos basis of one probe, {num_steps} vectors of {A.shape[0]:,} numbers,"
    check_fits(one, available, what, "take fewer num_steps, or a block of the matrix")
    return min(num_probes, available // one)


class Lanczos:
    """Several runs in lockstep, a step at a time.

    A run that finds an invariant subspace stops there: its `lengths` stays behind.

    Parameters
    ----------
    A : LinearOperator, shape (N, N)
        Real, symmetric.
    starts : Tensor, shape (K, N)
        Not zero; of any norm.
    num_steps : int
        At most N.
    deflated : Tensor, shape (D, N), optional
        Orthonormal rows, eigenvectors of `A`, that the runs stay orthogonal to. The starting vectors are so already.

    Attributes
    ----------
    basis : Tensor, shape (K, num_steps + 1, N)
        Orthonormal rows, as far as the runs have come; zeros where one has stopped.
    alphas, betas : ndarray, shape (K, num_steps)
        The diagonals of the tridiagonal matrices, and what is beside them; the last of `betas` is the residual's norm.
    lengths : ndarray of int, shape (K,)
        The steps of each run.
    """

    def __init__(self, A: Any, starts: Tensor, num_steps: int, deflated: Tensor | None = None) -> None:
        count, size = starts.shape
        self._A, self._deflated = A, deflated
        self.basis = torch.zeros(count, num_steps + 1, size, dtype=torch.float64, device=starts.device)
        self.basis[:, 0] = starts / torch.linalg.vector_norm(starts, dim=1, keepdim=True)
        self.alphas, self.betas = np.zeros((count, num_steps)), np.zeros((count, num_steps))
        self.lengths = np.zeros(count, dtype=np.int64)
        self._scale = 0.0  # of the matrix, as far as the runs see it: what is zero is told by it
        self._running = np.ones(count, dtype=bool)

    @property
    def running(self) -> bool:
        """Whether there is a step left for any run."""
        return bool(self._running.any())

    def step(self) -> tuple[Any, Any, Any, Tensor]:
        """Take every run that has not stopped one step further, by one block product.

        Returns
        -------
        tuple
            What `advance` takes for the same step without the product.
        """
        runs = np.flatnonzero(self._running)
        at = int(self.lengths[runs[0]])
        everything = len(runs) == len(self.lengths)
        q = self.basis[:, at] if everything else self.basis[torch.from_numpy(runs), at]
        rest = multiply(self._A, q)
        found = [self._orthogonalise(run, at, w) for run, w in zip(runs.tolist(), rest, strict=True)]
        alphas, betas = np.array(found).T
        self.advance(runs, alphas, betas, rest)
        return runs, alphas, betas, rest

    def advance(self, runs: Any, alphas: Any, betas: Any, rest: Tensor) -> None:
        """Write a step's outcome down: for each of the `runs`, its two numbers, and what is left of the product."""
        at = int(self.lengths[runs[0]])
        self.alphas[runs, at], self.betas[runs, at] = alphas, betas
        self.lengths[runs] += 1
        self._scale = max(self._scale, float((np.abs(alphas) + betas).max()))
        # Rounding leaves so much of a vector that is in the span of the basis.
        self._running[runs] = self.betas[runs, at] > 10 * _EPS * self._scale * self.basis.shape[2] ** 0.5
        if at + 2 == self.basis.shape[1]:
            self._running[:] = False
        for run, w in zip(runs, rest, strict=True):
            if self.betas[run, at] > 0:
                torch.div(w, self.betas[run, at], out=self.basis[run, at + 1])

    def _orthogonalise(self, run: int, at: int, w: Tensor) -> tuple[float, float]:
        """Take the basis out of `w`, in place; return the diagonal's entry and the norm of what is left."""
        basis = self.basis[run, : at + 1]
        if at:
            w.sub_(basis[at - 1], alpha=float(self.betas[run, at - 1]))
        alpha = float(basis[at] @ w)
        w.sub_(basis[at], alpha=alpha)
        norm = float(torch.linalg.vector_norm(w))
        if not np.isfinite(norm):
            raise ValueError("a product with A is not finite")
        while True:
            shares = basis @ w
            w.addmv_(basis.T, shares, alpha=-1.0)
            alpha += float(shares[at])
            if self._deflated is not None:
                w.addmv_(self._deflated.T, self._deflated @ w, alpha=-1.0)
            before, norm = norm, float(torch.linalg.vector_norm(w))
            if norm > 0.5 * before or norm <= _EPS * abs(alpha):
                return alpha, norm

    def quadrature(self) -> tuple[np.ndarray, np.ndarray]:
        """Return nodes and weights ``(K, num_steps)`` of each run's Gauss quadrature; the weights of a run sum to 1.

        The nodes are the eigenvalues of the tridiagonal matrix, the weights the squares of its eigenvectors' first
        entries (Golub, Welsch, 1969). Where a run stopped early, nodes and weights of 0 fill the row.
        """
        nodes, weights = np.zeros(self.alphas.shape), np.zeros(self.alphas.shape)
        for run, length in enumerate(self.lengths):
            values, vectors = eigh_tridiagonal(self.alphas[run, :length], self.betas[run, : length - 1])
            nodes[run, :length], weights[run, :length] = values, vectors[0] ** 2
        return nodes, weights
