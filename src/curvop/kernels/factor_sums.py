r"""Kronecker factors of the blocks of GGN, Fisher and empirical Fisher matrices, summed over a data set.

The matrix is :math:`\frac{1}{W} \sum_b w_b J_b^\top M_b J_b`, and :math:`M_b = \sum_c r_c r_c^\top` for each example
(see `curvop.kernels.output_columns`). One backward pass for each c yields the derivatives :math:`g_{pc}` of
:math:`\langle r_c, z \rangle` with respect to the output of a layer at each position p. With the inputs :math:`a_p` of
the layer, the factors of its block are

=========  ==================================================  ==================================================
sharing    input factor A                                      output factor B
=========  ==================================================  ==================================================
expand     mean of :math:`a_p a_p^\top` over all positions     :math:`\frac{1}{W} \sum w_b g_{pc} g_{pc}^\top`
                                                               over all positions
reduce     mean of :math:`\bar a \bar a^\top` over all data    :math:`\frac{1}{W} \sum w_b \hat g_c \hat g_c^\top`
           items, with :math:`\bar a` the mean of              over all data items, with :math:`\hat g_c` the sum
           :math:`a_p` over the positions of an item           of :math:`g_{pc}` over the positions of an item
=========  ==================================================  ==================================================

(Eschenhagen et al., "Kronecker-factored approximate curvature for modern neural network architectures", 2023,
arXiv:2311.00636). If a weight is used several times, the positions of all uses are pooled. If it is also used as its
own transpose, as in a language model with tied embeddings, both uses have a Kronecker product. The block is then the
Kronecker product that is nearest to the sum in the Frobenius norm.

The corrections of EKFAC (George et al., "Fast approximate natural gradient descent in a Kronecker factored eigenbasis",
2018, arXiv:1806.03884) are the diagonal of the exact block in the basis of the eigenvectors of A and B. A second pass
over the data computes them from the gradient of each example.

The factors of KFOC (Schnaus et al., "Kronecker-factored optimal curvature", 2021) are those of the Kronecker product
that is nearest to the exact block in the Frobenius norm. With the gradient :math:`G_{nc}` of each example, of the shape
of the weight, the power method computes :math:`B = \sum G_{nc} A G_{nc}^\top` and
:math:`A = \sum G_{nc}^\top B G_{nc}` in turn, each in one pass over the data, starting from the factors of KFAC.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import get_gradient_edge

from curvop.kernels.batches import batch_size, leaves
from curvop.kernels.changes import random_state
from curvop.kernels.data_axes import Positions, has_axis, is_separated, possible_positions, unit_scales
from curvop.kernels.errors import NonDeterministicObjectiveError, NonFiniteProductError
from curvop.kernels.factor_kernel import UNKNOWN_UNITS, item_count
from curvop.kernels.ggn_kernel import GGNLikeKernel, Parts, cut_off, outputs_of
from curvop.kernels.kronecker_factors import BlockLayout
from curvop.kernels.layer_factors import (
    COUPLED,
    FactorSettings,
    LayerBlock,
    LayerFactors,
    add_gram,
    add_inputs,
    input_chunks,
    summed_inputs,
)
from curvop.kernels.layer_uses import NORM, OTHER, UNUSED, Part, Use, UseRecorder
from curvop.kernels.memory import free_bytes, keep_freed_memory
from curvop.kernels.output_columns import OutputColumns, output_columns
from curvop.kernels.passes import precision, same

__all__ = ["FactorSettings", "FactorSums", "LayerFactors", "sum_factors"]

#: Largest number of steps of the power method, of two passes each, and the usual number of passes for progress bars.
_MAX_STEPS, _USUAL_PASSES = 50, 16

#: The name of a parameter, and the rows that a block covers.
_Key = tuple[str, tuple[int, int] | None]


@dataclasses.dataclass(eq=False)
class FactorSums:
    """The result of `sum_factors`.

    Attributes
    ----------
    layers : list of LayerFactors
    diagonals : dict of str to Tensor
        Maps the name of each parameter of a normalization to the diagonal of its block.
    inexact : set of str
        The names of the parameters whose diagonals are not exact, because a data item has several terms of the loss or
        because the model couples the data items.
    others : dict of str to str
        Maps the name of each parameter without Kronecker factors to the reason.
    weight : float
        The total weight of all batches, or the number of batches if the loss is a sum.
    """

    layers: list[LayerFactors]
    diagonals: dict[str, Tensor]
    inexact: set[str]
    others: dict[str, str]
    weight: float


# Passes over the data.


def sum_factors(
    kernel: GGNLikeKernel,
    names: Sequence[str],
    settings: FactorSettings,
    tick: Callable[[float], None] | None = None,
) -> FactorSums:
    """Compute the Kronecker factors of the blocks of a matrix.

    The computation takes one pass over the data, two passes for EKFAC, and two more for each step of KFOC.

    Parameters
    ----------
    kernel : GGNLikeKernel
        The kernel of the matrix.
    names : sequence of str
        Names of the parameters.
    settings : FactorSettings
    tick : callable, optional
        Called with the completed fraction of the work, between 0 and 1.

    Raises
    ------
    NotFactorableError
        If the Hessian of the loss with respect to the prediction is indefinite.
    NonFiniteProductError
        If a factor contains NaN or infinity.
    MemoryError
        If the factors do not fit into memory.
    ValueError
        If data items cannot be separated, although this is necessary.
    """
    keep_freed_memory()
    return _Pass(kernel, names, settings, tick).run()


class _Batch:
    """The evaluation of one batch: the prediction, the uses of the parameters, and the columns of the loss."""

    def __init__(self, kernel: GGNLikeKernel, leaves: Mapping[str, Tensor], index: int, batch: Any) -> None:
        objective = kernel.objective
        recorder = UseRecorder(leaves)
        prediction, copy, parts, loss = objective.split(leaves, index, batch, cut_off, recorder)
        self.loss, self._kernel, self._index, self._copy, self._parts = loss, kernel, index, copy, parts
        self._pair = objective.inputs(batch), loss.y
        self._outputs = outputs_of(prediction)
        self._edges = [get_gradient_edge(part) if part.requires_grad else None for part in self._outputs]
        self._batch = batch
        self.couples_items = recorder.couples_items
        self.tolerance = math.sqrt(objective.epsilon(loss.value))
        self.uses: list[Use] = []
        self.others: dict[str, str] = {}
        if loss.weight:
            self.uses, self.others = recorder.separate(self._outputs)
            for use in self.uses:
                use.check_version()

    def columns(self) -> OutputColumns:
        """Return the square root of the Hessian of the loss."""
        extra = self._kernel.extra(self._index, self._copy, self._batch, self.loss.y)
        self._columns = output_columns(self._kernel, self._parts, extra, self.loss)
        return self._columns

    def items(self) -> list[int]:
        """Return the possible numbers of data items, the most likely first.

        The items may lie on the second axis of X, as in ``torch.nn.LSTM``. Then the prediction and y have another first
        axis than X.
        """
        terms, (X, y), outputs = self._columns.terms, self._pair, [part.detach() for part in self._outputs]
        counts: list[int | None] = [item_count(outputs, self._pair, terms)]
        first, count = batch_size(X), batch_size(y)
        differs = first not in (None, 1, count) and outputs[0].shape[:1] == (count,)
        if differs and terms % (count or 1) == 0 and all(part.shape[1:2] == (count,) for part in leaves(X)):
            counts.insert(0, count)
        return [count for count in counts if count is not None]

    def gradients(self, cotangents: Parts, uses: Sequence[Use]) -> list[Tensor | None]:
        """Return the gradient with respect to the output of each use."""
        pairs = [
            (edge, part)
            for edge, part in zip(self._edges, cotangents, strict=True)
            if edge is not None and part is not None
        ]
        if not pairs or not uses:
            return [None] * len(uses)
        gradients = torch.autograd.grad(
            [edge for edge, _ in pairs],
            [use.edge for use in uses],
            [part for _, part in pairs],
            retain_graph=True,
            allow_unused=True,
        )
        # With autocast, layers compute in a lower precision.
        return [part if part is None else part.to(use.dtype) for use, part in zip(uses, gradients, strict=True)]


class _Probe:
    """The gradients of uses for the columns of the loss, and for cotangents that show the positions of each unit."""

    def __init__(self, batch: _Batch, columns: OutputColumns, uses: Sequence[Use]) -> None:
        self._batch, self._columns, self._uses = batch, columns, list(uses)
        self._plain: list[Tensor | None] | None = None
        self._scaled: dict[int, list[Tensor | None]] = {}

    def column(self, column: int) -> list[Tensor | None]:
        """Return the gradients for one column of the loss."""
        if self._columns.count == 1:  # this is the cotangent of the probe
            return self.plain()
        return self._batch.gradients(self._columns.column(column), self._uses)

    def plain(self) -> list[Tensor | None]:
        """Return the gradients for a cotangent r of the prediction."""
        if self._plain is None:
            self._plain = self._batch.gradients(self._columns.probe(), self._uses)
        return self._plain

    def scaled(self, count: int) -> list[Tensor | None]:
        """Return the gradients for r if the part of each unit is multiplied by a factor of `unit_scales`."""
        if count not in self._scaled:
            factors = unit_scales(count).repeat_interleave(self._columns.terms // count)
            self._scaled[count] = self._batch.gradients(self._columns.probe(factors), self._uses)
        return self._scaled[count]

    def options_of_items(self, uses: slice = slice(None)) -> tuple[int, list[list[Positions]]]:
        """Return the number of data items, and the possible positions of an item for each use, or for some of the uses.

        Raises
        ------
        ValueError
            If the number of data items is unknown.
        """
        counts = self._batch.items()
        if not counts:
            raise ValueError(UNKNOWN_UNITS)
        for count in counts:
            options = self.options(count, uses)
            if all(options):
                break
        return count, options

    def options(self, count: int, uses: slice = slice(None)) -> list[list[Positions]]:
        """Return the possible positions of `count` units for each use, or for some of the uses."""
        terms, tol = self._columns.terms, self._batch.tolerance
        if terms == 0 or terms % count:
            return [[] for _ in self._uses[uses]]
        if count == 1:
            return [possible_positions(use, 1, None, None, tol) for use in self._uses[uses]]
        triples = zip(self._uses[uses], self.plain()[uses], self.scaled(count)[uses], strict=True)
        return [possible_positions(use, count, plain, scaled, tol) for use, plain, scaled in triples]

    def is_shared(self, index: int, count: int) -> bool:
        """Return True if an output has positions that several of `count` data items share.

        Batch normalization couples all items, and every item still has its own positions.
        """
        use, plain, scaled = self._uses[index], self.plain()[index], self.scaled(count)[index]
        if plain is None or scaled is None or is_separated(use, count, plain, scaled, self._batch.tolerance):
            return False
        return not (self._batch.couples_items and has_axis(use, count))

    def forget(self) -> None:
        """Free the memory of gradients that are not needed any more."""
        self._scaled.clear()
        if self._columns.count > 1:
            self._plain = None


class _Pass:
    def __init__(
        self,
        kernel: GGNLikeKernel,
        names: Sequence[str],
        settings: FactorSettings,
        tick: Callable[[float], None] | None,
    ) -> None:
        self._kernel, self._objective, self._names, self._settings = kernel, kernel.objective, list(names), settings
        self._tick = tick
        self._blocks: dict[_Key, LayerBlock] = {}
        self._norms: dict[_Key, LayerBlock] = {}
        self._inexact: set[str] = set()
        self._pairs_seen: dict[_Key, _Key | None] = {}
        self._apart: set[_Key] = set()
        self._others: dict[str, str] = {}
        self._seen: set[str] = set()
        self._undecided: dict[tuple[object, ...], set[int]] = {}
        self._norm_units: dict[tuple[object, ...], tuple[list[Positions] | None, int]] = {}
        self._kinds: dict[tuple[object, ...], tuple[object, ...]] = {}
        self._guesses: dict[tuple[object, ...], list[tuple[object, ...]]] = {}
        self._done = 0

    def run(self) -> FactorSums:
        """Return the factors."""
        corrected, nearest = self._settings.corrected, self._settings.nearest
        kept = corrected or nearest is not None
        weights = self._read(self._add_factors, kept=kept)
        if self._guessed_wrong() or self._apart:  # other axes or separate biases in later batches: start again
            for found in (self._blocks, self._norms, self._pairs_seen):
                found.clear()
            weights = self._read(self._add_factors, kept=kept)
        divisor = self._objective.divisor(weights)
        self._remove_others()
        self._check_guesses()
        for block in self._blocks.values():
            block.finish(divisor)
        if corrected and self._blocks:
            self._check_finite()  # the eigendecompositions of NaN fail
            for block in self._blocks.values():
                block.start_corrections()
            self._read(self._add_corrections)
            for block in self._blocks.values():
                block.divide_corrections(divisor)
        if nearest is not None:
            self._find_nearest(nearest, divisor)
        for block in self._norms.values():
            block.divide_corrections(divisor)
        self._check_finite()
        layers = [block.factors for block in self._blocks.values()]
        diagonals = {
            block.layout.names[0]: block.factors.eigenvalues.reshape(-1)
            for block in self._norms.values()
            if block.factors.eigenvalues is not None
        }
        return FactorSums(layers, diagonals, self._inexact & diagonals.keys(), self._others, math.fsum(weights))

    def _find_nearest(self, rtol: float, divisor: float) -> None:
        """Replace the factors by those of the nearest Kronecker products, by the power method."""
        active = list(self._blocks.values())
        for block in active:
            block.start_products()
        for _ in range(_MAX_STEPS if active else 0):
            changes = dict.fromkeys(active, 0.0)
            for side in ("output", "input"):
                for block in active:
                    block.start_partial(side)
                self._read(self._add_corrections)
                for block in active:
                    changes[block] = max(changes[block], block.finish_partial(divisor))
            active = [block for block, change in changes.items() if change > rtol]
            if not active:
                break
        for block in self._blocks.values():
            block.finish_products()

    def _read(self, add: Callable[[_Batch], None], kept: bool = False) -> list[float]:
        """Call `add` for each batch, and return the weights of the batches."""
        objective = self._objective
        leaves, totals = objective.leaves(self._names), objective.totals()
        selected = {name: leaves[name] for name in self._names}
        passes = 1 + self._settings.corrected + (_USUAL_PASSES if self._settings.nearest is not None else 0)
        with objective.slow_backends():
            for index, pair in objective.batches():
                batch = self._evaluated(leaves, index, pair)
                totals.add(batch.loss.value, batch.loss.weight, *selected.values())
                if batch.loss.weight:
                    with _without_autocast(objective.device):  # autocast is for the model only
                        add(batch)
                del batch
                self._done += 1
                if self._tick is not None and len(objective):
                    self._tick(min(1.0, self._done / (passes * len(objective))))
            objective.conclude(totals, kept=kept)
        return totals.weights

    def _evaluated(self, leaves: Mapping[str, Tensor], index: int, pair: Any) -> _Batch:
        """Evaluate a batch. If the model draws random numbers, check that the loss does not depend on them."""
        objective = self._objective
        before = random_state(objective.devices)
        batch = _Batch(self._kernel, leaves, index, pair)
        if not torch.equal(random_state(objective.devices), before):
            first, batch = float(batch.loss.value), _Batch(self._kernel, leaves, index, pair)
            eps = precision(batch.loss.value, *leaves.values())
            if not same([float(batch.loss.value)], [first], eps):
                what = f"the loss of batch {index}"
                raise NonDeterministicObjectiveError(objective.changed(what, first, batch.loss.value))
        return batch

    # Blocks.

    def _register(self, batch: _Batch) -> None:
        """Create the blocks of the parameters that a batch uses for the first time."""
        for name, reason in batch.others.items():
            if reason != UNUSED:
                self._others[name] = reason
                self._seen.add(name)
        pairs = self._pairs(batch.uses) if self._settings.joint_bias else {}
        needed = 0
        for use in batch.uses:
            for key, is_bias in ((_key(use.weight), False), (_key(use.bias), True)):
                if key is None:
                    continue
                self._seen.add(key[0])
                if use.is_norm:
                    self._register_norm(use, key, is_bias)
                    continue
                if key[0] in self._others or (is_bias and key in pairs.values()):
                    continue
                block, bias = self._blocks.get(key), None if is_bias else pairs.get(key)
                if block is None:
                    block = self._blocks[key] = self._new_block(use, is_bias, bias)
                    needed += block.bytes(use)
                if key in self._pairs_seen.values() or self._pairs_seen.setdefault(key, bias) != bias:
                    self._apart.add(key)
                if not block.agrees(use) or any(_overlap(key, other) for other in self._blocks):
                    self._others[key[0]] = OTHER
        self._check_memory(needed)

    def _register_norm(self, use: Use, key: _Key, is_bias: bool) -> None:
        """Create the block of a parameter of a normalization, unless it has other uses or no gradients are computed."""
        if self._settings.forward_only or key[1] is not None or key[0] in self._others:
            self._others.setdefault(key[0], NORM)
        elif key not in self._norms:
            self._norms[key] = self._new_block(use, is_bias, None)
            self._norms[key].start_diagonal()
        elif not self._norms[key].agrees(use):
            self._others[key[0]] = NORM

    def _pairs(self, uses: Sequence[Use]) -> dict[_Key, _Key]:
        """Return a dict that maps each weight to its bias, for weights and biases that are only used together.

        Parameters that an earlier batch used in another way are left out.
        """
        partners: dict[_Key, set[_Key | None]] = {}
        uses = [use for use in uses if not use.is_norm]
        for use in uses:
            weight, bias = _key(use.weight), _key(use.bias)
            for own, other in ((weight, bias), (bias, weight)):
                if own is not None:
                    partners.setdefault(own, set()).add(other)
        pairs = {}
        for use in uses:
            weight, bias = _key(use.weight), _key(use.bias)
            if (
                weight is None
                or bias is None
                or {weight[0], bias[0]} & self._others.keys()
                or self._apart & {weight, bias}
            ):
                continue
            if weight[1] == bias[1] and partners[weight] == {bias} and partners[bias] == {weight}:
                pairs[weight] = bias
        return pairs

    def _new_block(self, use: Use, is_bias: bool, bias: _Key | None) -> LayerBlock:
        part = use.bias if is_bias else use.weight
        assert part is not None
        names = (part.name,) if bias is None else (part.name, bias[0])
        params = self._objective.params
        layout = BlockLayout(
            names=names,
            shapes=tuple(params[name].shape for name in names),
            groups=use.groups,
            outputs=use.outputs,
            inputs=0 if is_bias else use.inputs,
            bias=is_bias or bias is not None,
            transposed=part.transposed and not is_bias,
            rows=part.rows,
        )
        return LayerBlock(layout, use, self._settings, params[part.name].detach())

    def _blocks_of(self, use: Use) -> list[LayerBlock]:
        blocks = self._norms if use.is_norm else self._blocks
        keys = (_key(use.weight), _key(use.bias))
        return [blocks[key] for key in keys if key in blocks and key[0] not in self._others]

    def _check_memory(self, needed: int) -> None:
        """Raise a MemoryError if new factors need more bytes than are free."""
        free = free_bytes(self._objective.device) if needed else 0
        if needed > free:
            raise MemoryError(
                f"the Kronecker factors take {needed / 1e9:.3g} GB, but {free / 1e9:.3g} GB are free: pass a smaller "
                "max_factor, so that larger factors are replaced by their diagonals"
            )

    def _remove_others(self) -> None:
        """Remove the blocks of parameters that are also used in other ways, and list the unused parameters."""
        covered: Counter[str] = Counter()
        for block in (*self._blocks.values(), *self._norms.values()):
            covered.update(dict(zip(block.layout.names, block.layout.sizes, strict=True)))
        for name, size in covered.items():
            if size < self._objective.params[name].numel():  # some rows are used by no layer
                self._others.setdefault(name, OTHER)
        for blocks in (self._blocks, self._norms):
            for key, block in list(blocks.items()):
                if set(block.layout.names) & self._others.keys():
                    del blocks[key]
                    self._others |= {name: OTHER for name in block.layout.names if name not in self._others}
        self._others |= {name: UNUSED for name in self._names if name not in self._seen}
        assert covered.keys() | self._others.keys() >= set(self._names)

    def _check_finite(self) -> None:
        for block in (*self._blocks.values(), *self._norms.values()):
            factors = block.factors
            for factor in (factors.output, factors.input, factors.eigenvalues):
                # NaN and infinity propagate through sums. A sum of finite entries may overflow.
                if factor is not None and not math.isfinite(float(factor.sum())) and not factor.isfinite().all():
                    raise NonFiniteProductError(
                        f"a Kronecker factor of {factors.layout.names[0]!r} is not finite: look for NaN in the data, "
                        "the parameters and the gradients"
                    )

    # Factors.

    def _add_factors(self, batch: _Batch) -> None:
        self._register(batch)
        uses = [use for use in batch.uses if not use.is_norm and self._blocks_of(use)]
        norms = [use for use in batch.uses if use.is_norm and self._blocks_of(use) and not self._settings.corrected]
        reduces, forward_only = self._settings.sharing == "reduce", self._settings.forward_only
        if not reduces:
            self._add_inputs(uses)
        if not (uses or norms) or (forward_only and not reduces):
            return
        columns = batch.columns()
        probe = _Probe(batch, columns, [*uses, *norms])
        positions, undecided = None, set()
        if reduces:
            positions = self._chosen(uses, probe.options_of_items(slice(len(uses)))[1])
            if positions is None:
                raise ValueError(COUPLED)
            self._add_mean_inputs(uses, positions)
            if forward_only:
                return
        else:
            key = columns.terms, *(use.signature for use in uses)
            undecided = self._undecided.setdefault(key, set(range(len(uses))))
        units, length = self._units_of_norms(batch, probe, norms, columns) if norms else ([], 1)
        names = {block.layout.names[0] for use in norms for block in self._blocks_of(use)}
        if length > 1 or units is None:
            self._inexact |= names
        if units is None:  # a later layer couples the data items: assume that one axis runs over them
            options = [[possible_positions(use, count, None, None, 0.0) for use in norms] for count in batch.items()]
            units = next(([possible[0] for possible in option] for option in options if all(option)), None)
        if units is None:
            self._others |= dict.fromkeys(names, NORM)
            norms, units = [], []
        probe.forget()
        reached: set[int] = set()
        cache: dict[Any, Any] = {}
        for column in range(columns.count):
            gradients = probe.column(column)
            reached |= {index for index in undecided - reached if _is_nonzero(gradients[index])}
            if positions is None:
                self._add_outputs(uses, gradients[: len(uses)], batch.loss.weight)
            else:
                self._add_sums(uses, gradients[: len(uses)], positions, batch.loss.weight)
            self._correct(norms, gradients[len(uses) : len(uses) + len(norms)], units, batch.loss.weight, cache)
        counts = batch.items() if reached else []
        for index in reached if counts and 1 not in counts else ():
            if all(probe.is_shared(index, count) for count in counts):
                parts = uses[index].weight, uses[index].bias
                self._others |= {part.name: OTHER for part in parts if part is not None}
        undecided -= reached

    def _add_inputs(self, uses: Sequence[Use]) -> None:
        """Add ``a a'`` for all positions."""
        shared: dict[tuple[object, ...], list[Any]] = {}  # the sums of uses with the same input
        owners: dict[tuple[object, ...], Use] = {}
        for use in uses:
            for block in self._blocks_of(use):
                index = use.indices() if use.one_hot else None
                sums = block.of(use)
                count = int((index >= 0).sum()) if index is not None else math.prod(use.position_shape)
                sums.count += count
                diagonal = use.one_hot and not block.bias_only
                if sums.input is None:
                    sums.input = block.new_factor(block.columns(use), diagonal)
                if block.bias_only:
                    sums.input += count
                elif index is not None:
                    counts = torch.bincount(index[index >= 0].reshape(-1), minlength=use.inputs).to(sums.input.dtype)
                    (sums.input if sums.input.ndim == 2 else sums.input.diagonal(dim1=-2, dim2=-1)).add_(counts)
                else:
                    sums.offsets = use.offsets
                    key = (*use.inputs_key, block.layout.bias, sums.input.ndim)
                    shared.setdefault(key, []).append(sums)
                    owners[key] = use
        for key, of_key in shared.items():
            use = owners[key]
            totals: list[Tensor] = [sums.input for sums in of_key]
            own = totals[0] if len(totals) == 1 else torch.zeros_like(totals[0])
            for vectors in input_chunks(use):
                add_inputs(own, vectors, use.inputs)
            for total in totals if len(totals) > 1 else ():
                total.add_(own)

    def _add_outputs(self, uses: Sequence[Use], gradients: Sequence[Tensor | None], weight: float) -> None:
        """Add ``g g'`` for all positions."""
        for use, gradient in zip(uses, gradients, strict=True):
            if gradient is None:
                continue
            g = use.gradients(gradient)
            if use.padding_idx is not None:
                g = g[use.indices() >= 0]
            g = g.reshape(-1, use.groups, use.outputs)
            for block in self._blocks_of(use):
                block.add_output(use, g, weight)

    def _by_sum(self, uses: Sequence[Use]) -> Iterator[tuple[LayerBlock, list[int]]]:
        """Yield each block once for each orientation, with the indices of its uses in this orientation."""
        groups: dict[tuple[int, bool], tuple[LayerBlock, list[int]]] = {}
        for index, use in enumerate(uses):
            for block in self._blocks_of(use):
                groups.setdefault((id(block), block.flips(use)), (block, []))[1].append(index)
        yield from groups.values()

    def _add_mean_inputs(self, uses: Sequence[Use], positions: Sequence[Positions]) -> None:
        """Add the outer products of the mean input of each data item."""
        for block, indices in self._by_sum(uses):
            pairs = [summed_inputs(block, uses[index], positions[index]) for index in indices]
            total = torch.stack([own for own, _ in pairs]).sum(0)
            lengths = torch.stack([own for _, own in pairs]).sum(0).clamp(min=1)
            use = uses[indices[0]]
            sums = block.of(use)
            sums.count += len(total)
            if sums.input is None:
                sums.input = block.new_factor(block.columns(use), False)
            add_gram(sums.input, total / lengths[:, None, None])

    def _add_sums(
        self, uses: Sequence[Use], gradients: Sequence[Tensor | None], positions: Sequence[Positions], weight: float
    ) -> None:
        """Add the outer products of the sum of the gradients of each data item."""
        for block, indices in self._by_sum(uses):
            total = None
            for index in indices:
                gradient, use = gradients[index], uses[index]
                if gradient is None:
                    continue
                g = use.gradients(gradient)
                if use.padding_idx is not None:
                    g = g * (use.indices() >= 0)[..., None, None]
                own = positions[index].split(g, 2).sum(1)
                total = own if total is None else total + own
            if total is not None:
                block.add_output(uses[indices[0]], total, weight)

    # Positions.

    def _chosen(self, uses: Sequence[Use], options: Sequence[list[Positions]]) -> list[Positions] | None:
        """Return the positions of each use, or None if there are none.

        If the gradients of a batch do not determine the axis, the axis of the same use in other batches is chosen.
        """
        if not all(options):
            return None
        chosen, numbers = [], Counter[tuple[object, ...]]()
        for use, possible in zip(uses, options, strict=True):
            own = use.weight, use.bias, len(use.shape)
            numbers[own] += 1
            key, kinds = (*own, numbers[own]), [option.kind for option in possible]
            kind = self._kinds.get(key)
            index = kinds.index(kind) if kind in kinds else 0
            if possible[0].units > 1 and len(kinds) == 1:
                self._kinds[key] = kinds[0]
            elif len(kinds) > 1 and kind not in kinds:
                self._guesses.setdefault(key, []).extend(kinds[1:])
            chosen.append(possible[index])
        return chosen

    def _guessed_wrong(self) -> bool:
        """Return True if a later batch shows another axis than the one that was assumed for an earlier batch."""
        return any(self._kinds.get(key) in kinds for key, kinds in self._guesses.items())

    def _check_guesses(self) -> None:
        """Raise a ValueError if no batch shows along which axis the means of items must be taken."""
        names = {key[0].name for key in self._guesses.keys() - self._kinds.keys() if isinstance(key[0], Part)}
        for block in self._blocks.values():
            outputs = [sums.output for sums in block.sums.values()]
            if names.intersection(block.layout.names) and any(_is_nonzero(output) for output in outputs):
                raise ValueError(
                    f"the axis of the data items in the outputs of the layer with the parameter "
                    f"{block.layout.names[0]!r} is unknown, because almost all gradients are zero: pass larger "
                    "batches, or use sharing='expand'"
                )

    # Corrections.

    def _add_corrections(self, batch: _Batch) -> None:
        uses = [use for use in batch.uses if self._blocks_of(use) and (self._settings.corrected or not use.is_norm)]
        if not uses:
            return
        columns = batch.columns()
        if not columns.terms:
            return
        probe = _Probe(batch, columns, uses)
        positions, length, _ = self._units(batch, probe, columns)
        if positions is None:
            raise ValueError(COUPLED if batch.items() else UNKNOWN_UNITS)
        probe.forget()
        cache: dict[Any, Any] = {}
        for column in range(columns.count):
            for start in range(length):
                if length == 1:
                    gradients = probe.column(column)
                else:
                    chosen = columns.mask(slice(start, None, length))
                    gradients = batch.gradients(columns.column(column, chosen), uses)
                self._correct(uses, gradients, positions, batch.loss.weight, cache)

    def _units(
        self, batch: _Batch, probe: _Probe, columns: OutputColumns, uses: slice = slice(None)
    ) -> tuple[list[Positions] | None, int, bool]:
        """Return ``(positions, length, decided)``: the positions of units, and the number of terms of the loss of each.

        A unit is a term of the loss if each position affects one term only. Otherwise, it is a data item. The positions
        are None if neither can be separated. If `decided` is False, other batches of the same shape may have other
        units. If the gradients do not determine an axis, all possible axes yield the same squares.
        """
        options = probe.options(columns.terms, uses)
        length, decided = 1, columns.terms == 1
        if not all(options):
            if not batch.items():
                return None, 1, False
            items, options = probe.options_of_items(uses)
            length, decided = columns.terms // items, True
        elif columns.terms in batch.items():
            decided = True
        decided = decided and all(len(possible) == 1 for possible in options)
        return [possible[0] for possible in options] if all(options) else None, length, decided

    def _units_of_norms(
        self, batch: _Batch, probe: _Probe, norms: Sequence[Use], columns: OutputColumns
    ) -> tuple[list[Positions] | None, int]:
        """Return the positions of the units of normalizations, and the number of terms of the loss of each unit.

        They are computed once for all batches of the same shape. As an exception, they are computed for each batch if
        the terms of a data item can be separated, because this may depend on the data.
        """
        key = columns.terms, *(use.signature for use in norms)
        if key not in self._norm_units:
            positions, length, decided = self._units(batch, probe, columns, slice(-len(norms), None))
            if not decided:
                return positions, length
            self._norm_units[key] = positions, length
        return self._norm_units[key]

    def _correct(
        self,
        uses: Sequence[Use],
        gradients: Sequence[Tensor | None],
        positions: Sequence[Positions],
        weight: float,
        cache: dict[Any, Any],
    ) -> None:
        """Add the squared gradients of all units to the corrections of the blocks."""
        groups: dict[int, tuple[LayerBlock, list[tuple[Use, Tensor, Positions]]]] = {}
        for use, gradient, own in zip(uses, gradients, positions, strict=True):
            for block in self._blocks_of(use) if gradient is not None else ():
                assert gradient is not None
                groups.setdefault(id(block), (block, []))[1].append((use, gradient, own))
        for block, present in groups.values():
            block.add_gradients(present, weight, cache)


def _without_autocast(device: torch.device) -> contextlib.AbstractContextManager[object]:
    """Disable autocast on a device, unless it is disabled, because some devices do not support it."""
    if not torch.is_autocast_enabled(device.type):
        return contextlib.nullcontext()
    return torch.autocast(device.type, enabled=False)


def _key(part: Part | None) -> _Key | None:
    return None if part is None else (part.name, part.rows)


def _is_nonzero(gradient: Tensor | None) -> bool:
    return gradient is not None and bool(gradient.any())


def _overlap(first: _Key, second: _Key) -> bool:
    """Return True if two different blocks contain the same rows of a parameter."""
    if first[0] != second[0] or first == second:
        return False
    if first[1] is None or second[1] is None:
        return True
    return first[1][0] < second[1][1] and second[1][0] < first[1][1]
