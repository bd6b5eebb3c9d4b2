"""How much memory there is, and how much a linearization retains."""

from __future__ import annotations

import os
import weakref
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from torch import Tensor

__all__ = ["free_bytes", "keep_freed_memory", "retained_bytes"]

# Where the system does not say how much memory is free: enough for small models, and harmless on any machine.
_UNKNOWN = 2**30


def free_bytes(device: torch.device) -> int:
    """Return the bytes that are free on `device`; on the host, within the limits of this process's control group."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    limits = [_available(), *_cgroup_v2(), *_cgroup_v1()]
    return max(0, min((limit for limit in limits if limit is not None), default=_UNKNOWN))


def keep_freed_memory() -> None:
    """Let the C library keep what a product frees for the next one, up to 64 MiB.

    glibc hands the top of its heap back to the system where more is free than twice the largest block that was freed
    so far, and every page that comes back costs a fault: a third of the time of some products. Freeing one block of
    the largest size that counts (32 MiB; ``man mallopt``, M_MMAP_THRESHOLD), never touched, settles it. Harmless
    under other allocators.
    """
    torch.empty(2**25 - 2**16, dtype=torch.uint8)


class _Saved:
    """A tensor that autograd saved; it lives exactly as long as the graph node that saved it."""

    __slots__ = ("__weakref__", "tensor")

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


def retained_bytes(linearize: Callable[[], object], shared: Iterable[Tensor]) -> int:
    """Return the bytes that the graph made by `linearize()` holds, `shared` tensors left out.

    The graph is made under saved-tensor hooks, counted and thrown away: a hook is called at every use of a saved
    tensor, which would slow down each product if the counted graph itself were kept.
    """
    alive: weakref.WeakSet[_Saved] = weakref.WeakSet()

    def pack(tensor: Tensor) -> _Saved:
        saved = _Saved(tensor)
        alive.add(saved)
        return saved

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda saved: saved.tensor):
        graph = linearize()
    storages = {storage.data_ptr(): storage.nbytes() for storage in (saved.tensor.untyped_storage() for saved in alive)}
    for tensor in shared:
        storages.pop(tensor.untyped_storage().data_ptr(), None)
    del graph
    return sum(storages.values())


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
