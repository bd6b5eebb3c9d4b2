r"""The Lanczos recurrence from several starting vectors at once, which keeps its vectors orthogonal.

For each starting vector, after m steps, :math:`A Q_m = Q_m T_m + \beta_m q_{m+1} e_m^\top` with orthonormal
:math:`Q_m` and tridiagonal :math:`T_m` (Lanczos, 1950). The runs share nothing but the block products. All arrays are
torch tensors, on the device where the operator computes: a NumPy array on the host is a tensor of the same memory.

The basis is taken out of a new vector, all of it, wherever `curvop.spectrum.lanczos` cannot rule out that it has
come to hold more than 300 times the precision of it.

References
----------
Golub, Van Loan (2013), "Matrix Computations", section 10.1; Daniel, Gragg, Kaufman, Stewart (1976) for the second
orthogonalisation.
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
from curvop.operators.transfer import LINE, aligned
from curvop.operators.validation import available_bytes, check_fits
from curvop.spectrum.norms import column_norms, dots_of, norms_of

__all__ = [
    "Lanczos",
    "OrthogonalityBound",
    "basis_dtype",
    "bytes_of_run",
    "device_of",
    "multiply",
    "resolution",
    "rounding_left",
    "runs_at_once",
]

Array = NDArray[Any]


# Numbers that are summed one after another in the basis's own precision.
_SECTION = 16384


def device_of(A: Any) -> torch.device:
    """Return where an operator computes; SciPy's own compute on the host."""
    return A.device if isinstance(A, TensorLinearOperator) else torch.device("cpu")


def multiply(A: Any, rows: Tensor) -> Tensor:
    """Return the products ``(K, M)`` of `A` with the rows ``(K, N)`` of a tensor, from one block product."""
    if isinstance(A, TensorLinearOperator) and A.takes_tensors:
        product: Tensor = A @ rows.T
        return product.T
    array = np.array((A @ rows.numpy().T).T, order="C")  # a copy, as an operator may return its argument
    return aligned(torch.from_numpy(array).to(torch.promote_types(rows.dtype, torch.float32)))


def basis_dtype(A: Any) -> torch.dtype:
    """Return the precision that a basis is kept in: that of the operator's vectors, float32 or float64."""
    return torch.float32 if A.dtype == np.float32 else torch.float64


def resolution(A: Any) -> float:
    """Return the distance, relative to the norm, at which rounding in the products may merge or split eigenvalues."""
    single = A.dtype == np.float32 or getattr(A, "epsilon", 0.0) > torch.finfo(torch.float64).eps
    return rounding_left(torch.float32 if single else torch.float64, A.shape[0])


def bytes_of_run(A: Any, num_steps: int) -> int:
    """Return what one run takes: its basis, and what a step takes."""
    return int(basis_dtype(A).itemsize * A.shape[0] * (num_steps + 6))


def runs_at_once(A: Any, num_probes: int, num_steps: int, memory: int | None) -> int:
    """Return how many runs fit into `memory` bytes, half of what is free by default.

    Raises
    ------
    MemoryError
        Where not even one does, with the number and the remedy.
    """
    available = available_bytes(device_of(A), memory)
    one = bytes_of_run(A, num_steps)
    what = f"the Lanczos basis of one probe, {num_steps} vectors of {A.shape[0]:,} numbers,"
    check_fits(one, available, what, "take fewer num_steps, or a block of the matrix")
    return min(num_probes, available // one)


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return a tensor of zeros; on the host from NumPy, whose large arrays take huge pages, made four times as fast."""
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    size = math.prod(shape) * dtype.itemsize
    room = torch.from_numpy(np.zeros(size + LINE, np.uint8))
    return room[-room.data_ptr() % LINE :][:size].view(dtype).view(shape)  # as `aligned` has it


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
        in float32 where `A` is: half the memory and half the time, orthogonal to 4e-5 or better. That is 300 times the
        precision; see `curvop.spectrum.lanczos` for what may exceed it.
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
        products = products.to(self.basis.dtype)
        for start, stop in self._together(runs):
            group, W = slice(runs[start], runs[stop - 1] + 1), products[start:stop]
            self.alphas[group, at], self.betas[group, at] = self._orthogonalise(group, at, W)
            norms = self.betas[group, at]
            torch.div(W, self._column(np.where(norms > 0, norms, np.inf)), out=self.basis[group, at + 1])
        self._advance(runs)
        return runs

    def _together(self, runs: NDArray[np.intp]) -> list[tuple[int, int]]:
        """Return bounds of runs that take their step together.

        On a GPU, those beside each other, as it is the number of operations that costs. On the host, each alone: its
        vector then stays in the processor's cache.
        """
        alone = self.basis.device.type == "cpu"
        cuts = np.flatnonzero(np.diff(runs) > (0 if alone else 1)) + 1
        return list(itertools.pairwise([0, *cuts.tolist(), len(runs)]))

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
        self._running[runs] = betas > rounding_left(self.basis.dtype, self.basis.shape[2]) * self._scale
        if at + 2 == self.basis.shape[1]:
            self._running[:] = False

    def _orthogonalise(self, group: slice, at: int, W: Tensor) -> tuple[Array, Array]:
        """Take the basis out of rows `W` ``(g, N)``, in place; return the diagonal's entries and the norms left."""
        basis = self.basis[group, : at + 1]
        if at:
            W.addcmul_(basis[:, at - 1], self._column(self.betas[group, at - 1]), value=-1)
        dots = dots_of(basis[:, at], W)
        W.addcmul_(basis[:, at], dots[:, None].to(W.dtype), value=-1)
        self._deflate(W)
        alphas, norms = dots.cpu().numpy(), norms_of(W)
        if not np.isfinite(norms).all():
            raise ValueError("a product with A is not finite")
        units = np.where(norms > 0, norms, 1.0)
        bounds = self._lost.of_next(group, np.c_[self.alphas[group, :at], alphas], self.betas[group, :at], units)
        samples = dots_of(basis[:, 0], W).abs().cpu().numpy() / units
        looked = (norms > 0) & ~self._lost.is_low(group, at + 1, bounds, samples)
        if not looked.any():
            return alphas, norms
        shares = _overlaps(basis, W)
        found = column_norms(shares.double().cpu().numpy().T) / units
        cleaned = self._lost.needs_cleaning(group, at + 1, bounds, found, looked)
        while cleaned.any():
            if not cleaned.all():
                shares *= self._column(cleaned)
            W[:, None].baddbmm_(shares[:, None], basis, alpha=-1)
            alphas = alphas + shares[:, at].cpu().numpy()
            self._deflate(W)
            before, norms = norms, norms_of(W)
            cleaned &= (norms <= 0.5 * before) & (norms > self._eps * np.abs(alphas))
            if cleaned.any():
                shares = _overlaps(basis, W)
        return alphas, norms

    def _column(self, numbers: Array) -> Tensor:
        """Return numbers of the runs ``(g, 1)`` as the basis has them."""
        return torch.from_numpy(numbers).to(self.basis.device, self.basis.dtype)[:, None]

    def _deflate(self, W: Tensor) -> None:
        if self._deflated is not None:
            W.addmm_(W @ self._deflated.T, self._deflated, alpha=-1)

    def quadrature(self) -> tuple[np.ndarray, np.ndarray]:
        """Return nodes and weights ``(K, num_steps)`` of each run's Gauss quadrature; the weights of a run sum to 1.

        The nodes are the eigenvalues of the tridiagonal matrix, the weights the squares of its eigenvectors' first
        entries (Golub, Welsch, 1969). Where a run stopped early, nodes and weights of 0 fill the row.
        """
        nodes, weights = np.zeros(self.alphas.shape), np.zeros(self.alphas.shape)
        for run, length in enumerate(self.lengths):
            values, vectors = eigh_tridiagonal(self.alphas[run, :length], self.betas[run, : length - 1])
            # In a gap of the spectrum a weight may underflow; it is not 0, as that means there is no node.
            nodes[run, :length] = values
            weights[run, :length] = np.maximum(vectors[0] ** 2, np.finfo(np.float64).tiny)
        return nodes, weights


def _overlaps(basis: Tensor, W: Tensor) -> Tensor:
    """Return the products ``(g, m)`` of each row of `W` ``(g, N)`` with its own basis ``(g, m, N)``.

    On the host, where many numbers are summed one after another, by sections: what is wrong with them beside large
    eigenvalues grows by these in every step. A GPU sums in a tree.
    """
    size = W.shape[1]
    section = _SECTION if basis.device.type == "cpu" else size
    total = torch.zeros(basis.shape[:2], dtype=torch.float64, device=basis.device)
    for start in range(0, size, section):
        where = slice(start, start + section)
        total += torch.bmm(basis[:, :, where], W[:, where, None])[:, :, 0]
    return total.to(W.dtype)


# How far from orthogonal to its basis the next vector of a Lanczos run may be: when a look at the basis is due.
#
# Between them, the vectors' products :math:`w_{j+1} = Q_j^\top q_{j+1}` obey the recurrence of the vectors themselves
# (Paige, 1976; Simon, 1984), so that for their norms
#
# .. math::
#
#     \beta_{j+1} \|w_{j+1}\| \le \|T_j - \alpha_j I\| \|w_j\| + \beta_j \|w_{j-1}\| + \text{rounding}.
#
# As long as this bound is small, nothing has to be taken out of the new vector; and looking is what costs, as it reads
# the whole basis. One of its vectors is looked at in every step, to see where products become less exact; should noise
# spare this one, more may be lost.
#
# References
# ----------
# Simon (1984), "The Lanczos algorithm with partial reorthogonalization", Math. Comp. 42(165). There the products are
# followed one by one, and up to the root of the precision; here they are kept within 300 times the precision.

# In units of the precision: the bound at which the basis is looked at, what is left in if it is seen then, and what
# rounding alone may leave.
_LOOK, _CLEAN, _FRESH = 300.0, 30.0, 10.0
_FIRST_STEPS = 3  # show what rounding leaves, in the products as well


def rounding_left(dtype: torch.dtype, size: int) -> float:
    """Return what rounding may leave of a vector ``(size,)`` that is in the span of a basis, by the matrix's norm.

    It hardly grows with the size; but in double precision, products that sum rows one after another are given the root
    of it, which is still little. In single precision that would be as much as the eigenvalues of a network's bulk.
    """
    return 10 * float(torch.finfo(dtype).eps) * (size**0.5 if dtype == torch.float64 else 1.0)


class OrthogonalityBound:
    """Bounds the loss of orthogonality of several runs.

    Parameters
    ----------
    count : int
        Of the runs.
    eps : float
        The precision of the basis.

    Attributes
    ----------
    state : ndarray, shape (count, 4)
        All that is known: the bounds of the last vector but one and of the last, what rounding leaves in a vector that
        was cleaned, and whether the next is to be cleaned as well.
    """

    def __init__(self, count: int, eps: float) -> None:
        self._eps = eps
        self.state = np.tile([0.0, 0.0, _FRESH * eps, 0.0], (count, 1))

    def of_next(self, group: slice, alphas: Array, betas: Array, norms: Array) -> Array:
        """Bound the losses ``(g,)`` of the next vectors, of these norms as yet, after j steps of a group of runs.

        Parameters
        ----------
        alphas, betas : ndarray, shapes (g, j) and (g, j - 1)
            Of the tridiagonal matrices.
        norms : ndarray, shape (g,)
        """
        before, last, fresh, _ = self.state[group].T
        alphas, betas = alphas / norms[:, None], betas / norms[:, None]  # LAPACK squares them
        low, high = np.transpose([_ends(*entries) for entries in zip(alphas, betas, strict=True)])
        spread = np.maximum(high - alphas[:, -1], alphas[:, -1] - low)
        coupling = betas[:, -1] if betas.shape[1] else np.zeros(len(norms))
        bounds: Array = spread * last + coupling * before + fresh
        return bounds

    def is_low(self, group: slice, steps: int, bounds: Array, samples: Array) -> Array:
        """Tell for which runs ``(g,)`` no look is due; the bound is then what is known of the next vector.

        `samples` are the products of the next vectors with one of the basis each: where one is beyond the bound, the
        operator's products have become less exact than they were, of which no recurrence knows.
        """
        _, last, fresh, due = self.state[group].T
        low = (steps > _FIRST_STEPS) & (due == 0) & (samples <= bounds) & (bounds <= _LOOK * self._eps)
        known = np.stack([last, bounds, fresh, due], axis=1)
        self.state[group] = np.where(low[:, None], known, self.state[group])
        return np.asarray(low)

    def needs_cleaning(self, group: slice, steps: int, bounds: Array, found: Array, looked: Array) -> Array:
        """Take in the losses of the next vectors as a look at some has `found` them; tell which are to be cleaned."""
        _, last, fresh, due = self.state[group].T
        first = steps <= _FIRST_STEPS
        inexact = first | (found > bounds)  # products are less exact than the precision
        fresh = np.where(inexact, np.maximum(fresh, found), fresh)
        clean = first | (due > 0) | (found > _CLEAN * self._eps)
        # What is wrong with the last vector goes over to the one after the next: two in turn are cleaned.
        due = clean & (not first) & (due == 0)
        known = np.stack(
            [np.maximum(last, fresh), np.where(clean, fresh, np.maximum(found, fresh)), fresh, due], axis=1
        )
        self.state[group] = np.where(looked[:, None], known, self.state[group])
        return np.asarray(clean & looked)


def _ends(alphas: Array, betas: Array) -> tuple[float, float]:
    """Return bounds of the eigenvalues of a tridiagonal matrix, a thousandth of its norm or less beyond them."""
    count, norm = len(alphas), np.abs(alphas).max() + 2 * betas.max(initial=0.0)
    if count == 1:
        return alphas[0], alphas[0]
    least, largest = (dstebz(alphas, betas, 2, 0.0, 0.0, end, end, 1e-3 * norm, "E")[1][0] for end in (1, count))
    return least - 1e-3 * norm, largest + 1e-3 * norm
