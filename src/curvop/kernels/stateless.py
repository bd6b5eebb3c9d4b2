"""A module as a function of its parameters and buffers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["functional_call"]


def functional_call(module: nn.Module, tensors: dict[str, Tensor], args: tuple[Any, ...]) -> Any:
    """Call a module with other tensors in the place of its own, as `torch.func.functional_call` does.

    That one puts the module's own tensors back as well, but not where Ctrl-C comes while it swaps them.
    """
    own = [(part, dict(part._parameters), dict(part._buffers)) for part in module.modules()]
    try:
        return torch.func.functional_call(module, tensors, args)
    except BaseException:
        for part, parameters, buffers in own:
            part._parameters.update(parameters)
            part._buffers.update(buffers)
        raise
