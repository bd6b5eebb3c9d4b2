"""Train with two processes, for `test_all_frameworks`: ``torchrun two_process_training.py FRAMEWORK FOLDER``.

Each process writes the steps of its tracker and its final parameters. The first process also writes the logged value of
the last step, and the largest eigenvalue of the dense Hessian at the final parameters.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from curvop import HessianLinearOperator, functorch_hessian

__all__: list[str] = []


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1))


def data() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(16, 3, generator=generator), torch.randn(16, 1, generator=generator)


def by_transformers(folder: Path) -> tuple[nn.Module, Any, list[float]]:
    from transformers import Trainer, TrainingArguments

    from curvop.callbacks import TransformersTracking

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = net()

        def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
            z = self.net(x)
            return {"loss": nn.functional.mse_loss(z, labels), "logits": z}

    options: dict[str, Any] = dict(use_cpu=True, report_to="none", disable_tqdm=True, save_strategy="no")
    args = TrainingArguments(str(folder), max_steps=4, per_device_train_batch_size=2, **options)
    examples = [{"x": x, "labels": y} for x, y in zip(*data(), strict=True)]
    trainer = Trainer(Model(), args, train_dataset=examples)

    def operator(model: Any) -> HessianLinearOperator:
        return HessianLinearOperator(model.net, nn.MSELoss(), model.net.parameters(), [data()])

    callback = TransformersTracking(trainer, operator, mode="eval", every=2, tol=1e-6)
    trainer.add_callback(callback)
    trainer.train()
    name = "curvop/largest_1"
    return trainer.model.net, callback, [row[name] for row in trainer.state.log_history if name in row]


def by_lightning(folder: Path) -> tuple[nn.Module, Any, list[float]]:
    from lightning.pytorch import LightningModule, Trainer
    from lightning.pytorch.loggers import CSVLogger

    from curvop.callbacks import LightningTracking

    class Model(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = net()

        def training_step(self, batch: list[Tensor]) -> Tensor:
            return nn.functional.mse_loss(self.net(batch[0]), batch[1])

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=0.1)

    def operator(model: Any) -> HessianLinearOperator:
        return HessianLinearOperator(model.net, nn.MSELoss(), model.net.parameters(), [data()])

    callback = LightningTracking(operator, mode="eval", every=2, tol=1e-6)
    logger = CSVLogger(folder, name="", version="")
    options: dict[str, Any] = dict(accelerator="cpu", devices=2, strategy="ddp", enable_progress_bar=False)
    trainer = Trainer(max_steps=4, callbacks=[callback], logger=logger, enable_checkpointing=False, **options)
    model = Model()
    trainer.fit(model, DataLoader(TensorDataset(*data()), batch_size=2))
    logged = np.genfromtxt(folder / "metrics.csv", delimiter=",", names=True) if trainer.is_global_zero else None
    return model.net, callback, [] if logged is None else logged["curvoplargest_1"].tolist()


def main(framework: str, folder: Path) -> None:
    torch.set_num_threads(1)
    model, callback, logged = {"transformers": by_transformers, "lightning": by_lightning}[framework](folder)
    dense = functorch_hessian(model, nn.MSELoss(), dict(model.named_parameters()), [data()])
    result = {
        "steps": None if callback.tracker is None else callback.tracker.steps.tolist(),
        "logged": logged,
        "dense": np.linalg.eigvalsh(dense.double()).max(),
        "parameters": [parameter.tolist() for parameter in model.parameters()],
    }
    (folder / f"{os.environ['RANK']}.json").write_text(json.dumps(result))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
