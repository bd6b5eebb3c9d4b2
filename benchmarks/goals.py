"""What the times are to reach, and what they reached."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import numpy as np

__all__ = ["GOALS", "Goal", "reached"]

TUTORIAL, DIGITS = ["tutorial MLP 7-5-5-3"], ["MLP 64-32-10, digits"]
LARGE = ["ResNet-18 64x64, eval", "GPT 4 layers, d = 128", "GPT-2 124M"]
DEEP = ["MLP 784-512-512-10", "ResNet-18 64x64, eval", "GPT 4 layers, d = 128"]


@dataclass(frozen=True)
class Goal:
    """The time of one contender over that of another, both with the same kind of work.

    Judged is the geometric mean over the models that both were timed on, or the worst model where `worst`; it is to be
    `target` or more, or that or less where `at_most`. Where `per_flop`, times are divided by floating-point operations:
    those of a product, linearized, for the time above, those of a gradient for the time below.
    """

    what: str
    kind: str
    above: str
    below: str
    target: float
    at_most: bool = False
    worst: bool = False
    models: Collection[str] | None = None
    per_flop: bool = False


def goals() -> list[Goal]:
    scipy, single, compiled = "curvlinops to_scipy", "PyHessian single", "curvop compiled"
    against = "one product against curvlinops to_scipy()"
    kept = "one product against PyHessian's retained single batch"
    units = "one product in gradients"
    nothing = "nothing kept, against curvlinops to_scipy()"
    eigsh = "eigsh(k=10) against eigsh(curvlinops.to_scipy())"
    limit = "distance to the limit: one product in gradients, both per floating-point operation"
    found = [
        Goal(against, "product", scipy, "curvop", 3.0),
        Goal(against, "product", scipy, "curvop", 1.7, worst=True),
        Goal(against, "product", scipy, compiled, 4.0),
        Goal(against, "product", scipy, compiled, 2.0, worst=True),
        Goal(kept, "product", single, "curvop, one batch", 1.0),
        Goal(kept, "product", single, "curvop compiled, one batch", 1.3),
        Goal(units, "product", "curvop", "gradient", 2.0, at_most=True),
        Goal(units, "product", compiled, "gradient", 1.6, at_most=True),
        Goal(limit, "product", "curvop", "gradient", 1.2, at_most=True, models=LARGE, per_flop=True),
        Goal(limit, "product", "curvop", "gradient", 1.5, at_most=True, models=LARGE, per_flop=True, worst=True),
        Goal(limit, "product", compiled, "gradient", 1.0, at_most=True, models=LARGE, per_flop=True),
        Goal(limit, "product", compiled, "gradient", 1.25, at_most=True, models=LARGE, per_flop=True, worst=True),
        Goal(nothing, "nothing kept", scipy, "curvop", 1.0, worst=True),
        Goal(nothing, "nothing kept", scipy, compiled, 1.3),
    ]
    for name in ("curvop", compiled):
        whole, restricted = f"{name}, whole", f"{name}, restricted"
        found += [
            Goal("a block of 8 against curvlinops' block", "block of 8", scipy, name, 1.5),
            Goal(eigsh, "eigsh", scipy, name, 3.0),
            Goal(f"{eigsh}, digits", "eigsh", scipy, name, 6.0, models=DIGITS),
            Goal("the last layer's block against curvlinops' submatrix", "last layer", scipy, name, 100.0, models=DEEP),
            Goal("a sliced submatrix against the restricted operator", "slice", name, restricted, 1.1, at_most=True),
            Goal("the tutorial's first weight, against curvlinops'", "slice", scipy, restricted, 30.0, models=TUTORIAL),
            Goal("its sliced twin, against curvlinops'", "slice", scipy, name, 30.0, models=TUTORIAL),
            Goal("one product of the Gauss-Newton matrix against curvlinops'", "Gauss-Newton", scipy, name, 2.0),
            Goal("one product of the empirical Fisher against curvlinops'", "empirical Fisher", scipy, name, 3.0),
            Goal("an off-diagonal block against a full product", "off diagonal", name, whole, 0.6, at_most=True),
        ]
    return found


GOALS = goals()


def reached(goal: Goal, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the goal and its ratios; `reached` is None where nothing was timed that tells."""
    ratios = {}
    for row in rows:
        above, below = (row.get("by", {}).get(name, {}).get("ms") for name in (goal.above, goal.below))
        if row["work"] == goal.kind and above and below and (goal.models is None or row["model"] in goal.models):
            work = row["flops"]["curvop"] / row["flops"]["gradient"] if goal.per_flop else 1.0
            ratios[row["model"]] = above / below / work
    mean = float(np.exp(np.mean(np.log(list(ratios.values()))))) if ratios else None
    worst = (max if goal.at_most else min)(ratios.values(), default=None)
    judged = worst if goal.worst else mean
    return {
        "goal": goal.what,
        "ratio": f"{goal.above} / {goal.below}",
        "judged": "worst model" if goal.worst else "geometric mean",
        "target": goal.target,
        "at_most": goal.at_most,
        "geometric_mean": mean,
        "worst": worst,
        "models": ratios,
        "missing": sorted(set(goal.models or ()) - set(ratios)),
        "reached": None if judged is None else bool(judged <= goal.target if goal.at_most else judged >= goal.target),
    }
