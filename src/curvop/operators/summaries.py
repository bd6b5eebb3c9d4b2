"""How results show themselves: as text in a terminal, and as a table with a picture in a notebook."""

from __future__ import annotations

import base64
import html
import io
import itertools
import math
import sys
from collections.abc import Sequence
from typing import Any

__all__ = ["Summary", "TableSummary", "abridged", "html_image", "html_table", "rendered", "text_lines", "with_error"]

Rows = Sequence[Sequence[str]]

_MAX_ROWS = 20  # rows of an abridged table
_MAX_BYTES = 300_000  # size of a picture in a notebook that consists of vectors
_STYLE = "border-collapse: collapse; font-variant-numeric: tabular-nums"


class Summary:
    """Base class of results. ``repr`` is the text that ``print`` shows, and a notebook shows a table and a picture.

    A subclass defines ``__str__``, and can override the methods below. If the text contains a table, ``__str__`` and
    `_summary_table` use the same cells. A dataclass must be created with ``repr=False``, because otherwise the
    decorator replaces ``__repr__``.
    """

    _num_text_columns = 1  # columns of the table that are aligned left in a notebook

    def __repr__(self) -> str:
        return str(self)

    def _repr_html_(self) -> str:
        """Return the summary as HTML. Jupyter calls this method."""
        above, below = self._summary_text()
        head, *rows = self._summary_table() or [[]]
        parts = [
            f"<p>{html.escape(above)}</p>" if above else "",
            html_table(rows, head, self._num_text_columns) if rows else "",
            self._summary_picture(),
            f"<p>{html.escape(below)}</p>" if below else "",
        ]
        return "\n".join(part for part in parts if part)

    def _summary_text(self) -> tuple[str, str]:
        """Return the sentences above and below the table. The default is the whole text, above."""
        return str(self), ""

    def _summary_table(self) -> Rows:
        """Return the cells of the table: the headings, then one sequence of strings for each row."""
        return []

    def _draw_summary(self, figure: Any) -> bool:
        """Draw a picture of the result into an empty figure. Return False if there is no picture.

        The default is the plot of the method ``plot``, if the class has one.
        """
        plot = getattr(self, "plot", None)
        if plot is None:
            return False
        plot(ax=figure.subplots())
        return True

    def _summary_picture(self) -> str:
        """Return the picture as an HTML element, or '' if there is none or Matplotlib is not installed."""
        try:
            from matplotlib.figure import Figure  # not pyplot: a summary must not open or select a figure
        except ImportError:
            return ""
        figure = Figure(figsize=(6, 3.2), layout="constrained")
        if not self._draw_summary(figure):
            return ""
        kind, content = "svg", rendered(figure, "svg")
        if len(content) > _MAX_BYTES:
            kind, content = "png", rendered(figure, "png")
        return html_image(content, kind, f"plot of {type(self).__name__}")


class TableSummary(Summary):
    """Base class of results whose text is a table. A subclass defines the property `table`."""

    @property
    def table(self) -> list[tuple[str, ...]]:
        """Cells of the printed table: a tuple of headings, followed by one tuple of strings for each row."""
        raise NotImplementedError

    @property
    def lines(self) -> list[str]:
        """Rows of the table as lines of text, padded to equal length."""
        return text_lines(self.table)

    def __str__(self) -> str:
        above, below = self._summary_text()
        return "\n".join(part for part in (above, *self.lines, below) if part)

    def _summary_text(self) -> tuple[str, str]:
        return "", ""

    def _summary_table(self) -> Rows:
        return self.table


def text_lines(table: Rows) -> list[str]:
    """Return the rows of a table as lines of text. The first column is aligned left, all others are aligned right."""
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    return ["  ".join([f"{cells[0]:<{widths[0]}}", *map(str.rjust, cells[1:], widths[1:])]) for cells in table]


def abridged(table: Rows) -> list[Sequence[str]]:
    """Return a table of headings and at most 20 rows. If there are more rows, dots replace those in the middle."""
    head, *rows = table
    if len(rows) <= _MAX_ROWS:
        return [head, *rows]
    half = _MAX_ROWS // 2
    return [head, *rows[:half], ["..."] * len(head), *rows[-half:]]


def html_table(rows: Rows, head: Sequence[str] = (), num_text_columns: int = 0) -> str:
    """Return a table as HTML. The cells are escaped. The first `num_text_columns` columns are aligned left."""

    def line(cells: Sequence[str], tag: str) -> str:
        scope = ' scope="col"' if tag == "th" else ""
        left = [' style="text-align: left"'] * num_text_columns
        styled = itertools.zip_longest(left[: len(cells)], cells, fillvalue="")
        return f"<tr>{''.join(f'<{tag}{scope}{style}>{html.escape(cell)}</{tag}>' for style, cell in styled)}</tr>"

    top = f"<thead>{line(head, 'th')}</thead>\n" if head else ""
    body = "\n".join(line(cells, "td") for cells in rows)
    return f'<table style="{_STYLE}">\n{top}<tbody>\n{body}\n</tbody>\n</table>'


def rendered(figure: Any, kind: str) -> bytes:
    """Return a Matplotlib figure as the content of a file, for example of the kind 'png', 'svg' or 'pdf'."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format=kind, dpi=130)
    return buffer.getvalue()


def html_image(content: bytes, kind: str, text: str) -> str:
    """Return a picture as an HTML element that contains the data.

    Parameters
    ----------
    content : bytes
        The content of the file.
    kind : {'png', 'svg'}
        The file format.
    text : str
        The description of the picture, for readers who do not see it.
    """
    media = {"png": "image/png", "svg": "image/svg+xml"}[kind]
    data = base64.b64encode(content).decode()
    return f'<img alt="{html.escape(text)}" src="data:{media};base64,{data}">'


def with_error(value: float, error: float, digits: int = 6, sign: str = "+-") -> str:
    """Return a value and its error as text. The value has no digits below the last digit of the error.

    Parameters
    ----------
    value, error : float
        The value, and its error, which is not negative. The error is rounded to one digit, or to two digits if the
        first digit is 1.
    digits : int
        The largest number of significant digits of the value. If the error is smaller than the last digit, it is
        omitted.
    sign : str
        The text between the value and the error.

    Examples
    --------
    >>> with_error(1.234567, 0.01), with_error(1.234567, 0.0123), with_error(1.234567, 1e-9)
    ('1.23 +- 0.01', '1.235 +- 0.012', '1.23457')
    >>> with_error(1.234567e-7, 2e-9)
    '(1.23 +- 0.02)e-07'
    """
    value, error = float(value), float(error)
    plain = f"{value:z.{digits}g}"
    if 0 <= error < sys.float_info.min or not math.isfinite(value):  # subnormal numbers count as 0
        return plain
    if not math.isfinite(error):
        return f"{plain} {sign} {error}"
    shown, exponent = f"{error:.1e}".split("e")
    if shown[0] != "1" or shown == "1.0":
        shown, exponent = f"{error:.0e}".split("e")
    last = int(exponent) - len(shown.partition(".")[2])  # the power of ten of the last digit
    largest = max(abs(value), error)
    first = int(f"{largest:e}".split("e")[1])
    first = int(f"{largest:.{max(first - last, 0)}e}".split("e")[1])  # 9.96 with the error 0.1 is 10.0
    if last < first - digits + 1:
        return f"{value:#.{digits}g}".rstrip(".")
    if -5 < first < digits:
        places, value, error = max(-last, 0), round(value, -last), round(error, -last)
        return f"{value:z.{places}f} {sign} {error:.{places}f}"
    places = max(first - last, 0)
    value, error = value / 10.0**first, error / 10.0**first
    return f"({value:z.{places}f} {sign} {error:.{places}f})e{first:+03d}"
