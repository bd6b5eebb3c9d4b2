"""Time the complete spectrum of an empirical Fisher matrix from its smaller side, and count the memory of Lanczos.

Run ``python benchmarks/smaller_side.py``; it writes ``benchmarks/results/smaller_side.json`` and takes about ten
minutes. SciPy's ``eigsh`` computes the 100 largest eigenvalues of the empirical Fisher matrix of the small CNN on 500
images, in double and in single precision. ``curvop.spectrum.eigsh`` computes all non-zero eigenvalues from the 500 rows
of the factor, certified. The memory is that of a Lanczos run of 64 steps for the GGN of ResNet-18 on 512 images of 10
classes, and for its Gram matrix. On a GPU: ``--device cuda --out benchmarks/results/smaller_side-gpu.json``.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from environment import add_device_options, environment, set_tf32
from models import cnn, on_device, problem, resnet18
from reference import finish
from scipy.sparse.linalg import eigsh as scipy_eigsh

from curvop import EFLinearOperator, GGNLinearOperator
from curvop.spectrum import eigsh
from curvop.spectrum.lanczos import bytes_of_run

DTYPES = (torch.float64, torch.float32)
RESULTS = Path(__file__).resolve().parent / "results" / "smaller_side.json"


def timed(function: Callable[[], Any]) -> tuple[float, Any]:
    finish()
    begun = time.perf_counter()
    result = function()
    finish()
    return time.perf_counter() - begun, result


def batches(count: int, size: int) -> tuple[int, int]:
    """Return the size and the number of equal batches of at most `size` examples."""
    number = max(1, round(count / size))
    assert count % number == 0, f"{count} examples cannot be cut into {number} equal batches"
    return count // number, number


def spectrum(options: argparse.Namespace, dtype: torch.dtype) -> dict[str, Any]:
    torch.manual_seed(0)
    own = on_device(problem(cnn(), (3, 32, 32), *batches(options.images, 100)), options.device)
    model = own["model"].to(dtype)  # its parameters stay the same objects
    arguments = model, own["loss_function"], own["params"], [(X.to(dtype), y) for X, y in own["data"]]
    times, results = [], []
    for _ in range(options.repeats):
        F = EFLinearOperator(*arguments)  # nothing is cached
        seconds, result = timed(lambda F=F: eigsh(F, options.images, side="examples", progress=False))
        times.append(seconds)
        results.append(result)
    F = EFLinearOperator(*arguments)
    theirs, (values, _) = timed(lambda: scipy_eigsh(F, min(options.largest, options.images - 1), rng=0))
    result = results[-1]
    difference = float(np.abs(result.values[-len(values) :] - values).max() / values[-1])
    print(result, flush=True)
    assert result.ok, result.verdict
    assert difference < 1e-5, "the two sides differ"
    ours = statistics.median(times)
    return {
        "P": F.shape[0],
        "images": options.images,
        "seconds": {"curvop, all": ours, f"SciPy, {len(values)} largest": theirs},
        "ratio": theirs / ours,
        "SciPy's products": F.num_products,
        "rank": int((result.values > result.certificate.bounds).sum()),
        "largest bound / largest eigenvalue": float(result.certificate.bounds.max() / result.largest),
        "largest difference / largest eigenvalue": difference,
        "certified": result.ok,
    }


def memory(options: argparse.Namespace) -> dict[str, Any]:
    torch.manual_seed(0)
    own = on_device(problem(resnet18(), (3, 64, 64), *batches(options.examples, 64)), options.device)
    G = GGNLinearOperator(own["model"], own["loss_function"], own["params"], own["data"])
    K = G.gram()
    sizes = {"GGN": bytes_of_run(G, options.steps), "Gram matrix": bytes_of_run(K, options.steps)}
    return {
        "P": G.shape[0],
        "rows of the Gram matrix": K.shape[0],
        "steps": options.steps,
        "bytes of a Lanczos run": sizes,
        "ratio": sizes["GGN"] / sizes["Gram matrix"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=500, help="of the CNN; 500")
    parser.add_argument("--largest", type=int, default=100, help="eigenvalues that SciPy computes; 100")
    parser.add_argument("--examples", type=int, default=512, help="of ResNet-18; 512")
    parser.add_argument("--steps", type=int, default=64, help="of Lanczos; 64")
    parser.add_argument("--repeats", type=int, default=3, help="runs of ours; 3")
    add_device_options(parser)
    parser.add_argument("--out", type=Path, default=RESULTS, help="results; benchmarks/results/smaller_side.json")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    set_tf32(options.tf32)
    results = {
        "environment": environment(options.device),
        "spectrum": {str(dtype).removeprefix("torch."): spectrum(options, dtype) for dtype in DTYPES},
        "memory": memory(options),
    }
    print(json.dumps(results, indent=2), flush=True)
    options.out.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
