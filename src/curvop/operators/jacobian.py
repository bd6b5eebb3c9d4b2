"""The Jacobian of a model's predictions, and its transpose."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from curvop.kernels.jacobian_kernel import JacobianKernel, prediction_sizes, prediction_sum
from curvop.kernels.model_objective import ModelObjective
from curvop.kernels.parameters import ParameterLayout
from curvop.operators.curvature_operator import checked_names
from curvop.operators.engine_operator import EngineLinearOperator, Settings
from curvop.operators.parameter_operator import ParameterVectors, touched
from curvop.operators.validation import named_keywords

__all__ = ["JacobianLinearOperator", "TransposedJacobianLinearOperator"]


class _Jacobians(ParameterVectors, EngineLinearOperator):
    """What the Jacobian and its transpose share."""

    _flips: bool

    @named_keywords
    def __init__(
        self,
        model: nn.Module | Callable[[dict[str, Tensor], Any], Any],
        params: Mapping[str, Tensor] | Iterable[Tensor],
        data: Iterable[Any],
        *,
        dtype: Any = np.float64,
        cache: float | str = "auto",
        engine: str = "autograd",
        columns: int | str = "auto",
        progress: Any = False,
    ) -> None:
        objective = ModelObjective(model, prediction_sum, params, data)
        objective.keep_order()
        settings = Settings(dtype, cache, engine, columns, progress)
        self._setup(objective, settings, list(objective.params), prediction_sizes(objective))

    def _setup(self, objective: Any, settings: Settings, names: Sequence[str], sizes: Sequence[int]) -> None:
        kernel = JacobianKernel(objective, names, sizes)
        shape = (kernel.rows.size, kernel.cols.size)
        super().__init__(settings.dtype, shape[::-1] if self._flips else shape)
        self._sizes = sizes
        self._params = objective.params
        self._names = ParameterLayout(objective.params, names)
        self._set_up_engines(kernel.adjoint() if self._flips else kernel, settings)

    @property
    def _layout(self) -> ParameterLayout:
        return self._names

    @property
    def _parts(self) -> tuple[ParameterLayout | None, ParameterLayout | None]:
        return (self._names, None) if self._flips else (None, self._names)

    def block(self, params: str | Sequence[str]) -> Self:
        """Return the operator by the named parameters alone: columns of J, rows of its transpose.

        Parameters
        ----------
        params : str or sequence of str
            In the order that the block shall have.

        Raises
        ------
        ValueError
            For a name that is unknown (with the nearest that is known), or stands twice, or where there is none.
        """
        block = type(self).__new__(type(self))
        names = checked_names("params", params, self._names)
        block._setup(self._objective, self._settings, names, self._sizes)
        return block

    def blocks(self) -> Iterator[Self]:
        """Iterate over the blocks of the parameters, one each."""
        return map(self.block, self._names.names)

    def _adjoint(self) -> Any:
        adjoint = super()._adjoint()
        adjoint.__class__ = JacobianLinearOperator if self._flips else TransposedJacobianLinearOperator
        return adjoint

    def _block_of(
        self, rows: NDArray[np.intp], cols: NDArray[np.intp]
    ) -> tuple[_Jacobians, NDArray[np.intp], NDArray[np.intp]]:
        names, idxs = touched(self._names, rows if self._flips else cols)
        rows, cols = (idxs, cols) if self._flips else (rows, idxs)
        return (self if names == self._names.names else self.block(names)), rows, cols


class JacobianLinearOperator(_Jacobians):
    r"""The Jacobian of the predictions as a ``LinearOperator`` of shape ``(N_out, P)``.

    .. math:: J = \frac{\partial \, (z_1, z_2, \ldots)}{\partial \theta},

    with the predictions of all batches, flattened, in the order of the data. It is not divided by anything.
    ``J @ J.T`` is the empirical neural tangent kernel; ``svds``, ``lsmr`` and ``lsqr`` take J as it is. A product with
    J, or with its transpose, costs about two thirds of a gradient.

    Its constructor reads the data once, to count the predictions: one forward pass.

    Parameters
    ----------
    model, params, dtype, cache, engine, columns, progress
        As for `HessianLinearOperator`. A prediction may be a tensor or a tree of tensors, one after another.
    data : iterable of (X, y)
        As for `HessianLinearOperator`, in the same order each time; `y` is not looked at.

    Raises
    ------
    TypeError, ValueError
        As for `HessianLinearOperator`.
    NonDeterministicObjectiveError
        By a product, where a loader yields the data in another order than for the constructor.

    References
    ----------
    Jacot, Gabriel, Hongler (2018), "Neural tangent kernel: convergence and generalization in neural networks".

    Examples
    --------
    >>> import torch
    >>> model = torch.nn.Linear(2, 1, bias=False, dtype=torch.float64)
    >>> X, y = torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]], dtype=torch.float64), None
    >>> J = JacobianLinearOperator(model, dict(model.named_parameters()), [(X, y)])
    >>> J @ [1.0, 0.0]
    array([1., 3., 5.])
    """

    _flips = False


class TransposedJacobianLinearOperator(_Jacobians):
    r"""The transpose of the Jacobian of the predictions, of shape ``(P, N_out)``: parameters by predictions.

    ``J.T`` of a `JacobianLinearOperator` is one, too, and shares with it what is kept. See there for the arguments.
    """

    _flips = True
