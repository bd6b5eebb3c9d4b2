"""The study behind ``curvop spectrum``: everything that is to be known of a spectrum, one step after another."""

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
from curvop.cli.html_report import Findings, StudyFiles
from curvop.cli.problem_loading import MATRICES, ProblemError, wrap
from curvop.operators.error_text import describe_error, one_line
from curvop.operators.progress import step_bar
from curvop.operators.validation import available_bytes, check_fits
from curvop.spectrum.blocks import blocks
from curvop.spectrum.counting import CountedOperator, TimedOperator, end_of
from curvop.spectrum.density import density
from curvop.spectrum.eigen import eigsh, without_verdicts
from curvop.spectrum.estimators import frobenius_norm, trace
from curvop.spectrum.lanczos import bytes_of_run, device_of
from curvop.storage.fingerprint import OtherProblemError
from curvop.storage.journal import JournaledLinearOperator, UnrecordedError
from curvop.storage.records import RecordFileError

__all__ = ["spectrum_study"]

_ESTIMATE_PRODUCTS = 60  # of the trace and of the norm
# When a step is to be over, as a part of the time until the deadline less what writing takes.
_WRITING = 3.0  # seconds
_EIGENVALUES, _ESTIMATES, _DENSITY, _BLOCKS = 0.4, 0.5, 0.75, 0.97


def spectrum_study(problem: dict[str, Any], options: argparse.Namespace, begun: float) -> Findings:
    """Study a problem's matrix as the arguments of the command say, and write what is found where they say.

    It is written after each step, and where one fails, so that an error late in a study takes nothing away.

    The deadline counts from `begun`, on the clock of ``time.monotonic``. What is under way is not broken off, so that
    it can be overrun: by the loss and its gradient, which are computed in any case; by a step of the density, one block
    product with as many vectors as it has probes, of which a first one is always made; and by the writing of files,
    where that takes more than three seconds. Any other step ends one product after its part of the time, or a block
    product of 16 vectors.

    Raises
    ------
    ProblemError
        Where the problem cannot be wrapped or evaluated, or the folder holds the study of another one, or there is not
        the memory for a later step, before anything is computed.
    """
    whole, A = wrap(problem, options.matrix, operator_settings(options), options.block)
    _check_memory(A, options)
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
        if out is None:
            _run(found, A, _steps(found, A, A, options, begun), None, begun)
        else:
            out.mkdir(exist_ok=True)
            with JournaledLinearOperator(A, out / JOURNAL) as journal:
                files = StudyFiles(out)
                _run(found, A, _steps(found, A, journal, options, begun), files, begun)
                found.journal_bytes = journal.num_bytes
                files.write(found)
    except (OtherProblemError, RecordFileError) as error:
        raise ProblemError(f"--out: {error}") from error
    return found


def _check_memory(A: Any, options: argparse.Namespace) -> None:
    """Refuse what would only fail after the eigenvalues, hours later; for those, `eigsh` counts itself."""
    steps, products = min(options.steps, A.shape[0]), _estimate_products(A)
    each = f"{{}} vectors of {A.shape[0]:,} numbers,"
    try:
        check_fits(
            bytes_of_run(A, steps),
            available_bytes(device_of(A)),
            f"--steps {options.steps}: the basis of one probe, {each.format(steps)}",
            "take fewer --steps, or a --block of the matrix",
            adjustable=False,
        )
        check_fits(
            4 * 8 * products * A.shape[0],  # as `trace` says
            available_bytes(),
            f"what the trace and the norm are estimated from, {each.format(4 * products)}",
            "take a --block of the matrix",
            adjustable=False,
        )
    except MemoryError as error:
        raise ProblemError(one_line(error)) from error


def _estimate_products(A: LinearOperator) -> int:
    return int(min(_ESTIMATE_PRODUCTS, 2 * A.shape[0]))


Step = Callable[[], None]


def _run(found: Findings, A: Any, steps: dict[str, Step], files: StudyFiles | None, begun: float) -> None:
    """Take one step after another, and write what is found after each but the last, also where one fails."""

    def state() -> tuple[int, int]:
        return A.num_products, id(found.blocks)

    def write(undone: list[str]) -> None:
        # A run that has only read what an earlier one had done leaves that one's report alone until the end.
        if files is not None and (state() != first or not files.begun):
            files.write(_so_far(found, A, begun, undone))

    waiting, first = list(steps), state()
    try:
        for step in steps.values():
            step()
            waiting.pop(0)
            if waiting:
                write([f"{name}: not done yet" for name in waiting])
    except BaseException as error:  # Ctrl-C, too
        why = "it was interrupted" if isinstance(error, KeyboardInterrupt) else describe_error(error)
        with contextlib.suppress(Exception):  # on a full disk, the first error is the one to tell
            write([*(f"{name}: not done" for name in waiting), f"the study ended early: {why}"])
        raise
    found.products, found.seconds = found.products + A.num_products, time.monotonic() - begun


def _so_far(found: Findings, A: Any, begun: float, undone: list[str]) -> Findings:
    return dataclasses.replace(
        found,
        undone=[*found.undone, *undone],
        products=found.products + A.num_products,
        seconds=time.monotonic() - begun,
    )


def _steps(
    found: Findings, A: Any, recorded: LinearOperator, options: argparse.Namespace, begun: float
) -> dict[str, Step]:
    """Return by name what is to be done, one after the other; each step adds to `found`."""

    def until(share: float) -> float:
        if options.deadline is None:
            return float("inf")
        seconds: float = max(options.deadline - _WRITING, 0.5 * options.deadline)
        return begun + share * seconds

    def left(share: float) -> float | None:
        return None if options.deadline is None else max(0.0, until(share) - time.monotonic())

    ends = {"LA": options.k} | ({"SA": min(5, options.k)} if options.matrix == "hessian" else {})

    def eigenvalues(which: str, share: float) -> None:
        _eigenvalues(found, recorded, which, min(ends[which], found.rows), left(share))

    def estimated(name: str, estimate: Any, seed: int) -> None:
        def run(A: LinearOperator, seconds: float | None) -> Any:
            count = _estimate_products(A)
            with step_bar(name, total=count) as bar:
                found = estimate(TimedOperator(CountedOperator(A, bar), end_of(seconds)), count, rng=seed)
                bar.total = bar.n  # a small matrix is read off with fewer
            return found

        try:
            setattr(found, name, _recalled(recorded, run, left(_ESTIMATES)))
        except TimeoutError:
            found.undone.append(f"{name}: not done by the deadline")

    steps: dict[str, Step] = {
        f"eigenvalues {which}": functools.partial(eigenvalues, which, _EIGENVALUES * number / len(ends))
        for number, which in enumerate(ends, 1)
    }
    steps |= {
        "trace": lambda: estimated("trace", trace, 1),
        "norm": lambda: estimated("norm", frobenius_norm, 2),
        "density": lambda: _density(found, A, options, left(_DENSITY)),
    }
    kept = None if options.out is None else options.out / "blocks"
    _earlier_blocks(found, A, kept)
    if options.blocks:
        steps["blocks"] = lambda: _blocks(found, A, kept, left(_BLOCKS))
    return steps


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
        with without_verdicts():
            result = _recalled(A, lambda B, limit: eigsh(B, k, which, method="lanczos", seconds=limit), seconds)
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


def _density(found: Findings, A: Any, options: argparse.Namespace, seconds: float | None) -> None:
    checkpoint = None if options.out is None else options.out / "density"
    found.density = density(
        A, num_probes=options.probes, num_steps=options.steps, checkpoint=checkpoint, seconds=seconds
    )
    if not found.density.complete:
        probes, steps = found.density.nodes.shape
        found.undone.append(f"density: {probes} probes of {steps} steps only, by the deadline")


def _earlier_blocks(found: Findings, A: Any, kept: Path | None) -> None:
    """Show the blocks that are finished on disk."""
    if kept is not None and kept.exists():
        study = blocks(A, checkpoint=kept, seconds=0, progress=False)
        found.blocks = study if study.names else None


def _blocks(found: Findings, A: Any, kept: Path | None, seconds: float | None) -> None:
    before = 0 if found.blocks is None else found.blocks.num_products
    try:
        study = blocks(A, checkpoint=kept, seconds=seconds)
    except BaseException:
        with contextlib.suppress(Exception):
            _earlier_blocks(found, A, kept)
        raise
    found.products += study.num_products - before
    if study.unfinished:
        done, count = len(study.names), len(A.params_slices)
        found.undone.append(f"blocks: {f'{done} of {count}' if done else 'not'} done by the deadline")
    found.blocks = study if study.names else None
