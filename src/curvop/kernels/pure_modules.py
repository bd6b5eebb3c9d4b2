"""Modules of PyTorch whose forward pass only computes its result.

Around user code, a `Guard` saves and restores everything that the code might change, and `TwiceDifferentiable` replaces
some functions of PyTorch. For small models this takes longer than the computation. Neither is needed for a pure module:
its forward pass changes no attributes and writes to no tensors, and calls no function that is replaced.
"""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn
from torch.nn.modules import module as torch_module

__all__ = ["are_pure", "have_hooks"]

# Normalizations, convolutions, recurrent layers and attention are not pure.
_PURE = {
    *(nn.Sequential, nn.Identity, nn.Flatten, nn.Unflatten, nn.Linear, nn.Bilinear, nn.Embedding, nn.Dropout),
    *(nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.ELU, nn.CELU, nn.SELU, nn.GELU, nn.SiLU, nn.Mish, nn.Softplus, nn.PReLU),
    *(nn.Tanh, nn.Sigmoid, nn.Hardtanh, nn.Hardsigmoid, nn.Hardswish, nn.Softsign, nn.Tanhshrink, nn.LogSigmoid),
    *(nn.Softmax, nn.LogSoftmax, nn.MaxPool1d, nn.MaxPool2d, nn.AvgPool1d, nn.AvgPool2d),
    *(nn.CrossEntropyLoss, nn.NLLLoss, nn.MSELoss, nn.L1Loss, nn.HuberLoss, nn.SmoothL1Loss, nn.BCEWithLogitsLoss),
}


def are_pure(parts: Iterable[nn.Module]) -> bool:
    """Return True if all modules are known to be pure as long as they have no hooks.

    A subclass is not pure, and neither is a module that works in place, was compiled, or has another ``forward``.
    """
    return all(
        type(part) in _PURE
        and not {"forward", "_compiled_call_impl"} & vars(part).keys()
        and not getattr(part, "inplace", False)
        and getattr(part, "max_norm", None) is None  # an embedding with `max_norm` writes to its weight
        for part in parts
    )


def have_hooks(parts: Iterable[nn.Module]) -> bool:
    """Return True if code of the user runs when one of the modules is called."""
    return torch_module._has_any_global_hook() or any(
        part._forward_pre_hooks or part._forward_hooks or part._backward_pre_hooks or part._backward_hooks
        for part in parts
    )
