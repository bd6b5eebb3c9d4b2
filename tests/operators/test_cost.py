"""The measured cost of a product."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from cases import Problem
from torch import nn

from curvop import (
    GGNLinearOperator,
    GradientCovarianceLinearOperator,
    HessianLinearOperator,
    JacobianLinearOperator,
)
from curvop.operators.engine_operator import Cost, medians, seconds


@pytest.fixture(scope="module")
def problem() -> Problem:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(20, 2000), nn.Tanh(), nn.Linear(2000, 20))
    return Problem(model, nn.MSELoss(), [(torch.randn(500, 20), torch.randn(500, 20)) for _ in range(2)])


@pytest.fixture(scope="module")
def small() -> Problem:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(50, 100), nn.Tanh(), nn.Linear(100, 10))
    data = [(torch.randn(64, 50), torch.randint(0, 10, (64,))) for _ in range(8)]
    return Problem(model, nn.CrossEntropyLoss(), data)


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
    kept, fresh = (hessian(problem, cache) for cache in (10**9, 0))
    assert 0.5 < kept.cost(repeats=9).gradients < fresh.cost(repeats=9).gradients < 20
    vector = np.ones(kept.shape[1])
    clocks = [lambda: seconds(lambda: kept @ vector), lambda: seconds(lambda: fresh @ vector)]
    first, second = medians(clocks, 15)  # alternating, on any machine
    assert first < second


def test_the_time_is_that_of_a_product(problem: Problem) -> None:
    """Timed next to other products, because a busy machine is slower."""
    H = hessian(problem, 10**9)
    vector = np.ones(H.shape[1])
    H @ vector
    (taken,) = medians([lambda: seconds(lambda: H @ vector)], 9)
    assert taken / 20 < H.cost(repeats=9).seconds < 20 * taken


def test_the_peak_is_seen(problem: Problem) -> None:
    peak = hessian(problem, 0).cost().peak_bytes
    assert peak is None or peak > 500 * 2000 * 4


def test_one_sentence(problem: Problem) -> None:
    cost = str(hessian(problem, 10**9).cost())
    peak = r"(; \d+\.\d MB more at the peak)?"
    assert re.fullmatch(rf"one product: [\d.]+ ms \(\d+\.\d gradients\); all batches cached, \d+\.\d MB{peak}", cost)


def test_the_sentence_for_other_shares_and_for_compiling() -> None:
    half = Cost(1.29e-3, 1.42, 600_000, 0.5, 500_000, 3.21)
    assert str(half) == (
        "one product: 1.29 ms (1.4 gradients); 50% of the batches cached, 0.6 MB; 0.5 MB more at the peak; "
        "compiled in 3.2 s"
    )
    nothing = Cost(1.29e-3, 1.42, 0, 0.0, None, 0.0)
    assert str(nothing) == "one product: 1.29 ms (1.4 gradients); no batches cached, 0.0 MB"


class TestUnit:
    """The unit is the gradient that a user computes: model, loss, and ``torch.autograd.grad``."""

    def kinds(self, small: Problem) -> dict[str, Any]:
        model, loss, params, data = small.model, small.loss_function, small.params, small.data
        frozen = {name: value.detach() for name, value in params.items()}

        def objective(leaves: Any, batch: Any) -> Any:
            return loss(torch.func.functional_call(model, leaves, (batch[0],)), batch[1])

        return {
            "Hessian": HessianLinearOperator(model, loss, params, data),
            "other values": HessianLinearOperator(
                model, loss, {name: value + 0.1 for name, value in frozen.items()}, data
            ),
            "frozen": GGNLinearOperator(model, loss, frozen, data),
            "covariance": GradientCovarianceLinearOperator(model, loss, params, data),
            "objective": HessianLinearOperator.from_objective(objective, params, data),
            "Jacobian": JacobianLinearOperator(model, params, data),
            "its transpose": JacobianLinearOperator(model, params, data).T,
        }

    @pytest.mark.default_cases("Hessian")
    @pytest.mark.parametrize(
        "kind", ["Hessian", "other values", "frozen", "covariance", "objective", "Jacobian", "its transpose"]
    )
    def test_it_agrees_with_a_gradient_by_hand(self, small: Problem, kind: str) -> None:
        params = {name: value.detach().clone().requires_grad_() for name, value in small.params.items()}

        def loss_of(X: Any, y: Any) -> torch.Tensor:
            functional = kind == "objective"
            prediction = torch.func.functional_call(small.model, params, (X,)) if functional else small.model(X)
            return small.loss_function(prediction, y)

        def by_hand() -> float:
            chosen = list((params if kind == "objective" else small.params).values())
            start = time.perf_counter()
            for X, y in small.data:
                torch.autograd.grad(loss_of(X, y), chosen)
            return time.perf_counter() - start

        A = self.kinds(small)[kind]
        by_hand()
        found, expected = [], []
        for _ in range(12):  # the minimum, because the machine may be shared
            cost = A.cost(repeats=3)
            found.append(cost.seconds / cost.gradients)
            expected.append(min(by_hand() for _ in range(3)))
        # The gradient of this package takes three to five times as long.
        assert 1 / 2 < min(found) / min(expected) < 2

    def test_a_block_is_compared_with_the_gradient_by_its_parameters(self, small: Problem) -> None:
        A = HessianLinearOperator(small.model, small.loss_function, small.params, small.data)
        whole, block = (
            min(one.cost(repeats=3).seconds / one.cost(repeats=3).gradients for _ in range(8))
            for one in (A, A.block("2.bias"))
        )
        assert block < 1.3 * whole

    def test_reading_the_data_does_not_count(self, small: Problem) -> None:
        class Slow:
            def __init__(self, batches: list[Any]) -> None:
                self.batches = batches

            def __iter__(self) -> Any:
                for batch in self.batches:
                    time.sleep(0.05)
                    yield batch

        A = HessianLinearOperator(small.model, small.loss_function, small.params, Slow(small.data))
        cost = A.cost(repeats=2)
        assert cost.seconds / cost.gradients < 0.4

    @pytest.mark.parametrize("training", [True, False])
    def test_the_module_is_left_as_it_was(self, training: bool) -> None:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 2)).train(training)
        model[2].eval()
        model[0].weight.requires_grad_(False)
        A = HessianLinearOperator(
            model, nn.MSELoss(), dict(model.named_parameters()), [(torch.randn(6, 3), torch.randn(6, 2))]
        )
        own, state = dict(model.named_parameters()), {name: value.clone() for name, value in model.state_dict().items()}
        flags = [value.requires_grad for value in own.values()]
        random, products = torch.get_rng_state(), A.num_products
        A.cost()
        assert all(value is own[name] for name, value in model.named_parameters())
        assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
        assert [value.requires_grad for value in model.parameters()] == flags
        assert all(value.grad is None for value in model.parameters())
        assert torch.equal(torch.get_rng_state(), random)
        assert A.num_products == products

    def test_an_error_of_the_model_puts_it_back(self, small: Problem) -> None:
        runs: list[Callable[[], None]] = []

        class Breaking(nn.Linear):
            def forward(self, X: torch.Tensor) -> torch.Tensor:
                for run in runs:
                    run()
                return super().forward(X)

        def interrupt() -> None:
            raise KeyboardInterrupt

        model = Breaking(3, 2)
        weight = model.weight
        A = HessianLinearOperator(
            model, nn.MSELoss(), dict(model.named_parameters()), [(torch.ones(4, 3), torch.ones(4, 2))]
        )
        A.cost()
        runs.append(interrupt)
        with pytest.raises(KeyboardInterrupt):
            A.cost()
        assert model.weight is weight
        runs.clear()
        assert A.cost().gradients > 0

    def test_recurrent_layers_and_tied_parameters(self) -> None:
        torch.manual_seed(0)

        class Tied(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.rnn = nn.LSTM(3, 3, batch_first=True)
                self.first, self.second = nn.Linear(3, 3), nn.Linear(3, 3)
                self.second.weight = self.first.weight

            def forward(self, X: torch.Tensor) -> torch.Tensor:
                return self.second(self.first(self.rnn(X)[0]).tanh())

        model = Tied()
        A = HessianLinearOperator(
            model, nn.MSELoss(), dict(model.named_parameters()), [(torch.randn(4, 5, 3), torch.randn(4, 5, 3))]
        )
        assert A.cost().gradients > 0
        model(torch.randn(4, 5, 3)).sum().backward()
        assert all(value.grad is not None for value in model.parameters())


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
    """The traceback retains memory, which counts; linearizations kept later still count once it is dropped."""
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
