"""The factors of layers of other libraries, of attention, and of tied weights.

The references are the inputs of each module, from its forward hook, and the derivatives of each entry of the prediction
with respect to the output of the module, by ``torch.autograd.grad``. The loss is the squared error.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cases import seeded
from scipy.linalg import block_diag
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from curvop import EKFACLinearOperator, KFACLinearOperator

N, LENGTH = 4, 5


def close(actual: Any, expected: Any) -> None:
    np.testing.assert_allclose(actual, expected, rtol=1e-10, atol=1e-12)


def gram(vectors: Tensor) -> Tensor:
    rows = vectors.reshape(-1, vectors.shape[-1]).detach()
    return rows.T @ rows


def input_factor(x: Tensor, bias: bool = False) -> Tensor:
    """Return the mean of a a' over all positions."""
    x = torch.cat([x, torch.ones_like(x[..., :1])], -1) if bias else x
    return gram(x) / x[..., 0].numel()


def output_factor(prediction: Tensor, z: Tensor) -> Tensor:
    """Return the sum of g g' over all positions and all columns. The mean squared error has the columns ``r e_c``."""
    gradients = [torch.autograd.grad(entry, z, retain_graph=True)[0] for entry in prediction.reshape(-1)]
    return 2 / prediction.numel() * sum(map(gram, gradients))


def assert_factors(model: nn.Module, X: Any, weights: list[str], bias: bool) -> None:
    """Compare the factors of the modules with these weights, called once in each evaluation, with the references."""
    names = {f"{weight.removesuffix('weight')}{kind}" for weight in weights for kind in ("weight", "bias")}
    params = {name: value for name, value in model.named_parameters() if name in names}
    assert len(params) == len(weights) * (1 + bias)
    calls: dict[str, tuple[Tensor, Tensor]] = {}
    hooks = [
        model.get_submodule(weight.removesuffix(".weight")).register_forward_hook(
            lambda module, args, output, weight=weight: calls.update({weight: (args[0], output)})
        )
        for weight in weights
    ]
    prediction = model(X)
    for hook in hooks:
        hook.remove()
    references = {weight: (input_factor(x, bias), output_factor(prediction, z)) for weight, (x, z) in calls.items()}
    K = KFACLinearOperator(model, nn.MSELoss(), params, [(X, torch.zeros_like(prediction))])
    for weight, (A, B) in references.items():
        close(K.factors[weight].input, A)
        close(K.factors[weight].output, B)
    E = EKFACLinearOperator(model, nn.MSELoss(), params, [(X, torch.zeros_like(prediction))])
    rows = [torch.autograd.grad(entry, list(params.values()), retain_graph=True) for entry in prediction.reshape(-1)]
    close(E.trace(), 2 / prediction.numel() * sum(part.square().sum() for row in rows for part in row))


class Pooled(nn.Module):
    """The mean of the hidden states of a transformer, as a prediction for each sentence."""

    def __init__(self, transformer: nn.Module) -> None:
        super().__init__()
        self.transformer = transformer

    def forward(self, X: Tensor) -> Tensor:
        return self.transformer(input_ids=X, use_cache=False).last_hidden_state.mean(1)


@seeded
def gpt2() -> nn.Module:
    transformers = pytest.importorskip("transformers")
    sizes = {"vocab_size": 11, "n_positions": 8, "n_embd": 4, "n_layer": 2, "n_head": 2}
    rates = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    config = transformers.GPT2Config(**sizes, **rates, bos_token_id=0, eos_token_id=0)
    return transformers.GPT2Model(config).double().eval()


@seeded
def tokens() -> Tensor:
    return torch.randint(0, 11, (N, LENGTH))


def test_layers_of_transformers() -> None:
    """The class ``Conv1D`` of transformers is a linear layer that stores the transposed weight."""
    model = Pooled(gpt2())
    weights = [f"transformer.h.0.{name}.weight" for name in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")]
    assert_factors(model, tokens(), weights, bias=True)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_adapters_of_peft() -> None:
    peft = pytest.importorskip("peft")
    adapters = peft.LoraConfig(r=2, target_modules=["c_attn", "c_fc"], fan_in_fan_out=True, lora_dropout=0.0)

    @seeded
    def adapted() -> nn.Module:
        model = peft.get_peft_model(gpt2(), adapters).double().eval()
        for name, value in model.named_parameters():
            if "lora_B" in name:  # they are zero initially
                nn.init.normal_(value, std=0.1)
        return model

    model = Pooled(adapted())
    weights = [name for name, value in model.named_parameters() if value.requires_grad]
    assert len(weights) == 8
    assert_factors(model, tokens(), weights, bias=False)


@pytest.mark.parametrize("cls", [KFACLinearOperator, EKFACLinearOperator])
def test_gradient_checkpointing(cls: Any) -> None:
    class Model(nn.Module):
        def __init__(self, saves: bool) -> None:
            super().__init__()
            self.first = nn.Sequential(nn.Conv1d(2, 3, 3, padding=1), nn.Tanh(), nn.Linear(LENGTH, 4), nn.Tanh())
            self.last, self.saves = nn.Linear(12, 3), saves

        def forward(self, X: Tensor) -> Tensor:
            h = checkpoint(self.first, X, use_reentrant=False) if self.saves else self.first(X)
            return self.last(h.flatten(1))

    data = [seeded(lambda: (torch.randn(N, 2, LENGTH), torch.randint(0, 3, (N,))))()]
    plain, saving = (
        cls(model, nn.CrossEntropyLoss(), dict(model.named_parameters()), data)
        for model in map(seeded(Model), (False, True))
    )
    np.testing.assert_allclose(saving.to_dense(), plain.to_dense(), rtol=1e-12, atol=1e-15)


class TestAttention:
    """``nn.MultiheadAttention`` against its definition."""

    HEADS, WIDTH = 2, 4

    def attend(self, layer: nn.MultiheadAttention, x: Tensor, keys: Tensor) -> dict[str, Tensor]:
        """Return the projections, the input of the output layer, and its output."""
        rows = (self.WIDTH, 2 * self.WIDTH)
        weights, biases = layer.in_proj_weight.split(rows), layer.in_proj_bias.split(rows)
        q, kv = (F.linear(own, W, b) for own, W, b in zip((x, keys), weights, biases, strict=True))
        heads = [part.unflatten(-1, (self.HEADS, -1)).transpose(1, 2) for part in (q, *kv.chunk(2, -1))]
        scores = heads[0] @ heads[1].mT / (self.WIDTH / self.HEADS) ** 0.5
        mixed = (scores.softmax(-1) @ heads[2]).transpose(1, 2).flatten(2)
        return {"q": q, "kv": kv, "mixed": mixed, "out": F.linear(mixed, layer.out_proj.weight, layer.out_proj.bias)}

    @seeded
    def case(self) -> tuple[nn.MultiheadAttention, Tensor]:
        layer = nn.MultiheadAttention(self.WIDTH, self.HEADS, batch_first=True)
        nn.init.normal_(layer.in_proj_bias)
        return layer, torch.randn(N, LENGTH, self.WIDTH)

    @pytest.mark.parametrize("crosses", [False, True], ids=["self", "cross"])
    def test_factors(self, crosses: bool) -> None:
        layer, X = self.case()

        class Model(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.layer = layer

            def forward(self, x: Tensor) -> Tensor:
                keys = x.sin() if crosses else x
                return self.layer(x, keys, keys, need_weights=False)[0].sum(1)

        found = self.attend(layer, X, X.sin() if crosses else X)
        prediction = found["out"].sum(1)
        model = Model()
        close(prediction.detach(), model(X).detach())
        params = dict(model.named_parameters())
        data = [(X, torch.zeros(N, self.WIDTH).double())]
        K = KFACLinearOperator(model, nn.MSELoss(), params, data, joint_bias=False)
        close(K.factors["layer.out_proj.weight"].input, input_factor(found["mixed"]))
        close(K.factors["layer.out_proj.weight"].output, output_factor(prediction, found["out"]))
        q, kv = (output_factor(prediction, found[name]) for name in ("q", "kv"))
        if crosses:
            projections = block_diag(np.kron(q, input_factor(X)), np.kron(kv, input_factor(X.sin())))
            close(K.block("layer.in_proj_bias").to_dense(), block_diag(q, kv))
        else:  # one product with the whole matrix
            g = [
                torch.cat(torch.autograd.grad(entry, [found["q"], found["kv"]], retain_graph=True), -1)
                for entry in prediction.reshape(-1)
            ]
            projections = np.kron(2 / prediction.numel() * sum(map(gram, g)), input_factor(X))
        close(K.block("layer.in_proj_weight").to_dense(), projections)


def test_tied_embeddings() -> None:
    """The block is the Kronecker product that is nearest to the sum of the products of both uses."""

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.tokens, self.head = nn.Embedding(6, 3), nn.Linear(3, 6, bias=False)
            self.head.weight = self.tokens.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.tokens(x).tanh().mean(1))

    model, X = seeded(Model)(), tokens() % 6
    K = KFACLinearOperator(model, nn.MSELoss(), dict(model.named_parameters()), [(X, torch.zeros(N, 6).double())])
    embedded = model.tokens(X)
    mean = embedded.tanh().mean(1)
    prediction = F.linear(mean, model.head.weight)
    counts = torch.bincount(X.reshape(-1), minlength=6).double() / X.numel()
    head = np.kron(output_factor(prediction, prediction), input_factor(mean))
    total = head + np.kron(torch.diag(counts), output_factor(prediction, embedded))
    U, s, V = np.linalg.svd(total.reshape(6, 3, 6, 3).transpose(0, 2, 1, 3).reshape(36, 9))
    close(K.to_dense(), s[0] * np.kron(U[:, 0].reshape(6, 6), V[0].reshape(3, 3)))


PEAKS = """
import torch
from torch import nn
from curvop import EKFACLinearOperator, KFACLinearOperator
from curvop.kernels.memory import peak_rise

model = nn.Sequential(nn.Conv2d(4, 2, 5, padding=2, bias=False), nn.AdaptiveAvgPool2d(1), nn.Flatten())
for build, sharing in (KFACLinearOperator, "expand"), (KFACLinearOperator, "reduce"), (EKFACLinearOperator, "expand"):
    for count in (2, 96):
        data = [(torch.randn(count, 4, 64, 64), torch.zeros(count, 2))]
        make = lambda: build(model, nn.MSELoss(), dict(model.named_parameters()), data, sharing=sharing)
        rise = peak_rise(make, torch.device("cpu"))
    print(-1 if rise is None else rise / (25 * data[0][0].nbytes))
"""


@pytest.mark.slow
def test_a_convolution_is_not_unfolded_at_once() -> None:
    """The patches of all images would take 25 times the memory of the images."""
    # With this setting, glibc returns freed memory at once, so that the peak is exact.
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "1000000", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", PEAKS], env=environment, capture_output=True, text=True, check=True)
    peaks = [float(line) for line in done.stdout.splitlines()]
    if -1 in peaks:
        pytest.skip("the peak of memory is not known on this system")
    assert len(peaks) == 3
    assert max(peaks) < 0.4, peaks


@pytest.mark.slow
def test_factors_of_a_second_device() -> None:
    """A second device is registered for a whole process."""
    code = """
import copy, numpy as np, torch
from second_device import SECOND
from torch import nn
from curvop import EKFACLinearOperator, KFACLinearOperator
from curvop.operators import transfer
transfer._MAX_PINNED_BYTES = 0  # the device has no pinned memory
torch.manual_seed(0)
here = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()
there = copy.deepcopy(here).to(SECOND)
data = [(torch.randn(6, 4).double(), torch.randint(0, 3, (6,)))]
for kind in KFACLinearOperator, EKFACLinearOperator:
    A, B = (kind(model, nn.CrossEntropyLoss(), dict(model.named_parameters()), data) for model in (there, here))
    assert {str(factors.output.device) for factors in A.factors.values()} == {SECOND}
    X = np.random.default_rng(0).standard_normal((A.shape[0], 2))
    np.testing.assert_allclose(A @ X, B @ X, rtol=1e-12, atol=1e-14)
    np.testing.assert_allclose(A.inverse(0.1) @ X, B.inverse(0.1) @ X, rtol=1e-10)
"""
    path = [str(Path(__file__).parents[1]), *sys.path]
    code = f"import sys; sys.path[:0] = {path}\n{code}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=False)
    assert done.returncode == 0, done.stderr.decode()
