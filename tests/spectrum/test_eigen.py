"""Every method of `eigsh` finds the right eigenvalues, or reports that it did not."""

from __future__ import annotations

import dataclasses
import pickle
import re
import time
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.sparse import diags_array
from scipy.sparse.linalg import LinearOperator, aslinearoperator
from torch import nn

from curvop import GGNLinearOperator, HessianLinearOperator
from curvop.examples.functorch import functorch_hessian
from curvop.problems import digits
from curvop.spectrum import certify, density, eigen
from curvop.spectrum.eigen import EigenResult

CLUSTERED = [1.0, 1.0, 1.0, 0.5, 0.4, *np.linspace(-0.1, 0.1, 295), -0.3, -0.3, -0.6]


def eigsh(A, *args, **options) -> EigenResult:
    return eigen.eigsh(A, *args, progress=False, **options)


def matrix(eigenvalues, seed: int = 0) -> np.ndarray:
    """Return a symmetric matrix with these eigenvalues."""
    n = len(eigenvalues)
    Q = np.linalg.qr(np.random.default_rng(seed).normal(size=(n, n)))[0]
    A = (Q * np.asarray(eigenvalues)) @ Q.T
    return (A + A.T) / 2


def expected(eigenvalues, k: int, which: str) -> np.ndarray:
    """Return the requested eigenvalues in ascending order."""
    values = np.sort(eigenvalues)
    if which == "BE":
        return np.r_[values[: k // 2], values[len(values) - (k - k // 2) :]]
    key = {"LA": -values, "SA": values, "LM": -np.abs(values), "SM": np.abs(values)}[which]
    return np.sort(values[np.argsort(key)][:k])


def magnitudes(values) -> np.ndarray:
    """Return the absolute values in ascending order. For 'LM' and 'SM', either of two opposite values may be found."""
    return np.sort(np.abs(values))


@pytest.fixture(scope="module")
def clustered() -> np.ndarray:
    return matrix(CLUSTERED)


class TestMethods:
    @pytest.mark.parametrize("method", ["arpack", "lanczos"])
    @pytest.mark.parametrize("which", ["LA", "SA", "LM", "BE"])
    def test_lanczos(self, clustered, which: str, method: str) -> None:
        result = eigsh(clustered, 5, which, ncv=60, method=method)
        assert result.ok
        assert (result.method, result.which, result.wanted, result.note) == (method, which, 5, "")
        np.testing.assert_allclose(result.values, expected(CLUSTERED, 5, which), atol=1e-13)
        assert result.certificate.bounds.max() < 1e-13
        np.testing.assert_allclose(clustered @ result.vectors, result.vectors * result.values, atol=1e-13)

    def test_the_smallest_in_magnitude(self) -> None:
        eigenvalues = [0.1, -0.2, *np.linspace(1, 2, 60)]
        result = eigsh(matrix(eigenvalues), 2, "SM")
        assert result.ok
        np.testing.assert_allclose(result.values, [-0.2, 0.1], atol=1e-12)
        assert result.certificate.resolution is None

    @pytest.mark.parametrize("which", ["LA", "SA"])
    @pytest.mark.parametrize("scale", [1e-20, 1.0, 1e20])
    def test_lobpcg(self, clustered, which: str, scale: float) -> None:
        """SciPy's limits are absolute, but the scale must not matter."""
        result = eigsh(clustered * scale, 3, which, method="lobpcg")
        assert result.ok
        assert result.method == "lobpcg"
        np.testing.assert_allclose(result.values, scale * expected(CLUSTERED, 3, which), atol=1e-12 * scale)
        assert result.certificate.bounds.max() < 1e-9 * scale

    def test_lobpcg_multiplies_blocks(self, clustered) -> None:
        """Only the norm and the noise are measured with a few single vectors."""
        singles, widths = [], []

        def single(x):
            singles.append(x)
            return clustered @ x

        def block(X):
            widths.append(X.shape[1])
            return clustered @ X

        A = LinearOperator(clustered.shape, matvec=single, matmat=block, dtype=float)
        result = eigsh(A, 3, method="lobpcg", certificate=False)
        assert max(widths) == 5
        assert sum(widths) + len(singles) == result.products
        assert len(singles) < 12 < len(widths)

    @pytest.mark.parametrize("which", ["LA", "SA", "LM", "SM", "BE"])
    def test_dense(self, clustered, which: str) -> None:
        result = eigsh(clustered, 4, which, method="dense")
        assert result.ok
        np.testing.assert_allclose(magnitudes(result.values), magnitudes(expected(CLUSTERED, 4, which)), atol=1e-13)

    @settings(max_examples=60, deadline=None)
    @given(st.data())
    def test_small_matrices(self, data) -> None:
        """Sizes that ARPACK and LOBPCG do not support are included."""
        size = data.draw(st.integers(1, 40))
        k = data.draw(st.integers(1, size))
        method = data.draw(st.sampled_from(["arpack", "lobpcg", "lanczos"]))
        which = data.draw(st.sampled_from(["LA", "SA"] if method == "lobpcg" else ["LA", "SA", "LM"]))
        eigenvalues = np.random.default_rng(data.draw(st.integers(0, 100))).choice([-2.0, -1, 0, 0.5, 1, 2, 3], size)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)
            result = eigsh(matrix(eigenvalues), k, which, method=method)
        wanted = magnitudes(expected(eigenvalues, k, which))
        right = len(result.values) == k and np.allclose(magnitudes(result.values), wanted, atol=1e-8)
        assert (np.diff(result.values) >= 0).all()
        # Solvers do miss members of such clusters (scipy#26112), but the certificate reports it.
        assert right or not result.ok
        assert result.ok or not (right and result.converged)

    def test_an_eigenvalue_that_arpack_misses_is_reported_without_a_repair(self, monkeypatch) -> None:
        monkeypatch.setattr(eigen.EigenRepair, "__call__", lambda *_: None)
        eigenvalues = np.random.default_rng(36).choice([-2.0, -1, 0, 0.5, 1, 2, 3], 35)
        with pytest.warns(RuntimeWarning, match="an eigenvalue at 3 or beyond was missed"):
            result = eigsh(matrix(eigenvalues), 7, "LA")
        assert (eigenvalues == 3).sum() > (result.values > 2.9).sum()

    def test_small_matrices_are_formed_with_a_note(self) -> None:
        A = matrix(np.arange(20.0))
        assert (eigsh(A, 20).method, eigsh(A, 3).method) == ("dense", "dense")
        assert "the whole space" in str(eigsh(A, 3))
        assert eigsh(A, 5, method="lobpcg").note == "lobpcg needs N >= 5 k, but N is 20 and k is 5"

    @pytest.mark.slow
    def test_many_eigenvalues_of_a_large_matrix(self) -> None:
        result = eigsh(diags_array(np.arange(2100.0)).tocsr(), 430, method="lobpcg", tol=1e-3, certificate=False)
        assert result.method == "arpack"
        assert "lobpcg needs N >= 5 k" in result.note

    @pytest.mark.parametrize("method", ["arpack", "lobpcg", "lanczos"])
    def test_the_zero_matrix(self, method: str) -> None:
        result = eigsh(np.zeros((100, 100)), 3, method=method)
        assert result.ok
        assert not result.values.any()
        assert result.note == "the matrix is zero"

    @pytest.mark.parametrize("which", ["LA", "SA", "LM"])
    def test_few_distinct_eigenvalues(self, which: str) -> None:
        for eigenvalues in (
            np.ones(100),
            [3.0, 2.0, *np.zeros(98)],
            [100.0, *np.zeros(99)],
            [*-np.ones(50), *np.ones(50)],
        ):
            result = eigsh(matrix(eigenvalues), 5, which)
            assert result.ok
            np.testing.assert_allclose(
                magnitudes(result.values), magnitudes(expected(eigenvalues, 5, which)), atol=1e-11
            )

    @pytest.mark.parametrize("method", ["arpack", "lobpcg", "lanczos"])
    def test_starting_vector(self, clustered, method: str) -> None:
        vector = np.linalg.eigh(clustered)[1][:, -1]
        result = eigsh(clustered, 3, v0=vector + 1e-3, method=method, certificate=False)
        np.testing.assert_allclose(result.values, [1, 1, 1], atol=1e-9)

    def test_a_start_in_the_null_space(self) -> None:
        """ARPACK cannot continue from such a start, and reports that it is zero."""
        result = eigsh(np.diag([*np.arange(99.0), 0.0]), 3, v0=np.eye(100)[99])
        assert result.ok
        np.testing.assert_allclose(result.values, [96, 97, 98])

    def test_integers_and_single_precision(self, clustered) -> None:
        assert eigsh(np.diag(np.arange(50)), 3).ok
        A = clustered.astype(np.float32)
        result = eigsh(A, 5)
        assert result.ok
        assert result.vectors.dtype == np.float32
        assert result.values.dtype == np.float64
        assert 1e-9 < result.certificate.bounds.max() < 1e-5
        assert eigsh(A, 5, method="lobpcg").certificate.bounds.max() < 1e-9  # LOBPCG's vectors are in double precision


class TestMissed:
    """Solvers miss members of clusters (scipy#26112). The certificate notices it, and `eigsh` repairs the result."""

    def test_a_broken_triple_is_repaired(self) -> None:
        """ARPACK converges but misses one of three eigenvalues. The default settings find all."""
        triple = [1.00589290, 1.00589283, 1.00589219]
        top = [1.1, 1.08, 1.05, 1.03, 1.01, *triple, 0.993, 0.992]
        A = diags_array(np.r_[top, np.linspace(0.991, 0, 4990)]).tocsr()
        start = np.random.default_rng(0).random(5000)
        coarse = {"tol": 1e-3, "ncv": 20, "v0": start}
        missed = eigsh(A, 8, **coarse, certificate=False)
        assert missed.converged
        assert missed.values.min() < 1
        result = eigsh(A, 8, **coarse)
        assert result.ok
        assert result.note == "1 missed eigenvalue found by the search"
        assert (np.abs(result.values - top[7::-1]) <= result.certificate.bounds).all()
        assert result.certificate.bounds.max() < 1e-3
        result = eigsh(A, 8)
        assert (result.ok, result.note) == (True, "")
        np.testing.assert_allclose(result.values[:3], triple[::-1], atol=1e-10)

    @pytest.mark.parametrize("which", ["LM", "BE"])
    def test_arpack_misses_a_member_of_an_exact_triple(self, clustered, which: str) -> None:
        """Only rounding brings in the second and third vector of an exact triple, and it often does so too late."""
        right, wrong = expected(CLUSTERED, 5, which), 0
        for seed in range(6):
            plain = eigsh(clustered, 5, which, rng=seed, certificate=False)
            complete = np.allclose(plain.values, right, atol=1e-9)
            result = eigsh(clustered, 5, which, rng=seed)
            assert result.ok
            assert ("missed" in result.note) == (not complete)
            np.testing.assert_allclose(result.values, right, atol=1e-13)
            np.testing.assert_allclose(clustered @ result.vectors, result.vectors * result.values, atol=1e-13)
            np.testing.assert_allclose(result.vectors.T @ result.vectors, np.eye(5), atol=1e-13)
            assert result.certificate.bounds.max() < 1e-13
            wrong += not complete
        assert wrong > 0


class TestWithoutConvergence:
    def test_arpack_returns_the_converged_eigenpairs(self) -> None:
        eigenvalues = [10.0, 9.0, *np.linspace(0, 1, 298)]
        with pytest.warns(RuntimeWarning, match="not converged: 2 of 6 eigenvalues found .increase maxiter or ncv"):
            result = eigsh(matrix(eigenvalues), 6, maxiter=1, ncv=20)
        assert not result.converged
        assert not result.ok
        np.testing.assert_allclose(result.values, [9, 10], atol=1e-9)
        assert result.vectors.shape == (300, 2)
        assert result.certificate.ok  # of the converged ones

    def test_no_eigenvalue_converges(self, clustered) -> None:
        with pytest.warns(RuntimeWarning, match=r"not converged: 0 of 3 eigenvalues found \(.* decrease k\)$"):
            result = eigsh(clustered, 3, "SM", maxiter=1)
        assert result.values.shape == (0,)
        assert result.vectors.shape == (len(clustered), 0)
        assert "0 of 3" in str(result)

    def test_partial_results_from_both_ends_are_not_searched(self) -> None:
        A = matrix([10.0, 9.0, 8.0, *np.linspace(0, 1, 297)])
        with pytest.warns(RuntimeWarning, match="not converged: 3 of 6"):
            result = eigsh(A, 6, "BE", maxiter=1, ncv=20)
        assert result.certificate.which is None
        assert result.certificate.ok

    def test_lobpcg_returns_its_current_eigenpairs(self, clustered) -> None:
        with pytest.warns(
            RuntimeWarning, match=r"not converged \(increase maxiter.*\): not certified: the error bound"
        ):
            result = eigsh(clustered, 3, "SA", method="lobpcg", maxiter=2)
        assert len(result.values) == 3
        assert not result.ok

    def test_noise_is_reported_although_arpack_converged(self, clustered) -> None:
        rng = np.random.default_rng(0)

        def noisy(x):
            product = clustered @ x
            return product * (1 + 1e-3 * rng.normal(size=product.shape))

        A = LinearOperator(clustered.shape, matvec=noisy, dtype=float)
        with pytest.warns(RuntimeWarning, match="products are accurate only to .*e-03"):
            result = eigsh(A, 3)
        assert result.converged
        assert not result.ok

    def test_asymmetry_is_reported(self, clustered) -> None:
        with pytest.warns(RuntimeWarning, match="A is not symmetric"):
            assert not eigsh(clustered + 1e-4 * np.triu(np.ones(clustered.shape)), 3).ok

    def test_without_a_certificate_nothing_is_certified(self, clustered) -> None:
        result = eigsh(clustered, 3, certificate=False)
        assert result.converged
        assert not result.ok
        assert result.verdict == "not certified: no certificate was requested"


class Clock:
    """A clock that the load of the machine does not affect: only sleeping takes time."""

    def __init__(self) -> None:
        self.now = 0.0

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """Return a clock that also measures the time limits of `eigsh`."""
    clock = Clock()
    monkeypatch.setattr("curvop.spectrum.counting.time", clock)
    return clock


class Slow(LinearOperator):
    """An operator that takes `seconds` per column, and half a second for column number `stall`."""

    def __init__(self, A, seconds: float = 0.0, stall: int = 0, clock=time) -> None:
        super().__init__(float, A.shape)
        self.inner, self.seconds, self.stall, self.products, self.clock = A, seconds, stall, 0, clock
        self.begun = self.last = clock.monotonic()

    def _matmat(self, X):
        self.last = self.clock.monotonic()
        self.products += X.shape[1]
        stalled = self.products - X.shape[1] < self.stall <= self.products
        self.clock.sleep(0.5 if stalled else self.seconds * X.shape[1])
        return self.inner @ X

    def _matvec(self, x):
        return self._matmat(x.reshape(-1, 1)).reshape(x.shape)


class TestTime:
    @pytest.mark.default_cases("BE")
    @pytest.mark.parametrize("which", ["LA", "SA", "LM", "BE"])
    def test_lanczos_returns_certified_current_eigenpairs(self, which: str) -> None:
        values = np.linspace(-1, 1, 4000) ** 3
        A = Slow(diags_array(values).tocsr(), 0.006)
        with pytest.warns(RuntimeWarning, match="not converged before time was up: . of 4 eigenvalues converged; "):
            result = eigsh(A, 4, which, method="lanczos", seconds=1.0)
        assert A.last < A.begun + 1.2  # one second after the call
        assert (result.timed_out, result.converged, result.ok) == (True, False, False)
        assert result.products == A.products
        assert result.vectors.shape == (4000, 4)
        assert result.certificate.which is None
        np.testing.assert_allclose(result.vectors.T @ result.vectors, np.eye(4), atol=1e-12)
        for value, bound in zip(result.values, result.certificate.bounds, strict=True):
            assert np.abs(values - value).min() <= bound

    @pytest.mark.parametrize("columns", [16, 18, 24, 40, 90])
    def test_partial_eigenpairs_are_certified_if_there_is_time_for_k_plus_8_products(
        self, columns: int, clock: Clock
    ) -> None:
        seconds = 1 / 32  # sums of this number are exact
        A = Slow(matrix(np.linspace(-1, 1, 600) ** 3), seconds, clock=clock)
        with pytest.warns(RuntimeWarning, match="time was up: 0 of 4"):
            result = eigsh(A, 4, method="lanczos", seconds=seconds * columns)
        assert result.certificate is not None
        assert clock.now <= seconds * columns
        assert result.products >= columns / 2

    @pytest.mark.parametrize("stall", [1, 3, 39, 40, 41, 58, 70])
    def test_time_is_up_anywhere(self, stall: int, clock: Clock) -> None:
        """During the first basis, during later ones, and right after a restart."""
        eigenvalues = np.r_[50.0, 40.0, np.linspace(0, 1, 498) ** 3]
        A = Slow(matrix(eigenvalues), stall=stall, clock=clock)
        with pytest.warns(RuntimeWarning, match="time was up"):
            result = eigsh(A, 4, method="lanczos", seconds=0.45)
        assert A.products == result.products == stall
        assert result.certificate is None
        assert result.note == "no certificate, as time was up"
        assert len(result.values) == min(result.products, 4)
        residuals = np.linalg.norm(A.inner @ result.vectors - result.vectors * result.values, axis=0)
        assert result.num_converged == (residuals < 1e-12).sum() == (0 if stall < 39 else 2)
        assert result.verdict == (
            f"not converged before time was up: {result.num_converged} of 4 eigenvalues converged; "
            "not certified: time was up"
        )
        if stall >= 39:
            np.testing.assert_allclose(result.values[-2:], [40, 50], atol=1e-12)

    @pytest.mark.parametrize("method", ["arpack", "lanczos"])
    @pytest.mark.parametrize("more", [0, 3, 7])
    def test_converged_eigenpairs_are_kept_if_there_is_no_time_for_a_certificate(
        self, method: str, more: int, clock: Clock
    ) -> None:
        A = matrix([5.0, 4.0, 3.0, *np.linspace(0, 1, 497)])
        needed = eigsh(A, 3, method=method, certificate=False).products
        with pytest.warns(RuntimeWarning, match="^not certified: time was up$"):
            result = eigsh(Slow(A, stall=needed + more, clock=clock), 3, method=method, seconds=0.45)
        assert (result.converged, result.timed_out, result.certificate) == (True, False, None)
        np.testing.assert_allclose(result.values, [3, 4, 5], atol=1e-12)

    def test_lobpcg_returns_the_eigenpairs_of_its_last_check(self, clock: Clock) -> None:
        A = Slow(diags_array(np.linspace(-1, 1, 4000) ** 3).tocsr(), stall=600, clock=clock)
        with pytest.warns(RuntimeWarning, match="not converged before time was up: 0 of 3"):
            result = eigsh(A, 3, method="lobpcg", seconds=0.45)
        assert len(result.values) == 3
        assert result.largest == pytest.approx(1, abs=1e-2)
        with pytest.warns(RuntimeWarning, match="time was up: 0 of 3 eigenvalues converged; not certified"):
            nothing = eigsh(A, 3, method="lobpcg", seconds=0)
        assert nothing.vectors.shape == (4000, 0)

    @pytest.mark.parametrize("method", ["arpack", "dense"])
    def test_timeout_error_of_methods_without_partial_results(self, method: str) -> None:
        A = Slow(diags_array(np.linspace(-1, 1, 4000) ** 3).tocsr(), 0.002)
        with pytest.raises(TimeoutError, match=r"time was up after 0\.3 s and .* products.* pass method='lanczos'"):
            eigsh(A, 4, method=method, seconds=0.3)
        assert A.last < A.begun + 0.4

    @pytest.mark.parametrize("method", ["arpack", "lanczos", "lobpcg", "dense"])
    def test_enough_time_changes_nothing(self, method: str) -> None:
        A = matrix([5.0, 4.0, 3.0, *np.linspace(0, 1, 497)])
        timed, plain = (eigsh(A, 3, method=method, seconds=seconds) for seconds in (1e6, None))
        assert timed.ok
        assert (timed.products, timed.converged) == (plain.products, True)
        np.testing.assert_allclose(timed.values, plain.values, rtol=1e-12)

    def test_the_search_for_missed_eigenvalues_uses_the_remaining_time(self, clock: Clock) -> None:
        A = Slow(matrix([5.0, 4.0, 3.0, *np.linspace(2.99, -2.99, 497)]), 0.04, clock=clock)
        whole = eigsh(A.inner, 3, method="lanczos")
        assert whole.certificate.products > 3 + 8 + 50
        needed = whole.products - whole.certificate.products
        with pytest.warns(
            RuntimeWarning, match=r"^not certified: no eigenvalue above 3\.\d+ is missing .*between 3 and"
        ):
            result = eigsh(A, 3, method="lanczos", seconds=0.04 * (needed + 3 + 8 + 2 * 20 + 2))
        assert A.last - A.begun < 0.04 * (needed + 3 + 8 + 2 * 20 + 2)
        assert result.converged
        assert 3 + 8 < result.certificate.products < 3 + 8 + 40
        assert result.certificate.resolution > whole.certificate.resolution
        assert certify(A.inner, result.values, result.vectors, which="LA", thorough=True, progress=False).ok

    @pytest.mark.parametrize("more", [0, 1, 3, 18])
    def test_the_certificate_says_what_the_search_showed_when_time_was_up(self, more: int, clock: Clock) -> None:
        """Time runs out during the search, although enough time seemed to be left."""
        A = matrix([5.0, 4.0, 3.0, *np.linspace(2.99, -2.99, 497)])
        needed = eigsh(A, 3, method="lanczos", certificate=False).products
        with pytest.warns(RuntimeWarning, match="^not certified: "):
            result = eigsh(Slow(A, stall=needed + 3 + 8 + more, clock=clock), 3, method="lanczos", seconds=0.45)
        assert result.converged
        assert result.certificate.bounds.max() < 1e-12
        assert result.certificate.products == 3 + 8 + more
        text = ["no time to search", "too short", "too short", "no eigenvalue above 3."][[0, 1, 3, 18].index(more)]
        assert text in result.verdict

    def test_save_and_load(self, tmp_path) -> None:
        with pytest.warns(RuntimeWarning, match="time was up"):
            result = eigsh(np.diag(np.arange(100.0)), 3, method="lanczos", seconds=0)
        result.save(tmp_path / "pairs.npz")
        loaded = EigenResult.load(tmp_path / "pairs.npz")
        assert (loaded.verdict, str(loaded), loaded.timed_out) == (result.verdict, str(result), True)


class TestMemory:
    @pytest.mark.parametrize(("method", "vectors"), [("arpack", 2 * 12 + 5 + 4), ("lanczos", 12 + 5 + 4)])
    def test_the_basis_is_reduced_to_fit(self, method: str, vectors: int) -> None:
        A = matrix(np.linspace(0, 1, 300) ** 8)
        result = eigsh(A, 5, method=method, memory=300 * 8 * vectors)
        assert result.ok
        assert result.note == "ncv was reduced to 12 to fit into memory"

    @pytest.mark.parametrize(
        "options", [{}, {"ncv": 100}, {"method": "lanczos"}, {"method": "lobpcg"}, {"method": "dense"}]
    )
    def test_memory_error_before_the_first_product(self, options) -> None:
        def refuse(x):
            raise AssertionError("multiplied")

        A = LinearOperator((10**7, 10**7), matvec=refuse, dtype=float)
        with pytest.raises(MemoryError, match=r"GB, but 0.5 GB may be used: use a smaller k.*memory="):
            eigsh(A, 5, memory=5 * 10**8, **options)


class TestResult:
    def test_str(self, clustered) -> None:
        lines = str(eigsh(clustered, 25)).splitlines()
        assert lines[0].startswith("25 of 25 eigenvalues (LA) of a 303 x 303 matrix: ARPACK, ")
        assert lines[1].split() == ["eigenvalue", "residual", "error", "<="]
        rows = [line.split() for line in lines[2:-1]]
        assert [row[0] for row in rows] == [*map(str, range(1, 11)), "...", *map(str, range(16, 26))]
        assert [float(row[1]) for row in (rows[0], rows[-1])] == pytest.approx(expected(CLUSTERED, 25, "LA")[[0, -1]])
        assert lines[-1].startswith("25 eigenvalues within ")

    @pytest.mark.parametrize("certificate", [True, False])
    def test_save_and_load(self, clustered, tmp_path, certificate: bool) -> None:
        result = eigsh(clustered, 3, "SM" if certificate else "LA", certificate=certificate, tol=1e-3)
        result.save(tmp_path / "pairs.npz")
        loaded = EigenResult.load(tmp_path / "pairs.npz")
        assert str(loaded) == str(result)
        assert loaded.ok == result.ok
        np.testing.assert_array_equal(loaded.vectors, result.vectors)
        if certificate:
            assert loaded.certificate.resolution is result.certificate.resolution is None
            np.testing.assert_array_equal(loaded.certificate.estimates, result.certificate.estimates)
        else:
            assert loaded.certificate is None
        with np.load(tmp_path / "pairs.npz", allow_pickle=False) as file:
            assert all(file[name].dtype != object for name in file)

    def test_the_ranges_of_old_certificates_follow_from_the_resolution(self, tmp_path) -> None:
        """Earlier versions did not save them, and accepted a search of any resolution."""
        A = matrix([5.0, 4.0, 3.0, *np.linspace(2.99, -2.99, 497)])
        for which in ("LA", "SA", "LM"):
            result = eigsh(A, 3, which)
            short = certify(A, result.values, result.vectors, which=which, search=20, progress=False)
            result = dataclasses.replace(result, certificate=short)
            result.save(tmp_path / "new.npz")
            arrays = dict(np.load(tmp_path / "new.npz"))
            for name in ("remaining", "innermost"):
                del arrays[f"certificate_{name}"]
            np.savez(tmp_path / "old.npz", **arrays)
            new, old = EigenResult.load(tmp_path / "new.npz"), EigenResult.load(tmp_path / "old.npz")
            assert new.verdict == result.verdict
            assert old.verdict == result.verdict
            assert not old.ok
            assert pickle.loads(pickle.dumps(old)).verdict == result.verdict

    def test_load_refuses_other_files(self, tmp_path) -> None:
        np.savez(tmp_path / "other.npz", values=np.ones(3))
        with pytest.raises(ValueError, match=r"other\.npz was not written by EigenResult.save"):
            EigenResult.load(tmp_path / "other.npz")

    def test_repeatable(self) -> None:
        A = matrix(np.linspace(0, 1, 200) ** 8)
        for method in ("arpack", "lobpcg", "lanczos"):
            first, second = (eigsh(A, 4, rng=3, method=method) for _ in range(2))
            np.testing.assert_array_equal(first.vectors, second.vectors)
            assert str(first) == str(second)
            other = eigsh(A, 4, rng=np.random.default_rng(4), method=method)
            assert not np.array_equal(first.vectors, other.vectors)

    @pytest.mark.slow
    def test_progress_is_shown(self, capsys) -> None:
        def slowly(x):
            time.sleep(0.012)
            return np.arange(40.0) * x.reshape(-1)

        A = LinearOperator((40, 40), matvec=slowly, dtype=float)
        eigen.eigsh(A, 2)
        shown = capsys.readouterr().err
        assert "eigsh" in shown
        assert "certify" in shown
        assert "products" in shown
        eigsh(A, 2)
        assert not capsys.readouterr().err

    @pytest.mark.parametrize("method", ["arpack", "lobpcg", "lanczos", "dense"])
    def test_exceptions_of_the_operator_propagate(self, method: str) -> None:
        def stop(x):
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            eigsh(LinearOperator((100, 100), matvec=stop, dtype=float), 3, method=method)

    @pytest.mark.parametrize("method", ["arpack", "lobpcg", "lanczos", "dense"])
    def test_products_that_are_not_finite(self, method: str) -> None:
        A = LinearOperator((100, 100), matvec=lambda x: np.full(100, np.nan), dtype=float)
        with pytest.raises(ValueError, match="a product with A is not finite"):
            eigsh(A, 3, method=method)


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({"A": np.ones((2, 3))}, ValueError, r"A has shape \(2, 3\), but must be square"),
        ({"A": np.ones((0, 0))}, ValueError, r"A has shape \(0, 0\)"),
        ({"A": np.eye(60) * 1j}, TypeError, "A has dtype complex128"),
        ({"k": 0}, ValueError, "k is 0, but must be between 1 and 60"),
        ({"k": 61}, ValueError, "k is 61"),
        ({"k": 2.0}, TypeError, "k is a float"),
        ({"which": "LR"}, ValueError, "which is 'LR', but must be one of LA, SA, LM, SM, BE"),
        ({"which": "BE", "k": 1}, ValueError, "k is 1, but must be at least 2 for which='BE'"),
        ({"method": "cg"}, ValueError, "method is 'cg', but must be one of arpack, lobpcg, lanczos, dense"),
        (
            {"method": "lanczos", "which": "SM"},
            ValueError,
            "which is 'SM', but method='lanczos' does not find these: use method='arpack'",
        ),
        (
            {"method": "lobpcg", "which": "LM"},
            ValueError,
            "method='lobpcg' supports only 'LA' and 'SA': use method='arpack'",
        ),
        ({"tol": -1.0}, ValueError, "tol is -1.0"),
        ({"maxiter": 0}, ValueError, "maxiter is 0"),
        ({"ncv": 2}, ValueError, "ncv is 2, but must be greater than k = 2"),
        ({"ncv": 61}, ValueError, "ncv is 61, but .* at most 60"),
        ({"method": "lanczos", "block": 0}, ValueError, "block is 0, but must be an integer >= 1"),
        ({"method": "lanczos", "block": 2.0}, ValueError, "block is 2.0, but must be an integer >= 1"),
        (
            {"method": "lanczos", "block": 3, "ncv": 4},
            ValueError,
            r"ncv is 4, but must be at least k \+ block = 5: use a larger ncv",
        ),
        ({"block": 2}, ValueError, "block is 2, but method='arpack' does not take it: use method='lanczos'"),
        (
            {"method": "lobpcg", "block": 2},
            ValueError,
            r"method='lobpcg' does not take it \(lobpcg uses blocks of k \+ 2 vectors\): use method='lanczos'",
        ),
        ({"seconds": -1}, ValueError, "seconds is -1, but must be 0 or more"),
        ({"seconds": float("nan")}, ValueError, "seconds is nan, but must be 0 or more"),
        ({"seconds": "1m"}, TypeError, "seconds is '1m', but must be a number"),
        ({"v0": np.ones(3)}, ValueError, r"v0 has shape \(3,\)"),
        ({"v0": np.zeros(60)}, ValueError, "v0 must be finite and not zero"),
        ({"v0": np.full(60, np.nan)}, ValueError, "v0 must be finite and not zero"),
    ],
)
def test_bad_input(change, error, match) -> None:
    arguments = {"A": aslinearoperator(np.eye(60)), "k": 2, **change}
    with pytest.raises(error, match=match):
        eigsh(**arguments)


@pytest.fixture(scope="module")
def hessian() -> tuple[HessianLinearOperator, np.ndarray]:
    H = HessianLinearOperator(**digits())
    return H, np.linalg.eigvalsh(H @ np.eye(H.shape[0]))


class TestModels:
    @pytest.mark.slow
    @pytest.mark.parametrize(("method", "which"), [("arpack", "LA"), ("arpack", "BE"), ("lobpcg", "LA")])
    def test_on_digits(self, hessian, method: str, which: str) -> None:
        H, dense = hessian
        before = H.num_products
        result = eigsh(H, 10, which, method=method)
        assert result.ok
        assert result.products == H.num_products - before
        assert (np.abs(result.values - expected(dense, 10, which)) <= result.certificate.bounds + 1e-14).all()
        assert result.certificate.bounds.max() < 1e-9
        # How far the search reaches into the spectrum depends on rounding errors of the processor.
        assert re.search(r"none missed|no eigenvalue .* is missing \(with probability", result.verdict)

    @pytest.mark.slow
    def test_a_certificate_on_digits_takes_few_products(self, hessian) -> None:
        H, _ = hessian
        result = eigsh(H, 10)
        assert result.certificate.resolution < 1e-13
        assert result.certificate.products < 10 + 8 + 30
        assert result.products < 150

    @pytest.mark.parametrize("dtype", [np.float32, np.float64])
    @pytest.mark.parametrize("method", ["arpack", "lobpcg", "lanczos"])
    def test_convolutional_network_in_single_precision(self, method: str, dtype) -> None:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = nn.Sequential(nn.Conv2d(1, 3, 3), nn.Tanh(), nn.Flatten(), nn.Linear(48, 5))
            data = [(torch.randn(20, 1, 6, 6), torch.randint(0, 5, (20,))) for _ in range(2)]
        arguments = model, nn.CrossEntropyLoss(), dict(model.named_parameters())
        A = GGNLinearOperator(*arguments, data, dtype=dtype)
        result = eigsh(A, 4, method=method)
        assert result.ok
        assert 1e-8 < result.certificate.noise < 1e-5
        double = GGNLinearOperator(
            model.double(), nn.CrossEntropyLoss(), dict(model.named_parameters()), [(X.double(), y) for X, y in data]
        )
        dense = np.linalg.eigvalsh(double @ np.eye(A.shape[0]))[-4:]
        assert (np.abs(result.values - dense) <= result.certificate.bounds).all()
        assert result.certificate.bounds.max() < 1e-4 * dense[-1]

    def test_convolutional_network_against_its_dense_hessian(self) -> None:
        """The reference forms the dense Hessian independently, in forward mode."""
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Tanh(), nn.Flatten(), nn.Linear(64, 4)).double()
            data = [(torch.randn(12, 1, 6, 6).double(), torch.randint(0, 4, (12,))) for _ in range(2)]
        problem = model, nn.CrossEntropyLoss(), dict(model.named_parameters()), data
        dense = functorch_hessian(*problem).numpy()
        H = HessianLinearOperator(*problem)
        assert len(dense) == 300
        result = eigsh(H, 8, "BE")
        assert result.ok
        np.testing.assert_allclose(result.values, expected(np.linalg.eigvalsh(dense), 8, "BE"), rtol=1e-9)
        assert result.smallest < -0.01 < 0.01 < result.largest
        value, error = density(H, num_probes=300, num_steps=4, rng=0, progress=False).trace()
        assert abs(value - np.trace(dense)) < 4 * error < 0.4 * np.trace(dense)

    def test_block_and_submatrix(self, hessian) -> None:
        H, _ = hessian
        rows = H.params_slices["2.weight"]
        block = H.block("2.weight")
        dense = np.linalg.eigvalsh(block @ np.eye(block.shape[0]))
        for A in (block, H[rows, rows]):
            result = eigsh(A, 3)
            assert result.ok
            np.testing.assert_allclose(result.values, dense[-3:], rtol=1e-10)


def test_the_old_name_of_a_method_still_works() -> None:
    A = np.diag(np.arange(50.0))
    with pytest.warns(DeprecationWarning, match=r"^method='device' is now method='lanczos'$"):
        result = eigsh(A, 2, method="device")
    assert result.method == "lanczos"
    np.testing.assert_allclose(result.values, [48.0, 49.0], rtol=1e-12)
