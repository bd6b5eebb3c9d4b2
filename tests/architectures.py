"""Small models of every kind of layer, with data; float64, evaluation mode."""

from __future__ import annotations

from typing import Any

import torch
from cases import N, Problem, cut, mlp, seeded
from torch import Tensor, nn
from torch.nn import functional as F


def conv_net() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 2, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(2, 2, 2),
        nn.Tanh(),
        nn.Flatten(),
        nn.Linear(2, 3),
    )


def normed(*layers: nn.Module) -> nn.Module:
    model = nn.Sequential(nn.Conv2d(1, 4, 2, stride=2), *layers, nn.Flatten(), nn.Linear(16, 3))
    for layer in layers:
        for buffer in layer.buffers():
            if buffer.is_floating_point():
                buffer.copy_(torch.rand_like(buffer) + 0.5)
        for parameter in layer.parameters():
            nn.init.normal_(parameter)
    return model


class Attention(nn.Module):
    """One block of attention over four positions, by the means named."""

    def __init__(self, means: str) -> None:
        super().__init__()
        self.means = means
        self.embed = nn.Linear(4, 4)
        self.norm = nn.LayerNorm(4)
        nn.init.normal_(self.norm.weight)
        if means == "module":
            self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
        else:
            self.qkv = nn.Linear(4, 12)
        self.head = nn.Linear(4, 3)

    def forward(self, X: Tensor) -> Tensor:
        x = self.norm(self.embed(X.flatten(1).reshape(len(X), 4, 4)))
        if self.means == "module":
            x = x + self.attention(x, x, x)[0]
        else:
            q, k, v = self.qkv(x).chunk(3, dim=-1)
            if self.means == "fused":
                x = x + F.scaled_dot_product_attention(q, k, v, is_causal=True)
            else:
                x = x + (q @ k.mT / 2).softmax(-1) @ v
        return self.head(x.mean(1))


class Recurrent(nn.Module):
    def __init__(self, kind: type[nn.RNNBase]) -> None:
        super().__init__()
        self.recurrent = kind(4, 3, batch_first=True)
        self.head = nn.Linear(3, 3)

    def forward(self, X: Tensor) -> Tensor:
        return self.head(self.recurrent(X.reshape(len(X), 4, 4))[0][:, -1])


class Tied(nn.Module):
    """The embedding is the decoder."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(3, 4)
        self.mix = nn.Linear(4, 4)
        self.decode = nn.Linear(4, 3, bias=False)
        self.decode.weight = self.embed.weight

    def forward(self, X: Tensor) -> Tensor:
        return self.decode(self.mix(self.embed((X.flatten(1)[:, :2] > 0).long()).mean(1)).tanh())


class Unreached(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.idle = nn.Linear(2, 2)
        self.mlp = mlp(16)

    def forward(self, X: Tensor) -> Tensor:
        return self.mlp(X.flatten(1))


class EmbeddingBag(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(5, 4, padding_idx=0)
        self.head = nn.Linear(4, 3)

    def forward(self, X: Tensor) -> Tensor:
        return self.head(self.embed((X.flatten(1).abs() * 3).long().clamp(max=4)).sum(1).sigmoid())


ARCHITECTURES: dict[str, Any] = {
    "linear": lambda: nn.Sequential(nn.Flatten(), nn.Linear(16, 3)),
    "conv": conv_net,
    "layer-norm": lambda: normed(nn.LayerNorm([4, 2, 2]), nn.Tanh()),
    "batch-norm-eval": lambda: normed(nn.BatchNorm2d(4), nn.Tanh()),
    "group-norm-silu": lambda: normed(nn.GroupNorm(2, 4), nn.SiLU()),
    "instance-norm": lambda: normed(nn.InstanceNorm2d(4, affine=True), nn.Tanh()),
    "gelu-dropout-eval": lambda: normed(nn.GELU(), nn.Dropout(0.5)),
    "embedding": EmbeddingBag,
    "attention-softmax": lambda: Attention("softmax"),
    "attention-fused": lambda: Attention("fused"),
    "attention-module": lambda: Attention("module"),
    "lstm": lambda: Recurrent(nn.LSTM),
    "gru": lambda: Recurrent(nn.GRU),
    "tied": Tied,
    "unreached": Unreached,
}

#: Those that torch cannot map over examples.
RECURRENT = ("lstm", "gru")


@seeded
def architecture_problem(name: str) -> Problem:
    model = ARCHITECTURES[name]().eval()
    data = cut(torch.randn(N, 1, 4, 4), torch.randint(0, 3, (N,)), (6, 3))
    return Problem(model, nn.CrossEntropyLoss(), data)
