"""Change detection for modules, parameters and data; private random number streams.

A tensor counts as changed if its ``id``, version counter or fingerprint changes. The fingerprint is the dot product
of the tensor's entries with fixed random numbers, as in Freivalds' verification of matrix products (R. Freivalds,
"Probabilistic machines can use less running time", IFIP Congress 1977).
"""

from __future__ import annotations

import functools
import inspect
import math
import operator
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from curvop.kernels.guard import parts_of
from curvop.kernels.parameters import too_coarse

__all__ = ["ChangeDetector", "Fingerprint", "Generators", "random_state", "settings_of"]

_SECTION = 4096
_SETTINGS = (bool, int, float, str, tuple)


class ChangeDetector:
    """Detect changes to the modules, the parameters and the list of batches of an objective.

    A replaced tensor is detected by its ``id``, and an in-place operation by the version counter of the tensor. A write
    through ``.data`` changes neither the ``id`` nor the counter, and code that perturbs weights often uses ``.data``.
    Therefore all parameters and all floating-point buffers (running means, for example) are also fingerprinted. Buffers
    have a separate fingerprint, because infinities in a buffer (in a mask, for example) would otherwise hide changes to
    parameters.
    """

    def __init__(self, modules: Sequence[nn.Module], params: Mapping[str, Tensor], data: Iterable[Any]) -> None:
        self._modules = modules
        self._params = params
        self._data = data
        self._shapes = {name: value.shape for name, value in params.items()}
        own = self._parameters()
        self._own = [name for name, value in params.items() if own.get(name) is value]
        self._forget()

    def _forget(self) -> None:
        self._others = [value for name, value in self._params.items() if name not in self._own]
        self._parts: list[nn.Module] = []
        self._children: list[nn.Module | None] | None = None
        self._tensors: list[Tensor | None] = []  # strong references, so that no new tensor gets the id of an old one
        self._versions: list[object] = []
        self._memory: list[Tensor] | None = None
        self._counters: list[int] = []
        self._params_fingerprint, self._buffers_fingerprint = Fingerprint([]), Fingerprint([])
        self._batches: list[Any] = []
        self._data_version = 0

    def __getstate__(self) -> dict[str, object]:
        return {name: self.__dict__[name] for name in ("_modules", "_params", "_data", "_own", "_shapes")}

    def __setstate__(self, state: dict[str, object]) -> None:
        self.__dict__.update(state)
        self._forget()

    def token(self) -> tuple[object, ...]:
        """Return a tuple that represents the current state of the modules, the parameters and the list of batches.

        The tuples returned before and after a change are not equal. Each call reads all parameters once.

        Raises
        ------
        RuntimeError
            If a parameter of the model was replaced by another tensor, if the shape of a parameter has changed, or if
            a parameter was converted to half precision or lower.
        """
        flags, children, tensors = self._walk()
        if children != self._children:  # a layer was replaced, added or removed
            self._parts = parts_of(self._modules)
            flags, self._children, tensors = self._walk()
        if not self._are_unwritten(tensors):
            versions = [_version(tensor) for tensor in tensors]
            if versions != self._versions:
                self._update(tensors, versions)
            self._prepare_comparison()
        if isinstance(self._data, list | tuple):
            same = len(self._data) == len(self._batches) and all(map(operator.is_, self._data, self._batches))
            if not same:
                self._batches = list(self._data)
                self._data_version += 1
        return (
            flags,
            self._children,
            self._versions,
            self._data_version,
            self._params_fingerprint(),
            self._buffers_fingerprint.finite(),
        )

    def _prepare_comparison(self) -> None:
        """Prepare `_are_unwritten`. Tensors that are not strided or have no version counter are not supported."""
        present = [tensor for tensor in self._tensors if tensor is not None]
        self._memory = None
        if all(tensor.layout == torch.strided and not tensor.is_inference() for tensor in present):
            self._memory = [tensor.detach() for tensor in present]
            self._counters = [tensor._version for tensor in present]

    def _are_unwritten(self, tensors: list[Tensor | None]) -> bool:
        """Return True if `tensors` are the recorded tensors, with the recorded memory and version counters.

        This comparison is faster than that of the results of `_version`.
        """
        if self._memory is None or len(tensors) != len(self._tensors):
            return False
        present = [tensor for tensor in tensors if tensor is not None]
        try:
            return (
                all(map(operator.is_, tensors, self._tensors))
                and [tensor._version for tensor in present] == self._counters
                and all(map(Tensor.is_set_to, present, self._memory))
            )
        except RuntimeError:  # a tensor was moved to another device, or converted to another dtype
            return False

    def _walk(self) -> tuple[list[bool], list[nn.Module | None], list[Tensor | None]]:
        """Return three lists ``(flags, children, tensors)``.

        The list `flags` contains the ``training`` flag of each module. The list `children` contains each module,
        followed by its direct submodules. The list `tensors` contains the entries of `params` that do not belong to
        the modules, followed by the parameters and buffers of each module.
        """
        flags: list[bool] = []
        children: list[nn.Module | None] = []
        tensors: list[Tensor | None] = list(self._others)
        for part in self._parts:
            flags.append(part.training)
            children += (part, *part._modules.values())
            tensors += part._parameters.values()
            tensors += part._buffers.values()
        return flags, children, tensors

    def _parameters(self) -> dict[str, Tensor]:
        """Return a dict of the parameters of all modules, by name.

        The first module is the model, whose parameters have the same names as in `params`. The name of a parameter of
        any other module starts with the index of that module.
        """
        return {
            f"{index}:{name}" if index else name: value
            for index, module in enumerate(self._modules)
            for name, value in module.named_parameters(remove_duplicate=False)
        }

    def _update(self, tensors: list[Tensor | None], versions: list[object]) -> None:
        own = self._parameters()
        for name in self._own:
            if own.get(name) is not self._params[name]:
                raise RuntimeError(
                    f"params[{name!r}] was the model's own parameter, but has been replaced "
                    "(load_state_dict(assign=True), a new layer): make a new operator with the model's parameters"
                )
        for name, shape in self._shapes.items():
            if (coarse := too_coarse(name, self._params[name].dtype)) is not None:
                raise RuntimeError(coarse)
            if self._params[name].shape != shape:
                raise RuntimeError(
                    f"params[{name!r}] had shape {tuple(shape)} and now has {tuple(self._params[name].shape)}: make a "
                    "new operator"
                )
        parameters = {id(value): value for value in (*own.values(), *self._params.values())}
        self._tensors, self._versions = tensors, versions
        self._params_fingerprint = Fingerprint(parameters.values())
        buffers = [buffer for module in self._modules for buffer in module.buffers() if buffer.is_floating_point()]
        self._buffers_fingerprint = Fingerprint(buffers)


class Fingerprint:
    """Fingerprint of tensors, for detecting changes of their entries.

    The entries are divided into sections. The fingerprint consists of the dot product of each section with fixed random
    numbers. If an entry changes, or two entries are swapped, the fingerprint changes, too. A change is missed only if
    its effect on the dot products is smaller than rounding errors. Views of the tensors are kept between calls, and
    small tensors are concatenated. A call therefore costs little more than reading the tensors once.
    """

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        self._rows: list[tuple[Tensor, Tensor]] = []
        self._small: dict[tuple[torch.dtype, torch.device], list[Tensor]] = defaultdict(list)
        self._others: list[Tensor] = []
        for tensor in tensors:
            if tensor.layout != torch.strided or not tensor.numel() or tensor.device.type == "meta":
                continue
            if tensor.is_contiguous() and tensor.dtype in (torch.float32, torch.float64):
                flat = tensor.detach().view(-1)
                if flat.numel() < _SECTION:
                    self._small[flat.dtype, flat.device].append(flat)
                else:
                    self._rows += _sections(flat)
            else:
                self._others.append(tensor)

    def __call__(self) -> list[float]:
        """Return the fingerprint of the current entries of the tensors: one number for each section."""
        rows = self._rows.copy()
        for tensors in self._small.values():
            rows += _sections(torch.cat(tensors))
        for tensor in self._others:
            rows += _sections(_real(tensor.detach()).reshape(-1))
        products = [torch.mv(matrix, numbers) for matrix, numbers in rows]
        if len(products) > 1 and len({product.device for product in products}) == 1:
            return torch.cat(products).tolist()  # one transfer to the host
        return [entry for product in products for entry in product.tolist()]

    def finite(self) -> list[float | None]:
        """Return the fingerprint with NaN and infinity replaced by None.

        NaN and infinity may come from masks and missing values. NaN is replaced because two fingerprints are compared
        with ``==``: None equals itself, whereas NaN does not.
        """
        return [entry if math.isfinite(entry) else None for entry in self()]

    @staticmethod
    def of_data(tensors: Iterable[Tensor]) -> list[float | None]:
        """Return the fingerprint of the tensors of a batch, with NaN and infinity replaced by None."""
        return Fingerprint(tensors).finite()


def settings_of(modules: Iterable[nn.Module]) -> list[object]:
    """Return a list of module settings that affect the output: classes, flags, numbers, strings, hooks and functions.

    The list omits attributes that are dictionaries, and variables that functions capture.
    """
    settings: list[object] = []
    for part in parts_of(modules):
        settings += (type(part), *part._forward_pre_hooks.values(), *part._forward_hooks.values())
        settings += ((name, repr(value)) for name, value in vars(part).items() if isinstance(value, _SETTINGS))
        settings += (value for value in vars(part).values() if inspect.isroutine(value))
    return settings


def _sections(flat: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    numbers = _numbers(flat.dtype, flat.device)
    size = flat.numel()
    whole = size // _SECTION * _SECTION
    if whole:
        yield flat[:whole].view(-1, _SECTION), numbers
    if whole < size:
        yield flat[whole:].view(1, -1), numbers[: size - whole]


def _real(tensor: Tensor) -> Tensor:
    """Convert a tensor to float32 or float64; complex entries become pairs of real numbers."""
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor.resolve_conj())
    if tensor.is_floating_point():
        return tensor if tensor.dtype == torch.float64 else tensor.float()
    return tensor.double()


@functools.cache
def _numbers(dtype: torch.dtype, device: torch.device) -> Tensor:
    generator = torch.Generator().manual_seed(_SECTION)
    return torch.randn(_SECTION, generator=generator, dtype=torch.float64).to(device, dtype)


def _version(tensor: Tensor | None) -> object:
    if tensor is None:
        return None
    where = (tensor.data_ptr(), tensor.stride()) if tensor.layout == torch.strided else None
    return id(tensor), tensor.shape, where, 0 if tensor.is_inference() else tensor._version


_HOST = torch.device("cpu")


class Generators:
    """Private random number streams. Each use continues the streams from the end of the previous use.

    While the streams are in use, they replace the states of PyTorch's default generators.
    """

    def __init__(self) -> None:
        self._states: dict[torch.device, Tensor] = {}

    @contextmanager
    def private(self, devices: Iterable[torch.device]) -> Iterator[None]:
        """Use the private streams on the host and on the GPUs in `devices`; restore the default states on exit."""
        gpus = [device for device in devices if device.type == "cuda"]
        outside = _states(gpus)
        try:
            try:
                _set_states({device: self._states[device] for device in self._states.keys() & outside.keys()})
                yield
            finally:
                self._states = _states(gpus)
                _set_states(outside)
        except BaseException:  # Ctrl-C may have interrupted `_set_states(outside)` above
            _set_states(outside)
            raise


def random_state(devices: Iterable[torch.device]) -> Tensor:
    """Return the states of PyTorch's default generators, for the host and for the GPUs in `devices`, as one tensor.

    The tensor changes with every random draw.
    """
    states = [state.cpu() for state in _states(device for device in devices if device.type == "cuda").values()]
    return states[0] if len(states) == 1 else torch.cat(states)


def _states(gpus: Iterable[torch.device]) -> dict[torch.device, Tensor]:
    """Return a dict that maps the host and each GPU in `gpus` to the state of its default generator."""
    return {_HOST: torch.get_rng_state()} | {device: torch.cuda.get_rng_state(device) for device in gpus}


def _set_states(states: Mapping[torch.device, Tensor]) -> None:
    for device, state in states.items():
        if device == _HOST:
            torch.set_rng_state(state)
        else:
            torch.cuda.set_rng_state(state, device)
