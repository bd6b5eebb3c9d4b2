"""Run ``curvop spectrum`` in steps: eigenvalues, trace, norm, density and blocks.

If there is an output folder, a journal records all products, and the result files are rewritten after each step. A
study with an output folder can therefore be resumed after it was killed. If there is a deadline, each step gets a
fraction of the available time.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from scipy.sparse.linalg import LinearOperator

from curvop.cli.arguments import JOURNAL, operator_settings
from curvop.cli.eigs_study import evaluated
from curvop.cli.html_report import StudyFiles, StudyResults
from curvop.cli.problem_loading import MATRICES, ProblemError, wrap
from curvop.operators.error_text import describe_error, one_line
from curvop.operators.progress import step_bar
from curvop.operators.validation import available_bytes, check_fits
from curvop.spectrum.blocks import blocks
from curvop.spectrum.counting import CountedOperator, TimedOperator, deadline_after
from curvop.spectrum.density import density
from curvop.spectrum.eigen import eigsh, without_verdicts
from curvop.spectrum.estimators import frobenius_norm, trace
from curvop.spectrum.lanczos import bytes_of_run, device_of
from curvop.storage.fingerprint import OtherProblemError
from curvop.storage.journal import JournaledLinearOperator, UnrecordedError
from curvop.storage.records import RecordFileError

__all__ = ["spectrum_study"]

_ESTIMATE_PRODUCTS = 60  # number of products for the trace; the norm takes as many
# The available time is the time until the deadline, minus the time reserved for writing files. The following fractions
# of the available time are the time limits of the steps, counted from the start of the study.
_WRITING = 3.0  # seconds
_EIGENVALUES, _ESTIMATES, _DENSITY, _BLOCKS = 0.4, 0.5, 0.75, 0.97

Step = Callable[[], None]


def spectrum_study(problem: dict[str, Any], options: argparse.Namespace, start: float) -> StudyResults:
    """Study the spectrum of a problem's matrix, and write the results to the folder ``options.out``.

    If ``options.out`` is None, no files are written. Otherwise, the files are written after each step, and also if a
    step fails, so that no results are lost.

    Parameters
    ----------
    problem : dict
        The problem, as returned by `curvop.problems.load`.
    options : argparse.Namespace
        The arguments of ``curvop spectrum``.
    start : float
        Time from which the deadline is counted, as returned by ``time.monotonic``.

    Returns
    -------
    StudyResults
        The results, and messages about steps that were not finished.

    Raises
    ------
    ProblemError
        If the problem is invalid or cannot be evaluated, if the folder contains the study of another problem, or if a
        step needs more memory than is available. The memory is checked before the first step.

    Notes
    -----
    Computations in progress are not interrupted. The study can therefore exceed the deadline for three reasons:

    - The loss and its gradient are always computed.
    - A Lanczos step of the density is a block product with one vector for each probe, and the first step is always
      computed.
    - Writing the files may take more than the three seconds that are reserved for it.

    All other steps exceed their time limits by at most the time for one product, or for one block product with 16
    vectors.
    """
    whole, A = wrap(problem, options.matrix, operator_settings(options), options.block)
    _check_memory(A, options)
    gradient, loss = evaluated(A)
    results = StudyResults(
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
        if out is None:
            _run(results, A, _steps(results, A, A, options, start), None, start)
        else:
            out.mkdir(exist_ok=True)
            with JournaledLinearOperator(A, out / JOURNAL) as journal:
                files = StudyFiles(out)
                _run(results, A, _steps(results, A, journal, options, start), files, start)
                results.journal_bytes = journal.num_bytes
                files.write(results)
    except (OtherProblemError, RecordFileError) as error:
        raise ProblemError(f"--out: {error}") from error
    return results


def _check_memory(A: Any, options: argparse.Namespace) -> None:
    """Raise if the density, the trace or the norm would need more memory than is available.

    Without this check, these steps might run out of memory hours later. `eigsh` checks its own memory when it starts.
    """
    steps, vectors = min(options.steps, A.shape[0]), 4 * _estimate_products(A)
    try:
        check_fits(
            bytes_of_run(A, steps),
            available_bytes(device_of(A)),
            f"--steps {options.steps}: the basis of one probe, {steps} vectors of {A.shape[0]:,} numbers,",
            "take fewer --steps, or a --block of the matrix",
            adjustable=False,
        )
        check_fits(
            8 * vectors * A.shape[0],  # as documented in curvop.spectrum.trace
            available_bytes(),
            f"the workspace of trace and norm, {vectors} vectors of {A.shape[0]:,} numbers,",
            "take a --block of the matrix",
            adjustable=False,
        )
    except MemoryError as error:
        raise ProblemError(one_line(error)) from error


def _estimate_products(A: LinearOperator) -> int:
    return int(min(_ESTIMATE_PRODUCTS, 2 * A.shape[0]))


def _run(results: StudyResults, A: Any, steps: dict[str, Step], files: StudyFiles | None, start: float) -> None:
    """Run the steps. Write the files after each step except the last, and also if a step fails."""

    def state() -> tuple[int, int]:
        return A.num_products, id(results.blocks)

    def write(undone: list[str]) -> None:
        # If a resumed run has only read recorded products so far, keep the report of the earlier run, which is more
        # complete.
        if files is not None and (state() != first_state or not files.exist):
            files.write(_intermediate(results, A, start, undone))

    remaining, first_state = list(steps), state()
    try:
        for step in steps.values():
            step()
            remaining.pop(0)
            if remaining:
                write([f"{name}: not done yet" for name in remaining])
    except BaseException as error:  # includes Ctrl-C
        why = "it was interrupted" if isinstance(error, KeyboardInterrupt) else describe_error(error)
        with contextlib.suppress(Exception):  # if this fails too, for example on a full disk, raise the first error
            write([*(f"{name}: not done" for name in remaining), f"the study ended early: {why}"])
        raise
    results.products, results.seconds = results.products + A.num_products, time.monotonic() - start


def _intermediate(results: StudyResults, A: Any, start: float, undone: list[str]) -> StudyResults:
    return dataclasses.replace(
        results,
        undone=[*results.undone, *undone],
        products=results.products + A.num_products,
        seconds=time.monotonic() - start,
    )


def _steps(
    results: StudyResults, A: Any, recorded: LinearOperator, options: argparse.Namespace, start: float
) -> dict[str, Step]:
    """Return a dictionary of steps in order of execution. Each step is a function that updates `results`."""

    def end_of_share(share: float) -> float:
        if options.deadline is None:
            return float("inf")
        seconds: float = max(options.deadline - _WRITING, 0.5 * options.deadline)
        return start + share * seconds

    def seconds_left(share: float) -> float | None:
        return None if options.deadline is None else max(0.0, end_of_share(share) - time.monotonic())

    ends = {"LA": options.k} | ({"SA": min(5, options.k)} if options.matrix == "hessian" else {})

    def eigenvalues(which: str, share: float) -> None:
        _eigenvalues(results, recorded, which, min(ends[which], results.rows), seconds_left(share))

    def estimate(name: str, estimator: Any, seed: int) -> None:
        def run(A: LinearOperator, seconds: float | None) -> Any:
            count = _estimate_products(A)
            with step_bar(name, total=count) as bar:
                result = estimator(TimedOperator(CountedOperator(A, bar), deadline_after(seconds)), count, rng=seed)
                bar.total = bar.n  # a small matrix takes fewer products than expected
            return result

        try:
            setattr(results, name, _recalled(recorded, run, seconds_left(_ESTIMATES)))
        except TimeoutError:
            results.undone.append(f"{name}: not done by the deadline")

    steps: dict[str, Step] = {
        f"eigenvalues {which}": functools.partial(eigenvalues, which, _EIGENVALUES * number / len(ends))
        for number, which in enumerate(ends, 1)
    }
    steps |= {
        "trace": lambda: estimate("trace", trace, 1),
        "norm": lambda: estimate("norm", frobenius_norm, 2),
        "density": lambda: _density(results, A, options, seconds_left(_DENSITY)),
    }
    checkpoint = None if options.out is None else options.out / "blocks"
    _finished_blocks(results, A, checkpoint)
    if options.blocks:
        steps["blocks"] = lambda: _blocks(results, A, checkpoint, seconds_left(_BLOCKS))
    return steps


def _eigenvalues(results: StudyResults, A: LinearOperator, which: str, k: int, seconds: float | None) -> None:
    """Compute up to `k` eigenvalues at one end of the spectrum, within the time limit.

    The method is the same with and without a deadline, so that a resumed study finds its products in the journal.
    """
    try:
        with without_verdicts():
            result = _recalled(
                A, lambda B, limit: eigsh(B, k, which, method="lanczos", seconds=limit, side="parameters"), seconds
            )
    except TimeoutError:  # for a small matrix, eigsh forms the dense matrix, and has no partial result
        result = None
    if result is None or not len(result.values):
        results.undone.append(f"eigenvalues {which}: not done by the deadline")
        return
    results.ends.append(result)
    if result.timed_out and not result.converged:
        results.undone.append(f"eigenvalues {which}: {result.num_converged} of {k} converged by the deadline")
    elif result.certificate is None:
        results.undone.append(f"eigenvalues {which}: not certified by the deadline")


def _recalled(A: LinearOperator, run: Callable[[LinearOperator, float | None], Any], seconds: float | None) -> Any:
    """Return ``run(A, seconds)``, or ``run(A, None)`` if the journal already contains all products of this run.

    Results that take no new products are therefore reported even after the deadline.
    """
    if seconds is not None and isinstance(A, JournaledLinearOperator):
        with contextlib.suppress(UnrecordedError):
            return run(A.recall(), None)
    return run(A, seconds)


def _density(results: StudyResults, A: Any, options: argparse.Namespace, seconds: float | None) -> None:
    checkpoint = None if options.out is None else options.out / "density"
    results.density = density(
        A, num_probes=options.probes, num_steps=options.steps, checkpoint=checkpoint, seconds=seconds
    )
    if not results.density.complete:
        probes, steps = results.density.nodes.shape
        results.undone.append(f"density: {probes} probes of {steps} steps only, by the deadline")


def _finished_blocks(results: StudyResults, A: Any, checkpoint: Path | None) -> None:
    """Add the blocks that an earlier run has finished to `results`, even if this run does not study blocks."""
    if checkpoint is not None and checkpoint.exists():
        study = blocks(A, checkpoint=checkpoint, seconds=0, progress=False)
        results.blocks = study if study.names else None


def _blocks(results: StudyResults, A: Any, checkpoint: Path | None, seconds: float | None) -> None:
    products_before = 0 if results.blocks is None else results.blocks.num_products
    try:
        study = blocks(A, checkpoint=checkpoint, seconds=seconds)
    except BaseException:
        with contextlib.suppress(Exception):
            _finished_blocks(results, A, checkpoint)
        raise
    results.products += study.num_products - products_before
    if study.unfinished:
        finished, count = len(study.names), len(A.params_slices)
        results.undone.append(f"blocks: {f'{finished} of {count}' if finished else 'not'} done by the deadline")
    results.blocks = study if study.names else None
