"""The symmetric curvature matrices by name, each with the dense reference that it is checked against."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from curvop.cli.problem_loading import ProblemError, one_line
from curvop.operators.fisher import EFLinearOperator, FisherLinearOperator
from curvop.operators.ggn import GGNLinearOperator
from curvop.operators.hessian import HessianLinearOperator
from curvop.testing.functorch_reference import functorch_empirical_fisher, functorch_ggn, functorch_hessian

__all__ = ["MATRICES", "Matrix", "wrap"]


@dataclass(frozen=True)
class Matrix:
    """A kind of matrix: what it is called, its operator, and how it is formed."""

    title: str
    operator: Callable[..., Any]
    dense: Callable[..., Tensor]


MATRICES = {
    "hessian": Matrix("Hessian", HessianLinearOperator, functorch_hessian),
    "ggn": Matrix("Gauss-Newton matrix", GGNLinearOperator, functorch_ggn),
    "ef": Matrix("empirical Fisher matrix", EFLinearOperator, functorch_empirical_fisher),
    "fisher": Matrix("Fisher matrix", FisherLinearOperator, functorch_ggn),  # equal for the likelihoods that it takes
}


def wrap(
    problem: dict[str, Any], matrix: str, settings: dict[str, Any], block: Sequence[str] | None, progress: Any = False
) -> tuple[Any, Any]:
    """Return the operators of a problem's matrix, and of the part of it that `block` names.

    Raises
    ------
    ProblemError
        If the problem cannot be wrapped.
    """
    try:
        whole = MATRICES[matrix].operator(**problem, **settings, progress=progress)
    except (ValueError, TypeError) as error:
        raise ProblemError(one_line(error)) from error
    try:
        return whole, whole if block is None else whole.block(block)
    except ValueError as error:  # the operator calls this argument 'rows'
        raise ProblemError(f"--block: {str(error).removeprefix('rows').lstrip(': ')}") from error
