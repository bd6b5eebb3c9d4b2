"""Nystrom, Jacobi and Kronecker-factored preconditioners, for `curvop.solve` and SciPy's ``cg`` and ``minres``."""

from __future__ import annotations

from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.sparse.linalg import LinearOperator
from torch import Tensor

from curvop.operators.base import Rows, TensorLinearOperator
from curvop.operators.diagonal_operator import DiagonalLinearOperator
from curvop.operators.error_text import warn_user
from curvop.operators.kfac import EKFACLinearOperator, KFACLinearOperator
from curvop.operators.kronecker import KroneckerFactoredLinearOperator
from curvop.operators.validation import available_bytes, integer, random_generator, real_operator, real_scalar
from curvop.solvers.damped_system import operator_multiplier
from curvop.spectrum.estimators import estimate_diagonal
from curvop.spectrum.lanczos import device_of

__all__ = ["NystromPreconditioner", "jacobi", "kfac", "nystrom"]

_BUFFERS = 5  # number of tensors of the size of the sketch during the construction
_FIRST_RANK = 16  # first rank if the rank is chosen automatically
_POWER_STEPS = 10  # maximum number of steps of the power method that estimates an error


def nystrom(
    A: LinearOperator, rank: int | str, damping: float, rng: int | np.random.Generator | None = None
) -> NystromPreconditioner:
    """Construct a low-rank preconditioner for ``A + damping * I`` from block products with `A`.

    Use this preconditioner if only a few eigenvalues are much larger than the damping. This is common for the
    Gauss-Newton and Fisher matrices of neural networks. If the rank is twice the number of eigenvalues that exceed the
    damping, the number of steps of conjugate gradients does not depend on the condition number of `A`. If the
    eigenvalues differ mainly because the parameters have different scales, `jacobi` may be sufficient.

    Parameters
    ----------
    A : LinearOperator, shape (N, N)
        The symmetric positive semi-definite operator, without damping.
    rank : int or 'auto'
        The number of columns of the sketch, from 1 to N. The preconditioner stores ``N * rank`` float64 numbers on the
        device of `A`. The construction needs five times this memory. With 'auto', the rank is doubled until the
        estimated error of the low-rank approximation is at most the damping. The condition number of the preconditioned
        matrix is then at most about 3.
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

    Warns
    -----
    RuntimeWarning
        If `rank` is 'auto', and half of the free memory is not enough for the required rank.

    See Also
    --------
    jacobi : A diagonal preconditioner.
    curvop.solve : Solve a damped system.

    Notes
    -----
    The preconditioner is based on the randomized Nystrom approximation [1]_. For a given rank, its construction takes
    one product of `A` with a random N x rank matrix, and ``O(N * rank**2)`` other operations. With ``rank='auto'``, the
    sketch starts with 16 columns. When the rank is doubled, all earlier products are reused, as proposed in [1]_. Let E
    be the difference of `A` and its low-rank approximation. As soon as the smallest approximate eigenvalue is at most
    the damping, the norm of E is estimated by at most 10 steps of the power method. Each step takes one product. The
    condition number of the preconditioned matrix is at most ``(values[-1] + damping + ||E||) / damping`` [1]_.

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

    The rank can be chosen automatically:

    >>> M = preconditioner.nystrom(A, rank="auto", damping=0.1, rng=0)
    >>> len(M.values), M.error <= 0.1
    (256, True)
    """
    size = _num_rows(A)
    automatic = isinstance(rank, str) and rank == "auto"
    if not automatic and (not isinstance(rank, int | np.integer) or not 1 <= rank <= size):
        raise ValueError(
            f"rank is {rank!r}, but must be 'auto' or an integer between 1 and {size}, the number of rows of A"
        )
    _check_damping(damping)
    sketch = _Sketch(real_operator(A), damping, random_generator(rng))
    if not automatic:
        sketch.grow(int(rank))
        return sketch.preconditioner()
    most = size
    if _BUFFERS * 8 * size * min(size, 1024) > 2**26:  # query the free memory only for large sketches
        most = min(size, max(1, available_bytes(sketch.device) // (_BUFFERS * 8 * size)))
    rank = min(_FIRST_RANK, most)
    while True:
        sketch.grow(rank)
        M = sketch.preconditioner()
        if rank == size or (M.values[-1] <= damping and sketch.error(M) <= damping):
            break
        if rank == most:
            sketch.error(M)
            warn_user(
                f"rank='auto' stopped at {rank}, because more columns do not fit into memory: the estimated error "
                f"{M.error:.3g} of the approximation is larger than the damping {damping:.3g}"
            )
            break
        rank = min(2 * rank, most)
    return M


class _Sketch:
    """A Nystrom approximation whose rank can be increased. All N-vectors are stored as rows on the device of A."""

    def __init__(self, A: LinearOperator, damping: float, rng: np.random.Generator) -> None:
        self._multiply, self._damping, self._rng = operator_multiplier(A), damping, rng
        self.device = device_of(A)
        self._size = A.shape[0]
        self._tests = torch.zeros(0, self._size, dtype=torch.float64, device=self.device)
        self._products = self._tests
        self._count = 0

    def grow(self, rank: int) -> None:
        """Add random test vectors up to the given rank, and compute their products."""
        drawn = self._rng.standard_normal((self._size, rank - len(self._tests)))
        new = torch.from_numpy(drawn).to(self.device)
        for _ in range(2):  # repeat the orthogonalization to remove rounding errors
            new = torch.linalg.qr(new - self._tests.T @ (self._tests @ new))[0]
        rows = new.T.contiguous()
        self._products = torch.cat([self._products, self._product(rows)])
        self._tests = torch.cat([self._tests, rows])

    def _product(self, rows: Tensor) -> Tensor:
        self._count += len(rows)
        product = self._multiply(rows)
        if not bool(product.isfinite().all()):
            raise ValueError("a product with A is not finite")
        return product

    def preconditioner(self) -> NystromPreconditioner:
        """Return the preconditioner of the current rank (Frangella, Tropp, Udell, 2023)."""
        # All routines of torch release the GIL, so that other threads can run (for example, the heartbeats of
        # distributed ranks).
        tests, products, size = self._tests, self._products, self._size
        inner = tests @ products.T
        inner = (inner + inner.T) / 2
        norm = max(0.0, float(torch.linalg.eigvalsh(products @ products.T)[-1])) ** 0.5
        if norm == 0:
            return self._finished(tests, torch.zeros(len(tests), dtype=torch.float64, device=self.device))
        eigenvalue = float(torch.linalg.eigvalsh(inner)[0])
        # Products of a float32 model have only the accuracy of float32, even for float64 vectors.
        noise = float(np.sqrt(size) * np.finfo(np.float32).eps * norm)
        if eigenvalue < -max(noise, 1e-2 * self._damping):
            raise ValueError(
                f"A is indefinite (its smallest eigenvalue is at most {eigenvalue:.3g}): pass a positive semi-definite "
                "matrix, for example a GGNLinearOperator of the same model"
            )
        shift = float(np.sqrt(size) * np.finfo(np.float64).eps * norm)
        while True:
            factor, info = torch.linalg.cholesky_ex(inner + shift * torch.eye(len(inner)).to(inner))
            if not int(info):
                break
            shift *= 10
        left = torch.linalg.solve_triangular(factor, torch.add(products, tests, alpha=shift), upper=False)
        _, singular, vectors = torch.linalg.svd(left, full_matrices=False)
        return self._finished(vectors, (singular**2 - shift).clamp(min=0))

    def _finished(self, rows: Tensor, values: Tensor) -> NystromPreconditioner:
        M = NystromPreconditioner(rows.T, values, self._damping)
        M.construction_products = self._count
        return M

    def error(self, M: NystromPreconditioner) -> float:
        """Estimate the norm of the error of the approximation by the power method, and store the estimate in M."""
        vector = torch.from_numpy(self._rng.standard_normal((1, self._size))).to(self.device)
        error = 0.0
        for _ in range(_POWER_STEPS):
            vector = vector / torch.linalg.vector_norm(vector)
            rest = self._product(vector) - M.low_rank_product(vector)
            before, error = error, float(torch.linalg.vector_norm(rest))
            if error > self._damping or error <= 1.1 * before:
                break
            vector = rest
        M.error, M.construction_products = error, self._count
        return error


def jacobi(
    A: LinearOperator, damping: float, num_products: int = 64, rng: int | np.random.Generator | None = None
) -> DiagonalLinearOperator:
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
    DiagonalLinearOperator, shape (N, N)
        The inverse of the diagonal of ``A + damping * I``, on the device of `A`.

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
    diagonal = _exact_diagonal(A)
    if diagonal is None:
        integer("num_products", num_products, 2)
        diagonal = estimate_diagonal(real_operator(A), num_products, rng).value
    if not bool(diagonal.isfinite().all()):
        raise ValueError("the diagonal of A is not finite")
    return DiagonalLinearOperator(1 / (diagonal.clamp(min=0) + damping))


def kfac(A: LinearOperator, damping: float, ekfac: bool = True) -> KroneckerFactoredLinearOperator:
    """Construct the inverse of a Kronecker-factored approximation of ``A + damping * I``.

    Measure before you use this preconditioner, because it may increase the number of products (see Notes). `nystrom` is
    often better.

    Parameters
    ----------
    A : LinearOperator, shape (N, N)
        A Gauss-Newton, Fisher or empirical Fisher operator of this package, or a diagonal block of one, without
        damping. The approximation is computed with the same model and data. If A is a Kronecker-factored matrix, it is
        the approximation.
    damping : float
        The positive damping of the system.
    ekfac : bool, optional
        Whether to use `curvop.EKFACLinearOperator`, which takes a second pass over the data, or
        `curvop.KFACLinearOperator`. It has no effect if A is a Kronecker-factored matrix.

    Returns
    -------
    KroneckerFactoredLinearOperator, shape (N, N)
        The inverse of the damped approximation, on the device of `A`.

    Raises
    ------
    TypeError, ValueError
        If an argument is invalid, or if the factors cannot be computed (see `curvop.KFACLinearOperator`). Also if A is
        a `curvop.EKFACLinearOperator` and `ekfac` is False.

    See Also
    --------
    nystrom : A preconditioner for matrices with few large eigenvalues.
    curvop.compare : Error of the approximation.
    curvop.KFACLinearOperator : The approximation.

    Notes
    -----
    The approximation is block-diagonal. If large entries of A lie outside the diagonal blocks, the preconditioned
    matrix has more distinct eigenvalues than A, and conjugate gradients takes more steps than without a preconditioner.
    `curvop.compare` shows the share of these entries. Do not judge by the first steps of the solver: the preconditioner
    may reduce the residual fast at first and slowly later.
    """
    _num_rows(A)
    _check_damping(damping)
    if isinstance(A, EKFACLinearOperator) and not ekfac:
        raise ValueError("A is an EKFACLinearOperator, but ekfac is False: pass a KFACLinearOperator, or A.exact")
    if isinstance(A, KroneckerFactoredLinearOperator):
        return cast("KroneckerFactoredLinearOperator", A.inverse(damping))
    approximation = (EKFACLinearOperator if ekfac else KFACLinearOperator).of(cast("Any", A))
    return cast("KroneckerFactoredLinearOperator", approximation.inverse(damping))


class NystromPreconditioner(TensorLinearOperator):
    r"""The inverse of a low-rank approximation of ``A + damping * I``, created by `nystrom`.

    Pass this operator to `curvop.solve` as ``preconditioner``, or to SciPy's ``cg`` and ``minres`` as ``M``. It is
    symmetric, and can be applied to arrays and tensors of one or many columns.

    Parameters
    ----------
    vectors : ndarray or Tensor, shape (N, r)
        The matrix U, whose orthonormal columns are approximate eigenvectors of A. Products are computed on the device
        of this tensor, in float64.
    values : ndarray or Tensor, shape (r,)
        The approximate eigenvalues of A, in descending order. These values are nonnegative and form the diagonal of
        :math:`\Lambda`.
    damping : float
        The damping :math:`\mu`.

    Attributes
    ----------
    vectors, values : ndarray
        The approximate eigenvectors and eigenvalues, as arrays.
    damping : float
        The damping.
    error : float or None
        Estimated norm of the difference of A and its low-rank approximation. It is None if the error was not estimated,
        for example because the rank was not 'auto'.
    construction_products : int
        The number of products with A that `nystrom` computed.

    See Also
    --------
    nystrom : Construct this preconditioner.

    Notes
    -----
    The preconditioner is

    .. math:: M = (\lambda_r + \mu) \, U (\Lambda + \mu I)^{-1} U^\top + (I - U U^\top)

    as proposed in [1]_. A product takes 4 N r operations.

    References
    ----------
    .. [1] Z. Frangella, J. A. Tropp, M. Udell, "Randomized Nystrom preconditioning", SIAM J. Matrix Anal. Appl. 44(2),
       2023. doi:10.1137/21M1466244, arXiv:2110.02820
    """

    def __init__(self, vectors: Any, values: Any, damping: float) -> None:
        self._rows = _as_float64(vectors).T.contiguous()
        self._values = _as_float64(values).to(self._rows)
        super().__init__(np.float64, (self._rows.shape[1],) * 2)
        self.damping = damping
        self.error: float | None = None
        self.construction_products = 0
        self._scales = (self._values[-1] + damping) / (self._values + damping) - 1

    def _details(self) -> list[str]:
        return [f"rank {len(self._values)}", f"damping {self.damping:.6g}", f"on {self.device}"]

    @property
    def vectors(self) -> NDArray[Any]:
        """The approximate eigenvectors as an array ``(N, r)``."""
        return self._rows.numpy(force=True).T

    @property
    def values(self) -> NDArray[Any]:
        """The approximate eigenvalues as an array ``(r,)``."""
        return self._values.numpy(force=True)

    @property
    def device(self) -> torch.device:
        """Device of the approximate eigenvectors."""
        return self._rows.device

    def low_rank_product(self, rows: Tensor) -> Tensor:
        r"""Apply :math:`U \Lambda U^\top`, the approximation of A, to each row of a float64 tensor ``(K, N)``."""
        return (rows @ self._rows.T * self._values) @ self._rows

    def _apply(self, rows: Rows) -> Rows:
        tensor = torch.as_tensor(rows).to(self.device)
        wide = tensor.to(torch.promote_types(tensor.dtype, torch.float64))
        vectors = self._rows.to(wide.dtype)
        product = wide + (wide @ vectors.T * self._scales) @ vectors
        if isinstance(rows, Tensor):
            return product.to(rows.device, rows.dtype)
        return cast("Rows", product.numpy(force=True))


def _num_rows(A: LinearOperator) -> int:
    rows, cols = real_operator(A).shape
    if rows != cols:
        raise ValueError(f"A has shape {A.shape}, but must be square")
    return int(rows)


def _check_damping(damping: float) -> None:
    if not (np.isfinite(real_scalar("damping", damping)) and damping > 0):
        raise ValueError(f"damping is {damping}, but must be positive and finite")


def _exact_diagonal(A: LinearOperator) -> Tensor | None:
    """Return the exact diagonal if the operator can compute it, and None otherwise."""
    method = getattr(A, "diagonal", None)
    try:
        return None if method is None else _as_float64(method()).to(device_of(A))
    except NotImplementedError:
        return None


def _as_float64(values: Any) -> Tensor:
    """Convert an array or a tensor to float64. Arrays may be read-only or have negative strides."""
    tensor = values if isinstance(values, Tensor) else torch.from_numpy(np.array(values, dtype=np.float64))
    return tensor.to(torch.float64)
