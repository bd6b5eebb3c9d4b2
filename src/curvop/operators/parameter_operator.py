"""Operators whose rows or columns are parameters."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Self, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from curvop.kernels.errors import NotFactorableError
from curvop.kernels.parameters import ParameterLayout, unknown_name
from curvop.operators.base import Composites, ProductCounter, Rows, TensorLinearOperator
from curvop.operators.selection import parameter_groups, selected_names

if TYPE_CHECKING:
    from curvop.operators.gram import GramLinearOperator

__all__ = [
    "Layouts",
    "ParameterLinearOperator",
    "ParameterVectors",
    "as_tensor",
    "touched_parameters",
]

_LONGEST_LIST = 60  # characters of the names of parameters in ``repr``

#: Layouts of the rows and of the columns. None stands for an axis that does not consist of parameters.
Layouts = tuple[ParameterLayout | None, ParameterLayout | None]


class ParameterVectors(TensorLinearOperator):
    """Base class of operators whose rows, columns, or both are parameters.

    Subclasses define the property ``_row_and_column_layouts`` and the method ``_restricted``.
    """

    _params: Mapping[str, Tensor]

    @property
    def _layout(self) -> ParameterLayout:
        rows, cols = self._row_and_column_layouts
        layout = cols or rows
        if layout is None:
            raise TypeError("neither the rows nor the columns of A are parameters: use A.submatrix(rows, cols)")
        return layout

    @property
    def _row_and_column_layouts(self) -> Layouts:
        """Tuple (rows, cols): the layout of the row parameters, and the layout of the column parameters.

        ``rows`` is None if the rows of the matrix are not parameters, and ``cols`` is None if the columns are not.
        """
        raise NotImplementedError

    def _details(self) -> list[str]:
        rows, cols = self._row_and_column_layouts
        layout = cols or rows
        if layout is None:
            return super()._details()
        if rows is None or cols is None or rows.names == cols.names:
            text = _names_text(layout.names)
        else:
            text = f"rows of {_names_text(rows.names)} and columns of {_names_text(cols.names)}"
        if layout.names[0] in self._params:
            text += f" in {str(self._params[layout.names[0]].dtype).removeprefix('torch.')}"
        return [f"{text} on {self.device}", *super()._details()]

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
            If ``params`` is not a dict, or if its values are not real numbers.

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
            value = as_tensor(f"params[{name!r}]", params[name])
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
        vector = as_tensor("vector", vector).to(like.device, like.dtype, copy=True)
        return self._split_by_parameter(self._layout, vector)

    def block(self, rows: str | Iterable[str], cols: str | Iterable[str] | None = None) -> TensorLinearOperator:
        """Return the block of the matrix for the given parameters.

        Parameters
        ----------
        rows : str or iterable of str
            Names of the row parameters, in the order of the block. The name of a module, such as ``"fc1"``, stands for
            all its parameters. A glob pattern, such as ``"fc1.*"`` or ``"*.bias"``, stands for all parameters that it
            matches. The dict that `curvop.select` returns is also accepted. A tied parameter has one name in A
            (``A.params_slices``), and only the dict also finds it by the name of another module that uses it. If only
            the rows or only the columns of the matrix are parameters, these are the parameters to keep.
        cols : str or iterable of str, optional
            Names of the column parameters. The default is ``rows``.

        Returns
        -------
        LinearOperator
            Operator of this package, with its own caches. A block of a sum or product is composed of blocks of the
            operands.

        Raises
        ------
        KeyError
            If a name is unknown (the message suggests similar names). The error is also a ``ValueError``.
        ValueError
            If a parameter is selected twice, or if no name is given.
        TypeError
            If neither the rows nor the columns of the matrix are parameters. In this case, use ``A.submatrix``. The
            error is also raised if only one axis has parameters and ``cols`` is passed.
        """
        row_layout, col_layout = self._row_and_column_layouts
        if row_layout is not None and col_layout is not None:
            return self._restricted(*self._block_names(rows, cols, row_layout, col_layout))
        names = selected_names("rows", rows, self._layout.slices, self._params)
        if cols is not None:
            raise TypeError("A has parameters along one axis only: pass their names only, without cols")
        return self._restricted(names, None) if col_layout is None else self._restricted(None, names)

    def _block_names(
        self,
        rows: str | Iterable[str],
        cols: str | Iterable[str] | None,
        row_layout: ParameterLayout,
        col_layout: ParameterLayout,
    ) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """Return the names of the row and the column parameters that the arguments of `block` select."""
        row_names = selected_names("rows", rows, row_layout.slices, self._params)
        return row_names, selected_names("cols", row_names if cols is None else cols, col_layout.slices, self._params)

    def blocks(self, groups: str | Mapping[str, str | Sequence[str]] | None = None) -> Iterator[TensorLinearOperator]:
        """Iterate over the blocks of the parameters, layers or groups, which are diagonal blocks if A is square.

        ``A.parameter_groups(groups)`` returns the names of the blocks in the same order.

        Parameters
        ----------
        groups : mapping of str to str or sequence of str, or "layers", optional
            Maps the name of each block to the names of its parameters or modules, or to glob patterns. By default, each
            parameter forms a block. With "layers", the parameters that belong directly to a module, such as the weight
            and the bias of a linear layer, form a block. A parameter that belongs directly to the model forms a
            separate block. A tied parameter belongs to the module whose name it has in A.

        Yields
        ------
        LinearOperator
            ``A.block(names)`` for each group, in the order of the groups. By default, and with "layers", this is the
            order of the columns.

        Raises
        ------
        ValueError
            If the rows and columns are different parameters, or if a name is unknown or repeated.
        TypeError
            If ``groups`` is neither a mapping nor "layers".

        See Also
        --------
        block_diagonal : All these blocks as one operator.
        curvop.spectrum.blocks : Spectra of all diagonal blocks.

        Examples
        --------
        >>> import torch
        >>> from curvop import HessianLinearOperator
        >>> model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 1))
        >>> data = [(torch.randn(20, 3), torch.randn(20, 1))]
        >>> H = HessianLinearOperator(model, torch.nn.MSELoss(), dict(model.named_parameters()), data)
        >>> for name, block in zip(H.parameter_groups("layers"), H.blocks("layers")):
        ...     print(name, block.shape)
        0 (16, 16)
        2 (5, 5)
        """
        rows, cols = self._row_and_column_layouts
        if rows is not None and cols is not None and set(rows.names) != set(cols.names):
            raise ValueError("A has different row and column parameters, and so no diagonal blocks: use A.block")
        return map(self.block, self.parameter_groups(groups).values())

    def block_diagonal(
        self, groups: str | Mapping[str, str | Sequence[str]] | None = None, *, complete: bool = False
    ) -> TensorLinearOperator:
        """Return an operator of the same shape in which all blocks off the diagonal are replaced by zeros.

        Use it to compute the eigenvalues of all layers at once. `curvop.spectrum.blocks` studies each block separately.

        Parameters
        ----------
        groups : mapping of str to str or sequence of str, or "layers", optional
            Maps the name of each diagonal block to the names of its parameters or modules, or to glob patterns; see
            `blocks`. By default, each parameter forms a block. With "layers", the parameters of a layer, such as its
            weight and its bias, form a block. The rows and columns of parameters that are in no group are zero.
        complete : bool, default False
            Whether to raise an error if a parameter is in no group.

        Returns
        -------
        BlockDiagonalLinearOperator
            The block-diagonal operator, which is symmetric if A is symmetric. A product with it costs one product with
            each block, and is counted as one product.

        Raises
        ------
        ValueError
            If the rows and columns of A are different parameters, or if a name is unknown or repeated. If ``complete``
            is True, also if a parameter is in no group.
        TypeError
            If ``groups`` is neither a mapping nor "layers".

        See Also
        --------
        curvop.BlockDiagonalLinearOperator : Block-diagonal matrix of any operators.
        curvop.spectrum.blocks : Spectra of all diagonal blocks.

        Examples
        --------
        >>> import torch
        >>> from scipy.sparse.linalg import eigsh
        >>> from curvop import HessianLinearOperator
        >>> _ = torch.manual_seed(0)
        >>> model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 1)).double()
        >>> data = [(torch.randn(20, 3).double(), torch.randn(20, 1).double())]
        >>> H = HessianLinearOperator(model, torch.nn.MSELoss(), dict(model.named_parameters()), data)
        >>> B = H.block_diagonal("layers")
        >>> B.shape, B.is_symmetric
        ((21, 21), True)
        >>> top = eigsh(B, k=1, which="LA", return_eigenvectors=False)
        >>> layers = [["0.weight", "0.bias"], ["2.weight", "2.bias"]]
        >>> largest = max(eigsh(H.block(layer), k=1, which="LA", return_eigenvectors=False)[0] for layer in layers)
        >>> bool(abs(top[0] - largest) < 1e-10)
        True
        """
        if not self.has_diagonal_blocks:
            raise ValueError(
                "the rows and columns of A are not the same parameters, so A has no diagonal blocks: use A.block or "
                "A.submatrix"
            )
        members = self.parameter_groups(groups, complete)
        slices, idxs = self._layout.slices, np.arange(self._layout.size)
        blocks = [self._restricted(names, names) for names in members.values()]
        places = [np.concatenate([idxs[slices[name]] for name in names]) for names in members.values()]
        return cast("TensorLinearOperator", Composites.block_diagonal(blocks, places, self))

    def gram(self) -> GramLinearOperator:
        """Return the Gram matrix of A, if A is of the form ``S.T @ S``.

        Returns
        -------
        GramLinearOperator
            The operator ``S @ S.T``, which has the same nonzero eigenvalues as A.

        Raises
        ------
        NotFactorableError
            If A is not of this form (for example, a Hessian).
        """
        raise NotFactorableError(
            f"a {type(self).__name__} is not of the form S.T @ S: use GGNLinearOperator, EFLinearOperator or "
            "FisherLinearOperator"
        )

    @property
    def has_diagonal_blocks(self) -> bool:
        """Whether the rows and the columns of the matrix are the same parameters in the same order."""
        rows, cols = self._row_and_column_layouts
        return rows is not None and cols is not None and rows.names == cols.names

    def parameter_groups(
        self, groups: str | Mapping[str, str | Sequence[str]] | None = None, complete: bool = False
    ) -> dict[str, list[str]]:
        """Return a dict that maps the name of each group to the names of its parameters; see `block_diagonal`.

        Parameters
        ----------
        groups : mapping of str to str or sequence of str, or "layers", optional
            Groups of parameters. By default, each parameter forms a group.
        complete : bool, default False
            Whether to raise an error if a parameter is in no group.

        Returns
        -------
        dict of str to list of str
            Names of the parameters of each group.

        Raises
        ------
        TypeError, ValueError
            If ``groups`` is invalid, or if a name is unknown or repeated.
        """
        return parameter_groups(self._layout.names, groups, complete, self._params)

    def _restricted(self, rows: Sequence[str] | None, cols: Sequence[str] | None) -> TensorLinearOperator:
        """Return the block of the named parameters. None selects all rows or all columns."""
        raise NotImplementedError

    def _smallest_block(
        self, rows: NDArray[np.intp], cols: NDArray[np.intp]
    ) -> tuple[TensorLinearOperator, NDArray[np.intp], NDArray[np.intp]]:
        """Return (block, rows, cols), where ``block`` is the smallest block that contains the given rows and columns.

        The returned ``rows`` and ``cols`` are the indices of the given rows and columns within ``block``. An axis that
        does not consist of parameters is kept whole.
        """
        names: list[Sequence[str] | None] = []
        idxs = []
        for layout, selected in zip(self._row_and_column_layouts, (rows, cols), strict=True):
            touched, positions = (None, selected) if layout is None else touched_parameters(layout, selected)
            names.append(None if layout is None or touched == layout.names else touched)
            idxs.append(positions)
        block = self if names == [None, None] else self._restricted(*names)
        return block, idxs[0], idxs[1]

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
        product = self.dot(self._join_tree(x, cols))
        return product if rows is None else self._split_like(x, rows, product)

    def _join_tree(self, x: Any, cols: ParameterLayout, argument: str = "x") -> Tensor:
        """Concatenate a container of one tensor per column parameter, on the device of the operator.

        ``argument`` is the name of the container in error messages.
        """
        return torch.cat([part.reshape(-1) for part in self._tree_parts(x, cols, argument)])

    def _split_like(self, x: Any, rows: ParameterLayout, vector: Tensor) -> Any:
        """Split a vector into a container of the same type as ``x``, with one tensor per row parameter."""
        parts = self._split_by_parameter(rows, vector)
        if isinstance(x, Mapping):
            return parts
        return tuple(parts.values()) if isinstance(x, tuple) else list(parts.values())

    def _tree_parts(self, x: Any, cols: ParameterLayout, argument: str) -> Iterator[Tensor]:
        """Validate the tensors in ``x``. Yield one tensor per column parameter, on the device of the operator."""
        if isinstance(x, Mapping):
            for name in x:
                if name not in cols.slices:
                    raise ValueError(unknown_name(argument, name, cols.names))
            if missing := [name for name in cols.names if name not in x]:
                raise ValueError(f"{argument} lacks {missing[0]!r}: pass all of {', '.join(map(repr, cols.names))}")
        elif len(x) != len(cols.names):
            raise ValueError(
                f"{argument} holds {len(x)} tensors, but A has {len(cols.names)} column parameters: pass one of each "
                f"shape, {_shapes_text(map(tuple, cols.shapes))}"
            )
        for index, (name, shape) in enumerate(zip(cols.names, cols.shapes, strict=True)):
            what, part = (
                (f"{argument}[{name!r}]", x[name]) if isinstance(x, Mapping) else (f"{argument}[{index}]", x[index])
            )
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
    def _row_and_column_layouts(self) -> tuple[ParameterLayout, ParameterLayout]:
        return self._rows, self._cols

    def block(self, rows: str | Iterable[str], cols: str | Iterable[str] | None = None) -> Self:
        """Return the block of the matrix for the given parameters, as an operator of the same class.

        Parameters
        ----------
        rows : str or iterable of str
            Names of the row parameters, in the order of the block. The name of a module, such as ``"fc1"``, stands for
            all its parameters. A glob pattern, such as ``"fc1.*"`` or ``"*.bias"``, stands for all parameters that it
            matches. The dict that `curvop.select` returns is also accepted. A tied parameter has one name in A
            (``A.params_slices``), and only the dict also finds it by the name of another module that uses it.
        cols : str or iterable of str, optional
            Names of the column parameters. The default is ``rows``.

        Returns
        -------
        ParameterLinearOperator
            Operator of shape ``(M, N)``, where M and N are the total sizes of the row and column parameters.

        Raises
        ------
        KeyError
            If a name is unknown (the message suggests similar names). The error is also a ``ValueError``.
        ValueError
            If a parameter is selected twice, or if no name is given.
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

    def _restricted(self, rows: Sequence[str] | None, cols: Sequence[str] | None) -> Self:
        return self.block(self._rows.names if rows is None else rows, self._cols.names if cols is None else cols)


def as_tensor(what: str, value: Any) -> Tensor:
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


def _names_text(names: Sequence[str]) -> str:
    """Return the number of parameters, and their names if they are short."""
    text, listed = f"{len(names)} parameter{'s' * (len(names) > 1)}", ", ".join(names)
    return f"{text} ({listed})" if len(listed) <= _LONGEST_LIST else text


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
