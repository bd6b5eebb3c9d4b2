"""Operators whose rows or columns are parameters, and damped operators."""

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
from curvop.operators.validation import real_scalar

__all__ = ["DampedLinearOperator", "ParameterLinearOperator", "ParameterVectors", "touched_parameters"]


class ParameterVectors(TensorLinearOperator):
    """Base class of operators whose rows, columns, or both are parameters.

    Subclasses define the properties ``_row_and_column_layouts`` and ``_layout``. `ravel` and `unravel` use ``_layout``.
    """

    _params: Mapping[str, Tensor]

    @property
    def _layout(self) -> ParameterLayout:
        raise NotImplementedError

    @property
    def _row_and_column_layouts(self) -> tuple[ParameterLayout | None, ParameterLayout | None]:
        """Tuple (rows, cols): the layout of the row parameters, and the layout of the column parameters.

        ``rows`` is None if the rows of the matrix are not parameters, and ``cols`` is None if the columns are not.
        """
        raise NotImplementedError

    @property
    def params_slices(self) -> dict[str, slice]:
        """Dict that maps the name of each column parameter to the slice of its columns.

        For a rectangular block, ``A.H.params_slices`` contains the slices of the rows. If only the rows are parameters
        (for example, in a transposed Jacobian), ``A.params_slices`` contains the slices of the rows.
        """
        return dict(self._layout.slices)

    def ravel(self, params: Mapping[str, Any]) -> NDArray[Any]:
        """Concatenate one tensor per parameter into a vector.

        Parameters
        ----------
        params : dict of str to Tensor or array
            One tensor or array for each column parameter, with the shape of the parameter. Examples are a gradient or
            an update.

        Returns
        -------
        vector : ndarray, shape (N,)
            Vector in the dtype of the operator. The entries are in the order of the columns.

        Raises
        ------
        ValueError
            If a parameter is missing or unknown, or has a different shape.
        TypeError
            If ``params`` is not a dict, or its values are not real numbers.

        See Also
        --------
        unravel : The inverse operation.
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
        """Split a vector into one tensor per parameter.

        Parameters
        ----------
        vector : array or Tensor, shape (N,)
            Vector, for example an eigenvector or the solution of a linear system.

        Returns
        -------
        params : dict of str to Tensor
            One tensor for each column parameter, with the shape, dtype and device of the parameter. The tensors do not
            share memory with ``vector``.

        Raises
        ------
        ValueError
            If ``vector`` does not have shape ``(N,)``.
        TypeError
            If ``vector`` is complex or does not contain numbers.

        See Also
        --------
        ravel : The inverse operation.
        """
        if np.shape(vector) != (self._layout.size,):
            raise ValueError(
                f"vector has shape {tuple(np.shape(vector))}, but A has {self._layout.size} columns: pass "
                f"({self._layout.size},)"
            )
        like = self._params[self._layout.names[0]]
        vector = _as_tensor("vector", vector).to(like.device, like.dtype, copy=True)
        return self._split_by_parameter(self._layout, vector)

    def _check_entries(self, x: Rows) -> None:
        kind = ("c" if x.is_complex() else "f") if isinstance(x, Tensor) else x.dtype.kind
        if kind == "c":
            raise TypeError(f"x has dtype {x.dtype}, but A is real: multiply its real and imaginary parts separately")
        if kind not in "biuf":
            raise TypeError(f"x has dtype {x.dtype}, but A is real: pass real numbers")

    def _product_dtype(self, dtype: Any) -> Any:
        product = super()._product_dtype(dtype)
        return product if product == np.float32 else np.dtype(np.float64)  # torch has no dtype for longdouble

    def _is_tree(self, x: Any) -> bool:
        _, cols = self._row_and_column_layouts
        # If all column parameters are scalars, a list of 0-dimensional tensors contains one tensor per parameter.
        scalars = cols is not None and not any(cols.shapes)
        return super()._is_tree(x) or (scalars and any(isinstance(part, Tensor) for part in x))

    def _tree_product(self, x: Any) -> Any:
        """Apply the operator to a container of one tensor per column parameter. Return one tensor per row parameter.

        The product is a container of the same type as ``x``. If the rows are not parameters, the product is a single
        tensor.
        """
        rows, cols = self._row_and_column_layouts
        if cols is None:
            return super()._tree_product(x)
        product = self.dot(torch.cat([part.reshape(-1) for part in self._tree_parts(x, cols)]))
        if rows is None:
            return product
        parts = self._split_by_parameter(rows, product)
        if isinstance(x, Mapping):
            return parts
        return tuple(parts.values()) if isinstance(x, tuple) else list(parts.values())

    def _tree_parts(self, x: Any, cols: ParameterLayout) -> Iterator[Tensor]:
        """Validate the tensors in ``x``. Yield one tensor per column parameter, on the device of the operator."""
        if isinstance(x, Mapping):
            for name in x:
                if name not in cols.slices:
                    raise ValueError(unknown_name("x", name, cols.names))
            if missing := [name for name in cols.names if name not in x]:
                raise ValueError(f"x lacks {missing[0]!r}: pass all of {', '.join(map(repr, cols.names))}")
        elif len(x) != len(cols.names):
            raise ValueError(
                f"x holds {len(x)} tensors, but A has {len(cols.names)} column parameters: pass one of each shape, "
                f"{_shapes_text(map(tuple, cols.shapes))}"
            )
        for index, (name, shape) in enumerate(zip(cols.names, cols.shapes, strict=True)):
            what, part = (f"x[{name!r}]", x[name]) if isinstance(x, Mapping) else (f"x[{index}]", x[index])
            if not isinstance(part, Tensor):
                raise TypeError(f"{what} is a {type(part).__name__}: pass a tensor of shape {tuple(shape)}")
            if part.shape != shape:
                raise ValueError(
                    f"{what} has shape {tuple(part.shape)}, but parameter {name!r} has shape {tuple(shape)}: pass "
                    "one tensor per column parameter, with its shape; only one vector at a time"
                )
            yield self._as_floating(part, what).to(self.device)

    def _split_by_parameter(self, layout: ParameterLayout, vector: Tensor) -> dict[str, Tensor]:
        """Split a vector into one tensor per parameter. Each tensor has the shape and device of its parameter."""
        pairs = zip(layout.names, layout.split(vector), strict=True)
        return {name: part.to(self._params[name].device) for name, part in pairs}


class ParameterLinearOperator(ParameterVectors):
    """Base class of operators whose rows and columns are parameters.

    Parameters
    ----------
    dtype : dtype
        Data type of the products.
    params : mapping of str to Tensor
        Parameters by name. They include all row and column parameters.
    rows, cols : ParameterLayout
        Layouts of the row and column parameters.
    counter : ProductCounter, optional
        Counter that is shared with another operator.
    """

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
    def _row_and_column_layouts(self) -> tuple[ParameterLayout, ParameterLayout]:
        return self._rows, self._cols

    def block(self, rows: str | Sequence[str], cols: str | Sequence[str] | None = None) -> Self:
        """Return the block of the matrix for the given parameters, as an operator of the same class.

        Parameters
        ----------
        rows : str or sequence of str
            Names of the row parameters, in the order of the block.
        cols : str or sequence of str, optional
            Names of the column parameters. By default, the same as ``rows``.

        Returns
        -------
        ParameterLinearOperator
            Operator of shape ``(M, N)``, where M and N are the total sizes of the row and column parameters.

        Raises
        ------
        ValueError
            If a name is unknown (the message suggests similar names), if a name is repeated, or if no name is given.
        """
        raise NotImplementedError

    def gradient_and_loss(self) -> tuple[NDArray[Any], float]:
        """Compute the gradient and the loss in one pass over the data.

        Returns
        -------
        gradient : ndarray, shape (M,)
            Gradient of the loss of the whole data set with respect to the row parameters.
        loss : float
            Loss of the whole data set.
        """
        raise NotImplementedError

    def blocks(self) -> Iterator[Self]:
        """Iterate over the diagonal blocks of the matrix, one block for each parameter.

        Yields
        ------
        ParameterLinearOperator
            ``A.block(name)`` for each parameter, in the order of the columns.

        Raises
        ------
        ValueError
            If the rows and columns are different parameters.

        See Also
        --------
        curvop.spectrum.blocks : Spectra of all diagonal blocks.
        """
        if set(self._rows.names) != set(self._cols.names):
            raise ValueError("A has different row and column parameters, and so no diagonal blocks: use A.block")
        return map(self.block, self._cols.names)

    def damped(self, damping: float) -> DampedLinearOperator:
        """Return ``A + damping * I`` as an operator with the same methods as A.

        Parameters
        ----------
        damping : float
            Finite number that is added to the diagonal, in the units of the eigenvalues.

        Returns
        -------
        DampedLinearOperator
            Operator of the same shape. It shares the cached linearizations and the counter of A.

        Raises
        ------
        ValueError
            If ``damping`` is infinite or NaN.
        TypeError
            If ``damping`` is not a real number.

        See Also
        --------
        curvop.solve : Solve a damped system and compute the true residual.
        """
        return DampedLinearOperator(self, damping)

    def _smallest_block(
        self, rows: NDArray[np.intp], cols: NDArray[np.intp]
    ) -> tuple[Self, NDArray[np.intp], NDArray[np.intp]]:
        """Return (block, rows, cols), where ``block`` is the smallest block that contains the given rows and columns.

        The returned ``rows`` and ``cols`` are the indices of the given rows and columns within ``block``.
        """
        row_names, rows = touched_parameters(self._rows, rows)
        col_names, cols = touched_parameters(self._cols, cols)
        if (row_names, col_names) == (self._rows.names, self._cols.names):
            return self, rows, cols
        return self.block(row_names, col_names), rows, cols


def _as_tensor(what: str, value: Any) -> Tensor:
    """Convert real numbers to a tensor. Raise a ``TypeError`` for other values."""
    if isinstance(value, Tensor):
        tensor = value.detach()
    else:
        array = np.array(value)
        if array.dtype.kind not in "biufc":
            raise TypeError(f"{what} has dtype {array.dtype}, but must hold numbers")
        wide = {"g": np.float64, "G": np.complex128}  # torch supports neither longdouble nor non-native byte orders
        tensor = torch.from_numpy(array.astype(wide.get(array.dtype.char, array.dtype.newbyteorder("=")), copy=False))
    if tensor.is_complex():
        raise TypeError(f"{what} is complex, but parameters are real: pass its real and imaginary parts separately")
    return tensor


def _shapes_text(shapes: Iterable[tuple[int, ...]]) -> str:
    first = list(itertools.islice(shapes, 11))
    return ", ".join(map(str, first[:10])) + (", ..." if len(first) > 10 else "")


def touched_parameters(layout: ParameterLayout, idxs: NDArray[np.intp]) -> tuple[tuple[str, ...], NDArray[np.intp]]:
    """Find the parameters that contain the given indices.

    Return (names, positions), where ``names`` are the names of these parameters. If only these parameters are
    concatenated, ``positions`` are the new positions of the given indices.
    """
    starts = np.array([part.start for part in layout.slices.values()])
    sizes = np.array([shape.numel() for shape in layout.shapes])
    owners = np.searchsorted(starts + sizes, idxs, side="right")
    selected = np.zeros(len(starts), dtype=bool)
    selected[owners] = True
    if selected.all():
        return layout.names, idxs
    new_starts = np.cumsum(np.where(selected, sizes, 0)) - sizes
    return tuple(np.array(layout.names)[selected]), idxs + (new_starts - starts)[owners]


# Damping.


class DampedLinearOperator(ParameterLinearOperator):
    """Damped operator ``A + damping * I``, returned by ``A.damped(damping)``.

    Use it to solve Newton and natural gradient systems with SciPy's ``cg`` or ``minres``. Use `curvop.solve` instead if
    you need a check of the residual and a warning if the damped matrix is indefinite. For operators whose rows and
    columns are not parameters, write ``A + damping * aslinearoperator(identity)``, as in SciPy.

    Parameters
    ----------
    A : ParameterLinearOperator
        Operator whose rows and columns are parameters, such as a Hessian, GGN or Fisher matrix, or a block of such a
        matrix.
    damping : float
        Finite number that is added to the diagonal.

    Raises
    ------
    TypeError
        If the rows and columns of A are not parameters, or ``damping`` is not a real number.
    ValueError
        If ``damping`` is infinite or NaN.

    See Also
    --------
    curvop.solve : Solve a damped system and compute the true residual.
    curvop.preconditioner.nystrom : Preconditioner for damped systems.

    Notes
    -----
    Blocks and submatrices are taken from the damped matrix. An off-diagonal block therefore equals the corresponding
    block of A. If the rows and columns of a block have only some parameters in common, the damping is added only to the
    diagonal entries of the common parameters. A product costs as much as a product with A.

    Examples
    --------
    Compute a Newton step with Levenberg damping for a quadratic loss, by conjugate gradients:

    >>> import numpy as np
    >>> import torch
    >>> from scipy.sparse.linalg import cg
    >>> from curvop import HessianLinearOperator
    >>> _ = torch.manual_seed(0)
    >>> X, y = torch.randn(50, 3, dtype=torch.float64), torch.randn(50, 1, dtype=torch.float64)
    >>> model = torch.nn.Linear(3, 1, bias=False, dtype=torch.float64)
    >>> H = HessianLinearOperator(model, torch.nn.MSELoss(), dict(model.named_parameters()), [(X, y)])
    >>> gradient, loss = H.gradient_and_loss()
    >>> step, info = cg(H.damped(0.1), -gradient, rtol=1e-8)
    >>> info, np.allclose(H @ step + 0.1 * step, -gradient)
    (0, True)
    """

    def __init__(self, A: ParameterLinearOperator, damping: float) -> None:
        if not isinstance(A, ParameterLinearOperator):
            raise TypeError(f"A is a {type(A).__name__}: add damping to it as SciPy does, A + damping * identity")
        if not math.isfinite(real_scalar("damping", damping)):
            raise ValueError(f"damping is {damping}, but must be finite")
        super().__init__(A.dtype, A._params, A._rows, A._cols, A._counter)
        self._A = A
        self.args = (A, float(damping))  # SciPy's composite operators have this attribute

    @property
    def damping(self) -> float:
        """Number that is added to the diagonal."""
        return float(self.args[1])

    @property
    def device(self) -> torch.device:
        """Device on which A computes products."""
        return self._A.device

    def block(self, rows: str | Sequence[str], cols: str | Sequence[str] | None = None) -> Self:
        """Return the block of the damped matrix for the given parameters.

        Parameters
        ----------
        rows : str or sequence of str
            Names of the row parameters, in the order of the block.
        cols : str or sequence of str, optional
            Names of the column parameters. By default, the same as ``rows``.

        Returns
        -------
        DampedLinearOperator
            Block of A. The damping is added to the diagonal entries of each parameter that is both a row and a column
            parameter of the block.

        Raises
        ------
        ValueError
            If a name is unknown (the message suggests similar names), if a name is repeated, or if no name is given.
        """
        return type(self)(self._A.block(rows, cols), self.damping)

    def damped(self, damping: float) -> DampedLinearOperator:
        """Return the operator with additional damping, ``A + (self.damping + damping) * I``.

        Parameters
        ----------
        damping : float
            Finite number that is added to the current damping.

        Returns
        -------
        DampedLinearOperator
            Damped operator with the same A.
        """
        return type(self)(self._A, self.damping + damping)

    def diagonal(self) -> NDArray[Any]:
        """Return the exact diagonal, if A can compute its own diagonal.

        Returns
        -------
        diagonal : ndarray, shape (N,)
            Diagonal of A plus the damping.

        Raises
        ------
        NotImplementedError
            If A cannot compute its diagonal. Use `curvop.spectrum.diagonal` to estimate the diagonal.
        ValueError
            If the rows and columns are different parameters.
        """
        diagonal: NDArray[Any] = self._A.diagonal() + self.damping
        return diagonal

    def gradient_and_loss(self) -> tuple[NDArray[Any], float]:
        """Compute the gradient and the loss of the objective of A. The damping does not affect them.

        Returns
        -------
        gradient : ndarray, shape (M,)
            Gradient with respect to the row parameters.
        loss : float
            Loss of the whole data set.
        """
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
