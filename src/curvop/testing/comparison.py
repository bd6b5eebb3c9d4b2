"""Compare two arrays or tensors and report where they differ."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

__all__ = ["allclose_report"]

_BLOCK_SIZE = 1 << 16
_MAX_ROWS = 10


def allclose_report(
    a: ArrayLike | torch.Tensor, b: ArrayLike | torch.Tensor, rtol: float = 1e-5, atol: float = 1e-8
) -> bool:
    """Compare two arrays or tensors, and print where they differ.

    Use this function in a test or an interactive session if you want to see which entries differ. If you only need True
    or False, or need broadcasting, use `numpy.allclose`.

    As in `numpy.allclose`, `b` is the reference: entries agree if ``|a - b| <= atol + rtol * |b|``. NaN never agrees
    with anything. An infinity agrees only with an infinity of the same sign. The comparison uses float64 or a wider
    dtype. Arrays of different shapes do not agree, because this function does not broadcast.

    Parameters
    ----------
    a, b : array_like or torch.Tensor
        Arrays of the same shape and of any numeric dtype, including integers, booleans, bfloat16 and complex numbers.
        Tensors can be on any device and can require grad. One argument can be a tensor and the other an array or list.
    rtol : float, default: 1e-5
        Relative tolerance, which is multiplied by ``|b|``.
    atol : float, default: 1e-8
        Absolute tolerance.

    Returns
    -------
    bool
        True if all entries agree or if the arrays are empty. Otherwise, the function returns False and prints the
        number of entries that differ, the largest finite absolute and relative differences, and the positions and
        values of up to ten entries with the largest absolute differences. If the shapes differ, it prints the shapes.

    Raises
    ------
    TypeError
        If an entry is not a number.
    ValueError
        If a nested list is ragged.

    See Also
    --------
    curvop.examples.functorch.functorch_hessian : A dense Hessian to compare an operator with.

    Notes
    -----
    The arrays are compared in blocks of fixed size, so the required memory does not grow with the size of the arrays.
    However, tensors on other devices are copied to the CPU as a whole.

    Examples
    --------
    >>> import numpy as np
    >>> import torch
    >>> from curvop import allclose_report
    >>> allclose_report(np.eye(2), torch.eye(2))
    True

    If entries differ, a table shows their positions and values:

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
    for start, x, y in _blocks(left, right):
        with np.errstate(all="ignore"):
            difference = np.abs(x - y)
            # An infinite entry of b has an infinite tolerance. Therefore, compare such entries with a for equality.
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
        candidates = np.argsort(-size, kind="stable")[:_MAX_ROWS]
        worst += [(float(size[i]), start + int(wrong[i])) for i in candidates]
        worst = sorted(worst, key=lambda entry: (-entry[0], entry[1]))[:_MAX_ROWS]
    if not differing:
        return True

    tail = f", {not_finite} because of NaN or infinity" if not_finite else ""
    print(f"{differing} of {left.size} entries differ (rtol = {rtol:g}, atol = {atol:g}){tail}")
    print(f"largest absolute difference: {_number(largest)}")
    print(f"largest relative difference: {_number(largest_relative)}")
    _print_table(left, right, [flat for _, flat in worst])
    return False


def _as_array(values: Any) -> NDArray[Any]:
    """Convert `values` to a numeric NumPy array on the CPU, without rounding."""
    if isinstance(values, torch.Tensor):
        if values.layout != torch.strided:
            values = values.to_dense()
        # NumPy has no bfloat16, 8-bit floats or half-precision complex numbers. Convert them to a wider dtype, which is
        # exact.
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
        raise TypeError(f"cannot compare entries of type {array.dtype}: entries must be numbers")
    return array


def _blocks(a: NDArray[Any], b: NDArray[Any]) -> Iterator[tuple[int, NDArray[Any], NDArray[Any]]]:
    """Yield tuples ``(start, block of a, block of b)`` in C order.

    ``start`` is the flat index of the first entry of a block. The blocks are flat arrays in float64, or in a wider or
    complex dtype if `a` or `b` has one.
    """
    if a.size == 0:
        return
    dtype = np.result_type(a.dtype, b.dtype, np.float64)
    # The iterator converts the arrays block by block, so no full-size copies are made.
    iterator = np.nditer(
        [a, b],
        flags=["external_loop", "buffered"],
        op_flags=[["readonly"], ["readonly"]],
        op_dtypes=[dtype, dtype],
        order="C",
        buffersize=_BLOCK_SIZE,
    )
    start = 0
    for x, y in iterator:
        yield start, x, y
        start += x.size


def _number(value: float) -> str:
    """Format the largest difference. A negative value means that no difference is finite."""
    return "none is finite" if value < 0 else f"{value:.6g}"


def _print_table(a: NDArray[Any], b: NDArray[Any], flat_positions: list[int]) -> None:
    """Print a right-aligned table. Each row shows a position, the values of both arrays, and their difference."""
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
