"""Submatrices of operators, and the base class of operators that accept both NumPy arrays and torch tensors.

SciPy's solvers apply operators to arrays of shape ``(N,)``, ``(N, 1)`` and ``(N, K)``, and, in SciPy >= 1.18, also to
stacks of such arrays. Users may also pass a tensor, or a dict, list or tuple with one tensor per parameter.
`TensorLinearOperator` validates all of these inputs and passes them to a single method, ``_apply``, which computes the
product with each row of a ``(K, N)`` array or tensor. Subclasses implement ``_apply``.

A product with a submatrix takes three steps: the vector is scattered into a vector of zeros, the full operator is
applied once, and the selected rows of the result are gathered.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any, Self, cast

import numpy as np
import scipy.sparse
import torch
from numpy.typing import NDArray
from scipy.sparse.linalg import LinearOperator
from torch import Tensor

__all__ = [
    "ProductCounter",
    "SubmatrixLinearOperator",
    "TensorLinearOperator",
    "WrappingLinearOperator",
    "unsupported_layout",
]

#: Two-dimensional array or tensor. Each row is a vector, or the product of an operator with a vector.
Rows = NDArray[Any] | Tensor

_BOOLEANS = {np.dtype(bool), torch.bool}


class ProductCounter:
    """Counter of products that is shared by an operator and its adjoint."""

    def __init__(self) -> None:
        self.total = 0


class TensorLinearOperator(LinearOperator):  # type: ignore[misc]
    """Linear operator that can be applied to NumPy arrays and torch tensors.

    Subclasses implement ``_apply``. Subclasses that are not real and symmetric also implement ``_adjoint``. Complex
    subclasses also implement ``_transpose``.

    Parameters
    ----------
    dtype : dtype or None
        Data type of the products, as for SciPy's ``LinearOperator``.
    shape : tuple of int
        ``(M, N)``.
    counter : ProductCounter, optional
        Counter that is shared with another operator. By default, the operator has its own counter.
    """

    def __init__(self, dtype: Any, shape: tuple[int, int], counter: ProductCounter | None = None) -> None:
        super().__init__(dtype, shape)
        self._counter = ProductCounter() if counter is None else counter

    @property
    def num_products(self) -> int:
        """Number of products computed so far, including products with the adjoint.

        Each column of a matrix counts as one product.
        """
        return self._counter.total

    @property
    def takes_tensors(self) -> bool:
        """Whether the operator can be applied to tensors. If False, it accepts NumPy arrays only."""
        return True

    @property
    def device(self) -> torch.device:
        """Device on which products are computed. Tensors on this device are not copied."""
        return torch.device("cpu")

    def submatrix(self, rows: Any, cols: Any = None) -> SubmatrixLinearOperator:
        """Return the submatrix ``A[rows, :][:, cols]`` as an operator.

        Parameters
        ----------
        rows : slice, range, list, tuple, integer or boolean array, or integer or boolean tensor
            One-dimensional selection of rows, interpreted as in NumPy. Negative indices count from the end, and indices
            may repeat.
        cols : same types as ``rows``, optional
            Selection of columns. By default, the same as ``rows``, which gives a principal submatrix.

        Returns
        -------
        SubmatrixLinearOperator
            Operator of shape ``(m, n)``, where m and n are the numbers of selected rows and columns.

        Raises
        ------
        IndexError
            If an index is out of range, a mask has the wrong length, or a selection is not one-dimensional.
        TypeError
            If indices are not integers.

        See Also
        --------
        curvop.SubmatrixLinearOperator : Submatrix of any operator, including SciPy's.

        Notes
        -----
        If the rows and columns of A are parameters, a product with the submatrix costs as much as a product with the
        smallest block of whole parameters that contains the submatrix.
        """
        return SubmatrixLinearOperator(self, rows, rows if cols is None else cols)

    def diagonal(self) -> NDArray[Any]:
        """Return the exact diagonal, if the operator can compute it without products.

        Returns
        -------
        diagonal : ndarray, shape (N,)
            Diagonal in the dtype of the operator.

        Raises
        ------
        NotImplementedError
            If the operator cannot compute its diagonal (for example, a Hessian). Use `curvop.spectrum.diagonal` to
            estimate the diagonal.

        See Also
        --------
        curvop.spectrum.diagonal : Estimate the diagonal from products.
        """
        raise NotImplementedError(
            f"a {type(self).__name__} does not know its diagonal: curvop.spectrum.diagonal estimates it from products"
        )

    def __getitem__(self, key: Any) -> SubmatrixLinearOperator:
        """Return the submatrix ``A[rows, :]``, ``A[:, cols]`` or ``A[rows, cols]``.

        In ``A[rows, cols]``, at least one of the two indices must be a slice. ``A[np.ix_(rows, cols)]`` and
        ``A.submatrix(rows, cols)`` accept any two selections.
        """
        keys = list(key) if isinstance(key, tuple) else [key]
        if any(part is Ellipsis for part in keys):
            position = next(index for index, part in enumerate(keys) if part is Ellipsis)
            keys[position : position + 1] = [slice(None)] * (3 - len(keys))
        if not 1 <= len(keys) <= 2:
            raise IndexError(f"A has two axes, but {len(keys)} indices were given: pass A[rows, cols]")
        rows, cols = (*keys, slice(None))[:2]
        if _is_open_mesh(rows, cols):
            return self.submatrix(rows[:, 0], cols.reshape(-1))
        if not isinstance(rows, slice) and not isinstance(cols, slice):
            raise IndexError(
                "A[rows, cols] with two index arrays selects single entries in NumPy: use A[rows, :][:, cols] or "
                "A.submatrix(rows, cols) for the submatrix"
            )
        return self.submatrix(rows, cols)

    __iter__ = None  # otherwise, iteration would call __getitem__(0), whose IndexError ends the loop silently

    # SciPy calls the following methods after it has checked the shapes.

    def _matvec(self, x: Any) -> NDArray[Any]:
        """Apply the operator to an array ``(N,)``, ``(N, 1)`` or, with SciPy >= 1.18, a stack ``(..., N)``."""
        x = np.asarray(x)
        if x.ndim == 2 and x.shape == (self.shape[1], 1):  # a column, or a stack of vectors if N = 1
            return self._matmat(x)
        return cast("NDArray[Any]", self._multiply_last_axis(x))

    def _matmat(self, X: Any) -> NDArray[Any]:
        """Apply the operator to an array ``(N, K)`` or, with SciPy >= 1.18, a stack ``(..., N, K)``."""
        return cast("NDArray[Any]", self._multiply_last_axis(np.asarray(X).swapaxes(-1, -2)).swapaxes(-1, -2))

    def _adjoint(self) -> LinearOperator:
        return self

    def _transpose(self) -> LinearOperator:
        return self._adjoint()

    def _apply(self, rows: Rows) -> Rows:
        """Multiply the operator by each row of an array or tensor of shape ``(K, N)``.

        The result has shape ``(K, M)`` and does not share memory with ``rows``. K, M and N are positive.
        """
        raise NotImplementedError

    def _smallest_block(
        self, rows: NDArray[np.intp], cols: NDArray[np.intp]
    ) -> tuple[TensorLinearOperator, NDArray[np.intp], NDArray[np.intp]]:
        """Return (block, rows, cols), where ``block`` is the smallest block that contains the given rows and columns.

        The returned ``rows`` and ``cols`` are the indices of the given rows and columns within ``block``.
        """
        return self, rows, cols

    def _multiply_last_axis(self, x: Rows) -> Rows:
        """Apply the operator to each vector along the last axis of ``x``.

        ``x`` has shape ``(..., N)``, and the product has shape ``(..., M)``.
        """
        if not isinstance(x, Tensor) and not x.dtype.isnative:  # torch supports only the native byte order
            x = x.astype(x.dtype.newbyteorder("="))
        self._check_entries(x)
        (size, length), stack = self.shape, tuple(x.shape[:-1])
        count = math.prod(stack)
        if 0 in (count, length, size):
            return self._zeros((*stack, size), x)
        self._counter.total += count
        return self._apply(x.reshape(count, length)).reshape(*stack, size)

    def _check_entries(self, x: Rows) -> None:
        """Raise a ``TypeError`` if the operator does not support the type or dtype of ``x``."""

    def _zeros(self, shape: tuple[int, ...], like: Rows) -> Rows:
        if isinstance(like, Tensor):
            return torch.zeros(shape, dtype=like.dtype, device=like.device)
        return np.zeros(shape, dtype=self._product_dtype(like.dtype))

    def _product_dtype(self, dtype: Any) -> Any:
        """Return the dtype of the product with an array of dtype ``dtype``."""
        return np.result_type(self.dtype, dtype)

    def _is_tree(self, x: Any) -> bool:
        """Return True if ``x`` is a mapping, or a sequence in which at least one tensor has one or more dimensions.

        If the result is True, ``x`` is interpreted as one tensor per parameter. A list of 0-dimensional tensors is
        interpreted as a vector.
        """
        return isinstance(x, Mapping) or any(isinstance(part, Tensor) and part.ndim for part in x)

    def _tree_product(self, x: Any) -> Any:
        """Return the product with a mapping, list or tuple that contains one tensor per column parameter."""
        raise TypeError(
            f"x is a {type(x).__name__} of tensors, but the columns of A, a {type(self).__name__}, are not whole "
            f"parameters: pass one vector ({self.shape[1]},)"
        )

    # The following methods handle tensors themselves, because SciPy would convert tensors to arrays. They also check
    # shapes, because SciPy's message for a wrong length does not contain the shapes.

    def dot(self, x: Any) -> Any:
        """Multiply the operator by a vector, a matrix, a scalar or an operator.

        ``A @ x`` is equivalent, but does not accept scalars.

        Parameters
        ----------
        x : array, Tensor, dict, list or tuple of Tensor, scalar, or LinearOperator
            Vector of shape ``(N,)`` or matrix of shape ``(N, K)``. If the columns of A are parameters, ``x`` may also
            be a dict, list or tuple that contains one tensor for each column parameter, with the shape of the
            parameter.

        Returns
        -------
        ndarray, Tensor, dict, list, tuple or LinearOperator
            Product of the same type as ``x``. If ``x`` is a tensor, the product has the device and dtype of ``x`` and
            does not require grad. If ``x`` is a dict, list or tuple, the product contains one tensor for each row
            parameter, on the device of the parameter. If the rows are not parameters, the product is a single tensor
            instead. If ``x`` is a scalar or an operator, the product is an operator.

        Raises
        ------
        ValueError
            If the shape of ``x`` does not match the columns of A.
        TypeError
            If A does not support the dtype of ``x``, or if ``x`` contains one tensor per parameter but the columns of A
            are not whole parameters.
        """
        if self._is_vector_array(x):
            return self._multiply_last_axis(x)
        if isinstance(x, Mapping | list | tuple) and self._is_tree(x):
            return self._tree_product(x)
        x = _as_python_scalar(x)
        if not isinstance(x, LinearOperator) and not np.isscalar(x):
            self._check_shape(x, x_is_vector=len(_shape(x)) == 1)
        return self._tensor_product(x) if isinstance(x, Tensor) else super().dot(x)

    def matvec(self, x: Any) -> Any:
        """Multiply the operator by a vector.

        Parameters
        ----------
        x : array or Tensor, shape (N,), (N, 1) or (..., N)
            Vector, column, or stack of vectors.

        Returns
        -------
        ndarray or Tensor, shape (M,), (M, 1) or (..., M)
            Product of the same type as ``x``.

        Raises
        ------
        ValueError
            If the shape of ``x`` does not match the columns of A.
        TypeError
            If A does not support the dtype of the array or tensor.
        """
        if self._is_vector_array(x):
            return self._multiply_last_axis(x)
        column = _shape(x) == (self.shape[1], 1)
        self._check_shape(x, x_is_vector=not column)
        if column and isinstance(x, Tensor):
            return self._tensor_product(x)
        if isinstance(x, Tensor):
            return self._multiply_last_axis(self._as_floating(x))
        # Only SciPy >= 1.18 multiplies stacks.
        return super().matvec(x) if column or np.ndim(x) == 1 else self._multiply_last_axis(np.asarray(x))

    def matmat(self, X: Any) -> Any:
        """Multiply the operator by a matrix.

        Parameters
        ----------
        X : array or Tensor, shape (N, K)
            Matrix of K columns.

        Returns
        -------
        ndarray or Tensor, shape (M, K)
            Product of the same type as ``X``.

        Raises
        ------
        ValueError
            If the shape of ``X`` does not match the columns of A.
        TypeError
            If A does not support the dtype of the array or tensor.
        """
        self._check_shape(X, x_is_vector=False)
        return self._tensor_product(X) if isinstance(X, Tensor) else super().matmat(X)

    def rmatvec(self, x: Any) -> Any:
        """Multiply the adjoint of the operator by a vector.

        Parameters
        ----------
        x : array or Tensor, shape (M,) or (M, 1)
            Vector or column.

        Returns
        -------
        ndarray or Tensor, shape (N,) or (N, 1)
            Product of the same type as ``x``.

        Raises
        ------
        ValueError
            If the shape of ``x`` does not match the rows of A.
        TypeError
            If A does not support the dtype of the array or tensor.
        """
        return self.H.matvec(x)

    def rmatmat(self, X: Any) -> Any:
        """Multiply the adjoint of the operator by a matrix.

        Parameters
        ----------
        X : array or Tensor, shape (M, K)
            Matrix of K columns.

        Returns
        -------
        ndarray or Tensor, shape (N, K)
            Product of the same type as ``X``.

        Raises
        ------
        ValueError
            If the shape of ``X`` does not match the rows of A.
        TypeError
            If A does not support the dtype of the array or tensor.
        """
        return self.H.matmat(X)

    def __matmul__(self, other: Any) -> Any:
        """Return ``A @ x`` for a vector, a matrix or an operator ``x``."""
        return super().__matmul__(_as_python_scalar(other))

    def __rmatmul__(self, other: Any) -> Any:
        """Return ``x @ A`` for a vector, a matrix or an operator ``x``."""
        if isinstance(other, Mapping | list | tuple) and self._is_tree(other):
            return self.T.dot(other)
        other = _as_python_scalar(other)
        if not isinstance(other, Tensor):
            return super().__rmatmul__(other)
        return self.T.dot(other) if other.ndim == 1 else self.T.dot(other.swapaxes(-1, -2)).swapaxes(-1, -2)

    def __rmul__(self, other: Any) -> Any:
        """Return ``c * A`` for a scalar ``c``, and ``x @ A`` for other operands ``x``."""
        other = _as_python_scalar(other)
        return self.__rmatmul__(other) if isinstance(other, Tensor) else super().__rmul__(other)

    def __truediv__(self, other: Any) -> LinearOperator:
        """Return ``A / c`` for a scalar ``c``."""
        return super().__truediv__(_as_python_scalar(other))

    def __add__(self, other: Any) -> LinearOperator:
        """Return ``A + B`` for an operator ``B``."""
        return super().__add__(other) if isinstance(other, LinearOperator) else self._unsupported_sum(other)

    def __sub__(self, other: Any) -> LinearOperator:
        """Return ``A - B`` for an operator ``B``."""
        return super().__sub__(other) if isinstance(other, LinearOperator) else self._unsupported_sum(other)

    def __radd__(self, other: Any) -> LinearOperator:
        """Call `_unsupported_sum` for ``B + A`` and ``B - A`` if ``B`` is not an operator."""
        return self._unsupported_sum(other)

    __rsub__ = __radd__

    def _unsupported_sum(self, other: Any) -> Any:
        """Raise a ``TypeError`` if ``other`` is a matrix or a number, and return ``NotImplemented`` otherwise."""
        matrix = isinstance(other, np.ndarray | Tensor | list) or scipy.sparse.issparse(other)
        if not matrix and not np.isscalar(other):
            return NotImplemented
        damped = "A.damped(lam) for A + lam * I" if hasattr(self, "damped") else ""
        wrapped = "A + scipy.sparse.linalg.aslinearoperator(B) for a matrix B" if matrix or not damped else ""
        raise TypeError(
            f"a {type(self).__name__} A and a {type(other).__name__} cannot be added or subtracted: write "
            f"{', or '.join(filter(None, (damped, wrapped)))}"
        )

    def _is_vector_array(self, x: Any) -> bool:
        """Return True if ``x`` is an ndarray of shape ``(N,)``, which needs no conversion."""
        return type(x) is np.ndarray and x.shape == self.shape[1:]

    def _tensor_product(self, x: Tensor) -> Tensor:
        x = self._as_floating(x)
        if x.ndim == 1:
            return cast("Tensor", self._multiply_last_axis(x))
        return cast("Tensor", self._multiply_last_axis(x.swapaxes(-1, -2)).swapaxes(-1, -2))

    def _as_floating(self, x: Tensor, what: str = "x") -> Tensor:
        """Return ``x`` detached from its autograd graph. Integers are converted to the dtype of the operator."""
        if (kind := unsupported_layout(x)) is not None:
            raise TypeError(f"{what} is a tensor that is {kind}: pass a dense one with values, such as x.to_dense()")
        if x.is_floating_point() or x.is_complex():
            return x.detach()
        return x.to(torch.float64 if self.dtype == np.float64 else torch.float32)

    def _check_shape(self, x: Any, x_is_vector: bool) -> None:
        """Raise a ``ValueError`` with both shapes if the shape of ``x`` does not match the shape of A.

        The check is necessary because the message of SciPy does not contain the shapes.
        """
        shape = _shape(x)
        length = shape[-1] if x_is_vector and shape else shape[-2] if len(shape) > 1 else None
        if length != self.shape[1]:
            raise ValueError(
                f"x has shape {shape}, but A has shape {self.shape}: "
                f"x must be ({self.shape[1]},) or ({self.shape[1]}, K)"
            )


def _shape(x: Any) -> tuple[int, ...]:
    try:
        return tuple(np.shape(x))
    except ValueError:
        raise ValueError(
            "x holds sequences of different lengths: pass one array, or a list with one tensor per column parameter"
        ) from None


def _as_python_scalar(x: Any) -> Any:
    """Convert NumPy scalars and 0-dimensional arrays or tensors to Python numbers. Return other values unchanged.

    SciPy does not treat 0-dimensional tensors and arrays as scalars, and ``numpy.longdouble(2) * A`` would change the
    dtype of A.
    """
    if isinstance(x, Tensor):
        return x if x.ndim else x.item()
    if not isinstance(x, np.generic | np.ndarray) or x.ndim or x.dtype.kind not in "biufc":
        return x
    wide = {"g": np.float64, "G": np.complex128}  # item() does not convert these types
    return x.astype(wide.get(x.dtype.char, x.dtype)).item()


def _is_open_mesh(rows: Any, cols: Any) -> bool:
    """Return True if the arguments are integer arrays or tensors that form an open mesh, like those from ``numpy.ix_``.

    ``rows`` must have shape ``(m, 1)``, and ``cols`` must have shape ``(1, n)`` or ``(n,)``. Boolean masks are
    excluded, because NumPy interprets a two-dimensional mask as a selection of single entries.
    """
    kinds = np.ndarray | Tensor
    if not (isinstance(rows, kinds) and isinstance(cols, kinds)) or {rows.dtype, cols.dtype} & _BOOLEANS:
        return False
    return rows.shape[1:] == (1,) and tuple(cols.shape[:-1]) in ((1,), ())


def unsupported_layout(x: Tensor) -> str | None:
    """Return None if ``x`` is a dense tensor with values. Otherwise, return a phrase such as "on the meta device".

    The phrase is used in error messages.
    """
    if x.is_meta:
        return "on the meta device"
    if x.is_quantized:
        return "quantized"
    return None if x.layout == torch.strided else str(x.layout)


class WrappingLinearOperator(TensorLinearOperator):
    """Base class of operators that compute products with another operator ``_A`` of this package or of SciPy."""

    _A: LinearOperator

    @property
    def takes_tensors(self) -> bool:
        """Whether ``_A`` can be applied to tensors. This is False for operators of SciPy."""
        return isinstance(self._A, TensorLinearOperator) and self._A.takes_tensors

    @property
    def device(self) -> torch.device:
        """Device on which ``_A`` computes products. This is the CPU if ``_A`` is an operator of SciPy."""
        return self._A.device if isinstance(self._A, TensorLinearOperator) else super().device

    def _product_dtype(self, dtype: Any) -> Any:
        known = isinstance(self._A, TensorLinearOperator)
        return self._A._product_dtype(dtype) if known else super()._product_dtype(dtype)


# Submatrices.


class SubmatrixLinearOperator(WrappingLinearOperator):
    """Submatrix ``A[row_idxs, :][:, col_idxs]`` of any SciPy ``LinearOperator``, with NumPy's indexing.

    For operators of this package, ``A.submatrix(rows, cols)`` and ``A[rows, :][:, cols]`` return the same submatrix. If
    the rows and columns are whole parameters, use ``A.block(names)`` instead. A block retains the names and shapes of
    its parameters.

    Parameters
    ----------
    A : LinearOperator
        Real or complex operator with any numbers of rows and columns. If A is itself a submatrix, the indices are
        converted to indices of the operator from which A was taken.
    row_idxs : slice, range, list, tuple, integer or boolean array, or integer or boolean tensor on any device
        One-dimensional selection of rows, interpreted as in NumPy. Negative indices count from the end. A list that
        contains both booleans and integers is a list of integers. Indices may repeat: a repeated row is computed once
        and appears several times in the product. An empty selection gives an operator without rows. An array with dtype
        object must contain integers.
    col_idxs : same types as ``row_idxs``
        Selection of columns. If a column is repeated, the entries of the vector for this column are added. An empty
        selection gives an operator without columns, whose products are zero.

    Raises
    ------
    IndexError
        If an index is out of range (unsigned integers do not wrap around), if a mask has the wrong length, if indices
        are not one-dimensional, or if an array with dtype object contains only booleans.
    TypeError
        If indices are not integers, or A is not a ``LinearOperator``.
    ValueError
        If A is a stack of operators (SciPy >= 1.18).

    See Also
    --------
    curvop.HessianLinearOperator.block : Block of whole parameters.
    curvop.spectrum.blocks : Spectra of all diagonal blocks.

    Notes
    -----
    A product scatters the vector into a vector of zeros, applies A once, and gathers the selected rows. If the rows and
    columns of A are parameters, A is first replaced by the smallest block of whole parameters (``A.block(...)``) that
    contains the submatrix. A product then costs as much as a product with this block.

    Examples
    --------
    Two rows and two columns of a dense matrix:

    >>> import numpy as np
    >>> from scipy.sparse.linalg import aslinearoperator
    >>> from curvop import SubmatrixLinearOperator
    >>> A = aslinearoperator(np.arange(12.0).reshape(3, 4))
    >>> SubmatrixLinearOperator(A, [0, -1], slice(1, 3)) @ np.eye(2)
    array([[ 1.,  2.],
           [ 9., 10.]])

    Restrict the Hessian of a regression to the five weights of largest magnitude. The eigenvalues of this submatrix
    interlace those of the full matrix:

    >>> import torch
    >>> from curvop import HessianLinearOperator
    >>> _ = torch.manual_seed(0)
    >>> X, y = torch.randn(50, 20, dtype=torch.float64), torch.randn(50, 1, dtype=torch.float64)
    >>> model = torch.nn.Linear(20, 1, bias=False, dtype=torch.float64)
    >>> H = HessianLinearOperator(model, torch.nn.MSELoss(), dict(model.named_parameters()), [(X, y)])
    >>> largest = model.weight.detach().abs().reshape(-1).topk(5).indices
    >>> S = H.submatrix(largest)
    >>> S.shape
    (5, 5)
    >>> exact = (2 / 50 * X.T @ X)[largest][:, largest].numpy()
    >>> np.allclose(S @ np.eye(5), exact)
    True
    """

    def __init__(self, A: LinearOperator, row_idxs: Any, col_idxs: Any) -> None:
        if not isinstance(A, LinearOperator):
            raise TypeError(
                f"A is a {type(A).__name__}, not a LinearOperator: wrap it, scipy.sparse.linalg.aslinearoperator(A)"
            )
        if len(A.shape) != 2:
            raise ValueError(f"A has shape {A.shape}, but must have two dimensions: take one operator of the stack")
        rows, cols = _indices("row_idxs", row_idxs, A.shape[0]), _indices("col_idxs", col_idxs, A.shape[1])
        if isinstance(A, SubmatrixLinearOperator):
            A, rows, cols = A._A, A._rows.idxs[rows], A._cols.idxs[cols]
        if isinstance(A, TensorLinearOperator) and rows.size and cols.size:
            A, rows, cols = A._smallest_block(rows, cols)
        self._setup(A, _Selection(rows, A.shape[0]), _Selection(cols, A.shape[1]))

    def _setup(self, A: LinearOperator, rows: _Selection, cols: _Selection) -> None:
        self._A = A
        self._rows = rows
        self._cols = cols
        super().__init__(A.dtype, (rows.idxs.size, cols.idxs.size))
        self.args = (A, rows.idxs, cols.idxs)  # SciPy's composite operators have this attribute

    def _like(self, A: LinearOperator, rows: _Selection, cols: _Selection) -> Self:
        """Return a submatrix of ``A`` that shares the counter of ``self``. The selections must be valid for ``A``."""
        submatrix = type(self).__new__(type(self))
        submatrix._setup(A, rows, cols)
        submatrix._counter = self._counter
        return submatrix

    def diagonal(self) -> NDArray[Any]:
        """Return the exact diagonal of a principal submatrix.

        Returns
        -------
        diagonal : ndarray, shape (n,)
            Diagonal of the submatrix. Only the parameters that contain the selected rows are used to compute it.

        Raises
        ------
        ValueError
            If the row indices and the column indices are not the same, in the same order.
        NotImplementedError
            If A cannot compute its diagonal. Use `curvop.spectrum.diagonal` to estimate the diagonal.
        """
        if not np.array_equal(self._rows.idxs, self._cols.idxs):
            raise ValueError(
                f"rows and columns of this submatrix of shape {self.shape} are different: "
                "take the principal one, A.submatrix(idxs), for a diagonal"
            )
        if not self._rows.idxs.size:
            return np.zeros(0, dtype=self.dtype)
        whole = getattr(self._A, "diagonal", super().diagonal)
        diagonal: NDArray[Any] = whole()[self._rows.idxs]
        return diagonal

    def _adjoint(self) -> Self:
        adjoint = self._A.H
        if adjoint is self._A and np.array_equal(self._rows.idxs, self._cols.idxs):
            return self
        return self._like(adjoint, self._cols, self._rows)

    def _transpose(self) -> Self:
        real = self.dtype is not None and self.dtype.kind != "c"
        return self._adjoint() if real else self._like(self._A.T, self._cols, self._rows)

    def _check_entries(self, x: Rows) -> None:
        if isinstance(self._A, TensorLinearOperator):
            self._A._check_entries(x)
        elif isinstance(x, Tensor):
            raise TypeError(f"A, a {type(self._A).__name__}, takes NumPy arrays only: pass x.numpy(force=True)")

    def _apply(self, rows: Rows) -> Rows:
        if isinstance(self._A, TensorLinearOperator):
            kind: Any = rows.dtype
            if not self._cols.distinct:  # add the entries for repeated columns in at least the precision of A
                rows = self._widened(rows)
            whole = rows if self._cols.everything else self._cols.scatter(rows)
            products = self._A._multiply_last_axis(whole)
            products = products if self._rows.everything else self._rows.gather(products)
            return products.to(kind) if isinstance(products, Tensor) else products
        # Convert to at least the precision of A. If A has no dtype, convert integers to ``intp``, so that sums do not
        # overflow.
        array = cast("NDArray[Any]", rows)
        if self.dtype is not None:
            dtype = self.dtype
        elif array.dtype.kind in "biu":
            dtype = np.dtype(np.intp)
        else:
            dtype = array.dtype
        rows = array.astype(np.result_type(dtype, array.dtype), copy=False)
        whole = cast("NDArray[Any]", self._cols.scatter(rows))
        products = self._A.matvec(whole[0])[None] if len(whole) == 1 else self._A.matmat(whole.T).T
        return self._rows.gather(np.asarray(products))

    def _widened(self, rows: Rows) -> Rows:
        if isinstance(rows, Tensor):
            return rows.to(
                torch.promote_types(rows.dtype, torch.float64 if self.dtype == np.float64 else torch.float32)
            )
        return rows.astype(np.result_type(self.dtype, rows.dtype), copy=False)


class _Selection:
    """Validated indices along an axis. All indices are in ``[0, length)``.

    Attributes
    ----------
    idxs : ndarray of intp
        Indices.
    everything : bool
        Whether the indices are exactly ``0, 1, ..., length - 1``.
    distinct : bool
        Whether no index is repeated.
    """

    def __init__(self, idxs: NDArray[np.intp], length: int) -> None:
        self.idxs = idxs
        self._length = length
        self._slice = _as_slice(idxs)
        self.everything = self._slice == slice(0, length)
        seen = np.zeros(length, dtype=bool)
        seen[idxs] = True
        self.distinct = np.count_nonzero(seen) == idxs.size
        self._on_device: Tensor | None = None

    def scatter(self, rows: Rows) -> Rows:
        """Write the columns of ``rows`` at the selected indices of a new array or tensor, which is zero elsewhere.

        ``rows`` has shape ``(K, idxs.size)``, and the result has shape ``(K, length)``. Columns with equal indices are
        added.
        """
        if isinstance(rows, Tensor):
            whole = rows.new_zeros(len(rows), self._length)
            if self.distinct:
                whole[:, self._index_for(rows)] = rows
                return whole
            return whole.index_add_(1, self._tensor(rows.device), rows)
        array = np.zeros((len(rows), self._length), dtype=rows.dtype)
        if self.distinct:
            array[:, self._index_for(rows)] = rows
        else:
            for target, row in zip(array, rows, strict=True):
                np.add.at(target, self.idxs, row)
        return array

    def gather(self, rows: Rows) -> Rows:
        """Return a copy of the selected columns of ``rows``, which has shape ``(K, length)``."""
        selected = rows[:, self._index_for(rows)]
        if self._slice is None:
            return selected
        return selected.clone() if isinstance(selected, Tensor) else selected.copy()

    def _index_for(self, rows: Rows) -> Any:
        if self._slice is not None:
            return self._slice
        return self._tensor(rows.device) if isinstance(rows, Tensor) else self.idxs

    def _tensor(self, device: torch.device) -> Tensor:
        if self._on_device is None or self._on_device.device != device:
            self._on_device = torch.from_numpy(self.idxs).to(device)
        return self._on_device


def _as_slice(idxs: NDArray[np.intp]) -> slice | None:
    """Convert consecutive indices to a slice, which is faster than an index array. Return None for other indices."""
    if idxs.size and idxs[-1] - idxs[0] == idxs.size - 1 and (idxs[1:] - idxs[:-1] == 1).all():
        return slice(int(idxs[0]), int(idxs[-1]) + 1)
    return None


def _indices(what: str, idxs: Any, length: int) -> NDArray[np.intp]:
    """Convert ``idxs`` to a new array of non-negative indices. Raise an error if NumPy would reject ``idxs``."""
    if isinstance(idxs, slice):
        try:
            return np.arange(*idxs.indices(length), dtype=np.intp)
        except (TypeError, ValueError) as error:  # floats, or a step of 0
            raise type(error)(f"{what} is {idxs}: {error}") from None
    if isinstance(idxs, range):
        # A valid range has at most 2 * length elements. Truncate longer ranges to save memory. They still raise an
        # error below.
        idxs = idxs[: 2 * length + 1]
        if idxs and not -length <= idxs[0] < length:
            raise _out_of_bounds(what, idxs[0], length)
        if len(idxs) > 1 and abs(idxs.step) > 2 * length:  # the step might not fit in 64 bits
            raise _out_of_bounds(what, idxs[1], length)
        array = np.arange(len(idxs)) * (idxs.step if len(idxs) > 1 else 1) + (idxs[0] if idxs else 0)
    elif isinstance(idxs, Tensor):
        if (kind := unsupported_layout(idxs)) is not None:
            raise TypeError(f"{what} is a tensor that is {kind}: pass a dense one with values, such as x.to_dense()")
        if idxs.is_floating_point() or idxs.is_complex():
            raise TypeError(f"{what} has dtype {idxs.dtype}, but indices must be integers or a boolean mask")
        array = idxs.numpy(force=True)
    else:
        try:
            array = np.asarray(idxs)
        except ValueError:
            raise IndexError(f"{what} holds sequences of different lengths, but must be one-dimensional") from None
        if array.size == 0 and isinstance(idxs, list | tuple):
            array = array.astype(np.intp)
    if array.ndim == 0 and isinstance(idxs, Iterable) and not isinstance(idxs, np.ndarray | Tensor):
        raise TypeError(f"{what} is a {type(idxs).__name__}: pass a list, an array or a slice")
    if array.ndim != 1:
        raise IndexError(
            f"{what} has shape {array.shape}, but must be one-dimensional: write [i] for the single index i"
        )
    if array.dtype == bool:
        if array.size not in (0, length):  # NumPy accepts an empty mask for any axis
            raise IndexError(
                f"{what} is a mask of length {array.size}, but the axis has length {length}: pass a mask of that length"
            )
        return np.flatnonzero(array)
    if array.dtype == object:
        _check_objects(what, array)
    elif array.dtype.kind not in "iu":
        raise TypeError(f"{what} has dtype {array.dtype}, but indices must be integers or a boolean mask")
    if array.size and (array.min() < -length or array.max() >= length):
        worst = array[(array < -length) | (array >= length)][0]
        raise _out_of_bounds(what, worst, length)
    array = array.astype(np.intp)
    if array.size and array.min() < 0:
        array[array < 0] += length
    return array


def _check_objects(what: str, array: NDArray[Any]) -> None:
    """Raise an error if an array with dtype object contains values other than integers. Booleans are not allowed."""
    kinds = {type(index) for index in array}
    if kinds and all(issubclass(kind, bool | np.bool_) for kind in kinds):
        raise IndexError(f"{what} holds booleans, but has dtype object: pass mask.astype(bool) for a mask")
    if not kinds or any(issubclass(kind, bool) or not issubclass(kind, int | np.integer) for kind in kinds):
        raise TypeError(f"{what} has dtype object, but indices must be integers or a boolean mask")


def _out_of_bounds(what: str, index: int, length: int) -> IndexError:
    return IndexError(
        f"{what} holds {index}, which is out of bounds for an axis of length {length}: use {-length} to {length - 1}"
    )
