"""Streams of random numbers of one's own."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor

__all__ = ["Generators", "random_state"]

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
