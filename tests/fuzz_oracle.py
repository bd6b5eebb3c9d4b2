"""The matrices of a random problem by routes of their own: the whole data set as one batch, row by row, in float64."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from fuzz_models import Problem
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel


class Oracle:
    """All parameters of the problem's model, one after another.

    Attributes
    ----------
    names : list of str
    moving : Tensor
        ``(P,)``, 0 for what forward mode would move and reverse mode would not.
    """

    def __init__(self, problem: Problem) -> None:
        self._problem = problem
        self.named = dict(problem.model.named_parameters())
        self.slices: dict[str, slice] = {}
        start = 0
        for name, value in self.named.items():
            self.slices[name] = slice(start, start + value.numel())
            start += value.numel()
        self.size = start
        # Parameters that are tied are rows and columns under either name.
        where = {id(value): self.slices[name] for name, value in self.named.items()}
        for name, value in problem.model.named_parameters(remove_duplicate=False):
            self.slices[name] = where[id(value)]
        self.names = list(self.slices)
        # Reverse mode takes an embedding's row for padding as a constant, forward mode does not.
        self.moving = torch.ones(start, dtype=torch.float64)
        for name, part in problem.model.named_modules():
            if isinstance(part, nn.Embedding) and part.padding_idx is not None:
                where_it_is = self.slices[f"{name}.weight"]
                self.moving[where_it_is].view_as(part.weight)[part.padding_idx] = 0

    def _prediction(self) -> Tensor:
        with sdpa_kernel(SDPBackend.MATH):
            return self._problem.model(self._problem.X.clone())

    def loss(self) -> Tensor:
        """Return the loss of all data at once."""
        return self._problem.loss.function(self._prediction(), self._problem.y)

    def gradient(self) -> Tensor:
        return _row(self.loss(), self.named.values())

    def hessian(self) -> Tensor:
        """By double backward, row by row."""
        leaves = tuple(self.named.values())
        parts = torch.autograd.grad(self.loss(), leaves, create_graph=True, materialize_grads=True)
        gradient = torch.cat([part.reshape(-1) for part in parts])
        return _rows(gradient, leaves)

    def hessian_times(self, direction: Tensor, dtype: torch.dtype = torch.float64) -> Tensor:
        """By forward over reverse, of the loss written out by hand, in any precision."""

        def cast(part: Tensor) -> Tensor:
            return part.detach().to(dtype) if part.is_floating_point() else part.clone()

        problem = self._problem
        values = {name: cast(value) for name, value in self.named.items()}
        tangents = {name: direction[self.slices[name]].view_as(value).to(dtype) for name, value in values.items()}
        X, y = cast(problem.X), cast(problem.y)
        buffers = {name: cast(buffer) for name, buffer in problem.model.named_buffers()}

        def loss(params: dict[str, Tensor]) -> Tensor:
            own = {name: buffer.clone() for name, buffer in buffers.items()}
            z = functional_call(problem.model, own | params, (X.clone(),))
            return problem.loss.terms(z, y).sum() / problem.loss.divisor

        with sdpa_kernel(SDPBackend.MATH):
            _, product = torch.func.jvp(torch.func.grad(loss), (values,), (tangents,))
        return torch.cat([part.reshape(-1) for part in product.values()]).double()

    def jacobian(self) -> Tensor:
        return _rows(self._prediction().reshape(-1), tuple(self.named.values()))

    def ggn(self) -> Tensor:
        """The Jacobian around the dense Hessian of the loss by the prediction."""
        problem, J = self._problem, self.jacobian()
        z = self._prediction().detach()
        middle = torch.autograd.functional.hessian(lambda z: problem.loss.function(z, problem.y), z)
        return J.T @ middle.reshape(z.numel(), z.numel()) @ J

    def example_gradients(self) -> Tensor:
        """One row an example: of the unreduced loss."""
        terms = self._problem.loss.terms(self._prediction(), self._problem.y)
        return _rows(terms, tuple(self.named.values()))

    def empirical_fisher(self) -> Tensor:
        g = self.example_gradients()
        return g.T @ g / self._problem.loss.divisor

    def covariance(self) -> Tensor:
        g, count = self.example_gradients(), self._problem.loss.counted
        mean = g.sum(0) / count
        return self.empirical_fisher() - count / self._problem.loss.divisor * torch.outer(mean, mean)


class Differences:
    """The matrices of a small model, on one batch, by central differences of its predictions and its plain gradient."""

    def __init__(self, model: nn.Module, loss: Callable[[Any, None], Tensor], X: Tensor) -> None:
        self._model, self._loss, self._X = model, loss, X
        self._theta = model.theta.detach().clone()

    def jacobian(self) -> np.ndarray:
        with torch.no_grad():
            return self._along(lambda: torch.cat([part.reshape(-1) for part in self._model(self._X)]))

    def hessian(self) -> np.ndarray:
        return self._along(lambda: torch.autograd.grad(self._loss(self._model(self._X), None), self._model.theta)[0])

    def _along(self, function: Callable[[], Tensor], step: float = 1e-5) -> np.ndarray:
        """Return the derivative of ``function()`` by the parameters, one column each."""
        columns = []
        for unit in torch.eye(len(self._theta), dtype=self._theta.dtype):
            ends = []
            for sign in (1, -1):
                self._model.theta.data = self._theta + sign * step * unit
                ends.append(function())
            columns.append((ends[0] - ends[1]) / (2 * step))
        self._model.theta.data = self._theta.clone()
        return torch.stack(columns, dim=-1).numpy()


def _rows(outputs: Tensor, leaves: Sequence[Tensor]) -> Tensor:
    return torch.stack([_row(output, leaves) for output in outputs])


def _row(output: Tensor, leaves: Sequence[Tensor]) -> Tensor:
    leaves = tuple(leaves)
    if not output.requires_grad:
        return torch.zeros(sum(leaf.numel() for leaf in leaves), dtype=output.dtype)
    parts = torch.autograd.grad(output, leaves, retain_graph=True, materialize_grads=True)
    return torch.cat([part.reshape(-1) for part in parts])
