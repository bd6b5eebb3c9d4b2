"""Whether what an objective depends on is still what it was."""

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

from curvop.kernels.parameters import too_coarse

__all__ = ["ChangeDetector", "Fingerprint", "Generators", "random_state", "settings_of"]

_SECTION = 4096
_SETTINGS = (bool, int, float, str, tuple)


class ChangeDetector:
    """Watches an objective's modules, parameters and list of batches for changes.

    A replaced tensor has another identity; writing to one moves its version counter, save through ``.data``. As this
    is what code that perturbs weights uses, all parameters are fingerprinted besides, and buffers of real numbers, such
    as running means. Buffers have a fingerprint of their own: what is infinite in one, as in a mask, would hide others.
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
        self._tensors: list[Tensor | None] = []  # held, so that no new tensor can have the identity of an old one
        self._versions: list[object] = []
        self._fingerprint, self._of_buffers = Fingerprint([]), Fingerprint([])
        self._batches: list[Any] = []
        self._lists_seen = 0

    def __getstate__(self) -> dict[str, object]:
        return {name: self.__dict__[name] for name in ("_modules", "_params", "_data", "_own", "_shapes")}

    def __setstate__(self, state: dict[str, object]) -> None:
        self.__dict__.update(state)
        self._forget()

    def token(self) -> tuple[object, ...]:
        """Return what changes whenever the objective does; one pass over the parameters.

        Raises
        ------
        RuntimeError
            Where a parameter was the model's own and no longer is, so that its values are not the model's any more.
        """
        flags, children, tensors = self._walk()
        if children != self._children:  # a layer was replaced, added or removed
            self._parts = list(dict.fromkeys(part for module in self._modules for part in module.modules()))
            flags, self._children, tensors = self._walk()
        versions = [_version(tensor) for tensor in tensors]
        if versions != self._versions:
            self._look_again(tensors, versions)
        if isinstance(self._data, list | tuple):
            same = len(self._data) == len(self._batches) and all(map(operator.is_, self._data, self._batches))
            if not same:
                self._batches = list(self._data)
                self._lists_seen += 1
        return flags, self._children, versions, self._lists_seen, self._fingerprint(), self._of_buffers.finite()

    def _walk(self) -> tuple[list[bool], list[nn.Module | None], list[Tensor | None]]:
        """Return the modules' flags, the modules below each, and all tensors."""
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
        """Return the modules' parameters by name; the first module is the model, whose names `params` have."""
        return {
            f"{index}:{name}" if index else name: value
            for index, module in enumerate(self._modules)
            for name, value in module.named_parameters(remove_duplicate=False)
        }

    def _look_again(self, tensors: list[Tensor | None], versions: list[object]) -> None:
        own = self._parameters()
        for name in self._own:
            if own.get(name) is not self._params[name]:
                raise RuntimeError(
                    f"params[{name!r}] was the model's own parameter, but another took its place "
                    "(load_state_dict(assign=True), a new layer): make a new operator of the model's parameters"
                )
        for name, shape in self._shapes.items():
            if (coarse := too_coarse(name, self._params[name].dtype)) is not None:
                raise RuntimeError(coarse)
            if self._params[name].shape != shape:
                raise RuntimeError(
                    f"params[{name!r}] had shape {tuple(shape)} and has {tuple(self._params[name].shape)} now: make a "
                    "new operator"
                )
        parameters = {id(value): value for value in (*own.values(), *self._params.values())}
        self._tensors, self._versions = tensors, versions
        self._fingerprint = Fingerprint(parameters.values())
        buffers = [one for module in self._modules for one in module.buffers() if one.is_floating_point()]
        self._of_buffers = Fingerprint(buffers)


class Fingerprint:
    """Dot products of tensors' entries, section by section, with fixed random numbers.

    They move with every change of the entries or of their order that their precision resolves. Views of the tensors
    are kept between calls, and small tensors are joined, so one call costs little more than reading the memory once.
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
                if len(flat) < _SECTION:
                    self._small[flat.dtype, flat.device].append(flat)
                else:
                    self._rows += _sections(flat)
            else:
                self._others.append(tensor)

    def __call__(self) -> list[float]:
        """Return the fingerprint of the tensors as they are now."""
        rows = self._rows.copy()
        for tensors in self._small.values():
            rows += _sections(torch.cat(tensors))
        for tensor in self._others:
            rows += _sections(_real(tensor.detach()).reshape(-1))
        sums = [torch.mv(matrix, numbers) for matrix, numbers in rows]
        if len(sums) > 1 and len({one.device for one in sums}) == 1:
            return torch.cat(sums).tolist()
        return [entry for one in sums for entry in one.tolist()]

    def finite(self) -> list[float | None]:
        """Return it of tensors that may hold NaN and infinity, as masks and missing values do."""
        return [entry if math.isfinite(entry) else None for entry in self()]

    @staticmethod
    def of_data(tensors: Iterable[Tensor]) -> list[float | None]:
        """Return the fingerprint of a batch's tensors."""
        return Fingerprint(tensors).finite()


def settings_of(modules: Iterable[nn.Module]) -> list[object]:
    """Return what changes what modules do, as far as it can be told: kinds, flags, numbers, hooks.

    Dictionaries, and what a function holds, cannot.
    """
    settings: list[object] = []
    for part in (part for module in modules for part in module.modules()):
        settings += (type(part), *part._forward_pre_hooks.values(), *part._forward_hooks.values())
        settings += ((name, repr(value)) for name, value in vars(part).items() if isinstance(value, _SETTINGS))
        settings += (value for value in vars(part).values() if inspect.isroutine(value))
    return settings


def _sections(flat: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    numbers = _numbers(flat.dtype, flat.device)
    whole = len(flat) // _SECTION * _SECTION
    if whole:
        yield flat[:whole].view(-1, _SECTION), numbers
    if whole < len(flat):
        yield flat[whole:].view(1, -1), numbers[: len(flat) - whole]


def _real(tensor: Tensor) -> Tensor:
    """Return the entries in a precision in which they can be summed."""
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


# Streams of random numbers of one's own.

_HOST = torch.device("cpu")


class Generators:
    """Torch's default generators, as one user of them left them."""

    def __init__(self) -> None:
        self._states: dict[torch.device, Tensor] = {}

    @contextmanager
    def private(self, devices: Iterable[torch.device]) -> Iterator[None]:
        """Draw from these streams, on the host and on `devices`, and leave the generators as they were found."""
        gpus = [device for device in devices if device.type == "cuda"]
        outside = _states(gpus)
        try:
            try:
                _set_states({device: self._states[device] for device in self._states.keys() & outside.keys()})
                yield
            finally:
                self._states = _states(gpus)
                _set_states(outside)
        except BaseException:  # Ctrl-C may have come while they were put back
            _set_states(outside)
            raise


def random_state(devices: Iterable[torch.device]) -> Tensor:
    """Return bytes that are others once a default generator, of the host or of `devices`, was drawn from."""
    return torch.cat([state.cpu() for state in _states(device for device in devices if device.type == "cuda").values()])


def _states(gpus: Iterable[torch.device]) -> dict[torch.device, Tensor]:
    """Return the states of the generators of the host and of `gpus`."""
    return {_HOST: torch.get_rng_state()} | {device: torch.cuda.get_rng_state(device) for device in gpus}


def _set_states(states: Mapping[torch.device, Tensor]) -> None:
    for device, state in states.items():
        if device == _HOST:
            torch.set_rng_state(state)
        else:
            torch.cuda.set_rng_state(state, device)
