"""The axis of a layer's output that runs over the data items, in models that move, join or couple them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from curvop.kernels.data_axes import Positions, is_separated, possible_positions, unit_scales
from curvop.kernels.layer_uses import Use, UseRecorder


def random(*shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape) + len(shape))
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def probed(model: Callable[..., Tensor], x: Tensor, count: int) -> tuple[Use, Tensor, Tensor]:
    """Return the use of a weight, and its gradients for a cotangent and for a scaled cotangent."""
    weight = random(3, 3).requires_grad_()
    with UseRecorder({"w": weight}) as recorder:
        output = model(x, weight)
    [use], _ = recorder.separate([output])
    cotangent = random(*output.shape)
    scaled = cotangent * unit_scales(count).view(-1, *[1] * (output.ndim - 1))
    plain, scaled = (torch.autograd.grad(output, use.edge, part, retain_graph=True)[0] for part in (cotangent, scaled))
    return use, plain, scaled


class TestPositions:
    def find(self, model: Callable[..., Tensor], x: Tensor, count: int) -> list[Positions]:
        use, plain, scaled = probed(model, x, count)
        return possible_positions(use, count, plain, scaled, 1e-12)

    def test_axes(self) -> None:
        assert self.find(lambda x, w: (x @ w).sum(1), random(4, 5, 3), 4) == [Positions(4, 0, 1, 1)]
        assert self.find(lambda x, w: (x @ w).sum(0), random(5, 4, 3), 4) == [Positions(4, 1, 1, 1)]

    def test_two_axes_of_the_same_size(self) -> None:
        assert self.find(lambda x, w: (x @ w).sum(0), random(4, 4, 3), 4) == [Positions(4, 1, 1, 1)]
        assert self.find(lambda x, w: (x @ w)[:, 0], random(4, 4, 3), 4) == [Positions(4, 0, 1, 1)]

    def test_joined_axes(self) -> None:
        inner = self.find(lambda x, w: (x.flatten(0, 1) @ w).unflatten(0, (4, 5)).sum(1), random(4, 5, 3), 4)
        assert inner == [Positions(4, 0, 1, 5)]
        outer = self.find(lambda x, w: (x.flatten(0, 1) @ w).unflatten(0, (5, 4)).sum(0), random(5, 4, 3), 4)
        assert outer == [Positions(4, 0, 5, 1)]

    def test_units_on_two_axes(self) -> None:
        assert self.find(lambda x, w: (x @ w).flatten(0, 1), random(4, 5, 3), 20) == [Positions(20, 0, 1, 1, 2)]
        assert self.find(lambda x, w: (x @ w).mT.flatten(0, 1), random(4, 5, 3), 12) == []

    def test_coupled_items(self) -> None:
        assert self.find(lambda x, w: (x @ w).softmax(0), random(4, 3), 4) == []
        assert self.find(lambda x, w: (x @ w) + x[:, None].expand(4, 4, 3), random(4, 3), 4) == []

    @pytest.mark.parametrize("first", range(8))
    def test_any_two_coupled_items_are_found(self, first: int) -> None:
        for second in range(first):
            couple = torch.eye(8).double()
            couple[first, second] = 1e-3
            assert self.find(lambda x, w, couple=couple: couple @ (x @ w), random(8, 3), 8) == []
        assert self.find(lambda x, w: x @ w, random(8, 3), 8) == [Positions(8, 0, 1, 1)]

    def test_gradients_that_do_not_determine_the_axis(self) -> None:
        both = [Positions(4, axis, 1, 1) for axis in (0, 1)]
        assert self.find(lambda x, w: (x @ w).sum(0) * 0, random(4, 4, 3), 4) == both
        only = torch.zeros(4, 1).double()
        only[2] = 1  # position 2 of item 2
        assert self.find(lambda x, w: ((x @ w) * only[:, None]).sum(0) * only, random(4, 4, 3), 4) == both

    def test_items_without_gradients(self) -> None:
        mask = torch.tensor([0.0, 1.0, 1.0, 0.0], dtype=torch.float64)[:, None]
        assert self.find(lambda x, w: (x @ w).sum(0) * mask, random(4, 4, 3), 4) == [Positions(4, 1, 1, 1)]

    def test_the_factors_of_nearby_units_differ(self) -> None:
        scales = unit_scales(1000)
        assert bool(((scales >= 1) & (scales <= 2)).all())
        assert bool(((scales[1:] - scales[:-1]).abs() > 0.3).all())
        assert not bool(((scales > 1.4) & (scales < 1.6)).any())
        assert scales.unique().numel() == 1000

    def test_split(self) -> None:
        tensor = torch.arange(24).reshape(6, 2, 2)
        torch.testing.assert_close(Positions(3, 0, 1, 2).split(tensor)[1], tensor[2:4].reshape(-1, 2))
        torch.testing.assert_close(Positions(3, 0, 2, 1).split(tensor)[1], tensor[1::3].reshape(-1, 2))
        torch.testing.assert_close(Positions(2, 1, 1, 1).split(tensor)[1], tensor[:, 1])
        torch.testing.assert_close(Positions(12, 0, 1, 1, 2).split(tensor)[3], tensor[1, 1][None])
        torch.testing.assert_close(Positions(1, 0, 1, 1).split(tensor)[0], tensor.reshape(-1, 2))


class TestSeparation:
    """Each position belongs to one of four items, with or without an axis of the items."""

    def separated(self, model: Callable[..., Tensor], x: Tensor) -> bool:
        return is_separated(*self.arguments(model, x), 1e-12)

    def arguments(self, model: Callable[..., Tensor], x: Tensor) -> tuple[Use, int, Tensor, Tensor]:
        use, plain, scaled = probed(model, x, 4)
        return use, 4, plain, scaled

    def test_an_axis(self) -> None:
        assert self.separated(lambda x, w: (x @ w).sum(0), random(5, 4, 3))
        assert self.separated(lambda x, w: (x @ w).sum(0) * (torch.arange(4) > 1)[:, None], random(5, 4, 3))

    def test_joined_items_of_different_lengths(self) -> None:
        owners = torch.tensor([0, 0, 0, 1, 3, 3])
        pool = F.one_hot(owners, 4).double().T
        assert self.separated(lambda x, w: pool @ (x @ w), random(6, 3))

    def test_a_single_item(self) -> None:
        assert self.separated(lambda x, w: torch.eye(4).double()[1, :, None] * (x @ w), random(1, 3))

    @pytest.mark.parametrize("width", [1, 3])
    def test_shared_outputs(self, width: int) -> None:
        shared = random(4, 5, width)
        assert not self.separated(lambda x, w: ((x @ w)[:, :width] * shared).sum(1), random(5, 3))
        assert not self.separated(lambda x, w: ((x @ w)[:, :width] + shared[:, :4]).sin().sum(1), random(4, 3))

    def test_coupled_items(self) -> None:
        assert not self.separated(lambda x, w: (torch.eye(4).double() - 0.25) @ (x @ w), random(4, 3))
