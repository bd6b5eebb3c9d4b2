"""Eigenvalues compared with those of the dense matrix."""

from __future__ import annotations

import numpy as np
import pytest

from curvop.checks.dense_check import largest_difference

DENSE = np.array([-3.0, -1.0, 0.5, 2.0, 3.0])


@pytest.mark.parametrize(
    ("which", "found", "expected"),
    [
        ("LA", [3.0, 2.0], 0.0),
        ("LA", [3.0, 0.5], 1.5),  # 2 was missed
        ("LA", [3.0, 2.25], 0.25),
        ("SA", [-3.0], 0.0),
        ("SA", [3.0], 6.0),  # an eigenvalue, but of the other end
        ("LM", [-3.0], 0.0),
        ("LM", [3.0], 0.0),  # as large as -3
        ("LM", [2.0], 1.0),
        ("SM", [0.5, -1.0], 0.0),
        ("BE", [-3.0, 2.0, 3.0], 0.0),
    ],
)
def test_values_are_compared_by_rank(which: str, found: list[float], expected: float) -> None:
    assert largest_difference(which, len(found), np.array(found), DENSE) == pytest.approx(expected)


def test_those_that_did_not_converge_are_left_out() -> None:
    assert largest_difference("LA", 2, np.array([3.125]), DENSE) == pytest.approx(0.125)
    assert largest_difference("LA", 2, np.array([]), DENSE) == 0
