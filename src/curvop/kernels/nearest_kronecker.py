"""Kronecker products that are nearest to a matrix in the Frobenius norm.

Let M be a matrix of shape (m * n, m * n) with the entries ``M[(i, k), (j, l)]``. Its rearrangement R(M) is the matrix
of shape (m * m, n * n) with the rows (i, j) and the columns (k, l). As ``R(B x A) = vec(B) vec(A)'`` for a Kronecker
product, the product nearest to M is given by the largest singular value of R(M) and its singular vectors (Van Loan and
Pitsianis, "Approximation with Kronecker products", 1993). The factors are symmetric and positive semidefinite if M is.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["nearest_product_to_sum", "normalized"]


def nearest_product_to_sum(terms: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Compute the Kronecker product nearest to a sum of Kronecker products, in closed form.

    Parameters
    ----------
    terms : sequence of tuple of Tensor
        Factors B and A of the terms, of shape (groups, m, m) and (groups, n, n). Each factor may also be the diagonal
        of a diagonal matrix, of shape (groups, m) or (groups, n), in all terms.

    Returns
    -------
    left, right : Tensor
        Factors of the nearest product, with the same norm in each group and traces >= 0.

    Notes
    -----
    The rearrangement of a sum of K products is ``V U'``. The columns of V and U are the vectors of the factors.
    If ``G = V' V`` and ``H = U' U = C C'``, the eigenvectors y of the symmetric K x K matrix ``C' G C`` give the left
    singular vectors ``V C y`` and the right singular vectors ``U G C y``, up to their norms.
    """
    left, right = (torch.stack([term[side].double().flatten(1) for term in terms], 1) for side in (0, 1))
    gram, other = left @ left.mT, right @ right.mT
    values, basis = torch.linalg.eigh(other)
    root = (basis * values.clamp(min=0).sqrt()[:, None]) @ basis.mT  # symmetric, as `other` may be singular
    squares, weights = torch.linalg.eigh(root @ gram @ root)
    square = squares[:, -1:, None].clamp(min=0)  # of the singular value
    combination = (root @ weights[:, :, -1:]).mT
    first = combination @ left  # the left singular vector times the singular value
    second = combination @ gram @ right / square.clamp(min=torch.finfo(square.dtype).tiny)
    scale = torch.where(square > 0, square**-0.25, 0.0)
    factors = [scale * first, torch.where(square > 0, square**0.25, 0.0) * second]
    shapes = terms[0][0], terms[0][1]
    sign = _trace(factors[0].reshape(shapes[0].shape)).sign()
    first, second = (
        (sign.reshape(-1, *[1] * (like.ndim - 1)) * factor.reshape(like.shape)).to(like.dtype)
        for factor, like in zip(factors, shapes, strict=True)
    )
    return first, second


def _trace(factor: Tensor) -> Tensor:
    return (factor if factor.ndim == 2 else factor.diagonal(dim1=1, dim2=2)).sum(-1)


def normalized(factor: Tensor) -> Tensor:
    """Scale the matrix or diagonal of each group to Frobenius norm 1. Zeros are returned unchanged."""
    norm = factor.flatten(1).norm(dim=1).reshape(-1, *[1] * (factor.ndim - 1))
    return factor / torch.where(norm > 0, norm, torch.ones_like(norm))
