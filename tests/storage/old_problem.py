"""The problems whose files `old_files` holds: the same to the last bit on every machine, in every version.

All numbers are whole multiples of a power of two. What a file is recognised by depends on them and on the classes and
functions below: change neither. Where a problem has no Python function of its own, its files hold for every version of
Python; `PYTHON_ONLY` names the others, whose bytecode belongs to the version that made them.
"""

from __future__ import annotations

import contextlib
import functools
import io
import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from scipy.sparse import csr_array
from scipy.sparse.linalg import LinearOperator, aslinearoperator
from torch import Tensor, nn
from torch.nn import functional
from tqdm import tqdm

import curvop

SIZE = 20
"""Parameters of `network`."""

PYTHON_ONLY = ("functions", "objective")
"""The operators of Python functions, whose files hold for one version of Python only."""


def pattern(*shape: int, seed: int = 0) -> Tensor:
    """Return numbers between -0.8 and 0.8 without an order that shows, each a whole multiple of 1 / 64."""
    number = torch.arange(math.prod(shape)) + 13 * seed
    return ((7 * number**3 + 37 * number) % 101 - 50).to(torch.float64).reshape(shape) / 64


def vectors(rows: int, columns: int, seed: int = 7) -> np.ndarray:
    return pattern(rows, columns, seed=seed).numpy()


def filled(*layers: nn.Module) -> nn.Sequential:
    """Return a network in float64 whose parameters are patterns, without a draw from torch's generator."""
    model = nn.Sequential(*layers)
    with torch.no_grad():
        for seed, parameter in enumerate(model.parameters()):
            parameter.copy_(pattern(*parameter.shape, seed=seed))
    return model.eval()


def linear(inputs: int, outputs: int) -> nn.Module:
    return nn.utils.skip_init(nn.Linear, inputs, outputs, dtype=torch.float64)


def network() -> nn.Sequential:
    return filled(linear(3, 3), nn.Tanh(), linear(3, 2))


def inputs() -> tuple[Tensor, ...]:
    return pattern(7, 3, seed=3).split([4, 3])


def regression() -> list[Any]:
    return list(zip(inputs(), pattern(7, 2, seed=4).split([4, 3]), strict=True))


def classes() -> list[Any]:
    return list(zip(inputs(), (torch.arange(7) * 3 % 5 % 2).split([4, 3]), strict=True))


def bits() -> list[Any]:
    return list(zip(inputs(), (pattern(7, 2, seed=5) > 0).double().split([4, 3]), strict=True))


def problem() -> dict[str, Any]:
    """Return the problem that the command is given."""
    model = network()
    return {
        "model": model,
        "loss_function": nn.MSELoss(),
        "params": dict(model.named_parameters()),
        "data": regression(),
    }


def hessian(**settings: Any) -> curvop.HessianLinearOperator:
    return curvop.HessianLinearOperator(**problem(), columns=1, **settings)


@contextlib.contextmanager
def counted_hessian() -> Iterator[tuple[curvop.HessianLinearOperator, Any]]:
    """Give a Hessian with a bar that counts its products and those of its blocks."""
    with tqdm(file=io.StringIO()) as bar:
        yield hessian(progress=bar), bar


def gauss_newton() -> curvop.GGNLinearOperator:
    return curvop.GGNLinearOperator(**problem(), columns=1)


def jacobian() -> curvop.JacobianLinearOperator:
    model = network()
    return curvop.JacobianLinearOperator(model, dict(model.named_parameters()), regression(), columns=1)


def classified(kind: Any, loss_function: Any, **settings: Any) -> Any:
    model = network()
    return kind(model, loss_function, dict(model.named_parameters()), classes(), columns=1, **settings)


def binary(kind: Any, loss_function: Any, **settings: Any) -> Any:
    model = network()
    return kind(model, loss_function, dict(model.named_parameters()), bits(), columns=1, **settings)


def weighted_loss() -> nn.Module:
    return nn.CrossEntropyLoss(torch.tensor([0.25, 1.5], dtype=torch.float64), label_smoothing=0.125)


def normalised() -> Any:
    """Return the Hessian by some parameters of a model that has others, and buffers."""
    normalisation = nn.BatchNorm1d(3, dtype=torch.float64)
    model = filled(linear(3, 3), normalisation, nn.Softplus(), linear(3, 2))
    with torch.no_grad():
        normalisation.running_mean.copy_(pattern(3, seed=8))
        normalisation.running_var.copy_(pattern(3, seed=9).abs() + 1)
    chosen = {name: value for name, value in model.named_parameters() if not name.startswith("0.")}
    return curvop.HessianLinearOperator(model, nn.HuberLoss(delta=0.5), chosen, regression(), columns=1)


def dense() -> np.ndarray:
    """Return a symmetric matrix whose eigenvalues lie apart."""
    entries = vectors(SIZE, SIZE, seed=1)
    return (entries + entries.T) / 4 + np.diag(np.arange(SIZE) / 4)


class Dense(LinearOperator):  # type: ignore[misc]
    """An operator of which nothing but its products is known; it counts them."""

    def __init__(self) -> None:
        self.num_products = 0
        super().__init__(np.dtype(float), (SIZE, SIZE))

    def _matvec(self, x: np.ndarray) -> np.ndarray:
        return self._matmat(np.reshape(x, (-1, 1))).reshape(np.shape(x))

    def _matmat(self, X: np.ndarray) -> np.ndarray:
        self.num_products += X.shape[1]
        return dense() @ X

    def _adjoint(self) -> Dense:
        return self


# Functions and a class of one's own, of which a file knows the bytecode.

QUARTIC = 0.125


class Shifted(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = network()
        self.shift = 0.25

    def forward(self, X: Tensor) -> Tensor:
        return self.inner(X + self.shift)


def quartic(prediction: Tensor, y: Tensor) -> Tensor:
    return ((prediction - y) ** 4).mean() * QUARTIC


def by_size(batch: Any) -> float:
    return 2.0 * len(batch[0])


def functions() -> Any:
    model = Shifted().eval()
    params = dict(model.named_parameters())
    return curvop.HessianLinearOperator(model, quartic, params, regression(), columns=1, batch_weight=by_size)


def regularised(params: dict[str, Tensor], batch: Any) -> Tensor:
    X, y = batch
    return quartic(X @ params["weight"], y) + QUARTIC * (params["weight"] ** 4).sum()


def objective() -> Any:
    weight = pattern(3, 2, seed=2).requires_grad_()
    return curvop.HessianLinearOperator.from_objective(regularised, {"weight": weight}, regression(), columns=1)


OPERATORS: dict[str, Callable[[], LinearOperator]] = {
    "hessian": hessian,
    "hessian-float32": lambda: hessian(dtype=np.float32),
    "hessian-cross-entropy": lambda: classified(curvop.HessianLinearOperator, weighted_loss()),
    "hessian-functional": lambda: binary(
        curvop.HessianLinearOperator, functools.partial(functional.binary_cross_entropy_with_logits, reduction="sum")
    ),
    "hessian-part": normalised,
    "ggn": gauss_newton,
    "ef": lambda: classified(curvop.EFLinearOperator, nn.CrossEntropyLoss()),
    "covariance": lambda: classified(curvop.GradientCovarianceLinearOperator, nn.CrossEntropyLoss()),
    "fisher": lambda: binary(curvop.FisherLinearOperator, nn.BCEWithLogitsLoss()),
    "fisher-sampled": lambda: classified(curvop.FisherLinearOperator, nn.CrossEntropyLoss(), mc_samples=3, rng=5),
    "jacobian": jacobian,
    "jacobian-transposed": lambda: jacobian().T,
    "jacobian-block": lambda: jacobian().block(["2.bias", "0.weight"]),
    "block": lambda: hessian().block("2.weight"),
    "block-off-diagonal": lambda: gauss_newton().block("0.weight", ["2.bias", "2.weight"]),
    "damped": lambda: gauss_newton().damped(0.5),
    "submatrix": lambda: hessian().submatrix([3, 17, 3, 8], [1, 12]),
    "submatrix-slice": lambda: jacobian()[2:9, :],
    "sum": lambda: hessian() + 2 * gauss_newton(),
    "multiple": lambda: -0.25 * hessian(),
    "product": lambda: jacobian().T @ jacobian(),
    "with-a-matrix": lambda: hessian() + aslinearoperator(dense()),
    "scipy-dense": lambda: aslinearoperator(dense()),
    "scipy-sparse": lambda: aslinearoperator(csr_array(np.triu(np.tril(dense(), 1), -1))),
    "scipy-product": Dense,
    "functions": functions,
    "objective": objective,
}
"""What there are journals of, by the names of their folders; and one of a `DISTRIBUTED` operator."""

DISTRIBUTED = "distributed"


@contextlib.contextmanager
def operator(name: str) -> Iterator[Any]:
    """Give an operator of its own by the name of its journal."""
    if name == DISTRIBUTED:
        with curvop.distributed.serve(gauss_newton()) as whole:
            yield whole
    else:
        yield OPERATORS[name]()


def products(J: curvop.JournaledLinearOperator) -> list[np.ndarray]:
    """Return the products that a journal is made of: with arrays, with tensors, and of the adjoint."""
    found = [J @ vectors(J.shape[1], 2)]
    if J.H is not J:
        found.append(J.H @ vectors(J.shape[0], 2))
    if J.takes_tensors:
        found.append((J @ pattern(J.shape[1], seed=9).to(torch.float32)).numpy())
    return found


# What the studies are told; each as it was told when the files were made.

_PROBES: dict[str, Any] = {"num_probes": 5, "num_steps": 6, "rng": 1}
DENSITIES: dict[str, tuple[Callable[[], Any], dict[str, Any]]] = {
    "hessian": (hessian, _PROBES | {"memory": 4500}),  # for two probes at a time
    "float32": (lambda: hessian(dtype=np.float32), _PROBES | {"memory": 2250}),
    "deflated": (hessian, {"num_probes": 3, "num_steps": 6, "rng": 2, "deflate": 2}),  # all at once
    "scipy": (Dense, _PROBES | {"memory": 4500}),
}
DENSITY_STAGES: dict[str, int | None] = {
    "hessian-begun": 2,
    "hessian-halfway": 8,
    "hessian-finished": None,
    "float32-halfway": 8,
    "deflated-begun": 2,
    "deflated-finished": None,
    "scipy-halfway": 8,
}
"""After how many runs of a step each the checkpoints were kept; None for those that took all steps at once."""

BLOCKS: dict[str, Any] = {"num_probes": 2, "num_steps": 4, "norm_products": 6, "rng": 3}

EIGEN: dict[str, dict[str, Any]] = {
    "certified": {"k": 3, "which": "LA", "rng": 0},
    "plain": {"k": 2, "which": "SA", "rng": 0, "certificate": False},
    "unfinished": {"k": 2, "which": "LM", "rng": 0, "method": "device", "ncv": 3, "maxiter": 1},
}
POINTS = [-0.5, 0.0, 0.25, 1.0]

_NAMED = "old_problem:problem"
STUDY = ["spectrum", _NAMED, "--k", "2", "--probes", "3", "--steps", "5", "--columns", "1", "--blocks", "--json"]
STUDIES: dict[str, tuple[int | None, int]] = {
    "in-the-density": (78, 9),
    "in-the-blocks": (112, 15 + 2 * (9 + 3)),
    "finished": (None, 15 + 2 * SIZE),
}
"""After how many products they were interrupted, and how many of these the folders of density and blocks hold.

Those are the steps of the density, and the columns of the finished blocks and for their norms.
"""

STUDY_RESULTS = ("density.npz", "blocks.npz", "eigenpairs_LA.npz")
"""Files of the finished study that are kept besides its folders and ``spectrum.json``."""

COMMANDS = {
    "eigs": ["eigs", _NAMED, "--k", "3", "--columns", "1", "--json"],
    "eigs-jacobian": ["eigs", _NAMED, "--matrix", "jacobian", "--k", "3", "--columns", "1", "--json"],
    "solve": ["solve", _NAMED, "--matrix", "ggn", "--rank", "4", "--columns", "1", "--json"],
    "check": ["check", _NAMED, "--columns", "1", "--json"],
}
SAVED = ("eigs", "eigs-jacobian", "solve")
"""The commands that save arrays."""
