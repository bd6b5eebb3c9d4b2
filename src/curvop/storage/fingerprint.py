"""What names a problem: a dict of digests by which a later run tells what has changed."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import issparse
from scipy.sparse.linalg import LinearOperator

from curvop.operators.base import TensorLinearOperator

__all__ = ["OtherProblemError", "differing", "fingerprint", "listed", "state"]

_PROBES, _TOLERANCE = 16, 1e-4


class OtherProblemError(ValueError):
    """What is on disk belongs to another problem; the message names what differs."""


def fingerprint(A: LinearOperator) -> dict[str, str]:
    """Return what tells the matrix of `A` from others, by name.

    For this package's operators these are digests of each parameter (``params['0.weight']``), of the model's structure,
    code, other parameters and buffers, of the loss function, and of each batch (``data, batch 3``), which are read
    once. Sums, multiples, products and submatrices have the parts of the operators that they are made of, SciPy's
    matrices their entries. Any other operator is told by its class, its shape, and one product with a fixed vector,
    which is compared to a relative 1e-4: products may differ in the last bits between runs.

    What a Python function computes is told by its code, its defaults, the values that it encloses, and the numbers,
    tensors, modules and functions of its own module that it refers to.

    Parameters
    ----------
    A : LinearOperator

    Returns
    -------
    dict of str to str
        Made of plain text, to be compared by `differing` in another process or on another day.

    Raises
    ------
    TypeError
        Where `A` is no ``LinearOperator``.

    Examples
    --------
    >>> from scipy.sparse.linalg import aslinearoperator
    >>> A, B = aslinearoperator(np.eye(3)), aslinearoperator(np.ones((3, 3)))
    >>> differing(fingerprint(A), fingerprint(A))
    []
    >>> differing(fingerprint(A), fingerprint(A + B))
    ['operator', 'matrix', 'operator of term 1', 'shape of term 1', ...]
    """
    if not isinstance(A, LinearOperator):
        raise TypeError(
            f"A is a {type(A).__name__}, not a LinearOperator: wrap it, scipy.sparse.linalg.aslinearoperator(A)"
        )
    if isinstance(A, TensorLinearOperator) and hasattr(A, "fingerprint"):
        return cast("dict[str, str]", A.fingerprint())
    parts = {"operator": type(A).__name__, "shape": str(tuple(A.shape)), "dtype": str(A.dtype)}
    matrix = getattr(A, "A", None)
    if type(A).__name__ == "MatrixLinearOperator" and (isinstance(matrix, np.ndarray) or issparse(matrix)):
        return parts | {"matrix": _matrix(matrix)}
    terms = _terms(A)
    if terms is None:
        return parts | {"product": _sketch(A)}
    for number, term in enumerate(terms):
        inner = fingerprint(term) if isinstance(term, LinearOperator) else {"value": _value(term)}
        parts |= {f"{name} of term {number + 1}": value for name, value in inner.items()}
    return parts


def state(A: LinearOperator) -> tuple[object, ...]:
    """Return a token that changes where a model is written to that one of this package's operators in `A` shows.

    It is compared by ``==`` and holds in this process only; it costs one pass over the parameters.
    """
    if isinstance(A, TensorLinearOperator) and hasattr(A, "state"):
        return cast("tuple[object, ...]", A.state())
    return tuple(state(term) if isinstance(term, LinearOperator) else _value(term) for term in _terms(A) or ())


def differing(old: Mapping[str, str], new: Mapping[str, str]) -> list[str]:
    """Return the names of the parts of two fingerprints that differ, or that only one of them has."""
    return [name for name in {**old, **new} if not _same(name, old.get(name), new.get(name))]


def listed(names: list[str], most: int = 4) -> str:
    """Return names as part of a sentence, the first of them where there are many."""
    if len(names) > most + 1:
        names = [*names[:most], f"{len(names) - most} others"]
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)


def _terms(A: LinearOperator) -> tuple[Any, ...] | None:
    """Return what SciPy's or this package's composites are made of, None where nothing or something else is known."""
    terms = getattr(A, "args", ())
    known = type(A).__module__.partition(".")[0] in ("scipy", "curvop")
    if not known or not terms or not isinstance(terms[0], LinearOperator):
        return None
    return tuple(terms)


def _matrix(matrix: Any) -> str:
    """Return what tells a dense or sparse matrix, entry by entry."""
    if isinstance(matrix, np.ndarray):
        return _value(matrix)
    entries = matrix.tocoo()
    return " ".join(_value(np.asarray(part)) for part in (*entries.coords, entries.data))


def _value(term: Any) -> str:
    """Return what tells a factor, a power or an array of indices."""
    if isinstance(term, np.ndarray):
        return hashlib.blake2b(np.ascontiguousarray(term).tobytes(), digest_size=16).hexdigest()
    return repr(complex(term))


def _sketch(A: LinearOperator) -> str:
    """Return random sums over the product with a fixed vector, whose differences estimate the products' difference."""
    if 0 in A.shape:
        return ""
    rng = np.random.default_rng(0)
    product = np.asarray(A.matvec(rng.standard_normal(A.shape[1])))
    sums = [rng.standard_normal(A.shape[0]) @ product for _ in range(_PROBES)]
    return " ".join(f"{value:.9e}" for value in np.asarray(sums).view(np.float64))


def _same(name: str, old: str | None, new: str | None) -> bool:
    if old is None or new is None or name.split(" of term ")[0] != "product":
        return old == new
    these, those = _numbers(old), _numbers(new)
    if these.shape != those.shape:
        return False
    scale = max(np.linalg.norm(these), np.linalg.norm(those))
    return bool(np.linalg.norm(these - those) <= _TOLERANCE * scale)


def _numbers(text: str) -> NDArray[Any]:
    return np.array([float(word) for word in text.split()])
