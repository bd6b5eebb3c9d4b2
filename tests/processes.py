"""Start test processes quickly: a fork server that has already imported torch forks them."""

from __future__ import annotations

import multiprocessing.forkserver
import os
import sys
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any
from unittest import mock

__all__ = ["started"]


def started(function: Callable[..., None], *args: Any) -> BaseProcess:
    """Call a function of a module in a new single-threaded process, which ends with its parent."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["distributed_runs", "killed_runs"])
    # The server of Python 3.11 ignores this process's sys.path, and is silent if it finds no module to preload.
    path = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    with mock.patch.dict(os.environ, PYTHONPATH=path, OMP_NUM_THREADS="1"):
        multiprocessing.forkserver.ensure_running()
    process = context.Process(target=function, args=args, daemon=True)
    process.start()
    return process
