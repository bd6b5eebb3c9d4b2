r"""Fisher matrices: second moments of gradients, :math:`\sum_n J_n^\top r_n r_n^\top J_n` over the examples `n`.

Never is a gradient of one example formed: with ``w = J v`` for a whole batch, each example's part of the prediction
becomes :math:`r_n \langle r_n, w_n \rangle`, and one backward pass takes all of them back to the parameters.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from curvop.kernels.ggn_kernel import GGNLikeKernel, OutputHessian, Parts, cut_off, outputs_of
from curvop.kernels.graph import LinearMap
from curvop.kernels.losses import Examples, Likelihood
from curvop.kernels.model_objective import ModelObjective
from curvop.kernels.parameters import ParameterLayout

__all__ = ["EmpiricalFisherKernel", "SampledFisherKernel", "gradient_sum"]


class EmpiricalFisherKernel(GGNLikeKernel):
    """The gradients of the unreduced loss: `r` is its derivative by the prediction at the targets of the data."""

    gives = True

    def __init__(self, objective: ModelObjective, rows: Sequence[str], cols: Sequence[str]) -> None:
        super().__init__(objective, rows, cols)
        self._examples = Examples(objective.loss_function)

    def extra(self, index: int, prediction: Any, batch: Any) -> dict[str, Tensor]:
        """Return the root of what the loss's mean divides by: a derivative that is not divided stands twice in `M`."""
        divisor = self.objective.divisor_of(prediction, index, batch)
        return {"scale": torch.tensor(divisor**0.5, dtype=self.objective.dtype, device=self.objective.device)}

    def output_hessian(
        self, outputs: list[Tensor], batch: Any, given: Mapping[str, Tensor], derivative: Callable[[bool], Parts]
    ) -> OutputHessian:
        """Return the outer products of the loss's derivative, example by example, divided as the loss is."""
        parts = [None if part is None else part.detach() for part in derivative(False)]
        return _OuterProducts(
            self._examples, [[None if part is None else part * given["scale"].to(part.dtype) for part in parts]]
        )


class SampledFisherKernel(GGNLikeKernel):
    """The gradients at targets that the model's own likelihood draws, `samples` for each example.

    Parameters
    ----------
    samples : int
    seed : int
        Of all draws; those of a batch depend on its number besides.
    """

    gives = True

    def __init__(
        self, objective: ModelObjective, rows: Sequence[str], cols: Sequence[str], samples: int, seed: int
    ) -> None:
        super().__init__(objective, rows, cols)
        self._examples = Examples(objective.loss_function)
        self._likelihood = Likelihood(objective.loss_function)
        self._samples = samples
        self._seed = seed
        objective.keep_order()  # the draws of a batch are told by its number

    def output_hessian(
        self, outputs: list[Tensor], batch: Any, given: Mapping[str, Tensor], derivative: Callable[[bool], Parts]
    ) -> OutputHessian:
        """Return the mean of the outer products over the draws."""
        [z], (_, y) = outputs, batch
        with torch.no_grad():
            draws = [self._likelihood.derivative(z, y, one, given) for one in given["noise"]]
            return _OuterProducts(self._examples, [[draw * self._samples**-0.5] for draw in draws])

    def extra(self, index: int, prediction: Any, batch: Any) -> dict[str, Tensor]:
        """Return the random numbers behind the draws; made on the host, so that every device draws the same."""
        outputs = outputs_of(prediction)
        if len(outputs) != 1:
            raise ValueError(f"a Fisher matrix needs predictions of one tensor, but these have {len(outputs)}")
        generator = torch.Generator().manual_seed((self._seed + index * 0x9E3779B97F4A7C15) % 2**63)
        numbers = self._likelihood.noise(outputs[0].shape, self._samples, generator)
        return {"noise": numbers.to(self.objective.device)}


def gradient_sum(objective: ModelObjective, names: Sequence[str], out: Tensor) -> tuple[float, float]:
    """Write the sum of the examples' gradients into `out` ``(N,)``; return the divisor `W`, and how many there are.

    These are the gradients of the unreduced loss with respect to the parameters `names`. Where a batch's weight is not
    its loss's own divisor, each of its examples counts by the ratio.
    """
    examples, count, totals = Examples(objective.loss_function), 0.0, objective.totals()
    leaves = objective.leaves(names)
    layout = ParameterLayout(objective.params, names)
    parts = layout.split(out.zero_())
    with objective.slow_backends():
        for index, batch in objective.batches():
            prediction, _, cuts, loss = objective.split(leaves, index, batch, cut_off)
            outputs = outputs_of(prediction)
            totals.add(loss.value, loss.weight, *leaves.values())
            derivative = loss.gradient(cuts)
            reached = [output for output, own in zip(outputs, derivative, strict=True) if own is not None]
            divisor = objective.divisor_of(prediction, index, batch)
            ratio = loss.weight / divisor if divisor else 1.0
            count += ratio * examples.count(reached or outputs, batch[1])
            for part, value in zip(parts, LinearMap(outputs, layout.of(leaves))(derivative), strict=True):
                if value is not None:
                    part.add_(value.to(part.device), alpha=loss.weight)
        objective.conclude(totals)
    return objective.divisor(totals.weights), count


class _OuterProducts(OutputHessian):
    def __init__(self, examples: Examples, factors: Sequence[Parts]) -> None:
        self._examples = examples
        self._factors = factors
        self.tensors = [part for parts in factors for part in parts if part is not None]

    def __call__(self, vectors: Parts, batched: bool = False) -> Parts:
        known = [index for index, vector in enumerate(vectors) if vector is not None]
        there = [index for index, factor in enumerate(self._factors[0]) if factor is not None]
        if not set(known) & set(there):
            return [None] * len(vectors)

        def multiply(*some: Tensor) -> list[Tensor]:
            parts: list[Tensor | None] = [None] * len(vectors)
            for index, vector in zip(known, some, strict=True):
                parts[index] = vector
            products = [self._examples.outer(factors, parts) for factors in self._factors]
            return [torch.stack([product[index] for product in products]).sum(0) for index in there]

        some = [vector for vector in vectors if vector is not None]
        found: list[Tensor] = torch.func.vmap(multiply)(*some) if batched else multiply(*some)
        products: list[Tensor | None] = [None] * len(vectors)
        for index, product in zip(there, found, strict=True):
            products[index] = product
        return products
