"""Spectral analysis: eigenvalues, densities, traces, norms, functions of matrices, blocks, tracking in training.

All functions except `blocks` take any real symmetric SciPy ``LinearOperator``, including the curvature matrices of this
package. `frobenius_norm` also takes rectangular operators.
"""

from typing import TYPE_CHECKING

from curvop.spectrum.blocks import BlockStudy, blocks
from curvop.spectrum.certificate import Certificate, certify
from curvop.spectrum.density import density
from curvop.spectrum.eigen import EigenResult, eigsh
from curvop.spectrum.estimators import BoundedEstimate, Estimate, diagonal, frobenius_norm, trace
from curvop.spectrum.matrix_functions import ApplyResult, apply
from curvop.spectrum.spectral_density import SpectralDensity
from curvop.spectrum.track import Tracker, track

__all__ = [
    "ApplyResult",
    "BlockStudy",
    "BoundedEstimate",
    "Certificate",
    "EigenResult",
    "Estimate",
    "SpectralDensity",
    "Tracker",
    "apply",
    "blocks",
    "certify",
    "density",
    "diagonal",
    "eigsh",
    "frobenius_norm",
    "trace",
    "track",
]


def __dir__() -> list[str]:
    """Return the list of public names for tab completion."""
    return __all__


#: What other packages call the functions and methods of this module.
_ELSEWHERE = {
    **dict.fromkeys(("eigenvalues", "eigs", "eigh"), "curvop.spectrum.eigsh(A, k)"),
    **dict.fromkeys(("norm", "frobenius"), "curvop.spectrum.frobenius_norm(A)"),
    "slq": "curvop.spectrum.density(A)",
    "load": "the method of the class, for example curvop.spectrum.EigenResult.load(path)",
}

if not TYPE_CHECKING:  # otherwise, type checkers would accept any name

    def __getattr__(name: str) -> object:
        """Raise an ``AttributeError`` that says what to use instead of a name of another package."""
        place = f": use {_ELSEWHERE[name]}" if name in _ELSEWHERE else ""
        raise AttributeError(f"module 'curvop.spectrum' has no attribute {name!r}{place}")
