"""Who competes: each builds, of a problem and the work to do, what multiplies NumPy vectors.

A contender returns a function of the vectors; for eigenvalues, a SciPy operator.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from reference import double_backward
from scipy.sparse.linalg import LinearOperator
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

import curvop as curvop_package
from curvop import HessianLinearOperator

__all__ = ["CONTENDERS", "EIGENTHINGS_SEED", "WORK", "Contender", "Work", "curvlinops_operator"]

Problem = dict[str, Any]

#: How many Lanczos steps of hessian-eigenthings suffice, by the number of parameters.
EIGENTHINGS_STEPS: dict[int, int] = {}
EIGENTHINGS_SEED = 0

WHOLE = ("product", "nothing kept", "block of 8", "dense")
BLOCKS = ("last layer", "off diagonal", "slice")
GGN = ("Gauss-Newton", "Gauss-Newton, block of 8")
#: Products with other matrices than the Hessian, by the names of their operators.
OTHERS = {"Gauss-Newton": "GGNLinearOperator", "empirical Fisher": "EFLinearOperator"}
WORK = ("product", "nothing kept", "block of 8", *BLOCKS, "dense", "eigsh", *GGN, "empirical Fisher")


@dataclass
class Work:
    """What is to be multiplied: a block of the Hessian, by `vectors`; rows and columns None for the whole.

    Or, where `kind` says so, another matrix.
    """

    kind: str
    rows: list[str] | None
    cols: list[str] | None
    vectors: np.ndarray

    @property
    def dtype(self) -> Any:
        """The dtype of the vectors, also of those that an eigensolver keeps."""
        return self.vectors.dtype

    @property
    def matrix(self) -> str:
        """The name of the matrix."""
        name = self.kind.partition(",")[0]
        return name if name in OTHERS else "Hessian"

    def operator(self, package: Any) -> Any:
        """Return the operator of the matrix, which has the same name in curvop and in curvlinops."""
        return getattr(package, OTHERS.get(self.matrix, "HessianLinearOperator"))


@dataclass(frozen=True)
class Contender:
    """Who competes, in which kinds of work.

    A yardstick is timed beside the others, but does other work, which is not judged. What is compiled is compiled once,
    not in every run.
    """

    build: Callable[[Problem, Work], Any]
    kinds: Collection[str]
    yardstick: bool = False
    compiled: bool = False


# This package.


def curvop(problem: Problem, work: Work, engine: str = "autograd") -> Any:
    cache = 0 if work.kind == "nothing kept" else np.inf
    H = work.operator(curvop_package)(**problem, dtype=work.dtype, cache=cache, engine=engine)
    if work.kind == "slice":
        first = H.params_slices[work.rows[0]]
        H = H[first, first]
    elif work.rows:
        H = H.block(work.rows, work.cols)
    return H if work.kind == "eigsh" else H.__matmul__


def curvop_lanczos(problem: Problem, work: Work, engine: str = "autograd") -> Any:
    """Solve with this package, not with SciPy."""
    H = curvop(problem, work, engine)

    def solve(v0: np.ndarray, k: int, tol: float) -> tuple[np.ndarray, np.ndarray]:
        options = {"method": "lanczos", "ncv": 2 * k + 1, "certificate": False, "progress": False}
        result = curvop_package.spectrum.eigsh(H, k, "LA", tol=tol, v0=v0, **options)
        return result.values, result.vectors

    return solve


def curvop_tensors(problem: Problem, work: Work, engine: str = "autograd") -> Any:
    """Tensors in and out, which stay where the model is."""
    return with_tensors(curvop(problem, work, engine), problem, work)


def with_tensors(multiply: Callable[[Tensor], Tensor], problem: Problem, work: Work) -> Callable[..., Tensor]:
    vectors = tensor_like(problem, work.vectors)
    return lambda _: multiply(vectors)


def tensor_like(problem: Problem, array: np.ndarray) -> Tensor:
    """Return the array as a tensor of the precision and on the device of the parameters."""
    return torch.from_numpy(array).to(next(iter(problem["params"].values())))


def curvop_one_batch(problem: Problem, work: Work, engine: str = "autograd") -> Any:
    return curvop(problem | {"data": [joined(problem)]}, work, engine)


def curvop_restricted(problem: Problem, work: Work, engine: str = "autograd") -> Any:
    """Take only the parameter of the slice, chosen by hand."""
    params = {name: problem["params"][name] for name in work.rows}
    return curvop(problem | {"params": params}, whole(work), engine)


def curvop_whole(problem: Problem, work: Work, engine: str = "autograd") -> Any:
    """Multiply with all parameters, whatever block the work is about."""
    H = curvop(problem, whole(work), engine)
    vector = np.random.default_rng(1).standard_normal(sum(value.numel() for value in problem["params"].values()))
    return lambda _: H(vector)


def whole(work: Work) -> Work:
    return Work("product", None, None, work.vectors)


# curvlinops-for-pytorch.


def curvlinops_operator(problem: Problem, work: Work, compiled: bool = False) -> Any:
    import curvlinops

    H = work.operator(curvlinops)(
        problem["model"],
        problem["loss_function"],
        list(problem["params"].values()),
        problem["data"],
        check_deterministic=False,
    )
    if compiled:
        H.__dict__["_mp"] = traced(H._mp)
    if work.rows:
        where = slices(problem)
        spans = [[i for name in names for i in range(*where[name])] for names in (work.rows, work.cols)]
        H = curvlinops.SubmatrixLinearOperator(H, *spans)
    return H


def traced(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compile what the first call computes.

    Given as it is, torch.compile breaks the graph of curvlinops' product at once and runs all of it eagerly.
    """
    made: list[Callable[..., Any]] = []

    def call(*args: Tensor) -> Any:
        if not made:
            made.append(torch.compile(make_fx(function)(*args)))
        return made[0](*args)

    return call


def curvlinops_scipy(problem: Problem, work: Work) -> Any:
    H = curvlinops_operator(problem, work).to_scipy(work.dtype)
    return H if work.kind == "eigsh" else H.__matmul__


def curvlinops_eager(problem: Problem, work: Work) -> Any:
    """Tensors in and out, without the way through NumPy."""
    return with_tensors(curvlinops_operator(problem, work).__matmul__, problem, work)


def curvlinops_compiled(problem: Problem, work: Work) -> Any:
    H = curvlinops_operator(problem, work, compiled=True).to_scipy(work.dtype)
    return H if work.kind == "eigsh" else H.__matmul__


# hessian-eigenthings. It averages over batches, so all batches must have the same size, as they have here.


def eigenthings(problem: Problem, work: Work) -> Any:
    return for_scipy(by_column(problem, eigenthings_operator(problem, work).matvec), work)


def eigenthings_lanczos(problem: Problem, work: Work) -> Any:
    """Solve with the package itself, which does not restart. The first call finds the number of steps."""
    import hessian_eigenthings as package

    A = eigenthings_operator(problem, work)

    def solve(_: np.ndarray, k: int, tol: float) -> tuple[np.ndarray, np.ndarray]:
        for steps in range(EIGENTHINGS_STEPS.get(A.size, 2 * k), A.size, k // 2):
            found = package.lanczos(
                A, k=k, max_iter=steps, tol=tol, reorthogonalize=True, which="LA", seed=EIGENTHINGS_SEED
            )
            if found.converged.all():
                EIGENTHINGS_STEPS[A.size] = steps
                break
        return found.eigenvalues.numpy(force=True), found.eigenvectors.T.numpy(force=True)

    return solve


def eigenthings_operator(problem: Problem, work: Work) -> Any:
    import hessian_eigenthings as package

    model, loss_function, data = problem["model"], problem["loss_function"], problem["data"]
    if work.matrix == "Gauss-Newton":
        loss_of_output = package.supervised_loss_of_output(loss_function)
        return package.GGNOperator(model, data, package.supervised_forward, loss_of_output)
    return package.HessianOperator(model, data, package.supervised_loss(loss_function))


# PyHessian. It works on the gradients that the model's parameters hold, hence a copy of the model.


def pyhessian_single(problem: Problem, work: Work) -> Any:
    """PyHessian's way with one batch: the gradient's graph is kept."""
    from pyhessian import hessian
    from pyhessian.utils import hessian_vector_product

    H = hessian(copy.deepcopy(problem["model"]), problem["loss_function"], data=joined(problem), cuda=on_gpu(problem))
    multiply = in_parts(problem, lambda parts: hessian_vector_product(H.gradsH, H.params, parts))
    return for_scipy(by_column(problem, multiply), work)


def pyhessian_loader(problem: Problem, work: Work) -> Any:
    from pyhessian import hessian

    model, loss_function, data = copy.deepcopy(problem["model"]), problem["loss_function"], problem["data"]
    H = hessian(model, loss_function, dataloader=data, cuda=on_gpu(problem))
    return by_column(problem, in_parts(problem, lambda parts: H.dataloader_hv_product(parts)[1]))


def on_gpu(problem: Problem) -> bool:
    return next(iter(problem["params"].values())).is_cuda


def in_parts(problem: Problem, product: Callable[[list[Tensor]], Sequence[Tensor]]) -> Callable[[Tensor], Tensor]:
    """Return a function of vectors that calls `product` with one tensor for each parameter."""
    params = list(problem["params"].values())

    def multiply(vector: Tensor) -> Tensor:
        pieces = vector.split([param.numel() for param in params])
        parts = [piece.view_as(param) for piece, param in zip(pieces, params, strict=True)]
        return torch.cat([part.reshape(-1) for part in product(parts)])

    return multiply


def by_column(problem: Problem, multiply: Callable[[Tensor], Tensor]) -> Callable[..., np.ndarray]:
    """Return a function of NumPy vectors, which calls `multiply` for one vector after another."""

    def one(vector: np.ndarray) -> np.ndarray:
        return multiply(tensor_like(problem, vector)).numpy(force=True).astype(vector.dtype, copy=False)

    return lambda x: one(x) if x.ndim == 1 else np.stack([one(column) for column in x.T.copy()], 1)


def for_scipy(multiply: Callable[..., np.ndarray], work: Work) -> Any:
    """Return the function, or for an eigensolver an operator that calls it."""
    if work.kind != "eigsh":
        return multiply
    return LinearOperator(2 * work.vectors.shape, matvec=multiply, dtype=work.dtype)


# torch alone.


def by_hand(problem: Problem, work: Work) -> Any:
    """Double backward from the beginning in every product, as scripts do it."""

    def multiply(vectors: np.ndarray) -> np.ndarray:
        columns = list(tensor_like(problem, vectors.T).reshape(-1, len(vectors)))
        found = double_backward(problem, work.rows, work.cols, columns)
        products = found.numpy(force=True).astype(vectors.dtype, copy=False)
        return products[0] if vectors.ndim == 1 else products.T

    return multiply


def gradient(problem: Problem, work: Work) -> Any:
    """Compute a plain gradient over the same data."""
    params = list(problem["params"].values())

    def run(_: np.ndarray) -> None:
        for X, y in problem["data"]:
            torch.autograd.grad(problem["loss_function"](problem["model"](X), y), params)

    return run


def joined(problem: Problem) -> tuple[Tensor, Tensor]:
    X, y = (torch.cat(parts) for parts in zip(*problem["data"], strict=True))
    return X, y


def slices(problem: Problem) -> dict[str, tuple[int, int]]:
    where, start = {}, 0
    for name, value in problem["params"].items():
        where[name] = (start, start + value.numel())
        start += value.numel()
    return where


def own(engine: str) -> dict[str, Contender]:
    """Return this package's contenders with an engine, none where there is no such engine."""
    parameter = torch.zeros(1, requires_grad=True)
    try:
        HessianLinearOperator.from_objective(lambda p, _: p["a"].sum(), {"a": parameter}, [0], engine=engine)
    except ValueError:
        return {}
    name, compiled = ("curvop", False) if engine == "autograd" else (f"curvop {engine}", True)

    def contender(build: Callable[..., Any], *kinds: str, yardstick: bool = False) -> Contender:
        return Contender(lambda problem, work: build(problem, work, engine), kinds, yardstick, compiled)

    return {
        name: contender(curvop, *WHOLE, *BLOCKS, "eigsh", *GGN, "empirical Fisher"),
        f"{name}, lanczos": contender(curvop_lanczos, "eigsh"),
        f"{name}, tensors": contender(curvop_tensors, "product", "block of 8"),
        f"{name}, one batch": contender(curvop_one_batch, "product", "block of 8", "eigsh"),
        f"{name}, restricted": contender(curvop_restricted, "slice"),
        f"{name}, whole": contender(curvop_whole, "off diagonal", yardstick=True),
    }


CONTENDERS: dict[str, Contender] = {
    **own("autograd"),
    **own("compiled"),
    "curvlinops to_scipy": Contender(curvlinops_scipy, [*WHOLE, *BLOCKS, "eigsh", *GGN, "empirical Fisher"]),
    "curvlinops eager": Contender(curvlinops_eager, WHOLE),
    "curvlinops compiled": Contender(curvlinops_compiled, ["product", "block of 8", "eigsh", *GGN], compiled=True),
    "eigenthings": Contender(eigenthings, [*WHOLE, "eigsh", *GGN]),
    "eigenthings lanczos": Contender(eigenthings_lanczos, ["eigsh"]),
    "PyHessian single": Contender(pyhessian_single, ["product", "block of 8", "dense", "eigsh"]),
    "PyHessian loader": Contender(pyhessian_loader, WHOLE),
    "by hand": Contender(by_hand, [*WHOLE, *BLOCKS]),
    "gradient": Contender(gradient, ["product", "Gauss-Newton", "empirical Fisher"], yardstick=True),
}
