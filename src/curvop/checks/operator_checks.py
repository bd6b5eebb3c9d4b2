"""A check of an operator, cheap enough to come before every long study."""

from __future__ import annotations

import dataclasses
import math
import time
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.sparse.linalg import LinearOperator
from tqdm import tqdm

from curvop.checks.check_report import NOT_APPLICABLE, OK, WARNING, WRONG, CheckReport, Finding
from curvop.checks.dense_check import rounding
from curvop.checks.model_checks import (
    computed_parts,
    magnitude,
    measured,
    model_findings,
    past_journals,
    ratio,
    served_findings,
    served_parts,
    symmetry_finding,
    warned_as_before,
    zero_block,
)
from curvop.operators.engine_operator import UNTRUSTED, EngineLinearOperator
from curvop.operators.progress import step_bar
from curvop.operators.validation import random_generator, whole_number

__all__ = ["check", "route_findings"]

Array = NDArray[Any]


def check(
    A: LinearOperator,
    *,
    num_probes: int = 2,
    rng: int | np.random.Generator | None = None,
    progress: bool = True,
) -> CheckReport:
    """Check an operator before something long is done with it, and say what to do about each thing that is found.

    Of any operator: that products repeat, are linear, agree between ``matvec`` and ``matmat``, that the adjoint is the
    adjoint, and symmetry; where a square one has no adjoint and is not symmetric, it warns. Of this package's, also
    where they are wrapped (damped, journaled, a submatrix, a sum): the product in forward mode; the product and the
    gradient by your own code, which is called as you call it, with other values in your parameters, so that what the
    operator does not see of it (a loss that reads the parameters elsewhere, wrong weights of batches) shows itself;
    randomness in the loss, data that change from pass to pass, modules in training mode, parameters that the loss does
    not reach, blocks that are zero up to rounding, a Gauss-Newton matrix whose loss is linear. Where no other route can
    be compared, it warns. Of one that several processes serve, the precision besides the algebra. Afterwards the model,
    its parameters and what the operator keeps are as they were.

    It takes ``3 + 2 num_probes`` products of a symmetric operator of this package, 7 by default; 2 `num_probes` more of
    a square one that is not known to be its own adjoint, and one more of an operator that is wrapped. Besides, it reads
    the data five times or more, for a gradient and a loss of the operator's and for the other routes. All of it takes
    some twenty to fifty gradients, most of them if the model has kinks (ReLU). Products of a journal are recorded as
    any others.

    What is found is measured by the epsilon of the coarsest numbers that a product is computed in: of the model's
    parameters and its loss, of autocast, of a GPU's TF32, of the vectors. Up to its 2/3 power (4e-11 in float64, 2e-5
    in float32) it is rounding; above its square root (1e-8, 3e-4) it is wrong; in between it is a warning.

    Parameters
    ----------
    A : LinearOperator, shape (M, N)
        Real or complex, square or not.
    num_probes : int
        Random vectors on either side.
    rng : int or numpy.random.Generator, optional
        What they are drawn from.
    progress : bool
        Whether to show a bar, where it takes more than half a second.

    Returns
    -------
    CheckReport
        Prints as a table; ``ok`` where nothing is wrong.

    Raises
    ------
    TypeError, ValueError
        Where `A` is no operator, `num_probes` is less than 1, or the problem behind `A` cannot be evaluated at all.
        What a product raises because it cannot be trusted is a finding.

    Examples
    --------
    >>> import torch
    >>> from curvop import HessianLinearOperator, check
    >>> model = torch.nn.Linear(3, 2, dtype=torch.float64)
    >>> data = [(torch.ones(5, 3, dtype=torch.float64), torch.zeros(5, 2, dtype=torch.float64))]
    >>> report = check(HessianLinearOperator(model, torch.nn.MSELoss(), dict(model.named_parameters()), data))
    >>> report.verdict, report.products
    ('sound: 16 checks passed', 7)
    """
    if not isinstance(A, LinearOperator):
        raise TypeError(
            f"A is a {type(A).__name__}, not a LinearOperator: wrap it, scipy.sparse.linalg.aslinearoperator(A)"
        )
    if len(A.shape) != 2:
        raise ValueError(f"A has shape {A.shape}: check one operator of the stack")
    num_probes, rng = whole_number("num_probes", num_probes, 1), random_generator(rng)
    begun = time.perf_counter()
    with (
        step_bar("check", progress) as bar,
        warned_as_before(computed_parts(A)),
        past_journals(A),
        warnings.catch_warnings(record=True) as caught,
    ):
        algebra = _Algebra(A, num_probes, rng, bar)
        warnings.simplefilter("ignore")  # that libraries get older is no concern of this check
        warnings.simplefilter("always", RuntimeWarning)
        warnings.simplefilter("always", UserWarning)
        findings = list(algebra.findings()) if all(A.shape) else [_empty(A)]
    messages = dict.fromkeys(str(one.message) for one in caught)
    findings += [Finding("warnings", WARNING, text) for text in messages]
    kind = f"{type(A).__name__.lstrip('_')}, {A.shape[0]:,} by {A.shape[1]:,}, {A.dtype}"
    return CheckReport(kind, tuple(findings), algebra.products, time.perf_counter() - begun)


def _empty(A: LinearOperator) -> Finding:
    return Finding("products", NOT_APPLICABLE, f"A has shape {A.shape}, and no entries")


class _Algebra:
    """The products of a check, and what they tell."""

    def __init__(self, A: LinearOperator, num_probes: int, rng: np.random.Generator, bar: tqdm[Any]) -> None:
        self._A, self._num_probes, self._rng, self._bar = A, num_probes, rng, bar
        inexact = A.dtype is not None and A.dtype.kind in "fc"
        self._dtype = A.dtype if inexact else np.dtype(np.float64)
        self._eps = float(np.finfo(self._dtype).eps)
        self._known: tuple[Array, Array] | None = None
        self._compared: dict[EngineLinearOperator, tuple[Array, Array, list[Any]]] = {}
        self._bases: list[EngineLinearOperator] = []
        self._zero = False
        self.products = 0

    def findings(self) -> Iterator[Finding]:
        """Yield all of them."""
        bases, random, told = computed_parts(self._A), False, ""
        for base in bases:
            try:
                seen = base.inspect()
            except UNTRUSTED as error:
                random, told = True, str(error)
                yield Finding("order of the data", WRONG, told, remedy="make every pass yield the same batches")
                continue
            self._eps = max(self._eps, seen.eps)
            found = list(model_findings(seen))
            random |= any(one.name == "randomness" and one.status == WRONG for one in found)
            yield from found
        for served in served_parts(self._A):
            self._eps = max(self._eps, served.epsilon)
        if not bases:
            yield from served_findings(served_parts(self._A))
        self._bases = [] if random else bases
        try:
            yield from self._algebra()
            for base in bases:
                yield from self._routes(base, random)
        except UNTRUSTED as error:
            if str(error) != told:
                yield Finding("products", WRONG, str(error), remedy="make the product repeatable, and finite")

    def _probes(self, size: int) -> Array:
        X = self._rng.standard_normal((size, self._num_probes))
        if self._dtype.kind == "c":
            X = X + 1j * self._rng.standard_normal(X.shape)
        probes: Array = (X / np.linalg.norm(X, axis=0)).astype(self._dtype)
        return probes

    def _product(self, A: LinearOperator, X: Array) -> Array:
        product: Array = np.asarray(A.matvec(X) if X.ndim == 1 else A.matmat(X))
        self._count(1 if X.ndim == 1 else X.shape[1])
        return product

    def _count(self, products: int) -> None:
        self.products += products
        self._bar.update(products)

    def _algebra(self) -> Iterator[Finding]:
        A = self._A
        X, U = self._probes(A.shape[1]), self._probes(A.shape[0])
        AX = self._product(A, X)
        if not np.isfinite(AX).all():
            yield Finding("finite", WRONG, "a product holds NaN or infinity", remedy="mend it: solvers do not look")
            return
        yield Finding("finite", OK, "all entries")
        single = self._product(A, X[:, 0])
        self._known = X[:, 0], single
        again, weights = self._product(A, X[:, 0]), self._rng.standard_normal(self._num_probes).astype(self._dtype)
        weights *= 3 / np.linalg.norm(weights)
        combined = self._product(A, X @ weights)
        # Of all products, so that none is measured by one that is zero by mistake.
        size = max(magnitude(AX) / math.sqrt(AX.shape[1]), magnitude(single), magnitude(again), magnitude(combined) / 3)
        parts = [magnitude(single - AX[:, 0]), magnitude(again - single), magnitude(combined - AX @ weights) / 3]
        # Where all that is left of a block are the rounding errors of what cancels, they are measured by its size.
        if self._is_noise(max(parts), size) and size <= rounding(self._eps) * (scale := self._scale()):
            yield zero_block(size, scale)
            self._zero, size = True, scale
        noise = [ratio(part, size) for part in parts]
        yield self._measured(
            "matvec and matmat", noise[0], "they differ", "one of the two is wrong, or products draw random numbers"
        )
        yield self._measured(
            "repeatability", noise[1], "the same product differs when it is made again", "look for random numbers"
        )
        yield self._measured(
            "linearity",
            noise[2],
            "A (X c) is not (A X) c",
            "a product that is not linear is no product with a matrix: look at what it does to its vector",
        )
        floor = max(noise)
        yield self._measured(
            "noise floor",
            floor,
            f"{floor / self._eps:.3g} times epsilon, {self._eps:.1e}",
            "no residual gets below it: pass solvers a tolerance above, or compute in float64 (model.double())",
        )
        yield from self._mirror(X, AX, U, size, floor)

    def _mirror(self, X: Array, AX: Array, U: Array, size: float, noise: float) -> Iterator[Finding]:
        """Compare ``u' (A x)`` with ``(A' u)' x`` and, where `A` is square, with ``(A u)' x``."""
        A, square, mixed = self._A, self._A.shape[0] == self._A.shape[1], U.conj().T @ AX
        own, alone = square and A.H is A, False

        def defect(products: Array) -> float:
            # For u of norm 1 in a random direction, sqrt(M) |u' d| is |d| on the average of squares.
            difference = mixed - products.conj().T @ X
            return ratio(math.sqrt(len(U) / difference.size) * magnitude(difference), size)

        if own:
            yield Finding("adjoint", NOT_APPLICABLE, "A is its own adjoint: see symmetry")
        else:
            try:
                pulled = np.stack([np.asarray(A.rmatvec(u)) for u in U.T], axis=1)
                self._count(U.shape[1])
            except NotImplementedError:
                alone = True
                yield Finding("adjoint", NOT_APPLICABLE, "A has none: it was made without rmatvec")
            else:
                yield self._measured(
                    "adjoint",
                    defect(pulled),
                    "u' (A x) is not (A' u)' x",
                    "rmatvec is not that of this matrix: svds, lsmr and lsqr go astray",
                )
        if not square:
            yield Finding("symmetry", NOT_APPLICABLE, "A is not square")
            return
        yield symmetry_finding(defect(self._product(A, U)), self._eps, noise, own, alone)

    def _routes(self, base: EngineLinearOperator, random: bool) -> Iterator[Finding]:
        if random:
            yield Finding("other routes", NOT_APPLICABLE, "the loss is random: there is nothing to compare")
            return
        vector, product, routes = self._compare(base)
        scale, size = max(route.scale for route in routes), magnitude(product)
        zero = self._zero and base is self._A
        if base is not self._A and size <= rounding(self._eps) * scale:
            tripled = self._product(base, 3 * vector)
            zero = self._is_noise(magnitude(tripled - 3 * product), size)
            if zero and not self._zero:
                yield zero_block(size, scale)
        gradient = base._gradient()[0].cpu().numpy()
        yield from route_findings(routes, product, gradient, self._eps, scale if zero else 0.0)

    def _compare(self, base: EngineLinearOperator) -> tuple[Array, Array, list[Any]]:
        """Return a vector of norm 1, the product with it, and those by other routes."""
        if base not in self._compared:
            if base is self._A and self._known is not None:
                vector, product = self._known
            else:
                vector = self._rng.standard_normal(base.shape[1])
                vector = (vector / np.linalg.norm(vector)).astype(base.dtype)
                product = self._product(base, vector)
            self._compared[base] = vector, product, base.other_routes(vector)
        return self._compared[base]

    def _scale(self) -> float:
        """Return the norm of what the rounding errors of a block's products are a part of."""
        return max((route.scale for base in self._bases for route in self._compare(base)[2]), default=0.0)

    def _is_noise(self, part: float, size: float) -> bool:
        return part > rounding(self._eps) * size

    def _measured(self, name: str, value: float, what: str, remedy: str) -> Finding:
        return measured(name, value, self._eps, what, remedy)


# Findings of a check on products by other routes, and on the gradient.

# Wrong formulas that were met changed a product in its third digit or before it.
_INCONCLUSIVE = 1e-3
# No difference quotient is held to more than its step, relative to the parameters.
_STEP = float(np.finfo(np.float64).eps ** (1 / 3))

_WRONG_DERIVATIVE = (
    "an operation of the model or the loss has a wrong derivative, or holds constant what depends on the parameters "
    "(no_grad(), as of spectral_norm in training mode): check blocks, A.block(name), to find the layer, and compare "
    "smaller models with curvop.functorch_hessian"
)
_OTHER_CODE = (
    "the matrix is not that of what your code computes: look for parameters that the loss reaches other than through "
    "those it is given, for buffers that the model writes to, for weights of the batches (batch_weight=) that are not "
    "what the loss divides by, and for a loss that couples the examples"
)
_HELD_STILL = (
    "your code holds constant what depends on the parameters (detach(), no_grad()), which is no error if it is meant; "
    "or a torch.autograd.Function has a wrong backward; or kinks (ReLU) lie within a step"
)
_LONG_STEPS = (
    "forward mode agrees with A: it may be kinks (ReLU) within a step, which is long where code computes in float32"
)
_NO_ROUTE = (
    "check a small copy of the problem where a route applies: with smooth activations in place of ReLU, with "
    "setup_context and jvp in each autograd.Function, without dtypes that the code names"
)


def route_findings(
    routes: Sequence[Any], product: NDArray[Any], gradient: NDArray[Any], eps: float, scale: float = 0.0
) -> Iterator[Finding]:
    """Yield the comparisons of a product with those by other routes; a warning where none of them can be compared.

    Differences are relative to the product, or to `scale` where that is larger.
    """
    gradients = [_gradient_finding(route, gradient, eps) for route in routes if route.name == "gradient"]
    calls = all(one.status == OK for one in gradients)  # whether it is called as you call it, so far
    products = [route for route in routes if route.name != "gradient"]
    found = [_compared(route, product, eps, scale) for route in products]
    status = {one.name: one.status for one in found}
    for one, route in zip(found, products, strict=True):
        if one.status != WRONG:
            yield one
        elif one.name != "finite differences" and status.get("finite differences") == OK:
            text = f"{one.text}, but finite differences of your own code agree with A"
            remedy = "torch's backward and its forward mode differ for an operation of the model or the loss"
            yield dataclasses.replace(one, status=WARNING, text=text, remedy=remedy)
        elif one.name == "finite differences" and status.get("forward mode") == OK == status.get("double backward"):
            yield dataclasses.replace(one, status=WARNING, remedy=_HELD_STILL)
        elif one.name == "finite differences" and status.get("forward mode") == OK and not route.own.fine and calls:
            yield dataclasses.replace(one, status=WARNING, remedy=_LONG_STEPS)
        elif one.name == "double backward" or (route.own and (status.get("forward mode") == OK or not calls)):
            yield dataclasses.replace(one, remedy=_OTHER_CODE)
        else:
            yield one
    yield from gradients
    if any(route.own is not None and route.own.linear for route in products) and not product.any():
        yield _linear(any(route.own is not None and route.own.known for route in products))
    if all(one.status == NOT_APPLICABLE for one in found if one.name != "double backward"):  # whose formulas are A's
        text = "the product was compared with none: a derivative that is wrong would go unnoticed"
        yield Finding("independent route", WARNING, text, remedy=_NO_ROUTE)


def _gradient_finding(route: Any, gradient: NDArray[Any], eps: float) -> Finding:
    """Compare the gradient with that of the user's own code; what cancels in both leaves rounding errors."""
    own = route.products[0].cpu().numpy()
    value = ratio(magnitude(gradient - own), max(magnitude(own), route.own.size))
    finding = measured(route.name, value, eps, "it differs from that of your own code", _OTHER_CODE, eps**0.5)
    return dataclasses.replace(finding, text="; ".join(filter(None, (finding.text, _how(route)))))


def _how(route: Any) -> str:
    """Say how the user's code was called."""
    if route.own is None:
        return ""
    return "of your own code" + (", all data as one batch" if route.own.whole else "")


def _linear(known: bool) -> Finding:
    """Return the finding that a Gauss-Newton matrix is zero because of its loss, one of torch's if it is `known`."""
    if known:
        text = "the matrix is zero: the second derivative of this loss by the prediction is"
        remedy = "use HessianLinearOperator, or a loss that curves (CrossEntropyLoss of logits in place of NLLLoss)"
        return Finding("zero matrix", WARNING, text, remedy=remedy)
    text = "the matrix is zero: the loss is linear in the prediction, as where the model returns its own loss"
    remedy = "use HessianLinearOperator, or return logits from the model and let loss_function compute the loss of them"
    return Finding("zero matrix", WRONG, text, remedy=remedy)


def _compared(route: Any, product: NDArray[Any], eps: float, scale: float) -> Finding:
    if not route.products:
        return Finding(route.name, NOT_APPLICABLE, route.reason)
    first, *others = [other.cpu().numpy() for other in route.products]
    # Of the product by the shorter step; the longer one has less rounding, and agrees where no kink is near.
    shorter = others[0] if others else first
    size = max(magnitude(shorter), scale)
    error = route.error * ratio(magnitude(shorter), size)
    values = [ratio(magnitude(product - other), size) for other in (first, *others)]
    value, limit = min(values), _STEP if others else 0.0
    if limit and value > max(limit, rounding(eps)):  # with none that it agrees with by no accident
        value = min(values[:2])
        if error > _INCONCLUSIVE:
            text = f"the steps differ by {error:.1e} between themselves, as at the kinks of ReLU: nothing can be said"
            return Finding(route.name, NOT_APPLICABLE, text)
        limit += 4 * error
        if error > _STEP and limit < value < 100 * error:  # a smooth function leaves less
            text = f"kinks, as of ReLU, lie within a step: it agrees to {value:.1e}, and no more can be said"
            return Finding(route.name, NOT_APPLICABLE, text)
        if value > limit and route.own is not None and route.own.holds:
            text = "autograd's derivative of your code is not its difference quotient: nothing can be said of A's"
            return Finding(route.name, WARNING, text, value, limit, _HELD_STILL)
    finding = measured(route.name, value, eps, "A's product differs from it", _WRONG_DERIVATIVE, limit)
    return dataclasses.replace(finding, text="; ".join(filter(None, (finding.text, _how(route)))))
