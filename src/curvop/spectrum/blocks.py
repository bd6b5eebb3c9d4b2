"""Layer by layer: a study of every diagonal block, and the norms of all blocks."""

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

from curvop.operators.parameter_operator import ParameterLinearOperator
from curvop.operators.progress import step_bar
from curvop.operators.validation import available_bytes, random_generator, whole_number
from curvop.spectrum.checkpoint import made, settled_file
from curvop.spectrum.counting import TimeUpError, end_of
from curvop.spectrum.density import SpectralDensity, density
from curvop.spectrum.estimators import Estimate
from curvop.spectrum.lanczos import resolution
from curvop.storage.fingerprint import fingerprint, listed
from curvop.storage.records import RecordFile
from curvop.storage.result_files import load_arrays, save_arrays

__all__ = ["BlockStudy", "block_of", "blocks", "listed_groups"]

Array = NDArray[Any]
_BLOCK, _NORMS = b"block", b"norms"
_FIELDS = [field.name for field in dataclasses.fields(SpectralDensity)]
_SHOWN = 1e-4  # relative error of what is printed
_AT_ONCE = 4  # of a column group's products for the norms, which are as high as the whole matrix


@dataclasses.dataclass(frozen=True, eq=False)
class BlockStudy:
    """What is known of the blocks of a matrix, made by `blocks`.

    Attributes
    ----------
    names : list of str
        n of them, one for each group of parameters.
    sizes : ndarray, shape (n,)
        Rows of each diagonal block.
    densities : list of SpectralDensity
        Of each diagonal block: ``range`` are its extreme eigenvalues, ``trace()`` its trace. A block with few rows is
        ``exact``: all its eigenvalues are known.
    norms, norm_errors : ndarray, shape (n, n)
        The Frobenius norms of all blocks, and their standard errors: 0 for those that are known.
    num_products : int
        Columns multiplied with these blocks, the full height or not, in earlier runs as well.
    unfinished : list of str
        The names of blocks that were to be studied, and for which there was no time; nothing else is told of them.
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
        """Whether all blocks were studied; not where time was up."""
        return not self.unfinished

    @property
    def smallest(self) -> Array:
        """The least eigenvalue of each diagonal block ``(n,)``: exact, or a Ritz value, which is an upper bound."""
        return np.array([found.range[0] for found in self.densities])

    @property
    def smallest_errors(self) -> Array:
        """How far below `smallest` it may be ``(n,)``, with a probability of 95 %; rounding if it is exact."""
        return np.array([found.range_errors[0] for found in self.densities])

    @property
    def largest(self) -> Array:
        """The largest eigenvalue of each diagonal block ``(n,)``: exact, or a Ritz value, which is a lower bound."""
        return np.array([found.range[1] for found in self.densities])

    @property
    def largest_errors(self) -> Array:
        """How far above `largest` it may be ``(n,)``, with a probability of 95 %; rounding if it is exact."""
        return np.array([found.range_errors[1] for found in self.densities])

    @property
    def traces(self) -> Estimate:
        """The trace of each diagonal block ``(n,)``."""
        found = [found.trace() for found in self.densities]
        return Estimate(np.array([one.value for one in found]), np.array([one.error for one in found]))

    @property
    def table(self) -> list[tuple[str, ...]]:
        """The cells of a table with a line for each block, the head first; errors below the last digit are left out."""
        lines: list[tuple[str, ...]] = [("block", "rows", "smallest", "largest", "trace", "norm")]
        for name, found, norm in zip(self.names, self.densities, self.norms.diagonal(), strict=True):
            ends, trace = [f"{end:.4g}" for end in found.range], str(found.trace())
            if found.exact:
                trace = f"{found.trace().value:.6g}"
            else:
                signed = zip(ends, "-+", found.range_errors, strict=True)
                ends = [
                    f"{end} {sign} {error:.1g}" if error > _SHOWN * abs(float(end)) else end
                    for end, sign, error in signed
                ]
            lines.append((name, f"{found.size:,}", *ends, trace, f"{norm:.4g}"))
        return lines

    @property
    def lines(self) -> list[str]:
        """The table as lines of text of one length."""
        widths = [max(map(len, column)) for column in zip(*self.table, strict=True)]
        return ["  ".join([f"{cells[0]:<{widths[0]}}", *map(str.rjust, cells[1:], widths[1:])]) for cells in self.table]

    def __str__(self) -> str:
        undone = f"not studied, as time was up: {listed(self.unfinished)}"
        return "\n".join([*self.lines, undone] if self.unfinished else self.lines)

    def save(self, path: str | Path) -> None:
        """Write it to an ``.npz`` file, which appears only when it is complete."""
        arrays = {
            f"{index} {name}": value for index, one in enumerate(self.densities) for name, value in one.arrays.items()
        }
        own = {name: np.asarray(getattr(self, name)) for name in ("sizes", "norms", "norm_errors", "num_products")}
        words = {name: np.array(getattr(self, name), dtype=np.str_) for name in ("names", "unfinished")}
        save_arrays(Path(path), **words, **own, **arrays)

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read what `save` has written; nothing in the file is executed."""
        fields = ("names", "unfinished", "sizes", "norms", "norm_errors", "num_products")
        file = load_arrays(path, fields, "BlockStudy.save")
        names, unfinished = ([str(name) for name in file[words]] for words in ("names", "unfinished"))
        arrays = [{name: file[f"{index} {name}"] for name in _FIELDS} for index in range(len(names))]
        densities = [SpectralDensity.of_arrays(one) for one in arrays]
        norms, errors, taken = file["norms"], file["norm_errors"], int(file["num_products"])
        return cls(names, file["sizes"], densities, norms, errors, taken, unfinished)

    def plot(self, figure: Any = None) -> Any:
        """Draw the table with the densities, and the norms; see `curvop.spectrum.plots.plot_blocks`."""
        from curvop.spectrum.plots import plot_blocks

        return plot_blocks(self, figure)


def blocks(
    A: ParameterLinearOperator,
    *,
    groups: Mapping[str, str | Sequence[str]] | None = None,
    num_probes: int = 4,
    num_steps: int = 40,
    norm_products: int = 16,
    rng: int | np.random.Generator | None = 0,
    checkpoint: str | Path | None = None,
    seconds: float | None = None,
    progress: bool = True,
) -> BlockStudy:
    r"""Study every diagonal block of a curvature matrix, and the norms of all blocks.

    A diagonal block is studied by `density`, at the cost of its own layers alone. If it has no more rows than that
    takes products, ``num_probes * num_steps``, it is formed instead and known exactly. The norm of the block of rows i
    and columns j is estimated by :math:`\|A_{ij}\|_F^2 = E \|A_{ij} x\|^2` for random signs x: a product with a column
    group gives all of its blocks, and as the matrix is symmetric each block is seen twice. The columns of a group of no
    more than `norm_products` parameters are formed, and the norms of its blocks are exact.

    Parameters
    ----------
    A : ParameterLinearOperator
        A symmetric one of this package: it knows its parameters.
    groups : mapping of str to str or sequence of str, optional
        The parameters that make up each block, by a name for it; by default each parameter is one. Parameters in no
        group are left out.
    num_probes, num_steps : int
        Of each diagonal block's density.
    norm_products : int
        For each column group, at least 2, and at most as many as it has columns; other norms are known to about a part
        of ``1 / sqrt(2 norm_products)``.
    rng : int or numpy.random.Generator, optional
    checkpoint : str or path, optional
        A directory where every block is recorded when it is studied, and every step of the one under way, as by
        `density`: a run that was killed, or ended by `seconds`, is taken up again from there, called in the same way
        with the same seed, and ends with the same bits as one that was not.
    seconds : float, optional
        End after so long with the blocks that are studied, or one block product of `num_probes` vectors later; 0 for
        those that the checkpoint holds, without a product. With a checkpoint, repeated calls get on, however short.
    progress : bool
        Count products on a bar.

    Returns
    -------
    BlockStudy

    Raises
    ------
    TypeError, ValueError
        For an operator without parameters, or arguments that cannot be.
    ValueError, RecordFileError, OSError
        Where the checkpoint is of something else (naming it), in use, damaged, or cannot be written.
    """
    until, idle = end_of(seconds), seconds != 0  # at first something is done, so that who comes again gets on
    if not isinstance(A, ParameterLinearOperator) or A.shape[0] != A.shape[1]:
        raise TypeError(f"A is a {type(A).__name__} of shape {A.shape}: pass a square curvature matrix of this package")
    for name, number, least in (("num_probes", num_probes, 1), ("num_steps", num_steps, 1)):
        whole_number(name, number, least)
    whole_number("norm_products", norm_products, 2)
    chosen = {name: [name] for name in A.params_slices} if groups is None else listed_groups(groups)
    diagonal = {name: block_of(A, name, own) for name, own in chosen.items()}
    sizes = np.array([block.shape[0] for block in diagonal.values()])
    # A seed for each block, so that one that is taken up again draws what it would have drawn.
    seeds = random_generator(rng).integers(2**63, size=len(chosen)).tolist()
    directory = None if checkpoint is None else Path(checkpoint)

    def settings() -> dict[str, str]:
        asked = {"num_probes": num_probes, "num_steps": num_steps, "norm_products": norm_products, "rng": seeds[0]}
        return fingerprint(A) | {"groups": json.dumps(chosen)} | {name: str(value) for name, value in asked.items()}

    def is_formed(rows: int) -> bool:
        return rows <= num_probes * num_steps and 3 * 8 * rows**2 <= available_bytes()

    def study(name: str, seed: int, steps: Path | None, column: int) -> list[Array]:
        """Return the arrays of a block's density, and of each test the squares of all norms."""
        nonlocal idle
        block, generator = diagonal[name], np.random.default_rng(seed)
        if not idle:
            _check_time(until)
        before = block.num_products
        if is_formed(block.shape[0]):
            found = _formed(block, num_probes, steps, until, idle)
        else:
            left = None if seconds is None else max(0.0, until - time.monotonic())
            size = {"num_probes": num_probes, "num_steps": num_steps}
            found = density(block, **size, rng=generator, checkpoint=steps, seconds=left, progress=False)
        if not found.complete:
            raise TimeUpError
        bar.update(found.num_products)
        idle = idle and block.num_products == before
        tests = np.eye(block.shape[0])
        if len(tests) > norm_products:
            tests = generator.choice(np.array([-1.0, 1.0]), (block.shape[0], norm_products))
        whole = A.block([one for own in chosen.values() for one in own], chosen[name])
        squares = []
        for at in range(0, tests.shape[1], _AT_ONCE):
            key = b"%s %d %d" % (_NORMS, column, at)
            if key not in norms:
                if not idle:
                    _check_time(until)
                idle = False
                image = np.split(whole @ tests[:, at : at + _AT_ONCE], np.cumsum(sizes)[:-1])
                norms[key] = np.array([(part.astype(np.float64) ** 2).sum(0) for part in image])
                if file is not None:
                    file.append(key, norms[key])
            squares.append(norms[key])
            bar.update(squares[-1].shape[1])
        return [*found.arrays.values(), np.concatenate(squares, axis=1)]

    work = sum(
        (size if is_formed(size) else num_steps * num_probes) + min(size, norm_products) for size in sizes.tolist()
    )
    with (
        contextlib.ExitStack() as stack,
        step_bar("blocks", progress, int(work)) as bar,
    ):
        file, finished, norms = None, {}, {}
        if directory is not None:
            file = stack.enter_context(settled_file(made(directory) / "blocks.records", settings))
            finished = {int(key.split()[1]): file.read(offset) for key, offset in file if key.startswith(_BLOCK)}
            norms = {key: file.read(offset)[0] for key, offset in file if key.startswith(_NORMS)}
        for column, name in enumerate(chosen):
            bar.set_postfix_str(name)
            steps = None if directory is None else directory / f"block {column}"
            if column in finished:
                *arrays, squares = finished[column]
                bar.update(int(arrays[_FIELDS.index("num_products")]) + squares.shape[1])
            else:
                try:
                    finished[column] = study(name, seeds[column], steps, column)
                except TimeUpError:
                    break
                if file is not None:
                    file.append(b"%s %d" % (_BLOCK, column), *finished[column])
            if steps is not None:
                shutil.rmtree(steps, ignore_errors=True)
    return _of_blocks(list(chosen), sizes, [finished[column] for column in sorted(finished)])


def _check_time(until: float) -> None:
    if time.monotonic() >= until:
        raise TimeUpError


def _formed(
    block: ParameterLinearOperator, at_once: int, directory: Path | None, until: float, idle: bool
) -> SpectralDensity:
    """Return all eigenvalues of a block, from its columns; those that are multiplied are recorded in `directory`."""
    rows = block.shape[0]
    identity, dense = np.eye(rows), np.zeros((rows, rows))
    with contextlib.ExitStack() as stack:
        file = None if directory is None else stack.enter_context(RecordFile(made(directory) / "columns.records"))
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
    none = np.zeros((0, 0))
    return SpectralDensity(rows, none, none, values, rows, resolution=resolution(block) * float(np.abs(values).max()))


def _of_blocks(names: list[str], sizes: Array, finished: list[list[Array]]) -> BlockStudy:
    """Return the study of the blocks that are finished, the first ones of those that are named."""
    count = len(finished)
    densities = [SpectralDensity.of_arrays(dict(zip(_FIELDS, arrays, strict=True))) for *arrays, _ in finished]
    means, variances = np.zeros((count, count)), np.zeros((count, count))
    shares = np.full((count, count), 0.5)  # of the estimate from the columns; the other is that from the rows
    taken = sum(found.num_products for found in densities)
    for column, (*_, squares) in enumerate(finished):
        taken += squares.shape[1]
        if squares.shape[1] == sizes[column]:  # all columns
            means[:, column] = squares[:count].sum(1)
            shares[:, column] += 0.5
            shares[column] -= 0.5
        else:
            means[:, column] = squares[:count].mean(1)
            variances[:, column] = squares[:count].var(1, ddof=1) / squares.shape[1]
    means, variances = shares * means, shares**2 * variances
    means, variances = means + means.T, variances + variances.T
    np.fill_diagonal(variances, 2 * np.diag(variances))  # a diagonal block is seen once
    for index, found in enumerate(densities):
        if found.exact:
            means[index, index], variances[index, index] = (found.atoms**2).sum(), 0.0
    norms = means**0.5
    errors = np.divide(variances**0.5, 2 * norms, out=np.zeros_like(norms), where=norms > 0)
    return BlockStudy(names[:count], sizes[:count], densities, norms, errors, taken, names[count:])


# Groups of parameters, and the blocks that they span.


def block_of(A: ParameterLinearOperator, name: str, own: list[str]) -> ParameterLinearOperator:
    """Return the diagonal block of a group's parameters; an error names the group."""
    try:
        return A.block(own)
    except (TypeError, ValueError) as error:  # the operator calls this argument 'rows'
        raise type(error)(f"groups[{name!r}]{str(error).removeprefix('rows')}") from None


def listed_groups(groups: Mapping[str, str | Sequence[str]]) -> dict[str, list[str]]:
    """Return the parameters of each group as lists, each of them in one group only."""
    if not isinstance(groups, Mapping):
        raise TypeError(f"groups is a {type(groups).__name__}: pass a dict of names to parameters, one name or several")
    if not groups:
        raise ValueError("groups is empty: name parameters, or leave it out for a block of each")
    listed = {name: [own] if isinstance(own, str) else list(own) for name, own in groups.items()}
    everything = [name for own in listed.values() for name in own]
    if twice := [name for name in everything if everything.count(name) > 1]:
        raise ValueError(f"groups has {twice[0]!r} twice: leave it out of one of them")
    return listed
