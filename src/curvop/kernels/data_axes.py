"""Find the axis of a layer's output that runs over the data items of a batch.

Kronecker factors and per-example gradients need the positions of each unit, such as a data item, in the output of a
layer. A model may move the data items to another axis, or join them with other axes. `possible_positions` therefore
compares the gradients of two cotangents whose units are scaled differently.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from curvop.kernels.layer_uses import Use

__all__ = ["Positions", "has_axis", "is_separated", "possible_positions", "unit_scales"]


class Positions(NamedTuple):
    """The axis of an output that runs over the units of a batch, such as its data items.

    The axis has ``outer * count * inner`` entries. The remaining entries of the axis, and the entries of all other
    axes, are the positions of a unit.

    Attributes
    ----------
    units : int
        Number of units.
    axis : int
    outer, inner : int
    joined : int
        Number of consecutive axes that are joined to one axis. The first of these axes is `axis`.
    """

    units: int
    axis: int
    outer: int
    inner: int
    joined: int = 1

    @property
    def kind(self) -> tuple[object, ...]:
        """Tuple that is equal for the same axis in batches of different sizes."""
        return self.axis, self.outer > 1, self.inner > 1, self.joined

    def split(self, tensor: Tensor, features: int = 1) -> Tensor:
        """Return a tensor of shape (units, P, ``*features``). The last `features` axes of `tensor` are no positions."""
        shape = tensor.shape[tensor.ndim - features :]
        if self.units == 1:
            return tensor.reshape(1, -1, *shape)
        moved = tensor.flatten(self.axis, self.axis + self.joined - 1).movedim(self.axis, 0)
        if self.outer == 1:
            return moved.reshape(self.units, -1, *shape)
        split = moved.reshape(self.outer, self.units, *moved.shape[1:]).movedim(1, 0)
        return split.reshape(self.units, -1, *shape)


def unit_scales(count: int) -> Tensor:
    """Return a factor between 1 and 2 for each unit. Factors of consecutive units differ by more than 0.3.

    No factor is between 1.4 and 1.6. If all units share a position, its gradient is multiplied by about their mean,
    1.5. It then differs from the factor of every unit, even if there are thousands of units.
    """
    parts = torch.arange(count, dtype=torch.float64).mul_(_GOLDEN_RATIO).frac_()
    return 1 + 0.8 * parts + 0.2 * (parts >= 0.5)


#: The multiples of this number modulo 1 are spread evenly, for every number of multiples.
_GOLDEN_RATIO = (math.sqrt(5) - 1) / 2


def possible_positions(
    use: Use, count: int, plain: Tensor | None, scaled: Tensor | None, tol: float
) -> list[Positions]:
    """Return the axes of an output along which the units of a batch, such as its data items, can be separated.

    Along such an axis, the gradients at the positions of a unit depend on the loss of this unit only. To find out,
    compute the gradients for two cotangents of the prediction: any cotangent r, and r with the part of each unit
    multiplied by its own factor. Then the gradients at the positions of each unit differ by the same factor.

    Parameters
    ----------
    use : Use
    count : int
        Number of units.
    plain, scaled : Tensor or None
        The gradient of the output for r, and for r multiplied by `unit_scales`. None stands for zeros.
    tol : float
        Tolerance, as a multiple of the largest entry of the gradient.

    Returns
    -------
    list of Positions
        Empty if the model couples the units. If there are several axes, the gradient does not determine the axis. For
        example, it may be zero.
    """
    candidates = list(_candidates(use.position_shape, count))
    if count == 1 or plain is None or scaled is None or not plain.numel():
        return candidates
    plain, scaled = use.by_position(plain), use.by_position(scaled)
    scales, bound = unit_scales(count).to(plain)[:, None, None], tol * plain.abs().max()
    # The comparison is False for NaN, because another check raises an error for factors that are not finite.
    return [
        option
        for option in candidates
        if not bool(((option.split(scaled) - scales * option.split(plain)).abs() > bound).any())
    ]


def is_separated(use: Use, count: int, plain: Tensor, scaled: Tensor, tol: float) -> bool:
    """Return True if the gradient at each position depends on the loss of a single unit.

    The positions of a unit need not lie along an axis of their own, as for `possible_positions`, whose parameters are
    the same. For example, the tokens of texts of different lengths may be joined into one sequence.
    """
    plain, scaled = use.by_position(plain), use.by_position(scaled)
    largest = torch.linalg.vector_norm(plain, math.inf)
    option = next(_candidates(use.position_shape, count), None)  # the most likely axis is quick to check
    if option is not None:
        scales = unit_scales(count).to(plain)[:, None, None]
        rest = torch.addcmul(option.split(scaled), option.split(plain), scales, value=-1)
        if bool(torch.linalg.vector_norm(rest, math.inf) <= tol * largest):
            return True
    plain, scaled = plain / largest, scaled / largest
    factors = ((plain * scaled).sum(-1) / plain.square().sum(-1)).nan_to_num(1.0)
    scales = unit_scales(count).to(factors).sort().values
    middles = (scales[1:] + scales[:-1]) / 2
    nearest = scales[torch.searchsorted(middles, factors.contiguous())]
    return not bool(((scaled - nearest[..., None] * plain).abs() > tol).any())


def has_axis(use: Use, count: int) -> bool:
    """Return True if the shape of the output allows an axis that runs over `count` units."""
    return any(True for _ in _candidates(use.position_shape, count))


def _candidates(shape: Sequence[int], count: int) -> Iterator[Positions]:
    if count == 1:
        yield Positions(1, 0, 1, 1)
        return
    for axis, size in enumerate(shape):
        if size == count:
            yield Positions(count, axis, 1, 1)
    for axis in range(len(shape)):
        for stop in range(axis + 2, len(shape) + 1):
            if math.prod(shape[axis:stop]) == count and 1 not in (shape[axis], shape[stop - 1]):
                yield Positions(count, axis, 1, 1, stop - axis)
    for axis, size in enumerate(shape):
        if size > count and size % count == 0:
            yield Positions(count, axis, 1, size // count)
            yield Positions(count, axis, size // count, 1)
