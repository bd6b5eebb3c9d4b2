"""Digests of the parameters, the model, the loss function and the data of an objective.

The digest of a value is the same in every process and on every device. A later run can therefore compare digests and
report which values have changed.
"""

from __future__ import annotations

import functools
import hashlib
import inspect
import types
from collections.abc import Iterator, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from curvop.kernels.batches import leaves
from curvop.kernels.functions_objective import FunctionsObjective
from curvop.kernels.model_objective import ModelObjective
from curvop.kernels.objective import CallableObjective, Objective

__all__ = ["digest", "objective_parts", "objective_state", "tensor_bytes"]

_PLAIN = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device, torch.Size)
# Functions of these libraries are hashed by name only, because their code depends on the installed version and not on
# the user's problem.
_LIBRARIES = {"builtins", "torch", "curvop", "numpy", "scipy", "functools", "operator", "math"}
#: Maps the present names of renamed modules to their former names. The fingerprints in existing journal files use the
#: former names.
_FORMER_MODULES = {"curvop.kernels.jacobian_kernel": "curvop.kernels.jacobian"}


def objective_parts(objective: Objective, data: bool = True) -> dict[str, str]:
    """Return the digests of all parameters, model tensors, settings and batches of an objective, as a dict by name.

    The digest of a Python function depends on its code, its default arguments, its closure variables, and the global
    variables that it uses. However, only global variables that are numbers, strings, tensors, layers, or functions from
    the same file are included.

    Parameters
    ----------
    objective : Objective
    data : bool
        Whether to include the batches. If True, the function reads all data once.
    """
    parts = {f"params[{name!r}]": _described(value) for name, value in objective.params.items()}
    if isinstance(objective, FunctionsObjective):
        parts["predict"] = digest(objective._model)
        parts["loss"] = digest((objective.loss_function, objective._targets))
    elif isinstance(objective, ModelObjective):
        parts |= _model_parts(objective._model, objective.params)
        parts["loss_function"] = digest(objective.loss_function)
    elif isinstance(objective, CallableObjective):
        parts["objective"] = digest(objective._objective)
    parts["reduction"] = objective.reduction
    parts["batch_weight"] = digest(objective._batch_weight)
    parts["autocast"] = str(objective.autocast())
    for index, batch in objective.batches() if data else ():
        parts[f"data, batch {index}"] = digest(batch)
    return parts


def objective_state(objective: Objective) -> tuple[object, ...]:
    """Return a tuple that represents the current state of an objective and of its data.

    The tuples returned before and after a change are not equal. If the data are a list or a tuple, modifying a batch in
    place counts as a change.
    """
    data = objective.data
    listed = leaves(data) if isinstance(data, list | tuple) else ()
    versions = [0 if leaf.is_inference() else leaf._version for leaf in listed]
    return objective.state(), versions


def digest(value: Any) -> str:
    """Return a hexadecimal 128-bit hash of a tree of tensors, arrays, modules, functions and plain values."""
    return _hashed(_chunks(value, ()))


def tensor_bytes(tensor: Tensor) -> Tensor:
    """Return the bytes of a tensor of shape ``(..., N)`` as a uint8 CPU tensor, ``(..., N * itemsize)``."""
    return tensor.detach().resolve_conj().resolve_neg().cpu().contiguous().view(torch.uint8)


def _described(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)} {digest(tensor)}"


def _model_parts(model: Any, params: Mapping[str, Tensor]) -> dict[str, str]:
    if not isinstance(model, nn.Module):
        return {"model": digest(model)}
    own = dict(model.named_parameters(remove_duplicate=False))
    selected = {id(own[name]) for name in params}
    others = [(name, value) for name, value in model.named_parameters() if id(value) not in selected]
    tensors = {f"model[{name!r}]": _described(value) for name, value in (*others, *model.named_buffers())}
    return {"model": _hashed(_structure(model, ())), **tensors}


def _hashed(chunks: Iterator[bytes]) -> str:
    result = hashlib.blake2b(digest_size=16)
    for chunk in chunks:
        result.update(chunk)
    return result.hexdigest()


def _structure(module: nn.Module, above: tuple[int, ...]) -> Iterator[bytes]:
    """Yield bytes that identify the layers, settings, code and hooks of a module. Ignore its parameters and buffers."""
    for name, part in module.named_modules(remove_duplicate=False):
        yield _text(name, _name(type(part)))
        for key, value in sorted(vars(part).items()):
            if not key.startswith("_") and (isinstance(value, (*_PLAIN, tuple)) or inspect.isroutine(value)):
                yield _text(key)
                yield from _chunks(value, above)
        yield from _chunks(type(part).forward, above)
        for hook in (*part._forward_pre_hooks.values(), *part._forward_hooks.values()):
            yield from _chunks(hook, above)


def _chunks(value: Any, above: tuple[int, ...]) -> Iterator[bytes]:
    """Yield bytes that identify `value`. `above` has the ids of all objects that contain `value`, outermost first."""
    if isinstance(value, _PLAIN):
        yield _text(type(value).__name__, repr(value))
        return
    if id(value) in above:
        yield _text("cycle", str(len(above) - above.index(id(value))))
        return
    above = (*above, id(value))
    if isinstance(value, Tensor):
        yield from _tensor_chunks(value)
    elif isinstance(value, nn.Module):
        yield from _structure(value, above)
        for name, tensor in (*value.named_parameters(), *value.named_buffers()):
            yield _text(name)
            yield from _tensor_chunks(tensor)
    elif isinstance(value, Mapping):
        yield _text("mapping", str(len(value)))
        for pair in value.items():
            yield from _chunks(pair, above)
    elif isinstance(value, list | tuple):
        yield _text(type(value).__name__, str(len(value)))
        for part in value:
            yield from _chunks(part, above)
    elif isinstance(value, set | frozenset):
        yield _text("set", *sorted(_hashed(_chunks(part, above)) for part in value))
    elif hasattr(value, "tobytes") and hasattr(value, "dtype"):  # NumPy arrays and scalars
        yield _text("array", str(value.dtype), str(value.shape))
        yield value.tobytes()
    else:
        yield from _code_chunks(value, above)


def _tensor_chunks(tensor: Tensor) -> Iterator[bytes]:
    yield _text("tensor", str(tensor.dtype), str(list(tensor.shape)), str(tensor.layout))
    if tensor.layout == torch.sparse_coo:
        tensor = tensor.detach().coalesce()
        for part in (tensor.indices(), tensor.values()):
            yield from _tensor_chunks(part)
    elif tensor.layout != torch.strided:
        yield from _tensor_chunks(tensor.detach().to_dense())
    elif tensor.device.type != "meta":
        yield cast("bytes", tensor_bytes(tensor.reshape(-1)).numpy())  # hashlib accepts arrays


def _code_chunks(value: Any, above: tuple[int, ...]) -> Iterator[bytes]:
    """Yield bytes that identify a function, a type or another object."""
    if isinstance(value, functools.partial):
        yield _text("partial")
        yield from _chunks((value.func, value.args, value.keywords), above)
    elif isinstance(value, types.MethodType):
        yield _text("method")
        yield from _chunks((value.__func__, value.__self__), above)
    elif isinstance(value, types.CodeType):
        yield _text("code", *value.co_names)
        yield value.co_code
        yield from _chunks(value.co_consts, above)
    elif isinstance(value, types.FunctionType) and not _of_library(value):
        yield _text("function", value.__qualname__)  # omit the module's name, which is __main__ in a script
        cells = [_enclosed(cell) for cell in value.__closure__ or ()]
        yield from _chunks((value.__code__, value.__defaults__, value.__kwdefaults__, cells), above)
        for name in sorted(_names(value.__code__) & value.__globals__.keys()):
            used = value.__globals__[name]
            same_module = isinstance(used, types.FunctionType) and used.__module__ == value.__module__
            if same_module or isinstance(used, (*_PLAIN, Tensor, nn.Module)):
                yield _text(name)
                yield from _chunks(used, above)
    elif isinstance(value, type) or inspect.isroutine(value):
        yield _text("name", _name(value))
    else:
        yield _text("object", _name(type(value)))
        if callable(value) and not _of_library(type(value)):
            yield from _chunks((type(value).__call__, vars(value) if hasattr(value, "__dict__") else None), above)


def _names(code: types.CodeType) -> set[str]:
    """Return the names that a function and its nested functions refer to."""
    inner = (_names(part) for part in code.co_consts if isinstance(part, types.CodeType))
    return set(code.co_names).union(*inner)


def _enclosed(cell: Any) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # the variable has no value yet
        return None


def _name(value: Any) -> str:
    library = f"{_FORMER_MODULES.get(value.__module__, value.__module__)}." if _of_library(value) else ""
    return library + str(getattr(value, "__qualname__", type(value).__qualname__))


def _of_library(value: Any) -> bool:
    return str(getattr(value, "__module__", None)).partition(".")[0] in {*_LIBRARIES, "None"}


def _text(*parts: str) -> bytes:
    return b"".join(f"{len(part)}:{part};".encode() for part in parts)
