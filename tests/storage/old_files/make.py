"""Make the files of this folder anew, with the version of the package whose files are to be read by later ones.

Run it with that version, and then `test_old_files.py`, from the root of its repository::

    PYTHONPATH=tests/storage python tests/storage/old_files/make.py

It writes beside itself, in place of what is there; nothing in it is random. Runs that are interrupted are ended after a
certain product, so that all files but the times in them are the same each time.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import platform
import runpy
import shutil
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import old_problem
import torch
from old_problem import OPERATORS, SIZE, vectors

import curvop
from curvop.spectrum import blocks, density, eigsh

HERE = Path(__file__).parent
AN_INSTANT = 1e-9  # seconds, after which a study ends with the next product


@contextlib.contextmanager
def copied(folder: Path) -> Iterator[Path]:
    """Give a copy of a folder."""
    with tempfile.TemporaryDirectory() as temporary:
        yield Path(shutil.copytree(folder, Path(temporary) / "copy"))


def write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=1) + "\n")


def journals(folder: Path) -> None:
    """Record products with arrays and tensors, and of the adjoint where it is another."""
    told: dict[str, np.ndarray] = {}
    for name in (*OPERATORS, old_problem.DISTRIBUTED):
        with old_problem.operator(name) as A, curvop.JournaledLinearOperator(A, folder / name) as J:
            told[name] = np.concatenate([np.ravel(product) for product in old_problem.products(J)])
            assert J.num_products == J.num_recorded
    np.savez_compressed(folder / "expected.npz", **told)


def torn_journal(folder: Path) -> None:
    """Record three products one by one, and cut the last one off in the middle, as a loss of power does."""
    A = old_problem.hessian()
    with curvop.JournaledLinearOperator(A, folder) as J:
        for column in vectors(SIZE, 3).T:
            J @ column
    path = folder / "products.records"
    os.truncate(path, path.stat().st_size - 20)


def densities(folder: Path) -> None:
    """Write checkpoints that end within the first group of probes, within the second, and with everything done."""
    told: dict[str, int] = {}
    for name, (make, options) in old_problem.DENSITIES.items():
        A = make()
        density(A, **options, progress=False).save(folder / f"{name}.npz")
        told[name] = A.num_products
    for stage, runs in old_problem.DENSITY_STAGES.items():
        make, options = old_problem.DENSITIES[stage.partition("-")[0]]
        for _ in range(runs or 1):
            seconds = 0 if runs else None
            found = density(make(), **options, checkpoint=folder / stage, seconds=seconds, progress=False)
        assert found.complete == (runs is None)
        with copied(folder / stage) as copy:
            A = make()
            density(A, **options, checkpoint=copy, progress=False)
            told[stage] = A.num_products
    write_json(folder / "products.json", told)


def block_studies(folder: Path) -> None:
    """Write a checkpoint that ends after every product, and keep it as it is at some moments."""

    def products(checkpoint: Path | None) -> int:
        with old_problem.counted_hessian() as (A, bar):
            found = blocks(A, **old_problem.BLOCKS, checkpoint=checkpoint, progress=False)
        assert found.complete
        found.save(folder / "blocks.npz")
        return int(bar.n)

    told, running = {"fresh": products(None)}, folder / "running"
    moments: dict[str, Callable[[], bool]] = {
        "steps": lambda: (running / "block 0" / "steps.records").stat().st_size > 1000,
        "norms": lambda: (running / "block 0").exists() and (running / "blocks.records").stat().st_size > 4000,
        "columns": lambda: (running / "block 2" / "columns.records").exists(),
    }
    for name, come in moments.items():
        while True:
            A = old_problem.hessian()
            blocks(A, **old_problem.BLOCKS, checkpoint=running, seconds=AN_INSTANT, progress=False)
            if come():
                break
        shutil.copytree(running, folder / name)
        with copied(running) as copy:
            told[name] = products(copy)
    shutil.rmtree(running)
    write_json(folder / "products.json", told)


def results(folder: Path) -> None:
    """Save what can be loaded again, and what the methods of it answer."""
    A = old_problem.hessian()
    told: dict[str, Any] = {}
    found = density(A, num_probes=3, num_steps=5, deflate=2, progress=False)
    found.save(folder / "density.npz")
    for name, part in (("trace", found.trace()), ("cdf", found.cdf(old_problem.POINTS))):
        told |= {f"density {name} {field}": getattr(part, field) for field in ("value", "error", "low", "high")}
    told["density text"] = str(found)
    for name, options in old_problem.EIGEN.items():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)
            pairs = eigsh(A, **options, progress=False)
        pairs.save(folder / f"eigen-{name}.npz")
        told |= {f"eigen {name} ok": pairs.ok, f"eigen {name} text": str(pairs)}
    for seconds in (AN_INSTANT,) * 6:
        study = blocks(A, **old_problem.BLOCKS, checkpoint=folder / "running", seconds=seconds, progress=False)
    shutil.rmtree(folder / "running")
    assert study.names
    assert study.unfinished
    study.save(folder / "blocks.npz")
    told |= {"blocks traces": study.traces.value, "blocks text": str(study)}
    np.savez_compressed(folder / "expected.npz", **{name: np.asarray(value) for name, value in told.items()})


class Stop:
    """Lets so many columns of Hessians be multiplied, and then interrupts, as Ctrl-C does."""

    def __init__(self, columns: int) -> None:
        self.left = columns
        self._apply = curvop.HessianLinearOperator._apply

    def apply(self, operator: Any, rows: Any) -> Any:
        if self.left < len(rows):
            raise KeyboardInterrupt
        self.left -= len(rows)
        return self._apply(operator, rows)


def command(*arguments: str, columns: int | None = None) -> tuple[int, str]:
    """Run ``python -m curvop``, which is interrupted after so many columns; return its exit code and its output."""
    stop, out = Stop(10**9 if columns is None else columns), io.StringIO()
    with (
        mock.patch.object(sys, "argv", ["curvop", *arguments]),
        mock.patch.object(curvop.HessianLinearOperator, "_apply", lambda self, rows: stop.apply(self, rows)),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(io.StringIO()),
    ):
        try:
            runpy.run_module("curvop", run_name="__main__")
        except SystemExit as end:
            return int(end.code or 0), out.getvalue()
    return 0, out.getvalue()


def studies(folder: Path) -> None:
    """Write folders of ``curvop spectrum`` that end within the density, within the blocks, and with everything done."""
    for name, (columns, _) in old_problem.STUDIES.items():
        code, _ = command(*old_problem.STUDY, "--out", str(folder / name), columns=columns)
        assert code == (0 if columns is None else 130)
        for path in folder.glob(f"{name}/*.*"):  # those that nobody reads again, and some of one kind
            if path.suffix != ".json" and not (columns is None and path.name in old_problem.STUDY_RESULTS):
                path.unlink()


def commands(folder: Path) -> None:
    """Keep what the commands print as JSON and save."""
    for name, arguments in old_problem.COMMANDS.items():
        more = ["--out", str(folder / f"{name}.npz")] if name in old_problem.SAVED else []
        code, out = command(*arguments, *more)
        assert code == 0, (name, code, out)
        (folder / f"{name}.json").write_text(out)


def main() -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("error")
    for make in (journals, torn_journal, densities, block_studies, results, studies, commands):
        folder = HERE / make.__name__.replace("_", "-")
        shutil.rmtree(folder, ignore_errors=True)
        if make is not torn_journal:
            folder.mkdir()
        make(folder)
    versions = {"curvop": curvop.__version__, "python": platform.python_version(), "torch": torch.__version__}
    write_json(HERE / "versions.json", versions)


if __name__ == "__main__":
    main()
