"""Spectral analysis: eigenvalues, densities, traces, norms, functions of matrices, blocks, tracking in training.

All functions except `blocks` take any real symmetric SciPy ``LinearOperator``, including the curvature matrices of this
package. `frobenius_norm` also takes rectangular operators.
"""

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
