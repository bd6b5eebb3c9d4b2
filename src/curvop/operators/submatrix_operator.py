"""Rows and columns of any linear operator, by scatter and gather."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Self, cast

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.sparse.linalg import LinearOperator
from torch import Tensor

from curvop.operators.base import BridgeLinearOperator, Rows, WrappingLinearOperator, without_values

__all__ = ["SubmatrixLinearOperator"]


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
        if isinstance(A, BridgeLinearOperator) and rows.size and cols.size:
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
        if isinstance(self._A, BridgeLinearOperator):
            self._A._check_entries(x)
        elif isinstance(x, Tensor):
            raise TypeError(f"A, a {type(self._A).__name__}, takes NumPy arrays only: pass x.numpy(force=True)")

    def _apply(self, rows: Rows) -> Rows:
        if isinstance(self._A, BridgeLinearOperator):
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
