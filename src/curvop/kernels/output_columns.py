r"""Square roots of the Hessian of a loss with respect to a prediction, one column at a time.

The Hessian (or its estimate) is a sum :math:`M = \sum_c r_c r_c^\top` for each example. An example is one term of
the loss (see `curvop.kernels.losses`). `OutputColumns` yields the vectors :math:`r_c` of all examples at once, as a
cotangent of the prediction. For the losses of PyTorch, closed forms avoid the eigendecomposition of M, and need no
memory for all columns at once:

=========================  ===========================================================
``CrossEntropyLoss``       the columns of the Cholesky factor of M, without the last column, which is zero
losses of single entries   :math:`r_c = \sqrt{m_c} e_c`, where M is the diagonal matrix of m
any other loss             the columns of the symmetric square root of M
=========================  ===========================================================

Here :math:`e_c` is a unit vector. For cross entropy, :math:`M = s (\operatorname{diag}(p) - p p^\top)`, where p is the
softmax of the prediction and s is the weight of the example. With the tail sums :math:`t_c = p_c + p_{c + 1} + \dots`,
column c of the Cholesky factor is :math:`\sqrt{s p_c t_{c + 1} / t_c} \, (e_c - q_c)`, and :math:`q_c` contains
:math:`p_j / t_{c + 1}` for :math:`j > c`, and zeros. A prediction of C classes thus takes C - 1 backward passes.
"""

from __future__ import annotations

import abc
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from curvop.kernels.cross_entropy import SoftmaxHessian
from curvop.kernels.errors import NotFactorableError
from curvop.kernels.factor_kernel import square_root
from curvop.kernels.fisher_kernel import OuterProducts
from curvop.kernels.ggn_kernel import GGNKernel, GGNLikeKernel, Parts
from curvop.kernels.losses import Examples, is_elementwise
from curvop.kernels.objective import BatchLoss

__all__ = ["OutputColumns", "output_columns"]


class OutputColumns(abc.ABC):
    """The vectors r of all examples in a batch.

    Attributes
    ----------
    count : int
        Number of vectors for each example.
    terms : int
        Number of examples.
    """

    count: int
    terms: int

    def __init__(self, examples: Examples, outputs: Sequence[Tensor], used: Sequence[int]) -> None:
        self._examples, self._outputs, self._used = examples, outputs, list(used)
        self._shapes = [outputs[index].shape for index in self._used]
        self.terms, self._entries = examples.terms(self._shapes) if self._used else (0, 0)

    @abc.abstractmethod
    def _flat(self, column: int) -> Tensor:
        """Return vector number `column` of all examples, in the shape (terms, entries)."""

    def column(self, column: int, factors: Tensor | None = None) -> Parts:
        """Return vector number `column` of all examples, as a cotangent of the prediction.

        Parameters
        ----------
        column : int
        factors : Tensor, shape (terms,), optional
            The vector of each example is multiplied by its factor.
        """
        return self._restored(self._flat(column), factors)

    def mask(self, terms: slice) -> Tensor:
        """Return a tensor of bool, of shape (terms,), that is True for some of the examples."""
        chosen = torch.zeros(self.terms, dtype=torch.bool, device=self._outputs[0].device)
        chosen[terms] = True
        return chosen

    def probe(self, factors: Tensor | None = None) -> Parts:
        """Return a cotangent of the prediction whose entries are all nonzero. It is multiplied by factors, if given.

        If there is only one vector for each example, the cotangent is this vector.
        """
        if self.count == 1:
            return self.column(0, factors)
        like = self._outputs[self._used[0]]
        count = self.terms * self._entries
        numbers = 2 + torch.arange(count, dtype=torch.float64, device=like.device).cos()
        return self._restored(numbers.to(like.dtype).view(self.terms, self._entries), factors)

    def _restored(self, flat: Tensor, factors: Tensor | None) -> Parts:
        if factors is not None:
            flat = flat * factors.to(flat)[:, None]
        parts: list[Tensor | None] = [None] * len(self._outputs)
        for index, part in zip(self._used, self._examples.restore(flat, self._shapes), strict=True):
            parts[index] = part.to(self._outputs[index].dtype)
        return parts


class _GivenColumns(OutputColumns):
    def __init__(self, examples: Examples, outputs: Sequence[Tensor], given: OuterProducts) -> None:
        super().__init__(examples, outputs, given.used_outputs if given.tensors else ())
        self._given, self.count = given, len(given.tensors)

    def _flat(self, column: int) -> Tensor:
        return self._given.tensors[column] * self._given.scale


class _SoftmaxColumns(OutputColumns):
    def __init__(self, examples: Examples, outputs: Sequence[Tensor], hessian: SoftmaxHessian) -> None:
        super().__init__(examples, outputs, [0])
        self._p = hessian.p.reshape(self.terms, self._entries)
        self._weights = hessian.weights.reshape(self.terms, 1)
        if bool((self._weights < 0).any()):
            raise _indefinite(float(self._weights.min()))
        self.count = max(self._entries - 1, 0)
        self._tails = self._p.flip(1).cumsum(1).flip(1)

    def _flat(self, column: int) -> Tensor:
        p, [tail, rest] = self._p, self._tails[:, column : column + 2].unbind(1)
        flat = torch.zeros_like(p)
        # All these numbers are sums of probabilities. If they underflow, the column is zero.
        entry = torch.where(tail > 0, p[:, column] * (rest / tail), 0.0)
        flat[:, column] = (self._weights[:, 0] * entry).sqrt()
        flat[:, column + 1 :] = torch.where(rest > 0, -flat[:, column] / rest, 0.0)[:, None] * p[:, column + 1 :]
        return flat


class _DiagonalColumns(OutputColumns):
    def __init__(self, examples: Examples, outputs: Sequence[Tensor], diagonal: Tensor) -> None:
        super().__init__(examples, outputs, [0])
        flat = examples.flatten([diagonal], self._shapes)
        assert flat is not None
        if bool((flat < 0).any()):
            raise _indefinite(float(flat.min()))
        self._roots, self.count = flat.sqrt(), self._entries

    def _flat(self, column: int) -> Tensor:
        flat = torch.zeros_like(self._roots)
        flat[:, column] = self._roots[:, column]
        return flat


def output_columns(
    kernel: GGNLikeKernel, outputs: list[Tensor], extra: Mapping[str, Tensor], loss: BatchLoss
) -> OutputColumns:
    """Return the square root of the map `M` of a kernel for one batch.

    Parameters
    ----------
    kernel : GGNLikeKernel
    outputs : list of Tensor
        The floating-point tensors of the prediction, as leaves.
    extra : dict of str to Tensor
        The tensors that ``kernel.extra`` returns for this batch.
    loss : BatchLoss
        The loss as a function of `outputs`.

    Raises
    ------
    NotFactorableError
        If `M` is indefinite, or is not block-diagonal. If the loss function is not from ``torch.nn``, also if an
        example has more than 256 entries.
    """
    examples = Examples(kernel.objective.loss_function)
    exact = isinstance(kernel, GGNKernel)
    if exact and loss.weight and loss.closed_form is not None and loss.closed_form.second is not None:
        hessian = loss.closed_form.second(None)
        return _SoftmaxColumns(examples, outputs, hessian)
    output_hessian = kernel.output_hessian(outputs, extra, loss)
    kernel.check_curvature(output_hessian, outputs)
    if isinstance(output_hessian, OuterProducts):
        return _GivenColumns(examples, outputs, output_hessian)
    if is_elementwise(kernel.objective.loss_function) and len(outputs) == 1:
        [diagonal] = output_hessian([torch.ones_like(outputs[0])])
        diagonal = torch.zeros_like(outputs[0]) if diagonal is None else diagonal.detach()
        return _DiagonalColumns(examples, outputs, diagonal)
    return _GivenColumns(examples, outputs, square_root(output_hessian, examples, outputs, _REMEDY))


_REMEDY = "pass fisher='empirical', or use GGNLinearOperator"


def _indefinite(value: float) -> NotFactorableError:
    return NotFactorableError(
        f"the Hessian of the loss with respect to the prediction is indefinite (it has the eigenvalue {value:.3g}), so "
        f"the matrix has no Kronecker factors: {_REMEDY}"
    )
