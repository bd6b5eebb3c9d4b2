"""What the ``curvop`` command prints: reports for people, JSON for programs."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from curvop.checks.dense_check import DenseCheck
from curvop.cli.problem_loading import MATRICES
from curvop.operators.engine_operator import Cost as ProductCost
from curvop.solvers.linear_solve import SolveResult
from curvop.storage.result_files import save_arrays

__all__ = [
    "ENDS",
    "Array",
    "Cost",
    "End",
    "Result",
    "Setup",
    "Singular",
    "Solve",
    "Spectrum",
    "eigs_json",
    "eigs_report",
    "num_products",
    "param_arrays",
    "save",
    "solve_json",
    "solve_report",
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


ENDS = {
    "LA": "largest",
    "SA": "smallest",
    "LM": "largest in magnitude",
    "SM": "smallest in magnitude",
    "BE": "half from each end",
}


def num_products(results: Sequence[Any]) -> int:
    """Return the number of products of all steps."""
    costs = [result.cost for result in results if isinstance(result, Setup | Singular | Solve)]
    for spectrum in (result for result in results if isinstance(result, Spectrum)):
        costs += [spectrum.residual_cost, *(end.cost for end in spectrum.ends)]
    return sum(cost.products for cost in costs)


def _text(cost: Cost) -> str:
    rate = cost.products / cost.seconds if cost.seconds else 0.0
    return f"{cost.products:,} product{'s' * (cost.products != 1)} in {cost.seconds:.2f} s ({rate:,.0f} products/s)"


def eigs_report(result: Result, options: argparse.Namespace) -> Iterator[str]:
    """Yield the lines for people to read."""
    if isinstance(result, Setup):
        yield f"{'Jacobian' if result.loss is None else MATRICES[options.matrix].title} of {options.problem}"
        yield f"  parameters     P = {result.P:,} ({result.model_dtype} on {result.device})"
        if result.loss is None:
            yield f"  predictions    N = {result.N:,}"
        if result.block:
            size = sum(rows.stop - rows.start for rows in result.slices.values())
            yield f"  block          {'N' if result.loss is not None else 'P'} = {size:,} ({', '.join(result.block)})"
        yield f"  vectors        {result.dtype}"
        if result.loss is not None:
            yield f"  loss           {result.loss:.6g}"
            yield f"  gradient norm  {result.gradient_norm:.3g}"
        yield f"  first pass     {_text(result.cost)}"
        if result.product:
            yield f"  cost           {result.product}"
    elif isinstance(result, Spectrum):
        for end in result.ends:
            yield from _table(end)
        if any(len(end.values) < end.wanted for end in result.ends):
            yield "Clustered eigenvalues, such as the zeros of a singular matrix, converge slowly or not at all."
        yield f"residuals: {_text(result.residual_cost)}"
    elif isinstance(result, Singular):
        yield f"{result.wanted} singular values, largest: {_text(result.cost)}"
        yield f"  {'':>4}  {'sigma':>18}  {'residual':>17}"
        yield from _rows(result)
    elif isinstance(result, DenseCheck):
        if result.reason:
            yield f"dense check: not done; {result.reason}"
        else:
            yield f"dense check: numpy.linalg.eigvalsh of the dense matrix in {result.seconds:.2f} s"
            yield f"  spectral norm                       {result.spectral_norm:.6g}"
            yield f"  largest difference / spectral norm  {result.difference:.1e} (allowed: {result.allowed:.1e})"
            hint = "; modules in training mode are the usual reason: call model.eval()" if result.training else ""
            yield "  agrees" if result.ok else f"  DOES NOT AGREE{hint}"
    else:
        yield f"solve (B + {result.damping:g} I) x = g, B the block of {', '.join(result.block)}"
        yield f"  unknowns                N = {result.N:,}"
        yield f"  {result.result.solver:<22}  {_text(result.cost)}"
        yield from _verdict(result.result, result.rtol, result.damping)


def _verdict(result: SolveResult, rtol: float, damping: float) -> Iterator[str]:
    yield f"  true relative residual  {result.residual:.1e} (asked for: {rtol:.1e})"
    if result.negative_curvature is not None:
        yield f"  INDEFINITE              an eigenvalue of B + {damping:g} I is at most {result.negative_curvature:.3g}"
        yield "                          a larger --damping, or --matrix ggn, makes it positive definite"
    elif result.solver == "minres":
        yield "  SINGULAR                to rounding; a larger --damping makes it positive definite"
    yield "  converged" if result.converged else "  NOT CONVERGED"


def _table(end: End) -> Iterator[str]:
    """Yield the lines of one end of the spectrum."""
    found = len(end.values)
    missing = "" if found == end.wanted else f", {end.wanted - found} of {end.wanted} NOT CONVERGED"
    yield f"{end.wanted} eigenvalues, {ENDS[end.which]} ({end.which}){missing}: {_text(end.cost)}"
    yield f"  {'':>4}  {'lambda':>18}  {'||Hv - lambda v||':>17}"
    yield from _rows(end)
    yield ""


def _rows(found: End | Singular) -> Iterator[str]:
    for i, value in enumerate(found.values):
        remark = "" if found.residuals[i] <= found.allowed[i] else f"  MISSED (allowed: {found.allowed[i]:.1e})"
        yield f"  {i + 1:>4}  {value:>18.10e}  {found.residuals[i]:>17.1e}{remark}"


def eigs_json(options: argparse.Namespace, results: Sequence[Any], seconds: float) -> dict[str, Any]:
    """Return what ``--json`` prints; eigenvalues and residuals in the order of the report."""
    setup, spectrum, dense, *solves = results
    arrays = {name: array.tolist() for name, array in spectrum.arrays.items() if "vectors" not in name}
    checked = {name: getattr(dense, name) for name in ("difference", "allowed", "spectral_norm", "seconds")}
    return {
        "problem": options.problem,
        "matrix": options.matrix,
        **{name: getattr(setup, name) for name in ("P", "N", "block", "dtype", "model_dtype", "loss", "gradient_norm")},
        **arrays,
        "converged": spectrum.ok,
        "dense": {"done": False, "reason": dense.reason}
        if dense.reason
        else {"done": True, "agrees": dense.ok, **checked},
        **({"solve": _solve_json(solves[0])} if solves else {}),
        "cost": asdict(setup.product) if setup.product else None,
        "products": num_products(results),
        "seconds": seconds,
    }


def _solve_json(solve: Solve) -> dict[str, Any]:
    asked = {name: getattr(solve, name) for name in ("block", "N", "damping", "rtol")}
    return asked | _solution_json(solve.result) | {"seconds": solve.cost.seconds}


def _solution_json(result: SolveResult) -> dict[str, Any]:
    found = asdict(result)
    del found["solution"]
    return found


def solve_report(operator: Any, result: SolveResult, loss: float, options: argparse.Namespace) -> Iterator[str]:
    """Yield the lines of ``curvop solve``."""
    yield f"{MATRICES[options.matrix].title} B of {options.problem}"
    yield f"  unknowns                N = {operator.shape[0]:,} ({', '.join(operator.params_slices)})"
    yield f"  loss                    {loss:.6g}"
    yield f"solve (B + {options.damping:g} I) x = g, g the gradient"
    if options.rank:
        yield f"  preconditioner          Nystrom of rank {options.rank}, {options.rank} products"
    yield f"  {result.solver:<22}  {result.products:,} product{'s' * (result.products != 1)}"
    yield from _verdict(result, options.rtol, options.damping)


def solve_json(operator: Any, result: SolveResult, loss: float, options: argparse.Namespace) -> dict[str, Any]:
    """Return what ``curvop solve --json`` prints."""
    asked = {name: getattr(options, name) for name in ("problem", "matrix", "damping", "rtol", "rank")}
    return {
        **asked,
        "block": list(operator.params_slices),
        "N": operator.shape[0],
        "loss": loss,
        **_solution_json(result),
    }
