"""Jacobian of a model's predictions, and its transpose."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Self

import numpy as np
from torch import Tensor, nn

from curvop.kernels.functions_objective import FunctionsObjective
from curvop.kernels.jacobian_kernel import JacobianKernel, over_predictions, prediction_size, prediction_sum
from curvop.kernels.model_objective import ModelObjective
from curvop.kernels.parameters import ParameterLayout
from curvop.operators.engine_operator import EngineLinearOperator, Settings
from curvop.operators.keywords import named_keywords
from curvop.operators.parameter_operator import ParameterVectors
from curvop.operators.selection import selected_names

__all__ = ["JacobianLikeLinearOperator", "JacobianLinearOperator", "TransposedJacobianLinearOperator"]


class JacobianLikeLinearOperator(ParameterVectors, EngineLinearOperator):
    """Base class of operators with one row per prediction or per example, and one column per entry of a parameter.

    The transpose of such an operator has the same base class. Its attribute ``_is_transpose`` is True.
    """

    _is_transpose = False

    def _setup(self, kernel: JacobianKernel, settings: Settings) -> None:
        """Initialize the operator, or its transpose, from the kernel of the matrix with one row per example."""
        shape = (kernel.rows.size, kernel.cols.size)
        super().__init__(settings.dtype, shape[::-1] if self._is_transpose else shape)
        self._untransposed = kernel
        self._params = kernel.objective.params
        self._names = ParameterLayout(self._params, kernel.cols.names)
        self._set_up_engines(kernel.adjoint() if self._is_transpose else kernel, settings)

    @property
    def _row_and_column_layouts(self) -> tuple[ParameterLayout | None, ParameterLayout | None]:
        return (self._names, None) if self._is_transpose else (None, self._names)

    def block(self, params: str | Iterable[str]) -> Self:  # type: ignore[override]  # one axis has parameters
        """Return the columns of the matrix, or the rows of its transpose, for the given parameters.

        Parameters
        ----------
        params : str or iterable of str
            Names of parameters, in the order of the block. The name of a module stands for all its parameters, and a
            glob pattern for all parameters that it matches. The dict that `curvop.select` returns is also accepted.

        Returns
        -------
        operator
            Operator of the same class. It uses the same model and data, but has its own cache.

        Raises
        ------
        KeyError
            If a name is unknown (the message suggests similar names). The error is also a ``ValueError``.
        ValueError
            If a parameter is selected twice, or if no name is given.
        """
        block = copy.copy(self)
        names = selected_names("params", params, self._names.slices, self._params)
        block._setup(self._untransposed.restricted(names), self._settings)
        return block

    def _restricted(self, rows: Sequence[str] | None, cols: Sequence[str] | None) -> Self:
        names = rows if self._is_transpose else cols
        return self if names is None else self.block(names)

    def _adjoint(self) -> Any:
        adjoint = super()._adjoint()
        adjoint._is_transpose = not self._is_transpose
        return adjoint


class _Jacobians(JacobianLikeLinearOperator):
    """Common base class of the Jacobian and the transposed Jacobian, which are two different classes."""

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
        self._set_up_rows(objective, Settings(dtype, cache, engine, columns, progress))

    @classmethod
    @named_keywords
    def from_functions(
        cls,
        predict: Callable[[dict[str, Tensor], Any], Any],
        params: Mapping[str, Tensor],
        data: Iterable[Any],
        *,
        loss: object = None,
        batch_weight: object = None,
        dtype: Any = np.float64,
        cache: float | str = "auto",
        engine: str = "autograd",
        columns: int | str = "auto",
        progress: Any = False,
    ) -> Self:
        """Construct the Jacobian or its transpose from a function that computes the prediction of a batch.

        Use this constructor if the data are not pairs ``(X, y)``, or if the model needs more than one argument. Batches
        may be of any type that the function accepts, such as the dicts of a data collator.

        Parameters
        ----------
        predict : callable
            Function ``(params_dict, batch) -> prediction``. The prediction is a tensor or a nested structure of
            tensors, which are flattened and concatenated. To evaluate a module, use
            ``torch.func.functional_call(model, params_dict, ...)``.
        params : dict of str to Tensor
            Parameters in the order of the columns of the Jacobian, either all float32 or all float64. The parameters
            may have ``requires_grad=False``.
        data : iterable of batches
            A list, a ``DataLoader`` or any other iterable that can be read repeatedly and yields the batches in the
            same order each time. The tensors of a batch are moved to the device of the parameters.
        loss, batch_weight : object, optional
            Ignored, because a Jacobian has no loss. The two arguments are accepted so that all operators can be
            constructed from the same dict of arguments, such as the result of `curvop.huggingface.causal_lm`.
        dtype, cache, engine, columns, progress
            As in the constructor.

        Returns
        -------
        operator
            Operator of the class on which the method was called.

        Raises
        ------
        TypeError, ValueError, RuntimeError, NonFiniteProductError, NonDeterministicObjectiveError
            Under the same conditions as in the constructor.

        See Also
        --------
        curvop.GGNLinearOperator.from_functions : GGN of a prediction and a loss.

        Examples
        --------
        >>> import torch
        >>> from curvop import JacobianLinearOperator
        >>> params = {"w": torch.tensor([1.0, 2.0], dtype=torch.float64)}
        >>> data = [{"inputs": torch.tensor([[3.0, 4.0]], dtype=torch.float64)}]
        >>> J = JacobianLinearOperator.from_functions(lambda p, batch: batch["inputs"] @ p["w"] ** 2, params, data)
        >>> J @ [1.0, 1.0]
        array([22.])
        """
        self = cls.__new__(cls)
        objective = FunctionsObjective(predict, prediction_sum, params, data)
        self._set_up_rows(objective, Settings(dtype, cache, engine, columns, progress))
        return self

    def _set_up_rows(self, objective: ModelObjective, settings: Settings) -> None:
        """Initialize the operator. Read the data once, to count the predictions of each batch."""
        objective.keep_order()
        sizes = over_predictions(objective, prediction_size)
        self._setup(JacobianKernel(objective, list(objective.params), sizes), settings)

    def _adjoint(self) -> Any:
        adjoint = super()._adjoint()
        adjoint.__class__ = JacobianLinearOperator if self._is_transpose else TransposedJacobianLinearOperator
        return adjoint


class JacobianLinearOperator(_Jacobians):
    r"""Jacobian of a model's predictions over a data set, as a ``LinearOperator`` of shape ``(N_out, P)``.

    Use it for neural tangent kernels (``J @ J.T`` is the empirical kernel), and for singular values and least-squares
    problems of linearized models. SciPy's ``svds``, ``lsmr`` and ``lsqr`` accept the operator directly. Use
    `curvop.GGNLinearOperator` for the matrix :math:`J^\top H J`, where H is the Hessian of a loss with respect to the
    predictions.

    .. math:: J = \frac{\partial \, (z_1, z_2, \ldots)}{\partial \theta},

    where :math:`z_b` are the flattened predictions of batch :math:`b`. J is not scaled: ``J.T @ J`` is a sum over the
    data set and not a mean.

    Parameters
    ----------
    model : nn.Module or callable
        A module, called as ``model(X)``, or a function ``(params_dict, X) -> prediction``. If X is a mapping that
        the module does not accept as one argument, the module is called as ``model(**X)`` (see Notes of
        `curvop.HessianLinearOperator`). In most cases, a module should be in evaluation mode (see Warns). A prediction
        is a tensor or a nested structure of tensors, which are flattened and concatenated.
    params : dict of str to Tensor, or list of the model's own parameters
        Any subset of the model's parameters, either all float32 or all float64. Examples are
        ``dict(model.named_parameters())``, the result of `curvop.select`, or ``model.state_dict()`` of a model without
        buffers. The columns of the matrix follow the order of the parameters. The parameters may have
        ``requires_grad=False``. If a tensor in ``params`` and the module's parameter of the same name have different
        values, the operator uses the values in ``params``. If the parameters are on several devices, batches and
        vectors are moved to the device of the first parameter, and the model must move its intermediate results itself.
    data : iterable of (X, y)
        A list, a ``DataLoader`` or any other iterable that can be read repeatedly and yields the data in the same order
        each time. Iterators that can be read only once are rejected. X is a tensor, or a nested mapping, list or tuple
        of tensors. All tensors are moved to the device of the parameters. If the model modifies its input, it receives
        copies of the tensors. y is ignored.
    dtype : numpy.float64 or numpy.float32, default numpy.float64
        Data type of the NumPy vectors that SciPy receives. Products are computed in the data type of the parameters.
    cache : float or 'auto', default 'auto'
        Memory budget in bytes for linearized batches that are kept between products. 0 disables the cache. 'auto'
        allows half of the memory that is free on the device at the first product. Batches that exceed the budget are
        linearized again in every product. Each block of the matrix has its own budget.
    engine : {'autograd', 'compiled'}, default 'autograd'
        'autograd' computes products by backward passes through retained autograd graphs. 'compiled' traces a product
        once for each batch shape, separates the operations that depend on the vector from those that do not, and
        compiles both groups of operations. The compilation during the first product takes between a few seconds and a
        minute. Later products are usually faster than with 'autograd'. The first product of each compiled program is
        compared with the product that 'autograd' computes. If compilation fails or the products differ, a warning gives
        the reason and 'autograd' is used.
    columns : int or 'auto', default 'auto'
        Number of columns of ``X`` that a block product ``J @ X`` processes at once. 'auto' measures the speed for
        several numbers on the first columns, and uses the fastest number. If the number is fixed and the memory is
        sufficient for this number of columns, block products are bitwise reproducible between runs.
    progress : bool or tqdm, default False
        Whether to show a progress bar that counts products. Pass a ``tqdm`` object to use an existing bar.

    Raises
    ------
    TypeError, ValueError
        If an argument or the data are invalid. The message names the argument.
    RuntimeError
        If the predictions depend on none of the parameters in ``params``. The first product raises this error.
    NonFiniteProductError
        If a product contains NaN or infinity. The message names the batch.
    NonDeterministicObjectiveError
        If dropout is active, if ``data`` yields the batches in a different order than in the constructor, or if the
        predictions have changed since an earlier pass over the data. Products raise this error.

    Warns
    -----
    RuntimeWarning
        An operator and its blocks issue each warning only once. The first product issues a warning if one of the
        following conditions holds:

        - ``torch.autocast`` is enabled and lowers the precision of products.
        - Batch normalization is in training mode and there are several batches. Each batch is then normalized
          separately.

    See Also
    --------
    curvop.TransposedJacobianLinearOperator : The transpose, which ``J.T`` returns.
    curvop.GGNLinearOperator : Generalized Gauss-Newton matrix.

    Notes
    -----
    The constructor counts the predictions in one forward pass over the data. A product with J or its transpose costs
    about two thirds of a gradient, counted in floating-point operations. The first product linearizes the batches and
    caches them up to the limit ``cache``. The operator detects in-place changes of the parameters, and changes of
    layers, buffers, training flags and lists of batches (see `curvop.HessianLinearOperator`). Jacot et al. [1]_
    introduced the neural tangent kernel.

    References
    ----------
    .. [1] A. Jacot, F. Gabriel, C. Hongler, "Neural tangent kernel: convergence and generalization in neural networks",
       Advances in Neural Information Processing Systems 31, 2018, arXiv:1806.07572.

    Examples
    --------
    Construct the empirical neural tangent kernel of 5 points. The product of the kernel and the vector of residuals is
    the direction in which gradient flow changes the predictions:

    >>> import torch
    >>> from scipy.sparse.linalg import svds
    >>> from torch import nn
    >>> from curvop import JacobianLinearOperator
    >>> _ = torch.manual_seed(0)
    >>> X = torch.linspace(-1, 1, 5, dtype=torch.float64)[:, None]
    >>> model = nn.Sequential(nn.Linear(1, 8), nn.Tanh(), nn.Linear(8, 1)).double()
    >>> J = JacobianLinearOperator(model, dict(model.named_parameters()), [(X, None)])
    >>> J.shape
    (5, 25)
    >>> K = J @ J.T
    >>> residuals = (X.cos() - model(X)).detach().numpy()[:, 0]
    >>> (K @ residuals).round(1)
    array([10.6, 10.7, 10.5, 10. ,  9.5])

    The squared singular values of J are the eigenvalues of K. Under gradient flow on half the sum of squared residuals,
    these eigenvalues are the rates at which the residuals decrease along the eigenvectors of K. The largest singular
    values are:

    >>> svds(J, k=3, rng=0, return_singular_vectors=False)[::-1].round(2)
    array([3.44, 2.02, 0.18])
    """


class TransposedJacobianLinearOperator(_Jacobians):
    r"""Transposed Jacobian of a model's predictions, as a ``LinearOperator`` of shape ``(P, N_out)``.

    In most cases, construct a `curvop.JacobianLinearOperator` ``J`` and use ``J.T``, which returns this operator. ``J``
    and ``J.T`` share their cached linearizations. Construct the operator directly if you need only the transpose.

    .. math:: J^\top = \left( \frac{\partial \, (z_1, z_2, \ldots)}{\partial \theta} \right)^{\!\top},

    where :math:`z_b` are the flattened predictions of batch :math:`b`. The matrix is not scaled.

    Parameters
    ----------
    model : nn.Module or callable
        A module, called as ``model(X)``, or a function ``(params_dict, X) -> prediction``. If X is a mapping that
        the module does not accept as one argument, the module is called as ``model(**X)`` (see Notes of
        `curvop.HessianLinearOperator`). In most cases, a module should be in evaluation mode (see Warns). A prediction
        is a tensor or a nested structure of tensors, which are flattened and concatenated.
    params : dict of str to Tensor, or list of the model's own parameters
        Any subset of the model's parameters, either all float32 or all float64. Examples are
        ``dict(model.named_parameters())``, the result of `curvop.select`, or ``model.state_dict()`` of a model without
        buffers. The rows of the matrix follow the order of the parameters. The parameters may have
        ``requires_grad=False``. If a tensor in ``params`` and the module's parameter of the same name have different
        values, the operator uses the values in ``params``. If the parameters are on several devices, batches and
        vectors are moved to the device of the first parameter, and the model must move its intermediate results itself.
    data : iterable of (X, y)
        A list, a ``DataLoader`` or any other iterable that can be read repeatedly and yields the data in the same order
        each time. Iterators that can be read only once are rejected. X is a tensor, or a nested mapping, list or tuple
        of tensors. All tensors are moved to the device of the parameters. If the model modifies its input, it receives
        copies of the tensors. y is ignored.
    dtype : numpy.float64 or numpy.float32, default numpy.float64
        Data type of the NumPy vectors that SciPy receives. Products are computed in the data type of the parameters.
    cache : float or 'auto', default 'auto'
        Memory budget in bytes for linearized batches that are kept between products. 0 disables the cache. 'auto'
        allows half of the memory that is free on the device at the first product. Batches that exceed the budget are
        linearized again in every product. Each block of the matrix has its own budget.
    engine : {'autograd', 'compiled'}, default 'autograd'
        'autograd' computes products by backward passes through retained autograd graphs. 'compiled' traces a product
        once for each batch shape, separates the operations that depend on the vector from those that do not, and
        compiles both groups of operations. The compilation during the first product takes between a few seconds and a
        minute. Later products are usually faster than with 'autograd'. The first product of each compiled program is
        compared with the product that 'autograd' computes. If compilation fails or the products differ, a warning gives
        the reason and 'autograd' is used.
    columns : int or 'auto', default 'auto'
        Number of columns of ``X`` that a block product ``JT @ X`` processes at once. 'auto' measures the speed for
        several numbers on the first columns, and uses the fastest number. If the number is fixed and the memory is
        sufficient for this number of columns, block products are bitwise reproducible between runs.
    progress : bool or tqdm, default False
        Whether to show a progress bar that counts products. Pass a ``tqdm`` object to use an existing bar.

    Raises
    ------
    TypeError, ValueError
        If an argument or the data are invalid. The message names the argument.
    RuntimeError
        If the predictions depend on none of the parameters in ``params``. The first product raises this error.
    NonFiniteProductError
        If a product contains NaN or infinity. The message names the batch.
    NonDeterministicObjectiveError
        If dropout is active, if ``data`` yields the batches in a different order than in the constructor, or if the
        predictions have changed since an earlier pass over the data. Products raise this error.

    Warns
    -----
    RuntimeWarning
        An operator and its blocks issue each warning only once. The first product issues a warning if one of the
        following conditions holds:

        - ``torch.autocast`` is enabled and lowers the precision of products.
        - Batch normalization is in training mode and there are several batches. Each batch is then normalized
          separately.

    See Also
    --------
    curvop.JacobianLinearOperator : The Jacobian itself, which ``JT.T`` returns.

    Notes
    -----
    The constructor counts the predictions in one forward pass over the data. A product costs about two thirds of a
    gradient, counted in floating-point operations.

    Examples
    --------
    The product with a vector of residuals is the gradient of half the sum of the squared residuals:

    >>> import numpy as np
    >>> import torch
    >>> from curvop import TransposedJacobianLinearOperator
    >>> model = torch.nn.Linear(2, 1, bias=False, dtype=torch.float64)
    >>> X = torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]], dtype=torch.float64)
    >>> JT = TransposedJacobianLinearOperator(model, dict(model.named_parameters()), [(X, None)])
    >>> JT @ np.array([1.0, 0.0, -1.0])
    array([-4., -4.])
    """

    _is_transpose = True
