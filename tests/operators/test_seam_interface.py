"""Arguments that users pass and what they receive: parameters, parts of vectors, scalars, byte orders, keywords.

Products are compared with double backward through the user's module.
"""

from __future__ import annotations

import contextlib
import copy
import inspect
import warnings
from collections import OrderedDict, UserDict
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import scipy.sparse
import torch
from scipy.sparse.linalg import aslinearoperator
from torch import Tensor, nn

import curvop
from curvop import (
    EFLinearOperator,
    FisherLinearOperator,
    GGNLinearOperator,
    GradientCovarianceLinearOperator,
    HessianLinearOperator,
    JacobianLinearOperator,
    SubmatrixLinearOperator,
    TransposedJacobianLinearOperator,
)
from curvop.kernels.errors import explain_arrays

LOSS = nn.MSELoss()
MATRICES = [HessianLinearOperator, GGNLinearOperator, EFLinearOperator, GradientCovarianceLinearOperator]
ENGINES = ["autograd", pytest.param("compiled", marks=pytest.mark.nightly)]


@contextlib.contextmanager
def explained(batch: Any) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        explain_arrays(error, batch)
        raise


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()


def batches() -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [
        (
            torch.randn(size, 3, generator=generator, dtype=torch.float64),
            torch.randn(size, 2, generator=generator, dtype=torch.float64),
        )
        for size in (5, 2)
    ]


def by_hand(model: nn.Module, data: list[Any], names: list[str] | None = None) -> np.ndarray:
    """Return the Hessian of the loss of all data as one batch, by double backward through a copy of the module."""
    model = copy.deepcopy(model).requires_grad_(True)
    own = dict(model.named_parameters())
    params = [own[name] for name in names or own]
    X, y = (torch.cat(parts) for parts in zip(*data, strict=True))
    gradient = torch.autograd.grad(LOSS(model(X), y), params, create_graph=True)
    flat = torch.cat([part.reshape(-1) for part in gradient])
    rows = [torch.autograd.grad(entry, params, retain_graph=True, materialize_grads=True) for entry in flat]
    return torch.stack([torch.cat([part.reshape(-1) for part in row]) for row in rows]).numpy()


MODEL, DATA = network(), batches()
PARAMS = dict(MODEL.named_parameters())
P = sum(value.numel() for value in PARAMS.values())
DENSE = by_hand(MODEL, DATA)


def hessian(**options: Any) -> HessianLinearOperator:
    return HessianLinearOperator(MODEL, LOSS, PARAMS, DATA, **options)


H = hessian()
J = JacobianLinearOperator(MODEL, PARAMS, DATA)


def close(found: Any, expected: Any, rtol: float = 1e-12) -> None:
    np.testing.assert_allclose(found, expected, rtol=rtol, atol=1e-14)


def joined(parts: Any) -> np.ndarray:
    values = parts.values() if isinstance(parts, dict) else parts
    return torch.cat([part.reshape(-1) for part in values]).double().numpy()


def tangents(kind: Callable[..., Any] = list, dtype: torch.dtype = torch.float64) -> Any:
    generator = torch.Generator().manual_seed(2)
    drawn = {
        name: torch.randn(value.shape, generator=generator, dtype=torch.float64).to(dtype)
        for name, value in PARAMS.items()
    }
    return kind(drawn) if issubclass(kind, dict | UserDict) else kind(drawn.values())


class TestParams:
    @pytest.mark.parametrize("engine", ENGINES)
    def test_a_state_dict_without_buffers(self, engine: str) -> None:
        A = HessianLinearOperator(MODEL, LOSS, MODEL.state_dict(), DATA, engine=engine)
        close(A @ np.eye(P), DENSE)
        close(A.gradient_and_loss()[0], H.gradient_and_loss()[0])
        close(A.block("2.bias") @ np.eye(2), DENSE[-2:, -2:])

    def test_it_follows_the_module_s_own_values(self) -> None:
        model = network()
        A = HessianLinearOperator(model, LOSS, model.state_dict(), DATA)
        A @ np.ones(P)
        with torch.no_grad():
            model[0].weight.mul_(0.5)
        close(A @ np.eye(P), by_hand(model, DATA))

    def test_buffers_are_named(self) -> None:
        model = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2)).double().eval()
        with pytest.raises(ValueError, match=r"'1.running_mean'.*state_dict.*dict\(model.named_parameters\(\)\)"):
            HessianLinearOperator(model, LOSS, model.state_dict(), DATA)
        A = HessianLinearOperator(model, LOSS, dict(model.named_parameters()), DATA)
        close(A @ np.eye(12), by_hand(model, DATA), 1e-10)

    def test_a_tied_one_is_told_what_to_pass(self) -> None:
        model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
        model[1].weight = model[0].weight
        with pytest.raises(ValueError, match=r"'0.weight' and '1.weight' are one tied.*named_parameters"):
            HessianLinearOperator(model, LOSS, model.state_dict(), DATA)

    @pytest.mark.parametrize("engine", ENGINES)
    @pytest.mark.parametrize("given", ["dict", "list"])
    @pytest.mark.parametrize("frozen", [["0.weight"], list(PARAMS)])
    def test_they_need_not_require_grad(self, frozen: list[str], given: str, engine: str) -> None:
        model = network()
        own = dict(model.named_parameters())
        for name in frozen:
            own[name].requires_grad_(False)
        params = own if given == "dict" else list(own.values())
        A = HessianLinearOperator(model, LOSS, params, DATA, engine=engine)
        close(A @ np.eye(P), DENSE)
        close(A.block("0.weight", "2.weight") @ np.eye(8), DENSE[:12, 16:24])
        close(A[[0, -1], :] @ np.eye(P), DENSE[[0, -1]])
        close(A.gradient_and_loss()[0], H.gradient_and_loss()[0])
        close(
            GGNLinearOperator(model, LOSS, params, DATA) @ np.eye(P),
            GGNLinearOperator(MODEL, LOSS, PARAMS, DATA) @ np.eye(P),
        )
        close(JacobianLinearOperator(model, params, DATA) @ np.eye(P), J @ np.eye(P))
        assert curvop.check(A).ok
        assert [name for name, value in own.items() if not value.requires_grad] == frozen
        assert all(value.grad is None for value in own.values())

    def test_frozen_ones_of_layers_of_other_kinds(self) -> None:
        class Mixed(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.rnn = nn.LSTM(3, 3, batch_first=True)
                self.norm, self.out = nn.LayerNorm(3), nn.Linear(3, 2)

            def forward(self, X: Tensor) -> Tensor:
                return self.out(self.norm(self.rnn(X[:, None])[0][:, 0]))

        torch.manual_seed(3)
        model = Mixed().double()
        expected = by_hand(model, DATA)
        A = HessianLinearOperator(model.requires_grad_(False), LOSS, dict(model.named_parameters()), DATA)
        close(A @ np.eye(len(expected)), expected, 1e-9)

    def test_frozen_ones_with_gradient_checkpointing_are_an_error_with_a_remedy(self) -> None:
        class Checkpointed(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.layers = network()

            def forward(self, X: Tensor) -> Tensor:
                return torch.utils.checkpoint.checkpoint(self.layers, X, use_reentrant=False)

        model = Checkpointed().requires_grad_(False)
        A = HessianLinearOperator(model, LOSS, dict(model.named_parameters()), DATA)
        with pytest.raises(RuntimeError, match=r"which must require grad, or turn checkpointing off"):
            A @ np.ones(P)
        model.requires_grad_(True)
        close(HessianLinearOperator(model, LOSS, dict(model.named_parameters()), DATA) @ np.eye(P), DENSE)

    def test_what_torch_compile_has_made_is_refused_by_name(self) -> None:
        compiled = torch.compile(MODEL, backend="eager")
        for params in (dict(compiled.named_parameters()), PARAMS):
            with pytest.raises(TypeError, match=r"model is compiled by torch.compile: pass model\._orig_mod.*engine="):
                HessianLinearOperator(compiled, LOSS, params, DATA)
        with pytest.raises(TypeError, match="model is compiled"):
            JacobianLinearOperator(compiled, PARAMS, DATA)
        close(HessianLinearOperator(compiled._orig_mod, LOSS, PARAMS, DATA) @ np.eye(P), DENSE)

        in_place = network()
        in_place.compile(backend="eager")
        with pytest.raises(TypeError, match="model was compiled in place"):
            HessianLinearOperator(in_place, LOSS, dict(in_place.named_parameters()), DATA)
        for loss in (
            torch.compile(nn.CrossEntropyLoss(), backend="eager"),
            torch.compile(LOSS.forward, backend="eager"),
        ):
            with pytest.raises(TypeError, match="loss_function is compiled"):
                HessianLinearOperator(MODEL, loss, PARAMS, DATA)
        with pytest.raises(TypeError, match=r"objective is compiled by torch\.compile: pass the function"):
            HessianLinearOperator.from_objective(torch.compile(len_1, backend="eager"), PARAMS, DATA)

    def test_what_torch_compile_leaves_alone_is_taken(self) -> None:
        loss = torch.compiler.disable(lambda z, y: LOSS(z, y))
        close(HessianLinearOperator(MODEL, loss, PARAMS, DATA) @ np.eye(P), DENSE)


class TestArraysInBatches:
    @pytest.mark.parametrize(
        ("batch", "where"),
        [
            ((DATA[0][0].numpy(), DATA[0][1].numpy()), r"the batch\[0\]"),
            ((DATA[0][0], DATA[0][1].numpy()), r"the batch\[1\]"),
            (({"image": DATA[0][0].numpy()}, DATA[0][1]), r"the batch\[0\]\['image'\]"),
        ],
    )
    def test_a_failure_names_them_and_the_remedy(self, batch: Any, where: str) -> None:
        with pytest.raises(TypeError, match=rf"^{where} is a NumPy array.*torch\.from_numpy"), explained(batch):
            LOSS(MODEL(batch[0]), batch[1])

    def test_a_loss_of_arithmetic_fails_by_a_runtime_error(self) -> None:
        X, y = DATA[0][0], DATA[0][1].numpy()
        with (
            pytest.raises(TypeError, match=r"torch\.from_numpy.*RuntimeError: Can't call numpy"),
            explained((X, y)),
        ):
            ((MODEL(X) - y) ** 2).mean()

    def test_other_failures_keep_their_type(self) -> None:
        with pytest.raises(TypeError, match=r"^mine$"), explained(DATA[0]):
            raise TypeError("mine")
        with pytest.raises(ValueError, match=r"^mine$"), explained((np.ones(3), 1)):
            raise ValueError("mine")


class TestTensorsInParts:
    @pytest.mark.parametrize("kind", [list, tuple, dict, OrderedDict, UserDict])
    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
    def test_the_same_kind_comes_back(self, kind: Any, dtype: torch.dtype) -> None:
        x = tangents(kind, dtype)
        product = H @ x
        expected = dict if issubclass(kind, dict | UserDict) else kind
        assert type(product) is expected
        assert list(product) == list(PARAMS) if expected is dict else True
        parts = list(product.values()) if expected is dict else product
        for part, value in zip(parts, PARAMS.values(), strict=True):
            assert (part.shape, part.dtype, part.device) == (value.shape, dtype, value.device)
            assert not part.requires_grad
        close(
            joined(parts),
            DENSE @ joined(dict(x) if isinstance(x, UserDict) else x),
            1e-12 if dtype == torch.float64 else 1e-5,
        )

    def test_names_count_and_not_their_order(self) -> None:
        x = tangents(dict)
        product = H @ dict(reversed(x.items()))
        close(joined(product), DENSE @ joined(x))

    @pytest.mark.parametrize("matrix", MATRICES)
    def test_every_matrix_of_parameters(self, matrix: Any) -> None:
        A = matrix(MODEL, LOSS, PARAMS, DATA)
        dense, x = A @ np.eye(P), tangents()
        close(joined(A @ x), dense @ joined(x))
        close(joined(A.H @ x), dense @ joined(x))
        close(joined(x @ A), dense @ joined(x))
        close(joined(A.damped(0.3) @ x), dense @ joined(x) + 0.3 * joined(x))
        close(joined(A.damped(0.3) @ tangents(dict)), dense @ joined(x) + 0.3 * joined(x))

    def test_the_rows_of_a_rectangular_block(self) -> None:
        A, dense = H.block(["2.bias", "0.bias"], "2.weight"), DENSE[np.r_[24:26, 12:16]][:, 16:24]
        x = torch.linspace(-1, 1, 8, dtype=torch.float64).view(2, 4)
        product = A @ {"2.weight": x}
        assert {name: tuple(part.shape) for name, part in product.items()} == {"2.bias": (2,), "0.bias": (4,)}
        close(joined(product), dense @ joined([x]))
        [back] = A.H @ list(product.values())
        assert back.shape == (2, 4)
        close(joined([back]), dense.T @ joined(product))

    def test_a_jacobian_gives_one_vector_of_predictions(self) -> None:
        dense, x = J @ np.eye(P), tangents()
        for given in (x, tangents(dict)):
            product = J @ given
            assert isinstance(product, Tensor)
            close(product, dense @ joined(x))
        v = torch.linspace(0, 1, 14, dtype=torch.float64)
        assert isinstance(J.T @ v, Tensor)
        close(J.T @ v, dense.T @ v.numpy())
        with pytest.raises(TypeError, match="columns of A, a TransposedJacobianLinearOperator, are not whole param"):
            J.T @ x

    def test_gradients_of_a_backward_pass(self) -> None:
        model = network()
        A = HessianLinearOperator(model, LOSS, list(model.parameters()), DATA)
        X, y = (torch.cat(parts) for parts in zip(*DATA, strict=True))
        LOSS(model(X), y).backward()
        close(joined(A @ [value.grad for value in model.parameters()]), DENSE @ A.gradient_and_loss()[0])
        close(joined(A @ list(model.parameters())), DENSE @ joined([value.detach() for value in model.parameters()]))

    def test_numbers_are_still_numbers(self) -> None:
        weights = nn.Linear(3, 1, bias=False, dtype=torch.float64)
        A = HessianLinearOperator(
            weights, LOSS, dict(weights.named_parameters()), [(torch.eye(3).double(), torch.zeros(3, 1).double())]
        )
        for x in (
            [3.0, 0.0, 0.0],
            (3, 0, 0),
            [np.float32(3), 0, 0],
            [torch.tensor(3.0), torch.tensor(0.0)] * 1 + [0.0],
        ):
            product = A @ x
            assert type(product) is np.ndarray
            close(product, [2, 0, 0])
        [product] = A @ [torch.tensor([[3.0, 0.0, 0.0]])]
        close(product, [[2, 0, 0]])

    def test_parameters_that_are_numbers(self) -> None:
        params = {name: torch.tensor(value, dtype=torch.float64) for name, value in (("a", 1.0), ("b", 2.0))}
        A = HessianLinearOperator.from_objective(
            lambda p, batch: p["a"] ** 2 * p["b"], params, [None], batch_weight=len_1
        )
        product = A @ [torch.tensor(1.0).double(), torch.tensor(10.0).double()]
        assert [part.shape for part in product] == [(), ()]
        close(joined(product), np.array([[4.0, 2.0], [2.0, 0.0]]) @ [1.0, 10.0])

    def test_bad_ones(self) -> None:
        x = tangents()
        for bad, error, message in (
            (
                x[:3],
                ValueError,
                r"x holds 3 tensors, but A has 4 column parameters.*\(4, 3\), \(4,\), \(2, 4\), \(2,\)",
            ),
            ([*x[:3], x[1]], ValueError, r"x\[3\] has shape \(4,\), but parameter '2.bias' has shape \(2,\)"),
            ([part[..., None] for part in x], ValueError, r"x\[0\] has shape \(4, 3, 1\)"),
            ([*x[:3], None], TypeError, r"x\[3\] is a NoneType: pass a tensor of shape \(2,\)"),
            ([*x[:3], x[3].to_sparse()], TypeError, r"x\[3\] is a tensor that is torch.sparse_coo"),
            ([*x[:3], 1j * x[3]], TypeError, "but A is real"),
            ({"0.weight": x[0]}, ValueError, "x lacks '0.bias'"),
            (
                {**tangents(dict), "2.bais": x[3]},
                ValueError,
                "x: no parameter is named '2.bais'; did you mean '2.bias'",
            ),
            ({}, ValueError, "x lacks '0.weight'"),
        ):
            with pytest.raises(error, match=message):
                H @ bad
        for A in (H[:5, :], SubmatrixLinearOperator(aslinearoperator(DENSE), [0], slice(None))):
            with pytest.raises(TypeError, match="are not whole parameters"):
                A @ x


def len_1(batch: Any) -> float:
    return 1.0


class TestScalars:
    @pytest.mark.parametrize(
        "scalar",
        [
            torch.tensor(2.0),
            torch.tensor(2.0, dtype=torch.float64, requires_grad=True),
            torch.tensor(2.0, dtype=torch.bfloat16),
            torch.tensor(2),
            nn.Parameter(torch.tensor(2.0)),
            np.array(2.0),
            np.array(2, dtype=np.int8),
            np.array(2.0, dtype=">f4"),
            np.float32(2),
            np.int64(2),
            np.longdouble(2),
        ],
        ids=lambda scalar: f"{type(scalar).__name__}-{scalar.dtype}",
    )
    def test_they_scale(self, scalar: Any) -> None:
        for A, factor in ((scalar * H, 2.0), (H * scalar, 2.0), (H / scalar, 0.5), (H.dot(scalar), 2.0)):
            assert type(A.args[1]) in (float, int)
            assert A.dtype == np.float64
            close(A @ np.eye(P), factor * DENSE)
        close((scalar * J) @ np.eye(P), 2 * (J @ np.eye(P)))
        close((H[:3, :] * scalar) @ np.eye(P), 2 * DENSE[:3])
        for call in (lambda: H @ scalar, lambda: scalar @ H):
            with pytest.raises(ValueError, match=r"Scalar operands are not allowed|does not have enough dimensions"):
                call()

    def test_complex_ones(self) -> None:
        for scalar in (torch.tensor(2j), np.array(2j), np.clongdouble(2j)):
            A = scalar * H
            assert type(A.args[1]) is complex
            close(A @ np.ones(P), 2j * DENSE @ np.ones(P))

    @pytest.mark.parametrize("other", [torch.ones(1), np.ones(1), np.array("a"), np.array(None)])
    def test_what_is_no_number_does_not(self, other: Any) -> None:
        for call in (lambda: other * H, lambda: H * other, lambda: H / other):
            with pytest.raises((ValueError, TypeError)):
                call()


class TestSums:
    @pytest.mark.parametrize(
        "other",
        [
            *(np.eye(P), np.eye(P).tolist(), torch.eye(P), scipy.sparse.eye_array(P).tocsr(), scipy.sparse.identity(P)),
            *(1.0, 0, np.float64(1), np.array(1.0), torch.tensor(1.0), np.ones(P)),
        ],
        ids=lambda other: type(other).__name__,
    )
    def test_what_is_no_operator_is_told_damped(self, other: Any) -> None:
        for A in (H, H.damped(1.0), H.block("0.bias")):
            for call in (lambda A=A: A + other, lambda A=A: other + A, lambda A=A: A - other, lambda A=A: other - A):
                with pytest.raises(TypeError, match=r"A\.damped\(lam\) for A \+ lam \* I"):
                    call()
        with pytest.raises(TypeError, match="aslinearoperator") as error:
            J + other
        assert "damped" not in str(error.value)

    def test_operators_are_added(self) -> None:
        close((H + aslinearoperator(np.eye(P))) @ np.eye(P), DENSE + np.eye(P))
        close((H - aslinearoperator(np.eye(P))) @ np.eye(P), DENSE - np.eye(P))
        close((aslinearoperator(np.eye(P)) + H) @ np.eye(P), DENSE + np.eye(P))
        close((H + H) @ np.eye(P), 2 * DENSE)

    def test_other_kinds_have_their_say(self) -> None:
        class Greedy:
            def __radd__(self, other: Any) -> str:
                return "mine"

        assert H + Greedy() == "mine"
        with pytest.raises(TypeError, match="unsupported operand"):
            H + None


DTYPES = [">f8", ">f4", ">f2", ">i4", ">u2", "<f4", np.longdouble, np.float16, bool]


class TestOrdersOfBytes:
    def operators(self) -> dict[str, tuple[Any, np.ndarray]]:
        covariance = GradientCovarianceLinearOperator(MODEL, LOSS, PARAMS, DATA)
        rows, cols = [3, 0, 3], [1, 1, -1]
        return {
            "Hessian": (H, DENSE),
            "damped": (H.damped(0.5), DENSE + 0.5 * np.eye(P)),
            "block": (H.block("0.bias", "2.weight"), DENSE[12:16, 16:24]),
            "covariance": (covariance, covariance @ np.eye(P)),
            "Jacobian": (J, J @ np.eye(P)),
            "transposed": (J.T, (J @ np.eye(P)).T),
            "submatrix": (H[rows, :][:, cols], DENSE[rows][:, cols]),
            "sum": (H + 2 * H, 3 * DENSE),
        }

    @pytest.mark.default_cases("Hessian-*", "submatrix-*")
    @pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: np.dtype(dtype).str)
    @pytest.mark.parametrize(
        "name", ["Hessian", "damped", "block", "covariance", "Jacobian", "transposed", "submatrix", "sum"]
    )
    def test_every_operator_takes_them(self, name: str, dtype: Any) -> None:
        A, dense = self.operators()[name]
        for B, matrix in ((A, dense), (A.H, dense.T)):
            X = (np.arange(2 * B.shape[1]).reshape(-1, 2) % 7).astype(dtype)
            expected = matrix @ X.astype(np.float64)
            for found, wanted in (
                (B @ X, expected),
                (B.matmat(X), expected),
                (B.matvec(X[:, 0]), expected[:, 0]),
                (B @ X[:, :1], expected[:, :1]),
                (X.T @ B.H, expected.T),
                (B.H.rmatvec(X[:, 1]), expected[:, 1]),
            ):
                assert found.dtype == np.float64
                assert found.dtype.isnative
                close(found, wanted)
            assert (B @ X[:, :0]).dtype == np.float64

    @pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: np.dtype(dtype).str)
    def test_so_do_ravel_and_unravel(self, dtype: Any) -> None:
        vector = (np.arange(P) % 2).astype(dtype)
        parts = H.unravel(vector)
        assert all(part.dtype == torch.float64 for part in parts.values())
        close(H.ravel({name: part.numpy().astype(dtype) for name, part in parts.items()}), vector.astype(np.float64))

    def test_a_scipy_operator_s_submatrix_keeps_its_own_precision(self) -> None:
        A = SubmatrixLinearOperator(aslinearoperator(DENSE.astype(np.longdouble)), [0, 1], slice(None))
        assert (A @ np.ones(P, ">f8")).dtype == np.longdouble

    @pytest.mark.parametrize("dtype", [">c16", np.complex64, np.clongdouble])
    def test_imaginary_parts_are_refused_and_never_dropped(self, dtype: Any) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            for A in (
                H,
                H.damped(1.0),
                J,
                J.T,
                H[:, [0, 0]],
                GradientCovarianceLinearOperator(MODEL, LOSS, PARAMS, DATA),
            ):
                for shape in ((A.shape[1],), (A.shape[1], 2)):
                    with pytest.raises(TypeError, match="but A is real"):
                        A @ np.ones(shape, dtype)
            with pytest.raises(TypeError, match="but A is real"):
                J @ torch.ones(P, dtype=torch.complex64)
            with pytest.raises(TypeError, match="vector is complex"):
                H.unravel(np.ones(P, dtype))
            with pytest.raises(TypeError, match=r"params\['2.bias'\] is complex"):
                H.ravel({**PARAMS, "2.bias": np.ones(2, dtype)})


CONSTRUCTORS = {
    **{matrix.__name__: (matrix, (MODEL, LOSS, PARAMS, DATA)) for matrix in (*MATRICES, FisherLinearOperator)},
    **{
        matrix.__name__: (matrix, (MODEL, PARAMS, DATA))
        for matrix in (JacobianLinearOperator, TransposedJacobianLinearOperator)
    },
    "HessianLinearOperator.from_objective": (HessianLinearOperator.from_objective, (len_1, PARAMS, DATA)),
}


class TestKeywords:
    @pytest.mark.parametrize("name", CONSTRUCTORS)
    @pytest.mark.parametrize(
        ("keyword", "remedy"),
        [
            ("batch_size_fn", r"pass batch_weight=|nothing is weighted"),
            ("check_deterministic", r"products check this.*curvop\.check\(A\)"),
            ("block_sizes", r"A\.block\(names\).*A\.blocks\(\)"),
            ("progressbar", "pass progress="),
            ("num_data", "leave it out.*divisor"),
            ("num_per_example_loss_terms", "leave it out.*divisor"),
            ("seed", r"pass rng=|FisherLinearOperator\(.*rng=\)"),
            ("progres", r"did you mean progress=\?"),
            ("engin", r"did you mean engine=\?"),
            ("zzz", "known are .*cache"),
        ],
    )
    def test_the_class_and_the_remedy_are_named(self, name: str, keyword: str, remedy: str) -> None:
        construct, args = CONSTRUCTORS[name]
        with pytest.raises(TypeError, match=rf"^{name} got an unexpected keyword argument '{keyword}': .*({remedy})"):
            construct(*args, **{keyword: None})

    @pytest.mark.parametrize("matrix", [GGNLinearOperator, EFLinearOperator, HessianLinearOperator])
    def test_samples_are_those_of_a_fisher_matrix(self, matrix: Any) -> None:
        with pytest.raises(TypeError, match=r"'mc_samples': use FisherLinearOperator\("):
            matrix(MODEL, LOSS, PARAMS, DATA, mc_samples=1)
        FisherLinearOperator(MODEL, LOSS, PARAMS, DATA, mc_samples=1, rng=0)

    def test_a_user_s_subclass_is_named_by_its_own_name(self) -> None:
        class Mine(HessianLinearOperator):
            pass

        with pytest.raises(TypeError, match=r"^Mine got an unexpected keyword argument 'num_data'"):
            Mine(MODEL, LOSS, PARAMS, DATA, num_data=3)
        with pytest.raises(TypeError, match=r"^Mine\.from_objective got an unexpected"):
            Mine.from_objective(len_1, PARAMS, DATA, num_data=3)
        with pytest.raises(TypeError, match=r"^Mine: missing a required argument: 'data'"):
            Mine(MODEL, LOSS, PARAMS)

    def test_signatures_stay(self) -> None:
        names = ["model", "loss_function", "params", "data", "dtype", "cache", "engine", "columns", "batch_weight"]
        assert list(inspect.signature(HessianLinearOperator).parameters) == [*names, "progress"]
        assert inspect.signature(GGNLinearOperator).parameters["cache"].default == "auto"
        assert list(inspect.signature(HessianLinearOperator.from_objective).parameters)[:2] == ["objective", "params"]
        assert list(inspect.signature(JacobianLinearOperator).parameters)[:3] == ["model", "params", "data"]
