"""Run ``curvop spectrum`` in steps: eigenvalues, density, trace, norm and blocks, the most wanted first.

If there is an output folder, a journal records all products, and the result files are rewritten after each step. A
study with an output folder can therefore be resumed after it was killed, and extended to more eigenvalues, steps or
probes. If there is a deadline, each step gets a share of the time. The time that is left after the last step goes to
the steps that are not finished.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import math
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from scipy.sparse.linalg import LinearOperator

from curvop.checks.compare import compare
from curvop.cli.arguments import JOURNAL, NUM_SMALLEST, operator_settings
from curvop.cli.closed_forms import add_closed_forms
from curvop.cli.data_order import check_repeats
from curvop.cli.eigs_study import evaluated
from curvop.cli.problem_loading import APPROXIMATIONS, ProblemError, title_of, wrap, wrap_approximation
from curvop.cli.provenance import FINISHED, INTERRUPTED, RUNNING, Provenance, Run, RunLog
from curvop.cli.report import ENDS
from curvop.cli.spectrum_results import StudyFiles, StudyResults
from curvop.operators.error_text import describe_error, one_line
from curvop.operators.kronecker import KroneckerFactoredLinearOperator
from curvop.operators.progress import step_bar
from curvop.operators.validation import available_bytes, check_fits
from curvop.spectrum.blocks import blocks
from curvop.spectrum.checkpoint import recorded_density
from curvop.spectrum.counting import CountedOperator, TimedOperator, deadline_after
from curvop.spectrum.density import density
from curvop.spectrum.eigen import EigenResult, eigsh, without_verdicts
from curvop.spectrum.estimators import frobenius_norm, trace
from curvop.spectrum.lanczos import bytes_of_run, device_of
from curvop.storage.fingerprint import OtherProblemError
from curvop.storage.journal import JournaledLinearOperator, UnrecordedError
from curvop.storage.records import RecordFileError

__all__ = ["spectrum_study"]

_ESTIMATE_PRODUCTS = 60  # number of products for the trace; the norm takes as many
_SHARES = {
    "closed forms": 0.0,
    "eigenvalues LA": 4.0,
    "density": 3.0,
    "eigenvalues SA": 2.0,
    "trace": 0.5,
    "norm": 0.5,
    "comparison": 1.0,
    "blocks": 2.0,
}
"""The steps in order of execution, and their shares of the time until a deadline."""

_SEEDS = {"eigenvalues": 0, "density": 0, "trace": 1, "norm": 2, "comparison": 0, "blocks": 0}
"""The seeds of the random vectors."""

# Time reserved for writing the files after a step: the smaller of the following seconds and share of the deadline. Once
# the files have been written after this step, the measured time is used instead, multiplied by the margin.
_WRITING_SECONDS, _WRITING_SHARE, _WRITING_MARGIN = 3.0, 0.1, 1.3
_ENDING_SECONDS, _ENDING_SHARE = 0.5, 0.02  # at least this time is reserved, for the last write and the printed report


@dataclasses.dataclass
class _Outcome:
    """The outcome of a step.

    Attributes
    ----------
    undone : str
        Message about the work that the time limit left unfinished, or an empty string.
    improvable : bool
        Whether the step can use more time.
    reused : int
        Number of products that the step has read from disk.
    """

    undone: str = ""
    improvable: bool = False
    reused: int = 0


Step = Callable[[float], _Outcome]
"""Function that runs a step until a time limit, a value of ``time.monotonic()``, and updates the results."""


class _Schedule:
    """Time limits of the steps.

    Parameters
    ----------
    start : float
        Time from which the deadline is counted.
    deadline : float or None
        Seconds until the deadline. If None, there are no limits.
    names : list of str
        Names of the steps.
    writes : bool
        Whether files are written after each step.
    """

    def __init__(self, start: float, deadline: float | None, names: list[str], writes: bool) -> None:
        self.start, self._names = start, names
        self._seconds = math.inf if deadline is None else deadline
        unknown = min(_WRITING_SECONDS, _WRITING_SHARE * self._seconds) if writes else 0.0
        self._writing, self._seconds_per_product = dict.fromkeys(names, unknown), 0.0

    @property
    def is_limited(self) -> bool:
        """Whether there is a deadline."""
        return self._seconds < math.inf

    def end(self, name: str) -> float:
        """Latest time at which the step `name` must end, so that its results are written by the deadline."""
        ending = min(_ENDING_SECONDS, _ENDING_SHARE * self._seconds)
        return self.start + self._seconds - max(ending, self._writing[name])

    def limit(self, name: str) -> float:
        """Time limit of the step `name`: its share of the time that is left for this step and the later ones."""
        if not self.is_limited:
            return math.inf
        shares = [_SHARES[later] for later in self._names[self._names.index(name) :]]
        now = time.monotonic()
        seconds = max(0.0, self.end(name) - now) * shares[0] / sum(shares)
        # An estimate has no partial result. If there is no time for all its products, earlier steps get the time.
        if name in ("trace", "norm") and seconds < _ESTIMATE_PRODUCTS * self._seconds_per_product:
            return now
        return now + seconds

    def record(self, seconds: float, num_products: int) -> None:
        """Record the time that a step took, and the number of products that it computed."""
        if num_products:
            self._seconds_per_product = seconds / num_products

    @contextlib.contextmanager
    def writing(self, name: str) -> Iterator[None]:
        """Measure the time for writing the files after the step `name`."""
        begun = time.monotonic()
        yield
        self._writing[name] = _WRITING_MARGIN * (time.monotonic() - begun)


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
    Each step gets a share of the time until the deadline. Time that a step does not need goes to the later steps. When
    all steps have had their shares, the steps that are not finished continue with the time that is left, the most
    wanted first. For this purpose, a study without an output folder records its products in a temporary folder. If the
    density could fill more than a quarter of the free disk space there, the study ends after the last step instead.

    Computations in progress are not interrupted. The study can therefore exceed the deadline for four reasons:

    - The loss and its gradient are always computed.
    - A Lanczos step of the density is a block product with one vector for each probe, and the first step is always
      computed.
    - Writing the files at the end may take longer than after earlier steps.
    - The closed forms of an approximation are always computed, and its comparison with the exact matrix is not
      interrupted.

    All other steps exceed their time limits by at most the time for one product, or for one block product with 16
    vectors.
    """
    settings = operator_settings(options)
    if options.matrix in APPROXIMATIONS:
        whole, A, exact = wrap_approximation(problem, options.matrix, settings, options.block)
    else:
        whole, A = wrap(problem, options.matrix, settings, options.block)
        exact = A
    _check_memory(A, options)
    run = Run.starting(options.command_line, exact.device)
    gradient, loss = evaluated(exact)
    provenance = Provenance.of(problem, A, exact, _SEEDS, run)
    results = StudyResults(
        problem=options.problem,
        title=title_of(options.matrix),
        rows=A.shape[0],
        parameters=whole.shape[0],
        names=list(A.params_slices),
        loss=loss,
        gradient_norm=float(np.linalg.norm(gradient.astype(np.float64))),
        provenance=provenance,
    )
    out: Path | None = options.out
    log = RunLog(out, provenance)
    try:
        with contextlib.ExitStack() as stack:
            folder = _temporary_folder(A, options, stack) if out is None else out
            recorded = A
            if folder is not None:
                if folder is out:
                    check_repeats(problem["data"])
                folder.mkdir(exist_ok=True)
                recorded = stack.enter_context(JournaledLinearOperator(A, folder / JOURNAL))
            files = None if out is None else StudyFiles(out)
            if files is not None and options.deadline is not None:
                files.prepare()
            steps = _steps(results, A, recorded, exact, options, folder)
            schedule = _Schedule(start, options.deadline, list(steps), writes=files is not None)

            def record(end: str = RUNNING) -> None:
                products, seconds = results.products + A.num_products, time.monotonic() - start
                log.record(products, seconds, _recorded(results, recorded), end)

            _run(results, A, steps, files, schedule, record, continuing=folder is not None)
            record(FINISHED)
            results.products, results.seconds = results.products + A.num_products, time.monotonic() - start
            if files is not None:
                results.journal_bytes = recorded.num_bytes
                files.write(results)
    except (OtherProblemError, RecordFileError) as error:
        raise ProblemError(f"--out: {error}") from error
    return results


def _temporary_folder(A: Any, options: argparse.Namespace, stack: contextlib.ExitStack) -> Path | None:
    """Return a folder for the products of a study that has a deadline but no output folder, or None if it is too large.

    The folder is deleted when `stack` is closed.
    """
    if options.deadline is None:
        return None
    folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="curvop-", ignore_cleanup_errors=True)))
    needed = 8 * A.shape[0] * options.probes * min(options.steps, A.shape[0])
    return folder if 4 * needed <= shutil.disk_usage(folder).free else None


def _check_memory(A: Any, options: argparse.Namespace) -> None:
    """Raise if estimates of the density, the trace or the norm would need more memory than is available.

    Without this check, these steps might run out of memory hours later. `eigsh` checks its own memory when it starts.
    """
    steps, vectors = min(options.steps, A.shape[0]), 4 * _estimate_products(A)
    if isinstance(A, KroneckerFactoredLinearOperator):
        return
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


def _run(
    results: StudyResults,
    A: Any,
    steps: dict[str, Step],
    files: StudyFiles | None,
    schedule: _Schedule,
    record: Callable[..., None],
    continuing: bool,
) -> None:
    """Run the steps, and then continue the unfinished steps until the time is up.

    Write the files after each step except the last, and also if a step fails. Call `record` before, with the end of the
    run if it ends early.
    """

    def num_products() -> int:
        return int(A.num_products + results.products)

    def state() -> tuple[int, int]:
        return num_products(), id(results.blocks)

    def write(name: str, undone: list[str], end: str = RUNNING) -> None:
        record(end)
        # If a resumed run has only read recorded products so far, keep the report of the earlier run, which is more
        # complete.
        if files is not None and (state() != first_state or not files.exist):
            with schedule.writing(name):
                files.write(_intermediate(results, A, schedule, undone))

    outcomes: dict[str, _Outcome] = {}
    remaining, first_state, name = list(steps), state(), next(iter(steps))
    resumed = files is not None and files.exist

    def attempt(name: str, limit: float) -> None:
        before, again, begun = num_products(), name in outcomes, time.monotonic()
        outcomes[name] = outcome = steps[name](limit)
        schedule.record(time.monotonic() - begun, num_products() - before)
        results.undone = [done.undone for done in outcomes.values() if done.undone]
        if computed := num_products() - before:
            if again:
                results.notes.append(f"{name}: continued in the time that other steps had left")
            elif resumed and outcome.reused:
                results.notes.append(
                    f"{name}: continued, {outcome.reused} products on disk and {computed} new products"
                )

    record()
    try:
        for name in steps:
            attempt(name, schedule.limit(name))
            remaining.pop(0)
            if remaining or schedule.is_limited:
                write(name, [f"{later}: not done yet" for later in remaining])
        progress = -1
        while continuing and schedule.is_limited and progress != num_products():
            progress = num_products()
            for name in [name for name, outcome in outcomes.items() if outcome.improvable]:
                if time.monotonic() < schedule.end(name):
                    attempt(name, schedule.end(name))
                    write(name, [])
    except BaseException as error:  # includes Ctrl-C
        why = "it was interrupted" if isinstance(error, KeyboardInterrupt) else describe_error(error)
        with contextlib.suppress(Exception):  # if this fails too, for example on a full disk, raise the first error
            undone = [f"{later}: not done" for later in remaining]
            write(name, [*undone, f"the study ended early: {why}"], INTERRUPTED)
        raise


def _recorded(results: StudyResults, A: LinearOperator) -> int:
    """Return the number of products that the results and the journal account for, from all runs."""
    parts = (results.density, results.blocks, results.comparison)
    journal = A.num_recorded if isinstance(A, JournaledLinearOperator) else 0
    return int(journal + sum(part.num_products for part in parts if part is not None))


def _intermediate(results: StudyResults, A: Any, schedule: _Schedule, undone: list[str]) -> StudyResults:
    return dataclasses.replace(
        results,
        undone=[*results.undone, *undone],
        products=results.products + A.num_products,
        seconds=time.monotonic() - schedule.start,
    )


def _steps(
    results: StudyResults,
    A: Any,
    recorded: LinearOperator,
    exact: Any,
    options: argparse.Namespace,
    folder: Path | None,
) -> dict[str, Step]:
    """Return a dictionary of the requested steps in order of execution. `exact` is the matrix that `A` approximates."""
    smallest = min(NUM_SMALLEST, options.k)
    steps: dict[str, Step] = {
        "eigenvalues LA": lambda limit: _eigenvalues(results, recorded, "LA", options.k, options.maxiter, limit),
        "density": lambda limit: _density(results, A, options, folder, limit),
        "eigenvalues SA": lambda limit: _eigenvalues(results, recorded, "SA", smallest, options.maxiter, limit),
        "trace": lambda limit: _estimate(results, recorded, "trace", trace, limit),
        "norm": lambda limit: _estimate(results, recorded, "norm", frobenius_norm, limit),
        "comparison": lambda limit: _comparison(results, A, exact, limit),
        "blocks": lambda limit: _blocks(results, A, checkpoint, limit),
    }
    if isinstance(A, KroneckerFactoredLinearOperator):
        closed = {"closed forms": lambda limit: _closed_forms(results, A, options)}
        return closed | {"comparison": steps["comparison"]}
    checkpoint = None if folder is None else folder / "blocks"
    _finished_blocks(results, A, checkpoint)
    if options.matrix != "hessian":
        del steps["eigenvalues SA"]
    if exact is A:
        del steps["comparison"]
    if not options.blocks:
        del steps["blocks"]
    return {name: steps[name] for name in _SHARES if name in steps}


def _closed_forms(results: StudyResults, A: KroneckerFactoredLinearOperator, options: argparse.Namespace) -> _Outcome:
    add_closed_forms(results, A, options)
    return _Outcome()


def _eigenvalues(
    results: StudyResults, A: LinearOperator, which: str, k: int, maxiter: int | None, limit: float
) -> _Outcome:
    """Compute up to `k` eigenvalues at one end of the spectrum, within the time limit.

    The method is the same with and without a deadline, so that a resumed study finds its products in the journal. If
    the step has run before, the better result is kept.
    """
    k = min(k, results.rows)
    before = next((end for end in results.ends if end.which == which), None)
    answered = _num_answered(A)

    def run(B: LinearOperator, seconds: float | None) -> EigenResult:
        settings: dict[str, Any] = {"method": "lanczos", "side": "parameters", "rng": _SEEDS["eigenvalues"]}
        return eigsh(B, k, which, maxiter=maxiter, seconds=seconds, **settings)

    result = None
    with contextlib.suppress(TimeoutError), without_verdicts():  # a small matrix is formed: no partial result
        # If the step has run before, some of its products are missing.
        result = _recalled(A, run, limit) if before is None else run(A, _seconds_until(limit))
    if result is not None and len(result.values) and (before is None or _quality(result) >= _quality(before)):
        results.ends = sorted(
            [*(end for end in results.ends if end is not before), result], key=lambda end: list(ENDS).index(end.which)
        )
        before = result
    # A result is not ok either if the search for missed eigenvalues was left out or cut short.
    outcome = _Outcome(improvable=before is None or not before.ok, reused=_num_answered(A) - answered)
    if before is None:
        outcome.undone = f"eigenvalues {which}: not done by the deadline"
    elif before.timed_out and not before.converged:
        outcome.undone = f"eigenvalues {which}: {before.num_converged} of {k} converged by the deadline"
    elif before.certificate is None:
        outcome.undone = f"eigenvalues {which}: not certified by the deadline"
    return outcome


def _quality(result: EigenResult) -> tuple[Any, ...]:
    """Return a tuple that is larger for better results with the same number of wanted eigenvalues."""
    certificate = result.certificate
    certified = () if certificate is None else (-float(certificate.bounds.max()),)
    return result.ok, certificate is not None, result.num_converged, len(result.values), *certified


def _estimate(results: StudyResults, A: LinearOperator, name: str, estimator: Any, limit: float) -> _Outcome:
    """Estimate the trace or the norm within the time limit."""
    answered = _num_answered(A)

    def run(A: LinearOperator, seconds: float | None) -> Any:
        count = _estimate_products(A)
        with step_bar(name, total=count) as bar:
            timed = TimedOperator(CountedOperator(A, bar), deadline_after(seconds))
            result = estimator(timed, count, rng=_SEEDS[name], progress=False)
            bar.total = bar.n  # a small matrix takes fewer products than expected
        return result

    try:
        setattr(results, name, _recalled(A, run, limit))
    except TimeoutError:
        return _Outcome(f"{name}: not done by the deadline", improvable=True)
    return _Outcome(reused=_num_answered(A) - answered)


def _comparison(results: StudyResults, A: Any, exact: Any, limit: float) -> _Outcome:
    """Estimate the error of an approximation, unless the time limit is reached."""
    if results.comparison is None:
        if time.monotonic() >= limit:
            return _Outcome("comparison: not done by the deadline", improvable=True)
        results.comparison = compare(A, exact, rng=_SEEDS["comparison"])
        results.products += results.comparison.num_products
    return _Outcome()


def _recalled(A: LinearOperator, run: Callable[[LinearOperator, float | None], Any], limit: float) -> Any:
    """Return ``run(A, seconds)``, or ``run(A, None)`` if the journal already contains all products of this run.

    Results that take no new products are therefore reported even after the deadline.
    """
    if limit < math.inf and isinstance(A, JournaledLinearOperator):
        with contextlib.suppress(UnrecordedError):
            return run(A.recall(), None)
    return run(A, _seconds_until(limit))


def _seconds_until(limit: float) -> float | None:
    return None if limit == math.inf else max(0.0, limit - time.monotonic())


def _num_answered(A: LinearOperator) -> int:
    return A.num_answered if isinstance(A, JournaledLinearOperator) else 0


def _density(results: StudyResults, A: Any, options: argparse.Namespace, folder: Path | None, limit: float) -> _Outcome:
    checkpoint, before = None if folder is None else folder / "density", A.num_products
    results.density = density(
        A,
        num_probes=options.probes,
        num_steps=options.steps,
        rng=_SEEDS["density"],
        checkpoint=checkpoint,
        seconds=_seconds_until(limit),
    )
    probes, steps = results.density.nodes.shape
    outcome = _Outcome(reused=results.density.num_products - (A.num_products - before))
    if not results.density.complete:
        outcome.undone, outcome.improvable = f"density: {probes} probes of {steps} steps only, by the deadline", True
    elif checkpoint is not None:
        recorded = recorded_density(checkpoint)
        if recorded[0] > options.probes or recorded[1] > options.steps:
            results.notes.append(
                f"density: {probes} probes of {steps} steps, as requested; the folder has up to {recorded[0]} "
                f"probes and {recorded[1]} steps (--probes, --steps)"
            )
    return outcome


def _finished_blocks(results: StudyResults, A: Any, checkpoint: Path | None) -> None:
    """Add the blocks that an earlier run has finished to `results`, even if this run does not study blocks."""
    if checkpoint is not None and checkpoint.exists():
        study = blocks(A, rng=_SEEDS["blocks"], checkpoint=checkpoint, seconds=0, progress=False)
        results.blocks = study if study.names else None


def _blocks(results: StudyResults, A: Any, checkpoint: Path | None, limit: float) -> _Outcome:
    products_before = 0 if results.blocks is None else results.blocks.num_products
    try:
        study = blocks(A, rng=_SEEDS["blocks"], checkpoint=checkpoint, seconds=_seconds_until(limit))
    except BaseException:
        with contextlib.suppress(Exception):
            _finished_blocks(results, A, checkpoint)
        raise
    results.products += study.num_products - products_before
    outcome = _Outcome(reused=products_before)
    if study.unfinished:
        finished, count = len(study.names), len(A.params_slices)
        outcome.undone = f"blocks: {f'{finished} of {count}' if finished else 'not'} done by the deadline"
        outcome.improvable = True
    results.blocks = study if study.names else None
    return outcome
