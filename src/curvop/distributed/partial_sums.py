"""A part of a data set: sums that add up, over all parts, to what the whole has."""

from __future__ import annotations

import contextlib
import functools
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Self

import torch
from torch import Tensor, nn

from curvop.operators.curvature_operator import CurvatureLinearOperator, GGNLikeLinearOperator
from curvop.operators.engine_operator import UNTRUSTED, digest
from curvop.operators.fisher import GradientCovarianceLinearOperator
from curvop.operators.transfer import aligned

__all__ = ["ERRORS", "PartialSum"]

#: What a product may raise that means the same on whichever part of the data it was raised, by name.
ERRORS: dict[str, type[Exception]] = {kind.__name__: kind for kind in (*UNTRUSTED, NotImplementedError)}


class PartialSum:
    """A curvature matrix of a part of a data set, as a summand of the matrix of the whole.

    The methods that end in ``_sums`` return vectors in float64 on the operator's device, in memory of their own. They
    are not divided by anything, the part may be empty or weigh nothing, and the sums of all parts, added one by one,
    are the `totals` of which `products`, `gradient` and `diagonal` make the whole's.

    Parameters
    ----------
    A : CurvatureLinearOperator
        Of the part. It stays as it is.
    """

    def __init__(self, A: CurvatureLinearOperator) -> None:
        if not isinstance(A, CurvatureLinearOperator):
            raise TypeError(
                f"A is a {type(A).__name__}, but must be a Hessian, Gauss-Newton or Fisher matrix of this rank's part "
                "of the data: damping, submatrices and journals are made of the whole"
            )
        self.A = A
        self._objective = A._objective
        self._centred = A if isinstance(A, GradientCovarianceLinearOperator) else None

    def block(self, rows: Sequence[str], cols: Sequence[str]) -> Self:
        """Return the block that the named parameters span."""
        return type(self)(self.A.block(rows, cols))

    def adjoint(self) -> Self:
        """Return the adjoint; it shares what is kept."""
        adjoint = self.A.H
        return self if adjoint is self.A else type(self)(adjoint)

    def tensors(self) -> list[Tensor]:
        """Return the tensors that the matrix depends on besides the data, each once: parameters first, buffers last."""
        return list({id(tensor): tensor for tensor in self._objective.tensors()}.values())

    def layout(self) -> list[str]:
        """Return dtypes and shapes of the `tensors`, in their order."""
        return [f"{str(one.dtype).removeprefix('torch.')} {list(one.shape)}" for one in self.tensors()]

    def shared_settings(self) -> dict[str, str]:
        """Return what must be equal on all ranks: all but the data, by name, and each tensor by a name of its own."""
        parts = self.A.fingerprint(data=False)
        params = {id(value) for value in self._objective.params.values()}
        own = vars(self._objective)  # of either kind
        for name in ("_model", "loss_function", "_objective", "_batch_weight"):
            for one, tensor in _enclosed_tensors(own.get(name), name.removeprefix("_"), ()):
                if one not in parts and id(tensor) not in params:
                    parts[one] = digest(tensor)
        return parts | {"number and shapes of the model's tensors": " ".join(self.layout())}

    def fingerprint(self) -> dict[str, str]:
        """Return what the matrix depends on; see `EngineLinearOperator.fingerprint`. The data may be empty."""
        with self._objective.as_part_of_data():
            return self.A.fingerprint()

    def product_sums(self, vectors: Tensor) -> list[Tensor]:
        """Return the sums of the products with `vectors` ``(K, N)``, in float32 or float64, on any device."""

        def compute() -> list[Tensor]:
            lifted = aligned(vectors.to(self._objective.device, torch.float64))
            products = self.A._apply_tensor(lifted)
            if self._centred is None:
                return [products]
            left, right, _, count = self._centred._gradient_sum()
            return [products, left, lifted @ right, right.new_tensor([count])]

        return self._summed(compute)

    def products(self, totals: Sequence[Tensor], count: int) -> Tensor:
        """Return the whole's products ``(K, M)`` with `count` vectors, in float64."""
        [sums, *more], divisor = self._divisor(totals)
        products = sums.view(count, -1).div_(divisor)
        if self._centred is not None:
            left, along, examples = more
            products -= (along / (divisor * examples))[:, None] * left
        return products

    def gradient_sums(self) -> list[Tensor]:
        """Return the sums of the gradient by the row parameters and of the loss."""

        def compute() -> list[Tensor]:
            gradient, loss = self.A._gradient()
            return [gradient.double(), torch.tensor([loss], dtype=torch.float64, device=gradient.device)]

        return self._summed(compute)

    def gradient(self, totals: Sequence[Tensor]) -> tuple[Tensor, float]:
        """Return the whole's gradient ``(M,)``, in float64, and its loss."""
        [gradient, loss], divisor = self._divisor(totals)
        return gradient.div_(divisor), loss.item() / divisor

    def diagonal_sums(self) -> list[Tensor]:
        """Return the sums of the exact diagonal, where `A` has one."""

        def compute() -> list[Tensor]:
            assert isinstance(self.A, GGNLikeLinearOperator)
            diagonal = self.A._diagonal()
            if self._centred is None:
                return [diagonal]
            self._centred._mean = None  # only products see that the parameters have changed
            left, _, _, count = self._centred._gradient_sum()
            self._centred._mean = None
            return [diagonal, left, left.new_tensor([count])]

        return self._summed(compute)

    def diagonal(self, totals: Sequence[Tensor]) -> Tensor:
        """Return the whole's diagonal ``(N,)``, in float64."""
        [diagonal, *more], divisor = self._divisor(totals)
        diagonal.div_(divisor)
        if self._centred is not None:
            left, examples = more
            diagonal -= left**2 / (divisor * examples)
        return diagonal

    def _summed(self, compute: Callable[[], Sequence[Tensor]]) -> list[Tensor]:
        """Return what `compute` sums over the data, and last what the data weighs, and the number of batches."""
        with torch.inference_mode(False), self._objective.as_part_of_data() as share:
            parts = [part.reshape(-1).double() for part in compute()]
        return [*parts, torch.tensor([share.weight, share.batches], dtype=torch.float64, device=self._objective.device)]

    def _divisor(self, totals: Sequence[Tensor]) -> tuple[Sequence[Tensor], float]:
        """Return the sums, and what the whole divides them by."""
        weight, batches = totals[-1].tolist()
        if not batches:
            raise ValueError("data is empty on every rank, so there is nothing to differentiate")
        self._objective.warn_once(int(batches))  # this rank has seen its own only
        return totals[:-1], self._objective.divisor([weight])


def _enclosed_tensors(value: Any, name: str, above: tuple[int, ...]) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors that modules and functions hold, by name; `above` are the identities of what they are part of.

    It looks where digests look: into what functions enclose, and the tensors, modules and functions that they refer to.
    """
    parts: Mapping[Any, Any] = {}
    if id(value) in above:
        return
    if isinstance(value, Tensor):
        yield name, value
    elif isinstance(value, nn.Module):
        parts = {key: one for part in value.modules() for key, one in vars(part).items() if isinstance(one, Tensor)}
        parts |= dict(value.named_parameters()) | dict(value.named_buffers())
    elif isinstance(value, Mapping):
        parts = value
    elif isinstance(value, list | tuple):
        parts = dict(enumerate(value))
    elif isinstance(value, functools.partial):
        parts = {"func": value.func, "args": value.args, **value.keywords}
    elif isinstance(value, types.MethodType):
        parts = {"self": value.__self__, value.__name__: value.__func__}
    elif str(getattr(value, "__module__", None)).partition(".")[0] == "torch":
        return
    elif isinstance(value, types.FunctionType):
        there = value.__globals__
        named = {key: there[key] for key in value.__code__.co_names if key in there}
        parts = {
            key: one
            for key, one in named.items()
            if isinstance(one, Tensor | nn.Module)
            or (isinstance(one, types.FunctionType) and one.__module__ == value.__module__)
        }
        parts |= {"defaults": value.__defaults__, **(value.__kwdefaults__ or {})}
        for key, cell in zip(value.__code__.co_freevars, value.__closure__ or (), strict=True):
            with contextlib.suppress(ValueError):  # not set yet
                parts |= {key: cell.cell_contents}
    elif callable(value) and not isinstance(value, type):
        parts = getattr(value, "__dict__", {})
    for key, one in parts.items():
        yield from _enclosed_tensors(one, f"{name}[{key!r}]", (*above, id(value)))
