"""Pictures of spectra; they need matplotlib."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from curvop.spectrum.blocks import BlockStudy
    from curvop.spectrum.density import SpectralDensity
    from curvop.spectrum.track import Tracker

__all__ = ["axes_or_new", "plot_blocks", "plot_density", "plot_track"]

_FLOOR = 0.1  # of an eigenvalue's peak: what a logarithmic axis shows of the space between eigenvalues


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


def plot_blocks(study: BlockStudy, figure: Any = None) -> Any:
    """Draw the norms of all blocks as a heat map, beside the extreme eigenvalues of the diagonal ones.

    Parameters
    ----------
    study : BlockStudy
    figure : matplotlib.figure.Figure, optional
        A new one by default.

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
        figure.set_size_inches(9 + 0.12 * count, 3 + 0.22 * count)
    from matplotlib.colors import LogNorm
    from matplotlib.ticker import SymmetricalLogLocator

    left, right = figure.subplots(1, 2, width_ratios=(3, 2))
    positive = study.norms[study.norms > 0]
    top = positive.max() if positive.size else 1.0
    low = max(positive.min(initial=top), 1e-6 * top)
    image = left.imshow(np.maximum(study.norms, low), norm=LogNorm(low, max(top, 1.001 * low)), cmap="magma")
    left.set(xticks=range(count), yticks=range(count), title="Frobenius norms of the blocks")
    left.set_xticklabels(study.names, rotation=90, fontsize=8, parse_math=False)
    left.set_yticklabels(study.names, fontsize=8, parse_math=False)
    figure.colorbar(image, ax=left, shrink=0.8)
    rows = np.arange(count)
    right.hlines(rows, study.smallest, study.largest, color="tab:gray", linewidth=1)
    right.plot(study.largest, rows, "o", color="tab:red", markersize=4, label="largest")
    right.plot(study.smallest, rows, "o", color="tab:blue", markersize=4, label="smallest")
    threshold = 1e-5 * np.abs([study.smallest, study.largest]).max() or 1.0
    right.set_xscale("symlog", linthresh=threshold)
    right.xaxis.set_major_locator(SymmetricalLogLocator(base=100, linthresh=threshold))
    right.set(yticks=rows, title="eigenvalues of the diagonal blocks", ylim=(count - 0.5, -0.5))
    right.set_yticklabels([])
    right.tick_params(axis="x", labelsize=8, rotation=45)
    right.legend(fontsize=8, frameon=False)
    return figure


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
