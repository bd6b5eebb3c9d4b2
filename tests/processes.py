"""Processes of their own that start at once: a server that has imported torch already forks them."""

from __future__ import annotations

import multiprocessing.forkserver
import os
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any
from unittest import mock

__all__ = ["started"]


def started(function: Callable[..., None], *args: Any) -> BaseProcess:
    """Call a function of a module in a process of its own, of one thread, which ends with the one that called it."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["distributed_runs", "killed_runs"])
    # The server looks on its own path, and says nothing where it finds nothing there.
    with mock.patch.dict(os.environ, PYTHONPATH=str(Path(__file__).parent), OMP_NUM_THREADS="1"):
        multiprocessing.forkserver.ensure_running()
    process = context.Process(target=function, args=args, daemon=True)
    process.start()
    return process
