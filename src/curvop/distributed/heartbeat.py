"""Signs of life between the ranks of a run."""

from __future__ import annotations

import itertools
import json
import threading
import time
from collections.abc import Iterable, Iterator
from typing import Any

__all__ = ["Pulse", "RankError", "described"]


class RankError(RuntimeError):
    """A rank of a distributed run has failed, or its process has ended.

    Attributes
    ----------
    rank : int or None
        Which; None where nobody knows.
    ended : bool
        Whether the run has ended with it. It has not where a product failed on a rank that lives.
    """

    def __init__(self, rank: int | None, message: str, ended: bool = True) -> None:
        super().__init__(message)
        self.rank = rank
        self.ended = ended


class Pulse(threading.Thread):
    """Gives signs of life, and counts the time without those of others.

    It counts its own turns and not the clock's seconds, so that a process that was stopped itself blames nobody.

    Parameters
    ----------
    store : Store
        A client of its own.
    rank : int
        This process.
    timeout : float
        Seconds without a sign of life after which a rank counts as dead.

    Attributes
    ----------
    interval : float
        Seconds between two signs.
    """

    def __init__(self, store: Any, rank: int, timeout: float) -> None:
        super().__init__(name="curvop pulse", daemon=True)
        self.interval = min(1.0, timeout / 10)
        self._timeout = timeout
        self._lost: Exception | None = None
        self._failed: bytes | None = None
        self._store, self._rank = store, rank
        self._beats: dict[int, tuple[bytes, int]] = {}
        self._ended = threading.Event()
        self._beat(0)
        self.start()

    def watch(self, ranks: Iterable[int]) -> None:
        """Begin to watch ranks, all of which have a pulse already."""
        self._beats = dict.fromkeys(ranks, (b"", 0))

    def check(self, patience: float | None = None) -> None:
        """Raise where a rank has said that it failed, or has given no sign of life for `patience` seconds.

        Raises
        ------
        RankError
        """
        if self._failed is not None or self._lost is not None:
            raise self.gone(self._lost)
        for rank, (_, turns) in self._beats.items():
            if turns * self.interval >= (self._timeout if patience is None else patience):
                raise RankError(
                    rank,
                    f"rank {rank} has given no sign of life for {turns * self.interval:.0f} s: its process has ended "
                    "(killed, out of memory), is stopped, or cannot be reached",
                )

    def looks(self, longest: float) -> Iterator[None]:
        """Yield again and again, as long as the others live, with pauses that grow with what was waited already."""
        began = checked = time.monotonic()
        while True:
            yield
            now = time.monotonic()
            if now - checked > self.interval:
                checked = now
                self.check()
            time.sleep(min(longest, (now - began) / 16))

    def gone(self, error: Exception | None) -> RankError:
        """Return what it means that the store cannot be reached: what was told before, if anything."""
        if self._failed is not None:
            told = json.loads(self._failed)
            return RankError(told["rank"], told["message"])
        rank = 0 if self._rank else None
        return RankError(rank, f"the store of the process group is gone, as it is where rank 0 has ended: {error}")

    def run(self) -> None:
        """Beat and look."""
        for number in itertools.count(1):
            if self._ended.wait(self.interval):
                return
            try:
                self._beat(number)
                if self._failed is None and self._store.check(["failed"]):
                    self._failed = bytes(self._store.get("failed"))
                for rank, (last, turns) in self._beats.items():
                    beat = bytes(self._store.get(f"beat/{rank}"))
                    self._beats[rank] = (beat, turns + 1 if beat == last else 0)
            except Exception as error:  # whatever has become of the store
                if not self._ended.is_set():
                    self._lost = error
                return

    def stop(self) -> None:
        """Stop, as seen by the others too."""
        self._ended.set()
        if self is not threading.current_thread():
            self.join(2 * self.interval)

    def _beat(self, number: int) -> None:
        self._store.set(f"beat/{self._rank}", str(number))


def described(error: BaseException) -> str:
    """Return what an error is, in one line."""
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
