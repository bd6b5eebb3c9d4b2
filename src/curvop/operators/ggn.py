"""The generalized Gauss-Newton matrix."""

from __future__ import annotations

from curvop.kernels.ggn_kernel import GGNKernel
from curvop.operators.curvature_operator import GGNLikeLinearOperator

__all__ = ["GGNLinearOperator"]


class GGNLinearOperator(GGNLikeLinearOperator):
    r"""The generalized Gauss-Newton matrix as a symmetric SciPy ``LinearOperator`` of shape ``(P, P)``.

    .. math::

        G = \frac{1}{W} \sum_b w_b \, J_b^\top \, \nabla^2_z \ell_b \, J_b, \quad W = \sum_b w_b
        \qquad \text{or} \qquad G = \sum_b J_b^\top \, \nabla^2_z \ell_b \, J_b,

    for a loss that is a mean or a sum: the Hessian of the loss when the model is replaced by its linearization, with
    the Jacobian :math:`J_b = \partial z_b / \partial \theta` of a batch's predictions. Where the loss is convex in the
    prediction (mean squared error, cross-entropy, binary cross-entropy) it is positive semi-definite, so that ``cg``
    solves ``G.damped(lam)`` for every positive `lam`.

    A product costs about 4/3 of a gradient: one pass with J, one with its transpose.

    Parameters
    ----------
    model, loss_function, params, data, dtype, cache, engine, columns, batch_weight, progress
        As for `HessianLinearOperator`. The loss may be any function of the prediction that torch differentiates twice;
        a prediction may be a tensor or a tree of tensors.

    Raises
    ------
    TypeError, ValueError
        As for `HessianLinearOperator`, and by the first product if the loss depends on parameters in another way than
        through the prediction, as a penalty does.

    Warns
    -----
    RuntimeWarning
        As for `HessianLinearOperator`, and if the loss is linear in the prediction, so that the matrix is zero; not for
        losses of torch such as ``L1Loss``.

    References
    ----------
    Schraudolph (2002), "Fast curvature matrix-vector products for second-order gradient descent", Neural Computation
    14(7), section 3.

    Examples
    --------
    >>> import torch
    >>> X, y = torch.eye(3, dtype=torch.float64), torch.zeros(3, 1, dtype=torch.float64)
    >>> model = torch.nn.Linear(3, 1, bias=False, dtype=torch.float64)
    >>> G = GGNLinearOperator(model, torch.nn.MSELoss(), dict(model.named_parameters()), [(X, y)])
    >>> G @ [3.0, 0.0, 0.0]
    array([2., 0., 0.])
    """

    _kernel = GGNKernel
