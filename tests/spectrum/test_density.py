"""Compare spectral densities with dense eigenvalues, and check their error bars."""

from __future__ import annotations

import dataclasses
import pickle

import numpy as np
import pytest
import torch
from matrices import matrix
from scipy.linalg import expm
from scipy.sparse import diags_array
from scipy.sparse.linalg import LinearOperator, aslinearoperator
from scipy.stats import t, wasserstein_distance
from torch import nn

from curvop import HessianLinearOperator
from curvop.examples.functorch import functorch_hessian
from curvop.problems import digits
from curvop.spectrum import SpectralDensity, density

N = 400
X = (np.arange(N) + 0.5) / N
SPECTRA = {
    "uniform": 2 * X - 1,
    "semicircle": np.sin(np.pi * (X - 0.5)),
    "clusters and outliers": np.r_[np.repeat([0.0, 1.0], 195), np.linspace(5, 20, 10)],
    "rank-deficient": np.r_[np.zeros(300), np.linspace(1, 2, 100)],
    "mostly negative": -np.logspace(-3, 1, N),
}


def quietly(A, **options) -> SpectralDensity:
    return density(aslinearoperator(A) if isinstance(A, np.ndarray) else A, progress=False, **options)


def distance(found: SpectralDensity, values: np.ndarray) -> float:
    """Return the Wasserstein distance between a density and all eigenvalues, relative to their width."""
    there = found.weights > 0
    nodes = np.r_[found.nodes[there], found.atoms]
    weights = np.r_[found.weights[there] / len(found.nodes), np.full(len(found.atoms), 1 / found.size)]
    return wasserstein_distance(nodes, values, weights) / np.ptp(values)


class TestSpectra:
    @pytest.mark.parametrize("name", SPECTRA)
    def test_it_is_as_close_as_steps_and_probes_allow(self, name: str) -> None:
        A = matrix(SPECTRA[name])
        errors = [distance(quietly(A, num_probes=16, num_steps=m, rng=0), SPECTRA[name]) for m in (4, 16, 64)]
        # 1 / m for the steps, plus the sampling error of 16 probes of 400 entries.
        assert all(error < 0.5 / m + 0.02 for error, m in zip(errors, (4, 16, 64), strict=True))
        assert errors[-1] <= errors[0]

    def test_the_distance_falls_as_one_over_the_steps(self) -> None:
        """The matrix is diagonal, so that a probe of signs has equal weights and there is no sampling error."""
        values = np.linspace(-1, 1, 2000)
        errors = []
        for m in (8, 16, 32, 64):
            found = quietly(matrix_of_equal_weights(values), num_probes=1, num_steps=m, rng=0)
            errors.append(distance(found, values))
        ratios = np.array(errors[:-1]) / errors[1:]
        assert (ratios > 1.6).all()
        assert (ratios < 2.6).all()

    def test_all_steps_give_all_eigenvalues(self) -> None:
        values = np.sort(np.random.default_rng(0).normal(size=30))
        found = quietly(matrix(values), num_probes=2, num_steps=100, rng=0)
        assert found.nodes.shape == (2, 30)
        np.testing.assert_allclose(found.nodes, np.stack([values, values]), atol=1e-10)

    def test_probes_and_steps_by_position(self) -> None:
        A = matrix(SPECTRA["uniform"])
        found, expected = density(A, 3, 12, progress=False), quietly(A, num_probes=3, num_steps=12)
        assert found.nodes.shape[0] == 3
        assert found.num_steps == 12
        np.testing.assert_array_equal(found.nodes, expected.nodes)

    def test_atoms_are_in_ascending_order(self, tmp_path) -> None:
        values = np.r_[-7.0, 5.0, 6.0, -4.0, np.linspace(0, 1, 96)]
        options = {"num_probes": 2, "num_steps": 5, "deflate": 4, "rng": 0}
        found = quietly(matrix(values), **options)
        np.testing.assert_allclose(found.atoms, [-7, -4, 5, 6], rtol=1e-12)
        dataclasses.replace(found, atoms=found.atoms[[0, 3, 2, 1]]).save(tmp_path / "old.npz")
        np.testing.assert_array_equal(SpectralDensity.load(tmp_path / "old.npz").atoms, found.atoms)

    def test_atoms_of_earlier_versions_are_sorted(self) -> None:
        """Pickles of earlier versions hold the atoms from the largest magnitude to the smallest."""
        found = quietly(np.diag(np.r_[np.linspace(-1, 1, 30), -9.0, 8.0, 7.0]), num_steps=5, deflate=3)
        old = SpectralDensity.__new__(SpectralDensity)
        old.__setstate__(vars(found) | {"atoms": found.atoms[[0, 2, 1]]})
        np.testing.assert_array_equal(old.atoms, found.atoms)
        assert str(pickle.loads(pickle.dumps(old))) == str(found)

    def test_outliers_are_counted_once(self) -> None:
        found = quietly(matrix(SPECTRA["clusters and outliers"]), num_probes=4, num_steps=60, rng=0)
        for nodes, weights in zip(found.nodes, found.weights, strict=True):
            np.testing.assert_allclose(np.sort(nodes[(weights > 0) & (nodes > 4)]), np.linspace(5, 20, 10), rtol=1e-9)

    @pytest.mark.parametrize("matrix_of", ["numpy", "float32"])
    def test_one_probe_is_exact_in_polynomials(self, matrix_of: str) -> None:
        """The quadrature is exact up to degree 2 m - 1 in the measure of the probe."""
        dtype, rtol = (np.float64, 1e-11) if matrix_of == "numpy" else (np.float32, 1e-5)
        A = matrix(SPECTRA["uniform"]).astype(dtype)
        found = quietly(A, num_probes=1, num_steps=6, rng=3)
        x = np.random.default_rng(3).choice(np.array([-1.0, 1.0]), (1, N))[0]
        power = x.copy()
        for p in range(12):
            assert found.moment(p).value == pytest.approx(x @ power / N, rel=rtol, abs=rtol)
            power = A @ power
        assert abs(found.moment(12).value - x @ power / N) > 1e-8


def matrix_of_equal_weights(values: np.ndarray):
    """Return a diagonal matrix. A probe of signs gives each of its eigenvalues the same weight."""
    return aslinearoperator(diags_array(values))


class TestFigures:
    @pytest.mark.slow
    def test_traces_are_within_their_error_bars(self) -> None:
        values = SPECTRA["clusters and outliers"]
        A, within = matrix(values), 0
        for seed in range(200):
            value, error = quietly(A, num_probes=8, num_steps=3, rng=seed).trace()
            within += abs(value - values.sum()) <= t.ppf(0.975, 7) * error
        assert 0.91 <= within / 200 <= 0.99  # 95 % within 2.6 standard deviations

    def test_functions_of_the_matrix(self) -> None:
        A = matrix(SPECTRA["semicircle"])
        found = quietly(A, num_probes=32, num_steps=30, rng=0)
        for estimate, exact in [
            (found.trace(), np.trace(A)),
            (found.logdet(1.5), np.linalg.slogdet(A + 1.5 * np.eye(N))[1]),
            (found.apply(np.exp), np.trace(expm(A))),
            (found.moment(2), np.trace(A @ A) / N),
        ]:
            assert abs(estimate.value - exact) < 4 * estimate.error
        assert found.moment(0) == (pytest.approx(1), pytest.approx(0, abs=1e-12))

    @pytest.mark.slow
    def test_densities_integrate_to_one(self) -> None:
        found = quietly(matrix(SPECTRA["uniform"]), num_probes=64, num_steps=40, rng=0)
        grid = found.grid(4000, sigma=0.05)
        value, error = found.pdf(grid, sigma=0.05)
        assert np.trapezoid(value, grid) == pytest.approx(1, abs=1e-3)
        inside = np.abs(grid) < 0.8
        np.testing.assert_allclose(value[inside], 0.5, atol=0.1)
        assert (error[inside] > 0).all()
        np.testing.assert_allclose(np.gradient(found.cdf(grid, 0.05).value, grid), value, atol=1e-3)
        np.testing.assert_allclose(found.cdf([-2, 0, 2], sigma=0).value, [0, 0.5, 1], atol=0.05)
        shares = np.array([0.03, 0.5, 0.97])
        values = found.quantile(shares).value
        assert (found.cdf(values + 1e-9).value >= shares - 1e-12).all()
        assert (found.cdf(values - 1e-9).value < shares).all()
        assert tuple(found.quantile([0, 1]).value) == found.range

    def test_one_probe_has_no_error_bar(self) -> None:
        assert np.isnan(quietly(np.eye(5), num_probes=1, num_steps=2).trace().error)

    def test_logarithm_of_a_negative_eigenvalue(self) -> None:
        found = quietly(matrix(SPECTRA["uniform"]), num_probes=2, num_steps=20, rng=0)
        with pytest.raises(ValueError, match=r"damping is 0\.5, but A has an eigenvalue of -"):
            found.logdet(0.5)


def standard_error(found: SpectralDensity, f) -> float:
    """Return the standard error of the trace of f(A) from the spread between the probes."""
    values = np.where(found.weights > 0, f(np.where(found.weights > 0, found.nodes, 1.0)), 0.0)
    return found.size * (values * found.weights).sum(1).std(ddof=1) / len(found.nodes) ** 0.5


class TestQuadrature:
    @pytest.mark.default_cases("logarithm")
    @pytest.mark.parametrize(
        ("values", "f", "steps"),
        [
            (np.logspace(-4, 1, N), np.log, 16),  # of 100 seeds, 100 within 2 errors; 0 within 2 standard errors
            (np.logspace(-6, 1, N), lambda x: 1 / (x + 1e-2), 16),  # 100, 0
            (np.logspace(-6, 1, N), lambda x: 1 / (x + 1e-3), 32),  # 100, 0
            (np.linspace(0, 1, N) ** 2, lambda x: 1 / (x + 1e-3), 16),  # 100, 7
        ],
        ids=["logarithm", "inverse", "nearly singular", "quadratic"],
    )
    def test_the_error_covers_the_quadrature(self, values, f, steps: int) -> None:
        A, truth, within, within_spread = matrix(values), f(values).sum(), 0, 0
        for seed in range(40):
            found = quietly(A, num_probes=8, num_steps=steps, rng=seed)
            value, error = found.apply(f)
            within += abs(value - truth) <= 2 * error
            within_spread += abs(value - truth) <= 2 * standard_error(found, f)
        assert within >= 38
        assert within_spread <= 4

    @pytest.mark.parametrize("deflate", [0, 5])
    @pytest.mark.parametrize("steps", [2, 5, 8])
    def test_polynomials_have_no_quadrature_error(self, steps: int, deflate: int) -> None:
        found = quietly(matrix(SPECTRA["uniform"] + 2), num_probes=4, num_steps=steps, deflate=deflate)
        assert found.trace().error == pytest.approx(standard_error(found, lambda x: x), rel=1e-14)
        for p in range(2 * steps):
            assert N * found.moment(p).error == pytest.approx(standard_error(found, lambda x, p=p: x**p), rel=1e-12)
        for p in range(steps):  # `apply` does not know that f is a polynomial
            error = found.apply(lambda x, p=p: (x - 3) ** p).error
            assert error == pytest.approx(standard_error(found, lambda x, p=p: (x - 3) ** p), rel=1e-9, abs=1e-10)
        error = found.apply(lambda x: 1 / (x - 0.999)).error
        assert error > 1.1 * standard_error(found, lambda x: 1 / (x - 0.999))

    @pytest.mark.parametrize("complete", [True, False])
    def test_runs_with_an_invariant_subspace_have_no_quadrature_error(self, complete: bool) -> None:
        A = matrix([*np.zeros(30), 1.0, 2.0, 5.0])
        found = quietly(A, num_probes=4, num_steps=20)
        assert found.num_steps == found.num_products / 4 == 4
        found = dataclasses.replace(found, complete=complete)
        spread = standard_error(found, np.exp)
        if complete:
            assert found.apply(np.exp).error == pytest.approx(spread, rel=1e-14)
        else:  # the runs may have been cut off
            assert found.apply(np.exp).error > 1.01 * spread

    def test_runs_of_all_steps_have_no_quadrature_error(self) -> None:
        A = matrix(np.logspace(-6, 0, 12))
        for deflate in (0, 4):
            found = quietly(A, num_probes=4, num_steps=12, deflate=deflate)
            assert found.apply(np.log).error == pytest.approx(standard_error(found, np.log), rel=1e-12)
            assert abs(found.apply(np.log).value + 12 * 3 * np.log(10)) < 4 * found.apply(np.log).error

    def test_only_some_runs_have_a_quadrature_error(self) -> None:
        """Only the run of the second row could have continued."""
        nodes, weights = np.array([[1.0, 3.0, 0.0], [1.0, 2.0, 3.0]]), np.array([[0.5, 0.5, 0.0], [0.25, 0.5, 0.25]])
        found = SpectralDensity(10, nodes, weights, np.zeros(0), 5)
        # The rule of two nodes of this symmetric measure has variance 1/2 around 2.
        half = np.exp([2 - 0.5**0.5, 2 + 0.5**0.5]).mean()
        whole = np.exp([1, 2, 3]) @ weights[1]
        expected = np.hypot(standard_error(found, np.exp) / 10, (whole - half) / 2)
        assert found.mean(np.exp).error == pytest.approx(expected, rel=1e-12)

    def test_no_error_is_below_rounding(self) -> None:
        """Each probe gives the trace of a multiple of the identity, up to rounding."""
        for number in (0.1, 0.3, 0.7):
            value, error = quietly(matrix(np.full(N, number)), num_probes=4, num_steps=3).trace()
            assert abs(value - number * N) < 10 * error < 1e-10 * number  # the difference may be 0, but not the error

    def test_a_single_step_only_gives_the_trace(self) -> None:
        found = quietly(matrix(SPECTRA["uniform"]), num_probes=4, num_steps=1)
        assert found.trace().error == pytest.approx(standard_error(found, lambda x: x), rel=1e-14)
        assert np.isnan(found.logdet(2.0).error)
        assert np.isnan(found.pdf([0.0, 1.0]).error).all()

    def test_functions_are_only_evaluated_within_the_range(self) -> None:
        found = quietly(matrix(np.logspace(-9, 3, N)), num_probes=4, num_steps=40)
        low, high = found.range

        def f(x):
            assert x.size == 0 or low <= x.min() <= x.max() <= high
            return np.sqrt(x - low)

        assert found.mean(f).error > 0

    def test_the_pdf_is_computed_point_by_point(self) -> None:
        found = quietly(matrix(SPECTRA["uniform"]), num_probes=4, num_steps=20)
        grid = np.linspace(-1, 1, 7)
        value, error = found.pdf(grid, 0.1)
        each = [found.pdf(at, 0.1) for at in grid]
        np.testing.assert_allclose(value, [estimate.value for estimate in each], rtol=1e-12)
        np.testing.assert_allclose(error, [estimate.error for estimate in each], rtol=1e-12)
        assert isinstance(each[0].value, float)
        mean = found.mean(lambda x: np.exp(-50 * (x[..., None] - grid) ** 2) / (0.1 * (2 * np.pi) ** 0.5))
        assert (np.abs(value - mean.value) <= 2 * mean.error).all()


class TestDeflation:
    def test_known_eigenvalues_are_atoms(self) -> None:
        values = SPECTRA["clusters and outliers"]
        A = matrix(values)
        plain, deflated = (quietly(A, num_probes=8, num_steps=20, rng=0, deflate=k) for k in (0, 10))
        np.testing.assert_allclose(np.sort(deflated.atoms), np.linspace(5, 20, 10), rtol=1e-10)
        assert deflated.nodes[deflated.weights > 0].max() < 1.001
        assert deflated.moment(0).value == pytest.approx(1, abs=0.01)
        assert deflated.trace().error < plain.trace().error / 2
        assert abs(deflated.trace().value - values.sum()) < 4 * deflated.trace().error

    def test_a_probe_in_the_deflated_space_has_no_weight(self) -> None:
        found = quietly(np.ones((4, 4)), num_probes=12, num_steps=2, rng=0, deflate=1)
        assert found.range == (pytest.approx(0, abs=1e-12), pytest.approx(4))
        assert (found.weights.sum(1) == 0).any()  # a probe whose signs are all equal
        assert found.apply(np.exp).error == pytest.approx(standard_error(found, np.exp), rel=1e-14)
        cut = quietly(np.ones((4, 4)), num_probes=12, num_steps=1, rng=0, deflate=1)
        assert cut.trace().error == pytest.approx(0, abs=1e-12)
        assert np.isnan(cut.apply(np.exp).error)

    def test_nearly_all_eigenvalues(self) -> None:
        A = matrix(np.arange(1.0, 7))
        found = quietly(A, num_probes=3, num_steps=5, rng=0, deflate=4)
        np.testing.assert_allclose(np.sort(found.atoms), [3, 4, 5, 6])
        assert abs(found.trace().value - 21) < 5 * found.trace().error + 1e-9

    def test_the_memory_of_deflated_vectors_is_counted(self) -> None:
        """The memory holds 10 deflated vectors, and 26 vectors for each run."""
        A, run = matrix(SPECTRA["clusters and outliers"]), 8 * N * 26
        found = quietly(A, num_probes=4, num_steps=20, deflate=10, memory=8 * N * 10 + 2 * run)
        whole = quietly(A, num_probes=4, num_steps=20, deflate=10)
        np.testing.assert_allclose(found.nodes, whole.nodes, rtol=1e-9, atol=1e-9)
        with pytest.raises(MemoryError, match="the Lanczos basis of one probe"):
            quietly(A, num_steps=20, deflate=10, memory=8 * N * 10 + run - 1)
        message = r"the deflated eigenspace, 10 vectors of 400 numbers, takes .*: reduce deflate"
        with pytest.raises(MemoryError, match=message):
            quietly(A, num_steps=20, deflate=10, memory=8 * N * 10 - 1)
        single = A.astype(np.float32)
        quietly(single, num_probes=1, num_steps=20, deflate=10, memory=12 * N * 10 + run // 2)
        with pytest.raises(MemoryError):
            quietly(single, num_probes=1, num_steps=20, deflate=10, memory=12 * N * 10 + run // 2 - 1)

    def test_the_search_respects_the_memory(self) -> None:
        """ARPACK's default basis of 30 vectors does not fit, but the smallest for 2 eigenvalues, 4 vectors, does."""
        A = matrix(SPECTRA["clusters and outliers"])
        found = quietly(A, num_probes=1, num_steps=2, deflate=2, memory=8 * N * (2 * 12 + 2 + 4))
        np.testing.assert_allclose(np.sort(found.atoms), np.linspace(5, 20, 10)[-2:], rtol=1e-10)
        with pytest.raises(MemoryError, match=r"ARPACK's basis of 4 vectors"):
            quietly(A, num_probes=1, num_steps=1, deflate=2, memory=8 * N * 13)


class TestOperators:
    @pytest.mark.slow
    def test_the_digits_network(self) -> None:
        """Compare all 2,410 eigenvalues: those above the bulk one by one, the others by shares."""
        problem = digits()
        H = HessianLinearOperator(**problem)
        values = np.linalg.eigvalsh(functorch_hessian(**problem).numpy())
        found = quietly(H, num_probes=8, num_steps=80, rng=0)
        assert found.num_products == H.num_products == 640
        top = values[-9:]
        for nodes in found.nodes:
            np.testing.assert_allclose(np.sort(nodes)[-9:], top, rtol=1e-6)
        assert distance(found, values) < 2e-3
        assert abs(found.trace().value - values.sum()) < 4 * found.trace().error
        for point in (1e-3, 1e-2, 1e-1):
            share, error = found.cdf([point], sigma=0)
            assert abs(share[0] - (values <= point).mean()) < 4 * error[0] + 0.01

    def test_a_small_cnn_in_float32(self) -> None:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 3))
        images, labels = torch.randn(40, 1, 8, 8), torch.randint(0, 3, (40,))
        H = HessianLinearOperator(model, nn.CrossEntropyLoss(), dict(model.named_parameters()), [(images, labels)])
        values = np.linalg.eigvalsh(H @ np.eye(H.shape[0]))
        found = quietly(H, num_probes=8, num_steps=60, rng=0)
        assert distance(found, values) < 5e-3
        assert found.range == (pytest.approx(values[0], rel=1e-4), pytest.approx(values[-1], rel=1e-4))

    def test_probes_run_in_groups_if_memory_is_short(self) -> None:
        A = matrix(SPECTRA["uniform"])
        whole = quietly(A, num_probes=5, num_steps=20, rng=0)
        grouped = quietly(A, num_probes=5, num_steps=20, rng=0, memory=2 * 8 * N * 24)
        np.testing.assert_allclose(grouped.nodes, whole.nodes, rtol=1e-9, atol=1e-12)
        with pytest.raises(MemoryError, match="fewer num_steps"):
            quietly(A, num_probes=5, num_steps=20, memory=1000)


class TestTime:
    def test_time_limits_give_incomplete_densities(self, tmp_path) -> None:
        A = matrix(SPECTRA["uniform"])
        options = {"num_probes": 5, "num_steps": 20, "rng": 0, "memory": 2 * 8 * N * 26, "checkpoint": tmp_path}
        found = quietly(A, seconds=0, **options)
        assert not found.complete
        assert found.nodes.shape == (2, 1)
        while not found.complete:
            found = quietly(A, seconds=0.001, **options)
        whole = quietly(A, **options | {"checkpoint": None})
        assert whole.complete
        np.testing.assert_array_equal(found.nodes, whole.nodes)
        np.testing.assert_array_equal(found.weights, whole.weights)

    def test_early_ends_are_complete(self) -> None:
        assert quietly(matrix([*np.zeros(30), 1.0, 2.0]), num_probes=2, num_steps=20, seconds=100).complete

    def test_free_memory_may_change_between_runs(self, tmp_path) -> None:
        A = matrix(SPECTRA["uniform"])
        options = {"num_probes": 4, "num_steps": 10, "rng": 0, "checkpoint": tmp_path}
        quietly(A, memory=2 * 8 * N * 16, seconds=0, **options)
        found = quietly(A, memory=3 * 8 * N * 16, **options)
        expected = quietly(A, memory=2 * 8 * N * 16, **options | {"checkpoint": None})
        np.testing.assert_array_equal(found.nodes, expected.nodes)


class TestFiles:
    def test_round_trip(self, tmp_path) -> None:
        found = quietly(matrix(SPECTRA["uniform"]), num_probes=2, num_steps=5, rng=0, deflate=2)
        found.save(tmp_path / "density.npz")
        loaded = SpectralDensity.load(tmp_path / "density.npz")
        assert (loaded.size, loaded.num_products) == (found.size, found.num_products)
        for name in ("nodes", "weights", "atoms"):
            np.testing.assert_array_equal(getattr(loaded, name), getattr(found, name))
        assert str(loaded) == str(found)

    def test_another_file(self, tmp_path) -> None:
        np.savez(tmp_path / "x.npz", nodes=np.zeros(3))
        with pytest.raises(
            ValueError, match=r"was not written by SpectralDensity.save, because it lacks size, weights"
        ):
            SpectralDensity.load(tmp_path / "x.npz")

    def test_nothing_in_a_file_is_executed(self, tmp_path) -> None:
        np.savez(
            tmp_path / "x.npz",
            **dict.fromkeys(
                ("size", "nodes", "weights", "atoms", "complete", "recurrences", "resolution"), np.zeros(1)
            ),
            num_products=np.array([object()]),
        )
        with pytest.raises(ValueError, match=r"was not written by SpectralDensity.save"):
            SpectralDensity.load(tmp_path / "x.npz")


@pytest.mark.parametrize("log", [True, False])
def test_the_plot(log: bool) -> None:
    import matplotlib as mpl

    mpl.use("agg")
    import matplotlib.pyplot as plt

    found = quietly(matrix(SPECTRA["clusters and outliers"]), num_probes=4, num_steps=30, rng=0, deflate=3)
    ax = found.plot(log=log)
    assert ax.get_yscale() == ("log" if log else "linear")
    assert ax.collections[0].get_paths()[0].vertices[:, 1].min() >= 0  # no density is negative
    own = plt.figure().add_subplot()
    assert found.plot(own, log=log) is own
    plt.close("all")


@pytest.mark.parametrize(
    ("A", "options", "match"),
    [
        (np.ones((2, 3)), {}, r"A has shape \(2, 3\)"),
        (np.eye(3), {"num_probes": 0}, "num_probes is 0"),
        (np.eye(3), {"num_steps": 1.5}, r"num_steps is 1\.5"),
        (np.eye(3), {"deflate": 3}, "deflate is 3, but must be less than 3"),
        (np.eye(3), {"seconds": float("nan")}, "seconds is nan, but must be 0 or more"),
        (np.eye(3), {"seconds": -1.0}, r"seconds is -1\.0"),
        (np.full((3, 3), np.nan), {}, "not finite"),
    ],
)
def test_bad_input(A, options, match) -> None:
    with pytest.raises(ValueError, match=match):
        quietly(A, **options)
    with pytest.raises(TypeError, match="must be real"):
        quietly(np.eye(2) * 1j)
    with pytest.raises(TypeError, match="seconds is '60', but must be a number"):
        quietly(np.eye(2), seconds="60")


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_long_vectors_of_either_precision(dtype) -> None:
    """Rounding does not grow with the length: no run stops early, and outliers do not affect the bulk."""
    size, bulk = 100_000, 1e-3
    values = np.r_[np.linspace(0.2, 1, 10), np.random.default_rng(0).uniform(0, bulk, size - 10)]
    entries = values.astype(dtype)
    A = LinearOperator(
        (size, size), matvec=lambda x: entries * x.ravel(), matmat=lambda X: entries[:, None] * X, dtype=dtype
    )
    found = density(A, num_probes=2, num_steps=40, progress=False)
    assert found.num_steps == 40
    for f in (np.sqrt, lambda x: 1 / (np.abs(x) + bulk / 10)):
        value, error = found.apply(lambda x, f=f: f(np.abs(x)))
        assert 0 < error < 1e-3 * value
        assert abs(value - f(values).sum()) < 12 * error  # Student's t for two probes and 95 %
