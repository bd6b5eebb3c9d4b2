r"""How far from orthogonal to its basis the next vector of a Lanczos run may be: when a look at the basis is due.

Between them, the vectors' products :math:`w_{j+1} = Q_j^\top q_{j+1}` obey the recurrence of the vectors themselves
(Paige, 1976; Simon, 1984), so that for their norms

.. math::

    \beta_{j+1} \|w_{j+1}\| \le \|T_j - \alpha_j I\| \|w_j\| + \beta_j \|w_{j-1}\| + \text{rounding}.

As long as this bound is small, nothing has to be taken out of the new vector; and looking is what costs, as it reads
the whole basis. One of its vectors is looked at in every step, to see where products become less exact; should noise
spare this one, more may be lost.

References
----------
Simon (1984), "The Lanczos algorithm with partial reorthogonalization", Math. Comp. 42(165). There the products are
followed one by one, and up to the root of the precision; here they are kept within 300 times the precision.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.linalg.lapack import dstebz

__all__ = ["OrthogonalityBound", "rounding_left"]

Array = NDArray[Any]

# In units of the precision: the bound at which the basis is looked at, what is left in if it is seen then, and what
# rounding alone may leave.
_LOOK, _CLEAN, _FRESH = 300.0, 30.0, 10.0
_FIRST_STEPS = 3  # show what rounding leaves, in the products as well


def rounding_left(dtype: torch.dtype, size: int) -> float:
    """Return what rounding may leave of a vector ``(size,)`` that is in the span of a basis, by the matrix's norm.

    It hardly grows with the size; but in double precision, products that sum rows one after another are given the root
    of it, which is still little. In single precision that would be as much as the eigenvalues of a network's bulk.
    """
    return 10 * float(torch.finfo(dtype).eps) * (size**0.5 if dtype == torch.float64 else 1.0)


class OrthogonalityBound:
    """Bounds the loss of orthogonality of several runs.

    Parameters
    ----------
    count : int
        Of the runs.
    eps : float
        The precision of the basis.

    Attributes
    ----------
    state : ndarray, shape (count, 4)
        All that is known: the bounds of the last vector but one and of the last, what rounding leaves in a vector that
        was cleaned, and whether the next is to be cleaned as well.
    """

    def __init__(self, count: int, eps: float) -> None:
        self._eps = eps
        self.state = np.tile([0.0, 0.0, _FRESH * eps, 0.0], (count, 1))

    def of_next(self, group: slice, alphas: Array, betas: Array, norms: Array) -> Array:
        """Bound the losses ``(g,)`` of the next vectors, of these norms as yet, after j steps of a group of runs.

        Parameters
        ----------
        alphas, betas : ndarray, shapes (g, j) and (g, j - 1)
            Of the tridiagonal matrices.
        norms : ndarray, shape (g,)
        """
        before, last, fresh, _ = self.state[group].T
        alphas, betas = alphas / norms[:, None], betas / norms[:, None]  # LAPACK squares them
        low, high = np.transpose([_ends(*entries) for entries in zip(alphas, betas, strict=True)])
        spread = np.maximum(high - alphas[:, -1], alphas[:, -1] - low)
        coupling = betas[:, -1] if betas.shape[1] else np.zeros(len(norms))
        bounds: Array = spread * last + coupling * before + fresh
        return bounds

    def is_low(self, group: slice, steps: int, bounds: Array, samples: Array) -> Array:
        """Tell for which runs ``(g,)`` no look is due; the bound is then what is known of the next vector.

        `samples` are the products of the next vectors with one of the basis each: where one is beyond the bound, the
        operator's products have become less exact than they were, of which no recurrence knows.
        """
        _, last, fresh, due = self.state[group].T
        low = (steps > _FIRST_STEPS) & (due == 0) & (samples <= bounds) & (bounds <= _LOOK * self._eps)
        known = np.stack([last, bounds, fresh, due], axis=1)
        self.state[group] = np.where(low[:, None], known, self.state[group])
        return np.asarray(low)

    def needs_cleaning(self, group: slice, steps: int, bounds: Array, found: Array, looked: Array) -> Array:
        """Take in the losses of the next vectors as a look at some has `found` them; tell which are to be cleaned."""
        _, last, fresh, due = self.state[group].T
        first = steps <= _FIRST_STEPS
        inexact = first | (found > bounds)  # products are less exact than the precision
        fresh = np.where(inexact, np.maximum(fresh, found), fresh)
        clean = first | (due > 0) | (found > _CLEAN * self._eps)
        # What is wrong with the last vector goes over to the one after the next: two in turn are cleaned.
        due = clean & (not first) & (due == 0)
        known = np.stack(
            [np.maximum(last, fresh), np.where(clean, fresh, np.maximum(found, fresh)), fresh, due], axis=1
        )
        self.state[group] = np.where(looked[:, None], known, self.state[group])
        return np.asarray(clean & looked)


def _ends(alphas: Array, betas: Array) -> tuple[float, float]:
    """Return bounds of the eigenvalues of a tridiagonal matrix, a thousandth of its norm or less beyond them."""
    count, norm = len(alphas), np.abs(alphas).max() + 2 * betas.max(initial=0.0)
    if count == 1:
        return alphas[0], alphas[0]
    least, largest = (dstebz(alphas, betas, 2, 0.0, 0.0, end, end, 1e-3 * norm, "E")[1][0] for end in (1, count))
    return least - 1e-3 * norm, largest + 1e-3 * norm
