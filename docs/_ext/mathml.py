"""Render formulas as MathML, which browsers display without a script."""

from __future__ import annotations

from typing import Any

from docutils import nodes
from docutils.utils.math import MathError
from docutils.utils.math.latex2mathml import tex2mathml
from sphinx.util import logging

__all__ = ["setup"]


def inline(translator: Any, node: nodes.math) -> None:
    """Write an inline formula."""
    translator.body.append(_markup(node, as_block=False))
    raise nodes.SkipNode


def display(translator: Any, node: nodes.math_block) -> None:
    """Write a displayed formula."""
    translator.body.append(f'<div class="formula">{_markup(node, as_block=True)}</div>\n')
    raise nodes.SkipNode


def _markup(node: nodes.Element, as_block: bool) -> str:
    try:
        return str(tex2mathml(" ".join(node.astext().split()), as_block=as_block))
    except MathError as error:
        logging.getLogger(__name__).warning("%s: %s", error, node.astext(), location=node)
        return ""


def setup(app: Any) -> dict[str, Any]:
    """Register the renderer under the name 'mathml'."""
    app.add_html_math_renderer("mathml", (inline, None), (display, None))
    return {"parallel_read_safe": True, "parallel_write_safe": True}
