r"""Apply functions of a symmetric matrix to vectors by the Lanczos process, with an estimate of the error.

After m steps from the starting vector b, the Lanczos process gives an orthonormal basis :math:`Q_m` and a tridiagonal
matrix :math:`T_m`. The approximation of f(A) b is :math:`\|b\| \, Q_m f(T_m) e_1`. `_Approximation` computes the
coefficients :math:`f(T_m) e_1`, and an estimate of the error, from :math:`T_m` alone.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.linalg import eigh_tridiagonal
from scipy.sparse.linalg import LinearOperator
from torch import Tensor

from curvop.operators.base import unsupported_layout
from curvop.operators.error_text import warn_user
from curvop.operators.keywords import named_keywords
from curvop.operators.progress import step_bar
from curvop.operators.summaries import Summary, abridged
from curvop.operators.validation import integer, real_scalar
from curvop.spectrum.counting import deadline_after, symmetric_operator
from curvop.spectrum.lanczos import (
    Lanczos,
    device_of,
    product_dtype,
    product_precision,
    rounding_left,
    runs_at_once,
)
from curvop.spectrum.norms import column_norms, norm, row_norms
from curvop.spectrum.symmetry import check_symmetry

__all__ = ["ApplyResult", "apply"]

Array = NDArray[Any]

_EPS = float(np.finfo(np.float64).eps)
_SQRT_EPS = _EPS**0.5  # relative step of finite differences of f
_ROUNDING = 10.0  # rounding errors of the products, in units of machine precision times the norm of A
_MIN_STEPS = 5  # before the first check, because the Ritz values of the first steps may be far from eigenvalues
_LOSS = 300  # largest allowed loss of orthogonality of the basis, in units of its machine epsilon
_STEPS_PER_CHECK = 10  # the error is estimated each time the number of steps has grown by a tenth
_SAMPLES = 256  # minimum number of points between the Ritz values at which the error is estimated
_SECTION = 1024  # number of these points that are processed at a time

#: The named functions, and the property that each function requires of the matrix.
_NAMED: dict[str, tuple[Callable[[Array], Any], str]] = {
    "exp": (np.exp, ""),
    "inv": (lambda x: 1 / x, ""),
    "inv_sqrt": (lambda x: 1 / np.sqrt(x), "positive definite"),
    "log": (np.log, "positive definite"),
    "sqrt": (np.sqrt, "positive semidefinite"),
}


@named_keywords
def apply(
    A: Any,
    f: str | Callable[[Array], Any],
    b: Any,
    *,
    num_steps: int = 100,
    rtol: float = 1e-5,
    memory: int | None = None,
    seconds: float | None = None,
    progress: bool = True,
) -> ApplyResult:
    r"""Compute f(A) b, the product of a function of a symmetric matrix with vectors, by the Lanczos process.

    Examples are a sample :math:`A^{-1/2} z` from a normal distribution with covariance matrix :math:`A^{-1}`, and the
    solution :math:`\exp(-t A) \, b` of a linear differential equation. To solve a single linear system, use
    `curvop.solve` instead, which checks the true residual and needs no memory for a basis. For the trace of f(A), use
    `density` and its method ``apply``.

    Parameters
    ----------
    A : LinearOperator or matrix, shape (N, N)
        The real symmetric operator. If an operator is not known to be symmetric (see ``A.is_symmetric``), three more
        products are taken to check this.
    f : callable or {'exp', 'inv', 'inv_sqrt', 'log', 'sqrt'}
        The function. A callable receives a one-dimensional array of eigenvalues, and must return an array of real
        numbers with the same shape, as ``numpy.exp`` does. The function must be defined between the smallest and the
        largest eigenvalue of `A`, and smooth on the scale of the distances between neighboring Ritz values (see Notes).
        The names stand for the exponential, ``1 / x``, ``1 / sqrt(x)``, the natural logarithm and the square root. The
        functions 'inv_sqrt' and 'log' require a positive definite matrix, and 'sqrt' requires a positive semidefinite
        matrix.
    b : array_like or Tensor, shape (N,), (N, 1) or (N, K)
        The vector, or K vectors as columns. Each column has its own Krylov space. The columns advance together with
        block products.
    num_steps : int, optional
        The maximum number of Lanczos steps for each column. At most N steps are taken. A step takes one product for
        each column.
    rtol : float, optional
        The relative error at which the Lanczos process stops. It must be between 0 and 1.
    memory : int, optional
        The number of bytes for the Lanczos bases, half of the free memory by default. Each column needs about ``8 * N *
        num_steps`` bytes (``4 * N * num_steps`` if the dtype of `A` is float32). If the bases of all columns do not
        fit, the columns are processed in groups.
    seconds : float, optional
        The time limit in seconds. There is no limit by default. If time runs out, the current approximations are
        returned. At least one step is taken for each column.
    progress : bool, optional
        Whether to show a progress bar that counts the products.

    Returns
    -------
    ApplyResult
        The vectors f(A) b and their estimated errors.

    Raises
    ------
    TypeError, ValueError
        If an argument is invalid, `A` is not symmetric, or a product is not finite.
    ValueError
        If the result overflows the dtype of `b`.
    ValueError
        If f is not finite at a Ritz value of `A`, for example because the matrix is not positive definite.
    MemoryError
        If the basis of one column does not fit into `memory`.

    Warns
    -----
    RuntimeWarning
        If the estimated error of a column is greater than `rtol`.

    See Also
    --------
    curvop.solve : Solve a damped linear system.
    SpectralDensity.apply : Estimate the trace of a function of a matrix.

    Notes
    -----
    After m steps, the approximation of f(A) b is :math:`y_m = \|b\| \, Q_m f(T_m) e_1` with the Lanczos basis
    :math:`Q_m` and the tridiagonal matrix :math:`T_m` (Saad, 1992, for the exponential). The basis is kept orthogonal
    and stays on the device of the operator. The cost is one product for each step and column, and :math:`O(N m)`
    operations for the result.

    Let :math:`\theta_i` be the eigenvalues of :math:`T_m` (the Ritz values), and let :math:`s_{ji}` be component j of
    the eigenvector for :math:`\theta_i`. The approximation is the polynomial in `A` that interpolates f at the Ritz
    values. The remainder of this interpolation gives an exact formula for the error:

    .. math::

        f(A) \, b - y_m = \|b\| \, g(A) \, q_{m+1}, \qquad
        g(\lambda) = \beta_m \sum_{i=1}^m s_{mi} s_{1i} \frac{f(\theta_i) - f(\lambda)}{\theta_i - \lambda}.

    The relative error is therefore at most the largest value of :math:`\|b\| \, |g(\lambda)| / \|f(A) b\|` over all
    eigenvalues :math:`\lambda` of `A`. The eigenvalues are not known, but there is an eigenvalue within :math:`\beta_m
    |s_{mi}|` of each Ritz value. The first term of the estimate is the largest :math:`|g|` at the ends of these
    intervals and at 256 or more points between the Ritz values. A second term estimates the effect of rounding errors
    in the products. This term is the product of the rounding errors and the difference quotients of f. It is large if
    f(A) is ill-conditioned, for example for the inverse of an almost singular matrix. Difference quotients are not
    meaningful at zero for functions such as the square root, whose derivative is infinite there. For a Ritz value that
    is zero up to rounding errors, they are therefore replaced by the change of f from zero to ten times this Ritz
    value. A third term is the error of rounding the result to the dtype of `b`.

    For exponentials, logarithms, inverses and square roots of matrices with various spectra, the estimate is typically
    2 to 20 times the error. For the square root of a singular matrix, it may be 1,000 times the error. The estimate is
    too small if `A` has an eigenvalue far from all Ritz values. This can happen in the first steps, or if b is almost
    orthogonal to an eigenvector. A component of b that is smaller than the rounding errors of the products is ignored.
    The estimate is also too small if f has a peak or a step that is narrower than the distances between the points at
    which :math:`g` is evaluated. If f is zero at all Ritz values, the relative error is not known. The estimate is then
    infinite, except if the Krylov space is invariant.

    References
    ----------
    Saad (1992), "Analysis of some Krylov subspace approximations to the matrix exponential operator", SIAM J. Numer.
    Anal. 29(1). Higham (2008), "Functions of Matrices: Theory and Computation", SIAM, chapter 13. Eiermann, Ernst
    (2006), "A restarted Krylov subspace method for the evaluation of matrix functions", SIAM J. Numer. Anal. 44(6), for
    the formula of the error. Chen, Greenbaum, Musco, Musco (2022), "Error bounds for Lanczos-based matrix function
    approximation", SIAM J. Matrix Anal. Appl. 43(2); arXiv:2106.09806.

    Examples
    --------
    Draw four samples from the normal distribution whose precision matrix is a damped Gauss-Newton matrix (a Laplace
    approximation of a posterior distribution):

    >>> import torch
    >>> from torch import nn
    >>> from curvop import GGNLinearOperator, spectrum
    >>> _ = torch.manual_seed(0)
    >>> X, y = torch.randn(40, 4).double(), torch.randn(40, 1).double()
    >>> model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1)).double()
    >>> G = GGNLinearOperator(model, nn.MSELoss(), model.parameters(), [(X, y)])
    >>> z = torch.randn(G.shape[0], 4, dtype=torch.float64)
    >>> result = spectrum.apply(G.damped(0.1), "inv_sqrt", z, progress=False)
    >>> result.converged, bool(result.error.max() <= 1e-5)
    (True, True)
    >>> samples = [G.unravel(column) for column in result.value.T]
    """
    until = deadline_after(seconds)
    A = symmetric_operator(A)
    function = _Function(f)
    num_steps = min(integer("num_steps", num_steps, 1), A.shape[0])
    rtol = real_scalar("rtol", rtol)
    if not 0 < rtol < 1:
        raise ValueError(f"rtol is {rtol}, but must be between 0 and 1 (exclusive)")
    rows = _rows_of(A, b)
    count, dtype = len(rows), _dtype_of_result(b)
    errors, lengths = np.zeros(count), np.zeros(count, dtype=np.int64)
    products, stagnates, timed_out = 0, np.zeros(count, dtype=bool), False
    if count:
        products = check_symmetry(A)
        at_once = runs_at_once(A, count, num_steps, memory, "column of b")
        target = max(rtol - torch.finfo(dtype).eps, rtol / 2)  # leaves room for the rounding of the result
        with step_bar("apply", progress, count * num_steps) as bar:
            for first in range(0, count, at_once):
                group = slice(first, first + at_once)
                run = _Run(A, function, rows[group], num_steps, target)
                while run.running:
                    bar.update(run.step())
                    if time.monotonic() >= until and run.running:
                        timed_out = True
                        break
                rows[group], errors[group], lengths[group] = run.values(), run.errors, run.lengths
                stagnates[group] = run.stagnates
    rows, rounding = _rounded(rows, dtype)
    precise, errors = errors <= rtol, errors + rounding
    value, products = _like(b, rows), products + int(lengths.sum())
    error, steps = (float(errors[0]), int(lengths[0])) if np.ndim(b) == 1 else (errors, lengths)
    result = ApplyResult(value, error, steps, products, bool((errors <= rtol).all()))
    if not result.converged:
        wrong = errors > rtol
        out_of_steps = wrong & ~precise & ~stagnates & (lengths == num_steps) & (num_steps < A.shape[0])
        if timed_out:
            remedy = "increase seconds"
        elif out_of_steps.any():
            remedy = "increase num_steps"
        elif (wrong & ~precise).any():
            remedy = "increase rtol, because rounding errors in the products may cause an error of this size"
            if product_precision(A) > _EPS:
                remedy += ", or use a float64 model"
        else:
            remedy = "pass b in float64, because the result is rounded to the dtype of b, or increase rtol"
        warn_user(f"{result}, but rtol is {rtol:g}: {remedy}")
    return result


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class ApplyResult(Summary):
    """The product of a function of a matrix with one or more vectors, as returned by `apply`.

    ``print(result)`` shows a summary in one line.

    Attributes
    ----------
    value : ndarray or Tensor, shape (N,), (N, 1) or (N, K)
        f(A) b, with the type, shape and device of b. The dtype is that of b. If b contains integers, the dtype is
        float64.
    error : float or ndarray, shape (K,)
        The estimated error relative to the norm of f(A) b, for each column. It is a float if b has shape (N,).
    num_steps : int or ndarray, shape (K,)
        The number of Lanczos steps for each column. It is an int if b has shape (N,).
    num_products : int
        The number of products with `A`, including those that check its symmetry.
    converged : bool
        Whether the estimated errors of all columns are at most the requested `rtol`.

    See Also
    --------
    apply : Apply a function of a matrix to vectors.
    """

    value: Any
    error: Any
    num_steps: Any
    num_products: int
    converged: bool

    def __str__(self) -> str:
        verdict = "converged" if self.converged else "not converged"
        if np.ndim(self.error):
            error, steps = np.max(self.error, initial=0.0), np.max(self.num_steps, initial=0)
            text = f"estimated relative errors of {self.error.size} columns <= {error:.2e} after <= {steps} steps"
        else:
            text = f"estimated relative error {self.error:.2e} after {self.num_steps} steps"
        return f"{verdict}: {text}, {self.num_products:,} products"

    def _summary_table(self) -> list[Sequence[str]]:
        columns = zip(*map(np.atleast_1d, (self.error, self.num_steps)), strict=True)
        rows = [(str(index), f"{error:.2e}", f"{steps:,}") for index, (error, steps) in enumerate(columns)]
        return abridged([("column", "estimated relative error", "Lanczos steps"), *rows])


class _Function:
    """A function of eigenvalues that is checked for domain errors.

    Parameters
    ----------
    f : callable or str
        The argument `f` of `apply`.
    """

    def __init__(self, f: Any) -> None:
        if not callable(f) and not (isinstance(f, str) and f in _NAMED):
            names = ", ".join(map(repr, _NAMED))
            raise (ValueError if isinstance(f, str) else TypeError)(
                f"f is {f!r}, but must be a function of an array of eigenvalues, or one of the names {names}"
            )
        named: tuple[Callable[[Array], Any], str] = (f, "") if callable(f) else _NAMED[f]
        self._f, self._required = named
        self._name = "f" if callable(f) else repr(f)

    def __call__(self, x: Array) -> Array:
        """Return the values of f at the points `x`. The values may be infinite or NaN."""
        try:
            with np.errstate(all="ignore"):
                values = np.asarray(self._f(x.copy()))  # f may work in place
        except TypeError as error:  # functions of Python's math module, or of torch
            raise TypeError(
                f"f cannot be applied to an array of eigenvalues ({error}): use NumPy functions, such as numpy.exp"
            ) from error
        if values.shape != x.shape:
            raise ValueError(
                f"f returned an array of shape {values.shape} for {x.size} eigenvalues, but must return one value for "
                "each: use functions that work elementwise, such as numpy.exp"
            )
        if values.dtype.kind not in "biuf":
            raise TypeError(f"f returned values of dtype {values.dtype}, but must return real numbers")
        return values.astype(np.float64)

    def at_ritz_values(self, ritz: Array, eps: float) -> Array:
        """Return the values of f at the Ritz values. Raise an error if a value is not finite.

        If f is not finite at a Ritz value that may be a rounding error of products with precision `eps`, f is evaluated
        at zero instead. Such Ritz values occur if the matrix is singular.
        """
        rounding = eps * float(np.abs(ritz).max())
        if self._required == "positive definite" and ritz[0] <= rounding:
            raise ValueError(self._domain_error(ritz[0], rounding, eps))
        values = self(ritz)
        tiny = np.abs(ritz) <= _ROUNDING * rounding
        if not np.isfinite(values[tiny]).all():
            values = self(np.where(tiny, 0.0, ritz))
        wrong = np.flatnonzero(~np.isfinite(values))
        if wrong.size:
            raise ValueError(self._domain_error(ritz[wrong[0]], rounding, eps, values[wrong[0]]))
        return values

    def _domain_error(self, ritz: float, rounding: float, eps: float, value: float = math.nan) -> str:
        if self._required and abs(ritz) <= _ROUNDING * rounding:
            other = ", or use a float64 model" if eps > _EPS else ""
            return (
                f"A has an eigenvalue <= {ritz:.3g}, which is not distinguishable from 0 at the precision of the "
                f"products, but {self._name} needs a {self._required} matrix: pass A.damped(lam) with lam > "
                f"{_ROUNDING * rounding:.1g}{other}"
            )
        if self._required:
            return (
                f"A has an eigenvalue <= {ritz:.3g}, but {self._name} needs a {self._required} matrix: pass "
                "A.damped(lam) with a lam that makes all eigenvalues positive"
            )
        text = f"{self._name} is {value} at {ritz:.6g}, which lies between the smallest and the largest eigenvalue of A"
        if abs(value) == math.inf and abs(ritz) > 1:
            return f"{text}: scale or shift A, so that the values of the function do not overflow"
        return f"{text}: pass A.damped(lam), or a function that is finite there"


class _Run:
    """Lanczos runs from several vectors. A run stops if the estimated error of its approximation is small enough.

    Parameters
    ----------
    A : LinearOperator, shape (N, N)
        The symmetric operator.
    function : _Function
        The function.
    rows : Tensor, shape (K, N)
        The starting vectors, in float64.
    num_steps : int
        The maximum number of steps, at most N.
    rtol : float
        The relative error at which a run stops.

    Attributes
    ----------
    errors : ndarray, shape (K,)
        The estimated relative errors at the latest check.
    stagnates : ndarray of bool, shape (K,)
        Whether further steps are useless, because the estimated effect of rounding exceeds all other errors.
    """

    def __init__(self, A: LinearOperator, function: _Function, rows: Tensor, num_steps: int, rtol: float) -> None:
        self._function, self._num_steps, self._rtol, self._size = function, num_steps, rtol, A.shape[0]
        self._eps, self._basis = product_precision(A), product_dtype(A)
        self._norms = row_norms(rows)
        zero = self._norms == 0
        scaled = rows / torch.from_numpy(np.where(zero, 1.0, self._norms)).to(rows.device)[:, None]
        scaled[torch.from_numpy(zero)] = 1.0  # the Lanczos process needs nonzero vectors, even for runs without steps
        # The vectors themselves are summed here, so their errors count, and not only those of the tridiagonal matrix.
        limit = _LOSS * float(torch.finfo(self._basis).eps)
        self._lanczos = Lanczos(A, scaled, num_steps, limit=limit)
        self._lanczos.stop(zero)
        self._next_check = _MIN_STEPS
        self._coefficients = [np.zeros(0)] * len(rows)
        self.errors, self.stagnates = np.where(zero, 0.0, np.inf), np.zeros(len(rows), dtype=bool)

    @property
    def running(self) -> bool:
        """True if at least one run has to take another step."""
        return self._lanczos.running

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Number of steps of each run, as an array of shape ``(K,)``."""
        return self._lanczos.lengths

    def step(self) -> int:
        """Advance all active runs by one step, and return the number of products."""
        runs = self._lanczos.step()
        length, active = int(self.lengths[runs[0]]), self._lanczos.active
        due = length >= self._next_check
        for run in map(int, runs if due else runs[~active[runs]]):
            approximation = self._approximate(run)
            if approximation.stagnates or approximation.error <= self._rtol:
                self._lanczos.stop(run)
        if due:
            self._next_check = length + max(1, length // _STEPS_PER_CHECK)
        return len(runs)

    def _approximate(self, run: int) -> _Approximation:
        """Compute and store the approximation of a run and its estimated error."""
        lanczos, length = self._lanczos, int(self.lengths[run])
        alphas, betas = lanczos.alphas[run, :length], lanczos.betas[run, : length - 1]
        beta = 0.0 if length == self._size else lanczos.betas[run, length - 1]
        negligible = rounding_left(self._basis, self._size)
        basis_eps = float(torch.finfo(self._basis).eps)
        approximation = _Approximation(self._function, alphas, betas, beta, negligible, self._eps, basis_eps)
        self._coefficients[run], self.errors[run] = approximation.coefficients, approximation.error
        self.stagnates[run] = approximation.stagnates
        return approximation

    def values(self) -> Tensor:
        """Return the approximations as the rows of a float64 tensor, and update ``errors``."""
        basis = self._lanczos.basis
        values = torch.zeros(len(basis), self._size, dtype=torch.float64, device=basis.device)
        for run in map(int, np.flatnonzero(self._norms)):
            length = int(self.lengths[run])
            if len(self._coefficients[run]) < length:
                self._approximate(run)
            size = norm(self._coefficients[run]) or 1.0  # may be too large for the dtype of the basis
            coefficients = torch.from_numpy(self._coefficients[run] / size).to(basis.device, basis.dtype)
            values[run] = (coefficients @ basis[run, :length]).double() * size * self._norms[run]
        return values


class _Approximation:
    r"""The coefficients of f(A) b in the Lanczos basis, and their estimated error (see the notes of `apply`).

    Parameters
    ----------
    function : _Function
        The function.
    alphas, betas : ndarray, shapes (m,) and (m - 1,)
        Diagonal and off-diagonal of the tridiagonal matrix T.
    beta : float
        Norm of the residual of the last step. It is 0 after N steps.
    negligible : float
        The Krylov space is regarded as invariant if `beta` is at most this number times the norm of T.
    eps, basis_eps : float
        Machine epsilon of the products (`eps`) and of the Lanczos basis (`basis_eps`).

    Attributes
    ----------
    coefficients : ndarray, shape (m,)
        f(T) applied to the first unit vector.
    error : float
        Estimated error, relative to the norm of the coefficients.
    stagnates : bool
        True if further steps are useless, because the estimated effect of rounding exceeds all other errors.
    """

    def __init__(
        self,
        function: _Function,
        alphas: Array,
        betas: Array,
        beta: float,
        negligible: float,
        eps: float,
        basis_eps: float,
    ) -> None:
        ritz, vectors = eigh_tridiagonal(alphas, betas)
        first, last = vectors[0], vectors[-1]
        scale = float(np.abs(ritz).max())
        values = function.at_ritz_values(ritz, eps)
        self.coefficients = vectors @ (values * first)
        steps = np.maximum(_SQRT_EPS * np.abs(ritz), max(eps * scale, float(np.finfo(np.float64).tiny)))
        truncation = 0.0
        if beta > 0:
            ends = _ends(function, ritz, np.maximum(beta * np.abs(last), steps))
            remainders = [
                (last * first) @ _quotients(function, ritz, values, section, limit)
                for points, limit in ((ends, math.inf), (_between(ritz), float(np.abs(values).max())))
                for section in np.array_split(points, len(points) // _SECTION + 1)
                if section.size
            ]
            truncation = beta * float(np.abs(np.concatenate(remainders)).max())
        rounding = _effect_of_rounding(function, ritz, values, first, steps, eps * scale) if scale else 0.0
        size, error = norm(self.coefficients), truncation + rounding
        if size:
            self.error = error / size + basis_eps
        else:  # if the result is zero, its relative error is known only if no further step can change it
            self.error = 0.0 if error == 0 and beta <= negligible * scale else math.inf
        self.stagnates = bool(truncation <= rounding + basis_eps * size) and (size > 0 or self.error == 0)


def _effect_of_rounding(
    function: _Function, ritz: Array, values: Array, first: Array, steps: Array, error: float
) -> float:
    r"""Estimate how much rounding errors of size `error` in T change the product of f(T) with the first unit vector.

    To first order, a perturbation E of T changes f(T) by V (F * (V' E V)) V', where V contains the eigenvectors of T,
    and F contains the difference quotients of f (Daleckii, Krein, 1965). The entries of E are assumed to be |E| /
    sqrt(m).

    The derivative of f may be infinite at zero. If the matrix is singular, some Ritz values are only rounding errors.
    For these Ritz values, the change of f from zero to the rounding error replaces the difference quotient.
    """
    quotients = _quotients(function, ritz, values, ritz + steps)
    zeros, jumps = np.flatnonzero(np.abs(ritz) <= _ROUNDING * error), np.zeros(0)
    center = function(np.zeros(1))[0] if zeros.size else math.nan  # f need not be defined at 0
    if math.isfinite(center):
        radii = _ROUNDING * np.minimum(np.abs(ritz[zeros]), error)
        changes = np.abs(np.array([function(radii), function(-radii)]) - center)
        jumps = np.where(np.isfinite(changes), changes, 0.0).max(0)
        quotients[np.ix_(zeros, zeros)] = 0.0
    slopes = column_norms(quotients.T) / math.sqrt(len(ritz))
    return _ROUNDING * error * norm(first * slopes) + norm(first[zeros[: len(jumps)]] * jumps)


def _ends(function: _Function, ritz: Array, radii: Array) -> Array:
    """Return the ends of the intervals around the Ritz values that contain eigenvalues.

    If f is not finite at the lowest or the highest of these points, the point is moved towards the Ritz values.
    """
    low, high = ritz[0] - radii[0], ritz[-1] + radii[-1]
    for _ in range(60):
        finite = np.isfinite(function(np.array([low, high])))
        if finite.all():
            break
        low, high = (low if finite[0] else (low + ritz[0]) / 2), (high if finite[1] else (high + ritz[-1]) / 2)
    points: Array = np.clip(np.concatenate([ritz - radii, ritz + radii, [low, high]]), low, high)
    return points


def _between(ritz: Array) -> Array:
    """Return points between the Ritz values, at which f may have a step or a peak."""
    per_gap = -(-_SAMPLES // len(ritz))
    fractions = (np.arange(per_gap) + 0.5) / per_gap
    points: Array = (ritz[:-1] + fractions[:, None] * np.diff(ritz)).ravel()
    return points


def _quotients(function: _Function, ritz: Array, values: Array, points: Array, limit: float = math.inf) -> Array:
    """Return the difference quotients of f between the Ritz values and the points, as an array ``(m, p)``.

    Points at which f is not finite have quotients of zero. Values of f at the points that are greater than `limit` in
    magnitude are replaced by the limit. Otherwise, a pole of f in a gap of the spectrum would dominate the estimate.
    """
    at_points = function(points).clip(-limit, limit)
    points, at_points = points[None], at_points[None]
    with np.errstate(all="ignore"):
        quotients = (values[:, None] - at_points) / (ritz[:, None] - points)
    finite: Array = np.where(np.isfinite(quotients), quotients, 0.0)
    return finite


def _rows_of(A: LinearOperator, b: Any) -> Tensor:
    """Validate `b`, and return its columns as the rows of a new float64 tensor on the device of `A`."""
    if isinstance(b, Tensor):
        if (layout := unsupported_layout(b)) is not None:
            raise TypeError(f"b is a tensor that is {layout}: pass a dense one with values, such as b.to_dense()")
        dtype: Any = b.dtype
        complex_b, vectors = b.is_complex(), b.detach()
    else:
        array = np.asarray(b)
        if array.dtype.kind not in "biufc":
            raise TypeError(f"b has dtype {array.dtype}, but must hold real numbers")
        dtype, complex_b = array.dtype, array.dtype.kind == "c"
        vectors = torch.from_numpy(np.array(array.real, dtype=np.float64))
    if complex_b:
        raise TypeError(f"b has dtype {dtype}, but must be real: apply f(A) to its real and imaginary parts")
    if vectors.ndim not in (1, 2) or vectors.shape[0] != A.shape[0]:
        shape, size = tuple(vectors.shape), A.shape[0]
        raise ValueError(f"b has shape {shape}, but A has shape {A.shape}: pass ({size},) or ({size}, K)")
    columns = vectors if vectors.ndim == 2 else vectors[:, None]
    rows = columns.T.to(device_of(A), torch.float64, copy=True).contiguous()
    if not bool(rows.isfinite().all()):
        raise ValueError("b is not finite: pass finite numbers")
    return rows


def _dtype_of_result(b: Any) -> torch.dtype:
    """Return the dtype of `b`, or float64 if `b` contains integers or a dtype that torch does not have."""
    if isinstance(b, Tensor):
        return b.dtype if b.is_floating_point() else torch.float64
    return {2: torch.float16, 4: torch.float32}.get(_array_dtype(b).itemsize, torch.float64)


def _rounded(rows: Tensor, dtype: torch.dtype) -> tuple[Tensor, Array]:
    """Return the rows rounded to a dtype, and the norms of the rounding errors relative to those of the rows.

    Raises
    ------
    ValueError
        If an entry overflows.
    """
    rounded = rows.to(dtype)
    if not bool(rounded.isfinite().all()):
        remedy = "scale b" if dtype == torch.float64 else "pass b in float64"
        raise ValueError(f"f(A) b overflows {str(dtype).removeprefix('torch.')}, the dtype of b: {remedy}")
    norms = row_norms(rows)
    return rounded, row_norms(rounded.double() - rows) / np.where(norms > 0, norms, 1.0)


def _like(b: Any, rows: Tensor) -> Any:
    """Convert the rows to the type and shape of `b`."""
    columns = rows[0] if np.ndim(b) == 1 else rows.T
    return columns.to(b.device) if isinstance(b, Tensor) else columns.cpu().numpy().astype(_array_dtype(b))


def _array_dtype(b: Any) -> np.dtype[Any]:
    """Return the dtype of an array of real numbers, or float64 for integers."""
    dtype = np.asarray(b).dtype
    return dtype if dtype.kind == "f" else np.dtype(np.float64)
