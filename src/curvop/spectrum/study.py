"""The study behind ``curvop spectrum``: everything that is to be known of a spectrum, one step after another."""

from __future__ import annotations

import argparse
import contextlib
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from scipy.sparse.linalg import LinearOperator

from curvop.eigs import evaluated
from curvop.fingerprint import OtherProblemError
from curvop.journal import JournaledLinearOperator, UnrecordedError
from curvop.matrices import MATRICES, wrap
from curvop.problems import ProblemError
from curvop.records import RecordFileError
from curvop.spectrum.blocks import blocks
from curvop.spectrum.eigen import eigsh
from curvop.spectrum.estimators import frobenius_norm, trace
from curvop.spectrum.findings import Findings
from curvop.spectrum.page import write_files
from curvop.spectrum.quadrature import density
from curvop.spectrum.timed import TimedOperator, end_of
from curvop.verdicts import quiet

__all__ = ["spectrum_study"]

_ESTIMATE_PRODUCTS = 60  # of the trace and of the norm
# When a step is to be over, as a part of the time until the deadline less what writing takes.
_WRITING = 3.0  # seconds
_EIGENVALUES, _ESTIMATES, _DENSITY, _BLOCKS = 0.4, 0.5, 0.75, 0.97


def spectrum_study(problem: dict[str, Any], options: argparse.Namespace, begun: float) -> Findings:
    """Study a problem's matrix as the arguments of the command say, and write what is found where they say.

    The deadline counts from `begun`, on the clock of ``time.monotonic``. What is under way is not broken off, so that
    it can be overrun: by the loss and its gradient, which are computed in any case; by a step of the density, one block
    product with as many vectors as it has probes, of which a first one is always made; and by the writing of files,
    where that takes more than three seconds. Any other step ends one product after its part of the time, or a block
    product of 16 vectors.

    Raises
    ------
    ProblemError
        Where the problem cannot be wrapped or evaluated, or the folder holds the study of another one.
    """
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
    def until(share: float) -> float:
        if options.deadline is None:
            return float("inf")
        seconds: float = max(options.deadline - _WRITING, 0.5 * options.deadline)
        return begun + share * seconds

    def left(share: float) -> float | None:
        return None if options.deadline is None else max(0.0, until(share) - time.monotonic())

    ends = {"LA": options.k} | ({"SA": min(5, options.k)} if options.matrix == "hessian" else {})
    for number, (which, k) in enumerate(ends.items(), 1):
        _eigenvalues(found, recorded, which, min(k, found.rows), left(_EIGENVALUES * number / len(ends)))
    products = min(_ESTIMATE_PRODUCTS, 2 * found.rows)
    for seed, (name, estimate) in enumerate({"trace": trace, "norm": frobenius_norm}.items(), 1):

        def run(A: LinearOperator, seconds: float | None, estimate: Any = estimate, seed: int = seed) -> Any:
            return estimate(TimedOperator(A, end_of(seconds)), products, rng=seed)

        try:
            setattr(found, name, _recalled(recorded, run, left(_ESTIMATES)))
        except TimeoutError:
            found.undone.append(f"{name}: not done by the deadline")
    checkpoint = None if options.out is None else options.out / "density"
    found.density = density(
        A, num_probes=options.probes, num_steps=options.steps, checkpoint=checkpoint, seconds=left(_DENSITY)
    )
    if not found.density.complete:
        probes, steps = found.density.nodes.shape
        found.undone.append(f"density: {probes} probes of {steps} steps only, by the deadline")
    _blocks(found, A, options, left(_BLOCKS))


def _recalled(A: LinearOperator, run: Callable[[LinearOperator, float | None], Any], seconds: float | None) -> Any:
    """Return ``run(A, seconds)``; without a limit where every product of it is on disk, so that nothing is lost."""
    if seconds is not None and isinstance(A, JournaledLinearOperator):
        with contextlib.suppress(UnrecordedError):
            return run(A.recall(), None)
    return run(A, seconds)


def _eigenvalues(found: Findings, A: LinearOperator, which: str, k: int, seconds: float | None) -> None:
    """Find those of one end, as far as there is time for it.

    The same method with and without a deadline: one study takes up the products that the other has recorded.
    """
    try:
        with quiet():
            result = _recalled(A, lambda B, limit: eigsh(B, k, which, method="device", seconds=limit), seconds)
    except TimeoutError:  # of a matrix so small that it is formed
        result = None
    if result is None or not len(result.values):
        found.undone.append(f"eigenvalues {which}: not done by the deadline")
        return
    found.ends.append(result)
    if result.timed_out and not result.converged:
        found.undone.append(f"eigenvalues {which}: {result.num_converged} of {k} converged by the deadline")
    elif result.certificate is None:
        found.undone.append(f"eigenvalues {which}: not certified by the deadline")


def _blocks(found: Findings, A: Any, options: argparse.Namespace, seconds: float | None) -> None:
    """Study the blocks where that is asked for; show those of an earlier run in any case."""
    kept, before = None if options.out is None else options.out / "blocks", 0
    if kept is not None and kept.exists():
        found.blocks = blocks(A, checkpoint=kept, seconds=0, progress=False)
        before = found.blocks.num_products
    if options.blocks:
        found.blocks = blocks(A, checkpoint=kept, seconds=seconds)
        found.products += found.blocks.num_products - before
        if found.blocks.unfinished:
            done, count = len(found.blocks.names), len(A.params_slices)
            found.undone.append(f"blocks: {f'{done} of {count}' if done else 'not'} done by the deadline")
    if found.blocks is not None and not found.blocks.names:
        found.blocks = None
