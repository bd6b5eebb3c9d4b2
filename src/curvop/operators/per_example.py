"""An operator whose rows are the gradients of the losses of single examples."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from curvop.kernels.factor_kernel import UNKNOWN_ITEMS, UNKNOWN_ROWS, PerExampleKernel, example_counts
from curvop.kernels.functions_objective import FunctionsObjective
from curvop.kernels.model_objective import ModelObjective
from curvop.kernels.objective import BatchWeight
from curvop.operators.engine_operator import Settings
from curvop.operators.jacobian import JacobianLikeLinearOperator
from curvop.operators.keywords import named_keywords

__all__ = ["PerExampleGradientLinearOperator"]


class PerExampleGradientLinearOperator(JacobianLikeLinearOperator):
    r"""Gradients of the losses of single examples, as the rows of a ``LinearOperator`` of shape ``(n_examples, P)``.

    Use it for influence functions, gradient similarity and example selection. ``G @ v`` contains the directional
    derivative of the loss of every example along ``v``. ``G.T @ u`` is a weighted sum of the gradients of all examples.
    Products do not form the gradients. Use `curvop.EFLinearOperator` for the second moment of the gradients, and
    `curvop.JacobianLinearOperator` for the derivatives of predictions.

    .. math:: G = \begin{pmatrix} g_1 & g_2 & \cdots \end{pmatrix}^\top, \qquad
        g_n = \nabla_\theta \ell_n, \qquad L = \frac{1}{W} \sum_n \ell_n,

    Here :math:`\ell_n` is the loss of example n: the sum of those terms of the unreduced loss (``reduction='none'``)
    that belong to the example. W is the number by which the loss of the whole data set is divided. If the loss is a
    sum, W is 1. The rows are in the order of the data, and are not divided by W. Therefore, the gradient of L is the
    sum of all rows, divided by W, and ``G.T @ G / W`` is the empirical Fisher matrix (with ``examples='terms'``). If
    the target of an example is ignored, its row is zero.

    Parameters
    ----------
    model : nn.Module or callable
        A module, called as ``model(X)``, or a function ``(params_dict, X) -> prediction``. If X is a mapping that
        the module does not accept as one argument, the module is called as ``model(**X)`` (see Notes of
        `curvop.HessianLinearOperator`). In most cases, a module should be in evaluation mode (see Warns).
    loss_function : nn.Module or callable
        Function ``(prediction, y) -> scalar``. Its attribute ``reduction`` ('mean' or 'sum') specifies whether the loss
        is a mean or a sum over the batch. If the attribute is missing, 'mean' is assumed. The loss of one example must
        not depend on the other examples.
    params : dict of str to Tensor, or list of the model's own parameters
        Any subset of the model's parameters, either all float32 or all float64. Examples are
        ``dict(model.named_parameters())``, the result of `curvop.select`, or ``model.state_dict()`` of a model without
        buffers. The columns of the matrix follow the order of the parameters. The parameters may have
        ``requires_grad=False``. If a tensor in ``params`` and the module's parameter of the same name have different
        values, the operator uses the values in ``params``. If the parameters are on several devices, batches and
        vectors are moved to the device of the first parameter, and the model must move its intermediate results itself.
    data : iterable of (X, y)
        A list, a ``DataLoader`` or any other iterable that can be read repeatedly and yields the data in the same order
        each time. Iterators that can be read only once are rejected. X and y are tensors, or nested mappings, lists and
        tuples of tensors. All tensors are moved to the device of the parameters. If the model modifies its input, it
        receives copies of the tensors.
    examples : {'terms', 'items'}, default 'terms'
        Defines what an example is. The matrix has one row for each example. With 'terms', the examples are those of
        `curvop.EFLinearOperator`. For ``CrossEntropyLoss`` and ``NLLLoss``, an example is one position for which a
        class is predicted (such as an image, a token or a pixel). For the other loss functions of ``torch.nn``, an
        example is a row of the prediction. For a loss function that is not from ``torch.nn``, each index of the first
        dimension of the prediction is an example. With 'items', each index of the first axis of the batch is an example
        (such as a sequence). The row of this example is the sum of the gradients of all its terms (such as the tokens
        of the sequence). The terms of an item must be consecutive in the prediction (see Notes).
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
        Number of columns of ``X`` that a block product ``G @ X`` processes at once. 'auto' measures the speed for
        several numbers on the first columns, and uses the fastest number. If the number is fixed and the memory is
        sufficient for this number of columns, block products are bitwise reproducible between runs.
    batch_weight : callable, optional
        Function ``batch -> w_b`` that returns the weight of a batch ``(X, y)``. Pass this argument if the loss function
        is not from ``torch.nn`` and does not average over the first dimension. The function must then return the number
        by which the loss function divides. If the loss function is from ``torch.nn`` and divides by a number d that
        differs from w_b, the rows of the batch are multiplied by ``sqrt(w_b / d)``. ``G.T @ G / W`` is then the
        empirical Fisher matrix with the same ``batch_weight``.
    progress : bool or tqdm, default False
        Whether to show a progress bar that counts products. Pass a ``tqdm`` object to use an existing bar.

    Raises
    ------
    TypeError, ValueError
        If an argument is invalid, or if the data are invalid. The message names the argument. The constructor also
        raises an error if ``examples='items'`` and the terms of the loss cannot be assigned to items.
    RuntimeError
        If the loss depends on none of the parameters in ``params``. The first product raises this error.
    NonFiniteProductError
        If a product contains NaN or infinity. The message names the batch.
    NonDeterministicObjectiveError
        If dropout is active, if ``data`` yields the batches in a different order than in the constructor, or if the
        loss has changed since an earlier pass over the data. Products raise this error.

    Warns
    -----
    RuntimeWarning
        An operator and its blocks issue each warning only once. The first product issues a warning if one of the
        following conditions holds:

        - ``torch.autocast`` is enabled and lowers the precision of products.
        - Batch normalization is in training mode and there are several batches. Each batch is then normalized
          separately.
        - The loss of two batches that are evaluated as one batch contradicts their separate losses and weights. Loss
          functions from ``torch.nn`` are not checked for this.

    See Also
    --------
    curvop.EFLinearOperator : Second moment of the gradients.
    curvop.JacobianLinearOperator : Derivatives of the predictions.
    curvop.solve : Solve the linear system of an influence function.

    Notes
    -----
    The constructor counts the examples in one forward pass over the data. A product with G or with its transpose costs
    about two thirds of a gradient of L, counted in floating-point operations. This ratio does not depend on the number
    of examples, for the following reason. Row n is :math:`r_n^\top J_n`, where :math:`J_n` is the Jacobian of the
    prediction for example n, and :math:`r_n` is the derivative of the loss with respect to this prediction. ``G @ v``
    computes the vectors :math:`J_n v` for all n in one Jacobian-vector product. ``G.T @ u`` multiplies the vectors
    :math:`u_n r_n` for all n by the transposed Jacobian in one backward pass. The first product linearizes the
    batches and caches them up to the limit ``cache``. The operator detects in-place changes of the parameters, and
    changes of layers, buffers, training flags and lists of batches (see `curvop.HessianLinearOperator`).

    With ``examples='items'``, the terms of an item must be consecutive in the prediction. The terms are consecutive if
    the first axis of the prediction is that of the batch. They are also consecutive if the model flattens a prediction
    of shape ``(B, T, C)`` to ``(B * T, C)``.

    References
    ----------
    .. [1] P. W. Koh, P. Liang, "Understanding black-box predictions via influence functions", ICML 2017,
       arXiv:1703.04730.

    Examples
    --------
    Compute the influence of each training point on the loss of a test point [1]_. Leaving out training point n changes
    the loss of the test point by approximately ``influence[n]``:

    >>> import torch
    >>> from torch import nn
    >>> from curvop import GGNLinearOperator, PerExampleGradientLinearOperator, solve
    >>> _ = torch.manual_seed(0)
    >>> X = torch.linspace(-1, 1, 6, dtype=torch.float64)[:, None]
    >>> y = 2 * X
    >>> y[4] += 3  # an outlier
    >>> model = nn.Linear(1, 1, dtype=torch.float64)
    >>> with torch.no_grad():  # the least-squares fit
    ...     _ = model.weight.fill_((X * y).sum() / X.square().sum()), model.bias.fill_(y.mean())
    >>> params, loss_function, data = dict(model.named_parameters()), nn.MSELoss(), [(X, y)]
    >>> point = [(torch.ones(1, 1).double(), 2 * torch.ones(1, 1).double())]
    >>> H = GGNLinearOperator(model, loss_function, params, data)
    >>> gradient, _ = GGNLinearOperator(model, loss_function, params, point).gradient_and_loss()
    >>> G = PerExampleGradientLinearOperator(model, loss_function, params, data)
    >>> influence = G @ solve(H, gradient, damping=0.0).solution / len(X)
    >>> int(influence.argmin())
    4
    """

    @named_keywords
    def __init__(
        self,
        model: nn.Module | Callable[[dict[str, Tensor], Any], Any],
        loss_function: Callable[[Any, Any], Tensor],
        params: Mapping[str, Tensor] | Iterable[Tensor],
        data: Iterable[Any],
        *,
        examples: str = "terms",
        dtype: Any = np.float64,
        cache: float | str = "auto",
        engine: str = "autograd",
        columns: int | str = "auto",
        batch_weight: BatchWeight | None = None,
        progress: Any = False,
    ) -> None:
        objective = ModelObjective(model, loss_function, params, data, batch_weight)
        self._set_up_examples(objective, examples, Settings(dtype, cache, engine, columns, progress))

    @classmethod
    @named_keywords
    def from_functions(
        cls,
        predict: Callable[[dict[str, Tensor], Any], Any],
        loss: Callable[[Any, Any], Tensor],
        params: Mapping[str, Tensor],
        data: Iterable[Any],
        *,
        examples: str = "terms",
        dtype: Any = np.float64,
        cache: float | str = "auto",
        engine: str = "autograd",
        columns: int | str = "auto",
        batch_weight: BatchWeight | None = None,
        progress: Any = False,
    ) -> Self:
        """Construct the matrix from two functions: one computes a prediction, and the other computes its loss.

        Use this constructor if the data are not pairs ``(X, y)``, or if the model needs more than one argument. For
        language models, `curvop.huggingface` provides the two functions.

        Parameters
        ----------
        predict : callable
            Function ``(params_dict, batch) -> prediction``.
        loss : callable
            Function ``(prediction, batch) -> scalar``, for example a `curvop.TargetLoss`.
        params : dict of str to Tensor
            Parameters in the order of the columns, either all float32 or all float64.
        data : iterable of batches
            A list, a ``DataLoader`` or any other iterable that can be read repeatedly and yields the batches in the
            same order each time.
        examples, dtype, cache, engine, columns, batch_weight, progress
            As in the constructor.

        Returns
        -------
        PerExampleGradientLinearOperator
            Operator of shape ``(n_examples, P)``.

        Raises
        ------
        TypeError, ValueError, RuntimeError, NonFiniteProductError, NonDeterministicObjectiveError
            Under the same conditions as in the constructor.

        See Also
        --------
        curvop.EFLinearOperator.from_functions : Second moment of the gradients.
        """
        self = cls.__new__(cls)
        objective = FunctionsObjective(predict, loss, params, data, batch_weight)
        self._set_up_examples(objective, examples, Settings(dtype, cache, engine, columns, progress))
        return self

    def _set_up_examples(self, objective: ModelObjective, examples: str, settings: Settings) -> None:
        """Initialize the operator from an objective. All constructors call this method."""
        if examples not in ("terms", "items"):
            raise ValueError(f"examples is {examples!r}, but must be 'terms' or 'items'")
        objective.keep_order()
        with torch.inference_mode(False):
            self._counts = example_counts(objective)
        self._by_item = by_item = examples == "items"
        if by_item and any(items is None for _, items in self._counts):
            raise ValueError(UNKNOWN_ROWS)
        sizes = [count[by_item] or 0 for count in self._counts]
        self._setup(PerExampleKernel(objective, list(objective.params), sizes, by_item), settings)

    @property
    def items(self) -> NDArray[np.intp]:
        """Index of the data item that each row belongs to, as an integer array of shape (n_examples,).

        Each index of the first axis of a batch is a data item. The items of all batches are numbered from 0 in the
        order of the data. If the loss has one term per item, or if ``examples='items'``, the result is
        ``numpy.arange(n_examples)``.

        Raises
        ------
        ValueError
            If the number of terms of a batch is not a multiple of the size of its first axis.
        """
        start, parts = 0, []
        for terms, items in self._counts:
            if items is None:
                raise ValueError(UNKNOWN_ITEMS)
            numbers = np.arange(start, start + items)
            parts.append(numbers if self._by_item or not items else numbers.repeat(terms // items))
            start += items
        return np.concatenate(parts)

    def fingerprint(self, data: bool = True) -> dict[str, str]:
        """Return a dict of digests of all inputs that determine the matrix, including ``examples``.

        Parameters
        ----------
        data : bool, default True
            Whether to include digests of the data, which are computed in one pass over the data.

        Returns
        -------
        parts : dict of str to str
            See `curvop.HessianLinearOperator.fingerprint`.
        """
        examples = "items" if self._by_item else "terms"
        return super().fingerprint(data) | {"examples": examples}
