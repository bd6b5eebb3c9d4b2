"""Models whose fused implementations have no second derivative in torch, or a wrong one."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from cases import seeded
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.backends import cuda, cudnn, mha
from torch.nn import functional as F
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint

from curvop import HessianLinearOperator
from curvop.kernels.differentiable import NORMS, _in_derivative


def flags() -> tuple[bool, ...]:
    return (
        cuda.flash_sdp_enabled(),
        cuda.mem_efficient_sdp_enabled(),
        cuda.cudnn_sdp_enabled(),
        cuda.math_sdp_enabled(),
        mha.get_fastpath_enabled(),
        cudnn.enabled,
    )


def differences(model: nn.Module, X: Tensor, y: Tensor, step: float = 1e-5) -> np.ndarray:
    """Return the Hessian by central differences of the plain gradient."""
    params = list(model.parameters())
    theta = nn.utils.parameters_to_vector(params).detach()

    def gradient(vector: Tensor) -> Tensor:
        nn.utils.vector_to_parameters(vector, params)
        return torch.cat([part.reshape(-1) for part in torch.autograd.grad(F.mse_loss(model(X), y), params)])

    columns = []
    for index in range(len(theta)):
        shift = torch.zeros_like(theta)
        shift[index] = step
        columns.append((gradient(theta + shift) - gradient(theta - shift)) / (2 * step))
    nn.utils.vector_to_parameters(theta, params)
    return torch.stack(columns).numpy()


def old_weight_norm(layer: nn.Module) -> nn.Module:
    with pytest.warns(FutureWarning, match="weight_norm"):
        return nn.utils.weight_norm(layer)


NORMED = {
    "new": lambda: nn.Sequential(parametrizations.weight_norm(nn.Linear(4, 3)), nn.Tanh(), nn.Linear(3, 3)),
    "old": lambda: nn.Sequential(old_weight_norm(nn.Linear(4, 3)), nn.Tanh(), nn.Linear(3, 3)),
    "columns": lambda: nn.Sequential(parametrizations.weight_norm(nn.Linear(4, 3), dim=1), nn.Tanh()),
    "whole": lambda: nn.Sequential(parametrizations.weight_norm(nn.Linear(4, 3), dim=None), nn.Tanh()),
    "conv": lambda: nn.Sequential(
        *(nn.Unflatten(1, (1, 4)), parametrizations.weight_norm(nn.Conv1d(1, 3, 4)), nn.Flatten(), nn.Tanh())
    ),
    "spectral": lambda: nn.Sequential(parametrizations.spectral_norm(nn.Linear(4, 3)), nn.Tanh()),
}


@seeded
def normed(name: str) -> tuple[nn.Module, Tensor, Tensor]:
    return NORMED[name]().eval(), torch.randn(5, 4), torch.randn(5, 3)


@pytest.mark.parametrize("name", NORMED)
def test_normed_weights_against_finite_differences(name: str) -> None:
    model, X, y = normed(name)
    H = HessianLinearOperator(model, nn.MSELoss(), dict(model.named_parameters()), [(X, y)])
    matrix = H @ np.eye(H.shape[1])
    np.testing.assert_allclose(matrix, differences(model, X, y), rtol=1e-6, atol=1e-8)
    np.testing.assert_allclose(matrix, matrix.T, rtol=1e-10, atol=1e-14)


@seeded
def encoder() -> tuple[nn.Module, Tensor, Tensor]:
    layer = nn.TransformerEncoderLayer(4, 2, 6, dropout=0.0, batch_first=True)

    class Padded(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.t = nn.TransformerEncoder(layer, 2)

        def forward(self, X: Tensor) -> Tensor:
            mask = torch.zeros(X.shape[:2], dtype=torch.bool)
            mask[0, -1] = True
            return self.t(X, src_key_padding_mask=mask)[:, :2].flatten(1)

    return Padded().eval(), torch.randn(3, 3, 4), torch.randn(3, 8)


def test_blocks_of_an_encoder_with_a_padding_mask() -> None:
    model, X, y = encoder()
    before = flags()
    H = HessianLinearOperator(model, nn.MSELoss(), dict(model.named_parameters()), [(X, y)])
    names = ["t.layers.1.linear1.bias", "t.layers.1.norm1.weight", "t.layers.1.self_attn.in_proj_weight"]
    for name in names:
        where = H.params_slices[name]
        columns = np.eye(H.shape[1])[:, where]
        np.testing.assert_allclose(
            H.block(name) @ np.eye(columns.shape[1]), (H @ columns)[where], rtol=1e-10, atol=1e-14
        )
    assert flags() == before


def test_attention_under_checkpointing() -> None:
    torch.manual_seed(0)

    class Attention(nn.Module):
        def __init__(self, saves: bool) -> None:
            super().__init__()
            self.saves = saves
            self.qkv = nn.Linear(8, 24)

        def attend(self, X: Tensor) -> Tensor:
            q, k, v = self.qkv(X).chunk(3, -1)
            return F.scaled_dot_product_attention(q, k, v, is_causal=True)

        def forward(self, X: Tensor) -> Tensor:
            X = X.view(-1, 1, 4, 8)
            X = checkpoint(self.attend, X, use_reentrant=False) if self.saves else self.attend(X)
            return X.flatten(1)

    plain, saving = Attention(False), Attention(True)
    saving.load_state_dict(plain.state_dict())
    data = [(torch.randn(3, 32), torch.randn(3, 32))]
    x = np.ones(8 * 24 + 24)
    expected, actual = (
        HessianLinearOperator(model, nn.MSELoss(), dict(model.named_parameters()), data) @ x
        for model in (plain, saving)
    )
    np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-7)


def test_backends_are_restored_after_an_error() -> None:
    before = flags()
    model = nn.Linear(2, 1)
    H = HessianLinearOperator(
        model, nn.MSELoss(), dict(model.named_parameters()), [(torch.ones(1, 3), torch.ones(1, 1))]
    )
    with pytest.raises(RuntimeError, match="shapes"):
        H @ np.ones(3)
    assert flags() == before


class TestElementaryNorms:
    """Normalizations that are computed with elementary operations for third derivatives."""

    @pytest.mark.parametrize(
        ("norm", "arguments"),
        [
            (F.layer_norm, ((4,),)),
            (F.batch_norm, (torch.full((3,), 0.3), torch.full((3,), 2.0))),
            (F.batch_norm, (None, None, None, None, True)),
            (F.instance_norm, ()),
            (F.instance_norm, (torch.full((3,), 0.3), torch.full((3,), 2.0), None, None, False)),
        ],
        ids=["layer", "batch, evaluation", "batch, training", "instance", "instance, running statistics"],
    )
    def test_they_are_those_of_torch_with_its_defaults(self, norm, arguments) -> None:
        x = torch.linspace(-2, 1, 24).sin().view(2, 3, 4).requires_grad_()
        expected, found = norm(x, *arguments), NORMS[norm](x, *arguments)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
        gradients = [torch.autograd.grad((value**3).sum(), x)[0] for value in (found, expected)]
        torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-4)

    @pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")  # at the first use of forward mode
    def test_derivatives_are_noticed(self) -> None:
        noticed = []

        def square(x: Tensor) -> Tensor:
            noticed.append(_in_derivative())
            return (x**2).sum()

        x = torch.ones(3)
        square(x)
        torch.func.vmap(square)(x[:, None])
        assert noticed == [False, False]
        torch.func.grad(square)(x)
        torch.func.jvp(square, (x,), (x,))
        torch.func.vmap(torch.func.grad(square))(x[:, None])
        with forward_ad.dual_level():
            square(forward_ad.make_dual(x, x))
        assert noticed[2:] == [True] * 4
