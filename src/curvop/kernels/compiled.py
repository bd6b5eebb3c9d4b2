"""The compiled engine: one program for each shape of batch, where the objective can be traced."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from curvop.kernels.differentiable import TwiceDifferentiable
from curvop.kernels.kernel import Kernel, Linearization
from curvop.kernels.tracing import Program, compile_product

__all__ = ["CompiledKernel"]


class CompiledKernel(Kernel):
    """Linearizes by compiled programs, and by `kernel` where there is none.

    Parameters
    ----------
    kernel : Kernel
        Whose products are compiled.
    """

    def __init__(self, kernel: Kernel) -> None:
        super().__init__(kernel.objective, kernel.rows.names, kernel.cols.names)
        self.symmetric = kernel.symmetric
        self._kernel = kernel
        self._programs: dict[object, tuple[Program, Any] | None] = {}
        self._warned = False

    worth_batching = 2e-3  # seconds a column; a longer product gains less than its compilation takes

    @property
    def seconds(self) -> float:
        """What compiling took so far."""
        return sum(compiled[0].seconds for compiled in self._programs.values() if compiled is not None)

    def __getstate__(self) -> dict[str, object]:
        return self.__dict__ | {"_programs": {}}

    def adjoint(self) -> Kernel:
        """Return the compiled kernel of the adjoint."""
        return CompiledKernel(self._kernel.adjoint())

    def product(
        self, leaves: Mapping[str, Tensor], loss: Tensor, tangents: Sequence[Tensor]
    ) -> Sequence[Tensor | None]:
        """Return one product from the beginning, as the wrapped kernel makes it."""
        return self._kernel.product(leaves, loss, tangents)

    def linearize(self, leaves: Mapping[str, Tensor], index: int, batch: Any) -> Linearization:
        """Return the linearization of one batch."""
        inputs, structure = pytree.tree_flatten((dict(leaves), self.objective.held(leaves), batch))
        compiled = None
        if unknown := [part for part in inputs if not isinstance(part, Tensor | int | float | str | None)]:
            # What it holds, nobody can see: neither the tensors to trace nor the values that a program is good for.
            self._warn(f"a batch holds a {type(unknown[0]).__name__}")
        else:
            key = (tuple(map(_like, inputs)), str(structure), self.objective.mode())
            if key not in self._programs:
                self._programs[key] = self._compiled(leaves, inputs, structure)
            compiled = self._programs[key]
        if compiled is None:
            return self._kernel.linearize(leaves, index, batch)
        program, prediction = compiled
        [loss], residuals = program.linearize([part.detach() for part in inputs if isinstance(part, Tensor)])
        return _Residuals(loss, self.objective.weight(prediction, index, batch), program, residuals)

    def _compiled(self, leaves: Mapping[str, Tensor], inputs: list[Any], structure: Any) -> tuple[Program, Any] | None:
        """Return the program for inputs like these, and the shape of the prediction; None where there is none."""
        where = [position for position, part in enumerate(inputs) if isinstance(part, Tensor)]
        chosen = {*self.rows.names, *self.cols.names}
        shape: Any = None

        def product(
            tensors: Sequence[Tensor], tangents: Sequence[Tensor]
        ) -> tuple[Sequence[Tensor], Sequence[Tensor | None]]:
            nonlocal shape
            parts = list(inputs)
            for position, tensor in zip(where, tensors, strict=True):
                parts[position] = tensor
            values, held, batch = pytree.tree_unflatten(parts, structure)
            point = {name: value.detach().requires_grad_(name in chosen) for name, value in values.items()}
            with torch.enable_grad(), TwiceDifferentiable():
                loss, prediction = self.objective.traced(point, held, batch)
                shape = pytree.tree_map_only(Tensor, _shape, prediction)
                return [loss.detach()], self._kernel.product(point, loss, tangents)

        examples = [inputs[position].detach() for position in where]
        tangents = [torch.ones_like(leaves[name], memory_format=torch.contiguous_format) for name in self.cols.names]
        try:
            return compile_product(product, examples, tangents), shape
        except Exception as error:  # whatever torch cannot do; autograd says it again if the objective is at fault
            self._warn(" ".join(f"the product could not be compiled: {type(error).__name__}: {error}".split())[:300])
            return None

    def _warn(self, reason: str) -> None:
        if not self._warned:
            self._warned = True
            warnings.warn(f"engine='compiled' falls back to 'autograd': {reason}", RuntimeWarning, stacklevel=2)


class _Residuals(Linearization):
    def __init__(self, loss: Tensor, weight: float, program: Program, residuals: Sequence[Tensor]) -> None:
        super().__init__(loss, weight, tensors=residuals)
        self._program = program

    def apply(self, tangents: Sequence[Tensor]) -> Sequence[Tensor | None]:
        return self._program.apply(self.tensors, tangents)

    def apply_many(self, tangents: Sequence[Tensor]) -> Sequence[Tensor | None]:
        return self._program.apply_many(self.tensors, tangents)


def _like(part: Any) -> object:
    """Return what one program is good for."""
    if not isinstance(part, Tensor):
        return type(part), part
    return part.shape, part.stride(), part.dtype, part.device, part.requires_grad


def _shape(tensor: Tensor) -> Tensor:
    return torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")
