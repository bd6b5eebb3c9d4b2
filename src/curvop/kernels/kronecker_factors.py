"""Kronecker factors of the curvature blocks of layers, and the layouts of these blocks.

A Kronecker-factored block multiplies a matrix V by two factors, ``V -> B V A'``. The rows of V belong to the outputs of
a layer, and its columns to the inputs. `BlockLayout` says which entry of which parameter is which entry of V.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

__all__ = ["BlockLayout", "FlatLayout"]


@dataclass(frozen=True)
class BlockLayout:
    """Layout of the parameters of one layer as a stack of matrices V of shape (groups, outputs, inputs + bias).

    Parameters
    ----------
    names : tuple of str
        Names of the parameters: a weight, a weight and a bias, or a bias.
    shapes : tuple of torch.Size
        Shapes of the parameters.
    groups : int
        Number of groups. It is 1 except for grouped convolutions.
    outputs, inputs : int
        Number of rows and columns of the weight in each group. The number of inputs is 0 for a bias without a weight.
    bias : bool
        Whether the last name is a bias. A bias is the last column of V.
    transposed : bool
        Whether the stored weight has the shape (groups * inputs, outputs).
    rows : tuple of int, optional
        Tuple ``(start, stop)`` if the block covers only these entries of the first axis of each parameter.
    """

    names: tuple[str, ...]
    shapes: tuple[torch.Size, ...]
    groups: int
    outputs: int
    inputs: int
    bias: bool = False
    transposed: bool = False
    rows: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        sizes = self.sizes
        if len(self.names) != len(sizes) or len(self.shapes) != len(sizes):
            raise ValueError(f"the block needs {len(sizes)} parameters, but the names are {self.names}")
        for name, shape, size in zip(self.names, self.shapes, sizes, strict=True):
            start, stop = self._bounds(shape)
            if not 0 <= start <= stop <= shape[0] or shape[1:].numel() * (stop - start) != size:
                raise ValueError(f"{name!r} has shape {tuple(shape)}, but the block needs {size} entries")

    @property
    def columns(self) -> int:
        """Number of columns of V: the inputs, and the bias."""
        return self.inputs + self.bias

    @property
    def dims(self) -> tuple[int, int, int]:
        """Shape of V."""
        return self.groups, self.outputs, self.columns

    @property
    def sizes(self) -> tuple[int, ...]:
        """Number of entries of each parameter that the block covers."""
        weight = (self.groups * self.outputs * self.inputs,) if self.inputs else ()
        return (*weight, self.groups * self.outputs) if self.bias else weight

    @property
    def size(self) -> int:
        """Number of entries of V."""
        return sum(self.sizes)

    def gather(self, parts: Mapping[str, Tensor]) -> Tensor:
        """Arrange tensors with the shapes (K, ``*shape``) of the parameters into a tensor (K, ``*dims``).

        A missing parameter counts as zeros. At least one parameter must be present.
        """
        like = next(parts[name] for name in self.names if name in parts)
        matrices = [
            self._as_matrices(parts[name], column)
            if name in parts
            else like.new_zeros(len(like), self.groups, self.outputs, 1 if column else self.inputs)
            for name, column in self._members()
        ]
        return matrices[0] if len(matrices) == 1 else torch.cat(matrices, dim=-1)

    def scatter(self, V: Tensor, names: Iterable[str] | None = None) -> dict[str, Tensor]:
        """Return the tensors of shape (K, ``*shape``) of a tensor (K, ``*dims``). This is the inverse of `gather`.

        Entries that the block does not cover are zero. ``names`` selects parameters; by default, all are returned.
        """
        names = self.names if names is None else tuple(names)
        parts = {}
        for (name, column), shape in zip(self._members(), self.shapes, strict=True):
            if name not in names:
                continue
            part = V[..., -1:] if column else V[..., : self.inputs]
            if self.transposed and not column:
                part = part.mT
            if self.rows is None:
                parts[name] = part.reshape(len(V), *shape)
                continue
            start, stop = self.rows
            parts[name] = V.new_zeros(len(V), *shape)
            parts[name][:, start:stop] = part.reshape(len(V), stop - start, *shape[1:])
        return parts

    def restricted(self, names: Iterable[str]) -> tuple[BlockLayout, slice, slice]:
        """Return the layout of some of the parameters, and the rows and the columns of V that belong to them."""
        kept = [index for index, name in enumerate(self.names) if name in names]
        if len(kept) == len(self.names):
            return self, slice(None), slice(None)
        [index] = kept
        part, shapes = (self.names[index],), (self.shapes[index],)
        if index == 0:
            return replace(self, names=part, shapes=shapes, bias=False), slice(None), slice(self.inputs)
        own = replace(self, names=part, shapes=shapes, inputs=0, transposed=False)
        return own, slice(None), slice(self.inputs, None)

    def _members(self) -> list[tuple[str, bool]]:
        """Return a tuple (name, is_bias) for each parameter."""
        return [(name, self.bias and index == len(self.names) - 1) for index, name in enumerate(self.names)]

    def _bounds(self, shape: torch.Size) -> tuple[int, int]:
        return (0, shape[0]) if self.rows is None else self.rows

    def _as_matrices(self, part: Tensor, column: bool) -> Tensor:
        start, stop = self._bounds(part.shape[1:])
        part = part[:, start:stop]
        if column:
            return part.reshape(len(part), self.groups, self.outputs, 1)
        if self.transposed:
            return part.reshape(len(part), self.groups, self.inputs, self.outputs).mT
        return part.reshape(len(part), self.groups, self.outputs, self.inputs)


@dataclass(frozen=True)
class FlatLayout:
    """Layout of any parameters as one column V, of shape (1, N, 1) with the total number N of entries.

    It has the interface of `BlockLayout`, and serves the blocks of parameters that have no Kronecker factors. Such a
    block has one factor, of shape (1, N, N) or (1, N), and the other factor is 1.
    """

    names: tuple[str, ...]
    shapes: tuple[torch.Size, ...]
    inputs: ClassVar[int] = 0
    rows: ClassVar[None] = None

    @property
    def dims(self) -> tuple[int, int, int]:
        """Shape of V."""
        return 1, self.size, 1

    @property
    def sizes(self) -> tuple[int, ...]:
        """Number of entries of each parameter."""
        return tuple(shape.numel() for shape in self.shapes)

    @property
    def size(self) -> int:
        """Number of entries of V."""
        return sum(self.sizes)

    def gather(self, parts: Mapping[str, Tensor]) -> Tensor:
        """Concatenate tensors with the shapes (K, ``*shape``); see `BlockLayout.gather`."""
        like = next(parts[name] for name in self.names if name in parts)
        flat = [
            parts[name].reshape(len(like), -1) if name in parts else like.new_zeros(len(like), shape.numel())
            for name, shape in zip(self.names, self.shapes, strict=True)
        ]
        return torch.cat(flat, dim=-1)[:, None, :, None]

    def scatter(self, V: Tensor, names: Iterable[str] | None = None) -> dict[str, Tensor]:
        """Return the tensors with the shapes (K, ``*shape``); see `BlockLayout.scatter`."""
        wanted = self.names if names is None else tuple(names)
        parts = V.reshape(len(V), -1).split(self.sizes, dim=-1)
        return {
            name: part.reshape(len(V), *shape)
            for name, shape, part in zip(self.names, self.shapes, parts, strict=True)
            if name in wanted
        }

    def restricted(self, names: Iterable[str]) -> tuple[FlatLayout, Tensor, slice]:
        """Return the layout of some of the parameters, and the rows and the columns of V that belong to them."""
        kept = [index for index, name in enumerate(self.names) if name in names]
        parts = torch.arange(self.size).split(self.sizes)
        own = FlatLayout(tuple(self.names[index] for index in kept), tuple(self.shapes[index] for index in kept))
        return own, torch.cat([parts[index] for index in kept]), slice(None)
