"""Operators whose rows and columns are parameters."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from curvop.kernels.parameters import ParameterLayout, unknown_name
from curvop.operators.base import ProductCounter, Rows, TensorLinearOperator
from curvop.operators.validation import real_number

__all__ = ["DampedLinearOperator", "ParameterLinearOperator", "ParameterVectors", "touched"]


class ParameterVectors(TensorLinearOperator):
    """An operator whose rows or columns, or both, are parameters.

    Subclasses say where the entries of each parameter are: among the rows, the columns, and those that `ravel` is for.
    """

    _params: Mapping[str, Tensor]

    @property
    def _layout(self) -> ParameterLayout:
        raise NotImplementedError

    @property
    def _parts(self) -> tuple[ParameterLayout | None, ParameterLayout | None]:
        """The parameters that the rows and the columns are, None if they are not parameters."""
        raise NotImplementedError

    @property
    def params_slices(self) -> dict[str, slice]:
        """Where each parameter lies among the columns (for a rectangular block's rows: ``A.H.params_slices``)."""
        return dict(self._layout.slices)

    def ravel(self, params: Mapping[str, Any]) -> NDArray[Any]:
        """Return a dict of tensors or arrays, one a column parameter, as one vector ``(N,)`` in the operator's dtype.

        Raises
        ------
        ValueError
            Where a parameter is missing, unknown, or of another shape.
        """
        if not isinstance(params, Mapping):
            raise TypeError(f"params is a {type(params).__name__}: pass a dict of names to tensors or arrays")
        for name in params:
            if name not in self._layout.slices:
                raise ValueError(unknown_name("params", name, self._layout.names))
        vector = np.empty(self._layout.size, dtype=self.dtype)
        for name, shape in zip(self._layout.names, self._layout.shapes, strict=True):
            if name not in params:
                raise ValueError(f"params lacks {name!r}: pass all of {', '.join(map(repr, self._layout.names))}")
            value = _as_tensor(f"params[{name!r}]", params[name])
            if value.shape != shape:
                raise ValueError(f"params[{name!r}] has shape {tuple(value.shape)}, but must have {tuple(shape)}")
            vector[self._layout.slices[name]] = value.reshape(-1).double().cpu().numpy()
        return vector

    def unravel(self, vector: Any) -> dict[str, Tensor]:
        """Return a vector ``(N,)`` as a dict of tensors with the column parameters' shapes, dtype and device."""
        if np.shape(vector) != (self._layout.size,):
            raise ValueError(
                f"vector has shape {tuple(np.shape(vector))}, but A has {self._layout.size} columns: pass "
                f"({self._layout.size},)"
            )
        like = self._params[self._layout.names[0]]
        vector = _as_tensor("vector", vector).to(like.device, like.dtype, copy=True)
        return self._in_parts(self._layout, vector)

    def _check_entries(self, x: Rows) -> None:
        kind = ("c" if x.is_complex() else "f") if isinstance(x, Tensor) else x.dtype.kind
        if kind == "c":
            raise TypeError(f"x has dtype {x.dtype}, but A is real: multiply its real and imaginary parts apart")
        if kind not in "biuf":
            raise TypeError(f"x has dtype {x.dtype}, but A is real: pass real numbers")

    def _product_dtype(self, dtype: Any) -> Any:
        product = super()._product_dtype(dtype)
        return product if product == np.float32 else np.dtype(np.float64)  # torch knows no longdouble

    def _is_tree(self, x: Any) -> bool:
        _, cols = self._parts
        scalars = cols is not None and not any(cols.shapes)  # then a list of numbers is one of parameters, too
        return super()._is_tree(x) or (scalars and any(isinstance(part, Tensor) for part in x))

    def _tree_product(self, x: Any) -> Any:
        """Multiply by tensors of the column parameters' shapes; return the row parameters in the same way."""
        rows, cols = self._parts
        if cols is None:
            return super()._tree_product(x)
        product = self.dot(torch.cat([part.reshape(-1) for part in self._checked_parts(x, cols)]))
        if rows is None:
            return product
        parts = self._in_parts(rows, product)
        if isinstance(x, Mapping):
            return parts
        return tuple(parts.values()) if isinstance(x, tuple) else list(parts.values())

    def _checked_parts(self, x: Any, cols: ParameterLayout) -> Iterator[Tensor]:
        """Yield what `x` has of each parameter, on the device of products."""
        if isinstance(x, Mapping):
            for name in x:
                if name not in cols.slices:
                    raise ValueError(unknown_name("x", name, cols.names))
            if missing := [name for name in cols.names if name not in x]:
                raise ValueError(f"x lacks {missing[0]!r}: pass all of {', '.join(map(repr, cols.names))}")
        elif len(x) != len(cols.names):
            raise ValueError(
                f"x holds {len(x)} tensors, but A has {len(cols.names)} column parameters: pass one of each shape, "
                f"{_listed(map(tuple, cols.shapes))}"
            )
        for index, (name, shape) in enumerate(zip(cols.names, cols.shapes, strict=True)):
            where, part = (f"x[{name!r}]", x[name]) if isinstance(x, Mapping) else (f"x[{index}]", x[index])
            if not isinstance(part, Tensor):
                raise TypeError(f"{where} is a {type(part).__name__}: pass a tensor of shape {tuple(shape)}")
            if part.shape != shape:
                raise ValueError(
                    f"{where} has shape {tuple(part.shape)}, but parameter {name!r} has shape {tuple(shape)}: pass "
                    "tensors of the shapes of the column parameters, one vector at a time"
                )
            yield self._floating(part, where).to(self.device)

    def _in_parts(self, layout: ParameterLayout, vector: Tensor) -> dict[str, Tensor]:
        """Return a vector's part of each parameter, in its shape and on its device."""
        pairs = zip(layout.names, layout.split(vector), strict=True)
        return {name: part.to(self._params[name].device) for name, part in pairs}


class ParameterLinearOperator(ParameterVectors):
    """An operator whose rows and columns are parameters; knows which entry belongs to which."""

    def __init__(
        self,
        dtype: Any,
        params: Mapping[str, Tensor],
        rows: ParameterLayout,
        cols: ParameterLayout,
        counter: ProductCounter | None = None,
    ) -> None:
        super().__init__(dtype, (rows.size, cols.size), counter)
        self._params = params
        self._rows = rows
        self._cols = cols

    @property
    def _layout(self) -> ParameterLayout:
        return self._cols

    @property
    def _parts(self) -> tuple[ParameterLayout, ParameterLayout]:
        return self._rows, self._cols

    def block(self, rows: str | Sequence[str], cols: str | Sequence[str] | None = None) -> Self:
        """Return the operator of the block that the named parameters span, rows by columns."""
        raise NotImplementedError

    def gradient_and_loss(self) -> tuple[NDArray[Any], float]:
        """Return the gradient with respect to the row parameters, and the loss."""
        raise NotImplementedError

    def blocks(self) -> Iterator[Self]:
        """Iterate over the diagonal blocks, one a parameter.

        Raises
        ------
        ValueError
            For a block whose rows and columns are different parameters.
        """
        if set(self._rows.names) != set(self._cols.names):
            raise ValueError("A has other parameters for rows than for columns, so no diagonal blocks: use A.block")
        return map(self.block, self._cols.names)

    def damped(self, damping: float) -> DampedLinearOperator:
        """Return ``A + damping * I``, with everything that `A` has.

        Parameters
        ----------
        damping : float
            Finite; in the units of the eigenvalues.
        """
        return DampedLinearOperator(self, damping)

    def _block_of(
        self, rows: NDArray[np.intp], cols: NDArray[np.intp]
    ) -> tuple[Self, NDArray[np.intp], NDArray[np.intp]]:
        """Return the smallest block that holds the rows and columns, and where they are in it."""
        row_names, rows = touched(self._rows, rows)
        col_names, cols = touched(self._cols, cols)
        if (row_names, col_names) == (self._rows.names, self._cols.names):
            return self, rows, cols
        return self.block(row_names, col_names), rows, cols


def _as_tensor(what: str, value: Any) -> Tensor:
    """Return real numbers as a tensor."""
    if isinstance(value, Tensor):
        tensor = value.detach()
    else:
        array = np.array(value)
        if array.dtype.kind not in "biufc":
            raise TypeError(f"{what} has dtype {array.dtype}, but must hold numbers")
        wide = {"g": np.float64, "G": np.complex128}  # torch knows no longdouble, and one order of bytes
        tensor = torch.from_numpy(array.astype(wide.get(array.dtype.char, array.dtype.newbyteorder("=")), copy=False))
    if tensor.is_complex():
        raise TypeError(f"{what} is complex, but parameters are real: pass its real and imaginary parts apart")
    return tensor


def _listed(shapes: Iterable[tuple[int, ...]]) -> str:
    first = list(itertools.islice(shapes, 11))
    return ", ".join(map(str, first[:10])) + (", ..." if len(first) > 10 else "")


def touched(layout: ParameterLayout, idxs: NDArray[np.intp]) -> tuple[tuple[str, ...], NDArray[np.intp]]:
    """Return the parameters that the entries `idxs` belong to, and where the entries are among these alone."""
    starts = np.array([where.start for where in layout.slices.values()])
    sizes = np.array([shape.numel() for shape in layout.shapes])
    owners = np.searchsorted(starts + sizes, idxs, side="right")
    taken = np.zeros(len(starts), dtype=bool)
    taken[owners] = True
    if taken.all():
        return layout.names, idxs
    moved = np.cumsum(np.where(taken, sizes, 0)) - sizes
    return tuple(np.array(layout.names)[taken]), idxs + (moved - starts)[owners]


# Damping: ``A + lambda I``.


class DampedLinearOperator(ParameterLinearOperator):
    """``A + damping * I``, made by ``A.damped(damping)``.

    Blocks and submatrices of it are those of the sum: an off-diagonal block is that of `A`, and a block whose rows and
    columns share some of their parameters is damped on these.

    Parameters
    ----------
    A : ParameterLinearOperator
    damping : float
        Finite.
    """

    def __init__(self, A: ParameterLinearOperator, damping: float) -> None:
        if not isinstance(A, ParameterLinearOperator):
            raise TypeError(f"A is a {type(A).__name__}: add damping to it as SciPy does, A + damping * identity")
        if not math.isfinite(real_number("damping", damping)):
            raise ValueError(f"damping is {damping}, but must be finite")
        super().__init__(A.dtype, A._params, A._rows, A._cols, A._counter)
        self._A = A
        self.args = (A, float(damping))  # as SciPy's own sums and multiples have them

    @property
    def damping(self) -> float:
        """What is added to the diagonal."""
        return float(self.args[1])

    @property
    def device(self) -> torch.device:
        """That of `A`."""
        return self._A.device

    def block(self, rows: str | Sequence[str], cols: str | Sequence[str] | None = None) -> Self:
        """Return the operator of the block of the sum that the named parameters span; see `A.block`."""
        return type(self)(self._A.block(rows, cols), self.damping)

    def damped(self, damping: float) -> DampedLinearOperator:
        """Return ``A + (self.damping + damping) * I``."""
        return type(self)(self._A, self.damping + damping)

    def diagonal(self) -> NDArray[Any]:
        """Return the exact diagonal ``(N,)``, that of `A` with the damping added; see `A.diagonal`."""
        diagonal: NDArray[Any] = self._A.diagonal() + self.damping
        return diagonal

    def gradient_and_loss(self) -> tuple[NDArray[Any], float]:
        """Return the gradient and the loss of A's objective, without damping."""
        return self._A.gradient_and_loss()

    def _adjoint(self) -> Self:
        adjoint = self._A.H
        return self if adjoint is self._A else type(self)(adjoint, self.damping)

    def _apply(self, rows: Rows) -> Rows:
        products = self._A._apply(rows)
        shifted: Any = products
        for name in self._rows.names:
            if name in self._cols.slices:
                shifted[:, self._rows.slices[name]] += self.damping * rows[:, self._cols.slices[name]]
        return products
