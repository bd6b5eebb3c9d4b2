"""Damping: ``A + lambda I``."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Self

import torch
from numpy.typing import NDArray

from curvop.operators.base import Rows
from curvop.operators.parameter_operator import ParameterLinearOperator
from curvop.operators.validation import real_number

__all__ = ["DampedLinearOperator"]


class DampedLinearOperator(ParameterLinearOperator):
    """``A + damping * I``, made by ``A.damped(damping)``.

    Blocks and submatrices of it are those of the sum: an off-diagonal block is that of `A`, and a block whose rows and
    columns share some of their parameters is damped on these.

    Parameters
    ----------
    A : ParameterLinearOperator
    damping : float
        Finite.
    """

    def __init__(self, A: ParameterLinearOperator, damping: float) -> None:
        if not isinstance(A, ParameterLinearOperator):
            raise TypeError(f"A is a {type(A).__name__}: add damping to it as SciPy does, A + damping * identity")
        if not math.isfinite(real_number("damping", damping)):
            raise ValueError(f"damping is {damping}, but must be finite")
        super().__init__(A.dtype, A._params, A._rows, A._cols, A._counter)
        self._A = A
        self.args = (A, float(damping))  # as SciPy's own sums and multiples have them

    @property
    def damping(self) -> float:
        """What is added to the diagonal."""
        return float(self.args[1])

    @property
    def device(self) -> torch.device:
        """That of `A`."""
        return self._A.device

    def block(self, rows: str | Sequence[str], cols: str | Sequence[str] | None = None) -> Self:
        """Return the operator of the block of the sum that the named parameters span; see `A.block`."""
        return type(self)(self._A.block(rows, cols), self.damping)

    def damped(self, damping: float) -> DampedLinearOperator:
        """Return ``A + (self.damping + damping) * I``."""
        return type(self)(self._A, self.damping + damping)

    def diagonal(self) -> NDArray[Any]:
        """Return the exact diagonal ``(N,)``, that of `A` with the damping added; see `A.diagonal`."""
        diagonal: NDArray[Any] = self._A.diagonal() + self.damping
        return diagonal

    def gradient_and_loss(self) -> tuple[NDArray[Any], float]:
        """Return the gradient and the loss of A's objective, without damping."""
        return self._A.gradient_and_loss()

    def _adjoint(self) -> Self:
        adjoint = self._A.H
        return self if adjoint is self._A else type(self)(adjoint, self.damping)

    def _apply(self, rows: Rows) -> Rows:
        products = self._A._apply(rows)
        shifted: Any = products
        for name in self._rows.names:
            if name in self._cols.slices:
                shifted[:, self._rows.slices[name]] += self.damping * rows[:, self._cols.slices[name]]
        return products
