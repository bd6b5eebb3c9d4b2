"""Insert measured results into the pages: tables by the directive ``measured``, single figures by substitutions.

All values are read from the files in ``benchmarks/results`` when the site is built. Goals are those of
``benchmarks/goals.py``, and are judged by the times in these files.
"""

from __future__ import annotations

import json
import math
import statistics
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
sys.path.append(str(BENCHMARKS))

from goals import GOALS, Goal, reached  # noqa: E402

__all__ = ["FIGURES", "TABLES", "setup", "substitutions"]

RESULTS = BENCHMARKS / "results"


def results(name: str) -> Any:
    """Return the results of a benchmark."""
    return json.loads((RESULTS / f"{name}.json").read_text())


def peer_rows(name: str = "peers") -> list[dict[str, Any]]:
    """Return the rows of a comparison with the peers.

    A comparison may lack the products with other matrices than the Hessian, which ``curvature.json`` then has.
    """
    rows = list(results(name)["rows"])
    if name == "peers" and (RESULTS / "curvature.json").exists():
        kinds = {row["work"] for row in rows}
        rows += [row for row in results("curvature")["rows"] if row["work"] not in kinds]
    return rows


def newest_rows() -> list[dict[str, Any]]:
    """Return the rows of ``fastest.json``, and those rows of ``peers.json`` that ``fastest.json`` does not replace.

    ``fastest.json`` is recorded more often, but has fewer contenders and kinds of work.
    """
    rows = results("fastest")["rows"]
    replaced = {(row["model"], row["work"]) for row in rows}
    return rows + [row for row in peer_rows() if (row["model"], row["work"]) not in replaced]


def judged(goal: Goal) -> dict[str, Any]:
    """Return the goal and its ratios, from the newest rows if they contain both contenders."""
    found = reached(goal, newest_rows())
    return reached(goal, peer_rows()) if found["geometric_mean"] is None else found


def table(head: list[str], lines: Iterable[list[str]]) -> str:
    """Return a ``list-table``."""
    rows = ["   * - " + "\n     - ".join(line) for line in [head, *lines]]
    return "\n".join([".. list-table::", "   :header-rows: 1", "", *rows, ""])


def mb(value: float) -> str:
    """Return a size in megabytes as text."""
    return f"{value:.0f}\N{NO-BREAK SPACE}MB"


def cell(result: dict[str, Any] | None) -> str:
    """Return a time as text, or the reason why there is none."""
    if result is None:
        return ""
    if "ms" not in result:
        return "failed" if "failed" in result else f"wrong ({result['error']:.0e})"
    seconds = result["ms"] / 1e3
    return f"{seconds:.3g}\N{NO-BREAK SPACE}s" if seconds >= 1 else f"{result['ms']:.3g}\N{NO-BREAK SPACE}ms"


ONE_BATCH = {
    "curvop, one batch": "curvop",
    "curvop compiled, one batch": "curvop, compiled",
    "PyHessian single": "PyHessian",
}
CONTENDERS = {
    "curvop": "curvop",
    "curvop compiled": "curvop, compiled",
    "curvlinops to_scipy": "curvlinops",
    "curvlinops compiled": "curvlinops, compiled by hand",
    "eigenthings": "hessian-eigenthings",
    "curvop, lanczos": 'curvop, method="lanczos"',
    "curvop compiled, lanczos": 'curvop, compiled, method="lanczos"',
    "eigenthings lanczos": "hessian-eigenthings, own solver",
    "PyHessian loader": "PyHessian, all batches",
    "by hand": "double backward by hand",
    "gradient": "a gradient",
}


#: Contenders that do the work in another form, and the form of ``curvop`` to compare them with.
COUNTERPARTS = {
    "PyHessian single": "curvop, one batch",
    "curvlinops eager": "curvop, tensors",
    "eigenthings lanczos": "curvop, lanczos",
}
NAMES = CONTENDERS | {"PyHessian single": "PyHessian, one batch", "curvlinops eager": "curvlinops, tensors"}


def times(*works: str, name: str | None = None, contenders: dict[str, str] = CONTENDERS) -> str:
    """Tabulate the times of one kind of work, with one row for each model, or of several kinds.

    The rows are those of the results file `name`, or the newest of each work.
    """
    rows = newest_rows() if name is None else peer_rows(name)
    rows = [row for row in rows if row["work"] in works and "by" in row]
    measured = [key for key in contenders if any(key in row["by"] for row in rows)]
    lines = [
        [row["work"]] * (len(works) > 1)
        + [row["model"], f"{row['P']:,}", *(cell(row["by"].get(key)) for key in measured)]
        for row in rows
    ]
    head = ["work"] * (len(works) > 1) + ["model", "parameters", *(contenders[key] for key in measured)]
    return table(head, lines)


def faster() -> str:
    """Tabulate the work in which another contender is faster than the default engine, with the fastest contender."""
    lines = []
    for row in newest_rows():
        found = [(gain, *rest) for gain, *rest in others(row) if gain > 1]
        if found:
            gain, name, counterpart = max(found)
            compiled = row["by"].get(counterpart.replace("curvop", "curvop compiled"))
            cells = [cell(row["by"][name]), cell(row["by"][counterpart]), cell(compiled), f"{gain:.2f}"]
            lines.append([row["work"], row["model"], NAMES[name], *cells])
    head = ["work", "model", "fastest", "its time", "curvop", "curvop, compiled", "ratio"]
    return table(head, lines or [["none"] + [""] * (len(head) - 1)])


def others(row: dict[str, Any]) -> Iterator[tuple[float, str, str]]:
    """Yield the ratio of the default engine's time to another contender's, the contender, and what it competes with."""
    by = {name: own for name, own in row.get("by", {}).items() if "ms" in own}
    own = {name for name in NAMES if name.startswith("curvop")}
    for name in by.keys() & (NAMES.keys() - own - {"gradient"}):
        counterpart = COUNTERPARTS.get(name, "curvop")
        counterpart = counterpart if counterpart in by else "curvop"
        if counterpart in by:
            yield by[counterpart]["ms"] / by[name]["ms"], name, counterpart


def peaks() -> str:
    """Tabulate the peak memory of two products."""
    rows = results("peers")["peaks"]
    names = CONTENDERS | {"curvop, nothing kept": "curvop, nothing cached"}
    names = {key: name for key, name in names.items() if any(key in row["peak_mb"] for row in rows)}
    lines = []
    for row in rows:
        sizes = [row["peak_mb"].get(key) for key in names]
        lines.append([row["model"], *(mb(size) if isinstance(size, float) else "" for size in sizes)])
    return table(["model", *names.values()], lines)


def budget() -> str:
    """Tabulate time and memory of products if nothing, half or everything is cached."""
    lines = [
        [
            row["model"],
            f"{row['share']:.0%}",
            mb(row["kept_mb"]),
            f"{row['ms']:.0f}\N{NO-BREAK SPACE}ms",
            mb(row["peak_mb"]),
        ]
        for row in results("budget")["rows"]
    ]
    return table(["model", "budget, share of the full cache", "cached", "product", "peak"], lines)


def large() -> str:
    """Tabulate products and eigenvalues of large models."""
    lines = [
        [
            row["model"],
            f"{row['P']:,}",
            f"{row['product_s']:.1f}\N{NO-BREAK SPACE}s",
            f"{row['product_in_gradients']:.1f}",
            f"{row['relative_error']:.0e}",
            f"{row['peak_gib']:.1f}\N{NO-BREAK SPACE}GiB",
            f"{row['eigsh_s']:.0f}\N{NO-BREAK SPACE}s" if "eigsh_s" in row else "",
        ]
        for row in results("large")["rows"]
    ]
    head = [
        "model",
        "parameters",
        "product",
        "in gradients",
        "error of the product",
        "peak memory",
        "largest eigenvalue in magnitude",
    ]
    return table(head, lines)


def vocabulary() -> str:
    """Tabulate the peak memory of products with the logits of a large vocabulary."""
    lines = [
        [
            row["matrix"],
            f"{row['rows']:,} x {row['classes']:,}",
            mb(row["logits_mb"]),
            mb(row["peak_mb"]),
            f"{row['peak_in_logits']:.1f}",
        ]
        for row in results("vocabulary")["rows"]
    ]
    return table(["matrix", "logits", "memory of the logits", "peak", "in units of the logits"], lines)


DENSITIES = {
    "autograd": "curvop",
    "compiled": "curvop, compiled",
    "curvlinops": "curvlinops",
    "curvlinops compiled": "curvlinops, compiled by hand",
    "eigenthings": "hessian-eigenthings",
}


def densities(name: str = "density") -> str:
    """Tabulate the times of spectral densities, with the same number of probes and steps."""
    models = results(name)["models"]
    measured = [key for key in DENSITIES if any(key in row["seconds"] for row in models.values())]
    lines = [
        [
            model,
            f"{row['P']:,}",
            str(row.get("steps", results(name)["steps"])),
            *(density_cell(row, key) for key in measured),
            f"{density_ratio(row, 'autograd'):.1f}",
            f"{row['recurrence / products']:.0%}",
        ]
        for model, row in models.items()
    ]
    head = ["model", "parameters", "steps", *(DENSITIES[key] for key in measured), "ratio", "recurrence / products"]
    return table(head, lines)


SOLVERS = {
    "curvop": "curvop",
    "SciPy cg, curvlinops": "SciPy's cg, column by column",
    "linear_operator CG, curvlinops": "linear_operator's CG",
    "curvlinops CGInverseLinearOperator": "curvlinops' inverse",
}


def solved(result: dict[str, Any]) -> str:
    """Return the seconds and the products of a solve as text, and the residual if it is too large."""
    if "failed" in result:
        return "not solved"
    seconds = f"{result['seconds']:.2g}" if result["seconds"] < 10 else f"{result['seconds']:.0f}"
    missed = "" if result["reached"] else f", residual {result['residual']:.1e}"
    return f"{seconds}\N{NO-BREAK SPACE}s ({result['products']:,} products{missed})"


def solves() -> str:
    """Tabulate the seconds and products of damped solves."""
    lines = [
        [model, columns.partition(" ")[0], *(solved(by[solver]) for solver in SOLVERS)]
        for model, row in results("solves")["models"].items()
        for columns, by in row["by"].items()
    ]
    return table(["model", "right-hand sides", *SOLVERS.values()], lines)


def density_cell(row: dict[str, Any], key: str) -> str:
    """Return the time of a density as text, or the reason why there is none."""
    if key in row["seconds"]:
        return f"{row['seconds'][key]:.2g}\N{NO-BREAK SPACE}s"
    if key in row.get("failed", {}):
        return "failed"
    return f"wrong ({row['errors'][key]:.0e})" if key in row.get("errors", {}) else ""


def density_ratio(row: dict[str, Any], engine: str) -> float:
    """Return the time of the fastest peer's density divided by that of this package's."""
    peers = [row["seconds"][key] for key in DENSITIES if key not in ("autograd", "compiled") and key in row["seconds"]]
    return float(min(peers) / row["seconds"][engine])


def density_goals() -> list[list[str]]:
    """Return the rows of the goals for densities: 2 times the fastest peer, and 15 % for the recurrence."""
    models = list(results("density")["models"].values())
    lines = []
    for engine in ("autograd", "compiled"):
        ratios = [density_ratio(row, engine) for row in models if engine in row["seconds"]]
        if ratios:
            mean = statistics.geometric_mean(ratios)
            figures = [f"{mean:.3g}", f"{min(ratios):.3g}", "yes" if mean >= 2 else "no"]
            ratio = f"fastest peer / {DENSITIES[engine].replace(',', '')}"
            lines.append(["a density against the fastest peer", ratio, "at least 2 (geometric mean)", *figures])
    shares = [row["recurrence / products"] for row in models]
    figures = [f"{statistics.geometric_mean(shares):.3g}", f"{max(shares):.3g}", "yes" if max(shares) <= 0.15 else "no"]
    lines.append(["the recurrence of a density", "recurrence / products", "at most 0.15 (worst model)", *figures])
    return lines


def distributed() -> str:
    """Tabulate products of one rank, and of several ranks that share the data."""
    measured = results("distributed")
    lines = [
        [
            product,
            *(f"{row[key] * 1e3:.3g}\N{NO-BREAK SPACE}ms" for key in ("seconds alone", "seconds shared")),
            f"{row['gain']:.2f}",
            f"{row['relative difference']:.0e}",
        ]
        for product, row in measured["products"].items()
    ]
    return table(["product", "one rank", f"{measured['ranks']} ranks", "gain", "difference"], lines)


def kronecker_rows() -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Yield the work, the model and the results of each measurement of KFAC. There are none before the first run."""
    models = results("kfac")["models"] if (RESULTS / "kfac.json").exists() else {}
    works = dict.fromkeys(work for row in models.values() for work in row)
    for work in works:
        for model, row in models.items():
            if "by" in row.get(work, {}):
                yield work, model, row[work]


def kronecker() -> str:
    """Tabulate the times and errors of KFAC and EKFAC."""
    contenders = "curvop", "curvlinops", "kronfluence"
    lines = []
    for work, model, found in kronecker_rows():
        cells = []
        for name in contenders:
            own = found["by"].get(name)
            shown = cell(own)
            cells.append(f"{shown} ({own['error']:.0e})" if own and {"ms", "error"} <= own.keys() else shown)
        value = found.get("fastest peer / curvop")
        lines.append([work, model, *cells, "" if value is None else f"{value:.2f}"])
    head = ["work", "model", *contenders, "ratio"]
    return table(head, lines or [["none"] + [""] * (len(head) - 1)])


def kronecker_ratios(kind: str) -> list[float]:
    """Return the times of the fastest other package, divided by those of this package, for all work of one kind."""
    found = [row for work, _, row in kronecker_rows() if work.replace(",", " ").split()[0] == kind]
    return [row["fastest peer / curvop"] for row in found if "fastest peer / curvop" in row]


def kronecker_figure(kind: str, summary: Callable[[list[float]], float]) -> str:
    """Return a summary of the ratios of one kind of work as text."""
    found = kronecker_ratios(kind)
    return f"{summary(found):.2f}" if found else "an unknown number of"


def kronecker_goals() -> list[list[str]]:
    """Return the rows of the goals for KFAC."""
    lines = []
    for kind, target in (results("kfac")["goals"] if (RESULTS / "kfac.json").exists() else {}).items():
        if found := kronecker_ratios(kind):
            mean, least = statistics.geometric_mean(found), min(found)
            cells = [f"at least {target:g} (worst)", f"{mean:.3g}", f"{least:.3g}", "yes" if least >= target else "no"]
            lines.append([f"KFAC, {kind}, against the fastest peer", "fastest peer / curvop", *cells])
    return lines


def goals() -> str:
    """Tabulate every goal, reached or not."""
    lines = []
    for goal in map(judged, GOALS):
        if goal["geometric_mean"] is None:
            continue
        target = f"{'at most' if goal['at_most'] else 'at least'} {goal['target']:g} ({goal['judged']})"
        figures = [f"{goal[key]:.3g}" for key in ("geometric_mean", "worst")]
        lines.append([goal["goal"], goal["ratio"], target, *figures, "yes" if goal["reached"] else "no"])
    lines += density_goals() + kronecker_goals()
    return table(["goal", "ratio of times", "target", "geometric mean", "worst", "reached"], lines)


# The page that helps to choose settings.


def row_of(model: str, work: str, rows: Iterable[dict[str, Any]] | None = None) -> dict[str, Any]:
    """Return the contenders' results for a model and a kind of work, or an empty dict."""
    rows = newest_rows() if rows is None else rows
    return next((row.get("by", {}) for row in rows if (row["model"], row["work"]) == (model, work)), {})


def time_of(model: str, work: str, contender: str = "curvop", rows: Iterable[dict[str, Any]] | None = None) -> float:
    """Return a time in milliseconds, or NaN if there is none."""
    return float(row_of(model, work, rows).get(contender, {}).get("ms", math.nan))


def models() -> list[str]:
    """Return the models whose products were measured."""
    return [row["model"] for row in newest_rows() if row["work"] == "product" and "ms" in row["by"].get("curvop", {})]


def gain_of_compiling(model: str) -> float:
    """Return the time of a product divided by the time of a compiled product."""
    return time_of(model, "product") / time_of(model, "product", "curvop compiled")


def compile_seconds(model: str) -> float:
    """Return how much longer the first product takes if products are compiled."""
    by = row_of(model, "product")
    return float(by.get("curvop compiled", {}).get("first_s", math.nan) - by["curvop"]["first_s"])


def products_to_compile(model: str) -> float:
    """Return the number of products after which compilation has saved as much time as it took.

    The number is infinite if compiled products are slower, and NaN if there is none.
    """
    saved = time_of(model, "product") - time_of(model, "product", "curvop compiled")
    return math.inf if saved <= 0 else compile_seconds(model) / (saved / 1e3)


def cost_of_no_cache(model: str) -> float:
    """Return the time of a product with nothing cached divided by that of a product with everything cached."""
    rows = peer_rows()  # measured in one run
    return time_of(model, "nothing kept", rows=rows) / time_of(model, "product", rows=rows)


def gain_of_columns(model: str) -> float:
    """Return the time of a product divided by the time per column of a block of 8."""
    return 8 * time_of(model, "product") / time_of(model, "block of 8")


def choices() -> str:
    """Tabulate what compilation, the cache and blocks change, with one row for each model."""
    lines = []
    for model in models():
        pays, spent = products_to_compile(model), compile_seconds(model)
        lines.append(
            [
                model,
                cell(row_of(model, "product")["curvop"]),
                factor(gain_of_compiling(model)),
                "" if math.isnan(spent) else f"{spent:.0f}\N{NO-BREAK SPACE}s",
                "never" if pays == math.inf else "" if math.isnan(pays) else f"{float(f'{pays:.2g}'):,.0f}",
                factor(cost_of_no_cache(model)),
                factor(gain_of_columns(model)),
            ]
        )
    head = [
        *("model", "product", "gain if compiled", "compile time", "products until it pays"),
        *("cost if nothing is cached", "gain per column of a block of 8"),
    ]
    return table(head, lines)


def columns() -> str:
    """Tabulate the time per column by the number of columns, with one row for each model and matrix."""
    found = results("blocks")["results"]
    counts = sorted({row["columns"] for own in found for row in own["rows"]})
    lines = []
    for own in found:
        by_count = {row["columns"]: row["by"]["curvop autograd"] for row in own["rows"]}
        single = cell({"ms": own["single_ms"]})
        gains = [factor(own["single_ms"] / by_count[n]["ms_per_column"]) if n in by_count else "" for n in counts[1:]]
        lines.append([own["model"], own["matrix"], single, *gains])
    return table(["model", "matrix", "product", *(f"gain, {n} columns" for n in counts[1:])], lines)


def factor(value: float) -> str:
    """Return a ratio as text, or an empty text for NaN."""
    return "" if math.isnan(value) else f"{value:.2f}"


def mean_of(quantity: Callable[[str], float]) -> str:
    """Return the geometric mean over the models for which the quantity was measured."""
    return f"{statistics.geometric_mean(value for value in map(quantity, models()) if not math.isnan(value)):.1f}"


def extreme(choose: Callable[[Iterable[float]], float], quantity: Callable[[str], float]) -> str:
    """Return the smallest or the largest value of a quantity over the models for which it was measured."""
    return f"{choose(value for value in map(quantity, models()) if not math.isnan(value)):.2g}"


def _products_to_compile() -> str:
    counts = [count for count in map(products_to_compile, models()) if math.isfinite(count)]
    smallest, largest = (f"{float(f'{count:.1g}'):,.0f}" for count in (min(counts), max(counts)))
    return f"{smallest} to {largest}"


def _least_gain_of_compiling() -> str:
    return min((gain, model) for model in models() if not math.isnan(gain := gain_of_compiling(model)))[1]


def _half_cached() -> str:
    rows = results("budget")["rows"]
    times = {(row["model"], row["share"]): row["ms"] for row in rows}
    ratios = [times[model, 0.5] / times[model, 1.0] for model, share in times if share == 1.0]
    return f"{statistics.geometric_mean(ratios):.1f}"


def _count(row: dict[str, Any], constructed: bool = False) -> str:
    """Return a number of products as text, and the number of products that constructed the preconditioner."""
    found = f"{row['products']:,}" + (f" + {row['construction']:,}" if constructed else "")
    return found if row["converged"] else f"> {found}"


def _solve_rows() -> Iterator[tuple[str, str, int, dict[str, Any]]]:
    """Yield the model, the damping, the number of right-hand sides and the counts of each setting."""
    for model, case in results("preconditioning")["cases"].items():
        for damping, by_columns in case["solves"].items():
            for columns, rows in by_columns.items():
                yield model, f"{float(damping):.0e}", int(columns), rows


def _automatic(row: dict[str, Any]) -> str:
    """Return all products of a solve with ``preconditioner="auto"``, and the preconditioner that it took."""
    return f"{row['products'] + row['construction']:,} ({row['took'].partition(';')[0].partition(',')[0]})"


def preconditioning() -> str:
    """Tabulate the products of solves with each preconditioner."""
    names = ("none", "KFAC", "EKFAC", "exact blocks", "nystrom", "KFAC, low rank")
    lines = [
        [
            *(model, damping, str(columns)),
            *(_count(rows[name], name in names[4:]) for name in names),
            _automatic(rows["auto"]),
        ]
        for model, damping, columns, rows in _solve_rows()
        if "exact blocks" in rows
    ]
    return table(["model", "damping", "right-hand sides", *names, '"auto"'], lines)


def automatic() -> str:
    """Tabulate the products of solves with several blocks of columns."""
    names = ("none", "KFAC", "nystrom")
    lines = [
        [model, damping, *(_count(rows[name], name == "nystrom") for name in names), _automatic(rows["auto"])]
        for model, damping, _, rows in _solve_rows()
        if "exact blocks" not in rows
    ]
    return table(["model", "damping", *names, '"auto"'], lines)


def smallest() -> str:
    """Tabulate the products of searches for the smallest eigenvalues."""
    names = ("none", "KFAC")
    lines = [
        [model, f"{float(damping):.0e}", *(_count(rows[name]) for name in names)]
        for model, case in results("preconditioning")["cases"].items()
        for damping, rows in case["lobpcg"].items()
    ]
    return table(["model", "damping", *names], lines)


TABLES: dict[str, Callable[[], str]] = {
    "product": lambda: times("product"),
    "one batch": lambda: times("product", name="peers", contenders=ONE_BATCH),
    "blocks of columns": lambda: times("block of 8", "Gauss-Newton, block of 8"),
    "last layer": lambda: times("last layer"),
    "eigsh": lambda: times("eigsh"),
    "Gauss-Newton": lambda: times("Gauss-Newton"),
    "empirical Fisher": lambda: times("empirical Fisher"),
    "faster": faster,
    "density": densities,
    "solves": solves,
    "preconditioning": preconditioning,
    "automatic choice": automatic,
    "smallest eigenvalues": smallest,
    "product on a GPU": lambda: times("product", name="peers-gpu"),
    "density on a GPU": lambda: densities("density-gpu"),
    "peaks": peaks,
    "budget": budget,
    "large": large,
    "vocabulary": vocabulary,
    "goals": goals,
    "Kronecker factors": kronecker,
    "distributed": distributed,
    "choices": choices,
    "columns": columns,
}


def ratio(goal: str, of: str, key: str = "geometric_mean", name: str = "peers") -> float:
    """Return the measured ratio of times of a goal."""
    found = next(one for one in GOALS if (one.what, one.ratio) == (goal, of))
    return float((judged(found) if name == "peers" else reached(found, peer_rows(name)))[key])


def error(work: str, contender: str, model: str) -> float:
    """Return the relative error of a contender's product."""
    [row] = [row for row in results("peers")["rows"] if (row["work"], row["model"]) == (work, model)]
    return float(row["by"][contender]["error"])


_LAST_LAYER = "the last layer's block against curvlinops' submatrix"
_SINGLE = "one product against PyHessian's retained single batch"
_PRODUCT, _GGN = (
    "one product against the fastest peer",
    "one product of the Gauss-Newton matrix against the fastest peer",
)
_BLOCK, _PEER = "a block of 8 against the fastest peer", "fastest peer / curvop"


def _environment() -> str:
    about = results("peers")["environment"]
    return (
        f"{about['processor']}, {about['threads']} threads, Python {about['python']}, torch {about['torch']}, SciPy "
        f"{about['scipy']}, " + ", ".join(f"{name} {version}" for name, version in about["peers"].items())
    )


def _density() -> str:
    measured = results("density")
    return f"{measured['probes']} probes of {measured['steps']} steps"


def _solves() -> str:
    measured = results("solves")
    [rtol] = {row["rtol"] for row in measured["models"].values()}
    dampings = [row["damping"] / row["largest eigenvalue"] for row in measured["models"].values()]
    damping = f"{statistics.median(dampings):.0e} times the largest eigenvalue"
    return f"a damping of {damping}, a relative residual of {rtol:.0e} and models in {measured['dtype']}"


def _gpu() -> str:
    about = results("peers-gpu")["environment"]
    versions = (f"{name} {about[name.lower()]}" for name in ("CUDA", "Python", "torch", "SciPy"))
    return ", ".join([about["gpu"], *versions])


def _solves_of(layers: str) -> list[dict[str, Any]]:
    """Return the counts of all solves with all preconditioners, for models with 'one', 'several' or 'any' layers."""
    return [
        rows
        for model, *_, rows in _solve_rows()
        if "exact blocks" in rows and layers in ("any", "one" if model.startswith("wide layer") else "several")
    ]


def _wins(name: str, *, other: str = "none", layers: str = "any", constructed: bool = False) -> str:
    """Return in how many of the solves a preconditioner takes fewer products than another one, as text."""
    products = [
        [row[key]["products"] + constructed * row[key]["construction"] for key in (name, other)]
        for row in _solves_of(layers)
    ]
    return f"{sum(own < others for own, others in products)} of {len(products)}"


def _ratio_of_products(name: str, layers: str) -> str:
    """Return the geometric mean of the products with a preconditioner, relative to those without one."""
    ratios = [rows[name]["products"] / rows["none"]["products"] for rows in _solves_of(layers)]
    return f"{statistics.geometric_mean(ratios):.1f}"


def _automatic_share(choose: Callable[[Iterable[float]], float]) -> str:
    """Return the extreme share of the products of "auto" in those without a preconditioner, for several blocks."""
    found = [rows for *_, rows in _solve_rows() if "exact blocks" not in rows]
    shares = [(rows["auto"]["products"] + rows["auto"]["construction"]) / rows["none"]["products"] for rows in found]
    return f"{choose(shares):.1%}"


def _kfac_solve(model: str, name: str) -> str:
    """Return the products of a solve for one right-hand side with the smallest damping."""
    by_damping = results("preconditioning")["cases"][model]["solves"]
    return _count(by_damping[min(by_damping, key=float)]["1"][name])


def _preconditioning() -> str:
    measured = results("preconditioning")
    return (
        f"models in float64, dampings in units of the largest eigenvalue, a relative residual of {measured['rtol']:.0e}"
        f" and a rank of {measured['rank']}"
    )


def _search_wins() -> str:
    """Return in how many searches for the smallest eigenvalues KFAC converges with fewer products, as text."""
    found = [rows for case in results("preconditioning")["cases"].values() for rows in case["lobpcg"].values()]
    wins = sum(
        rows["KFAC"]["converged"]
        and not (rows["none"]["converged"] and rows["none"]["products"] <= rows["KFAC"]["products"])
        for rows in found
    )
    return f"{wins} of {len(found)}"


FIGURES: dict[str, Callable[[], str]] = {
    "environment": _environment,
    "product ratio": lambda: f"{ratio(_PRODUCT, _PEER):.1f}",
    "product ratio, compiled": lambda: f"{ratio(_PRODUCT, _PEER + ' compiled'):.1f}",
    "product worst": lambda: f"{ratio(_PRODUCT, _PEER, 'worst'):.1f}",
    "Gauss-Newton ratio": lambda: f"{ratio(_GGN, _PEER):.1f}",
    "block ratio": lambda: f"{ratio(_BLOCK, _PEER):.1f}",
    "block ratio, compiled": lambda: f"{ratio(_BLOCK, _PEER + ' compiled'):.1f}",
    "last layer ratio": lambda: f"{ratio(_LAST_LAYER, 'curvlinops to_scipy / curvop'):.0f}",
    "PyHessian ratio": lambda: f"{ratio(_SINGLE, 'PyHessian single / curvop, one batch'):.2f}",
    "gradients": lambda: f"{ratio('one product in gradients', 'curvop / gradient'):.2f}",
    "wrong": lambda: f"{results('peers')['wrong']:g}",
    "factor ratio": lambda: kronecker_figure("factors", statistics.geometric_mean),
    "factor worst": lambda: kronecker_figure("factors", min),
    "factor product ratio": lambda: kronecker_figure("product", statistics.geometric_mean),
    "factor inverse ratio": lambda: kronecker_figure("inverse", statistics.geometric_mean),
    "wrong eigenpairs": lambda: f"{results('peers')['wrong_eigenpairs']:g}",
    "their error": lambda: f"{error('product', 'curvlinops to_scipy', 'GPT 4 layers, d = 128'):.0e}",
    "our error": lambda: f"{error('product', 'curvop', 'GPT 4 layers, d = 128'):.0e}",
    "density setting": _density,
    "solves setting": _solves,
    "gpu": _gpu,
    "product ratio on a GPU": lambda: f"{ratio(_PRODUCT, _PEER, name='peers-gpu'):.0f}",
    "gradients on a GPU": lambda: f"{ratio('one product in gradients', 'curvop / gradient', name='peers-gpu'):.2f}",
    "compiled gain": lambda: mean_of(gain_of_compiling),
    "compiled gain, smallest": lambda: extreme(min, gain_of_compiling),
    "compiled gain, smallest, model": _least_gain_of_compiling,
    "products to compile": _products_to_compile,
    "no cache": lambda: mean_of(cost_of_no_cache),
    "half cached": _half_cached,
    "KFAC wins": lambda: _wins("KFAC"),
    "KFAC wins, several layers": lambda: _wins("KFAC", layers="several"),
    "EKFAC wins, several layers": lambda: _wins("EKFAC", layers="several"),
    "exact blocks win, several layers": lambda: _wins("exact blocks", layers="several"),
    "KFAC ratio, several layers": lambda: _ratio_of_products("KFAC", "several"),
    "auto, most": lambda: _automatic_share(max),
    "auto, least": lambda: _automatic_share(min),
    "nystrom wins": lambda: _wins("nystrom"),
    "nystrom wins, constructed": lambda: _wins("nystrom", constructed=True),
    "low rank wins": lambda: _wins("KFAC, low rank", other="nystrom"),
    "low rank wins, one layer": lambda: _wins("KFAC, low rank", other="nystrom", layers="one").partition(" ")[0],
    "low rank beats KFAC": lambda: _wins("KFAC, low rank", other="KFAC"),
    "preconditioning setting": _preconditioning,
    "wide layer, none": lambda: _kfac_solve("wide layer, untrained", "none"),
    "wide layer, KFAC": lambda: _kfac_solve("wide layer, untrained", "KFAC"),
    "wide layer, trained, none": lambda: _kfac_solve("wide layer, trained", "none"),
    "wide layer, trained, KFAC": lambda: _kfac_solve("wide layer, trained", "KFAC"),
    "digits, none": lambda: _kfac_solve("MLP, trained", "none"),
    "digits, KFAC": lambda: _kfac_solve("MLP, trained", "KFAC"),
    "digits, exact blocks": lambda: _kfac_solve("MLP, trained", "exact blocks"),
    "digits, nystrom": lambda: _kfac_solve("MLP, trained", "nystrom"),
    "searches won": _search_wins,
    "column gain": lambda: extreme(max, gain_of_columns),
    "column gain, smallest": lambda: extreme(min, gain_of_columns),
}


def substitutions() -> str:
    """Return the figures as reStructuredText substitutions."""
    return "\n".join(f".. |{name}| replace:: {make()}" for name, make in FIGURES.items())


def setup(app: Any) -> dict[str, Any]:
    """Register the directive ``measured``, whose argument is the name of a table."""
    from sphinx.util.docutils import SphinxDirective

    class Measured(SphinxDirective):
        required_arguments = 1
        final_argument_whitespace = True

        def run(self) -> list[Any]:
            for file in RESULTS.glob("*.json"):
                self.env.note_dependency(str(file))
            return list(self.parse_text_to_nodes(TABLES[self.arguments[0]]()))

    app.add_directive("measured", Measured)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
