"""Count the products that preconditioners save in damped solves and in searches for the smallest eigenvalues.

Run ``OMP_NUM_THREADS=1 python benchmarks/preconditioning.py``; it writes ``benchmarks/results/preconditioning.json``
and takes about ten minutes. ``--case`` and ``--contender`` select what is measured, and keep the other results in the
file. Counts do not depend on the machine. The script needs the packages of the extra ``test``.

The matrices are Gauss-Newton matrices in float64. Each is computed once and stored, because a product with the stored
matrix takes less time, and counts the same. `solve` solves systems with 1, 16 and 512 random right-hand sides to
a relative residual of 1e-6. The damping is a fraction of the largest eigenvalue. The products that construct a
preconditioner are counted apart. KFAC and EKFAC take none, but as many backward passes for each batch as the model has
outputs, EKFAC twice as many. A solve that has taken 1000 steps or 12,000 products is stopped. The convolutional network
has 300 images, and the other networks for images have 1797.

"low rank" combines KFAC with an exact correction across layers. Let V be the approximate eigenvectors of the 100
largest eigenvalues from `nystrom`, and ``E = V' (A + damping I) V``. The correction solves the system exactly in the
space of V, and KFAC treats the rest: ``M = V E^-1 V' + P K^-1 P'`` with ``P = I - V E^-1 V' (A + damping I)`` (Tang,
Nabben, Vuik, Erlangga, 2009, "Comparison of two-level preconditioners derived from deflation, domain decomposition and
multigrid methods", J. Sci. Comput. 39, there "BNN").

The search for eigenvalues is SciPy's ``lobpcg`` for the 4 smallest eigenvalues of the damped matrix, with a tolerance
of a hundredth of the damping for the norms of the residuals. The residuals of converged vectors can grow again, and may
be up to twice the tolerance.
"""

from __future__ import annotations

import argparse
import json
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from environment import environment
from models import GPT
from models import problem as random_problem
from scipy.sparse.linalg import LinearOperator, eigsh, lobpcg
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from curvop import EKFACLinearOperator, GGNLinearOperator, KFACLinearOperator, solve
from curvop.preconditioner import nystrom
from curvop.problems import digits

RESULTS = Path(__file__).resolve().parent / "results" / "preconditioning.json"
RTOL = 1e-6
DAMPINGS = (1e-2, 1e-4)  # in units of the largest eigenvalue
COLUMNS = (1, 16, 512)
RANK = 100
MOST_STEPS = 1000  # of `solve` for each column
MOST_PRODUCTS = 12_000  # of `solve` for all columns
MOST_ITERATIONS = 400  # of `lobpcg`
WANTED = 4  # smallest eigenvalues
MOST_IN_BLOCK = 128  # columns that `solve` solves together
CONTENDERS = ("none", "KFAC", "EKFAC", "exact blocks", "nystrom", "KFAC, low rank", "auto")
CANDIDATES = ("none", "KFAC", "nystrom", "auto")

Problem = dict[str, Any]


class StoredGGN(GGNLinearOperator):
    """A Gauss-Newton matrix that is computed once. Products with the stored matrix take less time.

    Attributes
    ----------
    matrix : Tensor, shape (P, P)
        The matrix.
    """

    matrix: Tensor | None = None

    def _apply(self, rows: Any) -> Any:
        if self.matrix is None:
            return super()._apply(rows)
        return rows @ (self.matrix if isinstance(rows, Tensor) else self.matrix.numpy())


def stored(problem: Problem) -> StoredGGN:
    A = StoredGGN(**problem)
    matrix = torch.from_numpy(np.array(A.to_dense()))
    A.matrix = (matrix + matrix.T) / 2
    return A


def image_problem(model: nn.Module, shape: tuple[int, ...], epochs: int, most: int | None = None) -> Problem:
    """Return the first digits as images of a shape, and the model after some epochs of training."""
    pixels, labels = (torch.cat(parts)[:most] for parts in zip(*digits()["data"], strict=True))
    data = [(pixels.reshape(-1, *shape), labels)]
    model, loss_function = model.double(), nn.CrossEntropyLoss()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    [(inputs, targets)] = data
    for _ in range(epochs):
        for rows in torch.randperm(len(inputs)).split(128):
            optimizer.zero_grad()
            loss_function(model(inputs[rows]), targets[rows]).backward()
            optimizer.step()
    model.zero_grad()
    model.eval()
    params = {name: param for name, param in model.named_parameters() if param.requires_grad}
    return {"model": model, "loss_function": loss_function, "params": params, "data": data}


def mlp(width: int) -> nn.Module:
    return nn.Sequential(nn.Linear(64, width), nn.Tanh(), nn.Linear(width, 10))


def cnn() -> nn.Module:
    return nn.Sequential(
        *(nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(8, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Flatten(), nn.Linear(64, 10)),
    )


def wide_layer() -> nn.Module:
    """Return one linear layer of 256 fixed features of the pixels."""
    return nn.Sequential(nn.Linear(64, 256).requires_grad_(False), nn.Tanh(), nn.Linear(256, 10))


def small_gpt() -> Problem:
    return random_problem(GPT(tokens=17, width=12, length=8, depth=1).double(), (8,), 16, 2, tokens=17)


CASES: dict[str, Callable[[], Problem]] = {
    "MLP, untrained": lambda: image_problem(mlp(32), (64,), 0),
    "MLP, trained": lambda: image_problem(mlp(32), (64,), 40),
    "CNN, untrained": lambda: image_problem(cnn(), (1, 8, 8), 0, most=300),
    "CNN, trained": lambda: image_problem(cnn(), (1, 8, 8), 40, most=300),
    "transformer, untrained": small_gpt,
    "wide layer, untrained": lambda: image_problem(wide_layer(), (64,), 0),
    "wide layer, trained": lambda: image_problem(wide_layer(), (64,), 20),
}


def exact_blocks(A: StoredGGN, damping: float) -> Callable[[Tensor], Tensor]:
    """Return the product with the inverse of the damped diagonal blocks of the layers."""
    assert A.matrix is not None
    sizes = [block.shape[0] for block in A.block_diagonal("layers").args]
    blocks = [rows.split(sizes, 1)[i] for i, rows in enumerate(A.matrix.split(sizes))]
    factors = [torch.linalg.cholesky(block + damping * torch.eye(len(block)).to(block)) for block in blocks]

    def multiply(X: Tensor) -> Tensor:
        parts = zip(X.split(sizes), factors, strict=True)
        return torch.cat([torch.cholesky_solve(part, factor) for part, factor in parts])

    return multiply


def low_rank(
    A: StoredGGN, inverse: LinearOperator, damping: float, rank: int
) -> tuple[Callable[[Tensor], Tensor], int]:
    """Return the product with an approximate inverse that is corrected across layers, and its number of products."""
    approximation = nystrom(A, rank, damping, rng=0)
    V = torch.from_numpy(np.array(approximation.vectors))
    image = A @ V + damping * V
    inner = V.T @ image
    factor = torch.linalg.cholesky((inner + inner.T) / 2)

    def multiply(X: Tensor) -> Tensor:
        coarse = torch.cholesky_solve(V.T @ X, factor)
        Z = inverse @ (X - image @ coarse)
        return Z + V @ (coarse - torch.cholesky_solve(image.T @ Z, factor))

    return multiply, 2 * rank


def preconditioner(name: str, problem: Problem, A: StoredGGN, damping: float) -> tuple[Any, int]:
    """Return a preconditioner, and the number of products that construct it."""
    rank = min(RANK, A.shape[0])
    if name in ("KFAC", "KFAC, low rank"):
        inverse = KFACLinearOperator(**problem).inverse(damping)
        return (inverse, 0) if name == "KFAC" else low_rank(A, inverse, damping, rank)
    if name == "EKFAC":
        return EKFACLinearOperator(**problem).inverse(damping), 0
    if name == "exact blocks":
        return exact_blocks(A, damping), A.shape[0]
    if name == "nystrom":
        return nystrom(A, rank, damping, rng=0), rank
    return {"none": None, "auto": "auto"}[name], 0


def measure_solves(A: GGNLinearOperator, damping: float, found: dict[str, tuple[Any, int]], columns: int) -> Any:
    """Count the products of `solve` with each preconditioner."""
    B = torch.from_numpy(np.random.default_rng(0).standard_normal((A.shape[0], columns)))
    rows, steps = {}, min(MOST_STEPS, MOST_PRODUCTS // columns)
    for name, (M, construction) in found.items():
        before = A.num_products
        result = solve(A, B, damping, rtol=RTOL, preconditioner=M, maxiter=steps, progress=False)
        products = int(np.sum(result.products))
        # "auto" constructs its candidates during the solve.
        row = {"products": products, "construction": construction + A.num_products - before - products}
        rows[name] = row | {"converged": bool(np.all(result.converged))}
        if result.preconditioner:
            rows[name]["took"] = result.preconditioner
    return rows


def measure_lobpcg(A: StoredGGN, damping: float, preconditioner: Any) -> dict[str, Any]:
    """Count the products of ``lobpcg`` for the smallest eigenvalues of the damped matrix."""
    count = 0

    def multiply(X: np.ndarray) -> np.ndarray:
        nonlocal count
        count += X.shape[1] if X.ndim == 2 else 1
        return A @ X + damping * X

    operator = LinearOperator(A.shape, matvec=multiply, matmat=multiply, dtype=np.float64)
    X, tolerance = np.random.default_rng(0).standard_normal((A.shape[0], WANTED)), 1e-2 * damping
    values, vectors = lobpcg(operator, X, M=preconditioner, tol=tolerance, maxiter=MOST_ITERATIONS, largest=False)
    products = count
    residuals = np.linalg.norm(multiply(vectors) - vectors * values, axis=0)
    return {"products": products, "converged": bool((residuals <= 2 * tolerance).all())}


def measure(
    make: Callable[[], Problem],
    dampings: Sequence[float],
    columns: Sequence[int],
    contenders: Sequence[str] = CONTENDERS,
) -> dict[str, Any]:
    """Return the counts of one case."""
    torch.manual_seed(0)
    problem = make()
    A = stored(problem)
    largest = float(eigsh(A, k=1, tol=1e-3, v0=np.ones(A.shape[0]), return_eigenvectors=False)[0])
    measured: dict[str, Any] = {"P": A.shape[0], "largest eigenvalue": largest, "solves": {}, "lobpcg": {}}
    for fraction in dampings:
        damping = fraction * largest
        found = {name: preconditioner(name, problem, A, damping) for name in contenders}
        # With more columns than one block has, "auto" measures: compare it with its candidates only.
        measured["solves"][f"{fraction:g}"] = {
            str(count): measure_solves(
                A, damping, {name: found[name] for name in found if count <= MOST_IN_BLOCK or name in CANDIDATES}, count
            )
            for count in columns
        }
        measured["lobpcg"][f"{fraction:g}"] = {
            name: measure_lobpcg(A, damping, found[name][0]) for name in ("none", "KFAC") if name in found
        }
    return measured


def merged(old: Any, new: Any) -> Any:
    """Return nested results in which new numbers replace old ones."""
    if not (isinstance(old, dict) and isinstance(new, dict)):
        return new
    return old | {key: merged(old.get(key), value) for key, value in new.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--case", choices=CASES, action="append", help="only this; may be repeated")
    parser.add_argument("--contender", choices=CONTENDERS, action="append", help="only this; may be repeated")
    parser.add_argument("--columns", type=int, nargs="+", default=COLUMNS, help="right-hand sides; 1 16 512")
    parser.add_argument("--out", type=Path, default=RESULTS, help="results; benchmarks/results/preconditioning.json")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    selected = bool(options.case or options.contender)
    results: dict[str, Any] = (
        json.loads(options.out.read_text()) if selected and options.out.exists() else {"cases": {}}
    )
    results |= {"environment": environment(), "rtol": RTOL, "rank": RANK, "eigenvalues": WANTED}
    with sdpa_kernel(SDPBackend.MATH):  # fused attention has no second derivative
        for name in options.case or CASES:
            measured = measure(CASES[name], DAMPINGS, options.columns, options.contender or CONTENDERS)
            cases = merged(results["cases"], {name: measured})
            results["cases"] = {key: cases[key] for key in CASES if key in cases}
            options.out.write_text(json.dumps(results, indent=2) + "\n")
            print(name, json.dumps(measured), flush=True)


if __name__ == "__main__":
    main()
