"""The arguments of the ``curvop`` command, and their checks."""

import argparse
import contextlib
import importlib
import math
import os
import re
import shlex
import shutil
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import torch

from curvop.cli.exit_codes import explained
from curvop.cli.problem_loading import APPROXIMATIONS, MATRICES
from curvop.cli.report import ENDS
from curvop.operators.version import __version__

__all__ = ["JOURNAL", "NUM_SMALLEST", "UsageError", "operator_settings", "parse"]

JOURNAL = "journal"
"""Name of the first subfolder that a spectrum study creates in ``--out``. ``--resume`` requires this subfolder."""

NUM_SMALLEST = 5
"""Largest number of smallest eigenvalues that are computed without a request. There are often many zeros."""

_PROBLEM = """PROBLEM is 'digits' (a small network trained on scikit-learn's handwritten digits),
'path/to/file.py:function' or 'package.module:function'. The function must return dict(model=..., loss_function=...,
params=..., data=...)."""

_ORDER = "The examples of a DataLoader that shuffles are read in the order of the data set."

_DESCRIPTIONS = {
    "eigs": f"""Compute extreme eigenvalues of a curvature matrix of the loss over the whole data set, and certify them:
the report shows a bound for the error of each eigenvalue, and says whether an eigenvalue may be missing. With --matrix
jacobian, compute the largest singular values of the Jacobian of the predictions and their residuals. With --check,
also compare with the dense matrix, if it is small enough, and solve a damped linear system with the block of the last
layer. To keep all products and to continue an interrupted run, use 'curvop spectrum --out'. {_ORDER} {_PROBLEM}""",
    "solve": f"""Solve (B + damping I) x = g, where B is a curvature matrix or a block of a curvature matrix, and g is
the gradient of the loss. The vector -x is a damped Newton step. The solver is conjugate gradients; if the damped matrix
is found to be indefinite, the solver is MINRES. {_ORDER} {_PROBLEM}""",
    "spectrum": f"""Study the spectrum of a curvature matrix. Compute the largest eigenvalues with error bounds, the
spectral density, for a Hessian the smallest eigenvalues, and the trace and the Frobenius norm with error bars; with
--blocks, also study the block of each parameter. With --matrix kfac or ekfac, study an approximation of the
Gauss-Newton matrix: compute exact values from its factors, and estimate the error of each block. With --out, save all
products and results in a folder, and write report.html after each step. With --resume, continue the study in this
folder, for example after the command was killed or reached its --deadline; if the folder is missing or empty, start
one. With a larger --k, --steps or --probes, --resume extends the study. The deadline is counted from the start of the
command. The steps share the time in the above order, and the time that is left goes to the first steps that are not
finished. Some steps are not interrupted and can exceed the deadline: loading the problem, computing the gradient, and
one product with --probes vectors. {_ORDER} {_PROBLEM}""",
    "check": f"""Check a problem before a long computation. Products must be finite, linear, symmetric and repeatable,
and must agree with other methods in float64. The check also detects randomness, modules in training mode, shuffled
data, and parameters that do not affect the loss. It takes about ten products, and suggests a remedy if a check fails.
{_PROBLEM}""",
}

_DAMPING = "damping in (B + damping I) x = g (default: 0.01)"
_TIME = "for example 90s, 30m, 2h or 1h30m"


class UsageError(ValueError):
    """Raised if a command-line argument is invalid."""


class _Parser(argparse.ArgumentParser):
    """Parser that raises `UsageError` for an invalid argument, instead of printing the usage and exiting."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(message)


def parse(argv: Sequence[str], prog: str = "curvop") -> argparse.Namespace | None:
    """Parse and check the arguments.

    Parameters
    ----------
    argv : sequence of str
        The arguments, without the name of the command.
    prog : str
        How the command was called, for example ``'curvop'``. The help shows this name.

    Returns
    -------
    argparse.Namespace or None
        The parsed arguments, and the whole command line as ``command_line``, quoted for a shell. If `argv` contains no
        subcommand, print the help and return None.

    Raises
    ------
    UsageError
        If an argument is invalid.
    SystemExit
        If the arguments contain ``--help`` or ``--version``.
    """
    parser = _parser(prog)
    _complete(parser)
    options = parser.parse_args(argv)
    if options.command is None:
        parser.print_help()
        return None
    _check(options)
    options.command_line = f"{prog} {shlex.join(argv)}"
    return options


def operator_settings(options: argparse.Namespace) -> dict[str, Any]:
    """Return a dictionary of keyword arguments for the operator: ``dtype``, ``engine`` and ``columns``."""
    return {name: getattr(options, name) for name in ("dtype", "engine", "columns")}


def _parser(prog: str) -> _Parser:
    parser = _Parser(
        prog=prog,
        description="Curvature matrices of PyTorch models as SciPy operators.",
        epilog=explained(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"curvop {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")

    def add(name: str, summary: str, matrices: tuple[str, ...]) -> argparse.ArgumentParser:
        width = max(11, shutil.get_terminal_size().columns - 2)  # as argparse does
        command: argparse.ArgumentParser = commands.add_parser(
            name,
            help=summary,
            description=textwrap.fill(_DESCRIPTIONS[name], width),
            epilog=explained(name),
            formatter_class=argparse.RawDescriptionHelpFormatter,  # the exit codes have a line each
            allow_abbrev=False,
        )
        _common(command, matrices)
        return command

    eigs = add("eigs", "compute extreme eigenvalues of a curvature matrix", (*MATRICES, "jacobian"))
    eigs.add_argument(
        "--k",
        type=_count,
        default=10,
        help="how many eigenvalues: the k largest, and for --matrix hessian also the "
        f"min({NUM_SMALLEST}, k) smallest; with --which, k at this end; for a Jacobian, the k largest singular values "
        "(default: 10)",
    )
    eigs.add_argument(
        "--which",
        choices=tuple(ENDS),
        help="only these eigenvalues, as in scipy.sparse.linalg.eigsh: "
        + ", ".join(f"{which} {title}" for which, title in ENDS.items())
        + "; SM is slow (default: see --k)",
    )
    eigs.add_argument(
        "--tol", type=_nonnegative, default=0.0, help="relative tolerance of the solver (default: 0, machine precision)"
    )
    eigs.add_argument(
        "--maxiter", type=_count, help="maximum number of restarts at each end (default: 10 N, and at most 1000)"
    )
    eigs.add_argument(
        "--seconds",
        type=_duration,
        metavar="TIME",
        help=f"time limit of the eigenvalues, {_TIME}; then report the eigenvalues so far",
    )
    eigs.add_argument(
        "--check",
        action="store_true",
        help="also compare with the dense matrix, if it is small enough, and solve a linear system with the last layer",
    )
    eigs.add_argument("--damping", type=_nonnegative, default=1e-2, help=f"with --check: {_DAMPING}")
    eigs.add_argument("--cost", action="store_true", help="measure the time and memory of one product")
    eigs.add_argument("--out", metavar="FILE.npz", type=Path, help="save eigenvalues and eigenvectors to this file")
    solver = add("solve", "solve a damped linear system with a curvature matrix", tuple(MATRICES))
    solver.add_argument("--damping", type=_nonnegative, default=1e-2, help=_DAMPING)
    solver.add_argument("--rtol", type=_fraction, default=1e-5, help="relative residual to reach (default: 1e-5)")
    solver.add_argument(
        "--rank", type=_count, help="rank of a Nystrom preconditioner, for ggn, ef and fisher (default: none)"
    )
    solver.add_argument(
        "--preconditioner",
        choices=tuple(APPROXIMATIONS),
        help="a Kronecker-factored preconditioner, for ggn, ef and fisher; its error is estimated (default: none)",
    )
    solver.add_argument("--maxiter", type=_count, help="maximum number of steps (default: 10 N, and at most 1000)")
    solver.add_argument("--seconds", type=_duration, metavar="TIME", help=f"time limit of the solver, {_TIME}")
    solver.add_argument("--out", metavar="FILE.npz", type=Path, help="save the solution and the gradient to this file")
    spectrum = add("spectrum", "study the whole spectrum; can be stopped and resumed", (*MATRICES, *APPROXIMATIONS))
    spectrum.add_argument(
        "--k",
        type=_count,
        default=10,
        help="how many eigenvalues: the k largest, and for --matrix hessian also the "
        f"min({NUM_SMALLEST}, k) smallest (default: 10)",
    )
    spectrum.add_argument(
        "--maxiter",
        type=_count,
        help="maximum number of restarts for the eigenvalues at each end (default: 10 N, and at most 1000)",
    )
    spectrum.add_argument(
        "--probes", type=_count, default=8, help="number of random vectors of the density (default: 8)"
    )
    spectrum.add_argument("--steps", type=_count, default=64, help="Lanczos steps per random vector (default: 64)")
    spectrum.add_argument("--blocks", action="store_true", help="also study the block of each parameter")
    spectrum.add_argument(
        "--deadline",
        "--seconds",
        type=_duration,
        metavar="TIME",
        help=f"use this time, {_TIME}, and then report the results so far",
    )
    spectrum.add_argument(
        "--out", metavar="DIR", type=Path, help="save results, pictures and report.html in this folder"
    )
    spectrum.add_argument("--resume", action="store_true", help="continue the study in --out, or start one")
    check = add("check", "check a problem before a long computation", (*MATRICES, *APPROXIMATIONS, "jacobian"))
    check.add_argument("--probes", type=_count, default=2, help="number of random vectors (default: 2)")
    return parser


def _complete(parser: argparse.ArgumentParser) -> None:
    """Answer the shell, if it asks for the completion of a command line, and exit."""
    if "_ARGCOMPLETE" in os.environ:
        with contextlib.suppress(ImportError):
            importlib.import_module("argcomplete").autocomplete(parser)


def _common(command: argparse.ArgumentParser, matrices: tuple[str, ...]) -> None:
    """Add the arguments that all subcommands have in common."""
    command.add_argument("problem", metavar="PROBLEM", help="digits, FILE.py:FUNCTION or MODULE:FUNCTION")
    command.add_argument(
        "--device",
        type=_device,
        help="move the model and the data to this device, for example cpu or cuda (default: that of the parameters)",
    )
    command.add_argument("--matrix", choices=matrices, default="hessian", help="which matrix (default: hessian)")
    command.add_argument(
        "--dtype", choices=("float32", "float64"), default="float64", help="dtype of the vectors (default: float64)"
    )
    command.add_argument(
        "--engine",
        choices=("autograd", "compiled"),
        default="autograd",
        help="how products are computed (default: autograd)",
    )
    command.add_argument(
        "--columns",
        type=_columns,
        default="auto",
        metavar="N|auto",
        help="number of columns of a block product to compute at once; with 1, every run gives the same digits "
        "(default: auto, the fastest number in a measurement)",
    )
    command.add_argument(
        "--block",
        metavar="NAME",
        action="append",
        help="restrict the matrix to this parameter, to the parameters of this module, or to those that match a "
        "pattern such as '*.bias'; can be repeated",
    )
    command.add_argument("--json", action="store_true", help="print JSON instead of the report")


def _count(text: str) -> int:
    try:
        value = int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not an integer") from None
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be >= 1, not {value}")
    return value


def _columns(text: str) -> int | str:
    if text == "auto":
        return text
    try:
        return _count(text)
    except argparse.ArgumentTypeError:
        raise argparse.ArgumentTypeError(f"must be an integer >= 1 or 'auto', not {text!r}") from None


def _device(text: str) -> torch.device:
    try:
        device = torch.device(text)
    except RuntimeError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a device: pass cpu, cuda or cuda:1") from None
    if device.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if (device.index or 0) >= count:
            found = f"{count} CUDA device{'s' * (count != 1)}" if count else "no CUDA device"
            raise argparse.ArgumentTypeError(
                f"{text!r} is not available: torch finds {found}; leave it out, or pass cpu"
            )
        return device
    try:
        torch.zeros(1, device=device).item()
    except Exception:  # some devices need a package that is not installed
        raise argparse.ArgumentTypeError(f"{text!r} is not available: pass cpu, cuda or cuda:1") from None
    return device


def _nonnegative(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number") from None
    if not (math.isfinite(value) and value >= 0):
        raise argparse.ArgumentTypeError(f"must be finite and >= 0, not {text}")
    return value


def _fraction(text: str) -> float:
    value = _nonnegative(text)
    if not 0 < value < 1:
        raise argparse.ArgumentTypeError(f"must be between 0 and 1, not {text}")
    return value


def _duration(text: str) -> float:
    """Convert a duration such as ``1h30m`` to seconds."""
    match = re.fullmatch(r"(?:(\d+(?:\.\d+)?)h)?(?:(\d+(?:\.\d+)?)m)?(?:(\d+(?:\.\d+)?)s?)?", text.strip())
    seconds = 0.0
    if match:
        seconds = sum(float(part or 0) * unit for part, unit in zip(match.groups(), (3600, 60, 1), strict=True))
    if not seconds > 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a duration > 0 such as 90s, 30m, 2h or 1h30m")
    return seconds


def _check(options: argparse.Namespace) -> None:
    """Raise `UsageError` for arguments whose errors would otherwise be found only after a long computation."""
    if options.command == "check":
        return
    if options.matrix == "jacobian" and options.which:  # eigs only
        raise UsageError("argument --which: --matrix jacobian always finds the largest singular values: leave it out")
    if options.command == "eigs" and options.which == "BE" and options.k < 2:
        raise UsageError("argument --k: must be >= 2 with --which BE")
    if options.command == "solve" and options.preconditioner:
        if options.matrix == "hessian":
            raise UsageError("argument --preconditioner: needs --matrix ggn, ef or fisher")
        if options.rank:
            raise UsageError("argument --preconditioner: cannot be combined with --rank")
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
            raise UsageError("argument --resume: needs --out, the folder of the study")
        return
    if out.exists() and not out.is_dir():
        raise UsageError(f"argument --out: {str(out)!r} is not a folder")
    if not out.resolve().parent.is_dir():
        raise UsageError(f"argument --out: no folder {str(out.resolve().parent)!r}")
    if not os.access(out if out.exists() else out.resolve().parent, os.W_OK):
        raise UsageError(f"argument --out: cannot write {str(out)!r}")
    if not (out.exists() and any(out.iterdir())):
        return  # start a study even with --resume, so that a queued job can always use the same command
    if not resume:
        raise UsageError(f"argument --out: {str(out)!r} is not empty: pass --resume to continue it, or another folder")
    if not (out / JOURNAL).is_dir():
        raise UsageError(f"argument --resume: {str(out)!r} holds other files but no study: pass another --out")
