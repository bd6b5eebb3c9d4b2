"""A script that is killed and started again: eigenvalues or a solution from a journal, with every product counted.

Called with a directory, a file to which one byte is written for each product that is begun, the solvers, and for each a
file for its result.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from cases import mlp, seeded
from numpy.typing import NDArray
from scipy.sparse.linalg import LinearOperator, cg, eigsh
from torch import nn

from curvop import GGNLinearOperator
from curvop.journal import JournaledLinearOperator


class Counted(GGNLinearOperator):
    """Says of every product that it is begun, to whoever watches the file."""

    counter = -1

    def _apply(self, rows: Any) -> Any:
        os.write(self.counter, b"." * len(rows))
        time.sleep(0.002)  # so that who kills it a moment later does so before it ends
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


def main(directory: str, counter: str, *runs: str) -> None:
    torch.set_num_threads(1)
    A = problem()
    A.counter = os.open(counter, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for solver, result in zip(runs[::2], runs[1::2], strict=True):
        with JournaledLinearOperator(A if solver == "eigsh" else A.damped(1e-4), Path(directory) / solver) as J:
            print("open", flush=True)
            np.save(result, RUNS[solver](J))
            print(J.num_recorded, J.num_products, J.num_answered, flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
