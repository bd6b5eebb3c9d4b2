"""Record the operations of a product with one vector, and apply them to one vector or to several vectors at once.

A product with a retained autograd graph consists of a few operations for each node of the graph. If the graph itself
multiplies several vectors at once (``is_grads_batched``), torch repeats operations that do not depend on the vectors,
and copies tensors in order to transpose them. A recorded program avoids both: views of constants are computed once, two
transpositions of a tensor cancel each other, zeros are not added, and results that are not needed are not computed. For
multilayer perceptrons and transformers, a recorded program multiplies 8 vectors in 45% to 85% of the time that the
graph takes.

For one vector, a program runs almost the same operations as the graph, without autograd's work around each operation.
If a model is small, this work takes a third to a half of the time.
"""

from __future__ import annotations

import functools
import gc
import math
import operator
import sys
import time
import types
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, fx, nn
from torch.autograd.function import BackwardCFunction
from torch.autograd.graph import Node
from torch.fx.node import map_aggregate
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakTensorKeyDictionary

from curvop.kernels.graph import nodes

__all__ = ["Parts", "RecordedProducts", "agree", "sums_agree"]

Parts = Sequence[Tensor | None]
#: A function ``(tangents, batched) -> products``.
Apply = Callable[[Sequence[Tensor], bool], Parts]

# Approximate time to record a program, in seconds for each node of the autograd graph.
_SECONDS_PER_NODE = 1e-4

# Number of products of the graph that take as long as the products with which a program is recorded and verified.
_PRODUCTS = 7

# Number of products of the graph that take as long as the products with which a program for single vectors is recorded
# and verified. This program is recorded after the products have taken several times as long as recording takes, because
# it may turn out not to be faster.
_PRODUCTS_FOR_VECTORS, _PATIENCE = 3, 4

# The program for single vectors is used if it takes less than this fraction of the graph's time. Measured times vary.
_GAIN = 0.95

# Largest number of programs for one linearization. Each program is for another number of vectors.
_MAX_PROGRAMS = 4


class RecordedProducts:
    """The products of one linearization with one vector, and with several vectors at once.

    At first, the autograd graph computes the products. For several vectors, a program is recorded for each layout of
    the vectors as soon as the products have taken as long as recording takes. In this way, recording at most doubles
    the total time, even if no further product follows. For single vectors, a program is recorded later. It is used only
    if it is faster and gives the same digits. No digit therefore depends on measured times.

    Attributes
    ----------
    spent : float
        Time that the products have taken so far, in seconds.
    fastest : float
        Time of the fastest product of the graph, in seconds.
    seconds : float
        Time that recording has taken so far, in seconds.
    is_settled : bool
        Whether more products like the last ones will take no less time, because their program has been recorded.
    """

    def __init__(self) -> None:
        self.spent = 0.0
        self.fastest = math.inf
        self.seconds = 0.0
        self.is_settled = False
        self._nodes = 0
        self._gave_up = False
        self._vectors = 0  # number of products of the graph with single vectors
        self._vector_program: _Program | None = None  # used for single vectors
        self._has_tried_vectors = False  # whether nothing more will be recorded for single vectors
        self._block_program: _Program | None = None  # used for several vectors
        self._programs: dict[object, _Program] = {}

    def one(self, apply: Apply, roots: Sequence[Node], tangents: Sequence[Tensor]) -> Parts:
        """Return the product with one vector. The arguments are those of `__call__`, with one tensor per parameter."""
        if self._vector_program is not None and self._vector_program.fits(tangents) and self._vector_program.is_valid():
            return self._vector_program(tangents)
        began = time.perf_counter()
        product = apply(tangents, False)
        seconds = time.perf_counter() - began
        self.spent += seconds
        self.fastest = min(self.fastest, seconds)
        self._vectors += 1
        if not self._has_tried_vectors:
            self._consider_recording(apply, roots, tangents, product)
        return product

    def __call__(self, apply: Apply, roots: Sequence[Node], tangents: Sequence[Tensor]) -> Parts:
        """Return the products with several vectors.

        Parameters
        ----------
        apply : callable
            ``apply(tangents, batched)`` computes the products with the autograd graph. If ``batched`` is True, tangents
            and products have an additional first dimension.
        roots : sequence of Node
            The roots of the graph.
        tangents : sequence of Tensor
            One tensor for each parameter, with an additional first dimension.
        """
        began = time.perf_counter() - self.seconds
        products = self._run(apply, roots, tangents)
        if products is None:
            products = apply(tangents, True)
            self.fastest = min(self.fastest, time.perf_counter() - self.seconds - began)
        self.spent += time.perf_counter() - self.seconds - began
        return products

    @property
    def _cost(self) -> float:
        """Approximate time to record and verify a program, in seconds."""
        return _SECONDS_PER_NODE * self._nodes + _PRODUCTS * self.fastest

    def _run(self, apply: Apply, roots: Sequence[Node], tangents: Sequence[Tensor]) -> Parts | None:
        """Return the products, computed by a recorded program, or None if there is no program yet."""
        self._examine(roots, tangents)
        self.is_settled = self._gave_up or torch.is_autocast_enabled("cpu")
        if self.is_settled or self.spent < self._cost:
            return None
        layout = _layout(tangents)
        program = self._programs.get(layout)
        try:
            if self._block_program is None or self._block_program.is_valid():
                if program is None:
                    return self._record(apply, layout, tangents)
                self.is_settled = program.verified
                return program(tangents) if program.verified else self._verified(apply, program, tangents)
        except Exception:  # if the graph itself causes the error, `apply` raises it again
            pass
        self._gave_up = self.is_settled = self._has_tried_vectors = True
        self._vector_program = self._block_program = None
        self._programs.clear()
        return None

    def _examine(self, roots: Sequence[Node], tangents: Sequence[Tensor]) -> None:
        """Count the nodes of the graph, and find out whether its products can be recorded."""
        if not self._nodes:
            graph = list(nodes(roots))
            self._nodes = len(graph)
            self._gave_up = tangents[0].device.type != "cpu" or any(map(_runs_user_code, graph))

    def _consider_recording(
        self, apply: Apply, roots: Sequence[Node], tangents: Sequence[Tensor], product: Parts
    ) -> None:
        """Record a program for single vectors if enough products make it likely that this saves time.

        `product` is the product of the graph with `tangents`.
        """
        if self._vectors < _PATIENCE * _PRODUCTS_FOR_VECTORS:
            return
        self._examine(roots, tangents)
        if self._gave_up or torch.is_autocast_enabled("cpu"):
            self._has_tried_vectors = True
            return
        cost = _SECONDS_PER_NODE * self._nodes + _PRODUCTS_FOR_VECTORS * self.fastest
        if self._vectors * self.fastest > _PATIENCE * cost:  # the first products take longer than later ones
            self._has_tried_vectors = True
            began = time.perf_counter()
            try:
                probe = _probe(tangents, 1)
                program, expected = _recorded(apply, probe)
                is_equal = _are_equal(program(probe), expected)  # the first run takes longer than later runs
                start = time.perf_counter()
                found = program(tangents)
                is_faster = time.perf_counter() - start < _GAIN * self.fastest
                if is_faster and is_equal and _are_equal(found, product):
                    self._vector_program = program
            except Exception:  # an operation cannot be recorded
                pass
            self.seconds += time.perf_counter() - began

    def _record(self, apply: Apply, layout: object, tangents: Sequence[Tensor]) -> Parts:
        """Compute the products, and record a program that computes products of other vectors with the same layout."""
        if self._block_program is None:
            began = time.perf_counter()
            first, second = (_probe([part[0] for part in tangents], start) for start in (1, 2))
            single = _recorded(apply, first)[0]
            # Compare with another vector, and also check that torch batches the operations correctly.
            pairs = single.batched([torch.stack(parts) for parts in zip(first, second, strict=True)])
            for number, vector in enumerate((first, second)):
                found = [None if pair is None else pair[number] for pair in pairs]
                if not _is_product(lambda parts: apply(parts, False), vector, found):
                    raise _NotRecordableError("the products differ")
            self._block_program = single
            self.seconds += time.perf_counter() - began
        elif len(self._programs) == _MAX_PROGRAMS:
            self.is_settled = True
        elif self.spent > self._cost * (2 + len(self._programs)):
            self._programs[layout], products = _Program.record(self._block_program.batched, tangents)
            return products
        return self._block_program.batched(tangents)

    def _verified(self, apply: Apply, program: _Program, tangents: Sequence[Tensor]) -> Parts:
        """Compute the products, and compare their weighted sum with the product of the weighted sum of the vectors."""
        products = program(tangents)
        began = time.perf_counter()
        if not sums_agree(lambda vector: apply(vector, False), tangents, products):
            raise _NotRecordableError("the products differ")
        program.verified = True
        self.seconds += time.perf_counter() - began
        return products


def sums_agree(apply: Callable[[Sequence[Tensor]], Parts], tangents: Sequence[Tensor], products: Parts) -> bool:
    """Compare the weighted sum of several products with the product of the weighted sum of the vectors.

    Parameters
    ----------
    apply : callable
        Product with a single vector.
    tangents, products : sequence of Tensor or None
        Several vectors, and the products to be checked. All tensors have an additional first dimension.
    """

    def weighted(part: Tensor) -> Tensor:
        weights = torch.linspace(1, 2, len(part), dtype=part.dtype, device=part.device)
        return cast("Tensor", torch.tensordot(weights, part, 1))

    found = [None if part is None else weighted(part) for part in products]
    return _is_product(apply, [weighted(part) for part in tangents], found)


def _is_product(apply: Callable[[Sequence[Tensor]], Parts], vector: Sequence[Tensor], found: Parts) -> bool:
    """Return True if `found` is the product with a vector, up to rounding errors."""
    reference = apply(vector)
    return agree(found, reference) or agree(found, reference, apply([part / 3 for part in vector]))


def agree(
    product: Sequence[Tensor | None], reference: Sequence[Tensor | None], thirds: Sequence[Tensor | None] = ()
) -> bool:
    """Return True if, for each parameter, two products are equal up to rounding errors.

    Parameters
    ----------
    product, reference : sequence of Tensor or None
        One tensor for each parameter, or None in place of a zero tensor.
    thirds : sequence of Tensor or None, optional
        The product of the same matrix with a third of the vector, computed in the same way as `reference`. Three times
        this product differs from `reference` only by rounding errors, so the difference is an estimate of these errors.
    """
    thirds = thirds or reference
    rounding = [
        0.0 if part is None or third is None or third is part else float(torch.linalg.vector_norm(3 * third - part))
        for part, third in zip(reference, thirds, strict=True)
    ]
    total = sum((float(torch.linalg.vector_norm(part)) for part in reference if part is not None), 0.0)
    for part, expected, noise in zip(product, reference, rounding, strict=True):
        if part is None and expected is None:
            continue
        known = cast("Tensor", expected if part is None else part)
        eps = torch.finfo(known.dtype).eps
        difference = known if part is None or expected is None else part - expected
        size = 0.0 if expected is None else float(torch.linalg.vector_norm(expected))
        # If a norm is NaN, the comparison below is False, and the products count as equal. The engine reports NaN and
        # infinity itself.
        if float(torch.linalg.vector_norm(difference)) > eps**0.5 * size + 100 * (eps * (total + eps) + noise):
            return False
    return True


def _are_equal(product: Parts, reference: Parts) -> bool:
    """Return True if two products have the same digits. The signs of zeros may differ."""
    return all(
        part is expected or (part is not None and expected is not None and torch.equal(part, expected))
        for part, expected in zip(product, reference, strict=True)
    )


def _recorded(apply: Apply, vector: Sequence[Tensor]) -> tuple[_Program, Parts]:
    """Record a program for the product of a graph with one vector, and return ``(program, product)``.

    Raises
    ------
    _NotRecordableError
        If an operation cannot be recorded, or if code of the user runs, such as a hook on a tensor. To find such code,
        all Python functions that run are examined. This is not possible while a profiler examines them.
    """
    users: set[str] = set()

    def examine(frame: types.FrameType, event: str, _: object) -> None:
        package = str(frame.f_globals.get("__name__")).partition(".")[0]
        if event == "call" and package not in _OWN and package not in sys.stdlib_module_names:
            users.add(frame.f_code.co_qualname)

    if sys.getprofile() is not None:
        raise _NotRecordableError("a profiler is active")
    collects_garbage = gc.isenabled()
    gc.disable()  # callbacks and finalizers are no part of the product
    sys.setprofile(examine)
    try:
        program, product = _Program.record(lambda parts: apply(parts, False), vector)
    finally:
        sys.setprofile(None)
        if collects_garbage:
            gc.enable()
    if users:
        raise _NotRecordableError(f"{min(users)} may do something else in the next product")
    return program, product


_OWN = {"torch", __name__.partition(".")[0]}


def _runs_user_code(node: Node) -> bool:
    """Return whether the backward pass of a node is a function of the user, which may do more than compute tensors."""
    return isinstance(node, BackwardCFunction) and not type(node)._forward_cls.__module__.startswith("curvop.")


class _NotRecordableError(RuntimeError):
    """Raised if an operation cannot be recorded."""


class _Program:
    """A recorded function of tensors.

    Parameters
    ----------
    function : callable
        The function ``(*constants, *tensors) -> results``.
    constants : list of Tensor
        Tensors that the function reads in addition to its arguments.
    positions : list of int
        The positions of the results among the parts of a product. All other parts are None.
    parts : int
        Number of parts of a product.
    tensors : sequence of Tensor
        The arguments with which the operations were recorded.

    Attributes
    ----------
    verified : bool
        Whether a result has been compared with the autograd graph's.
    """

    def __init__(
        self,
        function: Callable[..., Sequence[Tensor]],
        constants: list[Tensor],
        positions: list[int],
        parts: int,
        tensors: Sequence[Tensor],
    ) -> None:
        self._function = function
        self._constants = constants
        self._versions = [constant._version for constant in constants]
        self._positions = positions
        self._parts = parts
        self._layout = _layout(tensors)
        self.verified = False

    @classmethod
    def record(cls, function: Callable[[Sequence[Tensor]], Parts], tensors: Sequence[Tensor]) -> tuple[_Program, Parts]:
        """Compute ``parts = function(tensors)``, record the operations, and return ``(program, parts)``."""
        with _Recorder(tensors) as recorder:
            parts = function(tensors)
        positions = [position for position, part in enumerate(parts) if part is not None]
        # Outside of the mode, because detaching a tensor within the mode would give it a new version counter.
        steps, constants = recorder.finish([cast("Tensor", parts[position]) for position in positions])
        return cls(steps, constants, positions, len(parts), tensors), parts

    def fits(self, tensors: Sequence[Tensor]) -> bool:
        """Return True if tensors have the memory layout of those with which the operations were recorded."""
        return _layout(tensors) == self._layout

    def is_valid(self) -> bool:
        """Return False if a constant was modified in place. If so, autograd raises an error that explains this."""
        return all(
            constant._version == version for constant, version in zip(self._constants, self._versions, strict=True)
        )

    def __call__(self, tensors: Sequence[Tensor]) -> Parts:
        """Run the recorded operations."""
        return self._spread(self._function(*self._constants, *tensors))

    def batched(self, tensors: Sequence[Tensor]) -> Parts:
        """Run the recorded operations for tensors with an additional first dimension."""
        constants = self._constants
        run = torch.func.vmap(lambda *parts: tuple(self._function(*constants, *parts)))
        if not self._positions:
            return [None] * self._parts
        # warnings.filterwarnings does not hide this warning. Torch cannot tell whether it is enabled, but this is the
        # default.
        warn: Callable[[bool], None] = cast("Any", torch._C._functorch)._set_vmap_fallback_warning_enabled
        warn(False)
        try:
            return self._spread(run(*tensors))
        finally:
            warn(True)

    def _spread(self, results: Sequence[Tensor]) -> Parts:
        parts: list[Tensor | None] = [None] * self._parts
        for position, result in zip(self._positions, results, strict=True):
            parts[position] = result
        return parts


class _Recorder(TorchDispatchMode):
    """Record all operations on tensors while the mode is active.

    Operations that draw random numbers, read values of tensors or modify tensors cannot be recorded.
    """

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._graph = fx.Graph()
        self._nodes = WeakTensorKeyDictionary()  # weak, so that temporary tensors are freed
        self._constants: dict[fx.Node, Tensor] = {}
        self._roots: dict[fx.Node, fx.Node] = {}  # for each view, the node of the tensor that was viewed
        self._views: dict[tuple[object, ...], fx.Node] = {}
        self._viewed: set[fx.Node] = set()  # the nodes whose tensors have views
        self._zeros: set[fx.Node] = set()  # the nodes whose tensors are zero
        self._shared: set[fx.Node] = set()  # the nodes that stand for several tensors with equal entries
        self._inputs = []
        for number, tensor in enumerate(tensors):
            self._nodes[tensor] = node = self._graph.placeholder(f"tensor_{number}")
            self._inputs.append(node)
            self._note_view(node, node, tensor)

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Return False, so that torch does not import its compiler, which takes a second."""
        return False

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Run and record an operation."""
        kwargs = dict(kwargs or {})
        is_alias = any(part.alias_info is not None for part in func._schema.returns) and isinstance(args[0], Tensor)
        written = self._written(func, args, kwargs) if func._schema.is_mutable else set()
        if _UNSUPPORTED & set(func.tags) and not (func is _aten.index.Tensor and _has_integers(args[1])):
            raise _NotRecordableError(f"{func} cannot be recorded")
        if any(isinstance(argument, Tensor) for argument in kwargs.values()):
            raise _NotRecordableError(f"{func} has keyword arguments that are tensors")
        result = func(*args, **kwargs)
        root = self._roots[self._node(args[0])] if is_alias else None
        if root is not None and isinstance(result, Tensor) and not func._schema.is_mutable:
            if root in self._constants:
                return result  # a constant, too: the operation need not run again
            known = self._views.get(_view_key(root, result))
            if known is not None:
                self._nodes[result] = known
                self._viewed.add(root)
                return result
        if func._schema.is_mutable and self._is_alone(args, result) and (functional := _functional(func)) is not None:
            func, root = functional, None
        if func is _aten.add.Tensor and not kwargs and self._merge_sum_with_zero(args, result):
            return result
        if func._schema.is_mutable:
            if written & self._shared:
                raise _NotRecordableError(f"{func} modifies one of several tensors with equal entries")
            self._zeros -= written
        node = self._graph.call_function(func, self._mapped(args), kwargs)
        if func in _ZEROS:
            self._zeros.add(node)
        if isinstance(result, Tensor):
            self._nodes[result] = node
            self._note_view(node, root or node, result)
        elif isinstance(result, tuple | list):
            for number, part in enumerate(result):
                if isinstance(part, Tensor):
                    self._nodes[part] = item = self._graph.call_function(operator.getitem, (node, number))
                    self._note_view(item, root or item, part)
        return result

    def finish(self, results: Sequence[Tensor]) -> tuple[Callable[..., Sequence[Tensor]], list[Tensor]]:
        """Return ``(function, constants)``, where ``function(*constants, *tensors)`` returns the results."""
        self._graph.output([self._node(result) for result in results])
        self._graph.eliminate_dead_code()
        constants = {node: tensor for node, tensor in self._constants.items() if node.users}
        for node in self._constants.keys() - constants.keys():
            self._graph.erase_node(node)
        return _Steps(self._graph), [tensor.detach() for tensor in constants.values()]

    def _written(self, func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> set[fx.Node]:
        """Return the nodes of the tensors that an operation modifies.

        Raises
        ------
        _NotRecordableError
            If a constant or an argument of the recorded function is modified.
        """
        written = set()
        for number, argument in enumerate(func._schema.arguments):
            if argument.alias_info is not None and argument.alias_info.is_write:
                tensor = args[number] if number < len(args) else kwargs.get(argument.name)
                root = self._roots[self._node(tensor)] if isinstance(tensor, Tensor) else None
                if root is None or root in self._constants or root in self._inputs:
                    raise _NotRecordableError(f"{func} modifies a tensor that is not temporary")
                written.add(root)
        return written

    def _merge_sum_with_zero(self, args: tuple[Any, ...], result: Any) -> bool:
        """If a term of a sum is zero, use the node of the other term for the sum as well, and return True.

        Such terms are the second derivatives of ReLU and of other piecewise linear functions.
        """
        for term, other in (args, args[::-1]):
            if not (isinstance(term, Tensor) and isinstance(other, Tensor)):
                continue
            node, is_zero = self._node(term), self._roots[self._node(other)] in self._zeros
            root = self._roots[node]
            is_temporary = root not in self._constants and root not in self._inputs
            if is_zero and is_temporary and _view_key(root, term) == _view_key(root, result):
                self._nodes[result] = node
                self._shared.add(root)
                return True
        return False

    def _is_alone(self, args: tuple[Any, ...], result: Any) -> bool:
        """Return whether an operation modifies its first argument, which is no view and has no views, in its dtype."""
        if result is not args[0]:
            return False
        node, dtypes = self._node(result), {part.dtype for part in args if isinstance(part, Tensor)}
        return self._roots[node] is node and node not in self._viewed and len(dtypes) == 1

    def _mapped(self, arguments: Any) -> Any:
        return map_aggregate(arguments, lambda part: self._node(part) if isinstance(part, Tensor) else part)

    def _node(self, tensor: Tensor) -> fx.Node:
        """Return the node of a tensor. A tensor that no recorded operation has returned is a constant."""
        node = self._nodes.get(tensor)
        if node is None:
            if type(tensor) not in (Tensor, nn.Parameter) or tensor.layout != torch.strided or tensor.is_complex():
                raise _NotRecordableError(f"a {type(tensor).__name__} cannot be a constant")
            with self._graph.inserting_before(self._inputs[0]):
                node = self._graph.placeholder(f"constant_{len(self._constants)}")
            self._nodes[tensor] = node
            self._constants[node] = tensor
            self._roots[node] = node
        return cast("fx.Node", node)

    def _note_view(self, node: fx.Node, root: fx.Node, tensor: Tensor) -> None:
        self._roots[node] = root
        if node is not root:
            self._viewed.add(root)
        self._views.setdefault(_view_key(root, tensor), node)


def _has_integers(indices: Sequence[Tensor | None]) -> bool:
    """Return True if the shape of a selection does not depend on the values of its indices."""
    return all(part is None or part.dtype not in (torch.bool, torch.uint8) for part in indices)


# In-place operations that keep the dtype of their tensor. The new tensor would be of dtype bool.
_BOOLEAN = {"eq", "ne", "lt", "le", "gt", "ge", "logical_and", "logical_or", "logical_xor", "logical_not"}

_UNSUPPORTED = {
    torch.Tag.nondeterministic_seeded,
    torch.Tag.data_dependent_output,
    torch.Tag.dynamic_output_shape,
    torch.Tag.inplace_view,
}


_aten = torch.ops.aten

# Operations that return zeros.
_ZEROS = {_aten.zeros_like.default, _aten.new_zeros.default, _aten.zeros.default}

# Calls of these functions take half as long as calls of the same operations in torch.ops.
_FUNCTIONS: dict[Any, Callable[..., Any]] = {
    _aten._unsafe_view.default: Tensor.view,
    _aten.add.Scalar: torch.add,
    _aten.add.Tensor: torch.add,
    _aten.bmm.default: torch.bmm,
    _aten.div.Tensor: torch.div,
    _aten.expand.default: Tensor.expand,
    _aten.mm.default: torch.mm,
    _aten.mul.Scalar: torch.mul,
    _aten.mul.Tensor: torch.mul,
    _aten.permute.default: torch.permute,
    _aten.sub.Tensor: torch.sub,
    _aten.sum.dim_IntList: torch.sum,
    _aten.t.default: torch.t,
    _aten.transpose.int: torch.transpose,
    _aten.unsqueeze.default: torch.unsqueeze,
    _aten.view.default: Tensor.view,
}


class _Steps:
    """The operations of a graph, as a function of the graph's inputs.

    Tensors and all other arguments of the operations have places in a list. Each step reads its arguments from their
    places, writes its result to another place, and clears the places that no later step reads. Running the steps takes
    a fifth of the time that ``torch.fx.Interpreter`` takes.
    """

    def __init__(self, graph: fx.Graph) -> None:
        self._template: list[Any] = []  # the initial contents of all places
        self._steps: list[_Step] = []
        self._inputs = 0
        known: dict[fx.Node, int] = {}  # for each node, the place of its result
        last: dict[fx.Node, int] = {}  # for each node, the number of its last reader
        nodes = list(graph.nodes)
        for number, node in enumerate(nodes):
            last.update(dict.fromkeys(node.all_input_nodes, number))
        for number, node in enumerate(nodes):
            if node.op == "placeholder":
                known[node] = self._new_place(None)
                self._inputs += 1
            elif node.op == "output":
                self._results = [known[result] for result in node.args[0]]
            else:
                function = _FUNCTIONS.get(node.target, node.target)
                # Single sizes are read faster than a list of sizes.
                flat = function in (Tensor.view, Tensor.expand) and node.args[1]
                arguments = (node.args[0], *node.args[1]) if flat else node.args
                places = [self._place_of(argument, known) for argument in arguments]
                known[node] = place = self._new_place(None)
                unused = [known[read] for read in node.all_input_nodes if last[read] == number]
                function = functools.partial(function, **node.kwargs) if node.kwargs else function
                self._steps.append((function, _getter(places), place, unused))

    def __call__(self, *tensors: Tensor) -> list[Tensor]:
        places = self._template.copy()
        places[: self._inputs] = tensors
        for function, arguments, place, unused in self._steps:
            places[place] = function(*arguments(places))
            for number in unused:
                places[number] = None
        return [places[place] for place in self._results]

    def _new_place(self, value: Any) -> int:
        self._template.append(value)
        return len(self._template) - 1

    def _place_of(self, argument: Any, known: Mapping[fx.Node, int]) -> int:
        """Return the place of an argument of an operation. An additional step forms a list that contains tensors."""
        if isinstance(argument, fx.Node):
            return known[argument]
        if not (isinstance(argument, list | tuple) and any(isinstance(part, fx.Node) for part in argument)):
            # Torch reads tuples faster than the lists of a graph.
            return self._new_place(tuple(argument) if isinstance(argument, list) else argument)
        parts = [self._place_of(part, known) for part in argument]
        place = self._new_place(None)
        self._steps.append((_as_list, _getter(parts), place, []))
        return place


# A function, a function that returns its arguments, the place of its result, and the places that become unused.
_Step = tuple[Callable[..., Any], Callable[[list[Any]], Sequence[Any]], int, list[int]]


def _getter(places: Sequence[int]) -> Callable[[list[Any]], Sequence[Any]]:
    """Return a function that maps a list to the sequence of its entries with the numbers `places`."""
    if len(places) == 1:
        return operator.itemgetter(slice(places[0], places[0] + 1))
    return operator.itemgetter(*places) if places else lambda _: ()


def _as_list(*parts: Any) -> list[Any]:
    return list(parts)


def _functional(func: Any) -> Any:
    """Return the operation that computes the result of an in-place operation as a new tensor, or None.

    Torch can batch more operations of this kind than in-place operations.
    """
    name = func._schema.name.removeprefix("aten::").removesuffix("_")
    if name in _BOOLEAN:
        return None
    found = getattr(getattr(_aten, name, None), func._overloadname, None)
    return None if found is None or found._schema.is_mutable else found


def _view_key(root: fx.Node, tensor: Tensor) -> tuple[object, ...]:
    return root, tensor.shape, tensor.stride(), tensor.storage_offset(), tensor.dtype


def _layout(tensors: Sequence[Tensor]) -> tuple[object, ...]:
    return tuple([(part.shape, part.stride()) for part in tensors])


def _probe(tangents: Sequence[Tensor], start: int) -> list[Tensor]:
    """Return a vector without zeros, with the memory layout and the dtype of `tangents`."""
    vector = []
    for part in tangents:
        numbers = torch.arange(start, part.numel() + start, dtype=torch.float32).sin()
        vector.append(torch.empty_strided(part.shape, part.stride(), dtype=part.dtype).copy_(numbers.view(part.shape)))
    return vector
