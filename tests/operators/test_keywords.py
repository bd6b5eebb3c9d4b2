"""Keywords of other packages: the error names the keyword of this package."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from curvop import HessianLinearOperator, InverseLinearOperator, JacobianLinearOperator, check, solve, spectrum

torch.manual_seed(0)
MODEL = nn.Sequential(nn.Linear(4, 12), nn.Tanh(), nn.Linear(12, 3)).double()
LOSS = nn.CrossEntropyLoss()
DATA = [(torch.randn(20, 4).double(), torch.randint(3, (20,)))]
PARAMS = dict(MODEL.named_parameters())
H = HessianLinearOperator(MODEL, LOSS, PARAMS, DATA)
DENSE = H.to_dense()
VALUES = np.linalg.eigvalsh(DENSE)


class TestDefaults:
    """Every study needs the operator only."""

    def test_trace(self) -> None:
        assert abs(spectrum.trace(H).value - VALUES.sum()) < 10 * spectrum.trace(H).error

    def test_diagonal(self) -> None:
        assert spectrum.diagonal(H).value.shape == (len(VALUES),)

    def test_frobenius_norm(self) -> None:
        found = spectrum.frobenius_norm(H)
        assert abs(found.value - np.linalg.norm(DENSE)) < 10 * found.error

    def test_density(self) -> None:
        found = spectrum.density(H)
        assert found.num_products <= 8 * 64
        assert abs(found.trace().value - VALUES.sum()) < 10 * found.trace().error

    def test_six_largest_eigenvalues(self) -> None:
        np.testing.assert_allclose(spectrum.eigsh(H).values, VALUES[-6:])


class TestNumberOfTestVectors:
    @pytest.mark.parametrize("estimate", [spectrum.trace, spectrum.diagonal, spectrum.frobenius_norm])
    @pytest.mark.parametrize("probes", [1, 2, 3, 10])
    def test_each_takes_two_products(self, estimate: Callable[..., Any], probes: int) -> None:
        before = H.num_products
        found = estimate(H, num_probes=probes, rng=0)
        assert H.num_products - before == 2 * probes
        expected = estimate(H, 2 * probes, rng=0)
        np.testing.assert_array_equal(found.value, expected.value)
        assert found.method == expected.method

    @pytest.mark.parametrize("estimate", [spectrum.trace, spectrum.diagonal, spectrum.frobenius_norm])
    def test_not_both(self, estimate: Callable[..., Any]) -> None:
        with pytest.raises(TypeError, match="num_products is 20 and num_probes is 5: pass only one"):
            estimate(H, 20, num_probes=5)
        with pytest.raises(ValueError, match="num_probes is 0, but must be an integer >= 1"):
            estimate(H, num_probes=0)


CALLS: dict[str, tuple[Callable[..., Any], tuple[Any, ...]]] = {
    "trace": (spectrum.trace, (H,)),
    "diagonal": (spectrum.diagonal, (H,)),
    "frobenius_norm": (spectrum.frobenius_norm, (H,)),
    "density": (spectrum.density, (H,)),
    "eigsh": (spectrum.eigsh, (H,)),
    "blocks": (spectrum.blocks, (H,)),
    "track": (spectrum.track, (H,)),
    "apply": (spectrum.apply, (H, "exp", np.ones(len(VALUES)))),
    "certify": (spectrum.certify, (H, VALUES[-1:], np.ones((len(VALUES), 1)))),
    "solve": (solve, (H, np.ones(len(VALUES)), 1.0)),
    "check": (check, (H,)),
    "InverseLinearOperator": (InverseLinearOperator, (H, 1.0)),
    "HessianLinearOperator": (HessianLinearOperator, (MODEL, LOSS, PARAMS, DATA)),
    "JacobianLinearOperator": (JacobianLinearOperator, (MODEL, PARAMS, DATA)),
}


@pytest.mark.parametrize(
    ("name", "keyword", "remedy"),
    [
        # PyHessian: eigenvalues(maxIter, tol, top_n), trace(maxIter, tol), density(iter, n_v)
        ("eigsh", "maxIter", "pass maxiter="),
        ("eigsh", "top_n", "pass k="),
        ("trace", "maxIter", "pass num_probes="),
        ("trace", "tol", "leave it out: the result has an error bar"),
        ("density", "iter", "pass num_steps="),
        ("density", "n_v", "pass num_probes="),
        ("HessianLinearOperator", "criterion", "pass loss_function="),
        ("HessianLinearOperator", "dataloader", "pass data="),
        ("HessianLinearOperator", "cuda", "leave it out: products are computed on the device of the parameters"),
        # hessian-eigenthings
        ("eigsh", "num_eigenthings", "pass k="),
        ("eigsh", "power_iter_steps", "pass maxiter="),
        ("eigsh", "mode", "pass method="),
        ("eigsh", "max_iter", "pass maxiter="),
        ("eigsh", "seed", "pass rng="),
        ("trace", "num_matvecs", "pass num_products="),
        ("trace", "distribution", "leave it out: the distribution"),
        ("density", "num_runs", "pass num_probes="),
        ("density", "lanczos_steps", "pass num_steps="),
        ("HessianLinearOperator", "loss_fn", "pass loss_function="),
        ("HessianLinearOperator", "param_filter", "pass params=, for example the dict that curvop.select"),
        # curvlinops
        ("density", "ncv", "pass num_steps="),
        ("density", "num_repeats", "pass num_probes="),
        ("diagonal", "num_matvecs", "pass num_products="),
        ("frobenius_norm", "num_matvecs", "pass num_products="),
        ("InverseLinearOperator", "max_iter", "pass maxiter="),
        ("InverseLinearOperator", "tolerance", "pass rtol="),
        # matfree
        ("density", "num_matvecs", "pass num_steps="),
        ("trace", "num_samples", "pass num_probes="),
        ("trace", "key", "pass rng="),
        # SciPy and torch
        ("eigsh", "return_eigenvectors", r"leave it out: values, vectors = eigsh\(\.\.\.\) returns both"),
        ("eigsh", "sigma", "leave it out: eigenvalues inside the spectrum"),
        ("density", "sigma", "pass it to the method pdf or plot of the density"),
        ("eigsh", "x0", "pass v0="),
        # Advice for one function does not fit another.
        ("track", "seed", "known are A, k, every"),
        ("track", "sigma", "known are A, k, every"),
        ("check", "tol", "known are A, "),
        ("HessianLinearOperator", "tol", "known are model, "),
        ("eigsh", "niter", "pass maxiter="),
        ("eigsh", "largest", "pass which=, 'LA' for the largest"),
        ("solve", "M", "pass preconditioner="),
        ("solve", "tol", "pass rtol="),
        ("solve", "damp", "pass damping=, which is added to the matrix and is not squared"),
        ("solve", "shift", r"pass damping=, which has the opposite sign: SciPy subtracts shift \* I"),
        ("apply", "k", "known are A, f, b"),
        ("density", "k", "pass deflate=, the number of eigenvalues"),
        ("certify", "rtol", "pass tol="),
        ("track", "top_n", "pass k="),
        ("check", "num_vecs", "pass num_probes="),
        ("blocks", "num_vecs", "pass num_probes="),
        ("trace", "num_vecs", "pass num_probes="),
        # Misspelt keywords of this package
        ("trace", "num_prodcts", r"did you mean num_products=\?"),
        ("blocks", "group", r"did you mean groups=\?"),
        ("JacobianLinearOperator", "dtypes", r"did you mean dtype=\?"),
    ],
)
def test_the_error_names_our_keyword(name: str, keyword: str, remedy: str) -> None:
    call, args = CALLS[name]
    before = H.num_products
    with pytest.raises(TypeError, match=rf"^{name} got an unexpected keyword argument '{keyword}': {remedy}"):
        call(*args, **{keyword: 1})
    assert H.num_products == before


def test_a_missing_argument() -> None:
    with pytest.raises(TypeError, match=r"^solve: missing a required argument: 'damping'; pass A, b, damping, rtol"):
        solve(H, np.ones(len(VALUES)))
    with pytest.raises(TypeError, match=r"^trace: missing a required argument: 'A'"):
        spectrum.trace()


def test_names_and_signatures_stay() -> None:
    assert spectrum.density.__name__ == "density"
    assert list(inspect.signature(spectrum.eigsh).parameters)[:4] == ["A", "k", "which", "method"]
    assert inspect.signature(spectrum.eigsh).parameters["k"].default == 6
