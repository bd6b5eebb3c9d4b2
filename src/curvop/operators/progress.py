"""Progress bars over products."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

from tqdm import tqdm

__all__ = ["Progress", "new_bar", "step_bar"]

_DELAY = 0.5  # seconds in which a bar says nothing, as what ends in them needs none


def new_bar(desc: str, **settings: Any) -> tqdm[Any]:
    """Return a bar over products on stderr; in a file it takes a line every ten seconds, as nobody watches."""
    watched = sys.stderr.isatty() or "ipykernel" in sys.modules  # a notebook's stderr says that it is no terminal
    return tqdm(desc=desc, unit=" products", mininterval=0.1 if watched else 10.0, **settings)


@contextlib.contextmanager
def step_bar(desc: str, shown: bool = True, total: int | None = None) -> Iterator[tqdm[Any]]:
    """Give a bar for a step of a study; with a total, it says how long the step will take."""
    bar = new_bar(desc, total=total, disable=not shown, delay=_DELAY)
    begun = time.monotonic()
    try:
        yield bar
    finally:
        if time.monotonic() - begun > _DELAY:
            bar.delay = 0  # tqdm closes a bar that was not shown yet without a word
        bar.close()


class Progress:
    """Counts products on a bar: none, one of its own made at the first product, or one that is handed in.

    Parameters
    ----------
    setting : bool or tqdm
    """

    def __init__(self, setting: Any) -> None:
        if not isinstance(setting, bool | tqdm):
            raise TypeError(f"progress is a {type(setting).__name__}, but must be True, False or a tqdm bar")
        self._setting = setting
        self._bar = setting if isinstance(setting, tqdm) else None

    def __getstate__(self) -> dict[str, Any]:
        return {"_setting": self._bar is not None or self._setting, "_bar": None}  # bars hold files and locks

    @contextlib.contextmanager
    def of(self, count: int) -> Iterator[Callable[[float], None] | None]:
        """Yield what to call with the share that is done of `count` products; they are all done in the end."""
        if self._setting is False:
            yield None
            return
        bar = self._bar
        if bar is None:
            bar = self._bar = new_bar("curvop")
        shown = 0

        def tick(share: float) -> None:
            nonlocal shown
            done = int(share * count)
            bar.update(done - shown)
            shown = done

        yield tick
        tick(1.0)
