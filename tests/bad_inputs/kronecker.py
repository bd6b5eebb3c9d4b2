"""Kronecker-factored approximations that cannot be computed, inverted or compared."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from bad_inputs.rows import DATA, DENSE, MODEL, PARAMS, H, X, Y, area, cubes, file_with, made
from curvop import EKFACLinearOperator, GGNLinearOperator, KFACLinearOperator, compare, preconditioner, solve
from curvop.kernels.errors import NonDeterministicObjectiveError, NonFiniteProductError
from curvop.operators.gram import NotFactorableError


def kfac(operator: Any = KFACLinearOperator, **changed: Any) -> Any:
    arguments = dict(model=MODEL, loss_function=nn.MSELoss(), params=PARAMS, data=DATA) | changed
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return operator(**arguments)


def of(model: nn.Module, operator: Any = KFACLinearOperator, **changed: Any) -> Any:
    return kfac(operator, model=model, params=dict(model.named_parameters()), **changed)


class Scaled(nn.Linear):
    """A linear layer whose outputs are multiplied by a parameter."""

    def __init__(self) -> None:
        super().__init__(4, 3)
        self.scale = nn.Parameter(torch.ones(3))

    def forward(self, X: Tensor) -> Tensor:
        return super().forward(X) * self.scale


def scaled() -> nn.Module:
    return made(Scaled)[0]


def scales(params: dict[str, Tensor], X: Tensor) -> Tensor:
    return X * params["scale"]


def dropping() -> Any:
    return of(made(lambda: nn.Linear(4, 3), lambda: nn.Dropout(0.5)), EKFACLinearOperator)


def coupled() -> Any:
    return of(made(lambda: nn.Linear(4, 3), lambda: nn.BatchNorm1d(3)), EKFACLinearOperator)


def of_first_rows() -> Any:
    """Return the EKFAC of a model whose prediction lacks the last item."""

    def predict(params: dict[str, Tensor], X: Tensor) -> Tensor:
        return torch.func.functional_call(MODEL, params, (X,))[:-1]

    return kfac(EKFACLinearOperator, model=predict, data=[(X, Y[:-1])], batch_weight=lambda batch: 9)


def updated(batch: Any = DATA[0], decay: Any = 0.9) -> None:
    kfac().update(batch, decay)


G = GGNLinearOperator(MODEL, nn.MSELoss(), PARAMS, DATA)


area(
    "Kronecker factors",
    ("a matrix by another name", lambda: kfac(fisher="type2"), ValueError, "fisher is 'type2', but must be one of"),
    ("an unknown way to share", lambda: kfac(sharing="sum"), ValueError, "sharing is 'sum', but must be one of"),
    ("an unknown way with others", lambda: kfac(others="drop"), ValueError, "others is 'drop', but must be one of"),
    ("a max_factor of 0", lambda: kfac(max_factor=0), ValueError, "max_factor is 0, but must be an integer >= 1"),
    ("no sample", lambda: kfac(fisher="mc", mc_samples=0), ValueError, "mc_samples is 0"),
    ("a seed that is a word", lambda: kfac(fisher="mc", rng="x"), TypeError, "rng is 'x'"),
    (
        "samples of a loss that is no likelihood",
        lambda: kfac(fisher="mc", loss_function=nn.L1Loss()),
        ValueError,
        "loss_function is no known log-likelihood",
    ),
    (
        "a correction without gradients",
        lambda: kfac(EKFACLinearOperator, fisher="forward-only"),
        ValueError,
        "fisher is 'forward-only', which computes no gradients",
    ),
    (
        "a keyword of curvlinops",
        lambda: kfac(fisher_type="mc"),
        TypeError,
        "unexpected keyword argument 'fisher_type': pass fisher=",
    ),
    (
        "a keyword of curvlinops with the opposite meaning",
        lambda: kfac(separate_weight_and_bias=True),
        TypeError,
        "pass joint_bias=, which has the opposite meaning",
    ),
    (
        "a setting of products, which are not cached",
        lambda: kfac(cache=0),
        TypeError,
        "KFACLinearOperator got an unexpected keyword argument 'cache'",
    ),
    (
        "data items that are not known, of EKFAC",
        of_first_rows,
        ValueError,
        "make the model return the terms of an item one after the other, or use KFAC",
    ),
    (
        "a model without layers",
        lambda: kfac(model=scales, params={"scale": torch.ones(4).double()}, data=[(X, X)]),
        ValueError,
        "no parameter has Kronecker factors",
    ),
    (
        "a parameter of no layer, with ``others='raise'``",
        lambda: of(scaled(), others="raise"),
        ValueError,
        "no Kronecker factors, because other operations use them or data items share their outputs: 'scale'",
    ),
    ("a joint_bias that is not a bool", lambda: kfac(joint_bias="no"), TypeError, "but must be True or False"),
    ("an indefinite loss", lambda: kfac(loss_function=cubes), NotFactorableError, "is indefinite"),
    (
        "dropout that is active, of EKFAC",
        lambda: dropping(),
        NonDeterministicObjectiveError,
        "dropout is active in '1'",
    ),
    (
        "data that holds NaN",
        lambda: kfac(data=[(X * float("nan"), Y)]),
        NonFiniteProductError,
        "a Kronecker factor of '0.weight' is not finite",
    ),
    ("a one-shot iterator", lambda: kfac(data=iter(DATA)), TypeError, "data is a one-shot iterator"),
    (
        "examples that batch normalization couples, of EKFAC",
        lambda: coupled(),
        ValueError,
        "the model couples the data items of a batch",
    ),
    ("a Hessian to approximate", lambda: KFACLinearOperator.of(H), TypeError, "A is a HessianLinearOperator"),
    (
        "a block off the diagonal to approximate",
        lambda: KFACLinearOperator.of(G.block("0.weight", "2.weight")),
        ValueError,
        "A is a block off the diagonal",
    ),
    ("an average with a weight of 2", lambda: updated(decay=2), ValueError, "decay is 2"),
    ("an average with a weight that is a word", lambda: updated(decay="0.5"), TypeError, "decay is a str"),
    ("an update with a number", lambda: updated(3), TypeError, "batch is a int, but must be a pair (X, y)"),
    (
        "an average of EKFAC with KFAC",
        lambda: kfac(EKFACLinearOperator).moving_average(kfac(), 0.5),
        ValueError,
        "only one of the blocks '0' of the two matrices is eigenvalue-corrected",
    ),
    (
        "an average of KFAC with EKFAC",
        lambda: kfac().moving_average(kfac(EKFACLinearOperator), 0.5),
        ValueError,
        "only one of the blocks '0' of the two matrices is eigenvalue-corrected",
    ),
    (
        "an average of two inverses",
        lambda: kfac(EKFACLinearOperator).inverse(0.1).moving_average(kfac(EKFACLinearOperator).inverse(0.1), 0.5),
        ValueError,
        "compute the inverse again",
    ),
    (
        "an average with the matrix of another model",
        lambda: kfac().moving_average(of(made(lambda: nn.Linear(4, 3))), 0.5),
        ValueError,
        "the matrices have different blocks",
    ),
    ("the factors of a misspelt name", lambda: kfac().factors["0.wieght"], KeyError, "no block has the parameter"),
    (
        "an inverse without damping",
        lambda: kfac().inverse(),
        np.linalg.LinAlgError,
        "is singular up to rounding errors",
    ),
    ("a negative damping", lambda: kfac().inverse(-1.0), ValueError, "damping is -1.0"),
    ("a damping that is a word", lambda: kfac().inverse("small"), TypeError, "damping is a str"),
    ("an unknown kind of damping", lambda: kfac().inverse(0.1, "fast"), ValueError, "kind is 'fast'"),
    (
        "a factored inverse of EKFAC",
        lambda: kfac(EKFACLinearOperator).inverse(0.1, "factored"),
        ValueError,
        "pass kind='exact'",
    ),
    ("an infinite power", lambda: kfac().power(np.inf, 0.1), ValueError, "exponent is inf"),
    ("a layer without eigenvalues", lambda: kfac().eigenvalues().of("1"), KeyError, "no layer is named '1'"),
    (
        "a file that holds no matrix",
        lambda tmp: KFACLinearOperator.load(file_with(tmp, b"text")),
        ValueError,
        "was not written by KroneckerFactoredLinearOperator.save",
    ),
    (
        "a preconditioner of a Hessian",
        lambda: preconditioner.kfac(H, 0.1),
        TypeError,
        "A is a HessianLinearOperator",
    ),
    (
        "a preconditioner of a damped matrix",
        lambda: preconditioner.kfac(G.damped(0.1), 0.1),
        TypeError,
        "EFLinearOperator, without damping",
    ),
    (
        "an update by X and y instead of a batch",
        lambda: updated(X, Y),
        TypeError,
        "batch is a Tensor, but must be a pair (X, y)",
    ),
    ("a preconditioner without damping", lambda: preconditioner.kfac(G, 0.0), ValueError, "damping is 0.0"),
    (
        "a preconditioner of EKFAC that is not EKFAC",
        lambda: preconditioner.kfac(kfac(EKFACLinearOperator), 0.1, ekfac=False),
        ValueError,
        "A is an EKFACLinearOperator, but ekfac is False",
    ),
    (
        "the name of a preconditioner",
        lambda: solve(G, np.ones(G.shape[0]), 0.1, preconditioner="kfac", progress=False),
        ValueError,
        "preconditioner is 'kfac', but must be an operator",
    ),
    (
        "the approximation itself as a preconditioner",
        lambda: solve(G, np.ones(G.shape[0]), 0.1, preconditioner=kfac(), progress=False),
        ValueError,
        "preconditioner is a KFACLinearOperator, which approximates the matrix and not its inverse",
    ),
    (
        "two matrices of different shapes",
        lambda: compare(kfac(), DENSE),
        ValueError,
        "approximation has shape (43, 43)",
    ),
    (
        "two matrices without parameters",
        lambda: compare(DENSE, DENSE),
        TypeError,
        "neither approximation nor exact has parameters",
    ),
    (
        "two matrices of different parameters",
        lambda: compare(
            KFACLinearOperator.of(G.block(["0.weight", "0.bias"])), G.block(["2.weight", "0.bias", "2.bias"])
        ),
        ValueError,
        "approximation has shape (25, 25) and exact has shape (23, 23)",
    ),
    ("one product for an error bar", lambda: compare(kfac(), G, num_probes=1), ValueError, "num_probes is 1"),
)
