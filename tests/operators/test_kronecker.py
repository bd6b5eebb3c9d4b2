"""Kronecker-factored matrices from random factors, against dense algebra in float64."""

from __future__ import annotations

import math
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.linalg
import torch
from scipy.sparse.linalg import LinearOperator, cg, eigsh
from torch import Tensor

from curvop.kernels.kronecker_factors import BlockLayout, FlatLayout
from curvop.operators.algebra import DampedLinearOperator
from curvop.operators.diagonal_operator import DiagonalLinearOperator
from curvop.operators.kronecker import KroneckerFactoredLinearOperator
from curvop.operators.kronecker_blocks import Block, EigenBlock, KroneckerBlock
from curvop.operators.kronecker_spectrum import LayerEigenvalues

LAYOUTS: dict[str, BlockLayout | FlatLayout] = {
    "linear": BlockLayout(("fc.weight", "fc.bias"), (torch.Size((4, 5)), torch.Size((4,))), 1, 4, 5, bias=True),
    "convolution": BlockLayout(
        ("conv.weight", "conv.bias"), (torch.Size((6, 2, 1, 2)), torch.Size((6,))), 2, 3, 4, bias=True
    ),
    "transposed": BlockLayout(
        ("gpt.weight", "gpt.bias"), (torch.Size((5, 3)), torch.Size((3,))), 1, 3, 5, bias=True, transposed=True
    ),
    "query": BlockLayout(("qkv", "qkv_bias"), (torch.Size((6, 3)), torch.Size((6,))), 1, 2, 3, bias=True, rows=(0, 2)),
    "key": BlockLayout(("qkv", "qkv_bias"), (torch.Size((6, 3)), torch.Size((6,))), 1, 4, 3, bias=True, rows=(2, 6)),
    "embedding": BlockLayout(("embedding",), (torch.Size((7, 2)),), 1, 2, 7, transposed=True),
    "bias": BlockLayout(("grouped.bias",), (torch.Size((4,)),), 2, 2, 0, bias=True),
    "exact": FlatLayout(("norm.weight", "norm.bias"), (torch.Size((3,)), torch.Size((3,)))),
    "diagonal": FlatLayout(("gain",), (torch.Size(()),)),
}
DIAGONAL = {"embedding": "right", "diagonal": "left"}  # the factor that is diagonal
ORDER = ("gain", "qkv", "fc.bias", "conv.weight", "embedding", "norm.weight", "gpt.bias", "fc.weight", "qkv_bias")
PARAMS = {
    name: torch.zeros(shape, dtype=torch.float64)
    for layout in LAYOUTS.values()
    for name, shape in zip(layout.names, layout.shapes, strict=True)
}
PARAMS = {name: PARAMS[name] for name in (*ORDER, *(name for name in PARAMS if name not in ORDER))}
SIZE = sum(parameter.numel() for parameter in PARAMS.values())


def close(actual: Any, expected: Any, rtol: float = 1e-10) -> None:
    np.testing.assert_allclose(actual, expected, rtol=rtol, atol=1e-10)


def semidefinite(rng: np.random.Generator, groups: int, size: int, rank: int | None) -> Tensor:
    root = torch.from_numpy(rng.normal(size=(groups, size, size if rank is None else rank)))
    return root @ root.mT / size + (0.1 * torch.eye(size, dtype=torch.float64) if rank is None else 0)


def kronecker_blocks(seed: int = 0, rank: int | None = None) -> list[Block]:
    rng = np.random.default_rng(seed)
    blocks: list[Block] = []
    for key, layout in LAYOUTS.items():
        groups, m, n = layout.dims
        left, right = semidefinite(rng, groups, m, rank), semidefinite(rng, groups, n, rank)
        if isinstance(layout, FlatLayout):
            right = torch.ones(1, 1, dtype=torch.float64)
        if DIAGONAL.get(key) == "left":
            left = left.diagonal(dim1=1, dim2=2).clone()
        if DIAGONAL.get(key) == "right":
            right = right.diagonal(dim1=1, dim2=2).clone()
        blocks.append(KroneckerBlock(layout, left, right))
    return blocks


def eigen_blocks(seed: int = 0) -> list[Block]:
    rng = np.random.default_rng(seed)
    blocks: list[Block] = []
    for key, layout in LAYOUTS.items():
        groups, m, n = layout.dims
        left, right = (torch.linalg.qr(torch.from_numpy(rng.normal(size=(groups, k, k))))[0] for k in (m, n))
        values = torch.from_numpy(rng.uniform(0.1, 2, size=layout.dims))
        wide = DIAGONAL.get(key)
        blocks.append(EigenBlock(layout, None if wide == "left" else left, None if wide == "right" else right, values))
    return blocks


def positions(layout: BlockLayout | FlatLayout) -> np.ndarray:
    """Return the index of each entry of V, of shape (groups, m, n), in the vector of all parameters."""
    index: dict[str, np.ndarray] = {}
    start = 0
    for name, parameter in PARAMS.items():
        index[name] = np.arange(start, start + parameter.numel()).reshape(parameter.shape)
        start += parameter.numel()
    if isinstance(layout, FlatLayout):
        return np.concatenate([index[name].reshape(-1) for name in layout.names]).reshape(layout.dims)
    first, last = layout.rows or (0, None)
    columns = []
    if layout.inputs:
        weight = index[layout.names[0]][first:last]
        weight = weight.T if layout.transposed else weight
        columns.append(weight.reshape(layout.groups, layout.outputs, layout.inputs))
    if layout.bias:
        columns.append(index[layout.names[-1]][first:last].reshape(layout.groups, layout.outputs, 1))
    return np.concatenate(columns, axis=2)


def dense_of(blocks: list[Block]) -> np.ndarray:
    """Form the matrix by NumPy's Kronecker products, group by group."""
    matrix = np.zeros((SIZE, SIZE))

    def square(factor: Tensor | None, group: int, size: int) -> np.ndarray:
        if factor is None:
            return np.eye(size)
        return np.diag(factor[group].numpy()) if factor.ndim == 2 else factor[group].numpy()

    for block in blocks:
        groups, m, n = block.layout.dims
        for group in range(groups):
            idxs = positions(block.layout)[group].reshape(-1)
            product = np.kron(square(block.left, group, m), square(block.right, group, n))  # type: ignore[attr-defined]
            if isinstance(block, EigenBlock):
                product = product * block.values[group].numpy().reshape(-1) @ product.T
            matrix[np.ix_(idxs, idxs)] = product
    return matrix


KINDS: dict[str, Callable[[], list[Block]]] = {"kronecker": kronecker_blocks, "eigen": eigen_blocks}


@pytest.fixture(params=KINDS)
def blocks(request: pytest.FixtureRequest) -> list[Block]:
    return KINDS[request.param]()


@pytest.fixture
def A(blocks: list[Block]) -> KroneckerFactoredLinearOperator:
    return KroneckerFactoredLinearOperator(blocks, PARAMS)


@pytest.fixture
def dense(blocks: list[Block]) -> np.ndarray:
    return dense_of(blocks)


def function_of(matrix: np.ndarray, function: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    values, vectors = np.linalg.eigh(matrix)
    return (vectors * function(values)) @ vectors.T


class TestProducts:
    def test_all_vectors(self, A: Any, dense: np.ndarray) -> None:
        assert isinstance(A, LinearOperator)
        assert A.shape == (SIZE, SIZE)
        assert A.is_symmetric
        assert A.H is A
        close(A.to_dense(), dense)

    @pytest.mark.parametrize("shape", [(SIZE,), (SIZE, 1), (SIZE, 3), (SIZE, 0)])
    def test_shapes(self, A: Any, dense: np.ndarray, shape: tuple[int, ...]) -> None:
        x = np.random.default_rng(1).normal(size=shape)
        close(A @ x, dense @ x)
        close(A @ np.asfortranarray(x), dense @ x)
        product = A @ torch.from_numpy(x)
        assert isinstance(product, Tensor)
        close(product, dense @ x)
        assert A.num_products == 3 * math.prod(shape[1:])

    def test_views_and_integers(self, A: Any, dense: np.ndarray) -> None:
        x = np.arange(SIZE)
        close(A @ x, dense @ x)
        close(A @ x[::-1], dense @ x[::-1])
        frozen = x.astype(np.float64)
        frozen.setflags(write=False)
        close(A @ frozen, dense @ x)
        assert (frozen == x).all()

    def test_trees(self, A: Any, dense: np.ndarray) -> None:
        x = torch.randn(SIZE, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        tree = A.unravel(x)
        assert list(tree) == list(PARAMS)
        close(A.ravel(A @ tree), dense @ x.numpy())

    def test_a_result_shares_no_memory(self) -> None:
        layout = BlockLayout(("w",), (torch.Size((2, 3)),), 1, 2, 3)
        values = torch.ones(layout.dims, dtype=torch.float64)
        for block in (
            EigenBlock(layout, None, None, values),
            KroneckerBlock(layout, values[0, None, :, 0], values[0, :1]),
        ):
            A = KroneckerFactoredLinearOperator([block], {"w": torch.zeros(2, 3)})
            x = np.arange(6.0)
            product = A @ x
            product += 1
            close(x, np.arange(6.0))

    def test_float32_factors(self, blocks: list[Block], dense: np.ndarray) -> None:
        single = [
            KroneckerBlock(block.layout, block.left.float(), block.right.float())
            for block in kronecker_blocks()
            if isinstance(block, KroneckerBlock)
        ]
        A = KroneckerFactoredLinearOperator(single, PARAMS)
        dense = dense_of(kronecker_blocks())
        x = np.random.default_rng(1).normal(size=SIZE)
        assert A.epsilon == np.finfo(np.float32).eps
        assert (A @ x).dtype == np.float64
        assert (A @ torch.from_numpy(x).float()).dtype == torch.float32
        np.testing.assert_allclose(A @ x, dense @ x, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(
            A.inverse(0.1) @ x, np.linalg.solve(dense + 0.1 * np.eye(SIZE), x), rtol=1e-4, atol=1e-4
        )

    def test_pickling(self, A: Any, dense: np.ndarray) -> None:
        A.logdet(0.1)
        again = pickle.loads(pickle.dumps(A))
        close(again.to_dense(), dense)
        close(again.logdet(0.1), A.logdet(0.1))


class TestParts:
    def test_blocks_of_parameters(self, A: Any, dense: np.ndarray) -> None:
        for name in PARAMS:
            part = A.params_slices[name]
            close(A.block(name).to_dense(), dense[part, part])
            close(A.block(name).diagonal(), dense.diagonal()[part])

    def test_rectangular_blocks(self, A: Any, dense: np.ndarray) -> None:
        rows, cols = ["qkv_bias", "fc.bias"], ["fc.weight", "norm.bias", "qkv"]
        row_idxs, col_idxs = (
            np.concatenate([np.arange(SIZE)[A.params_slices[name]] for name in names]) for names in (rows, cols)
        )
        block = A.block(rows, cols)
        close(block.to_dense(), dense[np.ix_(row_idxs, col_idxs)])
        close(block.H.to_dense(), dense[np.ix_(col_idxs, row_idxs)])
        close(block.block("qkv_bias", "qkv").to_dense(), dense[A.params_slices["qkv_bias"], A.params_slices["qkv"]])
        close(A.block("gain", "qkv").to_dense(), np.zeros((1, PARAMS["qkv"].numel())))

    def test_submatrices(self, A: Any, dense: np.ndarray) -> None:
        rows, cols = [3, SIZE - 1, 3, 17], [0, 17, 4, 40]
        close(A[rows, :][:, cols].to_dense(), dense[np.ix_(rows, cols)])
        close(A.submatrix(cols).diagonal(), dense.diagonal()[cols])

    def test_a_layer_has_the_closed_forms(self, A: Any, dense: np.ndarray) -> None:
        names = ["conv.bias", "conv.weight", "norm.bias", "norm.weight"]
        idxs = np.concatenate([np.arange(SIZE)[A.params_slices[name]] for name in names])
        inner = dense[np.ix_(idxs, idxs)]
        close(A.block(names).inverse(0.1).to_dense(), np.linalg.inv(inner + 0.1 * np.eye(len(inner))))

    def test_the_weights_alone_are_a_kronecker_product(self) -> None:
        A, dense = KroneckerFactoredLinearOperator(kronecker_blocks(), PARAMS), dense_of(kronecker_blocks())
        for name in PARAMS:
            inner = dense[A.params_slices[name], A.params_slices[name]]
            close(A.block(name).logdet(), np.linalg.slogdet(inner)[1])

    def test_block_diagonal(self, A: Any, dense: np.ndarray) -> None:
        B = A.block_diagonal({"first": ["fc.weight"], "second": ["qkv", "qkv_bias"]})
        expected = np.zeros_like(dense)
        for names in (["fc.weight"], ["qkv", "qkv_bias"]):
            idxs = np.concatenate([np.arange(SIZE)[A.params_slices[name]] for name in names])
            expected[np.ix_(idxs, idxs)] = dense[np.ix_(idxs, idxs)]
        close(B.to_dense(), expected)


class TestAlgebra:
    def test_expressions(self, A: Any, dense: np.ndarray) -> None:
        D = DiagonalLinearOperator(np.linspace(1, 2, SIZE))
        d = np.diag(np.linspace(1, 2, SIZE))
        other = KroneckerFactoredLinearOperator(kronecker_blocks(5), PARAMS)
        S = D @ (2 * A - other) @ D + D
        close(S.to_dense(), d @ (2 * dense - dense_of(kronecker_blocks(5))) @ d + d)
        assert S.is_symmetric
        part = A.params_slices["fc.weight"]
        close(S.block("fc.weight").to_dense(), S.to_dense()[part, part])
        damped = A.damped(0.5)
        assert isinstance(damped, DampedLinearOperator)
        close(damped.diagonal(), dense.diagonal() + 0.5)

    def test_solvers_of_scipy(self, A: Any, dense: np.ndarray) -> None:
        top = eigsh(A, k=2, which="LA", return_eigenvectors=False)
        close(np.sort(top), np.linalg.eigvalsh(dense)[-2:])
        b = np.ones(SIZE)
        steps: list[Any] = []
        x, info = cg(A.damped(0.1), b, rtol=1e-11, M=A.inverse(0.1), callback=steps.append)
        assert info == 0
        assert len(steps) <= 2
        close(dense @ x + 0.1 * x, b)


class TestClosedForms:
    def test_diagonal_trace_and_norm(self, A: Any, dense: np.ndarray) -> None:
        close(A.diagonal(), dense.diagonal())
        close(A.trace(), np.trace(dense))
        close(A.frobenius_norm(), np.linalg.norm(dense))

    @pytest.mark.parametrize("damping", [0.0, 1e-3, 2.0])
    def test_inverse_and_determinant(self, A: Any, dense: np.ndarray, damping: float) -> None:
        damped = dense + damping * np.eye(SIZE)
        inverse = A.inverse(damping)
        close(inverse.to_dense(), np.linalg.inv(damped), rtol=1e-8)
        close(inverse.diagonal(), np.linalg.inv(damped).diagonal(), rtol=1e-8)
        close(A.logdet(damping), np.linalg.slogdet(damped)[1])
        close(inverse.logdet(), -A.logdet(damping))

    @pytest.mark.parametrize("exponent", [0.5, -0.5, 2, -0.25, 0])
    @pytest.mark.parametrize("damping", [0.0, 0.3])
    def test_powers(self, A: Any, dense: np.ndarray, exponent: float, damping: float) -> None:
        expected = function_of(dense, lambda values: (values + damping) ** exponent)
        close(A.power(exponent, damping).to_dense(), expected, rtol=1e-8)

    def test_square_roots(self, A: Any, dense: np.ndarray) -> None:
        close(A.sqrt().to_dense(), scipy.linalg.sqrtm(dense))
        close((A.inverse_sqrt(0.1) @ A.inverse_sqrt(0.1)).to_dense(), np.linalg.inv(dense + 0.1 * np.eye(SIZE)))

    def test_tensors_stay_tensors(self, A: Any, dense: np.ndarray) -> None:
        x = torch.ones(SIZE, 2, dtype=torch.float64)
        product = A.inverse(0.1) @ x
        assert isinstance(product, Tensor)
        close(product, np.linalg.solve(dense + 0.1 * np.eye(SIZE), x.numpy()))


class TestFloat32:
    """Inverses of float32 factors are accurate to float32 for every damping."""

    @pytest.mark.parametrize("relative", [1.0, 2e-3, 5e-4, 1e-5, 1e-7])
    def test_any_damping(self, relative: float) -> None:
        """The largest eigenvalue is 1e6 times the smallest one."""
        rng = np.random.default_rng(0)
        layout = BlockLayout(("w",), (torch.Size((12, 14)),), 1, 12, 14)
        left, right = (semidefinite(rng, 1, size, None) + 100.0 for size in (12, 14))
        block = KroneckerBlock(layout, left.float(), right.float())
        A = KroneckerFactoredLinearOperator([block], {"w": torch.zeros(12, 14)})
        dense = np.kron(block.left[0].double().numpy(), block.right[0].double().numpy())
        damped = dense + relative * np.linalg.eigvalsh(dense)[-1] * np.eye(len(dense))
        x = rng.normal(size=len(dense))
        expected = np.linalg.solve(damped, x)
        error = np.linalg.norm(A.inverse(damped[0, 0] - dense[0, 0]) @ x - expected) / np.linalg.norm(expected)
        assert error < (1e-4 if relative > 1e-5 else 2e-6)

    @pytest.mark.parametrize("size", [40, 200])
    def test_errors_of_decompositions_in_float32_are_noticed(self, size: int) -> None:
        """Three eigenvalues are 1, and the others are smaller than the damping."""
        rng = np.random.default_rng(1)
        basis = np.linalg.qr(rng.normal(size=(size, size)))[0]
        values = np.where(np.arange(size) < 3, 1.0, 1e-8)
        factor = torch.from_numpy((basis * values) @ basis.T)[None].float()
        layout = BlockLayout(("w",), (torch.Size((size, 1)),), 1, size, 1)
        x = rng.normal(size=size)
        for damping in (1.5e-5, 1e-4, 1e-3, 1e-2):
            block = KroneckerBlock(layout, factor, torch.ones(1, 1, 1))
            A = KroneckerFactoredLinearOperator([block], {"w": torch.zeros(size, 1)})
            matrix = factor[0].double().numpy() + damping * np.eye(size)
            expected = np.linalg.solve(matrix, x)
            assert np.linalg.norm(A.inverse(damping) @ x - expected) < 1.5e-4 * np.linalg.norm(expected)

    def test_errors_for_smooth_inputs_are_noticed(self) -> None:
        """The inputs are sinusoids and little noise, so that sinusoids are the eigenvectors of large eigenvalues."""
        rng, size = np.random.default_rng(0), 256
        waves = np.stack([np.cos(np.arange(size)), np.sin(np.arange(size))])
        X = rng.normal(size=(2000, 2)) @ waves + 1e-3 * rng.normal(size=(2000, size))
        left, right = (torch.from_numpy(Y.T @ Y / len(Y))[None].float() for Y in (rng.normal(size=(300, 8)), X))
        block = KroneckerBlock(BlockLayout(("w",), (torch.Size((8, size)),), 1, 8, size), left, right)
        A = KroneckerFactoredLinearOperator([block], {"w": torch.zeros(8, size)})
        damping = 2e-5 * float(block.eigen.values.max())
        x = rng.normal(size=A.shape[0])
        dense = torch.kron(left[0].double(), right[0].double()).numpy()
        expected = np.linalg.solve(dense + damping * np.eye(len(dense)), x)
        assert np.linalg.norm(A.inverse(damping) @ x - expected) < 1.5e-4 * np.linalg.norm(expected)

    def test_errors_in_one_of_many_groups_are_noticed(self) -> None:
        rng, size, groups = np.random.default_rng(1), 100, 400
        factors = torch.eye(size).expand(groups, size, size) * 1e-2
        basis = np.linalg.qr(rng.normal(size=(size, size)))[0]
        values = np.where(np.arange(size) < 3, 1.0, 1e-8)
        factors = torch.cat([torch.from_numpy((basis * values) @ basis.T)[None].float(), factors[1:]])
        layout = BlockLayout(("w",), (torch.Size((groups, size)),), groups, 1, size)
        A = KroneckerFactoredLinearOperator(
            [KroneckerBlock(layout, torch.ones(groups, 1, 1), factors)], {"w": torch.zeros(groups, size)}
        )
        x, damping = rng.normal(size=size), 3e-5
        product = (A.inverse(damping) @ np.concatenate([x, np.zeros((groups - 1) * size)]))[:size]
        expected = np.linalg.solve(factors[0].double().numpy() + damping * np.eye(size), x)
        assert np.linalg.norm(product - expected) < 1.5e-4 * np.linalg.norm(expected)

    def test_inverses_do_not_depend_on_earlier_calls(self) -> None:
        rng = np.random.default_rng(2)
        layout = BlockLayout(("w",), (torch.Size((12, 14)),), 1, 12, 14)
        factors = [semidefinite(rng, 1, size, 2).float() for size in (12, 14)]
        x, products = rng.normal(size=12 * 14), {}
        for dampings in ((1e-4, 1e-3, 1e-2, 1.0), (1.0, 1e-2, 1e-3, 1e-4)):
            A = KroneckerFactoredLinearOperator([KroneckerBlock(layout, *factors)], {"w": torch.zeros(12, 14)})
            if dampings[0] == 1.0:
                A.eigenvalues()
            for damping in dampings:
                product = A.inverse(damping) @ x
                assert np.array_equal(products.setdefault(damping, product), product)

    def test_the_bound_of_the_largest_eigenvalue(self) -> None:
        for block in kronecker_blocks():
            assert isinstance(block, KroneckerBlock)
            largest = float(block.eigen.values.max())
            assert 0.3 * largest <= block._largest <= 1.000001 * largest


class TestFactoredDamping:
    """Martens and Grosse (2015), section 6.3, by dense algebra."""

    def expected(self, blocks: list[Block], damping: float, least: float = 0.0) -> np.ndarray:
        matrix = np.zeros((SIZE, SIZE))
        for block in blocks:
            assert isinstance(block, KroneckerBlock)
            groups, m, n = block.layout.dims
            for group in range(groups):
                left, right = block.left[group].numpy(), block.right[group].numpy()
                left = np.diag(left) if left.ndim == 1 else left
                right = np.diag(right) if right.ndim == 1 else right
                if isinstance(block.layout, FlatLayout) or not block.layout.inputs:
                    inverse = np.linalg.inv(np.kron(left, right) + max(damping, least) * np.eye(m * n))
                else:
                    pi = math.sqrt(np.trace(right) / n / (np.trace(left) / m))
                    left = left + max(math.sqrt(damping) / pi, least) * np.eye(m)
                    right = right + max(math.sqrt(damping) * pi, least) * np.eye(n)
                    inverse = np.kron(np.linalg.inv(left), np.linalg.inv(right))
                idxs = positions(block.layout)[group].reshape(-1)
                matrix[np.ix_(idxs, idxs)] = inverse
        return matrix

    @pytest.mark.parametrize("damping", [1e-3, 1.0])
    def test_factored(self, damping: float) -> None:
        blocks = kronecker_blocks()
        A = KroneckerFactoredLinearOperator(blocks, PARAMS)
        close(A.inverse(damping, "factored").to_dense(), self.expected(blocks, damping), rtol=1e-8)

    def test_heuristic(self) -> None:
        blocks = kronecker_blocks()
        A = KroneckerFactoredLinearOperator(blocks, PARAMS)
        for damping, least in ((1e-4, 0.02), (0.0, 0.02), (0.1, 1e-8)):
            inverse = A.inverse(damping, "heuristic", min_damping=least)
            close(inverse.to_dense(), self.expected(blocks, damping, least), rtol=1e-8)

    def test_without_damping_all_kinds_agree(self) -> None:
        A = KroneckerFactoredLinearOperator(kronecker_blocks(), PARAMS)
        close(A.inverse(0, "factored").to_dense(), A.inverse().to_dense())

    def test_a_zero_factor(self) -> None:
        layout = BlockLayout(("w",), (torch.Size((2, 3)),), 1, 2, 3)
        zero, one = torch.zeros(1, 2, 2, dtype=torch.float64), torch.eye(3, dtype=torch.float64)[None]
        A = KroneckerFactoredLinearOperator([KroneckerBlock(layout, zero, one)], {"w": torch.zeros(2, 3)})
        close(A.inverse(0.04, "factored").to_dense(), np.eye(6) / (0.2 * 1.2))

    @pytest.mark.parametrize("damping", [1e-2, 1e-4, 1e-6, 1e-8])
    @pytest.mark.parametrize("kind", ["means", "walks"])
    def test_correlated_float32_factors(self, damping: float, kind: str) -> None:
        """The largest eigenvalue is much larger than the largest pivot of the Cholesky decomposition."""
        rng, size = np.random.default_rng(0), 512
        X = rng.normal(size=(1500, size))
        X = 1 + 0.1 * X if kind == "means" else np.cumsum(X, 1)
        right = torch.from_numpy(X.T @ X / len(X))[None].float()
        layout = BlockLayout(("w",), (torch.Size((1, size)),), 1, 1, size)
        A = KroneckerFactoredLinearOperator(
            [KroneckerBlock(layout, torch.zeros(1, 1, 1), right)], {"w": torch.zeros(1, size)}
        )
        shift = damping * np.linalg.eigvalsh(right[0].double().numpy())[-1]
        x = rng.normal(size=size)
        # A factor of zeros has pi = 1: both factors are damped by the same number.
        expected = np.linalg.solve(right[0].double().numpy() + shift * np.eye(size), x) / shift
        error = np.linalg.norm(A.inverse(shift**2, "factored") @ x - expected) / np.linalg.norm(expected)
        assert error < 2e-4

    @pytest.mark.parametrize("damping", [1e-4, 1e-10, 1e-20])
    def test_small_damping_of_singular_float32_factors(self, damping: float) -> None:
        """The Cholesky decomposition in float32 has few correct digits, or fails.

        All entries of a factor are equal, so that it is singular after rounding too.
        """
        layout = BlockLayout(("w",), (torch.Size((6, 7)),), 1, 6, 7)
        u, v = (torch.ones(size, 1, dtype=torch.float64) / size**0.5 for size in (6, 7))
        block = KroneckerBlock(layout, (u @ u.mT)[None].float(), (v @ v.mT)[None].float())
        A = KroneckerFactoredLinearOperator([block], {"w": torch.zeros(6, 7)})
        pi = math.sqrt(6 / 7)
        left = np.linalg.inv((u @ u.mT).numpy() + damping**0.5 / pi * np.eye(6))
        right = np.linalg.inv((v @ v.mT).numpy() + damping**0.5 * pi * np.eye(7))
        expected = np.kron(left, right)
        error = np.linalg.norm(A.inverse(damping, "factored").to_dense() - expected) / np.linalg.norm(expected)
        assert error < 2e-3


class TestSingularMatrices:
    @pytest.fixture
    def singular(self) -> tuple[KroneckerFactoredLinearOperator, np.ndarray]:
        blocks = kronecker_blocks(rank=1)
        return KroneckerFactoredLinearOperator(blocks, PARAMS), dense_of(blocks)

    def test_damped(self, singular: tuple[Any, np.ndarray]) -> None:
        A, dense = singular
        damped = dense + 0.01 * np.eye(SIZE)
        close(A.to_dense(), dense)
        close(A.inverse(0.01).to_dense(), np.linalg.inv(damped), rtol=1e-8)
        close(A.logdet(0.01), np.linalg.slogdet(damped)[1])
        close(A.sqrt() @ (A.sqrt() @ np.ones(SIZE)), dense @ np.ones(SIZE), rtol=1e-7)

    def test_not_damped(self, singular: tuple[Any, np.ndarray]) -> None:
        A, _ = singular
        assert A.logdet() == -math.inf
        for kind in ("exact", "factored"):
            with pytest.raises(ValueError, match=r"is singular up to rounding errors.*pass damping > 0"):
                A.inverse(kind=kind)
        with pytest.raises(ValueError, match="singular"):
            A.inverse_sqrt()
        with pytest.raises(ValueError, match="no finite inverse"):
            A.inverse(1e-310)

    def test_zero_eigenvalues_of_a_corrected_matrix(self) -> None:
        block = eigen_blocks()[0]
        assert isinstance(block, EigenBlock)
        block.values[0, 0, 0] = 1e-34
        A = KroneckerFactoredLinearOperator([block], {name: PARAMS[name] for name in block.layout.names})
        with pytest.raises(ValueError, match="singular"):
            A.inverse()
        assert A.logdet() == -math.inf
        assert math.isfinite(A.logdet(0.1))


class TestFactors:
    def test_the_factors_of_a_layer(self) -> None:
        blocks = kronecker_blocks()
        A = KroneckerFactoredLinearOperator(blocks, PARAMS)
        factors = A.factors["fc.weight"]
        assert factors.names == ("fc.weight", "fc.bias")
        assert factors.input is not None
        assert factors.output is not None
        part = np.r_[A.params_slices["fc.weight"], A.params_slices["fc.bias"]]
        V = np.arange(24.0).reshape(4, 6)
        product = A.submatrix(part) @ np.concatenate([V[:, :5].reshape(-1), V[:, 5]])
        expected = factors.output.numpy() @ V @ factors.input.numpy()
        close(product, np.concatenate([expected[:, :5].reshape(-1), expected[:, 5]]))
        assert A.factors["conv.bias"].output is blocks[1].left  # type: ignore[attr-defined]

    def test_names(self) -> None:
        A = KroneckerFactoredLinearOperator(kronecker_blocks(), PARAMS)
        split = {"qkv[0:2]", "qkv_bias[0:2]", "qkv[2:6]", "qkv_bias[2:6]"}
        assert set(A.factors) == set(PARAMS) - {"qkv", "qkv_bias"} | split
        assert A.factors["qkv[2:6]"].output.shape == (4, 4)
        with pytest.raises(KeyError, match="no block has the parameter 'fc'"):
            A.factors["fc"]

    def test_the_bases_of_a_corrected_matrix(self) -> None:
        kronecker, corrected = kronecker_blocks()[0], eigen_blocks()[0]
        assert isinstance(corrected, EigenBlock)
        assert isinstance(kronecker, KroneckerBlock)
        block = EigenBlock(corrected.layout, corrected.left, corrected.right, corrected.values, factors=kronecker)
        factors = KroneckerFactoredLinearOperator([block], {n: PARAMS[n] for n in block.layout.names}).factors[
            "fc.bias"
        ]
        assert factors.eigenvalues is not None
        assert factors.eigenvalues.shape == (4, 6)
        assert factors.input is not None
        assert torch.equal(factors.input, kronecker.right[0])


class TestEigenvalues:
    def test_all_of_them(self, A: Any, dense: np.ndarray) -> None:
        found = A.eigenvalues()
        close(found.values, np.linalg.eigvalsh(dense))
        parts = "qkv, qkv_bias[0:2]", "qkv, qkv_bias[2:6]"
        assert found.layers == ("gain", *parts, "fc", "conv", "embedding", "norm", "gpt", "grouped.bias")
        for layer, names in {"fc": ["fc.weight", "fc.bias"], "conv": ["conv.weight", "conv.bias"]}.items():
            idxs = np.concatenate([np.arange(SIZE)[A.params_slices[name]] for name in names])
            close(found.of(layer), np.linalg.eigvalsh(dense[np.ix_(idxs, idxs)]))
        with pytest.raises(KeyError, match="no layer is named 'fc2'"):
            found.of("fc2")

    @pytest.mark.parametrize("k", [3, SIZE])
    def test_the_largest_eigenpairs(self, A: Any, dense: np.ndarray, k: int) -> None:
        values, vectors = A.largest_eigenpairs(k)
        close(values, np.linalg.eigvalsh(dense)[-k:])
        np.testing.assert_allclose(dense @ vectors, vectors * values, atol=1e-10 * values[-1])
        np.testing.assert_allclose(vectors.T @ vectors, np.eye(k), atol=1e-10)
        with pytest.raises(ValueError, match=f"k is {SIZE + 1}, but the matrix has only {SIZE} eigenvalues"):
            A.largest_eigenpairs(SIZE + 1)

    def test_the_table(self) -> None:
        found = LayerEigenvalues.of_layers({"fc.weight": np.array([4.0, 2.0, 0.0, 0.0]), "b": np.array([1.0])})
        assert str(found).splitlines() == [
            "layer      number  largest  median  smallest  zero",
            "fc.weight       4        4       1         0   50%",
            "b               1        1       1         1    0%",
        ]

    def test_the_picture(self) -> None:
        pytest.importorskip("matplotlib").use("agg")
        found = LayerEigenvalues.of_layers({"fc": np.arange(5000.0), "b": np.array([7.0]), "zero": np.zeros(3)})
        ax = found.plot()
        lines = {line.get_label(): line.get_xydata() for line in ax.get_lines()}
        assert list(lines) == ["fc", "b", "zero"]
        close(lines["fc"][0], [1, 4999])
        close(lines["fc"][-1], [4999, 1])
        assert len(lines["fc"]) <= 2000
        close(lines["b"], [[1, 7]])
        assert not len(lines["zero"])
        assert found.plot(ax) is ax


class TestFiles:
    def test_a_saved_matrix(self, A: Any, dense: np.ndarray, tmp_path: Path) -> None:
        A.save(tmp_path / "factors.npz")
        again = KroneckerFactoredLinearOperator.load(tmp_path / "factors.npz")
        assert again.params_slices == A.params_slices
        assert {name: part.shape for name, part in again.unravel(np.ones(SIZE)).items()} == {
            name: parameter.shape for name, parameter in PARAMS.items()
        }
        close(again.to_dense(), A.to_dense())
        close(again.inverse(0.1).to_dense(), np.linalg.inv(dense + 0.1 * np.eye(SIZE)))

    def test_dtypes_and_factors_are_kept(self, tmp_path: Path) -> None:
        kronecker, corrected = kronecker_blocks()[0], eigen_blocks()[0]
        assert isinstance(kronecker, KroneckerBlock)
        assert isinstance(corrected, EigenBlock)
        single = KroneckerBlock(kronecker.layout, kronecker.left.float(), kronecker.right.float())
        block = EigenBlock(corrected.layout, None, None, corrected.values, single, torch.float32)
        A = KroneckerFactoredLinearOperator([block], {n: PARAMS[n] for n in block.layout.names}, dtype=np.float32)
        A.save(tmp_path / "factors.npz")
        again = KroneckerFactoredLinearOperator.load(tmp_path / "factors.npz")
        assert again.dtype == np.float32
        assert again.epsilon == np.finfo(np.float32).eps
        for name in ("input", "output", "eigenvalues"):
            found, expected = (getattr(B.factors["fc.weight"], name) for B in (again, A))
            assert found.dtype == expected.dtype
            assert torch.equal(found, expected)

    def test_another_file(self, tmp_path: Path) -> None:
        np.savez(tmp_path / "other.npz", values=np.ones(3))
        with pytest.raises(ValueError, match=r"was not written by KroneckerFactoredLinearOperator\.save"):
            KroneckerFactoredLinearOperator.load(tmp_path / "other.npz")


class TestMovingAverages:
    def test_factors_are_averaged(self) -> None:
        A, other = (KroneckerFactoredLinearOperator(kronecker_blocks(seed), PARAMS) for seed in (0, 1))
        before, inverse = A.to_dense(), A.inverse(0.1)
        kept = inverse.to_dense()
        expected = [
            KroneckerBlock(a.layout, 0.9 * a.left + 0.1 * b.left, 0.9 * a.right + 0.1 * b.right)
            for a, b in zip(kronecker_blocks(0), kronecker_blocks(1), strict=True)
            if isinstance(a, KroneckerBlock) and isinstance(b, KroneckerBlock)
        ]
        A.moving_average(other, 0.9)
        dense = dense_of(list(expected))
        assert not np.allclose(before, dense)
        close(A.to_dense(), dense)
        close(A.inverse(0.1).to_dense(), np.linalg.inv(dense + 0.1 * np.eye(SIZE)))
        close(inverse.to_dense(), kept)

    def test_corrected_eigenvalues_are_averaged_in_the_new_basis(self) -> None:
        pairs = [
            [
                EigenBlock(k.layout, k.eigen.left, k.eigen.right, e.values, k)
                for k, e in zip(kronecker_blocks(seed), eigen_blocks(seed), strict=True)
                if isinstance(k, KroneckerBlock) and isinstance(e, EigenBlock)
            ]
            for seed in (0, 1)
        ]
        A, other = (KroneckerFactoredLinearOperator(blocks, PARAMS) for blocks in pairs)
        mean = 0.75 * A.to_dense() + 0.25 * other.to_dense()
        A.moving_average(other, 0.75)
        for block in A._blocks:
            assert isinstance(block, EigenBlock)
            for group in range(block.layout.dims[0]):
                idxs = positions(block.layout)[group].reshape(-1)
                left, right = (
                    np.eye(size) if basis is None else basis[group].numpy()
                    for basis, size in ((block.left, block.layout.dims[1]), (block.right, block.layout.dims[2]))
                )
                basis = np.kron(left, right)
                diagonal = np.diagonal(basis.T @ mean[np.ix_(idxs, idxs)] @ basis)
                close(block.values[group].reshape(-1), diagonal)

    def test_mistakes(self) -> None:
        A = KroneckerFactoredLinearOperator(kronecker_blocks(), PARAMS)
        with pytest.raises(ValueError, match="decay is 2"):
            A.moving_average(A, 2)
        with pytest.raises(ValueError, match="different blocks"):
            A.moving_average(A.block("gain"), 0.5)
        with pytest.raises(ValueError, match="only one of the blocks"):
            A.moving_average(KroneckerFactoredLinearOperator(eigen_blocks(), PARAMS), 0.5)


class TestMistakes:
    def test_damping(self) -> None:
        A = KroneckerFactoredLinearOperator(kronecker_blocks(), PARAMS)
        for damping in (-1.0, math.inf, math.nan):
            with pytest.raises(ValueError, match=r"damping is .*, but must be finite and >= 0"):
                A.inverse(damping)
        with pytest.raises(TypeError, match="damping is a str"):
            A.logdet("1")
        with pytest.raises(ValueError, match="kind is 'none'"):
            A.inverse(0.1, "none")
        with pytest.raises(ValueError, match="exponent is inf"):
            A.power(math.inf)

    def test_a_corrected_matrix_has_no_factored_inverse(self) -> None:
        A = KroneckerFactoredLinearOperator(eigen_blocks(), PARAMS)
        with pytest.raises(ValueError, match="pass kind='exact'"):
            A.inverse(0.1, "factored")

    def test_blocks_that_do_not_cover_the_parameters(self) -> None:
        blocks = kronecker_blocks()
        with pytest.raises(ValueError, match=r"cover 0 of the 4 entries of 'fc\.bias'"):
            KroneckerFactoredLinearOperator(blocks[1:], PARAMS)
        with pytest.raises(ValueError, match=r"'fc\.weight' of shape .* not in params"):
            KroneckerFactoredLinearOperator(blocks, {"gain": PARAMS["gain"]})

    def test_factors_of_wrong_shape(self) -> None:
        with pytest.raises(ValueError, match="left factor"):
            KroneckerBlock(LAYOUTS["linear"], torch.eye(5)[None], torch.eye(6)[None])
        with pytest.raises(ValueError, match="eigenvalues"):
            EigenBlock(LAYOUTS["linear"], None, None, torch.zeros(1, 4, 5))

    def test_indefinite_factors(self) -> None:
        layout = BlockLayout(("w",), (torch.Size((2, 3)),), 1, 2, 3)
        block = KroneckerBlock(layout, -torch.eye(2)[None], torch.eye(3)[None])
        A = KroneckerFactoredLinearOperator([block], {"w": torch.zeros(2, 3)})
        with pytest.raises(ValueError, match="positive semidefinite"):
            A.inverse(0.1)
