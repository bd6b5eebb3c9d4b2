"""Files, journals and command lines that are none."""

from __future__ import annotations

import contextlib
import io
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.sparse.linalg import LinearOperator

from bad_inputs.rows import (
    DENSE,
    DENSITY,
    INDEFINITE,
    ONES,
    CommandError,
    area,
    file_with,
    hessian,
    mlp,
)
from curvop import (
    JournaledLinearOperator,
    spectrum,
)
from curvop.cli.main import main
from curvop.storage.fingerprint import OtherProblemError
from curvop.storage.records import RecordFileError


def journal(directory: Any, A: LinearOperator = DENSE, **options: Any) -> JournaledLinearOperator:
    return JournaledLinearOperator(A, directory, **options)


def journal_of_another(tmp: Path) -> None:
    with journal(tmp) as J:
        J @ np.ones(4)
    journal(tmp, INDEFINITE)


def journal_in_use(tmp: Path) -> None:
    with journal(tmp):
        journal(tmp)


def journal_of_text(tmp: Path) -> None:
    (tmp / "products.records").write_bytes(b"hello, this is no file of records")
    journal(tmp)


def journal_after_a_step(tmp: Path) -> None:
    model = mlp()
    with journal(tmp, hessian(model=model, params=dict(model.named_parameters()))) as J:
        J @ ONES
        with torch.no_grad():
            model[0].bias += 1
        J @ ONES


def journal_closed(tmp: Path) -> None:
    with journal(tmp) as J:
        pass
    J @ np.ones(4)


def journal_among_other_files(tmp: Path) -> None:
    (tmp / "notes.txt").write_text("mine")
    journal(tmp)


def journal_without_fingerprint(tmp: Path) -> None:
    with journal(tmp) as J:
        J @ np.ones(4)
    (tmp / "fingerprint.json").unlink()
    journal(tmp)


def torn(tmp: Path) -> None:
    DENSITY.save(tmp / "torn.npz")
    content = (tmp / "torn.npz").read_bytes()
    (tmp / "torn.npz").write_bytes(content[: len(content) // 2])
    spectrum.SpectralDensity.load(tmp / "torn.npz")


def archive(tmp: Path, **arrays: Any) -> Path:
    np.savez(tmp / "archive.npz", **arrays)
    return tmp / "archive.npz"


def pickled(tmp: Path) -> Path:
    fields = ("size", "nodes", "weights", "atoms", "num_products", "complete", "recurrences", "resolution")
    return archive(tmp, **{name: np.array([print], dtype=object) for name in fields})


PROBLEM = """
import torch
from torch import nn

def bare():
    return 3

def incomplete():
    return dict(model=nn.Identity(), loss_function=nn.MSELoss(), data=[])

def misspelt():
    return dict(model=nn.Identity(), loss=nn.MSELoss(), params={}, data=[])

def failing():
    raise RuntimeError("no such data")

def needing(path):
    pass

number = 3

class Shuffled:
    passes = 0

    def __iter__(self):
        self.passes += 1
        batches = [(torch.ones(2, 3), torch.ones(2, 1)), (torch.zeros(2, 3), torch.ones(2, 1))]
        return iter(batches[:: (-1) ** self.passes])

def shuffled():
    def model(params, X):
        return X @ params["weight"].T
    return dict(model=model, loss_function=nn.MSELoss(), params=dict(weight=torch.ones(1, 3)), data=Shuffled())
"""


def command(*arguments: str) -> None:
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main(list(arguments))
    assert code == 2, (code, out.getvalue(), err.getvalue())
    raise CommandError(err.getvalue().strip())


def of_file(tmp: Path, function: str) -> None:
    (tmp / "problem.py").write_text(PROBLEM)
    command("eigs", f"{tmp / 'problem.py'}:{function}")


def study_of_file(tmp: Path, function: str) -> None:
    (tmp / "problem.py").write_text(PROBLEM)
    command("spectrum", f"{tmp / 'problem.py'}:{function}", "--out", f"{tmp / 'study'}")


area(
    "Files and journals",
    (
        "a result, saved to a folder that does not exist",
        lambda tmp: DENSITY.save(tmp / "runs" / "density.npz"),
        FileNotFoundError,
        "but the folder 'DIRECTORY/runs' does not exist: create it",
    ),
    (
        "a result, saved to a folder in place of a file",
        lambda tmp: DENSITY.save(tmp),
        IsADirectoryError,
        "path is 'DIRECTORY', a folder: pass a file in it",
    ),
    (
        "a result, saved to a file in place of a folder",
        lambda tmp: DENSITY.save(file_with(tmp, b"") / "density.npz"),
        NotADirectoryError,
        "'DIRECTORY/file' is a file: pass a path in a folder",
    ),
    (
        "a file with pickled objects",
        lambda tmp: spectrum.SpectralDensity.load(pickled(tmp)),
        ValueError,
        "DIRECTORY/archive.npz was not written by SpectralDensity.save",
    ),
    (
        "a file of something else",
        lambda tmp: spectrum.EigenResult.load(archive(tmp, a=1)),
        ValueError,
        "DIRECTORY/archive.npz was not written by EigenResult.save",
    ),
    (
        "a file of text",
        lambda tmp: spectrum.BlockStudy.load(file_with(tmp, b"hello")),
        ValueError,
        "DIRECTORY/file was not written by BlockStudy.save",
    ),
    ("a file that is torn", torn, ValueError, "DIRECTORY/torn.npz was not written by SpectralDensity.save"),
    ("a journal of a matrix", lambda tmp: journal(tmp, np.eye(4)), TypeError, "A is a ndarray, not a LinearOperator"),
    ("a journal nowhere", lambda: journal(None), TypeError, "directory is a NoneType"),
    ("a journal in a file", lambda tmp: journal(file_with(tmp, b"x")), ValueError, "DIRECTORY/file is a file"),
    ("a journal among other files", journal_among_other_files, ValueError, "DIRECTORY holds 'notes.txt'"),
    (
        "the journal of another matrix",
        journal_of_another,
        OtherProblemError,
        "the journal in DIRECTORY belongs to another",
    ),
    ("a journal that is in use", journal_in_use, RecordFileError, "DIRECTORY/products.records is in use"),
    ("a journal that is closed", journal_closed, RecordFileError, "DIRECTORY/products.records is closed"),
    ("a journal without its fingerprint", journal_without_fingerprint, ValueError, "lacks its fingerprint.json"),
    ("a journal of what has changed since", journal_after_a_step, RuntimeError, "params['0.bias'] changed"),
    (
        "records of something else",
        journal_of_text,
        RecordFileError,
        "DIRECTORY/products.records is not a record file",
    ),
    ("a journal of negative size", lambda tmp: journal(tmp, max_bytes=-1), ValueError, "max_bytes is -1"),
    ("objects to record", lambda tmp: journal(tmp) @ np.array([None] * 4), TypeError, "x has dtype object"),
    (
        "tensors for an operator that takes none",
        lambda tmp: journal(tmp) @ torch.ones(4),
        TypeError,
        "takes NumPy arrays",
    ),
)
area(
    "The command",
    (
        "a misspelt problem",
        lambda: command("eigs", "digit"),
        CommandError,
        "no problem 'digit' (did you mean 'digits'?)",
    ),
    (
        "a file that is not there",
        lambda tmp: command("eigs", f"{tmp}/p.py:f"),
        CommandError,
        "no file 'DIRECTORY/p.py'",
    ),
    ("a module that is not there", lambda: command("eigs", "no_module:f"), CommandError, "no module named 'no_module'"),
    (
        "a file without a function's name",
        lambda: command("eigs", "p.py"),
        CommandError,
        "name its function: 'p.py:function'",
    ),
    ("a misspelt function", lambda tmp: of_file(tmp, "incompleet"), CommandError, "no function 'incompleet'"),
    ("a problem that is no dict", lambda tmp: of_file(tmp, "bare"), CommandError, "returned an object of type int"),
    ("a problem that lacks a key", lambda tmp: of_file(tmp, "incomplete"), CommandError, "returned no 'params'"),
    (
        "a problem with an unknown key",
        lambda tmp: of_file(tmp, "misspelt"),
        CommandError,
        "returned the unknown key 'loss'",
    ),
    (
        "a function with arguments",
        lambda tmp: of_file(tmp, "needing"),
        CommandError,
        "must be callable without arguments",
    ),
    (
        "something that is no function",
        lambda tmp: of_file(tmp, "number"),
        CommandError,
        "not a function but of type int",
    ),
    ("an unknown option", lambda: command("eigs", "digits", "--kk", "3"), CommandError, "unrecognized arguments: --kk"),
    ("a number in words", lambda: command("eigs", "digits", "--k", "ten"), CommandError, "argument --k: 'ten'"),
    ("no eigenvalue", lambda: command("eigs", "digits", "--k", "0"), CommandError, "argument --k: must be >= 1"),
    ("too many", lambda: command("eigs", "digits", "--k", "99999"), CommandError, "--k = 99999 is too large"),
    (
        "a misspelt block",
        lambda: command("eigs", "digits", "--block", "0.wight"),
        CommandError,
        "--block: no parameter",
    ),
    (
        "negative damping",
        lambda: command("solve", "digits", "--damping", "-1"),
        CommandError,
        "argument --damping: must be",
    ),
    (
        "a file of another kind",
        lambda: command("eigs", "digits", "--out", "x.txt"),
        CommandError,
        "argument --out: 'x.txt'",
    ),
    (
        "a folder that is not there",
        lambda tmp: command("eigs", "digits", "--out", f"{tmp}/no/x.npz"),
        CommandError,
        "argument --out: no folder 'DIRECTORY/no'",
    ),
    (
        "resuming nothing",
        lambda: command("spectrum", "digits", "--resume"),
        CommandError,
        "argument --resume: needs --out",
    ),
    (
        "a deadline in the past",
        lambda: command("spectrum", "digits", "--deadline", "-5"),
        CommandError,
        "argument --deadline",
    ),
    (
        "a device that is not there",
        lambda: command("eigs", "digits", "--device", "cuda:64"),
        CommandError,
        "argument --device: 'cuda:64' is not available",
    ),
    (
        "a device that is none",
        lambda: command("solve", "digits", "--device", "gpu"),
        CommandError,
        "argument --device: 'gpu' is not a device",
    ),
    (
        "no restart",
        lambda: command("eigs", "digits", "--maxiter", "0"),
        CommandError,
        "argument --maxiter: must be >= 1",
    ),
    (
        "a time in words",
        lambda: command("eigs", "digits", "--seconds", "soon"),
        CommandError,
        "argument --seconds: 'soon' is not a duration",
    ),
    (
        "data in another order in each pass",
        lambda tmp: study_of_file(tmp, "shuffled"),
        CommandError,
        "data yields different batches in two passes (batches 0 and 1)",
    ),
)
