"""Preconditioners for damped linear solves."""

from curvop.solvers.preconditioners import NystromPreconditioner, jacobi, kfac, nystrom

__all__ = ["NystromPreconditioner", "jacobi", "kfac", "nystrom"]
