"""KFAC and EKFAC against the exact matrices of this package."""

from __future__ import annotations

import copy
import pickle
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from cases import seeded
from torch import Tensor, nn
from torch.nn import functional as F

from curvop import (
    EFLinearOperator,
    EKFACLinearOperator,
    FisherLinearOperator,
    GGNLinearOperator,
    KFACLinearOperator,
    KFOCLinearOperator,
    NonDeterministicObjectiveError,
    TargetLoss,
    compare,
)
from curvop.kernels.errors import NotFactorableError
from curvop.kernels.kronecker_factors import FlatLayout
from curvop.testing.functorch_reference import functorch_ggn

N = 6
MATRICES: dict[str, Callable[..., Any]] = {"type-2": GGNLinearOperator, "empirical": EFLinearOperator}


def close(actual: Any, expected: Any) -> None:
    np.testing.assert_allclose(actual, expected, rtol=1e-10, atol=1e-12)


def cut(X: Tensor, y: Tensor, *sizes: int) -> list[Any]:
    return list(zip(X.split(sizes), y.split(sizes), strict=True))


def exact_blocks(A: KFACLinearOperator, kind: str, *problem: Any, **options: Any) -> np.ndarray:
    """Return the exact matrix of this package without the entries between different blocks of A."""
    dense = MATRICES[kind](*problem, **options).to_dense()
    mask = np.zeros_like(dense)
    for block in A._blocks:
        ones = block.layout.scatter(torch.ones(1, *block.layout.dims, dtype=torch.float64))
        parts = {name: ones[name][0] if name in ones else torch.zeros_like(p) for name, p in A._params.items()}
        own = A.ravel(parts)
        is_diagonal = isinstance(block.layout, FlatLayout) and block.left.ndim == 2
        mask += np.diag(own) if is_diagonal else np.outer(own, own)
    return dense * mask


class Twice(nn.Module):
    """A layer that is applied to two inputs."""

    def __init__(self, bias: bool) -> None:
        super().__init__()
        self.layer, self.last = nn.Linear(3, 3, bias=bias), nn.Linear(3, 2, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        first, second = x.unbind(1)
        return torch.stack([self.last(self.layer(first)), self.last(self.layer(second))], 1)


class Mean(nn.Module):
    """Average over the positions of each data item."""

    def forward(self, x: Tensor) -> Tensor:
        return x.mean(1)


class Attention(nn.Module):
    """A small transformer with tied embeddings, which predicts the next token at every position."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.places = nn.Embedding(5, 4), nn.Embedding(3, 4)
        self.layer = nn.TransformerEncoderLayer(4, 2, 6, 0.0, batch_first=True)
        self.head = nn.Linear(4, 5, bias=False)
        self.head.weight = self.tokens.weight

    def forward(self, x: Tensor) -> Tensor:
        places = torch.arange(x.shape[1])  # the items share the output of this embedding
        mask = nn.Transformer.generate_square_subsequent_mask(x.shape[1], dtype=torch.float64)
        return self.head(self.layer(self.tokens(x) + self.places(places), mask)).transpose(1, 2)


@seeded
def mlp() -> tuple[Any, ...]:
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
    return model, nn.CrossEntropyLoss(), torch.randn(N, 4), torch.randint(0, 3, (N,))


@seeded
def convolutions() -> tuple[Any, ...]:
    model = nn.Sequential(
        *(nn.Conv2d(2, 4, 3, stride=2, padding=1), nn.ReLU(inplace=True)),
        *(nn.Conv2d(4, 4, 2, groups=2), nn.Flatten(), nn.Linear(16, 3)),
    )
    return model, nn.CrossEntropyLoss(), torch.randn(N, 2, 6, 6), torch.randint(0, 3, (N,))


@seeded
def tokens() -> tuple[Any, ...]:
    return Attention(), nn.CrossEntropyLoss(), torch.randint(0, 5, (N, 3)), torch.randint(0, 5, (N, 3))


@seeded
def rows_of_tokens() -> tuple[Any, ...]:
    """The model does not mix positions, and returns the tokens of all items one after the other."""
    model = nn.Sequential(nn.Embedding(5, 4), nn.Tanh(), nn.Linear(4, 3), nn.Flatten(0, 1))
    return model, nn.CrossEntropyLoss(), torch.randint(0, 5, (N, 3)), torch.randint(0, 3, (N, 3))


@seeded
def twice() -> tuple[Any, ...]:
    model = nn.Sequential(Twice(True), nn.Tanh(), nn.Flatten(), nn.Linear(4, 2))
    return model, nn.MSELoss(), torch.randn(N, 2, 3), torch.randn(N, 2)


PROBLEMS = {problem.__name__: problem for problem in (mlp, convolutions, tokens, rows_of_tokens, twice)}


def problem_of(name: str, *sizes: int) -> tuple[Any, ...]:
    model, loss, X, y = PROBLEMS[name]()
    data = cut(X, y, *sizes)
    if name == "rows_of_tokens":
        data = [(x, y.flatten()) for x, y in data]
    return model, loss, dict(model.named_parameters()), data


class TestExactness:
    @pytest.mark.parametrize("kind", MATRICES)
    @pytest.mark.parametrize("joint", [True, False])
    def test_one_example_of_a_nonlinear_network(self, kind: str, joint: bool) -> None:
        model, loss, params, data = problem_of("mlp", 1, N - 1)
        A = KFACLinearOperator(model, loss, params, data[:1], fisher=kind, joint_bias=joint)
        close(A.to_dense(), exact_blocks(A, kind, model, loss, params, data[:1]))

    @pytest.mark.parametrize("sharing", ["expand", "reduce"])
    @pytest.mark.parametrize("sizes", [(N,), (4, 2), (1,) * N])
    def test_deep_linear_network(self, sharing: str, sizes: tuple[int, ...]) -> None:
        """The loss has a term for each position, or a term for the mean over three positions."""
        model = nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 5, bias=False), nn.Linear(5, 3)).double()
        if sharing == "reduce":
            model.append(Mean())
        X = torch.randn(N, 3, 4).double()
        y = torch.randn(model(X).shape).double()
        problem = model, nn.MSELoss(), dict(model.named_parameters()), cut(X, y, *sizes)
        A = KFACLinearOperator(*problem, sharing=sharing)
        close(A.to_dense(), exact_blocks(A, "type-2", *problem))

    def test_expand_is_exact_if_each_position_has_its_own_term(self) -> None:
        class Pixels(nn.Sequential):
            def forward(self, x: Tensor) -> Tensor:
                return super().forward(x).movedim(1, -1)  # the last axis of a prediction is an example of MSELoss

        model = Pixels(nn.Conv2d(2, 3, 3, padding=1, stride=2), nn.Conv2d(3, 2, 1)).double()
        X, y = torch.randn(N, 2, 5, 5).double(), torch.randn(N, 3, 3, 2).double()
        problem = model, nn.MSELoss(), dict(model.named_parameters()), cut(X, y, 4, 2)
        A = KFACLinearOperator(*problem)
        close(A.to_dense(), exact_blocks(A, "type-2", *problem))

    def test_reduce_is_exact_if_outputs_are_averaged(self) -> None:
        model = nn.Sequential(
            nn.Conv2d(2, 3, 3, padding=1), nn.Conv2d(3, 4, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten()
        ).double()
        X, y = torch.randn(N, 2, 4, 4).double(), torch.randn(N, 4).double()
        problem = model, nn.MSELoss(), dict(model.named_parameters()), cut(X, y, 4, 2)
        A = KFACLinearOperator(*problem, sharing="reduce")
        close(A.to_dense(), exact_blocks(A, "type-2", *problem))
        assert np.abs(KFACLinearOperator(*problem).to_dense() - A.to_dense()).max() > 1e-3

    @pytest.mark.parametrize("bias", [True, False])
    @pytest.mark.parametrize("count", [1, N])
    def test_a_layer_that_is_used_twice(self, bias: bool, count: int) -> None:
        model = Twice(bias).double()
        X, y = torch.randn(count, 2, 3).double(), torch.randn(count, 2, 2).double()
        problem = model, nn.MSELoss(), dict(model.named_parameters()), [(X, y)]
        A = KFACLinearOperator(*problem)
        close(A.to_dense(), exact_blocks(A, "type-2", *problem))

    def test_a_model_that_is_a_function(self) -> None:
        torch.manual_seed(0)
        params = {"w": torch.randn(3, 4).double(), "v": torch.randn(2, 4).double()}
        X, y = torch.randn(1, 3).double(), torch.randn(1, 2).double()
        problem = lambda p, x: F.linear((x @ p["w"]).tanh(), p["v"]), nn.MSELoss(), params, [(X, y)]
        A = KFACLinearOperator(*problem)
        close(A.to_dense(), exact_blocks(A, "type-2", *problem))


class TestEKFAC:
    @pytest.mark.parametrize("kind", MATRICES)
    @pytest.mark.parametrize("sharing", ["expand", "reduce"])
    @pytest.mark.parametrize("name", PROBLEMS)
    def test_is_the_best_matrix_in_its_basis(self, name: str, sharing: str, kind: str) -> None:
        problem = problem_of(name, 4, 2)
        K, E = (C(*problem, fisher=kind, sharing=sharing) for C in (KFACLinearOperator, EKFACLinearOperator))
        exact = exact_blocks(E, kind, *problem)
        close(E.trace(), np.trace(exact))
        error = np.linalg.norm(exact - E.to_dense())
        close(error**2, np.linalg.norm(exact) ** 2 - E.frobenius_norm() ** 2)
        assert error <= np.linalg.norm(exact - K.to_dense()) * (1 + 1e-12)
        whole = MATRICES[kind](*problem).to_dense() + 1e-3 * np.eye(E.shape[0])
        assert E.logdet(1e-3) >= np.linalg.slogdet(whole)[1] - 1e-9  # inequalities of Hadamard and Fischer

    def test_uses_the_same_samples_in_both_passes(self) -> None:
        problem = problem_of("mlp", 4, 2)
        rng = int(np.random.default_rng(3).integers(2**63))
        E = EKFACLinearOperator(*problem, fisher="mc", mc_samples=2, rng=3)
        sampled = FisherLinearOperator(*problem, mc_samples=2, rng=3)
        assert sampled._kernel.keywords["seed"] == rng
        close(E.trace(), sampled.diagonal().sum())

    def test_other_data_in_the_second_pass_raise_an_error(self) -> None:
        model, loss, params, data = problem_of("mlp", 4, 2)
        scales = iter([1.0, 2.0])

        class Changing:
            def __iter__(self) -> Iterator[Any]:
                scale = next(scales)
                return iter([(scale * X, y) for X, y in data])

        with pytest.raises(NonDeterministicObjectiveError):
            EKFACLinearOperator(model, loss, params, Changing())

    def test_one_example_is_exact(self) -> None:
        problem = problem_of("mlp", 1, N - 1)
        problem = (*problem[:3], problem[3][:1])
        E = EKFACLinearOperator(*problem)
        close(E.to_dense(), exact_blocks(E, "type-2", *problem))

    def test_large_factors(self) -> None:
        problem = problem_of("tokens", 4, 2)
        E = EKFACLinearOperator(*problem, max_factor=4)
        assert E.factors["tokens.weight"].output_basis is None or E.factors["tokens.weight"].input_basis is None
        close(E.trace(), np.trace(GGNLinearOperator(*problem).to_dense()))

    def test_coupled_items_raise_an_error(self) -> None:
        model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Linear(3, 2)).double()
        X, y = torch.randn(N, 4).double(), torch.randn(N, 2).double()
        params = {n: p for n, p in model.named_parameters() if not n.startswith("1")}
        with pytest.raises(ValueError, match=r"call model.eval\(\)"):
            EKFACLinearOperator(model, nn.MSELoss(), params, [(X, y)])
        assert model[1].num_batches_tracked == 0
        KFACLinearOperator(model, nn.MSELoss(), params, [(X, y)])


class TestKFOC:
    """Every block is the nearest Kronecker product, from the singular value decomposition of the rearranged block."""

    @pytest.fixture(autouse=True)
    def tight(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(KFOCLinearOperator, "_nearest", 1e-13)

    def assert_nearest(self, A: KFOCLinearOperator, exact: np.ndarray) -> None:
        for block in A._blocks:
            if isinstance(block.layout, FlatLayout):
                continue
            groups, m, n = block.layout.dims
            units = {name: torch.eye(exact.shape[0]).double()[:, place].reshape(-1, *A._params[name].shape)
                     for name, place in A.params_slices.items()}  # fmt: skip
            columns = block.layout.gather(units).numpy()  # (N, groups, m, n): places of the entries of V
            for group in range(groups):
                own = columns[:, group].reshape(-1, m * n)
                rearranged = (own.T @ exact @ own).reshape(m, n, m, n).transpose(0, 2, 1, 3).reshape(m * m, n * n)
                if block.left.ndim == 2:
                    rearranged = rearranged * np.eye(m).reshape(-1, 1)
                if block.right.ndim == 2:
                    rearranged = rearranged * np.eye(n).reshape(1, -1)
                U, s, V = np.linalg.svd(rearranged, full_matrices=False)
                left, right = (f[group] if f.ndim == 3 else torch.diag(f[group]) for f in (block.left, block.right))
                close(np.outer(left.reshape(-1), right.reshape(-1)), s[0] * np.outer(U[:, 0], V[0]))
                close(left.norm(), right.norm())

    @pytest.mark.slow_cases("*-tokens")  # more steps; the other cases show the same mechanisms
    @pytest.mark.parametrize("name", PROBLEMS)
    @pytest.mark.parametrize(("kind", "sharing"), [("type-2", "expand"), ("empirical", "reduce")])
    def test_is_the_nearest_product(self, name: str, kind: str, sharing: str) -> None:
        problem = problem_of(name, 4, 2)
        options = {"fisher": kind, "sharing": sharing}
        K, nearest = KFACLinearOperator(*problem, **options), KFOCLinearOperator(*problem, **options)
        exact = MATRICES[kind](*problem).to_dense()
        self.assert_nearest(nearest, exact)
        blocks = exact_blocks(nearest, kind, *problem)
        assert np.linalg.norm(blocks - nearest.to_dense()) < np.linalg.norm(blocks - K.to_dense())

    def test_batches_sums_and_updates(self) -> None:
        model, loss, params, data = problem_of("mlp", 4, 2)
        whole = KFOCLinearOperator(model, loss, params, problem_of("mlp", N)[3])
        A = KFOCLinearOperator(model, loss, params, data)
        close(A.to_dense(), whole.to_dense())
        total = KFOCLinearOperator(model, nn.CrossEntropyLoss(reduction="sum"), params, data)
        close(total.to_dense(), N * A.to_dense())
        A.update(data[1], decay=0.0)
        close(A.to_dense(), KFOCLinearOperator(model, loss, params, data[1:]).to_dense())
        close(A.inverse(0.1) @ (A @ np.ones(A.shape[0]) + 0.1), np.ones(A.shape[0]))

    @pytest.mark.parametrize("max_factor", [2, 4])
    @pytest.mark.parametrize("name", ["convolutions", "rows_of_tokens"])
    def test_diagonal_factors(self, name: str, max_factor: int) -> None:
        problem = problem_of(name, 4, 2)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self.assert_nearest(
                KFOCLinearOperator(*problem, max_factor=max_factor), GGNLinearOperator(*problem).to_dense()
            )

    def test_one_example_takes_one_step(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """KFAC is exact, so that the first step shows that nothing changes."""
        monkeypatch.setattr("curvop.kernels.factor_sums._MAX_STEPS", 1)
        problem = problem_of("mlp", 1, N - 1)
        problem = (*problem[:3], problem[3][:1])
        close(KFOCLinearOperator(*problem).to_dense(), exact_blocks(KFACLinearOperator(*problem), "type-2", *problem))

    def test_errors(self) -> None:
        problem = problem_of("mlp", 4, 2)
        with pytest.raises(ValueError, match="computes no gradients"):
            KFOCLinearOperator(*problem, fisher="forward-only")
        model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Linear(3, 3)).double()
        params = {n: p for n, p in model.named_parameters() if not n.startswith("1")}
        with pytest.raises(ValueError, match=r"call model.eval\(\)"):
            KFOCLinearOperator(model, problem[1], params, problem[3][:1])


@pytest.mark.parametrize("cls", [KFACLinearOperator, EKFACLinearOperator])
class TestData:
    @pytest.mark.parametrize("name", PROBLEMS)
    def test_the_matrix_does_not_depend_on_the_batches(self, cls: Any, name: str) -> None:
        first = cls(*problem_of(name, N)).to_dense()
        for sizes in ((4, 2), (1,) * N):
            close(cls(*problem_of(name, *sizes)).to_dense(), first)

    def test_a_sum_is_the_mean_times_the_number_of_terms(self, cls: Any) -> None:
        model, _, params, data = problem_of("mlp", 4, 2)
        mean, total = (cls(model, nn.CrossEntropyLoss(reduction=r), params, data).to_dense() for r in ("mean", "sum"))
        close(total, N * mean)

    def test_batches_without_targets_have_no_effect(self, cls: Any) -> None:
        model, loss, params, data = problem_of("mlp", 4, 2)
        nothing = torch.randn(3, 4).double(), torch.full((3,), -100)
        close(cls(model, loss, params, [*data, nothing]).to_dense(), cls(model, loss, params, data).to_dense())

    @pytest.mark.parametrize("of_functions", [False, True], ids=["model", "functions"])
    def test_weights_of_batches(self, cls: Any, of_functions: bool) -> None:
        model, loss, params, data = problem_of("mlp", 4, 2)
        weights = {4: 3.0, 2: 5.0}
        parts = [(cls(model, loss, params, [batch]), functorch_ggn(model, loss, params, [batch])) for batch in data]
        build, functions = cls, (model, loss)
        if of_functions:
            build = cls.from_functions
            functions = (
                lambda params, batch: torch.func.functional_call(model, params, (batch[0],)),
                TargetLoss(loss, lambda batch: batch[1]),
            )
        A = build(*functions, params, data, batch_weight=lambda batch: weights[len(batch[1])])
        (first, exact), (second, other) = parts
        for name in ("0.weight", "2.weight"):
            B, C = (part.factors[name].output for part in (first, second))
            close(A.factors[name].output, (3 * B + 5 * C) / 8)
        if cls is EKFACLinearOperator:
            close(A.trace(), (3 * exact.trace() + 5 * other.trace()) / 8)

    def test_from_functions(self, cls: Any) -> None:
        model, loss, params, data = problem_of("mlp", 4, 2)

        def predict(params: dict[str, Tensor], batch: Any) -> Any:
            return torch.func.functional_call(model, params, (batch["x"],))

        batches = [{"x": x, "y": y} for x, y in data]
        A = cls.from_functions(predict, TargetLoss(loss, lambda batch: batch["y"]), params, batches)
        close(A.to_dense(), cls(model, loss, params, data).to_dense())

    def test_update(self, cls: Any) -> None:
        model, loss, params, data = problem_of("mlp", 4, 2)
        A, first, second = cls(model, loss, params, data[:1]), *(cls(model, loss, params, [b]) for b in data)
        A.update(data[1], decay=0.75)
        mixed = 0.75 * first.factors["0.weight"].input + 0.25 * second.factors["0.weight"].input
        close(A.factors["0.weight"].input, mixed)
        A.update(data[1], decay=0.0)
        close(A.to_dense(), second.to_dense())
        with pytest.raises(ValueError, match="decay"):
            A.update(data[1], decay=2.0)

    def test_each_update_draws_other_targets(self, cls: Any) -> None:
        model, loss, params, data = problem_of("mlp", 4, 2)
        histories = []
        for _ in range(2):
            A = cls(model, loss, params, data[:1], fisher="mc", mc_samples=20, rng=0)
            factors = [A.factors["2.weight"].output.clone()]
            for _ in range(3):
                A.update(data[0], decay=0.0)
                factors.append(A.factors["2.weight"].output.clone())
            histories.append(torch.stack(factors))
        assert torch.equal(*histories)  # the seed determines all targets
        distances = torch.cdist(*(history.flatten(1) for history in histories))
        assert bool((distances + torch.eye(4) > 1e-3).all())

    @pytest.mark.filterwarnings("ignore:.*autocast:RuntimeWarning")
    def test_autocast_applies_to_the_model_only(self, cls: Any) -> None:
        model, loss, _, data = problem_of("mlp", 1, N - 1)
        model, data = model.float(), [(data[0][0].float(), data[0][1])]
        problem = model, loss, dict(model.named_parameters()), data
        with torch.autocast("cpu"):
            A = cls(*problem)
            exact = exact_blocks(A, "type-2", *problem)
        assert A.factors["0.weight"].input.dtype == torch.float32
        # The rounding errors are those of bfloat16 activations.
        assert np.abs(A.to_dense() - exact).max() < 0.03 * np.abs(exact).max()

    def test_pickle_and_copies(self, cls: Any) -> None:
        A = cls(*problem_of("mlp", 4, 2))
        for other in (pickle.loads(pickle.dumps(A)), copy.deepcopy(A)):
            close(other.to_dense(), A.to_dense())


class Others(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer, self.norm, self.last = nn.Linear(4, 5), nn.LayerNorm(5), nn.Linear(5, 3)
        self.scale, self.unused = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(2))

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.norm(self.layer(x)).tanh()) * self.scale


@pytest.mark.parametrize("cls", [KFACLinearOperator, EKFACLinearOperator])
class TestOtherParameters:
    def problem(self) -> tuple[Any, ...]:
        _, loss, X, y = mlp()
        model = seeded(Others)()
        return model, loss, dict(model.named_parameters()), cut(X, y, 4, 2)

    def test_exact_blocks_and_diagonals(self, cls: Any) -> None:
        problem = self.problem()
        G = GGNLinearOperator(*problem)
        with pytest.warns(RuntimeWarning, match="exact blocks: 'scale'"):
            A = cls(*problem)
        close(A.block("scale").to_dense(), G.block("scale").to_dense())
        for name in ("norm.weight", "norm.bias"):
            close(A.block(name).to_dense(), np.diag(G.block(name).diagonal()))
        assert not A.block("unused").to_dense().any()
        with pytest.warns(RuntimeWarning, match="exact diagonals: 'scale'"):
            A = cls(*problem, others="diagonal")
        close(A.block("scale").to_dense(), np.diag(G.block("scale").diagonal()))
        with pytest.warns(RuntimeWarning, match="exact diagonals: 'scale'"):
            cls(*problem, max_factor=2)

    def test_an_update_does_not_warn_again(self, cls: Any) -> None:
        model, loss, params, data = self.problem()
        with pytest.warns(RuntimeWarning, match="scale"):
            A = cls(model, loss, params, data)
        A.update(data[0], decay=0.0)  # a warning is an error
        close(A.block("scale").to_dense(), functorch_ggn(model, loss, {"scale": params["scale"]}, data[:1]))

    @pytest.mark.filterwarnings("ignore:some parameters have no Kronecker factors")
    def test_diagonals_are_not_negative(self, cls: Any) -> None:
        """The Hessian of the logarithm of a saturated softmax is [[0, -a], [-a, a]] after rounding."""
        params = {"W": torch.tensor([[0.3, 60.0], [-0.2, 14.0]]).double(), "scale": torch.ones(2).double()}
        data = [(torch.eye(2).double(), torch.tensor([1.0, 0.0]).double())]

        def model(params: dict[str, Tensor], x: Tensor) -> Tensor:
            return F.linear(x, params["W"]) * (x * params["scale"]).sum(1, keepdim=True)

        def loss(z: Tensor, y: Tensor) -> Tensor:
            return (z.logsumexp(1) + y * z.square().sum(1)).mean()

        assert GGNLinearOperator(model, loss, params, data).block("scale").diagonal()[1] < 0
        assert cls(model, loss, params, data, others="diagonal").block("scale").diagonal()[1] == 0

    def test_errors(self, cls: Any) -> None:
        model, loss, params, data = self.problem()
        with pytest.raises(ValueError, match=r"no Kronecker factors, .*: 'scale', 'norm.weight', 'norm.bias'"):
            cls(model, loss, params, data, others="raise")
        with pytest.raises(ValueError, match="no parameter has Kronecker factors"):
            cls(model, loss, {"scale": params["scale"]}, data)
        for name in ("fisher", "sharing", "others"):
            with pytest.raises(ValueError, match=f"{name} is 'x', but must be one of"):
                cls(model, loss, params, data, **{name: "x"})
        with pytest.raises(ValueError, match="max_factor"):
            cls(model, loss, params, data, max_factor=0)

    def test_dropout(self, cls: Any) -> None:
        model, loss, _, data = problem_of("mlp", 4, 2)
        model = nn.Sequential(model, nn.Dropout())
        with pytest.raises(NonDeterministicObjectiveError, match="Dropout"):
            cls(model, loss, dict(model.named_parameters()), data)

    def test_indefinite_losses(self, cls: Any) -> None:
        model, _, params, data = problem_of("mlp", 4, 2)
        with pytest.raises(NotFactorableError, match=r"indefinite.*fisher='empirical'"):
            cls(model, lambda z, y: z.square().cos().sum(1).mean(), params, data)


def test_modes_are_left_as_found() -> None:
    model, loss, params, data = problem_of("mlp", 4, 2)
    depths = []

    class Failing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = model

        def forward(self, x: Tensor) -> Tensor:
            depths.append(torch._C._len_torch_function_stack())
            self.inner(x)
            raise ZeroDivisionError

    failing = Failing()
    depth = torch._C._len_torch_function_stack()
    with pytest.raises(ZeroDivisionError):
        KFACLinearOperator(failing, loss, dict(failing.named_parameters()), data)
    assert depths[0] > depth  # the model runs within a mode, which ends with it
    assert torch._C._len_torch_function_stack() == depth
    assert all(param.grad is None for param in params.values())


@pytest.mark.parametrize("cls", [KFACLinearOperator, EKFACLinearOperator])
def test_an_input_that_is_modified_after_its_use_raises_an_error(cls: Any) -> None:
    def model(params: dict[str, Tensor], x: Tensor) -> Tensor:
        x = x + 1
        z = F.linear(x, params["W"])
        x.zero_()
        return z

    params = {"W": torch.eye(3).double()}
    with pytest.raises(RuntimeError, match="in place"):
        cls(model, nn.MSELoss(), params, [(torch.ones(2, 3).double(), torch.ones(2, 3).double())])


def test_rows_that_are_used_in_two_layers() -> None:
    """Blocks of overlapping rows cannot be Kronecker products, so the parameter has an exact block."""
    torch.manual_seed(0)
    params = {"W": torch.randn(4, 3).double(), "V": torch.randn(2, 3).double()}

    def model(params: dict[str, Tensor], x: Tensor) -> Tensor:
        return F.linear(F.linear(F.linear(x, params["W"][:3]), params["W"][1:]).tanh(), params["V"])

    data = [(torch.randn(N, 3).double(), torch.randn(N, 2).double())]
    with pytest.warns(RuntimeWarning, match="'W'"):
        A = KFACLinearOperator(model, nn.MSELoss(), params, data)
    exact = functorch_ggn(model, nn.MSELoss(), params, data)
    close(A.block("W").to_dense(), exact[:12, :12])


class TestNormsOfCoupledTerms:
    """A data item has several terms of the loss, and attention couples its positions."""

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding, self.norm = nn.Embedding(7, 4), nn.LayerNorm(4)
            self.attention, self.head = nn.MultiheadAttention(4, 2, batch_first=True), nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            h = self.norm(self.embedding(x))
            return self.head(h + self.attention(h, h, h, need_weights=False)[0]).transpose(1, 2)

    @seeded
    def problem(self) -> tuple[Any, ...]:
        model = self.Model()
        nn.init.normal_(model.norm.weight)
        data = [(torch.randint(7, (n, 5)), torch.randint(3, (n, 5))) for n in (4, 2)]
        return model, nn.CrossEntropyLoss(), dict(model.named_parameters()), data

    @pytest.mark.parametrize("fisher", ["type-2", "empirical"])
    def test_the_diagonal_is_that_of_the_matrix(self, fisher: str) -> None:
        problem = self.problem()
        K, G = KFACLinearOperator(*problem, fisher=fisher), MATRICES[fisher](*problem)
        for name in ("norm.weight", "norm.bias"):
            close(K.block(name).to_dense(), np.diag(np.diag(G.block(name).to_dense())))

    @pytest.mark.parametrize("others", ["exact", "diagonal"])
    def test_two_batch_normalizations_in_training_mode(self, others: str) -> None:
        """The second normalization couples the items behind the first one. No other layer couples its own items."""
        model = seeded(
            lambda: nn.Sequential(
                *(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Tanh(), nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Tanh()),
                nn.Linear(3, 2),
            )
        )().double()
        X, y = torch.randn(N, 4).double(), torch.randint(2, (N,))
        problem = model, nn.CrossEntropyLoss(), dict(model.named_parameters()), [(X, y)]
        with pytest.warns(RuntimeWarning, match=r"the diagonals of '1.weight', .*estimates.*model.eval\(\)") as caught:
            K = KFACLinearOperator(*problem, others=others)
        assert [warning.filename for warning in caught] == [__file__]
        params = {name: param.detach().requires_grad_() for name, param in model.named_parameters()}
        inputs = []
        hook = model[1].register_forward_hook(lambda *found: inputs.append(found[-1]))
        with torch.no_grad():
            p = model(X).softmax(1)
        outputs = torch.func.functional_call(model, params, X)
        hook.remove()
        normalized = ((inputs[-1] - params["1.bias"]) / params["1.weight"]).detach()
        root = (p.prod(1, keepdim=True) / N).sqrt() * torch.tensor([1.0, -1.0])  # of the Hessian of the loss
        [g] = torch.autograd.grad(outputs, inputs[-1], root)
        expected = {"1.weight": (g * normalized).square().sum(0), "1.bias": g.square().sum(0)}
        G = GGNLinearOperator(*problem).to_dense()
        for name in ("4.weight", "4.bias"):  # nothing couples the items behind it
            expected[name] = G.diagonal()[K.params_slices[name]]
        for name, values in expected.items():
            close(K.block(name).to_dense(), np.diag(values))

    @pytest.mark.filterwarnings("ignore:some parameters have no Kronecker factors")
    def test_models_that_cannot_be_mapped(self) -> None:
        def model(params: dict[str, Tensor], X: Tensor) -> Tensor:
            scale = params["scale"] * (1.0 if X.sum().item() else 2.0)
            return F.linear(X * scale, params["W"])

        torch.manual_seed(0)
        params = {"W": torch.randn(2, 3).double(), "scale": torch.ones(3).double()}
        problem = model, nn.MSELoss(), params, [(torch.randn(N, 3).double(), torch.randn(N, 2).double())]
        message = r"diagonal of 'scale' is not available, because the model cannot .*: pass others='exact', leave"
        with pytest.raises(NotImplementedError, match=message):
            KFACLinearOperator(*problem, others="diagonal")
        with pytest.raises(NotImplementedError, match="its examples: leave these parameters out"):
            KFACLinearOperator(*problem, max_factor=2)

    def test_an_estimate_says_so(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("curvop.kernels.diagonal._MAX_OUTPUTS", 2)
        with pytest.warns(RuntimeWarning, match="the diagonals of 'norm.weight', 'norm.bias' are estimates"):
            KFACLinearOperator(*self.problem())


def test_one_input_of_uses_in_both_orientations() -> None:
    """A weight and its transpose are applied to the same input."""
    torch.manual_seed(0)
    W = torch.randn(4, 4, dtype=torch.float64)
    X, y = torch.randn(8, 4, dtype=torch.float64), torch.randn(8, 4, dtype=torch.float64)
    K = KFACLinearOperator(lambda p, X: F.linear(X, p["W"]) + 3 * (X @ p["W"]), nn.MSELoss(), {"W": W}, [(X, y)])
    A, B = X.T @ X / 8, 2 * torch.eye(4, dtype=torch.float64) / 4
    # The derivative of the loss with respect to each output has the same covariance, up to the factors 1 and 3.
    total = np.kron(B, A) + np.kron(A, 9 * B)
    U, s, V = np.linalg.svd(total.reshape(4, 4, 4, 4).transpose(0, 2, 1, 3).reshape(16, 16))
    nearest = s[0] * np.kron(U[:, 0].reshape(4, 4), V[0].reshape(4, 4))
    close(K.to_dense(), nearest)


def test_layers_that_share_an_input() -> None:
    """A linear layer, and a product of two matrices as in LoRA."""
    torch.manual_seed(0)
    params = {
        name: torch.randn(shape, dtype=torch.float64) for name, shape in dict(W=(3, 4), A=(4, 2), B=(2, 3)).items()
    }
    data = [(torch.randn(1, 4, dtype=torch.float64), torch.randn(1, 3, dtype=torch.float64))]
    problem = lambda p, X: F.linear(X, p["W"]) + X @ p["A"] @ p["B"], nn.MSELoss(), params, data
    K, G = KFACLinearOperator(*problem), GGNLinearOperator(*problem)
    for name in params:
        close(K.block(name).to_dense(), G.block(name).to_dense())


@pytest.mark.parametrize(
    "product",
    [
        lambda X, p: torch.mm(input=X, mat2=p["W"]) + p["b"],
        lambda X, p: X.mm(mat2=p["W"]) + p["b"],
        lambda X, p: torch.addmm(p["b"], X, mat2=p["W"]),
        lambda X, p: torch.addmm(input=p["b"], mat1=X, mat2=p["W"]),
    ],
    ids=["mm", "method", "addmm", "all named"],
)
def test_arguments_by_name(product: Any) -> None:
    torch.manual_seed(0)
    params = {"W": torch.randn(4, 3, dtype=torch.float64), "b": torch.randn(3, dtype=torch.float64)}
    data = [(torch.randn(1, 4, dtype=torch.float64), torch.randn(1, 3, dtype=torch.float64))]
    problem = lambda p, X: product(X, p), nn.MSELoss(), params, data
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a bias that is added has no Kronecker factors
        K = KFACLinearOperator(*problem)
    G = GGNLinearOperator(*problem)
    for name in params:
        close(K.block(name).to_dense(), G.block(name).to_dense())


def test_rows_that_no_layer_uses() -> None:
    torch.manual_seed(0)
    params = {"W": torch.randn(5, 3).double(), "b": torch.randn(5).double(), "V": torch.randn(2, 3).double()}
    data = [(torch.randn(N, 3).double(), torch.randn(N, 2).double())]

    def model(params: dict[str, Tensor], X: Tensor) -> Tensor:
        return F.linear(F.linear(X, params["W"][:3], params["b"][:3]).tanh(), params["V"])

    problem = model, nn.MSELoss(), params, data
    with pytest.warns(RuntimeWarning, match="exact blocks: 'W', 'b'"):
        K = KFACLinearOperator(*problem)
    J = torch.func.jacrev(lambda own: model(own, data[0][0]).reshape(-1))(params)
    for name in ("W", "b"):
        jacobian = J[name].reshape(2 * N, -1)
        close(K.block(name).to_dense(), 2 * jacobian.T @ jacobian / (2 * N))
    with pytest.raises(ValueError, match="'W', 'b'"):
        KFACLinearOperator(*problem, others="raise")


def test_results_are_in_the_order_of_the_parameters() -> None:
    problem = TestOtherParameters().problem()
    with pytest.warns(RuntimeWarning, match="scale"):
        A = KFACLinearOperator(*problem, joint_bias=False)
    assert list(A.factors) == list(A.eigenvalues().layers) == list(problem[2])
    model, loss, params, data = problem_of("mlp", 4, 2)
    names = ["2.bias", "0.weight", "2.weight", "0.bias"]
    K = KFACLinearOperator(model, loss, {name: params[name] for name in names}, data)
    assert K.eigenvalues().layers == ("2", "0")
    assert [block.name for block in compare(K, K.exact, progress=False).blocks] == ["2", "0"]


def test_representations_are_short() -> None:
    problem = problem_of("mlp", 4, 2)
    K, E = KFACLinearOperator(*problem), EKFACLinearOperator(*problem)
    assert repr(K.factors["0.bias"]) == "<factors of 0.weight, 0.bias: input=(5, 5), output=(5, 5)>"
    assert repr(E.inverse(0.1).factors["0.bias"]) == (
        "<factors of 0.weight, 0.bias: input_basis=(5, 5), output_basis=(5, 5), eigenvalues=(5, 5)>"
    )
    for result in (K.eigenvalues(), compare(K, K.exact, progress=False)):
        assert repr(result) == str(result)


def test_the_average_continues_from_a_file(tmp_path: Any) -> None:
    problem = problem_of("mlp", 4, 2)
    for cls in (KFACLinearOperator, EKFACLinearOperator):
        A = cls(*problem)
        A.save(tmp_path / "factors.npz")
        loaded = cls.load(tmp_path / "factors.npz")
        assert not hasattr(loaded, "update")
        B = cls(*problem[:3], problem[3][1:])
        B.moving_average(loaded, 0.0)
        close(B.to_dense(), A.to_dense())
        for matrix in (A, B):
            matrix.update(problem[3][1], decay=0.5)
        close(B.to_dense(), A.to_dense())


def test_a_bias_without_its_weight() -> None:
    """One batch uses the bias of a layer in another layer, too. The order of the batches has no effect."""
    torch.manual_seed(0)
    params = {"W": torch.randn(2, 3).double(), "b": torch.randn(2).double(), "V": torch.randn(2, 2).double()}
    data = [(torch.randn(n, 3).double(), torch.randn(n, 2).double()) for n in (1, 2, 1)]

    def model(params: dict[str, Tensor], X: Tensor) -> Tensor:
        z = F.linear(X, params["W"], params["b"])
        return F.linear(z.tanh(), params["V"], params["b"] if len(X) == 1 else None)

    problem = model, nn.MSELoss(), params
    for cls in (KFACLinearOperator, EKFACLinearOperator, KFOCLinearOperator):
        expected = cls(*problem, data, joint_bias=False)
        for batches in (data, data[::-1], [data[1], data[0], data[2]], [data[0], data[2], data[1]]):
            A = cls(*problem, batches)
            assert A.factors["b"].names == ("b",)
            close(A.to_dense(), expected.to_dense())
