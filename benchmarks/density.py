"""Time spectral densities beside those of the peers, with equal numbers of probes and steps.

Run ``python -m pip install -e ".[bench]" && python benchmarks/density.py``; it writes
``benchmarks/results/density.json`` and takes about 20 minutes. Times are medians of runs in turns. The time of a
density that is not within products is that of the recurrence. This package and hessian-eigenthings keep the Lanczos
basis orthogonal, and curvlinops does not. A peer whose products are wrong is not timed. On a GPU: ``--device cuda
--out benchmarks/results/density-gpu.json``.
"""

from __future__ import annotations

import argparse
import functools
import json
import statistics
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from contenders import Work, curvlinops_operator, tensor_like
from environment import add_device_options, environment, set_tf32
from models import PEER_PROBLEMS, on_device
from reference import exact, finish
from torch.nn.attention import SDPBackend, sdpa_kernel

from curvop import HessianLinearOperator
from curvop.operators.base import WrappingLinearOperator
from curvop.spectrum import density
from curvop.spectrum.lanczos import Lanczos

RESULTS = Path(__file__).resolve().parent / "results" / "density.json"
MODELS = ("MLP 784-512-512-10", "GPT 4 layers, d = 128", "CNN 32x32")
PROBES, STEPS = 8, 64
#: Peers that do not finish, and why.
LEFT_OUT = {("CNN 32x32", "curvlinops compiled"): "each product takes 54 MB more memory, 27 GB in all"}
WRONG, WRONG_TF32 = 1e-5, 1e-2  # relative errors of a product


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


def ours(operator: Any, probes: int, steps: int) -> float:
    return seconds(lambda: density(operator, num_probes=probes, num_steps=steps, progress=False))


def orthogonality(operator: Any, steps: int) -> float:
    """Return the largest entry of ``Q' Q - I`` after all steps of one probe."""
    start = torch.randn(1, operator.shape[0], generator=torch.Generator().manual_seed(0))
    lanczos = Lanczos(operator, start.to(operator.device), steps)
    while lanczos.running:
        lanczos.step()
    basis = lanczos.basis[0, : lanczos.lengths[0]].double().cpu()
    return float((basis @ basis.T - torch.eye(len(basis), dtype=torch.float64)).abs().max())


#: A peer maps a problem and the range of its eigenvalues to a product with a tensor, and to a function (probes, steps)
#: that computes a density.
Peer = Callable[[dict[str, Any], tuple[float, float]], tuple[Callable[..., Any], Callable[[int, int], Any]]]


def curvlinops(problem: dict[str, Any], ends: tuple[float, float], compiled: bool = False) -> Any:
    from curvlinops.papyan2020traces.spectrum import lanczos_approximate_spectrum

    A = curvlinops_operator(problem, Work("product", None, None, np.empty(0)), compiled)
    return A.__matmul__, lambda probes, steps: lanczos_approximate_spectrum(
        A, steps, num_repeats=probes, boundaries=ends
    )


def eigenthings(problem: dict[str, Any], ends: tuple[float, float]) -> Any:
    import hessian_eigenthings as package

    A = package.HessianOperator(problem["model"], problem["data"], package.supervised_loss(problem["loss_function"]))
    return A.matvec, lambda probes, steps: package.spectral_density(A, num_runs=probes, lanczos_steps=steps)


PEERS: dict[str, Peer] = {
    "curvlinops": curvlinops,
    "curvlinops compiled": functools.partial(curvlinops, compiled=True),
    "eigenthings": eigenthings,
}


def measure(name: str, options: argparse.Namespace) -> dict[str, Any]:
    torch.manual_seed(0)
    problem, probes, steps = on_device(PEER_PROBLEMS[name](), options.device), options.probes, options.steps
    arguments = problem["model"], problem["loss_function"], problem["params"], problem["data"]
    operators = {
        engine: HessianLinearOperator(*arguments, dtype=np.float32, engine=engine) for engine in options.engine
    }
    for operator in operators.values():
        for _ in range(4):  # linearize, compile, choose columns, record
            operator @ np.ones((operator.shape[0], probes), dtype=np.float32)
    size = operators["autograd"].shape[0]
    ends = density(operators["autograd"], num_probes=1, num_steps=10, progress=False).range
    tasks = {engine: lambda operator=operator: ours(operator, probes, steps) for engine, operator in operators.items()}
    vector = np.random.default_rng(0).standard_normal(size)
    reference, errors, failed = exact(problem, vector), {}, {}
    for peer, make in PEERS.items():
        if (name, peer) in LEFT_OUT:
            failed[peer] = LEFT_OUT[name, peer]
            continue
        try:
            multiply, compute = make(problem, ends)
            product = multiply(tensor_like(problem, vector)).numpy(force=True)
            compute(1, 2)  # compile whatever a density needs
        except Exception as error:  # what a peer cannot do is a result, too
            failed[peer] = " ".join(f"{type(error).__name__}: {error}".split())[:300]
            continue
        errors[peer] = float(np.linalg.norm(product - reference) / np.linalg.norm(reference))
        if errors[peer] < (WRONG_TF32 if options.tf32 else WRONG):
            tasks[peer] = lambda compute=compute: seconds(lambda: compute(probes, steps))
    times: dict[str, list[float]] = {task: [] for task in tasks}
    overheads = []
    for _ in range(options.repeats):
        for task, run in tasks.items():
            times[task].append(run())
        watched = Stopwatch(operators["autograd"])
        overheads.append(ours(watched, probes, steps) / watched.seconds - 1)
    return {
        "P": size,
        "steps": steps,
        "seconds": {task: statistics.median(values) for task, values in times.items()},
        "errors": errors,
        "failed": failed,
        "recurrence / products": statistics.median(overheads),
        "orthogonality": orthogonality(operators["autograd"], steps),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=3, help="runs of each; 3")
    parser.add_argument("--model", choices=MODELS, action="append", help="only this; may be repeated")
    parser.add_argument("--engine", nargs="+", default=["autograd", "compiled"], help="of ours, autograd among them")
    parser.add_argument("--probes", type=int, default=PROBES, help="start vectors; 8")
    parser.add_argument("--steps", type=int, default=STEPS, help="of each probe; 64")
    parser.add_argument("--add", action="store_true", help="keep the results of the file that this run does not repeat")
    add_device_options(parser)
    parser.add_argument("--out", type=Path, default=RESULTS, help="results; benchmarks/results/density.json")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    set_tf32(options.tf32)
    results: dict[str, Any] = {
        "environment": environment(options.device),
        "tf32": options.tf32,
        "probes": options.probes,
        "steps": options.steps,
        "models": json.loads(options.out.read_text())["models"] if options.add else {},
    }
    with sdpa_kernel(SDPBackend.MATH):  # fused attention has no second derivative
        for name in options.model or MODELS:
            results["models"][name] = measure(name, options)
            print(name, json.dumps(results["models"][name], indent=2), flush=True)
            options.out.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
