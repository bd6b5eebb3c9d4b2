"""What all ``plot`` methods of results share: axes, a palette for color-blind readers, line styles and legends.

No function changes Matplotlib's global settings. Sizes of text are relative to the user's font size.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any

__all__ = [
    "GRAY",
    "PALETTE",
    "add_legend",
    "axes_or_new",
    "free_row",
    "line_properties",
    "next_color",
    "next_linestyle",
]

PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
"""Blue, vermilion, green, purple, orange and sky blue of M. Okabe, K. Ito, "Color universal design", 2008.

Readers with any kind of color blindness can tell these colors apart. The yellow of the set is too pale for thin lines.
"""

GRAY = "0.45"
"""The color of legend entries that apply to all lines, and of parts that need no color of their own."""

_LINESTYLES = ("-", "--", ":", "-.")
_MAX_ENTRIES = 12  # a longer legend covers too much of the plot
_TOP_ROW, _ROW_STEP = 0.94, 0.1  # rows of markers, as fractions of the height of the axes


def axes_or_new(ax: Any, properties: Mapping[str, Any] | None = None, height: float = 4) -> Any:
    """Return `ax`. If `ax` is None, create a figure and return its axes.

    Parameters
    ----------
    ax : matplotlib.axes.Axes or None
        The axes that the user passed.
    properties : mapping, optional
        The properties of a line that the user passed. They are checked before a figure is created.
    height : float
        The height of a new figure, in inches. The width is 7 inches.

    Raises
    ------
    ImportError
        If Matplotlib is not installed.
    TypeError
        If `ax` is something else, or if `properties` contains a name that is not a property of a line.
    ValueError
        If a property has an invalid value, for example an unknown color.
    """
    try:
        from matplotlib.axes import Axes
        from matplotlib.lines import Line2D

        if ax is None:
            import matplotlib.pyplot as plt  # a program without windows that passes axes does not need it
    except ImportError as error:
        raise ImportError('plots need matplotlib: pip install "curvop[plot]"') from error
    if ax is not None and not isinstance(ax, Axes):
        raise TypeError(
            f"ax is a {type(ax).__name__}, but must be a single Matplotlib Axes: pass for example axes[0] if "
            "axes is an array, and pass all other arguments by name"
        )
    try:
        Line2D([], [], **(properties or {}))
    except AttributeError as error:
        raise TypeError(f"{error}: pass a property of matplotlib.lines.Line2D, for example linewidth=2") from None
    return plt.subplots(figsize=(7, height), layout="constrained")[1] if ax is None else ax


def next_color(ax: Any) -> str:
    """Return the color of the palette that the fewest lines on the axes have."""
    colors = _colors(ax)
    return min(PALETTE, key=lambda color: colors.count(color.lower()))


def next_linestyle(ax: Any, color: Any) -> str:
    """Return a line style that differs from those of the latest lines of the same color on the axes."""
    from matplotlib.colors import to_hex

    return _LINESTYLES[_colors(ax).count(to_hex(color)) % len(_LINESTYLES)]


def _colors(ax: Any) -> list[str]:
    from matplotlib.colors import to_hex

    return [to_hex(line.get_color()) for line in ax.lines]


def line_properties(ax: Any, properties: Mapping[str, Any], **defaults: Any) -> dict[str, Any]:
    """Return the properties of a line: those of the user, then `defaults`, then the next color of the palette.

    Short names are replaced by the long ones, for example ``lw`` by ``linewidth``. The color None means the next color.
    """
    from matplotlib.cbook import normalize_kwargs
    from matplotlib.lines import Line2D

    given = {name: value for name, value in properties.items() if (name, value) != ("color", None)}
    return {"color": next_color(ax), **defaults, **normalize_kwargs(given, Line2D)}


def free_row(ax: Any) -> float:
    """Return the height of the first free row of markers below the upper edge, as a fraction of the height of the axes.

    Draw the markers with ``transform=ax.get_xaxis_transform()``.
    """
    transform = ax.get_xaxis_transform()
    taken = {float(y) for line in ax.lines if line.get_transform() is transform for y in line.get_ydata()[:1]}
    return next(row for row in (_TOP_ROW - _ROW_STEP * index for index in itertools.count()) if row not in taken)


def add_legend(ax: Any, *notes: str) -> None:
    """Update the legend. It has one entry for each label on the axes.

    Parameters
    ----------
    ax : matplotlib.axes.Axes
        The axes. If they have more than 12 labels, they get no legend.
    *notes : str
        The labels that apply to several lines, which come last.
    """
    handles, labels = ax.get_legend_handles_labels()
    order = sorted(range(len(labels)), key=lambda index: labels[index] in notes)
    if 0 < len(labels) <= _MAX_ENTRIES:
        entries = ([part[index] for index in order] for part in (handles, labels))
        legend = ax.legend(*entries, fontsize="small", framealpha=0.8, edgecolor="none")
        legend.set_in_layout(False)  # otherwise, the constrained layout shrinks axes that are narrower than the legend
    elif ax.get_legend() is not None:
        ax.get_legend().remove()
