"""Which parameters span rows and columns, as users name them."""

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
    """Refuse an argument that cannot be called, a class in the place of one of its objects, and compiled code."""
    if isinstance(value, type):
        raise TypeError(f"{name} is the class {value.__name__}: pass an object of it, {value.__name__}()")
    if not callable(value):
        raise TypeError(f"{name} is a {type(value).__name__}, which cannot be called: pass {remedy}")
    _check_not_compiled(name, value)


def checked_params(model: Any, params: Mapping[str, Tensor] | Iterable[Tensor]) -> dict[str, Tensor]:
    """Return `params` as a dict in its own order, after checking that they can span a curvature matrix.

    Parameters
    ----------
    model : nn.Module or callable
        Where it is a module, every parameter must be one of its own by name and shape, its value may differ.
    params : dict of str to Tensor, or iterable of the module's own parameters
        They need not require grad.

    Raises
    ------
    TypeError, ValueError
        Naming the parameter and the remedy.
    """
    own: dict[str, Tensor] | None = None
    if isinstance(model, nn.Module):
        own = dict(model.named_parameters(remove_duplicate=False))
    if not isinstance(params, Iterable):
        raise TypeError(f"params is a {type(params).__name__}: pass dict(model.named_parameters()), or a part of it")
    if isinstance(params, Tensor):
        raise TypeError("params is one tensor: pass a dict of names to parameters, {'weight': model.weight}")
    named = dict(params) if isinstance(params, Mapping) else _named(own, params)
    if own is not None:
        _check_no_buffers(model, [name for name in named if name not in own])
    if not named:
        raise ValueError(
            "params is empty: pass at least one parameter, such as dict(model.named_parameters()); layers that are "
            "quantised have none"
        )
    _check_own(model, named)
    for name, value in named.items():
        _check_one(own, name, value)
    _check_together(own, named)
    _check_values(model, named)
    return named


def unknown_name(what: str, name: object, known: Iterable[str]) -> str:
    """Return the sentence that says that `name` is not among `known`, with the nearest that are."""
    known = list(known)
    near = difflib.get_close_matches(str(name), known, n=3, cutoff=0.4)
    hint = f"did you mean {' or '.join(map(repr, near))}?" if near else f"known are {', '.join(map(repr, known[:10]))}"
    return f"{what}: no parameter is named {name!r}; {hint}"


def too_coarse(name: str, dtype: torch.dtype) -> str | None:
    """Return the sentence that refuses a parameter for its precision, or None.

    A second derivative in half precision has one digit or two, and sums over a data set none; products computed in a
    wider one would be those of another model than the user calls.
    """
    if torch.finfo(dtype).bits >= 32:
        return None
    return f"params[{name!r}] is {dtype}, too coarse for second derivatives: call model.float()"


def _check_not_compiled(name: str, value: Any) -> None:
    """Refuse what `torch.compile` has made: it cannot be differentiated twice, and hides which loss it computes."""
    advice = "torch.compile's code has no second derivatives; engine='compiled' compiles products"
    if not isinstance(value, nn.Module):
        if _is_compiled(value):
            raise TypeError(f"{name} is compiled by torch.compile: pass the function that was compiled ({advice})")
        return
    dynamo = sys.modules.get("torch._dynamo.eval_frame")  # who has compiled something has imported it
    for path, part in value.named_modules():
        where = f"{name}, layer {path!r}," if path else name
        if dynamo is not None and isinstance(part, dynamo.OptimizedModule):
            original = (
                f"put its _orig_mod in its place, and pass params of {name}" if path else f"pass {name}._orig_mod"
            )
            raise TypeError(f"{where} is compiled by torch.compile: {original} ({advice})")
        if part._compiled_call_impl is not None or _is_compiled(part.forward):
            raise TypeError(f"{where} was compiled in place: use one whose compile() was not called ({advice})")


def _is_compiled(function: Any) -> bool:
    """Whether `torch.compile` has made a function; `torch.compiler.disable` marks functions in the same way."""
    return hasattr(function, "_torchdynamo_orig_callable") and not hasattr(function, "_torchdynamo_disable")


def _named(own: dict[str, Tensor] | None, params: Iterable[Tensor]) -> dict[str, Tensor]:
    if own is None:
        raise TypeError("params must be a dict of names to tensors where the model is not an nn.Module")
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
            raise ValueError(f"params[{index}] stands in the list twice: leave {names[id(value)]!r} out once")
        named[names[id(value)]] = value
    return named


def _check_own(model: Any, named: Mapping[str, Tensor]) -> None:
    """Refuse parameters of which this process has only a part, and modules that wait for other processes."""
    # Who has such parameters has imported these, which take a while to import.
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
            raise TypeError(f"{where} is a DTensor, as fully_shard makes them, but {remedy}")


def _check_no_buffers(model: nn.Module, others: Iterable[str]) -> None:
    """Refuse buffers, which ``model.state_dict()`` holds beside the parameters."""
    buffers = dict(model.named_buffers(remove_duplicate=False))
    if found := [name for name in others if name in buffers]:
        more = f" and {len(found) - 3} more" if len(found) > 3 else ""
        raise ValueError(
            f"params holds buffers of the model, {', '.join(map(repr, found[:3]))}{more}, as model.state_dict() does: "
            "pass dict(model.named_parameters())"
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
        raise ValueError(f"params[{name!r}] is quantised, and has no derivatives: call dequantize(), or leave it out")
    if value.layout != torch.strided:
        raise ValueError(f"params[{name!r}] has layout {value.layout}: make it dense, by to_dense(), or leave it out")
    if value.is_inference():
        raise ValueError(
            f"params[{name!r}] was made under torch.inference_mode(), so that autograd does not take it: make or load "
            "the model outside of it, or use copy.deepcopy(model)"
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
        here, there = named[first], named[name]
        if here.dtype != there.dtype:
            raise ValueError(
                f"params must share one dtype, but {first!r} has {here.dtype} and {name!r} has {there.dtype}: cast the "
                "model, or study them apart"
            )
        if here.device != there.device and "meta" in (here.device.type, there.device.type):
            raise ValueError(
                f"params must have values, but {first!r} is on {here.device} and {name!r} is on {there.device}: load "
                "what is offloaded"
            )
    seen: dict[int, str] = {}
    for name, value in named.items():
        for identity in {id(value), id(value if own is None else own[name])}:
            if seen.setdefault(identity, name) != name:
                raise ValueError(
                    f"params {seen[identity]!r} and {name!r} are one tied tensor: pass one of the two names, as "
                    "dict(model.named_parameters()) does"
                )


def _check_values(model: Any, named: Mapping[str, Tensor]) -> None:
    """Refuse tensors of the model's that hold no values."""
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


# Where in a vector things lie: parameters one after another, or what the batches yield.


class Layout(abc.ABC):
    """How the parts of a vector follow each other.

    Attributes
    ----------
    names : tuple of str
        Of the parameters that are among the parts.
    size : int
        Entries of the vector.
    """

    names: tuple[str, ...]
    size: int

    @abc.abstractmethod
    def at(self, vector: Tensor, index: int) -> Tensor:
        """Return a view of what batch number `index` has to do with of ``(size,)``, or of several ``(K, size)``."""

    @abc.abstractmethod
    def split(self, vector: Tensor) -> list[Tensor]:
        """Return views of such a vector, or of several, one for each part."""

    @abc.abstractmethod
    def join(self, parts: Sequence[Tensor | None], like: Tensor) -> Tensor:
        """Return the vector of these parts, None for zero, in the dtype and on the device of `like`."""

    @abc.abstractmethod
    def label(self, part: int) -> str:
        """Return what to call a part."""

    def of(self, leaves: Mapping[str, Tensor]) -> list[Tensor]:
        """Return the parameters among the parts."""
        return [leaves[name] for name in self.names]


class ParameterLayout(Layout):
    """How the parameters `names` follow each other in a vector; all of it has to do with every batch.

    Parameters
    ----------
    params : dict of str to Tensor
        All parameters.
    names : sequence of str
        Those that take part, in the order of the vector.

    Attributes
    ----------
    shapes : list of torch.Size
    slices : dict of str to slice
    """

    def __init__(self, params: Mapping[str, Tensor], names: Sequence[str]) -> None:
        self.names = tuple(names)
        self.shapes = [params[name].shape for name in self.names]
        self._views = [tuple(shape) for shape in self.shapes]  # quicker to hand over than a torch.Size
        self._sizes = [shape.numel() for shape in self.shapes]
        self.slices = dict(zip(self.names, _slices(self._sizes), strict=True))
        self.size = sum(self._sizes)

    def at(self, vector: Tensor, index: int) -> Tensor:
        """Return all of `vector`."""
        return vector

    def split(self, vector: Tensor) -> list[Tensor]:
        """Return views of `vector` ``(size,)``, or of several ``(K, size)``, one of each parameter's shape."""
        parts = torch.split_with_sizes(vector, self._sizes, -1)
        several = tuple(vector.shape[:-1])
        return [
            part if len(shape) == 1 else part.view(several + shape)
            for part, shape in zip(parts, self._views, strict=True)
        ]

    def join(self, parts: Sequence[Tensor | None], like: Tensor) -> Tensor:
        """Return the vector of one part a parameter, None for zero, in the dtype and on the device of `like`.

        Or several of them, as many as there are in `like`.
        """
        shapes = [(*like.shape[:-1], size) for size in self._sizes]
        pairs = zip(parts, shapes, strict=True)
        return torch.cat([like.new_zeros(shape) if part is None else part.reshape(shape) for part, shape in pairs], -1)

    def label(self, part: int) -> str:
        """Return a parameter's name."""
        return f"parameter {self.names[part]!r}"


class BatchLayout(Layout):
    """How what the batches yield, `sizes` entries each, follows in a vector; its part is all that a batch has.

    Parameters
    ----------
    sizes : sequence of int
    """

    names = ()

    def __init__(self, sizes: Sequence[int]) -> None:
        self._slices = _slices(sizes)
        self.size = sum(sizes)

    def at(self, vector: Tensor, index: int) -> Tensor:
        """Return the batch's entries."""
        return vector[..., self._slices[index]]

    def split(self, vector: Tensor) -> list[Tensor]:
        """Return one part."""
        return [vector]

    def join(self, parts: Sequence[Tensor | None], like: Tensor) -> Tensor:
        """Return the only part."""
        [part] = parts
        assert part is not None
        return part

    def label(self, part: int) -> str:
        """Return what it is."""
        return "the prediction"


def _slices(sizes: Sequence[int]) -> list[slice]:
    stops = list(itertools.accumulate(sizes))
    return [slice(stop - size, stop) for size, stop in zip(sizes, stops, strict=True)]
