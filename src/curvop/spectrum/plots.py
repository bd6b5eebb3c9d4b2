"""Matplotlib plots of spectral densities, eigenvalues, block studies and tracked eigenvalues."""

from __future__ import annotations

import textwrap
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from curvop.operators.figures import GRAY, PALETTE, add_legend, axes_or_new, free_row, line_properties
from curvop.operators.validation import real_scalar

if TYPE_CHECKING:
    from curvop.spectrum.blocks import BlockStudy
    from curvop.spectrum.eigen_result import EigenResult
    from curvop.spectrum.spectral_density import SpectralDensity
    from curvop.spectrum.track import Tracker

__all__ = ["blocks_size", "plot_blocks", "plot_density", "plot_eigenvalues", "plot_norms", "plot_track"]

_BAND, _KNOWN, _NEGATIVE = _NOTES = ("band: ± error", "known eigenvalues", "negative eigenvalues")
_ENTRY_WIDTH = 34  # letters that fit into the legend of a figure of 3.3 inches
_MAX_POINTS = 8192  # of the curve of a density, which take about one second
_SMALLEST, _LARGEST = PALETTE[:2]  # colors of the ends of the blocks' spectra
_FLOOR = 0.1  # lower limit of a logarithmic density axis, as a fraction of the peak height of one eigenvalue
_LETTER_WIDTH = 0.067  # inches per letter of the table of blocks (8-point monospace font)


def plot_density(
    density: SpectralDensity,
    ax: Any = None,
    log: bool = True,
    *,
    label: str | None = None,
    color: Any = None,
    sigma: float | None = None,
    **properties: Any,
) -> Any:
    """Plot a spectral density with an error band. Ticks at the upper edge mark eigenvalues that are known exactly.

    To compare densities, plot them on the same axes with different labels. The limits of the axes grow to show all.

    Parameters
    ----------
    density : SpectralDensity
        The density to plot.
    ax : matplotlib.axes.Axes, optional
        The axes to draw on. The default is the axes of a new figure.
    log : bool, optional
        Whether the density axis is logarithmic. A logarithmic axis shows single eigenvalues even next to a cluster of
        thousands. If the axis of `ax` is logarithmic already, it stays so.
    label : str, optional
        The name of the density in the legend. The default is the number of its eigenvalues. The legend also contains
        `sigma` and names the band.
    color : color, optional
        The color of the curve, its band and the ticks. The default is the next color of a palette for color-blind
        readers.
    sigma : float, optional
        The standard deviation of the normal distributions that replace the nodes, as in ``density.pdf``. The default is
        ``density.sigma``. The curve has at most 8192 points, which resolve values from 1/2700 of the width of
        ``density.range`` on.
    **properties
        Properties of the curve, a ``matplotlib.lines.Line2D``, for example ``linestyle="--"``.

    Returns
    -------
    matplotlib.axes.Axes
        The axes.

    Raises
    ------
    ImportError
        If Matplotlib is not installed.
    TypeError, ValueError
        If `sigma` is not a positive number, if `ax` is not a Matplotlib Axes, or if a property is invalid.

    Notes
    -----
    The band shows the error of ``density.pdf``, which combines the standard error over the probes with the bounds of
    the quadrature. If the width of the error band is similar to the height of the peaks, the peaks are single
    quadrature nodes and do not show the shape of the density. To resolve this shape, compute the density with more
    Lanczos steps, or pass a larger `sigma`.
    """
    sigma = density._checked_sigma(sigma)
    ax = axes_or_new(ax, {"color": color, **properties})
    low, high = density.range
    grid = density.grid(int(np.clip(3 * (high - low) / sigma, 1024, _MAX_POINTS)), sigma)
    value, error = density.pdf(grid, sigma)
    lower, upper = np.maximum(value - np.nan_to_num(error), 0), value + np.nan_to_num(error)
    single = 1 / (density.size * sigma * (2 * np.pi) ** 0.5)  # the peak of one eigenvalue
    if log or ax.get_yscale() == "log":
        limits = [_FLOOR * single, 3 * max(upper.max(), single)]
        if ax.has_data() and ax.get_yscale() == "log":
            limits.extend(ax.get_ylim())
        ax.set_ylim(min(limits), max(limits))  # before the scale changes, as limits <= 0 would cause a warning
        ax.set_yscale("log")
        lower, upper = (
            np.maximum(edge, 1e-3 * min(limits)) for edge in (lower, upper)
        )  # no point is far below the axes
    style = line_properties(ax, {"color": color, **properties}, linewidth=1.2)
    name = f"{density.size:,} eigenvalues" if label is None else label
    ax.plot(grid, value, label=_entry(name, f"sigma = {sigma:.3g}"), **style)
    if np.isfinite(error).any() and not density.exact:
        ax.fill_between(grid, lower, upper, color=style["color"], alpha=0.3, linewidth=0)
        _note(ax, _BAND, lambda: ax.fill_between([], [], color=GRAY, alpha=0.4, linewidth=0))
    if len(density.atoms):
        row, marks = free_row(ax), {"linestyle": "none", "marker": "|", "markersize": 7}
        rows, transform = np.full(len(density.atoms), row), ax.get_xaxis_transform()
        ax.plot(density.atoms, rows, color=style["color"], transform=transform, **marks)
        _note(ax, _KNOWN, lambda: ax.plot([], [], color=GRAY, **marks)[0])
    ax.set(xlabel="eigenvalue", ylabel="density")
    ax.margins(x=0)
    add_legend(ax, *_NOTES)
    return ax


def _entry(name: str, remark: str) -> str:
    """Return the text of a legend entry. A long remark starts a new line, so that the legend fits a narrow figure."""
    remark = textwrap.fill(f"({remark})", _ENTRY_WIDTH)
    return f"{name}{' ' if len(name) + len(remark) < _ENTRY_WIDTH else chr(10)}{remark}"


def _note(ax: Any, label: str, draw: Callable[[], Any]) -> None:
    """Add a legend entry that applies to several lines, unless the axes have it. `draw` draws an empty artist."""
    if label not in ax.get_legend_handles_labels()[1]:
        draw().set_label(label)


def plot_eigenvalues(
    result: EigenResult,
    ax: Any = None,
    kind: str = "spectrum",
    *,
    log: bool = True,
    label: str | None = None,
    color: Any = None,
    **properties: Any,
) -> Any:
    """Plot eigenvalues with their error bounds as error bars.

    Parameters
    ----------
    result : EigenResult
        The eigenvalues.
    ax : matplotlib.axes.Axes, optional
        The axes to draw on. The default is the axes of a new figure.
    kind : {'spectrum', 'scree'}, optional
        With 'spectrum', each eigenvalue is a tick at its place on the horizontal axis. The ticks form a row below the
        upper edge, so the plot can be added to that of a density. Each further result gets a new row. With
        'scree', the eigenvalues are plotted against their index, from the largest down.
    log : bool, optional
        Whether a scree plot shows magnitudes on a logarithmic axis. Negative eigenvalues are then open circles, and
        zeros are not shown. If False, a scree plot shows the values, unless the axis of `ax` is logarithmic already. A
        spectrum ignores this argument.
    label : str, optional
        The name of the result in the legend. The default is the number of eigenvalues and `which`. The legend also
        says what the error bars are.
    color : color, optional
        The color of the markers and the error bars. The default is the next color of a palette for color-blind readers.
    **properties
        Properties of the line that draws the markers, a ``matplotlib.lines.Line2D``, for example ``linestyle="-"``.

    Returns
    -------
    matplotlib.axes.Axes
        The axes.

    Raises
    ------
    ImportError
        If Matplotlib is not installed.
    TypeError, ValueError
        If `kind` is unknown, if the result contains no eigenvalues, if `ax` is not a Matplotlib Axes, or if a property
        is invalid.

    Notes
    -----
    The error bars are the bounds of the certificate. Without a certificate, there are no error bars, and the legend
    says so. An infinite bound is not drawn; the legend gives the number of infinite bounds. The legend also says if the
    certificate reports missed eigenvalues, and if the solver did not converge.
    """
    if kind not in ("spectrum", "scree"):
        raise ValueError(f"kind is {kind!r}, but must be 'spectrum' or 'scree'")
    if not len(result.values):
        raise ValueError("the result contains no eigenvalues, so there is nothing to plot: see result.verdict")
    properties = {"color": color, **properties}
    ax = axes_or_new(ax, properties, height=4 if kind == "scree" else 2)
    values, bounds, remarks = result.values, None, ["not certified"]
    if result.certificate is not None:
        bounds = np.where(np.isfinite(result.certificate.bounds), result.certificate.bounds, np.nan)
        infinite = f", {np.isnan(bounds).sum()} infinite" if np.isnan(bounds).any() else ""
        remarks = [f"bars: error bounds{infinite}"]
        remarks += ["some missed"] if result.certificate.missed is not None else []
    remarks += [] if result.converged else ["not converged"]
    name = f"{len(values)} eigenvalue{'s' * (len(values) > 1)} ({result.which})" if label is None else label
    bars = {"label": _entry(name, ", ".join(remarks)), "capsize": 2, "elinewidth": 1}
    if kind == "spectrum":
        alone = not ax.has_data()
        if alone:
            ax.yaxis.set_visible(False)
        style = line_properties(ax, properties, linestyle="none", marker="|", markersize=9)
        transform = ax.get_xaxis_transform()
        ax.errorbar(values, np.full(len(values), free_row(ax)), xerr=bounds, transform=transform, **bars, **style)
        widest = 0.0 if bounds is None else 2 * np.nan_to_num(bounds).max()
        if alone and np.ptp(values) <= widest:  # without zero, the axis would show only the width of the error bars
            ax.update_datalim([(0, 0)], updatey=False)
            ax.autoscale_view(scaley=False)
        ax.set_xlabel("eigenvalue")
    else:
        log = log or ax.get_yscale() == "log"  # a logarithmic axis would not show negative values
        _draw_scree(ax, np.abs(values) if log else values, bounds, values < 0, log, bars, properties)
    add_legend(ax, *_NOTES)
    return ax


def _draw_scree(
    ax: Any, heights: Any, bounds: Any, negative: Any, log: bool, bars: dict[str, Any], properties: dict[str, Any]
) -> None:
    """Draw `heights` with error bars against their index, in descending order."""
    from matplotlib.ticker import MaxNLocator

    order = np.argsort(-heights, kind="stable")
    index, heights, negative = np.arange(1, len(heights) + 1), heights[order], negative[order]
    style = line_properties(ax, properties, linestyle="none", marker="o", markersize=4)
    if log and heights.any():  # a logarithmic axis cannot be drawn without a positive number
        ax.set_yscale("log")
    ax.errorbar(index, heights, yerr=None if bounds is None else bounds[order], **bars, **style)
    if log and negative.any():
        open_circles = style | {"linestyle": "none", "markerfacecolor": "white", "zorder": 3}
        ax.plot(index[negative], heights[negative], **open_circles)
        _note(ax, _NEGATIVE, lambda: ax.plot([], [], **open_circles | {"color": GRAY})[0])
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    of = "magnitude" if log else "value"
    ax.set(xlabel=f"index, by decreasing {of}", ylabel="|eigenvalue|" if log else "eigenvalue")


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


def plot_blocks(
    study: BlockStudy, figure: Any = None, *, label: str | None = None, color: Any = None, **properties: Any
) -> Any:
    """Plot a table of the diagonal blocks with their densities. Below the table, plot the norms of all blocks.

    Parameters
    ----------
    study : BlockStudy
        The study to plot.
    figure : matplotlib.figure.Figure, optional
        An empty figure, preferably of the size that `blocks_size` returns. The default is a new figure. If the figure
        has no layout engine, this function sets the constrained layout, so that the table fits.
    label : str, optional
        The title of the figure. By default, there is none.
    color : color, optional
        The color of the densities. The default is gray.
    **properties
        Properties of the dots at the extreme eigenvalues, each row of dots a ``matplotlib.lines.Line2D``, for example
        ``markersize=5``.

    Returns
    -------
    matplotlib.figure.Figure
        The figure.

    Raises
    ------
    ImportError
        If Matplotlib is not installed.
    TypeError, ValueError
        If the study has no finished block, because time ran out during the first block. If a property is invalid.

    See Also
    --------
    plot_norms : Plot only the norms, on given axes.

    Notes
    -----
    Each density is smoothed with a window of about 1% of the width of the axis. The height of the curve is the number
    of eigenvalues in the window, on a logarithmic scale from 0.1 to the size of the largest block. Near zero, the
    window is narrower than the resolution of the quadrature, so gaps in the curve need not be gaps in the spectrum.
    More Lanczos steps close these gaps. The pale bars next to the dots are the error bars of the extreme eigenvalues.
    """
    _check_finished(study)
    count, properties = len(study.names), {"color": color, **properties}
    if figure is None:
        figure = axes_or_new(None, properties).figure
        figure.clear()
        figure.set_size_inches(*blocks_size(study))
    if figure.get_layout_engine() is None:
        figure.set_layout_engine("constrained")
    if label is not None:
        figure.suptitle(label)
    upper, lower = figure.subfigures(2, 1, height_ratios=_heights(count))
    _draw_table(study, upper.subplots(), properties)
    plot_norms(study, lower.subplots())
    return figure


def _check_finished(study: BlockStudy) -> None:
    if not study.names:
        raise ValueError("this study has no finished block: pass more seconds to `blocks`")


def _draw_table(study: BlockStudy, ax: Any, properties: dict[str, Any]) -> None:
    """Draw the density of each diagonal block in a row. The tick label of each row is a line of the table of blocks."""
    bounds = np.concatenate([study.smallest - study.smallest_errors, study.largest + study.largest_errors])
    bounds = np.concatenate([bounds[np.isfinite(bounds)], study.smallest, study.largest])
    positions = _symmetric_log(ax, float(bounds.min()), float(bounds.max()))
    to_axis = ax.xaxis.get_transform()
    at = to_axis.transform(positions)
    width = 0.004 * (at[-1] - at[0])
    ceiling = np.log(study.sizes.max() / _FLOOR)
    style = line_properties(ax, properties, color=GRAY, linestyle="none", marker="o", markersize=3)
    for row, density in enumerate(study.densities):

        def near(values: Any) -> Any:
            return np.exp(-0.5 * ((to_axis.transform_non_affine(values)[..., None] - at) / width) ** 2)

        share = np.einsum("km,kmp->p", density.weights, near(density.nodes)) / max(len(density.weights), 1)
        count = np.maximum(density.size * share + near(density.atoms).sum(0), _FLOOR)
        height = 0.85 * np.log(count / _FLOOR) / ceiling
        ax.fill_between(positions, row + 0.3, row + 0.3 - height, color=style["color"], alpha=0.7, linewidth=0)
    rows = np.arange(len(study.names)) + 0.3
    ax.hlines(rows, study.smallest, study.largest, color=style["color"], linewidth=0.8)
    for ends, errors, color in (
        (study.smallest, -study.smallest_errors, _SMALLEST),
        (study.largest, study.largest_errors, _LARGEST),
    ):
        beyond = np.clip(ends + errors, *positions[[0, -1]])  # bars of infinite errors end at the limits of the axis
        ax.hlines(rows, ends, beyond, color=color, linewidth=2.5, alpha=0.4)
    for name, ends, color in (("largest", study.largest, _LARGEST), ("smallest", study.smallest, _SMALLEST)):
        ax.plot(ends, rows, label=name, **style | {"color": color})
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


def plot_norms(study: BlockStudy, ax: Any = None, *, label: str | None = None, **properties: Any) -> Any:
    """Plot the Frobenius norms of all blocks as an image with a logarithmic color scale.

    Parameters
    ----------
    study : BlockStudy
        The study to plot.
    ax : matplotlib.axes.Axes, optional
        The axes to draw on. The default is the axes of a new figure.
    label : str, optional
        The title of the axes. The default is "Frobenius norms of the blocks".
    **properties
        Properties of the ``matplotlib.image.AxesImage``, as in ``ax.imshow``, for example ``cmap="cividis"``.

    Returns
    -------
    matplotlib.axes.Axes
        The axes. Their attribute ``images[0]`` is the image, for example for a color bar of your own.

    Raises
    ------
    ImportError
        If Matplotlib is not installed.
    TypeError, ValueError
        If the study has no finished block, because time ran out during the first block. If `ax` is not a Matplotlib
        Axes.

    Notes
    -----
    Norms below 1e-6 of the largest norm have the same color as 1e-6 of the largest norm.
    """
    _check_finished(study)
    ax = axes_or_new(ax, height=max(4, _heights(len(study.names))[1]))
    from matplotlib.colors import LogNorm

    positive = study.norms[study.norms > 0]
    top = positive.max() if positive.size else 1.0
    low = max(positive.min(initial=top), 1e-6 * top)
    defaults = {"norm": LogNorm(low, max(top, 1.001 * low)), "cmap": "magma"}
    image = ax.imshow(np.maximum(study.norms, low), **defaults | properties)
    ticks = range(len(study.names))
    ax.set(xticks=ticks, yticks=ticks, title="Frobenius norms of the blocks" if label is None else label)
    ax.set_xticklabels(study.names, rotation=90, fontsize=8, parse_math=False)
    ax.set_yticklabels(study.names, fontsize=8, parse_math=False)
    ax.figure.colorbar(image, cax=ax.inset_axes([1.04, 0.1, 0.04, 0.8]))
    return ax


def plot_track(
    tracker: Tracker,
    ax: Any = None,
    learning_rate: float | None = None,
    *,
    label: str | None = None,
    color: Any = None,
    **properties: Any,
) -> Any:
    """Plot tracked eigenvalues against the training steps, with the stability threshold as a dashed line.

    The legend calls the largest eigenvalue the sharpness. If the tracker follows the smallest eigenvalues, the
    threshold of its optimizer is not drawn, because it limits the largest eigenvalue.

    Parameters
    ----------
    tracker : Tracker
        The tracker that recorded the eigenvalues.
    ax : matplotlib.axes.Axes, optional
        The axes to draw on. The default is the axes of a new figure.
    learning_rate : float, optional
        The learning rate of gradient descent, whose stability threshold is ``2 / learning_rate``. Gradient descent
        becomes unstable if the sharpness exceeds this threshold [1]_. Do not pass it if the tracker has an optimizer.
    label : str, optional
        The name of the tracker, which the legend puts before the names of the lines. Pass it if you plot several
        trackers on the same axes.
    color : color, optional
        The color of all lines of this tracker. The default is the next color of a palette for color-blind readers.
    **properties
        Properties of the lines of the eigenvalues, each a ``matplotlib.lines.Line2D``, for example ``linewidth=2``.

    Returns
    -------
    matplotlib.axes.Axes
        The axes.

    Raises
    ------
    ImportError
        If Matplotlib is not installed.
    TypeError, ValueError
        If `learning_rate` is given and the tracker has an optimizer, if `learning_rate` is not a positive number, if
        `ax` is not a Matplotlib Axes, or if a property is invalid.

    References
    ----------
    .. [1] J. M. Cohen, S. Kaur, Y. Li, J. Z. Kolter, A. Talwalkar, "Gradient descent on neural networks typically
       occurs at the edge of stability", ICLR 2021. arXiv:2103.00065
    """
    thresholds = tracker.thresholds
    kind = "" if thresholds is None else "preconditioned "
    if learning_rate is not None:
        if thresholds is not None:
            raise ValueError(
                f"learning_rate is {learning_rate}, but the tracker has an optimizer: leave learning_rate out"
            )
        if not real_scalar("learning_rate", learning_rate) > 0:
            raise ValueError(f"learning_rate is {learning_rate}, but must be positive")
        thresholds = np.full(max(len(tracker.steps), 1), 2 / learning_rate)
    elif tracker._which == "SA":
        thresholds = None
    ax = axes_or_new(ax, {"color": color, **properties})
    style = line_properties(ax, {"color": color, **properties}, linewidth=1.2)
    if len(tracker.steps) == 1:
        style = {"marker": "o", "markersize": 3} | style
    before = "" if label is None else f"{label}: "
    for name, values, alpha in _named_lines(tracker):
        names = [f"{before}{kind}{name}"] + [None] * (values.shape[1] - 1)
        ax.plot(tracker.steps, values, label=names, **{"alpha": alpha, **style})
    if thresholds is not None and len(thresholds):
        dashed = {"color": style["color"], "linestyle": "--", "linewidth": 1}
        if (thresholds == thresholds[0]).all():
            ax.axhline(thresholds[0], label=f"{before}stability threshold {thresholds[0]:.4g}", **dashed)
        else:
            ax.plot(tracker.steps, thresholds, label=f"{before}stability threshold", **dashed)
    ax.set(xlabel="step", ylabel="eigenvalue")
    add_legend(ax)
    return ax


def _named_lines(tracker: Tracker) -> list[tuple[str, Any, float]]:
    """Return the lines of a tracker in groups with one legend entry each: the name, the values, and the opacity."""
    values, count = tracker.values, tracker._k
    if tracker._which == "LM":
        return [(f"{count} eigenvalues of largest magnitude" if count > 1 else "largest magnitude", values, 1.0)]
    if tracker._which == "LA":
        values = values[:, ::-1]
    first = "sharpness" if tracker._which == "LA" else "smallest eigenvalue"
    others = f"eigenvalues 2 to {count}" if count > 2 else "eigenvalue 2"
    return [(first, values[:, :1], 1.0), (others, values[:, 1:], 0.5)][: min(count, 2)]
