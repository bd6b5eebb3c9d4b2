"""Curvature matrices: operators whose rows and columns are parameters of an objective."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from curvop.kernels.diagonal import write_diagonal
from curvop.kernels.ggn_kernel import GGNLikeKernel
from curvop.kernels.kernel import Kernel
from curvop.kernels.model_objective import ModelObjective
from curvop.kernels.objective import BatchWeight, Objective
from curvop.kernels.parameters import ParameterLayout, unknown_name
from curvop.operators.engine_operator import EngineLinearOperator, Settings
from curvop.operators.parameter_operator import ParameterLinearOperator
from curvop.operators.validation import named_keywords

__all__ = ["CurvatureLinearOperator", "GGNLikeLinearOperator", "checked_names"]


class CurvatureLinearOperator(EngineLinearOperator, ParameterLinearOperator):
    """A curvature matrix that a kernel computes from an objective.

    Subclasses name the kernel, and document the constructor; `HessianLinearOperator` says what its arguments are.
    """

    _kernel: Callable[[Any, Sequence[str], Sequence[str]], Kernel]

    @named_keywords
    def __init__(
        self,
        model: nn.Module | Callable[[dict[str, Tensor], Any], Any],
        loss_function: Callable[[Any, Any], Tensor],
        params: Mapping[str, Tensor] | Iterable[Tensor],
        data: Iterable[Any],
        *,
        dtype: Any = np.float64,
        cache: float | str = "auto",
        engine: str = "autograd",
        columns: int | str = "auto",
        batch_weight: BatchWeight | None = None,
        progress: Any = False,
    ) -> None:
        objective = ModelObjective(model, loss_function, params, data, batch_weight)
        self._setup(objective, Settings(dtype, cache, engine, columns, progress))

    def _setup(
        self,
        objective: Objective,
        settings: Settings,
        rows: Sequence[str] | None = None,
        cols: Sequence[str] | None = None,
    ) -> None:
        """Initialise; stands in for ``__init__``, which subclasses have of their own."""
        rows = list(objective.params) if rows is None else rows
        cols = list(objective.params) if cols is None else cols
        layouts = ParameterLayout(objective.params, rows), ParameterLayout(objective.params, cols)
        ParameterLinearOperator.__init__(self, settings.dtype, objective.params, *layouts)
        self._set_up_engines(self._kernel(objective, rows, cols), settings)

    def block(self, rows: str | Sequence[str], cols: str | Sequence[str] | None = None) -> Self:
        """Return the operator of the block that the named parameters span.

        Only these parameters take part: layers that none of them influences are run once for each kept batch, and
        no product goes through them again.

        Parameters
        ----------
        rows : str or sequence of str
            Names of parameters of `A`, in the order that the block shall have.
        cols : str or sequence of str, optional
            The same for the columns; by default those of `rows`.

        Raises
        ------
        ValueError
            For a name that is unknown (with the nearest that is known), or stands twice, or where there is none.
        """
        block = type(self).__new__(type(self))
        block._kernel = self._kernel
        row_names = checked_names("rows", rows, self._rows)
        col_names = checked_names("cols", rows if cols is None else cols, self._cols)
        block._setup(self._objective, self._settings, row_names, col_names)
        return block

    def gradient_and_loss(self) -> tuple[NDArray[Any], float]:
        """Return the gradient ``(M,)`` with respect to the row parameters, and the loss, in one pass over the data.

        Both are weighted over the batches as the curvature is: ``cg(A.damped(lam), gradient)`` is a Newton step.

        Raises
        ------
        NonFiniteProductError
            Where one of them is NaN or infinite; the message names the batch.
        """
        gradient, loss = self._gradient()
        return gradient.cpu().numpy(), loss

    def _adjoint(self) -> Self:
        adjoint = super()._adjoint()
        if adjoint is not self:
            adjoint._rows, adjoint._cols = self._cols, self._rows
        return adjoint


def checked_names(what: str, names: str | Sequence[str], layout: ParameterLayout) -> tuple[str, ...]:
    """Return the names of parameters of `layout`, or say what is wrong with them."""
    if not isinstance(names, Iterable):
        raise TypeError(f"{what} is a {type(names).__name__}: pass the name of a parameter, or several")
    names = (names,) if isinstance(names, str) else tuple(names)
    if not names:
        raise ValueError(f"{what} names no parameter: pass one or more of {', '.join(map(repr, layout.names[:10]))}")
    for name in names:
        if name not in layout.slices:
            raise ValueError(unknown_name(what, name, layout.names))
        if names.count(name) > 1:
            raise ValueError(f"{what} names {name!r} twice: leave it out once")
    return names


# Curvature matrices that act through the prediction.


class GGNLikeLinearOperator(CurvatureLinearOperator):
    r"""A matrix :math:`\sum_n J_n^\top M_n J_n` over the examples, with the Jacobian of the prediction."""

    _kernel: Callable[[Any, Sequence[str], Sequence[str]], GGNLikeKernel]

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
            self._retry_on_out_of_memory(lambda: write_diagonal(kernel, self._rows.names, out))
        return out
