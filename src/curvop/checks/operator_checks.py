"""Check that an operator is linear and consistent, and that its products are correct.

`check` compares products of the operator with each other (repeatability, linearity, adjoint, symmetry). For operators
of this package, `route_findings` also compares a product with the same product computed in other ways: in forward mode,
by double backward, and by finite differences. `curvop.checks.model_checks` checks the model, the loss and the data.
"""

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
from curvop.checks.compare import compare
from curvop.checks.dense_check import rounding_tolerance
from curvop.checks.model_checks import (
    bypassed_journals,
    distributed_findings,
    distributed_parts,
    engine_parts,
    magnitude,
    measured_finding,
    model_findings,
    ratio,
    restored_warnings,
    symmetry_finding,
    zero_block_finding,
)
from curvop.operators.engine_operator import UNTRUSTED, EngineLinearOperator
from curvop.operators.keywords import named_keywords
from curvop.operators.kfac import KFACLinearOperator
from curvop.operators.progress import step_bar
from curvop.operators.validation import integer, random_generator
from curvop.spectrum.lanczos import product_precision

__all__ = ["check", "route_findings"]

Array = NDArray[Any]

# If finite differences with two step sizes give products whose relative difference exceeds this limit, a comparison is
# inconclusive. All wrong formulas seen so far changed a product by more than this limit.
_INCONCLUSIVE = 1e-3
# Number of products with each block to compare an approximation with the exact matrix.
_COMPARED = 8
# Step of a difference quotient, relative to the norm of the parameters. The relative error of the quotient is
# roughly as large as the step, or larger.
_STEP = float(np.finfo(np.float64).eps ** (1 / 3))

_WRONG_DERIVATIVE = (
    "an operation of the model or the loss has a wrong derivative, or treats a value that depends on the parameters as "
    "a constant (no_grad(), for example in spectral_norm in training mode): check blocks, A.block(name), to find the "
    "layer, and compare smaller models with curvop.functorch_hessian"
)
_OTHER_CODE = (
    "the matrix is not the one that your code defines: look for parameters that the loss does not get as arguments, "
    "for buffers that the model writes to, for batch weights (batch_weight=) that differ from the divisor of the loss, "
    "and for a loss that couples the examples"
)
_TREATED_AS_CONSTANT = (
    "your code treats a value that depends on the parameters as a constant (detach(), no_grad()), which is fine if you "
    "intend it; or a torch.autograd.Function has a wrong backward; or kinks (ReLU) lie within a step"
)
_LONG_STEPS = (
    "forward mode agrees with A: the cause may be kinks (ReLU) within a step, which is long if code computes in float32"
)
_NO_ROUTE = (
    "check a small copy of the problem that can be compared: use smooth activations instead of ReLU, define "
    "setup_context and jvp in each autograd.Function, and do not fix dtypes in the code"
)


@named_keywords
def check(
    A: LinearOperator,
    *,
    num_probes: int = 2,
    rng: int | np.random.Generator | None = None,
    progress: bool = True,
) -> CheckReport:
    """Check an operator for errors before using it in a long computation.

    Run the check once per problem, before `curvop.spectrum.eigsh`, a spectral density or a linear solve. For a Hessian
    with up to a few thousand rows, a comparison with `curvop.examples.functorch.functorch_hessian` is stricter, because
    it covers all entries.

    For any operator, the check tests that products are finite, repeatable and linear. The check also tests that
    ``matvec`` and ``matmat`` agree, and that ``rmatvec`` is the adjoint of ``matvec``. Square operators are tested for
    symmetry. An operator that is not symmetric and has no adjoint gets a warning.

    For an operator of this package, the check also inspects the model, the loss and the data. It then compares a
    product and the gradient with the same results, computed in other ways. If `A` is a sum, a submatrix, or a damped or
    journaled operator, the operators that it is composed of are checked in the same way. The check finds

    - randomness in the loss, active dropout, batch normalization in training mode, and data that change between passes;
    - wrong derivatives, by comparison with forward mode and with finite differences of your code;
    - differences between the operator and your code, such as wrong batch weights, or a loss that reads the parameters
      from somewhere else (to find them, the check calls your model and loss directly, but with other values of the
      parameters);
    - parameters that the loss does not depend on, blocks that are zero up to rounding, and Gauss-Newton matrices that
      are zero because the loss is linear in the prediction.

    If the product cannot be computed in another way for comparison, the report contains a warning.

    For a `curvop.KFACLinearOperator` or `curvop.EKFACLinearOperator`, the check reports the error of the approximation,
    which `curvop.compare` estimates. The model and the loss are those of the exact matrix, which is checked, too.

    For a distributed operator, the check covers only the algebra and the precision. Check the operator of each rank as
    well.

    After the check, the model, its parameters and the operator are in the same state as before.

    Parameters
    ----------
    A : LinearOperator, shape (M, N)
        The operator, real or complex. It need not be square.
    num_probes : int, default: 2
        Number of random vectors to which the operator and its adjoint are each applied.
    rng : int or numpy.random.Generator, optional
        Seed or generator for the random vectors. By default, the vectors differ in each run.
    progress : bool, default: True
        Whether to show a progress bar if the check takes more than half a second.

    Returns
    -------
    CheckReport
        The findings. Print the report to see a table. The attribute ``ok`` of the report is True if nothing is wrong.

    Raises
    ------
    TypeError
        If `A` is not a ``LinearOperator``, or if the model or the loss of `A` cannot be evaluated.
    ValueError
        If `A` is a stack of operators, if `num_probes` is not an integer >= 1, or if the model or the loss of `A`
        cannot be evaluated. Errors that mean that products are wrong or random (NaN, a random loss) become findings and
        are not raised.

    See Also
    --------
    curvop.examples.functorch.functorch_hessian : Dense Hessian by an independent implementation.
    curvop.spectrum.certify : Error bounds for computed eigenvalues.

    Notes
    -----
    The check takes ``3 + 2 * num_probes`` products for a symmetric operator of this package. For a square operator that
    is not its own adjoint, the check takes ``2 * num_probes`` more products. For an operator that wraps another
    operator, the check takes one more product. In addition, the check passes over the data five or more times. It
    evaluates the loss and the gradient, and computes products in other ways. In total, the check costs as much as about
    20 to 50 gradients. The cost is highest for models with kinks (ReLU). A journal neither supplies nor records the
    products of the check.

    The check compares relative errors with epsilon. If a product uses several precisions (those of the parameters, the
    loss, autocast, TF32 on a GPU, and the vectors), epsilon is that of the lowest precision. Errors up to the 2/3 power
    of epsilon (4e-11 in float64, 2e-5 in float32) count as rounding errors. Errors above the square root of epsilon
    (1e-8 in float64, 3e-4 in float32) are wrong. Errors in between are warnings.

    Examples
    --------
    Dropout makes the loss random. The report names the dropout layer and says what to do:

    >>> import torch
    >>> from torch import nn
    >>> from curvop import HessianLinearOperator, check
    >>> _ = torch.manual_seed(0)
    >>> model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Dropout(), nn.Linear(4, 2)).double()
    >>> data = [(torch.randn(20, 3).double(), torch.randint(0, 2, (20,)))]
    >>> H = HessianLinearOperator(model, nn.CrossEntropyLoss(), dict(model.named_parameters()), data)
    >>> report = check(H, rng=0)
    >>> report.verdict
    'not to be trusted: randomness, dropout, products'
    >>> report["dropout"].text, report["dropout"].remedy
    ("active in '2' (Dropout, p = 0.5)", 'call model.eval()')

    In evaluation mode, all checks pass:

    >>> report = check(HessianLinearOperator(model.eval(), nn.CrossEntropyLoss(), dict(model.named_parameters()), data))
    >>> report.verdict, report.products
    ('sound: 16 checks passed', 7)
    """
    if not isinstance(A, LinearOperator):
        raise TypeError(
            f"A is a {type(A).__name__}, not a LinearOperator: wrap it with scipy.sparse.linalg.aslinearoperator(A)"
        )
    if len(A.shape) != 2:
        raise ValueError(f"A has shape {A.shape}: check one operator of the stack")
    num_probes, rng = integer("num_probes", num_probes, 1), random_generator(rng)
    start = time.perf_counter()
    with (
        step_bar("check", progress) as bar,
        restored_warnings(_models_of(A)),
        bypassed_journals(A),
        warnings.catch_warnings(record=True) as caught,
    ):
        checks = _OperatorChecks(A, num_probes, rng, bar)
        # Record the warnings of the model and the operator, but not deprecation warnings of other libraries.
        warnings.simplefilter("ignore")
        warnings.simplefilter("always", RuntimeWarning)
        warnings.simplefilter("always", UserWarning)
        findings = list(checks.findings()) if all(A.shape) else [_empty(A)]
    messages = dict.fromkeys(str(warning.message) for warning in caught)
    findings += [Finding("warnings", WARNING, message) for message in messages]
    title = f"{type(A).__name__.lstrip('_')}, {A.shape[0]:,} by {A.shape[1]:,}, {A.dtype}"
    return CheckReport(title, tuple(findings), checks.products, time.perf_counter() - start)


def route_findings(
    routes: Sequence[Any], product: NDArray[Any], gradient: NDArray[Any], eps: float, scale: float = 0.0
) -> Iterator[Finding]:
    """Compare a product and the gradient of an operator with the same results from other methods ("routes").

    Parameters
    ----------
    routes : sequence of curvop.kernels.reference.Route
        The products computed by other methods, and the gradient computed by the user's code.
    product : ndarray, shape (M,)
        The product computed by the operator.
    gradient : ndarray, shape (P,)
        The gradient computed by the operator.
    eps : float
        Epsilon of the lowest precision that a product uses.
    scale : float
        Differences are divided by the norm of the product, or by `scale` if `scale` is larger.

    Yields
    ------
    Finding
        One finding for each route. There is another finding if the matrix is zero because the loss is linear in the
        prediction. If no independent route could be compared, there is also a warning.
    """
    gradients = [_gradient_finding(route, gradient, eps) for route in routes if route.name == "gradient"]
    gradient_agrees = all(finding.status == OK for finding in gradients)
    product_routes = [route for route in routes if route.name != "gradient"]
    compared = [_product_finding(route, product, eps, scale) for route in product_routes]
    status = {finding.name: finding.status for finding in compared}
    for finding, route in zip(compared, product_routes, strict=True):
        yield _with_likely_cause(finding, route, status, gradient_agrees)
    yield from gradients
    if any(route.own is not None and route.own.linear for route in product_routes) and not product.any():
        yield _zero_matrix(any(route.own is not None and route.own.known for route in product_routes))
    # Double backward is not an independent route, because it uses the same formulas as the operator.
    if all(finding.status == NOT_APPLICABLE for finding in compared if finding.name != "double backward"):
        text = "there was nothing to compare the product with: a wrong derivative would go unnoticed"
        yield Finding("independent route", WARNING, text, remedy=_NO_ROUTE)


def _models_of(A: LinearOperator) -> list[EngineLinearOperator]:
    """Return the operators with a model that `A` is composed of, or the exact matrix of an approximation."""
    return engine_parts(A.exact if isinstance(A, KFACLinearOperator) else A)


def _empty(A: LinearOperator) -> Finding:
    return Finding("products", NOT_APPLICABLE, f"A has shape {A.shape}, and no entries")


class _OperatorChecks:
    """Compute the products of a check and yield the findings."""

    def __init__(self, A: LinearOperator, num_probes: int, rng: np.random.Generator, bar: tqdm[Any]) -> None:
        self._A, self._num_probes, self._rng, self._bar = A, num_probes, rng, bar
        inexact = A.dtype is not None and A.dtype.kind in "fc"
        self._dtype = A.dtype if inexact else np.dtype(np.float64)
        self._eps = max(float(np.finfo(self._dtype).eps), product_precision(A))
        self._first_product: tuple[Array, Array] | None = None
        self._compared: dict[EngineLinearOperator, tuple[Array, Array, list[Any]]] = {}
        self._comparable: list[EngineLinearOperator] = []
        self._is_zero_block = False
        self.products = 0

    def findings(self) -> Iterator[Finding]:
        """Yield findings about the model, then about the algebra of products, then about products by other methods."""
        parts, random, reported = _models_of(self._A), False, ""
        for part in parts:
            try:
                inspection = part.inspect()
            except UNTRUSTED as error:
                random, reported = True, str(error)
                yield Finding("order of the data", WRONG, reported, remedy="make every pass yield the same batches")
                continue
            self._eps = max(self._eps, inspection.eps)
            findings = list(model_findings(inspection))
            random |= any(finding.name == "randomness" and finding.status == WRONG for finding in findings)
            yield from findings
        for served in distributed_parts(self._A):
            self._eps = max(self._eps, served.epsilon)
        if not parts:
            yield from distributed_findings(distributed_parts(self._A))
        self._comparable = [] if random else parts
        try:
            yield from self._algebra()
            if isinstance(self._A, KFACLinearOperator):
                yield self._approximation(self._A)
            for part in parts:
                yield from self._routes(part, random)
        except UNTRUSTED as error:
            if str(error) != reported:
                yield Finding("products", WRONG, str(error), remedy="make products finite and repeatable")

    def _algebra(self) -> Iterator[Finding]:
        A = self._A
        X, U = self._probes(A.shape[1]), self._probes(A.shape[0])
        AX = self._product(A, X)
        if not np.isfinite(AX).all():
            remedy = "find the cause in the operator: most solvers do not check for this"
            yield Finding("finite", WRONG, "a product holds NaN or infinity", remedy=remedy)
            return
        yield Finding("finite", OK, "all entries")
        single = self._product(A, X[:, 0])
        self._first_product = X[:, 0], single
        again, weights = self._product(A, X[:, 0]), self._rng.standard_normal(self._num_probes).astype(self._dtype)
        weights *= 3 / np.linalg.norm(weights)
        combined = self._product(A, X @ weights)
        # Errors are relative to the norm of the largest product, because one of the products may be zero by mistake.
        size = max(magnitude(AX) / math.sqrt(AX.shape[1]), magnitude(single), magnitude(again), magnitude(combined) / 3)
        errors = [magnitude(single - AX[:, 0]), magnitude(again - single), magnitude(combined - AX @ weights) / 3]
        # The products of a block that is zero up to rounding are noise. The errors of such a block are therefore
        # divided by the size of the terms that cancel.
        if self._is_noise(max(errors), size) and size <= rounding_tolerance(self._eps) * (scale := self._scale()):
            yield zero_block_finding(size, scale)
            self._is_zero_block, size = True, scale
        noise = [ratio(error, size) for error in errors]
        yield self._measured(
            "matvec and matmat", noise[0], "they differ", "one of them is wrong, or products draw random numbers"
        )
        yield self._measured(
            "repeatability", noise[1], "the product differs when it is computed again", "look for random numbers"
        )
        yield self._measured(
            "linearity",
            noise[2],
            "A (X c) differs from (A X) c",
            "an operator that is not linear is not a matrix: look at how it uses its vector",
        )
        floor = max(noise)
        yield self._measured(
            "noise floor",
            floor,
            f"{floor / self._eps:.3g} times epsilon, {self._eps:.1e}",
            "no residual gets smaller than this: pass solvers a larger tolerance, or compute in float64 "
            "(model.double())",
        )
        yield from self._adjoint_and_symmetry(X, AX, U, size, floor)

    def _adjoint_and_symmetry(self, X: Array, AX: Array, U: Array, size: float, noise: float) -> Iterator[Finding]:
        """Compare ``u' (A x)`` with ``(A' u)' x`` and, if `A` is square, with ``(A u)' x``."""
        A, square, mixed = self._A, self._A.shape[0] == self._A.shape[1], U.conj().T @ AX
        self_adjoint, has_adjoint = square and A.H is A, True

        def defect(products: Array) -> float:
            # Estimate the norm of a difference d from random vectors u of norm 1: E[M |u' d|^2] = |d|^2.
            difference = mixed - products.conj().T @ X
            return ratio(math.sqrt(len(U) / difference.size) * magnitude(difference), size)

        if self_adjoint:
            yield Finding("adjoint", NOT_APPLICABLE, "A is its own adjoint: see symmetry")
        else:
            try:
                products = np.stack([np.asarray(A.rmatvec(u)) for u in U.T], axis=1)
                self._count(U.shape[1])
            except NotImplementedError:
                has_adjoint = False
                yield Finding("adjoint", NOT_APPLICABLE, "A has none: it was created without rmatvec")
            else:
                yield self._measured(
                    "adjoint",
                    defect(products),
                    "u' (A x) differs from (A' u)' x",
                    "rmatvec is not the adjoint of matvec: svds, lsmr and lsqr would give wrong results",
                )
        if not square:
            yield Finding("symmetry", NOT_APPLICABLE, "A is not square")
            return
        yield symmetry_finding(defect(self._product(A, U)), self._eps, noise, self_adjoint, has_adjoint)

    def _approximation(self, A: KFACLinearOperator) -> Finding:
        """Compare a Kronecker-factored approximation with the exact matrix."""
        comparison = compare(A, A.exact, num_probes=_COMPARED, rng=self._rng, progress=False)
        self._count(comparison.num_products)
        whole, blocks = comparison.whole.error, comparison.diagonal.error
        text = (
            f"relative error {whole.value:.3g} +- {whole.error:.1g} of the approximation (Frobenius norm), and "
            f"{blocks.value:.3g} +- {blocks.error:.1g} within the diagonal blocks; curvop.compare shows each block"
        )
        return Finding("approximation", OK, text, whole.value)

    def _routes(self, part: EngineLinearOperator, random: bool) -> Iterator[Finding]:
        if random:
            yield Finding("other routes", NOT_APPLICABLE, "the loss is random: there is nothing to compare with")
            return
        vector, product, routes = self._compare(part)
        scale, size = max(route.scale for route in routes), magnitude(product)
        is_zero = self._is_zero_block and part is self._A
        if part is not self._A and size <= rounding_tolerance(self._eps) * scale:
            tripled = self._product(part, 3 * vector)
            is_zero = self._is_noise(magnitude(tripled - 3 * product), size)
            if is_zero and not self._is_zero_block:
                yield zero_block_finding(size, scale)
        gradient = part._gradient()[0].cpu().numpy()
        yield from route_findings(routes, product, gradient, self._eps, scale if is_zero else 0.0)

    def _scale(self) -> float:
        """Return the norm by which the errors of a zero block are divided (see ``Route.scale``)."""
        return max((route.scale for part in self._comparable for route in self._compare(part)[2]), default=0.0)

    def _compare(self, part: EngineLinearOperator) -> tuple[Array, Array, list[Any]]:
        """Return (vector, product, routes): a unit vector, its product with `part`, and results of other methods."""
        if part not in self._compared:
            if part is self._A and self._first_product is not None:
                vector, product = self._first_product
            else:
                vector = self._rng.standard_normal(part.shape[1])
                vector = (vector / np.linalg.norm(vector)).astype(part.dtype)
                product = self._product(part, vector)
            self._compared[part] = vector, product, part.other_routes(vector)
        return self._compared[part]

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

    def _is_noise(self, error: float, size: float) -> bool:
        return error > rounding_tolerance(self._eps) * size

    def _measured(self, name: str, value: float, problem: str, remedy: str) -> Finding:
        return measured_finding(name, value, self._eps, problem, remedy)


def _gradient_finding(route: Any, gradient: NDArray[Any], eps: float) -> Finding:
    """Compare the gradient of the operator with the gradient computed by the user's code.

    If terms cancel, the rounding errors of both gradients are proportional to the size of the terms. The difference
    between the gradients is therefore divided by this size.
    """
    own = route.products[0].cpu().numpy()
    value = ratio(magnitude(gradient - own), max(magnitude(own), route.own.size))
    text = "it differs from the gradient of your own code"
    finding = measured_finding(route.name, value, eps, text, _OTHER_CODE, eps**0.5)
    return _with_source(finding, route)


def _product_finding(route: Any, product: NDArray[Any], eps: float, scale: float) -> Finding:
    """Compare the product of the operator with the same product computed by another method."""
    if not route.products:
        return Finding(route.name, NOT_APPLICABLE, route.reason)
    # Finite differences give one product for each of two or more step sizes. The first product has a longer step than
    # the second. It therefore has a smaller rounding error, and is accurate if there is no kink nearby.
    first, *others = [other.cpu().numpy() for other in route.products]
    shorter = others[0] if others else first
    size = max(magnitude(shorter), scale)
    error = route.error * ratio(magnitude(shorter), size)
    values = [ratio(magnitude(product - other), size) for other in (first, *others)]
    value, limit = min(values), _STEP if others else 0.0
    if limit and value > max(limit, rounding_tolerance(eps)):  # the product does not agree for any step
        value = min(values[:2])
        if error > _INCONCLUSIVE:
            text = f"the steps differ by {error:.1e}, as they do near kinks (ReLU): the comparison is inconclusive"
            return Finding(route.name, NOT_APPLICABLE, text)
        limit += 4 * error
        if error > _STEP and limit < value < 100 * error:  # the error would be smaller for a smooth function
            text = f"kinks, such as those of ReLU, lie within a step: the comparison is only accurate to {value:.1e}"
            return Finding(route.name, NOT_APPLICABLE, text)
        if value > limit and route.own is not None and route.own.holds:
            text = "autograd's derivative of your code differs from its difference quotient: A cannot be compared"
            return Finding(route.name, WARNING, text, value, limit, _TREATED_AS_CONSTANT)
    finding = measured_finding(route.name, value, eps, "the product with A differs from it", _WRONG_DERIVATIVE, limit)
    return _with_source(finding, route)


def _with_source(finding: Finding, route: Any) -> Finding:
    """Extend the text of a finding by a description of how the user's code was called."""
    source = ""
    if route.own is not None:
        source = "of your own code" + (", all data as one batch" if route.own.whole else "")
    return dataclasses.replace(finding, text="; ".join(filter(None, (finding.text, source))))


def _with_likely_cause(finding: Finding, route: Any, status: dict[str, str], gradient_agrees: bool) -> Finding:
    """Adapt the finding about a wrong product to the cause that the other comparisons suggest.

    Only findings with the status 'wrong' are changed. Some of them become warnings.
    """
    if finding.status != WRONG:
        return finding
    if finding.name != "finite differences" and status.get("finite differences") == OK:
        text = f"{finding.text}, but finite differences of your own code agree with A"
        remedy = "torch's backward and its forward mode differ for an operation of the model or the loss"
        return dataclasses.replace(finding, status=WARNING, text=text, remedy=remedy)
    forward_agrees = status.get("forward mode") == OK
    if finding.name == "finite differences" and forward_agrees:
        if status.get("double backward") == OK:
            return dataclasses.replace(finding, status=WARNING, remedy=_TREATED_AS_CONSTANT)
        if not route.own.fine and gradient_agrees:
            return dataclasses.replace(finding, status=WARNING, remedy=_LONG_STEPS)
    if finding.name == "double backward" or (route.own and (forward_agrees or not gradient_agrees)):
        return dataclasses.replace(finding, remedy=_OTHER_CODE)
    return finding


def _zero_matrix(known: bool) -> Finding:
    """Return the finding that a Gauss-Newton matrix is zero because the loss is linear in the prediction.

    `known` is True if the loss is a PyTorch loss function.
    """
    if known:
        text = "the matrix is zero, because the second derivative of this loss with respect to the prediction is zero"
        remedy = "use HessianLinearOperator, or a nonlinear loss (CrossEntropyLoss of logits instead of NLLLoss)"
        return Finding("zero matrix", WARNING, text, remedy=remedy)
    text = "the matrix is zero: the loss is linear in the prediction, for example because the model returns its loss"
    remedy = "use HessianLinearOperator, or return logits from the model and compute their loss in loss_function"
    return Finding("zero matrix", WRONG, text, remedy=remedy)
