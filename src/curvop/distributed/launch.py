"""How the processes of a run come together, where a launcher has started them."""

from __future__ import annotations

import os
from datetime import timedelta

import torch.distributed as dist

from curvop.distributed.heartbeat import RankError

__all__ = ["joined"]


def joined(arrival: float) -> bool:
    """Whether this is one of several processes; join them where a launcher has started them and nobody has yet."""
    if not dist.is_available():
        return False
    if not dist.is_initialized():
        if not {"RANK", "WORLD_SIZE"} <= os.environ.keys() or int(os.environ["WORLD_SIZE"]) == 1:
            return False
        try:
            dist.init_process_group("gloo", timeout=timedelta(seconds=arrival))
        except (dist.DistError, RuntimeError) as error:
            raise RankError(None, f"not all ranks came together within {arrival:g} s: {error}") from error
    return dist.get_world_size() > 1
