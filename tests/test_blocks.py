"""Layer by layer, against dense blocks."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from cases import loss_problem
from scipy.sparse.linalg import aslinearoperator
from torch import nn

from curvop import HessianLinearOperator
from curvop.examples.functorch import functorch_hessian
from curvop.spectrum import BlockStudy, blocks


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


def test_norms_of_all_blocks(study, H, dense) -> None:
    slices = list(H.params_slices.values())
    exact = np.array([[np.linalg.norm(dense[rows, cols]) for cols in slices] for rows in slices])
    np.testing.assert_array_equal(study.norms, study.norms.T)
    assert (np.abs(study.norms - exact) < 5 * study.norm_errors + 1e-9).all()
    assert (study.norm_errors < 0.1 * exact).all()


def test_groups(H, dense) -> None:
    slices = H.params_slices
    layers = {"first": ["0.weight", "0.bias"], "last bias": "2.bias"}
    study = blocks(H, groups=layers, num_probes=2, num_steps=40, norm_products=300, progress=False)
    first = np.r_[slices["0.weight"], slices["0.bias"]]
    assert study.names == ["first", "last bias"]
    assert study.largest[0] == pytest.approx(np.linalg.eigvalsh(dense[np.ix_(first, first)])[-1], rel=1e-6)
    off = np.linalg.norm(dense[first, slices["2.bias"]])
    assert abs(study.norms[0, 1] - off) < 5 * study.norm_errors[0, 1]


def test_round_trip(study, tmp_path) -> None:
    study.save(tmp_path / "blocks.npz")
    loaded = BlockStudy.load(tmp_path / "blocks.npz")
    assert str(loaded) == str(study)
    np.testing.assert_array_equal(loaded.norms, study.norms)
    np.savez(tmp_path / "x.npz", names=np.zeros(2))
    with pytest.raises(ValueError, match="not written by"):
        BlockStudy.load(tmp_path / "x.npz")


def test_the_table_and_the_picture(study) -> None:
    import matplotlib as mpl

    mpl.use("agg")
    import matplotlib.pyplot as plt

    lines = str(study).splitlines()
    assert len(lines) == 5
    assert len({len(line) for line in lines}) == 1
    assert len(study.plot().axes) == 3
    assert len(study.plot(plt.figure()).axes) == 3
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
        ({"groups": {}}, "groups is empty"),
        ({"groups": {"a": ["0.bias"], "b": ["0.bias"]}}, r"groups has '0\.bias' twice"),
        ({"groups": {"a": ["0.bais"]}}, "0.bais"),
    ],
)
def test_bad_input(H, options, match) -> None:
    with pytest.raises(ValueError, match=match):
        blocks(H, progress=False, **options)
    with pytest.raises(TypeError, match="curvature matrix"):
        blocks(aslinearoperator(np.eye(3)))
