"""Certificates report every problem of eigenpairs, bound their errors, and do not overclaim."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linear_sum_assignment
from scipy.sparse import diags_array
from scipy.sparse.linalg import LinearOperator, aslinearoperator, eigsh
from torch import nn

from curvop import GGNLinearOperator, HessianLinearOperator
from curvop.problems import digits
from curvop.spectrum import certificate, missed_search
from curvop.spectrum.certificate import Certificate
from curvop.spectrum.missed_search import search_missed

TOP = [1.0, 1.0, 1.0, 0.5, 0.4]
CLUSTERED = [*TOP, *np.linspace(-0.1, 0.1, 195)]


def certify(A, values, vectors, **options) -> Certificate:
    return certificate.certify(A, values, vectors, progress=False, **options)


def matrix(eigenvalues, seed: int = 0) -> np.ndarray:
    """Return a symmetric matrix with these eigenvalues."""
    n = len(eigenvalues)
    Q = np.linalg.qr(np.random.default_rng(seed).normal(size=(n, n)))[0]
    A = (Q * np.asarray(eigenvalues)) @ Q.T
    return (A + A.T) / 2


def solved(A) -> tuple[np.ndarray, np.ndarray]:
    """Return all eigenpairs, the largest eigenvalue first."""
    values, vectors = np.linalg.eigh(A)
    return values[::-1], vectors[:, ::-1]


def operator(function, size: int, dtype=np.float64) -> LinearOperator:
    return LinearOperator((size, size), matvec=function, matmat=function, dtype=dtype)


@pytest.fixture(scope="module")
def clustered() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    A = matrix(CLUSTERED)
    return A, *solved(A)


class TestBounds:
    @settings(max_examples=60, deadline=None)
    @given(st.data())
    def test_values_match_eigenvalues_one_to_one_within_their_bounds(self, data) -> None:
        """Also for clusters, and for eigenpairs with errors of any size."""
        distinct = data.draw(st.lists(st.floats(-3, 3), min_size=1, max_size=4))
        eigenvalues = np.array(data.draw(st.lists(st.sampled_from(distinct), min_size=2, max_size=12)))
        rng = np.random.default_rng(data.draw(st.integers(0, 100)))
        A = matrix(eigenvalues)
        true, vectors = np.linalg.eigh(A)
        chosen = rng.choice(len(true), data.draw(st.integers(1, len(true))), replace=False)
        wrong = 10.0 ** data.draw(st.integers(-14, 0))
        V = vectors[:, chosen] + wrong * rng.normal(size=(len(true), len(chosen)))
        V *= 10.0 ** rng.integers(-2, 3, len(chosen))
        w = true[chosen] + wrong * rng.normal(size=len(chosen))
        bounds = certify(A, w, V).bounds
        bounds = np.where(bounds == np.inf, 1e9, bounds)
        excess = np.maximum(np.abs(w[:, None] - true) - bounds[:, None], 0)
        rows, cols = linear_sum_assignment(excess)
        assert excess[rows, cols].max() <= 1e-14 * max(1, np.abs(true).max())

    def test_bounds_of_separated_eigenvalues_are_the_residuals(self) -> None:
        A = matrix([3.0, 2.0, 1.0, *np.zeros(50)])
        w, V = solved(A)
        V = V[:, :3] + 1e-6 * np.random.default_rng(0).normal(size=(53, 3))
        found = certify(A, w[:3], V, which="LA")
        residuals = np.linalg.norm(A @ V - V * w[:3], axis=0) / np.linalg.norm(V, axis=0)
        np.testing.assert_allclose(found.residuals, residuals, rtol=1e-9)
        np.testing.assert_allclose(found.bounds, residuals, rtol=1e-6)

    def test_nearly_parallel_vectors_have_large_bounds(self) -> None:
        """Their residuals are small, but the second eigenvalue is far away."""
        A = np.diag([1.0, 1.1, 5.0])
        V = np.array([[1.0, 0.0, 0.0], [np.cos(1e-6), np.sin(1e-6), 0.0]]).T
        found = certify(A, [1.0, 1.0], V)
        assert found.residuals.max() < 1e-6
        assert (found.bounds > 0.05).all()  # half of the distance, because either value may be the wrong one
        assert not found.ok

    def test_estimates_are_squared_residuals_over_the_gap(self) -> None:
        A = matrix([1.5, 1.0, 0.5, *np.zeros(50)])
        w, V = solved(A)
        V = V[:, :3] + 1e-4 * np.random.default_rng(0).normal(size=(53, 3))
        V /= np.linalg.norm(V, axis=0)
        found = certify(A, np.einsum("ij,ij->j", V, A @ V), V, which="LA", tol=1e-2)
        assert found.ok
        errors = np.abs(np.einsum("ij,ij->j", V, A @ V) - w[:3])
        assert (errors <= found.estimates).all()
        assert (found.estimates < 1e-2 * found.bounds).all()
        np.testing.assert_allclose(found.estimates, found.residuals**2 / 0.5, rtol=0.1)

    def test_a_cluster_has_a_joint_bound(self, clustered) -> None:
        A, w, V = clustered
        found = certify(A, w[:5], V[:, :5], which="LA")
        assert found.bounds.max() < 1e-13
        assert found.bounds[0] == found.bounds[1] == found.bounds[2] > found.bounds[4]

    def test_values_within_their_bounds_of_zero_are_counted(self) -> None:
        A = matrix([2.0, 1.0, *np.zeros(20)])
        w, V = solved(A)
        found = certify(A, w[:4], V[:, :4], which="LA")
        assert found.zeros == 2
        assert "(2 zero to this accuracy)" in found.verdict


class TestMissed:
    def test_none(self, clustered) -> None:
        A, w, V = clustered
        found = certify(A, w[:3], V[:, :3], which="LA")
        assert found.ok
        assert found.missed is None
        assert found.resolution < 1e-13
        assert "none missed" in found.verdict

    @pytest.mark.parametrize("index", [0, 1, 2])
    @pytest.mark.parametrize("shift", [0.0, -3.0, 3.0])
    def test_a_member_of_a_cluster(self, clustered, index: int, shift: float) -> None:
        A, w, V = clustered
        chosen = np.delete(np.arange(4), index)
        found = certify(A + shift * np.eye(len(A)), w[chosen] + shift, V[:, chosen], which="LA")
        assert not found.ok
        assert found.missed == pytest.approx(1.0 + shift, abs=1e-5)
        assert found.verdict.startswith("not certified: an eigenvalue at ")
        assert " or beyond was missed: " in found.verdict

    def test_another_copy_of_the_last_eigenvalue_does_not_count(self, clustered) -> None:
        A, w, V = clustered
        found = certify(A, w[:2], V[:, [0, 2]], which="LA")
        assert found.ok
        assert found.missed is None

    def test_at_the_other_end(self, clustered) -> None:
        A, w, V = clustered
        found = certify(-A, -w[[0, 1, 3]], V[:, [0, 1, 3]], which="SA")
        assert found.missed == pytest.approx(-1.0, abs=1e-5)
        assert not found.ok

    @pytest.mark.parametrize("sign", [1, -1])
    def test_the_largest_magnitude_at_either_end(self, sign: int) -> None:
        A = sign * matrix([2.0, -1.8, 1.5, *np.linspace(-1, 1, 197)])
        w, V = np.linalg.eigh(A)
        order = np.argsort(-np.abs(w))
        assert certify(A, w[order[:3]], V[:, order[:3]], which="LM").ok
        found = certify(A, w[order[[0, 2]]], V[:, order[[0, 2]]], which="LM")
        assert found.missed == pytest.approx(-1.8 * sign, abs=1e-4)

    @pytest.mark.parametrize("left_out", [0, 1, 197, 198, 199])
    def test_half_from_each_end(self, left_out: int) -> None:
        A = matrix([-3.0, -2.5, -2.0, *np.linspace(-1, 1, 194), 2.0, 2.5, 3.0])
        w, V = np.linalg.eigh(A)
        ends = [0, 1, 197, 198, 199]
        assert certify(A, w[ends], V[:, ends], which="BE").ok
        instead = [index for index in (0, 1, 2) if index != left_out] if left_out < 2 else [0, 1]
        instead += [index for index in (196, 197, 198, 199) if index != left_out][-3:]
        found = certify(A, w[instead], V[:, instead], which="BE")
        assert found.missed == pytest.approx(w[left_out], abs=1e-4)

    @settings(max_examples=60, deadline=None)
    @given(st.data())
    def test_certified_results_are_complete(self, data) -> None:
        """An omitted eigenvalue is found unless it lies within the resolution of the last one."""
        size = data.draw(st.integers(3, 150))
        rng = np.random.default_rng(data.draw(st.integers(0, 100)))
        power = data.draw(st.sampled_from([0.0, 1.0, 4.0]))
        true = np.sort(np.sign(rng.normal(size=size)) * rng.uniform(size=size) ** power)[::-1]
        A = matrix(true)
        w, V = solved(A)
        k = data.draw(st.integers(1, min(8, size - 1)))
        chosen = np.sort(rng.choice(min(k + 2, size), k, replace=False))
        found = certify(A, w[chosen], V[:, chosen], which="LA", search=data.draw(st.integers(1, 60)))
        left_out = np.delete(w, chosen).max() - w[chosen].min()
        if found.missed is None:
            assert left_out <= found.resolution + 1e-12
        else:
            assert left_out > 0
            assert w[chosen].min() < found.missed <= np.delete(w, chosen).max() + 1e-12

    def test_a_triple_that_arpack_breaks_up(self) -> None:
        """scipy#26112: a triple eigenvalue within 1e-6, one member of which is missed at a coarse tolerance."""
        triple = [1.00589290, 1.00589283, 1.00589219]
        top = [1.1, 1.08, 1.05, 1.03, 1.01, *triple, 0.993, 0.992]
        A = diags_array(np.r_[top, np.linspace(0.991, 0, 4990)]).tocsr()
        missed = []
        for seed in range(6):
            start = np.random.default_rng(seed).random(5000)
            values, vectors = eigsh(A, 8, which="LA", tol=1e-3, ncv=20, v0=start, rng=0)
            complete = values.min() > 1.0
            found = certify(A, values, vectors, which="LA", tol=1e-2)
            assert found.ok == complete
            missed.append(found.missed)
        assert sum(value is not None for value in missed) >= 3
        assert all(value == pytest.approx(1.00589, abs=2e-5) for value in missed if value is not None)

    def test_all_eigenvalues_were_found(self) -> None:
        A = matrix([3.0, 2.0, 1.0, 0.0])
        w, V = solved(A)
        assert certify(A, w, V, which="LA").verdict.count("none missed") == 1
        assert certify(A, w[:3], V[:, :3], which="LA").ok
        assert certify(A, w[1:], V[:, 1:], which="LA").missed == pytest.approx(3.0)

    def test_no_search(self, clustered) -> None:
        A, w, V = clustered
        for which, reason in ((None, "it is unknown which ones these are"), ("SM", "which is 'SM'")):
            found = certify(A, w[:2], V[:, :2], which=which)
            assert found.ok
            assert found.resolution is None
            assert f"no search for missed ones ({reason})" in found.verdict

    def test_the_start_of_the_search_differs_from_the_solvers_for_the_same_seed(self) -> None:
        """A solver's start that has no component along an eigenvector is not used again."""
        start = np.random.default_rng(0).standard_normal(300)
        A = matrix([2.0, *np.linspace(0, 1, 299)])
        u = solved(A)[1][:, 0]
        q = start - u * (u @ start)
        H = np.eye(300) - 2 * np.outer(*[(start / np.linalg.norm(start) - q / np.linalg.norm(q))] * 2) / (
            np.linalg.norm(start / np.linalg.norm(start) - q / np.linalg.norm(q)) ** 2
        )
        B = H @ A @ H  # the eigenvector of 2 is orthogonal to the start
        w, V = solved(B)
        assert abs(start @ V[:, 0]) < 1e-12 * np.linalg.norm(start)
        assert certify(B, w[1:4], V[:, 1:4], which="LA", rng=0).missed == pytest.approx(2.0, abs=1e-4)


class TestSearch:
    @settings(max_examples=40, deadline=None)
    @given(st.integers(20, 200), st.integers(1, 19), st.integers(0, 1000), st.sampled_from([0.5, 1.0, 3.0, 10.0]))
    def test_all_eigenvalues_lie_in_the_range(self, size: int, steps: int, seed: int, power: float) -> None:
        rng = np.random.default_rng(seed)
        A = matrix(np.sign(rng.normal(size=size)) * rng.uniform(size=size) ** power, seed)
        found = search_missed(lambda x: A @ x, np.zeros((size, 0)), (-1e-3, 1e-3), 0.0, steps, rng)
        values = np.linalg.eigvalsh(A)
        assert values[0] - 1e-12 <= found.low <= found.high <= values[-1] + 1e-12
        assert found.lower <= values[0] + 1e-12
        assert values[-1] - 1e-12 <= found.upper

    @pytest.mark.parametrize("noise", [0.0, 1e-7, 1e-5])
    def test_the_probability_of_a_wrong_range(self, noise: float, monkeypatch) -> None:
        """Judged with a failure probability of 0.2, at any step: 300 random starts may fail 60 times on average."""
        monkeypatch.setattr(missed_search, "_FAILURE", 0.2)
        failures = 0
        for seed in range(300):
            rng = np.random.default_rng(seed)
            steps, power = int(rng.integers(5, 40)), rng.choice([1.0, 3.0, 6.0])
            values = np.sort(np.sign(rng.normal(size=80)) * rng.uniform(size=80) ** power)
            values = np.r_[values[0] - 10.0 ** rng.uniform(-4, 0), values, values[-1] + 10.0 ** rng.uniform(-4, 0)]

            def product(x, values=values, rng=rng):
                y = values * x
                return y + noise * np.linalg.norm(y) / np.sqrt(82) * rng.normal(size=82)

            inner = (values[0] + 1e-9, values[-1] - 1e-9)  # nothing closes the search before the last step
            found = search_missed(product, np.zeros((82, 0)), inner, 1e-12, steps, rng)
            allowed = 2 * noise * np.abs(values).max() + 1e-12
            failures += found.lower > values[0] + allowed or found.upper < values[-1] - allowed
        assert failures <= 60 + 3 * np.sqrt(300 * 0.2 * 0.8)

    def test_the_vector_of_a_missed_eigenvalue_is_returned(self, clustered) -> None:
        A, w, V = clustered
        for size, most in ((200, 60), (40, 60)):  # by Lanczos, and by a dense eigensolver
            values, vectors = (w, V) if size == 200 else np.linalg.eigh(A[:40, :40])
            order = np.argsort(values)[::-1]
            given, others = vectors[:, order[[0, 2]]], vectors[:, order[1]]
            B = A[:size, :size]
            last = float(values[order[2]])
            found = search_missed(
                lambda x, B=B: B @ x, given, (-np.inf, last), 1e-10, most, np.random.default_rng(1), tol=1e-4
            )
            if values[order[1]] > last + 1e-9:
                assert abs(found.vectors[:, 0] @ others) == pytest.approx(1, abs=1e-6)
                assert found.beyond == pytest.approx(found.vectors[:, 0] @ B @ found.vectors[:, 0], rel=1e-12)
            else:
                assert found.vectors is None

    def test_a_gap_ends_the_search(self, clustered) -> None:
        A, w, V = clustered
        few = certify(A, w[:3], V[:, :3], which="LA")
        many = certify(A, w[:8], V[:, :8], which="LA")
        assert few.products <= 3 + 8 + 20 < many.products <= 8 + 8 + 60


class TestCovered:
    """The certificate says in numbers what the search shows, and is not ok unless this covers all given values."""

    @settings(max_examples=30, deadline=None)
    @given(st.data())
    def test_no_eigenvalue_is_missing_outside_of_the_remaining_range(self, data) -> None:
        size = data.draw(st.integers(62, 150))
        rng = np.random.default_rng(data.draw(st.integers(0, 100)))
        centers = rng.uniform(-1, 1, data.draw(st.integers(2, 8)))
        spread = 10.0 ** data.draw(st.integers(-9, 0))
        true = np.sort(rng.choice(centers, size) + spread * rng.uniform(size=size))
        A = matrix(true)
        w, V = np.linalg.eigh(A)
        which = data.draw(st.sampled_from(["LA", "SA", "LM", "BE"]))
        k = data.draw(st.integers(2, 6))
        order = {"LA": np.argsort(-w), "SA": np.argsort(w), "LM": np.argsort(-np.abs(w))}
        order["BE"] = np.ravel([np.arange(size // 2), size - 1 - np.arange(size // 2)], order="F")
        chosen = rng.permutation(order[which][: k + 1])[:k]  # one is missing, or none
        others = np.delete(w, chosen)
        search = data.draw(st.integers(1, 60))
        found = certify(A, w[chosen], V[:, chosen], which=which, search=search)
        rounding = 1e-12
        assert found.remaining[0] - rounding <= others.min()
        assert others.max() <= found.remaining[1] + rounding
        claimed = np.isfinite(found.innermost)
        assert (claimed == {"LA": [0, 1], "SA": [1, 0], "LM": [1, 1], "BE": [1, 1]}[which]).all()
        beyond = np.abs(found.remaining[claimed] - found.innermost[claimed]).max()
        assert found.resolution == pytest.approx(beyond, rel=1e-9, abs=1e-15)
        if found.ok:
            assert max(found.innermost[0] - others.min(), others.max() - found.innermost[1]) <= 1e-4 * found.norm
        closed = certify(A, w[chosen], V[:, chosen], which=which, search=search, thorough=True)
        excess = max(closed.innermost[0] - others.min(), others.max() - closed.innermost[1])
        assert closed.ok == (closed.missed is None)
        if closed.missed is None:
            assert excess <= 1e-4 * closed.norm
        else:
            assert excess > 0

    @pytest.mark.parametrize(
        ("which", "chosen", "sentence"),
        [
            ("LA", [-1, -2, -3], "no eigenvalue above (.+) is missing PROB, but between (.+) and (.+) this"),
            ("SA", [0, 1, 2], "no eigenvalue below (.+) is missing PROB, but between (.+) and (.+) this"),
            (
                *("LM", [-1, -2, -3]),
                "no eigenvalue larger in magnitude than (.+) is missing PROB, but between the magnitudes (.+) and "
                "(.+) this",
            ),
            (
                *("BE", [0, -1, -2]),
                "no eigenvalue below (.+) or above (.+) is missing PROB, but between (.+) and (.+) and between (.+) "
                "and (.+) this",
            ),
        ],
    )
    def test_the_sentence_has_the_numbers_of_the_attributes(self, which: str, chosen: list[int], sentence: str) -> None:
        A = matrix([5.0, 4.0, 3.0, *np.linspace(2.99, -2.99, 497)])
        w, V = np.linalg.eigh(A)
        found = certify(A, w[chosen], V[:, chosen], which=which, search=10)
        assert not found.ok
        pattern = sentence.replace("PROB", r"\(with probability >= 0\.999\)")
        pattern = rf"not certified: {pattern} search cannot tell: call certify\(\.\.\., thorough=True\)"
        numbers = [float(text) for text in re.fullmatch(pattern, found.verdict).groups()]
        (low, high), (first, last) = found.remaining, found.innermost
        expected = {
            "LA": [high, last, high],
            "SA": [low, low, first],
            "LM": [max(-low, high), last, max(-low, high)],
            "BE": [low, high, low, first, last, high],
        }[which]
        np.testing.assert_allclose(numbers, expected, rtol=5e-3)
        # The limits are rounded outwards, so that the sentence never claims more than the attribute.
        outwards = np.array({"SA": [-1], "BE": [-1, 1]}.get(which, [1]))
        assert (outwards * numbers[: len(outwards)] >= outwards * expected[: len(outwards)]).all()
        closed = certify(A, w[chosen], V[:, chosen], which=which, search=10, thorough=True)
        assert closed.ok
        assert 10 < closed.products - 11 < 200

    def test_a_gap_that_the_tolerance_covers_is_ok(self) -> None:
        """The set is right to the accuracy that `tol` asks for, and the verdict says to which."""
        A = matrix([5.0, 4.0, 3.0, *np.linspace(2.999, -2.999, 497)])
        w, V = solved(A)
        coarse = certify(A, w[:3], V[:, :3], which="LA", search=60, thorough=True, tol=1e-2)
        assert coarse.ok
        assert 1e-4 * coarse.norm < coarse.resolution <= 1e-2 * coarse.norm
        assert f"no eigenvalue above {coarse.remaining[1]:.1f}" in coarse.verdict
        fine = certify(A, w[:3], V[:, :3], which="LA", search=60, thorough=True)
        assert fine.ok
        assert fine.products > coarse.products
        assert not certify(A, w[:3], V[:, :3], which="LA", search=60).ok

    @pytest.mark.parametrize("distance", [1e-10, 1e-11, 1e-12, 1e-13])
    @pytest.mark.parametrize("size", [400, 4000])
    def test_an_exhausted_search_does_not_tell_close_eigenvalues_apart(self, size: int, distance: float) -> None:
        """The Krylov space of a matrix with two eigenvalues is exhausted after two steps, up to rounding errors."""
        eigenvalues = np.ones(size)
        eigenvalues[-2:] = 1 + distance, 2
        found = certify(aslinearoperator(diags_array(eigenvalues)), [1.0, 2.0], np.eye(size)[:, [0, -1]], which="LA")
        assert found.missed is not None or found.remaining[1] >= 1 + distance

    def test_a_thorough_search_stops_if_it_is_exhausted(self) -> None:
        eigenvalues = np.r_[np.ones(1499), 2.0]
        A, vectors = aslinearoperator(diags_array(eigenvalues)), np.eye(1500)[:, [0, -1]]
        found = certify(A, [1.0, 2.0], vectors, which="LA", thorough=True)
        assert found.ok
        assert found.products < 20

    def test_a_search_that_is_too_short_to_show_anything(self, clustered) -> None:
        A, w, V = clustered
        found = certify(A, w[:3], V[:, :3], which="LA", search=1)
        assert not found.ok
        assert found.resolution == np.inf
        assert found.verdict == (
            "not certified: the search for missed eigenvalues was too short to show anything: "
            "call certify(..., thorough=True)"
        )
        assert certify(A, w[:3], V[:, :3], which="LA", search=1, thorough=True).ok

    def test_a_thorough_search_finds_what_a_short_one_does_not(self) -> None:
        """The missed eigenvalue 1.0005 is close to the given 1, and the spectrum is dense."""
        A = matrix([2.0, 1.0005, *np.linspace(1, -1, 300)])
        w, V = solved(A)
        short = certify(A, w[[0, 2]], V[:, [0, 2]], which="LA", search=20)
        assert not short.ok
        assert short.missed is None
        assert short.remaining[1] > 1.0005
        found = certify(A, w[[0, 2]], V[:, [0, 2]], which="LA", search=20, thorough=True)
        assert found.missed == pytest.approx(1.0005, abs=1e-5)

    def test_a_thorough_search_ends_even_if_lanczos_does_not_converge(self) -> None:
        """The spectrum is so dense at its ends that a search to 1e-9 needs all eigenvalues."""
        A = matrix(np.cos(np.pi * np.arange(200) / 199))
        w, V = solved(A)
        found = certify(A, w[:2], V[:, :2], which="LA", tol=1e-9, thorough=True)
        assert found.ok
        assert found.products <= 2 + 8 + 2 * 198


class TestAttacks:
    """Wrong eigenpairs, and operators with defects."""

    def test_a_noisy_operator(self, clustered) -> None:
        A, w, V = clustered
        rng = np.random.default_rng(5)

        def noisy(x):
            product = A @ x
            return product + 1e-3 / np.sqrt(200) * np.linalg.norm(product, axis=0) * rng.normal(size=product.shape)

        found = certify(operator(noisy, 200), w[:3], V[:, :3], which="LA")
        assert not found.ok
        assert found.missed is None
        assert 5e-4 < found.noise < 5e-3
        assert found.bounds.max() > 1e-3
        assert "accurate only to" in found.verdict
        assert "dropout" in found.verdict
        assert certify(operator(noisy, 200), w[:3], V[:, :3], which="LA", tol=1e-2).ok
        apart = certify(operator(noisy, 200), w[3:5], V[:, 3:5], tol=1e-2)
        assert (apart.bounds > apart.residuals + 0.5 * apart.noise * apart.norm).all()

    @pytest.mark.parametrize("what", ["matmat", "repeated", "affine", "nonlinear"])
    def test_an_operator_that_is_not_linear(self, clustered, what: str) -> None:
        A, w, V = clustered
        calls = iter(range(1000))
        functions = {
            "matmat": lambda x: A @ x * (1 if x.ndim == 1 else 1.01),
            "repeated": lambda x: A @ x * (1 + 0.01 * (next(calls) % 3)),
            "affine": lambda x: (A @ x.T[..., None]).squeeze(-1).T + 0.01 if x.ndim == 1 else A @ x + 0.01,
            "nonlinear": lambda x: A @ np.tanh(x),
        }
        found = certify(operator(functions[what], 200), w[:3], V[:, :3], which="LA")
        assert not found.ok
        assert found.noise > 1e-4

    @pytest.mark.parametrize("size", [1e-8, 1e-4, 1.0])
    def test_an_operator_that_is_not_symmetric(self, clustered, size: float) -> None:
        A, w, V = clustered
        S = np.random.default_rng(1).normal(size=A.shape)
        S *= size / np.linalg.norm(S, 2)
        found = certify(A + S - S.T, w[:3], V[:, :3], which="LA")
        assert not found.ok
        assert "A is not symmetric" in found.verdict
        assert 0.1 * size < found.symmetry * found.norm < 10 * size

    def test_asymmetry_that_the_residuals_do_not_show(self, clustered) -> None:
        """The eigenpair is exact, but not for the symmetric part of the matrix, to which the bounds refer."""
        A, w, V = clustered
        found = certify(A + 2e-3 * np.outer(V[:, 3], V[:, 100]), w[[3]], V[:, [3]], which="LA")
        assert found.residuals.max() < 1e-13
        assert 5e-4 < found.bounds.max() < 5e-3
        assert not found.ok

    def test_a_single_entry_that_is_not_symmetric(self, clustered) -> None:
        A, w, V = clustered
        A = A.copy()
        A[3, 5] += 1e-3
        assert not certify(A, w[:3], V[:, :3], which="LA").ok

    def test_wrong_pairs(self, clustered) -> None:
        A, w, V = clustered
        random = np.linalg.qr(np.random.default_rng(0).normal(size=(200, 3)))[0]
        for values, vectors in (
            (w[:3], V[:, 2:5]),
            (w[:3] + 0.1, V[:, :3]),
            (w[[3, 4]], V[:, [4, 3]]),
            (w[:3], random),
            (np.full(3, 1e6), V[:, :3]),
        ):
            found = certify(A, values, vectors, which="LA")
            assert not found.ok
            assert "iterate longer" in found.verdict

    def test_a_repeated_vector(self, clustered) -> None:
        A, w, V = clustered
        for other in (V[:, 0], -V[:, 0], V[:, 0] + 1e-9 * V[:, 9]):
            found = certify(A, w[[3, 0, 0]], np.stack([V[:, 3], V[:, 0], other], axis=1), which="LA")
            assert not found.ok
            assert "not orthonormal" in found.verdict
            assert found.bounds[1] > 1e3 * found.bounds[0]

    def test_vectors_of_one_eigenspace_that_are_not_orthogonal(self, clustered) -> None:
        A, w, V = clustered
        V = V[:, :2] @ np.array([[1.0, 0.6], [0.0, 0.8]])  # both are eigenvectors of 1
        found = certify(A, w[:2], V, which="LA")
        assert found.orthogonality == pytest.approx(0.6)
        assert found.bounds.max() < 1e-13
        assert not found.ok

    def test_vectors_of_another_norm(self, clustered) -> None:
        A, w, V = clustered
        found = certify(A, w[:3], 2 * V[:, :3], which="LA")
        assert found.orthogonality == pytest.approx(3)
        assert found.residuals.max() < 1e-13
        assert not found.ok

    @pytest.mark.parametrize("value", [np.nan, np.inf])
    def test_values_and_vectors_that_are_not_finite(self, clustered, value: float) -> None:
        A, w, V = clustered
        wrong = V[:, :3].copy()
        wrong[7, 1] = value
        for values, vectors in ((w[:3], wrong), ([1.0, value, 1.0], V[:, :3])):
            found = certify(A, values, vectors, which="LA")
            assert not found.ok
            assert found.products == 0
            assert "eigenpair 1 of 0 to 2 is not finite" in found.verdict

    def test_a_zero_vector_and_no_vectors(self, clustered) -> None:
        A, w, V = clustered
        assert "is zero" in certify(A, w[:2], V[:, :2] * [1, 0]).verdict
        none = certify(A, w[:0], V[:, :0], which="LA")
        assert not none.ok
        assert none.verdict == "not certified: there are no eigenpairs"

    def test_products_that_are_not_finite(self, clustered) -> None:
        A, w, V = clustered
        with pytest.raises(ValueError, match="a product with A is not finite"):
            certify(A * np.nan, w[:2], V[:, :2])

    def test_the_zero_matrix(self) -> None:
        found = certify(np.zeros((100, 100)), np.zeros(3), np.eye(100)[:, :3], which="LA")
        assert found.ok
        assert found.bounds.max() == 0
        assert not certify(np.zeros((100, 100)), np.full(3, 1e-9), np.eye(100)[:, :3], which="LA").ok

    def test_a_negative_definite_matrix(self) -> None:
        A = -matrix(np.linspace(1, 2, 100))
        w, V = solved(A)
        assert certify(A, w[:3], V[:, :3], which="LA").ok
        assert certify(A, w[1:4], V[:, 1:4], which="LA").missed == pytest.approx(-1, abs=1e-3)

    def test_the_null_space(self) -> None:
        A = matrix([3.0, 2.0, *np.zeros(98)])
        w, V = np.linalg.eigh(A)
        found = certify(A, w[:3], V[:, :3], which="SA")
        assert found.ok
        assert found.zeros == 3

    def test_an_operator_that_returns_its_argument(self) -> None:
        found = certify(operator(lambda x: x, 100), np.ones(3), np.eye(100)[:, :3], which="LA")
        assert found.ok
        assert found.noise < 1e-15
        assert not certify(operator(lambda x: x, 100), np.full(3, 1.1), np.eye(100)[:, :3], which="LA").ok

    def test_an_operator_that_returns_the_same_array_each_time(self, clustered) -> None:
        A, w, V = clustered
        place = np.empty((200, 50))
        found = certify(
            operator(lambda x: np.matmul(A, x, out=place.ravel()[: x.size].reshape(x.shape)), 200),
            w[:5],
            V[:, :5],
            which="LA",
        )
        assert found.ok

    @pytest.mark.parametrize("scale", [1e-300, 1e-200, 1e-20, 1e20, 1e200, 1e300])
    def test_every_scale(self, clustered, scale: float) -> None:
        """At most of these scales, squares underflow or overflow."""
        A, w, V = clustered
        B = A * scale
        found = certify(B, w[:3] * scale, V[:, :3], which="LA")
        assert found.ok
        assert found.bounds.max() < 1e-13 * scale
        assert found.norm == pytest.approx(scale, rel=1e-9)
        assert found.resolution < 1e-12 * scale
        assert certify(B, w[1:4] * scale, V[:, 1:4], which="LA").missed == pytest.approx(scale, rel=1e-4)
        wrong = certify(B, w[:3] * scale * 1.01, V[:, :3], which="LA")
        assert not wrong.ok
        np.testing.assert_allclose(wrong.residuals, 0.01 * scale, rtol=1e-6)
        asymmetric = B.copy()
        asymmetric[3, 5] += 1e-3 * scale
        assert "A is not symmetric" in certify(asymmetric, w[:3] * scale, V[:, :3], which="LA").verdict

    def test_scaling_by_a_power_of_two_changes_no_digit(self, clustered) -> None:
        A, w, V = clustered
        V = V + 1e-6 * np.random.default_rng(0).normal(size=V.shape)
        expected = certify(A, w[1:4], V[:, 1:4], which="LA")
        for exponent in (-900, -333, 700):
            unit = 2.0**exponent
            found = certify(A * unit, w[1:4] * unit, V[:, 1:4], which="LA")
            names = (
                "residuals",
                "bounds",
                "estimates",
                "missed",
                "resolution",
                "remaining",
                "innermost",
                "norm",
                "error",
            )
            for name in names:
                np.testing.assert_array_equal(getattr(found, name), getattr(expected, name) * unit)
            assert (found.noise, found.symmetry, found.zeros) == (expected.noise, expected.symmetry, expected.zeros)

    def test_values_and_matrix_of_different_scales(self, clustered) -> None:
        A, _, V = clustered
        for value in (1e200, 1e-200):
            found = certify(A, np.full(3, value), V[:, :3], which="LA")
            assert not found.ok
            np.testing.assert_allclose(found.residuals, max(value, 1.0))
        null = matrix([3e-200, *np.zeros(199)])
        vectors = solved(null)[1]
        assert certify(null, np.zeros(2), vectors[:, [5, 7]], which="LA").missed == pytest.approx(3e-200)
        assert certify(np.diag([*np.zeros(199), 1e-200]), np.zeros(2), np.eye(200)[:, :2], which="LA").missed > 0

    def test_single_precision(self, clustered) -> None:
        A, w, V = clustered
        single = A.astype(np.float32)
        found = certify(operator(lambda x: single @ x.astype(np.float32), 200, np.float32), w[:3], V[:, :3], which="LA")
        assert found.ok
        assert 1e-8 < found.noise < 1e-5
        assert found.noise / 10 < found.bounds.max() < 1e-5
        assert found.bounds.max() > np.abs(np.linalg.eigvalsh(single.astype(float))[::-1][:3] - w[:3]).max()


class TestModels:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    @pytest.mark.parametrize("kind", [HessianLinearOperator, GGNLinearOperator])
    def test_convolutional_network(self, kind, dtype) -> None:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = nn.Sequential(nn.Conv2d(1, 3, 3), nn.Tanh(), nn.Flatten(), nn.Linear(48, 5)).to(dtype)
            data = [(torch.randn(20, 1, 6, 6, dtype=dtype), torch.randint(0, 5, (20,))) for _ in range(2)]
        A = kind(model, nn.CrossEntropyLoss(), dict(model.named_parameters()), data)
        dense = A @ np.eye(A.shape[0])
        w, V = solved((dense + dense.T) / 2)
        found = certify(A, w[:6], V[:, :6], which="LA")
        assert found.ok
        assert found.bounds.max() < (1e-13 if dtype == torch.float64 else 1e-5)
        assert not certify(A, w[[0, 2, 3]], V[:, [0, 2, 3]], which="LA").ok

    def test_dropout_is_detected(self) -> None:
        """Randomness that the operator cannot detect, like dropout in a functional call."""
        model = digits()["model"]
        A = HessianLinearOperator(model, nn.CrossEntropyLoss(), dict(model.named_parameters()), digits()["data"])
        w, V = eigsh(A, 3, which="LA", rng=0)
        rng = np.random.default_rng(0)
        N = A.shape[0]
        dropped = operator(lambda x: A @ ((rng.random((N, 1)[: x.ndim]) < 0.99) * x), N)
        found = certify(dropped, w, V, which="LA")
        assert not found.ok
        assert found.noise > 1e-3


def test_repeatable_and_products_are_counted(clustered) -> None:
    A, w, V = clustered
    calls = 0

    def counted(x):
        nonlocal calls
        calls += 1 if x.ndim == 1 else x.shape[1]
        return A @ x

    first, second = (certify(operator(counted, 200), w[:3], V[:, :3], which="LA") for _ in range(2))
    assert first.products + second.products == calls
    assert first.verdict == second.verdict == str(first)
    np.testing.assert_array_equal(first.bounds, second.bounds)


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({"A": np.ones((2, 3))}, ValueError, r"A has shape \(2, 3\)"),
        ({"A": np.eye(3) * 1j}, TypeError, "A has dtype complex128"),
        ({"values": [1.0]}, ValueError, r"values has shape \(1,\) and vectors \(3, 2\)"),
        ({"vectors": np.eye(2)}, ValueError, r"vectors \(2, 2\)"),
        ({"vectors": np.eye(3, 2) * 1j}, TypeError, "vectors has dtype complex128"),
        ({"which": "LR"}, ValueError, "which is 'LR', but must be one of LA, SA"),
        ({"tol": 0}, ValueError, "tol is 0"),
        ({"search": 0}, ValueError, "search is 0"),
        ({"thorough": 500}, TypeError, "thorough is 500, but must be True or False: pass search= for the number"),
    ],
)
def test_bad_input(change, error, match) -> None:
    arguments = {"A": aslinearoperator(np.eye(3)), "values": np.ones(2), "vectors": np.eye(3, 2), **change}
    with pytest.raises(error, match=match):
        certify(**arguments)
