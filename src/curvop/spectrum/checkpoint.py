"""Record the Lanczos steps and the results of densities and block studies, so that a later run can continue.

A checkpoint is a directory of record files (`curvop.storage.records`). The first record of a results file holds the
settings of the computation, so that a checkpoint is never continued with another problem.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from curvop.spectrum.lanczos import Lanczos
from curvop.storage.fingerprint import OtherProblemError, differing, listed
from curvop.storage.records import RecordFile

__all__ = ["Checkpoint", "make_directory", "open_record_file"]

Array = NDArray[Any]
_SETTINGS, _DEFLATED, _GROUP, _STEP = b"settings", b"deflated", b"group", b"step"


class Checkpoint:
    """Checkpoint directory with one record file for finished results, and one for the steps of runs in progress.

    The steps of a run are deleted when the run is finished. If `directory` is None, nothing is recorded.

    Parameters
    ----------
    directory : path or None
    settings : callable
        Function that returns a mapping of all settings that affect the results. The function is called only if
        `directory` is not None.

    Raises
    ------
    OtherProblemError
        If the directory holds the checkpoint of another computation. The message names the settings that differ.
    RecordFileError
        If another process has one of the files open, or if a record is damaged.
    """

    def __init__(self, directory: str | Path | None, settings: Callable[[], Mapping[str, str]]) -> None:
        self._steps: RecordFile | None = None
        self._results: RecordFile | None = None
        if directory is None:
            return
        self._directory = make_directory(Path(directory))
        self._results = open_record_file(self._directory / "results.records", settings)
        try:
            self._steps = RecordFile(self._directory / "steps.records")
        except BaseException:
            self.close()
            raise

    def setdefault(self, name: str, value: int) -> int:
        """Return the value recorded under `name`. If no value is recorded, record and return `value`."""
        key = name.encode()
        for _, [recorded] in self._recorded(key):
            return int(recorded)
        if self._results is not None:
            self._results.append(key, np.array(value))
        return value

    def deflated_eigenpairs(self, compute: Callable[[], tuple[Array, Array, int]]) -> tuple[Array, Array, int]:
        """Return the eigenpairs to deflate in ascending order, and the number of products that computed them.

        The eigenvectors are rows. If these results are recorded, return the recorded results. Otherwise, call
        `compute`, record its results, and return them.
        """
        for _, [values, vectors, recorded] in self._recorded(_DEFLATED):
            order = np.argsort(values, kind="stable")  # earlier versions recorded another order
            return values[order], vectors[order], int(recorded)
        values, vectors, num_products = compute()
        if self._results is not None and len(values):
            self._results.append(_DEFLATED, values, vectors, np.array(num_products))
        return values, vectors, num_products

    def finished_groups(self) -> dict[int, list[Array]]:
        """Map the index of the first probe of each finished group to the arrays that `finish_group` recorded."""
        return {int(key.split()[1]): arrays for key, arrays in self._recorded(_GROUP)}

    def finish_group(self, first: int, *arrays: Array) -> None:
        """Record the results of a group of probes, and delete the recorded steps of the group."""
        if self._results is not None and self._steps is not None:
            self._results.append(b"%s %d" % (_GROUP, first), *arrays)
            self._steps.close()
            path = self._steps.path
            path.unlink()
            self._steps = RecordFile(path)

    def replay(self, first: int, run: Lanczos) -> None:
        """Restore the recorded steps of a group of probes in `run`, without computing a product."""
        if self._steps is None:
            return
        for key, offset in self._steps:
            if key == b"%s %d" % (_STEP, first):
                run.replay(*self._steps.read(offset))

    def add_step(self, first: int, run: Lanczos, runs: NDArray[np.intp]) -> None:
        """Record the latest Lanczos step of a group of probes."""
        if self._steps is not None:
            self._steps.append(b"%s %d" % (_STEP, first), *run.last_step(runs))

    def close(self) -> None:
        """Close the files."""
        for file in (self._results, self._steps):
            if file is not None:
                file.close()

    def _recorded(self, kind: bytes) -> Iterator[tuple[bytes, list[Array]]]:
        if self._results is not None:
            for key, offset in self._results:
                if key.startswith(kind):
                    yield key, self._results.read(offset)


def make_directory(directory: Path) -> Path:
    """Create a checkpoint directory if it does not exist, and return its path."""
    if directory.exists() and not directory.is_dir():
        raise ValueError(f"checkpoint is {directory}, a file: pass a directory, which is created if necessary")
    directory.mkdir(parents=True, exist_ok=True)
    return directory


def open_record_file(path: Path, settings: Callable[[], Mapping[str, str]]) -> RecordFile:
    """Open a record file whose first record holds the settings of the computation. Create the file if necessary.

    Parameters
    ----------
    path : path
    settings : callable
        Function that returns a mapping of all settings that affect the records.

    Raises
    ------
    OtherProblemError
        If the recorded settings differ from the current settings. The message names the differences. The file is not
        changed.
    RecordFileError
        If another process has the file open, or if a record is damaged.
    """
    file = RecordFile(path)
    try:
        current = settings()
        recorded = [json.loads(str(file.read(offset)[0])) for key, offset in file if key == _SETTINGS]
        if not recorded:
            file.append(_SETTINGS, np.array(json.dumps(current)))
        elif names := differing(recorded[0], current):
            verb = "differs" if len(names) == 1 else "differ"
            raise OtherProblemError(
                f"the checkpoint in {path.parent} belongs to another computation: {listed(names)} {verb}; pass another "
                "directory, or delete it"
            )
    except BaseException:
        file.close()
        raise
    return file
