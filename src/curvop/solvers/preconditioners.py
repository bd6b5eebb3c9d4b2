"""Preconditioners for damped systems, to be handed to ``cg`` and ``minres`` as ``M=``."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import diags_array
from scipy.sparse.linalg import LinearOperator, aslinearoperator

from curvop.operators.validation import random_generator, real_number, real_operator
from curvop.spectrum.estimators import diagonal

__all__ = ["NystromPreconditioner", "jacobi", "nystrom"]


class NystromPreconditioner(LinearOperator):  # type: ignore[misc]
    r"""The inverse of a low-rank approximation of ``A + damping * I``, made by `nystrom`.

    .. math:: M = (\lambda_r + \mu) \, U (\Lambda + \mu I)^{-1} U^\top + (I - U U^\top)

    (Frangella, Tropp, Udell, 2023, eq. (5.3)). A product costs 4 N r operations.

    Parameters
    ----------
    vectors : ndarray, shape (N, r)
        U, with orthonormal columns.
    values : ndarray, shape (r,)
        The diagonal of Lambda, in descending order, not negative.
    damping : float
    """

    def __init__(self, vectors: NDArray[Any], values: NDArray[Any], damping: float) -> None:
        super().__init__(vectors.dtype, (len(vectors), len(vectors)))
        self.vectors = vectors
        self.values = values
        self.damping = damping
        self._scales = (values[-1] + damping) / (values + damping) - 1

    def _matvec(self, x: Any) -> Any:
        return self._matmat(np.asarray(x))

    def _matmat(self, X: Any) -> Any:
        X = np.asarray(X)
        inner = self.vectors.T @ X
        return X + self.vectors @ (self._scales.reshape(-1, *[1] * (X.ndim - 1)) * inner)

    def _adjoint(self) -> NystromPreconditioner:
        return self

    _transpose = _adjoint


def nystrom(
    A: LinearOperator, rank: int, damping: float, rng: int | np.random.Generator | None = None
) -> NystromPreconditioner:
    """Return a preconditioner for ``A + damping * I`` from one block product with `A`.

    Of use where few eigenvalues lie far above the damping, as the Gauss-Newton and Fisher matrices of networks have
    them: with a rank of twice the number of eigenvalues above the damping, ``cg`` needs a number of products that does
    not depend on the condition of `A`.

    Parameters
    ----------
    A : LinearOperator, shape (N, N)
        Symmetric positive semi-definite, undamped.
    rank : int
        Columns of the block product; N rank numbers are kept, in float64, and five times as many for a while.
    damping : float
        Positive.
    rng : int or numpy.random.Generator, optional
        Of the random test matrix.

    Raises
    ------
    ValueError
        For a rank or a damping that cannot be, and where a product is not finite or `A` is found to be indefinite.

    References
    ----------
    Frangella, Tropp, Udell (2023), "Randomized Nystrom preconditioning", SIAM J. Matrix Anal. Appl. 44(2),
    algorithm 2.1 and section 5; arXiv:2110.02820.
    """
    size = _square(A)
    if not isinstance(rank, int | np.integer) or not 1 <= rank <= size:
        raise ValueError(f"rank is {rank}, but must be between 1 and the {size} rows of A")
    _positive(damping)
    test = random_generator(rng).standard_normal((size, rank))
    # By what lets other threads run meanwhile, such as those by which ranks tell each other that they live: NumPy's
    # solve and svd, not SciPy's routines, and not NumPy's qr and norm.
    test = np.linalg.svd(test, full_matrices=False)[0]
    product = np.asarray(A @ test, dtype=np.float64)
    if not np.isfinite(product).all():
        raise ValueError("a product with A is not finite")
    inner = test.T @ product
    norm = float(np.sqrt(max(0.0, np.linalg.eigvalsh(product.T @ product)[-1])))
    if norm == 0:
        return NystromPreconditioner(test, np.zeros(rank), damping)
    eigenvalue = float(np.linalg.eigvalsh((inner + inner.T) / 2)[0])
    # A product of a float32 model is exact to float32, whatever the dtype of its vectors.
    noise = float(np.sqrt(size) * np.finfo(np.float32).eps * norm)
    if eigenvalue < -max(noise, 1e-2 * damping):
        raise ValueError(
            f"A is indefinite (an eigenvalue is at most {eigenvalue:.3g}): precondition a positive semi-definite one, "
            "such as a GGNLinearOperator of the same model"
        )
    shift = float(np.sqrt(size) * np.finfo(np.float64).eps * norm)
    while True:
        try:
            doubled = inner + inner.T
            doubled[np.diag_indices(rank)] += 2 * shift
            factor = np.linalg.cholesky(doubled) / 2**0.5
            break
        except np.linalg.LinAlgError:
            shift *= 10
    shifted = product + shift * test
    del test, product
    # Backwards it is an upper triangle, which the solver takes as its own factor: rows are not exchanged.
    left = np.linalg.solve(factor[::-1, ::-1], shifted.T[::-1])[::-1].T
    del shifted
    vectors, singular, _ = np.linalg.svd(left, full_matrices=False)
    values = np.maximum(0, singular**2 - shift)
    return NystromPreconditioner(vectors, values, damping)


def _square(A: LinearOperator) -> int:
    rows, cols = real_operator(A).shape
    if rows != cols:
        raise ValueError(f"A has shape {A.shape}, but must be square")
    return int(rows)


def _positive(damping: float) -> None:
    if not (np.isfinite(real_number("damping", damping)) and damping > 0):
        raise ValueError(f"damping is {damping}, but must be positive and finite")


def _exact_diagonal(A: LinearOperator) -> NDArray[Any] | None:
    """Return the diagonal that an operator knows of itself."""
    method = getattr(A, "diagonal", None)
    try:
        return None if method is None else np.asarray(method())
    except NotImplementedError:
        return None


def jacobi(
    A: LinearOperator, damping: float, num_products: int = 64, rng: int | np.random.Generator | None = None
) -> LinearOperator:
    """Return the inverse diagonal of ``A + damping * I`` as a preconditioner.

    Of use where parameters differ in scale; where few eigenvalues stand out, `nystrom` gains more.

    Parameters
    ----------
    A : LinearOperator, shape (N, N)
        Symmetric positive semi-definite, undamped. Where ``A.diagonal()`` knows it, as for the Gauss-Newton and Fisher
        matrices, their blocks and submatrices, the diagonal is exact; else it is estimated by XDiag, and what comes out
        negative counts as zero.
    damping : float
        Positive.
    num_products : int
        For the estimate, which from N on is exact.
    rng : int or numpy.random.Generator, optional
        Of the estimate.
    """
    _square(A)
    _positive(damping)
    values = _exact_diagonal(A)
    if values is None:
        values = diagonal(A, num_products, rng).value
    if not np.isfinite(values).all():
        raise ValueError("the diagonal of A is not finite")
    scales: NDArray[Any] = 1 / (np.maximum(values.astype(np.float64), 0) + damping)
    return aslinearoperator(diags_array(scales))
