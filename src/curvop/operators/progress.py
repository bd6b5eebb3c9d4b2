"""Progress bars that count products."""

from __future__ import annotations

import contextlib
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from typing import Any

from tqdm import TqdmWarning, tqdm

with warnings.catch_warnings():  # a notebook without ipywidgets shows the bar as text
    warnings.simplefilter("ignore", TqdmWarning)
    from tqdm.auto import tqdm as tqdm_auto

__all__ = ["Progress", "new_bar", "step_bar"]

_DELAY = 0.5  # seconds after which a bar is shown


def new_bar(desc: str, **settings: Any) -> tqdm[Any]:
    """Return a new progress bar on stderr, or in the output of a notebook.

    If stderr is neither a terminal nor a notebook, the bar is updated at most every ten seconds.
    """
    notebook = _in_notebook()
    interactive = notebook or sys.stderr.isatty()
    return tqdm_auto(
        desc=desc,
        unit=" products",
        mininterval=0.1 if interactive else 10.0,
        file=sys.stdout if notebook else None,  # notebooks show stderr as an error, on a red background
        **settings,
    )


def _in_notebook() -> bool:
    """Whether the code runs in a Jupyter kernel. A script that only imports ``ipykernel`` does not."""
    shell = getattr(sys.modules.get("IPython"), "get_ipython", lambda: None)()
    return shell is not None and "IPKernelApp" in shell.config


@contextlib.contextmanager
def step_bar(desc: str, shown: bool = True, total: int | None = None) -> Iterator[tqdm[Any]]:
    """Yield a progress bar for one computation. If ``total`` is given, the bar also shows the remaining time."""
    bar = new_bar(desc, total=total, disable=not shown, delay=_DELAY)
    begun, completed = time.monotonic(), False
    try:
        yield bar
        completed = True
    finally:
        if time.monotonic() - begun > _DELAY:
            bar.delay = 0  # otherwise tqdm would not show the bar when it is closed
        bar.close()
        widgets = getattr(bar, "container", None)
        if widgets is not None and completed and bar.total:
            # In a notebook, tqdm ignores a new total, and shows the bar in red if there were fewer products.
            _, shape, _ = widgets.children
            shape.max, shape.bar_style = bar.total, "success"


class Progress:
    """Count the products of an operator on a progress bar.

    Parameters
    ----------
    setting : bool or tqdm
        If False, no bar is shown. If True, a new bar is created at the first product. A ``tqdm`` object is used as the
        bar.
    """

    def __init__(self, setting: Any) -> None:
        if not isinstance(setting, bool | tqdm):
            raise TypeError(f"progress is a {type(setting).__name__}, but must be True, False or a tqdm bar")
        self._setting = setting
        self._bar = setting if isinstance(setting, tqdm) else None

    def __getstate__(self) -> dict[str, Any]:
        return {"_setting": self._bar is not None or self._setting, "_bar": None}  # bars contain files and locks

    @contextlib.contextmanager
    def counting(self, count: int) -> Iterator[Callable[[float], None] | None]:
        """Yield a function that updates the bar while ``count`` products are computed, or None if there is no bar.

        The argument of the function is the fraction of the products that are completed. At the end of the ``with``
        block, the bar shows all products as completed.
        """
        if self._setting is False:
            yield None
            return
        bar = self._bar
        if bar is None:
            bar = self._bar = new_bar("curvop")
        shown = 0

        def tick(fraction: float) -> None:
            nonlocal shown
            done = int(fraction * count)
            bar.update(done - shown)
            shown = done

        yield tick
        tick(1.0)
