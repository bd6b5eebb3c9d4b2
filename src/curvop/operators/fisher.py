"""Fisher matrices: second moments of the gradients of single examples."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable, Mapping
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from curvop.kernels.fisher_kernel import EmpiricalFisherKernel, SampledFisherKernel, gradient_sum
from curvop.kernels.ggn_kernel import GGNKernel
from curvop.kernels.losses import Likelihood
from curvop.kernels.model_objective import ModelObjective
from curvop.kernels.objective import BatchWeight
from curvop.kernels.parameters import ParameterLayout
from curvop.kernels.reference import GRADIENT, Route
from curvop.operators.base import Rows
from curvop.operators.curvature_operator import GGNLikeLinearOperator
from curvop.operators.engine_operator import Settings
from curvop.operators.transfer import aligned
from curvop.operators.validation import named_keywords, random_generator

__all__ = ["EFLinearOperator", "FisherLinearOperator", "GradientCovarianceLinearOperator"]


class EFLinearOperator(GGNLikeLinearOperator):
    r"""The empirical Fisher matrix as a symmetric SciPy ``LinearOperator`` of shape ``(P, P)``.

    .. math:: F = \frac{1}{W} \sum_n g_n g_n^\top, \quad W = \sum_b w_b \text{ for a mean, 1 for a sum,}

    with the gradients :math:`g_n` of the unreduced loss (what ``reduction='none'`` gives), summed over the terms of
    example `n`: the uncentred second moment of the gradients, positive semi-definite. An example is one draw of the
    likelihood behind the loss: a position for ``CrossEntropyLoss`` and ``NLLLoss``, a row (all entries along the last
    axis) for the other losses of ``torch.nn``, whose terms are entries, and an index of the first dimension for any
    other function. It is not the Fisher matrix, as the targets are those of the data and not the model's own draws.

    A product costs about 4/3 of a gradient; no gradient of a single example is ever formed.

    Parameters
    ----------
    model, loss_function, params, data, dtype, cache, engine, columns, batch_weight, progress
        As for `HessianLinearOperator`. The loss of one example may not depend on the others.

    Raises
    ------
    TypeError, ValueError
        As for `HessianLinearOperator`.

    References
    ----------
    Kunstner, Hennig, Balles (2019), "Limitations of the empirical Fisher approximation for natural gradient descent",
    eq. (3).
    """

    _kernel = EmpiricalFisherKernel


class GradientCovarianceLinearOperator(EFLinearOperator):
    r"""The covariance of the examples' gradients as a symmetric SciPy ``LinearOperator`` of shape ``(P, P)``.

    .. math::

        C = \frac{1}{W} \sum_n (g_n - \bar g) (g_n - \bar g)^\top = F - \frac{N}{W} \, \bar g \bar g^\top, \qquad
        \bar g = \frac{1}{N} \sum_n g_n,

    the centred twin of the empirical Fisher matrix `F`, with its gradients, examples and divisor `W`; `N` is the number
    of examples (of torch's own losses, positions whose target is ignored do not count). Where the loss averages over
    the examples, as cross-entropy without class weights does, `W` is `N`, and C / B is the covariance of the gradient
    of a batch of B examples drawn with replacement: the noise of stochastic gradient descent. Where the mean gradient
    is large beside the noise, the model's own precision limits what is left of the difference.

    The mean is computed in one pass with the first product, and again where the parameters have changed.

    Parameters
    ----------
    model, loss_function, params, data, dtype, cache, engine, columns, batch_weight, progress
        As for `EFLinearOperator`.

    References
    ----------
    Thomas et al. (2020), "On the interplay between noise and curvature and its effect on optimization and
    generalization", section 2.
    """

    _objective: ModelObjective
    _mean: tuple[int, dict[str, Tensor], float, float] | None = None

    def diagonal(self) -> NDArray[Any]:
        """Return the exact diagonal ``(N,)``, in two passes over the data; see `EFLinearOperator`."""
        exact = self._diagonal()
        self._mean = None  # only products see that the parameters have changed
        left, right, divisor, count = self._gradient_sum()
        self._mean = None
        exact -= left * right / (divisor * count)
        return exact.cpu().numpy().astype(self.dtype, copy=False)

    def other_routes(self, vector: NDArray[Any]) -> list[Route]:
        """Return products by other routes; the user's own code has a mean of its own to be taken away."""
        left, right, divisor, count = self._gradient_sum()
        taken = left * (right @ torch.tensor(vector, dtype=torch.float64, device=right.device)) / (divisor * count)

        def centred(route: Route) -> Route:
            if route.name == GRADIENT:
                return route
            means = route.own.centred if route.own is not None else [taken]
            products = zip(route.products, means, strict=False)
            return dataclasses.replace(route, products=tuple(product - mean for product, mean in products))

        return [centred(route) for route in super().other_routes(vector)]

    def _adjoint(self) -> Any:
        adjoint = super()._adjoint()
        if adjoint is not self:
            adjoint._mean = None  # its engine counts its own passes
        return adjoint

    def __getstate__(self) -> dict[str, object]:
        return cast("dict[str, object]", super().__getstate__()) | {"_mean": None}

    def _apply(self, rows: Rows) -> Rows:
        # What centring takes away may be most of the product: in double precision, as far as the model's goes.
        lifted: Any = aligned(rows.double().contiguous()) if isinstance(rows, Tensor) else rows.astype(np.float64)
        products: Any = super()._apply(lifted)
        left, right, divisor, count = self._gradient_sum()
        if isinstance(rows, Tensor):
            along = lifted @ right.to(products.device) / (divisor * count)
            return cast("Tensor", products - along[:, None] * left.to(products.device)).to(rows.dtype)
        products -= (lifted @ right.cpu().numpy() / (divisor * count))[:, None] * left.cpu().numpy()
        return cast("Rows", products.astype(self._product_dtype(rows.dtype), copy=False))

    def _gradient_sum(self) -> tuple[Tensor, Tensor, float, float]:
        """Return the sum of the examples' gradients by the rows and by the columns, `W`, and how many there are."""
        with torch.inference_mode(False):
            if self._mean is None or self._mean[0] != self._engine.first_passes:
                names = list(dict.fromkeys((*self._rows.names, *self._cols.names)))
                layout = ParameterLayout(self._objective.params, names)
                total = torch.empty(layout.size, dtype=torch.float64, device=self._objective.device)
                divisor, count = gradient_sum(self._objective, names, total)
                sums = dict(zip(names, layout.split(total), strict=True))
                self._mean = self._engine.first_passes, sums, divisor, count
            _, sums, divisor, count = self._mean
            left, right = (
                torch.cat([sums[name].reshape(-1) for name in one.names]) for one in (self._rows, self._cols)
            )
            return left, right, divisor, count


class FisherLinearOperator(GGNLikeLinearOperator):
    r"""The Fisher matrix of the likelihood behind a loss as a symmetric ``LinearOperator`` of shape ``(P, P)``.

    .. math::

        F = \frac{1}{W} \sum_n J_n^\top \, E_{y \sim p(\cdot \mid z_n)}\!\left[ r_n(y) \, r_n(y)^\top \right] J_n,
        \qquad r_n(y) = \nabla_{z_n} \ell(z_n, y),

    with the model's own draws as targets. For ``MSELoss`` (a normal distribution of variance 1/2), ``CrossEntropyLoss``
    (a categorical one) and ``BCEWithLogitsLoss`` (independent Bernoulli) the expectation is the loss's Hessian by the
    prediction, so the exact matrix is the generalized Gauss-Newton matrix. Class weights, `pos_weight` and ignored
    targets scale the examples as they scale the loss.

    Parameters
    ----------
    model, loss_function, params, data, dtype, cache, engine, columns, batch_weight, progress
        As for `HessianLinearOperator`; the loss is one of the three, or its functional form.
    mc_samples : int
        0 for the exact matrix ('type 2'); n for the mean over n draws of each example's target, an unbiased estimate
        of rank n an example. The draws are made once: every product is with the same matrix.
    rng : int or numpy.random.Generator, optional
        What the draws are seeded with; None for fresh ones.

    Raises
    ------
    TypeError, ValueError
        As for `HessianLinearOperator`, and where the loss is no such likelihood.

    References
    ----------
    Martens (2020), "New insights and perspectives on the natural gradient method", JMLR 21, sections 5 and 9.
    """

    @named_keywords
    def __init__(
        self,
        model: nn.Module | Callable[[dict[str, Tensor], Any], Any],
        loss_function: Callable[[Any, Any], Tensor],
        params: Mapping[str, Tensor] | Iterable[Tensor],
        data: Iterable[Any],
        *,
        mc_samples: int = 0,
        rng: int | np.random.Generator | None = None,
        dtype: Any = np.float64,
        cache: float | str = "auto",
        engine: str = "autograd",
        columns: int | str = "auto",
        batch_weight: BatchWeight | None = None,
        progress: Any = False,
    ) -> None:
        if not isinstance(mc_samples, int | np.integer) or mc_samples < 0:
            raise ValueError(f"mc_samples is {mc_samples!r}, but must be a number of draws, or 0 for the exact matrix")
        objective = ModelObjective(model, loss_function, params, data, batch_weight)
        Likelihood(objective.loss_function)  # refuses other losses
        self._kernel = GGNKernel
        if mc_samples:
            seed = int(random_generator(rng).integers(2**63))
            self._kernel = functools.partial(SampledFisherKernel, samples=int(mc_samples), seed=seed)
        self._setup(objective, Settings(dtype, cache, engine, columns, progress))
