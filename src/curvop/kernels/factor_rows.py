"""Form the factor `S` of a matrix ``S' S`` as a tensor.

The rows of the factor of an empirical Fisher matrix are scaled gradients of examples. If the model treats its examples
independently, ``torch.func.vmap`` maps a backward pass over the examples of a batch. If each example has s rows,
computing all rows of the batch then takes about as many operations as computing s gradients of the batch. The rows of
each batch are verified by one product with the transpose of `S`. If the verification fails, or if the model cannot be
mapped over its examples, each row takes one backward pass over its batch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from curvop.kernels.diagonal import Pullback, over_examples
from curvop.kernels.errors import NonFiniteProductError, not_finite
from curvop.kernels.factor_kernel import FactorKernel
from curvop.kernels.ggn_kernel import outputs_of
from curvop.kernels.graph import LinearMap
from curvop.kernels.jacobian_kernel import RowMap
from curvop.kernels.memory import keep_freed_memory
from curvop.kernels.parameters import ParameterLayout

__all__ = ["write_rows"]


def write_rows(kernel: FactorKernel, names: Sequence[str], out: Tensor) -> None:
    """Write the columns of the factor that belong to the parameters `names` into `out`, a tensor of shape (n, P).

    The computation takes one pass over the data.

    Raises
    ------
    NonFiniteProductError
        If a row contains NaN or infinity.
    """
    keep_freed_memory()
    objective, totals, start = kernel.objective, kernel.objective.totals(), 0
    leaves = objective.leaves(names)
    layout = ParameterLayout(objective.params, names)
    params = layout.of(leaves)
    with objective.slow_backends():
        for index, batch in objective.batches():
            prediction, row_map, loss = kernel.evaluate(leaves, index, batch)
            totals.add(loss.value, loss.weight, *leaves.values())
            rows = out[start : start + row_map.count]
            start += row_map.count
            if not loss.weight:
                rows.zero_()
                continue
            outputs = outputs_of(prediction)
            backward = LinearMap(outputs, params)
            if not _write_by_example(kernel, layout, batch, outputs, row_map, backward, rows):
                _write_by_row(objective.dtype, layout, row_map, backward, rows)
            rows.mul_(kernel.scale(loss.weight))
            if not math.isfinite(float(rows.sum())) and not rows.isfinite().all():
                raise NonFiniteProductError(not_finite("factor", index, float(loss.value), "a per-example gradient"))
        kernel.check_count(len(totals.weights))
        objective.conclude(totals)
    out.div_(kernel.divisor(totals.weights))


def _write_by_example(
    kernel: FactorKernel,
    layout: ParameterLayout,
    batch: Any,
    outputs: list[Tensor],
    row_map: RowMap,
    backward: LinearMap,
    rows: Tensor,
) -> bool:
    """Compute the rows of one batch by mapping a backward pass over the examples, and verify the rows.

    Return False if the examples cannot be mapped, or if the rows fail the verification.
    """
    z = outputs[0].detach()
    count = len(z) if z.ndim else 1
    if len(outputs) > 1 or not count or row_map.count % count:
        return False
    seeds = []  # seeds[j] contains the cotangents of row j of every example
    for unit in torch.eye(row_map.count // count, dtype=z.dtype, device=z.device):
        [seed] = row_map.cotangents(unit.repeat(count))
        seeds.append(torch.zeros_like(z) if seed is None else seed.detach().reshape(z.shape))

    def rows_of_example(pullback: Pullback, own: Tensor) -> list[Tensor]:
        return [torch.cat([part.reshape(-1).to(rows.device) for part in pullback(seed)]) for seed in own]

    stacked = torch.stack(seeds).reshape(len(seeds), count, *z.shape[1:])
    shaped = rows.view(count, len(seeds), -1)
    try:
        X = kernel.objective.inputs(batch)
        chunks = over_examples(kernel.objective, layout.names, X, z, rows_of_example, (stacked,), len(seeds))
        for chunk, results in chunks:
            for number, result in enumerate(results):
                shaped[chunk, number] = result.to(rows.dtype)
    except NotImplementedError:
        return False
    weights = torch.linspace(1, 2, row_map.count, dtype=z.dtype, device=z.device).mul(1e4).cos()
    expected = _product(layout, row_map, backward, weights).to(rows.dtype)
    size = float(rows.norm(dim=1) @ weights.abs().to(rows.dtype))
    return bool((weights.to(rows.dtype) @ rows - expected).norm() <= torch.finfo(z.dtype).eps ** 0.5 * size)


def _write_by_row(
    dtype: torch.dtype, layout: ParameterLayout, row_map: RowMap, backward: LinearMap, rows: Tensor
) -> None:
    """Compute the rows of one batch. Each row takes a backward pass over the whole batch."""
    for number, row in enumerate(rows):
        unit = torch.zeros(row_map.count, dtype=dtype, device=rows.device)
        unit[number] = 1.0
        row.copy_(_product(layout, row_map, backward, unit))


def _product(layout: ParameterLayout, row_map: RowMap, backward: LinearMap, weights: Tensor) -> Tensor:
    """Return ``weights @ rows`` for the rows of one batch, computed by one backward pass."""
    parts = backward(row_map.cotangents(weights))
    return layout.join(
        [None if part is None else part.to(weights.device) for part in parts], weights.new_empty(layout.size)
    )
