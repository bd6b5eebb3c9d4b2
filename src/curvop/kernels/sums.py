"""Adding a batch's products to the sums over all."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

__all__ = ["add_sums", "set_sums"]


def set_sums(totals: Sequence[Tensor], cotangents: Sequence[Tensor | None], share: float) -> None:
    """Begin sums; their share is 1. Cheaper than to add to zero, where the sums are in another precision."""
    for total, cotangent in zip(totals, cotangents, strict=True):
        if cotangent is None:
            total.zero_()
        else:
            total.copy_(cotangent)


def add_sums(totals: Sequence[Tensor], cotangents: Sequence[Tensor | None], share: float) -> None:
    """Add a batch's cotangents, times its share, to sums that are begun."""
    for total, cotangent in zip(totals, cotangents, strict=True):
        if cotangent is not None:
            total.add_(cotangent, alpha=share)
