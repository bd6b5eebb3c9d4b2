"""What every curvature operator has to show: the same matrix, however it is multiplied."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from scipy.sparse.linalg import LinearOperator

from curvop.operators.curvature_operator import GGNLikeLinearOperator


def close(actual: Any, expected: Any) -> None:
    np.testing.assert_allclose(actual, expected, rtol=1e-10, atol=1e-12)


def assert_matrix(build: Callable[..., Any], dense: np.ndarray, diagonal: bool = True, **options: Any) -> None:
    """``build(**options)`` is the symmetric matrix `dense` of float64 parameters, and so are its parts.

    Without `diagonal`, it is to say that it cannot tell its own diagonal.
    """
    A = build(**options)
    size = len(dense)
    assert isinstance(A, LinearOperator)
    assert A.shape == dense.shape
    product = A @ np.eye(size)
    close(product, dense)
    close(product, product.T)
    close((A @ torch.eye(size, dtype=torch.float64)).numpy(), dense)
    x, y = np.random.default_rng(0).normal(size=(2, size))
    close(A @ x, dense @ x)
    close(y @ (A @ x), x @ (A.H @ y))
    close(build(cache=0, **options) @ x, dense @ x)
    names = list(A.params_slices)
    rows, cols = A.params_slices[names[0]], A.params_slices[names[-1]]
    block = A.block(names[0], names[-1])
    close(block @ x[cols], dense[rows, cols] @ x[cols])
    close(block.H @ x[rows], dense[cols, rows] @ x[rows])
    some = [0, size - 1, 0, size // 2]
    close(A[some, :][:, cols] @ x[cols], dense[some, cols] @ x[cols])
    close(A.damped(0.5) @ x, dense @ x + 0.5 * x)
    if not isinstance(A, GGNLikeLinearOperator):
        return
    if diagonal:
        close(A.diagonal(), np.diagonal(dense))
        rows = A.params_slices[names[-1]]
        close(A.block(names[-1]).diagonal(), np.diagonal(dense)[rows])
    else:
        with pytest.raises(NotImplementedError):
            A.diagonal()
