"""Compare two arrays and say where they differ."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

__all__ = ["allclose_report"]

_ENTRIES_AT_A_TIME = 1 << 16
_POSITIONS_SHOWN = 10


def allclose_report(
    a: ArrayLike | torch.Tensor, b: ArrayLike | torch.Tensor, rtol: float = 1e-5, atol: float = 1e-8
) -> bool:
    """Say whether two arrays agree, and print where they do not.

    Entries agree where ``|a - b| <= atol + rtol * |b|``, as in `numpy.allclose`: `b` is the reference, NaN agrees
    with nothing, and infinities agree with infinities of the same sign. Comparison is in double precision or better,
    whatever the dtypes. Unlike `numpy.allclose`, nothing is broadcast: arrays of different shapes do not agree.

    Parameters
    ----------
    a, b : array_like or torch.Tensor
        What to compare, of one shape and any numeric dtype (integers, booleans, bfloat16 and complex numbers
        included). Tensors may live on any device and require gradients; arrays, tensors and nested lists mix.
    rtol : float
        Relative tolerance, a multiple of ``|b|``.
    atol : float
        Absolute tolerance.

    Returns
    -------
    bool
        True, and nothing is printed, where all entries agree (or there are none). False otherwise; then the number of
        differing entries, the largest absolute and relative differences among them (those that are finite), and the
        up to ten largest absolute differences are printed, with their positions and both values.

    Raises
    ------
    TypeError
        If an entry is not a number.
    ValueError
        If a nested list is ragged.

    Notes
    -----
    Beside the arrays themselves (and copies on the host, for tensors that are elsewhere) the memory used does not
    grow with their size.

    Examples
    --------
    >>> import numpy as np
    >>> import torch
    >>> from curvop.utils import allclose_report
    >>> allclose_report(np.eye(2), torch.eye(2))
    True
    >>> allclose_report([[1.0, 2.0], [3.0, 4.5]], [[1.0, 2.0], [3.0, 4.0]])
    1 of 4 entries differ (rtol = 1e-05, atol = 1e-08)
    largest absolute difference: 0.5
    largest relative difference: 0.125
    position    a    b  |a - b|
      (1, 1)  4.5  4.0      0.5
    False
    """
    left, right = _as_array(a), _as_array(b)
    if left.shape != right.shape:
        print(f"shapes differ: {left.shape} and {right.shape}")
        return False

    differing, not_finite, largest, largest_relative = 0, 0, -1.0, -1.0
    worst: list[tuple[float, int]] = []
    for start, x, y in _in_pieces(left, right):
        with np.errstate(all="ignore"):
            difference = np.abs(x - y)
            # An infinite b makes the tolerance infinite; only equality may let it pass.
            close = (difference <= atol + rtol * np.abs(y)) & np.isfinite(y) | (x == y)
            wrong = np.flatnonzero(~close)
            if wrong.size == 0:
                continue
            difference = difference[wrong]
            relative = difference / np.abs(y[wrong])
        finite = np.isfinite(difference)
        differing += wrong.size
        not_finite += wrong.size - int(finite.sum())
        largest = max(largest, difference.max(where=finite, initial=-1.0))
        largest_relative = max(largest_relative, relative.max(where=np.isfinite(relative), initial=-1.0))
        size = np.where(np.isnan(difference), np.inf, difference)
        candidates = np.argsort(-size, kind="stable")[:_POSITIONS_SHOWN]
        worst += [(float(size[i]), start + int(wrong[i])) for i in candidates]
        worst = sorted(worst, key=lambda entry: (-entry[0], entry[1]))[:_POSITIONS_SHOWN]
    if not differing:
        return True

    tail = f", {not_finite} of them by NaN or infinity" if not_finite else ""
    print(f"{differing} of {left.size} entries differ (rtol = {rtol:g}, atol = {atol:g}){tail}")
    print(f"largest absolute difference: {_number(largest)}")
    print(f"largest relative difference: {_number(largest_relative)}")
    _print_table(left, right, [flat for _, flat in worst])
    return False


def _as_array(values: Any) -> NDArray[Any]:
    """Return `values` as a numeric NumPy array on the host, without a change of value."""
    if isinstance(values, torch.Tensor):
        if values.layout != torch.strided:
            values = values.to_dense()
        # NumPy has neither bfloat16, the 8-bit floats nor half-precision complex numbers; widening is exact.
        if values.is_complex():
            values = values.to(torch.promote_types(values.dtype, torch.complex64))
        elif values.is_floating_point():
            values = values.to(torch.float64 if values.dtype == torch.float64 else torch.float32)
        array: NDArray[Any] = values.numpy(force=True)
    elif isinstance(values, list | tuple) and any(isinstance(v, torch.Tensor | list | tuple) for v in values):
        array = np.asarray([_as_array(v) for v in values])
    else:
        array = np.asarray(values)
    if array.dtype.kind not in "biufc":
        raise TypeError(f"cannot compare entries of type {array.dtype}: numbers are needed")
    return array


def _in_pieces(a: NDArray[Any], b: NDArray[Any]) -> Iterator[tuple[int, NDArray[Any], NDArray[Any]]]:
    """Yield ``(start, piece of a, piece of b)`` in C order, as flat float64 (or wider, or complex) arrays."""
    if a.size == 0:
        return
    dtype = np.result_type(a.dtype, b.dtype, np.float64)
    # The iterator converts piece by piece, so neither a float64 copy nor a contiguous one is ever made whole.
    pieces = np.nditer(
        [a, b],
        flags=["external_loop", "buffered"],
        op_flags=[["readonly"], ["readonly"]],
        op_dtypes=[dtype, dtype],
        order="C",
        buffersize=_ENTRIES_AT_A_TIME,
    )
    start = 0
    for x, y in pieces:
        yield start, x, y
        start += x.size


def _number(value: float) -> str:
    """Format a largest difference; -1 stands for 'no finite one'."""
    return "none is finite" if value < 0 else f"{value:.6g}"


def _print_table(a: NDArray[Any], b: NDArray[Any], flat_positions: list[int]) -> None:
    """Print position, both values and their difference, one position a line, right-aligned."""
    rows = [("position", "a", "b", "|a - b|")]
    for flat in flat_positions:
        position = tuple(int(i) for i in np.unravel_index(flat, a.shape))
        dtype = np.result_type(a.dtype, b.dtype, np.float64)
        with np.errstate(all="ignore"):
            difference = np.abs(a[position].astype(dtype) - b[position].astype(dtype))
        rows.append((str(position), str(a[position]), str(b[position]), f"{difference:.6g}"))
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    for row in rows:
        print("  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)))
