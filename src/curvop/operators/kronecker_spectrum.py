"""Eigenvalues of Kronecker-factored matrices, with the layers to which they belong."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from curvop.operators.figures import add_legend, axes_or_new, line_properties, next_linestyle
from curvop.operators.summaries import TableSummary

__all__ = ["LayerEigenvalues"]

Array = NDArray[Any]

_ZERO = 1e-12  # eigenvalues below this fraction of the largest one count as zero in the table
_MAX_POINTS = 2000  # points of a line in a plot


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class LayerEigenvalues(TableSummary):
    """All eigenvalues of a block-diagonal matrix, with the layers to which they belong.

    ``A.eigenvalues()`` returns this class. Print it to see a table of the layers.

    Attributes
    ----------
    values : ndarray, shape (N,)
        Eigenvalues in float64, in ascending order.
    layers : tuple of str
        Names of the layers, in the order of the parameters. If a block has a single parameter, its name is used.
    owners : ndarray of int, shape (N,)
        For each eigenvalue, the index of its layer in ``layers``.

    Examples
    --------
    >>> import numpy as np
    >>> from curvop.operators.kronecker_spectrum import LayerEigenvalues
    >>> found = LayerEigenvalues.of_layers({"conv": np.array([3.0, 1.0]), "fc": np.array([2.0])})
    >>> found.values, found.owners
    (array([1., 2., 3.]), array([0, 1, 0]))
    >>> found.of("conv")
    array([1., 3.])
    """

    values: Array
    layers: tuple[str, ...]
    owners: Array

    @classmethod
    def of_layers(cls, values: Mapping[str, Array]) -> Self:
        """Create a result from the eigenvalues of each layer.

        Parameters
        ----------
        values : mapping of str to ndarray
            Eigenvalues of each layer, in any order.

        Returns
        -------
        LayerEigenvalues
            The eigenvalues of all layers.
        """
        joined = np.concatenate(list(values.values()))
        sizes = [len(part) for part in values.values()]
        order = np.argsort(joined, kind="stable")
        return cls(joined[order], tuple(values), np.repeat(np.arange(len(values)), sizes)[order])

    def of(self, layer: str) -> Array:
        """Return the eigenvalues of one layer.

        Parameters
        ----------
        layer : str
            One of ``layers``.

        Returns
        -------
        values : ndarray
            Its eigenvalues in ascending order.

        Raises
        ------
        KeyError
            If there is no such layer.
        """
        if layer not in self.layers:
            raise KeyError(f"no layer is named {layer!r}; known are {', '.join(self.layers)}")
        values: Array = self.values[self.owners == self.layers.index(layer)]
        return values

    @property
    def table(self) -> list[tuple[str, ...]]:
        """Cells of the printed table: a tuple of headings, followed by one tuple of strings for each layer."""
        lines: list[tuple[str, ...]] = [("layer", "number", "largest", "median", "smallest", "zero")]
        for layer in self.layers:
            values = self.of(layer)
            zero = np.count_nonzero(values <= _ZERO * self.values[-1]) / len(values)
            numbers = [f"{number:.3g}" for number in (values[-1], np.median(values), values[0])]
            lines.append((layer, f"{len(values):,}", *numbers, f"{zero:.0%}"))
        return lines

    def plot(self, ax: Any = None, *, label: str | None = None, color: Any = None, **properties: Any) -> Any:
        """Plot the eigenvalues of each layer in descending order, on logarithmic axes.

        Parameters
        ----------
        ax : matplotlib.axes.Axes, optional
            The axes to draw on. The default is the axes of a new figure.
        label : str, optional
            The name of the matrix, which the legend puts before the names of the layers. Pass it if you plot several
            matrices on the same axes.
        color : color, optional
            One color for all layers, which then differ in the style of their lines. By default, each layer has its own
            color from a palette for color-blind readers.
        **properties
            Properties of the lines, each a ``matplotlib.lines.Line2D``, for example ``linewidth=2``.

        Returns
        -------
        matplotlib.axes.Axes
            The axes.

        Raises
        ------
        ImportError
            If Matplotlib is not installed.
        TypeError, ValueError
            If `ax` is not a Matplotlib Axes, or if a property is invalid.

        Notes
        -----
        Eigenvalues below 1e-12 of the largest one are zero up to rounding errors, and are not shown. For a layer
        with more than 2000 eigenvalues, 2000 points are shown, evenly spaced on the logarithmic axis. If the axes have
        more than 12 lines, there is no legend.
        """
        properties = {"color": color, **properties}
        ax = axes_or_new(ax, properties)
        before = "" if label is None else f"{label}: "
        for layer in self.layers:
            values = self.of(layer)[::-1]
            values = values[values > _ZERO * self.values[-1]]
            ranks = np.unique(np.geomspace(1, max(len(values), 1), _MAX_POINTS).round().astype(int))[: len(values)]
            marker = "o" if len(values) == 1 else None
            style = line_properties(ax, properties, linewidth=1.2, marker=marker, markersize=3)
            style = {"linestyle": next_linestyle(ax, style["color"])} | style
            ax.plot(ranks, values[ranks - 1], label=f"{before}{layer}", **style)
        ax.set(xlabel="rank in the layer", ylabel="eigenvalue")
        if self.values[-1] > 0:  # a logarithmic axis cannot be drawn without a positive number
            ax.set(xscale="log", yscale="log")
        add_legend(ax)
        return ax
