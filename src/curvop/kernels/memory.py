"""Measure free memory and the memory that linearizations retain; share a memory budget between engines."""

from __future__ import annotations

import ctypes
import os
import weakref
from collections import defaultdict
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor
from torch.autograd.graph import Node

from curvop.kernels.graph import nodes

__all__ = [
    "SHORT_OF_MEMORY",
    "Budget",
    "free_bytes",
    "free_unused",
    "graph_bytes",
    "keep_freed_memory",
    "measured",
    "out_of_memory",
    "peak_rise",
    "tensor_bytes",
]

T = TypeVar("T")

SHORT_OF_MEMORY = (
    "an operator ran out of memory: it caches less and multiplies fewer columns at once from now on, which is slower. "
    "Pass a smaller cache= or columns=, or make data yield smaller batches."
)

# Bytes assumed to be free if the system does not report free memory: enough for small models, safe on any machine.
_UNKNOWN = 2**30
_OUT_OF_MEMORY = (
    "DefaultCPUAllocator",
    "CUDA error: out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_ALLOC_FAILED",
)

# The constants M_TRIM_THRESHOLD and M_MMAP_THRESHOLD from glibc's <malloc.h>.
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
# The trim threshold for which glibc never returns the top of its heap.
_NEVER = -1
# Not empty if this process keeps all freed memory.
_keeps_all: list[bool] = []


def free_bytes(device: torch.device) -> int:
    """Return the number of free bytes on `device`.

    On the CPU, the result also respects the memory limit of the control group (cgroup) of this process.
    """
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    limits = [_available(), *_cgroup_v2(), *_cgroup_v1()]
    return max(0, min((limit for limit in limits if limit is not None), default=_UNKNOWN))


def out_of_memory(error: BaseException) -> bool:
    """Return True if an error means that memory ran out.

    If memory runs out on the CPU or in one of NVIDIA's libraries, PyTorch raises a plain RuntimeError. Such an error is
    recognized by its message.
    """
    known = isinstance(error, torch.OutOfMemoryError | MemoryError)
    return known or (isinstance(error, RuntimeError) and any(words in str(error) for words in _OUT_OF_MEMORY))


def free_unused(device: torch.device) -> None:
    """Release GPU memory that PyTorch has reserved but does not use.

    A large allocation may otherwise fail, because no reserved block is large enough.
    """
    if device.type == "cuda":
        torch.cuda.empty_cache()


def keep_freed_memory(size: int = 0) -> None:
    """Make glibc keep freed memory for reuse instead of returning it to the system.

    By default, glibc returns large blocks and the top of its heap to the system. Each page that is requested again
    costs a page fault, and page faults take a third of the time of some products. Settings in the environment
    (``GLIBC_TUNABLES``, ``MALLOC_..._``; see ``man mallopt``) take precedence. Other C libraries are not affected.

    Parameters
    ----------
    size : int
        The size of a vector in bytes. Up to half a gigabyte of freed memory is kept. If a vector is larger than an
        eighth of a gigabyte, all freed memory is kept, because a product allocates several vectors. The calls of a
        process never reduce the amount.
    """
    if any(name == "GLIBC_TUNABLES" or name.startswith("MALLOC_") for name in os.environ):
        return
    mallopt = getattr(_c_library(), "mallopt", None)
    if mallopt is None:
        return
    if size > 2**27 and not _keeps_all:
        _keeps_all.append(True)
    mallopt(_TRIM_THRESHOLD, _NEVER if _keeps_all else 2**29)
    mallopt(_MMAP_THRESHOLD, 2**31 - 1 if _keeps_all else 2**29)


def _c_library() -> Any:
    try:
        return ctypes.CDLL(None)
    except (OSError, TypeError):  # TypeError: Windows
        return None


def peak_rise(function: Callable[[], object], device: torch.device) -> int | None:
    """Call ``function()`` and return the peak increase in memory use, in bytes, or None if it cannot be measured."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        function()
        return torch.cuda.max_memory_allocated(device) - before
    try:  # Linux with glibc
        _c_library().malloc_trim(0)  # freed memory that the C library keeps would hide the increase
        Path("/proc/self/clear_refs").write_text("5")  # resets the peak of resident memory
        before = _resident("VmRSS")
    except (OSError, AttributeError, StopIteration):
        return None
    function()
    return _resident("VmHWM") - before


def _resident(what: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(what))


class _Saved:
    """Wrapper of a tensor saved by autograd. The wrapper lives as long as the autograd node that saved it."""

    __slots__ = ("__weakref__", "tensor")

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


def measured(
    make: Callable[[], T], shared: Iterable[Tensor], tensors: Callable[[T], Iterable[Tensor]] = lambda result: ()
) -> tuple[T, int]:
    """Call ``make()`` and measure the memory that the result retains: its autograd graph, and ``tensors(result)``.

    Return ``(result, count)``, where ``count`` is the number of retained bytes. The tensors in `shared` are not
    counted. Use ``result`` only for measurements, because its graph contains saved-tensor hooks. These hooks are called
    at every use of a saved tensor and slow down all products.

    Raises
    ------
    RuntimeError
        If `make` differentiates with ``torch.func``, which does not support saved-tensor hooks. In this case, use
        `graph_bytes`.
    """
    alive: weakref.WeakSet[_Saved] = weakref.WeakSet()

    def pack(tensor: Tensor) -> _Saved:
        # A node may save its own output. Without detach, this would form a reference cycle that is never collected.
        saved = _Saved(tensor.detach())
        alive.add(saved)
        return saved

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda saved: saved.tensor):
        graph = make()
    return graph, tensor_bytes((*(saved.tensor for saved in alive), *tensors(graph)), shared)


def graph_bytes(roots: Iterable[Node], shared: Iterable[Tensor]) -> int:
    """Return the number of bytes that the saved tensors of a graph occupy.

    The tensors in `shared` are not counted. Tensors saved by C++ extensions may be missed.
    """
    saved = []
    for node in nodes(roots):
        for name in dir(node):
            if name.startswith("_saved_"):
                value = getattr(node, name)
                saved += [part for part in (value if isinstance(value, tuple) else [value]) if isinstance(part, Tensor)]
    return tensor_bytes(saved, shared)


def tensor_bytes(tensors: Iterable[Tensor], shared: Iterable[Tensor]) -> int:
    """Return the number of bytes that `tensors` occupy.

    Memory that several tensors have in common is counted once. Memory of the tensors in `shared` is not counted.
    """
    known = {part.untyped_storage().data_ptr() for tensor in shared for part in _dense(tensor)}
    views: dict[int, dict[int, int]] = defaultdict(dict)
    sizes = {}
    for tensor in tensors:
        for part in _dense(tensor):
            storage = part.untyped_storage()
            sizes[storage.data_ptr()] = storage.nbytes()
            view = views[storage.data_ptr()]
            view[part.data_ptr()] = max(view.get(part.data_ptr(), 0), part.numel() * part.element_size())
    # For a small view of a large storage, count the size of the view. Usually the view is a batch, and the storage is a
    # data set, which stays in memory anyway.
    return sum(min(sizes[start], sum(view.values())) for start, view in views.items() if start not in known)


def _dense(tensor: Tensor) -> list[Tensor]:
    if tensor._is_zerotensor():  # a zero tensor of forward mode occupies no memory
        return []
    if tensor.layout == torch.strided:
        return [tensor]
    return [tensor._indices(), tensor._values()] if tensor.layout == torch.sparse_coo else []


class Holder(Protocol):
    """Protocol for objects that retain memory. A `Budget` counts the retained bytes."""

    def let_go(self) -> None:
        """Free all memory that the object retains."""


class Budget:
    """A limit on the number of bytes that several engines together may retain. Retained bytes count as spent.

    Parameters
    ----------
    limit : float or 'auto'
        Number of bytes. ``'auto'`` is half of the free memory of the device, measured while no bytes are spent.
    """

    def __init__(self, limit: float | str) -> None:
        self._limit = limit
        self._fixed: float | None = None
        self._peak = 0.0  # largest number of bytes spent since the limit last changed
        # Weak keys: a freed holder no longer counts. A holder that is kept alive by a stored exception still counts.
        self._spent: weakref.WeakKeyDictionary[Holder, int] = weakref.WeakKeyDictionary()

    def __reduce__(self) -> tuple[type[Budget], tuple[float | str]]:
        return Budget, (self._limit,)

    def open(self, device: torch.device) -> bool:
        """Return True if the limit is positive. If no bytes are spent, the limit is first determined again."""
        if self._fixed is None or not self._spent:
            self._fixed = free_bytes(device) // 2 if self._limit == "auto" else float(self._limit)
        return self._fixed > 0

    @property
    def is_zero(self) -> bool:
        """Whether the limit is zero, so that nothing may be retained."""
        return self._limit == 0

    @property
    def left(self) -> float:
        """Number of bytes that may still be spent."""
        return (self._fixed or 0) - sum(self._spent.values())

    def take(self, count: int, holder: Holder) -> bool:
        """If at least `count` bytes are left, spend them for `holder` and return True. Otherwise return False."""
        fits = count <= self.left
        if fits:
            self._spent[holder] = self._spent.get(holder, 0) + count
            self._peak = max(self._peak, sum(self._spent.values()))
        return fits

    def shrink(self) -> bool:
        """Free the memory of all holders and lower the limit to half of the largest number of bytes spent.

        Return True if the limit became lower.
        """
        before, self._limit = self._fixed or 0, self._peak // 2
        self._fixed, self._peak = self._limit, 0.0
        for holder in list(self._spent):
            holder.let_go()
        self._spent.clear()
        return self._fixed < before


def _available() -> int | None:
    """Return the number of available bytes, or None if the system does not report it.

    On Linux, the memory that is available without swapping is counted. On other systems, all free pages are counted.
    """
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):
        pass
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, OSError, ValueError):
        return None


def _cgroup_v2() -> list[int]:
    try:
        path = Path("/proc/self/cgroup").read_text().split("0::", 1)[1].splitlines()[0].lstrip("/")
    except (OSError, IndexError):
        return []
    folder = Path("/sys/fs/cgroup") / path
    return _left(folder / "memory.max", folder / "memory.current")


def _cgroup_v1() -> list[int]:
    folder = Path("/sys/fs/cgroup/memory")
    return _left(folder / "memory.limit_in_bytes", folder / "memory.usage_in_bytes")


def _left(limit: Path, usage: Path) -> list[int]:
    try:
        return [int(limit.read_text()) - int(usage.read_text())]
    except (OSError, ValueError):  # there is no such control group, or its limit is 'max'
        return []
