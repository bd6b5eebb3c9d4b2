"""Problems for the command ``curvop``: the built-in problem, and a function that loads your own problem from a file."""

from curvop.cli.problem_loading import ProblemError, digits, last_layer, load
from curvop.operators.error_text import describe_error, one_line

__all__ = ["ProblemError", "describe_error", "digits", "last_layer", "load", "one_line"]
