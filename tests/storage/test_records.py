"""Record files: records are read as written, interrupted writes are dropped, and damage is reported."""

from __future__ import annotations

import copy
import errno
import math
import os
import pickle
import re
import resource
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from curvop.storage.records import RecordFile, RecordFileError

ANY_FILE = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
KINDS = st.one_of(
    hnp.floating_dtypes(),
    hnp.integer_dtypes(),
    hnp.complex_number_dtypes(),
    hnp.boolean_dtypes(),
    hnp.unicode_string_dtypes(min_len=1),
)
ARRAYS = hnp.arrays(KINDS, hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=5))
RECORDS = st.lists(st.tuples(st.binary(max_size=40), st.lists(ARRAYS, max_size=3)), max_size=5)


def written(path: Path, count: int = 3) -> list[int]:
    """Write `count` records of ten numbers, and return the offset of each, and the end of the file."""
    with RecordFile(path) as file:
        offsets = [file.append(b"%d" % number, np.full(10, number)) for number in range(count)]
        return [*offsets, file.num_bytes]


def contents(path: Path) -> list[tuple[bytes, float]]:
    with RecordFile(path) as file:
        return [(key, file.read(offset)[0].mean()) for key, offset in file]


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """Limit the size of files to `size` bytes. For the writer this is like a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "some.records"


class TestRoundTrip:
    @ANY_FILE
    @given(records=RECORDS)
    def test_arrays_of_every_kind_and_shape(self, path, records) -> None:
        path.unlink(missing_ok=True)
        with RecordFile(path) as file:
            offsets = [file.append(key, *arrays) for key, arrays in records]
            assert len(file) == len(records)
            assert list(file) == [(key, offset) for (key, _), offset in zip(records, offsets, strict=True)]
        with RecordFile(path) as file:
            assert file.num_bytes == path.stat().st_size
            assert file.torn_bytes == 0
            for (key, arrays), (found, offset) in zip(records, file, strict=True):
                assert found == key
                for array, again in zip(arrays, file.read(offset), strict=True):
                    assert (again.dtype, again.shape) == (array.dtype, array.shape)
                    assert again.tobytes() == array.tobytes()

    def test_the_size_of_a_record_is_known_in_advance(self, path) -> None:
        arrays = np.ones((3, 4)), np.zeros(7, np.int8)
        with RecordFile(path) as file:
            before = file.num_bytes
            file.append(b"key", *arrays)
            assert file.num_bytes - before == RecordFile.record_bytes(b"key", *arrays)

    def test_memory_layouts_do_not_matter(self, path) -> None:
        X = np.arange(24.0).reshape(4, 6)
        with RecordFile(path) as file:
            [a, b, c] = file.read(file.append(b"", np.asfortranarray(X), X[::-1, ::2], X.T))
        assert (a == X).all()
        assert (b == X[::-1, ::2]).all()
        assert (c == X.T).all()

    def test_arrays_are_copies(self, path) -> None:
        with RecordFile(path) as file:
            offset = file.append(b"", np.ones(3))
            file.read(offset)[0][:] = 7
            assert (file.read(offset)[0] == 1).all()

    @pytest.mark.parametrize("array", [np.array([object()]), np.zeros(2, [("a", float)])])
    def test_only_numbers_and_text(self, path, array) -> None:
        with RecordFile(path) as file:
            with pytest.raises(TypeError, match="only numbers"):
                file.append(b"", array)
            assert len(file) == 0

    @pytest.mark.parametrize(("seconds", "expected"), [(0, 4), (3600, 0), (math.inf, 0)])
    def test_sync(self, path, monkeypatch, seconds, expected: int) -> None:
        synced, fsync = [], os.fsync
        with RecordFile(path, sync_seconds=seconds) as file:
            monkeypatch.setattr(os, "fsync", lambda descriptor: synced.append(fsync(descriptor)))
            for _ in range(4):
                file.append(b"", np.ones(3))
        assert len(synced) == expected
        assert len(contents(path)) == 4
        with pytest.raises(ValueError, match="sync_seconds is -1"):
            RecordFile(path, sync_seconds=-1)

    def test_offsets_without_a_record(self, path) -> None:
        offsets = written(path)
        with RecordFile(path) as file:
            for offset in (0, offsets[1] + 1, offsets[-1]):
                with pytest.raises(RecordFileError, match=f"no complete record at byte {offset}"):
                    file.read(offset)

    @pytest.mark.nightly
    def test_blocks_larger_than_one_call_of_the_system_writes(self, path) -> None:
        block = np.arange(2**28 + 3.0)  # more than 2 GiB
        with RecordFile(path) as file:
            offset = file.append(b"large", block)
        with RecordFile(path) as file:
            assert (file.read(offset)[0] == block).all()


class TestInterruptedWrites:
    @ANY_FILE
    @given(data=st.data())
    def test_a_file_cut_anywhere_keeps_the_records_before(self, path, data) -> None:
        path.unlink(missing_ok=True)
        offsets = written(path)
        size = data.draw(st.integers(0, offsets[-1]))
        os.truncate(path, size)
        whole = sum(stop <= size for stop in offsets[1:])
        with RecordFile(path) as file:
            assert file.torn_bytes == (size - offsets[whole] if size >= offsets[0] else 0)
            file.append(b"new", np.full(10, 9))
        assert contents(path) == [*((b"%d" % number, number) for number in range(whole)), (b"new", 9)]

    @ANY_FILE
    @given(data=st.data())
    def test_no_changed_byte_goes_unnoticed(self, path, data) -> None:
        """A changed byte causes an error, unless it is in the last record, which is dropped."""
        path.unlink(missing_ok=True)
        offsets = written(path)
        where = data.draw(st.integers(0, offsets[-1] - 1))
        content = bytearray(path.read_bytes())
        content[where] ^= data.draw(st.integers(1, 255))
        path.write_bytes(content)
        if where >= offsets[-2]:
            assert contents(path) == [(b"0", 0), (b"1", 1)]
            return
        which = sum(offset <= where for offset in offsets)
        message = rf"record {which}, at byte {offsets[which - 1]}, is damaged" if which else "not a record file"
        with pytest.raises(RecordFileError, match=message):
            RecordFile(path)
        assert path.read_bytes() == content

    def test_zeros_that_a_loss_of_power_leaves_are_dropped(self, path) -> None:
        written(path)
        with path.open("ab") as file:
            file.write(bytes(5000))
        assert len(contents(path)) == 3

    def test_the_command_in_the_error_repairs_the_file(self, path) -> None:
        offsets = written(path, 5)
        content = bytearray(path.read_bytes())
        content[offsets[3] - 1] ^= 1  # the third's last byte
        path.write_bytes(content)
        with pytest.raises(
            RecordFileError, match=r"record 3.*keep the 2 records before it, with: truncate -s"
        ) as error:
            RecordFile(path)
        subprocess.run(str(error.value).split("with: ")[1], shell=True, check=True)
        assert contents(path) == [(b"0", 0), (b"1", 1)]

    def test_damage_under_an_open_file(self, path) -> None:
        offsets = written(path)
        with RecordFile(path) as file:
            os.truncate(path, offsets[1] + 100)
            with pytest.raises(RecordFileError, match="another program has truncated it"):
                file.read(offsets[1])
            with path.open("r+b") as other:
                other.seek(offsets[1] - 1)
                other.write(b"\xff")
            with pytest.raises(RecordFileError, match=f"the record at byte {offsets[0]} is damaged"):
                file.read(offsets[0])

    def test_another_file_is_left_alone(self, path) -> None:
        for content in (b"a", b"curvop recordz", b"a text that has nothing to do with it" * 9):
            path.write_bytes(content)
            with pytest.raises(RecordFileError, match="not a record file"):
                RecordFile(path)
            assert path.read_bytes() == content


class TestFullDisk:
    def test_the_error_is_clear_and_nothing_is_lost(self, path) -> None:
        offsets = written(path)
        with RecordFile(path) as file:
            with largest_file(offsets[-1] + 500), pytest.raises(OSError, match="the 3 before it are intact") as error:
                file.append(b"large", np.ones(1000))
            assert error.value.errno == errno.EFBIG
            assert error.value.filename == str(path)
            assert path.stat().st_size == offsets[-1]
            assert len(file) == 3
            file.append(b"later", np.full(10, 9))
        assert contents(path)[-1] == (b"later", 9)

    def test_an_interrupted_append(self, path, monkeypatch) -> None:
        offsets = written(path)
        with RecordFile(path) as file:
            with monkeypatch.context() as patch:
                real = os.pwritev

                def interrupted(fd, views, at) -> int:
                    real(fd, views[:1], at)
                    raise KeyboardInterrupt

                patch.setattr(os, "pwritev", interrupted)
                with pytest.raises(KeyboardInterrupt):
                    file.append(b"", np.ones(1000))
            assert path.stat().st_size == offsets[-1]
            file.append(b"later", np.full(10, 9))
        assert len(contents(path)) == 4


class TestOneAtATime:
    def test_in_this_process(self, path) -> None:
        with RecordFile(path) as file:
            for _ in range(2):
                with pytest.raises(RecordFileError, match="in use"):
                    RecordFile(path)
            file.append(b"", np.ones(3))
        assert len(contents(path)) == 1

    def test_the_file_is_locked_for_other_processes(self, path) -> None:
        lock = "import fcntl, sys; fcntl.lockf(open(sys.argv[1], 'r+b'), fcntl.LOCK_EX | fcntl.LOCK_NB)"
        command = [sys.executable, "-I", "-S", "-c", lock, str(path)]
        with RecordFile(path):
            run = subprocess.run(command, capture_output=True, text=True, check=False)
            assert re.search("BlockingIOError|PermissionError", run.stderr)
        assert subprocess.run(command, check=False).returncode == 0

    @pytest.mark.slow
    def test_another_process(self, path) -> None:
        script = "import sys; from curvop.storage.records import RecordFile; RecordFile(sys.argv[1])"
        command = [sys.executable, "-c", script, str(path)]
        with RecordFile(path):
            run = subprocess.run(command, capture_output=True, text=True, check=False)
            assert "in use" in run.stderr
        assert subprocess.run(command, check=False).returncode == 0

    @pytest.mark.slow
    def test_a_killed_process_releases_the_lock(self, path) -> None:
        script = (
            "import sys, numpy as np; from curvop.storage.records import RecordFile; file = RecordFile(sys.argv[1])\n"
            "file.append(b'0', np.full(10, 0)); print(flush=True); sys.stdin.read()"
        )
        with subprocess.Popen(
            [sys.executable, "-c", script, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        ) as child:
            child.stdout.readline()
            with pytest.raises(RecordFileError, match="in use"):
                RecordFile(path)
            child.send_signal(signal.SIGKILL)
        assert contents(path) == [(b"0", 0)]

    def test_a_deleted_object_closes_its_file(self, path) -> None:
        RecordFile(path).append(b"", np.ones(3))
        assert len(contents(path)) == 1

    def test_a_closed_file(self, path) -> None:
        file = RecordFile(path)
        offset = file.append(b"", np.ones(3))
        file.close()
        file.close()
        for use in (lambda: file.append(b"", np.ones(3)), lambda: file.read(offset)):
            with pytest.raises(RecordFileError, match="is closed"):
                use()

    def test_it_cannot_be_copied(self, path) -> None:
        with RecordFile(path) as file:
            for use in (copy.copy, copy.deepcopy, pickle.dumps):
                with pytest.raises(TypeError, match="cannot be pickled or copied"):
                    use(file)

    def test_a_failed_opening_locks_nothing(self, path) -> None:
        path.write_bytes(b"something else")
        with pytest.raises(RecordFileError, match="not a record file"):
            RecordFile(path)
        path.unlink()
        assert contents(path) == []
