"""The time of one Hessian product in units of one plain gradient over the same data, everything kept.

Run ``python benchmarks/overhead.py``; it writes ``benchmarks/results/overhead.json`` and prints a table. Products and
gradients are timed in turns, and the ratio is that of their medians; the error is that of the product in float32
against double backward written by hand in float64. Peak memory is that of a process of its own for each model, before
the reference is computed. The tutorial's operators are timed too: a block of one parameter that was restricted by hand,
and the same block sliced from the whole, and a product of a million parameters with an objective that costs nearly
nothing: what is around torch.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from environment import environment
from models import PROBLEMS, tutorial
from reference import exact, medians

from curvop import HessianLinearOperator

RESULTS = Path(__file__).resolve().parent / "results" / "overhead.json"
SLICE_GOAL = 1.1
AROUND_GOAL_MS = 3.0


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
    script = tutorial()
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


def measure_around(repeats: int) -> dict[str, Any]:
    """Time a product of a million parameters, of which the objective reads one."""
    params = {"theta": torch.ones(10**6, requires_grad=True)}
    H = HessianLinearOperator.from_objective(
        lambda params, _: params["theta"][:1].square().sum(), params, [None], batch_weight=lambda _: 1.0
    )
    vector = np.random.default_rng(0).standard_normal(10**6)
    [product_ms] = medians(lambda: H @ vector, repeats=repeats)
    return {"P": 10**6, "product_ms": product_ms, "goal_ms": AROUND_GOAL_MS, "repeats": repeats}


OTHERS = {"tutorial": lambda: measure_slice(2000), "around": lambda: measure_around(300)}


def in_a_process_of_its_own(name: str) -> dict[str, Any]:
    run = subprocess.run([sys.executable, __file__, "--only", name], check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(run.stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", choices=[*PROBLEMS, *OTHERS], help="measure one model and print it as JSON")
    only = parser.parse_args().only
    if only:
        print(json.dumps(OTHERS[only]() if only in OTHERS else measure(only, 300 if "64-32" in only else 15)))
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
    sliced = in_a_process_of_its_own("tutorial")
    print(
        f"{'tutorial, one weight':24s} restricted {sliced['restricted_ms']:.3f} ms"
        f"  sliced {sliced['sliced_ms']:.3f} ms"
        f"  = {sliced['sliced_over_restricted']:.3f} times (goal: at most {SLICE_GOAL})"
    )
    around = in_a_process_of_its_own("around")
    print(
        f"{'around torch':24s} P = {around['P']:>10,}  product {around['product_ms']:.2f} ms (goal: {AROUND_GOAL_MS:g})"
    )
    RESULTS.parent.mkdir(parents=True, exist_ok=True)
    results = {"environment": environment(), "rows": rows, "tutorial": sliced, "around": around}
    RESULTS.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
