"""Peak memory of a product with the logits of a large vocabulary, in units of the memory of the logits.

Run ``python benchmarks/vocabulary.py``; it writes ``benchmarks/results/vocabulary.json`` and prints a table. The model
is one linear layer with 16 inputs, so that nearly all memory is used by tensors of the size of the logits. Each row has
a process of its own. The peak includes cached tensors. If hessian-eigenthings is installed, its GGN is measured, too.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from environment import environment, peak_mb
from torch import nn

from curvop import EFLinearOperator, FisherLinearOperator, GGNLinearOperator, HessianLinearOperator

RESULTS = Path(__file__).resolve().parent / "results" / "vocabulary.json"
CLASSES, INPUTS = 50_257, 16
GOALS = {"GGN": 2.2, "GGN, nothing kept": 2.2}
MATRICES = {
    "Hessian": HessianLinearOperator,
    "GGN": GGNLinearOperator,
    "GGN, nothing kept": functools.partial(GGNLinearOperator, cache=0),
    "empirical Fisher": EFLinearOperator,
    "sampled Fisher": functools.partial(FisherLinearOperator, mc_samples=1),
}
PEER = "GGN, hessian-eigenthings"


def product(name: str, rows: int) -> Callable[[], object]:
    """Return a function that computes one product."""
    torch.manual_seed(0)
    model = nn.Linear(INPUTS, CLASSES, bias=False)
    data = [(torch.randn(rows, INPUTS), torch.randint(0, CLASSES, (rows,)))]
    if name == PEER:
        from hessian_eigenthings.loss_fns.standard import supervised_forward, supervised_loss_of_output
        from hessian_eigenthings.operators.ggn import GGNOperator

        own = GGNOperator(model, data, supervised_forward, supervised_loss_of_output(nn.CrossEntropyLoss()))
        vector = torch.ones(own.size)
        return lambda: own.matvec(vector)
    A = MATRICES[name](model, nn.CrossEntropyLoss(), dict(model.named_parameters()), data, dtype=np.float32)
    x = np.ones(A.shape[1], np.float32)
    return lambda: A @ x


def measure(name: str, rows: int) -> dict[str, Any]:
    run, size = product(name, rows), 4e-6 * rows * CLASSES

    def several() -> None:  # the first product caches what later ones reuse
        for _ in range(2):
            run()

    peak = peak_mb(several)
    start = time.perf_counter()
    run()
    found = {"matrix": name, "rows": rows, "classes": CLASSES, "logits_mb": size, "peak_mb": peak}
    return found | {"peak_in_logits": peak / size, "seconds": time.perf_counter() - start}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=4096, help="rows of the logits; 4096")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        print(json.dumps(measure(options.measure, options.rows)))
        return
    rows = []
    for name in (*MATRICES, PEER):
        command = [sys.executable, __file__, "--rows", str(options.rows), "--measure", name]
        # glibc then returns freed memory at once, so that the peak is exact
        exact = os.environ | {"MALLOC_MMAP_THRESHOLD_": "1000000"}
        run = subprocess.run(command, env=exact, check=name != PEER, capture_output=True, text=True)
        if run.returncode:
            print(f"{name}: not measured, {run.stderr.strip().splitlines()[-1]}")
            continue
        row = json.loads(run.stdout)
        if name in GOALS:
            row |= {"goal": GOALS[name], "reached": row["peak_in_logits"] <= GOALS[name]}
        rows.append(row)
        goal = f" (goal: {row['goal']})" if "goal" in row else ""
        print(f"{name:25s} peak {row['peak_in_logits']:.2f} times the logits{goal}, {row['seconds']:.2f} s", flush=True)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps({"environment": environment(), "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
