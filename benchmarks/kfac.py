"""Compare KFAC and EKFAC of this package, of curvlinops and of kronfluence: times, with the error beside each time.

Run ``python -m pip install -e ".[bench]" && python benchmarks/kfac.py``; it writes ``benchmarks/results/kfac.json`` and
prints a table. With two threads, it takes about ten minutes. The models can be measured one by one: ``--model CNN``
replaces the results of the models whose names start with CNN, and keeps the others. The contenders take turns, and each
time is the median of its runs. The parameters are those of linear layers and convolutions, because the peers support no
others. Each layer's bias is joined to its weight. Factors are computed for the targets of the data ("empirical"), for
one sampled target ("mc"), and for the Hessian of the loss with respect to the prediction ("type-2"), which kronfluence
does not offer.

Errors are relative Frobenius norms, the largest of all factors or those of a product, with respect to curvlinops in
float64. Sampled targets differ between the packages, so only the input factors are compared for "mc". kronfluence
divides both factors by the number of positions. Its gradient factors are multiplied by the number of positions and
divided by the number of loss terms, which gives the factors of the other packages. On the GPT, the peers add the
gradients of all loss terms of an example before they form the gradient factor. For "type-2", this is another matrix,
because the positions interact, and it is not compared.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import time
import warnings
from collections.abc import Callable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from curvlinops import EKFACLinearOperator as TheirEKFAC
from curvlinops import KFACInverseLinearOperator
from curvlinops import KFACLinearOperator as TheirKFAC
from environment import add_device_options, environment, set_tf32
from models import PROBLEMS, on_device
from reference import medians
from torch import Tensor, nn
from torch.nn import functional as F

from curvop import EKFACLinearOperator, KFACLinearOperator
from curvop.operators.kronecker import KroneckerFactoredLinearOperator
from curvop.operators.kronecker_blocks import KroneckerBlock

RESULTS = Path(__file__).resolve().parent / "results" / "kfac.json"
MODELS = ("MLP 784-512-512-10", "CNN 32x32", "GPT 4 layers, d = 128", "ResNet-18 64x64, eval")
LAYERS = (nn.Linear, nn.Conv2d)
#: Largest error of a result in float32, by the first word of the work. A result with a larger error is not timed. An
#: inverse multiplies rounding errors by the condition number, and eigenvectors of close eigenvalues are inaccurate.
WRONG = {"factors": 1e-5, "product": 1e-5, "inverse": 1e-4, "EKFAC": 1e-3}
#: Goals for the time of the fastest peer, divided by the time of this package.
GOALS = {"factors": 1.5, "product": 1.0, "inverse": 1.0}
COLUMNS = 8
#: Seconds of a turn from which three turns are enough, without another one to warm up.
SLOW = 2.0
KINDS = ("exact", "heuristic")

#: Maps a layer to its factors (input, output).
Factors = dict[str, tuple[Tensor, Tensor]]


# The packages.


def arguments(problem: Mapping[str, Any]) -> tuple[Any, ...]:
    """Return the model, the loss function, the parameters of linear layers and convolutions, and the data."""
    names = {
        f"{name}.{part}"
        for name, module in problem["model"].named_modules()
        if isinstance(module, LAYERS)
        for part, _ in module.named_parameters(recurse=False)
    }
    params = {name: value for name, value in problem["params"].items() if name in names}
    return problem["model"], problem["loss_function"], params, problem["data"]


def curvop(problem: Mapping[str, Any], fisher: str, ekfac: bool = False) -> Any:
    """Return an operator of this package, with its factors."""
    options: dict[str, Any] = {"rng": 0} if fisher == "mc" else {}
    operator = EKFACLinearOperator if ekfac else KFACLinearOperator
    A = operator(*arguments(problem), fisher=fisher, dtype=np.float32, **options)
    return A, A.factors


def curvlinops(problem: Mapping[str, Any], fisher: str, ekfac: bool = False) -> Any:
    """Return an operator of curvlinops, with its factors. The counts of the data are passed, which saves two passes."""
    model, loss_function, params, data = arguments(problem)
    examples = sum(len(X) for X, _ in data)
    A = (TheirEKFAC if ekfac else TheirKFAC)(
        model,
        loss_function,
        list(params.values()),
        data,
        fisher_type=fisher,
        separate_weight_and_bias=False,
        check_deterministic=False,
        num_data=examples,
        num_per_example_loss_terms=sum(y.numel() for _, y in data) // examples,
    )
    A.compute_kronecker_factors()
    if ekfac:
        A.compute_eigenvalue_correction()
    return A


class Kronfluence:
    """The functions of kronfluence without its files: covariances, eigenvectors and corrected eigenvalues."""

    def __init__(self, problem: Mapping[str, Any]) -> None:
        from kronfluence.analyzer import prepare_model
        from kronfluence.task import Task
        from kronfluence.utils.state import State

        class Classification(Task):
            def compute_train_loss(self, batch: Any, model: nn.Module, sample: bool = False) -> Tensor:
                X, y = batch
                z = model(X)
                if sample:
                    with torch.no_grad():
                        rows = z.movedim(1, -1).flatten(0, -2).softmax(-1)
                        y = torch.multinomial(rows, 1).view(y.shape)
                return F.cross_entropy(z, y, reduction="sum")

            def compute_measurement(self, batch: Any, model: nn.Module) -> Tensor:
                return self.compute_train_loss(batch, model)

        self._state, self._task, self._data = State(cpu=True), Classification(), problem["data"]
        self._model = prepare_model(copy.deepcopy(problem["model"]), self._task)

    def covariances(self, fisher: str) -> Any:
        """Return the sums of outer products of inputs and of gradients, with the numbers of positions."""
        from kronfluence.factor.covariance import fit_covariance_matrices_with_loader

        return fit_covariance_matrices_with_loader(*self._common(), self._data, self._options(fisher), None, True)[1]

    def ekfac(self, fisher: str) -> Any:
        """Return the corrected eigenvalues."""
        from kronfluence.factor.eigen import fit_lambda_matrices_with_loader, perform_eigendecomposition

        options, covariances = self._options(fisher), self.covariances(fisher)
        eigen = perform_eigendecomposition(covariances, self._model, self._state, options, True)
        return fit_lambda_matrices_with_loader(*self._common(), self._data, options, eigen, None, True)

    def _common(self) -> tuple[Any, ...]:
        return self._model, self._state, self._task

    @staticmethod
    def _options(fisher: str) -> Any:
        from kronfluence.arguments import FactorArguments

        return FactorArguments(strategy="ekfac", use_empirical_fisher=fisher == "empirical")


# Factors by layer, in one convention.


def own_factors(found: Any) -> Factors:
    _, factors = found
    return {
        name.removesuffix(".weight"): (own.input, own.output)
        for name, own in factors.items()
        if name.endswith(".weight")
    }


def their_factors(A: Any) -> Factors:
    return {name: (A._input_covariances[name], output) for name, output in A._gradient_covariances.items()}


def kronfluence_factors(found: Mapping[str, Mapping[str, Tensor]], terms: int) -> Factors:
    return {
        name: (
            found["activation_covariance"][name] / found["num_activation_covariance_processed"][name],
            found["gradient_covariance"][name] / terms,
        )
        for name in found["activation_covariance"]
    }


def factor_error(found: Factors, exact: Factors, fisher: str) -> float:
    """Return the largest relative error of a factor."""
    assert set(found) == set(exact)
    compared = 1 if fisher == "mc" else 2
    return max(
        relative(own, true)
        for name in exact
        for own, true in list(zip(found[name], exact[name], strict=True))[:compared]
    )


def relative(found: Tensor, exact: Tensor) -> float:
    return float(torch.linalg.vector_norm(found.double() - exact) / torch.linalg.vector_norm(exact))


# Work.


def in_double(problem: Mapping[str, Any]) -> dict[str, Any]:
    model = copy.deepcopy(problem["model"]).double()
    data = [(X.double() if X.is_floating_point() else X, y) for X, y in problem["data"]]
    return dict(problem) | {"model": model, "params": dict(model.named_parameters()), "data": data}


def factors_work(problem: Mapping[str, Any], fisher: str) -> dict[str, Any]:
    """Return for each contender a function that computes the factors, and its error (None if it is not compared)."""
    terms = sum(y.numel() for _, y in problem["data"])
    exact = their_factors(curvlinops(in_double(problem), fisher))
    tasks: dict[str, tuple[Callable[[], Any], Callable[[Any], Factors]]] = {
        "curvop": (lambda: curvop(problem, fisher), own_factors),
        "curvlinops": (lambda: curvlinops(problem, fisher), their_factors),
    }
    if fisher != "type-2":
        theirs = Kronfluence(problem)
        tasks["kronfluence"] = (lambda: theirs.covariances(fisher), lambda found: kronfluence_factors(found, terms))
    interacting = fisher == "type-2" and terms > sum(len(X) for X, _ in problem["data"])
    return {
        name: (run, None if interacting else factor_error(read(run()), exact, fisher))
        for name, (run, read) in tasks.items()
    }


def ekfac_work(problem: Mapping[str, Any], fisher: str) -> dict[str, Any]:
    """Return for each contender a function that computes an EKFAC, and the error of a product."""
    single_terms = sum(y.numel() for _, y in problem["data"]) == sum(len(X) for X, _ in problem["data"])
    tasks: dict[str, tuple[Callable[[], Any], float | None]] = {}
    A, _ = curvop(problem, fisher, ekfac=True)
    x = vectors(A.shape[1], 1)[:, 0]
    error = None
    if single_terms:  # curvlinops supports no others
        exact = curvlinops(in_double(problem), fisher, ekfac=True) @ x.double()
        error = relative(A @ x, exact)
        theirs = relative(curvlinops(problem, fisher, ekfac=True) @ x, exact)
        tasks["curvlinops"] = (lambda: curvlinops(problem, fisher, ekfac=True), theirs)
    tasks["curvop"] = (lambda: curvop(problem, fisher, ekfac=True), error)
    if fisher != "type-2":
        kronfluence = Kronfluence(problem)
        tasks["kronfluence"] = (lambda: kronfluence.ekfac(fisher), None)
    return tasks


def product_work(problem: Mapping[str, Any], columns: int) -> dict[str, Any]:
    """Return for each contender a function that multiplies a KFAC by vectors, and its error."""
    operators = {"curvop": curvop(problem, "empirical")[0], "curvlinops": curvlinops(problem, "empirical")}
    X = vectors(operators["curvop"].shape[1], columns)
    X = X[:, 0] if columns == 1 else X
    exact = curvlinops(in_double(problem), "empirical") @ X.double()
    return {name: (lambda A=A: A @ X, relative(A @ X, exact)) for name, A in operators.items()}


def inverse_work(problem: Mapping[str, Any], kind: str, whole: bool) -> dict[str, Any]:
    """Return for each contender a function that multiplies an inverse by a vector, and its error.

    If `whole`, the function also computes the inverse. The damping is the mean of the eigenvalues.
    """
    own, theirs = curvop(problem, "empirical")[0], curvlinops(problem, "empirical")
    x = vectors(own.shape[1], 1)[:, 0]
    damping = float(theirs.trace) / len(x)
    options = {"damping": damping, f"use_{kind}_damping": True}
    exact = KFACInverseLinearOperator(curvlinops(in_double(problem), "empirical"), **options) @ x.double()
    builders: dict[str, Callable[[], Any]] = {
        "curvop": lambda: without_eigenvectors(own).inverse(damping, kind=kind),
        "curvlinops": lambda: KFACInverseLinearOperator(theirs, **options),
    }
    built = {name: build() for name, build in builders.items()}
    errors = {name: relative(A @ x, exact) for name, A in built.items()}
    if whole:
        return {name: (lambda build=build: build() @ x, errors[name]) for name, build in builders.items()}
    return {name: (lambda A=A: A @ x, errors[name]) for name, A in built.items()}


def without_eigenvectors(A: Any) -> Any:
    """Return a copy of a matrix of Kronecker products that has not computed their eigenvectors yet."""
    blocks = [KroneckerBlock(block.layout, block.left, block.right) for block in A._blocks]
    return KroneckerFactoredLinearOperator(blocks, A._params, dtype=A.dtype)


def vectors(size: int, columns: int) -> Tensor:
    return torch.randn(size, columns, generator=torch.Generator().manual_seed(1))


WORK: dict[str, Callable[[Mapping[str, Any]], dict[str, Any]]] = {
    **{f"factors, {fisher}": lambda problem, f=fisher: factors_work(problem, f) for fisher in ("empirical", "mc")},
    "factors, type-2": lambda problem: factors_work(problem, "type-2"),
    "product": lambda problem: product_work(problem, 1),
    f"product with {COLUMNS} columns": lambda problem: product_work(problem, COLUMNS),
    **{f"inverse, {kind}": lambda problem, k=kind: inverse_work(problem, k, True) for kind in KINDS},
    **{f"product with inverse, {kind}": lambda problem, k=kind: inverse_work(problem, k, False) for kind in KINDS},
    "EKFAC, empirical": lambda problem: ekfac_work(problem, "empirical"),
    "EKFAC, type-2": lambda problem: ekfac_work(problem, "type-2"),
}
#: Eigenvectors of matrices with 4608 rows take minutes. So do thousands of backward passes for each batch of the GPT.
LONG = {("ResNet-18 64x64, eval", work) for work in WORK if work.startswith("EKFAC") or work.endswith("exact")}
LONG.add(("GPT 4 layers, d = 128", "EKFAC, type-2"))


def measure(problem: Mapping[str, Any], work: str, runs: int, room: float) -> dict[str, Any]:
    """Return milliseconds and errors of all contenders."""
    tasks = WORK[work](problem)
    limit = WRONG["inverse" if "inverse" in work else work.replace(",", " ").split()[0]]
    right = {name: run for name, (run, error) in tasks.items() if error is None or error <= limit}
    start = time.perf_counter()
    for run in right.values():
        run()
    turn = time.perf_counter() - start
    repeats = max(runs if turn < SLOW else 3, min(200, math.ceil(room / turn)))
    times = medians(*right.values(), repeats=repeats, warm=int(turn < SLOW), fair=True)
    by = {name: {} if error is None else {"error": error} for name, (_, error) in tasks.items()}
    for name, ms in zip(right, times, strict=True):
        by[name]["ms"] = ms
    found: dict[str, Any] = {"by": by, "runs": repeats}
    peers = [by[name]["ms"] for name in by if name != "curvop" and "ms" in by[name]]
    if peers and "ms" in by["curvop"]:
        found["fastest peer / curvop"] = min(peers) / by["curvop"]["ms"]
    return found


def shown(work: str, found: Mapping[str, Any]) -> str:
    cells = []
    for name, own in found["by"].items():
        error = f" (error {own['error']:.0e})" if "error" in own else ""
        cells.append(f"{name} {own['ms']:.3g} ms{error}" if "ms" in own else f"{name} wrong{error}")
    ratio = found.get("fastest peer / curvop")
    return f"{work}: " + "; ".join(cells) + ("" if ratio is None else f"; fastest peer / curvop {ratio:.2f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", action="append", help="only models whose names start so; can be repeated")
    parser.add_argument("--work", choices=WORK, action="append", help="only this work; can be repeated")
    parser.add_argument("--runs", type=int, default=5, help="minimum number of runs (default: 5)")
    parser.add_argument("--room", type=float, default=3.0, help="seconds to fill with runs (default: 3)")
    parser.add_argument("--long", action="store_true", help="include what takes many minutes")
    add_device_options(parser)
    parser.add_argument("--out", type=Path, default=RESULTS, help="results; benchmarks/results/kfac.json")
    options = parser.parse_args()
    chosen = [model for model in MODELS if model.startswith(tuple(options.model or [""]))]
    if not chosen:
        parser.error(f"--model must be the start of one of these names: {', '.join(MODELS)}")
    warnings.simplefilter("ignore")
    set_tf32(options.tf32)
    results: dict[str, Any] = {}
    if options.out.exists() and (options.model or options.work):  # replaces only what is measured
        results = json.loads(options.out.read_text())["models"]
    about = environment(options.device) | {
        "peers": {name: version(name) for name in ("curvlinops-for-pytorch", "kronfluence")}
    }
    start = time.perf_counter()
    for model in chosen:
        torch.manual_seed(0)
        problem = on_device(PROBLEMS[model](), options.device)
        for work in options.work or WORK:
            if (model, work) in LONG and not options.long:
                continue
            try:
                found = measure(problem, work, options.runs, options.room)
            except Exception as error:  # what a package cannot do is a result, too
                found = {"failed": " ".join(f"{type(error).__name__}: {error}".split())[:300]}
            results.setdefault(model, {})[work] = found
            print(f"{model}, {found['failed'] if 'failed' in found else shown(work, found)}", flush=True)
            ordered = {name: results[name] for name in MODELS if name in results}
            report = {"environment": about, "wrong": WRONG, "goals": GOALS, "models": ordered}
            options.out.write_text(json.dumps(report, indent=2) + "\n")
    print(f"{(time.perf_counter() - start) / 60:.1f} minutes")


if __name__ == "__main__":
    main()
