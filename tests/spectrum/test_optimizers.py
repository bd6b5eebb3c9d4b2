"""Preconditioned eigenvalues and stability thresholds of optimizers, against the optimizers of torch themselves."""

from __future__ import annotations

import copy
import math
import pickle
import sys

import numpy as np
import pytest
import torch
from torch import nn
from torch.optim import SGD, Adam, AdamW, NAdam, RMSprop

from curvop import GGNLinearOperator, HessianLinearOperator
from curvop.spectrum import track

# The loss x' C x / 2 of a vector that is stored as two parameters.
C = torch.tensor(
    [[3.0, 0.5, 0.2, 0.1], [0.5, 2.0, 0.3, 0.4], [0.2, 0.3, 1.5, 0.6], [0.1, 0.4, 0.6, 1.0]], dtype=torch.float64
)


class Point(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.left = nn.Parameter(torch.tensor([1.0, -2.0], dtype=torch.float64))
        self.right = nn.Parameter(torch.tensor([[0.5], [1.5]], dtype=torch.float64))

    def forward(self, X):
        return torch.cat([self.left, self.right[:, 0]])


def quadratic(prediction, y):
    return prediction @ C @ prediction / 2


quadratic.reduction = "sum"


DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"))]


def problem() -> tuple[Point, HessianLinearOperator]:
    model = Point()
    data = [(torch.zeros(1), torch.zeros(1))]
    return model, HessianLinearOperator(model, quadratic, dict(model.named_parameters()), data)


def flat(model: nn.Module) -> torch.Tensor:
    return torch.cat([parameter.detach().reshape(-1) for parameter in model.parameters()])


def step(model: nn.Module, optimizer, sign: float = 1.0) -> None:
    optimizer.zero_grad()
    (sign * quadratic(model(None), None)).backward()
    optimizer.step()


def largest(optimizer, H, **options) -> tuple[float, float]:
    """Return the tracked eigenvalue and the threshold, for the current state."""
    tracker = track(H, tol=1e-12, optimizer=optimizer, **options)
    tracker.step()
    return float(tracker.values[0, 0]), float(tracker.thresholds[0])


def largest_of(P: torch.Tensor, H: torch.Tensor) -> float:
    return float(torch.linalg.eigvalsh(H / (P[:, None] * P[None]).sqrt())[-1])


# Second moments that hardly change: the next gradients are weighted by 1e-14.
STILL = 1 - 1e-14

THRESHOLDS = {
    "sgd": (SGD, {}, 2.0),
    "sgd-dampening-without-momentum": (SGD, {"dampening": 1.5}, 2.0),
    "heavy-ball": (SGD, {"momentum": 0.9}, 3.8),
    "dampening": (SGD, {"momentum": 0.9, "dampening": 0.9}, 38.0),
    "nesterov": (SGD, {"momentum": 0.9, "nesterov": True}, 3.8 / 2.8),
    "sgd-decay": (SGD, {"momentum": 0.5, "weight_decay": 0.7}, 3.0),
    "sgd-maximize": (SGD, {"maximize": True}, 2.0),
    "adam": (Adam, {"betas": (0.9, STILL)}, 38.0),
    "adam-decay": (Adam, {"betas": (0.5, STILL), "weight_decay": 0.7}, 6.0),
    "adam-maximize": (Adam, {"betas": (0.9, STILL), "maximize": True, "weight_decay": 0.1}, 38.0),
    "amsgrad": (Adam, {"betas": (0.8, STILL), "amsgrad": True, "eps": 0.1}, 18.0),
    "adamw": (AdamW, {"betas": (0.9, STILL), "weight_decay": 0.1}, 38.0),
    "rmsprop": (RMSprop, {"alpha": STILL}, 2.0),
    "rmsprop-momentum": (RMSprop, {"alpha": STILL, "momentum": 0.9}, 3.8),
    "rmsprop-centered": (RMSprop, {"alpha": STILL, "centered": True, "weight_decay": 0.7}, 2.0),
}


def frozen(model: Point, kind, lr, settings) -> torch.optim.Optimizer:
    """Return an optimizer whose second moments stay at given values, and whose bias corrections are 1."""
    optimizer = kind(model.parameters() if not isinstance(settings, list) else settings, lr=lr, **_only(settings))
    for index, parameter in enumerate(model.parameters()):
        square = torch.tensor([0.5, 2.0], dtype=torch.float64).reshape(parameter.shape) + index
        if kind is RMSprop:
            optimizer.state[parameter] = {"step": torch.tensor(1.0), "square_avg": square}
            optimizer.state[parameter] |= {"momentum_buffer": torch.zeros_like(parameter)}
            optimizer.state[parameter] |= {"grad_avg": torch.full_like(parameter, 0.3)}
        elif kind is not SGD:
            moments = {"exp_avg": torch.zeros_like(parameter), "exp_avg_sq": square, "max_exp_avg_sq": 1.5 * square}
            optimizer.state[parameter] = {"step": torch.tensor(1e17)} | moments
    return optimizer


def _only(settings) -> dict:
    return {} if isinstance(settings, list) else settings


def growth(kind, lr: float, settings, sign: float = 1.0, steps: int = 600) -> float:
    """Run the optimizer from a tiny point; return how much the parameters have grown in the last steps.

    The point stays so small that its gradients do not change the second moments.
    """
    model = Point()
    if callable(settings):
        settings = settings(model, lr)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter *= 1e-20
    optimizer = frozen(model, kind, lr, settings)
    norms = []
    for _ in range(steps):
        step(model, optimizer, sign)
        norms.append(float(flat(model).norm()))
        if norms[-1] > 1e-12:
            return float("inf")
    return max(norms[-20:]) / max(norms[-420:-400])


def critical(ratio) -> float:
    """Return the learning rate at which the increasing function `ratio` is 1."""
    low, high = 0.0, 1.0
    while ratio(high) < 1:
        high *= 2
    for _ in range(16):
        middle = (low + high) / 2
        low, high = (middle, high) if ratio(middle) < 1 else (low, middle)
    return low


@pytest.mark.parametrize("name", THRESHOLDS)
@pytest.mark.default_cases("heavy-ball", "nesterov", "adam", "adamw", "rmsprop-centered")
def test_the_optimizer_converges_below_the_threshold_and_diverges_above(name) -> None:
    kind, settings, expected = THRESHOLDS[name]
    model, H = problem()
    # With `maximize`, the loss that the optimizer maximizes has the Hessian -C.
    maximize = settings.get("maximize", False)
    A = HessianLinearOperator(model, _negative, dict(model.named_parameters()), [(None, None)]) if maximize else H
    sign = -1.0 if maximize else 1.0

    def ratio(lr: float) -> float:
        value, threshold = largest(frozen(model, kind, lr, settings), A)
        assert threshold == pytest.approx(expected, rel=1e-12)
        return value / threshold

    limit = critical(ratio)
    assert growth(kind, 0.99 * limit, settings, sign) < 0.9
    assert growth(kind, 1.01 * limit, settings, sign) > 1.1


def _negative(prediction, y):
    return -quadratic(prediction, y)


_negative.reduction = "sum"


GROUPS = {
    "learning-rates": (SGD, {"lr": 1.0}, {"lr": 0.3}),
    "momenta": (SGD, {"momentum": 0.9}, {"momentum": 0.5, "weight_decay": 1.0}),
    "nesterov-and-plain": (SGD, {"momentum": 0.9, "nesterov": True}, {}),
    "nesterov-dampening": (SGD, {"momentum": 0.9, "nesterov": True, "dampening": 0.5}, {"lr": 0.1}),
    "betas": (AdamW, {"betas": (0.9, STILL), "weight_decay": 0.05}, {"betas": (0.3, STILL)}),
    "rmsprop": (RMSprop, {"alpha": STILL, "momentum": 0.9}, {"alpha": STILL}),
}


@pytest.mark.parametrize("name", GROUPS)
@pytest.mark.default_cases("betas", "nesterov-dampening")
def test_groups_with_different_settings_share_one_threshold(name) -> None:
    kind, first, second = GROUPS[name]

    def groups(model: Point, lr: float) -> list:
        both = zip((model.left, model.right), (first, second), strict=True)
        return [{"params": [part], **settings, "lr": lr * settings.get("lr", 1.0)} for part, settings in both]

    model, H = problem()

    def ratio(lr: float) -> float:
        value, threshold = largest(frozen(model, kind, lr, groups(model, lr)), H)
        return value / threshold

    limit = critical(ratio)
    assert growth(kind, 0.99 * limit, groups) < 0.9
    assert growth(kind, 1.01 * limit, groups) > 1.1


UPDATES = {
    "adam": (Adam, {"lr": 0.02}),
    "adam-eps": (Adam, {"lr": 0.02, "eps": 0.5, "betas": (0.7, 0.9)}),
    "adam-tensor-lr": (Adam, {"lr": torch.tensor(0.02, dtype=torch.float64), "foreach": False}),
    "adam-foreach": (Adam, {"lr": 0.02, "foreach": True}),
    "adam-fused": (Adam, {"lr": 0.02, "fused": True}),
    "amsgrad": (Adam, {"lr": 0.4, "amsgrad": True, "betas": (0.9, 0.5)}),
    "adamw": (AdamW, {"lr": 0.02, "weight_decay": 0.0}),
    "rmsprop": (RMSprop, {"lr": 0.02}),
    "rmsprop-centered": (RMSprop, {"lr": 0.02, "centered": True, "eps": 0.01}),
}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", UPDATES)
def test_the_preconditioner_is_the_one_of_the_update(name, device, monkeypatch) -> None:
    """P is the ratio of the momentum (for RMSprop, of the gradient) to the update."""
    kind, settings = UPDATES[name]
    monkeypatch.setattr(sys.modules[__name__], "C", C.to(device))
    model = Point().to(device)
    data = [(torch.zeros(1, device=device), torch.zeros(1, device=device))]
    H = HessianLinearOperator(model, quadratic, dict(model.named_parameters()), data)
    optimizer = kind(model.parameters(), **settings)
    for _ in range(7):
        before = flat(model)
        step(model, optimizer)
    states = [optimizer.state[parameter] for parameter in model.parameters()]
    if kind is RMSprop:
        moved = torch.cat([parameter.grad.reshape(-1) for parameter in model.parameters()])
    else:
        moved = torch.cat([state["exp_avg"].reshape(-1) for state in states])
    P = moved / (before - flat(model))
    assert (P > 0).all()
    value, _ = largest(optimizer, H)
    assert value == pytest.approx(largest_of(P, C), rel=1e-9)


def test_vectors_are_eigenvectors_of_the_preconditioned_matrix() -> None:
    model, H = problem()
    optimizer = SGD([{"params": [model.left], "lr": 0.5}, {"params": [model.right], "lr": 2.0}], weight_decay=0.25)
    tracker = track(H, 2, tol=1e-12, optimizer=optimizer)
    tracker.step()
    S = np.sqrt([0.5, 0.5, 2.0, 2.0])
    M = S[:, None] * (C.numpy() + 0.25 * np.eye(4)) * S
    np.testing.assert_allclose(tracker.values[0], np.linalg.eigvalsh(M)[-2:], rtol=1e-10)
    np.testing.assert_allclose(M @ tracker.vectors, tracker.vectors * tracker.values[0], atol=1e-8)


def test_a_part_of_the_parameters_and_aliases() -> None:
    model, H = problem()
    optimizer = SGD([model.right, model.left], lr=0.5)
    exact = np.linalg.eigvalsh(C.numpy()[2:, 2:])[-1] / 2
    assert largest(optimizer, H.block("right"))[0] == pytest.approx(exact, rel=1e-10)
    aliases = {name: parameter.detach() for name, parameter in model.named_parameters()}
    same = HessianLinearOperator(model, quadratic, aliases, [(None, None)])
    assert largest(optimizer, same)[0] == pytest.approx(np.linalg.eigvalsh(C.numpy())[-1] / 2, rel=1e-10)
    damped = largest(optimizer, H.damped(1.0))[0]
    assert damped == pytest.approx((np.linalg.eigvalsh(C.numpy())[-1] + 1) / 2, rel=1e-10)


def test_the_settings_and_the_state_are_read_in_every_step() -> None:
    model, H = problem()
    optimizer = Adam(model.parameters(), lr=0.01)
    tracker = track(H, every=1, tol=1e-10, optimizer=optimizer)
    for index in range(3):
        tracker.step()
        step(model, optimizer)
        if index == 1:  # loading a state replaces the groups and the state
            optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
            optimizer.param_groups[0]["betas"] = (0.5, 0.999)
            optimizer.param_groups[0]["lr"] = 0.0
    tracker = pickle.loads(pickle.dumps(tracker))
    assert np.isnan(tracker.values[0]).all()  # there are no second moments before the first step
    assert tracker.values[1, 0] > 0
    assert tracker.values[2, 0] == 0
    np.testing.assert_allclose(tracker.thresholds, [38, 38, 6])
    tracker.step()
    assert tracker.steps.tolist() == [0, 1, 2, 3]


def test_the_plot_shows_the_threshold() -> None:
    plt = pytest.importorskip("matplotlib.pyplot")
    plt.switch_backend("agg")
    model, H = problem()
    tracker = track(H, every=1, optimizer=SGD(model.parameters(), lr=0.1, momentum=0.9))
    tracker.step()
    axis = tracker.plot()
    assert np.allclose(axis.lines[-1].get_ydata(), 3.8)
    assert axis.lines[-1].get_label() == "stability threshold 3.8"
    with pytest.raises(ValueError, match=r"learning_rate is 0.1, but the tracker has an optimizer"):
        tracker.plot(learning_rate=0.1)
    smallest = track(H, which="SA", optimizer=SGD(model.parameters(), lr=0.1))
    smallest.step()
    assert len(smallest.plot().lines) == 1  # the threshold limits the largest eigenvalue
    plt.close("all")
    assert track(H).thresholds is None


def test_a_failed_step_leaves_the_record_consistent(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args, **options):
        raise RuntimeError("a product failed")

    model, H = problem()
    optimizer = SGD(model.parameters(), lr=0.1, momentum=0.9)
    tracker = track(H, every=1, tol=1e-12, optimizer=optimizer)
    tracker.step()
    with monkeypatch.context() as patch:
        patch.setattr(sys.modules["curvop.spectrum.track"], "eigsh", fail)
        with pytest.raises(RuntimeError, match="a product failed"):
            tracker.step()
    optimizer.param_groups[0]["momentum"] = 0.5
    tracker.step()
    assert tracker.steps.tolist() == [0, 2]
    assert tracker.values.shape == (2, 1)
    np.testing.assert_allclose(tracker.thresholds, [3.8, 3.0])


def test_a_pickled_tracker_keeps_aliases() -> None:
    model, _ = problem()
    aliases = {name: parameter.detach() for name, parameter in model.named_parameters()}
    H = HessianLinearOperator(model, quadratic, aliases, [(None, None)])
    optimizer = SGD(model.parameters(), lr=0.5)
    tracker = track(H, every=1, tol=1e-12, optimizer=optimizer)
    expected = tracker.step()
    again = pickle.loads(pickle.dumps(tracker))
    np.testing.assert_allclose(again.step(), expected, rtol=1e-10)
    with torch.no_grad():
        again._optimizer.param_groups[0]["params"][0].add_(1.0)  # the operator does not notice this
    with pytest.raises(ValueError, match=r"no longer trains the parameter 'left' of A: create A from"):
        again.step()
    step(model, optimizer)
    np.testing.assert_allclose(tracker.step(), expected, rtol=1e-10)


def test_a_fused_optimizer_whose_first_step_was_skipped_has_no_second_moments() -> None:
    model, H = problem()
    optimizer = Adam(model.parameters(), lr=0.1, fused=True)
    optimizer.grad_scale, optimizer.found_inf = torch.tensor(1.0), torch.tensor(1.0)  # as set by a gradient scaler
    tracker = track(H, every=1, optimizer=optimizer)
    step(model, optimizer)
    assert np.isnan(tracker.step()).all()
    optimizer.found_inf = torch.tensor(0.0)
    step(model, optimizer)
    assert tracker.step() > 0


def test_the_direction_of_the_optimizer_is_read_in_every_step() -> None:
    model, H = problem()
    optimizer = SGD([{"params": [model.left]}, {"params": [model.right]}], lr=0.5)
    tracker = track(H, every=1, tol=1e-12, optimizer=optimizer)
    tracker.step()
    optimizer.param_groups[0]["maximize"] = True
    with pytest.raises(ValueError, match="maximize=True and False"):
        tracker.step()
    optimizer.param_groups[1]["maximize"] = True
    assert tracker.step() == pytest.approx(-np.linalg.eigvalsh(C.numpy())[0] / 2, rel=1e-10)


class TestBadInput:
    def test_other_optimizers(self) -> None:
        model, H = problem()

        class Mine(SGD):
            pass

        for optimizer in (NAdam(model.parameters()), Mine(model.parameters(), lr=0.1), "adam"):
            with pytest.raises(TypeError, match="must be one of SGD, Adam, AdamW, RMSprop"):
                track(H, optimizer=optimizer)

    def test_parameters_of_another_optimizer(self) -> None:
        model, H = problem()
        with pytest.raises(ValueError, match="optimizer does not have the parameter 'right' of A"):
            track(H, optimizer=SGD([model.left], lr=0.1))
        assert track(H.block("left"), optimizer=SGD([model.left], lr=0.1)).step() is not None

    def test_operators_without_parameters(self) -> None:
        model, H = problem()
        optimizer = SGD(model.parameters(), lr=0.1)
        for A in (np.eye(4), H[:2, :][:, :2], H.block("left", "right")):
            with pytest.raises(TypeError, match="its rows and columns must be the same parameters"):
                track(A, optimizer=optimizer)

    def test_states_and_groups(self) -> None:
        model, H = problem()
        optimizer = Adam(model.parameters(), lr=0.1)
        model.left.grad = torch.ones(2, dtype=torch.float64)
        optimizer.step()
        with pytest.raises(ValueError, match=r"no second moments of 'right'.*A\.block"):
            track(H, optimizer=optimizer).step()
        groups = [{"params": [model.left]}, {"params": [model.right], "maximize": True}]
        with pytest.raises(ValueError, match="maximize=True and False"):
            track(H, optimizer=SGD(groups, lr=0.1))
        with pytest.raises(ValueError, match="dampening >= 1"):
            track(H, optimizer=SGD(model.parameters(), lr=0.1, momentum=0.5, dampening=1))
        for settings in ({"momentum": 1.0}, {"momentum": 1.2, "dampening": 0.5}, {"momentum": math.nan}):
            for kind in (SGD, RMSprop):
                optimizer = kind([{"params": list(model.parameters()), **settings}], lr=0.1)
                with pytest.raises(ValueError, match=r"optimizer has momentum .*: use a momentum >= 0 and less than 1"):
                    track(H, optimizer=optimizer)
        model.right.grad = torch.zeros(2, 1, dtype=torch.float64)
        optimizer = AdamW(model.parameters(), lr=0.1, weight_decay=30)
        optimizer.step()
        with pytest.raises(ValueError, match=r"lr 0.1 and decoupled weight_decay 30.*less than 2"):
            track(H, optimizer=optimizer).step()
        optimizer = Adam(model.parameters(), lr=0.1, eps=0)
        optimizer.step()
        with pytest.raises(ValueError, match=r"second moment of 0 for 'right'.*positive eps"):
            track(H, optimizer=optimizer).step()

    def test_settings_that_change_during_training(self) -> None:
        model, H = problem()
        for kind, name, value, match in (
            (SGD, "momentum", 1.0, "momentum 1,"),
            (SGD, "lr", -0.1, "lr -0.1, but must have lr >= 0"),
            (Adam, "betas", (1.0, 0.9), "beta1 1,"),
            (Adam, "betas", (0.9, 1.0), "beta2 1,"),
            (AdamW, "weight_decay", -1.0, "weight_decay -1, but"),
            (Adam, "amsgrad", True, r"no state 'max_exp_avg_sq' of 'left', because amsgrad=True was set after"),
            (RMSprop, "centered", True, r"no state 'grad_avg' of 'left', because centered=True was set after"),
        ):
            optimizer = kind(model.parameters(), lr=0.01)
            tracker = track(H, every=1, optimizer=optimizer)
            step(model, optimizer)
            tracker.step()
            optimizer.param_groups[0][name] = value
            with pytest.raises(ValueError, match=match):
                tracker.step()
        optimizer.param_groups.clear()
        with pytest.raises(ValueError, match="no longer trains the parameter 'left'"):
            tracker.step()


def test_gradient_descent_on_a_network_is_tracked_as_without_an_optimizer() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    data = [(torch.randn(9, 3).double(), torch.randn(9, 2).double())]
    G = GGNLinearOperator(model, nn.MSELoss(), model.parameters(), data)
    plain = track(G, 2, tol=1e-10)
    scaled = track(G, 2, tol=1e-10, optimizer=SGD(model.parameters(), lr=0.25))
    np.testing.assert_allclose(scaled.step(), 0.25 * plain.step(), rtol=1e-8)
    assert scaled.products == plain.products
