"""Values rounded to their errors."""

from __future__ import annotations

import re

import numpy as np
import pytest

from curvop.operators.summaries import with_error


@pytest.mark.parametrize(
    ("value", "error", "text"),
    [
        (1.234567, 0.01, "1.23 +- 0.01"),
        (1.234567, 0.0123, "1.235 +- 0.012"),
        (-1.234567, 0.02, "-1.23 +- 0.02"),
        (1.234567, 3e-9, "1.23457"),
        (0.25, 1e-12, "0.250000"),
        (1.234567, 0.0, "1.23457"),
        (123456.0, 200.0, "123500 +- 200"),
        (1.2345678e9, 3e5, "(1.2346 +- 0.0003)e+09"),
        (1.234567e-7, 2e-9, "(1.23 +- 0.02)e-07"),
        (0.0, 1e-13, "(0 +- 1)e-13"),
        (-0.001, 0.02, "0.00 +- 0.02"),
        (3.5e-6, 4e-5, "(0 +- 4)e-05"),
        (9.6, 0.96, "10 +- 1"),
        (np.float64(2.5), np.float32(0.5), "2.5 +- 0.5"),
        (1.5, float("inf"), "1.5 +- inf"),
        (1.5, float("nan"), "1.5 +- nan"),
        (float("nan"), 0.1, "nan"),
        (-0.0, 0.0, "0"),
        (9.994e-6, 1e-8, "(9.99 +- 0.01)e-06"),
        (9.996e-6, 1e-7, "(1.00 +- 0.01)e-05"),
        (5e-324, 5e-324, "4.94066e-324"),
        (1.7e308, 9.9e307, "(2 +- 1)e+308"),
    ],
)
def test_closed_forms(value: float, error: float, text: str) -> None:
    assert with_error(value, error) == text


def test_the_number_of_digits_and_the_sign_can_be_chosen() -> None:
    assert with_error(1.23456789, 3e-6, 4) == "1.235"
    assert with_error(1.23456789, 3e-6, 10) == "1.234568 +- 0.000003"
    assert with_error(-0.5, 0.02, sign="-") == "-0.50 - 0.02"


def test_the_text_has_the_digits_of_the_error_and_no_more() -> None:
    rng = np.random.default_rng(0)
    for _ in range(2000):
        value = rng.choice([-1, 1]) * 10 ** rng.uniform(-12, 12)
        error = abs(value) * 10 ** rng.uniform(-3.9, 2)
        found = re.fullmatch(r"\(?(-?\d+\.?\d*) \+- (\d+\.?\d*)\)?(?:e([+-]\d\d))?", with_error(value, error))
        assert found is not None
        scale = 10.0 ** int(found[3] or 0)
        shown, uncertainty = float(found[1]) * scale, float(found[2]) * scale
        assert len(found[1].partition(".")[2]) == len(found[2].partition(".")[2])
        assert abs(uncertainty - error) <= 0.26 * error
        assert abs(shown - value) <= 0.51 * uncertainty
