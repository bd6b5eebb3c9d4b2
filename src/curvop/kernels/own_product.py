"""Products by differences of the user's own code, over all batches, with steps of two sizes."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import torch
from torch import Tensor, nn

from curvop.kernels.differences import DIFFERENCES, Differences, detached, norm
from curvop.kernels.errors import first_line
from curvop.kernels.layout import BatchLayout
from curvop.kernels.objective import Objective
from curvop.kernels.user_code import UserCode, Values

__all__ = ["OwnProduct", "own_product"]

# Pairs of steps of central differences, relative to the parameters, to be tried until the two products agree. The cube
# root of epsilon balances truncation, of the order of the step's square, with rounding, of the order of epsilon over
# the step. Far fewer kinks, as ReLU has, lie within the shorter ones. What is computed in float32 within a model in
# float64 asks for the longer ones.
_FINE, _COARSE = (torch.finfo(dtype).eps ** (1 / 3) for dtype in (torch.float64, torch.float32))
_STEPS = {
    torch.float64: [(_FINE, _FINE / 2**8), (_FINE / 2**8, _FINE / 2**12), (_COARSE, _COARSE / 4)],
    torch.float32: [(_COARSE, _COARSE / 4)],
}
#: Relative difference of the two products up to which they are taken for the derivative.
_CONCLUSIVE = 1e-3


@dataclasses.dataclass
class OwnProduct:
    """A product by the user's own code.

    Attributes
    ----------
    products : list of Tensor, shape (M,)
        By the longer and by the shorter step, in float64; one alone if nothing is differenced. Then those by other
        pairs of steps, if any. Empty if there is a `reason`.
    error : float
        Relative difference between the first two.
    gradient : Tensor or None
        Of the objective, by the parameters of the rows, or else of the columns.
    exact : Tensor or None
        The product without differences, by the operator's formulas: the code alone is called in another way.
    unknown : str
        Why there is no such product, if there should be one.
    centred : list of Tensor
        Of an empirical Fisher matrix, what the mean of the gradients takes away from each product.
    holds : bool
        Whether autograd's first derivative is another than the difference quotient: the code holds something constant
        (``detach()``), or a backward is wrong.
    linear : bool
        Whether the loss is linear in the prediction.
    known : bool
        Whether it is one of torch's own losses.
    whole : bool
        Whether all batches were evaluated as one.
    fine : bool
        Whether the steps are those of double precision, within which kinks lie by rare accident alone.
    size : float
        What the rounding errors of the gradient are relative to: that by all parameters, or how much it changes.
    reason : str
        Why there is none.
    """

    products: list[Tensor] = dataclasses.field(default_factory=list)
    error: float = 0.0
    gradient: Tensor | None = None
    exact: Tensor | None = None
    unknown: str = ""
    centred: list[Tensor] = dataclasses.field(default_factory=list)
    holds: bool = False
    linear: bool = False
    known: bool = False
    whole: bool = False
    fine: bool = True
    size: float = 0.0
    reason: str = ""


def own_product(kernel: Any, vector: Tensor, needed: int, available: int) -> OwnProduct:
    """Return the product with `vector` ``(N,)`` by the user's own code, in double precision if it can be run so.

    Parameters
    ----------
    kernel : Kernel
    vector : Tensor, shape (N,)
        In float64, on the parameters' device.
    needed : int
        Bytes that a batch takes in float64.
    available : int
        Bytes that may be used.
    """
    objective, tried = kernel.objective, [OwnProduct()]
    batches = max(1, available // max(needed, 1))
    for dtype in dict.fromkeys((torch.float64, objective.dtype)):
        for steps in _STEPS[dtype]:
            tried.append(_found(kernel, vector, dtype, steps, batches))
            if not tried[-1].products or tried[-1].error <= _CONCLUSIVE:
                break
        found = sorted((one for one in tried if one.products), key=lambda one: one.error)
        if found:
            products = [product for one in found for product in one.products]
            return dataclasses.replace(
                found[0], products=products, centred=[mean for one in found for mean in one.centred]
            )
    return tried[-1]


def _found(kernel: Any, vector: Tensor, dtype: torch.dtype, steps: tuple[float, ...], most: int) -> OwnProduct:
    objective = kernel.objective
    code = UserCode(objective, dict.fromkeys((*kernel.rows.names, *kernel.cols.names)), dtype)
    if reason := code.obstacle():
        return OwnProduct(reason=reason)
    autocast = torch.autocast(objective.device.type, enabled=False)
    with objective.slow_backends(), autocast, code.lent():
        sums = _Sums(DIFFERENCES[type(kernel)](code, kernel, vector.to(dtype)), steps)
        whole, batches = code.joins(kernel), []
        for index, batch in objective.batches():
            batches.append((index, batch))
            whole = whole and len(batches) <= most
            while batches and not whole:
                sums.add([batches.pop(0)], whole=False)
        if batches:
            with objective._generators.private(objective.devices):
                whole = len(batches) > 1 and sums.predict_apart(batches) and sums.add(batches, whole=True)
                for one in () if whole else batches:
                    sums.add([one], whole=False)
    return sums.result(whole)


class _Sums:
    """Sums over the batches, or of all of them as one."""

    def __init__(self, kind: Differences, steps: tuple[float, ...]) -> None:
        self._kind, self._steps = kind, steps if kind.steps else (0.0,)
        self._clear()

    def _clear(self) -> None:
        self._products: list[list[Tensor]] = [[] for _ in self._steps]
        self._totals: list[list[Tensor]] = [[] for _ in self._steps]
        self._inner = [0.0 for _ in self._steps]
        self._gradients: list[Values] = []
        self._weights: list[float] = []
        self._exact: list[Tensor] = []
        self._unknown = ""
        self._count = 0.0
        self._holds, self._linear, self._reason = False, True, ""

    def predict_apart(self, numbered: list[tuple[int, Any]]) -> bool:
        """Whether batches can be evaluated as one."""
        code = self._kind.code
        try:
            return code.predicts_apart([code.given(batch) for _, batch in numbered])
        except Exception:  # whatever does not work is found when it is done batch by batch
            code.return_to_point()
            return False

    def add(self, numbered: list[tuple[int, Any]], whole: bool) -> bool:
        """Add batches, evaluated as one; return whether that could be done."""
        if self._reason:
            return False
        try:
            self._add(numbered[0][0], [self._kind.code.given(batch) for _, batch in numbered], whole)
        except Exception as error:  # whatever a model does that cannot be done in this dtype, or for want of memory
            self._clear()
            self._kind.code.return_to_point()
            self._reason = "" if whole else first_line(error)
            return False
        return True

    def _add(self, index: int, batches: list[Any], whole: bool) -> None:
        kind, code, objective = self._kind, self._kind.code, self._kind.code.objective
        code.rows.clear()

        def begin(own: list[Any]) -> tuple[Tensor, Any, Values]:
            loss, predictions = code.loss(own)
            return loss.detach(), detached(predictions), code.gradient([loss], names=code.targets)

        loss, predictions, gradient = code.run(begin, batches)
        prediction = predictions[0] if predictions else None
        weight = 1.0 if whole else objective.weight(prediction, index, batches[0])
        self._weights.append(weight)
        if not weight:
            return
        self._gradients.append({name: weight * part.double() for name, part in gradient.items()})
        if whole:
            divisor = kind.whole_divisor(loss, predictions, batches)
        else:
            divisor = kind.divisor(weight, prediction, index, batches[0])
        share = weight / divisor
        for number, step in enumerate(self._steps):
            part = kind.part(batches, index, step)
            self._products[number].append(share * part.product.double())
            self._holds |= part.holds
            self._linear &= part.linear
            self._inner[number] += share * part.inner
            if part.total is not None:
                self._totals[number].append(share * part.total.double())
        self._count += share * kind.count(batches)
        try:
            if not self._unknown and (exact := kind.exact(batches)) is not None:
                self._exact.append(share * exact.double())
        except Exception as error:  # an operation without a second derivative, or too little memory
            self._unknown = f"torch cannot: {first_line(error)}"

    def result(self, whole: bool) -> OwnProduct:
        """Return what was summed."""
        if self._reason or not self._gradients:
            return OwnProduct(reason=self._reason or "every batch has weight 0")
        kernel, objective = self._kind.kernel, self._kind.code.objective
        divisor = 1.0 if whole else objective.divisor(self._weights)
        by_batch = isinstance(kernel.rows, BatchLayout)
        products = [torch.cat(parts) if by_batch else _total(parts) / divisor for parts in self._products]
        centred: list[Tensor] = []
        if self._count:
            centred = [
                _total(totals) * inner / (divisor * self._count)
                for totals, inner in zip(self._totals, self._inner, strict=True)
            ]
        unit = float(products[-1].abs().sum()) or 1.0  # whose squares might underflow
        difference, size = (float((one / unit).norm()) for one in (products[-1] - products[0], products[-1]))
        gradient = {name: _total([one[name] for one in self._gradients]) / divisor for name in self._gradients[0]}
        layout = kernel.rows if kernel.rows.names else kernel.cols
        return OwnProduct(
            products=products,
            error=difference / size if size else 0.0,
            gradient=torch.cat([part.reshape(-1) for part in layout.of(gradient)]),
            exact=_total(self._exact) / divisor if self._exact and not self._unknown else None,
            unknown=self._unknown,
            centred=centred,
            holds=self._holds,
            linear=self._linear,
            known=_is_torch_loss(objective),
            whole=whole,
            fine=self._steps[0] <= _FINE,
            size=max(norm(gradient.values()), self._kind.change(products[0])),
        )


def _total(parts: list[Tensor]) -> Tensor:
    return torch.stack(parts).sum(0)


def _is_torch_loss(objective: Objective) -> bool:
    loss = getattr(objective, "loss_function", None)
    while isinstance(loss, functools.partial):
        loss = loss.func
    kind = type(loss) if isinstance(loss, nn.Module) else loss
    return (getattr(kind, "__module__", None) or "").startswith("torch.nn")
