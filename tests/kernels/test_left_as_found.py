"""The model, its gradients, buffers, flags and all global state are restored after an error at any moment.

Fuses lie in every layer, forward and backward, in the loss and in the loader. A first run counts how often the fuses
are passed. Then each of these moments gets a product of its own, in which the fuse blows at that moment.
"""

from __future__ import annotations

import contextlib
from typing import Any

import numpy as np
import pytest
import torch
from cases import Constructed, nightly
from fuses import KINDS, Fuse, interrupted_at, made, state
from torch import Tensor, nn

from curvop import (
    check,
)
from curvop.kernels.changes import Generators

pytestmark = pytest.mark.filterwarnings("ignore:'1' .BatchNorm1d. normalizes each of the 2 batches:RuntimeWarning")


def probe(A: Any) -> np.ndarray:
    return np.random.default_rng(0).standard_normal((A.shape[1], 2))


def moments(kind: str, options: dict[str, Any], run: Any) -> range:
    """Return the moments, counted from 1, at which ``run(A)`` passes the fuse."""
    fuse = Fuse()
    _, _, A = made(kind, fuse, options)
    fuse.set(-1)
    run(A)
    return range(1, fuse.passed + 1)


def twice(A: Any) -> None:
    A @ probe(A)
    if not isinstance(A, Constructed):  # its products have nothing in common
        A @ probe(A)


def expected(kind: str) -> np.ndarray:
    _, _, A = made(kind, Fuse(), {})
    return A @ probe(A)


def writing(model: nn.Module) -> None:
    """Make a model write to its batch and to a buffer."""

    def write(model: nn.Module, args: tuple[Tensor]) -> None:
        args[0].add_(1.0)
        model.calls.add_(1.0)

    model.register_buffer("calls", torch.zeros(()))
    model.register_forward_pre_hook(write)


@pytest.mark.default_cases("hessian-auto", "covariance-0", "kfac-auto")
@pytest.mark.parametrize("cache", ["auto", 0])
@pytest.mark.parametrize("kind", KINDS)
def test_wherever_a_product_is_interrupted(kind: str, cache: Any) -> None:
    exact, found = expected(kind), moments(kind, {"cache": cache}, twice)
    assert len(found) > 15
    for moment in found:
        fuse = Fuse()
        model, data, A = made(kind, fuse, {"cache": cache})
        before = state(model, data)
        fuse.set(moment)
        with pytest.raises(KeyboardInterrupt):
            twice(A)
        assert state(model, data) == before
        fuse.set(-1)
        np.testing.assert_allclose(A @ probe(A), exact, rtol=1e-12, atol=1e-14)
        assert state(model, data) == before


OWN = ("kernels/changes.py", "kernels/differentiable.py")
#: The functions of these files that change global state and restore it.
_RESTORING = ("_set_states", "_set_backends", "_restore", "_leave_modes", "__enter__", "__exit__")
RESTORING = frozenset({"private", "_states", "slow_backends", *_RESTORING})
MODES = ("torch/overrides.py",)
GUARD = ("kernels/guard.py",)


@pytest.mark.default_cases("swapping parameters", "random numbers and backends")
@pytest.mark.parametrize(
    ("files", "functions", "change"),
    [(OWN, RESTORING, None), (MODES, (), None), (GUARD, (), None), (GUARD, (), writing)],
    ids=["random numbers and backends", "modes of functions", "swapping parameters", "undoing writes"],
)
def test_wherever_a_line_is_interrupted(files: tuple[str, ...], functions: Any, change: Any) -> None:
    def fresh() -> tuple[nn.Module, list[Any], Any]:
        model, data, A = made("hessian", Fuse(), {})
        if change is not None:
            change(model)
        return model, data, A

    _, _, A = fresh()
    with interrupted_at(-1, files, functions) as lines:
        exact = A @ probe(A)
    assert lines[0] > 60
    for moment in range(1, lines[0] + 1, max(1, lines[0] // 200)):
        model, data, A = fresh()
        before = state(model, data)
        with pytest.raises(KeyboardInterrupt), interrupted_at(moment, files, functions):
            A @ probe(A)
        assert state(model, data) == before
        np.testing.assert_allclose(A @ probe(A), exact, rtol=1e-12, atol=1e-14)
        assert state(model, data) == before


def test_random_numbers_of_every_gpu(monkeypatch) -> None:
    first, second = torch.device("cuda:0"), torch.device("cuda:1")
    states = {first: torch.tensor([1]), second: torch.tensor([2])}
    monkeypatch.setattr(torch.cuda, "get_rng_state", states.__getitem__)
    monkeypatch.setattr(torch.cuda, "set_rng_state", lambda state, device: states.__setitem__(device, state))
    generators, outside = Generators(), dict(states)
    for number, devices in enumerate([{first, second}, {second}, {torch.device("cpu"), first}]):
        with contextlib.suppress(KeyboardInterrupt), generators.private(devices):
            assert number == 0 or states[first] == outside[first]  # a use without a device ends its stream
            assert number != 1 or states[second] == 12
            states.update({device: state + 10 for device, state in states.items() if device in devices})
            raise KeyboardInterrupt
        assert states == outside


@pytest.mark.default_cases("hessian", "ef", "kfac")
@pytest.mark.parametrize("kind", KINDS)
def test_an_error_is_raised_or_overcome(kind: str) -> None:
    exact = expected(kind)
    for moment in moments(kind, {}, twice):
        fuse = Fuse()
        model, data, A = made(kind, fuse, {})
        before = state(model, data)
        fuse.set(moment, RuntimeError)
        with contextlib.suppress(RuntimeError):
            twice(A)
        assert state(model, data) == before
        fuse.set(-1)
        np.testing.assert_allclose(A @ probe(A), exact, rtol=1e-12, atol=1e-14)


@pytest.mark.slow_cases("check")
@pytest.mark.parametrize("what", ["gradient_and_loss", "check", "fingerprint"])
def test_besides_products(what: str) -> None:
    def run(A: Any) -> object:
        return check(A, rng=0) if what == "check" else getattr(A, what)()

    exact = expected("hessian")
    for moment in moments("hessian", {}, run):
        fuse = Fuse()
        model, data, A = made("hessian", fuse, {})
        before = state(model, data)
        fuse.set(moment)
        with pytest.raises(KeyboardInterrupt):
            run(A)
        assert state(model, data) == before
        fuse.set(-1)
        np.testing.assert_allclose(A @ probe(A), exact, rtol=1e-12, atol=1e-14)


@pytest.mark.slow
@pytest.mark.parametrize("moment", [1, *nightly(2, 4), 12])
def test_the_compiled_engine(moment: int) -> None:
    fuse = Fuse()
    model, data, A = made("hessian", fuse, {"engine": "compiled"})
    before = state(model, data)
    fuse.set(moment)
    with pytest.raises(KeyboardInterrupt):
        A @ probe(A)
    assert state(model, data) == before
    fuse.set(-1)
    np.testing.assert_allclose(A @ probe(A), expected("hessian"), rtol=1e-9, atol=1e-12)
    assert state(model, data) == before
