"""Blocks of columns: the product does not depend on the chunk size, and is never slower than column by column."""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np
import pytest
import torch
from cases import Problem, loss_problem, mlp
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from curvop import HessianLinearOperator
from curvop.kernels import engine
from curvop.kernels.engine import Columns, set_sums

P = 43


def hessian(problem: Problem, **options) -> HessianLinearOperator:
    return HessianLinearOperator(problem.model, problem.loss_function, problem.params, problem.data, **options)


class Clock:
    """A simulated machine on which a chunk of columns takes a given time."""

    def __init__(self, seconds: Callable[[int], float]) -> None:
        self.seconds, self.now = seconds, 0.0

    def run(self, columns: Columns, count: int, room: int = 10**9) -> list[int]:
        sizes = []
        for start, stop in columns.chunks(count, lambda: room, lambda: self.now):
            sizes.append(stop - start)
            self.now += self.seconds(stop - start)
        return sizes


def small(size: int) -> float:
    """Return the time of a chunk if a call costs as much as two columns."""
    return 2.0 + size if size > 1 else 2.5


def large(size: int) -> float:
    """Return the time of a chunk if batching makes columns slower."""
    return 1.5 * size if size > 1 else 1.0


class TestChunks:
    @settings(deadline=None)
    @given(
        counts=st.lists(st.integers(0, 300), min_size=1, max_size=5),
        room=st.integers(0, 200),
        setting=st.one_of(st.just("auto"), st.integers(1, 100)),
    )
    def test_cover_every_column_once_and_stay_within_the_room(self, counts, room, setting) -> None:
        columns = Columns(setting)
        for count in counts:
            bounds = list(columns.chunks(count, lambda: room, lambda: 0.0))
            assert [start for start, _ in bounds] == [0, *(stop for _, stop in bounds)][: len(bounds)]
            assert sum(stop - start for start, stop in bounds) == count
            assert all(stop - start <= max(1, room) for start, stop in bounds)

    def test_the_cheapest_size_is_found_and_stays(self) -> None:
        clock, columns = Clock(small), Columns("auto")
        for _ in range(3):
            clock.run(columns, 200)
        assert clock.run(columns, 200) == [64, 64, 64, 8]

    @pytest.mark.parametrize("count", [2, 3, 5, 7, 8, 9, 20, 33, 64])
    def test_a_block_of_any_number_of_columns_becomes_one_chunk(self, count) -> None:
        clock, columns = Clock(small), Columns("auto")
        for _ in range(9):
            clock.run(columns, count)
        assert clock.run(columns, count) == [count]

    @pytest.mark.parametrize("count", [2, 8, 20, 100])
    def test_blocks_are_not_slower_than_single_columns(self, count) -> None:
        clock, columns = Clock(large), Columns("auto")
        for _ in range(9):
            clock.run(columns, count)
        assert clock.run(columns, count) == [1] * count

    def test_a_size_is_used_only_while_it_is_the_fastest(self) -> None:
        """From 9 columns on, the tensors of a chunk do not fit into the cache."""
        clock, columns = Clock(lambda size: small(size) * (1 + 2 * (size > 8))), Columns("auto")
        for _ in range(9):
            clock.run(columns, 100)
        assert clock.run(columns, 100) == [8] * 12 + [4]
        for _ in range(9):
            clock.run(columns, 20)
        assert clock.run(columns, 20) == [8, 8, 4]

    def test_no_larger_size_is_tried_if_batching_does_not_pay(self) -> None:
        clock, columns = Clock(large), Columns("auto")
        assert clock.run(columns, 100) == [1] * 4 + [8] * 4 + [1] * 64
        assert clock.run(columns, 100) == [1] * 100
        assert clock.run(columns, 5) == [1] * 5  # 8 columns at once were slower, so 5 are not tried

    def test_no_larger_size_is_tried_if_columns_take_long(self) -> None:
        clock, columns = Clock(small), Columns("auto", worth=2.4)
        assert clock.run(columns, 20) == [1] * 20
        clock, columns = Clock(small), Columns("auto", worth=2.5)
        assert clock.run(columns, 20)[:5] == [1, 1, 1, 1, 8]

    def test_single_columns_are_kept_if_larger_chunks_are_hardly_faster(self) -> None:
        clock, columns = Clock(lambda size: size * (1.0 if size == 1 else 0.97)), Columns("auto")
        for _ in range(9):
            clock.run(columns, 8)
        assert clock.run(columns, 8) == [1] * 8

    def test_single_columns_are_not_timed(self) -> None:
        clock, columns = Clock(large), Columns("auto")
        assert clock.run(columns, 1) == [1]
        assert not columns._times


@pytest.mark.parametrize("columns", [1, 2, 7, 43, 1000, "auto"])
@pytest.mark.parametrize("cache", [0, 3000, 10**9])
def test_the_product_is_the_same(columns, cache) -> None:
    problem = loss_problem("ce-everything")
    expected = hessian(problem, columns=1) @ np.eye(P)
    H = hessian(problem, columns=columns, cache=cache)
    for K in (0, 1, 2, 9, P):
        np.testing.assert_allclose(H @ np.eye(P)[:, :K], expected[:, :K], rtol=1e-12, atol=1e-15)
        np.testing.assert_allclose(
            H @ torch.eye(P, dtype=torch.float64)[:, :K], expected[:, :K], rtol=1e-12, atol=1e-15
        )
    assert H.num_products == 2 * (0 + 1 + 2 + 9 + P)


def test_rectangular_blocks_in_chunks() -> None:
    problem = loss_problem("ce")
    dense = hessian(problem) @ np.eye(P)
    H = hessian(problem, columns=6)
    A = H.block(["2.bias", "0.weight"], "0.bias")
    rows = np.r_[H.params_slices["2.bias"], H.params_slices["0.weight"]]
    np.testing.assert_allclose(A @ np.eye(5), dense[rows][:, H.params_slices["0.bias"]], rtol=1e-12, atol=1e-15)
    np.testing.assert_allclose(A.H @ np.eye(23), (A @ np.eye(5)).T, rtol=1e-12, atol=1e-15)


class Doubling(torch.autograd.Function):
    """Cannot batch columns: it has no `vmap` rule, and Python reads the values."""

    @staticmethod
    def forward(ctx, x):
        return 2 * x

    @staticmethod
    def backward(ctx, gradient):
        return 2 * gradient if float(gradient.detach().sum()) != 0.5 else 3 * gradient


def test_what_cannot_be_batched_goes_column_by_column() -> None:
    torch.manual_seed(0)
    model = mlp().double()

    def twice(params, X):
        return Doubling.apply(torch.func.functional_call(model, params, (X,)))

    X, y = torch.randn(6, 4).double(), torch.randn(6, 3).double()
    H = HessianLinearOperator(twice, nn.MSELoss(), dict(model.named_parameters()), [(X, y)], columns=8)
    once = Problem(model, nn.MSELoss(reduction="sum"), [(X, y / 2)])
    np.testing.assert_allclose(H @ np.eye(P), 4 / 18 * (hessian(once) @ np.eye(P)), rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("cache", [0, "auto"])
@pytest.mark.parametrize(("batch", "columns"), [(1, 2), (3, 2), (3, 8)])
def test_operations_that_torch_batches_wrongly_go_column_by_column(batch: int, columns: int, cache: object) -> None:
    """For these shapes, the second derivative of GroupNorm is wrong for several vectors at once (torch 2.13)."""
    torch.manual_seed(0)
    layers = nn.Conv1d(4, 3, 3, padding=1), nn.GroupNorm(1, 3), nn.Flatten(), nn.Linear(9, 1)
    model = nn.Sequential(*layers).double()
    X, y = torch.randn(batch, 4, 3).double(), torch.randn(batch, 1).double()
    params = {name: value for name, value in model.named_parameters() if name.startswith("0.")}
    [gradient] = (
        torch.cat([part.reshape(-1) for part in torch.autograd.grad(loss, params.values(), create_graph=True)])
        for loss in [nn.functional.mse_loss(model(X), y)]
    )
    rows = [torch.autograd.grad(entry, params.values(), retain_graph=True) for entry in gradient]
    dense = torch.stack([torch.cat([part.reshape(-1) for part in row]) for row in rows]).numpy()
    H = HessianLinearOperator(model, nn.MSELoss(), params, [(X, y)], columns=columns, cache=cache)
    for _ in range(3):
        np.testing.assert_allclose(H @ np.eye(len(dense)), dense, rtol=1e-10, atol=1e-12)


def test_each_number_of_columns_is_checked_once() -> None:
    problem = loss_problem("ce")
    H = hessian(problem, columns=8)
    A, calls = H._engine, [0]
    original = A._verify
    A._verify = lambda *arguments: calls.append(1) or original(*arguments)
    for columns in (8, 8, 16, 3, 3):
        H @ np.ones((P, columns))
    assert len(calls) - 1 == 2 * len(problem.data)  # 8 and 3 columns at once


@pytest.mark.parametrize("columns", [0, -1, 2.5, "all", None])
def test_the_setting_is_checked(columns) -> None:
    with pytest.raises(ValueError, match=r"columns is .* but must be a number of columns"):
        hessian(loss_problem("ce"), columns=columns)


def test_scalar_parameters() -> None:
    gain = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
    shift = torch.ones(2, dtype=torch.float64, requires_grad=True)
    H = HessianLinearOperator.from_objective(
        lambda p, X: (p["gain"] * X + p["shift"]).pow(2).sum(),
        {"gain": gain, "shift": shift},
        [torch.tensor([1.0, 3.0])],
    )
    expected = [[20.0, 2.0, 6.0], [2.0, 2.0, 0.0], [6.0, 0.0, 2.0]]
    np.testing.assert_allclose(H @ np.eye(3), expected, rtol=1e-12)
    np.testing.assert_allclose(H @ np.eye(3)[:, 0], expected[0], rtol=1e-12)


def test_times_that_will_shrink_are_disregarded() -> None:
    """The first chunks of a size are slow, and the caller says so."""
    clock, columns = Clock(small), Columns("auto")
    slow = 6
    for start, stop in columns.chunks(600, lambda: 10**9, lambda: clock.now):
        columns.disregard = stop > start + 1 and slow > 0
        slow -= columns.disregard
        clock.now += 100.0 if columns.disregard else small(stop - start)
    assert clock.run(columns, 64) == [64]


def test_the_time_for_adding_products_does_not_count(monkeypatch) -> None:
    """The first products are written to new memory, which is slow, and would make single columns look slow."""

    def slow(totals, cotangents, share) -> None:
        time.sleep(0.05)
        set_sums(totals, cotangents, share)

    monkeypatch.setattr(engine, "set_sums", slow)
    H = hessian(loss_problem("ce"))
    H @ np.eye(P)[:, :4]
    assert len(H._engine._columns._times[1]) == 4
    assert max(H._engine._columns._times[1][1:]) < 0.04
