"""Real trainings by ``transformers.Trainer``. The references are dense Hessians at the parameters of each step."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.data import DataLoader
from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_callback import PrinterCallback

import curvop
from curvop import HessianLinearOperator
from curvop.callbacks import TransformersTracking
from curvop.spectrum import Tracker

TRACKED = ["*classifier*", "*pooler*"]  # 90 parameters


def bert(dropout: float = 0.1) -> nn.Module:
    torch.manual_seed(0)
    size = dict(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2, vocab_size=20)
    config = BertConfig(**size, hidden_dropout_prob=dropout, attention_probs_dropout_prob=dropout)
    return BertForSequenceClassification(config)


def examples() -> list[dict[str, Tensor]]:
    rng = np.random.default_rng(0)
    return [{"input_ids": torch.tensor(rng.integers(0, 20, 4)), "labels": torch.tensor(i % 2)} for i in range(12)]


def hessian(model: nn.Module) -> HessianLinearOperator:
    functions = curvop.huggingface.sequence_classification(model)
    data = DataLoader(examples(), batch_size=5)  # draws a random number in each pass
    return HessianLinearOperator.from_functions(**functions, params=curvop.select(model, TRACKED), data=data)


def dense(model: nn.Module) -> Tensor:
    """Return the Hessian of the model's own loss for all examples, by double backward in float64."""
    model = copy.deepcopy(model).double()
    batch = {name: torch.stack([example[name] for example in examples()]) for name in ("input_ids", "labels")}
    params = curvop.select(model, TRACKED)
    shapes = {name: parameter.shape for name, parameter in params.items()}

    def loss(vector: Tensor) -> Tensor:
        parts = vector.split([shape.numel() for shape in shapes.values()])
        values = {name: part.view(shape) for (name, shape), part in zip(shapes.items(), parts, strict=True)}
        return functional_call(model, values, (), batch).loss

    point = torch.cat([parameter.detach().reshape(-1) for parameter in params.values()])
    return torch.autograd.functional.hessian(loss, point)


class Observer(TrainerCallback):
    """Keeps copies of the model, and what a callback before it may have changed."""

    def __init__(self) -> None:
        self.models: dict[int, nn.Module] = {}
        self.seen: list[Any] = []

    def on_train_begin(self, args, state, control, model, **kwargs) -> None:
        self.on_step_end(args, state, control, model)

    def on_step_end(self, args, state, control, model, **kwargs) -> None:
        plain = copy.deepcopy(model)
        if "_original_forward" in plain.__dict__:  # of mixed precision
            del plain.__dict__["_original_forward"], plain.__dict__["forward"]
        self.models[state.global_step] = plain
        modes = [module.training for module in model.modules()]
        self.seen.append((state.global_step, modes, control.should_log, torch.get_rng_state().tolist()))

    def on_pre_optimizer_step(self, args, state, control, model, **kwargs) -> None:
        gradients = [p.grad.clone() if p.grad is not None else None for p in model.parameters()]
        self.seen.append([g if g is None else g.tolist() for g in gradients])


def trained(
    folder: Path, *settings: dict[str, Any], model: nn.Module | None = None, operator: Any = hessian, **arguments: Any
) -> tuple[Trainer, list[TransformersTracking], Observer]:
    """Train with one callback for each dict of settings."""
    plain = dict(
        max_steps=6,
        per_device_train_batch_size=3,
        gradient_accumulation_steps=2,
        learning_rate=0.02,
        logging_steps=2,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
    )
    resume = arguments.pop("resume", None)
    model = bert() if model is None else model
    trainer = Trainer(model, TrainingArguments(str(folder), **plain | arguments), train_dataset=examples())
    trainer.remove_callback(PrinterCallback)
    callbacks = [TransformersTracking(trainer, operator, **options) for options in settings]
    observer = Observer()
    for callback in [*callbacks, observer]:
        trainer.add_callback(callback)
    trainer.train(resume_from_checkpoint=resume)
    return trainer, callbacks, observer


def logged(trainer: Trainer, name: str) -> dict[int, float]:
    return {row["step"]: row[name] for row in trainer.state.log_history if name in row}


def test_the_log_contains_the_eigenvalues_of_the_dense_hessian(tmp_path) -> None:
    options = [
        dict(mode="eval", every=3, k=2, tol=1e-6),
        dict(mode="eval", every=2, which="SA", tol=1e-6, prefix="other"),
    ]
    trainer, (largest, smallest), observer = trained(tmp_path, *options)
    assert largest.tracker.steps.tolist() == [0, 3, 6]  # optimizer steps of two batches each
    assert smallest.tracker.steps.tolist() == [0, 2, 4, 6]
    expected = {step: np.linalg.eigvalsh(dense(model.eval())) for step, model in observer.models.items()}
    names = {"curvop/largest_1": -1, "curvop/largest_2": -2, "other/smallest_1": 0}
    for name, index in names.items():
        values = logged(trainer, name)
        assert list(values) == (smallest if index == 0 else largest).tracker.steps.tolist()
        scale = np.abs(expected[0]).max()
        for step, value in values.items():
            assert value == pytest.approx(expected[step][index], rel=1e-4, abs=1e-5 * scale)
    assert len(set(logged(trainer, "curvop/largest_1").values())) == 3  # training has changed them


def test_training_is_bitwise_the_same_with_the_callback(tmp_path) -> None:
    """Parameters, losses, gradients, modes, random states, and the steps at which the trainer logs its own loss."""
    runs = [trained(tmp_path, *options) for options in ([], [dict(mode="eval", every=1)])]
    (plain, _, seen), (tracked, (callback,), seen_with) = runs
    assert len(callback.tracker.steps) == 7
    assert seen.seen == seen_with.seen
    for name, tensor in plain.model.state_dict().items():
        assert torch.equal(tensor, tracked.model.state_dict()[name]), name
    for name in ("loss", "grad_norm", "learning_rate"):
        assert logged(plain, name) == logged(tracked, name)
    assert list(logged(plain, "loss")) == [2, 4, 6]


def test_tensorboard_receives_the_values(tmp_path, monkeypatch) -> None:
    event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "board"))
    trainer, _, _ = trained(tmp_path, dict(mode="eval", every=3), report_to="tensorboard")
    events = event_accumulator.EventAccumulator(str(tmp_path / "board")).Reload()
    found = {event.step: event.value for event in events.Scalars("train/curvop/largest_1")}
    assert found == pytest.approx(logged(trainer, "curvop/largest_1"))
    assert sorted(found) == [0, 3, 6]


def test_mixed_precision_does_not_round_the_eigenvalues(tmp_path) -> None:
    trainer, _, observer = trained(tmp_path, dict(mode="eval", every=6, tol=1e-6), bf16=True)
    assert "_original_forward" in trainer.model.__dict__  # accelerate has wrapped the model, and it still is
    assert trainer.model.forward is not trainer.model._original_forward
    for step, value in logged(trainer, "curvop/largest_1").items():
        largest = np.linalg.eigvalsh(dense(observer.models[step].eval()))[-1]
        assert value == pytest.approx(largest, rel=1e-4)


class TestResume:
    def test_step_numbers_and_record_go_on(self, tmp_path) -> None:
        options = dict(mode="eval", every=2, k=2, tol=1e-6, preconditioned=True)
        whole, (callback,), _ = trained(tmp_path / "whole", options, max_steps=8, save_strategy="steps", save_steps=5)
        resumed, (again,), _ = trained(
            tmp_path / "again", options, max_steps=8, resume=str(tmp_path / "whole" / "checkpoint-5")
        )
        assert again.tracker.steps.tolist() == callback.tracker.steps.tolist() == [0, 2, 4, 6, 8]
        np.testing.assert_array_equal(again.tracker.values[:3], callback.tracker.values[:3])
        np.testing.assert_allclose(again.tracker.values, callback.tracker.values, rtol=1e-4)
        np.testing.assert_array_equal(again.tracker.thresholds, callback.tracker.thresholds)
        name = "curvop/largest_1"
        assert list(logged(resumed, name)) == list(logged(whole, name)) == [2, 4, 6, 8]

    def test_a_step_of_the_checkpoint_is_not_computed_again(self, tmp_path) -> None:
        options = dict(mode="eval", every=2)
        trained(tmp_path, options, max_steps=4, save_strategy="steps", save_steps=4)
        resumed, (again,), _ = trained(tmp_path, options, max_steps=6, resume=True)
        assert again.tracker.steps.tolist() == [0, 2, 4, 6]
        history = json.loads((tmp_path / "checkpoint-4" / "trainer_state.json").read_text())["log_history"]
        assert sum("curvop/largest_1" in row for row in history) == 3
        assert list(logged(resumed, "curvop/largest_1")) == [0, 2, 4, 6]


def test_the_preconditioned_sharpness_uses_the_optimizer_of_the_trainer(tmp_path) -> None:
    options = dict(mode="eval", every=3, tol=1e-6, preconditioned=True)
    trainer, _, observer = trained(
        tmp_path, options, optim="sgd", optim_args="momentum=0.5", lr_scheduler_type="constant", max_grad_norm=0.0
    )
    for step, value in logged(trainer, "curvop/largest_1").items():
        largest = np.linalg.eigvalsh(dense(observer.models[step].eval()))[-1]
        assert value == pytest.approx(0.02 * largest, rel=1e-4)
    assert logged(trainer, "curvop/threshold") == {0: 3.0, 3: 3.0, 6: 3.0}
    adam, _, _ = trained(tmp_path, options)
    assert list(logged(adam, "curvop/threshold")) == [0, 3, 6]
    assert list(logged(adam, "curvop/largest_1")) == [3, 6]  # no second moments in step 0
    assert all(math.isfinite(value) for row in adam.state.log_history for value in row.values())


@pytest.mark.parametrize("preconditioned", [False, True])
def test_a_training_that_diverges_goes_on(preconditioned: bool, tmp_path) -> None:
    options = dict(mode="eval", every=2, preconditioned=preconditioned)
    with pytest.warns(RuntimeWarning, match=r"step \d: the eigenvalues are NaN, because the product is not finite at"):
        trainer, (callback,), _ = trained(
            tmp_path, options, learning_rate=1e30, optim="sgd", lr_scheduler_type="constant", max_grad_norm=0.0
        )
    assert trainer.state.global_step == 6
    assert callback.tracker.steps.tolist() == [0, 2, 4, 6]
    assert np.isfinite(callback.tracker.largest).tolist() == [True, False, False, False]
    assert list(logged(trainer, "curvop/largest_1")) == [0]
    assert trainer.model.training


def test_dropout_is_refused_in_training_mode(tmp_path) -> None:
    with pytest.raises(curvop.NonDeterministicObjectiveError):
        trained(tmp_path, dict(mode="train", every=1))
    trainer, _, observer = trained(tmp_path, dict(mode="train", every=6, tol=1e-6), model=bert(dropout=0.0))
    for step, value in logged(trainer, "curvop/largest_1").items():
        assert value == pytest.approx(np.linalg.eigvalsh(dense(observer.models[step]))[-1], rel=1e-4)


class TestRefusals:
    def test_an_operator_of_another_model(self, tmp_path) -> None:
        with pytest.raises(ValueError, match=r"not a parameter of the model that is trained.*pass a function"):
            trained(tmp_path, dict(mode="eval"), operator=hessian(bert()))

    def test_parameters_that_are_divided_among_processes(self, tmp_path) -> None:
        trainer, (callback,), _ = trained(tmp_path, dict(mode="eval"), max_steps=1)
        trainer.is_fsdp_enabled = True
        with pytest.raises(ValueError, match="the trainer uses FSDP or DeepSpeed, which divide"):
            callback.on_train_begin(trainer.args, trainer.state, trainer.control, model=trainer.model, optimizer=None)

    def test_two_callbacks_with_the_same_names(self, tmp_path) -> None:
        with pytest.raises(ValueError, match="two callbacks have the prefix 'curvop'"):
            trained(tmp_path, dict(mode="eval"), dict(mode="eval", which="SA"))

    def test_an_operator_of_the_trained_model_is_accepted(self, tmp_path) -> None:
        model = bert()
        _, (callback,), _ = trained(tmp_path, dict(mode="eval", every=3), model=model, operator=hessian(model))
        assert callback.tracker.steps.tolist() == [0, 3, 6]

    @pytest.mark.parametrize(
        ("change", "error", "match"),
        [
            (dict(mode="evaluation"), ValueError, "mode is 'evaluation', but must be 'eval'"),
            (dict(every=0), ValueError, "every is 0"),
            (dict(k=0), ValueError, "k is 0"),
            (dict(which="SM"), ValueError, "which is 'SM'"),
            (dict(tol="small"), TypeError, "tol is a str"),
            (dict(prefix=""), ValueError, "prefix is '', but must be a name"),
            (dict(operator=3), TypeError, "operator is a int, but must be a curvature operator, or a function"),
            (dict(trainer=None), TypeError, r"trainer is a NoneType, but must be a transformers\.Trainer"),
        ],
    )
    def test_invalid_arguments(self, change, error, match, tmp_path) -> None:
        trainer = Trainer(bert(), TrainingArguments(str(tmp_path), report_to="none", use_cpu=True))
        with pytest.raises(error, match=match):
            TransformersTracking(**dict(trainer=trainer, operator=hessian, mode="eval") | change)

    def test_the_mode_has_no_default(self, tmp_path) -> None:
        trainer = Trainer(bert(), TrainingArguments(str(tmp_path), report_to="none", use_cpu=True))
        with pytest.raises(TypeError, match="mode"):
            TransformersTracking(trainer, hessian)


def test_the_record_can_be_saved_after_training(tmp_path) -> None:
    _, (callback,), _ = trained(tmp_path, dict(mode="eval", every=3))
    callback.tracker.save(tmp_path / "sharpness.npz")
    np.testing.assert_array_equal(Tracker.load(tmp_path / "sharpness.npz").largest, callback.tracker.largest)
