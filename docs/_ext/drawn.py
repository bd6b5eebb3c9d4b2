"""Insert the figure that the code of a page draws.

The directive ``drawn`` runs the Python blocks of the page above its own line, as ``tests/test_docs.py`` does, and
inserts their last figure. The figure is therefore always that of the code.
"""

from __future__ import annotations

import contextlib
import io
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).parents[2] / "tests"))

from pages import blocks

__all__ = ["setup"]

#: Where the figures are written, below the folder of the pages; git ignores it, like the gallery.
FOLDER = "drawn"


def draw(page: Path, line: int, target: Path) -> None:
    """Run the Python blocks of a page that begin above a line, and save their last figure."""
    import matplotlib.pyplot as plt
    import torch

    plt.switch_backend("agg")
    namespace: dict[str, Any] = {"__name__": "page"}
    with (
        contextlib.redirect_stdout(io.StringIO()),
        contextlib.chdir(tempfile.mkdtemp()),
        torch.random.fork_rng(),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")  # the tests of the pages compare warnings
        for block in blocks(page):
            if block.language == "python" and block.line < line:
                exec(compile("\n" * (block.line - 1) + block.code, str(page), "exec"), namespace)
    target.parent.mkdir(exist_ok=True)
    plt.savefig(target, bbox_inches="tight")
    plt.close("all")


def setup(app: Any) -> dict[str, Any]:
    """Register the directive ``drawn``, whose options are those of ``image``."""
    from docutils.parsers.rst import directives
    from sphinx.util.docutils import SphinxDirective

    class Drawn(SphinxDirective):
        option_spec = {"alt": directives.unchanged_required, "width": directives.length_or_percentage_or_unitless}  # noqa: RUF012

        def run(self) -> list[Any]:
            page = Path(self.env.doc2path(self.env.docname))
            name = f"{FOLDER}/{page.stem}-{self.lineno}.svg"
            draw(page, self.lineno, Path(self.env.srcdir) / name)
            options = "".join(f"   :{key}: {value}\n" for key, value in self.options.items())
            return list(self.parse_text_to_nodes(f".. image:: {name}\n{options}"))

    app.add_directive("drawn", Drawn)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
