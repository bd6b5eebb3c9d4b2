"""What the times are to reach, and what they reached."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import numpy as np

__all__ = ["GOALS", "PEERS", "Goal", "reached"]

#: The other packages, with NumPy vectors and the batches as they are. PyHessian's retained single batch is compared
#: with this package's operators on one batch.
PEERS = ("curvlinops to_scipy", "curvlinops compiled", "eigenthings", "eigenthings lanczos", "PyHessian loader")
#: Models with several batches. With a single one, PyHessian's retained batch is a peer like any other.
SEVERAL = [
    "tutorial MLP 7-5-5-3",
    "MLP 64-32-10, digits",
    "MLP 784-512-512-10",
    "CNN 32x32",
    "GPT 4 layers, d = 128",
    "ResNet-18 64x64, eval",
]
TUTORIAL = ["tutorial MLP 7-5-5-3"]
LARGE = ["ResNet-18 64x64, eval", "GPT 4 layers, d = 128", "GPT-2 124M"]
DEEP = ["MLP 784-512-512-10", "ResNet-18 64x64, eval", "GPT 4 layers, d = 128"]


@dataclass(frozen=True)
class Goal:
    """The time of one contender over that of another, both with the same kind of work.

    If `above` names several contenders, the fastest of those that are right counts, for each model its own. Judged is
    the geometric mean over the models that both were timed on, or the worst model if `worst`; it is to be `target` or
    more, or that or less if `at_most`. If `per_flop`, times are divided by floating-point operations: those of a
    product, linearized, for the time above, those of a gradient for the time below.
    """

    what: str
    kind: str
    above: str | tuple[str, ...]
    below: str
    target: float
    at_most: bool = False
    worst: bool = False
    models: Collection[str] | None = None
    per_flop: bool = False

    @property
    def ratio(self) -> str:
        """The ratio in words."""
        return f"{self.above if isinstance(self.above, str) else 'fastest peer'} / {self.below}"


#: Kinds of work, and how many times as fast as the fastest peer the default and the compiled engine are to be, in the
#: geometric mean. None of the models may be slower.
AHEAD = {
    "product": ("one product", 1.75, 2.0),
    "Gauss-Newton": ("one product of the Gauss-Newton matrix", 1.6, 2.2),
    "block of 8": ("a block of 8", 1.2, 1.4),
    "Gauss-Newton, block of 8": ("a block of 8 of the Gauss-Newton matrix", 1.2, 1.4),
}


def goals() -> list[Goal]:
    scipy, single, compiled = "curvlinops to_scipy", "PyHessian single", "curvop compiled"
    kept = "one product against PyHessian's retained single batch"
    units = "one product in gradients"
    nothing = "nothing kept, against curvlinops to_scipy()"
    limit = "distance to the limit: one product in gradients, both per floating-point operation"
    found = []
    for kind, (what, *targets) in AHEAD.items():
        for name, target in zip(("curvop", compiled), targets, strict=True):
            against = f"{what} against the fastest peer"
            found.append(Goal(against, kind, PEERS, name, target, models=SEVERAL))
            found.append(Goal(against, kind, PEERS, name, 1.0, models=SEVERAL, worst=True))
    found += [
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
            Goal("eigsh(k=10) against the fastest peer", "eigsh", PEERS, name, 2.0, models=SEVERAL),
            Goal("eigsh(k=10) against the fastest peer", "eigsh", PEERS, f"{name}, lanczos", 2.0, models=SEVERAL),
            Goal("the last layer's block against curvlinops' submatrix", "last layer", scipy, name, 100.0, models=DEEP),
            Goal("a sliced submatrix against the restricted operator", "slice", name, restricted, 1.1, at_most=True),
            Goal("the tutorial's first weight, against curvlinops'", "slice", scipy, restricted, 30.0, models=TUTORIAL),
            Goal("its sliced twin, against curvlinops'", "slice", scipy, name, 30.0, models=TUTORIAL),
            Goal("one product of the empirical Fisher against curvlinops'", "empirical Fisher", scipy, name, 3.0),
            Goal("an off-diagonal block against a full product", "off diagonal", name, whole, 0.6, at_most=True),
        ]
    return found


GOALS = goals()


def reached(goal: Goal, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the goal and its ratios; `reached` is None if nothing was timed that tells."""
    ratios, fastest = {}, {}
    for row in rows:
        if row["work"] != goal.kind or (goal.models is not None and row["model"] not in goal.models):
            continue
        times = {name: own["ms"] for name, own in row.get("by", {}).items() if "ms" in own}
        above = [name for name in ((goal.above,) if isinstance(goal.above, str) else goal.above) if name in times]
        if above and goal.below in times:
            work = row["flops"]["curvop"] / row["flops"]["gradient"] if goal.per_flop else 1.0
            fastest[row["model"]] = min(above, key=times.__getitem__)
            ratios[row["model"]] = times[fastest[row["model"]]] / times[goal.below] / work
    mean = float(np.exp(np.mean(np.log(list(ratios.values()))))) if ratios else None
    worst = (max if goal.at_most else min)(ratios.values(), default=None)
    judged = worst if goal.worst else mean
    return {
        "goal": goal.what,
        "ratio": goal.ratio,
        "judged": "worst model" if goal.worst else "geometric mean",
        "target": goal.target,
        "at_most": goal.at_most,
        "geometric_mean": mean,
        "worst": worst,
        "models": ratios,
        "fastest": fastest,
        "missing": sorted(set(goal.models or ()) - set(ratios)),
        "reached": None if judged is None else bool(judged <= goal.target if goal.at_most else judged >= goal.target),
    }
