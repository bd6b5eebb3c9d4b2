"""Track eigenvalues in the training loop of Hugging Face ``transformers``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from scipy.sparse.linalg import LinearOperator
from torch import nn
from transformers import Trainer, TrainerCallback

from curvop.callbacks.training_tracking import TrainingTracking, check_batch_norm

__all__ = ["TransformersTracking"]


class TransformersTracking(TrainingTracking, TrainerCallback):  # type: ignore[misc]
    """Track extreme eigenvalues while a ``transformers.Trainer`` trains, and log them to its loggers.

    Create the trainer first, and then add the callback:
    ``trainer.add_callback(TransformersTracking(trainer, ...))``. The callback calls ``trainer.log``, so TensorBoard,
    Weights & Biases and the other integrations of ``report_to`` receive the eigenvalues. They are also in
    ``trainer.state.log_history``, and ``tracker`` has them all.

    Parameters
    ----------
    trainer : transformers.Trainer
        The trainer that logs the eigenvalues.
    operator : LinearOperator or function
        A curvature operator of the model, or a function ``model -> operator``. The function is called at the start of
        each training, when the model is on its device. The operator has its own data: the loss of one training batch is
        not tracked.
    mode : {'eval', 'train'}
        The mode of the model when its products are computed. 'eval' turns dropout off, and lets batch normalization use
        its running statistics. 'train' is the mode of the training steps. A loss with dropout is then random, so the
        operator raises an error. Afterwards, each module has its mode back.
    every : int, optional
        The number of optimizer steps from one computation to the next. Several batches are one step if gradients are
        accumulated. The eigenvalues of step n belong to the parameters after n optimizer steps. Step 0 is the start.
    k : int, optional
        The number of eigenvalues.
    which : {'LA', 'SA', 'LM'}, optional
        Which eigenvalues to track, as for `curvop.spectrum.track`.
    tol : float, optional
        The relative accuracy of the eigenvalues.
    preconditioned : bool, optional
        Whether to track the matrix that is preconditioned by the trainer's optimizer, together with the stability
        threshold of this optimizer (see `curvop.spectrum.track`).
    prefix : str, optional
        The start of the logged names: ``"curvop/largest_1"``, ``"curvop/largest_2"`` and ``"curvop/threshold"``. For
        'SA' and 'LM', the eigenvalues are called ``smallest_1`` and ``largest_magnitude_1``. Use different prefixes if
        you add several callbacks. TensorBoard and Weights & Biases show the names with ``train/`` in front.

    Attributes
    ----------
    tracker : Tracker or None
        The record of the current or latest training. None before the first training, and in all processes but the first
        one.

    Raises
    ------
    ValueError, TypeError
        If an argument is invalid. At the start of training: if the operator has parameters that the trainer does not
        train, or if FSDP or DeepSpeed divides the parameters among processes.

    See Also
    --------
    LightningTracking : The same for Lightning.
    curvop.spectrum.track : Track eigenvalues in your own loop.
    curvop.huggingface : Predictions and losses of Hugging Face models.

    Notes
    -----
    Training is the same with and without the callback, which does not change parameters, gradients, buffers and random
    states. Between computations, the operator keeps no linearized batches in memory. Eigenvalues that did not converge,
    or that are not known yet, are NaN in ``tracker`` and are not logged. If a product is not finite, because training
    has diverged, a ``RuntimeWarning`` names the place, the eigenvalues are NaN, and training goes on.

    The products are computed in the precision of the parameters, even if the trainer uses mixed precision
    (``bf16=True`` or ``fp16=True``).

    A training that resumes from a checkpoint continues the step numbers, and the record with the eigenvalues that are
    in ``trainer.state.log_history``.

    If several processes train copies of the model, the first process computes the eigenvalues. The others wait for it
    in the next training step.

    By default, ``TrainingArguments`` clips gradients (``max_grad_norm=1.0``) and lowers the learning rate. A stability
    threshold does not account for clipped gradients.

    Examples
    --------
    Track the sharpness of a small classifier:

    >>> import tempfile
    >>> import torch
    >>> from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainingArguments
    >>> import curvop
    >>> from curvop.callbacks import TransformersTracking
    >>> _ = torch.manual_seed(0)
    >>> size = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    >>> model = BertForSequenceClassification(BertConfig(vocab_size=20, **size))
    >>> tokens, labels = torch.randint(0, 20, (16, 4)), torch.randint(0, 2, (16,))
    >>> examples = [{"input_ids": x, "labels": y} for x, y in zip(tokens, labels)]
    >>> def hessian(model):
    ...     functions = curvop.huggingface.sequence_classification(model)
    ...     data = [{"input_ids": tokens, "labels": labels}]
    ...     params = curvop.select(model, "classifier.*")
    ...     return curvop.HessianLinearOperator.from_functions(**functions, params=params, data=data)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     options = {"report_to": "none", "disable_tqdm": True, "use_cpu": True, "save_strategy": "no"}
    ...     args = TrainingArguments(folder, max_steps=6, logging_strategy="no", **options)
    ...     trainer = Trainer(model, args, train_dataset=examples)
    ...     callback = TransformersTracking(trainer, hessian, mode="eval", every=3)
    ...     trainer.add_callback(callback)
    ...     _ = trainer.train()  # doctest: +ELLIPSIS
    {'curvop/largest_1': ...
    >>> callback.tracker.steps
    array([0, 3, 6])
    """

    def __init__(
        self,
        trainer: Trainer,
        operator: LinearOperator | Callable[[nn.Module], LinearOperator],
        *,
        mode: str,
        every: int = 100,
        k: int = 1,
        which: str = "LA",
        tol: float = 1e-3,
        preconditioned: bool = False,
        prefix: str = "curvop",
    ) -> None:
        if not isinstance(trainer, Trainer):
            raise TypeError(f"trainer is a {type(trainer).__name__}, but must be a transformers.Trainer")
        settings: dict[str, Any] = {"k": k, "which": which, "tol": tol, "preconditioned": preconditioned}
        super().__init__(operator, mode=mode, every=every, prefix=prefix, **settings)
        self._trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any, optimizer: Any, **kwargs: Any) -> None:
        """Create the tracker. At the start of a new training, compute the eigenvalues of step 0."""
        if self._trainer.is_fsdp_enabled or self._trainer.is_deepspeed_enabled:
            raise ValueError(
                "the trainer uses FSDP or DeepSpeed, which divide the parameters or the optimizer among processes: "
                "track eigenvalues in a training that keeps a copy of the model in each process"
            )
        if args.world_size > 1:
            check_batch_norm(model, self.mode)
        others = [one for one in self._trainer.callback_handler.callbacks if isinstance(one, TransformersTracking)]
        if sum(one.prefix == self.prefix for one in others) > 1:
            raise ValueError(
                f"two callbacks have the prefix {self.prefix!r}, so their values would have the same names: use "
                "different prefixes"
            )
        if state.is_world_process_zero:
            self._begin(model, [optimizer], state.global_step, state.log_history)
            self._track(state, control, model)

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any, **kwargs: Any) -> None:
        """Compute and log the eigenvalues if the number of optimizer steps is a multiple of `every`."""
        self._track(state, control, model)

    def _track(self, state: Any, control: Any, model: nn.Module) -> None:
        if values := self._compute(model, state.global_step):
            should_log = control.should_log
            self._trainer.log(values)
            control.should_log = should_log  # `log` resets it, and the trainer would not log its own loss in this step
