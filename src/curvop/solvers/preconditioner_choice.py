"""Choose a preconditioner by a measurement, for ``solve(..., preconditioner="auto")``.

The rule: a Kronecker-factored preconditioner is used if all parameters have Kronecker factors and it is almost the
inverse, which three steps with a single column show. A Nystrom preconditioner is constructed if at least eight blocks
of columns remain.

The trial costs four products. Among the networks of ``benchmarks/preconditioning.py``, the residual after the trial is
below 0.001 for an untrained linear layer, for which the preconditioner saves about a third of the products of a wide
block, and up to nine tenths of those of a single column. For all others, it is above 0.05, and the preconditioner saves
at most 2% of the products of a block of 16 or 128 columns, and usually increases them. In between, a short trial does
not show which preconditioner is best: for the Gauss-Newton matrix of the trained digits network, the Kronecker-factored
preconditioner has the smaller residual after 16 steps, but takes more than twice as many steps in total as no
preconditioner.

The construction of a Nystrom preconditioner takes as many products as its rank. For these networks and a rank of 256,
it saves on average two fifths of this number in each block of 16 columns, and a quarter in each block of 128 columns,
because a wide block finds the large eigenvalues by itself.

A preconditioner that is chosen by this rule solves one whole block, and is used for the remaining blocks only if it
saves a tenth of the products there. The solutions are part of the result, so that only additional products are lost.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.sparse.linalg import LinearOperator
from torch import Tensor

from curvop.operators.curvature_operator import GGNLikeLinearOperator
from curvop.operators.diagonal_operator import DiagonalLinearOperator
from curvop.operators.kfac import KFACLinearOperator
from curvop.solvers.damped_system import RowFunction, operator_multiplier
from curvop.solvers.preconditioners import nystrom

if TYPE_CHECKING:
    from curvop.solvers.linear_solve import Solutions

__all__ = ["SolvedOtherwise", "solve_blocks"]

_MAX_RANK = 256  # of the Nystrom preconditioner
_FEWEST_BLOCKS = 8  # that must remain to construct the Nystrom preconditioner
_GAIN = 0.9  # a preconditioner must take at most this fraction of the products without one
_TRIAL_AFTER = 16  # steps without a preconditioner before the only block tries one
_TRIAL_STEPS = 3  # steps of the trial with one column
_TRIAL_RESIDUAL = 1e-2  # largest relative residual after these steps with which the trial succeeds
_MOST_STEPS = 16  # with the only block after a trial that has succeeded

#: Exceptions of constructors whose preconditioner does not suit the matrix.
_UNSUITABLE = (TypeError, ValueError, NotImplementedError, MemoryError)

#: Maps (right-hand sides, preconditioner, maximum number of steps, initial solutions) to solutions. The optional last
#: argument is called after each step, and may raise a `SolvedOtherwise`.
Solver = Callable[..., "Solutions"]


class SolvedOtherwise(Exception):  # noqa: N818
    """Raised by the callback of a solver whose systems were solved in another way.

    Attributes
    ----------
    products : ndarray, shape (K,)
        Numbers of products of the solver so far, which the solver sets.
    """

    products: NDArray[np.int64]


def solve_blocks(
    A: LinearOperator, blocks: list[Tensor], damping: float, maxiter: int | None, solve: Solver
) -> tuple[list[Solutions], str]:
    """Solve the first blocks of right-hand sides with different preconditioners, and the others with the best.

    Parameters
    ----------
    A : LinearOperator, shape (N, N)
        Symmetric operator.
    blocks : list of Tensor
        Right-hand sides, as tensors of shape (K, N).
    damping : float
        Damping.
    maxiter : int or None
        Maximum number of steps.
    solve : callable
        Function that solves a block.

    Returns
    -------
    solutions : list of Solutions
        The solutions of each block.
    text : str
        The preconditioner of the remaining blocks, and the measurements.
    """
    if len(blocks) < 2:
        return _solve_single_block(A, blocks, damping, maxiter, solve)
    found = [solve(blocks[0], None, maxiter, None)]
    if found[0].solver != "cg" or damping <= 0:
        found += [solve(block, None, maxiter, None) for block in blocks[1:]]
        return found, "none, because the matrix is not known to be positive definite"
    plain, width = int(found[0].products.sum()), len(blocks[0])
    best, name, multiplier = _GAIN * plain / width, "none", None
    counts, trial = [f"{plain / width:.3g} with none"], ""
    for label, build in _candidates(A, damping, plain, len(blocks) - 1):
        if len(found) == len(blocks):
            break
        try:
            candidate = operator_multiplier(build())
        except _UNSUITABLE:
            continue
        block = blocks[len(found)]
        spent = np.zeros(len(block), dtype=np.int64)
        if label == "kfac":
            residual = _try(block, candidate, solve, spent)
            if residual > _TRIAL_RESIDUAL:
                found[-1].products[0] += spent.sum()
                trial = f"; {_trial_text(residual)}"
                continue
        # A step takes one product per column at most, so that this limit stops a preconditioner that is worse.
        steps = max(1, plain // len(block))
        solutions = solve(block, candidate, steps if maxiter is None else min(steps, maxiter), None)
        cost = int(solutions.products.sum()) / len(block)
        counts.append(f"{cost:.3g} with {label}" + ("" if solutions.converged.all() else ", unfinished"))
        if solutions.converged.all() and cost < best:
            best, name, multiplier = cost, label, candidate
        elif not solutions.converged.all():
            spent += solutions.products
            # Start from zero: from the unfinished solutions, a block of 128 columns took ten times as many products.
            solutions = solve(block, multiplier, maxiter, None)
        solutions.products += spent
        found.append(solutions)
    found += [solve(block, multiplier, maxiter, None) for block in blocks[len(found) :]]
    return found, f"{name}; products per column: {', '.join(counts)}{trial}"


def _try(block: Tensor, multiplier: RowFunction, solve: Solver, spent: NDArray[np.int64]) -> float:
    """Return the relative residual of one column after a few steps with a preconditioner.

    The products are added to those of the column in `spent`.
    """
    column = int(torch.linalg.vector_norm(block, dim=1).argmax())  # zero columns show nothing
    trial = solve(block[column : column + 1], multiplier, _TRIAL_STEPS, None)
    spent[column] += trial.products[0]
    return float(trial.residual[0])


def _trial_text(residual: float) -> str:
    return f"relative residual {residual:.1e} of one column after {_TRIAL_STEPS} steps with kfac"


def _solve_single_block(
    A: LinearOperator, blocks: list[Tensor], damping: float, maxiter: int | None, solve: Solver
) -> tuple[list[Solutions], str]:
    """Solve at most one block, and try a Kronecker-factored preconditioner if the solve takes many steps."""
    if not (blocks and isinstance(A, GGNLikeLinearOperator) and damping > 0):
        found = [solve(block, None, maxiter, None) for block in blocks]
        return found, "none, and nothing was measured, because all columns fit into one block"
    [block] = blocks
    steps, otherwise, spent = 0, None, np.zeros(len(block), dtype=np.int64)
    text = f"none, and nothing was measured, because the solve took less than {_TRIAL_AFTER} steps"

    def on_step(_: Tensor) -> None:
        nonlocal steps, text, otherwise
        steps += 1
        if steps != _TRIAL_AFTER:
            return
        try:
            M = operator_multiplier(_kfac(A, damping))
        except _UNSUITABLE:
            text = "none, because some parameters have no Kronecker factors, or the factors cannot be computed"
            return
        residual = _try(block, M, solve, spent)
        text = f"none; {_trial_text(residual)}"
        if residual <= _TRIAL_RESIDUAL:
            otherwise = solve(block, M, _MOST_STEPS, None)
            if otherwise.converged.all():
                text = f"kfac; {_trial_text(residual)}"
                raise SolvedOtherwise
            spent[:] += otherwise.products

    try:
        solutions = solve(block, None, maxiter, None, on_step)
    except SolvedOtherwise as stop:
        assert otherwise is not None
        solutions = otherwise
        solutions.products += stop.products
    solutions.products += spent
    return [solutions], text


def _candidates(
    A: LinearOperator, damping: float, plain: int, remaining: int
) -> Iterator[tuple[str, Callable[[], LinearOperator]]]:
    """Yield names and constructors of preconditioners.

    A block takes `plain` products without a preconditioner. `remaining` is the number of all other blocks.
    """
    rank = int(min(A.shape[0], plain, _MAX_RANK))
    if remaining >= _FEWEST_BLOCKS:
        yield f"nystrom({rank})", lambda: nystrom(A, rank, damping, rng=0)
    if isinstance(A, GGNLikeLinearOperator):
        yield "kfac", lambda: _kfac(A, damping)  # the exact diagonal takes one backward pass per example and output
    elif hasattr(A, "diagonal"):
        yield "jacobi", lambda: _jacobi(A, damping)


def _kfac(A: GGNLikeLinearOperator, damping: float) -> LinearOperator:
    """Return the preconditioner of KFAC, which takes no products. Raise a ``ValueError`` if parameters have no factors.

    The exact blocks of these parameters would take one product for each entry, which the preconditioner cannot save.
    """
    return KFACLinearOperator.of(A, others="raise").inverse(damping)


def _jacobi(A: LinearOperator, damping: float) -> DiagonalLinearOperator:
    """Return the preconditioner of the exact diagonal. Raise a ``NotImplementedError`` if `A` cannot compute it."""
    return DiagonalLinearOperator(1 / (np.maximum(np.asarray(A.diagonal(), dtype=np.float64), 0) + damping))
