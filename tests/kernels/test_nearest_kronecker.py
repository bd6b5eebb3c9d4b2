"""Nearest Kronecker products, against the singular value decomposition of the rearranged matrix."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from curvop.kernels.nearest_kronecker import nearest_product_to_sum

GROUPS, M, N = 2, 3, 4


def semidefinite(generator: torch.Generator, size: int) -> Tensor:
    root = torch.randn(GROUPS, size, size, generator=generator, dtype=torch.float64)
    return root @ root.mT


def terms(count: int) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return [(semidefinite(generator, M), semidefinite(generator, N)) for _ in range(count)]


def rearranged(pairs: list[tuple[Tensor, Tensor]]) -> Tensor:
    """Form the matrix entry by entry, and sort its entries by the indices of the factors."""
    whole = torch.stack([sum(torch.kron(B[group], A[group]) for B, A in pairs) for group in range(GROUPS)])  # type: ignore[misc]
    return whole.reshape(GROUPS, M, N, M, N).permute(0, 1, 3, 2, 4).reshape(GROUPS, M * M, N * N)


def best(matrix: Tensor) -> Tensor:
    left, values, right = torch.linalg.svd(matrix)
    return values[:, :1, None] * left[:, :, :1] @ right[:, :1]


def product(left: Tensor, right: Tensor) -> Tensor:
    return left.flatten(1)[:, :, None] * right.flatten(1)[:, None]


def assert_nearest(left: Tensor, right: Tensor, matrix: Tensor, tolerance: float) -> None:
    torch.testing.assert_close(product(left, right), best(matrix), rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(left.flatten(1).norm(dim=1), right.flatten(1).norm(dim=1))
    for factor in (left, right):
        assert (torch.linalg.eigvalsh(factor) > 0).all()


class TestSums:
    @pytest.mark.parametrize("count", [1, 2, 4])
    def test_the_result_is_nearest(self, count: int) -> None:
        pairs = terms(count)
        assert_nearest(*nearest_product_to_sum(pairs), rearranged(pairs), 1e-11)

    def test_equal_terms(self) -> None:
        [(B, A)] = terms(1)
        left, right = nearest_product_to_sum([(B, A), (2 * B, A)])
        torch.testing.assert_close(product(left, right), product(3 * B, A), rtol=1e-12, atol=0)

    def test_diagonal_factors(self) -> None:
        pairs = [(B, A.diagonal(dim1=1, dim2=2)) for B, A in terms(3)]
        left, right = nearest_product_to_sum(pairs)
        dense_left, dense_right = nearest_product_to_sum([(B, torch.diag_embed(A)) for B, A in pairs])
        torch.testing.assert_close(left, dense_left)
        torch.testing.assert_close(torch.diag_embed(right), dense_right)

    def test_zero(self) -> None:
        left, right = nearest_product_to_sum([(torch.zeros(1, M, M), torch.zeros(1, N, N))] * 2)
        assert not left.any()
        assert not right.any()
