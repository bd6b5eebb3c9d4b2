"""The HTML report of ``curvop spectrum``: one page without scripts, which contains its pictures."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from curvop.cli.provenance import Run, duration, shown_date
from curvop.cli.report import ENDS
from curvop.operators.summaries import html_image, with_error
from curvop.storage.fingerprint import listed

if TYPE_CHECKING:
    from curvop.cli.spectrum_results import StudyResults
    from curvop.spectrum.eigen import EigenResult

__all__ = ["FILES", "html_page"]

_PAIRS = "from curvop.spectrum import EigenResult\n{} = EigenResult.load('{}')"
FILES: dict[str, tuple[str, str]] = {
    "spectrum.json": (
        "all figures of this page, and more digits",
        "import json, pathlib\nresults = json.loads(pathlib.Path('spectrum.json').read_text())",
    ),
    "eigenpairs_LA.npz": (
        "the largest eigenvalues, with their eigenvectors and error bounds",
        _PAIRS.format("largest", "eigenpairs_LA.npz"),
    ),
    "eigenpairs_SA.npz": (
        "the smallest eigenvalues, with their eigenvectors and error bounds",
        _PAIRS.format("smallest", "eigenpairs_SA.npz"),
    ),
    "density.npz": (
        "the spectral density",
        "from curvop.spectrum import SpectralDensity\ndensity = SpectralDensity.load('density.npz')",
    ),
    "blocks.npz": (
        "the densities and the norms of the blocks",
        "from curvop.spectrum import BlockStudy\nblocks = BlockStudy.load('blocks.npz')",
    ),
    "runs.json": (
        "the runs that computed these results",
        "import json, pathlib\nruns = json.loads(pathlib.Path('runs.json').read_text())",
    ),
    "density.svg": ("the picture of the density, for a paper", ""),
    "density.png": ("the same for a slide", ""),
    "blocks.svg": ("the picture of the blocks, for a paper", ""),
    "blocks.png": ("the same for a slide", ""),
}
"""The files in the folder of a study: their contents, and the lines of Python that load them, if there are any."""

_STYLE = """
:root { color-scheme: light dark; --text: #222; --page: #fff; --soft: #666; --line: #ccc; --code: #f3f3f1;
  --good: #06603a; --bad: #a11; --link: #0b57a4 }
@media (prefers-color-scheme: dark) {
  :root { --text: #ddd; --page: #161618; --soft: #a0a0a0; --line: #48484c; --code: #242427; --good: #6fcf97;
    --bad: #ff8a80; --link: #8ab4f8 }
  img { filter: invert(0.91) hue-rotate(180deg) }
  .wide img { filter: brightness(0.88); border-radius: 6px }
}
* { box-sizing: border-box }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 66em; margin: 2em auto; padding: 0 1em; color: var(--text);
  background: var(--page) }
h1 { font-size: 1.6em; line-height: 1.2; margin: 0 0 0.4em; overflow-wrap: anywhere }
h2 { font-size: 1.2em; line-height: 1.3; margin: 2.2em 0 0.5em }
p, a { overflow-wrap: anywhere } a { color: var(--link) }
table { border-collapse: collapse; font-variant-numeric: tabular-nums }
th, td { padding: 0.2em 1.4em 0.2em 0; text-align: right; vertical-align: top; white-space: nowrap }
th:first-child, td:first-child { text-align: left }
th:last-child, td:last-child { padding-right: 0 }
thead th { border-bottom: 1px solid var(--line); font-weight: 600 }
tbody th { font-weight: 400 }
.facts th { color: var(--soft); width: 13em }
.facts td { text-align: left; white-space: normal; overflow-wrap: anywhere }
.files th, .files td { text-align: left } .files td:nth-child(2) { white-space: normal; min-width: 13em }
.scroll { overflow-x: auto; margin: 0.6em 0 }
.scroll:focus-visible { outline: 2px solid var(--link) }
.pair { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 27em), 1fr)); gap: 0 3em }
.pair > * { min-width: 0 }
figure { margin: 0.6em 0 } figcaption { color: var(--soft) }
img { display: block; max-width: 100%; height: auto } .wide img { max-width: none; width: 100%; min-width: 44em }
code, pre { font: 0.88em/1.45 ui-monospace, monospace; background: var(--code); border-radius: 3px; margin: 0 }
code { padding: 0.1em 0.3em } pre { padding: 0.35em 0.6em } pre code { padding: 0; font-size: 1em }
code span { display: inline-block; max-width: 100% }
.good { color: var(--good) } .bad { color: var(--bad) } .soft { color: var(--soft) }
@media (max-width: 40em) {
  th, td { padding-right: 0.8em } .facts th { width: 8em; white-space: normal }
}
@media print {
  :root { color-scheme: light; --text: #000; --page: #fff; --soft: #444; --line: #999; --code: #fff; --good: #000;
    --bad: #000; --link: #000 }
  body { font-size: 9.5pt; max-width: none; margin: 0; padding: 0 }
  img, .wide img { filter: none } .wide img { min-width: 0; width: auto; max-width: 100%; max-height: 20cm }
  .scroll { overflow: visible }
  h2 { break-after: avoid } section, figure, tr, pre { break-inside: avoid } thead { display: table-header-group }
  td, th { padding-right: 0.9em } .blocks { font-size: 8pt }
}
"""


def html_page(results: StudyResults, pictures: Mapping[str, bytes], files: Sequence[str]) -> str:
    """Return the report as an HTML page.

    The page contains the pictures, and needs neither scripts nor other files. Its links lead to the files in the same
    folder.

    Parameters
    ----------
    results : StudyResults
        The results.
    pictures : mapping of str to bytes
        PNG pictures of the density and of the blocks, as far as they exist.
    files : sequence of str
        Names of the files in the folder, keys of `FILES`.
    """
    parts = [f"<h1>{html.escape(results.heading)}</h1>", *_state(results), _facts(results.facts, "Key figures")]
    if results.provenance is not None:
        last = results.provenance.runs[-1]
        parts.insert(1, _paragraph(f"{shown_date(last.date)}, curvop {last.versions['curvop']}", "soft"))
    if "density" in pictures:
        parts += ["<h2>Density</h2>", _figure(pictures["density"], *_density_texts(results))]
    if results.ends:
        ends = "\n".join(_end(end) for end in results.ends)
        parts.append(f'<div class="pair">\n{ends}\n</div>')
    if results.blocks is not None:
        parts += _blocks(results, pictures)
    if results.comparison is not None:
        head, *rows = results.comparison.table
        parts += ["<h2>Comparison with the exact matrix</h2>", _table(rows, head, "Errors of the blocks")]
    if files:
        parts += _files(files)
    if results.provenance is not None:
        facts = results.provenance.facts
        parts += ["<h2>How this was computed</h2>", _facts(facts, "Provenance"), *_runs(results.provenance.runs)]
    body = "\n".join(parts)
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{html.escape(results.heading)}</title>\n<style>{_STYLE}</style>\n</head>\n"
        f"<body>\n<main>\n{body}\n</main>\n</body>\n</html>\n"
    )


def _state(results: StudyResults) -> list[str]:
    """Return paragraphs that state which steps are finished."""
    notes = [_paragraph(note) for note in results.notes]
    if results.ok:
        return [_paragraph("All steps are complete, and all eigenvalues are certified.", "good"), *notes]
    state = results.state
    for which, words in ENDS.items():
        state = [step.replace(f"eigenvalues {which}:", f"{words} eigenvalues:") for step in state]
    return [*(_paragraph(step, "bad") for step in state), *notes]


def _paragraph(text: str, kind: str = "") -> str:
    return f"<p{_class(kind)}>{html.escape(text)}</p>"


def _table(rows: Sequence[Sequence[str]], head: Sequence[str], name: str, kind: str = "") -> str:
    """Return a table in a container that scrolls if the table is too wide. The first cell of a row is its heading."""

    def line(cells: Sequence[str]) -> str:
        first, *others = map(html.escape, cells)
        return f'<tr><th scope="row">{first}</th>{"".join(f"<td>{_figures(cell)}</td>" for cell in others)}</tr>'

    return _container(
        f"<thead><tr>{''.join(_heading(cell) for cell in head)}</tr></thead>\n<tbody>\n"
        + "\n".join(map(line, rows))
        + "\n</tbody>",
        name,
        kind,
    )


def _heading(cell: str) -> str:
    return f'<th scope="col">{html.escape(cell)}</th>' if cell else "<td></td>"


def _figures(cell: str) -> str:
    return cell.replace("+-", "±")


def _container(content: str, name: str, kind: str) -> str:
    label = html.escape(name)
    return (
        f'<div class="scroll" role="region" aria-label="{label}" tabindex="0">\n<table{_class(kind)}>\n{content}\n'
        "</table>\n</div>"
    )


def _class(kind: str) -> str:
    return f' class="{kind}"' if kind else ""


def _facts(facts: Sequence[tuple[str, str]], name: str) -> str:
    """Return a table of names and values, whose values may break into several lines."""
    rows = []
    for fact, value in facts:
        text = html.escape(value)
        words = " ".join(f"<span>{word}</span>" for word in text.split(" "))  # no line break within a word
        cell = f"<code>{words}</code>" if fact == "command" else _figures(text)
        rows.append(f'<tr><th scope="row">{html.escape(fact)}</th><td>{cell}</td></tr>')
    return f'<table class="facts" aria-label="{name}">\n<tbody>\n' + "\n".join(rows) + "\n</tbody>\n</table>"


def _figure(picture: bytes, description: str, caption: str, kind: str = "scroll") -> str:
    image = html_image(picture, "png", description)
    return f'<figure>\n<div class="{kind}">{image}</div>\n<figcaption>{html.escape(caption)}</figcaption>\n</figure>'


def _density_texts(results: StudyResults) -> tuple[str, str]:
    """Return a description of the picture of the density, and its caption."""
    density = results.density
    if density is None:
        return "The spectral density", ""
    low, high = (f"{end:.3g}" for end in density.range)
    description = f"Plot of the spectral density: {density.size:,} eigenvalues between {low} and {high}"
    marks = "Red marks on the axis: the eigenvalues below." if results.ends else ""
    if density.exact:
        return description, f"All eigenvalues are known. {marks}".strip()
    probes, steps = len(density.nodes), density.num_steps
    caption = f"The density with its error band, from {probes} probes of {steps} Lanczos steps. {marks}"
    return description, caption.strip()


def _end(end: EigenResult) -> str:
    """Return the section about one end of the spectrum."""
    title = f"{ENDS[end.which]} eigenvalues".capitalize()
    certificate = end.certificate
    rows: list[tuple[str, ...]] = []
    for index, value in enumerate(end.values):
        number = str(index + 1)
        if certificate is None:
            rows.append((number, f"{value:.10g}"))
        else:
            bound, residual = certificate.bounds[index], certificate.residuals[index]
            rows.append((number, with_error(value, bound, 10), f"{bound:.1e}", f"{residual:.1e}"))
    head = ("", "eigenvalue") if certificate is None else ("", "eigenvalue", "error bound", "residual")
    verdict = _paragraph(end.verdict, "good" if end.ok else "bad")
    return f"<section>\n<h2>{title}</h2>\n{_table(rows, head, title)}\n{verdict}\n</section>"


def _blocks(results: StudyResults, pictures: Mapping[str, bytes]) -> list[str]:
    """Return the section about the blocks: picture, table, and the blocks that are missing."""
    parts, study = ["<h2>Layer by layer</h2>"], results.blocks
    if study is not None and study.unfinished:
        parts.append(_paragraph(f"not studied, as time was up: {listed(study.unfinished)}", "bad"))
    head, *rows = results.block_table
    if "blocks" in pictures:
        description = (
            f"Plot of the {len(rows)} blocks: their eigenvalues, traces and densities, and the norms of all blocks "
            "as an image"
        )
        caption = "Above: the density of each diagonal block. Below: the Frobenius norms of all blocks."
        parts.append(_figure(pictures["blocks"], description, caption, "scroll wide"))
    return [*parts, _table(rows, head, "Blocks", "blocks")]


def _files(files: Sequence[str]) -> list[str]:
    """Return the section about the files in the folder, with the lines that load them."""
    rows = []
    for name in files:
        content, lines = FILES[name]
        code = f"<pre><code>{html.escape(lines, quote=False)}</code></pre>" if lines else ""
        rows.append(
            f'<tr><th scope="row"><a href="{name}">{name}</a></th><td>{html.escape(content)}</td><td>{code}</td></tr>'
        )
    head = "".join(map(_heading, ("file", "content", "Python, in this folder")))
    table = f"<thead><tr>{head}</tr></thead>\n<tbody>\n" + "\n".join(rows) + "\n</tbody>"
    return ["<h2>Files</h2>", _container(table, "Files", "files")]


def _runs(runs: Sequence[Run]) -> list[str]:
    """Return the table of runs, if there is more than one."""
    if len(runs) < 2:
        return []
    rows = [
        (
            f"{index + 1}",
            shown_date(run.date),
            f"{run.products:,}",
            duration(run.seconds),
            run.end,
            run.versions.get("curvop", "unknown"),
        )
        for index, run in enumerate(runs)
    ]
    head = ("run", "date", "products", "time", "end", "curvop")
    return ["<h2>Runs</h2>", _table(rows, head, "Runs")]
