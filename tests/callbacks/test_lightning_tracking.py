"""Real trainings by ``lightning.pytorch.Trainer``. The references are dense Hessians at the parameters of each step."""

from __future__ import annotations

import copy
import csv
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import pytorch_lightning
import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.strategies import FSDPStrategy
from scipy.sparse.linalg import LinearOperator
from torch import Tensor, nn
from torch.nn.functional import mse_loss
from torch.utils.data import DataLoader, TensorDataset

import curvop
from curvop import HessianLinearOperator, functorch_hessian
from curvop.callbacks import LightningTracking

pytestmark = [  # warnings of Lightning itself
    pytest.mark.filterwarnings("ignore:.*isinstance.treespec, LeafSpec.. is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:.*GPU available but not used"),
    pytest.mark.filterwarnings("ignore:The number of training batches"),
    pytest.mark.filterwarnings("ignore:Found 1 module.* in eval mode at the start of training"),
]


def inputs_and_targets() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(12, 3, generator=generator), torch.randn(12, 1, generator=generator)


class Regression(LightningModule):
    """A network with batch normalization, a frozen submodule and, if p > 0, dropout."""

    def __init__(self, p: float = 0.2, optimizer: str = "SGD", **options: Any) -> None:
        super().__init__()
        torch.manual_seed(2)
        layers = [nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Dropout(p), nn.Linear(4, 1)]
        self.net = nn.Sequential(*layers)
        self.frozen = nn.Dropout(0.5).eval()  # as users put frozen submodules into evaluation mode
        self.optimizer = getattr(torch.optim, optimizer)
        self.options = {"lr": 0.05} | options

    def forward(self, x: Tensor) -> Tensor:
        return self.net(self.frozen(x))

    def training_step(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        loss = mse_loss(self(batch[0]), batch[1])
        self.log("loss", loss)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return self.optimizer(self.parameters(), **self.options)


class Plain(pytorch_lightning.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(3, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        return mse_loss(self(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class WithTwoOptimizers(Regression):
    """Each batch takes a step of both optimizers."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: tuple[Tensor, Tensor]) -> None:
        for optimizer in self.optimizers():
            optimizer.zero_grad()
            self.manual_backward(mse_loss(self(batch[0]), batch[1]))
            optimizer.step()

    def configure_optimizers(self) -> list[torch.optim.Optimizer]:
        return [torch.optim.SGD(self.net[:2].parameters(), lr=0.1), torch.optim.SGD(self.net[2:].parameters(), lr=0.01)]


def operator(module: Regression) -> HessianLinearOperator:
    data = DataLoader(TensorDataset(*inputs_and_targets()), batch_size=12)  # draws a random number in each pass
    return HessianLinearOperator(module, nn.MSELoss(), module.net.parameters(), data)


def dense(module: Regression, training: bool = False) -> np.ndarray:
    """Return the Hessian of the loss of all examples, by torch.func in float64."""
    net = copy.deepcopy(module.net).double().train(training)
    net[3].eval()
    if training:
        net[1].running_mean = net[1].running_var = None  # statistics of the batch
    data = [tuple(tensor.double() for tensor in inputs_and_targets())]
    return functorch_hessian(net, nn.MSELoss(), dict(net.named_parameters()), data)


class Observer(Callback):
    """Keeps copies of the module after each optimizer step, and what another callback may have changed."""

    def __init__(self) -> None:
        self.modules: dict[int, nn.Module] = {}
        self.seen: list[Any] = []

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        self.on_train_batch_end(trainer, pl_module)

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, *args: Any) -> None:
        if trainer.global_step not in self.modules:
            plain = Regression()
            plain.load_state_dict(pl_module.state_dict())
            self.modules[trainer.global_step] = plain
        modes = [module.training for module in pl_module.modules()]
        gradients = [p.grad if p.grad is None else p.grad.tolist() for p in pl_module.parameters()]
        self.seen.append((trainer.global_step, modes, gradients, torch.get_rng_state().tolist()))


def trained(
    folder: Path, *settings: dict[str, Any], module: LightningModule | None = None, ckpt_path: Any = None, **arguments
) -> tuple[Trainer, list[LightningTracking], Observer]:
    """Train with one callback for each dict of settings."""
    seed_everything(0, verbose=False)
    module = Regression() if module is None else module
    callbacks = [LightningTracking(**{"operator": operator} | options) for options in settings]
    observer = Observer()
    quiet = dict(enable_progress_bar=False, enable_model_summary=False, accelerator="cpu", devices=1)
    plain = dict(max_steps=6, accumulate_grad_batches=2, logger=False, enable_checkpointing=False)
    plain |= dict(default_root_dir=folder, callbacks=[*callbacks, observer, *arguments.pop("callbacks", [])])
    trainer = Trainer(**quiet | plain | arguments)
    loader = DataLoader(TensorDataset(*inputs_and_targets()), batch_size=3, shuffle=True)
    trainer.fit(module, loader, ckpt_path=ckpt_path)
    return trainer, callbacks, observer


def rows_of(path: Path, name: str) -> dict[int, float]:
    """Return the values of a column of a CSV file by step."""
    with path.open() as file:
        return {int(row["step"]): float(row[name]) for row in csv.DictReader(file) if row.get(name)}


def test_the_csv_file_contains_the_eigenvalues_of_the_dense_hessian(tmp_path) -> None:
    logger = CSVLogger(tmp_path, name="", version="")
    options = [
        dict(mode="eval", every=3, k=2, tol=1e-6),
        dict(mode="eval", every=2, which="SA", tol=1e-6, prefix="other"),
    ]
    _, (largest, smallest), observer = trained(tmp_path, *options, logger=logger, log_every_n_steps=1)
    assert largest.tracker.steps.tolist() == [0, 3, 6]  # optimizer steps of two batches each
    assert smallest.tracker.steps.tolist() == [0, 2, 4, 6]
    expected = {step: np.linalg.eigvalsh(dense(module)) for step, module in observer.modules.items()}
    for name, index in {"curvop/largest_1": -1, "curvop/largest_2": -2, "other/smallest_1": 0}.items():
        values = rows_of(tmp_path / "metrics.csv", name)
        assert list(values) == (smallest if index == 0 else largest).tracker.steps.tolist()
        for step, value in values.items():
            assert value == pytest.approx(expected[step][index], rel=1e-4, abs=1e-5)
    assert list(rows_of(tmp_path / "metrics.csv", "loss")) == [0, 1, 2, 3, 4, 5]


def test_tensorboard_receives_the_values(tmp_path) -> None:
    event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    _, (callback,), _ = trained(
        tmp_path, dict(mode="eval", every=3), logger=TensorBoardLogger(tmp_path, name="", version="")
    )
    events = event_accumulator.EventAccumulator(str(tmp_path)).Reload().Scalars("curvop/largest_1")
    assert [event.step for event in events] == [0, 3, 6]
    np.testing.assert_allclose([event.value for event in events], callback.tracker.largest, rtol=1e-6)


def test_training_is_bitwise_the_same_with_the_callback(tmp_path) -> None:
    """Parameters, running statistics, gradients between batches, modes of submodules, and random states."""
    settings = [dict(mode="eval", every=1), dict(mode="train", every=1, prefix="train")]
    for p, callbacks in ((0.2, settings[:1]), (0.0, settings)):
        plain, _, seen = trained(tmp_path, module=Regression(p))
        tracked, both, seen_with = trained(tmp_path, *callbacks, module=Regression(p))
        assert all(len(callback.tracker.steps) == 7 for callback in both)
        assert seen.seen == seen_with.seen
        for name, tensor in plain.lightning_module.state_dict().items():
            assert torch.equal(tensor, tracked.lightning_module.state_dict()[name]), name


def test_the_mode_is_that_of_the_argument(tmp_path) -> None:
    settings = [dict(mode=mode, every=6, tol=1e-6, prefix=mode) for mode in ("eval", "train")]
    _, callbacks, observer = trained(tmp_path, *settings, module=Regression(p=0.0))
    for callback, training in zip(callbacks, (False, True), strict=True):
        expected = [np.linalg.eigvalsh(dense(observer.modules[step], training))[-1] for step in (0, 6)]
        np.testing.assert_allclose(callback.tracker.largest, expected, rtol=1e-4)
    evaluated, trained_values = (callback.tracker.largest for callback in callbacks)
    assert not np.allclose(evaluated, trained_values, rtol=0.01)  # batch normalization differs
    with pytest.raises(curvop.NonDeterministicObjectiveError):
        trained(tmp_path, dict(mode="train", every=1), module=Regression(p=0.2))


def test_mixed_precision_does_not_round_the_eigenvalues(tmp_path) -> None:
    _, (callback,), observer = trained(tmp_path, dict(mode="eval", every=6, tol=1e-6), precision="bf16-mixed")
    expected = [np.linalg.eigvalsh(dense(observer.modules[step]))[-1] for step in (0, 6)]
    np.testing.assert_allclose(callback.tracker.largest, expected, rtol=1e-4)


class TestResume:
    @pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`, callbacks used to create the checkpoint")
    @pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch ended")
    @pytest.mark.parametrize("weights_only", [False, True])
    def test_step_numbers_and_record_go_on(self, weights_only: bool, tmp_path) -> None:
        options = dict(mode="eval", every=3, k=2, tol=1e-6, preconditioned=True)
        checkpoints = ModelCheckpoint(tmp_path, filename="{step}", save_top_k=-1, every_n_train_steps=6)
        common = dict(accumulate_grad_batches=1, enable_checkpointing=True)
        _, (first,), _ = trained(tmp_path, options, max_steps=8, callbacks=[checkpoints], **common)
        assert first.tracker.steps.tolist() == [0, 3, 6]
        saved = torch.load(tmp_path / "step=6.ckpt", weights_only=weights_only)
        (rows,) = [state["rows"] for state in saved["callbacks"].values() if "rows" in state]
        assert [row["step"] for row in rows] == [0, 3, 6]  # the callback runs before the checkpoint is written
        ckpt_path = tmp_path / "step=6.ckpt"
        resumed, (again,), observer = trained(tmp_path, options, max_steps=12, ckpt_path=ckpt_path, **common)
        assert resumed.global_step == 12
        assert again.tracker.steps.tolist() == [0, 3, 6, 9, 12]
        np.testing.assert_array_equal(again.tracker.values[:3], first.tracker.values)
        np.testing.assert_array_equal(again.tracker.thresholds, np.full(5, 2.0))
        expected = np.linalg.eigvalsh(dense(observer.modules[12]))[-2:]
        np.testing.assert_allclose(again.tracker.values[-1], 0.05 * expected, rtol=1e-4)

    def test_a_second_fit_goes_on_and_a_new_trainer_starts_anew(self, tmp_path) -> None:
        trainer, (callback,), _ = trained(tmp_path, dict(mode="eval", every=2), max_steps=4)
        loader = trainer.train_dataloader
        trainer.fit_loop.epoch_loop.max_steps = 8
        trainer.fit(trainer.lightning_module, loader)
        assert callback.tracker.steps.tolist() == [0, 2, 4, 6, 8]
        options = dict(max_steps=2, logger=False, enable_checkpointing=False, enable_progress_bar=False)
        Trainer(callbacks=[callback], accelerator="cpu", enable_model_summary=False, **options).fit(
            Regression(), loader
        )
        assert callback.tracker.steps.tolist() == [0, 2]


def test_the_preconditioned_sharpness_uses_the_optimizer_of_the_module(tmp_path) -> None:
    options = dict(mode="eval", every=3, tol=1e-6, preconditioned=True)
    _, (callback,), observer = trained(tmp_path, options, module=Regression(momentum=0.5))
    expected = [0.05 * np.linalg.eigvalsh(dense(observer.modules[step]))[-1] for step in (0, 3, 6)]
    np.testing.assert_allclose(callback.tracker.largest, expected, rtol=1e-4)
    np.testing.assert_array_equal(callback.tracker.thresholds, [3.0] * 3)
    logger = CSVLogger(tmp_path, name="", version="")
    trained(tmp_path, options, module=Regression(optimizer="Adam"), logger=logger)
    assert rows_of(tmp_path / "metrics.csv", "curvop/threshold") == pytest.approx({0: 38.0, 3: 38.0, 6: 38.0})
    assert list(rows_of(tmp_path / "metrics.csv", "curvop/largest_1")) == [3, 6]  # no second moments in step 0


def test_several_optimizers(tmp_path) -> None:
    """Each batch counts two steps, and each operator gets the optimizer of its parameters."""

    def block(names: list[str]) -> Any:
        return lambda module: operator(module).block(names)

    settings = [
        dict(operator=block(names), prefix=names[0], mode="eval", every=3, tol=1e-6, preconditioned=True)
        for names in (["net.0.weight"], ["net.4.weight", "net.4.bias"])
    ]
    trainer, callbacks, observer = trained(
        tmp_path, *settings, module=WithTwoOptimizers(), accumulate_grad_batches=1, max_steps=8
    )
    assert trainer.global_step == 8
    for callback, rate, rows in zip(callbacks, (0.1, 0.01), (slice(0, 12), slice(24, 29)), strict=True):
        assert callback.tracker.steps.tolist() == [0, 4, 6]  # 3 is passed over
        largest = np.linalg.eigvalsh(dense(observer.modules[6])[rows, rows])[-1]
        assert callback.tracker.largest[-1] == pytest.approx(rate * largest, rel=1e-4)


@pytest.mark.parametrize("of", [lambda H: H, lambda H: 2 * H + H.damped(0.1)], ids=["Hessian", "sum"])
def test_the_operator_keeps_no_memory_during_training(of: Any, tmp_path) -> None:
    operators, kept = [], []

    def kept_operator(module: Regression) -> LinearOperator:
        operators.append(operator(module))
        return of(operators[-1])

    class Memory(Callback):
        def on_train_batch_start(self, *args: Any) -> None:
            kept.append(operators[0]._engine.kept()[0])

    options = dict(operator=kept_operator, mode="eval", every=1)
    trained(tmp_path, options, module=Regression(p=0.0), callbacks=[Memory()])
    assert len(kept) == 12
    assert not any(kept)
    operators[0] @ np.ones(29)
    assert operators[0]._engine.kept()[0] > 0  # as it would


def test_parameters_of_another_module_are_refused(tmp_path) -> None:
    with pytest.raises(ValueError, match=r"not a parameter of the model that is trained.*pass a function"):
        trained(tmp_path, dict(operator=operator(Regression()), mode="eval"))


def test_strategies_that_may_divide_the_parameters_are_refused() -> None:
    trainer = SimpleNamespace(strategy=FSDPStrategy())  # a trainer with this strategy needs a GPU
    with pytest.raises(ValueError, match=r"the trainer has a FSDPStrategy, but .* use strategy='ddp'"):
        LightningTracking(operator, mode="eval").on_train_start(trainer, Regression())


def test_the_other_name_of_the_package(tmp_path) -> None:
    callback = LightningTracking(operator, mode="eval", every=1)
    options = dict(accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False)
    loader = DataLoader(TensorDataset(*inputs_and_targets()), batch_size=3)
    pytorch_lightning.Trainer(max_steps=2, callbacks=[callback], default_root_dir=tmp_path, **options).fit(
        Plain(), loader
    )
    assert callback.tracker.steps.tolist() == [0, 1, 2]


def test_the_prefixes_of_two_callbacks_must_differ(tmp_path) -> None:
    with pytest.raises(RuntimeError, match=r"`callback\.state_key` must be unique"):
        trained(tmp_path, *2 * [dict(mode="eval")])


def test_invalid_arguments() -> None:
    with pytest.raises(TypeError, match="mode"):
        LightningTracking(operator)
    with pytest.raises(ValueError, match="mode is None, but must be 'eval'"):
        LightningTracking(operator, mode=None)
