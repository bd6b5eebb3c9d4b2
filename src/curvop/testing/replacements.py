"""What torch differentiates in forward mode wrongly or not at all, and what stands in for it in the references."""

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

__all__ = ["differentiable"]


class _TwiceDifferentiable(TorchFunctionMode):
    """Replace calls whose forward-mode derivative of the gradient is missing or wrong by others of the same value."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _REPLACEMENTS.get(func, func)(*args, **(kwargs or {}))


def _mse_loss(prediction: Tensor, target: Tensor, **options: Any) -> Tensor:
    # The second derivative of the fused mean divides a ZeroTensor (the tangent of the target) in place, and raises.
    if options.get("reduction") == "mean" and options.get("weight") is None:
        return functional.mse_loss(prediction, target, **(options | {"reduction": "none"})).mean()
    return functional.mse_loss(prediction, target, **options)


def _huber_loss(prediction: Tensor, target: Tensor, **options: Any) -> Tensor:
    # huber_loss_backward has no forward-mode derivative; the smooth L1 loss, the same up to a factor, has one.
    if options.get("weight") is not None:
        return functional.huber_loss(prediction, target, **options)
    delta: float = options["delta"]
    return delta * functional.smooth_l1_loss(prediction, target, reduction=options["reduction"], beta=delta)


def _embedding(indices: Tensor, weight: Tensor, padding_idx: int | None = None, **options: Any) -> Tensor:
    # Reverse mode holds the padding row constant and forward mode does not, so the matrix would not be symmetric.
    rows = functional.embedding(indices, weight, padding_idx, **options)
    if padding_idx is None:
        return rows
    return torch.where((indices == padding_idx % weight.shape[0]).unsqueeze(-1), rows.detach(), rows)


def _weight_norm(v: Tensor, g: Tensor, dim: int = 0) -> Tensor:
    # The derivative of the fused kernel's gradient takes the norms for constants, in both modes.
    return v * (g / torch.norm_except_dim(v, 2, dim))


_REPLACEMENTS: dict[Any, Callable[..., Tensor]] = {
    functional.mse_loss: _mse_loss,
    functional.huber_loss: _huber_loss,
    functional.embedding: _embedding,
    torch._weight_norm: _weight_norm,
}


@contextmanager
def differentiable(device: torch.device) -> Iterator[None]:
    """Choose kernels with second derivatives (no fused attention or recurrent cell), and restore what was chosen."""
    backends: list[Any] = [torch.backends.mkldnn, torch.backends.cudnn]
    enabled = [backend.enabled for backend in backends]
    cpu = device.type == "cpu"
    random_state = torch.random.fork_rng([] if cpu else [device], device_type="cuda" if cpu else device.type)
    # no_grad concerns what surrounds torch.func's own derivatives: parameters that were not chosen leave no graph.
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), _TwiceDifferentiable(), random_state, warnings.catch_warnings():
        # torch.func's own, on first use and for operations that vmap loops over; nothing that a caller could act on.
        warnings.filterwarnings("ignore", message=r"`torch\.jit\.script` is deprecated|There is a performance drop")
        try:
            # Attributes, not the flags() managers, which write the TF32 settings too and warn about them.
            for backend in backends:
                backend.enabled = False
            yield
        finally:
            for backend, was_enabled in zip(backends, enabled, strict=True):
                backend.enabled = was_enabled
