"""Former module of `curvop.SubmatrixLinearOperator`, which is kept for compatibility."""

from curvop.operators.base import SubmatrixLinearOperator

__all__ = ["SubmatrixLinearOperator"]
