"""The study behind ``curvop eigs``, apart from how it is shown: `study` yields each result as soon as it is there."""

import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.sparse.linalg import ArpackNoConvergence, cg, eigsh

from curvop.dense import DenseCheck, accuracy, dense_check
from curvop.hessian import HessianLinearOperator
from curvop.problems import ProblemError, describe_error, last_layer, one_line

__all__ = ["Cost", "End", "Result", "Setup", "Solve", "Spectrum", "save", "study"]

Array = npt.NDArray[Any]

_MAX_RESTARTS = 1000  # of each `eigsh`, 10,000 products and more; SciPy's 10 N would let a large problem run for ever


@dataclass
class Cost:
    """What a step took: the number of products (columns multiplied), and the time in seconds."""

    products: int = 0
    seconds: float = 0.0


@dataclass(frozen=True)
class Setup:
    """The matrix that is studied, N rows of a Hessian with P; `cost` is that of the first pass over the data.

    `slices` are the rows of each parameter in the matrix; `block` names the parameters where they are not all. `norm`
    is the norm of the matrix times a standard normal vector, which estimates the matrix's Frobenius norm.
    """

    P: int
    N: int
    slices: dict[str, slice]
    block: tuple[str, ...] | None
    dtype: str
    model_dtype: str
    device: str
    loss: float
    gradient_norm: float
    norm: float
    cost: Cost
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
class Solve:
    """The solution of ``(B + damping I) x = g``: `residual` is the true one, relative to the norm of g.

    `rtol` is what `cg` was to reach in its own, recursive, residual, and `ok` whether it did and the true one is
    within `allowed`.
    """

    block: tuple[str, ...]
    N: int
    damping: float
    rtol: float
    allowed: float
    residual: float
    ok: bool
    cost: Cost


Result = Setup | Spectrum | DenseCheck | Solve


def study(
    problem: dict[str, Any],
    *,
    ends: Sequence[tuple[str, int]],
    tol: float,
    dtype: str,
    block: Sequence[str] | None,
    damping: float,
    bar: Any,
) -> Iterator[Result]:
    """Study the Hessian of a problem.

    Parameters
    ----------
    problem : dict
        As `curvop.problems.load` returns it.
    ends : sequence of (str, int)
        Which eigenvalues, in `eigsh`'s words, and how many of them; one call of `eigsh` each.
    tol : float
        `eigsh`'s relative accuracy of an eigenvalue; 0 is machine precision.
    dtype : str
        Of the vectors: ``'float32'`` or ``'float64'``.
    block : sequence of str or None
        The parameters that the study is restricted to; None: all.
    damping : float
        Is added to the diagonal in the linear system.
    bar : tqdm.tqdm
        Counts the products; its description names the step.

    Yields
    ------
    Setup, Spectrum, DenseCheck, Solve
        One of each, in this order.

    Raises
    ------
    ProblemError
        If the problem cannot be wrapped or evaluated, or is too small for the number of eigenvalues.
    """
    hessian, operator = _wrap(problem, dtype, block, bar)
    N, most = operator.shape[0], max(count for _, count in ends)
    if most >= N:
        raise ProblemError(f"--k = {most} is too large: eigsh finds at most N - 1 eigenvalues, and here N = {N:,}")
    # Parameters given as a list get their names from the operator, which keeps their order.
    values = problem["params"].values() if isinstance(problem["params"], Mapping) else problem["params"]
    problem = {**problem, "params": dict(zip(hessian.params_slices, values, strict=True))}
    setup = _first_pass(problem, hessian, operator, block)
    yield setup

    precision = accuracy(setup.dtype, setup.model_dtype)
    spectrum = _spectrum(operator, ends, tol, precision * setup.norm, bar)
    yield spectrum

    bar.set_description_str("dense check")
    found = [(end.which, end.wanted, end.values) for end in spectrum.ends]
    yield dense_check(problem, list(setup.slices), found, tol + precision)

    part = operator if setup.block else hessian.block(last_layer(list(setup.slices)))
    yield _solve(part, damping, precision, bar)


def save(path: Path, setup: Setup, spectrum: Spectrum, dense: DenseCheck) -> None:
    """Write the eigenpairs to an ``.npz`` file, which appears only when it is complete.

    It holds the arrays of `spectrum`, ``param_names`` and ``param_slices`` (start and stop of each parameter's rows),
    and ``dense_eigenvalues`` (N,) where these were computed. None of them is a pickled object.
    """
    arrays = {
        **spectrum.arrays,
        "param_names": np.array(list(setup.slices), dtype=np.str_),
        "param_slices": np.array([(rows.start, rows.stop) for rows in setup.slices.values()], dtype=np.int64),
    }
    if dense.values is not None:
        arrays["dense_eigenvalues"] = dense.values
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with temporary.open("wb") as file:
            np.savez(file, allow_pickle=False, **arrays)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def _measured(operator: Any) -> Iterator[Cost]:
    """Give a cost that is filled in at the end."""
    cost, products, start = Cost(), operator.num_products, time.perf_counter()
    try:
        yield cost
    finally:
        cost.products, cost.seconds = operator.num_products - products, time.perf_counter() - start


def _wrap(problem: dict[str, Any], dtype: str, block: Sequence[str] | None, bar: Any) -> tuple[Any, Any]:
    """Return the operators of the Hessian and of the part of it that is studied."""
    try:
        hessian = HessianLinearOperator(**problem, dtype=np.dtype(dtype), progress=bar)
    except (ValueError, TypeError) as error:
        raise ProblemError(one_line(error)) from error
    try:
        return hessian, hessian if block is None else hessian.block(block)
    except ValueError as error:  # the operator calls this argument 'rows'
        raise ProblemError(f"--block: {str(error).removeprefix('rows').lstrip(': ')}") from error


def _first_pass(problem: dict[str, Any], hessian: Any, operator: Any, block: Sequence[str] | None) -> Setup:
    """Evaluate the loss, its gradient and one product: what cannot be differentiated twice fails here and at once."""
    with _measured(operator) as cost:
        try:
            gradient, loss = operator.gradient_and_loss()
            product = operator @ np.random.default_rng(0).standard_normal(operator.shape[0])
        except Exception as error:  # the user's model, loss and data run here for the first time
            raise ProblemError(f"the problem cannot be evaluated: {describe_error(error)}") from error
    if not product.any():  # ARPACK would complain of its starting vector
        raise ProblemError("the matrix is zero: the loss is linear in these parameters, or does not depend on them")
    first = next(iter(problem["params"].values()))
    return Setup(
        P=hessian.shape[0],
        N=operator.shape[0],
        slices=dict(operator.params_slices),
        block=None if block is None else tuple(operator.params_slices),
        dtype=operator.dtype.name,
        model_dtype=str(first.dtype).removeprefix("torch."),
        device=str(first.device),
        loss=loss,
        gradient_norm=float(np.linalg.norm(gradient.astype(np.float64))),
        norm=float(np.linalg.norm(product)),
        cost=cost,
    )


def _spectrum(operator: Any, ends: Sequence[tuple[str, int]], tol: float, rounding: float, bar: Any) -> Spectrum:
    """Find the ends of the spectrum, and the residuals of all eigenpairs, up to `rounding`, with one block product."""
    pairs = []
    for which, wanted in ends:
        bar.set_description_str(f"eigsh {which}")
        with _measured(operator) as cost:
            values, vectors = _eigsh(operator, which, wanted, tol)
        pairs.append((which, wanted, values, vectors, cost))
    bar.set_description_str("residuals")
    with _measured(operator) as residual_cost:
        images = operator @ np.concatenate([vectors for *_, vectors, _ in pairs], axis=1)
    found, starts = [], np.cumsum([len(values) for _, _, values, _, _ in pairs])[:-1]
    for (which, wanted, values, vectors, cost), image in zip(pairs, np.split(images, starts, axis=1), strict=True):
        # In double precision, as the eigenvalues are: in single, the subtraction would add an error of its own.
        residuals = np.linalg.norm(image.astype(np.float64) - vectors * values, axis=0)
        allowed = 2 * tol * np.abs(values) + rounding  # ARPACK promises tol |lambda|, by an estimate of its own
        found.append(End(which, wanted, values, vectors, residuals, allowed, cost))
    return Spectrum(tuple(found), residual_cost)


def _eigsh(operator: Any, which: str, wanted: int, tol: float) -> tuple[Array, Array]:
    """Return the eigenpairs that converged, the outermost (for SM the smallest in magnitude) first."""
    rng = np.random.default_rng(0)
    start = rng.standard_normal(operator.shape[0]).astype(operator.dtype, copy=False)  # the same in every run
    # At a crowded end, SciPy's own 20 vectors for a few eigenvalues take twice as many products (digits: 1,840 to 860).
    basis = min(len(start), max(2 * wanted + 1, 30))
    options = {"tol": tol, "v0": start, "ncv": basis, "rng": rng, "maxiter": min(10 * len(start), _MAX_RESTARTS)}
    try:
        values, vectors = eigsh(operator, wanted, which=which, **options)
    except ArpackNoConvergence as error:
        values, vectors = error.eigenvalues, error.eigenvectors
    values = values.astype(np.float64)
    key = {"LA": -values, "LM": -np.abs(values), "SM": np.abs(values)}.get(which, values)
    order = np.argsort(key, kind="stable")
    return values[order], vectors[:, order]


def _solve(block: Any, damping: float, rtol: float, bar: Any) -> Solve:
    """Solve with the damped block for its own gradient."""
    bar.set_description_str("cg")
    gradient, damped = block.gradient_and_loss()[0], block.damped(damping)
    with _measured(damped) as cost:
        x, info = cg(damped, gradient, rtol=rtol)
        # cg itself watches only a residual that it updates, which can drift away from the true one.
        difference = gradient.astype(np.float64) - (damped @ x).astype(np.float64)
    norm = float(np.linalg.norm(gradient.astype(np.float64)))
    residual = float(np.linalg.norm(difference)) / norm if norm else 0.0
    allowed = 10 * rtol  # rounding adds to the true residual what the recursive one does not see
    ok = info == 0 and residual <= allowed
    return Solve(tuple(block.params_slices), block.shape[0], damping, rtol, allowed, residual, ok, cost)
