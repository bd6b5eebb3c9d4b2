"""Programs: a product traced, split by its dependence on the vector, and compiled in two halves.

What does not depend on the vector runs once a batch and leaves residuals behind; the rest runs once a product. Which
values are worth keeping and which are cheaper computed again is what a minimal cut of the graph tells (the one by which
``torch.compile`` splits training graphs into forward and backward; Chen et al., 2016, "Training deep nets with
sublinear memory cost", have the trade). Both halves are compiled by Inductor.
"""

from __future__ import annotations

import copy
import dataclasses
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, fx

from curvop.kernels.layout import Layout

__all__ = ["Program", "agree", "compile_product"]

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
