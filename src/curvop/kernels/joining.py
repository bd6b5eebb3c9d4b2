"""Batches and predictions put together, and cut into examples, along their first dimension."""

from __future__ import annotations

import copy
from collections.abc import Mapping, MutableMapping, Sequence
from typing import Any

import torch
from torch import Tensor

from curvop.kernels.batches import batch_size, leaves, map_leaves

__all__ = ["CannotJoinError", "example_of", "joined"]


class CannotJoinError(Exception):
    """Batches cannot be put together."""


def joined(trees: Sequence[Any]) -> Any:
    """Return trees of tensors as one, tensors along their first dimension.

    A list or tuple that has one entry an example, as of images of several sizes, is put together end to end.
    """
    if len(trees) == 1:
        return trees[0]
    return _join(trees, [_size(tree) for tree in trees], outermost=True)


def example_of(tree: Any, index: int, count: int) -> Any:
    """Return the part of a tree that belongs to one of `count` examples."""

    def cut(part: Any) -> Any:
        if isinstance(part, Tensor) and (not part.ndim or len(part) != count):
            raise ValueError("predictions and targets differ in their first dimension, and cannot be cut into examples")
        return part[index : index + 1]

    def is_cut(part: Any) -> bool:
        return isinstance(part, Tensor) or (isinstance(part, list | tuple) and _is_by_example(part, count))

    return map_leaves(cut, tree, is_cut)


def _size(tree: Any) -> int | None:
    """Return the number of examples of a batch."""
    parts = tree.values() if isinstance(tree, Mapping) else tree if isinstance(tree, list | tuple) else [tree]
    return batch_size(*parts)


def _join(trees: Sequence[Any], sizes: Sequence[int | None], outermost: bool = False) -> Any:
    first = trees[0]
    if isinstance(first, Tensor):
        if any(not isinstance(tree, Tensor) or not tree.ndim or tree.shape[1:] != first.shape[1:] for tree in trees):
            raise CannotJoinError("their tensors have other shapes")
        return torch.cat(list(trees))
    if any(type(tree) is not type(first) for tree in trees):
        raise CannotJoinError("they are of several kinds")
    if isinstance(first, Mapping):
        if any(tree.keys() != first.keys() for tree in trees):
            raise CannotJoinError("their keys differ")
        found = copy.copy(first) if isinstance(first, MutableMapping) else {}
        for key in first:
            found[key] = _join([tree[key] for tree in trees], sizes)
        return found
    if isinstance(first, list | tuple) and not outermost and all(map(_is_by_example, trees, sizes)):
        return type(first)(example for tree in trees for example in tree)
    if isinstance(first, list | tuple):
        if len({len(tree) for tree in trees}) > 1:
            raise CannotJoinError("they have other lengths")
        parts = [_join(part, sizes) for part in zip(*trees, strict=True)]
        return type(first)(*parts) if hasattr(first, "_fields") else type(first)(parts)
    if isinstance(first, int | float) and not isinstance(first, bool):
        raise CannotJoinError("a number may count what is in the batch")
    if any(not (tree is first or tree == first) for tree in trees):
        raise CannotJoinError(f"a {type(first).__name__} cannot be put together with another")
    return first


def _is_by_example(tree: Sequence[Any], size: int | None) -> bool:
    """Whether a list or tuple has one entry for each of `size` examples, and not one for each of several inputs."""
    tensors = list(leaves(tree))
    inputs = bool(tensors) and all(leaf.ndim and len(leaf) == size for leaf in tensors)
    return len(tree) == size and not inputs and not hasattr(tree, "_fields")
