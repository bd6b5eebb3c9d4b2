"""Curvature matrices that act through the prediction."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor

from curvop.kernels.diagonal import write_diagonal
from curvop.kernels.ggn_kernel import SandwichKernel
from curvop.operators.curvature_operator import CurvatureLinearOperator

__all__ = ["SandwichLinearOperator"]


class SandwichLinearOperator(CurvatureLinearOperator):
    r"""A matrix :math:`\sum_n J_n^\top M_n J_n` over the examples, with the Jacobian of the prediction."""

    _kernel: Callable[[Any, Sequence[str], Sequence[str]], SandwichKernel]

    def diagonal(self) -> NDArray[Any]:
        """Return the exact diagonal ``(N,)``, in one pass over the data.

        It costs a backward pass of every example apart for each of its outputs (for the empirical Fisher matrix, one;
        for a sampled one, as many as there are samples), however many parameters there are.

        Raises
        ------
        NotImplementedError
            Where the model or the loss couples the examples (batch normalisation in training mode), torch cannot map
            over them (recurrent layers), a prediction is more than one tensor, or an example has more than 256 outputs:
            `curvop.spectrum.diagonal` estimates it.
        NonFiniteProductError
            Where it holds NaN or infinity; the message names the batch.
        ValueError
            For a block off the diagonal.
        """
        return self._diagonal().cpu().numpy().astype(self.dtype, copy=False)

    def _diagonal(self) -> Tensor:
        """Return it in double precision, for what is to be added or taken away."""
        if self._rows.names != self._cols.names:
            raise ValueError("this is a block off the diagonal, whose rows and columns are different parameters")
        objective = self._objective
        out = torch.zeros(self.shape[0], dtype=torch.float64, device=objective.device)
        with torch.inference_mode(False):
            kernel = self._kernel(objective, self._rows.names, self._cols.names)
            self._in_room(lambda: write_diagonal(kernel, self._rows.names, out))
        return out
