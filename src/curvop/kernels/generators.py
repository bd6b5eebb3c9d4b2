"""Streams of random numbers of one's own."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

__all__ = ["Generators"]


class Generators:
    """Torch's default generators, as one user of them left them."""

    def __init__(self) -> None:
        self._states: list[Tensor] | None = None

    @contextmanager
    def private(self, device: torch.device) -> Iterator[None]:
        """Draw from these streams, on the host and on `device`, and leave the generators as they were found."""
        outside = _states(device)
        try:
            try:
                if self._states is not None:
                    _set_states(self._states, device)
                yield
            finally:
                self._states = _states(device)
                _set_states(outside, device)
        except BaseException:  # Ctrl-C may have come while they were put back
            _set_states(outside, device)
            raise


def _states(device: torch.device) -> list[Tensor]:
    return [torch.get_rng_state(), *([torch.cuda.get_rng_state(device)] if device.type == "cuda" else [])]


def _set_states(states: list[Tensor], device: torch.device) -> None:
    torch.set_rng_state(states[0])
    if device.type == "cuda":
        torch.cuda.set_rng_state(states[1], device)
