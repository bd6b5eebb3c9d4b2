"""Functions that the processes of the distributed tests run.

`Ranks` starts the processes from a fork server that has already imported torch, and waits for a limited time. Each rank
writes its results to a file.
"""

from __future__ import annotations

import functools
import json
import os
import signal
import socket
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from cases import Problem, cut, log_problem, loss_problem, mlp, seeded
from processes import started
from scipy.sparse.linalg import cg, eigsh
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from curvop import (
    EFLinearOperator,
    FisherLinearOperator,
    GGNLinearOperator,
    GradientCovarianceLinearOperator,
    HessianLinearOperator,
    JournaledLinearOperator,
    check,
)
from curvop.distributed import serve
from curvop.preconditioner import jacobi
from curvop.spectrum import density
from curvop.storage.fingerprint import fingerprint

TIMEOUT = 4.0

# Problems, and the distribution of their batches over the ranks.


@seeded
def singles(loss: str) -> Problem:
    return loss_problem(loss, "singles")


@seeded
def weighted() -> Problem:
    """Return a user-defined objective with `batch_weight`."""
    model = mlp()
    X, y = torch.randn(9, 4), torch.randn(9, 3)

    def objective(params: dict[str, Any], batch: Any) -> Any:
        prediction = torch.func.functional_call(model, params, (batch[0],))
        return ((prediction - batch[1]) ** 4).mean() + 0.1 * sum((value**2).sum() for value in params.values())

    return Problem(model, objective, cut(X, y, (2, 3, 4)))


@seeded
def single_precision() -> Problem:
    problem = loss_problem("ce-weights", "singles")
    data = [(X.float(), y) for X, y in problem.data]
    return Problem(problem.model.float(), nn.CrossEntropyLoss(problem.loss_function.weight.float()), data)


def rows_of(batch: Any) -> float:
    return float(len(batch[0]) ** 2)


def from_objective(problem: Problem, data: list[Any]) -> HessianLinearOperator:
    return HessianLinearOperator.from_objective(problem.loss_function, problem.params, data, batch_weight=rows_of)


KINDS = {
    "hessian": HessianLinearOperator,
    "ggn": GGNLinearOperator,
    "ef": EFLinearOperator,
    "fisher": FisherLinearOperator,
    "covariance": GradientCovarianceLinearOperator,
}
CASES: dict[str, tuple[Any, tuple[Any, ...], str, str]] = {
    # name: problem, its arguments, matrix, distribution of the batches
    "mse": (singles, ("mse",), "hessian", "uneven"),
    "sum": (singles, ("mse-sum",), "hessian", "uneven"),
    "classes": (singles, ("ce-weights",), "ggn", "uneven"),
    "ignored": (singles, ("ce-ignored",), "hessian", "uneven"),
    "nothing on rank 0": (singles, ("ce-everything",), "hessian", "last"),
    "nothing but on rank 0": (singles, ("bce-weights",), "hessian", "first"),
    "any function": (singles, ("callable",), "ggn", "uneven"),
    "divergence": (log_problem, ("kl-batchmean",), "hessian", "uneven"),
    "empirical Fisher": (singles, ("ce-ignored",), "ef", "uneven"),
    "Fisher": (singles, ("ce-weights",), "fisher", "uneven"),
    "covariance": (singles, ("ce-weights",), "covariance", "uneven"),
    "covariance of a sum": (singles, ("mse-sum",), "covariance", "last"),
    "batch_weight": (weighted, (), "objective", "uneven"),
    "float32": (single_precision, (), "ggn", "uneven"),
}
ROWS, COLS = ["2.bias", "0.weight"], ["0.bias", "2.bias"]


def spread(data: list[Any], rank: int, size: int, how: str) -> list[Any]:
    """Return a rank's part of the data: of uneven size, or all data on the first or last rank."""
    if how in ("first", "last"):
        return data if rank == (0 if how == "first" else size - 1) else []
    stops = [0, *(len(data) * (index + 1) ** 2 // size**2 for index in range(size))]
    return data[stops[rank] : stops[rank + 1]]


def operator(case: str, rank: int = 0, size: int = 1) -> Any:
    build, arguments, kind, how = CASES[case]
    problem = build(*arguments)
    data = spread(problem.data, rank, size, how)
    if kind == "objective":
        return from_objective(problem, data)
    return KINDS[kind](problem.model, problem.loss_function, problem.params, data)


def vectors(size: int, count: int = 3) -> np.ndarray:
    return np.random.default_rng(size).normal(size=(size, count))


def results(A: Any) -> dict[str, Any]:
    """Return the products and other results that are compared between one process and several."""
    names = list(A.params_slices)
    rows, cols = ([names[3], names[0]], [names[1], names[3]]) if len(names) > 3 else (names[:1], names[-1:])
    block = A.block(rows, cols)
    idxs = [5, 2, 5, A.shape[0] - 1]
    gradient, loss = A.gradient_and_loss()
    found = {
        "vector": A @ vectors(A.shape[0])[:, 0],
        "columns": A @ vectors(A.shape[0]),
        "integers": A @ np.arange(A.shape[0]),
        "float32": A @ vectors(A.shape[0])[:, 0].astype(np.float32),
        "tensor": (A @ torch.from_numpy(vectors(A.shape[0]))).numpy(),
        "block": block @ vectors(block.shape[1]),
        "adjoint": block.H @ vectors(block.shape[0]),
        "diagonal blocks": np.concatenate([one @ np.ones(one.shape[1]) for one in A.blocks()]),
        "submatrix": A.submatrix(idxs, [1, 0]) @ np.eye(2),
        "damped": A.damped(0.3) @ vectors(A.shape[0]),
        "damped block": A.damped(0.3).block(rows, cols) @ vectors(block.shape[1]),
        "gradient": gradient,
        "loss": np.array([loss]),
    }
    try:
        found["diagonal"] = A.diagonal()
    except NotImplementedError as error:
        found["no diagonal"] = str(error)
    return found


# Runs: functions of the rank, the number of ranks, and a directory. `Ranks` takes them by name.


def matrices(rank: int, size: int, folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for case in CASES:
        with serve(operator(case, rank, size), timeout=TIMEOUT) as A:
            assert (A is None) == (rank > 0)
            if A is not None:
                found[case] = results(A)
                assert A.num_products > 10
    return found


def solvers(rank: int, size: int, folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = {}
    with serve(operator("classes", rank, size), operator("mse", rank, size), timeout=TIMEOUT) as (G, H):
        if rank == 0:
            b = vectors(G.shape[0])[:, 0]
            found["eigenvalues"] = eigsh(H, k=3, v0=b, return_eigenvectors=False)
            found["solution"] = cg(G.damped(0.1), b, rtol=1e-12)[0]
            found["jacobi"] = jacobi(G, 0.1) @ b
            found["trace"] = density(G, num_probes=2, num_steps=8, rng=0, progress=False).trace().value
            for _ in range(2):
                with JournaledLinearOperator(G, folder / "journal") as J:
                    found.setdefault("journal", []).append([(J @ b), J.num_products, J.num_answered])
            found["fingerprint"] = fingerprint(G)
    return found


def checks(rank: int, size: int, folder: Path) -> dict[str, Any]:
    """Check served operators in both precisions, plain and wrapped, and one whose products are wrong by 1 %."""
    found: dict[str, Any] = {}
    for case in ("float32", "mse"):
        with serve(operator(case, rank, size), timeout=TIMEOUT) as A:
            if rank == 0:
                found[case] = check(A, rng=0)
                found[f"{case}, damped"] = check(A.damped(1.0), rng=0)
                found[f"{case}, block"] = check(A.block("0.weight", "2.bias"), rng=0)
                with raised(found, "cost"):
                    A.cost()
                multiply, A._multiply = A._multiply, lambda X, right=A._multiply: right(X) + 0.01 * X.abs()
                found[f"{case}, wrong"] = check(A, rng=0)
                A._multiply = multiply
    return found


def seeds(rank: int, size: int, folder: Path) -> dict[str, Any]:
    """Use one journal in several runs; in the last, rank 1 has another seed."""
    found: dict[str, Any] = {}
    problem = singles("mse")
    for name, seed in (("first", rank), ("same", rank), ("other", 7 * rank)):
        data = spread(problem.data, rank, size, "uneven")
        F = FisherLinearOperator(problem.model, nn.MSELoss(), problem.params, data, mc_samples=1, rng=seed)
        with serve(F, timeout=TIMEOUT) as W:
            if rank == 0:
                found[name] = W @ np.ones(W.shape[0])
                found[f"{name}, fingerprint"] = fingerprint(W)
                with raised(found, f"{name}, journal"), JournaledLinearOperator(W, folder / "journal") as J:
                    found[f"{name}, from the journal"] = J @ np.ones(W.shape[0])
    return found


@contextmanager
def raised(found: dict[str, Any], name: str) -> Iterator[None]:
    """Record the exception that the block raises, or None."""
    began = time.monotonic()
    try:
        yield
        found[name] = None
    except BaseException as error:
        found[name] = {
            "kind": type(error).__name__,
            "message": str(error),
            "rank": getattr(error, "rank", None),
            "seconds": time.monotonic() - began,
            "at": time.monotonic(),  # comparable between processes of one machine
        }


@contextmanager
def interrupted(seconds: float) -> Iterator[None]:
    """Raise KeyboardInterrupt in the block after some seconds, as Ctrl-C does."""

    def press(*_: Any) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, press)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


class Faulty:
    """A loader that can be made slow, or to raise an error."""

    error: BaseException | None = None
    pause = 0.0

    def __init__(self, batches: list[Any]) -> None:
        self.batches = batches

    def __iter__(self) -> Iterator[Any]:
        time.sleep(self.pause)
        if self.error is not None:
            raise self.error
        return iter(self.batches)


def parts(rank: int, size: int, **options: Any) -> tuple[GGNLinearOperator, Faulty]:
    """Return a rank's operator, which reads its data in each product, and its loader."""
    problem = singles("ce-weights")
    data = Faulty(spread(problem.data, rank, size, "uneven"))
    return GGNLinearOperator(problem.model, problem.loss_function, problem.params, data, cache=0, **options), data


def survivors(rank: int, size: int, folder: Path) -> dict[str, Any]:
    """Raise errors while all ranks are alive."""
    found: dict[str, Any] = {}
    A, data = parts(rank, size)
    x = vectors(A.shape[0])[:, 0]
    if rank == 1:
        data.error = FileNotFoundError("no such shard")
    with serve(A, timeout=TIMEOUT) as W:
        if rank == 0:
            with raised(found, "the loader of rank 1"):
                W @ x
            with raised(found, "and again"):
                W.gradient_and_loss()
    data.error = None
    with serve(A, timeout=TIMEOUT) as W:
        if rank == 0:
            with raised(found, "the vector"):
                W @ np.full(len(x), np.nan)
            found["after the vector"] = W @ x
            data.error = KeyboardInterrupt()
            with raised(found, "Ctrl-C in a product"):
                W @ x
            data.error = None
            found["after Ctrl-C"] = W @ x
            with raised(found, "nested"), serve(A):
                pass
            found["after nested"] = W @ x
            with raised(found, "no such parameter"):
                W.block("0.wieght")
            with raised(found, "shape"):
                W @ x[1:]
    data.pause = 1.5 * rank
    with serve(A, timeout=1) as W:
        if rank == 0:
            with raised(found, "Ctrl-C while rank 1 computes"), interrupted(0.2):
                W @ x
            found["after waiting"] = W @ x
            found["a slow rank"] = W @ x
    data.pause = 0.0
    with raised(found, "the block has ended"):
        W @ x
    B, data = parts(rank, size)
    if rank == 1:
        data.batches[0] = (data.batches[0][0] * np.inf, data.batches[0][1])
    with raised(found, "infinite data"), serve(B, timeout=TIMEOUT) as W:
        if rank == 0:
            W @ x
    with raised(found, "rank 0 raises"), serve(A, timeout=TIMEOUT) as W:
        if rank == 0:
            W @ x
            raise ZeroDivisionError("in the block")
    if rank == 1:
        with torch.no_grad():
            A._params["0.weight"][0, 0] += 1e-9
    with raised(found, "other parameters"), serve(A, timeout=TIMEOUT):
        pass
    with raised(found, "no operator"), serve(A if rank == 0 else A.damped(1.0), timeout=TIMEOUT):
        pass
    with raised(found, "other operators"), serve(parts(rank, size, dtype=[np.float64, np.float32][rank])[0]):
        pass
    model = mlp().double().requires_grad_()
    torch.manual_seed(0)
    nn.utils.vector_to_parameters(
        torch.randn(len(nn.utils.parameters_to_vector(model.parameters()))), model.parameters()
    )
    for name, seed in (("equal seeds", 3), ("seeds", 3 + rank)):
        F = FisherLinearOperator(
            model.double(), nn.MSELoss(), dict(model.named_parameters()), singles("mse").data, mc_samples=1, rng=seed
        )
        with raised(found, name), serve(F, timeout=TIMEOUT):
            pass
    with (
        raised(found, "no data"),
        serve(GGNLinearOperator(model, nn.MSELoss(), dict(model.named_parameters()), [])) as W,
    ):
        if rank == 0:
            W @ x
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model.train(rank == 0)
        with serve(GGNLinearOperator(model, nn.MSELoss(), dict(model.named_parameters()), singles("mse").data)):
            pass
        found["training mode"] = [str(one.message) for one in caught]
    return found


def enclosing(weight: Any) -> Any:
    return lambda prediction, y: nn.functional.cross_entropy(prediction, y, weight=weight)


class Weighing:
    """A loss function that is a callable object, but not a module."""

    def __init__(self, weight: Any) -> None:
        self.weights = [weight]

    def __call__(self, prediction: Any, y: Any) -> Any:
        return nn.functional.cross_entropy(prediction, y, weight=self.weights[0])


def losses(weight: Any) -> dict[str, Any]:
    """Return the same loss, with its weights held in different ways."""
    return {
        "module": nn.CrossEntropyLoss(weight=weight),
        "partial": functools.partial(nn.functional.cross_entropy, weight=weight),
        "function": enclosing(weight),
        "object": Weighing(weight),
    }


def other_tensors(rank: int, size: int, folder: Path) -> dict[str, Any]:
    """Serve operators whose ranks differ in a tensor of the loss or the model."""
    found: dict[str, Any] = {}
    problem = singles("ce-weights")
    data, shared = spread(problem.data, rank, size, "uneven"), torch.ones(3).double()
    for name in losses(shared):
        for same in (False, True):
            loss = losses(shared if same else shared + rank)[name]
            A = GGNLinearOperator(problem.model, loss, problem.params, data, batch_weight=rows_of)
            with raised(found, f"{name}, {same}"), serve(A, timeout=TIMEOUT):
                pass
    factor, model = shared + rank, problem.model
    function = lambda params, X: factor * torch.func.functional_call(model, params, (X,))  # noqa: E731
    A = GGNLinearOperator(function, nn.CrossEntropyLoss(), problem.params, data)
    with raised(found, "model"), serve(A, timeout=TIMEOUT):
        pass
    return found


def left(rank: int, size: int, folder: Path) -> dict[str, Any]:
    """Ctrl-C ends rank 0's block, and its process, while rank 1 computes for much longer."""
    found: dict[str, Any] = {}
    A, data = parts(rank, size)
    data.pause = 15.0 * rank
    with raised(found, "serve"), serve(A) as W:
        if rank == 0:
            with interrupted(0.5):
                W @ np.ones(W.shape[0])
    return found


def stayed(rank: int, size: int, folder: Path) -> dict[str, Any]:
    """Continue on rank 0 after Ctrl-C to the end of the block, while rank 1 computes for longer than `TIMEOUT`."""
    found: dict[str, Any] = {}
    A, data = parts(rank, size)
    data.pause = 1.5 * TIMEOUT * rank
    for name in ("patient", "impatient"):
        with raised(found, name), ExitStack() as stack, serve(A, timeout=TIMEOUT) as W:
            if rank == 0:
                with raised(found, f"{name}, product"), interrupted(0.5):
                    W @ np.ones(W.shape[0])
                if name == "impatient":
                    stack.enter_context(interrupted(0.5))
        found[f"{name}, threads"] = [thread.name for thread in threading.enumerate()]
    return found


def new_tensors(rank: int, size: int, folder: Path) -> dict[str, Any]:
    """Replace tensors of a model, before the block and within it."""
    found: dict[str, Any] = {}
    for which in range(size):
        A, _ = parts(rank, size)
        if rank == which:
            model = A._objective.modules[0]
            model.load_state_dict({name: value.clone() for name, value in model.state_dict().items()}, assign=True)
        with raised(found, f"assigned on rank {which}"), serve(A, timeout=TIMEOUT):
            pass
    A, _ = parts(rank, size)
    with raised(found, "serve"), serve(A, timeout=TIMEOUT) as W:
        if rank == 0:
            x = vectors(W.shape[0])[:, 0]
            W @ x
            A._objective.modules[0].float()
            with raised(found, "cast"):
                W @ x
            with raised(found, "afterwards"):
                W @ x
    A, _ = parts(rank, size)
    with raised(found, "exit"), serve(A, timeout=TIMEOUT) as W:
        if rank == 0:
            found["product"] = W @ x
            sys.exit(0)
    with raised(found, "exit with an error"), serve(A, timeout=TIMEOUT) as W:
        if rank == 0:
            sys.exit(3)
    return found


def newton(rank: int, size: int, folder: Path) -> dict[str, Any]:
    """Take Newton steps on rank 0, which modify its parameters and a buffer."""
    found: dict[str, Any] = {"losses": []}
    A, problem = batch_norm(rank, size)
    with serve(A, timeout=TIMEOUT) as W:
        if rank == 0:
            for _ in range(3):
                gradient, loss = W.gradient_and_loss()
                step = W.unravel(cg(W.damped(1.0), gradient, rtol=1e-12)[0])
                with torch.no_grad():
                    for name, value in problem.params.items():
                        value -= step[name]
                    problem.model[1].running_mean += 0.1
                found["losses"].append(loss)
            problem.model[0].weight.data.mul_(1.5)  # tensor versions do not count changes of .data
            found["product"] = W @ np.ones(W.shape[0])
            found["block"] = W.block("0.weight") @ np.ones(W.params_slices["0.weight"].stop)
    found["parameters"] = nn.utils.parameters_to_vector(problem.model.parameters()).detach().numpy()
    found["mean"] = problem.model[1].running_mean.numpy()
    return found


@seeded
def batch_norm(rank: int, size: int) -> tuple[GGNLinearOperator, Problem]:
    model = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, 3)).eval()
    data = cut(torch.randn(9, 4), torch.randint(0, 3, (9,)), (2, 3, 4))
    problem = Problem(model, nn.CrossEntropyLoss(), data)
    return GGNLinearOperator(model, problem.loss_function, problem.params, spread(data, rank, size, "uneven")), problem


class Pipeline(nn.Module):
    """Two stages on different devices; the prediction is on the device of the input."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 5), nn.Linear(5, 3)

    def forward(self, X: Any) -> Any:
        hidden = self.first(X.to(self.first.weight.device)).tanh()
        return self.second(hidden.to(self.second.weight.device)).to(X.device)

    def place(self, device: str) -> Pipeline:
        """Move the second stage to another device."""
        for name, value in list(self.second.named_parameters()):
            setattr(self.second, name, nn.Parameter(value.detach().to(device)))
        return self


@seeded
def pipeline() -> Problem:
    return Problem(Pipeline(), nn.CrossEntropyLoss(), cut(torch.randn(9, 4), torch.randint(0, 3, (9,)), (2, 3, 4)))


def two_devices(rank: int, size: int, folder: Path) -> dict[str, Any]:
    """Serve models that are on two devices on each rank."""
    found: dict[str, Any] = {}
    problem = pipeline()
    from second_device import SECOND  # registers the device for this process

    params = dict(problem.model.place(SECOND).named_parameters())
    for kind, build in KINDS.items():
        for cache in (0, "auto"):
            A = build(
                problem.model, problem.loss_function, params, spread(problem.data, rank, size, "uneven"), cache=cache
            )
            with serve(A, timeout=TIMEOUT) as W:
                if rank == 0:
                    found[f"{kind}, {cache}"] = {
                        "columns": W @ vectors(W.shape[0]),
                        "again": W @ vectors(W.shape[0])[:, 0],
                        "block": W.block("second.w*", ["first.b*"]) @ np.ones(5),
                        "gradient": W.gradient_and_loss()[0],
                    }
                    devices = {name: str(value.device) for name, value in W.unravel(np.ones(W.shape[0])).items()}
                    assert devices == {name: str(value.device) for name, value in params.items()}
                    with torch.no_grad():  # forces a new transfer to all ranks
                        params["second.weight"].mul_(1.0)
                    found[f"{kind}, {cache}"]["written"] = W @ vectors(W.shape[0])[:, 0]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        C = HessianLinearOperator(problem.model, problem.loss_function, params, problem.data, engine="compiled")
        found["compiled"] = C @ np.ones(C.shape[0])
        found["warnings"] = [str(one.message) for one in caught]
    return found


def on_gpu(rank: int, size: int, folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = {}
    problem = pipeline()
    params = dict(problem.model.cuda().named_parameters())
    for kind, build in KINDS.items():
        A = build(problem.model, problem.loss_function, params, spread(problem.data, rank, size, "uneven"))
        with serve(A) as W:
            if rank == 0:
                assert (W @ torch.ones(W.shape[0], device="cuda")).is_cuda
                found[kind] = W @ np.ones(W.shape[0])
    return found


def kill(process: int, number: int, folder: Path) -> None:
    """Send a signal that ends or stops a process, and record the time."""
    (folder / "killed").write_text(repr(time.monotonic()))
    os.kill(process, number)


class Deadly:
    """A loader that sends a signal to its own process in the third pass."""

    passes = 0

    def __init__(self, batches: list[Any], number: int, folder: Path) -> None:
        self.batches, self.number, self.folder = batches, number, folder

    def __iter__(self) -> Iterator[Any]:
        self.passes += 1
        if self.passes == 3:
            kill(os.getpid(), self.number, self.folder)
        return iter(self.batches)


def deadly(rank: int, size: int, which: int, number: int, folder: Path) -> GGNLinearOperator:
    problem = singles("ce-weights")
    data = spread(problem.data, rank, size, "uneven")
    data = Deadly(data, number, folder) if rank == which else data
    return GGNLinearOperator(problem.model, problem.loss_function, problem.params, data, cache=0)


def death(rank: int, size: int, which: int, number: int, folder: Path) -> dict[str, Any]:
    """Run an eigensolver; one rank dies in the third product."""
    found: dict[str, Any] = {}
    A = deadly(rank, size, which, number, folder)
    with raised(found, "serve"), serve(A, timeout=TIMEOUT) as W:
        if rank == 0:
            with raised(found, "eigsh"):
                eigsh(W, k=3)
            with raised(found, "afterwards"):
                W @ np.ones(W.shape[0])
    return found


def killed_worker(rank: int, size: int, folder: Path) -> dict[str, Any]:
    return death(rank, size, size - 1, signal.SIGKILL, folder)


def stopped_worker(rank: int, size: int, folder: Path) -> dict[str, Any]:
    return death(rank, size, 1, signal.SIGSTOP, folder)


def killed_rank_0(rank: int, size: int, folder: Path) -> dict[str, Any]:
    return death(rank, size, 0, signal.SIGKILL, folder)


def stopped_rank_0(rank: int, size: int, folder: Path) -> dict[str, Any]:
    return death(rank, size, 0, signal.SIGSTOP, folder)


def idle_kill(rank: int, size: int, folder: Path) -> dict[str, Any]:
    """Kill a rank between two products."""
    found: dict[str, Any] = {}
    A, _ = parts(rank, size)
    (folder / f"pid{rank}").write_text(str(os.getpid()))
    with raised(found, "serve"), serve(A, timeout=TIMEOUT) as W:
        if rank == 0:
            W @ np.ones(W.shape[0])
            kill(int((folder / "pid1").read_text()), signal.SIGKILL, folder)
            with raised(found, "product"):
                W @ np.ones(W.shape[0])
    return found


def killed_at_the_end(rank: int, size: int, folder: Path) -> dict[str, Any]:
    """Kill rank 1 after the last product, before rank 0 leaves its block, while rank 2 still computes."""
    found: dict[str, Any] = {}
    A, data = parts(rank, size)
    (folder / f"pid{rank}").write_text(str(os.getpid()))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with raised(found, "serve"), serve(A, timeout=TIMEOUT) as W:
            if rank == 0:
                found["product"] = W @ np.ones(W.shape[0])
        data.pause = 2.5 * TIMEOUT if rank == 2 else 0.0
        with raised(found, "serve again"), serve(A, timeout=TIMEOUT) as W:
            if rank == 0:
                with raised(found, "interrupted"), interrupted(0.5):
                    W @ np.ones(W.shape[0])
                time.sleep(0.5)  # rank 1 has finished its part
                kill(int((folder / "pid1").read_text()), signal.SIGKILL, folder)
    found["warnings"] = [(one.category.__name__, Path(one.filename).name, str(one.message)) for one in caught]
    return found


def late(rank: int, size: int, folder: Path) -> dict[str, Any]:
    """Raise an error on rank 1 before it reaches serve."""
    found: dict[str, Any] = {}
    dist.init_process_group("gloo")
    if rank == 1:
        raise FileNotFoundError("no such data")
    with raised(found, "serve"), serve(parts(rank, size)[0], timeout=TIMEOUT, arrival=3):
        pass
    return found


def sharded_parameters(rank: int, size: int, folder: Path) -> dict[str, Any]:
    """Pass sharded tensors, and modules whose passes wait for other ranks."""
    found: dict[str, Any] = {}
    dist.init_process_group("gloo")
    problem = singles("mse")
    wrapped = nn.parallel.DistributedDataParallel(problem.model)
    with raised(found, "wrapped"):
        GGNLinearOperator(wrapped, nn.MSELoss(), dict(wrapped.named_parameters()), problem.data)
    fully_shard(problem.model, mesh=init_device_mesh("cpu", (size,)))
    with raised(found, "sharded"):
        GGNLinearOperator(problem.model, nn.MSELoss(), dict(problem.model.named_parameters()), problem.data)
    head = nn.Linear(3, 3).double()
    with raised(found, "sharded beside"):
        GGNLinearOperator(
            nn.Sequential(problem.model, head),
            nn.MSELoss(),
            {"1.weight": head.weight, "1.bias": head.bias},
            problem.data,
        )
    return found


def ctrl_c_on_a_worker(rank: int, size: int, folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = {}
    A, data = parts(rank, size)
    if rank == 1:
        data.error = KeyboardInterrupt()
    with raised(found, "serve"), serve(A, timeout=TIMEOUT) as W:
        if rank == 0:
            W @ np.ones(W.shape[0])
    return found


# Launching the processes.


class Ranks:
    """Processes that each run one of the functions above. Their results are in `found` after they have ended."""

    def __init__(
        self,
        run: str,
        size: int,
        folder: Path,
        stays: int | None = None,
        launcher_has_the_store: bool = False,
        seconds: float = 120,
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        port = free_port()
        shared = {"WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        if launcher_has_the_store:  # as under torchrun
            self._store = dist.TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False)
            shared |= {"TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": "0"}
        began = time.monotonic()
        self.processes = [started(_run, run, rank, size, shared, str(folder)) for rank in range(size)]
        try:
            for rank, process in enumerate(self.processes):
                if rank != stays:  # a stopped process does not end by itself
                    process.join(max(0.1, began + seconds - time.monotonic()))
        finally:
            self.ended = time.monotonic()
            self.hung = [rank for rank, process in enumerate(self.processes) if process.is_alive()]
            for process in self.processes:
                process.kill()
                process.join()
        self.seconds = time.monotonic() - began
        self.exits = [process.exitcode for process in self.processes]
        reports = [folder / f"{run}{rank}.pt" for rank in range(size)]
        self.found = [torch.load(path, weights_only=False) if path.exists() else None for path in reports]

    def check(self) -> list[Any]:
        """Return the results of all ranks. Fail if a rank raised an error or did not end."""
        for found in self.found:
            assert found is None or "raised" not in found, found["raised"]
        assert self.hung == []
        assert self.exits == [0] * len(self.exits)
        return self.found


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def _run(run: str, rank: int, size: int, shared: dict[str, str], folder: str) -> None:
    torch.set_num_threads(1)
    os.environ |= shared | {"RANK": str(rank)}
    try:
        found = globals()[run](rank, size, Path(folder))
    except BaseException:
        found = {"raised": traceback.format_exc()}
    temporary = Path(folder) / f"temporary{rank}"
    torch.save(found, temporary)
    temporary.rename(Path(folder) / f"{run}{rank}.pt")


if __name__ == "__main__":  # by hand: python distributed_runs.py solvers 2 /tmp/somewhere
    ranks = Ranks(sys.argv[1], int(sys.argv[2]), Path(sys.argv[3]))
    print(json.dumps({"seconds": ranks.seconds, "exits": ranks.exits, "hung": ranks.hung}))
    print(*ranks.found, sep="\n")
