"""A module as a function of its parameters and buffers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["functional_call", "replace"]


def functional_call(module: nn.Module, tensors: dict[str, Tensor], args: tuple[Any, ...]) -> Any:
    """Call a module with other tensors in the place of its own, as `torch.func.functional_call` does.

    That one puts the module's own tensors back as well, but not where Ctrl-C comes while it swaps them, and it leaves
    what the module has registered meanwhile, which may be a tensor of a tracer's.
    """
    own = [(part, dict(part._parameters), dict(part._buffers)) for part in module.modules()]
    try:
        return torch.func.functional_call(module, tensors, args)
    finally:
        for part, parameters, buffers in own:
            replace(part._parameters, parameters)
            replace(part._buffers, buffers)


def replace(tensors: dict[str, Any], others: dict[str, Any]) -> None:
    """Put other tensors in the places of a module's, and take out what has no place among them.

    A scripted module's are in no dict, and have neither `update` nor a set of keys.
    """
    for name in [name for name, _ in tensors.items() if name not in others]:
        del tensors[name]
    for name, other in others.items():
        if name not in tensors or tensors[name] is not other:
            tensors[name] = other
