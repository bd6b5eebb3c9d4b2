"""Fingerprints: equal for the same problem in every process; otherwise the differing parts are named."""

from __future__ import annotations

import copy
import functools
import json
import os
import subprocess
import sys
from collections import UserDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cases import CLASS_WEIGHTS, LOSSES, Problem, classes, inputs, loss_problem, mlp, seeded
from scipy.sparse import coo_array, csr_array, eye_array
from scipy.sparse.linalg import LinearOperator, aslinearoperator
from torch import Tensor, nn
from torch.nn import functional as F

from curvop import (
    EFLinearOperator,
    FisherLinearOperator,
    GGNLinearOperator,
    GradientCovarianceLinearOperator,
    HessianLinearOperator,
    JacobianLinearOperator,
)
from curvop.kernels.objective_fingerprint import digest
from curvop.storage.fingerprint import differing, fingerprint, listed, state

decay = 0.5


def hessian(problem: Problem, **options: Any) -> HessianLinearOperator:
    return HessianLinearOperator(problem.model, problem.loss_function, problem.params, problem.data, **options)


def changed(problem: Problem, other: Problem) -> list[str]:
    return differing(fingerprint(hessian(problem)), fingerprint(hessian(other)))


def regularized(params: dict[str, Tensor], batch: Any) -> Tensor:
    return F.mse_loss(batch[0] @ params["w"], batch[1]) + decay * squares(params)


def squares(params: dict[str, Tensor]) -> Tensor:
    return sum(value.square().sum() for value in params.values())


def objective_hessian(objective: Any = regularized, **options: Any) -> HessianLinearOperator:
    X = torch.arange(6.0).reshape(3, 2)
    w = torch.ones(2, 1, requires_grad=True)
    return HessianLinearOperator.from_objective(objective, {"w": w}, [(X, X.sum(1, keepdim=True))], **options)


def opaque(M: np.ndarray) -> LinearOperator:
    """Return an operator that only provides products."""
    return LinearOperator(M.shape, matvec=lambda x: M @ x, matmat=lambda X: M @ X, dtype=M.dtype)


def several() -> dict[str, LinearOperator]:
    """Return operators of every kind, with functions, sets and closures in them."""
    problem = loss_problem("f-partial")
    arguments = problem.model, problem.loss_function, problem.params, problem.data
    power, names = 3, frozenset({"a", "b", "c", "d"})

    def loss(prediction: Tensor, y: Tensor) -> Tensor:
        return (prediction.square() ** power).mean() * len(names)

    A = hessian(loss_problem("mse"))
    return {
        "hessian": A,
        "ggn": GGNLinearOperator(*arguments),
        "ef": EFLinearOperator(*arguments),
        "covariance": GradientCovarianceLinearOperator(*arguments),
        "fisher": FisherLinearOperator(*arguments, mc_samples=2, rng=0),
        "jacobian": JacobianLinearOperator(problem.model, problem.params, problem.data),
        "closure": HessianLinearOperator(problem.model, loss, *arguments[2:]),
        "lambda": HessianLinearOperator(problem.model, lambda z, y: (z**power).mean(), *arguments[2:]),
        "objective": objective_hessian(),
        "composite": 2 * A.damped(0.5) + A.submatrix(slice(None)) @ A,
        "matrix": aslinearoperator(np.vander(np.arange(1.0, 5.0))),
    }


class TestTheSameProblem:
    @pytest.mark.slow
    def test_in_another_process(self) -> None:
        """Another process has different string hashes and object addresses."""
        here = {name: fingerprint(A) for name, A in several().items()}
        script = (
            "import json, test_fingerprint as t; "
            "print(json.dumps({name: t.fingerprint(A) for name, A in t.several().items()}))"
        )
        run = subprocess.run(
            [sys.executable, "-c", script],
            env=os.environ
            | {"PYTHONHASHSEED": "77", "PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[1]), *sys.path])},
            cwd=Path(__file__).parent,
            capture_output=True,
            check=True,
        )
        assert json.loads(run.stdout) == here

    def test_different_operators_differ(self) -> None:
        found = [json.dumps(fingerprint(A)) for A in several().values()]
        assert len(set(found)) == len(found)

    @pytest.mark.parametrize("name", LOSSES)
    def test_every_loss(self, name) -> None:
        assert changed(loss_problem(name), loss_problem(name)) == []
        other = loss_problem("mse" if name != "mse" else "l1")
        assert "loss_function" in changed(loss_problem(name), other)

    def test_products_and_engine_settings_change_nothing(self) -> None:
        A = hessian(loss_problem("ce"))
        before, token = fingerprint(A), state(A)
        A @ np.eye(43)
        assert fingerprint(A) == before
        assert state(A) == token
        for options in ({"cache": 0}, {"columns": 1}, {"engine": "compiled"}):
            assert fingerprint(hessian(loss_problem("ce"), **options)) == before

    @pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
    def test_on_a_gpu(self) -> None:
        problem = loss_problem("ce-weights")
        before = fingerprint(hessian(problem))
        problem.model.cuda()
        problem.loss_function.cuda()
        assert fingerprint(hessian(problem)) == before


class TestChanges:
    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
    def test_parameters(self, dtype) -> None:
        problem, other = loss_problem("ce"), loss_problem("ce")
        for one in (problem, other):
            one.model.to(dtype)
        other.params["0.bias"].data[1] *= 1 + 2 * torch.finfo(dtype).eps
        other.params["2.weight"].data[0] = other.params["2.weight"].data[0].flip(0)
        assert changed(problem, other) == ["params['0.bias']", "params['2.weight']"]

    def test_the_rest_of_the_model(self) -> None:
        problem, other = loss_problem("ce"), loss_problem("ce")
        problem.params = {"2.bias": problem.model[2].bias}
        other.params = {"2.bias": other.model[2].bias}
        assert changed(problem, other) == []
        other.model[0].weight.data[0] += 1
        assert changed(problem, other) == ["model['0.weight']"]

    def test_buffers_settings_layers_hooks(self) -> None:
        def model(momentum: float = 0.1) -> nn.Module:
            with torch.random.fork_rng():
                torch.manual_seed(0)
                return nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3, momentum=momentum), nn.Tanh()).double().eval()

        def against(other: nn.Module) -> list[str]:
            problem = loss_problem("mse")
            return changed(*(Problem(one, problem.loss_function, problem.data) for one in (model(), other)))

        assert against(model()) == []
        other = model()
        other[1].running_mean += 1
        assert against(other) == ["model['1.running_mean']"]
        assert against(model().train()) == ["model"]
        assert against(model(momentum=0.2)) == ["model"]
        other = model()
        other[2] = nn.Sigmoid()
        assert against(other) == ["model"]
        other = model()
        other[2].register_forward_hook(lambda part, X, out: 2 * out)
        assert against(other) == ["model"]

    def test_the_code_of_a_model(self) -> None:
        class Doubled(nn.Sequential):
            def forward(self, X: Tensor) -> Tensor:
                return 2 * super().forward(X)

        class Tripled(nn.Sequential):
            def forward(self, X: Tensor) -> Tensor:
                return 3 * super().forward(X)

        Tripled.__qualname__ = Doubled.__qualname__
        problem = loss_problem("mse")
        one, two = (Problem(kind(*problem.model), problem.loss_function, problem.data) for kind in (Doubled, Tripled))
        assert changed(one, one) == []
        assert changed(one, two) == ["model"]

    def test_loss_functions_and_weights(self) -> None:
        problem = loss_problem("ce-weights")
        for loss in (
            nn.CrossEntropyLoss(CLASS_WEIGHTS + 1e-9),
            nn.CrossEntropyLoss(CLASS_WEIGHTS, label_smoothing=0.1),
            functools.partial(F.cross_entropy, weight=CLASS_WEIGHTS),
        ):
            assert changed(problem, Problem(problem.model, loss, problem.data)) == ["loss_function"]
        A, B = hessian(problem), hessian(problem, batch_weight=lambda batch: 1.0)
        assert differing(fingerprint(A), fingerprint(B)) == ["batch_weight"]

    def test_batches(self) -> None:
        problem, other = loss_problem("ce", "singles"), loss_problem("ce", "singles")
        other.data[3][0][0, 1] += 1e-13
        other.data[5][1][0] = (other.data[5][1][0] + 1) % 3
        assert changed(problem, other) == ["data, batch 3", "data, batch 5"]
        assert changed(problem, Problem(problem.model, problem.loss_function, problem.data[:-1])) == ["data, batch 8"]
        assert changed(loss_problem("ce"), loss_problem("ce", "one")) == ["data, batch 0", "data, batch 1"]

    def test_functions_that_refer_to_more(self, monkeypatch) -> None:
        before = fingerprint(objective_hessian())
        assert fingerprint(objective_hessian()) == before
        monkeypatch.setitem(globals(), "decay", 0.25)
        assert differing(before, fingerprint(objective_hessian())) == ["objective"]
        monkeypatch.setitem(globals(), "decay", 0.5)
        assert fingerprint(objective_hessian()) == before

        def squares(params: Any) -> Tensor:
            return sum(value.abs().sum() for value in params.values())

        monkeypatch.setitem(globals(), "squares", squares)
        assert differing(before, fingerprint(objective_hessian())) == ["objective"]

    def test_blocks_and_composites(self) -> None:
        A = hessian(loss_problem("ce"))
        full = fingerprint(A)
        assert differing(full, fingerprint(A.block(["2.bias", "0.weight", "2.weight", "0.bias"]))) == ["rows", "cols"]
        B = A.block("0.bias", "2.bias")
        assert differing(fingerprint(B), fingerprint(B.H)) == ["shape", "rows", "cols"]
        D = fingerprint(A.damped(0.5))
        assert differing(D, fingerprint(A.damped(0.25))) == ["value of term 2"]
        S = fingerprint(A.submatrix([1, 2]))
        assert differing(S, fingerprint(A.submatrix([2, 1]))) == ["value of term 2", "value of term 3"]
        changed = loss_problem("ce")
        changed.params["0.bias"].data += 1
        again = 2 * hessian(changed).damped(0.5)
        assert differing(fingerprint(2 * A.damped(0.5)), fingerprint(again)) == ["params['0.bias'] of term 1 of term 1"]


class TestOtherOperators:
    def test_products_are_compared_up_to_rounding(self) -> None:
        M = np.random.default_rng(0).standard_normal((50, 30))
        before = fingerprint(opaque(M))
        assert set(before) == {"operator", "shape", "dtype", "product"}
        assert differing(before, fingerprint(opaque(M * (1 + 1e-6)))) == []
        assert differing(before, fingerprint(opaque(M * (1 + 1e-3)))) == ["product"]
        assert differing(before, fingerprint(opaque(M[:, ::-1]))) == ["product"]
        assert differing(before, fingerprint(opaque(M.T))) == ["shape", "product"]

    @pytest.mark.parametrize("kind", [np.array, csr_array, coo_array])
    def test_matrices_are_compared_entry_by_entry(self, kind) -> None:
        M = np.diag(np.arange(1.0, 6.0))
        before = fingerprint(aslinearoperator(kind(M)))
        assert differing(before, fingerprint(aslinearoperator(kind(M.copy())))) == []
        M[2, 2] += 1e-12
        assert differing(before, fingerprint(aslinearoperator(kind(M)))) == ["matrix"]

    def test_their_composites(self) -> None:
        I = aslinearoperator(eye_array(3))  # noqa: E741
        before = fingerprint(2 * I)
        assert differing(before, fingerprint(2 * I)) == []
        assert differing(before, fingerprint(3 * I)) == ["value of term 2"]
        assert fingerprint(I**2) != fingerprint(I**3)

    def test_complex_empty_and_zero_ones(self) -> None:
        for M in (np.full((2, 3), 1j), np.zeros((3, 3)), np.zeros((0, 3)), np.ones((3, 3), np.float32)):
            for A in (aslinearoperator(M), opaque(M)):
                assert differing(fingerprint(A), fingerprint(copy.copy(A))) == []
        one, two = fingerprint(opaque(np.ones((2, 2)) * 1j)), fingerprint(opaque(np.ones((2, 2))))
        assert differing(one, two) == ["dtype", "product"]

    def test_user_defined_operators(self) -> None:
        class Own(LinearOperator):
            args = ("something", "else")

            def _matvec(self, x: Any) -> Any:
                return 2 * x

        A = Own(np.float64, (3, 3))
        assert fingerprint(A)["operator"] == "Own"
        assert state(A) == ()
        with pytest.raises(TypeError, match="not a LinearOperator"):
            fingerprint(np.eye(3))


class TestState:
    def test_it_changes_if_model_or_data_are_modified(self) -> None:
        problem = loss_problem("ce")
        A = hessian(problem)
        B = 2 * A.damped(0.5) + A.submatrix(slice(None))
        for write in (
            lambda: problem.params["0.bias"].data.add_(1),
            lambda: problem.model.train(),
            lambda: problem.data[0][0].add_(1),
            lambda: problem.data.append(problem.data[0]),
            lambda: setattr(problem.loss_function, "label_smoothing", 0.1),
        ):
            before = state(B)
            assert state(B) == before
            write()
            assert state(B) != before


class TestDigests:
    @seeded
    def test_trees(self) -> None:
        trees = [inputs(kind) for kind in ("dict", "namedtuple", "nested")]
        trees += [classes(), classes().int(), classes().double(), torch.tensor(1.0), torch.tensor([1.0]), None, 1, 1.0]
        trees += [True, "1", b"1", (), [], [()], {}, {1: 2}, {2: 1}, {1, 2}, np.ones(3), np.float32(1), F.relu, F.gelu]
        trees += [torch.eye(3).to_sparse(), torch.eye(3), torch.eye(3)[:2], torch.eye(3) * 1j, mlp(), mlp().eval()]
        trees += [torch.ones(3, device="meta"), torch.float32, torch.device("cpu"), nn.Tanh, functools.partial(F.relu)]
        found = [digest(tree) for tree in trees]
        assert len(set(found)) == len(found)
        assert found == [digest(copy.deepcopy(tree)) for tree in trees]
        assert digest({"a": inputs("dict")["a"]}) != digest({"b": inputs("dict")["a"]})
        assert digest(UserDict(a=1)) == digest({"a": 1})

    def test_cycles(self) -> None:
        cycle: list[Any] = [1]
        cycle.append(cycle)
        other: list[Any] = [2]
        other.append(other)
        assert digest(cycle) != digest(other)

        def recursive(n: int) -> int:
            return n and recursive(n - 1)

        assert digest(recursive) == digest(recursive)

    def test_methods_and_callable_objects(self) -> None:
        class Power:
            def __init__(self, power: int) -> None:
                self.power = power

            def __call__(self, x: Any) -> Any:
                return x**self.power

            def method(self, x: Any) -> Any:
                return x * self.power

        found = [digest(one) for power in (2, 3) for one in (Power(power), Power(power).method)]
        assert len(set(found)) == 4
        assert found[:2] == [digest(Power(2)), digest(Power(2).method)]


def test_names_in_a_sentence() -> None:
    assert listed(["a"]) == "a"
    assert listed(["a", "b"]) == "a and b"
    assert listed(list("abcde")) == "a, b, c, d and e"
    assert listed(list("abcdef")) == "a, b, c, d and 2 others"
