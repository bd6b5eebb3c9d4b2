"""What a study of eigenvalues finds, and the file it is saved in."""

import os
import zipfile
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from curvop.checks.dense_check import DenseCheck
from curvop.operators.cost import Cost as ProductCost
from curvop.solvers.linear_solve import SolveResult

__all__ = [
    "Array",
    "Cost",
    "End",
    "Result",
    "Setup",
    "Singular",
    "Solve",
    "Spectrum",
    "appearing",
    "load_arrays",
    "param_arrays",
    "save",
    "save_arrays",
]

Array = npt.NDArray[Any]


@dataclass
class Cost:
    """What a step took: the number of products (columns multiplied), and the time in seconds."""

    products: int = 0
    seconds: float = 0.0


@dataclass(frozen=True)
class Setup:
    """The matrix that is studied, N rows of one of P parameters; `cost` is that of the first pass over the data.

    `slices` are the rows of each parameter in the matrix; `block` names the parameters where they are not all. `norm`
    is the norm of the matrix times a standard normal vector, which estimates the matrix's Frobenius norm; `product`
    tells what one product costs, where that was asked. Of a Jacobian N are the predictions, which have no loss.
    """

    P: int
    N: int
    slices: dict[str, slice]
    block: tuple[str, ...] | None
    dtype: str
    model_dtype: str
    device: str
    loss: float | None
    gradient_norm: float | None
    norm: float
    cost: Cost
    product: ProductCost | None
    ok: bool = True


@dataclass(frozen=True)
class End:
    """The eigenvalues from one call of `eigsh`: `wanted` many, of which those that converged are here.

    `values` has shape (n,), `vectors` (N, n); `residuals`, the norms of ``H v - lambda v``, and what is `allowed` of
    them, (n,).
    """

    which: str
    wanted: int
    values: Array
    vectors: Array
    residuals: Array
    allowed: Array
    cost: Cost


@dataclass(frozen=True)
class Spectrum:
    """All eigenvalues asked for, and the cost of the one block product for their residuals."""

    ends: tuple[End, ...]
    residual_cost: Cost

    @property
    def ok(self) -> bool:
        """Whether all eigenvalues converged, in their true residuals too."""
        return all(len(end.values) == end.wanted and (end.residuals <= end.allowed).all() for end in self.ends)

    @property
    def arrays(self) -> dict[str, Array]:
        """The ends joined: eigenvalues (n,), eigenvectors (N, n), residuals (n,) and those allowed, and their ends."""
        return {
            "eigenvalues": np.concatenate([end.values for end in self.ends]),
            "eigenvectors": np.concatenate([end.vectors for end in self.ends], axis=1),
            "residuals": np.concatenate([end.residuals for end in self.ends]),
            "allowed_residuals": np.concatenate([end.allowed for end in self.ends]),
            "which": np.concatenate([np.full(len(end.values), end.which, dtype="U2") for end in self.ends]),
        }


@dataclass(frozen=True)
class Singular:
    """The `wanted` largest singular values of a Jacobian.

    `values` has shape (n,), the singular vectors `left` (N, n) and `right` (P, n), in that order; `residuals` are the
    norms of ``J v - sigma u`` and ``J' u - sigma v`` together, and `cost` includes them.
    """

    wanted: int
    values: Array
    left: Array
    right: Array
    residuals: Array
    allowed: Array
    cost: Cost

    @property
    def ok(self) -> bool:
        """Whether all converged, in their true residuals."""
        return bool((self.residuals <= self.allowed).all())

    @property
    def arrays(self) -> dict[str, Array]:
        """What is saved."""
        return {
            "singular_values": self.values,
            "left_vectors": self.left,
            "right_vectors": self.right,
            "residuals": self.residuals,
            "allowed_residuals": self.allowed,
        }


@dataclass(frozen=True)
class Solve:
    """The solution of ``(B + damping I) x = g`` for the gradient g and the block B of these parameters."""

    block: tuple[str, ...]
    N: int
    damping: float
    rtol: float
    result: SolveResult
    cost: Cost

    @property
    def ok(self) -> bool:
        """Whether the residual is what was asked for."""
        return self.result.converged


Result = Setup | Spectrum | Singular | DenseCheck | Solve


def save(path: Path, setup: Setup, spectrum: Spectrum | Singular, dense: DenseCheck) -> None:
    """Write eigenpairs, or singular values and vectors, to an ``.npz`` file, which appears only when it is complete.

    It holds the arrays of `spectrum`, ``param_names`` and ``param_slices`` (start and stop of each parameter's rows),
    and ``dense_eigenvalues`` (N,) where these were computed (for a Jacobian, of J' J). None of them is a pickled
    object.
    """
    arrays = {**spectrum.arrays, **param_arrays(setup.slices)}
    if dense.values is not None:
        arrays["dense_eigenvalues"] = dense.values
    save_arrays(path, **arrays)


def param_arrays(slices: dict[str, slice]) -> dict[str, Array]:
    """Return the names of parameters, and start and stop of each one's rows."""
    return {
        "param_names": np.array(list(slices), dtype=np.str_),
        "param_slices": np.array([(rows.start, rows.stop) for rows in slices.values()], dtype=np.int64),
    }


def save_arrays(path: Path, **arrays: Array) -> None:
    """Write arrays to an ``.npz`` file, which appears only when it is complete; no objects, which would be pickled."""
    # Not left to `allow_pickle` of `np.savez`: NumPy 2.0 takes that for the name of one more array.
    checked: dict[str, Any] = {name: np.asarray(array) for name, array in arrays.items()}
    if refused := [name for name, array in checked.items() if array.dtype.hasobject]:
        raise TypeError(
            f"{', '.join(refused)} cannot be saved in {path}, as their dtype holds Python objects: pass arrays of "
            "numbers, or of strings (dtype=np.str_)"
        )
    with appearing(path) as temporary, temporary.open("wb") as file:
        np.savez(file, **checked)


def load_arrays(path: str | os.PathLike[str], fields: Iterable[str], writer: str) -> dict[str, Array]:
    """Return the arrays of the ``.npz`` file that `writer` wrote, which has these `fields`; nothing in it is executed.

    Raises
    ------
    ValueError
        Where it is another file, or damaged.
    """
    advice = "pass a file that was, and is whole"
    try:
        with np.load(path, allow_pickle=False) as file:
            missing = [name for name in fields if name not in file]
            if not missing:
                return {name: file[name] for name in file}
    except (ValueError, TypeError, EOFError, zipfile.BadZipFile, zlib.error):  # pickles, text, .npy, a torn file
        raise ValueError(f"{os.fspath(path)} was not written by {writer}: {advice}") from None
    raise ValueError(f"{os.fspath(path)} was not written by {writer}, it lacks {', '.join(missing)}: {advice}")


@contextmanager
def appearing(path: Path) -> Iterator[Path]:
    """Give the place of a file that takes the place of `path` where nothing fails, and goes where something does."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        yield temporary
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
