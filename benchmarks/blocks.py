"""Time blocks of columns: milliseconds per column, by the number of columns, beside single products and curvlinops.

Run ``python benchmarks/blocks.py``; it writes ``benchmarks/results/blocks.json`` and prints a table. Every pair of a
model and a matrix has a process of its own, in which the contenders take turns. A block of 8 columns is also multiplied
by curvlinops, compiled as ``contenders.py`` does it. Each time is a median, and each error is relative to the product
in float64. With ``--compiled``, this package's compiled engine takes part, too.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from contenders import WORK, Work, curvlinops_operator, curvop
from environment import environment
from models import PEER_PROBLEMS
from reference import exact, medians

RESULTS = Path(__file__).resolve().parent / "results" / "blocks.json"
MODELS = tuple(name for name in PEER_PROBLEMS if name != "GPT-2 124M")
MATRICES = ("Hessian", "Gauss-Newton")
COLUMNS = (1, 2, 4, 8, 16, 32, 64)
#: Columns that the peer multiplies: it compiles a program for each number of columns.
PEER_COLUMNS = 8
#: Errors above this limit are wrong in float32, however fast the product is.
WRONG = 1e-5
#: Blocks of more columns are left out if the vectors of a block would have more entries.
MOST_ENTRIES = 2 * 10**8
#: Calls before the timed ones: operators choose the number of columns that they multiply at once, and record products.
WARM_UP = 10


def measure(model: str, matrix: str, options: argparse.Namespace) -> dict[str, Any]:
    torch.manual_seed(0)
    problem = PEER_PROBLEMS[model]()
    size = sum(value.numel() for value in problem["params"].values())
    most = max(options.columns)
    X = np.random.default_rng(0).standard_normal((size, most))
    reference = exact(problem, X[:, : min(2, most)], matrix=matrix)
    kind = "product" if matrix == "Hessian" else matrix
    assert kind in WORK

    rows = []
    engines = ("autograd", "compiled") if options.compiled else ("autograd",)
    own = {engine: curvop(problem, Work(kind, None, None, X), engine) for engine in engines}
    for count in options.columns:
        if count > 8 and count * size > MOST_ENTRIES:
            continue
        block = np.ascontiguousarray(X[:, :count]) if count > 1 else X[:, 0].copy()
        tasks: dict[str, Callable[[], Any]] = {
            f"curvop {engine}": lambda multiply=multiply, block=block: multiply(block)
            for engine, multiply in own.items()
        }
        row: dict[str, Any] = {"columns": count, "by": {}}
        if count == PEER_COLUMNS and not options.no_peer:
            try:
                work = Work(kind, None, None, block)
                peer = curvlinops_operator(problem, work, compiled=True).to_scipy().__matmul__
                peer(block)
                tasks["curvlinops compiled"] = lambda peer=peer, block=block: peer(block)
            except Exception as error:  # what a peer cannot do is a result, too
                row["by"]["curvlinops compiled"] = {"failed": f"{type(error).__name__}: {error}"[:300]}
        for name, task in tasks.items():
            for _ in range(WARM_UP):
                found = task()
            row["by"][name] = {"error": error_of(np.asarray(found), reference)}
        began = time.perf_counter()
        for name in [name for name in tasks if row["by"][name]["error"] > WRONG]:
            del tasks[name]
        for task in tasks.values():
            task()
        runs = max(3, min(300, int(options.room / (time.perf_counter() - began + 1e-9))))
        times = medians(*tasks.values(), repeats=runs, warm=0, fair=True)
        for name, taken in zip(tasks, times, strict=True):
            row["by"][name] |= {"ms_per_column": taken / count, "runs": runs}
        rows.append(row)
    single = next((row["by"]["curvop autograd"]["ms_per_column"] for row in rows if row["columns"] == 1), None)
    return {"model": model, "matrix": matrix, "P": size, "single_ms": single, "rows": rows}


def error_of(found: np.ndarray, reference: np.ndarray) -> float:
    """Return the relative error of the first columns, for which the reference is known."""
    found = found.reshape(len(found), -1)
    count = min(found.shape[1], reference.shape[1])
    expected = reference[:, :count]
    return float(np.linalg.norm(found[:, :count] - expected) / np.linalg.norm(expected))


def table(result: dict[str, Any]) -> str:
    lines = [f"{result['model']}, {result['matrix']}, P = {result['P']:,}"]
    for row in result["rows"]:
        cells = [
            f"{name} {own['ms_per_column']:.4g} ms ({own['error']:.0e})"
            if "ms_per_column" in own
            else f"{name} {own.get('failed', 'wrong')}"
            for name, own in row["by"].items()
        ]
        lines.append(f"  {row['columns']:3d} columns, per column: " + "; ".join(cells))
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=MODELS, action="append", help="measure this model only")
    parser.add_argument("--matrix", choices=MATRICES, action="append", help="measure this matrix only")
    parser.add_argument("--columns", type=int, nargs="+", default=COLUMNS, help="numbers of columns")
    parser.add_argument("--room", type=float, default=2.5, help="seconds for the timed runs of each row")
    parser.add_argument("--compiled", action="store_true", help="also measure this package's compiled engine")
    parser.add_argument("--no-peer", action="store_true", help="leave curvlinops out")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--json", action="store_true", help="measure in this process, and print the results as JSON")
    options = parser.parse_args()
    pairs = [(model, matrix) for model in options.model or MODELS for matrix in options.matrix or MATRICES]
    if options.json:
        print(json.dumps([measure(*pair, options) for pair in pairs]))
        return
    shared = ["--room", str(options.room), "--columns", *map(str, options.columns), "--json"]
    shared += ["--compiled"] * options.compiled + ["--no-peer"] * options.no_peer
    start, results = time.perf_counter(), []
    for model, matrix in pairs:
        command = [sys.executable, __file__, "--model", model, "--matrix", matrix, *shared]
        run = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        results += json.loads(run.stdout.splitlines()[-1])
        print(table(results[-1]), flush=True)
        found = {"environment": environment(), "seconds": time.perf_counter() - start, "results": results}
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
