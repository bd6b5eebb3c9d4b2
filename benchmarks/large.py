"""Large models in little memory: a product with each, and one eigenvalue of the smaller, with the peak of memory.

Run ``python benchmarks/large.py``; it writes ``benchmarks/results/large.json`` and prints a table. Each model has a
process of its own, whose peak is all that it takes: interpreter, model, data, vectors and what is kept. Another process
judges the product by double backward in float64.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from environment import environment
from models import LARGE_PROBLEMS
from reference import exact, medians
from scipy.sparse.linalg import eigsh
from torch.nn.attention import SDPBackend, sdpa_kernel

from curvop import HessianLinearOperator

RESULTS = Path(__file__).resolve().parent / "results" / "large.json"
#: GiB in all, and whether an eigenvalue is computed, too.
GOALS = {"GPT-2 124M": (12.0, True), "GPT-2 medium 355M": (20.0, False)}


def measure(name: str, repeats: int, file: str) -> dict[str, Any]:
    torch.manual_seed(0)
    problem = LARGE_PROBLEMS[name]()
    H = HessianLinearOperator(**problem, dtype=np.float32)
    vector = np.random.default_rng(0).standard_normal(H.shape[1], dtype=np.float32)
    np.save(file, H @ vector)
    first = peak_gib()  # cost() lets the peak begin anew
    found = {"model": name, "P": H.shape[1], "kept_mb": H.cost(repeats=1).kept_bytes / 1e6}
    params = list(problem["params"].values())

    def gradient() -> None:
        with sdpa_kernel(SDPBackend.MATH):  # as in the product
            for X, y in problem["data"]:
                torch.autograd.grad(problem["loss_function"](problem["model"](X), y), params)

    taken = medians(gradient, lambda: H @ vector, repeats=repeats, warm=0)
    found["gradient_s"], found["product_s"] = (1e-3 * own for own in taken)
    found["product_in_gradients"] = found["product_s"] / found["gradient_s"]
    found["product_peak_gib"] = max(first, peak_gib())
    if GOALS[name][1]:
        start = time.perf_counter()
        values, vectors = eigsh(H, k=1, ncv=6, v0=np.ones(H.shape[1], np.float32), tol=1e-3)
        found |= {"eigsh_s": time.perf_counter() - start, "eigenvalue": float(values[0])}
        found["residual"] = float(np.linalg.norm(H @ vectors[:, 0] - values[0] * vectors[:, 0]) / abs(values[0]))
    return found | {"peak_gib": max(first, peak_gib())}


def peak_gib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def judge(name: str, file: str) -> dict[str, Any]:
    torch.manual_seed(0)
    problem = LARGE_PROBLEMS[name]()
    size = sum(value.numel() for value in problem["params"].values())
    reference = exact(problem, np.random.default_rng(0).standard_normal(size, dtype=np.float32))
    return {"relative_error": float(np.linalg.norm(np.load(file) - reference) / np.linalg.norm(reference))}


def in_a_process_of_its_own(*arguments: str) -> dict[str, Any]:
    run = subprocess.run([sys.executable, __file__, *arguments], check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(run.stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=list(LARGE_PROBLEMS), action="append", help="only this; may be repeated")
    parser.add_argument("--runs", type=int, default=7, help="runs of a product and of a gradient; 7")
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    parser.add_argument("--judge", help=argparse.SUPPRESS)
    options = parser.parse_args()
    models = options.model or list(LARGE_PROBLEMS)
    if options.measure or options.judge:
        [model] = models
        found = measure(model, options.runs, options.measure) if options.measure else judge(model, options.judge)
        print(json.dumps(found))
        return
    rows = []
    for model in models:
        with tempfile.TemporaryDirectory() as folder:
            chosen = ("--model", model, "--runs", str(options.runs))
            row = in_a_process_of_its_own(*chosen, "--measure", f"{folder}/product.npy")
            row |= in_a_process_of_its_own(*chosen, "--judge", f"{folder}/product.npy")
        row |= {"goal_gib": GOALS[model][0], "reached": row["peak_gib"] <= GOALS[model][0]}
        rows.append(row)
        print(
            f"{model}: a product takes {row['product_s']:.2f} s, {row['product_in_gradients']:.2f} gradients, "
            f"error {row['relative_error']:.1e}; "
            + (f"eigsh(k=1, ncv=6) {row['eigsh_s']:.0f} s; " if "eigsh_s" in row else "")
            + f"peak {row['peak_gib']:.1f} GiB in all (goal: {row['goal_gib']:g})",
            flush=True,
        )
        RESULTS.parent.mkdir(parents=True, exist_ok=True)
        RESULTS.write_text(json.dumps({"environment": environment(), "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
