"""Curvature matrices of PyTorch models as SciPy linear operators."""

from curvop import distributed, preconditioner, spectrum
from curvop.checks.check_report import CheckReport
from curvop.checks.operator_checks import check
from curvop.kernels.errors import NonDeterministicObjectiveError, NonFiniteProductError
from curvop.operators.base import SubmatrixLinearOperator
from curvop.operators.fisher import EFLinearOperator, FisherLinearOperator, GradientCovarianceLinearOperator
from curvop.operators.ggn import GGNLinearOperator
from curvop.operators.hessian import HessianLinearOperator
from curvop.operators.jacobian import JacobianLinearOperator, TransposedJacobianLinearOperator
from curvop.operators.parameter_operator import DampedLinearOperator
from curvop.operators.selection import select
from curvop.solvers.linear_solve import SolveResult, solve
from curvop.storage.journal import JournaledLinearOperator
from curvop.testing.comparison import allclose_report
from curvop.testing.functorch_reference import functorch_hessian

__version__ = "0.1.0"

__all__ = [
    "CheckReport",
    "DampedLinearOperator",
    "EFLinearOperator",
    "FisherLinearOperator",
    "GGNLinearOperator",
    "GradientCovarianceLinearOperator",
    "HessianLinearOperator",
    "JacobianLinearOperator",
    "JournaledLinearOperator",
    "NonDeterministicObjectiveError",
    "NonFiniteProductError",
    "SolveResult",
    "SubmatrixLinearOperator",
    "TransposedJacobianLinearOperator",
    "allclose_report",
    "check",
    "distributed",
    "functorch_hessian",
    "preconditioner",
    "select",
    "solve",
    "spectrum",
]


def __dir__() -> list[str]:
    """Return the public names, for tab completion."""
    return [*__all__, "__version__"]
