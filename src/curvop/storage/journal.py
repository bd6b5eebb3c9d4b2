"""A journal of products: what was multiplied once is answered from disk, in this run and in later ones."""

from __future__ import annotations

import contextlib
import copy
import hashlib
import importlib.metadata
import json
import os
import shutil
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Self, cast

import numpy as np
import scipy
import torch
from numpy.typing import NDArray
from scipy.sparse.linalg import LinearOperator
from torch import Tensor

from curvop.operators.base import Rows, TensorLinearOperator, WrappingLinearOperator
from curvop.operators.validation import real_number
from curvop.storage.fingerprint import OtherProblemError, differing, fingerprint, listed, state
from curvop.storage.records import RecordFile

__all__ = ["KEY_BYTES", "JournaledLinearOperator", "ProductStore", "UnrecordedError"]


class UnrecordedError(LookupError):
    """A product was asked of a journal alone that is not in it."""


class JournaledLinearOperator(WrappingLinearOperator):
    """`A`, with every product recorded on disk as it is made, and answered from there when it is asked for again.

    Kill the process at any moment and start the same script again: a solver that is deterministic asks for the same
    products, gets all those that were recorded to the last bit, and continues where it was. Give it its start
    (``eigsh(J, v0=...)``, or ``rng=``), as a random one is another in every run.

    Any solver takes it, ``svds`` and ``lsmr`` by products with the adjoint as well. Products are looked up by a hash of
    the vector's bytes, column by column; what is missing of a block is multiplied together and written as one record.
    So blocks of which a part is missing round otherwise than whole ones in the last bits, but with ``columns=1``.

    Parameters
    ----------
    A : LinearOperator
        One of this package's (``A.damped(lam)``, ``A.block(...)``, and a submatrix too) or any other.
    directory : str or path
        Of this journal alone; made where it does not exist.
    max_bytes : int, optional
        What the products may take on disk, by default half of what is free there (with what they take already).
        Where that is reached, recording stops with a warning, and products go on being made.
    sync_seconds : float
        How much a loss of power may take, in seconds, see `RecordFile`; the death of the process takes nothing.

    Attributes
    ----------
    num_products : int
        Columns that `A` has multiplied in this process, those of the adjoint included.
    num_answered : int
        Columns answered from disk.
    num_recorded : int
        Columns on disk.
    num_bytes : int
        What they take.

    Raises
    ------
    ValueError
        Where the directory holds the journal of another problem (naming the parameters or batches that differ; see
        `curvop.fingerprint.fingerprint` for what is compared), or anything else. Another version of this package, of
        torch, NumPy or SciPy is noted and not refused. Nothing is changed.
    RecordFileError
        Where another process has the journal open, or a record is damaged. Nothing is changed.
    RuntimeError
        By a product, where the model or the data were written to since: a journal is of one point.
    OSError
        By a product that cannot be recorded, on a full disk for one. All records stay, and the next product tries
        again.

    Examples
    --------
    >>> import tempfile
    >>> from scipy.sparse.linalg import aslinearoperator, cg
    >>> A, b = aslinearoperator(np.diag([1.0, 2.0, 3.0])), np.ones(3)
    >>> with tempfile.TemporaryDirectory() as directory:
    ...     with JournaledLinearOperator(A, directory) as J:
    ...         x, _ = cg(J, b)
    ...     with JournaledLinearOperator(A, directory) as J:
    ...         again, _ = cg(J, b)
    ...         print((x == again).all(), J.num_products, J.num_answered)
    True 0 3
    """

    def __init__(
        self,
        A: LinearOperator,
        directory: str | os.PathLike[str],
        *,
        max_bytes: float | None = None,
        sync_seconds: float = 1.0,
    ) -> None:
        if not isinstance(A, LinearOperator):
            raise TypeError(
                f"A is a {type(A).__name__}, not a LinearOperator: wrap it, scipy.sparse.linalg.aslinearoperator(A)"
            )
        if len(A.shape) != 2:
            raise ValueError(f"A has shape {A.shape}: a stack of operators has no journal, take one of them")
        if max_bytes is not None and not real_number("max_bytes", max_bytes) >= 0:
            raise ValueError(f"max_bytes is {max_bytes}, but must be a number of bytes, or None")
        if not isinstance(directory, str | os.PathLike):
            raise TypeError(f"directory is a {type(directory).__name__}: pass the path of a directory, it is made")
        super().__init__(A.dtype, A.shape)
        self.args = (A,)
        self._A = A
        self._side = "forward"
        self._multiplies = True
        self._journal = ProductStore(A, Path(directory), max_bytes, sync_seconds)

    @property
    def num_products(self) -> int:
        """Columns that `A` has multiplied in this process, those of the adjoint included."""
        return self._journal.made

    @property
    def num_answered(self) -> int:
        """Columns answered from disk, those of the adjoint included."""
        return self._journal.answered

    @property
    def num_recorded(self) -> int:
        """Columns on disk, those of the adjoint included."""
        return len(self._journal.where)

    @property
    def num_bytes(self) -> int:
        """What the products take on disk."""
        return self._journal.file.num_bytes

    def report(self) -> str:
        """Return one sentence: how many products the journal holds, what they take, how many were made."""
        journal = self._journal
        return (
            f"journal in {journal.directory}: {self.num_recorded} products on disk, {self.num_bytes / 1e6:.3g} MB of "
            f"at most {journal.max_bytes / 1e6:.3g} MB; in this process {self.num_products} were made and "
            f"{self.num_answered} answered from disk"
        )

    def __str__(self) -> str:
        return self.report()

    def recall(self) -> Self:
        """Return the operator that answers what is on disk, and raises an `UnrecordedError` instead of multiplying."""
        recalling = copy.copy(self)  # shares the journal
        recalling._multiplies = False
        return recalling

    @contextlib.contextmanager
    def bypassed(self) -> Iterator[None]:
        """Multiply by `A`, within the context, as if there were no journal: nothing is answered, nothing recorded."""
        before = self._journal.bypassed
        self._journal.bypassed = self._multiplies
        try:
            yield
        finally:
            self._journal.bypassed = before

    def close(self) -> None:
        """Close the journal, so that another process can open it; products cannot be asked for any more."""
        self._journal.file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _adjoint(self) -> Self:
        adjoint = self._A.H
        if adjoint is self._A:
            return self
        mirrored = copy.copy(self)  # shares the journal
        mirrored._A, mirrored.args, mirrored.shape = adjoint, (adjoint,), adjoint.shape
        mirrored._side = "adjoint" if self._side == "forward" else "forward"
        return mirrored

    def _transpose(self) -> LinearOperator:
        if self.dtype is not None and self.dtype.kind != "c":
            return self._adjoint()
        return LinearOperator._transpose(self)  # by the adjoint and conjugates

    def _check_entries(self, x: Rows) -> None:
        if isinstance(x, Tensor) and not self.takes_tensors:
            raise TypeError(f"A, a {type(self._A).__name__}, takes NumPy arrays only: pass x.numpy(force=True)")
        if not isinstance(x, Tensor) and x.dtype.hasobject:
            raise TypeError(f"x has dtype {x.dtype}, whose entries cannot be recorded: pass numbers")

    def _apply(self, rows: Rows) -> Rows:
        journal = self._journal
        if journal.bypassed:
            return self._multiply(rows)
        journal.check()
        keys = self._keys(rows)
        missing = {key: index for index, key in reversed(list(enumerate(keys))) if key not in journal.where}
        fresh: dict[bytes, Any] = {}
        if missing:
            positions = sorted(missing.values())
            products = self._multiply(rows if len(positions) == len(rows) else rows[positions])
            names = [keys[position] for position in positions]
            journal.record(names, _bytes_of(products) if isinstance(products, Tensor) else products)
            if len(positions) == len(rows):
                return products
            fresh = dict(zip(names, products, strict=True))
        found = journal.read([key for key in keys if key not in fresh])
        if isinstance(rows, Tensor):
            told = {key: torch.from_numpy(value).view(rows.dtype).to(rows.device) for key, value in found.items()}
            return torch.stack([fresh[key] if key in fresh else told[key] for key in keys])
        return np.stack([fresh[key] if key in fresh else found[key] for key in keys])

    def _keys(self, rows: Rows) -> list[bytes]:
        """Return 128 bits for each row, by which its product is known."""
        kind = hashlib.blake2b(f"{self._side} {type(rows).__name__} {rows.dtype};".encode(), digest_size=KEY_BYTES)
        keys = []
        for row in _bytes_of(rows) if isinstance(rows, Tensor) else rows:
            found = kind.copy()
            found.update(cast("bytes", np.ascontiguousarray(row).view(np.uint8)))
            keys.append(found.digest())
        return keys

    def _multiply(self, rows: Rows) -> Rows:
        """Return A's products with some rows, in memory that nobody else has."""
        if not self._multiplies:
            raise UnrecordedError(f"{len(rows)} products are not in the journal in {self._journal.directory}")
        products = self._A.matvec(rows[0])[None] if len(rows) == 1 else self._A.matmat(rows.T).T
        self._journal.made += len(rows)
        if isinstance(self._A, TensorLinearOperator):
            return cast("Rows", products)
        return np.array(products, order="C")


def _bytes_of(tensor: Tensor) -> NDArray[Any]:
    """Return the bytes of ``(K, N)``, on the host: NumPy does not have all of torch's dtypes."""
    host = tensor.detach().resolve_conj().resolve_neg().cpu().contiguous()
    return host.view(torch.uint8).numpy()


# Products on disk: of which problem they are, and where each of them is.

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
    return {
        "curvop": importlib.metadata.version("curvop"),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "scipy": scipy.__version__,
    }
