"""Dense curvature matrices by `torch.func`, to compare operators with; see `curvop.testing`."""

from curvop.testing.functorch_reference import (
    NoHessianError,
    functorch_empirical_fisher,
    functorch_ggn,
    functorch_gradient_and_loss,
    functorch_hessian,
    functorch_jacobian,
)

__all__ = [
    "NoHessianError",
    "functorch_empirical_fisher",
    "functorch_ggn",
    "functorch_gradient_and_loss",
    "functorch_hessian",
    "functorch_jacobian",
]
