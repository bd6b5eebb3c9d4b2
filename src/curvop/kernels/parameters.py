"""Validation of the ``model`` and ``params`` arguments, and layouts of vectors of parameters."""

from __future__ import annotations

import abc
import difflib
import itertools
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["BatchLayout", "Layout", "ParameterLayout", "check_callable", "checked_params", "too_coarse", "unknown_name"]


def check_callable(name: str, value: Any, remedy: str) -> None:
    """Raise a TypeError if an argument is not callable, is a class, or is compiled by `torch.compile`."""
    if isinstance(value, type):
        raise TypeError(f"{name} is the class {value.__name__}: pass an instance, {value.__name__}()")
    if not callable(value):
        raise TypeError(f"{name} is a {type(value).__name__}, which cannot be called: pass {remedy}")
    _check_not_compiled(name, value)


def checked_params(model: Any, params: Mapping[str, Tensor] | Iterable[Tensor]) -> dict[str, Tensor]:
    """Validate `params` and return them as a dict in the given order.

    Parameters
    ----------
    model : nn.Module or callable
        If `model` is a module, the names and shapes in `params` must agree with the module's own parameters. The values
        may differ.
    params : dict of str to Tensor, or iterable of the module's own parameters
        The parameters need not require grad.

    Raises
    ------
    TypeError, ValueError
        If a parameter is not supported. The message names the parameter and a remedy.
    """
    own: dict[str, Tensor] | None = None
    if isinstance(model, nn.Module):
        own = dict(model.named_parameters(remove_duplicate=False))
    if not isinstance(params, Iterable):
        raise TypeError(f"params is a {type(params).__name__}: pass dict(model.named_parameters()), or a subset of it")
    if isinstance(params, Tensor):
        raise TypeError("params is one tensor: pass a dict of names to parameters, {'weight': model.weight}")
    named = dict(params) if isinstance(params, Mapping) else _named(own, params)
    if own is not None:
        _check_no_buffers(model, [name for name in named if name not in own])
    if not named:
        raise ValueError(
            "params is empty: pass at least one parameter, such as dict(model.named_parameters()); quantized layers "
            "have none"
        )
    _check_own(model, named)
    for name, value in named.items():
        _check_one(own, name, value)
    _check_together(own, named)
    _check_values(model, named)
    return named


def unknown_name(what: str, name: object, known: Iterable[str]) -> str:
    """Return an error message for a `name` that is not in `known`, with suggestions of similar names."""
    known = list(known)
    near = difflib.get_close_matches(str(name), known, n=3, cutoff=0.4)
    hint = f"did you mean {' or '.join(map(repr, near))}?" if near else f"known are {', '.join(map(repr, known[:10]))}"
    return f"{what}: no parameter is named {name!r}; {hint}"


def too_coarse(name: str, dtype: torch.dtype) -> str | None:
    """Return an error message if a parameter has half precision or lower, otherwise None.

    In half precision a second derivative has one or two correct digits, and the sum of second derivatives over a data
    set may have none. Casting the parameters to a wider dtype for the product would change the model.
    """
    if torch.finfo(dtype).bits >= 32:
        return None
    return f"params[{name!r}] is {dtype}, too coarse for second derivatives: call model.float()"


def _check_not_compiled(name: str, value: Any) -> None:
    """Raise a TypeError if an argument is compiled by `torch.compile`.

    Compiled code has no second derivatives, and compiled loss functions cannot be recognized.
    """
    advice = "torch.compile's code has no second derivatives; engine='compiled' compiles products"
    if not isinstance(value, nn.Module):
        if _is_compiled(value):
            raise TypeError(f"{name} is compiled by torch.compile: pass the function that was compiled ({advice})")
        return
    dynamo = sys.modules.get("torch._dynamo.eval_frame")  # importing it is slow; torch.compile has imported it
    for path, part in value.named_modules():
        where = f"{name}, layer {path!r}," if path else name
        if dynamo is not None and isinstance(part, dynamo.OptimizedModule):
            remedy = f"replace it by its _orig_mod, and pass params of {name}" if path else f"pass {name}._orig_mod"
            raise TypeError(f"{where} is compiled by torch.compile: {remedy} ({advice})")
        if part._compiled_call_impl is not None or _is_compiled(part.forward):
            raise TypeError(
                f"{where} was compiled in place by its method compile(): pass a module that was not compiled ({advice})"
            )


def _is_compiled(function: Any) -> bool:
    """Return True if a function is compiled by `torch.compile`.

    A function with the attribute ``_torchdynamo_disable`` comes from `torch.compiler.disable` and is not compiled.
    """
    return hasattr(function, "_torchdynamo_orig_callable") and not hasattr(function, "_torchdynamo_disable")


def _named(own: dict[str, Tensor] | None, params: Iterable[Tensor]) -> dict[str, Tensor]:
    if own is None:
        raise TypeError("params must be a dict of names to tensors if the model is not an nn.Module")
    names = {id(value): name for name, value in reversed(own.items())}
    named = {}
    for index, value in enumerate(params):
        if not isinstance(value, Tensor):
            raise TypeError(
                f"params[{index}] is a {type(value).__name__}, not a parameter: pass dict(model.named_parameters()) "
                "or list(model.parameters())"
            )
        if id(value) not in names:
            raise ValueError(
                f"params[{index}] is not one of the model's own parameters: pass a dict of names to tensors"
            )
        if names[id(value)] in named:
            raise ValueError(f"params[{index}] is in the list twice: leave {names[id(value)]!r} out once")
        named[names[id(value)]] = value
    return named


def _check_own(model: Any, named: Mapping[str, Tensor]) -> None:
    """Raise a TypeError if parameters are sharded between processes, or if DistributedDataParallel is used."""
    # Do not import torch.distributed.tensor and torch.distributed.fsdp, which is slow. If the model uses one of these
    # modules, it is already imported.
    tensors, fsdp = (sys.modules.get(f"torch.distributed.{name}") for name in ("tensor", "fsdp"))
    remedy = (
        "products need whole parameters: give every rank the whole model and its part of the data "
        "(curvop.distributed.serve), or place the model's layers on several devices"
    )
    parts = list(model.modules()) if isinstance(model, nn.Module) else []
    if any(isinstance(part, nn.parallel.DistributedDataParallel) for part in parts):
        raise TypeError(
            "model is wrapped in DistributedDataParallel, whose passes wait for those of other processes: pass "
            "model.module, and its parameters"
        )
    if fsdp is not None and any(isinstance(part, fsdp.FullyShardedDataParallel) for part in parts):
        raise TypeError(f"model is sharded by FullyShardedDataParallel, but {remedy}")
    others = {name: value for part in parts[:1] for name, value in part.named_parameters() if name not in named}
    for name, value in {**named, **others}.items():
        if tensors is not None and isinstance(value, tensors.DTensor):
            where = f"params[{name!r}]" if name in named else f"model's parameter {name!r}"
            raise TypeError(f"{where} is a DTensor, as fully_shard creates, but {remedy}")


def _check_no_buffers(model: nn.Module, others: Iterable[str]) -> None:
    """Raise a ValueError if `params` contains buffers, as ``model.state_dict()`` does."""
    buffers = dict(model.named_buffers(remove_duplicate=False))
    if names := [name for name in others if name in buffers]:
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        raise ValueError(
            f"params contains buffers of the model, {', '.join(map(repr, names[:3]))}{more}, as model.state_dict() "
            "does: pass dict(model.named_parameters())"
        )


def _check_one(own: Mapping[str, Tensor] | None, name: str, value: Tensor) -> None:
    if own is not None and name not in own:
        raise ValueError(unknown_name("params", name, own))
    if not isinstance(value, Tensor):
        raise TypeError(
            f"params[{name!r}] is a {type(value).__name__}, not a tensor: pass dict(model.named_parameters())"
        )
    if isinstance(value, nn.UninitializedParameter):
        raise ValueError(f"params[{name!r}] has no shape yet: call the model once before it is wrapped")
    if own is not None and value.shape != own[name].shape:
        raise ValueError(
            f"params[{name!r}] has shape {tuple(value.shape)}, but must have the shape of the model's own, "
            f"{tuple(own[name].shape)}"
        )
    if value.is_quantized:
        raise ValueError(f"params[{name!r}] is quantized, and has no derivatives: call dequantize(), or leave it out")
    if value.layout != torch.strided:
        raise ValueError(f"params[{name!r}] has layout {value.layout}: call to_dense(), or leave it out")
    if value.is_inference():
        raise ValueError(
            f"params[{name!r}] was created under torch.inference_mode(), so autograd does not support it: create or "
            "load the model outside inference mode, or use copy.deepcopy(model)"
        )
    if not value.is_floating_point():
        raise ValueError(
            f"params[{name!r}] has dtype {value.dtype}: only real floating-point parameters have curvature, so leave "
            "it out"
        )
    if (coarse := too_coarse(name, value.dtype)) is not None:
        raise ValueError(coarse)


def _check_together(own: Mapping[str, Tensor] | None, named: Mapping[str, Tensor]) -> None:
    first, *rest = named
    for name in rest:
        a, b = named[first], named[name]
        if a.dtype != b.dtype:
            raise ValueError(
                f"params must share one dtype, but {first!r} has {a.dtype} and {name!r} has {b.dtype}: cast the "
                "model, or use separate operators"
            )
        if a.device != b.device and "meta" in (a.device.type, b.device.type):
            raise ValueError(
                f"params must have values, but {first!r} is on {a.device} and {name!r} is on {b.device}: load "
                "the offloaded parameters"
            )
    names: dict[int, str] = {}
    for name, value in named.items():
        for identity in {id(value), id(value if own is None else own[name])}:
            if names.setdefault(identity, name) != name:
                raise ValueError(
                    f"params {names[identity]!r} and {name!r} are one tied tensor: pass one of the two names, as "
                    "dict(model.named_parameters()) does"
                )


def _check_values(model: Any, named: Mapping[str, Tensor]) -> None:
    """Raise a ValueError if a parameter or a buffer is on the meta device."""
    others: list[tuple[str, Tensor]] = []
    if isinstance(model, nn.Module):
        others = [(name, value) for name, value in model.named_parameters() if name not in named]
        others += model.named_buffers()
    for name, value in (*named.items(), *others):
        if value.device.type == "meta":
            where = f"params[{name!r}]" if name in named else f"the model's {name!r}"
            raise ValueError(
                f"{where} is on the meta device, which holds no values: load the weights first, with "
                "model.to_empty(device=...) and load_state_dict"
            )


class Layout(abc.ABC):
    """Abstract base class for the layout of a vector: the order and the shapes of its parts.

    The rows and the columns of a matrix each have a layout. The parts of a vector are either parameters
    (`ParameterLayout`) or the outputs of the batches (`BatchLayout`).

    Attributes
    ----------
    names : tuple of str
        The names of the parameters, in order. Empty if the parts are outputs of batches.
    size : int
        The number of entries of the vector.
    """

    names: tuple[str, ...]
    size: int

    @abc.abstractmethod
    def at(self, vector: Tensor, index: int) -> Tensor:
        """Return a view of the entries of `vector` that belong to one batch.

        Parameters
        ----------
        vector : Tensor of shape (size,) or (K, size)
        index : int
            The number of the batch.
        """

    @abc.abstractmethod
    def split(self, vector: Tensor) -> list[Tensor]:
        """Return a list with a view of each part of a vector.

        Parameters
        ----------
        vector : Tensor
            One vector or K vectors, as returned by `at`.
        """

    @abc.abstractmethod
    def join(self, parts: Sequence[Tensor | None], like: Tensor) -> Tensor:
        """Concatenate the parts into a vector with the dtype and the device of `like`.

        Parameters
        ----------
        parts : sequence of Tensor or None
            The parts in order. A part that is None counts as zeros.
        like : Tensor
        """

    @abc.abstractmethod
    def label(self, part: int) -> str:
        """Return a description of part number `part` for messages."""

    def of(self, leaves: Mapping[str, Tensor]) -> list[Tensor]:
        """Return a list with the leaf of each parameter in `names`, in the same order."""
        return [leaves[name] for name in self.names]


class ParameterLayout(Layout):
    """The layout of a vector of parameters. All entries of the vector belong to every batch.

    Parameters
    ----------
    params : dict of str to Tensor
        All parameters of the objective.
    names : sequence of str
        The names of the parameters in the vector, in order.

    Attributes
    ----------
    shapes : list of torch.Size
        The shape of each parameter.
    slices : dict of str to slice
        The position of each parameter in the vector.
    """

    def __init__(self, params: Mapping[str, Tensor], names: Sequence[str]) -> None:
        self.names = tuple(names)
        self.shapes = [params[name].shape for name in self.names]
        self._views = [tuple(shape) for shape in self.shapes]  # Tensor.view takes tuples faster than torch.Size
        self._sizes = [shape.numel() for shape in self.shapes]
        self.slices = dict(zip(self.names, _slices(self._sizes), strict=True))
        self.size = sum(self._sizes)

    def at(self, vector: Tensor, index: int) -> Tensor:
        """Return `vector`, because all its entries belong to every batch."""
        return vector

    def split(self, vector: Tensor) -> list[Tensor]:
        """Return a list of views, one for each parameter, in the shapes of the parameters.

        If `vector` has shape (K, size), every view has a leading dimension K.
        """
        parts = torch.split_with_sizes(vector, self._sizes, -1)
        leading = tuple(vector.shape[:-1])
        return [
            part if len(shape) == 1 else part.view(leading + shape)
            for part, shape in zip(parts, self._views, strict=True)
        ]

    def join(self, parts: Sequence[Tensor | None], like: Tensor) -> Tensor:
        """Concatenate parts, one for each parameter, into a vector with the shape, dtype and device of `like`.

        If `like` has shape (K, size), every part has a leading dimension K. A part that is None counts as zeros.
        """
        shapes = [(*like.shape[:-1], size) for size in self._sizes]
        pairs = zip(parts, shapes, strict=True)
        return torch.cat([like.new_zeros(shape) if part is None else part.reshape(shape) for part, shape in pairs], -1)

    def label(self, part: int) -> str:
        """Return a description of parameter number `part`."""
        return f"parameter {self.names[part]!r}"


class BatchLayout(Layout):
    """The layout of a vector that concatenates the outputs of all batches, such as a column of a Jacobian.

    Parameters
    ----------
    sizes : sequence of int
        The number of entries that belong to each batch.
    """

    names = ()

    def __init__(self, sizes: Sequence[int]) -> None:
        self._slices = _slices(sizes)
        self.size = sum(sizes)

    def at(self, vector: Tensor, index: int) -> Tensor:
        """Return a view of the entries of `vector` that belong to batch number `index`."""
        return vector[..., self._slices[index]]

    def split(self, vector: Tensor) -> list[Tensor]:
        """Return ``[vector]``, because the outputs of a batch are not divided into parts."""
        return [vector]

    def join(self, parts: Sequence[Tensor | None], like: Tensor) -> Tensor:
        """Return the single tensor in `parts`."""
        [part] = parts
        assert part is not None
        return part

    def label(self, part: int) -> str:
        """Return a description of the outputs of a batch."""
        return "the prediction"


def _slices(sizes: Sequence[int]) -> list[slice]:
    stops = list(itertools.accumulate(sizes))
    return [slice(stop - size, stop) for size, stop in zip(sizes, stops, strict=True)]
