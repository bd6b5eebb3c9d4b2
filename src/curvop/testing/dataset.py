"""A whole data set as one batch, and a model's parameters as one vector."""

import copy
from collections.abc import Callable, Iterable, Mapping, MutableMapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

__all__ = ["Problem"]


class Problem:
    """A model and a whole data set, as a function of one vector.

    Attributes
    ----------
    theta : Tensor, shape (P,)
        The parameters.
    y : Any
        All targets.
    eps : float
        The precision of the least precise parameter.
    """

    def __init__(
        self,
        model: nn.Module | Callable[[dict[str, Tensor], Any], Any],
        params: Mapping[str, Tensor] | Iterable[Tensor],
        data: Iterable[tuple[Any, Any]],
    ) -> None:
        self._model = model
        self._params = _named(model, params)
        self.theta = torch.cat([value.detach().reshape(-1) for value in self._params.values()])
        self.eps = max(torch.finfo(value.dtype).eps for value in self._params.values())
        batches = [(X, y) for X, y in data]
        if not batches:
            raise ValueError("data holds no batches (an iterator that was used before is empty)")
        self._X, self.y = (
            _joined([batch[i] for batch in batches], self.theta.device, name) for i, name in enumerate("Xy")
        )

    def predict(self, vector: Tensor) -> Any:
        """Return the prediction for all inputs at the parameters `vector` ``(P,)``."""
        pieces = vector.split([value.numel() for value in self._params.values()])
        state = {
            name: piece.view(value.shape).to(value.dtype)
            for (name, value), piece in zip(self._params.items(), pieces, strict=True)
        }
        if not isinstance(self._model, nn.Module):
            return self._model(state, self._X)
        # Batch norm writes into its buffers: let it write into copies, which torch.func also insists on.
        buffers = {name: buffer.clone() for name, buffer in self._model.named_buffers()}
        return functional_call(self._model, buffers | state, (self._X,))


def _named(model: object, params: Mapping[str, Tensor] | Iterable[Tensor]) -> dict[str, Tensor]:
    """Return the parameters by name, in the order given, or say what is wrong with them."""
    own = dict(model.named_parameters(remove_duplicate=False)) if isinstance(model, nn.Module) else {}
    if isinstance(params, Mapping):
        named = dict(params)
    else:
        names = {id(parameter): name for name, parameter in reversed(own.items())}
        chosen = list(params)
        if any(id(parameter) not in names for parameter in chosen):
            raise ValueError("a list of params must hold the module's own parameters; otherwise pass a dict by name")
        named = {names[id(parameter)]: parameter for parameter in chosen}
    if not named:
        raise ValueError("params is empty: there is nothing to differentiate with respect to")
    if isinstance(model, nn.Module) and (unknown := [name for name in named if name not in own]):
        raise ValueError(f"the model has no parameters named {', '.join(map(repr, unknown))}")
    if len(devices := {value.device for value in named.values()}) > 1:
        raise ValueError(f"params must be on one device, not on {', '.join(sorted(map(str, devices)))}")
    return named


def _joined(parts: list[Any], device: torch.device, where: str) -> Any:
    """Concatenate the same leaf, or collection of leaves, of all batches along dimension 0."""
    first = parts[0]
    if isinstance(first, Tensor):
        shapes = [tuple(part.shape) for part in parts if isinstance(part, Tensor)]
        if len(shapes) < len(parts) or (len(parts) > 1 and (() in shapes or len({s[1:] for s in shapes}) > 1)):
            raise _cannot_join(where, f"of shapes {sorted(set(shapes))}")
        return torch.cat([part.to(device) for part in parts]) if shapes[0] else first.to(device)
    if any(type(part) is not type(first) for part in parts):
        raise _cannot_join(where, f"of types {sorted({type(part).__name__ for part in parts})}")
    if isinstance(first, nn.utils.rnn.PackedSequence):
        if len(parts) > 1:
            raise _cannot_join(where, "packed")
        return first.to(device)  # type: ignore[arg-type]
    if isinstance(first, Mapping):
        if any(set(part) != set(first) for part in parts):
            raise _cannot_join(where, "mappings with different keys")
        # A copy keeps what a constructor may not take: Hugging Face's BatchEncoding, a default factory.
        mapping: MutableMapping[Any, Any] = copy.copy(first) if isinstance(first, MutableMapping) else {}
        mapping.update({key: _joined([part[key] for part in parts], device, f"{where}[{key!r}]") for key in first})
        return mapping
    if isinstance(first, list | tuple):
        if len({len(part) for part in parts}) > 1:
            raise _cannot_join(where, f"of lengths {sorted({len(part) for part in parts})}")
        leaves = [_joined(list(leaf), device, f"{where}[{i}]") for i, leaf in enumerate(zip(*parts, strict=True))]
        return type(first)(*leaves) if hasattr(first, "_fields") else type(first)(leaves)
    if first is None or (isinstance(first, bool | str) and len(set(parts)) == 1):
        return first
    raise TypeError(f"{where} is a {type(first).__name__}: batches must hold tensors, or collections of tensors")


def _cannot_join(where: str, what: str) -> ValueError:
    return ValueError(
        f"the batches cannot be joined into one: {where} is {what}. All but the first dimension must agree; pad "
        "sequences of different lengths to one length"
    )
