"""Record the Lanczos steps and the results of densities and block studies, so that a later run can continue.

A checkpoint is a directory of record files (`curvop.storage.records`). The first record of a results file holds the
settings of the computation, so that a checkpoint is never continued with another problem.

The checkpoint of a density has two files. ``results.records`` holds the deflated eigenpairs, the groups of probes that
advance together, and the tridiagonal matrices of finished groups. ``steps.records`` holds the Lanczos vectors, which a
later run needs to take more steps.
"""

from __future__ import annotations

import itertools
import json
import shutil
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from curvop.spectrum.lanczos import Lanczos
from curvop.storage.fingerprint import OtherProblemError, differing, listed
from curvop.storage.records import RecordFile

__all__ = ["Checkpoint", "make_directory", "open_record_file", "recorded_density"]

Array = NDArray[Any]
_SETTINGS, _DEFLATED, _EDGES, _GROUP, _STEP = b"settings", b"deflated", b"edges", b"group", b"step"
_AT_ONCE = b"probes at once"  # earlier versions recorded this number instead of the edges of the groups
_EXTENSIBLE = ("num_probes", "num_steps")  # settings that a later run may change
_RESULTS_FILE, _STEPS_FILE = "results.records", "steps.records"


class Checkpoint:
    """Checkpoint directory of a density, from which a later run can continue, with more steps and probes if requested.

    If `directory` is None, nothing is recorded.

    Parameters
    ----------
    directory : path or None
    settings : callable
        Function that returns a mapping of all settings that affect the results, including ``num_probes`` and
        ``num_steps``. The function is called only if `directory` is not None.

    Raises
    ------
    OtherProblemError
        If the directory holds the checkpoint of another computation. The message names the settings that differ. The
        settings ``num_probes`` and ``num_steps`` may differ.
    RecordFileError
        If another process has one of the files open, or if a record is damaged.
    """

    def __init__(self, directory: str | Path | None, settings: Callable[[], Mapping[str, str]]) -> None:
        self._steps: RecordFile | None = None
        self._results: RecordFile | None = None
        self._finished: dict[int, tuple[int, Array]] = {}  # length and tridiagonal matrix of each finished probe
        if directory is None:
            return
        self._directory = make_directory(Path(directory))
        self._results = open_record_file(self._directory / _RESULTS_FILE, settings, _EXTENSIBLE)
        try:
            for first, lengths, matrices in _finished_groups(self._results):
                for probe, run in enumerate(zip(lengths.tolist(), matrices, strict=True), first):
                    if run[0] >= self._finished.get(probe, run)[0]:
                        self._finished[probe] = run
        except BaseException:
            self.close()
            raise

    def groups(self, num_probes: int, num_steps: int, at_once: int) -> list[slice]:
        """Divide the probes into groups that advance together. Return one slice of probes for each group.

        The groups of earlier runs are kept, because block products with another number of columns round differently.
        They are split only if a group would contain other probes than the first `num_probes`, or if it has more than
        `at_once` probes and `num_steps` is larger than in all earlier runs.

        Parameters
        ----------
        num_probes, num_steps : int
            Numbers of probes and steps that are requested.
        at_once : int
            Number of probes whose bases fit into memory.
        """
        planned_steps, *recorded = self._recorded_edges()
        known = recorded[-1] if recorded else 0
        edges = {0, num_probes, *(edge for edge in recorded if edge < num_probes)}
        for first, stop in itertools.pairwise(sorted(edges)):
            if num_steps > planned_steps or first >= known:
                edges.update(range(first, stop, at_once))
        plan = [max(planned_steps, num_steps), *sorted(edges.union(recorded))]
        if self._results is not None and plan != [planned_steps, *recorded]:
            self._results.append(_EDGES, np.array(plan))
        return [slice(first, stop) for first, stop in itertools.pairwise(sorted(edges))]

    def deflated_eigenpairs(self, compute: Callable[[], tuple[Array, Array, int]]) -> tuple[Array, Array, int]:
        """Return the eigenpairs to deflate in ascending order, and the number of products that computed them.

        The eigenvectors are rows. If these results are recorded, return the recorded results. Otherwise, call
        `compute`, record its results, and return them.
        """
        for values, vectors, recorded in self._recorded(_DEFLATED):
            order = np.argsort(values, kind="stable")  # earlier versions recorded another order
            return values[order], vectors[order], int(recorded)
        values, vectors, num_products = compute()
        if self._results is not None and len(values):
            self._results.append(_DEFLATED, values, vectors, np.array(num_products))
        return values, vectors, num_products

    def finished_runs(self, group: slice, num_steps: int) -> tuple[Array, Array, bool]:
        """Return what finished runs have computed for a group of probes, restricted to the first `num_steps` steps.

        Returns
        -------
        matrices : ndarray, shape (g, 2, num_steps)
            Diagonals and off-diagonals of the tridiagonal matrices, padded with zeros.
        lengths : ndarray of int, shape (g,)
            Number of recorded steps of each probe.
        complete : bool
            True if no probe of the group can take another of the `num_steps` steps.
        """
        count, complete = group.stop - group.start, True
        matrices, lengths = np.zeros((count, 2, num_steps)), np.zeros(count, dtype=np.int64)
        for row, probe in enumerate(range(group.start, group.stop)):
            length, matrix = self._finished.get(probe, (0, np.zeros((2, num_steps))))
            lengths[row] = min(length, num_steps)
            matrices[row, :, : lengths[row]] = matrix[:, : lengths[row]]
            # A finished run that took fewer steps than requested has found an invariant subspace.
            complete = complete and (length >= num_steps or 0 < length < matrix.shape[1])
        return matrices, lengths, complete

    def finish_group(self, group: slice, lengths: Array, matrices: Array) -> None:
        """Record the results of a group of probes: the numbers of steps and the tridiagonal matrices.

        The steps of the group are kept, so that a later run can take more steps. If they take more space than is free
        on the disk, they are deleted.
        """
        if self._results is None:
            return
        self._results.append(b"%s %d" % (_GROUP, group.start), lengths, matrices)
        steps = self._step_file()
        if steps.num_bytes > shutil.disk_usage(self._directory).free:
            steps.close()
            steps.path.unlink()
            self._steps = None

    def replay(self, group: slice, run: Lanczos) -> None:
        """Restore the recorded steps of a group of probes in `run`, without computing a product."""
        if self._results is None:
            return
        steps = self._step_file()
        for key, offset in steps:
            first, stop = self._probes_of_step(key)
            if run.running and first <= group.start and group.stop <= stop:
                runs, *arrays = steps.read(offset)
                runs = runs + (first - group.start)
                inside = (runs >= 0) & (runs < group.stop - group.start)
                inside[inside] = run.active[runs[inside]]
                if inside.any():
                    run.replay(runs[inside], *(array[inside] for array in arrays))

    def add_step(self, group: slice, run: Lanczos, runs: NDArray[np.intp]) -> None:
        """Record the latest Lanczos step of a group of probes."""
        if self._results is not None:
            key = b"%s %d %d" % (_STEP, group.start, group.stop)
            self._step_file().append(key, *run.last_step(runs))

    def close(self) -> None:
        """Close the files."""
        for file in (self._results, self._steps):
            if file is not None:
                file.close()

    def _step_file(self) -> RecordFile:
        """Return the file of steps. It is opened only if necessary, because opening reads the whole file."""
        if self._steps is None:
            self._steps = RecordFile(self._directory / _STEPS_FILE)
        return self._steps

    def _recorded_edges(self) -> list[int]:
        """Return the largest number of steps that was requested, followed by the edges of the groups of probes."""
        for [plan] in reversed(list(self._recorded(_EDGES))):
            return [int(number) for number in plan]
        for [at_once] in self._recorded(_AT_ONCE):
            num_probes, num_steps = (int(self._recorded_settings()[name]) for name in _EXTENSIBLE)
            return [num_steps, *range(0, num_probes, int(at_once)), num_probes]
        return [0]

    def _probes_of_step(self, key: bytes) -> tuple[int, int]:
        """Return the first probe of the group that took a step, and the first probe after this group."""
        first, *stop = (int(number) for number in key.split()[1:])
        if stop:
            return first, stop[0]
        [[at_once]] = self._recorded(_AT_ONCE)
        return first, first + int(at_once)

    def _recorded_settings(self) -> dict[str, str]:
        [[settings]] = self._recorded(_SETTINGS)
        return dict(json.loads(str(settings)))

    def _recorded(self, kind: bytes) -> Iterator[list[Array]]:
        if self._results is not None:
            for key, offset in self._results:
                if key == kind:
                    yield self._results.read(offset)


def recorded_density(directory: Path) -> tuple[int, int]:
    """Return the numbers of probes and steps of the finished runs in the checkpoint of a density.

    If the runs differ in their numbers of steps, the largest number is returned.
    """
    if not (directory / _RESULTS_FILE).exists():
        return 0, 0
    with RecordFile(directory / _RESULTS_FILE) as file:
        groups = list(_finished_groups(file))
    probes = max((first + len(lengths) for first, lengths, _ in groups), default=0)
    return probes, max((int(lengths.max()) for _, lengths, _ in groups), default=0)


def _finished_groups(file: RecordFile) -> Iterator[tuple[int, Array, Array]]:
    """Yield the first probe, the lengths and the tridiagonal matrices of each recorded group of probes."""
    for key, offset in file:
        if key.startswith(_GROUP):
            *_, lengths, matrices = file.read(offset)  # earlier versions also recorded nodes and weights
            yield int(key.split()[1]), lengths, matrices


def make_directory(directory: Path) -> Path:
    """Create a checkpoint directory if it does not exist, and return its path."""
    if directory.exists() and not directory.is_dir():
        raise ValueError(f"checkpoint is {directory}, a file: pass a directory, which is created if necessary")
    directory.mkdir(parents=True, exist_ok=True)
    return directory


def open_record_file(
    path: Path, settings: Callable[[], Mapping[str, str]], extensible: Collection[str] = ()
) -> RecordFile:
    """Open a record file whose first record holds the settings of the computation. Create the file if necessary.

    Parameters
    ----------
    path : path
    settings : callable
        Function that returns a mapping of all settings that affect the records.
    extensible : collection of str, optional
        Names of settings that may differ from the recorded settings.

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
        elif names := [name for name in differing(recorded[0], current) if name not in extensible]:
            verb = "differs" if len(names) == 1 else "differ"
            raise OtherProblemError(
                f"the checkpoint in {path.parent} belongs to another computation: {listed(names)} {verb}; pass another "
                "directory, or delete it"
            )
    except BaseException:
        file.close()
        raise
    return file
