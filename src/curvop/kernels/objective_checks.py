"""Check, in the first pass over the data, that the kernels interpret the user's code correctly.

- The graphs of the first results are searched for parameters that the user's code uses directly. The kernels can only
  differentiate with respect to the tensors that replace these parameters.
- Two batches are evaluated as one batch. The loss is compared with the mean or sum of the losses of the two batches.
- The modules and the data loader are inspected for randomness.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, SubsetRandomSampler, WeightedRandomSampler

from curvop.kernels.batches import batch_size, joined, to_device
from curvop.kernels.batches import leaves as leaves_of
from curvop.kernels.graph import nodes
from curvop.kernels.user_warnings import warn_user

if TYPE_CHECKING:
    from curvop.kernels.objective import Objective
    from curvop.kernels.passes import Totals

__all__ = [
    "BATCHING_REMEDY",
    "ZERO_MATRIX",
    "BatchPair",
    "FirstPassChecks",
    "batchwise_modules",
    "listed",
    "random_modules",
    "random_subset",
    "reached",
    "suspects",
]

T = TypeVar("T")

_ALIKE = 1e-3  # weights are not verified with losses or gradients whose relative difference is smaller
_INTEGERS = {torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.bool}


#: Advice for the user if the loss of two batches evaluated as one contradicts the weights of the batches.
BATCHING_REMEDY = (
    "pass batch_weight=, a function of the batch, such as its number of targets that are not ignored, or declare that "
    "the loss is a sum (loss_function.reduction = 'sum'); else the loss couples its examples, or adds a term without "
    "data once per batch, so that the matrix depends on how the data is divided into batches: pass one batch"
)
#: Warning for a generalized Gauss-Newton matrix whose loss is linear in the prediction.
ZERO_MATRIX = (
    "the matrix is zero, because the loss is linear in the prediction; if the model computes its own loss, return the "
    "logits and compute the loss in loss_function, or use HessianLinearOperator"
)


class FirstPassChecks:
    """Checks of an objective during the first pass over the data, and the results of these checks.

    Methods take the objective as an argument. If this class stored the objective, the two objects would form a
    reference cycle, and the graphs that the objective retains would stay in memory until the garbage collector runs.

    Attributes
    ----------
    warned : set of str
        Kinds of warnings that have been issued.
    batching : str or None
        A description of how the loss of two batches, evaluated as one batch, contradicts the weights of the two
        batches. An empty string if there is no contradiction. None before the end of the first pass.
    unverified : bool
        True if the weights could not be verified, because no two batches could be compared.
    curved : bool or None
        Whether the second derivative of the loss with respect to the prediction is nonzero. None if this derivative was
        not evaluated.
    flags_matter : bool or None
        Whether the result of the user's code depends on the ``requires_grad`` flags of the parameters. None if this is
        not yet known.
    """

    _with_leaves: frozenset[str] = frozenset()  # operators that were pickled by earlier versions do not have it

    def __init__(self) -> None:
        self.warned: set[str] = set()
        self.batching: str | None = None
        self.unverified = False
        self.curved: bool | None = None
        self.flags_matter: bool | None = None
        self._pair: BatchPair | None = BatchPair()
        self._depends = False
        self._searching: set[str] = set()
        self._searched: set[str] = set()

    def __getstate__(self) -> dict[str, object]:
        return self.__dict__ | {"_pair": None}  # batches of data are not pickled

    def start_pass(self, objective: Objective) -> BatchPair | None:
        """Return a `BatchPair` that collects batches for `verify_batching`, or None if there is nothing to verify."""
        self._pair = BatchPair() if self.batching is None and objective.assumes_weights() else None
        return self._pair

    def abandon_pass(self) -> None:
        """Discard the batches collected in a pass that failed or was closed early."""
        self._pair = None

    def begin_search(self, what: str) -> None:
        """Record that the current pass over the data searches the graphs of the results with the name `what`."""
        self._searching.add(what)

    def end_search(self) -> None:
        """Record that the current pass over the data has searched the graphs of all batches."""
        self._searched, self._searching = self._searched | self._searching, set()

    def is_searched(self, what: str) -> bool:
        """Return True if the graphs of the results named `what` have been searched in a complete pass over the data."""
        return what in self._searched

    def has_found_leaves(self, what: str) -> bool:
        """Return True if a result named `what` has been searched, and its graph contains leaves."""
        return what in self._with_leaves

    def search(
        self,
        objective: Objective,
        what: str,
        result: Any,
        originals: Mapping[str, Sequence[Tensor]],
        leaves: Mapping[str, Tensor],
    ) -> None:
        """Raise a ValueError if the graph of `result` contains any of `originals`, the tensors that `leaves` replace.

        In addition, record whether the graph contains any of `leaves`. The methods `has_found_leaves` and
        `depends_on_params` use this record. `what` is the name of the result.
        """
        outputs = list(leaves_of(result))
        if direct := reached(outputs, originals):
            raise ValueError(objective.reached_directly(min(direct, key=list(originals).index)))
        if reached(outputs, {name: [leaf] for name, leaf in leaves.items()}):
            self._depends = True
            self._with_leaves |= {what}

    def depends_on_params(self, objective: Objective) -> bool:
        """Return True if the loss of at least one batch depends on at least one parameter."""
        for index, batch in objective.batches() if not self._depends else ():
            objective.evaluate(objective.leaves(objective.params), index, batch)
            if self._depends:
                break
        return self._depends

    def compare_flags(
        self,
        objective: Objective,
        run: Callable[[Mapping[str, Tensor], bool], T],
        leaves: Mapping[str, Tensor],
    ) -> T | None:
        """Set `flags_matter` by evaluating the user's code twice, with different ``requires_grad`` flags.

        In the first evaluation, the leaves of all parameters require grad. In the second evaluation, `leaves` keep
        their flags, and all other parameters are constants. If the results agree, `flags_matter` becomes False, and
        later evaluations use the flags of the second evaluation. Autograd then saves nothing for layers before the
        selected parameters. Call this method only if the flags of the two evaluations differ.

        Parameters
        ----------
        objective : Objective
        run : callable
            A function ``(leaves, keeps_flags) -> result``. If ``keeps_flags`` is True, parameters of the modules that
            are not replaced by `leaves` keep their ``requires_grad`` flags. Otherwise, these parameters are constants.
        leaves : dict of str to Tensor

        Returns
        -------
        result or None
            The result of the second evaluation, which later evaluations would repeat, or None if `flags_matter` is
            True.
        """
        selected = [name for name, leaf in leaves.items() if leaf.requires_grad]
        all_leaves = objective.leaves(objective.params)
        with_all = run(all_leaves, True)
        try:
            with_selected = run(leaves, False)
        except Exception:  # for example in a training loop that differentiates with respect to all parameters
            self.flags_matter = True
            return None
        pairs = zip(leaves_of(with_all), leaves_of(with_selected), strict=True)
        if not all(_agree(*pair) for pair in pairs):
            self.flags_matter = True
            return None
        reached_by_all, reached_by_selected = (
            reached(leaves_of(result), {name: [own[name]] for name in selected})
            for result, own in ((with_all, all_leaves), (with_selected, leaves))
        )
        self.flags_matter = reached_by_all != reached_by_selected
        return None if self.flags_matter else with_selected

    def verify_batching(self, objective: Objective, totals: Totals) -> None:
        """Check that the loss of two batches evaluated as one agrees with the weights of the batches.

        The result is stored in `batching` and `unverified`. The check is made once, at the end of the first pass.
        """
        pair, self._pair = self._pair, None
        if self.batching is not None or pair is None:
            self.batching = self.batching or ""
            return
        self.batching = ""
        if random_modules(objective.modules) or batchwise_modules(objective.modules):  # they cause other warnings
            return
        with objective.generators.private(objective.devices):
            contradiction = _compare_as_one(objective, totals, pair)
        self.batching, self.unverified = contradiction or "", contradiction is None

    def warn_once(self, objective: Objective, batches: int, *, aloud: bool = True) -> None:
        """Warn if the matrix may differ from the matrix that the user expects.

        Each kind of warning is issued at most once.

        Parameters
        ----------
        objective : Objective
        batches : int
            Number of batches in the data.
        aloud : bool
            If False, mark the warnings as issued without issuing them.
        """
        lower = any(value.dtype != torch.float64 for value in objective.params.values())
        found = _mode_cautions(objective.modules, batches, objective.autocast() if lower else None)
        found |= self._other_cautions(objective)
        if aloud and (new := [found[kind] for kind in found if kind not in self.warned]):
            warn_user("; ".join(new))
        self.warned.update(found)

    def _other_cautions(self, objective: Objective) -> dict[str, str]:
        """Return a dict of warning messages about weights, curvature and data, by kind of warning."""
        found = {}
        if self.batching:
            found["weights of batches"] = f"{self.batching}; {BATCHING_REMEDY}"
        if self.curved is False and objective.assumes_curvature():
            found["curvature"] = ZERO_MATRIX
        if subset := random_subset(objective.data):
            found["data"] = (
                f"data {subset}: every pass sees different examples, so a product, the gradient and the diagonal may "
                "belong to different data; pass a DataLoader with shuffle=False, or without drop_last=True"
            )
        return found


def reached(outputs: Iterable[Tensor], inputs: Mapping[str, Sequence[Tensor]]) -> set[str]:
    """Return the names of the `inputs` whose tensors occur in the autograd graph of `outputs`."""
    wanted = {
        get_gradient_edge(tensor).node: name
        for name, tensors in inputs.items()
        for tensor in tensors
        if tensor.requires_grad
    }
    roots = [get_gradient_edge(output).node for output in outputs if output.requires_grad]
    return {wanted[node] for node in nodes(roots) if node in wanted}


def _agree(a: Tensor, b: Tensor) -> bool:
    """Return True if two tensors are equal up to rounding. Tensors without a floating-point dtype are not compared."""
    if not a.is_floating_point():
        return True
    a, b = a.detach(), b.detach()
    return torch.allclose(a, b, torch.finfo(a.dtype).eps ** (2 / 3), equal_nan=True)


class BatchPair:
    """Finds the pairs of batches that differ most in size or in the number of valid integer targets."""

    def __init__(self) -> None:
        self._first: tuple[int, Any] | None = None
        self._last: tuple[int, Any] | None = None
        # For each kind of count, the batches with the smallest and the largest count.
        self._extremes: dict[int, list[tuple[float, int, Any]]] = {}

    def see(self, index: int, batch: Any) -> None:
        """Update the pairs with a new batch."""
        self._first, self._last = self._first or (index, batch), (index, batch)
        for number, count in enumerate(_counts(batch)):
            extremes = self._extremes.setdefault(number, [(count, index, batch)] * 2)
            if count < extremes[0][0]:
                extremes[0] = count, index, batch
            if count > extremes[1][0]:
                extremes[1] = count, index, batch

    def candidates(self) -> Iterator[tuple[tuple[int, Any], tuple[int, Any]]]:
        """Yield pairs of ``(index, batch)``, starting with the batches that differ most.

        Nothing is yielded if there is only one batch.
        """
        if self._first is None or self._last is None or self._first[0] == self._last[0]:
            return
        for low, high in sorted(self._extremes.values(), key=lambda ends: -(ends[1][0] + 1) / (ends[0][0] + 1)):
            if low[0] < high[0]:
                first, second = sorted((low[1:], high[1:]), key=lambda numbered: numbered[0])
                yield first, second
        yield self._first, self._last


def _counts(batch: Any) -> list[float]:
    """Return three counts for a batch: the number of examples, of nonnegative integers and of nonzero integers.

    Padding is often marked by a negative class index (such as -100) or by 0. The number of nonnegative integers and the
    number of nonzero integers therefore estimate how many targets are valid.
    """
    integers = [leaf for leaf in leaves_of(batch) if leaf.dtype in _INTEGERS and leaf.layout == torch.strided]
    parts = batch if isinstance(batch, list | tuple) else [batch]
    return [
        batch_size(*parts) or 0,
        sum(int((leaf >= 0).sum()) for leaf in integers),
        sum(int((leaf != 0).sum()) for leaf in integers),
    ]


def random_subset(data: Any) -> str:
    """Describe how a data loader draws different examples in every pass.

    Return an empty string if every pass contains the same examples, or if `data` is not a ``DataLoader``.
    """
    if not isinstance(data, DataLoader):
        return ""
    batches = data.batch_sampler if isinstance(data.batch_sampler, BatchSampler) else None
    sampler: Any = data.sampler if batches is None else getattr(batches, "sampler", None)
    if isinstance(sampler, WeightedRandomSampler):
        return "draws examples by their weights"
    if isinstance(sampler, RandomSampler) and sampler.replacement:
        return "draws examples with replacement"
    if not isinstance(sampler, RandomSampler | SubsetRandomSampler):
        return ""
    count = len(sampler)
    if isinstance(sampler, RandomSampler) and count % len(sampler.data_source):
        return f"draws {count:,} of {len(sampler.data_source):,} examples"
    # These attributes are missing if a subclass of BatchSampler does not call BatchSampler.__init__.
    drops, size = (getattr(batches, name, 0) for name in ("drop_last", "batch_size"))
    left = count % size if drops and size else 0
    return f"shuffles, and drops {left} of {count:,} examples with the last batch" if left else ""


def _compare_as_one(objective: Objective, totals: Totals, pair: BatchPair) -> str | None:
    """Describe how the loss of two batches evaluated as one contradicts the weights of the batches.

    Return an empty string if there is no contradiction. Return None if no two batches can be compared. Possible reasons
    are that batches cannot be joined, that the model does not accept the size of the joined batch, or that all batches
    are too similar.
    """
    for (index, first), (other, second) in pair.candidates():
        with contextlib.suppress(Exception):
            parts = [to_device(batch, objective.device) for batch in (first, second)]
            contradiction = _contradiction(objective, totals, (index, other), (*parts, joined(parts)))
            if contradiction is not None:
                return f"batches {index} and {other}: {contradiction}" if contradiction else ""
    return None


def _contradiction(
    objective: Objective, totals: Totals, numbers: tuple[int, int], batches: tuple[Any, Any, Any]
) -> str | None:
    """Compare the losses of two batches with the loss of the joined batch. The joined batch is the last of `batches`.

    Return a description of a contradiction, or an empty string if there is none. Return None if the comparison is
    inconclusive.
    """
    weights = [totals.weights[number] for number in numbers]
    both = objective.evaluate(objective.leaves(()), numbers[0], batches[2]).value
    losses = [totals.losses[number] / weight for number, weight in zip(numbers, weights, strict=True)]
    losses.append(float(both))
    rounding, scale = objective.epsilon(both) ** (2 / 3), sum(map(abs, losses))
    if not math.isfinite(scale):
        return None
    shares = None if objective.reduction == "sum" else weights
    decisive = shares is None or abs(losses[0] - losses[1]) > _ALIKE * scale
    if decisive and not _disagreement(losses, shares, rounding * scale):
        return ""
    # Compare gradients, because the matrix is the derivative of the gradient. A comparison of losses is not enough: the
    # losses may consist of rounding errors only, or disagree only by a constant.
    gradients = [_gradient(objective, batch) for batch in batches]
    direction = gradients[0] - gradients[1] if shares else gradients[2]
    size, scale = float(direction.norm()), sum(float(gradient.norm()) for gradient in gradients)
    if not size > _ALIKE * scale:  # the gradients are almost equal, so any weights give the same mean
        return None
    along = [float(gradient @ direction) / size for gradient in gradients]
    return _disagreement(along, shares, rounding * scale)


def _gradient(objective: Objective, batch: Any) -> Tensor:
    leaves = objective.leaves(objective.params)
    parts = objective.evaluate(leaves, 0, batch).gradient(list(leaves.values()))
    pairs = zip(parts, leaves.values(), strict=True)
    flat = [torch.zeros_like(leaf) if part is None else part for part, leaf in pairs]
    return torch.cat([part.detach().reshape(-1).to(objective.device) for part in flat])


def _disagreement(losses: Sequence[float], weights: Sequence[float] | None, limit: float) -> str:
    """Describe how the loss of two batches evaluated as one differs from the value that the weights imply.

    Return an empty string if the difference is at most `limit`.

    Parameters
    ----------
    losses : three floats
        The losses of the first batch, the second batch and the joined batch, or the derivatives of these losses in one
        direction.
    weights : two floats, or None
        The weights of the two batches if the loss is a mean. None if the loss is a sum.
    limit : float
        The largest difference that is attributed to rounding.
    """
    first, second, both = losses
    if weights is None:
        if abs(both - first - second) <= limit:
            return ""
        return f"evaluated as one batch, they have {both / (first + second):.4g} times the sum of their losses"
    expected = (weights[0] * first + weights[1] * second) / (weights[0] + weights[1])
    if abs(both - expected) <= limit:
        return ""
    if abs(both - first - second) <= limit:
        return "evaluated as one batch, they have the sum of their losses, not the mean"
    share = (both - second) / (first - second)
    if not 0 < share < 1:
        return "evaluated as one batch, they have a loss that is not a weighted mean of the two losses"
    factor = (1 - share) / share * weights[0] / weights[1]
    return f"evaluated as one batch, the second one counts {factor:.4g} times as much as its weight says"


def random_modules(modules: Sequence[nn.Module]) -> list[str]:
    """Return a list with a description of each module in training mode that applies dropout.

    Layers with internal dropout, such as ``nn.MultiheadAttention``, are included.
    """
    rates = ((name, part, _drop_rate(part)) for name, part in _named(modules) if part.training)
    return [f"{name!r} ({type(part).__name__}, p = {rate:g})" for name, part, rate in rates if rate]


def _drop_rate(part: nn.Module) -> float:
    """Return the dropout probability of a module itself, ignoring its submodules. Return 0 if it has no dropout."""
    rate: Any = 0.0
    if isinstance(part, nn.MultiheadAttention) or (isinstance(part, nn.RNNBase) and part.num_layers > 1):
        rate = part.dropout
    elif isinstance(part, _DropoutNd) or "Drop" in type(part).__name__ or "StochasticDepth" in type(part).__name__:
        rate = next((vars(part)[name] for name in ("p", "drop_prob", "drop_p", "rate") if name in vars(part)), 0.0)
    return float(rate) if isinstance(rate, int | float) else 0.0


def batchwise_modules(modules: Sequence[nn.Module]) -> list[str]:
    """Return a list with a description of each batch normalization layer that uses statistics of the batch."""
    found = ((name, part) for name, part in _named(modules) if isinstance(part, _BatchNorm))
    return [f"{name!r} ({type(part).__name__})" for name, part in found if part.training or part.running_mean is None]


def _named(modules: Sequence[nn.Module]) -> Iterator[tuple[str, nn.Module]]:
    for module in modules:
        yield from module.named_modules()


def _mode_cautions(modules: Sequence[nn.Module], batches: int, autocast: torch.dtype | None) -> dict[str, str]:
    """Return a dict of warning messages about modules and autocast, by kind of warning.

    Parameters
    ----------
    modules : sequence of nn.Module
    batches : int
        Number of batches in the data.
    autocast : torch.dtype or None
        The autocast dtype. None if autocast is disabled or does not lower the precision.
    """
    found = {}
    if random := random_modules(modules):
        found["dropout"] = (
            f"dropout is active in {listed(random)}: a product belongs to one draw of the masks, and the next pass "
            "over the data draws new ones; call model.eval()"
        )
    if batches > 1 and (batchwise := batchwise_modules(modules)):
        found["batch normalisation"] = (
            f"{listed(batchwise)} normalizes each of the {batches} batches by its own statistics: the matrix depends "
            "on how the data is divided into batches, and is not that of the whole data set as one batch; call "
            "model.eval(), or pass one batch"
        )
    if autocast is not None:
        found["autocast"] = (
            f"torch.autocast is enabled: products are computed in {str(autocast).removeprefix('torch.')}, and their "
            f"relative errors are about its epsilon, {torch.finfo(autocast).eps:.1e}; take products outside autocast"
        )
    return found


def suspects(modules: Sequence[nn.Module]) -> str:
    """Return a text that lists likely causes of a loss that changes between passes, with remedies."""
    random = random_modules(modules)
    if random:
        return f"dropout is active in {listed(random)}: call model.eval()"
    return (
        "check for dropout and batch normalization in training mode (call model.eval()), random augmentation in the "
        "data, and shuffling with drop_last=True; if a function reads something that has changed, make a new operator"
    )


def listed(names: Sequence[str], most: int = 3) -> str:
    """Return a text with the first `most` names and the number of the remaining names."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
