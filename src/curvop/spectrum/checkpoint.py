"""What a study has come to, on disk; of a density, the runs that are over, and the steps of those that are not."""

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

__all__ = ["Checkpoint", "made", "settled_file"]

Array = NDArray[Any]
_SETTINGS, _DEFLATED, _GROUP, _STEP = b"settings", b"deflated", b"group", b"step"


def made(directory: Path) -> Path:
    """Make the directory of a checkpoint where it does not exist."""
    if directory.exists() and not directory.is_dir():
        raise ValueError(f"checkpoint is {directory}, a file: pass a directory, it is made")
    directory.mkdir(parents=True, exist_ok=True)
    return directory


def settled_file(path: Path, settings: Callable[[], Mapping[str, str]]) -> RecordFile:
    """Open a file of records that begins with what the others depend on, by name; make it where it does not exist.

    Raises
    ------
    OtherProblemError
        Where it depends on something else, naming what differs. The file is left as it was.
    RecordFileError
        Where another process has it open, or a record is damaged.
    """
    file = RecordFile(path)
    try:
        current = settings()
        recorded = [json.loads(str(file.read(offset)[0])) for key, offset in file if key == _SETTINGS]
        if not recorded:
            file.append(_SETTINGS, np.array(json.dumps(current)))
        elif names := differing(recorded[0], current):
            raise OtherProblemError(
                f"the checkpoint in {path.parent} is of something else: {listed(names)} differ; pass another "
                "directory, or delete it"
            )
    except BaseException:
        file.close()
        raise
    return file


class Checkpoint:
    """A directory with two files of records: ``results.records``, and ``steps.records`` of the runs under way.

    Steps are thrown away when their runs are over. Without a directory nothing is kept.

    Parameters
    ----------
    directory : path or None
    settings : callable
        Returns what the results depend on, by name; called only where there is a directory.

    Raises
    ------
    OtherProblemError
        Where the directory holds the checkpoint of something else, naming what differs.
    RecordFileError
        Where another process has it open, or a record is damaged.
    """

    def __init__(self, directory: str | Path | None, settings: Any) -> None:
        self._steps: RecordFile | None = None
        self._results: RecordFile | None = None
        if directory is None:
            return
        self._directory = made(Path(directory))
        self._results = settled_file(self._directory / "results.records", settings)
        try:
            self._steps = RecordFile(self._directory / "steps.records")
        except BaseException:
            self.close()
            raise

    def _recorded(self, kind: bytes) -> Iterator[tuple[bytes, list[Array]]]:
        if self._results is not None:
            for key, offset in self._results:
                if key.startswith(kind):
                    yield key, self._results.read(offset)

    def fixed(self, name: str, value: int) -> int:
        """Return what the first run recorded under this name, `value` if this is the first."""
        key = name.encode()
        for _, [recorded] in self._recorded(key):
            return int(recorded)
        if self._results is not None:
            self._results.append(key, np.array(value))
        return value

    def deflated(self, compute: Any) -> tuple[Array, Array, int]:
        """Return the known eigenpairs and what they took; computed where they are not recorded."""
        for _, [values, vectors, taken] in self._recorded(_DEFLATED):
            return values, vectors, int(taken)
        values, vectors, taken = compute()
        if self._results is not None and len(values):
            self._results.append(_DEFLATED, values, vectors, np.array(taken))
        return values, vectors, taken

    def groups(self) -> dict[int, list[Array]]:
        """Return the arrays of `finish` for the groups of probes that are done, by the first probe's number."""
        return {int(key.split()[1]): arrays for key, arrays in self._recorded(_GROUP)}

    def finish(self, first: int, *arrays: Array) -> None:
        """Record that a group is done."""
        if self._results is not None and self._steps is not None:
            self._results.append(b"%s %d" % (_GROUP, first), *arrays)
            self._steps.close()
            path = self._steps.path
            path.unlink()
            self._steps = RecordFile(path)

    def replay(self, first: int, run: Lanczos) -> None:
        """Take the recorded steps of a group again, without a product."""
        if self._steps is None:
            return
        for key, offset in self._steps:
            if key == b"%s %d" % (_STEP, first):
                run.replay(*self._steps.read(offset))

    def add(self, first: int, run: Lanczos, runs: NDArray[np.intp]) -> None:
        """Record the last step of a group."""
        if self._steps is not None:
            self._steps.append(b"%s %d" % (_STEP, first), *run.last_step(runs))

    def close(self) -> None:
        """Close the files."""
        for file in (self._results, self._steps):
            if file is not None:
                file.close()
