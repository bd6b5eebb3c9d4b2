"""Comparison of two arrays with a report of their differences."""

from curvop.testing.comparison import allclose_report

__all__ = ["allclose_report"]
