"""The problems that the command ``curvop`` studies: the built-in one, and how yours are loaded."""

from curvop.cli.problem_loading import ProblemError, digits, load

__all__ = ["ProblemError", "digits", "load"]
