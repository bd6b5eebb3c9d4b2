"""Append-only files of NumPy arrays, which remain readable if the process that writes them is killed.

A file consists of records with keys and checksums. When a file is opened, all checksums are verified. An incomplete
record at the end of the file is removed. If any other record is damaged, an error is raised. Arrays are stored without
pickling.

A file begins with a signature, which is followed by the records. A record consists of

1. the fields ``<4sIQI``: the record mark, the length of the header and the length of the data in bytes, and the CRC-32
   of the data;
2. the CRC-32 of the fields and the header;
3. the header as JSON: the key, and the dtype and shape of each array;
4. the data: the arrays in C order, one after another.
"""

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
_MARK = b"\x93rec"
_FIELDS = struct.Struct("<4sIQI")
_CHECKSUM = struct.Struct("<I")
_PREFIX_SIZE = _FIELDS.size + _CHECKSUM.size
_CHUNK_SIZE = 2**20
_MAX_BUFFERS = 512  # number of buffers in one pwritev call; Linux allows at most IOV_MAX = 1024


class RecordFileError(RuntimeError):
    """Raised if a file cannot be used, because it is damaged, in use, closed, or not a record file."""


@dataclasses.dataclass(frozen=True)
class _Header:
    key: bytes
    arrays: list[tuple[np.dtype[Any], tuple[int, ...]]]  # dtype and shape of each array
    start: int  # offset of the data
    stop: int  # offset of the end of the record
    checksum: int  # checksum of the data


class RecordFile:
    """File to which records can be appended. Only one process at a time can open the file.

    If the process is killed, all complete records are kept. A record that was incomplete at that time is removed when
    the file is opened again. Arrays are not kept in memory.

    Parameters
    ----------
    path : str or path-like
        Path of the file, which is created if it does not exist.
    sync_seconds : float, optional
        Minimum time in seconds between two forced writes to disk (``fsync``). A write is forced only when a record is
        appended. A power failure can lose the records that were appended since the last forced write. If only the
        process is killed, no record is lost. 0 forces a write after each record, and ``math.inf`` disables forced
        writes. Default: 1.

    Attributes
    ----------
    path : Path
    num_bytes : int
        Size of the file in bytes.
    torn_bytes : int
        Size in bytes of the incomplete record that was removed when the file was opened.

    Raises
    ------
    RecordFileError
        If the file is not a record file, or if a record other than the last is damaged. The error is also raised if the
        file is already open in this or another process. The file is left unchanged.

    Notes
    -----
    When a file is opened, it is read completely to verify all checksums. A POSIX system is required.
    """

    def __init__(self, path: str | os.PathLike[str], *, sync_seconds: float = 1.0) -> None:
        if not sync_seconds >= 0:
            raise ValueError(f"sync_seconds is {sync_seconds}, but must be >= 0; math.inf never forces writes")
        self.path = Path(path)
        self.num_bytes = self.torn_bytes = 0
        self._sync_seconds = sync_seconds
        self._last_sync = time.monotonic()
        self._index: list[tuple[bytes, int]] = []
        try:
            self._fd, identity = open_exclusive(self.path)
        except BlockingIOError:
            raise RecordFileError(
                f"{self.path} is in use by this or another process: close it there, or use another file"
            ) from None
        self._closing = weakref.finalize(self, close_exclusive, self._fd, identity)
        try:
            self._scan()
        except BaseException:
            self.close()
            raise

    def append(self, key: bytes, *arrays: Any) -> int:
        """Write one record and return its offset.

        Parameters
        ----------
        key : bytes
            Key of the record. Keys need not be unique.
        *arrays : array_like
            Arrays of numbers, booleans or text, of any shape.

        Raises
        ------
        OSError
            If the record cannot be written, for example because the disk is full. The file then ends with the last
            complete record, and accepts more records as soon as there is space.
        TypeError
            If an array has an object or structured dtype.
        """
        self.check_open()
        contiguous = [_recordable(array) for array in arrays]
        views = _views(contiguous)
        checksum = 0
        for view in views:
            checksum = zlib.crc32(view, checksum)
        offset = self.num_bytes
        self.num_bytes += self._write([_header(key, contiguous, checksum), *views], offset)
        self._index.append((key, offset))
        return offset

    def read(self, offset: int) -> list[NDArray[Any]]:
        """Read the record at byte `offset`, and return its arrays.

        Raises
        ------
        RecordFileError
            If no complete record begins at `offset`, or if the data of the record is damaged.
        """
        self.check_open()
        header = self._header_at(offset, self.num_bytes)
        if header is None or header.stop > self.num_bytes:
            raise RecordFileError(f"{self.path}: there is no complete record at byte {offset}")
        arrays = [np.empty(shape, dtype) for dtype, shape in header.arrays]
        views = _views(arrays)
        position, checksum = header.start, 0
        for view in views:
            self._read_into(view, position)
            position += len(view)
            checksum = zlib.crc32(view, checksum)
        if checksum != header.checksum:
            raise RecordFileError(f"{self.path}: the record at byte {offset} is damaged: its checksum does not match")
        return arrays

    def __iter__(self) -> Iterator[tuple[bytes, int]]:
        """Yield the key and offset of each record, in the order in which they were appended."""
        return iter(self._index)

    def __len__(self) -> int:
        """Return the number of records."""
        return len(self._index)

    def close(self) -> None:
        """Close the file. It can then be opened again, in this process or in another."""
        self._closing()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def __reduce__(self) -> str:
        raise TypeError("a RecordFile cannot be pickled or copied: only one process at a time can have it open")

    @staticmethod
    def record_bytes(key: bytes, *arrays: Any) -> int:
        """Return the size on disk, in bytes, of a record with these arrays."""
        contiguous = [_recordable(array) for array in arrays]
        return len(_header(key, contiguous, 0)) + sum(array.nbytes for array in contiguous)

    def check_open(self) -> None:
        """Raise an error if the file is closed."""
        if not self._closing.alive:
            raise RecordFileError(f"{self.path} is closed: open it again")

    def _scan(self) -> None:
        """Find all records in the file, and remove an incomplete record at the end."""
        size = os.fstat(self._fd).st_size
        begin = os.pread(self._fd, len(_SIGNATURE), 0)
        if len(begin) < len(_SIGNATURE) and _SIGNATURE.startswith(begin):
            size = self._write([_SIGNATURE], 0)
        elif begin != _SIGNATURE:
            raise RecordFileError(f"{self.path} is not a record file: pass another path, or delete it")
        end = len(_SIGNATURE)
        while end < size:
            header = self._header_at(end, size)
            if header is None and self._has_later_header(end, size):
                raise self._damage_error(end)
            if header is None or header.stop > size:
                break
            if self._checksum(header) != header.checksum:
                if header.stop < size:
                    raise self._damage_error(end)
                break
            self._index.append((header.key, end))
            end = header.stop
        self.num_bytes, self.torn_bytes = end, size - end
        if end < size:
            os.ftruncate(self._fd, end)

    def _damage_error(self, offset: int) -> RecordFileError:
        kept = len(self._index)
        return RecordFileError(
            f"{self.path}: record {kept + 1}, at byte {offset}, is damaged. Other records follow it, so this is not an "
            "interrupted write. Nothing was changed. Restore the file from a copy; or keep the "
            f"{kept} records before it, with: truncate -s {offset} {str(self.path)!r}"
        )

    def _header_at(self, offset: int, size: int) -> _Header | None:
        """Return the header of the record at `offset`, or None if there is no header with a correct checksum."""
        prefix = os.pread(self._fd, _PREFIX_SIZE, offset)
        if len(prefix) < _PREFIX_SIZE or not prefix.startswith(_MARK):
            return None
        _, header_size, data_size, checksum = _FIELDS.unpack_from(prefix)
        if offset + _PREFIX_SIZE + header_size > size:
            return None
        text = os.pread(self._fd, header_size, offset + _PREFIX_SIZE)
        if prefix[_FIELDS.size :] != _CHECKSUM.pack(zlib.crc32(text, zlib.crc32(prefix[: _FIELDS.size]))):
            return None
        content = json.loads(text)
        arrays = [(np.dtype(dtype), tuple(shape)) for dtype, shape in content["arrays"]]
        start = offset + _PREFIX_SIZE + header_size
        return _Header(bytes.fromhex(content["key"]), arrays, start, start + data_size, checksum)

    def _has_later_header(self, offset: int, size: int) -> bool:
        """Return True if another record begins anywhere after `offset`."""
        for start in range(offset + 1, size, _CHUNK_SIZE):
            chunk = os.pread(self._fd, _CHUNK_SIZE + len(_MARK) - 1, start)
            index = chunk.find(_MARK)
            while index >= 0:
                if self._header_at(start + index, size) is not None:
                    return True
                index = chunk.find(_MARK, index + 1)
        return False

    def _checksum(self, header: _Header) -> int:
        """Return the checksum of the data of a record. The data is read in chunks."""
        buffer = memoryview(bytearray(_CHUNK_SIZE))
        checksum = 0
        for position in range(header.start, header.stop, _CHUNK_SIZE):
            view = buffer[: min(_CHUNK_SIZE, header.stop - position)]
            self._read_into(view, position)
            checksum = zlib.crc32(view, checksum)
        return checksum

    def _read_into(self, view: memoryview, position: int) -> None:
        while view:
            count = os.preadv(self._fd, [view], position)
            if not count:
                raise RecordFileError(
                    f"{self.path} ends at byte {position}, within a record: another program has truncated it"
                )
            view, position = view[count:], position + count

    def _write(self, buffers: Sequence[Any], offset: int) -> int:
        """Write all `buffers` at `offset`, and return their total size in bytes. Undo the write if an error occurs."""
        views = [memoryview(buffer) for buffer in buffers]
        position = offset
        try:
            while views:
                count = os.pwritev(self._fd, views[:_MAX_BUFFERS], position)
                position += count
                while views and count >= len(views[0]):
                    count -= len(views.pop(0))
                if views:
                    views[0] = views[0][count:]
            if time.monotonic() - self._last_sync >= self._sync_seconds:
                os.fsync(self._fd)
                self._last_sync = time.monotonic()
        except BaseException as error:
            os.ftruncate(self._fd, offset)
            if isinstance(error, OSError):
                message = f"{error.strerror}: the record was not written, the {len(self)} before it are intact"
                raise OSError(error.errno, message, str(self.path)) from None
            raise
        return position - offset


def _recordable(array: Any) -> NDArray[Any]:
    contiguous: NDArray[Any] = np.asarray(array, order="C")
    if contiguous.dtype.kind in "OV":
        raise TypeError(f"an array has dtype {contiguous.dtype}, but only numbers, booleans and text can be recorded")
    return contiguous


def _views(arrays: Sequence[NDArray[Any]]) -> list[memoryview]:
    """Return a byte view of each contiguous array. Skip empty arrays."""
    return [memoryview(cast("bytes", array.reshape(-1).view(np.uint8))) for array in arrays if array.nbytes]


def _header(key: bytes, arrays: Sequence[NDArray[Any]], checksum: int) -> bytes:
    """Return the bytes of a record that precede its data: the fields, the second checksum, and the header."""
    text = json.dumps({"key": key.hex(), "arrays": [(array.dtype.str, array.shape) for array in arrays]}).encode()
    fields = _FIELDS.pack(_MARK, len(text), sum(array.nbytes for array in arrays), checksum)
    return fields + _CHECKSUM.pack(zlib.crc32(text, zlib.crc32(fields))) + text


# Exclusive access to a file. A POSIX lock prevents access by other processes, and a set of open files prevents a second
# access by this process.

_open_files: set[tuple[int, int]] = set()


def open_exclusive(path: Path) -> tuple[int, tuple[int, int]]:
    """Create a file if it does not exist, open it for reading and writing, and lock it.

    The operating system releases the lock when the process ends for any reason. Forked processes do not inherit the
    lock. The lock does not prevent the same process from opening a file twice. The module therefore keeps a set of open
    files.

    Returns
    -------
    descriptor : int
    identity : tuple of int
        Device and inode of the file. Pass `descriptor` and `identity` to `close_exclusive`.

    Raises
    ------
    BlockingIOError
        If the file is already open in this or another process.
    """
    import fcntl  # imported here, because Windows lacks fcntl and must be able to import the package

    # Do not open a file twice: if one of its descriptors is closed, the process loses its lock on the file.
    if path.exists() and _identity(path.stat()) in _open_files:
        raise BlockingIOError
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    try:
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except PermissionError:  # EACCES, which some systems raise instead of EAGAIN
        os.close(descriptor)
        raise BlockingIOError from None
    except BaseException:
        os.close(descriptor)
        raise
    identity = _identity(os.fstat(descriptor))
    _open_files.add(identity)
    return descriptor, identity


def close_exclusive(descriptor: int, identity: tuple[int, int]) -> None:
    """Close a file that was opened by `open_exclusive`."""
    _open_files.discard(identity)
    os.close(descriptor)


def _identity(status: os.stat_result) -> tuple[int, int]:
    return status.st_dev, status.st_ino
