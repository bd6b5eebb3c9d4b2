"""The ``curvop`` command."""

import argparse
import json
import math
import os
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext, redirect_stdout
from pathlib import Path
from typing import Any, NoReturn

from tqdm import tqdm

from curvop import NonDeterministicObjectiveError, NonFiniteProductError, __version__
from curvop.dense import DenseCheck
from curvop.eigs import evaluated, quiet, study
from curvop.matrices import MATRICES, wrap
from curvop.preconditioner import nystrom
from curvop.problems import ProblemError, describe_error, load, one_line
from curvop.report import ENDS, eigs_json, eigs_report, num_products, solve_json, solve_report
from curvop.results import Result, param_arrays, save, save_arrays
from curvop.singular import singular_study
from curvop.solvers import solve

__all__ = ["main"]

_DESCRIPTION = """\
Wraps a curvature matrix of the problem's loss over its whole data set, and prints its extreme eigenvalues with their
true residuals, a check against the dense matrix where that is small enough, and the solution of a damped linear system.
Of the Jacobian of the predictions (--matrix jacobian) it prints the largest singular values.
The problem is 'digits' (a small network trained on scikit-learn's handwritten digits), 'path/to/file.py:function' or
'package.module:function': a function that returns dict(model=..., loss_function=..., params=..., data=...)."""

_EPILOG = """\
exit codes: 0 all is well; 1 an eigenvalue or the solve did not converge in its true residual, or the dense check
disagrees; 2 a bad argument or problem; 130 interrupted"""


_SOLVE_DESCRIPTION = """\
Solves (B + damping I) x = g for the gradient g of the problem's loss and a curvature matrix B, or a block of it: a
damped Newton step, -x. By conjugate gradients, and by MINRES where the damped matrix turns out to be indefinite. The
problem is named as for 'curvop eigs'."""

_SOLVE_EPILOG = """\
exit codes: 0 all is well; 1 the true residual is too large, or the damped matrix is indefinite; 2 a bad argument or
problem; 130 interrupted"""


class _UsageError(ValueError):
    """Arguments that make no sense."""


class _Parser(argparse.ArgumentParser):
    """A parser that raises, so that a mistake ends in one line rather than in a usage dump."""

    def error(self, message: str) -> NoReturn:
        raise _UsageError(message)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the ``curvop`` command.

    Parameters
    ----------
    argv : sequence of str, optional
        The arguments after the command's name; those of the process by default.

    Returns
    -------
    int
        The exit code: 0 where all is well, 1 where a result does not converge or agree, 2 for a bad argument or
        problem, 130 after Ctrl-C.
    """
    parser = _parser()
    try:
        options = parser.parse_args(argv)
        if options.command is None:
            parser.print_help()
            return 2
        _check(options)
        return _eigs(options) if options.command == "eigs" else _solve(options)
    except SystemExit as stop:  # argparse, after --help and --version
        return int(stop.code or 0)
    except (_UsageError, ProblemError) as error:
        return _fail(str(error), 2)
    except (NonDeterministicObjectiveError, NonFiniteProductError) as error:  # in a later pass than the first
        return _fail(f"the problem cannot be evaluated: {describe_error(error)}", 2)
    except KeyboardInterrupt:
        print("curvop: interrupted", file=sys.stderr)
        return 130
    except Exception as error:  # after hours of work, the reason and the place in one line
        return _fail(describe_error(error), 1)


def _fail(message: str, code: int) -> int:
    print(f"curvop: error: {message}", file=sys.stderr)
    return code


def _parser() -> _Parser:
    parser = _Parser(
        prog="curvop", description="Curvature matrices of PyTorch models as SciPy operators.", allow_abbrev=False
    )
    parser.add_argument("--version", action="version", version=f"curvop {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    eigs = commands.add_parser(
        "eigs",
        help="extreme eigenvalues of a curvature matrix",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        allow_abbrev=False,
    )
    _common(eigs, (*MATRICES, "jacobian"))
    eigs.add_argument("--k", type=_count, default=10, help="number of eigenvalues (default: 10)")
    eigs.add_argument(
        "--which",
        choices=tuple(ENDS),
        help="which eigenvalues, in eigsh's words (default: the k largest and, of a Hessian, the min(5, k) smallest); "
        "SM is slow",
    )
    eigs.add_argument("--tol", type=_nonnegative, default=0.0, help="eigsh's tolerance (default: 0, machine precision)")
    eigs.add_argument("--cost", action="store_true", help="measure and print what one product costs")
    eigs.add_argument("--out", metavar="FILE.npz", type=Path, help="save eigenvalues and eigenvectors in this file")
    solver = commands.add_parser(
        "solve",
        help="solve a damped system with a curvature matrix",
        description=_SOLVE_DESCRIPTION,
        epilog=_SOLVE_EPILOG,
        allow_abbrev=False,
    )
    _common(solver, tuple(MATRICES))
    solver.add_argument("--rtol", type=_share, default=1e-5, help="the relative residual to reach (default: 1e-5)")
    solver.add_argument(
        "--rank", type=_count, help="precondition by a Nystrom approximation of this rank, of ggn, ef or fisher"
    )
    solver.add_argument("--out", metavar="FILE.npz", type=Path, help="save the solution in this file")
    return parser


def _common(command: argparse.ArgumentParser, matrices: tuple[str, ...]) -> None:
    """Add what every command takes."""
    command.add_argument("problem", metavar="PROBLEM", help="digits, FILE.py:FUNCTION or MODULE:FUNCTION")
    command.add_argument("--matrix", choices=matrices, default="hessian", help="which matrix (default: hessian)")
    command.add_argument(
        "--dtype", choices=("float32", "float64"), default="float64", help="of the vectors (default: float64)"
    )
    command.add_argument("--engine", choices=("autograd", "compiled"), default="autograd", help="computes the products")
    command.add_argument("--block", metavar="NAME", action="append", help="this parameter's block; can be repeated")
    command.add_argument("--damping", type=_nonnegative, default=1e-2, help="in (B + damping I) x = g (default: 0.01)")
    command.add_argument("--json", action="store_true", help="print JSON instead of the report")


def _count(text: str) -> int:
    try:
        value = int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number") from None
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be 1 or more, not {value}")
    return value


def _nonnegative(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number") from None
    if not (math.isfinite(value) and value >= 0):
        raise argparse.ArgumentTypeError(f"must be finite and 0 or more, not {text}")
    return value


def _share(text: str) -> float:
    value = _nonnegative(text)
    if not 0 < value < 1:
        raise argparse.ArgumentTypeError(f"must be between 0 and 1, not {text}")
    return value


def _check(options: argparse.Namespace) -> None:
    """Refuse, before anything is computed, what would only fail at the end."""
    if options.matrix == "jacobian" and options.which:
        raise _UsageError("argument --which: of a Jacobian, the largest singular values are found: leave it out")
    if options.command == "eigs" and options.which == "BE" and options.k < 2:
        raise _UsageError("argument --k: must be 2 or more with --which BE")
    out: Path | None = options.out
    if out is None:
        return
    if out.suffix != ".npz":
        raise _UsageError(f"argument --out: {str(out)!r} does not end in .npz")
    if not out.parent.is_dir():
        raise _UsageError(f"argument --out: no folder {str(out.parent)!r}")
    if out.is_dir() or not os.access(out.parent, os.W_OK):
        raise _UsageError(f"argument --out: cannot write {str(out)!r}")


def _eigs(options: argparse.Namespace) -> int:
    """Run ``curvop eigs`` and report each result when it is there."""
    start = time.perf_counter()
    results: list[Any] = []
    # With --json, what a user's problem prints must not mix with the JSON.
    with redirect_stdout(sys.stderr) if options.json else nullcontext():
        problem = load(options.problem)
        with _progress_bar() as bar:
            for result in _study(problem, options, bar):
                results.append(result)
                bar.delay = 0  # the problem can be evaluated: from here on there is progress to show
                if isinstance(result, DenseCheck) and options.out:
                    save(options.out, *results)
                if not options.json:
                    bar.clear()
                    print("\n".join(eigs_report(result, options)), end="\n\n", flush=True)
                    bar.refresh()
    seconds = time.perf_counter() - start
    if options.json:
        print(json.dumps(eigs_json(options, results, seconds), indent=2))
    else:
        print(f"in all: {num_products(results):,} products, {seconds:.2f} s, the problem's own time included")
        if options.out:
            print(f"eigenpairs: {options.out}")
    return 0 if all(result.ok for result in results) else 1


def _study(problem: dict[str, Any], options: argparse.Namespace, bar: Any) -> Iterator[Result]:
    common = {name: getattr(options, name) for name in ("tol", "dtype", "engine", "cost", "block")}
    if options.matrix == "jacobian":
        return singular_study(problem, k=options.k, bar=bar, **common)
    return study(problem, matrix=options.matrix, ends=_ends(options), damping=options.damping, bar=bar, **common)


def _ends(options: argparse.Namespace) -> list[tuple[str, int]]:
    """Return which eigenvalues are wanted, and how many; of a semi-definite matrix the least are many zeros."""
    if options.which:
        return [(options.which, options.k)]
    return [("LA", options.k), *([("SA", min(5, options.k))] if options.matrix == "hessian" else [])]


def _solve(options: argparse.Namespace) -> int:
    """Run ``curvop solve``."""
    with redirect_stdout(sys.stderr) if options.json else nullcontext(), _progress_bar() as bar:
        problem = load(options.problem)
        _, operator = wrap(problem, options.matrix, options.dtype, options.engine, options.block, bar)
        gradient, loss = evaluated(operator)
        M = None
        if options.rank:
            bar.set_description_str("preconditioner")
            try:
                M = nystrom(operator, options.rank, options.damping, rng=0)
            except ValueError as error:
                raise ProblemError(f"--rank {options.rank}: {one_line(error)}") from error
        bar.set_description_str("solve")
        with quiet():
            result = solve(
                operator, gradient, damping=options.damping, rtol=options.rtol, preconditioner=M, progress=False
            )
    if options.out:
        save_arrays(options.out, solution=result.solution, gradient=gradient, **param_arrays(operator.params_slices))
    if options.json:
        print(json.dumps(solve_json(operator, result, loss, options), indent=2))
    else:
        print("\n".join(solve_report(operator, result, loss, options)))
    return 0 if result.converged and result.negative_curvature is None else 1


@contextmanager
def _progress_bar() -> Iterator[Any]:
    """Give a bar that counts products on stderr, silent while its delay is not over: bad problems end in one line."""
    terminal = sys.stderr.isatty()
    bar = tqdm(
        desc="first pass",
        unit=" products",
        file=sys.stderr,
        leave=not terminal,  # a log keeps the last line, a terminal is left clean
        mininterval=0.1 if terminal else 10.0,
        delay=0.5,
        dynamic_ncols=True,
    )
    try:
        yield bar
    finally:
        bar.close()


if __name__ == "__main__":
    sys.exit(main())
