"""Save and load result files, which are NumPy ``.npz`` archives without pickled objects.

Each file contains the number of its format as the array ``format``. Files without a number have format 1. They were
written by earlier versions, and differ from format 2 only in the order of eigenvalues, which is now ascending.
"""

from __future__ import annotations

import dataclasses
import os
import zipfile
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["FORMAT", "appearing", "arrays_of_record", "fields_of_record", "load_arrays", "save_arrays"]

Array = NDArray[Any]

FORMAT = 2
"""The number of the format of result files and of the JSON output. Files of all earlier formats can be loaded."""


def save_arrays(path: Path, **arrays: Array) -> None:
    """Write arrays and `FORMAT` to an ``.npz`` file atomically. If writing fails, an existing file is left unchanged.

    Raises
    ------
    TypeError
        If an array contains Python objects, which would have to be pickled.
    FileNotFoundError, NotADirectoryError, IsADirectoryError
        If the folder of `path` does not exist or is a file, or if `path` is a folder.
    """
    # Reject object arrays here, because `np.savez` of NumPy 2.0 has no `allow_pickle` argument and would pickle them.
    checked: dict[str, Any] = {name: np.asarray(array) for name, array in {"format": FORMAT, **arrays}.items()}
    if refused := [name for name, array in checked.items() if array.dtype.hasobject]:
        raise TypeError(
            f"{', '.join(refused)} cannot be saved in {path}, because their dtype holds Python objects: pass arrays "
            "of numbers, or of strings (dtype=np.str_)"
        )
    with appearing(path) as temporary, temporary.open("wb") as file:
        np.savez(file, **checked)


def load_arrays(path: str | os.PathLike[str], fields: Iterable[str], writer: str) -> dict[str, Array]:
    """Load the arrays of an ``.npz`` file, except ``format``, into a dict. Pickled objects are rejected.

    Parameters
    ----------
    path : str or path-like
    fields : iterable of str
        Names of arrays that the file must contain.
    writer : str
        Name of the method that writes files of this kind. The error message contains this name.

    Raises
    ------
    ValueError
        If the file lacks one of the fields, is not an ``.npz`` file, is damaged, or was written by a newer version.
    """
    advice = f"pass a complete file that {writer} has written"
    try:
        with np.load(path, allow_pickle=False) as file:
            missing = [name for name in fields if name not in file]
            number = int(file["format"]) if "format" in file else 1
            if not missing and number <= FORMAT:
                return {name: file[name] for name in file if name != "format"}
    except (ValueError, TypeError, EOFError, zipfile.BadZipFile, zlib.error):  # pickled objects, text, .npy, truncated
        raise ValueError(f"{os.fspath(path)} was not written by {writer}: {advice}") from None
    if number > FORMAT:
        raise ValueError(
            f"{os.fspath(path)} has format {number}, but this version of curvop reads formats up to {FORMAT}: install "
            "the version that wrote the file, or a newer one"
        )
    raise ValueError(f"{os.fspath(path)} was not written by {writer}, because it lacks {', '.join(missing)}: {advice}")


@contextmanager
def appearing(path: Path) -> Iterator[Path]:
    """Yield a temporary path. If the ``with`` block succeeds, rename this file to `path`. Otherwise, delete it.

    Raises
    ------
    FileNotFoundError, NotADirectoryError, IsADirectoryError
        If the folder of `path` does not exist or is a file, or if `path` is a folder.
    """
    folder = path.parent
    if path.is_dir():
        raise IsADirectoryError(f"path is {str(path)!r}, a folder: pass a file in it, such as {str(path / 'x.npz')!r}")
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(f"path is {str(path)!r}, but {str(folder)!r} is a file: pass a path in a folder")
    if not folder.exists():
        raise FileNotFoundError(
            f"path is {str(path)!r}, but the folder {str(folder)!r} does not exist: create it, for example with "
            f"os.makedirs({str(folder)!r}), or pass a path in another folder"
        )
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        yield temporary
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def arrays_of_record(record: Any, prefix: str) -> dict[str, NDArray[Any]]:
    """Convert a dataclass to a dictionary of arrays. Skip fields that are None or hold another dataclass."""
    values = {field.name: getattr(record, field.name) for field in dataclasses.fields(record)}
    return {
        prefix + name: np.asarray(value)
        for name, value in values.items()
        if value is not None and not dataclasses.is_dataclass(value)
    }


def fields_of_record(record: Any, arrays: dict[str, NDArray[Any]]) -> dict[str, Any]:
    """Convert saved arrays to a dictionary of the fields of a dataclass.

    Arrays of dimension 0 become Python scalars. Fields without a saved array are None.
    """
    names = [field.name for field in dataclasses.fields(record)]
    saved = {name: arrays[name] for name in names if name in arrays}
    return dict.fromkeys(names) | {name: array if array.ndim else array.item() for name, array in saved.items()}
