"""Files of results: NumPy ``.npz`` files without pickled objects, which appear only when they are complete."""

from __future__ import annotations

import os
import zipfile
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["appearing", "load_arrays", "save_arrays"]

Array = NDArray[Any]


def save_arrays(path: Path, **arrays: Array) -> None:
    """Write arrays to an ``.npz`` file, which appears only when it is complete; no objects, which would be pickled."""
    # Not left to `allow_pickle` of `np.savez`: NumPy 2.0 takes that for the name of one more array.
    checked: dict[str, Any] = {name: np.asarray(array) for name, array in arrays.items()}
    if refused := [name for name, array in checked.items() if array.dtype.hasobject]:
        raise TypeError(
            f"{', '.join(refused)} cannot be saved in {path}, as their dtype holds Python objects: pass arrays of "
            "numbers, or of strings (dtype=np.str_)"
        )
    with appearing(path) as temporary, temporary.open("wb") as file:
        np.savez(file, **checked)


def load_arrays(path: str | os.PathLike[str], fields: Iterable[str], writer: str) -> dict[str, Array]:
    """Return the arrays of the ``.npz`` file that `writer` wrote, which has these `fields`; nothing in it is executed.

    Raises
    ------
    ValueError
        Where it is another file, or damaged.
    """
    advice = "pass a file that was, and is whole"
    try:
        with np.load(path, allow_pickle=False) as file:
            missing = [name for name in fields if name not in file]
            if not missing:
                return {name: file[name] for name in file}
    except (ValueError, TypeError, EOFError, zipfile.BadZipFile, zlib.error):  # pickles, text, .npy, a torn file
        raise ValueError(f"{os.fspath(path)} was not written by {writer}: {advice}") from None
    raise ValueError(f"{os.fspath(path)} was not written by {writer}, it lacks {', '.join(missing)}: {advice}")


@contextmanager
def appearing(path: Path) -> Iterator[Path]:
    """Give the place of a file that takes the place of `path` where nothing fails, and goes where something does."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        yield temporary
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
