"""The time of one Hessian product in units of one plain gradient over the same data, everything kept.

Run ``python benchmarks/overhead.py``; it writes ``benchmarks/results/overhead.json`` and prints a table. Products and
gradients are timed in turns, and the ratio is that of their medians; the error is that of the product in float32
against double backward written by hand in float64. Peak memory is that of a process of its own for each model.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import scipy
import torch
from models import PROBLEMS

from curvop import HessianLinearOperator

RESULTS = Path(__file__).parent / "results" / "overhead.json"


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


def measure(name: str, repeats: int) -> dict[str, Any]:
    torch.manual_seed(0)
    problem = PROBLEMS[name]()
    H = HessianLinearOperator(**problem, cache=2**40)
    params = list(problem["params"].values())
    vector = np.random.default_rng(0).standard_normal(H.shape[1])
    reference = exact(problem, vector)
    product = H @ vector
    error = float(np.linalg.norm(product - reference) / np.linalg.norm(reference))

    def gradient() -> None:
        for X, y in problem["data"]:
            torch.autograd.grad(problem["loss_function"](problem["model"](X), y), params)

    seconds: dict[str, list[float]] = {"gradient": [], "product": []}
    for _ in range(repeats + 2):
        for kind, function in (("gradient", gradient), ("product", lambda: H @ vector)):
            start = time.perf_counter()
            function()
            seconds[kind].append(time.perf_counter() - start)
    medians = {kind: statistics.median(times[2:]) for kind, times in seconds.items()}
    return {
        "model": name,
        "P": H.shape[1],
        "gradient_ms": 1e3 * medians["gradient"],
        "product_ms": 1e3 * medians["product"],
        "product_in_gradients": medians["product"] / medians["gradient"],
        "relative_error": error,
        "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        "repeats": repeats,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", choices=list(PROBLEMS), help="measure one model and print it as JSON")
    only = parser.parse_args().only
    if only:
        print(json.dumps(measure(only, 300 if "64-32" in only else 15)))
        return
    rows = []
    for name in PROBLEMS:
        run = subprocess.run([sys.executable, __file__, "--only", name], check=True, capture_output=True, text=True)
        rows.append(json.loads(run.stdout))
        row = rows[-1]
        print(
            f"{name:24s} P = {row['P']:>10,}  gradient {row['gradient_ms']:8.2f} ms"
            f"  product {row['product_ms']:8.2f} ms"
            f"  = {row['product_in_gradients']:.2f} gradients  error {row['relative_error']:.1e}"
            f"  peak {row['peak_mb']:.0f} MB",
            flush=True,
        )
    environment = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "scipy": scipy.__version__,
        "numpy": np.__version__,
        "processor": platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
    }
    RESULTS.write_text(json.dumps({"environment": environment, "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
