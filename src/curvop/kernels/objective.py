r"""Objectives: the loss over a data set as a function of named parameters.

An objective evaluates the user's code on one batch, with the parameters replaced by differentiable leaf tensors. The
loss of the data set is the following function of the losses :math:`\ell_b` of the batches:

.. math::

    L(\theta) = \frac{1}{W} \sum_b w_b \, \ell_b(\theta), \quad W = \sum_b w_b \quad \text{(reduction 'mean')}, \qquad
    L(\theta) = \sum_b \ell_b(\theta) \quad \text{(reduction 'sum')}.

The weight :math:`w_b` is the number by which the loss function divides when it averages over batch b. With these
weights, :math:`L` equals the loss of the whole data set evaluated as one batch, regardless of how the data is divided
into batches. See `curvop.kernels.losses`.
"""

from __future__ import annotations

import abc
import contextlib
import copy
import dataclasses
import functools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, NamedTuple, Self, TypeVar, cast

import torch
from torch import Tensor, nn

from curvop.kernels.batches import Feed, at_batch, batch_size_of, numbered_errors, on_device
from curvop.kernels.batches import leaves as leaves_of
from curvop.kernels.changes import ChangeDetector, Fingerprint, Generators, settings_of
from curvop.kernels.differentiable import Evaluator, slow_backends
from curvop.kernels.errors import NonDeterministicObjectiveError, explain_arrays
from curvop.kernels.graph import run_backward
from curvop.kernels.guard import Guard, Record, modules_of, own_batch, parts_of, replaced
from curvop.kernels.losses import ClosedForm, check_loss, checked_weight, loss_reduction
from curvop.kernels.objective_checks import FirstPassChecks, suspects
from curvop.kernels.parameters import check_callable, checked_params
from curvop.kernels.passes import Totals
from curvop.kernels.precision import Precision, float32_settings, lowest_precision

__all__ = [
    "BatchLoss",
    "BatchWeight",
    "Buffers",
    "CallableObjective",
    "Evaluation",
    "Objective",
    "PartWeights",
]

T = TypeVar("T")


#: A function ``(leaves, batch) -> result``.
Evaluation = Callable[[Mapping[str, Tensor], Any], T]
#: ``(loss, divisor, output, closed_form)``. The divisor is the number by which the loss function divides the sum over
#: the batch, or None if this number is unknown. For ``output`` and ``closed_form`` see `BatchLoss`.
EvaluatedLoss = tuple[Tensor, float | None, Tensor, ClosedForm | None]
#: A function ``batch -> w_b`` that returns the weight of a batch. The batch is on the device of the parameters.
BatchWeight = Callable[[Any], float]
#: The constant tensors of the model and the loss function: ``{"model": {name: tensor}, "loss": {name: tensor}}``.
Buffers = dict[str, dict[str, Tensor]]


@dataclasses.dataclass
class BatchLoss:
    """The loss of one batch, with the graph that is needed to differentiate the loss.

    Attributes
    ----------
    value : Tensor
        The loss, a detached scalar.
    weight : float
        The batch's weight ``w_b``.
    output : Tensor
        The tensor at which backpropagation starts: the loss, or the prediction if `closed_form` is given.
    closed_form : ClosedForm or None
        The derivatives of the loss with respect to `output`, or None if `output` is the loss itself.
    y : Any
        The targets of the batch, if the objective has targets.
    """

    value: Tensor
    weight: float
    output: Tensor
    closed_form: ClosedForm | None = None
    y: Any = None

    def gradient(self, params: Sequence[Tensor], create_graph: bool = False) -> Sequence[Tensor | None]:
        """Return the gradients of the loss with respect to `params`, in the same order.

        A gradient is None if the loss does not depend on the parameter. If the batch has weight 0, all gradients are
        None, because the loss may be undefined (0/0 if all targets of the batch are ignored).
        """
        if not (self.weight and self.output.requires_grad and params):
            return [None] * len(params)
        seed = None if self.closed_form is None else self.closed_form.first(None)
        seed = torch.ones_like(self.output) if seed is None else seed
        return run_backward((self.output,), tuple(params), (seed,), keep_graph=create_graph, create_graph=create_graph)


@dataclasses.dataclass
class PartWeights:
    """The total weight and the number of the batches in this process's part of a data set."""

    weight: float = 0.0
    batches: int = 0


class Objective(abc.ABC):
    """Abstract base class for the loss over a data set.

    Subclasses define how to compute the loss of one batch.

    Attributes
    ----------
    params : dict of str to Tensor
        The user's tensors. Every linearization reads their current values. The tensors are never modified.
    data : iterable of batches
    reduction : {'mean', 'sum'}
    modules : tuple of nn.Module
        The ``nn.Module`` objects in the user's code, such as the model and the loss function.
    guard : Guard
        Runs the user's code and undoes its side effects.
    evaluator : Evaluator
        Makes the user's code twice differentiable.
    generators : Generators
        Random number generators for passes over the data.
    ordered : bool
        Whether `data` is a list or tuple, which yields the batches in the same order in every pass.
    checks : FirstPassChecks
        Checks that are made in the first pass over the data, and the results of these checks.
    data_size : tuple or None
        Number of batches and number of examples, or None before the end of the first pass. The number of examples is
        None if it is unknown.
    """

    data_size: tuple[int, int | None] | None = None  # operators that were pickled by version 0.1.0 do not have it

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
        self.data = data
        self.reduction = reduction
        self._set_modules(modules)
        self.evaluator = Evaluator()
        self._batch_weight = batch_weight
        self.generators = Generators()
        self._feed: Feed | None = None
        self._order: list[list[float | None]] | None = None
        self.ordered = isinstance(data, list | tuple)
        self._part_weights: PartWeights | None = None
        self._kept_totals: Totals | None = None
        self.checks = FirstPassChecks()

    def _set_modules(self, modules: Sequence[nn.Module]) -> None:
        """Set the modules whose state is restored after each evaluation, and whose changes are detected."""
        self.modules = tuple(modules)
        self.guard = Guard(self.modules, list(self.params.values()))
        self._changes = ChangeDetector(self.modules, self.params, self.data)
        parts = parts_of(modules)
        self._recurrent = any(isinstance(part, nn.RNNBase) for part in parts)
        self._renormalized = any(getattr(part, "max_norm", None) is not None for part in parts)

    def __getstate__(self) -> dict[str, object]:
        return self.__dict__ | {"_kept_totals": None}  # ids of tensors are invalid in another process

    def with_data(self, data: Iterable[Any]) -> Self:
        """Return the same objective for other data. Checks that this objective has passed are not repeated."""
        other = copy.copy(self)
        other.data, other.ordered = data, isinstance(data, list | tuple)
        other._feed = other._order = other._part_weights = other._kept_totals = other.data_size = None
        other.generators = Generators()
        other._set_modules(self.modules)
        other.guard.writes = self.guard.writes
        return other

    @property
    def device(self) -> torch.device:
        """Current device of the first parameter.

        The device is not cached, because the user may move the model after creating the operator.
        """
        return next(iter(self.params.values())).device

    @property
    def devices(self) -> set[torch.device]:
        """Current devices of all parameters."""
        return {value.device for value in self.params.values()}

    @property
    def dtype(self) -> torch.dtype:
        """Current dtype of the parameters."""
        return next(iter(self.params.values())).dtype

    @abc.abstractmethod
    def _loss(self, leaves: Mapping[str, Tensor], batch: Any) -> EvaluatedLoss:
        """Return ``(loss, divisor, output, closed_form)`` for a batch; see `EvaluatedLoss`."""

    def _loss_once(self, leaves: Mapping[str, Tensor], batch: Any) -> EvaluatedLoss:
        """Return the same as `_loss`, for a loss whose graph is used for a gradient or for few products.

        If predictions are small, a closed form of the derivative saves time only if it is used for many products.
        """
        return self._loss(leaves, batch)

    @abc.abstractmethod
    def plain_loss(self, leaves: Mapping[str, Tensor], batch: Any) -> Tensor:
        """Return the loss of a batch by calling the user's code, without checks or closed-form derivatives.

        Call this method only inside a function that is passed to ``guard.run`` together with ``replacements(leaves)``.
        """

    @abc.abstractmethod
    def buffers(self, leaves: Mapping[str, Tensor]) -> Buffers:
        """Return the tensors of the modules on which the loss may depend, except the parameters in `leaves`."""

    @abc.abstractmethod
    def traced(self, leaves: Mapping[str, Tensor], buffers: Buffers, batch: Any) -> tuple[Tensor, Any]:
        """Return ``(loss, prediction)`` for a batch, as a pure function of the arguments.

        Compilation traces this method with fake tensors, which have shapes and dtypes but no values.
        """

    @abc.abstractmethod
    def _mean_divisor(self, prediction: Any, batch: Any) -> float | None:
        """Return the number by which the loss function divides the sum over a batch, or None if it is unknown.

        Only the shape of `prediction` is used.
        """

    def __len__(self) -> int:
        """Return the number of batches, or 0 if `data` has no length."""
        try:
            return len(self.data)  # type: ignore[arg-type]
        except TypeError:
            return 0

    def batches(self) -> Iterator[tuple[int, Any]]:
        """Yield ``(index, batch)`` for every batch, after moving the batch to the device of the parameters.

        During the pass, data loaders and models use private random number generators, so PyTorch's global generators
        do not change. Every pass draws different random numbers. The loss of a random objective therefore changes
        between passes, and `conclude` detects the change.
        """
        index = -1
        with self.guard.keeping_record(), contextlib.nullcontext() if self._feed is not None else self._reading():
            if self._feed is not None:
                batches = self._checked_batches(self._feed)
            else:
                batches = on_device(self._checked_batches(numbered_errors(self.data)), self.device)
            for index, batch in enumerate(batches):
                self._check_order(index, batch)
                yield index, batch
        if index < 0 and self._part_weights is None:
            raise ValueError("data is empty: it yields no batch, pass at least one")

    def listed_batches(self) -> Iterator[Any]:
        """Yield every batch of a list or tuple after moving it to the device of the parameters."""
        return on_device(self.data, self.device)

    def unchecked_batches(self) -> Iterator[Any]:
        """Yield every batch after moving it to the device of the parameters, without checking the batch.

        The caller passes the batches to all objectives that have the same data; see `fed_by`.
        """
        with self._reading():
            yield from on_device(numbered_errors(self.data), self.device)

    @contextlib.contextmanager
    def fed_by(self, feed: Feed) -> Iterator[None]:
        """While the context is active, take the batches of every pass from `feed` instead of `data`."""
        self._feed = feed
        try:
            yield
        finally:
            self._feed = None

    @contextlib.contextmanager
    def _reading(self) -> Iterator[None]:
        """Use private random number generators, and prepare autograd for all devices."""
        devices = self.devices
        for device in devices:
            _start_autograd(device)
        with self.generators.private(devices):
            yield

    def _checked_batches(self, batches: Iterable[Any]) -> Iterator[Any]:
        """Check each batch with `_check_batch`, then yield it.

        In the first pass, also collect batches for `FirstPassChecks.verify_batching`, and count the examples.
        """
        pair = self.checks.start_pass(self)
        sizes: list[int | None] = []
        try:
            for index, batch in enumerate(batches):
                self._check_batch(index, batch)
                if pair is not None:
                    pair.see(index, batch)
                if self.data_size is None:
                    sizes.append(batch_size_of(batch))
                yield batch
            if self.data_size is None:
                known = [size for size in sizes if size is not None]
                self.data_size = len(sizes), sum(known) if len(known) == len(sizes) else None
        except BaseException:  # including GeneratorExit, because the caller may stop a pass early
            self.checks.abandon_pass()
            raise

    def _check_batch(self, index: int, batch: Any) -> None:  # noqa: B027  # most objectives accept any batch
        """Raise an error if the objective does not support `batch`."""

    def assumes_curvature(self) -> bool:
        """Return True if a loss that is linear in the prediction is probably a mistake."""
        return True

    @abc.abstractmethod
    def assumes_weights(self) -> bool:
        """Return True if the weights of the batches are only assumed, and should be verified."""

    def totals(self) -> Totals:
        """Return an empty `Totals` object, which collects the losses of a new pass for `conclude`."""
        return Totals(self.state())

    def conclude(self, totals: Totals, kept: bool = False) -> None:
        """Check the results of a complete pass over the data, and warn about likely mistakes.

        Parameters
        ----------
        totals : Totals
            The losses and the weights of the batches in this pass.
        kept : bool
            Whether later products reuse the results of this pass. If True, later passes must give the same losses.

        Raises
        ------
        NonDeterministicObjectiveError
            If the losses differ from those of an earlier pass with ``kept=True``, and the objective has not changed.
        RuntimeError
            If the loss does not depend on any of the parameters.
        """
        if self._kept_totals is not None and not self._kept_totals.stale(totals.state):
            if (difference := self._kept_totals.differs(totals, self.ordered)) is not None:
                raise NonDeterministicObjectiveError(self.changed(*difference))
        elif kept and math.isfinite(sum(totals.losses)):
            self._kept_totals = totals.alone()
        if self._part_weights is None and not self.checks.depends_on_params(self):
            raise RuntimeError(
                "the loss depends on none of the parameters in params, and does not require grad: it is computed under "
                "torch.no_grad(), from .detach() or .data, or from other tensors; compute it from the parameters that "
                "the model is given"
            )
        self.checks.end_search()
        self.checks.verify_batching(self, totals)
        self.checks.warn_once(self, len(totals.weights))

    def _run(
        self, function: Evaluation[T], leaves: Mapping[str, Tensor], batch: Any, what: str, compares_flags: bool = True
    ) -> T:
        """Return ``function(leaves, batch)``, evaluated with the parameters replaced by `leaves`.

        Afterwards, the modules and the batch are restored, unless the code is known to change nothing. `what` is a name
        for the result, such as ``"loss"``. In the first pass over the data that computes a result of this name, the
        autograd graph of the result is also searched for the user's parameters. If the graph contains one, an error is
        raised, because the user's code then uses a parameter directly instead of the leaf that replaces the parameter.

        If it is not known whether the result depends on the ``requires_grad`` flags of the parameters, the function is
        evaluated twice to find out. If `compares_flags` is False and all leaves require grad, it is evaluated once,
        and all parameters keep their flags.
        """

        def run(leaves: Mapping[str, Tensor], keeps_flags: bool, record: Record | None = None) -> T:
            return self._run_once(function, leaves, batch, what, keeps_flags, record or self.guard.record())

        try:
            self.checks.begin_search(what)
            record = self.guard.record()
            if self.checks.flags_matter is None and _flags_differ(leaves, self._seams(record).others):
                if not compares_flags and all(leaf.requires_grad for leaf in leaves.values()):
                    return run(leaves, True, record)
                result = self.checks.compare_flags(self, run, leaves)
                if not self.checks.flags_matter:
                    return cast("T", result)
                for leaf in leaves.values():
                    leaf.requires_grad_()
                record = self.guard.record()
            return run(leaves, bool(self.checks.flags_matter), record)
        except Exception as error:
            explain_arrays(error, batch)
            raise

    def _run_once(
        self,
        function: Evaluation[T],
        leaves: Mapping[str, Tensor],
        batch: Any,
        what: str,
        keeps_flags: bool,
        record: Record,
    ) -> T:
        searched = self.checks.is_searched(what)
        # All batches depend on the parameters in the same way if the modules are pure, so one search is enough.
        if (searched or self.checks.has_found_leaves(what)) and self._is_pure(record, batch):
            # Graphs do not refer to the user's own tensors, whose data may be replaced.
            pure = functools.partial(function, leaves, tuple([part.detach() for part in batch]))
            with torch.enable_grad():
                return self.guard.run_pure(
                    pure, self._replacements(leaves, record), hold=not keeps_flags, record=record
                )
        originals = {} if searched else self._seams(record).originals

        def run(own: Any) -> T:
            _require_grad(originals)
            result = self.evaluator(function, leaves, own)
            if originals:
                self._check_result(result, leaves)
                self.checks.search(self, what, result, originals, leaves)
            return result

        while True:
            replacements = self._replacements(leaves, record)
            with torch.enable_grad():
                result = self.guard.run(run, batch, replacements, hold=not keeps_flags, record=record)
            if self.evaluator.accepts(result, searched):
                return result
            record = self.guard.record()

    def _is_pure(self, record: Record, batch: Any) -> bool:
        """Return True if evaluating a batch has no side effects, and calls no function that the evaluator replaces."""
        return False

    def _check_result(self, result: Any, leaves: Mapping[str, Tensor]) -> None:  # noqa: B027  # most accept any
        """Raise an error if `result` depends on `leaves` in a way that the objective does not support."""

    @abc.abstractmethod
    def reached_directly(self, name: str) -> str:
        """Return the error message for code that uses the parameter `name` directly instead of its replacement."""

    def originals(self) -> dict[str, list[Tensor]]:
        """Return a dict that maps each parameter name to a list of the tensors that the leaf of this name replaces."""
        return {name: [value] for name, value in self.params.items()}

    def replacements(self, leaves: Mapping[str, Tensor]) -> dict[int, Tensor]:
        """Return a dict that maps the ``id`` of each tensor to be replaced to the tensor that replaces it."""
        return self._replacements(leaves, self.guard.record())

    def _seams(self, record: Record) -> _Seams:
        """Return the places at which the user's code reads parameters. The result is kept with the record."""
        if record.derived is None:
            originals = self.originals()
            names = {id(tensor): name for name, tensors in originals.items() for tensor in tensors}
            record.derived = _Seams(originals, names, [value for value in record.parameters if id(value) not in names])
        return cast("_Seams", record.derived)

    def _replacements(self, leaves: Mapping[str, Tensor], record: Record) -> dict[int, Tensor]:
        found = {key: leaves[name] for key, name in self._seams(record).names.items() if name in leaves}
        if self._renormalized:  # an embedding with `max_norm` modifies its weight in the forward pass
            weights: list[Any] = [
                part.weight for part in parts_of(self.modules) if getattr(part, "max_norm", None) is not None
            ]
            found |= {id(weight): weight.detach().clone() for weight in weights if id(weight) not in found}
        return found

    def epsilon(self, loss: Tensor) -> float:
        """Return the machine epsilon of the lowest precision that a product uses; see `precision`."""
        return self.precision(loss).epsilon

    def precision(self, loss: Tensor) -> Precision:
        """Return the lowest precision that a product uses.

        The dtypes of the parameters and of the loss, the autocast dtype, and PyTorch's settings for float32 matrix
        products and convolutions are taken into account.
        """
        return lowest_precision(loss, self.params.values(), self.autocast(), self._may_convolve)

    def _may_convolve(self) -> bool:
        """Return False only if the modules are known and have no convolutions and no recurrent layers."""
        parts = parts_of(self.modules)
        return not parts or any(isinstance(part, nn.modules.conv._ConvNd | nn.RNNBase) for part in parts)

    def changed(self, what: str, then: float, now: Any) -> str:
        """Return the error message for a quantity, such as a loss, that changed between two passes.

        Parameters
        ----------
        what : str
            The name of the quantity.
        then, now : float
            The values of the quantity in the earlier and in the later pass.
        """
        return (
            f"{what} was {float(then):.9g} at first and is {float(now):.9g} now, at the same parameters: "
            f"{suspects(self.modules)}"
        )

    def keep_order(self) -> None:
        """Require `data` to yield the same batches in the same order in every pass from now on.

        The next pass records a fingerprint of every batch. Later passes raise an error if a fingerprint differs. Lists
        and tuples are not checked, because their order is fixed.
        """
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
        """Return a dict of leaf tensors by name, with the values of all parameters.

        Only the leaves in `names` require grad. However, if the result of the user's code depends on the
        ``requires_grad`` flags of the parameters, all leaves require grad.
        """
        names = set(names)
        # An embedding with `max_norm` modifies its weight in the forward pass, so the weight must be a copy.
        values = {name: value.detach() for name, value in self.params.items()}
        if self._renormalized:
            values = {name: value.clone() for name, value in values.items()}
        every = bool(self.checks.flags_matter)
        return {name: value.requires_grad_(every or name in names) for name, value in values.items()}

    def slow_backends(self) -> AbstractContextManager[None]:
        """Return a context manager that disables PyTorch backends that have no second derivatives."""
        return slow_backends(self._recurrent)

    def evaluate(self, leaves: Mapping[str, Tensor], index: int, batch: Any) -> BatchLoss:
        """Return the loss of batch number `index` as a differentiable function of `leaves`.

        Within the `slow_backends` context, the loss can be differentiated twice. Modules in training mode modify copies
        of their buffers, not the buffers themselves.
        """
        with at_batch(index):
            evaluated = self._run(self._loss, leaves, batch, "loss")
        return self._batch_loss(evaluated, index, batch)

    def evaluate_once(self, leaves: Mapping[str, Tensor], index: int, batch: Any) -> BatchLoss:
        """Return the same as `evaluate`, for a loss whose graph is used for a gradient or for few products."""
        with at_batch(index):
            evaluated = self._run(self._loss_once, leaves, batch, "loss used once")
        return self._batch_loss(evaluated, index, batch)

    def _batch_loss(self, evaluated: EvaluatedLoss, index: int, batch: Any) -> BatchLoss:
        loss, divisor, output, closed_form = evaluated
        check_loss(loss, index)
        return BatchLoss(loss.detach(), self._weight(index, batch, divisor), output, closed_form)

    def weight(self, prediction: Any, index: int, batch: Any) -> float:
        """Return the weight ``w_b`` of batch number `index`.

        Only the shape of `prediction` is used.
        """
        return self._weight(index, batch, self._mean_divisor(prediction, batch))

    def divisor(self, weights: Iterable[float]) -> float:
        """Return the divisor of the weighted sum over all batches.

        The divisor is the total weight ``W`` if the loss is a mean, and 1 if the loss is a sum.

        Within the `as_part_of_data` context, the divisor is 1, and the total weight is stored in a `PartWeights`.
        """
        if self._part_weights is not None:
            weights = list(weights)
            self._part_weights.weight, self._part_weights.batches = math.fsum(weights), len(weights)
            return 1.0
        if self.reduction == "sum":
            return 1.0
        total = math.fsum(weights)
        if total == 0:
            raise ValueError(
                "data has total weight 0 (every target is ignored): pass data with a target that is not ignored"
            )
        return total

    @contextlib.contextmanager
    def as_part_of_data(self) -> Iterator[PartWeights]:
        """Treat the data as a part of a larger data set while the context is active.

        In this context, the data may be empty, and sums over batches are not divided by ``W``. A call of `divisor`
        stores the total weight and the number of batches in the `PartWeights` that the context manager yields.
        """
        self._part_weights = PartWeights()
        try:
            yield self._part_weights
        finally:
            self._part_weights = None

    def mode(self) -> tuple[object, ...]:
        """Return a tuple of all settings that affect the output; see `settings_of` and `float32_settings`."""
        return self.autocast(), float32_settings(self.device), *settings_of(self.modules)

    def autocast(self) -> torch.dtype | None:
        """Return the autocast dtype for the device of the parameters, or None if autocast is disabled."""
        kind = self.device.type
        return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None

    def state(self) -> tuple[object, ...]:
        """Return a tuple that represents the current state of the objective.

        The tuples returned before and after a change are not equal. Each call reads all parameters once.
        """
        settings = self.autocast(), float32_settings(self.device)
        return len(self), self._part_weights is None, *settings, *self._changes.token()

    def tensors(self) -> Iterator[Tensor]:
        """Yield the tensors in `params`, and all parameters and buffers of the modules.

        These tensors occupy memory even if no linearization is cached.
        """
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
            if len(self) == 1 and self._part_weights is None:  # the weight of a single batch cancels out
                return 1.0
            raise ValueError(
                f"the size of batch {index} is not known, as the first dimensions of its parts differ, but the batches "
                "of a mean-reduced loss are weighted by their sizes: pass batch_weight=, a function of the batch"
            )
        return divisor


class _Seams(NamedTuple):
    """The tensors through which the user's code reads parameters.

    Attributes
    ----------
    originals : dict of str to list of Tensor
        The result of `Objective.originals`.
    names : dict of int to str
        Maps the ``id`` of each tensor in `originals` to its name.
    others : list of Tensor
        The parameters of the modules that are not in `originals`.
    """

    originals: dict[str, list[Tensor]]
    names: dict[int, str]
    others: list[Tensor]


def _flags_differ(leaves: Mapping[str, Tensor], others: Iterable[Tensor]) -> bool:
    """Return True unless all `leaves` require grad, and all other parameters are constants."""
    return not all(leaf.requires_grad for leaf in leaves.values()) or any(value.requires_grad for value in others)


def _require_grad(originals: Mapping[str, Sequence[Tensor]]) -> None:
    for tensor in (tensor for tensors in originals.values() for tensor in tensors):
        if tensor.is_leaf and not tensor.is_inference():
            tensor.requires_grad_()


class CallableObjective(Objective):
    """The loss defined by a user's function ``objective(params, batch) -> scalar``.

    The batches may be of any type that the function accepts.
    """

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

    def _loss(self, leaves: Mapping[str, Tensor], batch: Any) -> EvaluatedLoss:
        loss = self._objective(dict(leaves), batch)
        return loss, self._mean_divisor(None, batch), loss, None

    def plain_loss(self, leaves: Mapping[str, Tensor], batch: Any) -> Tensor:
        """Return the loss of a batch by calling the user's function."""
        return self._objective(dict(leaves), batch)

    def _mean_divisor(self, prediction: Any, batch: Any) -> float | None:
        return batch_size_of(batch)

    def assumes_weights(self) -> bool:
        """Return True if no ``batch_weight`` was passed, so that the batches are weighted by their sizes."""
        return self._batch_weight is None

    def reached_directly(self, name: str) -> str:
        """Return the error message for an objective that uses the parameter `name` directly."""
        return (
            f"params[{name!r}] is reached directly: the objective holds the tensor itself, so part of the loss would "
            "not be differentiated; compute all of the loss from the dict of parameters that the objective is given"
        )

    def buffers(self, leaves: Mapping[str, Tensor]) -> Buffers:
        """Return an empty dict, because the tensors that the user's function uses are unknown."""
        return {}

    def traced(self, leaves: Mapping[str, Tensor], buffers: Buffers, batch: Any) -> tuple[Tensor, Any]:
        """Return ``(loss, None)`` for a batch, because the user's function returns no prediction."""
        with replaced(self.modules, self.replacements(leaves)):
            return self._objective(dict(leaves), own_batch(batch, self.guard.writes)), None


@functools.cache
def _start_autograd(device: torch.device) -> None:
    """Start the autograd thread of a GPU by differentiating an elementwise operation.

    If a cuBLAS call were the first operation in the autograd thread, PyTorch would issue a warning.
    """
    if device.type == "cuda":
        with torch.inference_mode(False), torch.enable_grad():
            leaf = torch.zeros(1, device=device, requires_grad=True)
            torch.autograd.grad(leaf.exp().sum(), leaf)
