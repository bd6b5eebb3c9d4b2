"""Compare damped solves for 1, 10 and 50 right-hand sides: products, seconds and true residuals.

Run ``python -m pip install -e ".[bench]" && python benchmarks/solves.py``; it writes ``benchmarks/results/solves.json``
and takes about 12 minutes on two cores. The matrix is the Gauss-Newton matrix, with a damping of 1e-4 of its largest
eigenvalue and a relative residual of 1e-6 in float64, or 1e-3 and 1e-5 in float32 (``--dtype float32``), which single
precision can reach. Every package multiplies with its own matrix. The residuals are computed in float64 by code of this
folder; a solution with a larger residual than requested is reported, but was not found in comparable time.

No contender takes much longer than ``--limit`` seconds for one result. If a loop over single columns reaches the limit,
its products and seconds are those of the solved columns, times the number of all columns divided by the number of
solved columns, which is reported as "columns solved". A contender that solves all columns together fails at the limit.

By default, the CNN and the GPT of the other benchmarks have less data or fewer parameters, because a product with the
full GPT takes most of a second in float64 and a solve hundreds of products. For the full models, for example on a GPU:
``--model "CNN 32x32" --model "GPT 4 layers, d = 128" --limit 3000 --device cuda --out
benchmarks/results/solves-gpu.json``.
"""

from __future__ import annotations

import argparse
import copy
import functools
import json
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from curvlinops import CGInverseLinearOperator
from curvlinops import GGNLinearOperator as TheirGGN
from curvlinops._torch_base import PyTorchLinearOperator
from environment import add_device_options, environment, set_tf32
from linear_operator.utils.linear_cg import linear_cg
from models import GPT, PEER_PROBLEMS, cnn, on_device
from models import problem as random_problem
from reference import exact, finish
from scipy.sparse.linalg import LinearOperator, cg, eigsh
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from curvop import GGNLinearOperator, SolveResult, problems, solve
from curvop.preconditioner import kfac, nystrom

RESULTS = Path(__file__).resolve().parent / "results" / "solves.json"
DEFAULT = {
    "digits, trained": problems.digits,
    "CNN 32x32, 16 images": lambda: random_problem(cnn(), (3, 32, 32), 16, 1),
    "GPT 2 layers, d = 16": lambda: random_problem(GPT(width=16, length=16, depth=2), (16,), 4, 1, tokens=65),
}
MODELS = DEFAULT | {name: PEER_PROBLEMS[name] for name in ("CNN 32x32", "GPT 4 layers, d = 128")}
#: Damping in units of the largest eigenvalue, and the relative residual.
SETTINGS = {"float64": (1e-4, 1e-6), "float32": (1e-3, 1e-5)}
RANK = 100  # of the preconditioner
MOST = 2000  # steps of each solver
#: With its default `eps` of 1e-10, which is added to curvatures, `linear_cg` does not reach 1e-6 on the digits.
THEIR_OPTIONS = {"max_iter": MOST, "max_tridiag_iter": 0, "eps": 1e-30}


class Clock:
    """The time limit of one contender."""

    def __init__(self, limit: float) -> None:
        self.limit, self._begun = limit, time.perf_counter()

    @property
    def seconds(self) -> float:
        """Seconds since the start."""
        return time.perf_counter() - self._begun

    def check(self, products: int) -> None:
        """Raise a `TimeoutError` if the limit is reached."""
        if self.seconds > self.limit:
            raise TimeoutError(f"not solved within {self.limit:g} s and {products} products")

    def until_late(self, columns: Iterable[Any]) -> Iterator[Any]:
        """Yield the columns until the limit is reached, but at least one."""
        for column in columns:
            yield column
            if self.seconds > self.limit:
                return


#: Maps (problem, damping, rtol, B, clock) to the solutions for the first columns of B, and the number of columns that
#: were multiplied.
Contender = Callable[[dict[str, Any], float, float, Tensor, Clock], tuple[Any, int]]


def curvop(problem: dict[str, Any], damping: float, rtol: float, B: Tensor, clock: Clock) -> tuple[Tensor, int]:
    A = GGNLinearOperator(**problem)
    return finished(solve(A, B, damping, rtol=rtol, maxiter=MOST, seconds=clock.limit, progress=False)), A.num_products


def curvop_nystrom(problem: dict[str, Any], damping: float, rtol: float, B: Tensor, clock: Clock) -> tuple[Tensor, int]:
    A = GGNLinearOperator(**problem)
    options = {"rtol": rtol, "maxiter": MOST, "seconds": clock.limit, "progress": False}
    M = nystrom(A, min(RANK, A.shape[0]), damping, rng=0)
    return finished(solve(A, B, damping, preconditioner=M, **options)), A.num_products


def curvop_kfac(
    problem: dict[str, Any], damping: float, rtol: float, B: Tensor, clock: Clock, ekfac: bool = False
) -> tuple[Tensor, int]:
    A = GGNLinearOperator(**problem)
    options = {"rtol": rtol, "maxiter": MOST, "seconds": clock.limit, "progress": False}
    M = kfac(A, damping, ekfac)
    return finished(solve(A, B, damping, preconditioner=M, **options)), A.num_products


def curvop_singles(problem: dict[str, Any], damping: float, rtol: float, B: Tensor, clock: Clock) -> tuple[Tensor, int]:
    A = GGNLinearOperator(**problem)
    options = {"rtol": rtol, "maxiter": MOST, "progress": False}
    columns = [solve(A, b, damping, **options).solution for b in clock.until_late(B.T)]
    return torch.stack(columns, 1), A.num_products


def finished(result: SolveResult) -> Tensor:
    """Return the solution, or raise a `TimeoutError` if the time ran out."""
    if result.status == "seconds":
        raise TimeoutError(str(result))
    return result.solution


def scipy_cg(problem: dict[str, Any], damping: float, rtol: float, B: Tensor, clock: Clock) -> tuple[np.ndarray, int]:
    """Solve for one column after another, with the products of curvlinops."""
    A, count = theirs(problem).to_scipy(), 0

    def multiply(x: np.ndarray) -> np.ndarray:
        nonlocal count
        count += 1
        return A @ x + damping * x

    operator = LinearOperator(A.shape, matvec=multiply, dtype=np.float64)
    sides = clock.until_late(B.numpy(force=True).astype(np.float64).T)
    return np.stack([cg(operator, b, rtol=rtol, maxiter=MOST)[0] for b in sides], 1), count


def linear_operator_cg(
    problem: dict[str, Any], damping: float, rtol: float, B: Tensor, clock: Clock
) -> tuple[Tensor, int]:
    """All columns advance together, each in its own Krylov space."""
    A, count = theirs(problem), 0

    def multiply(X: Tensor) -> Tensor:
        nonlocal count
        clock.check(count)
        count += X.shape[1]
        return A @ X + damping * X

    return linear_cg(multiply, B, tolerance=rtol, **THEIR_OPTIONS), count


def curvlinops_inverse(
    problem: dict[str, Any], damping: float, rtol: float, B: Tensor, clock: Clock
) -> tuple[Tensor, int]:
    A = Damped(theirs(problem), damping, clock)
    return CGInverseLinearOperator(A, tolerance=rtol, **THEIR_OPTIONS) @ B, A.count


class Damped(PyTorchLinearOperator):
    """A curvlinops operator with damping, which counts the columns that are multiplied."""

    SELF_ADJOINT = True

    def __init__(self, A: PyTorchLinearOperator, damping: float, clock: Clock) -> None:
        super().__init__(A._in_shape, A._out_shape)
        self._A, self._damping, self._clock, self.count = A, damping, clock, 0

    @property
    def device(self) -> torch.device:
        """Device of the parameters."""
        return self._A.device

    @property
    def dtype(self) -> torch.dtype:
        """Data type of the parameters."""
        return self._A.dtype

    def _matmat(self, X: list[Tensor]) -> list[Tensor]:
        self._clock.check(self.count)
        self.count += X[0].shape[-1]
        kept = [x.clone() for x in X]
        return [product + self._damping * x for product, x in zip(self._A._matmat(X), kept, strict=True)]


def theirs(problem: dict[str, Any]) -> PyTorchLinearOperator:
    params = list(problem["params"].values())
    arguments = problem["model"], problem["loss_function"], params, problem["data"]
    return TheirGGN(*arguments, check_deterministic=False)


CONTENDERS: dict[str, Contender] = {
    "curvop": curvop,
    "curvop, nystrom": curvop_nystrom,
    "curvop, KFAC": curvop_kfac,
    "curvop, EKFAC": functools.partial(curvop_kfac, ekfac=True),
    "curvop, single solves": curvop_singles,
    "SciPy cg, curvlinops": scipy_cg,
    "linear_operator CG, curvlinops": linear_operator_cg,
    "curvlinops CGInverseLinearOperator": curvlinops_inverse,
}


def problem_of(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """Return a problem with parameters and data of the dtype, on the device."""
    torch.manual_seed(0)
    problem, dtype = copy.deepcopy(MODELS[name]()), getattr(torch, options.dtype)
    model = problem["model"].to(dtype)
    data = [tuple(part.to(dtype) if part.is_floating_point() else part for part in batch) for batch in problem["data"]]
    return on_device(problem | {"params": dict(model.named_parameters()), "data": data}, options.device)


def residuals(problem: dict[str, Any], X: Any, B: Tensor, damping: float) -> np.ndarray:
    """Return the relative residuals in float64, from products without this package."""
    X, B = (np.asarray(torch.as_tensor(columns).numpy(force=True), dtype=np.float64) for columns in (X, B))
    rest = B - exact(problem, X, matrix="Gauss-Newton") - damping * X
    return np.linalg.norm(rest, axis=0) / np.linalg.norm(B, axis=0)


def measure(name: str, options: argparse.Namespace) -> dict[str, Any]:
    problem, (fraction, rtol) = problem_of(name, options), SETTINGS[options.dtype]
    A = GGNLinearOperator(**problem)
    largest = float(eigsh(A, k=1, which="LA", tol=1e-3, return_eigenvectors=False)[0])
    damping = fraction * largest
    sides = np.random.default_rng(0).standard_normal((A.shape[0], max(options.columns)))
    B = torch.from_numpy(sides).to(options.device, getattr(torch, options.dtype))
    found: dict[str, Any] = {"P": A.shape[0], "largest eigenvalue": largest, "damping": damping, "rtol": rtol, "by": {}}
    for count in options.columns:
        for contender in options.contender or CONTENDERS:
            finish()
            clock = Clock(options.limit)
            try:
                X, products = CONTENDERS[contender](problem, damping, rtol, B[:, :count], clock)
            except Exception as error:  # what a peer cannot do is a result, too
                result = {"failed": " ".join(f"{type(error).__name__}: {error}".split())[:300]}
            else:
                finish()
                seconds, solved = clock.seconds, X.shape[1]
                largest_residual = float(residuals(problem, X, B[:, :solved], damping).max())
                factor = count / solved
                result = {
                    "products": round(products * factor),
                    "seconds": seconds * factor,
                    "columns solved": solved,
                    "residual": largest_residual,
                    "reached": largest_residual <= 1.01 * rtol,
                }
            found["by"].setdefault(f"{count} columns", {})[contender] = result
            print(name, count, contender, json.dumps(result), flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=MODELS, action="append", help="only this; may be repeated")
    parser.add_argument("--contender", choices=CONTENDERS, action="append", help="only this; may be repeated")
    parser.add_argument("--columns", type=int, nargs="+", default=[1, 10, 50], help="right-hand sides; 1 10 50")
    parser.add_argument("--dtype", choices=SETTINGS, default="float64", help="of the models; float64")
    add_device_options(parser)
    parser.add_argument("--limit", type=float, default=30.0, metavar="SECONDS", help="for each result; 30")
    parser.add_argument("--out", type=Path, default=RESULTS, help="results; benchmarks/results/solves.json")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    set_tf32(options.tf32)
    results: dict[str, Any] = {
        "environment": environment(options.device),
        "tf32": options.tf32,
        "dtype": options.dtype,
        "preconditioner's rank": RANK,
        "limit in seconds": options.limit,
        "models": {},
    }
    with sdpa_kernel(SDPBackend.MATH):  # fused attention has no second derivative
        for name in options.model or DEFAULT:
            results["models"][name] = measure(name, options)
            options.out.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
