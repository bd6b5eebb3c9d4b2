"""Invariants of the Lanczos process, which hold up to rounding for any matrix."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from matrices import matrix
from scipy.sparse.linalg import LinearOperator, aslinearoperator

from curvop import SubmatrixLinearOperator
from curvop.spectrum import eigsh
from curvop.spectrum.lanczos import Lanczos, gauss_rules, multiply, runs_at_once

SPECTRA = {
    "uniform": np.linspace(-1, 1, 200),
    "outliers": np.r_[np.linspace(0, 1e-2, 190), np.linspace(5, 50, 10)],
    "far outliers": np.r_[np.linspace(0, 1, 190), 1e6 * np.arange(1, 11)],
    "decaying": np.logspace(-12, 2, 200),
    "negative": -np.logspace(-3, 3, 200),
    "deficient": np.r_[np.zeros(180), np.arange(1, 21)],
    "clusters": np.repeat([0.0, 1.0, 1.0 + 1e-9, 5.0], 50),
}


def run(A, num_steps: int, count: int = 3, seed: int = 0, deflated: torch.Tensor | None = None) -> Lanczos:
    starts = torch.from_numpy(np.random.default_rng(seed).normal(size=(count, A.shape[0])))
    if deflated is not None:
        starts -= (starts @ deflated.T) @ deflated
    lanczos = Lanczos(aslinearoperator(A), starts, num_steps, deflated)
    while lanczos.running:
        lanczos.step()
    return lanczos


def tridiagonal(alphas: np.ndarray, betas: np.ndarray) -> np.ndarray:
    """Return the tridiagonal matrix of a run of ``len(alphas)`` steps."""
    off = betas[: len(alphas) - 1]
    return np.diag(alphas) + np.diag(off, 1) + np.diag(off, -1)


def error_of_projection(A: np.ndarray, Q: np.ndarray, T: np.ndarray) -> float:
    """Return the largest difference of T from the projection of A onto the span of Q, in an exactly orthonormal basis.

    The basis is computed by a QR factorization, whose vectors differ from the columns of Q only by their loss of
    orthogonality.
    """
    V, R = np.linalg.qr(Q.astype(np.float64))
    V = V * np.sign(np.diag(R))
    return float(np.abs(V.T @ A @ V - T).max())


def check_invariants(A: np.ndarray, lanczos: Lanczos) -> None:
    scale = max(np.abs(np.linalg.eigvalsh(A)).max(), np.finfo(float).tiny)
    for basis, alphas, betas, length in zip(
        lanczos.basis.numpy(), lanczos.alphas, lanczos.betas, lanczos.lengths, strict=True
    ):
        Q = basis[:length].T
        assert np.abs(Q.T @ Q - np.eye(length)).max() < np.finfo(float).eps ** 0.5
        T = tridiagonal(alphas[:length], betas)
        assert error_of_projection(A, Q, T) < 1e-12 * scale  # although Q is orthonormal to 1e-8 only
        rest = np.zeros_like(Q)
        rest[:, -1] = betas[length - 1] * basis[length]
        # Orthogonalizing a vector removes a loss that the recurrence does not contain.
        assert np.abs(A @ Q - Q @ T - rest).max() < np.finfo(float).eps ** 0.5 * scale


@pytest.mark.parametrize("name", SPECTRA)
def test_the_recurrence_and_its_orthogonality(name: str) -> None:
    A = matrix(SPECTRA[name])
    check_invariants(A, run(A, 100))


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 25), st.integers(1, 25), st.integers(1, 4), st.integers(0, 1000), st.floats(-8, 8))
def test_the_invariants_of_random_matrices(n: int, num_steps: int, count: int, seed: int, exponent: float) -> None:
    values = np.random.default_rng(seed).choice([0.0, 1.0, 2.0, *np.random.default_rng(seed).normal(size=n)], n)
    A = matrix(values * 10.0**exponent, seed)
    check_invariants(A, run(A, min(n, num_steps), count, seed))


def test_it_stops_at_an_invariant_subspace() -> None:
    A = matrix([*np.zeros(180), *np.arange(1.0, 21)])
    lanczos = run(A, 100)
    assert set(lanczos.lengths) <= {21, 22}
    nodes, weights = gauss_rules(lanczos.alphas, lanczos.betas, lanczos.lengths)
    for row, own, length in zip(nodes, weights, lanczos.lengths, strict=True):
        np.testing.assert_allclose(np.sort(row[:length][own[:length] > 1e-12])[-20:], np.arange(1, 21), rtol=1e-10)
        assert not own[length:].any()
        assert own.sum() == pytest.approx(1)


def test_runs_that_stop_at_different_steps() -> None:
    """A run in an invariant subspace stops, while the others continue. A stopped run takes no products."""
    A, units = np.diag(np.arange(1.0, 31)), np.eye(30)
    widths = []

    def product(X: np.ndarray) -> np.ndarray:
        widths.append(X.shape[1])
        return A @ X

    operator = LinearOperator((30, 30), matvec=lambda x: product(x.reshape(30, 1)), matmat=product, dtype=float)
    starts = torch.from_numpy(np.stack([units[0] + units[1], np.ones(30), units[5]]))
    lanczos = Lanczos(operator, starts, 10)
    while lanczos.running:
        lanczos.step()
    assert lanczos.lengths.tolist() == [2, 10, 1]
    assert widths == [3, 2] + [1] * 8
    nodes, weights = gauss_rules(lanczos.alphas, lanczos.betas, lanczos.lengths)
    np.testing.assert_allclose(nodes[0, :2], [1, 2])
    np.testing.assert_allclose(weights[0, :2], [0.5, 0.5])
    assert (nodes[2, 0], weights[2, 0]) == (pytest.approx(6), pytest.approx(1))


def test_the_zero_matrix() -> None:
    lanczos = run(np.zeros((5, 5)), 3)
    assert set(lanczos.lengths) == {1}
    assert not lanczos.alphas.any()


@pytest.mark.parametrize("name", SPECTRA)
def test_in_single_precision(name: str) -> None:
    A = matrix(SPECTRA[name]).astype(np.float32)
    lanczos = run(A, 60)
    assert lanczos.basis.dtype == torch.float32
    scale, eps = np.abs(SPECTRA[name]).max(), np.finfo(np.float32).eps
    for index, length in enumerate(lanczos.lengths):
        basis = lanczos.basis[index, :length].double().numpy()
        assert np.abs(basis @ basis.T - np.eye(length)).max() < eps**0.5
        T = tridiagonal(lanczos.alphas[index, :length], lanczos.betas[index])
        assert error_of_projection(A.astype(np.float64), basis.T, T) < 30 * eps * scale
    nodes, weights = gauss_rules(lanczos.alphas, lanczos.betas, lanczos.lengths)
    assert np.abs(nodes[weights > 0]).max() == pytest.approx(scale, rel=1e-3)


def test_deflated_vectors_stay_out() -> None:
    A = matrix(SPECTRA["outliers"])
    values, vectors = np.linalg.eigh(A)
    known = torch.from_numpy(np.ascontiguousarray(vectors[:, -10:].T))
    lanczos = run(A, 60, deflated=known)
    assert np.abs(lanczos.basis.numpy() @ known.numpy().T).max() < 1e-13
    assert gauss_rules(lanczos.alphas, lanczos.betas, lanczos.lengths)[0].max() < 1.01e-2
    check_invariants(A - (vectors[:, -10:] * values[-10:]) @ vectors[:, -10:].T, lanczos)


def test_products_of_operators_that_only_take_arrays() -> None:
    A = matrix(np.arange(1.0, 7))
    part = SubmatrixLinearOperator(aslinearoperator(A), [0, 2], [0, 2])
    rows = torch.eye(2, dtype=torch.float64)
    np.testing.assert_allclose(multiply(part, rows).numpy(), A[np.ix_([0, 2], [0, 2])])


def test_an_operator_that_returns_its_argument() -> None:
    identity = LinearOperator((6, 6), matvec=lambda x: x, matmat=lambda X: X, dtype=float)
    rows = torch.eye(6, dtype=torch.float64)[:2]
    assert multiply(identity, rows).data_ptr() != rows.data_ptr()
    found = eigsh(LinearOperator((60, 60), matvec=lambda x: x, matmat=lambda X: X, dtype=float), 3, method="lanczos")
    assert found.ok


def test_memory_is_checked_first() -> None:
    A = aslinearoperator(np.eye(1000))
    assert runs_at_once(A, 8, 60, memory=3 * 8 * 1000 * 66) == 3
    assert runs_at_once(A, 2, 60, memory=10**9) == 2
    with pytest.raises(MemoryError, match=r"60 vectors of 1,000 numbers, takes 0\.000528 GB.*fewer num_steps"):
        runs_at_once(A, 8, 60, memory=1000)


@pytest.mark.parametrize("seed", range(20))
def test_products_that_become_noisy_do_not_spoil_the_basis(seed: int) -> None:
    """The size of rounding is estimated in the first steps, which are exact here."""
    rng = np.random.default_rng(seed)
    values, quiet, calls = np.r_[rng.uniform(0, 0.05, 194), rng.uniform(0.5, 3, 6)], int(rng.integers(3, 30)), []

    def multiply(X: np.ndarray) -> np.ndarray:
        calls.append(X)
        noise = 10.0 ** rng.uniform(-9, -4) if len(calls) > quiet else 0.0
        return (values * X.T).T + noise * rng.normal(size=X.shape) / len(X) ** 0.5

    lanczos = run(LinearOperator((200, 200), matvec=multiply, matmat=multiply, dtype=np.float64), 64, count=1)
    basis = lanczos.basis[0, : lanczos.lengths[0]].numpy()
    assert np.abs(basis @ basis.T - np.eye(len(basis))).max() < np.finfo(float).eps ** 0.5
