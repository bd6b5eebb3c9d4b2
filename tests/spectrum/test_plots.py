"""Plots pass arguments on, share axes with a correct legend, and draw the numbers of their results."""

from __future__ import annotations

import dataclasses
import io
import itertools
import re
import sys
import warnings
from typing import Any

import matplotlib as mpl
import numpy as np
import pytest
import torch
from matplotlib.colors import to_hex, to_rgb
from matplotlib.figure import Figure
from matrices import matrix
from torch import nn

from curvop import HessianLinearOperator, KFACLinearOperator
from curvop.operators.figures import PALETTE
from curvop.operators.kronecker_spectrum import LayerEigenvalues
from curvop.spectrum import BlockStudy, EigenResult, SpectralDensity, Tracker, blocks, density, eigsh, track

VALUES = np.r_[-2.0, np.linspace(-0.01, 0.01, 95), 1.0, 2.0, 3.0, 5.0]


def density_of(values: Any, **options: Any) -> SpectralDensity:
    return density(matrix(np.asarray(values)), 4, 12, rng=0, progress=False, **options)


def result_of(which: str = "LM", k: int = 5, **options: Any) -> EigenResult:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # some of these results are bad on purpose
        return eigsh(matrix(VALUES), k, which, progress=False, **options)


def problem() -> dict[str, Any]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    data = [(torch.randn(20, 3).double(), torch.randn(20, 2).double())]
    return {"model": model, "loss_function": nn.MSELoss(), "params": dict(model.named_parameters()), "data": data}


def tracker_of(learning_rate: float = 0.1, k: int = 1, which: str = "LA", adam: bool = False) -> Tracker:
    case = problem()
    model, (X, y) = case["model"], case["data"][0]
    kind = torch.optim.Adam if adam else torch.optim.SGD
    optimizer = kind(model.parameters(), lr=learning_rate)
    tracker = track(HessianLinearOperator(**case), k, every=1, which=which, optimizer=optimizer if adam else None)
    for _ in range(3):
        tracker.step()
        optimizer.zero_grad()
        nn.functional.mse_loss(model(X), y).backward()
        optimizer.step()
    return tracker


@pytest.fixture(scope="module")
def found() -> SpectralDensity:
    return density_of(VALUES, deflate=3)


@pytest.fixture(scope="module")
def result() -> EigenResult:
    return result_of()


@pytest.fixture(scope="module")
def loose() -> EigenResult:
    """Return eigenvalues with visible error bars."""
    result = result_of("LA", 4, method="lobpcg", tol=0.9)
    assert result.certificate.bounds.max() > 1e-2
    return result


@pytest.fixture(scope="module")
def tracker() -> Tracker:
    return tracker_of(k=2)


@pytest.fixture(scope="module")
def study() -> BlockStudy:
    return blocks(HessianLinearOperator(**problem()), progress=False)


@pytest.fixture(scope="module")
def layers() -> LayerEigenvalues:
    return KFACLinearOperator(**problem()).eigenvalues()


@pytest.fixture
def ax() -> Any:
    """Axes of a figure that pyplot does not know."""
    return Figure(figsize=(7, 4), layout="constrained").add_subplot()


@pytest.fixture
def plt() -> Any:
    import matplotlib.pyplot as plt

    plt.close("all")
    plt.switch_backend("agg")
    yield plt
    plt.close("all")


def entries(ax: Any) -> list[str]:
    return [text.get_text() for text in ax.get_legend().get_texts()]


def curve(ax: Any, label: str) -> Any:
    """Return the line whose label begins with `label`."""
    return next(line for line in ax.lines if line.get_label().startswith(label))


def ticks(ax: Any) -> list[Any]:
    """Return the rows of markers below the upper edge, from the top down."""
    rows = [line for line in ax.lines if line.get_transform() is ax.get_xaxis_transform() and len(line.get_xdata())]
    return sorted(rows, key=lambda line: -line.get_ydata()[0])


class TestEveryPlot:
    """What the methods have in common."""

    RESULTS = ("density", "spectrum", "scree", "tracker", "layers")

    @pytest.fixture
    def plot(self, request, found, result, tracker, layers) -> Any:
        """Return the method `plot` of one of the results."""
        if request.param == "scree":
            return lambda ax=None, **options: result.plot(ax, "scree", **options)
        return {"density": found, "spectrum": result, "tracker": tracker, "layers": layers}[request.param].plot

    @pytest.mark.parametrize("plot", RESULTS, indirect=True)
    def test_label_color_and_properties_reach_the_lines(self, plot, ax) -> None:
        assert plot(ax, label="mine", color="green", lw=3.5, alpha=0.25) is ax
        lines = [line for line in ax.lines if line.get_alpha() == 0.25 and len(line.get_xdata())]
        assert lines
        assert all(line.get_linewidth() == 3.5 for line in lines)
        assert all(to_rgb(line.get_color()) == to_rgb("green") for line in lines)
        assert any(text.startswith("mine") for text in entries(ax))

    @pytest.mark.parametrize("plot", RESULTS, indirect=True)
    def test_overlays_differ_in_color_and_have_an_entry_each(self, plot, ax) -> None:
        once = len(entries(plot(ax, label="one")))
        colors = {to_hex(line.get_color()) for line in ax.lines}
        plot(ax, label="two")
        new = {to_hex(line.get_color()) for line in ax.lines} - colors
        assert new
        assert new <= {color.lower() for color in PALETTE}
        texts = entries(ax)
        assert len(set(texts)) == len(texts)
        assert sum(text.startswith("one") for text in texts) == sum(text.startswith("two") for text in texts)
        assert len(texts) == once + sum(text.startswith("two") for text in texts)

    @pytest.mark.parametrize("plot", RESULTS, indirect=True)
    def test_a_new_figure_is_the_only_one_that_stays_open(self, plot, plt) -> None:
        settings = dict(mpl.rcParams)
        drawn = plot()
        assert plt.get_fignums() == [drawn.figure.number]
        assert dict(mpl.rcParams) == settings

    @pytest.mark.parametrize("plot", RESULTS, indirect=True)
    @pytest.mark.parametrize("kind", ["pdf", "svg"])
    def test_vector_formats(self, plot, ax, kind: str) -> None:
        plot(ax, label="mine")
        with mpl.rc_context({"svg.fonttype": "none"}):
            ax.figure.savefig(file := io.BytesIO(), format=kind)
        assert file.getvalue().startswith({"pdf": b"%PDF", "svg": b"<?xml"}[kind])
        assert kind == "pdf" or b"mine" in file.getvalue()
        numbers = re.findall(rb"-?\d+\.\d+", file.getvalue()) if kind == "svg" else []
        assert all(abs(float(number)) < 2000 for number in numbers)  # nothing is far from the figure

    @pytest.mark.parametrize("plot", RESULTS, indirect=True)
    def test_the_text_fits_the_width_of_a_column(self, plot) -> None:
        figure = Figure(figsize=(3.3, 2.4), layout="constrained")
        axes = plot(figure.add_subplot())
        figure.draw_without_rendering()
        box, inside = axes.get_window_extent(), axes.get_legend().get_window_extent()
        assert box.x0 <= inside.x0 < inside.x1 <= box.x1
        assert box.y0 <= inside.y0 < inside.y1 <= box.y1
        assert box.width > 0.7 * figure.bbox.width
        low, high = axes.get_xlim()
        shown = [label for label in axes.get_xticklabels() if low <= label.get_position()[0] <= high]
        sides = sorted(label.get_window_extent().intervalx.tolist() for label in shown if label.get_text())
        assert all(left[1] < right[0] for left, right in itertools.pairwise(sides))
        assert all(text.get_fontsize() >= 7 for text in [*shown, *axes.get_legend().get_texts(), axes.xaxis.label])

    @pytest.mark.parametrize("plot", RESULTS, indirect=True)
    @pytest.mark.parametrize(
        ("options", "error", "match"),
        [
            ({"ax": "scree"}, TypeError, "ax is a str, but must be a single Matplotlib Axes: pass for example"),
            ({"ax": np.zeros(2)}, TypeError, "ax is a ndarray, but must be a single Matplotlib Axes: pass for example"),
            ({"line_width": 2}, TypeError, "line_width.*: pass a property of matplotlib.lines.Line2D"),
            ({"color": "bleu"}, ValueError, "'bleu' is not a valid value for color"),
        ],
    )
    def test_bad_arguments_leave_no_figure(self, plot, plt, options, error, match) -> None:
        with pytest.raises(error, match=match):
            plot(**options)
        assert not plt.get_fignums()

    @pytest.mark.parametrize("plot", RESULTS, indirect=True)
    def test_without_pyplot(self, plot, ax, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)
        assert plot(ax) is ax

    @pytest.mark.parametrize("plot", RESULTS, indirect=True)
    def test_without_matplotlib(self, plot, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "matplotlib.axes", None)
        with pytest.raises(ImportError, match=r'plots need matplotlib: pip install "curvop\[plot\]"'):
            plot(linewidth=2)


class TestDensity:
    @pytest.mark.parametrize("sigma", [None, 0.05, 1.0])
    def test_the_curve_and_the_band_are_those_of_pdf(self, found, ax, sigma: float | None) -> None:
        grid, values = curve(found.plot(ax, sigma=sigma), "100").get_data()
        value, error = found.pdf(grid, sigma)
        np.testing.assert_array_equal(values, value)
        # Values far below the axes are clipped, because vector formats would contain points far below the figure.
        lower, upper = (np.maximum(value + sign * error, 1e-3 * ax.get_ylim()[0]) for sign in (-1, 1))
        band = ax.collections[0].get_paths()[0].vertices
        for edge in (lower, upper):
            assert {*map(tuple, np.c_[grid, edge].tolist())} <= {*map(tuple, band.tolist())}
        assert np.trapezoid(values, grid) == pytest.approx(1, abs=0.01)

    def test_a_narrow_peak_is_resolved(self, found, ax) -> None:
        grid, values = curve(found.plot(ax, sigma=0.004), "100").get_data()
        near = values[np.abs(grid - 5) < 0.1]  # a single known eigenvalue
        assert near.max() == pytest.approx(1 / (100 * 0.004 * (2 * np.pi) ** 0.5), rel=0.05)

    def test_the_legend_names_sigma_the_band_and_the_known_eigenvalues_once(self, found, ax) -> None:
        found.plot(ax, label="A", sigma=0.05)
        density_of(VALUES + 1, deflate=2).plot(ax, label="B", sigma=0.1)
        assert entries(ax) == ["A (sigma = 0.05)", "B (sigma = 0.1)", "band: ± error", "known eigenvalues"]
        assert entries(ax)[:2] == [line.get_label() for line in ax.lines if "sigma" in line.get_label()]

    def test_the_legend_has_no_band_if_there_is_none(self, ax) -> None:
        exact = SpectralDensity(4, np.zeros((0, 1)), np.zeros((0, 1)), np.arange(4.0), 4)
        assert exact.exact
        assert entries(exact.plot(ax)) == ["4 eigenvalues (sigma = 0.00474)", "known eigenvalues"]

    def test_known_eigenvalues_are_ticks_of_the_same_color_in_a_row_for_each_density(self, found, ax) -> None:
        other = density_of(VALUES, deflate=2)
        found.plot(ax, label="A")
        other.plot(ax, label="B")
        for row, part, name in zip(ticks(ax), (found, other), "AB", strict=True):
            np.testing.assert_array_equal(row.get_xdata(), part.atoms)
            assert row.get_color() == curve(ax, name).get_color()
        assert len({float(row.get_ydata()[0]) for row in ticks(ax)}) == 2

    def test_the_limits_of_a_logarithmic_axis_grow(self, ax) -> None:
        few, many = density_of(np.arange(20.0)), density_of(np.r_[np.zeros(300), 30.0])
        alone = [part.plot(Figure().add_subplot()).get_ylim() for part in (few, many)]
        for order in ((few, many), (many, few)):
            ax.clear()
            for part in order:
                part.plot(ax)
            assert ax.get_ylim() == (min(low for low, _ in alone), max(high for _, high in alone))
            assert ax.get_xlim()[1] > 30

    def test_a_logarithmic_plot_after_a_linear_one(self, found, ax) -> None:
        found.plot(ax, log=False, label="A")
        assert ax.get_yscale() == "linear"
        found.plot(ax, label="B")
        assert ax.get_ylim() == found.plot(Figure().add_subplot()).get_ylim()
        found.plot(ax, log=False, label="C")
        assert ax.get_yscale() == "log"

    @pytest.mark.parametrize(
        ("sigma", "error", "match"),
        [
            (0, ValueError, "sigma is 0, but must be positive"),
            (-1.0, ValueError, r"sigma is -1\.0, but must be positive"),
            (float("nan"), ValueError, "sigma is nan, but must be positive"),
            ("wide", TypeError, "sigma is a str, but must be a real number"),
        ],
    )
    def test_a_bad_sigma(self, found, plt, sigma, error, match) -> None:
        with pytest.raises(error, match=match):
            found.plot(sigma=sigma)
        assert not plt.get_fignums()


class TestEigenvalues:
    @staticmethod
    def bars(ax: Any, axis: int) -> Any:
        """Return the ends of the error bars, shape ``(n, 2)``."""
        (container,) = ax.containers
        return np.array([segment[:, axis] for segment in container[2][0].get_segments()])

    def test_a_spectrum_has_the_bounds_as_error_bars(self, loose, ax) -> None:
        loose.plot(ax)
        np.testing.assert_array_equal(ticks(ax)[0].get_xdata(), loose.values)
        expected = np.c_[loose.values - loose.certificate.bounds, loose.values + loose.certificate.bounds]
        np.testing.assert_allclose(self.bars(ax, 0), expected, rtol=1e-14)
        low, high = ax.get_xlim()
        assert low < expected.min() < expected.max() < high
        assert entries(ax) == ["4 eigenvalues (LA)\n(bars: error bounds)"]

    def test_the_axis_of_a_single_eigenvalue_starts_at_zero(self) -> None:
        # The width of the axis was that of the error bar, so the ticks were labeled 0.1, 0.2, ... with the offset 5.
        for which, certificate in (("LA", True), ("SA", True), ("LA", False)):
            ax = result_of(which, 1, certificate=certificate).plot(Figure().add_subplot())
            low, high = ax.get_xlim()
            assert low <= 0 <= high
            assert high - low < 6
            assert entries(ax)[0].startswith(f"1 eigenvalue ({which})")

    def test_zero_is_not_added_if_the_eigenvalues_differ_or_the_axes_have_a_density(self, found, ax) -> None:
        assert result_of("LA", 3).plot(Figure().add_subplot()).get_xlim()[0] > 1
        found.plot(ax)
        before = ax.get_xlim()
        result_of("LA", 1).plot(ax)
        assert ax.get_xlim() == before

    def test_a_scree_plot_of_values(self, loose, ax) -> None:
        loose.plot(ax, kind="scree", log=False)
        (line,) = (line for line in ax.lines if line.get_marker() == "o")
        np.testing.assert_array_equal(line.get_xydata(), np.c_[1:5, loose.values[::-1]])
        expected = np.c_[loose.values - loose.certificate.bounds, loose.values + loose.certificate.bounds][::-1]
        np.testing.assert_allclose(self.bars(ax, 1), expected, rtol=1e-14)
        assert ax.get_yscale() == "linear"
        assert (ax.get_xlabel(), ax.get_ylabel()) == ("index, by decreasing value", "eigenvalue")

    def test_a_scree_plot_of_magnitudes_marks_negative_eigenvalues(self, ax) -> None:
        result = result_of()
        result.plot(ax, "scree", label="A")
        circles = [line for line in ax.lines if line.get_marker() == "o" and len(line.get_xdata())]
        np.testing.assert_allclose(circles[0].get_xydata(), np.c_[1:6, [5, 3, 2, 2, 1]])
        negative = circles[1].get_xydata()
        assert negative[:, 1] == pytest.approx([2])
        assert circles[1].get_markerfacecolor() == "white"
        assert ax.get_yscale() == "log"
        assert entries(ax) == ["A (bars: error bounds)", "negative eigenvalues"]
        result.plot(ax, "scree", label="B")
        assert entries(ax) == ["A (bars: error bounds)", "B (bars: error bounds)", "negative eigenvalues"]

    def test_a_logarithmic_axis_stays_one_of_magnitudes(self, ax) -> None:
        result_of().plot(ax, "scree")
        result_of().plot(ax, "scree", log=False)
        assert ax.get_ylabel() == "|eigenvalue|"
        first, _, second, _ = (line for line in ax.lines if line.get_marker() == "o" and len(line.get_xdata()))
        np.testing.assert_array_equal(first.get_xydata(), second.get_xydata())

    def test_a_scree_plot_of_zeros_has_a_linear_axis(self, ax) -> None:
        eigsh(np.zeros((5, 5)), 2, progress=False).plot(ax, "scree")
        ax.figure.draw_without_rendering()
        assert ax.get_yscale() == "linear"

    def test_a_bar_beyond_zero_does_not_change_a_logarithmic_axis(self, loose, ax) -> None:
        bounds = np.full(4, 2 * loose.values.max())
        wide = with_certificate(loose, bounds=bounds)
        wide.plot(ax, "scree")
        ax.figure.draw_without_rendering()
        low, high = ax.get_ylim()
        assert 0.1 * wide.values.min() < low < wide.values.min()
        assert high > wide.values.max() + bounds[-1]

    def test_the_legend_says_what_is_wrong(self, loose) -> None:
        def remark(result: EigenResult) -> str:
            return entries(result.plot(Figure().add_subplot(), label="A"))[0].replace("\n", " ")

        assert remark(result_of(certificate=False)) == "A (not certified)"
        assert remark(loose) == "A (bars: error bounds)"
        infinite = with_certificate(loose, bounds=np.array([np.inf, 0.1, np.inf, 0.1]))
        assert remark(infinite) == "A (bars: error bounds, 2 infinite)"
        assert remark(with_certificate(loose, missed=2.0)) == "A (bars: error bounds, some missed)"
        unfinished = with_certificate(loose, missed=2.0, converged=False)
        assert remark(unfinished) == "A (bars: error bounds, some missed, not converged)"

    def test_eigenvalues_on_the_axes_of_a_density(self, found, ax) -> None:
        limits = found.plot(ax, label="density").get_ylim()
        result = result_of()
        result.plot(ax, label="exact")
        result_of("SA", 2).plot(ax, label="low end")
        assert ax.get_ylim() == limits
        assert ax.yaxis.get_visible()
        heights = [float(row.get_ydata()[0]) for row in ticks(ax) if row.get_marker() == "|" and len(row.get_xdata())]
        assert len(set(heights)) == 3
        texts = entries(ax)
        assert texts[1:3] == ["exact (bars: error bounds)", "low end (bars: error bounds)"]
        assert texts[3:] == ["band: ± error", "known eigenvalues"]

    def test_bad_input(self, plt) -> None:
        with pytest.raises(ValueError, match="kind is 'histogram', but must be 'spectrum' or 'scree'"):
            result_of().plot(kind="histogram")
        empty = EigenResult(np.zeros(0), np.zeros((5, 0)), None, False, 3, "arpack", "LA", 2)
        with pytest.raises(ValueError, match="contains no eigenvalues, so there is nothing to plot"):
            empty.plot()
        assert not plt.get_fignums()


def with_certificate(result: EigenResult, converged: bool = True, **fields: Any) -> EigenResult:
    """Return a result with changed fields of the certificate."""
    certificate = dataclasses.replace(result.certificate, **fields)
    return dataclasses.replace(result, certificate=certificate, converged=converged)


class TestTracker:
    def test_sharpness_and_threshold(self, ax) -> None:
        tracker = tracker_of(k=3)
        tracker.plot(ax, 0.1, label="A")
        assert entries(ax) == ["A: sharpness", "A: eigenvalues 2 to 3", "A: stability threshold 20"]
        np.testing.assert_array_equal(curve(ax, "A: sharpness").get_xydata(), np.c_[tracker.steps, tracker.largest])
        assert list(curve(ax, "A: stability").get_ydata()) == [20, 20]
        assert len(ax.lines) == 4

    def test_overlays_keep_the_threshold_of_each_tracker(self, ax) -> None:
        for rate in (0.1, 0.2):
            tracker_of(rate).plot(ax, rate, label=f"lr {rate}")
        names = ["sharpness", "stability threshold"]
        assert entries(ax) == [
            "lr 0.1: sharpness",
            "lr 0.1: stability threshold 20",
            "lr 0.2: sharpness",
            "lr 0.2: stability threshold 10",
        ]
        one, two = ({curve(ax, f"lr {rate}: {name}").get_color() for name in names} for rate in (0.1, 0.2))
        assert len(one) == len(two) == 1
        assert one != two

    def test_with_an_optimizer(self, ax) -> None:
        assert entries(tracker_of(adam=True).plot(ax)) == ["preconditioned sharpness", "stability threshold 38"]

    @pytest.mark.parametrize(
        ("k", "which", "names"),
        [
            (1, "SA", ["smallest eigenvalue"]),
            (2, "SA", ["smallest eigenvalue", "eigenvalue 2"]),
            (1, "LM", ["largest magnitude"]),
            (2, "LM", ["2 eigenvalues of largest magnitude"]),
        ],
    )
    def test_names_of_other_eigenvalues(self, ax, k: int, which: str, names: list[str]) -> None:
        assert entries(tracker_of(k=k, which=which).plot(ax)) == names

    def test_a_single_step_is_visible(self, ax) -> None:
        tracker = track(HessianLinearOperator(**problem()))
        tracker.step()
        assert curve(tracker.plot(ax), "sharpness").get_marker() == "o"

    def test_a_bad_learning_rate(self, plt) -> None:
        with pytest.raises(ValueError, match=r"learning_rate is -0\.1, but must be positive"):
            tracker_of().plot(learning_rate=-0.1)
        assert not plt.get_fignums()


class TestLayers:
    def test_one_color_gives_different_line_styles(self, layers, ax) -> None:
        layers.plot(ax, color="black")
        styles = [line.get_linestyle() for line in ax.lines]
        assert len(set(styles)) == len(styles) == len(layers.layers)

    def test_a_matrix_of_zeros(self, ax) -> None:
        zeros = LayerEigenvalues.of_layers({"dead": np.zeros(3)})
        zeros.plot(ax)
        ax.figure.draw_without_rendering()
        assert "<img" in zeros._repr_html_()

    def test_more_lines_than_colors_differ_in_style(self, ax) -> None:
        many = LayerEigenvalues.of_layers({f"layer {index}": np.arange(1.0, 4) for index in range(12)})
        many.plot(ax)
        assert len({(line.get_color(), line.get_linestyle()) for line in ax.lines}) == 12
        assert len(entries(ax)) == 12
        LayerEigenvalues.of_layers({"one more": np.arange(1.0, 4)}).plot(ax)
        assert ax.get_legend() is None  # it would cover the plot


class TestBlocks:
    def test_the_norms_on_given_axes(self, study, ax) -> None:
        assert study.plot_norms(ax, cmap="cividis", label="coupling") is ax
        image = ax.images[0]
        np.testing.assert_allclose(image.get_array(), np.maximum(study.norms, 1e-6 * study.norms.max()))
        assert image.get_cmap().name == "cividis"
        assert ax.get_title() == "coupling"
        assert [label.get_text() for label in ax.get_xticklabels()] == study.names

    def test_label_color_and_properties(self, study) -> None:
        figure = study.plot(Figure(figsize=(9, 6)), label="small network", color="green", markersize=6)
        assert figure.get_suptitle() == "small network"
        table = figure.axes[0]
        assert to_rgb(table.collections[0].get_facecolor()[0][:3]) == to_rgb("green")
        assert [line.get_markersize() for line in table.lines] == [6, 6]
        assert [to_hex(line.get_color()).upper() for line in table.lines] == [PALETTE[1], PALETTE[0]]
        figure.savefig(io.BytesIO(), format="pdf")

    def test_an_unfinished_study(self, plt) -> None:
        empty = blocks(HessianLinearOperator(**problem()), seconds=0, progress=False)
        for plot in (empty.plot, empty.plot_norms):
            with pytest.raises(ValueError, match="no finished block: pass more seconds"):
                plot()
        assert not plt.get_fignums()
