"""Generalized Gauss-Newton matrix of a loss over a data set."""

from __future__ import annotations

from curvop.kernels.ggn_kernel import GGNKernel
from curvop.operators.curvature_operator import GGNLikeLinearOperator

__all__ = ["GGNLinearOperator"]


class GGNLinearOperator(GGNLikeLinearOperator):
    r"""Generalized Gauss-Newton matrix, as a symmetric ``LinearOperator`` of shape ``(P, P)``.

    If the model is replaced by its linearization at the current parameters, the Hessian of the loss is the GGN. Use the
    GGN instead of `curvop.HessianLinearOperator` if you need a positive semi-definite matrix, for example for
    Gauss-Newton and natural gradient steps, Laplace approximations or preconditioners. The GGN is positive
    semi-definite if the loss is a convex function of the prediction. Examples are mean squared error, cross-entropy and
    binary cross-entropy. In this case, ``cg`` can solve systems with ``G.damped(lam)`` for every positive ``lam``.

    .. math::

        G = \frac{1}{W} \sum_b w_b \, J_b^\top \, (\nabla^2_z \ell_b) \, J_b, \quad W = \sum_b w_b
        \qquad \text{or} \qquad G = \sum_b J_b^\top \, (\nabla^2_z \ell_b) \, J_b,

    for a loss that is a mean or a sum, respectively, where :math:`J_b = \partial z_b / \partial \theta` is the Jacobian
    of the predictions :math:`z_b` of batch :math:`b`. The weight :math:`w_b` is the number by which the loss function
    divides the sum over batch :math:`b`. Depending on the loss function, this divisor is the number of elements, the
    number of targets that are not ignored, or the sum of the class weights of these targets. Therefore, G does not
    depend on how the data set is split into batches: it is the GGN of the loss of the whole data set, evaluated as one
    batch.

    Parameters
    ----------
    model : nn.Module or callable
        A module, called as ``model(X)``, or a function ``(params_dict, X) -> prediction``. If X is a mapping that
        the module does not accept as one argument, the module is called as ``model(**X)`` (see Notes of
        `curvop.HessianLinearOperator`). In most cases, a module should be in evaluation mode (see Warns). A prediction
        is a tensor or a nested structure of tensors.
    loss_function : nn.Module or callable
        Function ``(prediction, y) -> scalar``. Its attribute ``reduction`` ('mean' or 'sum') specifies whether the loss
        is a mean or a sum over the batch. If the attribute is missing, 'mean' is assumed. The loss must be twice
        differentiable in the prediction, and must depend on the parameters only through the prediction.
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
        Number of columns of ``X`` that a block product ``G @ X`` processes at once. 'auto' measures the speed for
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
        closure) and not through the model. The first product also raises an error if the loss contains a term that
        depends on the parameters but not on the prediction (for example, a penalty).
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
        - The loss is linear in the prediction, so the matrix is zero. Loss functions from ``torch.nn`` are not checked
          for this.

        `curvop.check` detects more problems.

    See Also
    --------
    curvop.HessianLinearOperator : Exact second derivatives, including those of the model.
    curvop.FisherLinearOperator : Fisher matrix, which equals the GGN for three loss functions, or an estimate of it.
    curvop.preconditioner.nystrom : Low-rank preconditioner for damped solves.
    curvop.solve : Solve a damped system and compute the true residual.

    Notes
    -----
    Schraudolph [1]_ introduced the matrix. For each batch, a product multiplies by :math:`J_b`, by the Hessian of the
    loss, and by the transpose of :math:`J_b`. This costs about 4/3 of a gradient, counted in floating-point operations.
    The first product linearizes the batches and caches them up to the limit ``cache``. The operator detects in-place
    changes of the parameters, and changes of layers, buffers, training flags and lists of batches (see
    `curvop.HessianLinearOperator`).

    References
    ----------
    .. [1] N. N. Schraudolph, "Fast curvature matrix-vector products for second-order gradient descent", Neural
       Computation 14(7), 2002, section 3, doi:10.1162/08997660260028683.

    Examples
    --------
    Take one damped Gauss-Newton step for a small classifier. The 60 points are split into batches of 25, 25 and 10:

    >>> import torch
    >>> from torch import nn
    >>> from curvop import GGNLinearOperator, solve
    >>> _ = torch.manual_seed(0)
    >>> X = torch.randn(60, 4, dtype=torch.float64)
    >>> y = (X[:, 0] * X[:, 1] > 0).long()
    >>> model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2)).double()
    >>> params = dict(model.named_parameters())
    >>> data = list(zip(X.split(25), y.split(25)))
    >>> G = GGNLinearOperator(model, nn.CrossEntropyLoss(), params, data)
    >>> gradient, loss = G.gradient_and_loss()
    >>> step = G.unravel(-solve(G, gradient, damping=0.1).solution)
    >>> with torch.no_grad():
    ...     for name, parameter in params.items():
    ...         _ = parameter.add_(step[name])
    >>> round(loss, 3), round(G.gradient_and_loss()[1], 3)
    (0.699, 0.648)

    The operator now uses the new parameters.
    """

    _kernel = GGNKernel
