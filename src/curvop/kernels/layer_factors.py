"""The Kronecker factors of one layer, and the corrections of EKFAC, as sums over the uses of its parameters.

See `curvop.kernels.factor_sums` for the definitions.
"""

from __future__ import annotations

import bisect
import dataclasses
import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from curvop.kernels.data_axes import Positions
from curvop.kernels.kronecker_factors import BlockLayout
from curvop.kernels.layer_uses import Use
from curvop.kernels.nearest_kronecker import nearest_product_to_sum, normalized

__all__ = [
    "COUPLED",
    "FactorSettings",
    "LayerBlock",
    "LayerFactors",
    "add_gram",
    "add_inputs",
    "input_chunks",
    "summed_inputs",
]

#: Largest number of entries of temporary tensors, such as unfolded images and per-example gradients.
_MAX_ENTRIES = 1 << 22
#: Smallest numbers of rows of a Gram matrix that is computed in two panels, and in four.
_MIN_PANELS = 128, 256
#: Number of rows of a symmetric matrix that are copied at once. Their transpose fits into the cache of the processor.
_MIRRORED = 256


@dataclasses.dataclass(frozen=True)
class FactorSettings:
    """Settings of Kronecker factors.

    Attributes
    ----------
    sharing : {'expand', 'reduce'}
        How positions are treated; see the module docstring.
    joint_bias : bool
        Whether a weight and its bias form one block.
    max_factor : int
        Factors with more rows are replaced by their diagonals.
    forward_only : bool
        Whether the output factors are identity matrices.
    corrected : bool
        Whether to compute the corrections of EKFAC.
    nearest : float or None
        If it is a number, the factors are those of the nearest Kronecker products. The power method stops when they
        change by less than this in a step, relative to their norms.
    """

    sharing: str = "expand"
    joint_bias: bool = True
    max_factor: int = 8192
    forward_only: bool = False
    corrected: bool = False
    nearest: float | None = None


@dataclasses.dataclass(eq=False)
class LayerFactors:
    """The factors of one block ``V -> output V input'``.

    Attributes
    ----------
    layout : BlockLayout
    output : Tensor, shape (G, m, m) or (G, m)
        The factor of the derivatives with respect to the outputs. A tensor of shape (G, m) contains the diagonals.
    input : Tensor, shape (G, n, n) or (G, n)
        The factor of the inputs.
    output_vectors, input_vectors : Tensor, shape (G, m, m) and (G, n, n), or None
        Eigenvectors of the factors. None stands for identity matrices. They are set together with `eigenvalues`.
    eigenvalues : Tensor, shape (G, m, n), or None
        The diagonal of the exact block in the basis of the eigenvectors.
    """

    layout: BlockLayout
    output: Tensor
    input: Tensor
    output_vectors: Tensor | None = None
    input_vectors: Tensor | None = None
    eigenvalues: Tensor | None = None


class _Sums:
    """Sums over positions for the uses of a block in one orientation.

    Attributes
    ----------
    input, output : Tensor or None
        Sums of ``a a'`` and ``g g'``. Only the upper triangles are needed.
    count : float
        Number of positions, or of data items.
    offsets : int
        Number of entries of a vector a that belong to the same channel. If it is larger than 1, the entries are in the
        order of `Use.vectors_by_offset`.
    """

    def __init__(self) -> None:
        self.offsets = 1
        self.input: Tensor | None = None
        self.output: Tensor | None = None
        self.count = 0.0


class LayerBlock:
    """The sums of one block.

    Attributes
    ----------
    sums : dict of bool to _Sums
        The sums of the uses of the block. The key is True for uses of the transposed matrix.
    factors : LayerFactors
        The factors. The method `finish` sets this attribute.
    """

    factors: LayerFactors
    _corrections: Tensor | None = None
    _partial: Tensor | None = None

    def __init__(self, layout: BlockLayout, use: Use, settings: FactorSettings, like: Tensor) -> None:
        self.layout, self._offsets, self._settings, self.like = layout, use.offsets, settings, like
        self.sums: dict[bool, _Sums] = {}

    @property
    def bias_only(self) -> bool:
        """Whether the block has no weight, so that all its inputs are 1."""
        return self.layout.inputs == 0

    def flips(self, use: Use) -> bool:
        """Return True if a use applies the transpose of the block."""
        return not self.bias_only and use.weight is not None and use.weight.transposed != self.layout.transposed

    def agrees(self, use: Use) -> bool:
        """Return True if the sizes of a use agree with those of the block."""
        if not self.bias_only and use.offsets != self._offsets:  # a convolution and a matrix product
            return False
        outputs, inputs = use.outputs, 0 if self.bias_only else use.inputs
        sizes = (inputs, outputs) if self.flips(use) else (outputs, inputs)
        return (use.groups, *sizes) == (self.layout.groups, self.layout.outputs, self.layout.inputs)

    def of(self, use: Use) -> _Sums:
        """Return the sums for the orientation of a use."""
        return self.sums.setdefault(self.flips(use), _Sums())

    def columns(self, use: Use) -> int:
        """Return the number of entries of an input of a use, including the 1 of the bias."""
        return 1 if self.bias_only else use.inputs + self.layout.bias

    def new_factor(self, size: int, diagonal: bool) -> Tensor:
        """Return a factor of zeros. It is diagonal if `diagonal` is True or if it has more than ``max_factor`` rows."""
        diagonal = diagonal or size > self._settings.max_factor
        shape = (self.layout.groups, size) if diagonal else (self.layout.groups, size, size)
        return self.like.new_zeros(shape)

    def bytes(self, use: Use) -> int:
        """Return the number of bytes of the factors that a use needs."""
        limit, sparse = self._settings.max_factor, use.one_hot and self._settings.sharing == "expand"
        entries = 0
        for size, diagonal in ((use.outputs, False), (self.columns(use), sparse and not self.bias_only)):
            entries += size if diagonal or size > limit else size * size
        if self._settings.corrected:
            entries = 3 * entries + self.layout.outputs * self.layout.columns  # eigenvectors are computed in float64
        if self._settings.nearest is not None:
            entries *= 2
        return entries * self.layout.groups * self.like.element_size()

    def add_output(self, use: Use, g: Tensor, weight: float) -> None:
        """Add ``weight * g g'`` for all rows of ``g``, of shape (P, groups, outputs)."""
        sums = self.of(use)
        if sums.output is None:
            sums.output = self.new_factor(use.outputs, False)
        add_gram(sums.output, g, weight)

    def finish(self, divisor: float) -> None:
        """Compute the factors from the sums, which are divided by `divisor`."""
        terms = {}
        for flipped, sums in self.sums.items():
            assert sums.input is not None
            _mirror(sums.input)
            sums.input = _by_channel(sums.input, sums.offsets)
            sums.input.div_(sums.count or 1.0)
            if sums.output is None:
                size = self.layout.inputs if flipped else self.layout.outputs
                sums.output = self.new_factor(size, False)
                if self._settings.forward_only:
                    (sums.output if sums.output.ndim == 2 else sums.output.diagonal(dim1=-2, dim2=-1)).fill_(1.0)
            else:
                _mirror(sums.output)
                sums.output.div_(divisor)
            terms[flipped] = (sums.input, sums.output) if flipped else (sums.output, sums.input)
        pairs = list(terms.values())
        if len(pairs) > 1:
            outputs, inputs = (_alike([pair[side] for pair in pairs]) for side in (0, 1))
            pairs = [nearest_product_to_sum(list(zip(outputs, inputs, strict=True)))]
        [(output, input_)] = pairs
        self.factors = LayerFactors(self.layout, output, input_)

    # Corrections of EKFAC.

    def start_corrections(self) -> None:
        """Compute the eigenvectors of the factors."""
        factors = self.factors
        factors.output_vectors, factors.input_vectors = _eigenvectors(factors.output), _eigenvectors(factors.input)
        self._corrections = factors.eigenvalues = self.like.new_zeros(self.layout.dims)

    def start_diagonal(self) -> None:
        """Prepare the block of a normalization, whose corrections are the diagonal of the exact block."""
        ones = self.like.new_ones(self.layout.groups, 1)
        self._corrections = self.like.new_zeros(self.layout.dims)
        self.factors = LayerFactors(self.layout, ones, ones, None, None, self._corrections)

    def divide_corrections(self, divisor: float) -> None:
        """Divide the sum of the corrections by `divisor`."""
        if self._corrections is not None:
            self._corrections.div_(divisor)

    def add_gradients(
        self, uses: Sequence[tuple[Use, Tensor, Positions]], weight: float, cache: dict[Any, Any]
    ) -> None:
        """Add the gradients of all units to the corrections, or to the factor that `start_partial` has prepared.

        Parameters
        ----------
        uses : sequence of (Use, Tensor, Positions)
            The uses of the block, the gradients of their outputs, and the positions of their units.
        weight : float
        cache : dict
            Keeps the rotated inputs for the other columns of the same batch.
        """
        if self._partial is not None:
            self._add_partial(self._partial, uses, weight, cache)
        elif self._corrections is not None:
            self._add_squares(self._corrections, uses, weight, cache)

    def _add_squares(
        self,
        total: Tensor,
        uses: Sequence[tuple[Use, Tensor, Positions]],
        weight: float,
        cache: dict[Any, Any],
    ) -> None:
        """Add the squares of the gradients of all units in the basis of the eigenvectors, multiplied by `weight`."""
        if len(uses) == 1 and uses[0][0].one_hot and self._has_sparse_inputs(uses[0][0]):
            self._add_sparse(total, *uses[0], weight)
            return
        sides = [_Sides(self, use, gradient, positions, cache) for use, gradient, positions in uses]
        if len(sides) == 1 and sides[0].is_single:
            left, right = sides[0].rows(slice(None), self._vectors)
            left, right = left[:, 0].square(), right[:, 0].square()
            total.baddbmm_(left.permute(1, 2, 0), right.permute(1, 0, 2), alpha=weight)
            return
        for gradients in self._unit_gradients(sides, uses[0][2].units, self._vectors):
            total.add_(gradients.square_().sum(0), alpha=weight)

    def _unit_gradients(
        self, sides: Sequence[_Sides], units: int, vectors: tuple[Tensor | None, Tensor | None]
    ) -> Iterator[Tensor]:
        """Yield the gradients of the units of a chunk, of shape (units, groups, m, n), in the rotated coordinates."""
        per_unit = max(self.layout.size, *(side.entries_per_unit for side in sides))
        step = max(1, _MAX_ENTRIES // max(per_unit, 1))
        for start in range(0, units, step):
            chunk = slice(start, min(start + step, units))
            whole: Tensor | None = None
            for side in sides:
                part = side.product(chunk, vectors)
                whole = part if whole is None else whole + part
            assert whole is not None
            yield whole

    @property
    def _vectors(self) -> tuple[Tensor | None, Tensor | None]:
        return self.factors.output_vectors, self.factors.input_vectors

    def _has_sparse_inputs(self, use: Use) -> bool:
        """Return True if the factor of the inputs of an embedding is diagonal, so that its basis are unit vectors."""
        left, right = self._vectors
        return (left if self.flips(use) else right) is None

    def _add_sparse(self, total: Tensor, use: Use, gradient: Tensor, positions: Positions, weight: float) -> None:
        """Add the corrections of an embedding whose input factor is diagonal."""
        flipped = self.flips(use)
        vectors = self._vectors[1 if flipped else 0]
        tokens, sums = self._sparse_gradients(use, gradient, positions)
        squares = (sums if vectors is None else sums @ vectors[0]).square_()
        total = total[0] if flipped else total[0].T  # (inputs, outputs)
        total.index_add_(0, tokens, squares, alpha=weight)

    @staticmethod
    def _sparse_gradients(use: Use, gradient: Tensor, positions: Positions) -> tuple[Tensor, Tensor]:
        """Return ``(tokens, rows)``: the nonzero rows of the gradients of all units, for the weight of an embedding."""
        g = positions.split(use.by_position(gradient))
        index = positions.split(use.indices()[..., None])[..., 0]
        kept = index >= 0
        unit = torch.arange(len(index), device=index.device)[:, None].expand_as(index)
        keys, inverse = torch.unique(unit[kept] * use.inputs + index[kept], return_inverse=True)
        return keys % use.inputs, g.new_zeros(len(keys), use.outputs).index_add_(0, inverse, g[kept])

    # Nearest Kronecker products of KFOC: the power method on the rearranged block.

    def start_products(self) -> None:
        """Scale the factors of KFAC to norm 1."""
        for name in ("output", "input"):
            setattr(self.factors, name, normalized(getattr(self.factors, name)))

    def start_partial(self, side: str) -> None:
        """Prepare the computation of one factor, 'output' or 'input', from the other one."""
        self._side, self._partial = side, torch.zeros_like(getattr(self.factors, side))

    def finish_partial(self, divisor: float) -> float:
        """Replace the factor by the sum of `add_gradients`, scaled to norm 1. Return the norm of the change."""
        assert self._partial is not None
        partial, self._partial = self._partial.div_(divisor), None
        if partial.ndim == 3:
            partial = (partial + partial.mT) / 2
        self._scale = partial.flatten(1).norm(dim=1)  # the singular value
        before, after = getattr(self.factors, self._side), normalized(partial)
        setattr(self.factors, self._side, after)
        return float((after - before).flatten(1).norm(dim=1).max())

    def finish_products(self) -> None:
        """Scale the factors, so that their product is the nearest one. Both factors have the same norm."""
        for name in ("output", "input"):
            factor = getattr(self.factors, name)
            setattr(self.factors, name, factor * self._scale.sqrt().reshape(-1, *[1] * (factor.ndim - 1)))

    def _add_partial(
        self, total: Tensor, uses: Sequence[tuple[Use, Tensor, Positions]], weight: float, cache: dict[Any, Any]
    ) -> None:
        """Add ``G A G'`` for the gradient G of each unit and the input factor A, or ``G' B G`` for the other side."""
        if len(uses) == 1 and uses[0][0].one_hot and not self.flips(uses[0][0]) and self.factors.input.ndim == 2:
            self._add_sparse_partial(total, *uses[0], weight)
            return
        of_output = self._side == "output"
        other = self.factors.input if of_output else self.factors.output
        sides = [_Sides(self, use, gradient, positions, cache) for use, gradient, positions in uses]
        if len(sides) == 1 and sides[0].is_single:  # G = g a'
            g, a = (vectors[:, 0] for vectors in sides[0].rows(slice(None), (None, None)))
            own, fixed = (g, a) if of_output else (a, g)
            scale = (_times(fixed, other) * fixed).sum(-1, keepdim=True)
            if total.ndim == 2:
                total.add_((own.square() * scale).sum(0), alpha=weight)
            else:
                total.baddbmm_((own * scale).permute(1, 2, 0), own.permute(1, 0, 2), alpha=weight)
            return
        for gradients in self._unit_gradients(sides, uses[0][2].units, (None, None)):
            G = gradients if of_output else gradients.mT
            product = G * other[:, None, :] if other.ndim == 2 else G @ other
            if total.ndim == 2:
                total.add_((product * G).sum((0, 3)), alpha=weight)
            else:
                total.add_(torch.einsum("ugik,ugjk->gij", product, G), alpha=weight)

    def _add_sparse_partial(
        self, total: Tensor, use: Use, gradient: Tensor, positions: Positions, weight: float
    ) -> None:
        """Do the same as `_add_partial` for an embedding whose input factor is diagonal."""
        tokens, rows = self._sparse_gradients(use, gradient, positions)
        if self._side == "input":
            squares = (_times(rows[:, None], self.factors.output)[:, 0] * rows).sum(1)
            total[0].index_add_(0, tokens, squares, alpha=weight)
            return
        scale = self.factors.input[0, tokens, None]
        if total.ndim == 2:
            total[0].add_((rows.square() * scale).sum(0), alpha=weight)
        else:
            total[0].addmm_((rows * scale).T, rows, alpha=weight)


class _Sides:
    """The outputs and inputs of a use, in the coordinates of a block."""

    def __init__(
        self, block: LayerBlock, use: Use, gradient: Tensor, positions: Positions, cache: dict[Any, Any]
    ) -> None:
        self._block, self._use, self._positions, self._cache = block, use, positions, cache
        self._flipped = block.flips(use)
        self._g = positions.split(use.gradients(gradient), 2)  # (units, positions, groups, outputs)
        length = self._g.shape[1]
        self.is_single = length == 1
        m, n = use.outputs, block.columns(use)
        # Rotating the vectors of all positions, or rotating the gradient of each unit.
        self._rotates_vectors = length * (m * m + n * n) <= m * n * (m + n)
        if use.windows is not None and not use.windows.is_pointwise and not self.is_single:
            self._rotates_vectors = False
        self.entries_per_unit = length * use.groups * (n if use.windows is not None or use.one_hot else 0)

    def _inputs(self, chunk: slice) -> Tensor:
        """Return the vectors a in the shape (units, positions, groups, inputs + bias)."""
        use, positions = self._use, self._positions
        if self._block.bias_only:
            return self._g.new_ones(len(self._g[chunk]), self._g.shape[1], use.groups, 1)
        if use.one_hot:
            index = positions.split(use.indices()[..., None])[chunk, :, 0]
            a = self._g.new_zeros(*index.shape, use.inputs + 1)
            a.scatter_(-1, index[..., None] % (use.inputs + 1), 1.0)  # the index -1 is the last column
            a = a[..., None, :-1]
        else:
            if not _has_images(use, positions):
                a = positions.split(use.all_vectors(), 2)[chunk]
            else:
                own = _images(use.batched_input(), positions, chunk)
                a = own[1].split(use.vectors(own[0]), 2)
        if self._block.layout.bias:
            a = torch.cat([a, a.new_ones(*a.shape[:-1], 1)], -1)
        return a

    def rows(self, chunk: slice, vectors: tuple[Tensor | None, Tensor | None]) -> tuple[Tensor, Tensor]:
        """Return the vectors of the chunk on the left and on the right of the block, multiplied by eigenvectors."""
        own, other = vectors[::-1] if self._flipped else vectors
        g = _rotated(self._g[chunk], own)
        if self._use.windows is not None and not self.is_single:
            a = _rotated(self._inputs(chunk), other)
        else:
            key = id(self._use), id(self._block)
            if key not in self._cache:
                self._cache[key] = _rotated(self._inputs(slice(None)), other)
            a = self._cache[key][chunk]
        return (a, g) if self._flipped else (g, a)

    def product(self, chunk: slice, vectors: tuple[Tensor | None, Tensor | None]) -> Tensor:
        """Return the gradients of the units of a chunk, of shape (units, groups, m, n), in the rotated coordinates."""
        if self._use.is_norm:
            return (self._g[chunk] * self._inputs(chunk)).sum(1)[..., None]
        if self._rotates_vectors:
            left, right = self.rows(chunk, vectors)
            return left.permute(0, 2, 3, 1) @ right.permute(0, 2, 1, 3)
        g, a = self._g[chunk], self._inputs(chunk)
        left, right = (a, g) if self._flipped else (g, a)
        whole = left.permute(0, 2, 3, 1) @ right.permute(0, 2, 1, 3)
        if vectors[0] is not None:
            whole = vectors[0].mT @ whole
        return whole if vectors[1] is None else whole @ vectors[1]


def _times(vectors: Tensor, factor: Tensor) -> Tensor:
    """Multiply vectors of shape (P, groups, size) by a symmetric factor or by its diagonal."""
    return vectors * factor if factor.ndim == 2 else torch.einsum("pgi,gij->pgj", vectors, factor)


def _images(x: Tensor, positions: Positions, chunk: slice) -> tuple[Tensor, Positions]:
    """Return the images of the units of a chunk, and the positions of these units."""
    start, stop, _ = chunk.indices(positions.units)
    own = x.unflatten(0, (positions.outer, positions.units, positions.inner))[:, start:stop].flatten(0, 2)
    return own, positions._replace(units=stop - start)


def _has_images(use: Use, positions: Positions) -> bool:
    """Return True if each unit consists of images, so that a few units can be unfolded at a time."""
    if use.windows is None or len(use.position_shape) == len(use.windows.kernel):  # a single image
        return False
    return positions.units > 1 and positions.axis == 0 and positions.joined == 1


def _rotated(vectors: Tensor, basis: Tensor | None) -> Tensor:
    """Multiply vectors of shape (units, positions, groups, size) by the transposed eigenvectors of each group."""
    if basis is None:
        return vectors
    if len(basis) == 1:
        return vectors @ basis[0]
    return torch.einsum("upgi,gij->upgj", vectors, basis)


COUPLED = (
    "the model couples the data items of a batch, or does not compute them along an axis of their own, so that the "
    "gradient of a data item is not known: call model.eval() if the model has batch normalization, use KFAC "
    "(in preconditioner.kfac, ekfac=False) with sharing='expand', or pass fewer parameters"
)


def _eigenvectors(factor: Tensor) -> Tensor | None:
    return None if factor.ndim == 2 else torch.linalg.eigh(factor.double())[1].to(factor.dtype)


def _mirror(factor: Tensor) -> None:
    """Copy the upper triangle of each matrix to the lower triangle."""
    if factor.ndim == 2:
        return
    size = factor.shape[-1]
    width = min(size, _MIRRORED)
    upper = torch.ones(width, width, dtype=torch.bool, device=factor.device).triu_()
    for start in range(0, size, width):
        rows = slice(start, min(start + width, size))
        square = factor[:, rows, rows]
        square.copy_(torch.where(upper[: square.shape[1], : square.shape[1]], square, square.mT))
        if rows.stop < size:
            factor[:, rows.stop :, rows] = factor[:, rows, rows.stop :].mT


def _by_channel(factor: Tensor, offsets: int) -> Tensor:
    """Change the order of the rows and columns of a factor from `Use.vectors_by_offset` to `Use.vectors`."""
    if offsets == 1:
        return factor
    size = factor.shape[1] // offsets * offsets  # the last row may belong to the bias
    old, new = (offsets, size // offsets), (size // offsets, offsets)
    result = torch.empty_like(factor)
    if factor.ndim == 2:
        result[:, :size].unflatten(1, new).copy_(factor[:, :size].unflatten(1, old).mT)
        result[:, size:] = factor[:, size:]
        return result
    source, target = factor[:, :size, :size], result[:, :size, :size]
    target.unflatten(2, new).unflatten(1, new).copy_(source.unflatten(2, old).unflatten(1, old).permute(0, 2, 1, 4, 3))
    result[:, size:, :size].unflatten(2, new).copy_(factor[:, size:, :size].unflatten(2, old).mT)
    result[:, :size, size:] = result[:, size:, :size].mT
    result[:, size:, size:] = factor[:, size:, size:]
    return result


def _panels(size: int) -> list[slice]:
    """Return slices that divide the rows of a symmetric matrix into panels.

    The part of each panel from the diagonal on is one matrix product. With four panels, a Gram matrix takes 5/8 of the
    operations of a full product. Measured on a CPU, it takes 2/3 of the time for 256 or more rows, and longer for 128.
    """
    count = (1, 2, 4)[bisect.bisect(_MIN_PANELS, size)]
    width = -(-size // count) or 1
    return [slice(start, min(start + width, size)) for start in range(0, size, width)]


def add_gram(total: Tensor, vectors: Tensor, weight: float = 1.0) -> None:
    """Add ``weight * v v'`` for all rows of vectors of shape (P, groups, size). Only upper triangles are needed."""
    if total.ndim == 2:
        total.add_(vectors.square().sum(0), alpha=weight)
    elif len(total) == 1:
        v = vectors[:, 0]
        for rows in _panels(v.shape[1]):
            total[0, rows, rows.start :].addmm_(v[:, rows].T, v[:, rows.start :], alpha=weight)
    else:
        total.baddbmm_(vectors.permute(1, 2, 0), vectors.permute(1, 0, 2), alpha=weight)


def _alike(factors: Sequence[Tensor]) -> list[Tensor]:
    """Return all factors as matrices if one factor is a matrix. Otherwise, return the diagonals unchanged."""
    if all(factor.ndim == 2 for factor in factors):
        return list(factors)
    return [torch.diag_embed(factor) if factor.ndim == 2 else factor for factor in factors]


def input_chunks(use: Use) -> Iterator[Tensor]:
    """Yield the vectors a of a use in the shape (P, groups, inputs), divided into chunks if they must be unfolded.

    The entries are in the order of `Use.vectors_by_offset`.
    """
    x = use.batched_input()
    step = max(len(x), 1) if x.ndim else 1
    if use.windows is not None and not use.windows.is_pointwise:
        step = max(1, _MAX_ENTRIES * len(x) // max(use.vector_entries(), 1))
    for start in range(0, len(x) if x.ndim > 1 else 1, step):
        part = x[start : start + step] if x.ndim > 1 else x
        yield use.vectors_by_offset(part).reshape(-1, use.groups, use.inputs)


def add_inputs(total: Tensor, vectors: Tensor, inputs: int) -> None:
    """Add ``a a'`` for all rows of `vectors`. If `total` has one more row, the last entry of each vector is 1."""
    bias = total.shape[1] > inputs
    if not bias:
        add_gram(total, vectors)
    elif total.ndim == 2:
        total[:, :-1].add_(vectors.square().sum(0))
        total[:, -1] += len(vectors)
    else:
        add_gram(total[:, :-1, :-1], vectors)
        total[:, :-1, -1] += vectors.sum(0)
        total[:, -1, -1] += len(vectors)


def summed_inputs(block: LayerBlock, use: Use, positions: Positions) -> tuple[Tensor, Tensor]:
    """Return ``(sums, lengths)``: the sum of the inputs of each data item, and the number of its positions.

    The sums have the shape (units, groups, columns), and the numbers have the shape (units,).
    """
    length = math.prod(use.position_shape) // positions.units
    lengths = block.like.new_full((positions.units,), length)
    if block.bias_only:
        return lengths[:, None, None].expand(-1, use.groups, 1), lengths
    if use.one_hot:
        index = positions.split(use.indices()[..., None])[..., 0]
        counts = block.like.new_zeros(positions.units, use.inputs + 1)
        counts.scatter_add_(1, index % (use.inputs + 1), counts.new_ones(()).expand(index.shape))
        counts = counts[:, :-1]  # the last column counts the padding
        return counts[:, None], counts.sum(1)
    if not _has_images(use, positions):
        total = positions.split(use.all_vectors(), 2).sum(1)
    else:
        x, parts = use.batched_input(), []
        step = max(1, _MAX_ENTRIES * positions.units // max(use.vector_entries(), 1))
        for start in range(0, positions.units, step):
            own, own_positions = _images(x, positions, slice(start, start + step))
            parts.append(own_positions.split(use.vectors(own), 2).sum(1))
        total = torch.cat(parts)
    if block.layout.bias:
        total = torch.cat([total, total.new_full((*total.shape[:2], 1), length)], -1)
    return total, lengths
