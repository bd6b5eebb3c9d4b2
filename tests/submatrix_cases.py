"""A small Hessian and its dense matrix, and the selections that hypothesis draws from an axis."""

import numpy as np
import torch
from hypothesis import strategies as st
from torch import nn

from curvop import HessianLinearOperator

DAMPING = 0.75
LAYERS = {"0.weight": 12, "0.bias": 4, "2.weight": 12, "2.bias": 3, "4.weight": 6, "4.bias": 2}
ORDER = ["2.bias", "0.weight", "4.weight", "0.bias", "4.bias", "2.weight"]


def mlp(first=nn.Tanh, device="cpu"):
    torch.manual_seed(0)
    layers = nn.Linear(3, 4), first(), nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2)
    return nn.Sequential(*layers).double().to(device)


def two_batches():
    generator = torch.Generator().manual_seed(1)
    return [
        (
            torch.randn(size, 3, generator=generator, dtype=torch.float64),
            torch.randn(size, 2, generator=generator, dtype=torch.float64),
        )
        for size in (4, 3)
    ]


def hessian(model, order=ORDER):
    params = dict(model.named_parameters())
    return HessianLinearOperator(model, nn.MSELoss(), {name: params[name] for name in order}, two_batches())


def dense_hessian(model, order=ORDER):
    """The Hessian of the loss of both batches as one, as a function of one vector."""
    params = dict(model.named_parameters())
    X, y = (torch.cat(parts) for parts in zip(*two_batches(), strict=True))
    shapes = [params[name].shape for name in order]

    def loss(theta):
        parts = theta.split([shape.numel() for shape in shapes])
        values = {name: part.view(shape) for name, part, shape in zip(order, parts, shapes, strict=True)}
        return nn.functional.mse_loss(torch.func.functional_call(model, values, X), y)

    theta = torch.cat([params[name].detach().flatten() for name in order])
    return torch.autograd.functional.hessian(loss, theta).numpy()


H = hessian(mlp())
DENSE = dense_hessian(mlp())
DAMPED = DENSE + DAMPING * np.eye(len(DENSE))
P = len(DENSE)


def entries(*names):
    """Where the parameters `names` lie among the rows of H."""
    return np.concatenate([np.arange(P)[H.params_slices[name]] for name in names])


def part(matrix, rows, cols):
    return matrix[rows, :][:, cols]


def selections(length):
    """Everything that selects from an axis of that length: lists, tuples, index arrays and tensors, masks, slices."""
    masks = st.lists(st.booleans(), min_size=length, max_size=length).map(lambda mask: np.array(mask, bool))
    lists = st.lists(st.integers(-length, length - 1), max_size=9) if length else st.just([])
    tensors = lists.map(lambda idxs: torch.tensor(idxs, dtype=torch.int64))
    return st.one_of(lists, lists.map(tuple), tensors, masks, masks.map(torch.from_numpy), st.slices(length))


def numpys(selection):
    """Return the selection as NumPy takes it for one axis: a tuple means several there, and tensors it knows not."""
    if isinstance(selection, torch.Tensor):
        return selection.numpy()
    return list(selection) if isinstance(selection, tuple) else selection
