"""Track eigenvalues in the training loop of Lightning."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from curvop.callbacks.training_tracking import Row, TrainingTracking, check_batch_norm

try:
    from lightning.pytorch import Callback
except ModuleNotFoundError:  # the other name of the package. From version 2.6, both accept callbacks of either.
    from pytorch_lightning import Callback

__all__ = ["LightningTracking"]

#: The names of the strategies that keep a copy of the module in each process.
_STRATEGIES = {"SingleDeviceStrategy", "DDPStrategy"}


class LightningTracking(TrainingTracking, Callback):  # type: ignore[misc]
    """Track extreme eigenvalues while a Lightning ``Trainer`` trains, and log them to its loggers.

    Pass the callback to the trainer of ``lightning.pytorch`` or ``pytorch_lightning``:
    ``Trainer(callbacks=[LightningTracking(...)])``. All loggers of the trainer (TensorBoard, Weights & Biases, CSV and
    others) receive the eigenvalues, and ``tracker`` has them all.

    Parameters
    ----------
    operator : LinearOperator or function
        A curvature operator of the model, or a function ``module -> operator`` of the ``LightningModule``. The function
        is called at the start of each training, when the module is on its device. The operator has its own data: the
        loss of one training batch is not tracked.
    mode : {'eval', 'train'}
        The mode of the module when its products are computed. 'eval' turns dropout off, and lets batch normalization
        use its running statistics. 'train' leaves all submodules in their modes of the training steps. A loss with
        dropout is then random, so the operator raises an error. Afterwards, each submodule has its mode back.
    every : int, optional
        The number of optimizer steps (``trainer.global_step``) from one computation to the next. Several batches are
        one step if gradients are accumulated. The eigenvalues of step n belong to the parameters after n optimizer
        steps. Step 0 is the start.
    k : int, optional
        The number of eigenvalues.
    which : {'LA', 'SA', 'LM'}, optional
        Which eigenvalues to track, as for `curvop.spectrum.track`.
    tol : float, optional
        The relative accuracy of the eigenvalues.
    preconditioned : bool, optional
        Whether to track the matrix that is preconditioned by the optimizer that trains the parameters of the operator,
        together with the stability threshold of this optimizer (see `curvop.spectrum.track`).
    prefix : str, optional
        The start of the logged names: ``"curvop/largest_1"``, ``"curvop/largest_2"`` and ``"curvop/threshold"``. For
        'SA' and 'LM', the eigenvalues are called ``smallest_1`` and ``largest_magnitude_1``. Use different prefixes if
        you add several callbacks.

    Attributes
    ----------
    tracker : Tracker or None
        The record of the current or latest training. None before the first training, and in all processes but the first
        one.

    Raises
    ------
    ValueError, TypeError
        If an argument is invalid. At the start of training: if the operator has parameters that are not those of the
        module, or if the strategy of the trainer is not that of a single device or DDP.

    See Also
    --------
    TransformersTracking : The same for Hugging Face.
    curvop.spectrum.track : Track eigenvalues in your own loop.

    Notes
    -----
    Training is the same with and without the callback, which does not change parameters, gradients, buffers and random
    states. Between computations, the operator keeps no linearized batches in memory. Eigenvalues that did not converge,
    or that are not known yet, are NaN in ``tracker`` and are not logged. If a product is not finite, because training
    has diverged, a ``RuntimeWarning`` names the place, the eigenvalues are NaN, and training goes on.

    The products are computed in the precision of the parameters, even if the trainer uses mixed precision
    (``precision="bf16-mixed"``).

    The values are logged in the step in which they are computed, whatever the trainer's setting ``log_every_n_steps``.
    A module with several optimizers takes several steps for each batch. The eigenvalues are then computed in the first
    step that reaches or passes a multiple of `every`.

    Each checkpoint contains the record. A training that resumes from a checkpoint continues it.

    If several processes train copies of the model, the first process computes the eigenvalues. The others wait for it
    in the next training step.

    Examples
    --------
    Track the two largest eigenvalues of the Hessian, and their threshold:

    >>> import torch
    >>> from lightning.pytorch import LightningModule, Trainer
    >>> from torch import nn
    >>> from curvop import HessianLinearOperator
    >>> from curvop.callbacks import LightningTracking
    >>> class Regression(LightningModule):
    ...     def __init__(self):
    ...         super().__init__()
    ...         self.net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))
    ...     def training_step(self, batch):
    ...         return nn.functional.mse_loss(self.net(batch[0]), batch[1])
    ...     def configure_optimizers(self):
    ...         return torch.optim.SGD(self.parameters(), lr=0.1)
    >>> X, y = torch.randn(16, 4), torch.randn(16, 1)
    >>> def hessian(module):
    ...     return HessianLinearOperator(module.net, nn.MSELoss(), module.net.parameters(), [(X, y)])
    >>> callback = LightningTracking(hessian, mode="eval", every=5, k=2, preconditioned=True)
    >>> loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(X, y), batch_size=4)
    >>> trainer = Trainer(max_steps=10, callbacks=[callback])  # doctest: +SKIP
    >>> trainer.fit(Regression(), loader)  # doctest: +SKIP
    >>> callback.tracker.steps  # doctest: +SKIP
    array([ 0,  5, 10])
    """

    _loaded: Sequence[Row] = ()  # the record of a checkpoint, until training starts

    @property
    def state_key(self) -> str:
        """The name of the record in a checkpoint."""
        return f"{type(self).__name__}{{'prefix': {self.prefix!r}}}"

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Create the tracker. At the start of a new training, compute the eigenvalues of step 0."""
        names = [kind.__name__ for kind in type(trainer.strategy).__mro__]
        if _STRATEGIES.isdisjoint(names) or "DeepSpeedStrategy" in names:
            raise ValueError(
                f"the trainer has a {names[0]}, but eigenvalues are tracked only on a single device or "
                "with DDP, because other strategies may divide the parameters among processes: use strategy='ddp'"
            )
        if trainer.world_size > 1:
            check_batch_norm(pl_module, self.mode)
        rows, self._loaded = self._loaded or self._rows(), ()
        if trainer.is_global_zero:
            self._begin(pl_module, trainer.optimizers, trainer.global_step, rows)
            self._track(trainer, pl_module)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
        """Compute and log the eigenvalues if the number of optimizer steps is a multiple of `every`."""
        self._track(trainer, pl_module)

    def state_dict(self) -> dict[str, Any]:
        """Return the record for a checkpoint."""
        return {"rows": self._rows()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Read the record from a checkpoint."""
        self._loaded = state_dict["rows"]

    def _set_train_mode(self, model: nn.Module) -> None:
        """Keep the present modes. Lightning preserves them, for example those of frozen submodules."""

    def _track(self, trainer: Any, pl_module: Any) -> None:
        if values := self._compute(pl_module, trainer.global_step):
            for logger in trainer.loggers:
                logger.log_metrics(values, step=trainer.global_step)
                logger.save()
