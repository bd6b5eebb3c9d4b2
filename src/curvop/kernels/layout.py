"""Where in a vector things lie: parameters one after another, or what the batches yield."""

from __future__ import annotations

import abc
import itertools
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

__all__ = ["BatchLayout", "Layout", "ParameterLayout"]


class Layout(abc.ABC):
    """How the parts of a vector follow each other.

    Attributes
    ----------
    names : tuple of str
        Of the parameters that are among the parts.
    size : int
        Entries of the vector.
    """

    names: tuple[str, ...]
    size: int

    @abc.abstractmethod
    def at(self, vector: Tensor, index: int) -> Tensor:
        """Return a view of what batch number `index` has to do with of ``(size,)``, or of several ``(K, size)``."""

    @abc.abstractmethod
    def split(self, vector: Tensor) -> list[Tensor]:
        """Return views of such a vector, or of several, one for each part."""

    @abc.abstractmethod
    def join(self, parts: Sequence[Tensor | None], like: Tensor) -> Tensor:
        """Return the vector of these parts, None for zero, in the dtype and on the device of `like`."""

    @abc.abstractmethod
    def label(self, part: int) -> str:
        """Return what to call a part."""

    def of(self, leaves: Mapping[str, Tensor]) -> list[Tensor]:
        """Return the parameters among the parts."""
        return [leaves[name] for name in self.names]


class ParameterLayout(Layout):
    """How the parameters `names` follow each other in a vector; all of it has to do with every batch.

    Parameters
    ----------
    params : dict of str to Tensor
        All parameters.
    names : sequence of str
        Those that take part, in the order of the vector.

    Attributes
    ----------
    shapes : list of torch.Size
    slices : dict of str to slice
    """

    def __init__(self, params: Mapping[str, Tensor], names: Sequence[str]) -> None:
        self.names = tuple(names)
        self.shapes = [params[name].shape for name in self.names]
        self._views = [tuple(shape) for shape in self.shapes]  # quicker to hand over than a torch.Size
        self._sizes = [shape.numel() for shape in self.shapes]
        self.slices = dict(zip(self.names, _slices(self._sizes), strict=True))
        self.size = sum(self._sizes)

    def at(self, vector: Tensor, index: int) -> Tensor:
        """Return all of `vector`."""
        return vector

    def split(self, vector: Tensor) -> list[Tensor]:
        """Return views of `vector` ``(size,)``, or of several ``(K, size)``, one of each parameter's shape."""
        parts = torch.split_with_sizes(vector, self._sizes, -1)
        several = tuple(vector.shape[:-1])
        return [
            part if len(shape) == 1 else part.view(several + shape)
            for part, shape in zip(parts, self._views, strict=True)
        ]

    def join(self, parts: Sequence[Tensor | None], like: Tensor) -> Tensor:
        """Return the vector of one part a parameter, None for zero, in the dtype and on the device of `like`.

        Or several of them, as many as there are in `like`.
        """
        shapes = [(*like.shape[:-1], size) for size in self._sizes]
        pairs = zip(parts, shapes, strict=True)
        return torch.cat([like.new_zeros(shape) if part is None else part.reshape(shape) for part, shape in pairs], -1)

    def label(self, part: int) -> str:
        """Return a parameter's name."""
        return f"parameter {self.names[part]!r}"


class BatchLayout(Layout):
    """How what the batches yield, `sizes` entries each, follows in a vector; its part is all that a batch has.

    Parameters
    ----------
    sizes : sequence of int
    """

    names = ()

    def __init__(self, sizes: Sequence[int]) -> None:
        self._slices = _slices(sizes)
        self.size = sum(sizes)

    def at(self, vector: Tensor, index: int) -> Tensor:
        """Return the batch's entries."""
        return vector[..., self._slices[index]]

    def split(self, vector: Tensor) -> list[Tensor]:
        """Return one part."""
        return [vector]

    def join(self, parts: Sequence[Tensor | None], like: Tensor) -> Tensor:
        """Return the only part."""
        [part] = parts
        assert part is not None
        return part

    def label(self, part: int) -> str:
        """Return what it is."""
        return "the prediction"


def _slices(sizes: Sequence[int]) -> list[slice]:
    stops = list(itertools.accumulate(sizes))
    return [slice(stop - size, stop) for size, stop in zip(sizes, stops, strict=True)]
