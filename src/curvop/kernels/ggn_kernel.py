r"""Matrices that act through the prediction: :math:`\sum_b J_b^\top M_b J_b`, with the model's Jacobian `J`.

The Jacobian's transpose is one backward pass, :math:`u \mapsto J^\top u`. It is linear in `u`, so that its own
derivative by `u`, along the retained graph, is the Jacobian itself: ``J v`` needs no forward-mode derivative and runs
nothing twice. A product costs two thirds of a gradient for each of the two.
"""

from __future__ import annotations

import abc
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from curvop.kernels.batches import map_leaves, signature
from curvop.kernels.graph import LinearMap
from curvop.kernels.kernel import GraphLinearization, Kernel, Linearization
from curvop.kernels.model_objective import ModelObjective
from curvop.kernels.objective import Buffers

__all__ = ["JVP", "GGNKernel", "GGNLikeKernel", "OutputHessian", "Parts", "cut_off", "outputs_of"]

Parts = Sequence[Tensor | None]


class JVP:
    """``v -> J v``: from parameters to the parts of a prediction.

    Parameters
    ----------
    outputs, params : sequence of Tensor
    at_zero : bool
        Where ``u -> J' u`` is differentiated: at ``u = 0``, or at a point without zeros. As the map is linear, its
        derivative is the same, but a formula may have none at zero (that of the logarithm of a cotangent), and others,
        such as those that clip a cotangent, only there.
    """

    def __init__(self, outputs: Sequence[Tensor], params: Sequence[Tensor], at_zero: bool = True) -> None:
        seeds = [
            (torch.zeros_like(output) if at_zero else _without_zeros(output)).requires_grad_() for output in outputs
        ]
        pulled: Parts = [None] * len(params)
        if any(output.requires_grad for output in outputs):
            used = [index for index, output in enumerate(outputs) if output.requires_grad]
            pulled = torch.autograd.grad(
                [outputs[index] for index in used],
                params,
                [seeds[index] for index in used],
                create_graph=True,
                allow_unused=True,
            )
        self._map = LinearMap(pulled, seeds).check_differentiable()
        self.roots = self._map.roots

    def __call__(self, vectors: Sequence[Tensor], batched: bool = False) -> Parts:
        """Multiply."""
        return self._map(vectors, batched)


def _without_zeros(output: Tensor) -> Tensor:
    """Return numbers between 1 and 3 in the shape of `output`."""
    numbers = torch.arange(output.numel(), dtype=torch.float32, device=output.device)
    return (2 + numbers.cos()).to(output.dtype).view(output.shape)


class OutputHessian(abc.ABC):
    """``w -> M w`` on the parts of a batch's prediction; symmetric.

    Attributes
    ----------
    roots : list of Node
        What it keeps of autograd's graph.
    tensors : list of Tensor
        What it keeps besides.
    """

    roots: Sequence[Any] = ()
    tensors: Sequence[Tensor] = ()

    @abc.abstractmethod
    def __call__(self, vectors: Parts, batched: bool = False) -> Parts:
        """Multiply: parts of the prediction's shapes, with a leading dimension more where `batched`."""


class GGNLikeKernel(Kernel):
    """Linearizes batches for products with a block of such a matrix; subclasses say what `M` is."""

    symmetric = True
    objective: ModelObjective
    #: Whether `given` gives anything.
    gives = False

    def __init__(self, objective: ModelObjective, rows: Sequence[str], cols: Sequence[str]) -> None:
        super().__init__(objective, rows, cols)
        self._predictions: dict[object, Any] = {}
        self._at_zero = True

    def move(self) -> bool:
        """Differentiate linear maps at a point without zeros; if they already were, at zero again."""
        self._at_zero = not self._at_zero
        return not self._at_zero

    @abc.abstractmethod
    def output_hessian(
        self, outputs: list[Tensor], batch: Any, given: Mapping[str, Tensor], derivative: Callable[[bool], Parts]
    ) -> OutputHessian:
        """Return `M` for one batch.

        Parameters
        ----------
        outputs : list of Tensor
            The parts of the prediction, leaves that require grad.
        batch : pair
            Input and target.
        given : dict of str to Tensor
            What `given` returns for this batch and, for a program, the loss's own tensors.
        derivative : callable
            ``create_graph -> parts``, the loss's derivative by `outputs`.
        """

    def look(self, output_hessian: OutputHessian, outputs: list[Tensor]) -> None:  # most need not
        """Look at `M` of a batch, for what is to be warned of."""

    def extra(self, index: int, prediction: Any, batch: Any) -> dict[str, Tensor]:
        """Return what else `M` depends on, for batch number `index`; of its prediction only the shape is asked."""
        return {}

    def buffers(self, leaves: Mapping[str, Tensor], index: int, batch: Any) -> Buffers:
        """Return what the objective holds, and what is given."""
        buffers = super().buffers(leaves, index, batch)
        if not self.gives:
            return buffers
        like = signature(batch)
        if like not in self._predictions:
            prediction = self.objective.predict(leaves, batch)
            self._predictions[like] = map_leaves(lambda part: part.detach().to("meta"), prediction)
        return buffers | {"extra": self.extra(index, self._predictions[like], batch)}

    def linearize(self, leaves: Mapping[str, Tensor], index: int, batch: Any) -> Linearization:
        """Return the linearization of one batch."""
        prediction, cut, parts, loss = self.objective.split(leaves, index, batch, cut_off)
        outputs, given = outputs_of(prediction), self.extra(index, cut, batch)
        output_hessian = self.output_hessian(
            parts, batch, given, lambda create_graph: loss.gradient(parts, create_graph)
        )
        if loss.weight:
            self.look(output_hessian, parts)
        jvp = JVP(outputs, self.cols.of(leaves), self._at_zero)
        vjp = LinearMap(outputs, self.rows.of(leaves))
        return _GGNLikeLinearization(loss.value, loss.weight, jvp, output_hessian, vjp)

    def product(
        self,
        leaves: Mapping[str, Tensor],
        buffers: Buffers,
        batch: Any,
        tangents: Sequence[Tensor],
    ) -> tuple[Tensor, Any, Parts]:
        """Return a batch's loss, its prediction and one product."""
        prediction, parts, loss = self.objective.traced_split(leaves, buffers, batch, cut_off)
        outputs = outputs_of(prediction)

        def derivative(create_graph: bool) -> Parts:
            return torch.autograd.grad(loss, parts, create_graph=create_graph, allow_unused=True)

        output_hessian = self.output_hessian(parts, batch, buffers["loss"] | buffers.get("extra", {}), derivative)
        jvp = JVP(outputs, self.cols.of(leaves), self._at_zero)
        vjp = LinearMap(outputs, self.rows.of(leaves))
        return loss, prediction, vjp(output_hessian(jvp(tangents)))


def outputs_of(prediction: Any) -> list[Tensor]:
    """Return the parts of a prediction that can be differentiated; see `cut_off`."""
    return _parts(prediction, lambda part: part)[1]


def cut_off(prediction: Any) -> tuple[Any, list[Tensor]]:
    """Return the prediction with parts that are leaves, and these.

    Raises
    ------
    TypeError
        Where it holds what may depend on the parameters, but cannot be looked into, or nothing that does.
    """
    return _parts(prediction, lambda part: part.detach().requires_grad_())


def _parts(prediction: Any, function: Callable[[Tensor], Tensor]) -> tuple[Any, list[Tensor]]:
    parts: list[Tensor] = []

    def visit(part: Any) -> Any:
        if isinstance(part, Tensor) and part.is_floating_point():
            parts.append(function(part))
            return parts[-1]
        if isinstance(part, Tensor) and part.is_complex():
            raise TypeError("a prediction is complex: let the model return its real view, torch.view_as_real")
        if not isinstance(part, Tensor | int | float | str | None):
            raise TypeError(
                f"a prediction holds a {type(part).__name__}: let the model return a tensor, or (nested) mappings, "
                "lists and tuples of tensors (of Hugging Face's models, with use_cache=False)"
            )
        return part

    mapped = map_leaves(visit, prediction, lambda part: not isinstance(part, Mapping | list | tuple))
    if not parts:
        raise TypeError(
            "a prediction holds no tensor of real numbers: the model must return a tensor, or a tree of tensors"
        )
    return mapped, parts


class _GGNLikeLinearization(GraphLinearization):
    def __init__(self, loss: Tensor, weight: float, jvp: JVP, output_hessian: OutputHessian, vjp: LinearMap) -> None:
        super().__init__(loss, weight, [*jvp.roots, *output_hessian.roots, *vjp.roots], output_hessian.tensors)
        self._jvp, self._middle, self._vjp = jvp, output_hessian, vjp

    def _apply(self, tangents: Sequence[Tensor], batched: bool) -> Parts:
        return self._vjp(self._middle(self._jvp(tangents, batched), batched), batched)


# The generalized Gauss-Newton matrix, :math:`J^\top \nabla^2_z \ell \, J` (Schraudolph, 2002, section 3).


class GGNKernel(GGNLikeKernel):
    """Linearizes batches for products with the Gauss-Newton block of the parameters `rows` and `cols`."""

    def output_hessian(
        self, outputs: list[Tensor], batch: Any, given: Mapping[str, Tensor], derivative: Callable[[bool], Parts]
    ) -> OutputHessian:
        """Return the loss's Hessian by the prediction."""
        return _LossHessian(derivative(True), outputs)

    def look(self, output_hessian: OutputHessian, outputs: list[Tensor]) -> None:
        """Look whether the loss has a second derivative, until it has."""
        if not self.objective.curved:
            probes = [torch.linspace(1, 2, part.numel()).cos().to(part).view_as(part) for part in outputs]
            self.objective.curved = any(part is not None and bool(part.any()) for part in output_hessian(probes))


class _LossHessian(OutputHessian):
    def __init__(self, derivative: Parts, outputs: list[Tensor]) -> None:
        self._map = LinearMap(derivative, outputs).check_differentiable()
        self.roots = self._map.roots

    def __call__(self, vectors: Parts, batched: bool = False) -> Parts:
        return self._map(vectors, batched)
