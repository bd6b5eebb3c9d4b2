"""The ranks of a run: who is alive, what rank 0 asks of the others, and tensors between them.

Words go through the store of the process group, tensors through collectives. A collective begins only when all ranks
have said that they are ready for it, so none of them waits in one for another's work, which may take any time.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import socket
import threading
import time
import warnings
from collections.abc import Iterable, Iterator, Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

__all__ = ["Heartbeat", "RankError", "RankGroup", "described", "joined"]

_runs = itertools.count()
#: Entries that one collective moves at most: what is longer goes in pieces, each in bounded time.
_PIECE = 1 << 23
#: Seconds without a sign of life after which a rank is named, where a connection has broken already.
_SOON = 5.0
#: Seconds that rank 0 waits for those that compute, when an error or Ctrl-C ends its block.
_FAREWELL = 2.0
#: Seconds between two looks at the store at most.
_LONGEST = 0.05


class RankGroup:
    """All ranks of the process group, for the time of one `serve`.

    Outside of a process group, and where no launcher has set ``RANK`` and ``WORLD_SIZE``, it is this process alone.

    Parameters
    ----------
    timeout : float
        Seconds without a sign of life after which a rank counts as dead.
    arrival : float
        Seconds that ranks wait for each other at the beginning.

    Attributes
    ----------
    rank, size : int
    device : torch.device
        Where tensors have to be that go between ranks.
    """

    def __init__(self, timeout: float, arrival: float) -> None:
        self.rank, self.size = 0, 1
        self.device = torch.device("cpu")
        self._timeout, self._arrival = timeout, arrival
        self._group: Any = None
        self._number = 0
        self._asked: int | None = None
        self._over: str | None = None
        self._lock = threading.Lock()
        if not joined(arrival):
            return
        self.rank, self.size = dist.get_rank(), dist.get_world_size()
        group: Any = dist.group.WORLD
        self._store: Any = dist.PrefixStore(f"curvop/{next(_runs)}", group.get_group_store())  # type: ignore[attr-defined]
        self._heartbeat = Heartbeat(self._store.clone(), self.rank, timeout)  # type: ignore[attr-defined]

    def meet(self, told: dict[str, Any], device: torch.device) -> list[dict[str, Any]]:
        """Wait until all ranks are here; return what each of them tells, in the order of ranks.

        Parameters
        ----------
        told : dict
            As JSON has it.
        device : torch.device
            Where this rank computes.

        Raises
        ------
        RankError
            Where one does not come in time, or fails before.
        """
        if self.size == 1:
            return [told]
        gpu = torch.cuda.get_device_properties(device).uuid if device.type == "cuda" else ""  # whatever each calls it
        where = f"{socket.gethostname()} {gpu}"
        self._store.set(f"here/{self.rank}", json.dumps(told | {"where": where, "kind": device.type}))
        end = time.monotonic() + self._arrival
        found = [json.loads(self._wait(f"here/{rank}", end)) for rank in range(self.size)]
        self._heartbeat.watch(range(1, self.size) if self.rank == 0 else [0])
        own = len({one["where"] for one in found}) == self.size  # NCCL cannot have two ranks on one GPU
        nccl = own and dist.is_nccl_available() and all(one["kind"] == "cuda" for one in found)
        if nccl:
            self.device = device
        # Collectives of another group than the user's own, for which nobody has to wait longer than for the dead; but
        # NCCL ends the process when the time is over, so that it has to be known before who is dead.
        backend, limit = ("nccl", 4 * self._timeout) if nccl else ("gloo", self._timeout)
        try:
            self._group = dist.new_group(backend=backend, timeout=timedelta(seconds=limit))
        except RuntimeError as error:
            self._blame(error)
        return found

    # What rank 0 does.

    @contextlib.contextmanager
    def turn(self) -> Iterator[None]:
        """Let one thread at a time ask, as long as all ranks live; afterwards nobody can."""
        with self._lock:
            if self._over is not None:
                raise RuntimeError(f"this operator cannot be used any more: {self._over}")
            try:
                yield
            except RankError as error:
                if error.ended:
                    self.fail(error)
                raise

    def ask(self, do: str, tensors: Iterable[Tensor] = (), **arguments: Any) -> int:
        """Ask all other ranks to do something, hand `tensors` out, and return the number under which they answer."""
        if self._asked is not None:  # and interrupted: they are ready for tensors when they have answered
            self.answers(self._asked)
        with self._whole():
            number = self._asked = self._post(do, **arguments)
            for tensor in tensors:
                self.broadcast(tensor)
        return number

    def answers(self, number: int) -> list[dict[str, Any]]:
        """Wait for the answers of all other ranks, in their order."""
        found = [json.loads(self._wait(f"{number}/{rank}")) for rank in range(1, self.size)]
        for key in (str(number), *(f"{number}/{rank}" for rank in range(1, self.size))):
            self._store.delete_key(key)
        self._asked = None
        return found

    def totals(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Return the sums of what all ranks have ready, where `answers` has said that they have."""
        with self._whole():
            number = self._post("sum")
            totals = self.reduce(tensors)
        self._store.delete_key(str(number))
        return totals

    # What all do.

    def asked(self, number: int) -> dict[str, Any]:
        """Wait until rank 0 asks for something."""
        found: dict[str, Any] = json.loads(self._wait(str(number)))
        return found

    def answer(self, number: int, **answer: Any) -> None:
        """Answer rank 0."""
        self._tell(f"{number}/{self.rank}", answer)

    def broadcast(self, tensor: Tensor) -> None:
        """Fill the contiguous `tensor` with that of rank 0."""
        self._finish([dist.broadcast(piece, 0, group=self._group, async_op=True) for piece in _pieces(tensor)])

    def reduce(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Return the sums of the ranks' contiguous tensors, which it may overwrite; on rank 0, elsewhere of no use."""
        tensors = [tensor.to(self.device) for tensor in tensors]
        pieces = [piece for tensor in tensors for piece in _pieces(tensor)]
        self._finish([dist.reduce(piece, 0, group=self._group, async_op=True) for piece in pieces])
        return tensors

    def fail(self, error: BaseException) -> None:
        """Tell all ranks that this one cannot go on, or which other one has failed."""
        if self._over is not None or self.size == 1:
            return
        rank = error.rank if isinstance(error, RankError) else self.rank
        message = str(error) if isinstance(error, RankError) else f"rank {rank} raised {described(error)}"
        self._over = message
        with contextlib.suppress(Exception):  # who cannot be told any more will see for itself
            if not self._store.check(["failed"]):
                self._store.set("failed", json.dumps({"rank": rank, "message": message}))
            if self.rank:  # a launcher ends all ranks when one has ended: rank 0 first says why
                self._store.wait(["seen"], timedelta(seconds=min(_SOON, self._timeout)))
            else:  # which may host the store: the others hear first what has happened
                self._store.set("seen", "")
                time.sleep(2 * self._heartbeat.interval)
        self._close(broken=True)

    def leave(self) -> None:
        """End it, where nothing has failed."""
        if self._over is None:
            self._over = "the block of curvop.distributed.serve has ended"
            self._close(broken=False)

    def dismiss(self, error: BaseException | None) -> None:
        """Let the other ranks go, as rank 0; with what has ended its block, they raise. A dead one is warned of."""
        told = None if error is None else f"rank 0 left its block by {described(error)}"
        lost = None
        try:
            if self._over is None and self.size > 1:
                self._part(told)
        except RankError as one:
            lost = one
            if told is not None:
                self.fail(RankError(0, told))  # which their heartbeats hear while they compute
        finally:
            self.leave()
        if lost is not None and told is None:
            said = f"{lost}. This showed at the end of the block, whose products were all right"
            warnings.warn(said, RuntimeWarning, stacklevel=4)

    def _part(self, told: str | None) -> None:
        """Wait until the others have heard that rank 0 leaves, the living ones before it is raised who is dead."""
        end = float("inf") if told is None else time.monotonic() + _FAREWELL
        lost, waiting = None, list(range(1, self.size))
        number = self._post("stop", error=told)
        while waiting:
            try:
                self._wait(f"{number}/{waiting[0]}", end)
                del waiting[0]
            except RankError as error:
                if told is not None or error.rank not in waiting:
                    raise
                lost = error
                waiting.remove(error.rank)
                self._heartbeat.watch(waiting)
        if lost is not None:
            raise lost

    def _post(self, do: str, **arguments: Any) -> int:
        number, self._number = self._number, self._number + 1
        self._tell(str(number), {"do": do, **arguments})
        return number

    def _tell(self, key: str, told: dict[str, Any]) -> None:
        try:
            self._store.set(key, json.dumps(told))
        except dist.DistError as error:  # as where rank 0 has left meanwhile
            raise self._heartbeat.gone(error) from error

    def _close(self, broken: bool) -> None:
        if self.size == 1:
            return
        self._heartbeat.stop()
        if self._group is not None:
            with contextlib.suppress(Exception):
                if broken:
                    self._group.abort()
                else:
                    dist.destroy_process_group(self._group)

    @contextlib.contextmanager
    def _whole(self) -> Iterator[None]:
        """Give up where something that all ranks do together is interrupted on this one."""
        try:
            yield
        except BaseException as error:
            self.fail(error)
            raise

    def _wait(self, key: str, end: float = float("inf")) -> bytes:
        """Return what the store has under `key`, as soon as it has it, as long as the others live."""
        try:
            for _ in self._heartbeat.looks(_LONGEST):  # the store's own wait logs a warning when it times out
                if self._store.check([key]):
                    return bytes(self._store.get(key))
                if time.monotonic() > end:
                    rank = int(key.rpartition("/")[2])
                    raise RankError(rank, f"rank {rank} did not come to curvop.distributed.serve in time")
        except dist.DistError as error:
            raise self._heartbeat.gone(error) from error
        raise AssertionError

    def _finish(self, works: Sequence[Any]) -> None:
        try:
            for work in works:
                for _ in self._heartbeat.looks(1e-3):
                    if work.is_completed():
                        break
                work.wait()
        except RankError:
            raise
        except RuntimeError as error:
            self._blame(error)

    def _blame(self, error: Exception) -> None:
        """Raise what has broken a connection: whoever it was gives no sign of life any more, or has said it."""
        # Rank 0 is the one that sees all; the others wait for what it finds.
        end = time.monotonic() + self._timeout * (1 if self.rank == 0 else 2)
        while time.monotonic() < end:
            self._heartbeat.check(min(_SOON, self._timeout / 2))
            time.sleep(self._heartbeat.interval / 4)
        raise RankError(None, f"the connection between the ranks is broken: {error}") from error


def _pieces(tensor: Tensor) -> Sequence[Tensor]:
    return tensor.view(-1).split(_PIECE) if tensor.numel() else ()


# How the processes of a run come together, where a launcher has started them.


def joined(arrival: float) -> bool:
    """Whether this is one of several processes; join them where a launcher has started them and nobody has yet."""
    if not dist.is_available():
        return False
    if not dist.is_initialized():
        if not {"RANK", "WORLD_SIZE"} <= os.environ.keys() or int(os.environ["WORLD_SIZE"]) == 1:
            return False
        try:
            dist.init_process_group("gloo", timeout=timedelta(seconds=arrival))
        except (dist.DistError, RuntimeError) as error:
            raise RankError(None, f"not all ranks came together within {arrival:g} s: {error}") from error
    return dist.get_world_size() > 1


# Signs of life between the ranks of a run.


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


class Heartbeat(threading.Thread):
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
        super().__init__(name="curvop heartbeat", daemon=True)
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
        """Begin to watch ranks, all of which have a heartbeat already."""
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
