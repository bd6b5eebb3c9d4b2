"""How the results of ``curvop spectrum`` were computed: problem, machine, versions, and the runs that took part."""

from __future__ import annotations

import dataclasses
import datetime
import json
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from curvop.storage.journal import library_versions
from curvop.storage.result_files import appearing

__all__ = ["FINISHED", "INTERRUPTED", "RUNNING", "Provenance", "Run", "RunLog", "duration", "shown_date"]

FINISHED, INTERRUPTED, RUNNING, KILLED = "finished", "interrupted", "running", "killed"


def _now() -> str:
    return datetime.datetime.now().astimezone().isoformat(timespec="seconds")


def _device_name(device: torch.device) -> str:
    """Return the device and the name of its hardware, for example ``cuda:0 (NVIDIA H200)``."""
    if device.type == "cuda":
        return f"{device} ({torch.cuda.get_device_name(device)})"
    if device.type != "cpu":
        return str(device)
    count = torch.get_num_threads()
    return f"cpu ({platform.processor() or platform.machine()}, {count} thread{'s' * (count > 1)})"


@dataclasses.dataclass
class Run:
    """One run of the command.

    Attributes
    ----------
    date : str or None
        Start of the run with its time zone, in ISO format. None if it is unknown.
    command : str or None
        The command line, quoted for a shell.
    versions : dict of str to str
        Versions of the libraries and of Python.
    device : str or None
        The device, and the name of its hardware.
    products : int
        Number of products that the run computed.
    seconds : float
        Duration of the run.
    end : str
        'finished' (with or without unfinished steps), 'interrupted' (by Ctrl-C or an error), 'running', or 'killed'.
        For a killed run, the products and the time are those of its last record.
    """

    date: str | None
    command: str | None
    versions: dict[str, str]
    device: str | None
    products: int = 0
    seconds: float = 0.0
    end: str = RUNNING

    @classmethod
    def starting(cls, command: str, device: torch.device) -> Run:
        """Return a run that starts now."""
        return cls(_now(), command, library_versions() | {"python": platform.python_version()}, _device_name(device))


@dataclasses.dataclass
class Provenance:
    """How the results of a study were computed.

    Attributes
    ----------
    model, loss_function : str
        Names of the class of the model and of the loss function, or of the function.
    model_dtype, dtype : str
        Dtypes of the parameters and of the vectors.
    epsilon : float
        Machine epsilon of the lowest precision in a product. With TF32, it is larger than that of the parameters.
    batches, examples : int or None
        Size of the data set. The number of examples is None if it is unknown.
    seeds : dict of str to int
        The seeds of the random vectors of each step.
    runs : list of Run
        All runs of the folder. The last one is the present run.
    recorded : int
        A lower limit of the number of products over all runs: the products of which the folder holds a record. It is
        larger than the sum over `runs` if a run was killed.
    """

    model: str
    loss_function: str
    model_dtype: str
    dtype: str
    epsilon: float
    batches: int | None
    examples: int | None
    seeds: dict[str, int]
    runs: list[Run]
    recorded: int = 0

    @classmethod
    def of(cls, problem: Mapping[str, Any], A: Any, exact: Any, seeds: dict[str, int], run: Run) -> Provenance:
        """Return the provenance of a matrix `A` of a problem, after the first pass over the data.

        Parameters
        ----------
        problem : mapping
            The problem, as returned by `curvop.problems.load`.
        A : LinearOperator
            The matrix.
        exact : EngineLinearOperator
            The matrix that `A` approximates, or `A`.
        seeds : dict of str to int
            The seeds of the steps.
        run : Run
            The present run.
        """
        objective = exact._objective
        dtypes = sorted({str(value.dtype).removeprefix("torch.") for value in objective.params.values()})
        batches, examples = objective.data_size or (None, None)
        return cls(
            model=_name(problem["model"]),
            loss_function=_name(problem["loss_function"]),
            model_dtype=" and ".join(dtypes),
            dtype=str(A.dtype),
            epsilon=float(exact.epsilon),
            batches=batches,
            examples=examples,
            seeds=seeds,
            runs=[run],
        )

    @property
    def products(self) -> int:
        """Number of products over all runs. If `complete` is False, there may have been more."""
        return max(self.recorded, sum(run.products for run in self.runs))

    @property
    def seconds(self) -> float:
        """Duration of all runs. If `complete` is False, it may have been longer."""
        return sum(run.seconds for run in self.runs)

    @property
    def complete(self) -> bool:
        """Whether the products and the time of all runs are known."""
        return all(run.end in (FINISHED, INTERRUPTED, RUNNING) and run.date for run in self.runs)

    def json(self) -> dict[str, Any]:
        """Return the provenance as a JSON serializable dictionary, with the facts of the last run at its top level."""
        own = dataclasses.asdict(self)
        runs, _ = own.pop("runs"), own.pop("recorded")
        last = {name: runs[-1][name] for name in ("date", "command", "versions", "device")}
        totals = {name: getattr(self, name) for name in ("products", "seconds", "complete")}
        return last | own | totals | {"runs": runs}

    @property
    def facts(self) -> list[tuple[str, str]]:
        """The provenance as a list of (name, value) pairs."""
        last = self.runs[-1]
        names = {"curvop": "curvop", "torch": "PyTorch", "scipy": "SciPy", "numpy": "NumPy", "python": "Python"}
        versions = ", ".join(f"{names[name]} {version}" for name, version in last.versions.items())
        examples = "an unknown number of" if self.examples is None else f"{self.examples:,}"
        batches = "" if self.batches is None else f" in {_counted(self.batches, 'batch', 'batches')}"
        usual = min(self.seeds.values())
        others = ", ".join(f"{name}: {seed}" for name, seed in self.seeds.items() if seed != usual)
        least = "" if self.complete else "at least "
        over = f" over {len(self.runs)} runs" if len(self.runs) > 1 else ""
        cost = f"{least}{self.products:,} products in {duration(self.seconds)}{over}"
        return [
            ("date", shown_date(last.date)),
            ("command", str(last.command)),
            ("versions", versions),
            ("device", str(last.device)),
            (
                "precision",
                f"parameters {self.model_dtype}, vectors {self.dtype}; machine epsilon of a product {self.epsilon:.1e}",
            ),
            ("model", self.model),
            ("loss function", self.loss_function),
            ("data", f"{examples} examples{batches}"),
            ("random seed", f"{usual}" + (f" ({others})" if others else "")),
            ("cost", cost),
        ]


class RunLog:
    """The file ``runs.json`` in the folder of a study, which lists the runs of the command.

    The file is written at the start of a run and after each step. If a run was killed, its record has the end
    'running', which the next run replaces by 'killed'. The time of a killed run lasts until its last recorded product.

    Parameters
    ----------
    directory : Path or None
        The folder, which need not exist. If None, no file is read or written.
    provenance : Provenance
        The provenance of the study. The earlier runs are added to its list of runs.
    """

    def __init__(self, directory: Path | None, provenance: Provenance) -> None:
        self._provenance = provenance
        self._path = None if directory is None else directory / "runs.json"
        if self._path is not None:
            provenance.runs[:0] = _earlier_runs(self._path)

    def record(self, products: int, seconds: float, recorded: int, end: str = RUNNING) -> None:
        """Record the state of the present run.

        Parameters
        ----------
        products : int
            Number of products that the run has computed.
        seconds : float
            Time since its start.
        recorded : int
            Number of products of which the folder holds a record; see `Provenance`.
        end : str, optional
            How the run has ended; see `Run`.
        """
        run = self._provenance.runs[-1]
        run.products, run.seconds, run.end, self._provenance.recorded = products, seconds, end, recorded
        if self._path is not None:
            content = [dataclasses.asdict(run) for run in self._provenance.runs]
            with appearing(self._path) as temporary:
                temporary.write_text(json.dumps(content, indent=1) + "\n")


def _earlier_runs(path: Path) -> list[Run]:
    try:
        runs = [Run(**content) for content in json.loads(path.read_text())]
        for run in runs:
            run.products, run.seconds, run.versions = int(run.products), float(run.seconds), dict(run.versions)
    except (OSError, ValueError, TypeError):  # the file is missing or damaged
        return _unlogged_run(path.parent)
    if runs and runs[-1].end == RUNNING:
        runs[-1].end = KILLED
        # Compare two files of the folder, so that a copy of the folder with new dates adds no time. Other files can be
        # newer than the run, for example notes, or the results of a computation with the eigenvectors.
        written = path.stat().st_mtime
        runs[-1].seconds += max(file.stat().st_mtime for file in [path, *path.parent.rglob("*.records")]) - written
    return runs


def _unlogged_run(directory: Path) -> list[Run]:
    """Return the run of an earlier version of this package, whose results are in a folder, or an empty list."""
    try:
        results = json.loads((directory / "spectrum.json").read_text())
        return [Run(None, None, {}, None, int(results["products"]), float(results["seconds"]), FINISHED)]
    except (OSError, ValueError, TypeError, KeyError):
        return []


def _name(item: Any) -> str:
    """Return the name of a function, or of the class of an object."""
    return str(getattr(item, "__name__", type(item).__name__))


def _counted(count: int, one: str, many: str) -> str:
    return f"{count:,} {one if count == 1 else many}"


def shown_date(date: str | None) -> str:
    """Return a date in ISO format as text, for example ``2026-11-30 19:12:52 UTC+01:00``."""
    return "unknown" if date is None else f"{date[:10]} {date[11:19]} UTC{date[19:]}"


def duration(seconds: float) -> str:
    """Return a duration as text: ``12.3 s``, ``3 min 20 s`` or ``2 h 5 min``."""
    if seconds < 100:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"
