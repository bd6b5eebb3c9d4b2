"""Several processes: the operator is that of all data, and the run ends in bounded time if a process fails."""

from __future__ import annotations

import itertools
import os
import re
import signal
import subprocess
import sys
import threading
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from distributed_runs import (
    CASES,
    KINDS,
    TIMEOUT,
    Ranks,
    batch_norm,
    free_port,
    operator,
    parts,
    pipeline,
    results,
    vectors,
)
from scipy.sparse.linalg import LinearOperator, cg, eigsh
from torch import nn

from curvop import GGNLinearOperator, HessianLinearOperator, NonDeterministicObjectiveError, NonFiniteProductError
from curvop.distributed import RankError, serve
from curvop.distributed.partial_sums import PartialSum
from curvop.distributed.rank_group import Heartbeat, RankGroup
from curvop.distributed.serving import RemoteOperator, ServedOperator, compare
from curvop.examples.functorch import functorch_empirical_fisher, functorch_ggn, functorch_hessian
from curvop.preconditioner import jacobi, nystrom
from curvop.spectrum import density
from curvop.storage.fingerprint import differing, fingerprint

DENSE = {"hessian": functorch_hessian, "ggn": functorch_ggn, "ef": functorch_empirical_fisher, "fisher": functorch_ggn}
# Seconds after the kill until the other ranks raise, and until all processes have ended. A rank without a heartbeat for
# `TIMEOUT` seconds counts as dead; a busy machine notices later, and torch takes some seconds to shut down.
SOON, OVER = 2.5 * TIMEOUT, 3 * TIMEOUT


def close(actual: Any, expected: Any, eps: float = 1e-12) -> None:
    actual, expected = np.asarray(actual), np.asarray(expected)
    assert actual.dtype == expected.dtype
    assert actual.shape == expected.shape
    np.testing.assert_allclose(actual, expected, rtol=0, atol=eps * max(np.abs(expected).max(), 1e-300))


@pytest.fixture(scope="module", params=[2, 3, 4])
def matrices(request, tmp_path_factory) -> dict[str, Any]:
    return Ranks("matrices", request.param, tmp_path_factory.mktemp("matrices")).check()[0]


@pytest.mark.default_cases("2-*")
@pytest.mark.parametrize("case", CASES)
def test_it_is_the_matrix_of_all_data(matrices, case: str) -> None:
    found, expected = matrices[case], results(operator(case))
    assert found.keys() == expected.keys()
    assert found.pop("no diagonal", None) == expected.pop("no diagonal", None)
    for name in expected:
        single = name == "float32" or case == "float32"
        close(found[name], expected[name], 1e-5 if single else 1e-12)


@pytest.mark.slow_cases("3-*", "4-*")
@pytest.mark.parametrize("case", [name for name, (_, _, kind, _) in CASES.items() if kind in DENSE])
def test_it_is_the_dense_matrix(matrices, case: str) -> None:
    build, arguments, kind, _ = CASES[case]
    problem = build(*arguments)
    dense = DENSE[kind](problem.model, problem.loss_function, problem.params, problem.data).double().numpy()
    X = vectors(len(dense))
    np.testing.assert_allclose(matrices[case]["columns"], dense @ X, rtol=0, atol=1e-5 if case == "float32" else 1e-10)


class TestSolvers:
    @pytest.fixture(scope="class")
    @classmethod
    def found(cls, tmp_path_factory) -> dict[str, Any]:
        return Ranks("solvers", 3, tmp_path_factory.mktemp("solvers")).check()[0]

    def test_eigsh(self, found) -> None:
        H = operator("mse")
        np.testing.assert_allclose(found["eigenvalues"], eigsh(H, k=3, return_eigenvectors=False), rtol=1e-9)

    def test_cg(self, found) -> None:
        G = operator("classes")
        b = vectors(G.shape[0])[:, 0]
        np.testing.assert_allclose(found["solution"], cg(G.damped(0.1), b, rtol=1e-12)[0], rtol=1e-8)

    def test_preconditioners_have_the_exact_diagonal(self, found) -> None:
        G = operator("classes")
        close(found["jacobi"], jacobi(G, 0.1) @ vectors(G.shape[0])[:, 0])

    def test_densities(self, found) -> None:
        expected = density(operator("classes"), num_probes=2, num_steps=8, rng=0, progress=False).trace().value
        assert found["trace"] == pytest.approx(expected, rel=1e-9)

    def test_a_journal_answers_in_the_next_run(self, found) -> None:
        (first, made, answered), (again, made_again, answered_again) = found["journal"]
        assert (made, answered, made_again, answered_again) == (1, 0, 0, 1)
        assert (first == again).all()

    def test_the_fingerprint_has_the_data_of_every_rank(self, found) -> None:
        combined, plain = found["fingerprint"], fingerprint(operator("classes"))
        data = [f"data, rank {rank}, batch {index}" for rank, count in enumerate((1, 3, 5)) for index in range(count)]
        assert [combined[name] for name in data] == [plain[f"data, batch {index}"] for index in range(9)]
        assert {name: value for name, value in combined.items() if not name.startswith("data, ")} == {
            name: value for name, value in plain.items() if not name.startswith("data, ")
        }


class TestCheck:
    @pytest.fixture(scope="class")
    @classmethod
    def found(cls, tmp_path_factory) -> dict[str, Any]:
        return Ranks("checks", 2, tmp_path_factory.mktemp("checks")).check()[0]

    @pytest.mark.parametrize("wrapped", ["", ", damped", ", block"])
    @pytest.mark.parametrize(("case", "dtype"), [("float32", np.float32), ("mse", np.float64)])
    def test_the_limits_follow_the_precision_of_the_model(self, found, case: str, dtype: type, wrapped: str) -> None:
        report = found[case + wrapped]
        assert report.verdict.startswith("sound"), report
        assert report["linearity"].limit == pytest.approx(float(np.finfo(dtype).eps) ** (2 / 3))
        assert f"{np.finfo(dtype).eps:.1e}" in report["precision"].text
        assert "each rank's own operator" in report["model"].text

    @pytest.mark.parametrize("case", ["float32", "mse"])
    def test_a_wrong_product_is_found(self, found, case: str) -> None:
        report = found[f"{case}, wrong"]
        assert report.verdict == "not to be trusted: linearity, noise floor, symmetry", report

    def test_the_cost_is_that_of_each_rank(self, found) -> None:
        assert found["cost"]["kind"] == "NotImplementedError"
        assert (
            "call cost() of the operator that each rank passes to serve, before the block" in found["cost"]["message"]
        )


def test_a_journal_has_the_settings_of_every_rank(tmp_path) -> None:
    found = Ranks("seeds", 2, tmp_path).check()[0]
    assert differing(found["first, fingerprint"], found["same, fingerprint"]) == []
    assert differing(found["first, fingerprint"], found["other, fingerprint"]) == ["rank 1, seed"]
    close(found["same, from the journal"], found["first"])
    assert np.linalg.norm(found["other"] - found["first"]) > 1e-2 * np.linalg.norm(found["first"])
    error = found["other, journal"]
    assert error["kind"] == "OtherProblemError"
    assert "rank 1, seed" in error["message"]


def test_all_ranks_follow_changes_of_rank_0s_model(tmp_path) -> None:
    found = Ranks("newton", 2, tmp_path).check()
    A, problem = batch_norm(0, 1)
    losses = []
    for _ in range(3):
        gradient, loss = A.gradient_and_loss()
        step = A.unravel(cg(A.damped(1.0), gradient, rtol=1e-12)[0])
        with torch.no_grad():
            for name, value in problem.params.items():
                value -= step[name]
            problem.model[1].running_mean += 0.1
        losses.append(loss)
    problem.model[0].weight.data.mul_(1.5)
    np.testing.assert_allclose(found[0]["losses"], losses, rtol=1e-10)
    np.testing.assert_allclose(found[0]["product"], A @ np.ones(A.shape[0]), rtol=1e-8, atol=1e-10)
    np.testing.assert_allclose(found[0]["block"], A.block("0.weight") @ np.ones(20), rtol=1e-8, atol=1e-10)
    for name in ("parameters", "mean"):
        assert (found[0][name] == found[1][name]).all()


@pytest.mark.parametrize("size", [1, 2])
def test_models_on_several_devices(tmp_path, size: int) -> None:
    found = Ranks("two_devices", size, tmp_path).check()[0]
    problem = pipeline()
    for kind, build in KINDS.items():
        A = build(problem.model, problem.loss_function, problem.params, problem.data)
        x = A @ vectors(A.shape[0])[:, 0]
        for cache in (0, "auto"):
            parts = found[f"{kind}, {cache}"]
            close(parts["columns"], A @ vectors(A.shape[0]))
            close(parts["again"], x)
            close(parts["written"], x)
            close(parts["block"], A.block("second.weight", "first.bias") @ np.ones(5))
            close(parts["gradient"], A.gradient_and_loss()[0])
    H = HessianLinearOperator(problem.model, problem.loss_function, problem.params, problem.data)
    close(found["compiled"], H @ np.ones(H.shape[0]))
    assert [text for text in found["warnings"] if "several devices" in text] == [
        "engine='compiled' falls back to 'autograd': parameters are on several devices"
    ]


def test_parameters_are_whole_on_each_rank(tmp_path) -> None:
    for found in Ranks("sharded_parameters", 2, tmp_path).check():
        assert {found[name]["kind"] for name in ("sharded", "sharded beside", "wrapped")} == {"TypeError"}
        assert "model's parameter '0.0.weight' is a DTensor" in found["sharded beside"]["message"]
        assert "params['0.weight'] is a DTensor" in found["sharded"]["message"]
        assert "curvop.distributed.serve" in found["sharded"]["message"]
        assert "pass model.module" in found["wrapped"]["message"]


class TestReplies:
    """What rank 0 makes of the replies of other ranks, without any other process."""

    @pytest.fixture
    def remote(self) -> RemoteOperator:
        A, _ = parts(0, 1)
        group = RankGroup(TIMEOUT, TIMEOUT)
        return RemoteOperator(ServedOperator(group, 0, PartialSum(A), itertools.count(1), []))

    def test_replies_without_an_error_are_returned(self, remote) -> None:
        assert remote.check([{"a": 1}, {"a": 2}]) == [{"a": 1}, {"a": 2}]

    @pytest.mark.parametrize("kind", [NonFiniteProductError, NonDeterministicObjectiveError, NotImplementedError])
    def test_errors_of_products_keep_their_kind(self, remote, kind: type[Exception]) -> None:
        with pytest.raises(kind, match=r"^rank 2: it is so$"):
            remote.check([{}, {"error": (kind.__name__, "it is so", "trace")}])

    def test_other_errors_name_the_rank(self, remote) -> None:
        with pytest.raises(RankError, match=r"^rank 1 raised KeyError: 'x'\n\ntrace$") as raised:
            remote.check([{"error": ("KeyError", "'x'", "trace")}])
        assert raised.value.rank == 1

    def test_operators_that_differ(self) -> None:
        ours = {"params['0.weight']": "1", "seed": "5"}
        compare([[ours], [ours | {"seed": "6"}]])
        with pytest.raises(ValueError, match=r"rank 1 differs from that of rank 0 in params\['0.weight'\]"):
            compare([[ours], [ours | {"params['0.weight']": "2", "seed": "6"}]])
        with pytest.raises(ValueError, match="rank 0 serves 1 operators, but rank 1 serves 2"):
            compare([[ours], [ours, ours]])

    def test_ranks_that_would_draw_the_same(self) -> None:
        with pytest.raises(ValueError, match="rng"):
            compare([[{"seed": "5"}], [{"seed": "5"}]])

    def test_ranks_without_a_heartbeat(self) -> None:
        store = dist.HashStore()
        other = Heartbeat(store, 1, timeout=0.5)
        here = Heartbeat(store, 0, timeout=0.5)
        try:
            here.watch([1])
            time.sleep(1.5)
            here.check()
            other.stop()
            time.sleep(1.5)
            here.check(patience=60)
            with pytest.raises(RankError, match=r"^rank 1 has sent no heartbeat for") as raised:
                here.check()
            assert raised.value.rank == 1
        finally:
            other.stop()
            here.stop()


@pytest.mark.slow
class TestErrors:
    """If all ranks are alive, rank 0 can continue after an error."""

    @pytest.fixture(scope="class")
    @classmethod
    def found(cls, tmp_path_factory) -> list[dict[str, Any]]:
        return Ranks("survivors", 2, tmp_path_factory.mktemp("survivors")).check()

    @pytest.fixture(scope="class")
    @classmethod
    def product(cls) -> np.ndarray:
        A, _ = parts(0, 1)
        return A @ vectors(A.shape[0])[:, 0]

    @pytest.mark.parametrize("name", ["the loader of rank 1", "and again"])
    def test_a_loader_that_raises(self, found, name: str) -> None:
        error = found[0][name]
        assert (error["kind"], error["rank"]) == ("RankError", 1)
        assert error["message"].startswith("rank 1 raised FileNotFoundError: no such shard\n")
        assert "distributed_runs.py" in error["message"]  # from the traceback
        assert error["seconds"] < TIMEOUT

    def test_vectors_that_are_not_finite(self, found, product) -> None:
        assert found[0]["the vector"]["kind"] == "NonFiniteProductError"
        close(found[0]["after the vector"], product)

    def test_data_that_is_not_finite(self, found) -> None:
        error = found[0]["infinite data"]
        assert error["kind"] == "NonFiniteProductError"
        assert error["message"].startswith("rank 1: the product is not finite at batch 0 in parameter '0.weight'")

    def test_ctrl_c_on_rank_0(self, found, product) -> None:
        assert found[0]["Ctrl-C in a product"]["kind"] == "KeyboardInterrupt"
        close(found[0]["after Ctrl-C"], product)

    def test_ctrl_c_while_the_others_compute(self, found, product) -> None:
        assert found[0]["Ctrl-C while rank 1 computes"]["kind"] == "KeyboardInterrupt"
        assert found[0]["Ctrl-C while rank 1 computes"]["seconds"] < 1
        close(found[0]["after waiting"], product)

    def test_a_product_may_take_longer_than_the_timeout(self, found, product) -> None:
        close(found[0]["a slow rank"], product)

    def test_no_serving_within_serving(self, found, product) -> None:
        assert "serve(A, B)" in found[0]["nested"]["message"]
        close(found[0]["after nested"], product)

    def test_wrong_arguments_raise_the_errors_of_one_process(self, found) -> None:
        assert "did you mean '0.weight'" in found[0]["no such parameter"]["message"]
        assert "x has shape (42,), but A has shape (43, 43)" in found[0]["shape"]["message"]

    def test_afterwards_it_cannot_be_used(self, found) -> None:
        error = found[0]["the block has ended"]
        assert error["kind"] == "RuntimeError"
        assert "the block of curvop.distributed.serve has ended" in error["message"]

    def test_an_error_in_rank_0s_block_ends_the_others(self, found) -> None:
        assert found[0]["rank 0 raises"]["kind"] == "ZeroDivisionError"
        error = found[1]["rank 0 raises"]
        assert (error["kind"], error["rank"]) == ("RankError", 0)
        assert error["message"] == "rank 0 left the serve block with ZeroDivisionError: in the block"

    def test_other_parameters(self, found) -> None:
        assert found[0]["other parameters"]["kind"] == "ValueError"
        message = found[0]["other parameters"]["message"]
        assert "the operator of rank 1 differs from that of rank 0 in params['0.weight']" in message
        assert found[1]["other parameters"]["rank"] == 0

    def test_other_operators(self, found) -> None:
        assert "of rank 1 differs from that of rank 0 in dtype" in found[0]["other operators"]["message"]

    def test_other_kinds_of_operators(self, found) -> None:
        assert found[1]["no operator"]["kind"] == "TypeError"
        assert found[0]["no operator"]["rank"] == 1
        assert (
            "apply damping, submatrices and journals to the operator that serve returns"
            in found[0]["no operator"]["message"]
        )

    def test_draws_differ_between_ranks(self, found) -> None:
        assert "rng=seed + rank" in found[0]["equal seeds"]["message"]
        assert found[0]["seeds"] is None

    def test_no_data_anywhere(self, found) -> None:
        assert "data is empty on every rank" in found[0]["no data"]["message"]

    def test_training_mode_on_one_rank_warns(self, found) -> None:
        assert len(found[0]["training mode"]) == 1
        assert "model of rank 1" in found[0]["training mode"][0]
        assert found[1]["training mode"] == []


class TestOtherTensors:
    """The models or losses of the ranks hold different tensors, so the matrices differ."""

    @pytest.fixture(scope="class")
    @classmethod
    def found(cls, tmp_path_factory) -> list[dict[str, Any]]:
        return Ranks("other_tensors", 2, tmp_path_factory.mktemp("other_tensors")).check()

    @pytest.mark.parametrize(
        ("loss", "named"),
        [
            ("module", "loss_function['weight']"),
            ("partial", "loss_function['weight']"),
            ("function", "loss_function['weight']"),
            ("object", "loss_function['weights'][0]"),
        ],
    )
    def test_of_the_loss(self, found, loss: str, named: str) -> None:
        error = found[0][f"{loss}, False"]
        assert error["kind"] == "ValueError"
        assert error["message"].startswith(f"the operator of rank 1 differs from that of rank 0 in {named}. Give all")
        assert (found[1][f"{loss}, False"]["kind"], found[1][f"{loss}, False"]["rank"]) == ("RankError", 0)
        assert [rank[f"{loss}, True"] for rank in found] == [None, None]

    def test_of_a_model_that_is_a_function(self, found) -> None:
        assert "differs from that of rank 0 in model['factor']." in found[0]["model"]["message"]


class TestNewTensors:
    """Tensors of the model are replaced by others."""

    @pytest.fixture(scope="class")
    @classmethod
    def found(cls, tmp_path_factory) -> list[dict[str, Any]]:
        return Ranks("new_tensors", 2, tmp_path_factory.mktemp("new_tensors")).check()

    @pytest.mark.parametrize("which", [0, 1])
    def test_before_the_block(self, found, which: int) -> None:
        own, other = (found[rank][f"assigned on rank {which}"] for rank in (which, 1 - which))
        assert own["kind"] == "RuntimeError"
        assert "params['0.weight'] was the model's own parameter" in own["message"]
        assert (other["kind"], other["rank"]) == ("RankError", which)
        assert own["message"] in other["message"]

    def test_a_model_that_is_cast_within_the_block_ends_it(self, found) -> None:
        message = "a tensor of rank 0's model is now float32 [5, 4], but float64 [5, 4] on rank 1"
        for error in (found[0]["cast"], found[1]["serve"]):
            assert (error["kind"], error["rank"]) == ("RankError", 0)
            assert error["message"].startswith(message)
        assert found[0]["afterwards"]["kind"] == "RuntimeError"
        assert message in found[0]["afterwards"]["message"]

    def test_to_exit_is_a_normal_end(self, found) -> None:
        assert found[0]["exit"]["kind"] == "SystemExit"
        assert found[1]["exit"] is None
        assert found[1]["exit with an error"]["message"] == "rank 0 left the serve block with SystemExit: 3"


@pytest.mark.slow
class TestDeath:
    """If a process dies, the run ends soon, with an error that names the rank."""

    @pytest.fixture
    def run(self, tmp_path) -> Any:
        """Run ranks, one of which is killed; check that the expected errors and the end of the run follow soon."""

        def run(name: str, size: int, errors: dict[int, str], dead: int, **options: Any) -> Ranks:
            ranks = Ranks(name, size, tmp_path, **options)
            assert ranks.hung == ([options["stays"]] if "stays" in options else [])
            killed = float((tmp_path / "killed").read_text())
            for rank, where in errors.items():
                error = ranks.found[rank][where]
                assert (error["kind"], error["rank"]) == ("RankError", dead)
                assert 0 < error["at"] - killed < SOON
            assert ranks.ended - killed < OVER
            return ranks

        return run

    def test_a_worker_is_killed_in_eigsh(self, run) -> None:
        ranks = run("killed_worker", 3, {0: "eigsh", 1: "serve"}, dead=2)
        assert ranks.exits == [0, 0, -signal.SIGKILL]
        for error in (ranks.found[0]["eigsh"], ranks.found[1]["serve"]):
            assert "rank 2 has sent no heartbeat" in error["message"]
        assert ranks.found[0]["afterwards"]["kind"] == "RuntimeError"
        assert "rank 2 has sent no heartbeat" in ranks.found[0]["afterwards"]["message"]

    def test_a_worker_is_killed_between_products(self, run) -> None:
        run("idle_kill", 2, {0: "product"}, dead=1)

    def test_a_worker_is_killed_after_the_last_product(self, run) -> None:
        """Rank 0 waits for another rank that still computes."""
        ranks = run("killed_at_the_end", 3, {}, dead=1)
        assert ranks.exits == [0, -signal.SIGKILL, 0]
        here, _, there = ranks.found
        assert here["interrupted"]["kind"] == "KeyboardInterrupt"
        assert [found[name] for found in (here, there) for name in ("serve", "serve again")] == [None] * 4
        [(kind, file, message)] = here["warnings"]
        assert (kind, file) == ("RuntimeWarning", "distributed_runs.py")
        assert message.startswith("rank 1 has sent no heartbeat")
        assert message.endswith("at the end of the block; all products before it are correct")
        A, _ = parts(0, 1)
        close(here["product"], A @ np.ones(A.shape[0]))

    def test_a_worker_is_stopped(self, run) -> None:
        run("stopped_worker", 3, {0: "eigsh", 2: "serve"}, dead=1, stays=1)

    @pytest.mark.parametrize("launcher_has_the_store", [False, True])
    def test_rank_0_is_killed(self, run, launcher_has_the_store: bool) -> None:
        ranks = run("killed_rank_0", 3, {1: "serve", 2: "serve"}, dead=0, launcher_has_the_store=launcher_has_the_store)
        assert ranks.exits == [-signal.SIGKILL, 0, 0]

    def test_rank_0_is_stopped_and_does_not_hold_the_store(self, run) -> None:
        run("stopped_rank_0", 2, {1: "serve"}, dead=0, stays=0, launcher_has_the_store=True)

    @pytest.mark.parametrize("launcher_has_the_store", [False, True])
    def test_ctrl_c_ends_rank_0_while_another_computes(self, tmp_path, launcher_has_the_store: bool) -> None:
        ranks = Ranks("left", 2, tmp_path, launcher_has_the_store=launcher_has_the_store)
        assert (ranks.hung, ranks.exits) == ([], [0, 0])
        here, there = (found["serve"] for found in ranks.found)
        assert here["kind"] == "KeyboardInterrupt"
        assert here["seconds"] < 12
        assert (there["kind"], there["rank"]) == ("RankError", 0)
        assert there["message"] == "rank 0 left the serve block with KeyboardInterrupt"
        assert there["seconds"] > 14

    def test_rank_0_goes_on_after_ctrl_c_and_waits_for_another_that_computes(self, tmp_path) -> None:
        here, there = Ranks("stayed", 2, tmp_path).check()
        for name in ("patient, product", "impatient, product", "impatient"):
            assert here[name]["kind"] == "KeyboardInterrupt"
            assert here[name]["seconds"] < TIMEOUT
        assert (here["patient"], there["patient"]) == (None, None)
        for found in (here, there):
            for name in ("patient", "impatient"):
                assert "curvop heartbeat" not in found[f"{name}, threads"]

    def test_ctrl_c_on_a_worker(self, tmp_path) -> None:
        ranks = Ranks("ctrl_c_on_a_worker", 2, tmp_path)
        assert ranks.hung == []
        assert ranks.found[0]["serve"]["rank"] == 1
        assert "KeyboardInterrupt" in ranks.found[0]["serve"]["message"]
        assert ranks.found[1]["serve"]["kind"] == "KeyboardInterrupt"

    def test_a_rank_never_comes(self, tmp_path) -> None:
        ranks = Ranks("late", 2, tmp_path)
        assert ranks.hung == []
        error = ranks.found[0]["serve"]
        assert (error["kind"], error["rank"]) == ("RankError", 1)
        assert "did not reach" in error["message"]


@pytest.mark.slow
def test_a_preconditioner_does_not_block_heartbeats() -> None:
    """A thread sends heartbeats, so no linear algebra routine may hold the interpreter lock for long."""
    size, scales = 200_000, 1 / np.arange(1.0, 200_001)
    A = LinearOperator((size, size), matvec=None, matmat=lambda X: scales[:, None] * X, dtype=np.float64)
    beats, ended = [time.monotonic()], threading.Event()

    def beat() -> None:
        while not ended.wait(0.01):
            beats.append(time.monotonic())

    thread = threading.Thread(target=beat)
    thread.start()
    try:
        nystrom(A, 60, 1e-3, rng=0)
    finally:
        ended.set()
        thread.join()
    beats.append(time.monotonic())
    assert np.diff(beats).max() < (beats[-1] - beats[0]) / 4


class TestOneProcess:
    @pytest.mark.parametrize("case", ["ignored", "covariance", "batch_weight"])
    def test_it_is_the_operator_itself(self, case: str) -> None:
        A = operator(case)
        with serve(A) as W:
            found = results(W)
            assert fingerprint(W).keys() == {name.replace("data, ", "data, rank 0, ") for name in fingerprint(A)}
        for name, expected in results(A).items():
            if name == "no diagonal":
                assert found[name] == expected
            else:
                close(found[name], expected, 1e-6 if name == "float32" else 1e-12)
        assert "curvop heartbeat" not in [thread.name for thread in threading.enumerate()]

    def test_afterwards_it_cannot_be_used(self) -> None:
        with serve(operator("mse")) as W:
            pass
        for use in (
            lambda: W @ np.ones(W.shape[0]),
            W.gradient_and_loss,
            W.fingerprint,
            lambda: W.block("0.bias") @ np.ones(5),
        ):
            with pytest.raises(RuntimeError, match="has ended"):
                use()

    def test_the_part_itself_keeps_its_meaning(self) -> None:
        A, empty = operator("mse"), operator("mse", 1, 2)
        before = A @ np.ones(A.shape[0])
        with serve(A) as W:
            W @ np.ones(A.shape[0])
            close(A @ np.ones(A.shape[0]), before)
        problem = operator("nothing on rank 0", 0, 2)
        with pytest.raises(ValueError, match="data is empty"):
            problem @ np.ones(problem.shape[0])
        assert empty.shape == A.shape

    @pytest.mark.parametrize("training", [True, False])
    def test_batch_statistics_warn_even_if_every_rank_has_one_batch(self, training: bool) -> None:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Linear(5, 3)).train(training)
        parts = [[(torch.randn(3, 4), torch.randn(3, 3))] for _ in range(2)]
        params = dict(model.named_parameters())
        here, there = (PartialSum(HessianLinearOperator(model, nn.MSELoss(), params, part)) for part in parts)
        x = torch.ones(1, here.A.shape[1])
        totals = [sum(both) for both in zip(here.product_sums(x), there.product_sums(x), strict=True)]
        with pytest.warns(RuntimeWarning, match="each of the 2 batches") if training else nullcontext():
            here.products(totals, 1)

    @pytest.mark.parametrize(
        ("arguments", "options", "message"),
        [
            ([], {}, "received no operator"),
            ([np.eye(3)], {}, "A is a ndarray"),
            (["mse"], {"timeout": 0}, "timeout is 0"),
            (["mse"], {"arrival": -1}, "arrival is -1"),
        ],
    )
    def test_bad_arguments(self, arguments, options, message) -> None:
        operators = [operator(one) if isinstance(one, str) else one for one in arguments]
        with pytest.raises((TypeError, ValueError), match=message), serve(*operators, **options):
            pass
        with serve(operator("mse")):  # a failed call leaves no state behind
            pass


@pytest.mark.default_cases("alone")
@pytest.mark.parametrize(("nodes", "each"), [(0, 0), (1, 2), (2, 1)], ids=["alone", "one machine", "two"])
def test_the_documented_script_runs(tmp_path, nodes: int, each: int) -> None:
    """It runs alone, under torchrun, and under two torchruns that stand for two machines."""
    page = Path(__file__).parents[2] / "docs" / "distributed.rst"
    lines = page.read_text().partition(".. code-block:: python\n\n")[2].splitlines()
    end = next(index for index, line in enumerate(lines) if line and not line.startswith("    "))
    script = tmp_path / "script.py"
    script.write_text("\n".join(line.removeprefix("    ") for line in lines[:end]))
    own = [sys.executable]
    torchrun = [*own, "-m", "torch.distributed.run", "--nproc-per-node", str(each), "--nnodes", str(nodes)]
    torchrun += ["--master-addr", "127.0.0.1", "--master-port", str(free_port()), "--node-rank"]
    commands = [[*torchrun, str(node)] for node in range(nodes)] or [own]
    environment = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
    launched = [
        subprocess.Popen(
            [*command, str(script)],
            env=environment | {"OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for command in commands
    ]
    try:
        outputs = [process.communicate(timeout=120) for process in launched]
    finally:
        for process in launched:
            process.kill()
            process.wait()
    assert [process.returncode for process in launched] == [0] * len(launched), outputs
    assert ["largest eigenvalues" in printed for printed, _ in outputs] == [True, False][: len(launched)]
    values = torch.tensor([float(word) for word in re.findall(r"[0-9.]+(?:e[-+][0-9]+)?", outputs[0][0])])
    expected = eigsh(documented(), k=3, return_eigenvectors=False)
    np.testing.assert_allclose(values, expected, rtol=1e-4)


def documented() -> GGNLinearOperator:
    """Return the operator of the whole data set in the documented script."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(20, 30), nn.Tanh(), nn.Linear(30, 5))
    data = [(torch.randn(50, 20), torch.randint(0, 5, (50,))) for _ in range(7)]
    return GGNLinearOperator(model, nn.CrossEntropyLoss(), dict(model.named_parameters()), data)
