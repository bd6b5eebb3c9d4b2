"""Recorded programs: the same products as the graph's, and no program for what cannot be recorded."""

from __future__ import annotations

import cProfile
import gc
import subprocess
import sys
import weakref

import numpy as np
import pytest
import torch
from architectures import ARCHITECTURES, architecture_problem
from cases import Problem, loss_problem, record_at_once
from hypothesis import given, reject, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from curvop import EFLinearOperator, GGNLinearOperator, HessianLinearOperator, JacobianLinearOperator
from curvop.kernels import recorded
from curvop.kernels.graph import LinearMap
from curvop.testing.functorch_reference import functorch_ggn, functorch_hessian

P = 43
STEPS = {
    "sum": lambda x, y: x + y,
    "twice": lambda x, y: x * 2,
    "zeros": lambda x, y: torch.zeros_like(x),
    "transposed": lambda x, y: x.t(),
    "same": lambda x, y: x.view(3, 3),
    "added to": lambda x, y: x.add_(y),
    "scaled": lambda x, y: x.mul_(3),
    "shifted": lambda x, y: x.add_(1),
    "filled": lambda x, y: (x, x[1:].copy_(y[:2].clone()))[0],
    "shifted rows": lambda x, y: torch.cat([y[:2].add_(1), x[:1]]),
}
COMPLEX = torch.complex(torch.ones(3), torch.ones(3))


@pytest.fixture
def runs(monkeypatch) -> dict[str, int]:
    """Count the runs of recorded programs, the graph's own products with several vectors, and programs given up."""
    counts = {"program": 0, "graph": 0, "gave up": 0}
    call, run = recorded._Program.__call__, recorded.RecordedProducts._run

    def counted_call(self, tensors):
        counts["program"] += 1
        return call(self, tensors)

    def counted_run(self, *arguments):
        products = run(self, *arguments)
        counts["graph"] += products is None
        counts["gave up"] += self._gave_up
        return products

    monkeypatch.setattr(recorded._Program, "__call__", counted_call)
    monkeypatch.setattr(recorded.RecordedProducts, "_run", counted_run)
    return counts


@pytest.fixture(autouse=True)
def at_once(monkeypatch) -> None:
    record_at_once(monkeypatch)


def built(cls, problem: Problem, **options):
    return cls(problem.model, problem.loss_function, problem.params, problem.data, **{"columns": 8, **options})


def assert_blocks(A, dense: np.ndarray, counts: tuple[int, ...] = (2, 3, 8)) -> None:
    """Multiply blocks of all counts and orders often enough that programs are recorded, verified and used."""
    for count in counts:
        for seed in range(4):
            X = np.random.default_rng(seed).standard_normal((dense.shape[1], count))
            scale = 1e-10 * np.linalg.norm(dense) * np.linalg.norm(X)
            for block in (X, np.asfortranarray(X), torch.from_numpy(X)):
                np.testing.assert_allclose(A @ block, dense @ X, rtol=0, atol=scale)


@pytest.mark.parametrize("loss", ["mse", "ce-everything", "bce-weights", "huber"])
@pytest.mark.parametrize(
    ("cls", "reference"), [(HessianLinearOperator, functorch_hessian), (GGNLinearOperator, functorch_ggn)]
)
def test_products_are_those_of_the_dense_matrix(cls, reference, loss, runs) -> None:
    problem = loss_problem(loss)
    dense = reference(problem.model, problem.loss_function, problem.params, problem.data).numpy()
    assert_blocks(built(cls, problem), dense)
    assert runs["program"] > 0
    assert not runs["gave up"]


@pytest.mark.default_cases("conv", "layer-norm", "attention-fused", "embedding", "gru")
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_architectures(name, runs) -> None:
    problem = architecture_problem(name)
    H = built(HessianLinearOperator, problem)
    X = np.random.default_rng(0).standard_normal((H.shape[1], 3))
    expected = np.stack([H @ x for x in X.T], 1)
    for _ in range(5):
        np.testing.assert_allclose(H @ X, expected, rtol=0, atol=1e-11 * np.linalg.norm(expected))
    # The memory layout of some tensors depends on the number of vectors, so torch cannot view them as recorded.
    assert (runs["program"] > 0) == (name not in ("group-norm-silu", "instance-norm"))


@pytest.mark.parametrize("cls", [EFLinearOperator, JacobianLinearOperator])
def test_rectangular_maps_and_other_weights(cls, runs) -> None:
    problem = loss_problem("ce", "one")
    arguments = (problem.model, problem.params, problem.data) if cls is JacobianLinearOperator else None
    A = cls(*arguments, columns=8) if arguments else built(cls, problem)
    dense = np.stack([A @ e for e in np.eye(A.shape[1])], 1)
    assert_blocks(A, dense)
    assert_blocks(A.T, dense.T)
    assert runs["program"] > 0


def test_a_block_takes_one_run_of_a_program_per_batch(runs) -> None:
    problem = loss_problem("ce")
    H, X = built(HessianLinearOperator, problem), np.eye(P)[:, :8]
    for _ in range(4):  # use the graph, record the product, record the program, verify the program
        H @ X
    runs.update(program=0, graph=0)
    H @ X
    assert runs == {"program": len(problem.data), "graph": 0, "gave up": 0}


@pytest.mark.parametrize("seconds_per_node", [1e-12, 1e6])
def test_nothing_is_recorded_before_products_have_taken_as_long_as_recording(
    runs, monkeypatch, seconds_per_node
) -> None:
    monkeypatch.setattr(recorded, "_SECONDS_PER_NODE", seconds_per_node)
    H = built(HessianLinearOperator, loss_problem("ce"), columns="auto")
    for _ in range(5):
        H @ np.eye(P)
    assert (runs["program"] > 0) == (seconds_per_node < 1)
    assert runs["graph"] > 0


def test_recording_does_not_import_the_compiler_of_torch() -> None:
    """The import takes longer than thousands of products of a small model."""
    code = """
import sys, torch
from curvop.kernels.recorded import _Program
_Program.record(lambda parts: [parts[0].sin() * parts[1]], [torch.ones(3), torch.ones(3)])
assert "torch._dynamo" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True)


class TestSingleVectors:
    """Programs for single vectors run the operations of the graph, and give the same digits."""

    @pytest.fixture(autouse=True)
    def single(self, monkeypatch) -> None:
        monkeypatch.setattr(recorded, "_PATIENCE", 0)
        monkeypatch.setattr(recorded, "_GAIN", np.inf)

    @pytest.mark.default_cases("conv-*", "layer-norm-*", "attention-fused-*", "embedding-*", "gru-*")
    @pytest.mark.parametrize("cls", [HessianLinearOperator, GGNLinearOperator])
    @pytest.mark.parametrize("name", ARCHITECTURES)
    def test_all_digits_are_equal(self, cls, name, runs, monkeypatch) -> None:
        problem = architecture_problem(name)
        A = built(cls, problem)
        X = np.random.default_rng(0).standard_normal((A.shape[1], 3))
        first = A @ X[:, 0]
        with_program = [first, *(A @ x for x in X.T[1:])]
        # The second derivative of group_norm unsqueezes a tensor in place, which cannot be recorded.
        assert (runs["program"] > 0) == ((name, cls) != ("group-norm-silu", HessianLinearOperator))
        monkeypatch.setattr(recorded, "_PATIENCE", np.inf)
        B = built(cls, problem)
        runs["program"] = 0
        assert all(np.array_equal(B @ x, product) for x, product in zip(X.T, with_program, strict=True))
        assert not runs["program"]

    def test_a_product_takes_one_run_of_a_program_per_batch(self, runs) -> None:
        problem = loss_problem("ce")
        H, x = built(HessianLinearOperator, problem), np.ones(P)
        H @ x  # linearizes, multiplies, records and verifies
        runs.update(program=0)
        H @ x
        assert runs["program"] == len(problem.data)

    def test_a_program_that_is_not_faster_is_not_used(self, runs, monkeypatch) -> None:
        monkeypatch.setattr(recorded, "_GAIN", 0.0)
        H, x = built(HessianLinearOperator, loss_problem("ce")), np.ones(P)
        H @ x
        verified = runs["program"]
        assert verified > 0
        for _ in range(3):
            H @ x
        assert runs["program"] == verified

    def test_nothing_is_recorded_before_many_products(self, runs, monkeypatch) -> None:
        monkeypatch.setattr(recorded, "_PATIENCE", 1e6)
        monkeypatch.setattr(recorded, "_SECONDS_PER_NODE", 1.0)
        H, x = built(HessianLinearOperator, loss_problem("ce")), np.ones(P)
        for _ in range(20):
            H @ x
        assert runs["program"] == 0

    def test_vectors_and_blocks_in_turns(self, runs) -> None:
        problem = loss_problem("ce")
        H = built(HessianLinearOperator, problem)
        dense = functorch_hessian(problem.model, problem.loss_function, problem.params, problem.data).numpy()
        for seed in range(6):
            X = np.random.default_rng(seed).standard_normal((P, 4))
            for block in (X[:, 0], X, np.asfortranarray(X), X[:, ::2], X[::-1, 1][::-1]):
                np.testing.assert_allclose(H @ block, dense @ block, rtol=0, atol=1e-11 * np.linalg.norm(dense))
        assert runs["program"] > 0
        assert not runs["gave up"]

    def test_another_memory_layout_uses_the_graph(self, runs) -> None:
        theta = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
        gradient = torch.autograd.grad((theta @ theta.T).sin().sum(), theta, create_graph=True)
        product, products = LinearMap(gradient, [theta]), recorded.RecordedProducts()
        x = torch.randn(4, 3, dtype=torch.float64)
        [expected] = product([x])
        for _ in range(3):
            assert torch.equal(products.one(product, product.roots, [x])[0], expected)
        runs["program"] = 0
        transposed = x.T.contiguous().T
        torch.testing.assert_close(products.one(product, product.roots, [transposed])[0], expected)
        assert runs["program"] == 0

    def test_a_constant_that_changes_raises_the_error_of_autograd(self, runs) -> None:
        theta = torch.ones(5, dtype=torch.float64, requires_grad=True)
        gradient = torch.autograd.grad(theta.pow(4).sum(), theta, create_graph=True)
        product, products, x = LinearMap(gradient, [theta]), recorded.RecordedProducts(), [torch.ones(5).double()]
        for _ in range(3):
            assert torch.equal(products.one(product, product.roots, x)[0], 12 * x[0])
        assert runs["program"] > 0
        with torch.no_grad():
            theta.mul_(2)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            products.one(product, product.roots, x)

    def test_a_backward_pass_of_the_user_runs_in_every_product(self, runs) -> None:
        theta, X = torch.randn(6, dtype=torch.float64), torch.randn(4, 6, dtype=torch.float64)
        data = [(X, torch.randn(4, dtype=torch.float64))]
        H = HessianLinearOperator(lambda p, X: Counted.apply(X @ p["t"]), nn.MSELoss(), {"t": theta}, data)
        for _ in range(4):
            before = Counted.calls
            H @ np.ones(6)
            assert Counted.calls > before
        assert runs["program"] == 0

    def test_parameters_that_change(self, runs) -> None:
        problem = loss_problem("mse")
        H = built(HessianLinearOperator, problem)
        for scale in (0.5, 2.0):
            with torch.no_grad():
                for param in problem.params.values():
                    param.mul_(scale)
            dense = functorch_hessian(problem.model, problem.loss_function, problem.params, problem.data).numpy()
            for x in np.eye(P)[:4]:
                np.testing.assert_allclose(H @ x, dense @ x, rtol=1e-10, atol=1e-12)
        assert runs["program"] > 0

    def test_a_hook_that_only_counts_runs_in_every_product(self, runs) -> None:
        calls = []
        theta = torch.ones(5, dtype=torch.float64, requires_grad=True)
        gradient = torch.autograd.grad(theta.pow(3).sum(), theta, create_graph=True)
        gradient[0].register_hook(lambda grad: calls.append(grad.shape))
        product, products, x = LinearMap(gradient, [theta]), recorded.RecordedProducts(), [torch.ones(5).double()]
        for _ in range(5):
            before = len(calls)
            products.one(product, product.roots, x)
            assert len(calls) > before
        assert runs["program"] == 0

    def test_nothing_is_recorded_while_a_profiler_is_active(self, runs) -> None:
        H = built(HessianLinearOperator, loss_problem("ce"))
        profiler = cProfile.Profile()
        profiler.enable()
        for _ in range(3):
            H @ np.ones(P)
        profiler.disable()
        assert runs["program"] == 0
        assert profiler.getstats()

    @pytest.mark.parametrize("draws", [False, True])
    def test_a_hook_of_the_user_runs_in_every_product(self, draws, runs) -> None:
        factor = [2.0]

        def scaled(grad: Tensor) -> Tensor:
            return grad * factor[0] * (torch.rand(5).double().ceil() if draws else 1)

        theta = torch.ones(5, dtype=torch.float64, requires_grad=True)
        gradient = torch.autograd.grad(theta.pow(3).sum(), theta, create_graph=True)
        gradient[0].register_hook(scaled)
        product, products, x = LinearMap(gradient, [theta]), recorded.RecordedProducts(), [torch.ones(5).double()]
        for _ in range(5):
            assert torch.equal(products.one(product, product.roots, x)[0], 6 * factor[0] * x[0])
            factor[0] += 1
        assert runs["program"] == 0

    def test_a_hook_of_the_user_runs_in_every_block(self, runs) -> None:
        factor = [2.0]
        theta = torch.ones(5, dtype=torch.float64, requires_grad=True)
        gradient = torch.autograd.grad(theta.pow(3).sum(), theta, create_graph=True)
        gradient[0].register_hook(lambda grad: grad * factor[0])
        product, products, X = LinearMap(gradient, [theta]), recorded.RecordedProducts(), [torch.eye(5).double()[:3]]
        for _ in range(5):
            assert torch.equal(products(product, product.roots, X)[0], 6 * factor[0] * X[0])
            factor[0] += 1
        assert runs["program"] == 0


class Counted(torch.autograd.Function):
    """The square of a tensor. The backward pass counts its calls."""

    calls = 0

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx, grad):
        Counted.calls += 1
        return 2 * ctx.saved_tensors[0] * grad


def test_a_backward_pass_of_the_user_runs_in_every_product(runs) -> None:
    """Its effects other than the tensors that it returns would be lost if its operations were recorded."""
    theta = torch.randn(6, dtype=torch.float64)
    data = [(torch.randn(4, 6, dtype=torch.float64), torch.randn(4, dtype=torch.float64))]
    H = HessianLinearOperator(lambda p, X: Counted.apply(X @ p["t"]), nn.MSELoss(), {"t": theta}, data, columns=4)
    for _ in range(4):
        before = Counted.calls
        H @ np.eye(6)[:, :4]
        assert Counted.calls > before
    assert runs["program"] == 0


def test_nothing_is_recorded_if_the_number_of_columns_is_given(runs, monkeypatch) -> None:
    """Block products are then bitwise reproducible, also if other products were computed before."""
    monkeypatch.undo()
    problem, X = loss_problem("ce"), np.random.default_rng(0).standard_normal((P, 8))
    H = HessianLinearOperator(problem.model, problem.loss_function, problem.params, problem.data, columns=8)
    first = H @ X
    for _ in range(30):
        assert np.array_equal(H @ X, first)
    assert all(linearization._recorded is None for linearization in H._engine._first.kept.values())


@pytest.mark.parametrize("fails", ["record", "batched"])
def test_too_little_memory_for_recording(runs, monkeypatch, fails) -> None:
    """The graph computes the products, and the operator neither shrinks its cache nor its chunks."""

    def out_of_memory(*arguments):
        raise MemoryError("injected")

    problem = loss_problem("ce")
    H = built(HessianLinearOperator, problem)
    X = np.eye(P)[:, :8]
    expected = H @ X
    monkeypatch.setattr(recorded._Program, fails, out_of_memory)
    for _ in range(4):
        np.testing.assert_allclose(H @ X, expected, rtol=1e-12, atol=1e-15)
    assert runs["gave up"]
    assert H._engine.kept()[1] == 1
    assert H._engine._columns._sizes == (8,)


def test_a_program_keeps_no_graph_of_its_operations(runs) -> None:
    """The nodes of a graph take a hundred times as much memory as the steps of a program."""

    def graphs() -> set[int]:
        gc.collect()
        return {id(thing) for thing in gc.get_objects() if type(thing) is torch.fx.Graph}

    before, H = graphs(), built(HessianLinearOperator, loss_problem("ce"))
    for _ in range(5):
        H @ np.eye(P)[:, :8]
    assert runs["program"] > 0
    assert graphs() <= before


def test_nothing_is_recorded_if_nothing_is_kept(runs) -> None:
    H = built(HessianLinearOperator, loss_problem("ce"), cache=0)
    for _ in range(5):
        H @ np.eye(P)
    assert runs == {"program": 0, "graph": 0, "gave up": 0}


def test_operations_that_torch_batches_wrongly_are_not_used(runs) -> None:
    """The rule of vmap for the derivative of cdist is wrong."""
    torch.manual_seed(0)
    points, X = torch.randn(4, 3, dtype=torch.float64), torch.randn(5, 3, dtype=torch.float64)
    params = {"points": points.clone().requires_grad_()}
    J = JacobianLinearOperator(lambda params, X: torch.cdist(params["points"], X), params, [(X, X)], columns=8)
    dense = torch.autograd.functional.jacobian(lambda points: torch.cdist(points, X), points).reshape(20, 12)
    assert_blocks(J.T, dense.T.numpy())
    assert runs["gave up"]
    assert not runs["program"]


def test_a_constant_that_changes_raises_the_error_of_autograd(runs) -> None:
    scale = torch.full((5,), 2.0, dtype=torch.float64)
    theta = torch.ones(5, dtype=torch.float64, requires_grad=True)
    gradient = torch.autograd.grad((theta.pow(4) * scale).sum(), theta, create_graph=True)
    product, products = LinearMap(gradient, [theta]), recorded.RecordedProducts()
    tangents = [torch.eye(5, dtype=torch.float64)[:3]]
    for _ in range(6):
        assert torch.equal(products(product, product.roots, tangents)[0], 24 * tangents[0])
    assert runs["program"] > 0
    with torch.no_grad():
        theta.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        products(product, product.roots, tangents)


def test_parameters_that_change_are_recorded_again(runs) -> None:
    problem = loss_problem("mse")
    H = built(HessianLinearOperator, problem)
    for _ in range(5):
        H @ np.eye(P)[:, :8]
    with torch.no_grad():
        for param in problem.params.values():
            param.mul_(0.5)
    runs.update(program=0)
    dense = functorch_hessian(problem.model, problem.loss_function, problem.params, problem.data).numpy()
    assert_blocks(H, dense)
    assert runs["program"] > 0


class TestRecorder:
    def record(self, function, *tensors: Tensor):
        return recorded._Program.record(lambda parts: function(*parts), tensors)

    def functions(self, program) -> list[object]:
        return [function for function, *_ in program._function._steps]

    def test_transpositions_cancel_and_views_of_constants_are_computed_once(self) -> None:
        constant, x = torch.randn(3, 4), torch.randn(2, 3)
        program, _ = self.record(lambda x: [x.t().t() @ constant.t().t(), None], x)
        assert self.functions(program) == [torch.mm]
        x = torch.randn(2, 3)
        result, nothing = program([x])
        assert nothing is None
        assert torch.equal(result, x @ constant)

    def test_results_that_are_not_read_are_not_computed(self) -> None:
        program, _ = self.record(lambda x: [(x.exp(), x.sin())[1]], torch.ones(3))
        assert self.functions(program) == [torch.ops.aten.sin.default]

    def test_sizes_without_entries(self) -> None:
        program, _ = self.record(lambda x: [x.view(1).view([]) * 2], torch.ones([]))
        assert torch.equal(program([torch.tensor(3.0)])[0], torch.tensor(6.0))

    def test_indices(self) -> None:
        index = torch.tensor([2, 0])
        program, _ = self.record(lambda x: [x[:, index]], torch.ones(2, 3))
        x = torch.randn(2, 3)
        assert torch.equal(program([x])[0], x[:, index])

    def test_comparisons_in_place_keep_their_dtype(self) -> None:
        def function(x):
            return [(x * 1).gt_(0).div_(3) * x]

        x = torch.randn(5, dtype=torch.float64)
        program, _ = self.record(function, torch.ones(5, dtype=torch.float64))
        assert torch.equal(program([x])[0], function(x)[0])

    def test_arguments_of_all_kinds(self) -> None:
        """No argument, one, several, a list of tensors, and keywords."""
        constant = torch.randn(3)

        def function(x):
            zeros = torch.zeros([])
            rows = torch.cat([x, constant, x.neg()]).view(3, 3)
            return [rows.sum(0, dtype=torch.float64) + zeros, torch.clamp(rows, max=0.5)]

        program, _ = self.record(function, torch.ones(3))
        for x in torch.randn(2, 3):
            for found, expected in zip(program([x]), function(x), strict=True):
                assert torch.equal(found, expected)

    def test_temporary_tensors_of_a_program_are_freed(self, monkeypatch) -> None:
        """At most two of ten temporary tensors exist at the same time."""
        alive, most = weakref.WeakSet(), []

        def watched(x, factor):
            alive.add(result := x * factor)
            most.append(len(alive))
            return result

        def function(x):
            for _ in range(10):
                x = x * 2
            return [x]

        monkeypatch.setitem(recorded._FUNCTIONS, torch.ops.aten.mul.Tensor, watched)
        program, _ = self.record(function, torch.ones(3))
        program([torch.ones(3)])
        assert most == [1] + [2] * 9

    def test_modified_temporary_tensors(self) -> None:
        def function(x):
            y = x * 2
            view = y.t()
            y.add_(1)
            return [view.mul_(3).t() + y]

        program, _ = self.record(function, torch.ones(2, 3))
        x = torch.randn(2, 3)
        assert torch.equal(program([x])[0], function(x)[0])

    def test_modified_tensors_without_views_are_replaced_by_new_tensors(self, capfd) -> None:
        """Torch cannot add a batch of tensors to a single tensor in place, and it has no rule for addcmul_."""
        constant = torch.randn(3)
        program, _ = self.record(lambda x: [torch.zeros(3).add_(x).addcmul_(x, constant).mul_(2)], torch.ones(3))
        X = torch.randn(5, 3)
        assert torch.equal(program.batched([X])[0], torch.addcmul(X, X, constant) * 2)
        assert not capfd.readouterr().err

    def test_zeros_are_not_added(self) -> None:
        constant = torch.ones(3, 3)
        program, _ = self.record(lambda x: [(x * 2 + torch.zeros_like(x)) + constant.new_zeros(3, 3).t()], constant)
        assert self.functions(program) == [torch.mul]
        into_zeros, _ = self.record(lambda x: [torch.zeros(3, 3).add_(x * 2).mul_(3)], constant)
        assert self.functions(into_zeros) == [torch.mul, torch.mul]

    def test_views_of_a_sum_with_zeros_are_not_views_of_other_rows(self) -> None:
        def function(x: Tensor) -> list[Tensor]:
            y = x * 2
            first_rows, last_rows = y[:2].view(6), y[1:] + torch.zeros(2, 3)
            return [first_rows, last_rows.view(6)]

        program, _ = self.record(function, torch.ones(3, 3))
        x = torch.arange(9.0).view(3, 3)
        assert all(map(torch.equal, program([x]), function(x)))

    def test_the_second_derivative_of_relu_is_not_added(self) -> None:
        model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
        H = HessianLinearOperator(model, nn.MSELoss(), model.parameters(), [(torch.randn(9, 3), torch.randn(9, 2))])
        for _ in range(4):
            H @ np.eye(26)[:, :8]
        (kept,) = H._engine._first.kept.values()
        names = {str(function) for function in self.functions(next(iter(kept._recorded._programs.values())))}
        assert any("threshold" in name for name in names)
        assert not any("zeros" in name for name in names)

    @settings(max_examples=300, deadline=None)
    @given(
        st.lists(
            st.tuples(st.sampled_from(sorted(STEPS)), st.integers(0, 9), st.integers(0, 9)), min_size=3, max_size=14
        )
    )
    def test_random_programs(self, steps: list[tuple[str, int, int]]) -> None:
        """Sums with zeros, views and modified tensors: a program is right, or it cannot be recorded."""

        def function(x: Tensor) -> list[Tensor]:
            made = [x * 2, torch.zeros_like(x)]
            for step, first, second in steps:
                made.append(STEPS[step](made[first % len(made)], made[second % len(made)]))
            return made

        x = torch.arange(1.0, 10.0).view(3, 3)
        try:
            expected = function(x)
        except RuntimeError:  # the tensors overlap
            reject()
        try:
            program, _ = self.record(function, torch.ones(3, 3))
        except recorded._NotRecordableError:
            return
        assert all(map(torch.equal, program([x]), expected))
        try:
            batched = program.batched([torch.stack([x, x.t() - 3])])
        except RuntimeError:  # torch cannot add several tensors to a single one in place
            return
        for rows, *both in zip(batched, expected, function(x.t() - 3), strict=True):
            assert torch.equal(rows, torch.stack(both))

    @pytest.mark.parametrize(
        "function",
        [
            lambda x: [x.add_(1)],
            lambda x: [x.split(1)[0].add_(1)],
            lambda x: [x + torch.rand(3)],
            lambda x: [x * float(x.sum())],
            lambda x: [x[x > 0]],
            lambda x: [(x * 2).view(1, 3).t_()],
            lambda x: [x * COMPLEX],
        ],
        ids=["argument", "view of an argument", "random", "value", "mask", "layout", "complex"],
    )
    def test_what_cannot_be_recorded(self, function) -> None:
        with pytest.raises(recorded._NotRecordableError):
            self.record(function, torch.ones(3))

    def test_temporary_tensors_are_freed(self) -> None:
        freed: list[int] = []

        def function(x):
            for number in range(10):
                x = x * 2
                weakref.finalize(x, freed.append, number)
                assert len(freed) == number
            return [x]

        self.record(function, torch.ones(3))
