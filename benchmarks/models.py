"""The problems of the benchmarks: model, loss and batches of data, float32, evaluation mode."""

from __future__ import annotations

import contextlib
import io
import itertools
import runpy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["LARGE_PROBLEMS", "PEER_PROBLEMS", "PROBLEMS", "on_device", "tutorial"]

TUTORIAL = Path(__file__).resolve().parents[1] / "docs" / "examples" / "submatrices.py"


def mlp(*sizes: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for inputs, outputs in itertools.pairwise(sizes):
        layers += [nn.Linear(inputs, outputs), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def cnn() -> nn.Sequential:
    """Three convolutions and two linear layers for images of 32 x 32."""
    return nn.Sequential(
        *(nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(32, 64, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Flatten(), nn.Linear(1024, 100), nn.ReLU(), nn.Linear(100, 10)),
    )


class Residual(nn.Module):
    """The basic block of He et al. (2016)."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(outputs)
        self.shortcut = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm2(self.conv2(self.norm1(self.conv1(x)).relu()))
        return (y + self.shortcut(x)).relu()


def resnet18() -> nn.Sequential:
    blocks, inputs = [], 64
    for outputs, stride in ((64, 1), (128, 2), (256, 2), (512, 2)):
        blocks += [Residual(inputs, outputs, stride), Residual(outputs, outputs, 1)]
        inputs = outputs
    stem = (nn.Conv2d(3, 64, 7, 2, 3, bias=False), nn.BatchNorm2d(64), nn.ReLU(), nn.MaxPool2d(3, 2, 1))
    return nn.Sequential(*stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(512, 10))


class Transformer(nn.Module):
    """One pre-norm block of a GPT."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(batch, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(attended.transpose(1, 2).reshape(batch, length, width))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class GPT(nn.Module):
    """Four blocks of width 128 over 64 positions; scores ``[B, C, T]``.

    Where the head is tied, it has no bias, and embeddings start as small as GPT-2's.
    """

    def __init__(
        self, tokens: int = 65, width: int = 128, length: int = 64, depth: int = 4, heads: int = 4, tied: bool = False
    ) -> None:
        super().__init__()
        self.embed, self.place = nn.Embedding(tokens, width), nn.Embedding(length, width)
        self.blocks = nn.Sequential(*(Transformer(width, heads) for _ in range(depth)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, tokens, bias=not tied)
        if tied:
            self.head.weight = self.embed.weight
            for embedding in (self.embed, self.place):
                nn.init.normal_(embedding.weight, std=0.02)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens) + self.place.weight[: tokens.shape[1]]
        return self.head(self.norm(self.blocks(x))).transpose(1, 2)


def gpt2(width: int = 768, depth: int = 12) -> GPT:
    """GPT-2 but for dropout: small, with 124 million parameters; medium has width 1024, depth 24 and 355 million."""
    return GPT(tokens=50257, width=width, length=1024, depth=depth, heads=width // 64, tied=True)


def tutorial() -> dict[str, Any]:
    """Run the tutorial on submatrices, in silence, and return its variables."""
    with contextlib.redirect_stdout(io.StringIO()):
        return runpy.run_path(str(TUTORIAL))


def tutorial_problem() -> dict[str, Any]:
    script = tutorial()
    return {name: script[name] for name in ("model", "loss_function", "params", "data")}


def digits() -> dict[str, Any]:
    """All images of scikit-learn's handwritten digits in three batches, for a network that is not trained."""
    from sklearn.datasets import load_digits

    pixels, labels = load_digits(return_X_y=True)
    data = list(zip(torch.from_numpy(pixels / 16).float().split(599), torch.from_numpy(labels).split(599), strict=True))
    return problem(mlp(64, 32, 10), (64,), 0, 0) | {"data": data}


def problem(model: nn.Module, shape: tuple[int, ...], batch: int, count: int, tokens: int = 0) -> dict[str, Any]:
    data = []
    for _ in range(count):
        X = torch.randint(0, tokens, (batch, *shape)) if tokens else torch.randn(batch, *shape)
        y = torch.randint(0, tokens, (batch, *shape)) if tokens else torch.randint(0, 10, (batch,))
        data.append((X, y))
    model.eval()
    return {
        "model": model,
        "loss_function": nn.CrossEntropyLoss(),
        "params": dict(model.named_parameters()),
        "data": data,
    }


def on_device(problem: dict[str, Any], device: str, larger: int = 1) -> dict[str, Any]:
    """Move a problem to a device, each of its batches `larger` times as large by repeating it."""
    problem["model"].to(device)  # its parameters stay the same objects
    data = [
        tuple(part.to(device).repeat(larger, *[1] * (part.ndim - 1)) for part in batch) for batch in problem["data"]
    ]
    return problem | {"data": data}


PROBLEMS = {
    "MLP 64-32-10": lambda: problem(mlp(64, 32, 10), (64,), 64, 2),
    "MLP 784-512-512-10": lambda: problem(mlp(784, 512, 512, 10), (784,), 128, 2),
    "CNN 32x32": lambda: problem(cnn(), (3, 32, 32), 64, 2),
    "GPT 4 layers, d = 128": lambda: problem(GPT(), (64,), 4, 2, tokens=65),
    "ResNet-18 64x64, eval": lambda: problem(resnet18(), (3, 64, 64), 8, 2),
}

PEER_PROBLEMS = {
    "tutorial MLP 7-5-5-3": tutorial_problem,
    "MLP 64-32-10, digits": digits,
    **{name: make for name, make in PROBLEMS.items() if name != "MLP 64-32-10"},
    "GPT-2 124M": lambda: problem(gpt2(), (128,), 2, 1, tokens=50257),
}

LARGE_PROBLEMS = {
    "GPT-2 124M": PEER_PROBLEMS["GPT-2 124M"],
    "GPT-2 medium 355M": lambda: problem(gpt2(1024, 24), (128,), 2, 1, tokens=50257),
}
