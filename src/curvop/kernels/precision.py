"""The precision of products: what determines their rounding errors, and which setting changes it.

The dtypes of the parameters and of the loss do not determine the precision alone. Under ``torch.autocast``, operations
compute in half precision. Settings of PyTorch allow libraries to use TF32 or bfloat16 for float32 tensors:

- By default, cuDNN may use TF32 in convolutions and recurrent layers on NVIDIA GPUs.
  ``torch.backends.cudnn.allow_tf32`` and ``torch.backends.cudnn.conv.fp32_precision`` control this.
- ``torch.set_float32_matmul_precision``, ``torch.backends.cuda.matmul`` and ``torch.backends.mkldnn.matmul`` can allow
  lower precision in matrix products on a GPU or a CPU. Many CPUs lack such instructions and ignore the setting.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from curvop.kernels.passes import precision as dtype_epsilon

__all__ = ["Precision", "float32_settings", "lowest_precision"]

_BACKENDS: Any = torch.backends  # the types of its attributes are incomplete
# The machine epsilons of the formats that PyTorch may use instead of float32. TF32 has a mantissa of 10 bits.
_EPSILONS = {"tf32": 2.0**-10, "bf16": torch.finfo(torch.bfloat16).eps}
_NAMES = {"tf32": "TF32", "bf16": "bfloat16"}
_PROBE = 64  # rows of the matrices that find out what a CPU does; oneDNN leaves smaller ones to other code


@dataclasses.dataclass(frozen=True)
class Precision:
    """The lowest precision that a product uses.

    Attributes
    ----------
    epsilon : float
        Machine epsilon of this precision.
    cause : str
        What lowers the precision below that of the dtypes of the parameters and the loss. An empty string if nothing
        does.
    remedy : str
        How to compute in the precision of the dtypes. An empty string if `cause` is empty.
    """

    epsilon: float
    cause: str = ""
    remedy: str = ""


def lowest_precision(
    loss: Tensor, params: Iterable[Tensor], autocast: torch.dtype | None, convolves: Callable[[], bool]
) -> Precision:
    """Return the lowest precision that a product uses.

    Parameters
    ----------
    loss : Tensor
        The loss, or another tensor of its dtype.
    params : iterable of Tensor
        The parameters.
    autocast : torch.dtype or None
        The autocast dtype, or None if autocast is disabled.
    convolves : callable
        A function that returns whether the model may have convolutions or recurrent layers.
    """
    params = list(params)
    found = [Precision(dtype_epsilon(loss, *params))]
    if autocast is not None:
        cause = f"torch.autocast computes in {str(autocast).removeprefix('torch.')}"
        found.append(Precision(torch.finfo(autocast).eps, cause, "compute products outside of torch.autocast"))
    kinds = {value.device.type for value in params if value.dtype == torch.float32}
    if "cuda" in kinds:
        found += _of_gpu(convolves)
    if "cpu" in kinds:
        found += _of_cpu(convolves)
    return max(found, key=lambda precision: precision.epsilon)


def float32_settings(device: torch.device) -> tuple[str, ...]:
    """Return PyTorch's settings of the precision of float32 matrix products and convolutions on `device`."""
    if device.type == "cuda":
        cudnn = _BACKENDS.cudnn
        return _BACKENDS.cuda.matmul.fp32_precision, cudnn.conv.fp32_precision, cudnn.rnn.fp32_precision
    if device.type == "cpu":
        return _BACKENDS.mkldnn.matmul.fp32_precision, _BACKENDS.mkldnn.conv.fp32_precision
    return ()


def _of_gpu(convolves: Callable[[], bool]) -> Iterable[Precision]:
    matmul, *layers = float32_settings(torch.device("cuda"))
    if matmul in _EPSILONS:
        cause = f"matrix products of float32 matrices may use {_NAMES[matmul]}"
        yield Precision(_EPSILONS[matmul], cause, "set torch.backends.cuda.matmul.allow_tf32 = False")
    for setting in layers:
        if setting in _EPSILONS and convolves():
            cause = f"convolutions and recurrent layers in float32 may use {_NAMES[setting]}"
            remedy = (
                "set torch.backends.cudnn.allow_tf32 = False, or if your program uses the new settings of PyTorch, "
                'torch.backends.cudnn.conv.fp32_precision = torch.backends.cudnn.rnn.fp32_precision = "ieee"'
            )
            yield Precision(_EPSILONS[setting], cause, remedy)


def _of_cpu(convolves: Callable[[], bool]) -> Iterable[Precision]:
    matmul, conv = float32_settings(torch.device("cpu"))
    if matmul in _EPSILONS and _rounds(matmul, convolution=False):
        cause = f"matrix products of float32 matrices use {_NAMES[matmul]}"
        yield Precision(_EPSILONS[matmul], cause, 'set torch.backends.mkldnn.matmul.fp32_precision = "ieee"')
    if conv in _EPSILONS and _rounds(conv, convolution=True) and convolves():
        cause = f"convolutions in float32 use {_NAMES[conv]}"
        yield Precision(_EPSILONS[conv], cause, 'set torch.backends.mkldnn.conv.fp32_precision = "ieee"')


@functools.cache
def _rounds(setting: str, convolution: bool) -> bool:
    """Return True if this CPU rounds the entries of float32 tensors to fewer bits under the present `setting`.

    The setting is an argument because the result is cached for each setting. The entries of the tensors need 12 bits
    after the leading one, more than TF32 and bfloat16 have.
    """
    entry = 1 + 2.0**-12
    with torch.no_grad(), torch.autocast("cpu", enabled=False):
        matrix = torch.full((_PROBE, _PROBE), entry, dtype=torch.float32, device="cpu")
        if convolution:
            image = matrix.expand(1, 16, _PROBE, _PROBE).contiguous()
            weight = torch.full((16, 16, 3, 3), entry, dtype=torch.float32, device="cpu")
            result = torch.nn.functional.conv2d(image, weight) / (16 * 9)
        else:
            result = matrix @ matrix / _PROBE
    return bool((result / entry**2 - 1).abs().max() > 2.0**-14)
