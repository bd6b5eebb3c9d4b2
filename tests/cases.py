"""Small real problems in float64: every loss, input and layer that the operators are shown to get right."""

from __future__ import annotations

import functools
import math
import zlib
from collections import UserDict, namedtuple
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from curvop import EKFACLinearOperator, KFACLinearOperator
from curvop.kernels import recorded
from curvop.kernels.engine import Engine

Pair = namedtuple("Pair", ["left", "right"])


@dataclass
class Problem:
    model: Any
    loss_function: Any
    data: list[Any]
    params: dict[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.params = self.params or dict(self.model.named_parameters())


def cut(X: Any, y: Any, sizes: tuple[int, ...]) -> list[Any]:
    """Cut tensors, dicts, lists, tuples and named tuples of tensors into batches along the first dimension."""

    def rows(tree: Any, where: slice) -> Any:
        if isinstance(tree, Tensor):
            return tree[where]
        if isinstance(tree, UserDict):
            return UserDict({key: rows(value, where) for key, value in tree.items()})
        if isinstance(tree, dict):
            return {key: rows(value, where) for key, value in tree.items()}
        if hasattr(tree, "_fields"):
            return type(tree)(*(rows(value, where) for value in tree))
        return type(tree)(rows(value, where) for value in tree)

    stops = [sum(sizes[: index + 1]) for index in range(len(sizes))]
    wheres = [slice(stop - size, stop) for size, stop in zip(sizes, stops, strict=True)]
    return [(rows(X, where), rows(y, where)) for where in wheres]


def seeded(function: Any) -> Any:
    """Give each case random numbers of its own, in float64, and leave the global state alone."""

    @functools.wraps(function)
    def build(*args: Any) -> Any:
        default = torch.get_default_dtype()
        with torch.random.fork_rng():
            torch.manual_seed(zlib.crc32(function.__name__.encode()))
            torch.set_default_dtype(torch.float64)
            try:
                return function(*args)
            finally:
                torch.set_default_dtype(default)

    return build


def mlp(inputs: int = 4, outputs: int = 3) -> nn.Sequential:
    return nn.Sequential(nn.Linear(inputs, 5), nn.Tanh(), nn.Linear(5, outputs))


class Constructed:
    """An approximation that is constructed in each product, as its constructor calls the model and reads the data."""

    def __init__(self, kind: Any, model: Any, loss_function: Any, params: Any, data: Any, **options: Any) -> None:
        self._build = functools.partial(kind, model, loss_function, params, data)  # the options are those of products
        self.shape = (sum(value.numel() for value in params.values()),) * 2

    def __matmul__(self, X: Any) -> Any:
        return self._build() @ X


#: KFAC and EKFAC, for tests of what products leave behind.
APPROXIMATIONS = {
    "kfac": functools.partial(Constructed, KFACLinearOperator),
    "ekfac": functools.partial(Constructed, EKFACLinearOperator),
}

N = 9
BATCHINGS = {"one": (9,), "unequal": (6, 3), "singles": (1,) * 9}


def slow(*values: Any) -> list[Any]:
    """Return values of a parameter whose tests belong to the tier ``slow``."""
    return [pytest.param(value, marks=pytest.mark.slow) for value in values]


def nightly(*values: Any) -> list[Any]:
    """Return values of a parameter whose tests belong to the tier ``nightly``."""
    return [pytest.param(value, marks=pytest.mark.nightly) for value in values]


# Losses: name -> (loss, targets); the model is an MLP with three outputs.


def classes() -> Tensor:
    return torch.randint(0, 3, (N,))


def some_ignored() -> Tensor:
    y = classes()
    y[[0, 4, 6, 7, 8]] = -100  # the whole of the last of the unequal batches
    return y


def plain_callable(prediction: Tensor, y: Tensor) -> Tensor:
    return ((prediction - y) ** 4).sum(1).mean()


class SumOfFourthPowers:
    reduction = "sum"

    def __call__(self, prediction: Tensor, y: Tensor) -> Tensor:
        return ((prediction - y) ** 4).sum()


class HalvedMSE(nn.MSELoss):
    """A subclass that computes its own loss: a mean over the batch of sums over the outputs."""

    def forward(self, prediction: Tensor, y: Tensor) -> Tensor:
        return 0.5 * ((prediction - y) ** 2).sum(1).mean()


CLASS_WEIGHTS = torch.tensor([0.2, 1.0, 3.0], dtype=torch.float64)
LOSSES = {
    "mse": lambda: (nn.MSELoss(), torch.randn(N, 3)),
    "mse-sum": lambda: (nn.MSELoss(reduction="sum"), torch.randn(N, 3)),
    "l1": lambda: (nn.L1Loss(), torch.randn(N, 3)),
    "smooth-l1": lambda: (nn.SmoothL1Loss(), torch.randn(N, 3)),
    "huber": lambda: (nn.HuberLoss(delta=0.5), torch.randn(N, 3)),
    "poisson": lambda: (nn.PoissonNLLLoss(), torch.rand(N, 3)),
    "soft-margin": lambda: (nn.SoftMarginLoss(), torch.randn(N, 3).sign()),
    "ce": lambda: (nn.CrossEntropyLoss(), classes()),
    "ce-sum": lambda: (nn.CrossEntropyLoss(reduction="sum"), classes()),
    "ce-weights": lambda: (nn.CrossEntropyLoss(weight=CLASS_WEIGHTS.clone()), classes()),
    "ce-ignored": lambda: (nn.CrossEntropyLoss(), some_ignored()),
    "ce-ignored-sum": lambda: (nn.CrossEntropyLoss(reduction="sum"), some_ignored()),
    "ce-ignored-class": lambda: (nn.CrossEntropyLoss(ignore_index=1), classes()),
    "ce-smoothed": lambda: (nn.CrossEntropyLoss(label_smoothing=0.1), classes()),
    "ce-everything": lambda: (nn.CrossEntropyLoss(CLASS_WEIGHTS.clone(), label_smoothing=0.1), some_ignored()),
    "ce-probabilities": lambda: (nn.CrossEntropyLoss(CLASS_WEIGHTS.clone()), torch.rand(N, 3).softmax(1)),
    "bce": lambda: (nn.BCEWithLogitsLoss(), torch.rand(N, 3).round()),
    "bce-weights": lambda: (nn.BCEWithLogitsLoss(torch.rand(3), pos_weight=torch.rand(3)), torch.rand(N, 3).round()),
    "f-cross-entropy": lambda: (F.cross_entropy, some_ignored()),
    "f-partial": lambda: (functools.partial(F.cross_entropy, weight=CLASS_WEIGHTS.clone(), ignore_index=2), classes()),
    "f-partial-sum": lambda: (functools.partial(F.mse_loss, reduction="sum"), torch.randn(N, 3)),
    "callable": lambda: (plain_callable, torch.randn(N, 3)),
    "callable-sum": lambda: (SumOfFourthPowers(), torch.randn(N, 3)),
    "subclass": lambda: (HalvedMSE(), torch.randn(N, 3)),
}


@seeded
def loss_problem(name: str, batching: str = "unequal") -> Problem:
    loss_function, y = LOSSES[name]()
    return Problem(mlp().eval(), loss_function, cut(torch.randn(N, 4), y, BATCHINGS[batching]))


# Losses whose prediction is something else than a matrix of scores.


class LogSoftmaxMLP(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mlp = mlp()

    def forward(self, X: Tensor) -> Tensor:
        return self.mlp(X).log_softmax(1)


class Sequence(nn.Module):
    """Scores ``[B, C, T]`` for every position of a sequence of tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(6, 4)
        self.head = nn.Linear(4, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.embed(tokens).tanh()).transpose(1, 2)


def log_loss(name: str) -> tuple[Any, Tensor]:
    return {
        "nll": lambda: (nn.NLLLoss(), classes()),
        "nll-weights": lambda: (nn.NLLLoss(CLASS_WEIGHTS.clone()), some_ignored()),
        "kl-batchmean": lambda: (nn.KLDivLoss(reduction="batchmean"), torch.rand(N, 3).softmax(1)),
        "kl-mean": lambda: (nn.KLDivLoss(reduction="mean"), torch.rand(N, 3).softmax(1)),
    }[name]()


@seeded
def log_problem(name: str) -> Problem:
    loss_function, y = log_loss(name)
    return Problem(LogSoftmaxMLP(), loss_function, cut(torch.randn(N, 4), y, (6, 3)))


@seeded
def sequences(batching: str = "unequal") -> Problem:
    y = torch.randint(0, 3, (N, 5))
    y[torch.rand(N, 5) < 0.4] = -100
    y[6:] = -100
    return Problem(
        Sequence(), nn.CrossEntropyLoss(CLASS_WEIGHTS.clone()), cut(torch.randint(0, 6, (N, 5)), y, BATCHINGS[batching])
    )


# Inputs.


class FromTree(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mlp = mlp()

    def forward(self, X: Any) -> Tensor:
        if isinstance(X, Pair):
            return self.mlp(X.left + X.right)
        if isinstance(X, list):
            return self.mlp(X[0]["a"] * X[1][0])
        return self.mlp(X["a"] - X["b"])


def inputs(kind: str) -> Any:
    a, b = torch.randn(N, 4), torch.randn(N, 4)
    return {
        "dict": {"a": a, "b": b},
        "userdict": UserDict(a=a, b=b),
        "namedtuple": Pair(a, b),
        "nested": [{"a": a}, (b,)],
    }[kind]


@seeded
def input_problem(kind: str) -> Problem:
    return Problem(FromTree(), nn.MSELoss(), cut(inputs(kind), torch.randn(N, 3), (6, 3)))


def record_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Record products from the second block on, also if the number of columns is given."""
    init = Engine.__init__

    def records(self: Engine, *arguments: Any, **options: Any) -> None:
        init(self, *arguments, **options)
        self._records = True

    monkeypatch.setattr(Engine, "__init__", records)
    monkeypatch.setattr(recorded, "_SECONDS_PER_NODE", 0.0)
    monkeypatch.setattr(recorded, "_PRODUCTS", 1e-9)
    monkeypatch.setattr(recorded, "_PATIENCE", math.inf)  # nothing is recorded for single vectors
