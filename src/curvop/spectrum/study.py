"""The study behind ``curvop spectrum``: everything that is to be known of a spectrum, one step after another."""

from __future__ import annotations

import argparse
import functools
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from scipy.sparse.linalg import LinearOperator

from curvop.eigs import evaluated
from curvop.fingerprint import OtherProblemError
from curvop.journal import JournaledLinearOperator
from curvop.matrices import MATRICES, wrap
from curvop.problems import ProblemError
from curvop.records import RecordFileError
from curvop.spectrum.blocks import BlockStudy, blocks
from curvop.spectrum.eigen import eigsh
from curvop.spectrum.estimators import frobenius_norm, trace
from curvop.spectrum.findings import Findings
from curvop.spectrum.page import write_files
from curvop.spectrum.quadrature import density

__all__ = ["spectrum_study"]

_ESTIMATE_PRODUCTS = 60  # of the trace and of the norm
# When a step is to be over, as a part of the time until the deadline less what writing takes.
_WRITING = 3.0  # seconds
_SHARES = {"eigenvalues": 0.4, "estimates": 0.5, "density": 0.75, "blocks": 0.97}


class _DeadlineError(Exception):
    pass


class _Timed(LinearOperator):  # type: ignore[misc]
    """Multiplies as `A` does until the time is over."""

    def __init__(self, A: LinearOperator, until: float) -> None:
        super().__init__(A.dtype, A.shape)
        self._A, self._until = A, until

    def _matmat(self, X: Any) -> Any:
        if time.monotonic() > self._until:
            raise _DeadlineError
        return self._A @ X

    def _matvec(self, x: Any) -> Any:
        return self._matmat(x)

    def _adjoint(self) -> _Timed:
        return self

    _transpose = _adjoint


def spectrum_study(problem: dict[str, Any], options: argparse.Namespace) -> Findings:
    """Study a problem's matrix as the arguments of the command say, and write what is found where they say.

    Raises
    ------
    ProblemError
        Where the problem cannot be wrapped or evaluated, or the folder holds the study of another one.
    """
    begun = time.monotonic()
    whole, A = wrap(problem, options.matrix, options.dtype, options.engine, options.block)
    gradient, loss = evaluated(A)
    found = Findings(
        problem=options.problem,
        title=MATRICES[options.matrix].title,
        rows=A.shape[0],
        parameters=whole.shape[0],
        names=list(A.params_slices),
        loss=loss,
        gradient_norm=float(np.linalg.norm(gradient.astype(np.float64))),
    )
    out: Path | None = options.out
    try:
        journal = None if out is None else JournaledLinearOperator(A, _made(out) / "journal")
        try:
            _run(found, A, A if journal is None else journal, options, begun)
        finally:
            if journal is not None:
                journal.close()
    except (OtherProblemError, RecordFileError) as error:
        raise ProblemError(f"--out: {error}") from error
    found.products, found.seconds = found.products + A.num_products, time.monotonic() - begun
    if out is not None:
        write_files(found, out)
    return found


def _made(out: Path) -> Path:
    out.mkdir(exist_ok=True)
    return out


def _run(found: Findings, A: Any, recorded: LinearOperator, options: argparse.Namespace, begun: float) -> None:
    def until(step: str) -> float:
        if options.deadline is None:
            return float("inf")
        seconds: float = max(options.deadline - _WRITING, 0.5 * options.deadline)
        return begun + _SHARES[step] * seconds

    def left(step: str) -> float | None:
        return None if options.deadline is None else max(0.0, until(step) - time.monotonic())

    def attempt(what: str, step: str, run: Callable[[LinearOperator], Any]) -> Any:
        try:
            return run(_Timed(recorded, until(step)))
        except (_DeadlineError, TimeoutError) as error:
            found.undone.append(f"{what}: not done by the deadline" + (f" ({error})" if str(error) else ""))
            return None

    ends = {"LA": options.k} | ({"SA": min(5, options.k)} if options.matrix == "hessian" else {})
    for which, k in ends.items():
        search = functools.partial(eigsh, k=min(k, found.rows), which=which)
        result = attempt(f"eigenvalues {which}", "eigenvalues", search)
        if result is not None:
            found.ends.append(result)
    products = min(_ESTIMATE_PRODUCTS, 2 * found.rows)
    found.trace = attempt("trace", "estimates", lambda T: trace(T, products, rng=1))
    found.norm = attempt("norm", "estimates", lambda T: frobenius_norm(T, products, rng=2))
    checkpoint = None if options.out is None else options.out / "density"
    found.density = density(
        A, num_probes=options.probes, num_steps=options.steps, checkpoint=checkpoint, seconds=left("density")
    )
    if not found.density.complete:
        probes, steps = found.density.nodes.shape
        found.undone.append(f"density: {probes} probes of {steps} steps only, by the deadline")
    if options.blocks:
        kept = None if options.out is None else options.out / "blocks.npz"
        if kept is not None and kept.exists():
            found.blocks = BlockStudy.load(kept)
        else:
            found.blocks = attempt("blocks", "blocks", lambda _: blocks(A, seconds=left("blocks")))
            if found.blocks is not None:
                found.products += found.blocks.num_products
                if kept is not None:
                    found.blocks.save(kept)
