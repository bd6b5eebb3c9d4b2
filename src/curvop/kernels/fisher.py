r"""Fisher matrices: second moments of gradients, :math:`\sum_n J_n^\top r_n r_n^\top J_n` over the examples `n`.

Never is a gradient of one example formed: with ``w = J v`` for a whole batch, each example's part of the prediction
becomes :math:`r_n \langle r_n, w_n \rangle`, and one backward pass takes all of them back to the parameters.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from curvop.kernels.batches import signature
from curvop.kernels.examples import Examples
from curvop.kernels.layout import ParameterLayout
from curvop.kernels.likelihoods import Likelihood
from curvop.kernels.model_objective import ModelObjective
from curvop.kernels.sandwich import Middle, Parts, SandwichKernel, outputs_of

__all__ = ["EmpiricalFisherKernel", "SampledFisherKernel", "gradient_sum"]


class EmpiricalFisherKernel(SandwichKernel):
    """The gradients of the unreduced loss: `r` is its derivative by the prediction at the targets of the data."""

    def __init__(self, objective: ModelObjective, rows: Sequence[str], cols: Sequence[str]) -> None:
        super().__init__(objective, rows, cols)
        self._examples = Examples(objective.loss_function)

    def share(self, weight: float) -> float:
        """Return the weight squared: twice in the product stands a derivative that the loss's mean divided by it."""
        return weight * weight

    def middle(
        self, outputs: list[Tensor], batch: Any, given: Mapping[str, Tensor], derivative: Callable[[bool], Parts]
    ) -> Middle:
        """Return the outer products of the loss's derivative, example by example."""
        return _OuterProducts(self._examples, [derivative(False)])


class SampledFisherKernel(SandwichKernel):
    """The gradients at targets that the model's own likelihood draws, `samples` for each example.

    Parameters
    ----------
    samples : int
    seed : int
        Of all draws; those of a batch depend on its number besides.
    """

    def __init__(
        self, objective: ModelObjective, rows: Sequence[str], cols: Sequence[str], samples: int, seed: int
    ) -> None:
        super().__init__(objective, rows, cols)
        self._examples = Examples(objective.loss_function)
        self._likelihood = Likelihood(objective.loss_function)
        self._samples = samples
        self._seed = seed
        self._shapes: dict[object, list[Tensor]] = {}

    def middle(
        self, outputs: list[Tensor], batch: Any, given: Mapping[str, Tensor], derivative: Callable[[bool], Parts]
    ) -> Middle:
        """Return the mean of the outer products over the draws."""
        [z], (_, y) = outputs, batch
        with torch.no_grad():
            draws = [self._likelihood.derivative(z, y, one, given) for one in given["noise"].to(z.dtype)]
            return _OuterProducts(self._examples, [[draw * self._samples**-0.5] for draw in draws])

    def given(self, index: int, outputs: list[Tensor]) -> dict[str, Tensor]:
        """Return the random numbers behind the draws; made on the host, so that every device draws the same."""
        if len(outputs) != 1:
            raise ValueError(f"a Fisher matrix needs predictions of one tensor, but these have {len(outputs)}")
        generator = torch.Generator().manual_seed((self._seed + index * 0x9E3779B97F4A7C15) % 2**63)
        numbers = self._likelihood.noise(outputs[0].shape, self._samples, generator)
        return {"noise": numbers.to(self.objective.device)}

    def held(self, leaves: Mapping[str, Tensor], index: int, batch: Any) -> dict[str, dict[str, Tensor]]:
        """Return what the objective holds, and the random numbers."""
        held = super().held(leaves, index, batch)
        like = signature(batch)
        if like not in self._shapes:
            with torch.no_grad():
                prediction = self.objective.traced_prediction(leaves, held, batch)
            self._shapes[like] = [part.to("meta") for part in outputs_of(prediction)]
        return held | {"given": self.given(index, self._shapes[like])}


def gradient_sum(objective: ModelObjective, names: Sequence[str], out: Tensor) -> tuple[float, int]:
    """Write the sum of the examples' gradients into `out` ``(N,)``; return the divisor `W`, and how many there are.

    These are the gradients of the unreduced loss with respect to the parameters `names`.
    """
    examples, count, weights = Examples(objective.loss_function), 0, []
    leaves = objective.leaves(names)
    parts = ParameterLayout(objective.params, names).split(out.zero_())
    with objective.slow_backends():
        for index, batch in objective.batches():
            prediction = objective.predict(leaves, batch)
            loss = objective.criterion(prediction, index, batch)
            weights.append(loss.weight)
            if loss.weight:
                count += examples.count(outputs_of(prediction), batch[1])
            for part, value in zip(parts, loss.gradient([leaves[name] for name in names]), strict=True):
                if value is not None:
                    part.add_(value, alpha=loss.weight)
    return objective.divisor(weights), count


class _OuterProducts(Middle):
    def __init__(self, examples: Examples, factors: Sequence[Parts]) -> None:
        self._examples = examples
        self._factors = factors
        self.tensors = [part for parts in factors for part in parts if part is not None]

    def __call__(self, vectors: Parts, batched: bool = False) -> Parts:
        known = [index for index, vector in enumerate(vectors) if vector is not None]

        def multiply(*some: Tensor) -> list[Tensor | None]:
            parts: list[Tensor | None] = [None] * len(vectors)
            for index, vector in zip(known, some, strict=True):
                parts[index] = vector
            products = [self._examples.outer(factors, parts) for factors in self._factors]
            return [_sum(part) for part in zip(*products, strict=True)]

        some = [vector for vector in vectors if vector is not None]
        products: Parts = torch.func.vmap(multiply)(*some) if batched and some else multiply(*some)
        return products


def _sum(parts: Sequence[Tensor | None]) -> Tensor | None:
    found = [part for part in parts if part is not None]
    return sum(found[1:], found[0]) if found else None
