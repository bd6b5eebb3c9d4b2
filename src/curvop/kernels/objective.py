r"""What is being differentiated: a loss over a data set, as a function of named parameters.

.. math::

    L(\theta) = \frac{1}{W} \sum_b w_b \, \ell_b(\theta), \quad W = \sum_b w_b \quad \text{(reduction 'mean')}, \qquad
    L(\theta) = \sum_b \ell_b(\theta) \quad \text{(reduction 'sum')}.
"""

from __future__ import annotations

import abc
import contextlib
import dataclasses
import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from curvop.kernels.batches import at_batch, on_device, told
from curvop.kernels.batches import leaves as leaves_of
from curvop.kernels.cuda import begin_on
from curvop.kernels.differentiable import Evaluator, slow_backends
from curvop.kernels.errors import NonDeterministicObjectiveError
from curvop.kernels.generators import Generators
from curvop.kernels.preflight import Guard, cautions, suspects
from curvop.kernels.state import Fingerprint, Watch, settings_of
from curvop.kernels.weights import check_loss, checked_weight

__all__ = ["BatchLoss", "BatchWeight", "Objective", "Share"]

#: ``batch -> w_b``, given the batch as `data` yields it, on the parameters' device.
BatchWeight = Callable[[Any], float]


@dataclasses.dataclass
class BatchLoss:
    """One batch's loss at one point.

    Attributes
    ----------
    value : Tensor
        The loss, a scalar, detached.
    weight : float
        The batch's weight ``w_b``.
    output, derivative : Tensor, Tensor or None
        What is differentiated, and the loss's derivative by it where it is not the loss itself.
    """

    value: Tensor
    weight: float
    output: Tensor
    derivative: Tensor | None

    def gradient(self, params: Sequence[Tensor], create_graph: bool = False) -> Sequence[Tensor | None]:
        """Return the gradient by `params`, None for what the loss does not reach.

        A batch of weight 0, such as one whose targets are all ignored, has a loss of 0/0: it is left out, not added.
        """
        if not self.weight or not self.output.requires_grad:
            return [None] * len(params)
        return torch.autograd.grad(self.output, params, self.derivative, create_graph=create_graph, allow_unused=True)


@dataclasses.dataclass
class Share:
    """What a part of a data set has of the whole: the sum of its batches' weights, and their number."""

    weight: float = 0.0
    batches: int = 0


class Objective(abc.ABC):
    """A loss over a data set; subclasses say how one batch's loss is computed.

    Attributes
    ----------
    params : dict of str to Tensor
        The user's tensors, never written to. They are read anew at every linearization.
    reduction : {'mean', 'sum'}
    modules : tuple of nn.Module
        Model and loss function, where they are modules.
    guard : Guard
        By which code of the user's is run.
    evaluator : Evaluator
        By which it is made differentiable twice.
    ordered : bool
        Whether batches come in the same order in every pass, as those of a list do.
    told : set of str
        What `warn_once` has warned of.
    """

    def __init__(
        self,
        modules: Sequence[nn.Module],
        params: dict[str, Tensor],
        data: Iterable[Any],
        reduction: str,
        batch_weight: BatchWeight | None,
    ) -> None:
        if not isinstance(data, Iterable):
            raise TypeError(f"data is a {type(data).__name__}: pass an iterable of batches, a list or a DataLoader")
        if isinstance(data, Iterator):
            raise TypeError(
                "data is a one-shot iterator, but every product reads it again: pass list(data) or a DataLoader"
            )
        if batch_weight is not None and not callable(batch_weight):
            raise TypeError(f"batch_weight is a {type(batch_weight).__name__}: pass a function of the batch")
        if batch_weight is not None and reduction == "sum":
            raise ValueError("batch_weight has no meaning with reduction='sum': leave it out")
        self.params = params
        self.reduction = reduction
        self.modules = tuple(modules)
        self.guard = Guard(self.modules)
        self.evaluator = Evaluator()
        self._data = data
        self._batch_weight = batch_weight
        self._generators = Generators()
        self._order: list[list[float | None]] | None = None
        self.ordered = isinstance(data, list | tuple)
        self.told: set[str] = set()
        self._share: Share | None = None
        self._watch = Watch(self.modules, params, data)
        parts = [part for module in modules for part in module.modules()]
        self._recurrent = any(isinstance(part, nn.RNNBase) for part in parts)
        self._renormalised = any(getattr(part, "max_norm", None) is not None for part in parts)

    @property
    def device(self) -> torch.device:
        """Where the first of the parameters is now: a model may be moved or cast after the operator is made."""
        return next(iter(self.params.values())).device

    @property
    def devices(self) -> set[torch.device]:
        """Where any of the parameters is."""
        return {value.device for value in self.params.values()}

    @property
    def dtype(self) -> torch.dtype:
        """What the parameters are now."""
        return next(iter(self.params.values())).dtype

    @abc.abstractmethod
    def _loss(self, leaves: Mapping[str, Tensor], batch: Any) -> tuple[Tensor, float | None, Tensor, Tensor | None]:
        """Return the batch's loss, the divisor of its mean (None where it is not known), `output` and `derivative`."""

    @abc.abstractmethod
    def held(self, leaves: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
        """Return what the loss depends on besides `leaves` and the batch, as far as torch modules hold it."""

    @abc.abstractmethod
    def traced(
        self, leaves: Mapping[str, Tensor], held: dict[str, dict[str, Tensor]], batch: Any
    ) -> tuple[Tensor, Any]:
        """Return a batch's loss and prediction as a function of its arguments alone, without reading their values."""

    @abc.abstractmethod
    def _mean_divisor(self, prediction: Any, batch: Any) -> float | None:
        """Return the divisor of a batch's mean, of which the prediction's shape is asked; None if it is not known."""

    def __len__(self) -> int:
        """Return the number of batches where `data` knows it, else 0."""
        try:
            return len(self._data)  # type: ignore[arg-type]
        except TypeError:
            return 0

    def batches(self) -> Iterator[tuple[int, Any]]:
        """Yield ``(index, batch)`` with the batch on the parameters' device, from private streams of random numbers.

        Loaders and models that draw random numbers leave torch's global generators as they found them, yet draw other
        numbers in every pass, so that randomness in the objective shows itself instead of being frozen by accident.
        """
        index, devices = -1, self.devices
        for device in devices:
            begin_on(device)
        with self._generators.private(devices):
            for index, batch in enumerate(on_device(told(self._data), self.device)):
                self._check_order(index, batch)
                yield index, batch
        if index < 0 and self._share is None:
            raise ValueError("data is empty: it yields no batch, pass at least one")

    def warn_once(self, batches: int, *, aloud: bool = True) -> None:
        """Warn of what makes a matrix over so many batches another than the user may mean, of each thing once."""
        cast = self.autocast() if any(one.dtype != torch.float64 for one in self.params.values()) else None
        found = cautions(self.modules, batches, cast)
        if aloud and (new := [found[kind] for kind in found if kind not in self.told]):
            warnings.warn("; ".join(new), RuntimeWarning, stacklevel=2)
        self.told.update(found)

    def changed(self, what: str, then: float, now: Any) -> str:
        """Say that a loss has changed from pass to pass, and what to look at."""
        return (
            f"{what} was {float(then):.9g} at first and is {float(now):.9g} now, at the same parameters: "
            f"{suspects(self.modules)}"
        )

    def keep_order(self) -> None:
        """Refuse, from now on, a loader that yields other batches than in its first pass, or in another order."""
        if self._order is None and not self.ordered:
            self._order = []

    def _check_order(self, index: int, batch: Any) -> None:
        if self._order is None:
            return
        fingerprint = Fingerprint.of_data(leaves_of(batch))
        if index == len(self._order):
            self._order.append(fingerprint)
        elif self._order[index] != fingerprint:
            raise NonDeterministicObjectiveError(
                f"data yields another batch {index} than in the first pass, but the matrix depends on the order of the "
                "data (the rows of a Jacobian, the draws of a Fisher matrix): pass shuffle=False to the DataLoader"
            )

    def leaves(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Return all parameters cut off from the user's graph, those of `names` ready to be differentiated."""
        names = set(names)
        # An embedding with `max_norm` writes to its weight in the forward pass: let it write to a copy.
        values = {name: value.detach() for name, value in self.params.items()}
        if self._renormalised:
            values = {name: value.clone() for name, value in values.items()}
        return {name: value.requires_grad_(name in names) for name, value in values.items()}

    def slow_backends(self) -> AbstractContextManager[None]:
        """Choose backends that can be differentiated twice, for as long as the context lasts."""
        return slow_backends(self._recurrent)

    def evaluate(self, leaves: Mapping[str, Tensor], index: int, batch: Any) -> BatchLoss:
        """Return the loss of batch number `index`, differentiable twice in `leaves` within `slow_backends`.

        Buffers of modules in training mode are copies.
        """
        with at_batch(index):
            found = self.evaluator(lambda: self.guard.run(lambda own: self._loss(leaves, own), batch))
        return self._checked(found, index, batch)

    def _checked(self, found: tuple[Tensor, float | None, Tensor, Tensor | None], index: int, batch: Any) -> BatchLoss:
        check_loss(found[0], index)
        return BatchLoss(found[0].detach(), self._weight(index, batch, found[1]), *found[2:])

    def weight(self, prediction: Any, index: int, batch: Any) -> float:
        """Return the weight ``w_b`` of batch number `index`, of whose prediction the shape is asked."""
        return self._weight(index, batch, self._mean_divisor(prediction, batch))

    def divisor(self, weights: Iterable[float]) -> float:
        """Return what the weighted sum over batches is divided by: ``W`` for a mean, 1 for a sum."""
        if self._share is not None:
            weights = list(weights)
            self._share.weight, self._share.batches = math.fsum(weights), len(weights)
            return 1.0
        if self.reduction == "sum":
            return 1.0
        total = math.fsum(weights)
        if total == 0:
            raise ValueError("data has total weight 0 (every target is ignored): pass data with a target that counts")
        return total

    @contextlib.contextmanager
    def as_share(self) -> Iterator[Share]:
        """Take the data for a part of a larger set: it may be empty, no sum is divided, and its share is filled in."""
        self._share = Share()
        try:
            yield self._share
        finally:
            self._share = None

    def mode(self) -> tuple[object, ...]:
        """Return what changes what the modules do, as far as it can be told; see `settings_of`."""
        return self.autocast(), *settings_of(self.modules)

    def autocast(self) -> torch.dtype | None:
        """Return the dtype of autocast, where it is enabled."""
        kind = self.device.type
        return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None

    def state(self) -> tuple[object, ...]:
        """Return a token that changes whenever the objective does, at the cost of one pass over the parameters."""
        return len(self), self._share is None, self.autocast(), *self._watch.token()

    def tensors(self) -> Iterator[Tensor]:
        """Yield every tensor that exists for the objective anyway, whether anything is kept or not."""
        yield from self.params.values()
        for module in self.modules:
            yield from module.parameters()
            yield from module.buffers()

    def _weight(self, index: int, batch: Any, divisor: float | None) -> float:
        if self.reduction == "sum":
            return 1.0
        if self._batch_weight is not None:
            return checked_weight(self._batch_weight(batch), index)
        if divisor is None:
            if len(self) == 1 and self._share is None:  # the weight of an only batch cancels
                return 1.0
            raise ValueError(
                f"the batch size of batch {index} cannot be told, as its tensors differ in their first dimension, and "
                "batches of a mean-reduced loss are weighted by it: pass batch_weight=, a function of the batch"
            )
        return divisor
