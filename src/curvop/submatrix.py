"""Former module of `curvop.SubmatrixLinearOperator`, which is kept for compatibility."""

from curvop.operators.submatrix_operator import SubmatrixLinearOperator

__all__ = ["SubmatrixLinearOperator"]
