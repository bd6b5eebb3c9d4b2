"""Recorded linearizations take and return flat vectors, for every kind of matrix and any number of columns.

Here a "recorded" product simply runs again on the CPU; `test_gpu` tests the recording itself.
"""

from __future__ import annotations

import numpy as np
import pytest
from cases import Problem, loss_problem
from distributed_runs import KINDS

from curvop import JacobianLinearOperator
from curvop.kernels.cuda_graphs import Recorder, Replayed


@pytest.fixture
def recorded(monkeypatch) -> list[tuple[int, ...]]:
    """Record products on the host as they would be on a GPU; return the shapes of the vectors."""
    shapes = []

    def record(self, run, vectors, products, needed):
        assert needed >= vectors.nbytes + products.nbytes
        shapes.append(tuple(vectors.shape))
        return lambda again: run(again).clone()

    monkeypatch.setattr(
        Recorder, "recordable", lambda self, linearization, kernel, count: Replayed(linearization, kernel, self, count)
    )
    monkeypatch.setattr(Recorder, "record", record)
    return shapes


def operators(problem: Problem, engine: str) -> dict[str, object]:
    arguments = problem.model, problem.loss_function, problem.params, problem.data
    found = {kind: build(*arguments, engine=engine) for kind, build in KINDS.items()}
    J = JacobianLinearOperator(problem.model, problem.params, problem.data, engine=engine)
    hessian = found["hessian"]
    first, *_, last = problem.params
    return found | {"jacobian": J, "transposed": J.T, "block": hessian.block(last, first)}


@pytest.mark.parametrize("engine", ["autograd", pytest.param("compiled", marks=pytest.mark.nightly)])
@pytest.mark.parametrize("kind", [*KINDS, "jacobian", "transposed", "block"])
def test_products_are_the_same(recorded, kind: str, engine: str, monkeypatch) -> None:
    problem = loss_problem("ce")
    A = operators(problem, engine)[kind]
    with monkeypatch.context() as plain:
        plain.setattr(Recorder, "recordable", lambda self, linearization, kernel, count: linearization)
        B = operators(problem, "autograd")[kind]
        dense, adjoint = B @ np.eye(B.shape[1]), B.T @ np.eye(B.shape[0])
    rng = np.random.default_rng(0)
    for _ in range(5):
        x, X, y = (rng.normal(size=shape) for shape in (A.shape[1], (A.shape[1], 8), A.shape[0]))
        np.testing.assert_allclose(A @ x, dense @ x, rtol=1e-9, atol=1e-12)
        np.testing.assert_allclose(A @ X, dense @ X, rtol=1e-9, atol=1e-12)
        np.testing.assert_allclose(A.T @ y, adjoint @ y, rtol=1e-9, atol=1e-12)
    assert {len(shape) for shape in recorded} >= {1}


def test_the_second_product_of_as_many_columns_is_recorded(recorded) -> None:
    problem = loss_problem("ce")
    H = operators(problem, "autograd")["hessian"]
    batches, n = len(problem.data), H.shape[0]
    for expected in (0, 0, batches, batches):  # the first product builds the linearizations
        H @ np.ones(n)
        assert recorded == [(n,)] * expected
    recorded.clear()
    for _ in range(3):
        H.block(list(problem.params)) @ np.ones(n)
    assert recorded == []  # each block is a new operator with its first product
