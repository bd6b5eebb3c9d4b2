"""Fisher matrices: second moments of per-example gradients."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Self, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from curvop.kernels.errors import NotFactorableError
from curvop.kernels.fisher_kernel import EmpiricalFisherKernel, SampledFisherKernel, gradient_sum
from curvop.kernels.functions_objective import FunctionsObjective
from curvop.kernels.ggn_kernel import GGNKernel
from curvop.kernels.losses import Likelihood
from curvop.kernels.model_objective import ModelObjective
from curvop.kernels.objective import BatchWeight
from curvop.kernels.parameters import ParameterLayout
from curvop.kernels.reference import GRADIENT, Route
from curvop.operators.base import Rows
from curvop.operators.curvature_operator import GGNLikeLinearOperator
from curvop.operators.engine_operator import Settings
from curvop.operators.gram import GramLinearOperator
from curvop.operators.keywords import named_keywords
from curvop.operators.transfer import aligned
from curvop.operators.validation import random_generator

__all__ = ["EFLinearOperator", "FisherLinearOperator", "GradientCovarianceLinearOperator"]


class EFLinearOperator(GGNLikeLinearOperator):
    r"""Empirical Fisher matrix, as a symmetric ``LinearOperator`` of shape ``(P, P)``.

    The empirical Fisher matrix is the uncentered second moment of the per-example gradients, and is positive
    semi-definite. Use it for statistics of the per-example gradients. The empirical Fisher matrix differs from the
    Fisher matrix: its targets are taken from the data and not drawn from the model. Use `curvop.FisherLinearOperator`
    for natural gradient steps, and `curvop.GradientCovarianceLinearOperator` to study the noise of stochastic
    gradients.

    .. math:: F = \frac{1}{W} \sum_n g_n g_n^\top,

    where :math:`g_n` is the gradient of the loss of example :math:`n`. The loss of an example is the sum of its terms
    in the unreduced loss (``reduction='none'``). For ``CrossEntropyLoss`` and ``NLLLoss``, an example is one position
    for which a class is predicted (such as an image, a token or a pixel). The other loss functions of ``torch.nn`` have
    one term per entry of the prediction. For these loss functions, an example is a row of the prediction, that is, all
    entries along its last axis. For a loss function that is not from ``torch.nn``, each index of the first dimension of
    the prediction is an example.

    If the loss is a mean, the sum over all examples is divided by :math:`W = \sum_b w_b`. The weight :math:`w_b` of
    batch b is the number by which the loss function divides the sum over the batch. Depending on the loss function,
    this divisor is the number of elements, the number of targets that are not ignored, or the sum of the class weights
    of these targets. If the loss is a sum, W is 1.

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
        buffers. The rows and columns of the matrix follow the order of the parameters. The parameters may have
        ``requires_grad=False``. If a tensor in ``params`` and the module's parameter of the same name have different
        values, the operator uses the values in ``params``. If the parameters are on several devices, batches and
        vectors are moved to the device of the first parameter, and the model must move its intermediate results itself.
    data : iterable of (X, y)
        A list, a ``DataLoader`` or any other iterable that can be read repeatedly. Iterators that can be read only once
        are rejected. X and y are tensors, or nested mappings, lists and tuples of tensors. All tensors are moved to the
        device of the parameters. If the model modifies its input, it receives copies of the tensors.
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
        Number of columns of ``X`` that a block product ``F @ X`` processes at once. 'auto' measures the speed for
        several numbers on the first columns, and uses the fastest number. If the number is fixed and the memory is
        sufficient for this number of columns, block products are bitwise reproducible between runs.
    batch_weight : callable, optional
        Function ``batch -> w_b`` that returns the weight of a batch ``(X, y)``. If the loss function is from
        ``torch.nn``, the default weight is the number by which the loss function divides the sum over the batch. For
        any other loss function, the default weight is the batch size, which is the size of the first dimension of the
        tensors in X and y. If X and y are lists with one entry for each example, the batch size is their length.
    progress : bool or tqdm, default False
        Whether to show a progress bar that counts products. Pass a ``tqdm`` object to use an existing bar.

    Raises
    ------
    TypeError, ValueError
        If an argument is invalid. The message names the argument. The constructor does not read the data. Therefore,
        invalid data raise an error in the first product. The first product also raises an error if the size of a batch
        is needed but unknown, or if the loss function uses a tensor of ``params`` directly (for example, through a
        closure) and not through the model.
    RuntimeError
        If the loss depends on none of the parameters in ``params``. The first product raises this error.
    NonFiniteProductError
        If a product contains NaN or infinity. The message names the batch.
    NonDeterministicObjectiveError
        If dropout is active, or if the loss has changed since an earlier pass over the data.

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
        - A ``DataLoader`` draws a different subset of its data set in each pass.

        `curvop.check` detects more problems.

    See Also
    --------
    curvop.FisherLinearOperator : Fisher matrix, with targets drawn from the model.
    curvop.GradientCovarianceLinearOperator : Centered second moment.
    curvop.GGNLinearOperator : Generalized Gauss-Newton matrix.

    Notes
    -----
    Counted in floating-point operations, a product costs about 4/3 of a gradient. Per-example gradients are not formed.
    ``F.diagonal()`` is exact and takes one pass over the data.

    Even if the model fits the data well, the empirical Fisher matrix is in general not close to the Fisher matrix [1]_.
    For ``MSELoss`` and predictions with N rows and C columns, there are N examples, but the divisor W is the number of
    entries, ``N * C``.

    References
    ----------
    .. [1] F. Kunstner, P. Hennig, L. Balles, "Limitations of the empirical Fisher approximation for natural gradient
       descent", Advances in Neural Information Processing Systems 32, 2019, eq. (3), arXiv:1905.12558.

    Examples
    --------
    The trace is the mean of the squared norms of the per-example gradients, here for a linear regression with 3 data
    points:

    >>> import numpy as np
    >>> import torch
    >>> from torch import nn
    >>> from curvop import EFLinearOperator
    >>> model = nn.Linear(2, 1, bias=False, dtype=torch.float64)
    >>> _ = nn.init.ones_(model.weight)
    >>> X = torch.tensor([[1.0, 0.0], [0.0, 2.0], [1.0, 1.0]], dtype=torch.float64)
    >>> y = torch.zeros(3, 1, dtype=torch.float64)
    >>> F = EFLinearOperator(model, nn.MSELoss(), dict(model.named_parameters()), [(X, y)])
    >>> gradients = (2 * (model(X) - y) * X).detach()
    >>> round(float(np.trace(F @ np.eye(2))), 6)
    33.333333
    >>> round(float(gradients.square().sum(1).mean()), 6)
    33.333333
    """

    _kernel = EmpiricalFisherKernel


class GradientCovarianceLinearOperator(EFLinearOperator):
    r"""Covariance of the per-example gradients, as a symmetric ``LinearOperator`` of shape ``(P, P)``.

    Use it to study the noise of stochastic gradient descent. The matrix is the centered counterpart of
    `curvop.EFLinearOperator`, and is positive semi-definite.

    .. math::

        C = \frac{1}{W} \sum_n (g_n - \bar g) (g_n - \bar g)^\top = F - \frac{N}{W} \, \bar g \bar g^\top, \qquad
        \bar g = \frac{1}{N} \sum_n g_n,

    where :math:`F` is the empirical Fisher matrix and :math:`g_n` is the gradient of the loss of example :math:`n`. The
    loss of an example is the sum of its terms in the unreduced loss (``reduction='none'``). For ``CrossEntropyLoss``
    and ``NLLLoss``, an example is one position for which a class is predicted (such as an image, a token or a pixel).
    The other loss functions of ``torch.nn`` have one term per entry of the prediction. For these loss functions, an
    example is a row of the prediction, that is, all entries along its last axis. For a loss function that is not from
    ``torch.nn``, each index of the first dimension of the prediction is an example. N is the number of examples. If a
    loss function of ``torch.nn`` ignores the target of an example, the example is not counted.

    If the loss is a mean, the sum over all examples is divided by :math:`W = \sum_b w_b`. The weight :math:`w_b` of
    batch b is the number by which the loss function divides the sum over the batch. Depending on the loss function,
    this divisor is the number of elements, the number of targets that are not ignored, or the sum of the class weights
    of these targets. If the loss is a sum, W is 1. If the loss is a mean over the examples (for example, cross-entropy
    without class weights), W equals N. In this case, the gradient of a batch of B examples that are drawn with
    replacement has the covariance C / B.

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
        buffers. The rows and columns of the matrix follow the order of the parameters. The parameters may have
        ``requires_grad=False``. If a tensor in ``params`` and the module's parameter of the same name have different
        values, the operator uses the values in ``params``. If the parameters are on several devices, batches and
        vectors are moved to the device of the first parameter, and the model must move its intermediate results itself.
    data : iterable of (X, y)
        A list, a ``DataLoader`` or any other iterable that can be read repeatedly. Iterators that can be read only once
        are rejected. X and y are tensors, or nested mappings, lists and tuples of tensors. All tensors are moved to the
        device of the parameters. If the model modifies its input, it receives copies of the tensors.
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
        Number of columns of ``X`` that a block product ``C @ X`` processes at once. 'auto' measures the speed for
        several numbers on the first columns, and uses the fastest number. If the number is fixed and the memory is
        sufficient for this number of columns, block products are bitwise reproducible between runs.
    batch_weight : callable, optional
        Function ``batch -> w_b`` that returns the weight of a batch ``(X, y)``. If the loss function is from
        ``torch.nn``, the default weight is the number by which the loss function divides the sum over the batch. For
        any other loss function, the default weight is the batch size, which is the size of the first dimension of the
        tensors in X and y. If X and y are lists with one entry for each example, the batch size is their length.
    progress : bool or tqdm, default False
        Whether to show a progress bar that counts products. Pass a ``tqdm`` object to use an existing bar.

    Raises
    ------
    TypeError, ValueError
        If an argument is invalid. The message names the argument. The constructor does not read the data. Therefore,
        invalid data raise an error in the first product. The first product also raises an error if the size of a batch
        is needed but unknown, or if the loss function uses a tensor of ``params`` directly (for example, through a
        closure) and not through the model.
    RuntimeError
        If the loss depends on none of the parameters in ``params``. The first product raises this error.
    NonFiniteProductError
        If a product contains NaN or infinity. The message names the batch.
    NonDeterministicObjectiveError
        If dropout is active, or if the loss has changed since an earlier pass over the data.

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
        - A ``DataLoader`` draws a different subset of its data set in each pass.

        `curvop.check` detects more problems.

    See Also
    --------
    curvop.EFLinearOperator : Uncentered second moment.
    curvop.HessianLinearOperator : Curvature of the mean loss.

    Notes
    -----
    A product costs about 4/3 of a gradient, counted in floating-point operations. One more pass over the data is needed
    to compute the mean gradient, in the first product and in the first product after each change of the parameters. The
    contribution of the mean gradient is subtracted in double precision. If the mean gradient is much larger than the
    noise, the accuracy of the result is limited by the precision in which the model is evaluated.

    Thomas et al. [1]_ relate the matrix to the Hessian and to generalization. The example below computes the "simple
    noise scale" of McCandlish et al. [2]_, which estimates the batch size above which larger batches improve training
    only slightly.

    References
    ----------
    .. [1] V. Thomas et al., "On the interplay between noise and curvature and its effect on optimization and
       generalization", AISTATS 2020, section 2, arXiv:1906.07774.
    .. [2] S. McCandlish, J. Kaplan, D. Amodei, "An empirical model of large-batch training", 2018, arXiv:1812.06162.

    Examples
    --------
    Divide the trace of the covariance by the squared norm of the gradient:

    >>> import torch
    >>> from torch import nn
    >>> from curvop import GradientCovarianceLinearOperator
    >>> _ = torch.manual_seed(0)
    >>> X = torch.randn(60, 4, dtype=torch.float64)
    >>> y = (X[:, 0] * X[:, 1] > 0).long()
    >>> model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2)).double()
    >>> params = dict(model.named_parameters())
    >>> data = list(zip(X.split(25), y.split(25)))
    >>> C = GradientCovarianceLinearOperator(model, nn.CrossEntropyLoss(), params, data)
    >>> gradient, loss = C.gradient_and_loss()
    >>> print(f"{C.diagonal().sum() / (gradient @ gradient):.1f} examples")
    59.7 examples
    """

    _objective: ModelObjective
    _mean: tuple[int, dict[str, Tensor], float, float] | None = None

    def diagonal(self) -> NDArray[Any]:
        """Compute the exact diagonal in two passes over the data.

        Returns
        -------
        diagonal : ndarray, shape (N,)
            Diagonal in the dtype of the operator. N is the number of rows.

        Raises
        ------
        NotImplementedError
            If the exact diagonal cannot be computed. The reason can be that the model or the loss couples the examples
            (for example, by batch normalization in training mode). It can also be that torch cannot vectorize the model
            over the examples (for example, if it has recurrent layers), or that a prediction consists of several
            tensors. Use `curvop.spectrum.diagonal` to estimate the diagonal.
        NonFiniteProductError
            If the diagonal contains NaN or infinity. The message names the batch.
        ValueError
            If the rows and columns are different parameters.

        Notes
        -----
        The cost is one backward pass per example, vectorized over the examples, and one gradient. The number of
        backward passes does not depend on the number of parameters.
        """
        diagonal = self._diagonal()
        # Compute the mean gradient again and do not cache it, because only products detect changes of the parameters.
        self._mean = None
        row_sum, col_sum, divisor, count = self._gradient_sum()
        self._mean = None
        diagonal -= row_sum * col_sum / (divisor * count)
        return diagonal.cpu().numpy().astype(self.dtype, copy=False)

    def gram(self) -> GramLinearOperator:
        """Raise a ``NotFactorableError``, because the mean gradient couples all examples.

        Raises
        ------
        NotFactorableError
            Always. Use ``EFLinearOperator(...).gram()`` for the uncentered second moment.
        """
        raise NotFactorableError(
            "a GradientCovarianceLinearOperator has no factor with one row per example, because the mean gradient is "
            "subtracted from every row: use EFLinearOperator for the second moment that is not centered"
        )

    def other_routes(self, vector: NDArray[Any]) -> list[Route]:
        """Compute a product by independent methods.

        `curvop.check` compares the products of the operator with these results.

        Parameters
        ----------
        vector : ndarray, shape (N,)
            Vector to multiply.

        Returns
        -------
        list of Route
            One entry for each method that computes the product, and one entry for the gradient. One method is forward
            mode (in float64, if torch supports it). Another method computes finite differences of the unmodified model
            and loss function. The contribution of the mean gradient is subtracted from each product. For the finite
            differences, the mean gradient is also computed with the unmodified model and loss function.
        """
        row_sum, col_sum, divisor, count = self._gradient_sum()
        along = col_sum @ torch.tensor(vector, dtype=torch.float64, device=col_sum.device)
        mean_product = row_sum * along / (divisor * count)

        def centered(route: Route) -> Route:
            if route.name == GRADIENT:
                return route
            means = route.own.centered if route.own is not None else [mean_product]
            products = zip(route.products, means, strict=False)
            return dataclasses.replace(route, products=tuple(product - mean for product, mean in products))

        return [centered(route) for route in super().other_routes(vector)]

    def _adjoint(self) -> Any:
        adjoint = super()._adjoint()
        if adjoint is not self:
            adjoint._mean = None  # its validity depends on a count of passes, and each engine has its own count
        return adjoint

    def __getstate__(self) -> dict[str, object]:
        return cast("dict[str, object]", super().__getstate__()) | {"_mean": None}

    def _apply(self, rows: Rows) -> Rows:
        # The contribution of the mean gradient is subtracted in double precision, because the difference can be much
        # smaller than the two terms.
        vectors: Any = aligned(rows.double().contiguous()) if isinstance(rows, Tensor) else rows.astype(np.float64)
        products: Any = super()._apply(vectors)
        row_sum, col_sum, divisor, count = self._gradient_sum()
        if isinstance(rows, Tensor):
            along = vectors @ col_sum.to(products.device) / (divisor * count)
            return cast("Tensor", products - along[:, None] * row_sum.to(products.device)).to(rows.dtype)
        products -= (vectors @ col_sum.cpu().numpy() / (divisor * count))[:, None] * row_sum.cpu().numpy()
        return cast("Rows", products.astype(self._product_dtype(rows.dtype), copy=False))

    def _gradient_sum(self) -> tuple[Tensor, Tensor, float, float]:
        """Return (row_sum, col_sum, W, N), where ``row_sum`` and ``col_sum`` are sums of the gradients of all examples.

        ``row_sum`` is the sum of the gradients with respect to the row parameters, and ``col_sum`` is the sum of the
        gradients with respect to the column parameters. W is the divisor of the matrix, and N is the number of
        examples.
        """
        with torch.inference_mode(False):
            if self._mean is None or self._mean[0] != self._engine.first_passes:
                names = list(dict.fromkeys((*self._rows.names, *self._cols.names)))
                layout = ParameterLayout(self._objective.params, names)
                total = torch.empty(layout.size, dtype=torch.float64, device=self._objective.device)
                divisor, count = gradient_sum(self._objective, names, total)
                sums = dict(zip(names, layout.split(total), strict=True))
                self._mean = self._engine.first_passes, sums, divisor, count
            _, sums, divisor, count = self._mean
            row_sum, col_sum = (
                torch.cat([sums[name].reshape(-1) for name in layout.names]) for layout in (self._rows, self._cols)
            )
            return row_sum, col_sum, divisor, count


class FisherLinearOperator(GGNLikeLinearOperator):
    r"""Fisher matrix of the likelihood that defines a loss, as a symmetric ``LinearOperator`` of shape ``(P, P)``.

    Use it for natural gradient steps and Laplace approximations. For all supported loss functions, the exact matrix
    (``mc_samples=0``) equals the generalized Gauss-Newton matrix (`curvop.GGNLinearOperator`). If ``mc_samples`` is
    positive, the operator is a Monte Carlo estimate of this matrix. Many published approximations are based on such an
    estimate.

    .. math::

        F = \frac{1}{W} \sum_n J_n^\top \, E_{y \sim p(\cdot \mid z_n)}\!\left[ r_n(y) \, r_n(y)^\top \right] J_n,
        \qquad r_n(y) = \nabla_{z_n} \ell(z_n, y),

    where :math:`J_n` is the Jacobian of the prediction :math:`z_n` of example :math:`n`, and the targets y are drawn
    from the predictive distribution of the model. If the loss is a mean, the sum over all examples is divided by
    :math:`W = \sum_b w_b`. The weight :math:`w_b` of batch b is the number by which the loss function divides the sum
    over the batch. Depending on the loss function, this divisor is the number of elements, the number of targets that
    are not ignored, or the sum of the class weights of these targets. If the loss is a sum, W is 1. Class weights,
    ``pos_weight`` and ignored targets scale the contribution of an example to the matrix in the same way as its
    contribution to the loss.

    Parameters
    ----------
    model : nn.Module or callable
        A module, called as ``model(X)``, or a function ``(params_dict, X) -> prediction``. If X is a mapping that
        the module does not accept as one argument, the module is called as ``model(**X)`` (see Notes of
        `curvop.HessianLinearOperator`). In most cases, a module should be in evaluation mode (see Warns).
    loss_function : nn.Module or callable
        ``MSELoss`` (a normal distribution of variance 1/2), ``CrossEntropyLoss`` (a categorical distribution),
        ``BCEWithLogitsLoss`` (independent Bernoulli distributions), or their functional forms.
    params : dict of str to Tensor, or list of the model's own parameters
        Any subset of the model's parameters, either all float32 or all float64. Examples are
        ``dict(model.named_parameters())``, the result of `curvop.select`, or ``model.state_dict()`` of a model without
        buffers. The rows and columns of the matrix follow the order of the parameters. The parameters may have
        ``requires_grad=False``. If a tensor in ``params`` and the module's parameter of the same name have different
        values, the operator uses the values in ``params``. If the parameters are on several devices, batches and
        vectors are moved to the device of the first parameter, and the model must move its intermediate results itself.
    data : iterable of (X, y)
        A list, a ``DataLoader`` or any other iterable that can be read repeatedly. Iterators that can be read only once
        are rejected. X and y are tensors, or nested mappings, lists and tuples of tensors. All tensors are moved to the
        device of the parameters. If the model modifies its input, it receives copies of the tensors.
    mc_samples : int, default 0
        If 0, the exact expectation is computed (called 'type 2' in curvlinops). If a positive number n is passed, n
        targets are drawn for each example. The mean over the n draws is an unbiased estimate of the expectation. The
        contribution of each example then has a rank of at most n. The draws are made once, so all products use the same
        matrix.
    rng : int or numpy.random.Generator, optional
        Seed or generator of the random targets. By default, every operator draws different targets.
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
        Number of columns of ``X`` that a block product ``F @ X`` processes at once. 'auto' measures the speed for
        several numbers on the first columns, and uses the fastest number. If the number is fixed and the memory is
        sufficient for this number of columns, block products are bitwise reproducible between runs.
    batch_weight : callable, optional
        Function ``batch -> w_b`` that returns the weight of a batch ``(X, y)``. If the loss function is from
        ``torch.nn``, the default weight is the number by which the loss function divides the sum over the batch. For
        any other loss function, the default weight is the batch size, which is the size of the first dimension of the
        tensors in X and y. If X and y are lists with one entry for each example, the batch size is their length.
    progress : bool or tqdm, default False
        Whether to show a progress bar that counts products. Pass a ``tqdm`` object to use an existing bar.

    Raises
    ------
    TypeError, ValueError
        If an argument is invalid, or if the loss function is not one of the three supported functions. The message
        names the argument. The constructor does not read the data. Therefore, invalid data raise an error in the first
        product. The first product also raises an error if the size of a batch is needed but unknown, or if the loss
        function uses a tensor of ``params`` directly (for example, through a closure) and not through the model.
    RuntimeError
        If the loss depends on none of the parameters in ``params``. The first product raises this error.
    NonFiniteProductError
        If a product contains NaN or infinity. The message names the batch.
    NonDeterministicObjectiveError
        If dropout is active, or if the loss has changed since an earlier pass over the data.

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
        - A ``DataLoader`` draws a different subset of its data set in each pass.

        `curvop.check` detects more problems.

    See Also
    --------
    curvop.GGNLinearOperator : Generalized Gauss-Newton matrix of any twice differentiable loss.
    curvop.EFLinearOperator : Second moment of the per-example gradients, with the targets of the data.

    Notes
    -----
    For the three supported loss functions, the expectation is the Hessian of the loss with respect to the prediction,
    so the exact matrix is computed as the generalized Gauss-Newton matrix [1]_. A product costs about 4/3 of a
    gradient, counted in floating-point operations.

    References
    ----------
    .. [1] J. Martens, "New insights and perspectives on the natural gradient method", Journal of Machine Learning
       Research 21(146), 2020, sections 5 and 9, arXiv:1412.1193.

    Examples
    --------
    Compute a natural gradient direction. Then estimate a product from 10 draws of each target, and compute the relative
    error of the estimate:

    >>> import numpy as np
    >>> import torch
    >>> from torch import nn
    >>> from curvop import FisherLinearOperator, solve
    >>> _ = torch.manual_seed(0)
    >>> X = torch.randn(60, 4, dtype=torch.float64)
    >>> y = (X[:, 0] * X[:, 1] > 0).long()
    >>> model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2)).double()
    >>> params = dict(model.named_parameters())
    >>> data = list(zip(X.split(25), y.split(25)))
    >>> F = FisherLinearOperator(model, nn.CrossEntropyLoss(), params, data)
    >>> gradient, loss = F.gradient_and_loss()
    >>> direction = solve(F, gradient, damping=1e-2).solution
    >>> direction.shape
    (58,)
    >>> sampled = FisherLinearOperator(model, nn.CrossEntropyLoss(), params, data, mc_samples=10, rng=0)
    >>> error = np.linalg.norm(sampled @ direction - F @ direction) / np.linalg.norm(F @ direction)
    >>> print(f"{error:.2f}")
    0.04
    """

    @named_keywords
    def __init__(
        self,
        model: nn.Module | Callable[[dict[str, Tensor], Any], Any],
        loss_function: Callable[[Any, Any], Tensor],
        params: Mapping[str, Tensor] | Iterable[Tensor],
        data: Iterable[Any],
        *,
        mc_samples: int = 0,
        rng: int | np.random.Generator | None = None,
        dtype: Any = np.float64,
        cache: float | str = "auto",
        engine: str = "autograd",
        columns: int | str = "auto",
        batch_weight: BatchWeight | None = None,
        progress: Any = False,
    ) -> None:
        objective = ModelObjective(model, loss_function, params, data, batch_weight)
        self._set_kernel(objective, mc_samples, rng)
        self._setup(objective, Settings(dtype, cache, engine, columns, progress))

    @classmethod
    @named_keywords
    def from_functions(
        cls,
        predict: Callable[[dict[str, Tensor], Any], Any],
        loss: Callable[[Any, Any], Tensor],
        params: Mapping[str, Tensor],
        data: Iterable[Any],
        *,
        mc_samples: int = 0,
        rng: int | np.random.Generator | None = None,
        dtype: Any = np.float64,
        cache: float | str = "auto",
        engine: str = "autograd",
        columns: int | str = "auto",
        batch_weight: BatchWeight | None = None,
        progress: Any = False,
    ) -> Self:
        """Construct the Fisher matrix from two functions: one computes a prediction, and the other computes its loss.

        The likelihood must be known, so ``loss`` must be a `curvop.TargetLoss` with one of the three loss functions
        that the constructor accepts. For any other loss, use `curvop.GGNLinearOperator.from_functions`.

        Parameters
        ----------
        predict : callable
            Function ``(params_dict, batch) -> prediction``; see `curvop.GGNLinearOperator.from_functions`. The
            prediction must be one tensor.
        loss : TargetLoss
            Loss function ``(prediction, batch) -> scalar``.
        params : dict of str to Tensor
            Parameters in the order of the rows and columns, either all float32 or all float64. The parameters may have
            ``requires_grad=False``.
        data : iterable of batches
            A list, a ``DataLoader`` or any other iterable that can be read repeatedly. Batches may be of any type that
            both functions accept.
        mc_samples, rng, dtype, cache, engine, columns, progress
            As in the constructor.
        batch_weight : callable, optional
            Function ``batch -> w_b`` that returns the weight of a batch. By default, the weight is the divisor of the
            loss function.

        Returns
        -------
        FisherLinearOperator
            Operator of shape ``(P, P)``.

        Raises
        ------
        TypeError, ValueError, RuntimeError, NonFiniteProductError, NonDeterministicObjectiveError
            Under the same conditions as in the constructor.

        Examples
        --------
        For cross-entropy, the Fisher matrix equals the generalized Gauss-Newton matrix:

        >>> import numpy as np
        >>> import torch
        >>> from torch import nn
        >>> from curvop import FisherLinearOperator, GGNLinearOperator, TargetLoss
        >>> problem = dict(
        ...     predict=lambda params, batch: batch["inputs"] @ params["w"],
        ...     loss=TargetLoss(nn.CrossEntropyLoss(), lambda batch: batch["labels"]),
        ...     params={"w": torch.ones(2, 3, dtype=torch.float64)},
        ...     data=[dict(inputs=torch.eye(2, dtype=torch.float64), labels=torch.tensor([2, -100]))],
        ... )
        >>> F = FisherLinearOperator.from_functions(**problem)
        >>> np.allclose(F @ np.eye(6), GGNLinearOperator.from_functions(**problem) @ np.eye(6))
        True
        """
        self = cls.__new__(cls)
        objective = FunctionsObjective(predict, loss, params, data, batch_weight)
        self._set_kernel(objective, mc_samples, rng)
        self._setup(objective, Settings(dtype, cache, engine, columns, progress))
        return self

    def _set_kernel(self, objective: ModelObjective, mc_samples: int, rng: int | np.random.Generator | None) -> None:
        """Choose the kernel of the exact or of the sampled matrix. Raise an error for an unsupported loss."""
        if not isinstance(mc_samples, int | np.integer) or mc_samples < 0:
            raise ValueError(f"mc_samples is {mc_samples!r}, but must be an integer >= 0 (0 for the exact matrix)")
        Likelihood(objective.loss_function, objective.loss_name)
        self._kernel = GGNKernel
        if mc_samples:
            seed = int(random_generator(rng).integers(2**63))
            self._kernel = functools.partial(SampledFisherKernel, samples=int(mc_samples), seed=seed)
