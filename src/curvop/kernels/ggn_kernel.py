r"""Matrices :math:`\sum_b J_b^\top M_b J_b`, where :math:`J_b` is the Jacobian of the prediction for batch b.

A product with the transposed Jacobian, :math:`u \mapsto J^\top u`, is one backward pass. This map is linear in `u`, and
the transpose of its derivative with respect to `u` is `J`. Therefore a second backward pass, through the graph of the
first one, computes ``J v``. Computing ``J v`` in this way needs neither forward-mode differentiation nor a second
evaluation of the model. A product with `J`, or with its transpose, costs two thirds of a gradient.

`GGNKernel` computes the generalized Gauss-Newton matrix, for which `M` is the Hessian of the loss with respect to the
prediction (Schraudolph, "Fast curvature matrix-vector products for second-order gradient descent", Neural Computation
14(7), 2002, section 3, DOI 10.1162/08997660260028683).
"""

from __future__ import annotations

import abc
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from curvop.kernels.batches import map_leaves, signature
from curvop.kernels.cross_entropy import SoftmaxHessian, is_small
from curvop.kernels.graph import LinearMap
from curvop.kernels.kernel import GraphLinearization, Kernel, Linearization
from curvop.kernels.model_objective import ModelObjective
from curvop.kernels.objective import BatchLoss, Buffers

__all__ = [
    "JVP",
    "GGNKernel",
    "GGNLikeKernel",
    "OutputHessian",
    "Parts",
    "can_overwrite",
    "couples_examples",
    "cut_off",
    "outputs_of",
]

Parts = Sequence[Tensor | None]


class JVP:
    """The Jacobian-vector product ``v -> J v`` of a prediction with respect to parameters.

    Parameters
    ----------
    outputs : sequence of Tensor
        The floating-point tensors of the prediction.
    params : sequence of Tensor
        The parameters.
    at_zero : bool
        If True, the linear map ``u -> J' u`` is differentiated at ``u = 0``. If False, it is differentiated at a vector
        `u` without zero entries. In exact arithmetic, both derivatives are equal. However, if a backward pass takes the
        logarithm of `u`, it can only be differentiated at a `u` without zero entries. If a backward pass clips `u`, it
        can only be differentiated at zero.

    Attributes
    ----------
    roots : list of Node
        Roots of the autograd graph that the map retains.
    memory : list of Tensor or None
        For each output, the vector `u`, which the map retains but does not read any more, or None. It may be
        overwritten. This saves as much memory as the output occupies. The vector is None unless the output is a matrix
        product. The derivative of the backward pass of a matrix product with respect to `u` does not read `u`.
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
        # The attribute `data` has its own version counter. Autograd does not detect that it is overwritten.
        self.memory = [seed.data if _is_product(output) else None for seed, output in zip(seeds, outputs, strict=True)]

    def __call__(self, vectors: Sequence[Tensor], batched: bool = False) -> Parts:
        """Return ``J v`` for one vector, or for several vectors at once if `batched` is True."""
        return self._map(vectors, batched)


def _is_product(output: Tensor) -> bool:
    """Return True if `output` is the result of a matrix product, as are the logits of most language models.

    Return False if the user's code has registered a hook for the gradient, because a hook may read `u`.
    """
    hooked = any(tensor is not None and tensor._backward_hooks for tensor in (output, output._base))
    node = None if hooked else output.grad_fn
    while node is not None and node.name() in _VIEWS:
        node = node.next_functions[0][0]
    return type(output) is Tensor and node is not None and node.name() in _PRODUCTS


_VIEWS = {f"{name}Backward0" for name in ("View", "UnsafeView", "ReshapeAlias", "Transpose", "Permute", "T")}
_PRODUCTS = {"MmBackward0", "AddmmBackward0"}


def _without_zeros(output: Tensor) -> Tensor:
    """Return a tensor of numbers between 1 and 3, with the shape and dtype of `output`."""
    numbers = torch.arange(output.numel(), dtype=torch.float32, device=output.device)
    return (2 + numbers.cos()).to(output.dtype).view(output.shape)


class OutputHessian(abc.ABC):
    """The symmetric linear map ``w -> M w``, where `w` has one tensor for each floating-point tensor of a prediction.

    Attributes
    ----------
    roots : list of Node
        Roots of the autograd graph that the map retains.
    tensors : list of Tensor
        Tensors that the map retains in addition to the graph.
    used : list of int
        The indices of the tensors of the prediction on which the loss depends.
    """

    roots: Sequence[Any] = ()
    tensors: Sequence[Tensor] = ()
    used: Sequence[int] = (0,)

    @abc.abstractmethod
    def __call__(self, vectors: Parts, batched: bool = False, intact: Sequence[Tensor] | None = None) -> Parts:
        """Return ``M w``.

        Parameters
        ----------
        vectors : sequence of Tensor or None
            For each floating-point tensor of the prediction, a tensor of the same shape, or None in place of a zero
            tensor.
        batched : bool
            If True, all tensors in `vectors` have an additional first dimension.
        intact : sequence of Tensor, optional
            If given, `vectors` may be overwritten, except tensors that share memory with a tensor in `intact`.
        """


class GGNLikeKernel(Kernel):
    r"""Linearize the model on each batch, for products with a block of :math:`J^\top M J`. Subclasses define `M`."""

    symmetric = True
    objective: ModelObjective
    #: Whether the method `extra` returns any tensors.
    has_extra = False

    def __init__(self, objective: ModelObjective, rows: Sequence[str], cols: Sequence[str]) -> None:
        super().__init__(objective, rows, cols)
        self._predictions: dict[object, Any] = {}
        self._at_zero = True

    def move(self) -> bool:
        """Change the point `u` at which the linear map ``u -> J' u`` is differentiated; see `JVP`.

        A new kernel uses ``u = 0``. If `u` is zero, replace `u` by a vector without zero entries, and return True.
        Otherwise, set `u` to zero again, and return False.
        """
        self._at_zero = not self._at_zero
        return not self._at_zero

    @abc.abstractmethod
    def output_hessian(
        self, outputs: list[Tensor], extra: Mapping[str, Tensor], loss: BatchLoss, memory: Parts = (None,)
    ) -> OutputHessian:
        """Return `M` for one batch.

        Parameters
        ----------
        outputs : list of Tensor
            The floating-point tensors of the prediction, which are leaves that require grad.
        extra : dict of str to Tensor
            The tensors that the method `extra` returns for this batch. If `product` calls `output_hessian`, the
            dict also contains the tensors of the loss function.
        loss : BatchLoss
            The loss as a function of `outputs`, with the targets of the batch.
        memory : sequence of Tensor or None
            Tensors with the shapes of the outputs that may be overwritten, and retained by the result. None if there is
            no such tensor.
        """

    def num_factors(self, entries: int) -> int:
        """Return the number s of terms in the block ``r_1 r_1' + ... + r_s r_s'`` of `M` for one example.

        By default, s is `entries`, the number of rows of the block.
        """
        return entries

    def check_curvature(self, output_hessian: OutputHessian, outputs: list[Tensor]) -> None:  # optional
        """Record properties of `M` that are needed for a later warning. By default, do nothing."""

    def extra(self, index: int, prediction: Any, batch: Any, y: Any) -> dict[str, Tensor]:
        """Return a dict of additional tensors that are needed to compute `M` for batch number `index` with targets `y`.

        The method uses only the shapes of the tensors in `prediction`, not their values.
        """
        return {}

    def buffers(self, leaves: Mapping[str, Tensor], index: int, batch: Any) -> Buffers:
        """Return a dict with the buffers of the objective and the tensors that the method `extra` returns."""
        buffers = super().buffers(leaves, index, batch)
        if not self.has_extra:
            return buffers
        key = signature(batch)
        if key not in self._predictions:
            prediction = self.objective.predict(leaves, batch)
            self._predictions[key] = map_leaves(lambda part: part.detach().to("meta"), prediction)
        return buffers | {"extra": self.extra(index, self._predictions[key], batch, self.objective.targets(batch))}

    def linearize(self, leaves: Mapping[str, Tensor], index: int, batch: Any) -> Linearization:
        """Return the linearization of batch number `index`."""
        prediction, cut, parts, loss = self.objective.split(leaves, index, batch, cut_off)
        outputs, extra = outputs_of(prediction), self.extra(index, cut, batch, loss.y)
        # The Jacobian-vector product comes first: its temporary tensors are then freed before `M` is computed.
        jvp = JVP(outputs, self.cols.of(leaves), self._at_zero)
        vjp = LinearMap(outputs, self.rows.of(leaves))
        output_hessian = self.output_hessian(parts, extra, loss, jvp.memory)
        if loss.weight:
            self.check_curvature(output_hessian, parts)
        return _GGNLikeLinearization(loss.value, loss.weight, jvp, output_hessian, vjp)

    def product(
        self,
        leaves: Mapping[str, Tensor],
        buffers: Buffers,
        batch: Any,
        tangents: Sequence[Tensor],
    ) -> tuple[Tensor, Any, Parts]:
        """Return ``(loss, prediction, product)`` for a batch; ``product`` is the batch's matrix times `tangents`."""
        prediction, parts, loss, y = self.objective.traced_split(leaves, buffers, batch, cut_off)
        outputs, extra = outputs_of(prediction), buffers["loss"] | buffers.get("extra", {})
        output_hessian = self.output_hessian(parts, extra, BatchLoss(loss, 1.0, loss, y=y))
        jvp = JVP(outputs, self.cols.of(leaves), self._at_zero)
        vjp = LinearMap(outputs, self.rows.of(leaves))
        return loss, prediction, vjp(output_hessian(jvp(tangents)))


def outputs_of(prediction: Any) -> list[Tensor]:
    """Return a list of the floating-point tensors in a prediction.

    This function raises the same exceptions as `cut_off`.
    """
    return _parts(prediction, lambda part: part)[1]


def couples_examples(multiply: Callable[[Tensor], Tensor], blocks: Tensor) -> bool:
    """Return True if the Hessian of a loss with respect to the prediction is not block-diagonal.

    Parameters
    ----------
    multiply : callable
        Product of the Hessian with a tensor of shape (n, c), for n examples with c outputs.
    blocks : Tensor, shape (n, c, c)
        The sums of the blocks of each example: column j is the product with the j-th unit vector of all examples.
    """
    count, outputs = blocks.shape[:2]
    probe = torch.linspace(1, 2, count * outputs, dtype=blocks.dtype, device=blocks.device).cos().view(count, outputs)
    # The tolerance is not relative to the product, because the product may be zero. For example, the blocks of a
    # softmax map constant vectors to zero.
    bound = torch.finfo(blocks.dtype).eps ** 0.5 * float(blocks.norm() * probe.norm())
    if float((multiply(probe) - torch.einsum("nij,nj->ni", blocks, probe)).norm()) <= bound:
        return False
    # A product may be the difference of two numbers that are much larger than the blocks, as for a softmax with one
    # probability near 1. It then has a large rounding error, but not at an example whose vector is zero. Any two
    # examples differ in a bit of their numbers, and the Hessian is symmetric.
    numbers = torch.arange(count, device=blocks.device)[:, None]
    for bit in range((count - 1).bit_length()):
        zero = (numbers >> bit) % 2 == 0
        if not float(multiply(probe.masked_fill(zero, 0.0)).mul(zero).norm()) <= bound:
            return True
    return False


def cut_off(prediction: Any) -> tuple[Any, list[Tensor]]:
    """Detach a prediction from the graph of the model.

    Returns
    -------
    prediction : tree of Tensor
        A copy of the prediction, in which each floating-point tensor is replaced by a new leaf that requires grad.
    parts : list of Tensor
        The new leaves.

    Raises
    ------
    TypeError
        If the prediction contains a complex tensor, or an object of an unknown type (which could contain tensors). Also
        if the prediction contains no floating-point tensor.
    """
    return _parts(prediction, lambda part: part.detach().requires_grad_())


def _parts(prediction: Any, function: Callable[[Tensor], Tensor]) -> tuple[Any, list[Tensor]]:
    parts: list[Tensor] = []

    def visit(part: Any) -> Any:
        if isinstance(part, Tensor) and part.is_floating_point():
            parts.append(function(part))
            return parts[-1]
        if isinstance(part, Tensor) and part.is_complex():
            raise TypeError("a prediction is complex: make the model return its real view, torch.view_as_real")
        if not isinstance(part, Tensor | int | float | str | None):
            raise TypeError(
                f"a prediction holds a {type(part).__name__}: make the model return a tensor, or (nested) mappings, "
                "lists and tuples of tensors (with Hugging Face models, pass use_cache=False)"
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
        self._jvp, self._output_hessian, self._vjp = jvp, output_hessian, vjp

    def _apply(self, tangents: Sequence[Tensor], batched: bool) -> Parts:
        return self._vjp(self._output_hessian(self._jvp(tangents, batched), batched, tangents), batched)


class GGNKernel(GGNLikeKernel):
    """Linearize the model on each batch, for products with a block of the generalized Gauss-Newton matrix."""

    def output_hessian(
        self, outputs: list[Tensor], extra: Mapping[str, Tensor], loss: BatchLoss, memory: Parts = (None,)
    ) -> OutputHessian:
        """Return the Hessian of the loss with respect to the prediction."""
        if loss.weight and loss.closed_form is not None and loss.closed_form.second is not None:
            return _CrossEntropyHessian(loss.closed_form.second(memory[0]), loss.closed_form.axis)
        return _LossHessian(loss.gradient(outputs, create_graph=True), outputs)

    def check_curvature(self, output_hessian: OutputHessian, outputs: list[Tensor]) -> None:
        """Record whether any loss so far has a nonzero second derivative with respect to the prediction."""
        if not self.objective.checks.curved and self.objective.assumes_curvature():
            probes = [torch.linspace(1, 2, part.numel()).cos().to(part).view_as(part) for part in outputs]
            self.objective.checks.curved = any(part is not None and bool(part.any()) for part in output_hessian(probes))


class _LossHessian(OutputHessian):
    def __init__(self, derivative: Parts, outputs: list[Tensor]) -> None:
        self._map = LinearMap(derivative, outputs).check_differentiable()
        self.roots = self._map.roots
        self.used = [index for index, part in enumerate(derivative) if part is not None]

    def __call__(self, vectors: Parts, batched: bool = False, intact: Sequence[Tensor] | None = None) -> Parts:
        return self._map(vectors, batched)


class _CrossEntropyHessian(OutputHessian):
    def __init__(self, hessian: SoftmaxHessian, axis: int) -> None:
        self._hessian, self._axis = hessian, axis
        self.tensors = [hessian.p, hessian.weights]

    def __call__(self, vectors: Parts, batched: bool = False, intact: Sequence[Tensor] | None = None) -> Parts:
        [vector] = vectors
        if vector is None:
            return [None]
        if is_small(vector):
            return [self._hessian.product(vector.movedim(self._axis + batched, -1)).movedim(-1, self._axis + batched)]
        out = vector if intact is not None and can_overwrite(vector, intact) else torch.empty_like(vector)
        w, product = (part.movedim(self._axis + batched, -1) for part in (vector, out))
        for own, result in zip(w, product, strict=True) if batched else [(w, product)]:
            self._hessian.multiply(own, result)
        return [out]


def can_overwrite(tensor: Tensor, intact: Sequence[Tensor]) -> bool:
    """Return True if a Jacobian-vector product can be overwritten without changing the vectors `intact`.

    The product depends linearly on the vectors. A product that shares memory with any other tensor is therefore zero,
    and the maps that overwrite it do not change a zero.
    """
    given = {part.untyped_storage().data_ptr() for part in intact}
    expanded = 0 in tensor.stride()
    return not expanded and tensor.untyped_storage().data_ptr() not in given
