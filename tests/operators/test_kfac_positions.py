"""KFAC and EKFAC of models whose data items are not on the first axis, are coupled, or share the outputs of a layer.

The references are matrices by ``torch.func`` of the models of this file.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, jacrev
from torch.nn import functional as F

from curvop import EKFACLinearOperator, KFACLinearOperator
from curvop.kernels.kronecker_factors import FlatLayout

CE = nn.CrossEntropyLoss()
Batch = tuple[Any, Tensor]


@pytest.fixture(autouse=True)
def double_precision() -> Iterator[None]:
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def close(actual: Any, expected: Any) -> None:
    np.testing.assert_allclose(actual, expected, rtol=1e-10, atol=1e-13)


def ggn(model: nn.Module, loss: Callable[..., Tensor], data: list[Batch], params: dict[str, Tensor]) -> np.ndarray:
    """Return the Gauss-Newton matrix of the mean over all terms."""
    total, terms = torch.zeros(()), 0
    for X, y in data:

        def predict(values: dict[str, Tensor], X: Any = X) -> Tensor:
            return functional_call(model, values, (X,))

        z = predict(params).detach()
        J = torch.cat([part.reshape(z.numel(), -1) for part in jacrev(predict)(params).values()], 1).detach()
        H = jacrev(jacrev(lambda z, y=y: loss(z, y)))(z).reshape(z.numel(), z.numel())
        total, terms = total + y.numel() * J.T @ H @ J, terms + y.numel()
    return (total / terms).numpy()


def params_of(model: nn.Module, start: str = "") -> dict[str, Tensor]:
    return {name: param for name, param in model.named_parameters() if name.startswith(start)}


def cut(X: Tensor, y: Tensor, *sizes: int) -> list[Batch]:
    return list(zip(X.split(sizes), y.split(sizes), strict=True))


def with_factors(A: KFACLinearOperator) -> set[str]:
    """Return the names of the parameters that have Kronecker factors."""
    return {name for block in A._blocks if not isinstance(block.layout, FlatLayout) for name in block.layout.names}


def assert_best_in_its_basis(A: EKFACLinearOperator, G: np.ndarray) -> None:
    """Check that EKFAC is the projection of each block on the matrices with its basis, or the block itself."""
    dense = A.to_dense()
    for block in A._blocks:
        index = np.concatenate([np.arange(A.shape[0])[A.params_slices[name]] for name in block.layout.names])
        own, exact = dense[np.ix_(index, index)], G[np.ix_(index, index)]
        close(np.trace(own), np.trace(exact))
        close(np.sum(own * exact), np.sum(own * own))
        if isinstance(block.layout, FlatLayout):
            is_diagonal = block.left.ndim == 2  # of a normalization
            close(own, np.diag(np.diag(exact)) if is_diagonal else exact)


class Documents(nn.Module):
    """Tokens attend to the earlier tokens of the same document. The data contain the number of each document."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(3, 4), nn.Linear(4, 3)

    def forward(self, x: tuple[Tensor, Tensor]) -> Tensor:
        tokens, document = x
        same = (document[:, :, None] == document[:, None]).double().tril()
        return self.last(torch.tanh((same / same.sum(-1, keepdim=True)) @ self.first(tokens))).transpose(1, 2)


class TestPackedDocuments:
    @pytest.mark.parametrize(
        "documents",
        [[[[0, 0, 1, 1, 2], [0, 0, 0, 0, 1]]], [[[0, 1, 2, 3, 4]] * 2, [[0, 0, 1, 1, 1], [0, 0, 0, 1, 2]]]],
        ids=["last document of one token", "documents of one token in the first batch"],
    )
    @pytest.mark.parametrize("sharing", ["expand", "reduce"])
    def test_ekfac(self, documents: list[Any], sharing: str) -> None:
        model = Documents()
        data = [((torch.randn(2, 5, 3), torch.tensor(own)), torch.randint(0, 3, (2, 5))) for own in documents]
        params = params_of(model)
        A = EKFACLinearOperator(model, CE, params, data, sharing=sharing)
        assert_best_in_its_basis(A, ggn(model, CE, data, params))


class Mixed(nn.Module):
    """Only the data items between the first and the last are coupled."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(3, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.first(x))
        return self.last(torch.cat([h[:1], h[1:-1] + 0.7 * h[1:-1].flip(0), h[-1:]]))


class TestMixedItems:
    def problem(self) -> tuple[Any, ...]:
        model = Mixed()
        data = cut(torch.randn(9, 3), torch.randint(0, 2, (9,)), 2, 7)  # the items of the first batch are not coupled
        return model, CE, params_of(model), data

    @pytest.mark.parametrize("cls", [KFACLinearOperator, EKFACLinearOperator])
    def test_layers_before_the_coupling_have_exact_blocks(self, cls: Any) -> None:
        model, _, params, data = self.problem()
        with pytest.warns(RuntimeWarning, match=r"no Kronecker factors.*'first\.weight', 'first\.bias'"):
            A = cls(model, CE, params, data)
        G = ggn(model, CE, data, params)
        for name in ("first.weight", "first.bias"):
            index = A.params_slices[name]
            close(A.block(name).to_dense(), G[index, index])
        assert with_factors(A) == {"last.weight", "last.bias"}

    @pytest.mark.parametrize("cls", [KFACLinearOperator, EKFACLinearOperator])
    def test_means_of_items_are_not_available(self, cls: Any) -> None:
        with pytest.raises(ValueError, match="couples the data items"):
            cls(*self.problem(), sharing="reduce")


class Sequence(nn.Module):
    """The data items are on the second axis of the first layer. For some items, all units are inactive."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(2, 4), nn.Linear(4, 3)

    def inputs(self, x: Tensor) -> Tensor:
        return x.transpose(0, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.relu(self.first(self.inputs(x)) - 2).cumsum(0)[-1])


class TestBatchesWithoutGradients:
    """As many data items as positions, and a batch whose gradients are zero."""

    def problem(self, order: int) -> tuple[Any, ...]:
        model = Sequence()
        nn.init.zeros_(model.first.bias)
        dead, alive = ((scale * torch.randn(4, 4, 2), torch.randint(0, 3, (4,))) for scale in (0.01, 5.0))
        return model, CE, params_of(model), [dead, alive][::order]

    @pytest.mark.parametrize("order", [1, -1])
    @pytest.mark.parametrize("sharing", ["expand", "reduce"])
    def test_ekfac(self, order: int, sharing: str) -> None:
        model, _, params, data = self.problem(order)
        A = EKFACLinearOperator(model, CE, params, data, sharing=sharing)
        assert_best_in_its_basis(A, ggn(model, CE, data, params))

    @pytest.mark.parametrize("order", [1, -1])
    def test_means_of_items(self, order: int) -> None:
        model, _, params, data = self.problem(order)
        A = KFACLinearOperator(model, CE, params, data, sharing="reduce")
        means = torch.cat([F.pad(X.mean(1), (0, 1), value=1.0) for X, _ in data])
        close(A.factors["first.weight"].input, means.T @ means / len(means))
        bias = {"first.bias": params["first.bias"]}  # its gradient is the sum of g over the positions of an item
        close(A.factors["first.weight"].output, ggn(model, CE, data, bias))

    def test_an_axis_that_no_batch_shows(self) -> None:
        model, _, params, data = self.problem(-1)
        for X, _ in data:
            X.zero_()
        data[0][0][0, 0] = 50.0  # a single position of a single item has gradients
        with pytest.raises(ValueError, match=r"axis of the data items in the outputs of the layer.*'first\.weight'"):
            KFACLinearOperator(model, CE, params, data, sharing="reduce")


class SecondAxis(Sequence):
    """The data items are on the second axis of X."""

    def inputs(self, x: Tensor) -> Tensor:
        return x


@pytest.mark.parametrize("sizes", [(6,), (4, 2), (1, 5)])
def test_means_of_items_on_the_second_axis(sizes: tuple[int, ...]) -> None:
    model = SecondAxis()
    X, y = 5 * torch.randn(3, 6, 2), torch.randint(0, 3, (6,))  # 6 is a multiple of 3
    params = params_of(model)
    data = list(zip(X.split(sizes, 1), y.split(sizes), strict=True))
    A = KFACLinearOperator(model, CE, params, data, sharing="reduce")
    means = F.pad(X.mean(0), (0, 1), value=1.0)
    close(A.factors["first.weight"].input, means.T @ means / 6)
    close(A.factors["first.weight"].output, ggn(model, CE, data, {"first.bias": params["first.bias"]}))


def test_a_layer_without_positions_in_a_batch() -> None:
    model = Joined()
    kept = torch.tensor([[1, 1], [1, 0]]).bool()
    data = [((torch.randn(2, 2, 3), own), torch.randint(0, 2, (2,))) for own in (kept & False, kept)]
    A = KFACLinearOperator(model, CE, params_of(model), data)
    inputs = F.pad(data[1][0][0][kept], (0, 1), value=1.0)
    close(A.factors["first.weight"].input, inputs.T @ inputs / 3)
    with pytest.raises(ValueError, match="couples the data items"):
        KFACLinearOperator(model, CE, params_of(model), data, sharing="reduce")


@pytest.mark.parametrize(("kind", "sharing"), [(EKFACLinearOperator, "expand"), (KFACLinearOperator, "reduce")])
def test_the_remedy_for_unknown_data_items_works(kind: type[KFACLinearOperator], sharing: str) -> None:
    class Shortened(nn.Linear):
        def forward(self, X: Tensor) -> Tensor:
            return super().forward(X)[:-1]

    model = Shortened(3, 2)
    arguments = (model, CE, params_of(model), [(torch.randn(5, 3), torch.randint(2, (4,)))])
    with pytest.raises(ValueError, match="data items of a batch are not known") as caught:
        kind(*arguments, batch_weight=lambda batch: 4, sharing=sharing)
    assert "use KFAC (in preconditioner.kfac, ekfac=False) with sharing='expand'" in str(caught.value)
    assert "examples=" not in str(caught.value)
    assert KFACLinearOperator(*arguments, batch_weight=lambda batch: 4, sharing="expand").shape == (8, 8)


class Coordinates(nn.Module):
    """All data items share the outputs of a layer that is applied to the coordinates of the positions."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.tokens, self.last = nn.Embedding(5, 4), nn.Linear(4, 3)
        self.places = nn.Embedding(3, 4) if kind == "sum of embeddings" else nn.Linear(1, 4)
        self.parts = nn.Embedding(2, 4)

    def forward(self, x: Tensor) -> Tensor:
        place = torch.arange(3)
        if self.kind == "sum of embeddings":
            own = self.places(place) + self.parts(place % 2)
        elif self.kind == "one position":
            own = self.places(torch.ones(1)) + self.parts(place % 2)
        else:
            own = self.places(place[:, None].double()) + self.parts(place % 2)
        return self.last(torch.tanh(self.tokens(x) + own)).transpose(1, 2)


@pytest.mark.parametrize("cls", [KFACLinearOperator, EKFACLinearOperator])
class TestSharedOutputs:
    @pytest.mark.parametrize("kind", ["coordinates", "sum of embeddings", "one position"])
    @pytest.mark.parametrize("sizes", [(12,), (3, 3, 6), (2,) * 6, (1, 11)])
    def test_exact_blocks(self, cls: Any, kind: str, sizes: tuple[int, ...]) -> None:
        model = Coordinates(kind)
        params = params_of(model)
        data = cut(torch.randint(0, 5, (12, 3)), torch.randint(0, 3, (12, 3)), *sizes)
        with pytest.warns(RuntimeWarning, match=r"no Kronecker factors.*'places\.weight'"):
            A = cls(model, CE, params, data)
        G = ggn(model, CE, data, params)
        for name in params:
            if name.startswith(("places", "parts")):
                index = A.params_slices[name]
                close(A.block(name).to_dense(), G[index, index])
        assert with_factors(A) == {"tokens.weight", "last.weight", "last.bias"}
        if cls is EKFACLinearOperator:
            assert_best_in_its_basis(A, G)

    def test_an_error_if_wanted(self, cls: Any) -> None:
        model = Coordinates("coordinates")
        data = [(torch.randint(0, 5, (6, 3)), torch.randint(0, 3, (6, 3)))]
        with pytest.raises(ValueError, match=r"no Kronecker factors.*'places\.weight'"):
            cls(model, CE, params_of(model), data, others="raise")


@pytest.mark.parametrize("width", [1, 3])
@pytest.mark.parametrize("count", [300, 3000, 30000])
def test_outputs_that_thousands_of_items_share(width: int, count: int) -> None:
    """The factor of some item is then close to any factor, compared with the rounding errors of float32."""

    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.places, self.last = nn.Linear(2, width), nn.Linear(5, 2)
            self.coordinates = torch.randn(5, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(torch.tanh(x + self.places(self.coordinates).sum(1)))

    torch.set_default_dtype(torch.float32)
    model = Shared()
    data = [(torch.randn(count, 5), torch.randn(count, 2))]
    with pytest.warns(RuntimeWarning, match=r"no Kronecker factors.*'places\.weight'"):
        KFACLinearOperator(model, nn.MSELoss(), params_of(model), data)


class Joined(nn.Module):
    """The tokens of texts of different lengths are joined into one sequence."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(3, 4), nn.Linear(4, 2)

    def forward(self, x: tuple[Tensor, Tensor]) -> Tensor:
        tokens, kept = x
        h = torch.tanh(self.first(tokens[kept]))
        owners = F.one_hot(kept.nonzero()[:, 0], len(kept)).double()
        return self.last(owners.T @ h)


class TestExpand:
    def test_joined_texts_of_different_lengths(self) -> None:
        model = Joined()
        kept = torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1], [1, 0, 0, 0]]).bool()
        X, y = torch.randn(3, 4, 3), torch.randint(0, 2, (3,))
        A = KFACLinearOperator(model, CE, params_of(model), [((X, kept), y)])
        inputs = F.pad(X[kept], (0, 1), value=1.0)
        close(A.factors["first.weight"].input, inputs.T @ inputs / 7)
        pre = X[kept] @ model.first.weight.T + model.first.bias
        owners = F.one_hot(kept.nonzero()[:, 0], 3).double()
        J = jacrev(lambda pre: model.last(owners.T @ torch.tanh(pre)))(pre).flatten(0, 1).detach()
        H = jacrev(jacrev(lambda z: CE(z, y)))(model.last(owners.T @ torch.tanh(pre)).detach()).reshape(6, 6)
        close(A.factors["first.weight"].output, torch.einsum("api,ab,bpj->ij", J, H, J))

    def test_batch_normalization(self) -> None:
        model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
        X, y = torch.randn(6, 3), torch.randint(0, 2, (6,))
        params = {name: param for name, param in params_of(model).items() if not name.startswith("1")}
        A = KFACLinearOperator(model, CE, params, [(X, y)])
        pre = X @ model[0].weight.T + model[0].bias

        def rest(pre: Tensor) -> Tensor:
            return model[2](F.batch_norm(pre, None, None, model[1].weight, model[1].bias, training=True))

        J = jacrev(rest)(pre).flatten(0, 1).detach()
        H = jacrev(jacrev(lambda z: CE(z, y)))(rest(pre).detach()).reshape(12, 12)
        values, Q = torch.linalg.eigh(H.reshape(6, 2, 6, 2)[torch.arange(6), :, torch.arange(6)])
        # KFAC takes one backward pass for the only column of the root of H, for all items at once.
        p = torch.softmax(rest(pre).detach(), 1)
        root = torch.tensor([1.0, -1.0]) * (p.prod(1, keepdim=True) / 6).sqrt()
        close(root[:, :, None] * root[:, None], (Q * values[:, None]) @ Q.mT)
        g = torch.einsum("a,api->pi", root.flatten(), J)
        close(A.factors["0.weight"].output, g.T @ g)

    def test_a_shared_output_beside_batch_normalization(self) -> None:
        class Model(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.first, self.places, self.norm, self.last = (
                    *(nn.Linear(3, 4), nn.Linear(1, 4)),
                    *(nn.BatchNorm1d(4, affine=False), nn.Linear(4, 2)),
                )

            def forward(self, x: Tensor) -> Tensor:
                h = self.first(x) + self.places(torch.arange(5)[:, None].double())
                return self.last(self.norm(h.mT).mT.sin().sum(1))

        model = Model()
        data = [(torch.randn(6, 5, 3), torch.randint(0, 2, (6,)))]
        with pytest.warns(RuntimeWarning, match=r"'places\.weight', 'places\.bias'"):
            A = KFACLinearOperator(model, CE, params_of(model), data)
        assert with_factors(A) == {"first.weight", "first.bias", "last.weight", "last.bias"}

    def test_forward_only_needs_no_backward_pass(self, monkeypatch: pytest.MonkeyPatch) -> None:
        model = Coordinates("coordinates")
        data = [(torch.randint(0, 5, (6, 3)), torch.randint(0, 3, (6, 3)))]
        assert passes(monkeypatch, KFACLinearOperator, model, CE, params_of(model), data, fisher="forward-only") == 0


def passes(monkeypatch: pytest.MonkeyPatch, cls: Any, *problem: Any, **options: Any) -> int:
    """Return the number of backward passes."""
    counts = [0]
    original = torch.autograd.grad

    def counted(*args: Any, **kwargs: Any) -> Any:
        counts[0] += 1
        return original(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr("curvop.kernels.factor_sums.torch.autograd.grad", counted)
        cls(*problem, **options)
    return counts[0]


class TestCost:
    """The number of backward passes for four batches, two of them of the same shape, and three classes.

    The Hessian of the loss has rank 2. Two more passes look for the data items.
    """

    @pytest.mark.parametrize(
        ("cls", "options", "expected"),
        [
            (KFACLinearOperator, {}, 4 * 2 + 2 * 2),
            (KFACLinearOperator, {"fisher": "mc"}, 4 + 2),
            (KFACLinearOperator, {"sharing": "reduce"}, 4 * (2 + 2)),
            (KFACLinearOperator, {"sharing": "reduce", "fisher": "mc"}, 4 * (1 + 1)),
            (EKFACLinearOperator, {}, 4 * 2 + 2 * 2 + 4 * (2 + 2)),
            (EKFACLinearOperator, {"fisher": "mc"}, 4 + 2 + 4 * (1 + 1)),
        ],
    )
    def test_backward_passes(
        self, monkeypatch: pytest.MonkeyPatch, cls: Any, options: dict[str, Any], expected: int
    ) -> None:
        model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
        data = cut(torch.randn(13, 4), torch.randint(0, 3, (13,)), 4, 4, 4, 1)
        data[3] = torch.randn(2, 4), torch.randint(0, 3, (2,))
        assert passes(monkeypatch, cls, model, CE, params_of(model), data, **options) == expected


class TestReduce:
    @pytest.mark.parametrize("sizes", [(1,), (3,), (1, 2)])
    def test_items_with_padding(self, sizes: tuple[int, ...]) -> None:
        class Mean(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.embedding = nn.Embedding(6, 3, padding_idx=0)

            def forward(self, x: Tensor) -> Tensor:
                return self.embedding(x).sum(1)

        X = torch.tensor([[1, 2, 0, 0], [0, 0, 0, 0], [4, 5, 5, 0]])[: sum(sizes)]
        model, y = Mean(), torch.randn(len(X), 3)
        params = params_of(model)
        A = KFACLinearOperator(model, nn.MSELoss(), params, cut(X, y, *sizes), sharing="reduce")
        counts = F.one_hot(X, 6)[:, :, 1:].sum(1).double()
        lengths = counts.sum(1, keepdim=True)
        means = F.pad(counts / lengths.clamp(min=1), (1, 0))
        close(A.factors["embedding.weight"].input, means.T @ means / len(X))
        close(A.factors["embedding.weight"].output, torch.eye(3) * 2 * float(lengths.square().sum()) / (3 * len(X)))
        if len(X) == 1:
            weight = params["embedding.weight"].detach().requires_grad_()
            J = jacrev(lambda w: F.embedding(X, w, padding_idx=0).sum(1).flatten())(weight).reshape(3, -1)
            J = J.reshape(3, 6, 3).clone()
            J[:, 0] = 0  # the row of the padding has no gradient
            close(A.to_dense(), 2 / 3 * (J.reshape(3, -1).T @ J.reshape(3, -1)).detach())

    @pytest.mark.parametrize("sharing", ["expand", "reduce"])
    @pytest.mark.parametrize("dims", [1, 2])
    def test_convolutions_of_one_image_whose_positions_are_the_items(self, sharing: str, dims: int) -> None:
        class Model(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                conv = nn.Conv1d if dims == 1 else nn.Conv2d
                self.first, self.last = conv(3, 4, 1), conv(4, 2, 1)

            def forward(self, x: Tensor) -> Tensor:
                image = x.T if dims == 1 else x.T.unflatten(1, (2, 3))
                return self.last(torch.tanh(self.first(image))).reshape(2, 6).T

        model = Model()
        data = [(torch.randn(6, 3), torch.randint(0, 2, (6,)))]
        params = params_of(model)
        G = ggn(model, CE, data, params)
        assert_best_in_its_basis(EKFACLinearOperator(model, CE, params, data, sharing=sharing), G)
        A = KFACLinearOperator(model, CE, params, data, sharing=sharing)
        inputs = F.pad(data[0][0], (0, 1), value=1.0)
        close(A.factors["first.weight"].input, inputs.T @ inputs / 6)


@pytest.mark.parametrize("cls", [KFACLinearOperator, EKFACLinearOperator])
@pytest.mark.parametrize("operation", ["linear", "addmm"])
@pytest.mark.parametrize("shape", [(1,), (1, 1), (2, 1)], ids=str)
def test_a_bias_that_is_broadcast(cls: Any, operation: str, shape: tuple[int, ...]) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight, self.bias = nn.Parameter(torch.randn(4, 3)), nn.Parameter(torch.randn(shape))
            self.last = nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            if operation == "linear":
                return self.last(torch.tanh(F.linear(x, self.weight, self.bias)))
            return self.last(torch.tanh(torch.addmm(self.bias, x, self.weight.T)))

    model = Model()
    count = shape[0] if len(shape) > 1 else 1
    data = [(torch.randn(count, 3), torch.randint(0, 2, (count,)))]
    params = params_of(model)
    G = ggn(model, CE, data, params)
    with pytest.warns(RuntimeWarning, match="no Kronecker factors.*'bias'"):
        A = cls(model, CE, params, data)
    index = A.params_slices["bias"]
    close(A.block("bias").to_dense(), G[index, index])
    assert with_factors(A) == {"weight", "last.weight", "last.bias"}
    if cls is EKFACLinearOperator:
        assert_best_in_its_basis(A, G)
    if count == 1:
        index = A.params_slices["weight"]
        close(A.block("weight").to_dense(), G[index, index])


def test_no_warnings_for_models_whose_items_are_separate() -> None:
    model = nn.Sequential(nn.Embedding(5, 4), nn.TransformerEncoderLayer(4, 2, 6, 0.0, batch_first=True), nn.Flatten())
    params = {name: param for name, param in params_of(model).items() if "norm" not in name}
    data = cut(torch.randint(0, 5, (7, 4)), torch.randn(7, 16), 4, 3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        KFACLinearOperator(model, nn.MSELoss(), params, data)
