"""Selection of parameters by name pattern and layer type."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from curvop import GGNLinearOperator, select


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
