"""Densities that are killed and continued from their checkpoints."""

from __future__ import annotations

import argparse
import time
from multiprocessing.process import BaseProcess
from pathlib import Path

import numpy as np
import pytest
import torch
from killed_runs import density_of_digits
from matrices import matrix
from processes import started
from scipy.sparse.linalg import LinearOperator

from curvop import HessianLinearOperator
from curvop.problems import digits
from curvop.spectrum import density
from curvop.storage.records import RecordFileError

N = 120
A = matrix(np.r_[np.linspace(0, 1, N - 5), np.linspace(5, 9, 5)])


class KilledError(Exception):
    pass


class Dying(LinearOperator):
    """Multiply by `A`, count columns, and raise an error instead of exceeding a number of columns."""

    def __init__(self, left: float = np.inf) -> None:
        super().__init__(float, A.shape)
        self.left, self.made = left, 0

    def _matmat(self, X: np.ndarray) -> np.ndarray:
        if self.made >= self.left:
            raise KilledError
        self.made += X.shape[1]
        return A @ X

    def _matvec(self, x: np.ndarray) -> np.ndarray:
        return self._matmat(x.reshape(N, 1)).reshape(x.shape)


def run(operator: LinearOperator, directory: Path | None, **options):
    settings = {"num_probes": 5, "num_steps": 12, "rng": 1, "memory": 2 * 8 * N * 16, "progress": False}
    return density(operator, checkpoint=directory, **settings | options)


def assert_same(found, expected) -> None:
    for name in ("nodes", "weights", "atoms"):
        np.testing.assert_array_equal(getattr(found, name), getattr(expected, name))
    assert found.num_products == expected.num_products


@pytest.mark.parametrize("left", [3, 10, 24, 25, 31, 55])
def test_recorded_products_are_not_repeated(left: int, tmp_path: Path) -> None:
    expected = run(Dying(), None)
    first, second = Dying(left), Dying()
    with pytest.raises(KilledError):
        run(first, tmp_path)
    assert_same(run(second, tmp_path), expected)
    assert first.made + second.made == 60 + 2  # plus one per run for the fingerprint
    third = Dying()
    assert_same(run(third, tmp_path), expected)
    assert third.made == 1


def test_deflated_eigenvalues_are_found_once(tmp_path: Path) -> None:
    expected = run(Dying(), None, deflate=5)
    once = Dying()
    with pytest.raises(KilledError):
        run(Dying(60), tmp_path, deflate=5)
    assert_same(run(once, tmp_path, deflate=5), expected)
    assert once.made < 60


ROOM = 8 * N * 60  # for the bases of 3 probes of 12 steps, or of 2 probes of 20 steps


def assert_close(found, expected) -> None:
    """Compare densities up to rounding, which depends on the number of columns of a block product."""
    assert found.complete == expected.complete
    assert found.num_products == expected.num_products
    np.testing.assert_allclose(found.recurrences, expected.recurrences, rtol=1e-10, atol=1e-10)
    np.testing.assert_allclose(found.nodes, expected.nodes, rtol=1e-10, atol=1e-10)
    np.testing.assert_allclose(found.weights, expected.weights, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("deflate", [0, 5])
@pytest.mark.parametrize(("probes", "steps"), [(5, 20), (8, 12), (9, 20), (7, 6), (3, 20)])
def test_a_finished_density_is_extended(probes: int, steps: int, deflate: int, tmp_path: Path) -> None:
    """Only the products that are not on disk are computed: for more steps, for more probes, or for both."""
    first, second, fresh = Dying(), Dying(), Dying()
    wanted = {"num_probes": probes, "num_steps": steps, "memory": ROOM + 8 * N * deflate, "deflate": deflate}
    found = run(first, tmp_path, memory=ROOM + 8 * N * deflate, deflate=deflate)
    assert found.num_products == first.made - 1
    extended = run(second, tmp_path, **wanted)
    assert_close(extended, run(fresh, None, **wanted))
    saved = min(probes, 5) * min(steps, 12)
    assert second.made == probes * steps - saved + 1  # one for the fingerprint
    assert run(Dying(), tmp_path, **wanted).num_products == extended.num_products


def test_fewer_steps_and_probes_are_a_part_of_what_is_on_disk(tmp_path: Path) -> None:
    whole, again = run(Dying(), tmp_path), Dying()
    part = run(again, tmp_path, num_probes=3, num_steps=7)
    assert again.made == 1
    assert_close(part, run(Dying(), None, num_probes=3, num_steps=7))
    assert_same(run(Dying(1), tmp_path), whole)  # nothing was deleted


@pytest.mark.parametrize("left", [1, 4, 20, 41, 70])
def test_an_extension_that_is_killed_is_continued(left: int, tmp_path: Path) -> None:
    wanted = {"num_probes": 7, "num_steps": 20, "memory": ROOM}
    first, second, third = Dying(), Dying(left), Dying()
    run(first, tmp_path, memory=ROOM)
    with pytest.raises(KilledError):
        run(second, tmp_path, **wanted)
    assert_close(run(third, tmp_path, **wanted), run(Dying(), None, **wanted))
    assert first.made + second.made + third.made == 7 * 20 + 3


def test_what_is_on_disk_is_kept_if_time_is_too_short_for_the_extension(tmp_path: Path) -> None:
    before = run(Dying(), tmp_path)
    found = run(Dying(), tmp_path, num_probes=7, num_steps=20, seconds=0)
    assert not found.complete
    np.testing.assert_array_equal((found.weights > 0).sum(1), [13, 12, 12, 12, 12])  # one more step of the first probe
    np.testing.assert_array_equal(found.nodes[1:, :12], before.nodes[1:])


def test_without_the_file_of_steps_more_steps_begin_again(tmp_path: Path) -> None:
    before, second, third = run(Dying(), tmp_path), Dying(), Dying()
    (tmp_path / "steps.records").unlink()
    assert_same(run(second, tmp_path), before)
    assert second.made == 1
    assert_close(run(third, tmp_path, num_probes=6, num_steps=14), run(Dying(), None, num_probes=6, num_steps=14))
    assert third.made == 6 * 14 + 1


def test_steps_of_finished_runs_are_deleted_if_the_disk_is_nearly_full(tmp_path: Path, monkeypatch) -> None:
    expected = run(Dying(), tmp_path / "a")
    assert (tmp_path / "a" / "steps.records").stat().st_size > 60 * 8 * N
    monkeypatch.setattr("curvop.spectrum.checkpoint.shutil.disk_usage", lambda path: argparse.Namespace(free=20_000))
    assert_same(run(Dying(), tmp_path / "b"), expected)
    assert sum(file.stat().st_size for file in (tmp_path / "b").iterdir()) < 20_000 + 8000
    assert_same(run(Dying(1), tmp_path / "b"), expected)


def test_a_run_in_an_invariant_subspace_takes_no_more_steps(tmp_path: Path) -> None:
    class Levels(Dying):
        def _matmat(self, X: np.ndarray) -> np.ndarray:
            self.made += X.shape[1]
            return np.repeat([1.0, 2.0, 5.0], N // 3)[:, None] * X

    run(Levels(), tmp_path, num_steps=8)
    again = Levels()
    found = run(again, tmp_path, num_steps=20)
    assert again.made == 1
    assert found.complete
    assert found.num_products == 5 * 3
    np.testing.assert_allclose(found.nodes[:, :3], np.tile([1.0, 2.0, 5.0], (5, 1)), atol=1e-12)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"rng": 2}, "rng differs"),
        ({"num_steps": 11, "deflate": 1}, "deflate differs"),
        ({"num_probes": 6, "rng": 2, "deflate": 1}, "deflate and rng differ"),
    ],
)
def test_a_checkpoint_of_another_computation(options, said, tmp_path: Path) -> None:
    run(Dying(), tmp_path)
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    with pytest.raises(ValueError, match=f"belongs to another computation: {said}; pass another"):
        run(Dying(), tmp_path, **options)
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before


def test_another_matrix_and_other_parameters(tmp_path: Path) -> None:
    run(Dying(), tmp_path / "a")
    other = LinearOperator(A.shape, matvec=lambda x: 2 * (A @ x), dtype=float)
    with pytest.raises(ValueError, match=r"operator and product differ"):
        run(other, tmp_path / "a")
    problem = digits()
    H = HessianLinearOperator(**problem)
    options = {"memory": None, "num_probes": 2, "num_steps": 3}
    run(H, tmp_path / "b", **options)
    with torch.no_grad():
        problem["params"]["0.weight"][0, 0] += 1e-9
    with pytest.raises(ValueError, match=r"params\['0.weight'\] differs"):
        run(H, tmp_path / "b", **options)


def test_a_damaged_record(tmp_path: Path) -> None:
    run(Dying(), tmp_path)
    file = tmp_path / "results.records"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    with pytest.raises(RecordFileError, match="damaged"):
        run(Dying(), tmp_path)
    assert file.read_bytes() == content


def test_one_process_at_a_time(tmp_path: Path) -> None:
    class Nested(Dying):
        def _matmat(self, X: np.ndarray) -> np.ndarray:
            if self.made == 3:
                run(Dying(), tmp_path)
            return super()._matmat(X)

    with pytest.raises(RecordFileError, match="in use"):
        run(Nested(), tmp_path)


def killed_runs(kills: int, steps: int, tmp_path: Path) -> None:
    rng, log, done = np.random.default_rng(0), tmp_path / "log", 0

    def child(name: str, log: Path) -> BaseProcess:
        return started(density_of_digits, log, tmp_path / name, tmp_path / f"{name}.npz", steps)

    def finish(name: str, log: Path) -> None:
        process = child(name, log)
        process.join(300)
        assert process.exitcode == 0

    finish("p", tmp_path / "plain")
    for _ in range(kills):
        size = log.stat().st_size if log.exists() else 0
        process = child("c", log)
        while process.is_alive() and (not log.exists() or log.stat().st_size == size):
            time.sleep(0.002)
        time.sleep(rng.uniform(0, 0.02))
        done += process.is_alive()
        process.kill()
        process.join(60)
    finish("c", log)
    assert done == kills
    plain, continued = np.load(tmp_path / "p.npz"), np.load(tmp_path / "c.npz")
    for name in plain.files:
        np.testing.assert_array_equal(plain[name], continued[name])
    made, undisturbed = log.stat().st_size, (tmp_path / "plain").stat().st_size
    assert undisturbed <= made <= undisturbed + 6 * done  # a block product of six columns per kill


@pytest.mark.slow
def test_sigkill(tmp_path: Path) -> None:
    killed_runs(3, 60, tmp_path)


@pytest.mark.nightly
def test_sigkill_at_20_random_moments(tmp_path: Path) -> None:
    killed_runs(20, 250, tmp_path)
