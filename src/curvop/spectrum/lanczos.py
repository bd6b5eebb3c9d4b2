r"""Run the Lanczos process from several starting vectors in lockstep, with orthogonal bases.

After m steps from a starting vector, the process satisfies :math:`A Q_m = Q_m T_m + \beta_m q_{m+1} e_m^\top` with
orthonormal :math:`Q_m` and tridiagonal :math:`T_m` (Lanczos, 1950). Runs from different starting vectors are
independent, but each step computes the products for all runs in one block product. All vectors are PyTorch tensors on
the device of the operator. On the CPU, these tensors share memory with NumPy arrays.

In exact arithmetic the basis is orthogonal, but rounding destroys the orthogonality. `OrthogonalityBound` bounds the
inner products of a new vector with the earlier vectors. If the bound exceeds the square root of the precision of the
products, the inner products are computed, and the new vector is orthogonalized if necessary. Otherwise, the step does
not read the whole basis. This saves time in most steps.

With this loss of orthogonality, the tridiagonal matrix still agrees with the projection of A onto the span of the basis
up to the precision of the products (Simon, 1984, theorem 5). The eigenvalues of the tridiagonal matrix and the first
entries of its eigenvectors are therefore as accurate as those of a basis that is orthogonal to machine precision.

References
----------
Lanczos (1950), "An iteration method for the solution of the eigenvalue problem of linear differential and integral
operators", J. Res. Natl. Bur. Stand. 45(4). Golub, Van Loan (2013), "Matrix Computations", Johns Hopkins University
Press, section 10.1. Daniel, Gragg, Kaufman, Stewart (1976), "Reorthogonalization and stable algorithms for updating the
Gram-Schmidt QR factorization", Math. Comp. 30(136), for the second orthogonalization. Simon (1984), "The Lanczos
algorithm with partial reorthogonalization", Math. Comp. 42(165), for the bound.
"""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.linalg import eigh_tridiagonal
from scipy.linalg.lapack import dstebz
from torch import Tensor

from curvop.operators.base import TensorLinearOperator
from curvop.operators.transfer import aligned, host_tensor
from curvop.operators.validation import available_bytes, check_fits
from curvop.spectrum.norms import column_norms, inner_products, row_dots, row_norms

__all__ = [
    "Lanczos",
    "OrthogonalityBound",
    "bytes_of_run",
    "device_of",
    "gauss_rules",
    "multiply",
    "product_dtype",
    "product_precision",
    "resolution",
    "rounding_left",
    "runs_at_once",
    "zeros",
]

Array = NDArray[Any]

# Thresholds of `OrthogonalityBound`. _CLEAN: computed loss of orthogonality above which a vector is orthogonalized,
# relative to the largest allowed loss. _FRESH: loss of orthogonality in a vector that was just orthogonalized, in units
# of the machine precision of the basis.
_CLEAN, _FRESH = 0.1, 10.0
_FIRST_STEPS = 3  # number of first steps that always compute the loss, to measure rounding errors in the products


class Lanczos:
    """Lanczos runs from several starting vectors, which advance together one step at a time.

    A run stops early if it finds an invariant subspace. The entry of this run in ``lengths`` then stays constant.

    Parameters
    ----------
    A : LinearOperator, shape (N, N)
        Real symmetric operator.
    starts : Tensor, shape (K, N)
        Nonzero starting vectors, which need not be normalized.
    num_steps : int
        Maximum number of steps, at most N.
    deflated : Tensor, shape (D, N), optional
        Orthonormal eigenvectors of `A`. All Lanczos vectors are kept orthogonal to these eigenvectors. The starting
        vectors must already be orthogonal to the eigenvectors.
    limit : float, optional
        Largest allowed loss of orthogonality: the norm of the inner products of a new vector with all earlier vectors.
        The default is the square root of the precision of the products, which suffices for the tridiagonal matrices.

    Attributes
    ----------
    basis : Tensor, shape (K, num_steps + 1, N)
        Lanczos vectors of each run as orthonormal rows, followed by rows of zeros. The dtype is float32 if the
        products with `A` are accurate to single precision only, and float64 otherwise. Float32 halves the memory and
        the time. The inner products of different rows are below `limit`, by default 3.5e-4 for float32 and 1.5e-8 for
        float64. If the products become noisier during a run, the inner products may be larger (see
        `OrthogonalityBound`).
    alphas, betas : ndarray, shape (K, num_steps)
        Diagonals and off-diagonals of the tridiagonal matrices. The last entry of ``betas`` for each run is the norm of
        its residual.
    lengths : ndarray of int, shape (K,)
        Number of steps of each run.
    """

    def __init__(
        self, A: Any, starts: Tensor, num_steps: int, deflated: Tensor | None = None, limit: float | None = None
    ) -> None:
        (count, size), dtype = starts.shape, product_dtype(A)
        self._A = A
        self._deflated = None if deflated is None else deflated.to(dtype)
        self.basis = zeros((count, num_steps + 1, size), dtype, starts.device)
        self.basis[:, 0] = starts / torch.linalg.vector_norm(starts, dim=1, keepdim=True, dtype=torch.float64)
        self.alphas, self.betas = np.zeros((count, num_steps)), np.zeros((count, num_steps))
        self.lengths = np.zeros(count, dtype=np.int64)
        self._eps = torch.finfo(self.basis.dtype).eps
        self._bound = OrthogonalityBound(
            count, self._eps, math.sqrt(max(self._eps, product_precision(A))) if limit is None else limit
        )
        self._scale = 0.0  # estimated norm of the matrix; residuals that are tiny relative to it count as zero
        self._running = np.ones(count, dtype=bool)

    @property
    def running(self) -> bool:
        """True if at least one run can take another step."""
        return bool(self._running.any())

    @property
    def active(self) -> NDArray[np.bool_]:
        """Boolean array of shape (K,) that is True for runs that can take another step."""
        return self._running.copy()

    def stop(self, runs: Any) -> None:
        """Exclude runs, given by their indices, from all further steps."""
        self._running[runs] = False

    def step(self) -> NDArray[np.intp]:
        """Advance all active runs by one step, with one block product. Return the indices of these runs."""
        runs = np.flatnonzero(self._running)
        at = int(self.lengths[runs[0]])
        all_running = len(runs) == len(self.lengths)
        products = multiply(self._A, self.basis[:, at] if all_running else self.basis[torch.from_numpy(runs), at])
        products = products.to(self.basis.dtype)
        for start, stop in self._sections(runs):
            group, W = slice(runs[start], runs[stop - 1] + 1), products[start:stop]
            self.alphas[group, at], self.betas[group, at] = self._orthogonalize(group, at, W)
            norms = self.betas[group, at]
            torch.div(W, self._column(np.where(norms > 0, norms, np.inf)), out=self.basis[group, at + 1])
        self._advance(runs)
        return runs

    def _sections(self, runs: NDArray[np.intp]) -> list[tuple[int, int]]:
        """Split `runs` into sections that are processed together. Return ``(start, stop)`` of each section.

        On a GPU, a section consists of runs with consecutive indices, because the time depends on the number of
        operations. On the CPU, each section is a single run, so that the vector of the run stays in the processor's
        cache.
        """
        on_host = self.basis.device.type == "cpu"
        cuts = np.flatnonzero(np.diff(runs) > (0 if on_host else 1)) + 1
        return list(itertools.pairwise([0, *cuts.tolist(), len(runs)]))

    def last_step(self, runs: NDArray[np.intp]) -> tuple[NDArray[Any], ...]:
        """Return the latest step of `runs` as a tuple of NumPy arrays, the arguments of `replay`."""
        at = int(self.lengths[runs[0]])
        vectors = self.basis[torch.from_numpy(runs), at].cpu().numpy()
        return runs, self.alphas[runs, at - 1], self.betas[runs, at - 1], self._bound.state[runs], vectors

    def replay(self, runs: Array, alphas: Array, betas: Array, bounds: Array, vectors: Array) -> None:
        """Restore a recorded step without computing a product."""
        at = int(self.lengths[runs[0]])
        self.alphas[runs, at], self.betas[runs, at], self._bound.state[runs] = alphas, betas, bounds
        self.basis[torch.from_numpy(runs), at + 1] = torch.from_numpy(vectors).to(self.basis.device)
        self._advance(runs)

    def _advance(self, runs: NDArray[np.intp]) -> None:
        at = int(self.lengths[runs[0]])
        self.lengths[runs] += 1
        alphas, betas = self.alphas[runs, at], self.betas[runs, at]
        self._scale = max(self._scale, float((np.abs(alphas) + betas).max()))
        self._running[runs] = betas > rounding_left(self.basis.dtype, self.basis.shape[2]) * self._scale
        if at + 2 == self.basis.shape[1]:
            self._running[:] = False

    def _orthogonalize(self, group: slice, at: int, W: Tensor) -> tuple[Array, Array]:
        """Orthogonalize each row of `W` ``(g, N)`` against its basis, in place. Return the alphas and the row norms."""
        basis = self.basis[group, : at + 1]
        if at:
            W.addcmul_(basis[:, at - 1], self._column(self.betas[group, at - 1]), value=-1)
        dots = row_dots(basis[:, at], W)
        W.addcmul_(basis[:, at], dots[:, None].to(W.dtype), value=-1)
        self._deflate(W)
        alphas, norms = dots.cpu().numpy(), row_norms(W)
        if not np.isfinite(norms).all():
            raise ValueError("a product with A is not finite")
        units = np.where(norms > 0, norms, 1.0)
        bounds = self._bound.predict(group, np.c_[self.alphas[group, :at], alphas], self.betas[group, :at], units)
        samples = row_dots(basis[:, 0], W).abs().cpu().numpy() / units
        measured = (norms > 0) & ~self._bound.is_low(group, at + 1, bounds, samples)
        if not measured.any():
            return alphas, norms
        overlaps = inner_products(basis, W[:, :, None])[:, :, 0]
        losses = _losses(overlaps, units)
        cleaned = self._bound.needs_cleaning(group, at + 1, bounds, losses, units, measured)
        while cleaned.any():
            if not cleaned.all():
                overlaps *= self._column(cleaned)
            W[:, None].baddbmm_(overlaps[:, None], basis, alpha=-1)
            alphas = alphas + overlaps[:, at].cpu().numpy()
            self._deflate(W)
            before, norms = norms, row_norms(W)
            # Repeat if the norm decreased by half or more: rounding errors are then large relative to the remaining
            # vector. Also repeat after a large loss: a part of it remains, because the basis is not exactly orthogonal.
            repeated = (norms <= 0.5 * before) | self._bound.remains(losses)
            cleaned &= repeated & (norms > self._eps * np.abs(alphas))
            if cleaned.any():
                overlaps = inner_products(basis, W[:, :, None])[:, :, 0]
                losses = _losses(overlaps, np.where(norms > 0, norms, 1.0))
        return alphas, norms

    def _column(self, numbers: Array) -> Tensor:
        """Convert one number per run to a column ``(g, 1)`` with the device and dtype of the basis."""
        return torch.from_numpy(numbers).to(self.basis.device, self.basis.dtype)[:, None]

    def _deflate(self, W: Tensor) -> None:
        if self._deflated is not None:
            W.addmm_(W @ self._deflated.T, self._deflated, alpha=-1)


class OrthogonalityBound:
    r"""Bounds for the loss of orthogonality in Lanczos runs. The bounds decide when to orthogonalize a new vector.

    The inner products :math:`w_{j+1} = Q_j^\top q_{j+1}` of a new vector with its basis obey the same recurrence as the
    vectors (Paige, 1976; Simon, 1984). The norms of the inner products therefore satisfy

    .. math::

        \beta_{j+1} \|w_{j+1}\| \le \|T_j - \alpha_j I\| \|w_j\| + \beta_j \|w_{j-1}\| + \text{rounding}.

    If this bound is small, the new vector need not be orthogonalized. If the bound is large, the inner products are
    computed, which is expensive because it reads the whole basis. The new vector is orthogonalized ("cleaned") only if
    the computed inner products are large, too.

    The recurrence does not detect if the products with the operator become less accurate during a run. Therefore, every
    step computes the inner product of the new vector with one vector of the basis. Noise that is orthogonal to this
    basis vector is not detected, and may cause a larger loss of orthogonality.

    Simon (1984) bounds each inner product separately. This class computes an upper bound for the norm of the vector of
    inner products, which takes fewer operations.

    Parameters
    ----------
    count : int
        Number of runs.
    eps : float
        Machine epsilon of the basis.
    limit : float
        Largest allowed loss of orthogonality. The square root of the precision of the products suffices for a
        tridiagonal matrix that is as accurate as the products (Simon, 1984).

    Attributes
    ----------
    state : ndarray, shape (count, 4)
        State of each run in four columns: the bound for the second to last vector, the bound for the last vector, the
        norm of the rounding errors of a product within the span of the basis, and 1 if the next vector must be
        orthogonalized.
    """

    def __init__(self, count: int, eps: float, limit: float) -> None:
        self._fresh, self._limit = _FRESH * eps, limit
        self.state = np.zeros((count, 4))

    def predict(self, group: slice, alphas: Array, betas: Array, norms: Array) -> Array:
        """Return bounds of shape (g,) for the loss of orthogonality in the next vector of each run, after j steps.

        Parameters
        ----------
        group : slice
            The runs.
        alphas, betas : ndarray, shapes (g, j) and (g, j - 1)
            Diagonals and off-diagonals of the tridiagonal matrices.
        norms : ndarray, shape (g,)
            Norms of the next vectors before normalization.
        """
        before, last, errors, _ = self.state[group].T
        alphas, betas = alphas / norms[:, None], betas / norms[:, None]  # LAPACK squares them
        low, high = np.transpose([_ends(*entries) for entries in zip(alphas, betas, strict=True)])
        spread = np.maximum(high - alphas[:, -1], alphas[:, -1] - low)
        coupling = betas[:, -1] if betas.shape[1] else np.zeros(len(norms))
        bounds: Array = spread * last + coupling * before + np.maximum(errors / norms, self._fresh)
        return bounds

    def is_low(self, group: slice, steps: int, bounds: Array, samples: Array) -> Array:
        """Record the bounds that are low. Return a boolean array of shape (g,) that is True for runs with low bounds.

        If the entry of a run is False, the caller must compute the inner products of the next vector with the basis.

        Parameters
        ----------
        group : slice
            The runs.
        steps : int
            Number of steps.
        bounds : ndarray, shape (g,)
            Bounds from `predict`.
        samples : ndarray, shape (g,)
            Inner product of each next vector with one vector of its basis. A sample that exceeds its bound shows that
            the products with the operator have become less accurate, which the recurrence does not detect.
        """
        _, last, errors, due = self.state[group].T
        low = (steps > _FIRST_STEPS) & (due == 0) & (samples <= bounds) & (bounds <= self._limit)
        updated = np.stack([last, bounds, errors, due], axis=1)
        self.state[group] = np.where(low[:, None], updated, self.state[group])
        return np.asarray(low)

    def remains(self, losses: Array) -> Array:
        """Return True for vectors that are not orthogonal to rounding errors after they were orthogonalized once.

        The basis is orthogonal up to the limit. A vector with the loss l therefore has at most the loss ``limit * l``
        after it was orthogonalized against this basis.
        """
        return np.asarray(losses * self._limit > self._fresh)

    def needs_cleaning(
        self, group: slice, steps: int, bounds: Array, losses: Array, norms: Array, measured: Array
    ) -> Array:
        """Return a boolean array of shape (g,) that is True for runs whose next vector must be orthogonalized.

        Parameters
        ----------
        group : slice
            The runs.
        steps : int
            Number of steps.
        bounds : ndarray, shape (g,)
            Bounds from `predict`.
        losses : ndarray, shape (g,)
            Loss of orthogonality of each run: the norm of the inner products of its next vector with its basis. This
            method records the losses.
        norms : ndarray, shape (g,)
            Norms of the next vectors before normalization.
        measured : ndarray of bool, shape (g,)
            True for runs whose ``losses`` were computed. The state of the other runs is not changed.
        """
        _, last, errors, due = self.state[group].T
        first = steps <= _FIRST_STEPS
        inexact = first | (losses > bounds)  # products with A are less accurate than the recurrence assumes
        errors = np.where(inexact, np.maximum(errors, losses * norms), errors)
        clean = first | (due > 0) | (losses > _CLEAN * self._limit)
        # Clean two consecutive vectors, because each vector depends on the loss of the two vectors before it.
        due = clean & (not first) & (due == 0)
        left = np.where(clean, self._fresh, np.maximum(losses, self._fresh))
        updated = np.stack([last, left, errors, due], axis=1)
        self.state[group] = np.where(measured[:, None], updated, self.state[group])
        return np.asarray(clean & measured)


def _losses(overlaps: Tensor, norms: Array) -> Array:
    """Return the losses of orthogonality ``(g,)`` from the overlaps ``(g, m)`` and the norms ``(g,)`` of vectors."""
    losses: Array = column_norms(overlaps.double().cpu().numpy().T) / norms
    return losses


def _ends(alphas: Array, betas: Array) -> tuple[float, float]:
    """Return a lower and an upper bound for all eigenvalues of a tridiagonal matrix.

    The bounds are accurate to about a thousandth of the norm, which is estimated from the largest entries.
    """
    count, norm = len(alphas), np.abs(alphas).max() + 2 * betas.max(initial=0.0)
    if count == 1:
        return alphas[0], alphas[0]
    least, largest = (dstebz(alphas, betas, 2, 0.0, 0.0, end, end, 1e-3 * norm, "E")[1][0] for end in (1, count))
    return least - 1e-3 * norm, largest + 1e-3 * norm


def zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return a tensor of zeros."""
    return (
        host_tensor(shape, dtype, np.zeros) if device.type == "cpu" else torch.zeros(shape, dtype=dtype, device=device)
    )


def gauss_rules(alphas: Array, betas: Array, lengths: Array) -> tuple[Array, Array]:
    """Return the nodes and the weights of the Gauss quadratures of K Lanczos runs, two arrays of shape ``(K, m)``.

    The nodes are the eigenvalues of the tridiagonal matrices. The weights are the squares of the first entries of the
    eigenvectors, and sum to 1 (Golub, Welsch, 1969). If a run stopped early, its rows are padded with zeros.

    Parameters
    ----------
    alphas, betas : ndarray, shape (K, m)
        Diagonals and off-diagonals of the tridiagonal matrices.
    lengths : ndarray of int, shape (K,)
        Number of steps of each run.
    """
    nodes, weights = np.zeros(alphas.shape), np.zeros(alphas.shape)
    for run, length in enumerate(lengths):
        if length:
            values, vectors = eigh_tridiagonal(alphas[run, :length], betas[run, : length - 1])
            # The weight of a node in a gap of the spectrum may underflow. It must stay positive, because 0 marks
            # padding.
            nodes[run, :length] = values
            weights[run, :length] = np.maximum(vectors[0] ** 2, np.finfo(np.float64).tiny)
    return nodes, weights


def device_of(A: Any) -> torch.device:
    """Return the device of the vectors that `multiply` accepts.

    This is the CPU if the operator accepts NumPy arrays only, as SciPy's operators and sums that contain one of them.
    """
    takes_tensors = isinstance(A, TensorLinearOperator) and A.takes_tensors
    return A.device if takes_tensors else torch.device("cpu")


def multiply(A: Any, rows: Tensor) -> Tensor:
    """Apply `A` to the rows of a tensor ``(K, N)`` in one block product. Return the products as rows ``(K, M)``."""
    if isinstance(A, TensorLinearOperator) and A.takes_tensors:
        product: Tensor = A @ rows.T
        return product.T
    array = np.array((A @ rows.numpy().T).T, order="C")  # a copy, because an operator may return its argument
    return aligned(torch.from_numpy(array).to(torch.promote_types(rows.dtype, torch.float32)))


def product_dtype(A: Any) -> torch.dtype:
    """Return float32 if products with `A` are accurate to single precision only, and float64 otherwise."""
    single = A.dtype == np.float32 or getattr(A, "epsilon", 0.0) > torch.finfo(torch.float64).eps
    return torch.float32 if single else torch.float64


def product_precision(A: Any) -> float:
    """Return the machine epsilon of the lowest precision used in a product with `A`, or of its dtype if unknown."""
    dtypes = [np.dtype(np.float64)] + [A.dtype] * (A.dtype is not None and A.dtype.kind == "f")
    return max(float(getattr(A, "epsilon", 0.0)), *(float(np.finfo(dtype).eps) for dtype in dtypes))


def resolution(A: Any) -> float:
    """Return the relative distance below which rounding may merge or split eigenvalues.

    The distance is relative to the norm of `A`.
    """
    return rounding_left(product_dtype(A), A.shape[0])


def bytes_of_run(A: Any, num_steps: int) -> int:
    """Return the number of bytes that one run needs for its basis and for the temporary vectors of a step."""
    return int(product_dtype(A).itemsize * A.shape[0] * (num_steps + 6))


def runs_at_once(A: Any, count: int, num_steps: int, memory: int | None, start: str = "probe") -> int:
    """Return the number of runs that fit into `memory` bytes, at most `count`.

    By default, `memory` is half of the free memory. The error message calls a starting vector a `start`.

    Raises
    ------
    MemoryError
        If a single run does not fit. The message states the number of bytes and a remedy.
    """
    available = available_bytes(device_of(A), memory)
    needed = bytes_of_run(A, num_steps)
    what = f"the Lanczos basis of one {start}, {num_steps} vectors of {A.shape[0]:,} numbers,"
    check_fits(needed, available, what, "take fewer num_steps, or a block of the matrix")
    return min(count, available // needed)


def rounding_left(dtype: torch.dtype, size: int) -> float:
    """Return the norm below which an orthogonalized vector ``(size,)`` may consist of rounding errors only.

    This threshold is relative to the norm of the matrix. In double precision, the threshold grows with the square root
    of `size`, to allow for products that sum sequentially. In single precision, it does not depend on `size`, because
    it would otherwise be as large as the eigenvalues in the bulk of a network's spectrum.
    """
    return 10 * float(torch.finfo(dtype).eps) * (size**0.5 if dtype == torch.float64 else 1.0)
