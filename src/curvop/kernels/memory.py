"""How much memory there is, and how much a linearization retains."""

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
    "an operator ran out of memory: less is kept from now on, and fewer columns are multiplied at once, which is "
    "slower. Pass a smaller cache= or columns=, or let data yield smaller batches."
)

# Where the system does not say how much memory is free: enough for small models, and harmless on any machine.
_UNKNOWN = 2**30
_OUT_OF_MEMORY = (
    "DefaultCPUAllocator",
    "CUDA error: out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_ALLOC_FAILED",
)

# Of glibc's <malloc.h>.
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3


def free_bytes(device: torch.device) -> int:
    """Return the bytes that are free on `device`; on the host, within the limits of this process's control group."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    limits = [_available(), *_cgroup_v2(), *_cgroup_v1()]
    return max(0, min((limit for limit in limits if limit is not None), default=_UNKNOWN))


def out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out; torch on the host, and NVIDIA's libraries, say so in words alone."""
    known = isinstance(error, torch.OutOfMemoryError | MemoryError)
    return known or (isinstance(error, RuntimeError) and any(words in str(error) for words in _OUT_OF_MEMORY))


def free_unused(device: torch.device) -> None:
    """Give back what torch holds of a GPU's memory without using it: pieces that are too small, as it may be."""
    if device.type == "cuda":
        torch.cuda.empty_cache()


def keep_freed_memory() -> None:
    """Let the C library keep what a product frees for the next one, up to half a gigabyte.

    By default glibc hands large blocks, and the top of its heap, back to the system, and every page that comes back
    costs a fault: a third of the time of some products. Whoever has tuned it from outside (``GLIBC_TUNABLES``,
    ``MALLOC_..._``; ``man mallopt``) is left alone, and so are other C libraries.
    """
    if any(name == "GLIBC_TUNABLES" or name.startswith("MALLOC_") for name in os.environ):
        return
    mallopt = getattr(_c_library(), "mallopt", None)
    if mallopt is not None:
        for option in (_TRIM_THRESHOLD, _MMAP_THRESHOLD):
            mallopt(option, 2**29)


def _c_library() -> Any:
    try:
        return ctypes.CDLL(None)
    except (OSError, TypeError):  # TypeError: Windows
        return None


def peak_rise(function: Callable[[], object], device: torch.device) -> int | None:
    """Return by how many bytes memory rose at most while `function()` ran; None where the system does not tell."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        function()
        return torch.cuda.max_memory_allocated(device) - before
    try:  # Linux with glibc
        _c_library().malloc_trim(0)  # what the C library holds for later would hide the rise
        Path("/proc/self/clear_refs").write_text("5")  # let the peak of resident memory begin anew
        before = _resident("VmRSS")
    except (OSError, AttributeError, StopIteration):
        return None
    function()
    return _resident("VmHWM") - before


def _resident(what: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(what))


class _Saved:
    """A tensor that autograd saved; it lives exactly as long as the graph node that saved it."""

    __slots__ = ("__weakref__", "tensor")

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


def measured(make: Callable[[], T], shared: Iterable[Tensor]) -> tuple[T, int]:
    """Return ``make()`` and the bytes that its graph holds, `shared` tensors left out.

    The graph is made under saved-tensor hooks: a hook is called at every use of a saved tensor, which slows down each
    product, so this graph is for counting only.

    Raises
    ------
    RuntimeError
        Where `make` takes derivatives of its own with ``torch.func``, which refuses hooks: see `graph_bytes`.
    """
    alive: weakref.WeakSet[_Saved] = weakref.WeakSet()

    def pack(tensor: Tensor) -> _Saved:
        # Detached: what a node saves of its own output would hold that node, a cycle that nobody collects.
        saved = _Saved(tensor.detach())
        alive.add(saved)
        return saved

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda saved: saved.tensor):
        graph = make()
    return graph, tensor_bytes((saved.tensor for saved in alive), shared)


def graph_bytes(roots: Iterable[Node], shared: Iterable[Tensor]) -> int:
    """Return the bytes that the nodes of a graph say they hold; those of C++ extensions may not say."""
    saved = []
    for node in nodes(roots):
        for name in dir(node):
            if name.startswith("_saved_"):
                value = getattr(node, name)
                saved += [part for part in (value if isinstance(value, tuple) else [value]) if isinstance(part, Tensor)]
    return tensor_bytes(saved, shared)


def tensor_bytes(tensors: Iterable[Tensor], shared: Iterable[Tensor]) -> int:
    """Return the bytes of `tensors`, memory that they share counted once, that of `shared` tensors not at all."""
    known = {part.untyped_storage().data_ptr() for tensor in shared for part in _dense(tensor)}
    views: dict[int, dict[int, int]] = defaultdict(dict)
    sizes = {}
    for tensor in tensors:
        for part in _dense(tensor):
            storage = part.untyped_storage()
            sizes[storage.data_ptr()] = storage.nbytes()
            view = views[storage.data_ptr()]
            view[part.data_ptr()] = max(view.get(part.data_ptr(), 0), part.numel() * part.element_size())
    # A small view of a large storage: that is the data set, which the batches are cut from and which is there anyway.
    return sum(min(sizes[where], sum(view.values())) for where, view in views.items() if where not in known)


def _dense(tensor: Tensor) -> list[Tensor]:
    if tensor._is_zerotensor():  # forward mode's zeros, which have no memory
        return []
    if tensor.layout == torch.strided:
        return [tensor]
    return [tensor._indices(), tensor._values()] if tensor.layout == torch.sparse_coo else []


class Holder(Protocol):
    """Who keeps what bytes are spent on."""

    def let_go(self) -> None:
        """Free all of it."""


class Budget:
    """Bytes that may be retained, shared by engines.

    Parameters
    ----------
    limit : float or 'auto'
        ``'auto'`` is half of what is free on the device when the first bytes are taken.
    """

    def __init__(self, limit: float | str) -> None:
        self._limit = limit
        self._fixed: float | None = None
        self._most = 0.0  # that were spent since the limit was last changed
        # Who is no more has spent nothing; who is held by an exception that somebody keeps, still has.
        self._spent: weakref.WeakKeyDictionary[Holder, int] = weakref.WeakKeyDictionary()

    def __reduce__(self) -> tuple[type[Budget], tuple[float | str]]:
        return Budget, (self._limit,)

    def open(self, device: torch.device) -> bool:
        """Fix the limit where nothing is spent yet; return whether there is anything to spend."""
        if self._fixed is None or not self._spent:
            self._fixed = free_bytes(device) // 2 if self._limit == "auto" else float(self._limit)
        return self._fixed > 0

    @property
    def left(self) -> float:
        """Bytes that are not spent."""
        return (self._fixed or 0) - sum(self._spent.values())

    def take(self, count: int, holder: Holder) -> bool:
        """Spend `count` bytes for a holder, unless they are more than are left."""
        fits = count <= self.left
        if fits:
            self._spent[holder] = self._spent.get(holder, 0) + count
            self._most = max(self._most, sum(self._spent.values()))
        return fits

    def shrink(self) -> bool:
        """Let all holders let go, and allow half of what they had from now on; return whether that is less."""
        before, self._limit = self._fixed or 0, self._most // 2
        self._fixed, self._most = self._limit, 0.0
        for holder in list(self._spent):
            holder.let_go()
        self._spent.clear()
        return self._fixed < before


def _available() -> int | None:
    """Return what the kernel says can be had without swapping (Linux), else the free physical pages."""
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
    except (OSError, ValueError):  # no such group, or a limit of 'max'
        return []
