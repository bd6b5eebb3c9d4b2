"""The compiled engine: if the objective can be traced, compile one program for each shape of batch.

The engine traces the computation of a product, splits the traced graph into two halves, and compiles each half with
Inductor. The first half does not depend on the vector, so the engine runs it once per batch. The first half returns
residuals: the intermediate values that the second half reads. The second half runs once per product. A minimal cut of
the graph decides which values are stored as residuals and which are recomputed. ``torch.compile`` uses the same
algorithm to split a training graph into forward and backward. The trade-off between memory and recomputation is
discussed in Chen, Xu, Zhang and Guestrin, "Training deep nets with sublinear memory cost", 2016, arXiv:1604.06174.
"""

from __future__ import annotations

import copy
import dataclasses
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from curvop.kernels.differentiable import TwiceDifferentiable
from curvop.kernels.kernel import Kernel, Linearization
from curvop.kernels.losses import check_loss
from curvop.kernels.objective import Buffers
from curvop.kernels.parameters import Layout
from curvop.kernels.passes import precision, same
from curvop.kernels.recorded import agree

__all__ = ["CompiledKernel", "Program", "compile_product"]

# Largest number of programs for one shape of batch. If more programs are needed, a setting of the model probably
# changes with every batch.
_MAX_PROGRAMS = 4


class CompiledKernel(Kernel):
    """Linearize batches with compiled programs, or with the wrapped kernel if no program is available.

    Parameters
    ----------
    kernel : Kernel
        The kernel whose products are compiled.
    """

    compiled = True
    worth_batching = 2e-3  # seconds per column; for slower products, batching saves less time than compilation takes

    def __init__(self, kernel: Kernel) -> None:
        self.objective, self.rows, self.cols = kernel.objective, kernel.rows, kernel.cols
        self.symmetric, self.by_batch = kernel.symmetric, kernel.by_batch
        self._kernel = kernel
        self._programs: dict[tuple[object, ...], tuple[Program, Any] | None] = {}
        self._warned = False
        self._gave_up = False

    @property
    def seconds(self) -> float:
        """Seconds spent on compilation so far."""
        return sum(compiled[0].seconds for compiled in self._programs.values() if compiled is not None)

    def __getstate__(self) -> dict[str, object]:
        return self.__dict__ | {"_programs": {}}

    def adjoint(self) -> Kernel:
        """Return a compiled kernel for the adjoint matrix."""
        return CompiledKernel(self._kernel.adjoint())

    def scale(self, weight: float) -> float:
        """Call ``scale`` of the wrapped kernel."""
        return self._kernel.scale(weight)

    def divisor(self, weights: Sequence[float]) -> float:
        """Call ``divisor`` of the wrapped kernel."""
        return self._kernel.divisor(weights)

    def check_count(self, count: int) -> None:
        """Raise a ValueError if the wrapped kernel requires a number of batches other than `count`."""
        self._kernel.check_count(count)

    def move(self) -> bool:
        """Call ``move`` of the wrapped kernel and return the result. If the result is True, discard all programs."""
        moved = self._kernel.move()
        if moved:
            self._programs.clear()
        return moved

    def buffers(self, leaves: Mapping[str, Tensor], index: int, batch: Any) -> Buffers:
        """Return the tensors, other than `leaves` and the batch, that a product of the wrapped kernel reads."""
        return self._kernel.buffers(leaves, index, batch)

    def product(
        self,
        leaves: Mapping[str, Tensor],
        buffers: Buffers,
        batch: Any,
        tangents: Sequence[Tensor],
    ) -> tuple[Tensor, Any, Sequence[Tensor | None]]:
        """Compute the loss, the prediction and one product with the wrapped kernel."""
        return self._kernel.product(leaves, buffers, batch, tangents)

    def prepare(self, leaves: Mapping[str, Tensor], index: int, batch: Any) -> None:
        """Compile a program for batches with the same tensor shapes as `batch`, unless such a program exists."""
        self._inputs_and_program(leaves, index, batch)

    def linearize(self, leaves: Mapping[str, Tensor], index: int, batch: Any) -> Linearization:
        """Linearize one batch, with a compiled program if possible."""
        for _ in range(2):
            found = self._inputs_and_program(leaves, index, batch)
            if found is None:
                return self._kernel.linearize(leaves, index, batch)
            inputs, (program, prediction) = found
            [loss], residuals = program.linearize([part.detach() for part in inputs if isinstance(part, Tensor)])
            if index or same([float(loss)], [float(self._loss(leaves, batch))], precision(loss, *leaves.values())):
                return _Residuals(loss, self.objective.weight(prediction, index, batch), program, residuals)
            # The loss depends on a value that has changed but is not part of the keys of the programs (a global
            # variable or an entry of a dictionary, for example): compile again.
            self._programs.clear()
        self._give_up(
            "the compiled loss differs from the objective's, because it draws random numbers or counts its calls"
        )
        return self._kernel.linearize(leaves, index, batch)

    def _inputs_and_program(
        self, leaves: Mapping[str, Tensor], index: int, batch: Any
    ) -> tuple[list[Any], tuple[Program, Any]] | None:
        """Return the inputs and the program for a batch, as a tuple ``(inputs, (program, prediction))``.

        Here, `inputs` is a flat list of all values that the program may read, and `prediction` is a copy of the
        prediction on the meta device. Return None if there is no program for inputs of these shapes.
        """
        if len({value.device for value in leaves.values()}) > 1:
            self._warn("parameters are on several devices")
            return None
        inputs, structure = pytree.tree_flatten((dict(leaves), self.buffers(leaves, index, batch), batch))
        if unknown := [part for part in inputs if not _is_known(part)]:
            # An object of unknown type may hold tensors that tracing misses, or values that the program depends on.
            self._warn(f"a batch holds a {type(unknown[0]).__name__}")
            return None
        shapes = (tuple(map(_input_key, inputs)), str(structure))
        key = (*shapes, self.objective.mode())
        if key not in self._programs and sum(known[:2] == shapes for known in self._programs) == _MAX_PROGRAMS:
            self._give_up("a setting of the model changes with every batch")
        if self._gave_up:
            return None
        if key not in self._programs:
            if not self._kernel.linearize(leaves, index, batch).weight:
                return None  # a program cannot be verified with a batch of weight 0: wait for the next batch
            self._programs[key] = self._compile(leaves, index, batch, inputs, structure)
        program = self._programs[key]
        return None if program is None else (inputs, program)

    def _loss(self, leaves: Mapping[str, Tensor], batch: Any) -> Tensor:
        """Compute the loss of a batch without a compiled program."""
        buffers = self.objective.buffers(leaves)
        try:
            with torch.no_grad():
                return self.objective.traced(leaves, buffers, batch)[0]
        except RuntimeError:  # the objective contains derivatives, which cannot be computed within no_grad
            with torch.enable_grad():
                return self.objective.traced(leaves, buffers, batch)[0].detach()

    def _compile(
        self, leaves: Mapping[str, Tensor], index: int, batch: Any, inputs: list[Any], structure: Any
    ) -> tuple[Program, Any] | None:
        """Compile and verify a program for inputs that have the shapes of `inputs`.

        Return ``(program, prediction)``, where `prediction` is a copy of the prediction on the meta device. Return None
        if the compilation or the verification fails.
        """
        positions = [position for position, part in enumerate(inputs) if isinstance(part, Tensor)]
        selected = {*self.rows.names, *self.cols.names}
        shape: Any = None

        def product(
            tensors: Sequence[Tensor], tangents: Sequence[Tensor]
        ) -> tuple[Sequence[Tensor], Sequence[Tensor | None]]:
            nonlocal shape
            parts = list(inputs)
            for position, tensor in zip(positions, tensors, strict=True):
                parts[position] = tensor.detach().requires_grad_(inputs[position].requires_grad)
            values, buffers, batch = pytree.tree_unflatten(parts, structure)
            point = {name: value.detach().requires_grad_(name in selected) for name, value in values.items()}
            with torch.enable_grad(), TwiceDifferentiable(self.objective.evaluator.elementary_norms):
                loss, prediction, cotangents = self._kernel.product(point, buffers, batch, tangents)
                check_loss(loss, index)
                shape = pytree.tree_map_only(Tensor, _shape, prediction)
                return [loss.detach()], cotangents

        def clones() -> list[Tensor]:  # a program may write to its inputs
            return [_clone(inputs[position].detach()) for position in positions]

        numbers = torch.arange(self.cols.size, dtype=torch.float32, device=self.objective.device).sin()
        vector = self.cols.at(numbers.to(self.objective.dtype), index).contiguous()
        try:
            program = compile_product(product, clones(), vector, self.cols, self.rows)
            _, residuals = program.linearize(clones())
            reference = self._kernel.linearize(leaves, index, batch)
            expected = reference.apply(self.cols.split(vector))
            third = reference.apply(self.cols.split(vector / 3))  # `agree` estimates rounding errors from this product
            if not agree(self.rows.split(program.apply(residuals, vector)), expected, third):
                raise RuntimeError("the compiled product differs from autograd's")
            return program, shape
        except Exception as error:  # if the objective itself causes the error, autograd raises it again
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


def _input_key(part: Any) -> object:
    """Return the properties of one input. Two calls can share a program only if these properties are equal."""
    if not isinstance(part, Tensor):
        return type(part), repr(part)  # repr distinguishes -0.0 from 0.0
    return part.shape, part.stride(), part.dtype, part.device, part.requires_grad


def _clone(tensor: Tensor) -> Tensor:
    """Return a clone of `tensor`. If the clone has other strides (as for an expanded tensor), return `tensor`."""
    clone = tensor.clone()
    return clone if clone.stride() == tensor.stride() else tensor


def _shape(tensor: Tensor) -> Tensor:
    return torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")


# These settings of torch's min-cut partitioner are turned off, so that it can recompute elementwise operations wherever
# their results are used. Turning them off halves the size of the residuals and does not slow down products.
_BANS = ("ban_recompute_used_far_apart", "ban_recompute_long_fusible_chains", "ban_recompute_materialized_backward")

# With layout optimization, Inductor would run convolutions in channels_last and copy the weights in every product.
_OPTIONS: dict[str, Any] = {"layout_optimization": False}

#: A function ``(inputs, tangents) -> (extras, cotangents)``. Extras are results that do not depend on the tangents,
#: such as the loss. The first half of a program computes the extras. A cotangent that is zero may be None.
Product = Callable[[Sequence[Tensor], Sequence[Tensor]], tuple[Sequence[Tensor], Sequence[Tensor | None]]]


@dataclasses.dataclass
class Program:
    """A matrix-vector product that is compiled in two halves.

    The first half, `linearize`, runs once per batch. The second half, `apply`, runs once per vector. Vectors and
    products are flat: one tensor holds the entries of all parameters. In compiled code, splitting a flat vector into
    one tensor for each parameter costs nothing, and the result for each parameter is written directly to its place in
    the flat product.

    Attributes
    ----------
    seconds : float
        Time spent on tracing and compilation.
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
        """Run the first half of the program and return ``(extras, residuals)``; pass the residuals to `apply`."""
        with torch.no_grad():
            values = list(self._first(*(inputs[index] for index in self._inputs)))
        return values[: self._extras], values[self._extras :]

    def apply(self, residuals: Sequence[Tensor], vector: Tensor) -> Tensor:
        """Return the product of the matrix with a vector of shape ``(N,)``."""
        with torch.no_grad():
            return self._second(*residuals, vector)[0]

    def apply_many(self, residuals: Sequence[Tensor], vectors: Tensor) -> Tensor:
        """Multiply the matrix by K vectors, which are the rows of `vectors`, a tensor of shape ``(K, N)``.

        Compile a program for K vectors, unless a program for K to 2 K vectors exists. If K is larger than 4, it is
        rounded up to a multiple of 8.

        Raises
        ------
        RuntimeError
            If an operation cannot be batched, or if the compiled products differ from products with single vectors.
        """
        count = len(vectors)
        # Columns are padded with zeros rather than compiling a program for every number of columns.
        rounded = count if count <= 4 else -(-count // 8) * 8
        size = min((size for size in self._many if count <= size <= 2 * count), default=rounded)
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
                    raise RuntimeError("the batched product differs from products with single vectors")
                self._many[size] = program
                self.seconds += time.perf_counter() - began
            return self._many[size](*residuals, padded)[0][:count]


def compile_product(product: Product, inputs: Sequence[Tensor], vector: Tensor, cols: Layout, rows: Layout) -> Program:
    """Trace and compile `product` for tensors with the shapes of `inputs` and `vector`.

    The layouts `cols` and `rows` describe how the vector and the product are divided among the parameters.

    Raises
    ------
    Exception
        Any exception that torch raises if it cannot trace, split or compile an operation.
    """
    began = time.perf_counter()
    with _ignore_warnings():
        graph, extras = _trace(product, inputs, vector, cols, rows)
        first, second = _split(graph, len(inputs), extras, [*inputs, vector])
        used = [_input_number(node) for node in _placeholders(first)]
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
    """Compile `linear`, the second half of a program, for ``len(vectors)`` vectors at once."""
    from torch.fx.experimental.proxy_tensor import make_fx

    axes = (*(None for _ in residuals), 0)
    with _ignore_warnings():
        graph = make_fx(torch.func.vmap(linear, axes), tracing_mode="fake")(*residuals, vectors)
        return _inductor(graph, [*residuals, vectors])


def _padded(vectors: Tensor, size: int) -> Tensor:
    """Append zero rows until there are `size` rows. Compiled programs require the result to be contiguous."""
    missing = size - len(vectors)
    return torch.cat([vectors, vectors.new_zeros(missing, vectors.shape[1])]) if missing else vectors.contiguous()


def _trace(
    product: Product, inputs: Sequence[Tensor], vector: Tensor, cols: Layout, rows: Layout
) -> tuple[fx.GraphModule, int]:
    """Trace `product` and return ``(graph, extras)``.

    The graph computes the extras (see `Product`), followed by the product with the vector. The integer `extras` is the
    number of extras.
    """
    import torch._inductor.lowering  # needed by the decompositions of pooling
    from torch._inductor.decomposition import select_decomp_table
    from torch.fx.experimental.proxy_tensor import make_fx

    extras = 0

    def whole(inputs: Sequence[Tensor], vector: Tensor) -> list[Tensor]:
        nonlocal extras
        outputs, cotangents = product(inputs, cols.split(vector))
        extras = len(outputs)
        return [*outputs, rows.join(cotangents, vector)]

    # Trace twice: `functionalize`, which removes in-place operations, does not allow tensors that require grad. The
    # first graph contains no such tensors.
    graph = make_fx(whole, tracing_mode="fake")(inputs, vector)
    functional = torch.func.functionalize(graph)
    graph = make_fx(functional, tracing_mode="fake", decomposition_table=select_decomp_table())(inputs, vector)
    return graph, extras


def _split(graph: fx.GraphModule, inputs: int, extras: int, examples: list[Tensor]) -> tuple[Any, Any]:
    """Split a traced graph into the two halves of a program.

    The first half computes extras and residuals from the inputs. The second half computes the product from the
    residuals and the vector.
    """
    from torch._functorch import config
    from torch._functorch.partitioners import min_cut_rematerialization_partition

    nodes = list(graph.graph.nodes)
    placeholders = _placeholders(graph)
    for index, node in enumerate(placeholders):  # the partitioner distinguishes inputs from vectors by these names
        number = index if index < inputs else index - inputs
        node.name = node.target = f"{'primals' if index < inputs else 'tangents'}_{number + 1}"
    dependent = set(placeholders[inputs:])  # nodes that depend on the vector
    for node in nodes:
        if any(parent in dependent for parent in node.all_input_nodes):
            dependent.add(node)
    output = nodes[-1]
    boundary = [
        node
        for node in nodes
        if node.op == "call_function" and node not in dependent and any(user in dependent for user in node.users)
    ]
    # Let the first half output all values that the second half could read. The partitioner can then cut the graph
    # anywhere before these values.
    outputs, products = list(output.args[0])[:extras], list(output.args[0])[extras:]
    output.args = ((*outputs, *boundary, *products),)
    graph.recompile()
    with config.patch({name: False for name in _BANS if hasattr(config, name)}):
        first, second = min_cut_rematerialization_partition(graph, examples, num_fwd_outputs=extras + len(boundary))
    ending = list(first.graph.nodes)[-1]
    residuals = ending.args[0][extras + len(boundary) :]
    ending.args = ((*ending.args[0][:extras], *map(_bool_to_uint8, residuals)),)
    _uint8_to_bool(second, len(residuals))
    for half in (first, second):
        half.graph.eliminate_dead_code()
        half.recompile()
    return first, second


def _bool_to_uint8(residual: fx.Node) -> fx.Node:
    """Convert a boolean residual to uint8, because vectorized CPU code reads uint8 ten times faster than bool."""
    if residual.meta["val"].dtype != torch.bool:
        return residual
    with residual.graph.inserting_before(list(residual.graph.nodes)[-1]):
        return residual.graph.call_function(torch.ops.prims.convert_element_type.default, (residual, torch.uint8))


def _uint8_to_bool(half: fx.GraphModule, residuals: int) -> None:
    """At the start of the second half, undo the conversions that `_bool_to_uint8` added to the first half."""
    placeholders = _placeholders(half)
    for residual in placeholders[:residuals]:
        if residual.meta["val"].dtype == torch.bool:
            with half.graph.inserting_after(placeholders[-1]):
                arguments = (residual, torch.float32)  # float32, because comparing uint8 is as slow as reading booleans
                number = half.graph.call_function(torch.ops.prims.convert_element_type.default, arguments)
            with half.graph.inserting_after(number):
                truth = half.graph.call_function(torch.ops.aten.ne.Scalar, (number, 0))
            for user in set(residual.users) - {number}:
                user.replace_input_with(residual, truth)


def _placeholders(graph: fx.GraphModule) -> list[fx.Node]:
    return [node for node in graph.graph.nodes if node.op == "placeholder"]


def _input_number(node: fx.Node) -> int:
    return int(node.name.rsplit("_", 1)[1]) - 1


@contextmanager
def _ignore_warnings() -> Iterator[None]:
    """Hide Inductor's warnings, which address users who call Inductor themselves."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
