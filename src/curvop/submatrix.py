"""Rows and columns of any linear operator; the class is `curvop.SubmatrixLinearOperator`."""

from curvop.operators.submatrix_operator import SubmatrixLinearOperator

__all__ = ["SubmatrixLinearOperator"]
