"""Time spectral densities beside curvlinops', at equal products; ours keep orthogonality, and theirs do not.

Run ``python -m pip install -e ".[bench]" && python benchmarks/density.py``; it writes
``benchmarks/results/density.json`` and takes about twelve minutes. Times are medians of runs in turns. What is not
within a product is the recurrence's. On a GPU: ``--device cuda --out benchmarks/results/density-gpu.json``.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
import warnings
from pathlib import Path
from typing import Any

import curvlinops
import numpy as np
import torch
from curvlinops.papyan2020traces.spectrum import lanczos_approximate_spectrum
from environment import environment
from models import PEER_PROBLEMS, on_device
from reference import finish
from torch.nn.attention import SDPBackend, sdpa_kernel

from curvop import HessianLinearOperator
from curvop.operators.base import WrappingLinearOperator
from curvop.spectrum import density
from curvop.spectrum.lanczos import Lanczos

RESULTS = Path(__file__).resolve().parent / "results" / "density.json"
MODELS = ("MLP 784-512-512-10", "GPT 4 layers, d = 128", "CNN 32x32")
PROBES, STEPS = 8, 64


class Stopwatch(WrappingLinearOperator):
    """Another operator, whose products' time is added up."""

    def __init__(self, A: Any) -> None:
        super().__init__(A.dtype, A.shape)
        self._A, self.seconds = A, 0.0

    def _apply(self, rows: Any) -> Any:
        finish()
        begun = time.perf_counter()
        products = (self._A @ rows.T).T
        finish()
        self.seconds += time.perf_counter() - begun
        return products


def seconds(function: Any) -> float:
    finish()
    begun = time.perf_counter()
    function()
    finish()
    return time.perf_counter() - begun


def ours(operator: Any, steps: int) -> float:
    return seconds(lambda: density(operator, num_probes=PROBES, num_steps=steps, progress=False))


def orthogonality(operator: Any, steps: int) -> float:
    """Return the largest entry of ``Q' Q - I`` after all steps of one probe."""
    start = torch.randn(1, operator.shape[0], generator=torch.Generator().manual_seed(0))
    lanczos = Lanczos(operator, start.to(operator.device), steps)
    while lanczos.running:
        lanczos.step()
    basis = lanczos.basis[0, : lanczos.lengths[0]].double().cpu()
    return float((basis @ basis.T - torch.eye(len(basis), dtype=torch.float64)).abs().max())


def measure(name: str, options: argparse.Namespace) -> dict[str, Any]:
    torch.manual_seed(0)
    problem, steps = on_device(PEER_PROBLEMS[name](), options.device), options.steps
    arguments = problem["model"], problem["loss_function"], problem["params"], problem["data"]
    operators = {
        engine: HessianLinearOperator(*arguments, dtype=np.float32, engine=engine) for engine in options.engine
    }
    for operator in operators.values():
        for _ in range(4):  # linearize, compile, choose columns, record
            operator @ np.ones((operator.shape[0], PROBES), dtype=np.float32)
    other = curvlinops.HessianLinearOperator(
        problem["model"], problem["loss_function"], list(problem["params"].values()), problem["data"]
    )
    ends = density(operators["autograd"], num_probes=1, num_steps=10, progress=False).range
    tasks = {engine: lambda operator=operator: ours(operator, steps) for engine, operator in operators.items()}
    tasks["curvlinops"] = lambda: seconds(
        lambda: lanczos_approximate_spectrum(other, steps, num_repeats=PROBES, boundaries=ends)
    )
    times: dict[str, list[float]] = {task: [] for task in tasks}
    overheads = []
    for _ in range(options.repeats):
        for task, run in tasks.items():
            times[task].append(run())
        watched = Stopwatch(operators["autograd"])
        overheads.append(ours(watched, steps) / watched.seconds - 1)
    found = {task: statistics.median(values) for task, values in times.items()}
    return {
        "P": other.shape[0],
        "steps": steps,
        "seconds": found,
        "ratio to curvlinops": {engine: found["curvlinops"] / found[engine] for engine in operators},
        "recurrence / products": statistics.median(overheads),
        "orthogonality": orthogonality(operators["autograd"], steps),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=3, help="runs of each; 3")
    parser.add_argument("--model", choices=MODELS, action="append", help="only this; may be repeated")
    parser.add_argument("--engine", nargs="+", default=["autograd", "compiled"], help="of ours, autograd among them")
    parser.add_argument("--steps", type=int, default=STEPS, help="of each probe; 64")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="where the models are; cpu")
    parser.add_argument("--out", type=Path, default=RESULTS, help="results; benchmarks/results/density.json")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.backends.cudnn.allow_tf32 = False  # as wrong as 1e-3
    results: dict[str, Any] = {
        "environment": environment(options.device),
        "probes": PROBES,
        "steps": STEPS,
        "models": {},
    }
    with sdpa_kernel(SDPBackend.MATH):  # fused attention has no second derivative
        for name in options.model or MODELS:
            results["models"][name] = measure(name, options)
            print(name, json.dumps(results["models"][name], indent=2), flush=True)
    ratios = [one["ratio to curvlinops"] for one in results["models"].values()]
    results["geometric means"] = {
        engine: statistics.geometric_mean(one[engine] for one in ratios) for engine in options.engine
    }
    options.out.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
