"""Rows and columns of any linear operator; the class is `curvop.SubmatrixLinearOperator`."""

from curvop.operators.base import SubmatrixLinearOperator

__all__ = ["SubmatrixLinearOperator"]
