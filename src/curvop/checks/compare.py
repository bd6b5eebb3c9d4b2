"""Measure how well an approximation agrees with the exact matrix, block by block, from products alone."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.sparse.linalg import LinearOperator
from torch import Tensor

from curvop.operators.composites import layouts_of
from curvop.operators.diagonal_operator import BlockDiagonalLinearOperator
from curvop.operators.kronecker import KroneckerFactoredLinearOperator
from curvop.operators.parameter_operator import ParameterVectors
from curvop.operators.progress import step_bar
from curvop.operators.selection import parameter_groups
from curvop.operators.submatrix_operator import SubmatrixLinearOperator
from curvop.operators.summaries import TableSummary, with_error
from curvop.operators.validation import integer, random_generator, real_operator
from curvop.spectrum.estimators import Estimate
from curvop.spectrum.lanczos import device_of, multiply, product_precision

__all__ = ["Comparison", "PartError", "compare", "groups_of"]

Array = NDArray[Any]

_COLUMNS_AT_ONCE = 4  # columns per block product; small because each product has N rows


def compare(
    approximation: LinearOperator,
    exact: LinearOperator,
    *,
    groups: str | Mapping[str, str | Sequence[str]] | None = None,
    num_probes: int = 16,
    rng: int | np.random.Generator | None = 0,
    progress: bool = True,
) -> Comparison:
    r"""Estimate the error of an approximation of a matrix, block by block.

    Use `compare` to see how far a Kronecker-factored, diagonal or block-diagonal approximation is from the exact
    matrix, and in which blocks. Neither matrix is formed. The result contains the relative Frobenius error of each
    diagonal block, of the off-diagonal blocks, and of the whole matrix, each with its standard error.

    Parameters
    ----------
    approximation : LinearOperator, shape (N, N)
        The approximation, for example a `curvop.KFACLinearOperator` or another block-diagonal operator.
    exact : LinearOperator, shape (N, N)
        The exact matrix, for example a `curvop.GGNLinearOperator`. All errors are relative to its norms, so that the
        order of the two arguments matters. At least one of the two operators must be an operator of this package whose
        rows and columns are parameters.
    groups : mapping of str to str or sequence of str, or "layers", optional
        Maps the name of each block to the names of its parameters. With "layers", the parameters of a layer, such as
        its weight and its bias, form a block. By default, the blocks are those of the approximation if it is
        block-diagonal (a Kronecker-factored matrix, or a `curvop.BlockDiagonalLinearOperator`). Otherwise, each
        parameter forms a block. Parameters that belong to no group are left out.
    num_probes : int, default 16
        Number of products with the columns of each block, at least 2. A block with at most ``num_probes`` columns takes
        one product per column, and its norms are exact.
    rng : int or numpy.random.Generator, default 0
        Seed or generator for the test vectors. If it is None, every run uses different vectors.
    progress : bool, default True
        Whether to show a progress bar that counts products with the exact matrix.

    Returns
    -------
    Comparison
        Norms and errors of all diagonal blocks and of the off-diagonal part. Print it to see a table.

    Raises
    ------
    TypeError, ValueError
        If an argument is invalid, if the operators have different shapes or parameters, or if a product is not finite.

    See Also
    --------
    curvop.spectrum.blocks : Spectra of the diagonal blocks, and norms of all blocks.
    curvop.BlockDiagonalLinearOperator : Block-diagonal matrix of operators.

    Notes
    -----
    Let :math:`A_{ij}` and :math:`G_{ij}` be the blocks of the approximation and of the exact matrix with the rows of
    group i and the columns of group j. For a vector x of random signs, :math:`E \|G_{ij} x\|^2 = \|G_{ij}\|_F^2`
    (Hutchinson, 1990). The same vectors estimate the norms of :math:`G_{ij}`, of :math:`A_{ij}` and of the difference
    :math:`A_{ij} - G_{ij}`. The relative error :math:`\|A - G\|_F / \|G\|_F` is the ratio of two estimates from the
    same vectors, so it is more accurate than each of them. Its standard error follows from the spread between the
    vectors by linearization.

    The cost is ``num_probes`` products of each matrix with the columns of each group. To reduce it, pass fewer groups.

    A Kronecker-factored matrix keeps the parameters for which its factors were computed, but the exact matrix is
    evaluated at the current parameters of the model. After a step of training, compute the factors again before you
    compare.

    References
    ----------
    Hutchinson (1990), "A stochastic estimator of the trace of the influence matrix for Laplacian smoothing splines",
    Commun. Stat. Simul. Comput. 19(2).

    Examples
    --------
    Compare the diagonal blocks of a Gauss-Newton matrix with the whole matrix:

    >>> import torch
    >>> from curvop import GGNLinearOperator, compare
    >>> _ = torch.manual_seed(0)
    >>> model = torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.Tanh(), torch.nn.Linear(8, 3)).double()
    >>> data = [(torch.randn(30, 6).double(), torch.randint(3, (30,)))]
    >>> G = GGNLinearOperator(model, torch.nn.CrossEntropyLoss(), dict(model.named_parameters()), data)
    >>> comparison = compare(G.block_diagonal("layers"), G, progress=False)
    >>> [part.name for part in comparison.blocks]
    ['0', '2']
    >>> bool(comparison["0"].error.value < 1e-12)
    True
    >>> value, error = comparison.whole.error
    >>> bool(0 < value < 1)
    True
    """
    approximation, exact = real_operator(approximation), real_operator(exact)
    integer("num_probes", num_probes, 2)
    if approximation.shape != exact.shape or exact.shape[0] != exact.shape[1]:
        raise ValueError(
            f"approximation has shape {approximation.shape} and exact has shape {exact.shape}: pass two square "
            "matrices of the same shape"
        )
    owner = _owner_of_names(approximation, exact)
    if groups is None:
        groups = groups_of(approximation)
    members = owner.parameter_groups(groups)
    generator, samples = random_generator(rng), {}
    sizes = {name: sum(_size(owner, parameter) for parameter in names) for name, names in members.items()}
    rounding = max(product_precision(approximation), product_precision(exact))
    num_products = sum(min(size, num_probes) for size in sizes.values())
    with step_bar("compare", progress, num_products) as bar:
        for name, parameters in members.items():
            bar.set_postfix_str(name, refresh=False)  # a refresh would ignore the delay of the bar
            others = [other for key, names in members.items() if key != name for other in names]
            order = [*parameters, *others]
            G, A = (_section(operator, owner, order, parameters) for operator in (exact, approximation))
            squares = []
            for tests in _tests(generator, sizes[name], num_probes):
                squares.append(_squares(G, A, tests, sizes[name]))
                bar.update(len(tests))
            joined = np.concatenate(squares, axis=-1)
            samples[name] = joined.sum(-1, keepdims=True) if sizes[name] <= num_probes else joined
    whole = [own.sum(0) for own in samples.values()]
    squared_error = sum(float(own[2].mean()) for own in whole)

    def part(name: str, size: int, arrays: list[Array]) -> PartError:
        return _part(name, size, arrays, squared_error, rounding)

    blocks = [part(name, sizes[name], [own[0]]) for name, own in samples.items()]
    rows = sum(sizes.values())
    return Comparison(
        blocks,
        part("diagonal blocks", rows, [own[0] for own in samples.values()]),
        part("off-diagonal blocks", rows, [own[1] for own in samples.values()]),
        part("whole matrix", rows, whole),
        num_products,
    )


class PartError(NamedTuple):
    """Norms and error of one part of a matrix: a block, all diagonal blocks, all off-diagonal blocks, or all entries.

    Attributes
    ----------
    name : str
        Name of the part.
    size : int
        Number of rows.
    norm, approximate_norm : Estimate
        Frobenius norms of the part of the exact matrix and of the approximation.
    error : Estimate
        Frobenius norm of the difference, divided by ``norm``. The value is infinite if only ``norm`` is zero, and 0 if
        the difference is zero.
    share : float
        Share of the part in the squared Frobenius norm of the whole difference. It shows where the error comes from.
    """

    name: str
    size: int
    norm: Estimate
    approximate_norm: Estimate
    error: Estimate
    share: float


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Comparison(TableSummary):
    """The error of an approximation, block by block.

    The function `curvop.compare` returns this class. Print it to see a table. ``comparison[name]`` returns the block
    with this name.

    Attributes
    ----------
    blocks : list of PartError
        The diagonal blocks.
    diagonal, off_diagonal, whole : PartError
        All diagonal blocks together, all off-diagonal blocks together, and the whole matrix.
    num_products : int
        Number of products with columns of the exact matrix.

    See Also
    --------
    curvop.compare : Compare two operators.
    """

    blocks: list[PartError]
    diagonal: PartError
    off_diagonal: PartError
    whole: PartError
    num_products: int

    def __getitem__(self, name: str) -> PartError:
        """Return the diagonal block named `name`."""
        for block in self.blocks:
            if block.name == name:
                return block
        raise KeyError(f"no block is named {name!r}; there are {', '.join(block.name for block in self.blocks)}")

    @property
    def table(self) -> list[tuple[str, ...]]:
        """Cells of the printed table: a tuple of headings, followed by one tuple of strings for each part.

        The last column is the share of the part in the squared error of the whole matrix.
        """
        parts = [*self.blocks, *([self.diagonal, self.off_diagonal] if len(self.blocks) > 1 else []), self.whole]
        lines: list[tuple[str, ...]] = [("block", "rows", "norm", "approximate norm", "relative error", "share")]
        for part in parts:
            norms = [with_error(*estimate, 4) for estimate in (part.norm, part.approximate_norm, part.error)]
            lines.append((part.name, f"{part.size:,}", *norms, f"{part.share:.1%}"))
        return lines

    def json(self) -> dict[str, Any]:
        """Return the comparison as a dictionary that ``json.dumps`` accepts.

        Returns
        -------
        dict
            A dictionary with the keys ``blocks``, ``diagonal``, ``off_diagonal``, ``whole`` and ``num_products``. An
            estimate is a list of its value and its standard error. Infinity is replaced by None.
        """

        def plain(part: PartError) -> dict[str, Any]:
            pairs = {
                name: [float(number) if math.isfinite(number) else None for number in estimate]
                for name, estimate in part._asdict().items()
                if isinstance(estimate, Estimate)
            }
            return {"name": part.name, "size": part.size, **pairs, "share": part.share}

        parts = {name: plain(getattr(self, name)) for name in ("diagonal", "off_diagonal", "whole")}
        return {"blocks": [plain(block) for block in self.blocks], **parts, "num_products": self.num_products}


def _owner_of_names(*operators: LinearOperator) -> ParameterVectors:
    """Return the operator whose parameters define the blocks: the exact matrix, if it has parameters."""
    owners = [A for A in operators if isinstance(A, ParameterVectors) and A.has_diagonal_blocks]
    if not owners:
        raise TypeError(
            "neither approximation nor exact has parameters: at least one of them must be a square operator of this "
            "package whose rows and columns are parameters"
        )
    shapes = [dict(zip(A._layout.names, A._layout.shapes, strict=True)) for A in owners]
    if shapes[0] != shapes[-1]:
        different = next(name for name in shapes[0] | shapes[-1] if shapes[0].get(name) != shapes[-1].get(name))
        raise ValueError(f"approximation and exact differ in the parameter {different!r}: pass the same parameters")
    return owners[-1]


def groups_of(approximation: LinearOperator) -> dict[str, list[str]] | None:
    """Return the parameters of the blocks of a block-diagonal operator, or None if it is not block-diagonal.

    The keys are the names of the blocks in the result of `compare`.
    """
    blocks: list[tuple[str, ...]]
    if isinstance(approximation, KroneckerFactoredLinearOperator):
        blocks = [factors.names for factors in approximation.factors.values()]
    elif isinstance(approximation, BlockDiagonalLinearOperator):
        layouts = [layouts_of(block)[0] for block in approximation.args]
        blocks = [layout.names for layout in layouts if layout is not None]
        if len(blocks) < len(layouts):
            return None
    else:
        return None
    members: list[list[str]] = []
    for block in blocks:  # blocks that share a parameter, such as parts of its rows, form one group
        shared = [names for names in members if not set(names).isdisjoint(block)]
        members = [names for names in members if names not in shared]
        members.append(list(dict.fromkeys([name for names in (*shared, block) for name in names])))
    groups: dict[str, list[str]] = {}
    for names in members:
        layers = list(parameter_groups(names, "layers"))
        label = layers[0] if len(names) > 1 and len(layers) == 1 else ", ".join(names)
        groups[label if label not in groups else ", ".join(names)] = names
    return groups


def _size(A: ParameterVectors, parameter: str) -> int:
    place = A.params_slices[parameter]
    return int(place.stop - place.start)


def _section(A: LinearOperator, owner: ParameterVectors, rows: list[str], cols: list[str]) -> LinearOperator:
    """Return the block of A with the given row and column parameters. `owner` defines the positions of parameters."""
    if isinstance(A, ParameterVectors) and A.has_diagonal_blocks:
        return A.block(rows, cols)
    slices, idxs = owner.params_slices, np.arange(owner.shape[0])
    row_idxs, col_idxs = (np.concatenate([idxs[slices[name]] for name in names]) for names in (rows, cols))
    return SubmatrixLinearOperator(A, row_idxs, col_idxs)


def _tests(generator: np.random.Generator, size: int, num_probes: int) -> Iterator[Tensor]:
    """Yield test vectors as rows of float64 tensors: vectors of random signs, or unit vectors of a small space."""
    count = min(size, num_probes)
    for at in range(0, count, _COLUMNS_AT_ONCE):
        stop = min(at + _COLUMNS_AT_ONCE, count)
        if size <= num_probes:
            yield torch.eye(size, dtype=torch.float64)[at:stop]
        else:
            yield torch.from_numpy(generator.choice(np.array([-1.0, 1.0]), (stop - at, size)))


def _squares(exact: LinearOperator, approximation: LinearOperator, tests: Tensor, size: int) -> Array:
    """Return squared norms of products with test vectors, as an array (2, 3, K).

    The first axis stands for the first `size` rows (the diagonal block) and for all other rows. The second axis stands
    for the exact matrix, the approximation, and their difference.
    """
    products = [multiply(A, tests.to(device_of(A))).double() for A in (exact, approximation)]
    for name, product in zip(("exact", "approximation"), products, strict=True):
        if not product.isfinite().all():
            raise ValueError(f"a product with {name} is not finite")
    G, A = products[0], products[1].to(products[0].device)
    sections = [[part[:, :size], part[:, size:]] for part in (G, A, A - G)]
    return np.array([[(rows**2).sum(1).cpu().numpy() for rows in own] for own in zip(*sections, strict=True)])


def _part(name: str, size: int, arrays: list[Array], squared_error: float, rounding: float) -> PartError:
    """Combine samples of squared norms.

    Each array ``(3, K)`` has independent samples of the squared norms of one part of the exact matrix, of the
    approximation, and of the difference. Its single sample is exact if K is 1. The parts are added.
    """
    exact, approximate, difference = sum(array.mean(1) for array in arrays)

    def standard_error(weights: list[float]) -> float:
        """Return the standard error of a linear combination of the three squared norms."""
        variances = [np.var(weights @ array, ddof=1) / array.shape[1] for array in arrays if array.shape[1] > 1]
        return math.sqrt(sum(variances))

    def root(square: float, error: float) -> Estimate:
        """Return the square root of an estimate."""
        value = float(square) ** 0.5
        return Estimate(value, max(error / (2 * value), rounding * value) if value else 0.0)

    if exact > 0:
        squared_ratio = float(difference / exact)
        error = root(squared_ratio, standard_error([-squared_ratio, 0.0, 1.0]) / float(exact))
        error = Estimate(error.value, max(error.error, rounding))
    else:
        error = Estimate(math.inf if difference > 0 else 0.0, 0.0)
    norms = root(exact, standard_error([1.0, 0.0, 0.0])), root(approximate, standard_error([0.0, 1.0, 0.0]))
    return PartError(name, size, *norms, error, float(difference) / squared_error if squared_error else 0.0)
