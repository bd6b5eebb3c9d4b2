"""The one bridge between SciPy's vectors and torch's: kinds of arrays, shapes, columns, counting.

SciPy hands over ``(N,)``, ``(N, 1)``, ``(N, K)`` and, from 1.18 on, stacks of them; users hand over tensors besides.
All of it ends in one method, `TensorLinearOperator._apply`, that multiplies a ``(K, N)`` array or tensor row by row.
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
    "without_values",
]

Rows = NDArray[Any] | Tensor

_BOOLEANS = {np.dtype(bool), torch.bool}


class ProductCounter:
    """Counts products; shared by an operator and its adjoint."""

    def __init__(self) -> None:
        self.total = 0


class TensorLinearOperator(LinearOperator):  # type: ignore[misc]
    """A linear operator that takes NumPy arrays and torch tensors alike.

    Subclasses implement `_apply`, and `_adjoint` and `_transpose` where they are not real and symmetric.
    """

    def __init__(self, dtype: Any, shape: tuple[int, int], counter: ProductCounter | None = None) -> None:
        super().__init__(dtype, shape)
        self._counter = ProductCounter() if counter is None else counter

    @property
    def num_products(self) -> int:
        """Columns multiplied so far, those of the adjoint included."""
        return self._counter.total

    @property
    def takes_tensors(self) -> bool:
        """Whether it multiplies tensors, or NumPy arrays only."""
        return True

    @property
    def device(self) -> torch.device:
        """Where products are computed: tensors that are there need no copy."""
        return torch.device("cpu")

    def submatrix(self, rows: Any, cols: Any = None) -> SubmatrixLinearOperator:
        """Return ``A[rows, :][:, cols]`` as an operator; see `curvop.SubmatrixLinearOperator`.

        Parameters
        ----------
        rows, cols : slice, range, list, integer or boolean array, or integer tensor
            Without `cols`, the principal submatrix with ``cols = rows``.
        """
        return SubmatrixLinearOperator(self, rows, rows if cols is None else cols)

    def diagonal(self) -> NDArray[Any]:
        """Return the exact diagonal ``(N,)``, where it is known without products.

        Raises
        ------
        NotImplementedError
            Where it is not, as that of a Hessian.
        """
        raise NotImplementedError(
            f"a {type(self).__name__} does not know its diagonal: curvop.spectrum.diagonal estimates it from products"
        )

    def __getitem__(self, key: Any) -> SubmatrixLinearOperator:
        """Return ``A[rows, :]``, ``A[:, cols]`` or ``A[rows, cols]`` where one of the two is a slice."""
        keys = list(key) if isinstance(key, tuple) else [key]
        if any(part is Ellipsis for part in keys):
            where = next(index for index, part in enumerate(keys) if part is Ellipsis)
            keys[where : where + 1] = [slice(None)] * (3 - len(keys))
        if not 1 <= len(keys) <= 2:
            raise IndexError(f"A has two axes, but {len(keys)} indices were given: pass A[rows, cols]")
        rows, cols = (*keys, slice(None))[:2]
        if _is_open_mesh(rows, cols):
            return self.submatrix(rows[:, 0], cols.reshape(-1))
        if not isinstance(rows, slice) and not isinstance(cols, slice):
            raise IndexError(
                "A[rows, cols] with two index arrays means single entries to NumPy: use A[rows, :][:, cols] or "
                "A.submatrix(rows, cols) for the submatrix"
            )
        return self.submatrix(rows, cols)

    __iter__ = None  # not a sequence of rows: without this, iteration would end at once and yield nothing

    # What SciPy calls, after checking shapes.

    def _matvec(self, x: Any) -> NDArray[Any]:
        """Multiply ``(N,)``, ``(N, 1)`` or, from SciPy 1.18 on, a stack ``(..., N)``."""
        x = np.asarray(x)
        if x.ndim == 2 and x.shape == (self.shape[1], 1):  # for N = 1 a column and a stack of rows are the same
            return self._matmat(x)
        return cast("NDArray[Any]", self._along_last(x))

    def _matmat(self, X: Any) -> NDArray[Any]:
        """Multiply ``(N, K)`` or, from SciPy 1.18 on, a stack ``(..., N, K)``."""
        return cast("NDArray[Any]", self._along_last(np.asarray(X).swapaxes(-1, -2)).swapaxes(-1, -2))

    def _adjoint(self) -> LinearOperator:
        return self

    def _transpose(self) -> LinearOperator:
        return self._adjoint()

    def _apply(self, rows: Rows) -> Rows:
        """Return the products with the rows of a ``(K, N)`` array or tensor, K and N not 0, as fresh ``(K, M)``."""
        raise NotImplementedError

    def _block_of(
        self, rows: NDArray[np.intp], cols: NDArray[np.intp]
    ) -> tuple[TensorLinearOperator, NDArray[np.intp], NDArray[np.intp]]:
        """Return the smallest operator that holds the rows and columns, and where they are in it."""
        return self, rows, cols

    def _along_last(self, x: Rows) -> Rows:
        """Multiply all vectors that lie along the last axis of `x`."""
        if not isinstance(x, Tensor) and not x.dtype.isnative:  # torch knows one order of bytes
            x = x.astype(x.dtype.newbyteorder("="))
        self._check_entries(x)
        (size, length), stack = self.shape, tuple(x.shape[:-1])
        count = math.prod(stack)
        if 0 in (count, length, size):
            return self._zeros((*stack, size), x)
        self._counter.total += count
        return self._apply(x.reshape(count, length)).reshape(*stack, size)

    def _check_entries(self, x: Rows) -> None:
        """Refuse vectors whose entries the operator cannot multiply."""

    def _zeros(self, shape: tuple[int, ...], like: Rows) -> Rows:
        if isinstance(like, Tensor):
            return torch.zeros(shape, dtype=like.dtype, device=like.device)
        return np.zeros(shape, dtype=self._product_dtype(like.dtype))

    def _product_dtype(self, dtype: Any) -> Any:
        """Return the dtype of products with arrays of `dtype`."""
        return np.result_type(self.dtype, dtype)

    def _is_tree(self, x: Any) -> bool:
        """Whether a mapping, list or tuple holds vectors in parts; a list of 0-dimensional tensors holds numbers."""
        return isinstance(x, Mapping) or any(isinstance(part, Tensor) and part.ndim for part in x)

    def _tree_product(self, x: Any) -> Any:
        """Multiply by a vector that is given as a mapping, list or tuple of tensors, one a column parameter."""
        raise TypeError(
            f"x is a {type(x).__name__} of tensors, but the columns of A, a {type(self).__name__}, are not whole "
            f"parameters: pass one vector ({self.shape[1]},)"
        )

    # Tensors never reach SciPy, which would make arrays of them; a wrong length is told with both shapes.

    def dot(self, x: Any) -> Any:
        """Multiply by a vector ``(N,)``, a matrix ``(N, K)``, a scalar or an operator, as ``A @ x`` does.

        A tensor gives a tensor on its own device and in its own dtype; gradients do not flow through it. If the columns
        are parameters, a list or dict of tensors, one a parameter and of its shape, gives one of the rows' parameters,
        on their device.
        """
        if self._is_plain(x):
            return self._along_last(x)
        if isinstance(x, Mapping | list | tuple) and self._is_tree(x):
            return self._tree_product(x)
        x = _as_number(x)
        if not isinstance(x, LinearOperator) and not np.isscalar(x):
            self._check_shape(x, x_is_vector=len(_shape(x)) == 1)
        return self._tensor_product(x) if isinstance(x, Tensor) else super().dot(x)

    def matvec(self, x: Any) -> Any:
        """Multiply by a vector ``(N,)`` or ``(N, 1)``, or by a stack of vectors ``(..., N)``."""
        if self._is_plain(x):
            return self._along_last(x)
        column = _shape(x) == (self.shape[1], 1)
        self._check_shape(x, x_is_vector=not column)
        if column and isinstance(x, Tensor):
            return self._tensor_product(x)
        if isinstance(x, Tensor):
            return self._along_last(self._floating(x))
        # SciPy multiplies stacks from 1.18 on.
        return super().matvec(x) if column or np.ndim(x) == 1 else self._along_last(np.asarray(x))

    def matmat(self, X: Any) -> Any:
        """Multiply by a matrix ``(N, K)``."""
        self._check_shape(X, x_is_vector=False)
        return self._tensor_product(X) if isinstance(X, Tensor) else super().matmat(X)

    def rmatvec(self, x: Any) -> Any:
        """Multiply the adjoint by a vector ``(M,)`` or ``(M, 1)``."""
        return self.H.matvec(x)

    def rmatmat(self, X: Any) -> Any:
        """Multiply the adjoint by a matrix ``(M, K)``."""
        return self.H.matmat(X)

    def __matmul__(self, other: Any) -> Any:
        """Multiply, ``A @ x``, by anything but a scalar; see `dot`."""
        return super().__matmul__(_as_number(other))

    def __rmatmul__(self, other: Any) -> Any:
        """Multiply from the right, ``x @ A``."""
        if isinstance(other, Mapping | list | tuple) and self._is_tree(other):
            return self.T.dot(other)
        other = _as_number(other)
        if not isinstance(other, Tensor):
            return super().__rmatmul__(other)
        return self.T.dot(other) if other.ndim == 1 else self.T.dot(other.swapaxes(-1, -2)).swapaxes(-1, -2)

    def __rmul__(self, other: Any) -> Any:
        """Scale, or multiply from the right."""
        other = _as_number(other)
        return self.__rmatmul__(other) if isinstance(other, Tensor) else super().__rmul__(other)

    def __truediv__(self, other: Any) -> LinearOperator:
        """Divide by a scalar."""
        return super().__truediv__(_as_number(other))

    def __add__(self, other: Any) -> LinearOperator:
        """Add an operator."""
        return super().__add__(other) if isinstance(other, LinearOperator) else self._refuse_sum(other)

    def __sub__(self, other: Any) -> LinearOperator:
        """Subtract an operator."""
        return super().__sub__(other) if isinstance(other, LinearOperator) else self._refuse_sum(other)

    def __radd__(self, other: Any) -> LinearOperator:
        """Refuse what is no operator."""
        return self._refuse_sum(other)

    __rsub__ = __radd__

    def _refuse_sum(self, other: Any) -> Any:
        """Raise a TypeError for a matrix or a number, leave other kinds to their own methods."""
        matrix = isinstance(other, np.ndarray | Tensor | list) or scipy.sparse.issparse(other)
        if not matrix and not np.isscalar(other):
            return NotImplemented
        damped = "A.damped(lam) for A + lam * I" if hasattr(self, "damped") else ""
        wrapped = "A + scipy.sparse.linalg.aslinearoperator(B) for a matrix B" if matrix or not damped else ""
        raise TypeError(
            f"a {type(self).__name__} A and a {type(other).__name__} cannot be added or subtracted: write "
            f"{', or '.join(filter(None, (damped, wrapped)))}"
        )

    def _is_plain(self, x: Any) -> bool:
        """Whether `x` is an array ``(N,)``, as solvers hand over: it needs none of SciPy's preparations."""
        return type(x) is np.ndarray and x.shape == self.shape[1:]

    def _tensor_product(self, x: Tensor) -> Tensor:
        x = self._floating(x)
        if x.ndim == 1:
            return cast("Tensor", self._along_last(x))
        return cast("Tensor", self._along_last(x.swapaxes(-1, -2)).swapaxes(-1, -2))

    def _floating(self, x: Tensor, what: str = "x") -> Tensor:
        """Return `x` cut off from its graph, integers in the operator's dtype."""
        if (kind := without_values(x)) is not None:
            raise TypeError(f"{what} is a tensor that is {kind}: pass a dense one with values, such as x.to_dense()")
        if x.is_floating_point() or x.is_complex():
            return x.detach()
        return x.to(torch.float64 if self.dtype == np.float64 else torch.float32)

    def _check_shape(self, x: Any, x_is_vector: bool) -> None:
        """Refuse what does not fit `A` with both shapes; SciPy says only that there is a mismatch."""
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
            "x holds sequences of different lengths: pass one array, or a list of tensors, one a column parameter"
        ) from None


def _as_number(x: Any) -> Any:
    """Return a 0-dimensional tensor or array, or a scalar of NumPy's, as a Python number; anything else as it is.

    SciPy takes only the last for a scalar, and ``numpy.longdouble(2) * A`` would then have another dtype than `A`.
    """
    if isinstance(x, Tensor):
        return x if x.ndim else x.item()
    if not isinstance(x, np.generic | np.ndarray) or x.ndim or x.dtype.kind not in "biufc":
        return x
    wide = {"g": np.float64, "G": np.complex128}  # of which item() makes no Python number
    return x.astype(wide.get(x.dtype.char, x.dtype)).item()


def _is_open_mesh(rows: Any, cols: Any) -> bool:
    """Whether two arrays or tensors of integers are ``(m, 1)`` and ``(1, n)`` or ``(n,)``, as `numpy.ix_` makes them.

    NumPy takes a mask of two dimensions for one of entries.
    """
    kinds = np.ndarray | Tensor
    if not (isinstance(rows, kinds) and isinstance(cols, kinds)) or {rows.dtype, cols.dtype} & _BOOLEANS:
        return False
    return rows.shape[1:] == (1,) and tuple(cols.shape[:-1]) in ((1,), ())


def without_values(x: Tensor) -> str | None:
    """Return what keeps a tensor from holding an array of values, None if it holds one."""
    if x.is_meta:
        return "on the meta device"
    if x.is_quantized:
        return "quantised"
    return None if x.layout == torch.strided else str(x.layout)


class WrappingLinearOperator(TensorLinearOperator):
    """One that passes vectors on to another, `_A`, of this package or SciPy's own."""

    _A: LinearOperator

    @property
    def takes_tensors(self) -> bool:
        """Whether `A` multiplies tensors, as this package's operators do."""
        return isinstance(self._A, TensorLinearOperator) and self._A.takes_tensors

    @property
    def device(self) -> torch.device:
        """That of `A`, where it has one; the host else."""
        return self._A.device if isinstance(self._A, TensorLinearOperator) else super().device

    def _product_dtype(self, dtype: Any) -> Any:
        known = isinstance(self._A, TensorLinearOperator)
        return self._A._product_dtype(dtype) if known else super()._product_dtype(dtype)


# Rows and columns of any linear operator, by scatter and gather.


class SubmatrixLinearOperator(WrappingLinearOperator):
    """``A[row_idxs, :][:, col_idxs]`` with NumPy's meaning, over any SciPy ``LinearOperator``.

    A product scatters the vector into zeros, multiplies by A once, and gathers. Over an operator of this package only
    the parameters that the rows and columns touch take part: the submatrix is taken inside ``A.block(...)``, and costs
    what the block costs.

    Parameters
    ----------
    A : LinearOperator
        Of any shape, real or complex. A submatrix of a submatrix composes the indices and stays one level deep.
    row_idxs, col_idxs : slice, range, list, tuple, integer or boolean array, or integer or boolean tensor on any device
        One-dimensional, with the meaning that they have for NumPy: negative indices count from the end, and a list
        that mixes booleans and integers holds integers. Repeats are allowed: a repeated row repeats, a repeated column
        adds. Empty selections give an operator without rows or columns, whose products are empty or zero. Of arrays of
        objects, only those of integers are taken.

    Raises
    ------
    IndexError
        If an index is out of range (unsigned ones do not wrap around), a mask has the wrong length, indices are not
        one-dimensional, or an array of objects holds booleans.
    TypeError
        If indices are not integers, such as floats, or `A` is no ``LinearOperator``.

    Examples
    --------
    >>> import numpy as np
    >>> from scipy.sparse.linalg import aslinearoperator
    >>> A = aslinearoperator(np.arange(12.0).reshape(3, 4))
    >>> SubmatrixLinearOperator(A, [0, -1], slice(1, 3)) @ np.eye(2)
    array([[ 1.,  2.],
           [ 9., 10.]])
    """

    def __init__(self, A: LinearOperator, row_idxs: Any, col_idxs: Any) -> None:
        if not isinstance(A, LinearOperator):
            raise TypeError(
                f"A is a {type(A).__name__}, not a LinearOperator: wrap it, scipy.sparse.linalg.aslinearoperator(A)"
            )
        if len(A.shape) != 2:
            raise ValueError(f"A has shape {A.shape}: a stack of operators has no submatrix, take one of them")
        rows, cols = _indices("row_idxs", row_idxs, A.shape[0]), _indices("col_idxs", col_idxs, A.shape[1])
        if isinstance(A, SubmatrixLinearOperator):
            A, rows, cols = A._A, A._rows.idxs[rows], A._cols.idxs[cols]
        if isinstance(A, TensorLinearOperator) and rows.size and cols.size:
            A, rows, cols = A._block_of(rows, cols)
        self._setup(A, _Selection(rows, A.shape[0]), _Selection(cols, A.shape[1]))

    def _setup(self, A: LinearOperator, rows: _Selection, cols: _Selection) -> None:
        self._A = A
        self._rows = rows
        self._cols = cols
        super().__init__(A.dtype, (rows.idxs.size, cols.idxs.size))
        self.args = (A, rows.idxs, cols.idxs)  # as SciPy's own sums and products have them

    def _like(self, A: LinearOperator, rows: _Selection, cols: _Selection) -> Self:
        """Return the submatrix of `A` whose indices are known to be good."""
        submatrix = type(self).__new__(type(self))
        submatrix._setup(A, rows, cols)
        submatrix._counter = self._counter
        return submatrix

    def diagonal(self) -> NDArray[Any]:
        """Return the exact diagonal ``(n,)`` of a principal submatrix, from that of the parameters it touches.

        Raises
        ------
        ValueError
            Where the rows are others than the columns, or in another order.
        NotImplementedError
            Where `A` does not know its own.
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
            if not self._cols.distinct:  # columns that repeat add, in A's own precision at least
                rows = self._widened(rows)
            whole = rows if self._cols.everything else self._cols.scatter(rows)
            products = self._A._along_last(whole)
            products = products if self._rows.everything else self._rows.gather(products)
            return products.to(kind) if isinstance(products, Tensor) else products
        # As above, and integers need room where A has no dtype to promote to.
        array = cast("NDArray[Any]", rows)
        room = self.dtype if self.dtype is not None else np.dtype(np.intp) if array.dtype.kind in "biu" else array.dtype
        rows = array.astype(np.result_type(room, array.dtype), copy=False)
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
    """Indices into an axis, all of them within ``[0, length)``.

    Attributes
    ----------
    idxs : ndarray of intp
    everything : bool
        Whether they are the whole axis in its order.
    distinct : bool
        Whether none of them repeats.
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
        """Return ``(K, length)`` zeros with the entries of `rows` ``(K, idxs.size)`` added at the indices."""
        if isinstance(rows, Tensor):
            whole = rows.new_zeros(len(rows), self._length)
            if self.distinct:
                whole[:, self._where(rows)] = rows
                return whole
            return whole.index_add_(1, self._tensor(rows.device), rows)
        array = np.zeros((len(rows), self._length), dtype=rows.dtype)
        if self.distinct:
            array[:, self._where(rows)] = rows
        else:
            for target, row in zip(array, rows, strict=True):
                np.add.at(target, self.idxs, row)
        return array

    def gather(self, rows: Rows) -> Rows:
        """Return the entries of `rows` ``(K, length)`` at the indices, in memory of their own."""
        taken = rows[:, self._where(rows)]
        if self._slice is None:
            return taken
        return taken.clone() if isinstance(taken, Tensor) else taken.copy()

    def _where(self, rows: Rows) -> Any:
        if self._slice is not None:
            return self._slice
        return self._tensor(rows.device) if isinstance(rows, Tensor) else self.idxs

    def _tensor(self, device: torch.device) -> Tensor:
        if self._on_device is None or self._on_device.device != device:
            self._on_device = torch.from_numpy(self.idxs).to(device)
        return self._on_device


def _as_slice(idxs: NDArray[np.intp]) -> slice | None:
    """Return the slice that consecutive indices are, which copies faster than an index array; else None."""
    if idxs.size and idxs[-1] - idxs[0] == idxs.size - 1 and (idxs[1:] - idxs[:-1] == 1).all():
        return slice(int(idxs[0]), int(idxs[-1]) + 1)
    return None


def _indices(what: str, idxs: Any, length: int) -> NDArray[np.intp]:
    """Return `idxs` as an array of its own, checked and free of negative numbers."""
    if isinstance(idxs, slice):
        try:
            return np.arange(*idxs.indices(length), dtype=np.intp)
        except (TypeError, ValueError) as error:  # floats, and a step of 0
            raise type(error)(f"{what} is {idxs}: {error}") from None
    if isinstance(idxs, range):
        # No range stays within the axis for longer; what is too long is told without memory taken for all of it.
        idxs = idxs[: 2 * length + 1]
        if idxs and not -length <= idxs[0] < length:
            raise _out_of_bounds(what, idxs[0], length)
        if len(idxs) > 1 and abs(idxs.step) > 2 * length:  # the step may not fit in 64 bits
            raise _out_of_bounds(what, idxs[1], length)
        array = np.arange(len(idxs)) * (idxs.step if len(idxs) > 1 else 1) + (idxs[0] if idxs else 0)
    elif isinstance(idxs, Tensor):
        if (kind := without_values(idxs)) is not None:
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
        if array.size not in (0, length):  # NumPy takes an empty mask on any axis
            raise IndexError(
                f"{what} is a mask of length {array.size}, but the axis has length {length}: make it as long"
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
    """Refuse an array of objects that are not integers; booleans are integers to Python, but not to NumPy."""
    kinds = {type(index) for index in array}
    if kinds and all(issubclass(kind, bool | np.bool_) for kind in kinds):
        raise IndexError(f"{what} holds booleans, but has dtype object: pass mask.astype(bool) for a mask")
    if not kinds or any(issubclass(kind, bool) or not issubclass(kind, int | np.integer) for kind in kinds):
        raise TypeError(f"{what} has dtype object, but indices must be integers or a boolean mask")


def _out_of_bounds(what: str, index: int, length: int) -> IndexError:
    return IndexError(
        f"{what} holds {index}, which is out of bounds for an axis of length {length}: use {-length} to {length - 1}"
    )
