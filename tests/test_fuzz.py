"""Random small problems, handed over in every way, against matrices computed by routes of their own in float64.

50 cases of one family by default, 150 more of the others in the tier ``slow``, 2,000 and compiled ones in ``nightly``.
Products are recorded in 50 more cases in ``slow``, and 150 in ``nightly``.
The nightly ones draw other cases in each run: ``CURVOP_FUZZ_SEED`` repeats one. Operations of torch are compared with
finite differences one after another.
"""

from __future__ import annotations

import dataclasses
import os
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from cases import record_at_once, seeded
from fuzz_models import LAYERS, Case, Problem, cases
from fuzz_oracle import Differences, Oracle
from hypothesis import HealthCheck, given, seed, settings
from operations import LAYERS as LAYER_OPERATIONS
from operations import ONCE_DIFFERENTIABLE, OPERATIONS, REDUCTIONS, Operated
from torch import Tensor, nn

from curvop import (
    EFLinearOperator,
    FisherLinearOperator,
    GGNLinearOperator,
    GradientCovarianceLinearOperator,
    HessianLinearOperator,
    JacobianLinearOperator,
)
from curvop.kernels import recorded

pytestmark = [
    pytest.mark.filterwarnings("ignore:reduction.*divides:UserWarning"),  # torch says so of its own loss
    pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated"),  # by its own forward mode
    pytest.mark.filterwarnings("ignore:Calling .r?matvec. on .column vectors.:FutureWarning"),  # SciPy's, from 1.18 on
]

settings.register_profile("fuzz", deadline=None, database=None, suppress_health_check=list(HealthCheck))
settings.register_profile("fuzz-ci", settings.get_profile("fuzz"), max_examples=50, derandomize=True)
settings.register_profile("fuzz-scheduled", settings.get_profile("fuzz"), max_examples=525, print_blob=True)
settings.register_profile("fuzz-compiled", settings.get_profile("fuzz"), max_examples=10, derandomize=True)

#: What rounding leaves of a matrix, relative to its norm. Norms with few features, and squares of gradients, multiply
#: rounding errors by their condition, which for these small networks stays far below the digits that float64 has to
#: spare. float32 has none to spare: there the error of a route of its own in float32 says what the condition is.
FLOAT64 = 1e-9
FLOAT32 = 200 * float(np.finfo(np.float32).eps)
#: Matrices smaller than this are zero but for rounding, such as those of a bias below a normalization.
SMALL = 1e-2

KINDS = {
    "GGN": GGNLinearOperator,
    "EF": EFLinearOperator,
    "Fisher": FisherLinearOperator,
    "Covariance": GradientCovarianceLinearOperator,
}


def run(
    kind: str, profile: str, at_least: int, engine: str = "autograd", start: int | None = None, **changes: Any
) -> None:
    """Check cases of this kind of input, with some of their attributes changed, and that so many were checked."""
    checked = []

    @settings(settings.get_profile(profile))
    @given(cases(kind, engine))
    def check(case: Case) -> None:
        assert_right(dataclasses.replace(case, **changes))
        checked.append(case)

    (check if start is None else seed(start)(check))()
    assert len(checked) >= at_least


@pytest.mark.default_cases("vector")
@pytest.mark.parametrize("kind", LAYERS)
def test_random_problems(kind: str) -> None:
    run(kind, "fuzz-ci", at_least=50)


@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=pytest.mark.slow if kind == "vector" else pytest.mark.nightly) for kind in LAYERS]
)
def test_random_problems_with_recorded_products(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    record_at_once(monkeypatch)
    runs, call = [], recorded._Program.__call__
    monkeypatch.setattr(recorded._Program, "__call__", lambda *arguments: runs.append(1) or call(*arguments))
    run(kind, "fuzz-ci", at_least=50, columns=2, cache="auto")
    assert len(runs) > 50


@pytest.mark.nightly
@pytest.mark.parametrize("kind", LAYERS)
def test_more_random_problems(kind: str) -> None:
    start = int(os.environ.get("CURVOP_FUZZ_SEED", random.SystemRandom().randrange(2**32)))
    print(f"CURVOP_FUZZ_SEED={start}")
    run(kind, "fuzz-scheduled", at_least=500, start=start)


@pytest.mark.nightly
@pytest.mark.filterwarnings(  # tensors that a function closes over cannot be traced: it says so, and is right
    "ignore:engine='compiled' falls back to 'autograd'.*convert all Tensors to FakeTensors:RuntimeWarning"
)
@pytest.mark.parametrize("kind", LAYERS)
def test_random_problems_compiled(kind: str) -> None:
    run(kind, "fuzz-compiled", at_least=10, engine="compiled")


@seeded
def operated(name: str) -> tuple[Operated, list[tuple[Tensor, None]]]:
    return Operated(OPERATIONS[name]), [(torch.randn(12, 3), None)]


@pytest.mark.parametrize("name", OPERATIONS)
def test_one_operation_after_another(name: str) -> None:
    model, data = operated(name)
    differences = Differences(model, squares, data[0][0])
    once = name in ONCE_DIFFERENTIABLE
    assert_jacobian(model, data, differences.jacobian(), once=once)
    if once:
        return
    H = HessianLinearOperator(model, squares, dict(model.named_parameters()), data)
    near(H @ np.eye(3), differences.hessian())


@pytest.mark.nightly
@pytest.mark.parametrize("name", [name for name in REDUCTIONS | LAYER_OPERATIONS if name not in ONCE_DIFFERENTIABLE])
def test_one_operation_after_another_compiled(name: str) -> None:
    model, data = operated(name)
    assert_jacobian(model, data, Differences(model, squares, data[0][0]).jacobian(), engine="compiled")


def assert_jacobian(
    model: nn.Module, data: Any, expected: np.ndarray, once: bool = False, engine: str = "autograd"
) -> None:
    """Check the Jacobian and its transpose, or that it is refused where an operation is differentiable `once` only."""
    J = JacobianLinearOperator(model, dict(model.named_parameters()), data, engine=engine)
    near(J.T @ np.eye(len(expected)), expected.T)
    near(J.T @ np.ones(len(expected)), expected.sum(0))
    if once:
        with pytest.raises(RuntimeError, match=r"derivative for .* is not implemented"):
            J @ np.eye(3)
    else:
        near(J @ np.eye(3), expected)
        near(J @ np.ones(3), expected.sum(1))


def near(actual: np.ndarray, expected: np.ndarray) -> None:
    assert actual.shape == expected.shape
    assert np.linalg.norm(actual - expected) <= 1e-6 * np.linalg.norm(expected)


def squares(prediction: tuple[Tensor, ...], y: None) -> Tensor:
    """A loss of which entries, and the parts of a prediction, are not independent."""
    return sum(part.square().sum() for part in prediction) * prediction[1]


squares.reduction = "sum"


def assert_right(case: Case) -> None:
    problem = case.build()
    oracle = Oracle(problem)
    rng = np.random.default_rng(case.seed)
    model, function, data = problem.handed_over()
    names, params = chosen(case, oracle, model, rng)
    if case.hand_over == "elsewhere":
        move(problem, names, params, rng)
    A = operator(case, model, function, params, data, problem)
    found = as_found(model)
    compare(problem, oracle, A, names, rng, thoroughly=case.engine == "autograd")  # each part is compiled by itself
    if case.moves:
        move(problem, names, params, rng)
        found = as_found(model)
        compare(problem, oracle, A, names, rng, thoroughly=False)
    assert found == as_found(model)


def chosen(
    case: Case, oracle: Oracle, model: nn.Module, rng: np.random.Generator
) -> tuple[list[str], dict[str, Tensor]]:
    """Return names of parameters, in any order, one for each tied tensor, and the tensors to hand over."""
    own = dict(model.named_parameters(remove_duplicate=False))
    names = list(oracle.named)
    if not case.whole:
        names = [str(name) for name in rng.permutation(oracle.names)]
        names = list({id(own[name]): name for name in names}.values())[: rng.integers(1, len(names) + 1)]
        if case.hand_over == "list":  # which names a tied parameter by the first of its names
            first = {id(own[name]): name for name in oracle.named}
            names = [first[id(own[name])] for name in names]
        for value in {id(value): value for name, value in own.items() if rng.random() < 0.5}.values():
            value.requires_grad_(any(value is own[name] for name in names))
    if case.hand_over == "elsewhere":
        return names, {name: own[name].detach().clone().requires_grad_() for name in names}
    return names, {name: own[name] for name in names}


def move(problem: Problem, names: list[str], params: dict[str, Tensor], rng: np.random.Generator) -> None:
    """Change the parameters in place, the oracle's with them."""
    theirs = dict(problem.model.named_parameters(remove_duplicate=False))
    with torch.no_grad():
        for name in names:
            params[name] += 0.1 * torch.from_numpy(rng.normal(size=params[name].shape)).to(params[name].dtype)
            theirs[name].copy_(params[name])


def operator(
    case: Case, model: nn.Module, function: Any, params: dict[str, Tensor], data: Any, problem: Problem
) -> Any:
    options: dict[str, Any] = dict(
        dtype=np.dtype(case.dtype), cache=case.cache, columns=case.columns, engine=case.engine
    )
    own = list(params.values()) if case.hand_over == "list" else params
    called: Any = model
    if case.hand_over == "callable":

        def called(params: dict[str, Tensor], X: Tensor) -> Tensor:
            return call(model, params, X)

        own = params
    if case.matrix == "Jacobian":
        return JacobianLinearOperator(called, own, data, **options)
    if problem.loss.weight is not None:
        options["batch_weight"] = problem.loss.weight
    if case.matrix == "objective":
        return from_objective(case, model, function, params, data, problem, options)
    kind = KINDS.get(case.matrix, HessianLinearOperator)
    return kind(called, function, own, data, **options)


def call(model: nn.Module, params: dict[str, Tensor], X: Tensor) -> Tensor:
    """Call a module as a function, which owns the buffers that it writes to."""
    own = {name: buffer.clone() for name, buffer in model.named_buffers()}
    return torch.func.functional_call(model, own | params, (X,))


def from_objective(
    case: Case, model: nn.Module, function: Any, params: dict[str, Tensor], data: Any, problem: Problem, options: Any
) -> HessianLinearOperator:
    """An objective that computes its own loss says by itself how much a batch counts."""

    def objective(params: dict[str, Tensor], batch: Any) -> Tensor:
        return function(call(model, params, batch[0]), batch[1])

    objective.reduction = case.reduction
    if case.reduction == "mean" and "batch_weight" not in options:
        options["batch_weight"] = lambda batch: divisor_by_hand(function, batch[1])
    return HessianLinearOperator.from_objective(objective, params, data, **options)


def divisor_by_hand(function: Any, y: Tensor) -> float:
    if y.is_floating_point():
        return float(len(y))  # all positions have as many entries
    known = y[y != -100]
    return float(len(known) if function.weight is None else sum(float(function.weight[int(c)]) for c in known))


def as_found(model: nn.Module) -> list[Any]:
    """Return all that products are to leave alone."""
    tensors = [part.detach().reshape(-1).tolist() for part in (*model.parameters(), *model.buffers())]
    flags = [part.training for part in model.modules()], [part.requires_grad for part in model.parameters()]
    return [tensors, flags, [part.grad for part in model.parameters()], torch.get_rng_state().tolist()]


MATRIX: dict[str, Callable[[Oracle], Tensor]] = {
    "Hessian": Oracle.hessian,
    "objective": Oracle.hessian,
    "GGN": Oracle.ggn,
    "Fisher": Oracle.ggn,  # of these likelihoods
    "EF": Oracle.empirical_fisher,
    "Covariance": Oracle.covariance,
    "Jacobian": Oracle.jacobian,
}


def compare(
    problem: Problem, oracle: Oracle, A: Any, names: list[str], rng: np.random.Generator, thoroughly: bool = True
) -> None:
    case = problem.case
    everything = MATRIX[case.matrix](oracle).detach().numpy()
    scale = max(float(np.linalg.norm(everything)), SMALL)
    if case.matrix == "Covariance":  # a difference, of which the terms are the model's to round
        scale = max(scale, float(oracle.empirical_fisher().norm()))
    cols = np.concatenate([np.arange(oracle.size)[oracle.slices[name]] for name in names])
    dense = everything[:, cols] if case.matrix == "Jacobian" else everything[np.ix_(cols, cols)]
    rtol = accuracy(problem, oracle, rng)

    def close(actual: Any, expected: Any, x: Any = 1.0, how: Any = np.float64) -> None:
        """Compare a product with `x`, in vectors of dtype `how`."""
        assert actual.shape == np.shape(expected)
        error = float(np.linalg.norm(np.asarray(actual, dtype=np.float64) - expected))
        vectors = 20 * float(np.finfo(how).eps)  # converted there and back
        assert error <= (rtol + vectors) * scale * max(float(np.linalg.norm(x)), 1.0)

    assert A.shape == dense.shape
    assert A.dtype == np.dtype(case.dtype)
    (M, N), count = A.shape, A.num_products
    X = rng.normal(size=(N, 3))
    close(A @ X, dense @ X, X)
    y = rng.normal(size=M)
    close(A.H @ y, dense.T @ y, y)
    assert A.num_products == count + 4
    if not thoroughly:
        return

    K = int(rng.integers(0, 4))
    kinds: list[Any] = [np.float64, np.float32]
    kind = kinds[rng.integers(2)]
    Z = np.asfortranarray(rng.normal(size=(N, K)).astype(kind))
    Z.flags.writeable = bool(rng.integers(2))
    product = A @ Z
    assert product.dtype == np.result_type(np.dtype(case.dtype), kind)
    close(product, dense @ Z, Z, kind)
    x = rng.normal(size=N)
    for vector in (x, x[:, None]):
        close(A.matvec(vector), dense @ vector, x)
    close(y @ A, y @ dense, y)
    close(A.rmatvec(y), y @ dense, y)
    close(A.rmatmat(np.stack([y, -y], 1)), dense.T @ np.stack([y, -y], 1), y * 2)
    whole = rng.integers(-2, 3, N)
    close(A @ whole, dense @ whole, whole)
    tensor = torch.from_numpy(X.astype(kind))
    product = A @ tensor
    assert product.dtype == tensor.dtype
    close(product.numpy(), dense @ tensor.numpy(), X, kind)
    close((A.T @ torch.from_numpy(y)).numpy(), dense.T @ y, y)

    blocks(case, A, dense, names, rng, close)
    for own in (A, A.H):
        entries = dense if own is A else dense.T
        rows, columns = indices(rng, own.shape[0]), indices(rng, own.shape[1])
        part = own.submatrix(rows, columns)
        expected = entries[np_indices(rows), :][:, np_indices(columns)]
        assert part.shape == expected.shape
        v = rng.normal(size=(expected.shape[1], 2))
        close(part @ v, expected @ v, v * len(v))  # a column that repeats adds
        w = rng.normal(size=expected.shape[0])
        close(part.rmatvec(w), expected.T @ w, w * len(w))

    if case.matrix != "Jacobian":
        close(A.damped(0.5) @ x, dense @ x + 0.5 * x, x)
        gradient, loss = A.gradient_and_loss()
        expected = oracle.gradient().numpy()[cols]
        wanted = float(oracle.loss().detach())
        size = max(float(np.linalg.norm(oracle.gradient().numpy())), 1.0)
        assert np.linalg.norm(gradient - expected) <= (rtol + FLOAT32 * (case.dtype == "float32")) * size
        assert abs(loss - wanted) <= rtol * max(abs(wanted), 1.0)
    if case.matrix in KINDS:
        diagonal(case, A, dense, close)


def accuracy(problem: Problem, oracle: Oracle, rng: np.random.Generator) -> float:
    direction = torch.from_numpy(rng.normal(size=oracle.size)) * oracle.moving
    product = oracle.hessian_times(direction)
    size = max(float(product.norm()), SMALL * float(direction.norm()))
    # Two routes in float64, so that the oracle itself is no single witness.
    assert float((product - oracle.hessian() @ direction).norm()) <= FLOAT64 * size
    if problem.case.model_dtype == "float64":
        return FLOAT64
    error = float((oracle.hessian_times(direction, torch.float32) - product).norm())
    return FLOAT32 + 20 * error / size


def blocks(case: Case, A: Any, dense: np.ndarray, names: list[str], rng: np.random.Generator, close: Any) -> None:
    def some() -> list[str]:
        return [str(name) for name in rng.permutation(names)[: rng.integers(1, len(names) + 1)]]

    def where(those: list[str]) -> np.ndarray:
        return np.concatenate([np.arange(A.shape[1])[A.params_slices[name]] for name in those])

    rows, cols = some(), some()
    if case.matrix == "Jacobian":
        block, expected = A.block(cols), dense[:, where(cols)]
    else:
        block, expected = A.block(rows, cols), dense[np.ix_(where(rows), where(cols))]
    v, w = rng.normal(size=(expected.shape[1], 2)), rng.normal(size=expected.shape[0])
    close(block @ v, expected @ v, v)
    close(block.H @ w, expected.T @ w, w)


def diagonal(case: Case, A: Any, dense: np.ndarray, close: Any) -> None:
    try:
        found = A.diagonal()
    except NotImplementedError:
        if not case.batch_statistics:  # which couple the examples
            raise
        return
    close(found, np.diagonal(dense), how=np.dtype(case.dtype).type)


def indices(rng: np.random.Generator, length: int) -> Any:
    """Any kind of index that NumPy takes for one axis, and tensors."""
    some = rng.integers(-length, length, rng.integers(0, 6))
    start, stop = sorted(int(end) for end in rng.integers(-length, length + 1, 2))
    kinds = [
        some,
        some.tolist(),
        torch.from_numpy(some),
        rng.random(length) < 0.5,
        torch.from_numpy(rng.random(length) < 0.3),
        slice(start, stop, int(rng.integers(1, 3))),
        slice(None, None, -1),
        slice(None),
        range(0, length, 2),
        [],
        np.repeat(some, 2),
    ]
    return kinds[rng.integers(len(kinds))]


def np_indices(idxs: Any) -> Any:
    if isinstance(idxs, slice):
        return idxs
    array = idxs.numpy() if isinstance(idxs, Tensor) else np.asarray(idxs)
    return array if array.dtype == bool else array.astype(np.intp)
