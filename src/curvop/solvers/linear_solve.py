"""Damped linear solves with a true residual and a check for indefiniteness.

`solve` runs block conjugate gradients (`curvop.solvers.block_cg`), for one or for many right-hand sides. The function
differs from ``scipy.sparse.linalg.cg`` as follows:

1. All right-hand sides share one Krylov space, and all recurrences are torch code on the device of the operator.
2. The function checks the curvature along the search directions. If the curvature is not positive, MINRES
   (`curvop.solvers.minres`) continues from the current solutions.
3. The function computes the true residuals of the solutions, because rounding errors accumulate in the residuals that
   the solver updates recursively. If a true residual is too large, the solver is restarted from the current solution,
   as long as restarts reduce the residual.
4. The function computes in float64 and scales each right-hand side to a norm near 1, so that norms do not underflow.
   For MINRES, the matrix is scaled, too, because some tolerances of MINRES are absolute.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.sparse.linalg import LinearOperator
from torch import Tensor
from tqdm import tqdm

from curvop.operators.error_text import warn_user
from curvop.operators.keywords import named_keywords
from curvop.operators.progress import step_bar
from curvop.operators.summaries import Summary, abridged
from curvop.operators.validation import available_bytes, integer, real_operator
from curvop.solvers.block_cg import BlockRun, block_cg
from curvop.solvers.damped_system import DampedSystem, RowFunction, row_multiplier
from curvop.solvers.minres import minres
from curvop.solvers.preconditioner_choice import SolvedOtherwise, solve_blocks
from curvop.solvers.right_sides import RightSides
from curvop.spectrum.counting import deadline_after
from curvop.spectrum.lanczos import device_of
from curvop.spectrum.norms import row_norms

__all__ = ["Solutions", "SolveResult", "check_arguments", "solve", "solve_rows"]

Array = NDArray[Any]

_MAX_RUNS = 5  # maximum number of runs of a solver; each run starts from the previous solutions
_MAX_STEPS = 1000  # default limit for the number of steps
_MAX_BLOCK = 128  # maximum number of columns of a block; the recurrences of wider blocks take longer than the products
_BUFFERS = 12  # number of tensors of the size of a block that the solver stores, including temporary ones
# Negative curvature up to this multiple of the norm of the matrix may be a rounding error of a float32 model.
_ROUNDING = 10 * float(np.finfo(np.float32).eps)

#: Parts of warnings that say what stopped the solver, and what the user can do.
_VERDICTS = {
    "maxiter": "the solver reached maxiter: increase maxiter, or use a preconditioner or a larger damping",
    "seconds": "the solver ran out of time: increase seconds, or use a preconditioner or a larger damping",
    "precision": "the precision of the products with A does not allow a smaller residual: use float64 parameters, or a "
    "larger rtol or damping",
    "stagnation": "rounding errors prevent a smaller residual: use a larger damping or rtol, or a preconditioner of a "
    "smaller condition number",
}


@named_keywords
def solve(
    A: LinearOperator,
    b: Any,
    damping: float,
    *,
    rtol: float = 1e-5,
    preconditioner: Any = None,
    maxiter: int | None = None,
    x0: Any = None,
    seconds: float | None = None,
    callback: Callable[[Any], object] | None = None,
    progress: bool = True,
) -> SolveResult:
    """Solve ``(A + damping * I) x = b`` for a symmetric operator `A`, and check the result.

    Pass many right-hand sides as the columns of one array or tensor, so that they share products with `A`. For the
    Gauss-Newton matrix of a trained network, one solve with ten columns took a third of the products of ten single
    solves, and a sixth of the products of ten calls of SciPy's ``cg``. Use this function instead of
    ``scipy.sparse.linalg.cg`` if you have many right-hand sides, if the matrix may be indefinite (for example, a
    Hessian), or if you need a reliable residual. For least-squares problems with a Jacobian, use
    ``scipy.sparse.linalg.lsmr``.

    Parameters
    ----------
    A : LinearOperator or matrix, shape (N, N)
        The real symmetric operator, without damping.
    b : array_like or Tensor, shape (N,) or (N, K), or dict, list or tuple of Tensor
        The real right-hand sides. If the columns of `A` are parameters, `b` may also contain one tensor for each
        parameter, such as a dict of gradients.
    damping : float
        The number that is added to the diagonal of `A`, in the units of the eigenvalues of `A`.
    rtol : float, optional
        The relative residual at which the solver stops. It must be between 0 and 1. For float32 models, the accuracy of
        the products limits the residual. The smallest attainable residual is about 1e-5 if the damping is a thousandth
        of the largest eigenvalue, and is inversely proportional to the damping.
    preconditioner : LinearOperator, matrix, Tensor or callable, shape (N, N), or 'auto', optional
        A positive definite approximation of the inverse of the damped matrix, for example from
        `curvop.preconditioner.nystrom`. A callable receives columns ``(N, K)`` and returns the products in the same
        shape. The columns are a tensor if `b` consists of tensors, and an array otherwise. With 'auto', the function
        tries preconditioners and uses the best (see Notes). A trial that fails costs four products, or one block with
        another preconditioner if there are many blocks of columns.
    maxiter : int, optional
        The maximum number of steps for each column. A step takes at most one product for each column. A few additional
        products are needed to compute the residuals. If the damped matrix is nearly singular, a step takes up to two
        more products. The default is the smaller of ``10 * N`` and 1000.
    x0 : same type and shape as `b`, optional
        The initial guess. An initial guess costs one product for each column. By default, the solver starts from zero.
    seconds : float, optional
        The time limit in seconds. There is no limit by default. The solver reserves time to compute the true residuals.
        If time runs out, the current solutions are returned. If the first product alone takes longer than the limit,
        the residuals are computed nevertheless.
    callback : callable, optional
        Called as ``callback(x)`` with a copy of the current solution after each step. The type of ``x`` is that of the
        result.
    progress : bool, optional
        Whether to show a progress bar that counts products. The bar reports negative curvature as soon as it is found.

    Returns
    -------
    SolveResult
        The solutions and their residuals.

    Raises
    ------
    TypeError, ValueError
        If an argument is invalid, a product is not finite, or the preconditioner is not positive definite.
    MemoryError
        If a single column does not fit into half of the free memory.

    Warns
    -----
    RuntimeWarning
        If the damped matrix is found to be indefinite or singular, or `rtol` is not reached. The warning says whether
        `maxiter`, `seconds` or the precision of the products stopped the solver.

    See Also
    --------
    InverseLinearOperator : The inverse of the damped matrix as an operator.
    curvop.preconditioner.nystrom : A preconditioner for matrices with few large eigenvalues.
    curvop.preconditioner.jacobi : A diagonal preconditioner.

    Notes
    -----
    The residual of a solution is at most that of the initial guess. Conjugate gradients decreases the error, but not
    always the residual. If `maxiter` or `seconds` stops the solver while a residual is larger than at the start, the
    solution is the point with the smallest residual on the line between the initial guess and the current solution.

    The systems are solved by the method of block conjugate gradients [1]_ [2]_. This method minimizes the error of
    every column over one Krylov space that contains the residuals of all columns. For a single column, it is the method
    of conjugate gradients [3]_. A step takes one block product with at most K columns. The block becomes narrower if
    linear combinations of the residuals have converged, or if columns of `b` are zero or linearly dependent. If the
    curvature along a search direction is not positive, MINRES [4]_ continues from the current solutions, and a warning
    is issued. MINRES uses a separate Krylov space for each column. The reported residuals are always recomputed from
    the solutions.

    All recurrences are computed in float64 on the device of `A`. The accuracy for float32 models is therefore limited
    by the products, and not by the recurrences. A block needs memory for about twelve float64 tensors of its size. A
    block has at most 128 columns, or fewer if 128 columns do not fit into half of the free memory. More columns are
    solved in several blocks. New residuals are orthogonalized against all earlier ones, or only against the first ones
    if more than 1024 vectors or half of the free memory would be needed. This orthogonalization often halves the number
    of products. After m products, it takes O(N K m) operations per step.

    With ``preconditioner='auto'``, the inverse of `curvop.KFACLinearOperator` is used if it is almost the inverse of
    the matrix, and `curvop.preconditioner.nystrom` is constructed if at least eight blocks of columns remain. For a
    Gauss-Newton or Fisher matrix whose parameters all have Kronecker factors, three steps with KFAC are tried with one
    column: after the first block, or after 16 steps if there is only one block. The trial fails if the relative
    residual is then above 0.01. It costs four products, and the passes over the data that compute the factors. For
    other matrices that have the method ``diagonal``, the inverse of the diagonal is measured, too. Each of these
    preconditioners solves one block. All other blocks are solved in the way that took the fewest products per column. A
    preconditioner is only used if it saves a tenth of the products. ``result.preconditioner`` contains the name of the
    preconditioner and the measurements.

    References
    ----------
    .. [1] D. P. O'Leary, "The block conjugate gradient algorithm and related methods", Linear Algebra Appl. 29, 1980.
       doi:10.1016/0024-3795(80)90247-5
    .. [2] A. A. Dubrulle, "Retooling the method of block conjugate gradients", Electron. Trans. Numer. Anal. 12, 2001.
    .. [3] M. R. Hestenes, E. Stiefel, "Methods of conjugate gradients for solving linear systems", J. Res. Natl. Bur.
       Stand. 49(6), 1952. doi:10.6028/jres.049.044
    .. [4] C. C. Paige, M. A. Saunders, "Solution of sparse indefinite systems of linear equations", SIAM J. Numer.
       Anal. 12(4), 1975. doi:10.1137/0712047

    Examples
    --------
    Compute a damped Gauss-Newton step:

    >>> import torch
    >>> from torch import nn
    >>> from curvop import GGNLinearOperator, solve
    >>> _ = torch.manual_seed(0)
    >>> X, y = torch.randn(40, 4).double(), torch.randn(40, 1).double()
    >>> model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1)).double()
    >>> params = dict(model.named_parameters())
    >>> G = GGNLinearOperator(model, nn.MSELoss(), params, [(X, y)])
    >>> gradient, loss = G.gradient_and_loss()
    >>> result = solve(G, gradient, 0.1, progress=False)
    >>> result.converged, result.residual <= 1e-5, result.solver
    (True, True, 'cg')
    >>> step = G.unravel(-result.solution)

    To compute influence functions, pass the gradients of all training examples as the columns of a tensor. The solution
    is a tensor, too:

    >>> def loss(params, x, y):
    ...     return nn.functional.mse_loss(torch.func.functional_call(model, params, (x,)), y)
    >>> gradients = torch.func.vmap(torch.func.grad(loss), (None, 0, 0))(params, X, y)
    >>> b = torch.cat([gradients[name].reshape(40, -1) for name in params], 1).T
    >>> result = solve(G, b, 0.1, progress=False)
    >>> result.solution.shape == b.shape, result.residual.shape, bool(result.converged.all())
    (True, (40,), True)
    """
    until = deadline_after(seconds)
    A = real_operator(A)
    check_arguments(A, damping, rtol, maxiter)
    sides = RightSides(A, b)
    start = None
    if x0 is not None:
        guess = RightSides(A, x0, "x0")
        if guess.shape != sides.shape:
            raise ValueError(f"x0 has shape {guess.shape} and b has shape {sides.shape}: pass an x0 of the shape of b")
        start = guess.rows
    if isinstance(preconditioner, str) and preconditioner == "auto":
        if callback is not None or start is not None:
            raise ValueError(
                "preconditioner='auto' takes no callback and no x0: pass a preconditioner, or leave them out"
            )
        with step_bar("solve", progress) as bar:
            found, text = _solve_and_choose(A, sides.rows, damping, rtol, maxiter, until, bar)
        result = dataclasses.replace(found.result(sides), preconditioner=text)
    else:
        multiplier = row_multiplier(preconditioner, A.shape, sides.as_arrays)
        restored = None if callback is None else lambda rows: callback(sides.restore(rows))
        with step_bar("solve", progress) as bar:
            found = solve_rows(A, sides.rows, damping, rtol, multiplier, maxiter, start, until, restored, bar)
        result = found.result(sides)
    if text := result.problem(rtol):
        warn_user(text)
    return result


def _solve_and_choose(
    A: LinearOperator,
    rows: Tensor,
    damping: float,
    rtol: float,
    maxiter: int | None,
    until: float,
    bar: tqdm[Any],
) -> tuple[Solutions, str]:
    """Solve blocks of the columns with several preconditioners, and the rest with the best. Return a text, too."""

    def solve_block(
        block: Tensor,
        multiplier: RowFunction | None,
        steps: int | None,
        start: Tensor | None,
        callback: Callable[[Tensor], object] | None = None,
    ) -> Solutions:
        return solve_rows(A, block, damping, rtol, multiplier, steps, start, until, callback, bar)

    blocks = list(rows.split(_columns_at_once(device_of(A), *rows.shape)))
    found, text = solve_blocks(A, blocks, damping, maxiter, solve_block)
    return functools.reduce(Solutions.joined, found), text


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class SolveResult(Summary):
    """The solution of ``(A + damping * I) x = b`` and its residual, returned by `solve`.

    ``print(result)`` shows a summary in one line. If b has shape ``(N, K)``, the attributes ``residual``, ``products``
    and ``converged`` are arrays with one entry for each column.

    Attributes
    ----------
    solution : ndarray, Tensor, or dict, list or tuple of Tensor
        The solution x, in the type and shape of b, and on its device. An array is float64. The dtype of tensors is the
        wider of the dtype of b and the dtype in which products are computed.
    residual : float or ndarray, shape (K,)
        The relative residual ``||b - (A + damping * I) x|| / ||b||``. It is computed from the final solution, and not
        taken from the recurrences of the solver.
    products : int or ndarray, shape (K,)
        The number of products with `A`. Products for the residual are included. Products that constructed the
        preconditioner are not included. If columns share products, the products are divided equally among them. The
        entries therefore add up to the total number of products.
    converged : bool or ndarray, shape (K,)
        Whether the residual is at most the requested `rtol`.
    negative_curvature : float or None
        The curvature ``p' (A + damping * I) p / p' p`` along a direction p of negative curvature, or None if no such
        direction was found. A negative value is an upper bound for the smallest eigenvalue and proves that the damped
        matrix is indefinite. The solution is then a saddle point of the quadratic function whose gradient is ``(A +
        damping * I) x - b``, and -x may not be a descent direction. The value None does not prove that the matrix is
        positive definite.
    solver : str
        'minres' if a direction with negative or numerically zero curvature was found, and 'cg' otherwise.
    status : str
        What stopped the solver: 'rtol' if all columns have converged. Otherwise, the status is that of the column with
        the largest residual: 'maxiter', 'seconds', 'precision' (the products are not precise enough for a smaller
        residual) or 'stagnation' (restarts no longer reduce the residual).
    preconditioner : str
        With ``preconditioner='auto'``, the name of the preconditioner and the measured numbers of products. Otherwise,
        the text is empty.

    See Also
    --------
    solve : Solve a damped system.
    """

    solution: Any
    residual: Any
    products: Any
    converged: Any
    negative_curvature: float | None
    solver: str
    status: str = ""
    preconditioner: str = ""

    def problem(self, rtol: float) -> str:
        """Return a warning if the matrix is not positive definite or `rtol` is not reached, and '' otherwise.

        Parameters
        ----------
        rtol : float
            The requested relative residual.
        """
        converged = np.all(self.converged)
        if converged and self.solver == "cg":
            return ""
        text = str(self) if converged else self._text(f" (rtol is {rtol:g})")
        if self.solver == "minres":
            text += "; use a larger damping to make it positive definite"
            if self.negative_curvature is not None:
                text += ", or a GGNLinearOperator instead of a Hessian"
            if self.status == "stagnation":  # a larger damping is the remedy
                return text
        return text if converged else f"{text}; {_VERDICTS[self.status]}"

    def __str__(self) -> str:
        return self._text()

    def _text(self, remark: str = "") -> str:
        """Return the result in one line, with a remark after the residual."""
        count, done = np.size(self.converged), int(np.sum(self.converged))
        if np.ndim(self.residual):
            some = f"{count - done} of {count} columns " if 0 < count - done < count else ""
            residual = f"relative residuals of {count} columns <= {np.max(self.residual, initial=0.0):.2e}"
        else:
            some, residual = "", f"relative residual {self.residual:.2e}"
        verdict = "converged" if done == count else f"{some}not converged"
        text = f"{verdict}: {residual}{remark} after {np.sum(self.products)} products ({self.solver})"
        if self.negative_curvature is not None:
            text += f"; the damped matrix is indefinite (smallest eigenvalue <= {self.negative_curvature:.3g})"
        elif self.solver == "minres":
            text += "; the damped matrix is numerically singular"
        return f"{text}; preconditioner: {self.preconditioner}" if self.preconditioner else text

    def _summary_table(self) -> list[Sequence[str]]:
        columns = zip(*map(np.atleast_1d, (self.residual, self.products, self.converged)), strict=True)
        rows = [
            (str(index), f"{residual:.2e}", f"{products:,.6g}", "yes" if converged else "no")
            for index, (residual, products, converged) in enumerate(columns)
        ]
        return abridged([("column", "relative residual", "products", "converged"), *rows])


def check_arguments(A: LinearOperator, damping: Any, rtol: Any, maxiter: Any) -> None:
    """Raise an error if an argument of `solve` is invalid. The message names the argument."""
    if A.shape[0] != A.shape[1]:
        raise ValueError(f"A has shape {A.shape}, but must be square")
    for name, value in (("damping", damping), ("rtol", rtol)):
        if not isinstance(value, int | float | np.number):
            raise TypeError(f"{name} is a {type(value).__name__}, but must be a number")
    if not (np.isfinite(damping) and 0 < rtol < 1):
        raise ValueError(
            f"damping is {damping} and rtol is {rtol}: damping must be finite, and rtol between 0 and 1 (exclusive)"
        )
    if maxiter is not None:
        integer("maxiter", maxiter, 1)


@dataclasses.dataclass
class Solutions:
    """The solutions of K systems, with the attributes of `SolveResult` for each of them.

    Attributes
    ----------
    rows : Tensor, shape (K, N)
        The solutions in float64.
    residual, products, converged, status : ndarray, shape (K,)
        One entry for each system.
    negative_curvature : float or None
        The smallest negative curvature that was found, or None.
    solver : str
        'cg' or 'minres'.
    """

    rows: Tensor
    residual: Array
    products: Array
    converged: NDArray[np.bool_]
    status: list[str]
    negative_curvature: float | None
    solver: str

    def joined(self, other: Solutions) -> Solutions:
        """Return the solutions of these systems, followed by those of other systems."""
        curvatures = [part.negative_curvature for part in (self, other) if part.negative_curvature is not None]
        return Solutions(
            torch.cat([self.rows, other.rows]),
            np.concatenate([self.residual, other.residual]),
            np.concatenate([self.products, other.products]),
            np.concatenate([self.converged, other.converged]),
            [*self.status, *other.status],
            min(curvatures, default=None),
            "minres" if "minres" in (self.solver, other.solver) else "cg",
        )

    def result(self, sides: RightSides) -> SolveResult:
        """Return the result for all columns of the right-hand sides."""
        status = "rtol"
        if not self.converged.all():
            status = self.status[int(np.argmax(np.where(self.converged, -1.0, self.residual)))]
        solution, rest = sides.restore(self.rows), (self.negative_curvature, self.solver, status)
        if sides.is_vector:
            return SolveResult(solution, float(self.residual[0]), int(self.products[0]), bool(self.converged[0]), *rest)
        return SolveResult(solution, self.residual, self.products, self.converged, *rest)

    def results(self, as_arrays: bool) -> list[SolveResult]:
        """Return one result for each column. Solutions are arrays if `as_arrays` is True, and tensors otherwise."""
        rows = self.rows.numpy(force=True) if as_arrays else self.rows
        return [
            SolveResult(
                rows[i],
                float(self.residual[i]),
                int(self.products[i]),
                bool(self.converged[i]),
                self.negative_curvature,
                self.solver,
                self.status[i],
            )
            for i in range(len(self.rows))
        ]


def solve_rows(
    A: LinearOperator,
    rows: Tensor,
    damping: float,
    rtol: float,
    preconditioner: RowFunction | None,
    maxiter: int | None,
    x0: Tensor | None,
    until: float,
    callback: Callable[[Tensor], object] | None,
    bar: tqdm[Any],
) -> Solutions:
    """Solve one system for each row of a float64 tensor ``(K, N)``. No warnings are issued.

    All other arguments are those of `solve`, after validation. `until` is the deadline, and `callback` receives rows.
    """
    count, size = rows.shape
    norms = row_norms(rows)
    # Scale each right-hand side by a power of two, which is exact, so that its norm is between 0.5 and 1.
    exponents = np.where(norms > 0, np.frexp(norms)[1], 0)
    scales = torch.from_numpy(np.ldexp(1.0, exponents)).to(rows)[:, None]
    system = DampedSystem(A, damping, preconditioner, until, bar, count)
    X = torch.zeros_like(rows) if x0 is None else x0 / scales
    X[torch.from_numpy(norms == 0).to(X.device)] = 0
    group_size = _columns_at_once(device_of(A), count, size)
    on_step = None if callback is None else _shown(callback, X, scales)
    groups = []
    for first in range(0, count, group_size):
        columns = np.arange(first, min(first + group_size, count))
        part = slice(first, first + group_size)
        group = _Group(system, rows[part] / scales[part], X[part], columns, rtol, x0 is not None, on_step)
        try:
            group.run(min(10 * size, _MAX_STEPS) if maxiter is None else maxiter)
        except SolvedOtherwise as stop:
            stop.products = system.products_per_column()
            raise
        groups.append(group)
    residual = np.concatenate([group.residual for group in groups]) if groups else np.zeros(0)
    curvatures = [group.negative_curvature for group in groups if group.negative_curvature is not None]
    return Solutions(
        X * scales,
        residual,
        system.products_per_column(),
        residual <= rtol,
        [status for group in groups for status in group.status],
        min(curvatures, default=None),
        "minres" if any(group.solver == "minres" for group in groups) else "cg",
    )


def _shown(callback: Callable[[Tensor], object], X: Tensor, scales: Tensor) -> Callable[[Array, Tensor], None]:
    """Return a function that inserts current rows into a copy of all solutions, and passes the copy to the callback."""

    def on_step(columns: Array, current: Tensor) -> None:
        shown = X.clone()
        shown[columns] = current
        callback(shown * scales)

    return on_step


def _columns_at_once(device: torch.device, count: int, size: int) -> int:
    """Return the number of columns of a block: at most 128, and only as many as fit into half of the free memory."""
    if count * size * _BUFFERS * 8 < 2**26:  # small enough without a query of the free memory
        return min(count, _MAX_BLOCK) or 1
    return max(1, min(count, _MAX_BLOCK, available_bytes(device) // (size * _BUFFERS * 8)))


class _Group:
    """Right-hand sides that are solved together, by one or more runs of block CG or MINRES.

    Parameters
    ----------
    system : DampedSystem
        The matrix and the preconditioner.
    B, X : Tensor, shape (K, N)
        The right-hand sides B, which are zero or have norms between 0.5 and 1, and the initial solutions X, which are
        updated in place.
    columns : ndarray, shape (K,)
        Indices of the right-hand sides.
    rtol : float
        Relative residual at which the solver stops.
    has_start : bool
        Whether the initial solutions may be nonzero.
    on_step : callable or None
        Called as ``on_step(columns, X)`` after each step.

    Attributes
    ----------
    residual : ndarray, shape (K,)
        Relative residuals of the solutions.
    status : list of str
        What stopped the solver, for each right-hand side.
    """

    def __init__(
        self,
        system: DampedSystem,
        B: Tensor,
        X: Tensor,
        columns: Array,
        rtol: float,
        has_start: bool,
        on_step: Callable[[Array, Tensor], None] | None,
    ) -> None:
        self._system, self._B, self._X, self._columns = system, B, X, columns
        self._rtol, self._on_step = rtol, on_step
        self._norms = np.where((norms := row_norms(B)) > 0, norms, 1.0)
        self._R = B
        if has_start:
            self._R = B - system.checked_multiply(X, columns)
        self.residual = row_norms(self._R) / self._norms
        self.residual[norms == 0] = 0.0
        self.status = ["rtol"] * len(columns)
        self.solver = "cg"
        self.negative_curvature: float | None = None
        self._trust_rounding = True

    def run(self, max_steps: int) -> None:
        """Run solvers until the true residuals are small enough or no longer decrease.

        In floating-point arithmetic, a block can fail if its columns differ too much in size in the inner product of
        the matrix, for example if the diagonal is between 1e-20 and 1e20. Columns that no longer improve are therefore
        continued one by one, as long as this helps.
        """
        max_steps = self._improve(np.flatnonzero(self.residual > self._rtol), max_steps)
        stuck = [i for i, status in enumerate(self.status) if status == "stagnation"]
        for i in stuck if len(self.status) > 1 else []:
            if self.solver == "minres" or self._system.low_precision:
                break
            before = self.residual[i]
            self._improve(np.array([i]), max_steps)
            if self.residual[i] > max(0.5 * before, self._rtol):
                break

    def _improve(self, active: Array, max_steps: int) -> int:
        """Run solvers for the active columns together. Return the number of steps that are left."""
        for i in active:
            self.status[i] = "rtol"
        for number in range(_MAX_RUNS):
            if not len(active):
                break
            X, end = self._advance(active, max_steps, number)
            max_steps -= end.steps
            residuals = self._residuals(X, active) if end.steps else self._R[active]
            active = self._accept(active, X, residuals, end, number)
        for i in active:
            self.status[i] = "stagnation"
        return max_steps

    def _accept(self, active: Array, X: Tensor, R: Tensor, end: BlockRun, number: int) -> Array:
        """Keep the solutions that are better than the previous ones. Return the columns to restart."""
        before, found = self.residual[active], row_norms(R) / self._norms[active]
        if self.solver == "cg" and end.steps:
            self._shorten(active, X, R, found > before)
            found = row_norms(R) / self._norms[active]
        better = found < before
        chosen = active[better]
        self._X[chosen], self.residual[chosen] = X[better], found[better]
        if self._R is self._B:
            self._R = self._B.clone()
        self._R[chosen] = R[better]
        unfinished = self.residual[active] > self._rtol
        helped = better & (found < 0.5 * before)
        # If a residual is close to rtol, restart even if this run did not reduce it, because the next run has a smaller
        # tolerance.
        restart = unfinished & (helped | (self.residual[active] <= 2 * self._rtol))
        reason = np.full(len(active), "stagnation", dtype=object)
        if self._system.low_precision:
            reason[:] = "precision"
            if self.solver == "cg":
                # Rounding errors of the products dominate if the true residual is larger than the recursive one.
                noisy = found > 2 * end.sizes * self._rtol
                hopeless = (end.reason == "precision") | (found > 3 * self._rtol) | ((number > 0) & ~helped)
                restart &= ~(noisy & hopeless)
                self._trust_rounding &= end.reason != "precision"
        if end.reason in ("maxiter", "seconds"):
            restart[:], reason[:] = False, end.reason
        for i, text in zip(active[unfinished & ~restart], reason[unfinished & ~restart], strict=True):
            self.status[i] = text
        return active[restart]

    def _shorten(self, active: Array, X: Tensor, R: Tensor, worse: NDArray[np.bool_]) -> None:
        """Replace solutions that are worse than the previous ones by the best solutions on the line to these, in place.

        CG decreases the error in the norm of the matrix, but not always the residual. On the line between two
        solutions, this error is convex. The new solutions therefore have a smaller error and a smaller residual than
        the previous ones (Zhou, Walker, 1994, "Residual smoothing techniques for iterative methods", SIAM J. Sci.
        Comput. 15(2)).
        """
        for row in np.flatnonzero(worse):
            x, r = self._X[active[row]], self._R[active[row]]
            change = r - R[row]
            fraction = float(r @ change / (change @ change))
            # Rounding errors of a much larger residual would dominate the new one.
            fraction = min(fraction, 1.0) if fraction > 1e-6 else 0.0
            X[row], R[row] = torch.lerp(x, X[row], fraction), r - fraction * change

    def _residuals(self, X: Tensor, active: Array) -> Tensor:
        """Return the true residuals of solutions."""
        return self._B[active] - self._system.checked_multiply(X, self._columns[active])

    def _advance(self, active: Array, max_steps: int, number: int) -> tuple[Tensor, BlockRun]:
        """Run a solver once from the current solutions. Return the new solutions and the outcome of the run."""
        # Restarts use smaller tolerances, because rounding errors make the true residuals larger than those of the
        # solver.
        X, R, columns = self._X[active].clone(), self._R[active], self._columns[active]
        allowed = self._rtol * self._norms[active]
        tolerances = 0.9 / 2**number * allowed
        hook = None if self._on_step is None else functools.partial(self._on_step, columns, X)
        if self.solver == "cg":
            end = block_cg(self._system, X, R, tolerances, columns, max_steps, hook, self._trust_rounding)
            if end.reason != "curvature":
                end.sizes *= tolerances / allowed
                return X, end
            self._report_curvature(end.curvature, columns)
            max_steps -= end.steps
            if end.steps:
                R_new = self._residuals(X, active)
                worse = torch.from_numpy(row_norms(R_new) >= row_norms(R)).to(X.device)
                X[worse] = self._X[active][worse]
                R = torch.where(worse[:, None], R, R_new)
            steps = end.steps
        else:
            steps = 0
        unsolved = row_norms(R) > allowed  # a column that is solved exactly has no Krylov space
        if not unsolved.any():
            return X, BlockRun("rtol", steps, np.zeros(len(active)))
        mask = torch.from_numpy(unsolved).to(X.device)
        part, left = X[mask], columns[unsolved]
        hook = None if self._on_step is None else functools.partial(self._on_step, left, part)
        reason, more = minres(self._system, part, R[mask], allowed[unsolved], left, max_steps, hook)
        X[mask] = part
        return X, BlockRun(reason, steps + more, np.zeros(len(active)))

    def _report_curvature(self, curvature: float, columns: Array) -> None:
        """Switch to MINRES. Report the curvature on the progress bar if rounding errors do not explain it."""
        self.solver = "minres"
        self._system.measure_scale(columns)
        if curvature < -_ROUNDING * self._system.scale:
            self.negative_curvature = curvature
            self._system.bar.set_postfix_str(f"indefinite: smallest eigenvalue <= {curvature:.3g}", refresh=False)
