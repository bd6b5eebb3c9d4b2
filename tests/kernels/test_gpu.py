"""Products on a GPU equal those on the CPU: recorded, staged and prefetched."""

from __future__ import annotations

import copy
import json
import warnings

import numpy as np
import pytest
import torch
from architectures import ARCHITECTURES, architecture_problem
from cases import Problem
from distributed_runs import KINDS, Ranks, pipeline
from limited_memory import assert_less_is_kept_and_the_product_is_right
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from curvop import (
    EKFACLinearOperator,
    GGNLinearOperator,
    HessianLinearOperator,
    JournaledLinearOperator,
    KFACLinearOperator,
    check,
    preconditioner,
    solve,
)
from curvop.cli.main import main
from curvop.kernels.batches import on_device
from curvop.kernels.cuda_graphs import Recorder
from curvop.operators import transfer
from curvop.operators.transfer import Staging
from curvop.spectrum import apply, blocks, density, diagonal, eigsh, frobenius_norm, trace, track
from curvop.spectrum.lanczos import Lanczos

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
ENGINES = ["autograd", "compiled"]


def pair(name: str, **options) -> tuple[HessianLinearOperator, HessianLinearOperator]:
    """Return a problem's operators on the GPU and on the CPU, the latter with the autograd engine."""
    problem = architecture_problem(name)
    model = copy.deepcopy(problem.model).cuda()
    there = Problem(model, problem.loss_function, problem.data)
    return hessian(there, **options), hessian(problem)


def hessian(problem: Problem, **options) -> HessianLinearOperator:
    return HessianLinearOperator(problem.model, problem.loss_function, problem.params, problem.data, **options)


def vectors(H: HessianLinearOperator, count: int) -> np.ndarray:
    return np.random.default_rng(0).normal(size=(H.shape[1], count))


def close(actual, expected) -> None:
    np.testing.assert_allclose(actual, expected, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_products_are_the_cpus(name: str, engine: str) -> None:
    there, here = pair(name, engine=engine)
    for x in vectors(here, 4).T:
        close(there @ x, here @ x)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("columns", [1, 8, "auto"])
def test_blocks_are_the_cpus(engine: str, columns) -> None:
    there, here = pair("conv", engine=engine, columns=columns)
    X = vectors(here, 20)
    for _ in range(3):
        close(there @ X, here @ X)


@pytest.mark.parametrize("engine", ENGINES)
def test_changed_parameters_are_noticed(engine: str) -> None:
    there, here = pair("conv", engine=engine)
    X = vectors(here, 3)
    for step in range(2):
        for x in X.T:
            close(there @ x, here @ x)
        with torch.no_grad():
            for H in (there, here):
                for value in H._objective.params.values():
                    value += 0.1 * (step + 1)


@pytest.mark.parametrize("engine", ENGINES)
def test_tensors_stay_there(engine: str) -> None:
    there, here = pair("conv", engine=engine)
    x = vectors(here, 1)[:, 0]
    product = there @ torch.from_numpy(x).cuda()
    assert product.is_cuda
    close(product.cpu(), here @ x)


class TestCheck:
    @pytest.mark.parametrize("name", ["conv", "attention-fused", "lstm"])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    def test_what_is_sound_passes_and_random_numbers_stay(self, monkeypatch, name: str, dtype: torch.dtype) -> None:
        monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
        problem = architecture_problem(name)
        data = [(X.to(dtype), y) for X, y in problem.data]
        states = torch.get_rng_state(), torch.cuda.get_rng_state()
        report = check(hessian(Problem(problem.model.to("cuda", dtype), problem.loss_function, data)), rng=0)
        assert report.verdict.startswith("sound"), report
        assert torch.equal(states[0], torch.get_rng_state())
        assert torch.equal(states[1], torch.cuda.get_rng_state())

    def test_tf32_is_held_to_its_own_epsilon(self, monkeypatch) -> None:
        monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", True)
        problem = architecture_problem("linear")
        data = [(X.float(), y) for X, y in problem.data]
        report = check(hessian(Problem(problem.model.float().cuda(), problem.loss_function, data)), rng=0)
        assert report.verdict == "nothing is wrong, with 1 warning: precision"
        assert report["symmetry"].limit > 1e-3


@pytest.mark.parametrize("first", ["cpu", "cuda"])
def test_random_numbers_stay_where_a_product_raises(first: str) -> None:
    """The random state of every device with parameters is restored, whichever device has the first one."""

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(6, 5).double().to(first), nn.Linear(5, 3).double().cuda()

        def forward(self, X: torch.Tensor) -> torch.Tensor:
            z = nn.functional.dropout(self.first(X).cuda(), 0.5, self.training)
            return nn.functional.dropout(self.last(z), 0.5, self.training).to(X.device)

    def fail(z: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        raise ArithmeticError

    model, data = Model().train(), [(torch.randn(4, 6).double(), torch.randn(4, 3).double())]
    for loss_function, error in ((fail, ArithmeticError), (nn.MSELoss(), RuntimeError)):  # or the loss has changed
        H = HessianLinearOperator(model, loss_function, dict(model.named_parameters()), data)
        states = torch.get_rng_state(), torch.cuda.get_rng_state()
        with pytest.raises(error):
            H @ np.ones(H.shape[1])
        assert torch.equal(states[0], torch.get_rng_state())
        assert torch.equal(states[1], torch.cuda.get_rng_state())


class TestSeveralDevices:
    """The host is one of the devices, so one GPU suffices. Vectors are on the device of the first parameter."""

    @pytest.mark.parametrize("kind", KINDS)
    @pytest.mark.parametrize("on_gpu", ["first", "second"])
    def test_products_are_the_cpus(self, kind: str, on_gpu: str) -> None:
        problem, model = pipeline(), pipeline().model
        getattr(model, on_gpu).cuda()
        there = KINDS[kind](model, problem.loss_function, dict(model.named_parameters()), problem.data)
        here = KINDS[kind](problem.model, problem.loss_function, problem.params, problem.data)
        X = vectors(here, 3)
        for _ in range(2):
            close(there @ X, here @ X)
        close(there.gradient_and_loss()[0], here.gradient_and_loss()[0])
        close(there.block("second.weight", "first.bias") @ X[:5], here.block("second.weight", "first.bias") @ X[:5])
        parts = there.unravel(X[:, 0])
        assert {name: part.device for name, part in parts.items()} == {
            name: value.device for name, value in model.named_parameters()
        }


class TestRanks:
    """The ranks share one GPU, so tensors go through the host: NCCL needs one GPU for each rank."""

    def test_matrices(self, tmp_path) -> None:
        found = Ranks("on_gpu", 2, tmp_path).check()[0]
        for kind, product in found.items():
            problem = pipeline()
            A = KINDS[kind](problem.model, problem.loss_function, problem.params, problem.data)
            close(product, A @ np.ones(A.shape[0]))


class TestRecording:
    @pytest.mark.parametrize("engine", ENGINES)
    def test_is_used_from_the_third_product_on(self, engine: str) -> None:
        there, here = pair("conv", engine=engine)
        for x in vectors(here, 4).T:
            close(there @ x, here @ x)
        assert all(one._replays for one in there._engine._first.kept.values())

    def test_blocks_are_recorded_too(self) -> None:
        there, here = pair("conv", columns=8)
        for seed in range(4):
            X = np.random.default_rng(seed).normal(size=(here.shape[1], 8))
            close(there @ X, here @ X)
        assert all((8, here.shape[1]) in one._replays for one in there._engine._first.kept.values())

    def test_goes_on_at_other_parameters(self) -> None:
        there, here = pair("conv")
        for step in range(3):
            for x in vectors(here, 4).T:
                close(there @ x, here @ x)
            assert all(one._replays for one in there._engine._first.kept.values())
            with torch.no_grad():
                for H in (there, here):
                    for value in H._objective.params.values():
                        value += 0.1 * (step + 1)

    def test_blocks_that_come_and_go_leave_the_others_right(self) -> None:
        """The cuBLAS workspace of a graph is not freed with another graph of the same stream."""
        there, here = pair("conv")
        X = vectors(here, 20)
        for x in X.T:
            close(there @ x, here @ x)
            block = there.block(next(iter(there.params_slices)))
            for _ in range(4):
                block @ np.ones(block.shape[1])
            del block

    @pytest.mark.parametrize("wait", [lambda x: float(x.sum()), lambda x: torch.cuda.synchronize()])
    def test_a_model_that_cannot_be_recorded_is_multiplied_as_it_is(self, wait) -> None:
        class Waits(torch.autograd.Function):
            @staticmethod
            def forward(ctx, x):
                ctx.save_for_backward(x)
                return x.tanh()

            @staticmethod
            def backward(ctx, gradient):
                [x] = ctx.saved_tensors
                wait(gradient)
                return gradient * (1 - x.tanh() ** 2)

        torch.manual_seed(0)
        weight = nn.Parameter(torch.randn(2, 3, device="cuda", dtype=torch.float64))
        data = [(torch.randn(5, 3, dtype=torch.float64), torch.randn(5, 2, dtype=torch.float64))]
        H = HessianLinearOperator(lambda p, X: Waits.apply(X @ p["w"].T), nn.MSELoss(), {"w": weight}, data)
        expected = H @ np.eye(6)
        for _ in range(4):
            close(H @ np.ones(6), expected.sum(1))
        assert not any(one._replays for one in H._engine._first.kept.values())
        torch.cuda.empty_cache()  # fails if torch is still in capture mode
        assert torch.rand(3, device="cuda").std() > 0

    def test_one_product_does_not_overwrite_another(self) -> None:
        run = Recorder(warns=True).record(
            lambda x: 2 * x, torch.ones(3, device="cuda"), 2 * torch.ones(3, device="cuda")
        )
        first, second = run(torch.ones(3, device="cuda")), run(torch.zeros(3, device="cuda"))
        assert first.tolist() == [2, 2, 2]
        assert second.tolist() == [0, 0, 0]

    def test_products_of_several_batches_share_memory(self) -> None:
        recorder, x = Recorder(warns=True), torch.ones(1000, device="cuda")
        runs = [recorder.record(lambda x, a=a: (a * x).sin(), x, (a * x).sin()) for a in range(5)]
        y = torch.rand(1000, device="cuda")
        for a, run in enumerate(runs):
            torch.testing.assert_close(run(y), (a * y).sin())

    def test_what_cannot_be_recorded_runs_as_it_is(self) -> None:
        recorder, x = Recorder(warns=True), torch.ones(3, device="cuda")
        with pytest.warns(RuntimeWarning, match="not recorded"):
            assert recorder.record(lambda x: x * float(x.sum()), x, 3 * x) is None
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert recorder.record(lambda x: x, x, x) is None

    def test_what_differs_is_not_used(self) -> None:
        x = torch.ones(3, device="cuda")
        with pytest.warns(RuntimeWarning, match="differs"):
            assert Recorder(warns=True).record(lambda x: 2 * x, x, x) is None


class TestStaging:
    @pytest.mark.parametrize("dtype", [np.float32, np.float64])
    @pytest.mark.parametrize("most", [2**29, 0])
    def test_there_and_back(self, monkeypatch, dtype, most) -> None:
        monkeypatch.setattr(transfer, "_MAX_PINNED_BYTES", most)
        stage = Staging()
        for size in (3, 1000, 10):
            array = np.random.default_rng(size).normal(size=(2, size)).astype(dtype)
            moved = stage.to_device(array, torch.device("cuda"), torch.float64)
            assert (moved.is_cuda, moved.dtype) == (True, torch.float64)
            back = stage.to_array(moved)
            np.testing.assert_array_equal(back, array)
            stage.to_array(torch.zeros_like(moved))
            np.testing.assert_array_equal(back, array)  # not overwritten by later copies


class TestPrefetching:
    @pytest.mark.parametrize("pinned", [False, True])
    @pytest.mark.parametrize("workers", [0, 2])
    @pytest.mark.parametrize("cache", [0, np.inf])
    def test_loaders(self, pinned: bool, workers: int, cache: float) -> None:
        problem = architecture_problem("conv")
        X, y = (torch.cat(parts) for parts in zip(*problem.data, strict=True))
        expected = hessian(problem) @ np.ones(sum(value.numel() for value in problem.params.values()))
        loader = DataLoader(TensorDataset(X, y), batch_size=2, num_workers=workers, pin_memory=pinned)
        H = hessian(Problem(problem.model.cuda(), problem.loss_function, loader), cache=cache)
        for _ in range(3):
            close(H @ np.ones(H.shape[1]), expected)

    def test_batches_arrive_whole_and_in_order(self) -> None:
        device = torch.device("cuda", torch.cuda.current_device())
        batches = [(torch.full((1000, 1000), float(index)).pin_memory(), {"y": index}) for index in range(20)]
        for index, (X, rest) in enumerate(on_device(batches, device)):
            assert X.device == device
            assert rest == {"y": index}
            busy = X
            for _ in range(20):  # still computing when the next batch is copied
                busy = busy @ torch.eye(1000, device=device)
            assert bool((busy == index).all())
            del X, busy


class TestSpectrum:
    def test_densities(self) -> None:
        there, here = pair("conv")
        options = {"num_probes": 4, "num_steps": 30, "rng": 0, "progress": False}
        found, expected = density(there, **options), density(here, **options)
        np.testing.assert_allclose(found.range, expected.range, rtol=1e-8)
        close(found.trace().value, expected.trace().value)

    def test_the_basis_stays_there(self) -> None:
        there, _ = pair("conv")
        device = torch.device("cuda", torch.cuda.current_device())
        lanczos = Lanczos(there, torch.ones(1, there.shape[0], device=device), 10)
        lanczos.step()
        assert lanczos.basis.is_cuda

    def test_thick_restarts(self) -> None:
        there, here = pair("conv")
        found, expected = (
            eigsh(A, 3, "LA", method=method, progress=False) for A, method in ((there, "lanczos"), (here, "arpack"))
        )
        assert found.ok
        close(found.values, expected.values)

    def test_thick_restarts_in_single_precision(self) -> None:
        torch.manual_seed(0)
        model, data = nn.Sequential(nn.Linear(20, 30), nn.Tanh(), nn.Linear(30, 5)), torch.randn(64, 20)
        here = hessian(Problem(model, nn.CrossEntropyLoss(), [(data, torch.arange(64) % 5)]))
        there = hessian(Problem(copy.deepcopy(model).cuda(), nn.CrossEntropyLoss(), [(data, torch.arange(64) % 5)]))
        found = eigsh(there, 3, "LA", method="lanczos", tol=1e-3, progress=False)
        assert found.ok
        np.testing.assert_allclose(found.values, eigsh(here, 3, "LA", progress=False).values, rtol=1e-3)
        np.testing.assert_allclose(found.vectors.T @ found.vectors, np.eye(3), atol=1e-14)

    def test_exact_diagonals(self) -> None:
        problem = architecture_problem("conv")
        expected = GGNLinearOperator(problem.model, problem.loss_function, problem.params, problem.data).diagonal()
        model = copy.deepcopy(problem.model).cuda()
        there = GGNLinearOperator(model, problem.loss_function, dict(model.named_parameters()), problem.data)
        close(there.diagonal(), expected)

    @pytest.mark.parametrize("method", ["arpack", "lobpcg", "lanczos", "dense"])
    def test_eigenvalues_are_certified(self, method: str) -> None:
        there, here = pair("conv")
        found = eigsh(there, 3, "LA", method=method, progress=False)
        assert found.ok, found.verdict
        close(found.values, np.linalg.eigvalsh(here @ np.eye(here.shape[0]))[-3:])

    @pytest.mark.parametrize("num_products", [4, 20])
    @pytest.mark.parametrize("estimate", [trace, diagonal, frobenius_norm])
    def test_estimates(self, estimate, num_products: int) -> None:
        there, here = pair("conv")
        for found, expected in zip(*(estimate(A, num_products, rng=0) for A in (there, here)), strict=True):
            np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-10)

    def test_layer_by_layer(self) -> None:
        found, expected = (blocks(A, num_probes=2, num_steps=10, progress=False) for A in pair("conv"))
        np.testing.assert_allclose(found.largest, expected.largest, rtol=1e-6, atol=1e-10)
        np.testing.assert_allclose(found.norms, expected.norms, rtol=1e-6, atol=1e-10)

    def test_along_training(self) -> None:
        there, here = pair("conv")
        trackers = [track(A, k=2, every=1, tol=1e-8) for A in (there, here)]
        for _ in range(3):
            for A, tracker in zip((there, here), trackers, strict=True):
                tracker.step()
                with torch.no_grad():
                    for value in A._objective.params.values():
                        value *= 0.95
        np.testing.assert_allclose(*(tracker.values for tracker in trackers), rtol=1e-6)

    def test_a_density_is_taken_up_again(self, tmp_path) -> None:
        options = {"num_probes": 3, "num_steps": 12, "rng": 0, "progress": False}
        there, _ = pair("conv", columns=1)
        expected = density(there, **options)
        product, made = there._apply, []

        def dying(rows):
            made.append(len(rows))
            if len(made) == 8:
                raise KeyboardInterrupt
            return product(rows)

        there._apply = dying
        with pytest.raises(KeyboardInterrupt):
            density(there, checkpoint=tmp_path, **options)
        assert any(tmp_path.iterdir())
        found = density(there, checkpoint=tmp_path, **options)
        for name in ("nodes", "weights"):
            np.testing.assert_array_equal(getattr(found, name), getattr(expected, name))


@pytest.mark.filterwarnings("ignore:some parameters have no Kronecker factors")
@pytest.mark.parametrize("kind", [KFACLinearOperator, EKFACLinearOperator])
class TestKroneckerFactors:
    def pair(self, kind: type[KFACLinearOperator], name: str) -> tuple[KFACLinearOperator, KFACLinearOperator]:
        problem = architecture_problem(name)
        model = copy.deepcopy(problem.model).cuda()
        there = kind(model, problem.loss_function, dict(model.named_parameters()), problem.data)
        return there, kind(problem.model, problem.loss_function, problem.params, problem.data)

    @pytest.mark.parametrize("name", ["linear", "conv", "group-norm-silu", "attention-module", "tied"])
    def test_products_and_closed_forms_are_the_cpus(self, kind: type[KFACLinearOperator], name: str) -> None:
        there, here = self.pair(kind, name)
        X = vectors(here, 5)
        close(there @ X, here @ X)
        close(there.diagonal(), here.diagonal())
        close(there.inverse(0.1) @ X, here.inverse(0.1) @ X)
        close(there.logdet(0.1), here.logdet(0.1))
        block = next(iter(there.params_slices))
        close(there.block(block).to_dense(), here.block(block).to_dense())

    def test_tensors_stay_there(self, kind: type[KFACLinearOperator]) -> None:
        there, here = self.pair(kind, "conv")
        x = vectors(here, 1)[:, 0]
        for A, B in ((there, here), (there.inverse(0.1), here.inverse(0.1))):
            product = A @ torch.from_numpy(x).cuda()
            assert product.is_cuda
            close(product.cpu(), B @ x)

    def test_updates_and_files(self, kind: type[KFACLinearOperator], tmp_path) -> None:
        there, here = self.pair(kind, "conv")
        batch = architecture_problem("conv").data[0]
        for A in (there, here):
            A.update(batch, decay=0.5)
        X = vectors(here, 3)
        close(there @ X, here @ X)
        there.save(tmp_path / "factors.npz")
        close(kind.load(tmp_path / "factors.npz") @ X, here @ X)

    def test_solves(self, kind: type[KFACLinearOperator]) -> None:
        there, _ = self.pair(kind, "conv")
        G, b = there.exact, vectors(there, 2)
        M = preconditioner.kfac(G, 0.1, ekfac=kind is EKFACLinearOperator)
        found = solve(G, b, 0.1, preconditioner=M, rtol=1e-12, progress=False)
        assert found.converged.all()
        n = len(b)
        close(found.solution, np.linalg.solve(G @ np.eye(n) + 0.1 * np.eye(n), b))


class TestAround:
    def test_solves(self) -> None:
        problem = architecture_problem("conv")
        model = copy.deepcopy(problem.model).cuda()
        here = GGNLinearOperator(problem.model, problem.loss_function, problem.params, problem.data)
        there = GGNLinearOperator(model, problem.loss_function, dict(model.named_parameters()), problem.data)
        M = preconditioner.nystrom(there, rank=10, damping=1e-2)
        b, _ = there.gradient_and_loss()
        found = solve(there, b, damping=1e-2, preconditioner=M, rtol=1e-12, progress=False)
        assert found.converged
        n = here.shape[0]
        np.testing.assert_allclose(
            found.solution, np.linalg.solve(here @ np.eye(n) + 1e-2 * np.eye(n), b), rtol=1e-8, atol=1e-12
        )

    def test_journals(self, tmp_path) -> None:
        x = vectors(pair("conv")[0], 1)[:, 0]
        products = []
        for _ in range(2):
            there, _ = pair("conv")
            with JournaledLinearOperator(there, tmp_path) as J:
                products.append(J @ x)
                products.append((J @ torch.from_numpy(x).cuda()).cpu().numpy())
        assert there.num_products <= 1  # for the fingerprint, if any
        for product in products:
            np.testing.assert_array_equal(product, products[0])

    def test_the_command(self, tmp_path, capsys) -> None:
        (tmp_path / "mine.py").write_text(PROBLEM)
        out = tmp_path / "study"
        arguments = ["--probes", "2", "--steps", "10", "--blocks", "--out", str(out)]
        assert main(["spectrum", f"{tmp_path / 'mine.py'}:problem", *arguments]) == 0
        assert f"cuda:0 ({torch.cuda.get_device_name(0)})" in (out / "report.html").read_text()
        assert main(["check", f"{tmp_path / 'mine.py'}:problem"]) == 0
        assert "sound" in capsys.readouterr().out

    def test_the_command_moves_a_problem(self, tmp_path, capsys) -> None:
        (tmp_path / "mine.py").write_text(PROBLEM)
        values = []
        for device in ("cuda", "cpu"):
            arguments = ["--which", "LA", "--k", "3", "--device", device]
            assert main(["eigs", f"{tmp_path / 'mine.py'}:problem", *arguments, "--json"]) == 0
            values.append(json.loads(capsys.readouterr().out)["eigenvalues"])
            assert main(["eigs", f"{tmp_path / 'mine.py'}:problem", *arguments]) == 0
            assert f"on {'cuda:0' if device == 'cuda' else 'cpu'})" in capsys.readouterr().out
        np.testing.assert_allclose(*values, rtol=1e-3)  # a float32 model

    @pytest.mark.parametrize("engine", ENGINES)
    def test_memory_is_flat(self, engine: str) -> None:
        there, _ = pair("conv", engine=engine)
        x, taken = torch.from_numpy(vectors(there, 1)[:, 0]).cuda(), []
        for _ in range(10):
            for _ in range(100):
                there @ x
            taken.append(torch.cuda.memory_allocated())
        assert max(taken[1:]) - min(taken) < 2**16  # a product takes half a kilobyte

    @pytest.mark.parametrize("mebibytes", [150, 300])
    def test_where_memory_runs_out_less_is_kept_and_the_product_is_right(self, mebibytes: int) -> None:
        assert_less_is_kept_and_the_product_is_right("cuda", mebibytes)


PROBLEM = """
import torch
from torch import nn


def problem():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3)).cuda()
    data = [(torch.randn(20, 6), torch.randint(0, 3, (20,))) for _ in range(2)]
    return dict(model=model, loss_function=nn.CrossEntropyLoss(), params=dict(model.named_parameters()), data=data)
"""


def test_functions_of_matrices_keep_vectors_on_the_gpu() -> None:
    there, here = pair("conv")
    b = vectors(here, 2)
    expected = apply(here, "exp", b, rtol=1e-11, progress=False)
    result = apply(there, "exp", torch.from_numpy(b).cuda(), rtol=1e-11, progress=False)
    assert result.value.is_cuda
    close(result.value.cpu().numpy(), expected.value)
    close(apply(there, "exp", b, rtol=1e-11, progress=False).value, expected.value)


def test_preconditioned_eigenvalues_are_the_cpus() -> None:
    values = []
    for H in pair("conv"):
        parameters = list(H._params.values())
        optimizer = torch.optim.Adam(parameters, lr=0.01, capturable=parameters[0].is_cuda)
        for parameter in parameters:
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()
        values.append(track(H, 2, tol=1e-10, optimizer=optimizer).step())
    close(*values)
