"""Diagonal and block-diagonal matrices."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any, Self, cast

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.sparse.linalg import LinearOperator
from torch import Tensor

from curvop.kernels.parameters import ParameterLayout
from curvop.operators.base import Composites, Rows, TensorLinearOperator, unsupported_layout
from curvop.operators.composites import (
    CompositeLinearOperator,
    NamedLinearOperator,
    entries,
    layouts_of,
    multiply,
    restricted_layouts,
    section,
)
from curvop.operators.parameter_operator import Layouts, ParameterVectors, as_tensor
from curvop.operators.submatrix_operator import SubmatrixLinearOperator, as_slice
from curvop.operators.validation import real_scalar

__all__ = ["BlockDiagonalLinearOperator", "DiagonalLinearOperator", "as_diagonal"]

Names = Sequence[str]


class DiagonalLinearOperator(ParameterVectors):
    """Diagonal matrix, as a symmetric ``LinearOperator`` of shape ``(N, N)``.

    Use it to scale a curvature matrix on both sides, ``D @ H @ D``, or to add a prior, ``G + D``.

    Parameters
    ----------
    d : array, Tensor, or dict of str to Tensor or array
        The diagonal: a vector of shape ``(N,)``, or a dict with one tensor for each parameter. Each tensor in the dict
        has the shape of its parameter. The values are copied.
    params : dict of str to Tensor, optional
        Parameters in the order of the rows and columns. They are needed to select blocks of the operator by name. If
        ``d`` is a dict, the default is ``d`` itself. In sums and products with operators that have parameter names,
        ``params`` is not needed.

    Raises
    ------
    ValueError
        If ``d`` is not one-dimensional, or does not match ``params``.
    TypeError
        If ``d`` does not contain real numbers.

    See Also
    --------
    curvop.GGNLinearOperator.diagonal : Exact diagonal of a curvature matrix.
    curvop.spectrum.diagonal : Estimate of a diagonal from products.
    BlockDiagonalLinearOperator : Block-diagonal matrix of operators.

    Notes
    -----
    For any real number p, ``D ** p`` is the diagonal matrix with the entries ``d ** p``.

    Examples
    --------
    Scale the rows and columns of a Hessian with the diagonal of the Gauss-Newton matrix:

    >>> import torch
    >>> from curvop import DiagonalLinearOperator, GGNLinearOperator, HessianLinearOperator
    >>> _ = torch.manual_seed(0)
    >>> model, loss_function = torch.nn.Linear(3, 1).double(), torch.nn.MSELoss()
    >>> data = [(torch.randn(20, 3).double(), torch.randn(20, 1).double())]
    >>> params = dict(model.named_parameters())
    >>> H = HessianLinearOperator(model, loss_function, params, data)
    >>> D = DiagonalLinearOperator(GGNLinearOperator(model, loss_function, params, data).diagonal()) ** -0.5
    >>> (D @ H @ D).to_dense().diagonal().round(6)
    array([1., 1., 1., 1.])
    """

    def __init__(self, d: Any, params: Mapping[str, Tensor] | None = None) -> None:
        self._layout_or_none: ParameterLayout | None = None
        self._params = {}
        if params is not None or isinstance(d, Mapping):
            tensors = d if params is None else params
            if not isinstance(tensors, Mapping):
                raise TypeError(f"params is a {type(params).__name__}: pass a dict of names to tensors")
            self._params = {name: _real_tensor(f"{name!r}", value) for name, value in tensors.items()}
            self._layout_or_none = ParameterLayout(self._params, list(self._params))
        if isinstance(d, Mapping):
            if not d:
                raise ValueError("d is empty: pass at least one entry")
            d = self._joined(d)
        values = _real_tensor("d", d).clone()
        if values.ndim != 1:
            raise ValueError(f"d has shape {tuple(values.shape)}, but must be one-dimensional")
        if self._layout_or_none is not None and len(values) != self._layout_or_none.size:
            raise ValueError(f"d has {len(values)} entries, but must have {self._layout_or_none.size}, as params do")
        self._values = values
        self._array: NDArray[Any] = values.numpy(force=True)
        super().__init__(self._array.dtype, (len(values), len(values)))

    @property
    def _is_diagonal(self) -> bool:
        return True

    @property
    def epsilon(self) -> float:
        """Machine epsilon of float64, because products with float64 vectors are computed in float64."""
        return float(np.finfo(np.float64).eps)

    @property
    def device(self) -> torch.device:
        """Device of the tensor that contains the diagonal."""
        return self._values.device

    def diagonal(self) -> NDArray[Any]:
        """Return the diagonal.

        Returns
        -------
        diagonal : ndarray, shape (N,)
            A copy of the diagonal.
        """
        return self._array.copy()

    def __pow__(self, power: Any) -> DiagonalLinearOperator:
        """Return the diagonal matrix with the entries ``d ** power``, for a real number ``power``."""
        values = self._values ** real_scalar("the power", power)
        if bool(self._values.isfinite().all()) and not bool(values.isfinite().all()):
            raise ValueError(
                f"the power {power} of d is not finite, because d has entries <= 0: add a positive number to d"
            )
        diagonal = DiagonalLinearOperator(values)
        diagonal._params, diagonal._layout_or_none = self._params, self._layout_or_none
        return diagonal

    @property
    def _row_and_column_layouts(self) -> Layouts:
        return self._layout_or_none, self._layout_or_none

    def _joined(self, d: Mapping[str, Any]) -> Tensor:
        layout = self._layout
        if set(d) != set(layout.names):
            raise ValueError(f"d has the keys {sorted(d)}, but params are {sorted(layout.names)}")
        parts = {name: _real_tensor(f"d[{name!r}]", value) for name, value in d.items()}
        for name, shape in zip(layout.names, layout.shapes, strict=True):
            if parts[name].shape != shape:
                raise ValueError(f"d[{name!r}] has shape {tuple(parts[name].shape)}, but must have {tuple(shape)}")
        return torch.cat([parts[name].reshape(-1) for name in layout.names])

    def _restricted(self, rows: Names | None, cols: Names | None) -> TensorLinearOperator:
        layout = self._layout
        row_idxs, col_idxs = entries(layout, rows), entries(layout, cols)
        layouts = restricted_layouts(self, rows, cols)
        if rows == cols:
            diagonal = self._entries_at(row_idxs)
            diagonal._params, diagonal._layout_or_none = self._params, layouts[0]
            return diagonal
        return NamedLinearOperator(SubmatrixLinearOperator(self, row_idxs, col_idxs), layouts, self._params)

    def _smallest_block(
        self, rows: NDArray[np.intp], cols: NDArray[np.intp]
    ) -> tuple[TensorLinearOperator, NDArray[np.intp], NDArray[np.intp]]:
        return self, rows, cols

    def _entries_at(self, idxs: Any) -> DiagonalLinearOperator:
        return DiagonalLinearOperator(self._values[idxs])

    def _check_entries(self, x: Rows) -> None:
        """Do nothing, because vectors may have any dtype."""

    def _product_dtype(self, dtype: Any) -> Any:
        return np.result_type(self.dtype, dtype)

    def _apply(self, rows: Rows) -> Rows:
        if isinstance(rows, Tensor):
            return (rows * self._values.to(rows.device)).to(rows.dtype)
        return cast("Rows", rows * self._array)


class BlockDiagonalLinearOperator(CompositeLinearOperator):
    """Block-diagonal matrix of operators, as a ``LinearOperator``.

    If A is a curvature matrix, ``A.block_diagonal(groups)`` returns such an operator with the diagonal blocks of A.

    Parameters
    ----------
    blocks : sequence of LinearOperator
        Blocks, from the upper left to the lower right. They may be rectangular, and may be operators of SciPy.

    Raises
    ------
    ValueError
        If ``blocks`` is empty.
    TypeError
        If a block is not a ``LinearOperator``.

    See Also
    --------
    curvop.HessianLinearOperator.block_diagonal : Diagonal blocks of a curvature matrix.
    DiagonalLinearOperator : Diagonal matrix.

    Examples
    --------
    >>> import numpy as np
    >>> from curvop import BlockDiagonalLinearOperator, DiagonalLinearOperator
    >>> A = DiagonalLinearOperator(np.array([1.0, 2.0]))
    >>> BlockDiagonalLinearOperator([A, 3.0 * A]) @ np.ones(4)
    array([1., 2., 3., 6.])
    """

    def __init__(self, blocks: Sequence[LinearOperator]) -> None:
        blocks = list(blocks)
        if not blocks:
            raise ValueError("blocks is empty: pass at least one operator")
        for index, block in enumerate(blocks):
            if not isinstance(block, LinearOperator):
                raise TypeError(
                    f"blocks[{index}] is a {type(block).__name__}: wrap it with scipy.sparse.linalg.aslinearoperator"
                )
        row_ends, col_ends = (np.cumsum([0, *(block.shape[axis] for block in blocks)]) for axis in (0, 1))
        self._row_places: Sequence[Any]
        self._col_places: Sequence[Any]
        self._row_places, self._col_places = (
            [slice(int(a), int(b)) for a, b in itertools.pairwise(ends)] for ends in (row_ends, col_ends)
        )
        pairs = [layouts_of(block) for block in blocks]
        layouts = tuple(_joined_layout([pair[axis] for pair in pairs]) for axis in (0, 1))
        super().__init__((int(row_ends[-1]), int(col_ends[-1])), blocks, cast("Layouts", layouts))
        self._params = {
            name: block._params[name]
            for block, pair in zip(blocks, pairs, strict=True)
            for layout in pair
            for name in (() if layout is None else layout.names)
        }

    @classmethod
    def _placed(
        cls,
        blocks: Sequence[TensorLinearOperator],
        places: tuple[Sequence[Any], Sequence[Any]],
        shape: tuple[int, int],
        layouts: Layouts,
        params: Mapping[str, Tensor],
    ) -> Self:
        """Return an operator whose block number i has the rows ``places[0][i]`` and the columns ``places[1][i]``."""
        self = cls.__new__(cls)
        CompositeLinearOperator.__init__(self, shape, blocks, layouts)
        self._row_places, self._col_places = places
        self._params = dict(params)
        return self

    def _formula(self) -> str:
        return f"diag({len(self._parts)} block{'s' * (len(self._parts) != 1)})"

    @property
    def _is_diagonal(self) -> bool:
        return False

    def diagonal(self) -> NDArray[Any]:
        """Return the exact diagonal, if all blocks are square and can compute their diagonals."""
        diagonal = np.zeros(self.shape[0], dtype=self.dtype)
        for part, rows, cols in zip(self._parts, self._row_places, self._col_places, strict=True):
            if not np.array_equal(np.arange(self.shape[0])[rows], np.arange(self.shape[1])[cols]):
                return super().diagonal()
            diagonal[rows] = part.diagonal()
        return diagonal

    def _restricted(self, rows: Names | None, cols: Names | None) -> TensorLinearOperator:
        pairs = [layouts_of(part) for part in self._parts]
        if any(None in pair for pair in pairs):
            return super()._restricted(rows, cols)
        row_layout, col_layout = restricted_layouts(self, rows, cols)
        if row_layout is None or col_layout is None:
            return super()._restricted(rows, cols)
        blocks, row_places, col_places = [], [], []
        for part, (own_rows, own_cols) in zip(self._parts, pairs, strict=True):
            kept_rows = [name for name in row_layout.names if own_rows is not None and name in own_rows.slices]
            kept_cols = [name for name in col_layout.names if own_cols is not None and name in own_cols.slices]
            if kept_rows and kept_cols:
                blocks.append(section(part, layouts_of(part), kept_rows, kept_cols))
                row_places.append(entries(row_layout, kept_rows))
                col_places.append(entries(col_layout, kept_cols))
        block = self._placed(
            blocks, (row_places, col_places), (row_layout.size, col_layout.size), (row_layout, col_layout), self._params
        )
        block.dtype = self.dtype
        return block

    def _mirror(self, conjugate: bool) -> TensorLinearOperator:
        return self._placed(
            [cast("TensorLinearOperator", part.H if conjugate else part.T) for part in self._parts],
            (self._col_places, self._row_places),
            (self.shape[1], self.shape[0]),
            (self._col_layout, self._row_layout),
            self._params,
        )

    def _identity(self) -> tuple[Any, ...]:
        places = [_place_key(place) for places in (self._row_places, self._col_places) for place in places]
        return "block diagonal", *(part._identity() for part in self._parts), *places

    def _apply(self, rows: Rows) -> Rows:
        products: list[Any] = [
            multiply(part, rows[:, cols]) for part, cols in zip(self._parts, self._col_places, strict=True)
        ]
        if isinstance(rows, Tensor):
            dtype = next((product.dtype for product in products if product.dtype.is_complex), rows.dtype)
            out: Any = rows.new_zeros(len(rows), self.shape[0], dtype=dtype)
        else:
            dtype = np.result_type(*products) if products else self._product_dtype(rows.dtype)
            out = np.zeros((len(rows), self.shape[0]), dtype=dtype)
        for product, place in zip(products, self._row_places, strict=True):
            out[:, place] = product
        return cast("Rows", out)


def _diagonal_blocks(
    blocks: Sequence[TensorLinearOperator], places: Sequence[NDArray[np.intp]], A: ParameterVectors
) -> BlockDiagonalLinearOperator:
    """Return an operator of the shape of A with the given diagonal blocks, and zeros elsewhere.

    Block number i has the rows and the columns ``places[i]``.
    """
    slices = [as_slice(place) or place for place in places]
    layouts = A._row_and_column_layouts
    return BlockDiagonalLinearOperator._placed(blocks, (slices, slices), A.shape, layouts, A._params)


def as_diagonal(A: TensorLinearOperator) -> DiagonalLinearOperator:
    """Convert a diagonal operator, such as a product of diagonal matrices, to a ``DiagonalLinearOperator``."""
    if isinstance(A, DiagonalLinearOperator):
        return A
    diagonal = DiagonalLinearOperator(A.diagonal())
    rows, _ = layouts_of(A)
    if rows is not None:
        diagonal._params, diagonal._layout_or_none = getattr(A, "_params", {}), rows
    return diagonal


Composites.diagonal = as_diagonal
Composites.block_diagonal = _diagonal_blocks


def _place_key(place: Any) -> Any:
    return (place.start, place.stop) if isinstance(place, slice) else place.tobytes()


def _joined_layout(layouts: Sequence[ParameterLayout | None]) -> ParameterLayout | None:
    """Return the layout of a concatenation of vectors, given the layout of each vector.

    Return None if one of the layouts is None, or if two layouts have a name in common.
    """
    pairs = [
        (name, torch.empty(shape, device="meta"))
        for layout in layouts
        if layout is not None
        for name, shape in zip(layout.names, layout.shapes, strict=True)
    ]
    if any(layout is None for layout in layouts) or len(dict(pairs)) < len(pairs):
        return None
    return ParameterLayout(dict(pairs), [name for name, _ in pairs])


def _real_tensor(what: str, value: Any) -> Tensor:
    """Convert real numbers to a dense float32 or float64 tensor. Raise a TypeError for other values."""
    tensor = as_tensor(what, value)
    if (kind := unsupported_layout(tensor)) is not None:
        raise TypeError(f"{what} is a tensor that is {kind}: pass a dense one with values, such as x.to_dense()")
    return tensor if tensor.dtype in (torch.float32, torch.float64) else tensor.double()
