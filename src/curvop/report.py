"""What the ``curvop`` command prints: reports for people, JSON for programs."""

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import Any

from curvop.dense import DenseCheck
from curvop.matrices import MATRICES
from curvop.results import Cost, End, Result, Setup, Spectrum
from curvop.solvers import SolveResult

__all__ = ["ENDS", "eigs_json", "eigs_report", "num_products", "solve_json", "solve_report"]

ENDS = {
    "LA": "largest",
    "SA": "smallest",
    "LM": "largest in magnitude",
    "SM": "smallest in magnitude",
    "BE": "half from each end",
}


def num_products(results: Sequence[Any]) -> int:
    """Return the number of products of all steps."""
    setup, spectrum, _, solve = results
    costs = [setup.cost, spectrum.residual_cost, solve.cost, *(end.cost for end in spectrum.ends)]
    return sum(cost.products for cost in costs)


def _text(cost: Cost) -> str:
    rate = cost.products / cost.seconds if cost.seconds else 0.0
    return f"{cost.products:,} product{'s' * (cost.products != 1)} in {cost.seconds:.2f} s ({rate:,.0f} products/s)"


def eigs_report(result: Result, options: argparse.Namespace) -> Iterator[str]:
    """Yield the lines for people to read."""
    if isinstance(result, Setup):
        yield f"{MATRICES[options.matrix].title} of {options.problem}"
        yield f"  parameters     P = {result.P:,} ({result.model_dtype} on {result.device})"
        if result.block:
            yield f"  block          N = {result.N:,} ({', '.join(result.block)})"
        yield f"  vectors        {result.dtype}"
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
        yield f"solve (B + {result.damping:g} I) x = g with cg, B the block of {', '.join(result.block)}"
        yield f"  unknowns                N = {result.N:,}"
        yield f"  cg                      {_text(result.cost)}"
        yield f"  true relative residual  {result.residual:.1e} (allowed: {result.allowed:.1e})"
        yield "  converged" if result.ok else "  NOT CONVERGED; where B is indefinite, a larger --damping helps"


def _table(end: End) -> Iterator[str]:
    """Yield the lines of one end of the spectrum."""
    found = len(end.values)
    missing = "" if found == end.wanted else f", {end.wanted - found} of {end.wanted} NOT CONVERGED"
    yield f"{end.wanted} eigenvalues, {ENDS[end.which]} ({end.which}){missing}: {_text(end.cost)}"
    yield f"  {'':>4}  {'lambda':>18}  {'||Hv - lambda v||':>17}"
    for i, value in enumerate(end.values):
        remark = "" if end.residuals[i] <= end.allowed[i] else f"  MISSED (allowed: {end.allowed[i]:.1e})"
        yield f"  {i + 1:>4}  {value:>18.10e}  {end.residuals[i]:>17.1e}{remark}"
    yield ""


def eigs_json(options: argparse.Namespace, results: Sequence[Any], seconds: float) -> dict[str, Any]:
    """Return what ``--json`` prints; eigenvalues and residuals in the order of the report."""
    setup, spectrum, dense, solve = results
    joined = spectrum.arrays
    checked = {name: getattr(dense, name) for name in ("difference", "allowed", "spectral_norm", "seconds")}
    return {
        "problem": options.problem,
        "matrix": options.matrix,
        **{name: getattr(setup, name) for name in ("P", "N", "block", "dtype", "model_dtype", "loss", "gradient_norm")},
        **{name: joined[name].tolist() for name in ("eigenvalues", "residuals", "allowed_residuals", "which")},
        "converged": spectrum.ok,
        "dense": {"done": False, "reason": dense.reason}
        if dense.reason
        else {"done": True, "agrees": dense.ok, **checked},
        "cg": {
            **{name: getattr(solve, name) for name in ("block", "N", "damping", "rtol", "allowed", "residual")},
            "converged": solve.ok,
            **asdict(solve.cost),
        },
        "cost": asdict(setup.product) if setup.product else None,
        "products": num_products(results),
        "seconds": seconds,
    }


def solve_report(operator: Any, result: SolveResult, loss: float, options: argparse.Namespace) -> Iterator[str]:
    """Yield the lines of ``curvop solve``."""
    yield f"{MATRICES[options.matrix].title} B of {options.problem}"
    yield f"  unknowns                N = {operator.shape[0]:,} ({', '.join(operator.params_slices)})"
    yield f"  loss                    {loss:.6g}"
    yield f"solve (B + {options.damping:g} I) x = g, g the gradient"
    if options.rank:
        yield f"  preconditioner          Nystrom of rank {options.rank}, {options.rank} products"
    yield f"  {result.solver:<22}  {result.products:,} product{'s' * (result.products != 1)}"
    yield f"  true relative residual  {result.residual:.1e} (asked for: {options.rtol:.1e})"
    if result.negative_curvature is not None:
        bound = f"an eigenvalue of B + {options.damping:g} I is at most {result.negative_curvature:.3g}"
        yield f"  INDEFINITE              {bound}"
        yield "                          a larger --damping, or --matrix ggn, makes it positive definite"
    yield "  converged" if result.converged else "  NOT CONVERGED"


def solve_json(operator: Any, result: SolveResult, loss: float, options: argparse.Namespace) -> dict[str, Any]:
    """Return what ``curvop solve --json`` prints."""
    found = asdict(result)
    del found["solution"]
    asked = {name: getattr(options, name) for name in ("problem", "matrix", "damping", "rtol", "rank")}
    return {**asked, "block": list(operator.params_slices), "N": operator.shape[0], "loss": loss, **found}
