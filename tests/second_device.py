"""A second device made of the host's memory: an operation on tensors of both devices fails, as between GPUs.

Importing it registers the device for the whole process, so that only processes of their own do.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

__all__ = ["SECOND"]

SECOND = "elsewhere:0"
_setup_privateuseone_for_python_backend("elsewhere")
_library = torch.library.Library("aten", "IMPL")


class There(Tensor):
    """A tensor on the second device, which the host's tensor `held` computes for."""

    held: Tensor

    @staticmethod
    def __new__(cls, held: Tensor) -> There:
        self = Tensor._make_wrapper_subclass(
            cls,
            held.shape,
            strides=held.stride(),
            storage_offset=held.storage_offset(),
            dtype=held.dtype,
            device=SECOND,
        )
        self.held = held
        return self

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (Tensor.tolist, Tensor.untyped_storage):  # of which torch has no dispatch
            return func(args[0].held)
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        tensors = [part for part in pytree.arg_tree_leaves(*args, **kwargs) if isinstance(part, Tensor)]
        there = any(isinstance(part, There) for part in tensors)
        moves = func in (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default)
        if there and not moves and any(part.ndim and not isinstance(part, There) for part in tensors):
            raise RuntimeError(f"expected all tensors to be on the same device, in {func}")
        if kwargs.get("device") is not None:
            there = torch.device(kwargs["device"]).type == "elsewhere"
            kwargs["device"] = "cpu"
        owners = {id(part.held): part for part in tensors if isinstance(part, There)}
        args, kwargs = pytree.tree_map_only(There, lambda part: part.held, (args, kwargs))
        found = func(*args, **kwargs)
        if func is torch.ops.aten.copy_.default:
            return tensors[0]
        if not there:
            return found
        return pytree.tree_map_only(Tensor, lambda part: owners[id(part)] if id(part) in owners else There(part), found)


def _to_copy(x: Tensor, dtype: Any = None, **options: Any) -> Tensor:
    return There(torch.ops.aten._to_copy.default(x, dtype=dtype))


def _empty(size: Any, dtype: Any = None, **options: Any) -> Tensor:
    return There(torch.empty(size, dtype=dtype))


def _empty_strided(size: Any, stride: Any, dtype: Any = None, **options: Any) -> Tensor:
    return There(torch.empty_strided(size, stride, dtype=dtype))


for _name, _function in (
    ("_to_copy", _to_copy),
    ("empty.memory_format", _empty),
    ("empty_strided", _empty_strided),
):
    _library.impl(_name, _function, "PrivateUse1")
