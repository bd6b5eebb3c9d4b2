"""The time of one Hessian product in units of one plain gradient over the same data, everything kept.

Run ``python benchmarks/overhead.py``; it writes ``benchmarks/results/overhead.json`` and prints a table. Products and
gradients are timed in turns, and the ratio is that of their medians; the error is that of the product in float32
against double backward written by hand in float64. Peak memory is that of a process of its own for each model, before
the reference is computed. The tutorial's operators are timed too: a block of one parameter that was restricted by hand,
and the same block sliced from the whole.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import datetime
import io
import json
import os
import platform
import resource
import runpy
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import scipy
import torch
from models import PROBLEMS

from curvop import HessianLinearOperator, __version__

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results" / "overhead.json"
TUTORIAL = HERE.parent / "docs" / "examples" / "submatrices.py"
SLICE_GOAL = 1.1


def exact(problem: dict[str, Any], vector: np.ndarray) -> np.ndarray:
    """Return the product in float64, by double backward without anything of this package."""
    model = copy.deepcopy(problem["model"]).double()
    params = list(model.parameters())
    pieces = torch.from_numpy(vector).split([param.numel() for param in params])
    seeds = [piece.view_as(param) for piece, param in zip(pieces, params, strict=True)]
    total = torch.zeros(len(vector), dtype=torch.float64)
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        for X, y in problem["data"]:
            loss = problem["loss_function"](model(X.double() if X.is_floating_point() else X), y)
            gradient = torch.autograd.grad(loss, params, create_graph=True)
            product = torch.autograd.grad(gradient, params, seeds)
            total += torch.cat([part.reshape(-1) for part in product]) / len(problem["data"])
    return total.numpy()


def medians(*functions: Callable[[], object], repeats: int) -> list[float]:
    """Time functions in turns; return the median milliseconds of each."""
    times: list[list[float]] = [[] for _ in functions]
    for repeat in range(repeats + 2):
        for function, own in zip(functions, times, strict=True):
            start = time.perf_counter()
            function()
            if repeat >= 2:  # the first two warm up
                own.append(1e3 * (time.perf_counter() - start))
    return [statistics.median(own) for own in times]


def measure(name: str, repeats: int) -> dict[str, Any]:
    torch.manual_seed(0)
    problem = PROBLEMS[name]()
    H = HessianLinearOperator(**problem, cache=2**40)
    params = list(problem["params"].values())
    vector = np.random.default_rng(0).standard_normal(H.shape[1])
    product = H @ vector

    def gradient() -> None:
        for X, y in problem["data"]:
            torch.autograd.grad(problem["loss_function"](problem["model"](X), y), params)

    gradient_ms, product_ms = medians(gradient, lambda: H @ vector, repeats=repeats)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    reference = exact(problem, vector)  # in float64 and with a graph of its own: it would set the peak
    return {
        "model": name,
        "P": H.shape[1],
        "gradient_ms": gradient_ms,
        "product_ms": product_ms,
        "product_in_gradients": product_ms / gradient_ms,
        "relative_error": float(np.linalg.norm(product - reference) / np.linalg.norm(reference)),
        "peak_mb": peak,
        "repeats": repeats,
    }


def measure_slice(repeats: int) -> dict[str, Any]:
    """Time the two operators of the tutorial that are the block of its first weight."""
    with contextlib.redirect_stdout(io.StringIO()):
        script = runpy.run_path(str(TUTORIAL))
    restricted, sliced, x = script["H_param0"], script["H_sliced"], script["x"]
    # cpu() waits for a GPU to finish.
    restricted_ms, sliced_ms = medians(lambda: (restricted @ x).cpu(), lambda: (sliced @ x).cpu(), repeats=repeats)
    return {
        "restricted_ms": restricted_ms,
        "sliced_ms": sliced_ms,
        "sliced_over_restricted": sliced_ms / restricted_ms,
        "goal": SLICE_GOAL,
        "repeats": repeats,
    }


def processor() -> str:
    """Return the processor's name, as far as the system tells."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def commit() -> str | None:
    """Return the commit that is checked out, marked where files differ from it; None outside a repository."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    with contextlib.suppress(OSError, subprocess.CalledProcessError):
        return subprocess.run(command, cwd=HERE, check=True, capture_output=True, text=True).stdout.strip()
    return None


def in_a_process_of_its_own(name: str) -> dict[str, Any]:
    run = subprocess.run([sys.executable, __file__, "--only", name], check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(run.stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", choices=[*PROBLEMS, "tutorial"], help="measure one model and print it as JSON")
    only = parser.parse_args().only
    if only:
        print(json.dumps(measure_slice(2000) if only == "tutorial" else measure(only, 300 if "64-32" in only else 15)))
        return
    rows = []
    for name in PROBLEMS:
        row = in_a_process_of_its_own(name)
        rows.append(row)
        print(
            f"{name:24s} P = {row['P']:>10,}  gradient {row['gradient_ms']:8.2f} ms"
            f"  product {row['product_ms']:8.2f} ms"
            f"  = {row['product_in_gradients']:.2f} gradients  error {row['relative_error']:.1e}"
            f"  peak {row['peak_mb']:.0f} MB",
            flush=True,
        )
    tutorial = in_a_process_of_its_own("tutorial")
    print(
        f"{'tutorial, one weight':24s} restricted {tutorial['restricted_ms']:.3f} ms"
        f"  sliced {tutorial['sliced_ms']:.3f} ms"
        f"  = {tutorial['sliced_over_restricted']:.3f} times (goal: at most {SLICE_GOAL})"
    )
    environment = {
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
    }
    RESULTS.parent.mkdir(parents=True, exist_ok=True)
    results = {"environment": environment, "rows": rows, "tutorial": tutorial}
    RESULTS.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
