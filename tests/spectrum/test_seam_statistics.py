"""Check error bars and bounds of densities and block studies against dense eigenvalues."""

from __future__ import annotations

import copy
import functools
import pickle
from collections.abc import Callable

import numpy as np
import pytest
import torch
from cases import nightly
from matrices import matrix
from scipy.sparse.linalg import aslinearoperator
from scipy.special import ndtr
from torch import nn

from curvop import HessianLinearOperator
from curvop.operators.summaries import with_error
from curvop.problems import digits
from curvop.spectrum import BlockStudy, BoundedEstimate, SpectralDensity, blocks, density

PROBES = 8


def symmetric(A: HessianLinearOperator) -> np.ndarray:
    dense = A @ np.eye(A.shape[0])
    return (dense + dense.T) / 2


def small_cnn() -> np.ndarray:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 3)).double()
        data = [(torch.randn(40, 1, 8, 8).double(), torch.randint(0, 3, (40,)))]
    return symmetric(HessianLinearOperator(model, nn.CrossEntropyLoss(), dict(model.named_parameters()), data))


HALF = np.linspace(0.03, 1, 200) ** 2
MATRICES: dict[str, Callable[[], np.ndarray]] = {
    "digits": lambda: symmetric(HessianLinearOperator(**digits())),
    "cnn": small_cnn,
    "zeros": lambda: matrix(np.r_[np.zeros(300), np.linspace(1, 2, 100)]),
    "symmetric": lambda: matrix(np.r_[-HALF, HALF]),
    "outlier": lambda: matrix(np.r_[np.linspace(0, 1, 399), 1e4]),
}


@functools.cache
def problem(name: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    dense = MATRICES[name]()
    return dense, *np.linalg.eigh(dense)


def estimated(name: str, seed: int, **options) -> SpectralDensity:
    return density(aslinearoperator(problem(name)[0]), rng=seed, progress=False, **options)


def rounding(values: np.ndarray) -> float:
    """Return the distance below which eigenvalues are considered equal."""
    return 1e-11 * np.abs(values).max()


def share(values: np.ndarray, points: np.ndarray, side: int) -> np.ndarray:
    """Return the share of sorted eigenvalues below the points (side -1), or up to and including them (side 1)."""
    return np.searchsorted(values, points + side * rounding(values)) / len(values)


class Coverage:
    """Count how often the true value is within two error bars."""

    def __init__(self, name: str) -> None:
        self.name, self.values = name, problem(name)[1]
        self.points = np.r_[np.quantile(self.values, [0.02, 0.1, 0.25, 0.5, 0.75, 0.9, 0.98]), 0.0]
        width = np.quantile(np.abs(self.values), 0.9)
        self.functions = [
            *(lambda v, eps=eps * width: np.abs(v) / (np.abs(v) + eps) for eps in (1e-4, 1e-2, 1.0)),
            lambda v: v <= self.points[4] + rounding(self.values),
            lambda v: np.exp(-np.abs(v) / width),
        ]
        self.shares = np.array([0.05, 0.25, 0.5, 0.75, 0.95])

    def of(self, seeds: int) -> np.ndarray:
        """Return the coverage of shares, functions and quantiles."""
        found = [self._once(estimated(self.name, seed)) for seed in range(seeds)]
        return np.array([np.mean(kind) for kind in zip(*found, strict=True)])

    def _once(self, found: SpectralDensity) -> list[np.ndarray]:
        value, error = cdf = found.cdf(self.points)
        least, most = (share(self.values, self.points, side) for side in (-1, 1))
        assert (cdf.low - 1e-12 <= value).all()
        assert (value <= cdf.high + 1e-12).all()
        shares = (least - 2 * error - 1e-12 <= value) & (value <= most + 2 * error + 1e-12)
        means = [found.mean(f) for f in self.functions]
        functions = [
            abs(m.value - f(self.values).mean()) <= 2 * m.error for m, f in zip(means, self.functions, strict=True)
        ]
        quantile, margin = found.quantile(self.shares), rounding(self.values)
        size = len(self.values)
        first = self.values[np.minimum(np.floor(self.shares * size).astype(int), size - 1)]
        last = self.values[np.ceil(self.shares * size).astype(int) - 1]
        reach = 2 * quantile.error + margin
        return [shares, np.array(functions), (quantile.low - reach <= first) & (last <= quantile.high + reach)]


@pytest.mark.slow
def test_error_bars_cover_the_truth() -> None:
    assert (Coverage("symmetric").of(20) >= 0.95).all()


@pytest.mark.nightly
def test_error_bars_cover_the_truth_in_all_spectra() -> None:
    found = np.array([Coverage(name).of(200) for name in MATRICES])
    shares, functions, quantiles = found.T
    assert (shares >= 0.95).all()  # 95.5 to 99.3 %
    assert (quantiles >= 0.95).all()  # 98.6 to 100 %
    # If the quadrature is exact for a function, the standard error of eight probes covers 91 %.
    assert functions.mean() >= 0.95  # 95.1 %
    assert (functions >= 0.9).all()  # 90.5 % in "zeros", 100 % in "digits"


@pytest.mark.parametrize("name", ["zeros", *nightly("digits", "cnn", "symmetric", "outlier")])
@pytest.mark.parametrize("steps", [1, 2, 7, 64])
def test_the_measure_of_a_probe_is_within_its_bounds(name: str, steps: int) -> None:
    """The bounds are proven: they hold for each probe, at every point, and for every quantile."""
    _, values, vectors = problem(name)
    found = estimated(name, 5, num_steps=steps, num_probes=1)
    signs = np.random.default_rng(5).choice(np.array([-1, 1], dtype=np.int8), (1, len(values)))
    upto = np.r_[0.0, ((signs @ vectors)[0] ** 2 / len(values)).cumsum()]
    points = np.r_[np.linspace(values[0], values[-1], 200), np.quantile(values, np.linspace(0, 1, 200)), 0.0]
    least, most = (upto[np.searchsorted(values, points + side * rounding(values))] for side in (-1, 1))
    cdf = found.cdf(points)
    assert (cdf.low <= most + 1e-12).all()
    assert (cdf.high >= least - 1e-12).all()
    shares = np.linspace(0.01, 0.99, 50)
    at = values[np.minimum(np.searchsorted(upto, shares) - 1, len(values) - 1)]
    quantile = found.quantile(shares)
    assert (quantile.low <= at + rounding(values)).all()
    assert (quantile.high >= at - rounding(values)).all()
    if steps == 1:  # only the total mass is known
        assert (cdf.low == 0).all()
        np.testing.assert_allclose(cdf.high, 1, rtol=1e-14)


def test_the_bounds_are_sharp() -> None:
    """Compare with the rule with a prescribed node, from the Jacobi matrix (Golub, Meurant, 2010, section 6.2.2)."""
    found = estimated("symmetric", 0, num_steps=20, num_probes=2)
    for point in (-0.5, -0.1, 0.0, 0.3, 0.8):
        bounds = []
        for alphas, betas in found.recurrences:
            T = np.diag(alphas) + np.diag(betas[:-1], 1) + np.diag(betas[:-1], -1)
            before = np.linalg.solve(T[:-1, :-1] - point * np.eye(19), np.eye(19)[-1])
            T[-1, -1] = point + betas[-2] ** 2 * before[-1]
            nodes, vectors = np.linalg.eigh(T)
            at = np.abs(nodes - point).argmin()
            assert nodes[at] == pytest.approx(point, abs=1e-12)
            bounds.append([(vectors[0, :at] ** 2).sum(), (vectors[0, : at + 1] ** 2).sum()])
        low, high = np.mean(bounds, axis=0)
        cdf = found.cdf(point)
        assert cdf.low <= low + 1e-12
        assert cdf.high >= high - 1e-12
        assert cdf.high - cdf.low < 1.1 * (high - low)


def test_the_error_combines_probes_and_bounds() -> None:
    found = estimated("cnn", 0)
    points = np.linspace(-0.1, 0.5, 7)
    alone = [single_probe(found, probe).cdf(points) for probe in range(PROBES)]
    values = np.array([estimate.value for estimate in alone])
    cdf = found.cdf(points)
    np.testing.assert_allclose(cdf.value, (cdf.low + cdf.high) / 2, rtol=1e-12)
    np.testing.assert_allclose(cdf.value, values.mean(0), rtol=1e-12)
    spread = values.std(0, ddof=1) / PROBES**0.5
    np.testing.assert_allclose(cdf.error, np.hypot(spread, (cdf.high - cdf.low) / 4), rtol=1e-9)


def single_probe(found: SpectralDensity, probe: int) -> SpectralDensity:
    rows = slice(probe, probe + 1)
    parts = (found.nodes[rows], found.weights[rows], found.atoms)
    return SpectralDensity(found.size, *parts, 0, True, found.recurrences[rows], found.resolution)


@pytest.mark.parametrize("deflate", [0, 3])
def test_after_all_steps_only_the_spread_is_left(deflate: int) -> None:
    values = np.sort(np.random.default_rng(0).normal(size=30))
    found = density(aslinearoperator(matrix(values)), num_steps=30, deflate=deflate, progress=False)
    points = (values[1:] + values[:-1]) / 2
    cdf = found.cdf(points)
    np.testing.assert_allclose(cdf.low, cdf.high, atol=1e-14)
    each = (found.weights[:, :, None] * (found.nodes[:, :, None] <= points)).sum(1)
    spread = each.std(0, ddof=1) / PROBES**0.5
    np.testing.assert_allclose(cdf.error, spread, rtol=1e-9, atol=1e-15)
    negative = found.mean(lambda v: v < 0)
    np.testing.assert_allclose(negative.low, negative.high, atol=1e-14)


def test_a_multiple_eigenvalue_only_counts_in_the_upper_bound() -> None:
    found = estimated("zeros", 0)
    cdf = found.cdf([-1e-6, 0.0, 1e-6])
    np.testing.assert_allclose(cdf.low, [0, 0, cdf.high[1]], atol=1e-9)
    np.testing.assert_allclose(cdf.high[[0, 2]], [0, cdf.high[1]], atol=1e-9)
    assert abs(cdf.high[1] - 0.75) < 0.05
    assert cdf.value[1] == pytest.approx(cdf.high[1] / 2, rel=1e-9)
    quantile = found.quantile([0.1, 0.5])
    for name in ("value", "low", "high", "error"):
        np.testing.assert_allclose(getattr(quantile, name), 0, atol=1e-10)


@pytest.mark.slow
def test_a_kink_narrower_than_the_distance_of_nodes() -> None:
    """The Hessian of digits has hundreds of zero eigenvalues between two nodes, which the Gauss rule misses."""
    values = problem("digits")[1]
    found = estimated("digits", 0)
    for eps in (1e-9, 1e-6, 1e-4):
        estimate = found.mean(lambda v, eps=eps: np.abs(v) / (np.abs(v) + eps))
        exact = (np.abs(values) / (np.abs(values) + eps)).mean()
        assert abs(estimate.value - exact) <= 2 * estimate.error
        assert estimate.low - 1e-3 <= exact <= estimate.high + 1e-3
        assert estimate.error < 0.2
    assert found.apply(np.square).error < 0.5  # a function that hardly varies in the bulk has no such error


def test_the_cdf_is_broadened_on_request() -> None:
    found = estimated("symmetric", 0)
    grid = np.linspace(-1, 1, 9)
    plain, broad = found.cdf(grid), found.cdf(grid, 0.2)
    np.testing.assert_array_equal(found.cdf(grid, 0).value, plain.value)
    values = problem("symmetric")[1]
    exact = ndtr((grid[:, None] - values) / 0.2).mean(1)
    assert (np.abs(broad.value - exact) <= 4 * broad.error + 1e-9).all()
    assert np.abs(broad.value - plain.value).max() > 0.02


def test_estimates_unpack_and_copies_keep_the_bounds() -> None:
    found = estimated("zeros", 0).cdf(1.5)
    value, error = found
    assert (value, error) == (found[0], found[1]) == (found.value, found.error)
    for other in (pickle.loads(pickle.dumps(found)), copy.deepcopy(found)):
        assert isinstance(other, BoundedEstimate)
        assert (other, other.low, other.high) == (found, found.low, found.high)
    assert "high=" in repr(found)
    assert str(found) == with_error(value, error, 10)


def test_a_saved_density_gives_the_same_answers(tmp_path) -> None:
    found = estimated("zeros", 0, deflate=2)
    found.save(tmp_path / "density.npz")
    loaded = SpectralDensity.load(tmp_path / "density.npz")
    for one, other in ((found.cdf([0.0, 1.5]), loaded.cdf([0.0, 1.5])), (found.quantile(0.9), loaded.quantile(0.9))):
        for name in ("value", "error", "low", "high"):
            np.testing.assert_array_equal(getattr(one, name), getattr(other, name))


@pytest.mark.default_cases("6-*")
@pytest.mark.parametrize("name", ["symmetric", "outlier"])
@pytest.mark.parametrize("steps", [6, 20])
def test_extreme_eigenvalues_are_within_their_errors(name: str, steps: int) -> None:
    values, within = problem(name)[1], 0
    for seed in range(40):
        found = estimated(name, seed, num_steps=steps, num_probes=4)
        (low, high), (below, above) = found.range, found.range_errors
        assert values[0] - rounding(values) <= low
        assert high <= values[-1] + rounding(values)
        within += int(low - below <= values[0]) + int(values[-1] <= high + above)
        assert max(below, above) < np.ptp(values)
    assert within >= 74  # of 80; 95 % are 76


class Counted(HessianLinearOperator):
    """Count the columns multiplied by any block."""

    made = 0

    def _apply(self, rows):
        Counted.made += len(rows)
        return super()._apply(rows)


@pytest.fixture(scope="module")
def H() -> HessianLinearOperator:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)).double()
        X, y = torch.randn(30, 6).double(), torch.randint(0, 3, (30,))
    return Counted(model, nn.CrossEntropyLoss(), dict(model.named_parameters()), [(X, y)])


@pytest.fixture(scope="module")
def study(H) -> BlockStudy:
    return blocks(H, num_probes=4, num_steps=7, norm_products=4, progress=False)  # up to 28 rows are formed


class TestFormedBlocks:
    def test_every_answer_is_exact(self, H, study) -> None:
        dense = symmetric(H)
        for index, (name, rows) in enumerate(H.params_slices.items()):
            found, values = study.densities[index], np.linalg.eigvalsh(dense[rows, rows])
            assert found.exact == (len(values) <= 28), name
            if not found.exact:
                continue
            scale = np.abs(values).max()
            assert found.num_products == len(values)
            for estimate, exact in (
                (found.trace(), values.sum()),
                (found.apply(np.exp), np.exp(values).sum()),
                (found.moment(2), np.square(values).mean()),
                (found.logdet(1.0), np.log(values + 1).sum()),
                (found.cdf(values[0] - 1e-6), 0),
                (found.cdf((values[-1] + values[-2]) / 2), 1 - 1 / len(values)),
                (found.cdf(values[-1] + 1e-6), 1),
                (found.quantile(1.0), values[-1]),
                (found.quantile(0.5), values[int(np.ceil(len(values) / 2)) - 1]),
            ):
                assert estimate.value == pytest.approx(exact, abs=1e-13)
                assert estimate.error <= 1e-12
            for found_ends, ends in ((study.smallest, values[0]), (study.largest, values[-1])):
                assert abs(found_ends[index] - ends) < 1e-14
            assert max(study.smallest_errors[index], study.largest_errors[index]) < 1e-13 * scale
            assert study.norms[index, index] == pytest.approx(np.linalg.norm(dense[rows, rows]), rel=1e-12)
            assert study.norm_errors[index, index] == 0
            value, error = found.pdf(found.grid(50))
            assert (error <= 1e-12 * value.max()).all()
            assert "+-" not in study.lines[index + 1]
            assert "all known" in str(found)
            found.plot()
        assert "+-" in study.lines[1]
        __import__("matplotlib.pyplot").pyplot.close("all")

    def test_the_extremes_of_other_blocks_have_errors(self, H, study) -> None:
        dense, rows = symmetric(H), next(iter(H.params_slices.values()))
        values = np.linalg.eigvalsh(dense[rows, rows])
        assert 0 <= study.smallest[0] - values[0] <= study.smallest_errors[0]
        assert 0 <= values[-1] - study.largest[0] <= study.largest_errors[0]
        assert study.lines[1].split()[3] == "-"
        assert study.lines[1].split()[6] == "+"

    def test_products_are_counted(self, H) -> None:
        before = Counted.made
        study = blocks(H, num_probes=2, num_steps=30, norm_products=8, progress=False)
        assert study.num_products == sum(study.sizes) + 8 + 8 + 8 + 3
        assert Counted.made - before == study.num_products

    def test_round_trip(self, study, tmp_path) -> None:
        study.save(tmp_path / "blocks.npz")
        loaded = BlockStudy.load(tmp_path / "blocks.npz")
        assert str(loaded) == str(study)
        for one, other in zip(loaded.densities, study.densities, strict=True):
            np.testing.assert_array_equal(one.atoms, other.atoms)
            assert one.exact == other.exact

    def test_time_and_checkpoints(self, H, study, tmp_path) -> None:
        options = {"num_probes": 4, "num_steps": 7, "norm_products": 4, "progress": False}
        counts = []
        while True:
            before = Counted.made
            found = blocks(H, **options, checkpoint=tmp_path, seconds=1e-9)
            counts.append(Counted.made - before)
            if found.complete:
                break
        assert max(counts) <= 4  # a block product at a time
        assert sum(counts) == study.num_products == found.num_products
        assert str(found) == str(study)
        for one, other in zip(found.densities, study.densities, strict=True):
            np.testing.assert_array_equal(one.atoms, other.atoms)
            np.testing.assert_array_equal(one.nodes, other.nodes)

    def test_the_picture_shows_both(self, study) -> None:
        from matplotlib.figure import Figure

        table = study.plot(Figure(figsize=(9, 7))).axes[0]
        ends = [
            segment[:, 0]
            for line in table.collections
            if hasattr(line, "get_segments")
            for segment in line.get_segments()
        ]
        assert any(end[1] == pytest.approx(study.largest[0] + study.largest_errors[0]) for end in ends)
