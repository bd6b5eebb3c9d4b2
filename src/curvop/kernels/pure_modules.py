"""Modules of PyTorch whose forward pass only computes its result.

Around user code, a `Guard` saves and restores everything that the code might change, and `TwiceDifferentiable` replaces
some functions of PyTorch. For small models this takes longer than the computation. Neither is needed for a pure module:
its forward pass changes no attributes and writes to no tensors, and calls no function that is replaced.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn
from torch.nn.modules import module as torch_module

__all__ = ["are_pure", "runs_user_code"]

# Normalizations, convolutions, recurrent layers and attention are not pure.
_CLASSES = (
    *(nn.Sequential, nn.Identity, nn.Flatten, nn.Unflatten, nn.Linear, nn.Embedding, nn.Dropout),
    *(nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.ELU, nn.CELU, nn.SELU, nn.GELU, nn.SiLU, nn.Mish, nn.Softplus, nn.PReLU),
    *(nn.Tanh, nn.Sigmoid, nn.Hardtanh, nn.Hardsigmoid, nn.Hardswish, nn.Softsign, nn.Tanhshrink, nn.LogSigmoid),
    *(nn.Softmax, nn.LogSoftmax, nn.MaxPool1d, nn.MaxPool2d, nn.AvgPool1d, nn.AvgPool2d),
    *(nn.CrossEntropyLoss, nn.NLLLoss, nn.MSELoss, nn.L1Loss, nn.HuberLoss, nn.SmoothL1Loss, nn.BCEWithLogitsLoss),
)
# Each class with its ``forward``, which other code may replace.
_PURE: dict[type[nn.Module], Any] = {kind: kind.forward for kind in _CLASSES}
_OVERRIDES = {"forward", "_call_impl", "_compiled_call_impl", "_wrapped_call_impl"}


def are_pure(parts: Iterable[nn.Module]) -> bool:
    """Return True if all modules are pure as long as no code of the user runs in them; see `runs_user_code`.

    A subclass is not pure, and neither is a module that works in place, was compiled, or has another ``forward``. The
    tensors of the modules must be plain tensors that autograd can save.
    """
    return all(
        type(part) in _PURE
        and not _OVERRIDES & vars(part).keys()
        and all(map(_is_plain, (*part._parameters.values(), *part._buffers.values())))
        and not getattr(part, "inplace", False)
        and getattr(part, "max_norm", None) is None  # an embedding with `max_norm` writes to its weight
        for part in parts
    )


def runs_user_code(parts: Iterable[nn.Module]) -> bool:
    """Return True if a hook or another ``forward`` runs when one of the modules is called."""
    return torch_module._has_any_global_hook() or any(
        part._forward_pre_hooks
        or part._forward_hooks
        or part._backward_pre_hooks
        or part._backward_hooks
        or _PURE.get(type(part)) is not type(part).forward
        for part in parts
    )


def _is_plain(tensor: Tensor | None) -> bool:
    return tensor is None or (type(tensor) in (Tensor, nn.Parameter) and not tensor.is_inference())
