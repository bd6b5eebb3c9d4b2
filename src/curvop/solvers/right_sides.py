"""Convert right-hand sides (arrays, tensors, or one tensor per parameter) to the rows of one tensor, and back."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from scipy.sparse.linalg import LinearOperator
from torch import Tensor

from curvop.operators.base import TensorLinearOperator, unsupported_layout
from curvop.operators.parameter_operator import ParameterVectors
from curvop.spectrum.lanczos import device_of, product_dtype

__all__ = ["RightSides"]


class RightSides:
    """The right-hand sides ``b`` as rows of a float64 tensor. The method ``restore`` reverses this conversion.

    Parameters
    ----------
    A : LinearOperator, shape (N, N)
        Operator of the linear systems.
    b : array_like, Tensor, or dict, list or tuple of Tensor
        The right-hand sides, of shape ``(N,)`` or ``(N, K)``, or one tensor for each parameter of `A`.
    name : str
        Name of the argument, for error messages.

    Attributes
    ----------
    rows : Tensor, shape (K, N)
        The columns in float64, on the device of `A`. The tensor shares no memory with `b`.
    as_arrays : bool
        Whether `b` consists of arrays and not of tensors.
    is_vector : bool
        Whether `b` is a single vector, without an axis of columns.
    shape : tuple of int
        Shape of `b`. It is ``(N,)`` if `b` contains one tensor per parameter.
    """

    def __init__(self, A: LinearOperator, b: Any, name: str = "b") -> None:
        self._A, self._like = A, b
        self._is_tree = _is_tree(A, b, name)
        if self._is_tree:
            vectors = A._join_tree(b, _columns(A), name)
        elif isinstance(b, Tensor):
            if (layout := unsupported_layout(b)) is not None:
                raise TypeError(f"{name} is a tensor that is {layout}: pass a dense one with values")
            vectors = b.detach()
        else:
            array = np.asarray(b)
            if not np.can_cast(array.dtype, np.float64, "same_kind"):
                raise TypeError(f"{name} has dtype {array.dtype}, but must be real")
            vectors = torch.from_numpy(array.astype(np.float64))
        if vectors.is_complex():
            raise TypeError(f"{name} has dtype {vectors.dtype}, but must be real")
        self.shape = tuple(vectors.shape)
        size = A.shape[0]
        if vectors.ndim not in (1, 2) or vectors.shape[0] != size:
            raise ValueError(
                f"A has shape {A.shape} and {name} has shape {self.shape}: pass {name} ({size},) or ({size}, K)"
            )
        self.is_vector = vectors.ndim == 1
        self.as_arrays = not (self._is_tree or isinstance(b, Tensor))
        self._floating = vectors.dtype if vectors.is_floating_point() else torch.float64
        columns = vectors[:, None] if self.is_vector else vectors
        self.rows = columns.T.to(device_of(A), torch.float64, copy=True).contiguous()
        if not bool(self.rows.isfinite().all()):
            raise ValueError(f"{name} is not finite: pass finite numbers")

    def restore(self, rows: Tensor) -> Any:
        """Convert rows ``(K, N)`` to the type and shape of `b`.

        The values are float64 if `b` is an array. If `b` consists of tensors, the dtype is the wider of the dtypes of
        `b` and of the products with `A`. Rounding the solution to this dtype does not change the residual, because
        products with `A` do not use the digits that are lost.
        """
        columns = rows[0] if self.is_vector else rows.T
        if isinstance(self._like, Tensor) or self._is_tree:
            _check_range(columns, self._dtype)
        elif not bool(columns.isfinite().all()):
            raise ValueError("the solution is too large for float64: scale A and b")
        if self._is_tree:
            vector = columns.to(self._dtype)
            return self._A._split_like(self._like, _columns(self._A), vector)
        if isinstance(self._like, Tensor):
            return columns.to(self._like.device, self._dtype)
        return columns.numpy(force=True)

    @property
    def _dtype(self) -> torch.dtype:
        products = product_dtype(self._A) if isinstance(self._A, TensorLinearOperator) else torch.float64
        return torch.promote_types(self._floating, products)


def _check_range(columns: Tensor, dtype: torch.dtype) -> None:
    """Raise a ValueError if a number overflows in a dtype, or if all numbers are rounded to zero."""
    cast = columns.to(dtype)
    if not bool(cast.isfinite().all()) or (bool(columns.any()) and not bool(cast.any())):
        raise ValueError(f"the solution is outside the range of {dtype}: pass b in float64, or scale A and b")


def _is_tree(A: LinearOperator, b: Any, name: str) -> bool:
    """Return True if `b` contains one tensor per parameter."""
    if isinstance(b, Mapping) and not (isinstance(A, ParameterVectors) and _columns(A) is not None):
        raise TypeError(
            f"{name} is a {type(b).__name__}, but the columns of A are not parameters: pass an array or a tensor"
        )
    return isinstance(b, Mapping | list | tuple) and isinstance(A, ParameterVectors) and A._is_tree(b)


def _columns(A: ParameterVectors) -> Any:
    return A._row_and_column_layouts[1]
