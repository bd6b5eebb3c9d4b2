"""Base class of operators that accept both NumPy arrays and torch tensors.

SciPy's solvers apply operators to arrays of shape ``(N,)``, ``(N, 1)`` and ``(N, K)``. In SciPy >= 1.18, the solvers
also apply operators to stacks of such arrays. Users may also pass a tensor, or a dict, list or tuple with one tensor
per parameter. `TensorLinearOperator` validates all of these inputs and passes them to a single method, ``_apply``,
which computes the product with each row of a ``(K, N)`` array or tensor. Subclasses implement ``_apply``.

The methods of `TensorLinearOperator` construct sums, products, submatrices and other composite operators. The classes
of these operators derive from `TensorLinearOperator`, so this module cannot import them. Instead, their modules store
the constructors in `Composites`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, ClassVar, cast

import numpy as np
import scipy.sparse
import torch
from numpy.typing import NDArray
from scipy.sparse.linalg import LinearOperator
from torch import Tensor

from curvop.operators.validation import available_bytes, check_fits

__all__ = [
    "Composites",
    "ProductCounter",
    "TensorLinearOperator",
    "WrappingLinearOperator",
    "unsupported_layout",
]

#: Two-dimensional array or tensor. Each row is a vector, or the product of an operator with a vector.
Rows = NDArray[Any] | Tensor

_BOOLEANS = {np.dtype(bool), torch.bool}

_EPSILON = float(np.finfo(np.float64).eps)
_DENSE_COLUMNS = 64  # number of columns that `to_dense` computes at once

#: Methods that operators of other packages have, and the function that replaces each of them.
_FUNCTIONS = {
    "trace": "curvop.spectrum.trace(A)",
    "norm": "curvop.spectrum.frobenius_norm(A)",
    "eigs": "curvop.spectrum.eigsh(A, k)",
    "eigsh": "curvop.spectrum.eigsh(A, k)",
    "cond": "curvop.spectrum.eigsh(A, 1, which) for each end of the spectrum",
    "logdet": "curvop.spectrum.density(A).logdet(damping)",
    "solve": "curvop.solve(A, b, damping=...)",
}


class Composites:
    """Constructors of composite operators. The modules that define composite operators set these attributes."""

    submatrix: ClassVar[Callable[..., Any]]
    sum: ClassVar[Callable[..., Any]]
    scaled: ClassVar[Callable[..., Any]]
    product: ClassVar[Callable[..., Any]]
    power: ClassVar[Callable[..., Any]]
    damped: ClassVar[Callable[..., Any]]
    diagonal: ClassVar[Callable[..., Any]]
    block_diagonal: ClassVar[Callable[..., Any]]


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

    if not TYPE_CHECKING:  # otherwise, type checkers would accept any attribute

        def __getattr__(self, name: str) -> Any:
            """Raise an ``AttributeError``. Python calls this method only if there is no attribute of this name."""
            if name in _FUNCTIONS:
                raise AttributeError(f"a {type(self).__name__} has no attribute {name!r}: call {_FUNCTIONS[name]}")
            # Repeat the lookup, so that the error in a property that raises an AttributeError is not hidden.
            return object.__getattribute__(self, name)

    def __repr__(self) -> str:
        details, text = ", ".join(self._details()), super().__repr__()  # SciPy's text names class, shape and dtype
        return f"{text[:-1]}: {details}>" if details else text

    def _details(self) -> list[str]:
        """Return phrases for ``repr``. They must not depend on a pass over the data or on the values of tensors."""
        return []

    def _formula(self) -> str:
        """Return the matrix as a formula, for ``repr`` of composite operators. The default is the name of the class."""
        return type(self).__name__

    def release_cache(self) -> None:
        """Free the memory of the batches that the operator, or its parts, keep between products.

        Call this method if the memory is needed for other work before the next product, such as training. The next
        product linearizes all batches again, as it does after a change of the parameters. The callbacks in
        `curvop.callbacks` call this method after each computation.
        """

    @property
    def num_products(self) -> int:
        """Number of products computed so far, including products with the adjoint.

        Each column of a matrix counts as one product.
        """
        return self._counter.total

    @property
    def takes_tensors(self) -> bool:
        """Whether torch computes products with tensors. If False, tensors are converted to arrays or rejected."""
        return True

    @property
    def device(self) -> torch.device:
        """Device on which products are computed. Tensors on this device are not copied."""
        return torch.device("cpu")

    @property
    def epsilon(self) -> float:
        """Machine epsilon of the lowest precision used in a product."""
        return float(np.finfo(self.dtype).eps) if self.dtype is not None and self.dtype.kind in "fc" else _EPSILON

    @property
    def is_symmetric(self) -> bool:
        """Whether the operator is known to be real and equal to its transpose.

        If the value is False, the operator is not known to be symmetric, but it may be symmetric. An operator is known
        to be symmetric because of its class (such as a Hessian) or because of its form. Examples are products such as
        ``J.T @ J``, and ``D @ H @ D`` with a diagonal matrix D.
        """
        return self.dtype is not None and self.dtype.kind != "c" and self.H is self

    def submatrix(self, rows: Any, cols: Any = None) -> Any:
        """Return the submatrix ``A[rows, :][:, cols]`` as an operator.

        Parameters
        ----------
        rows : slice, range, list, tuple, integer or boolean array, or integer or boolean tensor
            One-dimensional selection of rows, interpreted as in NumPy. Negative indices count from the end, and indices
            may repeat.
        cols : same types as ``rows``, optional
            Selection of columns. By default, the same indices as in ``rows`` are selected, which gives a principal
            submatrix.

        Returns
        -------
        SubmatrixLinearOperator
            Operator of shape ``(m, n)``, where m and n are the numbers of selected rows and columns.

        Raises
        ------
        IndexError
            If an index is out of range, if a mask has the wrong length, or if a selection is not one-dimensional.
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
        return Composites.submatrix(self, rows, rows if cols is None else cols)

    def damped(self, damping: float) -> TensorLinearOperator:
        """Return ``A + damping * I`` as an operator with the same methods as A.

        Parameters
        ----------
        damping : float
            Finite number that is added to each diagonal entry.

        Returns
        -------
        DampedLinearOperator
            Operator of the same shape. It shares the cached linearizations and the counter of A.

        Raises
        ------
        ValueError
            If ``damping`` is infinite or NaN, or if A is neither square nor a block of parameters.
        TypeError
            If ``damping`` is not a real number.

        See Also
        --------
        curvop.solve : Solve a damped system and compute the true residual.
        """
        return cast("TensorLinearOperator", Composites.damped(self, damping))

    def to_dense(self, *, memory: float | None = None) -> NDArray[Any]:
        """Form the matrix as an array.

        Use it for small matrices and for tests. For eigenvalues of a matrix that fits into memory, call
        ``curvop.spectrum.eigsh`` with ``method="dense"``.

        Parameters
        ----------
        memory : float, optional
            Number of bytes that may be used. By default, half of the free memory.

        Returns
        -------
        matrix : ndarray, shape (M, N)
            The matrix in the dtype of the operator.

        Raises
        ------
        MemoryError
            If the matrix does not fit into memory. In this case, no product is computed.

        Notes
        -----
        The method computes one product for each column, or one product with the adjoint for each row if there are fewer
        rows than columns.

        Examples
        --------
        >>> import numpy as np
        >>> from curvop import DiagonalLinearOperator
        >>> DiagonalLinearOperator(np.array([1.0, 2.0])).to_dense()
        array([[1., 0.],
               [0., 2.]])
        """
        (rows, cols), itemsize = self.shape, np.dtype(self.dtype or np.float64).itemsize
        needed = itemsize * (rows * cols + 2 * _DENSE_COLUMNS * (rows + cols))
        what = f"a dense matrix of shape {self.shape}"
        check_fits(needed, available_bytes(memory=memory), what, "take a block or a submatrix")
        if rows < cols and self.takes_tensors:  # an operator of SciPy may have no adjoint
            return cast("TensorLinearOperator", self.H)._dense_columns().conj().T
        return self._dense_columns()

    def todense(self, *, memory: float | None = None) -> NDArray[Any]:
        """Form the matrix as an array. This is another name of `to_dense`."""
        return self.to_dense(memory=memory)

    def toarray(self, *, memory: float | None = None) -> NDArray[Any]:
        """Form the matrix as an array. This is another name of `to_dense`."""
        return self.to_dense(memory=memory)

    def __array__(self, *args: Any, **kwargs: Any) -> NDArray[Any]:
        """Raise a ``TypeError``, because NumPy would otherwise create an array with the operator as its only entry."""
        raise TypeError(
            f"A, a {type(self).__name__} of shape {self.shape}, is not an array: call A.to_dense() to form the "
            "matrix, or wrap the other operand by scipy.sparse.linalg.aslinearoperator"
        )

    def _dense_columns(self) -> NDArray[Any]:
        cols = self.shape[1]
        matrix = np.zeros(self.shape, dtype=self.dtype)
        for start in range(0, cols, _DENSE_COLUMNS):
            stop = min(start + _DENSE_COLUMNS, cols)
            identity = np.zeros((stop - start, cols), dtype=np.zeros(0, dtype=self.dtype).real.dtype)
            identity[np.arange(stop - start), np.arange(start, stop)] = 1
            matrix[:, start:stop] = self._multiply_last_axis(identity).T
        return matrix

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

    def __getitem__(self, key: Any) -> LinearOperator:
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

    @property
    def _is_diagonal(self) -> bool:
        """Whether the operator is known to be a diagonal matrix."""
        return False

    def _entries_at(self, idxs: Any) -> LinearOperator:
        """Return the principal submatrix whose rows and columns are selected by a slice or an array of indices."""
        return self.submatrix(idxs)

    def _identity(self) -> tuple[Any, ...]:
        """Return a key that identifies the matrix. Operators with equal keys are the same matrix.

        Operators with different keys may also be the same matrix. Composite operators compare keys to find out whether
        they are symmetric. A key is valid as long as the operator exists.
        """
        return "operator", id(self)

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
        """Return True if ``x`` is a mapping, or a sequence that contains a tensor with at least one dimension.

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
            parameter, on the device of the parameter. If ``x`` is a dict, list or tuple but the rows of A are not
            parameters, the product is a single tensor. If ``x`` is a scalar or an operator, the product is an operator.

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
        if isinstance(x, LinearOperator):
            return Composites.product(self, x)
        if np.isscalar(x):
            return Composites.scaled(self, x)
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
        if np.isscalar(other):
            return Composites.scaled(self, other)
        return self.__rmatmul__(other) if isinstance(other, Tensor) else super().__rmul__(other)

    def __truediv__(self, other: Any) -> LinearOperator:
        """Return ``A / c`` for a scalar ``c``."""
        other = _as_python_scalar(other)
        if not np.isscalar(other):
            raise ValueError(f"A is divided by a {type(other).__name__}, but the divisor must be a number")
        return Composites.scaled(self, 1.0 / cast("complex", other))

    def __neg__(self) -> LinearOperator:
        """Return ``-A``."""
        return Composites.scaled(self, -1)

    def __pow__(self, power: Any) -> LinearOperator:
        """Return the product of ``power`` operators A. The power must be an integer >= 0."""
        return Composites.power(self, power)

    def __add__(self, other: Any) -> LinearOperator:
        """Return ``A + B`` for an operator ``B``."""
        return Composites.sum(self, other) if isinstance(other, LinearOperator) else self._unsupported_sum(other)

    def __sub__(self, other: Any) -> LinearOperator:
        """Return ``A - B`` for an operator ``B``."""
        if not isinstance(other, LinearOperator):
            return self._unsupported_sum(other)
        return Composites.sum(self, Composites.scaled(other, -1))

    def __radd__(self, other: Any) -> LinearOperator:
        """Call `_unsupported_sum`, because ``B`` in ``B + A`` or ``B - A`` is not an operator."""
        return self._unsupported_sum(other)

    __rsub__ = __radd__

    def _unsupported_sum(self, other: Any) -> Any:
        """Raise a ``TypeError`` if ``other`` is a matrix or a number, and return ``NotImplemented`` otherwise."""
        matrix = isinstance(other, np.ndarray | Tensor | list) or scipy.sparse.issparse(other)
        if not matrix and not np.isscalar(other):
            return NotImplemented
        damped = "A.damped(lam) for A + lam * I" if self.shape[0] == self.shape[1] else ""
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
        """Return ``x`` as a floating-point tensor that is detached from its autograd graph."""
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
    def epsilon(self) -> float:
        """Machine epsilon of the lowest precision used in a product with ``_A``."""
        return self._A.epsilon if isinstance(self._A, TensorLinearOperator) else super().epsilon

    @property
    def device(self) -> torch.device:
        """Device on which ``_A`` computes products. This is the CPU if ``_A`` is an operator of SciPy."""
        return self._A.device if isinstance(self._A, TensorLinearOperator) else super().device

    def release_cache(self) -> None:
        """Free the memory of the batches that are kept between products."""
        if isinstance(self._A, TensorLinearOperator):
            self._A.release_cache()

    def _details(self) -> list[str]:
        rows, cols = self._A.shape
        if not isinstance(self._A, TensorLinearOperator):
            return [f"of a {rows}x{cols} {type(self._A).__name__}"]
        return [f"of a {rows}x{cols} {self._A._formula()}", *self._A._details()]

    def _product_dtype(self, dtype: Any) -> Any:
        known = isinstance(self._A, TensorLinearOperator)
        return self._A._product_dtype(dtype) if known else super()._product_dtype(dtype)
