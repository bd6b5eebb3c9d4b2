"""Submatrices of operators, selected by the indexing rules of NumPy.

A product with a submatrix takes three steps: the vector is scattered into a vector of zeros, the full operator is
applied once, and the selected rows of the result are gathered.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Self, cast

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.sparse.linalg import LinearOperator
from torch import Tensor

from curvop.operators.base import Composites, Rows, TensorLinearOperator, WrappingLinearOperator, unsupported_layout

__all__ = ["SubmatrixLinearOperator", "as_slice"]


class SubmatrixLinearOperator(WrappingLinearOperator):
    """Submatrix ``A[row_idxs, :][:, col_idxs]`` of any SciPy ``LinearOperator``, with NumPy's indexing.

    For operators of this package, ``A.submatrix(rows, cols)`` and ``A[rows, :][:, cols]`` return the same submatrix. If
    the rows and columns are whole parameters, use ``A.block(names)`` instead. A block retains the names and shapes of
    its parameters.

    Parameters
    ----------
    A : LinearOperator
        Real or complex operator of any shape. If A is itself a submatrix, the indices are converted to indices of the
        operator from which A was taken.
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
        If an index is out of range, if a mask has the wrong length, or if indices are not one-dimensional. An unsigned
        integer does not wrap around. The error is also raised for an array of booleans with dtype object.
    TypeError
        If indices are not integers, or if A is not a ``LinearOperator``.
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
    Select two rows and two columns of a dense matrix:

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
                f"A is a {type(A).__name__}, not a LinearOperator: wrap it with scipy.sparse.linalg.aslinearoperator(A)"
            )
        if len(A.shape) != 2:
            raise ValueError(f"A has shape {A.shape}, but must have two dimensions: take one operator of the stack")
        rows, cols = _indices("row_idxs", row_idxs, A.shape[0]), _indices("col_idxs", col_idxs, A.shape[1])
        if isinstance(A, SubmatrixLinearOperator):
            A, rows, cols = A._A, A._rows.idxs[rows], A._cols.idxs[cols]
        if isinstance(A, TensorLinearOperator) and rows.size and cols.size:
            A, rows, cols = A._smallest_block(rows, cols)
        self._setup(A, _Selection(rows, A.shape[0]), _Selection(cols, A.shape[1]))

    @classmethod
    def of_whole(cls, A: LinearOperator, rows: Any, cols: Any) -> Self:
        """Return a submatrix whose products apply the whole operator A.

        The constructor, in contrast, replaces A by the smallest block that contains the submatrix.
        """
        submatrix = cls.__new__(cls)
        selected = [
            _Selection(_indices(what, idxs, length), length)
            for what, idxs, length in zip(("row_idxs", "col_idxs"), (rows, cols), A.shape, strict=True)
        ]
        submatrix._setup(A, *selected)
        return submatrix

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
            If the column indices differ from the row indices, or if their order differs.
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

    def _identity(self) -> tuple[Any, ...]:
        inner = self._A._identity() if isinstance(self._A, TensorLinearOperator) else ("scipy", id(self._A))
        return "submatrix", inner, self._rows.idxs.tobytes(), self._cols.idxs.tobytes()

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


Composites.submatrix = SubmatrixLinearOperator


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
        self._slice = as_slice(idxs)
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


def as_slice(idxs: NDArray[np.intp]) -> slice | None:
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
