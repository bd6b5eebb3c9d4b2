"""Compare computed eigenvalues with those of a dense matrix that is formed by an independent implementation."""

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
from curvop.testing.functorch_reference import NoHessianError, call_arguments

__all__ = ["DENSE_LIMIT", "DenseCheck", "accuracy", "dense_check", "largest_difference", "rounding_tolerance"]

Array = npt.NDArray[Any]

DENSE_LIMIT = 5000
"""Largest number of rows for which the dense matrix is formed. A matrix of this size takes 200 MB in float64."""


@dataclass(frozen=True)
class DenseCheck:
    """Result of comparing computed eigenvalues with the eigenvalues of the dense matrix.

    Attributes
    ----------
    reason : str or None
        The reason why the eigenvalues were not compared, or None if they were compared.
    values : ndarray, shape (N,), or None
        All eigenvalues of the dense matrix, in ascending order.
    spectral_norm : float
        Spectral norm of the dense matrix.
    difference : float
        Largest difference between a computed eigenvalue and the corresponding eigenvalue of the dense matrix, relative
        to `spectral_norm`.
    allowed : float
        Largest value of `difference` that is accepted.
    seconds : float
        Duration of the check.
    exists : bool
        False if the matrix does not exist, for example because the loss is random. No computed eigenvalue can be
        trusted in that case.
    training : bool
        Whether any module of the model is in training mode.
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
        """True if the matrix exists and `difference` is at most `allowed`."""
        return self.exists and self.difference <= self.allowed


def accuracy(*dtypes: str) -> float:
    """Return the relative accuracy to expect from computations in the given dtypes.

    The accuracy is ``eps ** (2 / 3)``, where ``eps`` is the largest epsilon of the dtypes: 3.7e-11 for float64 and
    2.4e-5 for float32. This accuracy allows for the rounding errors of sums over a data set.
    """
    return rounding_tolerance(max(torch.finfo(getattr(torch, dtype)).eps for dtype in dtypes))


def rounding_tolerance(eps: float) -> float:
    """Return the largest relative error that counts as rounding, ``eps ** (2 / 3)``."""
    return float(eps ** (2 / 3))


def dense_check(
    problem: dict[str, Any],
    dense: Callable[..., torch.Tensor],
    names: Sequence[str],
    found: Sequence[tuple[str, int, Array]],
    allowed: float,
) -> DenseCheck:
    """Compare computed eigenvalues with the eigenvalues of the dense matrix.

    Parameters
    ----------
    problem : dict
        A problem, as returned by `curvop.problems.load`. Its ``params`` must be a dictionary from names to tensors.
    dense : callable
        A function ``(model, loss_function, params, data) -> matrix`` that computes the dense matrix.
    names : sequence of str
        Names of the parameters that define the block of the matrix.
    found : sequence of (str, int, ndarray)
        One tuple for each end of the spectrum: the argument `which` of `curvop.spectrum.eigsh`, the number of
        eigenvalues requested, and the eigenvalues that converged.
    allowed : float
        Largest difference that is accepted, relative to the spectral norm.

    Returns
    -------
    DenseCheck
        The result of the comparison. If the matrix has more than `DENSE_LIMIT` rows or cannot be formed, the
        eigenvalues are not compared, and `reason` contains the explanation.
    """
    start = time.perf_counter()
    params = {name: problem["params"][name] for name in names}
    size = sum(param.numel() for param in params.values())
    if size > DENSE_LIMIT:
        return DenseCheck(reason=f"the matrix has {size:,} rows, more than the limit of {DENSE_LIMIT:,}")
    model = problem["model"] if len(params) == len(problem["params"]) else _with_others_fixed(problem, params)
    try:
        matrix = dense(model, problem["loss_function"], params, problem["data"])
    except NoHessianError as error:
        return DenseCheck(reason=str(error), exists=False)
    except Exception as error:  # user code may contain anything that torch.func does not support
        return DenseCheck(reason=f"the dense matrix cannot be formed: {describe_error(error)}")
    values = np.linalg.eigvalsh(matrix.detach().to("cpu", torch.float64).numpy())
    norm = float(np.abs(values).max())
    difference = max(largest_difference(*end, values) for end in found) / max(norm, np.finfo(float).tiny)
    training = isinstance(problem["model"], nn.Module) and any(m.training for m in problem["model"].modules())
    return DenseCheck(None, values, norm, difference, allowed, time.perf_counter() - start, training=training)


def largest_difference(which: str, wanted: int, found: Array, dense: Array) -> float:
    """Return the largest difference between computed eigenvalues and the eigenvalues of the dense matrix.

    Each computed eigenvalue is compared with the nearest eigenvalue of the dense matrix. If all requested eigenvalues
    converged, they are also sorted and compared one by one with the eigenvalues that `eigsh` should find. This
    comparison detects a missing eigenvalue in a cluster of nearly equal eigenvalues.

    Parameters
    ----------
    which : {'LA', 'SA', 'LM', 'SM', 'BE'}
        The end of the spectrum.
    wanted : int
        Number of eigenvalues requested.
    found : ndarray, shape (n,)
        The eigenvalues that converged, in any order.
    dense : ndarray, shape (N,)
        All eigenvalues of the dense matrix, in ascending order. N must be at least 2.

    Returns
    -------
    float
        The largest absolute difference, or 0 if no eigenvalue converged.
    """
    right = np.clip(np.searchsorted(dense, found), 1, len(dense) - 1)
    differences = np.minimum(np.abs(found - dense[right - 1]), np.abs(found - dense[right]))
    if len(found) == wanted:
        expected = _end_of(dense, which, wanted)
        if which in ("LM", "SM"):  # of two eigenvalues with opposite signs at the cut-off, either may be found
            found, expected = np.abs(found), np.abs(expected)
        differences = np.maximum(differences, np.abs(np.sort(found) - np.sort(expected)))
    return float(differences.max(initial=0.0))


def _end_of(dense: Array, which: str, count: int) -> Array:
    """Return the `count` eigenvalues that `eigsh` should find, where `dense` are all eigenvalues in ascending order."""
    if which == "BE":  # half from each end; if the count is odd, one more from the upper end
        low = count // 2
        return np.concatenate([dense[:low], dense[len(dense) - (count - low) :]])
    key = {"LA": -dense, "SA": dense, "LM": -np.abs(dense), "SM": np.abs(dense)}[which]
    return dense[np.argsort(key)[:count]]


def _with_others_fixed(problem: dict[str, Any], params: dict[str, torch.Tensor]) -> Any:
    """Return a function ``(params, X) -> prediction`` of the selected parameters, with all other parameters fixed."""
    model = problem["model"]
    others = {name: param.detach() for name, param in problem["params"].items() if name not in params}

    def call(selected: dict[str, torch.Tensor], inputs: Any) -> Any:
        if not isinstance(model, nn.Module):
            return model({**others, **selected}, inputs)
        buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}  # batch norm writes to its buffers
        return functional_call(model, {**buffers, **others, **selected}, *call_arguments(model, inputs))

    return call
