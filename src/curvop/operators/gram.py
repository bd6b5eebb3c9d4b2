r"""Gram matrices :math:`S S^\top`, which have the same nonzero eigenvalues as the matrices :math:`S^\top S`.

If S has fewer rows than columns, :math:`S S^\top` is the smaller of the two matrices.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from curvop.kernels.errors import NotFactorableError
from curvop.kernels.factor_kernel import FactorKernel, row_counts
from curvop.kernels.factor_rows import write_rows
from curvop.kernels.ggn_kernel import GGNLikeKernel
from curvop.kernels.objective import Objective
from curvop.operators.base import Rows, TensorLinearOperator
from curvop.operators.engine_operator import TORCH_DTYPES, Settings
from curvop.operators.jacobian import JacobianLikeLinearOperator
from curvop.operators.validation import available_bytes, check_fits, real_scalar

__all__ = ["FactorLinearOperator", "GramLinearOperator", "NotFactorableError"]


class FactorLinearOperator(JacobianLikeLinearOperator):
    r"""Factor S of a matrix :math:`S^\top S`, as a ``LinearOperator`` of shape ``(n, P)``.

    The attribute ``factor`` of ``A.gram()`` is such an operator. Each row is the gradient of a linear function of the
    prediction for one example. The rows are in the order of the data, and are scaled such that ``S.T @ S`` equals A.
    The number of rows depends on A:

    - For `curvop.EFLinearOperator`, each example has one row: the gradient of its loss.
    - For `curvop.FisherLinearOperator` with ``mc_samples=s``, each example has s rows, one for each drawn target.
    - For `curvop.GGNLinearOperator` and the exact Fisher matrix, an example with C outputs has C rows: the rows of
      :math:`H_n^{1/2} J_n`, where :math:`H_n` is the Hessian of the loss of the example with respect to the prediction,
      and :math:`J_n` is the Jacobian of the prediction.

    The scaling includes the weights of the batches and the factor :math:`1 / \sqrt W`. Here W is the divisor of A: the
    total weight of all batches if the loss is a mean, and 1 if it is a sum. Blocks, submatrices and the transpose of S
    are obtained as for a `curvop.JacobianLinearOperator`.

    See Also
    --------
    curvop.GramLinearOperator : The matrix ``S @ S.T``.
    curvop.PerExampleGradientLinearOperator : Per-example gradients that are not divided by W.

    Notes
    -----
    Products are computed with ``engine='autograd'``. A product with S, or with its transpose, costs about two thirds of
    a gradient, counted in floating-point operations.
    """

    def __init__(
        self,
        kernel: Callable[[Any, Sequence[str], Sequence[str]], GGNLikeKernel],
        objective: Objective,
        names: Sequence[str],
        settings: Settings,
    ) -> None:
        ordered = copy.copy(objective)  # unlike S.T @ S, S depends on the order of the data
        ordered.keep_order()
        matrix = kernel(ordered, names, names)
        self._kernel = kernel  # `fingerprint` reads its name and its settings
        with torch.inference_mode(False):
            sizes = row_counts(matrix)
        self._setup(FactorKernel(matrix, sizes), dataclasses.replace(settings, engine="autograd"))

    def formed(self, memory: int | None = None) -> Tensor:
        """Form the factor as a tensor.

        Parameters
        ----------
        memory : int, optional
            The number of bytes that may be used. The default is half of the free memory of the device.

        Returns
        -------
        rows : Tensor, shape (n, P)
            The factor in the dtype of the operator, on the device of the parameters. For the transpose, the shape is
            ``(P, n)``.

        Raises
        ------
        MemoryError
            If the factor does not fit into ``memory``.
        NonFiniteProductError
            If the factor contains NaN or infinity. The message names the batch.

        Notes
        -----
        The computation takes one pass over the data. If the model treats its examples independently and
        ``torch.func.vmap`` supports the model, the pass costs a few gradients for each row of an example. Otherwise,
        each row of the factor takes one backward pass over its batch.
        """
        rows, cols = self.shape[::-1] if self._is_transpose else self.shape
        dtype = TORCH_DTYPES[self.dtype]
        check_fits(
            rows * cols * dtype.itemsize,
            available_bytes(self.device, memory),
            f"the factor, a matrix of shape {(rows, cols)},",
            "use products with the factor instead",
        )
        with torch.inference_mode(False):
            out = torch.empty(rows, cols, dtype=dtype, device=self.device)
            kernel = cast("FactorKernel", self._untransposed)
            self._retry_on_out_of_memory(lambda: write_rows(kernel, self._names.names, out))
        return out.T if self._is_transpose else out

    def fingerprint(self, data: bool = True) -> dict[str, str]:
        """Return a dict of digests of all inputs that determine the matrix.

        Parameters
        ----------
        data : bool, default True
            Whether to include digests of the data, which are computed in one pass over the data.

        Returns
        -------
        parts : dict of str to str
            See `curvop.HessianLinearOperator.fingerprint`.
        """
        return super().fingerprint(data) | {"matrix": getattr(self._kernel, "func", self._kernel).__name__}


class GramLinearOperator(TensorLinearOperator):
    r"""Gram matrix :math:`S S^\top` of a matrix :math:`A = S^\top S`, as a ``LinearOperator`` of shape ``(n, n)``.

    The method ``A.gram()`` returns such an operator. A has P rows, one for each entry of the parameters. The Gram
    matrix has n rows, one for each row of S. Depending on A, S has one row for each example, one for each pair of an
    example and an output, or one for each pair of an example and a drawn target. Both matrices have the same nonzero
    eigenvalues. If n is smaller than P, eigensolvers and other Lanczos methods work with shorter vectors, and need less
    memory and less time between products. By default, `curvop.spectrum.eigsh` uses the Gram matrix if it is smaller
    than A and has the requested eigenvalues.

    Parameters
    ----------
    factor : LinearOperator, shape (n, P)
        The factor S, an operator of this package.
    shift : float, default 0.0
        Number that is added to the diagonal of the Gram matrix. All eigenvalues of this sum, except ``shift`` itself,
        are also eigenvalues of ``A + shift * I``. Each eigenvector of ``A + shift * I`` for such an eigenvalue is a
        linear combination of the rows of S.

    Attributes
    ----------
    factor : LinearOperator, shape (n, P)
        The factor S of ``A = S.T @ S``.
    shift : float
        Number that is added to the diagonal.

    See Also
    --------
    curvop.spectrum.eigsh : Compute eigenpairs, from the Gram matrix if it is smaller than A.
    curvop.EFLinearOperator.gram, curvop.GGNLinearOperator.gram, curvop.FisherLinearOperator.gram

    Notes
    -----
    A product with the Gram matrix takes one product with the transpose of S and one with S. Together, they cost as much
    as a product with A. If v is an eigenvector of norm 1 of the Gram matrix with the eigenvalue :math:`\lambda > 0`,
    then :math:`S^\top v / \sqrt\lambda` is an eigenvector of norm 1 of A with the same eigenvalue. v is a left singular
    vector of S, and :math:`S^\top v / \sqrt\lambda` is a right singular vector of S [1]_. For a model that is linear in
    its parameters, the Gram matrix of a Gauss-Newton matrix is a weighted kernel matrix.

    References
    ----------
    .. [1] G. H. Golub, C. F. Van Loan, "Matrix Computations", 4th edition, Johns Hopkins University Press, 2013,
       section 8.6.1.

    Examples
    --------
    The empirical Fisher matrix of a network with 1,149 parameters and 20 images has at most 20 nonzero eigenvalues.
    Compute the three largest eigenvalues from the Gram matrix:

    >>> import numpy as np
    >>> import torch
    >>> from scipy.sparse.linalg import eigsh
    >>> from torch import nn
    >>> from curvop import EFLinearOperator
    >>> _ = torch.manual_seed(0)
    >>> X, y = torch.rand(20, 16).double(), torch.randint(0, 5, (20,))
    >>> model = nn.Sequential(nn.Linear(16, 52), nn.Tanh(), nn.Linear(52, 5)).double()
    >>> F = EFLinearOperator(model, nn.CrossEntropyLoss(), dict(model.named_parameters()), [(X, y)])
    >>> K = F.gram()
    >>> F.shape, K.shape
    ((1149, 1149), (20, 20))
    >>> values, vectors = eigsh(K, k=3, rng=0)
    >>> lifted = K.lift(vectors)
    >>> bool(np.abs(F @ lifted - lifted * values).max() < 1e-12)
    True
    """

    def __init__(self, factor: TensorLinearOperator, shift: float = 0.0) -> None:
        if not isinstance(factor, TensorLinearOperator):
            raise TypeError(
                f"factor is a {type(factor).__name__}: pass an operator of this package, such as a Jacobian"
            )
        super().__init__(factor.dtype, (factor.shape[0], factor.shape[0]))
        self.factor = factor
        self.shift = real_scalar("shift", shift)
        self.args = (factor, self.shift)  # SciPy's composite operators also have this attribute

    def release_cache(self) -> None:
        """Free the memory of the batches that are kept between products."""
        self.factor.release_cache()

    def _details(self) -> list[str]:
        rows, cols = self.factor.shape
        shift = f" + {self.shift:.6g} * I" if self.shift else ""
        return [f"S @ S.T{shift} with S a {rows}x{cols} {self.factor._formula()}", *self.factor._details()]

    @property
    def device(self) -> torch.device:
        """Device of the parameters, on which products are computed. Tensors on this device are not copied."""
        return self.factor.device

    @property
    def epsilon(self) -> float:
        """Machine epsilon of the lowest precision used in a product."""
        return self.factor.epsilon

    def shifted(self, shift: float) -> GramLinearOperator:
        """Return the sum of this operator and ``shift * I``.

        Parameters
        ----------
        shift : float
            Number that is added to the diagonal, in addition to the attribute ``shift``.

        Returns
        -------
        GramLinearOperator
            Operator with the same factor.
        """
        return type(self)(self.factor, self.shift + real_scalar("shift", shift))

    def lift(self, u: Any) -> Any:
        """Map vectors of length n to vectors of length P. Eigenvectors of the Gram matrix become eigenvectors of A.

        Parameters
        ----------
        u : array or Tensor, shape (n,) or (n, K)
            One or several vectors, for example eigenvectors of the Gram matrix.

        Returns
        -------
        ndarray or Tensor, shape (P,) or (P, K)
            The columns of ``S.T @ u``, normalized to norm 1. A column of zeros stays zero. If the eigenvalue of an
            eigenvector in u is zero, the resulting column is zero or consists of rounding errors.
        """
        lifted = self.factor.T @ u
        if isinstance(lifted, Tensor):
            norms = lifted.norm(dim=0)
            return lifted / torch.where(norms > 0, norms, 1.0)
        norms = np.linalg.norm(lifted, axis=0)
        return lifted / np.where(norms > 0, norms, 1.0)

    def formed_factor(self, memory: int | None = None) -> Tensor:
        """Form the factor S as a tensor.

        Parameters
        ----------
        memory : int, optional
            Number of bytes that may be used. The default is half of the free memory.

        Returns
        -------
        factor : Tensor, shape (n, P)
            The factor, on the device of the parameters.

        Raises
        ------
        MemoryError
            If the factor does not fit into memory.
        """
        if isinstance(self.factor, FactorLinearOperator):
            return self.factor.formed(memory)
        return torch.from_numpy(self.factor.to_dense(memory=memory)).to(self.device)

    def _check_entries(self, x: Rows) -> None:
        self.factor._check_entries(x)

    def _product_dtype(self, dtype: Any) -> Any:
        return self.factor._product_dtype(dtype)

    def _apply(self, rows: Rows) -> Rows:
        products: Any = self.factor._multiply_last_axis(self.factor.T._multiply_last_axis(rows))
        if self.shift:
            products += self.shift * rows
        return cast("Rows", products)
