"""The goals of the benchmarks are judged by the fastest peer that is right, and the peers compute what they should."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"


@pytest.fixture(autouse=True)
def on_path(monkeypatch) -> None:
    """Import the scripts as they import one another."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))


def row(model: str, work: str = "product", **times: float | None) -> dict[str, Any]:
    """Return a row of results, without a time for what was wrong."""
    by = {name.replace("_", " "): {"error": 1.0} if ms is None else {"ms": ms} for name, ms in times.items()}
    return {"model": model, "work": work, "by": by}


class TestGoals:
    def test_the_fastest_peer_of_each_model_counts_unless_it_is_wrong(self) -> None:
        from goals import Goal, reached

        rows = [
            row("a", curvop=1.0, slow=8.0, fast=2.0),
            row("b", curvop=1.0, slow=8.0, fast=None),
            row("a", "another work", curvop=1.0, fast=0.1),
            row("c", curvop=None, slow=1.0),
        ]
        goal = Goal("a goal", "product", ("slow", "fast", "absent"), "curvop", 3.0)
        found = reached(goal, rows)
        assert found["fastest"] == {"a": "fast", "b": "slow"}
        assert found["geometric_mean"] == pytest.approx(4.0)
        assert (found["worst"], found["reached"], found["ratio"]) == (2.0, True, "fastest peer / curvop")
        assert not reached(Goal("a goal", "product", ("slow", "fast"), "curvop", 3.0, worst=True), rows)["reached"]

    def test_what_was_not_timed_is_not_judged(self) -> None:
        from goals import GOALS, reached

        assert {reached(goal, [])["reached"] for goal in GOALS} == {None}

    def test_no_model_may_be_slower_than_a_peer(self) -> None:
        from goals import AHEAD, GOALS, PEERS, reached

        rows = [row(model, work, curvop=1.0, eigenthings=ms) for work in AHEAD for model, ms in MODELS.items()]
        for goal in GOALS:
            if goal.above == PEERS and goal.below == "curvop" and goal.kind in AHEAD:
                assert reached(goal, rows)["reached"] == (not goal.worst)


MODELS = {"CNN 32x32": 100.0, "MLP 784-512-512-10": 0.9}


@pytest.mark.peers
@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("kind", ["product", "block of 8", "Gauss-Newton", "Gauss-Newton, block of 8"])
def test_the_peers_multiply_with_the_same_matrix(kind: str) -> None:
    from contenders import CONTENDERS
    from goals import PEERS
    from models import mlp, problem
    from peers import WRONG, work_of
    from reference import exact

    torch.manual_seed(0)
    own = problem(mlp(5, 4, 10), (5,), 6, 2)
    work = work_of(kind, own)
    expected = exact(own, work.vectors, matrix=work.matrix)
    named = [name for name in PEERS if kind in CONTENDERS[name].kinds and not CONTENDERS[name].compiled]
    assert len(named) >= 2
    for name in named:
        product = CONTENDERS[name].build(own, work)(work.vectors)
        assert np.linalg.norm(product - expected) < WRONG * np.linalg.norm(expected), name


@pytest.mark.peers
@pytest.mark.filterwarnings("default")
def test_all_eigensolvers_find_the_same_eigenvalues() -> None:
    from contenders import CONTENDERS
    from models import mlp, problem
    from peers import solve, work_of
    from reference import exact

    torch.manual_seed(0)
    own = problem(mlp(5, 14, 10), (5,), 6, 2)
    work = work_of("eigsh", own)
    expected = np.linalg.eigvalsh(exact(own, np.eye(len(work.vectors))))[-10:]
    names = ["curvop", "curvop, lanczos", "eigenthings", "eigenthings lanczos", "curvlinops to_scipy"]
    for name in names:
        values, vectors = solve(CONTENDERS[name].build(own, work), work)
        np.testing.assert_allclose(np.sort(values), expected, rtol=1e-3, err_msg=name)
        assert vectors.shape == (len(work.vectors), 10)


class TestPreconditioning:
    @pytest.fixture
    def small(self) -> dict[str, Any]:
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(5, 4), torch.nn.Tanh(), torch.nn.Linear(4, 3)).double()
        data = [(torch.randn(30, 5).double(), torch.randint(3, (30,)))]
        params = dict(model.named_parameters())
        return {"model": model, "loss_function": torch.nn.CrossEntropyLoss(), "params": params, "data": data}

    def test_the_counts_are_those_of_textbook_conjugate_gradients(self, small) -> None:
        from preconditioning import RTOL, measure

        from curvop import EKFACLinearOperator, KFACLinearOperator
        from curvop.testing.functorch_reference import functorch_ggn

        found = measure(lambda: small, (1e-2,), (1, 2))
        G = np.asarray(functorch_ggn(**small))
        largest = np.linalg.eigvalsh(G)[-1]
        assert found["largest eigenvalue"] == pytest.approx(largest, rel=1e-2)
        damping = 1e-2 * found["largest eigenvalue"] * np.eye(len(G))
        layers = np.eye(2)[np.repeat([0, 1], [24, 15])]
        inverses = {
            "none": np.eye(len(G)),
            "KFAC": np.linalg.inv(KFACLinearOperator(**small).to_dense() + damping),
            "EKFAC": np.linalg.inv(EKFACLinearOperator(**small).to_dense() + damping),
            "exact blocks": np.linalg.inv(G * (layers @ layers.T) + damping),
            "nystrom": np.linalg.inv(G + damping),  # the rank is that of the matrix
            "KFAC, low rank": np.linalg.inv(G + damping),
        }
        counts = found["solves"]["0.01"]["1"]
        b = np.random.default_rng(0).standard_normal((len(G), 1))[:, 0]
        for name, inverse in inverses.items():
            assert counts[name]["converged"]
            assert abs(counts[name]["products"] - 1 - textbook(G + damping, inverse, b, RTOL)) <= 1, name
        constructions = {name: row["construction"] for name, row in counts.items()}
        assert [constructions[name] for name in inverses] == [0, 0, 0, 39, 39, 78]
        assert set(found["solves"]["0.01"]["2"]) == {*inverses, "auto"}
        assert found["lobpcg"]["0.01"]["KFAC"]["converged"]

    def test_the_automatic_choice_is_counted_with_its_construction(self, small) -> None:
        from preconditioning import measure_solves

        from curvop import GGNLinearOperator

        G = GGNLinearOperator(**small)
        [row] = measure_solves(G, 1e-3, {"auto": ("auto", 0)}, 300).values()
        assert row["converged"]
        assert G.num_products == row["products"] + row["construction"]
        assert "products per column" in row["took"]


def textbook(A: np.ndarray, inverse: np.ndarray, b: np.ndarray, rtol: float) -> int:
    """Return the number of steps of preconditioned conjugate gradients (Saad, 2003, algorithm 9.1).

    Residuals are made orthogonal to all earlier ones, so that rounding errors do not delay convergence.
    """
    x, r = np.zeros_like(b), b
    z = inverse @ r
    p, steps, earlier = z, 0, []
    while np.linalg.norm(r) > rtol * np.linalg.norm(b):
        Ap = A @ p
        alpha = r @ z / (p @ Ap)
        x, new = x + alpha * p, r - alpha * Ap
        earlier.append((r, z))
        for _ in range(2):
            for r_i, z_i in earlier:
                new = new - r_i * (z_i @ new) / (z_i @ r_i)
        z_new = inverse @ new
        p = z_new + (new @ z_new) / (r @ z) * p
        r, z, steps = new, z_new, steps + 1
    return steps
