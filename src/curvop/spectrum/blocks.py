"""Study a curvature matrix layer by layer: densities of the diagonal blocks, and norms of all blocks.

`blocks` returns a `BlockStudy`. For a small diagonal block, all columns are computed, and the eigenvalues of the
resulting matrix are exact. The spectrum of a larger diagonal block is estimated by `density`. The Frobenius norm of a
block is exact if all its columns are computed. Otherwise, the norm is estimated from products with vectors of random
signs.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import shutil
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import eigvalsh

from curvop.operators.keywords import named_keywords
from curvop.operators.parameter_operator import ParameterLinearOperator, ParameterVectors
from curvop.operators.progress import step_bar
from curvop.operators.summaries import TableSummary, with_error
from curvop.operators.validation import available_bytes, integer, random_generator
from curvop.spectrum.checkpoint import make_directory, open_record_file
from curvop.spectrum.counting import TimeUpError, deadline_after
from curvop.spectrum.density import density
from curvop.spectrum.estimators import Estimate
from curvop.spectrum.lanczos import resolution
from curvop.spectrum.spectral_density import SpectralDensity
from curvop.spectrum.symmetry import check_symmetry
from curvop.storage.fingerprint import fingerprint, listed
from curvop.storage.records import RecordFile
from curvop.storage.result_files import load_arrays, save_arrays

__all__ = ["BlockStudy", "blocks"]

Array = NDArray[Any]
_BLOCK, _NORMS = b"block", b"norms"
_FIELDS = [field.name for field in dataclasses.fields(SpectralDensity)]
_MAX_PICTURED = 30  # blocks in the picture of a notebook
_COLUMNS_AT_ONCE = 4  # columns per block product that estimates norms; small because each product has N rows


@named_keywords
def blocks(
    A: ParameterVectors,
    groups: str | Mapping[str, str | Sequence[str]] | None = None,
    *,
    num_probes: int = 4,
    num_steps: int = 40,
    norm_products: int = 16,
    rng: int | np.random.Generator | None = 0,
    checkpoint: str | Path | None = None,
    seconds: float | None = None,
    progress: bool = True,
) -> BlockStudy:
    r"""Estimate the spectrum of every diagonal block of a curvature matrix, and the norms of all blocks.

    Use `blocks` to compare layers: the study contains the extreme eigenvalues and the trace of each diagonal block, and
    the norms of the off-diagonal blocks. These norms show how strongly layers are coupled. Use `density` for the whole
    matrix, or for a single block ``A.block(names)``.

    Parameters
    ----------
    A : LinearOperator
        Symmetric operator of this package whose rows and columns are parameters, for example a
        ``HessianLinearOperator`` or a sum of curvature matrices.
    groups : mapping of str to str or sequence of str, or "layers", optional
        Maps the name of each block to the names of its parameters or modules, or to glob patterns (see ``A.blocks``).
        By default, each parameter forms a block. With "layers", the parameters of a layer, such as its weight and its
        bias, form a block. Parameters in no group are left out.
    num_probes : int
        Number of probes for the density of each diagonal block.
    num_steps : int
        Number of Lanczos steps for the density of each diagonal block.
    norm_products : int
        Number of products with the columns of each group, at least 2. The norms of all blocks in these columns are
        estimated from these products. A group with fewer than ``norm_products`` columns needs only one product per
        column. The relative error of an estimated norm is about ``1 / sqrt(2 norm_products)``.
    rng : int or numpy.random.Generator, optional
        Seed or generator for all random vectors. If it is None, every run uses different vectors.
    checkpoint : str or path, optional
        Directory in which every finished block and every step of the current block are recorded, as in `density`. If a
        run is killed or reaches its time limit, call `blocks` again with the same arguments and the same seed. The
        second call continues from the last recorded step and returns the same result as an uninterrupted run. If the
        operator's argument ``columns`` is a number, the results are bitwise identical.
    seconds : float, optional
        Time limit. A run that reaches the limit completes the current block product, which has at most
        ``max(num_probes, 4)`` vectors, and returns the finished blocks. If the limit is 0, the run computes no product
        and returns the finished blocks in the checkpoint. If the limit is larger, the run computes at least one block
        product, so that repeated calls with a checkpoint make progress.
    progress : bool
        Show a progress bar that counts products.

    Returns
    -------
    BlockStudy
        Densities of the diagonal blocks, and norms of all blocks.

    Raises
    ------
    TypeError, ValueError
        If `A` has no parameters, if an argument is invalid, or if a product is not finite.
    ValueError, RecordFileError, OSError
        If the checkpoint belongs to another computation (the message names the difference), is in use by another
        process, is damaged, or cannot be written.

    See Also
    --------
    density : Estimate the spectral density of a single operator.

    Notes
    -----
    If a diagonal block has at most ``num_probes * num_steps`` rows, all its columns are computed, which gives the exact
    eigenvalues. An estimate would take at least as many products. The spectrum of a larger block is estimated by
    `density`. In both cases, the products involve only the layers of the block.

    Let :math:`A_{ij}` be the block with the rows of group i and the columns of group j. Its squared norm is
    :math:`\|A_{ij}\|_F^2 = E \|A_{ij} x\|^2`, where x is a vector of random signs. A product with the columns of a
    group contributes to the estimates of all blocks in these columns. Because the matrix is symmetric, the norm of each
    off-diagonal block is estimated twice. If a group has at most ``norm_products`` columns, all its columns are
    computed, and the norms of the blocks in these columns are exact.

    Examples
    --------
    >>> import torch
    >>> from curvop import HessianLinearOperator, spectrum
    >>> rng = torch.Generator().manual_seed(0)
    >>> X, y = torch.randn(30, 6, generator=rng).double(), torch.randint(3, (30,), generator=rng)
    >>> model = torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.Tanh(), torch.nn.Linear(8, 3)).double()
    >>> H = HessianLinearOperator(model, torch.nn.CrossEntropyLoss(), dict(model.named_parameters()), [(X, y)])
    >>> study = spectrum.blocks(H, groups={"first": ["0.weight", "0.bias"], "last": ["2.weight", "2.bias"]},
    ...                         progress=False)
    >>> study.names
    ['first', 'last']
    >>> bool((study.largest > 0).all())
    True
    >>> study.norms.shape
    (2, 2)
    """
    # `idle` is True until the first product of this call, which is allowed even if time is up.
    until, idle = deadline_after(seconds), seconds != 0
    if not isinstance(A, ParameterVectors) or not A.has_diagonal_blocks:
        raise TypeError(f"A is a {type(A).__name__} of shape {A.shape}: pass a square curvature matrix of this package")
    for name, number, least in (("num_probes", num_probes, 1), ("num_steps", num_steps, 1)):
        integer(name, number, least)
    integer("norm_products", norm_products, 2)
    if not isinstance(A, ParameterLinearOperator):  # a composition may not be symmetric
        check_symmetry(A)
    members = A.parameter_groups(groups)
    diagonal = {name: A.block(parameters) for name, parameters in members.items()}
    sizes = np.array([block.shape[0] for block in diagonal.values()])
    # Each block has its own seed, so that a later run that continues the block draws the same vectors.
    seeds = random_generator(rng).integers(2**63, size=len(members)).tolist()
    directory = None if checkpoint is None else Path(checkpoint)

    def settings() -> dict[str, str]:
        arguments = {"num_probes": num_probes, "num_steps": num_steps, "norm_products": norm_products, "rng": seeds[0]}
        named = {name: str(value) for name, value in arguments.items()}
        return fingerprint(A) | {"groups": json.dumps(members)} | named

    def is_formed(rows: int) -> bool:
        return rows <= num_probes * num_steps and 3 * 8 * rows**2 <= available_bytes()

    def study_block(name: str, seed: int, steps: Path | None, column: int) -> list[Array]:
        """Return a list: the arrays of the density of a diagonal block, followed by one array of squared norms.

        Entry (i, j) of the last array is ``||A_i x_j||**2``. Here, A_i is the block with the rows of the i-th group and
        the columns of the group `name`, and x_j is the j-th test vector.
        """
        nonlocal idle
        block, generator = diagonal[name], np.random.default_rng(seed)
        if not idle:
            _check_time(until)
        before = block.num_products
        if is_formed(block.shape[0]):
            found = _formed(block, num_probes, steps, until, idle)
        else:
            found = density(
                block,
                num_probes=num_probes,
                num_steps=num_steps,
                rng=generator,
                checkpoint=steps,
                seconds=None if seconds is None else max(0.0, until - time.monotonic()),
                progress=False,
            )
        if not found.complete:
            raise TimeUpError
        bar.update(found.num_products)
        idle = idle and block.num_products == before
        tests = np.eye(block.shape[0])
        if len(tests) > norm_products:
            tests = generator.choice(np.array([-1.0, 1.0]), (block.shape[0], norm_products))
        columns_of_group = A.block([name for parameters in members.values() for name in parameters], members[name])
        squares = []
        for at in range(0, tests.shape[1], _COLUMNS_AT_ONCE):
            key = b"%s %d %d" % (_NORMS, column, at)
            if key not in norms:
                if not idle:
                    _check_time(until)
                idle = False
                image = columns_of_group @ tests[:, at : at + _COLUMNS_AT_ONCE]
                parts = np.split(image, np.cumsum(sizes)[:-1])
                norms[key] = np.array([(part.astype(np.float64) ** 2).sum(0) for part in parts])
                if file is not None:
                    file.append(key, norms[key])
            squares.append(norms[key])
            bar.update(squares[-1].shape[1])
        return [*found.arrays.values(), np.concatenate(squares, axis=1)]

    total = sum(
        (size if is_formed(size) else num_steps * num_probes) + min(size, norm_products) for size in sizes.tolist()
    )
    with (
        contextlib.ExitStack() as stack,
        step_bar("blocks", progress, int(total)) as bar,
    ):
        file, finished, norms = None, {}, {}
        if directory is not None:
            file = stack.enter_context(open_record_file(make_directory(directory) / "blocks.records", settings))
            finished = {int(key.split()[1]): file.read(offset) for key, offset in file if key.startswith(_BLOCK)}
            norms = {key: file.read(offset)[0] for key, offset in file if key.startswith(_NORMS)}
        for column, name in enumerate(members):
            bar.set_postfix_str(name, refresh=False)  # a refresh would ignore the delay of the bar
            steps = None if directory is None else directory / f"block {column}"
            if column in finished:
                *arrays, squares = finished[column]
                bar.update(int(arrays[_FIELDS.index("num_products")]) + squares.shape[1])
            else:
                try:
                    finished[column] = study_block(name, seeds[column], steps, column)
                except TimeUpError:
                    break
                if file is not None:
                    file.append(b"%s %d" % (_BLOCK, column), *finished[column])
            if steps is not None:
                shutil.rmtree(steps, ignore_errors=True)
    return _assembled(list(members), sizes, [finished[column] for column in sorted(finished)])


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class BlockStudy(TableSummary):
    """Densities of the diagonal blocks of a matrix, and norms of all blocks.

    The function `blocks` returns this class. ``print(study)`` shows a table of the diagonal blocks.

    Attributes
    ----------
    names : list of str
        Names of the n blocks.
    sizes : ndarray, shape (n,)
        Number of rows of each diagonal block.
    densities : list of SpectralDensity
        Density of each diagonal block. The attribute ``range`` of a density holds the extreme eigenvalues, and the
        method ``trace()`` returns the trace. For a small block, ``exact`` is True: all its eigenvalues are known.
    norms, norm_errors : ndarray, shape (n, n)
        Frobenius norms of all blocks, and standard errors of these norms. The errors of exact norms are 0.
    num_products : int
        Number of products used for these blocks, including products of earlier runs. A product with a diagonal block
        and a product with all columns of a group both count as one product.
    unfinished : list of str
        Names of the blocks that were not finished within the time limit. These blocks are missing from the other
        attributes.

    See Also
    --------
    blocks : Estimate the spectra and norms of the blocks of a curvature matrix.
    """

    names: list[str]
    sizes: Array
    densities: list[SpectralDensity]
    norms: Array
    norm_errors: Array
    num_products: int
    unfinished: list[str] = dataclasses.field(default_factory=list)

    @property
    def complete(self) -> bool:
        """True if all blocks were studied, False if the time limit ended the run."""
        return not self.unfinished

    @property
    def smallest(self) -> Array:
        """Smallest eigenvalue of each diagonal block, shape ``(n,)``.

        The value is exact for a small block. For a larger block, the value is a Ritz value, which is an upper bound for
        the eigenvalue.
        """
        return np.array([block.range[0] for block in self.densities])

    @property
    def smallest_errors(self) -> Array:
        """Bounds for the errors of `smallest`, shape ``(n,)``.

        Each bound holds with a probability of 95%. If the eigenvalue is exact, the bound only covers rounding errors.
        """
        return np.array([block.range_errors[0] for block in self.densities])

    @property
    def largest(self) -> Array:
        """Largest eigenvalue of each diagonal block, shape ``(n,)``.

        The value is exact for a small block. For a larger block, the value is a Ritz value, which is a lower bound for
        the eigenvalue.
        """
        return np.array([block.range[1] for block in self.densities])

    @property
    def largest_errors(self) -> Array:
        """Bounds for the errors of `largest`, shape ``(n,)``.

        Each bound holds with a probability of 95%. If the eigenvalue is exact, the bound only covers rounding errors.
        """
        return np.array([block.range_errors[1] for block in self.densities])

    @property
    def traces(self) -> Estimate:
        """Traces of the diagonal blocks: an `Estimate` whose ``value`` and ``error`` are arrays of shape ``(n,)``."""
        traces = [block.trace() for block in self.densities]
        return Estimate(np.array([trace.value for trace in traces]), np.array([trace.error for trace in traces]))

    @property
    def table(self) -> list[tuple[str, ...]]:
        """Cells of the printed table: a tuple of headings, followed by one tuple of strings for each block.

        All numbers are rounded to their errors. An error is omitted if it is smaller than the last digit shown.
        """
        lines: list[tuple[str, ...]] = [("block", "rows", "smallest", "largest", "trace", "norm")]
        norms = zip(self.norms.diagonal(), self.norm_errors.diagonal(), strict=True)
        for name, block, norm in zip(self.names, self.densities, norms, strict=True):
            ends = zip(block.range, block.range_errors, "-+", strict=True)
            shown = [with_error(end, error, 4, sign) for end, error, sign in ends]
            lines.append((name, f"{block.size:,}", *shown, with_error(*block.trace()), with_error(*norm, 4)))
        return lines

    def _summary_text(self) -> tuple[str, str]:
        return "", f"not studied, as time was up: {listed(self.unfinished)}" if self.unfinished else ""

    def _draw_summary(self, figure: Any) -> bool:
        from curvop.spectrum.plots import blocks_size

        if not 0 < len(self.names) <= _MAX_PICTURED:
            return False
        figure.set_size_inches(7, blocks_size(self)[1])
        self.plot(figure=figure)
        densities = figure.axes[0]
        densities.set_yticklabels(["block", *self.names], parse_math=False)  # instead of the table, which is above
        return True

    def plot(self, figure: Any = None, *, label: str | None = None, color: Any = None, **properties: Any) -> Any:
        """Plot the table of blocks, the density of each diagonal block, and all norms. Requires matplotlib.

        Parameters
        ----------
        figure : matplotlib.figure.Figure, optional
            Empty figure to draw into. By default, a new figure of suitable size is created.
        label : str, optional
            Title of the figure. By default, there is none.
        color : color, optional
            Color of the densities, gray by default.
        **properties
            Properties of the dots at the extreme eigenvalues, each row of dots a ``matplotlib.lines.Line2D``.

        Returns
        -------
        matplotlib.figure.Figure
            The figure that contains the plot.

        Raises
        ------
        ImportError
            If matplotlib is not installed.
        TypeError, ValueError
            If no block is finished, or if a property is invalid.

        See Also
        --------
        plot_norms : Plot only the norms, on given axes.
        """
        from curvop.spectrum.plots import plot_blocks

        return plot_blocks(self, figure, label=label, color=color, **properties)

    def plot_norms(self, ax: Any = None, *, label: str | None = None, **properties: Any) -> Any:
        """Plot the norms of all blocks as an image with a logarithmic color scale. Requires matplotlib.

        Parameters
        ----------
        ax : matplotlib.axes.Axes, optional
            Axes to draw into. By default, a new figure is created.
        label : str, optional
            Title of the axes, "Frobenius norms of the blocks" by default.
        **properties
            Properties of the ``matplotlib.image.AxesImage``, for example ``cmap="cividis"``.

        Returns
        -------
        matplotlib.axes.Axes
            The axes that contain the plot.

        Raises
        ------
        ImportError
            If matplotlib is not installed.
        TypeError, ValueError
            If no block is finished, or if `ax` is not a Matplotlib Axes.
        """
        from curvop.spectrum.plots import plot_norms

        return plot_norms(self, ax, label=label, **properties)

    def save(self, path: str | Path) -> None:
        """Save the study to an ``.npz`` file.

        The file appears under its name only after all data are written.

        Parameters
        ----------
        path : str or path
            Name of the file.

        Raises
        ------
        FileNotFoundError
            If the folder does not exist. Saving creates no folders.
        """
        arrays = {
            f"{index} {name}": value
            for index, block in enumerate(self.densities)
            for name, value in block.arrays.items()
        }
        numbers = {name: np.asarray(getattr(self, name)) for name in ("sizes", "norms", "norm_errors", "num_products")}
        strings = {name: np.array(getattr(self, name), dtype=np.str_) for name in ("names", "unfinished")}
        save_arrays(Path(path), **strings, **numbers, **arrays)

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Load a study from a file written by `save`.

        Loading a file never executes code from it.

        Parameters
        ----------
        path : str or path
            Name of the file.

        Returns
        -------
        BlockStudy
            The study that was saved.

        Raises
        ------
        ValueError
            If the file is damaged or was not written by `save`.
        """
        fields = ("names", "unfinished", "sizes", "norms", "norm_errors", "num_products")
        file = load_arrays(path, fields, "BlockStudy.save")
        names, unfinished = ([str(name) for name in file[field]] for field in ("names", "unfinished"))
        densities = [
            SpectralDensity.of_arrays({name: file[f"{index} {name}"] for name in _FIELDS})
            for index in range(len(names))
        ]
        norms, errors, num_products = file["norms"], file["norm_errors"], int(file["num_products"])
        return cls(names, file["sizes"], densities, norms, errors, num_products, unfinished)


def _check_time(until: float) -> None:
    if time.monotonic() >= until:
        raise TimeUpError


def _formed(block: ParameterVectors, at_once: int, directory: Path | None, until: float, idle: bool) -> SpectralDensity:
    """Compute all eigenvalues of a block from its columns, and return them as an exact density.

    Each block product computes `at_once` columns. Finished columns are recorded in `directory`.
    """
    rows = block.shape[0]
    identity, dense = np.eye(rows), np.zeros((rows, rows))
    with contextlib.ExitStack() as stack:
        file = None
        if directory is not None:
            file = stack.enter_context(RecordFile(make_directory(directory) / "columns.records"))
        recorded = {} if file is None else {int(key): offset for key, offset in file}
        for at in range(0, rows, at_once):
            columns = slice(at, at + at_once)
            if file is not None and at in recorded:
                [dense[:, columns]] = file.read(recorded[at])
                continue
            if not idle:
                _check_time(until)
            idle = False
            dense[:, columns] = block @ identity[:, columns]
            if file is not None:
                file.append(b"%d" % at, dense[:, columns])
    values = eigvalsh((dense + dense.T) / 2)
    empty = np.zeros((0, 0))
    return SpectralDensity(rows, empty, empty, values, rows, resolution=resolution(block) * float(np.abs(values).max()))


def _assembled(names: list[str], sizes: Array, finished: list[list[Array]]) -> BlockStudy:
    """Combine the results of the finished blocks into a study. The finished blocks must come first in `names`."""
    count = len(finished)
    densities = [SpectralDensity.of_arrays(dict(zip(_FIELDS, arrays, strict=True))) for *arrays, _ in finished]
    means, variances = np.zeros((count, count)), np.zeros((count, count))
    # Each norm is estimated twice: from the columns of a block and from the columns of its transpose. `shares` holds
    # the weights of the first estimates. The second estimates have the remaining weights.
    shares = np.full((count, count), 0.5)
    num_products = sum(block.num_products for block in densities)
    for column, (*_, squares) in enumerate(finished):
        num_products += squares.shape[1]
        if squares.shape[1] == sizes[column]:  # all columns were computed, so the norms are exact
            means[:, column] = squares[:count].sum(1)
            shares[:, column] += 0.5
            shares[column] -= 0.5
        else:
            means[:, column] = squares[:count].mean(1)
            variances[:, column] = squares[:count].var(1, ddof=1) / squares.shape[1]
    means, variances = shares * means, shares**2 * variances
    means, variances = means + means.T, variances + variances.T
    np.fill_diagonal(variances, 2 * np.diag(variances))  # a diagonal block is estimated only once
    for index, block in enumerate(densities):
        if block.exact:
            means[index, index], variances[index, index] = (block.atoms**2).sum(), 0.0
    norms = means**0.5
    errors = np.divide(variances**0.5, 2 * norms, out=np.zeros_like(norms), where=norms > 0)
    return BlockStudy(names[:count], sizes[:count], densities, norms, errors, num_products, names[count:])
