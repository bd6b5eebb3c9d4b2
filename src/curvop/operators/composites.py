"""Base class of operators that combine other operators, and helper functions for the operands."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.sparse.linalg import LinearOperator
from torch import Tensor

from curvop.kernels.parameters import ParameterLayout
from curvop.operators.base import Composites, Rows, TensorLinearOperator, WrappingLinearOperator
from curvop.operators.parameter_operator import Layouts, ParameterVectors
from curvop.operators.submatrix_operator import SubmatrixLinearOperator, as_slice

__all__ = [
    "CompositeLinearOperator",
    "NamedLinearOperator",
    "alike",
    "entries",
    "factor_formula",
    "layouts_of",
    "multiply",
    "name_of",
    "restricted_layouts",
    "section",
]

Names = Sequence[str]

_LONGEST_FORMULA = 120  # characters in ``repr``


class CompositeLinearOperator(ParameterVectors):
    """Base class of operators that combine other operators.

    Subclasses implement ``_apply``, ``_mirror`` and ``_identity``. Most subclasses also override ``_restricted``.

    Parameters
    ----------
    shape : tuple of int
        ``(M, N)``.
    operands : sequence of LinearOperator or number
        Operands in the order of the expression. They are stored in ``args``, as in SciPy's composite operators.
    layouts : tuple of ParameterLayout or None
        Tuple ``(rows, cols)``: the layout of the row parameters, and the layout of the column parameters. ``rows`` is
        None if the rows are not parameters, and ``cols`` is None if the columns are not.
    """

    def __init__(self, shape: tuple[int, int], operands: Sequence[Any], layouts: Layouts) -> None:
        self._parts = [_of_this_package(operand) for operand in operands if isinstance(operand, LinearOperator)]
        self._scalars = [operand for operand in operands if not isinstance(operand, LinearOperator)]
        dtypes = [part.dtype for part in self._parts]
        unknown = not dtypes or any(dtype is None for dtype in dtypes)
        super().__init__(None if unknown else np.result_type(*dtypes, *self._scalars), shape)
        self.args = tuple(operands)
        self._row_layout, self._col_layout = layouts
        self._params: dict[str, Tensor] = {}
        diagonals = [part for part in self._parts if part._is_diagonal]
        for part in (*diagonals, *(part for part in reversed(self._parts) if not part._is_diagonal)):
            self._params |= getattr(part, "_params", {})  # the first operand that is not diagonal takes precedence
        self._symmetric: bool | None = None

    def release_cache(self) -> None:
        """Free the memory of the batches that are kept between products."""
        for part in self._parts:
            part.release_cache()

    def _details(self) -> list[str]:
        return [textwrap.shorten(self._formula(), _LONGEST_FORMULA, placeholder=" ..."), *super()._details()]

    @property
    def takes_tensors(self) -> bool:
        """Whether all operands are operators of this package that can be applied to tensors."""
        return all(part.takes_tensors for part in self._parts)

    @property
    def device(self) -> torch.device:
        """Device on which products are computed: the first device of an operand that is not the CPU, or the CPU."""
        devices = [part.device for part in self._parts]
        return next((device for device in devices if device.type != "cpu"), torch.device("cpu"))

    @property
    def epsilon(self) -> float:
        """Machine epsilon of the lowest precision used in a product, which is the largest epsilon of the operands."""
        return max((part.epsilon for part in self._parts), default=super().epsilon)

    @property
    def _is_diagonal(self) -> bool:
        return all(part._is_diagonal for part in self._parts)

    @property
    def _row_and_column_layouts(self) -> Layouts:
        return self._row_layout, self._col_layout

    def _restricted(self, rows: Names | None, cols: Names | None) -> TensorLinearOperator:
        """Return the block of the given parameters. Rows or columns for which None is passed are not restricted."""
        return NamedLinearOperator(
            SubmatrixLinearOperator.of_whole(self, entries(self._row_layout, rows), entries(self._col_layout, cols)),
            restricted_layouts(self, rows, cols),
            self._params,
        )

    def _adjoint(self) -> LinearOperator:
        if self._symmetric is None:
            self._symmetric = self.shape[0] == self.shape[1] and self._mirror(True)._identity() == self._identity()
        return self if self._symmetric else self._with_counter(self._mirror(True))

    def _transpose(self) -> LinearOperator:
        is_complex = self.dtype is not None and self.dtype.kind == "c"
        return self._with_counter(self._mirror(False)) if is_complex else self._adjoint()

    def _mirror(self, conjugate: bool) -> TensorLinearOperator:
        """Return the adjoint (if ``conjugate``) or the transpose as a new operator."""
        raise NotImplementedError

    def _with_counter(self, mirror: TensorLinearOperator) -> TensorLinearOperator:
        mirror._counter = self._counter
        return mirror

    def _check_entries(self, x: Rows) -> None:
        if self.dtype is not None and self.dtype.kind != "c":
            for part in self._parts:
                part._check_entries(x)

    def _entries_at(self, idxs: Any) -> LinearOperator:
        return Composites.diagonal(self)._entries_at(idxs) if self._is_diagonal else super()._entries_at(idxs)

    def _product_dtype(self, dtype: Any) -> Any:
        if not self._parts:
            return super()._product_dtype(dtype)
        return np.result_type(*(part._product_dtype(dtype) for part in self._parts), *self._scalars)


class _ScipyLinearOperator(WrappingLinearOperator):
    """Wrapper of an operator of SciPy. It converts tensors to NumPy arrays, and the products to tensors."""

    def __init__(self, A: LinearOperator) -> None:
        if len(A.shape) != 2:
            raise ValueError(f"B has shape {A.shape}, but must have two dimensions: take one operator of the stack")
        self._A = A
        super().__init__(A.dtype, A.shape)

    def _apply(self, rows: Rows) -> Rows:
        array = _as_array(rows)
        # Copy the product, because the operator may return its argument or an array that it keeps.
        product = np.array(self._A.matvec(array[0])[None] if len(array) == 1 else self._A.matmat(array.T).T, order="C")
        if not isinstance(rows, Tensor):
            return product
        tensor = torch.from_numpy(product).to(rows.device)
        return tensor if tensor.is_complex() else tensor.to(rows.dtype)

    def _formula(self) -> str:
        return type(self._A).__name__

    def _adjoint(self) -> LinearOperator:
        adjoint = self._A.H
        return self if adjoint is self._A else _ScipyLinearOperator(adjoint)

    def _transpose(self) -> LinearOperator:
        return _ScipyLinearOperator(self._A.T)

    def _identity(self) -> tuple[Any, ...]:
        return "scipy", id(self._A)


class NamedLinearOperator(CompositeLinearOperator):
    """Wrapper that assigns parameter names to the rows and columns of an operator."""

    def __init__(self, A: TensorLinearOperator, layouts: Layouts, params: Mapping[str, Tensor]) -> None:
        super().__init__(A.shape, [A], layouts)
        self._params = dict(params)

    def _formula(self) -> str:
        return self._parts[0]._formula()

    def diagonal(self) -> NDArray[Any]:
        """Return the exact diagonal, if the wrapped operator can compute it without products."""
        return self._parts[0].diagonal()

    def _restricted(self, rows: Names | None, cols: Names | None) -> TensorLinearOperator:
        row_idxs, col_idxs = entries(self._row_layout, rows), entries(self._col_layout, cols)
        submatrix = SubmatrixLinearOperator(self._parts[0], row_idxs, col_idxs)
        return NamedLinearOperator(submatrix, restricted_layouts(self, rows, cols), self._params)

    def _smallest_block(
        self, rows: NDArray[np.intp], cols: NDArray[np.intp]
    ) -> tuple[TensorLinearOperator, NDArray[np.intp], NDArray[np.intp]]:
        return self, rows, cols

    def _mirror(self, conjugate: bool) -> TensorLinearOperator:
        A = self._parts[0]
        return NamedLinearOperator(A.H if conjugate else A.T, (self._col_layout, self._row_layout), self._params)

    def _identity(self) -> tuple[Any, ...]:
        return self._parts[0]._identity()

    def _apply(self, rows: Rows) -> Rows:
        return self._parts[0]._multiply_last_axis(rows)


# Helpers for operands and layouts.


def _of_this_package(A: LinearOperator) -> TensorLinearOperator:
    return A if isinstance(A, TensorLinearOperator) else _ScipyLinearOperator(A)


def _as_array(rows: Rows) -> NDArray[Any]:
    """Convert a tensor to an array. A bfloat16 tensor becomes a float32 array, because NumPy has no bfloat16."""
    if not isinstance(rows, Tensor):
        return rows
    return (rows.float() if rows.dtype == torch.bfloat16 else rows).numpy(force=True)


def multiply(A: TensorLinearOperator, rows: Rows) -> Rows:
    """Multiply an operand by each row of ``rows``.

    If the operand is real and the rows are complex, the real and imaginary parts are multiplied separately.
    """
    complex_rows = rows.is_complex() if isinstance(rows, Tensor) else rows.dtype.kind == "c"
    if not complex_rows or A.dtype is None or A.dtype.kind == "c":
        return A._multiply_last_axis(rows)
    parts: Any = (rows.real, rows.imag)
    both: Any = A._multiply_last_axis(torch.cat(parts) if isinstance(rows, Tensor) else np.concatenate(parts))
    count = len(rows)
    if isinstance(both, Tensor):
        return torch.complex(both[:count], both[count:])
    return cast("Rows", both[:count] + 1j * both[count:])


def factor_formula(A: TensorLinearOperator) -> str:
    """Return the formula of an operand of a product. A sum is in parentheses."""
    formula = A._formula()
    return f"({formula})" if " + " in formula or " - " in formula else formula


def name_of(A: LinearOperator) -> str:
    """Return a text with the class and the shape of an operator, for error messages."""
    return f"{type(A).__name__} of shape {tuple(A.shape)}"


def layouts_of(A: LinearOperator) -> Layouts:
    """Return the layouts ``(rows, cols)`` of an operator, or ``(None, None)`` if it has no parameter names."""
    return A._row_and_column_layouts if isinstance(A, ParameterVectors) else (None, None)


def alike(a: ParameterLayout | None, b: ParameterLayout | None) -> bool:
    """Return True if two layouts have the same names and shapes in the same order, or if both are None."""
    return a is b or (a is not None and b is not None and a.names == b.names and a.shapes == b.shapes)


def entries(layout: ParameterLayout | None, names: Names | None) -> Any:
    """Return the positions of the named parameters in a vector with the given layout.

    The result is a slice if the positions are consecutive, and an array otherwise. If ``layout`` or ``names`` is None,
    the result is a slice of the whole vector.
    """
    if names is None or layout is None:
        return slice(None)
    idxs = np.concatenate([np.arange(layout.slices[name].start, layout.slices[name].stop) for name in names])
    return as_slice(idxs) or idxs


def restricted_layouts(A: ParameterVectors, rows: Names | None, cols: Names | None) -> Layouts:
    """Return the layouts ``(rows, cols)`` of a block of A, given the names of its row and column parameters."""
    row_layout, col_layout = A._row_and_column_layouts

    def cut(layout: ParameterLayout | None, names: Names | None) -> ParameterLayout | None:
        if layout is None or names is None:
            return layout
        shapes = dict(zip(layout.names, layout.shapes, strict=True))
        return ParameterLayout({name: torch.empty(shapes[name], device="meta") for name in names}, names)

    return cut(row_layout, rows), cut(col_layout, cols)


def section(A: TensorLinearOperator, layouts: Layouts, rows: Names | None, cols: Names | None) -> TensorLinearOperator:
    """Return the block of the operand A with the named row and column parameters.

    ``rows=None`` selects all rows, and ``cols=None`` selects all columns. ``layouts`` are the layouts of the composite
    operator, of which A is an operand. If the layouts of A are different or None, the entries of A are selected by the
    positions of the parameters in ``layouts``.
    """
    if rows is None and cols is None:
        return A
    if isinstance(A, ParameterVectors) and all(
        names is None or alike(own, layout)
        for names, own, layout in zip((rows, cols), layouts_of(A), layouts, strict=True)
    ):
        return A._restricted(rows, cols)
    row_idxs, col_idxs = (entries(layout, names) for layout, names in zip(layouts, (rows, cols), strict=True))
    if rows == cols and alike(*layouts):
        return cast("TensorLinearOperator", A._entries_at(row_idxs))
    return SubmatrixLinearOperator(A, row_idxs, col_idxs)
