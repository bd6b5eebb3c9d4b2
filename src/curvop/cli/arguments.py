"""What the ``curvop`` command takes."""

import argparse
import importlib.metadata
import math
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from curvop.cli.problem_loading import MATRICES
from curvop.cli.report import ENDS

__all__ = ["JOURNAL", "UsageError", "operator_settings", "parse"]

JOURNAL = "journal"
"""The folder that a study makes first of all in its own."""

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


_SPECTRUM_DESCRIPTION = """\
Studies the spectrum of a curvature matrix: its density, extreme eigenvalues with a certificate, trace and norm with
error bars, and with --blocks every layer. With --out it keeps what it does, and writes report.html after each step;
--resume continues a run that was killed or ended by its --deadline, and begins where there is none. The deadline counts
from the start of the command; nothing is broken off, so it can be overrun by the loading of the problem, its gradient,
and a product with --probes vectors. The problem is named as for 'curvop eigs'."""

_SPECTRUM_EPILOG = """\
exit codes: 0 all is well; 1 an eigenvalue is not certified, or the deadline left something undone; 2 a bad argument or
problem; 130 interrupted"""

_CHECK_DESCRIPTION = """\
Checks a problem before something long is done with it: that products are linear, symmetric, repeat, and agree with
other routes in float64; randomness, modules in training mode, shuffling, parameters that the loss does not reach. It
takes about ten products, and prints what to do about each thing that is found. The problem is named as for 'curvop
eigs'."""

_CHECK_EPILOG = """\
exit codes: 0 nothing is wrong, though there may be warnings; 1 something is wrong; 2 a bad argument or problem;
130 interrupted"""

_DAMPING = "in (B + damping I) x = g (default: 0.01)"


class UsageError(ValueError):
    """Arguments that make no sense."""


class _Parser(argparse.ArgumentParser):
    """A parser that raises, so that a mistake ends in one line rather than in a usage dump."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(message)


def parse(argv: Sequence[str] | None) -> argparse.Namespace | None:
    """Return the checked arguments, None where there is no command and the help was printed.

    Raises
    ------
    UsageError
        For arguments that make no sense.
    SystemExit
        After ``--help`` and ``--version``.
    """
    parser = _parser()
    options = parser.parse_args(argv)
    if options.command is None:
        parser.print_help()
        return None
    _check(options)
    return options


def operator_settings(options: argparse.Namespace) -> dict[str, Any]:
    """Return what an operator is told of how to compute."""
    return {name: getattr(options, name) for name in ("dtype", "engine", "columns")}


def _parser() -> _Parser:
    parser = _Parser(
        prog="curvop", description="Curvature matrices of PyTorch models as SciPy operators.", allow_abbrev=False
    )
    parser.add_argument("--version", action="version", version=f"curvop {importlib.metadata.version('curvop')}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    eigs = commands.add_parser(
        "eigs",
        help="extreme eigenvalues of a curvature matrix",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        allow_abbrev=False,
    )
    _common(eigs, (*MATRICES, "jacobian"))
    eigs.add_argument("--damping", type=_nonnegative, default=1e-2, help=_DAMPING)
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
    solver.add_argument("--damping", type=_nonnegative, default=1e-2, help=_DAMPING)
    solver.add_argument("--rtol", type=_share, default=1e-5, help="the relative residual to reach (default: 1e-5)")
    solver.add_argument(
        "--rank", type=_count, help="precondition by a Nystrom approximation of this rank, of ggn, ef or fisher"
    )
    solver.add_argument("--out", metavar="FILE.npz", type=Path, help="save the solution in this file")
    spectrum = commands.add_parser(
        "spectrum",
        help="a study of the whole spectrum, to be left running",
        description=_SPECTRUM_DESCRIPTION,
        epilog=_SPECTRUM_EPILOG,
        allow_abbrev=False,
    )
    _common(spectrum, tuple(MATRICES))
    spectrum.add_argument("--k", type=_count, default=10, help="eigenvalues at each end (default: 10)")
    spectrum.add_argument("--probes", type=_count, default=8, help="of the density (default: 8)")
    spectrum.add_argument("--steps", type=_count, default=64, help="of each probe (default: 64)")
    spectrum.add_argument("--blocks", action="store_true", help="study every parameter's block, too")
    spectrum.add_argument(
        "--deadline", type=_duration, metavar="TIME", help="end by then with what there is: 90s, 30m, 2h, 1h30m"
    )
    spectrum.add_argument("--out", metavar="DIR", type=Path, help="save results, pictures and report.html here")
    spectrum.add_argument("--resume", action="store_true", help="continue the study that --out holds, or begin one")
    check = commands.add_parser(
        "check",
        help="a check of a problem, before something long is done with it",
        description=_CHECK_DESCRIPTION,
        epilog=_CHECK_EPILOG,
        allow_abbrev=False,
    )
    _common(check, (*MATRICES, "jacobian"))
    check.add_argument("--probes", type=_count, default=2, help="random vectors (default: 2)")
    return parser


def _common(command: argparse.ArgumentParser, matrices: tuple[str, ...]) -> None:
    """Add what every command takes."""
    command.add_argument("problem", metavar="PROBLEM", help="digits, FILE.py:FUNCTION or MODULE:FUNCTION")
    command.add_argument("--matrix", choices=matrices, default="hessian", help="which matrix (default: hessian)")
    command.add_argument(
        "--dtype", choices=("float32", "float64"), default="float64", help="of the vectors (default: float64)"
    )
    command.add_argument("--engine", choices=("autograd", "compiled"), default="autograd", help="computes the products")
    command.add_argument(
        "--columns",
        type=_columns,
        default="auto",
        metavar="N|auto",
        help="how many vectors are multiplied at once; 1 repeats the last digits in every run (default: auto, what is "
        "measured to be fastest)",
    )
    command.add_argument("--block", metavar="NAME", action="append", help="this parameter's block; can be repeated")
    command.add_argument("--json", action="store_true", help="print JSON instead of the report")


def _count(text: str) -> int:
    try:
        value = int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number") from None
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be 1 or more, not {value}")
    return value


def _columns(text: str) -> int | str:
    if text == "auto":
        return text
    try:
        return _count(text)
    except argparse.ArgumentTypeError:
        raise argparse.ArgumentTypeError(f"must be a number from 1 on, or 'auto', not {text!r}") from None


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


def _duration(text: str) -> float:
    """Return seconds."""
    found = re.fullmatch(r"(?:(\d+(?:\.\d+)?)h)?(?:(\d+(?:\.\d+)?)m)?(?:(\d+(?:\.\d+)?)s?)?", text.strip())
    seconds = (
        sum(float(part or 0) * unit for part, unit in zip(found.groups(), (3600, 60, 1), strict=True)) if found else 0
    )
    if not seconds > 0:
        raise argparse.ArgumentTypeError(f"{text!r} is no time such as 90s, 30m, 2h or 1h30m")
    return seconds


def _check(options: argparse.Namespace) -> None:
    """Refuse, before anything is computed, what would only fail at the end."""
    if options.command == "check":
        return
    if options.matrix == "jacobian" and options.which:  # eigs only
        raise UsageError("argument --which: of a Jacobian, the largest singular values are found: leave it out")
    if options.command == "eigs" and options.which == "BE" and options.k < 2:
        raise UsageError("argument --k: must be 2 or more with --which BE")
    out: Path | None = options.out
    if options.command == "spectrum":
        _check_directory(out, options.resume)
    elif out is not None:
        _check_file(out)


def _check_file(out: Path) -> None:
    if out.suffix != ".npz":
        raise UsageError(f"argument --out: {str(out)!r} does not end in .npz")
    if not out.parent.is_dir():
        raise UsageError(f"argument --out: no folder {str(out.parent)!r}")
    if out.is_dir() or not os.access(out.parent, os.W_OK):
        raise UsageError(f"argument --out: cannot write {str(out)!r}")


def _check_directory(out: Path | None, resume: bool) -> None:
    if out is None:
        if resume:
            raise UsageError("argument --resume: needs --out, the folder that holds the study")
        return
    if out.exists() and not out.is_dir():
        raise UsageError(f"argument --out: {str(out)!r} is no folder")
    if not out.resolve().parent.is_dir():
        raise UsageError(f"argument --out: no folder {str(out.resolve().parent)!r}")
    if not os.access(out if out.exists() else out.resolve().parent, os.W_OK):
        raise UsageError(f"argument --out: cannot write {str(out)!r}")
    if not (out.exists() and any(out.iterdir())):
        return  # to be begun, with --resume too: a job that is queued again is started by the same line
    if not resume:
        raise UsageError(f"argument --out: {str(out)!r} is not empty: pass --resume to continue, or another folder")
    if not (out / JOURNAL).is_dir():
        raise UsageError(f"argument --resume: {str(out)!r} holds no study, but other things: pass another --out")
