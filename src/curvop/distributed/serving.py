"""What goes on between the whole operator on rank 0 and the parts on the other ranks."""

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

#: What is told of a problem by its code, which may differ between ranks without the matrix being another.
_CODE = ("model", "loss_function", "objective", "batch_weight")


class ServedOperator:
    """What rank 0 knows of one of the operators: what it has handed out, and which blocks the others hold."""

    def __init__(
        self, group: RankGroup, index: int, partial: PartialSum, numbers: Iterator[int], dropped: list[int]
    ) -> None:
        self.group, self.index, self.partial = group, index, partial
        self.numbers, self.dropped = numbers, dropped
        self.state = partial.A.state()


class RemoteOperator:
    """Rank 0's way to one operator, or one block of it, on the other ranks."""

    def __init__(self, served: ServedOperator, names: tuple[Sequence[str], Sequence[str]] | None = None) -> None:
        self._served = served
        self._names = names
        self._number = served.index if names is None else -1
        self.group = served.group

    @property
    def alone(self) -> bool:
        """Whether there are no other ranks."""
        return self.group.size == 1

    def block(self, rows: Sequence[str], cols: Sequence[str]) -> RemoteOperator:
        """Return the way to a block, which the others make when they are first asked for it."""
        return RemoteOperator(self._served, (rows, cols))

    def ask(self, do: str, tensors: Sequence[Tensor] = (), **header: Any) -> int:
        """Ask all other ranks; see `RankGroup.ask`."""
        served = self._served
        if self._number < 0 and self._names is not None:
            number, (rows, cols) = next(served.numbers), self._names
            self.check(
                self.group.answers(self.group.ask("block", of=served.index, rows=rows, cols=cols, number=number))
            )
            self._number = number
            weakref.finalize(self, served.dropped.append, number)
        drop = [served.dropped.pop() for _ in range(len(served.dropped))]
        return self.group.ask(do, tensors, of=self._number, drop=drop, **header)

    def answers(self, do: str, tensors: Sequence[Tensor] = (), **header: Any) -> list[dict[str, Any]]:
        """Ask all other ranks and return their answers, none of which is an error."""
        return self.check(self.group.answers(self.ask(do, tensors, **header)))

    def check(self, answers: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Raise what a rank has raised."""
        for rank, answer in enumerate(answers, 1):
            if "error" in answer:
                kind, message, trace = answer["error"]
                if kind in ERRORS:
                    raise ERRORS[kind](f"rank {rank}: {message}")
                raise RankError(rank, f"rank {rank} raised {kind}: {message}\n\n{trace}", ended=False)
        return answers

    def refresh(self) -> None:
        """Hand out all parameters and buffers where any of them was written to since."""
        served = self._served
        state = served.partial.A.state()
        if state == served.state:
            return
        whole = RemoteOperator(served)
        for rank, answer in enumerate(whole.answers("layout"), 1):
            if answer["layout"] != (layout := served.partial.layout()):
                ours, theirs = next(
                    both for both in itertools.zip_longest(layout, answer["layout"]) if both[0] != both[1]
                )
                raise RankError(
                    0,
                    f"rank 0's model has a tensor that is {ours or 'missing'} now, but {theirs or 'missing'} on rank "
                    f"{rank}: values may be written within the block, but to cast, resize, add or remove tensors, "
                    "leave it and make new operators on all ranks",
                )
        tensors = [_bytes(tensor).to(self.group.device) for tensor in served.partial.tensors()]
        answers = whole.answers("tensors", tensors)
        compare([[served.partial.shared_settings()], *([answer["shared"]] for answer in answers)])
        served.state = state


class Worker:
    """Another rank than 0, in its service."""

    def __init__(self, group: RankGroup, partials: Sequence[PartialSum]) -> None:
        self._group = group
        self._partials: dict[tuple[int, bool], PartialSum] = {
            (index, False): partial for index, partial in enumerate(partials)
        }
        self._sums: list[Tensor] | None = None

    def run(self) -> None:
        """Answer until rank 0 needs nothing more; raise what ended it, if it was an error."""
        for number in itertools.count():
            asked = self._group.asked(number)
            do = asked.pop("do")
            if do == "stop":
                self._group.answer(number)
                self._group.leave()
                if asked["error"] is not None:
                    raise RankError(0, asked["error"])
                return
            if do == "sum":
                assert self._sums is not None
                self._group.reduce(self._sums)
                continue
            self._sums = None
            compute = getattr(self, f"_{do}")(**asked)  # takes what rank 0 hands out
            try:
                answer = compute()
            except Exception as error:  # of this rank's data or model: rank 0 raises it
                trace = "".join(traceback.format_exception(error))
                answer = {"error": (type(error).__name__, str(error), trace)}
                del error  # and what it holds
            self._group.answer(number, **answer)

    def _block(self, of: int, rows: Sequence[str], cols: Sequence[str], number: int) -> Callable[[], dict[str, Any]]:
        def compute() -> dict[str, Any]:
            self._partials[number, False] = self._partials[of, False].block(rows, cols)
            return {}

        return compute

    def _products(self, count: int, dtype: str, **which: Any) -> Callable[[], dict[str, Any]]:
        partial = self._partial(**which)
        kind = torch.float32 if dtype == "float32" else torch.float64
        vectors = partial.A._retry_on_out_of_memory(
            lambda: torch.empty(count, partial.A.shape[1], dtype=kind, device=self._group.device)
        )
        self._group.broadcast(vectors)
        return lambda: self._keep(partial.product_sums(vectors))

    def _gradient(self, **which: Any) -> Callable[[], dict[str, Any]]:
        partial = self._partial(**which)
        return lambda: self._keep(partial.gradient_sums())

    def _diagonal(self, **which: Any) -> Callable[[], dict[str, Any]]:
        partial = self._partial(**which)
        return lambda: self._keep(partial.diagonal_sums())

    def _fingerprint(self, **which: Any) -> Callable[[], dict[str, Any]]:
        partial = self._partial(**which)
        return lambda: {"parts": partial.fingerprint()}

    def _layout(self, **which: Any) -> Callable[[], dict[str, Any]]:
        partial = self._partial(**which)
        return lambda: {"layout": partial.layout()}

    def _tensors(self, **which: Any) -> Callable[[], dict[str, Any]]:
        partial = self._partial(**which)
        for tensor in partial.tensors():
            fresh = torch.empty_like(_bytes(tensor), device=self._group.device)
            self._group.broadcast(fresh)
            with torch.no_grad():
                tensor.copy_(fresh.view(tensor.dtype).view(tensor.shape))
        return lambda: {"shared": partial.shared_settings()}

    def _partial(self, of: int, drop: Sequence[int], adjoint: bool = False) -> PartialSum:
        for number in drop:
            self._partials.pop((number, False), None)
            self._partials.pop((number, True), None)
        if (of, adjoint) not in self._partials:
            self._partials[of, adjoint] = self._partials[of, False].adjoint()
        return self._partials[of, adjoint]

    def _keep(self, sums: list[Tensor]) -> dict[str, Any]:
        self._sums = sums
        return {}


def compare(descriptions: list[list[dict[str, str]]]) -> None:
    """Refuse operators that are not the same on all ranks, naming rank and difference."""
    for rank, one in enumerate(descriptions):
        if len(one) != len(descriptions[0]):
            raise ValueError(f"rank 0 serves {len(descriptions[0])} operators, but rank {rank} serves {len(one)}")
        for ours, theirs in zip(descriptions[0], one, strict=True):
            names = [name for name in differing(ours, theirs) if name != "seed"]
            if hard := [name for name in names if name not in _CODE]:
                raise ValueError(
                    f"the operator of rank {rank} is not that of rank 0: {listed(hard)} differ. Give all ranks "
                    "the same model and loss (of the same seed or checkpoint, class weights of the whole data set, and "
                    "no step of training that they do not share)"
                )
            if names:
                warnings.warn(
                    f"{listed(names)} of rank {rank} differ from those of rank 0, in code or settings (training mode "
                    "is one): the matrix is a sum of different ones unless they compute the same",
                    RuntimeWarning,
                    stacklevel=2,
                )
    for seeds in ([one[index].get("seed") for one in descriptions] for index in range(len(descriptions[0]))):
        for rank, seed in enumerate(seeds):
            if seed is not None and seed in seeds[:rank]:
                raise ValueError(
                    f"ranks {seeds.index(seed)} and {rank} draw the same random numbers for different data: pass each "
                    "rank an rng of its own, such as rng=seed + rank"
                )


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.detach().contiguous().view(-1).view(torch.uint8)
