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
from curvop.operators.keywords import named_keywords
from curvop.operators.parameter_operator import ParameterLinearOperator

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
        """Construct the matrix from two functions: one computes a prediction, and the other computes its loss.

        Use this constructor if the data are not pairs ``(X, y)``, or if the model needs more than one argument. The
        objective of a batch is ``loss(predict(params, batch), batch)``. Batches may be of any type that both functions
        accept, such as the dicts of a data collator. For models of Hugging Face, `curvop.huggingface` provides the two
        functions.

        Parameters
        ----------
        predict : callable
            Function ``(params_dict, batch) -> prediction``. The prediction is a tensor or a nested structure of
            tensors, and must depend on the parameters through ``params_dict``. To evaluate a module, use
            ``torch.func.functional_call(model, params_dict, ...)``.
        loss : callable
            Function ``(prediction, batch) -> scalar``. The loss must depend on the parameters only through the
            prediction, unless the matrix is a Hessian. If the attribute ``reduction`` of the function is 'sum', the
            loss is a sum over the batch. Otherwise, it is a mean. A `curvop.TargetLoss` applies a loss function of
            ``torch.nn`` to targets in the batch.
        params : dict of str to Tensor
            Parameters in the order of the rows and columns, either all float32 or all float64. The parameters may have
            ``requires_grad=False``.
        data : iterable of batches
            A list, a ``DataLoader`` or any other iterable that can be read repeatedly. The tensors of a batch are moved
            to the device of the parameters.
        dtype, cache, engine, columns, progress
            As in the constructor.
        batch_weight : callable, optional
            Function ``batch -> w_b`` that returns the weight of a batch. If ``loss`` is a `curvop.TargetLoss` of a loss
            function of ``torch.nn``, the default weight is the number by which this loss function divides. For any
            other loss, the default weight is the size of the first dimension of the tensors in the batch. If this size
            differs between tensors, a `curvop.TargetLoss` uses the size of the targets. Any other loss then has no
            default weight: pass ``batch_weight``.

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
        with a loss function of ``torch.nn``, the examples are the same as those of the constructor. For cross-entropy,
        for example, each target that is not ignored is an example. For any other loss, each index of the first
        dimension of the prediction is an example. The loss of a batch must then be the sum of the losses of its
        examples, divided by the weight of the batch. The number of examples N of a gradient covariance then includes
        examples with a zero gradient, such as ignored targets. If ``loss`` is a `curvop.TargetLoss`, ignored targets
        are not counted.

        The buffers and attributes of all modules that the functions call are restored after each evaluation. To find
        these modules, the operator searches the closure variables, default arguments, global variables and attributes
        of the functions. Other modules are found in the first pass over the data, when their ``forward`` is called. If
        this happens, the evaluation is interrupted and repeated. Attributes of objects that are not modules are not
        restored.

        Examples
        --------
        Each batch is a dict of three tensors. The prediction of the linear regression uses two of them, and the loss
        uses the third:

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

    def block(self, rows: str | Iterable[str], cols: str | Iterable[str] | None = None) -> Self:
        """Return the block of the matrix for the given parameters, as an operator of the same class.

        Parameters
        ----------
        rows : str or iterable of str
            Names of the row parameters, in the order of the block. The name of a module, such as ``"fc1"``, stands for
            all its parameters. A glob pattern, such as ``"fc1.*"`` or ``"*.bias"``, stands for all parameters that it
            matches. The dict that `curvop.select` returns is also accepted. A tied parameter has one name in A
            (``A.params_slices``), and only the dict also finds it by the name of another module that uses it.
        cols : str or iterable of str, optional
            Names of the column parameters. The default is ``rows``, which gives a symmetric block.

        Returns
        -------
        operator
            Operator of shape ``(M, N)``, where M and N are the total sizes of the row and column parameters. The block
            uses the same model and data, but has its own cache and counter.

        Raises
        ------
        KeyError
            If a name is unknown (the message suggests similar names). The error is also a ``ValueError``.
        ValueError
            If a parameter is selected twice, or if no name is given.

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
        names = self._block_names(rows, cols, self._rows, self._cols)
        block._setup(self._objective, self._settings, *names)
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
        r"""Return the Gram matrix :math:`S S^\top` of this matrix, which is :math:`A = S^\top S`.

        Both matrices have the same non-zero eigenvalues. Use the Gram matrix if it is smaller than A. If A is a
        `curvop.EFLinearOperator`, the Gram matrix has one row for each example. If A is a Fisher matrix with
        ``mc_samples=s``, it has s rows for each example. If A is a `curvop.GGNLinearOperator` or an exact Fisher
        matrix, it has C rows for each example with C outputs.

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
            loss of an example depends on other examples.

        See Also
        --------
        curvop.spectrum.eigsh : Compute eigenpairs, from the Gram matrix if it is smaller than A.
        curvop.GramLinearOperator : The operator that is returned.

        Notes
        -----
        The method counts the rows of the Gram matrix in one forward pass over the data. The Gram matrix requires that
        ``data`` yields the batches in the same order in every pass.
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
            If the exact diagonal cannot be computed. The reason can be that the model or the loss couples the examples
            (for example, by batch normalization in training mode). It can also be that torch cannot vectorize the model
            over the examples (for example, if it has recurrent layers). Other reasons are a prediction that consists of
            several tensors, inputs without a tensor that has one row per example, and examples with more than 256
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
        For the empirical Fisher matrix, the cost is one backward pass for each example. For a sampled Fisher matrix, it
        is one backward pass for each pair of an example and a sample. For all other matrices, it is one backward pass
        for each pair of an example and an output. The number of backward passes does not depend on the number of
        parameters.
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
