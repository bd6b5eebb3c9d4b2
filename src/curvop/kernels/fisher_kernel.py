r"""Fisher matrices :math:`\sum_n J_n^\top r_n r_n^\top J_n`: sums of outer products of per-example gradients.

Here :math:`J_n` is the Jacobian of the prediction for the n-th example, and :math:`r_n` is a derivative of the loss
with respect to this prediction. A product with `v` does not compute the per-example gradients :math:`J_n^\top r_n`. The
first step computes ``w = J v`` for a whole batch. Each example then contributes :math:`r_n \langle r_n, w_n \rangle`
to the cotangent of the prediction, and one backward pass multiplies this cotangent by :math:`J^\top`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from curvop.kernels.cross_entropy import is_small, outer_product
from curvop.kernels.ggn_kernel import GGNLikeKernel, OutputHessian, Parts, can_overwrite, cut_off, outputs_of
from curvop.kernels.graph import LinearMap
from curvop.kernels.jacobian_kernel import RowMap
from curvop.kernels.losses import Examples, Likelihood
from curvop.kernels.model_objective import ModelObjective
from curvop.kernels.objective import BatchLoss
from curvop.kernels.parameters import ParameterLayout

__all__ = ["EmpiricalFisherKernel", "OuterProducts", "SampledFisherKernel", "gradient_sum", "used_terms"]


class EmpiricalFisherKernel(GGNLikeKernel):
    """Linearize batches for products with a block of the empirical Fisher matrix.

    The factors `r` are derivatives of the unreduced loss with respect to the prediction, at the targets of the data.
    """

    has_extra = True

    def __init__(self, objective: ModelObjective, rows: Sequence[str], cols: Sequence[str]) -> None:
        super().__init__(objective, rows, cols)
        self._examples = Examples(objective.loss_function)

    def extra(self, index: int, prediction: Any, batch: Any, y: Any) -> dict[str, Tensor]:
        """Return a dict with the square root of `d`, the number by which the loss divides the sum over the examples.

        The derivative of the loss has the factor ``1 / d``, and `M` is quadratic in the derivative. Multiplying the
        derivative by the square root of `d` gives `M` the factor ``1 / d`` instead of ``1 / d ** 2``.
        """
        divisor = self.objective.divisor_of(prediction, index, batch, y)
        return {"scale": torch.tensor(divisor**0.5, dtype=self.objective.dtype, device=self.objective.device)}

    def num_factors(self, entries: int) -> int:
        """Return 1, because the block of `M` for an example is a single outer product."""
        return 1

    def output_hessian(
        self, outputs: list[Tensor], extra: Mapping[str, Tensor], loss: BatchLoss, memory: Parts = (None,)
    ) -> OutputHessian:
        """Return the block-diagonal map `M`.

        The block of each example is ``r r' / d``, where the loss is ``1 / d`` times a sum over the examples.
        """
        if loss.weight and loss.closed_form is not None and memory[0] is not None:
            derivative: Parts = [loss.closed_form.first(memory[0])]
        else:
            derivative = loss.gradient(outputs)
        parts = [None if part is None else part.detach() for part in derivative]
        return OuterProducts(self._examples, outputs, [parts], extra["scale"])


class SampledFisherKernel(GGNLikeKernel):
    """Linearize batches for products with a block of a Monte Carlo estimate of the Fisher matrix.

    The factors `r` are derivatives of the loss with respect to the prediction, at targets drawn from the likelihood of
    the model. The factors are scaled such that the expectation of ``r r'`` is the Hessian of the loss with respect to
    the prediction.

    Parameters
    ----------
    objective : ModelObjective
    rows, cols : sequence of str
        Names of the parameters that the rows and the columns of the block belong to.
    samples : int
        Number of targets drawn for each example.
    seed : int
        Seed of all draws. The draws for a batch also depend on the index of the batch.
    """

    has_extra = True

    def __init__(
        self, objective: ModelObjective, rows: Sequence[str], cols: Sequence[str], samples: int, seed: int
    ) -> None:
        super().__init__(objective, rows, cols)
        self._examples = Examples(objective.loss_function)
        self._likelihood = Likelihood(objective.loss_function)
        self._samples = samples
        self._seed = seed
        objective.keep_order()  # the draws for a batch depend on its index

    def num_factors(self, entries: int) -> int:
        """Return the number of targets drawn for each example."""
        return self._samples

    def output_hessian(
        self, outputs: list[Tensor], extra: Mapping[str, Tensor], loss: BatchLoss, memory: Parts = (None,)
    ) -> OutputHessian:
        """Return the block-diagonal map `M`. The block of an example is the mean of ``r r'`` over its draws."""
        [z] = outputs
        with torch.no_grad():
            free = [memory[0], *[None] * self._samples]
            draws = [
                [self._likelihood.derivative(z, loss.y, noise, extra, out)]
                for noise, out in zip(extra["noise"], free, strict=False)
            ]
            return OuterProducts(self._examples, outputs, draws, self._samples**-0.5)

    def extra(self, index: int, prediction: Any, batch: Any, y: Any) -> dict[str, Tensor]:
        """Return the random numbers for the draws of batch number `index`.

        The numbers are generated on the host, so that they are the same on every device.
        """
        outputs = outputs_of(prediction)
        if len(outputs) != 1:
            raise ValueError(f"a Fisher matrix needs predictions that are one tensor, but these have {len(outputs)}")
        generator = torch.Generator().manual_seed((self._seed + index * 0x9E3779B97F4A7C15) % 2**63)
        numbers = self._likelihood.noise(outputs[0].shape, self._samples, generator)
        return {"noise": numbers.to(self.objective.device)}


def gradient_sum(objective: ModelObjective, names: Sequence[str], out: Tensor) -> tuple[float, float]:
    """Sum the per-example gradients of the unreduced loss with respect to the parameters `names`.

    Parameters
    ----------
    objective : ModelObjective
    names : sequence of str
        Names of parameters.
    out : Tensor, shape (N,)
        Overwritten with the sum.

    Returns
    -------
    divisor : float
        The number by which the objective divides sums over all batches: the total weight of the batches if the
        reduction is 'mean', and 1 if it is 'sum'.
    count : float
        The number of examples. If the weight of a batch differs from the divisor of its loss, each example of the batch
        counts as ``weight / divisor`` examples.
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
            used = [output for output, part in zip(outputs, derivative, strict=True) if part is not None]
            divisor = objective.divisor_of(prediction, index, batch, loss.y)
            ratio = loss.weight / divisor if divisor else 1.0
            count += ratio * examples.count(used or outputs, loss.y)
            for part, value in zip(parts, LinearMap(outputs, layout.of(leaves))(derivative), strict=True):
                if value is not None:
                    part.add_(value.to(part.device), alpha=loss.weight)
        objective.conclude(totals)
    return objective.divisor(totals.weights), count


class OuterProducts(OutputHessian, RowMap):
    """A block-diagonal map `M`. The block of each example is the sum of ``r r'`` over s vectors `r`.

    Equivalently, ``M = R R'``, where the columns of `R` are the vectors of all examples. The method `rows` multiplies
    by ``R'``, and the method `cotangents` multiplies by `R`.

    Parameters
    ----------
    examples : Examples
    outputs : sequence of Tensor
        The floating-point tensors of the prediction.
    factors : sequence of lists of Tensor or None
        For each of the s vectors, the entries of `r` for all examples, as one tensor for each output. None stands for
        a tensor of zeros.
    scale : float or Tensor
        A number by which all vectors `r` are multiplied.

    Attributes
    ----------
    count : int
        The number of columns of `R`, which is ``n * s`` for n examples.
    tensors : list of Tensor
        The vectors `r` of all examples, without the factor `scale`, in s tensors of shape (n, m).
    used_outputs : list of int
        The indices of the outputs of which the tensors contain entries.
    """

    def __init__(
        self, examples: Examples, outputs: Sequence[Tensor], factors: Sequence[Parts], scale: Tensor | float = 1.0
    ) -> None:
        self._examples, self.scale, self._weight = examples, scale, scale**2
        self._outputs = len(outputs)
        self.used_outputs = [index for index, part in enumerate(factors[0]) if part is not None]
        self._shapes = [outputs[index].shape for index in self.used_outputs]
        self._dtypes = [outputs[index].dtype for index in self.used_outputs]
        self.count = len(factors) * used_terms(examples, outputs, factors[0])[0]
        flat = [examples.flatten([parts[index] for index in self.used_outputs], self._shapes) for parts in factors]
        self.tensors = [part for part in flat if part is not None]

    def __call__(self, vectors: Parts, batched: bool = False, intact: Sequence[Tensor] | None = None) -> Parts:
        """Return ``M w``."""
        flat = self._flat(vectors)
        if flat is None:
            return [None] * self._outputs
        if is_small(flat):
            parts = [factor * ((factor * flat).sum(-1, keepdim=True) * self._weight) for factor in self.tensors]
            return self._restored(parts[0] if len(parts) == 1 else torch.stack(parts).sum(0))
        out = flat if intact is not None and can_overwrite(flat, intact) else torch.empty_like(flat)
        for own, result in zip(flat, out, strict=True) if batched else [(flat, out)]:
            outer_product(self.tensors, self._weight, own, result)
        return self._restored(out)

    def rows(self, tangents: Parts) -> Tensor | None:
        """Return ``R' w``, a tensor of shape (..., n * s), or None if all entries are zero.

        The s entries of an example are consecutive.
        """
        flat = self._flat(tangents)
        if flat is None:
            return None
        products = torch.stack([(factor * flat).sum(-1) for factor in self.tensors], -1) * self.scale
        return products.reshape(*products.shape[:-2], -1)

    def cotangents(self, rows: Tensor) -> Parts:
        """Return ``R u`` for `rows`, a tensor `u` of shape (..., n * s).

        The result has one entry for each output. None stands for a tensor of zeros.
        """
        if not self.tensors:
            return [None] * self._outputs
        weights = (rows * self.scale).reshape(*rows.shape[:-1], -1, len(self.tensors), 1).unbind(-2)
        products = [factor * weight for factor, weight in zip(self.tensors, weights, strict=True)]
        return self._restored(products[0] if len(products) == 1 else torch.stack(products).sum(0))

    def _flat(self, vectors: Parts) -> Tensor | None:
        return self._examples.flatten([vectors[index] for index in self.used_outputs], self._shapes)

    def _restored(self, total: Tensor) -> Parts:
        """Divide a tensor of shape (..., n, m) into one tensor for each output. None stands for a tensor of zeros."""
        restored: list[Tensor | None] = [None] * self._outputs
        parts = self._examples.restore(total, self._shapes)
        for index, part, dtype in zip(self.used_outputs, parts, self._dtypes, strict=True):
            restored[index] = part.to(dtype)
        return restored


def used_terms(examples: Examples, outputs: Sequence[Tensor], derivative: Parts) -> tuple[int, int]:
    """Return ``(n, m)``: the number of examples, and the number of entries of one example.

    Only entries of outputs on which the loss depends are counted.

    The loss does not depend on an output if the entry of `derivative` for this output is None. If the loss depends on
    no output, for example because all targets are ignored, all outputs are counted.
    """
    used = [output.shape for output, part in zip(outputs, derivative, strict=True) if part is not None]
    return examples.terms(used or [output.shape for output in outputs])
