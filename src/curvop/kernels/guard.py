"""Running the user's code so that everything that it changes is put back."""

from __future__ import annotations

import contextlib
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from curvop.kernels.batches import leaves, map_leaves

__all__ = ["Guard", "own_batch", "replaced"]

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

    def run(self, function: Callable[[Any], T], batch: Any, replacements: Replacements | None = None) -> T:
        """Return ``function(batch)``.

        Parameters
        ----------
        function : callable
        batch : tree of tensors
        replacements : dict of int to Tensor, optional
            Tensors that take the places of the modules' own while the function runs. The modules' other parameters
            are constants then: they stay the same objects, but do not require grad.
        """
        result, wrote = self._watched(function, batch, replacements)
        return self._watched(function, batch, replacements)[0] if wrote else result

    def _watched(self, function: Callable[[Any], T], batch: Any, replacements: Replacements | None) -> tuple[T, bool]:
        """Return ``function(batch)``, and whether it wrote to tensors that it was not to write to."""
        places = _Places(self._modules)
        parameters = _parameters(self._modules, self._params)
        state, given = _state_tensors(self._modules, places, parameters), list(leaves(batch))
        flags = [(tensor, tensor.requires_grad) for tensor in (*parameters, *state, *given)]
        # Modules in training mode are expected to write to their buffers.
        training = any(part.training for module in self._modules for part in module.modules())
        copied = state if self.writes or training else _with_neighbours(filter(_is_delicate, state), state)
        # At every run, because writes may depend on the batch.
        saved = _saved(state, by_value=True) + ([] if self.writes else _saved(given))
        own = own_batch(batch, copies=self.writes)
        swaps, constant = _copies(copied), []
        if replacements is not None:
            swaps |= _copies(one for one in parameters if one.is_inference()) | dict(replacements)
            constant = [one for one in parameters if one.requires_grad and one.is_leaf and id(one) not in swaps]
        wrote = [False]

        def put_back() -> None:
            places.put_back()
            wrote[0] |= _restore(saved)
            _put_back_flags(flags)

        try:
            try:
                places.replace(swaps)
                _hold_constant(constant)
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


@contextlib.contextmanager
def replaced(modules: Sequence[nn.Module], replacements: Replacements) -> Iterator[None]:
    """Let other tensors take the places of the modules' own; put everything back at the end, except for values."""
    places = _Places(modules)
    try:
        try:
            places.replace(replacements)
            yield
        finally:
            places.put_back()
    except BaseException:  # Ctrl-C may have come while it was put back
        places.put_back()
        raise


class _Places:
    """All attributes of modules, and what lists, dicts, sets and deques among them hold."""

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        self._found: list[tuple[Any, Any]] = []  # containers, and their copies
        seen: set[int] = set()
        stack: list[Any] = [vars(part) for module in modules for part in module.modules()]
        stack += [one for part in _scripted(modules) for one in (part._parameters, part._buffers)]
        while stack:
            container = stack.pop()
            if id(container) in seen:
                continue
            seen.add(id(container))
            values = _values(container)
            self._found.append((container, dict(container.items()) if _is_mapping(container) else values))
            stack += [value for value in values if isinstance(value, dict | list | set | deque)]

    def tensors(self) -> Iterator[Tensor]:
        """Yield the tensors that were there."""
        for container, _ in self._found:
            yield from (value for value in _values(container) if isinstance(value, Tensor))

    def replace(self, replacements: Replacements) -> None:
        """Put tensors in the places of others; sets, which have no places, keep theirs."""
        for container, found in self._found if replacements else ():
            if isinstance(container, set):
                continue
            slots = found.items() if _is_mapping(container) else enumerate(found)
            for slot, value in slots:
                if id(value) in replacements:
                    container[slot] = replacements[id(value)]

    def put_back(self) -> None:
        """Put everything back in its place."""
        for container, found in self._found:
            _fill(container, found)


def _is_mapping(container: Any) -> bool:
    return not isinstance(container, list | set | deque)  # those of a scripted module are no dicts


def _values(container: Any) -> list[Any]:
    return [value for _, value in container.items()] if _is_mapping(container) else list(container)


def _fill(container: Any, found: Any) -> None:
    """Make a container hold what it held, unless it does."""
    if isinstance(container, dict):
        same = len(container) == len(found) and all(
            one == other and value is found[other] for (one, value), other in zip(container.items(), found, strict=True)
        )
        if not same:
            container.clear()
            container.update(found)
    elif isinstance(container, set):
        if {id(one) for one in container} != {id(one) for one in found}:
            container.clear()
            container.update(found)
    elif isinstance(container, list | deque):
        if len(container) != len(found) or any(one is not other for one, other in zip(container, found, strict=True)):
            container.clear()
            container.extend(found)
    else:
        for name, value in found.items():
            if container[name] is not value:
                container[name] = value


def _scripted(modules: Iterable[nn.Module]) -> list[Any]:
    """Return the parts that torch has compiled; their parameters and buffers are in no dict."""
    parts = (part for module in modules for part in module.modules())
    return [part for part in parts if isinstance(part, torch.jit.ScriptModule)]


def _parameters(modules: Iterable[nn.Module], others: Iterable[Tensor]) -> list[Tensor]:
    """Return the parameters of the modules, and others, each once."""
    own = (value for module in modules for value in module.parameters())
    return list({id(value): value for value in (*own, *others)}.values())


def _state_tensors(modules: Iterable[nn.Module], places: _Places, parameters: Iterable[Tensor]) -> list[Tensor]:
    """Return buffers, and the other tensors of the modules that are no part of a graph, each once."""
    buffers = [buffer for module in modules for buffer in module.buffers()]
    others = (tensor for tensor in places.tensors() if tensor.grad_fn is None and not _is_no_state(tensor))
    found = {id(tensor): tensor for tensor in (*buffers, *others)}
    for parameter in parameters:
        found.pop(id(parameter), None)
    return list(found.values())


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
        self._by_value = by_value and tensor.layout == torch.strided and not tensor.is_quantized

    def restore(self) -> bool:
        """Put the values back, and return whether they were written to."""
        written = self._tensor._version != self._version
        if not written and not (self._by_value and _differ(self._tensor.detach(), self._copy)):
            return False
        if self._tensor.grad_fn is not None:
            self._tensor.detach_()
        self._tensor.detach().copy_(self._copy)  # not under no_grad, which Ctrl-C might leave switched on
        return True


def _differ(these: Tensor, those: Tensor) -> bool:
    """Whether values differ, NaN being equal to itself."""
    return not bool(((these == those) | ((these != these) & (those != those))).all())


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
            copies[id(group[0])] = group[0].detach().clone()
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

    A tensor in a graph, or one that may have attributes, is returned unchanged.
    """
    if copy:
        return leaf.clone()
    if leaf.grad_fn is not None or type(leaf) is not Tensor or vars(leaf):
        return leaf
    return leaf.detach().requires_grad_() if leaf.requires_grad else leaf.detach()
