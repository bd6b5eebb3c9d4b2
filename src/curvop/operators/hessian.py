"""The Hessian of a loss over a data set."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, Self

import numpy as np
from torch import Tensor

from curvop.kernels.hessian_kernel import HessianKernel
from curvop.kernels.objective import BatchWeight, CallableObjective
from curvop.operators.curvature_operator import CurvatureLinearOperator
from curvop.operators.engine_operator import Settings
from curvop.operators.validation import named_keywords

__all__ = ["HessianLinearOperator"]


class HessianLinearOperator(CurvatureLinearOperator):
    r"""The Hessian of a model's loss over a data set, as a symmetric SciPy ``LinearOperator`` of shape ``(P, P)``.

    .. math::

        H = \nabla^2_\theta L(\theta), \qquad
        L(\theta) = \frac{1}{W} \sum_b w_b \, \ell_b(\theta), \quad W = \sum_b w_b
        \qquad \text{or} \qquad L(\theta) = \sum_b \ell_b(\theta),

    for a loss that is a mean or a sum. The weights are such that H is the Hessian of the loss of the whole data set
    evaluated as one batch, however it is cut into batches: each mean is weighted by its own divisor (elements, targets
    that are not ignored, or the sum of their class weights).

    The model and the loss are evaluated with the parameters replaced, in all modules and for the whole evaluation, so
    that a loss that reads ``model.parameters()`` is differentiated, too. Everything that the code changes is put back:
    parameters, buffers, attributes of modules, flags, batches.

    Each batch is linearized at the first product, and kept within `cache`; a product then costs one more backward
    pass through the graph of the gradient (double backward), about two gradients. The operator shows the parameters
    as they are now: a change in place (an optimizer step, ``load_state_dict``) is noticed and what was kept is made
    anew, and so are other layers, buffers and training flags, and batches replaced in a list. What else the loss
    depends on (a layer's slope, a number that a function reads, a tensor replaced within a batch) is not watched:
    make a new operator.

    Several threads may use it one after another, but not at once: torch substitutes parameters in the module itself.

    Use it for sharpness and spectra (``eigsh``), Newton and influence-function systems (``cg``, ``minres`` on
    ``H.damped(lam)``), and ``scipy.optimize`` (``hessp``). The Hessian is symmetric but in general indefinite.

    Parameters
    ----------
    model : nn.Module or callable
        A module, called with X alone, or ``(params_dict, X) -> prediction``. In evaluation mode, as a rule.
    loss_function : nn.Module or callable
        ``(prediction, y) -> scalar``. Its attribute ``reduction`` says whether it is a 'mean' (also where it has none)
        or a 'sum'.
    params : dict of str to Tensor, or list of the model's own parameters
        Any of the model's parameters, in the order of rows and columns: all float32 or all float64. They need not
        require grad. Their values are used, even if they differ from the module's own; ``model.state_dict()`` is taken
        if it holds no buffers. If they are on several devices, batches and vectors go to the first one's, and the model
        moves what it hands on and returns.
    data : iterable of (X, y)
        Read once or more per operator, so no one-shot iterator: a list, a ``DataLoader``. X and y are tensors, or
        (nested) mappings, lists and tuples of tensors; they are moved to the parameters' device. A model that writes
        to its input gets copies.
    dtype : numpy.float64 or numpy.float32
        Of the vectors that SciPy sees. Products are computed in the parameters' own dtype.
    cache : float or 'auto'
        Bytes that linearizations may retain between products, 0 for none; 'auto' is half of what is free on the device
        at the first product. What does not fit is linearized anew in each product. A block has a budget of its own.
    engine : 'autograd' or 'compiled'
        'autograd' keeps the graph of the gradient. 'compiled' traces a product once for each shape of batch, splits it
        into what depends on the vector and what does not, and compiles both: seconds to a minute at the first product,
        then faster. Each program is compared with 'autograd' once. Where the product cannot be compiled, or comes out
        different, it falls back to 'autograd' with a warning that says why.
    columns : int or 'auto'
        How many columns of a block ``H @ X`` are multiplied at once: 1, one by one; 'auto', what a short measurement on
        the first columns finds fastest. A fixed number makes blocks repeat to the last bit in every run, as long as
        there is memory for so many.
    batch_weight : callable, optional
        ``batch -> w_b``, given ``(X, y)``, in place of the divisor of a mean. By default torch's own losses are
        weighted by their divisor, others by the batch size, the first dimension of X and y. The first dimension of a
        list or tuple is its length.
    progress : bool or tqdm
        Count products on a bar: one of the operator's own, or yours.

    Raises
    ------
    TypeError, ValueError
        If an argument is invalid; the message names it. Constructing costs no pass over the data, so the first product
        raises if the data are invalid, if the size of a batch is needed and not known, or if the loss reaches a tensor
        of `params` directly (a function that holds it), so that nothing can replace it.
    RuntimeError
        By the first product, if the loss depends on none of `params`.
    NonFiniteProductError, NonDeterministicObjectiveError
        By a product that is not finite, or if the loss has changed since an earlier pass over the data.

    Warns
    -----
    RuntimeWarning
        By the first product, once for an operator and its blocks: if dropout is active, so that the matrix is that of
        one draw of its masks; if batch normalisation sees each of several batches by itself; if the loss of two batches
        as one contradicts their weights, for a loss of your own; if a ``DataLoader`` draws another part of its data set
        in each pass. `curvop.check` looks for more.

    References
    ----------
    Pearlmutter (1994), "Fast exact multiplication by the Hessian", Neural Computation 6(1), eq. (2).

    Examples
    --------
    >>> import torch
    >>> from scipy.sparse.linalg import eigsh
    >>> X, y = torch.eye(3, dtype=torch.float64), torch.zeros(3, 1, dtype=torch.float64)
    >>> model = torch.nn.Linear(3, 1, bias=False, dtype=torch.float64)
    >>> H = HessianLinearOperator(model, torch.nn.MSELoss(), dict(model.named_parameters()), [(X, y)])
    >>> H @ [3.0, 0.0, 0.0]
    array([2., 0., 0.])
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
        """Return the Hessian of any objective that torch differentiates twice.

        For models that compute their own loss, regularised losses, losses that hold derivatives.

        Parameters
        ----------
        objective : callable
            ``(params_dict, batch) -> scalar``, a mean over the batch unless its attribute ``reduction`` is 'sum'.
        params : dict of str to Tensor
        data : iterable of batches
            Each of any kind that `objective` takes; tensors are moved to the parameters' device.
        batch_weight : callable, optional
            ``batch -> w_b``; by default the first dimension that all tensors of the batch share.
        dtype, cache, engine, columns, progress
            As for the class.
        """
        self = cls.__new__(cls)
        self._setup(
            CallableObjective(objective, params, data, batch_weight), Settings(dtype, cache, engine, columns, progress)
        )
        return self
