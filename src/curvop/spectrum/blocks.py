"""Layer by layer: a study of every diagonal block, and the norms of all blocks."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from curvop.parameters import ParameterLinearOperator
from curvop.results import save_arrays
from curvop.spectrum.density import SpectralDensity
from curvop.spectrum.estimators import Estimate
from curvop.spectrum.quadrature import density

__all__ = ["BlockStudy", "blocks"]

Array = NDArray[Any]


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
        Of each diagonal block: ``range`` are its extreme eigenvalues, ``trace()`` its trace.
    norms, norm_errors : ndarray, shape (n, n)
        The Frobenius norms of all blocks, and their standard errors.
    num_products : int
        Columns multiplied with blocks, the full height or not.
    """

    names: list[str]
    sizes: Array
    densities: list[SpectralDensity]
    norms: Array
    norm_errors: Array
    num_products: int

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

    def __str__(self) -> str:
        width = max(map(len, self.names))
        lines = [f"{'block':<{width}}  {'rows':>10}  {'smallest':>12}  {'largest':>12}  {'trace':>26}  {'norm':>12}"]
        traces = self.traces
        for index, name in enumerate(self.names):
            ends = f"{self.smallest[index]:>12.4g}  {self.largest[index]:>12.4g}"
            trace = f"{traces.value[index]:.6g} +- {traces.error[index]:.2g}"
            norm = self.norms[index, index]
            lines.append(f"{name:<{width}}  {self.sizes[index]:>10,}  {ends}  {trace:>26}  {norm:>12.4g}")
        return "\n".join(lines)

    def save(self, path: str | Path) -> None:
        """Write it to an ``.npz`` file, which appears only when it is complete."""
        arrays = {
            f"{index} {name}": np.asarray(value)
            for index, one in enumerate(self.densities)
            for name, value in dataclasses.asdict(one).items()
        }
        own = {name: np.asarray(getattr(self, name)) for name in ("sizes", "norms", "norm_errors", "num_products")}
        save_arrays(Path(path), names=np.array(self.names, dtype=np.str_), **own, **arrays)

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read what `save` has written; nothing in the file is executed."""
        with np.load(path, allow_pickle=False) as file:
            if not {"names", "sizes", "norms", "norm_errors", "num_products"} <= set(file):
                raise ValueError(f"{path} was not written by BlockStudy.save")
            names = [str(name) for name in file["names"]]
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
            return cls(names, file["sizes"], densities, file["norms"], file["norm_errors"], int(file["num_products"]))

    def plot(self, figure: Any = None) -> Any:
        """Draw the table and the norms; see `curvop.spectrum.plots.plot_blocks`."""
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
    seconds : float, optional
        Give up, by a `TimeoutError`, where it takes longer.
    progress : bool
        Count products on a bar.

    Returns
    -------
    BlockStudy

    Raises
    ------
    TypeError, ValueError
        For an operator without parameters, or arguments that cannot be.
    """
    if not isinstance(A, ParameterLinearOperator) or A.shape[0] != A.shape[1]:
        raise TypeError(f"A is a {type(A).__name__} of shape {A.shape}: pass a square curvature matrix of this package")
    if norm_products < 2:
        raise ValueError(f"norm_products is {norm_products}, but must be 2 or more")
    chosen = {name: [name] for name in A.params_slices} if groups is None else _listed(groups)
    generator = np.random.default_rng(rng)
    everything = [name for own in chosen.values() for name in own]
    diagonal = {name: A.block(own) for name, own in chosen.items()}
    sizes = np.array([block.shape[0] for block in diagonal.values()])
    stops = np.cumsum(sizes)
    squares = np.zeros((2, len(chosen), len(chosen)))
    densities: list[SpectralDensity] = []
    begun = time.monotonic()
    work = sum(min(num_steps, size) * num_probes for size in sizes) + norm_products * len(chosen)
    with tqdm(
        desc="blocks", unit=" products", total=int(work), disable=not progress, mininterval=0.5, delay=0.5
    ) as bar:
        for column, (name, block) in enumerate(diagonal.items()):
            left = None if seconds is None else begun + seconds - time.monotonic()
            if left is not None and left <= 0:
                raise TimeoutError(f"{column} of {len(chosen)} blocks were studied in {seconds:.3g} s")
            bar.set_postfix_str(name)
            found = density(
                block, num_probes=num_probes, num_steps=num_steps, rng=generator, seconds=left, progress=False
            )
            if not found.complete:
                raise TimeoutError(f"{column} of {len(chosen)} blocks were studied in {seconds:.3g} s")
            densities.append(found)
            bar.update(found.num_products)
            tests = generator.choice(np.array([-1.0, 1.0]), (block.shape[0], norm_products))
            image = np.split(A.block(everything, chosen[name]) @ tests, stops[:-1])
            of_tests = np.array([(part.astype(np.float64) ** 2).sum(0) for part in image])
            squares[0, :, column] = of_tests.mean(1)
            squares[1, :, column] = of_tests.var(1, ddof=1) / norm_products
            bar.update(norm_products)
    means, variances = squares
    means, variances = (means + means.T) / 2, (variances + variances.T) / 4
    np.fill_diagonal(variances, 2 * np.diag(variances))  # a diagonal block is seen once
    norms = means**0.5
    errors = np.divide(variances**0.5, 2 * norms, out=np.zeros_like(norms), where=norms > 0)
    taken = norm_products * len(chosen) + sum(found.num_products for found in densities)
    return BlockStudy(list(chosen), sizes, densities, norms, errors, taken)


def _listed(groups: Mapping[str, str | Sequence[str]]) -> dict[str, list[str]]:
    if not groups:
        raise ValueError("groups is empty: name parameters, or leave it out for a block of each")
    listed = {name: [own] if isinstance(own, str) else list(own) for name, own in groups.items()}
    everything = [name for own in listed.values() for name in own]
    if twice := [name for name in everything if everything.count(name) > 1]:
        raise ValueError(f"groups has {twice[0]!r} twice: a parameter belongs to one block")
    return listed
