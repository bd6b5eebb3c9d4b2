"""The results of ``curvop spectrum``, and the files that hold them: arrays, JSON, pictures and an HTML report."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import json
from pathlib import Path
from typing import Any

from curvop.checks.compare import Comparison
from curvop.cli.html_report import FILES, html_page
from curvop.cli.provenance import Provenance, duration
from curvop.cli.report import end_json, number_json
from curvop.operators.summaries import rendered, text_lines, with_error
from curvop.spectrum.blocks import BlockStudy
from curvop.spectrum.eigen import EigenResult
from curvop.spectrum.estimators import BoundedEstimate, Estimate
from curvop.spectrum.spectral_density import SpectralDensity
from curvop.storage.fingerprint import listed
from curvop.storage.result_files import FORMAT, appearing

__all__ = ["StudyFiles", "StudyResults"]

_QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)  # levels of the quantiles of the density in the JSON output


@dataclasses.dataclass(eq=False)
class StudyResults:
    """Results of a spectrum study.

    Attributes
    ----------
    problem, title : str
        Name of the problem, and title of the matrix, for example "Hessian".
    rows, parameters : int
        Number of rows of the matrix, and number of parameters of the problem.
    names : list of str
        Names of the parameters to which the rows belong.
    loss, gradient_norm : float
        Loss of the whole data set, and norm of its gradient.
    ends : list of EigenResult
        Eigenvalues at each end of the spectrum.
    trace, norm : Estimate or None
        Estimates of the trace and the Frobenius norm.
    density : SpectralDensity or None
        The spectral density.
    blocks : BlockStudy or None
        The study of each parameter's block, or of each layer's block if the matrix is an approximation.
    comparison : Comparison or None
        The error of the matrix, if it is an approximation. Its blocks are those of `blocks`.
    undone : list of str
        Messages about steps that were not finished. If the attribute of a result is None, the step that computes the
        result was not finished or not requested.
    notes : list of str
        Remarks about steps that were continued, or that use only a part of the records on disk.
    products : int
        Number of products that were computed, not counting those that were read from the journal.
    seconds : float
        Duration of the study.
    journal_bytes : int or None
        Size of the journal on disk.
    provenance : Provenance or None
        How the results were computed. `StudyFiles` needs it.
    """

    problem: str
    title: str
    rows: int
    parameters: int
    names: list[str]
    loss: float
    gradient_norm: float
    ends: list[EigenResult] = dataclasses.field(default_factory=list)
    trace: Estimate | None = None
    norm: Estimate | None = None
    density: SpectralDensity | None = None
    blocks: BlockStudy | None = None
    comparison: Comparison | None = None
    undone: list[str] = dataclasses.field(default_factory=list)
    notes: list[str] = dataclasses.field(default_factory=list)
    products: int = 0
    seconds: float = 0.0
    journal_bytes: int | None = None
    provenance: Provenance | None = None

    @property
    def heading(self) -> str:
        """The matrix and the problem, for example "Hessian of digits"."""
        return f"{self.title} of {self.problem}"

    @property
    def ok(self) -> bool:
        """True if all steps are finished and all eigenvalues are certified."""
        return not self.undone and all(end.ok for end in self.ends)

    @property
    def state(self) -> list[str]:
        """Messages about steps that were not finished, or one message that all are."""
        return self.undone or [
            "all steps are complete" + ("" if self.ok else ", but not all eigenvalues are certified")
        ]

    @property
    def facts(self) -> list[tuple[str, str]]:
        """Scalar results of the study, as a list of (name, value) pairs."""
        facts = [
            ("parameters", f"{self.parameters:,}"),
            ("rows", f"{self.rows:,}" + ("" if self.rows == self.parameters else f" ({', '.join(self.names)})")),
            ("loss", f"{self.loss:.6g}"),
            ("gradient norm", f"{self.gradient_norm:.3g}"),
        ]
        for name, estimate in (("trace", self.trace), ("Frobenius norm", self.norm)):
            if estimate is not None:
                exact = estimate.method == "closed form"
                facts.append((name, f"{estimate.value:.6g} (exact)" if exact else with_error(*estimate)))
        if self.density is not None:
            low, high = map(with_error, self.density.range, self.density.range_errors)
            name = "range of the eigenvalues" if self.density.exact else "range of the Ritz values"
            facts.append((name, f"{low} to {high}"))
        facts.append(("products computed", f"{self.products:,} in {duration(self.seconds)}"))
        if self.provenance is not None and len(self.provenance.runs) > 1:
            facts.append(("cost of all runs", dict(self.provenance.facts)["cost"]))
        if self.journal_bytes is not None:
            facts.append(("product journal on disk", f"{self.journal_bytes / 1e6:.3g} MB"))
        return facts

    @property
    def block_table(self) -> list[tuple[str, ...]]:
        """Cells of the table of blocks: headings, and one tuple of strings for each block.

        If the matrix is an approximation, the last column is the relative error of each block.
        """
        table = [] if self.blocks is None else self.blocks.table
        if self.comparison is None:
            return table
        found = {cells[0]: cells[4] for cells in self.comparison.table}
        return [(*cells, found[cells[0]]) for cells in table]

    def __str__(self) -> str:
        width = max(len(name) for name, _ in self.facts)
        lines = [self.heading, *(f"  {name:<{width}}  {value}" for name, value in self.facts)]
        for end in self.ends:
            lines += ["", str(end)]
        if self.blocks is not None:
            unfinished = [f"not studied, as time was up: {listed(self.blocks.unfinished)}"] * (not self.blocks.complete)
            lines += ["", *text_lines(self.block_table), *unfinished]
        if self.comparison is not None:
            lines += ["", "comparison with the exact matrix", str(self.comparison)]
        return "\n".join([*lines, "", *self.notes, *self.state])

    def json(self) -> dict[str, Any]:
        """Return the results as a JSON serializable dictionary.

        The eigenvalues at each end of the spectrum are in ascending order, and their bounds have the same order.
        Eigenvectors, the nodes of densities and the norms of off-diagonal blocks are only in the ``.npz`` files.
        """
        names = ("problem", "title", "rows", "parameters", "names", "undone", "notes", "products", "seconds")
        return {"format": FORMAT, **{name: getattr(self, name) for name in (*names, "journal_bytes")}} | {
            "loss": number_json(self.loss),
            "gradient_norm": number_json(self.gradient_norm),
            "ok": self.ok,
            "trace": _estimate_json(self.trace),
            "frobenius_norm": _estimate_json(self.norm),
            "density": None if self.density is None else _density_json(self.density),
            "ends": [end_json(end) for end in self.ends],
            "blocks": None if self.blocks is None else _blocks_json(self.blocks, self.comparison),
            **({} if self.comparison is None else {"comparison": self.comparison.json()}),
            "provenance": None if self.provenance is None else self.provenance.json(),
        }


class StudyFiles:
    """Folder with the result files of a study.

    An existing file is replaced only after the new file is complete. ``report.html`` does not refer to other files and
    contains no scripts. If matplotlib is not installed, no pictures are written.

    Parameters
    ----------
    directory : Path
        The folder.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._written: dict[str, Any] = {}
        self._pictures: dict[str, bytes] = {}

    @property
    def exist(self) -> bool:
        """True if the folder contains results of this run or an earlier run."""
        return (self._directory / "spectrum.json").exists()

    def prepare(self) -> None:
        """Import matplotlib if it is installed, so that the first call of `write` takes as long as later calls."""
        with contextlib.suppress(ImportError):
            importlib.import_module("matplotlib.figure")

    def write(self, results: StudyResults) -> None:
        """Write all files. Omit arrays and pictures that have not changed since the last call."""
        parts: dict[str, Any] = {f"eigenpairs_{end.which}": end for end in results.ends}
        parts |= {name: getattr(results, name) for name in ("density", "blocks") if getattr(results, name) is not None}
        changed = {name for name, part in parts.items() if self._written.get(name) is not part}
        for name in sorted(changed):
            parts[name].save(self._directory / f"{name}.npz")
        _write(self._directory / "spectrum.json", (json.dumps(results.json(), indent=2) + "\n").encode())
        for name, figure in _figures(results, changed).items():
            self._pictures[name] = rendered(figure, "png")
            for kind, content in (("png", self._pictures[name]), ("svg", rendered(figure, "svg"))):
                _write(self._directory / f"{name}.{kind}", content)
        present = [name for name in FILES if name == "spectrum.json" or (self._directory / name).exists()]
        _write(self._directory / "report.html", html_page(results, self._pictures, present).encode())
        self._written = parts


def _estimate_json(estimate: Estimate | None) -> dict[str, Any] | None:
    if estimate is None:
        return None
    return {"value": number_json(estimate.value), "error": number_json(estimate.error)}


def _quantile_json(quantile: BoundedEstimate) -> dict[str, Any]:
    return {name: number_json(getattr(quantile, name)) for name in ("value", "error", "low", "high")}


def _density_json(density: SpectralDensity) -> dict[str, Any]:
    return {
        "probes": len(density.nodes),
        "steps": density.num_steps,
        "exact": density.exact,
        "range": list(density.range),
        "range_errors": [number_json(error) for error in density.range_errors],
        "trace": _estimate_json(density.trace()),
        "quantiles": {str(share): _quantile_json(density.quantile(share)) for share in _QUANTILES},
    }


def _blocks_json(study: BlockStudy, comparison: Comparison | None) -> dict[str, Any]:
    parts = [] if comparison is None else comparison.blocks
    errors = {part.name: {"error": _estimate_json(part.error)} for part in parts}
    return {
        name: {
            "rows": density.size,
            "smallest": density.range[0],
            "largest": density.range[1],
            "smallest_error": number_json(density.range_errors[0]),
            "largest_error": number_json(density.range_errors[1]),
            "trace": float(density.trace().value),
            "norm": norm,
            "density": _density_json(density),
            **errors.get(name, {}),
        }
        for name, density, norm in zip(study.names, study.densities, study.norms.diagonal().tolist(), strict=True)
    }


def _figures(results: StudyResults, changed: set[str]) -> dict[str, Any]:
    """Return a dictionary with new figures of the density and of the blocks.

    A figure is omitted if its data have not changed. If matplotlib is not installed, the dictionary is empty.
    """
    if not changed:
        return {}
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return {}
    figures = {}
    if results.density is not None and changed - {"blocks"}:  # the picture also shows the eigenvalues
        figures["density"] = Figure(figsize=(9, 4.5), layout="constrained")
        axes = figures["density"].add_subplot()
        results.density.plot(axes)
        for end in results.ends:
            axes.plot(end.values, [axes.get_ylim()[0]] * len(end.values), "|", color="tab:red", markersize=14)
        axes.set(title="spectral density (red: extreme eigenvalues)", ylabel="density (log scale)")
    if "blocks" in changed and results.blocks is not None:
        from curvop.spectrum.plots import blocks_size

        figures["blocks"] = Figure(figsize=blocks_size(results.blocks), layout="constrained")
        results.blocks.plot(figures["blocks"])
    return figures


def _write(path: Path, content: bytes) -> None:
    with appearing(path) as temporary:
        temporary.write_bytes(content)
