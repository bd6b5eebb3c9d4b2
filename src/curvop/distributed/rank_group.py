"""Communication between the ranks of a run, with failure detection.

Control messages use the store of the process group; tensors use collective operations (collectives). A collective
starts only after every rank has replied that it is ready, so no rank waits in a collective while another rank computes.
Each rank writes heartbeats to the store from a separate thread. A rank whose heartbeats stop is reported as failed.
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

__all__ = ["Heartbeat", "RankError", "RankGroup", "join_process_group", "type_and_message"]

_group_numbers = itertools.count()
#: Largest number of entries in one collective. Longer tensors are sent in pieces, so that no collective takes too long.
_PIECE_SIZE = 1 << 23
#: Time in seconds. If a connection is broken, a rank that sends no heartbeat for this time is reported as failed.
_BROKEN_CONNECTION_PATIENCE = 5.0
#: Time in seconds that rank 0 waits for the other ranks after an error or Ctrl-C has ended its ``with`` block.
_STOP_PATIENCE = 2.0
#: Longest pause, in seconds, between two reads of the store.
_MAX_STORE_PAUSE = 0.05
#: Longest pause, in seconds, between two checks for the end of a collective.
_MAX_COLLECTIVE_PAUSE = 1e-3


class RankError(RuntimeError):
    """Failure of a rank in a distributed run.

    `serve` raises this error. On rank 0, products can also raise this error.

    Attributes
    ----------
    rank : int or None
        Number of the rank that failed, or None if it is unknown.
    ended : bool
        True if the failure ended the run. False if a product failed but all ranks are alive; rank 0 can then continue.
    """

    def __init__(self, rank: int | None, message: str, ended: bool = True) -> None:
        super().__init__(message)
        self.rank = rank
        self.ended = ended


class RankGroup:
    """All ranks of the process group, for the duration of one `serve` block.

    If no process group exists and no launcher has set ``RANK`` and ``WORLD_SIZE``, the group consists of this process
    only.

    Rank 0 sends numbered requests. The other ranks receive the requests in order, and reply to each request.

    Parameters
    ----------
    timeout : float
        Time in seconds. A rank that sends no heartbeat for this time is considered dead.
    arrival : float
        Time in seconds that ranks wait for each other at the beginning of the run.

    Attributes
    ----------
    rank, size : int
        Number of this process (0 to ``size - 1``), and number of processes.
    device : torch.device
        Device that holds tensors while they are sent between ranks.
    """

    def __init__(self, timeout: float, arrival: float) -> None:
        self.rank, self.size = 0, 1
        self.device = torch.device("cpu")
        self._timeout, self._arrival = timeout, arrival
        self._group: Any = None
        self._next_request = 0
        self._open_request: int | None = None
        self._end_reason: str | None = None
        self._lock = threading.Lock()
        if not join_process_group(arrival):
            return
        self.rank, self.size = dist.get_rank(), dist.get_world_size()
        group: Any = dist.group.WORLD
        self._store: Any = dist.PrefixStore(f"curvop/{next(_group_numbers)}", group.get_group_store())  # type: ignore[attr-defined]
        self._heartbeat = Heartbeat(self._store.clone(), self.rank, timeout)  # type: ignore[attr-defined]

    def rendezvous(self, message: dict[str, Any], device: torch.device) -> list[dict[str, Any]]:
        """Wait until every rank has sent its message, and return a list of the messages in rank order.

        Parameters
        ----------
        message : dict
            Message of this rank to all others. The message must be JSON serializable.
        device : torch.device
            Device on which this rank computes.

        Raises
        ------
        RankError
            If a rank does not arrive within `arrival` seconds, or if a rank fails while the other ranks wait.
        """
        if self.size == 1:
            return [message]
        gpu = (
            torch.cuda.get_device_properties(device).uuid if device.type == "cuda" else ""
        )  # cuda:0 may be a different GPU on each rank
        place = f"{socket.gethostname()} {gpu}"
        self._store.set(f"rendezvous/{self.rank}", json.dumps(message | {"place": place, "device_type": device.type}))
        deadline = time.monotonic() + self._arrival
        messages = [json.loads(self._wait_for(f"rendezvous/{rank}", deadline)) for rank in range(self.size)]
        self._heartbeat.watch(range(1, self.size) if self.rank == 0 else [0])
        # NCCL does not allow two ranks on one GPU.
        places_differ = len({message["place"] for message in messages}) == self.size
        all_on_gpu = all(message["device_type"] == "cuda" for message in messages)
        nccl = places_differ and dist.is_nccl_available() and all_on_gpu
        if nccl:
            self.device = device
        # The collectives use a separate group, because the timeout of the user's own group can be much longer than
        # `timeout`. NCCL ends the whole process after a timeout. The timeout of NCCL is therefore longer, so that the
        # heartbeat detects a dead rank first.
        backend, limit = ("nccl", 4 * self._timeout) if nccl else ("gloo", self._timeout)
        try:
            self._group = dist.new_group(backend=backend, timeout=timedelta(seconds=limit))
        except RuntimeError as error:
            self._raise_cause(error)
        return messages

    # The following methods are called on rank 0 only.

    @contextlib.contextmanager
    def exclusive(self) -> Iterator[None]:
        """Allow one thread at a time to send requests. Raise an error if the run has ended."""
        with self._lock:
            if self._end_reason is not None:
                raise RuntimeError(f"this operator can no longer be used: {self._end_reason}")
            try:
                yield
            except RankError as error:
                if error.ended:
                    self.fail(error)
                raise

    def request(self, command: str, tensors: Iterable[Tensor] = (), **arguments: Any) -> int:
        """Send a command to all other ranks, broadcast its tensors, and return the number of the request."""
        if self._open_request is not None:  # an interrupted request: the other ranks reply to it first
            self.replies(self._open_request)
        with self._fail_if_interrupted():
            number = self._open_request = self._send_request(command, **arguments)
            for tensor in tensors:
                self.broadcast(tensor)
        return number

    def replies(self, number: int) -> list[dict[str, Any]]:
        """Wait until all other ranks have replied to a request, and return a list of the replies in rank order."""
        replies = [json.loads(self._wait_for(f"{number}/{rank}")) for rank in range(1, self.size)]
        for key in (str(number), *(f"{number}/{rank}" for rank in range(1, self.size))):
            self._store.delete_key(key)
        self._open_request = None
        return replies

    def totals(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Add each tensor over all ranks, and return the sums. Call `replies` first, so that all ranks are ready."""
        with self._fail_if_interrupted():
            number = self._send_request("sum")
            totals = self.reduce(tensors)
        self._store.delete_key(str(number))
        return totals

    def dismiss(self, error: BaseException | None) -> None:
        """End the run. The other ranks return normally if `error` is None. Otherwise, they raise a `RankError`.

        Warns
        -----
        RuntimeWarning
            If another rank has died, although the ``with`` block of rank 0 ended normally.
        """
        reason = None if error is None else f"rank 0 left the serve block with {type_and_message(error)}"
        rank_error = None
        try:
            if self._end_reason is None and self.size > 1:
                self._stop_workers(reason)
        except RankError as caught:
            rank_error = caught
            if reason is not None:
                self.fail(RankError(0, reason))  # heartbeat threads report it to ranks that are still computing
        finally:
            self.close()
        if rank_error is not None and reason is None:
            message = f"{rank_error}. This was detected at the end of the block; all products before it are correct"
            warnings.warn(message, RuntimeWarning, stacklevel=4)

    # The following methods are called on all ranks.

    def receive(self, number: int) -> dict[str, Any]:
        """Wait for a request from rank 0, and return it."""
        message: dict[str, Any] = json.loads(self._wait_for(str(number)))
        return message

    def reply(self, number: int, **message: Any) -> None:
        """Send the reply to a request from rank 0."""
        self._send(f"{number}/{self.rank}", message)

    def broadcast(self, tensor: Tensor) -> None:
        """Copy the values of the contiguous `tensor` from rank 0 to all other ranks."""
        self._finish([dist.broadcast(piece, 0, group=self._group, async_op=True) for piece in _pieces(tensor)])

    def reduce(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Add each of the contiguous tensors over all ranks, and return the sums.

        The sums are valid on rank 0 only. The input tensors are overwritten.
        """
        tensors = [tensor.to(self.device) for tensor in tensors]
        pieces = [piece for tensor in tensors for piece in _pieces(tensor)]
        self._finish([dist.reduce(piece, 0, group=self._group, async_op=True) for piece in pieces])
        return tensors

    def fail(self, error: BaseException) -> None:
        """End the run, and report the failure to all ranks.

        The report names the rank of `error` if `error` is a `RankError`, and this rank otherwise.
        """
        if self._end_reason is not None or self.size == 1:
            return
        rank = error.rank if isinstance(error, RankError) else self.rank
        message = str(error) if isinstance(error, RankError) else f"rank {rank} raised {type_and_message(error)}"
        self._end_reason = message
        with contextlib.suppress(Exception):  # unreachable ranks time out on their own
            if not self._store.check(["failure"]):
                self._store.set("failure", json.dumps({"rank": rank, "message": message}))
            if self.rank:  # torchrun ends all ranks as soon as one ends: wait until rank 0 knows the failure
                patience = min(_BROKEN_CONNECTION_PATIENCE, self._timeout)
                self._store.wait(["failure received"], timedelta(seconds=patience))
            else:  # rank 0 may host the store: give the other ranks time to read the failure
                self._store.set("failure received", "")
                time.sleep(2 * self._heartbeat.interval)
        self._close_group(broken=True)

    def close(self) -> None:
        """End the run normally, unless it has already failed."""
        if self._end_reason is None:
            self._end_reason = "the block of curvop.distributed.serve has ended"
            self._close_group(broken=False)

    def _stop_workers(self, reason: str | None) -> None:
        """Send the stop request, and wait until all other ranks have replied.

        If `reason` is None and a rank has died, wait for the replies of the other ranks, and then raise a `RankError`.
        If `reason` is not None, wait for at most `_STOP_PATIENCE` seconds. In this case, raise the `RankError` of a
        dead rank immediately.
        """
        deadline = float("inf") if reason is None else time.monotonic() + _STOP_PATIENCE
        rank_error, waiting = None, list(range(1, self.size))
        number = self._send_request("stop", error=reason)
        while waiting:
            try:
                self._wait_for(f"{number}/{waiting[0]}", deadline)
                del waiting[0]
            except RankError as error:
                if reason is not None or error.rank not in waiting:
                    raise
                rank_error = error
                waiting.remove(error.rank)
                self._heartbeat.watch(waiting)
        if rank_error is not None:
            raise rank_error

    def _send_request(self, command: str, **arguments: Any) -> int:
        number, self._next_request = self._next_request, self._next_request + 1
        self._send(str(number), {"command": command, **arguments})
        return number

    def _send(self, key: str, message: dict[str, Any]) -> None:
        try:
            self._store.set(key, json.dumps(message))
        except dist.DistError as error:  # for example because rank 0 has ended
            raise self._heartbeat.store_error(error) from error

    def _close_group(self, broken: bool) -> None:
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
    def _fail_if_interrupted(self) -> Iterator[None]:
        """End the run if an exception interrupts a step that all ranks must complete together."""
        try:
            yield
        except BaseException as error:
            self.fail(error)
            raise

    def _wait_for(self, key: str, deadline: float = float("inf")) -> bytes:
        """Wait until the store has a value for `key`, and return the value.

        Raise an error if a watched rank fails meanwhile.
        """
        try:
            # Poll the store, because its own wait() logs a warning when it times out.
            for _ in self._heartbeat.poll(_MAX_STORE_PAUSE):
                if self._store.check([key]):
                    return bytes(self._store.get(key))
                if time.monotonic() > deadline:
                    rank = int(key.rpartition("/")[2])
                    raise RankError(
                        rank,
                        f"rank {rank} did not reach curvop.distributed.serve within {self._arrival:g} s: look for an "
                        "error on that rank, or pass a larger arrival=",
                    )
        except dist.DistError as error:
            raise self._heartbeat.store_error(error) from error
        raise AssertionError

    def _finish(self, works: Sequence[Any]) -> None:
        """Wait until collectives are complete. Raise an error if a watched rank fails meanwhile."""
        try:
            for work in works:
                for _ in self._heartbeat.poll(_MAX_COLLECTIVE_PAUSE):
                    if work.is_completed():
                        break
                work.wait()
        except RankError:
            raise
        except RuntimeError as error:
            self._raise_cause(error)

    def _raise_cause(self, error: Exception) -> None:
        """Raise a `RankError` that names the rank that broke a connection.

        Wait until a rank reports its failure, or the heartbeats of a rank stop. Only rank 0 watches all ranks. The
        other ranks wait twice as long, because they may depend on the report from rank 0.
        """
        deadline = time.monotonic() + self._timeout * (1 if self.rank == 0 else 2)
        while time.monotonic() < deadline:
            self._heartbeat.check(min(_BROKEN_CONNECTION_PATIENCE, self._timeout / 2))
            time.sleep(self._heartbeat.interval / 4)
        raise RankError(None, f"the connection between the ranks is broken: {error}") from error


class Heartbeat(threading.Thread):
    """Thread that writes heartbeats of this rank to the store and reads heartbeats of the watched ranks.

    Time is counted in intervals of this thread, not by the clock. Otherwise, a process that continues after it was
    suspended would report the other ranks as dead.

    Parameters
    ----------
    store : Store
        Client of the process group's store. No other thread may use the same client.
    rank : int
        Number of this process.
    timeout : float
        Time in seconds. A rank that sends no heartbeat for this time is considered dead.

    Attributes
    ----------
    interval : float
        Seconds between two heartbeats.
    """

    def __init__(self, store: Any, rank: int, timeout: float) -> None:
        super().__init__(name="curvop heartbeat", daemon=True)
        self.interval = min(1.0, timeout / 10)
        self._timeout = timeout
        self._lost_store: Exception | None = None
        self._failure: bytes | None = None
        self._store, self._rank = store, rank
        self._beats: dict[int, tuple[bytes, int]] = {}  # per rank: last value, intervals without a change
        self._stopped = threading.Event()
        self._beat(0)
        self.start()

    def watch(self, ranks: Iterable[int]) -> None:
        """From now on, watch only these ranks. Each of them must already have written a heartbeat."""
        self._beats = dict.fromkeys(ranks, (b"", 0))

    def check(self, patience: float | None = None) -> None:
        """Raise an error if a rank has reported a failure, or if a watched rank has been silent for `patience` seconds.

        Raises
        ------
        RankError
        """
        if self._failure is not None or self._lost_store is not None:
            raise self.store_error(self._lost_store)
        for rank, (_, intervals) in self._beats.items():
            if intervals * self.interval >= (self._timeout if patience is None else patience):
                raise RankError(
                    rank,
                    f"rank {rank} has sent no heartbeat for {intervals * self.interval:.0f} s: its process has ended "
                    "(killed, or out of memory), is stopped, or cannot be reached",
                )

    def poll(self, max_pause: float) -> Iterator[None]:
        """Yield repeatedly, so that the caller can check a condition. Raise a `RankError` if a watched rank fails.

        Between two iterations, pause for a time that grows up to `max_pause` seconds.
        """
        start = last_check = time.monotonic()
        while True:
            yield
            now = time.monotonic()
            if now - last_check > self.interval:
                last_check = now
                self.check()
            time.sleep(min(max_pause, (now - start) / 16))

    def store_error(self, error: Exception | None) -> RankError:
        """Return an error for the failure that a rank has reported. If no rank has reported one, the store is lost."""
        if self._failure is not None:
            failure = json.loads(self._failure)
            return RankError(failure["rank"], failure["message"])
        rank = 0 if self._rank else None
        return RankError(
            rank, f"the store of the process group cannot be reached, probably because rank 0 has ended: {error}"
        )

    def run(self) -> None:
        """Write and read heartbeats once per interval until `stop` is called or the store is lost."""
        for number in itertools.count(1):
            if self._stopped.wait(self.interval):
                return
            try:
                self._beat(number)
                if self._failure is None and self._store.check(["failure"]):
                    self._failure = bytes(self._store.get("failure"))
                for rank, (last, intervals) in self._beats.items():
                    beat = bytes(self._store.get(f"beat/{rank}"))
                    self._beats[rank] = (beat, intervals + 1 if beat == last else 0)
            except Exception as error:  # torch raises different types for a lost store
                if not self._stopped.is_set():
                    self._lost_store = error
                return

    def stop(self) -> None:
        """Stop the thread, so that this rank writes no more heartbeats."""
        self._stopped.set()
        if self is not threading.current_thread():
            self.join(2 * self.interval)

    def _beat(self, number: int) -> None:
        self._store.set(f"beat/{self._rank}", str(number))


def join_process_group(arrival: float) -> bool:
    """Initialize the process group if a launcher started this process. Return True if there are several ranks."""
    if not dist.is_available():
        return False
    if not dist.is_initialized():
        if not {"RANK", "WORLD_SIZE"} <= os.environ.keys() or int(os.environ["WORLD_SIZE"]) == 1:
            return False
        try:
            dist.init_process_group("gloo", timeout=timedelta(seconds=arrival))
        except (dist.DistError, RuntimeError) as error:
            raise RankError(None, f"not all ranks joined the process group within {arrival:g} s: {error}") from error
    return dist.get_world_size() > 1


def type_and_message(error: BaseException) -> str:
    """Return the name of an exception's type, followed by its message if there is one."""
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__


def _pieces(tensor: Tensor) -> Sequence[Tensor]:
    return tensor.view(-1).split(_PIECE_SIZE) if tensor.numel() else ()
