"""Products on disk: of which problem they are, and where each of them is."""

from __future__ import annotations

import json
import os
import shutil
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import scipy
import torch
from numpy.typing import NDArray
from scipy.sparse.linalg import LinearOperator

from curvop.storage.fingerprint import OtherProblemError, differing, fingerprint, listed, state
from curvop.storage.records import RecordFile

__all__ = ["KEY_BYTES", "ProductStore"]

KEY_BYTES = 16
_FINGERPRINT, _PRODUCTS = "fingerprint.json", "products.records"
_TEMPORARY = ".fingerprint.json"
_FORMAT = "curvop journal 1"


class ProductStore:
    """A directory of the products of one operator and its adjoint, each under a key of 16 bytes.

    See `JournaledLinearOperator` for the arguments and the errors.

    Attributes
    ----------
    directory : Path
    file : RecordFile
    max_bytes : float
    where : dict of bytes to tuple of int
        Each product's record, by its offset, and its row in it.
    made, answered : int
        Products that were made in this process, and that were read.
    bypassed : bool
        Whether nothing is to be read or recorded for now.
    """

    def __init__(self, A: LinearOperator, directory: Path, max_bytes: float | None, sync_seconds: float) -> None:
        self.directory = directory
        self.made = self.answered = 0
        self.bypassed = False
        self.where: dict[bytes, tuple[int, int]] = {}
        self._A = A
        self._stopped = False
        _make(directory)
        self.file = RecordFile(directory / _PRODUCTS, sync_seconds=sync_seconds)
        try:
            self._state = state(A)
            self._fingerprint = fingerprint(A)
            self._compare()
        except BaseException:
            self.file.close()
            raise
        for keys, offset in self.file:
            self._note(keys, offset)
        room = shutil.disk_usage(directory).free + self.file.num_bytes
        self.max_bytes = room // 2 if max_bytes is None else max_bytes

    def check(self) -> None:
        """Refuse to answer where the matrix is another by now."""
        self.file.check_open()
        now = state(self._A)
        if now == self._state:
            return
        if names := differing(self._fingerprint, fingerprint(self._A)):
            raise RuntimeError(
                f"{listed(names)} changed since the journal in {self.directory} was opened, but a journal is of one "
                "problem at one point of the parameters: change them back, or journal the new operator in another "
                "directory"
            )
        self._state = now  # written to, but with the same values

    def record(self, keys: Sequence[bytes], products: NDArray[Any]) -> None:
        """Write the products ``(k, M)`` of the keys, as long as there is room for them."""
        key, products = b"".join(keys), np.ascontiguousarray(products)
        if self._stopped:
            return
        if self.file.num_bytes + RecordFile.record_bytes(key, products) > self.max_bytes:
            self._stopped = True
            warnings.warn(
                f"the journal in {self.directory} has reached max_bytes = {self.max_bytes:.6g}: products are made as "
                "before, but no more are recorded. Pass a larger max_bytes=",
                RuntimeWarning,
                stacklevel=2,
            )
            return
        self._note(key, self.file.append(key, products))

    def read(self, keys: Sequence[bytes]) -> dict[bytes, NDArray[Any]]:
        """Return the products of the keys, all of them recorded; each record is read once."""
        found: dict[bytes, NDArray[Any]] = {}
        by_record: dict[int, list[bytes]] = {}
        for key in keys:
            by_record.setdefault(self.where[key][0], []).append(key)
        for offset, those in by_record.items():
            [products] = self.file.read(offset)
            found |= {key: products[self.where[key][1]] for key in those}
        self.answered += len(keys)
        return found

    def _note(self, keys: bytes, offset: int) -> None:
        for row in range(len(keys) // KEY_BYTES):
            self.where[keys[row * KEY_BYTES : (row + 1) * KEY_BYTES]] = offset, row

    def _compare(self) -> None:
        """Compare the problem with that of the journal; where this is new, say in it of which problem it is."""
        path, versions = self.directory / _FINGERPRINT, _versions()
        advice = "pass another directory, or delete it"
        if not path.exists():
            if len(self.file):
                raise ValueError(
                    f"the journal in {self.directory} lacks its {_FINGERPRINT}, so that nobody knows of which problem "
                    f"its {len(self.file)} records are: {advice}"
                )
            _write(path, {"format": _FORMAT, "fingerprint": self._fingerprint, "made_with": [versions]})
            return
        try:
            told = json.loads(path.read_text())
            known, made_with = told["fingerprint"], told["made_with"]
            if told["format"] != _FORMAT:
                raise ValueError
        except (ValueError, KeyError, TypeError):
            raise ValueError(f"{path} is not what a journal of this version holds: {advice}") from None
        if names := differing(known, self._fingerprint):
            hint = ""
            if "seed" in names:
                hint = " (draws have a seed of their own in every run, unless you pass rng=)"
            elif all(name.startswith("data, ") for name in names):
                hint = " (data that is shuffled or augmented is other data in every run)"
            differ = "differs" if len(names) == 1 else "differ"
            raise OtherProblemError(
                f"the journal in {self.directory} is of another problem: {listed(names)} {differ}{hint}; {advice}"
            )
        if versions != made_with[-1]:
            _write(path, told | {"made_with": [*made_with, versions]})


def _make(directory: Path) -> None:
    """Make the directory, or see that there is nothing in it but a journal."""
    if directory.exists() and not directory.is_dir():
        raise ValueError(f"{directory} is a file: pass a directory, it is made")
    directory.mkdir(parents=True, exist_ok=True)
    for path in sorted(directory.iterdir()):
        if path.name not in (_FINGERPRINT, _PRODUCTS, _TEMPORARY):
            raise ValueError(
                f"{directory} holds {path.name!r}, which is not a journal's: pass a directory of its own, it is made"
            )


def _write(path: Path, content: Mapping[str, Any]) -> None:
    """Write a file that is there as a whole or not at all."""
    temporary = path.with_name(_TEMPORARY)  # one for all: only who has the lock writes
    try:
        with temporary.open("w") as file:
            json.dump(content, file, indent=1)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _versions() -> dict[str, str]:
    import curvop

    return {
        "curvop": curvop.__version__,
        "torch": torch.__version__,
        "numpy": np.__version__,
        "scipy": scipy.__version__,
    }
