"""Base classes of curvature matrices, whose rows and columns are parameters of an objective."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from curvop.kernels.diagonal import write_diagonal
from curvop.kernels.errors import NotFactorableError
from curvop.kernels.functions_objective import FunctionsObjective
from curvop.kernels.ggn_kernel import GGNLikeKernel
from curvop.kernels.kernel import Kernel
from curvop.kernels.model_objective import ModelObjective
from curvop.kernels.objective import BatchWeight, Objective
from curvop.kernels.parameters import ParameterLayout
from curvop.operators.engine_operator import EngineLinearOperator, Settings
from curvop.operators.gram import FactorLinearOperator, GramLinearOperator
from curvop.operators.parameter_operator import ParameterLinearOperator
from curvop.operators.validation import named_keywords, validated_names

__all__ = ["CurvatureLinearOperator", "GGNLikeLinearOperator"]


class CurvatureLinearOperator(EngineLinearOperator, ParameterLinearOperator):
    """Base class of curvature matrices that a kernel computes from an objective.

    Subclasses set ``_kernel`` and document the arguments of the constructor.
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

    @classmethod
    @named_keywords
    def from_functions(
        cls,
        predict: Callable[[dict[str, Tensor], Any], Any],
        loss: Callable[[Any, Any], Tensor],
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
        """Construct the matrix of an objective in two parts: a prediction, and the loss of this prediction.

        Use it if the data are not pairs ``(X, y)``, or if the model needs more than one argument. The objective of a
        batch is ``loss(predict(params, batch), batch)``. Batches may be of any type that both functions accept, such as
        the dicts of a data collator. For models of Hugging Face, `curvop.huggingface` provides the two functions.

        Parameters
        ----------
        predict : callable
            Function ``(params_dict, batch) -> prediction``. The prediction is a tensor or a nested structure of
            tensors, and must depend on the parameters through ``params_dict``. To evaluate a module, use
            ``torch.func.functional_call(model, params_dict, ...)``.
        loss : callable
            Function ``(prediction, batch) -> scalar``, which must depend on the parameters only through the prediction
            (a Hessian has no such restriction). If the attribute ``reduction`` of the function is 'sum', the loss is a
            sum over the batch. Otherwise, it is a mean. A `curvop.TargetLoss` applies a loss function of ``torch.nn``
            to targets in the batch.
        params : dict of str to Tensor
            Parameters in the order of the rows and columns, either all float32 or all float64. The parameters may have
            ``requires_grad=False``.
        data : iterable of batches
            A list, a ``DataLoader`` or any other iterable that can be read repeatedly. The tensors of a batch are moved
            to the device of the parameters.
        dtype, cache, engine, columns, progress
            As in the constructor.
        batch_weight : callable, optional
            Function ``batch -> w_b`` that returns the weight of a batch. By default, the weight of a batch is the
            divisor of the loss function if ``loss`` is a `curvop.TargetLoss` of a loss function of ``torch.nn``. For
            any other loss, the default weight is the size of the first dimension of the tensors in the batch, which
            must be the same for all of them. If it is not, the size of the targets of a `curvop.TargetLoss` is used;
            for a loss that is a function, pass ``batch_weight``.

        Returns
        -------
        operator
            Operator of shape ``(P, P)`` and of the class on which the method was called.

        Raises
        ------
        TypeError, ValueError, RuntimeError, NonFiniteProductError, NonDeterministicObjectiveError
            Under the same conditions as in the constructor.

        See Also
        --------
        curvop.TargetLoss : Apply a loss function of PyTorch to targets in the batch.
        curvop.huggingface.causal_lm : The two functions for a language model of Hugging Face.

        Notes
        -----
        Empirical Fisher matrices and gradient covariances are sums over examples. If ``loss`` is a `curvop.TargetLoss`
        with a loss function of ``torch.nn``, the examples are the same as in the constructor. For cross-entropy, for
        example, each target that is not ignored is an example. For any other loss, each index of the first dimension of
        the prediction is an example, and the loss of a batch must be the sum of the losses of its examples, divided by
        the weight of the batch. The number of examples, by which a gradient covariance divides, then includes examples
        with a zero gradient, such as ignored targets. A `curvop.TargetLoss` does not count ignored targets.

        The modules that the functions call are left as found: their buffers and attributes are restored after each
        evaluation. The functions are searched for modules in closure variables, default arguments, global variables and
        attributes. Other modules with a ``forward`` that is called are found in the first pass over the data, in which
        some evaluations are therefore interrupted and repeated. Attributes of objects that are not modules are not
        restored.

        Examples
        --------
        The batches are dicts. The prediction of a linear regression depends on two of the three tensors:

        >>> import torch
        >>> from curvop import GGNLinearOperator
        >>> def predict(params, batch):
        ...     return batch["scale"] * (batch["inputs"] @ params["w"])
        >>> def loss(prediction, batch):
        ...     return (prediction - batch["targets"]).square().mean()
        >>> params = {"w": torch.zeros(2, dtype=torch.float64)}
        >>> X = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 2.0]], dtype=torch.float64)
        >>> data = [dict(inputs=X[:2], scale=torch.ones(2), targets=torch.ones(2))]
        >>> data += [dict(inputs=X[2:], scale=torch.ones(1), targets=torch.ones(1))]
        >>> G = GGNLinearOperator.from_functions(predict, loss, params, data)
        >>> (G @ [3.0, 3.0]).round(6)  # 2 / 3 times X.T @ X @ [3, 3]
        array([ 2., 10.])
        """
        self = cls.__new__(cls)
        objective = FunctionsObjective(predict, loss, params, data, batch_weight)
        self._setup(objective, Settings(dtype, cache, engine, columns, progress))
        return self

    def _setup(
        self,
        objective: Objective,
        settings: Settings,
        rows: Sequence[str] | None = None,
        cols: Sequence[str] | None = None,
    ) -> None:
        """Initialize the operator from an objective.

        `block` and constructors with other arguments call this method instead of ``__init__``.
        """
        rows = list(objective.params) if rows is None else rows
        cols = list(objective.params) if cols is None else cols
        layouts = ParameterLayout(objective.params, rows), ParameterLayout(objective.params, cols)
        ParameterLinearOperator.__init__(self, settings.dtype, objective.params, *layouts)
        self._set_up_engines(self._kernel(objective, rows, cols), settings)

    def block(self, rows: str | Sequence[str], cols: str | Sequence[str] | None = None) -> Self:
        """Return the block of the matrix for the given parameters, as an operator of the same class.

        Parameters
        ----------
        rows : str or sequence of str
            Names of the row parameters, in the order of the block.
        cols : str or sequence of str, optional
            Names of the column parameters. By default, the same as ``rows``, which gives a symmetric block.

        Returns
        -------
        operator
            Operator of shape ``(M, N)``, where M and N are the total sizes of the row and column parameters. The block
            uses the same model and data, but has its own cache and counter.

        Raises
        ------
        ValueError
            If a name is unknown (the message suggests similar names), if a name is repeated, or if no name is given.

        See Also
        --------
        submatrix : Select any rows and columns.
        curvop.select : Select parameters by name pattern and layer type.

        Notes
        -----
        Products differentiate with respect to the selected parameters only. For a cached batch, layers that do not
        depend on the selected parameters run only once, when the batch is linearized.
        """
        block = type(self).__new__(type(self))
        block._kernel = self._kernel
        row_names = validated_names("rows", rows, self._rows)
        col_names = validated_names("cols", rows if cols is None else cols, self._cols)
        block._setup(self._objective, self._settings, row_names, col_names)
        return block

    def gradient_and_loss(self) -> tuple[NDArray[Any], float]:
        """Compute the gradient and the loss in one pass over the data.

        The loss uses the same batch weights as the matrix. Therefore ``curvop.solve(A, -gradient,
        damping=lam).solution`` is a damped Newton step.

        Returns
        -------
        gradient : ndarray, shape (M,)
            Gradient of the loss of the whole data set with respect to the row parameters.
        loss : float
            Loss of the whole data set.

        Raises
        ------
        NonFiniteProductError
            If the loss or an entry of the gradient is NaN or infinite. The message names the batch.
        NonDeterministicObjectiveError
            If the loss has changed since an earlier pass over the data.
        """
        gradient, loss = self._gradient()
        return gradient.cpu().numpy(), loss

    def _adjoint(self) -> Self:
        adjoint = super()._adjoint()
        if adjoint is not self:
            adjoint._rows, adjoint._cols = self._cols, self._rows
        return adjoint


# Matrices of the form J^T M J.


class GGNLikeLinearOperator(CurvatureLinearOperator):
    r"""Base class of matrices :math:`\sum_n J_n^\top M_n J_n`, where :math:`J_n` is the Jacobian of prediction n."""

    _kernel: Callable[[Any, Sequence[str], Sequence[str]], GGNLikeKernel]

    def gram(self) -> GramLinearOperator:
        r"""Return the Gram matrix :math:`S S^\top`, where this matrix is :math:`A = S^\top S`.

        Both matrices have the same non-zero eigenvalues. Use the Gram matrix if it is smaller than A: it has one row
        for each example of `curvop.EFLinearOperator`, s rows for each example of a Fisher matrix with ``mc_samples=s``,
        and C rows for each example with C outputs for `curvop.GGNLinearOperator` and the exact Fisher matrix.

        Returns
        -------
        GramLinearOperator
            Operator of shape ``(n, n)``. Its attribute ``factor`` is the operator S of shape ``(n, P)``, and its method
            ``lift`` maps eigenvectors to those of A.

        Raises
        ------
        NotFactorableError
            If the rows and columns of A are different parameters, or if an example has more than 256 outputs. The first
            product raises this error if the Hessian of the loss with respect to the prediction is indefinite, or if the
            loss couples its examples.

        See Also
        --------
        curvop.spectrum.eigsh : Eigenpairs from the smaller side.
        curvop.GramLinearOperator : The operator that is returned.

        Notes
        -----
        The method counts the rows in one forward pass over the data. The operator requires that ``data`` yields the
        batches in the same order in every pass.
        """
        if self._rows.names != self._cols.names:
            raise NotFactorableError(
                "this is a block off the diagonal, which is not of the form S.T @ S: take a diagonal block, "
                "A.block(names)"
            )
        return GramLinearOperator(FactorLinearOperator(self._kernel, self._objective, self._rows.names, self._settings))

    def diagonal(self) -> NDArray[Any]:
        """Compute the exact diagonal in one pass over the data.

        Returns
        -------
        diagonal : ndarray, shape (N,)
            Diagonal in the dtype of the operator.

        Raises
        ------
        NotImplementedError
            If the model or the loss couples the examples (for example, batch normalization in training mode), if torch
            cannot vectorize the model over the examples (for example, recurrent layers), if a prediction consists of
            several tensors, if no tensor of the inputs has one row per example, or if an example has more than 256
            outputs. Use `curvop.spectrum.diagonal` to estimate the diagonal.
        NonFiniteProductError
            If the diagonal contains NaN or infinity. The message names the batch.
        ValueError
            If the rows and columns are different parameters.

        See Also
        --------
        curvop.spectrum.diagonal : Estimate the diagonal from products.

        Notes
        -----
        The cost is one backward pass per example and output. For the empirical Fisher matrix, the cost is one backward
        pass per example. For a sampled Fisher matrix, the cost is one backward pass per example and sample. The number
        of backward passes does not depend on the number of parameters.
        """
        return self._diagonal().cpu().numpy().astype(self.dtype, copy=False)

    def _diagonal(self) -> Tensor:
        """Return the diagonal as a float64 tensor."""
        if self._rows.names != self._cols.names:
            raise ValueError("this is a block off the diagonal, whose rows and columns are different parameters")
        objective = self._objective
        out = torch.zeros(self.shape[0], dtype=torch.float64, device=objective.device)
        with torch.inference_mode(False):
            kernel = self._kernel(objective, self._rows.names, self._cols.names)
            self._retry_on_out_of_memory(lambda: write_diagonal(kernel, self._rows.names, out))
        return out
