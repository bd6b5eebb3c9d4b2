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

from curvop.checked import random_generator, whole_number
from curvop.fingerprint import fingerprint, listed
from curvop.parameters import ParameterLinearOperator
from curvop.progress import step_bar
from curvop.results import load_arrays, save_arrays
from curvop.spectrum.checkpoint import made, settled_file
from curvop.spectrum.density import SpectralDensity
from curvop.spectrum.estimators import Estimate
from curvop.spectrum.groups import block_of, listed_groups
from curvop.spectrum.quadrature import density
from curvop.spectrum.timed import TimeUpError, end_of

__all__ = ["BlockStudy", "blocks"]

Array = NDArray[Any]
_BLOCK, _NORMS = b"block", b"norms"
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
        Of each diagonal block, its nodes and weights: ``range`` are its extreme eigenvalues, ``trace()`` its trace.
    norms, norm_errors : ndarray, shape (n, n)
        The Frobenius norms of all blocks, and their standard errors.
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
        """The least eigenvalue of each diagonal block ``(n,)``, as far as Lanczos came: a bound from above."""
        return np.array([found.range[0] for found in self.densities])

    @property
    def largest(self) -> Array:
        """The largest eigenvalue of each diagonal block ``(n,)``, as far as Lanczos came: a bound from below."""
        return np.array([found.range[1] for found in self.densities])

    @property
    def traces(self) -> Estimate:
        """The trace of each diagonal block ``(n,)``."""
        found = [found.trace() for found in self.densities]
        return Estimate(np.array([one.value for one in found]), np.array([one.error for one in found]))

    @property
    def table(self) -> list[tuple[str, ...]]:
        """The cells of a table with a line for each block, the head first."""
        lines: list[tuple[str, ...]] = [("block", "rows", "smallest", "largest", "trace", "norm")]
        for name, found, norm in zip(self.names, self.densities, self.norms.diagonal(), strict=True):
            ends = [f"{end:.4g}" for end in found.range]
            lines.append((name, f"{found.size:,}", *ends, str(found.trace()), f"{norm:.4g}"))
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
            f"{index} {name}": np.asarray(value)
            for index, one in enumerate(self.densities)
            for name, value in dataclasses.asdict(one).items()
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
        densities = [
            SpectralDensity(
                size=int(file[f"{index} size"]),
                nodes=file[f"{index} nodes"],
                weights=file[f"{index} weights"],
                atoms=file[f"{index} atoms"],
                num_products=int(file[f"{index} num_products"]),
                complete=bool(file[f"{index} complete"]),
            )
            for index in range(len(names))
        ]
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

    A diagonal block is studied by `density`, at the cost of its own layers alone. The norm of the block of rows i and
    columns j is estimated by :math:`\|A_{ij}\|_F^2 = E \|A_{ij} x\|^2` for random signs x: a product with a column
    group gives all of its blocks, and as the matrix is symmetric each block is seen twice.

    Parameters
    ----------
    A : ParameterLinearOperator
        A symmetric one of this package: it knows its parameters.
    groups : mapping of str to str or sequence of str, optional
        The parameters that make up each block, by a name for it; by default each parameter is one. Parameters in no
        group are left out.
    num_probes, num_steps : int
        Of each diagonal block's density; fewer in blocks of fewer rows.
    norm_products : int
        For each column group, at least 2; the norms are known to about a part of ``1 / sqrt(2 norm_products)``.
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

    def study(name: str, seed: int, steps: Path | None, column: int) -> list[Array]:
        """Return nodes, weights and products of a block's density, and of each test the squares of all norms."""
        nonlocal idle
        block, generator = diagonal[name], np.random.default_rng(seed)
        if not idle:
            _check_time(until)
        before = block.num_products
        left = None if seconds is None else max(0.0, until - time.monotonic())
        size = {"num_probes": num_probes, "num_steps": num_steps}
        found = density(block, **size, rng=generator, checkpoint=steps, seconds=left, progress=False)
        if not found.complete:
            raise TimeUpError
        bar.update(found.num_products)
        idle = idle and block.num_products == before
        tests = generator.choice(np.array([-1.0, 1.0]), (block.shape[0], norm_products))
        whole = A.block([one for own in chosen.values() for one in own], chosen[name])
        squares = []
        for at in range(0, norm_products, _AT_ONCE):
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
        return [found.nodes, found.weights, np.array(found.num_products), np.concatenate(squares, axis=1)]

    work = sum(min(num_steps, size) * num_probes for size in sizes) + norm_products * len(chosen)
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
                bar.update(norm_products + int(finished[column][2]))
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


def _of_blocks(names: list[str], sizes: Array, finished: list[list[Array]]) -> BlockStudy:
    """Return the study of the blocks that are finished, the first ones of those that are named."""
    count = len(finished)
    densities = [
        SpectralDensity(int(size), nodes, weights, np.zeros(0), int(taken))
        for size, (nodes, weights, taken, _) in zip(sizes, finished, strict=False)
    ]
    means, variances = np.zeros((count, count)), np.zeros((count, count))
    taken = sum(found.num_products for found in densities)
    for column, (*_, squares) in enumerate(finished):
        means[:, column] = squares[:count].mean(1)
        variances[:, column] = squares[:count].var(1, ddof=1) / squares.shape[1]
        taken += squares.shape[1]
    means, variances = (means + means.T) / 2, (variances + variances.T) / 4
    np.fill_diagonal(variances, 2 * np.diag(variances))  # a diagonal block is seen once
    norms = means**0.5
    errors = np.divide(variances**0.5, 2 * norms, out=np.zeros_like(norms), where=norms > 0)
    return BlockStudy(names[:count], sizes[:count], densities, norms, errors, taken, names[count:])
