"""Functions for processes that tests kill and restart: runs with a journal or checkpoint that count their products."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from cases import mlp, seeded
from numpy.typing import NDArray
from scipy.sparse.linalg import LinearOperator, cg, eigsh
from torch import nn

from curvop import GGNLinearOperator, HessianLinearOperator, JournaledLinearOperator
from curvop.problems import digits
from curvop.spectrum import blocks, density


class Counted(GGNLinearOperator):
    """Writes a byte to a file when a product begins, for the process that watches the file."""

    counter = -1

    def _apply(self, rows: Any) -> Any:
        os.write(self.counter, b"." * len(rows))
        time.sleep(0.002)  # so that a kill shortly after the byte interrupts the product
        return super()._apply(rows)


@seeded
def problem() -> Counted:
    model = nn.Sequential(nn.Linear(40, 120), nn.Tanh(), mlp(120, 10))
    data = [(torch.randn(100, 40), torch.randint(0, 10, (100,))) for _ in range(2)]
    return Counted(model, nn.CrossEntropyLoss(), dict(model.named_parameters()), data)


def run_eigsh(A: LinearOperator) -> NDArray[Any]:
    values, vectors = eigsh(A, k=8, ncv=18, v0=np.ones(A.shape[0]))
    return np.vstack([values, vectors])


def run_cg(A: LinearOperator) -> NDArray[Any]:
    x, _ = cg(A, np.cos(np.arange(A.shape[0])), rtol=1e-9, maxiter=150)
    return np.asarray(x)


RUNS = {"eigsh": run_eigsh, "cg": run_cg}


def journaled(directory: Path, solver: str) -> None:
    """Solve with a journal in `directory`, and write a byte to a file there when a product begins."""
    torch.set_num_threads(1)
    A = problem()
    A.counter = os.open(directory / f"{solver}.count", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    with JournaledLinearOperator(A if solver == "eigsh" else A.damped(1e-4), directory / solver) as J:
        np.save(directory / f"{solver}.npy", RUNS[solver](J))


class Logged(HessianLinearOperator):
    """Writes a byte to a file when a product begins."""

    log = Path()

    def _apply(self, rows: Any) -> Any:
        with self.log.open("ab") as log:
            log.write(b"." * len(rows))
        return super()._apply(rows)


def density_of_digits(log: Path, checkpoint: Path, out: Path, num_steps: int) -> None:
    H = Logged(**digits(), columns=1)
    H.log = log
    density(H, num_probes=6, num_steps=num_steps, rng=0, checkpoint=checkpoint, progress=False).save(out)


class Dying(HessianLinearOperator):
    """Kills its process before a product that exceeds the limit `left`."""

    left = 0

    def _apply(self, rows: Any) -> Any:
        type(self).left -= len(rows)  # the limit is shared by all blocks
        if self.left < 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return super()._apply(rows)


def blocks_of_digits(left: int, checkpoint: Path, out: Path, options: dict[str, Any]) -> None:
    torch.set_num_threads(1)  # like the tests; with more threads, the order of sums differs
    Dying.left = left
    blocks(Dying(**digits(), columns=1), **options, checkpoint=checkpoint).save(out)
