"""The files of a study: arrays, JSON, pictures, and one page to look at."""

from __future__ import annotations

import base64
import html
import io
import json
from pathlib import Path
from typing import Any

from curvop import __version__
from curvop.cli.findings import Findings
from curvop.cli.results import appearing
from curvop.storage.fingerprint import listed

__all__ = ["StudyFiles"]

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
    parts.append(f"<footer>curvop {html.escape(__version__)}</footer>")
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
