"""Curvature matrices of PyTorch models as SciPy linear operators."""

from curvop.damped import DampedLinearOperator
from curvop.hessian import HessianLinearOperator
from curvop.kernels.errors import NonDeterministicObjectiveError, NonFiniteProductError
from curvop.submatrix import SubmatrixLinearOperator

__all__ = [
    "DampedLinearOperator",
    "HessianLinearOperator",
    "NonDeterministicObjectiveError",
    "NonFiniteProductError",
    "SubmatrixLinearOperator",
]
