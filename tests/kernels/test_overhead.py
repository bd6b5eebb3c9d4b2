"""Work around the user's code is done once per pass over the data, or only if something has changed.

The first class counts calls. The second class checks that what is done less often is still right: the reference is
double backward through the user's own module, called as the user calls it.
"""

from __future__ import annotations

import collections
import sys
from collections.abc import Callable, Iterator
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from cases import cut, mlp, seeded
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from curvop import HessianLinearOperator, NonDeterministicObjectiveError
from curvop.kernels import differentiable, graph, guard
from curvop.kernels.changes import Fingerprint

P = 43


class Own(nn.Sequential):
    """A subclass may do anything, so its calls are watched. Calls of PyTorch's own modules are not."""


@seeded
def classification(batches: int, kind: type[nn.Sequential] = Own) -> tuple[nn.Module, list[Any], dict[str, Tensor]]:
    model, X, y = kind(*mlp()), torch.randn(4 * batches, 4), torch.randint(0, 3, (4 * batches,))
    return model, cut(X, y, (4,) * batches), dict(model.named_parameters())


def hessian(batches: int, cache: Any = 0, kind: type[nn.Sequential] = Own) -> HessianLinearOperator:
    model, data, params = classification(batches, kind)
    return HessianLinearOperator(model, nn.CrossEntropyLoss(), params, data, cache=cache)


def by_hand(model: nn.Module, loss_function: Any, data: Any, names: Any = None) -> np.ndarray:
    """Return the Hessian of the mean loss over batches of equal sizes, by double backward."""
    params = [value for name, value in model.named_parameters() if names is None or name in names]
    loss = sum(loss_function(model(X), y) for X, y in data) / len(data)
    gradient = torch.autograd.grad(loss, params, create_graph=True, materialize_grads=True)
    entries = torch.cat([part.reshape(-1) for part in gradient])
    rows = [torch.autograd.grad(one, params, retain_graph=True, materialize_grads=True) for one in entries]
    return torch.stack([torch.cat([part.reshape(-1) for part in row]) for row in rows]).numpy()


def close(actual: Any, expected: Any) -> None:
    np.testing.assert_allclose(actual, expected, rtol=1e-10, atol=1e-13)


def product(A: HessianLinearOperator) -> None:
    A @ np.ones(P)


WORK = {"product": product, "gradient": HessianLinearOperator.gradient_and_loss}


@pytest.mark.parametrize("work", WORK)
class TestCounts:
    def counted(
        self, work: str, monkeypatch: Any, owner: Any, name: str, batches: int = 6, kind: type[nn.Sequential] = Own
    ) -> int:
        """Count the calls of a function in the third pass with nothing cached."""
        A, calls, function = hessian(batches, kind=kind), [0], getattr(owner, name)

        def counting(*args: Any, **kwargs: Any) -> Any:
            calls[0] += 1
            return function(*args, **kwargs)

        WORK[work](A)
        WORK[work](A)
        monkeypatch.setattr(owner, name, counting)
        WORK[work](A)
        return calls[0]

    def test_attributes_are_recorded_once(self, work: str, monkeypatch: Any) -> None:
        assert self.counted(work, monkeypatch, guard.Record, "__init__") == 1

    def test_attributes_are_compared_twice_per_batch(self, work: str, monkeypatch: Any) -> None:
        assert self.counted(work, monkeypatch, guard._Places, "are_unchanged") <= 2 * 6

    def test_a_batch_is_copied_once(self, work: str, monkeypatch: Any) -> None:
        assert self.counted(work, monkeypatch, guard._Saved, "__init__") == 2 * 6  # X and y
        assert self.counted(work, monkeypatch, Fingerprint, "of_data") == 0

    def test_graphs_are_not_searched_again(self, work: str, monkeypatch: Any) -> None:
        assert self.counted(work, monkeypatch, differentiable, "nodes") == 0
        assert self.counted(work, monkeypatch, graph, "nodes") == 0

    def test_modules_are_walked_once(self, work: str, monkeypatch: Any) -> None:
        walks = [self.counted(work, monkeypatch, nn.Module, "named_modules", batches) for batches in (2, 8)]
        assert walks[0] == walks[1]
        walks = [self.counted(work, monkeypatch, nn.Module, "_named_members", batches) for batches in (2, 8)]
        assert walks[0] == walks[1]

    def test_the_function_mode_sees_the_users_code_only(self, work: str, monkeypatch: Any) -> None:
        seen: collections.Counter[str] = collections.Counter()
        function = differentiable.TwiceDifferentiable.__torch_function__

        def counting(self: Any, func: Any, *args: Any, **kwargs: Any) -> Any:
            seen[func.__name__] += 1
            return function(self, func, *args, **kwargs)

        A = hessian(6)
        monkeypatch.setattr(differentiable.TwiceDifferentiable, "__torch_function__", counting)
        WORK[work](A)
        assert seen == {"linear": 12, "tanh": 6, "cross_entropy": 6}

    @pytest.mark.parametrize(
        ("owner", "name", "count"),
        [
            (guard.Record, "__init__", 0),
            (guard._Places, "are_unchanged", 6),
            (guard._Saved, "__init__", 0),
            (differentiable.TwiceDifferentiable, "__init__", 0),
        ],
    )
    def test_pytorchs_own_modules_are_not_watched(
        self, work: str, monkeypatch: Any, owner: Any, name: str, count: int
    ) -> None:
        assert self.counted(work, monkeypatch, owner, name, kind=nn.Sequential) == count

    @pytest.mark.parametrize(
        ("kind", "most"), [(Own, {"product": 200, "gradient": 150}), (nn.Sequential, {"product": 130, "gradient": 100})]
    )
    def test_functions_of_the_package_per_batch(self, work: str, kind: Any, most: dict[str, int]) -> None:
        """Count calls of Python functions of the package, which take most of the time around torch."""

        def calls(batches: int) -> int:
            A, count = hessian(batches, kind=kind), [0]

            def profile(frame: Any, event: str, _: Any) -> None:
                count[0] += event == "call" and "/curvop/" in frame.f_code.co_filename

            WORK[work](A)
            WORK[work](A)
            sys.setprofile(profile)
            try:
                WORK[work](A)
            finally:
                sys.setprofile(None)
            return count[0]

        assert (calls(8) - calls(4)) / 4 <= most[work]


def test_kept_batches_of_a_list_are_not_fingerprinted(monkeypatch: Any) -> None:
    monkeypatch.setattr(Fingerprint, "of_data", lambda leaves: pytest.fail("a batch is fingerprinted"))
    A = hessian(6, cache="auto")
    product(A)
    product(A)
    assert A._engine.kept()[1] == 1


class Loader:
    """Changes the model before it yields its second and later batches."""

    def __init__(self, data: list[Any], change: Callable[[], None]) -> None:
        self.data, self.change = data, change

    def __len__(self) -> int:
        return len(self.data)

    def __iter__(self) -> Iterator[Any]:
        for index, batch in enumerate(self.data):
            if index:
                self.change()
            yield batch


class Shifted(nn.Module):
    """A model with state of several kinds."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 5), nn.Linear(5, 3)
        self.activation: nn.Module = nn.Tanh()
        self.register_buffer("shift", torch.zeros(5))
        self.scales: list[Any] = [torch.ones(5)]
        self.calls = 0

    def forward(self, X: Tensor) -> Tensor:
        self.calls += 1
        return self.second(self.activation(self.first(X) * self.scales[0] + self.shift))


def set_buffer(model: Shifted) -> None:
    model.shift = torch.full((5,), 0.5).double()


def write_to_buffer(model: Shifted) -> None:
    model.shift.fill_(0.5)


def write_through_data(model: Shifted) -> None:
    model.shift.data.fill_(0.5)


def set_layer(model: Shifted) -> None:
    model.activation = nn.Sigmoid()


def set_entry(model: Shifted) -> None:
    model.scales[0] = torch.full((5,), 0.5).double()


def set_list(model: Shifted) -> None:
    model.scales = [torch.full((5,), 0.5).double()]


def reorder(model: Shifted) -> None:
    calls = model.calls
    del model.calls
    model.calls = calls


CHANGES = [set_buffer, write_to_buffer, write_through_data, set_layer, set_entry, set_list, reorder]


class Replacing(nn.Module):
    """Replaces attributes by other objects that are equal, in the way named by ``how``."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how, self.layer = how, nn.Linear(4, 3)
        self.register_buffer("count", torch.ones(1))
        self.maps: list[Any] = []
        self.flag: Any = True
        self.size: Any = 10**6

    def forward(self, X: Tensor) -> Tensor:
        getattr(self, self.how)()
        return self.layer(X).tanh()

    def a_list(self) -> None:
        self.maps = []

    def a_buffer(self) -> None:
        self.count = torch.ones(1).double()

    def a_flag(self) -> None:
        self.flag = 1

    def a_number(self) -> None:
        self.size = int("1000000")

    def the_order(self) -> None:
        maps = self.maps
        del self.maps
        self.maps = maps

    def a_dict_of_torch(self) -> None:
        self._buffers = dict(self._buffers)


HOWS = [name for name in vars(Replacing) if not name.startswith("_") and name != "forward"]


def found(model: nn.Module) -> list[Any]:
    return [
        (name, id(value)) for part in model.modules() for name, value in (*vars(part).items(), *part._buffers.items())
    ]


class TestWhatIsStillSeen:
    @pytest.mark.parametrize("change", CHANGES)
    @pytest.mark.parametrize("cache", [0, "auto"])
    def test_a_loader_that_changes_the_model(self, change: Callable[[Shifted], None], cache: Any) -> None:
        @seeded
        def made() -> tuple[Shifted, list[Any]]:
            return Shifted(), cut(torch.randn(12, 4), torch.randn(12, 3), (4, 4, 4))

        model, data = made()
        params = dict(model.named_parameters())
        other, _ = made()
        expected = by_hand(other, F.mse_loss, data[:1])
        change(other)
        expected = (expected + 2 * by_hand(other, F.mse_loss, data[1:])) / 3
        A = HessianLinearOperator(model, nn.MSELoss(), params, Loader(data, lambda: change(model)), cache=cache)
        close(A @ np.eye(P), expected)
        assert model.calls == 0
        close(model(data[0][0]).detach(), other(data[0][0]).detach())  # the changes are kept

    @pytest.mark.parametrize("how", HOWS)
    def test_equal_objects_are_put_back(self, how: str) -> None:
        @seeded
        def made() -> tuple[Replacing, list[Any]]:
            return Replacing(how), cut(torch.randn(8, 4), torch.randn(8, 3), (4, 4))

        model, data = made()
        before = found(model)
        A = HessianLinearOperator(model, nn.MSELoss(), dict(model.named_parameters()), data, cache=0)
        for _ in range(2):
            matrix = A @ np.eye(15)
            assert found(model) == before
        A.gradient_and_loss()
        assert found(model) == before
        close(matrix, by_hand(model, F.mse_loss, data))

    def test_replaced_lists_of_tensors_are_not_compared_by_operations(self) -> None:
        """An LSTM replaces a list of its weights in ``forward``. A compiled product would contain the comparison."""

        class Operations(TorchDispatchMode):
            names: ClassVar[set[str]] = set()

            def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
                self.names.add(str(func))
                return func(*args, **(kwargs or {}))

        @seeded
        def made() -> tuple[nn.Module, list[Any]]:
            return nn.LSTM(4, 3), [(torch.randn(5, 2, 4), torch.randn(5, 2, 3))]

        def last(prediction: Any, y: Tensor) -> Tensor:
            return F.mse_loss(prediction[0], y)

        model, data = made()
        with Operations():
            HessianLinearOperator(model, last, dict(model.named_parameters()), data, cache=0) @ np.ones(108)
        assert "aten.mul.Tensor" in Operations.names
        assert not {"aten.eq.Tensor", "aten.ne.Tensor"} & Operations.names

    def test_a_derivative_of_a_norm_after_the_first_pass(self) -> None:
        class Smooth(nn.Module):
            """Adds the gradient of the network, once this is switched on in an object that is no module."""

            def __init__(self) -> None:
                super().__init__()
                self.first, self.norm, self.second = nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 1)
                self.elementary = False

            def net(self, X: Tensor) -> Tensor:
                h = self.first(X)
                if self.elementary:
                    h = (h - h.mean(-1, keepdim=True)) / (h.var(-1, correction=0, keepdim=True) + 1e-5).sqrt()
                    return self.second((h * self.norm.weight + self.norm.bias).tanh())
                return self.second(self.norm(h).tanh())

            def forward(self, X: Tensor) -> Tensor:
                if not switch[0]:
                    return self.net(X)
                X = X.detach().requires_grad_()
                [slope] = torch.autograd.grad(self.net(X).sum(), X, create_graph=True)
                return slope.square().sum(1, keepdim=True)

        @seeded
        def made() -> tuple[Smooth, list[Any]]:
            return Smooth(), [(torch.randn(5, 4), torch.randn(5, 1))]

        switch = [False]
        model, data = made()
        A = HessianLinearOperator(model, nn.MSELoss(), dict(model.named_parameters()), data, cache=0)
        A @ np.ones(A.shape[1])
        switch[0] = True
        with torch.no_grad():
            model.first.bias.add_(0.1)  # a new point, so that another loss is no contradiction
        matrix = A @ np.eye(A.shape[1])
        model.elementary = True
        close(matrix, by_hand(model, F.mse_loss, data))

    @pytest.mark.parametrize("cache", [0, "auto"])
    def test_a_gradient_that_cannot_be_differentiated_at_a_new_point(self, cache: Any) -> None:
        class Once(torch.autograd.Function):
            @staticmethod
            def forward(ctx: Any, x: Tensor) -> Tensor:
                return 2 * x

            @staticmethod
            @torch.autograd.function.once_differentiable
            def backward(ctx: Any, grad: Tensor) -> Tensor:
                return 2 * grad

        class Model(nn.Linear):
            def forward(self, X: Tensor) -> Tensor:
                z = super().forward(X)
                return Once.apply(z) if self.bias[0] > 0 else z.tanh()

        torch.manual_seed(0)
        model = Model(4, 3).double()
        nn.init.constant_(model.bias, -1.0)
        data = [(torch.randn(5, 4).double(), torch.randn(5, 3).double())]
        A = HessianLinearOperator(model, nn.MSELoss(), dict(model.named_parameters()), data, cache=cache)
        A @ np.ones(15)
        A @ np.ones(15)
        nn.init.constant_(model.bias, 1.0)
        with pytest.raises(RuntimeError, match="once_differentiable"):
            A @ np.ones(15)

    @pytest.mark.parametrize("kept", [1, 2])
    def test_a_batch_that_is_overwritten_where_only_some_are_kept(self, kept: int) -> None:
        model, data, params = classification(3)
        whole = HessianLinearOperator(model, nn.CrossEntropyLoss(), params, data)
        whole @ np.ones(P)
        A = HessianLinearOperator(
            model, nn.CrossEntropyLoss(), params, data, cache=(kept + 0.5) * whole._engine.kept()[0] / 3
        )
        A @ np.ones(P)
        assert len(A._engine._first.kept) == kept
        data[0][0].data.mul_(2.0)  # changes no version counter
        error = pytest.raises(NonDeterministicObjectiveError, match="the loss summed over the data was")
        with pytest.warns(RuntimeWarning, match="different batches"), error:
            A @ np.ones(P)

    def test_a_sum_of_finite_gradients_that_overflows(self) -> None:
        model = nn.Linear(1, 1, bias=False).double()
        data = [(torch.ones(1, 1).double(), torch.ones(1, 1).double())] * 2
        A = HessianLinearOperator(
            model, lambda z, y: 1e308 * z.sum(), dict(model.named_parameters()), data, batch_weight=lambda _: 1.5
        )
        with pytest.raises(ArithmeticError, match="the gradient of each batch is finite, but their sum overflows"):
            A.gradient_and_loss()


def test_sparse_gradients() -> None:
    @seeded
    def made() -> tuple[nn.Module, list[Any]]:
        layers = nn.Embedding(5, 3, sparse=True), nn.Flatten(), nn.Tanh(), nn.Linear(6, 2)
        return nn.Sequential(*layers), cut(torch.randint(0, 5, (8, 2)), torch.randn(8, 2), (4, 4))

    model, data = made()
    A = HessianLinearOperator(model, nn.MSELoss(), dict(model.named_parameters()), data)
    gradient, _ = A.gradient_and_loss()
    matrix = A @ np.eye(A.shape[1])
    model[0].sparse = False
    loss = sum(F.mse_loss(model(X), y) for X, y in data) / 2
    expected = torch.autograd.grad(loss, list(model.parameters()))
    close(gradient, torch.cat([part.reshape(-1) for part in expected]).numpy())
    close(matrix, by_hand(model, F.mse_loss, data))


def test_gradients_for_small_and_large_predictions_agree(monkeypatch: Any) -> None:
    model, data, params = classification(3)
    A = HessianLinearOperator(model, nn.CrossEntropyLoss(), params, data)
    loss = sum(F.cross_entropy(model(X), y) for X, y in data) / 3
    expected = torch.cat([part.reshape(-1) for part in torch.autograd.grad(loss, list(model.parameters()))]).numpy()
    close(A.gradient_and_loss()[0], expected)
    monkeypatch.setattr("curvop.kernels.model_objective._LARGE", 1)
    close(A.gradient_and_loss()[0], expected)
