"""Selection of parameters by name pattern and layer type."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from curvop import (
    BlockDiagonalLinearOperator,
    DiagonalLinearOperator,
    EFLinearOperator,
    EKFACLinearOperator,
    FisherLinearOperator,
    GGNLinearOperator,
    GradientCovarianceLinearOperator,
    HessianLinearOperator,
    JacobianLinearOperator,
    KFACLinearOperator,
    KFOCLinearOperator,
    PerExampleGradientLinearOperator,
    select,
)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(5, 4)
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4)) for _ in range(2))
        self.scale = nn.Parameter(torch.ones(1))
        self.head = nn.Linear(4, 5, bias=False)
        self.head.weight = self.embed.weight


@pytest.fixture
def net() -> Net:
    return Net()


def test_everything_once_in_the_models_order(net) -> None:
    assert select(net) == dict(net.named_parameters())


def test_globs(net) -> None:
    assert list(select(net, "layers.*.weight")) == [
        *("layers.0.0.weight", "layers.0.1.weight", "layers.1.0.weight", "layers.1.1.weight")
    ]
    assert list(select(net, ["layers.1.*", "scale"], exclude="*bias*")) == [
        *("scale", "layers.1.0.weight", "layers.1.1.weight")
    ]
    assert list(select(net, "layers.[0].?.bias")) == ["layers.0.0.bias", "layers.0.1.bias"]


def test_modules(net) -> None:
    assert select(net, "layers.1") == select(net, "layers.1.*")
    assert list(select(net, "layers", exclude=["layers.0", "*bias"])) == ["layers.1.0.weight", "layers.1.1.weight"]


def test_types(net) -> None:
    assert list(select(net, types=nn.LayerNorm, exclude="*bias")) == ["layers.0.1.weight", "layers.1.1.weight"]
    assert list(select(net, "*weight", types=(nn.Linear, nn.Embedding))) == [
        *("embed.weight", "layers.0.0.weight", "layers.1.0.weight")
    ]
    assert list(select(net, types=Net)) == ["scale"]


def test_tied_parameters_have_the_name_that_is_asked_for(net) -> None:
    assert list(select(net, "head.weight")) == ["head.weight"]
    assert list(select(net, "*d.weight")) == ["embed.weight"]


def test_excluded_parameters_are_so_under_all_their_names(net) -> None:
    assert "head.weight" not in select(net, exclude="embed.*")


def test_frozen_parameters_are_left_out(net) -> None:
    net.layers.requires_grad_(False)
    assert list(select(net)) == ["scale", "embed.weight"]
    with pytest.raises(ValueError, match=r"layers\.0\.0\.bias.* do not require grad"):
        select(net, "layers.*")


def test_operators_take_them() -> None:
    model = nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 1))
    assert GGNLinearOperator(model, nn.MSELoss(), select(model, "2.*"), []).shape == (4, 4)


class TestMistakes:
    def test_a_pattern_that_fits_nothing_is_told_the_nearest(self, net) -> None:
        with pytest.raises(ValueError, match=r"patterns has 'layer\.0\.0\.weight'.*'layers\.0\.0\.weight'"):
            select(net, "layer.0.0.weight")
        with pytest.raises(ValueError, match=r"exclude has '\*biases'"):
            select(net, exclude="*biases")

    def test_types_that_no_layer_has(self, net) -> None:
        with pytest.raises(ValueError, match="Embedding, LayerNorm, Linear, Net"):
            select(net, types=nn.Conv2d)

    def test_nothing_is_left(self, net) -> None:
        with pytest.raises(ValueError, match="no parameter is selected"):
            select(net, "*bias", exclude="*bias")

    def test_no_module(self) -> None:
        with pytest.raises(TypeError, match="model is a dict"):
            select({})


@pytest.mark.parametrize(("arguments", "said"), [({"patterns": "[0"}, "they are"), ({"exclude": "qqq"}, "they are")])
def test_where_nothing_is_near_some_names_are_told(arguments, said) -> None:
    with pytest.raises(ValueError, match=said):
        select(nn.Linear(2, 3), **arguments)


@pytest.mark.parametrize("types", ["Linear", [1], nn.Linear(1, 1)])
def test_types_that_are_none(types) -> None:
    with pytest.raises(TypeError, match="types is"):
        select(nn.Linear(2, 3), types=types)


def test_a_list_of_types() -> None:
    assert list(select(nn.Sequential(nn.Linear(2, 3), nn.LayerNorm(3)), types=[nn.LayerNorm])) == ["1.weight", "1.bias"]


class Classifier(nn.Module):
    """Two layers with tied weights, nested modules, and a parameter of the model itself."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1 = nn.Linear(3, 3)
        self.fc10 = nn.Linear(3, 3)
        self.fc10.weight = self.fc1.weight
        self.scale = nn.Parameter(torch.ones(()))
        self.body = nn.Sequential(nn.Linear(3, 2), nn.Sequential(nn.Tanh(), nn.Linear(2, 2)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.scale * self.body(self.fc10(self.fc1(x).tanh()).tanh())


torch.manual_seed(0)
CLASSIFIER = Classifier().double()
PARAMS = dict(CLASSIFIER.named_parameters())
DATA = [(torch.randn(6, 3).double(), torch.randint(2, (6,)))]
LOSS = nn.CrossEntropyLoss()
FC1 = ["fc1.weight", "fc1.bias"]


def sequential() -> dict[str, Any]:
    """Return the arguments of an operator of a model whose layers are Kronecker-factored."""
    model = nn.Sequential()
    model.add_module("fc1", nn.Linear(3, 3))
    model.add_module("act", nn.Tanh())
    model.add_module("fc2", nn.Linear(3, 2))
    model.double()
    return {"model": model, "loss_function": LOSS, "params": dict(model.named_parameters()), "data": DATA}


SEQUENTIAL = sequential()
H = HessianLinearOperator(CLASSIFIER, LOSS, PARAMS, DATA)
G = GGNLinearOperator(CLASSIFIER, LOSS, PARAMS, DATA)
J = JacobianLinearOperator(CLASSIFIER, PARAMS, DATA)
OPERATORS = {
    "Hessian": H,
    "GGN": G,
    "empirical Fisher": EFLinearOperator(CLASSIFIER, LOSS, PARAMS, DATA),
    "Fisher": FisherLinearOperator(CLASSIFIER, LOSS, PARAMS, DATA),
    "gradient covariance": GradientCovarianceLinearOperator(CLASSIFIER, LOSS, PARAMS, DATA),
    "Jacobian": J,
    "transposed Jacobian": J.T,
    "per-example gradients": PerExampleGradientLinearOperator(CLASSIFIER, LOSS, PARAMS, DATA),
    "sum": H + G,
    "difference of a multiple": H - 2 * G,
    "product": G @ H,
    "damped": H.damped(0.1),
    "named block": (H @ G).block(["body", "fc1"]),
    "diagonal": DiagonalLinearOperator({name: torch.ones_like(value) for name, value in PARAMS.items()}, PARAMS),
    "block-diagonal": H.block_diagonal("layers"),
    "blocks of others": BlockDiagonalLinearOperator(list(H.blocks())),
    "KFAC": KFACLinearOperator(**SEQUENTIAL),
    "EKFAC": EKFACLinearOperator(**SEQUENTIAL),
    "KFOC": KFOCLinearOperator(**SEQUENTIAL),
}


class TestBlocksByName:
    @pytest.mark.parametrize("name", OPERATORS)
    def test_a_module_a_pattern_and_a_selection_are_the_same_block(self, name: str) -> None:
        A = OPERATORS[name]
        model = CLASSIFIER if "body.0.weight" in A.params_slices else SEQUENTIAL["model"]
        exact = A.block(FC1)
        assert 12 in exact.shape
        for names in ("fc1", "fc1.*", ["fc1"], ["fc1.w*", "fc1.b*"], select(model, "fc1"), iter(FC1)):
            block = A.block(names)
            assert list(block.params_slices) == FC1
            np.testing.assert_allclose(block.to_dense(), exact.to_dense())

    def test_off_the_diagonal(self) -> None:
        C = H.block("fc1.bias", "body")
        np.testing.assert_array_equal(
            C.to_dense(), H.block("fc1.bias", [name for name in PARAMS if name.startswith("body")]).to_dense()
        )
        assert list(C.params_slices) == ["body.0.weight", "body.0.bias", "body.1.1.weight", "body.1.1.bias"]

    def test_a_module_does_not_include_others_whose_names_begin_alike(self) -> None:
        assert list(H.block("fc1").params_slices) == FC1
        assert list(H.block("fc1*").params_slices) == [*FC1, "fc10.bias"]

    def test_a_tied_parameter_is_found_by_any_name_in_a_selection(self) -> None:
        assert list(H.block(select(CLASSIFIER, "fc10")).params_slices) == ["fc1.weight", "fc10.bias"]
        assert list((H + G).block(select(CLASSIFIER, "fc10.weight")).params_slices) == ["fc1.weight"]

    def test_a_selection_means_its_parameters_whatever_their_names(self) -> None:
        model = nn.Sequential(nn.Linear(3, 3), nn.Sequential(nn.Linear(3, 3), nn.Tanh()))
        H = HessianLinearOperator(model[1], LOSS, model[1].parameters(), [(torch.randn(4, 3), torch.randn(4, 3))])
        assert list(H.block(select(model, "1")).params_slices) == ["0.weight", "0.bias"]
        # The outer model has other parameters with the names of H.
        for take in (H.block, lambda chosen: H.block_diagonal({"one": chosen})):
            with pytest.raises(KeyError, match=r"'0\.weight' is not the parameter of this name in A"):
                take(select(model, "0"))

    def test_a_parameter_wins_over_a_module_of_the_same_name(self) -> None:
        params = {"a": torch.ones(2).double(), "a.b": torch.ones(3).double()}
        A = HessianLinearOperator.from_objective(
            lambda p, x: (p["a"].sum() * p["a.b"].sum() * x).sum(), params, [torch.ones(1).double()]
        )
        assert list(A.block("a").params_slices) == ["a"]
        assert list(A.block("a.*").params_slices) == ["a.b"]
        assert A.parameter_groups("layers") == {"a": ["a"], "a.*": ["a.b"]}

    def test_names_with_brackets_are_no_patterns(self) -> None:
        model = nn.ModuleDict({"a[0]": nn.Linear(2, 1), "a0": nn.Linear(2, 1)})
        assert list(select(model, "a[0]")) == ["a[0].weight", "a[0].bias"]
        assert list(select(model, "a[0].bias")) == ["a[0].bias"]

    @pytest.mark.parametrize("name", OPERATORS)
    def test_unknown_names(self, name: str) -> None:
        A = OPERATORS[name]
        with pytest.raises(KeyError) as caught:
            A.block("fc")
        assert isinstance(caught.value, ValueError)
        message = str(caught.value)
        assert "no parameter or module is named 'fc'; did you mean 'fc" in message
        assert "'fc1'" in message
        assert message.endswith("(A.params_slices lists the names)")
        with pytest.raises(KeyError, match=r"named '\*\.weigth'; did you mean .*'fc1\.weight'"):
            A.block(["fc1.bias", "*.weigth"])

    def test_the_same_parameter_twice(self) -> None:
        with pytest.raises(ValueError, match=r"rows names 'fc1\.bias' twice"):
            H.block(["fc1", "*.bias"])


class TestBlocksByModule:
    def test_layers(self) -> None:
        """Of nested modules, a root parameter, and tied weights, which belong to the name that they have in H."""
        groups = {
            "scale": ["scale"],
            "fc1": FC1,
            "fc10": ["fc10.bias"],
            "body.0": ["body.0.weight", "body.0.bias"],
            "body.1.1": ["body.1.1.weight", "body.1.1.bias"],
        }
        assert H.parameter_groups("layers") == groups
        blocks = dict(zip(groups, H.blocks("layers"), strict=True))
        for name, block in blocks.items():
            np.testing.assert_array_equal(block.to_dense(), H.block(groups[name]).to_dense())
        assert sum(block.shape[0] for block in blocks.values()) == H.shape[0]

    def test_by_default_each_parameter(self) -> None:
        assert [list(block.params_slices) for block in H.blocks()] == [[name] for name in PARAMS]

    def test_groups_of_modules_and_patterns(self) -> None:
        groups = {"input": ["fc1", "fc10"], "body": "body", "rest": "sc*"}
        blocks = list(H.blocks(groups))
        assert [list(block.params_slices) for block in blocks] == [
            [*FC1, "fc10.bias"],
            [name for name in PARAMS if name.startswith("body")],
            ["scale"],
        ]
        for block, part in zip(blocks, H.block_diagonal(groups).blocks(groups), strict=True):
            np.testing.assert_allclose(block.to_dense(), part.to_dense())

    @pytest.mark.parametrize("name", ["Jacobian", "transposed Jacobian", "sum", "KFAC", "per-example gradients"])
    def test_of_other_operators(self, name: str) -> None:
        A = OPERATORS[name]
        for block, names in zip(A.blocks("layers"), A.parameter_groups("layers").values(), strict=True):
            assert list(block.params_slices) == names

    def test_a_parameter_in_two_groups(self) -> None:
        with pytest.raises(ValueError, match=r"groups has 'fc1\.bias' twice"):
            H.blocks({"first": "fc1", "biases": "*.bias"})
