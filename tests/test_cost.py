"""What a product costs."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from cases import Problem
from torch import nn

from curvop import HessianLinearOperator
from curvop.cost import median_seconds


@pytest.fixture(scope="module")
def problem() -> Problem:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(20, 2000), nn.Tanh(), nn.Linear(2000, 20))
    return Problem(model, nn.MSELoss(), [(torch.randn(500, 20), torch.randn(500, 20)) for _ in range(2)])


def hessian(problem: Problem, cache) -> HessianLinearOperator:
    return HessianLinearOperator(problem.model, problem.loss_function, problem.params, problem.data, cache=cache)


def test_kept_and_recomputed_share(problem: Problem) -> None:
    whole = hessian(problem, 10**9)
    everything = whole.cost()
    assert everything.kept_share == 1
    assert everything.kept_bytes > 2 * 500 * 2000 * 4  # two batches of hidden activations
    half = hessian(problem, everything.kept_bytes // 2).cost()
    assert (half.kept_share, half.kept_bytes) == (0.5, everything.kept_bytes // 2)
    nothing = hessian(problem, 0).cost()
    assert (nothing.kept_share, nothing.kept_bytes) == (0, 0)
    assert whole.num_products == 0


def test_time_in_gradients(problem: Problem) -> None:
    kept, anew = (hessian(problem, cache) for cache in (10**9, 0))
    assert 0.5 < kept.cost(repeats=9).gradients < anew.cost(repeats=9).gradients < 20
    vector = np.ones(kept.shape[1])
    seconds = median_seconds([lambda: kept @ vector, lambda: anew @ vector], 15)  # in turn, on whatever machine
    assert seconds[0] < seconds[1]


def test_the_time_is_that_of_a_product(problem: Problem) -> None:
    """A busy machine takes longer, so it is compared with products that are timed beside it."""
    H = hessian(problem, 10**9)
    vector = np.ones(H.shape[1])
    H @ vector
    (seconds,) = median_seconds([lambda: H @ vector], 9)
    assert seconds / 20 < H.cost(repeats=9).seconds < 20 * seconds


def test_the_peak_is_seen(problem: Problem) -> None:
    peak = hessian(problem, 0).cost().peak_bytes
    assert peak is None or peak > 500 * 2000 * 4


def test_one_sentence(problem: Problem) -> None:
    cost = str(hessian(problem, 10**9).cost())
    assert "gradients; 100% of the batches are kept" in cost
    assert "\n" not in cost


def test_blocks_have_costs_of_their_own(problem: Problem) -> None:
    H = hessian(problem, 10**9)
    H @ np.ones(H.shape[1])
    assert H.block("2.bias").cost().kept_bytes < H.cost().kept_bytes


def test_blocks_that_are_no_more_have_given_back_what_they_kept(problem: Problem) -> None:
    everything = hessian(problem, 10**9).cost().kept_bytes
    H = hessian(problem, 1.5 * everything)
    for _ in range(5):
        assert H.block("0.weight").cost().kept_share == 1


def test_an_error_that_somebody_keeps_holds_what_was_kept_by_then(problem: Problem) -> None:
    """Its traceback does, so that it counts; and when it is dropped, what was kept since still counts."""
    everything = hessian(problem, 10**9).cost().kept_bytes
    broken = [*problem.data, "no pair"]
    H = HessianLinearOperator(problem.model, problem.loss_function, problem.params, broken, cache=1.75 * everything)
    kept = None
    try:
        H @ np.ones(H.shape[1])
    except TypeError as error:
        kept = error
    del broken[2:]
    assert H.cost().kept_share == 0.5
    del kept
    assert H.block("2.bias").cost().kept_share == 1
