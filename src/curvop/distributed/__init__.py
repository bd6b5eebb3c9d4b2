"""Curvature matrices of data sets that are spread over processes.

Rank 0 runs the solver, and all ranks serve products. Start the script with ``torchrun``, and give each rank an operator
of its own part of the data.
"""

from curvop.distributed.distributed_operator import DistributedLinearOperator, RankError, serve

__all__ = ["DistributedLinearOperator", "RankError", "serve"]


def __dir__() -> list[str]:
    """Return the public names, for tab completion."""
    return __all__
