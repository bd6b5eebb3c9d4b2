"""Curvature matrices of data sets that are spread over processes: rank 0 runs the solver, all serve products.

Start the script with ``torchrun``, and give every rank an operator of its own part of the data.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from curvop.distributed.partial_sums import PartialSum
from curvop.distributed.rank_group import RankError, RankGroup
from curvop.distributed.serving import RemoteOperator, ServedOperator, Worker, compare
from curvop.operators.base import Rows
from curvop.operators.curvature_operator import CurvatureLinearOperator, GGNLikeLinearOperator
from curvop.operators.engine_operator import TORCH_DTYPES, Cost
from curvop.operators.parameter_operator import ParameterLinearOperator
from curvop.storage.fingerprint import differing

__all__ = ["DistributedLinearOperator", "RankError", "serve"]

_serving = False


@contextlib.contextmanager
def serve(*operators: CurvatureLinearOperator, timeout: float = 60.0, arrival: float = 600.0) -> Iterator[Any]:
    """Serve products with the matrix of all ranks' data; a context that every rank enters.

    Rank 0 gets the whole operator, and runs the block of the ``with`` statement. The others answer its products until
    it leaves the block; on those it is None, and they run their block then. Without a launcher, or on one rank, the
    whole operator is that of the only process.

    The matrix is that of the whole data set, however it is spread: unevenly, or with nothing on some ranks
    (``data=[]``). All ranks have the same model and parameters. What rank 0 writes to its parameters or its model's
    buffers within the block is sent to the others before the next product.

    Parameters
    ----------
    *operators : HessianLinearOperator, GGNLinearOperator, ...
        Of this rank's part of the data, one or more, the same kinds in the same order on all ranks. A Fisher matrix by
        sampling needs another `rng` on each rank.
    timeout : float
        Seconds without a sign of life after which a rank counts as dead. Processes give signs while they compute, from
        a thread: a product may take any time, but what holds Python's lock for as long as this counts as dead, such as
        ``scipy.linalg.eigh`` of a large matrix within the block.
    arrival : float
        Seconds that ranks wait for each other at the beginning, as while some of them still load data.

    Yields
    ------
    DistributedLinearOperator, a tuple of them, or None
        On rank 0, one for each operator.

    Raises
    ------
    RankError
        Naming the rank that failed or ended, on all ranks: by the context or, on rank 0, by a product. What one rank
        raises in a product while all of them live is raised on rank 0, which can go on after it; and what ends rank 0's
        block ends the others.
    ValueError
        Where the ranks have different parameters or operators.
    RuntimeError
        Where it is called within another one's block.

    Examples
    --------
    >>> from curvop import GGNLinearOperator
    >>> model = torch.nn.Linear(3, 1, bias=False, dtype=torch.float64)
    >>> X, y = torch.eye(3, dtype=torch.float64), torch.zeros(3, 1, dtype=torch.float64)
    >>> params = dict(model.named_parameters())
    >>> with serve(GGNLinearOperator(model, torch.nn.MSELoss(), params, [(X, y)])) as A:
    ...     if A is not None:  # rank 0, here the only one
    ...         print(A @ [3.0, 0.0, 0.0])
    [2. 0. 0.]
    """
    global _serving
    if _serving:
        raise RuntimeError(
            "curvop.distributed.serve is called within another one's block, where the other ranks cannot follow: pass "
            "all operators to one, serve(A, B)"
        )
    if not operators:
        raise TypeError("serve() was given no operator: pass that of this rank's part of the data, or several")
    if not (timeout > 0 and arrival > 0):
        raise ValueError(f"timeout is {timeout} and arrival is {arrival}, but both must be positive")
    group = RankGroup(timeout, arrival)
    _serving = True
    try:
        try:
            partials = [PartialSum(A) for A in operators]
            for partial in partials:
                partial.A.state()  # raises where the parameters are not the model's any more
            mine = {"operators": [partial.shared_settings() for partial in partials]}
            all_told = [one["operators"] for one in group.meet(mine, operators[0].device)]
            whole: Sequence[DistributedLinearOperator | None] = (None,) * len(partials)
            if group.rank == 0:
                compare(all_told)
                whole = _wholes(group, partials)
            else:
                Worker(group, partials).run()
        except BaseException as error:
            group.fail(error)
            raise
        _serving = group.rank == 0
        try:
            yield whole if len(whole) > 1 else whole[0]
        except BaseException as error:
            at_ease = isinstance(error, SystemExit) and error.code in (None, 0)
            group.dismiss(None if at_ease else error)
            raise
        group.dismiss(None)
    finally:
        _serving = False


class DistributedLinearOperator(ParameterLinearOperator):
    """The curvature matrix of the data of all ranks, on rank 0; made by `serve`.

    It is used as an operator of one process is: solvers, blocks, submatrices, damping, journals, densities. Vectors are
    handed out to all ranks, sums are made in float64 and divided once, by what all data weighs.
    """

    def __init__(self, remote: RemoteOperator, partial: PartialSum) -> None:
        A = partial.A
        super().__init__(A.dtype, A._params, A._rows, A._cols)
        self._remote = remote
        self._partial = partial
        self._flipped = False

    @property
    def device(self) -> torch.device:
        """That of rank 0's parameters."""
        return self._partial.A.device

    @property
    def epsilon(self) -> float:
        """That of rank 0's operator."""
        return self._partial.A.epsilon

    def cost(self, repeats: int = 5) -> Cost:
        """Tell whom to ask: each rank knows what its own part of a product costs.

        Raises
        ------
        NotImplementedError
            Always.
        """
        raise NotImplementedError(
            "a product of all ranks takes as long as the slowest of them, and each keeps what is its own: call cost() "
            "of the operator that each rank passes to serve, before the block; within it, time a product"
        )

    def block(self, rows: str | Sequence[str], cols: str | Sequence[str] | None = None) -> Self:
        """Return the operator of the block that the named parameters span; see `HessianLinearOperator.block`."""
        local = self._partial.A.block(rows, cols)
        return type(self)(self._remote.block(local._rows.names, local._cols.names), PartialSum(local))

    def gradient_and_loss(self) -> tuple[NDArray[Any], float]:
        """Return the gradient ``(M,)`` with respect to the row parameters, and the loss, of the whole data set."""
        if self._remote.alone:
            with self._remote.group.turn():
                return self._partial.A.gradient_and_loss()
        gradient, loss = self._partial.gradient(self._totals("gradient", self._partial.gradient_sums))
        return gradient.cpu().numpy().astype(self.dtype, copy=False), loss

    def diagonal(self) -> NDArray[Any]:
        """Return the exact diagonal ``(N,)``, where the operator of one process has it.

        Raises
        ------
        NotImplementedError
            Where it has not, as for a Hessian; `curvop.spectrum.diagonal` estimates it.
        """
        local = self._partial.A
        if self._remote.alone or not isinstance(local, GGNLikeLinearOperator):
            with self._remote.group.turn():
                return local.diagonal()
        if self._rows.names != self._cols.names:
            raise ValueError("this is a block off the diagonal, whose rows and columns are different parameters")
        diagonal = self._partial.diagonal(self._totals("diagonal", self._partial.diagonal_sums))
        return diagonal.cpu().numpy().astype(self.dtype, copy=False)

    def fingerprint(self) -> dict[str, str]:
        """Return what the matrix depends on, as digests; see `curvop.fingerprint`. All ranks read their data once.

        It is told as by rank 0, with the data of each (``data, rank 1, batch 0``), and what else differs on another
        (``rank 1, seed``).
        """
        remote = self._remote
        with remote.group.turn():
            parts = [self._partial.fingerprint()]
            if not remote.alone:
                remote.refresh()
                parts += [answer["parts"] for answer in remote.answers("fingerprint", adjoint=self._flipped)]
        shared = [{name: one[name] for name in one if not name.startswith("data, ")} for one in parts]
        told = dict(shared[0])
        for rank, one in enumerate(parts):  # what differs is its seed, or was only warned of
            told |= {f"rank {rank}, {name}": one.get(name, "none") for name in differing(shared[0], shared[rank])}
            data = {name.removeprefix("data, "): value for name, value in one.items() if name.startswith("data, ")}
            told |= {f"data, rank {rank}, {name}": value for name, value in data.items()}
        return told

    def state(self) -> tuple[object, ...]:
        """Return a token that changes where rank 0's parameters or model are written to."""
        return self._partial.A.state()

    def _adjoint(self) -> Self:
        local = self._partial.adjoint()
        if local is self._partial:
            return self
        adjoint = copy.copy(self)  # shares the counter
        adjoint._partial, adjoint._flipped = local, not self._flipped
        adjoint._rows, adjoint._cols, adjoint.shape = self._cols, self._rows, self.shape[::-1]
        return adjoint

    def _apply(self, rows: Rows) -> Rows:
        if self._remote.alone:
            with self._remote.group.turn():
                return self._partial.A._apply(rows)
        if isinstance(rows, Tensor):
            wide = torch.float32 if rows.dtype == torch.float32 else torch.float64
            return self._multiply(rows.to(wide)).to(rows.device, rows.dtype)
        kind = np.result_type(self.dtype, rows.dtype)
        kind = kind if kind in TORCH_DTYPES else np.dtype(np.float64)  # torch knows no longdouble
        array = np.require(rows, np.float32 if rows.dtype == np.float32 else np.float64, ["C", "W"])
        return self._multiply(torch.from_numpy(array)).cpu().numpy().astype(kind, copy=False)

    def _multiply(self, vectors: Tensor) -> Tensor:
        with torch.inference_mode(False):
            vectors = vectors.to(self._remote.group.device).contiguous()
            count, dtype = len(vectors), str(vectors.dtype).removeprefix("torch.")
            local = functools.partial(self._partial.product_sums, vectors)
            totals = self._totals("products", local, [vectors], count=count, dtype=dtype)
            return self._partial.products(totals, count)

    def _totals(
        self, do: str, local: Callable[[], list[Tensor]], tensors: Sequence[Tensor] = (), **header: Any
    ) -> list[Tensor]:
        """Return the sums of what all ranks compute."""
        remote = self._remote
        with remote.group.turn():
            remote.refresh()
            number = remote.ask(do, tensors, adjoint=self._flipped, **header)
            own = local()
            remote.check(remote.group.answers(number))
            return remote.group.totals(own)


def _wholes(group: RankGroup, partials: Sequence[PartialSum]) -> tuple[DistributedLinearOperator, ...]:
    numbers: Iterator[int] = itertools.count(len(partials))
    dropped: list[int] = []
    served = [ServedOperator(group, index, partial, numbers, dropped) for index, partial in enumerate(partials)]
    return tuple(DistributedLinearOperator(RemoteOperator(one), one.partial) for one in served)
