"""Run the user's code with its parameters replaced by other tensors, and undo the side effects of the code."""

from __future__ import annotations

import contextlib
import dis
import functools
import itertools
import operator
import threading
import types
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Self, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.nn.utils import parametrize

from curvop.kernels.batches import leaves, map_leaves
from curvop.kernels.pure_modules import are_pure, runs_user_code

__all__ = [
    "Guard",
    "ModuleFinder",
    "ModuleFoundError",
    "Record",
    "modules_of",
    "own_batch",
    "parts_of",
    "referenced_modules",
    "replaced",
]

T = TypeVar("T")

#: A dict of replacements for tensors. The keys are the ``id`` numbers of the tensors to be replaced.
Replacements = Mapping[int, Tensor]


class Guard:
    """Run the user's code and undo its changes to modules and batches.

    After every run (but for `run_pure`, whose code changes nothing), the guard restores

    - parameters, buffers, submodules and plain attributes of the modules, including the contents of nested lists,
      dicts, sets and deques,
    - the values of buffers, of tensors in other attributes, and of tensors in the batch,
    - all ``requires_grad`` flags.

    State inside other objects is not restored.

    Before a run, the guard records the attributes of all modules. Within the context manager `keeping_record`, later
    runs use the same record until an attribute changes. A run then compares attributes only by identity.

    If a run modifies a buffer, another tensor of the modules or a tensor of a batch, all later runs use copies of the
    buffers, of the other tensors and of the batches. The code then never reads values that its earlier runs have
    written, and retained graphs do not refer to the user's tensors.

    Parameters
    ----------
    modules : sequence of nn.Module
    params : sequence of Tensor
        The parameters of the objective. They need not belong to `modules`.

    Attributes
    ----------
    writes : bool
        Whether the code has written to a buffer, to another tensor of the modules or to its batch.
    """

    def __init__(self, modules: Sequence[nn.Module], params: Sequence[Tensor] = ()) -> None:
        self._modules, self._params = modules, params
        self._record: Record | None = None
        self._keeps_record = False
        self.writes = False

    def __getstate__(self) -> dict[str, object]:
        return self.__dict__ | {"_record": None, "_keeps_record": False}

    @contextlib.contextmanager
    def keeping_record(self) -> Iterator[None]:
        """Within a ``with`` block, record the attributes of the modules only if they have changed since the last run.

        At the end of the block, the record is discarded, because it keeps tensors in memory. The record of pure modules
        is kept, because it refers to little more than their parameters.
        """
        outer = self._keeps_record
        self._keeps_record = True
        try:
            yield
        finally:
            self._keeps_record = outer
            if not (outer or (self._record is not None and self._record.is_pure)):
                self._record = None

    def record(self) -> Record:
        """Return a record of the current attributes of the modules."""
        record = self._record
        if record is None or not record.places.are_unchanged():
            self._record = None  # so that its tensors can be freed
            record = Record(self._modules, self._params)
            self._record = record if self._keeps_record else None
        return record

    def run(
        self,
        function: Callable[[Any], T],
        batch: Any,
        replacements: Replacements | None = None,
        *,
        hold: bool = True,
        record: Record | None = None,
    ) -> T:
        """Return ``function(batch)`` and undo the side effects of the function.

        If the function modifies tensors of the modules or of the batch, it is called a second time, on copies of these
        tensors.

        Parameters
        ----------
        function : callable
        batch : tree of tensors
        replacements : dict of int to Tensor, optional
            Tensors that replace tensors of the modules while the function runs. The keys are the ``id`` numbers of the
            tensors to be replaced.
        hold : bool
            If True, the parameters that are not replaced have ``requires_grad=False`` while the function runs. The
            argument has no effect if `replacements` is None.
        record : Record, optional
            The result of the method `record`. Pass the record if no other code has run since the call of this method.
        """
        swaps, hold = dict(replacements or {}), hold and replacements is not None
        result, wrote = self._watched(function, batch, swaps, hold, record or self.record())
        return self._watched(function, batch, swaps, hold, self.record())[0] if wrote else result

    def run_pure(self, function: Callable[[], T], replacements: Replacements, *, hold: bool, record: Record) -> T:
        """Return ``function()`` for a function that has no side effects; see `Record.is_pure`.

        The arguments are those of the method `run`. Nothing is saved, and only the replaced tensors are put back.
        """
        slots = record.places.slots_of(replacements)
        constant = _variables(record.parameters, replacements) if hold else []
        try:
            try:
                for container, slot, _, new in slots:
                    container[slot] = new
                _hold_constant(constant)
                return function()
            finally:
                for container, slot, old, _ in slots:
                    container[slot] = old
                _put_back_flags((tensor, True) for tensor in constant)
        except BaseException:  # Ctrl-C may have interrupted the block above
            record.places.put_back(slots)
            _put_back_flags((tensor, True) for tensor in constant)
            raise

    def _watched(
        self, function: Callable[[Any], T], batch: Any, swaps: dict[int, Tensor], hold: bool, record: Record
    ) -> tuple[T, bool]:
        """Return ``(result, wrote)``: ``function(batch)``, and whether the function modified the original tensors."""
        places, parameters = record.places, record.parameters
        state, inputs = record.state(), list(leaves(batch))
        flags = [(tensor, tensor.requires_grad) for tensor in (*parameters, *state, *inputs)]
        copied = state
        if state and not (self.writes or record.is_training):
            copied = _sharing_memory(filter(_is_delicate, state), state)
        # Values are saved in every run, because writes may depend on the batch.
        saved = _saved(state, by_value=True) + ([] if self.writes else _saved(inputs))
        own = own_batch(batch, copies=self.writes)
        # Tensors created in inference mode are copied as well, because autograd cannot save them.
        copied = copied + [value for value in parameters if value.is_inference()]
        if copied:
            swaps = _copies(copied) | swaps
        slots = places.slots_of(swaps)
        constant = _variables(parameters, swaps) if hold else []
        wrote = [False]

        def put_back() -> None:
            places.put_back(slots)
            wrote[0] |= _restore(saved)
            _put_back_flags(flags)

        try:
            try:
                places.replace(slots)
                _hold_constant(constant)
                result = function(own)
            finally:
                put_back()
        except BaseException:  # Ctrl-C may have interrupted put_back
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
    """Return a list of the modules to which a callable refers.

    If the callable is a module, the list contains this module. If the callable is a bound method of a module, the list
    contains the module of the method. If the callable is a ``functools.partial``, its function and its arguments are
    searched.
    """
    if isinstance(function, functools.partial):
        parts = (function.func, *function.args, *function.keywords.values())
        return [module for part in parts for module in modules_of(part)]
    own = function if isinstance(function, nn.Module) else getattr(function, "__self__", None)
    return [own] if isinstance(own, nn.Module) else []


def referenced_modules(function: Any) -> list[nn.Module]:
    """Return a list of the modules that a callable can use, without duplicates.

    The list contains the modules that `modules_of` returns. It also contains the modules in closure variables, in
    default arguments, in global variables, in attributes of callable objects, and in attributes of objects to which a
    method is bound. If a function is found in one of these places, the function is searched, too. However, global
    functions are only searched if they are from the same file. All other modules are found by `ModuleFinder` while the
    callable runs.
    """
    found: dict[nn.Module, None] = {}
    seen: set[int] = set()
    stack = [function]
    while stack:
        value = stack.pop()
        if id(value) in seen:
            continue
        seen.add(id(value))
        if isinstance(value, nn.Module):
            found[value] = None
        elif isinstance(value, functools.partial):
            stack += [value.func, *value.args, *value.keywords.values()]
        elif isinstance(value, types.MethodType):
            stack += [value.__self__, value.__func__, *getattr(value.__self__, "__dict__", {}).values()]
        elif isinstance(value, types.FunctionType):
            stack += _used_by(value)
        elif isinstance(value, list | tuple):
            stack += value
        elif isinstance(value, Mapping):
            stack += value.values()
        elif callable(value) and not isinstance(value, type):
            stack += getattr(value, "__dict__", {}).values()
    return list(found)


def _used_by(function: types.FunctionType) -> list[Any]:
    """Return the default arguments, closure variables, and global modules and functions that a function uses."""
    if (function.__module__ or "").partition(".")[0] == "torch":
        return []
    values: list[Any] = [*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values()]
    for cell in function.__closure__ or ():
        with contextlib.suppress(ValueError):  # the variable has no value yet
            values.append(cell.cell_contents)
    code = [function.__code__]
    while code:  # names in nested functions, too
        inner = code.pop()
        code += [constant for constant in inner.co_consts if isinstance(constant, types.CodeType)]
        # `co_names` also contains the names of attributes, which may equal the names of unrelated global variables.
        names = {step.argval for step in dis.get_instructions(inner) if step.opname in ("LOAD_GLOBAL", "LOAD_NAME")}
        for used in (function.__globals__.get(name) for name in sorted(names)):
            own = isinstance(used, types.FunctionType) and used.__module__ == function.__module__
            if own or isinstance(used, nn.Module | functools.partial):
                values.append(used)
    return values


class ModuleFoundError(BaseException):
    """Raised by a `ModuleFinder`. The base class is not ``Exception``, so that user code does not catch the error."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__(f"a {type(module).__name__} is called for the first time")
        self.module = module


class ModuleFinder:
    """Interrupt the user's code before the forward pass of a module that is not known.

    While the context is active, the first call of an unknown module raises a `ModuleFoundError`. The caller then
    repeats the code with this module as `latest`. The repeated code may call another unknown module of the same type
    before it calls `latest`. In this case, the code creates the module itself, as in ``nn.Softmax(1)(z)``. From then
    on, the finder ignores modules of this type at this position in the sequence of calls.

    Parameters
    ----------
    modules : sequence of nn.Module
        The known modules. Their submodules are known, too.
    positions : set of (int, type)
        For each module that the code creates itself: the position in the sequence of calls, and the type of the module.
        The finder adds new entries to the set.
    latest : nn.Module or None
        The module that was found last.

    Attributes
    ----------
    interrupted : ModuleFoundError or None
        The error that was raised.
    temporary : nn.Module or None
        The module `latest` if the code itself created it. Otherwise None.
    """

    def __init__(
        self, modules: Sequence[nn.Module], positions: set[tuple[int, type]], latest: nn.Module | None = None
    ) -> None:
        self._known = set(parts_of(modules))
        self._positions = positions
        self._latest = latest
        self._thread = threading.get_ident()  # the replicas of a DataParallel module run in other threads
        self._calls = 0
        self.interrupted: ModuleFoundError | None = None
        self.temporary: nn.Module | None = None

    def __enter__(self) -> Self:
        self._handle = register_module_forward_pre_hook(self._see)
        return self

    def __exit__(self, *error: object) -> None:
        self._handle.remove()

    def _see(self, module: nn.Module, args: object) -> None:
        if threading.get_ident() != self._thread:
            return
        self._calls += 1
        if module is self._latest:
            self._latest = None
        position = (self._calls, type(module))
        if module in self._known or position in self._positions:
            return
        if self._latest is not None and type(self._latest) is type(module):
            self.temporary = self._latest
            self._positions.add(position)
            return
        self.interrupted = ModuleFoundError(module)
        raise self.interrupted


@contextlib.contextmanager
def replaced(modules: Sequence[nn.Module], replacements: Replacements) -> Iterator[None]:
    """Replace tensors of the modules while the context is active.

    In contrast to `Guard.run`, this function does not restore the values of tensors that the code modifies.
    """
    places = _Places(parts_of(modules))
    slots = places.slots_of(replacements)
    try:
        try:
            places.replace(slots)
            yield
        finally:
            places.put_back(slots)
    except BaseException:  # Ctrl-C may have interrupted put_back
        places.put_back(slots)
        raise


def parts_of(modules: Iterable[nn.Module]) -> list[nn.Module]:
    """Return a list of the given modules and all their submodules, without duplicates."""
    return list(dict.fromkeys(part for module in modules for part in module.modules()))


class Record:
    """The attributes of modules, and lists that are derived from these attributes.

    Attributes
    ----------
    places : _Places
        The attributes of the modules.
    parameters : list of Tensor
        The parameters of the modules and of the objective, without duplicates.
    is_training : bool
        Whether a module with a buffer is in training mode. Such modules are expected to write to their buffers.
    derived : Any
        Any object that the user of the record computes from the attributes of the modules, and reuses as long as the
        record is valid. Initially None.
    """

    derived: Any = None

    def __init__(self, modules: Iterable[nn.Module], params: Iterable[Tensor]) -> None:
        self._parts = parts = parts_of(modules)
        self.places = _Places(parts)
        self._are_pure = are_pure(parts)
        own = (value for part in parts for _, value in part._parameters.items() if value is not None)
        self.parameters = list({id(value): value for value in (*own, *params)}.values())
        self.is_training = any(
            part.training and any(buffer is not None for _, buffer in part._buffers.items()) for part in parts
        )
        parameters = {id(value) for value in self.parameters}
        buffers = {id(buffer): buffer for part in parts for _, buffer in part._buffers.items() if buffer is not None}
        self._buffers = [buffer for key, buffer in buffers.items() if key not in parameters]
        others = {id(tensor): tensor for tensor in self.places.tensors() if not _is_no_state(tensor)}
        self._others = [tensor for key, tensor in others.items() if key not in parameters and key not in buffers]

    @property
    def is_pure(self) -> bool:
        """Whether calls of the modules have no side effects; see `curvop.kernels.pure_modules`."""
        return self._are_pure and not runs_user_code(self._parts)

    def state(self) -> list[Tensor]:
        """Return a list of the buffers and other tensors of the modules, without parameters and duplicates.

        All buffers are included. Other tensors are included unless they belong to an autograd graph.
        """
        return [*self._buffers, *(tensor for tensor in self._others if tensor.grad_fn is None)]


#: A place in a container: the container, a key or an index, the recorded value, and the value that replaces it.
_Slot = tuple[Any, Any, Any, Any]


class _Places:
    """A record of the attributes of modules, including the contents of nested lists, dicts, sets, deques and tuples."""

    def __init__(self, parts: Sequence[nn.Module]) -> None:
        self._saved: list[tuple[Any, Any]] = []  # containers and copies of their contents
        self._with_tensors: list[tuple[Any, Any]] = []  # the entries of _saved that may contain tensors
        seen: set[int] = set()
        # `torch.nn.utils.parametrize.cached` stores results that were computed from the tensors to be replaced.
        self._cache: Any = parametrize._cache
        stack: list[Any] = [self._cache]
        for part in parts:
            self._saved.append((vars(part), dict(vars(part))))
            self._with_tensors.append(self._saved[-1])
            stack += [
                value for name, value in vars(part).items() if isinstance(value, _CONTAINERS) and name not in _HOOKS
            ]
            if isinstance(part, torch.jit.ScriptModule):  # its parameters and buffers are not in vars(part)
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
            self._saved.append((container, dict(container.items()) if _is_mapping(container) else values))
            if inner or any(isinstance(value, Tensor) for value in values):
                self._with_tensors.append(self._saved[-1])
        self._find_slots()
        self._prepare_comparison()

    def _find_slots(self) -> None:
        """Record where tensors are, and where tuples of tensors are, in all containers except sets."""
        self._slots: dict[int, list[tuple[Any, Any, Tensor]]] = defaultdict(list)
        self._tuple_slots: list[tuple[Any, Any, Any]] = []
        for container, contents in self._with_tensors:
            if isinstance(container, set):
                continue
            for slot, value in contents.items() if _is_mapping(container) else enumerate(contents):
                if isinstance(value, Tensor):
                    self._slots[id(value)].append((container, slot, value))
                elif type(value) is tuple and any(True for _ in _tensors(value)):
                    self._tuple_slots.append((container, slot, value))

    def _prepare_comparison(self) -> None:
        """Prepare `are_unchanged`, which compares all contents in a few calls of C functions.

        Comparing dicts with ``==`` is much faster than comparing their values one by one by identity, because ``==``
        compares the identity of two values first. All values are also compared by identity, except strings and the
        attributes that PyTorch sets in every module. Comparison by identity comes first, because ``==`` of a replaced
        tensor is an operation of PyTorch, which would be recorded if the code is traced.
        """
        dicts = [(container, contents) for container, contents in self._saved if isinstance(container, dict)]
        self._dicts, self._copies = [container for container, _ in dicts], [contents for _, contents in dicts]
        self._keys = [*_chained(self._dicts)]
        places = [
            (container, key, value)
            for container, contents in dicts
            for key, value in contents.items()
            if not (isinstance(value, str) or key in _HOOKS)
        ]
        self._owners = [container for container, _, _ in places]
        self._names = [key for _, key, _ in places]
        self._values = [value for _, _, value in places]
        self._sequences = [container for container, _ in self._saved if isinstance(container, list | deque | set)]
        self._sizes = [*map(len, self._sequences)]
        self._items = [*_chained(self._sequences)]
        self._others = [
            (container, contents)
            for container, contents in self._saved
            if not isinstance(container, dict | list | deque | set)
        ]

    def are_unchanged(self) -> bool:
        """Return True if all containers have the recorded contents, in the recorded order."""
        try:
            return (
                self._cache is parametrize._cache
                and all(map(operator.is_, map(operator.getitem, self._owners, self._names), self._values))
                and self._dicts == self._copies
                and [*_chained(self._dicts)] == self._keys
                and [*map(len, self._sequences)] == self._sizes
                and all(map(operator.is_, _chained(self._sequences), self._items))
                and all(
                    len(container) == len(contents)
                    and all(container[name] is value for name, value in contents.items())
                    for container, contents in self._others
                )
            )
        except Exception:  # values that were replaced cannot be compared, such as tensors
            return False

    def tensors(self) -> Iterator[Tensor]:
        """Yield the tensors in all containers except the cache of parametrizations."""
        for container, values in self._with_tensors:
            for value in values.values() if isinstance(values, dict) else values:
                if isinstance(value, Tensor | tuple) and container is not self._cache:
                    yield from _tensors(value)

    def slots_of(self, replacements: Replacements) -> list[_Slot]:
        """Return a list of the places of tensors in `replacements`, with the replacements."""
        found: list[_Slot] = [(*place, new) for old, new in replacements.items() for place in self._slots.get(old, ())]
        for container, slot, value in self._tuple_slots if replacements else ():
            if (other := _rebuilt(value, replacements)) is not value:
                found.append((container, slot, value, other))
        return found

    def replace(self, slots: Iterable[_Slot]) -> None:
        """Replace the values in the given places, and clear the cache of parametrizations."""
        self._cache.clear()
        for container, slot, _, new in slots:
            container[slot] = new

    def put_back(self, slots: Iterable[_Slot]) -> None:
        """Restore the recorded contents of all containers after `replace`."""
        with contextlib.suppress(Exception):  # for example if the code has removed entries from a list
            for container, slot, old, _ in slots:
                container[slot] = old
        if not self.are_unchanged():
            for container, contents in self._saved:
                _fill(container, contents)


_chained = itertools.chain.from_iterable


#: Attributes that PyTorch sets in every module for internal use. Their contents are not saved, because user code has no
#: reason to change them in ``forward``.
_HOOKS = set(vars(nn.Module())) - {"_parameters", "_buffers", "_modules"}

#: Containers whose contents are saved and replaced.
_CONTAINERS = (dict, list, set, deque, tuple)


def _tensors(value: Any) -> Iterator[Tensor]:
    """Yield `value` if it is a tensor, or all tensors in `value` if it is a (nested) tuple."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, tuple):
        for item in value:
            yield from _tensors(item)


def _rebuilt(value: Any, replacements: Replacements) -> Any:
    """Return a (nested) tuple with its tensors replaced, or the tuple itself if nothing is replaced."""
    if type(value) is not tuple:
        return replacements.get(id(value), value)
    items = tuple(_rebuilt(item, replacements) for item in value)
    return value if all(new is old for new, old in zip(items, value, strict=True)) else items


def _is_mapping(container: Any) -> bool:
    return not isinstance(container, list | set | deque | tuple)  # scripted modules have mappings that are not dicts


def _values(container: Any) -> list[Any]:
    return [value for _, value in container.items()] if _is_mapping(container) else list(container)


def _fill(container: Any, contents: Any) -> None:
    """Restore the contents of a container if they have changed."""
    if isinstance(container, dict):
        # Compare ids, because == may not be defined for the objects. `map` is several times faster than a loop.
        if [*map(id, container), *map(id, container.values())] != [*map(id, contents), *map(id, contents.values())]:
            container.clear()
            container.update(contents)
    elif isinstance(container, set):
        if {*map(id, container)} != {*map(id, contents)}:
            container.clear()
            container.update(contents)
    elif isinstance(container, list | deque):
        if [*map(id, container)] != [*map(id, contents)]:
            container.clear()
            container.extend(contents)
    else:
        for name, value in contents.items():
            if container[name] is not value:
                container[name] = value


def _is_no_state(tensor: Tensor) -> bool:
    """Return True if a tensor is a parameter, or a wrapper that torch.func left behind (in an LSTM, for example)."""
    return isinstance(tensor, nn.Parameter) or torch._C._functorch.is_functorch_wrapped_tensor(tensor)


def _is_delicate(tensor: Tensor) -> bool:
    """Return True if user code must run on a copy of the tensor, even if the code has not modified tensors before.

    A copy is needed if a write could attach the tensor to an autograd graph. A copy is also needed if the tensor was
    created in inference mode, because autograd cannot save such a tensor.
    """
    in_graph = tensor.grad_fn is not None or (tensor._is_view() and tensor.is_floating_point())
    return in_graph or tensor.is_inference()


class _Saved:
    """A tensor with a backup copy of its values.

    Parameters
    ----------
    tensor : Tensor
    by_value : bool
        Whether to compare values to detect writes. Without the comparison, writes are detected only by the version
        counter, which misses writes to ``tensor.data``.
    """

    __slots__ = ("_by_value", "_copy", "_memory", "_strided", "_tensor", "_version")

    def __init__(self, tensor: Tensor, by_value: bool) -> None:
        self._tensor, self._version = tensor, tensor._version
        self._memory = tensor.detach()  # the original memory, which `tensor.data = other` would replace
        self._copy = self._memory.clone()
        self._strided = tensor.layout == torch.strided and not tensor.is_nested
        self._by_value = by_value and self._strided and tensor.dtype in _COMPARABLE

    def restore(self) -> bool:
        """Restore the memory and the values of the tensor. Return True if either of them had changed."""
        moved = self._strided and not self._tensor.is_set_to(self._memory)
        written = moved or self._tensor._version != self._version
        if not written and not (self._by_value and _differ(self._memory, self._copy)):
            return False
        if self._tensor.grad_fn is not None:
            self._tensor.detach_()
        if moved:
            self._tensor.data = self._memory
        self._tensor.detach().copy_(self._copy)  # detach instead of no_grad, which Ctrl-C might leave on
        return True


_COMPARABLE = {
    *(torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64, torch.complex128),
    *(torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.bool),
}


def _differ(a: Tensor, b: Tensor) -> bool:
    """Return True if two tensors have different values. NaNs are considered equal."""
    return not torch.equal(a, b) and not torch.allclose(a, b, 0.0, 0.0, equal_nan=True)


def _saved(tensors: Iterable[Tensor], by_value: bool = False) -> list[_Saved]:
    # Tensors created in inference mode have no version counter. Tensors in a graph are results, not state.
    return [_Saved(tensor, by_value) for tensor in tensors if not tensor.is_inference() and tensor.grad_fn is None]


def _restore(saved: Iterable[_Saved]) -> bool:
    written = [tensor.restore() for tensor in saved]
    return any(written)


def _put_back_flags(flags: Iterable[tuple[Tensor, bool]]) -> None:
    for tensor, flag in flags:
        if tensor.requires_grad != flag and tensor.is_leaf:
            tensor.requires_grad_(flag)


def _variables(parameters: Iterable[Tensor], replacements: Replacements) -> list[Tensor]:
    """Return a list of the leaves that require grad and are not replaced."""
    return [value for value in parameters if id(value) not in replacements and value.requires_grad and value.is_leaf]


def _hold_constant(parameters: Iterable[Tensor]) -> None:
    for parameter in parameters:
        parameter.requires_grad_(False)


def _copies(tensors: Iterable[Tensor]) -> dict[int, Tensor]:
    """Return a dict that maps the ``id`` of each tensor to a copy of the tensor.

    If two tensors share memory, their copies also share memory.
    """
    sharing: dict[object, list[Tensor]] = defaultdict(list)
    for tensor in tensors:
        sharing[_memory(tensor)].append(tensor)
    copies: dict[int, Tensor] = {}
    for group in sharing.values():
        if len({id(tensor) for tensor in group}) == 1:
            copies[id(group[0])] = _copied(group[0])
            continue
        whole = torch.empty(0, dtype=group[0].dtype, device=group[0].device).set_(group[0].untyped_storage()).clone()
        views = len({id(tensor if tensor._base is None else tensor._base) for tensor in group}) == 1
        for tensor in group:
            offset, shape, stride = tensor.storage_offset(), tensor.shape, tensor.stride()
            # If tensors share memory, autograd tracks writes to this memory only if all are views of one tensor.
            if views:
                copies[id(tensor)] = whole.as_strided(shape, stride, offset)
            else:
                copies[id(tensor)] = whole.new_empty(0).set_(whole.untyped_storage(), offset, shape, stride)
    return copies


def _copied(tensor: Tensor) -> Tensor:
    """Return a copy of a tensor with the same ``requires_grad`` flag and the same Python attributes."""
    copy = tensor.detach().clone()
    if tensor.requires_grad:
        copy.requires_grad_()
    vars(copy).update(vars(tensor))
    return copy


def _memory(tensor: Tensor) -> object:
    """Return a key that identifies the memory of a tensor: tensors that share memory have equal keys."""
    if tensor.layout != torch.strided or tensor.is_quantized or not tensor.numel():
        return id(tensor)
    return tensor.untyped_storage().data_ptr(), tensor.dtype, tensor.device


def _sharing_memory(selected: Iterable[Tensor], tensors: Iterable[Tensor]) -> list[Tensor]:
    """Return a list of the tensors in `tensors` that share memory with at least one tensor in `selected`."""
    memory = {_memory(tensor) for tensor in selected}
    return [tensor for tensor in tensors if _memory(tensor) in memory]


def own_batch(batch: Any, copies: bool) -> Any:
    """Return a copy of a batch. The user's code may change the containers and ``requires_grad`` flags of the copy.

    Parameters
    ----------
    batch : tree of tensors
    copies : bool
        Whether to copy the values of the tensors. If False, the copy shares memory with the original batch.
    """
    aliases: dict[int, Tensor] = {}

    def own(leaf: Tensor) -> Tensor:
        if id(leaf) not in aliases:
            aliases[id(leaf)] = _alias(leaf, copies)
        return aliases[id(leaf)]

    return map_leaves(own, batch)


def _alias(leaf: Tensor, copy: bool) -> Tensor:
    """Return a copy of a tensor if `copy` is True, or else a new tensor that shares memory with the original.

    If `copy` is False, and the tensor requires grad or may have Python attributes, return the tensor itself.
    """
    if copy:
        return leaf.clone()
    if leaf.requires_grad or type(leaf) is not Tensor or vars(leaf):
        return leaf
    return leaf.detach()
