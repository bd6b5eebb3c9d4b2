"""The files of a study: arrays, JSON, pictures, and one page to look at."""

from __future__ import annotations

import base64
import dataclasses
import html
import importlib.metadata
import io
import json
import math
from pathlib import Path
from typing import Any

from curvop.spectrum.blocks import BlockStudy
from curvop.spectrum.density import SpectralDensity
from curvop.spectrum.eigen import EigenResult
from curvop.spectrum.estimators import BoundedEstimate, Estimate
from curvop.storage.fingerprint import listed
from curvop.storage.result_files import appearing

__all__ = ["Findings", "StudyFiles"]

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 62em; margin: 2em auto; padding: 0 1em; color: #222 }
h1 { font-size: 1.5em } h2 { font-size: 1.15em; margin-top: 2em }
table { border-collapse: collapse; font-variant-numeric: tabular-nums }
td, th { padding: 0.15em 0.9em 0.15em 0; text-align: right } td:first-child, th:first-child { text-align: left }
th { border-bottom: 1px solid #999; font-weight: 600 }
img { max-width: 100% } .good { color: #06603a } .bad { color: #a11 } footer { margin-top: 3em; color: #777 }
"""


class StudyFiles:
    """The files of a study in a folder; each appears only when it is complete.

    ``report.html`` needs no other file, and executes nothing. Without matplotlib there are no pictures.

    Parameters
    ----------
    directory : Path
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._written: dict[str, Any] = {}
        self._pictures: dict[str, bytes] = {}

    @property
    def begun(self) -> bool:
        """Whether there are results of this run or of an earlier one."""
        return (self._directory / "spectrum.json").exists()

    def write(self, found: Findings) -> None:
        """Write everything that was found; arrays and pictures only of what this object has not written yet."""
        parts: dict[str, Any] = {f"eigenpairs_{end.which}": end for end in found.ends}
        parts |= {name: getattr(found, name) for name in ("density", "blocks") if getattr(found, name) is not None}
        fresh = {name for name, part in parts.items() if self._written.get(name) is not part}
        for name in sorted(fresh):
            parts[name].save(self._directory / f"{name}.npz")
        _write(self._directory / "spectrum.json", (json.dumps(found.json(), indent=2) + "\n").encode())
        for name, figure in _pictures(found, fresh).items():
            self._pictures[name] = _drawn(figure, "png")
            for kind, content in (("png", self._pictures[name]), ("svg", _drawn(figure, "svg"))):
                _write(self._directory / f"{name}.{kind}", content)
        _write(self._directory / "report.html", _page(found, self._pictures).encode())
        self._written = parts


def _pictures(found: Findings, wanted: set[str]) -> dict[str, Any]:
    if not wanted & {"density", "blocks"}:
        return {}
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return {}
    pictures = {}
    if found.density is not None and "density" in wanted:
        pictures["density"] = Figure(figsize=(9, 4.5), layout="constrained")
        axes = pictures["density"].add_subplot()
        found.density.plot(axes)
        for end in found.ends:
            axes.plot(end.values, [axes.get_ylim()[0]] * len(end.values), "|", color="tab:red", markersize=14)
        axes.set_title("density (red: eigenvalues found one by one)")
    if found.blocks is not None and "blocks" in wanted:
        from curvop.spectrum.plots import blocks_size

        pictures["blocks"] = Figure(figsize=blocks_size(found.blocks), layout="constrained")
        found.blocks.plot(pictures["blocks"])
    return pictures


def _drawn(figure: Any, kind: str) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format=kind, dpi=130)
    return buffer.getvalue()


def _write(path: Path, content: bytes) -> None:
    with appearing(path) as temporary:
        temporary.write_bytes(content)


def _page(found: Findings, pictures: dict[str, bytes]) -> str:
    title = html.escape(f"{found.title} of {found.problem}")
    parts = [f"<h1>{title}</h1>", _table(found.facts)]
    parts += [f'<p class="bad">{html.escape(one)}</p>' for one in found.undone]
    if "density" in pictures:
        parts += ["<h2>Density</h2>", _image(pictures["density"], "the density")]
    for end in found.ends:
        parts.append(f"<h2>Eigenvalues, {html.escape(end.which)}</h2>")
        parts.append(f'<p class="{"good" if end.ok else "bad"}">{html.escape(end.verdict)}</p>')
        rows = [("", "eigenvalue", "residual", "error at most")]
        for index, value in enumerate(end.values):
            certificate = end.certificate
            told = ("", "")
            if certificate is not None:
                told = (f"{certificate.residuals[index]:.1e}", f"{certificate.bounds[index]:.1e}")
            rows.append((str(index + 1), f"{value:.10g}", *told))
        parts.append(_table(rows[1:], rows[0]))
    if found.blocks is not None:
        study = found.blocks
        parts += ["<h2>Layer by layer</h2>"]
        if study.unfinished:
            parts.append(f'<p class="bad">not studied, as time was up: {html.escape(listed(study.unfinished))}</p>')
        head, *lines = study.table
        table = _table(lines, head)
        if "blocks" in pictures:
            parts.append(_image(pictures["blocks"], "the blocks: eigenvalues, traces, densities, and norms of all"))
            table = f"<details><summary>The table as text</summary>\n{table}\n</details>"
        parts.append(table)
    parts.append(f"<footer>curvop {importlib.metadata.version('curvop')}</footer>")
    body = "\n".join(parts)
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
        f"<style>{_STYLE}</style></head>\n<body>\n{body}\n</body></html>\n"
    )


def _table(rows: Any, head: Any = ()) -> str:
    lines = [f"<tr>{''.join(f'<th>{html.escape(cell)}</th>' for cell in head)}</tr>"] if head else []
    lines += [f"<tr>{''.join(f'<td>{html.escape(cell)}</td>' for cell in row)}</tr>" for row in rows]
    return "<table>\n" + "\n".join(lines) + "\n</table>"


def _image(png: bytes, text: str) -> str:
    return f'<img alt="{html.escape(text)}" src="data:image/png;base64,{base64.b64encode(png).decode()}">'


# What a study of a spectrum has found: for people, for programs.

_SHARES = (0.05, 0.25, 0.5, 0.75, 0.95)  # of a density's eigenvalues, for which its quantiles are told


@dataclasses.dataclass(eq=False)
class Findings:
    """All that ``curvop spectrum`` reports; what is None was not asked for, or is among what is `undone`."""

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
    undone: list[str] = dataclasses.field(default_factory=list)
    products: int = 0
    seconds: float = 0.0
    journal_bytes: int | None = None

    @property
    def ok(self) -> bool:
        """Whether everything is done, and all eigenvalues are certified."""
        return not self.undone and all(end.ok for end in self.ends)

    @property
    def facts(self) -> list[tuple[str, str]]:
        """The single figures, by name."""
        found = [
            ("parameters", f"{self.parameters:,}"),
            ("rows", f"{self.rows:,}" + ("" if self.rows == self.parameters else f" ({', '.join(self.names)})")),
            ("loss", f"{self.loss:.6g}"),
            ("gradient norm", f"{self.gradient_norm:.3g}"),
        ]
        for name, estimate in (("trace", self.trace), ("Frobenius norm", self.norm)):
            if estimate is not None:
                found.append((name, str(estimate)))
        if self.density is not None:
            low, high = self.density.range
            found.append(("range seen by the density", f"{low:.6g} to {high:.6g}"))
        cost = f"{self.products:,} in {self.seconds:.1f} s"
        found.append(("products, those answered from disk left out", cost))
        if self.journal_bytes is not None:
            found.append(("journal of the products, on disk", f"{self.journal_bytes / 1e6:.3g} MB"))
        return found

    def __str__(self) -> str:
        width = max(len(name) for name, _ in self.facts)
        lines = [f"{self.title} of {self.problem}", *(f"  {name:<{width}}  {value}" for name, value in self.facts)]
        for end in self.ends:
            lines += ["", str(end)]
        if self.blocks is not None:
            lines += ["", str(self.blocks)]
        return "\n".join([*lines, "", *(self.undone or ["everything that was asked for is done"])])

    def json(self) -> dict[str, Any]:
        """Return what JSON takes; the arrays are in the ``.npz`` files."""

        def number(value: Any) -> float | None:
            return float(value) if value is not None and math.isfinite(value) else None

        def estimate(found: Estimate | None) -> dict[str, Any] | None:
            return None if found is None else {"value": number(found.value), "error": number(found.error)}

        def quantile(found: BoundedEstimate) -> dict[str, Any]:
            return {name: number(getattr(found, name)) for name in ("value", "error", "low", "high")}

        def density(found: SpectralDensity) -> dict[str, Any]:
            return {
                "probes": len(found.nodes),
                "steps": found.num_steps,
                "exact": found.exact,
                "range": list(found.range),
                "range_errors": [number(error) for error in found.range_errors],
                "trace": estimate(found.trace()),
                "quantiles": {str(share): quantile(found.quantile(share)) for share in _SHARES},
            }

        names = ("problem", "title", "rows", "parameters", "names", "undone", "products", "seconds", "journal_bytes")
        own = {name: getattr(self, name) for name in names}
        return own | {
            "loss": number(self.loss),
            "gradient_norm": number(self.gradient_norm),
            "ok": self.ok,
            "trace": estimate(self.trace),
            "frobenius_norm": estimate(self.norm),
            "density": None if self.density is None else density(self.density),
            "ends": [
                {
                    "which": end.which,
                    "values": [float(value) for value in end.values],
                    "bounds": [] if end.certificate is None else [number(bound) for bound in end.certificate.bounds],
                    "converged": end.num_converged,
                    "ok": end.ok,
                    "verdict": end.verdict,
                }
                for end in self.ends
            ],
            "blocks": None
            if self.blocks is None
            else {
                name: {
                    "rows": found.size,
                    "smallest": found.range[0],
                    "largest": found.range[1],
                    "smallest_error": number(found.range_errors[0]),
                    "largest_error": number(found.range_errors[1]),
                    "trace": float(found.trace().value),
                    "norm": norm,
                    "density": density(found),
                }
                for name, found, norm in zip(
                    self.blocks.names,
                    self.blocks.densities,
                    self.blocks.norms.diagonal().tolist(),
                    strict=True,
                )
            },
        }
