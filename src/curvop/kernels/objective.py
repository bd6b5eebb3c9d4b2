r"""What is being differentiated: a loss over a data set, as a function of named parameters.

.. math::

    L(\theta) = \frac{1}{W} \sum_b w_b \, \ell_b(\theta), \quad W = \sum_b w_b \quad \text{(reduction 'mean')}, \qquad
    L(\theta) = \sum_b \ell_b(\theta) \quad \text{(reduction 'sum')}.
"""

from __future__ import annotations

import abc
import contextlib
import dataclasses
import functools
import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.backends import cuda, cudnn

from curvop.kernels.batches import at_batch, batch_size, numbered_errors, on_device
from curvop.kernels.batches import leaves as leaves_of
from curvop.kernels.changes import ChangeDetector, Fingerprint, Generators, settings_of
from curvop.kernels.differentiable import Evaluator, slow_backends
from curvop.kernels.errors import NonDeterministicObjectiveError, arrays_explained
from curvop.kernels.guard import Guard, modules_of, own_batch, replaced
from curvop.kernels.losses import check_loss, checked_weight, loss_reduction
from curvop.kernels.objective_checks import (
    BatchPair,
    batchwise_modules,
    cautions,
    compared_as_one,
    random_modules,
    random_subset,
    reached,
    suspects,
)
from curvop.kernels.parameters import check_callable, checked_params
from curvop.kernels.passes import Totals, precision

__all__ = [
    "BATCHING_REMEDY",
    "ZERO_MATRIX",
    "BatchLoss",
    "BatchWeight",
    "Buffers",
    "CallableObjective",
    "Objective",
    "PartWeights",
]

#: What to do about batches whose loss as one contradicts their weights.
BATCHING_REMEDY = (
    "pass batch_weight=, a function of the batch, such as its number of targets that count, or say that the loss is a "
    "sum (loss_function.reduction = 'sum'); else the loss couples its examples, or adds a term without data once per "
    "batch, so that the matrix depends on how the data is cut: pass one batch"
)
#: What a generalized Gauss-Newton matrix of a loss is that is linear in the prediction.
ZERO_MATRIX = (
    "the matrix is zero, because the loss is linear in the prediction; if the model computes its own loss, return the "
    "logits and compute the loss in loss_function, or use HessianLinearOperator"
)
# NVIDIA's TF32 has the range of float32, and 10 bits behind the binary point.
_TF32_EPSILON = 2.0**-10

T = TypeVar("T")


#: ``(leaves, batch) -> result``.
Evaluation = Callable[[Mapping[str, Tensor], Any], T]
#: ``batch -> w_b``, given the batch as `data` yields it, on the parameters' device.
BatchWeight = Callable[[Any], float]
#: Tensors of the modules besides the differentiated ones: by module (``"model"``, ``"loss"``), then by name.
Buffers = dict[str, dict[str, Tensor]]


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
class PartWeights:
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
    batching : str or None
        How the loss of two batches as one contradicts their weights, empty if it does not; None until a whole pass is
        over.
    curved : bool or None
        Whether the loss has a second derivative by the prediction, as far as that was looked at.
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
        self.guard = Guard(self.modules, list(params.values()))
        self.evaluator = Evaluator()
        self._data = data
        self._batch_weight = batch_weight
        self._generators = Generators()
        self._order: list[list[float | None]] | None = None
        self.ordered = isinstance(data, list | tuple)
        self.warned: set[str] = set()
        self._part_weights: PartWeights | None = None
        self._searched: set[str] = set()  # what a whole pass was searched for
        self._searching: set[str] = set()
        self._keeps_flags: bool | None = None
        self._depends = False  # whether anything was seen to depend on a parameter
        self.curved: bool | None = None
        self._last: Totals | None = None
        self._pair: BatchPair | None = BatchPair()
        self.batching: str | None = None
        self.unverified = False  # whether no two batches could be compared
        self._changes = ChangeDetector(self.modules, params, data)
        parts = [part for module in modules for part in module.modules()]
        self._recurrent = any(isinstance(part, nn.RNNBase) for part in parts)
        self._renormalised = any(getattr(part, "max_norm", None) is not None for part in parts)

    def __getstate__(self) -> dict[str, object]:
        return self.__dict__ | {"_last": None, "_pair": None}  # which hold identities, and batches

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
    def plain_loss(self, leaves: Mapping[str, Tensor], batch: Any) -> Tensor:
        """Return the loss as the user's own call computes it, within ``guard.run`` with `replacements`."""

    @abc.abstractmethod
    def buffers(self, leaves: Mapping[str, Tensor]) -> Buffers:
        """Return what the loss depends on besides `leaves` and the batch, as far as torch modules hold it."""

    @abc.abstractmethod
    def traced(self, leaves: Mapping[str, Tensor], buffers: Buffers, batch: Any) -> tuple[Tensor, Any]:
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
            _start_autograd(device)
        with self._generators.private(devices):
            for index, batch in enumerate(on_device(self._seen(numbered_errors(self._data)), self.device)):
                self._check_order(index, batch)
                yield index, batch
        if index < 0 and self._part_weights is None:
            raise ValueError("data is empty: it yields no batch, pass at least one")

    def _seen(self, batches: Iterable[Any]) -> Iterator[Any]:
        """Yield the batches; until a pass is over, remember two by which their weights can be verified."""
        pair = self._pair = BatchPair() if self.batching is None and self._assumes_weights() else None
        try:
            for index, batch in enumerate(batches):
                self._check_batch(index, batch)
                if pair is not None:
                    pair.see(index, batch)
                yield batch
        except BaseException:  # also where a pass is given up
            self._pair = None
            raise

    def _check_batch(self, index: int, batch: Any) -> None:  # noqa: B027  # most objectives take any
        """Refuse a batch that the objective cannot take."""

    def _assumes_curvature(self) -> bool:
        """Whether a loss without a second derivative by the prediction is likely a mistake."""
        return True

    @abc.abstractmethod
    def _assumes_weights(self) -> bool:
        """Whether it is an assumption how the batches' losses make up that of the whole data set."""

    def totals(self) -> Totals:
        """Return the losses of a pass that is to begin, for `conclude`."""
        return Totals(self.state())

    def conclude(self, totals: Totals, kept: bool = False) -> None:
        """Verify what a pass over all of the data has shown, and warn of what the user may not mean.

        Parameters
        ----------
        totals : Totals
        kept : bool
            Whether later products are of the data of this pass, so that later passes must see the same.

        Raises
        ------
        NonDeterministicObjectiveError
            If the losses are others than in a pass that was kept in the same state.
        RuntimeError
            If no batch's loss depends on any of the parameters.
        """
        if self._last is not None and not self._last.stale(totals.state):
            if (found := self._last.differs(totals, self.ordered)) is not None:
                raise NonDeterministicObjectiveError(self.changed(*found))
        elif kept and math.isfinite(sum(totals.losses)):
            self._last = totals.alone()
        if self._part_weights is None and not self._reaches():
            raise RuntimeError(
                "the loss depends on none of the parameters in params, and does not require grad: it is computed under "
                "torch.no_grad(), from .detach() or .data, or from other tensors; compute it from the parameters that "
                "the model is given"
            )
        self._searched, self._searching = self._searched | self._searching, set()
        self.verify_batching(totals)
        self.warn_once(len(totals.weights))

    def _run(self, function: Evaluation[T], leaves: Mapping[str, Tensor], batch: Any, what: str) -> T:
        """Return ``function(leaves, batch)`` with `leaves` in the places of the parameters, and put everything back.

        In the first pass that evaluates `what`, the graph of the result is searched for parameters that are reached in
        other ways.
        """
        with arrays_explained(batch):
            self._searching.add(what)
            if self._keeps_flags is None:
                self._keeps_flags = self._needs_flags(function, leaves, batch, what)
                for leaf in leaves.values() if self._keeps_flags else ():
                    leaf.requires_grad_()
            return self._run_once(function, leaves, batch, what, bool(self._keeps_flags))

    def _run_once(
        self, function: Evaluation[T], leaves: Mapping[str, Tensor], batch: Any, what: str, keeps_flags: bool
    ) -> T:
        users = {} if what in self._searched else self._users_tensors()

        def run(own: Any) -> T:
            _require_grad(users)
            found = function(leaves, own)
            if users:
                self._look(found, users, leaves)
            return found

        return self.evaluator(lambda: self.guard.run(run, batch, self.replacements(leaves), hold=not keeps_flags))

    def _needs_flags(self, function: Evaluation[T], leaves: Mapping[str, Tensor], batch: Any, what: str) -> bool | None:
        """Whether code asks which parameters require grad, and its result depends on it; None if all of them do here.

        If it does not, parameters that are not differentiated by are constants: nothing is saved for layers below a
        block.
        """
        others = {id(one): one for module in self.modules for one in module.parameters()}
        for tensor in (tensor for tensors in self._users_tensors().values() for tensor in tensors):
            others.pop(id(tensor), None)
        asked = [name for name, leaf in leaves.items() if leaf.requires_grad]
        if len(asked) == len(leaves) and not any(one.requires_grad for one in others.values()):
            return None
        every = self.leaves(self.params)
        as_found = self._run_once(function, every, batch, what, keeps_flags=True)
        try:
            as_asked = self._run_once(function, leaves, batch, what, keeps_flags=False)
        except Exception:  # such as an inner loop of training that differentiates by all parameters
            return True
        pairs = zip(leaves_of(as_found), leaves_of(as_asked), strict=True)
        if not all(_agree(*pair) for pair in pairs):
            return True
        reached_by = [
            reached(leaves_of(found), {name: [own[name]] for name in asked})
            for found, own in ((as_found, every), (as_asked, leaves))
        ]
        return reached_by[0] != reached_by[1]

    def _look(self, found: Any, users: Mapping[str, Sequence[Tensor]], leaves: Mapping[str, Tensor]) -> None:
        """Search the graph of what was evaluated; raise if it reaches one of the user's tensors itself."""
        outputs = list(leaves_of(found))
        if direct := reached(outputs, users):
            raise ValueError(self._reached_directly(min(direct, key=list(users).index)))
        self._depends = self._depends or bool(reached(outputs, {name: [leaf] for name, leaf in leaves.items()}))

    def _reaches(self) -> bool:
        """Return whether the loss of any batch depends on any of the parameters."""
        for index, batch in self.batches() if not self._depends else ():
            self.evaluate(self.leaves(self.params), index, batch)
            if self._depends:
                break
        return self._depends

    @abc.abstractmethod
    def _reached_directly(self, name: str) -> str:
        """Say that the code reaches the user's own tensor of a parameter, and the remedy."""

    def _users_tensors(self) -> dict[str, list[Tensor]]:
        """Return the tensors of the user's for which leaves stand in, by the names of the parameters."""
        return {name: [value] for name, value in self.params.items()}

    def replacements(self, leaves: Mapping[str, Tensor]) -> dict[int, Tensor]:
        """Return the leaves by the identities of the tensors for which they stand in."""
        users = self._users_tensors()
        found = {id(one): leaf for name, leaf in leaves.items() for one in users[name]}
        if self._renormalised:  # an embedding with `max_norm` writes to its weight
            parts = (part for module in self.modules for part in module.modules())
            weights: list[Any] = [part.weight for part in parts if getattr(part, "max_norm", None) is not None]
            found |= {id(weight): weight.detach().clone() for weight in weights if id(weight) not in found}
        return found

    def verify_batching(self, totals: Totals) -> None:
        """Compare the loss of two batches as one with what their weights say; once, if it can be compared."""
        pair, self._pair = self._pair, None
        if self.batching is not None or pair is None:
            self.batching = self.batching or ""
            return
        self.batching = ""
        if random_modules(self.modules) or batchwise_modules(self.modules):  # which are warned of by themselves
            return
        with self._generators.private(self.devices):
            found = compared_as_one(self, totals, pair)
        self.batching, self.unverified = found or "", found is None

    def epsilon(self, loss: Tensor) -> float:
        """Return the unit roundoff of the lowest precision in a product: of parameters, loss, autocast, TF32."""
        eps = precision(loss, *self.params.values())
        if (autocast := self.autocast()) is not None:
            eps = max(eps, torch.finfo(autocast).eps)
        if any(value.is_cuda and value.dtype == torch.float32 for value in self.params.values()):
            parts = [part for module in self.modules for part in module.modules()]
            convolves = not parts or any(isinstance(part, nn.modules.conv._ConvNd | nn.RNNBase) for part in parts)
            if _allows_tf32(cuda.matmul) or (convolves and _allows_tf32(cudnn)):
                eps = max(eps, _TF32_EPSILON)
        return eps

    def warn_once(self, batches: int, *, aloud: bool = True) -> None:
        """Warn of what makes a matrix over so many batches another than the user may mean, of each thing once."""
        cast = self.autocast() if any(one.dtype != torch.float64 for one in self.params.values()) else None
        found = cautions(self.modules, batches, cast) | self._cautions()
        if aloud and (new := [found[kind] for kind in found if kind not in self.warned]):
            warnings.warn("; ".join(new), RuntimeWarning, stacklevel=2)
        self.warned.update(found)

    def _cautions(self) -> dict[str, str]:
        """Return what else is to be warned of, by kind."""
        found = {}
        if self.batching:
            found["weights of batches"] = f"{self.batching}; {BATCHING_REMEDY}"
        if self.curved is False and self._assumes_curvature():
            found["curvature"] = ZERO_MATRIX
        if subset := random_subset(self._data):
            found["data"] = (
                f"data {subset}: every pass sees other examples, so that a product, the gradient and the diagonal need "
                "not be of the same data; pass a DataLoader with shuffle=False, or without drop_last=True"
            )
        return found

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
        return {name: value.requires_grad_(name in names or bool(self._keeps_flags)) for name, value in values.items()}

    def slow_backends(self) -> AbstractContextManager[None]:
        """Choose backends that can be differentiated twice, for as long as the context lasts."""
        return slow_backends(self._recurrent)

    def evaluate(self, leaves: Mapping[str, Tensor], index: int, batch: Any) -> BatchLoss:
        """Return the loss of batch number `index`, differentiable twice in `leaves` within `slow_backends`.

        Buffers of modules in training mode are copies.
        """
        with at_batch(index):
            found = self._run(self._loss, leaves, batch, "loss")
        return self._checked(found, index, batch)

    def _checked(self, found: tuple[Tensor, float | None, Tensor, Tensor | None], index: int, batch: Any) -> BatchLoss:
        check_loss(found[0], index)
        return BatchLoss(found[0].detach(), self._weight(index, batch, found[1]), *found[2:])

    def weight(self, prediction: Any, index: int, batch: Any) -> float:
        """Return the weight ``w_b`` of batch number `index`, of whose prediction the shape is asked."""
        return self._weight(index, batch, self._mean_divisor(prediction, batch))

    def divisor(self, weights: Iterable[float]) -> float:
        """Return what the weighted sum over batches is divided by: ``W`` for a mean, 1 for a sum."""
        if self._part_weights is not None:
            weights = list(weights)
            self._part_weights.weight, self._part_weights.batches = math.fsum(weights), len(weights)
            return 1.0
        if self.reduction == "sum":
            return 1.0
        total = math.fsum(weights)
        if total == 0:
            raise ValueError("data has total weight 0 (every target is ignored): pass data with a target that counts")
        return total

    @contextlib.contextmanager
    def as_part_of_data(self) -> Iterator[PartWeights]:
        """Take the data for a part of a larger set: it may be empty, no sum is divided, and its share is filled in."""
        self._part_weights = PartWeights()
        try:
            yield self._part_weights
        finally:
            self._part_weights = None

    def mode(self) -> tuple[object, ...]:
        """Return what changes what the modules do, as far as it can be told; see `settings_of`."""
        return self.autocast(), *settings_of(self.modules)

    def autocast(self) -> torch.dtype | None:
        """Return the dtype of autocast, where it is enabled."""
        kind = self.device.type
        return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None

    def state(self) -> tuple[object, ...]:
        """Return a token that changes whenever the objective does, at the cost of one pass over the parameters."""
        return len(self), self._part_weights is None, self.autocast(), *self._changes.token()

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
            if len(self) == 1 and self._part_weights is None:  # the weight of an only batch cancels
                return 1.0
            raise ValueError(
                f"the size of batch {index} is not known, as the first dimensions of its parts differ, but the batches "
                "of a mean-reduced loss are weighted by it: pass batch_weight=, a function of the batch"
            )
        return divisor


def _agree(one: Tensor, other: Tensor) -> bool:
    """Whether two results are the same to rounding."""
    if not one.is_floating_point():
        return True
    one, other = one.detach(), other.detach()
    return torch.allclose(one, other, torch.finfo(one.dtype).eps ** (2 / 3), equal_nan=True)


def _allows_tf32(backend: Any) -> bool:
    try:
        return bool(backend.allow_tf32)
    except RuntimeError:  # torch refuses to say if its old and its new settings are mixed
        return True


def _require_grad(users: Mapping[str, Sequence[Tensor]]) -> None:
    for tensor in (tensor for tensors in users.values() for tensor in tensors):
        if tensor.is_leaf and not tensor.is_inference():
            tensor.requires_grad_()


# An objective that computes its own loss.


class CallableObjective(Objective):
    """``objective(params, batch) -> scalar`` over batches of any kind."""

    def __init__(
        self,
        objective: Callable[[dict[str, Tensor], Any], Tensor],
        params: Mapping[str, Tensor],
        data: Iterable[Any],
        batch_weight: BatchWeight | None = None,
    ) -> None:
        check_callable("objective", objective, "a function (params, batch) -> scalar")
        modules = modules_of(objective)
        super().__init__(modules, checked_params(None, params), data, loss_reduction(objective), batch_weight)
        self._objective = objective

    def _loss(self, leaves: Mapping[str, Tensor], batch: Any) -> tuple[Tensor, float | None, Tensor, Tensor | None]:
        loss = self._objective(dict(leaves), batch)
        return loss, self._mean_divisor(None, batch), loss, None

    def plain_loss(self, leaves: Mapping[str, Tensor], batch: Any) -> Tensor:
        """Return the loss as the user's own call computes it."""
        return self._objective(dict(leaves), batch)

    def _mean_divisor(self, prediction: Any, batch: Any) -> float | None:
        return batch_size(*batch) if isinstance(batch, list | tuple) else batch_size(batch)

    def _assumes_weights(self) -> bool:
        return self._batch_weight is None

    def _reached_directly(self, name: str) -> str:
        return (
            f"params[{name!r}] is reached directly: the objective holds the tensor itself, so part of the loss would "
            "not be differentiated; compute all of the loss from the dict of parameters that the objective is given"
        )

    def buffers(self, leaves: Mapping[str, Tensor]) -> Buffers:
        """Return nothing: what the objective holds is not known."""
        return {}

    def traced(self, leaves: Mapping[str, Tensor], buffers: Buffers, batch: Any) -> tuple[Tensor, Any]:
        """Return a batch's loss, and no prediction."""
        with replaced(self.modules, self.replacements(leaves)):
            return self._objective(dict(leaves), own_batch(batch, self.guard.writes)), None


@functools.cache
def _start_autograd(device: torch.device) -> None:
    """Let autograd's own thread for a GPU make its first step with what no library is for: cuBLAS would warn there."""
    if device.type == "cuda":
        with torch.inference_mode(False), torch.enable_grad():
            leaf = torch.zeros(1, device=device, requires_grad=True)
            torch.autograd.grad(leaf.exp().sum(), leaf)
