"""The ``curvop`` command."""

import argparse
import json
import math
import os
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext, redirect_stdout
from dataclasses import asdict
from pathlib import Path
from typing import Any, NoReturn

from tqdm import tqdm

from curvop import NonDeterministicObjectiveError, NonFiniteProductError, __version__
from curvop.dense import DenseCheck
from curvop.eigs import study
from curvop.problems import ProblemError, describe_error, load
from curvop.results import Cost, End, Result, Setup, Spectrum, save

__all__ = ["main"]

_ENDS = {
    "LA": "largest",
    "SA": "smallest",
    "LM": "largest in magnitude",
    "SM": "smallest in magnitude",
    "BE": "half from each end",
}

_DESCRIPTION = """\
Wraps the Hessian of the problem's loss over its whole data set, and prints its extreme eigenvalues with their true
residuals, a check against the dense matrix where that is small enough, and the solution of a damped linear system.
The problem is 'digits' (a small network trained on scikit-learn's handwritten digits), 'path/to/file.py:function' or
'package.module:function': a function that returns dict(model=..., loss_function=..., params=..., data=...)."""

_EPILOG = """\
exit codes: 0 all is well; 1 an eigenvalue or the solve did not converge in its true residual, or the dense check
disagrees; 2 a bad argument or problem; 130 interrupted"""


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
        return _eigs(options)
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
        "eigs", help="extreme eigenvalues of a Hessian", description=_DESCRIPTION, epilog=_EPILOG, allow_abbrev=False
    )
    eigs.add_argument("problem", metavar="PROBLEM", help="digits, FILE.py:FUNCTION or MODULE:FUNCTION")
    eigs.add_argument("--k", type=_count, default=10, help="number of eigenvalues (default: 10)")
    eigs.add_argument(
        "--which",
        choices=tuple(_ENDS),
        help="which eigenvalues, in eigsh's words (default: the k largest and the min(5, k) smallest); SM is slow",
    )
    eigs.add_argument("--tol", type=_nonnegative, default=0.0, help="eigsh's tolerance (default: 0, machine precision)")
    eigs.add_argument(
        "--dtype", choices=("float32", "float64"), default="float64", help="of the vectors (default: float64)"
    )
    eigs.add_argument("--engine", choices=("autograd", "compiled"), default="autograd", help="computes the products")
    eigs.add_argument("--cost", action="store_true", help="measure and print what one product costs")
    eigs.add_argument("--block", metavar="NAME", action="append", help="study this parameter's block; can be repeated")
    eigs.add_argument("--damping", type=_nonnegative, default=1e-2, help="in (B + damping I) x = g (default: 0.01)")
    eigs.add_argument("--out", metavar="FILE.npz", type=Path, help="save eigenvalues and eigenvectors in this file")
    eigs.add_argument("--json", action="store_true", help="print JSON instead of the report")
    return parser


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


def _check(options: argparse.Namespace) -> None:
    """Refuse, before anything is computed, what would only fail at the end."""
    if options.which == "BE" and options.k < 2:
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
            for result in study(
                problem,
                ends=[(options.which, options.k)] if options.which else [("LA", options.k), ("SA", min(5, options.k))],
                tol=options.tol,
                dtype=options.dtype,
                engine=options.engine,
                cost=options.cost,
                block=options.block,
                damping=options.damping,
                bar=bar,
            ):
                results.append(result)
                bar.delay = 0  # the problem can be evaluated: from here on there is progress to show
                if isinstance(result, DenseCheck) and options.out:
                    save(options.out, *results)
                if not options.json:
                    bar.clear()
                    print("\n".join(_report(result, options)), end="\n\n", flush=True)
                    bar.refresh()
    seconds = time.perf_counter() - start
    if options.json:
        print(json.dumps(_as_json(options, results, seconds), indent=2))
    else:
        print(f"in all: {_num_products(results):,} products, {seconds:.2f} s, the problem's own time included")
        if options.out:
            print(f"eigenpairs: {options.out}")
    return 0 if all(result.ok for result in results) else 1


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


def _num_products(results: Sequence[Any]) -> int:
    """Return the number of products of all steps."""
    setup, spectrum, _, solve = results
    costs = [setup.cost, spectrum.residual_cost, solve.cost, *(end.cost for end in spectrum.ends)]
    return sum(cost.products for cost in costs)


def _text(cost: Cost) -> str:
    rate = cost.products / cost.seconds if cost.seconds else 0.0
    return f"{cost.products:,} product{'s' * (cost.products != 1)} in {cost.seconds:.2f} s ({rate:,.0f} products/s)"


def _report(result: Result, options: argparse.Namespace) -> Iterator[str]:
    """Yield the lines for people to read."""
    if isinstance(result, Setup):
        yield f"Hessian of {options.problem}"
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
    yield f"{end.wanted} eigenvalues, {_ENDS[end.which]} ({end.which}){missing}: {_text(end.cost)}"
    yield f"  {'':>4}  {'lambda':>18}  {'||Hv - lambda v||':>17}"
    for i, value in enumerate(end.values):
        remark = "" if end.residuals[i] <= end.allowed[i] else f"  MISSED (allowed: {end.allowed[i]:.1e})"
        yield f"  {i + 1:>4}  {value:>18.10e}  {end.residuals[i]:>17.1e}{remark}"
    yield ""


def _as_json(options: argparse.Namespace, results: Sequence[Any], seconds: float) -> dict[str, Any]:
    """Return what ``--json`` prints; eigenvalues and residuals in the order of the report."""
    setup, spectrum, dense, solve = results
    joined = spectrum.arrays
    checked = {name: getattr(dense, name) for name in ("difference", "allowed", "spectral_norm", "seconds")}
    return {
        "problem": options.problem,
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
        "products": _num_products(results),
        "seconds": seconds,
    }


if __name__ == "__main__":
    sys.exit(main())
