"""What the callbacks of all frameworks share: when to compute eigenvalues, and in which state of the model.

Training is the same with and without a callback: the operators do not change parameters, buffers, gradients and random
states, and the functions below restore the modes of all modules.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from scipy.sparse.linalg import LinearOperator
from torch import nn
from torch.optim import Optimizer

from curvop.operators.base import TensorLinearOperator
from curvop.operators.engine_operator import NonFiniteProductError
from curvop.operators.parameter_operator import ParameterVectors
from curvop.operators.validation import integer
from curvop.spectrum.track import Tracker, track

__all__ = ["Row", "TrainingTracking", "check_batch_norm"]

#: A row of a log: ``step``, and the logged values.
Row = Mapping[str, Any]

_MODES = ("eval", "train")


class TrainingTracking:
    """Base class of the callbacks. It does not import a framework.

    The parameters are described in `curvop.callbacks.TransformersTracking`.

    Attributes
    ----------
    tracker : Tracker or None
        The record of the current or latest training. None before the first training, and in all processes but the first
        one.
    """

    tracker: Tracker | None = None

    def __init__(
        self,
        operator: LinearOperator | Callable[[Any], LinearOperator],
        *,
        mode: str,
        every: int = 100,
        k: int = 1,
        which: str = "LA",
        tol: float = 1e-3,
        preconditioned: bool = False,
        prefix: str = "curvop",
    ) -> None:
        super().__init__()
        # SciPy's operators are callable: A(x) is a product.
        if not isinstance(operator, LinearOperator) and not callable(operator):
            raise TypeError(
                f"operator is a {type(operator).__name__}, but must be a curvature operator, or a function that "
                "returns one for the model, such as lambda model: HessianLinearOperator(model, loss_function, "
                "model.parameters(), data)"
            )
        if mode not in _MODES:
            raise ValueError(
                f"mode is {mode!r}, but must be 'eval', which turns dropout off, or 'train', as in the training steps"
            )
        if not isinstance(prefix, str) or not prefix:
            raise ValueError(f"prefix is {prefix!r}, but must be a name, such as 'curvop'")
        self.every = integer("every", every, 1)
        self.mode, self.prefix, self.preconditioned = mode, prefix, preconditioned
        self._operator, self._k, self._which, self._tol = operator, k, which, tol
        track(np.eye(2), k, every=every, which=which, tol=tol)  # report invalid settings before training

    def _begin(self, model: nn.Module, optimizers: Sequence[Any], step: int, rows: Sequence[Row]) -> None:
        """Create the tracker, after `step` optimizer steps, and put earlier rows of the log into its record."""
        is_operator = isinstance(self._operator, LinearOperator)
        self._A: Any = self._operator if is_operator else self._operator(model)
        _check_parameters(self._A, model)
        optimizer = _owner(self._A, optimizers) if self.preconditioned else None
        settings: dict[str, Any] = {"which": self._which, "tol": self._tol, "optimizer": optimizer}
        self.tracker = track(self._A, self._k, every=self.every, **settings)
        if step:
            self.tracker._resume(step, list(self._history(self.tracker, rows)))

    def _history(self, tracker: Tracker, rows: Sequence[Row]) -> Iterator[tuple[int, Any, float]]:
        names = [f"{self.prefix}/{name}" for name in tracker._table()[0]]
        for row in rows:
            if any(name in row for name in names):
                values = np.array([row.get(name, math.nan) for name in names[: self._k]])
                if np.isnan(values).any():
                    values[:] = math.nan
                yield int(row["step"]), np.sort(values), row.get(f"{self.prefix}/threshold", math.nan)

    def _rows(self) -> list[Row]:
        """Return the record as rows of a log."""
        if self.tracker is None:
            return []
        columns, table = self.tracker._table()
        names = ["step", *(f"{self.prefix}/{name}" for name in columns)]
        steps = self.tracker.steps.tolist()
        return [dict(zip(names, [step, *row], strict=True)) for step, row in zip(steps, table.tolist(), strict=True)]

    def _compute(self, model: nn.Module, step: int) -> dict[str, float]:
        """Return the logged values after `step` optimizer steps. The dict is empty if there is nothing to compute.

        Values that are not finite are left out: the eigenvalues before the first step of Adam, for example. If a
        product is not finite, because training has diverged, the eigenvalues are NaN, and a warning names the place.
        """
        if self.tracker is None or step < self.tracker._next_step:
            return {}
        if not self.tracker._is_due(step):
            self.tracker.step(step)  # only counts
            return {}
        _check_parameters(self._A, model)
        try:
            with torch.enable_grad(), self._evaluating(model), _in_full_precision(model):
                self.tracker.step(step)
        except NonFiniteProductError as error:  # a training that diverges does not end without the callback, either
            self.tracker._history.append((step, np.full(self._k, np.nan), math.nan))
            warnings.warn(f"step {step}: the eigenvalues are NaN, because {error}", RuntimeWarning, stacklevel=2)
        if isinstance(self._A, TensorLinearOperator):
            self._A.release_cache()  # training needs the memory, and changes the parameters
        values = {name: value for name, value in self.tracker.latest.items() if math.isfinite(value)}
        return {f"{self.prefix}/{name}": value for name, value in values.items()}

    def _set_train_mode(self, model: nn.Module) -> None:
        """Put the model into the mode of the training steps."""
        model.train()

    @contextmanager
    def _evaluating(self, model: nn.Module) -> Iterator[None]:
        """Put the model into the selected mode. Afterwards, restore the mode of each module."""
        modes = [(module, module.training) for module in model.modules()]
        try:
            if self.mode == "eval":
                model.eval()
            else:
                self._set_train_mode(model)
            yield
        finally:
            for module, training in modes:
                module.training = training


@contextmanager
def _in_full_precision(model: nn.Module) -> Iterator[None]:
    """Compute in the precision of the parameters.

    For mixed precision, `accelerate` replaces ``model.forward`` by a function that enters autocast. Its rounding errors
    of about 1 % would be errors of the eigenvalues.
    """
    own, original = model.__dict__.get("forward"), model.__dict__.get("_original_forward")
    if own is None or original is None:
        yield
        return
    try:
        model.__dict__["forward"] = original
        yield
    finally:
        model.__dict__["forward"] = own


def _check_parameters(A: Any, model: nn.Module) -> None:
    """Raise an error if `A` has parameters that are not those of the model, for example those of an earlier copy."""
    if not isinstance(A, ParameterVectors):
        return
    known = {parameter.data_ptr() for parameter in model.parameters()}
    for name in A.params_slices:
        if A._params[name].data_ptr() not in known:
            raise ValueError(
                f"operator has a parameter {name!r} that is not a parameter of the model that is trained, so its "
                "eigenvalues would not change: pass a function that returns the operator for the model, such as "
                "lambda model: HessianLinearOperator(model, loss_function, model.parameters(), data)"
            )


def _owner(A: Any, optimizers: Iterable[Any]) -> Optimizer:
    """Return the optimizer that trains the first parameter of `A`, without the wrapper of `accelerate`."""
    plain: list[Optimizer] = [getattr(optimizer, "optimizer", optimizer) for optimizer in optimizers]
    if isinstance(A, ParameterVectors):
        first = A._params[next(iter(A.params_slices))].data_ptr()
        for optimizer in plain:
            if any(first == tensor.data_ptr() for group in optimizer.param_groups for tensor in group["params"]):
                return optimizer
    return plain[0]


def check_batch_norm(model: nn.Module, mode: str) -> None:
    """Raise an error if the model waits for other processes in training mode, because only one process computes."""
    if mode == "train" and any(isinstance(module, nn.SyncBatchNorm) for module in model.modules()):
        raise ValueError(
            "mode is 'train', but the model has a SyncBatchNorm, which would wait for the other processes, although "
            "only the first process computes eigenvalues: use mode='eval'"
        )
