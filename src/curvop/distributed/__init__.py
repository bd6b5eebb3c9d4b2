"""Curvature matrices of data sets that are spread over processes.

Start the script with ``torchrun``. Each rank (process) creates an operator of its own part of the data and passes the
operator to `serve`. Rank 0 runs the solver. The other ranks compute what their data contribute to the products. If one
process can read the whole data set, use the operators of `curvop` directly.
"""

from curvop.distributed.distributed_operator import DistributedLinearOperator, RankError, serve

__all__ = ["DistributedLinearOperator", "RankError", "serve"]


def __dir__() -> list[str]:
    """Return the public names, for tab completion."""
    return __all__
