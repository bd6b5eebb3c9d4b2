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
from numpy.typing import NDArray
from scipy.linalg import eigvalsh_tridiagonal

__all__ = ["OrthogonalityBound"]

Array = NDArray[Any]

# In units of the precision: the bound at which the basis is looked at, what is left in if it is seen then, and what
# rounding alone may leave.
_LOOK, _CLEAN, _FRESH = 300.0, 30.0, 10.0
_FIRST_STEPS = 3  # show what rounding leaves, in the products as well


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

    def of_next(self, run: int, alphas: Array, betas: Array, norm: float) -> float:
        """Bound the loss of the next vector, of this norm as yet, after j steps of a run.

        Parameters
        ----------
        alphas, betas : ndarray, shapes (j,) and (j - 1,)
            Of the tridiagonal matrix.
        """
        before, last, fresh, _ = self.state[run]
        alphas, betas = alphas / norm, betas / norm  # LAPACK squares them
        low, high = (
            eigvalsh_tridiagonal(alphas, betas, select="i", select_range=(end, end))[0] for end in (0, len(alphas) - 1)
        )
        spread = max(high - alphas[-1], alphas[-1] - low)
        coupling = betas[-1] if len(betas) else 0.0
        return float(spread * last + coupling * before + fresh)

    def is_low(self, run: int, steps: int, bound: float, sample: float) -> bool:
        """Whether no look is due; the bound is then what is known of the next vector.

        `sample` is its product with one vector of the basis: where it is beyond the bound, the operator's products have
        become less exact than they were, of which no recurrence knows.
        """
        _, last, fresh, due = self.state[run]
        if steps <= _FIRST_STEPS or due or not sample <= bound <= _LOOK * self._eps:
            return False
        self.state[run] = last, bound, fresh, due
        return True

    def needs_cleaning(self, run: int, steps: int, bound: float, last: float, found: float) -> bool:
        """Take in the losses of the last vector and of the next as a look has shown them; say what to do."""
        _, _, fresh, due = self.state[run]
        first = steps <= _FIRST_STEPS
        if first or found > bound:  # products are less exact than the precision
            fresh = max(fresh, found)
        clean = first or bool(due) or max(last, found) > _CLEAN * self._eps
        # What is wrong with the last vector goes over to the one after the next: two in turn are cleaned.
        due = clean and not first and not due
        self.state[run] = max(last, fresh), fresh if clean else max(found, fresh), fresh, due
        return clean
