"""The engine linearizes batches once, caches them within the budget, and re-linearizes them if anything changed."""

from __future__ import annotations

import ctypes
import os
import platform
import warnings
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
from cases import Problem, cut, loss_problem, mlp, seeded
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from curvop import HessianLinearOperator, NonDeterministicObjectiveError, NonFiniteProductError
from curvop.kernels.graph import nodes
from curvop.kernels.hessian_kernel import HessianKernel
from curvop.kernels.memory import free_bytes, measured
from curvop.kernels.model_objective import ModelObjective


class Tally:
    def __init__(self) -> None:
        self.total = 0


class Counting(nn.Module):
    """Counts the runs of the model in a separate object, because attributes of modules are restored."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model, self.tally = model, Tally()

    @property
    def runs(self) -> int:
        return self.tally.total

    def forward(self, X):
        self.tally.total += 1
        return self.model(X)


@seeded
def counting_problem(sizes: tuple[int, ...] = (4, 4, 4)) -> Problem:
    model = Counting(mlp())
    return Problem(model, nn.MSELoss(), cut(torch.randn(sum(sizes), 4), torch.randn(sum(sizes), 3), sizes))


def hessian(problem: Problem, **options) -> HessianLinearOperator:
    return HessianLinearOperator(problem.model, problem.loss_function, problem.params, problem.data, **options)


def dense(problem: Problem) -> np.ndarray:
    H = hessian(problem, cache=0)
    return H @ np.eye(H.shape[1])


def batch_bytes(problem: Problem) -> int:
    """Return the bytes that a linearization of the first batch retains, measured by the engine."""
    objective = ModelObjective(problem.model, problem.loss_function, problem.params, problem.data)
    leaves, names = objective.leaves(problem.params), list(problem.params)
    kernel = HessianKernel(objective, names, names)
    return measured(lambda: kernel.linearize(leaves, 0, problem.data[0]), objective.tensors())[1]


class TestCache:
    def test_construction_costs_no_pass(self) -> None:
        problem = counting_problem()
        hessian(problem)
        assert problem.model.runs == 0

    def test_what_is_kept_is_linearized_once(self) -> None:
        problem = counting_problem()
        H = hessian(problem)
        H @ np.ones(43)
        first = problem.model.runs
        assert first == 3 + 1  # one more to measure the memory of batches of this shape
        for _ in range(5):
            H @ np.ones(43)
        assert problem.model.runs == first

    def test_nothing_kept_linearizes_each_batch_once_for_all_columns(self) -> None:
        problem = counting_problem()
        H = hessian(problem, cache=0)
        H @ np.eye(43)
        assert problem.model.runs == 3
        H @ np.eye(43)
        assert problem.model.runs == 6

    @pytest.mark.parametrize("kept", [0, 1, 2, 3])
    def test_the_budget_in_bytes_decides_how_many_are_kept(self, kept: int) -> None:
        problem = counting_problem()
        expected = dense(problem)
        budget = kept * batch_bytes(problem)
        H = hessian(problem, cache=budget)
        np.testing.assert_allclose(H @ np.eye(43), expected, rtol=1e-12, atol=1e-14)
        problem.model.tally.total = 0
        np.testing.assert_allclose(H @ np.eye(43), expected, rtol=1e-12, atol=1e-14)
        assert problem.model.runs == 3 - kept

    def test_batches_of_other_sizes_are_measured_apart(self) -> None:
        problem = counting_problem((16, 2, 2))
        H = hessian(problem, cache=batch_bytes(problem) - 1)  # the large one does not fit, the small ones do
        H @ np.ones(43)
        problem.model.tally.total = 0
        H @ np.ones(43)
        assert problem.model.runs == 1

    @pytest.mark.skipif(
        platform.libc_ver()[0] != "glibc", reason="needs Linux's count of resident pages and glibc's malloc_trim"
    )
    def test_what_a_batch_retains_is_what_the_process_gets_back(self) -> None:
        def resident() -> int:
            ctypes.CDLL(None).malloc_trim(0)  # the C library holds on to freed memory for the next product
            return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

        model = nn.Sequential(nn.Linear(4, 5_000), nn.Tanh())
        data = [(torch.randn(2_000, 4), torch.randn(2_000, 5_000))]
        # This loss does not save the targets, so all retained memory is new: about 40 MB for each tensor.
        problem = Problem(model, lambda z, y: ((z - y) ** 2).mean(), data)
        measured = batch_bytes(problem)
        H = hessian(problem, cache=2 * measured)
        H @ np.ones(25_000)
        holding = resident()
        del H
        assert measured > 100e6
        assert holding - resident() == pytest.approx(measured, rel=0.02)

    def test_parameters_and_their_gradient_are_not_retained(self) -> None:
        wide = Problem(
            nn.Linear(4, 10_000, bias=False), lambda z, y: (z.sum(1) ** 2).mean(), [(torch.randn(2, 4), torch.ones(2))]
        )
        assert batch_bytes(wide) < 4 * 4 * 10_000  # less than one more copy of the parameters

    @pytest.mark.parametrize("cache", ["auto", 0])
    def test_an_objective_that_uses_torch_func_is_kept_too(self, cache) -> None:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(1, 5), nn.Tanh(), nn.Linear(5, 1)).double()
        runs = []

        def residual(params, points):
            runs.append(1)
            value = torch.func.grad(lambda x: torch.func.functional_call(model, params, (x,)).sum())
            return ((torch.func.vmap(value)(points) - 1) ** 2).mean()

        params = dict(model.named_parameters())
        H = HessianLinearOperator.from_objective(residual, params, [torch.randn(6, 1).double()], cache=cache)
        matrix = H @ np.eye(16)
        np.testing.assert_allclose(matrix, matrix.T, rtol=1e-10, atol=1e-13)
        first = len(runs)
        H @ np.ones(16)
        assert len(runs) == first + (cache == 0)
        assert cache == 0 or H._engine._first.bytes > 6 * 5 * 8

    def test_sparse_gradients(self) -> None:
        torch.manual_seed(0)
        dense_one = nn.Sequential(nn.Embedding(5, 3), nn.Flatten(), nn.Tanh(), nn.Linear(6, 2)).double()
        sparse_one = nn.Sequential(nn.Embedding(5, 3, sparse=True), *dense_one[1:]).double()
        sparse_one.load_state_dict(dense_one.state_dict())
        data = [(torch.randint(0, 5, (4, 2)), torch.randn(4, 2).double())]
        problems = [Problem(model, nn.MSELoss(), data) for model in (dense_one, sparse_one)]
        for problem in problems:
            problem.params = {"3.weight": problem.params["3.weight"]}
        np.testing.assert_allclose(*(hessian(problem) @ np.eye(12) for problem in problems), rtol=1e-12)

    def test_batches_that_are_views_of_one_tensor_are_not_the_whole_tensor_each(self) -> None:
        X, y = torch.randn(10_000, 4), torch.randn(10_000, 3)
        views = Problem(mlp(), nn.MSELoss(), list(zip(X.split(10), y.split(10), strict=True)))
        copies = Problem(mlp(), nn.MSELoss(), [(X.clone(), y.clone()) for X, y in views.data[:1]])
        assert batch_bytes(views) == batch_bytes(copies)

    def test_a_loaders_batches_are_not_held_beside_the_budget(self) -> None:
        class Loader:
            def __init__(self) -> None:
                self.made: list[weakref.ref[torch.Tensor]] = []

            def __iter__(self):
                for seed in range(4):
                    X = torch.randn(8, 4, generator=torch.Generator().manual_seed(seed)).double()
                    self.made.append(weakref.ref(X))
                    yield X, torch.ones(8, 3).double()

        problem = counting_problem()
        data = problem.data = Loader()
        block = hessian(problem).block("model.2.bias")
        block @ np.ones(3)
        assert len(block._engine._first.kept) == 4
        assert not [ref for ref in data.made if ref() is not None]

    @pytest.mark.parametrize("kept", [0, 1])
    def test_one_graph_at_a_time_beside_those_kept(self, kept: int, monkeypatch) -> None:
        alive: list[weakref.ref] = []
        most = []
        linearize = HessianKernel.linearize

        def watching(self, point, index, batch):
            most.append(sum(ref() is not None for ref in alive))
            linearization = linearize(self, point, index, batch)
            alive.append(weakref.ref(linearization))
            return linearization

        monkeypatch.setattr(HessianKernel, "linearize", watching)
        H = hessian(counting_problem(), cache=kept * batch_bytes(counting_problem()))
        alive.clear()
        most.clear()
        for _ in range(3):
            H @ np.ones((43, 2))
        assert len(H._engine._first.kept) == kept
        assert len(most) >= 6
        assert max(most) == kept

    def test_an_operator_and_its_adjoint_share_the_budget(self) -> None:
        problem = counting_problem()
        A = hessian(problem, cache=2 * batch_bytes(problem)).block("model.0.weight", "model.2.weight")
        A @ np.ones(15)
        A.H @ np.ones(20)
        engines = A._engine, A.H._engine
        spent = sum(engine._first.bytes for engine in engines)
        assert 0 < spent <= 2 * batch_bytes(problem)
        problem.model.model[0].bias.data.add_(1.0)  # both start again and share the whole budget
        np.testing.assert_allclose(A @ np.eye(15), (A.H @ np.eye(20)).T, rtol=1e-12, atol=1e-14)
        assert sum(engine._first.bytes for engine in engines) <= 2 * batch_bytes(problem)

    def test_auto_leaves_memory_free(self) -> None:
        assert 0 < free_bytes(torch.device("cpu")) < 2**50


AUTOCAST = pytest.mark.filterwarnings("ignore:torch.autocast is enabled:RuntimeWarning")


class Moving(nn.Module):
    """A model whose layers compute another function in the other container."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.ModuleList([nn.Linear(4, 4)])
        self.second = nn.ModuleList([nn.Tanh()])
        self.head = nn.Linear(4, 4)

    def forward(self, X: torch.Tensor) -> torch.Tensor:
        for layer in self.first:
            X = X + layer(X).tanh()
        for layer in self.second:
            X = layer(X)
        return self.head(X)


@seeded
def moving_problem() -> Problem:
    return Problem(Moving(), nn.MSELoss(), [(torch.randn(6, 4), torch.randn(6, 4))])


class TestChangesAreNoticed:
    @pytest.fixture
    def problem(self) -> Problem:
        return loss_problem("ce")

    def check(self, problem: Problem, change) -> None:
        H = hessian(problem)
        before = H @ np.eye(H.shape[1])
        change()
        after = H @ np.eye(H.shape[1])
        assert np.abs(after - before).max() > 1e-6
        np.testing.assert_allclose(after, dense(problem), rtol=1e-12, atol=1e-14)

    def test_an_optimizer_step(self, problem: Problem) -> None:
        optimizer = torch.optim.SGD(problem.model.parameters(), lr=1.0)

        def step() -> None:
            (X, y), *_ = problem.data
            problem.loss_function(problem.model(X), y).backward()
            optimizer.step()

        self.check(problem, step)

    def test_load_state_dict(self, problem: Problem) -> None:
        other = {name: torch.randn_like(value) for name, value in problem.model.state_dict().items()}
        self.check(problem, lambda: problem.model.load_state_dict(other))

    @pytest.mark.parametrize(
        "change",
        [
            lambda weight: weight[0].add_(1.0),
            lambda weight: weight.neg_(),
            lambda weight: weight.copy_(weight.flip(0)),
            lambda weight: weight[0, 0].add_(1e-3),
        ],
        ids=["add", "negate", "permute", "one-entry"],
    )
    @pytest.mark.parametrize("layer", [0, 2])
    @pytest.mark.parametrize("takes_part", ["0.weight", "2.weight"])
    def test_writing_through_data(self, problem: Problem, change, layer: int, takes_part: str) -> None:
        problem.params = {takes_part: problem.params[takes_part]}
        self.check(problem, lambda: change(problem.model[layer].weight.data))

    def test_writing_through_data_to_what_is_not_contiguous(self) -> None:
        torch.manual_seed(0)
        model = (
            nn.Sequential(nn.Conv2d(2, 3, 2), nn.Tanh(), nn.Flatten()).double().to(memory_format=torch.channels_last)
        )
        problem = Problem(model, nn.MSELoss(), [(torch.randn(2, 2, 3, 3).double(), torch.randn(2, 12).double())])
        self.check(problem, lambda: model[0].weight.data.neg_())

    def test_scaling_by_two_which_only_counts_exponents_up(self) -> None:
        torch.manual_seed(0)
        model = nn.Linear(64, 64, bias=False).double()
        problem = Problem(model, lambda z, y: (z**4).mean(), [(torch.randn(2, 64).double(), torch.zeros(2))])
        H = hessian(problem)
        before = H @ np.ones(4096)
        model.weight.data.mul_(2.0)
        np.testing.assert_allclose(H @ np.ones(4096), 4 * before, rtol=1e-12)

    @pytest.mark.parametrize("buffer", ["running_mean", "running_var"])
    def test_writing_through_data_to_a_buffer(self, buffer: str) -> None:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, 3)).double().eval()
        data = [(torch.randn(6, 4).double(), torch.randn(6, 3).double())]
        self.check(Problem(model, nn.MSELoss(), data), lambda: getattr(model[1], buffer).data.add_(1.0))

    @pytest.mark.parametrize("entry", [-torch.inf, torch.nan])
    def test_a_mask_is_no_change_and_hides_none_of_the_parameters(self, problem: Problem, entry: float) -> None:
        problem.model.register_buffer("mask", torch.full((3, 3), entry))
        H = hessian(problem)
        H @ np.ones(43)
        H @ np.ones(43)
        assert H._engine.first_passes == 1
        self.check(problem, lambda: problem.model[0].weight.data.add_(1.0))

    def test_a_buffer_replaced_again_and_again_at_recycled_addresses(self) -> None:
        class Shifted(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.mlp = mlp(4, 300).double()
                self.register_buffer("shift", torch.zeros(300, dtype=torch.float64))

            def forward(self, X):
                return (self.mlp(X) + self.shift) ** 2

        torch.manual_seed(0)
        problem = Problem(Shifted(), nn.MSELoss(), [(torch.randn(2, 4).double(), torch.randn(2, 300).double())])
        H = hessian(problem)
        x = np.ones(H.shape[1])
        for _ in range(10):
            H @ x
            for _ in range(2):
                problem.model.shift = torch.randn(300, dtype=torch.float64)
            np.testing.assert_allclose(H @ x, hessian(problem) @ x, rtol=1e-12, atol=1e-12)

    def test_a_parameter_that_another_replaced_is_an_error(self, problem: Problem) -> None:
        H = hessian(problem)
        H @ np.ones(43)
        other = {name: torch.randn_like(value) for name, value in problem.model.state_dict().items()}
        problem.model.load_state_dict(other, assign=True)
        with pytest.raises(RuntimeError, match=r"params\['0.weight'\] was the model's own.*make a new operator"):
            H @ np.ones(43)

    def test_a_batch_added_and_a_batch_replaced(self, problem: Problem) -> None:
        X, y = problem.data[0]
        self.check(problem, lambda: problem.data.append((3 * X, y)))
        self.check(problem, lambda: problem.data.__setitem__(0, (2 * X, y)))

    def test_another_kind_of_layer(self, problem: Problem) -> None:
        H = hessian(problem)
        H @ np.ones(H.shape[1])
        problem.model[1] = nn.Sigmoid()
        expected = hessian(problem) @ np.ones(H.shape[1])
        for _ in range(2):
            np.testing.assert_allclose(H @ np.ones(H.shape[1]), expected, rtol=1e-12)

    def test_a_layer_moved_from_one_container_to_the_next(self) -> None:
        problem = moving_problem()
        H = hessian(problem)
        H @ np.ones(H.shape[1])
        problem.model.first.append(problem.model.second.pop(0))
        np.testing.assert_allclose(H @ np.ones(H.shape[1]), hessian(problem) @ np.ones(H.shape[1]), rtol=1e-12)

    def test_parameters_that_change_places_or_shape_are_an_error(self) -> None:
        problem = moving_problem()
        H = hessian(problem)
        one, other = problem.model.first[0], problem.model.head
        one.weight, other.weight = other.weight, one.weight
        with pytest.raises(RuntimeError, match="has been replaced"):
            H @ np.ones(H.shape[1])
        one.weight, other.weight = other.weight, one.weight
        H @ np.ones(H.shape[1])
        one.bias.data = one.bias.data[:1]
        with pytest.raises(RuntimeError, match=r"had shape \(4,\) and now has \(1,\)"):
            H @ np.ones(H.shape[1])

    def test_a_sparse_buffer(self) -> None:
        problem = moving_problem()
        problem.model.register_buffer("graph", torch.eye(3).to_sparse())
        H = hessian(problem)
        assert (H @ np.ones(H.shape[1])).any()

    @AUTOCAST
    def test_autocasts_dtype(self) -> None:
        problem = moving_problem()
        problem.model.float()
        problem.data = [(X.float(), y.float()) for X, y in problem.data]
        H = hessian(problem)
        x = np.ones(H.shape[1])
        for dtype in (torch.bfloat16, torch.float16):
            with torch.autocast("cpu", dtype):
                np.testing.assert_array_equal(H @ x, hessian(problem) @ x)

    def test_missing_values_in_batches_are_no_change(self) -> None:
        problem = moving_problem()
        problem.data = [(X + shift, y.clone().fill_(torch.nan)) for X, y in problem.data for shift in range(4)]
        problem.loss_function = lambda z, y: z.square().mean() + y.nan_to_num().mean()
        H = hessian(problem, cache=2.5 * batch_bytes(problem))
        x = np.ones(H.shape[1])
        np.testing.assert_allclose(H @ x, H @ x, rtol=1e-12)
        assert 0 < len(H._engine._first.kept) < 4

    @AUTOCAST
    def test_autocast(self, problem: Problem) -> None:
        problem.model.float()
        problem.data = [(X.float(), y) for X, y in problem.data]
        H = hessian(problem)
        with torch.autocast("cpu", torch.bfloat16):
            low = H @ np.ones(43)
        np.testing.assert_array_equal(H @ np.ones(43), hessian(problem) @ np.ones(43))
        assert np.abs(low - H @ np.ones(43)).max() > 1e-5

    def test_replacing_data(self, problem: Problem) -> None:
        vector = torch.randn(43, dtype=torch.float64)
        self.check(problem, lambda: nn.utils.vector_to_parameters(vector, problem.model.parameters()))

    def test_casting_the_model(self) -> None:
        problem = loss_problem("ce")
        problem.data = [(problem.model[0](X).float().detach(), y) for X, y in problem.data]
        model = problem.model[1:].float()
        H = HessianLinearOperator(
            lambda params, X: torch.func.functional_call(model, params, (X.to(dtype),)),
            problem.loss_function,
            dict(model.named_parameters()),
            problem.data,
        )
        dtype = torch.float32
        single = H @ np.eye(18)
        dtype = torch.float64
        model.double()
        double = H @ np.eye(18)
        assert 0 < np.abs(single - double).max() < 1e-6
        np.testing.assert_allclose(double, double.T, rtol=1e-13, atol=1e-15)

    def test_parameters_that_do_not_take_part(self, problem: Problem) -> None:
        problem.params = {"2.weight": problem.params["2.weight"]}
        self.check(problem, lambda: nn.init.ones_(problem.model[0].weight))

    def test_buffers_and_class_weights(self) -> None:
        problem = loss_problem("ce-weights")
        self.check(problem, lambda: problem.loss_function.weight.fill_(2.0)[0].fill_(0.1))

    def test_training_flags(self) -> None:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, 3)).double().eval()
        problem = Problem(model, nn.MSELoss(), [(torch.randn(8, 4).double(), torch.randn(8, 3).double())])
        self.check(problem, lambda: model.train())

    def test_data_that_is_kept(self, problem: Problem) -> None:
        self.check(problem, lambda: problem.data[0][0].mul_(3.0))


class TestTheModelIsLeftAsFound:
    def test_buffers_gradients_flags_and_random_numbers(self) -> None:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Dropout(0.5), nn.Linear(5, 3)).double().train()
        frozen = model[3].bias.requires_grad_(False)
        before = {name: value.clone() for name, value in model.state_dict().items()}
        data = DataLoader(
            TensorDataset(torch.randn(8, 4).double(), torch.randn(8, 3).double()), batch_size=4, shuffle=True
        )
        params = {name: value for name, value in model.named_parameters() if value.requires_grad}
        state = torch.get_rng_state()
        H = HessianLinearOperator(model, nn.MSELoss(), params, data, cache=0)
        with pytest.raises(NonDeterministicObjectiveError, match=r"'2' \(Dropout, p = 0.5\)"):
            H @ np.ones(H.shape[1])
        assert torch.equal(state, torch.get_rng_state())
        assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
        assert all(value.grad is None for value in model.parameters())
        assert model.training
        assert not frozen.requires_grad
        assert all(value.requires_grad for value in params.values())

    def test_an_embedding_that_renormalizes_its_weight(self) -> None:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Embedding(5, 3, max_norm=0.1), nn.Tanh(), nn.Linear(3, 2)).double()
        before = model[0].weight.detach().clone()
        problem = Problem(model, nn.MSELoss(), [(torch.arange(5), torch.randn(5, 2).double())])
        product = hessian(problem) @ np.ones(23)
        assert torch.equal(model[0].weight, before)
        model(problem.data[0][0])  # the forward pass renormalizes the weight in place
        np.testing.assert_allclose(hessian(problem) @ np.ones(23), product, rtol=1e-12)

    def test_an_embedding_that_renormalizes_its_weight_below_a_block(self) -> None:
        model = nn.Sequential(nn.Embedding(5, 3, max_norm=0.5), nn.Flatten(), nn.Linear(6, 2)).double()
        before = model[0].weight.detach().clone()
        data = [(torch.randint(0, 5, (7, 2)), torch.randn(7, 2, dtype=torch.float64))]
        H = HessianLinearOperator(model, nn.MSELoss(), {"2.bias": model[2].bias}, data)
        H @ np.ones(2)
        assert torch.equal(model[0].weight, before)

    def test_the_batch_is_not_changed(self) -> None:
        batch = {"X": torch.randn(2, 4).double()}
        model = mlp().double()
        data = [(batch, torch.randn(2, 3).double())]
        H = HessianLinearOperator(
            lambda params, X: torch.func.functional_call(model, params, (X.pop("X"),)),
            nn.MSELoss(),
            dict(model.named_parameters()),
            data,
            cache=0,
        )
        assert (H @ np.ones(43)).any()
        assert list(batch) == ["X"]
        assert (H @ np.ones(43)).any()


class TestRandomness:
    @seeded
    def loader(self, shuffle: bool = True) -> tuple[Problem, np.ndarray]:
        X, y = torch.randn(10, 4), torch.randn(10, 3)
        problem = Problem(mlp(), nn.MSELoss(), [(X, y)])
        expected = dense(problem)
        problem.data = DataLoader(TensorDataset(X, y), batch_size=4, shuffle=shuffle)
        return problem, expected

    @pytest.mark.parametrize("cache", [0, 10**9])
    def test_a_shuffling_loader_gives_the_same_matrix(self, cache: int) -> None:
        problem, expected = self.loader()
        H = hessian(problem, cache=cache)
        for _ in range(3):
            np.testing.assert_allclose(H @ np.eye(43), expected, rtol=1e-10, atol=1e-14)

    def test_where_only_some_batches_fit_a_shuffling_loader_is_linearized_whole_with_a_warning(self) -> None:
        problem, expected = self.loader()
        budget = 2 * batch_bytes(Problem(problem.model, problem.loss_function, [next(iter(problem.data))]))
        H = hessian(problem, cache=budget)
        np.testing.assert_allclose(H @ np.eye(43), expected, rtol=1e-10, atol=1e-14)
        with pytest.warns(RuntimeWarning, match="shuffle=False"):
            product = H @ np.eye(43)
        np.testing.assert_allclose(product, expected, rtol=1e-10, atol=1e-14)
        np.testing.assert_allclose(H @ np.eye(43), expected, rtol=1e-10, atol=1e-14)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    def test_batches_of_equal_losses_are_distinguished(self, dtype: torch.dtype) -> None:
        torch.manual_seed(0)
        model = mlp().to(dtype)
        nn.init.zeros_(model[2].weight)
        nn.init.zeros_(model[2].bias)
        X, y = torch.randn(40, 4, dtype=dtype), torch.randint(0, 3, (40,))
        whole = Problem(model, nn.CrossEntropyLoss(), [(X, y)])
        loader = DataLoader(TensorDataset(X, y), batch_size=10, shuffle=True)
        problem = Problem(model, nn.CrossEntropyLoss(), loader)
        budget = 3 * batch_bytes(Problem(model, nn.CrossEntropyLoss(), [next(iter(loader))]))
        H = hessian(problem, cache=budget)
        tolerance = {"rtol": 1e-4, "atol": 1e-6} if dtype == torch.float32 else {"rtol": 1e-10, "atol": 1e-14}
        np.testing.assert_allclose(H @ np.ones(43), dense(whole) @ np.ones(43), **tolerance)
        with pytest.warns(RuntimeWarning, match="shuffle=False"):
            product = H @ np.ones(43)
        np.testing.assert_allclose(product, dense(whole) @ np.ones(43), **tolerance)

    def test_dropout_in_training_mode_is_reported_at_the_first_product(self) -> None:
        problem = loss_problem("mse")
        problem.model.insert(2, nn.Dropout(0.5)).train()
        problem.params = dict(problem.model.named_parameters())
        with pytest.raises(NonDeterministicObjectiveError, match=r"dropout.*model.eval\(\)"):
            hessian(problem) @ np.ones(43)

    @pytest.mark.parametrize("cache", ["auto", 0])
    def test_it_is_reported_by_every_product_until_it_is_off(self, cache) -> None:
        problem = loss_problem("mse")
        problem.model.insert(2, nn.Dropout(0.5)).train()
        problem.params = dict(problem.model.named_parameters())
        H = hessian(problem, cache=cache)
        for _ in range(3):
            with pytest.raises(NonDeterministicObjectiveError, match=r"dropout.*model.eval\(\)"):
                H @ np.ones(43)
        problem.model.eval()
        expected = H @ np.ones(43)
        problem.model.train()
        with pytest.raises(NonDeterministicObjectiveError, match=r"dropout.*model.eval\(\)"):
            H @ np.ones(43)
        problem.model.eval()
        np.testing.assert_array_equal(H @ np.ones(43), expected)

    @pytest.mark.parametrize("cache", ["auto", 0])
    def test_randomness_that_no_module_shows(self, cache) -> None:
        """A function is random in the last of three batches of one shape; the first product finds it."""
        torch.manual_seed(0)
        model = mlp().double()

        def noisy(params, X):
            z = torch.func.functional_call(model, params, (X,))
            return nn.functional.dropout(z, 0.5) if X[0, 0] > 50 else z

        data = [(torch.randn(3, 4).double() + 100 * (k == 2), torch.randn(3, 3).double()) for k in range(3)]
        H = hessian(Problem(noisy, nn.MSELoss(), data, dict(model.named_parameters())), cache=cache)
        for _ in range(2):
            with pytest.raises(NonDeterministicObjectiveError, match="the loss of batch 2 was"):
                H @ np.ones(43)

    def test_random_numbers_without_effect_are_no_fault(self) -> None:
        problem = loss_problem("mse")
        model = problem.model

        def drawing(params, X):
            return torch.func.functional_call(model, params, (X + 0 * torch.rand(()),))

        H = hessian(Problem(drawing, problem.loss_function, problem.data, problem.params), cache=0)
        np.testing.assert_array_equal(H @ np.ones(43), hessian(problem, cache=0) @ np.ones(43))

    def test_one_batch_that_changes_from_pass_to_pass_is_named(self) -> None:
        """One batch's loss grows as another's falls, so the sum does not change."""
        problem, shifts = loss_problem("mse", "one"), [0.0] * 3
        problem.data = 2 * problem.data

        def loss(z, y):
            return nn.functional.mse_loss(z, y) + shifts.pop(0)

        H = hessian(Problem(problem.model, loss, problem.data, problem.params), cache=0)
        H @ np.ones(43)  # the third evaluation joins the two batches
        assert not shifts
        shifts += [0.1, -0.1]
        with pytest.raises(NonDeterministicObjectiveError, match="the loss of batch 0, times its weight, was"):
            H @ np.ones(43)


class TestNonFiniteProducts:
    def test_the_batch_and_the_parameter_are_named(self) -> None:
        problem = loss_problem("mse")
        problem.data[1][0][0, 0] = torch.nan
        H = hessian(problem)
        with pytest.raises(NonFiniteProductError, match=r"batch 1 in parameter '0.weight' \(the loss .* is nan"):
            H @ np.ones(43)

    def test_the_batch_is_named_though_the_loader_shuffles(self) -> None:
        X, y = torch.randn(10, 4).double(), torch.randn(10, 3).double()
        X[3, 0] = torch.inf
        problem = Problem(mlp().double(), nn.MSELoss(), DataLoader(TensorDataset(X, y), batch_size=2, shuffle=True))
        budget = 2 * batch_bytes(Problem(problem.model, problem.loss_function, [(X[:2], y[:2])]))
        for seed in range(5):
            torch.manual_seed(seed)
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "data yields different batches")
                with pytest.raises(NonFiniteProductError, match="batch"):
                    hessian(problem, cache=budget) @ np.ones(43)

    def test_a_vector_that_is_not_finite(self) -> None:
        H = hessian(loss_problem("mse"))
        with pytest.raises(NonFiniteProductError, match="vector to multiply"):
            H @ np.full(43, np.inf)
        assert np.isfinite(H @ np.ones(43)).all()

    @pytest.mark.parametrize("cache", [0, 20_000, "auto"])
    def test_a_batch_that_was_read_wrong_once_spoils_no_later_product(self, cache):
        problem = loss_problem("mse", "singles")

        class Loader:
            spoils = True

            def __iter__(self):
                for index, (X, y) in enumerate(problem.data):
                    yield (X * torch.nan if self.spoils and index == 2 else X), y

        loader = Loader()
        H = HessianLinearOperator(problem.model, problem.loss_function, problem.params, loader, cache=cache)
        with pytest.raises(NonFiniteProductError, match="batch 2"):
            H @ np.ones(H.shape[1])
        loader.spoils = False
        np.testing.assert_allclose(H @ np.eye(H.shape[1]), dense(problem), rtol=1e-12, atol=1e-15)

    def test_a_vector_that_is_not_finite_costs_nothing_that_was_kept(self):
        problem = counting_problem()
        H = hessian(problem)
        H @ np.ones(H.shape[1])
        runs = problem.model.runs
        with pytest.raises(NonFiniteProductError, match="vector to multiply"):
            H @ np.full(H.shape[1], np.nan)
        H @ np.ones(H.shape[1])
        assert problem.model.runs == runs


class TestFailuresLeaveTheOperatorUsable:
    @pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
    def test_an_exception_in_the_middle_of_the_first_pass(self, error: type[BaseException]) -> None:
        problem = loss_problem("mse")
        expected = dense(problem)
        fail = [True]

        def loss_function(prediction, y):
            if len(y) == 3 and fail[0]:
                raise error("stop")
            return nn.functional.mse_loss(prediction, y)

        H = HessianLinearOperator(problem.model, loss_function, problem.params, problem.data)
        state = torch.get_rng_state()
        with pytest.raises(error, match="stop"):
            H @ np.ones(43)
        assert torch.equal(state, torch.get_rng_state())
        fail[0] = False
        np.testing.assert_allclose(H @ np.eye(43), expected, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_products_inside_no_grad_and_inference_mode(mode) -> None:
    problem = loss_problem("ce")
    expected = dense(problem)
    H = hessian(problem)
    with mode():
        np.testing.assert_allclose(H @ np.eye(43), expected, rtol=1e-12, atol=1e-14)
        np.testing.assert_allclose(H @ torch.eye(43, dtype=torch.float64), expected, rtol=1e-12, atol=1e-14)
        X, y = (part.clone() for part in problem.data[0])  # inference tensors, in the second mode
    made_inside = HessianLinearOperator(problem.model, problem.loss_function, problem.params, [(X, y)])
    alone = HessianLinearOperator(problem.model, problem.loss_function, problem.params, problem.data[:1])
    np.testing.assert_allclose(made_inside @ np.ones(43), alone @ np.ones(43), rtol=1e-12, atol=1e-14)


def test_last_layer_blocks_never_run_the_layers_below_again() -> None:
    problem = counting_problem()
    block = hessian(problem).block(["model.2.weight", "model.2.bias"])
    block @ np.ones(18)
    runs = problem.model.runs
    (linearization, *_) = block._engine._first.kept.values()
    names = {node.name() for node in nodes(linearization.roots)}
    block @ np.ones(18)
    assert problem.model.runs == runs
    assert names
    assert not any("Tanh" in name for name in names)  # nothing below the last layer is in its graph
