"""The results of ``curvop spectrum`` for matrices with closed forms, without estimates."""

from __future__ import annotations

import argparse
import dataclasses

import numpy as np

from curvop.checks.compare import groups_of
from curvop.cli.spectrum_results import StudyResults
from curvop.operators.kronecker import KroneckerFactoredLinearOperator
from curvop.spectrum.blocks import BlockStudy
from curvop.spectrum.certificate import certify
from curvop.spectrum.eigen import EigenResult
from curvop.spectrum.estimators import Estimate
from curvop.spectrum.lanczos import resolution
from curvop.spectrum.spectral_density import SpectralDensity

__all__ = ["add_closed_forms"]


def add_closed_forms(results: StudyResults, A: KroneckerFactoredLinearOperator, options: argparse.Namespace) -> None:
    """Add eigenvalues, density, trace, norm and, if requested, blocks of a Kronecker-factored matrix to the results.

    The products with `A` that bound the errors of the eigenpairs are the only ones.
    """
    results.ends = [_largest(A, min(options.k, A.shape[0]))]
    results.density = _density(A)
    results.trace = Estimate(A.trace(), 0.0, "closed form")
    results.norm = Estimate(A.frobenius_norm(), 0.0, "closed form")
    if options.blocks:
        results.blocks = _blocks(A)


def _largest(A: KroneckerFactoredLinearOperator, k: int) -> EigenResult:
    """Return the largest eigenpairs. As all eigenvalues are known, there is no search for missed ones."""
    values, vectors = A.largest_eigenpairs(k)
    found = certify(A, values, vectors, progress=False)
    certificate = dataclasses.replace(found, which="LA", resolution=0.0)
    return EigenResult(values, vectors, certificate, True, found.products, "closed form", "LA", k, num_converged=k)


def _density(A: KroneckerFactoredLinearOperator) -> SpectralDensity:
    values, empty = A.eigenvalues().values, np.zeros((0, 0))
    return SpectralDensity(len(values), empty, empty, values, 0, resolution=resolution(A) * float(values[-1]))


def _blocks(A: KroneckerFactoredLinearOperator) -> BlockStudy:
    """Return the spectra of the diagonal blocks. The other blocks are zero."""
    blocks = {name: A.block(names) for name, names in (groups_of(A) or {}).items()}
    norms = np.diag([block.frobenius_norm() for block in blocks.values()])
    sizes = np.array([block.shape[0] for block in blocks.values()])
    densities = [_density(block) for block in blocks.values()]
    return BlockStudy(list(blocks), sizes, densities, norms, np.zeros_like(norms), 0)
