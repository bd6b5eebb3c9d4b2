"""Fingerprints of linear operators, which identify a problem in later runs.

A fingerprint is a dict of digests, one for each input of the problem: parameters, model, loss function and batches. If
two fingerprints differ, the names of the digests that differ show which inputs changed. Journals, checkpoints and
result files use fingerprints to reject files that belong to another problem.
"""

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

_NUM_PROBES, _TOLERANCE = 16, 1e-4


class OtherProblemError(ValueError):
    """Raised if files on disk belong to another problem, such as other data. The message names the differences."""


def fingerprint(A: LinearOperator) -> dict[str, str]:
    """Return a dict of digests that identify the matrix `A`.

    Save the fingerprint with your results to identify the problem later, in another process or on another machine.
    `JournaledLinearOperator` and the functions of `curvop.spectrum` with a ``checkpoint`` argument save the fingerprint
    automatically.

    Parameters
    ----------
    A : LinearOperator

    Returns
    -------
    dict of str to str
        Digests by name, as plain text that can be saved, for example, in a JSON file. Compare two fingerprints with
        `differing`.

    Raises
    ------
    TypeError
        If `A` is not a ``LinearOperator``.

    See Also
    --------
    curvop.JournaledLinearOperator : Operator that records its products on disk.

    Notes
    -----
    The digests depend on the kind of operator:

    * An operator of this package has one digest for each parameter (``params['0.weight']``), one for the model
      (structure, code, other parameters, buffers), one for each batch (``data, batch 3``), and one for the loss
      function. Computing the digests takes one pass over the data. No product is computed.
    * A sum, multiple, product or submatrix has the digests of its operands. The names of these digests end with, for
      example, ``of term 1``.
    * A dense or sparse matrix that SciPy wraps as an operator has one digest of its entries.
    * Any other operator is identified by its class, its shape, and one product with a fixed vector. These products are
      compared with a relative tolerance of 1e-4, because the last bits of a product may differ between runs.

    A Python function is identified by its bytecode, its default arguments and the values in its closure. Its digest
    also depends on those global variables used by the function that are numbers, tensors, neural network modules, or
    functions defined in the same file. Bytecode differs between Python versions.

    Examples
    --------
    >>> import torch
    >>> from curvop import GGNLinearOperator
    >>> from curvop.storage.fingerprint import differing, fingerprint
    >>> model = torch.nn.Linear(2, 1)
    >>> params = dict(model.named_parameters())
    >>> data = [(torch.eye(2), torch.zeros(2, 1))]
    >>> A = GGNLinearOperator(model, torch.nn.MSELoss(), params, data)
    >>> before = fingerprint(A)
    >>> with torch.no_grad():
    ...     _ = model.bias.add_(1.0)
    >>> differing(before, fingerprint(A))
    ["params['bias']"]
    """
    if not isinstance(A, LinearOperator):
        raise TypeError(
            f"A is a {type(A).__name__}, not a LinearOperator: wrap it with scipy.sparse.linalg.aslinearoperator(A)"
        )
    if isinstance(A, TensorLinearOperator) and hasattr(A, "fingerprint"):
        return cast("dict[str, str]", A.fingerprint())
    parts = {"operator": type(A).__name__, "shape": str(tuple(A.shape)), "dtype": str(A.dtype)}
    matrix = getattr(A, "A", None)
    if type(A).__name__ == "MatrixLinearOperator" and (isinstance(matrix, np.ndarray) or issparse(matrix)):
        return parts | {"matrix": _matrix_digest(matrix)}
    terms = _operands(A)
    if terms is None:
        return parts | {"product": _sketch(A)}
    for number, term in enumerate(terms):
        inner = fingerprint(term) if isinstance(term, LinearOperator) else {"value": _value_digest(term)}
        parts |= {f"{name} of term {number + 1}": value for name, value in inner.items()}
    return parts


def state(A: LinearOperator) -> tuple[object, ...]:
    """Return a token that changes if the model or the data of `A` is modified.

    Compare tokens with ``==``, and only within one process. The cost is one pass over the parameters. If `A` is a sum,
    multiple, product or submatrix, the token covers its operands. Changes are detected only for operators of this
    package.
    """
    if isinstance(A, TensorLinearOperator) and hasattr(A, "state"):
        return cast("tuple[object, ...]", A.state())
    terms = _operands(A) or ()
    return tuple(state(term) if isinstance(term, LinearOperator) else _value_digest(term) for term in terms)


def differing(old: Mapping[str, str], new: Mapping[str, str]) -> list[str]:
    """Return the names of the digests that differ between two fingerprints, or that only one of them contains."""
    return [name for name in {**old, **new} if not _is_same_part(name, old.get(name), new.get(name))]


def listed(names: list[str], most: int = 4) -> str:
    """Join names for use in a sentence, such as "a, b and 3 others". At most `most` + 1 names are listed."""
    if len(names) > most + 1:
        names = [*names[:most], f"{len(names) - most} others"]
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)


def _operands(A: LinearOperator) -> tuple[Any, ...] | None:
    """Return the operands if `A` is a composite operator of SciPy or of this package, and None otherwise."""
    operands = getattr(A, "args", ())
    known = type(A).__module__.partition(".")[0] in ("scipy", "curvop")  # elsewhere, `args` may have another meaning
    if not known or not operands or not isinstance(operands[0], LinearOperator):
        return None
    return tuple(operands)


def _matrix_digest(matrix: Any) -> str:
    """Return a digest of the entries of a dense or sparse matrix."""
    if isinstance(matrix, np.ndarray):
        return _value_digest(matrix)
    entries = matrix.tocoo()
    return " ".join(_value_digest(np.asarray(part)) for part in (*entries.coords, entries.data))


def _value_digest(term: Any) -> str:
    """Return a text that identifies `term`, which is a number or an array."""
    if isinstance(term, np.ndarray):
        return hashlib.blake2b(np.ascontiguousarray(term).tobytes(), digest_size=16).hexdigest()
    return repr(complex(term))


def _sketch(A: LinearOperator) -> str:
    """Return random projections of the product of `A` with a fixed vector, as text.

    The norm of the difference of two sketches estimates the norm of the difference of the products.
    """
    if 0 in A.shape:
        return ""
    rng = np.random.default_rng(0)
    product = np.asarray(A.matvec(rng.standard_normal(A.shape[1])))
    projections = [rng.standard_normal(A.shape[0]) @ product for _ in range(_NUM_PROBES)]
    return " ".join(f"{value:.9e}" for value in np.asarray(projections).view(np.float64))


def _is_same_part(name: str, old: str | None, new: str | None) -> bool:
    if old is None or new is None or name.split(" of term ")[0] != "product":
        return old == new
    old_sketch, new_sketch = _parsed_floats(old), _parsed_floats(new)
    if old_sketch.shape != new_sketch.shape:
        return False
    scale = max(np.linalg.norm(old_sketch), np.linalg.norm(new_sketch))
    return bool(np.linalg.norm(old_sketch - new_sketch) <= _TOLERANCE * scale)


def _parsed_floats(text: str) -> NDArray[Any]:
    return np.array([float(word) for word in text.split()])
