"""What a benchmark runs on, in which precision, and how much memory something took."""

from __future__ import annotations

import argparse
import contextlib
import datetime
import os
import platform
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import scipy
import torch

from curvop import __version__
from curvop.kernels.memory import peak_rise

__all__ = ["add_device_options", "environment", "peak_mb", "set_tf32"]


def add_device_options(parser: argparse.ArgumentParser) -> None:
    """Add the options ``--device`` and ``--tf32``."""
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="device of the models (default: cpu)")
    text = "allow TF32 on a GPU in matrix products and convolutions (default: full single precision everywhere)"
    parser.add_argument("--tf32", action="store_true", help=text)


def set_tf32(allowed: bool) -> None:
    """Allow or forbid TF32 in matrix products and convolutions, for all packages alike.

    By default, PyTorch allows TF32 in the convolutions of cuDNN, whose relative errors are then about 1e-3.
    """
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = allowed


def environment(device: str = "cpu") -> dict[str, Any]:
    """Return versions, the commit and the machine, as JSON takes them."""
    gpu = {}
    if device == "cuda":
        tf32 = torch.backends.cuda.matmul.allow_tf32
        gpu = {"gpu": torch.cuda.get_device_name(), "cuda": torch.version.cuda, "tf32": tf32}
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "curvop": __version__,
        "commit": commit(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "scipy": scipy.__version__,
        "numpy": np.__version__,
        "processor": processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        **gpu,
    }


def processor() -> str:
    """Return the processor's name, as far as the system tells."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def peak_mb(function: Callable[[], object], device: str = "cpu") -> float:
    """Return by how many megabytes the memory of `device` rose at most while `function()` ran."""
    rise = peak_rise(function, torch.device(device))
    if rise is None:
        raise RuntimeError("this system does not tell the peak of memory")
    return rise / 1e6


def commit() -> str | None:
    """Return the commit that is checked out, marked where files differ from it; None outside a repository."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    with contextlib.suppress(OSError, subprocess.CalledProcessError):
        here = Path(__file__).resolve().parent
        return subprocess.run(command, cwd=here, check=True, capture_output=True, text=True).stdout.strip()
    return None
