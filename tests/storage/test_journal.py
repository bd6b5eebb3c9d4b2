"""Journals: recorded products are read from disk bit for bit, also after the process was killed."""

from __future__ import annotations

import json
import os
import pickle
import random
import resource
import shutil
import subprocess
import sys
import time
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cases import Problem, loss_problem
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from killed_runs import journaled
from processes import started
from scipy.sparse.linalg import LinearOperator, aslinearoperator, cg, eigsh, lobpcg, lsmr, svds
from torch.utils.data import DataLoader

from curvop import FisherLinearOperator, HessianLinearOperator, JacobianLinearOperator
from curvop.operators.version import __version__
from curvop.storage.journal import JournaledLinearOperator
from curvop.storage.records import RecordFileError

P = 43


def hessian(problem: Problem, **options: Any) -> HessianLinearOperator:
    return HessianLinearOperator(problem.model, problem.loss_function, problem.params, problem.data, **options)


def fresh_hessian() -> HessianLinearOperator:
    return hessian(loss_problem("ce"), columns=1)


def same(actual: Any, expected: Any) -> None:
    assert type(actual) is type(expected)
    assert actual.dtype == expected.dtype
    assert actual.shape == expected.shape
    assert (actual == expected).all()


def vectors(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape)


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return tmp_path / "journals" / "hessian"


class TestProducts:
    @pytest.mark.parametrize("shape", [(P,), (P, 1), (P, 3), (P, 0)])
    @pytest.mark.parametrize("dtype", [np.float64, np.float32, np.int8, bool])
    def test_arrays(self, directory, shape, dtype) -> None:
        A, x = fresh_hessian(), (3 * vectors(*shape).clip(0)).astype(dtype)
        expected, count = A @ x, x.size // P
        for made in (count, 0):
            with JournaledLinearOperator(A, directory) as J:
                same(J @ x, expected)
                same(J @ x, expected)
                assert (J.num_products, J.num_answered, J.num_recorded) == (made, 2 * count - made, count)

    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.int32])
    @pytest.mark.parametrize(
        "device",
        [
            "cpu",
            pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")),
        ],
    )
    def test_tensors(self, directory, dtype, device) -> None:
        problem = loss_problem("ce")
        problem.model.to(device)
        A, X = hessian(problem, columns=1), torch.from_numpy(3 * vectors(P, 3)).to(device, dtype)
        expected = A @ X
        for made in (3, 0):
            with JournaledLinearOperator(A, directory) as J:
                assert J.takes_tensors
                assert J.device == A.device
                same(J @ X, expected)
                same(J @ X[:, 1], expected[:, 1])
                assert (J @ X).device == X.device
                assert J.num_products == made

    def test_arrays_and_tensors_have_separate_records(self, directory) -> None:
        A, x = fresh_hessian(), vectors(P).astype(np.float32)
        with JournaledLinearOperator(A, directory) as J:
            for _ in range(2):
                assert (J @ x).dtype == np.float64
                assert (J @ torch.from_numpy(x)).dtype == torch.float32
            assert J.num_products == 2

    @settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
    @given(blocks=st.lists(st.lists(st.integers(0, 5), min_size=1, max_size=5), min_size=1, max_size=5))
    def test_blocks_of_known_and_unknown_columns(self, directory, blocks) -> None:
        """Each column is multiplied once, however columns are grouped into blocks, repeated, or spread over runs."""
        shutil.rmtree(directory, ignore_errors=True)
        A, X = fresh_hessian(), vectors(P, 6)
        dense, known = A @ X, set()
        for block in blocks:
            with JournaledLinearOperator(A, directory) as J:
                same(J @ X[:, block], np.ascontiguousarray(dense[:, block]))
                assert J.num_products == len(set(block) - known)
                known |= set(block)
                assert J.num_recorded == len(known)

    def test_missing_columns_of_a_block_are_multiplied_together(self, directory) -> None:
        calls = []

        class Recording(LinearOperator):
            def _matvec(self, x: Any) -> Any:
                calls.append(1)
                return x

            def _matmat(self, X: Any) -> Any:
                calls.append(X.shape[1])
                return X

        A, X = Recording(np.float64, (5, 5)), vectors(5, 6)
        with JournaledLinearOperator(A, directory) as J:
            calls.clear()
            J @ X[:, 2]
            same(J @ X, X)
            J @ X[:, ::2]
            assert calls == [1, 5]

    def test_returned_products_are_copies(self, directory) -> None:
        class ReturnsItsInput(LinearOperator):
            def _matvec(self, x: Any) -> Any:
                return x

        x = vectors(4)
        with JournaledLinearOperator(ReturnsItsInput(np.float64, (4, 4)), directory) as J:
            for _ in range(2):
                product = J @ x
                product[:] = 7
            same(J @ x, vectors(4))
            same(x, vectors(4))

    def test_composites_blocks_and_submatrices(self, directory) -> None:
        A, x = fresh_hessian(), vectors(P)
        rows = np.array([3, 1, 40])
        for number, B in enumerate([A.damped(0.5), A.block("0.bias", "2.weight"), A.submatrix(rows), 2 * A + A @ A]):
            expected = B @ x[: B.shape[1]]
            for made in (1, 0):
                with JournaledLinearOperator(B, directory / str(number)) as J:
                    np.testing.assert_array_equal(J @ x[: B.shape[1]], expected)
                    assert J.num_products == made
        with JournaledLinearOperator(A, directory / "whole") as J:
            np.testing.assert_allclose(J.submatrix(rows) @ np.ones(3), A.submatrix(rows) @ np.ones(3), rtol=1e-12)
            np.testing.assert_allclose((J + 0.5 * aslinearoperator(np.eye(P))) @ x, A.damped(0.5) @ x, rtol=1e-12)

    def test_complex_operators_and_their_adjoints(self, directory) -> None:
        M = vectors(4, 3) + 1j * vectors(4, 3, seed=1)
        x, y = vectors(3) + 1j, vectors(4) - 1j
        for made in (3, 0):
            with JournaledLinearOperator(aslinearoperator(M), directory) as J:
                np.testing.assert_allclose(J @ x, M @ x)
                np.testing.assert_allclose(J.H @ y, M.conj().T @ y)
                np.testing.assert_allclose(J.T @ y, M.T @ y)
                np.testing.assert_allclose(J.H.H @ x, M @ x)
                assert J.num_products == made

    def test_arguments(self, directory) -> None:
        with pytest.raises(TypeError, match="not a LinearOperator"):
            JournaledLinearOperator(np.eye(3), directory)
        with pytest.raises(ValueError, match="max_bytes is -1"):
            JournaledLinearOperator(fresh_hessian(), directory, max_bytes=-1)
        with JournaledLinearOperator(aslinearoperator(np.eye(3)), directory) as J:
            assert not J.takes_tensors
            with pytest.raises(TypeError, match="takes NumPy arrays only"):
                J @ torch.ones(3)
            with pytest.raises(TypeError, match="cannot be recorded"):
                J @ np.array([1, 2, object()])
        with JournaledLinearOperator(fresh_hessian(), directory.with_name("other")) as J:
            with pytest.raises(TypeError, match="A is real"):
                J @ np.full(P, 1j)
            with pytest.raises(ValueError, match="x has shape"):
                J @ np.ones(P + 1)


class TestSolvers:
    """Each solver runs twice. The second run computes no product and returns the same bits."""

    def runs(self, A: LinearOperator, directory: Path, solve: Any) -> JournaledLinearOperator:
        results = []
        for number in range(2):
            with JournaledLinearOperator(A, directory) as J:
                results.append([np.asarray(part) for part in solve(J)])
                assert (J.num_products == 0) == (number == 1)
        for first, second in zip(*results, strict=True):
            same(second, first)
        for plain, first in zip(solve(A), results[0], strict=True):
            same(np.asarray(plain), first)

    def test_eigsh(self, directory) -> None:
        self.runs(fresh_hessian(), directory, lambda A: eigsh(A, k=3, v0=np.ones(P)))

    def test_cg(self, directory) -> None:
        self.runs(fresh_hessian().damped(1.0), directory, lambda A: cg(A, np.ones(P), rtol=1e-8))

    @pytest.mark.filterwarnings("ignore:Exited|not reaching:UserWarning")
    def test_lobpcg(self, directory) -> None:
        self.runs(fresh_hessian(), directory, lambda A: lobpcg(A, vectors(P, 3), maxiter=15, tol=1e-6))

    @pytest.mark.parametrize("solver", ["arpack", "lobpcg", "propack"])
    def test_svds(self, directory, solver) -> None:
        problem = loss_problem("ce")
        A = JacobianLinearOperator(problem.model, problem.params, problem.data, columns=1)
        start = np.ones(min(A.shape)) if solver != "propack" else np.ones(A.shape[0])
        self.runs(A, directory, lambda A: svds(A, k=3, v0=start, solver=solver, rng=0))

    def test_lsmr(self, directory) -> None:
        problem = loss_problem("ce")
        A = JacobianLinearOperator(problem.model, problem.params, problem.data).T
        self.runs(A, directory, lambda A: lsmr(A, np.ones(A.shape[0]), damp=0.1)[:1])


class TestAnotherProblem:
    def refused(self, A: LinearOperator, directory: Path, names: str) -> None:
        before = {path.name: path.read_bytes() for path in directory.iterdir()}
        with pytest.raises(
            ValueError, match=f"belongs to another problem: {names}.*; pass another directory, or delete it"
        ):
            JournaledLinearOperator(A, directory)
        assert {path.name: path.read_bytes() for path in directory.iterdir()} == before

    @pytest.fixture
    def journaled(self, directory) -> Path:
        with JournaledLinearOperator(fresh_hessian(), directory) as J:
            J @ np.ones(P)
        return directory

    def test_changed_parameters_and_data_are_named(self, journaled) -> None:
        problem = loss_problem("ce")
        problem.data[1][0][0, 0] += 1e-12
        self.refused(hessian(problem), journaled, r"data, batch 1 differs")
        problem.params["0.weight"].data[0, 0] += 1e-12
        self.refused(hessian(problem), journaled, r"params\['0.weight'\] and data, batch 1 differ")

    def test_other_operators(self, journaled) -> None:
        A = fresh_hessian()
        self.refused(A.damped(1.0), journaled, "operator")
        self.refused(A.block("0.bias"), journaled, "shape, rows and cols differ")
        self.refused(hessian(loss_problem("ce-smoothed")), journaled, ".*loss_function")
        self.refused(aslinearoperator(np.eye(P)), journaled, "operator")

    def test_shuffled_data(self, directory) -> None:
        problem = loss_problem("mse")
        samples = [(X, y) for batch in problem.data for X, y in zip(*batch, strict=True)]
        problem.data = DataLoader(samples, batch_size=3, shuffle=True)
        torch.manual_seed(0)
        JournaledLinearOperator(hessian(problem), directory).close()
        torch.manual_seed(1)
        with pytest.raises(ValueError, match=r"data, batch .* \(shuffled or augmented data differs in every run"):
            JournaledLinearOperator(hessian(problem), directory)

    def test_draws_without_a_seed(self, directory) -> None:
        p = loss_problem("ce")

        def fisher(rng: int | None) -> FisherLinearOperator:
            return FisherLinearOperator(p.model, p.loss_function, p.params, p.data, mc_samples=2, rng=rng)

        JournaledLinearOperator(fisher(None), directory / "none").close()
        with pytest.raises(ValueError, match=r"seed differs \(each run draws a new seed.*pass rng="):
            JournaledLinearOperator(fisher(None), directory / "none")
        for _ in range(2):
            JournaledLinearOperator(fisher(3), directory / "three").close()

    def test_other_versions_are_noted(self, journaled, monkeypatch) -> None:
        monkeypatch.setattr("curvop.storage.journal.__version__", "99.0")
        for _ in range(2):
            with JournaledLinearOperator(fresh_hessian(), journaled) as J:
                J @ np.ones(P)
                assert J.num_products == 0
        content = json.loads((journaled / "fingerprint.json").read_text())
        assert [versions["curvop"] for versions in content["made_with"]] == [__version__, "99.0"]
        assert set(os.listdir(journaled)) == {"fingerprint.json", "products.records"}

    def test_directories_with_other_files(self, directory, journaled) -> None:
        (directory / "thesis.tex").write_text("dear to somebody")
        with pytest.raises(ValueError, match=r"holds 'thesis.tex', which is not part of a journal"):
            JournaledLinearOperator(fresh_hessian(), directory)
        with pytest.raises(ValueError, match="is a file"):
            JournaledLinearOperator(fresh_hessian(), directory / "thesis.tex")
        (directory / "thesis.tex").unlink()
        (directory / ".fingerprint.json").write_text('{"format": "cur')  # the process was killed while writing
        JournaledLinearOperator(fresh_hessian(), directory).close()
        (directory / "fingerprint.json").write_text("{}")
        with pytest.raises(ValueError, match=r"fingerprint.json is not in the format 'curvop journal 1' of"):
            JournaledLinearOperator(fresh_hessian(), directory)
        (directory / "fingerprint.json").unlink()
        with pytest.raises(ValueError, match=r"lacks its fingerprint.json"):
            JournaledLinearOperator(fresh_hessian(), directory)


class TestOnePoint:
    @pytest.mark.parametrize("through_data", [False, True])
    def test_changed_parameters_are_not_answered(self, directory, through_data) -> None:
        problem = loss_problem("ce")
        A, weight = hessian(problem), problem.params["2.weight"]
        with JournaledLinearOperator(A.damped(1.0) + A, directory) as J:
            J @ np.ones(P)
            before = weight.detach().clone()
            with torch.no_grad():
                (weight.data if through_data else weight).mul_(1.5)
            for x in (np.ones(P), vectors(P)):  # a recorded vector and a new one
                with pytest.raises(RuntimeError, match=r"params\['2.weight'\].* changed since the journal"):
                    J @ x
            with torch.no_grad():
                weight.copy_(before)
            J @ np.ones(P)  # modified, but the values are the same
            assert J.num_products == 1

    def test_changed_batches_and_modes(self, directory) -> None:
        problem = loss_problem("ce")
        with JournaledLinearOperator(hessian(problem), directory) as J:
            J @ np.ones(P)
            problem.model.train()
            with pytest.raises(RuntimeError, match=r"^model changed since"):
                J @ np.ones(P)
            problem.model.eval()
            J @ np.ones(P)
            problem.data[0][0].mul_(2)
            with pytest.raises(RuntimeError, match=r"^data, batch 0 changed since"):
                J @ np.ones(P)


class TestDisk:
    def test_max_bytes(self, directory) -> None:
        A, X = fresh_hessian(), vectors(P, 5)
        with JournaledLinearOperator(A, directory, max_bytes=1500) as J:
            for x in X.T[:3]:
                J @ x
            with pytest.warns(RuntimeWarning, match="reached max_bytes = 1500"):
                J @ X[:, 3]
            same(J @ X[:, 4], A @ X[:, 4])  # warned once
            same(J @ X, A @ X)
            assert J.num_recorded == 3
            assert J.num_bytes == (directory / "products.records").stat().st_size <= 1500
        with JournaledLinearOperator(A, directory, max_bytes=1e9) as J:
            same(J @ X, A @ X)
            assert (J.num_products, J.num_recorded) == (2, 5)

    def test_the_default_is_half_of_the_free_space(self, directory, monkeypatch) -> None:
        monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**6, 0, 2000))
        with JournaledLinearOperator(fresh_hessian(), directory) as J:
            J @ np.ones(P)
            with pytest.warns(RuntimeWarning, match="reached max_bytes = 1008"):
                J @ vectors(P, 3)

    def test_the_report(self, directory) -> None:
        with JournaledLinearOperator(fresh_hessian(), directory, max_bytes=1e6) as J:
            J @ vectors(P, 3)
            J @ vectors(P, 3)
            assert str(J) == J.report()
            assert J.report() == (
                f"journal in {directory}: 3 products on disk, 0.00121 MB of at most 1 MB; this process computed 3 and "
                "read 3 from disk"
            )

    def test_a_full_disk(self, directory) -> None:
        A = fresh_hessian().damped(1.0)
        expected, _ = cg(A, np.ones(P), rtol=1e-8)
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        with JournaledLinearOperator(A, directory) as J:
            resource.setrlimit(resource.RLIMIT_FSIZE, (4000, before[1]))
            try:
                with pytest.raises(OSError, match="the record was not written, the 9 before it are intact"):
                    cg(J, np.ones(P), rtol=1e-8)
            finally:
                resource.setrlimit(resource.RLIMIT_FSIZE, before)
            made, recorded = J.num_products, J.num_recorded
            assert recorded == 9 == made - 1
            same(cg(J, np.ones(P), rtol=1e-8)[0], expected)  # the disk has space again
            total = J.num_products
        with JournaledLinearOperator(A, directory) as J:
            same(cg(J, np.ones(P), rtol=1e-8)[0], expected)
            assert J.num_recorded == total - 1

    def test_a_damaged_record(self, directory) -> None:
        with JournaledLinearOperator(fresh_hessian(), directory) as J:
            for x in vectors(3, P):
                J @ x
        path = directory / "products.records"
        content = bytearray(path.read_bytes())
        content[600] ^= 1
        path.write_bytes(content)
        with pytest.raises(RecordFileError, match=r"record 2, at byte .* is damaged.*Nothing was changed"):
            JournaledLinearOperator(fresh_hessian(), directory)
        assert path.read_bytes() == content

    def test_a_journal_in_use_and_one_that_is_closed(self, directory) -> None:
        with JournaledLinearOperator(fresh_hessian(), directory) as J:
            with pytest.raises(RecordFileError, match="in use"):
                JournaledLinearOperator(fresh_hessian(), directory)
            with pytest.raises(TypeError, match="cannot be pickled"):
                pickle.dumps(J)
        with pytest.raises(RecordFileError, match="is closed"):
            J @ np.ones(P)
        assert J.num_products == 0


def kill(child: BaseProcess, count: Path, moment: int, delay: float) -> bool:
    """Kill the child `delay` seconds after product number `moment` begins; return whether it was still running."""
    while child.is_alive() and not (count.exists() and count.stat().st_size >= moment):
        time.sleep(1e-4)
    time.sleep(delay)
    child.kill()
    child.join()
    return child.exitcode != 0


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> Path:
    """Return a directory with the results of uninterrupted runs, from another interpreter with another hash seed."""
    folder = tmp_path_factory.mktemp("undisturbed")
    script = (
        "import sys, killed_runs, pathlib; "
        "[killed_runs.journaled(pathlib.Path('.'), solver) for solver in sys.argv[1:]]"
    )
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    subprocess.run([sys.executable, "-c", script, "eigsh", "cg"], cwd=folder, env=environment, check=True)
    return folder


class TestKilled:
    """A process is killed at random moments and started again. Its final result is that of an uninterrupted run."""

    @pytest.mark.slow
    @pytest.mark.parametrize("kills", [3, pytest.param(20, marks=pytest.mark.nightly)])
    @pytest.mark.parametrize("solver", ["eigsh", "cg"])
    def test_the_result_is_the_same_to_the_last_bit(self, undisturbed, tmp_path, solver, kills) -> None:
        total = (undisturbed / f"{solver}.count").stat().st_size
        count, rng, killed = tmp_path / f"{solver}.count", random.Random(f"{solver} {kills}"), 0
        for moment in sorted(rng.sample(range(1, total - 5), kills)):
            killed += kill(started(journaled, tmp_path, solver), count, moment, rng.uniform(0, 0.005))
        child = started(journaled, tmp_path, solver)
        child.join()
        assert child.exitcode == 0
        assert killed == kills
        assert (tmp_path / f"{solver}.npy").read_bytes() == (undisturbed / f"{solver}.npy").read_bytes()
        assert total <= count.stat().st_size <= total + killed
        print(f"{solver}: {total} products, {killed} kills, {count.stat().st_size} products in all")
