"""Progress bars over products."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from typing import Any

from tqdm import tqdm

__all__ = ["Progress"]


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
            quick = sys.stderr.isatty()
            bar = self._bar = tqdm(desc="curvop", unit=" products", mininterval=0.1 if quick else 10.0)
        shown = 0

        def tick(share: float) -> None:
            nonlocal shown
            done = int(share * count)
            bar.update(done - shown)
            shown = done

        yield tick
        tick(1.0)
