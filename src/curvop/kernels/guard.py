"""Running the user's code so that everything that it changes is put back."""

from __future__ import annotations

import contextlib
import functools
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from curvop.kernels.batches import leaves, map_leaves

__all__ = ["Guard", "modules_of", "own_batch", "replaced"]

T = TypeVar("T")

#: Tensors by the `id` of those whose places they take.
Replacements = Mapping[int, Tensor]


class Guard:
    """Runs the user's code, and puts back what it changes in modules and batches.

    Put back are parameters, buffers, submodules and plain attributes of the modules, nested lists, dicts, sets and
    deques included; the values of buffers, of other tensors among the attributes and of the batch; and every
    ``requires_grad``. State inside other objects is not.

    After code has written to such tensors once, it runs on copies. It never reads its own earlier writes, and kept
    graphs do not refer to the user's tensors.

    Parameters
    ----------
    modules : sequence of nn.Module
    params : sequence of Tensor
        Parameters that the modules need not have.

    Attributes
    ----------
    writes : bool
        Whether the code has written to a buffer, to another tensor of the modules or to its batch.
    """

    def __init__(self, modules: Sequence[nn.Module], params: Sequence[Tensor] = ()) -> None:
        self._modules, self._params = modules, params
        self.writes = False

    def run(
        self,
        function: Callable[[Any], T],
        batch: Any,
        replacements: Replacements | None = None,
        *,
        hold: bool = True,
    ) -> T:
        """Return ``function(batch)``.

        Parameters
        ----------
        function : callable
        batch : tree of tensors
        replacements : dict of int to Tensor, optional
            Tensors that take the places of the modules' own while the function runs.
        hold : bool
            Whether the modules' other parameters are constants then: they stay the same objects, but do not require
            grad.
        """
        swaps, hold = dict(replacements or {}), hold and replacements is not None
        result, wrote = self._watched(function, batch, swaps, hold)
        return self._watched(function, batch, swaps, hold)[0] if wrote else result

    def _watched(
        self, function: Callable[[Any], T], batch: Any, swaps: dict[int, Tensor], hold: bool
    ) -> tuple[T, bool]:
        """Return ``function(batch)``, and whether it wrote to tensors that it was not to write to."""
        parts = _parts(self._modules)
        places = _Places(parts)
        parameters = list({id(one): one for one in (*places.parameters(), *self._params)}.values())
        state, given = places.state(parameters), list(leaves(batch))
        flags = [(tensor, tensor.requires_grad) for tensor in (*parameters, *state, *given)]
        # Modules in training mode are expected to write to their buffers.
        training = any(part.training and any(one is not None for _, one in part._buffers.items()) for part in parts)
        copied = state if self.writes or training else _with_neighbours(filter(_is_delicate, state), state)
        # At every run, because writes may depend on the batch.
        saved = _saved(state, by_value=True) + ([] if self.writes else _saved(given))
        own = own_batch(batch, copies=self.writes)
        # Autograd cannot save a tensor made under inference mode.
        made = _copies([*copied, *(one for one in parameters if one.is_inference())])
        swaps = made | swaps
        constant = [one for one in parameters if one.requires_grad and one.is_leaf and id(one) not in swaps]
        wrote = [False]

        def put_back() -> None:
            places.put_back()
            wrote[0] |= _restore(saved)
            _put_back_flags(flags)

        try:
            try:
                places.replace(swaps)
                _hold_constant(constant if hold else [])
                result = function(own)
            finally:
                put_back()
        except BaseException:  # Ctrl-C may have come while it was put back
            put_back()
            raise
        if self.writes and wrote[0]:
            raise RuntimeError(
                "the model writes to a buffer or to its batch through an object that is not a module: write to the "
                "module's own buffer"
            )
        self.writes = self.writes or wrote[0]
        return result, wrote[0]


def modules_of(function: Any) -> list[nn.Module]:
    """Return the modules that a function is, is a method of, or is given in a ``functools.partial``."""
    if isinstance(function, functools.partial):
        parts = (function.func, *function.args, *function.keywords.values())
        return [module for part in parts for module in modules_of(part)]
    own = function if isinstance(function, nn.Module) else getattr(function, "__self__", None)
    return [own] if isinstance(own, nn.Module) else []


@contextlib.contextmanager
def replaced(modules: Sequence[nn.Module], replacements: Replacements) -> Iterator[None]:
    """Let other tensors take the places of the modules' own; put everything back at the end, except for values."""
    places = _Places(_parts(modules))
    try:
        try:
            places.replace(replacements)
            yield
        finally:
            places.put_back()
    except BaseException:  # Ctrl-C may have come while it was put back
        places.put_back()
        raise


def _parts(modules: Iterable[nn.Module]) -> list[nn.Module]:
    """Return the modules and all that are below them, each once."""
    return list(dict.fromkeys(part for module in modules for part in module.modules()))


class _Places:
    """All attributes of modules, and what lists, dicts, sets, deques and tuples among them hold."""

    def __init__(self, parts: Sequence[nn.Module]) -> None:
        self._parts = parts
        self._found: list[tuple[Any, Any]] = []  # containers, and their copies
        self._tensors: list[tuple[Any, Any]] = []  # of these, the ones that may hold tensors
        seen: set[int] = set()
        # What `torch.nn.utils.parametrize.cached` keeps is of the tensors that were there when it was made.
        self._cache: Any = parametrize._cache
        stack: list[Any] = [self._cache]
        for part in parts:
            self._found.append((vars(part), dict(vars(part))))
            self._tensors.append(self._found[-1])
            stack += [
                value for name, value in vars(part).items() if isinstance(value, _CONTAINERS) and name not in _HOOKS
            ]
            if isinstance(part, torch.jit.ScriptModule):  # whose parameters and buffers are in no dict
                stack += [part._parameters, part._buffers]
        while stack:
            container = stack.pop()
            if id(container) in seen:
                continue
            seen.add(id(container))
            values = _values(container)
            inner = [value for value in values if isinstance(value, _CONTAINERS)]
            stack += inner
            if isinstance(container, tuple):
                continue
            self._found.append((container, dict(container.items()) if _is_mapping(container) else values))
            if inner or any(isinstance(value, Tensor) for value in values):
                self._tensors.append(self._found[-1])

    def parameters(self) -> Iterator[Tensor]:
        """Yield the parameters of the modules."""
        for part in self._parts:
            yield from (value for _, value in part._parameters.items() if value is not None)

    def state(self, parameters: Iterable[Tensor]) -> list[Tensor]:
        """Return buffers, and other tensors that are no parameters and no part of a graph, each once."""
        buffers = (one for part in self._parts for _, one in part._buffers.items() if one is not None)
        found = {id(tensor): tensor for tensor in buffers}
        for container, values in self._tensors:
            for value in values.values() if isinstance(values, dict) else values:
                for tensor in _tensors(value) if isinstance(value, Tensor | tuple) else ():
                    if tensor.grad_fn is None and not _is_no_state(tensor) and container is not self._cache:
                        found[id(tensor)] = tensor
        for parameter in parameters:
            found.pop(id(parameter), None)
        return list(found.values())

    def replace(self, replacements: Replacements) -> None:
        """Put tensors in the places of others; sets, which have no places, keep theirs."""
        self._cache.clear()
        for container, found in self._tensors if replacements else ():
            if isinstance(container, set):
                continue
            slots = found.items() if _is_mapping(container) else enumerate(found)
            for slot, value in slots:
                if id(value) in replacements:
                    container[slot] = replacements[id(value)]
                elif type(value) is tuple and (other := _rebuilt(value, replacements)) is not value:
                    container[slot] = other

    def put_back(self) -> None:
        """Put everything back in its place."""
        for container, found in self._found:
            _fill(container, found)


#: Attributes that every module has for torch's own use; user code has no reason to change them in `forward`.
_HOOKS = set(vars(nn.Module())) - {"_parameters", "_buffers", "_modules"}

#: Kinds of containers that are looked into.
_CONTAINERS = (dict, list, set, deque, tuple)


def _tensors(value: Any) -> Iterator[Tensor]:
    """Yield a tensor, or those in tuples."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, tuple):
        for one in value:
            yield from _tensors(one)


def _rebuilt(value: Any, replacements: Replacements) -> Any:
    """Return a tuple with other tensors in the places of its own, or itself if there are none."""
    if type(value) is not tuple:
        return replacements.get(id(value), value)
    parts = tuple(_rebuilt(one, replacements) for one in value)
    return value if all(one is other for one, other in zip(parts, value, strict=True)) else parts


def _is_mapping(container: Any) -> bool:
    return not isinstance(container, list | set | deque | tuple)  # those of a scripted module are no dicts


def _values(container: Any) -> list[Any]:
    return [value for _, value in container.items()] if _is_mapping(container) else list(container)


def _fill(container: Any, found: Any) -> None:
    """Make a container hold what it held, unless it does."""
    if isinstance(container, dict):
        # By identity: an object need not be comparable. `map` is several times as fast as a loop.
        if [*map(id, container), *map(id, container.values())] != [*map(id, found), *map(id, found.values())]:
            container.clear()
            container.update(found)
    elif isinstance(container, set):
        if {*map(id, container)} != {*map(id, found)}:
            container.clear()
            container.update(found)
    elif isinstance(container, list | deque):
        if [*map(id, container)] != [*map(id, found)]:
            container.clear()
            container.extend(found)
    else:
        for name, value in found.items():
            if container[name] is not value:
                container[name] = value


def _is_no_state(tensor: Tensor) -> bool:
    """Whether a tensor is a parameter, or was left by a transform of torch.func (in the list of an LSTM's weights)."""
    return isinstance(tensor, nn.Parameter) or torch._C._functorch.is_functorch_wrapped_tensor(tensor)


def _is_delicate(tensor: Tensor) -> bool:
    """Whether code that writes to a tensor could leave it in a graph, or autograd could not save it."""
    in_graph = tensor.grad_fn is not None or (tensor._is_view() and tensor.is_floating_point())
    return in_graph or tensor.is_inference()


class _Saved:
    """A tensor as it was.

    Parameters
    ----------
    tensor : Tensor
    by_value : bool
        Whether to look at its values; else at its version, which writing to ``tensor.data`` does not change.
    """

    def __init__(self, tensor: Tensor, by_value: bool) -> None:
        self._tensor, self._version, self._copy = tensor, tensor._version, tensor.detach().clone()
        self._memory = tensor.detach()  # which `tensor.data = other` takes away
        self._strided = tensor.layout == torch.strided and not tensor.is_nested
        self._by_value = by_value and self._strided and tensor.dtype in _COMPARABLE

    def restore(self) -> bool:
        """Put memory and values back, and return whether they were written to."""
        moved = self._strided and not self._tensor.is_set_to(self._memory)
        written = moved or self._tensor._version != self._version
        if not written and not (self._by_value and _differ(self._memory, self._copy)):
            return False
        if self._tensor.grad_fn is not None:
            self._tensor.detach_()
        if moved:
            self._tensor.data = self._memory
        self._tensor.detach().copy_(self._copy)  # not under no_grad, which Ctrl-C might leave switched on
        return True


_COMPARABLE = {
    *(torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64, torch.complex128),
    *(torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.bool),
}


def _differ(these: Tensor, those: Tensor) -> bool:
    """Whether values differ, NaN being equal to itself."""
    return not torch.equal(these, those) and not torch.allclose(these, those, 0.0, 0.0, equal_nan=True)


def _saved(tensors: Iterable[Tensor], by_value: bool = False) -> list[_Saved]:
    # A tensor made under inference mode does not count how often it is written to, and one in a graph is no state.
    return [_Saved(one, by_value) for one in tensors if not one.is_inference() and one.grad_fn is None]


def _restore(saved: Iterable[_Saved]) -> bool:
    written = [one.restore() for one in saved]
    return any(written)


def _put_back_flags(flags: Iterable[tuple[Tensor, bool]]) -> None:
    for tensor, flag in flags:
        if tensor.requires_grad != flag and tensor.is_leaf:
            tensor.requires_grad_(flag)


def _hold_constant(parameters: Iterable[Tensor]) -> None:
    for parameter in parameters:
        parameter.requires_grad_(False)


def _copies(tensors: Iterable[Tensor]) -> dict[int, Tensor]:
    """Return copies; those of tensors that share memory share it, too."""
    sharing: dict[object, list[Tensor]] = defaultdict(list)
    for tensor in tensors:
        sharing[_memory(tensor)].append(tensor)
    copies: dict[int, Tensor] = {}
    for group in sharing.values():
        if len({id(tensor) for tensor in group}) == 1:
            copies[id(group[0])] = _copied(group[0])
            continue
        whole = torch.empty(0, dtype=group[0].dtype, device=group[0].device).set_(group[0].untyped_storage()).clone()
        views = len({id(one if one._base is None else one._base) for one in group}) == 1
        for one in group:
            where = one.storage_offset(), one.shape, one.stride()
            # Autograd knows that writing to a view changes the others; memory that is shared otherwise it does not.
            copy = (
                whole.as_strided(*where[1:], where[0])
                if views
                else whole.new_empty(0).set_(whole.untyped_storage(), *where)
            )
            copies[id(one)] = copy
    return copies


def _copied(tensor: Tensor) -> Tensor:
    """Return a copy with the same flag and the same attributes of Python's."""
    copy = tensor.detach().clone()
    if tensor.requires_grad:
        copy.requires_grad_()
    vars(copy).update(vars(tensor))
    return copy


def _memory(tensor: Tensor) -> object:
    """Return a key that tensors have in common if they share memory."""
    if tensor.layout != torch.strided or tensor.is_quantized or not tensor.numel():
        return id(tensor)
    return tensor.untyped_storage().data_ptr(), tensor.dtype, tensor.device


def _with_neighbours(some: Iterable[Tensor], tensors: Iterable[Tensor]) -> list[Tensor]:
    """Return the tensors that share memory with any of `some`."""
    memory = {_memory(tensor) for tensor in some}
    return [tensor for tensor in tensors if _memory(tensor) in memory]


def own_batch(batch: Any, copies: bool) -> Any:
    """Return a batch whose mappings and lists can be written to, with tensors whose flags can be changed."""
    known: dict[int, Tensor] = {}

    def own(leaf: Tensor) -> Tensor:
        if id(leaf) not in known:
            known[id(leaf)] = _alias(leaf, copies)
        return known[id(leaf)]

    return map_leaves(own, batch)


def _alias(leaf: Tensor, copy: bool) -> Tensor:
    """Return another tensor with the same memory, or a copy of it.

    A tensor that requires grad, or that may have attributes, is returned unchanged.
    """
    if copy:
        return leaf.clone()
    if leaf.requires_grad or type(leaf) is not Tensor or vars(leaf):
        return leaf
    return leaf.detach()
