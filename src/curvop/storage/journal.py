"""Journal of matrix-vector products on disk, with which a solver can resume after its process was killed.

A journal is a directory with two files. ``fingerprint.json`` identifies the problem and the values of the parameters
(`curvop.storage.fingerprint`), and lists the library versions with which products were recorded. ``products.records``
contains the products (`curvop.storage.records`). The key of a product is a 128-bit BLAKE2b hash of the vector.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
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
from curvop.operators.validation import real_scalar
from curvop.operators.version import __version__
from curvop.storage.fingerprint import OtherProblemError, differing, fingerprint, listed, state
from curvop.storage.records import RecordFile

__all__ = ["KEY_BYTES", "JournaledLinearOperator", "ProductStore", "UnrecordedError", "library_versions"]

KEY_BYTES = 16
_FINGERPRINT_FILE, _PRODUCTS_FILE = "fingerprint.json", "products.records"
_TEMPORARY_FILE = ".fingerprint.json"
_FORMAT = "curvop journal 1"


class UnrecordedError(LookupError):
    """Raised if a product is not in the journal, and the operator is not allowed to compute it."""


class JournaledLinearOperator(WrappingLinearOperator):
    """Operator that records every product with `A` on disk, and reads repeated products from disk.

    Use it for long runs of solvers that do not save checkpoints, for example SciPy's ``eigsh``, ``cg`` or ``lsmr``. If
    the process is killed, run the same script again. A deterministic solver requests the same products again, receives
    exact copies of the recorded products, and continues at the point where the first run stopped. Fix the starting
    vector of the solver (``eigsh(J, v0=...)`` or ``rng=...``), because a random starting vector is different in every
    run. `curvop.spectrum.density` and `curvop.spectrum.blocks` have a ``checkpoint`` argument and do not need a
    journal.

    Products with the adjoint are also recorded, because ``svds`` and ``lsmr`` use them.

    Parameters
    ----------
    A : LinearOperator, shape (M, N)
        An operator of this package (also ``A.damped(lam)``, ``A.block(...)`` or a submatrix) or any other SciPy
        ``LinearOperator``.
    directory : str or path-like
        Directory that contains only this journal. The directory is created if it does not exist.
    max_bytes : float, optional
        Largest size of the recorded products in bytes. If this size is reached, a warning is issued, and later products
        are computed but not recorded. The default is half of the disk space that is either free or used by this
        journal.
    sync_seconds : float, optional
        Minimum time in seconds between two forced writes to disk (``fsync``). A write is forced only when a product is
        recorded. A power failure can lose the products that were recorded since the last forced write. If only the
        process is killed, no product is lost. 0 forces a write after each product, and ``math.inf`` disables forced
        writes. Default: 1.

    Attributes
    ----------
    num_products : int
        Number of products computed in this process. Each column of a matrix counts as one product.
    num_answered : int
        Number of products read from disk in this process.
    num_recorded : int
        Number of products on disk.
    num_bytes : int
        Size of the recorded products in bytes.

    Raises
    ------
    TypeError
        If `A` is not a ``LinearOperator``, or if `directory` is not a path.
    ValueError
        If the directory contains the journal of another problem, or files that do not belong to a journal. The message
        names the parameters or batches that differ. `curvop.storage.fingerprint.fingerprint` lists the inputs that are
        compared. The directory is left unchanged. A journal that was written with other versions of this package,
        torch, NumPy or SciPy is accepted, and the current versions are added to the journal.
    RecordFileError
        If another process has the journal open, or if a record is damaged. The directory is left unchanged.
    RuntimeError
        If the model or the data have been modified since the journal was opened. The next product raises this error. A
        journal belongs to fixed values of the parameters.
    OSError
        If a product cannot be recorded, for example because the disk is full. Earlier products are kept, and the next
        product is recorded if possible.

    Warns
    -----
    RuntimeWarning
        If the journal reaches `max_bytes`.

    See Also
    --------
    curvop.spectrum.density : Spectral density, with a ``checkpoint`` argument.
    curvop.storage.fingerprint.fingerprint : Digests that identify a problem.

    Notes
    -----
    If the operator is applied to a matrix, each column is looked up separately, by a hash of its bytes. The columns
    whose products are not recorded are combined into one matrix. `A` is applied to this matrix, and the products are
    written as one record. The number of columns of this matrix can affect the last bits of the products. If the
    products must not depend on it, pass an operator that processes one column at a time (``columns=1``).

    A float64 product takes about ``8 * M`` bytes on disk. Each application of the operator also reads the parameters
    once, to detect modifications.

    Examples
    --------
    >>> import tempfile
    >>> import torch
    >>> from scipy.sparse.linalg import eigsh
    >>> from curvop import HessianLinearOperator, JournaledLinearOperator
    >>> _ = torch.manual_seed(0)
    >>> model = torch.nn.Sequential(torch.nn.Linear(4, 5), torch.nn.Tanh(), torch.nn.Linear(5, 1))
    >>> data = [(torch.randn(20, 4), torch.randn(20, 1))]
    >>> H = HessianLinearOperator(model, torch.nn.MSELoss(), dict(model.named_parameters()), data)
    >>> directory = tempfile.TemporaryDirectory()
    >>> start = np.ones(H.shape[0])
    >>> with JournaledLinearOperator(H, directory.name) as J:
    ...     values = eigsh(J, k=2, v0=start, return_eigenvectors=False)

    A second run computes no product and returns the same numbers:

    >>> with JournaledLinearOperator(H, directory.name) as J:
    ...     again = eigsh(J, k=2, v0=start, return_eigenvectors=False)
    ...     print(J.num_products, (again == values).all())
    0 True
    >>> directory.cleanup()
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
                f"A is a {type(A).__name__}, not a LinearOperator: wrap it with scipy.sparse.linalg.aslinearoperator(A)"
            )
        if len(A.shape) != 2:
            raise ValueError(f"A has shape {A.shape}, but a journal needs one matrix: pass one operator of the stack")
        if max_bytes is not None and not real_scalar("max_bytes", max_bytes) >= 0:
            raise ValueError(f"max_bytes is {max_bytes}, but must be a number of bytes >= 0, or None")
        if not isinstance(directory, str | os.PathLike):
            raise TypeError(
                f"directory is a {type(directory).__name__}, but must be a str or a path: pass the path of a "
                "directory, which is created if it does not exist"
            )
        super().__init__(A.dtype, A.shape)
        self.args = (A,)
        self._A = A
        self._side = "forward"
        self._may_multiply = True
        self._store = ProductStore(A, Path(directory), max_bytes, sync_seconds)

    @property
    def num_products(self) -> int:
        """Number of products (columns) computed in this process, including products with the adjoint."""
        return self._store.num_products

    @property
    def num_answered(self) -> int:
        """Number of products (columns) read from disk in this process, including products with the adjoint."""
        return self._store.num_answered

    @property
    def num_recorded(self) -> int:
        """Number of products (columns) on disk, including products with the adjoint."""
        return len(self._store.locations)

    @property
    def num_bytes(self) -> int:
        """Size of the recorded products in bytes."""
        return self._store.file.num_bytes

    def report(self) -> str:
        """Return a one-line summary: the size of the journal, and the numbers of recorded, computed and read products.

        Returns
        -------
        str
        """
        store = self._store
        return (
            f"journal in {store.directory}: {self.num_recorded} products on disk, {self.num_bytes / 1e6:.3g} MB of "
            f"at most {store.max_bytes / 1e6:.3g} MB; this process computed {self.num_products} and read "
            f"{self.num_answered} from disk"
        )

    def __str__(self) -> str:
        return self.report()

    def recall(self) -> Self:
        """Return an operator that reads recorded products and does not compute products.

        Use it to repeat a computation without a pass over the data.

        Returns
        -------
        JournaledLinearOperator
            Operator that uses the same journal. If a product is not recorded, the operator raises ``UnrecordedError``,
            a subclass of ``LookupError``.
        """
        recalling = copy.copy(self)  # shares the store
        recalling._may_multiply = False
        return recalling

    @contextlib.contextmanager
    def bypassed(self) -> Iterator[None]:
        """Disable the journal within a ``with`` block. Products are then computed, but neither read nor recorded.

        Use it to measure the speed of the operator itself, or to check the operator.
        """
        before = self._store.bypassed
        self._store.bypassed = self._may_multiply
        try:
            yield
        finally:
            self._store.bypassed = before

    def close(self) -> None:
        """Close the journal, so that another process can open it. Later products raise an error."""
        self._store.file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _adjoint(self) -> Self:
        adjoint = self._A.H
        if adjoint is self._A:
            return self
        mirrored = copy.copy(self)  # shares the store
        mirrored._A, mirrored.args, mirrored.shape = adjoint, (adjoint,), adjoint.shape
        mirrored._side = "adjoint" if self._side == "forward" else "forward"
        return mirrored

    def _transpose(self) -> LinearOperator:
        if self.dtype is not None and self.dtype.kind != "c":
            return self._adjoint()
        return LinearOperator._transpose(self)  # computes conj(A.H @ conj(x)), which is recorded

    def _check_entries(self, x: Rows) -> None:
        if isinstance(x, Tensor) and not self.takes_tensors:
            raise TypeError(f"A, a {type(self._A).__name__}, takes NumPy arrays only: pass x.numpy(force=True)")
        if not isinstance(x, Tensor) and x.dtype.hasobject:
            raise TypeError(f"x has dtype {x.dtype}, whose entries cannot be recorded: pass numbers")

    def _apply(self, rows: Rows) -> Rows:
        store = self._store
        if store.bypassed:
            return self._multiply(rows)
        store.check_unchanged()
        keys = self._keys(rows)
        missing: dict[bytes, int] = {}  # maps each missing key to the first row with this key
        for position, key in enumerate(keys):
            if key not in store.locations:
                missing.setdefault(key, position)
        computed: dict[bytes, Any] = {}
        if missing:
            positions = list(missing.values())
            products = self._multiply(rows if len(positions) == len(rows) else rows[positions])
            store.record(list(missing), _as_bytes(products) if isinstance(products, Tensor) else products)
            if len(positions) == len(rows):
                return products
            computed = dict(zip(missing, products, strict=True))
        recorded: dict[bytes, Any] = store.read([key for key in keys if key not in computed])
        if isinstance(rows, Tensor):
            for key, value in recorded.items():
                recorded[key] = torch.from_numpy(value).view(rows.dtype).to(rows.device)
            return torch.stack([computed[key] if key in computed else recorded[key] for key in keys])
        return np.stack([computed[key] if key in computed else recorded[key] for key in keys])

    def _keys(self, rows: Rows) -> list[bytes]:
        """Return one key for each row.

        A key is a hash of the row, its dtype and its type (array or tensor). It also depends on whether the row is
        multiplied by A or by the adjoint of A.
        """
        prefix = hashlib.blake2b(f"{self._side} {type(rows).__name__} {rows.dtype};".encode(), digest_size=KEY_BYTES)
        keys = []
        for row in _as_bytes(rows) if isinstance(rows, Tensor) else rows:
            key = prefix.copy()
            key.update(cast("bytes", np.ascontiguousarray(row).view(np.uint8)))
            keys.append(key.digest())
        return keys

    def _multiply(self, rows: Rows) -> Rows:
        """Multiply A by each row, and return the products in memory that is not shared with other arrays."""
        if not self._may_multiply:
            raise UnrecordedError(
                f"{len(rows)} of the requested products are not in the journal in {self._store.directory}, and an "
                "operator from recall() computes none: use the journaled operator itself"
            )
        products = self._A.matvec(rows[0])[None] if len(rows) == 1 else self._A.matmat(rows.T).T
        self._store.num_products += len(rows)
        if isinstance(self._A, TensorLinearOperator):
            return cast("Rows", products)
        return np.array(products, order="C")


class ProductStore:
    """Directory that stores the products of one operator and its adjoint under keys of 16 bytes.

    `JournaledLinearOperator` documents the arguments and errors.

    Attributes
    ----------
    directory : Path
    file : RecordFile
    max_bytes : float
    locations : dict of bytes to tuple of int
        Maps the key of each product to the offset of its record, and to the row of the product in the record.
    num_products, num_answered : int
        Number of products computed in this process, and number of products read from disk in this process.
    bypassed : bool
        If True, products are currently neither read nor recorded.
    """

    def __init__(self, A: LinearOperator, directory: Path, max_bytes: float | None, sync_seconds: float) -> None:
        self.directory = directory
        self.num_products = self.num_answered = 0
        self.bypassed = False
        self.locations: dict[bytes, tuple[int, int]] = {}
        self._A = A
        self._is_full = False
        _prepare_directory(directory)
        self.file = RecordFile(directory / _PRODUCTS_FILE, sync_seconds=sync_seconds)
        try:
            self._state = state(A)
            self._fingerprint = fingerprint(A)
            self._check_fingerprint()
        except BaseException:
            self.file.close()
            raise
        for keys, offset in self.file:
            self._add_locations(keys, offset)
        available = shutil.disk_usage(directory).free + self.file.num_bytes
        self.max_bytes = available // 2 if max_bytes is None else max_bytes

    def check_unchanged(self) -> None:
        """Raise an error if the operator's matrix has changed since the journal was opened."""
        self.file.check_open()
        now = state(self._A)
        if now == self._state:
            return
        if names := differing(self._fingerprint, fingerprint(self._A)):
            raise RuntimeError(
                f"{listed(names)} changed since the journal in {self.directory} was opened, but a journal belongs to "
                "one problem at one parameter point: undo the change, or open a journal for the new operator in "
                "another directory"
            )
        self._state = now  # tensors were written to, but their values are the same

    def record(self, keys: Sequence[bytes], products: NDArray[Any]) -> None:
        """Write products, an array of shape ``(k, M)``, and their keys as one record, unless the journal is full."""
        if self._is_full:
            return
        key, products = b"".join(keys), np.ascontiguousarray(products)
        if self.file.num_bytes + RecordFile.record_bytes(key, products) > self.max_bytes:
            self._is_full = True
            warnings.warn(
                f"the journal in {self.directory} has reached max_bytes = {self.max_bytes:.6g}: products are still "
                "computed, but no longer recorded. To record more, pass a larger max_bytes=",
                RuntimeWarning,
                stacklevel=2,
            )
            return
        self._add_locations(key, self.file.append(key, products))

    def read(self, keys: Sequence[bytes]) -> dict[bytes, NDArray[Any]]:
        """Return a dict of the recorded products for the keys. Each record is read only once."""
        keys_by_record: dict[int, list[bytes]] = {}
        for key in keys:
            offset, _ = self.locations[key]
            keys_by_record.setdefault(offset, []).append(key)
        products: dict[bytes, NDArray[Any]] = {}
        for offset, record_keys in keys_by_record.items():
            [block] = self.file.read(offset)
            products |= {key: block[self.locations[key][1]] for key in record_keys}
        self.num_answered += len(keys)
        return products

    def _add_locations(self, keys: bytes, offset: int) -> None:
        for row in range(len(keys) // KEY_BYTES):
            self.locations[keys[row * KEY_BYTES : (row + 1) * KEY_BYTES]] = offset, row

    def _check_fingerprint(self) -> None:
        """Raise an error if the journal belongs to another problem. If the journal is new, write its fingerprint."""
        path, versions = self.directory / _FINGERPRINT_FILE, library_versions()
        advice = "pass another directory, or delete it"
        if not path.exists():
            if len(self.file):
                raise ValueError(
                    f"the journal in {self.directory} lacks its {_FINGERPRINT_FILE}, so the problem that its "
                    f"{len(self.file)} records belong to is unknown: {advice}"
                )
            _write_json(path, {"format": _FORMAT, "fingerprint": self._fingerprint, "made_with": [versions]})
            return
        try:
            content = json.loads(path.read_text())
            recorded, made_with = content["fingerprint"], content["made_with"]
            if content["format"] != _FORMAT:
                raise ValueError
        except (ValueError, KeyError, TypeError):
            raise ValueError(f"{path} is not in the format {_FORMAT!r} of this version: {advice}") from None
        if names := differing(recorded, self._fingerprint):
            hint = ""
            if "seed" in names:
                hint = " (each run draws a new seed, unless you pass rng=)"
            elif all(name.startswith("data, ") for name in names):
                hint = " (shuffled or augmented data differs in every run)"
            verb = "differs" if len(names) == 1 else "differ"
            raise OtherProblemError(
                f"the journal in {self.directory} belongs to another problem: {listed(names)} {verb}{hint}; {advice}"
            )
        if versions != made_with[-1]:
            _write_json(path, content | {"made_with": [*made_with, versions]})


def _as_bytes(tensor: Tensor) -> NDArray[Any]:
    """Return the bytes of a tensor of shape ``(K, N)`` as a NumPy array.

    The function returns bytes, because NumPy lacks some of torch's dtypes.
    """
    host = tensor.detach().resolve_conj().resolve_neg().cpu().contiguous()
    return host.view(torch.uint8).numpy()


def _prepare_directory(directory: Path) -> None:
    """Create the directory. Raise an error if it contains files that do not belong to a journal."""
    if directory.exists() and not directory.is_dir():
        raise ValueError(f"{directory} is a file: pass a directory, which is created if it does not exist")
    directory.mkdir(parents=True, exist_ok=True)
    for path in sorted(directory.iterdir()):
        if path.name not in (_FINGERPRINT_FILE, _PRODUCTS_FILE, _TEMPORARY_FILE):
            raise ValueError(
                f"{directory} holds {path.name!r}, which is not part of a journal: pass a new or empty directory"
            )


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write a JSON file atomically. After an interruption, the file has either its old or its new content."""
    temporary = path.with_name(_TEMPORARY_FILE)  # a fixed name is safe: only the process with the lock writes
    try:
        with temporary.open("w") as file:
            json.dump(content, file, indent=1)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def library_versions() -> dict[str, str]:
    """Return the versions of this package and of the packages that compute."""
    return {
        "curvop": __version__,
        "torch": torch.__version__,
        "numpy": np.__version__,
        "scipy": scipy.__version__,
    }
