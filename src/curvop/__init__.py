r"""Curvature matrices of PyTorch models as SciPy linear operators.

The Hessian of a model with P parameters has P^2 entries, too many to store even for small networks. Solvers such as
``eigsh``, ``cg`` and ``svds`` need only its products with vectors. This package computes these products with torch, on
the GPU if the model is on a GPU, and presents the matrices as ``scipy.sparse.linalg.LinearOperator``\ s.

The following example examines the curvature of the loss of a small regression network. First, define a model and data::

    >>> import numpy as np
    >>> import torch
    >>> from scipy.sparse.linalg import eigsh
    >>> from torch import nn
    >>> from curvop import GGNLinearOperator, HessianLinearOperator, solve
    >>> _ = torch.manual_seed(0)
    >>> X = torch.linspace(-2, 2, 64, dtype=torch.float64)[:, None]
    >>> y = torch.sin(2 * X)
    >>> model = nn.Sequential(nn.Linear(1, 16), nn.Tanh(), nn.Linear(16, 1)).double()
    >>> loss_function = nn.MSELoss()

Construct an operator from the model, the loss function, a dict of parameters, and an iterable of batches::

    >>> params = dict(model.named_parameters())
    >>> data = list(zip(X.split(24), y.split(24)))
    >>> H = HessianLinearOperator(model, loss_function, params, data)
    >>> H.shape
    (49, 49)

The operator is the Hessian of the loss of the whole data set. Batches may have different sizes, because they are
weighted by their sizes. Pass the operator to any function of SciPy that accepts a ``LinearOperator``::

    >>> sharpness = eigsh(H, k=1, which="LA", return_eigenvectors=False)
    >>> dense = H @ np.eye(49)
    >>> np.allclose(sharpness, np.linalg.eigvalsh(dense)[-1:])
    True

`curvop.spectrum` estimates traces and spectral densities, and checks eigenvalues. The generalized Gauss-Newton matrix
and the Fisher matrices have the same interface as the Hessian. Train the network with ten damped Gauss-Newton steps.
The operator always uses the current parameters::

    >>> G = GGNLinearOperator(model, loss_function, params, data)
    >>> for _ in range(10):
    ...     gradient, loss = G.gradient_and_loss()
    ...     step = G.unravel(-solve(G, gradient, damping=0.1).solution)
    ...     with torch.no_grad():
    ...         for name, parameter in params.items():
    ...             _ = parameter.add_(step[name])
    >>> loss < 0.01
    True

Blocks of parameters and selections of rows and columns are also operators. Their products cost less than products with
the whole matrix::

    >>> last_layer = H.block(["2.weight", "2.bias"])
    >>> last_layer.shape
    (17, 17)
    >>> S = H[:5, :][:, [0, 7, 48]]
    >>> np.allclose(S @ np.eye(3), (H @ np.eye(49))[:5][:, [0, 7, 48]])
    True
"""

from typing import TYPE_CHECKING

from curvop import callbacks, distributed, huggingface, preconditioner, spectrum
from curvop.checks.check_report import CheckReport
from curvop.checks.compare import Comparison, compare
from curvop.checks.operator_checks import check
from curvop.kernels.errors import NonDeterministicObjectiveError, NonFiniteProductError
from curvop.kernels.target_loss import TargetLoss
from curvop.operators.algebra import DampedLinearOperator
from curvop.operators.diagonal_operator import BlockDiagonalLinearOperator, DiagonalLinearOperator
from curvop.operators.fisher import EFLinearOperator, FisherLinearOperator, GradientCovarianceLinearOperator
from curvop.operators.ggn import GGNLinearOperator
from curvop.operators.gram import GramLinearOperator
from curvop.operators.hessian import HessianLinearOperator
from curvop.operators.jacobian import JacobianLinearOperator, TransposedJacobianLinearOperator
from curvop.operators.kfac import EKFACLinearOperator, KFACLinearOperator, KFOCLinearOperator
from curvop.operators.per_example import PerExampleGradientLinearOperator
from curvop.operators.selection import select
from curvop.operators.submatrix_operator import SubmatrixLinearOperator
from curvop.operators.version import __version__ as __version__
from curvop.solvers.inverse import InverseLinearOperator, NotConvergedError
from curvop.solvers.linear_solve import SolveResult, solve
from curvop.storage import kronecker_files as kronecker_files  # defines `save` and `load` of KFAC matrices
from curvop.storage.journal import JournaledLinearOperator
from curvop.testing.comparison import allclose_report
from curvop.testing.functorch_reference import functorch_hessian

__all__ = [
    "BlockDiagonalLinearOperator",
    "CheckReport",
    "Comparison",
    "DampedLinearOperator",
    "DiagonalLinearOperator",
    "EFLinearOperator",
    "EKFACLinearOperator",
    "FisherLinearOperator",
    "GGNLinearOperator",
    "GradientCovarianceLinearOperator",
    "GramLinearOperator",
    "HessianLinearOperator",
    "InverseLinearOperator",
    "JacobianLinearOperator",
    "JournaledLinearOperator",
    "KFACLinearOperator",
    "KFOCLinearOperator",
    "NonDeterministicObjectiveError",
    "NonFiniteProductError",
    "NotConvergedError",
    "PerExampleGradientLinearOperator",
    "SolveResult",
    "SubmatrixLinearOperator",
    "TargetLoss",
    "TransposedJacobianLinearOperator",
    "allclose_report",
    "callbacks",
    "check",
    "compare",
    "distributed",
    "functorch_hessian",
    "huggingface",
    "preconditioner",
    "select",
    "solve",
    "spectrum",
]


def __dir__() -> list[str]:
    """Return the public names, for tab completion."""
    return [*__all__, "__version__"]


if not TYPE_CHECKING:  # otherwise, type checkers would accept any name

    def __getattr__(name: str) -> object:
        """Raise an ``AttributeError`` that names the right place, if `curvop.spectrum` has it."""
        place = f": use curvop.spectrum.{name}" if name in spectrum.__all__ else ""
        raise AttributeError(f"module 'curvop' has no attribute {name!r}{place}")
