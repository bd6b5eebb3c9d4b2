"""Compare two arrays and print where they differ."""

from curvop.testing.comparison import allclose_report

__all__ = ["allclose_report"]
