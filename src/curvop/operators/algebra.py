r"""Operators that combine other operators: sums, multiples, products, powers and damped operators.

If A is an operator of this package, the expressions ``A + B``, ``A - B``, ``c * A``, ``-A``, ``A @ B``, ``A ** 2`` and
``A.damped(lam)`` return these operators. Like A, these operators accept NumPy arrays and tensors, and know the names of
their parameters. The methods ``block`` and ``submatrix`` of these operators combine blocks of the operands. The
following example preconditions a Hessian with the diagonal of the Gauss-Newton matrix::

    >>> import torch
    >>> from curvop import DiagonalLinearOperator, GGNLinearOperator, HessianLinearOperator
    >>> _ = torch.manual_seed(0)
    >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 2)).double()
    >>> params, data = dict(model.named_parameters()), [(torch.randn(50, 4).double(), torch.randn(50, 2).double())]
    >>> H = HessianLinearOperator(model, torch.nn.MSELoss(), params, data)
    >>> G = GGNLinearOperator(model, torch.nn.MSELoss(), params, data)
    >>> D = DiagonalLinearOperator(G.diagonal() + 0.01) ** -0.5
    >>> A = D @ H @ D
    >>> A.is_symmetric, A.block(["2.weight", "2.bias"]).shape
    (True, (18, 18))

The right operand of a sum or a product can be an operator of SciPy, whose products are computed with NumPy arrays.
"""

from __future__ import annotations

import functools
import itertools
import math
import numbers
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray
from scipy.sparse.linalg import LinearOperator
from torch import Tensor

from curvop.kernels.parameters import ParameterLayout
from curvop.kernels.user_warnings import warn_user
from curvop.operators.base import Composites, Rows, TensorLinearOperator
from curvop.operators.composites import (
    CompositeLinearOperator,
    NamedLinearOperator,
    alike,
    factor_formula,
    layouts_of,
    multiply,
    name_of,
    section,
)
from curvop.operators.diagonal_operator import DiagonalLinearOperator, as_diagonal
from curvop.operators.engine_operator import EngineLinearOperator, products_in_one_pass
from curvop.operators.gram import GramLinearOperator, NotFactorableError
from curvop.operators.validation import real_scalar

__all__ = ["DampedLinearOperator"]

Names = Sequence[str]


# Sums, multiples and products. The classes have the names of the corresponding SciPy classes, because fingerprints
# contain the class names.


class _SumLinearOperator(CompositeLinearOperator):
    """Sum ``A + B``."""

    def __init__(self, A: LinearOperator, B: LinearOperator) -> None:
        ours, theirs = layouts_of(A), layouts_of(B)
        rows, cols = (mine or other for mine, other in zip(ours, theirs, strict=True))
        super().__init__(A.shape, [A, B], (rows, cols))

    def _formula(self) -> str:
        return " + ".join(part._formula() for part in self._parts).replace("+ -", "- ")

    def diagonal(self) -> NDArray[Any]:
        """Return the sum of the exact diagonals of the operands."""
        first, second = (part.diagonal() for part in self._parts)
        return cast("NDArray[Any]", first + second)

    def _restricted(self, rows: Names | None, cols: Names | None) -> TensorLinearOperator:
        principal = rows == cols and alike(*self._row_and_column_layouts)
        blocks: list[tuple[TensorLinearOperator, TensorLinearOperator]] = []
        for addend in _addends(self):
            # In a principal block of A + A.T, use the adjoint of the block of A as the block of A.T, so that both share
            # a cache.
            adjoints = (block.H for A, block in blocks if principal and A.H._identity() == addend._identity())
            block = next(adjoints, None)
            if block is None:
                block = section(addend, self._row_and_column_layouts, rows, cols)
            blocks.append((addend, block))
        return functools.reduce(_SumLinearOperator, (block for _, block in blocks))

    def _mirror(self, conjugate: bool) -> TensorLinearOperator:
        return _SumLinearOperator(*(part.H if conjugate else part.T for part in self._parts))

    def _identity(self) -> tuple[Any, ...]:
        return _canonical(self)

    def _apply(self, rows: Rows) -> Rows:
        return _combination(self, rows)


def _addends(A: TensorLinearOperator) -> Iterator[TensorLinearOperator]:
    if isinstance(A, _SumLinearOperator):
        for part in A._parts:
            yield from _addends(part)
    else:
        yield A


class _ScaledLinearOperator(CompositeLinearOperator):
    """Operator A multiplied by a number, ``alpha * A``."""

    def __init__(self, A: LinearOperator, alpha: Any) -> None:
        if not isinstance(alpha, numbers.Number):
            raise ValueError(f"A is multiplied by {alpha!r}, but must be multiplied by a number")
        if not isinstance(alpha, int | float | complex):  # for example, a fraction or a NumPy number
            alpha = float(alpha) if isinstance(alpha, numbers.Real) else complex(cast("complex", alpha))
        super().__init__(A.shape, [A, alpha], layouts_of(A))

    @property
    def _alpha(self) -> Any:
        return self._scalars[0]

    def _formula(self) -> str:
        scale = "-" if self._alpha == -1 else f"{self._alpha:.6g} * "
        if isinstance(self._alpha, complex):
            scale = f"({self._alpha:.6g}) * "
        return f"{scale}{factor_formula(self._parts[0])}"

    def diagonal(self) -> NDArray[Any]:
        """Return the exact diagonal of A, multiplied by ``alpha``."""
        return cast("NDArray[Any]", self._alpha * self._parts[0].diagonal())

    def _restricted(self, rows: Names | None, cols: Names | None) -> TensorLinearOperator:
        return _ScaledLinearOperator(section(self._parts[0], self._row_and_column_layouts, rows, cols), self._alpha)

    def gram(self) -> GramLinearOperator:
        """Return the Gram matrix ``alpha * S @ S.T`` of ``alpha * A``, where ``A = S.T @ S`` and ``alpha >= 0``.

        Returns
        -------
        GramLinearOperator
            Operator that has the same nonzero eigenvalues as ``alpha * A``.

        Raises
        ------
        NotFactorableError
            If A is not of the form ``S.T @ S``, or if ``alpha`` is negative or complex.
        """
        if not (isinstance(self._alpha, int | float) and self._alpha >= 0):
            raise NotFactorableError(
                f"a multiple by {self._alpha} of S.T @ S is not of the form S.T @ S: use a number >= 0"
            )
        alpha, gram = float(self._alpha), cast("GramLinearOperator", cast("Any", self._parts[0]).gram())
        return GramLinearOperator(cast("TensorLinearOperator", alpha**0.5 * gram.factor), alpha * gram.shift)

    def _mirror(self, conjugate: bool) -> TensorLinearOperator:
        A = self._parts[0]
        return _ScaledLinearOperator(A.H if conjugate else A.T, self._alpha.conjugate() if conjugate else self._alpha)

    def _identity(self) -> tuple[Any, ...]:
        return _canonical(self)

    def _apply(self, rows: Rows) -> Rows:
        return _combination(self, rows)


class _ProductLinearOperator(CompositeLinearOperator):
    """Product ``A @ B``."""

    def __init__(self, A: LinearOperator, B: LinearOperator) -> None:
        (rows, inner), (other, cols) = layouts_of(A), layouts_of(B)
        left, right = (isinstance(X, TensorLinearOperator) and X._is_diagonal for X in (A, B))
        rows = other if rows is None and left else rows
        cols = inner if cols is None and right else cols
        super().__init__((A.shape[0], B.shape[1]), [A, B], (rows, cols))

    def _formula(self) -> str:
        return " @ ".join(map(factor_formula, self._parts))

    def diagonal(self) -> NDArray[Any]:
        """Return the exact diagonal of a product in which at most one factor is not a diagonal matrix.

        This factor must be able to compute its own diagonal.
        """
        scale, factors = _factors(self)
        diagonals = [factor for factor in factors if factor._is_diagonal]
        if len(factors) - len(diagonals) > 1:
            return super().diagonal()
        return cast("NDArray[Any]", math.prod([factor.diagonal() for factor in factors], start=scale))

    def gram(self) -> GramLinearOperator:
        """Return the Gram matrix ``S @ S.T`` of a product ``S.T @ S``, such as ``J.T @ J`` with a Jacobian J.

        Returns
        -------
        GramLinearOperator
            Operator that has the same nonzero eigenvalues as the product.

        Raises
        ------
        NotFactorableError
            If the product is not of the form ``S.T @ S``.
        """
        left, right = self._parts
        if left._identity() != right.H._identity():
            return super().gram()
        return GramLinearOperator(right)

    def _restricted(self, rows: Names | None, cols: Names | None) -> TensorLinearOperator:
        scale, factors = _factors(self)
        mirrored = self.is_symmetric and rows is not None and rows == cols and alike(*self._row_and_column_layouts)
        layouts = row_layout, col_layout = self._row_and_column_layouts
        square = alike(row_layout, col_layout)
        cut: dict[tuple[Any, ...], TensorLinearOperator] = {}  # both factors D of D @ A @ D use the same block

        # If D is diagonal, the selected rows of D @ A are D' @ A', where D' is the diagonal block of D for these rows,
        # and A' consists of these rows of A. The same holds for the columns of A @ D.
        def diagonal_block(factor: TensorLinearOperator, layout: ParameterLayout | None, names: Names) -> Any:
            key = id(factor), tuple(names), square or layout is row_layout
            if key not in cut:
                cut[key] = section(factor, (layout, layout), names, names)
            return cut[key]

        left, right = 0, len(factors) - 1
        while rows is not None and left < right and factors[left]._is_diagonal:
            factors[left] = diagonal_block(factors[left], row_layout, rows)
            left += 1
        while cols is not None and left < right and factors[right]._is_diagonal:
            factors[right] = diagonal_block(factors[right], col_layout, cols)
            right -= 1
        if left == right and rows == cols and square and factors[left]._is_diagonal:
            factors[left] = diagonal_block(factors[left], row_layout, cast("Names", rows))
        elif left == right:
            factors[left] = section(factors[left], layouts, rows, cols)
        else:
            adjoint = mirrored and factors[left]._identity() == factors[right].H._identity()
            factors[right] = section(factors[right], layouts, None, cols)
            factors[left] = factors[right].H if adjoint else section(factors[left], layouts, rows, None)
        product = factors[0]
        for factor in factors[1:]:
            product = _ProductLinearOperator(product, factor)
        return product if scale == 1 else _ScaledLinearOperator(product, scale)

    def _mirror(self, conjugate: bool) -> TensorLinearOperator:
        first, second = self._parts
        return _ProductLinearOperator(*((second.H, first.H) if conjugate else (second.T, first.T)))

    def _identity(self) -> tuple[Any, ...]:
        return _canonical(self)

    def _apply(self, rows: Rows) -> Rows:
        first, second = self._parts
        return multiply(first, multiply(second, rows))


def _sum(A: TensorLinearOperator, B: LinearOperator) -> TensorLinearOperator:
    if A.shape != B.shape:
        raise ValueError(
            f"A is a {name_of(A)} and B is a {name_of(B)}, so they cannot be added: the shapes must be equal"
        )
    for axis, mine, other in zip(("rows", "columns"), layouts_of(A), layouts_of(B), strict=True):
        _warn_if_different(f"the {axis} of A, a {name_of(A)}, and B, a {name_of(B)},", mine, other)
    return _SumLinearOperator(A, B)


def _product(A: TensorLinearOperator, B: LinearOperator) -> TensorLinearOperator:
    if len(B.shape) != 2 or A.shape[1] != B.shape[0]:
        what = f"A is a {name_of(A)} and B is a {name_of(B)}, so they cannot be multiplied"
        raise ValueError(f"{what}: A must have as many columns as B has rows")
    what = f"the columns of A, a {name_of(A)}, and the rows of B, a {name_of(B)},"
    _warn_if_different(what, layouts_of(A)[1], layouts_of(B)[0])
    return _ProductLinearOperator(A, B)


def _power(A: TensorLinearOperator, power: Any) -> TensorLinearOperator:
    if A._is_diagonal:
        return cast("TensorLinearOperator", as_diagonal(A) ** power)
    if isinstance(power, bool) or not isinstance(power, int | np.integer) or power < 0:
        raise ValueError(f"the power is {power!r}, but must be an integer >= 0")
    if A.shape[0] != A.shape[1]:
        raise ValueError(f"A has shape {A.shape}, but must be square to have powers")
    if power == 0:
        ones = DiagonalLinearOperator(np.ones(A.shape[0], dtype=np.zeros(0, dtype=A.dtype).real.dtype))
        return NamedLinearOperator(ones, layouts_of(A), getattr(A, "_params", {}))
    product = A
    for _ in range(int(power) - 1):
        product = _product(product, A)
    return product


def _damped(A: TensorLinearOperator, damping: float) -> TensorLinearOperator:
    rows, cols = layouts_of(A)
    if isinstance(A, CompositeLinearOperator) and rows is not None and cols is not None:
        shared = set(rows.names) & set(cols.names)
        if not shared or any(rows.shapes[rows.names.index(n)] != cols.shapes[cols.names.index(n)] for n in shared):
            raise ValueError(
                "the rows and columns of A are different parameters, so that A + damping * I has no meaning: add "
                "damping * DiagonalLinearOperator(ones) to the diagonal entries"
            )
    return DampedLinearOperator(A, damping)


# Damping.


class DampedLinearOperator(CompositeLinearOperator):
    """Damped operator ``A + damping * I``, returned by ``A.damped(damping)``.

    Use it to solve Newton and natural gradient systems with SciPy's ``cg`` or ``minres``. Use `curvop.solve` instead if
    you need a check of the residual and a warning if the damped matrix is indefinite. For operators of SciPy, write
    ``A + damping * aslinearoperator(identity)``.

    Parameters
    ----------
    A : LinearOperator
        Operator of this package. It must be square, or a block of parameters such as ``H.block(rows, cols)``.
    damping : float
        Finite number that is added to the diagonal.

    Raises
    ------
    TypeError
        If A is not an operator of this package, or if ``damping`` is not a real number.
    ValueError
        If ``damping`` is infinite or NaN, or if A is neither square nor a block of parameters.

    See Also
    --------
    curvop.solve : Solve a damped system and compute the true residual.
    curvop.preconditioner.nystrom : Preconditioner for damped systems.

    Notes
    -----
    Blocks and submatrices are taken from the damped matrix. An off-diagonal block is therefore equal to the
    corresponding block of A. In a block whose row and column parameters differ, the damping is added only to those
    entries that lie on the diagonal of the whole matrix. A product with the damped operator costs as much as a product
    with A.

    Examples
    --------
    Compute a Newton step with Levenberg damping by conjugate gradients. The loss is quadratic:

    >>> import numpy as np
    >>> import torch
    >>> from scipy.sparse.linalg import cg
    >>> from curvop import HessianLinearOperator
    >>> _ = torch.manual_seed(0)
    >>> X, y = torch.randn(50, 3, dtype=torch.float64), torch.randn(50, 1, dtype=torch.float64)
    >>> model = torch.nn.Linear(3, 1, bias=False, dtype=torch.float64)
    >>> H = HessianLinearOperator(model, torch.nn.MSELoss(), dict(model.named_parameters()), [(X, y)])
    >>> gradient, loss = H.gradient_and_loss()
    >>> step, info = cg(H.damped(0.1), -gradient, rtol=1e-8)
    >>> info, np.allclose(H @ step + 0.1 * step, -gradient)
    (0, True)
    """

    def __init__(self, A: TensorLinearOperator, damping: float) -> None:
        if not isinstance(A, TensorLinearOperator):
            raise TypeError(f"A is a {type(A).__name__}: add damping to it as SciPy does, A + damping * identity")
        if not math.isfinite(real_scalar("damping", damping)):
            raise ValueError(f"damping is {damping}, but must be finite")
        if None in layouts_of(A) and A.shape[0] != A.shape[1]:
            raise ValueError(f"A has shape {A.shape}, but must be square to be damped")
        super().__init__(A.shape, [A, float(damping)], layouts_of(A))
        self._A = A
        self._counter = A._counter

    def _formula(self) -> str:
        return f"{self._A._formula()} + {self.damping:.6g} * I".replace("+ -", "- ")

    @property
    def damping(self) -> float:
        """Number that is added to the diagonal."""
        return float(self.args[1])

    def damped(self, damping: float) -> DampedLinearOperator:
        """Return the operator with additional damping, ``A + (self.damping + damping) * I``.

        Parameters
        ----------
        damping : float
            Finite number that is added to the current damping.

        Returns
        -------
        DampedLinearOperator
            Damped operator with the same A.
        """
        return type(self)(self._A, self.damping + damping)

    def diagonal(self) -> NDArray[Any]:
        """Return the exact diagonal, if A can compute its own diagonal.

        Returns
        -------
        diagonal : ndarray, shape (N,)
            Diagonal of A plus the damping.

        Raises
        ------
        NotImplementedError
            If A cannot compute its diagonal. Use `curvop.spectrum.diagonal` to estimate the diagonal.
        ValueError
            If the rows and columns are different parameters.
        """
        diagonal: NDArray[Any] = self._A.diagonal() + self.damping
        return diagonal

    def gradient_and_loss(self) -> tuple[NDArray[Any], float]:
        """Compute the gradient and the loss of the objective of A. The damping does not affect them.

        Returns
        -------
        gradient : ndarray, shape (M,)
            Gradient with respect to the row parameters.
        loss : float
            Loss of the whole data set.
        """
        if not hasattr(self._A, "gradient_and_loss"):
            raise AttributeError(
                f"A, a {type(self._A).__name__}, has no gradient: call gradient_and_loss() of one of its operands"
            )
        return cast("tuple[NDArray[Any], float]", self._A.gradient_and_loss())

    def gram(self) -> GramLinearOperator:
        """Return the damped Gram matrix ``S @ S.T + damping * I``, if A is of the form ``S.T @ S``.

        Returns
        -------
        GramLinearOperator
            Operator with all eigenvalues of ``A + damping * I`` except those that correspond to zero eigenvalues of A.

        Raises
        ------
        NotFactorableError
            If A is not of the form ``S.T @ S``.
        """
        return cast("GramLinearOperator", cast("Any", self._A).gram()).shifted(self.damping)

    def _restricted(self, rows: Names | None, cols: Names | None) -> TensorLinearOperator:
        if None in self._row_and_column_layouts:
            return super()._restricted(rows, cols)
        return type(self)(section(self._A, self._row_and_column_layouts, rows, cols), self.damping)

    def _mirror(self, conjugate: bool) -> TensorLinearOperator:
        return type(self)(cast("TensorLinearOperator", self._A.H if conjugate else self._A.T), self.damping)

    def _identity(self) -> tuple[Any, ...]:
        return "damped", self._A._identity(), self.damping

    @property
    def _shifts_the_diagonal(self) -> bool:
        """Whether the damping is added to the main diagonal.

        In a block whose row parameters differ from its column parameters, the damping is added to entries off the main
        diagonal, or to no entry.
        """
        return None in self._row_and_column_layouts or alike(*self._row_and_column_layouts)

    def _check_entries(self, x: Rows) -> None:
        self._A._check_entries(x)

    def _apply(self, rows: Rows) -> Rows:
        products: Any = self._A._apply(rows)
        if self._shifts_the_diagonal:
            return cast("Rows", _plus(products, _shift(self, self.damping, rows)))
        row_layout, col_layout = cast("tuple[ParameterLayout, ParameterLayout]", self._row_and_column_layouts)
        for name in row_layout.names:
            if name in col_layout.slices:
                products[:, row_layout.slices[name]] += self.damping * rows[:, col_layout.slices[name]]
        return cast("Rows", products)


Composites.sum = _sum
Composites.scaled = _ScaledLinearOperator
Composites.product = _product
Composites.power = _power
Composites.damped = _damped


# Keys of composite operators. Two expressions with the same terms have equal keys, because they are the same matrix.


def _terms(A: TensorLinearOperator) -> Iterator[tuple[list[Any], list[TensorLinearOperator]]]:
    """Yield a tuple ``(scalars, factors)`` for each term of A. Each term is the product of its scalars and factors."""
    if isinstance(A, _SumLinearOperator):
        for part in A._parts:
            yield from _terms(part)
    elif isinstance(A, _ScaledLinearOperator):
        for scalars, factors in _terms(A._parts[0]):
            yield [A._alpha, *scalars], factors
    elif isinstance(A, _ProductLinearOperator):
        pairs = [_scalars_and_factors(part) for part in A._parts]
        yield [scalar for scalars, _ in pairs for scalar in scalars], [f for _, factors in pairs for f in factors]
    else:
        yield [], [A]


def _scalars_and_factors(A: TensorLinearOperator) -> tuple[list[Any], list[TensorLinearOperator]]:
    """Return a tuple ``(scalars, factors)`` for a product of operators. A sum in the product counts as one factor."""
    if isinstance(A, _ScaledLinearOperator):
        scalars, factors = _scalars_and_factors(A._parts[0])
        return [A._alpha, *scalars], factors
    if isinstance(A, _ProductLinearOperator):
        pairs = [_scalars_and_factors(part) for part in A._parts]
        return [s for scalars, _ in pairs for s in scalars], [f for _, factors in pairs for f in factors]
    return [], [A]


def _factors(A: TensorLinearOperator) -> tuple[Any, list[TensorLinearOperator]]:
    scalars, factors = _scalars_and_factors(A)
    return _product_of(scalars), factors


def _product_of(scalars: Sequence[Any]) -> Any:
    """Return the product of scalars. They are sorted first, so that the result does not depend on their order."""
    return math.prod(sorted(scalars, key=lambda scalar: (complex(scalar).real, complex(scalar).imag)))


def _canonical(A: TensorLinearOperator) -> tuple[Any, ...]:
    terms = Counter(
        (_product_of(scalars), *(factor._identity() for factor in factors)) for scalars, factors in _terms(A)
    )
    return "sum", frozenset(terms.items())


# Multiplication of vectors by sums and multiples of operators.


def _combination(A: CompositeLinearOperator, rows: Rows) -> Rows:
    """Multiply a sum of multiples of operators by each row of ``rows``.

    An operand that occurs several times in the sum is applied only once. If several operands have the same data and
    cache no batches, their products are computed in one pass over the data.
    """
    leaves: dict[int, TensorLinearOperator] = {}
    weights: dict[int, Any] = {}
    for scalars, leaf in _summands(A, [], len(rows)):
        key = id(leaf)
        leaves[key] = leaf
        weights[key] = weights.get(key, 0) + _product_of(scalars)
    shift = weights.pop(id(_IDENTITY), None)
    leaves.pop(id(_IDENTITY), None)
    engines = [leaf for leaf in leaves.values() if isinstance(leaf, EngineLinearOperator)]
    real = not (rows.is_complex() if isinstance(rows, Tensor) else rows.dtype.kind == "c")
    known = products_in_one_pass(engines, rows) if real and len(engines) > 1 else {}
    total: Any = None
    for key, leaf in leaves.items():
        product = known.pop(key) if key in known else multiply(leaf, rows)
        total = _plus(total, _times(product, weights[key]))
    return cast("Rows", total if shift is None else _plus(total, _shift(A, shift, rows)))


#: Placeholder that `_summands` yields for the identity matrix in ``A + damping * I``.
_IDENTITY = DiagonalLinearOperator(np.ones(1))


def _summands(A: TensorLinearOperator, scalars: list[Any], count: int) -> Iterator[tuple[list[Any], Any]]:
    """Yield a tuple ``(scalars, operand)`` for each term of A. Each term is the product of its scalars and its operand.

    ``A`` may contain sums and multiples, which are not applied themselves. The function therefore adds ``count`` to
    their product counters.
    """
    if isinstance(A, DampedLinearOperator) and A._shifts_the_diagonal:
        yield [*scalars, A.damping], _IDENTITY
        parts = [A._A]
    elif isinstance(A, _SumLinearOperator | _ScaledLinearOperator):
        scalars = [*scalars, A._alpha] if isinstance(A, _ScaledLinearOperator) else scalars
        parts = A._parts
    else:
        yield scalars, A
        return
    for part in parts:
        if isinstance(part, _SumLinearOperator | _ScaledLinearOperator):
            part._counter.total += count
        yield from _summands(part, scalars, count)


def _times(product: Any, scalar: Any) -> Any:
    """Return ``scalar * product``. The memory of ``product`` may be overwritten."""
    if scalar == 1:
        return product
    if isinstance(scalar, numbers.Real) and (isinstance(product, Tensor) or product.dtype.kind in "fc"):
        product *= scalar
        return product
    return product * scalar


def _shift(A: TensorLinearOperator, shift: float, rows: Any) -> Any:
    """Return ``shift * rows`` in the dtype of products with A."""
    product = shift * rows
    return product if isinstance(rows, Tensor) else product.astype(A._product_dtype(rows.dtype), copy=False)


def _plus(total: Any, product: Any) -> Any:
    """Return ``total + product``, or ``product`` if ``total`` is None. The memory of ``total`` may be overwritten."""
    if total is None:
        return product
    if isinstance(total, Tensor) and total.device != product.device:
        product = product.to(total.device)
    if total.dtype == product.dtype:
        total += product
        return total
    return total + product


def _warn_if_different(what: str, a: ParameterLayout | None, b: ParameterLayout | None) -> None:
    if a is None or b is None or alike(a, b):
        return
    first, second = (list(zip(layout.names, map(tuple, layout.shapes), strict=True)) for layout in (a, b))
    (name, shape), (other, other_shape) = next(
        (x, y) for x, y in itertools.zip_longest(first, second, fillvalue=("nothing", ())) if x != y
    )
    warn_user(
        f"{what} are different parameters: the first difference is {name!r} of shape {shape} and {other!r} of shape "
        f"{other_shape}. Entries are combined in their order: select the same parameters in the same order"
    )
