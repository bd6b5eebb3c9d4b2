"""Nystrom and Jacobi preconditioners of damped systems, for `curvop.solve` and SciPy's ``cg`` and ``minres``."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import diags_array
from scipy.sparse.linalg import LinearOperator, aslinearoperator

from curvop.operators.validation import random_generator, real_operator, real_scalar
from curvop.spectrum.estimators import diagonal

__all__ = ["NystromPreconditioner", "jacobi", "nystrom"]


def nystrom(
    A: LinearOperator, rank: int, damping: float, rng: int | np.random.Generator | None = None
) -> NystromPreconditioner:
    """Construct a low-rank preconditioner for ``A + damping * I`` from one block product with `A`.

    Use this preconditioner if only a few eigenvalues are much larger than the damping. This is common for the
    Gauss-Newton and Fisher matrices of neural networks. If the rank is twice the number of eigenvalues that exceed the
    damping, the number of steps of conjugate gradients does not depend on the condition number of `A`. If the
    eigenvalues differ mainly because the parameters have different scales, `jacobi` may be sufficient.

    Parameters
    ----------
    A : LinearOperator, shape (N, N)
        The symmetric positive semi-definite operator, without damping.
    rank : int
        The number of columns of the block product, from 1 to N. The preconditioner stores ``N * rank`` float64 numbers.
        The construction needs five times this memory.
    damping : float
        The positive damping of the system.
    rng : int, numpy.random.Generator or None, optional
        The seed or generator of the random test matrix. By default, every call uses a different test matrix.

    Returns
    -------
    NystromPreconditioner
        The preconditioner, which can be used for any number of right-hand sides.

    Raises
    ------
    TypeError, ValueError
        If an argument is invalid, a product is not finite, or `A` is found to be indefinite.

    See Also
    --------
    jacobi : A diagonal preconditioner.
    curvop.solve : Solve a damped system.

    Notes
    -----
    The preconditioner is based on the randomized Nystrom approximation [1]_ (algorithm 2.1 and section 5). Its
    construction takes one product of `A` with a random N x rank matrix, and ``O(N * rank**2)`` other operations.

    References
    ----------
    .. [1] Z. Frangella, J. A. Tropp, M. Udell, "Randomized Nystrom preconditioning", SIAM J. Matrix Anal. Appl. 44(2),
       2023. doi:10.1137/21M1466244, arXiv:2110.02820

    Examples
    --------
    A tenth of the eigenvalues of this matrix are larger than the damping, by factors from 10 to 100,000:

    >>> import numpy as np
    >>> from scipy.sparse import diags_array
    >>> from curvop import preconditioner, solve
    >>> A = diags_array(np.r_[np.logspace(0, 4, 100), np.full(900, 1e-3)])
    >>> b = np.random.default_rng(0).standard_normal(1000)
    >>> M = preconditioner.nystrom(A, rank=150, damping=0.1, rng=0)
    >>> plain = solve(A, b, damping=0.1, progress=False)
    >>> preconditioned = solve(A, b, damping=0.1, preconditioner=M, progress=False)
    >>> preconditioned.converged, preconditioned.products < plain.products / 10
    (True, True)
    """
    size = _num_rows(A)
    if not isinstance(rank, int | np.integer) or not 1 <= rank <= size:
        raise ValueError(f"rank is {rank}, but must be an integer between 1 and {size}, the number of rows of A")
    _check_damping(damping)
    test = random_generator(rng).standard_normal((size, rank))
    # Use only routines that release the GIL, so that other threads can run (for example, the heartbeats of distributed
    # ranks). NumPy's solve and svd release it. SciPy's routines and NumPy's qr and norm do not.
    test = np.linalg.svd(test, full_matrices=False)[0]
    product = np.asarray(A @ test, dtype=np.float64)
    if not np.isfinite(product).all():
        raise ValueError("a product with A is not finite")
    inner = test.T @ product
    norm = float(np.sqrt(max(0.0, np.linalg.eigvalsh(product.T @ product)[-1])))
    if norm == 0:
        return NystromPreconditioner(test, np.zeros(rank), damping)
    eigenvalue = float(np.linalg.eigvalsh((inner + inner.T) / 2)[0])
    # Products of a float32 model have only the accuracy of float32, even for float64 vectors.
    noise = float(np.sqrt(size) * np.finfo(np.float32).eps * norm)
    if eigenvalue < -max(noise, 1e-2 * damping):
        raise ValueError(
            f"A is indefinite (its smallest eigenvalue is at most {eigenvalue:.3g}): pass a positive semi-definite "
            "matrix, for example a GGNLinearOperator of the same model"
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
    # With reversed rows and columns, the factor is upper triangular. The LU factorization in `np.linalg.solve` then
    # neither changes nor pivots it.
    left = np.linalg.solve(factor[::-1, ::-1], shifted.T[::-1])[::-1].T
    del shifted
    vectors, singular, _ = np.linalg.svd(left, full_matrices=False)
    values = np.maximum(0, singular**2 - shift)
    return NystromPreconditioner(vectors, values, damping)


def jacobi(
    A: LinearOperator, damping: float, num_products: int = 64, rng: int | np.random.Generator | None = None
) -> LinearOperator:
    """Construct the diagonal (Jacobi) preconditioner for ``A + damping * I``.

    Use this preconditioner if the parameters have different scales. If only a few eigenvalues are much larger than the
    others, `nystrom` saves more products.

    Parameters
    ----------
    A : LinearOperator, shape (N, N)
        The symmetric positive semi-definite operator, without damping. If the operator has a method ``diagonal`` (for
        example, Gauss-Newton and Fisher matrices, and their blocks and submatrices), the exact diagonal is used.
        Otherwise the diagonal is estimated, and negative estimates are replaced by zero.
    damping : float
        The positive damping of the system.
    num_products : int, optional
        The number of products for the estimate. If this number is at least N, the diagonal is exact.
    rng : int, numpy.random.Generator or None, optional
        The seed or generator of the random vectors for the estimate. By default, every call uses different vectors.

    Returns
    -------
    LinearOperator, shape (N, N)
        The inverse of the diagonal of ``A + damping * I``.

    Raises
    ------
    TypeError, ValueError
        If an argument is invalid, or the diagonal is not finite.

    See Also
    --------
    nystrom : A preconditioner for matrices with few large eigenvalues.
    curvop.spectrum.diagonal : Estimate the diagonal.

    Notes
    -----
    The diagonal is estimated by XDiag [1]_. A product with the preconditioner takes N operations.

    References
    ----------
    .. [1] E. N. Epperly, J. A. Tropp, R. J. Webber, "XTrace: Making the most of every sample in stochastic trace
       estimation", SIAM J. Matrix Anal. Appl. 45(1), 2024. arXiv:2301.07825

    Examples
    --------
    >>> import torch
    >>> from torch import nn
    >>> from curvop import GGNLinearOperator, preconditioner, solve
    >>> _ = torch.manual_seed(0)
    >>> X, y = torch.randn(40, 4).double(), torch.randn(40, 1).double()
    >>> X[:, 0] *= 1000  # a feature of another scale
    >>> model = nn.Linear(4, 1).double()
    >>> G = GGNLinearOperator(model, nn.MSELoss(), model.parameters(), [(X, y)])
    >>> M = preconditioner.jacobi(G, damping=1e-3)
    >>> gradient, loss = G.gradient_and_loss()
    >>> solve(G, gradient, damping=1e-3, preconditioner=M, progress=False).converged
    True
    """
    _num_rows(A)
    _check_damping(damping)
    values = _exact_diagonal(A)
    if values is None:
        values = diagonal(A, num_products, rng).value
    if not np.isfinite(values).all():
        raise ValueError("the diagonal of A is not finite")
    scales: NDArray[Any] = 1 / (np.maximum(values.astype(np.float64), 0) + damping)
    return aslinearoperator(diags_array(scales))


class NystromPreconditioner(LinearOperator):  # type: ignore[misc]
    r"""The inverse of a low-rank approximation of ``A + damping * I``, created by `nystrom`.

    Pass this operator to `curvop.solve` as ``preconditioner``, or to SciPy's ``cg`` and ``minres`` as ``M``.

    Parameters
    ----------
    vectors : ndarray, shape (N, r)
        The matrix U, whose orthonormal columns are approximate eigenvectors of A.
    values : ndarray, shape (r,)
        The approximate eigenvalues of A, in descending order. These values are nonnegative and form the diagonal of
        :math:`\Lambda`.
    damping : float
        The damping :math:`\mu`.

    See Also
    --------
    nystrom : Construct this preconditioner.

    Notes
    -----
    The preconditioner is

    .. math:: M = (\lambda_r + \mu) \, U (\Lambda + \mu I)^{-1} U^\top + (I - U U^\top)

    ([1]_, eq. (5.3)). A product takes 4 N r operations.

    References
    ----------
    .. [1] Z. Frangella, J. A. Tropp, M. Udell, "Randomized Nystrom preconditioning", SIAM J. Matrix Anal. Appl. 44(2),
       2023. doi:10.1137/21M1466244, arXiv:2110.02820
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


def _num_rows(A: LinearOperator) -> int:
    rows, cols = real_operator(A).shape
    if rows != cols:
        raise ValueError(f"A has shape {A.shape}, but must be square")
    return int(rows)


def _check_damping(damping: float) -> None:
    if not (np.isfinite(real_scalar("damping", damping)) and damping > 0):
        raise ValueError(f"damping is {damping}, but must be positive and finite")


def _exact_diagonal(A: LinearOperator) -> NDArray[Any] | None:
    """Return the exact diagonal if the operator can compute it, and None otherwise."""
    method = getattr(A, "diagonal", None)
    try:
        return None if method is None else np.asarray(method())
    except NotImplementedError:
        return None
