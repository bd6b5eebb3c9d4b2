"""Warnings point at the line of the user's program that led to them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import scipy.sparse.linalg
import torch
from torch import nn

from curvop import HessianLinearOperator, solve, spectrum


def batchwise() -> HessianLinearOperator:
    """Return an operator whose first product warns that batch normalization uses the statistics of each batch."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2)).double()
    data = [(torch.randn(4, 3).double(), torch.randn(4, 2).double()) for _ in range(2)]
    return HessianLinearOperator(model, nn.MSELoss(), model.parameters(), data)


@pytest.mark.parametrize(
    "call",
    [
        pytest.param(lambda: solve(np.diag(np.linspace(-1.0, 1.0, 50)), np.ones(50), 0.0, progress=False), id="solve"),
        pytest.param(
            lambda: spectrum.eigsh(np.diag(np.arange(50.0)), 2, maxiter=1, method="lanczos", ncv=5, progress=False),
            id="eigsh",
        ),
        pytest.param(lambda: batchwise() @ np.ones(12), id="product"),
        pytest.param(lambda: scipy.sparse.linalg.cg(batchwise(), np.ones(12), maxiter=1), id="SciPy"),
    ],
)
def test_a_warning_points_at_the_line_of_the_user(call: Callable[[], Any]) -> None:
    with pytest.warns(RuntimeWarning) as caught:
        call()
    assert {warning.filename for warning in caught} == {__file__}
