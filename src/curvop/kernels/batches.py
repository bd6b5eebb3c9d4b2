"""Functions for batches. A batch is a tensor, or a tree of tensors (nested mappings, lists and tuples).

The functions visit the tensors of a batch, move them to a device, count examples, join batches along their first
dimension, and split batches into examples.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping, Sequence
from typing import Any, Self

import torch
from torch import Tensor

__all__ = [
    "CannotJoinError",
    "Feed",
    "at_batch",
    "batch_size",
    "batch_size_of",
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
    """Yield the tensors in `tree` in depth-first order."""
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
    """Return a copy of `tree` in which each leaf is replaced by ``function(leaf)``.

    The leaves are the objects for which `is_leaf` returns True: by default, the tensors. Mutable mappings (such as a
    Hugging Face ``BatchEncoding``), lists, tuples and named tuples keep their type. Other mappings become dicts.
    """
    if is_leaf(tree):
        return function(tree)
    if type(tree) in (tuple, list):  # the most frequent case; checks for mappings are slow
        return type(tree)([map_leaves(function, value, is_leaf) for value in tree])
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
    """Return `tree` with all tensors moved to `device`. Tensors that are already on `device` are not copied.

    Other objects with a ``to`` method, such as a ``PackedSequence`` or a batch of graphs, are moved by calling ``to``.
    """

    def move(part: Any) -> Any:
        if type(part) is Tensor and part.device == device and not part.is_inference():
            return part
        if not isinstance(part, Tensor):
            return part.to(device)
        if part.is_meta and device.type != "meta":
            raise ValueError("data holds a tensor on the meta device, which has no values: pass the tensor itself")
        # Copies from pinned memory to a GPU may be asynchronous, because GPU kernels that are launched later wait for
        # these copies. Copies to the CPU must be synchronous, because the CPU does not wait for a copy to finish.
        moved = part.to(device, non_blocking=device.type == "cuda")
        # Autograd cannot save a tensor created in inference mode, but it can save a clone of the tensor.
        return moved.clone() if moved.is_inference() else moved

    return map_leaves(move, tree, lambda part: isinstance(part, Tensor) or _moves_itself(part))


def _moves_itself(part: Any) -> bool:
    return hasattr(part, "to") and not isinstance(part, Mapping)


def on_device(batches: Iterable[Any], device: torch.device) -> Iterator[Any]:
    """Yield the batches after moving them to `device`.

    If `device` is a GPU, each batch is copied while the GPU computes with the previous batch.
    """
    if device.type != "cuda":
        for batch in batches:
            yield to_device(batch, device)
        return
    stream = _copy_stream(device)
    queued: list[tuple[Any, torch.cuda.Event]] = []
    for batch in batches:
        # Before it copies batch k, the copy stream waits until the computation with batch k - 2 has finished. A copy
        # therefore never overwrites the memory of a freed batch that the GPU still reads, and Tensor.record_stream need
        # not be called.
        stream.wait_stream(torch.cuda.current_stream(device))
        stream.wait_stream(torch.cuda.default_stream(device))  # a data loader may have used the default stream
        with torch.cuda.stream(stream):
            queued.append((to_device(batch, device), stream.record_event()))
        if len(queued) > 1:
            yield _after_copy(*queued.pop(0), device)
    for last in queued:
        yield _after_copy(*last, device)


def _after_copy(batch: Any, copied: torch.cuda.Event, device: torch.device) -> Any:
    torch.cuda.current_stream(device).wait_event(copied)
    return batch


@functools.cache
def _copy_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


def signature(tree: Any) -> tuple[tuple[torch.Size, torch.dtype], ...]:
    """Return the shape and the dtype of each tensor in `tree`.

    Batches with equal signatures need the same amount of memory.
    """
    return tuple((leaf.shape, leaf.dtype) for leaf in leaves(tree))


def leading_size(tree: Any) -> int | None:
    """Return the common size of the first dimension of all tensors in `tree`, or None if the sizes differ."""
    sizes = {leaf.shape[0] if leaf.ndim else None for leaf in leaves(tree)}
    return sizes.pop() if len(sizes) == 1 else None


def batch_size(*parts: Any) -> int | None:
    """Return the number of examples in a batch that consists of `parts`, such as X and y.

    Return None if the parts imply different numbers of examples. Parts without tensors are ignored.

    A list or tuple may have one entry per input of the model, or one entry per example (such as images of different
    sizes). If both are possible, the entries are taken as inputs under two conditions: at least two of `parts` contain
    tensors, and all tensors have the same size along their first dimension. Otherwise, the entries are taken as
    examples.
    """
    common = _common_sizes(parts)
    if len(common) > 1:
        with_tensors = [part for part in parts if any(True for _ in leaves(part))]
        shared = {leading_size(part) for part in with_tensors} if len(with_tensors) > 1 else set()
        lengths = {len(part) for part in parts if isinstance(part, list | tuple)}
        common &= shared if len(shared) == 1 and None not in shared else lengths
    return common.pop() if len(common) == 1 else None


def batch_size_of(batch: Any) -> int | None:
    """Return the number of examples in a batch of any type, or None if the number is unknown; see `batch_size`."""
    return batch_size(*batch) if isinstance(batch, list | tuple) else batch_size(batch)


def _common_sizes(parts: Iterable[Any]) -> set[int]:
    candidates = [_candidate_sizes(part) for part in parts if any(True for _ in leaves(part))]
    return set.intersection(*candidates) if candidates else set()


def _candidate_sizes(part: Any) -> set[int]:
    """Return the set of all numbers of examples that a part of a batch could have."""
    if isinstance(part, Tensor):
        return set(part.shape[:1])
    if isinstance(part, Mapping):
        return _common_sizes(part.values())
    return {len(part)} | _common_sizes(part)


class at_batch:  # noqa: N801  # used like a function
    """Within a ``with`` block, add a note with the number of the batch to every exception that is raised."""

    def __init__(self, index: int) -> None:
        self._index = index

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        if isinstance(error, Exception):
            note = f"This was at batch {self._index} of data."
            if note not in getattr(error, "__notes__", ()):
                error.add_note(note)


def numbered_errors(batches: Iterable[Any]) -> Iterator[Any]:
    """Yield the batches. If iterating raises an exception, add a note with the number of the batch to the exception."""
    index, iterator = 0, iter(batches)
    while True:
        with at_batch(index):
            batch = next(iterator, _END)
        if batch is _END:
            return
        yield batch
        index += 1


_END = object()


# Functions that join batches along the first dimension, and that split a batch into examples.


class CannotJoinError(Exception):
    """Raised if batches cannot be joined into one batch."""


def joined(trees: Sequence[Any]) -> Any:
    """Join trees of tensors into one tree by concatenating corresponding tensors along their first dimension.

    A list or tuple with one entry per example (images of different sizes, for example) is concatenated as a sequence.
    Other entries, such as strings, must be equal in all trees.

    Raises
    ------
    CannotJoinError
        If the trees have different structures, or if corresponding tensors differ in a dimension other than the first.
        Also if corresponding entries that are not tensors differ, or if an entry is a number. A number may be a count
        of examples, which would be wrong for the joined batch.
    """
    if len(trees) == 1:
        return trees[0]
    return _join(trees, [_size(tree) for tree in trees], outermost=True)


def example_of(tree: Any, index: int, count: int) -> Any:
    """Extract example number `index` from a batch of `count` examples, and return it as a batch of one example.

    Raises
    ------
    ValueError
        If a tensor does not have `count` entries along its first dimension.
    """

    def cut(part: Any) -> Any:
        if isinstance(part, Tensor) and (not part.ndim or len(part) != count):
            raise ValueError(
                "predictions and targets differ in their first dimension, and cannot be split into examples"
            )
        return part[index : index + 1]

    def is_cut(part: Any) -> bool:
        return isinstance(part, Tensor) or (isinstance(part, list | tuple) and _is_by_example(part, count))

    return map_leaves(cut, tree, is_cut)


def _size(tree: Any) -> int | None:
    """Return the number of examples in a batch, or None if the number is unknown."""
    parts = tree.values() if isinstance(tree, Mapping) else tree if isinstance(tree, list | tuple) else [tree]
    return batch_size(*parts)


def _join(trees: Sequence[Any], sizes: Sequence[int | None], outermost: bool = False) -> Any:
    first = trees[0]
    if isinstance(first, Tensor):
        if any(not isinstance(tree, Tensor) or not tree.ndim or tree.shape[1:] != first.shape[1:] for tree in trees):
            raise CannotJoinError("their tensors have different shapes")
        return torch.cat(list(trees))
    if any(type(tree) is not type(first) for tree in trees):
        raise CannotJoinError("they have different types")
    if isinstance(first, Mapping):
        if any(tree.keys() != first.keys() for tree in trees):
            raise CannotJoinError("their keys differ")
        mapping = copy.copy(first) if isinstance(first, MutableMapping) else {}
        for key in first:
            mapping[key] = _join([tree[key] for tree in trees], sizes)
        return mapping
    if isinstance(first, list | tuple) and not outermost and all(map(_is_by_example, trees, sizes)):
        return type(first)(example for tree in trees for example in tree)
    if isinstance(first, list | tuple):
        if len({len(tree) for tree in trees}) > 1:
            raise CannotJoinError("their lists or tuples have different lengths")
        parts = [_join(part, sizes) for part in zip(*trees, strict=True)]
        return type(first)(*parts) if hasattr(first, "_fields") else type(first)(parts)
    if isinstance(first, int | float) and not isinstance(first, bool):
        raise CannotJoinError("a number may be a count of the batch's entries")
    if any(not (tree is first or tree == first) for tree in trees):
        raise CannotJoinError(f"two different {type(first).__name__} objects cannot be joined")
    return first


def _is_by_example(tree: Sequence[Any], size: int | None) -> bool:
    """Return True if the entries of `tree` are the `size` examples of a batch, and not inputs of the model."""
    tensors = list(leaves(tree))
    by_input = bool(tensors) and all(leaf.ndim and len(leaf) == size for leaf in tensors)
    return len(tree) == size and not by_input and not hasattr(tree, "_fields")


class Feed:
    """Iterator over batches that the caller supplies one by one, so that several objectives share a pass over the data.

    Attributes
    ----------
    batch : Any
        The batch that ``next`` returns.
    ended : bool
        If True, ``next`` raises ``StopIteration``.
    """

    def __init__(self) -> None:
        self.batch: Any = None
        self.ended = False

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Any:
        if self.ended:
            raise StopIteration
        return self.batch
