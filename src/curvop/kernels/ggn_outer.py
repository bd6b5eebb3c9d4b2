r"""The generalized Gauss-Newton matrix, :math:`J^\top \nabla^2_z \ell \, J` (Schraudolph, 2002, section 3)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from curvop.kernels.ggn_kernel import Middle, Parts, SandwichKernel
from curvop.kernels.graph import LinearMap

__all__ = ["GGNKernel"]


class GGNKernel(SandwichKernel):
    """Linearizes batches for products with the Gauss-Newton block of the parameters `rows` and `cols`."""

    def middle(
        self, outputs: list[Tensor], batch: Any, given: Mapping[str, Tensor], derivative: Callable[[bool], Parts]
    ) -> Middle:
        """Return the loss's Hessian by the prediction."""
        return _LossHessian(derivative(True), outputs)

    def look(self, middle: Middle, outputs: list[Tensor]) -> None:
        """Look whether the loss has a second derivative, until it has."""
        if not self.objective.curved:
            probes = [torch.linspace(1, 2, part.numel()).cos().to(part).view_as(part) for part in outputs]
            self.objective.curved = any(part is not None and bool(part.any()) for part in middle(probes))


class _LossHessian(Middle):
    def __init__(self, derivative: Parts, outputs: list[Tensor]) -> None:
        self._map = LinearMap(derivative, outputs).check_differentiable()
        self.roots = self._map.roots

    def __call__(self, vectors: Parts, batched: bool = False) -> Parts:
        return self._map(vectors, batched)
