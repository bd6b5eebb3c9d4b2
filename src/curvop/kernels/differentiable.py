"""Operations whose second derivative torch lacks, gets wrong or wastes work on, and what stands in for them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Self

import torch
from torch import Tensor
from torch.backends import cuda, cudnn, mha
from torch.overrides import TorchFunctionMode, _pop_mode

from curvop.kernels.convolution import CONVOLUTIONS

__all__ = ["STAND_INS", "TwiceDifferentiable", "slow_backends"]


@contextmanager
def slow_backends(recurrent: bool) -> Iterator[None]:
    """Run attention on its math backend and, if asked, recurrent layers without cuDNN; restore what was chosen.

    The fused ones have no second derivative. Encoder layers leave their inference path besides, which they would take
    where nothing below a block requires grad. Attributes and setters, not the context managers, which cost several
    times as much or write the TF32 settings too.
    """
    chosen = (
        cuda.flash_sdp_enabled(),
        cuda.mem_efficient_sdp_enabled(),
        cuda.cudnn_sdp_enabled(),
        cuda.math_sdp_enabled(),
        mha.get_fastpath_enabled(),
        cudnn.enabled,
    )
    depth, grad = torch._C._len_torch_function_stack(), torch.is_grad_enabled()
    try:
        try:
            _choose(False, False, False, True, False, chosen[-1] and not recurrent)
            yield
        finally:
            _put_back(chosen, depth, grad)
    except BaseException:  # Ctrl-C may have come while it was put back
        _put_back(chosen, depth, grad)
        raise


def _choose(flash: bool, efficient: bool, fused: bool, math: bool, fastpath: bool, cudnn_enabled: bool) -> None:
    cuda.enable_flash_sdp(flash)
    cuda.enable_mem_efficient_sdp(efficient)
    cuda.enable_cudnn_sdp(fused)
    cuda.enable_math_sdp(math)
    mha.set_fastpath_enabled(fastpath)
    if cudnn.enabled != cudnn_enabled:
        cudnn.enabled = cudnn_enabled


def _put_back(chosen: tuple[bool, ...], depth: int, grad: bool) -> None:
    _choose(*chosen)
    _leave_modes(depth)
    torch.set_grad_enabled(grad)


def _leave_modes(depth: int) -> None:
    """Leave all modes that were entered since the stack of them was so deep."""
    while torch._C._len_torch_function_stack() > depth:
        _pop_mode()


class TwiceDifferentiable(TorchFunctionMode):
    """Computes in another way what torch differentiates wrongly, or slowly, a second time."""

    def __enter__(self) -> Self:
        """Enter the mode."""
        self._depth = torch._C._len_torch_function_stack()
        return super().__enter__()  # type: ignore[no-any-return, no-untyped-call]

    def __exit__(self, *error: object) -> None:
        """Leave the mode, unless Ctrl-C has come while torch had left it for a moment."""
        _leave_modes(self._depth)

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Call what stands in for `func`, or `func` itself."""
        return _DEFINITIONS.get(func, func)(*args, **(kwargs or {}))


def _weight_norm(v: Tensor, g: Tensor, dim: int = 0) -> Tensor:
    """Return ``g v / ||v||``; the derivative of torch's fused one takes the norms that it saved for constants."""
    return v * (g / torch.norm_except_dim(v, 2, dim))


def _attention(*args: Any, **kwargs: Any) -> Any:
    """Return attention by the math backend, also where the model itself has chosen another around the call."""
    with slow_backends(recurrent=False):
        return torch.nn.functional.scaled_dot_product_attention(*args, **kwargs)


STAND_INS: dict[Callable[..., Any], Callable[..., Any]] = {
    torch._weight_norm: _weight_norm,
    torch.nn.functional.scaled_dot_product_attention: _attention,
}
_DEFINITIONS = {**STAND_INS, **CONVOLUTIONS}
