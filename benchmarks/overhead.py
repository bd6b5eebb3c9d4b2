"""The time of one Hessian product in units of one plain gradient over the same data, everything kept.

Run ``python benchmarks/overhead.py``; it writes ``benchmarks/results/overhead.json`` and prints a table. Products and
gradients are timed in turns, and the ratio is that of their medians; the error is that of the product in float32
against double backward written by hand in float64. Peak memory is that of a process of its own for each model, before
the reference is computed. The tutorial's operators are timed too: a block of one parameter that was restricted by hand,
and the same block sliced from the whole, and a product of a million parameters with an objective that costs nearly
nothing: what is around torch.

The last rows compare work on small batches with the same work by hand, in calls of ``torch.autograd.grad``: a gradient,
a product if nothing is kept, the first product of an operator that keeps all batches, and one of its later products.
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
from models import PROBLEMS, mlp, problem, tutorial, tutorial_problem
from reference import double_backward, exact, medians, parts

from curvop import HessianLinearOperator

RESULTS = Path(__file__).resolve().parent / "results" / "overhead.json"
SLICE_GOAL = 1.1
AROUND_GOAL_MS = 3.0
#: The largest ratio of the time of each kind of work to the time of the same work by hand.
BY_HAND_GOALS = {"gradient": 1.5, "nothing kept": 1.15, "first product": 1.5, "kept product": 1.25}
BY_HAND = {
    "MLP 64-32-10, 28 batches of 64": lambda: problem(mlp(64, 32, 10), (64,), 64, 28),
    "MLP 784-512-512-10, 4 batches of 64": lambda: problem(mlp(784, 512, 512, 10), (784,), 64, 4),
}


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


def measure_by_hand(name: str, repeats: int) -> dict[str, Any]:
    """Time a gradient, a product if nothing is kept, and a first product beside the same work by hand.

    By hand, a first product is one double backward and one more product, so the goal refers to 1.5 double backwards and
    one kept product.
    """
    torch.manual_seed(0)
    task = BY_HAND[name]()
    params = list(task["params"].values())
    H, without = HessianLinearOperator(**task, cache=2**40), HessianLinearOperator(**task, cache=0)
    vector = torch.randn(H.shape[1])

    def gradient() -> None:
        for X, y in task["data"]:
            torch.autograd.grad(task["loss_function"](task["model"](X), y), params)

    def by_hand() -> torch.Tensor:
        return double_backward(task, None, None, [vector])[0]

    error = float((H @ vector - by_hand()).norm() / by_hand().norm())
    without @ vector
    plain_ms, gradient_ms, by_hand_ms, without_ms, first_ms, kept_ms = medians(
        gradient,
        H.gradient_and_loss,
        by_hand,
        lambda: without @ vector,
        lambda: HessianLinearOperator(**task, cache=2**40) @ vector,
        lambda: H @ vector,
        repeats=repeats,
        fair=True,
    )
    first_goal = BY_HAND_GOALS["first product"]
    return {
        "model": name,
        "ratios": {
            "gradient": gradient_ms / plain_ms,
            "nothing kept": without_ms / by_hand_ms,
            "first product": first_goal * first_ms / (first_goal * by_hand_ms + kept_ms),
        },
        "ms": {
            "gradient by hand": plain_ms,
            "gradient": gradient_ms,
            "double backward by hand": by_hand_ms,
            "nothing kept": without_ms,
            "first product": first_ms,
            "kept product": kept_ms,
        },
        "error": error,
        "repeats": repeats,
    }


def measure_kept(repeats: int) -> dict[str, Any]:
    """Time a kept product of the tutorial's model beside calls of ``torch.autograd.grad`` on graphs that are kept."""
    task = tutorial_problem()
    params = list(task["params"].values())
    H = HessianLinearOperator(**task, cache=2**40)
    vector = torch.randn(H.shape[1])
    seeds = [part.view_as(param) for part, param in zip(parts(vector, params), params, strict=True)]
    gradients = [
        torch.autograd.grad(task["loss_function"](task["model"](X), y), params, create_graph=True)
        for X, y in task["data"]
    ]

    def by_hand() -> list[Any]:
        return [torch.autograd.grad(gradient, params, seeds, retain_graph=True) for gradient in gradients]

    expected = sum(torch.cat([part.reshape(-1) for part in product]) for product in by_hand()) / len(gradients)
    error = float((H @ vector - expected).norm() / expected.norm())
    by_hand_ms, kept_ms = medians(by_hand, lambda: H @ vector, repeats=repeats, fair=True)
    return {
        "model": "tutorial MLP 7-5-5-3",
        "ratios": {"kept product": kept_ms / by_hand_ms},
        "ms": {"kept product by hand": by_hand_ms, "kept product": kept_ms},
        "error": error,
        "repeats": repeats,
    }


OTHERS = {
    "tutorial": lambda: measure_slice(2000),
    "around": lambda: measure_around(300),
    **{name: lambda name=name: measure_by_hand(name, 60 if "64-32" in name else 30) for name in BY_HAND},
    "kept": lambda: measure_kept(2000),
}


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
    hand = []
    for name in (*BY_HAND, "kept"):
        row = in_a_process_of_its_own(name)
        hand.append(row)
        ratios = (f"{work} {ratio:.2f} ({BY_HAND_GOALS[work]:g})" for work, ratio in row["ratios"].items())
        print(f"{row['model']:36s} times the work by hand (goal): {', '.join(ratios)}  error {row['error']:.1e}")
    RESULTS.parent.mkdir(parents=True, exist_ok=True)
    results = {"environment": environment(), "rows": rows, "tutorial": sliced, "around": around, "by hand": hand}
    results["goals by hand"] = BY_HAND_GOALS
    RESULTS.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
