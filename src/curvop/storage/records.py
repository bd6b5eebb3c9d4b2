"""Append-only files of records: arrays under a key, checksummed, there as a whole or not at all."""

from __future__ import annotations

import dataclasses
import json
import os
import struct
import time
import weakref
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Self, cast

import numpy as np
from numpy.typing import NDArray

__all__ = ["RecordFile", "RecordFileError", "close_exclusive", "open_exclusive"]

_SIGNATURE = b"curvop records 1\n"
# A record: its mark, the bytes of its head and of its payload, the payload's checksum; the checksum of these and of the
# head; the head (JSON: the key, dtypes and shapes); the payload, the arrays one after another in C order.
_MARK = b"\x93rec"
_FIELDS = struct.Struct("<4sIQI")
_CHECKSUM = struct.Struct("<I")
_PREFIX = _FIELDS.size + _CHECKSUM.size
_CHUNK = 2**20
_BUFFERS = 512  # that one call of the system takes


class RecordFileError(RuntimeError):
    """A file of records cannot be used: it is damaged, in use, closed, or something else."""


@dataclasses.dataclass(frozen=True)
class _Header:
    key: bytes
    arrays: list[tuple[np.dtype[Any], tuple[int, ...]]]
    payload: int  # where it begins
    stop: int  # where the record ends
    checksum: int


class RecordFile:
    """A file to which records are appended, and from which they are read, by one process at a time.

    A record is one write. A process that is killed leaves whole records and at most one torn at the end, which the next
    opening drops. Arrays are held in memory by nobody but the caller, and nothing is pickled.

    Parameters
    ----------
    path : str or path
        Made where it does not exist.
    sync_seconds : float
        An append forces all that was written to disk where this was last done longer ago: what a loss of power may
        take. 0 for each record, ``math.inf`` for never. The death of the process alone takes nothing.

    Attributes
    ----------
    path : Path
    num_bytes : int
        The size of the file.
    torn_bytes : int
        What of an interrupted write was dropped by opening it.

    Raises
    ------
    RecordFileError
        Where the file is no file of records, another process (or another `RecordFile` of this one) has it open, or a
        record that others follow is damaged. The file is left as it was.

    Notes
    -----
    Opening reads the whole file, as every record's checksum is verified. It needs a POSIX system.
    """

    def __init__(self, path: str | os.PathLike[str], *, sync_seconds: float = 1.0) -> None:
        if not sync_seconds >= 0:
            raise ValueError(f"sync_seconds is {sync_seconds}, but must be 0 or more, or math.inf")
        self.path = Path(path)
        self.num_bytes = self.torn_bytes = 0
        self._sync_seconds = sync_seconds
        self._synced = time.monotonic()
        self._index: list[tuple[bytes, int]] = []
        try:
            self._fd, identity = open_exclusive(self.path)
        except BlockingIOError:
            raise RecordFileError(
                f"{self.path} is in use, and one at a time can record: close it there, or use another file"
            ) from None
        self._closing = weakref.finalize(self, close_exclusive, self._fd, identity)
        try:
            self._scan()
        except BaseException:
            self.close()
            raise

    def append(self, key: bytes, *arrays: Any) -> int:
        """Write one record, and return its offset.

        Parameters
        ----------
        key : bytes
            Need not be unique.
        *arrays : array_like
            Of numbers, booleans or text, of any shape.

        Raises
        ------
        OSError
            Where it cannot be written, on a full disk for one. The file then ends with the last whole record, and more
            can be appended when there is room.
        TypeError
            For arrays of objects and of records.
        """
        self.check_open()
        contiguous = [_checked(array) for array in arrays]
        views = _views(contiguous)
        checksum = 0
        for view in views:
            checksum = zlib.crc32(view, checksum)
        offset = self.num_bytes
        self.num_bytes += self._write([_header(key, contiguous, checksum), *views], offset)
        self._index.append((key, offset))
        return offset

    def read(self, offset: int) -> list[NDArray[Any]]:
        """Return the arrays of the record at `offset`, as fresh ones.

        Raises
        ------
        RecordFileError
            Where there is no record, or it is not what was written.
        """
        self.check_open()
        header = self._header_at(offset, self.num_bytes)
        if header is None or header.stop > self.num_bytes:
            raise RecordFileError(f"{self.path}: there is no whole record at byte {offset}")
        arrays = [np.empty(shape, dtype) for dtype, shape in header.arrays]
        views = _views(arrays)
        at, checksum = header.payload, 0
        for view in views:
            self._fill(view, at)
            at += len(view)
            checksum = zlib.crc32(view, checksum)
        if checksum != header.checksum:
            raise RecordFileError(f"{self.path}: the record at byte {offset} is damaged, its checksum is another")
        return arrays

    def __iter__(self) -> Iterator[tuple[bytes, int]]:
        """Yield each record's key and offset, in the order in which they were appended."""
        return iter(self._index)

    def __len__(self) -> int:
        """Return the number of records."""
        return len(self._index)

    def close(self) -> None:
        """Close the file, so that others can open it."""
        self._closing()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def __reduce__(self) -> str:
        raise TypeError("a RecordFile cannot be pickled or copied: one process at a time has it open")

    @staticmethod
    def record_bytes(key: bytes, *arrays: Any) -> int:
        """Return what a record of `arrays` takes on disk."""
        contiguous = [_checked(array) for array in arrays]
        return len(_header(key, contiguous, 0)) + sum(array.nbytes for array in contiguous)

    def check_open(self) -> None:
        """Raise an error where the file is closed."""
        if not self._closing.alive:
            raise RecordFileError(f"{self.path} is closed: open it again")

    def _scan(self) -> None:
        """Find the records, and drop what an interrupted write left."""
        size = os.fstat(self._fd).st_size
        begin = os.pread(self._fd, len(_SIGNATURE), 0)
        if len(begin) < len(_SIGNATURE) and _SIGNATURE.startswith(begin):
            size = self._write([_SIGNATURE], 0)
        elif begin != _SIGNATURE:
            raise RecordFileError(f"{self.path} is not a file of records: pass another, or delete it")
        end = len(_SIGNATURE)
        while end < size:
            header = self._header_at(end, size)
            if header is None and self._later_header(end, size):
                raise self._damaged(end)
            if header is None or header.stop > size:
                break
            if self._checksum(header) != header.checksum:
                if header.stop < size:
                    raise self._damaged(end)
                break
            self._index.append((header.key, end))
            end = header.stop
        self.num_bytes, self.torn_bytes = end, size - end
        if end < size:
            os.ftruncate(self._fd, end)

    def _damaged(self, offset: int) -> RecordFileError:
        kept = len(self._index)
        return RecordFileError(
            f"{self.path}: record {kept + 1}, at byte {offset}, is damaged, and as others follow it, not by an "
            "interrupted write. Nothing was changed. Restore the file from a copy; or keep the "
            f"{kept} records before it, with: truncate -s {offset} {str(self.path)!r}"
        )

    def _header_at(self, offset: int, size: int) -> _Header | None:
        """Return the header that begins at `offset`, None where there is none whose checksum is right."""
        prefix = os.pread(self._fd, _PREFIX, offset)
        if len(prefix) < _PREFIX or not prefix.startswith(_MARK):
            return None
        _, count, length, checksum = _FIELDS.unpack_from(prefix)
        if offset + _PREFIX + count > size:
            return None
        head = os.pread(self._fd, count, offset + _PREFIX)
        if prefix[_FIELDS.size :] != _CHECKSUM.pack(zlib.crc32(head, zlib.crc32(prefix[: _FIELDS.size]))):
            return None
        told = json.loads(head)
        arrays = [(np.dtype(dtype), tuple(shape)) for dtype, shape in told["arrays"]]
        begin = offset + _PREFIX + count
        return _Header(bytes.fromhex(told["key"]), arrays, begin, begin + length, checksum)

    def _later_header(self, offset: int, size: int) -> bool:
        """Whether another record begins somewhere after `offset`."""
        for at in range(offset + 1, size, _CHUNK):
            chunk = os.pread(self._fd, _CHUNK + len(_MARK) - 1, at)
            found = chunk.find(_MARK)
            while found >= 0:
                if self._header_at(at + found, size) is not None:
                    return True
                found = chunk.find(_MARK, found + 1)
        return False

    def _checksum(self, header: _Header) -> int:
        buffer = memoryview(bytearray(_CHUNK))
        checksum = 0
        for at in range(header.payload, header.stop, _CHUNK):
            view = buffer[: min(_CHUNK, header.stop - at)]
            self._fill(view, at)
            checksum = zlib.crc32(view, checksum)
        return checksum

    def _fill(self, view: memoryview, at: int) -> None:
        while view:
            count = os.preadv(self._fd, [view], at)
            if not count:
                raise RecordFileError(f"{self.path} ends at byte {at}, within a record: something else cut it off")
            view, at = view[count:], at + count

    def _write(self, buffers: Sequence[Any], offset: int) -> int:
        """Write `buffers` at `offset`, all of them or nothing, and return how many bytes they are."""
        views = [memoryview(buffer) for buffer in buffers]
        at = offset
        try:
            while views:
                count = os.pwritev(self._fd, views[:_BUFFERS], at)
                at += count
                while views and count >= len(views[0]):
                    count -= len(views.pop(0))
                if views:
                    views[0] = views[0][count:]
            if time.monotonic() - self._synced >= self._sync_seconds:
                os.fsync(self._fd)
                self._synced = time.monotonic()
        except BaseException as error:
            os.ftruncate(self._fd, offset)
            if isinstance(error, OSError):
                what = f"{error.strerror}: the record was not written, the {len(self)} before it are whole"
                raise OSError(error.errno, what, str(self.path)) from None
            raise
        return at - offset


def _checked(array: Any) -> NDArray[Any]:
    contiguous: NDArray[Any] = np.asarray(array, order="C")
    if contiguous.dtype.kind in "OV":
        raise TypeError(f"an array has dtype {contiguous.dtype}: only numbers, booleans and text can be recorded")
    return contiguous


def _views(arrays: Sequence[NDArray[Any]]) -> list[memoryview]:
    """Return the memory of contiguous arrays as bytes."""
    return [memoryview(cast("bytes", array.reshape(-1).view(np.uint8))) for array in arrays if array.nbytes]


def _header(key: bytes, arrays: Sequence[NDArray[Any]], checksum: int) -> bytes:
    head = json.dumps({"key": key.hex(), "arrays": [(array.dtype.str, array.shape) for array in arrays]}).encode()
    fields = _FIELDS.pack(_MARK, len(head), sum(array.nbytes for array in arrays), checksum)
    return fields + _CHECKSUM.pack(zlib.crc32(head, zlib.crc32(fields))) + head


# Files that one user at a time has open.

_open_files: set[tuple[int, int]] = set()


def open_exclusive(path: Path) -> tuple[int, tuple[int, int]]:
    """Open a file for reading and writing and lock it; make it where it does not exist.

    The lock is the process's own: it ends with the process, however that ends, and no fork has it. So it keeps other
    processes out, and what this one has open is listed besides.

    Returns
    -------
    descriptor : int
    identity : tuple of int
        Of the file; both are for `close_exclusive`.

    Raises
    ------
    BlockingIOError
        Where it is open already, here or in another process.
    """
    import fcntl  # not on every system, and the package can be imported there

    # To close any descriptor of a file gives up the process's lock on it: what is open already is not opened again.
    if path.exists() and _identity(path.stat()) in _open_files:
        raise BlockingIOError
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    try:
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except PermissionError:  # as some systems say it
        os.close(descriptor)
        raise BlockingIOError from None
    except BaseException:
        os.close(descriptor)
        raise
    identity = _identity(os.fstat(descriptor))
    _open_files.add(identity)
    return descriptor, identity


def close_exclusive(descriptor: int, identity: tuple[int, int]) -> None:
    """Close a file that `open_exclusive` has opened."""
    _open_files.discard(identity)
    os.close(descriptor)


def _identity(status: os.stat_result) -> tuple[int, int]:
    return status.st_dev, status.st_ino
