"""Former module of `curvop.SubmatrixLinearOperator`. It is kept so that old imports still work."""

from curvop.operators.submatrix_operator import SubmatrixLinearOperator

__all__ = ["SubmatrixLinearOperator"]
