"""Eigenvalues during training."""

from __future__ import annotations

import functools
import pickle
import sys

import numpy as np
import pytest
import torch
from scipy.sparse.linalg import LinearOperator, aslinearoperator
from torch import nn

from curvop import HessianLinearOperator
from curvop.problems import digits
from curvop.spectrum import Tracker, eigsh, track


def train(learning_rate: float, steps: int, **options):
    """Run gradient descent on the digits with a tracker; return the tracker, the operator and the losses."""
    problem = digits()
    X, y = torch.cat([X for X, _ in problem["data"]]), torch.cat([y for _, y in problem["data"]])
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 16), nn.Tanh(), nn.Linear(16, 10)).double()
    loss_function = nn.MSELoss()
    y = nn.functional.one_hot(y, 10).double()
    H = HessianLinearOperator(model, loss_function, dict(model.named_parameters()), [(X, y)])
    tracker, losses = track(H, **options), []
    for _ in range(steps):
        tracker.step()
        model.zero_grad()
        loss = loss_function(model(X), y)
        loss.backward()
        losses.append(loss.item())
        with torch.no_grad():
            for parameter in model.parameters():
                parameter -= learning_rate * parameter.grad
    return tracker, H, losses


def test_eigenvalues_belong_to_their_steps() -> None:
    tracker, H, _ = train(0.5, 31, k=2, every=10, tol=1e-6)
    assert tracker.steps.tolist() == [0, 10, 20, 30]
    assert tracker.values.shape == (4, 2)
    assert (tracker.values[:, 0] <= tracker.values[:, 1]).all()
    np.testing.assert_array_equal(tracker.largest, tracker.values[:, 1])
    assert tracker.products == H.num_products
    other, H, _ = train(0.5, 30, k=2, every=100)
    found = eigsh(H, 2, "LA", progress=False)  # at the parameters after 30 steps
    np.testing.assert_allclose(tracker.values[-1], found.values, rtol=1e-5)
    assert other.steps.tolist() == [0]


def test_starting_from_the_last_vectors_saves_products() -> None:
    tracker, H, _ = train(0.2, 41, every=5)
    cold = []
    for _ in range(2):
        before = H.num_products
        eigsh(H, 1, "LA", tol=1e-3, progress=False, certificate=False)
        cold.append(H.num_products - before)
    assert tracker.products < 0.8 * len(tracker.steps) * min(cold)


def test_sharpness_grows_to_the_edge_of_stability_and_stays() -> None:
    """Cohen et al. (2021): sharpness grows to 2 / learning rate, and then hovers there."""
    learning_rate = 0.85
    tracker, _, losses = train(learning_rate, 800, every=20)
    sharpness = tracker.largest
    assert sharpness[0] < 0.95 * 2 / learning_rate
    late = sharpness[len(sharpness) // 2 :]
    assert (late > 0.95 * 2 / learning_rate).all()
    assert (late < 1.15 * 2 / learning_rate).all()
    assert losses[-1] < losses[0] / 2
    assert np.diff(losses[400:]).max() > 0  # not monotonic there


def test_a_failed_search_does_not_stop_training(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules["curvop.spectrum.track"], "eigsh", functools.partial(eigsh, maxiter=1))
    with pytest.warns(RuntimeWarning, match="step 0: the eigenvalues did not converge"):
        tracker, _, losses = train(0.2, 3, k=5, which="SA", tol=1e-14, every=5)
    assert np.isnan(tracker.values).all()
    assert len(losses) == 3


def test_warnings_of_the_operator_pass_through() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 1)).double().train()
    data = [(torch.randn(8, 3).double(), torch.randn(8, 1).double()) for _ in range(2)]
    tracker = track(HessianLinearOperator(model, nn.MSELoss(), dict(model.named_parameters()), data))
    with pytest.warns(RuntimeWarning, match="normalizes each of the 2 batches"):
        tracker.step()


def test_the_plot() -> None:
    import matplotlib as mpl

    mpl.use("agg")
    import matplotlib.pyplot as plt

    tracker, _, _ = train(0.2, 3, every=1)
    assert len(tracker.plot(learning_rate=0.2).lines) == 2
    plt.close("all")


def test_operators_that_are_not_symmetric_are_rejected_in_the_first_step() -> None:
    A = np.triu(np.ones((20, 20)))
    for operator in (A, aslinearoperator(A), LinearOperator(A.shape, matvec=lambda x: A @ x, dtype=float)):
        tracker = track(operator)
        with pytest.raises(ValueError, match="A is not symmetric"):
            tracker.step()
    symmetric = LinearOperator(A.shape, matvec=lambda x: (A + A.T) @ x, dtype=float)
    tracker = track(symmetric, every=1)
    assert tracker.step() == pytest.approx(21.0, rel=1e-3)
    before = tracker.products
    tracker.step()
    assert tracker.products < 2 * before - 3  # the symmetry is checked once
    with pytest.raises(ValueError, match=r"A has shape \(3, 4\), but must be square"):
        track(np.ones((3, 4)))


class TestEnds:
    """`Tracker.largest` and `Tracker.smallest`."""

    @pytest.mark.parametrize(("which", "column"), [("LA", -1), ("LM", -1), ("SA", 0), ("LM", 0)])
    def test_they_are_those_of_the_matrix(self, which: str, column: int) -> None:
        eigenvalues = np.r_[-9.0, np.linspace(-1, 1, 38), 8.0]
        tracker = track(np.diag(eigenvalues), 2, every=1, which=which, tol=1e-10)
        for _ in range(3):
            tracker.step()
        found = tracker.smallest if column == 0 else tracker.largest
        assert found.shape == (3,)
        np.testing.assert_allclose(found, np.full(3, np.sort(eigenvalues)[column]), rtol=1e-9)
        np.testing.assert_allclose(tracker.values, np.sort(tracker.values, axis=1))
        residuals = np.diag(eigenvalues) @ tracker.vectors - tracker.vectors * tracker.values[-1]
        assert np.abs(residuals).max() < 1e-8

    def test_an_end_that_is_not_known(self) -> None:
        for which, end, remedy in (("SA", "largest", "'LA'"), ("LA", "smallest", "'SA'"), ("LM", "smallest", "'SA'")):
            tracker = track(np.diag(np.arange(1.0, 41.0)), 2, every=1, which=which)
            tracker.step()
            with pytest.raises(ValueError, match=f"which is '{which}'.* the {end} eigenvalue .*: pass which={remedy}"):
                getattr(tracker, end)

    def test_without_steps_and_without_convergence(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(sys.modules["curvop.spectrum.track"], "eigsh", functools.partial(eigsh, maxiter=1))
        tracker = track(np.diag(np.linspace(-1, 1, 400) ** 3), 5, every=1, tol=1e-14)
        assert tracker.largest.shape == (0,)
        with pytest.warns(RuntimeWarning, match="did not converge"):
            tracker.step()
        assert np.isnan(tracker.largest).all()


def test_trackers_that_were_pickled_with_the_largest_first_are_sorted() -> None:
    A = np.diag(np.r_[np.linspace(0, 1, 30), 5.0, 7.0])
    tracker = track(A, 3, every=1, tol=1e-10)
    tracker.step()
    tracker.step()
    failed = (2, np.full(3, np.nan), np.nan)
    history = [(step, values[::-1], threshold) for step, values, threshold in tracker._history]
    old = Tracker.__new__(Tracker)
    old.__setstate__(tracker.__dict__ | {"_history": [*history, failed], "vectors": tracker.vectors[:, ::-1]})
    np.testing.assert_array_equal(old.values, [*tracker.values, failed[1]])
    np.testing.assert_array_equal(old.vectors, tracker.vectors)
    np.testing.assert_allclose(old.largest, [7.0, 7.0, np.nan])
    again = pickle.loads(pickle.dumps(tracker))
    np.testing.assert_array_equal(again.values, tracker.values)
    np.testing.assert_array_equal(again.vectors, tracker.vectors)


def test_trackers_of_version_0_1_0_can_be_unpickled() -> None:
    tracker = track(np.diag(np.arange(5.0)), every=1)
    tracker.step()
    state = tracker.__dict__ | {"_history": [(step, values) for step, values, _ in tracker._history]}
    for name in ("_optimizer", "_positions", "_checked"):
        del state[name]
    old = Tracker.__new__(Tracker)
    old.__setstate__(state)
    old.step()
    assert old.steps.tolist() == [0, 1]
    assert old.thresholds is None
    np.testing.assert_allclose(old.values, [[4.0], [4.0]])


@pytest.mark.parametrize(
    ("options", "match"), [({"k": 0}, "k is 0"), ({"every": 0}, "every is 0"), ({"which": "SM"}, "which is 'SM'")]
)
def test_bad_input(options, match) -> None:
    with pytest.raises(ValueError, match=match):
        track(None, **options)


class TestNumbers:
    """`Tracker.step` with the step numbers of a trainer."""

    def test_they_select_the_computations(self) -> None:
        tracker = track(np.diag(np.arange(1.0, 31.0)), every=5)
        for number in (0, 3, 5, 10, 12, 20):
            assert (tracker.step(number) is None) == (number in (3, 12))
        assert tracker.steps.tolist() == [0, 5, 10, 20]
        for _ in range(5):
            tracker.step()
        assert tracker.steps.tolist() == [0, 5, 10, 20, 25]  # unnumbered calls go on from the last number

    def test_a_multiple_that_is_passed_over_is_made_up_for(self) -> None:
        tracker = track(np.diag(np.arange(1.0, 31.0)), every=5)
        for number in range(0, 24, 2):  # as with two optimizers, if each counts its steps
            tracker.step(number)
        assert tracker.steps.tolist() == [0, 6, 10, 16, 20]

    def test_they_must_grow(self) -> None:
        tracker = track(np.diag(np.arange(1.0, 31.0)), every=5)
        tracker.step(5)
        for number in (5, 2, 7.0, True):
            with pytest.raises(ValueError, match=f"number is {number}, but must be an integer >= 6"):
                tracker.step(number)
        assert tracker.steps.tolist() == [5]


class TestFiles:
    """`Tracker.save` and `Tracker.load`."""

    @pytest.mark.parametrize("which", ["LA", "SA", "LM"])
    def test_a_loaded_tracker_goes_on_as_if_never_interrupted(self, which: str, tmp_path) -> None:
        A = np.diag(np.r_[-9.0, np.linspace(-1, 1, 38), 8.0])
        whole, first = (track(A, 2, every=3, which=which, tol=1e-8) for _ in range(2))
        for _ in range(11):
            whole.step()
        for _ in range(5):
            first.step()
        first.save(tmp_path / "tracker.npz")
        again = Tracker.load(tmp_path / "tracker.npz", A)
        for _ in range(6):
            again.step()
        assert again.steps.tolist() == whole.steps.tolist() == [0, 3, 6, 9]
        np.testing.assert_array_equal(again.values, whole.values)
        np.testing.assert_array_equal(again.vectors, whole.vectors)
        assert again.products == whole.products
        assert again.latest == whole.latest
        assert again.thresholds is None

    def test_without_vectors_the_file_is_small_and_the_next_start_random(self, tmp_path) -> None:
        A = np.diag(np.r_[np.linspace(0, 1, 500), 1.1])
        tracker = track(A, every=1)
        tracker.step()
        for name, vectors in (("with", True), ("without", False)):
            tracker.save(tmp_path / name, vectors=vectors)
        sizes = [(tmp_path / name).stat().st_size for name in ("with", "without")]
        assert sizes[0] > sizes[1] + 8 * 501
        warm, cold = (Tracker.load(tmp_path / name, A) for name in ("with", "without"))
        assert cold.vectors is None
        warm.step()
        cold.step()
        assert warm.products < cold.products
        np.testing.assert_allclose(cold.values, [[1.1], [1.1]], rtol=1e-2)

    def test_the_record_can_be_read_without_the_operator(self, tmp_path) -> None:
        tracker, _, _ = train(0.2, 11, k=2, every=5)
        tracker.save(tmp_path / "tracker.npz")
        record = Tracker.load(tmp_path / "tracker.npz")
        assert record.steps.tolist() == [0, 5, 10]
        np.testing.assert_array_equal(record.largest, tracker.largest)
        with np.load(tmp_path / "tracker.npz", allow_pickle=False) as file:
            np.testing.assert_array_equal(file["values"], tracker.values)
        with pytest.raises(ValueError, match=r"loaded without an operator: pass it as A to Tracker\.load"):
            record.step(15)
        assert record.steps.tolist() == [0, 5, 10]

    def test_thresholds_and_failed_steps_are_kept(self, tmp_path) -> None:
        torch.manual_seed(0)
        X, y = torch.randn(20, 3).double(), torch.randn(20, 1).double()
        model = nn.Linear(3, 1).double()
        H = HessianLinearOperator(model, nn.MSELoss(), model.parameters(), [(X, y)])
        adam = torch.optim.Adam(model.parameters())
        tracker = track(H, every=1, optimizer=adam)
        for _ in range(2):
            tracker.step()
            model.zero_grad()
            nn.functional.mse_loss(model(X), y).backward()
            adam.step()
        tracker.save(tmp_path / "tracker.npz")
        record = Tracker.load(tmp_path / "tracker.npz")
        assert np.isnan(record.values[0]).all()
        np.testing.assert_array_equal(record.values, tracker.values)
        np.testing.assert_allclose(record.thresholds, [38.0, 38.0])
        again = Tracker.load(tmp_path / "tracker.npz", H, optimizer=adam)
        again.step()
        assert again.thresholds.tolist() == pytest.approx([38.0] * 3)
        with pytest.raises(ValueError, match=r"was saved with an optimizer: pass optimizer="):
            Tracker.load(tmp_path / "tracker.npz", H)
        with pytest.raises(ValueError, match="optimizer is given without A"):
            Tracker.load(tmp_path / "tracker.npz", optimizer=adam)

    def test_a_record_of_another_matrix_is_refused(self, tmp_path) -> None:
        tracker = track(np.eye(5))
        tracker.save(tmp_path / "empty.npz")
        assert Tracker.load(tmp_path / "empty.npz").values.shape == (0, 1)
        with pytest.raises(ValueError, match=r"A has shape \(6, 6\), but .* shape \(5, 5\)"):
            Tracker.load(tmp_path / "empty.npz", np.eye(6))
        eigsh(np.eye(5), 1, "LA", progress=False).save(tmp_path / "eigsh.npz")
        with pytest.raises(ValueError, match=r"was not written by Tracker.save"):
            Tracker.load(tmp_path / "eigsh.npz")


class TestFrames:
    """`Tracker.to_frame` and `Tracker.latest`."""

    @pytest.mark.parametrize(
        ("which", "expected"),
        [
            ("LA", {"largest_1": 8.0, "largest_2": 1.0}),
            ("SA", {"smallest_1": -9.0, "smallest_2": -1.0}),
            ("LM", {"largest_magnitude_1": -9.0, "largest_magnitude_2": 8.0}),
        ],
    )
    def test_columns_run_from_the_outermost_eigenvalue_inwards(self, which: str, expected: dict[str, float]) -> None:
        tracker = track(np.diag(np.r_[-9.0, np.linspace(-1, 1, 38), 8.0]), 2, every=5, which=which, tol=1e-10)
        assert tracker.latest == {}
        assert tracker.to_frame().shape == (0, 2)
        for _ in range(6):
            tracker.step()
        frame = tracker.to_frame()
        assert frame.index.name == "step"
        assert frame.index.tolist() == [0, 5]
        assert frame.loc[5].to_dict() == pytest.approx(expected, rel=1e-9)
        assert tracker.latest == frame.loc[5].to_dict()

    def test_the_threshold_is_the_last_column(self) -> None:
        model = nn.Linear(3, 1).double()
        data = [(torch.randn(20, 3).double(), torch.randn(20, 1).double())]
        H = HessianLinearOperator(model, nn.MSELoss(), model.parameters(), data)
        tracker = track(H, optimizer=torch.optim.SGD(model.parameters(), lr=0.1))
        tracker.step()
        assert tracker.to_frame().columns.tolist() == ["largest_1", "threshold"]
        assert tracker.latest["threshold"] == 2.0

    def test_without_pandas_the_error_says_what_to_install(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "pandas", None)
        with pytest.raises(ImportError, match="to_frame needs pandas: pip install pandas"):
            track(np.eye(4)).to_frame()
