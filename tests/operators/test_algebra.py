"""Sums, multiples, products, adjoints, damped, diagonal and block-diagonal operators, against dense arithmetic."""

from __future__ import annotations

import copy
import pickle
import warnings
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.sparse.linalg import LinearOperator, aslinearoperator, cg, eigsh
from torch import nn

import curvop
from curvop import (
    BlockDiagonalLinearOperator,
    DampedLinearOperator,
    DiagonalLinearOperator,
    EFLinearOperator,
    GGNLinearOperator,
    GradientCovarianceLinearOperator,
    HessianLinearOperator,
    JacobianLinearOperator,
    JournaledLinearOperator,
    SubmatrixLinearOperator,
)
from curvop.spectrum.lanczos import product_dtype

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"))]

torch.manual_seed(0)
MODEL = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
LOSS = nn.CrossEntropyLoss()
X, Y = torch.randn(9, 3, dtype=torch.float64), torch.randint(2, (9,))
DATA = [(X[:6], Y[:6]), (X[6:], Y[6:])]
PARAMS = dict(MODEL.named_parameters())
NAMES = list(PARAMS)
P, OUTPUTS = sum(value.numel() for value in PARAMS.values()), 18
H, G, E = (kind(MODEL, LOSS, PARAMS, DATA) for kind in (HessianLinearOperator, GGNLinearOperator, EFLinearOperator))
J = JacobianLinearOperator(MODEL, PARAMS, DATA)


def oracle() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the Hessian, the GGN and the Jacobian by torch.func, of the user's own module."""
    flat = torch.cat([value.detach().reshape(-1) for value in PARAMS.values()])

    def predict(vector: torch.Tensor) -> torch.Tensor:
        parts = vector.split([value.numel() for value in PARAMS.values()])
        named = {name: part.view(PARAMS[name].shape) for name, part in zip(NAMES, parts, strict=True)}
        return torch.func.functional_call(MODEL, named, (X,))

    jacobian = torch.autograd.functional.jacobian(predict, flat)
    hessian = torch.autograd.functional.hessian(lambda vector: LOSS(predict(vector), Y), flat)
    p = predict(flat).softmax(-1).detach()
    inner = (torch.diag_embed(p) - p[:, :, None] * p[:, None, :]) / len(X)
    ggn = torch.einsum("nap,nab,nbq->pq", jacobian, inner, jacobian)
    return hessian.numpy(), ggn.numpy(), jacobian.reshape(-1, P).numpy()


HESSIAN, GGN, JACOBIAN = oracle()
D_VALUES = np.random.default_rng(0).normal(size=P)
D = DiagonalLinearOperator(D_VALUES)
SQUARE = np.random.default_rng(1).normal(size=(P, P))
SLICES = H.params_slices


def positions(names: str | list[str]) -> np.ndarray:
    return np.concatenate([np.arange(P)[SLICES[name]] for name in ([names] if isinstance(names, str) else names)])


def close(found: Any, expected: np.ndarray, scale: float = 1.0) -> None:
    size = max(1.0, float(np.abs(expected).max(initial=0.0))) * scale
    np.testing.assert_allclose(np.asarray(found), expected, rtol=1e-11, atol=1e-12 * size)


def check_products(A: LinearOperator, dense: np.ndarray, scale: float = 1.0) -> None:
    """Compare all kinds of products with those of a dense matrix: arrays, tensors, columns, adjoints."""
    rng = np.random.default_rng(2)
    for B, matrix in ((A, dense), (A.H, dense.conj().T), (A.T, dense.T)):
        assert B.shape == matrix.shape
        block = rng.normal(size=(matrix.shape[1], 3))
        close(B @ block, matrix @ block, scale)
        close(B @ block[:, 0], matrix @ block[:, 0], scale)
        close(B @ block[:, :1], matrix @ block[:, :1], scale)
        assert (B @ block[:, :0]).shape == (matrix.shape[0], 0)
        tensor = B @ torch.from_numpy(block)
        assert isinstance(tensor, torch.Tensor)
        close(tensor.numpy(), matrix @ block, scale)
    u, v = rng.normal(size=dense.shape[0]), rng.normal(size=dense.shape[1])
    assert abs(u @ (A @ v) - (A.T @ u) @ v) <= 1e-11 * scale * (1 + np.abs(dense).sum())
    if A.is_symmetric:
        close(dense, dense.T, scale)
        assert A.H is A
        assert A.T is A


def check_parts(A: LinearOperator, dense: np.ndarray, scale: float = 1.0) -> None:
    """Compare blocks, submatrices and the block diagonal of an operator over all parameters with those of a matrix."""
    for rows, cols in (("2.weight", None), (["2.bias", "0.weight"], None), (["0.bias", "2.bias"], ["2.bias"])):
        block = A.block(rows) if cols is None else A.block(rows, cols)
        part = dense[np.ix_(positions(rows), positions(rows if cols is None else cols))]
        close(block @ np.eye(block.shape[1]), part, scale)
        if cols is None:
            assert block.is_symmetric == A.is_symmetric
            assert list(block.params_slices) == ([rows] if isinstance(rows, str) else rows)
            close(block.block(rows if isinstance(rows, str) else rows[0]).to_dense()[:2, :2], part[:2, :2], scale)
    rows, cols = [P - 1, 0, 5, 5], [3, 3, 13]
    close(A[rows, :][:, cols] @ np.eye(3), dense[rows][:, cols], scale)
    close(A[2:7, :] @ np.eye(P), dense[2:7], scale)
    blocks = list(A.blocks())
    close(blocks[1].to_dense(), dense[SLICES["0.bias"], SLICES["0.bias"]], scale)
    layers = A.block_diagonal("layers")
    expected = np.zeros((P, P))
    for names in (NAMES[:2], NAMES[2:]):
        where = np.ix_(positions(names), positions(names))
        expected[where] = dense[where]
    check_products(layers, expected, scale)
    vector = np.arange(P) / P
    assert np.array_equal(A.ravel(A.unravel(vector)), vector)
    product = A @ {name: torch.ones_like(value) for name, value in PARAMS.items()}
    close(torch.cat([part.reshape(-1) for part in product.values()]), dense @ np.ones(P), scale)


EXPRESSIONS: dict[str, tuple[Callable[[], LinearOperator], np.ndarray, bool]] = {
    "H + G": (lambda: H + G, HESSIAN + GGN, True),
    "H - 0.5 G": (lambda: H - 0.5 * G, HESSIAN - GGN / 2, True),
    "H + 0.1 G + damping": (lambda: (H + 0.1 * G).damped(0.3), HESSIAN + GGN / 10 + 0.3 * np.eye(P), True),
    "-H / 2": (lambda: -H / 2, -HESSIAN / 2, True),
    "tensor * H": (lambda: torch.tensor(2.0) * H, 2 * HESSIAN, True),
    "H * numpy": (lambda: H * np.float32(2), 2 * HESSIAN, True),
    "H @ G": (lambda: H @ G, HESSIAN @ GGN, False),
    "H @ G + G @ H": (lambda: H @ G + G @ H, HESSIAN @ GGN + GGN @ HESSIAN, True),
    "H ** 3": (lambda: H**3, HESSIAN @ HESSIAN @ HESSIAN, True),
    "H ** 0": (lambda: H**0, np.eye(P), True),
    "D @ H @ D": (lambda: D @ H @ D, D_VALUES[:, None] * HESSIAN * D_VALUES, True),
    "scaled D @ H @ D": (lambda: 0.5 * D @ H @ D * 3, 1.5 * D_VALUES[:, None] * HESSIAN * D_VALUES, True),
    "D @ H": (lambda: D @ H, D_VALUES[:, None] * HESSIAN, False),
    "D + H": (lambda: D + H, np.diag(D_VALUES) + HESSIAN, True),
    "J.T @ J": (lambda: J.T @ J, JACOBIAN.T @ JACOBIAN, True),
    "J.T @ J + H": (lambda: J.T @ J + H, JACOBIAN.T @ JACOBIAN + HESSIAN, True),
    "damped product": (lambda: (J.T @ J).damped(0.5).damped(0.5), JACOBIAN.T @ JACOBIAN + np.eye(P), True),
    "D @ (J.T @ J) @ D": (
        lambda: D @ (J.T @ J) @ D,
        D_VALUES[:, None] * (JACOBIAN.T @ JACOBIAN) * D_VALUES,
        True,
    ),
    "A + A.T": (lambda: D @ H + (D @ H).T, D_VALUES[:, None] * HESSIAN + HESSIAN * D_VALUES, True),
    "block diagonal + G": (
        lambda: H.block_diagonal("layers") + G,
        GGN + np.block([[HESSIAN[:16, :16], np.zeros((16, 10))], [np.zeros((10, 16)), HESSIAN[16:, 16:]]]),
        True,
    ),
}


class TestExpressions:
    @pytest.mark.default_cases("H + G", "H @ G", "J.T @ J", "D @ H @ D", "-H / 2", "A + A.T", "damped product")
    @pytest.mark.parametrize("name", EXPRESSIONS)
    def test_products_and_parts(self, name: str) -> None:
        make, dense, symmetric = EXPRESSIONS[name]
        A = make()
        assert A.is_symmetric == symmetric
        assert A.dtype == np.float64
        check_products(A, dense)
        check_parts(A, dense)
        close(A.to_dense(), dense)

    @pytest.mark.default_cases("H + G", "H @ G", "H [*][*] 3", "J.T @ J", "D @ H @ D", "block diagonal + G")
    @pytest.mark.parametrize("name", EXPRESSIONS)
    def test_they_pickle(self, name: str) -> None:
        make, dense, symmetric = EXPRESSIONS[name]
        A = pickle.loads(pickle.dumps(make()))
        assert A.is_symmetric == symmetric
        close(A @ np.ones(P), dense @ np.ones(P))

    @pytest.mark.parametrize("device", DEVICES)
    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
    def test_tensors_stay_on_their_device_in_their_dtype(self, device: str, dtype: torch.dtype) -> None:
        model = copy.deepcopy(MODEL).to(device)
        K = HessianLinearOperator(model, LOSS, dict(model.named_parameters()), DATA)
        for A, dense in (
            (K + 0.1 * K, 1.1 * HESSIAN),
            (D @ K @ D, D_VALUES[:, None] * HESSIAN * D_VALUES),
            ((K @ K).damped(1.0), HESSIAN @ HESSIAN + np.eye(P)),
            (K.block_diagonal(), block_diagonal_of(HESSIAN)),
        ):
            x = torch.ones(P, dtype=dtype, device=device)
            product = A @ x
            assert (product.device, product.dtype) == (x.device, dtype)
            np.testing.assert_allclose(product.cpu().numpy(), dense @ np.ones(P), atol=1e-5, rtol=1e-5)
            assert not product.requires_grad
            assert A.device == K.device

    def test_rectangular_expressions(self) -> None:
        weights = DiagonalLinearOperator(np.arange(1.0, OUTPUTS + 1))
        K = J @ J.T
        assert K.is_symmetric
        check_products(K, JACOBIAN @ JACOBIAN.T)
        check_products(weights @ J - 2 * J, (np.arange(1.0, OUTPUTS + 1) - 2)[:, None] * JACOBIAN)
        check_products(J @ D @ J.T, (JACOBIAN * D_VALUES) @ JACOBIAN.T)
        assert (J @ D @ J.T).is_symmetric
        columns = (2 * J).block(["2.bias", "0.bias"])
        close(columns @ np.eye(6), 2 * JACOBIAN[:, positions(["2.bias", "0.bias"])])
        assert columns.params_slices == {"2.bias": slice(0, 2), "0.bias": slice(2, 6)}
        rows = (J.T @ weights).block("2.bias")
        close(rows @ np.eye(OUTPUTS), JACOBIAN[:, SLICES["2.bias"]].T * np.arange(1.0, OUTPUTS + 1))
        close(K[3:5, :][:, [0, 7]] @ np.eye(2), (JACOBIAN @ JACOBIAN.T)[3:5][:, [0, 7]])
        with pytest.raises(TypeError, match="neither the rows nor the columns of A are parameters"):
            K.block("2.bias")
        with pytest.raises(ValueError, match="no diagonal blocks"):
            K.block_diagonal()

    def test_complex_multiples(self) -> None:
        A = H + (1 + 2j) * G
        x = np.ones(P)
        close(A @ x, (HESSIAN + (1 + 2j) * GGN) @ x)
        close(A.H @ x, (HESSIAN + (1 - 2j) * GGN) @ x)
        close(A.T @ x, (HESSIAN + (1 + 2j) * GGN) @ x)
        close((A @ torch.ones(P, dtype=torch.float64)).numpy(), (HESSIAN + (1 + 2j) * GGN) @ x)
        assert A.dtype == np.complex128
        assert not A.is_symmetric
        close(A.to_dense(), HESSIAN + (1 + 2j) * GGN)

    def test_solvers_run_on_them(self) -> None:
        A = D @ G @ D
        values = eigsh(A, k=2, which="LA", return_eigenvectors=False)
        close(values, np.linalg.eigvalsh(D_VALUES[:, None] * GGN * D_VALUES)[-2:])
        B = (J.T @ J).damped(0.1)
        solution, info = cg(B, np.ones(P), rtol=1e-12)
        assert info == 0
        close(solution, np.linalg.solve(JACOBIAN.T @ JACOBIAN + 0.1 * np.eye(P), np.ones(P)), 1e3)
        result = curvop.spectrum.eigsh(A, k=3, which="LA", progress=False)
        close(result.values, np.linalg.eigvalsh(D_VALUES[:, None] * GGN * D_VALUES)[-3:])

    def test_blocks_of_a_symmetric_product_share_one_jacobian(self) -> None:
        block = (J.T @ J).block("2.weight")
        assert block.is_symmetric
        left, right = block._parts
        assert left._engine is right._adjoint_engine


def block_diagonal_of(dense: np.ndarray) -> np.ndarray:
    expected = np.zeros_like(dense)
    for where in SLICES.values():
        expected[where, where] = dense[where, where]
    return expected


class TestDiagonals:
    def test_of_sums_multiples_and_products_with_diagonal_matrices(self) -> None:
        close((2 * G - D).diagonal(), 2 * GGN.diagonal() - D_VALUES)
        close((D @ G @ D).diagonal(), D_VALUES**2 * GGN.diagonal())
        close((3 * D @ G).diagonal(), 3 * D_VALUES * GGN.diagonal())
        close((G + G).damped(0.5).diagonal(), 2 * GGN.diagonal() + 0.5)
        close(G.block_diagonal().diagonal(), GGN.diagonal())
        close((D @ D).diagonal(), D_VALUES**2)
        close((G + D)[3:8, :][:, 3:8].diagonal(), (GGN.diagonal() + D_VALUES)[3:8])

    def test_unknown_diagonals_raise(self) -> None:
        for A in (H + G, G @ G, D @ H, H.block_diagonal()):
            with pytest.raises(NotImplementedError, match=r"curvop\.spectrum\.diagonal"):
                A.diagonal()


class TestDiagonalLinearOperator:
    def test_arrays_tensors_and_dicts(self) -> None:
        parts = {name: torch.rand_like(value) for name, value in PARAMS.items()}
        flat = torch.cat([part.reshape(-1) for part in parts.values()])
        for A in (
            DiagonalLinearOperator(flat),
            DiagonalLinearOperator(flat.numpy()),
            DiagonalLinearOperator(parts),
            DiagonalLinearOperator(flat, PARAMS),
            DiagonalLinearOperator({name: parts[name] for name in reversed(parts)}, PARAMS),
        ):
            assert A.is_symmetric
            check_products(A, np.diag(flat.numpy()))
            close(A.diagonal(), flat.numpy())
        named = DiagonalLinearOperator(parts)
        check_parts(named, np.diag(flat.numpy()))
        assert named.params_slices == SLICES

    def test_integers_become_floating_point(self) -> None:
        assert (DiagonalLinearOperator(np.arange(3)) @ np.ones(3)).dtype == np.float64
        assert DiagonalLinearOperator(torch.ones(3)).dtype == np.float32

    def test_powers(self) -> None:
        d = np.array([1.0, 4.0, 9.0])
        close((DiagonalLinearOperator(d) ** -0.5).diagonal(), d**-0.5)
        assert (DiagonalLinearOperator({"a": torch.ones(2)}) ** 2).params_slices == {"a": slice(0, 2)}

    def test_the_values_are_copied(self) -> None:
        d = np.ones(3)
        A = DiagonalLinearOperator(d)
        d[:] = 0
        A.diagonal()[:] = 5
        close(A @ np.ones(3), np.ones(3))

    @pytest.mark.parametrize(
        ("arguments", "error", "message"),
        [
            ((np.eye(2),), ValueError, r"d has shape \(2, 2\), but must be one-dimensional"),
            ((1j * np.ones(2),), TypeError, "d is complex"),
            ((["a"],), TypeError, "d has dtype"),
            ((np.ones(3), {"a": torch.ones(2)}), ValueError, "d has 3 entries, but must have 2"),
            (({"a": torch.ones(2)}, {"b": torch.ones(2)}), ValueError, r"d has the keys \['a'\]"),
            (({"a": torch.ones(2)}, {"a": torch.ones(1, 2)}), ValueError, r"d\['a'\] has shape \(2,\)"),
            ((np.ones(3), [1]), TypeError, "params is a list"),
        ],
    )
    def test_bad_input(self, arguments: Any, error: type[Exception], message: str) -> None:
        with pytest.raises(error, match=message):
            DiagonalLinearOperator(*arguments)


class TestBlockDiagonal:
    def test_of_any_operators(self) -> None:
        a, b = SQUARE[:3, :2], SQUARE[3:4, :5]
        A = BlockDiagonalLinearOperator([aslinearoperator(a), J, aslinearoperator(b)])
        dense = np.zeros((3 + OUTPUTS + 1, 2 + P + 5))
        dense[:3, :2], dense[3:-1, 2:-5], dense[-1:, -5:] = a, JACOBIAN, b
        check_products(A, dense)
        assert not A.is_symmetric
        assert BlockDiagonalLinearOperator([H, G]).is_symmetric
        assert BlockDiagonalLinearOperator([J.T, J]).is_symmetric is False

    def test_names_of_blocks(self) -> None:
        A = BlockDiagonalLinearOperator([H.block("2.bias"), H.block("0.bias")])
        assert A.params_slices == {"2.bias": slice(0, 2), "0.bias": slice(2, 6)}
        where = positions("0.bias")
        close(A.block("0.bias").to_dense(), HESSIAN[np.ix_(where, where)])
        close(A.block("0.bias", "2.bias").to_dense(), np.zeros((4, 2)))

    def test_groups(self) -> None:
        groups = {"both biases": ["2.bias", "0.bias"], "last": "2.weight"}
        A = H.block_diagonal(groups)
        dense = np.zeros((P, P))
        for names in (["2.bias", "0.bias"], ["2.weight"]):
            where = np.ix_(positions(names), positions(names))
            dense[where] = HESSIAN[where]
        assert A.is_symmetric
        check_products(A, dense)
        names = ["0.bias", "2.bias", "2.weight"]
        close(A.block(names).to_dense(), dense[np.ix_(positions(names), positions(names))])
        with pytest.raises(ValueError, match=r"groups lacks '0.weight'"):
            H.block_diagonal(groups, complete=True)
        check_products(H.block_diagonal("layers", complete=True), H.block_diagonal("layers").to_dense())

    def test_a_product_counts_once(self) -> None:
        A = HessianLinearOperator(MODEL, LOSS, PARAMS, DATA).block_diagonal()
        A @ np.ones((P, 3))
        assert A.num_products == 3

    def test_its_largest_eigenvalue_is_that_of_the_largest_block(self) -> None:
        largest = max(np.linalg.eigvalsh(HESSIAN[where, where])[-1] for where in SLICES.values())
        close(eigsh(H.block_diagonal(), k=1, which="LA", return_eigenvectors=False)[0], largest)

    @pytest.mark.parametrize(
        ("groups", "error", "message"),
        [
            ({}, ValueError, "groups is empty"),
            ("rows", TypeError, "groups is a str"),
            ({"a": "3.weight"}, ValueError, r"groups\['a'\]: no parameter or module is named '3.weight'; did you mean"),
            ({"a": ["0.bias"], "b": "0.bias"}, ValueError, "groups has '0.bias' twice"),
            ({"a": []}, ValueError, r"groups\['a'\] names no parameter"),
        ],
    )
    def test_bad_groups(self, groups: Any, error: type[Exception], message: str) -> None:
        with pytest.raises(error, match=message):
            H.block_diagonal(groups)

    def test_bad_blocks(self) -> None:
        with pytest.raises(ValueError, match="blocks is empty"):
            BlockDiagonalLinearOperator([])
        with pytest.raises(TypeError, match=r"blocks\[1\] is a ndarray"):
            BlockDiagonalLinearOperator([H, np.eye(2)])
        with pytest.raises(ValueError, match="no diagonal blocks"):
            H.block("0.bias", "2.bias").block_diagonal()


class TestDamped:
    def test_any_square_operator(self) -> None:
        for A, dense in ((J @ J.T, JACOBIAN @ JACOBIAN.T), (H[:5, :][:, :5], HESSIAN[:5, :5])):
            B = A.damped(0.5)
            assert isinstance(B, DampedLinearOperator)
            assert B.damping == 0.5
            assert B.is_symmetric
            check_products(B, dense + 0.5 * np.eye(len(dense)))

    def test_rectangular_operators_raise(self) -> None:
        with pytest.raises(ValueError, match=r"A has shape \(18, 26\), but must be square to be damped"):
            J.damped(1.0)
        with pytest.raises(TypeError, match="add damping to it as SciPy does"):
            DampedLinearOperator(aslinearoperator(SQUARE), 1.0)


class TestWithOperatorsOfSciPy:
    def test_they_work_on_either_side(self) -> None:
        S = aslinearoperator(SQUARE)
        x = np.ones((P, 2))
        close((H + S) @ x, (HESSIAN + SQUARE) @ x)
        close((S + H) @ x, (HESSIAN + SQUARE) @ x)
        close((H - S) @ x, (HESSIAN - SQUARE) @ x)
        close((H @ S) @ x, HESSIAN @ SQUARE @ x)
        close((S @ H) @ x, SQUARE @ HESSIAN @ x)
        check_products(H + 2 * S, HESSIAN + 2 * SQUARE)
        check_products(H @ S, HESSIAN @ SQUARE)

    def test_tensors_go_through_numpy(self) -> None:
        A = H + aslinearoperator(SQUARE)
        assert not A.takes_tensors
        product = A @ torch.ones(P, dtype=torch.float32)
        assert product.dtype == torch.float32
        np.testing.assert_allclose(product.numpy(), (HESSIAN + SQUARE) @ np.ones(P), rtol=1e-5)

    def test_the_identity_is_not_written_to(self) -> None:
        identity = aslinearoperator(np.eye(P)) @ aslinearoperator(np.eye(P))
        x = np.ones(P)
        close((2 * DiagonalLinearOperator(x) + 3 * (H * 0)) @ x, 2 * x)
        close((H + 2 * LinearOperator((P, P), matvec=lambda v: v, dtype=np.float64)) @ x, HESSIAN @ x + 2)
        assert (x == 1).all()
        close((H @ identity) @ x, HESSIAN @ x)

    def test_blocks_select_their_entries(self) -> None:
        A = H + aslinearoperator(SQUARE)
        where = np.ix_(positions("2.weight"), positions("2.weight"))
        close(A.block("2.weight") @ np.eye(8), (HESSIAN + SQUARE)[where])


class TestCounting:
    def test_a_composite_counts_its_columns_and_each_part_what_it_multiplies(self) -> None:
        K, L = (HessianLinearOperator(MODEL, LOSS, PARAMS, DATA) for _ in range(2))
        A = K @ K + 2 * L
        A @ np.ones((P, 3))
        A.T @ np.ones(P)
        assert (A.num_products, K.num_products, L.num_products) == (4, 8, 4)
        B = A.damped(1.0)
        B @ np.ones(P)
        assert A.num_products == B.num_products == 5

    def test_products_with_no_columns_count_nothing(self) -> None:
        A = H + G
        A @ np.zeros((P, 0))
        assert A.num_products == 0


class CountedData:
    def __init__(self, batches: list[Any]) -> None:
        self.batches, self.passes = batches, 0

    def __iter__(self) -> Any:
        self.passes += 1
        return iter(self.batches)


class TestOnePassOverTheData:
    def operators(self, data: Any, **options: Any) -> list[Any]:
        return [
            kind(MODEL, LOSS, PARAMS, data, **options)
            for kind in (HessianLinearOperator, GGNLinearOperator, EFLinearOperator)
        ]

    def test_if_nothing_is_kept(self) -> None:
        data = CountedData(DATA)
        K, L, M = self.operators(data, cache=0)
        A = K + 0.1 * L - (M - L)
        dense = K.to_dense() + 0.1 * L.to_dense() - M.to_dense() + L.to_dense()
        A @ np.ones(P)  # the first product checks the weights of the batches
        before, data.passes = data.passes, 0
        counts = [B.num_products for B in (K, L, M)]
        close(A @ np.ones((P, 3)), dense @ np.ones((P, 3)))
        assert before >= 1
        assert data.passes == 1
        assert [B.num_products - count for B, count in zip((K, L, M), counts, strict=True)] == [3, 3, 3]
        data.passes = 0
        product = (K.damped(0.5) + L) @ np.ones(P)
        assert data.passes == 1
        close(product, K @ np.ones(P) + 0.5 + L @ np.ones(P))
        data.passes = 0
        (K + L) @ torch.ones(P, dtype=torch.float64)
        assert data.passes == 1

    def test_kept_linearizations_read_no_data(self) -> None:
        data = CountedData(DATA)
        K, L, _ = self.operators(data)
        A = K + L
        A @ np.ones(P)
        data.passes = 0
        close(A @ np.ones(P), (HESSIAN + GGN) @ np.ones(P))
        assert data.passes == 0

    def test_other_data_are_read_by_themselves(self) -> None:
        first, second = CountedData(DATA), CountedData(DATA)
        A = HessianLinearOperator(MODEL, LOSS, PARAMS, first, cache=0) + GGNLinearOperator(
            MODEL, LOSS, PARAMS, second, cache=0
        )
        close(A @ np.ones(P), (HESSIAN + GGN) @ np.ones(P))

    def test_the_first_pass_checks_as_usual(self) -> None:
        class Net(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.linear = nn.Linear(3, 2, dtype=torch.float64)
                self.dropout = nn.Dropout(0.5)

            def forward(self, x: torch.Tensor) -> torch.Tensor:
                return self.dropout(self.linear(x))

        model = Net()
        K, L, _ = (
            kind(model, LOSS, dict(model.named_parameters()), DATA, cache=0)
            for kind in (HessianLinearOperator, GGNLinearOperator, EFLinearOperator)
        )
        A = K + L
        with pytest.raises(curvop.NonDeterministicObjectiveError):
            [A @ np.ones(8) for _ in range(3)]
        model.eval()
        close(A @ np.ones(8), (K.to_dense() + L.to_dense()) @ np.ones(8))

    def test_a_product_that_is_not_finite_names_the_batch(self) -> None:
        bad = [*DATA, (X[:2] * torch.inf, Y[:2])]
        A = HessianLinearOperator(MODEL, LOSS, PARAMS, bad, cache=0) + GGNLinearOperator(
            MODEL, LOSS, PARAMS, bad, cache=0
        )
        with pytest.raises(curvop.NonFiniteProductError, match="batch 2"):
            A @ np.ones(P)

    def test_an_error_of_the_user_leaves_the_operators_usable(self) -> None:
        fail = [True]

        class Data(list):
            def __iter__(self):
                yield self[0]
                if fail[0]:
                    raise OSError("the disk is gone")
                yield self[1]

        data = Data(DATA)
        K, L, _ = self.operators(data, cache=0)
        A = K + L
        with pytest.raises(OSError, match="the disk is gone"):
            A @ np.ones(P)
        fail[0] = False
        close(A @ np.ones(P), (HESSIAN + GGN) @ np.ones(P))
        close(K @ np.ones(P), HESSIAN @ np.ones(P))


class TestOperandsOfAllKinds:
    def test_a_symmetric_sum_of_three_terms(self) -> None:
        A = D @ H + G + H @ D
        check_parts(A, D_VALUES[:, None] * HESSIAN + GGN + HESSIAN * D_VALUES)

    def test_rows_and_columns_in_another_order(self) -> None:
        B = H.block(NAMES, NAMES[::-1])
        dense = HESSIAN[:, positions(NAMES[::-1])]
        for A, matrix in ((B + aslinearoperator(SQUARE), dense + SQUARE), (B + D, dense + np.diag(D_VALUES))):
            close(A.to_dense(), matrix)
            close(A.block("2.bias").to_dense(), matrix[24:, :2])
            close(A[[0, 25], :][:, [3, 4]] @ np.eye(2), matrix[[0, 25]][:, [3, 4]])

    def test_an_array_that_an_operator_of_scipy_keeps_is_not_changed(self) -> None:
        cache: dict[bytes, np.ndarray] = {}
        S = LinearOperator((P, P), matvec=lambda v: cache.setdefault(v.tobytes(), SQUARE @ v), dtype=np.float64)
        A = H - S
        for _ in range(2):
            close(A @ np.ones(P), (HESSIAN - SQUARE) @ np.ones(P))

    def test_blocks_of_two_models(self) -> None:
        other = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2)).double()
        K = HessianLinearOperator(other, LOSS, dict(other.named_parameters()), DATA)
        A = BlockDiagonalLinearOperator([H.block("0.weight"), K.block("2.weight")])
        assert A.params_slices == {"0.weight": slice(0, 12), "2.weight": slice(12, 22)}
        shapes = {name: part.shape for name, part in A.unravel(np.ones(22)).items()}
        assert shapes == {"0.weight": (4, 3), "2.weight": (2, 5)}

    def test_damping_needs_a_common_diagonal(self) -> None:
        model = copy.deepcopy(MODEL)
        renamed = {f"a.{name}": value for name, value in model.named_parameters()}

        def predict(params: dict[str, torch.Tensor], x: torch.Tensor) -> torch.Tensor:
            return torch.func.functional_call(model, {name[2:]: value for name, value in params.items()}, (x,))

        K = J.T @ JacobianLinearOperator(predict, renamed, DATA)
        with pytest.raises(ValueError, match="are different parameters, so that A"):
            K.damped(1.0)

    def test_damped_products_with_operators_of_scipy(self) -> None:
        A = (H @ aslinearoperator(SQUARE)).damped(0.5)
        dense = HESSIAN @ SQUARE + 0.5 * np.eye(P)
        check_products(A, dense)
        close(A[[0, 3], :] @ np.eye(P), dense[[0, 3]])
        close(A.block("0.bias") @ np.eye(P), dense[positions("0.bias")])

    def test_parts_of_a_block_diagonal_that_lacks_parameters(self) -> None:
        B = H.block_diagonal({"a": ["0.weight"]})
        dense = np.zeros((P, P))
        dense[:12, :12] = HESSIAN[:12, :12]
        check_products(B, dense)
        check_parts(B, dense)
        close(B.block("2.bias").to_dense(), np.zeros((2, 2)))
        close(B.block("0.weight", "2.weight").to_dense(), np.zeros((12, 8)))
        assert B.block("0.weight", "2.weight")._parts == []

    def test_composites_of_diagonal_matrices_stay_diagonal(self) -> None:
        W = DiagonalLinearOperator(D_VALUES**2).damped(1e-3)
        w = D_VALUES**2 + 1e-3
        B = (W @ G @ W).block(["2.weight", "2.bias"])
        where = positions(["2.weight", "2.bias"])
        close(B.diagonal(), (w**2 * GGN.diagonal())[where])
        assert list(B.params_slices) == ["2.weight", "2.bias"]
        close(B.block("2.bias").to_dense(), (w[:, None] * GGN * w)[24:, 24:])
        close((W**-0.5).diagonal(), w**-0.5)
        close(((2 * D @ D) ** 0.5).diagonal(), (2 * D_VALUES**2) ** 0.5)
        named = DiagonalLinearOperator(D_VALUES, PARAMS)
        assert (named @ named).block("2.bias").is_symmetric

    def test_complex_composites_have_adjoints(self) -> None:
        for A, dense in (
            ((1j * G) @ H, 1j * GGN @ HESSIAN),
            (H @ (1j * G), 1j * HESSIAN @ GGN),
            (H + 1j * G, HESSIAN + 1j * GGN),
        ):
            z = np.arange(P) + 1j
            close(A @ z, dense @ z, 1e2)
            close(A.H @ z, dense.conj().T @ z, 1e2)
            close((A @ torch.from_numpy(z)).numpy(), dense @ z, 1e2)
            close(A.to_dense(), dense)
        close(((1j * G) ** 0) @ np.ones(P), np.ones(P))
        with pytest.raises(TypeError, match="A is real"):
            (H + G) @ (1j * np.ones(P))

    def test_bfloat16_tensors(self) -> None:
        product = (H + aslinearoperator(SQUARE)) @ torch.ones(P, dtype=torch.bfloat16)
        assert product.dtype == torch.bfloat16
        np.testing.assert_allclose(product.double().numpy(), (HESSIAN + SQUARE) @ np.ones(P), rtol=0.02, atol=0.02)

    def test_integers(self) -> None:
        A = SubmatrixLinearOperator(aslinearoperator(np.arange(16).reshape(4, 4)), [0, 1], [0, 1]).damped(0.5)
        close(A @ np.array([1, 2]), np.array([[0.5, 1], [4, 5.5]]) @ [1, 2])

    def test_wide_operators_without_an_adjoint_can_be_formed(self) -> None:
        S = LinearOperator((3, 100), matvec=lambda v: v[:3], dtype=np.float64)
        close(SubmatrixLinearOperator(S, [0, 1], slice(None)).to_dense(), np.eye(100)[:2])

    def test_the_parameters_of_curvature_matrices_have_precedence(self) -> None:
        model = copy.deepcopy(MODEL).float()
        K = GGNLinearOperator(model, LOSS, dict(model.named_parameters()), [(x.float(), y) for x, y in DATA])
        ones = DiagonalLinearOperator({name: np.ones(value.shape) for name, value in PARAMS.items()})
        assert (ones @ K).unravel(np.ones(P))["0.weight"].dtype == torch.float32

    def test_fractions_are_numbers(self) -> None:
        close((Fraction(1, 4) * H) @ np.ones(P), HESSIAN @ np.ones(P) / 4)

    def test_layers_of_parametrized_weights(self) -> None:
        model = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(3, 2))).double()
        K = HessianLinearOperator(model, LOSS, dict(model.named_parameters()), DATA)
        assert [len(names) for names in K.parameter_groups("layers").values()] == [3]

    def test_a_model_without_gradient_is_reported_as_by_a_single_operator(self) -> None:
        class Detached(nn.Linear):
            def forward(self, x: torch.Tensor) -> torch.Tensor:
                return super().forward(x).detach()

        model = Detached(3, 2, dtype=torch.float64)
        params = dict(model.named_parameters())
        K = HessianLinearOperator(model, LOSS, params, DATA, cache=0)
        for A in (K, K + GGNLinearOperator(model, LOSS, params, DATA, cache=0)):
            with pytest.raises(RuntimeError, match="depends on none of"):
                A @ np.ones(8)


class TestGram:
    def test_a_jacobian_and_its_transpose(self) -> None:
        A = (J.T @ J).damped(0.5)
        K = A.gram()
        close(K.to_dense(), JACOBIAN @ JACOBIAN.T + 0.5 * np.eye(OUTPUTS))
        found = curvop.spectrum.eigsh(A, 5, "LA", progress=False)
        close(found.values, np.linalg.eigvalsh(JACOBIAN.T @ JACOBIAN)[-5:] + 0.5, 1e2)
        assert found.ok
        close(A @ found.vectors, found.vectors * found.values, 1e3)

    def test_other_products_have_none(self) -> None:
        for A in (H @ G, H + G, D @ H @ D):
            with pytest.raises(ValueError, match=r"not of the form S\.T @ S"):
                A.gram()


class TestPrecision:
    def test_a_combination_has_the_lowest_precision_of_its_operands(self) -> None:
        model = copy.deepcopy(MODEL).float()
        data = [(x.float(), y) for x, y in DATA]
        K = GGNLinearOperator(model, LOSS, dict(model.named_parameters()), data)
        single, double = np.finfo(np.float32).eps, np.finfo(np.float64).eps
        ones = DiagonalLinearOperator(np.ones(P))
        bias = K.block("2.bias")
        for A in (K.damped(1.0), 2 * K, K + H, K.block_diagonal(), K[:5, :][:, :5], ones @ K @ ones, bias @ bias):
            assert A.epsilon == single
            assert product_dtype(A) == torch.float32
        for A in (H + G, ones, J.T @ J, H[:5, :]):
            assert A.epsilon == double


class TestBadInput:
    def test_shapes_that_do_not_fit(self) -> None:
        with pytest.raises(
            ValueError,
            match=r"A is a HessianLinearOperator of shape \(26, 26\) and B is a JacobianLinearOperator of shape "
            r"\(18, 26\), so they cannot be added",
        ):
            H + J
        with pytest.raises(ValueError, match=r"HessianLinearOperator of shape .* so they cannot be multiplied"):
            H @ J

    def test_other_parameters_are_warned_of(self) -> None:
        other = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
        renamed = dict(nn.ModuleDict({"a": other}).named_parameters())

        def predict(params: dict[str, torch.Tensor], x: torch.Tensor) -> torch.Tensor:
            return torch.func.functional_call(other, {name[2:]: value for name, value in params.items()}, (x,))

        K = HessianLinearOperator(predict, LOSS, renamed, DATA)
        with pytest.warns(RuntimeWarning, match=r"'0.weight' of shape \(4, 3\) and 'a.0.weight'"):
            H + K
        with pytest.warns(RuntimeWarning, match=r"columns of A, .*, and the rows of B, .*, are different"):
            H @ K
        with pytest.raises(ValueError, match="cannot be added"):
            H + K.block("a.0.weight")
        reordered = H.block(NAMES[::-1])
        with pytest.warns(RuntimeWarning, match="the first difference is '0.weight'"):
            A = H + reordered
        order = positions(NAMES[::-1])
        dense = HESSIAN + HESSIAN[np.ix_(order, order)]
        close(A @ np.ones(P), dense @ np.ones(P))
        where = np.ix_(positions("2.bias"), positions("2.bias"))
        close(A.block("2.bias").to_dense(), dense[where])

    def test_powers_and_divisors(self) -> None:
        for power in (-1, 0.5, True):
            with pytest.raises(ValueError, match="the power is"):
                H**power
        with pytest.raises(ValueError, match="must be square to have powers"):
            J**2
        with pytest.raises(ValueError, match="the divisor must be a number"):
            H / G

    def test_to_dense_checks_the_memory_first(self) -> None:
        K = HessianLinearOperator(MODEL, LOSS, PARAMS, DATA)
        with pytest.raises(MemoryError, match=r"a dense matrix of shape \(26, 26\)"):
            K.to_dense(memory=1000)
        assert K.num_products == 0

    def test_numpy_does_not_wrap_an_operator(self) -> None:
        with pytest.raises(TypeError, match=r"call A.to_dense\(\) to form the matrix"):
            np.asarray(H)
        for other in (H + G, J, H[:3, :], DiagonalLinearOperator(np.ones(2))):
            with pytest.raises(TypeError, match="to_dense"):
                np.array(other)


class TestToDense:
    def test_every_operator(self) -> None:
        for A, dense in (
            (H, HESSIAN),
            (J, JACOBIAN),
            (J.T, JACOBIAN.T),
            (H.block("0.bias", "2.weight"), HESSIAN[SLICES["0.bias"], SLICES["2.weight"]]),
            (SubmatrixLinearOperator(aslinearoperator(SQUARE), [0, 1], [2, 3, 4]), SQUARE[:2, 2:5]),
            (H[[], :], np.zeros((0, P))),
        ):
            assert A.to_dense().dtype == A.dtype
            for form in (A.to_dense, A.todense, A.toarray):
                close(form(), dense)

    def test_the_smaller_side_is_multiplied(self) -> None:
        K = JacobianLinearOperator(MODEL, PARAMS, DATA)
        K.to_dense()
        assert K.num_products == OUTPUTS

    def test_journaled_operators(self, tmp_path) -> None:
        with JournaledLinearOperator(H, tmp_path / "journal") as A:
            close(A.to_dense(), HESSIAN)
            close((A + G).to_dense(), HESSIAN + GGN)


class TestStoredState:
    def test_fingerprints_of_composites_name_their_terms(self) -> None:
        from curvop.storage.fingerprint import fingerprint, state

        A = 2 * H + D @ G
        parts = fingerprint(A)
        assert parts["operator"] == "_SumLinearOperator"  # as in SciPy, so that older journals are accepted
        assert "params['0.bias'] of term 1 of term 1" in parts
        before = state(A)
        with torch.no_grad():
            MODEL[0].bias.add_(0.0)
        assert state(A) != before

    def test_a_diagonal_matrix_is_identified_by_its_entries(self) -> None:
        from curvop.storage.fingerprint import fingerprint

        assert fingerprint(D) == fingerprint(DiagonalLinearOperator(D_VALUES))
        assert fingerprint(D) != fingerprint(DiagonalLinearOperator(D_VALUES + 1))


LEAVES: list[tuple[LinearOperator, np.ndarray]] = [
    (H, HESSIAN),
    (G, GGN),
    (D, np.diag(D_VALUES)),
    (J, JACOBIAN),
    (J.T, JACOBIAN.T),
    (H.block_diagonal(), block_diagonal_of(HESSIAN)),
    (DiagonalLinearOperator(np.arange(1.0, OUTPUTS + 1)), np.diag(np.arange(1.0, OUTPUTS + 1))),
    (GradientCovarianceLinearOperator(MODEL, LOSS, PARAMS, DATA), None),
]
LEAVES[-1] = (LEAVES[-1][0], LEAVES[-1][0] @ np.eye(P))


@st.composite
def expressions(draw: Any, depth: int = 4) -> tuple[LinearOperator, np.ndarray]:
    """Draw an operator and its dense matrix: an expression of sums, multiples, products, adjoints and damping."""
    if depth == 0:
        return draw(st.sampled_from(LEAVES))
    A, a = draw(expressions(depth=depth - 1))
    kinds = ["leaf", "scale", "adjoint", "damp", "sum", "symmetric sum", "difference", "product", "both sides"]
    kind = draw(st.sampled_from(kinds))
    if kind == "leaf":
        return A, a
    if kind == "scale":
        c = draw(st.sampled_from([-2, 0.5, np.float32(3), torch.tensor(-0.25)]))
        return c * A, float(c) * a
    if kind == "adjoint":
        return A.H, a.T
    if kind == "damp":
        return (A.damped(0.5), a + 0.5 * np.eye(len(a))) if a.shape[0] == a.shape[1] else (A, a)
    B, b = draw(expressions(depth=draw(st.integers(0, depth - 1))))
    if kind == "symmetric sum":
        square = a.shape[0] == a.shape[1]
        return (A + B + A.T, a + b + a.T) if square and a.shape == b.shape else (A, a)
    if kind in ("sum", "difference"):
        if a.shape != b.shape:
            return A, a
        return (A + B, a + b) if kind == "sum" else (A - B, a - b)
    if kind == "both sides":
        return (B.T @ A @ B, b.T @ a @ b) if b.shape[0] == a.shape[0] == a.shape[1] else (A, a)
    return (A @ B, a @ b) if a.shape[1] == b.shape[0] else (A, a)


def check_expression(data: Any) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        A, dense = data.draw(expressions())
    scale = 1e3
    check_products(A, dense, scale)
    rows = data.draw(st.lists(st.integers(0, dense.shape[0] - 1), min_size=1, max_size=5))
    cols = data.draw(st.lists(st.integers(0, dense.shape[1] - 1), min_size=1, max_size=5))
    close(A[rows, :][:, cols] @ np.eye(len(cols)), dense[rows][:, cols], scale * max(1.0, np.abs(dense).max()))
    layouts = A._row_and_column_layouts
    if None not in layouts:
        names = data.draw(st.permutations(NAMES)), data.draw(st.permutations(NAMES))
        names = [list(order[: data.draw(st.integers(1, 4))]) for order in names]
        block = A.block(*names)
        part = dense[np.ix_(positions(names[0]), positions(names[1]))]
        close(block @ np.eye(part.shape[1]), part, scale * max(1.0, np.abs(dense).max()))
        principal = A.block(names[0])
        assert principal.is_symmetric or not A.is_symmetric
        part = dense[np.ix_(positions(names[0]), positions(names[0]))]
        close(principal.to_dense(), part, scale * max(1.0, np.abs(dense).max()))


@settings(max_examples=10, deadline=None)
@given(st.data())
def test_random_expressions(data: Any) -> None:
    check_expression(data)


@pytest.mark.slow
@settings(max_examples=60, deadline=None)
@given(st.data())
def test_more_random_expressions(data: Any) -> None:
    check_expression(data)


@pytest.mark.nightly
@settings(max_examples=2000, deadline=None)
@given(st.data())
def test_many_random_expressions(data: Any) -> None:
    check_expression(data)
