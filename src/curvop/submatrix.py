"""Former location of `curvop.SubmatrixLinearOperator`, for compatibility."""

from curvop.operators.base import SubmatrixLinearOperator

__all__ = ["SubmatrixLinearOperator"]
