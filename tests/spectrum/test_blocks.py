"""Compare block studies with dense blocks."""

from __future__ import annotations

import itertools
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from cases import loss_problem
from killed_runs import blocks_of_digits
from matplotlib.collections import FillBetweenPolyCollection
from processes import started
from scipy.sparse.linalg import aslinearoperator
from torch import nn

from curvop import DiagonalLinearOperator, HessianLinearOperator
from curvop.examples.functorch import functorch_hessian
from curvop.problems import digits
from curvop.spectrum import BlockStudy, blocks, plots

OPTIONS = {"num_probes": 3, "num_steps": 10, "norm_products": 6, "rng": 5, "progress": False}


@pytest.fixture(scope="module")
def problem():
    return loss_problem("ce")


@pytest.fixture(scope="module")
def dense(problem) -> np.ndarray:
    return functorch_hessian(problem.model, problem.loss_function, problem.params, problem.data).numpy()


@pytest.fixture(scope="module")
def H(problem) -> HessianLinearOperator:
    return HessianLinearOperator(problem.model, problem.loss_function, problem.params, problem.data)


@pytest.fixture(scope="module")
def study(H) -> BlockStudy:
    return blocks(H, num_probes=8, num_steps=40, norm_products=400, progress=False)


def test_diagonal_blocks(study, H, dense) -> None:
    assert study.names == list(H.params_slices)
    for index, rows in enumerate(H.params_slices.values()):
        values = np.linalg.eigvalsh(dense[rows, rows])
        assert study.sizes[index] == len(values)
        assert study.largest[index] == pytest.approx(values[-1], rel=1e-6)
        assert study.smallest[index] == pytest.approx(values[0], rel=1e-6, abs=1e-12)
        trace, error = study.traces.value[index], study.traces.error[index]
        assert abs(trace - values.sum()) <= 4 * error + 1e-9


@pytest.mark.parametrize("norm_products", [4, 10, 400])
def test_norms_of_all_blocks(H, dense, norm_products: int) -> None:
    study = blocks(H, num_probes=2, num_steps=8, norm_products=norm_products, progress=False)
    slices = list(H.params_slices.values())
    exact = np.array([[np.linalg.norm(dense[rows, cols]) for cols in slices] for rows in slices])
    np.testing.assert_array_equal(study.norms, study.norms.T)
    assert (np.abs(study.norms - exact) < 5 * study.norm_errors + 1e-9).all()
    # The norm of a block is exact if all of its columns are multiplied, or all of those of its transpose.
    columns = study.sizes <= norm_products
    known = columns[:, None] | columns | np.diag(study.sizes <= 16)
    np.testing.assert_array_equal(study.norm_errors == 0, known)
    np.testing.assert_allclose(study.norms[known], exact[known], rtol=1e-12)
    assert study.num_products == np.minimum(study.sizes, 16).sum() + np.minimum(study.sizes, norm_products).sum()


def test_groups(H, dense) -> None:
    slices = H.params_slices
    layers = {"first": ["0.weight", "0.bias"], "last bias": "2.bias"}
    study = blocks(H, groups=layers, num_probes=2, num_steps=40, norm_products=300, progress=False)
    first = np.r_[slices["0.weight"], slices["0.bias"]]
    assert study.names == ["first", "last bias"]
    assert study.largest[0] == pytest.approx(np.linalg.eigvalsh(dense[np.ix_(first, first)])[-1], rel=1e-6)
    off = np.linalg.norm(dense[first, slices["2.bias"]])
    assert study.norms[0, 1] == pytest.approx(off, rel=1e-12)  # from all three columns of the bias
    assert study.norm_errors[0, 1] == 0


def test_combinations_of_matrices(H, dense) -> None:
    found = blocks(2 * H + H.damped(0.5), "layers", **OPTIONS)  # as in H.blocks("layers")
    layers = H.parameter_groups("layers")
    assert found.names == list(layers)
    for name, block in zip(found.names, found.densities, strict=True):
        where = np.concatenate([np.arange(len(dense))[H.params_slices[parameter]] for parameter in layers[name]])
        part = 3 * dense[np.ix_(where, where)] + 0.5 * np.eye(len(where))
        assert block.range[1] <= np.linalg.eigvalsh(part)[-1] * (1 + 1e-8)
    with pytest.raises(ValueError, match="not symmetric"):
        blocks(DiagonalLinearOperator(np.arange(1.0, len(dense) + 1)) @ H, **OPTIONS)


def test_round_trip(study, tmp_path) -> None:
    study.save(tmp_path / "blocks.npz")
    loaded = BlockStudy.load(tmp_path / "blocks.npz")
    assert str(loaded) == str(study)
    assert_same(loaded, study)
    np.savez(tmp_path / "x.npz", names=np.zeros(2))
    with pytest.raises(ValueError, match="not written by"):
        BlockStudy.load(tmp_path / "x.npz")


def assert_same(found: BlockStudy, expected: BlockStudy, count: int | None = None) -> None:
    """Assert that the first `count` blocks are equal to the last bit."""
    assert found.names == expected.names[:count]
    assert found.unfinished == ([] if count is None else expected.names[count:])
    np.testing.assert_array_equal(found.norms, expected.norms[:count, :count])
    np.testing.assert_array_equal(found.norm_errors, expected.norm_errors[:count, :count])
    np.testing.assert_array_equal(found.sizes, expected.sizes[:count])
    for actual, desired in zip(found.densities, expected.densities, strict=False):
        np.testing.assert_array_equal(actual.nodes, desired.nodes)
        np.testing.assert_array_equal(actual.weights, desired.weights)


@pytest.fixture(scope="module")
def network() -> HessianLinearOperator:
    return HessianLinearOperator(**digits(), columns=1)


class TestContinued:
    def test_after_several_time_limits(self, network, tmp_path) -> None:
        expected = blocks(network, **OPTIONS)
        runs, seen = 0, set()
        while True:
            runs += 1
            found = blocks(network, **OPTIONS, checkpoint=tmp_path, seconds=0.02)
            assert_same(found, expected, None if found.complete else len(found.names))
            seen.add(len(found.names))
            if found.complete:
                break
        assert runs > 2
        assert len(seen) > 1
        assert found.num_products == expected.num_products == 3 * 30 + 10 + 4 * 6  # the last bias is formed
        assert [file.name for file in tmp_path.iterdir()] == ["blocks.records"]

    def test_finished_blocks_take_no_product_and_no_time(self, tmp_path) -> None:
        class Refusing(HessianLinearOperator):
            def _apply(self, rows):
                raise AssertionError("multiplied")

        problem = digits()
        whole = blocks(HessianLinearOperator(**problem), **OPTIONS, checkpoint=tmp_path / "done")
        other = Refusing(**problem)
        Refusing.__name__ = "HessianLinearOperator"  # for the fingerprint
        assert_same(blocks(other, **OPTIONS, checkpoint=tmp_path / "done"), whole)
        nothing = blocks(other, **OPTIONS, checkpoint=tmp_path / "new", seconds=0)
        assert (nothing.names, nothing.unfinished, nothing.num_products) == ([], whole.names, 0)
        assert not nothing.complete
        assert "not studied, as time was up: 0.weight" in str(nothing)

    @pytest.mark.parametrize(
        ("change", "said"),
        [({"rng": 6}, "rng"), ({"num_probes": 2}, "num_probes"), ({"groups": {"all": ["0.bias", "2.bias"]}}, "groups")],
    )
    def test_a_checkpoint_of_another_computation(self, H, network, tmp_path, change, said) -> None:
        blocks(H, **OPTIONS, checkpoint=tmp_path)
        before = {file: file.read_bytes() for file in tmp_path.rglob("*")}
        with pytest.raises(ValueError, match=f"belongs to another computation: {said} differs; pass another"):
            blocks(H, **OPTIONS | change, checkpoint=tmp_path)
        with pytest.raises(ValueError, match="others differ; pass another"):
            blocks(network, **OPTIONS, checkpoint=tmp_path)
        assert {file: file.read_bytes() for file in tmp_path.rglob("*")} == before

    def test_a_partial_study_is_saved_as_partial(self, H, tmp_path) -> None:
        found = blocks(H, **OPTIONS, seconds=0)
        found.save(tmp_path / "blocks.npz")
        loaded = BlockStudy.load(tmp_path / "blocks.npz")
        assert str(loaded) == str(found)
        assert loaded.unfinished == list(H.params_slices)


@pytest.mark.slow
def test_sigkill(network, tmp_path: Path) -> None:
    """Kill runs in a density, before norms, in another density, and while a block is formed: no product is repeated."""
    expected = blocks(network, **OPTIONS)
    left = expected.num_products - (12 + 18 + 60 + 21)
    for made, code in (*((count, -signal.SIGKILL) for count in (14, 18, 60, 23)), (left, 0)):
        process = started(blocks_of_digits, made, tmp_path / "c", tmp_path / "blocks.npz", OPTIONS)
        process.join(120)
        assert process.exitcode == code
    assert_same(BlockStudy.load(tmp_path / "blocks.npz"), expected)


@pytest.fixture
def figure(study):
    """Draw the plot of a study."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = study.plot(Figure(figsize=plots.blocks_size(study)))
    FigureCanvasAgg(figure).draw()
    return figure


def test_the_table(study) -> None:
    head, *lines = str(study).splitlines()
    assert head.split() == ["block", "rows", "smallest", "largest", "trace", "norm"]
    assert [line.split()[0] for line in lines] == study.names
    assert len({len(line) for line in [head, *lines]}) == 1
    weight = lines[0].split()
    assert float(weight[2]) == pytest.approx(study.smallest[0], rel=1e-3)
    assert float(weight[4]) == pytest.approx(study.traces.value[0], rel=1e-5)


class TestPicture:
    def test_it_shows_the_table_and_the_densities(self, study, figure) -> None:
        table, norms = figure.axes
        assert [label.get_text() for label in table.get_yticklabels()] == study.lines
        assert norms.images[0].get_array().shape == study.norms.shape
        strips = [strip for strip in table.collections if isinstance(strip, FillBetweenPolyCollection)]
        for row, (strip, found) in enumerate(zip(strips, study.densities, strict=True)):
            x, y = strip.get_paths()[0].vertices.T
            drawn = x[y < row + 0.25]  # its baseline is at row + 0.3
            # Every node is drawn at its place, and nothing is drawn far from all nodes.
            at = table.xaxis.get_transform().transform
            nodes = np.r_[found.nodes[found.weights > 0], found.atoms]
            heavy = np.r_[found.nodes[found.weights * found.size > 1], found.atoms]
            distances = np.abs(at(heavy)[:, None] - at(drawn))
            width = np.ptp(at(np.array(table.get_xlim())))
            assert distances.min(1).max() < 0.005 * width
            assert np.abs(at(drawn)[:, None] - at(nodes)).min(1).max() < 0.03 * width

    def test_no_two_labels_of_ticks_overlap(self, figure) -> None:
        for ax in figure.axes:
            low, high = ax.get_xlim()
            labels = [label for label in ax.get_xticklabels() if low <= label.get_position()[0] <= high]
            ends = sorted(box.intervalx.tolist() for label in labels if (box := label.get_window_extent()).width)
            assert len(ends) > 2
            assert all(left[1] < right[0] for left, right in itertools.pairwise(ends))

    def test_nothing_is_cut_off(self, figure) -> None:
        box = figure.get_tightbbox()
        width, height = figure.get_size_inches()
        assert box.x0 > -0.01
        assert box.y0 > -0.01
        assert box.x1 < width + 0.01
        assert box.y1 < height + 0.01

    def test_in_a_new_figure(self, study) -> None:
        import matplotlib as mpl

        mpl.use("agg")
        import matplotlib.pyplot as plt

        assert tuple(study.plot().get_size_inches()) == pytest.approx(plots.blocks_size(study))
        plt.close("all")


def test_a_layer_without_curvature() -> None:
    model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 1, bias=False)).double()
    with torch.no_grad():
        model[0].weight.zero_(), model[1].weight.zero_()
    data = [(torch.ones(3, 2, dtype=torch.float64), torch.zeros(3, 1, dtype=torch.float64))]
    H = HessianLinearOperator(model, nn.MSELoss(), dict(model.named_parameters()), data)
    study = blocks(H, num_probes=2, num_steps=4, progress=False)
    assert not study.norms.any()
    assert not study.largest.any()
    study.plot()
    __import__("matplotlib.pyplot").pyplot.close("all")


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"norm_products": 1}, "norm_products is 1"),
        ({"seconds": float("nan")}, "seconds is nan, but must be 0 or more"),
        ({"groups": {}}, "groups is empty"),
        ({"groups": {"a": ["0.bias"], "b": ["0.bias"]}}, r"groups has '0\.bias' twice"),
        ({"groups": {"a": ["0.bais"]}}, "0.bais"),
    ],
)
def test_bad_input(H, options, match) -> None:
    with pytest.raises(ValueError, match=match):
        blocks(H, progress=False, **options)
    with pytest.raises(TypeError, match="seconds is 'a minute', but must be a number"):
        blocks(H, progress=False, seconds="a minute")
    with pytest.raises(TypeError, match="curvature matrix"):
        blocks(aslinearoperator(np.eye(3)))
