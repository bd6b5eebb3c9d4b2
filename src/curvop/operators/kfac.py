"""Kronecker-factored approximations of GGN, Fisher and empirical Fisher matrices: KFAC, EKFAC and KFOC."""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any, ClassVar, Self, cast

import numpy as np
import torch
from torch import Tensor, nn

from curvop.kernels.factor_sums import FactorSums, sum_factors
from curvop.kernels.fisher_kernel import EmpiricalFisherKernel, SampledFisherKernel
from curvop.kernels.functions_objective import FunctionsObjective
from curvop.kernels.ggn_kernel import GGNKernel, GGNLikeKernel
from curvop.kernels.kronecker_factors import FlatLayout
from curvop.kernels.layer_factors import FactorSettings, LayerFactors
from curvop.kernels.layer_uses import NORM, OTHER, UNUSED
from curvop.kernels.losses import Likelihood
from curvop.kernels.model_objective import ModelObjective
from curvop.kernels.objective import BatchWeight
from curvop.kernels.user_warnings import warn_user
from curvop.operators.curvature_operator import GGNLikeLinearOperator
from curvop.operators.engine_operator import Settings
from curvop.operators.fisher import EFLinearOperator, FisherLinearOperator, GradientCovarianceLinearOperator
from curvop.operators.ggn import GGNLinearOperator
from curvop.operators.keywords import named_keywords
from curvop.operators.kronecker import KroneckerFactoredLinearOperator, checked_decay
from curvop.operators.kronecker_blocks import Block, EigenBlock, KroneckerBlock
from curvop.operators.validation import integer, random_generator

__all__ = ["EKFACLinearOperator", "KFACLinearOperator", "KFOCLinearOperator"]

_FISHERS = ("type-2", "mc", "empirical", "forward-only")
_OTHERS = ("exact", "diagonal", "raise")

Kernel = Callable[[Any, Sequence[str], Sequence[str]], GGNLikeKernel]


class KFACLinearOperator(KroneckerFactoredLinearOperator):
    r"""Kronecker-factored approximate curvature (KFAC), as a symmetric ``LinearOperator`` of shape ``(P, P)``.

    KFAC approximates `curvop.GGNLinearOperator`, `curvop.FisherLinearOperator` or `curvop.EFLinearOperator` by a
    block-diagonal matrix with one Kronecker product for each layer. Use it if you need inverses, square roots,
    determinants or all eigenvalues of a matrix that is too large to be formed: they have closed forms. The
    approximation error may be large: compare the matrix with the exact one.

    .. math::

        G_\ell \approx B_\ell \otimes A_\ell, \qquad A_\ell = \frac{1}{n} \sum_p a_p a_p^\top, \qquad
        B_\ell = \frac{1}{W} \sum_b w_b \sum_{p, c} g_{pc} g_{pc}^\top.

    Here :math:`a_p` are the inputs of layer :math:`\ell` at all n positions p (data items, tokens or pixels), and
    :math:`g_{pc}` are derivatives with respect to its outputs. W and :math:`w_b` are those of
    `curvop.GGNLinearOperator`, so that the matrix approximates the matrix of the whole data set, evaluated as one
    batch.

    Parameters
    ----------
    model : nn.Module or callable
        A module, called as ``model(X)``, or a function ``(params_dict, X) -> prediction``. Parameters have Kronecker
        factors if they are used in ``linear``, convolutions (with stride, padding, dilation and groups), ``embedding``,
        ``torch.nn.MultiheadAttention`` or matrix products. The operations are found while the model runs, so that
        functions, tied weights and weights that are used several times are supported.
    loss_function : nn.Module or callable
        Function ``(prediction, y) -> scalar``, as in `curvop.GGNLinearOperator`. The Hessian of the loss with respect
        to the prediction must be positive semidefinite, unless ``fisher`` is 'empirical'.
    params : dict of str to Tensor, or list of the model's own parameters
        Any subset of the model's parameters, either all float32 or all float64. The rows and columns of the matrix
        follow the order of the parameters.
    data : iterable of (X, y)
        A list, a ``DataLoader`` or any other iterable that can be read repeatedly.
    fisher : {'type-2', 'mc', 'empirical', 'forward-only'}, default 'type-2'
        'type-2' approximates the GGN, with one backward pass for each output of the model. 'mc' approximates the Fisher
        matrix with sampled targets, with one backward pass for each sample. 'empirical' approximates the empirical
        Fisher matrix, with one backward pass. 'forward-only' replaces the factors B by identity matrices, and needs no
        backward pass.
    mc_samples : int, default 1
        Number of targets drawn for each example if ``fisher`` is 'mc'.
    rng : int or numpy.random.Generator, optional
        Seed or generator of the random targets.
    sharing : {'expand', 'reduce'}, default 'expand'
        How layers that are applied at several positions of a data item are treated, such as convolutions and the layers
        of a transformer. 'expand' treats every position as a separate example. 'reduce' uses the mean of the inputs
        and the sum of the derivatives over the positions of an item. See Notes.
    joint_bias : bool, default True
        Whether the weight and the bias of a layer form one block. If False, they form two blocks. They also form two
        blocks if the model uses one of them without the other.
    others : {'exact', 'diagonal', 'raise'}, default 'exact'
        What to do with parameters that have no Kronecker factors, such as those of a layer whose outputs all data items
        share. 'exact' uses the exact block of each parameter, or its diagonal if the block has more than ``max_factor``
        rows. 'diagonal' uses the diagonal of the exact block. 'raise' raises an error. Unless it is 'raise', parameters
        of normalization layers get the diagonal. If batch normalization in training mode couples the data items, or if
        a data item has several terms of the loss and more than 256 outputs, the diagonals of normalization layers may
        be estimates. A warning then says so.
    max_factor : int, default 8192
        Largest number of rows of a factor or an exact block. Larger ones, such as the factors of the vocabulary of a
        language model, are replaced by their diagonals.
    dtype : numpy.float64 or numpy.float32, default numpy.float64
        Data type of the NumPy vectors that SciPy receives. Factors and products have the dtype of the parameters.
        Factors are decomposed in float64. Damped inverses and powers of float32 factors use decompositions in float32
        if these are accurate enough; see `curvop.operators.kronecker.KroneckerFactoredLinearOperator`.
    batch_weight : callable, optional
        Function ``batch -> w_b`` that returns the weight of a batch ``(X, y)``, as in `curvop.GGNLinearOperator`.
    progress : bool or tqdm, default False
        Whether to show a progress bar for passes over the data.

    Raises
    ------
    TypeError, ValueError
        If an argument is invalid, or if no parameter is used by a layer. Also if parameters have no Kronecker factors
        and ``others`` is 'raise'.
    NotFactorableError
        If the Hessian of the loss with respect to the prediction is indefinite.
    NotImplementedError
        If a parameter needs an exact diagonal that is not available, because ``torch.func.vmap`` cannot map the model
        over its data items. The message names the parameter and the remedies.
    MemoryError
        If the factors do not fit into memory.
    NonFiniteProductError
        If a factor contains NaN or infinity.
    NonDeterministicObjectiveError
        If the loss differs between two passes over the data, for example because of active dropout.

    Warns
    -----
    RuntimeWarning
        If parameters have no Kronecker factors. The message lists the parameters with an exact block and those with a
        diagonal. Also if the diagonals of normalization layers are estimates.

    See Also
    --------
    EKFACLinearOperator : A better approximation with the same eigenvectors, for about twice the cost.
    KFOCLinearOperator : The nearest Kronecker products, from more passes over the data.
    curvop.compare : Estimate the error of the approximation.
    curvop.GGNLinearOperator : The exact matrix.
    curvop.solve : Solve systems with the exact matrix.

    Notes
    -----
    The constructor computes the factors in one pass over the data, at the current parameters. If the parameters change
    later, the factors stay the same until `update` is called.

    The block of a layer is exact for a single data item if the layer is used at a single position. It is exact for any
    data in a linear network with a squared error. With ``sharing='expand'``, it is exact in a linear network if each
    position has its own term in a squared error. With ``sharing='reduce'``, it is exact in a linear network whose
    outputs are averaged over the positions [2]_.

    If a loss has several terms for each data item, such as the tokens of a text, the derivatives :math:`g_{pc}` are
    those of the sum of all terms. This is the definition of [2]_. If a weight is used several times, the positions of
    all uses are pooled. If it is also used as its own transpose, as in a language model with tied embeddings, the block
    is the Kronecker product that is nearest to the sum of both Kronecker products.

    References
    ----------
    .. [1] J. Martens, R. Grosse, "Optimizing neural networks with Kronecker-factored approximate curvature", 2015,
       arXiv:1503.05671.
    .. [2] R. Eschenhagen, A. Immer, R. Turner, F. Schneider, P. Hennig, "Kronecker-factored approximate curvature for
       modern neural network architectures", 2023, arXiv:2311.00636.

    Examples
    --------
    Compute a damped natural gradient step, and the error of the approximation:

    >>> import numpy as np
    >>> import torch
    >>> from torch import nn
    >>> from curvop import GGNLinearOperator, KFACLinearOperator
    >>> _ = torch.manual_seed(0)
    >>> X = torch.randn(60, 4, dtype=torch.float64)
    >>> y = (X[:, 0] * X[:, 1] > 0).long()
    >>> model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2)).double()
    >>> problem = model, nn.CrossEntropyLoss(), dict(model.named_parameters()), list(zip(X.split(25), y.split(25)))
    >>> G, K = GGNLinearOperator(*problem), KFACLinearOperator(*problem)
    >>> gradient, loss = G.gradient_and_loss()
    >>> step = -(K.inverse(damping=1e-2) @ gradient)
    >>> K.factors["0.weight"].input.shape  # four inputs and the bias
    torch.Size([5, 5])
    >>> exact = G.block_diagonal("layers").to_dense()
    >>> print(f"{np.linalg.norm(K.to_dense() - exact) / np.linalg.norm(exact):.2f}")
    0.12
    """

    _corrected: ClassVar[bool] = False
    _nearest: ClassVar[float | None] = None
    _updates = 0

    @named_keywords
    def __init__(
        self,
        model: nn.Module | Callable[[dict[str, Tensor], Any], Any],
        loss_function: Callable[[Any, Any], Tensor],
        params: Mapping[str, Tensor] | Iterable[Tensor],
        data: Iterable[Any],
        *,
        fisher: str = "type-2",
        mc_samples: int = 1,
        rng: int | np.random.Generator | None = None,
        sharing: str = "expand",
        joint_bias: bool = True,
        others: str = "exact",
        max_factor: int = 8192,
        dtype: Any = np.float64,
        batch_weight: BatchWeight | None = None,
        progress: Any = False,
    ) -> None:
        settings = self._settings_of(fisher, sharing, joint_bias, others, max_factor)
        objective = ModelObjective(model, loss_function, params, data, batch_weight)
        kernel = _kernel(objective, fisher, mc_samples, rng)
        self._set_up(objective, kernel, settings, others, Settings(dtype, "auto", "autograd", "auto", progress))

    @classmethod
    @named_keywords
    def from_functions(
        cls,
        predict: Callable[[dict[str, Tensor], Any], Any],
        loss: Callable[[Any, Any], Tensor],
        params: Mapping[str, Tensor],
        data: Iterable[Any],
        *,
        fisher: str = "type-2",
        mc_samples: int = 1,
        rng: int | np.random.Generator | None = None,
        sharing: str = "expand",
        joint_bias: bool = True,
        others: str = "exact",
        max_factor: int = 8192,
        dtype: Any = np.float64,
        batch_weight: BatchWeight | None = None,
        progress: Any = False,
    ) -> Self:
        """Construct the matrix from two functions: one computes a prediction, and the other computes its loss.

        Parameters
        ----------
        predict : callable
            Function ``(params_dict, batch) -> prediction``; see `curvop.GGNLinearOperator.from_functions`.
        loss : callable
            Function ``(prediction, batch) -> scalar``. If ``fisher`` is 'mc', it must be a `curvop.TargetLoss` with one
            of the losses that `curvop.FisherLinearOperator` accepts.
        params : dict of str to Tensor
            Parameters in the order of the rows and columns, either all float32 or all float64.
        data : iterable of batches
            A list, a ``DataLoader`` or any other iterable that can be read repeatedly.
        fisher, mc_samples, rng, sharing, joint_bias, others, max_factor, dtype, progress
            As in the constructor.
        batch_weight : callable, optional
            Function ``batch -> w_b`` that returns the weight of a batch.

        Returns
        -------
        operator
            Operator of shape ``(P, P)`` and of the class on which the method was called.

        Raises
        ------
        TypeError, ValueError, MemoryError, NonFiniteProductError, NonDeterministicObjectiveError
            Under the same conditions as in the constructor.
        """
        self = cls.__new__(cls)
        settings = self._settings_of(fisher, sharing, joint_bias, others, max_factor)
        objective = FunctionsObjective(predict, loss, params, data, batch_weight)
        kernel = _kernel(objective, fisher, mc_samples, rng)
        self._set_up(objective, kernel, settings, others, Settings(dtype, "auto", "autograd", "auto", progress))
        return self

    @classmethod
    def of(
        cls,
        A: GGNLikeLinearOperator,
        *,
        sharing: str = "expand",
        joint_bias: bool = True,
        others: str = "exact",
        max_factor: int = 8192,
    ) -> Self:
        """Construct the approximation of an existing operator, with the same model, data and targets.

        Parameters
        ----------
        A : LinearOperator, shape (N, N)
            A `curvop.GGNLinearOperator`, `curvop.FisherLinearOperator` or `curvop.EFLinearOperator`, or a diagonal
            block of one.
        sharing, joint_bias, others, max_factor
            As in the constructor.

        Returns
        -------
        operator
            Operator of the shape of A and of the class on which the method was called.

        Raises
        ------
        TypeError
            If A is not one of these operators.
        ValueError, MemoryError, NonFiniteProductError, NonDeterministicObjectiveError
            Under the same conditions as in the constructor. Also if A is a block off the diagonal.

        See Also
        --------
        exact : The operator for an existing approximation.
        """
        known = GGNLinearOperator, FisherLinearOperator, EFLinearOperator
        if not isinstance(A, known) or isinstance(A, GradientCovarianceLinearOperator):
            raise TypeError(
                f"A is a {type(A).__name__}: pass a GGNLinearOperator, FisherLinearOperator or EFLinearOperator, "
                "without damping"
            )
        if not A.has_diagonal_blocks:
            raise ValueError("A is a block off the diagonal: pass a diagonal block, A.block(names)")
        self = cls.__new__(cls)
        settings = self._settings_of("type-2", sharing, joint_bias, others, max_factor)
        self._set_up(
            cast("ModelObjective", A._objective), A._kernel, settings, others, A._settings, names=A._rows.names
        )
        return self

    @property
    def exact(self) -> GGNLikeLinearOperator:
        """The matrix that is approximated: an operator with the same model, data and targets.

        Its products are computed at the current parameters of the model, even if the factors belong to earlier
        parameters. With ``fisher='forward-only'``, it is the Gauss-Newton matrix.
        """
        return _exact_matrix(self._objective, self._kernel, self._settings, self._names)

    def update(self, batch: Any, decay: float = 0.95) -> None:
        """Include the factors of one batch, at the current parameters, in a moving average.

        Parameters
        ----------
        batch : pair
            A batch ``(X, y)``, as ``data`` yields it.
        decay : float, default 0.95
            Weight of the present factors, between 0 and 1. The factors of the batch have the weight ``1 - decay``. With
            0, the factors of the batch replace the present factors.

        Raises
        ------
        TypeError, ValueError
            If ``batch`` is not a pair, if ``decay`` is not a number between 0 and 1, or if the batch does not use the
            same layers as ``data``.

        See Also
        --------
        curvop.operators.kronecker.KroneckerFactoredLinearOperator.moving_average : Average two matrices.

        Notes
        -----
        The average is meant for losses that are means. If the loss is a sum, the factors from the constructor belong to
        the sum over ``data``, and those of a batch to the sum over this batch, which is smaller. In this case, pass one
        batch to the constructor, and update with batches of the same size.
        """
        is_pair = isinstance(batch, tuple | list) and len(batch) == 2
        if not is_pair and not isinstance(self._objective, FunctionsObjective):
            raise TypeError(f"batch is a {type(batch).__name__}, but must be a pair (X, y)")
        decay = checked_decay(decay)
        new, kernel = type(self).__new__(type(self)), self._kernel
        self._updates += 1
        if isinstance(kernel, functools.partial):  # draw other targets in each update
            kernel = functools.partial(kernel, seed=kernel.keywords["seed"] + self._updates)
        objective = self._objective.with_data([batch])
        new._set_up(objective, kernel, self._factor_settings, self._others, self._settings, self._names, warned=True)
        self.moving_average(new, decay)

    def _settings_of(self, fisher: Any, sharing: Any, joint_bias: Any, others: Any, max_factor: Any) -> FactorSettings:
        """Validate the settings of the factors."""
        for name, value, known in (
            ("fisher", fisher, _FISHERS),
            ("sharing", sharing, ("expand", "reduce")),
            ("others", others, _OTHERS),
        ):
            if value not in known:
                raise ValueError(f"{name} is {value!r}, but must be one of {', '.join(map(repr, known))}")
        if not isinstance(joint_bias, bool):
            raise TypeError(f"joint_bias is {joint_bias!r}, but must be True or False")
        forward_only = fisher == "forward-only"
        if forward_only and (self._corrected or self._nearest is not None):
            raise ValueError("fisher is 'forward-only', which computes no gradients: use KFACLinearOperator")
        max_factor = integer("max_factor", max_factor, 1)
        return FactorSettings(sharing, joint_bias, max_factor, forward_only, self._corrected, self._nearest)

    def _set_up(
        self,
        objective: ModelObjective,
        kernel: Kernel,
        factor_settings: FactorSettings,
        others: str,
        settings: Settings,
        names: Sequence[str] | None = None,
        warned: bool = False,
    ) -> None:
        """Compute the factors of the named parameters, which are all parameters by default.

        If `warned` is True, do not warn about parameters without factors.
        """
        self._objective, self._kernel, self._others = objective, kernel, others
        self._factor_settings, self._settings = factor_settings, settings
        names = list(objective.params if names is None else names)
        self._names = tuple(names)
        with torch.inference_mode(False):
            with settings.progress.counting(1) as tick:
                sums = sum_factors(kernel(objective, names, names), names, factor_settings, tick)
            if not sums.layers:
                raise ValueError(
                    "no parameter has Kronecker factors, because none is used by a layer (linear, a convolution, an "
                    "embedding or a matrix product) with separate outputs for each data item: use GGNLinearOperator, "
                    "or pass the weights of layers in params"
                )
            blocks = [*map(_block, sums.layers), *self._other_blocks(sums, warned)]
        params = {name: objective.params[name] for name in names}
        KroneckerFactoredLinearOperator.__init__(self, blocks, params, dtype=settings.dtype)

    def _other_blocks(self, sums: FactorSums, warned: bool) -> list[Block]:
        """Return the blocks of the parameters that have no Kronecker factors."""
        objective, limit = self._objective, self._factor_settings.max_factor
        reasons = sums.others
        used = [name for name in objective.params if name in sums.diagonals or reasons.get(name, UNUSED) != UNUSED]
        if used and self._others == "raise":
            raise ValueError(
                "parameters have no Kronecker factors, because other operations use them or data items share their "
                f"outputs: {_listed(used)}; leave them out of params, or pass others='exact' or 'diagonal'"
            )
        found = sums.diagonals | self._exact_diagonals(sums.inexact, warned)
        exact = [
            name
            for name in used
            if name not in found
            and reasons[name] == OTHER
            and self._others == "exact"
            and objective.params[name].numel() <= limit
        ]
        diagonal = [name for name in used if name not in exact and name not in found]
        if not warned:
            self._warn(exact, [name for name in diagonal if reasons[name] != NORM])
        blocks: list[Block] = [self._flat_block(name, values) for name, values in found.items()]
        matrix = self.exact
        blocks += [self._flat_block(name, torch.from_numpy(matrix.block(name).to_dense())) for name in exact]
        if diagonal:
            try:
                parts = self._diagonals(diagonal)
            except NotImplementedError as error:
                remedy = "pass others='exact', " if self._others == "diagonal" else ""
                raise NotImplementedError(
                    f"the diagonal of {_listed(diagonal)} is not available, because {_reason(error)}: {remedy}leave "
                    "these parameters out of params, or call model.eval() if the model has batch normalization"
                ) from error
            blocks += [self._flat_block(name, part) for name, part in parts.items()]
        unused = [name for name in objective.params if reasons.get(name) == UNUSED]
        blocks += [self._flat_block(name, torch.zeros(objective.params[name].numel())) for name in unused]
        return blocks

    def _exact_diagonals(self, names: Collection[str], warned: bool) -> dict[str, Tensor]:
        """Return the exact diagonals of parameters, or an empty dict if they are not available."""
        ordered = [name for name in self._objective.params if name in names]
        try:
            return self._diagonals(ordered) if ordered else {}
        except NotImplementedError as error:
            if not warned:
                warn_user(
                    f"the diagonals of {_listed(ordered)} are estimates, because {_reason(error)}: leave these "
                    "parameters out of params, or call model.eval() if the model has batch normalization"
                )
            return {}

    def _diagonals(self, names: Sequence[str]) -> dict[str, Tensor]:
        """Return the exact diagonals of parameters. Raise a NotImplementedError if they are not available."""
        values = self.exact.block(names)._diagonal().clamp(min=0)
        parts = values.split([self._objective.params[name].numel() for name in names])
        return dict(zip(names, parts, strict=True))

    def _flat_block(self, name: str, values: Tensor) -> KroneckerBlock:
        """Return the block of a parameter whose matrix, or its diagonal, is known."""
        parameter = self._objective.params[name]
        values = values.to(parameter.device, parameter.dtype)[None]
        layout = FlatLayout((name,), (parameter.shape,))
        return KroneckerBlock(layout, values, values.new_ones(1, 1))

    @staticmethod
    def _warn(exact: Sequence[str], diagonal: Sequence[str]) -> None:
        parts = [f"exact blocks: {_listed(exact)}"] * bool(exact)
        parts += [f"exact diagonals: {_listed(diagonal)}"] * bool(diagonal)
        if parts:
            warn_user(
                "some parameters have no Kronecker factors, because other operations use them or data items share "
                f"their outputs ({'; '.join(parts)})"
            )


class EKFACLinearOperator(KFACLinearOperator):
    r"""Eigenvalue-corrected KFAC (EKFAC), as a symmetric ``LinearOperator`` of shape ``(P, P)``.

    EKFAC has the eigenvectors of KFAC and better eigenvalues. Its Frobenius error is at most that of
    `KFACLinearOperator`, and its trace is that of the exact matrix. Use it if you can afford a second pass over the
    data.

    .. math::

        G_\ell \approx (Q_B \otimes Q_A) \, \Lambda \, (Q_B \otimes Q_A)^\top, \qquad
        \Lambda = \operatorname{diag}\left( (Q_B \otimes Q_A)^\top G_\ell \, (Q_B \otimes Q_A) \right),

    where :math:`Q_A` and :math:`Q_B` are the eigenvectors of the factors of KFAC.

    Parameters
    ----------
    model : nn.Module or callable
        A module, called as ``model(X)``, or a function ``(params_dict, X) -> prediction``; see `KFACLinearOperator`.
    loss_function : nn.Module or callable
        Function ``(prediction, y) -> scalar``, as in `curvop.GGNLinearOperator`.
    params : dict of str to Tensor, or list of the model's own parameters
        Any subset of the model's parameters, either all float32 or all float64.
    data : iterable of (X, y)
        A list, a ``DataLoader`` or any other iterable that yields the same batches in each pass.
    fisher : {'type-2', 'mc', 'empirical'}, default 'type-2'
        The matrix that is approximated; see `KFACLinearOperator`. If it is 'mc', both passes use the same targets.
    mc_samples : int, default 1
        Number of targets drawn for each example if ``fisher`` is 'mc'.
    rng : int or numpy.random.Generator, optional
        Seed or generator of the random targets.
    sharing : {'expand', 'reduce'}, default 'expand'
        How the factors treat layers that are applied at several positions. The eigenvalues are exact in both cases.
    joint_bias : bool, default True
        Whether the weight and the bias of a layer form one block.
    others : {'exact', 'diagonal', 'raise'}, default 'exact'
        What to do with parameters that have no Kronecker factors; see `KFACLinearOperator`. The diagonals of
        normalization layers are exact.
    max_factor : int, default 8192
        Factors with more rows are replaced by their diagonals, whose eigenvectors are unit vectors.
    dtype : numpy.float64 or numpy.float32, default numpy.float64
        Data type of the NumPy vectors that SciPy receives.
    batch_weight : callable, optional
        Function ``batch -> w_b`` that returns the weight of a batch ``(X, y)``, as in `curvop.GGNLinearOperator`.
    progress : bool or tqdm, default False
        Whether to show a progress bar for passes over the data.

    Raises
    ------
    TypeError, ValueError, MemoryError, NonFiniteProductError, NonDeterministicObjectiveError
        Under the same conditions as in `KFACLinearOperator`. A ValueError is also raised if the model couples the data
        items of a batch, as batch normalization in training mode does.

    Warns
    -----
    RuntimeWarning
        If parameters have no Kronecker factors.

    See Also
    --------
    KFACLinearOperator : The approximation without corrected eigenvalues.
    KFOCLinearOperator : The nearest Kronecker products.

    Notes
    -----
    The constructor takes two passes over the data. The second pass computes the gradient of each example of the loss in
    the basis of the eigenvectors, one layer after the other. If an example of the loss depends on several positions of
    a data item, as in a language model, the second pass takes one backward pass for each example of a data item and
    each output (or sample).

    References
    ----------
    .. [1] T. George, C. Laurent, X. Bouthillier, N. Ballas, P. Vincent, "Fast approximate natural gradient descent in a
       Kronecker-factored eigenbasis", 2018, arXiv:1806.03884.

    Examples
    --------
    >>> import numpy as np
    >>> import torch
    >>> from torch import nn
    >>> from curvop import EKFACLinearOperator, GGNLinearOperator
    >>> _ = torch.manual_seed(0)
    >>> model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2)).double()
    >>> data = [(torch.randn(60, 4).double(), torch.randint(0, 2, (60,)))]
    >>> problem = model, nn.CrossEntropyLoss(), dict(model.named_parameters()), data
    >>> E, G = EKFACLinearOperator(*problem), GGNLinearOperator(*problem)
    >>> bool(np.isclose(E.trace(), G.diagonal().sum()))
    True
    """

    _corrected: ClassVar[bool] = True


class KFOCLinearOperator(KFACLinearOperator):
    r"""Kronecker-factored optimal curvature (KFOC), as a symmetric ``LinearOperator`` of shape ``(P, P)``.

    Each block is the Kronecker product that is nearest to the exact block in the Frobenius norm. Use it if the error
    of `KFACLinearOperator` is too large and a Kronecker product is needed, for example for factored inverses. It takes
    more passes over the data. `EKFACLinearOperator` is cheaper, and may be closer or less close to the exact block.

    .. math::

        B_\ell, A_\ell = \operatorname*{arg\,min}_{B, A} \| G_\ell - B \otimes A \|_F.

    Parameters
    ----------
    model : nn.Module or callable
        A module, called as ``model(X)``, or a function ``(params_dict, X) -> prediction``; see `KFACLinearOperator`.
    loss_function : nn.Module or callable
        Function ``(prediction, y) -> scalar``, as in `curvop.GGNLinearOperator`.
    params : dict of str to Tensor, or list of the model's own parameters
        Any subset of the model's parameters, either all float32 or all float64.
    data : iterable of (X, y)
        A list, a ``DataLoader`` or any other iterable that yields the same batches in each pass.
    fisher : {'type-2', 'mc', 'empirical'}, default 'type-2'
        The matrix that is approximated; see `KFACLinearOperator`. If it is 'mc', all passes use the same targets.
    mc_samples, rng, joint_bias, others, max_factor, dtype, batch_weight, progress
        As in `KFACLinearOperator`. If a factor is a diagonal, the product is the nearest one with such a factor.
    sharing : {'expand', 'reduce'}, default 'expand'
        The factors of KFAC with which the iteration starts. The result is the same, except that embeddings have a
        diagonal input factor with 'expand'.

    Raises
    ------
    TypeError, ValueError, MemoryError, NonFiniteProductError, NonDeterministicObjectiveError
        Under the same conditions as in `EKFACLinearOperator`.

    Warns
    -----
    RuntimeWarning
        If parameters have no Kronecker factors.

    See Also
    --------
    KFACLinearOperator : An approximation from a single pass over the data.
    EKFACLinearOperator : The best approximation with the eigenvectors of KFAC, from two passes.

    Notes
    -----
    The power method computes the largest singular value of the rearranged block [1]_ [2]_, starting from KFAC. The
    block is not formed. A step takes two passes over the data, of which each computes the gradient of each example, as
    the second pass of EKFAC does. The iteration stops when no factor changes by more than 1e-4 of its norm, or after
    50 steps. An error of 1e-4 in the factors changes the Frobenius error of the approximation by about 1e-8.

    References
    ----------
    .. [1] C. F. Van Loan, N. Pitsianis, "Approximation with Kronecker products", 1993,
       doi:10.1007/978-94-015-8196-7_17.
    .. [2] D. Schnaus, J. Lee, R. Triebel, "Kronecker-factored optimal curvature", NeurIPS Workshop on Bayesian Deep
       Learning, 2021.

    Examples
    --------
    >>> import numpy as np
    >>> import torch
    >>> from torch import nn
    >>> from curvop import GGNLinearOperator, KFACLinearOperator, KFOCLinearOperator
    >>> _ = torch.manual_seed(0)
    >>> model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2)).double()
    >>> data = [(torch.randn(60, 4).double(), torch.randint(0, 2, (60,)))]
    >>> problem = model, nn.CrossEntropyLoss(), dict(model.named_parameters()), data
    >>> exact = GGNLinearOperator(*problem).block_diagonal("layers").to_dense()
    >>> for approximation in (KFACLinearOperator(*problem), KFOCLinearOperator(*problem)):
    ...     print(f"{np.linalg.norm(approximation.to_dense() - exact) / np.linalg.norm(exact):.3f}")
    0.120
    0.065
    """

    _nearest: ClassVar[float | None] = 1e-4


def _exact_matrix(
    objective: ModelObjective, kernel: Kernel, settings: Settings, names: Sequence[str]
) -> GGNLikeLinearOperator:
    """Return the operator of a kernel."""
    classes: dict[Any, type[GGNLikeLinearOperator]] = {
        GGNKernel: GGNLinearOperator,
        EmpiricalFisherKernel: EFLinearOperator,
    }
    operator = classes.get(kernel, FisherLinearOperator)
    matrix = operator.__new__(operator)
    matrix._kernel = kernel
    matrix._setup(objective, settings, names, names)
    return matrix


def _kernel(objective: ModelObjective, fisher: str, mc_samples: Any, rng: Any) -> Kernel:
    """Return the kernel of the matrix that is approximated."""
    mc_samples = integer("mc_samples", mc_samples, 1)
    if fisher == "mc":
        Likelihood(objective.loss_function, objective.loss_name)
        seed = int(random_generator(rng).integers(2**63))
        return functools.partial(SampledFisherKernel, samples=mc_samples, seed=seed)
    return EmpiricalFisherKernel if fisher == "empirical" else GGNKernel


def _block(factors: LayerFactors) -> Block:
    block = KroneckerBlock(factors.layout, factors.output, factors.input)
    if factors.eigenvalues is None:
        return block
    vectors = factors.output_vectors, factors.input_vectors
    return EigenBlock(factors.layout, *vectors, factors.eigenvalues, block, factors.output.dtype)


def _listed(names: Sequence[str]) -> str:
    shown = ", ".join(map(repr, names[:5]))
    return f"{shown} and {len(names) - 5} more" if len(names) > 5 else shown


def _reason(error: NotImplementedError) -> str:
    """Return why the exact diagonal is not available, without the details."""
    return str(error).partition(" because ")[2].partition(":")[0]
