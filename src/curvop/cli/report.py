"""Results of ``curvop eigs`` and ``curvop solve``, and their text and JSON output."""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from curvop.checks.compare import Comparison
from curvop.checks.dense_check import DenseCheck
from curvop.cli.problem_loading import MATRICES
from curvop.operators.engine_operator import Cost as ProductCost
from curvop.operators.summaries import with_error
from curvop.solvers.linear_solve import SolveResult
from curvop.spectrum.eigen_result import NO_TIME, EigenResult
from curvop.storage.result_files import FORMAT, save_arrays

__all__ = [
    "ENDS",
    "Array",
    "End",
    "Result",
    "Setup",
    "Singular",
    "Solve",
    "StepCost",
    "eigen_arrays",
    "eigs_json",
    "eigs_report",
    "end_json",
    "num_products",
    "number_json",
    "param_arrays",
    "save",
    "solve_json",
    "solve_report",
]

Array = npt.NDArray[Any]

ENDS = {
    "LA": "largest",
    "SA": "smallest",
    "LM": "largest in magnitude",
    "SM": "smallest in magnitude",
    "BE": "half from each end",
}
"""Descriptions of the ends of a spectrum. The keys are values of `which` in `curvop.spectrum.eigsh`."""


@dataclass
class StepCost:
    """Cost of one step: the number of products with one vector, and the time in seconds."""

    products: int = 0
    seconds: float = 0.0


@dataclass(frozen=True)
class Setup:
    """Description of the matrix in a study.

    Attributes
    ----------
    P : int
        Number of parameters of the problem.
    N : int
        Number of rows of the matrix. For a Jacobian, this is the number of predictions.
    slices : dict of str to slice
        The rows of the matrix that belong to each parameter (for a Jacobian, the columns).
    block : tuple of str or None
        Names of the parameters of the block, or None for the whole matrix.
    dtype, model_dtype : str
        Dtypes of the vectors and of the parameters.
    device : str
        Device of the parameters.
    loss, gradient_norm : float or None
        The loss, and the norm of its gradient. Both are None for a Jacobian.
    norm : float
        Norm of the product of the matrix with a standard normal vector, which is an estimate of the Frobenius norm.
    cost : StepCost
        Cost of the first evaluation of the problem.
    product : curvop.operators.engine_operator.Cost or None
        Cost of one product, or None if it was not measured.
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
    cost: StepCost
    product: ProductCost | None
    ok: bool = True


@dataclass(frozen=True)
class End:
    """Eigenvalues at one end of the spectrum.

    Attributes
    ----------
    result : EigenResult
        The eigenpairs and their certificate.
    allowed : ndarray, shape (n,)
        Largest residuals that are expected of converged eigenpairs. The key ``converged`` of the JSON output uses them.
    cost : StepCost
        Cost of the solver and of the certificate.
    """

    result: EigenResult
    allowed: Array
    cost: StepCost

    @property
    def ok(self) -> bool:
        """True if the solver converged and the certificate reports no problem."""
        return self.result.ok

    @property
    def timed_out(self) -> bool:
        """True if time ran out before all eigenvalues were certified."""
        return not self.ok and (self.result.timed_out or NO_TIME in self.result.note)

    @property
    def residuals(self) -> Array:
        """Norms of ``H v - lambda v``, or NaN if there was no time to compute them."""
        certificate = self.result.certificate
        return np.full(len(self.result.values), np.nan) if certificate is None else certificate.residuals


def eigen_arrays(ends: Sequence[End]) -> dict[str, Array]:
    """Return arrays of the eigenpairs of all ends, in ascending order. The keys are the names in the ``.npz`` file."""
    arrays = {
        "eigenvalues": np.concatenate([end.result.values for end in ends]),
        "eigenvectors": np.concatenate([end.result.vectors for end in ends], axis=1),
        "residuals": np.concatenate([end.residuals for end in ends]),
        "allowed_residuals": np.concatenate([end.allowed for end in ends]),
        "which": np.concatenate([np.full(len(end.allowed), end.result.which, dtype="U2") for end in ends]),
    }
    order = np.argsort(arrays["eigenvalues"], kind="stable")
    return {name: array[..., order] for name, array in arrays.items()}


@dataclass(frozen=True)
class Singular:
    """The largest singular values of a Jacobian.

    Attributes
    ----------
    wanted : int
        Number of singular values requested.
    values : ndarray, shape (n,)
        The singular values, in descending order.
    left : ndarray, shape (N, n)
        The left singular vectors.
    right : ndarray, shape (P, n)
        The right singular vectors.
    residuals : ndarray, shape (n,)
        Norms of the concatenation of ``J v - sigma u`` and ``J' u - sigma v``.
    allowed : ndarray, shape (n,)
        Largest accepted residuals.
    cost : StepCost
        Cost of the solver and of the residuals.
    undone : str
        The reason why the solver found no singular values, or an empty string.
    timed_out : bool
        Whether time ran out.
    """

    wanted: int
    values: Array
    left: Array
    right: Array
    residuals: Array
    allowed: Array
    cost: StepCost
    undone: str = ""
    timed_out: bool = False

    @property
    def ok(self) -> bool:
        """True if the solver converged and no true residual is too large."""
        return not self.undone and bool((self.residuals <= self.allowed).all())

    @property
    def arrays(self) -> dict[str, Array]:
        """Arrays of the result. The keys are the names in the ``.npz`` file."""
        return {
            "singular_values": self.values,
            "left_vectors": self.left,
            "right_vectors": self.right,
            "residuals": self.residuals,
            "allowed_residuals": self.allowed,
        }


@dataclass(frozen=True)
class Solve:
    """Solution of ``(B + damping I) x = g``, where B is the matrix and g the gradient for the parameters in `block`."""

    block: tuple[str, ...]
    N: int
    damping: float
    rtol: float
    result: SolveResult
    cost: StepCost

    @property
    def ok(self) -> bool:
        """True if the true residual is small enough."""
        return bool(self.result.converged)


#: What stopped a solver that did not converge, by `SolveResult.status`.
_NOT_CONVERGED = {
    "maxiter": "the number of steps is too small: increase --maxiter or --damping, or use 'curvop solve --rank'",
    "seconds": "out of time: increase --seconds or --damping, or use 'curvop solve --rank'",
    "precision": "the precision of the products does not allow a smaller residual",
    "stagnation": "rounding errors prevent a smaller residual",
}

Result = Setup | End | Singular | DenseCheck | Solve


def save(path: Path, results: Sequence[Any]) -> None:
    """Save eigenpairs, or singular values and vectors, to an ``.npz`` file.

    The file contains the arrays of the results so far, and the arrays of `param_arrays`, which tell which rows of the
    vectors belong to which parameter. If the dense matrix was computed, the file also contains its eigenvalues as
    ``dense_eigenvalues`` (for a Jacobian, the eigenvalues of J' J). The file contains no pickled objects. An existing
    file is replaced only after the new file is complete.
    """
    arrays = {**_spectrum(results), **param_arrays(results[0].slices)}
    for dense in (result for result in results if isinstance(result, DenseCheck)):
        if dense.values is not None:
            arrays["dense_eigenvalues"] = dense.values
    save_arrays(path, **arrays)


def _spectrum(results: Sequence[Any]) -> dict[str, Array]:
    singular = [result for result in results if isinstance(result, Singular)]
    return singular[0].arrays if singular else eigen_arrays([result for result in results if isinstance(result, End)])


def param_arrays(slices: dict[str, slice]) -> dict[str, Array]:
    """Return two arrays in a dictionary: the names of the parameters, and the start and stop row of each parameter."""
    return {
        "param_names": np.array(list(slices), dtype=np.str_),
        "param_slices": np.array([(rows.start, rows.stop) for rows in slices.values()], dtype=np.int64),
    }


def num_products(results: Sequence[Any]) -> int:
    """Return the total number of products that were computed for all results."""
    return sum(result.cost.products for result in results if not isinstance(result, DenseCheck))


def eigs_report(result: Result, options: argparse.Namespace) -> Iterator[str]:
    """Yield the lines of the report on one result."""
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
        yield f"  first pass     {_cost_text(result.cost)}"
        if result.product:
            yield f"  cost           {result.product}"
    elif isinstance(result, End):
        yield str(result.result)
        if not result.result.converged and not result.timed_out:
            yield "Clustered eigenvalues, such as the zeros of a singular matrix, converge slowly, or not at all."
    elif isinstance(result, Singular) and result.undone:
        yield f"{result.wanted} singular values: {result.undone}"
    elif isinstance(result, Singular):
        yield f"{result.wanted} singular values, largest: {_cost_text(result.cost)}"
        yield f"  {'':>4}  {'sigma':>18}  {'residual':>17}"
        yield from _rows(result)
    elif isinstance(result, DenseCheck):
        if result.reason:
            yield f"dense check: not done; {result.reason}"
        else:
            yield f"dense check: numpy.linalg.eigvalsh of the dense matrix in {result.seconds:.2f} s"
            yield f"  spectral norm                       {result.spectral_norm:.6g}"
            yield f"  largest difference / spectral norm  {result.difference:.1e} (allowed: {result.allowed:.1e})"
            hint = "; modules in training mode are the usual cause: call model.eval()" if result.training else ""
            yield "  agrees" if result.ok else f"  DOES NOT AGREE{hint}"
    else:
        yield f"solve (B + {result.damping:g} I) x = g, where B is the block of {', '.join(result.block)}"
        yield f"  unknowns                N = {result.N:,}"
        yield f"  {result.result.solver:<22}  {_cost_text(result.cost)}"
        yield from _solve_lines(result.result, result.rtol, result.damping)


def eigs_json(options: argparse.Namespace, results: Sequence[Any], seconds: float) -> dict[str, Any]:
    """Return the results of ``curvop eigs`` as a JSON serializable dictionary.

    The eigenvalues of all ends are sorted together in ascending order, and their residuals have the same order. The
    list ``ends`` has the error bounds and the verdict of each end. Singular values are in descending order. Without
    ``--check``, ``dense`` and ``solve`` are None.
    """
    setup = results[0]
    ends = [result for result in results if isinstance(result, End)]
    arrays = {name: array.tolist() for name, array in _spectrum(results).items() if "vectors" not in name}
    if ends:
        arrays["residuals"] = [number_json(value) for value in arrays["residuals"]]
    certified = {
        "ok": all(result.ok for result in results),
        **({"ends": [end_json(end.result) for end in ends]} if ends else {}),
    }
    dense = next((_dense_json(result) for result in results if isinstance(result, DenseCheck)), None)
    solve = next((_solve_json(result) for result in results if isinstance(result, Solve)), None)
    return {
        "format": FORMAT,
        "problem": options.problem,
        "matrix": options.matrix,
        **{name: getattr(setup, name) for name in ("P", "N", "block", "dtype", "model_dtype", "loss", "gradient_norm")},
        **arrays,
        "converged": all(_has_converged(result) for result in results if isinstance(result, End | Singular)),
        **certified,
        "dense": dense,
        **({"solve": solve} if ends else {}),
        "cost": asdict(setup.product) if setup.product else None,
        "products": num_products(results),
        "seconds": seconds,
    }


def _has_converged(result: End | Singular) -> bool:
    if isinstance(result, Singular):
        return result.ok
    return result.result.converged and bool((result.residuals <= result.allowed).all())


def _dense_json(dense: DenseCheck) -> dict[str, Any]:
    if dense.reason:
        return {"done": False, "reason": dense.reason}
    numbers = {name: getattr(dense, name) for name in ("difference", "allowed", "spectral_norm", "seconds")}
    return {"done": True, "agrees": dense.ok, **numbers}


def end_json(end: EigenResult) -> dict[str, Any]:
    """Return the eigenvalues of one end and their certificate as a JSON serializable dictionary, without vectors."""
    return {
        "which": end.which,
        "values": [float(value) for value in end.values],
        "bounds": [] if end.certificate is None else [number_json(bound) for bound in end.certificate.bounds],
        "converged": end.num_converged,
        "ok": end.ok,
        "verdict": end.verdict,
    }


def number_json(value: Any) -> float | None:
    """Return a number as JSON can hold it: None if it is not finite."""
    return float(value) if value is not None and math.isfinite(value) else None


def solve_report(
    operator: Any, result: SolveResult, loss: float, comparison: Comparison | None, options: argparse.Namespace
) -> Iterator[str]:
    """Yield the lines of the report of ``curvop solve``. `comparison` shows the error of the preconditioner."""
    yield f"{MATRICES[options.matrix].title} B of {options.problem}"
    yield f"  unknowns                N = {operator.shape[0]:,} ({', '.join(operator.params_slices)})"
    yield f"  loss                    {loss:.6g}"
    yield f"solve (B + {options.damping:g} I) x = g, where g is the gradient"
    if comparison is not None:
        count = comparison.num_products
        text = f"relative error {with_error(*comparison.whole.error)} (from {count:,} product{'s' * (count != 1)})"
        yield f"  preconditioner          {options.preconditioner.upper()}, {text}"
    if options.rank:
        yield f"  preconditioner          Nystrom of rank {options.rank}, {options.rank} products"
    yield f"  {result.solver:<22}  {result.products:,} product{'s' * (result.products != 1)}"
    yield from _solve_lines(result, options.rtol, options.damping)


def solve_json(
    operator: Any, result: SolveResult, loss: float, comparison: Comparison | None, options: argparse.Namespace
) -> dict[str, Any]:
    """Return the results of ``curvop solve`` as a JSON serializable dictionary."""
    preconditioner: dict[str, Any] = {}
    if comparison is not None:
        value, error = comparison.whole.error
        found = {"value": value, "error": error, "products": comparison.num_products}
        preconditioner = {"preconditioner": options.preconditioner, "preconditioner_error": found}
    return {
        **{name: getattr(options, name) for name in ("problem", "matrix", "damping", "rtol", "rank")},
        **preconditioner,
        "block": list(operator.params_slices),
        "N": operator.shape[0],
        "loss": loss,
        **_solution_json(result),
    }


def _cost_text(cost: StepCost) -> str:
    rate = cost.products / cost.seconds if cost.seconds else 0.0
    return f"{cost.products:,} product{'s' * (cost.products != 1)} in {cost.seconds:.2f} s ({rate:,.0f} products/s)"


def _rows(singular: Singular) -> Iterator[str]:
    for i, value in enumerate(singular.values):
        allowed, residual = singular.allowed[i], singular.residuals[i]
        remark = "" if residual <= allowed else f"  TOO LARGE (allowed: {allowed:.1e})"
        yield f"  {i + 1:>4}  {value:>18.10e}  {residual:>17.1e}{remark}"


def _solve_lines(result: SolveResult, rtol: float, damping: float) -> Iterator[str]:
    yield f"  true relative residual  {result.residual:.1e} (requested: {rtol:.1e})"
    if result.negative_curvature is not None:
        yield f"  INDEFINITE              an eigenvalue of B + {damping:g} I is at most {result.negative_curvature:.3g}"
        yield "                          a larger --damping, or --matrix ggn, makes it positive definite"
    elif result.solver == "minres":
        yield "  SINGULAR                up to rounding; a larger --damping makes it positive definite"
    reason = _NOT_CONVERGED.get(result.status, "")
    yield "  converged" if result.converged else f"  NOT CONVERGED           {reason}".rstrip()


def _solve_json(solve: Solve) -> dict[str, Any]:
    arguments = {name: getattr(solve, name) for name in ("block", "N", "damping", "rtol")}
    return arguments | _solution_json(solve.result) | {"seconds": solve.cost.seconds}


def _solution_json(result: SolveResult) -> dict[str, Any]:
    fields = asdict(result)
    del fields["solution"], fields["preconditioner"]  # the command never chooses one by itself
    return fields
