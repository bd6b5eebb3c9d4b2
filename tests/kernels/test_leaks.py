"""No leaks: memory is flat over thousands of products, and objects without a reference are freed at once."""

from __future__ import annotations

import gc
import sys
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from curvop import (
    EFLinearOperator,
    EKFACLinearOperator,
    FisherLinearOperator,
    GGNLinearOperator,
    GradientCovarianceLinearOperator,
    HessianLinearOperator,
    JacobianLinearOperator,
    JournaledLinearOperator,
    KFACLinearOperator,
    NonFiniteProductError,
    TransposedJacobianLinearOperator,
    check,
    compare,
    solve,
)
from curvop.spectrum import density, eigsh

JACOBIANS = {"jacobian": JacobianLinearOperator, "transposed": TransposedJacobianLinearOperator}
SYMMETRIC = {
    "hessian": HessianLinearOperator,
    "ggn": GGNLinearOperator,
    "ef": EFLinearOperator,
    "fisher": FisherLinearOperator,
    "covariance": GradientCovarianceLinearOperator,
}
OPERATORS = JACOBIANS | SYMMETRIC
APPROXIMATIONS = {"kfac": KFACLinearOperator, "ekfac": EKFACLinearOperator}


class Batches(list):
    """A list that weak references can point to."""


class Spoilt(nn.Module):
    """Returns NaN if ``spoils`` is set, so that products fail."""

    spoils = False

    def forward(self, X):
        return X * torch.nan if self.spoils else X


def made(kind: str, width: int = 5, **options: Any) -> tuple[Any, nn.Module, Batches]:
    """Return a fresh operator, with its model and its data."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, width), nn.Tanh(), nn.Linear(width, 3), Spoilt()).double()
    data = Batches((torch.randn(size, 4, dtype=torch.float64), torch.randint(0, 3, (size,))) for size in (4, 2))
    params = dict(model.named_parameters())
    if kind in JACOBIANS:
        return JACOBIANS[kind](model, params, data, **options), model, data
    return (SYMMETRIC | APPROXIMATIONS)[kind](model, nn.CrossEntropyLoss(), params, data, **options), model, data


def products(A: Any) -> None:
    """Compute products of every kind with the operator and its adjoint."""
    M, N = A.shape
    A @ np.ones(N)
    A @ np.ones((N, 3))
    A @ torch.ones(N, 2, dtype=torch.float64)
    A.H @ np.ones(M)
    A.T @ np.ones((M, 3))
    A.H @ torch.ones(M, dtype=torch.float64)


def resident() -> float:
    """Return the resident memory of this process in megabytes."""
    gc.collect()
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmRSS")) / 1e6


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the memory of this process is not known")
class TestMemoryIsFlat:
    """A vector here takes 64 kilobytes, twice the allowed rise of memory for each product.

    Objects that are created once raise the memory now and then; a leak raises it in each part of the run.
    """

    COUNT, WIDTH, PARTS = 240, 1000, 8

    @pytest.mark.slow
    @pytest.mark.parametrize("cache", [0, "auto"])
    @pytest.mark.parametrize("kind", ["hessian", "ef", "jacobian"])
    def test_over_hundreds_of_products(self, kind, cache):
        self.see(kind, 2 * self.COUNT, cache=cache)

    @pytest.mark.nightly
    @pytest.mark.parametrize("cache", [0, "auto"])
    @pytest.mark.parametrize("kind", OPERATORS)
    def test_over_thousands_of_products(self, kind, cache):
        self.see(kind, 5000, cache=cache)  # some 20 s each

    @pytest.mark.slow
    def test_over_hundreds_of_operators_blocks_and_submatrices(self):
        A, *_ = made("hessian", self.WIDTH)

        def use() -> None:
            fresh, *_ = made("ggn", self.WIDTH)
            for part in (fresh, A.block("0.weight"), A.submatrix([0, 3], [5, 2]), A.damped(0.5)):
                part @ np.ones(part.shape[1])

        self.flat(use, self.COUNT // 2)

    @pytest.mark.slow
    def test_over_hundreds_of_points(self):
        A, model, _ = made("hessian", self.WIDTH)

        def use() -> None:
            with torch.no_grad():
                model[0].weight.mul_(0.999)
            A @ np.ones(A.shape[1])

        self.flat(use, self.COUNT)

    @pytest.mark.slow
    def test_over_hundreds_of_products_that_fail(self):
        A, model, _ = made("hessian", self.WIDTH)

        def use() -> None:
            model[3].spoils = not model[3].spoils
            try:
                A @ np.ones(A.shape[1])
            except NonFiniteProductError:
                assert model[3].spoils

        self.flat(use, self.COUNT)

    @pytest.mark.slow
    @pytest.mark.parametrize("kind", APPROXIMATIONS)
    def test_over_hundreds_of_updates(self, kind):
        A, _, data = made(kind, 100)
        self.flat(lambda: A.update(data[0], 0.9), self.COUNT)

    def see(self, kind: str, count: int, **options: Any) -> None:
        A, *_ = made(kind, self.WIDTH, **options)
        x, y = np.ones(A.shape[1]), torch.ones(A.shape[0], dtype=torch.float64)

        def use() -> None:
            A @ x
            A.H @ y

        self.flat(use, count // 2)

    def flat(self, use: Callable[[], None], count: int) -> None:
        """Assert that memory and the number of Python's blocks do not grow in every part of the calls of `use`."""
        for _ in range(30):
            use()
        part = count // self.PARTS
        rises, blocks = [], []
        for _ in range(self.PARTS):
            before, then = resident(), sys.getallocatedblocks()
            for _ in range(part):
                use()
            rises.append(resident() - before)
            blocks.append(sys.getallocatedblocks() - then)
        assert min(rises) < 0.03 * part, rises
        assert min(blocks) < part, blocks


USES: dict[str, Callable[[Any, Path], Any]] = {
    "nothing": lambda A, path: None,
    "products": lambda A, path: products(A),
    "the operator's adjoint": lambda A, path: (products(A.H), A.H),
    "a block": lambda A, path: (block := A.block(["2.bias", "0.weight"]), products(block)),
    "a submatrix": lambda A, path: (part := A.submatrix([0, 3, 3], [5, 2]), products(part)),
    "a submatrix's adjoint": lambda A, path: (part := A[:, 2:4].T, products(part)),
    "a submatrix of a block": lambda A, path: (part := A.block("2.bias")[1:, :], products(part)),
    "a gram matrix": lambda A, path: (gram := A @ A.T, gram @ np.ones(gram.shape[1])),
    "a check": lambda A, path: check(A, rng=0),
    "what it costs": lambda A, path: (A.cost(1), A.state(), A.fingerprint()),
    "a journal": lambda A, path: journaled(A, path),
}
SYMMETRIC_USES: dict[str, Callable[[Any, Path], Any]] = {
    "an off-diagonal block": lambda A, path: (block := A.block("2.bias", "0.weight"), products(block)),
    "a damped matrix": lambda A, path: (damped := A.damped(0.1), products(damped), damped.block("0.bias")),
    "a damped submatrix": lambda A, path: (part := A.damped(0.1)[:2, :], products(part)),
    "a damped matrix's journal": lambda A, path: journaled(A.damped(0.1), path),
    "a gradient": lambda A, path: A.gradient_and_loss(),
    "a solution": lambda A, path: solve(A, np.ones(A.shape[0]), damping=5.0, progress=False),
    "eigenvalues": lambda A, path: eigsh(A, 2, progress=False),
    "a density": lambda A, path: density(A, num_probes=2, num_steps=3, checkpoint=path / "steps", progress=False),
    "a product that fails": lambda A, path: failing(A),
}


APPROXIMATION_USES: dict[str, Callable[[Any, Path], Any]] = {
    "nothing": lambda A, path: None,
    "products": lambda A, path: products(A),
    "a block": lambda A, path: (block := A.block(["2.bias", "0.weight"]), products(block)),
    "closed forms": lambda A, path: (A.inverse(0.1), A.sqrt(), A.eigenvalues(), A.logdet(0.1), A.factors),
    "the exact matrix": lambda A, path: (exact := A.exact, products(exact)),
    "an update": lambda A, path: A.update((torch.ones(2, 4).double(), torch.tensor([0, 1])), 0.5),
    "a comparison": lambda A, path: compare(A, A.exact, num_probes=2, progress=False),
    "a check": lambda A, path: check(A, rng=0),
}


def journaled(A: Any, path: Path) -> JournaledLinearOperator:
    J = JournaledLinearOperator(A, path / "journal")
    products(J)
    return J


def failing(A: Any) -> None:
    with pytest.raises(NonFiniteProductError):
        A @ np.full(A.shape[1], np.inf)


@pytest.fixture
def no_collector():
    gc.disable()
    yield
    gc.enable()


@pytest.mark.usefixtures("no_collector")
class TestNoCycleKeepsAnythingAlive:
    """The garbage collector is off, so objects in reference cycles would stay alive."""

    @pytest.fixture(autouse=True, scope="class")
    @staticmethod
    def forward_mode_is_imported() -> None:
        """Use forward mode once: torch then compiles some derivatives and holds on to the frames of the caller."""
        check(made("hessian")[0], rng=0)

    @staticmethod
    def left(kind: str, use: Callable[[Any, Path], Any], path: Path, **options: Any) -> list[str]:
        """Return the names of the objects that outlive an operator after its use."""
        A, model, data = made(kind, **options)
        watched = {"operator": A, "model": model, "data": data, "parameter": model[0].weight, "batch": data[0][0]}
        alive = {name: weakref.ref(thing) for name, thing in watched.items()}
        del watched
        found = use(A, path)
        del A, model, data, found
        return [name for name, reference in alive.items() if reference() is not None]

    @pytest.mark.parametrize("use", USES)
    @pytest.mark.parametrize("kind", OPERATORS)
    def test_of_any_operator(self, kind, use, tmp_path):
        assert self.left(kind, USES[use], tmp_path) == []

    @pytest.mark.parametrize("kind", OPERATORS)
    def test_where_nothing_is_kept_between_products(self, kind, tmp_path):
        assert self.left(kind, USES["products"], tmp_path, cache=0) == []

    @pytest.mark.parametrize("use", SYMMETRIC_USES)
    @pytest.mark.parametrize("kind", SYMMETRIC)
    def test_of_a_symmetric_operator(self, kind, use, tmp_path):
        assert self.left(kind, SYMMETRIC_USES[use], tmp_path) == []

    @pytest.mark.parametrize("use", APPROXIMATION_USES)
    @pytest.mark.parametrize("kind", APPROXIMATIONS)
    def test_of_an_approximation(self, kind, use, tmp_path):
        assert self.left(kind, APPROXIMATION_USES[use], tmp_path) == []

    @pytest.mark.parametrize("kind", APPROXIMATIONS)
    def test_factors_do_not_keep_the_graphs_of_batches(self, kind):
        batches = made(kind)[2]
        inputs = []

        class Watched(nn.Linear):
            def forward(self, X):
                X = X * 1.0
                inputs.append(weakref.ref(X))
                return super().forward(X)

        model = nn.Sequential(Watched(4, 3)).double()
        A = APPROXIMATIONS[kind](model, nn.CrossEntropyLoss(), dict(model.named_parameters()), batches)
        assert len(inputs) >= len(batches)
        assert [reference() for reference in inputs] == [None] * len(inputs)
        A @ np.ones(A.shape[1])

    def test_it_is_seen_where_one_does(self, tmp_path):
        def tie(A: Any, path: Path) -> None:
            A.itself = A

        assert self.left("hessian", tie, tmp_path) == ["operator", "model", "data", "parameter", "batch"]
        gc.collect()

    def test_what_is_kept_outlives_neither_the_point_nor_the_operator(self):
        A, model, data = made("hessian")
        block = A.block("0.weight")
        products(block)
        alive = weakref.ref(A)
        del A
        assert alive() is None
        products(block)  # the block only needs the model and the data
        models = weakref.ref(model), weakref.ref(data)
        del model, data
        assert None not in [reference() for reference in models]
        del block
        assert [reference() for reference in models] == [None, None]
