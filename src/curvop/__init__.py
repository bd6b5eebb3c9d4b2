"""Curvature matrices of PyTorch models as SciPy linear operators."""

from curvop.damped import DampedLinearOperator
from curvop.examples.functorch import functorch_hessian
from curvop.hessian import HessianLinearOperator
from curvop.kernels.errors import NonDeterministicObjectiveError, NonFiniteProductError
from curvop.submatrix import SubmatrixLinearOperator
from curvop.utils import allclose_report

__version__ = "0.1.0"

__all__ = [
    "DampedLinearOperator",
    "HessianLinearOperator",
    "NonDeterministicObjectiveError",
    "NonFiniteProductError",
    "SubmatrixLinearOperator",
    "allclose_report",
    "functorch_hessian",
]
