"""A bad input, what it gets, and the page of the documentation that lists all of them."""

from __future__ import annotations

import functools
import re
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.sparse.linalg import aslinearoperator
from torch import Tensor, nn

from curvop import (
    HessianLinearOperator,
    spectrum,
)


class CommandError(Exception):
    """What the command said before it ended with exit code 2."""


@dataclass(frozen=True)
class Row:
    """A bad input: in words, as code that is given an empty directory, and what is to come of it."""

    area: str
    tried: str
    attempt: Callable[[Path], Any]
    error: type[BaseException]
    message: str


def made(*layers: Callable[[], nn.Module]) -> nn.Sequential:
    """Return a model whose making leaves the generator of random numbers alone."""
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        return nn.Sequential(*(layer() for layer in layers)).double()


def mlp() -> nn.Sequential:
    return made(lambda: nn.Linear(4, 5), nn.Tanh, lambda: nn.Linear(5, 3))


MODEL = mlp()
PARAMS = dict(MODEL.named_parameters())
X, Y = torch.linspace(-1, 1, 16).double().view(4, 4), torch.linspace(0, 1, 12).double().view(4, 3)
DATA = [(X, Y)]
ONES = np.ones(43)
DENSE = aslinearoperator(np.diag([3.0, 2.0, 1.0, 0.5]))
INDEFINITE = aslinearoperator(np.diag([3.0, 2.0, -1.0, 0.5]))
COMPLEX = aslinearoperator(np.diag([3.0, 1j, 1.0, 0.5]))
WIDE = aslinearoperator(np.ones((3, 4)))


def hessian(**changed: Any) -> HessianLinearOperator:
    return HessianLinearOperator(**dict(model=MODEL, loss_function=nn.MSELoss(), params=PARAMS, data=DATA) | changed)


def first_product(**changed: Any) -> Any:
    return hessian(**changed) @ ONES


H = hessian()
DENSITY = spectrum.density(DENSE, rng=0, progress=False)


def replaced(name: str, value: Any) -> dict[str, Any]:
    return {**PARAMS, name: value}


def file_with(tmp: Path, content: bytes) -> Path:
    path = tmp / "file"
    path.write_bytes(content)
    return path


def with_bias(value: Any) -> HessianLinearOperator:
    return hessian(params=replaced("0.bias", value))


def called(params: dict[str, Tensor], X: Any) -> Tensor:
    return torch.func.functional_call(MODEL, params, (X,))


def cubes(prediction: Tensor, y: Tensor) -> Tensor:
    return ((prediction - y) ** 3).mean()


ROWS: list[Row] = []


def area(name: str, *rows: tuple[str, Callable[..., Any], type[BaseException], str]) -> None:
    """Add rows; an attempt that takes an argument gets an empty directory."""
    for tried, attempt, error, message in rows:
        takes = attempt.__code__.co_argcount
        ROWS.append(Row(name, tried, attempt if takes else functools.partial(_without, attempt), error, message))


def _without(attempt: Callable[[], Any], tmp: Path) -> Any:
    return attempt()


def told(row: Row) -> tuple[type[BaseException], str]:
    """Return what a row's attempt gets: the error's type, and its message without what differs from run to run."""
    with tempfile.TemporaryDirectory() as tmp, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            row.attempt(Path(tmp).resolve())
        except Exception as error:
            text = str(error).replace(str(Path(tmp).resolve()), "DIRECTORY")
            return type(error), re.sub(r"-?\d+\.\d{2,}(e-?\d+)?", "0.123", text)
    raise AssertionError(f"{row.area}, {row.tried}: no error")


def table() -> str:
    """Return the page of the documentation that lists all rows."""
    lines = [
        "Bad input",
        "=========",
        "",
        f"What {len(ROWS)} mistakes get: one line that names the argument and the remedy. Nothing is lost by them, and",
        "nothing is left changed. This page is written by the tests, which make each of the mistakes.",
    ]
    for name in dict.fromkeys(row.area for row in ROWS):
        lines += ["", name, "-" * len(name), "", ".. list-table::", "   :header-rows: 1", "   :widths: 25 15 60", ""]
        lines += ["   * - tried", "     - error", "     - message"]
        for row in (row for row in ROWS if row.area == name):
            error, message = told(row)
            kind = "exit code 2" if error is CommandError else f"``{error.__name__}``"
            lines += [f"   * - {row.tried}", f"     - {kind}", f"     - ``{message}``"]
    return "\n".join([*lines, ""])
