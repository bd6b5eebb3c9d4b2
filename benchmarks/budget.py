"""Products with all, half and nothing of the data's linearizations kept: the same result, in how much memory and time.

Run ``python benchmarks/budget.py``; it writes ``benchmarks/results/budget.json`` and prints a table. ``cache=`` is a
share of what all batches retain. Peak memory is that of a process of its own for each share, above what it takes before
the operator is made; what is kept and what comes on top of the budget (one batch's linearization and product, the
vectors) are told apart. Times are medians of interleaved runs in one process. On a GPU: ``--device cuda --out
benchmarks/results/budget-gpu.json``.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from environment import add_device_options, environment, peak_mb, set_tf32
from models import GPT, cnn, mlp, on_device, problem, resnet18
from reference import medians

from curvop import HessianLinearOperator

RESULTS = Path(__file__).resolve().parent / "results" / "budget.json"
SHARES = (0.0, 0.5, 1.0)
#: Eight batches each.
PROBLEMS = {
    "MLP 784-512-512-10": lambda: problem(mlp(784, 512, 512, 10), (784,), 1024, 8),
    "CNN 32x32": lambda: problem(cnn(), (3, 32, 32), 64, 8),
    "GPT 4 layers, d = 128": lambda: problem(GPT(), (64,), 8, 8, tokens=65),
    "ResNet-18 64x64, eval": lambda: problem(resnet18(), (3, 64, 64), 8, 8),
}


def made(name: str, device: str) -> dict[str, Any]:
    torch.manual_seed(0)
    return on_device(PROBLEMS[name](), device)


def needed(own: dict[str, Any]) -> int:
    """Return the bytes that all batches retain."""
    return HessianLinearOperator(**own, cache=np.inf).cost(repeats=1).kept_bytes


def measure_times(name: str, repeats: int, device: str) -> dict[str, Any]:
    own = made(name, device)
    need = needed(own)
    operators = [HessianLinearOperator(**own, cache=share * need) for share in SHARES]
    vector = np.random.default_rng(0).standard_normal(operators[0].shape[1])
    products = [H @ vector for H in operators]
    norm = np.linalg.norm(products[-1])
    differences = [float(np.linalg.norm(product - products[-1]) / norm) for product in products]
    taken = medians(*(lambda H=H: H @ vector for H in operators), repeats=repeats)
    return {"need": need, "kept": [H.cost(1).kept_bytes for H in operators], "ms": taken, "differences": differences}


def measure_peak(name: str, cache: float, device: str) -> float:
    own = made(name, device)
    H = HessianLinearOperator(**own, cache=cache)
    vector = np.random.default_rng(0).standard_normal(H.shape[1])
    H.gradient_and_loss()  # what torch's libraries take at their first use

    def run() -> None:
        for _ in range(3):
            H @ vector

    return peak_mb(run, device)


def in_a_process_of_its_own(options: argparse.Namespace, *arguments: str) -> Any:
    passed = [f"--device={options.device}", f"--repeats={options.repeats}"] + ["--tf32"] * options.tf32
    command = [sys.executable, __file__, *passed, *arguments]
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=list(PROBLEMS), action="append", help="only this; may be repeated")
    parser.add_argument("--repeats", type=int, default=7, help="runs of each product; 7")
    add_device_options(parser)
    parser.add_argument("--out", type=Path, default=RESULTS, help="results; benchmarks/results/budget.json")
    parser.add_argument("--times", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--peak", type=float, help=argparse.SUPPRESS)
    options = parser.parse_args()
    set_tf32(options.tf32)
    models = options.model or list(PROBLEMS)
    if options.times:
        print(json.dumps(measure_times(models[0], options.repeats, options.device)))
        return
    if options.peak is not None:
        print(json.dumps(measure_peak(models[0], options.peak, options.device)))
        return
    about, rows = environment(options.device), []
    for model in models:
        found = in_a_process_of_its_own(options, "--model", model, "--times")
        for index, share in enumerate(SHARES):
            cache = share * found["need"]
            row = {"model": model, "share": share, "cache_mb": cache / 1e6, "kept_mb": found["kept"][index] / 1e6}
            row |= {"ms": found["ms"][index], "difference": found["differences"][index]}
            row["peak_mb"] = in_a_process_of_its_own(options, "--model", model, "--peak", str(cache))
            row["above_budget_mb"] = row["peak_mb"] - row["cache_mb"]
            rows.append(row)
            print(
                f"{model:22s} cache {share:4.0%} = {row['cache_mb']:6.1f} MB, kept {row['kept_mb']:6.1f} MB, "
                f"peak {row['peak_mb']:6.1f} MB, {row['above_budget_mb']:6.1f} MB above the budget; "
                f"{row['ms']:7.1f} ms a product, difference to all kept {row['difference']:.1e}",
                flush=True,
            )
            options.out.parent.mkdir(parents=True, exist_ok=True)
            results = {"environment": about, "tf32": options.tf32, "rows": rows}
            options.out.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
