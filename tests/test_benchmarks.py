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
