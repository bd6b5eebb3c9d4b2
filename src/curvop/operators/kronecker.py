"""Block-diagonal matrices with Kronecker-factored blocks: products, inverses, powers and other closed forms."""

from __future__ import annotations

import json
import math
import os
import textwrap
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, ClassVar, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from curvop.kernels.kronecker_factors import BlockLayout, FlatLayout
from curvop.kernels.parameters import ParameterLayout
from curvop.operators.base import Rows, TensorLinearOperator
from curvop.operators.composites import restricted_layouts
from curvop.operators.kronecker_blocks import Block, EigenBlock, KroneckerBlock, block_of_tensors
from curvop.operators.kronecker_spectrum import LayerEigenvalues
from curvop.operators.parameter_operator import Layouts, ParameterVectors
from curvop.operators.transfer import TORCH_DTYPES, Staging, aligned
from curvop.operators.validation import integer, real_scalar

__all__ = ["KroneckerFactoredLinearOperator", "KroneckerFactors", "KroneckerFiles", "checked_decay"]

Names = Sequence[str]


class KroneckerFiles:
    """Functions that save and load matrices. The module `curvop.storage.kronecker_files` sets these attributes."""

    save: ClassVar[Callable[..., None]]
    load: ClassVar[Callable[..., Any]]


@dataclass(frozen=True)
class KroneckerFactors:
    """Factors of one diagonal block, as returned by ``A.factors[name]``.

    The block multiplies a matrix V of shape ``(m, n)`` with the shape of the weight: its rows belong to the outputs of
    a layer, and its columns belong to the inputs. If the block includes the bias, it is the last column. If
    ``eigenvalues`` is None, the product is ``output @ V @ input``. Otherwise, it is
    ``P @ (eigenvalues * (P.T @ V @ Q)) @ Q.T``, where P is ``output_basis`` and Q is ``input_basis``. The factors of a
    grouped convolution have an additional first dimension for the groups.

    Attributes
    ----------
    names : tuple of str
        Parameters of the block.
    input : Tensor or None
        Factor of the inputs, of shape ``(n, n)``. A diagonal matrix is represented by its diagonal, of shape ``(n,)``.
        It is None for inverses and powers that have eigenvalues instead of factors.
    output : Tensor or None
        Factor of the outputs, of shape ``(m, m)`` or ``(m,)``. If a parameter has no Kronecker factors, ``output`` is
        its whole block or its diagonal, and ``input`` is 1.
    input_basis, output_basis : Tensor or None
        Orthogonal matrices of shape ``(n, n)`` and ``(m, m)``. None is the identity.
    eigenvalues : Tensor or None
        Eigenvalues, of shape ``(m, n)``.
    """

    names: tuple[str, ...]
    input: Tensor | None = None
    output: Tensor | None = None
    input_basis: Tensor | None = None
    output_basis: Tensor | None = None
    eigenvalues: Tensor | None = None

    def __repr__(self) -> str:
        tensors = {field.name: getattr(self, field.name) for field in fields(self)[1:]}
        shapes = [f"{name}={tuple(value.shape)}" for name, value in tensors.items() if value is not None]
        return f"<factors of {', '.join(self.names)}: {', '.join(shapes)}>"


class _BlocksLinearOperator(ParameterVectors):
    """Rows and columns of a block-diagonal matrix that belong to named parameters.

    Parameters
    ----------
    blocks : sequence of Block
        Diagonal blocks. They have one dtype and one device.
    params : mapping of str to Tensor
        Parameters by name. They include all row and column parameters.
    layouts : tuple of ParameterLayout
        Layouts of the row and the column parameters.
    dtype : dtype
        Data type of products with NumPy arrays.
    """

    def __init__(
        self,
        blocks: Sequence[Block],
        params: Mapping[str, Tensor],
        layouts: tuple[ParameterLayout, ParameterLayout],
        dtype: Any,
    ) -> None:
        super().__init__(np.dtype(dtype), (layouts[0].size, layouts[1].size))
        self._blocks = tuple(blocks)
        self._params = dict(params)
        self._rows, self._cols = layouts
        self._staging = Staging()

    def _details(self) -> list[str]:
        return [*super()._details(), f"{len(self._blocks)} block{'s' * (len(self._blocks) > 1)}"]

    @property
    def device(self) -> torch.device:
        """Device of the factors, on which products are computed. Tensors on this device are not copied."""
        return self._blocks[0].device

    @property
    def epsilon(self) -> float:
        """Machine epsilon of the dtype of the factors, in which products are computed."""
        return float(torch.finfo(self._blocks[0].dtype).eps)

    @property
    def _row_and_column_layouts(self) -> Layouts:
        return self._rows, self._cols

    def diagonal(self) -> NDArray[Any]:
        """Return the exact diagonal, which is computed from the factors without products.

        Returns
        -------
        diagonal : ndarray, shape (N,)
            Diagonal in the dtype of the operator.

        Raises
        ------
        ValueError
            If the row and column parameters are different.
        """
        if self._rows.names != self._cols.names:
            raise ValueError(f"rows and columns of this block of shape {self.shape} are different parameters")
        pieces: dict[str, Tensor] = {}
        for block in self._blocks:
            for name, part in block.layout.scatter(block.diagonal()[None], self._rows.names).items():
                pieces[name] = pieces[name] + part if name in pieces else part
        like = torch.empty(1, self._rows.size, dtype=self._blocks[0].dtype, device=self.device)
        diagonal = self._rows.join([pieces.get(name) for name in self._rows.names], like)[0]
        return diagonal.numpy(force=True).astype(self.dtype, copy=False)

    def _restricted(self, rows: Names | None, cols: Names | None) -> TensorLinearOperator:
        row_layout, col_layout = cast("tuple[ParameterLayout, ParameterLayout]", restricted_layouts(self, rows, cols))
        blocks = [block for block in self._blocks if _shares(block, row_layout) and _shares(block, col_layout)]
        if row_layout.names == col_layout.names:
            closed = [block.restricted(row_layout.names) for block in blocks]
            if None not in closed:
                return KroneckerFactoredLinearOperator(
                    cast("list[Block]", closed),
                    {name: self._params[name] for name in row_layout.names},
                    dtype=self.dtype,
                )
        # If no block is left, the matrix is zero. Keep one block for the dtype and the device.
        return _BlocksLinearOperator(blocks or self._blocks[:1], self._params, (row_layout, col_layout), self.dtype)

    def _adjoint(self) -> TensorLinearOperator:
        if self._rows.names == self._cols.names:
            return self
        adjoint = _BlocksLinearOperator(self._blocks, self._params, (self._cols, self._rows), self.dtype)
        adjoint._counter = self._counter
        return adjoint

    def _identity(self) -> tuple[Any, ...]:
        return "blocks", *map(id, self._blocks), self._rows.names, self._cols.names

    def _apply(self, rows: Rows) -> Rows:
        device, dtype = self.device, self._blocks[0].dtype
        if isinstance(rows, Tensor):
            vectors = rows.to(device, dtype)
            if len(rows) == 1:
                vectors = aligned(vectors.contiguous())
            return self._products(vectors, rows.dtype).to(rows.device)
        # Do not transpose a matrix of columns, because `gather` copies its entries to their places.
        columns = rows.T.flags.c_contiguous and len(rows) > 1
        vectors = self._staging.to_device(rows.T if columns else rows, device, dtype)
        products = self._products(vectors.T if columns else vectors, TORCH_DTYPES[self._product_dtype(rows.dtype)])
        return products.numpy() if device.type == "cpu" else self._staging.to_array(products)

    def _products(self, vectors: Tensor, dtype: torch.dtype) -> Tensor:
        """Return the products with the rows of a tensor of shape (K, N), as a new tensor of shape (K, M)."""
        parts = dict(zip(self._cols.names, self._cols.split(vectors), strict=True))
        products = torch.empty(len(vectors), self._rows.size, dtype=dtype, device=vectors.device)
        views = dict(zip(self._rows.names, self._rows.split(products), strict=True))
        written: set[str] = set()
        for block in self._blocks:
            layout = block.layout
            wanted = [name for name in layout.names if name in views]
            if wanted and not parts.keys().isdisjoint(layout.names):
                for name, part in layout.scatter(block.multiply(layout.gather(parts)), wanted).items():
                    if name in written:  # blocks of some rows of one parameter add up to the whole parameter
                        views[name] += part
                    else:
                        views[name].copy_(part)
                        written.add(name)
        for name in views.keys() - written:
            views[name].zero_()
        return products


class KroneckerFactoredLinearOperator(_BlocksLinearOperator):
    r"""Symmetric block-diagonal matrix of a model, with a Kronecker product for each layer.

    `KFACLinearOperator`, `EKFACLinearOperator` and `KFOCLinearOperator` compute such matrices from a model and data.
    Their inverses, powers and diagonal blocks are instances of this class, and have all its methods. To construct a
    matrix from factors of your own, see Parameters.

    Parameters
    ----------
    blocks : sequence of KroneckerBlock or EigenBlock
        Diagonal blocks, in any order. Together they cover each entry of each parameter once.
    params : dict of str to Tensor
        Parameters in the order of the rows and columns.
    dtype : dtype, default numpy.float64
        Data type of the products with NumPy arrays. Products are computed in the dtype of the factors.

    Raises
    ------
    ValueError
        If the blocks do not cover the parameters, or differ in dtype or device.

    See Also
    --------
    curvop.GGNLinearOperator : The exact matrix.
    curvop.BlockDiagonalLinearOperator : Block-diagonal matrix of any operators.

    Notes
    -----
    The block of a layer with m outputs and n inputs multiplies a matrix V of shape (m, n) by two symmetric factors,
    :math:`V \mapsto B V A`. A product costs :math:`2 m n (m + n)` floating-point operations for each layer. Inverses,
    powers, determinants and eigenvalues come from the eigendecompositions of the factors, which are computed once, in
    float64. The damped inverse and powers of a block with float32 factors come from decompositions in float32 if the
    product of the inverse with a test vector has a relative residual of 1e-4 or less. A block or an inverse is a new
    matrix. It does not change if the factors are updated later.

    Examples
    --------
    >>> import torch
    >>> from curvop.kernels.kronecker_factors import BlockLayout
    >>> from curvop.operators.kronecker import KroneckerFactoredLinearOperator
    >>> from curvop.operators.kronecker_blocks import KroneckerBlock
    >>> layer = torch.nn.Linear(3, 2).double()
    >>> params = dict(layer.named_parameters())
    >>> shapes = tuple(parameter.shape for parameter in params.values())
    >>> layout = BlockLayout(("weight", "bias"), shapes, groups=1, outputs=2, inputs=3, bias=True)
    >>> B = torch.tensor([[2.0, 1.0], [1.0, 2.0]]).double()
    >>> block = KroneckerBlock(layout, left=B[None], right=torch.eye(4).double()[None])
    >>> A = KroneckerFactoredLinearOperator([block], params)
    >>> A.shape, A.trace()
    ((8, 8), 16.0)
    >>> A.inverse(damping=1.0).diagonal().round(3)
    array([0.375, 0.375, 0.375, 0.375, 0.375, 0.375, 0.375, 0.375])
    """

    def __init__(self, blocks: Sequence[Block], params: Mapping[str, Tensor], *, dtype: Any = np.float64) -> None:
        layout = ParameterLayout(params, list(params))
        _check_blocks(blocks, layout)

        def place(block: Block) -> tuple[int, int]:
            return min(layout.names.index(name) for name in block.layout.names), (block.layout.rows or (0,))[0]

        blocks = sorted(blocks, key=place)  # in the order of the parameters
        super().__init__(blocks, params, (layout, layout), dtype)

    @property
    def factors(self) -> Mapping[str, KroneckerFactors]:
        """Factors of the diagonal blocks, by the names of the parameters.

        The names are in the order of the parameters. All parameters of a block have the same factors. The tensors are
        not copies: copy them before you change them. If several blocks cover different rows of one parameter, as in
        ``torch.nn.MultiheadAttention``, the rows are part of the name: ``"in_proj_weight[0:8]"``.
        """
        return _FactorsView(self._blocks)

    def inverse(self, damping: float = 0.0, kind: str = "exact", *, min_damping: float = 1e-8) -> Any:
        r"""Return the inverse of the damped matrix as an operator.

        Parameters
        ----------
        damping : float, default 0
            Number :math:`\lambda \geq 0`, in the units of the eigenvalues of the matrix.
        kind : {'exact', 'factored', 'heuristic'}, default 'exact'
            How the blocks :math:`B \otimes A` are damped.

            'exact'
                :math:`(B \otimes A + \lambda I)^{-1}`, by an eigendecomposition of both factors.
            'factored'
                :math:`(B + \pi^{-1} \sqrt\lambda I)^{-1} \otimes (A + \pi \sqrt\lambda I)^{-1}`, by Cholesky
                decompositions of the damped factors (Martens and Grosse, 2015, section 6.3). :math:`\pi^2` is the mean
                eigenvalue of A, divided by that of B. It takes a third to a tenth of the time of 'exact', and products
                with it take half. It adds more damping than 'exact'. The blocks of biases alone, and of parameters
                without Kronecker factors, are damped exactly.
            'heuristic'
                The same, but at least ``min_damping`` is added to each factor. This is the rule of ``curvlinops`` with
                ``use_heuristic_damping=True``.
        min_damping : float, default 1e-8
            Smallest number that ``kind="heuristic"`` adds to a factor.

        Returns
        -------
        KroneckerFactoredLinearOperator
            The inverse, which has all methods of this class.

        Raises
        ------
        ValueError
            If the matrix is singular and not damped, if ``damping`` is negative or not finite, or if ``kind`` is
            unknown. Also if the matrix is eigenvalue-corrected, or an inverse or a power, and ``kind`` is not 'exact',
            because its blocks are not Kronecker products.

        See Also
        --------
        curvop.solve : Solve systems with the exact matrix, with a true residual.

        References
        ----------
        J. Martens and R. Grosse, "Optimizing Neural Networks with Kronecker-factored Approximate Curvature", 2015,
        arXiv:1503.05671.
        """
        damping = _checked_damping(damping)
        if kind not in ("exact", "factored", "heuristic"):
            raise ValueError(f"kind is {kind!r}, but must be 'exact', 'factored' or 'heuristic'")
        least = _checked_damping(min_damping, "min_damping") if kind == "heuristic" else 0.0
        if kind == "exact" or not (damping or least):
            return self.power(-1, damping)
        if any(isinstance(block, EigenBlock) for block in self._blocks):
            raise ValueError(
                f"kind is {kind!r}, but the blocks of this matrix are not Kronecker products: pass kind='exact'"
            )
        return self._mapped(lambda block: cast("KroneckerBlock", block).factored_inverse(damping, least))

    def power(self, exponent: float, damping: float = 0.0) -> Any:
        r"""Return the power :math:`(A + \lambda I)^p` as an operator.

        Parameters
        ----------
        exponent : float
            Real number :math:`p`.
        damping : float, default 0
            Number :math:`\lambda \geq 0`.

        Returns
        -------
        KroneckerFactoredLinearOperator
            The power. Without damping, the powers of Kronecker products are Kronecker products.

        Raises
        ------
        ValueError
            If ``exponent`` is negative and the matrix is singular and not damped, or if an argument is not finite or
            ``damping`` is negative.
        """
        exponent, damping = real_scalar("exponent", exponent), _checked_damping(damping)
        if not math.isfinite(exponent):
            raise ValueError(f"exponent is {exponent}, but must be finite")
        return self._mapped(lambda block: block.power(exponent, damping))

    def sqrt(self, damping: float = 0.0) -> Any:
        r"""Return the symmetric square root :math:`(A + \lambda I)^{1/2}` as an operator; see `power`."""
        return self.power(0.5, damping)

    def inverse_sqrt(self, damping: float = 0.0) -> Any:
        r"""Return :math:`(A + \lambda I)^{-1/2}` as an operator; see `power`.

        Its product with standard normal vectors has the covariance :math:`(A + \lambda I)^{-1}`, which is the posterior
        of a Laplace approximation.
        """
        return self.power(-0.5, damping)

    def trace(self) -> float:
        """Return the trace, computed from the factors in float64."""
        return math.fsum(block.trace() for block in self._blocks)

    def logdet(self, damping: float = 0.0) -> float:
        r"""Return :math:`\log\det(A + \lambda I)`, computed from the eigenvalues in float64.

        Parameters
        ----------
        damping : float, default 0
            Number :math:`\lambda \geq 0`.

        Returns
        -------
        float
            The logarithm of the determinant. It is ``-inf`` if the matrix is singular and not damped.
        """
        damping = _checked_damping(damping)
        return math.fsum(block.logdet(damping) for block in self._blocks)

    def frobenius_norm(self) -> float:
        """Return the Frobenius norm, computed from the factors in float64."""
        return math.sqrt(math.fsum(block.squared_norm() for block in self._blocks))

    def eigenvalues(self) -> LayerEigenvalues:
        """Return all eigenvalues with the layers to which they belong.

        Returns
        -------
        LayerEigenvalues
            The N eigenvalues in ascending order. Its method ``plot`` draws them.

        Notes
        -----
        The eigenvalues of a Kronecker product are the products of the eigenvalues of its factors. Their number is that
        of the parameters, and they take 8 bytes each.
        """
        values: dict[str, list[NDArray[Any]]] = {}
        for block in self._blocks:
            values.setdefault(block.label, []).append(block.eigen.values.reshape(-1).numpy(force=True))
        return LayerEigenvalues.of_layers({label: np.concatenate(parts) for label, parts in values.items()})

    def largest_eigenpairs(self, k: int) -> tuple[NDArray[Any], NDArray[Any]]:
        """Return the k largest eigenvalues and their eigenvectors.

        Parameters
        ----------
        k : int
            Number of eigenvalues, from 1 to N.

        Returns
        -------
        values : ndarray, shape (k,)
            Eigenvalues in float64, in ascending order.
        vectors : ndarray, shape (N, k)
            Orthonormal eigenvectors in float64, one column for each eigenvalue.

        See Also
        --------
        eigenvalues : All eigenvalues.

        Notes
        -----
        The eigenvectors of a Kronecker product are the Kronecker products of the eigenvectors of its factors. Each
        eigenvector belongs to one block, and its other entries are zero.
        """
        integer("k", k, 1)
        if k > self.shape[0]:
            raise ValueError(f"k is {k}, but the matrix has only {self.shape[0]} eigenvalues")
        blocks = [block.eigen for block in self._blocks]
        joined = torch.cat([block.values.flatten() for block in blocks])
        order = joined.argsort(stable=True)[-k:]
        vectors = torch.zeros(k, self.shape[0], dtype=torch.float64, device=self.device)
        views = dict(zip(self._rows.names, self._rows.split(vectors), strict=True))
        start = 0
        for block in blocks:
            found = ((order >= start) & (order < start + block.values.numel())).nonzero()[:, 0]
            if len(found):
                for name, part in block.layout.scatter(block.eigenvectors(order[found] - start)).items():
                    views[name][found] = part
            start += block.values.numel()
        return joined[order].numpy(force=True), vectors.T.numpy(force=True)

    def moving_average(self, other: KroneckerFactoredLinearOperator, decay: float) -> None:
        """Replace the factors by the weighted average ``decay * self + (1 - decay) * other``.

        Inverses, powers and blocks that were computed before do not change. If the matrices are eigenvalue-corrected,
        the new bases are the eigenvectors of the averaged factors. The new eigenvalues are the averages of the
        diagonals of both matrices in these bases.

        Parameters
        ----------
        other : KroneckerFactoredLinearOperator
            Matrix of the same class and the same parameters, for example of another batch, or loaded from a file.
        decay : float
            Weight of the present factors, between 0 and 1. With 0, the factors of `other` replace them.

        Raises
        ------
        ValueError
            If ``decay`` is not between 0 and 1, if the blocks are different, or if only one matrix is
            eigenvalue-corrected.

        References
        ----------
        J. Martens and R. Grosse, "Optimizing Neural Networks with Kronecker-factored Approximate Curvature", 2015,
        arXiv:1503.05671, section 5.
        """
        decay = checked_decay(decay)
        if [block.layout for block in self._blocks] != [block.layout for block in other._blocks]:
            raise ValueError("the matrices have different blocks: pass a matrix of the same parameters")
        pairs = zip(self._blocks, other._blocks, strict=True)
        self._blocks = tuple(mine.averaged(theirs, decay) for mine, theirs in pairs)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the matrix to an ``.npz`` file of plain arrays.

        Only the factors are saved, without the model and the data. An interrupted save leaves no partial file.

        Parameters
        ----------
        path : str or path-like
            Name of the file, including its suffix. An existing file is replaced.

        Raises
        ------
        FileNotFoundError
            If the folder does not exist. Saving creates no folders.

        See Also
        --------
        load : Read a matrix from a file.
        """
        KroneckerFiles.save(self, path)

    @staticmethod
    def load(path: str | os.PathLike[str], device: Any = "cpu") -> KroneckerFactoredLinearOperator:
        """Read a matrix that `save` wrote.

        The file contains no model and no data. The result is therefore a `KroneckerFactoredLinearOperator`, even if a
        subclass calls this method: it has no methods ``update`` and ``exact``. To continue a moving average, construct
        a `curvop.KFACLinearOperator` of the model and any batch, and replace its factors:
        ``K.moving_average(loaded, 0.0)``. Loading a file never executes code from it.

        Parameters
        ----------
        path : str or path-like
            Name of the file.
        device : torch.device or str, default "cpu"
            Device of the factors.

        Returns
        -------
        KroneckerFactoredLinearOperator
            The matrix, with all methods of this class.

        Raises
        ------
        ValueError
            If the file was not written by `save`.

        See Also
        --------
        moving_average : Replace the factors of a matrix by loaded ones.
        """
        return cast("KroneckerFactoredLinearOperator", KroneckerFiles.load(path, device))

    @property
    def arrays(self) -> dict[str, NDArray[Any]]:
        """The matrix as a dict of arrays, from which `of_arrays` constructs it again."""
        layouts = [
            {
                "class": type(block.layout).__name__,
                "dtype": str(block.dtype).removeprefix("torch."),
                **asdict(block.layout),
            }
            for block in self._blocks
        ]
        shapes = {name: tuple(parameter.shape) for name, parameter in self._params.items()}
        arrays = {"kronecker_layouts": np.array(json.dumps([layouts, list(shapes.items()), self.dtype.name]))}
        for index, block in enumerate(self._blocks):
            arrays |= {f"{index}.{key}": tensor.numpy(force=True) for key, tensor in block.tensors.items()}
        return arrays

    @staticmethod
    def of_arrays(arrays: Mapping[str, NDArray[Any]], device: Any = "cpu") -> KroneckerFactoredLinearOperator:
        """Construct a matrix from the arrays in `arrays`.

        Parameters
        ----------
        arrays : mapping of str to ndarray
            Arrays of another matrix.
        device : torch.device or str, default "cpu"
            Device of the factors.

        Returns
        -------
        KroneckerFactoredLinearOperator
            The matrix.
        """
        layouts, shapes, dtype = json.loads(str(arrays["kronecker_layouts"]))
        blocks: list[Block] = []
        for index, settings in enumerate(layouts):
            kind, block_dtype = settings.pop("class"), TORCH_DTYPES[np.dtype(settings.pop("dtype"))]
            settings["names"] = tuple(settings["names"])
            settings["shapes"] = tuple(map(torch.Size, settings["shapes"]))
            if settings.get("rows") is not None:
                settings["rows"] = tuple(settings["rows"])
            layout = {"BlockLayout": BlockLayout, "FlatLayout": FlatLayout}[kind](**settings)
            prefix = f"{index}."
            tensors = {
                key.removeprefix(prefix): torch.from_numpy(array).to(device)
                for key, array in arrays.items()
                if key.startswith(prefix)
            }
            blocks.append(block_of_tensors(layout, tensors, block_dtype))
        like = torch.zeros((), dtype=blocks[0].dtype, device=device)
        params = {name: like.expand(shape) for name, shape in shapes}
        return KroneckerFactoredLinearOperator(blocks, params, dtype=dtype)

    def _mapped(self, function: Callable[[Block], Block]) -> KroneckerFactoredLinearOperator:
        return KroneckerFactoredLinearOperator(
            [function(block) for block in self._blocks], self._params, dtype=self.dtype
        )


class _FactorsView(Mapping[str, KroneckerFactors]):
    """Read-only mapping of the names of parameters to the factors of their blocks."""

    def __init__(self, blocks: Sequence[Block]) -> None:
        self._blocks = {
            name + (f"[{rows[0]}:{rows[1]}]" if (rows := block.layout.rows) else ""): block
            for block in blocks
            for name in block.layout.names
        }

    def __getitem__(self, name: str) -> KroneckerFactors:
        """Return the factors of the block of a parameter."""
        if name not in self._blocks:
            raise KeyError(f"no block has the parameter {name!r}; known are {', '.join(self._blocks)}")
        block = self._blocks[name]
        arrays: dict[str, Tensor | None] = {}
        if isinstance(block, EigenBlock):
            arrays = {"output_basis": block.left, "input_basis": block.right, "eigenvalues": block.values}
            block = block.factors  # type: ignore[assignment]
        if isinstance(block, KroneckerBlock):
            arrays |= {"output": block.left, "input": block.right}
        single = {key: value if value is None or len(value) > 1 else value[0] for key, value in arrays.items()}
        return KroneckerFactors(self._blocks[name].layout.names, **single)

    def __iter__(self) -> Iterator[str]:
        return iter(self._blocks)

    def __len__(self) -> int:
        return len(self._blocks)

    def __repr__(self) -> str:
        return textwrap.shorten(f"<factors of {', '.join(self._blocks)}", 200, placeholder=" ...") + ">"


def checked_decay(decay: Any) -> float:
    """Convert the weight of a moving average to a float. Raise an error if it is not a number between 0 and 1."""
    value = real_scalar("decay", decay)
    if not 0 <= value <= 1:
        raise ValueError(f"decay is {value:g}, but must be between 0 and 1")
    return value


def _shares(block: Block, layout: ParameterLayout) -> bool:
    return any(name in layout.slices for name in block.layout.names)


def _check_blocks(blocks: Sequence[Block], layout: ParameterLayout) -> None:
    if len({(block.dtype, block.device) for block in blocks}) > 1:
        raise ValueError("the blocks have different dtypes or devices: convert them to one")
    covered: Counter[str] = Counter()
    for block in blocks:
        for name, shape, size in zip(block.layout.names, block.layout.shapes, block.layout.sizes, strict=True):
            if name not in layout.slices or layout.shapes[layout.names.index(name)] != shape:
                raise ValueError(f"a block has the parameter {name!r} of shape {tuple(shape)}, which is not in params")
            covered[name] += size
    for name, shape in zip(layout.names, layout.shapes, strict=True):
        if covered[name] != shape.numel():
            raise ValueError(f"the blocks cover {covered[name]} of the {shape.numel()} entries of {name!r}")


def _checked_damping(damping: Any, what: str = "damping") -> float:
    value = real_scalar(what, damping)
    if not (math.isfinite(value) and value >= 0):
        raise ValueError(f"{what} is {value}, but must be finite and >= 0")
    return value
