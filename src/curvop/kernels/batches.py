"""Batches as trees: tensors in (nested) mappings, lists and tuples."""

from __future__ import annotations

import copy
import functools
from collections.abc import Iterable, Iterator, Mapping, MutableMapping
from typing import Any

import torch
from torch import Tensor

__all__ = ["batch_size", "leaves", "on_device", "signature"]


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


def to_device(tree: Any, device: torch.device) -> Any:
    """Return `tree` with every tensor on `device`; nothing is copied that is there already, `tree` itself stays.

    Mappings keep their type (a Hugging Face ``BatchEncoding`` stays one), so do lists, tuples and named tuples; any
    other object that has a method ``to`` (a ``PackedSequence``, a graph batch) is asked to move itself.
    """
    if isinstance(tree, Tensor):
        # From pinned memory the copy to a GPU is only queued; in the other direction one would read too early.
        tree = tree.to(device, non_blocking=device.type == "cuda")
        # Autograd cannot save a tensor made under inference mode; a clone made outside of it can be saved.
        return tree.clone() if tree.is_inference() else tree
    if isinstance(tree, MutableMapping):
        moved = copy.copy(tree)
        for key, value in tree.items():
            moved[key] = to_device(value, device)
        return moved
    if isinstance(tree, Mapping):
        return {key: to_device(value, device) for key, value in tree.items()}
    if hasattr(tree, "to"):
        return tree.to(device)
    if isinstance(tree, tuple) and hasattr(tree, "_fields"):
        return type(tree)(*(to_device(value, device) for value in tree))
    if isinstance(tree, list | tuple):
        return type(tree)(to_device(value, device) for value in tree)
    return tree


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


def batch_size(tree: Any) -> int | None:
    """Return the leading dimension that all tensors of `tree` share, or None where there is no such number."""
    sizes = {leaf.shape[0] if leaf.ndim else None for leaf in leaves(tree)}
    return sizes.pop() if len(sizes) == 1 else None
