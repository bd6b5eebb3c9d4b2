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
from curvop.kernels.losses import check_loss
from curvop.kernels.passes import precision, same
from curvop.kernels.tracing import Program, agree, compile_product

__all__ = ["CompiledKernel"]

# For batches of one shape; where settings of the model call for more, they never end.
_MOST_PROGRAMS = 4


class CompiledKernel(Kernel):
    """Linearizes by compiled programs, and by `kernel` where there is none.

    Parameters
    ----------
    kernel : Kernel
        Whose products are compiled.
    """

    compiled = True
    worth_batching = 2e-3  # seconds a column; a longer product gains less than its compilation takes

    def __init__(self, kernel: Kernel) -> None:
        self.objective, self.rows, self.cols = kernel.objective, kernel.rows, kernel.cols
        self.symmetric, self.by_batch = kernel.symmetric, kernel.by_batch
        self._kernel = kernel
        self._programs: dict[tuple[object, ...], tuple[Program, Any] | None] = {}
        self._warned = False
        self._gave_up = False

    @property
    def seconds(self) -> float:
        """What compiling took so far."""
        return sum(compiled[0].seconds for compiled in self._programs.values() if compiled is not None)

    def __getstate__(self) -> dict[str, object]:
        return self.__dict__ | {"_programs": {}}

    def adjoint(self) -> Kernel:
        """Return the compiled kernel of the adjoint."""
        return CompiledKernel(self._kernel.adjoint())

    def check_count(self, count: int) -> None:
        """Refuse data of another number of batches, as the wrapped kernel does."""
        self._kernel.check_count(count)

    def move(self) -> bool:
        """Linearize by derivatives at another point, as the wrapped kernel does."""
        moved = self._kernel.move()
        if moved:
            self._programs.clear()
        return moved

    def held(self, leaves: Mapping[str, Tensor], index: int, batch: Any) -> dict[str, dict[str, Tensor]]:
        """Return what a product depends on, as for the wrapped kernel."""
        return self._kernel.held(leaves, index, batch)

    def product(
        self, leaves: Mapping[str, Tensor], held: dict[str, dict[str, Tensor]], batch: Any, tangents: Sequence[Tensor]
    ) -> tuple[Tensor, Any, Sequence[Tensor | None]]:
        """Return a product from the beginning, as the wrapped kernel makes it."""
        return self._kernel.product(leaves, held, batch, tangents)

    def prepare(self, leaves: Mapping[str, Tensor], index: int, batch: Any) -> None:
        """Compile what there is no program for."""
        self._found(leaves, index, batch)

    def linearize(self, leaves: Mapping[str, Tensor], index: int, batch: Any) -> Linearization:
        """Return the linearization of one batch."""
        for _ in range(2):
            found = self._found(leaves, index, batch)
            if found is None:
                return self._kernel.linearize(leaves, index, batch)
            inputs, (program, prediction) = found
            [loss], residuals = program.linearize([part.detach() for part in inputs if isinstance(part, Tensor)])
            if index or same([float(loss)], [float(self._loss(leaves, batch))], precision(loss, *leaves.values())):
                return _Residuals(loss, self.objective.weight(prediction, index, batch), program, residuals)
            # Something has changed that no key tells: a dictionary, or what a function reads.
            self._programs.clear()
        self._give_up("the compiled loss differs from the objective's, by its random numbers or its own counting")
        return self._kernel.linearize(leaves, index, batch)

    def _found(
        self, leaves: Mapping[str, Tensor], index: int, batch: Any
    ) -> tuple[list[Any], tuple[Program, Any]] | None:
        """Return the inputs and the program that is good for them, None where there is none."""
        if len({value.device for value in leaves.values()}) > 1:
            self._warn("parameters are on several devices")
            return None
        inputs, structure = pytree.tree_flatten((dict(leaves), self.held(leaves, index, batch), batch))
        if unknown := [part for part in inputs if not _is_known(part)]:
            # What it holds, nobody can see: neither the tensors to trace nor the values that a program is good for.
            self._warn(f"a batch holds a {type(unknown[0]).__name__}")
            return None
        like = (tuple(map(_like, inputs)), str(structure))
        key = (*like, self.objective.mode())
        if key not in self._programs and sum(known[:2] == like for known in self._programs) == _MOST_PROGRAMS:
            self._give_up("a setting of the model changes with every batch")
        if self._gave_up:
            return None
        if key not in self._programs:
            if not self._kernel.linearize(leaves, index, batch).weight:
                return None  # nothing to compare a program with: wait for a batch that counts
            self._programs[key] = self._compiled(leaves, index, batch, inputs, structure)
        program = self._programs[key]
        return None if program is None else (inputs, program)

    def _loss(self, leaves: Mapping[str, Tensor], batch: Any) -> Tensor:
        """Return the loss as the objective itself computes it."""
        held = self.objective.held(leaves)
        try:
            with torch.no_grad():
                return self.objective.traced(leaves, held, batch)[0]
        except RuntimeError:  # it contains derivatives of its own
            with torch.enable_grad():
                return self.objective.traced(leaves, held, batch)[0].detach()

    def _compiled(
        self, leaves: Mapping[str, Tensor], index: int, batch: Any, inputs: list[Any], structure: Any
    ) -> tuple[Program, Any] | None:
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
                parts[position] = tensor.detach().requires_grad_(inputs[position].requires_grad)
            values, held, batch = pytree.tree_unflatten(parts, structure)
            point = {name: value.detach().requires_grad_(name in chosen) for name, value in values.items()}
            with torch.enable_grad(), TwiceDifferentiable(self.objective.evaluator.elementary_norms):
                loss, prediction, cotangents = self._kernel.product(point, held, batch, tangents)
                check_loss(loss, index)
                shape = pytree.tree_map_only(Tensor, _shape, prediction)
                return [loss.detach()], cotangents

        def clones() -> list[Tensor]:  # a program may write to what it is given
            return [_clone(inputs[position].detach()) for position in where]

        numbers = torch.arange(self.cols.size, dtype=torch.float32, device=self.objective.device).sin()
        vector = self.cols.at(numbers.to(self.objective.dtype), index).contiguous()
        try:
            program = compile_product(product, clones(), vector, self.cols, self.rows)
            _, residuals = program.linearize(clones())
            reference = self._kernel.linearize(leaves, index, batch)
            expected = reference.apply(self.cols.split(vector))
            third = reference.apply(self.cols.split(vector / 3))  # how much rounding there is, where it is all there is
            if not agree(self.rows.split(program.apply(residuals, vector)), expected, third):
                raise RuntimeError("the compiled product differs from autograd's")
            return program, shape
        except Exception as error:  # whatever torch cannot do; autograd says it again if the objective is at fault
            self._warn(" ".join(f"the product could not be compiled: {type(error).__name__}: {error}".split())[:300])
            return None

    def _give_up(self, reason: str) -> None:
        self._gave_up = True
        self._warn(reason)

    def _warn(self, reason: str) -> None:
        if not self._warned:
            self._warned = True
            warnings.warn(f"engine='compiled' falls back to 'autograd': {reason}", RuntimeWarning, stacklevel=2)


class _Residuals(Linearization):
    whole = True

    def __init__(self, loss: Tensor, weight: float, program: Program, residuals: Sequence[Tensor]) -> None:
        super().__init__(loss, weight, tensors=residuals)
        self._program = program

    def apply(self, tangents: Sequence[Tensor]) -> Sequence[Tensor | None]:
        return [self._program.apply(self.tensors, *tangents)]

    def apply_many(self, tangents: Sequence[Tensor]) -> Sequence[Tensor | None]:
        return [self._program.apply_many(self.tensors, *tangents)]


def _is_known(part: Any) -> bool:
    if isinstance(part, Tensor):
        return part.layout == torch.strided
    return isinstance(part, int | float | str | None)


def _like(part: Any) -> object:
    """Return what one program is good for."""
    if not isinstance(part, Tensor):
        return type(part), repr(part)  # which tells -0.0 from 0.0
    return part.shape, part.stride(), part.dtype, part.device, part.requires_grad


def _clone(tensor: Tensor) -> Tensor:
    """Return a clone in the same layout; where that cannot be had, as of an expanded tensor, the tensor itself."""
    clone = tensor.clone()
    return clone if clone.stride() == tensor.stride() else tensor


def _shape(tensor: Tensor) -> Tensor:
    return torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")
