"""Curvature matrices of data sets that are spread over processes.

Every rank enters `serve` with an operator of its own part of the data. Rank 0 runs the solver on a
`DistributedLinearOperator`. The other ranks compute what their data contribute to the products.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
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
    r"""Serve products with the curvature matrix of a data set that is spread over processes.

    Every rank enters this context manager with an operator of its own part of the data. On rank 0, the context manager
    yields the operator of the whole data set, which any solver accepts. On every other rank, the context manager
    computes what the data of the rank contribute to the products. On these ranks, the context manager yields None after
    rank 0 has left its ``with`` block. Start the script with ``torchrun``. If there is no launcher or only one rank,
    the only process is rank 0.

    If one process can read the whole data set in acceptable time, do not use `serve`: pass the operator to the solver
    directly.

    Parameters
    ----------
    *operators : HessianLinearOperator, GGNLinearOperator, ...
        One or more operators of this rank's part of the data. All ranks must pass the same kinds of operators in the
        same order, with the same model and parameters. The parts of the data can differ in size or be empty
        (``data=[]``). A Fisher matrix with ``mc_samples`` needs a different ``rng`` on each rank.
    timeout : float, optional
        Time in seconds. A rank that sends no heartbeat for this time is considered dead. Default: 60. Each process
        sends heartbeats from a separate thread, so a product may take longer than `timeout`. However, a function that
        holds Python's global interpreter lock, such as ``scipy.linalg.eigh`` of a large matrix, also blocks the
        heartbeats and must not take longer than `timeout`.
    arrival : float, optional
        Time in seconds that ranks wait for each other at the beginning, for example because some of them load data.
        Default: 600.

    Yields
    ------
    DistributedLinearOperator, tuple of DistributedLinearOperator, or None
        On rank 0, the operator of the whole data set, or a tuple if several operators were passed. On the other ranks,
        the value is None.

    Raises
    ------
    RankError
        If a rank fails or its process ends. The error names that rank and is raised on all ranks. On rank 0, a product
        or the context manager raises it. On the other ranks, the context manager raises it. If a product raises an
        exception but all ranks are alive, only rank 0 raises an error, and the run can continue. If the ``with`` block
        of rank 0 ends with an exception, the other ranks raise a ``RankError``.
    ValueError
        If the ranks have different parameters or operators, or if `timeout` or `arrival` is not positive.
    TypeError
        If no operator is passed, or if an argument is not a curvature matrix of this package.
    RuntimeError
        If `serve` is called within the ``with`` block of another call of `serve`.

    Warns
    -----
    RuntimeWarning
        If code or settings (such as training mode) differ between ranks, or if a rank died after the last product.

    See Also
    --------
    DistributedLinearOperator : The operator on rank 0.
    RankError : Failure of a rank.

    Notes
    -----
    Let :math:`A_r` be the matrix of the data of rank r, and :math:`W_r` the total weight of its batches. The matrix of
    the whole data set is :math:`A = \sum_r W_r A_r / \sum_r W_r`. The sums are computed in float64. Up to rounding
    errors, A is the same for any number of ranks.

    For N parameters, a product sends one vector of 8 N bytes to each rank (4 N bytes for a float32 vector). The product
    also adds one vector of 8 N bytes from each rank.

    If rank 0 has modified its parameters or buffers, it sends the new values to all ranks before the next product. The
    dtypes and shapes must not change.

    Examples
    --------
    The same script runs in one process and under ``torchrun``:

    >>> import os
    >>> import torch
    >>> from scipy.sparse.linalg import eigsh
    >>> from curvop import GGNLinearOperator
    >>> from curvop.distributed import serve
    >>> rank, size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    >>> _ = torch.manual_seed(0)  # the same model on all ranks
    >>> model = torch.nn.Linear(3, 1, bias=False, dtype=torch.float64)
    >>> X = torch.diag(torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64))
    >>> data = [(x[None], torch.zeros(1, 1, dtype=torch.float64)) for x in X]
    >>> params = dict(model.named_parameters())
    >>> A_local = GGNLinearOperator(model, torch.nn.MSELoss(), params, data[rank::size])
    >>> with serve(A_local) as A:
    ...     if A is not None:  # rank 0
    ...         print(eigsh(A, k=1, v0=np.ones(3), return_eigenvectors=False).round(6))
    [6.]
    """
    global _serving
    if _serving:
        raise RuntimeError(
            "curvop.distributed.serve is called within the block of another serve, which the other ranks cannot "
            "follow: pass all operators to one call, serve(A, B)"
        )
    if not operators:
        raise TypeError("serve() received no operator: pass one or more operators of this rank's part of the data")
    if not (timeout > 0 and arrival > 0):
        raise ValueError(f"timeout is {timeout} and arrival is {arrival}, but both must be positive")
    group = RankGroup(timeout, arrival)
    _serving = True
    try:
        try:
            partials = [PartialSum(A) for A in operators]
            for partial in partials:
                partial.A.state()  # raises if the parameters are no longer the model's
            message = {"operators": [partial.shared_settings() for partial in partials]}
            settings = [reply["operators"] for reply in group.rendezvous(message, operators[0].device)]
            whole: Sequence[DistributedLinearOperator | None] = (None,) * len(partials)
            if group.rank == 0:
                compare(settings)
                whole = _distributed_operators(group, partials)
            else:
                Worker(group, partials).run()
        except BaseException as error:
            group.fail(error)
            raise
        _serving = group.rank == 0
        try:
            yield whole if len(whole) > 1 else whole[0]
        except BaseException as error:
            is_normal_exit = isinstance(error, SystemExit) and error.code in (None, 0)
            group.dismiss(None if is_normal_exit else error)
            raise
        group.dismiss(None)
    finally:
        _serving = False


class DistributedLinearOperator(ParameterLinearOperator):
    """Curvature matrix of the data of all ranks, as a ``LinearOperator`` on rank 0.

    Do not create the operator directly; `serve` yields it. Solvers, blocks, submatrices, damping, journals and
    densities work as for an operator in one process. A product sends the vectors to all ranks, adds the sums of all
    ranks in float64, and divides the result by the total weight of the data.

    See Also
    --------
    serve : Create the operator.
    """

    def __init__(self, remote: RemoteOperator, partial: PartialSum) -> None:
        A = partial.A
        super().__init__(A.dtype, A._params, A._rows, A._cols)
        self._remote = remote
        self._partial = partial
        self._is_adjoint = False

    def _details(self) -> list[str]:
        size = self._remote.group.size
        return [*super()._details(), f"data of {size} rank{'s' * (size > 1)}"]

    @property
    def device(self) -> torch.device:
        """Device of rank 0's parameters."""
        return self._partial.A.device

    @property
    def epsilon(self) -> float:
        """Machine epsilon of the lowest precision that rank 0 uses in a product."""
        return self._partial.A.epsilon

    def cost(self, repeats: int = 5) -> Cost:
        """Raise an error, because the cost of a distributed product is not measured.

        Instead, call ``cost()`` of each rank's own operator before `serve`.

        Raises
        ------
        NotImplementedError
            Always.
        """
        raise NotImplementedError(
            "a product takes as long as on the slowest rank, and each rank has its own cache: call cost() of the "
            "operator that each rank passes to serve, before the block; within the block, time a product"
        )

    def block(self, rows: str | Iterable[str], cols: str | Iterable[str] | None = None) -> Self:
        """Return the block of the matrix for the given parameters.

        Products with the block differentiate with respect to these parameters only.

        Parameters
        ----------
        rows : str or iterable of str
            Names of the row parameters, in the order of the rows of the block. As in the blocks of other operators, the
            names of modules, glob patterns, and the dict that `curvop.select` returns are also accepted.
        cols : str or iterable of str, optional
            Names of the column parameters, in the order of the columns of the block. Default: `rows`.

        Returns
        -------
        DistributedLinearOperator

        Raises
        ------
        KeyError
            If a name is unknown. The error is also a ``ValueError``.
        ValueError
            If a parameter is selected twice, or if no name is passed.
        """
        local = self._partial.A.block(rows, cols)
        return type(self)(self._remote.block(local._rows.names, local._cols.names), PartialSum(local))

    def gradient_and_loss(self) -> tuple[NDArray[Any], float]:
        """Return the gradient and the loss of the whole data set, in one pass over the data.

        Returns
        -------
        gradient : ndarray, shape (M,)
            Gradient with respect to the row parameters.
        loss : float

        Raises
        ------
        NonFiniteProductError
            If the gradient or the loss is NaN or infinite. The message names the rank and the batch.
        """
        if self._remote.alone:
            with self._remote.group.exclusive():
                return self._partial.A.gradient_and_loss()
        gradient, loss = self._partial.gradient(self._totals("gradient", self._partial.gradient_sums))
        return gradient.cpu().numpy().astype(self.dtype, copy=False), loss

    def diagonal(self) -> NDArray[Any]:
        """Return the exact diagonal of a Gauss-Newton, Fisher or gradient covariance matrix.

        Returns
        -------
        ndarray, shape (N,)

        Raises
        ------
        NotImplementedError
            If the exact diagonal cannot be computed, for example for a Hessian. Use `curvop.spectrum.diagonal` to
            estimate the diagonal.
        ValueError
            If the operator is a block whose rows and columns are different parameters.
        """
        local = self._partial.A
        if self._remote.alone or not isinstance(local, GGNLikeLinearOperator):
            with self._remote.group.exclusive():
                return local.diagonal()
        if self._rows.names != self._cols.names:
            raise ValueError("this is a block off the diagonal, whose rows and columns are different parameters")
        diagonal = self._partial.diagonal(self._totals("diagonal", self._partial.diagonal_sums))
        return diagonal.cpu().numpy().astype(self.dtype, copy=False)

    def fingerprint(self) -> dict[str, str]:
        """Return a dictionary of digests that identify the matrix.

        Each rank reads its data once. The dictionary contains the digests of rank 0, which
        `curvop.storage.fingerprint.fingerprint` describes. The dictionary also contains the digests of the batches of
        every rank (for example ``data, rank 1, batch 0``). Any other digest of a rank is included only if it differs
        from that of rank 0 (for example ``rank 1, seed``).

        Returns
        -------
        dict of str to str
        """
        remote = self._remote
        with remote.group.exclusive():
            parts_by_rank = [self._partial.fingerprint()]
            if not remote.alone:
                remote.refresh()
                replies = remote.replies("fingerprint", adjoint=self._is_adjoint)
                parts_by_rank += [reply["parts"] for reply in replies]
        shared_by_rank = [
            {name: value for name, value in parts.items() if not name.startswith("data, ")} for parts in parts_by_rank
        ]
        combined = dict(shared_by_rank[0])
        for rank, parts in enumerate(parts_by_rank):
            # Only the seed, code and settings can differ. If code or settings differ, serve has issued a warning.
            for name in differing(shared_by_rank[0], shared_by_rank[rank]):
                combined[f"rank {rank}, {name}"] = parts.get(name, "none")
            for name, value in parts.items():
                if name.startswith("data, "):
                    combined[f"data, rank {rank}, {name.removeprefix('data, ')}"] = value
        return combined

    def state(self) -> tuple[object, ...]:
        """Return a token that changes if the parameters or the model of rank 0 change. Compare tokens with ``==``."""
        return self._partial.A.state()

    def _adjoint(self) -> Self:
        local = self._partial.adjoint()
        if local is self._partial:
            return self
        adjoint = copy.copy(self)  # shares the product counter
        adjoint._partial, adjoint._is_adjoint = local, not self._is_adjoint
        adjoint._rows, adjoint._cols, adjoint.shape = self._cols, self._rows, self.shape[::-1]
        return adjoint

    def _apply(self, rows: Rows) -> Rows:
        if self._remote.alone:
            with self._remote.group.exclusive():
                return self._partial.A._apply(rows)
        if isinstance(rows, Tensor):
            wide = torch.float32 if rows.dtype == torch.float32 else torch.float64
            return self._multiply(rows.to(wide)).to(rows.device, rows.dtype)
        dtype = np.result_type(self.dtype, rows.dtype)
        dtype = dtype if dtype in TORCH_DTYPES else np.dtype(np.float64)  # torch has no longdouble
        array = np.require(rows, np.float32 if rows.dtype == np.float32 else np.float64, ["C", "W"])
        return self._multiply(torch.from_numpy(array)).cpu().numpy().astype(dtype, copy=False)

    def _multiply(self, vectors: Tensor) -> Tensor:
        """Multiply the matrix by each row of `vectors`, which has shape (K, N).

        The result is a float64 tensor of shape (K, M).
        """
        with torch.inference_mode(False):
            vectors = vectors.to(self._remote.group.device).contiguous()
            count, dtype = len(vectors), str(vectors.dtype).removeprefix("torch.")
            local = functools.partial(self._partial.product_sums, vectors)
            totals = self._totals("products", local, [vectors], count=count, dtype=dtype)
            return self._partial.products(totals, count)

    def _totals(
        self, command: str, local: Callable[[], list[Tensor]], tensors: Sequence[Tensor] = (), **arguments: Any
    ) -> list[Tensor]:
        """Make all ranks compute tensors, and return the sums of these tensors over all ranks.

        Rank 0 calls `local`, and the other ranks execute `command`.
        """
        remote = self._remote
        with remote.group.exclusive():
            remote.refresh()
            number = remote.request(command, tensors, adjoint=self._is_adjoint, **arguments)
            sums = local()
            remote.check(remote.group.replies(number))
            return remote.group.totals(sums)


def _distributed_operators(group: RankGroup, partials: Sequence[PartialSum]) -> tuple[DistributedLinearOperator, ...]:
    block_numbers: Iterator[int] = itertools.count(len(partials))
    dropped_blocks: list[int] = []
    served_operators = [
        ServedOperator(group, index, partial, block_numbers, dropped_blocks) for index, partial in enumerate(partials)
    ]
    return tuple(DistributedLinearOperator(RemoteOperator(served), served.partial) for served in served_operators)
