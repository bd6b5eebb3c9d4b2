r"""The Lanczos recurrence from several starting vectors at once, which keeps its vectors orthogonal.

For each starting vector, after m steps, :math:`A Q_m = Q_m T_m + \beta_m q_{m+1} e_m^\top` with orthonormal
:math:`Q_m` and tridiagonal :math:`T_m` (Lanczos, 1950). The runs share nothing but the block products. All arrays are
torch tensors, on the device where the operator computes: a NumPy array on the host is a tensor of the same memory.

The basis is taken out of a new vector, all of it, wherever `curvop.spectrum.orthogonality` cannot rule out that it has
come to hold more than 300 times the precision of it.

References
----------
Golub, Van Loan (2013), "Matrix Computations", section 10.1; Daniel, Gragg, Kaufman, Stewart (1976) for the second
orthogonalisation.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.linalg import eigh_tridiagonal
from torch import Tensor

from curvop.memory import available_bytes, check_fits
from curvop.norms import norm_of
from curvop.operator import BridgeLinearOperator
from curvop.spectrum.orthogonality import OrthogonalityBound

Array = NDArray[Any]

__all__ = ["Lanczos", "basis_dtype", "device_of", "multiply", "runs_at_once"]


def device_of(A: Any) -> torch.device:
    """Return where an operator computes; SciPy's own compute on the host."""
    return A.device if isinstance(A, BridgeLinearOperator) else torch.device("cpu")


def multiply(A: Any, rows: Tensor) -> Tensor:
    """Return the products ``(K, M)`` of `A` with the rows ``(K, N)`` of a tensor, from one block product."""
    if isinstance(A, BridgeLinearOperator) and A.takes_tensors:
        product: Tensor = A @ rows.T
        return product.T
    array = np.array((A @ rows.numpy().T).T, order="C")  # a copy, as an operator may return its argument
    return torch.from_numpy(array).to(torch.promote_types(rows.dtype, torch.float32))


def basis_dtype(A: Any) -> torch.dtype:
    """Return the precision that a basis is kept in: that of the operator's vectors, float32 or float64."""
    return torch.float32 if A.dtype == np.float32 else torch.float64


def runs_at_once(A: Any, num_probes: int, num_steps: int, memory: int | None) -> int:
    """Return how many runs fit into `memory` bytes, half of what is free by default.

    Raises
    ------
    MemoryError
        Where not even one does, with the number and the remedy.
    """
    available = available_bytes(device_of(A), memory)
    one: int = basis_dtype(A).itemsize * A.shape[0] * (num_steps + 6)  # the basis, and what a step takes
    what = f"the Lanczos basis of one probe, {num_steps} vectors of {A.shape[0]:,} numbers,"
    check_fits(one, available, what, "take fewer num_steps, or a block of the matrix")
    return min(num_probes, available // one)


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return a tensor of zeros; on the host from NumPy, whose large arrays take huge pages, made four times as fast."""
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    return torch.from_numpy(np.zeros(shape, np.float32 if dtype == torch.float32 else np.float64))


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
        Orthonormal rows, as far as the runs have come; zeros where one has stopped. In float64, to 7e-14 or better, or
        in float32 where `A` is: half the memory and half the time, orthogonal to 4e-5 or better.
    alphas, betas : ndarray, shape (K, num_steps)
        The diagonals of the tridiagonal matrices, and what is beside them; the last of `betas` is the residual's norm.
    lengths : ndarray of int, shape (K,)
        The steps of each run.
    """

    def __init__(self, A: Any, starts: Tensor, num_steps: int, deflated: Tensor | None = None) -> None:
        count, size = starts.shape
        self._A = A
        self._deflated = None if deflated is None else deflated.to(basis_dtype(A))
        self.basis = _zeros((count, num_steps + 1, size), basis_dtype(A), starts.device)
        self.basis[:, 0] = starts / torch.linalg.vector_norm(starts, dim=1, keepdim=True, dtype=torch.float64)
        self.alphas, self.betas = np.zeros((count, num_steps)), np.zeros((count, num_steps))
        self.lengths = np.zeros(count, dtype=np.int64)
        self._eps = torch.finfo(self.basis.dtype).eps
        self._lost = OrthogonalityBound(count, self._eps)
        self._scale = 0.0  # of the matrix, as far as the runs see it: what is zero is told by it
        self._running = np.ones(count, dtype=bool)

    @property
    def running(self) -> bool:
        """Whether there is a step left for any run."""
        return bool(self._running.any())

    def step(self) -> NDArray[np.intp]:
        """Take every run that has not stopped one step further, by one block product; return which runs these are."""
        runs = np.flatnonzero(self._running)
        at = int(self.lengths[runs[0]])
        everything = len(runs) == len(self.lengths)
        products = multiply(self._A, self.basis[:, at] if everything else self.basis[torch.from_numpy(runs), at])
        for run, product in zip(runs.tolist(), products, strict=True):
            w = product.to(self.basis.dtype)
            self.alphas[run, at], self.betas[run, at] = self._orthogonalise(run, at, w)
            if self.betas[run, at] > 0:
                self.basis[run, at + 1] = w.div_(float(self.betas[run, at]))
        self._advance(runs)
        return runs

    def last_step(self, runs: NDArray[np.intp]) -> tuple[NDArray[Any], ...]:
        """Return what `replay` takes for the last step of `runs`, on the host."""
        at = int(self.lengths[runs[0]])
        vectors = self.basis[torch.from_numpy(runs), at].cpu().numpy()
        return runs, self.alphas[runs, at - 1], self.betas[runs, at - 1], self._lost.state[runs], vectors

    def replay(self, runs: Array, alphas: Array, betas: Array, lost: Array, vectors: Array) -> None:
        """Take a step again whose outcome is known, without a product."""
        at = int(self.lengths[runs[0]])
        self.alphas[runs, at], self.betas[runs, at], self._lost.state[runs] = alphas, betas, lost
        self.basis[torch.from_numpy(runs), at + 1] = torch.from_numpy(vectors).to(self.basis.device)
        self._advance(runs)

    def _advance(self, runs: NDArray[np.intp]) -> None:
        at = int(self.lengths[runs[0]])
        self.lengths[runs] += 1
        alphas, betas = self.alphas[runs, at], self.betas[runs, at]
        self._scale = max(self._scale, float((np.abs(alphas) + betas).max()))
        # Rounding leaves so much of a vector that is in the span of the basis.
        self._running[runs] = betas > 10 * self._eps * self._scale * self.basis.shape[2] ** 0.5
        if at + 2 == self.basis.shape[1]:
            self._running[:] = False

    def _orthogonalise(self, run: int, at: int, w: Tensor) -> tuple[float, float]:
        """Take the basis out of `w`, in place; return the diagonal's entry and the norm of what is left."""
        basis = self.basis[run, : at + 1]
        if at:
            w.sub_(basis[at - 1], alpha=float(self.betas[run, at - 1]))
        alpha = float((basis[at] * w).sum(dtype=torch.float64))
        w.sub_(basis[at], alpha=alpha)
        self._deflate(w)
        norm = norm_of(w)
        if not np.isfinite(norm):
            raise ValueError("a product with A is not finite")
        if norm == 0:
            return alpha, norm
        steps = at + 1
        bound = self._lost.of_next(run, np.append(self.alphas[run, :at], alpha), self.betas[run, :at], norm)
        sample = abs(float(basis[0] @ w)) / norm
        if self._lost.is_low(run, steps, bound, sample):
            return alpha, norm
        overlaps = basis @ torch.stack([basis[at], w]).T
        last, found = norm_of(overlaps[:at, 0]), norm_of(overlaps[:, 1]) / norm
        if not self._lost.needs_cleaning(run, steps, bound, last, found):
            return alpha, norm
        shares = overlaps[:, 1]
        while True:
            w.addmv_(basis.T, shares, alpha=-1.0)
            alpha += float(shares[at])
            self._deflate(w)
            before, norm = norm, norm_of(w)
            if norm > 0.5 * before or norm <= self._eps * abs(alpha):
                return alpha, norm
            shares = basis @ w

    def _deflate(self, w: Tensor) -> None:
        if self._deflated is not None:
            w.addmv_(self._deflated.T, self._deflated @ w, alpha=-1.0)

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
