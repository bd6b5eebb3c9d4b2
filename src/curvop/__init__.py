"""Curvature matrices of PyTorch models as SciPy linear operators."""

from curvop import distributed, preconditioner, spectrum
from curvop.check import check
from curvop.check_report import CheckReport
from curvop.damped import DampedLinearOperator
from curvop.examples.functorch import functorch_hessian
from curvop.fisher import EFLinearOperator, FisherLinearOperator, GradientCovarianceLinearOperator
from curvop.ggn import GGNLinearOperator
from curvop.hessian import HessianLinearOperator
from curvop.jacobian import JacobianLinearOperator, TransposedJacobianLinearOperator
from curvop.journal import JournaledLinearOperator
from curvop.kernels.errors import NonDeterministicObjectiveError, NonFiniteProductError
from curvop.selection import select
from curvop.solvers import SolveResult, solve
from curvop.submatrix import SubmatrixLinearOperator
from curvop.utils import allclose_report

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
