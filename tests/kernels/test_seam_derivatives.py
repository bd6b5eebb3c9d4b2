"""The matrix is right even if torch's own derivative is wrong or not finite, or if a prediction has no dimensions.

The references are double backward by hand, on the user's own module or on one made of elementary operations.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from agreement import close
from cases import nightly, seeded
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from curvop import (
    EFLinearOperator,
    FisherLinearOperator,
    GGNLinearOperator,
    GradientCovarianceLinearOperator,
    HessianLinearOperator,
    JacobianLinearOperator,
    NonFiniteProductError,
    check,
)
from curvop.kernels.differentiable import TwiceDifferentiable

ENGINES = ["autograd", *nightly("compiled")]


def row(output: Tensor, leaves: Sequence[Tensor]) -> Tensor:
    parts = torch.autograd.grad(output, leaves, create_graph=True, allow_unused=True, materialize_grads=True)
    return torch.cat([part.reshape(-1) for part in parts])


def rows(outputs: Tensor, leaves: Sequence[Tensor]) -> np.ndarray:
    return torch.stack([row(output, leaves) for output in outputs.reshape(-1)]).detach().numpy()


def hessian_by_hand(loss: Tensor, model: nn.Module) -> np.ndarray:
    leaves = list(model.parameters())
    return rows(row(loss, leaves), leaves)


class Norm(nn.Module):
    """Layer, batch or instance normalization by elementary operations, over given axes of its input."""

    def __init__(self, axes: tuple[int, ...], affine: nn.Module) -> None:
        super().__init__()
        self.axes, self.by_channel = axes, axes[0] >= 0
        self.weight, self.bias = (
            None if part is None else nn.Parameter(part.detach().clone()) for part in (affine.weight, affine.bias)
        )

    def forward(self, x: Tensor) -> Tensor:
        centered = x - x.mean(self.axes, keepdim=True)
        x = centered / (centered.square().mean(self.axes, keepdim=True) + 1e-5).sqrt()
        for name in ("weight", "bias"):
            part = getattr(self, name)
            if part is not None:
                part = part.view(-1, *[1] * (x.ndim - 2)) if self.by_channel else part
                x = x * part if name == "weight" else x + part
        return x


#: The module and the axes of its normalization.
NORMS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "layer": (lambda: nn.LayerNorm(4), (-1,)),
    "layer without a bias": (lambda: nn.LayerNorm(4, bias=False), (-1,)),
    "layer, two axes": (lambda: nn.LayerNorm((5, 4), elementwise_affine=False), (-2, -1)),
    "batch": (lambda: nn.BatchNorm1d(5), (0, 2)),
    "batch without statistics": (lambda: nn.BatchNorm1d(5, track_running_stats=False), (0, 2)),
    "instance": (lambda: nn.InstanceNorm1d(5, affine=True, track_running_stats=True), (2,)),
    "instance without parameters": (lambda: nn.InstanceNorm1d(5), (2,)),
}


class Penalty(nn.Module):
    """Predict derivatives of a network by its input, computed in one of several ways."""

    def __init__(self, net: nn.Module, derivative: Callable[[nn.Module, Tensor], Tensor]) -> None:
        super().__init__()
        self.net, self.derivative = net, derivative

    def forward(self, X: Tensor) -> Tensor:
        return (self.derivative(self.net, X).square().flatten(1) + 0.1).sqrt()


def by_autograd(net: nn.Module, X: Tensor) -> Tensor:
    X = X.detach().requires_grad_()
    return torch.autograd.grad(net(X).sum(), X, create_graph=True)[0]


def twice_by_autograd(net: nn.Module, X: Tensor) -> Tensor:
    X = X.detach().requires_grad_()
    (slope,) = torch.autograd.grad(net(X).sin().sum(), X, create_graph=True)
    return torch.autograd.grad((slope * X.detach().cos()).sum(), X, create_graph=True)[0]


def by_transform(net: nn.Module, X: Tensor) -> Tensor:
    return torch.func.grad(lambda X: net(X).sum())(X)


def by_forward_mode(net: nn.Module, X: Tensor) -> Tensor:
    return torch.func.jvp(net, (X,), (X.cos(),))[1]


def twice_by_transforms(net: nn.Module, X: Tensor) -> Tensor:
    return torch.func.jvp(torch.func.grad(lambda X: net(X).sin().sum()), (X,), (X.cos(),))[1]


@seeded
def penalties(name: str, derivative: Any) -> tuple[Penalty, Penalty, list[tuple[Tensor, Tensor]]]:
    """Return a model with a norm of torch's, the same model with elementary operations, and data."""
    make, axes = NORMS[name]
    norm = make()
    for part in norm.parameters():
        nn.init.normal_(part, 0.7, 0.3)
    if name == "layer":
        net, X = nn.Sequential(nn.Linear(2, 4), norm, nn.Tanh(), nn.Linear(4, 1)), torch.randn(3, 2)
    else:
        net = nn.Sequential(nn.Conv1d(2, 5, 2), norm, nn.Tanh(), nn.Conv1d(5, 1, 4), nn.Flatten())
        X = torch.randn(3, 2, 5)
    plain = nn.Sequential(net[0], Norm(axes, norm), *net[2:])
    model, plain = Penalty(net, derivative), Penalty(plain, derivative)
    return model, plain, [(X, torch.randn(model(X).shape))]


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")  # by torch's own forward mode
class TestThirdOrder:
    def compare(self, model: nn.Module, plain: nn.Module, data: Any, engine: str) -> None:
        [(X, y)] = data
        expected = hessian_by_hand(F.mse_loss(plain(X), y), plain)
        J = rows(plain(X), list(plain.parameters()))
        params, eye = dict(model.named_parameters()), np.eye(len(expected))
        before = [buffer.clone() for buffer in model.buffers()]
        H = HessianLinearOperator(model, nn.MSELoss(), params, data, engine=engine)
        close(H @ eye, expected)
        assert check(H, rng=0).ok
        close(GGNLinearOperator(model, nn.MSELoss(), params, data, engine=engine) @ eye, 2 / len(J) * J.T @ J)
        A = JacobianLinearOperator(model, params, data, engine=engine)
        close(A @ eye, J)
        close(A.T @ np.eye(len(J)), J.T)
        assert all(map(torch.equal, before, model.buffers()))

    @pytest.mark.parametrize("engine", ENGINES)
    @pytest.mark.parametrize("name", NORMS)
    def test_models_that_predict_derivatives(self, name: str, engine: str) -> None:
        self.compare(*penalties(name, by_autograd), engine)

    @pytest.mark.parametrize("name", ["layer", *nightly("batch", "instance")])
    def test_models_that_predict_second_derivatives(self, name: str) -> None:
        self.compare(*penalties(name, twice_by_autograd), "autograd")

    @pytest.mark.parametrize(
        "derivative", [by_transform, by_forward_mode, twice_by_transforms], ids=lambda f: f.__name__
    )
    @pytest.mark.parametrize("name", ["layer", *nightly("batch without statistics", "instance without parameters")])
    def test_derivatives_by_transforms(self, name: str, derivative: Any) -> None:
        self.compare(*penalties(name, derivative), "autograd")

    @pytest.mark.nightly
    def test_derivatives_by_transforms_compiled(self) -> None:
        self.compare(*penalties("layer", by_transform), "compiled")

    @pytest.mark.slow_cases("compiled")
    @pytest.mark.parametrize("engine", ["autograd", "compiled"])
    def test_an_objective_of_ones_own(self, engine: str) -> None:
        model, plain, data = penalties("layer", by_autograd)

        def objective(params: dict[str, Tensor], batch: Any) -> Tensor:
            return functional_call(model, params, (batch[0],)).square().mean()

        [(X, _)] = data
        expected = hessian_by_hand(plain(X).square().mean(), plain)
        H = HessianLinearOperator.from_objective(objective, dict(model.named_parameters()), data, engine=engine)
        close(H @ np.eye(len(expected)), expected)

    def test_the_gradient_where_that_of_torch_is_wrong(self) -> None:
        model, plain, data = penalties("layer", by_forward_mode)
        [(X, y)] = data
        expected = row(F.mse_loss(plain(X), y), list(plain.parameters())).detach().numpy()
        H = HessianLinearOperator(model, nn.MSELoss(), dict(model.named_parameters()), data)
        close(H.gradient_and_loss()[0], expected)

    def test_a_critic_in_the_loss(self) -> None:
        critic, plain, [(X, _)] = penalties("layer", by_autograd)
        model = nn.Linear(2, 2).double()

        def loss(z: Tensor, y: Any, critic: nn.Module = critic) -> Tensor:
            (slope,) = torch.autograd.grad(critic.net(z).sum(), z, create_graph=True)
            return slope.square().sum()

        loss.reduction = "sum"
        G = GGNLinearOperator(model, loss, dict(model.named_parameters()), [(X, None)])
        z = model(X).detach().requires_grad_()
        middle = rows(row(loss(z, None, plain), [z]), [z])
        J = rows(model(X), list(model.parameters()))
        close(G @ np.eye(J.shape[1]), J.T @ middle @ J)

    def test_it_is_evaluated_twice_at_first_only(self) -> None:
        model, _, data = penalties("layer", by_autograd)
        runs = []
        model.register_forward_pre_hook(lambda *_: runs.append(1))
        H = HessianLinearOperator(model, nn.MSELoss(), dict(model.named_parameters()), data, cache=0)
        counts = []
        for _ in range(2):
            H @ np.ones(H.shape[1])
            counts.append(len(runs))
            runs.clear()
        assert counts == [2, 1]

    def test_plain_losses_keep_the_fused_norms(self) -> None:
        x = torch.randn(3, 4, requires_grad=True)
        with TwiceDifferentiable():
            assert F.layer_norm(x, [4]).grad_fn.name() == "NativeLayerNormBackward0"
            assert torch.func.vmap(lambda x: F.layer_norm(x, [4]))(x).grad_fn.name() == "NativeLayerNormBackward0"
            assert F.batch_norm(x, None, None, training=True).grad_fn.name() == "NativeBatchNormBackward0"
        model = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 2))
        H = HessianLinearOperator(model, nn.MSELoss(), dict(model.named_parameters()), [(x.detach(), torch.ones(3, 2))])
        H @ np.ones(H.shape[1])
        assert not H._objective.evaluator.elementary_norms

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    @pytest.mark.parametrize("autocast", [False, True])
    def test_what_stands_in_is_the_same_function(self, dtype: torch.dtype, autocast: bool) -> None:
        torch.manual_seed(0)
        x, weight, bias = torch.randn(6, 4, 5, dtype=dtype), *torch.randn(2, 4, dtype=dtype)
        mean, variance = torch.randn(4, dtype=dtype), torch.rand(4, dtype=dtype)
        calls: dict[str, Callable[[list[Tensor]], Tensor]] = {
            "layer": lambda _: F.layer_norm(x, [4, 5], eps=0.1),
            "layer by names": lambda _: torch.layer_norm(input=x.mT, normalized_shape=[4], weight=weight, bias=bias),
            "batch": lambda own: F.batch_norm(x, *own, weight, bias, True, 0.3, 0.2),
            "batch, builtin": lambda own: torch.batch_norm(x, weight, bias, *own, True, 0.3, 0.2, False),
            "batch, evaluated": lambda own: F.batch_norm(x, *own, weight, bias),
            "instance": lambda own: F.instance_norm(x, *own, weight, bias, momentum=0.3),
            "instance, builtin": lambda own: torch.instance_norm(x, weight, bias, *own, False, 0.3, 0.2, False),
        }
        for call in calls.values():
            ours, theirs = [mean.clone(), variance.clone()], [mean.clone(), variance.clone()]
            with torch.autocast("cpu", enabled=autocast):
                expected = call(theirs)
                with TwiceDifferentiable(elementary_norms=True):
                    found = call(ours)
            assert found.dtype == expected.dtype
            tolerance = 4 * torch.finfo(dtype).eps
            torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)
            assert all(map(torch.equal, ours, theirs))

    def test_norms_that_nothing_can_stand_in_for_are_named(self) -> None:
        class Builtin(nn.Module):
            def forward(self, x: Tensor) -> Tensor:
                return torch.native_layer_norm(x, [4], None, None, 1e-5)[0]

        model, _, data = penalties("layer", by_autograd)
        model.net[1] = Builtin()
        H = HessianLinearOperator(model, nn.MSELoss(), dict(model.named_parameters()), data)
        with pytest.raises(RuntimeError, match=r"NativeLayerNormBackwardBackward0.*pytorch#186256.*elementary"):
            H @ np.ones(H.shape[1])

    def test_an_error_of_torch_keeps_its_words(self) -> None:
        words = "batch norm: a third derivative is not supported"

        class Refusing(torch.autograd.Function):
            """Has a gradient with the node names of torch's own normalizations."""

            @staticmethod
            def forward(ctx: Any, x: Tensor) -> Tensor:
                ctx.save_for_backward(x)
                return x.sin()

            @staticmethod
            def backward(ctx: Any, grad: Tensor) -> Tensor:
                (x,) = ctx.saved_tensors
                return torch._C._functions.DelayedError(words.encode(), 1)(grad * x.cos())

        class Model(nn.Linear):
            def forward(self, X: Tensor) -> Tensor:
                return Refusing.apply(super().forward(X))

        model, data = Model(3, 2), [(torch.ones(4, 3), torch.ones(4, 2))]
        H = HessianLinearOperator(model, nn.MSELoss(), dict(model.named_parameters()), data)
        with pytest.raises(RuntimeError, match=re.escape(words)):
            H @ np.ones(8)


class TestLinearMaps:
    @pytest.mark.parametrize("masked", [1, 2, 3])
    def test_logcumsumexp_behind_a_mask(self, masked: int) -> None:
        torch.manual_seed(0)
        model, X = nn.Linear(3, 6).double(), torch.randn(4, 3).double()
        hidden = torch.arange(6) < masked

        def loss_function(z: Tensor, y: Tensor) -> Tensor:
            sums = z.masked_fill(hidden, -torch.inf).logcumsumexp(-1)[:, masked:]
            return ((sums - y[:, masked:]) ** 2).mean()

        def elementary(z: Tensor, y: Tensor) -> Tensor:
            sums = z[:, masked:].exp().cumsum(-1).log()
            return ((sums - y[:, masked:]) ** 2).mean()

        y = torch.randn(4, 6).double()
        for kind in (HessianLinearOperator, GGNLinearOperator):
            found, expected = (
                kind(model, loss, dict(model.named_parameters()), [(X, y)]) @ np.eye(24)
                for loss in (loss_function, elementary)
            )
            close(found, expected)

    @seeded
    def cox(self, how: str) -> tuple[nn.Module, list[tuple[Tensor, Tensor]]]:
        torch.manual_seed(0)

        class Model(nn.Module):
            """Predicts the log-likelihoods of events, by torch's operation or by its definition."""

            def __init__(self) -> None:
                super().__init__()
                self.net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1))
                self.register_buffer("event", torch.rand(9) < 0.6)

            def forward(self, X: Tensor) -> Tensor:
                risk = self.net(X)[:, 0]
                if how == "by definition":
                    below = torch.ones(9, 9).tril().bool()
                    total = risk.expand(9, 9).masked_fill(~below, -torch.inf).logsumexp(1)
                else:
                    total = {
                        "method": risk.logcumsumexp,
                        "function": functools.partial(torch.logcumsumexp, risk),
                        "keywords": lambda dim: torch.logcumsumexp(input=risk, dim=dim),
                        "another axis": lambda dim: risk[:, None].logcumsumexp(-2)[:, 0],
                    }[how](dim=0)
                return (risk - total) * self.event  # rows without an event have a zero cotangent

        return Model(), [(torch.randn(9, 3), torch.randn(9))]

    @pytest.mark.parametrize("engine", ENGINES)
    @pytest.mark.parametrize("how", ["method", "function", "keywords", "another axis"])
    def test_logcumsumexp(self, how: str, engine: str) -> None:
        (model, data), (plain, _) = self.cox(how), self.cox("by definition")
        [(X, y)] = data
        params, J = dict(model.named_parameters()), rows(plain(X), list(plain.parameters()))
        eye = np.eye(J.shape[1])
        A = JacobianLinearOperator(model, params, data, engine=engine)
        close(A @ eye, J)
        close(A.T @ np.eye(len(J)), J.T)
        close(GGNLinearOperator(model, nn.MSELoss(), params, data, engine=engine) @ eye, 2 / len(J) * J.T @ J)
        H = HessianLinearOperator(model, nn.MSELoss(), params, data, engine=engine)
        close(H @ eye, hessian_by_hand(F.mse_loss(plain(X), y), plain))

    @pytest.mark.parametrize("start", [[0.0, 1.0], [-torch.inf, 0.5], [-800.0, 800.0], [800.0, -800.0]], ids=str)
    def test_logcumsumexp_of_any_size(self, start: list[float]) -> None:
        x = torch.tensor([*start, 0.3, -0.2, 1.7], dtype=torch.float64)
        with TwiceDifferentiable():
            torch.testing.assert_close(x.logcumsumexp(0), torch.logcumsumexp(x, 0))
            torch.testing.assert_close(x[0].logcumsumexp(0), x[0])
            assert x[:0].logcumsumexp(0).shape == (0,)
            z = torch.complex(x.clamp(-9, 9), x.sin().nan_to_num())
            found = z.logcumsumexp(0)
        torch.testing.assert_close(found, z.logcumsumexp(0))

    class Logarithmic(torch.autograd.Function):
        """The sine; its backward uses the logarithm of the cotangent."""

        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            ctx.save_for_backward(x)
            return x.sin()

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:
            (x,) = ctx.saved_tensors
            size = grad.abs().log().exp()
            return torch.where(grad > 0, size, -size) * x.cos()

    class Clipped(torch.autograd.Function):
        """The sine; its backward clips the cotangent and is linear only around zero."""

        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            ctx.save_for_backward(x)
            return x.sin()

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:
            (x,) = ctx.saved_tensors
            return grad.clamp(-0.1, 0.1) * x.cos()

    @seeded
    def model(self, function: Any) -> tuple[nn.Module, list[tuple[Tensor, Tensor]]]:
        class Model(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.first, self.second = nn.Linear(3, 4), nn.Linear(4, 2)

            def forward(self, X: Tensor) -> Tensor:
                return self.second(function(self.first(X)))

        return Model(), [(torch.randn(size, 3), torch.randn(size, 2)) for size in (3, 2)]

    @pytest.mark.parametrize("options", [{}, {"cache": 0}, *nightly({"engine": "compiled"})], ids=str)
    def test_a_formula_that_is_not_finite_at_zero(self, options: dict[str, Any]) -> None:
        (model, data), (plain, _) = self.model(self.Logarithmic.apply), self.model(torch.sin)
        J = np.concatenate([rows(plain(X), list(plain.parameters())) for X, _ in data])
        params, eye = dict(model.named_parameters()), np.eye(J.shape[1])
        A = JacobianLinearOperator(model, params, data, **options)
        for _ in range(2):
            close(A @ eye, J)
            close(A @ eye[0], J[:, 0])
        close(A.T @ np.eye(len(J)), J.T)
        close(JacobianLinearOperator(model, params, data, **options).T.T @ eye, J)
        for kind in (GGNLinearOperator, FisherLinearOperator):
            close(kind(model, nn.MSELoss(), params, data, **options) @ eye, 2 / len(J) * J.T @ J)

    @pytest.mark.slow
    def test_a_formula_that_is_not_finite_at_zero_compiled(self) -> None:
        (model, data), (plain, _) = self.model(self.Logarithmic.apply), self.model(torch.sin)
        J = rows(plain(data[0][0]), list(plain.parameters()))
        A = JacobianLinearOperator(model, dict(model.named_parameters()), data[:1], engine="compiled", columns=1)
        close(A @ np.eye(J.shape[1]), J)

    def test_zero_is_tried_first(self) -> None:
        (model, data), (plain, _) = self.model(self.Clipped.apply), self.model(torch.sin)
        J = np.concatenate([rows(plain(X), list(plain.parameters())) for X, _ in data])
        close(JacobianLinearOperator(model, dict(model.named_parameters()), data) @ np.eye(J.shape[1]), J)

    @pytest.mark.parametrize("kind", [JacobianLinearOperator, GGNLinearOperator])
    def test_a_product_that_is_finite_nowhere_is_refused_and_the_next_one_is_right(self, kind: Any) -> None:
        model, data = self.model(self.Clipped.apply)
        params = dict(model.named_parameters())
        A = kind(model, params, data) if kind is JacobianLinearOperator else kind(model, nn.MSELoss(), params, data)
        expected = A @ np.eye(A.shape[1])
        kept = model.first.weight.detach().clone()
        with torch.no_grad():
            model.first.weight[0, 0] = torch.nan
        with pytest.raises(NonFiniteProductError, match="at batch 0"):
            A @ np.ones(A.shape[1])
        with torch.no_grad():
            model.first.weight.copy_(kept)
        np.testing.assert_array_equal(A @ np.eye(A.shape[1]), expected)


class Energy(nn.Module):
    """Predicts one number for a batch, the energy of a molecule, and optionally a number for each atom."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.net, self.kind = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)), kind

    def forward(self, X: Tensor) -> Any:
        z = self.net(X)
        sites = z[:, 0].sin()
        return {"energy": z.sum(), "squeezed": z.squeeze(), "tree": {"energy": z.sum(), "sites": sites}}[self.kind]


def flat(prediction: Any) -> Tensor:
    parts = prediction.values() if isinstance(prediction, dict) else [prediction]
    return torch.cat([part.reshape(-1) for part in parts])


def fourth_powers(z: Any, y: Tensor) -> Tensor:
    """A user's loss that couples the parts of a prediction."""
    if isinstance(z, dict):
        return (z["energy"] - y) ** 4 + z["energy"] * z["sites"].pow(3).sum()
    return ((z - y) ** 4).sum()


fourth_powers.reduction = "sum"


class TestPredictionsWithoutDimensions:
    @seeded
    def problem(self, kind: str) -> tuple[Energy, list[tuple[Tensor, Tensor]]]:
        sizes = (3, 3, 1) if kind == "squeezed" else (4, 2, 5)  # the last batch's prediction has no dimension
        targets = (3, 3, None) if kind == "squeezed" else (None, None, None)
        data = [
            (torch.randn(size, 3), torch.randn(() if target is None else target))
            for size, target in zip(sizes, targets, strict=True)
        ]
        return Energy(kind), data

    def examples(self, model: Energy, loss: Any, data: Any) -> np.ndarray:
        """Return the gradients of the examples' losses as rows; a prediction without dimensions is one example."""
        terms = []
        for X, y in data:
            z = model(X)
            terms += (
                [loss(z, y)] if isinstance(z, dict) or not z.ndim else [loss(*pair) for pair in zip(z, y, strict=True)]
            )
        return rows(torch.stack(terms), list(model.parameters()))

    @pytest.mark.parametrize("options", [{}, {"cache": 0}, {"columns": 1}, *nightly({"engine": "compiled"})], ids=str)
    @pytest.mark.parametrize("kind", ["energy", "squeezed", "tree"])
    def test_the_jacobian(self, kind: str, options: dict[str, Any]) -> None:
        model, data = self.problem(kind)
        J = rows(torch.cat([flat(model(X)) for X, _ in data]), list(model.parameters()))
        A = JacobianLinearOperator(model, dict(model.named_parameters()), data, **options)
        M, N = J.shape
        close(A @ np.eye(N), J)
        close(A @ np.ones(N), J.sum(1))
        close(A.T @ np.eye(M), J.T)
        close(A.T @ np.ones(M), J.sum(0))
        close((A @ A.T) @ np.eye(M), J @ J.T)
        close(A[[1, 0], :][:, [2, 3]] @ np.eye(2), J[[1, 0], 2:4])
        close(A.T[[2, 3], :][:, [1, 0]] @ np.eye(2), J.T[2:4, [1, 0]])
        close(A.block("net.2.weight").T @ np.eye(M), J[:, A.params_slices["net.2.weight"]].T)
        assert check(A, rng=0).ok
        assert check(A.T, rng=0).ok

    @pytest.mark.default_cases("energy-loss1-{}", "squeezed-loss3-{*0}")
    @pytest.mark.parametrize("options", [{}, {"cache": 0}, {"columns": 1}], ids=str)
    @pytest.mark.parametrize(
        ("kind", "loss"),
        [
            *(
                (kind, nn.MSELoss(reduction=reduction))
                for kind in ("energy", "squeezed")
                for reduction in ("mean", "sum")
            ),
            *((kind, fourth_powers) for kind in ("energy", "squeezed", "tree")),
        ],
    )
    def test_matrices(self, kind: str, loss: Any, options: dict[str, Any]) -> None:
        self.compare(kind, loss, options)

    @pytest.mark.nightly  # each shape of batch is compiled separately
    @pytest.mark.parametrize(("kind", "loss"), [("squeezed", nn.MSELoss()), ("tree", fourth_powers)])
    def test_matrices_compiled(self, kind: str, loss: Any) -> None:
        self.compare(kind, loss, {"engine": "compiled", "columns": 1})

    def compare(self, kind: str, loss: Any, options: dict[str, Any]) -> None:
        model, data = self.problem(kind)
        leaves, params = list(model.parameters()), dict(model.named_parameters())
        divisor = sum(flat(model(X)).numel() for X, _ in data) if loss.reduction == "mean" else 1
        whole = nn.MSELoss(reduction="sum") if isinstance(loss, nn.Module) else loss
        hessian = sum(hessian_by_hand(whole(model(X), y), model) for X, y in data) / divisor
        ggn = 0
        for X, y in data:
            prediction = model(X)
            z = flat(prediction).detach().requires_grad_()
            cut = {"energy": z[0], "sites": z[1:]} if kind == "tree" else z.view(prediction.shape)
            J = rows(flat(prediction), leaves)
            ggn = ggn + J.T @ rows(row(whole(cut, y), [z]), [z]) @ J / divisor
        g = self.examples(model, whole, data)
        matrices = {
            HessianLinearOperator: hessian,
            GGNLinearOperator: ggn,
            EFLinearOperator: g.T @ g / divisor,
            GradientCovarianceLinearOperator: (g - g.mean(0)).T @ (g - g.mean(0)) / divisor,
        }
        if isinstance(loss, nn.Module):
            matrices[FisherLinearOperator] = ggn
        for made, expected in matrices.items():
            A = made(model, loss, params, data, **options)
            close(A @ np.eye(len(expected)), expected)
            close(A.T @ np.ones(len(expected)), expected.sum(0))
            close(A[[3, 1], :][:, [0, 5]] @ np.eye(2), expected[[3, 1]][:, [0, 5]])
            where = A.params_slices["net.0.bias"]
            close(A.block("net.0.bias") @ np.eye(4), expected[where, where])
            if made is not HessianLinearOperator and kind != "tree":
                close(A.diagonal(), np.diagonal(expected))
            assert check(A, rng=0).ok

    @pytest.mark.slow
    def test_a_sampled_fisher_matrix(self) -> None:
        model, data = self.problem("squeezed")
        params = dict(model.named_parameters())
        exact = FisherLinearOperator(model, nn.MSELoss(), params, data) @ np.eye(21)
        S = FisherLinearOperator(model, nn.MSELoss(), params, data, mc_samples=4000, rng=0)
        sampled = S @ np.eye(21)
        assert 0 < np.linalg.norm(sampled - exact) < 0.1 * np.linalg.norm(exact)
        close(S.diagonal(), np.diagonal(sampled))

    @pytest.mark.parametrize("y", [torch.tensor(0), torch.tensor(1.0, dtype=torch.float64)], ids=str)
    def test_classes_need_a_dimension(self, y: Tensor) -> None:
        model, [(X, _), *_] = self.problem("energy")
        H = HessianLinearOperator(model, nn.CrossEntropyLoss(), dict(model.named_parameters()), [(X, y)])
        with pytest.raises(ValueError, match=r"no dimensions, .* scores of shape \(C,\) or \(N, C\)"):
            H @ np.ones(21)
