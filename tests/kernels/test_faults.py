"""Failures within a product: memory runs out, or data or models raise errors. The next product is right."""

from __future__ import annotations

import sys

import numpy as np
import pytest
import torch
from cases import APPROXIMATIONS, loss_problem
from limited_memory import assert_less_is_kept_and_the_product_is_right
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from curvop import GGNLinearOperator, HessianLinearOperator, NonFiniteProductError

OPERATORS = pytest.mark.parametrize("operator", [HessianLinearOperator, GGNLinearOperator])


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="limits of the address space are Linux's")
@pytest.mark.parametrize("mebibytes", [150, 300])
def test_where_memory_runs_out_less_is_kept_and_the_product_is_right(mebibytes: int) -> None:
    assert_less_is_kept_and_the_product_is_right("cpu", mebibytes)


class Faults:
    def __init__(self, error: Exception) -> None:
        self.error, self.left = error, 0


class Heavy(nn.Module):
    """Runs out of memory in ``faults.left`` forward passes; an object counts them, as attributes are restored."""

    def __init__(self, error: Exception) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 2).double()
        self.faults = Faults(error)

    def forward(self, X: Tensor) -> Tensor:
        if self.faults.left:
            self.faults.left -= 1
            raise self.faults.error
        return self.layer(X).tanh()


@OPERATORS
@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA out of memory"), MemoryError(), RuntimeError("CUDA error: out of memory")]
)
def test_what_counts_as_out_of_memory_is_tried_again(operator, error) -> None:
    model = Heavy(error)
    data = [(torch.randn(4, 3).double(), torch.randn(4, 2).double()) for _ in range(3)]
    A = operator(model, nn.MSELoss(), dict(model.named_parameters()), data)
    expected = A @ np.eye(A.shape[1])
    A = operator(model, nn.MSELoss(), dict(model.named_parameters()), data)
    model.faults.left = 2
    with pytest.warns(RuntimeWarning, match="ran out of memory: it caches less") as caught:
        np.testing.assert_allclose(A @ np.eye(A.shape[1]), expected, rtol=1e-10, atol=1e-14)
    assert len(caught) == 1


@pytest.mark.parametrize("call", [GGNLinearOperator.gradient_and_loss, GGNLinearOperator.diagonal])
def test_besides_products_memory_is_what_they_keep(call) -> None:
    model = Heavy(torch.OutOfMemoryError("CUDA out of memory"))
    data = [(torch.randn(4, 3).double(), torch.randn(4, 2).double()) for _ in range(3)]
    A = GGNLinearOperator(model, nn.MSELoss(), dict(model.named_parameters()), data)
    expected, product = call(A), A @ np.ones(A.shape[1])
    assert A._engine.kept()[0]
    model.faults.left = 1
    with pytest.warns(RuntimeWarning, match="ran out of memory: it caches less") as caught:
        found = call(A)
    assert len(caught) == 1
    np.testing.assert_array_equal(found[0], expected[0])
    assert not A._engine.kept()[0]
    model.faults.left = 1
    with pytest.raises(torch.OutOfMemoryError) as raised:  # nothing is cached that could be freed
        call(A)
    assert any("use smaller batches" in note for note in raised.value.__notes__)
    np.testing.assert_allclose(A @ np.ones(A.shape[1]), product, rtol=1e-12)
    assert 0 < A._engine.kept()[1] < 1


def test_for_room_for_the_products_less_is_kept(monkeypatch) -> None:
    model = Heavy(MemoryError())
    data = [(torch.randn(4, 3).double(), torch.randn(4, 2).double()) for _ in range(3)]
    A = GGNLinearOperator(model, nn.MSELoss(), dict(model.named_parameters()), data)
    X = np.eye(A.shape[1])
    expected = A @ X
    assert A._engine.kept()[1] == 1
    fails = [True, False, True, False]

    class Short:
        """NumPy with too little memory, in place of the operator's."""

        def __getattr__(self, name: str):
            return getattr(np, name)

        def empty(self, *args, **options):
            if fails.pop(0):
                raise MemoryError
            return np.empty(*args, **options)

    monkeypatch.setattr("curvop.operators.engine_operator.np", Short())
    with pytest.warns(RuntimeWarning, match="ran out of memory: it caches less") as caught:
        np.testing.assert_allclose(A @ X, expected, rtol=1e-12)
    assert len(caught) == 1
    A = GGNLinearOperator(model, nn.MSELoss(), dict(model.named_parameters()), data, cache=0)
    with pytest.raises(MemoryError) as raised:
        A @ X
    assert raised.value.__notes__ == [
        "the product does not fit into memory, although no batch is kept: multiply with fewer columns at a time"
    ]
    np.testing.assert_allclose(A @ X, expected, rtol=1e-12)


def test_a_batch_that_never_fits_is_said_to_be_too_large() -> None:
    model = Heavy(torch.OutOfMemoryError("CUDA out of memory"))
    data = [(torch.randn(4, 3).double(), torch.randn(4, 2).double())]
    A = HessianLinearOperator(model, nn.MSELoss(), dict(model.named_parameters()), data)
    model.faults.left = 10**6
    with (
        pytest.warns(RuntimeWarning, match="ran out of memory"),
        pytest.raises(torch.OutOfMemoryError, match="CUDA out of memory") as raised,
    ):
        A @ np.eye(A.shape[1])
    assert any("make data yield smaller batches" in note for note in raised.value.__notes__)
    model.faults.left = 0
    assert np.isfinite(A @ np.eye(A.shape[1])).all()


class Examples(Dataset):
    """Data with examples that cannot be read."""

    def __init__(self, X: Tensor, y: Tensor) -> None:
        self.X, self.y, self.broken = X, y, -1

    def __len__(self) -> int:
        return len(self.X)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        if index == self.broken:
            raise OSError(f"example {index} cannot be read")
        return self.X[index], self.y[index]


def problem(num_workers: int = 0):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    examples = Examples(torch.randn(12, 3).double(), torch.randn(12, 2).double())
    return model, examples, DataLoader(examples, batch_size=4, num_workers=num_workers)


@pytest.mark.slow_cases("2-*")
@OPERATORS
@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_loader_that_fails_says_at_which_batch(operator, num_workers: int) -> None:
    model, examples, loader = problem(num_workers)
    A = operator(model, nn.MSELoss(), dict(model.named_parameters()), loader, cache=0)
    expected = A @ np.eye(A.shape[1])
    examples.broken = 9
    with pytest.raises(OSError, match="example 9 cannot be read") as raised:
        A @ np.eye(A.shape[1])
    assert raised.value.__notes__ == ["This was at batch 2 of data."]
    with pytest.raises(OSError, match="example 9 cannot be read") as raised:
        A.gradient_and_loss()
    assert raised.value.__notes__ == ["This was at batch 2 of data."]
    examples.broken = -1
    np.testing.assert_allclose(A @ np.eye(A.shape[1]), expected, rtol=1e-12, atol=1e-15)


@OPERATORS
def test_a_corrupt_batch_is_named(operator) -> None:
    """One batch has inputs that are too wide for the model."""
    model, _, loader = problem()
    data = list(loader)
    data[1] = (torch.randn(4, 5).double(), data[1][1])
    A = operator(model, nn.MSELoss(), dict(model.named_parameters()), data)
    for call in (lambda: A @ np.ones(A.shape[1]), A.gradient_and_loss):
        with pytest.raises(RuntimeError, match="mat1 and mat2 shapes") as raised:
            call()
        assert raised.value.__notes__ == ["This was at batch 1 of data."]
    data[1] = list(loader)[1]
    assert np.isfinite(A @ np.ones(A.shape[1])).all()


@OPERATORS
@pytest.mark.parametrize("cache", [0, "auto"])
def test_nan_from_one_batch_is_named(operator, cache) -> None:
    case = loss_problem("mse")
    data = [(X.clone(), y) for X, y in case.data]
    A = operator(case.model, case.loss_function, case.params, data, cache=cache)
    expected = A @ np.eye(A.shape[1])
    whole = data[1][0].clone()
    data[1][0][0] = torch.nan
    with pytest.raises(NonFiniteProductError, match="batch 1"):
        A @ np.ones(A.shape[1])
    data[1][0].copy_(whole)
    np.testing.assert_allclose(A @ np.eye(A.shape[1]), expected, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("kind", APPROXIMATIONS)
class TestApproximations:
    """Their constructors read the data once or twice."""

    def test_a_loader_that_fails_says_at_which_batch(self, kind: str) -> None:
        model, examples, loader = problem()
        A = APPROXIMATIONS[kind](model, nn.MSELoss(), dict(model.named_parameters()), loader)
        expected = A @ np.eye(A.shape[1])
        examples.broken = 9
        with pytest.raises(OSError, match="example 9 cannot be read") as raised:
            A @ np.eye(A.shape[1])
        assert raised.value.__notes__ == ["This was at batch 2 of data."]
        examples.broken = -1
        np.testing.assert_allclose(A @ np.eye(A.shape[1]), expected, rtol=1e-12, atol=1e-15)

    def test_a_corrupt_batch_is_named(self, kind: str) -> None:
        model, _, loader = problem()
        data = list(loader)
        data[1] = (torch.randn(4, 5).double(), data[1][1])
        A = APPROXIMATIONS[kind](model, nn.MSELoss(), dict(model.named_parameters()), data)
        with pytest.raises(RuntimeError, match="mat1 and mat2 shapes") as raised:
            A @ np.ones(A.shape[1])
        assert raised.value.__notes__ == ["This was at batch 1 of data."]

    @pytest.mark.parametrize("value", [torch.nan, torch.inf])
    def test_values_that_are_not_finite_raise_an_error(self, kind: str, value: float) -> None:
        case = loss_problem("mse")
        data = [(X.clone(), y) for X, y in case.data]
        data[1][0][0] = value
        A = APPROXIMATIONS[kind](case.model, case.loss_function, case.params, data)
        with pytest.raises(NonFiniteProductError, match="not finite"):
            A @ np.ones(A.shape[1])

    def test_memory_that_runs_out_leaves_the_model_usable(self, kind: str) -> None:
        model = Heavy(MemoryError())
        data = [(torch.randn(4, 3).double(), torch.randn(4, 2).double()) for _ in range(3)]
        A = APPROXIMATIONS[kind](model, nn.MSELoss(), dict(model.named_parameters()), data)
        expected = A @ np.eye(A.shape[1])
        model.faults.left = 1
        with pytest.raises(MemoryError):
            A @ np.eye(A.shape[1])
        np.testing.assert_allclose(A @ np.eye(A.shape[1]), expected, rtol=1e-12, atol=1e-15)


def test_nan_in_a_gradient_is_named() -> None:
    case = loss_problem("mse")
    data = [(X.clone(), y) for X, y in case.data]
    A = HessianLinearOperator(case.model, case.loss_function, case.params, data)
    expected, loss = A.gradient_and_loss()
    whole = data[1][0].clone()
    data[1][0][0] = torch.nan
    with pytest.raises(NonFiniteProductError, match=r"gradient is not finite at batch 1 in parameter '0.weight' .*nan"):
        A.gradient_and_loss()
    data[1][0].copy_(whole)
    found, again = A.gradient_and_loss()
    np.testing.assert_array_equal(found, expected)
    assert again == loss


def test_a_loss_without_a_gradient_is_named() -> None:
    case = loss_problem("mse")

    def loss_function(z: Tensor, y: Tensor) -> Tensor:
        return case.loss_function(z, y) + (torch.inf if len(z) < len(case.data[0][0]) else 0.0)

    A = HessianLinearOperator(case.model, loss_function, case.params, case.data)
    shorter = next(index for index, (X, _) in enumerate(case.data) if len(X) < len(case.data[0][0]))
    with pytest.raises(NonFiniteProductError, match=f"the loss is not finite at batch {shorter} .*is inf"):
        A.gradient_and_loss()


def test_a_gradient_warns_as_a_product_does() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.5), nn.Linear(4, 2)).double()
    data = [(torch.randn(4, 3).double(), torch.randn(4, 2).double())]
    A = HessianLinearOperator(model, nn.MSELoss(), dict(model.named_parameters()), data)
    with pytest.warns(RuntimeWarning, match=r"dropout is active in '1'") as caught:
        A.gradient_and_loss()
    assert len(caught) == 1
    A.gradient_and_loss()  # it warns once
