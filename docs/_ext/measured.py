"""Insert measured results into the pages: tables by the directive ``measured``, single figures by substitutions.

All values are read from the files in ``benchmarks/results`` when the site is built.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

__all__ = ["FIGURES", "TABLES", "setup", "substitutions"]

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"


def results(name: str) -> Any:
    """Return the results of a benchmark."""
    return json.loads((RESULTS / f"{name}.json").read_text())


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
    "PyHessian loader": "PyHessian, all batches",
    "by hand": "double backward by hand",
    "gradient": "a gradient",
}


def times(work: str, name: str = "peers", contenders: dict[str, str] = CONTENDERS) -> str:
    """Tabulate the times of one kind of work, with one row for each model."""
    rows = [row for row in results(name)["rows"] if row["work"] == work and "by" in row]
    measured = [key for key in contenders if any(key in row["by"] for row in rows)]
    lines = [[row["model"], f"{row['P']:,}", *(cell(row["by"].get(key)) for key in measured)] for row in rows]
    return table(["model", "parameters", *(contenders[key] for key in measured)], lines)


def peaks() -> str:
    """Tabulate the peak memory of two products."""
    names = {key: CONTENDERS[key] for key in CONTENDERS if key != "gradient"}
    names |= {"curvop, nothing kept": "curvop, nothing cached"}
    lines = []
    for row in results("peers")["peaks"]:
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


def densities(name: str = "density") -> str:
    """Tabulate the times of spectral densities, with the same number of probes and steps."""
    heads = {"autograd": "curvop", "compiled": "curvop, compiled", "curvlinops": "curvlinops"}
    models = results(name)["models"]
    measured = [key for key in heads if all(key in row["seconds"] for row in models.values())]
    lines = [
        [
            model,
            f"{row['P']:,}",
            str(row.get("steps", results(name)["steps"])),
            *(f"{row['seconds'][key]:.2g}\N{NO-BREAK SPACE}s" for key in measured),
            f"{row['ratio to curvlinops']['autograd']:.1f}",
            f"{row['recurrence / products']:.0%}",
        ]
        for model, row in models.items()
    ]
    head = ["model", "parameters", "steps", *(heads[key] for key in measured), "ratio", "recurrence / products"]
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


def density_goals() -> list[list[str]]:
    """Return the rows of the goals for densities: 2.5 times curvlinops, and 15 % for the recurrence."""
    models = list(results("density")["models"].values())
    rows = [
        (
            "a density against curvlinops'",
            f"curvlinops / curvop{'' if engine == 'autograd' else ' ' + engine}",
            "at least 2.5 (worst model)",
            [row["ratio to curvlinops"][engine] for row in models],
            min,
        )
        for engine in models[0]["ratio to curvlinops"]
    ]
    shares = [row["recurrence / products"] for row in models]
    rows.append(("the recurrence of a density", "recurrence / products", "at most 0.15 (worst model)", shares, max))
    lines = []
    for goal, quantity, target, figures, worst in rows:
        reached = worst(figures) >= 2.5 if worst is min else worst(figures) <= 0.15
        mean = statistics.geometric_mean(figures)
        lines.append([goal, quantity, target, f"{mean:.3g}", f"{worst(figures):.3g}", "yes" if reached else "no"])
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


def goals() -> str:
    """Tabulate every goal, reached or not."""
    lines = []
    for name in ("peers", "curvature"):
        for goal in results(name)["goals"]:
            if goal["geometric_mean"] is None:
                continue
            target = f"{'at most' if goal['at_most'] else 'at least'} {goal['target']:g} ({goal['judged']})"
            figures = [f"{goal[key]:.3g}" for key in ("geometric_mean", "worst")]
            lines.append([goal["goal"], goal["ratio"], target, *figures, "yes" if goal["reached"] else "no"])
    lines += density_goals()
    return table(["goal", "ratio of times", "target", "geometric mean", "worst", "reached"], lines)


TABLES: dict[str, Callable[[], str]] = {
    "product": lambda: times("product"),
    "one batch": lambda: times("product", contenders=ONE_BATCH),
    "last layer": lambda: times("last layer"),
    "eigsh": lambda: times("eigsh"),
    "Gauss-Newton": lambda: times("Gauss-Newton", "curvature"),
    "empirical Fisher": lambda: times("empirical Fisher", "curvature"),
    "density": densities,
    "solves": solves,
    "product on a GPU": lambda: times("product", "peers-gpu"),
    "density on a GPU": lambda: densities("density-gpu"),
    "peaks": peaks,
    "budget": budget,
    "large": large,
    "goals": goals,
    "distributed": distributed,
}


def ratio(goal: str, of: str, key: str = "geometric_mean", name: str = "peers") -> float:
    """Return the measured ratio of times of a goal."""
    [value] = {row[key] for row in results(name)["goals"] if (row["goal"], row["ratio"]) == (goal, of)}
    return float(value)


def error(work: str, contender: str, model: str) -> float:
    """Return the relative error of a contender's product."""
    [row] = [row for row in results("peers")["rows"] if (row["work"], row["model"]) == (work, model)]
    return float(row["by"][contender]["error"])


_LAST_LAYER = "the last layer's block against curvlinops' submatrix"
_SINGLE = "one product against PyHessian's retained single batch"
_PRODUCT, _THEIRS = "one product against curvlinops to_scipy()", "curvlinops to_scipy / curvop"


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


FIGURES: dict[str, Callable[[], str]] = {
    "environment": _environment,
    "product ratio": lambda: f"{ratio(_PRODUCT, _THEIRS):.1f}",
    "product ratio, compiled": lambda: f"{ratio(_PRODUCT, _THEIRS + ' compiled'):.1f}",
    "product worst": lambda: f"{ratio(_PRODUCT, _THEIRS, 'worst'):.1f}",
    "last layer ratio": lambda: f"{ratio(_LAST_LAYER, _THEIRS):.0f}",
    "PyHessian ratio": lambda: f"{ratio(_SINGLE, 'PyHessian single / curvop, one batch'):.2f}",
    "gradients": lambda: f"{ratio('one product in gradients', 'curvop / gradient'):.2f}",
    "wrong": lambda: f"{results('peers')['wrong']:g}",
    "wrong eigenpairs": lambda: f"{results('peers')['wrong_eigenpairs']:g}",
    "their error": lambda: f"{error('product', 'curvlinops to_scipy', 'GPT 4 layers, d = 128'):.0e}",
    "our error": lambda: f"{error('product', 'curvop', 'GPT 4 layers, d = 128'):.0e}",
    "density setting": _density,
    "solves setting": _solves,
    "gpu": _gpu,
    "product ratio on a GPU": lambda: f"{ratio(_PRODUCT, _THEIRS, name='peers-gpu'):.0f}",
    "gradients on a GPU": lambda: f"{ratio('one product in gradients', 'curvop / gradient', name='peers-gpu'):.2f}",
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
