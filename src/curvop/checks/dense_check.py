"""The check of eigenvalues against the dense matrix, which an independent route forms."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn
from torch.func import functional_call

from curvop.operators.error_text import describe_error
from curvop.testing.functorch_reference import NoHessianError

__all__ = ["DENSE_LIMIT", "DenseCheck", "accuracy", "dense_check", "largest_difference", "rounding"]

Array = npt.NDArray[Any]

DENSE_LIMIT = 5000
"""The largest number of rows for which the dense matrix is formed: 200 MB in float64."""


@dataclass(frozen=True)
class DenseCheck:
    """The comparison with the dense matrix; not done where `reason` says why.

    `difference`, the largest one, and `allowed` are relative to `spectral_norm`; `values` holds all eigenvalues in
    ascending order. `exists` is False where the reason is that there is no such matrix, and nothing can be trusted;
    `training` says whether modules are in training mode.
    """

    reason: str | None = None
    values: Array | None = None
    spectral_norm: float = 0.0
    difference: float = 0.0
    allowed: float = 0.0
    seconds: float = 0.0
    exists: bool = True
    training: bool = False

    @property
    def ok(self) -> bool:
        """Whether nothing was found to disagree."""
        return self.exists and self.difference <= self.allowed


def accuracy(*dtypes: str) -> float:
    """Return the relative accuracy that results can be held to: the 2/3 power of the coarsest dtype's epsilon.

    It is 3.7e-11 in float64 and 2.4e-5 in float32, which leaves room for the rounding errors of sums over a data
    set.
    """
    return rounding(max(torch.finfo(getattr(torch, dtype)).eps for dtype in dtypes))


def rounding(eps: float) -> float:
    """Return the same of numbers whose epsilon is known."""
    return float(eps ** (2 / 3))


def dense_check(
    problem: dict[str, Any],
    dense: Callable[..., torch.Tensor],
    names: Sequence[str],
    found: Sequence[tuple[str, int, Array]],
    allowed: float,
) -> DenseCheck:
    """Compare eigenvalues with those of the dense matrix.

    Parameters
    ----------
    problem : dict
        As `curvop.problems.load` returns it, `params` by name.
    dense : callable
        ``(model, loss_function, params, data) -> matrix``.
    names : sequence of str
        The parameters whose block the eigenvalues belong to.
    found : sequence of (str, int, ndarray)
        For each end of the spectrum: which one, in `eigsh`'s words, how many were wanted, and those that converged.
    allowed : float
        The difference, relative to the spectral norm, up to which they agree.

    Returns
    -------
    DenseCheck
        Not done above `DENSE_LIMIT` rows, and where the dense matrix cannot be formed.
    """
    start = time.perf_counter()
    params = {name: problem["params"][name] for name in names}
    size = sum(param.numel() for param in params.values())
    if size > DENSE_LIMIT:
        return DenseCheck(reason=f"the matrix has {size:,} rows, and it is formed for {DENSE_LIMIT:,} at most")
    model = problem["model"] if len(params) == len(problem["params"]) else _with_others_fixed(problem, params)
    try:
        matrix = dense(model, problem["loss_function"], params, problem["data"])
    except NoHessianError as error:
        return DenseCheck(reason=str(error), exists=False)
    except Exception as error:  # whatever a model does that this route cannot follow
        return DenseCheck(reason=f"the dense matrix cannot be formed: {describe_error(error)}")
    values = np.linalg.eigvalsh(matrix.detach().to("cpu", torch.float64).numpy())
    norm = float(np.abs(values).max())
    difference = max(largest_difference(*end, values) for end in found) / max(norm, np.finfo(float).tiny)
    training = isinstance(problem["model"], nn.Module) and any(m.training for m in problem["model"].modules())
    return DenseCheck(None, values, norm, difference, allowed, time.perf_counter() - start, training=training)


def largest_difference(which: str, wanted: int, found: Array, dense: Array) -> float:
    """Return the largest difference between eigenvalues and those of the dense matrix.

    Each is compared with its nearest neighbour and, where all converged, with the one of the same rank: this finds
    a member of a cluster that was missed.

    Parameters
    ----------
    which : str
        The end of the spectrum: LA, SA, LM, SM or BE.
    wanted : int
        How many eigenvalues were asked for.
    found : ndarray of shape (n,)
        Those that converged, in any order.
    dense : ndarray of shape (N,)
        All eigenvalues, in ascending order; N is at least 2.

    Returns
    -------
    float
        The largest absolute difference; 0 where no eigenvalue converged.
    """
    right = np.clip(np.searchsorted(dense, found), 1, len(dense) - 1)
    differences = np.minimum(np.abs(found - dense[right - 1]), np.abs(found - dense[right]))
    if len(found) == wanted:
        expected = _end_of(dense, which, wanted)
        if which in ("LM", "SM"):  # ranked by magnitude: of two opposite values at the edge either may be the one
            found, expected = np.abs(found), np.abs(expected)
        differences = np.maximum(differences, np.abs(np.sort(found) - np.sort(expected)))
    return float(differences.max(initial=0.0))


def _end_of(dense: Array, which: str, count: int) -> Array:
    """Return those of the ascending eigenvalues that `eigsh` is to find."""
    if which == "BE":  # half from each end, and where the count is odd one more from the upper
        low = count // 2
        return np.concatenate([dense[:low], dense[len(dense) - (count - low) :]])
    key = {"LA": -dense, "SA": dense, "LM": -np.abs(dense), "SM": np.abs(dense)}[which]
    return dense[np.argsort(key)[:count]]


def _with_others_fixed(problem: dict[str, Any], params: dict[str, torch.Tensor]) -> Any:
    """Return the model as a callable of a few parameters, the others fixed at the problem's values of them."""
    model = problem["model"]
    others = {name: param.detach() for name, param in problem["params"].items() if name not in params}

    def call(selected: dict[str, torch.Tensor], inputs: Any) -> Any:
        if not isinstance(model, nn.Module):
            return model({**others, **selected}, inputs)
        buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}  # batch norm writes into them
        return functional_call(model, {**buffers, **others, **selected}, (inputs,))

    return call
