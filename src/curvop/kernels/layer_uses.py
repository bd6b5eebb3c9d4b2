r"""Record the layer operations of a forward pass, and bring their inputs and gradients into matrix form.

A layer operation is a linear operation of a parameter: ``linear``, a convolution, an embedding, or a matrix product. A
torch function mode, `UseRecorder`, records each call as a `Use` while the user's code runs. The weight of a use has the
gradient

.. math:: \sum_p g_p a_p^\top,

where p runs over the positions at which the weight is applied, :math:`a_p` is the input of the weight at position p
(for a convolution, a patch of the image), and :math:`g_p` is the derivative with respect to the output at this
position.
`Use` computes the vectors :math:`a_p` and :math:`g_p`. Because operations are recorded, and not modules, the same code
handles tied weights, functional models, and operations inside other modules, such as attention.
"""

from __future__ import annotations

import dataclasses
import math
import types
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, Node, get_gradient_edge
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from curvop.kernels.differentiable import backward_only

__all__ = [
    "NORM",
    "OTHER",
    "UNUSED",
    "Part",
    "Use",
    "UseRecorder",
]

#: Why a parameter has no Kronecker factors: it is not used, it belongs to a normalization, or any other reason.
UNUSED, NORM, OTHER = "unused", "normalization", "other"


class Part(NamedTuple):
    """A parameter, or consecutive rows of a parameter.

    Attributes
    ----------
    name : str
        Name of the parameter.
    rows : tuple of int or None
        Tuple ``(start, stop)``, or None for the whole parameter.
    transposed : bool
        Whether the stored matrix is the transpose of the matrix that the operation uses.
    """

    name: str
    rows: tuple[int, int] | None = None
    transposed: bool = False


@dataclasses.dataclass(frozen=True)
class Windows:
    """The settings of a convolution, with one entry for each dimension of the images."""

    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]  # as for `functional.pad`: two numbers for each dimension, from the last dimension on
    dilation: tuple[int, ...]

    @property
    def is_pointwise(self) -> bool:
        """Whether each patch is one pixel, and each pixel is one patch."""
        return all(size == 1 for size in (*self.kernel, *self.stride)) and not any(self.padding)

    def padded(self, x: Tensor) -> Tensor:
        """Return the images with their zero padding."""
        return functional.pad(x, self.padding) if any(self.padding) else x

    def patches(self, x: Tensor, groups: int) -> Tensor:
        """Return the patches of images ``x`` of shape (N, C, ...), as a view of shape (N, ..., groups, C/groups, ...).

        The images must be padded.
        """
        first, channel, *steps = x.stride()
        per_group = x.shape[1] // groups
        sizes, positions, offsets = self._layout(x.shape[2:], steps)
        return x.as_strided(
            (len(x), *sizes, groups, per_group, *self.kernel),
            (first, *positions, channel * per_group, channel, *offsets),
        )

    def patches_by_offset(self, x: Tensor, groups: int) -> Tensor:
        """Return the patches as a view of shape (N, ..., groups, ..., C/groups), with the channels on the last axis.

        They are copied faster than those of `patches`, because all channels of a pixel are consecutive in memory.
        """
        x = x.movedim(1, -1).contiguous()
        first, *steps, _ = x.stride()
        per_group = x.shape[-1] // groups
        sizes, positions, offsets = self._layout(x.shape[1:-1], steps)
        return x.as_strided(
            (len(x), *sizes, groups, *self.kernel, per_group), (first, *positions, per_group, *offsets, 1)
        )

    def _layout(self, shape: Sequence[int], steps: Sequence[int]) -> tuple[list[int], list[int], list[int]]:
        """Return the numbers of patches, and the strides between patches and between the entries of a patch."""
        sizes = [
            (size - dilation * (kernel - 1) - 1) // stride + 1
            for size, kernel, stride, dilation in zip(shape, self.kernel, self.stride, self.dilation, strict=True)
        ]
        positions = [step * stride for step, stride in zip(steps, self.stride, strict=True)]
        return sizes, positions, [step * dilation for step, dilation in zip(steps, self.dilation, strict=True)]


@dataclasses.dataclass(eq=False)
class Use:
    """One call of a layer operation.

    Attributes
    ----------
    weight, bias : Part or None
        The selected parameters that the operation uses.
    groups, outputs, inputs : int
        The weight is a stack of ``groups`` matrices of shape (outputs, inputs).
    input : Tensor
        The input of the operation: indices for an embedding.
    edge : GradientEdge
        The place of the output in the autograd graph. Later operations may modify the output in place.
    sources : list of GradientEdge
        The places of the operands other than `weight` and `bias`.
    shape : torch.Size
        Shape of the output.
    axis : int
        Axis of the output with the entries of one position. For matrix products, also the axis of the input.
    dtype : torch.dtype
        Data type of the parameters.
    windows : Windows or None
        The settings of a convolution.
    one_hot : bool
        Whether the inputs are unit vectors, given by their indices.
    padding_idx : int or None
        An embedding does not differentiate the row with this index.
    is_norm : bool
        Whether the use is the affine part of a normalization: one group for each feature, with one input and output.
        Then `input` contains the normalized features.
    """

    weight: Part | None
    bias: Part | None
    groups: int
    outputs: int
    inputs: int
    input: Tensor
    edge: GradientEdge
    sources: list[GradientEdge]
    shape: torch.Size
    axis: int = -1
    dtype: torch.dtype = torch.float32
    windows: Windows | None = None
    one_hot: bool = False
    padding_idx: int | None = None
    is_norm: bool = False

    def __post_init__(self) -> None:
        self._version = self.input._version

    def move(self, output: Tensor, sources: list[GradientEdge]) -> None:
        """Move the use of an embedding to `output`, the sum of its output and another tensor with more positions."""
        self.check_version()
        self.input, self.shape = self.input.expand(output.shape[:-1]), output.shape
        self.edge, self.sources = get_gradient_edge(output), sources
        self._version = self.input._version

    @property
    def position_shape(self) -> list[int]:
        """Shape of the output without the axis of its features. Every entry is a position."""
        shape = list(self.shape)
        del shape[self.axis]
        return shape

    @property
    def signature(self) -> tuple[object, ...]:
        """Tuple that is equal for uses with the same shapes and parameters."""
        return self.weight, self.bias, self.shape, self.axis

    def check_version(self) -> None:
        """Raise a RuntimeError if the input was modified in place after the call."""
        if self.input._version != self._version:
            raise RuntimeError(
                f"the model modifies the input of the layer with the parameter {self.name!r} in place after the layer "
                "has used it, so the layer has no gradient: remove the in-place operation"
            )

    @property
    def name(self) -> str:
        """Name of the first parameter."""
        part = self.weight or self.bias
        return "" if part is None else part.name

    def by_position(self, gradient: Tensor) -> Tensor:
        """Return the gradient of the output with shape (positions..., outputs of all groups).

        The gradient may have an additional first axis.
        """
        return gradient if self.axis == -1 else torch.movedim(gradient, self.axis, -1)

    def gradients(self, gradient: Tensor) -> Tensor:
        """Return the vectors g in the shape (positions..., groups, outputs)."""
        vectors = self.by_position(gradient)
        return vectors.reshape(*vectors.shape[:-1], self.groups, self.outputs)

    def indices(self) -> Tensor:
        """Return the index of the unit vector a at each position. The index is -1 if a counts as zero."""
        if self.padding_idx is None:
            return self.input
        return self.input.masked_fill(self.input == self.padding_idx, -1)

    @property
    def inputs_key(self) -> tuple[object, ...]:
        """Tuple that is equal for uses with the same vectors a."""
        return id(self.input), self.axis, self.groups, self.windows

    def batched_input(self) -> Tensor:
        """Return the input, in the dtype of the parameters.

        If a convolution has a single image, the axis of the images is added.
        """
        x = self.input.detach()
        x = x.to(self.dtype) if x.is_floating_point() else x
        return x[None] if self.windows is not None and x.ndim == len(self.windows.kernel) + 1 else x

    def vectors(self, x: Tensor) -> Tensor:
        """Return the vectors a for some rows `x` of the input, in the shape (positions..., groups, inputs)."""
        if self.windows is None:
            vectors = self.by_position(x)
            return vectors.reshape(*vectors.shape[:-1], self.groups, self.inputs)
        patches = self.windows.patches(self.windows.padded(x), self.groups)
        return patches.flatten(-1 - len(self.windows.kernel))

    def all_vectors(self) -> Tensor:
        """Return the vectors a of the whole input, in the shape (positions..., groups, inputs)."""
        vectors = self.vectors(self.batched_input())  # a single image has an additional first axis
        return vectors.reshape(*self.position_shape, self.groups, self.inputs)

    @property
    def offsets(self) -> int:
        """Number of entries of a patch that belong to one channel."""
        return 1 if self.windows is None else math.prod(self.windows.kernel)

    def vectors_by_offset(self, x: Tensor) -> Tensor:
        """Return the same as `vectors`, in an order in which the channels of a patch vary fastest."""
        if self.windows is None or self.windows.is_pointwise:
            return self.vectors(x)
        patches = self.windows.patches_by_offset(self.windows.padded(x), self.groups)
        return patches.flatten(-1 - len(self.windows.kernel))

    def vector_entries(self) -> int:
        """Return the number of entries of all vectors a."""
        return math.prod(self.position_shape) * self.groups * self.inputs


class UseRecorder(TorchFunctionMode):
    """Record the layer operations that use some parameters while the context is active.

    Parameters
    ----------
    leaves : dict of str to Tensor
        The parameters by name, as the user's code uses them.

    Attributes
    ----------
    uses : list of Use
        The recorded calls, in their order.
    norms : set of str
        The parameters of normalizations.
    couples_items : bool
        Whether a batch normalization computes statistics of the batch. It then couples the data items.
    """

    def __init__(self, leaves: Mapping[str, Tensor]) -> None:
        super().__init__()
        self._leaves = leaves
        self._names = {id(leaf): name for name, leaf in leaves.items()}
        self._depth = 0
        self.uses: list[Use] = []
        self.norms: set[str] = set()
        self.couples_items = False
        self._embedded: dict[int, tuple[weakref.ref[Tensor], Use]] = {}

    def __enter__(self) -> UseRecorder:
        """Enter the mode. The evaluation may be repeated, so earlier records are discarded."""
        if not self._depth:
            self.uses, self.norms, self.couples_items, self._embedded = [], set(), False, {}
        self._depth += 1
        return super().__enter__()  # type: ignore[no-any-return, no-untyped-call]

    def __exit__(self, *error: Any) -> None:
        """Leave the mode."""
        self._depth -= 1
        super().__exit__(*error)  # type: ignore[no-untyped-call]

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Call `func`, and record the call if it is a layer operation."""
        kwargs = kwargs or {}
        if func is functional.multi_head_attention_forward:
            with self:  # record the projections
                return _ATTENTION(*args, **kwargs)
        if self._embedded and func in _SUMS:
            return self._sum(func, args, kwargs)
        result = func(*args, **kwargs)
        record = _RECORDERS.get(func)
        if record is not None and isinstance(result, Tensor) and result.requires_grad and backward_only():
            record(self, result, *args, **kwargs)
        return result

    def separate(self, outputs: Sequence[Tensor]) -> tuple[list[Use], dict[str, str]]:
        """Return the uses on which `outputs` depend, and the parameters that have other uses or no use.

        Starting from `outputs`, the function searches the autograd graph for the parameters. At each use, the search
        continues with the operands that are not the recorded parameters. It therefore only finds parameters that are
        used in other ways.

        Returns
        -------
        uses : list of Use
        others : dict of str to str
            Maps the name of each parameter that is not described by the uses alone to a reason.
        """
        owners: dict[Node, list[Use]] = {}
        for use in self.uses:
            owners.setdefault(use.edge.node, []).append(use)
        accumulators = {get_gradient_edge(leaf).node: name for name, leaf in self._leaves.items() if leaf.requires_grad}
        reached: set[str] = set()
        live: set[int] = set()
        stack = [get_gradient_edge(output).node for output in outputs if output.requires_grad]
        seen = set(stack)
        while stack:
            node = stack.pop()
            if node in accumulators:
                reached.add(accumulators[node])
            if node in owners:
                live.update(id(use) for use in owners[node])
                parents = [edge.node for use in owners[node] for edge in use.sources]
            else:
                parents = [parent for parent, _ in node.next_functions if parent is not None]
            for parent in parents:
                if parent not in seen:
                    seen.add(parent)
                    stack.append(parent)
        uses = [use for use in self.uses if id(use) in live]
        named = {part.name for use in uses for part in (use.weight, use.bias) if part is not None}
        others = {name: NORM if name in self.norms else OTHER for name in self._leaves if name in reached}
        others |= {name: UNUSED for name in self._leaves if name not in reached and name not in named}
        return uses, others

    # Recording.

    def _part(self, tensor: Any) -> Part | None:
        """Return the parameter that `tensor` is a view of: the whole matrix, its transpose, or some of its rows."""
        if not isinstance(tensor, Tensor) or not tensor.requires_grad:
            return None
        name = self._names.get(id(tensor))
        if name is not None:
            return Part(name)
        leaf = tensor._base
        name = None if leaf is None else self._names.get(id(leaf))
        if leaf is None or name is None or not leaf.is_contiguous() or not leaf.ndim or not leaf.numel():
            return None
        width = leaf.numel() // len(leaf)
        offset = int(tensor.storage_offset() - leaf.storage_offset())
        if leaf.ndim == 1 and tensor.ndim == 1:
            if tensor.stride() == (1,) or len(tensor) == 1:
                return _rows(name, offset, len(tensor), len(leaf))
            return None
        if tensor.ndim != 2 or leaf.ndim == 1:
            return None
        if tensor.shape[1] == width and offset % width == 0 and _has_strides(tensor, (width, 1)):
            return _rows(name, offset // width, len(tensor), len(leaf))
        if tensor.shape == (width, len(leaf)) and offset == 0 and _has_strides(tensor, (1, width)):
            return Part(name, None, True)
        return None

    def _add(
        self,
        z: Tensor,
        x: Tensor,
        weight: Any,
        bias: Any,
        sizes: tuple[int, int, int],
        transposed: bool = False,
        vectors: Tensor | None = None,
        **settings: Any,
    ) -> None:
        """Record a call with output `z` and input `x`, unless it uses none of the parameters.

        `sizes` are the numbers of groups, outputs and inputs. If `vectors` is given, it replaces `x` as the input.
        """
        parts = self._part(weight), self._part(bias)
        own, groups, outputs = parts[0], *sizes[:2]
        if parts[1] is not None and not bias.numel() == (bias.shape or (0,))[-1] == groups * outputs:
            parts = own, None  # the sum with the bias broadcasts it
        if own is not None and transposed:
            own = own._replace(transposed=not own.transposed)
        if own is not None and own.transposed and own.rows is not None:  # columns of the matrix
            own = None
        if own is None and parts[1] is None:
            return
        operands = [x, *(other for other, part in zip((weight, bias), (own, parts[1]), strict=True) if part is None)]
        sources = [get_gradient_edge(part) for part in operands if isinstance(part, Tensor) and part.requires_grad]
        dtype = next(self._leaves[part.name].dtype for part in (own, parts[1]) if part is not None)
        edge = get_gradient_edge(z)
        x = x if vectors is None else vectors
        self.uses.append(Use(own, parts[1], *sizes, x, edge, sources, z.shape, dtype=dtype, **settings))

    def _linear(self, z: Tensor, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> None:  # noqa: A002
        if weight.ndim == 2:
            self._add(z, input, weight, bias, (1, *weight.shape))

    def _matmul(self, z: Tensor, *arguments: Any, **named: Any) -> None:
        values = dict(zip(("input", "other"), arguments, strict=False)) | named
        input, other = values.get("input"), values.get("other", values.get("mat2"))  # noqa: A001
        if len(values) != 2 or not (isinstance(input, Tensor) and isinstance(other, Tensor)):
            return
        if self._part(other) is not None and other.ndim == 2:
            self._add(z, input, other, None, (1, *other.shape[::-1]), True)
        elif self._part(input) is not None and input.ndim == 2 and other.ndim >= 1:
            axis = -1 if other.ndim == 1 else -2
            self._add(z, other, input, None, (1, *input.shape), axis=axis)

    def _reversed_matmul(self, z: Tensor, other: Tensor, input: Tensor) -> None:  # noqa: A002
        self._matmul(z, input, other)

    def _addmm(self, z: Tensor, *arguments: Any, **named: Any) -> None:
        values = dict(zip(("input", "mat1", "mat2"), arguments, strict=False)) | named
        if values.get("alpha", 1) == values.get("beta", 1) == 1:
            weight = values["mat2"]
            self._add(z, values["mat1"], weight, values["input"], (1, *weight.shape[::-1]), True)

    def _embedding(
        self,
        z: Tensor,
        input: Tensor,  # noqa: A002
        weight: Tensor,
        padding_idx: int | None = None,
        max_norm: float | None = None,
        norm_type: float = 2.0,
        scale_grad_by_freq: bool = False,
        sparse: bool = False,
    ) -> None:
        if scale_grad_by_freq:
            return
        count, width = weight.shape
        padding_idx = None if padding_idx is None else padding_idx % count
        recorded = len(self.uses)
        self._add(z, input, weight, None, (1, width, count), True, one_hot=True, padding_idx=padding_idx)
        if len(self.uses) > recorded:
            self._embedded[id(z)] = weakref.ref(z), self.uses[-1]

    def _convolution(
        self,
        z: Tensor,
        input: Tensor,  # noqa: A002
        weight: Tensor,
        bias: Tensor | None = None,
        stride: Any = 1,
        padding: Any = 0,
        dilation: Any = 1,
        groups: int = 1,
    ) -> None:
        dims = weight.ndim - 2
        kernel = tuple(weight.shape[2:])
        stride, dilation = _per_dimension(dims, stride), _per_dimension(dims, dilation)
        if padding == "same":
            totals = [step * (size - 1) for step, size in zip(dilation, kernel, strict=True)]
            sides = [(total // 2, total - total // 2) for total in totals]
        elif padding == "valid":
            sides = [(0, 0)] * dims
        else:
            sides = [(size, size) for size in _per_dimension(dims, padding)]
        windows = Windows(kernel, stride, tuple(size for pair in reversed(sides) for size in pair), dilation)
        sizes = groups, weight.shape[0] // groups, weight[0].numel()
        self._add(z, input, weight, bias, sizes, axis=-1 - dims, windows=windows)

    def _norm(
        self, function: Callable[..., Tensor], axis: int, z: Tensor, x: Tensor, *args: Any, **kwargs: Any
    ) -> None:
        """Record the weight and the bias of a normalization.

        `function` is the normalization, and `axis` is the axis of the features.
        """
        self.couples_items |= bool(kwargs.get("training"))
        own = {name: value for name, value in kwargs.items() if name in ("weight", "bias") and value is not None}
        names = {self._names[id(value)] for value in (*args, *kwargs.values()) if id(value) in self._names}
        self.norms |= names
        parts = {name: self._part(value) for name, value in own.items()}
        if not names or names != {part.name for part in parts.values() if part is not None}:
            return
        features = next(iter(own.values())).shape
        if len(features) != 1 or z.shape[axis] != features[0]:
            return
        kwargs = kwargs | dict.fromkeys(own)
        if kwargs.get("training"):
            args = (None, None, *args[2:])  # do not update the running statistics again
        with torch.no_grad():
            normalized = function(x.detach(), *args, **kwargs)
        self._add(
            *(z, x, own.get("weight"), own.get("bias"), (features[0], 1, 1)),
            axis=axis if axis < 0 else axis - z.ndim,
            is_norm=True,
            vectors=normalized,
        )

    # Sums that broadcast the output of an embedding.

    def _sum(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """Call a function that adds two tensors.

        An embedding of positions has one output for all data items. Its sum with a tensor of the whole batch has one
        gradient for each item. The use is therefore moved from the output of the embedding to the sum.
        """
        moved = []
        pairs: tuple[Any, ...] = (args, args[::-1]) if len(args) == 2 and not kwargs else ()
        for own, other in pairs:
            reference, use = self._embedded.get(id(own), (None, None))
            if use is None or reference is None or reference() is not own or not isinstance(own, Tensor):
                continue
            if get_gradient_edge(own) != use.edge:  # it was modified in place
                continue
            is_variable = isinstance(other, Tensor) and other.requires_grad
            moved.append((use, [get_gradient_edge(other)] if is_variable else []))
        result = func(*args, **kwargs)
        for use, sources in moved:
            if result.shape != use.shape and result.shape[-1:] == use.shape[-1:] and result.requires_grad:
                use.move(result, sources)
        return result


def _rows(name: str, start: int, count: int, total: int) -> Part:
    return Part(name, None if count == total else (start, start + count))


def _has_strides(tensor: Tensor, strides: tuple[int, ...]) -> bool:
    """Return True if a tensor has the given strides on all axes with more than one entry."""
    return all(
        size <= 1 or own == stride for size, own, stride in zip(tensor.shape, tensor.stride(), strides, strict=True)
    )


def _per_dimension(dims: int, setting: Any) -> tuple[int, ...]:
    numbers = tuple(setting) if isinstance(setting, Sequence) else (int(setting),)
    return numbers * dims if len(numbers) == 1 else numbers


_LINEAR = UseRecorder._linear
_MATMUL = UseRecorder._matmul
_RECORDERS: dict[Any, Callable[..., None]] = {
    functional.linear: _LINEAR,
    torch.matmul: _MATMUL,
    torch.mm: _MATMUL,
    Tensor.matmul: _MATMUL,
    Tensor.mm: _MATMUL,
    Tensor.__matmul__: _MATMUL,
    Tensor.__rmatmul__: UseRecorder._reversed_matmul,
    torch.addmm: UseRecorder._addmm,
    Tensor.addmm: UseRecorder._addmm,
    functional.embedding: UseRecorder._embedding,
    torch.conv1d: UseRecorder._convolution,
    torch.conv2d: UseRecorder._convolution,
    torch.conv3d: UseRecorder._convolution,
}


def _norm_recorder(function: Callable[..., Tensor], axis: int) -> Callable[..., None]:
    def record(recorder: UseRecorder, z: Tensor, *args: Any, **kwargs: Any) -> None:
        recorder._norm(function, axis, z, *args, **kwargs)

    return record


_RECORDERS |= {
    functional.layer_norm: _norm_recorder(functional.layer_norm, -1),
    functional.rms_norm: _norm_recorder(functional.rms_norm, -1),
    functional.batch_norm: _norm_recorder(functional.batch_norm, 1),
    functional.group_norm: _norm_recorder(functional.group_norm, 1),
    functional.instance_norm: _norm_recorder(functional.instance_norm, 1),
}
_SUMS = {torch.add, Tensor.add, Tensor.add_, Tensor.__add__, Tensor.__radd__, Tensor.__iadd__}


def _attention() -> Callable[..., Any]:
    """Return a copy of ``multi_head_attention_forward`` that calls the functions of torch one by one.

    The original passes the whole call to a function mode, so that the mode does not see the projections.
    """
    original: Any = functional.multi_head_attention_forward
    names = original.__globals__ | {"has_torch_function": lambda args: False}
    function = types.FunctionType(original.__code__, names, original.__name__, original.__defaults__)
    function.__kwdefaults__ = original.__kwdefaults__
    return function


_ATTENTION = _attention()
