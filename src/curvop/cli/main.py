# PYTHON_ARGCOMPLETE_OK
"""The ``curvop`` command: run a subcommand, print its report or JSON, and return the exit code."""

import argparse
import json
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext, redirect_stdout
from typing import Any

from curvop.checks.compare import Comparison, compare
from curvop.checks.dense_check import DenseCheck
from curvop.checks.operator_checks import check
from curvop.cli.arguments import NUM_SMALLEST, UsageError, operator_settings, parse
from curvop.cli.data_order import in_order
from curvop.cli.eigs_study import evaluated, singular_study, study
from curvop.cli.exit_codes import ExitCode
from curvop.cli.problem_loading import (
    APPROXIMATIONS,
    ProblemError,
    load,
    moved,
    title_of,
    wrap,
    wrap_approximation,
    wrap_jacobian,
)
from curvop.cli.process import TerminatedError, one_line_warnings, resume_line, terminable
from curvop.cli.report import (
    End,
    Result,
    Singular,
    eigs_json,
    eigs_report,
    num_products,
    param_arrays,
    save,
    solve_json,
    solve_report,
)
from curvop.cli.spectrum_study import spectrum_study
from curvop.operators.engine_operator import UNTRUSTED
from curvop.operators.error_text import describe_error, one_line
from curvop.operators.progress import new_bar
from curvop.solvers.linear_solve import solve
from curvop.solvers.preconditioners import nystrom
from curvop.spectrum.eigen import without_verdicts
from curvop.storage.result_files import save_arrays

__all__ = ["main"]


def main(argv: Sequence[str] | None = None, *, prog: str = "curvop") -> int:
    """Run the ``curvop`` command.

    Parameters
    ----------
    argv : sequence of str, optional
        The arguments, without the name of the command. Default: ``sys.argv[1:]``.
    prog : str, optional
        How the command was called. The help, and the line that continues a study, show this name.

    Returns
    -------
    int
        The exit code, a value of `curvop.cli.exit_codes.ExitCode`. The help of each subcommand explains these values.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    options: argparse.Namespace | None = None
    try:
        with one_line_warnings(), terminable():
            options = parse(arguments, prog)
            if options is None:
                return ExitCode.INVALID
            commands = {"eigs": _eigs, "solve": _solve, "spectrum": _spectrum, "check": _check}
            code = commands[options.command](options)
            if code == ExitCode.TIME_UP:
                _stopped("time is up", options, prog, arguments)
            return code
    except SystemExit as stop:
        if options is None:  # argparse exits after --help and --version
            return int(stop.code or 0)
        return _fail(f"the problem cannot be evaluated: {describe_error(stop)}", ExitCode.INVALID)
    except (UsageError, ProblemError) as error:
        return _fail(str(error), ExitCode.INVALID)
    except UNTRUSTED as error:  # the first pass over the data succeeded, but a later one failed
        return _fail(f"the problem cannot be evaluated: {describe_error(error)}", ExitCode.INVALID)
    except TerminatedError:
        _stopped("terminated", options, prog, arguments)
        return ExitCode.TERMINATED
    except KeyboardInterrupt:
        _stopped("interrupted", options, prog, arguments)
        return ExitCode.INTERRUPTED
    except Exception as error:  # print the reason and the place in one line, not a traceback
        return _fail(describe_error(error), ExitCode.FAILED)


def _stopped(why: str, options: argparse.Namespace | None, prog: str, arguments: Sequence[str]) -> None:
    """Print one line: why the command has stopped, and how to continue it."""
    advice = ""
    if options is not None and options.command == "spectrum":
        advice = "; nothing is saved without --out"
        if options.out is not None:
            advice = f"; to continue: {resume_line(prog, arguments)}"
    elif why == "time is up":
        advice = ": increase --seconds"
    print(f"curvop: {why}{advice}", file=sys.stderr)


def _fail(message: str, code: ExitCode) -> int:
    print(f"curvop: error: {message}", file=sys.stderr)
    return code


def _loaded(options: argparse.Namespace) -> dict[str, Any]:
    """Load the problem, and move it to ``--device``. Unless the data are to be checked, read them in a fixed order."""
    problem = load(options.problem)
    if options.device is not None:
        problem = moved(problem, options.device)
    return problem if options.command == "check" else problem | {"data": in_order(problem["data"])}


def _exit_code(ok: bool, timed_out: bool) -> ExitCode:
    if ok:
        return ExitCode.OK
    return ExitCode.TIME_UP if timed_out else ExitCode.FAILED


def _eigs(options: argparse.Namespace) -> int:
    """Run ``curvop eigs``; print each result as soon as it is available."""
    start = time.perf_counter()
    results: list[Any] = []
    # The user's code may print. Redirect its output, so that stdout contains only the JSON.
    with redirect_stdout(sys.stderr) if options.json else nullcontext():
        problem = _loaded(options)
        with _progress_bar() as bar:
            for result in _study(problem, options, bar):
                results.append(result)
                bar.delay = 0  # the first result shows that the problem is valid: display the bar now
                if isinstance(result, End | Singular | DenseCheck) and options.out:
                    save(options.out, results)
                if not options.json:
                    bar.clear()
                    print("\n".join(eigs_report(result, options)), end="\n\n", flush=True)
                    bar.refresh()
    seconds = time.perf_counter() - start
    if options.json:
        print(json.dumps(eigs_json(options, results, seconds), indent=2))
    else:
        count = num_products(results)
        products = f"{count:,} product{'s' * (count != 1)}"
        print(f"total: {products}, {seconds:.2f} s, including the time to load the problem")
        if options.out:
            print(f"eigenpairs: {options.out}")
    timed_out = any(result.timed_out for result in results if isinstance(result, End | Singular))
    return _exit_code(all(result.ok for result in results), timed_out)


def _study(problem: dict[str, Any], options: argparse.Namespace, bar: Any) -> Iterator[Result]:
    names = ("tol", "cost", "block", "maxiter", "seconds", "check")
    common = {name: getattr(options, name) for name in names}
    common |= {"settings": operator_settings(options), "bar": bar}
    if options.matrix == "jacobian":
        return singular_study(problem, k=options.k, **common)
    return study(problem, matrix=options.matrix, ends=_ends(options), damping=options.damping, **common)


def _ends(options: argparse.Namespace) -> list[tuple[str, int]]:
    """Return a list of pairs (`which`, `k`), one pair for each end of the spectrum to compute.

    By default, the smallest eigenvalues are computed only for a Hessian. The other matrices are semi-definite, and
    usually many of their eigenvalues are zero.
    """
    if options.which:
        return [(options.which, options.k)]
    return [("LA", options.k), *([("SA", min(NUM_SMALLEST, options.k))] if options.matrix == "hessian" else [])]


def _solve(options: argparse.Namespace) -> int:
    """Run ``curvop solve``."""
    with redirect_stdout(sys.stderr) if options.json else nullcontext(), _progress_bar() as bar:
        problem = _loaded(options)
        _, operator = wrap(problem, options.matrix, operator_settings(options), options.block, bar)
        gradient, loss = evaluated(operator)
        M, comparison = None, None
        if options.preconditioner:
            bar.set_description_str("preconditioner")
            try:
                M, comparison = _approximate_inverse(operator, options)
            except ValueError as problem_error:
                raise ProblemError(f"--preconditioner: {one_line(problem_error)}") from problem_error
        if options.rank:
            bar.set_description_str("preconditioner")
            try:
                M = nystrom(operator, options.rank, options.damping, rng=0)
            except ValueError as problem_error:
                raise ProblemError(f"--rank {options.rank}: {one_line(problem_error)}") from problem_error
        bar.set_description_str("solve")
        with without_verdicts():
            result = solve(
                operator,
                gradient,
                options.damping,
                rtol=options.rtol,
                preconditioner=M,
                maxiter=options.maxiter,
                seconds=options.seconds,
                progress=False,
            )
    if options.out:
        save_arrays(options.out, solution=result.solution, gradient=gradient, **param_arrays(operator.params_slices))
    if options.json:
        print(json.dumps(solve_json(operator, result, loss, comparison, options), indent=2))
    else:
        print("\n".join(solve_report(operator, result, loss, comparison, options)))
    return _exit_code(result.converged and result.negative_curvature is None, result.status == "seconds")


def _approximate_inverse(operator: Any, options: argparse.Namespace) -> tuple[Any, Comparison]:
    """Return a Kronecker-factored preconditioner, and the error of the approximation that it inverts."""
    if not options.damping:
        raise ValueError("the damping is 0, but must be positive: pass --damping")
    K = APPROXIMATIONS[options.preconditioner][1].of(operator)
    whole = {"all parameters": list(operator.params_slices)}  # one group takes fewer products than one for each block
    return K.inverse(options.damping), compare(K, operator, groups=whole)


def _spectrum(options: argparse.Namespace) -> int:
    """Run ``curvop spectrum``. The deadline is counted from the start of this function."""
    start = time.monotonic()
    with redirect_stdout(sys.stderr) if options.json else nullcontext():
        results = spectrum_study(_loaded(options), options, start)
    print(json.dumps(results.json(), indent=2) if options.json else results)
    return _exit_code(results.ok, timed_out=bool(results.undone))


def _check(options: argparse.Namespace) -> int:
    """Run ``curvop check``."""
    with redirect_stdout(sys.stderr) if options.json else nullcontext():
        problem = _loaded(options)
        settings = operator_settings(options)
        if options.matrix == "jacobian":
            _, operator = wrap_jacobian(problem, settings, options.block)
        elif options.matrix in APPROXIMATIONS:
            _, operator, _ = wrap_approximation(problem, options.matrix, settings, options.block)
        else:
            _, operator = wrap(problem, options.matrix, settings, options.block)
        try:
            report = check(operator, num_probes=options.probes, rng=0)
        except Exception as error:  # the user's model, loss and data run here for the first time
            raise ProblemError(f"the problem cannot be evaluated: {describe_error(error)}") from error
    if options.json:
        arguments = {name: getattr(options, name) for name in ("problem", "matrix", "block")}
        print(json.dumps(arguments | report.json(), indent=2))
    else:
        print(f"{title_of(options.matrix)} of {options.problem}\n{report}")
    return _exit_code(report.ok, timed_out=False)


@contextmanager
def _progress_bar() -> Iterator[Any]:
    """Yield a progress bar that counts products.

    The bar appears on stderr after half a second. If the problem is invalid and the command fails earlier, it prints
    only the error message.
    """
    terminal = sys.stderr.isatty()
    # Keep the bar in a log file, but clear it on a terminal.
    bar = new_bar("first pass", leave=not terminal, delay=0.5, dynamic_ncols=True)
    try:
        yield bar
    finally:
        bar.close()


if __name__ == "__main__":
    sys.exit(main())
