"""Hessian of a loss over a data set."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, Self

import numpy as np
from torch import Tensor

from curvop.kernels.hessian_kernel import HessianKernel
from curvop.kernels.objective import BatchWeight, CallableObjective
from curvop.operators.curvature_operator import CurvatureLinearOperator
from curvop.operators.engine_operator import Settings
from curvop.operators.keywords import named_keywords

__all__ = ["HessianLinearOperator"]


class HessianLinearOperator(CurvatureLinearOperator):
    r"""Hessian of a model's loss over a data set, as a symmetric ``LinearOperator`` of shape ``(P, P)``.

    Use it for sharpness and spectra (``eigsh``, `curvop.spectrum.eigsh`), for Newton and influence-function systems
    (`curvop.solve`, or ``minres`` on ``H.damped(lam)``), and as ``hessp`` in ``scipy.optimize.minimize``. In general,
    the Hessian is indefinite. Use `curvop.GGNLinearOperator` if you need a positive semi-definite matrix, or if an
    approximation is sufficient. Products with the GGN cost a third less than products with the Hessian.

    .. math::

        H = \nabla^2_\theta L(\theta), \qquad
        L(\theta) = \frac{1}{W} \sum_b w_b \, \ell_b(\theta), \quad W = \sum_b w_b
        \qquad \text{or} \qquad L(\theta) = \sum_b \ell_b(\theta),

    for a loss that is a mean or a sum, respectively, where :math:`\ell_b` is the loss of batch :math:`b`. The weight
    :math:`w_b` is the number by which the loss function divides the sum over batch :math:`b`. Depending on the loss
    function, this divisor is the number of elements, the number of targets that are not ignored, or the sum of the
    class weights of these targets. Therefore, H does not depend on how the data set is split into batches: it is the
    Hessian of the loss of the whole data set, evaluated as one batch.

    Parameters
    ----------
    model : nn.Module or callable
        A module, called as ``model(X)``, or a function ``(params_dict, X) -> prediction``. If X is a mapping that
        the module does not accept as one argument, the module is called as ``model(**X)`` (see Notes). In most cases, a
        module should be in evaluation mode (see Warns).
    loss_function : nn.Module or callable
        Function ``(prediction, y) -> scalar``. Its attribute ``reduction`` ('mean' or 'sum') specifies whether the loss
        is a mean or a sum over the batch. If the attribute is missing, 'mean' is assumed.
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
        Number of columns of ``X`` that a block product ``H @ X`` processes at once. 'auto' measures the speed for
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
    curvop.GGNLinearOperator : Positive semi-definite approximation, for losses that are convex in the prediction.
    curvop.FisherLinearOperator : Fisher matrix of the likelihood that defines the loss.
    curvop.spectrum.eigsh : Compute eigenvalues with error bounds, and check for missing eigenvalues.
    curvop.solve : Solve a damped system and compute the true residual.
    curvop.check : Check an operator before a long computation.

    Notes
    -----
    Products are computed by double backward: :math:`H v = \nabla_\theta \langle \nabla_\theta L, v \rangle`.
    Pearlmutter [1]_ derives the equivalent forward-mode form. The first product linearizes the batches and caches them
    up to the limit ``cache``. For a cached batch, a product takes one backward pass through the graph of the gradient.
    Counted in floating-point operations, a product costs at most two gradients for a cached batch, and at most three
    gradients for any other batch. ``H.cost()`` measures the cost of a product.

    While the model and the loss are evaluated, the tensors in ``params`` replace the parameters of all modules. A loss
    that reads ``model.parameters()``, such as weight decay, is therefore differentiated correctly. All changes that the
    evaluation makes to parameters, buffers, module attributes, flags and batches are undone afterwards.

    If X is a mapping, a module is called either as ``model(X)`` or as ``model(**X)``. If the signature of ``forward``
    allows only one of these calls, the module is called in this way. For example, ``forward`` does not allow
    ``model(X)`` if it has several parameters without defaults. If the first parameter of ``forward`` is annotated as a
    mapping, the call is ``model(X)``. In all other cases, the first batch decides: the call is ``model(**X)`` only if
    ``model(X)`` raises an error.

    The operator always uses the current values of the parameters. It linearizes the batches again if it detects one of
    the following changes: parameters modified in place (for example, by an optimizer step or ``load_state_dict``),
    replaced layers, modified buffers or training flags, or batches replaced in a list. It does not detect other
    changes. Examples of undetected changes are a new slope of a ``LeakyReLU`` layer, a new value of a number that a
    function reads, and a tensor of a batch that is replaced by another tensor. After a change that is not detected,
    construct a new operator.

    Do not use an operator in several threads at the same time, because products temporarily replace the parameters of
    the module itself.

    References
    ----------
    .. [1] B. A. Pearlmutter, "Fast exact multiplication by the Hessian", Neural Computation 6(1), 1994, eq. (2),
       doi:10.1162/neco.1994.6.1.147.

    Examples
    --------
    Compute the direction of largest curvature of a small classifier's loss. The 60 points are split into batches of 25,
    25 and 10:

    >>> import torch
    >>> from scipy.sparse.linalg import eigsh
    >>> from torch import nn
    >>> from curvop import HessianLinearOperator
    >>> _ = torch.manual_seed(0)
    >>> X = torch.randn(60, 4, dtype=torch.float64)
    >>> y = (X[:, 0] * X[:, 1] > 0).long()
    >>> model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2)).double()
    >>> params = dict(model.named_parameters())
    >>> H = HessianLinearOperator(model, nn.CrossEntropyLoss(), params, list(zip(X.split(25), y.split(25))))
    >>> H.shape
    (58, 58)
    >>> values, vectors = eigsh(H, k=2, which="BE")
    >>> values.round(3)
    array([-0.194,  0.745])

    Gradient descent is stable along this direction for learning rates below ``2 / values[1]``. Convert the eigenvector
    to a dict of tensors, and compute the largest eigenvalue of the block of the last layer:

    >>> {name: tuple(part.shape) for name, part in H.unravel(vectors[:, 1]).items()}
    {'0.weight': (8, 4), '0.bias': (8,), '2.weight': (2, 8), '2.bias': (2,)}
    >>> eigsh(H.block(["2.weight", "2.bias"]), k=1, which="LA", return_eigenvectors=False).round(2)
    array([0.61])
    """

    _kernel = HessianKernel

    @classmethod
    @named_keywords
    def from_objective(
        cls,
        objective: Callable[[dict[str, Tensor], Any], Tensor],
        params: Mapping[str, Tensor],
        data: Iterable[Any],
        *,
        dtype: Any = np.float64,
        cache: float | str = "auto",
        engine: str = "autograd",
        columns: int | str = "auto",
        batch_weight: BatchWeight | None = None,
        progress: Any = False,
    ) -> Self:
        """Construct the Hessian of a function that returns the loss of a batch.

        Use this constructor for models that return their loss, for regularized losses, and for losses that contain
        derivatives. The objective must be twice differentiable by torch.

        Parameters
        ----------
        objective : callable
            Function ``(params_dict, batch) -> scalar`` that returns the loss of a batch. If the attribute ``reduction``
            of the function is 'sum', the loss is a sum over the batch. Otherwise, it is a mean.
        params : dict of str to Tensor
            Parameters in the order of the rows and columns, either all float32 or all float64. The parameters may have
            ``requires_grad=False``.
        data : iterable of batches
            A list, a ``DataLoader`` or any other iterable that can be read repeatedly. Batches may be of any type that
            ``objective`` accepts. Their tensors are moved to the device of the parameters.
        dtype : numpy.float64 or numpy.float32, default numpy.float64
            Data type of the NumPy vectors that SciPy receives. Products are computed in the data type of the
            parameters.
        cache : float or 'auto', default 'auto'
            Memory budget in bytes for linearized batches that are kept between products. 0 disables the cache. 'auto'
            allows half of the memory that is free on the device at the first product. Batches that exceed the budget
            are linearized again in every product. Each block of the matrix has its own budget.
        engine : {'autograd', 'compiled'}, default 'autograd'
            'autograd' computes products by backward passes through retained autograd graphs. 'compiled' traces a
            product once for each batch shape, separates the operations that depend on the vector from those that do
            not, and compiles both groups of operations. The compilation during the first product takes between a few
            seconds and a minute. Later products are usually faster than with 'autograd'. The first product of each
            compiled program is compared with the product that 'autograd' computes. If compilation fails or the products
            differ, a warning gives the reason and 'autograd' is used.
        columns : int or 'auto', default 'auto'
            Number of columns of ``X`` that a block product ``H @ X`` processes at once. 'auto' measures the speed for
            several numbers on the first columns, and uses the fastest number. If the number is fixed and the memory is
            sufficient for this number of columns, block products are bitwise reproducible between runs.
        batch_weight : callable, optional
            Function ``batch -> w_b`` that returns the weight of a batch. By default, the weight is the size of the
            first dimension of the tensors in the batch. This size must be the same for all tensors in the batch.
        progress : bool or tqdm, default False
            Whether to show a progress bar that counts products. Pass a ``tqdm`` object to use an existing bar.

        Returns
        -------
        HessianLinearOperator
            Operator of shape ``(P, P)``.

        Raises
        ------
        TypeError, ValueError, RuntimeError, NonFiniteProductError, NonDeterministicObjectiveError
            Under the same conditions as in the constructor of `curvop.HessianLinearOperator`.

        Examples
        --------
        Compute the Hessian of the loss of a ridge regression. The penalty ``0.5 * w**2`` adds 1 to the diagonal:

        >>> import torch
        >>> from curvop import HessianLinearOperator
        >>> X = torch.eye(3, dtype=torch.float64)
        >>> y = torch.zeros(3, dtype=torch.float64)
        >>> def ridge(params, batch):
        ...     X, y = batch
        ...     return (X @ params["w"] - y).square().mean() + 0.5 * params["w"].square().sum()
        >>> params = {"w": torch.ones(3, dtype=torch.float64)}
        >>> H = HessianLinearOperator.from_objective(ridge, params, [(X, y)])
        >>> (H @ [3.0, 0.0, 0.0]).round(6)
        array([5., 0., 0.])
        """
        self = cls.__new__(cls)
        self._setup(
            CallableObjective(objective, params, data, batch_weight), Settings(dtype, cache, engine, columns, progress)
        )
        return self
