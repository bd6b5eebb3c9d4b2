"""Names that users of other packages try lead to the right name."""

from __future__ import annotations

import copy
import pickle

import numpy as np
import pytest

import curvop
from curvop import spectrum


@pytest.mark.parametrize(
    ("module", "name", "remedy"),
    [
        (curvop, "trace", "curvop.spectrum.trace"),
        (curvop, "density", "curvop.spectrum.density"),
        (spectrum, "eigenvalues", r"curvop.spectrum.eigsh\(A, k\)"),
        (spectrum, "norm", r"curvop.spectrum.frobenius_norm\(A\)"),
        (spectrum, "load", r"the method of the class, for example curvop.spectrum.EigenResult.load\(path\)"),
    ],
)
def test_the_error_of_a_module_says_what_to_use(module, name, remedy) -> None:
    with pytest.raises(AttributeError, match=f"^module '{module.__name__}' has no attribute '{name}': use {remedy}$"):
        getattr(module, name)
    assert name not in dir(module)
    with pytest.raises(AttributeError, match=f"^module '{module.__name__}' has no attribute 'tracee'$"):
        module.tracee  # noqa: B018


@pytest.mark.parametrize(
    ("name", "remedy"),
    [
        ("eigenvalues", "values"),
        ("eigenvectors", "vectors"),
        ("bounds", "certificate.bounds"),
        ("errors", "certificate.bounds"),
        ("residuals", "certificate.residuals"),
    ],
)
def test_the_error_of_a_result_says_what_to_use(name, remedy) -> None:
    found = spectrum.eigsh(np.diag(np.arange(9.0)), 2, progress=False)
    for result in (found, copy.copy(found), pickle.loads(pickle.dumps(found))):
        with pytest.raises(AttributeError, match=f"^an EigenResult has no attribute '{name}': use {remedy}$"):
            getattr(result, name)
        with pytest.raises(AttributeError, match=r"^'EigenResult' object has no attribute 'value'$"):
            result.value  # noqa: B018
