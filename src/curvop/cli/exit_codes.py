"""The exit codes of the ``curvop`` command, and their meaning for each subcommand."""

from __future__ import annotations

from enum import IntEnum

__all__ = ["ExitCode", "explained"]


class ExitCode(IntEnum):
    """Exit codes. A signal ends the command with 128 plus its number, as in a shell."""

    OK = 0
    FAILED = 1
    INVALID = 2
    TIME_UP = 3
    INTERRUPTED = 130
    TERMINATED = 143


_MEANINGS = {
    ExitCode.OK: "success",
    ExitCode.FAILED: "a result cannot be trusted, or an error occurred",
    ExitCode.INVALID: "an argument or the problem is invalid",
    ExitCode.TIME_UP: "time ran out: the results so far are printed, and saved with --out",
    ExitCode.INTERRUPTED: "interrupted by Ctrl-C (SIGINT)",
    ExitCode.TERMINATED: "terminated by SIGTERM",
}

_OF_COMMAND = {
    "eigs": {
        ExitCode.OK: "all eigenvalues are certified, and agree with the check if there is one",
        ExitCode.FAILED: "an eigenvalue is not certified, the check failed, or an error occurred",
    },
    "solve": {
        ExitCode.OK: "the true residual is as small as requested",
        ExitCode.FAILED: "the residual is too large, the matrix is indefinite, or an error occurred",
    },
    "spectrum": {
        ExitCode.OK: "all steps are complete, and all eigenvalues are certified",
        ExitCode.FAILED: "an eigenvalue is not certified, or an error occurred",
    },
    "check": {
        ExitCode.OK: "no check failed (there may be warnings)",
        ExitCode.FAILED: "a check failed, or an error occurred",
    },
}


def explained(command: str | None = None) -> str:
    """Return the exit codes and their meaning, one per line.

    Parameters
    ----------
    command : str, optional
        The subcommand. By default, the lines hold for all subcommands.
    """
    meanings = _MEANINGS | _OF_COMMAND.get(command or "", {})
    if command == "check":
        del meanings[ExitCode.TIME_UP]  # it has no time limit
    return "\n".join(["exit codes:", *(f"  {code:>3}  {meaning}" for code, meaning in meanings.items())])
