"""Batches as trees: tensors in (nested) mappings, lists and tuples."""

from __future__ import annotations

import contextlib
import copy
import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping, Sequence
from typing import Any

import torch
from torch import Tensor

__all__ = [
    "CannotJoinError",
    "at_batch",
    "batch_size",
    "example_of",
    "joined",
    "leading_size",
    "leaves",
    "map_leaves",
    "numbered_errors",
    "on_device",
    "signature",
    "to_device",
]


def leaves(tree: Any) -> Iterator[Tensor]:
    """Yield the tensors of `tree`, depth first."""
    if isinstance(tree, Tensor):
        yield tree
    elif isinstance(tree, Mapping):
        for value in tree.values():
            yield from leaves(value)
    elif isinstance(tree, list | tuple):
        for value in tree:
            yield from leaves(value)


def _is_tensor(tree: Any) -> bool:
    return isinstance(tree, Tensor)


def map_leaves(function: Callable[[Any], Any], tree: Any, is_leaf: Callable[[Any], bool] = _is_tensor) -> Any:
    """Return `tree` with `function` applied to its leaves; `tree` itself stays.

    Mappings keep their type (a Hugging Face ``BatchEncoding`` stays one), so do lists, tuples and named tuples.
    """
    if is_leaf(tree):
        return function(tree)
    if isinstance(tree, MutableMapping):
        mapped = copy.copy(tree)
        for key, value in tree.items():
            mapped[key] = map_leaves(function, value, is_leaf)
        return mapped
    if isinstance(tree, Mapping):
        return {key: map_leaves(function, value, is_leaf) for key, value in tree.items()}
    if isinstance(tree, tuple) and hasattr(tree, "_fields"):
        return type(tree)(*(map_leaves(function, value, is_leaf) for value in tree))
    if isinstance(tree, list | tuple):
        return type(tree)(map_leaves(function, value, is_leaf) for value in tree)
    return tree


def to_device(tree: Any, device: torch.device) -> Any:
    """Return `tree` with every tensor on `device`; nothing is copied that is there already.

    Any other object that has a method ``to`` (a ``PackedSequence``, a graph batch) is asked to move itself.
    """

    def move(part: Any) -> Any:
        if not isinstance(part, Tensor):
            return part.to(device)
        if part.is_meta and device.type != "meta":
            raise ValueError("data holds a tensor on the meta device, which has no values: pass the tensor itself")
        # From pinned memory the copy to a GPU is only queued; in the other direction one would read too early.
        moved = part.to(device, non_blocking=device.type == "cuda")
        # Autograd cannot save a tensor made under inference mode; a clone made outside of it can be saved.
        return moved.clone() if moved.is_inference() else moved

    return map_leaves(move, tree, lambda part: hasattr(part, "to") and not isinstance(part, Mapping))


def on_device(batches: Iterable[Any], device: torch.device) -> Iterator[Any]:
    """Yield the batches on `device`; to a GPU, each is copied while it computes with the one before."""
    if device.type != "cuda":
        for batch in batches:
            yield to_device(batch, device)
        return
    stream = _copying_stream(device)
    coming: list[tuple[Any, torch.cuda.Event]] = []
    for batch in batches:
        # Before it copies, the stream waits for what was computed with the batch before last. So no copy is written to
        # memory of a batch that was freed but is still being read, and none of its tensors needs record_stream.
        stream.wait_stream(torch.cuda.current_stream(device))
        stream.wait_stream(torch.cuda.default_stream(device))  # where a loader's thread may have made the batch
        with torch.cuda.stream(stream):
            coming.append((to_device(batch, device), stream.record_event()))
        if len(coming) > 1:
            yield _arrived(*coming.pop(0), device)
    for last in coming:
        yield _arrived(*last, device)


def _arrived(batch: Any, copied: torch.cuda.Event, device: torch.device) -> Any:
    torch.cuda.current_stream(device).wait_event(copied)
    return batch


@functools.cache
def _copying_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


def signature(tree: Any) -> tuple[tuple[torch.Size, torch.dtype], ...]:
    """Return the shapes and dtypes of the tensors of `tree`: batches that share it retain the same memory."""
    return tuple((leaf.shape, leaf.dtype) for leaf in leaves(tree))


def leading_size(tree: Any) -> int | None:
    """Return the first dimension that all tensors of `tree` share, or None if there is none."""
    sizes = {leaf.shape[0] if leaf.ndim else None for leaf in leaves(tree)}
    return sizes.pop() if len(sizes) == 1 else None


def batch_size(*parts: Any) -> int | None:
    """Return the number of examples in a batch of these parts, such as X and y; None if they do not agree on one.

    The first dimension of a list or tuple is its length, as of a list of images, unless its tensors share a first
    dimension on which several parts agree: then it is a structure, such as two inputs. A part without tensors disagrees
    with nothing.
    """
    common = _common_sizes(parts)
    if len(common) > 1:
        asked = [part for part in parts if any(True for _ in leaves(part))]
        shared = {leading_size(part) for part in asked} if len(asked) > 1 else set()
        lengths = {len(part) for part in parts if isinstance(part, list | tuple)}
        common &= shared if len(shared) == 1 and None not in shared else lengths
    return common.pop() if len(common) == 1 else None


def _common_sizes(parts: Iterable[Any]) -> set[int]:
    found = [_sizes(part) for part in parts if any(True for _ in leaves(part))]
    return set.intersection(*found) if found else set()


def _sizes(part: Any) -> set[int]:
    """Return the numbers of examples that a part may have."""
    if isinstance(part, Tensor):
        return set(part.shape[:1])
    if isinstance(part, Mapping):
        return _common_sizes(part.values())
    return {len(part)} | _common_sizes(part)


@contextlib.contextmanager
def at_batch(index: int) -> Iterator[None]:
    """Add the batch's number to an error of the user's model, loss or data, which keeps its type and its message."""
    try:
        yield
    except Exception as error:
        note = f"This was at batch {index} of data."
        if note not in getattr(error, "__notes__", ()):
            error.add_note(note)
        raise


def numbered_errors(batches: Iterable[Any]) -> Iterator[Any]:
    """Yield the batches; an error of theirs says at which one."""
    index, made = 0, iter(batches)
    while True:
        with at_batch(index):
            try:
                batch = next(made)
            except StopIteration:
                return
        yield batch
        index += 1


# Batches and predictions put together, and cut into examples, along their first dimension.


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
