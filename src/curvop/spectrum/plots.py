"""Matplotlib plots of spectral densities, block studies and tracked eigenvalues."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from curvop.operators.figures import axes_or_new

if TYPE_CHECKING:
    from curvop.spectrum.blocks import BlockStudy
    from curvop.spectrum.spectral_density import SpectralDensity
    from curvop.spectrum.track import Tracker

__all__ = ["blocks_size", "plot_blocks", "plot_density", "plot_track"]

_FLOOR = 0.1  # lower limit of a logarithmic density axis, as a fraction of the peak height of one eigenvalue
_LETTER_WIDTH = 0.067  # inches per letter of the table of blocks (8-point monospace font)


def plot_density(density: SpectralDensity, ax: Any = None, log: bool = True) -> Any:
    """Plot a spectral density with an error band. Vertical lines mark eigenvalues that are known exactly.

    Parameters
    ----------
    density : SpectralDensity
        The density to plot.
    ax : matplotlib.axes.Axes, optional
        The axes to draw on. The default is the axes of a new figure.
    log : bool, optional
        Whether the density axis is logarithmic. A logarithmic axis shows single eigenvalues even next to a cluster of
        thousands.

    Returns
    -------
    matplotlib.axes.Axes
        The axes.

    Raises
    ------
    ImportError
        If Matplotlib is not installed.

    Notes
    -----
    If the width of the error band is similar to the height of the peaks, the peaks are single quadrature nodes and do
    not show the shape of the density. To resolve this shape, compute the density with more Lanczos steps, or evaluate
    ``density.pdf`` with a larger ``sigma``.
    """
    ax = axes_or_new(ax)
    grid = density.grid()
    value, error = density.pdf(grid)
    lower, upper = np.maximum(value - np.nan_to_num(error), 0), value + np.nan_to_num(error)
    single = 1 / (density.size * density.sigma * (2 * np.pi) ** 0.5)  # the peak of one eigenvalue
    if log:
        ax.set_yscale("log")
        ax.set_ylim(_FLOOR * single, 3 * max(upper.max(), single))
        value, lower, upper = (np.maximum(line, _FLOOR * single) for line in (value, lower, upper))
    ax.fill_between(grid, lower, upper, alpha=0.3, linewidth=0)
    ax.plot(grid, value, linewidth=1.2)
    for index, atom in enumerate(density.atoms):
        ax.axvline(atom, color="tab:red", linewidth=0.8, alpha=0.6, label=None if index else "known eigenvalues")
    if len(density.atoms):
        ax.legend(frameon=False)
    ax.set(xlabel="eigenvalue", ylabel="density", title=f"{density.size:,} eigenvalues")
    ax.margins(x=0)
    return ax


def blocks_size(study: BlockStudy) -> tuple[float, float]:
    """Return a suitable figure size for `plot_blocks`.

    Parameters
    ----------
    study : BlockStudy
        The study to plot.

    Returns
    -------
    width, height : float
        The width and the height in inches.
    """
    count = len(study.names)
    return max(4 + _LETTER_WIDTH * len(study.lines[0]), 5 + 0.2 * count), sum(_heights(count))


def _heights(count: int) -> tuple[float, float]:
    """Return the heights in inches of the two parts of a plot of `count` blocks: the table and the matrix of norms."""
    return 0.9 + 0.3 * count, 2.8 + 0.22 * count


def plot_blocks(study: BlockStudy, figure: Any = None) -> Any:
    """Plot a table of the diagonal blocks with their densities. Below the table, plot the norms of all blocks.

    Parameters
    ----------
    study : BlockStudy
        The study to plot.
    figure : matplotlib.figure.Figure, optional
        An empty figure, preferably of the size that `blocks_size` returns. The default is a new figure. If the figure
        has no layout engine, this function sets the constrained layout, so that the table fits.

    Returns
    -------
    matplotlib.figure.Figure
        The figure.

    Raises
    ------
    ImportError
        If Matplotlib is not installed.
    ValueError
        If the study has no finished block, because time ran out during the first block.

    Notes
    -----
    Each density is smoothed with a window of about 1% of the width of the axis. The height of the curve is the number
    of eigenvalues in the window, on a logarithmic scale from 0.1 to the size of the largest block. Near zero, the
    window is narrower than the resolution of the quadrature, so gaps in the curve need not be gaps in the spectrum.
    More Lanczos steps close these gaps. The pale bars next to the dots are the error bars of the extreme eigenvalues.
    """
    count = len(study.names)
    if not count:
        raise ValueError("this study has no finished block: pass more seconds to `blocks`")
    if figure is None:
        figure = axes_or_new(None).figure
        figure.clear()
        figure.set_size_inches(*blocks_size(study))
    if figure.get_layout_engine() is None:
        figure.set_layout_engine("constrained")
    upper, lower = figure.subfigures(2, 1, height_ratios=_heights(count))
    _draw_table(study, upper.subplots())
    _draw_norms(study, lower.subplots())
    return figure


def _draw_table(study: BlockStudy, ax: Any) -> None:
    """Draw the density of each diagonal block in a row. The tick label of each row is a line of the table of blocks."""
    bounds = np.concatenate([study.smallest - study.smallest_errors, study.largest + study.largest_errors])
    bounds = np.concatenate([bounds[np.isfinite(bounds)], study.smallest, study.largest])
    positions = _symmetric_log(ax, float(bounds.min()), float(bounds.max()))
    to_axis = ax.xaxis.get_transform()
    at = to_axis.transform(positions)
    width = 0.004 * (at[-1] - at[0])
    ceiling = np.log(study.sizes.max() / _FLOOR)
    for row, density in enumerate(study.densities):

        def near(values: Any) -> Any:
            return np.exp(-0.5 * ((to_axis.transform_non_affine(values)[..., None] - at) / width) ** 2)

        share = np.einsum("km,kmp->p", density.weights, near(density.nodes)) / max(len(density.weights), 1)
        count = np.maximum(density.size * share + near(density.atoms).sum(0), _FLOOR)
        height = 0.85 * np.log(count / _FLOOR) / ceiling
        ax.fill_between(positions, row + 0.3, row + 0.3 - height, color="tab:gray", alpha=0.7, linewidth=0)
    rows = np.arange(len(study.names)) + 0.3
    ax.hlines(rows, study.smallest, study.largest, color="tab:gray", linewidth=0.8)
    for ends, errors, color in (
        (study.smallest, -study.smallest_errors, "tab:blue"),
        (study.largest, study.largest_errors, "tab:red"),
    ):
        beyond = np.clip(ends + errors, *positions[[0, -1]])  # bars of infinite errors end at the limits of the axis
        ax.hlines(rows, ends, beyond, color=color, linewidth=2.5, alpha=0.4)
    for name, ends, color in (("largest", study.largest, "tab:red"), ("smallest", study.smallest, "tab:blue")):
        ax.plot(ends, rows, "o", color=color, markersize=3, label=name)
    ax.set(yticks=range(-1, len(study.names)), ylim=(len(study.names) - 0.5, -1.5))
    ax.set_yticklabels(study.lines, fontsize=8, family="monospace", parse_math=False)
    ax.tick_params(axis="y", length=0, pad=10)
    ax.tick_params(axis="x", labelsize=8)
    ax.spines[["left", "right", "top"]].set_visible(False)
    ax.text(0, -1, "density", transform=ax.get_yaxis_transform(), fontsize=8, family="monospace", va="center_baseline")
    ax.legend(fontsize=8, frameon=False, ncols=2, loc="upper right", borderpad=0, borderaxespad=0)


def _symmetric_log(ax: Any, low: float, high: float) -> Any:
    """Set a symmetric logarithmic x axis for eigenvalues from `low` to `high`, with a label that names the scale.

    Return an array of 600 points that are evenly spaced on this axis.
    """
    from matplotlib.ticker import FixedLocator

    top = max(-low, high)
    threshold = 1e-5 * top or 1.0
    ax.set_xscale("symlog", linthresh=threshold)
    transform = ax.xaxis.get_transform()
    ends = transform.transform(np.array([min(low, -threshold), max(high, threshold)]))
    margin = 0.03 * (ends[1] - ends[0])
    points = transform.inverted().transform(np.linspace(ends[0] - margin, ends[1] + margin, 600))
    ax.set_xlim(points[0], points[-1])
    # Labels within a decade of the linear part would overlap the label of zero.
    exponents = np.arange(np.floor(np.log10(max(top, threshold))), np.log10(threshold) + 1, -2)
    powers = 10.0**exponents
    ax.xaxis.set_major_locator(FixedLocator([*-powers, 0.0, *powers]))
    ax.xaxis.set_minor_locator(FixedLocator([]))
    ax.set_xlabel(f"eigenvalue (symmetric log scale, linear below {threshold:.1g})", fontsize=8)
    return points


def _draw_norms(study: BlockStudy, ax: Any) -> None:
    """Draw the Frobenius norms of all blocks as an image with a logarithmic color scale."""
    from matplotlib.colors import LogNorm

    positive = study.norms[study.norms > 0]
    top = positive.max() if positive.size else 1.0
    low = max(positive.min(initial=top), 1e-6 * top)
    image = ax.imshow(np.maximum(study.norms, low), norm=LogNorm(low, max(top, 1.001 * low)), cmap="magma")
    ticks = range(len(study.names))
    ax.set(xticks=ticks, yticks=ticks, title="Frobenius norms of the blocks")
    ax.set_xticklabels(study.names, rotation=90, fontsize=8, parse_math=False)
    ax.set_yticklabels(study.names, fontsize=8, parse_math=False)
    ax.figure.colorbar(image, cax=ax.inset_axes([1.04, 0.1, 0.04, 0.8]))


def plot_track(tracker: Tracker, ax: Any = None, learning_rate: float | None = None) -> Any:
    """Plot tracked eigenvalues against the training steps, with the stability threshold of the optimizer.

    If the tracker follows the smallest eigenvalues, the threshold is not drawn.

    Parameters
    ----------
    tracker : Tracker
        The tracker that recorded the eigenvalues.
    ax : matplotlib.axes.Axes, optional
        The axes to draw on. The default is the axes of a new figure.
    learning_rate : float, optional
        The learning rate of gradient descent. If given, a dashed line shows ``2 / learning_rate``. Gradient descent
        becomes unstable if the sharpness exceeds this value [1]_. Do not pass it if the tracker has an optimizer.

    Returns
    -------
    matplotlib.axes.Axes
        The axes.

    Raises
    ------
    ImportError
        If Matplotlib is not installed.
    ValueError
        If `learning_rate` is given and the tracker has an optimizer.

    References
    ----------
    .. [1] J. M. Cohen, S. Kaur, Y. Li, J. Z. Kolter, A. Talwalkar, "Gradient descent on neural networks typically
       occurs at the edge of stability", ICLR 2021. arXiv:2103.00065
    """
    thresholds = tracker.thresholds
    if thresholds is not None and learning_rate is not None:
        raise ValueError(f"learning_rate is {learning_rate}, but the tracker has an optimizer: leave learning_rate out")
    ax = axes_or_new(ax)
    for index, values in enumerate(tracker.values.T):
        ax.plot(tracker.steps, values, linewidth=1.2, label=f"eigenvalue {index + 1}")
    if learning_rate is not None:
        ax.axhline(2 / learning_rate, color="black", linestyle="--", linewidth=1, label="2 / learning rate")
    if thresholds is not None and len(thresholds) and tracker._which != "SA":  # it limits the largest eigenvalue
        style = {"color": "black", "linestyle": "--", "linewidth": 1}
        if (thresholds == thresholds[0]).all():
            ax.axhline(thresholds[0], label=f"stability threshold {thresholds[0]:.4g}", **style)
        else:
            ax.plot(tracker.steps, thresholds, label="stability threshold", **style)
    ax.set(xlabel="step", ylabel="eigenvalue" if thresholds is None else "preconditioned eigenvalue")
    ax.legend(frameon=False)
    return ax
