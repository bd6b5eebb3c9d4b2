"""Pictures of spectra; they need matplotlib."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from curvop.spectrum.blocks import BlockStudy
    from curvop.spectrum.density import SpectralDensity
    from curvop.spectrum.track import Tracker

__all__ = ["axes_or_new", "blocks_size", "plot_blocks", "plot_density", "plot_track"]

_FLOOR = 0.1  # of an eigenvalue's peak: what a logarithmic axis shows of the space between eigenvalues
_LETTER = 0.067  # inches that a letter of the blocks' table is wide, in 8 points


def axes_or_new(ax: Any) -> Any:
    """Return `ax`, or the axes of a new figure."""
    if ax is not None:
        return ax
    try:
        import matplotlib.pyplot as plt
    except ImportError as error:
        raise ImportError('plots need matplotlib: pip install "curvop[plot]"') from error
    return plt.subplots(figsize=(7, 4), layout="constrained")[1]


def plot_density(density: SpectralDensity, ax: Any = None, log: bool = True) -> Any:
    """Draw a density, its error band, and known eigenvalues as lines.

    Where the band is as wide as the peaks are high, these are of single nodes: more steps or a larger `sigma` of
    `density.pdf` are needed for the shape.

    Parameters
    ----------
    density : SpectralDensity
    ax : matplotlib.axes.Axes, optional
        A new figure's by default.
    log : bool
        Whether the density is on a logarithmic axis, where a single eigenvalue can be seen beside thousands.

    Returns
    -------
    matplotlib.axes.Axes
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
    """Return the width and height, in inches, of a figure that `plot_blocks` fills."""
    count = len(study.names)
    return max(4 + _LETTER * len(study.lines[0]), 5 + 0.2 * count), sum(_heights(count))


def _heights(count: int) -> tuple[float, float]:
    """Return those of the table and of the norms of so many blocks, in inches."""
    return 0.9 + 0.3 * count, 2.8 + 0.22 * count


def plot_blocks(study: BlockStudy, figure: Any = None) -> Any:
    """Draw the table of the diagonal blocks, with the density of each in its line, and the norms of all blocks below.

    The height of a density is on a logarithmic scale, from a tenth of an eigenvalue to all of the largest block's; it
    counts eigenvalues within about a hundredth of the width of the axis. Close to zero this is finer than what the
    quadrature resolves: gaps between single nodes need not be gaps of the spectrum, and more steps fill them. Pale bars
    beyond the dots show how far beyond them the extreme eigenvalues may lie.

    Parameters
    ----------
    study : BlockStudy
    figure : matplotlib.figure.Figure, optional
        An empty one, about as large as `blocks_size` says; by default a new one. Without a layout engine it gets the
        constrained one, which makes room for the table.

    Returns
    -------
    matplotlib.figure.Figure

    Raises
    ------
    ValueError
        Where no block was done in time.
    """
    count = len(study.names)
    if not count:
        raise ValueError("no block of this study is done: give `blocks` more seconds")
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
    """Draw the lines of the table as the labels of rows, and in the rows the densities."""
    bounds = np.concatenate([study.smallest - study.smallest_errors, study.largest + study.largest_errors])
    bounds = np.concatenate([bounds[np.isfinite(bounds)], study.smallest, study.largest])
    positions = _symmetric_log(ax, float(bounds.min()), float(bounds.max()))
    to_axis = ax.xaxis.get_transform()
    at = to_axis.transform(positions)
    width = 0.004 * (at[-1] - at[0])
    ceiling = np.log(study.sizes.max() / _FLOOR)
    for row, found in enumerate(study.densities):

        def near(values: Any) -> Any:
            return np.exp(-0.5 * ((to_axis.transform_non_affine(values)[..., None] - at) / width) ** 2)

        of_probes = np.einsum("km,kmp->p", found.weights, near(found.nodes)) / max(len(found.weights), 1)
        number = np.maximum(found.size * of_probes + near(found.atoms).sum(0), _FLOOR)
        height = 0.85 * np.log(number / _FLOOR) / ceiling
        ax.fill_between(positions, row + 0.3, row + 0.3 - height, color="tab:gray", alpha=0.7, linewidth=0)
    rows = np.arange(len(study.names)) + 0.3
    ax.hlines(rows, study.smallest, study.largest, color="tab:gray", linewidth=0.8)
    for ends, signed, color in (
        (study.smallest, -study.smallest_errors, "tab:blue"),
        (study.largest, study.largest_errors, "tab:red"),
    ):
        beyond = np.clip(ends + signed, *positions[[0, -1]])  # an infinite one ends at the axis
        ax.hlines(rows, ends, beyond, color=color, linewidth=2.5, alpha=0.4)
    for name, ends, color in (("largest", study.largest, "tab:red"), ("smallest", study.smallest, "tab:blue")):
        ax.plot(ends, rows, "o", color=color, markersize=3, label=name)
    ax.set(yticks=range(-1, len(study.names)), ylim=(len(study.names) - 0.5, -1.5), xlabel="eigenvalue")
    ax.set_yticklabels(study.lines, fontsize=8, family="monospace", parse_math=False)
    ax.tick_params(axis="y", length=0, pad=10)
    ax.tick_params(axis="x", labelsize=8)
    ax.spines[["left", "right", "top"]].set_visible(False)
    ax.text(0, -1, "density", transform=ax.get_yaxis_transform(), fontsize=8, family="monospace", va="center_baseline")
    ax.legend(fontsize=8, frameon=False, ncols=2, loc="upper right", borderpad=0, borderaxespad=0)


def _symmetric_log(ax: Any, low: float, high: float) -> Any:
    """Make the x axis one that shows all eigenvalues between `low` and `high`, and return points all along it."""
    from matplotlib.ticker import FixedLocator

    top = max(-low, high)
    threshold = 1e-5 * top or 1.0
    ax.set_xscale("symlog", linthresh=threshold)
    transform = ax.xaxis.get_transform()
    ends = transform.transform(np.array([min(low, -threshold), max(high, threshold)]))
    margin = 0.03 * (ends[1] - ends[0])
    points = transform.inverted().transform(np.linspace(ends[0] - margin, ends[1] + margin, 600))
    ax.set_xlim(points[0], points[-1])
    # Those within a decade of the linear part would be printed over the zero.
    exponents = np.arange(np.floor(np.log10(max(top, threshold))), np.log10(threshold) + 1, -2)
    powers = 10.0**exponents
    ax.xaxis.set_major_locator(FixedLocator([*-powers, 0.0, *powers]))
    ax.xaxis.set_minor_locator(FixedLocator([]))
    return points


def _draw_norms(study: BlockStudy, ax: Any) -> None:
    from matplotlib.colors import LogNorm

    positive = study.norms[study.norms > 0]
    top = positive.max() if positive.size else 1.0
    low = max(positive.min(initial=top), 1e-6 * top)
    image = ax.imshow(np.maximum(study.norms, low), norm=LogNorm(low, max(top, 1.001 * low)), cmap="magma")
    everyone = range(len(study.names))
    ax.set(xticks=everyone, yticks=everyone, title="Frobenius norms of the blocks")
    ax.set_xticklabels(study.names, rotation=90, fontsize=8, parse_math=False)
    ax.set_yticklabels(study.names, fontsize=8, parse_math=False)
    ax.figure.colorbar(image, cax=ax.inset_axes([1.04, 0.1, 0.04, 0.8]))


def plot_track(tracker: Tracker, ax: Any = None, learning_rate: float | None = None) -> Any:
    """Draw tracked eigenvalues over the steps of training.

    Parameters
    ----------
    tracker : Tracker
    ax : matplotlib.axes.Axes, optional
        A new figure's by default.
    learning_rate : float, optional
        Draws ``2 / learning_rate`` besides, the sharpness at which gradient descent becomes unstable (Cohen et al.,
        2021).

    Returns
    -------
    matplotlib.axes.Axes
    """
    ax = axes_or_new(ax)
    for index, values in enumerate(tracker.values.T):
        ax.plot(tracker.steps, values, linewidth=1.2, label=f"eigenvalue {index + 1}")
    if learning_rate is not None:
        ax.axhline(2 / learning_rate, color="black", linestyle="--", linewidth=1, label="2 / learning rate")
    ax.set(xlabel="step", ylabel="eigenvalue")
    ax.legend(frameon=False)
    return ax
