"""Autograd's graphs, node by node."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from torch.autograd.graph import Node

__all__ = ["nodes"]


def nodes(roots: Iterable[Node]) -> Iterator[Node]:
    """Yield every node that can be reached from `roots`, once."""
    seen = set(roots)
    stack = list(seen)
    while stack:
        node = stack.pop()
        yield node
        for parent, _ in node.next_functions:
            if parent is not None and parent not in seen:
                seen.add(parent)
                stack.append(parent)
