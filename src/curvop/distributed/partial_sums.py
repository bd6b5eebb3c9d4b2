"""Contribution of one rank to the matrix of the whole data set.

The matrix of the whole data set is a weighted mean (or a sum) over batches. Each rank computes the sum over its own
batches, and the total weight of these batches. Rank 0 adds the sums of all ranks, adds the weights of all ranks, and
then divides once.
"""

from __future__ import annotations

import contextlib
import functools
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Self, cast

import torch
from torch import Tensor, nn

from curvop.operators.curvature_operator import CurvatureLinearOperator, GGNLikeLinearOperator
from curvop.operators.engine_operator import UNTRUSTED, EngineLinearOperator, digest
from curvop.operators.fisher import GradientCovarianceLinearOperator
from curvop.operators.transfer import aligned

__all__ = ["ERRORS", "PartialSum"]

#: Exception types by name. If a product raises one of these types on another rank, rank 0 raises the same type.
ERRORS: dict[str, type[Exception]] = {kind.__name__: kind for kind in (*UNTRUSTED, NotImplementedError)}


class PartialSum:
    """Contribution of one part of a data set to the curvature matrix of the whole data set.

    The methods come in pairs, such as `gradient_sums` and `gradient`. To compute the gradient for the whole data set,
    call `gradient_sums` for each part, add the returned tensors over all parts, and pass the totals to `gradient`. The
    sums are float64 vectors on the operator's device. The sums are not divided by a weight, so a part of the data can
    be empty or have weight 0.

    Parameters
    ----------
    A : CurvatureLinearOperator
        Operator of the part of the data. It is not modified.
    """

    def __init__(self, A: CurvatureLinearOperator) -> None:
        if not isinstance(A, CurvatureLinearOperator):
            raise TypeError(
                f"A is a {type(A).__name__}, but must be a Hessian, Gauss-Newton or Fisher matrix of this rank's part "
                "of the data: apply damping, submatrices and journals to the operator that serve returns"
            )
        self.A = A
        self._objective = A._objective
        self._centered = A if isinstance(A, GradientCovarianceLinearOperator) else None

    def block(self, rows: Sequence[str], cols: Sequence[str]) -> Self:
        """Return the `PartialSum` of a block of the matrix."""
        return type(self)(self.A.block(rows, cols))

    def adjoint(self) -> Self:
        """Return the `PartialSum` of the adjoint, which uses the same cached linearizations."""
        adjoint = self.A.H
        return self if adjoint is self.A else type(self)(adjoint)

    def tensors(self) -> list[Tensor]:
        """Return the parameters and all tensors of the model and the loss, without duplicates, in a fixed order."""
        return list({id(tensor): tensor for tensor in self._objective.tensors()}.values())

    def layout(self) -> list[str]:
        """Return the dtype and shape of each tensor in `tensors`, as a list of strings in the same order."""
        return [f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}" for tensor in self.tensors()]

    def shared_settings(self) -> dict[str, str]:
        """Return a dictionary of the digests that are compared between ranks.

        The dictionary contains the fingerprint without the data. The dictionary also contains a separate digest of each
        tensor in the model or the loss function, so that an error can name the tensor that differs.
        """
        parts = self.A.fingerprint(data=False)
        params = {id(value) for value in self._objective.params.values()}
        attributes = vars(self._objective)  # model and loss function, or objective
        for name in ("_model", "loss_function", "_objective", "_batch_weight"):
            for tensor_name, tensor in _enclosed_tensors(attributes.get(name), name.removeprefix("_"), ()):
                if tensor_name not in parts and id(tensor) not in params:
                    parts[tensor_name] = digest(tensor)
        return parts | {"number and shapes of the model's tensors": " ".join(self.layout())}

    def fingerprint(self) -> dict[str, str]:
        """Return digests that identify the matrix, including digests of the data. The data can be empty."""
        with self._objective.as_part_of_data():
            return self.A.fingerprint()

    def product_sums(self, vectors: Tensor) -> list[Tensor]:
        """Return the sums over this rank's data that `products` needs to multiply the matrix by the rows of `vectors`.

        `vectors` has shape (K, N) and dtype float32 or float64, on any device.
        """

        def compute() -> list[Tensor]:
            wide_vectors = aligned(vectors.to(self._objective.device, torch.float64))
            products = cast("Tensor", EngineLinearOperator._apply(self.A, wide_vectors))  # without the mean gradient
            if self._centered is None:
                return [products]
            left, right, _, count = self._centered._gradient_sum()
            return [products, left, wide_vectors @ right, right.new_tensor([count])]

        return self._summed(compute)

    def products(self, totals: Sequence[Tensor], count: int) -> Tensor:
        """From the sums over all ranks, compute the products of the whole matrix with `count` vectors.

        The result is a float64 tensor of shape (count, M).
        """
        [sums, *gradient_sums], divisor = self._divisor(totals)
        products = sums.view(count, -1).div_(divisor)
        if self._centered is not None:
            left, inner_products, examples = gradient_sums
            products -= (inner_products / (divisor * examples))[:, None] * left
        return products

    def gradient_sums(self) -> list[Tensor]:
        """Return the sums over this rank's data that `gradient` needs to compute the gradient and the loss."""

        def compute() -> list[Tensor]:
            gradient, loss = self.A._gradient()
            return [gradient.double(), torch.tensor([loss], dtype=torch.float64, device=gradient.device)]

        return self._summed(compute)

    def gradient(self, totals: Sequence[Tensor]) -> tuple[Tensor, float]:
        """From the sums over all ranks, compute (gradient, loss) of the whole data set.

        The gradient is a float64 tensor of shape (M,), with respect to the row parameters.
        """
        [gradient, loss], divisor = self._divisor(totals)
        return gradient.div_(divisor), loss.item() / divisor

    def diagonal_sums(self) -> list[Tensor]:
        """Return the sums over this rank's data that `diagonal` needs to compute the diagonal of a GGN-like matrix."""

        def compute() -> list[Tensor]:
            assert isinstance(self.A, GGNLikeLinearOperator)
            diagonal = self.A._diagonal()
            if self._centered is None:
                return [diagonal]
            self._centered._mean = None  # may be outdated, because only products detect changed parameters
            left, _, _, count = self._centered._gradient_sum()
            self._centered._mean = None
            return [diagonal, left, left.new_tensor([count])]

        return self._summed(compute)

    def diagonal(self, totals: Sequence[Tensor]) -> Tensor:
        """From the sums over all ranks, compute the diagonal of the whole matrix, a float64 tensor of shape (N,)."""
        [diagonal, *gradient_sums], divisor = self._divisor(totals)
        diagonal.div_(divisor)
        if self._centered is not None:
            left, examples = gradient_sums
            diagonal -= left**2 / (divisor * examples)
        return diagonal

    def _summed(self, compute: Callable[[], Sequence[Tensor]]) -> list[Tensor]:
        """Return the sums from `compute` as flat float64 tensors, and append one tensor for the method `_divisor`.

        The last tensor contains the total weight and the number of this rank's batches.
        """
        with torch.inference_mode(False), self._objective.as_part_of_data() as weights:
            sums = [total.reshape(-1).double() for total in compute()]
        weight = [weights.weight, weights.batches]
        return [*sums, torch.tensor(weight, dtype=torch.float64, device=self._objective.device)]

    def _divisor(self, totals: Sequence[Tensor]) -> tuple[Sequence[Tensor], float]:
        """Return (sums, divisor): all totals except the last one, and the number by which to divide these totals."""
        weight, batches = totals[-1].tolist()
        if not batches:
            raise ValueError("data is empty on every rank: pass at least one batch on one rank")
        self._objective.checks.warn_once(self._objective, int(batches))  # batches on all ranks, not only on rank 0
        return totals[:-1], self._objective.divisor([weight])


def _enclosed_tensors(value: Any, name: str, ancestors: tuple[int, ...]) -> Iterator[tuple[str, Tensor]]:
    """Yield the name and the value of each tensor that a module or function contains.

    A name looks like ``loss_function['weight']``. The search covers the same objects as `digest`: modules, containers,
    closures and default arguments of functions, and those global variables used by a function that are tensors,
    modules, or functions defined in the same file.

    Parameters
    ----------
    value : object
    name : str
        Name of `value`, and the beginning of the names of the tensors in it.
    ancestors : tuple of int
        ``id()`` of each object that contains `value`. The search skips these objects. Otherwise, the search would not
        end if an object contains itself.
    """
    children: Mapping[Any, Any] = {}
    if id(value) in ancestors:
        return
    if isinstance(value, Tensor):
        yield name, value
    elif isinstance(value, nn.Module):
        children = {
            key: attribute
            for module in value.modules()
            for key, attribute in vars(module).items()
            if isinstance(attribute, Tensor)
        }
        children |= dict(value.named_parameters()) | dict(value.named_buffers())
    elif isinstance(value, Mapping):
        children = value
    elif isinstance(value, list | tuple):
        children = dict(enumerate(value))
    elif isinstance(value, functools.partial):
        children = {"func": value.func, "args": value.args, **value.keywords}
    elif isinstance(value, types.MethodType):
        children = {"self": value.__self__, value.__name__: value.__func__}
    elif str(getattr(value, "__module__", None)).partition(".")[0] == "torch":
        return
    elif isinstance(value, types.FunctionType):
        children = _referenced_values(value)
    elif callable(value) and not isinstance(value, type):
        children = getattr(value, "__dict__", {})
    for key, child in children.items():
        yield from _enclosed_tensors(child, f"{name}[{key!r}]", (*ancestors, id(value)))


def _referenced_values(function: types.FunctionType) -> dict[Any, Any]:
    """Return a dict of the values that a function uses: global variables, default arguments and closure variables."""
    module_globals = function.__globals__
    named = {key: module_globals[key] for key in function.__code__.co_names if key in module_globals}
    values: dict[Any, Any] = {
        key: value
        for key, value in named.items()
        if isinstance(value, Tensor | nn.Module)
        or (isinstance(value, types.FunctionType) and value.__module__ == function.__module__)
    }
    values |= {"defaults": function.__defaults__, **(function.__kwdefaults__ or {})}
    for key, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
        with contextlib.suppress(ValueError):  # the variable is not assigned yet
            values |= {key: cell.cell_contents}
    return values
