"""Time products of one process and of two that share the data, each on one thread.

Run ``python -m pip install -e ".[bench]" && python benchmarks/distributed.py``; it writes
``benchmarks/results/distributed.json`` and takes a few minutes. Beside each time stands how far the products are
from those of one process that holds all data. Runs with one rank and with several take turns, and the fastest counts:
whatever else the machine does only adds to a time. Needs as many idle cores as ranks.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from environment import environment
from models import PROBLEMS

from curvop import GGNLinearOperator, HessianLinearOperator
from curvop.distributed import serve

RESULTS = Path(__file__).resolve().parent / "results" / "distributed.json"
MODELS = ("MLP 784-512-512-10", "CNN 32x32", "GPT 4 layers, d = 128")
MATRICES = {"hessian": HessianLinearOperator, "ggn": GGNLinearOperator}
BATCHES = 8
GOAL = 1.7


def operator(name: str, matrix: str, rank: int, size: int) -> Any:
    """Return a rank's operator; all ranks together have `BATCHES` batches, of the size that the problem has them."""
    problem, data = {}, []
    for seed in reversed(range(BATCHES)):  # the last has the model
        torch.manual_seed(seed)
        problem = PROBLEMS[name]()
        data.append(problem["data"][0])
    return MATRICES[matrix](problem["model"], problem["loss_function"], problem["params"], data[rank::size])


def run_rank(repeats: int, result: str) -> None:
    """Time products as one rank; rank 0 writes seconds, and the products."""
    torch.set_num_threads(1)
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    times, products = {}, {}
    for name in MODELS:
        for matrix in MATRICES:
            with serve(operator(name, matrix, rank, size)) as A:
                if A is None:
                    continue
                vector = np.random.default_rng(0).standard_normal(A.shape[1])
                products[f"{name}, {matrix}"] = A @ vector  # linearizes
                found = []
                for _ in range(repeats):
                    begun = time.perf_counter()
                    A @ vector
                    found.append(time.perf_counter() - begun)
                times[f"{name}, {matrix}"] = min(found)
    if rank == 0:
        np.savez(f"{result}.npz", **products)
        Path(f"{result}.json").write_text(json.dumps(times))


def launch(size: int, repeats: int, folder: Path) -> tuple[dict[str, float], dict[str, Any]]:
    """Return seconds and products as `size` ranks have them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    result = str(folder / f"result{size}")
    shared = {"WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, __file__, "--rank", result, "--repeats", str(repeats)]
    ranks = [subprocess.Popen(command, env=os.environ | shared | {"RANK": str(rank)}) for rank in range(size)]
    codes = [rank.wait() for rank in ranks]
    if any(codes):
        raise SystemExit(f"a rank has failed: {codes}")
    with np.load(f"{result}.npz") as products:
        return json.loads(Path(f"{result}.json").read_text()), dict(products)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=10, help="products of a run; 10")
    parser.add_argument("--turns", type=int, default=3, help="runs of each number of ranks; 3")
    parser.add_argument("--size", type=int, default=2, help="ranks that share the data; 2")
    parser.add_argument("--rank", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.rank:
        run_rank(options.repeats, options.rank)
        return
    runs: dict[int, list[tuple[dict[str, float], dict[str, Any]]]] = {1: [], options.size: []}
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(options.turns):
            for size, found in runs.items():
                found.append(launch(size, options.repeats, Path(folder)))
    results: dict[str, Any] = {
        "environment": environment(),
        "ranks": options.size,
        "threads": 1,
        "batches": BATCHES,
        "products": {},
    }
    for name in runs[1][0][0]:
        alone, shared = (min(times[name] for times, _ in found) for found in runs.values())
        expected, product = runs[1][0][1][name], runs[options.size][0][1][name]
        results["products"][name] = {
            "seconds alone": alone,
            "seconds shared": shared,
            "gain": alone / shared,
            "relative difference": float(np.linalg.norm(product - expected) / np.linalg.norm(expected)),
        }
    gains = [one["gain"] for one in results["products"].values()]
    results["gain"] = float(np.exp(np.mean(np.log(gains))))
    results["goal"] = GOAL
    print(json.dumps(results, indent=2))
    RESULTS.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
