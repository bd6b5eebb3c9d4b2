"""Thick-restart block Lanczos: the relation that it maintains, and the eigenvalues that it finds.

Each search is judged by itself, without the certificate that `eigsh` adds.
"""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from cases import slow
from hypothesis import given, settings
from hypothesis import strategies as st
from matrices import matrix
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from curvop import HessianLinearOperator
from curvop.operators.base import WrappingLinearOperator
from curvop.spectrum import eigsh
from curvop.spectrum.counting import TimeUpError
from curvop.spectrum.lanczos import multiply
from curvop.spectrum.thick_restart import KrylovBasis, thick_restart

#: A triple eigenvalue at the top, of which ARPACK misses a member in 27 of 40 runs (scipy#26112).
TRIPLE = [1.0, 1.0, 1.0, 0.5, 0.4, *np.linspace(-0.1, 0.1, 295), -0.3, -0.3, -0.6]


class Products:
    """Products with the rows of a block, counted per row. After `most` products, time is up."""

    def __init__(self, A: np.ndarray, dtype: torch.dtype = torch.float64, most: float = math.inf) -> None:
        self.A, self.most, self.count, self.widths = torch.from_numpy(A).to(dtype), most, 0, set()

    def __call__(self, rows: torch.Tensor) -> torch.Tensor:
        if self.count >= self.most:
            raise TimeUpError
        self.count += len(rows)
        self.widths.add(len(rows))
        return rows @ self.A


def starts(block: int, size: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).standard_normal((block, size))).to(dtype)


def single_precision_hessian(dtype: type = np.float64) -> HessianLinearOperator:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(6, 30), torch.nn.Tanh(), torch.nn.Linear(30, 3))
    data = [(torch.randn(50, 6), torch.randn(50, 3))]
    return HessianLinearOperator(model, torch.nn.MSELoss(), model.parameters(), data, dtype=dtype)


def largest(values: np.ndarray, count: int) -> np.ndarray:
    return np.arange(len(values))[::-1][:count]


def assert_relation(krylov: KrylovBasis, A: np.ndarray, deflated: np.ndarray | None = None) -> None:
    """``A V' = V' H + Q' B`` on the complement of the deflated vectors, with orthonormal rows of V and Q."""
    V, Q = krylov.vectors.numpy(), krylov.block.numpy()
    rows = np.vstack([V, Q] if deflated is None else [deflated, V, Q])
    np.testing.assert_allclose(rows @ rows.T, np.eye(len(rows)), atol=1e-13)
    product = A @ V.T
    if deflated is not None:
        product -= deflated.T @ (deflated @ product)
    np.testing.assert_allclose(product, V.T @ krylov.projected + Q.T @ krylov.coupling, atol=2e-13)
    np.testing.assert_array_equal(krylov.projected, krylov.projected.T)


class TestRelation:
    @pytest.mark.parametrize("deflate", [False, True])
    @pytest.mark.parametrize("block", [1, 2, 3, 6])
    def test_it_holds_in_each_step_and_after_restarts(self, block: int, deflate: bool) -> None:
        A = matrix(TRIPLE)
        deflated = np.linalg.eigh(A)[1].T[-2:].copy() if deflate else None
        rows = None if deflated is None else torch.from_numpy(deflated)
        krylov = KrylovBasis(Products(A), starts(block, len(A)), 36, rows)
        for _ in range(3):
            while krylov.count + block <= 36:
                krylov.step()
                assert_relation(krylov, A, deflated)
            values, S = np.linalg.eigh(krylov.projected)
            krylov.restart(values[-18:], S[:, -18:])
            assert krylov.count == 18
            np.testing.assert_array_equal(krylov.projected, np.diag(values[-18:]))
            assert_relation(krylov, A, deflated)

    @pytest.mark.parametrize(
        "eigenvalues",
        [np.zeros(50), np.ones(50), [3.0, 2.0, 1.0, *np.zeros(47)], [*-np.ones(25), *np.ones(25)]],
        ids=["zero", "identity", "rank 3", "two values"],
    )
    def test_rank_deficient_blocks_are_replaced(self, eigenvalues: np.ndarray) -> None:
        A = matrix(eigenvalues)
        krylov = KrylovBasis(Products(A), starts(4, 50), 40)
        krylov.grow(40)
        assert_relation(krylov, A)

    @pytest.mark.parametrize("scales", [(1.0, 1.0), (1e-30, 1.0), (1e200, 1e200)])
    def test_dependent_starting_vectors(self, scales: tuple[float, float]) -> None:
        A, rows = matrix(TRIPLE), starts(3, len(TRIPLE))
        rows[1] = rows[0]
        rows[0] *= scales[0]
        rows[1] *= scales[1]
        krylov = KrylovBasis(Products(A), rows, 12)
        krylov.grow(12)
        assert_relation(krylov, A)


class TestEigenvalues:
    @pytest.mark.default_cases("*-1", "*-2", "BE-6")
    @pytest.mark.parametrize("block", [1, 2, 3, 4, 5, 6])
    @pytest.mark.parametrize("which", ["LA", "SA", "LM", "BE"])
    def test_against_dense_eigenvalues(self, block: int, which: str) -> None:
        eigenvalues = np.r_[np.linspace(-1, 1, 200) ** 3 * 0.5, 1.0, 0.8, -0.9, -0.7, 2.0, -2.0]
        A = matrix(eigenvalues)
        result = eigsh(A, 4, which, method="lanczos", block=block, certificate=False, progress=False)
        assert (result.method, result.converged) == ("lanczos", True)
        right = {"LA": [2, 1, 0.8, 0.5], "SA": [-2, -0.9, -0.7, -0.5], "LM": [2, -2, 1, -0.9], "BE": [-2, -0.9, 1, 2]}
        np.testing.assert_allclose(np.sort(result.values), np.sort(right[which]), atol=1e-13)
        np.testing.assert_allclose(A @ result.vectors, result.vectors * result.values, atol=1e-13)
        np.testing.assert_allclose(result.vectors.T @ result.vectors, np.eye(4), atol=1e-13)

    @settings(max_examples=30, deadline=None)
    @given(st.data())
    def test_multiple_eigenvalues(self, data: st.DataObject) -> None:
        """Multiplicities of up to the block size, at one end of a spectrum of 80 to 90 eigenvalues."""
        block = data.draw(st.integers(1, 5))
        levels = data.draw(st.lists(st.integers(1, block), min_size=1, max_size=4))
        k = sum(levels)
        eigenvalues = np.r_[np.repeat(1.0 + np.arange(len(levels)), levels), np.linspace(-0.5, 0.5, 90 - k)]
        A, exponent = matrix(eigenvalues), data.draw(st.sampled_from([-60, 0, 60]))
        multiply = Products(np.ldexp(A, exponent))
        basis = data.draw(st.integers(k + block, 60))
        found = thick_restart(multiply, starts(block, 90), k, basis, 0.0, 1000, largest)
        assert found.num_converged == k
        values = np.ldexp(found.values, -exponent)
        np.testing.assert_allclose(values, np.sort(eigenvalues)[::-1][:k], atol=1e-12)
        V = found.vectors.numpy()
        np.testing.assert_allclose(A @ V.T, V.T * values, atol=1e-12)

    @pytest.mark.parametrize("block", [1, 2, 3])
    def test_a_basis_of_almost_the_whole_space(self, block: int) -> None:
        A = matrix(np.arange(12.0))
        for basis in range(3 + block, 12 - block + 1):
            found = thick_restart(Products(A), starts(block, 12), 3, basis, 0.0, 1000, largest)
            np.testing.assert_allclose(found.values, [11, 10, 9], atol=1e-12)

    def test_almost_as_many_basis_vectors_as_rows(self) -> None:
        """There is no room for a block next to the basis, so that the matrix is formed."""
        A = matrix(np.arange(12.0))
        result = eigsh(A, 3, method="lanczos", ncv=11, block=4, certificate=False, progress=False)
        assert (result.method, result.products) == ("dense", 12)
        assert result.note == "the basis would have spanned the whole space"
        np.testing.assert_allclose(result.values, [9, 10, 11], atol=1e-12)

    @pytest.mark.parametrize("block", [1, 2, 3])
    def test_single_precision(self, block: int) -> None:
        A = matrix([3.0, 2.0, 2.0, *np.linspace(-1, 1, 197)])
        rows = starts(block, 200, torch.float32)
        found = thick_restart(Products(A, torch.float32), rows, 3, 30, 0.0, 100, largest)
        assert found.vectors.dtype == torch.float32
        assert found.num_converged == 3
        np.testing.assert_allclose(found.values, [3, 2, 2], atol=1e-5)

    @pytest.mark.parametrize(
        ("dtype", "tol", "eps", "precision"),
        [
            (np.float64, 1e-3, 2**-23, torch.float32),
            (np.float64, 1e-5, 2**-23, torch.float64),
            (np.float32, 1e-3, 2**-23, torch.float32),
            (np.float32, 1e-5, 2**-23, torch.float64),
            (np.float64, 1e-3, 2**-10, torch.float64),
        ],
        ids=["loose", "tight", "loose, single", "tight, single", "loose, TF32"],
    )
    def test_the_precision_of_the_basis(self, dtype: type, tol: float, eps: float, precision: torch.dtype) -> None:
        """It depends on the precision of the products. The eigenvectors are orthonormal in double precision."""
        H, seen = single_precision_hessian(dtype), set()

        class Watched(WrappingLinearOperator):
            def __init__(self) -> None:
                super().__init__(H.dtype, H.shape)
                self._A = H

            @property
            def epsilon(self) -> float:
                return eps

            def _apply(self, rows):
                seen.add(rows.dtype)
                return multiply(self._A, rows)

        result = eigsh(Watched(), 4, method="lanczos", tol=tol, certificate=False, progress=False)
        assert (seen, result.vectors.dtype, result.converged) == ({precision}, np.float64, True)
        np.testing.assert_allclose(result.vectors.T @ result.vectors, np.eye(4), atol=1e-14)
        dense = np.linalg.eigvalsh(H.to_dense().astype(np.float64))[-4:]
        np.testing.assert_allclose(result.values, dense, rtol=max(tol, 1e-5))
        residuals = np.linalg.norm(H @ result.vectors - result.vectors * result.values, axis=0)
        assert (residuals <= 2 * max(tol, 1e-5) * result.values).all()

    @pytest.mark.parametrize("method", ["lanczos", "arpack"])
    @pytest.mark.parametrize("scale", [1e-60, 1e200])
    def test_a_starting_vector_outside_the_range_of_single_precision(self, method: str, scale: float) -> None:
        A = matrix(np.arange(60.0)).astype(np.float32)
        options = {"method": method, "tol": 1e-3, "ncv": 20, "certificate": False, "progress": False}
        v0 = np.random.default_rng(0).standard_normal(60)
        expected = eigsh(A, 2, v0=v0, **options)
        scaled = np.ldexp(v0, round(math.log2(scale)))
        np.testing.assert_array_equal(eigsh(A, 2, v0=scaled, **options).values, expected.values)

    def test_small_eigenvalues_in_single_precision(self) -> None:
        """Residuals are relative to the eigenvalues, rounding errors to the norm."""
        eigenvalues = np.r_[1.0, 0.9, np.linspace(0, 0.5, 395), -0.01, -0.011, -0.013]
        A = matrix(eigenvalues).astype(np.float32)
        options = {"method": "lanczos", "certificate": False, "progress": False}
        result = eigsh(A, 3, "SA", tol=1e-4, **options)
        np.testing.assert_allclose(result.values, eigenvalues[:-4:-1], rtol=1e-4)
        residuals = np.linalg.norm(A @ result.vectors - result.vectors * result.values, axis=0)
        assert residuals.max() < 2e-6

    @pytest.mark.parametrize("scale", [1e60, 1e-36, 1e-60])
    def test_products_outside_the_range_of_single_precision(self, scale: float) -> None:
        H = single_precision_hessian()
        result = eigsh(scale * H, 3, method="lanczos", tol=1e-3, certificate=False, progress=False)
        np.testing.assert_allclose(result.values / scale, np.linalg.eigvalsh(H.to_dense())[-3:], rtol=1e-5)

    def test_more_memory_for_the_final_vectors_than_for_the_basis(self) -> None:
        A, k = matrix(np.linspace(1, 2, 300) ** 8).astype(np.float32), 40
        options = {"method": "lanczos", "tol": 1e-3, "ncv": 42, "certificate": False, "progress": False}
        assert eigsh(A, k, memory=3 * k * 300 * 4, **options).converged
        with pytest.raises(MemoryError):
            eigsh(A, k, memory=3 * k * 300 * 4 - 1, **options)

    def test_long_vectors_of_single_precision(self) -> None:
        """The CPU adds the terms of an inner product one by one, which would leave errors of 5e-5."""
        scales = torch.linspace(0, 1, 10**6) ** 9
        krylov = KrylovBasis(lambda rows: rows * scales, torch.ones(1, 10**6), 12)
        krylov.grow(12)
        rows = krylov.vectors.double()
        np.testing.assert_allclose(rows @ rows.T, np.eye(12), atol=5e-6)

    def test_a_given_starting_vector_is_the_first_of_the_block(self) -> None:
        """The other vectors are random, so that a start in an invariant subspace does not hide any eigenvalue."""
        A = np.diag([*np.arange(99.0), 200.0])
        start = 1e-9 * np.eye(100)[3]
        result = eigsh(A, 2, method="lanczos", block=2, v0=start, certificate=False, progress=False)
        np.testing.assert_allclose(result.values, [98, 200], rtol=1e-12)
        multiply = Products(A)
        krylov = KrylovBasis(multiply, torch.from_numpy(np.vstack([start, np.ones(100)])), 10)
        assert float(krylov.block[:, 3].square().sum()) == pytest.approx(1.0, abs=1e-14)


class TestProducts:
    @pytest.mark.parametrize(("block", "basis", "count"), [(1, 40, 40), (2, 40, 40), (3, 42, 42), (16, 48, 48)])
    def test_products_are_counted_per_column(self, block: int, basis: int, count: int) -> None:
        """The default basis is a multiple of the block, with room for two blocks next to the k eigenvectors."""
        A = matrix([5.0, 4.0, *np.zeros(198)])
        result = eigsh(A, 2, method="lanczos", block=block, certificate=False, progress=False)
        assert result.products == count
        multiply = Products(A)
        thick_restart(multiply, starts(block, 200), 2, basis, 0.0, 1000, largest)
        assert (multiply.count, multiply.widths) == (count, {block})

    def test_the_default_block_is_a_single_vector(self) -> None:
        A = matrix(np.linspace(0, 1, 100) ** 8)
        options = {"method": "lanczos", "certificate": False, "progress": False}
        by_default, two, one = (eigsh(A, 3, **options, **block).products for block in ({}, {"block": 2}, {"block": 1}))
        assert by_default == one < two

    def test_single_vectors_take_few_products(self) -> None:
        """As many as when each step orthogonalized the vector twice (commit 4254f4c).

        All eigenvalues are simple and far apart, so that the counts do not depend on the processor.
        """
        A = matrix([1.0, 0.8, 0.65, 0.5, 0.4, *np.linspace(-0.1, 0.1, 295), -0.35, -0.45, -0.6, -0.7, -0.9])
        for k, which, ncv, count in ((5, "LA", 12, 48), (5, "LM", 12, 32), (5, "SA", 12, 52), (2, "LA", 6, 54)):
            result = eigsh(A, k, which, method="lanczos", block=1, ncv=ncv, certificate=False, progress=False)
            assert result.products == count

    @pytest.mark.parametrize("block", [1, 3])
    def test_a_step_orthogonalizes_once(self, block: int) -> None:
        """A second pass over the basis is needed only if the first one cancels most of a vector."""
        A = matrix(np.random.default_rng(0).standard_normal(2000))
        krylov = KrylovBasis(Products(A), starts(block, 2000), 60)
        krylov.grow(30)
        with FlopCounterMode(display=False) as counter:
            krylov.grow(60)
        # The inner products of a pass. The counter does not count in-place operations, such as the subtraction.
        one_pass = sum(2 * block * 2000 * count for count in range(30 + block, 61, block))
        products = 2 * 2000 * 2000 * 30
        assert one_pass <= counter.get_total_flops() - products <= 1.4 * one_pass
        assert_relation(krylov, A)

    @pytest.mark.parametrize("block", [1, 3])
    def test_a_restart_copies_no_large_part_of_the_basis(self, block: int) -> None:
        """The relation holds after it, in all sections of the vectors."""
        scales = torch.linspace(0, 1, 10**6, dtype=torch.float64) ** 9
        krylov = KrylovBasis(lambda rows: rows * scales, starts(block, 10**6), 12)
        krylov.grow(12)
        values, S = np.linalg.eigh(krylov.projected)
        basis, sizes = krylov.vectors.untyped_storage().data_ptr(), []

        class Results(TorchDispatchMode):
            def __torch_dispatch__(self, function, types, args=(), kwargs=None):
                result = function(*args, **(kwargs or {}))
                sizes.extend(x.numel() for x in tree_leaves(result) if x.untyped_storage().data_ptr() != basis)
                return result

        with Results():
            krylov.restart(values[-6:], S[:, -6:])
        assert max(sizes) == block * 10**6  # a copy of the next block
        rows = torch.cat([krylov.vectors, krylov.block])
        np.testing.assert_allclose(rows @ rows.T, np.eye(6 + block), atol=1e-12)
        relation = np.hstack([krylov.projected, krylov.coupling.T])
        np.testing.assert_allclose(krylov.vectors * scales, torch.from_numpy(relation) @ rows, atol=1e-12)

    @pytest.mark.parametrize("most", [0, 2, 21, 30, 31, 44])
    def test_time_is_up_between_two_blocks(self, most: int) -> None:
        A = matrix(TRIPLE)
        multiply = Products(A, most=most)
        found = thick_restart(multiply, starts(3, len(A)), 4, 30, 0.0, 1000, largest)
        assert found.timed_out
        assert multiply.count == -(-most // 3) * 3
        assert len(found.values) == len(found.vectors) == min(4, multiply.count)
        V = found.vectors.numpy()
        np.testing.assert_allclose(V @ V.T, np.eye(len(V)), atol=1e-13)
        np.testing.assert_allclose(np.einsum("ij,ij->i", V @ A, V), found.values, atol=1e-13)

    def test_checks_between_restarts_save_products(self) -> None:
        A = matrix([5.0, 4.0, *np.zeros(198)])
        multiply = Products(A)
        found = thick_restart(multiply, starts(2, 200), 2, 40, 0.0, 1000, largest, interval=4)
        np.testing.assert_allclose(found.values, [5, 4], atol=1e-13)
        assert multiply.count <= 12


class TestClusters:
    @pytest.mark.parametrize("seed", [0, *slow(*range(1, 40))])
    @pytest.mark.parametrize("block", [2, 3, 4])
    def test_the_triple_of_scipy_26112(self, block: int, seed: int) -> None:
        options = {"method": "lanczos", "ncv": 30, "block": block, "rng": seed, "progress": False}
        search = eigsh(matrix(TRIPLE), 5, "LM", certificate=False, **options)
        np.testing.assert_allclose(np.sort(search.values), [-0.6, 0.5, 1, 1, 1], atol=1e-12)
        result = eigsh(matrix(TRIPLE), 5, "LM", **options)
        assert result.ok
        assert block > 2 or result.products <= 110

    @pytest.mark.parametrize("shape", [(3, 1e-6), *slow(*itertools.product(range(2, 7), (1e-10, 1e-6, 1e-3)))])
    @pytest.mark.parametrize("block", [1, 2, 3])
    def test_close_eigenvalues(self, block: int, shape: tuple[int, float]) -> None:
        size, gap = shape
        cluster = 1 + gap * np.arange(size) / (size - 1)
        eigenvalues = np.r_[cluster, 0.5, 0.4, np.linspace(-0.1, 0.1, 290), -0.3, -0.6]
        A, k = matrix(eigenvalues), size + 2
        for seed in range(3):
            options = {"method": "lanczos", "block": block, "rng": seed, "certificate": False, "progress": False}
            values = eigsh(A, k, "LM", **options).values
            np.testing.assert_allclose(np.sort(values), [-0.6, 0.5, *cluster], atol=1e-13)
