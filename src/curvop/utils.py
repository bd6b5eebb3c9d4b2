"""A function that compares two arrays and reports their differences."""

from curvop.testing.comparison import allclose_report

__all__ = ["allclose_report"]
