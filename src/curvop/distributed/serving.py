"""Protocol by which the operator on rank 0 requests results from the operators on the other ranks.

Rank 0 sends commands through `RemoteOperator`, and a `Worker` on each other rank executes them. Commands refer to
operators and blocks by number. The operators passed to ``serve`` are numbered from 0. Each new block gets the next
number.
"""

from __future__ import annotations

import itertools
import traceback
import warnings
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from curvop.distributed.partial_sums import ERRORS, PartialSum
from curvop.distributed.rank_group import RankError, RankGroup
from curvop.storage.fingerprint import differing, listed

__all__ = ["RemoteOperator", "ServedOperator", "Worker", "compare"]

#: Names of the digests that depend on code or settings. If these digests differ between ranks, the matrix may still be
#: the same, so the difference causes a warning instead of an error.
_CODE_PARTS = ("model", "loss_function", "predict", "loss", "objective", "batch_weight")


class ServedOperator:
    """Data that rank 0 stores for one operator that was passed to ``serve`` and for the blocks of this operator.

    Attributes
    ----------
    group : RankGroup
    index : int
        Number of the operator in commands.
    partial : PartialSum
        Contribution of rank 0's own data.
    block_numbers : iterator of int
        Unused numbers for new blocks. All served operators share this iterator.
    dropped_blocks : list of int
        Numbers of blocks that the other ranks can delete. All served operators share this list.
    state : tuple
        Token that identifies those values of the parameters and buffers that the other ranks have.
    """

    def __init__(
        self,
        group: RankGroup,
        index: int,
        partial: PartialSum,
        block_numbers: Iterator[int],
        dropped_blocks: list[int],
    ) -> None:
        self.group, self.index, self.partial = group, index, partial
        self.block_numbers, self.dropped_blocks = block_numbers, dropped_blocks
        self.state = partial.A.state()


class RemoteOperator:
    """Object through which rank 0 sends requests for one operator, or for a block of it, to the other ranks."""

    def __init__(self, served: ServedOperator, names: tuple[Sequence[str], Sequence[str]] | None = None) -> None:
        self._served = served
        self._names = names
        self._number = served.index if names is None else -1  # -1: the other ranks do not have the block yet
        self.group = served.group

    @property
    def alone(self) -> bool:
        """True if rank 0 is the only rank."""
        return self.group.size == 1

    def block(self, rows: Sequence[str], cols: Sequence[str]) -> RemoteOperator:
        """Return a `RemoteOperator` for a block. The other ranks create the block before its first request."""
        return RemoteOperator(self._served, (rows, cols))

    def request(self, command: str, tensors: Sequence[Tensor] = (), **arguments: Any) -> int:
        """Send a command for this operator to all other ranks, and return the number of the request."""
        served = self._served
        if self._number < 0 and self._names is not None:
            number, (rows, cols) = next(served.block_numbers), self._names
            block_request = self.group.request("block", of=served.index, rows=rows, cols=cols, number=number)
            self.check(self.group.replies(block_request))
            self._number = number
            weakref.finalize(self, served.dropped_blocks.append, number)
        drop = [served.dropped_blocks.pop() for _ in range(len(served.dropped_blocks))]
        return self.group.request(command, tensors, of=self._number, drop=drop, **arguments)

    def replies(self, command: str, tensors: Sequence[Tensor] = (), **arguments: Any) -> list[dict[str, Any]]:
        """Send a command to all other ranks, and return their replies. Raise the first error that a reply reports."""
        return self.check(self.group.replies(self.request(command, tensors, **arguments)))

    def check(self, replies: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Return `replies`, or raise the first error that a reply reports."""
        for rank, reply in enumerate(replies, 1):
            if "error" in reply:
                kind, message, trace = reply["error"]
                if kind in ERRORS:
                    raise ERRORS[kind](f"rank {rank}: {message}")
                raise RankError(rank, f"rank {rank} raised {kind}: {message}\n\n{trace}", ended=False)
        return replies

    def refresh(self) -> None:
        """If a parameter or buffer was modified on rank 0, send all parameters and buffers to the other ranks."""
        served = self._served
        state = served.partial.A.state()
        if state == served.state:
            return
        whole = RemoteOperator(served)
        for rank, reply in enumerate(whole.replies("layout"), 1):
            layout = served.partial.layout()
            if reply["layout"] != layout:
                pairs = itertools.zip_longest(layout, reply["layout"])
                ours, theirs = next((mine, other) for mine, other in pairs if mine != other)
                raise RankError(
                    0,
                    f"a tensor of rank 0's model is now {ours or 'missing'}, but {theirs or 'missing'} on rank {rank}: "
                    "within the block, change values only; to cast, resize, add or remove tensors, leave the block and "
                    "create new operators on all ranks",
                )
        tensors = [_as_bytes(tensor).to(self.group.device) for tensor in served.partial.tensors()]
        replies = whole.replies("tensors", tensors)
        compare([[served.partial.shared_settings()], *([reply["shared"]] for reply in replies)])
        served.state = state


class Worker:
    """Loop on a rank other than 0 that executes commands from rank 0.

    For each command, there is a method ``_<command>``. The method takes the arguments of the request, receives the
    tensors, and returns a function that computes the reply. If this function raises an exception, the reply reports the
    exception, and rank 0 raises an error.
    """

    def __init__(self, group: RankGroup, partials: Sequence[PartialSum]) -> None:
        self._group = group
        # The keys are pairs (number, is_adjoint).
        self._partials: dict[tuple[int, bool], PartialSum] = {
            (index, False): partial for index, partial in enumerate(partials)
        }
        self._sums: list[Tensor] | None = None

    def run(self) -> None:
        """Execute commands until rank 0 stops the run. Raise a `RankError` if rank 0 stopped because of an error."""
        for number in itertools.count():
            request = self._group.receive(number)
            command = request.pop("command")
            if command == "stop":
                self._group.reply(number)
                self._group.close()
                if request["error"] is not None:
                    raise RankError(0, request["error"])
                return
            if command == "sum":
                assert self._sums is not None
                self._group.reduce(self._sums)
                continue
            self._sums = None
            compute = getattr(self, f"_{command}")(**request)
            try:
                reply = compute()
            except Exception as error:  # an error in this rank's data or model
                trace = "".join(traceback.format_exception(error))
                reply = {"error": (type(error).__name__, str(error), trace)}
                del error  # its traceback keeps tensors in memory
            self._group.reply(number, **reply)

    def _block(self, of: int, rows: Sequence[str], cols: Sequence[str], number: int) -> Callable[[], dict[str, Any]]:
        def compute() -> dict[str, Any]:
            self._partials[number, False] = self._partials[of, False].block(rows, cols)
            return {}

        return compute

    def _products(self, count: int, dtype: str, **which: Any) -> Callable[[], dict[str, Any]]:
        partial = self._partial(**which)
        torch_dtype = torch.float32 if dtype == "float32" else torch.float64
        vectors = partial.A._retry_on_out_of_memory(
            lambda: torch.empty(count, partial.A.shape[1], dtype=torch_dtype, device=self._group.device)
        )
        self._group.broadcast(vectors)
        return lambda: self._store_sums(partial.product_sums(vectors))

    def _gradient(self, **which: Any) -> Callable[[], dict[str, Any]]:
        partial = self._partial(**which)
        return lambda: self._store_sums(partial.gradient_sums())

    def _diagonal(self, **which: Any) -> Callable[[], dict[str, Any]]:
        partial = self._partial(**which)
        return lambda: self._store_sums(partial.diagonal_sums())

    def _fingerprint(self, **which: Any) -> Callable[[], dict[str, Any]]:
        partial = self._partial(**which)
        return lambda: {"parts": partial.fingerprint()}

    def _layout(self, **which: Any) -> Callable[[], dict[str, Any]]:
        partial = self._partial(**which)
        return lambda: {"layout": partial.layout()}

    def _tensors(self, **which: Any) -> Callable[[], dict[str, Any]]:
        partial = self._partial(**which)
        for tensor in partial.tensors():
            received = torch.empty_like(_as_bytes(tensor), device=self._group.device)
            self._group.broadcast(received)
            with torch.no_grad():
                tensor.copy_(received.view(tensor.dtype).view(tensor.shape))
        return lambda: {"shared": partial.shared_settings()}

    def _partial(self, of: int, drop: Sequence[int], adjoint: bool = False) -> PartialSum:
        """Delete the blocks whose numbers are in `drop`. Return the `PartialSum` with number `of` or its adjoint."""
        for number in drop:
            self._partials.pop((number, False), None)
            self._partials.pop((number, True), None)
        if (of, adjoint) not in self._partials:
            self._partials[of, adjoint] = self._partials[of, False].adjoint()
        return self._partials[of, adjoint]

    def _store_sums(self, sums: list[Tensor]) -> dict[str, Any]:
        """Keep the sums until the command "sum" arrives, and return an empty reply."""
        self._sums = sums
        return {}


def compare(settings: list[list[dict[str, str]]]) -> None:
    """Raise an error if the operators of the ranks differ. Warn if only code or settings differ.

    Parameters
    ----------
    settings : list of list of dict
        ``settings[rank][i]`` is the result of `PartialSum.shared_settings` for operator i of that rank.
    """
    for rank, operators in enumerate(settings):
        if len(operators) != len(settings[0]):
            raise ValueError(
                f"rank 0 serves {len(settings[0])} operators, but rank {rank} serves {len(operators)}: pass the same "
                "number on all ranks"
            )
        for ours, theirs in zip(settings[0], operators, strict=True):
            names = [name for name in differing(ours, theirs) if name != "seed"]
            if errors := [name for name in names if name not in _CODE_PARTS]:
                raise ValueError(
                    f"the operator of rank {rank} differs from that of rank 0 in {listed(errors)}. Give all ranks the "
                    "same model and loss: the same seed or checkpoint, class weights of the whole data set, and no "
                    "training step on one rank alone"
                )
            if names:
                warnings.warn(
                    f"{listed(names)} of rank {rank} differ from rank 0 in code or settings (for example training "
                    "mode): unless both compute the same function, the result is a sum of different matrices",
                    RuntimeWarning,
                    stacklevel=2,
                )
    for index in range(len(settings[0])):
        seeds = [operators[index].get("seed") for operators in settings]
        for rank, seed in enumerate(seeds):
            if seed is not None and seed in seeds[:rank]:
                raise ValueError(
                    f"ranks {seeds.index(seed)} and {rank} draw the same random numbers for different data: pass a "
                    "different rng on each rank, such as rng=seed + rank"
                )


def _as_bytes(tensor: Tensor) -> Tensor:
    return tensor.detach().contiguous().view(-1).view(torch.uint8)
