"""The compiled engine: one program for each shape of batch, where the objective can be traced."""

from __future__ import annotations

import copy
import dataclasses
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from curvop.kernels.differentiable import TwiceDifferentiable
from curvop.kernels.kernel import Kernel, Linearization
from curvop.kernels.losses import check_loss
from curvop.kernels.objective import Buffers
from curvop.kernels.parameters import Layout
from curvop.kernels.passes import precision, same

__all__ = ["CompiledKernel", "Program", "agree", "compile_product"]

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

    def buffers(self, leaves: Mapping[str, Tensor], index: int, batch: Any) -> Buffers:
        """Return what a product depends on, as for the wrapped kernel."""
        return self._kernel.buffers(leaves, index, batch)

    def product(
        self,
        leaves: Mapping[str, Tensor],
        buffers: Buffers,
        batch: Any,
        tangents: Sequence[Tensor],
    ) -> tuple[Tensor, Any, Sequence[Tensor | None]]:
        """Return a product from the beginning, as the wrapped kernel makes it."""
        return self._kernel.product(leaves, buffers, batch, tangents)

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
        inputs, structure = pytree.tree_flatten((dict(leaves), self.buffers(leaves, index, batch), batch))
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
        buffers = self.objective.buffers(leaves)
        try:
            with torch.no_grad():
                return self.objective.traced(leaves, buffers, batch)[0]
        except RuntimeError:  # it contains derivatives of its own
            with torch.enable_grad():
                return self.objective.traced(leaves, buffers, batch)[0].detach()

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
            values, buffers, batch = pytree.tree_unflatten(parts, structure)
            point = {name: value.detach().requires_grad_(name in chosen) for name, value in values.items()}
            with torch.enable_grad(), TwiceDifferentiable(self.objective.evaluator.elementary_norms):
                loss, prediction, cotangents = self._kernel.product(point, buffers, batch, tangents)
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


# Programs: a product traced, split by its dependence on the vector, and compiled in two halves.
#
# What does not depend on the vector runs once a batch and leaves residuals behind; the rest runs once a product.
# Which values are worth keeping and which are cheaper computed again is what a minimal cut of the graph tells (the
# one by which ``torch.compile`` splits training graphs into forward and backward; Chen et al., 2016, "Training deep
# nets with sublinear memory cost", have the trade). Both halves are compiled by Inductor.

# Elementwise work may be done again however far from its first use: residuals are half as large, at no cost in time.
_BANS = ("ban_recompute_used_far_apart", "ban_recompute_long_fusible_chains", "ban_recompute_materialized_backward")

# As torch lays it out itself: Inductor would have convolutions in channels_last, and copy the weights for each of them.
_OPTIONS: dict[str, Any] = {"layout_optimization": False}

#: ``(inputs, tangents) -> (extras, cotangents)``; extras are wanted of the first half, cotangents may be None.
Product = Callable[[Sequence[Tensor], Sequence[Tensor]], tuple[Sequence[Tensor], Sequence[Tensor | None]]]


@dataclasses.dataclass
class Program:
    """A product in two halves.

    Vectors go in and come out whole: to cut them up inside costs nothing, and each part is written to its place.

    Attributes
    ----------
    seconds : float
        What tracing and compiling took.
    """

    seconds: float
    _first: Callable[..., Sequence[Tensor]]
    _second: Callable[..., Sequence[Tensor]]
    _linear: fx.GraphModule
    _inputs: list[int]
    _extras: int
    _rows: Layout
    _many: dict[int, Callable[..., Sequence[Tensor]]] = dataclasses.field(default_factory=dict)

    def linearize(self, inputs: Sequence[Tensor]) -> tuple[Sequence[Tensor], list[Tensor]]:
        """Return the extras, and the residuals that `apply` needs."""
        with torch.no_grad():
            values = list(self._first(*(inputs[index] for index in self._inputs)))
        return values[: self._extras], values[self._extras :]

    def apply(self, residuals: Sequence[Tensor], vector: Tensor) -> Tensor:
        """Return the product with a vector ``(N,)``."""
        with torch.no_grad():
            return self._second(*residuals, vector)[0]

    def apply_many(self, residuals: Sequence[Tensor], vectors: Tensor) -> Tensor:
        """Return the products with vectors ``(K, N)``; compiled once for each K.

        Raises
        ------
        RuntimeError
            Where an operation cannot be batched, or is compiled to something else than it is for one column.
        """
        count = len(vectors)
        size = min((size for size in self._many if size >= count), default=count)
        padded = _padded(vectors, size)
        with torch.no_grad():
            if size not in self._many:
                began = time.perf_counter()
                try:
                    program = _batched(self._linear, residuals, padded)
                except Exception as error:
                    raise RuntimeError(f"the product cannot be batched: {error}") from error
                singles = torch.stack([self.apply(residuals, vector) for vector in padded])
                if not agree(self._rows.split(program(*residuals, padded)[0]), self._rows.split(singles)):
                    raise RuntimeError("the batched product is compiled wrongly")
                self._many[size] = program
                self.seconds += time.perf_counter() - began
            return self._many[size](*residuals, padded)[0][:count]


def agree(these: Sequence[Tensor | None], those: Sequence[Tensor | None], thirds: Sequence[Tensor | None] = ()) -> bool:
    """Whether two products are the same up to rounding, parameter by parameter.

    `thirds`, those of a third of the vector, tell how much rounding there is in `those`.
    """
    thirds = thirds or those
    rounding = [
        0.0 if other is None or third is None or third is other else float(torch.linalg.vector_norm(3 * third - other))
        for other, third in zip(those, thirds, strict=True)
    ]
    total = sum((float(torch.linalg.vector_norm(other)) for other in those if other is not None), 0.0)
    for one, other, noise in zip(these, those, rounding, strict=True):
        if one is None and other is None:
            continue
        part = other if one is None else one
        eps = torch.finfo(cast("Tensor", part).dtype).eps
        difference = part if one is None or other is None else one - other
        size = 0.0 if other is None else float(torch.linalg.vector_norm(other))
        # What is not finite differs from nothing: the engine tells it.
        if float(torch.linalg.vector_norm(cast("Tensor", difference))) > eps**0.5 * size + 100 * (
            eps * (total + eps) + noise
        ):
            return False
    return True


def compile_product(product: Product, inputs: Sequence[Tensor], vector: Tensor, cols: Layout, rows: Layout) -> Program:
    """Trace `product` for tensors of these shapes, and compile it for vectors laid out as `cols` and `rows`.

    Raises
    ------
    Exception
        Whatever torch says of an operation that cannot be traced, split or compiled.
    """
    began = time.perf_counter()
    with _quiet():
        graph, extras = _traced(product, inputs, vector, cols, rows)
        first, second = _split(graph, len(inputs), extras, [*inputs, vector])
        used = [_number(node) for node in _placeholders(first)]
        with torch.no_grad():
            first_half = _inductor(first, [inputs[index] for index in used])
            residuals = list(first_half(*(inputs[index] for index in used)))[extras:]
            second_half = _inductor(second, [*residuals, vector])
    return Program(time.perf_counter() - began, first_half, second_half, second, used, extras, rows)


def _inductor(graph: fx.GraphModule, examples: Sequence[Tensor]) -> Callable[..., Sequence[Tensor]]:
    from torch._inductor import compile as inductor

    compiled: Callable[..., Sequence[Tensor]] = inductor(copy.deepcopy(graph), list(examples), options=_OPTIONS)
    return compiled


def _batched(linear: fx.GraphModule, residuals: Sequence[Tensor], vectors: Tensor) -> Callable[..., Sequence[Tensor]]:
    """Return the second half for as many columns as there are vectors."""
    from torch.fx.experimental.proxy_tensor import make_fx

    axes = (*(None for _ in residuals), 0)
    with _quiet():
        graph = make_fx(torch.func.vmap(linear, axes), tracing_mode="fake")(*residuals, vectors)
        return _inductor(graph, [*residuals, vectors])


def _padded(vectors: Tensor, size: int) -> Tensor:
    """Return `size` vectors, in the one layout that programs are compiled for."""
    missing = size - len(vectors)
    return torch.cat([vectors, vectors.new_zeros(missing, vectors.shape[1])]) if missing else vectors.contiguous()


def _traced(
    product: Product, inputs: Sequence[Tensor], vector: Tensor, cols: Layout, rows: Layout
) -> tuple[fx.GraphModule, int]:
    """Return the graph of extras and the product, and how many extras there are."""
    import torch._inductor.lowering  # the decompositions of pooling look it up
    from torch._inductor.decomposition import select_decomp_table
    from torch.fx.experimental.proxy_tensor import make_fx

    extras = 0

    def whole(inputs: Sequence[Tensor], vector: Tensor) -> list[Tensor]:
        nonlocal extras
        wanted, cotangents = product(inputs, cols.split(vector))
        extras = len(wanted)
        return [*wanted, rows.join(cotangents, vector)]

    # In two steps, as nothing can require grad inside of `functionalize`, which takes writes in place out.
    graph = make_fx(whole, tracing_mode="fake")(inputs, vector)
    functional = torch.func.functionalize(graph)
    graph = make_fx(functional, tracing_mode="fake", decomposition_table=select_decomp_table())(inputs, vector)
    return graph, extras


def _split(graph: fx.GraphModule, inputs: int, extras: int, examples: list[Tensor]) -> tuple[Any, Any]:
    """Return the halves: inputs to extras and residuals, residuals and vector to product."""
    from torch._functorch import config
    from torch._functorch.partitioners import min_cut_rematerialization_partition

    nodes = list(graph.graph.nodes)
    placeholders = _placeholders(graph)
    for index, node in enumerate(placeholders):  # the names by which the partitioner tells them apart
        number = index if index < inputs else index - inputs
        node.name = node.target = f"{'primals' if index < inputs else 'tangents'}_{number + 1}"
    on_vector = set(placeholders[inputs:])
    for node in nodes:
        if any(parent in on_vector for parent in node.all_input_nodes):
            on_vector.add(node)
    output = nodes[-1]
    boundary = [
        node
        for node in nodes
        if node.op == "call_function" and node not in on_vector and any(user in on_vector for user in node.users)
    ]
    # All that the second half touches is called an output of the first, so that the cut may lie anywhere before it.
    wanted, products = list(output.args[0])[:extras], list(output.args[0])[extras:]
    output.args = ((*wanted, *boundary, *products),)
    graph.recompile()
    with config.patch({name: False for name in _BANS if hasattr(config, name)}):
        first, second = min_cut_rematerialization_partition(graph, examples, num_fwd_outputs=extras + len(boundary))
    ending = list(first.graph.nodes)[-1]
    residuals = ending.args[0][extras + len(boundary) :]
    ending.args = ((*ending.args[0][:extras], *map(_as_number, residuals)),)
    _from_numbers(second, len(residuals))
    for half in (first, second):
        half.graph.eliminate_dead_code()
        half.recompile()
    return first, second


def _as_number(residual: fx.Node) -> fx.Node:
    """Return a truth value as a number, as large, but ten times faster for vectors to read on a CPU."""
    if residual.meta["val"].dtype != torch.bool:
        return residual
    with residual.graph.inserting_before(list(residual.graph.nodes)[-1]):
        return residual.graph.call_function(torch.ops.prims.convert_element_type.default, (residual, torch.uint8))


def _from_numbers(half: fx.GraphModule, residuals: int) -> None:
    placeholders = _placeholders(half)
    for residual in placeholders[:residuals]:
        if residual.meta["val"].dtype == torch.bool:
            with half.graph.inserting_after(placeholders[-1]):
                arguments = (residual, torch.float32)  # to compare bytes is as slow as to read truth values
                number = half.graph.call_function(torch.ops.prims.convert_element_type.default, arguments)
            with half.graph.inserting_after(number):
                truth = half.graph.call_function(torch.ops.aten.ne.Scalar, (number, 0))
            for user in set(residual.users) - {number}:
                user.replace_input_with(residual, truth)


def _placeholders(graph: fx.GraphModule) -> list[fx.Node]:
    return [node for node in graph.graph.nodes if node.op == "placeholder"]


def _number(node: fx.Node) -> int:
    return int(node.name.rsplit("_", 1)[1]) - 1


@contextmanager
def _quiet() -> Iterator[None]:
    """Leave out what Inductor says to those who call it themselves."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
